"""One split of one dataset as classes, targets and files, in the dataset's own order."""
import contextlib
import io
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Optional

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.utils.misc import natural_key

from timm_amf.errors import UserError

from .spec import Component

__all__ = [
    'ArraySource', 'FileSource', 'ReaderSource', 'Source', 'and_more', 'as_shown', 'class_index', 'class_names',
    'errors_of', 'first_line', 'read_image', 'why_unreadable',
]


class Source:
    """One split of one dataset.

    Attributes:
        classes: Names of the classes, in the dataset's own order.
        targets: Class of each sample, (N,) int64.
        name: What messages call the dataset.
        version: Changes when the images change.
        in_memory: The images are held decoded, so there is nothing to check or to cache.
    """
    in_memory = False

    def __init__(self, classes: Iterable[Any], targets: Any, name: str = '', version: str = ''):
        # A file system may keep an accented letter in one character or in two: macOS does the latter.
        self.classes = [unicodedata.normalize('NFC', str(label)) for label in classes]
        self.targets = np.asarray(targets, dtype=np.int64)
        self.name = name
        self.version = version

    def __len__(self) -> int:
        return len(self.targets)

    def open(self, index: int) -> BinaryIO:
        """The undecoded image."""
        raise NotImplementedError

    def load(self, index: int, mode: Optional[str]) -> Image.Image:
        """The image as a viewer shows it, in a Pillow mode; see `as_shown`."""
        with self.open(index) as file:
            return as_shown(Image.open(file), mode)

    def filename(self, index: int) -> str:
        return f'{self.name}[{index}]'

    def relative_name(self, index: int) -> str:
        """The file name from the dataset's folder on, with `/`: the same wherever the folder lies."""
        return self.filename(index)

    def signature(self, index: int) -> str:
        """Changes when the image changes: what a cache is keyed by."""
        return f'{self.name}\0{self.version}\0{index}'


class FileSource(Source):
    """Images in files.

    Args:
        root: Folder of the dataset.
        columns: Of a table, its columns by name, a text for each image.
    """

    def __init__(
            self,
            classes: Iterable[Any],
            targets: Any,
            paths: Iterable[Any],
            root: str = '',
            columns: Optional[dict[str, list[str]]] = None,
    ):
        super().__init__(classes, targets)
        self.paths = list(map(str, paths))
        self.root = root and os.path.join(os.path.abspath(root), '')
        self.columns = columns or {}

    def open(self, index: int) -> BinaryIO:
        path = self.paths[index]
        if not os.path.isfile(path) and os.path.exists(path):
            raise OSError('no file')  # opening a pipe would wait for its writer
        return open(path, 'rb')

    def filename(self, index: int) -> str:
        return self.paths[index]

    def relative_name(self, index: int) -> str:
        path = os.path.abspath(self.paths[index])
        return path.removeprefix(self.root).replace(os.sep, '/')

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

    def __init__(self, classes: Iterable[Any], targets: Any, images: Any, name: str):
        super().__init__(classes, targets, name)
        self.images = images

    def load(self, index: int, mode: Optional[str]) -> Image.Image:
        image = self.images[index]
        image = image[0] if isinstance(image, tuple) else image
        return image.convert(mode) if mode else image


class ReaderSource(Source):
    """Images behind one of timm's map-style readers (`hfds/`, tar files)."""

    def __init__(self, classes: Iterable[Any], targets: Any, reader: Any, name: str, version: str):
        super().__init__(classes, targets, name, version)
        self.reader = reader

    def open(self, index: int) -> BinaryIO:
        file = self.reader[index][0]
        return io.BytesIO(file) if isinstance(file, bytes) else file

    def filename(self, index: int) -> str:
        return f'{self.name}[{index}] ({self.reader.filename(index) or "no file name"})'

    def relative_name(self, index: int) -> str:
        return f'{os.path.basename(self.name)}[{index}]'


# ---- images


def read_image(source: Source, index: int, mode: Optional[str]) -> Image.Image:
    """As `Source.load`, with an error that names the image."""
    try:
        return source.load(index, mode)
    except Exception as e:  # Pillow's plugins raise whatever they like
        raise UserError(
            f'cannot read image {source.filename(index)} ({why_unreadable(e)}); mend or remove it, or go on without '
            f'such images with --skip-bad-images') from e


def why_unreadable(error: BaseException) -> str:
    """What an exception of reading an image says is wrong with it, in a few words."""
    if isinstance(error, FileNotFoundError):
        return 'no such file'
    return 'not an image' if isinstance(error, UnidentifiedImageError) else first_line(error)


def as_shown(image: Image.Image, mode: Optional[str]) -> Image.Image:
    """An image as a viewer shows it: turned by its EXIF orientation, 16 bits a channel scaled to 8, and transparency
    over white. timm heeds none of these: it converts to the mode, which clips 16 bits and drops what is transparent.

    Args:
        image: As it was opened.
        mode: Pillow mode to convert to, such as RGB, L or RGBA. None: as it is.

    Raises:
        OSError: If the range of its values is not known.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):
        values = np.asarray(image)
        deep = image.mode != 'I' or values.max(initial=0) > 255  # 'I' is 8, 16 or 32 bits wide
        if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
            raise OSError('more than 16 bits a pixel; convert it to 8 or 16')
        image = Image.fromarray((values >> 8 if deep else values).astype(np.uint8))
    elif image.mode == 'F':
        raise OSError('pixels in floating point, whose range is not known; convert it to 8 or 16 bits')
    if mode is None:
        image.load()
        return image
    if 'A' not in mode and image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert(mode)


# ---- classes and messages


def class_index(names: Iterable[str], component: Component, folder: str) -> dict[str, int]:
    """The index of each class: as the component's class map has it, else in timm's natural order of the names."""
    from timm.data.readers.class_map import load_class_map
    if component.class_map:
        return {unicodedata.normalize('NFC', str(k)): v for k, v in load_class_map(component.class_map, folder).items()}
    # timm leaves names that are equal but for their case in the order of a set; settled by the name, runs agree.
    return {name: i for i, name in enumerate(sorted(names, key=lambda name: (natural_key(name), name)))}


def class_names(class_to_idx: dict) -> list[str]:
    """Class names by index; a class map may give several names one index, or leave an index without a name."""
    names = {index: str(name) for name, index in reversed(class_to_idx.items())}
    return [names.get(index, f'class {index}') for index in range(max(names) + 1)]


@contextlib.contextmanager
def errors_of(where: str) -> Iterator[None]:
    """Around what reads data: messages begin with whose they are."""
    try:
        yield
    except UserError as e:
        raise type(e)(f'{where}: {e}') from e
    except ImportError as e:
        raise UserError(f'{where}: needs {e.name}; pip install {e.name}') from e


def and_more(names: Sequence[Any]) -> str:
    """The first of the names, and how many there are beside it."""
    return f'{names[0]!r} (and {len(names) - 1} more)' if len(names) > 1 else f'{names[0]!r}'


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip('.;') if lines else type(error).__name__
