"""What the block-wise search chooses from, against lists written by hand and the order in which modules are called."""
import itertools

import pytest
import timm
import torch
from torch import nn

from timm_amf import Plan, UserError
from timm_amf.search.candidates import (
    CUTS,
    Layer,
    Traced,
    baseline_candidates,
    candidate_parameters,
    candidate_plan,
    layer_candidates,
    random_candidate,
    top_candidate,
    window_candidates,
)
from timm_amf.tuning.resolve import resolve
from timm_amf.tuning.roles import model_roles, places

SIZE = (3, 64, 64)


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=3, **kwargs)


@pytest.fixture(scope='module')
def vgg():
    with torch.device('meta'):
        return build('vgg11')


@pytest.fixture(scope='module')
def resnet():
    return build('resnet18')


@pytest.fixture(scope='module')
def amf():
    return build('amf', backbones=('resnet10t', 'resnet10t'), policy='test_resnet')


def modules(layers):
    return [layer.modules for layer in layers]


def names(candidates):
    return [candidate.name for candidate in candidates]


def within(name, path):
    return not path or name == path or name.startswith(f'{path}.')


# --- Layers, by hand.

VGG11 = [*(f'features.{i}' for i in (0, 3, 6, 8, 11, 13, 16, 18)), 'pre_logits.fc1', 'pre_logits.fc2']


def resnet18_pairs():
    yield 'conv1', 'bn1'
    for stage, block in itertools.product((1, 2, 3, 4), (0, 1)):
        path = f'layer{stage}.{block}'
        yield f'{path}.conv1', f'{path}.bn1'
        yield f'{path}.conv2', f'{path}.bn2'
        if stage > 1 and block == 0:
            yield f'{path}.downsample.0', f'{path}.downsample.1'


def mobilenetv2_pairs():
    yield 'conv_stem', 'bn1'
    for stage, repeats in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for block in range(repeats):
            path = f'blocks.{stage}.{block}'
            convs = ('conv_dw', 'conv_pw') if stage == 0 else ('conv_pw', 'conv_dw', 'conv_pwl')
            for i, conv in enumerate(convs, 1):
                yield f'{path}.{conv}', f'{path}.bn{i}'
    yield 'conv_head', 'bn2'


def test_layers_of_vgg11(vgg):
    layers = Traced(vgg, (3, 32, 32)).layers()
    assert layers == [Layer(n, (n,)) for n in VGG11]


def test_layers_of_resnet18(resnet):
    layers = Traced(resnet, SIZE).layers()
    assert modules(layers) == list(resnet18_pairs())
    separate = Traced(resnet, SIZE).layers(separate_norms=True)
    assert modules(separate) == [(n,) for pair in resnet18_pairs() for n in pair]
    assert [layer.name for layer in separate] == [n for pair in resnet18_pairs() for n in pair]


def test_layers_of_mobilenetv2():
    assert modules(Traced(build('mobilenetv2_050'), (3, 32, 32)).layers()) == list(mobilenetv2_pairs())


def test_layers_of_convnext():
    layers = {layer.name: layer for layer in Traced(build('convnext_atto'), SIZE).layers()}
    block = 'stages.2.blocks.3'
    assert list(layers)[:4] == ['stem.0', *(f'stages.0.blocks.0.{n}' for n in ('conv_dw', 'mlp.fc1', 'mlp.fc2'))]
    assert layers['stem.0'].modules == ('stem.0', 'stem.1')
    assert layers[f'{block}.conv_dw'].modules == (f'{block}.conv_dw', f'{block}.norm')
    assert layers[f'{block}.mlp.fc1'].modules == (f'{block}.mlp.fc1',)
    assert layers[f'{block}.mlp.fc2'].modules == (f'{block}.mlp.fc2', f'{block}.gamma')
    # Its norm stands before it, between the same two blocks.
    down = layers['stages.1.downsample.1']
    assert down.modules == ('stages.1.downsample.0', 'stages.1.downsample.1')
    last = 'stages.3.blocks.1'
    assert layers[f'{last}.mlp.fc2'].modules == (f'{last}.mlp.fc2', f'{last}.gamma', 'head.norm')
    assert len(layers) == 1 + 3 * 12 + 3


