"""Find the images that cannot be read before training starts, not in the middle of the night."""
import contextlib
import json
import logging
from pathlib import Path
from typing import NamedTuple, Optional, Union

import numpy as np
import torch.utils.data
from PIL import Image, UnidentifiedImageError

from timm_amf.errors import UserError
from timm_amf.files import write_text

from .cache import fingerprint, map_samples
from .mixture import Mixture
from .sources import as_shown
from .storage import cache_folder

__all__ = ['BadImage', 'check_images']

_logger = logging.getLogger(__name__)
_SHOWN = 10


class BadImage(NamedTuple):
    filename: str
    reason: str


def check_images(
        dataset: Mixture,
        skip_bad: bool = False,
        cache_dir: Union[str, Path, None] = None,
        workers: int = 0,
        progress: bool = True,
) -> list[BadImage]:
    """Read every image of a dataset once; what was found is remembered for as long as the files stay the same.

    Args:
        dataset: The mixture; with `skip_bad` its bad images are removed.
        skip_bad: Go on without the bad images.
        cache_dir: Where to remember. None: `timm_amf` in the user's cache folder.
        workers: Processes that read.
        progress: Show a bar, if on a terminal.

    Returns:
        The bad images that were removed.

    Raises:
        UserError: There are bad images, and they may not be skipped or a class has no others.
    """
    if dataset.in_memory:
        return []
    reasons = _remembered(dataset, cache_dir, workers, progress)
    bad = [BadImage(dataset.filename(index), reason) for index, reason in reasons.items()]
    if not bad:
        return bad
    shown = '; '.join(f'{image.filename} ({image.reason})' for image in bad[:_SHOWN])
    more = f' and {len(bad) - _SHOWN} more' if len(bad) > _SHOWN else ''
    found = f'{len(bad)} of {len(dataset)} images cannot be read: {shown}{more}'
    if not skip_bad:
        raise UserError(f'{found}; mend or remove them, or go on without them with --skip-bad-images')
    before = dataset.class_counts()
    dataset.remove(list(reasons))
    empty = np.flatnonzero((before > 0) & (dataset.class_counts() == 0))
    if len(empty):
        raise UserError(f'class {dataset.class_names[empty[0]]!r} has no image that can be read; {found}')
    _logger.warning(f'{found}. Going on without them.')
    return bad


def _remembered(
        dataset: Mixture,
        cache_dir: Union[str, Path, None],
        workers: int,
        progress: bool,
) -> dict[int, str]:
    """Reason by index of the bad images, from an earlier check of the same files if there was one."""
    # Named by the files' names, sizes and times.
    name = fingerprint(dataset, f'check 2 {dataset.input_img_mode}')
    path = cache_folder(cache_dir, f'checked-{name}') / 'bad.json'
    with contextlib.suppress(OSError, ValueError):
        return {int(k): v for k, v in json.loads(path.read_text(encoding='utf-8')).items()}
    results = enumerate(map_samples(_Readable(dataset), workers, 'Checking images', progress))
    found = {index: reason for index, reason in results if reason}
    try:
        write_text(path, json.dumps(found), 'set --cache-dir')
    except UserError as e:
        _logger.warning(f'The check of the images is not remembered: {e}')
    return found


class _Readable(torch.utils.data.Dataset):
    """For each image, why it cannot be read, or ''."""

    def __init__(self, dataset: Mixture):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        source, local = self.dataset.source(index)
        if source.in_memory:
            return ''
        try:
            with source.open(local) as file:
                _read(file, self.dataset.input_img_mode)
        except FileNotFoundError:
            return 'no such file'
        except UnidentifiedImageError:  # its own message names the file, badly
            return 'not an image'
        except Exception as e:  # Pillow's plugins raise whatever they like
            return str(e).splitlines()[0] if str(e) else type(e).__name__
        return ''


def _read(file, mode: Optional[str]) -> None:
    """Decode all of an image as `Mixture.load` does; a JPEG at an eighth of its size, which still reads every byte."""
    if file.seek(0, 2) == 0:
        raise OSError('empty file')
    file.seek(0)
    with Image.open(file) as image:
        image.draft('RGB', (max(1, image.width // 8), max(1, image.height // 8)))
        as_shown(image, mode)
