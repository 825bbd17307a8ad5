import copy
import logging

import pytest
import timm
import torch
from architectures import ARCHITECTURES
from safetensors.torch import save_file
from spottune_sweep import COLUMNS, FILE, NAMES, check_architecture, error, problem, read, spread, told
from test_routed_block import BACKBONES, choose, create, images
from timm.models import FeatureInfo, create_feature_extractor, get_graph_node_names, group_parameters
from timm.models._input import get_model_input_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import timm_amf
from timm_amf.errors import UserError
from timm_amf.models import SpotTune, list_blocks
from timm_amf.models.method import RunSettings
from timm_amf.models.policy import gumbel_noise, straight_through

# -- the policy -------------------------------------------------------------------------------------------------------


def test_samples_match_the_distribution():
    """Chi-square over 100,000 draws of three blocks of an image; 13.8 is its 0.999 quantile of two degrees of freedom,
    10.8 of one.
    """
    logits = torch.tensor([[0.3, -1.2], [0., 0.], [-2., 1.5]])
    draws = 100_000
    for temperature in (0.5, 5.):  # which does not change what is drawn
        many = logits.expand(draws, 3, 2)
        samples = straight_through(many, gumbel_noise(many), temperature)
        assert torch.equal(samples.sum(-1), torch.ones(draws, 3)) and set(samples.unique().tolist()) == {0., 1.}
        expected = logits.softmax(-1) * draws
        chi_square = ((samples.sum(0) - expected) ** 2 / expected).sum(-1)
        assert (chi_square < 10.8).all(), chi_square
    three = torch.tensor([1., 0., -1.]).expand(draws, 3)
    counts = straight_through(three, gumbel_noise(three), 5.).sum(0)
    expected = three[0].softmax(0) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 13.8


def test_its_gradient_is_the_relaxed_ones():
    """d softmax((a + g) / t)_1 / d a = y_1 (1 - y_1) / t for the tuned copy's, the negative for the frozen one's."""
    logits = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    noise = gumbel_noise(logits.detach())
    upstream = torch.randn(5, 3, dtype=torch.float64)
    for temperature in (0.7, 5.):
        logits.grad = None
        (straight_through(logits, noise, temperature)[..., 1] * upstream).sum().backward()
        difference = (logits + noise).detach().diff(dim=-1)[..., 0] / temperature
        y = 1 / (1 + torch.exp(-difference))
        slope = upstream * y * (1 - y) / temperature
        torch.testing.assert_close(logits.grad, torch.stack([-slope, slope], -1), rtol=1e-12, atol=1e-14)


def test_decisions():
    model = create().eval()
    x = images()
    logits = model.forward_policy(x)
    assert logits.shape == (4, 4, 2)
    likelier = (logits[..., 1] > logits[..., 0]).float()
    assert torch.equal(model.forward_shares(x), likelier)
    z, shares, probabilities = model.forward_train(x, RunSettings()).values()
    torch.testing.assert_close(probabilities, (logits[..., 1] - logits[..., 0]).sigmoid())
    assert torch.equal(shares, likelier) and torch.equal(z, model(x))
    model.train()
    drawn = torch.stack([model.forward_shares(x) for _ in range(50)])
    assert 0.1 < drawn.mean() < 0.9 and drawn.requires_grad and set(drawn.unique().tolist()) == {0., 1.}


def test_the_policy_sees_the_image_as_it_was_trained():
    """A policy of other statistics, at a size of its own."""
    model = create('test_vit', policy='test_resnet', policy_input_size=48).eval()
    seen = []
    model.policy.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.policy.net.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    raw = torch.rand(2, 3, SIZE_OF_VIT, SIZE_OF_VIT)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    model((raw - mean) / std)
    cfg = model.policy.net.pretrained_cfg
    small = nn.functional.interpolate(raw, (48, 48), mode='bilinear', antialias=True)
    expected = (small - torch.tensor(cfg['mean']).view(1, 3, 1, 1)) / torch.tensor(cfg['std']).view(1, 3, 1, 1)
    torch.testing.assert_close(seen[-1], expected, rtol=1e-3, atol=1e-4)
    assert cfg['mean'] != model.pretrained_cfg['mean'] or len(seen) == 1


