"""What a laptop lacks, emulated: the files of Windows, `fork`, and float64 on Apple's GPUs."""
import mmap
import multiprocessing
import os

import pytest
import torch
from conftest_engine import ONE, SMALL, rows
from conftest_no_float64 import no_float64  # noqa: F401  fixture
from conftest_windows import windows  # noqa: F401  fixture

from timm_amf.files import whole_folder, write_text
from timm_amf.models import records


def test_the_emulated_layer_refuses(windows, tmp_path):  # noqa: F811
    write_text(tmp_path / 'a', 'x')
    write_text(tmp_path / 'b', 'x')
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    handle = os.open(tmp_path / 'a', os.O_RDONLY)
    with pytest.raises(OSError, match='fsync'):
        os.fsync(handle)
    with pytest.raises(PermissionError):
        os.replace(tmp_path / 'b', tmp_path / 'a')
    mapped = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
    os.close(handle)
    with pytest.raises(PermissionError):
        (tmp_path / 'b').replace(tmp_path / 'a')
    mapped.close()
    (tmp_path / 'b').replace(tmp_path / 'a')
    with pytest.raises(FileExistsError):
        os.rename(tmp_path / 'a', tmp_path / 'a')
    with whole_folder(tmp_path / 'folder') as folder:
        (folder / 'file').write_text('x')
    assert (tmp_path / 'folder/file').read_text() == 'x'


def test_a_run_on_windows_saves_resumes_and_mixes(run, windows, tmp_path):  # noqa: F811
    """All that a run writes: checkpoints, those kept, a resumed run, a mix, another run in the place of one."""
    flags = ['--head-start', 'zero', '--wise-ft', '--checkpoint-hist', '2', '--model-ema', '-b', '15']
    folder = run('windows', *flags, '--stop-epoch', '2', base=ONE)
    run('windows', *flags, '--resume', 'auto', base=ONE)
    assert len(rows(folder / 'summary.csv')) == 3
    assert (folder / 'mix.csv').exists() and (folder / 'last.old').is_dir()
    run('windows', *flags, '--epochs', '1', '--overwrite', base=ONE)
    assert len(rows(folder / 'summary.csv')) == 1
    # Nothing but what Windows cannot do anyway was refused, or it would have been an error.
    assert windows and all(line.startswith('opening a folder') or line.endswith('.lock') for line in windows)


def test_the_emulated_device_refuses_float64(no_float64):  # noqa: F811
    x = torch.zeros(2, device=no_float64)
    assert x.device == no_float64 and (x + 1).device == no_float64 and x.cpu().device.type == 'cpu'
    for make in (x.double, lambda: torch.zeros(1, dtype=torch.float64, device='mps'),
                 lambda: x.new_zeros(1, dtype=torch.float64), x.numpy):
        with pytest.raises(TypeError, match='(?i)mps'):
            make()
    with pytest.raises(RuntimeError, match='same device'):
        x.cpu().double().add_(x)


SPOTTUNE = [
    '--model', 'spottune', '--model-kwargs', 'backbone=test_resnet', 'policy=test_resnet', '--img-size', '32', '-b',
    '8', '--epochs', '2', '--workers', '0', '--lr', '0.05', '--warmup-epochs', '0', '--cpu', '--tracker', 'none']


@pytest.mark.parametrize('base', [SMALL, SPOTTUNE, [*SPOTTUNE, '--global-k', '2']], ids=['amf', 'spottune', 'global-k'])
def test_a_run_on_a_device_without_float64_is_that_of_the_cpu(run, base, request, monkeypatch):
    """Training, evaluation, and evaluation alone, to the bit: only where the sums are kept differs."""
    flags = ['--mixup', '0.4', '--reprob', '0.5', '--clip-grad', '1', '--drop', '0.2', '-b', '15', '--epochs', '1']
    here = run('cpu', *flags, base=base)
    device, said = request.getfixturevalue('no_float64'), []
    monkeypatch.setattr(records._logger, 'warning', lambda text, *args: said.append(text % args))
    there = run('device', *flags, base=base)
    assert rows(there / 'summary.csv') == rows(here / 'summary.csv')
    assert rows(there / 'policy.csv') == rows(here / 'policy.csv')
    assert (there / 'last/model.safetensors').read_bytes() == (here / 'last/model.safetensors').read_bytes()
    assert said == [f'The device {device} has no float64: sums of losses and records are kept on the CPU.']


@pytest.mark.slow
def test_a_run_whose_workers_are_spawned(run, windows, monkeypatch):  # noqa: F811
    """Spawning is the default of Windows and macOS; the run is that without workers, to the bit."""
    spawn = multiprocessing.get_context('spawn')
    monkeypatch.setattr(multiprocessing.context._default_context, '_actual_context', spawn)
    flags = ['--epochs', '1', '--aa', 'rand-m5-mstd0.5', '--reprob', '0.5', '--cache-images']
    spawned, without = run('spawned', *flags, '--workers', '1'), run('without', *flags)
    for name in ('summary.csv', 'policy.csv', 'last/model.safetensors'):
        assert (spawned / name).read_bytes() == (without / name).read_bytes()
