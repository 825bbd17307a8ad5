"""Folders of the cache on disk: each appears whole or not at all."""
import errno
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

from timm_amf.errors import UserError

__all__ = ['cache_folder', 'default_cache_dir', 'open_or_write']

_logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """`timm_amf` in the user's cache folder."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_amf'


def cache_folder(cache_dir: Union[str, Path, None], name: str) -> Path:
    """Folder of a thing in the cache; None is the default cache."""
    return Path(cache_dir or default_cache_dir()).expanduser() / name


def open_or_write(folder: Path, read: Callable[[Path], Any], write: Callable[[Path], None]) -> Any:
    """Open a folder of the cache, or fill it under a temporary name and rename it.

    An interrupted writer leaves a temporary folder, which the next one on the same machine removes.

    Raises:
        UserError: The folder cannot be written.
    """
    if folder.exists():
        try:
            return read(folder)
        except (OSError, ValueError, KeyError) as e:
            _logger.warning(f'The cache {folder} is damaged ({e}); it is built again.')
            shutil.rmtree(folder, ignore_errors=True)
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        prefix = f'{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}-'
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            write(temporary)
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return read(folder)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f'no space left for the cache in {folder.parent}; free some, or set --cache-dir') from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f'cannot write the cache in {folder.parent} ({e.strerror}); set --cache-dir') from e
        raise


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f'*.tmp-{socket.gethostname()}-*-*'):
        pid = path.name.rsplit('-', 2)[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
