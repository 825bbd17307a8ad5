"""The model card: what the Hub reads of it, what people read of it, and that its code runs when copied."""
import csv
import dataclasses
import re
from types import SimpleNamespace

import pytest
import timm
from conftest_engine import rows
from huggingface_hub import ModelCard
from scipy import stats

import timm_amf
from timm_amf import Plan, UserError
from timm_amf.hub.card import CardOptions, _base_models, build_card
from timm_amf.hub.stage import open_run
from timm_amf.hub.words import describe_plan, describe_schedule

REPO = 'org/birds'


@pytest.fixture(scope='session')
def opened(runs):
    made = {}

    def _open(name):
        if name not in made:
            made[name] = open_run(runs(name))
        return made[name]
    return _open


def card(run, **kwargs):
    return build_card(run, REPO, CardOptions('cc-by-4.0', **kwargs))


# -- what the Hub reads -----------------------------------------------------------------------------------------------

def test_metadata(opened):
    data = ModelCard(card(opened('amf'))).data
    assert data.library_name == 'timm_amf' and data.license == 'cc-by-4.0'
    assert data.pipeline_tag == 'image-classification' and data.metrics == ['accuracy']
    assert data.datasets == ['stripes', 'blobs']
    assert {'image-classification', 'timm', 'timm_amf', 'amf'} <= set(data.tags)
    assert data.base_model is None  # it began with random weights


def test_the_model_index_has_the_values_of_the_summary(opened, runs):
    data = ModelCard(card(opened('amf'))).data
    assert data.model_name == 'birds'
    best = max(rows(runs('amf') / 'summary.csv'), key=lambda row: float(row['eval_top1']))
    found = {(r.dataset_name, r.metric_name.split(' (')[0]): r.metric_value for r in data.eval_results}
    assert found == pytest.approx({
        ('stripes + blobs', 'top-1 accuracy, percent'): float(best['eval_top1']),
        ('stripes + blobs', 'top-5 accuracy, percent'): float(best['eval_top5']),
        ('stripes', 'top-1 accuracy, percent'): float(best['eval_top1_stripes']),
        ('blobs', 'top-1 accuracy, percent'): float(best['eval_top1_blobs']),
    }, abs=1e-4)
    assert {r.metric_type for r in data.eval_results} == {'accuracy'}
    assert {r.task_type for r in data.eval_results} == {'image-classification'}
    assert {r.dataset_split for r in data.eval_results} == {'val'}
    assert [r.dataset_type for r in data.eval_results] == ['mixture', 'mixture', 'stripes', 'blobs']


@pytest.mark.parametrize('datasets', (None, ['one/set-of-both']))
def test_no_accuracy_of_the_model_index_comes_under_the_name_of_another(opened, datasets):
    run = opened('amf')
    own = [r for r in run.results]
    both = [*(dataclasses.replace(r, top1=r.top1 / 2, how='ten crops') for r in own), *own]
    data = ModelCard(card(dataclasses.replace(run, results=both), datasets=datasets)).data
    expected = {(r.data or 'stripes + blobs', f'top-1 accuracy, percent ({r.how})', round(r.top1, 4)) for r in both}
    found = [(r.dataset_name, r.metric_name, r.metric_value) for r in data.eval_results if 'top-1' in r.metric_name]
    assert set(found) == expected and len(found) == len(both)


def test_what_the_publisher_says_goes_first(opened):
    data = ModelCard(card(
        opened('plain'), base_models=['timm/resnet18.a1_in1k'], datasets=['org/birds-data'])).data
    assert data.base_model == ['timm/resnet18.a1_in1k'] or data.base_model == 'timm/resnet18.a1_in1k'
    assert data.datasets == ['org/birds-data']
    other = build_card(opened('plain'), REPO, CardOptions('other', 'mine', 'https://example.org/licence'))
    assert ModelCard(other).data.license_name == 'mine'
    assert ModelCard(other).data.license_link == 'https://example.org/licence'


@pytest.mark.parametrize('license', ('', None, 'My Licence', 'MIT', 'other', '-'))
def test_a_licence_must_be_said(license):
    with pytest.raises(UserError, match='--license'):
        CardOptions(license)


