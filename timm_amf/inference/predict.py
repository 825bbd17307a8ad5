"""`timm-amf predict` and `timm_amf.predict`: what a trained model says of images, one after the other.

    timm-amf predict runs/amf photo.jpg
    timm-amf predict runs/amf photos --output photos.csv --topk 5

The images go the way of evaluation: the same loader, the same transform, the same pass. So images in the order of an
evaluation, at its batch size, give its numbers to the bit.
"""
import argparse
import csv
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, TextIO, Union

import numpy as np
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.readers import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import nn

from timm_amf.data import Mixture, data_spec_from_args
from timm_amf.data.sources import FileSource, why_unreadable
from timm_amf.engine.build import input_channels
from timm_amf.engine.evaluation import short, top_k
from timm_amf.engine.opened import Opened, RunOptions
from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.inference.sources import Source, open_model, options_from
from timm_amf.models.method import method_of

__all__ = ['UNREADABLE', 'Prediction', 'main', 'predict']

_logger = logging.getLogger(__name__)

# Exit code where some of the images could not be read.
UNREADABLE = 3


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        path: Its file.
        labels: Names of the likeliest classes, the likeliest first; '' if the image could not be read.
        probabilities: Of these, 0 to 1; NaN if the image could not be read.
        decisions: What the model decided: `weight_0`, ... of branches; of routed blocks `block_0`, ..., 1 where the
            tuned copy was taken, and `probability_0`, ...
        error: Why it could not be read, else ''.
    """
    path: str
    labels: list[str]
    probabilities: list[float]
    decisions: dict[str, float]
    error: str = ''


def predict(
        source: Source,
        paths: Union[str, Path, Iterable[Union[str, Path]]],
        topk: int = 1,
        options: Optional[RunOptions] = None,
        progress: bool = False,
) -> Iterator[Prediction]:
    """What a trained model says of images, in their order, computed a batch at a time while they are asked for.

    Args:
        source: Folder of a run, folder of a published model, `hf-hub:OWNER/NAME`, a file of `timm-amf export --format
            onnx`, or a timm model with `label_names` in its `pretrained_cfg`.
        paths: Images, and folders of images, whose subfolders are gone through too.
        topk: Number of classes.
        options: Weights, batch size, ten crops, ... (`engine.opened.RunOptions`).
        progress: Show a bar, if on a terminal.

    Raises:
        UserError: If the source cannot be asked, or there are no images; at once, before the first prediction.
    """
    if topk < 1:
        raise UserError(f'topk: must be at least 1, not {topk}')
    files = _images([paths] if isinstance(paths, (str, Path)) else paths)
    options = options or RunOptions()
    opened = open_model(source, options, needs_data=False)
    return _predictions(opened, opened.load(None), files, topk, options, progress)


def _images(paths: Iterable[Union[str, Path]]) -> list[str]:
    """Files as they are, and the images of folders in timm's order."""
    suffixes, files = ', '.join(sorted(get_img_extensions())), []
    for path in map(os.path.expanduser, map(str, paths)):
        if not os.path.exists(path):
            raise UserError(f'{path}: no such file or folder; give images, or folders of images')
        found = [path]
        if os.path.isdir(path):
            found = [name for name, _ in find_images_and_targets(path)[0] if not os.path.basename(name).startswith('.')]
            others = sum(len(names) for _, _, names in os.walk(path, followlinks=True)) - len(found)
            if not found:
                raise UserError(f'{path}: no images there ({suffixes}); name others one by one')
            if others:
                _logger.warning(f'{path}: {others} files left out that are not {suffixes}; name images one by one.')
        files += found
    return files


