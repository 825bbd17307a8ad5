"""Checks of the options that can be made before anything is built, each with one line for the user."""
import argparse
import importlib
import math
import os
from collections.abc import Iterator
from typing import Any, NoReturn

from timm_amf.engine.config_file import nearest
from timm_amf.errors import UserError
from timm_amf.yaml_text import MAX_NUMBER

__all__ = ['check_names', 'check_values']

# dest -> least and greatest value (None: no limit). Lists are checked item by item.
_BOUNDS = {
    **dict.fromkeys((
        'batch_size', 'validation_batch_size', 'grad_accum_steps', 'num_classes', 'img_size', 'in_chans', 'input_size',
        'lr_base_size', 'train_num_samples', 'val_num_samples', 'recount', 'log_interval',
        'val_interval', 'checkpoint_hist', 'early_stop', 'train_batches_per_epoch',
    ), (1, None)),
    **dict.fromkeys((
        'start_epoch', 'stop_epoch', 'epoch_repeats', 'mixup_off_epoch', 'lr_base', 'warmup_lr', 'min_lr', 'clip_grad',
        'save_epochs', 'mixup', 'cutmix', 'bn_eps', 'seed', 'recovery_interval',
        'branch_loss', 'policy_balance', 'aug_repeats',
    ), (0, None)),
    'workers': (0, 1024),
    'aug_splits': (0, 64),  # each is one more copy of a batch
    **dict.fromkeys((
        'hflip', 'vflip', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'reprob',
        'smoothing', 'mixup_prob', 'mixup_switch_prob', 'drop', 'drop_path', 'drop_block', 'bn_momentum',
        'model_ema_decay', 'routing_eps',
    ), (0, 1)),
}

# dest -> the flag without which it has no effect.
_NEEDS = {
    **dict.fromkeys(('model_ema_decay', 'model_ema_warmup', 'model_ema_force_cpu'), 'model_ema'),
    **dict.fromkeys(('publish_license', 'publish_private', 'publish_revision', 'publish_message'), 'publish'),
    'wandb_resume_id': 'log_wandb',
}

# dest -> how many values it takes, where argparse cannot say.
_PAIRS = {'scale': (2,), 'ratio': (2,), 'cutmix_minmax': (2,)}


def check_values(args: argparse.Namespace) -> None:
    """Checks numbers, paths and combinations; imports nothing.

    Raises:
        UserError: For the first mistake.
    """
    for dest, item in _items(args):
        if type(item) is int and abs(item) > MAX_NUMBER:
            _fail(dest, f'must be a number of at most {MAX_NUMBER}')
        if type(item) is float and not math.isfinite(item):
            _fail(dest, f'must be finite, not {item:g}')
    for dest, needed in _NEEDS.items():
        if dest in args.explicit and not getattr(args, needed):
            _fail(dest, f'has no effect without --{needed.replace("_", "-")}; add it, or leave this out')
    if args.eval_only and args.resume and args.initial_checkpoint:
        _fail('initial_checkpoint', 'and --resume name two sets of weights to evaluate; give one')
    for dest, (low, high) in _BOUNDS.items():
        value = getattr(args, dest)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None and not (item >= low and (high is None or item <= high)):  # NaN fails too
                limits = f'at least {low}' if high is None else f'between {low} and {high}'
                _fail(dest, f'must be {limits}, not {item:g}')
    for dest, lengths in _PAIRS.items():
        value = getattr(args, dest)
        if value is not None and (len(value) not in lengths or list(value) != sorted(value)):
            _fail(dest, f'must be {" or ".join(map(str, lengths))} values in increasing order, not {_text(value)}')
    _check_image(args)
    _check_paths(args)
    _check_schedule(args)
    _check_data(args)
    _check_loss(args)
    if args.eval_only and not (args.pretrained or args.pretrained_path or args.initial_checkpoint or args.resume):
        _fail('eval_only', 'there are no weights to evaluate; add --initial-checkpoint FILE, --resume or --pretrained')
    if args.budget is not None and not args.budget > 0:
        _fail('budget', f'must be above 0, not {args.budget:g}')
    if args.routing_eps is not None and not args.eval_only:
        _fail('routing_eps', 'is for evaluation; add --eval-only, or leave it out')
    if args.cpu and args.mixed_precision == 'fp16':
        raise UserError('fp16 mixed precision needs a GPU; on the CPU use --amp-dtype bfloat16')
    if args.mixed_precision not in (None, 'no') and args.model_dtype not in (None, 'float32'):
        _fail('model_dtype', f'{args.model_dtype} and mixed precision exclude each other; give one')
    for dest, item in _items(args):
        if item != item:
            _fail(dest, 'must be a number, not nan')


