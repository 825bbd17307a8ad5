"""Names of a package that are imported when they are first used."""
import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ['lazy']


def lazy(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: Its name.
        places: Name -> module of the package that holds it. No module may have one of the names.
    """
    def __getattr__(name: str) -> Any:
        if name in places:
            return getattr(importlib.import_module(f'.{places[name]}', package), name)
        raise AttributeError(f'module {package!r} has no attribute {name!r}')

    return __getattr__
