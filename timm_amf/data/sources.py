"""One split of one dataset as classes, targets and files, in the dataset's own order."""
import io
import os
from typing import Any, BinaryIO, Optional

import numpy as np
from PIL import Image, UnidentifiedImageError

from timm_amf.errors import UserError

__all__ = [
    'ArraySource', 'FileSource', 'ReaderSource', 'Source', 'class_names', 'first_line', 'read_image',
]


class Source:
    """One split of one dataset.

    Attributes:
        classes: Names of the classes, in the dataset's own order.
        targets: Class of each sample, (N,) int64.
        in_memory: The images are held decoded, so there is nothing to check or to cache.
    """
    in_memory = False

    def __init__(self, classes: list[str], targets: Any):
        self.classes = [str(name) for name in classes]
        self.targets = np.asarray(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.targets)

    def open(self, index: int) -> BinaryIO:
        """The undecoded image."""
        raise NotImplementedError

    def load(self, index: int, mode: Optional[str]) -> Image.Image:
        """The image, converted to a Pillow mode as timm does; as in timm, EXIF's rotation is not heeded."""
        with self.open(index) as file:
            image = Image.open(file)
            if mode:
                return image.convert(mode)
            image.load()
            return image

    def filename(self, index: int) -> str:
        raise NotImplementedError

    def signature(self, index: int) -> str:
        """Changes when the image changes: what a cache is keyed by."""
        raise NotImplementedError


class FileSource(Source):
    """Images in files."""

    def __init__(self, classes: list[str], targets: Any, paths: list[str]):
        super().__init__(classes, targets)
        self.paths = paths

    def open(self, index: int) -> BinaryIO:
        return open(self.paths[index], 'rb')

    def filename(self, index: int) -> str:
        return str(self.paths[index])

    def signature(self, index: int) -> str:
        path = self.paths[index]
        try:
            stat = os.stat(path)
        except OSError:
            return f'{path}\0missing'
        return f'{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}'


class ArraySource(Source):
    """Images in memory: a torchvision dataset of arrays, or a list of Pillow images."""
    in_memory = True

    def __init__(self, classes: list[str], targets: Any, images: Any, name: str):
        super().__init__(classes, targets)
        self.images = images
        self.name = name

    def load(self, index: int, mode: Optional[str]) -> Image.Image:
        image = self.images[index]
        image = image[0] if isinstance(image, tuple) else image
        return image.convert(mode) if mode else image

    def filename(self, index: int) -> str:
        return f'{self.name}[{index}]'

    def signature(self, index: int) -> str:
        return self.filename(index)


class ReaderSource(Source):
    """Images behind one of timm's map-style readers (`hfds/`, tar files)."""

    def __init__(self, classes: list[str], targets: Any, reader: Any, name: str, version: str):
        super().__init__(classes, targets)
        self.reader = reader
        self.name = name
        self.version = version

    def open(self, index: int) -> BinaryIO:
        file = self.reader[index][0]
        return io.BytesIO(file) if isinstance(file, bytes) else file

    def filename(self, index: int) -> str:
        return f'{self.name}[{index}] ({self.reader.filename(index) or "no file name"})'

    def signature(self, index: int) -> str:
        return f'{self.name}\0{self.version}\0{index}'


def read_image(source: Source, index: int, mode: Optional[str]) -> Image.Image:
    """As `Source.load`, with an error that names the image."""
    try:
        return source.load(index, mode)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        reason = 'not an image' if isinstance(e, UnidentifiedImageError) else first_line(e)
        raise UserError(
            f'cannot read image {source.filename(index)} ({reason}); mend or remove it, or go on without such images '
            f'with --skip-bad-images') from e


def class_names(class_to_idx: dict) -> list[str]:
    """Class names by index; a class map may give several names one index, or leave an index without a name."""
    names: list[str] = [''] * (max(class_to_idx.values()) + 1)
    for name, index in class_to_idx.items():
        names[index] = names[index] or str(name)
    return [name or f'class {index}' for index, name in enumerate(names)]


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip('.;') if lines else type(error).__name__
