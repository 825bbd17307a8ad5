"""The one exception for mistakes that a user can mend."""

__all__ = ['UserError']


class UserError(Exception):
    """A mistake of the user's: one line that names the thing and the remedy.

    Every entry point (`train_amf.py`, `timm-amf`) prints the message without a traceback and exits with code 2.
    """