@pytest.mark.parametrize('model,own,ids', [
    ('amf_resnet18x2', dict(pretrained=True), ['timm/resnet18.a1_in1k', 'timm/resnet10t.c3_in1k']),
    ('spottune_resnet50', dict(pretrained=True), ['timm/resnet50.a1_in1k', 'timm/resnet18.a1_in1k']),
    ('spottune_resnet26.decathlon_dtd', dict(pretrained=True), ['timm-amf/spottune_resnet26.decathlon_dtd']),
    ('spottune_resnet26.decathlon_dtd', dict(pretrained=False), []),
    ('test_resnet', dict(pretrained=True), ['timm/test_resnet.r160_in1k']),
    ('test_resnet', dict(pretrained=False), []),
    ('test_resnet', dict(pretrained=True, pretrained_path='w.safetensors'), []),
    ('test_resnet', dict(pretrained=True, initial_checkpoint='w.safetensors'), []),
])
def test_base_models_are_named_by_hub_id(model, own, ids):
    run = SimpleNamespace(trained=timm.create_model(model), own=own, args=SimpleNamespace(model=model))
    assert _base_models(run) == ids


# -- what the recipe says ---------------------------------------------------------------------------------------------

def with_recipe(run, plan=None, **section):
    """The run as if its recipe had had this section `card`, and its Plan been this one."""
    args = SimpleNamespace(**{**vars(run.args), 'recipe': {**run.args.recipe, 'card': section}})
    return dataclasses.replace(run, args=args, plan=plan or run.plan)


def cited(text):
    return re.findall(r'@\w+\{(\w+),', text)


def test_tags_of_the_recipe_are_added_once(opened):
    tags = ModelCard(card(with_recipe(opened('amf'), tags=['mixture', 'amf', 'birds']))).data.tags
    assert tags == ['image-classification', 'timm', 'timm_amf', 'fine-tuning', 'amf', 'mixture', 'birds']


def test_a_name_instead_of_a_list_is_one_name(opened):
    data = ModelCard(card(with_recipe(
        opened('plain'), base_model='timm/resnet18.a1_in1k', datasets='cub', tags='birds'))).data
    assert data.base_model == 'timm/resnet18.a1_in1k' or data.base_model == ['timm/resnet18.a1_in1k']
    assert data.datasets == ['cub'] and data.tags[-1] == 'birds'


@pytest.mark.parametrize('expected,words', [
    (dict(source='Table III', split='test', top1_aircraft=dict(mean=93.01, std=0.2), top1=dict(min=96, max=98.5)),
     'The recipe expects on the `test` split (percent, top-1 unless another is named): aircraft 93.01 ± 0.2, 96 to '
     '98.5; source: Table III.'),
    (dict(source='my notebook', top5=dict(mean=99), seconds=dict(least=3), note='slow'),
     'The recipe expects (percent, top-1 unless another is named): top5 99.00; source: my notebook.'),
    (dict(source='nobody', note='none'), None),
    (dict(top1=dict(mean=93)), None),
])
def test_what_the_recipe_expects(opened, expected, words):
    run = opened('plain')
    args = SimpleNamespace(**{**vars(run.args), 'recipe': {**run.args.recipe, 'expected': expected}})
    text = card(dataclasses.replace(run, args=args))
    assert (words in text) if words else ('The recipe expects' not in text)


SEARCHED = Plan(lr=0.1, roles={'backbone': dict(train=['layer3.0.conv1', 'layer3.0.bn1'])})


@pytest.mark.parametrize('name,plan,paper,papers', [
    ('plain', None, None, ['plested2021rethinking']),
    ('plain', None, 'spottune', ['guo2019spottune']),
    ('plain', None, 'blockwise', ['barakat2023blockwise']),
    ('plain', None, 'a paper of my own', ['plested2021rethinking']),
    ('plain', SEARCHED, None, ['barakat2023blockwise']),
    ('plain', SEARCHED, 'spottune', ['guo2019spottune']),  # a row of its tables that trains layers by name
    ('plain', Plan(lr=0.1, roles={'backbone': dict(train=[-1])}), None, ['plested2021rethinking']),
    ('plain', Plan(lr=0.1, roles={'backbone': dict(train=['layer3.0'], low_blocks=1)}), None,
     ['barakat2023blockwise', 'plested2021rethinking']),
    ('amf', None, 'amf', ['shen2022amf']),
    ('amf', Plan(lr=0.1, roles={'branch.0': dict(train=['layer3.0'])}), None, ['shen2022amf', 'barakat2023blockwise']),
    ('multitune', None, None, ['shen2022amf', 'wang2020multitune']),
])
def test_whom_to_cite(opened, name, plan, paper, papers):
    section = dict(paper=paper) if paper else {}
    assert cited(card(with_recipe(opened(name), plan, **section))) == papers


