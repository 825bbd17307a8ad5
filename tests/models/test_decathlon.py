"""The Visual Decathlon's networks, against the same computation written with functions, and timm's interface."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from timm.models import create_feature_extractor, get_graph_node_names
from torch import nn

from timm_amf.models import convert_adapter_keys, list_blocks

NAMES = ('resnet26_decathlon', 'resnet8_decathlon')


@pytest.fixture
def model(request):
    net = timm.create_model(getattr(request, 'param', 'resnet8_decathlon'), num_classes=5)
    for module in net.modules():  # statistics and affine parameters that show whether each norm is where it should be
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.1)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.8, 1.2)
    return net.eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def norm(state, name, x):
    return F.batch_norm(x, *(state[f'{name}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')))


def by_functions(state, x):
    """The network as its authors describe it, from its weights alone."""
    x = norm(state, 'bn1', F.conv2d(x, state['conv1.weight'], padding=1))  # no ReLU here
    names = sorted({tuple(k.split('.')[1:3]) for k in state if k.startswith('stages.')}, key=lambda n: [*map(int, n)])
    for stage, block in names:
        at = f'stages.{stage}.{block}'
        stride = 2 if block == '0' else 1
        y = F.relu(norm(state, f'{at}.bn1', F.conv2d(x, state[f'{at}.conv1.weight'], stride=stride, padding=1)))
        y = norm(state, f'{at}.bn2', F.conv2d(y, state[f'{at}.conv2.weight'], padding=1))
        if block == '0':
            means = F.avg_pool2d(x, 2)
            x = torch.cat([means, torch.zeros_like(means)], dim=1)
        x = F.relu(y + x)
    x = F.relu(norm(state, 'norm', x)).mean((2, 3))
    return F.linear(x, state['fc.weight'], state['fc.bias'])


@pytest.mark.parametrize('model', NAMES, indirect=True)
@torch.no_grad()
def test_computes_what_the_papers_describe(model, x):
    for images in (x, torch.randn(1, 3, 72, 72), torch.randn(1, 3, 144, 72)):
        torch.testing.assert_close(model(images), by_functions(model.state_dict(), images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, blocks', [('resnet26_decathlon', (4, 4, 4)), ('resnet8_decathlon', (1, 1, 1))])
def test_structure(name, blocks):
    model = timm.create_model(name)
    assert list_blocks(model) == [f'stages.{i}.{j}' for i, n in enumerate(blocks) for j in range(n)]
    widths, convs = (32, 64, 128, 256), 3 * 32 * 9
    for before, width, n in zip(widths, widths[1:], blocks):
        convs += 9 * (before * width + (2 * n - 1) * width * width)
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) == convs
    # The stem, two convolutions a block and the classifier are the 26 and 8 of their names.
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == int(name[6:].split('_')[0])
    # Weights in convolutions and the classifier alone: no shortcut has any.
    assert all('shortcut' not in n for n, _ in model.named_parameters())


@torch.no_grad()
def test_odd_sizes(model):
    assert model(torch.randn(1, 3, 71, 53)).shape == (1, 5)


def test_middle_64_of_72():
    config = resolve_data_config({}, model=timm.create_model('resnet26_decathlon'))
    resize, crop = create_transform(**config).transforms[:2]
    assert resize.size == 72 and tuple(crop.size) == (64, 64)


@torch.no_grad()
def test_script_and_trace(model, x):
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    node = get_graph_node_names(model)[1][-1]
    torch.testing.assert_close(create_feature_extractor(model, [node])(x)[node], expected)


@torch.no_grad()
def test_levels(model, x):
    final, levels = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [tuple(t.shape[1:]) for t in levels] == [(32, 64, 64), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
    normed = model.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(normed, final)
    for i, level in enumerate(levels):
        early = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], level)
        pruned = copy.deepcopy(model)
        take = pruned.prune_intermediate_layers([i], prune_norm=True)
        torch.testing.assert_close(pruned.forward_intermediates(x, take, intermediates_only=True)[0], level)
        torch.testing.assert_close(pruned.forward_features(x), level)


@torch.no_grad()
def test_features_only(x):
    features = timm.create_model('resnet26_decathlon', features_only=True)
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels() == [32, 64, 128, 256]
    assert [64 // m.shape[2] for m in maps] == features.feature_info.reduction() == [1, 2, 4, 8]


def test_classifier(model, x):
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features)
    assert model.get_classifier()(features) is features
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 256, 8, 8)


def test_checkpointing_gives_the_same_gradients(model, x):
    model.train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for net in (model, other):
        net(x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


# ---- the published weights


class AdapterNet(nn.Module):
    """A network with the module names of the residual adapters' code and any number of tasks; it computes nothing."""

    def __init__(self, classes=(5,)):
        super().__init__()
        self.pre_layers_conv = self.conv(3, 32, len(classes))
        before = 32
        for i, width in enumerate((64, 128, 256)):
            blocks = []
            for j in range(4):
                block = nn.Module()
                block.conv1 = self.conv(before if j == 0 else width, width, len(classes))
                block.conv2 = nn.Sequential(nn.ReLU(), self.conv(width, width, len(classes)))
                blocks.append(block)
            setattr(self, f'layer{i + 1}', nn.Sequential(*blocks))
            before = width
        self.end_bns = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(256), nn.ReLU()) for _ in classes)
        self.linears = nn.ModuleList(nn.Linear(256, n) for n in classes)

    @staticmethod
    def conv(before, width, tasks):
        module = nn.Module()
        module.conv = nn.Conv2d(before, width, 3, bias=False)
        module.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(tasks))
        return module


