"""Names of a package that are imported when they are first used."""
import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

__all__ = ['callable_module', 'lazy']


def lazy(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: Its name.
        places: Name -> module of the package that holds it. A module of that name itself stays what the name is.
    """
    def __getattr__(name: str) -> Any:
        if name in places:
            module = importlib.import_module(f'.{places[name]}', package)
            return module if places[name] == name else getattr(module, name)
        raise AttributeError(f'module {package!r} has no attribute {name!r}')

    return __getattr__


class _Command(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        package, _, name = self.__name__.rpartition('.')
        return getattr(importlib.import_module(f'{package}.api'), name)(*args, **kwargs)


def callable_module(name: str) -> None:
    """Let a module of the package that has the name of a command be called like the function of `api` of that name."""
    sys.modules[name].__class__ = _Command
