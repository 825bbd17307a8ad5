"""Files and folders that appear whole or not at all, whatever moment a kill or a full disk picks; folders of the cache.
"""
import contextlib
import errno
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

from safetensors import SafetensorError

from timm_amf.errors import UserError

__all__ = ['cache_folder', 'open_or_write', 'replacing', 'whole_folder', 'write_text', 'writing']

_logger = logging.getLogger(__name__)

_UMASK = os.umask(0)  # there is no other way to read it
os.umask(_UMASK)
_WINDOWS = os.name == 'nt'
_FULL = (errno.ENOSPC, errno.EDQUOT)
# torch and safetensors wrap the system's error in text of their own; on a full disk torch's archive writer finds no
# more than that its file is shorter than it should be.
_FULL_TEXT = re.compile(r'No space left|os error 28\b|unexpected pos')
_WRITE_TEXT = re.compile(r'I/O ?error|os error|PytorchStreamWriter|iostream', re.IGNORECASE)


@contextlib.contextmanager
def replacing(
        path: Union[str, Path],
        remedy: str = 'name another file',
        label: Optional[str] = None,
) -> Iterator[Path]:
    """A temporary name for a file that gets its own if the block succeeds, in a folder that is made if it is missing.

    Args:
        path: The file.
        remedy: What to do where it cannot be written.
        label: What to call it then; None is its path.
    """
    path = Path(path)
    temporary = path.with_name(f'{path.name}.tmp')
    with writing(label or path, remedy):
        try:
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise OSError('a device or a pipe is there')  # it would be gone
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Union[str, Path], text: str, remedy: str = 'name another file') -> None:
    """Write a text file as `replacing` does."""
    with replacing(path, remedy) as temporary:
        temporary.write_text(text, encoding='utf-8')


@contextlib.contextmanager
def whole_folder(
        folder: Union[str, Path],
        remedy: str = 'name another folder',
        label: Union[str, Path, None] = None,
) -> Iterator[Path]:
    """As `replacing`, for a folder that is not there yet; if another process is faster, its folder stays.

    A killed writer leaves a temporary folder, which the next one on the same machine removes.
    """
    folder = Path(folder)
    with writing(label or folder, remedy):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent)
        temporary = folder.with_name(f'{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}')
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for file in filter(Path.is_file, temporary.rglob('*')):
                _sync(file)
            _sync_folder(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not folder.exists():
                    raise
            _sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def cache_folder(cache_dir: Union[str, Path, None], name: str) -> Path:
    """Folder of a thing in the cache; None is `timm_amf` in the user's cache folder."""
    default = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_amf'
    return Path(cache_dir or default).expanduser() / name


def open_or_write(folder: Path, read: Callable[[Path], Any], write: Callable[[Path], None]) -> Any:
    """Open a folder of the cache, or write it if it is missing or damaged."""
    if folder.exists():
        try:
            return read(folder)
        except (OSError, ValueError, KeyError) as e:
            _logger.warning(f'The cache {folder} is damaged ({e}); it is built again.')
            shutil.rmtree(folder, ignore_errors=True)
    with whole_folder(folder, 'free some space, or set --cache-dir', f'the cache in {folder.parent}') as temporary:
        write(temporary)
    return read(folder)


@contextlib.contextmanager
def writing(what: Union[str, Path], remedy: str) -> Iterator[None]:
    """Make a `UserError` that names the file or folder of what the system says of it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:
        full = getattr(e, 'errno', None) in _FULL or _FULL_TEXT.search(str(e))
        if not (full or isinstance(e, OSError) or _WRITE_TEXT.search(str(e))):
            raise
        reason = 'no space left on the disk' if full else ' '.join((getattr(e, 'strerror', None) or str(e)).split())
        raise UserError(f'{what}: cannot be written ({reason or type(e).__name__}); {remedy}') from e


def _sync(path: Path) -> None:
    path.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
    _fsync(path, os.O_RDWR)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows has no handles of folders
        _fsync(path, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f'*.tmp-{socket.gethostname()}-*'):
        pid = path.name.rsplit('-', 1)[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if _WINDOWS:  # there, `os.kill` ends a process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