@pytest.mark.parametrize('classes, prefix', [((5,), ''), ((5,), 'module.'), ((5, 9), '')])
def test_adapter_keys(classes, prefix):
    net = AdapterNet(classes)
    for tensor in net.state_dict().values():
        tensor.copy_(torch.rand_like(tensor, dtype=torch.float))
    theirs = {prefix + k: v for k, v in net.state_dict().items()}
    model = timm.create_model('resnet26_decathlon', num_classes=5)
    model.load_state_dict(convert_adapter_keys(theirs))
    assert torch.equal(model.conv1.weight, net.pre_layers_conv.conv.weight)
    assert torch.equal(model.bn1.running_var, net.pre_layers_conv.bns[0].running_var)
    block, other = model.stages[2][3], net.layer3[3]
    assert torch.equal(block.conv1.weight, other.conv1.conv.weight)
    assert torch.equal(block.bn1.bias, other.conv1.bns[0].bias)
    assert torch.equal(block.conv2.weight, other.conv2[1].conv.weight)
    assert torch.equal(block.bn2.running_mean, other.conv2[1].bns[0].running_mean)
    assert torch.equal(model.norm.weight, net.end_bns[0][0].weight)
    assert torch.equal(model.fc.weight, net.linears[0].weight)
    ours = model.state_dict()
    assert convert_adapter_keys(ours) == ours


@pytest.mark.parametrize('name', [
    'layer1.0.conv1.parallel_conv.0.conv.weight', 'layer1.0.conv1.bns.0.0.conv.0.weight', 'layer2.1.extra.weight'])
def test_adapters_have_no_place(name):
    state = AdapterNet().state_dict()
    state[name] = torch.zeros(1)
    with pytest.raises(ValueError, match='no place'):
        convert_adapter_keys(state)


@torch.no_grad()
def test_loading_from_a_file(tmp_path, x):
    net = AdapterNet((1000,))
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    overlay = {'file': str(tmp_path / 'net.pth')}
    model = timm.create_model('resnet26_decathlon', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.fc.weight, net.linears[0].weight)
    model = timm.create_model('resnet26_decathlon', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert torch.equal(model.stages[0][0].conv1.weight, net.layer1[0].conv1.conv.weight)
    assert model.eval()(x).shape == (2, 5)
