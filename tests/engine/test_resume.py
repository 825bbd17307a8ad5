"""A run that is stopped, however and whenever, and resumed gives the bits of one that never was."""
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from conftest_engine import ONE, ROOT, assert_same_run, rows

import train_amf
from timm_amf import UserError
from timm_amf.engine import checkpoint, loop

# Everything that holds state: momentum, moving average, mixup, dropout, plateau, accumulation, a role that starts late.
STATEFUL = [
    '--model-ema', '--model-ema-decay', '0.9', '--mixup', '0.4', '--drop', '0.3', '--reprob', '0.5', '--aa',
    'rand-m5-mstd0.5', '--grad-accum-steps', '2', '--role', 'policy.start_epoch=1', '--sched', 'plateau',
    '--patience-epochs', '0', '--recovery-interval', '2',
]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test catches it."""


def kill_at(monkeypatch, epoch, step):
    """Die at the beginning of a step."""
    original = loop.Trainer._train_step

    def dying(self, at, *args):
        if (self.epoch, at) == (epoch, step):
            raise Killed
        return original(self, at, *args)

    monkeypatch.setattr(loop.Trainer, '_train_step', dying)


@pytest.fixture
def whole(trained):
    return trained('whole', *STATEFUL)


@pytest.mark.parametrize('epoch, step', [(0, 3), (1, 0), (2, 5)])
def test_killed_in_a_step(run, whole, monkeypatch, epoch, step):
    with monkeypatch.context() as patch:
        kill_at(patch, epoch, step)
        with pytest.raises(Killed):
            run('killed', *STATEFUL)
    assert_same_run(whole, run('killed', *STATEFUL, '--resume', 'auto'))


def test_killed_twice_and_before_the_first_checkpoint(run, whole, monkeypatch):
    for epoch, step in ((0, 1), (0, 5), (2, 1)):
        with monkeypatch.context() as patch:
            kill_at(patch, epoch, step)
            with pytest.raises(Killed):
                run('killed', *STATEFUL, '--resume', 'auto')
    assert_same_run(whole, run('killed', *STATEFUL, '--resume', 'auto'))


# Of one network, which is quicker: what writes knows nothing of it.
WRITTEN = [*STATEFUL[:STATEFUL.index('--role')], '--recovery-interval', '2']


@pytest.fixture
def plain(trained):
    return trained('whole', *WRITTEN, base=ONE)


@pytest.mark.parametrize('function', ['save_file', 'torch.save', 'os.rename', 'shutil.rmtree', 'os.replace'])
@pytest.mark.parametrize('call', [3, 6])
def test_killed_while_writing(run, plain, monkeypatch, function, call):
    """Die in the n-th call of each function that writing goes through, half of the file written."""
    with monkeypatch.context() as patch:
        module, _, name = function.rpartition('.')
        owner = {'': checkpoint, 'torch': torch, 'os': os, 'shutil': shutil}[module]
        original, calls = getattr(owner, name), []

        def dying(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                if function == 'save_file':
                    args[1].write_bytes(b'half')
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run('killed', *WRITTEN, base=ONE)
    assert_same_run(plain, run('killed', *WRITTEN, '--resume', 'auto', base=ONE))
    assert not [p for p in (plain.parent / 'killed').iterdir() if '.tmp' in p.name or p.name.endswith('.new')]


@pytest.mark.parametrize('moment', [0, 1])
def test_killed_between_the_two_renames_of_last(run, plain, monkeypatch, moment):
    with monkeypatch.context() as patch:
        original, calls = os.rename, []

        def dying(source, target):
            if len(calls) > 6 and (len(calls) % 2) == moment:
                raise Killed
            calls.append(target)
            return original(source, target)

        patch.setattr(checkpoint.os, 'rename', dying)
        with pytest.raises(Killed):
            run('killed', *WRITTEN, base=ONE)
    assert_same_run(plain, run('killed', *WRITTEN, '--resume', 'auto', base=ONE))


def test_a_full_disk_leaves_the_previous_checkpoint_whole(run, plain, monkeypatch):
    with monkeypatch.context() as patch:
        original, calls = torch.save, []

        def full(*args, **kwargs):
            calls.append(1)
            if len(calls) >= 4:
                raise OSError(errno.ENOSPC, 'No space left on device')
            return original(*args, **kwargs)

        patch.setattr(checkpoint.torch, 'save', full)
        with pytest.raises(UserError, match='no space left on the disk.*previous checkpoint is whole'):
            run('full', *WRITTEN, base=ONE)
    folder = plain.parent / 'full'
    safetensors.torch.load_file(folder / 'last/model.safetensors')
    assert not list(folder.glob('*.tmp*'))
    assert_same_run(plain, run('full', *WRITTEN, '--resume', 'auto', base=ONE))


def test_a_signal_saves_and_leaves(run, components, tmp_path):
    """A real process and its workers, a real signal to all of them, in the middle of an epoch."""
    flags = ['-b', '15', '--epochs', '15']
    whole = run('whole', *flags, base=ONE)
    command = [
        sys.executable, str(ROOT / 'train_amf.py'), *ONE, *components, *flags,
        '--output', str(tmp_path), '--experiment', 'stopped', '--workers', '2']
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    summary = tmp_path / 'stopped' / 'summary.csv'
    for _ in range(1200):
        if summary.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert 'go on with --resume auto' in errors and 'Traceback' not in errors
    assert len(rows(summary)) < 15
    assert_same_run(whole, run('stopped', *flags, '--resume', 'auto', base=ONE))


def test_ctrl_c_saves_and_leaves(run, components, tmp_path, monkeypatch, capsys):
    original = loop.Trainer._train_step

    def interrupted(self, at, *args):
        if (self.epoch, at) == (1, 2):
            signal.raise_signal(signal.SIGINT)
        return original(self, at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, '_train_step', interrupted)
        assert train_amf.main([*ONE, *components, '--output', str(tmp_path), '--experiment', 'stopped']) == 130
    errors = capsys.readouterr().err
    assert 'go on with --resume auto' in errors and 'Traceback' not in errors
    assert len(rows(tmp_path / 'stopped/summary.csv')) == 1
    assert_same_run(run('whole', base=ONE), run('stopped', '--resume', 'auto', base=ONE))


def test_resume_of_a_finished_run_changes_nothing(run, trained, capsys):
    whole = trained('whole', base=ONE)
    copied = whole.parent / 'copied'
    shutil.copytree(whole, copied)
    assert_same_run(whole, run('copied', '--resume', 'auto', base=ONE))
    before = {name: (copied / name).read_bytes() for name in ('args.yaml', 'plan.yaml', 'environment.yaml')}
    run('copied', '--resume', 'auto', '--lr', '0.5', '--seed', '7', base=ONE)
    assert f'{copied}: epoch 3 was the last, and nothing is left to train; --epochs N' in capsys.readouterr().out
    assert before == {name: (copied / name).read_bytes() for name in before}  # what trained it


def test_resume_by_path_into_another_folder_and_more_epochs(run, trained):
    first = trained('first', base=ONE)
    second = run('second', '--resume', str(first), '--epochs', '5', base=ONE)
    assert [int(r['epoch']) for r in rows(second / 'summary.csv')] == [0, 1, 2, 3, 4]
    third = run('third', '--resume', str(first / 'last'), '--epochs', '5', base=ONE)
    assert_same_run(second, third)


@pytest.mark.parametrize('flags, words', [
    (['--resume', 'nowhere'], ['nowhere']),
    (['--resume', 'auto', '--model-kwargs', "backbones=('test_resnet','test_vit')", 'policy=test_resnet'],
     ['does not fit']),
    (['--resume', 'auto', '--model-ema', '--epochs', '9'], ['moving average']),
    (['--resume', 'auto', '--freeze', 'branch.0', '--epochs', '9'], ['Plan']),
    ([], ['--resume auto', '--overwrite']),
])
def test_what_cannot_be_resumed_is_one_line(run, trained, flags, words):
    trained('first')
    with pytest.raises(UserError) as error:
        run('first', *flags)
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_the_middle_of_an_epoch_needs_the_same_steps(run, monkeypatch):
    flags = ['--recovery-interval', '2']
    with monkeypatch.context() as patch:
        kill_at(patch, 1, 4)
        with pytest.raises(Killed):
            run('killed', *flags, base=ONE)
    with pytest.raises(UserError, match='batch_size 8 before, 16 now'):
        run('killed', *flags, '-b', '16', '--resume', 'auto', base=ONE)


def test_a_hostile_optimizer_file_is_not_executed(run, trained, tmp_path):
    folder = trained('first', base=ONE)

    class Hostile:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "executed"}',)

    torch.save(Hostile(), folder / 'last/optimizer.pt')
    with pytest.raises(UserError, match='damaged'):
        run('first', '--resume', 'auto', '--epochs', '9', base=ONE)
    assert not (tmp_path / 'executed').exists()


def test_overwrite_starts_anew(run, trained):
    first = trained('first', base=ONE)
    before = (first / 'last/model.safetensors').read_bytes()
    second = run('first', '--epochs', '1', '--overwrite', base=ONE)
    assert len(rows(second / 'summary.csv')) == 1
    assert before != (second / 'last/model.safetensors').read_bytes()


def test_changed_options_are_named(run, trained, caplog):
    trained('first', base=ONE)
    run('first', '--resume', 'auto', '--epochs', '4', base=ONE)
    assert '(epochs 3 before, 4 now)' in caplog.text
    run('first', '--resume', 'auto', '--epochs', '4', '--model-kwargs', 'drop_rate=0.1', '--mixup', '0.2', base=ONE)
    assert "model_kwargs {} before, {'drop_rate': 0.1} now; mixup 0.0 before, 0.2 now)" in caplog.text
