"""Mistakes of users, and the one place where an exception becomes a line and an exit code.

Every command runs in `run_command`. Code that it calls lets exceptions pass, and raises `UserError` itself only where
it knows a remedy that the exception does not tell, or can save the user work.
"""
import argparse
import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, Optional

__all__ = [
    'TOKEN', 'CommandParser', 'Diverged', 'Interrupted', 'UserError', 'misfit', 'nearest', 'run_command', 'user_errors']

# Exceptions that are no defect of this package, by module and name, since importing their modules takes seconds.
_EXPECTED = {
    'json.decoder.JSONDecodeError': 'is no JSON',
    'builtins.UnicodeDecodeError': 'is no text in UTF-8',
    'yaml.error.YAMLError': 'is no YAML',
    'safetensors._safetensors_rust.SafetensorError': 'a weights file is damaged or no safetensors file',
    'PIL.Image.DecompressionBombError': 'an image is too large',
    'sqlalchemy.exc.SQLAlchemyError': 'the database of the sweep cannot be used',
    'optuna.exceptions.StorageInternalError': 'the database of the sweep cannot be used',
    'zipfile.BadZipFile': 'an archive is damaged',
    'builtins.MemoryError': 'out of memory; lower the batch size',
    'torch.OutOfMemoryError': 'the device is out of memory; lower the batch size',
    'huggingface_hub.errors.HfHubHTTPError': 'the Hub refused',
    'httpx2.HTTPError': 'the Hub cannot be reached',
    'httpx.HTTPError': 'the Hub cannot be reached',
    'huggingface_hub.errors.LocalEntryNotFoundError': 'the Hub cannot be reached, and the cache has no copy',
}
# What PyTorch says of weights, images or settings that do not fit a model; it has one class for everything.
_MISFITS = re.compile(
    r'loading state_dict|size mismatch|shapes cannot be multiplied|must match the size|expected input|input size'
    r'|more than 1 value per channel|Kernel size|Sizes of tensors|out of memory|enforce fail at alloc', re.IGNORECASE)
# Distribution -> extra that brings it.
_EXTRAS = {
    'sklearn': 'search', 'scipy': 'search', 'ot': 'search', 'matplotlib': 'report', 'onnx': 'export',
    'onnxruntime': 'export', 'onnxscript': 'export', 'skimage': 'demo', 'peft': 'lora',
    'tensorboard': 'tensorboard', 'optuna': 'sweep', 'datasets': 'data', 'pyarrow': 'data',
}
# What other programs call flags of timm's.
_SYNONYMS = {
    'learning_rate': 'lr', 'num_epochs': 'epochs', 'batchsize': 'batch_size', 'arch': 'model', 'wd': 'weight_decay',
    'image_size': 'img_size', 'checkpoint': 'initial_checkpoint',
}
# A token of the Hub's, which nothing that is written or printed may show.
TOKEN = re.compile(r'\bhf_\w{8,}')


class UserError(Exception):
    """A mistake that a user can mend: one line that names the thing and the remedy."""


class Diverged(UserError):
    """A training whose loss or weights are no longer finite: its LR is too high, for who tries several."""


