import pytest
import timm
import torch
import torch.nn.functional as F

from timm_amf.models import PolicyNetwork
from timm_amf.models.renorm import Renormalize, create_renorm


def test_weights_are_the_softmax_of_the_networks_logits():
    net = timm.create_model('test_resnet', num_classes=3).eval()
    policy = PolicyNetwork(net).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        weights = policy(x)
        logits = net(x)
    torch.testing.assert_close(weights, logits.exp() / logits.exp().sum(1, keepdim=True))
    torch.testing.assert_close(weights.sum(1), torch.ones(4))


def test_smaller_input():
    net = timm.create_model('test_resnet', num_classes=2).eval()
    stats = (0.5,) * 3, (0.5,) * 3, (0.4,) * 3, (0.2,) * 3
    policy = PolicyNetwork(net, create_renorm(*stats), input_size=32).eval()
    x, seen = torch.randn(2, 3, 96, 96), []
    net.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        policy(x)
    small = F.interpolate(x, (32, 32), mode='bilinear', antialias=True)
    torch.testing.assert_close(seen[0], Renormalize(*stats)(small))


@pytest.mark.parametrize('name', ['test_resnet', 'mobilenetv2_035', 'test_efficientnet'])
def test_starts_undecided(name):
    """Near 1/n on features as large as trained networks give, whatever the architecture does for its classifier."""
    net = timm.create_model(name, num_classes=2)
    policy = PolicyNetwork(net)
    policy.init_classifier()
    classifier = net.get_classifier()
    features = torch.rand(512, classifier.in_features) * 2
    weights = classifier(features).softmax(1)
    assert not classifier.bias.any()
    assert 0.05 < weights.min() and weights.max() < 0.95


def test_two_classifiers():
    net = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=2, img_size=32, depth=1)
    policy = PolicyNetwork(net)
    policy.init_classifier()
    assert len(policy.get_classifier()) == 2 and not any(c.bias.any() for c in policy.get_classifier())
    assert policy.train()(torch.randn(2, 3, 32, 32)).shape == (2, 2)
