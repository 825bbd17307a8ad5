import pytest
import torch
from torch import nn

from timm_amf.models.renorm import Renormalize, channel_stats, create_renorm

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def normalize(image, mean, std):
    return (image - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


@pytest.mark.parametrize('source,target', [(HALF, IMAGENET), (IMAGENET, HALF)])
def test_equals_normalising_the_image_for_the_network(source, target):
    image = torch.rand(2, 3, 5, 7)
    renorm = create_renorm(*source, *target)
    torch.testing.assert_close(renorm(normalize(image, *source)), normalize(image, *target))


def test_nothing_at_all_where_statistics_agree():
    assert type(create_renorm(*IMAGENET, *IMAGENET)) is nn.Identity


@pytest.mark.parametrize('in_chans', [1, 4])
def test_other_channel_counts_use_the_average(in_chans):
    image = torch.rand(2, in_chans, 4, 4)
    stats = [(sum(s) / 3,) * in_chans for s in (*HALF, *IMAGENET)]
    renorm = create_renorm(*HALF, *IMAGENET, in_chans=in_chans)
    torch.testing.assert_close(renorm(normalize(image, *stats[:2])), normalize(image, *stats[2:]))
    assert channel_stats(0.5, in_chans) == (0.5,) * in_chans


def test_memory_format_and_state():
    renorm = create_renorm(*HALF, *IMAGENET)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert renorm(x).is_contiguous(memory_format=torch.channels_last)
    assert not renorm.state_dict() and not list(renorm.parameters())


def test_moves_keep_the_exact_statistics():
    renorm = create_renorm(*HALF, *IMAGENET)
    expected = renorm.scale.clone(), renorm.shift.clone()
    moved = renorm.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(moved.scale, expected[0]) and torch.equal(moved.shift, expected[1])
    empty = Renormalize(*HALF, *IMAGENET, device='meta').to_empty(device='cpu')
    assert torch.equal(empty.scale, expected[0]) and torch.equal(empty.shift, expected[1])
