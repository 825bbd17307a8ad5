"""Find the images that cannot be read before training starts, not in the middle of the night; and copies of images."""
import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional, Union

import numpy as np
from PIL import Image

from timm_amf.errors import UserError
from timm_amf.files import cache_folder, write_text

from .cache import fingerprint, map_images
from .mixture import Mixture
from .sources import as_shown, why_unreadable

__all__ = ['BadImage', 'check_images', 'find_copies']

_logger = logging.getLogger(__name__)


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
    """
    if dataset.in_memory:
        return []
    reasons, hashes = _remembered(dataset, cache_dir, workers, progress)
    dataset.hashes = np.array(hashes, dtype=np.uint64).reshape(-1, 2)
    bad = [BadImage(dataset.filename(index), reason) for index, reason in reasons.items()]
    if not bad:
        return bad
    shown = '; '.join(f'{image.filename} ({image.reason})' for image in bad[:10])
    more = f' and {len(bad) - 10} more' if len(bad) > 10 else ''
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


def find_copies(train: Mixture, others: Mapping[str, Mixture]) -> str:
    """What to warn of where images of other splits are in training too: equal bytes, or equal difference hashes.

    Args:
        train: After `check_images`.
        others: By the names of their splits; those that have images of `train` itself, as files, are left out.
    """
    found, example = [], ''
    for name, other in others.items():
        if train.hashes is None or other.hashes is None or train.count_shared(other):
            continue
        equal, alike = (np.isin(other.hashes[:, i], train.hashes[:, i]) & (other.hashes[:, i] != 0) for i in (0, 1))
        counts = []
        for column, (copies, what) in enumerate((
                (equal, 'copies of training images'), (alike & ~equal, 'images that look like one of training'))):
            if copies.any():
                counts.append(f'{what} ({copies.sum()})')
                index = int(np.flatnonzero(copies)[0])
                twin = int(np.flatnonzero(train.hashes[:, column] == other.hashes[index, column])[0])
                example = example or f'{other.filename(index)} and {train.filename(twin)}'
        found += [f'{name} has {" and ".join(counts)}'] if counts else []
    return '' if not found else (
        f'data: {"; ".join(found)}, such as {example}: an accuracy on them is too high; remove them, or keep them on '
        f'one side with --group.')


def _remembered(
        dataset: Mixture,
        cache_dir: Union[str, Path, None],
        workers: int,
        progress: bool,
) -> tuple[dict[int, str], list]:
    """Reason by index of the bad images, and the hashes of all; from an earlier check, if the files have still the same
    names, sizes and times.
    """
    name = fingerprint(dataset, f'check 3 {dataset.input_img_mode}')
    path = cache_folder(cache_dir, f'checked-{name}') / 'images.json'
    with contextlib.suppress(OSError, ValueError):
        state = json.loads(path.read_text(encoding='utf-8'))
        return {int(k): v for k, v in state['bad'].items()}, state['hashes']
    results = list(map_images(partial(_read, dataset), len(dataset), workers, 'Checking images', progress))
    bad = {index: reason for index, (reason, _) in enumerate(results) if reason}
    hashes = [pair for _, pair in results]
    try:
        write_text(path, json.dumps(dict(bad=bad, hashes=hashes)), 'set --cache-dir')
    except UserError as e:
        _logger.warning(f'The check of the images is not remembered: {e}')
    return bad, hashes


def _read(dataset: Mixture, index: int) -> tuple[str, tuple[int, int]]:
    """Why an image cannot be read, or '', and its hashes: of its bytes, and of what it shows; 0 for none."""
    source, local = dataset.source(index)
    if source.in_memory:
        return '', (0, 0)
    try:
        with source.open(local) as file:
            return '', _hashes(file.read(), dataset.input_img_mode)
    except Exception as e:  # Pillow's plugins raise whatever they like
        return why_unreadable(e), (0, 0)


def _hashes(content: bytes, mode: Optional[str]) -> tuple[int, int]:
    """64 bits of SHA-256, and the 64-bit difference hash: whether each of 9x8 greys is darker than its right neighbour.

    All of the image is decoded as `Mixture.load` does; a JPEG at an eighth of its size, which still reads every byte.
    """
    if not content:
        raise OSError('empty file')
    with Image.open(io.BytesIO(content)) as image:
        image.draft('RGB', (max(36, image.width // 8), max(32, image.height // 8)))
        greys = np.asarray(as_shown(image, mode).convert('L').resize((9, 8), Image.Resampling.BILINEAR))
    darker = np.packbits(greys[:, :-1] < greys[:, 1:]).tobytes()
    if len(set(darker)) < 3:  # plain, stripes or a chequerboard: what many images have in common
        darker = b''
    return int.from_bytes(hashlib.sha256(content).digest()[:8], 'big'), int.from_bytes(darker, 'big')
