"""What is exported: a model from a run's folder or a published one, and what a user of the file must know."""
import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
import yaml
from safetensors import SafetensorError, safe_open
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_model_args
from torch import nn

from timm_amf.data import create_dataset, data_spec_from_args, splits_from_args
from timm_amf.engine.build import build_model
from timm_amf.engine.run_folder import is_run, load_run, read_run, weights_file
from timm_amf.errors import UserError
from timm_amf.hub.load import load
from timm_amf.models.method import method_of
from timm_amf.tuning import Plan
from timm_amf.version import __version__

__all__ = ['Source', 'describe', 'open_source']

_logger = logging.getLogger(__name__)

# Where the weights of a network once came from: of no use in a file that holds them, and paths are nobody's business.
_ORIGINS = ('file', 'url', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict', 'cache_dir')


@dataclass(frozen=True)
class Source:
    """A model to export.

    Args:
        model: In evaluation mode, in float32, on the CPU.
        config: What goes with the file, from `describe`.
        notes: Lines that the user should read.
    """
    model: nn.Module
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


def describe(
        model: nn.Module,
        data_config: Optional[dict[str, Any]] = None,
        class_names: Optional[Sequence[str]] = None,
) -> dict[str, Any]:
    """What the user of an exported file must know: how to prepare an image, what the outputs are, what the model was.

    Args:
        model: Any timm model, or a composite of this package.
        data_config: As `timm.data.resolve_data_config` gives it. None: the model's own.
        class_names: Name of each output, in order.

    Returns:
        Plain data: `input_size` (channels, height, width), `mean` and `std` (a value a channel, of pixels from 0 to 1),
        `interpolation`, `crop_pct`, `crop_mode`, `num_classes`, `class_names` (if known), `architecture` and
        `model_args` (of `timm.create_model`), and the versions of the packages.

    Raises:
        UserError: If an argument that the model was built with is no plain data.
    """
    data = resolve_data_config({}, model=model, verbose=False) if data_config is None else data_config
    channels = data['input_size'][0]
    config = dict(
        architecture=model.pretrained_cfg['architecture'],
        model_args=_portable(get_model_args(model)),
        num_classes=model.num_classes,
        input_size=list(data['input_size']),
        mean=[float(v) for v in adapt_to_chs(data['mean'], channels)],
        std=[float(v) for v in adapt_to_chs(data['std'], channels)],
        interpolation=data['interpolation'],
        crop_pct=data['crop_pct'],
        crop_mode=data['crop_mode'],
        versions=dict(timm_amf=__version__, timm=timm.__version__, torch=torch.__version__),
    )
    if class_names is not None:
        config['class_names'] = list(class_names)
    try:
        return json.loads(json.dumps(config))
    except TypeError as e:
        raise UserError(f'{config["architecture"]}: was built with an argument that no file can hold ({e})') from None


def _portable(args: Any) -> Any:
    """Arguments of a model without where weights came from."""
    if isinstance(args, dict):
        kept = {k: _portable(v) for k, v in args.items() if k not in _ORIGINS}
        return {k: v for k, v in kept.items() if not (k == 'pretrained_cfg_overlay' and not v)}
    return [_portable(v) for v in args] if isinstance(args, (list, tuple)) else args


def open_source(
        path: Union[str, Path],
        weights: str = 'best',
        img_size: Optional[Union[int, Sequence[int]]] = None,
        blocks: Optional[str] = None,
        data_dir: Optional[str] = None,
        class_names: Optional[Union[str, Path]] = None,
) -> Source:
    """The model of a run's folder, or of a published folder (`config.json` and `model.safetensors`).

    Args:
        path: The folder.
        weights: Of a run: one of `run_folder.WEIGHTS`.
        img_size: Side in pixels, or (height, width), of the images. None: what the run evaluates, or the model's own.
        blocks: Path of all images through a SpotTune, as `timm-amf evaluate --blocks` takes it. None: as the run
            evaluates.
        data_dir: Folder of a run's data, which name the classes. None: where the run had it.
        class_names: Text file with the name of each class on a line of its own. None: the names of the run's data.

    Raises:
        UserError: If the folder is neither, its weights are missing or damaged, or an option does not fit the model.
    """
    names = None if class_names is None else _read_names(Path(class_names))
    if (Path(path) / 'config.json').is_file():  # it may hold the options of its run, too
        if weights != 'best':
            raise UserError(f'--weights {weights}: {path} is a published folder with one set of weights; leave it out')
        if data_dir is not None:
            raise UserError(f'--data-dir: {path} is a published folder, which names its classes itself; leave it out')
        model, data, names, notes = _open_published(Path(path), blocks, names)
    elif is_run(path):
        model, data, names, notes = _open_run(Path(path), weights, blocks, data_dir, names)
    else:
        raise UserError(f'{path}: neither a run (args.yaml) nor a published model (config.json); give such a folder')
    if names is not None and len(names) > model.num_classes:
        raise UserError(
            f'{class_names or path}: names {len(names)} classes and the model has {model.num_classes} outputs; '
            f'give its own with --class-names FILE')
    if img_size is not None:
        data = dict(data, input_size=(data['input_size'][0], *_resize(model, img_size)))
    model = model.float().eval().requires_grad_(False)
    return Source(model, describe(model, data, names), notes)


def _read_names(file: Path) -> list[str]:
    try:
        names = file.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'--class-names {file}: cannot be read ({getattr(e, "strerror", None) or e})') from None
    while names and not names[-1].strip():
        names.pop()
    if not names or not all(name.strip() for name in names):
        raise UserError(f'--class-names {file}: must hold one name a line, and no empty lines between them')
    return [name.strip() for name in names]


