from collections import Counter

import numpy as np
import pytest

from timm_amf.data.sampler import EvalSampler, StepSampler
from timm_amf.errors import UserError


@pytest.mark.parametrize('num_samples', [1, 2, 3, 32, 33, 129])
@pytest.mark.parametrize('batch_size', [1, 5, 32])
@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_each_sample_once_and_no_rank_without(num_samples, batch_size, world_size):
    if num_samples < world_size:
        with pytest.raises(UserError, match='fewer processes'):
            StepSampler(num_samples, batch_size, world_size=world_size)
        return
    ranks = [StepSampler(num_samples, batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    parts = [list(rank) for rank in ranks]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) == len(ranks[0])
    assert Counter(key.index for part in parts for step in part for key in step) == Counter(range(num_samples))
    sizes = [[len(part[s]) for part in parts] for s in range(len(parts[0]))]
    totals = [sum(size) for size in sizes]
    assert max(totals) - min(totals) <= 1
    assert all(min(size) >= 1 and max(size) - min(size) <= 1 for size in sizes)
    assert all(key.step_size == totals[s] for part in parts for s, step in enumerate(part) for key in step)
    if batch_size > 1:
        assert len(totals) == -(-num_samples // (batch_size * world_size))
        assert max(map(max, sizes)) <= batch_size


def test_two_processes_are_one_with_twice_the_batch():
    one = list(StepSampler(101, 16, seed=3))
    two = [list(StepSampler(101, 8, seed=3, rank=r, world_size=2)) for r in (0, 1)]
    for s, whole in enumerate(one):
        together = sorted((key for part in two for key in part[s]), key=lambda key: key.position)
        assert together == whole


def test_epoch_seed_and_start():
    sampler = StepSampler(50, 8, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert [k.index for step in second for k in step] != [k.index for step in first for k in step]
    sampler.set_epoch(1, start_step=4)
    assert len(sampler) == 7
    assert list(sampler) == second[4:]
    assert list(sampler) == second  # the start is for one iteration only
    assert [k.index for s in list(StepSampler(50, 8, seed=2)) for k in s] != [k.index for s in first for k in s]


@pytest.mark.parametrize('repeats', [2, 3, 1.5])
def test_augmentation_repeats_keep_the_length(repeats):
    sampler = StepSampler(60, 7, aug_repeats=repeats)
    keys = [key for step in sampler for key in step]
    assert len(keys) == 60
    plain = [key.index for step in StepSampler(60, 7) for key in step]
    # timm: position i of the repeated list is position int(i / repeats) of the permutation
    assert [key.index for key in keys] == [plain[int(i // repeats)] for i in range(60)]
    assert len({(key.index, key.repeat) for key in keys}) == 60
    assert {key.repeat for key in keys} == set(range(-int(-repeats // 1)))


def test_epoch_repeats_are_passes_with_orders_of_their_own():
    keys = [key for step in StepSampler(20, 6, epoch_repeats=2.5) for key in step]
    assert len(keys) == 50
    assert Counter(key.index for key in keys[:40]) == Counter(list(range(20)) * 2)
    assert [k.index for k in keys[:20]] != [k.index for k in keys[20:40]]
    assert len({(key.index, key.repeat) for key in keys}) == 50


@pytest.mark.parametrize('num_samples, world_size', [(10, 1), (10, 3), (1, 3), (7, 7)])
def test_evaluation_has_each_once_in_order(num_samples, world_size):
    ranks = [EvalSampler(num_samples, 2, r, world_size) for r in range(world_size)]
    parts = [list(rank) for rank in ranks]
    assert [len(p) for p in parts] == [len(r) for r in ranks]
    assert Counter(key.index for part in parts for step in part for key in step) == Counter(range(num_samples))
    assert all([k.index for s in part for k in s] == list(range(r, num_samples, world_size))
               for r, part in enumerate(parts))
    for step in range(len(parts[0])):
        total = sum(len(part[step]) for part in parts if step < len(part))
        assert all(key.step_size == total for part in parts if step < len(part) for key in part[step])


@pytest.mark.parametrize('epoch_repeats', [0, 2])
def test_classes_equally_often(epoch_repeats):
    classes = np.repeat([0, 1, 3], [50, 7, 1])  # class 2 has no image
    sampler = StepSampler(58, 8, epoch_repeats=epoch_repeats, classes=classes)
    passes = max(1, epoch_repeats)
    keys = [key for step in sampler for key in step]
    assert len(keys) == 58 * passes and len({(key.index, key.repeat) for key in keys}) == len(keys)
    counts = np.bincount(classes[[key.index for key in keys]])
    assert counts[2] == 0 and all(19 * passes <= counts[label] <= 20 * passes for label in (0, 1, 3))
    of_class = Counter(key.index for key in keys[:58] if classes[key.index] == 1)
    assert set(of_class.values()) <= {2, 3}  # all of a class in turn
    assert keys == [key for step in sampler for key in step]
    sampler.set_epoch(1)
    other = list(sampler)
    assert [key.index for step in other for key in step] != [key.index for key in keys]
    sampler.set_epoch(1, 3)
    assert list(sampler) == other[3:]
    two = [list(StepSampler(58, 4, rank=r, world_size=2, epoch_repeats=epoch_repeats, classes=classes)) for r in (0, 1)]
    together = [sorted(a + b, key=lambda key: key.position) for a, b in zip(*two)]
    assert [key for step in together for key in step] == keys
