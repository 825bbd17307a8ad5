"""Which source a component's dataset is, by the name that timm gives it."""
import logging
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, Optional

import numpy as np
from timm.utils.misc import natural_key

from timm_amf.errors import UserError

from .decathlon import open_domain
from .libraries import open_hfds, open_iterable
from .sources import (
    ArraySource,
    FileSource,
    ReaderSource,
    Source,
    and_more,
    class_index,
    class_names,
    errors_of,
    first_line,
)
from .spec import SPLIT_NAMES, Component, DataSpec, split_of
from .table import is_table, open_table, read_table

__all__ = ['find_split', 'lacks_split', 'open_source', 'split_folders']

_logger = logging.getLogger(__name__)

# What timm's create_dataset knows as torch/..., and the three of the papers that it does not.
_TIMM_TORCH = (
    'cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist',
    'inaturalist', 'inat', 'places365', 'imagenet', 'image_folder', 'folder')
_OUR_TORCH = {'fgvc_aircraft': 'FGVCAircraft', 'stanford_cars': 'StanfordCars', 'dtd': 'DTD'}
_HOW_TO_GET = {
    'fgvc_aircraft': 'add --dataset-download, or unpack fgvc-aircraft-2013b.tar.gz there',
    'dtd': 'add --dataset-download, or unpack dtd-r1.0.1.tar.gz into dtd/ there',
    'stanford_cars': 'it is a folder stanford_cars with devkit, cars_train, cars_test and '
                     'cars_test_annos_withlabels.mat, which mirrors have, and its validation is cut out of train with '
                     'splits.val=train, per_class.val=N, skip.train=N',
}


def open_source(component: Component, split: str, spec: DataSpec) -> Source:
    """Open `train`, `val` or `test` of a component's dataset."""
    prefix, sep, name = component.dataset.partition('/')
    prefix = prefix.lower() if sep else ''
    own = component.split_name(split)
    with errors_of(f'data component {component.name!r}'):
        if prefix == 'demo':
            return _open_demo(name, own)
        if prefix == 'hfds':
            return open_hfds(component, own, spec)
        if prefix in ('tfds', 'wds', 'hfids'):
            return open_iterable(component, own, spec, spec.num_samples.get(split))
        if prefix not in ('decathlon', 'torch') and component.dataset not in ('', 'folder', 'image_folder'):
            raise UserError(
                f'unknown dataset {component.dataset!r}; leave it out for a folder, or begin it with torch/, '
                f'decathlon/, hfds/, hfids/, tfds/ or wds/')
        if not component.root:
            raise UserError('no folder; give --data-dir, or path= of the component')
        if prefix == 'decathlon':
            source = open_domain(component.root, name, own, component.dataset)
            if not source.labelled:
                raise UserError(
                    f'the challenge gives no labels of {component.dataset}, split test: evaluate on val, or predict '
                    f'for its server with timm-amf decathlon submit')
            return source
        if prefix == 'torch' and name.lower() not in ('folder', 'image_folder'):
            return _open_torch(os.path.expanduser(component.root), name.lower(), own, spec.download)
        if is_table(component.root):
            return open_table(component, own)
        return _open_folder(component, own)


def _open_demo(name: str, split: str) -> Source:
    from . import demo
    if name not in demo.LOADERS:
        raise UserError(f'unknown demo dataset {name!r}; there are {", ".join(f"demo/{n}" for n in demo.LOADERS)}')
    try:
        images, targets, classes = demo.LOADERS[name](split_of(split) or split)
    except ImportError as e:
        raise UserError(f'the demo needs {e.name}: pip install "timm_amf[demo]"') from e
    return ArraySource(classes, targets, images, f'demo/{name}/{split}')


# ---- folders and tar files


def split_folders(root: str) -> list[str]:
    """Names of the folders in it that are splits."""
    return [n for names in SPLIT_NAMES.values() for n in names if os.path.isdir(os.path.join(root, n))]


