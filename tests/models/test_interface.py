"""timm's model interface on pairs of unlike kinds; timm's own tests cover the registered models."""
import copy
import json

import pytest
import timm
import torch
from timm.models import FeatureInfo, create_feature_extractor, get_graph_node_names

from timm_amf.errors import UserError
from timm_amf.models import blocks

PAIRS = {
    'maps': ('test_resnet', 'test_resnet'),
    'tokens': ('test_vit', 'test_vit'),
    'norm after pooling': ('test_convnext', 'test_convnext'),
    'wider head': ('test_mambaout', 'test_mambaout'),
    'mixed': ('test_resnet', 'test_vit'),
    'three': ('test_efficientnet', 'test_convnext', 'test_byobnet'),
}


def pairs(*names):
    return pytest.mark.parametrize('model', names, indirect=True)


@pytest.fixture(params=PAIRS)
def model(request):
    backbones = PAIRS[request.param]
    # With a dynamic size the plain ViT is no more traceable than the composite.
    kwargs = [{'dynamic_img_size': False} if b == 'test_vit' else {} for b in backbones]
    return timm.create_model(
        'amf', backbones=backbones, backbone_kwargs=kwargs, policy='test_efficientnet', num_classes=3).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 160, 160)


@pairs('maps', 'wider head', 'mixed', 'three')
@torch.no_grad()
def test_script_and_trace(model, x):
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-4)
    node = get_graph_node_names(model)[1][-1]
    traced = create_feature_extractor(model, [node])
    torch.testing.assert_close(traced(x)[node], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_intermediates(model, x):
    final, levels = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=1e-4, atol=1e-5)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    assert [t.shape[1] for t in levels] == info.channels()
    assert [t.shape[2] for t in levels] == [160 // r for r in info.reduction()]
    # The maps of each branch, weighted as its pooled features are.
    weights = model.forward_policy(x)
    start = 0
    for i, (branch, own, renorm) in enumerate(zip(model.branches, model._levels, model.renorms)):
        mine = branch.forward_intermediates(renorm(x), indices=[own[-1]], intermediates_only=True)[0]
        mine = mine * weights[:, i, None, None, None]
        torch.testing.assert_close(levels[-1][:, start:start + mine.shape[1]], mine, rtol=1e-4, atol=1e-5)
        start += mine.shape[1]
    nhwc = model.forward_intermediates(x, indices=1, intermediates_only=True, output_fmt='NHWC')[0]
    torch.testing.assert_close(nhwc, levels[-1].permute(0, 2, 3, 1))
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)[0]
    torch.testing.assert_close(early, levels[0])


@pytest.mark.parametrize('pair', PAIRS)
def test_features_only(pair, x):
    features = timm.create_model('amf', backbones=PAIRS[pair], policy='test_efficientnet', features_only=True)
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    sum(m.sum() for m in maps).backward()
    assert not [n for n, p in features.named_parameters() if p.grad is None]


@pairs('wider head', 'mixed', 'three')
def test_every_parameter_learns_on_bf16(model, x):
    model.bfloat16().train()
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pairs('mixed', 'three')
def test_autocast(model, x):
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        y = model(x)
    with torch.no_grad():
        torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)


def test_policy_of_smaller_input_on_bf16(x):
    model = timm.create_model('amf', backbones=PAIRS['maps'], policy='test_vit', policy_input_size=64, num_classes=3)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    model = model.float().eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pairs('mixed')
def test_deepcopy_and_state(model, x):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    assert not torch.equal(other(x), model(x))
    assert not any(k.startswith('renorms') or '.renorm.' in k for k in model.state_dict())


@pairs('maps', 'tokens', 'mixed', 'three')
@torch.no_grad()
def test_pruned_levels_equal_the_whole_models(model, x):
    last = len(model.feature_info) - 1
    expected = model.forward_intermediates(x, intermediates_only=True)
    for i in range(last + 1):
        pruned = copy.deepcopy(model)
        take = pruned.prune_intermediate_layers([i])
        torch.testing.assert_close(pruned.forward_intermediates(x, indices=take, intermediates_only=True)[0],
                                   expected[i], rtol=1e-4, atol=1e-5)


def test_no_common_level():
    model = timm.create_model('amf', backbones=('test_resnet', 'eva02_tiny_patch14_224'), policy='test_resnet',
                              num_classes=2, device='meta')
    assert model.feature_info == []
    with pytest.raises(UserError, match='no level of features in common'):
        model.forward_intermediates(torch.empty(1, 3, 224, 224, device='meta'))


