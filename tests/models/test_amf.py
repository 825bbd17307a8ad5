import pytest
import timm
import torch
from torch import nn

import timm_amf.models.amf
from timm_amf.models import AMF, MultiTune

PAIR = dict(backbones=('test_resnet', 'test_resnet'), policy='test_efficientnet')


def create(name='amf', **kwargs):
    return timm.create_model(name, **{**PAIR, **kwargs}) if name == 'amf' else timm.create_model(name, **kwargs)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_papers_parameter_counts():
    assert count(timm.create_model('amf_inception_v4x2', num_classes=10, device='meta')) == 103_602_060
    assert round(count(timm.create_model('inception_v4', num_classes=10, device='meta')) / 1e6, 1) == 41.2


@pytest.mark.parametrize('backbones', [('test_resnet', 'test_resnet'), ('test_resnet', 'test_vit', 'test_convnext')])
def test_the_papers_formula(backbones):
    """Section III-C: z_i = h_i * m_i, concatenated, one fully-connected layer; computed with plain timm models."""
    model = create(backbones=backbones, num_classes=7).eval()
    x = torch.randn(4, 3, 160, 160)
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))

    def seen_by(name):
        cfg = timm.get_pretrained_cfg(name)
        raw = x * std + mean
        return (raw - torch.tensor(cfg.mean).view(1, 3, 1, 1)) / torch.tensor(cfg.std).view(1, 3, 1, 1)

    with torch.no_grad():
        h = model.policy.net(seen_by('test_efficientnet')).softmax(1)
        z = []
        for i, name in enumerate(backbones):
            plain = timm.create_model(name, num_classes=0).eval()
            plain.load_state_dict(model.branches[i].state_dict())
            z.append(torch.stack([h[b, i] * row for b, row in enumerate(plain(seen_by(name)))]))
        expected = torch.cat(z, 1) @ model.fc.weight.T + model.fc.bias
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.forward_policy(x), h, rtol=1e-4, atol=1e-5)
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), expected, rtol=1e-4, atol=1e-4)
        assert features.ndim == 4 and features.shape[1] == model.num_features


def test_multitune_is_the_plain_concatenation():
    model = timm.create_model('multitune', backbones=('test_resnet', 'test_convnext'), num_classes=3).eval()
    assert isinstance(model, MultiTune)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model.fc(torch.cat([b(x) for b in model.branches], 1))
        torch.testing.assert_close(model(x), expected)
        assert torch.equal(model.forward_policy(x), torch.ones(2, 2))
    assert model.tuning_roles == {'branch.0': 'branches.0', 'branch.1': 'branches.1', 'head': 'fc'}


@pytest.mark.parametrize('name', ['amf', 'multitune'])
def test_roles_cover_every_parameter_once(name):
    model = create(name, num_classes=3)
    for parameter, _ in model.named_parameters():
        assert sum(parameter.startswith(f'{path}.') for path in model.tuning_roles.values()) == 1
    assert all(list(model.get_submodule(path).parameters()) for path in model.tuning_roles.values())
    assert [n for n, _ in model.named_parameters()][-2:] == ['fc.weight', 'fc.bias']
    assert 'head' not in create(name, num_classes=0).tuning_roles


def test_initialisation():
    model = create(num_classes=200)
    assert model.fc.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(model.fc.weight.mean().item()) < 0.002 and not model.fc.bias.any()
    assert create(num_classes=200, fc_init_std=0.01).fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    first, second = (next(b.parameters()) for b in model.branches)
    assert not torch.equal(first, second)
    model.reset_classifier(300)
    assert model.fc.weight.shape[0] == 300 and model.fc.weight.std().item() == pytest.approx(0.1, rel=0.02)


def test_a_seed_gives_the_same_model_each_time():
    """Probing an architecture happens once and must not draw from the generator."""
    timm_amf.models.blocks._probes.clear()
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(create(num_classes=3))
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)


def test_pooling_by_name_is_the_branches():
    model = create(num_classes=3, global_pool='max').eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = torch.cat([b.forward_features(x).amax((2, 3)) for b in model.branches], 1)
        torch.testing.assert_close(torch.cat(model.forward_branches(x), 1), expected)
        model.reset_classifier(3, 'avg')
        expected = torch.cat([b.forward_features(x).mean((2, 3)) for b in model.branches], 1)
        torch.testing.assert_close(torch.cat(model.forward_branches(x), 1), expected)
    model = create(num_classes=3, global_pool='catavgmax')
    assert model.head_hidden_size == model.fc.in_features == 4 * 96 and model(x).shape == (2, 3)


