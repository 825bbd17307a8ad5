"""A small folder of images, and weights for `test_resnet` with a classifier of 1000 classes, both made here."""
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest_advise import clean  # noqa: F401  a fixture
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> Path:
    """Components `colours` and `noise`, of three classes each: one that any network tells apart, one that none does."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for component in ('colours', 'noise'):
        for split, number in (('train', 8), ('val', 6)):
            for k in range(3):
                folder = root / component / split / f'{component}{k}'
                folder.mkdir(parents=True)
                for i in range(number):
                    pixels = rng.integers(0, 120, (36, 36, 3))
                    if component == 'colours':
                        pixels[..., k] += 130
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'test_resnet.safetensors'
    save_file(timm.create_model('test_resnet').state_dict(), path)
    return path


@pytest.fixture
def flags(weights) -> list[str]:
    return [
        '--model', 'test_resnet', '--pretrained-path', str(weights), '--img-size', '32', '-b', '16', '--workers', '0',
        '--cpu', '--tracker', 'none', '--no-progress', '--epochs', '2']
