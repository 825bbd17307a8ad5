from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    """Write a folder of splits of classes of small images, each of its own colour, and return its path."""
    def make(
            name: str = 'images',
            classes: Sequence[str] = ('a', 'b', 'c'),
            splits: Sequence[str] = ('train', 'val'),
            number: int = 4,
            size: tuple[int, int] = (40, 30),
            suffix: str = 'png',
    ) -> Path:
        for split in splits:
            for index, label in enumerate(classes):
                for i in range(number):
                    save_image(tmp_path / name / split / label / f'{i}.{suffix}', size, 31 * index + i)
        return tmp_path / name
    return make


def save_image(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def save() -> Callable[..., None]:
    return save_image
