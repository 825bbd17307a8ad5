"""Batch norms folded into convolutions, against the two of them one after the other."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d, convert_splitbn_model
from torch import nn

from timm_amf.models.folding import FoldedConv, Folds, find_pairs, foldable_pairs, folded_view


def trained(norm):
    """A norm as training leaves it."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
        if norm.weight is not None:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm.eval()


LAYERS = {
    'pointwise': lambda: (nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)),
    'with bias': lambda: (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6, eps=0.1)),
    'strided, dilated': lambda: (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=(2, 1)), nn.BatchNorm2d(6)),
    'depthwise': lambda: (nn.Conv2d(4, 8, 5, padding=2, groups=4, bias=False), nn.BatchNorm2d(8)),
    'same padding': lambda: (Conv2dSame(4, 6, 3, stride=2), nn.BatchNorm2d(6)),
    'no affine': lambda: (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)),
    'activation': lambda: (nn.Conv2d(4, 6, 3, bias=False), BatchNormAct2d(6, act_layer=nn.SiLU)),
}


def run(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))).sum().backward()
    return y, x.grad


@pytest.mark.parametrize('layers', LAYERS)
def test_equals_the_two_layers(layers):
    conv, norm = LAYERS[layers]()
    plain = nn.Sequential(conv, trained(norm)).double().requires_grad_(False)
    view = folded_view(plain, [('0', '1')])
    assert isinstance(view[0], FoldedConv)
    x = torch.randn(3, 4, 9, 11, dtype=torch.float64)
    for got, expected in zip(run(view, x), run(plain, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(view(x), plain(x), rtol=1e-11, atol=1e-11)


def test_what_trains_is_not_folded():
    plain = nn.Sequential(nn.Conv2d(4, 6, 3), trained(nn.BatchNorm2d(6)))
    folds = Folds([('0', '1')])
    assert folds.of(plain) is plain
    with torch.no_grad():
        assert folds.of(plain) is not plain
    plain.requires_grad_(False)
    assert folds.of(plain) is not plain and folds.of(plain) is folds.of(plain)
    plain[1].train()
    assert folds.of(plain) is plain


def test_follows_every_change_of_its_sources():
    plain = nn.Sequential(nn.Conv2d(4, 6, 3), trained(nn.BatchNorm2d(6)))
    folds = Folds([('0', '1')])
    x = torch.randn(2, 4, 8, 8)

    def same():
        with torch.no_grad():
            kept = folds.of(plain)(x.to(plain[0].weight.dtype)), plain(x.to(plain[0].weight.dtype))
            torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-5)
            return kept[0]

    seen = [same()]
    for foreach in (False, True):
        plain(x).square().sum().backward()
        torch.optim.SGD(plain.parameters(), lr=1e-3, foreach=foreach).step()
        seen.append(same())
    other = nn.Sequential(nn.Conv2d(4, 6, 3), trained(nn.BatchNorm2d(6)))
    plain.load_state_dict(other.state_dict())
    seen.append(same())
    plain.load_state_dict({k: v + 1 for k, v in plain.state_dict().items()}, assign=True)
    seen.append(same())
    with torch.no_grad():
        plain[1].running_var.mul_(2)
    seen.append(same())
    plain[0].weight = nn.Parameter(plain[0].weight * 2)
    seen.append(same())
    assert all(not torch.allclose(a, b) for a, b in zip(seen, seen[1:]))
    plain.double()
    assert same().dtype == torch.float64
    with torch.inference_mode():
        torch.testing.assert_close(folds.of(plain)(x.double()), plain(x.double()))


def test_a_view_has_no_parameters_of_its_own():
    net = timm.create_model('test_resnet').eval()
    pairs = [('layer1.0.conv2', 'layer1.0.bn2'), ('layer2.0.conv1', 'layer2.0.bn1')]
    before = {n: id(p) for n, p in net.named_parameters()}
    view = folded_view(net, pairs)
    folded = {name for pair in pairs for name in pair}
    assert {n: id(p) for n, p in net.named_parameters()} == before
    shared = {n: i for n, i in before.items() if n.rpartition('.')[0] not in folded}
    assert {n: id(p) for n, p in view.named_parameters()} == shared
    assert view.layer3 is net.layer3 and view.layer1 is not net.layer1 and type(net.layer1[0].conv2) is nn.Conv2d
    assert folded_view(net, []) is net


# -- which pairs fold -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, a norm, and between and around them what `way` says."""

    def __init__(self, way, conv=None, norm=None):
        super().__init__()
        self.way = way
        self.conv = conv or nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.after = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        if self.way == 'in place':
            y.relu_()
        elif self.way == 'another operation':
            y = y * 1
        elif self.way == 'in place without a graph':
            with torch.no_grad():
                y.add_(1.)
        z = self.norm(y)
        if self.way == 'second reader':
            z = z + y
        elif self.way == 'second norm':
            z = z + self.norm(y)
        elif self.way == 'second call':
            z = z + self.norm(self.conv(z[:, :3]))
        return self.after(z)


def pairs_of(net):
    net.eval()
    with torch.device('meta'):
        x = torch.empty(2, 3, 8, 8)
    with find_pairs(net.to('meta')) as pairs:
        result = net(x)
    return pairs(result)


class OtherNorm(nn.BatchNorm2d):

    def forward(self, x):
        return super().forward(x).clamp(max=1.)


def test_a_norm_right_behind_its_convolution():
    assert pairs_of(Net('')) == [('conv', 'norm')]


@pytest.mark.parametrize('way', [
    'in place', 'in place without a graph', 'another operation', 'second reader', 'second norm', 'second call'])
def test_no_pair_where_anything_else_touches_the_output(way):
    assert pairs_of(Net(way)) == []


@pytest.mark.parametrize('layer', [
    dict(conv=StdConv2d(3, 4, 3, padding=1)),
    dict(conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))),
    dict(conv=nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect')),
    dict(conv=nn.Conv2d(3, 4, 3, padding='same')),
    dict(norm=OtherNorm(4)),
    dict(norm=nn.BatchNorm2d(4, track_running_stats=False)),
    dict(norm=nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    dict(norm=nn.GroupNorm(2, 4)),
])
def test_no_pair_of_layers_that_compute_otherwise(layer):
    assert pairs_of(Net('', **copy.deepcopy(layer))) == []


def test_pairs_that_are_no_longer():
    pair = [('conv', 'norm')]
    assert foldable_pairs(Net(''), pair) == pair
    assert foldable_pairs(nn.Sequential(), pair) == []
    hooked = Net('')
    hooked.norm.register_forward_hook(lambda *_: None)
    assert foldable_pairs(hooked, pair) == []
    replaced = Net('')
    replaced.norm = nn.Identity()
    assert foldable_pairs(replaced, pair) == []
    lora = Net('')
    nn.utils.parametrize.register_parametrization(lora.conv, 'weight', nn.Identity())
    assert foldable_pairs(lora, pair) == []
    # These compute in evaluation mode as before.
    assert foldable_pairs(convert_splitbn_model(Net('')), pair) == pair
    assert foldable_pairs(nn.SyncBatchNorm.convert_sync_batchnorm(Net('')), pair) == pair


def test_autocast():
    plain = nn.Sequential(nn.Conv2d(4, 6, 3), trained(nn.BatchNorm2d(6)))
    view = folded_view(plain, [('0', '1')])
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast('cpu', torch.bfloat16):
        y = view(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(x), rtol=0.05, atol=0.1)
    # Folded in full precision: the same as if it had been folded outside.
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = F.conv2d(x, view[0].weight, view[0].bias)
        assert torch.equal(view(x), expected)