def test_layers_of_vit():
    layers = Traced(build('vit_tiny_patch16_224', img_size=32, depth=2), (3, 32, 32)).layers()
    expected = [('patch_embed.proj', 'cls_token', 'pos_embed')]
    for b in ('blocks.0', 'blocks.1'):
        expected += [
            (f'{b}.norm1', f'{b}.attn.qkv'), (f'{b}.attn.proj', f'{b}.norm2'), (f'{b}.mlp.fc1',), (f'{b}.mlp.fc2',)]
    expected[-1] += ('norm',)
    assert modules(layers) == expected
    assert [layer.name for layer in layers[:3]] == ['patch_embed.proj', 'blocks.0.attn.qkv', 'blocks.0.attn.proj']


def test_layers_that_another_module_computes_with():
    """BEiT's attention reads the weight of `qkv` and never calls it."""
    model = build('beit_base_patch16_224', img_size=32, depth=1, embed_dim=24, num_heads=2)
    layers, b = Traced(model, (3, 32, 32)).layers(), 'blocks.0'
    attention = ('norm1', 'attn.q_bias', 'attn.v_bias', 'attn.qkv', 'attn.relative_position_bias_table')
    assert modules(layers)[:3] == [
        ('patch_embed.proj', 'cls_token'),
        tuple(f'{b}.{n}' for n in attention),
        (f'{b}.attn.proj', f'{b}.gamma_1', f'{b}.norm2'),
    ]


def test_scales_with_dimensions_of_one_entry_are_no_layers():
    with torch.device('meta'):
        model = build('resmlp_12_224', img_size=32)
    assert model.blocks[0].norm1.alpha.shape == (1, 1, 384)
    b = 'blocks.0'
    assert modules(Traced(model, (3, 32, 32)).layers())[:4] == [
        ('stem.proj',), (f'{b}.norm1', f'{b}.linear_tokens', f'{b}.ls1', f'{b}.norm2'), (f'{b}.mlp_channels.fc1',),
        (f'{b}.mlp_channels.fc2', f'{b}.ls2')]


@pytest.mark.parametrize('branch', [0, 1])
def test_layers_of_a_branch(amf, branch):
    plain = Traced(build('resnet10t'), SIZE).layers()
    path = f'branches.{branch}.'
    assert Traced(amf, SIZE).layers(f'branch.{branch}') == [
        Layer(path + a.name, tuple(path + m for m in a.modules)) for a in plain]
    assert modules(plain)[:3] == [('conv1.0', 'conv1.1'), ('conv1.3', 'conv1.4'), ('conv1.6', 'bn1')]


def test_unknown_roles_and_roles_without_weights(resnet):
    with pytest.raises(UserError, match="ResNet has no role 'branch.0'; it has backbone, head"):
        Traced(resnet, SIZE).layers('branch.0')
    with pytest.raises(UserError, match='no layers with weights'):
        Traced(nn.BatchNorm2d(3), SIZE).layers()


# --- The model is left as it was.

