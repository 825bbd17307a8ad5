"""Which source a component's dataset is, by the name that timm gives it."""
import logging
import os
import unicodedata
from collections import Counter
from typing import Any

import numpy as np
from timm.utils.misc import natural_key

from timm_amf.errors import UserError

from .decathlon import open_labelled
from .iterable import open_iterable
from .sources import ArraySource, FileSource, ReaderSource, Source, class_index, class_names, first_line
from .spec import SPLIT_NAMES, Component, DataSpec, split_of
from .table import is_table, open_table

__all__ = ['open_source', 'split_folders']

_logger = logging.getLogger(__name__)

# What timm's create_dataset knows as torch/..., and the three of the paper that it does not.
_TIMM_TORCH = (
    'cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist',
    'inaturalist', 'inat', 'places365', 'imagenet', 'image_folder', 'folder')
_OUR_TORCH = {'fgvc_aircraft': 'FGVCAircraft', 'stanford_cars': 'StanfordCars', 'dtd': 'DTD'}
_ALIASES = {'fgvcaircraft': 'fgvc_aircraft', 'aircraft': 'fgvc_aircraft', 'stanfordcars': 'stanford_cars',
            'cars': 'stanford_cars'}
_HOW_TO_GET = {
    'fgvc_aircraft': '{root}/fgvc-aircraft-2013b; add --dataset-download, or unpack fgvc-aircraft-2013b.tar.gz there',
    'dtd': '{root}/dtd/dtd; add --dataset-download, or unpack dtd-r1.0.1.tar.gz into {root}/dtd',
    'stanford_cars': '{root}/stanford_cars with devkit, cars_train, cars_test and cars_test_annos_withlabels.mat; its '
                     'own site is gone, but mirrors have them',
}


def open_source(component: Component, split: str, spec: DataSpec) -> Source:
    """Open a split of a component's dataset.

    Args:
        component: What to open.
        split: `train`, `val` or `test`.
        spec: For what is common: download, conversion.
    """
    prefix, sep, name = (component.dataset or '').partition('/')
    prefix = prefix.lower() if sep else ''
    if prefix == 'demo':
        return _open_demo(name, component.split_name(split))
    if prefix == 'decathlon':
        where = f'data component {component.name!r}'
        return open_labelled(component.root, name, component.split_name(split), where)
    if prefix == 'torch':
        return _open_torch(component, name.lower(), component.split_name(split), spec)
    if prefix == 'hfds':
        return _open_hfds(component, component.split_name(split), spec)
    if prefix in ('tfds', 'wds', 'hfids'):
        return open_iterable(component, component.split_name(split), split, spec)
    if component.dataset and (prefix or component.dataset not in ('folder', 'image_folder')):
        raise UserError(
            f'data component {component.name!r}: unknown dataset {component.dataset!r}; leave it out for a folder, or '
            f'begin it with torch/, decathlon/, hfds/, hfids/, tfds/ or wds/')
    if is_table(component.root):
        return open_table(component, component.split_name(split))
    return _open_folder(component, component.split_name(split))


def _open_demo(name: str, split: str) -> Source:
    from . import demo
    loaders = {'digits': demo.load_digits, 'textures': demo.load_textures}
    if name not in loaders:
        raise UserError(f'data: unknown demo dataset {name!r}; there are demo/digits and demo/textures')
    images, targets, classes = loaders[name](split_of(split) or split)
    return ArraySource(classes, targets, images, f'demo/{name}/{split}')


# ---- folders and tar files


def _open_folder(component: Component, split: str) -> Source:
    from timm.data import create_dataset
    folder = _split_folder(component, split)
    if os.path.isdir(folder):
        return _open_class_folders(component, folder)
    if not (os.path.isfile(folder) and folder.endswith('.tar')):
        raise UserError(f'data component {component.name!r}: {folder} is neither a folder nor a .tar file')
    try:  # a tar file kept open would share its position among forked workers
        reader = create_dataset(
            '', root=folder, split=split, search_split=False, class_map=component.class_map,
            cache_tarfiles=False).reader
    except (RuntimeError, AssertionError, ValueError, OSError) as e:
        raise UserError(f'data component {component.name!r}: {folder}: {first_line(e)}') from e
    version = f'{os.path.abspath(folder)} {os.stat(folder).st_mtime_ns}'
    return ReaderSource(class_names(reader.class_name_to_idx), reader.targets, reader, folder, version)


