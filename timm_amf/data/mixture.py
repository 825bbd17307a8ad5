"""A mixture: one dataset made of named components, in which every sample knows its component."""
import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch.utils.data
from PIL import Image

from timm_amf.errors import UserError

from .datasets import find_split, open_source
from .shares import Drawn, draw_splits, groups_of, splits_in_file
from .sources import Source, and_more, errors_of, read_image
from .spec import SPLIT_NAMES, Component, DataSpec

__all__ = ['Mixture', 'create_dataset', 'create_datasets']

_logger = logging.getLogger(__name__)


class Mixture(torch.utils.data.Dataset):
    """A map-style dataset of `(image, target, component)`.

    The order is fixed: components in their order, and in each the dataset's own order.

    Attributes:
        components: Names of the components.
        class_names: Name of each class; names that several components have are prefixed with the component's.
        targets: Class of each sample, (N,) int64.
        component_of: Component of each sample, (N,) int64.
        drawn: The splits of each component that were drawn from its training images; empty where none were.
        copies: What to warn of where images of other splits are in it too (`check.find_copies`).
        hashes: Of each image those that `check_images` finds, (N, 2) uint64, or None.
        cache: Where images are read instead of from their files (`timm_amf.data.cache`), or None.
    """

    def __init__(
            self,
            components: Sequence[str],
            class_names: Sequence[str],
            parts: Sequence[tuple[int, Source, np.ndarray, np.ndarray]],
            input_img_mode: Optional[str] = 'RGB',
    ):
        """
        Args:
            parts: For each part its component, its source, the chosen indices into it, and their targets.
        """
        self.components = list(components)
        self.class_names = list(class_names)
        self.input_img_mode = input_img_mode
        self.cache: Any = None
        self.drawn: list[Drawn] = []
        self.copies = ''
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
        return self.load(index), int(self.targets[index]), int(self.component_of[index])

    def source(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and the sample's index in it."""
        return self._sources[self._part[index]], int(self._local[index])

    def load(self, index: int) -> Image.Image:
        """The image of a sample, before any transform."""
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
        """Leave samples out; classes and their indices stay."""
        kept = np.setdiff1d(np.arange(len(self)), indices)
        self.__dict__.update(self.subset(kept).__dict__)

    def subset(self, indices: Sequence[int]) -> 'Mixture':
        """Some of the samples, in the given order, with all classes."""
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
    """
    parts = _Parts(spec)
    datasets = tuple(_create(parts, split.split('+'), in_chans, class_names) for split in splits)
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
    return create_datasets(spec, (split,), in_chans, class_names)[0]


def _create(
        parts: '_Parts',
        splits: Sequence[str],
        in_chans: int,
        class_names: Optional[Sequence[str]],
) -> Mixture:
    spec = parts.spec
    all_classes = [parts.classes(component, splits) for component in spec.components]
    classes = [names[:c.classes] for names, c in zip(all_classes, spec.components, strict=True)]
    names, owners, offsets = _label_space(spec.components, classes)
    labels = np.arange(len(names))
    if class_names is not None:
        own = [spec.components[i].name if i >= 0 else '' for i in owners]
        labels, names = _labels_by_name(names, own, class_names), list(class_names)
    chosen = []
    for split in splits:
        for i, component in enumerate(spec.components):
            source, indices, targets = parts.choose(component, split, all_classes[i], classes[i])
            chosen.append((i, source, indices, labels[targets + offsets[i]]))
    mode = spec.input_img_mode or {1: 'L', 4: 'RGBA'}.get(in_chans, 'RGB')
    mixture = Mixture([c.name for c in spec.components], names, chosen, input_img_mode=mode)
    mixture.drawn = list(parts.drawn.values())
    return mixture


# ---- the classes of all components


def _label_space(
        components: Sequence[Component],
        classes: Sequence[list[str]],
) -> tuple[list[str], list[int], list[int]]:
    """(names of all classes, component of each class or -1 where shared, offset of each component)."""
    offsets, end = [], 0
    for component, names in zip(components, classes, strict=True):
        offsets.append(end if component.class_offset is None else component.class_offset)
        end = max(end, offsets[-1] + len(names))
    plain, owners = [], []
    for index in range(end):
        own = [i for i, names in enumerate(classes) if offsets[i] <= index < offsets[i] + len(names)]
        if not own:
            raise UserError(f'data: no component has class {index}; leave class_offset out to close the gap')
        one, two = own[0], max(own, key=lambda i: offsets[i] != offsets[own[0]])
        if offsets[one] != offsets[two]:
            raise UserError(
                f'data: the classes of {components[two].name!r} (offset {offsets[two]}) overlap those of '
                f'{components[one].name!r} (offset {offsets[one]}); give the same class_offset to share labels, or '
                f'none')
        plain.append(classes[one][index - offsets[one]])
        owners.append(own)
    count = Counter(plain)
    names = [
        f'{components[own[0]].name}/{name}' if count[name] > 1 else name
        for name, own in zip(plain, owners, strict=True)]
    return names, [own[0] if len(own) == 1 else -1 for own in owners], offsets


def _labels_by_name(names: Sequence[str], components: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """The output of a model, whose outputs have names, for each class of the data: by its name, with or without that of
    its component before it ('' where several share it).
    """
    index = {name: i for i, name in enumerate(class_names)}
    labels, unknown = [], []
    for name, component in zip(names, components, strict=True):
        known = [c for c in (name, f'{component}/{name}', name.removeprefix(f'{component}/')) if c in index]
        labels += [index[known[0]]] if known else []
        unknown += [] if known else [name]
    if unknown:
        raise UserError(
            f'data: class {and_more(unknown)} is not among the {len(class_names)} classes of the model '
            f'({_first_five(class_names)}); rename its folder or leave it out')
    absent = sorted(set(class_names) - {class_names[label] for label in labels})
    if absent:
        _logger.warning(
            f'data: {len(absent)} of the {len(class_names)} classes of the model are not there '
            f'({_first_five(absent)}).')
    return np.array(labels)


def _first_five(names: Sequence[str]) -> str:
    return ', '.join([*names[:5], *(['...'] if len(names) > 5 else [])])


# ---- the images of one component


class _Parts:
    """The splits of the components, each opened once, and drawn once where the spec has shares."""

    def __init__(self, spec: DataSpec):
        self.spec = spec
        self.drawn: dict[str, Drawn] = {}
        self._opened: dict[tuple[str, str], Source] = {}

    def open(self, component: Component, split: str) -> Source:
        if split not in SPLIT_NAMES:
            raise UserError(f'data: unknown split {split!r}; there are train, val and test')
        key = component.name, component.split_name(split)
        if key not in self._opened:
            self._opened[key] = open_source(component, split, self.spec)
        return self._opened[key]

    def classes(self, component: Component, splits: Sequence[str]) -> list[str]:
        """The classes of a component: those of its training split, so that the indices of all splits agree."""
        try:
            classes = self.open(component, 'train').classes
        except UserError as e:
            if {'train', *self.spec.shares} & set(splits):  # shares are of the training images
                raise
            classes = self.open(component, splits[0]).classes
            _logger.warning(f'{e}. The classes are taken from split {splits[0]!r}: {len(classes)}.')
        if component.classes is not None and component.classes > len(classes):
            raise UserError(
                f'data component {component.name!r}: classes={component.classes}, but there are only {len(classes)}')
        return classes

    def choose(
            self,
            component: Component,
            split: str,
            all_classes: list[str],
            classes: list[str],
    ) -> tuple[Source, np.ndarray, np.ndarray]:
        """The source of a split, and indices and targets of the images in it that the mixture takes."""
        origin = 'train' if split in self.spec.shares else split
        source = self.open(component, origin)
        targets = _align(source, all_classes, component, origin)
        if not (self.spec.shares and origin == 'train'):
            indices = _select(targets, classes, component, split)
        else:
            if component.name not in self.drawn:
                self.drawn[component.name] = self._draw(component, source, targets, classes)
            drawn = self.drawn[component.name]
            indices = drawn.chosen[drawn.splits == split]
        return source, indices, targets[indices]

    def _draw(self, component: Component, source: Source, targets: np.ndarray, classes: list[str]) -> Drawn:
        """The splits of the training images: as a run's file has them, or by the shares."""
        spec, where = self.spec, f'data component {component.name!r}'
        if spec.split_file:
            chosen = np.flatnonzero((targets >= 0) & (targets < len(classes)))
            splits = splits_in_file(spec.split_file, component.name, source, chosen)
            chosen, splits = chosen[splits != ''], splits[splits != '']
        else:
            chosen = _select(targets, classes, component, 'train')
            with errors_of(where):
                groups = groups_of(source, chosen, spec.group, where) if spec.group else ()
                splits = draw_splits(source, targets, chosen, spec.shares, groups)
                for split in spec.shares:
                    lacking = np.setdiff1d(np.arange(len(classes)), targets[chosen[splits == split]])
                    _check_drawn(component, split, [classes[i] for i in lacking], len(classes), spec.group)
        return Drawn(component.name, source, chosen, splits, [classes[target] for target in targets[chosen]])


def _align(source: Source, classes: list[str], component: Component, split: str) -> np.ndarray:
    """Targets of a split by the indices that its classes have in `train`.

    A reader numbers the classes that it finds, so a class that a split lacks would shift all after it.
    """
    if source.classes == classes:
        return source.targets
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in index]
    if unknown:
        raise UserError(
            f'data component {component.name!r}: split {split!r} has class {and_more(unknown)} that train lacks; add '
            f'it to train or remove it')
    return np.array([index[name] for name in source.classes], dtype=np.int64)[source.targets]


