"""The model card: what the Hub reads of it, what people read of it, and that its code runs when copied."""
import csv
import dataclasses
import re
from functools import cache
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from conftest_engine import rows
from huggingface_hub import ModelCard
from scipy import stats

import timm_amf
from timm_amf import Plan, UserError
from timm_amf.cli import main
from timm_amf.hub.card import _base_models, _plan_text, build_card
from timm_amf.hub.publish import prepare

REPO = 'org/birds'


@pytest.fixture(scope='session')
def opened(runs):
    return cache(lambda name: prepare(runs(name)))


def card(what, **kwargs):
    return build_card(what, REPO, 'cc-by-4.0', **kwargs)


def with_recipe(what, plan=None, expected=None, **section):
    """The run as if its recipe had had this section `card`, and its Plan been this one."""
    recipe = {**what.run.args.recipe, 'card': section, 'expected': expected}
    args = SimpleNamespace(**{**vars(what.run.args), 'recipe': recipe})
    return dataclasses.replace(what, run=dataclasses.replace(what.run, args=args, plan=plan or what.run.plan))


# -- what the Hub reads -----------------------------------------------------------------------------------------------

def test_metadata(opened, runs):
    data = ModelCard(card(opened('amf'))).data
    assert data.library_name == 'timm_amf' and data.license == 'cc-by-4.0' and data.model_name == 'birds'
    assert data.pipeline_tag == 'image-classification' and data.metrics == ['accuracy']
    assert data.datasets == ['stripes', 'blobs']
    assert data.tags == ['image-classification', 'timm', 'timm_amf', 'fine-tuning', 'amf']
    assert data.base_model is None  # it began with random weights
    best = max(rows(runs('amf') / 'summary.csv'), key=lambda row: float(row['eval_top1']))
    found = {(r.dataset_name, r.dataset_type, r.metric_name.split()[0]): r.metric_value for r in data.eval_results}
    assert found == pytest.approx({
        ('stripes + blobs', 'mixture', 'Accuracy'): float(best['eval_top1']) / 100,
        ('stripes + blobs', 'mixture', 'Top-5'): float(best['eval_top5']) / 100,
        ('stripes', 'stripes', 'Accuracy'): float(best['eval_top1_stripes']) / 100,
        ('blobs', 'blobs', 'Accuracy'): float(best['eval_top1_blobs']) / 100,
    }, abs=1e-6)
    assert {r.dataset_split for r in data.eval_results} == {'val'}


def test_no_accuracy_of_the_model_index_comes_under_the_name_of_another(opened):
    what = opened('amf')
    both = [*(dataclasses.replace(r, top1=r.top1 / 2, how='ten crops') for r in what.results), *what.results]
    data = ModelCard(card(dataclasses.replace(what, results=both))).data
    expected = {(r.data or 'stripes + blobs', f'Accuracy ({r.how})', round(r.top1 / 100, 6)) for r in both}
    found = [
        (r.dataset_name, r.metric_name, r.metric_value) for r in data.eval_results if 'Accuracy' in r.metric_name]
    assert set(found) == expected and len(found) == len(both)


def test_what_the_publisher_says_goes_before_the_recipe(opened):
    what = with_recipe(opened('plain'), base_model='org/theirs', datasets='cub', tags=['birds', 'timm'])
    data = ModelCard(card(what)).data
    assert data.base_model in ('org/theirs', ['org/theirs']) and data.datasets == ['cub']
    assert data.tags == ['image-classification', 'timm', 'timm_amf', 'fine-tuning', 'birds']
    data = ModelCard(card(
        what, license_name='mine', license_link='https://example.org', base_models=['org/a'], datasets=['org/b'])).data
    assert data.base_model in ('org/a', ['org/a']) and data.datasets == ['org/b']
    assert (data.license_name, data.license_link) == ('mine', 'https://example.org')


