import pytest
import timm
import torch
from architectures import ARCHITECTURES, QUICK

from timm_amf.models import list_blocks

MODULES = [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in ARCHITECTURES]


@pytest.mark.parametrize('module', MODULES)
def test_a_branch_of_every_module_of_timm(module):
    """Built and run on the meta device, beside a branch of another kind, with a policy."""
    name = ARCHITECTURES[module]
    model = timm.create_model('amf', backbones=(name, 'test_resnet'), policy='test_resnet', num_classes=3,
                              device='meta').eval()
    x = torch.empty(2, *model.pretrained_cfg['input_size'], device='meta')
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 1, 1)
        assert model.forward_head(features).shape == (2, 3)
    assert model.widths == [model.branches[0].head_hidden_size, 96]
    check_blocks(model.branches[0])
    assert len(ARCHITECTURES) >= 60


def check_blocks(network):
    """Each block owns weights, and lies in no other."""
    blocks = list_blocks(network)
    assert blocks and len(set(blocks)) == len(blocks)
    for name in blocks:
        assert any(p.numel() for p in network.get_submodule(name).parameters())
        assert not any(other.startswith(f'{name}.') for other in blocks)
