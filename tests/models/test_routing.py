import pytest
import timm
import torch

from timm_amf.errors import UserError
from timm_amf.models.routing import kept_branches, routing_error


@pytest.fixture
def model():
    """Three branches, and a policy that differs between images."""
    model = timm.create_model('amf', backbones=('test_resnet', 'test_efficientnet', 'test_convnext'),
                              policy='test_resnet', num_classes=5).eval()
    weights = model.forward_policy(torch.randn(16, 3, 64, 64))
    model.policy.net.fc.weight.data *= 1. / weights.logit().std(0).mean()
    return model


@pytest.fixture
def x():
    return torch.randn(16, 3, 64, 64)


def run_sizes(model, x):
    """Images that each branch gets in one forward pass."""
    sizes, handles = [0] * len(model.branches), []
    for i, branch in enumerate(model.branches):
        first = next(m for m in branch.modules() if isinstance(m, torch.nn.Conv2d))
        handles.append(first.register_forward_pre_hook(lambda _, a, i=i: sizes.__setitem__(i, len(a[0]))))
    model(x)
    for handle in handles:
        handle.remove()
    return sizes


@torch.no_grad()
def test_equals_the_dense_model_with_masked_weights(model, x):
    weights = model.forward_policy(x)
    for eps in (0.05, 0.3, 1.):
        model.set_routing(eps)
        mask = (weights >= eps) | (weights == weights.max(1, keepdim=True).values)
        assert 0 < mask.sum() < mask.numel()
        z = torch.cat([m * (weights * mask)[:, i:i + 1] for i, m in enumerate(model.forward_branches(x))], 1)
        torch.testing.assert_close(model(x), model.fc(z), rtol=1e-4, atol=1e-5)
        assert torch.equal(mask, kept_branches(weights, eps))


@torch.no_grad()
def test_branches_run_only_where_they_count(model, x):
    weights = model.forward_policy(x)
    assert run_sizes(model, x) == [16, 16, 16]
    model.set_routing(1.)
    assert run_sizes(model, x) == torch.bincount(weights.argmax(1), minlength=3).tolist()
    one = x[weights.argmax(1) == weights.argmax(1)[0]]
    sizes = run_sizes(model, one)
    assert sorted(sizes) == [0, 0, len(one)]


@torch.no_grad()
def test_the_error_is_reported(model, x):
    dense = model(x)
    model.set_routing(0.3)
    routed, weights = model(x), model.forward_policy(x)
    error = routing_error(model, x)
    assert error['max_abs'] == pytest.approx((routed - dense).abs().max().item(), rel=1e-3)
    assert error['mean_abs'] == pytest.approx((routed - dense).abs().mean().item(), rel=1e-3)
    assert error['top1_agreement'] == (routed.argmax(1) == dense.argmax(1)).float().mean().item()
    assert error['branches_run'] == pytest.approx(kept_branches(weights, 0.3).float().mean().item())
    assert model.routing_eps == 0.3
    model.set_routing(0.)
    assert routing_error(model, x) == dict(max_abs=0., mean_abs=0., top1_agreement=1., branches_run=1.)


def test_training_and_graphs_run_all_branches(model, x):
    with torch.no_grad():
        dense = model(x)
    model.set_routing(1.)
    with torch.no_grad():
        assert not torch.equal(model(x), dense)
        torch.testing.assert_close(torch.jit.script(model)(x), dense)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), dense)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), dense)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), dense)
    assert run_sizes(model.train(), x) == [16, 16, 16]


@torch.no_grad()
def test_channels_last_and_bf16(model, x):
    model.set_routing(0.3)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_mistakes(model):
    for eps in (-0.1, 1.5):
        with pytest.raises(UserError, match='between 0 and 1'):
            model.set_routing(eps)
    with pytest.raises(UserError, match='fixed weights'):
        timm.create_model('multitune', backbones=('test_resnet',) * 2).set_routing(0.1)
