"""What a run leaves on disk, written so that a kill or a full disk at any moment loses nothing that was whole.

A run's folder holds `last/` (all that resume needs) and `model_best.safetensors`. Everything is written under a
temporary name, flushed to the disk, and renamed. A folder cannot be renamed over another, so `last/` changes in two
steps, `last` to `last.old` and `last.new` to `last`; whichever moment a kill picks, one whole checkpoint is found.
`last.old/` stays, to fall back on, and `digests.json` has the SHA-256 of each file, so that no damage passes unseen.

A file of weights names the classes of its outputs in its metadata; in a model they are `label_names` of its
`pretrained_cfg`, as in timm.
"""
import contextlib
import hashlib
import itertools
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from timm_amf.errors import Diverged, UserError, misfit
from timm_amf.files import replacing, whole_folder
from timm_amf.tuning.l2sp import L2SP
from timm_amf.tuning.lora import merged_state

__all__ = [
    'Checkpointer', 'check_digests', 'class_names', 'contiguous', 'load_weights', 'read_class_names',
    'read_state', 'reading_weights', 'restoring', 'save_tensors', 'save_weights', 'set_class_names',
]

_logger = logging.getLogger(__name__)

_STATE = 'state.json'
_DIGESTS = 'digests.json'
_WEIGHTS = 'model.safetensors'
_EMA = 'ema.safetensors'
_OPTIMIZER = 'optimizer.pt'
_START = 'l2sp.safetensors'
_REMEDY = 'the previous checkpoint is whole: make room, then --resume auto'
_STATE_KEYS = {
    'epoch': int, 'step': int, 'updates': int, 'identity': dict, 'plan': dict, 'schedule': dict, 'kept': list,
    'meters': (list, type(None)), 'best_epoch': (int, type(None)), 'best_metric': (int, float, type(None)),
}


