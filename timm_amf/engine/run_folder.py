"""A run rebuilt from its folder: its options, its model with the weights that it left, its images as it evaluates them.

What the run began from (pretrained weights, a checkpoint, the file of its Plan) may be gone by now and is not needed.
"""
import argparse
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from PIL import Image
from safetensors import safe_open
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from torch import nn
from torchvision.transforms import Compose, TenCrop

from timm_amf.data import Mixture, SeededLoader, create_loader
from timm_amf.engine.build import build_model
from timm_amf.engine.checkpoint import Checkpointer, check_digests, load_weights, reading_weights
from timm_amf.engine.options import parse_args
from timm_amf.errors import UserError
from timm_amf.text import read_rows
from timm_amf.yaml_text import load_yaml

__all__ = [
    'WEIGHTS', 'best_epoch', 'best_row', 'choose_device', 'eval_loader', 'find_weights', 'is_run', 'load_run',
    'mixed_row', 'read_run', 'settings_of', 'shown_as',
]

# Of `args.yaml`: what no result follows from.
_NO_SETTINGS = ('output', 'experiment', 'resume', 'overwrite', 'no_progress', 'workers', 'report', 'tracker', 'publish',
                'plan', 'budget', 'card', 'expected', 'explicit', 'eval_only', 'dry_run')
# The weights of a run by the name of the choice, in order of preference; all but the first are in its checkpoint, of
# the last epoch: as the run evaluated them, the moving average, and what the average is of.
WEIGHTS = {
    'best': ('model_best.safetensors',),
    'last': ('ema.safetensors', 'model.safetensors'),
    'ema': ('ema.safetensors',),
    'raw': ('model.safetensors',),
}


def is_run(folder: Union[str, Path]) -> bool:
    """Whether a path is the folder of a run: it holds its options."""
    return (Path(folder) / 'args.yaml').is_file()


def read_run(run: Union[str, Path], flags: Sequence[str] = (), needs_data: bool = True) -> argparse.Namespace:
    """The options of a run.

    Args:
        run: Folder with `args.yaml`.
        flags: What differs, as on the command line of `train_amf.py`.
        needs_data: Whether the folder of its images must be there.
    """
    options = _options(run)
    begun = ('--initial-checkpoint', '--pretrained-path', '--resume', '--plan', '--class-weight')
    without = [word for flag in begun for word in (flag, '')]
    where = [] if needs_data else ['--data-dir', str(run)]  # a folder that exists
    args = parse_args(['--config', str(Path(run) / 'args.yaml'), *without, '--tracker', 'none', *where, *flags])
    args.data_dir = args.data_dir if needs_data else options.get('data_dir')
    args.pretrained = False
    args.split_file = str(Path(run) / 'split.csv')
    return args


def _options(run: Union[str, Path]) -> Mapping[str, Any]:
    """What the `args.yaml` of a run holds."""
    if not is_run(run):
        raise UserError(f'{run}: no args.yaml there; give the folder of a run')
    return load_yaml(Path(run) / 'args.yaml')


