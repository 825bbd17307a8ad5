"""The schema of recipes: all of ours fit it, and what is wrong with another is said in one line."""
import copy
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import timm
import yaml

from timm_amf.engine import config_file
from timm_amf.engine.config_file import list_recipes
from timm_amf.engine.options import parse_args
from timm_amf.engine.recipe_schema import PAPERS, describe_expected, read_recipe
from timm_amf.errors import UserError

RECIPE = {
    'model': 'amf_resnet18x2',
    'batch_size': 32,
    'data': {'components': [{'name': 'signs', 'root': 'a'}, {'name': 'dtd', 'root': 'b'}]},
    'plan': {'lr': 0.01, 'epochs': 30},
    'expected': {
        'source': 'a paper', 'split': 'test', 'top1': {'min': 90, 'max': 92.5},
        'top1_signs': {'mean': 93.01, 'std': 0.2}},
    'card': {
        'license': 'apache-2.0', 'repo_id': 'org/amf_resnet18x2.signs_dtd', 'base_model': ['timm/resnet18.a1_in1k'],
        'datasets': ['gtsrb', 'dtd'], 'tags': ['mixture'], 'paper': 'amf'},
}
# Timm's networks that the paper of the block-wise search trains.
BLOCKWISE = ('vgg16', 'mobilenetv1_100', 'mobilenetv2_100', 'mobilenetv3_small_100', 'resnetv2_50')


@pytest.mark.parametrize('name', [name for name in list_recipes() if name != 'demo'])
def test_all_recipes_fit(name):
    recipe = read_recipe(name)
    assert recipe.flags['model'] and recipe.plan and recipe.data
    assert recipe.expected['source'] and describe_expected(recipe.expected)
    assert recipe.card['paper'] in PAPERS and recipe.card['tags'] and not recipe.published
    text = recipe.path.read_text(encoding='utf-8')
    # Where there is no Hub id, the recipe says why, and how to run it is in its first lines.
    assert recipe.repo_id == f'timm-amf/{name}' or (recipe.repo_id is None and 'There is no Hub id' in text)
    assert f'--config {name} ' in text or 'benchmarks/blockwise_protocol.py' in text


def test_nothing_of_the_demo_is_worth_publishing():
    assert read_recipe('demo').expected['source'] and not read_recipe('demo').card


def test_base_models_are_those_whose_weights_are_loaded():
    for name in list_recipes():
        recipe = read_recipe(name)
        if not recipe.flags.get('pretrained') or not recipe.card.get('base_model'):
            continue
        model = recipe.flags.get('model_kwargs', {}).get('backbone', recipe.flags['model'])
        cfg = timm.get_pretrained_cfg('inception_v4' if model.startswith(('amf', 'multitune')) else model)
        assert recipe.card['base_model'][0] == cfg.hf_hub_id and recipe.card['license'] == cfg.license, name


@pytest.mark.parametrize('name', ['cifar10', 'fashion_mnist'])
def test_amf_settings_of_single_data_sets(name):
    recipe = read_recipe(f'amf_inception_v4x2.{name}')
    lr = {'cifar10': 0.03, 'fashion_mnist': 0.025}[name]
    assert [recipe.plan['roles'][r]['lr'] for r in ('branch.0', 'branch.1', 'head', 'policy')] == [lr, lr, 0.008, 3e-5]
    assert recipe.flags['batch_size'] == 128
    # As many steps, and falls of the LR, as on Aircraft-DTD.
    images = {'cifar10': 50000, 'fashion_mnist': 60000}[name] - 10 * recipe.data['per_class']['val']
    steps = recipe.plan['epochs'] * images / 128
    assert steps == pytest.approx(1000 * 3102 / 32, rel=0.01)
    assert recipe.plan['epochs'] / recipe.plan['schedule']['decay_epochs'] == pytest.approx(1000 / 20, rel=0.01)


@pytest.mark.parametrize('name', BLOCKWISE)
def test_blockwise_settings(name):
    """Section V, and where its text has nothing what the search's own protocol takes."""
    args = parse_args(['--config', f'{name}.tf_flowers', '--data-dir', '.'])
    plan = args.recipe['plan']
    assert (plan['opt'], plan['lr'], plan['weight_decay'], plan['epochs']) == ('adam', 1e-4, 0, 50)
    assert plan['schedule'] == dict(sched='plateau', patience_epochs=10, decay_rate=0.1, warmup_epochs=0)
    assert (args.batch_size, args.no_aug, args.smoothing, args.pretrained) == (4, True, 0, True)


