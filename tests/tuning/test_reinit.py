"""The last blocks start anew with what the architecture's own constructor gives; all else stays to the bit."""
import copy

import pytest
import timm
import torch
from torch import nn

from timm_amf import Plan, UserError, create_optimizer, list_blocks
from timm_amf.tuning.reinit import reinit
from timm_amf.tuning.resolve import resolve
from timm_amf.tuning.roles import role_blocks

SEED = 5


def plan(k, role='backbone', **settings):
    return Plan(roles={role: dict(reinit_blocks=k, **settings)})


def build(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=3, **kwargs)


def trained(model):
    """A model none of whose tensors is as its constructor made it."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.ones_like(tensor) if not tensor.is_floating_point() else torch.full_like(tensor, 0.125))
    return model


def meta(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, num_classes=3, **kwargs)


@pytest.mark.parametrize('k, blocks', [(1, {'21'}), (2, {'20', '21'})])
def test_the_papers_layers_of_inception_v4(k, blocks):
    """k = 0, 1, 2 are the 1, 2, 3 layers of the paper: the classifier, and features.21, features.20."""
    model = meta('inception_v4')
    names = resolve(model, plan(k)).reinitialised
    expected = [n for n in model.state_dict() if n.split('.')[0] == 'features' and n.split('.')[1] in blocks]
    assert sorted(names) == sorted(expected)
    assert resolve(model, plan(0)).reinitialised == []


# A norm and a conv_head after the last block; a downsampling layer between blocks; buffers that are no statistics.
ARCHITECTURES = [
    ('resnet18', 2, ('layer4.0.', 'layer4.1.')),
    ('mobilenetv2_100', 1, ('blocks.6.0.', 'conv_head.', 'bn2.')),
    ('vit_tiny_patch16_224', 2, ('blocks.10.', 'blocks.11.', 'norm.')),
    ('convnext_atto', 1, ('stages.3.blocks.1.', 'head.norm.')),
    ('convnext_atto', 2, ('stages.3.downsample.', 'stages.3.blocks.', 'head.norm.')),
    ('swin_tiny_patch4_window7_224', 1, ('layers.3.blocks.1.', 'norm.')),
    ('efficientnet_b0', 1, ('blocks.6.0.', 'conv_head.', 'bn2.')),
]


@pytest.mark.parametrize('name, k, prefixes', ARCHITECTURES)
def test_what_is_among_the_last_blocks(name, k, prefixes):
    model = meta(name)
    everything = [n for n, _ in [*model.named_parameters(), *model.named_buffers()]]
    names = set(resolve(model, plan(k)).reinitialised)
    assert names == {n for n in everything if n.startswith(prefixes)}


@pytest.mark.parametrize('name, k', [
    ('test_resnet', 1), ('test_vit', 1), ('test_convnext', 2), ('test_efficientnet', 2),
])
def test_equal_to_a_fresh_build_and_the_rest_untouched(name, k):
    model = trained(build(name))
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    names = reinit(model, plan(k), SEED)
    assert torch.equal(torch.get_rng_state(), random_state)
    fresh = build(name, SEED).state_dict()
    after = model.state_dict()
    assert names
    for key, value in after.items():
        assert torch.equal(value, (fresh if key in names else before)[key]), key
        assert torch.equal(value, before[key]) == (key not in names), key
    statistics = [n for n in names if n.endswith('running_var')]
    assert all(torch.equal(after[n], torch.ones_like(after[n])) for n in statistics)
    assert bool(statistics) == (name in ('test_resnet', 'test_efficientnet'))

    again = trained(build(name))
    reinit(again, plan(k), SEED)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), after.values()))


def test_own_initialisation_is_not_a_modules_default():
    """timm's residual networks start the last norm of each block at zero, which no module's reset does."""
    model = trained(build('test_resnet'))
    reinit(model, plan(1))
    last = role_blocks(model, 'backbone')[-1]
    norms = [m for m in model.get_submodule(last).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and any(m.weight.abs().max() == 0 for m in norms)


def test_one_branch_of_a_composite():
    model = trained(build('amf', backbones=('test_resnet', 'test_vit'), policy='test_resnet'))
    before = copy.deepcopy(model.state_dict())

    def fresh():
        return timm.create_model('amf', backbones=('test_resnet', 'test_vit'), policy='test_resnet')

    settings = Plan(roles={'branch.1': dict(reinit_blocks=1), 'policy': dict(reinit_blocks=1)})
    names = reinit(model, settings, SEED, fresh)
    last = [role_blocks(model, role)[-1] for role in ('branch.1', 'policy')]
    tails = ('branches.1.norm.', 'branches.1.fc_norm.', 'policy.net.fc.')
    assert names and all(n.startswith((f'{last[0]}.', f'{last[1]}.', *tails)) for n in names)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in names), key


def test_the_stem_never_starts_anew():
    model = meta('resnet18')
    names = resolve(model, plan(len(list_blocks(model)))).reinitialised
    assert {n.split('.')[0] for n in names} == {'layer1', 'layer2', 'layer3', 'layer4'}


def test_re_initialised_blocks_decay_to_zero_and_the_others_to_their_start():
    model = build('test_resnet')
    count = len(list_blocks(model))
    settings = Plan(weight_decay=0.5, roles=dict(backbone=dict(reinit_blocks=2, l2sp_alpha=0.1)))
    names = set(reinit(model, settings))
    groups = create_optimizer(model, settings).param_groups
    for group in groups:
        for name, p in zip(group['param_names'], group['params']):
            beta = name in names or name.startswith('fc')
            decay = (0.5, 0.) if beta else (0., 0.1)
            assert (group['weight_decay'], group['l2sp_alpha']) == (decay if p.ndim > 1 else (0., 0.)), name
    assert count > 2


@pytest.mark.parametrize('model, words', [
    (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), ['Sequential', 'build anew', 'fresh']),
    ('test_resnet', ['ResNet', 'cannot be built anew', 'shape', 'fresh']),
])
def test_a_model_that_cannot_be_built_anew_is_refused(model, words):
    if isinstance(model, str):
        model = build(model, channels=(8, 16, 16, 24))  # not what the name alone gives
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as error:
        reinit(model, plan(1))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize('settings, words', [
    (dict(reinit_blocks=9), ['reinit_blocks', '9', '8 blocks']),
    (dict(l2sp_alpha=0.1, l2sp_blocks=9), ['l2sp_blocks', '9', '8 blocks']),
    (dict(l2sp_alpha=0.1, l2sp_blocks=7, reinit_blocks=2), ['l2sp_blocks', '7', 'only 6', 'starting point']),
    (dict(l2sp_blocks=3), ['l2sp_alpha']),
])
def test_depths_that_the_model_has_not(settings, words):
    with pytest.raises(UserError) as error:
        create_optimizer(meta('resnet18'), Plan(roles=dict(backbone=settings)))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert '\n' not in str(error.value)
