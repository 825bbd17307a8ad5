"""The `timm-amf` command: one subcommand for each thing to do."""
import functools
import importlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from timm_amf.errors import UserError, nearest, run_command

__all__ = ['main']

# Subcommand -> module that does it, by `main` with the flags that `parsers` reads, and what it does.
_COMMANDS = {
    'fit': ('timm_amf.search.fit', 'fine-tune by measuring: a few ways on your images, the best to the end'),
    'demo': ('timm_amf.demo', 'fine-tune from real weights on embedded images, in three minutes'),
    'train': ('train_amf', 'fine-tune a model: the flags of train_amf.py'),
    'evaluate': (
        'timm_amf.inference.evaluate', 'evaluate runs from their folders, or a checkpoint with the flags of train'),
    'predict': ('timm_amf.inference.predict', 'classes and probabilities of images, by a run, a model or a file'),
    'report': ('timm_amf.report', 'a page of figures and tables of a run, of several, of a search or a sweep'),
    'models': ('timm_amf.engine.listing', 'list the models, their tags, the recipes, and what is published'),
    'advise': (
        'timm_amf.search.advise', 'measure how well pretrained weights fit the data, and write a Plan'),
    'search': (
        'timm_amf.search.block_search', 'find the layers, blocks or windows worth tuning, and write a Plan'),
    'sweep': ('timm_amf.search.sweep', 'train over a grid of settings, or by Optuna, and rank them, with tests'),
    'decathlon': (
        'timm_amf.engine.submission', 'score test accuracies on the Visual Decathlon, or write its submission file'),
    'export': ('timm_amf.export', "write a run's model to an ONNX, pt2 or safetensors file, checked"),
    'publish': ('timm_amf.hub.publish', 'publish a run on the Hugging Face Hub'),
}
# Those whose words before the first flag are folders, or files, that are there.
_TAKE_PATHS = ('fit', 'train', 'evaluate', 'predict', 'search', 'sweep', 'export', 'publish')
# What there is to say after Ctrl-C.
_INTERRUPTED = {
    **dict.fromkeys(('fit', 'search', 'sweep'), 'interrupted; the same command goes on where it stopped'),
    'advise': 'interrupted; features that were finished are kept',
    'publish': 'interrupted; the repository is as it was',
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one subcommand.

    Returns:
        The exit code, see `errors.run_command`.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word != '--traceback']
    command = next((word for word in words[:1] if word in _COMMANDS), '')
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a console of Windows has not every letter of a class name
            stream.reconfigure(errors='backslashreplace')
    work = functools.partial(_run, command, words[1:]) if command else functools.partial(_answer, words)
    return run_command(
        f'timm-amf {command}'.strip(), work, _INTERRUPTED.get(command, 'interrupted'), '--traceback' in argv)


def _answer(words: list[str]) -> int:
    """What there is to say without a subcommand."""
    if not words or words[0] in ('-h', '--help'):
        print('usage: timm-amf COMMAND ...\n')
        for name, (_, text) in _COMMANDS.items():
            print(f'  {name:10}{text}')
        print('\ntimm-amf COMMAND --help tells more; --traceback shows where an error comes from.')
        return 0 if words else 2
    if words[0] == '--version':
        from timm_amf.version import __version__

        print(f'timm_amf {__version__}')
        return 0
    raise UserError(f'no command {words[0]!r}{nearest(words[0], _COMMANDS, "; there are " + ", ".join(_COMMANDS))}')


def _run(command: str, words: list[str]) -> Optional[int]:
    """Nothing imports torch before the words are known to make sense."""
    from timm_amf.engine.options import parse_args
    from timm_amf.parsers import parse

    if command in _TAKE_PATHS:
        _check_paths(words)
    if command == 'evaluate' and any(word.partition('=')[0] in ('--model', '--config', '-c') for word in words):
        command, words = 'train', [*words, '--eval-only']  # of weights without a run
    if command == 'train':
        args = parse_args(words)
        importlib.import_module('train_amf').train(words, args=args)
        return None
    args = parse(command, words)
    found = importlib.import_module(_COMMANDS[command][0]).main(args)
    return found if isinstance(found, int) else None


def _check_paths(words: Sequence[str]) -> None:
    """Refuse a mistyped folder before torch is imported."""
    if any(word.startswith(('--dataset', '--config', '-c')) for word in words):
        return  # a dataset that is downloaded makes its folder
    for word in itertools.takewhile(lambda word: not word.startswith('-'), words):
        if not (word.startswith(('hf-hub:', 'hf_hub:')) or Path(word).expanduser().exists()):
            raise UserError(f'{word}: no such file or folder; check the path')


if __name__ == '__main__':
    sys.exit(main())
