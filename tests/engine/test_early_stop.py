"""A run stops when nothing gets better, at the same epoch whether it is resumed or not."""
import pytest
from conftest_engine import ONE, SMALL, assert_same_run, rows
from test_train import torchrun

from timm_amf import UserError
from timm_amf.engine import loop
from timm_amf.engine.options import parse_args

TOP1 = [10, 30, 20, 30, 25, 40, 50, 60]


@pytest.fixture
def early(run, monkeypatch):
    """Run 8 epochs whose accuracies are `TOP1`."""
    original = loop.Trainer.evaluate_now
    monkeypatch.setattr(loop.Trainer, 'evaluate_now', lambda self: {**original(self), 'top1': TOP1[self.epoch]})
    return lambda name, *flags: run(name, '--epochs', '8', '-b', '45', *flags, base=ONE)


def test_it_stops_and_a_resumed_run_too(early, capsys):
    whole = early('whole', '--early-stop', '3')
    assert len(rows(whole / 'summary.csv')) == 5  # epoch 2 was the best of them
    out = capsys.readouterr().out
    assert 'early stop: top1 is no better than after epoch 2, 3 epochs ago' in out and 'best top1 30.000' in out
    parts = early('parts', '--early-stop', '3', '--stop-epoch', '3')
    assert len(rows(parts / 'summary.csv')) == 3
    assert_same_run(whole, early('parts', '--early-stop', '3', '--resume', 'auto'))
    assert 'nothing is left' not in capsys.readouterr().out
    assert_same_run(whole, early('parts', '--early-stop', '3', '--resume', 'auto'))
    assert 'nothing is left to train: best top1 30.000 after epoch 2' in capsys.readouterr().out
    assert len(rows(early('parts', '--early-stop', '4', '--resume', 'auto') / 'summary.csv')) == 8


def test_epochs_without_evaluation_do_not_end_a_run(early):
    run = early('some', '--early-stop', '3', '--val-interval', '2')  # 30, 30, 40, 60
    assert len(rows(run / 'summary.csv')) == 8
    assert len(rows(early('two', '--early-stop', '1', '--val-interval', '2') / 'summary.csv')) == 4


def test_a_number_that_is_none(folders):
    with pytest.raises(UserError, match='--early-stop: must be at least 1'):
        parse_args([str(folders), '--model', 'test_resnet', '--early-stop', '0'])


@pytest.mark.slow
def test_two_processes_agree(components, tmp_path):
    """Only the first knows the best epoch."""
    flags = ['--lr', '1e-9', '--early-stop', '1', '--val-share', '0.2', '--class-sampling', 'balanced']
    out = torchrun(tmp_path, 2, *SMALL, *components, *flags, '--epochs', '20', '--experiment', 'two')
    assert out.count('early stop') == 1 and len(rows(tmp_path / 'two' / 'summary.csv')) < 20
