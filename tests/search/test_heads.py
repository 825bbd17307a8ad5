"""The classifier of the block-wise paper."""
import math

import pytest
import timm
import torch
from torch import nn

from timm_amf.search.heads import mlp_head


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=3).eval()


def test_layers_of_the_paper(model):
    head = mlp_head(model, (3, 64, 64), 5, seed=0)
    assert [type(layer) for layer in head] == [nn.Flatten, nn.Linear, nn.Dropout, nn.Linear, nn.ReLU, nn.Linear]
    _, first, drop, second, _, last = head
    features = model.forward_features(torch.zeros(2, 3, 64, 64))
    assert features.ndim == 4 and features.shape[2] > 1  # before pooling
    assert (first.in_features, first.out_features) == (features[0].numel(), 128)
    assert (second.in_features, second.out_features, last.in_features, last.out_features) == (128, 64, 64, 5)
    assert drop.p == 0.5
    assert head(features).shape == (2, 5)


def test_initialisation_of_keras(model):
    """Glorot's uniform distribution, +-sqrt(6 / (fan_in + fan_out)), and biases of zero."""
    for layer in mlp_head(model, (3, 64, 64), 5, seed=0):
        if isinstance(layer, nn.Linear):
            limit = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.9 * limit < layer.weight.abs().max() <= limit
            assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
            assert not layer.bias.any()


def test_seed(model):
    state = torch.random.get_rng_state()
    first, again, other = (mlp_head(model, (3, 32, 32), 5, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first[1].weight, other[1].weight)


def test_model_in_training_mode_is_left_as_it_is():
    model = timm.create_model('test_resnet', num_classes=3).double().train()
    model.layer1.eval()
    modes, state = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    head = mlp_head(model, (3, 32, 32), 5, seed=1)
    assert {p.dtype for p in head.parameters()} == {torch.float64}
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
