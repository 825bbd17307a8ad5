"""The paper's presets in the layouts that torchvision expects, and datasets of other makers."""
import logging
import os

import numpy as np
import pytest
import timm.data
from PIL import Image

from timm_amf.data import Component, DataSpec, create_dataset, create_datasets
from timm_amf.errors import UserError


def write_aircraft(root, save, variants=100, number=34):
    data = root / 'fgvc-aircraft-2013b' / 'data'
    (data / 'images').mkdir(parents=True)
    names = [f'Model {i:03}' for i in range(variants)]
    (data / 'variants.txt').write_text(''.join(f'{name}\n' for name in names))
    serial = 0
    for split in ('train', 'val', 'test'):
        lines = []
        for i in range(number * variants):  # the classes take turns, as in no dataset
            lines.append(f'{serial:07} {names[i % variants]}\n')
            serial += 1
        (data / f'images_variant_{split}.txt').write_text(''.join(lines))
    save(data / 'images' / '0000000.jpg')


def write_dtd(root, classes=47, number=40):
    folder = root / 'dtd' / 'dtd'
    (folder / 'labels').mkdir(parents=True)
    for split in ('train', 'val', 'test'):
        lines = [f'kind{c:02}/kind{c:02}_{split}_{i:04}.jpg\n' for c in range(classes) for i in range(number)]
        (folder / 'labels' / f'{split}1.txt').write_text(''.join(lines))


def write_cars(root, classes=196, train=40, test=41):
    sio = pytest.importorskip('scipy.io')
    folder = root / 'stanford_cars'
    for name in ('devkit', 'cars_train', 'cars_test'):
        (folder / name).mkdir(parents=True)
    kind = np.dtype([('class', object), ('fname', object)])
    for split, number, path in (
            ('train', train, folder / 'devkit' / 'cars_train_annos.mat'),
            ('test', test, folder / 'cars_test_annos_withlabels.mat')):
        rows = [(i % classes + 1, f'{split}{i:05}.jpg') for i in range(classes * number)]
        sio.savemat(path, {'annotations': np.array(rows, dtype=kind)})
    names = np.array([f'Car {i}' for i in range(classes)], dtype=object)
    sio.savemat(folder / 'devkit' / 'cars_meta.mat', {'class_names': names})


def test_aircraft_dtd(tmp_path, save):
    write_aircraft(tmp_path, save)
    write_dtd(tmp_path)
    spec = DataSpec.from_mapping({'preset': 'aircraft-dtd', 'root': str(tmp_path)})
    for split, data in zip(('train', 'val', 'test'), create_datasets(spec, ('train', 'val', 'test')), strict=True):
        assert data.components == ['aircraft', 'dtd']
        assert data.num_classes == 94  # Table I: 47 + 47 classes, 1551 + 1551 images
        assert data.class_counts().tolist() == [33] * 94
        assert np.bincount(data.component_of).tolist() == [1551, 1551]
        assert f'kind00_{split}_0000' in data.filename(1551) and f'kind46_{split}_0032' in data.filename(3101)
    assert data.class_names[46:48] == ['Model 046', 'kind00']
    train = create_dataset(spec, 'train')
    assert train[0][0].size == (40, 30)
    # the 33rd image of the last class in use: 32 rounds of 100 classes before it, 46 classes before it in its round
    last = [i for i in range(len(train)) if train.targets[i] == 46][-1]
    assert '0003246' in train.filename(last)
    assert len(create_dataset(spec, 'train+val')) == 2 * 3102