SIZE_OF_VIT = 64


def test_sampling_in_evaluation():
    model = create().eval()
    x = images()
    assert torch.equal(model(x), model(x))
    runs = []
    for seed in (1, 1, 2):
        model.set_sampling(seed)
        torch.manual_seed(len(runs))  # of no effect
        runs.append(torch.stack([model.forward_train(x, RunSettings())['shares'] for _ in range(20)]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert runs[0].var(0).any()
    likelihood = model.forward_policy(x).softmax(-1)[..., 1]
    assert (torch.cat([runs[0], runs[2]]).mean(0) - likelihood).abs().max() < 0.4
    model.set_sampling(None)
    assert torch.equal(model.forward_shares(x), (likelihood > 0.5).float())


# -- fixed paths, compact models --------------------------------------------------------------------------------------


def test_set_blocks():
    model = create().eval()
    x = images()
    names = model.block_names

    def taken(blocks):
        model.set_blocks(blocks)
        shares = model.forward_train(x, RunSettings())['shares']
        assert torch.equal(shares, shares[:1].expand_as(shares))
        return shares[0].tolist()

    assert taken('tuned') == [1, 1, 1, 1] and taken('frozen') == [0, 0, 0, 0] and taken([]) == [0, 0, 0, 0]
    assert taken([0, -1]) == [1, 0, 0, 1]
    assert taken([names[1], 'layer3.0', 1]) == [0, 1, 1, 0]
    model.set_blocks(None)
    assert torch.equal(model.forward_shares(x), (model.forward_policy(x).diff(dim=-1)[..., 0] > 0).float())


@pytest.mark.parametrize('blocks,words', [
    (['layer9.0'], ('layer9.0', 'layer4.0')), ([4], ('4', 'layer1.0')), ([-5], ('-5',)), ('all', ('all', 'tuned')),
])
def test_blocks_that_are_not_there(blocks, words):
    model = create()
    for call in (model.set_blocks, model.compact):
        with pytest.raises(UserError) as e:
            call(blocks)
        assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value


@pytest.mark.parametrize('backbone', BACKBONES)
def test_compact(backbone):
    model = create(backbone).eval()
    x = images()
    for blocks in ('frozen', [0, 2], 'tuned'):
        model.set_blocks(blocks)
        compact = model.compact(blocks)
        with torch.no_grad():
            assert error(compact(x), model(x)) < 1e-5
            model.routing = 'both'
            assert error(compact(x), model(x)) < 1e-6
            model.routing = 'auto'
    size = dict(img_size=64) if 'vit' in backbone else {}
    plain = timm.create_model(backbone, num_classes=3, **size)
    assert type(compact) is type(plain) and compact.state_dict().keys() == plain.state_dict().keys()
    assert not any(type(m).__module__.startswith('timm_amf') for m in compact.modules())
    assert not any('timm_amf' in str(getattr(m.train, 'func', '')) for m in compact.modules())
    assert not compact.training and compact.num_classes == 3
    # Not the same memory: training one leaves the other as it is.
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in compact.parameters()}
    loaded = timm.create_model(backbone, num_classes=3, **size).eval()
    loaded.load_state_dict(compact.state_dict())
    assert torch.equal(loaded(x), compact(x))


def test_compact_by_use():
    model = create().eval()
    model.tuned_share.copy_(torch.tensor([0.2, 0.9, 0.6, 0.7]))
    assert model.chosen_blocks() == (1, 2, 3) and model.chosen_blocks(2) == (1, 3) and model.chosen_blocks(0) == ()
    for given, blocks in ((None, [1, 2, 3]), (2, [1, 3]), (1, ['layer2.0']), (4, 'tuned')):
        got, expected = model.compact(given).state_dict(), model.compact(blocks).state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in got.items())
    with pytest.raises(UserError, match='k is 5'):
        model.compact(5)


