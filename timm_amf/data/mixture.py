"""A mixture: one dataset made of named components, in which every sample knows its component."""
import copy
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import torch.utils.data
from PIL import Image

from timm_amf.errors import UserError

from .datasets import open_source
from .shares import Drawn, draw_splits, groups_of, splits_in_file
from .sources import Source, read_image
from .spec import SPLIT_NAMES, Component, DataSpec

__all__ = ['Mixture', 'create_dataset', 'create_datasets']

_logger = logging.getLogger(__name__)


class Mixture(torch.utils.data.Dataset):
    """A map-style dataset of `(image, target, component)`.

    The order is fixed: components in their order, and in each the dataset's own order.

    Attributes:
        components: Names of the components.
        class_names: Name of each class; names that several components have are prefixed with the component's.
        class_to_component: Component of each class, -1 where components share a class.
        targets: Class of each sample, (N,) int64.
        component_of: Component of each sample, (N,) int64.
        transform: Called with the Pillow image of each sample, or None.
        drawn: The splits of each component that were drawn from its training images; empty where none were.
        hashes: Of each image those that `check_images` finds, (N, 2) uint64, or None.
        cache: Where images are read instead of from their files (`timm_amf.data.cache`), or None.
    """

    def __init__(
            self,
            components: Sequence[str],
            class_names: Sequence[str],
            class_to_component: Sequence[int],
            parts: Sequence[tuple[int, Source, np.ndarray, np.ndarray]],
            input_img_mode: Optional[str] = 'RGB',
            transform: Optional[Callable] = None,
    ):
        """
        Args:
            parts: For each part its component, its source, the chosen indices into it, and their targets.
        """
        self.components = list(components)
        self.class_names = list(class_names)
        self.class_to_component = list(class_to_component)
        self.input_img_mode = input_img_mode
        self.transform = transform
        self.cache: Any = None
        self.drawn: list[Drawn] = []
        self.hashes: Optional[np.ndarray] = None
        self._sources = [source for _, source, _, _ in parts]
        self._part = np.concatenate([np.full(len(p[2]), i, dtype=np.int32) for i, p in enumerate(parts)])
        self._local = np.concatenate([p[2] for p in parts]).astype(np.int64)
        self.component_of = np.concatenate([np.full(len(p[2]), p[0], dtype=np.int64) for p in parts])
        self.targets = np.concatenate([p[3] for p in parts]).astype(np.int64)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_memory(self) -> bool:
        return all(source.in_memory for source in self._sources)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        image = self.load(index)
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index]), int(self.component_of[index])

    def source(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and the sample's index in it."""
        return self._sources[self._part[index]], int(self._local[index])

    def load(self, index: int) -> Image.Image:
        """The image of a sample, before any transform.
        """
        return self.load_original(index) if self.cache is None else self.cache.load(index)

    def load_original(self, index: int) -> Image.Image:
        """As `load`, from the image itself though there be a cache."""
        return read_image(*self.source(index), self.input_img_mode)

    def filename(self, index: int) -> str:
        source, local = self.source(index)
        return source.filename(local)

    def signature(self, index: int) -> str:
        """Changes when the image of the sample changes."""
        source, local = self.source(index)
        return source.signature(local)

    def remove(self, indices: Sequence[int]) -> None:
        """Leave samples out; classes and their indices stay.
        """
        kept = np.setdiff1d(np.arange(len(self)), indices)
        self.__dict__.update(self.subset(kept).__dict__)

    def subset(self, indices: Sequence[int]) -> 'Mixture':
        """Some of the samples, in the given order, with all classes.
        """
        if self.cache is not None:
            raise RuntimeError('choose samples before the cache is built')
        chosen = copy.copy(self)
        indices = np.asarray(indices, dtype=np.int64)
        for name in ('_part', '_local', 'component_of', 'targets'):
            setattr(chosen, name, getattr(self, name)[indices])
        chosen.hashes = None if self.hashes is None else self.hashes[indices]
        return chosen

    def count_shared(self, other: 'Mixture') -> int:
        """Number of samples that another dataset has too, opened together with this one."""
        shared = 0
        for i, one in enumerate(self._sources):
            for j, two in enumerate(other._sources):
                if one is two:
                    shared += len(np.intersect1d(self._local[self._part == i], other._local[other._part == j]))
        return shared

    def class_counts(self) -> np.ndarray:
        """Number of samples of each class."""
        return np.bincount(self.targets, minlength=self.num_classes)


def create_datasets(
        spec: DataSpec,
        splits: Sequence[str] = ('train', 'val'),
        in_chans: int = 3,
        class_names: Optional[Sequence[str]] = None,
) -> tuple[Mixture, ...]:
    """Open splits of a mixture, all with the classes of `train`, or of a model.

    Args:
        spec: The mixture.
        splits: Of `train`, `val` and `test`; `train+val` is both, one after the other.
        in_chans: Channels of the model's input: 1 reads images as greyscale where the spec does not say otherwise.
        class_names: The classes of a model, in the order of its outputs. None: those of `train`.

    Raises:
        UserError: A dataset, split or class that is missing, empty or not as the spec has it.
    """
    opened: dict[tuple[int, str], Source] = {}
    datasets = tuple(_create(spec, split, in_chans, class_names, opened) for split in splits)
    for i, one in enumerate(datasets):
        for j in range(i):
            shared = one.count_shared(datasets[j])
            if shared:
                _logger.warning(f'data: {splits[j]} and {splits[i]} have {shared} images in common.')
    return datasets


def create_dataset(
        spec: DataSpec,
        split: str = 'train',
        in_chans: int = 3,
        class_names: Optional[Sequence[str]] = None,
) -> Mixture:
    """Open one split of a mixture; see `create_datasets`."""
    return _create(spec, split, in_chans, class_names, {})


def _create(
        spec: DataSpec,
        split: str,
        in_chans: int,
        class_names: Optional[Sequence[str]],
        opened: dict,
) -> Mixture:
    splits = split.split('+')
    all_classes = [_train_classes(spec, i, splits, opened) for i in range(len(spec.components))]
    classes = [names[:c.classes] for names, c in zip(all_classes, spec.components, strict=True)]
    own_names, class_to_component, offsets = _label_space(spec.components, classes)
    labels = np.arange(len(own_names))
    if class_names is not None:
        labels = _labels_by_name(own_names, class_names, spec.components, classes, offsets)
        own_names = list(class_names)
        owners = dict(zip(labels.tolist(), class_to_component, strict=True))
        class_to_component = [owners.get(label, -1) for label in range(len(own_names))]
    parts = []
    for name in splits:
        for i, component in enumerate(spec.components):
            origin = 'train' if name in spec.shares else name
            source = _open(spec, i, origin, opened)
            targets = _align(source, all_classes[i], component, origin)
            if spec.shares and origin == 'train':
                if (i, None) not in opened:
                    opened[i, None] = _draw(spec, i, source, targets, classes[i])
                chosen = opened[i, None].chosen[opened[i, None].splits == name]
            else:
                chosen = _select(targets, len(classes[i]), component, name)
                _check_classes(targets[chosen], targets, classes[i], component, name)
            parts.append((i, source, chosen, labels[targets[chosen] + offsets[i]]))
    mode = spec.input_img_mode or {1: 'L', 4: 'RGBA'}.get(in_chans, 'RGB')
    mixture = Mixture([c.name for c in spec.components], own_names, class_to_component, parts, input_img_mode=mode)
    mixture.drawn = [opened[i, None] for i in range(len(spec.components)) if (i, None) in opened]
    return mixture


def _draw(spec: DataSpec, i: int, source: Source, targets: np.ndarray, classes: list[str]) -> Drawn:
    """The splits of the training images of a component: as a run's file has them, or by the shares."""
    component = spec.components[i]
    if spec.split_file:
        chosen = np.flatnonzero((targets >= 0) & (targets < len(classes)))
        splits = splits_in_file(spec.split_file, component.name, source, chosen)
        chosen, splits = chosen[splits != ''], splits[splits != '']
    else:
        chosen = _select(targets, len(classes), component, 'train')
        _check_classes(targets[chosen], targets, classes, component, 'train')
        groups = groups_of(source, chosen, spec.group, f'data component {component.name!r}') if spec.group else ()
        splits = draw_splits(source, targets, chosen, spec.shares, groups)
        _check_drawn(spec, component, targets[chosen], splits, classes)
    return Drawn(component.name, source, chosen, splits, [classes[target] for target in targets[chosen]])


def _check_drawn(
        spec: DataSpec,
        component: Component,
        targets: np.ndarray,
        splits: np.ndarray,
        classes: list[str],
) -> None:
    """Refuse splits without images, and tell of classes without any and of folders that are left out."""
    where = f'data component {component.name!r}'
    for split in spec.shares:
        there = np.unique(targets[splits == split])
        if not len(there):
            groups = f' and --group {spec.group!r} makes one of each; make smaller groups' if spec.group else ''
            raise UserError(f'{where}: no image is left for {split}: training keeps one of each class{groups}')
        if len(there) < len(classes):
            lacking = np.setdiff1d(np.arange(len(classes)), there)
            _logger.warning(
                f'{where}: {split} has no images of {len(lacking)} classes, such as {classes[lacking[0]]}, whose only '
                f'image or group trains.')
        own = [name for name in SPLIT_NAMES[split] if os.path.isdir(os.path.join(component.root or '', name))]
        if own and not component.dataset:
            _logger.warning(
                f'{where}: {os.path.join(component.root, own[0])} is left out: --{split}-share draws {split} from the '
                f'training images.')


def _open(spec: DataSpec, i: int, split: str, opened: dict) -> Source:
    if split not in ('train', 'val', 'test'):
        raise UserError(f'data: unknown split {split!r}; there are train, val and test')
    component = spec.components[i]
    key = (i, component.split_name(split))
    if key not in opened:
        opened[key] = open_source(component, split, spec)
    return opened[key]


def _train_classes(spec: DataSpec, i: int, splits: Sequence[str], opened: dict) -> list[str]:
    """The classes of a component: those of its training split, so that the indices of all splits agree."""
    component = spec.components[i]
    try:
        classes = _open(spec, i, 'train', opened).classes
    except UserError as e:
        if 'train' in splits:
            raise
        source = _open(spec, i, splits[0], opened)
        _logger.warning(f'{e}. The classes are taken from split {splits[0]!r}: {len(source.classes)}.')
        classes = source.classes
    if component.classes is not None and component.classes > len(classes):
        raise UserError(
            f'data component {component.name!r}: classes={component.classes}, but there are only {len(classes)}')
    return classes


def _label_space(
        components: Sequence[Component],
        classes: Sequence[list[str]],
) -> tuple[list[str], list[int], list[int]]:
    """(names of all classes, component of each class or -1 where shared, offset of each component)."""
    offsets, end = [], 0
    for component, names in zip(components, classes, strict=True):
        offsets.append(end if component.class_offset is None else component.class_offset)
        end = max(end, offsets[-1] + len(names))
    owners: list[list[int]] = [[] for _ in range(end)]
    for i, names in enumerate(classes):
        for index in range(offsets[i], offsets[i] + len(names)):
            if owners[index] and offsets[owners[index][0]] != offsets[i]:
                other = components[owners[index][0]]
                raise UserError(
                    f'data: the classes of {components[i].name!r} (offset {offsets[i]}) overlap those of '
                    f'{other.name!r} (offset {offsets[owners[index][0]]}); give the same class_offset to share '
                    f'labels, or none')
            owners[index].append(i)
    if [] in owners:
        raise UserError(f'data: no component has class {owners.index([])}; leave class_offset out to close the gap')
    plain = [classes[o[0]][index - offsets[o[0]]] for index, o in enumerate(owners)]
    class_names = [
        f'{components[o[0]].name}/{name}' if plain.count(name) > 1 else name
        for name, o in zip(plain, owners, strict=True)]
    return class_names, [o[0] if len(o) == 1 else -1 for o in owners], offsets


def _labels_by_name(
        own_names: Sequence[str],
        class_names: Sequence[str],
        components: Sequence[Component],
        classes: Sequence[list[str]],
        offsets: Sequence[int],
) -> np.ndarray:
    """The output of a model for each class of the data, by its name, with or without that of its component before it.

    Raises:
        UserError: The model has no such class.
    """
    index = {name: i for i, name in enumerate(class_names)}
    labels = [index.get(name, -1) for name in own_names]
    for component, names, offset in zip(components, classes, offsets, strict=True):
        for i, name in enumerate(names, start=offset):
            labels[i] = index.get(f'{component.name}/{name}', index.get(name, -1)) if labels[i] < 0 else labels[i]
    unknown = [name for name, label in zip(own_names, labels, strict=True) if label < 0]
    if unknown:
        more = f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''
        known = ', '.join(class_names[:5]) + (', ...' if len(class_names) > 5 else '')
        raise UserError(
            f'data: class {unknown[0]!r}{more} is not among the {len(class_names)} classes of the model ({known}); '
            f'rename its folder or leave it out')
    absent = sorted(set(class_names) - {class_names[label] for label in labels})
    if absent:
        _logger.warning(
            f'data: {len(absent)} of the {len(class_names)} classes of the model are not there '
            f'({", ".join(absent[:5])}{", ..." if len(absent) > 5 else ""}).')
    return np.array(labels)


def _align(source: Source, classes: list[str], component: Component, split: str) -> np.ndarray:
    """Targets of a split by the indices that its classes have in `train`.

    A reader numbers the classes that it finds, so a class that a split lacks would shift all after it.
    """
    if source.classes == classes:
        return source.targets
    unknown = [name for name in source.classes if name not in set(classes)]
    if unknown:
        more = f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''
        raise UserError(
            f'data component {component.name!r}: split {split!r} has class {unknown[0]!r}{more} that train lacks; '
            f'add it to train or remove it')
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in source.classes], dtype=np.int64)[source.targets]


