"""A table of images and their classes, in the place of folders: a CSV or Parquet file."""
import csv
import os
import unicodedata
from collections import Counter
from typing import Optional

from timm_amf.errors import UserError

from .sources import FileSource, class_index, class_names, errors_of, first_line
from .spec import Component, split_of

__all__ = ['is_table', 'open_table', 'read_table']

# The first of these names that the table has is the column.
_PATH_COLUMNS = ('path', 'file', 'filename', 'image')
_LABEL_COLUMNS = ('label', 'class')


def is_table(path: Optional[str]) -> bool:
    return (path or '').lower().endswith(('.csv', '.parquet'))


def open_table(component: Component, split: str) -> FileSource:
    """Open the rows of one split of a component whose root is a table."""
    path = os.path.expanduser(component.root)
    columns, folder = read_table(path), os.path.dirname(path)
    with errors_of(path):
        files, labels = _column(columns, _PATH_COLUMNS), _column(columns, _LABEL_COLUMNS)
        files = [os.path.normpath(os.path.join(folder, os.path.expanduser(file))) if file else '' for file in files]
        labels = [unicodedata.normalize('NFC', label) for label in labels]
        for values, what in ((files, 'path'), (labels, 'label')):
            if not all(values):
                raise UserError(
                    f'{values.count("")} rows without a {what}, the first is row {values.index("") + 1}; fill it in '
                    f'or remove the row')
        for name, number in Counter(files).most_common(1):
            if number > 1:
                raise UserError(f'{number} rows name {name}; keep one of them')
        rows = _rows_of_split(columns.get('split'), len(files), split)
        missing = [files[row] for row in rows if not os.path.lexists(files[row])]
        if missing:
            raise UserError(
                f'{len(missing)} of {len(rows)} images are not there, the first is {missing[0]}; paths are relative '
                f'to the folder of the table')
        index = class_index({labels[row] for row in rows}, component, folder)
        rows = [row for row in rows if labels[row] in index]
        if not rows:
            raise UserError(f'no images of any class; check the names in {component.class_map}')
    return FileSource(
        class_names(index), [index[labels[row]] for row in rows], [files[row] for row in rows], folder or os.curdir,
        {name: [values[row] for row in rows] for name, values in columns.items()})


def read_table(path: str, where: str = '') -> dict[str, list[str]]:
    """The columns of a table as text, stripped, by their names in lower case.

    Args:
        path: The file.
        where: What messages call it; '' is its path.
    """
    with errors_of(where or path):
        try:
            columns = _read_csv(path) if path.lower().endswith('.csv') else _read_parquet(path)
        except UnicodeDecodeError as e:
            raise UserError(f'is not UTF-8 (byte {e.start}); save it as UTF-8') from e
        except (OSError, ValueError, csv.Error) as e:
            raise UserError(f'cannot be read ({getattr(e, "strerror", None) or first_line(e)})') from e
    return {
        str(name).strip().lower(): ['' if value is None or value != value else str(value).strip() for value in values]
        for name, values in columns.items()}


def _read_csv(path: str) -> dict[str, list]:
    with open(path, newline='', encoding='utf-8-sig') as file:
        header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(
                f'row {number} has {len(row)} fields and the header {len(header)}; quote fields that have commas')
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _read_parquet(path: str) -> dict[str, list]:
    from pyarrow import parquet
    return parquet.ParquetFile(path).read().to_pydict()


def _column(columns: dict[str, list[str]], names: tuple[str, ...]) -> list[str]:
    for name in names:
        if name in columns:
            return columns[name]
    raise UserError(
        f'no column {" or ".join(names)} (there: {", ".join(columns) or "none"}); name it in the first line, with '
        f'commas between the columns')


def _rows_of_split(splits: Optional[list[str]], number: int, split: str) -> list[int]:
    role = split_of(split)
    if splits is None and role != 'train':
        raise UserError(
            f'has no column split, so all is train; add one, or draw {split!r} with --val-share 0.2 or --test-share '
            f'0.2')
    roles = ['train'] * number if splits is None else [split_of(name.lower()) for name in splits]
    if None in roles:
        row = roles.index(None)
        raise UserError(f'row {row + 1}: unknown split {splits[row]!r}; there are train, val and test')
    rows = [row for row, other in enumerate(roles) if other == role]
    if not rows:
        there = ', '.join(f'{count} {name}' for name, count in Counter(splits or ()).items()) or 'no rows'
        draw = '' if role == 'train' else f', or draw it with --{role}-share 0.2'
        raise UserError(f'no rows of split {split!r} (there: {there}); add some{draw}')
    return rows
