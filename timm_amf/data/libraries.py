"""Datasets that timm reads by other makers' libraries: `hfds/`, and `tfds/`, `wds/`, `hfids/`, kept on disk.

The last three can only be iterated. A mixture needs to know the class of every sample and to reach each by its index; a
stream offers neither. So its samples are read once, in their own order, and kept as PNG (without loss) in the cache.
"""
import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np

from timm_amf.errors import UserError
from timm_amf.files import cache_folder, open_or_write

from .sources import ReaderSource, Source, class_names, first_line
from .spec import Component, DataSpec

__all__ = ['PackedSource', 'open_hfds', 'open_iterable']

_logger = logging.getLogger(__name__)
_PACKAGES = {'tfds': 'tensorflow tensorflow-datasets', 'wds': 'webdataset', 'hfids': 'datasets', 'hfds': 'datasets'}


def _timm_dataset(component: Component, split: str, spec: DataSpec, **kwargs) -> Any:
    """timm's dataset; what its libraries raise, which have no common error type, in one line."""
    from timm.data import create_dataset
    try:
        return create_dataset(
            component.dataset, root=component.root, split=split, class_map=component.class_map,
            input_key=component.input_key, target_key=component.target_key, trust_remote_code=spec.trust_remote_code,
            **kwargs)
    except Exception as e:
        remedy = 'check the name and the split, and add --dataset-download if it is not on this machine yet'
        if isinstance(e, (ImportError, AssertionError)):
            remedy = f'it may need: pip install {_PACKAGES[component.dataset.partition("/")[0].lower()]}'
        raise UserError(f'{component.dataset}, split {split!r}: {first_line(e)}; {remedy}') from e


def _class_names(reader: Any, targets: list) -> list[str]:
    """What timm's reader knows, or the features of a stream of Hugging Face, which are known once it runs."""
    if getattr(reader, 'class_to_idx', None):
        return class_names(reader.class_to_idx)
    features = getattr(getattr(reader, 'ds', None), 'features', None) or {}
    names = getattr(features.get(getattr(reader, 'target_key', None)), 'names', None)
    return list(names or map(str, range(max(targets) + 1)))


def open_hfds(component: Component, split: str, spec: DataSpec) -> ReaderSource:
    """Open a split of a dataset of Hugging Face's library."""
    import datasets
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this, load_dataset goes to the network though the user allowed no download.
        datasets.config.HF_HUB_OFFLINE = offline or not spec.download
        reader = _timm_dataset(component, split, spec).reader
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    key = component.target_key or 'label'
    targets = list(reader.iter_targets() if reader.remap_class else reader.dataset[key])
    if not targets or not all(isinstance(target, int) for target in targets):
        raise UserError(f'{component.dataset}: {key!r} is not one class index a sample; name it: target_key')
    return ReaderSource(
        _class_names(reader, targets), targets, reader, f'{component.dataset}/{split}',
        getattr(reader.dataset, '_fingerprint', ''))


class PackedSource(Source):
    """Encoded images in one file."""

    def __init__(self, folder: Path, name: str):
        index = np.load(folder / 'index.npy')
        about = json.loads((folder / 'about.json').read_text(encoding='utf-8'))
        super().__init__(about['classes'], index[:, 1], name, folder.name)
        self.path = folder / 'images.bin'
        self.starts = np.concatenate([[0], np.cumsum(index[:, 0])])
        if self.path.stat().st_size != self.starts[-1]:
            raise OSError(f'{self.path} has the wrong size')

    def open(self, index: int) -> BinaryIO:
        with open(self.path, 'rb') as file:
            file.seek(self.starts[index])
            return io.BytesIO(file.read(self.starts[index + 1] - self.starts[index]))


def open_iterable(
        component: Component,
        split: str,
        spec: DataSpec,
        num_samples: Optional[int] = None,
) -> PackedSource:
    """Open a split, by its own name, of an iterable dataset, reading it through first if that has not been done.

    Some do not know their number of samples and want to be told.
    """
    prefix, _, name = component.dataset.partition('/')
    streaming = prefix.lower() == 'hfids'
    if streaming and not spec.download and not Path(name).exists():
        raise UserError(f'{component.dataset} streams from the network; allow it with --dataset-download')
    identity = [component.dataset, component.root, split, component.class_map, component.input_key,
                component.target_key, spec.input_img_mode, num_samples, *_files(component.root, name)]
    key = hashlib.sha256(repr(identity).encode('utf-8', 'surrogateescape')).hexdigest()[:24]
    folder = cache_folder(spec.cache_dir, f'dataset-{key}')

    def write(path: Path) -> None:
        dataset = _timm_dataset(
            component, split, spec, is_training=False, download=spec.download,
            num_samples=num_samples or (1 if streaming else None),  # hfids/ insists on a number that it then ignores
            input_img_mode=spec.input_img_mode or 'RGB')
        if streaming and not num_samples:
            dataset.reader.num_samples = 0
        # timm's readers keep to their process's part of the data where torch.distributed runs; here it is read whole.
        for attribute, value in (('dist_rank', 0), ('dist_num_replicas', 1), ('global_num_workers', 1)):
            if hasattr(dataset.reader, attribute):
                setattr(dataset.reader, attribute, value)
        where = f'data component {component.name!r}: {component.dataset}'
        _logger.warning(f'{where} can only be iterated; split {split!r} is read once and kept in {folder}.')
        number, promised = _pack(dataset, path), getattr(dataset.reader, 'num_samples', 0)
        if promised and number != promised:
            _logger.warning(f'{where}: {number} samples could be read, where the dataset says {promised}.')

    return open_or_write(folder, lambda path: PackedSource(path, f'{component.dataset}/{split}'), write)


def _pack(dataset: Any, path: Path) -> int:
    """Write the files of a `PackedSource`; give the number of samples."""
    from tqdm import tqdm
    index, samples = [], iter(tqdm(dataset, desc='Reading dataset', unit='img', disable=None))
    with open(path / 'images.bin', 'wb') as file:
        while True:
            try:
                image, target = next(samples)
            except StopIteration:
                break
            except Exception as e:  # in reading; in writing, it is the disk
                raise UserError(f'reading stopped: {first_line(e)}') from e
            if not isinstance(target, (int, np.integer)):
                raise UserError(f'target {target!r} is not one class index a sample; name it with target_key')
            encoded = io.BytesIO()
            image.save(encoded, 'PNG', compress_level=1)
            index.append((file.write(encoded.getbuffer()), int(target)))
    if not index:
        raise UserError('the split has no samples')
    np.save(path / 'index.npy', np.array(index, dtype=np.int64))
    classes = _class_names(dataset.reader, [target for _, target in index])
    (path / 'about.json').write_text(json.dumps({'classes': classes}), encoding='utf-8')
    return len(index)


def _files(root: Optional[str], name: str) -> list[tuple]:
    """Names, sizes and times of the files of a dataset that lies in a folder: all below its own, or those in `root`."""
    own = Path(root or '.', name)
    if name and own.is_dir():
        paths = own.rglob('*')
    elif root and os.path.isdir(root):
        paths = Path(root).iterdir()
    else:
        return []
    files = sorted(path for path in paths if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