def _predictions(
        opened: Opened,
        model: nn.Module,
        files: list[str],
        topk: int,
        options: RunOptions,
        progress: bool,
) -> Iterator[Prediction]:
    spec = data_spec_from_args(opened.args)
    mode = spec.input_img_mode or {1: 'L', 4: 'RGBA'}.get(input_channels(opened.args), 'RGB')
    targets = np.zeros(len(files), dtype=np.int64)
    source = FileSource(['image'], targets, files)
    data = Mixture(['images'], ['image'], [(0, source, np.arange(len(files)), targets)], mode)
    record, label = method_of(model).create_record(data.components), _label(opened, model)
    decided = [] if record is None else record.image_names
    for batch in opened.answers(model, data, options, skip_bad=True, progress=progress):
        bad = batch.target.numpy() < 0
        indices, probabilities = top_k(batch.log_probs.numpy(), topk)
        decisions = np.empty((len(bad), 0)) if batch.decisions is None else batch.decisions.numpy().copy()
        probabilities[bad] = decisions[bad] = math.nan  # they are of the black in its place
        for i, is_bad, classes, p, d in zip(batch.index.tolist(), bad, indices.tolist(), probabilities, decisions):
            yield Prediction(
                files[i], ['' if is_bad else label(k) for k in classes], list(map(short, p)),
                dict(zip(decided, map(short, d))), _why_bad(source, i, mode) if is_bad else '')


def _why_bad(source: FileSource, index: int, mode: str) -> str:
    try:
        source.load(index, mode)
    except Exception as e:  # Pillow's plugins raise whatever they like
        return why_unreadable(e)
    return 'it was not there or not whole'  # and is now


def _label(opened: Opened, model: nn.Module) -> Callable[[int], str]:
    """Name of a class: that of the weights, of ImageNet's as timm has it, else its index."""
    names = dict(enumerate(opened.class_names or ()))
    subset = None if names else infer_imagenet_subset({'num_classes': model.num_classes})
    return ImageNetInfo(subset).index_to_description if subset else lambda index: names.get(index, f'{index}')


# -- the verb ---------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """`timm-amf predict`: write a row an image; returns `UNREADABLE` where an image could not be read, else 0."""
    format = args.format or {'.csv': 'csv', '.json': 'json'}.get(Path(args.output or '').suffix, 'table')
    found = predict(
        args.run, args.paths, args.topk, options_from(args), bool(args.output) or not sys.stdout.isatty())
    with replacing(args.output, 'name another --output') if args.output else nullcontext() as temporary:
        file = open(temporary, 'w', newline='', encoding='utf-8') if temporary else nullcontext(sys.stdout)
        with file as out:
            images, bad = _write(found, format, out)
    if args.output:
        print(f'{args.output}: {images} images')
    if bad:
        print(f'timm-amf predict: {bad} of {images} images could not be read', file=sys.stderr)
    return UNREADABLE if bad else 0


def _write(found: Iterator[Prediction], format: str, out: TextIO) -> tuple[int, int]:
    """Write each prediction as it comes; give the number of images, and of those that could not be read."""
    images, bad, writer = 0, 0, None
    for prediction in found:
        row = _row(prediction)
        if format == 'table':
            out.write(f'{_line(prediction)}\n')
        elif format == 'json':
            out.write(f'{"," if images else "["}\n{json.dumps(row)}')
        else:
            if writer is None:
                writer = csv.DictWriter(out, list(row), lineterminator='\n')
                writer.writeheader()
            writer.writerow(row)
        out.flush()
        images += 1
        bad += bool(prediction.error)
    out.write('\n]\n' if format == 'json' else '')
    return images, bad


def _row(prediction: Prediction) -> dict[str, Any]:
    """The columns of timm's inference script with --fullname --results-separate-col, and ours behind them."""
    k = len(prediction.labels)
    names = {f'label_{i}' if k > 1 else 'label': name for i, name in enumerate(prediction.labels)}
    numbers = {f'prob_{i}' if k > 1 else 'prob': p for i, p in enumerate(prediction.probabilities)}
    numbers = {name: None if math.isnan(x) else x for name, x in {**numbers, **prediction.decisions}.items()}
    return dict(filename=prediction.path, **names, **numbers, error=prediction.error)


def _line(prediction: Prediction) -> str:
    """`path  class 0.93, class 0.04  weight 0.71 0.29`: of what was decided the first kind."""
    if prediction.error:
        return f'{prediction.path}  cannot be read: {prediction.error}'
    line = ', '.join(f'{name} {p:.3f}' for name, p in zip(prediction.labels, prediction.probabilities))
    kinds = [name.rpartition('_')[0] or name for name in prediction.decisions]  # weight, or block and probability
    values = [f'{x:.3g}' for kind, x in zip(kinds, prediction.decisions.values()) if kind == kinds[0]]
    return '  '.join([prediction.path, line, *([' '.join([kinds[0], *values])] if kinds else [])])