@pytest.mark.parametrize('model,options,ids', [
    ('amf_resnet18x2', dict(pretrained=True), ['timm/resnet18.a1_in1k', 'timm/resnet10t.c3_in1k']),
    ('spottune_resnet26.decathlon_dtd', dict(pretrained=True), ['timm-amf/spottune_resnet26.decathlon_dtd']),
    ('spottune_resnet26.decathlon_dtd', dict(pretrained=False), []),
    ('test_resnet', dict(pretrained=True), ['timm/test_resnet.r160_in1k']),
    ('test_resnet', dict(pretrained=True, initial_checkpoint='w.safetensors'), []),
])
def test_base_models_are_named_by_hub_id(model, options, ids):
    with torch.device('meta'):
        built = timm.create_model(model)
    run = SimpleNamespace(options=options, args=SimpleNamespace(model=model))
    assert _base_models(SimpleNamespace(run=run, trained=built)) == ids


# -- what people read -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('expected,words', [
    (dict(source='Table III', split='test', top1_aircraft=dict(mean=93.01, std=0.2), top1=dict(min=96, max=98.5)),
     'on the `test` split (percent, top-1 unless another is named): aircraft 93.01 ± 0.2, 96 to 98.5; source: Table'),
    (dict(source='nobody', note='none', seconds=dict(least=3)), None),
])
def test_what_the_recipe_expects(opened, expected, words):
    text = card(with_recipe(opened('plain'), expected=expected))
    assert (words in text) if words else ('The recipe expects' not in text)


SEARCHED = Plan(lr=0.1, roles={'backbone': dict(train=['layer3.0.conv1', 'layer3.0.bn1'])})


@pytest.mark.parametrize('name,plan,paper,papers', [
    ('plain', None, None, ['plested2021rethinking']),
    ('plain', SEARCHED, None, ['barakat2023blockwise']),
    ('plain', SEARCHED, 'spottune', ['guo2019spottune']),  # a row of its tables that trains layers by name
    ('plain', Plan(lr=0.1, roles={'backbone': dict(train=['layer3.0'], low_blocks=1)}), None,
     ['barakat2023blockwise', 'plested2021rethinking']),
    ('multitune', None, None, ['shen2022amf', 'wang2020multitune']),
])
def test_whom_to_cite(opened, name, plan, paper, papers):
    text = card(with_recipe(opened(name), plan, **(dict(paper=paper) if paper else {})))
    assert re.findall(r'@\w+\{(\w+),', text) == papers


def test_results_with_their_range(opened, runs):
    text = card(opened('amf'))
    best = max(rows(runs('amf') / 'summary.csv'), key=lambda row: float(row['eval_top1']))
    for name, key, images in (('all', 'eval_top1', 25), ('stripes', 'eval_top1_stripes', 15)):
        top1 = float(best[key])
        low, high = stats.binomtest(round(top1 / 100 * images), images).proportion_ci(method='wilson')
        line = next(line for line in text.splitlines() if line.startswith(f'| {name} |'))
        assert f'| val | {images} | {top1:.2f} | {100 * low:.2f} to {100 * high:.2f} |' in line
    assert 'a little too good' in text  # the epoch was chosen on these images


def test_results_of_an_evaluation(runs, tmp_path):
    run = runs('amf')
    assert main(['evaluate', str(run), '--split', 'train', '--results-file', str(tmp_path / 'r.csv'), '--cpu']) == 0
    what = prepare(run, results=tmp_path / 'r.csv')
    with open(tmp_path / 'r.csv', newline='') as file:
        evaluated = list(csv.DictReader(file))
    assert len(evaluated) == 3 and len(what.results) == 6
    for result, row in zip(what.results, evaluated):
        assert (result.split, result.data, result.images) == ('train', row['component'], int(row['images']))
        assert result.top1 == float(row['top1']) and result.low == float(row['top1_low'])
    assert '| train | 45 |' in card(what)
    with pytest.raises(UserError, match='is not of timm-amf evaluate'):
        prepare(run, results=run / 'summary.csv')


