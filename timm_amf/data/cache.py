"""Images decoded and shrunk once, kept as flat uint8 on disk, and shared by all workers through the page cache.

For training. Shrinking changes the pixels that the random crops see: the short side becomes 256/224 of the input size,
the margin that timm's evaluation has too, so only crops of less than 0.77 of the short side are enlarged more than
they would be anyway. Images that are smaller are kept as they are; nothing is enlarged.
"""
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch.utils.data
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torchvision.transforms import functional

from timm_amf.errors import UserError
from timm_amf.files import cache_folder, open_or_write
from timm_amf.flags import CORES

from .mixture import Mixture

__all__ = ['ImageCache', 'build_cache', 'cache_short_side']

_logger = logging.getLogger(__name__)
_VERSION = 2
_CHUNK = 16  # images a worker sends at a time


def cache_short_side(input_size: Union[int, Sequence[int]]) -> int:
    """Short side of cached images for a model's input size: 256 for 224."""
    shorter = input_size if isinstance(input_size, int) else min(input_size[-2:])
    return round(shorter * 256 / 224)


class ImageCache:
    """Read-only view of a built cache; processes that open the same folder share its memory.

    Args:
        folder: What `build_cache` wrote.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        index = np.load(self.folder / 'index.npy')
        self.mode = json.loads((self.folder / 'about.json').read_text(encoding='utf-8'))['mode']
        self.shapes = index[:, :2].astype(np.int64)  # (height, width)
        sizes = self.shapes.prod(1) * len(Image.new(self.mode, (1, 1)).getbands())
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        if (self.folder / 'pixels.bin').stat().st_size != self.starts[-1]:
            raise OSError(f'{self.folder}: pixels.bin has the wrong size')
        self._pixels: Optional[np.ndarray] = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_pixels': None}  # a worker that is spawned maps the file itself

    def load(self, index: int) -> Image.Image:
        if self._pixels is None:
            self._pixels = np.memmap(self.folder / 'pixels.bin', dtype=np.uint8, mode='r')
        height, width = self.shapes[index]
        pixels = self._pixels[self.starts[index]:self.starts[index + 1]]
        return Image.frombuffer(self.mode, (width, height), pixels, 'raw', self.mode, 0, 1)


def build_cache(
        dataset: Mixture,
        short_side: int,
        cache_dir: Union[str, Path, None] = None,
        interpolation: str = 'bicubic',
        workers: int = 0,
        progress: bool = True,
) -> Optional[ImageCache]:
    """Build the cache of a dataset, or find it built, and let the dataset read from it.

    With several processes the first builds and the others call this after it. A cache is found again by the names,
    sizes and times of the image files, so a changed folder gets a new one. It takes short side squared times about 4
    bytes an image.

    Args:
        dataset: The mixture; its bad images must have been removed.
        short_side: Images with a longer short side are shrunk to it. With the short side and interpolation of an
            evaluation transform (`floor(size / crop_pct)`, centre crop), nothing changes.
        cache_dir: Folder of all caches. None: `timm_amf` in the user's cache folder.
        interpolation: Of the shrinking, by timm's name.
        workers: Processes that decode.
        progress: Show a bar, if on a terminal.

    Returns:
        The cache, or None for datasets that are in memory anyway.
    """
    if dataset.in_memory:
        return None
    mode = dataset.input_img_mode
    if mode not in ('RGB', 'L', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'LAB'):
        raise UserError(f'--cache-images holds 8-bit images, not {mode!r}; leave it out, or set --input-img-mode RGB')
    key = fingerprint(dataset, f'images {_VERSION} {mode} {short_side} {interpolation}')
    folder = cache_folder(cache_dir, f'images-{key}')

    def write(path: Path) -> None:
        _logger.info(f'Building the image cache of {len(dataset)} images in {folder}.')
        shrink, shapes = partial(_shrunk, dataset, short_side, str_to_interp_mode(interpolation)), []
        with open(path / 'pixels.bin', 'wb') as file:
            for array in map_images(shrink, len(dataset), workers, 'Caching images', progress):
                if isinstance(array, str):
                    raise UserError(array)
                file.write(array)
                shapes.append(array.shape[:2])
        np.save(path / 'index.npy', np.array(shapes, dtype=np.int64).reshape(-1, 2))
        (path / 'about.json').write_text(json.dumps({'mode': mode, 'images': len(shapes)}), encoding='utf-8')

    dataset.cache = open_or_write(folder, ImageCache, write)
    return dataset.cache


def _shrunk(dataset: Mixture, short_side: int, interpolation: Any, index: int) -> Union[np.ndarray, str]:
    """Pixels of an image, shrunk; or the message of the error, which shows no traceback from a worker."""
    try:
        image = dataset.load_original(index)
    except UserError as e:
        return str(e)
    if min(image.size) > short_side:
        image = functional.resize(image, short_side, interpolation=interpolation)
    return np.array(image)


def fingerprint(dataset: Mixture, purpose: str) -> str:
    """Changes when an image, the choice of images, or the purpose changes."""
    digest = hashlib.sha256(purpose.encode())
    for index in range(len(dataset)):
        digest.update(dataset.signature(index).encode('utf-8', 'surrogateescape') + b'\n')
    return digest.hexdigest()[:24]


def map_images(
        function: Callable[[int], Any],
        number: int,
        workers: int,
        description: str,
        progress: bool,
) -> Iterator[Any]:
    """What a function gives for the indices of images, in order, by worker processes, with a bar on a terminal."""
    from tqdm import tqdm
    loader = torch.utils.data.DataLoader(
        range(number), batch_size=_CHUNK, num_workers=min(workers, CORES), collate_fn=partial(_each, function),
        generator=torch.Generator())
    with tqdm(total=number, desc=description, unit='img', disable=None if progress else True) as bar:
        for chunk in loader:
            yield from chunk
            bar.update(len(chunk))


def _each(function: Callable[[int], Any], indices: Sequence[int]) -> list:
    return [function(index) for index in indices]