def test_compact_says_how_its_input_is_normalised():
    """Its own statistics, whatever those of the SpotTune were."""
    half = (0.3, 0.3, 0.3)
    model = create(pretrained_cfg_overlay=dict(mean=half, std=half)).eval()
    model.set_blocks('tuned')
    compact = model.compact('tuned')
    raw = torch.rand(2, 3, 64, 64)
    inputs = [
        (raw - torch.tensor(m.pretrained_cfg['mean']).view(1, 3, 1, 1))
        / torch.tensor(m.pretrained_cfg['std']).view(1, 3, 1, 1) for m in (model, compact)]
    assert not torch.allclose(*inputs)
    with torch.no_grad():
        assert error(compact(inputs[1]), model(inputs[0])) < 1e-5


def test_compact_keeps_what_it_was_built_with():
    kwargs = dict(in_chans=2, num_classes=7, global_pool='max', backbone_kwargs=dict(channels=(24, 32, 40, 48)))
    model = create(**kwargs, dtype=torch.float64).eval()
    x = torch.randn(2, 2, 64, 64, dtype=torch.float64)
    model.set_blocks([1])
    for num_classes in (7, 5, 0):
        model.reset_classifier(num_classes)
        compact = model.compact([1])
        assert compact.num_classes == num_classes == compact.pretrained_cfg['num_classes']
        assert compact.pretrained_cfg['mean'] == model.pretrained_cfg['mean']
        with torch.no_grad():
            assert error(compact(x), model(x)) < 1e-9
    assert model.train().compact('tuned').training


# -- what is frozen ---------------------------------------------------------------------------------------------------


