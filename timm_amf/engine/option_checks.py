"""Checks of the options that can be made before anything is built, each with one line for the user.

Types, choices and limits of single flags are declared with them; here is what is wrong with several together.
"""
import argparse
import importlib
import os
from collections.abc import Iterator
from typing import Any, NoReturn

from timm_amf.errors import UserError, nearest

__all__ = ['check_names', 'check_values']

# Flags, and those of which they need one to have an effect. What a Plan or a recipe may give is not here.
_NEEDS = (
    (('model_ema_decay', 'model_ema_warmup', 'model_ema_force_cpu'), ('model_ema',)),
    (('publish_license', 'publish_private', 'publish_revision', 'publish_message'), ('publish',)),
    (('wandb_resume_id',), ('log_wandb',)),
    (('routing_eps',), ('eval_only',)),
    (('split_bn', 'resplit'), ('aug_splits',)),
    (('mixup_off_epoch',), ('mixup', 'cutmix', 'cutmix_minmax')),
)


def check_values(args: argparse.Namespace) -> None:
    """Check paths and combinations; import nothing slow."""
    for dests, needed in _NEEDS:
        if not any(getattr(args, name) for name in needed):
            for dest in filter(args.explicit.__contains__, dests):
                flags = ' or '.join(f'--{name.replace("_", "-")}' for name in needed)
                _fail(dest, f'has no effect without {flags}; add it, or leave this out')
    for checks in (_check_image, _check_loss, _check_run, _check_data):
        for wrong, dest, problem in checks(args):
            if wrong:
                _fail(dest, problem)


def _check_image(args: argparse.Namespace) -> Iterator[tuple[Any, str, str]]:
    """The channels of the model's input, of the images and of the augmentation agree."""
    from PIL import ImageMode

    for dest in ('scale', 'ratio', 'cutmix_minmax'):
        value = getattr(args, dest)
        yield (value is not None and (len(value) != 2 or value != sorted(value)), dest,
               f'must be 2 values in increasing order, not {" ".join(f"{v:g}" for v in value or ())}')
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    yield (args.input_size and args.in_chans not in (None, channels), 'in_chans',
           f'{args.in_chans} contradicts the {channels} channels of --input-size')
    mode = args.input_img_mode or {1: 'L', 3: 'RGB', 4: 'RGBA'}.get(channels)
    yield mode is None, 'in_chans', f'{channels}: give 1, 3 or 4, or --input-img-mode with the mode of such images'
    try:
        bands = len(ImageMode.getmode(mode).bands)
    except KeyError:
        _fail('input_img_mode', f'{mode} is no mode of Pillow; such are L, RGB and RGBA')
    yield (bands != channels, 'in_chans',
           f'{channels}, but images in --input-img-mode {mode} have {bands}; make them agree')
    for dest in ('aa', 'grayscale_prob'):
        yield (getattr(args, dest) and mode not in ('L', 'RGB'), dest,
               f'works on images of mode RGB or L, not {mode}; leave it out')
    for dest in ('mean', 'std'):
        value = getattr(args, dest) or [1]
        yield (len(value) not in (1, channels), dest,
               f'has {len(value)} values for {channels} channels; give one, or one a channel')


def _check_loss(args: argparse.Namespace) -> Iterator[tuple[Any, str, str]]:
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    loss = args.loss or ('jsd' if args.jsd_loss else 'ce')
    yield (mixes and args.batch_size < 2, 'batch_size',
           'must be at least 2 for mixup and cutmix, which pair the images of a batch')
    yield (mixes and loss == 'asl', 'loss',
           'asl cannot take the soft targets of mixup and cutmix; leave them out or use another loss')
    yield ((args.jsd_loss or loss == 'jsd') and args.aug_splits < 2, 'aug_splits',
           'must be at least 2 for the JSD loss, which compares the splits of a batch')
    yield args.aug_splits == 1, 'aug_splits', 'must be 0 or at least 2'
    yield (args.aug_splits and mixes, 'aug_splits',
           'cannot be combined with mixup and cutmix; leave one of them out')
    yield (args.class_weight and (loss not in ('ce', 'bce') or args.jsd_loss), 'class_weight',
           f'--loss {loss} takes no weights of classes; use ce or bce, or --class-sampling balanced')
    yield (args.class_weight and args.class_sampling, 'class_weight',
           'and --class-sampling would balance twice; give one')
    yield (args.class_sampling and args.aug_repeats > 1, 'class_sampling',
           'cannot be combined with --aug-repeats; leave one of them out')
    for dest in ('bce_sum', 'bce_target_thresh', 'bce_pos_weight'):
        yield (getattr(args, dest) not in (None, False) and loss != 'bce', dest,
               'only the binary cross-entropy has it; add --bce-loss')