def test_results_of_other_runs_are_not_those_of_the_model(runs, tmp_path):
    header = 'run,component,images,loss,top1,top1_std,top1_low,top1_high,top5,split,weights,crops\n'
    other, own, mean = (
        f'{run},,45,1.0,{top1},,10.0,90.0,99.0,test,best,10\n'
        for run, top1 in (('x/other', 11.5), ('y/amf', 22.5), ('mean of 2 runs', 33.5)))
    (tmp_path / 'r.csv').write_text(header + other + own + mean)
    readme = card(prepare(runs('amf'), results=tmp_path / 'r.csv'))
    assert '| 22.50 | 10.00 to 90.00 | 99.00 | ten crops |' in readme
    assert '| 33.50 | 10.00 to 90.00 | 99.00 | ten crops, mean of 2 runs |' in readme and '11.5' not in readme
    values = [r.metric_value for r in ModelCard(readme).data.eval_results]
    assert 0.225 in values and 0.335 not in values
    (tmp_path / 'r.csv').write_text(header + other)
    with pytest.raises(UserError, match='has no row of amf'):
        prepare(runs('amf'), results=tmp_path / 'r.csv')


@pytest.mark.parametrize('name,words', [
    ('amf', ('2 x test_resnet, each', 'forward_policy', 'import timm_amf', 'in a checkout of timm_amf')),
    ('spottune', ('every residual block', '(batch, blocks, 2)', 'frozen: {train: none}')),
    ('plain', ('test_resnet, fine-tuned.', 'pip install timm\n')),
])
def test_each_method(opened, name, words):
    text = card(opened(name))
    assert all(word in text for word in words)
    assert text.count('```') % 2 == 0 and '\n\n\n' not in text and '{{ ' not in text and '{%' not in text
    for heading in ('## Use', '## Results', '## How it was fine-tuned', '## Limits', '## Citation'):
        assert text.count(f'\n{heading}\n') == 1
    assert f'hf download {REPO} args.yaml' in text and 'timm-amf train --config run/args.yaml' in text
    assert 'It started from random weights.' in text


def test_the_code_of_the_card_runs_when_copied(client, hub, runs, capsys):
    timm_amf.publish(runs('amf'), REPO, 'mit')
    readme = hub.files(REPO)['README.md'].decode()
    code, = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
    assert code.index('import timm_amf') < code.index('create_model')
    capsys.readouterr()
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    shares = [float(line.split('%')[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3)
    assert {line.split('% ')[1] for line in lines} == {
        'stripes/class0', 'stripes/class1', 'class2', 'blobs/class0', 'blobs/class1'}


def test_the_plan_role_by_role():
    layers = [f'layer{i}.{j}.conv{k}' for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]
    plan = Plan.from_dict(dict(
        lr=0.01, epochs=30, weight_decay=1e-4, schedule=dict(sched='step', decay_rate=0.94, decay_epochs=20),
        roles={
            'branch.0': dict(lr=0.0008, low_blocks=8, low_lr_scale=0.4),
            'branch.1': dict(reinit_blocks=2, freeze_bn=True, train=layers[:14]),
            'policy': dict(lr=3e-5, start_epoch=2, schedule=dict(sched='constant')),
            'head': dict(train='none'),
        }))
    text = yaml.safe_load(_plan_text(plan, timm.create_model('amf_resnet18x2')))
    assert text == dict(
        epochs=30, opt='sgd', schedule=dict(sched='step', decay_epochs=20, decay_rate=0.94),
        roles={
            'branch.0': dict(lr=0.0008, weight_decay=1e-4, low_blocks=8, low_lr_scale=0.4),
            'branch.1': dict(lr=0.01, weight_decay=1e-4, train=layers[:14], reinit_blocks=2, freeze_bn=True),
            'policy': dict(lr=3e-5, weight_decay=1e-4, start_epoch=2, schedule=dict(sched='constant')),
            'head': dict(train='none'),
        })
