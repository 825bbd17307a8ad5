import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.random_erasing import RandomErasing

from timm_amf.data.sampler import Key
from timm_amf.data.transforms import (
    SeededRandomErasing,
    adapt_transform,
    kept_random_state,
    posterize,
    sample_seed,
    seed_globals,
)


def noise(size=(40, 30), mode='RGB', seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def random_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_seeds_differ_in_everything_that_a_draw_depends_on():
    key = Key(epoch=3, index=5, repeat=0, position=2, step_size=32)
    seeds = {sample_seed(*args) for args in (
        (42, key), (43, key), (42, key._replace(epoch=4)), (42, key._replace(index=6)), (42, key._replace(repeat=1)),
        (42, key, 1), (42, key._replace(epoch=5, index=3)))}
    assert len(seeds) == 7
    assert sample_seed(42, key._replace(position=9, step_size=7)) == sample_seed(42, key)
    many = np.array([sample_seed(0, Key(e, i, 0, 0, 0)) for e in range(20) for i in range(500)], dtype=np.uint64)
    assert len(np.unique(many & np.uint64(0xFFFFFFFF))) > 9990  # numpy's seed has 32 bits
    bits = (many[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.03


def test_seeds_are_splitmix64_chained():
    chained = 0
    for value in (1, 2, 3, 4, 5):
        chained = (chained + value + 0x9E3779B97F4A7C15) % 2 ** 64
        chained = ((chained ^ (chained >> 30)) * 0xBF58476D1CE4E5B9) % 2 ** 64
        chained = ((chained ^ (chained >> 27)) * 0x94D049BB133111EB) % 2 ** 64
        chained ^= chained >> 31
    assert sample_seed(1, Key(2, 3, 4, 0, 0), 5) == chained


def test_random_state_is_kept():
    before = random_state()
    with kept_random_state():
        seed_globals(5)
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
    assert random_state() == before
    with pytest.raises(KeyError), kept_random_state():
        seed_globals(5)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
        raise KeyError
    assert random_state() == before


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('bits', [-4, 0, 1, 8])
def test_posterize_is_what_older_pillow_made(mode, bits):
    image = noise(mode=mode)
    # Pillow 9: mask = ~(2 ** (8 - bits) - 1), applied to each pixel value
    expected = np.asarray(image) & (~(2 ** (8 - min(bits, 8)) - 1) & 0xFF)
    assert np.array_equal(posterize(image, bits), expected)


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', 'v0', 'augmix-m5-w4-d2'])
def test_every_posterize_of_a_policy_is_guarded(policy):
    transform = adapt_transform(create_transform(32, is_training=True, auto_augment=policy, use_prefetcher=True))
    found = []

    def visit(node):  # by brute force through whatever attributes there are
        if isinstance(node, auto_augment.AugmentOp):
            found.append(node)
        elif isinstance(node, (list, tuple)):
            for child in node:
                visit(child)
        elif hasattr(node, '__dict__'):
            for child in vars(node).values():
                if isinstance(child, (list, tuple)) or type(child).__module__.startswith('timm'):
                    visit(child)

    visit(transform.transforms)
    posterizing = [op for op in found if op.name.startswith('Posterize')]
    assert posterizing and all(op.aug_fn is posterize for op in posterizing)
    assert auto_augment.NAME_TO_OP['Posterize'] is auto_augment.posterize  # timm's own is left alone


@pytest.mark.parametrize('mode', ['const', 'rand', 'pixel'])
def test_erasing_is_timms_for_each_image_alone(mode):
    keys = [Key(1, i, 0, i, 6) for i in range(6)]
    images = torch.randn(6, 3, 20, 24)
    before = random_state()
    out = SeededRandomErasing(0.7, mode=mode, max_count=3, device='cpu', seed=9)(images.clone(), keys)
    assert random_state() == before
    timms = RandomErasing(0.7, mode=mode, max_count=3, device='cpu')
    for i, key in enumerate(keys):
        with kept_random_state():
            seed = sample_seed(9, key, 1)
            random.seed(seed)
            torch.manual_seed(seed)
            assert torch.equal(out[i], timms(images[i].clone()))
    assert 0 < (out != images).flatten(1).any(1).sum() < 6
    # nothing depends on the other images of the batch
    part = SeededRandomErasing(0.7, mode=mode, max_count=3, device='cpu', seed=9)(images[2:4].clone(), keys[2:4])
    assert torch.equal(part, out[2:4])


def test_erasing_spares_the_first_part_of_the_step():
    erasing = SeededRandomErasing(1., mode='const', num_splits=2, device='cpu')
    images = torch.ones(3, 3, 20, 20)
    for rank in (0, 1):
        keys = [Key(0, i, 0, position, 6) for i, position in enumerate(range(rank, 6, 2))]
        erased = (erasing(images.clone(), keys) == 0).flatten(1).any(1).tolist()
        assert erased == [key.position >= 3 for key in keys]
    # with augmentation splits: the first split
    keys = [Key(0, i, 0, i, 2) for i in range(2)]
    erased = (erasing(torch.ones(4, 3, 20, 20), keys, splits=2) == 0).flatten(1).any(1).tolist()
    assert erased == [False, False, True, True]
