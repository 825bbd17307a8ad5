"""Files that appear whole or not at all."""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, Union

from timm_amf.errors import UserError

__all__ = ['replacing']


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

    Raises:
        UserError: If it cannot be written; what was there before is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        reason = e.strerror or next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f'{label or path}: cannot be written ({reason}); {remedy}') from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
