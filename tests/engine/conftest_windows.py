"""A file layer that refuses what that of Windows refuses, over the one of Linux."""
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest
from filelock import SoftFileLock

from timm_amf import files
from timm_amf.engine import run


def in_use(path) -> list[str]:
    """What of a path, or of what is in it, this process has open or mapped."""
    path = os.path.realpath(path)
    names = []
    for handle in os.listdir('/proc/self/fd'):
        try:
            names.append(os.readlink(f'/proc/self/fd/{handle}'))
        except OSError:
            continue
    for line in Path('/proc/self/maps').read_text().splitlines():
        names.append(line.partition('/')[1] + line.partition('/')[2])
    return [name for name in names if name == path or name.startswith(f'{path}/')]


@pytest.fixture
def windows(monkeypatch):
    """Refusals, in the words of the layer; returns the list of what was refused."""
    if sys.platform != 'linux':
        pytest.skip('looks at /proc')
    refused = []
    real = {name: getattr(os, name) for name in ('open', 'fsync', 'replace', 'rename', 'unlink', 'rmdir')}

    def refuse(what: str, path, error=PermissionError, number=errno.EACCES):
        refused.append(f'{what} {path}')
        raise error(number, f'{what} is refused', str(path))

    def open_(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            refuse('opening a folder', path)
        return real['open'](path, flags, *args, **kwargs)

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            refuse('fsync of a handle for reading', handle, OSError, errno.EBADF)
        return real['fsync'](handle)

    def moved(name: str, source, target):
        if in_use(source) or in_use(target):
            refuse(f'{name} of what is open', in_use(source) or in_use(target))
        if os.path.exists(target) and (name == 'rename' or os.path.isdir(target)):
            refuse(f'{name} to what is there', target, FileExistsError, errno.EEXIST)
        return real[name](source, target)

    def removed(path, **kwargs):
        if in_use(path):
            refuse('removing what is open', path)
        return real['unlink'](path, **kwargs)

    def no_fork():
        raise AssertionError('Windows has no fork')

    monkeypatch.setattr(os, 'open', open_)
    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', lambda a, b: moved('replace', a, b))
    monkeypatch.setattr(os, 'rename', lambda a, b: moved('rename', a, b))
    monkeypatch.setattr(os, 'unlink', removed)
    monkeypatch.setattr(os, 'remove', removed)
    monkeypatch.setattr(os, 'fork', no_fork)
    monkeypatch.setattr(shutil, '_use_fd_functions', False)  # it opens folders
    monkeypatch.setattr(files, '_WINDOWS', True)
    monkeypatch.setattr(run, 'FileLock', SoftFileLock)  # that of Linux locks by other means
    return refused
