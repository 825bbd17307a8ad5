"""The CSV files of a run, `summary.csv` and `policy.csv`."""
from pathlib import Path
from typing import Any, Union

from timm_amf.files import write_text
from timm_amf.text import csv_of, read_rows

__all__ = ['CsvLog']


class CsvLog:
    """A CSV file of one row an epoch, written whole or not at all.

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
