import pytest
import timm
import torch

from timm_amf.models import PolicyNetwork


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