class Restless(nn.Module):
    """Changes its buffers and draws numbers in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)) for _ in range(2)))
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.register_buffer('calls', torch.zeros(()))
        self.register_buffer('kept', None)
        self.fc = nn.Linear(3, 2)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        self.calls += 1
        x = self.norm(self.blocks[0](self.blocks[1](x))) + torch.rand_like(x)
        return self.fc(x.mean((2, 3)))


def test_what_is_left_behind():
    model = Restless().train()
    model.blocks[1].eval()
    model.calls.fill_(7)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    layers = Traced(model, SIZE).layers()
    # By execution: the second block runs first.
    assert [layer.name for layer in layers] == ['blocks.1.0', 'blocks.1.1', 'blocks.0.0', 'blocks.0.1']
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()) and len(before) == 13
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    Traced(model, SIZE).blocks(cut='activation')
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_after_an_error_too(resnet):
    resnet.train()
    with pytest.raises(RuntimeError):
        Traced(resnet, (4, 64, 64)).blocks(cut='activation')
    assert all(m.training and not m._forward_hooks for m in resnet.modules())


def test_an_odd_type_and_the_meta_device():
    with torch.device('meta'):
        model = build('test_resnet')
    expected = Traced(build('test_resnet'), SIZE).layers()
    assert expected == Traced(model, SIZE).layers() == Traced(build('test_resnet').double(), SIZE).layers()


# --- The four ways.

def test_layer_candidates(resnet):
    found = layer_candidates(Traced(resnet, SIZE).layers())
    assert [(c.name, c.way, c.position, c.modules) for c in found] == [
        (conv, 'layer', i, (conv, norm)) for i, (conv, norm) in enumerate(resnet18_pairs())]


def test_window_candidates(resnet):
    layers = Traced(resnet, SIZE).layers()
    found = window_candidates(layers)
    pairs = list(resnet18_pairs())
    assert len(found) == 20 - 3 + 1 and {c.way for c in found} == {'window'}
    assert [c.position for c in found] == list(range(18))
    assert found[1].name == 'layer1.0.conv1..layer1.1.conv1'
    assert found[1].modules == pairs[1] + pairs[2] + pairs[3]
    assert [c.modules for c in window_candidates(layers, 1)] == pairs
    assert len(window_candidates(layers, 20)) == 1
    for length in (0, 21):
        with pytest.raises(UserError, match=f'window of {length} layers: the model has 20'):
            window_candidates(layers, length)


def test_top_candidate_and_ties(resnet):
    layers = Traced(resnet, SIZE).layers()
    accuracies = {layer.name: 0.5 for layer in layers} | {'layer3.0.conv1': 0.7, 'layer1.0.conv1': 0.8, 'conv1': 0.4}
    found = top_candidate(layers, accuracies, 3)
    assert (found.name, found.way, found.position) == ('top3', 'top3', 0)
    assert found.modules == (
        'layer1.0.conv1', 'layer1.0.bn1', 'layer3.0.conv1', 'layer3.0.bn1', 'layer4.1.conv2', 'layer4.1.bn2')
    assert 'conv1' not in top_candidate(layers, accuracies, 19).modules


def test_blocks_of_vgg11(vgg):
    assert names(Traced(vgg, (3, 32, 32)).blocks()) == [*VGG11[:8], 'tail']
    assert Traced(vgg, (3, 32, 32)).blocks()[-1].modules == ('pre_logits',)
    # Each convolution and each dense layer has an activation behind it.
    assert names(Traced(vgg, (3, 32, 32)).blocks(cut='activation')) == VGG11
    assert [c.modules for c in Traced(vgg, (3, 32, 32)).blocks(cut='pooling')] == [
        ('features.0',), ('features.3',), ('features.6', 'features.8'), ('features.11', 'features.13'),
        ('features.16', 'features.18'), ('pre_logits.fc1', 'pre_logits.fc2')]


def test_what_gets_no_gradient_is_no_candidate(vgg):
    """The paper's classifier reads features that VGG's `pre_logits` and MobileNetV3's `conv_head` have no part in."""
    assert [layer.name for layer in Traced(vgg, (3, 32, 32), features_only=True).layers()] == VGG11[:8]
    assert names(Traced(vgg, (3, 32, 32), features_only=True).blocks()) == VGG11[:8]
    # The paper's five blocks of a VGG (section III-B).
    assert len(Traced(vgg, (3, 32, 32), features_only=True).blocks(cut='pooling')) == 5
    model = build('mobilenetv3_small_050')
    assert 'conv_head' in [layer.name for layer in Traced(model, SIZE).layers()]
    assert 'conv_head' not in [layer.name for layer in Traced(model, SIZE, features_only=True).layers()]
    unused = {n for n, _ in model.named_parameters()} - Traced(model, SIZE, features_only=True).trainable
    assert {n.split('.')[0] for n in unused} == {'conv_head', 'classifier'}


class Idle(Restless):
    """One layer is computed and thrown away, one read without a gradient, one never called."""

    def __init__(self):
        super().__init__()
        self.ignored, self.detached, self.uncalled = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        self.ignored(x)
        return super().forward(x + self.detached(x).detach())


def test_in_any_search():
    assert [layer.name for layer in Traced(Idle(), SIZE).layers()] == [
        'blocks.1.0', 'blocks.1.1', 'blocks.0.0', 'blocks.0.1']


def test_all_copies_of_a_spottune_are_candidates():
    """Whatever its policy would decide for the image that is passed through it."""
    model = build('spottune', backbone='resnet10t', policy='test_resnet')
    assert len(Traced(model, SIZE).blocks('tuned')) == 4


def test_random_candidate(resnet):
    layers = Traced(resnet, SIZE).layers()
    drawn = [random_candidate(layers, 3, seed) for seed in range(5)]
    assert {(c.name, c.way) for c in drawn} == {('random3', 'random3')} and len({c.modules for c in drawn}) > 1
    order = modules(layers)
    for candidate in drawn:
        places = [i for i, own in enumerate(order) if own[0] in candidate.modules]
        assert candidate.modules == sum((order[i] for i in places), ()) and len(places) == 3
    assert drawn[0] == random_candidate(layers, 3, 0)


