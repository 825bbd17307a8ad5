"""A run of two epochs on images that are drawn here, by the installed command; then its file for deployment."""
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import timm_amf

assert 'site-packages' in Path(timm_amf.__file__).parts, 'this tries the checkout'
with tempfile.TemporaryDirectory() as folder:
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for k in range(2):
            place = Path(folder, 'data', split, f'class{k}')
            place.mkdir(parents=True)
            for i in range(8):
                Image.fromarray(rng.integers(100 * k, 100 * k + 100, (32, 32, 3), np.uint8)).save(place / f'{i}.png')
    command = [sys.executable, '-m', 'timm_amf.cli']
    subprocess.run([
        *command, 'train', f'{folder}/data', '--model', 'amf', '--model-kwargs',
        "backbones=('test_resnet','test_resnet')", 'policy=test_resnet',
        '--img-size', '32', '-b', '8', '--epochs', '2', '--workers', '1', '--lr', '0.05', '--cpu',
        '--output', folder, '--experiment', 'run'], check=True)
    subprocess.run([*command, 'evaluate', f'{folder}/run', '--workers', '0'], check=True)
    subprocess.run([*command, 'export', f'{folder}/run', '--format', 'pt2'], check=True)
print('installed package: trained, evaluated, exported')
