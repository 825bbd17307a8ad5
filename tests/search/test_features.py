"""Features: timm's own, once, and whole or not at all."""
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform

from timm_amf.engine import build
from timm_amf.engine.options import parse_args
from timm_amf.errors import UserError
from timm_amf.search import features as module
from timm_amf.search.features import FeatureNet, extract_features


def prepare(argv, classifier=True):
    args = parse_args(argv)
    args.pretrained = True
    accelerator = build.build_accelerator(args)
    train, _ = build.build_data(args, accelerator)
    return FeatureNet(args, accelerator, classifier), train


@pytest.fixture
def counted(monkeypatch):
    """How often features were computed."""
    calls = []
    original = module._compute
    monkeypatch.setattr(module, '_compute', lambda *args: calls.append(1) or original(*args))
    return calls


def test_equal_to_timm(flags, images, weights):
    net, train = prepare([str(images / 'colours'), *flags, '--crop-pct', '0.9'])
    found = extract_features(net, train)
    plain = timm.create_model('test_resnet', pretrained=True, pretrained_cfg_overlay=dict(file=str(weights))).eval()
    cfg = plain.pretrained_cfg
    transform = create_transform(
        32, interpolation=cfg['interpolation'], crop_pct=0.9, mean=cfg['mean'], std=cfg['std'])
    files = sorted((images / 'colours/train').glob('*/*.png'))
    batch = torch.stack([transform(Image.open(f).convert('RGB')) for f in files])
    with torch.no_grad():
        np.testing.assert_allclose(found.logits, plain(batch).numpy(), atol=1e-5)
        plain.reset_classifier(0)
        np.testing.assert_allclose(found.pooled, plain(batch).numpy(), atol=1e-5)
    assert found.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    np.testing.assert_allclose(found.probabilities().sum(1), 1)
    np.testing.assert_allclose(found.probabilities(), torch.tensor(found.logits).softmax(1), atol=1e-6)


def test_computed_once(flags, images, counted):
    argv = [str(images / 'colours'), *flags]
    first = extract_features(*prepare(argv))
    again = extract_features(*prepare([*argv, '-b', '5']))
    assert len(counted) == 1
    np.testing.assert_array_equal(first.pooled, again.pooled)
    np.testing.assert_array_equal(first.logits, again.logits)


@pytest.mark.parametrize('change', ['weights', 'images', 'transform', 'statistics', 'classifier'])
def test_computed_again(flags, images, weights, counted, tmp_path, change):
    folder = tmp_path / 'copy'
    shutil.copytree(images / 'colours', folder)
    extract_features(*prepare([str(folder), *flags]))
    extra = []
    if change == 'weights':
        state = load_file(weights)
        state['layer4.0.bn1.running_mean' if 'layer4.0.bn1.running_mean' in state else 'bn1.running_mean'] += 0.1
        save_file(state, tmp_path / 'other.safetensors')
        extra = ['--pretrained-path', str(tmp_path / 'other.safetensors')]
    elif change == 'images':
        shutil.copy(folder / 'train/colours0/1.png', folder / 'train/colours0/new.png')
    elif change == 'transform':
        extra = ['--crop-pct', '0.6']
    elif change == 'statistics':
        extra = ['--mean', '0.1']
    net, train = prepare([str(folder), *flags, *extra], classifier=change != 'classifier')
    assert (extract_features(net, train).logits is None) == (change == 'classifier')
    assert len(counted) == 2


def test_interrupted_leaves_nothing(flags, images, tmp_path, monkeypatch):
    net, train = prepare([str(images / 'colours'), *flags])
    with monkeypatch.context() as patch:
        def interrupted(*args):
            raise KeyboardInterrupt
        patch.setattr(module, 'save_file', interrupted)
        with pytest.raises(KeyboardInterrupt):
            extract_features(net, train, tmp_path / 'features')
    assert not list((tmp_path / 'features').iterdir())
    assert len(extract_features(net, train, tmp_path / 'features').pooled) == 24


def test_damaged_cache(flags, images, tmp_path):
    net, train = prepare([str(images / 'colours'), *flags])
    first = extract_features(net, train, tmp_path / 'features')
    path, = (tmp_path / 'features').glob('features-*/features.safetensors')
    path.write_bytes(path.read_bytes()[:200])
    np.testing.assert_array_equal(extract_features(net, train, tmp_path / 'features').pooled, first.pooled)


def test_nan_weights(flags, images, weights, tmp_path):
    state = load_file(weights)
    next(v for k, v in state.items() if k.endswith('conv1.weight'))[:] = float('nan')
    save_file(state, tmp_path / 'nan.safetensors')
    net, train = prepare([str(images / 'colours'), *flags, '--pretrained-path', str(tmp_path / 'nan.safetensors')])
    with pytest.raises(UserError, match='NaN or infinite features.*0.png'):
        extract_features(net, train, tmp_path / 'features')
    assert not list((tmp_path / 'features').iterdir())


def test_of_component(flags, images):
    argv = [f'--component=name={n},path={images / n}' for n in ('colours', 'noise')]
    found = extract_features(*prepare([*argv, *flags])).of_component(1)
    alone = extract_features(*prepare([str(images / 'noise'), *flags]))
    np.testing.assert_allclose(found.pooled, alone.pooled, atol=1e-5)
    np.testing.assert_array_equal(found.labels - 3, alone.labels)