def test_each_paper_of_a_recipe_can_be_cited(opened):
    from timm_amf.engine.recipe_schema import PAPERS

    for paper, title in PAPERS.items():
        text = card(with_recipe(opened('plain'), paper=paper))
        assert title.lower() in text.lower().replace('{', '').replace('}', '')


def test_a_search_in_words(opened):
    text = card(with_recipe(opened('plain'), SEARCHED))
    assert 'test_resnet, fine-tuned in a part of its layers.' in text
    assert '- `backbone`: learning rate 0.1, only `layer3.0.conv1` and `layer3.0.bn1` trained, all else in it' in text


# -- what people read -------------------------------------------------------------------------------------------------

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
    from timm_amf.cli import main

    run = runs('amf')
    assert main(['evaluate', str(run), '--split', 'train', '--results-file', str(tmp_path / 'r.csv'), '--cpu']) == 0
    opened = open_run(run, results=tmp_path / 'r.csv')
    with open(tmp_path / 'r.csv', newline='') as file:
        evaluated = list(csv.DictReader(file))
    assert len(evaluated) == 3 and len(opened.results) == 6
    for result, row in zip(opened.results, evaluated):
        assert (result.split, result.data, result.images) == ('train', row['component'], int(row['images']))
        assert result.top1 == float(row['top1']) and result.low == float(row['top1_low'])
    assert '| train | 45 |' in card(opened)
    with pytest.raises(UserError, match='is not of timm-amf evaluate'):
        open_run(run, results=run / 'summary.csv')


def test_results_of_other_runs_are_not_those_of_the_model(runs, tmp_path):
    header = 'run,component,images,loss,top1,top1_std,top1_low,top1_high,top5,split,weights,crops\n'
    line = '{},,45,1.0,{},,10.0,90.0,99.0,test,best,10\n'
    text = header + line.format('x/other', 11.5) + line.format('y/amf', 22.5)
    (tmp_path / 'r.csv').write_text(text + line.format('mean of 2 runs', 33.5))
    opened = open_run(runs('amf'), results=tmp_path / 'r.csv')
    readme = card(opened)
    assert '| 22.50 | 10.00 to 90.00 | 99.00 | ten crops |' in readme
    assert '| 33.50 | 10.00 to 90.00 | 99.00 | ten crops, mean of 2 runs |' in readme and '11.5' not in readme
    values = [r.metric_value for r in ModelCard(readme).data.eval_results]
    assert 22.5 in values and 33.5 not in values
    (tmp_path / 'r.csv').write_text(header + line.format('x/other', 11.5))
    with pytest.raises(UserError, match='has no row of amf'):
        open_run(runs('amf'), results=tmp_path / 'r.csv')


@pytest.mark.parametrize('name,citation,words', [
    ('amf', 'shen2022amf', ('2 x test_resnet, each', 'policy network', 'forward_policy')),
    ('spottune', 'guo2019spottune', ('every residual block', '(batch, blocks, 2)', '`frozen`: frozen')),
    ('plain', 'plested2021rethinking', ('test_resnet, fine-tuned.',)),
])
def test_each_method_in_words(opened, name, citation, words):
    text = card(opened(name))
    assert f'@article{{{citation},' in text or f'@inproceedings{{{citation},' in text
    assert all(word in text for word in words)
    assert text.count('```') % 2 == 0
    for heading in ('## Use', '## Results', '## How it was fine-tuned', '## Limits', '## Citation'):
        assert text.count(f'\n{heading}\n') == 1
    assert f'hf download {REPO} args.yaml' in text and 'timm-amf train --config run/args.yaml' in text
    assert 'It started from random weights.' in text


