"""Flags of small runs, and training one in this process; from the tests of the engine its folder of images."""
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests' / 'engine'))

from conftest_engine import folders, reset_accelerate  # noqa: E402, F401

import train_amf  # noqa: E402

COMMON = [
    '--img-size', '32', '-b', '8', '--workers', '0', '--lr', '0.05', '--warmup-epochs', '0', '--cpu', '--tracker',
    'none', '--no-check-images',
]
AMF = [
    *COMMON, '--model', 'amf', '--model-kwargs', "backbones=('test_resnet','test_resnet')", 'policy=test_resnet',
    'policy_input_size=16', '--branch-lr', '0.01', '0.05', '--policy-lr', '0.02', '--epochs', '2',
]
SPOTTUNE = [
    *COMMON, '--model', 'spottune', '--model-kwargs', 'backbone=test_resnet', 'policy=test_resnet', '--policy-lr',
    '0.1', '--role', 'stem.train=all', '--epochs', '1',
]
PLAIN = [*COMMON, '--model', 'test_resnet', '--epochs', '1']
MULTITUNE = [
    *COMMON, '--model', 'multitune', '--model-kwargs', "backbones=('test_resnet','test_resnet')", '--epochs', '1']
FLAGS = {
    'amf': AMF, 'multitune': MULTITUNE, 'spottune': SPOTTUNE, 'plain': PLAIN,
    'global_k': [*SPOTTUNE, '--global-k', '1'],
}


def train(name: str, output: Path, flags: Sequence[str]) -> Path:
    """Trains in this process; returns the run's folder."""
    reset_accelerate()
    try:
        train_amf.train([*flags, '--output', str(output), '--experiment', name])
    finally:
        reset_accelerate()
    return output / name