def test_blocks_of_resnet18(resnet):
    found = Traced(resnet, SIZE).blocks()
    assert [c.modules for c in found] == [
        ('conv1', 'bn1'), *((f'layer{s}.{b}',) for s in (1, 2, 3, 4) for b in (0, 1))]
    assert found[0].name == 'stem' and names(found)[1:] == [c.modules[0] for c in found[1:]]
    assert [c.position for c in found] == list(range(9)) and {c.way for c in found} == {'block'}
    # An activation follows every convolution but that of the shortcut, which runs with the one before it.
    pieces = []
    for pair in resnet18_pairs():
        if 'downsample' in pair[0]:
            pieces[-1] += pair
        else:
            pieces.append(pair)
    found = Traced(resnet, SIZE).blocks(cut='activation')
    assert [c.modules for c in found] == pieces
    assert found[6].name == 'layer2.0.conv2..layer2.0.downsample.0'
    assert names(Traced(resnet, SIZE).blocks(cut='pooling')) == ['conv1', 'layer1.0.conv1..layer4.1.conv2']


def test_blocks_of_mobilenetv2():
    model = build('mobilenetv2_050')
    found = Traced(model, (3, 32, 32)).blocks()
    assert names(found) == [
        'stem', *(f'blocks.{s}.{b}' for s, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(n)), 'tail']
    assert found[0].modules == ('conv_stem', 'bn1') and found[-1].modules == ('conv_head', 'bn2')
    # No activation follows a linear bottleneck. The activations stand in timm's BatchNormAct2d.
    found = Traced(model, (3, 32, 32)).blocks(cut='activation')
    assert names(found)[:4] == [
        'conv_stem', 'blocks.0.0.conv_dw', 'blocks.0.0.conv_pw..blocks.1.0.conv_pw', 'blocks.1.0.conv_dw']
    assert names(found)[-1] == 'blocks.6.0.conv_pwl..conv_head'
    assert names(Traced(model, (3, 32, 32)).blocks(cut='pooling')) == ['conv_stem..conv_head']


def test_what_lies_between_blocks_is_a_candidate_of_its_own():
    model = build('convnext_atto')
    found = Traced(model, SIZE).blocks()
    expected = []
    for stage, depth in enumerate((2, 2, 6, 2)):
        expected.append(f'stages.{stage}.downsample' if stage else 'stem')
        expected += [f'stages.{stage}.blocks.{i}' for i in range(depth)]
    assert names(found) == expected  # no tail: a norm alone is none
    assert [c.modules for c in found] == [(n,) for n in expected]


def test_what_lies_after_the_blocks_where_something_lies_between_them():
    """The Plan's `tail` is both, so its name is not taken."""
    model = build('convnext_atto', head_hidden_size=16)
    last = Traced(model, SIZE).blocks()[-1]
    assert last.modules == ('head.norm', 'head.pre_logits') and last.name == 'head.norm..head.pre_logits'
    assert trained(model, candidate_plan(Plan(), last)) == {
        f'head.{n}.{p}' for n in ('norm', 'pre_logits.fc', 'fc') for p in ('weight', 'bias')}


def test_blocks_of_vit_and_of_a_branch(amf):
    model = build('vit_tiny_patch16_224', img_size=32, depth=2)
    assert [(c.name, c.modules) for c in Traced(model, (3, 32, 32)).blocks()] == [
        ('stem', ('patch_embed', 'cls_token', 'pos_embed')), ('blocks.0', ('blocks.0',)), ('blocks.1', ('blocks.1',))]
    assert [(c.name, c.modules) for c in Traced(amf, SIZE).blocks('branch.1')] == [
        ('stem', ('branches.1.conv1', 'branches.1.bn1')),
        *((f'branches.1.layer{i}.0', (f'branches.1.layer{i}.0',)) for i in (1, 2, 3, 4))]


# --- Plans.

def trained(model, plan):
    return {n for n, s in resolve(model, plan).parameters.items() if s.trains}


