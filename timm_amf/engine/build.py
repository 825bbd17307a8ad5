"""From options to objects: the accelerator, the data, the model and what surrounds them."""
import argparse
import functools
import itertools
import logging
import math
import random
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Optional

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from timm.data import Mixup, resolve_data_config
from timm.data.mixup import mixup_target
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import load_checkpoint, safe_model_name
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from timm_amf.data import Mixture, create_datasets, create_loader, data_spec_from_args, splits_from_args
from timm_amf.data.cache import build_cache, cache_short_side
from timm_amf.data.check import check_images, find_copies
from timm_amf.engine.checkpoint import class_names, read_class_names
from timm_amf.engine.memory import keep_freed_memory
from timm_amf.engine.options import resolve_trackers
from timm_amf.errors import UserError
from timm_amf.models.parts import Part, part_cfg
from timm_amf.models.sources import check_source, load_network, loading
from timm_amf.tuning import Plan
from timm_amf.tuning.reinit import reinit
from timm_amf.tuning.resolve import Resolved

__all__ = [
    'build_accelerator', 'build_data', 'build_loaders', 'build_mixup', 'build_model', 'place_model', 'run_folder',
    'seed_step', 'set_start', 'start_trackers',
]

_logger = logging.getLogger(__name__)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed Python, NumPy and torch for one step of one process.

    All that a step draws (mixup, dropout, stochastic depth) follows from these four numbers. So there is no random
    state to restore: a run that resumes at a step continues with the same bits.
    """
    for_python, for_numpy, for_torch = np.random.SeedSequence([seed, epoch, step, rank]).generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """Accelerate's context: device, processes, precision and trackers."""
    trackers = resolve_trackers(args)
    precision = args.mixed_precision
    try:
        accelerator = Accelerator(
            cpu=args.cpu, mixed_precision=precision, log_with=trackers or None,
            project_dir=args.output or 'output/train',
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)])
    except (ValueError, ImportError) as e:
        raise UserError(f'Accelerate: {" ".join(str(e).split())}') from None
    if precision == 'fp16' and accelerator.device.type == 'cpu':
        raise UserError('fp16 needs a GPU; use --mixed-precision bf16 on a CPU, or none')
    if accelerator.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if accelerator.device.type == 'cpu':
        keep_freed_memory()
    return accelerator


