"""Small real runs of a plain network, an AMF and a SpotTune, trained once."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / 'engine'))
from conftest_engine import SMALL, folders, reset_accelerate  # noqa: E402, F401  a fixture

import train_amf  # noqa: E402

COMMON = [*SMALL[SMALL.index('--img-size'):SMALL.index('--branch-lr')], '--epochs', '2']
KINDS = {
    'plain': ['--model', 'test_resnet', *COMMON],
    'amf': [*SMALL, '--epochs', '2'],
    'spottune': [
        *COMMON, '--model', 'spottune', '--model-kwargs', 'backbone=test_resnet', 'policy=test_resnet', '--policy-lr',
        '0.3'],
}


@pytest.fixture(scope='session')
def runs(folders, tmp_path_factory):  # noqa: F811
    """Folders of runs by the kind of their model: two components, of 3 and 2 classes, 25 validation images."""
    root = tmp_path_factory.mktemp('runs')
    data = [f'--component=name={name},path={folders / name}' for name in ('stripes', 'blobs')]
    before = os.environ.get('XDG_CACHE_HOME')
    os.environ['XDG_CACHE_HOME'] = str(root / 'cache')
    for name, flags in KINDS.items():
        reset_accelerate()
        train_amf.train([*flags, *data, '--output', str(root), '--experiment', name])
    reset_accelerate()
    os.environ.pop('XDG_CACHE_HOME')
    if before is not None:
        os.environ['XDG_CACHE_HOME'] = before
    return {name: root / name for name in KINDS}


@pytest.fixture
def run_of_colours(tmp_path, monkeypatch):
    """A run of three classes that a network tells apart, and the folder of its images."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    data = tmp_path / 'colours'
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for k, name in enumerate(('red', 'green', 'blue')):
            (data / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 150, (36, 36, 3))
                pixels[..., k] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(data / split / name / f'{i}.png')
    reset_accelerate()
    train_amf.train([
        '--model', 'test_resnet', *COMMON, str(data), '--output', str(tmp_path), '--experiment', 'colours-run'])
    reset_accelerate()
    return tmp_path / 'colours-run', data