# ---- a run


def _open_run(
        run: Path,
        weights: str,
        blocks: Optional[str],
        data_dir: Optional[str],
        names: Optional[list[str]],
) -> tuple[nn.Module, dict[str, Any], Optional[list[str]], tuple[str, ...]]:
    args = _options(run, data_dir)
    args.grad_checkpointing = False
    model = load_run(args, run, _count_classes(args, weights_file(run, weights)), weights)
    notes: tuple[str, ...] = ()
    if names is None:
        try:
            names = _class_names(args, model.num_classes)
        except UserError as e:
            notes = (f'the class names are left out: {e}; give --data-dir DIR or --class-names FILE',)
    whole, k = model, Plan.from_yaml(run / 'plan.yaml').global_k
    model, more = _on_path(whole, str(run), blocks or args.eval_blocks, k)
    if args.eval_sampling_seed is not None and 'eval_sampling_seed' in method_of(model).takes:
        more += ('the run draws its decisions in evaluation; the file takes the likelier ones',)
    return model, _data_config(vars(args), whole, model), names, notes + more


def _options(run: Path, data_dir: Optional[str]) -> argparse.Namespace:
    """The run's options, though its images may be gone."""
    try:
        moved = (yaml.safe_load((run / 'args.yaml').read_text(encoding='utf-8')) or {}).get('data_dir')
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as e:
        raise UserError(f'{run / "args.yaml"}: cannot be read ({" ".join(str(e).split())[:160]})') from None
    if data_dir is None and moved and not Path(moved).exists():
        # The options want a folder that exists. No image is needed here, and who wants the class names is told.
        args = read_run(run, ['--data-dir', str(run)])
        args.data_dir = moved
        return args
    return read_run(run, [] if data_dir is None else ['--data-dir', data_dir])


def _class_names(args: argparse.Namespace, outputs: int) -> list[str]:
    spec = data_spec_from_args(args, args.recipe.get('data'))
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    names = create_dataset(spec, splits_from_args(args)[1], channels).class_names
    if len(names) > outputs or (len(names) < outputs and not args.num_classes):
        raise UserError(f'the data have {len(names)} classes by now, and the model {outputs} outputs')
    return names


