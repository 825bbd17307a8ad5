"""docs/add_a_method.md: methods in one file outside the package train, resume, record, evaluate, publish and load."""
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest_engine import ROOT, assert_same_run, reset_accelerate, rows

import timm_amf
import train_amf
from timm_amf.cli import main
from timm_amf.models import RunSettings, method_of

METHODS = {
    'bss': (['backbone=test_resnet', 'weight=0.01', 'k=2'], [], 'feature_norm'),
    'gated': (["backbones=('test_resnet','test_resnet')"], ['--branch-lr', '0.01', '0.05'], 'gate'),
}


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'examples' / 'methods'))
    yield
    reset_accelerate()


def _train(output: Path, name: str, method: str, data: list[str], *flags: str) -> Path:
    kwargs, lrs, _ = METHODS[method]
    reset_accelerate()
    train_amf.train([
        '--device-modules', method, '--model', method, '--model-kwargs', *kwargs, *lrs, '--img-size', '32', '-b', '15',
        '--epochs', '2', '--workers', '0', '--lr', '0.05', '--warmup-epochs', '0', '--cpu', '--tracker', 'none',
        *data, '--output', str(output), '--experiment', name, *flags])
    return output / name


@pytest.mark.parametrize('method', METHODS)
def test_a_method_in_one_file(method, components, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    whole = _train(tmp_path, 'whole', method, components)
    parts = _train(tmp_path, 'parts', method, components, '--stop-epoch', '1')
    _train(tmp_path, 'parts', method, components, '--resume', 'auto')
    assert_same_run(whole, parts)
    assert METHODS[method][2] in rows(whole / 'policy.csv')[0]

    assert main(['evaluate', str(whole), '--cpu']) == 0
    best = max(float(row['eval_top1']) for row in rows(whole / 'summary.csv'))
    assert f'{best:.2f}' in capsys.readouterr().out

    published = tmp_path / 'published'
    timm_amf.publish(whole, f'org/{method}', 'mit', dry_run=published)
    assert method_of(timm_amf.load(published)).sentence() in (published / 'README.md').read_text()
    model = timm_amf.load(published)
    assert method_of(model).method_name == method
    x = torch.randn(3, 3, 32, 32)
    again = timm.create_model(f'local-dir:{published}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(model(x), again(x))
        assert torch.equal(method_of(model).forward_train(x, RunSettings())['output'], model(x))


def test_the_penalty_is_that_of_its_paper(examples):
    import bss  # noqa: F401  registers the model

    model = timm.create_model('bss', backbone='test_resnet', weight=0.5, k=2, num_classes=3)
    features = torch.randn(6, 4, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(features.T @ features)
    penalty = method_of(model).extra_loss(dict(features=features), None, None, RunSettings())
    torch.testing.assert_close(penalty.double(), 0.5 * eigenvalues[:2].sum(), rtol=1e-4, atol=1e-6)
    assert 'bss' in sys.modules
