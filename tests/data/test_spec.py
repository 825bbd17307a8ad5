import argparse

import pytest
import yaml

from timm_amf.data import (
    Component,
    DataSpec,
    add_data_args,
    create_datasets,
    data_spec_from_args,
    list_presets,
    splits_from_args,
)
from timm_amf.errors import UserError


def parse(*flags, section=None):
    parser = argparse.ArgumentParser()
    parser.add_argument('data', nargs='?')
    for name in ('data-dir', 'dataset', 'class-map', 'input-key', 'target-key', 'input-img-mode'):
        parser.add_argument(f'--{name}')
    parser.add_argument('--train-split', default='train')
    parser.add_argument('--val-split', default='validation')
    parser.add_argument('--dataset-download', action='store_true')
    add_data_args(parser)
    return argparse.Namespace(**vars(parser.parse_args(flags)), recipe={'data': section} if section else {})


def test_a_plain_folder_is_a_mixture_of_one():
    spec = data_spec_from_args(parse('/data/pets', '--val-split', 'dev'))
    assert spec == DataSpec((Component('pets', root='/data/pets', splits={'val': 'dev'}),))
    assert spec == data_spec_from_args(parse('--data-dir', '/data/pets', '--val-split', 'dev'))


def test_component_flags_and_yaml_say_the_same():
    flags = parse(
        '--component', 'name=signs,path=/data/signs,classes=10,per_class=33',
        '--component',
        'name=cars,dataset=torch/stanford_cars,path=/data,per_class.val=18,skip.train=18,splits.val=train')
    section = yaml.safe_load("""
        components:
          - {name: signs, path: /data/signs, classes: 10, per_class: 33}
          - name: cars
            dataset: torch/stanford_cars
            root: /data
            per_class: {val: 18}
            skip: {train: 18}
            splits: {val: train}
    """)
    spec = data_spec_from_args(flags)
    assert spec == data_spec_from_args(parse(section=section))
    assert spec.components[1].limit('val') == (0, 18)
    assert spec.components[1].limit('train') == (18, None)
    assert spec.components[1].split_name('val') == 'train'
    named = {'components': {item.pop('name'): item for item in section['components']}}
    assert spec == data_spec_from_args(parse(section=named))


def test_flags_replace_the_section_and_the_section_replaces_a_dataset():
    section = {'preset': 'demo'}
    assert [c.name for c in data_spec_from_args(parse('/d', section=section)).components] == ['digits', 'textures']
    args = parse('--component', 'name=x,path=/x', section=section)
    assert [c.name for c in data_spec_from_args(args).components] == ['x']


@pytest.mark.parametrize('preset', list_presets())
def test_mapping_round_trip(preset):
    spec = DataSpec.from_mapping({'preset': preset, 'root': '/data'})
    assert DataSpec.from_mapping(yaml.safe_load(yaml.safe_dump(spec.to_mapping()))) == spec
    assert spec == data_spec_from_args(parse('--data-preset', preset, '--data-dir', '/data'))


@pytest.mark.parametrize('section, words', [
    ({'preset': 'aircraft'}, 'aircraft-dtd'),
    ({'preset': 'demo', 'components': []}, 'not both'),
    ({'components': []}, 'no component'),
    ({'components': [{'name': 'a', 'klasses': 3}]}, "'klasses', did you mean classes"),
    ({'components': [{'name': 'a', 'per_class': {'val': 'x'}}]}, 'a whole number or a mapping'),
    ({'path': '/d', 'download': 'yes'}, 'download must be true or false'),
    ({'path': '/d', 'val_share': 0.5, 'test_share': 0.5}, 'together they must be below 1'),
    ({'components': [{'name': 'a'}, {'name': 'a'}]}, "named 'a'"),
    ({'components': [{'name': 'a b'}]}, "'a b'"),
    ({'components': [{'name': 'a', 'classes': 0}]}, 'classes'),
    ({'components': [{'name': 'a', 'per_class': {'dev': 3}}]}, "'dev'"),
    ({'components': [{'name': 'a'}], 'shuffle': True}, "'shuffle'"),
    ({'components': [3]}, 'component'),
    ({'components': {'a': 1}}, 'component'),
    ({'splits': [1]}, r'splits must be a mapping \{name: text\}, not'),
    ({'dataset': 'torch/x', 'num_samples': 5}, r'num_samples must be a mapping \{name: a whole number\}, not'),
])
def test_mistakes_in_yaml_are_one_line(section, words):
    with pytest.raises(UserError, match=words) as error:
        DataSpec.from_mapping(section)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['signs', 'name=a,classes=ten', 'name=a,per_class=3,per_class.val=2', 'name=a,x=1'])
def test_mistakes_in_flags_are_one_line(text):
    with pytest.raises(UserError):
        data_spec_from_args(parse('--component', text))


@pytest.mark.parametrize('train, val, expected, own', [
    ('train', 'validation', ('train', 'val'), {}),
    ('train+val', 'test', ('train+val', 'test'), {}),
    ('training', 'valid', ('train', 'val'), {'train': 'training', 'val': 'valid'}),
    ('train', 'testing', ('train', 'test'), {'test': 'testing'}),
    ('trainval', 'holdout', ('train', 'val'), {'train': 'trainval', 'val': 'holdout'}),
])
def test_splits_of_the_mixture_and_splits_of_a_dataset(tmp_path, train, val, expected, own):
    args = parse(str(tmp_path), '--train-split', train, '--val-split', val)
    assert splits_from_args(args) == expected
    assert data_spec_from_args(args).components[0].splits == own


def test_a_preset_is_evaluated_on_its_test_split():
    args = parse('--data-preset', 'demo', '--train-split', 'train+val', '--val-split', 'test')
    train, test = create_datasets(data_spec_from_args(args), splits_from_args(args))
    parts = create_datasets(data_spec_from_args(args), ('train', 'val', 'test'))
    assert len(train) == len(parts[0]) + len(parts[1]) and len(test) == len(parts[2])
    assert train.class_names == test.class_names


@pytest.mark.parametrize('text, words', [
    ('path=a,path=b', 'path is given twice'),
    ('path=a,skip.val=1,skip.val=2', 'skip is given twice'),
    ('path=a,skip=1,skip.val=2', 'both for all splits and for val'),
    ('path=a,skip.val=2,skip=1', 'skip is given twice'),
    ('a', 'not KEY=VALUE'),
])
def test_a_component_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        data_spec_from_args(parse('--component', text))
