"""The benchmarks run and print their rows; what they measure is for a quiet machine, not for a test."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize('script, rows', [
    ('amf', [
        'control: amf / amf',
        'forward + backward: amf / sum of parts',
        'forward + backward + update: task / sum of parts',
        'channels_last + bf16 autocast / fp32',
        'one branch an image (eps 1) / arithmetic',
    ]),
    ('spottune', [
        'routed / plain', 'routed / both', 'policy / plain', 'norms in training mode, routed / plain',
        'resnet10t: routed / plain',
    ]),
    ('train_loop', ['control: bare / bare', 'loop / bare', 'loop - bare, a step', 'loop - bare, once an epoch']),
    ('l2sp', ['control: sgd / sgd', 'sgd: L2-SP / weight decay', 'adamw: L2-SP / weight decay']),
    ('block_search', [
        'lockstep / one after the other', 'chunks of 6 / one after the other', 'last block: cached / alone',
        'kept for backward: lockstep / full fine-tuning',
    ]),
    ('import_time', ['control: timm / timm', 'timm_amf / timm']),
])
def test_prints_its_rows(script, rows):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    result = subprocess.run(
        [sys.executable, str(ROOT / 'benchmarks' / f'{script}.py'), '--quick', '--threads', '1'],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'PYTHONPATH': path})
    assert result.returncode == 0, result.stderr
    for row in rows:
        found = re.search(rf'^{re.escape(row)} +(-?[\d.]+)', result.stdout, re.MULTILINE)
        assert found, f'no row {row!r} in\n{result.stdout}'
        float(found[1])


@pytest.mark.slow
def test_robustness_finds_nothing_in_a_few_cases_and_goes_on(tmp_path):
    for count in (2, 3):
        result = subprocess.run(
            [sys.executable, str(ROOT / 'benchmarks/robustness.py'), '--count', str(count), '--work', str(tmp_path)],
            capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stdout + result.stderr
        assert re.findall(r'^(\S+) +fine +(\d+)$', result.stdout, re.MULTILINE) == [
            (name, str(count)) for name in (
                'checkpoints', 'command-lines', 'images', 'kills', 'other-commands', 'recipes')]
