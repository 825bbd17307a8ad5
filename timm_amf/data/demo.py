"""The embedded demo: real images that come with scikit-learn and scikit-image, so that nothing is downloaded.

Two modes that want different features: handwritten digits (10 classes) and patches of photographs of brick, grass and
gravel (3 classes), all as RGB images of 32 px.
"""
from collections.abc import Iterable

import numpy as np
from PIL import Image

__all__ = ['LOADERS']

_SIZE = 32
# Images of each digit: the set is ordered by writer, so the splits hold different writers for the most part.
_DIGITS_PER_CLASS = {'train': (0, 80), 'val': (80, 105), 'test': (105, 130)}
# Rows of patches, 21 a row, of each photograph of 512 x 512: bands that do not overlap.
_TEXTURES = ('brick', 'grass', 'gravel')
_PATCH = 24
_TEXTURE_ROWS = {'train': (0, 13), 'val': (13, 17), 'test': (17, 21)}

# What a loader gives: images, targets and class names.
Samples = tuple[list[Image.Image], list[int], list[str]]


def _digits(split: str) -> Samples:
    """`train` 800, `val` 250, `test` 250 images."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    start, stop = _DIGITS_PER_CLASS[split]
    groups = [digits.images[digits.target == target][start:stop] * (255 / 16) for target in range(10)]
    return _samples([group.round() for group in groups], map(str, range(10)))


def _textures(split: str) -> Samples:
    """`train` 819, `val` 252, `test` 252 images."""
    from skimage import data
    start, stop = _TEXTURE_ROWS[split]
    photos = [getattr(data, name)() for name in _TEXTURES]
    return _samples([
        [photo[row:row + _PATCH, col:col + _PATCH]
         for row in range(start * _PATCH, stop * _PATCH, _PATCH) for col in range(0, len(photo) - _PATCH + 1, _PATCH)]
        for photo in photos], _TEXTURES)


def _samples(groups: list[Iterable[np.ndarray]], names: Iterable[str]) -> Samples:
    """Grey pixels of 0 to 255 of the images of each class."""
    samples = [(_to_image(pixels), target) for target, group in enumerate(groups) for pixels in group]
    return [image for image, _ in samples], [target for _, target in samples], list(names)


def _to_image(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    return image.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC).convert('RGB')


LOADERS = {'digits': _digits, 'textures': _textures}