def _items(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    for dest, value in vars(args).items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            yield dest, item


def _check_image(args: argparse.Namespace) -> None:
    if args.crop_pct is not None and not 0.05 <= args.crop_pct <= 1:  # images grow by its inverse before they are cut
        _fail('crop_pct', f'must be between 0.05 and 1, not {args.crop_pct:g}')
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    if args.input_size and args.in_chans not in (None, channels):
        _fail('in_chans', f'{args.in_chans} contradicts the {channels} channels of --input-size')
    _check_channels(args, channels)
    for dest in ('mean', 'std'):
        value = getattr(args, dest)
        if value is not None and len(value) not in (1, channels):
            _fail(dest, f'has {len(value)} values for {channels} channels; give one, or one a channel')
    if args.std is not None and min(args.std) <= 0:
        _fail('std', f'must be above 0, not {_text(args.std)}')


def _check_channels(args: argparse.Namespace, channels: int) -> None:
    """The channels of the model's input, of the images and of the augmentation agree."""
    from PIL import ImageMode

    mode = args.input_img_mode or {1: 'L', 3: 'RGB', 4: 'RGBA'}.get(channels)
    if mode is None:
        _fail('in_chans', f'{channels}: give 1, 3 or 4, or --input-img-mode with the mode of such images')
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError:
        _fail('input_img_mode', f'{mode} is no mode of Pillow; such are L, RGB and RGBA')
    if bands != channels:
        _fail('in_chans', f'{channels}, but images in --input-img-mode {mode} have {bands}; make them agree')
    colours = [name for name in ('aa', 'grayscale_prob') if getattr(args, name)]
    if colours and mode not in ('L', 'RGB'):
        _fail(colours[0], f'works on images of mode RGB or L, not {mode}; leave it out')


def _check_loss(args: argparse.Namespace) -> None:
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size < 2:
        _fail('batch_size', 'must be at least 2 for mixup and cutmix, which pair the images of a batch')
    if mixes and args.loss == 'asl':
        _fail('loss', 'asl cannot take the soft targets of mixup and cutmix; leave them out or use another loss')
    if (args.jsd_loss or args.loss == 'jsd') and args.aug_splits < 2:
        _fail('aug_splits', 'must be at least 2 for the JSD loss, which compares the splits of a batch')
    if args.aug_splits == 1:
        _fail('aug_splits', 'must be 0 or at least 2')
    if args.aug_splits and mixes:
        _fail('aug_splits', 'cannot be combined with mixup and cutmix; leave one of them out')
    if (args.split_bn or args.resplit) and not args.aug_splits:
        _fail('split_bn' if args.split_bn else 'resplit', 'needs --aug-splits')
    if args.class_weight and (args.loss not in (None, 'ce', 'bce') or args.jsd_loss):
        loss = args.loss or 'jsd'
        _fail('class_weight', f'--loss {loss} takes no weights of classes; use ce or bce, or --class-sampling balanced')
    if args.class_weight and args.class_sampling:
        _fail('class_weight', 'and --class-sampling would balance twice; give one')
    if args.class_sampling and args.aug_repeats > 1:
        _fail('class_sampling', 'cannot be combined with --aug-repeats; leave one of them out')
    for dest in ('bce_sum', 'bce_target_thresh', 'bce_pos_weight'):
        if getattr(args, dest) not in (None, False) and args.loss != 'bce':
            _fail(dest, 'only the binary cross-entropy has it; add --bce-loss')


def _check_schedule(args: argparse.Namespace) -> None:
    from timm_amf.tuning.plan_args import common_plan

    if args.lr is not None and not args.lr > 0:
        _fail('lr', f'must be above 0, not {args.lr:g}; leave it out to use --lr-base, or freeze roles in the plan')
    if args.lr is not None and args.min_lr is not None and args.min_lr > args.lr:
        _fail('min_lr', f'{args.min_lr:g} is above --lr {args.lr:g}; lower it')
    plan = common_plan(args)
    if args.start_epoch is not None and args.start_epoch > plan.epochs:
        _fail('start_epoch', f'{args.start_epoch} is beyond the {plan.epochs} epochs of the run')


def _check_paths(args: argparse.Namespace) -> None:
    if args.resume not in ('', 'auto') and not os.path.exists(args.resume):
        _fail('resume', f'{args.resume} does not exist; give a checkpoint, or auto for the last one of the experiment')
    for dest in ('initial_checkpoint', 'pretrained_path', 'plan', 'class_map'):
        path = getattr(args, dest)
        if path and not os.path.isfile(path):
            _fail(dest, f'{path} is not a file; check the path')
    if args.class_weight not in (None, '', 'balanced') and not os.path.isfile(args.class_weight):
        _fail('class_weight', f'{args.class_weight} is neither balanced nor a file; check the path')
    if args.output and os.path.exists(args.output) and not os.path.isdir(args.output):
        _fail('output', f'{args.output} is a file; name a folder')


def _check_data(args: argparse.Namespace) -> None:
    mixture = args.recipe.get('data') or args.component or args.data_preset
    if not (mixture or args.data_dir or args.dataset):
        raise UserError(
            'no data: name a folder of images, or use --dataset, --component, --data-preset '
            'or a recipe (--config demo)')
    if args.component and '=' in (args.data_dir or '') and not os.path.exists(args.data_dir):
        _fail('component', f'takes one component; write --component {args.data_dir}')
    folder = args.dataset in ('', 'folder', 'image_folder') and not mixture
    if folder and not os.path.exists(args.data_dir or ''):
        given = args.data_dir or '(none)'
        here = '' if os.path.isabs(given) else f' in {os.getcwd()}'
        _fail('data_dir', f'{given} does not exist{here}; name a folder that holds train and validation')


def check_names(args: argparse.Namespace) -> None:
    """Checks the names that only timm knows: model, optimiser and augmentation. Imports `--device-modules` before.

    Raises:
        UserError: For the first mistake, with the nearest name.
    """
    from timm_amf.tuning.plan_args import common_plan

    for module in args.device_modules or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            _fail('device_modules', f'{module} cannot be imported ({error}); is its folder on PYTHONPATH?')
    _check_model(args.model)
    _check_optimizer(common_plan(args).opt)
    if args.aa:
        _check_auto_augment(args.aa)


def _check_model(name: str) -> None:
    import timm

    import timm_amf.models  # noqa: F401  registers them
    if name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:')):
        return
    if '/' in name or ':' in name:
        _fail('model', f'{name} is no architecture; write hf-hub:OWNER/NAME for the Hub, local-dir:PATH for a folder')
    if not timm.is_model(name):
        hint = nearest(name.partition('.')[0], timm.list_models())
        _fail('model', f'{name} is unknown{hint or "; timm-amf models and timm.list_models() list them"}')
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # the tag is wrong
        known = timm.list_models(f'{name.partition(".")[0]}.*', include_tags=True)
        hint = nearest(name, known) or f'; known: {", ".join(known) or "none"}'
        raise UserError(f'--model: {name} has an unknown tag{hint}') from error


def _check_optimizer(name: str) -> None:
    from timm.optim import list_optimizers
    known = list_optimizers()
    base = name.lower().removeprefix('lookahead_')
    if base not in known:
        _fail('opt', f'{name} is unknown{nearest(base, known) or "; timm.optim.list_optimizers() lists them"}')


def _check_auto_augment(config: str) -> None:
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
    kinds = {'rand': rand_augment_transform, 'augmix': augment_and_mix_transform}
    build = kinds.get(config.partition('-')[0], auto_augment_transform)
    try:
        build(config, {'translate_const': 100, 'img_mean': (124, 116, 104)})
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        reason = f' ({error})' if str(error) else ''
        _fail('aa', f'timm cannot read {config!r}{reason}; write for example rand-m9-mstd0.5-inc1 or original')


def _fail(dest: str, problem: str) -> NoReturn:
    raise UserError(f'--{dest.replace("_", "-")}: {problem}')


def _text(values) -> str:
    return ' '.join(f'{value:g}' for value in values)
