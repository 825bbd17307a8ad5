"""`timm-amf advise` from the command line to a run of train_amf.py."""
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest_advise import dry_run
from PIL import Image
from safetensors.torch import save_file

import timm_amf
from timm_amf import cli
from timm_amf.errors import UserError
from timm_amf.parsers import parse
from timm_amf.search import advise as module
from timm_amf.search.proposal import decide
from timm_amf.search.transferability import Measures


@pytest.fixture
def advise_cli(tmp_path, flags, capsys):
    """advise_cli(*flags) -> (exit code, what it printed, its file)."""
    def run(*extra, base=flags):
        path = tmp_path / 'advice.yaml'
        pilots = [] if '--pilot-epochs' in extra else ['--pilot-epochs', '0']
        code = cli.main(['advise', *base, '--advice-file', str(path), '--overwrite', *pilots, *extra])
        captured = capsys.readouterr()
        return code, captured.out + captured.err, path
    return run


def sided(monkeypatch, **suited):
    """Let each component have the fixed-feature accuracy of a given side, whatever was measured."""
    original = module.measure

    def measure(train, val, names, *args):
        result = original(train, val, names, *args)
        component = names[train.labels[0]].rstrip('012')
        result.values.update(fixed_accuracy=85. if suited[component] else 40., fixed_top1=52.)
        return result
    monkeypatch.setattr(module, 'measure', measure)


def test_plain_model(advise_cli, images, monkeypatch):
    sided(monkeypatch, colours=True)
    code, text, path = advise_cli(str(images / 'colours'))
    assert code == 0, text
    for word in ('fixed features above chance', 'normalised Fisher score', 'LogME', 'LEEP', 'NCE', 'H-score',
                 'TransRate', '--source-dir', '--random-init', 'learning rate', 'low LR for low blocks', 'how sure'):
        assert word in text
    groups = dry_run(path)
    assert {g['l2sp_alpha'] for g in groups} == {0., 0.01}
    assert {g['lr'] for g in groups} == {1e-4}  # no pilots: the low LR of Table 7's left side
    content = yaml.safe_load(path.read_text())
    assert (content['head_start'], content['plan']['opt']) == ('probe', 'adamw')  # the start of `fit`
    assert content['plan']['norms'] == 'frozen'


def test_unsuited(advise_cli, images, monkeypatch):
    sided(monkeypatch, noise=False)
    code, text, path = advise_cli(str(images / 'noise'), '--lr', '7', '--weight-decay', '3e-4')
    assert code == 0, text
    assert 'lr' not in yaml.safe_load(path.read_text())  # or it would be the Plan's
    groups = dry_run(path)
    assert {g['lr'] for g in groups if g['role'] == 'backbone'} == {7., 2.8}
    assert {g['l2sp_alpha'] for g in groups} == {0.} and {g['weight_decay'] for g in groups} == {0., 3e-4}


@pytest.mark.parametrize('alone', [True, False])
def test_pilots_decide(advise_cli, images, monkeypatch, alone):
    """The LR is the best of three, and the settings of Table 7 stay only where they are of use."""
    sided(monkeypatch, colours=True)
    tried = []

    def train(args, data, plan):
        settings = plan.role('backbone')
        assert {plan.lr, plan.role('head').lr} == {settings.lr}
        tried.append((plan.lr, settings.reinit_blocks, plan.epochs))
        top1 = 50 + (plan.lr == 0.003) + 2 * (settings.reinit_blocks == 0) * (1 if alone else -1)
        return dict(top1=top1, loss=1., train_loss=1.)
    monkeypatch.setattr(module, '_short_training', train)
    code, text, path = advise_cli(str(images / 'colours'), '--opt', 'sgd', '--lr', '1e-2', '--pilot-epochs', '3')
    assert code == 0, text
    assert tried == [(0.001, 1, 3), (0.003, 1, 3), (0.01, 1, 3), (0.003, 0, 3)]
    plan = timm_amf.Plan.from_yaml(path)
    assert plan.lr == 0.003 and plan.role('backbone').reinit_blocks == (0 if alone else 1)
    assert f'LR 0.003, {"without " if alone else ""}the settings of Table 7: {53 if alone else 51}.00' in text
    assert ('All are below the fixed features (52.00)' in text) is not alone


def test_pilots_train(advise_cli, images):
    code, text, path = advise_cli(str(images / 'colours'), '--pilot-epochs', '1')
    assert code == 0 and text.count('colours under test_resnet, LR') == 4, text
    assert {g['lr'] for g in dry_run(path) if g['role'] == 'backbone'} <= {1e-4, 3e-4, 1e-3, 4e-4, 1.2e-4, 4e-5}