def find_split(root: str, split: str) -> Optional[str]:
    """The folder or tar file of a split: named so, or by one of timm's synonyms."""
    root, name = os.path.expanduser(root), split.split('[')[0]
    for candidate in (name, *SPLIT_NAMES.get(split_of(name), ())):
        path = os.path.normpath(os.path.join(root, candidate))
        if os.path.exists(path):
            return path
        if os.path.isfile(f'{path}.tar'):
            return f'{path}.tar'
    return None


def lacks_split(root: str, split: str) -> bool:
    """Whether a folder or a table of images does not say which of them are of a split."""
    root = os.path.expanduser(root)
    if is_table(root):
        return 'split' not in read_table(root)
    return os.path.isdir(root) and find_split(root, split) is None


def _split_folder(root: str, split: str) -> str:
    """Where the images of a split are.

    timm takes the whole folder where it finds none; then training and validation would be the same images, so only a
    folder that has no split of any name can be `train`, and another split of it is an error.
    """
    if not os.path.exists(root):
        here = '' if os.path.isabs(root) else f' in {os.getcwd()}'
        raise UserError(f'{root} does not exist{here}; give the folder that holds train/CLASS/image.jpg')
    role, present = split_of(split.split('[')[0]), split_folders(root)
    found = root if os.path.isfile(root) else find_split(root, split)
    if role == 'train' and not present:
        sets = [p for p in sorted(Path(root).glob('*/')) if len(split_folders(str(p))) > 1]
        if sets:
            raise UserError(
                f'{root} holds {len(sets)} data sets with splits of their own: give one, such as {sets[0]}, or mix '
                f'them, each as --component path=DIR')
        found = found or root
    if found is None:
        draw = f', or cut it out of the training images with --{role}-share 0.2' if role in ('val', 'test') else ''
        raise UserError(
            f'no folder for split {split!r} in {root} (there: {", ".join(present) or "no split folders"}); make one'
            f'{draw}')
    if found == root and os.path.isfile(root) and role != 'train':
        raise UserError(f'{root} is one file and has no split {split!r}; give each split in a folder')
    return found


def _open_folder(component: Component, split: str) -> Source:
    """Images labelled by the folder they lie in, in timm's order; what timm would drop, merge or invent is refused or
    told: classes without images, of one name, or inside one another, hidden folders, and suffixes that are not read.
    """
    root = os.path.expanduser(component.root)
    folder = _split_folder(root, split)
    if not os.path.isdir(folder):
        return _open_tar(component, folder, split)
    images = _class_folders(component, folder)
    names: dict[str, str] = {}
    for path in images:
        name = _composed_name(path)
        outer = next((outer for outer in map(str, Path(path).parents) if outer in images), None)
        if outer:
            raise UserError(f'{outer} holds images and, in {path}, a class of its own; move one of them')
        if name in names and not component.class_map:
            raise UserError(f'{names[name]} and {path} are two classes of one name; rename one of them')
        if not names and os.path.dirname(path) != folder:
            _logger.warning(
                f'data component {component.name!r}: classes have the name of the last folder: {path} is {name}.')
        names[name] = path
    index = class_index(names, component, folder)
    samples = sorted(
        (natural_key(image), image, index[_composed_name(path)]) for path, found in images.items() for image in found
        if _composed_name(path) in index)
    if not samples:
        remedy = f'check the names in {component.class_map}' if images else 'put each into the folder of its class'
        raise UserError(f'no images of any class in {folder}; {remedy}')
    return FileSource(class_names(index), [s[2] for s in samples], [s[1] for s in samples], root)


def _composed_name(path: str) -> str:
    return unicodedata.normalize('NFC', os.path.basename(path))


