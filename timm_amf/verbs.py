"""What the verbs of `timm-amf` have in common: a mistake is one line and exit code 2, Ctrl-C is no traceback."""
import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from timm_amf.errors import UserError

__all__ = ['VerbParser', 'run_verb']


class VerbParser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`: without the usage, which would hide the one line that matters."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run_verb(name: str, work: Callable[[], None], interrupted: str = 'interrupted') -> int:
    """Does the work of a verb and turns what goes wrong into one line.

    Args:
        name: Name of the program, with which the line begins.
        work: Parses, does, prints.
        interrupted: What there is to say after Ctrl-C.

    Returns:
        The exit code: 2 for a mistake of the user.
    """
    try:
        work()
    except UserError as e:
        print(f'{name}: error: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{name}: {interrupted}', file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
