"""Tables for a terminal and as CSV."""
import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from timm_amf.files import write_text

__all__ = ['CsvLog', 'columns', 'csv_of', 'csv_text', 'differences', 'read_rows']


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


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings of now that were known before and were others, in words."""
    return [f'{name} {before[name]} before, {value} now' for name, value in now.items()
            if before.get(name, value) != value]


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows, the heading first, as CSV; None is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    return text.getvalue()


def csv_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows by column as CSV; each may have some of the columns."""
    rows = list(rows)
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    return csv_text([names, *([row.get(name) for name in names] for row in rows)])


def read_rows(path: Union[str, Path]) -> list[dict[str, str]]:
    """The rows of a CSV file by column."""
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


class CsvLog:
    """A CSV file of a run, of one row an epoch, written whole or not at all.

    Args:
        path: The file.
        start_epoch: Rows of this epoch and later ones are dropped: the resumed run writes them again.
    """

    def __init__(self, path: Union[str, Path], start_epoch: int = 0):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        if start_epoch and self.path.exists():
            self.rows = [row for row in read_rows(self.path) if int(row['epoch']) < start_epoch]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; a row of the same epoch is replaced."""
        self.rows = [r for r in self.rows if int(r['epoch']) != row['epoch']] + [row]
        write_text(self.path, csv_of(self.rows))