def _count_classes(args: argparse.Namespace, weights: Path) -> int:
    """Outputs of a run's model, by its weights: its data may be gone or have other classes by now."""
    if args.num_classes:
        return args.num_classes
    try:
        with safe_open(weights, 'pt') as file:
            with torch.random.fork_rng(devices=[]), torch.device('meta'):
                names = build_model(args, 2).pretrained_cfg.get('classifier') or ()
            for name in (names,) if isinstance(names, str) else names:
                for key in (f'{name}.weight', f'{name}.bias'):
                    if key in file.keys():  # noqa: SIM118  no dict
                        return file.get_slice(key).get_shape()[0]
    except FileNotFoundError:
        raise UserError(f'{weights}: is not there; take other --weights, or train the run on') from None
    except (OSError, SafetensorError) as e:
        raise UserError(f'{weights}: is damaged or no safetensors file ({" ".join(str(e).split())})') from None
    raise UserError(f'{weights}: has no classifier by which to tell the number of classes')


# ---- a published folder


def _open_published(
        folder: Path,
        blocks: Optional[str],
        names: Optional[list[str]],
) -> tuple[nn.Module, dict[str, Any], Optional[list[str]], tuple[str, ...]]:
    model = load(folder)
    if getattr(model, 'fixed_blocks', None) is not None and not blocks:
        blocks = ','.join(map(str, model.fixed_blocks)) or 'frozen'  # its results are of this path
    labels = model.pretrained_cfg.get('label_names')
    if isinstance(labels, dict):  # index -> name, where not every output has one
        labels = [labels.get(str(i), str(i)) for i in range(model.num_classes)]
    names = names or (list(labels) if labels else None)
    whole, (model, notes) = model, _on_path(model, str(folder), blocks, None)
    if names is None:
        notes += ('the class names are left out: its config.json has none; give --class-names FILE',)
    return model, _data_config({}, whole, model), names, notes


# ---- either


def _on_path(
        model: nn.Module,
        name: str,
        blocks: Optional[str],
        global_k: Optional[int],
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model that computes what is evaluated: of a SpotTune with one path for all images the plain one."""
    takes = method_of(model).takes
    if 'eval_blocks' not in takes:
        if blocks:
            raise UserError(f'{name}: --blocks does not act on {type(model).__name__}; leave it out')
        if 'routing_eps' in takes:
            model.set_routing(None)
        return model, ()
    model.set_sampling(None)
    if blocks == 'policy' or (not blocks and global_k is None):
        model.set_blocks(None)
        return model, ()
    model.set_blocks(model.fixed_path(global_k, blocks))
    return model.compact(model.fixed_blocks), (
        f'all images take one path, {len(model.fixed_blocks)} tuned of {len(model.block_names)} blocks: exported as a '
        f'plain {model.backbone_part.name}',)


def _data_config(settings: dict[str, Any], whole: nn.Module, model: nn.Module) -> dict[str, Any]:
    """How images are prepared: as for the whole model, but a plain one of it wants its backbone's statistics."""
    data = resolve_data_config(settings, model=whole, verbose=False)
    return data if model is whole else dict(data, mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std'])


def _resize(model: nn.Module, img_size: Union[int, Sequence[int]]) -> tuple[int, int]:
    size = (img_size,) * 2 if isinstance(img_size, int) else tuple(img_size) * (2 if len(img_size) == 1 else 1)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f'--img-size: takes one side or height and width in pixels, not {" ".join(map(str, size))}')
    if hasattr(model, 'set_input_size'):
        try:
            model.set_input_size(img_size=size)
        except (AssertionError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(f'--img-size {size[0]} {size[1]}: does not suit the model ({first_line(e)})') from None
    return size


def first_line(error: BaseException) -> str:
    """The first line of the text of an error, or of the one that it stems from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