def test_layouts():
    """Maps side by side for one architecture that pools by a mean, pooled features otherwise."""
    x = torch.randn(2, 3, 160, 160)
    shapes = {}
    for pair in [('test_resnet',) * 2, ('test_vit',) * 2, ('test_convnext',) * 2, ('test_resnet', 'test_convnext')]:
        model = create(backbones=pair).eval()
        features = model.forward_features(x)
        shapes[pair] = tuple(features.shape[1:])
        assert tuple(features.shape[2:]) == tuple(model.pretrained_cfg['pool_size'])
        torch.testing.assert_close(model.forward_head(features), model(x), rtol=1e-4, atol=1e-4)
    assert list(shapes.values()) == [(192, 5, 5), (128, 1, 1), (128, 1, 1), (160, 1, 1)]

    model = create(backbones=('swin_tiny_patch4_window7_224',) * 2, backbone_kwargs=dict(depths=(1, 1, 1, 1)),
                   img_size=64, num_classes=2).eval()
    assert model.output_fmt == 'NHWC' and model.forward_features(x[..., :64, :64]).shape == (2, 2, 2, 1536)


def test_no_pass_over_what_is_not_needed():
    """Each network runs once an image, and none of the parts is renormalised where statistics agree."""
    model = create(num_classes=3, policy='test_resnet')
    calls = []
    for name, net in (*model._networks().items(),):
        net.conv1.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.randn(2, 3, 64, 64))
    assert sorted(calls) == ['branches.0', 'branches.1', 'policy.net']
    assert all(isinstance(r, nn.Identity) for r in (*model.renorms, model.policy.renorm))


def test_channels_last_is_kept():
    """In the branches' and the policy's convolutions, behind a renormalised and resized input too."""
    model = create(num_classes=3, policy_input_size=64).to(memory_format=torch.channels_last).eval()
    assert not isinstance(model.policy.renorm, nn.Identity)
    outputs = []
    for net in model._networks().values():
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                module.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    model(torch.randn(2, 3, 96, 96).contiguous(memory_format=torch.channels_last))
    spatial = [o for o in outputs if o.shape[-1] > 1]
    assert spatial and all(o.is_contiguous(memory_format=torch.channels_last) for o in spatial)


def test_input_statistics_follow_the_cfg():
    """The same image gives the same logits however the composite is told that it is normalised."""
    image = torch.rand(2, 3, 96, 96)
    default = create(num_classes=3).eval()
    imagenet = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    overlaid = create(num_classes=3, pretrained_cfg_overlay=imagenet).eval()
    overlaid.load_state_dict(default.state_dict())
    logits = []
    for model in (default, overlaid):
        mean, std = (torch.tensor(model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
        with torch.no_grad():
            logits.append(model((image - mean) / std))
    assert overlaid.pretrained_cfg['mean'] == imagenet['mean'] != default.pretrained_cfg['mean']
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_per_branch_kwargs_reach_their_branch():
    model = create(backbones=('test_vit',) * 2, backbone_kwargs=[{'depth': 1}, {'depth': 3}])
    assert [len(b.blocks) for b in model.branches] == [1, 3]
    model = create(backbones=('test_vit',) * 2, drop_path_rate=0.2)
    assert model.branches[1].blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_input_size_of_fixed_architectures():
    model = create(backbones=('test_resnet', 'test_vit'), img_size=96, num_classes=2).eval()
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 2)
    model.set_input_size(128)
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 2)
    assert create(backbones=('test_resnet', 'vit_tiny_patch16_224')).pretrained_cfg['input_size'] == (3, 224, 224)
    model = create(policy='test_vit', policy_input_size=80, num_classes=2)
    assert model(torch.randn(1, 3, 160, 160)).shape == (1, 2)


def test_layers_align_at_the_top():
    from timm.models import group_parameters
    model = create(backbones=('resnet10t', 'resnet18'), policy='resnet10t', num_classes=2, device='meta')
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers['branches.0.layer4.0.conv1.weight'] == layers['branches.1.layer4.1.conv1.weight']
    assert layers['fc.weight'] == layers['policy.net.fc.weight'] == max(layers.values())
    assert layers['branches.1.conv1.weight'] == 0 < layers['branches.0.conv1.0.weight']


def test_no_weight_decay_names_parameters():
    model = create(backbones=('test_vit', 'test_resnet'), policy='test_vit')
    names = {n for n, _ in model.named_parameters()}
    assert {'branches.0.pos_embed', 'policy.net.pos_embed'} <= model.no_weight_decay() & names


@pytest.mark.parametrize('backbones', [('test_resnet',) * 2, ('inception_v3', 'test_vit')])
def test_gradient_checkpointing_changes_no_gradient(backbones):
    """`inception_v3` has no checkpointing of its own and is checkpointed as a whole."""
    model = create(backbones=backbones, img_size=96, num_classes=3).eval()
    x = torch.randn(2, 3, 96, 96)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_registration():
    names = {
        'amf', 'amf_inception_v4x2', 'amf_inception_v4x3', 'amf_resnet18x2', 'amf_resnet50x2', 'amf_mobilenetv2_100x2',
        'amf_convnext_tinyx2', 'amf_vit_small_patch16_224x2', 'multitune', 'multitune_inception_v4x2',
    }
    assert set(timm.list_models(module='amf')) == names
    assert set(timm.list_pretrained('amf*.in1k')) == {f'{n}.in1k' for n in names if n.startswith('amf')}
    assert isinstance(timm.create_model('amf_resnet18x2.in1k', device='meta'), AMF)
