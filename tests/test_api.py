"""The commands as functions: the same results as the command, typed, with a user's mistakes as `UserError`."""
import csv
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent / 'engine'))
from conftest_engine import clean, folders, reset_accelerate  # noqa: E402, F401  fixtures

import timm_amf  # noqa: E402
from timm_amf import api  # noqa: E402
from timm_amf.cli import main  # noqa: E402
from timm_amf.engine.run_folder import best_epoch  # noqa: E402
from timm_amf.parsers import PARSERS  # noqa: E402

OPTIONS = dict(
    model='test_resnet', img_size=32, batch_size=8, epochs=2, lr=0.05, warmup_epochs=0, workers=0, cpu=True,
    tracker=['none'], no_progress=True)
FLAGS = [
    '--model', 'test_resnet', '--img-size', '32', '-b', '8', '--epochs', '2', '--lr', '0.05', '--warmup-epochs', '0',
    '--workers', '0', '--cpu', '--tracker', 'none', '--no-progress']


@pytest.fixture(scope='module')
def trained(folders, tmp_path_factory):  # noqa: F811
    """A run by the function, and the folder of its images."""
    reset_accelerate()
    output = tmp_path_factory.mktemp('api')
    return timm_amf.train(folders / 'stripes', output=output, experiment='function', **OPTIONS), folders / 'stripes'


def test_train_is_the_command(trained, tmp_path):
    run, data = trained
    assert main(['train', str(data), *FLAGS, '--output', str(tmp_path), '--experiment', 'command']) == 0
    for name in ('summary.csv', 'plan.yaml', 'model_best.safetensors'):
        assert (tmp_path / 'command' / name).read_bytes() == (run.folder / name).read_bytes(), name
    assert run.folder.name == 'function' and run.metrics == best_epoch(run.folder)
    assert run.model.num_classes == 3 and not run.model.training


def test_train_by_a_plan(trained, tmp_path):
    run, data = trained
    plan = timm_amf.Plan(lr=0.02, epochs=1, roles={'head': dict(lr=0.1)})
    options = {k: v for k, v in OPTIONS.items() if k not in ('epochs', 'lr', 'warmup_epochs')}
    found = timm_amf.train(data, plan=plan, output=tmp_path, experiment='a', **options)
    assert timm_amf.Plan.from_yaml(found.folder / 'plan.yaml') == plan
    reset_accelerate()
    again = timm_amf.train(config=found.folder / 'args.yaml', output=tmp_path, experiment='b')
    assert (again.folder / 'summary.csv').read_bytes() == (found.folder / 'summary.csv').read_bytes()
    reset_accelerate()
    (tmp_path / 'other.yaml').write_text('plan: {lr: 1, opt: adamw}\n')  # in whose place the Plan comes
    third = timm_amf.train(
        data={'path': str(data)}, plan=plan.to_dict(), config=tmp_path / 'other.yaml', output=tmp_path, experiment='c',
        **options)
    assert (third.folder / 'summary.csv').read_bytes() == (found.folder / 'summary.csv').read_bytes()


def test_train_evaluates_weights(trained):
    run, data = trained
    options = {k: v for k, v in OPTIONS.items() if k not in ('epochs', 'lr', 'warmup_epochs')}
    weights = run.folder / 'model_best.safetensors'
    found = timm_amf.train(data, initial_checkpoint=weights, eval_only=True, **options)
    assert found.metrics['top1'] == pytest.approx(run.metrics['top1'])
    assert timm_amf.train(data, dry_run=True, **options).metrics == {}


def test_evaluate_is_the_command(trained, tmp_path, capsys):
    run, _ = trained
    row, = timm_amf.evaluate(run.folder, cpu=True, split='train', ten_crop=True)
    assert capsys.readouterr().out == ''
    file = tmp_path / 'results.json'
    words = [str(run.folder), '--cpu', '--split', 'train', '--ten-crop', '--results-file', str(file)]
    assert main(['evaluate', *words]) == 0
    theirs, = json.loads(file.read_text())['results']
    assert {name: theirs[name] for name in vars(row)} == vars(row) and row.images > 0


def test_predict_is_the_command(trained, tmp_path):
    run, data = trained
    images = sorted((data / 'val').rglob('*.png'))[:3]
    found = list(timm_amf.predict(run.folder, images, topk=2, cpu=True, img_size=48))
    assert main([
        'predict', str(run.folder), *map(str, images), '--topk', '2', '--cpu', '--img-size', '48', '--output',
        str(tmp_path / 'a.csv')]) == 0
    with open(tmp_path / 'a.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(p.path, p.labels[0], p.probabilities[1]) for p in found] == [
        (row['filename'], row['label_0'], float(row['prob_1'])) for row in rows]
    assert found != list(timm_amf.predict(run.folder, images, topk=2, cpu=True)), 'flags act'
    with pytest.raises(timm_amf.UserError, match='not both'):
        timm_amf.predict(run.folder, images, options=timm_amf.api.RunOptions(), cpu=True)


