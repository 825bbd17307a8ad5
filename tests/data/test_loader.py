import os
import pickle
import random
import signal

import numpy as np
import pytest
import timm.data
import torch
from timm.data import create_transform

from timm_amf.data import Component, DataSpec, create_dataset, create_loader
from timm_amf.data.sampler import Key
from timm_amf.data.transforms import sample_seed
from timm_amf.errors import UserError
from timm_amf.flags import workers

AUGMENT = dict(input_size=(3, 24, 24), is_training=True, auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.5,
               re_mode='pixel', interpolation='random')


@pytest.fixture
def dataset(make_folder):
    one, two = make_folder('one', number=5), make_folder('two', classes=['x', 'y'], number=4)
    return create_dataset(DataSpec((Component('one', root=str(one)), Component('two', root=str(two)))))


def epoch_of(loader, epoch=0, start_step=0):
    loader.set_epoch(epoch, start_step)
    return list(loader)


def by_index(*epochs):
    return {int(i): x for epoch in epochs for batch in epoch for i, x in zip(batch.index, batch.input, strict=True)}


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x[:4], y[:4], strict=True)) and x.step_size == y.step_size


def test_batches(dataset):
    batches = epoch_of(create_loader(dataset, batch_size=10, workers=0, **AUGMENT))
    assert [len(b.target) for b in batches] == [b.step_size for b in batches] == [8, 8, 7]
    for batch in batches:
        assert batch.input.shape[1:] == (3, 24, 24) and batch.input.dtype == torch.float32
        assert batch.target.dtype == batch.component.dtype == batch.index.dtype == torch.int64
        assert batch.target.tolist() == dataset.targets[batch.index].tolist()
        assert batch.component.tolist() == dataset.component_of[batch.index].tolist()
    assert sorted(i for b in batches for i in b.index.tolist()) == list(range(23))


def test_workers_do_not_matter(dataset):
    loaders = [create_loader(dataset, batch_size=6, workers=w, **AUGMENT) for w in (0, 1, 2)]
    for epoch in (0, 3):
        reference = epoch_of(loaders[0], epoch)
        for loader in loaders[1:]:
            assert_equal(epoch_of(loader, epoch), reference)
    first, fourth = by_index(epoch_of(loaders[0], 0)), by_index(epoch_of(loaders[0], 3))
    assert not any(torch.equal(first[i], fourth[i]) for i in first)


def test_processes_do_not_matter(dataset):
    one = epoch_of(create_loader(dataset, batch_size=8, workers=0, **AUGMENT), 2)
    halves = [create_loader(dataset, batch_size=4, workers=0, rank=r, world_size=2, **AUGMENT) for r in (0, 1)]
    two = [epoch_of(half, 2) for half in halves]
    for step, whole in enumerate(one):
        assert whole.step_size == len(whole.target) == sum(len(part[step].target) for part in two)
        assert all(part[step].step_size == whole.step_size for part in two)
        alone, together = by_index([whole]), by_index([two[0][step]], [two[1][step]])
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[i], together[i]) for i in alone)
        # gradients averaged over processes, each loss weighted by its share, are the mean over the step
        losses = [part[step].input.mean((1, 2, 3)) for part in two]
        weighted = sum(x.mean() * len(x) * 2 / whole.step_size for x in losses) / 2
        assert torch.allclose(weighted, whole.input.mean((1, 2, 3)).mean(), atol=1e-6)


@pytest.mark.parametrize('workers', [0, 2])
def test_resuming_in_the_middle(dataset, workers, monkeypatch):
    whole = epoch_of(create_loader(dataset, batch_size=4, workers=workers, **AUGMENT), 5)
    loader = create_loader(dataset, batch_size=4, workers=workers, **AUGMENT)
    iterator = iter(loader)
    next(iterator)  # an epoch that is left early must not disturb the next
    del iterator
    loaded = []
    load = dataset.load
    if not workers:
        monkeypatch.setattr(dataset, 'load', lambda i: loaded.append(i) or load(i))
    assert_equal(epoch_of(loader, 5, start_step=3), whole[3:])
    assert workers or len(loaded) == sum(len(batch.index) for batch in whole[3:])  # what is skipped is not decoded
    assert_equal(epoch_of(loader, 5), whole)


def test_each_sample_is_timms_transform_under_its_seed(dataset):
    policy = 'rand-m9-mstd0.5-inc1'
    transform = create_transform(
        (3, 24, 24), is_training=True, auto_augment=policy, interpolation='random', use_prefetcher=True)
    loader = create_loader(
        dataset, batch_size=5, workers=0, seed=8, **{**AUGMENT, 're_prob': 0.})
    got = by_index(epoch_of(loader, 4))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
    for index, image in got.items():
        seed = sample_seed(8, Key(4, index, 0, 0, 0))
        random.seed(seed)
        np.random.seed(seed % 2 ** 32)
        torch.manual_seed(seed)
        expected = transform(dataset.load(index))
        assert torch.allclose(image, (expected - mean) / std, atol=1e-6)