def test_pilots_are_of_one_component_and_of_the_recipe(advise_cli, images, tmp_path, monkeypatch):
    """Each trains on its own images alone, as the recipe's Plan has it but for LR and Table 7."""
    sided(monkeypatch, colours=True, noise=True)
    original, tried = module.run, []

    def run(args, **kwargs):
        original(args=args, **kwargs)
        tried.append((args.recipe['plan'], read_columns(args)))
    monkeypatch.setattr(module, 'run', run)
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump(dict(plan=dict(
        lr=7., opt='adamw', schedule=dict(sched='tanh'), roles=dict(backbone=dict(lr=8., freeze_bn=True))))))
    data = [f'--component=name={n},path={images / n}' for n in ('noise', 'colours')]
    code, text, _ = advise_cli(*data, '-c', str(recipe), '--pilot-epochs', '1')
    assert code == 0, text
    for number, (plan, columns) in enumerate(tried):
        lr = 1e-4 * (1, 3, 10)[number % 4] if number % 4 < 3 else plan['lr']
        assert plan['lr'] == plan['roles']['backbone']['lr'] == plan['roles']['head']['lr'] == pytest.approx(lr)
        assert (plan['opt'], plan['schedule']['sched'], plan['epochs']) == ('adamw', 'tanh', 1)
        assert plan['roles']['backbone']['freeze_bn'] and not any(c.startswith('eval_top1_') for c in columns)
    assert len(tried) == 8


def read_columns(args) -> list[str]:
    return Path(args.output, args.experiment, 'summary.csv').read_text().splitlines()[0].split(',')


def test_mixture_on_two_sides(advise_cli, images, weights, monkeypatch):
    """One network cannot have both: an AMF of two, or a MultiTune where no policy network can be had."""
    sided(monkeypatch, colours=True, noise=False)
    data = [f'--component=name={n},path={images / n}' for n in ('noise', 'colours')]
    code, text, path = advise_cli(*data, '--policy', 'none')
    assert code == 0, text
    content = yaml.safe_load(path.read_text())
    assert content['model'] == 'multitune' and 'branch_loss' not in content
    assert content['model_kwargs']['backbones'] == ['test_resnet'] * 2
    lrs = {g['role']: g['lr'] for g in dry_run(path)}
    assert lrs['branch.0'] < lrs['branch.1'] == lrs['head']
    code, text, _ = advise_cli(*data, '--policy', 'test_vit')
    assert code == 2 and '--policy test_vit' in text  # its weights are not at hand


def test_mixture_on_one_side(advise_cli, images, monkeypatch):
    sided(monkeypatch, colours=True, noise=True)
    data = [f'--component=name={n},path={images / n}' for n in ('noise', 'colours')]
    _, _, path = advise_cli(*data)
    assert yaml.safe_load(path.read_text())['model'] == 'test_resnet'


def test_amf(advise_cli, images, weights, monkeypatch):
    sided(monkeypatch, colours=True, noise=False)
    kwargs = [
        '--model', 'amf', '--model-kwargs', "backbones=('test_resnet','test_resnet')", 'policy=test_resnet',
        f"backbone_kwargs={{'pretrained_cfg_overlay': {{'file': '{weights}'}}}}",
        f"policy_kwargs={{'pretrained_cfg_overlay': {{'file': '{weights}'}}}}"]
    base = ['--img-size', '32', '-b', '32', '--workers', '0', '--cpu', '--tracker', 'none', '--epochs', '400',
            '--opt', 'sgd']
    data = [f'--component=name={n},path={images / n}' for n in ('noise', 'colours')]
    kwargs += ['--policy-start-epoch', '1', '--role', 'branch.0.freeze_bn=true']  # for no plain network
    code, text, path = advise_cli(*data, *kwargs, base=base)
    assert code == 0, text
    lrs = {}
    for group in dry_run(path):
        lrs.setdefault(group['role'], set()).add(group['lr'])
    assert lrs == {'branch.0': {0.02, 0.008}, 'branch.1': {0.002}, 'head': {0.02}, 'policy': {3e-5}}


def test_file_is_not_replaced_unasked(tmp_path, flags, images, capsys):
    path = tmp_path / 'mine.yaml'
    path.write_text('epochs: 3')
    assert cli.main(['advise', str(images / 'colours'), *flags, '--advice-file', str(path)]) == 2
    assert '--overwrite' in capsys.readouterr().err and path.read_text() == 'epochs: 3'


def test_keeps_a_plan_that_was_given(advise_cli, images, tmp_path, monkeypatch):
    sided(monkeypatch, colours=True)
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump(dict(plan=dict(
        epochs=7, opt='sgd', schedule=dict(sched='tanh'), roles=dict(backbone=dict(low_blocks=2, freeze_bn=True))))))
    code, text, path = advise_cli(str(images / 'colours'), '-c', str(recipe))
    assert code == 0, text
    plan = timm_amf.Plan.from_yaml(path)
    assert plan.schedule.sched == 'tanh' and plan.epochs == 2  # a flag wins
    assert plan.roles['backbone'].freeze_bn and plan.roles['backbone'].low_blocks == 0