def _select(targets: np.ndarray, num_classes: int, component: Component, split: str) -> np.ndarray:
    """Indices, in order, of the chosen images of each class: those after `skip`, up to `per_class`."""
    skip, number = component.limit(split)
    order = np.argsort(targets, kind='stable')
    starts = np.searchsorted(targets[order], targets[order])  # where the class of each begins
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - starts
    keep = (targets >= 0) & (targets < num_classes) & (rank >= skip)
    if number is not None:
        keep &= rank < skip + number
    return np.flatnonzero(keep)


def _check_classes(
        chosen: np.ndarray,
        available: np.ndarray,
        classes: list[str],
        component: Component,
        split: str,
) -> None:
    counts = np.bincount(chosen, minlength=len(classes))
    present = np.bincount(available, minlength=len(classes))[:len(classes)]
    where = f'data component {component.name!r}, split {split!r}'
    skip, number = component.limit(split)
    empty = np.flatnonzero((counts == 0) & ((present > 0) | (split == 'train')))
    if len(empty):
        reason = f' after skip={skip} of its {present[empty[0]]}' if present[empty[0]] else ''
        more = f' and {len(empty) - 1} more classes' if len(empty) > 1 else ''
        raise UserError(f'{where}: no images of class {classes[empty[0]]!r}{more}{reason}; add images or leave it out')
    if (counts == 0).any():
        absent = [classes[i] for i in np.flatnonzero(counts == 0)]
        _logger.warning(f'{where}: no images of {len(absent)} of {len(classes)} classes ({", ".join(absent[:5])}).')
    if number is not None and (counts < number).any():
        few = np.flatnonzero(counts < number)
        _logger.warning(f'{where}: {len(few)} classes have fewer than per_class={number} images (the fewest: '
                        f'{counts[few].min()}, {classes[few[counts[few].argmin()]]!r}).')