def steps(model, count=3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for i in range(count):
        optimizer.zero_grad()
        model(images() * (i + 1)).square().mean().backward()
        optimizer.step()
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


@pytest.mark.parametrize('routing', ['auto', 'both'])
def test_the_frozen_path_is_frozen(routing):
    """By default its weights, affine parameters and statistics, and the stem's, stay; all else moves."""
    model = create(freeze=False, routing=routing)
    timm_amf.apply_freeze(model, timm_amf.Plan(lr=0.1))
    choose(model, torch.ones(4, 4).triu())
    moved = steps(model)
    everything = set(model.state_dict()) - {'tuned_share'}
    stem = {n for n in everything if n.startswith('backbone.') and '.frozen.' not in n and '.tuned.' not in n
            and not n.startswith('backbone.fc.')}
    frozen = {n for n in everything if '.frozen.' in n}
    assert frozen and stem and not moved & (frozen | stem)
    assert everything - frozen - stem == moved


def test_the_statistics_of_the_frozen_path_stay_by_themselves():
    """Without any Plan, in training mode."""
    model = create(freeze=False).train()
    before = [copy.deepcopy(block.state_dict()) for block in model.blocks_frozen]
    model(images())
    for block, old in zip(model.blocks_frozen, before):
        assert all(torch.equal(t, old[n]) for n, t in block.state_dict().items())


def test_the_published_codes_frozen_path():
    """Its batch norms train, affine parameters and statistics, and nothing else of it."""
    model = create(freeze=False, frozen_bn='official')
    timm_amf.apply_freeze(model, timm_amf.Plan(lr=0.1))
    choose(model, torch.ones(4, 4).triu().fill_diagonal_(0))
    moved = {n for n in steps(model) if '.frozen.' in n}
    norms = {
        f'{n}.{t}' for n, m in model.named_modules() if isinstance(m, _BatchNorm) and '.frozen.' in n
        for t in m.state_dict()}
    assert moved == norms
    assert not model._route.decision.routed  # which could not be exact
    with pytest.raises(UserError, match='frozen_bn'):
        create(frozen_bn='yes')


def test_first_block():
    """The blocks before it exist once and belong to the stem."""
    model = create('test_vit', freeze=False, first_block=4)
    assert model.block_names == ['backbone.blocks.4', 'backbone.blocks.5'] and len(model.routed_blocks) == 2
    assert model.forward_policy(images()).shape == (4, 2, 2)
    assert not any('blocks.3' in n and ('tuned' in n or 'frozen' in n) for n in model.state_dict())
    timm_amf.apply_freeze(model, timm_amf.Plan(lr=0.1))
    trainable = {n.split('.')[2] for n, p in model.named_parameters() if p.requires_grad and 'backbone.blocks' in n}
    assert trainable == {'4', '5'}
    whole = create('test_vit', freeze=False)
    block = sum(p.numel() for p in whole.blocks_tuned[0].parameters())
    policy = 4 * 2 * (whole.policy.get_classifier().in_features + 1)
    count = [sum(p.numel() for p in m.parameters()) for m in (whole, model)]
    assert count[0] - count[1] == 4 * block + policy
    for wrong in (-1, 6):
        with pytest.raises(UserError, match='choose 0 to 5'):
            create('test_vit', first_block=wrong)


def test_routed_follows_what_is_trained_and_loaded():
    """Evaluation between the steps of training, through loading, and through a change of type."""
    model = create().eval()
    x = images()

    def same():
        with torch.no_grad():
            model.routing = 'auto'
            routed = model(x.to(model.tuned_share.dtype))
            model.routing = 'both'
            assert error(routed, model(x.to(model.tuned_share.dtype))) < 1e-5
            model.routing = 'auto'
            return routed

    seen = [same()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # in evaluation mode, so that nothing but the step says that the weights are others
        model(x).square().mean().backward()
        optimizer.step()
        seen.append(same())
    model.train()
    model(x).square().mean().backward()
    model.eval()
    seen.append(same())  # the statistics moved
    torch.manual_seed(11)
    other = create().eval()
    spread(other)
    model.load_state_dict(other.state_dict())
    seen.append(same())
    torch.testing.assert_close(seen[-1], other(x))
    assert all(error(a, b) > 1e-4 for a, b in zip(seen, seen[1:]))
    model.double()
    assert same().dtype == torch.float64


# Those that are quick.
MODULES = ('dla', 'fasternet', 'ghostnet', 'levit', 'regnet', 'starnet')


@pytest.mark.parametrize('module', [
    pytest.param(m, marks=() if m in MODULES else pytest.mark.slow) for m in ARCHITECTURES])
def test_an_architecture_of_every_module_of_timm(module):
    """Works, or is refused with the reason, as the documentation's file says, which has more of them."""
    row = check_architecture(ARCHITECTURES[module])
    assert 'refused' in row or not problem(row), row
    assert module not in MODULES or row['blocks'] >= 2
    assert told(row) == read()[ARCHITECTURES[module]], 'run tests/models/spottune_sweep.py --names'


def test_the_documentations_file():
    """Is what the script writes, and what the page says of it."""
    rows = read()
    assert list(rows) == NAMES and all(tuple(row) == COLUMNS for row in rows.values())
    refused = sum(bool(row['refused']) for row in rows.values())
    modules = len({row['module'] for row in rows.values()})
    page = ' '.join((FILE.with_name('spottune.md')).read_text(encoding='utf-8').split())
    assert f'{len(rows)} small architectures, one to three of each of the {modules} model modules' in page
    assert f'{len(rows) - refused} work and {refused} are refused' in page


def test_a_part_in_another_mode():
    """Setting a copy, or the backbone, to a mode of its own holds."""
    class Noisy(nn.Sequential):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    model = create().eval()
    x = images()
    for parent in [model.backbone, *model.blocks_tuned]:
        for name, module in parent.named_children():
            if type(module) is nn.Sequential and len(module) and name == 'downsample':
                setattr(parent, name, Noisy(*module))
    model.set_blocks('tuned')
    with torch.no_grad():
        model.train()
        timm_amf.apply_freeze(model, timm_amf.Plan(lr=0.1, roles={'tuned': timm_amf.RolePlan(freeze_bn=True)}))
        assert not torch.equal(model(x), model(x))
        for block in model.blocks_tuned:
            block.eval()
        assert torch.equal(model(x), model(x))


# -- timm's interface -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('backbone', [
    'test_resnet', *(pytest.param(b, marks=pytest.mark.slow) for b in BACKBONES if b != 'test_resnet')])