def settings_of(options: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a training follows from, by name: the options of its `args.yaml`, and over them its Plan as plain data."""
    flags = {name: value for name, value in options.items() if name not in _NO_SETTINGS}
    return {**flags, **plan, 'schedule': None, **plan.get('schedule', {})}


def best_row(rows: Iterable[Mapping[str, str]], metric: str) -> Mapping[str, str]:
    """Of rows of a `summary.csv` that of the best epoch by a metric, of equal ones the first, whose weights are kept;
    empty where no epoch was evaluated.
    """
    column, sign = f'eval_{metric}', -1 if metric == 'loss' else 1
    return max((row for row in rows if row.get(column)), key=lambda row: sign * float(row[column]), default={})


def mixed_row(run: Union[str, Path], metric: str) -> Mapping[str, str]:
    """The row of `mix.csv` of the weights that a run with `--wise-ft` keeps, by a metric; empty of any other run."""
    rows = read_rows(Path(run) / 'mix.csv') if (Path(run) / 'mix.csv').is_file() else []
    # Earlier versions wrote no more of a mix than these two.
    return next(({f'eval_{metric}': row['metric'], 'eval_loss': row['loss'], **row}
                 for row in rows if row['kept'] == 'True'), {})


def best_epoch(run: Union[str, Path], mixed: bool = True) -> dict[str, float]:
    """The validation metrics of the weights that a run keeps: of its best epoch, as its `--eval-metric` has it, or of
    the mix of its start and its best epoch.

    Args:
        run: Its folder.
        mixed: False: of its best epoch, whatever was mixed with it.

    Returns:
        The columns `eval_*` of its `summary.csv`, or `mix.csv`, without that prefix.
    """
    metric = _options(run).get('eval_metric', 'top1')
    best = mixed and mixed_row(run, metric) or best_row(read_rows(Path(run) / 'summary.csv'), metric)
    return {name[5:]: float(value) for name, value in best.items() if name.startswith('eval_') and value}


def find_weights(run: Union[str, Path], weights: str = 'best') -> Path:
    """The file of the weights of a run; see `load_run`."""
    folder = Path(run) if weights == 'best' else Checkpointer(run).found() or Checkpointer(run).last
    files = [folder / name for name in WEIGHTS[weights]]
    file = next((file for file in files if file.exists()), files[-1])
    if not file.exists():
        what = 'the run kept no moving average' if weights == 'ema' else 'no such checkpoint'
        raise UserError(f'{file}: {what}; take other --weights, or train the run on')
    if weights != 'best':
        check_digests(folder)
    return file


def load_run(
        args: argparse.Namespace,
        run: Union[str, Path],
        num_classes: Optional[int] = None,
        weights: str = 'best',
) -> nn.Module:
    """The model of a run with its weights, in evaluation mode, on the CPU.

    Args:
        args: The run's options, from `read_run`.
        run: Its folder.
        num_classes: Classes of its data. None: as many as the classifier in the weights has.
        weights: One of `WEIGHTS`.
    """
    file = find_weights(run, weights)
    model = build_model(args, num_classes or args.num_classes or _count_classes(args, file))
    load_weights(model, file)
    return model.eval()


def _count_classes(args: argparse.Namespace, weights: Path) -> int:
    """Outputs of the classifier in a file of weights: the data may be gone or have other classes by now."""
    with torch.random.fork_rng(devices=[]), torch.device('meta'):
        names = build_model(args, 2).pretrained_cfg.get('classifier') or ()
    with reading_weights(weights), safe_open(weights, 'pt') as file:
        for name in (names,) if isinstance(names, str) else names:
            for key in (f'{name}.weight', f'{name}.bias'):
                if key in file.keys():  # noqa: SIM118  no dict
                    return file.get_slice(key).get_shape()[0]
    raise UserError(f'{weights}: has no classifier by which to tell the number of classes')


def choose_device(cpu: bool = False) -> torch.device:
    gpu = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    return torch.device('cpu' if cpu else gpu)


def shown_as(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """How a model is shown images in evaluation: timm's data config of the options, with statistics of each channel."""
    config = resolve_data_config(vars(args), model=model, verbose=False)
    # The loader gives a grey image the mean of what is known of three channels.
    return {**config, **{key: adapt_to_chs(config[key], config['input_size'][0]) for key in ('mean', 'std')}}


def eval_loader(
        args: argparse.Namespace,
        model: nn.Module,
        data: Mixture,
        device: torch.device,
        batch_size: Optional[int] = None,
        workers: Optional[int] = None,
        ten_crop: bool = False,
        skip_bad: bool = False,
) -> SeededLoader:
    """Loader of the images of a run, in order, transformed as the run evaluates.

    Args:
        args: The run's options; what they do not say of its input the model knows.
        batch_size: Images at a time. None: the run's.
        workers: Worker processes. None: the run's.
        ten_crop: Ten crops of each image in the place of one: batches are (B, 10, C, H, W).
        skip_bad: Give black, with class -1, in the place of an image that cannot be read.
    """
    config = shown_as(args, model)
    common = dict(
        mean=config['mean'], std=config['std'], device=device, workers=args.workers if workers is None else workers)
    loader = create_loader(
        data, input_size=config['input_size'], interpolation=config['interpolation'], crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'], batch_size=batch_size or args.validation_batch_size or args.batch_size, **common)
    transform = loader.transform
    if ten_crop:
        if config['crop_mode'] == 'border':
            raise UserError(
                '--ten-crop: the run evaluates with crop mode border, which shows whole images; leave it out')
        resize, _, to_tensor = transform.transforms
        transform = Compose([resize, TenCrop(config['input_size'][-2:]), functools.partial(_stack, to_tensor)])
    if ten_crop or skip_bad:
        loader = SeededLoader(data, loader.sampler, transform, seed=None, skip_bad=skip_bad, **common)
    return loader


def _stack(to_tensor: Callable[[Image.Image], torch.Tensor], images: Sequence[Image.Image]) -> torch.Tensor:
    """Several images as one tensor (N, C, H, W)."""
    return torch.stack([to_tensor(image) for image in images])