def _open_class_folders(component: Component, folder: str) -> Source:
    """Images labelled by the folder they lie in, in timm's order; what timm would drop, merge or invent is refused or
    told: classes without images, of one name, or inside one another, hidden folders, and suffixes that are not read.
    """
    where = f'data component {component.name!r}'
    images = _class_folders(component, folder, where)
    names: dict[str, str] = {}
    for path in images:
        name = unicodedata.normalize('NFC', os.path.basename(path))
        parent = outer = os.path.dirname(path)
        while len(outer) > len(folder) and outer not in images:
            outer = os.path.dirname(outer)
        if outer in images:
            raise UserError(f'{where}: {outer} holds images and, in {path}, a class of its own; move one of them')
        if name in names and not component.class_map:
            raise UserError(f'{where}: {names[name]} and {path} are two classes of one name; rename one of them')
        names[name] = path
        if parent != folder and len(names) == 1:
            _logger.warning(f'{where}: classes have the name of the last folder: {path} is {name}.')
    index = class_index(names, component, folder)
    labels = {path: index.get(unicodedata.normalize('NFC', os.path.basename(path))) for path in images}
    samples = sorted(
        (natural_key(image), image, labels[path]) for path, found in images.items() for image in found
        if labels[path] is not None)
    if not samples:
        remedy = f'check the names in {component.class_map}' if images else 'put each into the folder of its class'
        raise UserError(f'{where}: no images of any class in {folder}; {remedy}')
    root = os.path.expanduser(component.root)
    return FileSource(class_names(index), [s[2] for s in samples], [s[1] for s in samples], root)


def _class_folders(component: Component, folder: str, where: str) -> dict[str, list[str]]:
    """The images of each folder that has any."""
    from timm.data.readers import get_img_extensions
    suffixes = set(component.input_key.lower().split(';')) if component.input_key else get_img_extensions(as_set=True)
    if not all(suffix.startswith('.') for suffix in suffixes):
        raise UserError(f'{where}: --input-key {component.input_key}: write suffixes as in ".jpg;.webp"')
    images: dict[str, list[str]] = {}
    empty, left_out = [], Counter()
    for path, folders, files in os.walk(folder, followlinks=True):
        shown = [name for name in folders if not name.startswith('.') and name not in ('__MACOSX', '__pycache__')]
        left_out['hidden folders'] += len(folders) - len(shown)
        folders[:] = sorted(shown)
        found = [name for name in files if os.path.splitext(name)[1].lower() in suffixes and not name.startswith('.')]
        for name in set(files) - set(found):
            suffix = os.path.splitext(name)[1].lower()
            left_out['hidden files' if name.startswith('.') else f'{suffix or "suffixless"} files'] += 1
        if found and path == folder:
            raise UserError(
                f'{where}: {len(found)} images lie directly in {folder}; put each into the folder of its class')
        if found:
            images[path] = [os.path.join(path, name) for name in found]
        elif not folders and path != folder:
            empty.append(path)
    if empty and not component.class_map:
        more = f' and {len(empty) - 1} more' if len(empty) > 1 else ''
        raise UserError(
            f'{where}: no images in class folder {sorted(empty)[0]}{more}; add images '
            f'({", ".join(sorted(suffixes))}; others with --input-key) or remove the folder')
    parts = [f'{number} {what}' for what, number in left_out.most_common(6) if number]
    if parts:
        others = any(what.startswith('.') and number for what, number in left_out.items())
        more = '; --input-key ".jpg;.webp" reads other suffixes' if others else ''
        _logger.warning(f'{where}: {folder}: left out: {", ".join(parts)}{more}.')
    return images


def split_folders(root: str) -> list[str]:
    """Names of the folders in it that are splits."""
    return [n for names in SPLIT_NAMES.values() for n in names if os.path.isdir(os.path.join(root, n))]


def _split_folder(component: Component, split: str) -> str:
    """The folder of a split: named so, or by one of timm's synonyms.

    timm takes the whole folder where it finds none; then training and validation would be the same images, so only a
    folder that has no split of any name can be `train`, and another split of it is an error.
    """
    where = f'data component {component.name!r}'
    root = component.root
    if not root:
        raise UserError(f'{where}: no folder; give --data-dir, or path= of the component')
    root = os.path.expanduser(root)
    if not os.path.exists(root):
        here = '' if os.path.isabs(root) else f' in {os.getcwd()}'
        raise UserError(f'{where}: {root} does not exist{here}; give the folder that holds train/CLASS/image.jpg')
    if os.path.isfile(root):
        if split_of(split) != 'train':
            raise UserError(f'{where}: {root} is one file and has no split {split!r}; give each split in a folder')
        return root
    name = split.split('[')[0]
    role = split_of(name)
    for candidate in (name, *SPLIT_NAMES.get(role, ())):
        path = os.path.join(root, candidate)
        if os.path.exists(path):
            return os.path.normpath(path)
        if os.path.isfile(f'{path}.tar'):
            return f'{path}.tar'
    present = split_folders(root)
    if role == 'train' and not present:
        return root
    folders = ', '.join(present) or 'no split folders'
    raise UserError(
        f'{where}: no folder for split {split!r} in {root} (there: {folders}); make one'
        + (f', or cut it out of the training images with --{role}-share 0.2' if role in ('val', 'test') else ''))


