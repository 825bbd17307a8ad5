"""The embedded demo: real images that come with scikit-learn and scikit-image, so that nothing is downloaded.

Two modes that want different features: handwritten digits (10 classes) and patches of photographs of brick, grass and
gravel (3 classes), all as RGB images of 32 px.
"""
import numpy as np
from PIL import Image

from timm_amf.errors import UserError

__all__ = ['DEMO_SIZE', 'load_digits', 'load_textures']

DEMO_SIZE = 32
_EXTRA = 'the demo needs {}: pip install "timm_amf[demo]"'

# Images of each digit: the set is ordered by writer, so the splits hold different writers for the most part.
_DIGITS_PER_CLASS = {'train': (0, 80), 'val': (80, 105), 'test': (105, 130)}

# Rows of patches, 21 a row, of each photograph of 512 x 512: bands that do not overlap.
_TEXTURES = ('brick', 'grass', 'gravel')
_PATCH = 24
_TEXTURE_ROWS = {'train': (0, 13), 'val': (13, 17), 'test': (17, 21)}


def load_digits(split: str) -> tuple[list[Image.Image], list[int], list[str]]:
    """Images, targets and class names of a split (`train` 800, `val` 250, `test` 250 images).
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as e:
        raise UserError(_EXTRA.format('scikit-learn')) from e
    digits = sklearn_digits()
    start, stop = _DIGITS_PER_CLASS[split]
    images, targets = [], []
    for target in range(10):
        for pixels in digits.images[digits.target == target][start:stop]:
            images.append(_to_image((pixels * (255 / 16)).round()))
            targets.append(target)
    return images, targets, [str(n) for n in range(10)]


def load_textures(split: str) -> tuple[list[Image.Image], list[int], list[str]]:
    """Images, targets and class names of a split (`train` 819, `val` 252, `test` 252 images).
    """
    try:
        from skimage import data
    except ImportError as e:
        raise UserError(_EXTRA.format('scikit-image')) from e
    start, stop = _TEXTURE_ROWS[split]
    images, targets = [], []
    for target, name in enumerate(_TEXTURES):
        photo = getattr(data, name)()
        for row in range(start * _PATCH, stop * _PATCH, _PATCH):
            for col in range(0, photo.shape[1] - _PATCH + 1, _PATCH):
                images.append(_to_image(photo[row:row + _PATCH, col:col + _PATCH]))
                targets.append(target)
    return images, targets, list(_TEXTURES)


def _to_image(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8))
    return image.resize((DEMO_SIZE, DEMO_SIZE), Image.Resampling.BICUBIC).convert('RGB')