def test_drop_rate():
    model = timm.create_model('amf', backbones=PAIRS['maps'], policy='test_resnet', num_classes=3, drop_rate=0.5)
    assert model.head_drop.p == 0.5
    z = torch.ones(64, model.num_features, 1, 1)
    dropped = model.train().forward_head(z, pre_logits=True)
    assert 0.4 < (dropped == 0).float().mean() < 0.6


# -- AMF and SpotTune alike -------------------------------------------------------------------------------------------

SMALL = {
    'amf': dict(backbones=('test_resnet',) * 2, policy='test_efficientnet'),
    'spottune': dict(backbone='test_resnet', policy='test_efficientnet'),
}


def create(name, **kwargs):
    return timm.create_model(name, **{**SMALL[name], **kwargs})


@pytest.mark.parametrize('name', SMALL)
def test_device_of_construction(name):
    model = create(name, device='meta', dtype=torch.float16)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {'meta'}
    assert {t.dtype for t in model.parameters()} == {torch.float16}


def test_creation_within_inference_mode():
    blocks._probes.clear()
    with torch.inference_mode():
        assert create('amf', num_classes=3)(torch.randn(1, 3, 160, 160)).shape == (1, 3)


@pytest.mark.parametrize('name', SMALL)
def test_reset_classifier_keeps_type_mode_and_what_is_frozen(name):
    model = create(name, num_classes=4, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    next(model.parameters()).requires_grad_(False)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    model.reset_classifier(6)
    head = model.get_classifier()
    assert head.weight.dtype == torch.float64 and not head.training and head.weight.requires_grad
    assert frozen and {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    assert model.num_classes == 6 and model(x).shape == (2, 6)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, '')
    assert model(x).shape == (2, model.num_features, 2, 2)


@pytest.mark.parametrize('name, kwargs', [
    ('amf', dict(backbones=('test_resnet', 'test_vit'), backbone_kwargs=[{'block_args': {}}, {'depth': 2}],
                 policy_kwargs={'pad_type': 'same'}, policy_input_size=64)),
    ('spottune', dict(backbone='test_vit', policy='test_resnet', backbone_kwargs={'depth': 3}, policy_input_size=48,
                      first_block=1, temperature=2.)),
])
def test_a_config_alone_rebuilds_the_model(name, kwargs, x):
    model = create(name, num_classes=5, **kwargs)
    config = json.loads(json.dumps(dict(model_args=model._model_args, pretrained_cfg=model.pretrained_cfg)))
    again = timm.create_model(name, pretrained_cfg=config['pretrained_cfg'], **config['model_args'])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert name == 'amf' or again.temperature == 2.


@pytest.mark.parametrize('name, kwargs, words', [
    ('amf', dict(backbones=('resnet17', 'resnet18')), ('resnet17', 'resnet18')),
    ('amf', dict(backbones='resnet18'), ('backbones', 'resnet18')),
    ('amf', dict(backbones=()), ('backbones',)),
    ('amf', dict(policy='nothing_like_it'), ('nothing_like_it', 'list_models')),
    ('amf', dict(backbones=('resnet18.nope',) * 2), ('resnet18', 'nope', 'a1_in1k')),
    ('amf', dict(backbone_kwargs=[{}]), ('backbone_kwargs', '1', '2')),
    ('amf', dict(backbone_kwargs={'no_such_thing': 1}), ('test_resnet', 'no_such_thing')),
    ('amf', dict(policy_kwargs=3), ('test_efficientnet', '3')),
    ('amf', dict(backbones=('test_resnet', 'csatv2'), backbone_kwargs={'global_pool': ''}), ('test_resnet', 'pooled')),
    ('amf', dict(img_size=8, backbones=('inception_v3',) * 2), ('inception_v3', '3x8x8')),
    ('spottune', dict(backbone='resnet17'), ('resnet17', 'resnet18')),
    ('spottune', dict(backbone='mvitv2_tiny'), ('mvitv2_tiny', 'cannot be routed', 'one tensor')),
    ('spottune', dict(routing='sparse'), ('routing', 'sparse', 'both')),
])
def test_mistakes_are_one_line_that_names_them(name, kwargs, words):
    with pytest.raises(UserError) as e:
        create(name, **kwargs)
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value


@pytest.mark.parametrize('name, kwargs', [
    ('amf', dict(not_an_argument=1)), ('multitune', dict(not_an_argument=1)), ('multitune', dict(policy='resnet10t')),
    ('spottune_resnet18', dict(not_an_argument=1))])
def test_unknown_keywords(name, kwargs):
    with pytest.raises(TypeError):
        timm.create_model(name, device='meta', **kwargs)
