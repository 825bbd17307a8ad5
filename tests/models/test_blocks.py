import pytest
import timm
import torch
from torch import nn

from timm_amf.models import blocks, list_blocks
from timm_amf.models.blocks import classifier_names, is_within, layer_ids


def meta_model(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, device='meta', **kwargs)


def sequence(template, *counts):
    """`sequence('layer{}.{}', 2, 1)` is ['layer0.0', 'layer0.1', 'layer1.0']."""
    return [template.format(i, j) for i, n in enumerate(counts) for j in range(n)]


EXPECTED = {
    'resnet50': [f'layer{i + 1}.{j}' for i, n in enumerate((3, 4, 6, 3)) for j in range(n)],
    'resnet10t': [f'layer{i}.0' for i in range(1, 5)],
    'inception_v4': [f'features.{i}' for i in range(22)],
    'vgg11': [f'features.{i}' for i in (0, 3, 6, 8, 11, 13, 16, 18)],
    'vgg11_bn': [f'features.{i}' for i in (0, 4, 8, 11, 15, 18, 22, 25)],
    'vit_tiny_patch16_224': [f'blocks.{i}' for i in range(12)],
    'convnext_atto': sequence('stages.{}.blocks.{}', 2, 2, 6, 2),
    'swin_tiny_patch4_window7_224': sequence('layers.{}.blocks.{}', 2, 2, 6, 2),
    'mobilenetv2_100': sequence('blocks.{}.{}', 1, 2, 3, 4, 3, 3, 1),
    'efficientnet_b0': sequence('blocks.{}.{}', 1, 2, 2, 3, 3, 4, 1),
    'regnetx_002': [f's{i + 1}.b{j + 1}' for i, n in enumerate((1, 1, 4, 7)) for j in range(n)],
}


@pytest.mark.parametrize('name', EXPECTED)
def test_known_architectures(name):
    assert list_blocks(meta_model(name)) == EXPECTED[name]


def test_the_classifier_does_not_matter():
    for name in ('resnet18', 'vit_tiny_patch16_224', 'convnext_atto', 'mobilenetv3_small_050', 'vgg11', 'levit_128s'):
        model = meta_model(name)
        blocks = list_blocks(model)
        assert blocks == list_blocks(meta_model(name, num_classes=0))
        classifiers = classifier_names(model)
        assert classifiers and not any(is_within(c, blocks) for c in classifiers)


def test_execution_order():
    """Forward hooks see the blocks in the order of the list."""
    for name in ('test_resnet', 'test_convnext', 'test_vit', 'test_efficientnet', 'test_byobnet'):
        model, seen = timm.create_model(name).eval(), []
        for block in list_blocks(model):
            model.get_submodule(block).register_forward_hook(lambda *_, block=block, seen=seen: seen.append(block))
        with torch.no_grad():
            model(torch.randn(1, *model.pretrained_cfg['input_size']))
        assert seen == list_blocks(model)


def test_without_group_matcher():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.stages = nn.Sequential(*(nn.Sequential(self.block(), self.block()) for _ in range(2)))
            self.head = nn.Linear(8, 2)

        @staticmethod
        def block():
            class Block(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            return Block()

    model = Plain()
    assert list_blocks(model) == ['stages.0.0', 'stages.0.1', 'stages.1.0', 'stages.1.1']
    ids, top = layer_ids(model)
    assert ids['stem.weight'] == 0 and ids['stages.0.0.a.weight'] == 1 and ids['stages.1.1.b.bias'] == 4 and top == 5


def test_composite_lists_its_networks_in_turn():
    model = meta_model('amf', backbones=('test_resnet', 'test_vit'), policy='test_convnext')
    expected = [f'branches.0.{n}' for n in list_blocks(meta_model('test_resnet'))]
    expected += [f'branches.1.{n}' for n in list_blocks(meta_model('test_vit'))]
    expected += [f'policy.net.{n}' for n in list_blocks(meta_model('test_convnext'))]
    assert list_blocks(model) == expected
    assert list_blocks(model.policy) == [n.removeprefix('policy.') for n in expected if n.startswith('policy.')]


def test_an_architecture_is_built_once_on_meta(monkeypatch):
    built, original = [], blocks.meta_part

    def record(part, in_chans):
        built.append(part.name)
        return original(part, in_chans)

    monkeypatch.setattr(blocks, '_probes', {})
    monkeypatch.setattr(blocks, 'meta_part', record)
    for _ in range(2):
        model = timm.create_model('spottune', backbone='test_resnet', policy='test_vit', num_classes=7, img_size=160)
        model.group_matcher()
        timm.create_model('amf', backbones=('test_resnet',) * 2, policy='test_vit', num_classes=7)
    # A branch is without classifier.
    assert built == ['test_resnet', 'test_resnet']


def test_units_of_a_network():
    """The blocks and what lies between them, in order; of a frozen network, too, which is left as it is."""
    model = timm.create_model('test_resnet').requires_grad_(False).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    units = blocks.probe_units(model, (3, 64, 64))
    assert [u for u in units.order if u in list_blocks(model)] == list_blocks(model)
    assert units.order[0].startswith('conv1') and not units.refused and 'fc' not in units.order
    assert ('layer1.0.conv1', 'layer1.0.bn1') in units.pairs
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
