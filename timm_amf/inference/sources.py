"""What `evaluate` and `predict` ask: the folder of a run, a published model, an exported ONNX file."""
import argparse
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Union

import torch
from torch import nn

from timm_amf.data.sources import first_line
from timm_amf.engine.checkpoint import class_names
from timm_amf.engine.opened import Opened, RunOptions, open_trained
from timm_amf.engine.options import parse_args
from timm_amf.engine.run import check_kind
from timm_amf.engine.run_folder import choose_device, is_run
from timm_amf.errors import UserError
from timm_amf.hub.load import load
from timm_amf.parsers import IMAGE_ROWS

__all__ = ['open_model', 'options_from']

Source = Union[str, Path, nn.Module]


def open_model(source: Source, options: RunOptions, needs_data: bool = True) -> Opened:
    """Open what can be asked about images.

    Args:
        source: Folder of a run, folder of a published model, `hf-hub:OWNER/NAME`, a file of `timm-amf export --format
            onnx`, or a model with `label_names` in its `pretrained_cfg`.
        options: What of a run differs.
        needs_data: Whether the images that a run was trained on must be there.
    """
    path = Path()
    if not isinstance(source, nn.Module):
        path = Path(source)
        check_kind(path, 'run', f'name one of its runs, or see timm-amf report {path}')
    if is_run(path) and not (path / 'config.json').is_file():
        opened = open_trained(path, options, needs_data)
        if not needs_data:
            with contextlib.suppress(UserError, OSError):  # the data of a run of an older version may be gone
                opened = replace(opened, class_names=opened.names)
        return opened
    if options.weights != 'best':
        raise UserError(f'--weights {options.weights}: {source} is no run, with one set of weights; leave it out')
    if isinstance(source, nn.Module):
        model, name = source.eval(), type(source).__name__
    elif path.suffix == '.onnx':
        model, name = OnnxModel(path), str(path)
    elif (path / 'config.json').is_file() or str(source).startswith(('hf-hub:', 'hf_hub:')):
        model, name = load(source), str(source)
    elif path.is_file():
        raise UserError(f'{source}: of files only .onnx can be asked; timm-amf export RUN --format onnx writes one')
    else:
        raise UserError(
            f'{source}: no args.yaml there; give the folder of a run, of a published model, a file .onnx, or '
            f'hf-hub:OWNER/NAME')
    if needs_data and not options.data_dir and '--dataset' not in options.flags:
        raise UserError(f'{name}: is no run, and has no images of its own; add --data-dir DIR')
    words = ['--tracker', 'none', *options.flags]
    words += ['--val-split', options.split] if options.split else []
    words += ['--data-dir', options.data_dir or ('' if needs_data else '.')]
    args = parse_args(words)
    args.in_chans = model.pretrained_cfg['input_size'][0]
    return Opened(name, args, lambda num_classes: model, class_names(model))


class OnnxModel(nn.Module):
    """A file of `timm-amf export --format onnx`, run by ONNX Runtime on the CPU."""

    def __init__(self, path: Path):
        import onnxruntime

        super().__init__()
        self.path = path
        if not path.is_file():
            raise UserError(f'{path}: no such file; timm-amf export RUN --format onnx writes one')
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        except Exception as e:  # the runtime has exceptions of its own
            raise UserError(f'{path}: is no ONNX file that can be run ({first_line(e)}); export it again') from e
        given = self.session.get_modelmeta().custom_metadata_map
        cfg: dict[str, Any] = {key: given.get(key) for key in ('interpolation', 'crop_mode')}
        try:
            cfg.update((k, json.loads(given[k])) for k in ('input_size', 'mean', 'std', 'crop_pct', 'num_classes'))
            cfg['label_names'] = json.loads(given.get('class_names', 'null'))
        except (KeyError, ValueError) as e:
            raise UserError(
                f'{path}: does not say how to prepare an image ({first_line(e)}); export it with timm-amf') from e
        self.num_classes, self.pretrained_cfg = cfg['num_classes'], cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            found = self.session.run(None, {self.session.get_inputs()[0].name: x.cpu().numpy()})[0]
        except Exception as e:  # of a size that the file is not for
            raise UserError(f'{self.path}: cannot be run on these images ({first_line(e)})') from e
        return torch.from_numpy(found).to(x.device)


def options_from(args: argparse.Namespace) -> RunOptions:
    """The options of the flags, which are checked."""
    cpu = args.cpu or args.device == 'cpu'
    if args.amp and args.amp_dtype == 'float16' and choose_device(cpu).type == 'cpu':
        raise UserError('--amp: float16 needs a GPU; on the CPU add --amp-dtype bfloat16')
    words: list[str] = []
    for name, _, default, *_ in IMAGE_ROWS:
        value = getattr(args, name[2:].replace('-', '_'), default)
        if value != default:
            words += [name] if value is True else [name, *map(str, value if isinstance(value, list) else [value])]
    return RunOptions(
        weights=args.weights, ten_crop=args.ten_crop, blocks=args.blocks, sampling_seed=args.sampling_seed,
        batch_size=args.batch_size, workers=args.workers, cpu=cpu,
        precision=getattr(torch, args.amp_dtype) if args.amp else None, flags=tuple(words))
