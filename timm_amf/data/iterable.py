"""Datasets that can only be iterated (`tfds/`, `wds/`, `hfids/`), read once and kept on disk.

A mixture needs to know the class of every sample and to reach each by its index; a stream offers neither. So its
samples are read once, in their own order, by timm's reader, and kept as PNG (without loss) in the cache.
"""
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
from PIL import Image

from timm_amf.errors import UserError

from .sources import Source, class_names, first_line
from .spec import Component, DataSpec
from .storage import cache_folder, open_or_write

__all__ = ['PackedSource', 'open_iterable']

_logger = logging.getLogger(__name__)
_PACKAGE = {'tfds': 'tensorflow tensorflow-datasets', 'wds': 'webdataset', 'hfids': 'datasets'}


class PackedSource(Source):
    """Encoded images in one file."""

    def __init__(self, folder: Path, name: str):
        index = np.load(folder / 'index.npy')
        about = json.loads((folder / 'about.json').read_text(encoding='utf-8'))
        super().__init__(about['classes'], index[:, 1])
        self.path = folder / 'images.bin'
        self.starts = np.concatenate([[0], np.cumsum(index[:, 0])])
        if self.path.stat().st_size != self.starts[-1]:
            raise OSError(f'{self.path} has the wrong size')
        self.name = name

    def open(self, index: int) -> BinaryIO:
        with open(self.path, 'rb') as file:
            file.seek(self.starts[index])
            return io.BytesIO(file.read(self.starts[index + 1] - self.starts[index]))

    def filename(self, index: int) -> str:
        return f'{self.name}[{index}]'

    def signature(self, index: int) -> str:
        return f'{self.path.parent.name}\0{index}'


def open_iterable(component: Component, split: str, role: str, spec: DataSpec) -> PackedSource:
    """Open a split of an iterable dataset, reading it through first if that has not been done.

    Args:
        component: What to open.
        split: The dataset's name of the split.
        role: The mixture's name of it: `train`, `val` or `test`.
        spec: For what is common.
    """
    where = f'data component {component.name!r}'
    prefix, _, name = component.dataset.partition('/')
    prefix = prefix.lower()
    if prefix == 'hfids' and not spec.download and not Path(name).exists():
        raise UserError(f'{where}: {component.dataset} streams from the network; allow it with --dataset-download')
    identity = [component.dataset, component.root, split, component.class_map, component.input_key,
                component.target_key, spec.input_img_mode, spec.num_samples.get(role), *_files(component.root, name)]
    key = hashlib.sha256(repr(identity).encode('utf-8', 'surrogateescape')).hexdigest()[:24]
    folder = cache_folder(spec.cache_dir, f'dataset-{key}')

    def write(path: Path) -> None:
        try:
            dataset = _timm_dataset(component, split, role, spec)
        except (ImportError, AssertionError) as e:
            raise UserError(f'{where}: cannot open {component.dataset} ({first_line(e)}); it may need: pip install '
                            f'{_PACKAGE[prefix]}') from e
        except Exception as e:  # the libraries have no common error type
            raise UserError(f'{where}: {component.dataset}, split {split!r}: {first_line(e)}') from e
        _logger.warning(
            f'{where}: {component.dataset} can only be iterated; split {split!r} is read once and kept in {folder}.')
        _pack(dataset, path, where)

    return open_or_write(folder, lambda path: PackedSource(path, f'{component.dataset}/{split}'), write)


def _timm_dataset(component: Component, split: str, role: str, spec: DataSpec) -> Any:
    from timm.data import create_dataset
    num_samples = spec.num_samples.get(role)
    streaming = component.dataset.lower().startswith('hfids/')
    dataset = create_dataset(
        component.dataset,
        root=component.root,
        split=split,
        class_map=component.class_map,
        is_training=False,
        download=spec.download,
        num_samples=num_samples or (1 if streaming else None),  # hfids/ insists on a number that it then ignores
        input_img_mode=spec.input_img_mode or 'RGB',
        input_key=component.input_key,
        target_key=component.target_key,
        trust_remote_code=spec.trust_remote_code,
    )
    if streaming and not num_samples:
        dataset.reader.num_samples = 0
    # timm's readers keep to their process's part of the data where torch.distributed runs; here it is read whole.
    for attribute, value in (('dist_rank', 0), ('dist_num_replicas', 1), ('global_num_workers', 1)):
        if hasattr(dataset.reader, attribute):
            setattr(dataset.reader, attribute, value)
    return dataset


def _samples(dataset: Any, where: str) -> Iterator[tuple[Image.Image, Any]]:
    """The samples; an error in reading them is told from one in writing them."""
    try:
        yield from dataset
    except Exception as e:
        raise UserError(f'{where}: reading stopped: {first_line(e)}') from e


def _pack(dataset: Any, path: Path, where: str) -> None:
    from tqdm import tqdm
    index = []
    with open(path / 'images.bin', 'wb') as file:
        for image, target in tqdm(_samples(dataset, where), desc='Reading dataset', unit='img', disable=None):
            if not isinstance(target, (int, np.integer)):
                raise UserError(f'{where}: target {target!r} is not one class index a sample; name it with target_key')
            encoded = io.BytesIO()
            image.save(encoded, 'PNG', compress_level=1)
            index.append((file.write(encoded.getbuffer()), int(target)))
    if not index:
        raise UserError(f'{where}: the split has no samples')
    promised = getattr(dataset.reader, 'num_samples', 0)
    if promised and len(index) != promised:
        _logger.warning(f'{where}: {len(index)} samples could be read, where the dataset says {promised}.')
    classes = _class_names(dataset.reader) or [str(i) for i in range(max(target for _, target in index) + 1)]
    np.save(path / 'index.npy', np.array(index, dtype=np.int64))
    (path / 'about.json').write_text(json.dumps({'classes': classes}), encoding='utf-8')


def _class_names(reader: Any) -> list[str]:
    """What timm's reader knows, or the features of a stream of Hugging Face, which are known once it runs."""
    if getattr(reader, 'class_to_idx', None):
        return class_names(reader.class_to_idx)
    features = getattr(getattr(reader, 'ds', None), 'features', None) or {}
    return list(getattr(features.get(getattr(reader, 'target_key', None)), 'names', None) or [])


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