def _select(targets: np.ndarray, classes: list[str], component: Component, split: str) -> np.ndarray:
    """Indices, in order, of the chosen images of each class: those after `skip`, up to `per_class`."""
    skip, number = component.limit(split)
    order = np.argsort(targets, kind='stable')
    starts = np.searchsorted(targets[order], targets[order])  # where the class of each begins
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - starts
    known = (targets >= 0) & (targets < len(classes))
    keep = known & (rank >= skip) & (rank < (np.inf if number is None else skip + number))

    where = f'data component {component.name!r}, split {split!r}'
    counts, present = (np.bincount(targets[mask], minlength=len(classes)) for mask in (keep, known))
    empty = np.flatnonzero((counts == 0) & ((present > 0) | (split == 'train')))
    if len(empty):
        reason = f' after skip={skip} of its {present[empty[0]]}' if present[empty[0]] else ''
        raise UserError(
            f'{where}: no images of class {and_more([classes[i] for i in empty])}{reason}; add images or leave it out')
    absent, few = (np.flatnonzero(counts < least) for least in (1, number or 0))
    if len(absent):
        _logger.warning(
            f'{where}: no images of {len(absent)} of {len(classes)} classes '
            f'({_first_five([classes[i] for i in absent])}).')
    if len(few):
        fewest = few[counts[few].argmin()]
        _logger.warning(f'{where}: {len(few)} classes have fewer than per_class={number} images (the fewest: '
                        f'{counts[fewest]}, {classes[fewest]!r}).')
    return np.flatnonzero(keep)


def _check_drawn(component: Component, split: str, lacking: list[str], number: int, group: Optional[str]) -> None:
    """Refuse a split without images, and tell of classes without any and of a folder that is left out."""
    if len(lacking) == number:
        groups = f' and --group {group!r} makes one of each; make smaller groups' if group else ''
        raise UserError(f'no image is left for {split}: training keeps one of each class{groups}')
    where = f'data component {component.name!r}'
    if lacking:
        _logger.warning(
            f'{where}: {split} has no images of {len(lacking)} classes, such as {lacking[0]}, whose only image or '
            f'group trains.')
    own = None if component.dataset else find_split(component.root or '', split)
    if own:
        _logger.warning(f'{where}: {own} is left out: --{split}-share draws {split} from the training images.')