def test_global_generators_are_left_alone(dataset):
    loaders = [create_loader(dataset, batch_size=5, workers=w, **AUGMENT) for w in (0, 1)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for loader in loaders:
        epoch_of(loader)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_evaluation_is_timms_bit_for_bit(make_folder, dtype):
    root = make_folder(number=5)
    ours = create_dataset(DataSpec((Component('x', root=str(root)),)), 'val')
    timms = timm.data.create_dataset('', root=str(root / 'val'))
    shared = dict(input_size=(3, 16, 16), batch_size=4, crop_pct=0.9, interpolation='bicubic', mean=(0.5, 0.4, 0.3),
                  std=(0.2, 0.3, 0.4), img_dtype=dtype)
    expected = list(timm.data.create_loader(timms, num_workers=0, device=torch.device('cpu'), **shared))
    for channels_last in (False, True):
        got = list(create_loader(ours, workers=0, channels_last=channels_last, **shared))
        assert all(torch.equal(a.input, b[0]) and torch.equal(a.target, b[1])
                   for a, b in zip(got, expected, strict=True))
        assert got[0].input.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert got[0].input.dtype == dtype


def test_evaluation_over_processes_counts_each_once(dataset):
    parts = [list(create_loader(dataset, 24, batch_size=4, workers=0, rank=r, world_size=3)) for r in range(3)]
    together = by_index(*parts)
    assert sum(len(b.target) for part in parts for b in part) == len(together) == 23
    alone = by_index(list(create_loader(dataset, 24, batch_size=50, workers=0)))
    assert all(torch.equal(alone[i], together[i]) for i in alone)


def test_augmentation_repeats_differ_from_one_another(dataset):
    batches = epoch_of(create_loader(dataset, batch_size=4, workers=0, num_aug_repeats=3, **AUGMENT))
    index = torch.cat([b.index for b in batches])
    images = torch.cat([b.input for b in batches])
    assert len(index) == 23
    assert index[0] == index[1] == index[2] != index[3]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_augmentation_splits(dataset):
    plain = {**AUGMENT, 'auto_augment': None, 're_prob': 0., 'color_jitter': 0.}
    clean = epoch_of(create_loader(dataset, batch_size=8, workers=0, **plain))[0]
    loaders = [create_loader(dataset, batch_size=8, workers=w, num_aug_splits=3, **{**AUGMENT, 're_split': True})
               for w in (0, 1)]
    first, again = [epoch_of(loader)[0] for loader in loaders]
    assert_equal([first], [again])
    size = len(clean.target)
    assert first.input.shape[0] == first.step_size == 3 * size
    assert torch.equal(first.target, clean.target.repeat(3)) and torch.equal(first.index, clean.index.repeat(3))
    one, two, three = first.input.split(size)
    assert torch.equal(one, clean.input)
    assert not torch.equal(one, two) and not torch.equal(two, three)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_breaks_while_training_is_one_line(dataset, workers):
    with open(dataset.filename(7), 'wb') as file:
        file.write(b'\x89PNG\r\n')
    with pytest.raises(UserError, match='one/train/b/2.png') as error:
        epoch_of(create_loader(dataset, batch_size=4, workers=workers, **AUGMENT))
    assert '\n' not in str(error.value)


def test_a_transform_that_fails_names_the_image(dataset, monkeypatch):
    monkeypatch.setattr(dataset, 'load', lambda i: 'no image')
    with pytest.raises(RuntimeError, match=r'(one|two)/train/./\d.png: TypeError'):
        epoch_of(create_loader(dataset, batch_size=4, workers=0, **AUGMENT))


def test_a_worker_that_dies(dataset, monkeypatch):
    monkeypatch.setattr(dataset, 'load', lambda i: os._exit(9))
    with pytest.raises(UserError, match='a data loading worker died.*--workers'):
        epoch_of(create_loader(dataset, batch_size=4, workers=1, **AUGMENT))


def test_ctrl_c_is_for_the_main_process(dataset):
    loader = create_loader(dataset, batch_size=1, workers=2, **AUGMENT)
    batches = iter(loader)
    next(batches)
    for worker in loader._loader._iterator._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 22


def test_grey_images(make_folder):
    data = create_dataset(DataSpec((Component('x', root=str(make_folder())),)), in_chans=1)
    for extra in (AUGMENT, {'is_training': False}):
        batch = next(iter(create_loader(data, batch_size=4, workers=0, **{**extra, 'input_size': (1, 24, 24)})))
        assert batch.input.shape == (4, 1, 24, 24)


def test_workers_may_be_spawned(dataset):
    samples = create_loader(dataset, batch_size=4, workers=0, **AUGMENT)._loader.dataset
    again = pickle.loads(pickle.dumps(samples))
    key = Key(0, 3, 0, 0, 4)
    assert torch.equal(again.__getitems__([key])[0][0][0], samples.__getitems__([key])[0][0][0])


def test_no_more_workers_than_cores(dataset, recwarn, monkeypatch, caplog):
    monkeypatch.setattr('timm_amf.flags.CORES', 1)
    monkeypatch.setattr('timm_amf.data.loader.CORES', 1)
    assert create_loader(dataset, batch_size=4, workers=64, **AUGMENT)._loader.num_workers == 1
    assert not [warning for warning in recwarn if 'worker' in str(warning.message)]
    assert workers('4') == 4 and 'this machine has 1 cores' in caplog.text