def test_the_page():
    """Its example is the recipe that it names, and it lists all recipes and all keys of the card."""
    page = (Path(__file__).parents[2] / 'docs' / 'recipes.md').read_text(encoding='utf-8')
    example = yaml.safe_load(re.search(r'```yaml\n(.*?)```', page, re.DOTALL)[1])
    recipe = read_recipe('amf_inception_v4x2.aircraft_dtd')
    assert (example['expected'], example['card'], example['data']) == (recipe.expected, recipe.card, recipe.data)
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


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A recipe among those of the package: write(changes), where a change is (path of keys, value or None)."""
    folder = tmp_path / 'hub_configs'
    folder.mkdir()
    monkeypatch.setattr(config_file, '_RECIPE_DIRS', (folder,))

    def _write(*changes, name='amf_resnet18x2.signs_dtd'):
        recipe = copy.deepcopy(RECIPE)
        for keys, value in changes:
            *outer, last = keys.split('.')
            section = recipe
            for key in outer:
                section = section[key]
            if value is None:
                del section[last]
            else:
                section[last] = value
        (folder / f'{name}.yaml').write_text(yaml.safe_dump(recipe), encoding='utf-8')
        return name
    return _write


def test_what_is_right(write):
    recipe = read_recipe(write())
    assert recipe.repo_id == 'org/amf_resnet18x2.signs_dtd' and not recipe.published
    assert describe_expected(recipe.expected) == '90 to 92.5, signs 93.01 ± 0.2'
    read_recipe(write(('expected', None), ('card', None)))
    read_recipe(write(('card.published', True)))
    read_recipe(write(('card.license', 'other'), ('card.license_name', 'mine'), ('card.license_link', 'https://a.b')))
    read_recipe(write(('expected.top1_ensemble', {'mean': 95}), ('expected.top1_top5', {'mean': 1})))
    args = parse_args(['--config', write()])
    assert args.recipe['card']['repo_id'] == recipe.repo_id


@pytest.mark.parametrize('change, message', [
    (('plan.epoch', 3), 'plan.*epoch.*epochs'),
    (('data.component', []), "data: unknown key 'component'"),
    (('expected.source', None), 'expected: source: is missing'),
    (('expected.split', 'tests'), "expected: split: 'tests' is unknown, did you mean test"),
    (('expected.sourse', 'x'), 'expected: sourse: unknown key, did you mean source'),
    (('expected.top1_sings', {'mean': 9}), "expected: top1_sings: 'sings' is no component.*did you mean signs"),
    (('expected.top1', 93), 'expected: top1: must be a mapping, not 93; write {mean'),
    (('expected.top1', {'mean': 930}), 'expected: top1: mean: must be a number of percent from 0 to 100, not 930'),
    (('expected.top1', {'mean': 93, 'sdt': 1}), 'expected: top1: sdt: unknown key, did you mean std'),
    (('expected.top1', {'min': 93}), 'expected: top1: has no mean'),
    (('expected.top1', {'min': 93, 'max': 94, 'std': 1}), 'expected: top1: std: belongs to a mean'),
    (('expected.top1', {'mean': 93, 'max': 94}), 'give one of both'),
    (('expected.top1', {'min': 95, 'max': 94}), 'min 95 is above max 94'),
    (('expected', {'source': 'x', 'split': 'val'}), 'expected: has no figure'),
    (('card.license', 'apache2.0'), "card: license: 'apache2.0' is unknown, did you mean apache-2.0"),
    (('card.license', 'other'), 'card: license_name: goes with license other'),
    (('card.datasets', 'gtsrb'), r"card: datasets: must be a list of names, such as \[gtsrb\]"),
    (('card.datasets', ['a', 'a']), "card: datasets: a is there twice"),
    (('card.tags', ['Fine Grained']), "card: tags: 'Fine Grained' is no tag"),
    (('card.base_model', ['resnet18']), "card: base_model: 'resnet18' cannot be a repository"),
    (('card.published', 'yes'), 'card: published: must be true or false'),
    (('card.repo_id', 'org/other'), "card: repo_id: 'org/other' must end in the name of the recipe"),
    (('card.repo_id', 3), 'card: repo_id: must be a line of text'),
    (('model', 'amf_resnet50x2'), r'card: repo_id: the recipe trains amf_resnet50x2; name its file'),
])
def test_what_is_wrong(write, change, message):
    name = write(change)
    for read in (read_recipe, lambda name: parse_args(['--config', name])):
        with pytest.raises(UserError, match=message) as e:
            read(name)
        assert '\n' not in str(e.value) and f'{name}.yaml: ' in str(e.value)


@pytest.mark.parametrize('key', ['model', 'data', 'plan'])
def test_what_is_missing(write, key):
    with pytest.raises(UserError, match=f'signs_dtd.yaml: {key}: is missing; a recipe names its model'):
        read_recipe(write((key, None)))
    assert parse_args(['--config', write((key, None)), '--data-dir', '.'])  # the command line may have it


def test_published_needs_a_repository(write):
    with pytest.raises(UserError, match='card: published: is true without a repo_id'):
        read_recipe(write(('card.repo_id', None), ('card.published', True)))


def test_other_files_need_not_be_recipes(write, tmp_path):
    """Only what comes with the package must be whole: a file of one's own may hold what it likes in these sections."""
    path = tmp_path / 'mine.yaml'
    path.write_text('epochs: 3\nexpected: {top1: [90, 92]}\ncard: {hub: {}}\n')
    assert parse_args(['--config', str(path), '--data-dir', '.']).epochs == 3