def run_folder(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """The run's folder, `--output`/`--experiment`; without a name, one of date, time and model, as timm's."""
    output = Path(args.output or 'output/train').expanduser()
    name = args.experiment
    if not name:
        name = base = f'{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(args.model)}'
        for number in itertools.count(2):
            if not (output / name).exists():
                break
            name = f'{base}-{number}'
    # The clocks of two processes may stand on either side of a second.
    folder = output / broadcast_object_list([name])[0]
    accelerator.project_configuration.logging_dir = None  # else it stays that of the constructor
    accelerator.project_configuration.set_directories(str(folder))
    return folder


def build_data(
        args: argparse.Namespace,
        accelerator: Accelerator,
        class_names: Optional[Sequence[str]] = None,
) -> tuple[Mixture, Mixture]:
    """The training and the validation set of the options, every image of them read once.

    Args:
        class_names: Of the model whose weights are there already; labels follow from them.
    """
    spec = data_spec_from_args(args)
    splits = splits_from_args(args)
    if splits[1] in splits[0].split('+'):
        _logger.warning('--val-split %s is trained on: its accuracy says nothing', splits[1])
    # The main process reads the images; the others find on the disk what it found.
    drawn = ['test'] if spec.test_share and 'test' not in '+'.join(splits).split('+') else []
    with accelerator.local_main_process_first():
        datasets = create_datasets(spec, (*splits, *drawn), input_channels(args), class_names)
        if args.check_images and (args.skip_bad_images or not args.eval_only):  # an evaluation reads them anyway
            for dataset in datasets:
                check_images(
                    dataset, args.skip_bad_images, args.cache_dir, args.workers, accelerator.is_local_main_process)
    if accelerator.is_local_main_process:
        datasets[0].copies = find_copies(datasets[0], dict(zip((splits[1], *drawn), datasets[1:])))
    if datasets[0].num_classes < 2:
        raise UserError(f'data: there is one class, {datasets[0].class_names[0]!r}: nothing to tell it from; add one')
    return datasets[:2]


def known_classes(args: argparse.Namespace, resume: Optional[Path]) -> Optional[list[str]]:
    """The classes of the weights that a run goes on with or only evaluates, in the order of their outputs.

    None for a run that starts anew, whose classes are those of its data.
    """
    if resume is not None:
        return read_class_names(resume / 'model.safetensors')
    weights = args.initial_checkpoint or args.pretrained_path
    if args.eval_only and not weights and ':' in args.model:
        with torch.device('meta'):
            return class_names(timm.create_model(args.model))
    return read_class_names(weights) if args.eval_only and weights else None


def input_channels(args: argparse.Namespace) -> int:
    """Channels of the images that the options ask for."""
    return args.in_chans or (args.input_size[0] if args.input_size else 3)


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The model of the options, in training mode, on the CPU."""
    if args.num_classes is not None and args.num_classes < num_classes:
        raise UserError(
            f'--num-classes {args.num_classes}: the data have {num_classes} classes; raise it or leave it out')
    if args.fast_norm:
        set_fast_norm()
    # The initial weights are those of the seed on every process.
    seed_step(args.seed, 0, 0, 0)
    try:
        model = _create(args, num_classes)
        _adjust(model, args)
        if args.split_bn:
            model = convert_splitbn_model(model, max(args.aug_splits, 2))
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    except UserError:
        raise
    except Exception as e:  # whatever timm's constructors say of arguments that the options gave them
        reason = ' '.join(str(e).split())[:300] or type(e).__name__
        given = f' (--model-kwargs, maybe of the recipe: {", ".join(args.model_kwargs)})' if args.model_kwargs else ''
        raise UserError(f'--model {args.model} cannot be built: {reason}{given}') from e
    return model


def _create(args: argparse.Namespace, num_classes: int) -> nn.Module:
    overlay = _cfg_overlay(args) or None
    create = functools.partial(
        timm.create_model, args.model, pretrained=args.pretrained, num_classes=args.num_classes or num_classes,
        pretrained_cfg_overlay=overlay, **_model_kwargs(args))
    of_timm = ':' not in args.model and timm.model_entrypoint(args.model.split('.')[0]).__module__.startswith('timm.')
    if of_timm and args.model_kwargs.keys() & {'backbone_kwargs', 'policy_kwargs'}:
        raise UserError(f'--backbone-weights, --policy-weights: {args.model} has no such parts; give --pretrained-path')
    if args.pretrained and of_timm:  # composites see to the weights of their parts
        cfg = part_cfg(Part(args.model, 0, dict(pretrained_cfg_overlay=overlay)))
        try:
            check_source(args.model, cfg)
        except UserError as e:
            raise UserError(f'{e} Here: --pretrained-path FILE, or no --pretrained.') from None
        model = load_network(args.model, cfg, create)
    else:
        model = create()
    if args.initial_checkpoint:
        try:
            with loading(args.model, {'file': args.initial_checkpoint}):
                load_checkpoint(model, args.initial_checkpoint)
        except UserError as e:
            adapt = ' (--pretrained-path adapts a classifier of other classes)' * ('of the model: of another' in str(e))
            raise UserError(f'--initial-checkpoint: {e}{adapt}') from None
    return model


def _model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    kwargs = dict(
        in_chans=input_channels(args), global_pool=args.gp, drop_rate=args.drop, drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block)
    return {**{k: v for k, v in kwargs.items() if v is not None}, **args.model_kwargs}


def _cfg_overlay(args: argparse.Namespace) -> dict[str, Any]:
    overlay = dict(args.pretrained_cfg_overlay)
    if args.pretrained_path:
        overlay['file'] = args.pretrained_path
        names = read_class_names(args.pretrained_path)
        if names is not None:  # its classifier is of these, not of the architecture's classes
            overlay['num_classes'] = len(names)
    # Composites renormalise for their parts from the statistics that their configuration says the input has.
    for name in ('mean', 'std'):
        values = getattr(args, name)
        if values is not None:
            overlay[name] = tuple(values if len(values) > 1 else values * input_channels(args))
    return overlay


@torch.no_grad()
def _adjust(model: nn.Module, args: argparse.Namespace) -> None:
    """Settings of batch norms and of the classifier that no constructor takes."""
    for norm in model.modules():
        if isinstance(norm, _NormBase):
            norm.momentum = norm.momentum if args.bn_momentum is None else args.bn_momentum
            norm.eps = norm.eps if args.bn_eps is None else args.bn_eps
    changes_head = args.head_init_scale is not None or args.head_init_bias is not None
    heads = model.get_classifier() if changes_head else ()
    for layer in heads if isinstance(heads, (tuple, list)) else [heads]:
        if args.head_init_scale is not None:
            layer.weight.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(layer.bias, args.head_init_bias)


def set_start(model: nn.Module, table: Resolved, args: argparse.Namespace, num_classes: int) -> None:
    """Give a model that does not resume the start that its Plan asks for: re-initialise, or have a start to decay to.
    """
    pulled = any(setting.l2sp_alpha for setting in table.parameters.values())
    if pulled and not (args.pretrained or args.initial_checkpoint):
        raise UserError(
            'plan: l2sp_alpha decays towards weights that are random here; add --pretrained or --initial-checkpoint')
    anew = argparse.Namespace(**{**vars(args), 'pretrained': False, 'initial_checkpoint': ''})
    reinit(model, table, args.seed, functools.partial(build_model, anew, num_classes))


def place_model(model: nn.Module, args: argparse.Namespace, accelerator: Accelerator) -> nn.Module:
    """Move a model to its device, type and memory format, and synchronise its batch norms if asked to."""
    if args.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type == 'cpu':
            raise UserError('--sync-bn works on GPUs only; leave it out')
        model = convert_sync_batchnorm(model)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    model = model.to(device=accelerator.device, dtype=dtype)
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def build_loaders(args: argparse.Namespace, model: nn.Module, train: Mixture, val: Mixture, accelerator: Accelerator):
    """The loaders of training and validation, with timm's transforms at the model's resolution and statistics."""
    config = resolve_data_config(vars(args), model=model, verbose=False)
    _check_size(model, args.model, config['input_size'])
    common = dict(
        {name: config[name] for name in ('input_size', 'mean', 'std')},
        seed=args.seed, rank=accelerator.process_index, world_size=accelerator.num_processes, device=accelerator.device,
        img_dtype=next(model.parameters()).dtype, channels_last=args.channels_last, workers=args.workers,
        pin_memory=args.pin_mem)
    augmentation = dict(
        {name: getattr(args, name) for name in (
            'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob',
            'grayscale_prob', 'gaussian_blur_prob', 'epoch_repeats')},
        auto_augment=args.aa, re_prob=args.reprob, re_mode=args.remode, re_count=args.recount, re_split=args.resplit,
        num_aug_repeats=args.aug_repeats, num_aug_splits=args.aug_splits,
        balanced_classes=args.class_sampling == 'balanced',
        interpolation=args.train_interpolation or config['interpolation'])
    if args.cache_images:
        # The evaluation transform shrinks to this side: from the cache it gives the same pixels.
        val_side = math.floor(min(config['input_size'][-2:]) / config['crop_pct'])
        with accelerator.local_main_process_first():
            for dataset, side in ((train, cache_short_side(config['input_size'])), (val, val_side)):
                build_cache(
                    dataset, side, args.cache_dir, config['interpolation'], args.workers,
                    accelerator.is_local_main_process)
    train_loader = create_loader(train, batch_size=args.batch_size, is_training=True, **augmentation, **common)
    val_loader = create_loader(
        val, batch_size=args.validation_batch_size or args.batch_size, interpolation=config['interpolation'],
        crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], **common)
    return train_loader, val_loader


def _check_size(model: nn.Module, name: str, input_size: Sequence[int]) -> None:
    """Refuse images of a size that a model with position embeddings was not built for."""
    embed = getattr(model, 'patch_embed', None)
    built, wanted = getattr(embed, 'img_size', None), tuple(input_size[-2:])
    if getattr(embed, 'strict_img_size', False) and built is not None and tuple(built) != wanted:
        size = wanted[0] if wanted[0] == wanted[1] else list(wanted)
        raise UserError(
            f'--img-size: {name} is built for images of {"x".join(map(str, built))}, not {"x".join(map(str, wanted))}; '
            f'leave it out, or build it for them with --model-kwargs img_size={size}')


def start_trackers(args: argparse.Namespace, accelerator: Accelerator, plan: Plan) -> None:
    """Start the trackers of the options, with the Plan as the run's configuration."""
    if not accelerator.log_with:
        return
    config = dict(model=args.model, batch_size=args.batch_size, lr=plan.lr, epochs=plan.epochs, opt=plan.opt)
    wandb = dict(name=args.experiment or None, tags=args.wandb_tags, id=args.wandb_resume_id or None)
    # For TensorBoard the name of the project is that of a folder in the run's.
    only_tensorboard = resolve_trackers(args) == ['tensorboard']
    accelerator.init_trackers(
        'tensorboard' if only_tensorboard else args.wandb_project or 'timm_amf', config=config,
        init_kwargs=dict(wandb={**wandb, 'resume': 'must'} if args.wandb_resume_id else wandb))


class _AnySizeMixup(Mixup):
    """timm's Mixup, which takes even batches only, for any size: the last sample of an odd batch stays as it is."""

    def __call__(self, x: torch.Tensor, target: torch.Tensor):
        if len(x) % 2 == 0:
            return super().__call__(x, target)
        last = mixup_target(target[-1:], self.num_classes, smoothing=self.label_smoothing)
        if len(x) == 1:
            return x, last
        _, soft = super().__call__(x[:-1], target[:-1])  # mixes in place
        return x, torch.cat([soft, last.to(soft.dtype)])


def build_mixup(args: argparse.Namespace, num_classes: int) -> Optional[Mixup]:
    """timm's Mixup/CutMix of the options, or None."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return None
    return _AnySizeMixup(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=num_classes)
