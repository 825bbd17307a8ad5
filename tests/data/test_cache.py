import errno
import io
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from timm_amf.data import Component, DataSpec, build_cache, cache_short_side, create_dataset, create_loader
from timm_amf.data import cache as cache_module
from timm_amf.errors import UserError
from timm_amf.files import cache_folder


@pytest.fixture
def dataset(make_folder, save):
    root = make_folder(size=(60, 40), number=3)
    save(root / 'train' / 'a' / 'small.png', (25, 20))
    save(root / 'train' / 'a' / 'tall.png', (33, 71))
    return create_dataset(DataSpec((Component('x', root=str(root)),)))


def again(dataset):
    """The same dataset, opened anew."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(dataset.filename(0))))
    return create_dataset(DataSpec((Component('x', root=root),)))


@pytest.mark.parametrize('workers', [0, 1])
def test_the_cache_holds_shrunk_images(dataset, tmp_path, workers):
    originals = [dataset.load(i) for i in range(len(dataset))]
    build_cache(dataset, 32, tmp_path / 'cache', workers=workers)
    for i, original in enumerate(originals):
        expected = original
        if min(original.size) > 32:
            expected = functional.resize(original, 32, functional.InterpolationMode.BICUBIC)
        assert np.array_equal(dataset.load(i), expected)
        assert np.array_equal(dataset.load_original(i), original)
    assert {min(dataset.load(i).size) for i in range(len(dataset))} == {20, 32}
    assert cache_short_side((3, 224, 224)) == 256 and cache_short_side(299) == 342


def test_it_is_found_again_until_a_file_changes(dataset, tmp_path, save, monkeypatch):
    first = build_cache(dataset, 32, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, '_shrunk', lambda *args, **kwargs: pytest.fail('built again'))
        assert build_cache(again(dataset), 32, tmp_path).folder == first.folder
    assert build_cache(again(dataset), 16, tmp_path).folder != first.folder
    save(Path(dataset.filename(0)), (60, 40), seed=99)
    changed = again(dataset)
    assert build_cache(changed, 32, tmp_path).folder != first.folder
    assert not np.array_equal(changed.load(0), first.load(0))


def test_training_from_the_cache_is_training_on_its_images(dataset, tmp_path):
    """The short cut from cached pixels to crops changes nothing."""
    options = dict(input_size=24, batch_size=4, is_training=True, auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.3)
    build_cache(dataset, 32, tmp_path)
    fast = [list(create_loader(dataset, workers=w, **options)) for w in (0, 2)]
    shrunk = {i: dataset.load(i) for i in range(len(dataset))}
    dataset.cache, dataset.load_original = None, shrunk.__getitem__
    slow = list(create_loader(dataset, workers=0, **options))
    for a, b, c in zip(*fast, slow, strict=True):
        assert torch.equal(a.input, c.input) and torch.equal(b.input, c.input) and torch.equal(a.index, c.index)


def test_evaluation_from_a_cache_of_its_own_size_is_exact(dataset, tmp_path):
    options = dict(input_size=28, batch_size=20, workers=0, crop_pct=0.875, interpolation='bilinear')
    expected = next(iter(create_loader(dataset, **options))).input
    build_cache(dataset, 32, tmp_path, interpolation='bilinear')
    assert torch.equal(next(iter(create_loader(dataset, **options))).input, expected)


def test_a_damaged_cache_is_built_again(dataset, tmp_path, caplog):
    folder = build_cache(dataset, 32, tmp_path).folder
    os.truncate(folder / 'pixels.bin', 100)
    fresh = again(dataset)
    build_cache(fresh, 32, tmp_path)
    assert 'damaged' in caplog.text
    assert fresh.load(5).size == (48, 32)


def test_a_full_disk_is_one_line_and_leaves_nothing(dataset, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, 'open', lambda *args: Full(), raising=False)
    with pytest.raises(UserError, match='no space left on the disk.*--cache-dir') as error:
        build_cache(dataset, 32, tmp_path / 'cache')
    assert '\n' not in str(error.value)
    assert list((tmp_path / 'cache').iterdir()) == []
    assert dataset.cache is None


def test_a_folder_that_cannot_be_is_one_line(dataset, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='the cache in .*cannot be written'):
        build_cache(dataset, 32, tmp_path / 'file' / 'cache')


def test_a_killed_build_leaves_no_broken_cache(dataset, tmp_path, monkeypatch):
    context = multiprocessing.get_context('fork')
    original, reached = dataset.load_original, context.Event()

    def slow(index):
        if index == 5:
            reached.set()
            time.sleep(60)
        return original(index)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, 'load_original', slow)
        patch.setattr(cache_module, '_CHUNK', 1)
        process = context.Process(target=build_cache, args=(dataset, 32, tmp_path / 'c'))
        process.start()
    assert reached.wait(60)
    process.kill()
    process.join()
    left = [path.name for path in (tmp_path / 'c').iterdir()]
    assert len(left) == 1 and '.tmp-' in left[0]
    build_cache(dataset, 32, tmp_path / 'c')
    assert dataset.load(5).size == (48, 32)
    assert [path.name for path in (tmp_path / 'c').iterdir()] == [dataset.cache.folder.name]


def test_a_cache_may_be_sent_to_a_spawned_worker(dataset, tmp_path):
    build_cache(dataset, 32, tmp_path)
    dataset.load(0)
    sent = pickle.dumps(dataset.cache)
    assert len(sent) < 5000  # the pixels stay where they are
    assert np.array_equal(pickle.loads(sent).load(1), dataset.load(1))


def test_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder(None, 'a') == tmp_path / 'timm_amf' / 'a'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    assert cache_folder(None, 'a') == tmp_path / 'home' / '.cache' / 'timm_amf' / 'a'


def test_only_eight_bit_modes(make_folder, tmp_path):
    data = create_dataset(DataSpec((Component('x', root=str(make_folder())),), input_img_mode='F'))
    with pytest.raises(UserError, match="not 'F'"):
        build_cache(data, 32, tmp_path)
