"""LoRA: only adapters train, and what is left of it is a plain model with the same logits."""
import copy

import pytest
import timm
import torch
from torch import nn

from timm_amf import Plan, UserError
from timm_amf.tuning import apply_freeze, create_optimizer
from timm_amf.tuning.lora import add_lora, merge_lora, merged_state
from timm_amf.tuning.resolve import resolve

pytest.importorskip('peft')
MODELS = ('test_resnet', 'test_vit', 'amf', 'spottune')


def build(name):
    torch.manual_seed(0)
    if name == 'amf':
        return timm.create_model('amf', num_classes=3, backbones=('test_resnet', 'test_vit'), policy='test_resnet')
    if name == 'spottune':
        return timm.create_model('spottune', num_classes=3, backbone='test_resnet', policy='test_resnet')
    return timm.create_model(name, num_classes=3, **({'zero_init_last': False} if name == 'test_resnet' else {}))


def adapted(name, rank=2, **settings):
    role = {'amf': 'branch', 'spottune': 'tuned'}.get(name, 'backbone')
    model, plan = build(name), Plan(lr=0.1, roles={role: dict(lora_rank=rank, **settings)})
    assert add_lora(model, resolve(model, plan), seed=1)
    return model, resolve(model, plan)


def train(model, table):
    apply_freeze(model, table)
    optimizer = create_optimizer(model, table)
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(4, 3, 96, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize('name', MODELS)
def test_merged_is_the_plain_model(name):
    size = 160 if name in ('test_vit', 'amf') else 96
    model, table = adapted(name)
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():  # an adapter starts at zero
        torch.testing.assert_close(model.eval()(images), build(name).eval()(images))
    for module in model.modules():  # as if it had trained
        if hasattr(module, 'lora_B'):
            nn.init.normal_(module.lora_B['default'].weight, std=0.3)
    plain = build(name).eval()
    before = plain(images)
    plain.load_state_dict(merged_state(model))
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before, expected, atol=1e-3)
        merge_lora(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_only_adapters_and_the_classifier_train():
    model, table = adapted('test_resnet', train=['layer3.0', 'tail'])
    convolutions = {n for n, m in build('test_resnet').layer3[0].named_modules() if isinstance(m, nn.Conv2d)}
    expected = {'fc.weight', 'fc.bias', *(
        f'layer3.0.{n}.lora_{x}.default.weight' for n in convolutions for x in 'AB')}
    assert {n for n, s in table.parameters.items() if s.trains} == expected
    before = copy.deepcopy(model.state_dict())
    train(model, table)
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == expected


def test_delta_is_the_product():
    """The merged weight is W + B A, for a linear layer and a convolution, in float64 by hand."""
    for name, path in (('test_vit', 'blocks.0.attn.qkv'), ('test_resnet', 'layer2.0.conv1')):
        model, _ = adapted(name)
        layer = model.get_submodule(path)
        nn.init.normal_(layer.lora_B['default'].weight)
        a, b = (layer.get_submodule(f'lora_{x}.default').weight.double() for x in 'AB')
        product = torch.einsum('or,rikl->oikl', b[:, :, 0, 0], a) if a.ndim == 4 else b @ a
        expected = layer.base_layer.weight.double() + product
        torch.testing.assert_close(merged_state(model)[f'{path}.weight'].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('roles, message', [
    ({'head': dict(lora_rank=2)}, 'head, which is new'),
    ({'backbone': dict(lora_rank=2, reinit_blocks=1)}, 'which has reinit_blocks'),
    ({'backbone': dict(lora_rank=2, train='none')}, 'no linear layer or convolution'),
])
def test_what_cannot_be(roles, message):
    model, plan = build('test_resnet'), Plan(roles=roles)
    with pytest.raises(UserError, match=message):
        add_lora(model, resolve(model, plan), 0)