def _check_run(args: argparse.Namespace) -> Iterator[tuple[Any, str, str]]:
    from timm_amf.tuning.plan_args import common_plan

    yield (args.resume not in ('', 'auto') and not os.path.exists(args.resume), 'resume',
           f'{args.resume} does not exist; give a checkpoint, or auto for the last one of the experiment')
    for dest in ('initial_checkpoint', 'pretrained_path', 'plan', 'class_map'):
        path = getattr(args, dest)
        yield path and not os.path.isfile(path), dest, f'{path} is not a file; check the path'
    yield (args.class_weight not in (None, '', 'balanced') and not os.path.isfile(args.class_weight), 'class_weight',
           f'{args.class_weight} is neither balanced nor a file; check the path')
    yield (args.output and os.path.exists(args.output) and not os.path.isdir(args.output), 'output',
           f'{args.output} is a file; name a folder')
    yield (args.lr is not None and args.lr <= 0, 'lr',
           f'must be above 0, not {args.lr}; leave it out, or freeze roles in the plan')
    epochs = common_plan(args, args.lr).epochs
    yield (args.start_epoch is not None and args.start_epoch > epochs, 'start_epoch',
           f'{args.start_epoch} is beyond the {epochs} epochs of the run')
    yield (args.eval_only and args.resume and args.initial_checkpoint, 'initial_checkpoint',
           'and --resume name two sets of weights to evaluate; give one')
    yield (args.eval_only and not (args.pretrained or args.pretrained_path or args.initial_checkpoint or args.resume),
           'eval_only', 'there are no weights to evaluate; add --initial-checkpoint FILE, --resume or --pretrained')
    yield (args.cpu and args.mixed_precision == 'fp16', 'cpu',
           'fp16 mixed precision needs a GPU; use --amp-dtype bfloat16')
    yield (args.mixed_precision not in (None, 'no') and args.model_dtype not in (None, 'float32'), 'model_dtype',
           f'{args.model_dtype} and mixed precision exclude each other; give one')


def _check_data(args: argparse.Namespace) -> Iterator[tuple[Any, str, str]]:
    mixture = args.recipe.get('data') or args.component or args.data_preset
    if not (mixture or args.data_dir or args.dataset):
        raise UserError(
            'no data: name a folder of images, or use --dataset, --component, --data-preset '
            'or a recipe (--config demo)')
    there = os.path.exists(args.data_dir or '')
    yield (args.component and '=' in (args.data_dir or '') and not there, 'component',
           f'takes one component; write --component {args.data_dir}')
    folder, given = args.dataset in ('', 'folder', 'image_folder') and not mixture, args.data_dir or '(none)'
    here = '' if os.path.isabs(given) else f' in {os.getcwd()}'
    yield (folder and not there, 'data_dir',
           f'{given} does not exist{here}; name a folder that holds train and validation')


def check_names(args: argparse.Namespace) -> None:
    """Check the names that only timm knows: model, optimiser and augmentation. Import `--device-modules` before."""
    from timm_amf.tuning.plan_args import common_plan

    for module in args.device_modules or ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            _fail('device_modules', f'{module} cannot be imported ({error}); is its folder on PYTHONPATH?')
    _check_model(args.model)
    from timm.optim import list_optimizers

    name, known = common_plan(args).opt, list_optimizers()
    base = name.lower().removeprefix('lookahead_')
    if base not in known:
        _fail('opt', f'{name} is unknown{nearest(base, known, "; timm.optim.list_optimizers() lists them")}')
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
        _fail('model', f'{name} is unknown' + nearest(
            name.partition('.')[0], timm.list_models(), '; timm-amf models and timm.list_models() list them'))
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # the tag is wrong
        known = timm.list_models(f'{name.partition(".")[0]}.*', include_tags=True)
        hint = nearest(name, known, f'; known: {", ".join(known) or "none"}')
        _fail('model', f'{name} has an unknown tag{hint}')


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