def test_models_are_ranked(advise_cli, images, flags, weights, tmp_path):
    torch.manual_seed(1)
    save_file(timm.create_model('test_efficientnet').state_dict(), tmp_path / 'other.safetensors')
    models = f'test_resnet={weights},test_efficientnet={tmp_path / "other.safetensors"}'
    code, text, path = advise_cli(str(images / 'colours'), '--models', models, base=[*flags[4:], '--model', 'resnet18'])
    assert code == 0, text
    rows = [line.split() for line in text.splitlines()[1:3]]
    assert {row[0] for row in rows} == {'test_resnet', 'test_efficientnet'} and float(rows[0][1]) <= float(rows[1][1])
    content = yaml.safe_load(path.read_text())
    assert content['model'] == rows[0][0] and content['pretrained_path'] in models


def test_ranks():
    """Mean over the measures of the number of better models, and one."""
    found = module._rank([(n, [_component(*v)]) for n, v in dict(a=(50., 1.), b=(60., 2.), c=(60., 0.)).items()])
    assert [(name, rank) for name, rank, _ in found] == [('b', 1.), ('c', 2.), ('a', 2.5)]
    assert found[0][2] == dict(fixed_top1=60., log_me=2.)


def _component(top1, log_me):
    measures = Measures(dict(fixed_top1=top1, log_me=log_me), {}, 2, 2)
    return module.ComponentAdvice('x', 'net', measures, decide(dict(fixed_accuracy=50.)), {}, [])


def test_python(images, weights, tmp_path):
    options = dict(pretrained_path=str(weights), img_size=32, batch_size=16, workers=0, cpu=True, progress=False,
                   pilot_epochs=0)
    advice = timm_amf.advise('test_resnet', images / 'colours', source_dir=images / 'noise', **options)
    assert set(advice.measures['colours']) == {
        'fixed_top1', 'fixed_accuracy', 'fisher', 'log_me', 'leep', 'nce', 'h_score', 'trans_rate', 'emd'}
    assert 0 < advice.measures['colours']['emd'] < 1
    assert advice.measures['colours']['fixed_top1'] > 90
    assert isinstance(advice.plan, timm_amf.Plan) and advice.components[0].decision.suited
    advice.to_yaml(tmp_path / 'a.yaml')
    assert timm_amf.Plan.from_yaml(tmp_path / 'a.yaml') == advice.plan
    with pytest.raises(UserError, match='batch_sise'):
        timm_amf.advise('test_resnet', images / 'colours', batch_sise=3)


def test_random_init(images, flags, monkeypatch):
    """A short training says nothing against the features; a long one decides."""
    def run(*extra):
        words = [str(images / 'colours'), *flags, '--pilot-epochs', '0', *extra]
        own = parse('advise', words)
        return module._advise(own, module._runs(own.words)).components[0].measures

    short = run('--random-init', '1')
    assert 'random_minus_fixed' not in short.values and 'more --random-init' in short.missing['random_minus_fixed']
    long = run('--random-init', '12', '--no-aug')
    assert long.values['random_minus_fixed'] == pytest.approx(long.values['random_init'] - long.values['fixed_top1'])


@pytest.mark.parametrize('extra, message', [
    (['--model', 'amf_resnet18x2', '--pretrained-path', '{weights}'], 'not a checkpoint of the whole'),
    (['--models', 'test_resnet'], 'name two different models'),
    (['--random-init', '-2'], '--random-init: must be at least 0'),
    (['--source-dir', '/nowhere'], '/nowhere does not exist'),
    (['--component', 'name=c,path={images}/colours,per_class.train=1'], "'c': class 'colours0' has one image"),
    (['--component', 'name=c,path={images}/colours,classes=1'], 'there is one class'),
    (['--modle', 'x'], 'did you mean --model'),
])
def test_mistakes(advise_cli, images, weights, extra, message):
    extra = [word.format(images=images, weights=weights) for word in extra]
    code, text, path = advise_cli(*([] if '--component' in extra else [str(images / 'colours')]), *extra)
    assert code == 2 and message in text and 'Traceback' not in text
    assert not path.exists()


def test_no_variance(advise_cli, tmp_path):
    for split in ('train', 'val'):
        for k in range(2):
            folder = tmp_path / 'grey' / split / str(k)
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(folder / f'{i}.png')
    code, text, _ = advise_cli(str(tmp_path / 'grey'))
    assert code == 2 and 'no feature varies' in text


def test_no_model(advise_cli, images):
    code, text, _ = advise_cli(str(images / 'colours'), base=['--cpu'])
    assert code == 2 and 'no model' in text