def test_baselines(resnet):
    classifier, everything = baseline_candidates()
    assert (classifier.name, classifier.modules) == ('classifier', ())
    assert (everything.name, everything.modules) == ('all', ('',))
    assert trained(resnet, candidate_plan(Plan(), classifier)) == {'fc.weight', 'fc.bias'}
    assert trained(resnet, candidate_plan(Plan(), everything)) == {n for n, _ in resnet.named_parameters()}
    assert set(candidate_parameters(resnet, everything)) == {
        n for n, _ in resnet.named_parameters() if not n.startswith('fc.')}


def test_the_plan_of_a_candidate_keeps_the_rest(resnet):
    plan = Plan(lr=0.3, roles=dict(backbone=dict(lr=0.2, train=['layer1.0']), head=dict(lr=0.1)))
    found = candidate_plan(plan, Traced(resnet, SIZE).blocks()[0])
    assert found.roles['backbone'].train == ['stem'] and found.roles['backbone'].lr == 0.2
    assert found.roles['head'] == plan.roles['head'] and plan.roles['backbone'].train == ['layer1.0']
    assert candidate_plan(plan, Traced(resnet, SIZE).blocks()[2]).roles['backbone'].train == ['layer1.1']


def test_plans_of_a_branch(amf):
    plan = Plan(roles={'branch.0': dict(train='none'), 'policy': dict(train='none')})
    layers = Traced(amf, SIZE).layers('branch.1')
    found = [
        *layer_candidates(layers), *window_candidates(layers), *baseline_candidates(),
        *(c for cut in CUTS for c in Traced(amf, SIZE).blocks('branch.1', cut)),
        top_candidate(layers, {layer.name: -i for i, layer in enumerate(layers)}, 5),
    ]
    for candidate in found:
        expected = {
            n for n, _ in amf.named_parameters()
            if n.startswith('branches.1.') and any(within(n, path) for path in candidate.modules)}
        assert trained(amf, candidate_plan(plan, candidate, 'branch.1')) == expected | {'fc.weight', 'fc.bias'}
        assert set(candidate_parameters(amf, candidate, 'branch.1')) == expected


# --- Any architecture.

ARCHITECTURES = {
    'test_byobnet': {},
    'test_convnext': {},
    'test_efficientnet': {},
    'test_nfnet': {},
    'test_vit': {},
    'mobilenetv3_small_050': {},
    'densenet121': dict(block_config=(2, 2, 2, 2)),
    'regnetx_002': {},
    'swin_tiny_patch4_window7_224': dict(img_size=64, depths=(2, 2), num_heads=(3, 6)),
    'mixer_s32_224': dict(img_size=64),
    'resnetv2_18': {},
    'edgenext_xx_small': dict(depths=(1, 1, 2, 1)),
}


def calls(model, image):
    """Convolutions and dense layers by their first call, apart from the classifier."""
    order, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) and module is not model.get_classifier():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: order.append(name)))
    model.eval()(image)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(order))


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_any_architecture(name):
    with torch.device('meta'):
        model = build(name, **ARCHITECTURES[name])
    size = SIZE
    if model.pretrained_cfg.get('fixed_input_size') and 'img_size' not in ARCHITECTURES[name]:
        size = model.pretrained_cfg['input_size']
    assert list(model_roles(model)) == ['backbone', 'head']
    head = {n for n, place in places(model).items() if place.role == 'head'}
    params = dict(model.named_parameters())

    traced = Traced(model, size)
    layers = traced.layers()
    assert [layer.name for layer in layers] == calls(model, torch.zeros(1, *size, device='meta'))
    by_way = [
        layer_candidates(layers), layer_candidates(traced.layers(separate_norms=True)),
        *(traced.blocks(cut=cut) for cut in CUTS),
    ]
    for i, candidates in enumerate(by_way):
        covered = [n for c in candidates for n in candidate_parameters(model, c)]
        assert len(covered) == len(set(covered))
        missing = params.keys() - head - set(covered)
        # Between and after blocks, a norm alone is no candidate.
        assert not missing or i == 2 and all(params[n].ndim < 2 for n in missing)
        assert len(set(names(candidates))) == len(candidates)
        assert [c.position for c in candidates] == list(range(len(candidates)))
    for candidate in [*by_way[0][::5], *by_way[2][::3], by_way[2][-1], *by_way[3][:2], *window_candidates(layers)[:2]]:
        assert not any(a != b and within(a, b) for a, b in itertools.product(candidate.modules, repeat=2))
        assert trained(model, candidate_plan(Plan(), candidate)) == head | set(candidate_parameters(model, candidate))
