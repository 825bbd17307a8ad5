"""A file that appears whole and checked, or not at all."""
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import torch
from torch import Tensor, nn

from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.models.method import method_of

from .formats import FORMATS
from .source import Source, first_line

__all__ = ['TOLERANCE', 'Exported', 'check_output', 'export_model']

_logger = logging.getLogger(__name__)

# Largest difference of a logit as a share of the largest logit: float32 in another order. A share, since the logits of
# a model that is hardly trained may all be so small that a file of zeros would pass for it.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what its check found.

    Args:
        path: The file.
        size: In bytes.
        batches: Sizes of the batches of random images.
        difference: Largest difference of a logit between file and model.
        largest: Largest logit of the model, in absolute value.
        same_class: Number of images to which both give the same class.
    """
    path: Path
    size: int
    batches: tuple[int, ...]
    difference: float
    largest: float
    same_class: int

    def __str__(self) -> str:
        images = sum(self.batches)
        return (
            f'{self.path}: {self.size / 1e6:.1f} MB; on {images} random images, in batches of '
            f'{", ".join(map(str, self.batches))}, its logits differ from the model\'s by at most '
            f'{self.difference:.1e} (largest logit {self.largest:.2g}), with the same class for {self.same_class}')


def export_model(
        source: Source,
        format: str,
        path: Union[str, Path],
        batches: Sequence[int] = (1, 2, 5),
        opset: Optional[int] = None,
        overwrite: bool = False,
) -> Exported:
    """Write a model to a file, run the file, and keep it if it computes what the model computes.

    Args:
        source: The model and what goes with the file.
        format: Of `FORMATS`.
        path: The file.
        batches: Sizes of the batches of random images that it is run on.
        opset: ONNX operator set. None: the exporter's.
        overwrite: Replace a file that is there.

    Raises:
        UserError: If a package is missing, the file is there or cannot be written, the model cannot be exported, or
            the file computes something else. Then there is no file, or the one that was there.
    """
    form, path = FORMATS[format], Path(path)
    if opset is not None and format != 'onnx':
        raise UserError(f'--opset: {format} has no operator sets; leave it out')
    form.require()
    # 0 and 1 are sizes that `torch.export` takes for constants.
    example = _images(2, source.config['input_size'])
    with _appearing(path, overwrite) as temporary:
        expected = _expected(source.model, batches, source.config)
        what = f'{source.config["architecture"]} cannot be exported to {format}'
        with method_of(source.model).exportable(), _failing(what):
            form.write(source, example, temporary, opset)
        with _failing(f'the {format} file does not run'):
            run = form.read(temporary)
        difference, same = _compare(run, expected, format)
        largest = max(logits.abs().max().item() for _, logits in expected)
        if not difference <= TOLERANCE * largest:  # not a number is no pass
            raise UserError(
                f'{path}: was not written: the {format} file differs from the model by {difference:.1e} in logits of '
                f'up to {largest:.2g} on random images; take another --format')
        size = temporary.stat().st_size
    return Exported(path, size, tuple(batches), difference, largest, same)


def _images(batch: int, input_size: Sequence[int]) -> Tensor:
    """Normalised noise."""
    return torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _expected(model: nn.Module, batches: Sequence[int], config: dict) -> list[tuple[Tensor, Tensor]]:
    """Images and the model's logits, computed as the model evaluates, each image by its path."""
    size = config['input_size']
    with _failing(f'{config["architecture"]} does not run on images of {" x ".join(map(str, size))}'):
        return [(images, model(images)) for images in (_images(n, size) for n in batches)]


@torch.no_grad()
def _compare(
        run: Callable[[Tensor], Tensor],
        expected: list[tuple[Tensor, Tensor]],
        format: str,
) -> tuple[float, int]:
    """Largest difference of a logit, and for how many images the class is the same."""
    differences, same = [], 0
    for images, logits in expected:
        with _failing(f'the {format} file does not run on a batch of {len(images)}'):
            result = run(images)
        if result.shape != logits.shape:
            raise UserError(
                f'the {format} file gives {tuple(result.shape)} in the place of {tuple(logits.shape)} for a batch of '
                f'{len(images)}; take another --format')
        differences.append((result - logits).abs().max())
        same += (result.argmax(1) == logits.argmax(1)).sum().item()
    return torch.stack(differences).max().item(), same


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever an exporter or a runtime raises, in one line."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as e:
        _logger.debug('%s', what, exc_info=True)
        raise UserError(f'{what} ({first_line(e)})') from e


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses a path that a file cannot be written to for what is there."""
    if path.is_dir():
        raise UserError(f'--output {path}: is a folder; name a file')
    if path.exists() and not overwrite:
        raise UserError(f'--output {path}: is there already; name another, or add --overwrite')


@contextlib.contextmanager
def _appearing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary name for a file that gets its own if the block succeeds."""
    check_output(path, overwrite)
    with replacing(path, 'name another', f'--output {path}') as temporary:
        temporary.touch()  # before any work
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