def test_the_code_of_the_card_runs_when_copied(client, hub, runs, other_process):
    timm_amf.publish(runs('amf'), REPO, 'mit')
    readme = hub.files(REPO)['README.md'].decode()
    code, = re.findall(r'```python\n(.*?)```', readme, re.DOTALL)
    assert code.index('import timm_amf') < code.index('create_model')
    lines = other_process(code, token=None, xet=False).stdout.splitlines()
    assert len(lines) == 5
    shares = [float(line.split('%')[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3)
    assert {line.split('% ')[1] for line in lines} == {
        'stripes/class0', 'stripes/class1', 'class2', 'blobs/class0', 'blobs/class1'}


# -- a Plan in words --------------------------------------------------------------------------------------------------

def test_a_plan_in_words():
    plan = Plan.from_dict(dict(
        lr=0.01, epochs=30, weight_decay=1e-4, schedule=dict(sched='step', decay_rate=0.94, decay_epochs=20),
        roles={
            'branch.0': dict(lr=0.0008, low_blocks=8, low_lr_scale=0.4),
            'branch.1': dict(l2sp_alpha=0.01, l2sp_blocks=4, reinit_blocks=2),
            'policy': dict(lr=3e-5, start_epoch=2, schedule=dict(sched='constant')),
            'head': dict(train='none'),
        }))
    lines = describe_plan(plan, timm.create_model('amf_resnet18x2'))
    assert lines == [
        'SGD with momentum 0.9 for 30 epochs; learning rates times 0.94 every 20 epochs',
        '`branch.0`: learning rate 0.0008, 0.4 times that in its first 8 blocks, weight decay 0.0001',
        '`branch.1`: learning rate 0.01, its last 2 blocks re-initialised, decay 0.01 towards its start in its first 4 '
        'blocks (L2-SP), weight decay 0.0001 elsewhere',
        '`policy`: learning rate 3e-05, weight decay 0.0001, frozen before epoch 2, its own schedule: constant '
        'learning rates',
        '`head`: frozen',
    ]


@pytest.mark.parametrize('fields,words', [
    (dict(sched='cosine', warmup_epochs=3, min_scale=0.01),
     'cosine decay to 0.01 of the learning rates, 3 epochs of warm-up first'),
    (dict(sched='multistep', decay_milestones=[5, 8], decay_rate=0.1), 'learning rates times 0.1 at epochs 5, 8'),
    (dict(sched='plateau', patience_epochs=4, decay_rate=0.5),
     'learning rates times 0.5 after 4 epochs without improvement'),
    (dict(sched='step', decay_rate=0.94, decay_epochs=1, warmup_epochs=1),
     'learning rates times 0.94 every 1 epoch, 1 epoch of warm-up first'),
    (dict(sched='wsd', hold_epochs=2), 'schedule wsd, held for 2 epochs before it falls'),
])
def test_a_schedule_in_words(fields, words):
    assert describe_schedule(Plan(schedule=fields).schedule) == words


def test_stochastic_and_partial_training_in_words():
    model = timm.create_model('test_resnet')
    words = describe_plan(Plan(roles={
        'backbone': dict(train='random', train_share=0.5, train_seed=3, freeze_bn=True, layer_decay=0.8)}), model)[1]
    assert '50 % of its blocks trained, drawn with seed 3' in words and 'batch norms fixed' in words
    assert 'times 0.8 for each layer further down' in words
    assert 'L2-SP' in describe_plan(Plan(roles={'backbone': dict(l2sp_alpha=0.1)}), model)[1]


@pytest.mark.parametrize('train,words', [
    ([-1], 'only its last block trained'),
    ([0, 3], 'only its block 1 and its block 4 trained, all else in it frozen'),
    ([-1, -2], 'only its last 2 blocks trained'),
    ([-2], 'only its block 2 from the end trained, all else in it frozen'),
    ([0, -1], 'only its block 1 and its last block trained, all else in it frozen'),
    (['layer3.0'], 'only `layer3.0` trained, all else in it frozen'),
    (['stem', 'layer1.0', 'layer4.0.conv1'],
     'only what lies before its blocks, `layer1.0` and `layer4.0.conv1` trained, all else in it frozen'),
    ([f'layer{i}.0.conv{j}' for i in range(1, 5) for j in range(1, 5)],
     'only ' + ', '.join(f'`layer{i}.0.conv{j}`' for i in range(1, 4) for j in range(1, 5))
     + ' and 4 more (`plan.yaml` has all) trained, all else in it frozen'),
])
def test_lists_of_layers_in_words(train, words):
    plan = Plan(lr=0.1, weight_decay=0, roles={'backbone': dict(train=train)})
    line = describe_plan(plan, timm.create_model('test_resnet'))[1]
    assert line == f'`backbone`: learning rate 0.1, {words}'


def test_an_empty_list_of_layers_is_frozen():
    assert describe_plan(Plan(roles={'backbone': dict(train=[])}), timm.create_model('test_resnet'))[1] == (
        '`backbone`: frozen')
