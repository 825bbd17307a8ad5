"""Splits drawn from the training images: by shares, whole groups at a time, and kept in a run's `split.csv`."""
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np

from timm_amf.errors import UserError
from timm_amf.files import write_text
from timm_amf.text import csv_text

from .sources import Source
from .table import read_table

__all__ = ['Drawn', 'OtherImages', 'draw_splits', 'groups_of', 'splits_in_file', 'write_splits']

_logger = logging.getLogger(__name__)


class OtherImages(UserError):
    """A file of splits lists none of the images that are there."""


class Drawn(NamedTuple):
    """The images of a component from which splits were drawn: indices into its source, and the split of each."""
    component: str
    source: Source
    chosen: np.ndarray
    splits: np.ndarray
    labels: list[str]


def draw_splits(
        source: Source,
        targets: np.ndarray,
        chosen: np.ndarray,
        shares: Mapping[str, float],
        groups: Sequence[str] = (),
) -> np.ndarray:
    """The split of each chosen image: `train`, or one of those that have a share of each class.

    Groups are taken in the order of a hash of their names, each if it brings the counts of its classes nearer to their
    shares; every class keeps a training image. An image without a group goes by the last two parts of its path, so that
    moved or copied folders are split alike, and one image more moves at most one other.

    Args:
        source: Where the images are.
        targets: Classes of all its images.
        chosen: Indices of the images to split.
        shares: Share of each split, such as `{'val': 0.2}`.
        groups: Group of each chosen image, '' for one of its own; may be empty.
    """
    labels = targets[chosen].tolist()
    members: dict[tuple, list[int]] = {}
    for i, index in enumerate(chosen.tolist()):
        own = '/'.join(source.filename(index).replace(os.sep, '/').split('/')[-2:]), i
        members.setdefault((groups[i],) if groups and groups[i] else own, []).append(i)
    order = sorted(members, key=lambda key: hashlib.sha256(key[0].encode('utf-8', 'surrogateescape')).hexdigest())
    counts = {key: Counter(labels[i] for i in members[key]) for key in order}
    total, left = Counter(labels), Counter(labels)
    splits = np.full(len(labels), 'train', dtype=object)

    def free(key: tuple) -> bool:
        return splits[members[key][0]] == 'train' and all(left[label] > n for label, n in counts[key].items())

    def take(key: tuple, split: str) -> None:
        splits[members[key]] = split
        left.subtract(counts[key])
        need.subtract(counts[key])

    for split, share in shares.items():
        wanted = {label: min(max(1, round(share * n)), left[label] - 1) for label, n in total.items()}
        need = Counter(wanted)
        for key in order:
            if sum(abs(need[label] - n) - abs(need[label]) for label, n in counts[key].items()) < 0 and free(key):
                take(key, split)
        for label in sorted(wanted):  # of a class whose groups are all larger than twice its share, the smallest
            if need[label] == wanted[label] > 0:
                fitting = [key for key in order if label in counts[key] and free(key)]
                if fitting:
                    take(min(fitting, key=lambda key: len(members[key])), split)
    return splits


def groups_of(source: Source, chosen: np.ndarray, group: str, where: str) -> list[str]:
    """Group of each chosen image: its text in a column of the table, or what a regular expression with one group finds
    in its path.
    """
    columns = getattr(source, 'columns', {})
    if group.strip().lower() in columns:
        found = [columns[group.strip().lower()][index] for index in chosen.tolist()]
    else:
        try:
            pattern = re.compile(group)
        except re.error as e:
            raise UserError(f'--group {group!r} is no regular expression ({e})') from None
        if pattern.groups != 1:
            raise UserError(
                f'--group {group!r} is no column of a table (there: {", ".join(columns) or "none"}), and no regular '
                f"expression with one group, such as '(clip\\d+)_'")
        matches = [pattern.search(source.relative_name(index)) for index in chosen.tolist()]
        found = [match[1] or '' if match else '' for match in matches]
    alone = [index for index, name in zip(chosen.tolist(), found) if not name]
    if alone:
        _logger.warning(
            f'{where}: {len(alone)} of {len(found)} images have no --group {group!r}, such as '
            f'{source.relative_name(alone[0])}; each is a group of its own.')
    return found


def write_splits(path: Union[str, Path], drawn: Sequence[Drawn]) -> None:
    """Write the splits as a table `split,path,label`, of several components also `component`."""
    several = len(drawn) > 1
    rows = [['split', 'path', 'label'] + ['component'] * several]
    for split in ('train', 'val', 'test'):
        for part in drawn:
            for i in np.flatnonzero(part.splits == split):
                name = part.source.relative_name(int(part.chosen[i]))
                rows.append([split, name, part.labels[i]] + [part.component] * several)
    write_text(path, csv_text(rows), 'choose another --output')


def splits_in_file(path: str, component: str, source: Source, chosen: np.ndarray) -> np.ndarray:
    """The split that a file of `write_splits` has each chosen image in, '' where it has not.

    Raises:
        OtherImages: If none of its images is there.
    """
    columns = read_table(path)
    if not {'split', 'path', 'label'} <= set(columns):
        raise UserError(f'{path}: is damaged (no columns split, path, label); remove it to draw the splits anew')
    owners = columns.get('component') or [component] * len(columns['path'])
    rows = zip(columns['path'], columns['split'], owners)
    listed = {name: split for name, split, owner in rows if owner == component}
    names = [source.relative_name(index).strip() for index in chosen.tolist()]
    missing, whose = set(listed) - set(names), f'of its {len(listed)} images of component {component!r}'
    if len(missing) == len(listed):
        raise OtherImages(
            f'{path}: none {whose} is there; give the folder that the run was trained on, or a copy of it')
    if missing:
        _logger.warning(f'{path}: {len(missing)} {whose} are gone, such as {min(missing)}.')
    return np.array([listed.get(name, '') for name in names], dtype=object)
