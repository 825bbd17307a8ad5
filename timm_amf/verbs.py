"""Names of `errors` that modules still import from here."""
from timm_amf.errors import CommandParser as VerbParser
from timm_amf.errors import run_command as run_verb

__all__ = ['VerbParser', 'run_verb']
