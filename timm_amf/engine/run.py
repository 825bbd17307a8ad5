"""The folder of a run: who owns it, what resumes from it, and when it is written."""
import argparse
import contextlib
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import timm
import torch
import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout

from timm_amf.engine.checkpoint import Checkpointer
from timm_amf.errors import TOKEN, UserError
from timm_amf.files import write_text
from timm_amf.version import __version__

__all__ = [
    'check_finished', 'check_kind', 'claim_folder', 'find_resume', 'folder_by_data', 'prepare_folder',
    'write_environment',
]

_LOCK = '.lock'
# By which a folder is known to hold each.
_MARKS = {'run': 'plan.yaml', 'search': 'search.yaml', 'sweep': 'trial*-seed*'}


def find_resume(args: argparse.Namespace, folder: Path) -> Optional[Path]:
    """The checkpoint that `--resume` names, or None where there is nothing to resume.

    `auto` takes that of the experiment if there is one; else a path: a run's folder, its `last/`, or its `last.old/`.
    """
    if not args.resume:
        return None
    if args.resume == 'auto':
        if not args.experiment:
            raise UserError('--resume auto looks in the folder of the experiment; name it with --experiment')
        return Checkpointer(folder).found()
    source = Path(args.resume)
    if source.name == 'last.old':
        return source
    found = Checkpointer(source.parent if source.name == 'last' else source).found()
    if found is None:
        raise UserError(
            f'--resume {source}: no checkpoint there; give the folder of a run, or its last/, or start from a file of '
            f'weights with --initial-checkpoint')
    return found


def folder_by_data(args: argparse.Namespace, command: str) -> Path:
    """The folder of a command's result, which has the name of the data where there is no `--experiment`."""
    data = Path(args.data_dir or 'mixture').resolve()
    return Path(args.output or f'output/{command}') / (args.experiment or (data.stem if data.is_file() else data.name))


def check_kind(folder: Path, kind: str, remedy: str = 'name another folder with --output and --experiment') -> None:
    """Refuse a folder that holds something else than what is to be written or read there: run, search or sweep."""
    for other, mark in _MARKS.items():
        if other != kind and any(folder.glob(mark)):
            raise UserError(f'{folder}: holds a {other}; {remedy}')


@contextlib.contextmanager
def claim_folder(folder: Path, overwrite: bool, resume: Optional[Path], kind: str = 'run') -> Iterator[None]:
    """Make a run the only one that writes to its folder, which is made if it is not there, and left if it stays empty.
    """
    check_kind(folder, kind)
    own = resume is not None and resume.parent.resolve() == folder.resolve()
    if not (own or overwrite) and Checkpointer(folder).holds_run():
        raise UserError(f'{folder}: holds a run already; continue it with --resume auto, or add --overwrite')
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f'{folder}: another run is writing there; choose another --experiment') from None
    except OSError as e:
        raise UserError(f'{folder}: cannot be written ({e.strerror}); choose another --output') from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            (folder / _LOCK).unlink(missing_ok=True)  # Windows removes no file that is open
            folder.rmdir()


def check_finished(folder: Path) -> None:
    """Refuse a folder that a run is writing to."""
    with contextlib.suppress(OSError):  # where nothing can be written, nobody writes
        if (folder / _LOCK).exists():
            try:
                with FileLock(folder / _LOCK, blocking=False):
                    pass
            except Timeout:
                raise UserError(
                    f'{folder}: a run is writing there; wait until it has finished, or interrupt it') from None


def write_environment(folder: Path, accelerator: Accelerator) -> None:
    """Write `environment.yaml`, where a run runs: the command without tokens, versions, hardware."""
    device, script = accelerator.device, Path(sys.argv[0]).name
    gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    about = dict(
        command=TOKEN.sub('hf_...', shlex.join(['timm-amf' if script == 'cli.py' else script, *sys.argv[1:]])),
        versions=dict(
            timm_amf=__version__, timm=timm.__version__, torch=str(torch.__version__),
            python=platform.python_version()),
        hardware=dict(
            device=gpu or platform.processor() or platform.machine(), processes=accelerator.num_processes,
            cores=os.cpu_count(), system=platform.system()),
    )
    write_text(folder / 'environment.yaml', yaml.safe_dump(about, sort_keys=False))


def prepare_folder(folder: Path, resume: Optional[Path]) -> None:
    """Make a folder ready for its first file: remove an earlier run, or take over what a resumed one has."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpointer(folder)
    if resume is None:
        checkpoints.discard()  # a resume must not find the run that this one replaces
    elif resume.parent.resolve() == folder.resolve():
        checkpoints.settle()
    else:
        for file in Checkpointer(resume.parent).records():
            shutil.copy2(file, folder / file.name)
