"""Where a run starts, and what it decays towards, through the train script: stopped and resumed to the bit."""
import multiprocessing
import os
import shutil
import socket

import pytest
import timm
import torch
from conftest_engine import assert_same_run, reset_accelerate
from safetensors.torch import load_file, save_file
from test_resume import Killed, kill_at

import train_amf
from timm_amf import UserError, list_blocks
from timm_amf.engine import loop

BASE = [
    '--model', 'test_resnet', '--img-size', '32', '-b', '8', '--epochs', '2', '--workers', '0', '--lr', '0.05',
    '--warmup-epochs', '0', '--cpu', '--tracker', 'none', '--clip-grad', '1', '--weight-decay', '0.01',
]
DEPTHS = ['--reinit-blocks', '1', '--l2sp-alpha', '0.1', '--l2sp-blocks', '2', '--train-share', '0.8']


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Weights that no constructor gives."""
    path = tmp_path_factory.mktemp('weights') / 'start.safetensors'
    torch.manual_seed(9)
    model = timm.create_model('test_resnet', num_classes=5)
    save_file({n: v + (0.01 if v.is_floating_point() else 1) for n, v in model.state_dict().items()}, path)
    return path


def test_resumed_to_the_bit(run, weights, monkeypatch):
    flags = [*DEPTHS, '--initial-checkpoint', str(weights), '--recovery-interval', '2']
    whole = run('whole', *flags, base=BASE)
    with monkeypatch.context() as patch:
        kill_at(patch, 1, 3)
        with pytest.raises(Killed):
            run('killed', *flags, base=BASE)
    # Resume takes all from the checkpoint: the weights that the run started from are not there any more.
    killed = run('killed', *DEPTHS, '--recovery-interval', '2', '--resume', 'auto', base=BASE)
    assert_same_run(whole, killed)
    start, saved = load_file(weights), load_file(whole / 'last/l2sp.safetensors')
    assert saved and all(torch.equal(t, start[n]) for n, t in saved.items())
    assert load_file(killed / 'last/l2sp.safetensors').keys() == saved.keys()


def test_what_starts_anew(run, weights, monkeypatch, capsys):
    """The trainer meets the loaded weights, the last block anew and all else as loaded."""
    started = {}

    def keep(self):
        started.update({n: v.clone() for n, v in self.task.model.state_dict().items()})
        raise Killed

    monkeypatch.setattr(loop.Trainer, 'train_epoch', keep)
    with pytest.raises(Killed):
        run('start', *DEPTHS, '--initial-checkpoint', str(weights), base=BASE)
    loaded, last = load_file(weights), list_blocks(timm.create_model('test_resnet'))[-1]
    for name, value in started.items():
        assert torch.equal(value, loaded[name]) != name.startswith(f'{last}.'), name
    out = capsys.readouterr().out
    assert f're-initialised: {last}' in out and 'drawn with seed 0' in out and 'alpha 0.1 on the first 2' in out
    assert 'random weights' not in out
    with pytest.raises(Killed):
        run('random', base=BASE)
    assert 'starts from random weights; for trained ones add --pretrained' in capsys.readouterr().out


def _rank(rank, port, argv):
    """One of two processes, as torchrun starts them."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    reset_accelerate()
    os._exit(train_amf.main(argv))


def test_two_processes_decay_towards_the_same_start(components, weights, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    argv = [*BASE, *components, *DEPTHS, '--initial-checkpoint', str(weights), '--output', str(tmp_path),
            '--experiment', 'two']
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context('fork')  # which has imported all that it takes
    children = [context.Process(target=_rank, args=(rank, port, argv)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    saved, start = load_file(tmp_path / 'two/last/l2sp.safetensors'), load_file(weights)
    assert saved and all(torch.equal(t, start[n]) for n, t in saved.items())


@pytest.mark.parametrize('flags, words', [
    (['--l2sp-alpha', '0.1'], ['--pretrained', '--initial-checkpoint', 'random']),
    (['--reinit-blocks', '9'], ['reinit_blocks', '9']),
    (['--l2sp-alpha', '0.1', '--l2sp-blocks', '4', '--reinit-blocks', '1'], ['l2sp_blocks', '4', '3']),
])
def test_one_line_before_any_work(run, flags, words, tmp_path):
    with pytest.raises(UserError) as error:
        run('bad', *flags, base=BASE)
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)
    assert not (tmp_path / 'bad' / 'args.yaml').exists()


def test_a_checkpoint_of_another_architecture(run, weights):
    with pytest.raises(UserError) as error:
        run('bad', '--l2sp-alpha', '0.1', '--initial-checkpoint', str(weights), '--model', 'test_vit', base=BASE)
    assert "cannot load the weights of 'test_vit'" in str(error.value) and str(weights) in str(error.value)
    own, others = timm.create_model('test_vit').state_dict(), load_file(weights)
    assert f'the file lacks {len(own.keys() - others.keys())}, such as cls_token; ' in str(error.value)
    assert f'the model lacks {len(others.keys() - own.keys())}, such as ' in str(error.value)
    assert '\n' not in str(error.value) and '--pretrained-path' not in str(error.value)


def test_a_checkpoint_of_other_classes(run, weights):
    with pytest.raises(UserError, match=r'another shape: 2, such as \S+ \(.*--pretrained-path adapts a classifier'):
        run('bad', '--initial-checkpoint', str(weights), base=[*BASE, '--num-classes', '9'])


def test_copies_are_told_when_nothing_else_is_wrong(run, weights, folders, tmp_path, caplog):
    root = shutil.copytree(folders / 'stripes', tmp_path / 'copies')
    shutil.copy(root / 'train/class0/0.png', root / 'val/class0/0.png')
    with pytest.raises(UserError):
        run('bad', '--initial-checkpoint', str(weights), '--model', 'test_vit', base=BASE, data=[str(root)])
    assert not caplog.records
    run('dry', '--dry-run', base=BASE, data=[str(root)])
    assert 'has copies of training images (1)' in caplog.text


def test_resuming_with_a_plan_that_decays_elsewhere(run, weights):
    run('plain', '--initial-checkpoint', str(weights), base=BASE)
    with pytest.raises(UserError, match='Plan'):
        run('plain', '--resume', 'auto', '--epochs', '3', '--l2sp-alpha', '0.1', '--no-resume-opt', base=BASE)
