"""A run with adapters: resumed to the same bits, and what it writes for use is a plain model."""
import pytest
from conftest_engine import ONE, SMALL, assert_same_run, rows
from safetensors.torch import load_file
from test_resume import Killed, kill_at

import timm_amf
from timm_amf.engine.evaluate_runs import evaluate_runs

pytest.importorskip('peft')
FLAGS = ['--epochs', '2', '-b', '15', '--lora-rank', '2', '--model-ema', '--model-ema-decay', '0.5', '--wise-ft']


@pytest.mark.parametrize('base', [SMALL, ONE], ids=['amf', 'plain'])
def test_killed_and_resumed(run, monkeypatch, base):
    whole = run('whole', *FLAGS, base=base)
    with monkeypatch.context() as patch:
        kill_at(patch, 1, 2)
        with pytest.raises(Killed):
            run('killed', *FLAGS, base=base)
    killed = run('killed', *FLAGS, '--resume', 'auto', base=base)
    assert_same_run(whole, killed)
    assert any('lora_' in name for name in load_file(whole / 'last' / 'model.safetensors'))
    assert not any('lora_' in name for name in load_file(whole / 'model_best.safetensors'))


def test_is_a_plain_model_afterwards(run):
    folder = run('lora', '--lora-rank', '2', base=ONE)
    best = max(float(row['eval_top1']) for row in rows(folder / 'summary.csv'))
    assert evaluate_runs([folder])[0].top1 == pytest.approx(best, abs=1e-3)
    model = timm_amf.load(folder)
    assert type(model).__name__ == 'ResNet' and not any('lora_' in name for name in model.state_dict())