def test_export_and_report_give_their_files(trained, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    run, _ = trained
    found = timm_amf.export(run.folder, 'safetensors', tmp_path / 'm.safetensors')
    assert found.path == tmp_path / 'm.safetensors' and found.path.is_file() and found.same_class == sum(found.batches)
    assert timm_amf.report([run.folder], tmp_path / 'page', no_eval=True) == tmp_path / 'page' / 'index.html'
    assert capsys.readouterr().out == ''


def test_search_takes_the_order_of_the_others(monkeypatch):
    asked = []
    monkeypatch.setattr('timm_amf.search.block_search.search_blocks', lambda *a, **k: asked.append((a, k)))
    timm_amf.search('DIR', 'resnet18', ways='layer', epochs=3)
    assert asked == [(('resnet18', 'DIR', None, 'layer'), dict(epochs=3))]


@pytest.mark.parametrize('name', ['evaluate', 'predict', 'report', 'export'])
def test_defaults_are_those_of_the_command(name):
    flags = {action.dest: action for action in PARSERS[name]()._actions if action.option_strings}
    named = {p.name: p.default for p in inspect.signature(getattr(api, name)).parameters.values() if p.name in flags}
    assert named == {dest: flags[dest].default for dest in named} and not any(flags[dest].required for dest in named)


@pytest.mark.parametrize('name', ['search', 'report', 'export'])
def test_a_module_of_a_commands_name_is_both(name):
    module = getattr(timm_amf, name)
    assert module is sys.modules[f'timm_amf.{name}'] and callable(module)


@pytest.mark.parametrize('call, text', [
    (lambda: timm_amf.train('/nowhere', 'test_resnet'), '/nowhere does not exist'),
    (lambda: timm_amf.train('.', 'test_resnet', epochs='many'), 'invalid int value'),
    (lambda: timm_amf.evaluate('/nowhere'), '/nowhere: no args.yaml'),
    (lambda: timm_amf.evaluate('/nowhere', tencrop=True), 'did you mean ten_crop'),
    (lambda: timm_amf.evaluate([]), 'required: RUN'),
    (lambda: timm_amf.predict('/nowhere', '.', batch_size=0), 'must be at least 1'),
    (lambda: timm_amf.export('/nowhere', 'jpeg'), 'invalid choice'),
    (lambda: timm_amf.report('/nowhere'), '/nowhere'),
    (lambda: timm_amf.search('/nowhere', 'test_resnet'), '/nowhere'),
    (lambda: timm_amf.fit('/nowhere'), '/nowhere'),
    (lambda: timm_amf.advise('test_resnet', '/nowhere'), '/nowhere'),
    (lambda: timm_amf.sweep('/nowhere', 'test_resnet', grid={'lr': [1]}), '/nowhere'),
])
def test_mistakes_are_user_errors(call, text):
    with pytest.raises(timm_amf.UserError, match=text):
        call()


def test_a_missing_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith('timm_amf.search.sweep')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(timm_amf.UserError, match=r"pip install 'timm_amf\[sweep\]'"):
        timm_amf.sweep('DIR', 'test_resnet')


PAGE = (Path(__file__).parents[1] / 'docs' / 'python.md').read_text(encoding='utf-8')


@pytest.fixture
def page_folder(folders, tmp_path, monkeypatch):  # noqa: F811
    """A folder as that of the page: `birds`, `photos`, and weights in the place of the Hub's."""
    for name in ('optuna', 'sklearn', 'matplotlib'):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'birds').symlink_to(folders / 'stripes')
    (tmp_path / 'photos').symlink_to(folders / 'stripes' / 'val')
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet').state_dict(), 'w.safetensors')


@pytest.mark.slow
def test_the_page_runs_as_it_stands(page_folder, capsys):
    code = '\n'.join(re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL))
    code, count = re.subn(
        r"common = dict\(model='resnet18', pretrained=True, img_size=224, ",
        "common = dict(model='test_resnet', pretrained_path='w.safetensors', img_size=32, batch_size=8, workers=0, "
        "cpu=True, tracker=['none'], ", code)
    assert count == 1
    code = re.sub(r'epochs=\d+', 'epochs=3', code)
    names = {'__name__': '__main__'}
    exec(compile(code, 'docs/python.md', 'exec'), names)
    out = capsys.readouterr().out
    assert 'ensemble of 2 runs: ' in out and 'epoch: no such option, did you mean epochs?' in out
    assert names['page'].is_file() and names['file'].is_file() and names['model'].num_classes == 3
    assert timm_amf.Plan.from_yaml(names['advised'].folder / 'plan.yaml').lr == names['advice'].plan.lr


def test_the_page_names_every_command():
    from timm_amf.cli import _COMMANDS

    for name in (*set(_COMMANDS) - {'demo', 'models', 'decathlon'}, 'load'):
        assert f'| `{name}(' in PAGE and callable(getattr(timm_amf, name)), name
