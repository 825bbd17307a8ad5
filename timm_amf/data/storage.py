"""Folders of the cache on disk."""
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union

from timm_amf.files import whole_folder

__all__ = ['cache_folder', 'default_cache_dir', 'open_or_write']

_logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """`timm_amf` in the user's cache folder."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_amf'


def cache_folder(cache_dir: Union[str, Path, None], name: str) -> Path:
    """Folder of a thing in the cache; None is the default cache."""
    return Path(cache_dir or default_cache_dir()).expanduser() / name


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
