"""The losses of global-k against naive loops, and the running shares."""
import math

import pytest
import torch

from timm_amf.errors import UserError
from timm_amf.models.global_k import global_k_loss, update_shares
from timm_amf.tuning import Plan


def naive(v: list[float], k: int, lambda_1: float, lambda_2: float) -> float:
    size = (sum(v) - k) ** 2
    entropy = sum(-p * math.log(p) if p > 0 else 0. for p in v)
    return lambda_1 * size + lambda_2 * entropy


def test_the_paper_s_equations():
    shares = (torch.rand(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) > 0.4).double()
    shares[:, 2], shares[:, 4] = 0., 1.  # the entropy is 0 at both ends
    v = shares.mean(0).tolist()
    loss = global_k_loss(shares, 3, (0.7, 1.3))
    torch.testing.assert_close(loss.item(), naive(v, 3, 0.7, 1.3), rtol=1e-12, atol=1e-12)


def test_gradient_is_that_of_the_formula():
    v = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    shares = v.expand(8, 5).clone().requires_grad_()
    global_k_loss(shares, 2, (0.5, 2.)).backward()
    expected = (0.5 * 2 * (v.sum() - 2) + 2. * -(v.log() + 1)) / 8
    torch.testing.assert_close(shares.grad, expected.expand(8, 5), rtol=1e-12, atol=1e-12)


def test_gradient_is_finite_where_the_entropy_s_slope_is_not():
    shares = torch.zeros(4, 3, requires_grad=True)
    global_k_loss(shares, 1, (0., 1.)).backward()
    assert shares.grad.isfinite().all() and (shares.grad > 0).all()  # away from the middle: down to zero


def test_value_of_the_window_with_the_gradient_of_the_batch():
    running = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    shares = torch.tensor([[1., 1., 0.], [0., 1., 0.]], dtype=torch.float64, requires_grad=True)
    loss = global_k_loss(shares, 1, (1., 1.), running)
    torch.testing.assert_close(loss.item(), naive(running.tolist(), 1, 1., 1.), rtol=1e-12, atol=1e-12)
    loss.backward()
    slope = 2 * (running.sum() - 1) - (running.log() + 1)
    torch.testing.assert_close(shares.grad, (slope / 2).expand(2, 3), rtol=1e-12, atol=1e-12)


def test_running_shares():
    running = torch.full((2,), 0.5)
    seen = 0.5
    for count in (4, 4, 2):
        batch = torch.zeros(count, 2)
        batch[:, 0] = 1.
        assert update_shares(running, batch, 8) is running
        seen += (1. - seen) * count / 8
    torch.testing.assert_close(running, torch.tensor([seen, 1 - seen]))
    update_shares(running, torch.tensor([[0., 1.]] * 9), 8)  # a batch beyond the window is all that counts
    torch.testing.assert_close(running, torch.tensor([0., 1.]))


@pytest.mark.parametrize('settings, words', [
    (dict(global_k=-1), 'global_k'),
    (dict(global_k_weights=[1.]), 'global_k_weights'),
    (dict(global_k_window=0), 'global_k_window'),
    (dict(temperature=0.), 'temperature'),
    (dict(temperature_end=1.), 'temperature_end'),
])
def test_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Plan(**settings)


def test_temperature():
    assert Plan().temperature_at(3) is None
    assert Plan(temperature=5.).temperature_at(7) == 5.
    plan = Plan(temperature=8., temperature_end=1., epochs=4)
    assert [plan.temperature_at(e) for e in range(4)] == pytest.approx([8., 4., 2., 1.])
    assert Plan(temperature=5., temperature_end=1., epochs=1).temperature_at(0) == 5.
