"""A run rebuilt from its folder: its options, its model with the weights that it left, its images as it evaluates them.

What the run began from (pretrained weights, a checkpoint, the file of its Plan) may be gone by now and is not needed.
"""
import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional, Union

import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from torch import nn
from torchvision.transforms import Compose, TenCrop

from timm_amf.data import Mixture, SeededLoader, create_loader
from timm_amf.engine.build import build_model
from timm_amf.engine.checkpoint import load_weights
from timm_amf.engine.options import parse_args
from timm_amf.errors import UserError

__all__ = ['WEIGHTS', 'choose_device', 'eval_loader', 'is_run', 'load_run', 'read_run', 'weights_file']

# Where the weights of a run may be, by the name of the choice, in order of preference.
WEIGHTS = {
    'best': ('model_best.safetensors',),
    'last': ('last/ema.safetensors', 'last/model.safetensors'),
    'ema': ('last/ema.safetensors',),
    'raw': ('last/model.safetensors',),
}


def is_run(folder: Union[str, Path]) -> bool:
    """Whether a path is the folder of a run: it holds its options."""
    return (Path(folder) / 'args.yaml').is_file()


def read_run(run: Union[str, Path], flags: Sequence[str] = ()) -> argparse.Namespace:
    """The options of a run.

    Args:
        run: Folder with `args.yaml`.
        flags: What differs, as on the command line of `train_amf.py`.

    Raises:
        UserError: If the folder holds no run, or its options do not hold any more (data that moved, say).
    """
    if not is_run(run):
        raise UserError(f'{run}: no args.yaml there; give the folder of a run')
    begun = ('--initial-checkpoint', '--pretrained-path', '--resume', '--plan')
    without = [word for flag in begun for word in (flag, '')]
    args = parse_args(['--config', str(Path(run) / 'args.yaml'), *without, '--tracker', 'none', *flags])
    args.pretrained = False
    return args


def weights_file(run: Union[str, Path], weights: str = 'best') -> Path:
    """The file of a choice of `WEIGHTS`; where there is none, the name that it should have."""
    files = [Path(run) / name for name in WEIGHTS[weights]]
    return next((file for file in files if file.exists()), files[-1])


def load_run(args: argparse.Namespace, run: Union[str, Path], num_classes: int, weights: str = 'best') -> nn.Module:
    """The model of a run with its weights, in evaluation mode, on the CPU.

    Args:
        args: The run's options, from `read_run`.
        run: Its folder.
        num_classes: Classes of its data.
        weights: `best` takes `model_best.safetensors`; `last` those of the last epoch as the run evaluated them (the
            moving average, if it kept one); `ema` the moving average; `raw` what the average is of.

    Raises:
        UserError: If the weights are missing, damaged, or of another model.
    """
    file = weights_file(run, weights)
    if weights == 'ema' and not file.exists():
        raise UserError(f'{run}: kept no moving average; take its best or last weights')
    model = build_model(args, num_classes)
    load_weights(model, file)
    return model.eval()


def choose_device(cpu: bool = False) -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() and not cpu else 'cpu')


def eval_loader(
        args: argparse.Namespace,
        model: nn.Module,
        data: Mixture,
        device: torch.device,
        batch_size: Optional[int] = None,
        workers: Optional[int] = None,
        ten_crop: bool = False,
) -> SeededLoader:
    """Loader of the images of a run, in order, transformed as the run evaluates.

    Args:
        args: The run's options.
        model: Its model, which knows size and statistics of its input where the options do not say.
        data: The images.
        device: Where batches go.
        batch_size: Images at a time. None: the run's.
        workers: Worker processes. None: the run's.
        ten_crop: Ten crops of each image in the place of one: batches are (B, 10, C, H, W).

    Raises:
        UserError: If the run's evaluation shows whole images, of which there are no ten crops.
    """
    config = resolve_data_config(vars(args), model=model, verbose=False)
    mean, std = (adapt_to_chs(config[name], config['input_size'][0]) for name in ('mean', 'std'))
    common = dict(mean=mean, std=std, device=device, workers=args.workers if workers is None else workers)
    loader = create_loader(
        data,
        input_size=config['input_size'],
        batch_size=batch_size or args.validation_batch_size or args.batch_size,
        interpolation=config['interpolation'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        **common,
    )
    if not ten_crop:
        return loader
    if config['crop_mode'] == 'border':
        raise UserError('--ten-crop: the run evaluates with crop mode border, which shows whole images; leave it out')
    resize, _, to_tensor = loader.transform.transforms
    transform = Compose([resize, TenCrop(config['input_size'][-2:]), _Stacked(to_tensor)])
    return SeededLoader(data, loader.sampler, transform, seed=None, **common)


class _Stacked:
    """Several images as one tensor (N, C, H, W)."""

    def __init__(self, to_tensor: Callable[[Image.Image], torch.Tensor]):
        self.to_tensor = to_tensor

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([self.to_tensor(image) for image in images])
