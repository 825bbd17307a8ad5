"""Tables for a terminal."""
from collections.abc import Sequence

__all__ = ['columns']


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as lines, their columns as wide as the widest cell.

    Args:
        rows: The rows, the heading first; all of the same length.
        right: Numbers of the columns that are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
        lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines)