class Interrupted(Exception):
    """A signal asked a run to stop, and it stopped with a checkpoint.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


def nearest(word: str, choices: Iterable[str], otherwise: str = '') -> str:
    """', did you mean ...?' with the closest of the choices, or `otherwise` where none is close."""
    # Of two flags the dashes are alike, whatever they are called.
    spelled = {choice.lstrip('-').replace('-', '_'): choice for choice in choices}
    known = {**{other: spelled[name] for other, name in _SYNONYMS.items() if name in spelled}, **spelled}
    close = difflib.get_close_matches(word.lstrip('-').replace('-', '_'), known, n=1)
    return f', did you mean {known[close[0]]}?' if close else otherwise


def misfit(error: Exception) -> str:
    """What PyTorch says in many lines of weights that are not those of a model, in one; empty of other errors."""
    text = str(error) if 'loading state_dict' in str(error) else ''
    shapes = re.findall(r'size mismatch for (\S+): .*?Size\((.*?)\).*?Size\((.*?)\)', text)
    found = {
        'the file lacks': re.findall('"(.+?)"', ''.join(re.findall('Missing key.*', text))),
        'the model lacks': re.findall('"(.+?)"', ''.join(re.findall('Unexpected key.*', text))),
        'of another shape:': [f'{name} ({has}, not {needs})' for name, has, needs in shapes]}
    differ = '; '.join(f'{what} {len(names)}, such as {names[0]}' for what, names in found.items() if names)
    return differ and f'its tensors are not those of the model: {differ}'


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`: without the usage, which would hide the one line that matters."""

    def error(self, message: str) -> NoReturn:
        raise UserError(re.sub(r'^argument (?:-\w+/)*(--[\w-]+)[^:]*: ', r'\1: ', message))

    def parse_args(  # type: ignore[override]
            self, args: Optional[Sequence[str]] = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.reject(unknown)
        return found

    def reject(self, unknown: Sequence[str], others: Iterable[str] = ()) -> NoReturn:
        """Say which of the words is wrong; `others` are flags that were read before."""
        flag = next((word.partition('=')[0] for word in unknown if word.startswith('-')), None)
        if flag is None:
            raise UserError(f'unexpected argument {unknown[0]!r}; flags begin with --')
        hint = nearest(flag, [*self._option_string_actions, *others], '; --help lists them')
        raise UserError(f'unknown flag {flag}{hint}')


def run_command(
        prog: str,
        work: Callable[[], Optional[int]],
        interrupted: str = 'interrupted',
        show_traceback: bool = False,
) -> int:
    """Do the work of a command and turn what goes wrong into one line.

    Args:
        prog: Name of the program, with which the line begins.
        work: Parses, does, prints; what it returns is the exit code.
        interrupted: What there is to say after Ctrl-C.
        show_traceback: Let exceptions pass.

    Returns:
        The exit code: 2 for what the user can mend, 1 for a defect, whose traceback is in a file that the line names.
    """
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    try:
        try:
            with _each_once():
                return work() or 0
        finally:
            sys.stdout.flush()  # here, where a pipe that is closed is no error
    except Interrupted as e:
        print(f'{prog}: {e}', file=sys.stderr)
        return 128 + e.signum
    except KeyboardInterrupt:
        print(f'{prog}: {interrupted}', file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has what it wants; Python's own flush at the end must not say so again
        with contextlib.suppress(OSError):
            sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115  until the process ends
        return 0
    except Exception as e:
        if show_traceback:
            raise
        message = _explain(e)
        if message is not None:
            print(f'{prog}: error: {_one_line(message)}', file=sys.stderr)
            return 2
        print(
            f'{prog}: a defect: {_one_line(f"{type(e).__name__}: {e}")}; the traceback is in {_write_traceback(e)}, '
            'please report it', file=sys.stderr)
        return 1


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Make of what a command tells in one line a `UserError` of that line, for those who call it from Python."""
    try:
        yield
    except Exception as e:
        message = None if isinstance(e, UserError) else _explain(e)
        if message is None:
            raise
        raise UserError(_one_line(message)) from e


@contextlib.contextmanager
def _each_once() -> Iterator[None]:
    """Log no message twice: the runs of `fit` or `sweep` say the same of the same data."""
    # One filter for each handler: of one for all, the first handler would take each message from the others.
    filters = [(handler, _NewMessages()) for handler in logging.getLogger().handlers]
    for handler, new in filters:
        handler.addFilter(new)
    try:
        yield
    finally:
        for handler, new in filters:
            handler.removeFilter(new)


class _NewMessages(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        before = len(self.said)
        self.said.add(record.getMessage())
        return len(self.said) > before


def _explain(error: BaseException) -> Optional[str]:
    """What to tell the user of an exception; None for a defect."""
    if isinstance(error, UserError):
        return str(error)
    if re.search(r'No space left|os error 28\b', str(error)):
        return f'no space left on the disk ({error})'
    names = [f'{cls.__module__}.{cls.__qualname__}' for cls in type(error).__mro__]
    expected = next((_EXPECTED[name] for name in names if name in _EXPECTED), None)
    if expected is not None:
        where = getattr(error, 'filename', None)
        return f'{f"{where}: " if where else ""}{expected} ({error})' if str(error) else expected
    if isinstance(error, OSError):
        paths = ', '.join(str(p) for p in (error.filename, error.filename2) if p is not None)
        return ': '.join(filter(None, [paths, error.strerror or str(error)]))
    if isinstance(error, ImportError):
        package = (error.name or '').partition('.')[0]
        if package in _EXTRAS:
            return f"this needs {package}; pip install 'timm_amf[{_EXTRAS[package]}]'"
    if isinstance(error, (RuntimeError, ValueError)) and _MISFITS.search(str(error)):
        return misfit(error) or str(error)
    return None


def _one_line(text: str) -> str:
    return TOKEN.sub('hf_...', ' '.join(text.split()))[:600]


def _write_traceback(error: BaseException) -> str:
    text = ''.join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
                'w', prefix='timm_amf-traceback-', suffix='.txt', delete=False, encoding='utf-8') as file:
            file.write(TOKEN.sub('hf_...', text))
        return file.name
    except OSError:
        return 'no file, since none can be written (--traceback shows it)'