def test_aircraft_cars(tmp_path, save):
    write_aircraft(tmp_path, save)
    write_cars(tmp_path)
    spec = DataSpec.from_mapping({'preset': 'aircraft-cars', 'root': str(tmp_path)})
    train, val, test = create_datasets(spec, ('train', 'val', 'test'))
    assert train.num_classes == 47 + 75
    assert train.class_counts().tolist() == [33] * 47 + [40 - 18] * 75
    assert val.class_counts().tolist() == [33] * 47 + [18] * 75
    assert test.class_counts().tolist() == [33] * 47 + [41] * 75
    files = [{d.filename(i) for i in range(len(d)) if d.component_of[i] == 1} for d in (train, val, test)]
    assert not files[0] & files[1] and not files[0] & files[2]
    # the first 18 images of a class are its validation
    assert {int(name[-9:-4]) // 196 for name in files[1]} == set(range(18))


def test_what_is_missing_is_named(tmp_path):
    for name, words in (('dtd', 'dtd-r1.0.1.tar.gz'), ('fgvc_aircraft', '--dataset-download'),
                        ('stanford_cars', 'cars_test_annos_withlabels.mat'), ('cifar10', '--dataset-download')):
        with pytest.raises(UserError, match=words) as error:
            create_dataset(DataSpec((Component('x', dataset=f'torch/{name}', root=str(tmp_path)),)))
        assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_neither_a_folder_nor_a_tar_file(make_folder, tmp_path):
    (tmp_path / 'notes.txt').write_text('x')
    os.mkfifo(tmp_path / 'pipe')
    root = make_folder(splits=('val',))
    (root / 'train').write_text('x')
    for path in (tmp_path / 'notes.txt', tmp_path / 'pipe', root):
        with pytest.raises(UserError, match='is neither a folder nor a .tar file'):
            create_dataset(DataSpec((Component('x', root=str(path)),)))


def test_cars_has_no_validation_split(tmp_path):
    write_cars(tmp_path, classes=2, train=3)
    with pytest.raises(UserError, match='split .validation.*splits.val=train'):
        create_datasets(DataSpec((Component('x', dataset='torch/stanford_cars', root=str(tmp_path)),)))


def test_cifar_through_timm(tmp_path):
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    sums = {}
    for i, name in enumerate(['data_batch_1', 'data_batch_2', 'data_batch_3', 'data_batch_4', 'data_batch_5',
                              'test_batch']):
        content = {'data': rng.integers(0, 256, (4, 3072), dtype=np.uint8), 'labels': [(i + j) % 10 for j in range(4)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'label {i}' for i in range(10)]}))
    with pytest.MonkeyPatch.context() as patch:
        sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
        patch.setattr(CIFAR10, 'train_list', [[n, sums[n]] for n in sorted(sums) if n.startswith('data')])
        patch.setattr(CIFAR10, 'test_list', [['test_batch', sums['test_batch']]])
        patch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': sums['batches.meta']})
        data = create_dataset(DataSpec((Component('x', dataset='torch/cifar10', root=str(tmp_path), classes=5),)))
        reference = timm.data.create_dataset('torch/cifar10', root=str(tmp_path), split='train')
    assert data.class_names == [f'label {i}' for i in range(5)]
    kept = [i for i in range(20) if reference[i][1] < 5]
    assert data.targets.tolist() == [reference[i][1] for i in kept]
    assert all(np.array_equal(data[j][0], reference[i][0]) for j, i in enumerate(kept))


@pytest.mark.parametrize('prefix', ['hfds', 'hfids'])
def test_hugging_face_datasets(make_folder, tmp_path, monkeypatch, prefix):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hf'))
    root = make_folder(splits=['train', 'validation'])
    part = Component('x', dataset=f'{prefix}/{root}', per_class=2, classes=2, root=str(tmp_path / 'hf'))
    train, val = create_datasets(DataSpec((part,), cache_dir=str(tmp_path / 'cache')))
    assert train.class_names == ['a', 'b']
    assert train.targets.tolist() == val.targets.tolist() == [0, 0, 1, 1]
    expected = Image.open(root / 'validation' / 'b' / '1.png').convert('RGB')
    assert np.array_equal(val[3][0], expected)


def test_hugging_face_datasets_are_not_downloaded_unasked(tmp_path):
    pytest.importorskip('datasets')
    for prefix in ('hfds', 'hfids'):
        part = Component('x', dataset=f'{prefix}/no-such-owner/no-such-set', root=str(tmp_path))
        with pytest.raises(UserError, match='--dataset-download'):
            create_dataset(DataSpec((part,), cache_dir=str(tmp_path)))


class Stream:
    """Stands for timm's readers of streams, whose packages the tests do not need."""

    def __init__(self, samples, promised):
        self.samples = samples
        self.reader = self
        self.num_samples = promised
        self.class_to_idx = {}
        self.dist_rank, self.dist_num_replicas = 1, 2

    def __iter__(self):
        yield from self.samples[self.dist_rank::self.dist_num_replicas]


@pytest.mark.parametrize('name', ['tfds/things', 'wds/things'])
def test_streams_are_read_once_and_kept(tmp_path, monkeypatch, caplog, name):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    samples = [(Image.fromarray(p), np.int64(i % 3)) for i, p in enumerate(pixels)]
    opened = []

    def fake(dataset, **kwargs):
        opened.append((dataset, kwargs['split'], kwargs['is_training']))
        return Stream(samples, promised=8)

    monkeypatch.setattr(timm.data, 'create_dataset', fake)
    spec = DataSpec((Component('x', dataset=name, root=str(tmp_path), per_class=2),), cache_dir=str(tmp_path / 'c'))
    with caplog.at_level(logging.WARNING):
        train, val = create_datasets(spec)
    assert '7 samples could be read, where the dataset says 8' in caplog.text
    assert opened == [(name, 'train', False), (name, 'validation', False)]
    assert train.targets.tolist() == [0, 1, 2, 0, 1, 2]  # of 0 1 2 0 1 2 0, and all of them though of two processes
    assert all(np.array_equal(train[i][0], pixels[i]) for i in range(6))
    create_datasets(spec)
    assert len(opened) == 2


def test_a_stream_that_breaks_leaves_nothing(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        def samples():
            yield Image.new('RGB', (3, 3)), 0
            raise RuntimeError('connection lost\nand more')
        stream = Stream([], 0)
        monkeypatch.setattr(Stream, '__iter__', lambda self: samples())
        return stream

    monkeypatch.setattr(timm.data, 'create_dataset', broken)
    spec = DataSpec((Component('x', dataset='wds/things', root='/'),), cache_dir=str(tmp_path))
    with pytest.raises(UserError, match='connection lost'):
        create_dataset(spec)
    assert list(tmp_path.iterdir()) == []
