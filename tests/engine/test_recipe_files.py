"""The recipes: all of them are complete, and say what their papers say."""
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from timm_amf.data.spec import DataSpec
from timm_amf.engine.config_file import find_config, list_recipes
from timm_amf.engine.recipes import PAPERS, check_repo_id, describe_expected, read_recipe, split_metric
from timm_amf.tuning import Plan

# Of the Hub's identifiers those that weights of images come under.
LICENSES = (
    'apache-2.0', 'bsd-2-clause', 'bsd-3-clause', 'cc0-1.0', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0',
    'cc-by-sa-4.0', 'gpl-3.0', 'mit', 'openrail', 'other', 'unlicense',
)
# Whose metric it is, beside the components of the data: several runs', and what the block-wise search trains.
WHOSE = ('', 'ensemble', 'classifier', 'all', 'layer', 'block', 'window', 'top3', 'top5')
# What the papers say: mean and deviation in percent; fractions.
AMF_TABLE_3 = {
    'aircraft_dtd': {'aircraft': (93.01, 0.2), 'dtd': (76.91, 0.2)},
    'aircraft_cars': {'aircraft': (92.50, 0.4), 'cars': (90.79, 0.2)},
    'cifar10': {'': (98.50, 0.05)},
    'fashion_mnist': {'': (95.59, 0.08)},
}


@pytest.mark.parametrize('name', list_recipes())
def test_all_recipes_fit(name):
    recipe = read_recipe(name)
    Plan.from_dict(recipe['plan'])
    components = [component.name for component in DataSpec.from_mapping(recipe['data']).components]
    if recipe['expected']:
        check_expected(recipe['expected'], components)
    if name == 'demo':
        assert not recipe['card']  # nothing of it is worth publishing
        return
    check_card(name, recipe)
    text = find_config(name).read_text(encoding='utf-8')
    # Where there is no Hub id, the recipe says why, and how to run it is in its first lines.
    repo_id = recipe['card'].get('repo_id')
    assert repo_id == f'timm-amf/{name}' or (repo_id is None and 'There is no Hub id' in text)
    assert f'--config {name} ' in text or 'benchmarks/blockwise_protocol.py' in text


def check_expected(expected, components):
    figures = {key: value for key, value in expected.items() if key not in ('source', 'split')}
    assert expected['source'].isprintable() and expected['split'] in ('train', 'val', 'test') and figures
    for key, value in figures.items():
        metric, whose = split_metric(key)
        assert metric and whose in (*WHOSE, *components), key
        assert set(value) in ({'mean'}, {'mean', 'std'}, {'min', 'max'}), key
        assert all(0 <= number <= 100 for number in value.values()) and value.get('min', 0) <= value.get('max', 0), key
    assert describe_expected(expected)


def check_card(name, recipe):
    """Repository, recipe and tag have one name: who has one finds the others."""
    card = recipe['card']
    assert set(card) <= {
        'license', 'license_name', 'license_link', 'repo_id', 'published', 'base_model', 'datasets', 'tags', 'paper'}
    assert card['license'] in LICENSES and ('license_name' in card) == (card['license'] == 'other')
    assert card['paper'] in PAPERS and not card.get('published')
    for key in ('datasets', 'tags', *(['base_model'] if 'base_model' in card else [])):
        assert len(set(card[key])) == len(card[key]) > 0, key
    assert all(re.fullmatch(r'[a-z0-9][a-z0-9.-]*', tag) for tag in card['tags'])
    for repo_id in (*card.get('base_model', ()), *([card['repo_id']] if 'repo_id' in card else [])):
        check_repo_id(repo_id)
    if 'repo_id' in card:
        assert name.startswith(recipe['model'].partition('.')[0] + '.')


def test_figures_in_words():
    figures = {'source': 'a paper', 'split': 'test', 'top1': {'min': 90, 'max': 92.5},
               'top1_signs': {'mean': 93.01, 'std': 0.2}, 'assignment_accuracy': {'mean': 95}}
    assert describe_expected(figures) == '90 to 92.5, signs 93.01 ± 0.2, assignment accuracy 95.00'


def test_base_models_are_those_whose_weights_are_loaded():
    import timm

    for name in list_recipes():
        recipe = read_recipe(name)
        if not recipe.get('pretrained') or not recipe['card'].get('base_model'):
            continue
        model = recipe.get('model_kwargs', {}).get('backbone', recipe['model'])
        if model.startswith(('amf', 'multitune')):
            model = 'inception_v4'
        cfg = timm.get_pretrained_cfg(model)
        assert recipe['card']['base_model'][0] == cfg.hf_hub_id and recipe['card']['license'] == cfg.license, name


@pytest.mark.parametrize('name', AMF_TABLE_3)
def test_amf_figures(name):
    expected = read_recipe(f'amf_inception_v4x2.{name}')['expected']
    wanted = {f'top1_{part}' if part else 'top1': dict(mean=m, std=s) for part, (m, s) in AMF_TABLE_3[name].items()}
    assert {k: v for k, v in expected.items() if k.startswith('top1')} == wanted and expected['split'] == 'test'


@pytest.mark.parametrize('name', ['cifar10', 'fashion_mnist'])
def test_amf_settings_of_single_data_sets(name):
    recipe = read_recipe(f'amf_inception_v4x2.{name}')
    lr = {'cifar10': 0.03, 'fashion_mnist': 0.025}[name]
    roles = recipe['plan']['roles']
    assert [roles[r]['lr'] for r in ('branch.0', 'branch.1', 'head', 'policy')] == [lr, lr, 0.008, 3e-5]
    assert recipe['batch_size'] == 128
    # As many steps, and falls of the LR, as on Aircraft-DTD.
    images = {'cifar10': 50000, 'fashion_mnist': 60000}[name] - 10 * recipe['data']['per_class']['val']
    steps = recipe['plan']['epochs'] * images / 128
    assert steps == pytest.approx(1000 * 3102 / 32, rel=0.01)
    assert recipe['plan']['epochs'] / recipe['plan']['schedule']['decay_epochs'] == pytest.approx(1000 / 20, rel=0.01)


def test_the_page():
    """Its example is the recipe that it names, and it lists all recipes and all keys of the card."""
    page = (Path(__file__).parents[2] / 'docs' / 'recipes.md').read_text(encoding='utf-8')
    example = yaml.safe_load(re.search(r'```yaml\n(.*?)```', page, re.DOTALL)[1])
    recipe = read_recipe('amf_inception_v4x2.aircraft_dtd')
    assert all(example[key] == recipe[key] for key in ('expected', 'card', 'data'))
    listed = set()
    for row in page[page.index('## The list'):].splitlines():
        first = ''
        for name in re.findall(r'`([^`]+)`', row.split('|')[1]) if row.startswith('| `') else ():
            first = first or name
            name = first.partition('.')[0] + name if name.startswith('.') else name
            patterns = [name.replace('{aircraft,caltech256_30,cars,dtd}', d).replace('{default,optimal}', s)
                        for d in ('aircraft', 'caltech256_30', 'cars', 'dtd') for s in ('default', 'optimal')]
            found = {n for n in list_recipes() for p in patterns if fnmatch(n, p)}
            assert found, name
            listed |= found
    assert listed == set(list_recipes())
    for key in ('license', 'license_name', 'license_link', 'repo_id', 'published', 'base_model', 'datasets', 'tags',
                'paper', *PAPERS, 'source', 'split'):
        assert f'`{key}`' in page