def test_compile_without_a_graph_break(backbone):
    """To the dense form, training and evaluating."""
    model = create(backbone)
    x = images()
    torch._dynamo.reset()
    for mode in (False, True):
        model.train(mode)
        compiled = torch.compile(model, backend='eager', fullgraph=True)
        results = []
        for f in (model, compiled):
            torch.manual_seed(4)
            model.zero_grad()
            y = f(x)
            y.square().mean().backward()
            results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert not model._route.decision.routed
        for got, expected in zip(*results[::-1], strict=True):
            if got is not None and expected is not None:  # evaluating in two halves, some images take no tuned block
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_convnext', 'test_vit'])
@torch.no_grad()
def test_script_and_fx(backbone):
    model = create(backbone, backbone_kwargs={'dynamic_img_size': False} if 'vit' in backbone else {}).eval()
    scripted = torch.jit.script(model)
    for batch in (1, 3, 8):
        x = images(batch)
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)
    shares = model.forward_train(images(8), RunSettings())['shares']
    assert 0 < shares.mean() < 1  # of several minds, or nothing was shown
    node = get_graph_node_names(model)[1][-1]
    traced = create_feature_extractor(model, [node])
    torch.testing.assert_close(traced(images())[node], model(images()), rtol=1e-4, atol=1e-4)


def test_deepcopy_and_state():
    model = create().eval()
    x = images()
    expected = model(x)
    other = copy.deepcopy(model)  # after a forward pass, as an EMA is made
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    assert not torch.allclose(other(x), expected) and torch.equal(model(x), expected)
    assert other._route is other.routed_blocks[0].route is not model._route
    assert not any('renorm' in k or 'view' in k or 'fold' in k for k in model.state_dict())
    again = create().eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), expected)
    pointers = [p.data_ptr() for p in model.state_dict().values() if p.numel()]
    assert len(set(pointers)) == len(pointers)  # safetensors stores no tensor twice


@pytest.mark.parametrize('backbone', BACKBONES)
def test_classifier(backbone):
    model = create(backbone).eval()
    x = images()
    features = model.forward_features(x)
    assert features.ndim == 4 and features.shape[1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (4, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x), rtol=1e-4, atol=1e-4)
    model.reset_classifier(6)
    assert model(x).shape == (4, 6) and model.num_classes == 6
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, '')
    assert model(x).ndim == 4 and model(x).shape[1] == model.num_features
    model.reset_classifier(4, 'avg')
    assert model(x).shape == (4, 4)
    none = create(backbone, num_classes=0)
    assert none(x).shape == (4, none.head_hidden_size) and 'head' not in none.tuning_roles
    assert create(backbone, num_classes=0, global_pool='')(x).ndim == 4
    grey = create(backbone, in_chans=1, num_classes=2)
    assert grey(x[:, :1]).shape == (4, 2) and grey.in_chans == 1