def contiguous(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as safetensors takes them: without strides of channels_last, and none in the storage of another."""
    seen, tensors = set(), {}
    for name, tensor in named.items():
        tensor = tensor.detach().contiguous().cpu()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _check_finite(named: Iterable[tuple[str, Any]], path: Path) -> None:
    for name, value in named:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise Diverged(
                f'{path}: not written, since {name} is not finite; lower the LR, clip gradients (--clip-grad), or use '
                f'bf16 instead of fp16')


def _check_weights(module: nn.Module, path: Path) -> None:
    """Refuse weights and running statistics that are not finite; other buffers, such as masks, may be infinite."""
    statistics = (item for item in module.named_buffers() if item[0].endswith(('running_mean', 'running_var')))
    _check_finite(itertools.chain(module.named_parameters(), statistics), path)


def class_names(module: nn.Module) -> Optional[list[str]]:
    """The names of the outputs of a model; None if it has no names, or not one for each output."""
    names = (getattr(module, 'pretrained_cfg', None) or {}).get('label_names')
    return None if names is None else list(names)


def set_class_names(module: nn.Module, names: Iterable[str]) -> None:
    """Name the outputs of a model."""
    module.pretrained_cfg = {**module.pretrained_cfg, 'label_names': list(names)}


def read_class_names(path: Union[str, Path]) -> Optional[list[str]]:
    """The names of the classes in a file of weights; None where it has none: an older one, or another package's."""
    with contextlib.suppress(SafetensorError, OSError), safe_open(path, 'pt') as file:
        metadata, beside = file.metadata() or {}, Path(path).with_name('config.json')
        own, names = metadata.get('class_names'), None
        # An exported file has its configuration in its metadata, a published one beside it.
        text = own or metadata.get('config.json') or (beside.read_text(encoding='utf-8') if beside.is_file() else '{}')
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            found = json.loads(text)
            names = found if own else found.get('class_names') or found.get('label_names')
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
        if own:
            raise UserError(f'{path}: is damaged: its names of classes are no list of texts')
    return None


def _write_module(module: nn.Module, path: Path, state: Optional[Mapping[str, torch.Tensor]] = None) -> None:
    # One entry of metadata only: safetensors writes several in random order.
    names = class_names(module)
    metadata = {'format': 'pt'} if names is None else {'class_names': json.dumps(names)}
    save_file(contiguous(module.state_dict() if state is None else state), path, metadata=metadata)


def save_weights(module: nn.Module, path: Union[str, Path]) -> None:
    """Write a module's weights as safetensors, adapters merged, whole or not at all; equal weights give equal files."""
    with replacing(path, _REMEDY) as temporary:
        _write_module(module, temporary, merged_state(module))


def save_tensors(named: Mapping[str, torch.Tensor], path: Union[str, Path]) -> None:
    """Write tensors as safetensors, whole or not at all."""
    with replacing(path, _REMEDY) as temporary:
        save_file(contiguous(named), temporary)


@contextlib.contextmanager
def reading_weights(path: Union[str, Path], missing: str = 'no such checkpoint') -> Iterator[None]:
    """Make a `UserError` that names the file of what safetensors says of it; `missing` is for where there is none."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f'{path}: {missing}') from None
    except (SafetensorError, OSError) as e:
        raise UserError(f'{path}: is damaged or no safetensors file ({" ".join(str(e).split())})') from None


def load_weights(module: nn.Module, path: Union[str, Path]) -> None:
    """Load weights written by `save_weights`; every tensor must fit."""
    with reading_weights(path):
        tensors = load_file(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as e:
        raise UserError(
            f'{path}: does not fit {type(module).__name__} ({misfit(e)}); build the model it was made of') from None
    names = read_class_names(path)
    if names is not None and getattr(module, 'pretrained_cfg', None):
        set_class_names(module, names)


class Checkpointer:
    """Writes and finds the checkpoints of one run.

    Args:
        folder: The run's folder.
        keep: How many of the best epochs to keep as `checkpoint-<epoch>.safetensors`; 0 keeps the best one alone.
        keep_epochs: Epochs that are kept as `checkpoint-<epoch>.safetensors` besides.
        decreasing: Whether a lower metric is better.
        finite: Refuse to write what is not finite.
    """

    def __init__(
            self,
            folder: Union[str, Path],
            keep: int = 0,
            keep_epochs: Iterable[int] = (),
            decreasing: bool = False,
            finite: bool = True,
    ):
        self.folder = Path(folder)
        self.finite = finite
        self.keep = keep
        self.keep_epochs = frozenset(keep_epochs)
        self.decreasing = decreasing
        self.best_metric: Optional[float] = None
        self.best_epoch: Optional[int] = None
        self.kept: list[tuple[float, int]] = []  # (metric, epoch) of the files kept for being among the best

    @property
    def last(self) -> Path:
        return self.folder / 'last'

    def found(self) -> Optional[Path]:
        """The newest checkpoint, also where a kill broke off a change of `last/`; None if there is none."""
        folders = (self.folder / name for name in ('last.new', 'last', 'last.old'))
        return next((f for f in folders if f.is_dir() and (f.name != 'last.new' or (f / _STATE).exists())), None)

    def holds_run(self) -> bool:
        """Whether the folder has a checkpoint or any other file of a run."""
        return self.found() is not None or bool(self.records()) or (self.folder / 'args.yaml').exists()

    def records(self) -> list[Path]:
        """The files of the run so far beside its checkpoint."""
        patterns = (
            'model_*.safetensors', 'checkpoint-*.safetensors', 'summary.csv', 'policy.csv', 'speed.csv', 'split.csv')
        return [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]

    def save_last(
            self,
            model: nn.Module,
            ema: Optional[nn.Module],
            optimizer: torch.optim.Optimizer,
            state: dict[str, Any],
            l2sp: Optional[L2SP] = None,
    ) -> None:
        """Write `last/`: the bare model, its moving average, the optimiser, and plain data; of L2-SP its start."""
        if self.finite:
            for module in filter(None, (model, ema)):
                _check_weights(module, self.last)
            _check_finite(((f'{k} of the optimiser', v) for of_one in optimizer.state.values()
                           for k, v in of_one.items()), self.last)
        self.settle()
        state = dict(
            state, best_metric=self.best_metric, best_epoch=self.best_epoch, kept=[list(item) for item in self.kept])
        with whole_folder(self.folder / 'last.new', _REMEDY, self.last) as folder:
            _write_module(model, folder / _WEIGHTS)
            if ema is not None:
                _write_module(ema, folder / _EMA)
            torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
            if l2sp is not None:
                save_file(contiguous(l2sp.state_dict()), folder / _START, metadata={'format': 'pt'})
            (folder / _STATE).write_text(json.dumps(state, indent=1), encoding='utf-8')
            digests = {file.name: _digest(file) for file in sorted(folder.iterdir())}
            (folder / _DIGESTS).write_text(json.dumps(digests, indent=1), encoding='utf-8')
        self.settle()

    def settle(self) -> None:
        """Put `last.new/`, which is whole, in the place of `last/`, also after a kill at any point of it."""
        new, old = self.folder / 'last.new', self.folder / 'last.old'
        if new.exists():
            if self.last.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.last, old)
            os.rename(new, self.last)
        elif old.exists() and not self.last.exists():
            os.rename(old, self.last)
        for left in self.folder.glob('last*.tmp*'):
            shutil.rmtree(left, ignore_errors=True)

    def discard(self) -> None:
        """Remove the checkpoints and records of an earlier run in this folder."""
        self.discard_last()
        shutil.rmtree(self.folder / 'compact', ignore_errors=True)
        for path in (*self.records(), *self.folder.glob('exported.*'), *self.folder.glob('mix.csv')):
            path.unlink()

    def discard_last(self) -> None:
        """Remove the checkpoints that resume needs."""
        for folder in (self.last, *self.folder.glob('last.*')):
            shutil.rmtree(folder, ignore_errors=True)

    def load_last(
            self,
            source: Union[str, Path],
            model: nn.Module,
            ema: Optional[nn.Module],
            optimizer: Optional[torch.optim.Optimizer],
            l2sp: Optional[L2SP] = None,
    ) -> None:
        """Load a `last/` folder into the model, its moving average, the optimiser, and the starting point of L2-SP."""
        source = Path(source)
        check_digests(source)
        state = read_state(source)
        load_weights(model, source / _WEIGHTS)
        if ema is not None:
            if not (source / _EMA).exists():
                raise UserError(f'{source}: has no moving average; resume without --model-ema')
            load_weights(ema, source / _EMA)
        if optimizer is not None:
            self._load_optimizer(source / _OPTIMIZER, optimizer)
        if l2sp is not None:
            with reading_weights(
                    source / _START, 'is not there: the run was without L2-SP; resume with the Plan of the run'):
                start = load_file(source / _START)
            try:
                l2sp.load_state_dict(start)
            except UserError as e:
                raise UserError(f'{source / _START}: {e}') from None
        self.best_metric, self.best_epoch = state['best_metric'], state['best_epoch']
        if self.best_epoch is not None and not (source.parent / 'model_best.safetensors').exists():
            _logger.warning('%s: model_best.safetensors is gone; the best epoch from here on counts', source.parent)
            self.best_metric = self.best_epoch = None
        self.kept = [(float(metric), int(epoch)) for metric, epoch in state['kept']]

    @staticmethod
    def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
        state = torch.load(path, map_location='cpu', weights_only=True)
        ours = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
        if [g.get('param_names') for g in state['param_groups']] != [g.get('param_names') for g in ours]:
            raise UserError(
                f'{path}: the Plan groups the parameters otherwise than that of the checkpoint; '
                f'resume with the Plan of the run, or with --no-resume-opt')
        optimizer.load_state_dict(state)
        # The settings are the Plan's of today; only the state (momentum and such) is the checkpoint's.
        for group, settings in zip(optimizer.param_groups, ours):
            group.update(settings)

    def save_epoch(self, model: nn.Module, epoch: int, metric: Optional[float]) -> bool:
        """Write the weights that an epoch earns: `model_best.safetensors`, and the numbered ones that are kept.

        Returns:
            Whether the epoch is the best so far.
        """
        sign = -1 if self.decreasing else 1
        best = metric is not None and (self.best_metric is None or sign * metric > sign * self.best_metric)
        if self.finite:
            _check_weights(model, self.folder / 'model_best.safetensors')
        if best:
            save_weights(model, self.folder / 'model_best.safetensors')
            self.best_metric, self.best_epoch = metric, epoch
        wanted = epoch in self.keep_epochs
        if self.keep and metric is not None:
            ranked = sorted([*self.kept, (metric, epoch)], key=lambda item: -sign * item[0])
            for _, dropped in ranked[self.keep:]:
                if dropped not in self.keep_epochs:
                    self._numbered(dropped).unlink(missing_ok=True)
            self.kept = ranked[:self.keep]
            wanted = wanted or (metric, epoch) in self.kept
        if wanted:
            save_weights(model, self._numbered(epoch))
        return best

    def _numbered(self, epoch: int) -> Path:
        return self.folder / f'checkpoint-{epoch}.safetensors'


def read_state(source: Union[str, Path]) -> dict[str, Any]:
    """The plain-data state of a `last/` folder."""
    path = Path(source) / _STATE
    try:
        state = json.loads(path.read_text(encoding='utf-8'))
        wrong = [key for key, kind in _STATE_KEYS.items() if not isinstance(state[key], kind)]
    except FileNotFoundError:
        raise UserError(f'{path}: is not there{_fall_back(path.parent)}') from None
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as e:
        wrong = [str(e)]
    if wrong:
        raise UserError(f'{path}: is damaged ({wrong[0]}){_fall_back(path.parent)}')
    return state


@contextlib.contextmanager
def restoring(source: Path) -> Iterator[None]:
    """Make a `UserError` of what anything says of a state that nothing here has written."""
    try:
        yield
    except (
            LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, EOFError,
            pickle.UnpicklingError) as e:
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:160]
        raise UserError(f'{source}: is damaged ({reason}){_fall_back(source)}') from e


def check_digests(source: Path) -> None:
    """Refuse a checkpoint whose files are not those that were written; one of an older version has no digests."""
    digests = {}
    if (source / _DIGESTS).exists():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            digests = dict(json.loads((source / _DIGESTS).read_text(encoding='utf-8')))
        if not {_STATE} <= set(digests) <= {_WEIGHTS, _EMA, _OPTIMIZER, _START, _STATE}:
            digests = {_DIGESTS: ''}
    for name, digest in digests.items():
        file = source / name
        if not file.exists() or _digest(file) != digest:
            raise UserError(f'{file}: is {"damaged" if file.exists() else "not there"}{_fall_back(source)}')


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fall_back(source: Path) -> str:
    """What to do where a checkpoint is damaged."""
    old = source.with_name('last.old')
    if source != old and old.is_dir():
        return f'; go on from the checkpoint before it with --resume {old}'
    return '; give the folder of a run, or its last/, with a whole checkpoint'