def _class_folders(component: Component, folder: str) -> dict[str, list[str]]:
    """The images of each folder that has any."""
    from timm.data.readers import get_img_extensions
    suffixes = set(component.input_key.lower().split(';')) if component.input_key else get_img_extensions(as_set=True)
    if not all(suffix.startswith('.') for suffix in suffixes):
        raise UserError(f'--input-key {component.input_key}: write suffixes as in ".jpg;.webp"')
    images: dict[str, list[str]] = {}
    empty, left_out = [], Counter()
    for path, folders, files in os.walk(folder, followlinks=True):
        shown = [name for name in folders if not name.startswith('.') and name not in ('__MACOSX', '__pycache__')]
        left_out['hidden folders'] += len(folders) - len(shown)
        folders[:] = sorted(shown)
        found = []
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith('.') or suffix not in suffixes:
                left_out['hidden files' if name.startswith('.') else f'{suffix or "suffixless"} files'] += 1
            else:
                found.append(os.path.join(path, name))
        if found and path == folder:
            raise UserError(f'{len(found)} images lie directly in {folder}; put each into the folder of its class')
        if found:
            images[path] = found
        elif not folders and path != folder:
            empty.append(path)
    if empty and not component.class_map:
        raise UserError(
            f'no images in class folder {and_more(sorted(empty))}; add images ({", ".join(sorted(suffixes))}; others '
            f'with --input-key) or remove the folder')
    parts = [f'{number} {what}' for what, number in left_out.most_common(6) if number]
    if parts:
        others = '; --input-key ".jpg;.webp" reads other suffixes' if any(w.startswith('.') for w in left_out) else ''
        _logger.warning(f'data component {component.name!r}: {folder}: left out: {", ".join(parts)}{others}.')
    return images


def _open_tar(component: Component, file: str, split: str) -> Source:
    from timm.data import create_dataset
    if not (os.path.isfile(file) and file.endswith('.tar')):
        raise UserError(f'{file} is neither a folder nor a .tar file')
    try:  # a tar file kept open would share its position among forked workers
        reader = create_dataset(
            '', root=file, split=split, search_split=False, class_map=component.class_map, cache_tarfiles=False).reader
    except (RuntimeError, AssertionError, ValueError, OSError) as e:
        raise UserError(f'{file}: {first_line(e)}') from e
    version = f'{os.path.abspath(file)} {os.stat(file).st_mtime_ns}'
    return ReaderSource(class_names(reader.class_name_to_idx), reader.targets, reader, file, version)


# ---- torchvision


def _open_torch(root: str, name: str, split: str, download: bool) -> Source:
    if name not in _OUR_TORCH and name not in _TIMM_TORCH:
        raise UserError(f'unknown dataset torch/{name}; there are {", ".join([*_TIMM_TORCH, *_OUR_TORCH])}')
    try:
        if not download and not os.path.isdir(root):
            raise OSError('no such folder')  # torchvision would make it
        if name in _OUR_TORCH:
            import torchvision.datasets
            make = getattr(torchvision.datasets, _OUR_TORCH[name])
            return _torch_source(make(root, split=split_of(split) or split, download=download), name)
        from timm.data import create_dataset
        return _torch_source(create_dataset(f'torch/{name}', root=root, split=split, download=download), name)
    except (RuntimeError, ValueError, OSError, AssertionError) as e:
        raise UserError(
            f'torch/{name}, split {split!r}, is not in {root} ({first_line(e)}); '
            f'{_HOW_TO_GET.get(name, "add --dataset-download")}') from e


def _torch_source(dataset: Any, name: str) -> Source:
    if hasattr(dataset, '_image_files'):  # FGVCAircraft, DTD
        return FileSource(dataset.classes, dataset._labels, dataset._image_files)
    for samples in ('samples', '_samples', 'imgs'):  # ImageNet, StanfordCars, Places365
        if hasattr(dataset, samples):
            paths, targets = zip(*getattr(dataset, samples), strict=True)
            return FileSource([c[0] if isinstance(c, tuple) else c for c in dataset.classes], targets, paths)
    if hasattr(dataset, 'all_categories'):  # INaturalist
        kind, = dataset.target_type
        full = kind == 'full'
        classes = dataset.all_categories if full else class_names(dataset.categories_index[kind])
        targets = [cat if full else dataset.categories_map[cat][kind] for cat, _ in dataset.index]
        paths = [os.path.join(dataset.root, dataset.all_categories[cat], file) for cat, file in dataset.index]
        return FileSource(classes, targets, paths)
    targets = np.asarray(dataset.targets)
    targets = targets[:, 0] if targets.ndim == 2 else targets  # QMNIST's targets have columns
    return ArraySource(dataset.classes, targets, dataset, f'torch/{name}')
