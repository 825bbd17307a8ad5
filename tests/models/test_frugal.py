"""Layers that do not train: what they give is what PyTorch gives, and what they keep is less."""
import copy

import pytest
import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from timm_amf.models.frugal import Frugal

LAYERS = {
    'bias': lambda: nn.Conv2d(4, 6, 3, padding=1),
    'strided': lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=(2, 1), bias=False),
    'depthwise': lambda: nn.Conv2d(4, 8, 5, padding='same', groups=4),
    'same padding': lambda: Conv2dSame(4, 6, 3, stride=2),
    'reflected': lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'),
    'shape of the input': lambda: nn.Conv2d(4, 3, (9, 11), padding=5),
    'norm': lambda: nn.BatchNorm2d(4, eps=0.1),
    'no affine': lambda: nn.BatchNorm2d(4, affine=False),
    'activation': lambda: BatchNormAct2d(4, act_layer=nn.ReLU),
    'synchronised': lambda: nn.SyncBatchNorm(4),
}


def run(layer, x, frugal):
    """Output, gradient of the input, those of the parameters; and the tensors that were kept."""
    kept = []
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = x * 1  # so that an input is no leaf
        x.retain_grad()
        if frugal:
            with Frugal():
                y = layer(x)
        else:
            y = layer(x)
    (y * torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y)).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())], kept


def create(layer):
    layer = LAYERS[layer]().double()
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.3, 3)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


@pytest.mark.parametrize('mode', ['frozen', 'trained', 'norms in training mode'])
@pytest.mark.parametrize('layer', [n for n in LAYERS if n != 'synchronised'])
def test_equals_pytorch(layer, mode):
    layer = create(layer).train(mode == 'norms in training mode').requires_grad_(mode != 'frozen')
    x = torch.randn(3, 4, 9, 11, dtype=torch.float64)
    for last in (torch.contiguous_format, torch.channels_last):
        results = [run(copy.deepcopy(layer), x.contiguous(memory_format=last), frugal)[0] for frugal in (True, False)]
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('layer', ['bias', 'norm', 'synchronised'])
def test_keeps_no_input(layer, kind):
    layer = create(layer).to(torch.bfloat16 if kind == 'bfloat16' else torch.float32).eval().requires_grad_(False)
    x = torch.randn(3, 4, 9, 11).to(torch.float32 if kind == 'float32' else torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16, enabled=kind == 'autocast'):
        (frugal, kept), (plain, all_kept) = run(layer, x, True), run(layer, x, False)
    for got, expected in zip(frugal[:2], plain[:2], strict=True):
        assert got.dtype == expected.dtype == x.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5 if kind == 'float32' else 2e-2, atol=1e-2)
    assert any(t.shape == x.shape for t in all_kept) and not any(t.shape == x.shape for t in kept)
