"""Small real runs of the train script: a folder of generated images, a run in this process, what it left behind."""
import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_amf  # noqa: E402

SMALL = [
    '--model', 'amf', '--model-kwargs', "backbones=('test_resnet','test_resnet')", 'policy=test_resnet',
    '--img-size', '32', '-b', '8', '--epochs', '3', '--workers', '0', '--lr', '0.05', '--warmup-epochs', '0', '--cpu',
    '--tracker', 'none', '--branch-lr', '0.01', '0.05', '--policy-lr', '0.02',
]
ONE = ['--model', 'test_resnet', *SMALL[5:-5]]  # a fifth of the time, where a composite has no part in it


@pytest.fixture(scope='session')
def folders(tmp_path_factory) -> Path:
    """Two components, `stripes` and `blobs`, of 3 and 2 classes, that a small network can learn."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for component, classes in (('stripes', 3), ('blobs', 2)):
        for split, count in (('train', 9), ('val', 5)):
            for k in range(classes):
                folder = root / component / split / f'class{k}'
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(_image(component, k, rng)).save(folder / f'{i}.png')
    return root


def _image(component: str, k: int, rng) -> np.ndarray:
    y, x = np.mgrid[:40, :40]
    if component == 'stripes':
        angle = np.pi * k / 3
        pattern = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.8 + rng.uniform(0, 6))
        colour = np.array([1., .2, .2])
    else:
        cx, cy = rng.uniform(12, 28, 2)
        pattern = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * (3 + 6 * k) ** 2)) * 2 - 1
        colour = np.array([.2, .3, 1.])
    noise = rng.normal(0, 0.1, (40, 40, 3))
    return (127 + 100 * (pattern[..., None] * colour + noise)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def components(folders):
    return [f'--component=name={name},path={folders / name}' for name in ('stripes', 'blobs')]


@pytest.fixture
def run(components, tmp_path, monkeypatch):
    """Run train_amf.train in this process: run(name, *flags) -> the run's folder."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))

    def _run(name: str, *flags: str, base=SMALL, data=components) -> Path:
        reset_accelerate()
        train_amf.train([*base, *data, '--output', str(tmp_path), '--experiment', name, *flags])
        return tmp_path / name

    yield _run
    reset_accelerate()


@pytest.fixture(scope='session')
def finished(tmp_path_factory) -> tuple[dict, Path]:
    return {}, tmp_path_factory.mktemp('finished')


@pytest.fixture
def trained(run, components, finished, tmp_path):
    """As `run`, for a run that is only what a test begins with: trained once for all tests, each has a copy."""
    made, store = finished

    def _trained(name: str, *flags: str, base=SMALL, data=components) -> Path:
        key = (name, flags, *map(tuple, (base, data)))
        if key not in made:
            run(name, *flags, base=base, data=data)
            made[key] = shutil.copytree(tmp_path / name, store / str(len(made))), str(tmp_path)
            return tmp_path / name
        kept, where = made[key]
        folder = shutil.copytree(kept, tmp_path / name)
        args = folder / 'args.yaml'
        args.write_text(args.read_text().replace(where, str(tmp_path)))
        return folder

    return _trained


def reset_accelerate() -> None:
    """Accelerate's state is one for a process; a run in a test starts with none."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """A cache of its own, and no accelerator that another test left; for the modules and folders that import it."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    reset_accelerate()
    yield
    reset_accelerate()


def rows(path: Path) -> list[dict]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def same_tensors(a, b) -> bool:
    """Equal to the bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_tensors(x, y) for x, y in zip(a, b))
    return a == b


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs left the same bits: weights, moving average, optimiser, best, records."""
    for name in ('last/model.safetensors', 'last/ema.safetensors', 'model_best.safetensors', 'last/state.json',
                 'summary.csv', 'policy.csv'):
        assert (a / name).exists() == (b / name).exists(), name
        if (a / name).exists():
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    left, right = (torch.load(run / 'last/optimizer.pt', weights_only=True) for run in (a, b))
    assert same_tensors(left, right)