@pytest.mark.parametrize('backbone', BACKBONES)
def test_intermediates(backbone):
    model = create(backbone).eval()
    x = images()
    choose(model, torch.zeros(4, len(model.block_names)).bernoulli_(0.5))
    with torch.no_grad():
        final, levels = model.forward_intermediates(x)
        model.routing = 'both'
        expected = model.forward_intermediates(x, intermediates_only=True)
        model.routing = 'auto'
        assert all(error(a, b) < 1e-5 for a, b in zip(levels, expected, strict=True))
        if not model.tokens:
            torch.testing.assert_close(final, model.forward_features(x))
        info = FeatureInfo(model.feature_info, len(model.feature_info))
        assert [t.shape[1] for t in levels] == info.channels()
        if 'vit' not in backbone:
            assert [x.shape[-1] // t.shape[-1] for t in levels] == info.reduction()
        for i in (0, len(levels) - 1):
            pruned = copy.deepcopy(model)
            choose(pruned, model.forward_shares(x))
            take = pruned.prune_intermediate_layers([i])
            got = pruned.forward_intermediates(x, indices=take, intermediates_only=True)[0]
            assert error(got, levels[i]) < 1e-5
            assert i or len(pruned.routed_blocks) < len(model.routed_blocks)


def test_a_level_between_a_convolution_and_its_norm():
    model = create('ghostnet_050').eval()
    x = images()
    with torch.no_grad():
        stem = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        torch.testing.assert_close(stem, model.backbone.conv_stem(model.renorm(x)))


def test_levels_within_a_block():
    model = create('xception41p', device='meta')
    with pytest.raises(UserError, match='xception41p.*compact'):
        model.forward_intermediates(images().to('meta'))
    assert not hasattr(model.routed_blocks[0], 'forward_with_nothing')


def test_features_only():
    for backbone in ('test_resnet', 'test_convnext', 'test_vit'):
        features = timm.create_model(
            'spottune', backbone=backbone, policy='test_efficientnet', policy_input_size=32, img_size=64,
            features_only=True)
        maps = features(images())
        assert [m.shape[1] for m in maps] == features.feature_info.channels() and len(maps) >= 3


def test_input_size():
    model = create('test_vit', policy='test_vit2', policy_input_size=None).eval()
    model.set_input_size(96)
    with torch.no_grad():
        x = torch.randn(2, 3, 96, 96)
        routed = model(x)
        assert routed.shape == (2, 3) and get_model_input_config(model)['input_size'] == (3, 96, 96)
        assert error(model.compact('tuned')(x), model.set_blocks('tuned') or model(x)) < 1e-5
    # A convolutional stem in a network of fixed size.
    model = create('vit_tiny_r_s16_p8_224', backbone_kwargs=dict(depth=2)).eval()
    with torch.no_grad():
        model(images())
        model.set_input_size(96)
        model.routing = 'both'
        both = model(x)
        model.routing = 'routed'
        assert error(model(x), both) < 1e-5


def test_roles():
    model = create('test_efficientnet', num_classes=3)
    roles = timm_amf.model_roles(model)
    assert set(roles) == {'stem', 'frozen', 'tuned', 'tail', 'policy', 'head'}
    assert roles['tail'] == ['backbone.conv_head', 'backbone.bn2'] and roles['head'] == ['backbone.classifier']
    assert [n for n in list_blocks(model)] == model.block_names
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    top = max(layers.values())
    assert layers['backbone.classifier.weight'] == layers['policy.net.classifier.weight'] == top
    for name in model.block_names:
        both = {layers[n] for n in layers if n.startswith(f'{name}.')}
        assert len(both) == 1
    assert layers['backbone.conv_stem.weight'] == 0
    names = {n for n, _ in create('test_vit', policy='test_vit').named_parameters()}
    assert {'backbone.pos_embed', 'policy.net.pos_embed'} <= create('test_vit', policy='test_vit').no_weight_decay() \
        & names


def test_registration():
    names = set(timm.list_models('spottune*'))
    assert names == {'spottune', *(f'spottune_{n}' for n in (
        'resnet26', 'resnet18', 'resnet50', 'resnet101', 'mobilenetv2_100', 'convnext_tiny',
        'vit_small_patch16_224'))}
    blocks = dict(resnet26=12, resnet50=16, mobilenetv2_100=17, convnext_tiny=18, vit_small_patch16_224=12)
    for name, count in blocks.items():
        model = timm.create_model(f'spottune_{name}', device='meta', num_classes=2)
        assert isinstance(model, SpotTune) and len(model.blocks_tuned) == len(model.blocks_frozen) == count


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    def write(name, model=None, **kwargs):
        path = tmp_path / f'{name}.safetensors'
        model = timm.create_model(name, **kwargs) if model is None else model
        save_file(model.state_dict(), path)
        return str(path), model
    return write


def same(state_dict, other, but=('fc.', 'head.', 'classifier.')):
    kept = {k: v for k, v in state_dict.items() if not k.startswith(but)}
    return bool(kept) and all(torch.equal(v, other[k]) for k, v in kept.items())


def copy_of(model, which):
    return {k.replace(f'.{which}.', '.'): v for k, v in model.backbone.state_dict().items()
            if not any(f'.{c}.' in k for c in {'frozen', 'tuned'} - {which})}


def test_weights_of_the_parts(weights):
    """Both copies start as the pretrained block, and the policy from its own file."""
    backbone, plain = weights('test_resnet')
    policy, net = weights('test_efficientnet')
    overlays = [dict(pretrained_cfg_overlay=dict(file=f)) for f in (backbone, policy)]
    model = timm.create_model(
        'spottune', pretrained=True, backbone='test_resnet', policy='test_efficientnet', num_classes=3,
        backbone_kwargs=overlays[0], policy_kwargs=overlays[1])
    for which in ('frozen', 'tuned'):
        assert same(copy_of(model, which), plain.state_dict())
    assert same(model.policy.net.state_dict(), net.state_dict())
    assert not model.policy.get_classifier().bias.any()
    with torch.no_grad():  # undecided at first
        likelihood = model.eval().forward_policy(images()).softmax(-1)
    assert 0.02 < likelihood.min()


def test_a_policy_that_has_no_published_weights(weights, caplog):
    backbone, plain = weights('test_resnet')
    with caplog.at_level(logging.INFO):
        model = timm.create_model(
            'spottune', pretrained=True, backbone='test_resnet', policy='resnet8_decathlon', num_classes=3,
            backbone_kwargs=dict(pretrained_cfg_overlay=dict(file=backbone)))
    assert 'resnet8_decathlon' in caplog.text and 'random weights' in caplog.text
    assert same(copy_of(model, 'tuned'), plain.state_dict())


def test_a_backbone_that_has_none_is_refused():
    with pytest.raises(UserError, match='resnet26_decathlon'):
        timm.create_model('spottune_resnet26', pretrained=True)


def test_a_checkpoint_of_the_whole_model(weights):
    kwargs = dict(backbone='test_resnet', policy='test_efficientnet', num_classes=3)
    path, model = weights('whole', create(policy_input_size=None))
    loaded = timm.create_model('spottune', pretrained=True, pretrained_cfg_overlay=dict(file=path), **kwargs)
    x = images()
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    more = timm.create_model(
        'spottune', pretrained=True, pretrained_cfg_overlay=dict(file=path), **{**kwargs, 'num_classes': 8})
    assert more.eval()(x).shape == (4, 8) and same(copy_of(more, 'tuned'), copy_of(model, 'tuned'))
    with pytest.raises(UserError, match='does not fit|no checkpoint'):
        timm.create_model(
            'spottune', pretrained=True, pretrained_cfg_overlay=dict(file=path), first_block=2, **kwargs)


def test_policy_resnet10_takes_its_blocks_from_a_resnet18(weights):
    path, plain = weights('resnet18')
    policy = timm.create_model('policy_resnet10', pretrained=True, pretrained_cfg_overlay=dict(file=path))
    state = plain.state_dict()
    own = policy.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in own.items())
    assert [len(layer) for layer in (policy.layer1, policy.layer2, policy.layer3, policy.layer4)] == [1, 1, 1, 1]
    assert policy.num_features == 512