def _open_torch(component: Component, name: str, split: str, spec: DataSpec) -> Source:
    name = _ALIASES.get(name, name)
    where = f'data component {component.name!r}'
    if name not in _OUR_TORCH and name not in _TIMM_TORCH:
        raise UserError(f'{where}: unknown dataset torch/{name}; there are '
                        f'{", ".join([*_TIMM_TORCH, *_OUR_TORCH])}')
    if not component.root:
        raise UserError(f'{where}: no folder; give --data-dir, or path= of the component')
    if name in ('folder', 'image_folder'):
        return _open_folder(component, split)
    root = os.path.expanduser(component.root)
    try:
        dataset = _torch_dataset(name, root, split, spec.download)
    except (RuntimeError, ValueError, OSError, AssertionError) as e:
        if 'scipy' in str(e).lower():
            raise UserError(f'{where}: reading torch/{name} needs scipy: pip install scipy') from e
        if isinstance(e, ValueError) and 'split' in str(e):
            hint = ' (cut it out of train with splits.val=train, per_class.val=N, skip.train=N)' \
                if name == 'stanford_cars' else ''
            raise UserError(f'{where}: torch/{name} has no split {split!r}{hint}: {first_line(e)}') from e
        how = _HOW_TO_GET.get(name, '{root}; add --dataset-download')
        raise UserError(
            f'{where}: torch/{name} not found ({first_line(e)}); expected in {how.format(root=root)}') from e
    return _torch_source(dataset, name, where)


def _torch_dataset(name: str, root: str, split: str, download: bool) -> Any:
    if name in _OUR_TORCH:
        import torchvision.datasets
        split = split_of(split) or split
        return getattr(torchvision.datasets, _OUR_TORCH[name])(root, split=split, download=download)
    from timm.data import create_dataset
    if not download and not os.path.isdir(root):
        raise RuntimeError('no such folder')  # torchvision would make it
    return create_dataset(f'torch/{name}', root=root, split=split, download=download)


def _torch_source(dataset: Any, name: str, where: str) -> Source:
    if hasattr(dataset, '_image_files'):  # FGVCAircraft, DTD
        return FileSource(dataset.classes, dataset._labels, [str(path) for path in dataset._image_files])
    for samples in ('samples', '_samples', 'imgs'):  # ImageNet, StanfordCars, Places365
        if hasattr(dataset, samples):
            paths, targets = zip(*getattr(dataset, samples), strict=True)
            classes = [c[0] if isinstance(c, tuple) else c for c in dataset.classes]
            return FileSource(classes, targets, [str(path) for path in paths])
    if hasattr(dataset, 'all_categories'):  # INaturalist
        return _inaturalist_source(dataset, where)
    targets = np.asarray(dataset.targets)
    targets = targets[:, 0] if targets.ndim == 2 else targets  # QMNIST's targets have columns
    return ArraySource(dataset.classes, targets, dataset, f'torch/{name}')


def _inaturalist_source(dataset: Any, where: str) -> Source:
    if len(dataset.target_type) != 1:
        raise UserError(f'{where}: iNaturalist with several target types at once; name one, such as genus/2021_train')
    kind = dataset.target_type[0]
    paths = [os.path.join(dataset.root, dataset.all_categories[cat], file) for cat, file in dataset.index]
    if kind == 'full':
        return FileSource(dataset.all_categories, [cat for cat, _ in dataset.index], paths)
    index = dataset.categories_index[kind]
    return FileSource(class_names(index), [dataset.categories_map[cat][kind] for cat, _ in dataset.index], paths)


# ---- Hugging Face datasets


def _open_hfds(component: Component, split: str, spec: DataSpec) -> Source:
    where = f'data component {component.name!r}'
    try:
        import datasets
    except ImportError as e:
        raise UserError(f'{where}: {component.dataset} needs Hugging Face datasets: pip install datasets') from e
    from timm.data import create_dataset
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this, load_dataset goes to the network though the user allowed no download.
        datasets.config.HF_HUB_OFFLINE = offline or not spec.download
        reader = create_dataset(
            component.dataset, root=component.root, split=split, class_map=component.class_map,
            input_key=component.input_key, target_key=component.target_key,
            trust_remote_code=spec.trust_remote_code).reader
    except Exception as e:  # the library has no common error type
        raise UserError(
            f'{where}: {component.dataset}, split {split!r}: {first_line(e)}; check the name and the split, and add '
            f'--dataset-download if it is not on this machine yet') from e
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    key = component.target_key or 'label'
    if reader.remap_class:
        targets = list(reader.iter_targets())
    else:
        targets = list(reader.dataset[key])
    if not targets or not all(isinstance(target, int) for target in targets):
        raise UserError(f'{where}: {component.dataset}: {key!r} is not one class index a sample; name it: target_key')
    classes = class_names(reader.class_to_idx) if reader.class_to_idx else [str(i) for i in range(max(targets) + 1)]
    name = f'{component.dataset}/{split}'
    return ReaderSource(classes, targets, reader, name, getattr(reader.dataset, '_fingerprint', ''))
