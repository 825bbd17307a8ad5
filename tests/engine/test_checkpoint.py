"""Files whole or not at all."""
import errno
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from timm_amf import UserError
from timm_amf.engine.checkpoint import Checkpointer, load_weights, save_weights
from timm_amf.engine.run_folder import best_epoch
from timm_amf.files import write_text
from timm_amf.text import csv_of


def test_weights_round_trip_in_any_memory_format(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    save_weights(net, tmp_path / 'w.safetensors')
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    load_weights(other, tmp_path / 'w.safetensors')
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_tied_weights_are_written_twice(tmp_path):
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    net[1].weight = net[0].weight
    save_weights(net, tmp_path / 'w.safetensors')
    assert set(load_file(tmp_path / 'w.safetensors')) == set(net.state_dict())


@pytest.mark.parametrize('metric, losses', [('top1', (0.9, 0.8, 0.7, 0.6)), ('loss', (0.9, 0.6, 0.6, 0.7))])
def test_of_equal_epochs_the_metrics_are_those_of_the_weights(tmp_path, metric, losses):
    keeper, net = Checkpointer(tmp_path, decreasing=metric == 'loss'), nn.Linear(1, 1)
    rows = [dict(epoch=i, eval_loss=loss, eval_top1=top1) for i, (loss, top1) in enumerate(zip(losses, (1, 3, 3, 2)))]
    for row in rows:
        nn.init.constant_(net.weight, row['epoch'])
        keeper.save_epoch(net, row['epoch'], row[f'eval_{metric}'])
    write_text(tmp_path / 'args.yaml', f'eval_metric: {metric}')
    write_text(tmp_path / 'summary.csv', csv_of(rows))
    best = rows[int(load_file(tmp_path / 'model_best.safetensors')['weight'])]
    assert best_epoch(tmp_path) == dict(loss=best['eval_loss'], top1=best['eval_top1'])


@pytest.mark.parametrize('content, words', [
    (None, 'no such checkpoint'), (b'half a file', 'damaged'), (b'', 'damaged'),
])
def test_what_cannot_be_loaded_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / 'w.safetensors').write_bytes(content)
    with pytest.raises(UserError, match=f'w.safetensors.*{words}'):
        load_weights(nn.Linear(2, 2), tmp_path / 'w.safetensors')


def test_weights_of_another_model_are_refused_and_nothing_is_loaded(tmp_path):
    save_weights(nn.Linear(2, 3), tmp_path / 'w.safetensors')
    net = nn.Linear(2, 2)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    with pytest.raises(UserError, match='does not fit Linear'):
        load_weights(net, tmp_path / 'w.safetensors')
    assert torch.equal(net.weight, before['weight'])


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), OSError(errno.EACCES, 'Denied')])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, error):
    write_text(tmp_path / 'a.txt', 'before')

    def fail(*_):
        raise error

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(UserError, match='a.txt: cannot be written'):
        write_text(tmp_path / 'a.txt', 'after')
    assert (tmp_path / 'a.txt').read_text() == 'before' and os.listdir(tmp_path) == ['a.txt']


@pytest.mark.parametrize('present, survivor', [
    ({'last': 'old', 'last.new': 'new'}, 'new'),
    ({'last.old': 'old', 'last.new': 'new'}, 'new'),
    ({'last.old': 'old'}, 'old'),
    ({'last': 'new', 'last.old': 'old'}, 'new'),
    ({'last': 'old', 'last.old': 'older', 'last.new': 'new'}, 'new'),
    ({'last': 'old', 'last.tmp': 'half'}, 'old'),
])
def test_settle_leaves_the_newest_whole_checkpoint(tmp_path, present, survivor):
    for name, content in present.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ('state.json' if content != 'half' else 'model.safetensors')).write_text(content)
    Checkpointer(tmp_path).settle()
    assert {*os.listdir(tmp_path)} <= {'last', 'last.old'} and (tmp_path / 'last/state.json').read_text() == survivor


@pytest.mark.parametrize('decreasing', [False, True])
def test_the_best_are_kept(tmp_path, decreasing):
    checkpoints = Checkpointer(tmp_path, keep=2, keep_epochs=[0], decreasing=decreasing)
    metrics = [3., 1., 4., 1.5, 9., 2.]
    best = [checkpoints.save_epoch(nn.Linear(1, 1), epoch, metric) for epoch, metric in enumerate(metrics)]
    order = sorted(range(6), key=metrics.__getitem__, reverse=not decreasing)
    assert checkpoints.best_epoch == order[0] and checkpoints.best_metric == metrics[order[0]]
    running = [m == (min if decreasing else max)(metrics[:i + 1]) for i, m in enumerate(metrics)]
    assert best == running
    names = {f'checkpoint-{e}.safetensors' for e in {*order[:2], 0}} | {'model_best.safetensors'}
    assert set(os.listdir(tmp_path)) == names
    assert not checkpoints.save_epoch(nn.Linear(1, 1), 6, None)


@pytest.mark.skipif(not hasattr(resource, 'RLIMIT_FSIZE'), reason='needs a limit on the size of files')
@pytest.mark.parametrize('limit', [2_000, 60_000])
def test_a_write_that_the_system_cuts_short_leaves_the_previous_checkpoint(tmp_path, limit):
    """A real refusal by the system, in the middle of the weights or of the optimiser's archive."""
    net = nn.Linear(100, 100)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save_last(net, None, optimizer, dict(epoch=1))
    before = {p.name: p.read_bytes() for p in checkpoints.last.iterdir()}
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, previous[1]))
    try:
        with pytest.raises(UserError, match='last: cannot be written'):
            checkpoints.save_last(net, None, optimizer, dict(epoch=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ['last']
    assert {p.name: p.read_bytes() for p in checkpoints.last.iterdir()} == before
