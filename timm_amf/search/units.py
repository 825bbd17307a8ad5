"""Where in a network candidates of a search may differ."""
from collections.abc import Iterable

from timm_amf.models.blocks import Units as Probe
from timm_amf.models.blocks import probe_units

__all__ = ['Probe', 'pairs_below', 'probe_units']


def pairs_below(pairs: Iterable[tuple[str, str]], path: str) -> list[tuple[str, str]]:
    """The pairs within a module, by their names in it."""
    prefix = f'{path}.'
    return [(c[len(prefix):], n[len(prefix):]) for c, n in pairs if c.startswith(prefix) and n.startswith(prefix)]
