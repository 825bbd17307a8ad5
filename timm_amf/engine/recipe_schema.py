"""What a recipe of `hub_configs` must hold, and how to read one.

A recipe is a file for `--config` (`config_file`; its flags, `plan` and `data` are checked by those who own them) with
two sections more: `expected`, what it comes to and who says so, and `card`, what publishing and the list of models need
to know. docs/recipes.md has all keys.
"""
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from timm_amf.data.spec import DataSpec
from timm_amf.engine.config_file import SECTIONS, find_config, load_yaml, nearest
from timm_amf.errors import UserError
from timm_amf.tuning import Plan

__all__ = ['PAPERS', 'Recipe', 'check_recipe', 'check_repo_id', 'describe_expected', 'read_recipe']

# What `card: paper:` may name.
PAPERS = {
    'amf': 'AMF: Adaptable Weighting Fusion with Multiple Fine-tuning for Image Classification',
    'blockwise': 'Improving Reliability of Fine-tuning with Block-wise Optimisation',
    'nonbinary': 'Rethinking Binary Hyperparameters for Deep Transfer Learning for Image Classification',
    'spottune': 'SpotTune: Transfer Learning through Adaptive Fine-tuning',
}
# Of the Hub's identifiers those that weights of images come under.
_LICENSES = (
    'apache-2.0', 'bsd-2-clause', 'bsd-3-clause', 'cc0-1.0', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-nc-sa-4.0',
    'cc-by-sa-4.0', 'gpl-3.0', 'mit', 'openrail', 'other', 'unlicense',
)
_SPLITS = ('train', 'val', 'test')
_METRICS = ('top1', 'top5', 'assignment_accuracy')
# Behind a metric, beside the components of the data: several runs together, and what the block-wise search trains.
_WHOSE = ('ensemble', 'classifier', 'all', 'layer', 'block', 'window')


@dataclass(frozen=True)
class Recipe:
    """A recipe that was checked.

    Args:
        name: Its name, for `--config`.
        path: Its file.
        flags: Flags of `train_amf.py`, as they are written; `model` is always there.
        data: Section `data`.
        plan: Section `plan`.
        expected: Section `expected`, empty where nobody has measured it.
        card: Section `card`, empty where nothing is to be published.
    """
    name: str
    path: Path
    flags: dict[str, Any]
    data: dict[str, Any]
    plan: dict[str, Any]
    expected: dict[str, Any]
    card: dict[str, Any]

    @property
    def repo_id(self) -> Optional[str]:
        return self.card.get('repo_id')

    @property
    def published(self) -> bool:
        return self.card.get('published', False)


def read_recipe(name: str) -> Recipe:
    """Reads a whole recipe and checks it, its flags excepted.

    Args:
        name: Its name, or its path.

    Raises:
        UserError: If there is none, or something is missing or wrong; the message names file, key and remedy.
    """
    path = find_config(name)
    content = dict(load_yaml(path))
    sections = {key: content.pop(key, {}) for key in SECTIONS}
    for key, section in sections.items():
        _mapping(section, f'{path}: {key}')
    for key in ('model', 'data', 'plan'):
        if not {**content, **sections}.get(key):
            raise UserError(f'{path}: {key}: is missing; a recipe names its model, its data and its Plan')
    check_recipe(path, content, {key: section for key, section in sections.items() if section})
    return Recipe(path.stem, path, content, **sections)


def check_recipe(path: Union[str, Path], flags: Mapping[str, Any], sections: Mapping[str, Mapping]) -> None:
    """Checks what a recipe has, as `--config` does: what it has not, the command line may have.

    Args:
        path: The file; the messages begin with it.
        flags: Its flags.
        sections: Its sections by name.

    Raises:
        UserError: If something is wrong; the message names file, key and remedy.
    """
    components = None
    if 'data' in sections:
        components = [c.name for c in _of_owner(path, DataSpec.from_mapping, sections['data']).components]
    if 'plan' in sections:
        _of_owner(path, Plan.from_dict, sections['plan'])
    if 'expected' in sections:
        _check_expected(sections['expected'], components, f'{path}: expected')
    if 'card' in sections:
        _check_card(sections['card'], Path(path).stem, flags.get('model'), f'{path}: card')


def _of_owner(path: Union[str, Path], build: Callable, section: Mapping) -> Any:
    """What a section means, with the file in front of its owner's message."""
    try:
        return build(section)
    except UserError as e:
        raise UserError(f'{path}: {e}') from e


def describe_expected(expected: Mapping[str, Any]) -> str:
    """The figures of a section `expected` in a few words: `aircraft 93.01 ± 0.2, dtd 76.91 ± 0.2`."""
    words = []
    for key, value in expected.items():
        if isinstance(value, Mapping):
            metric, whose = _split_metric(key)
            name = ' '.join(filter(None, ['' if metric == 'top1' else metric.replace('_', ' '), whose]))
            words.append(f'{name} {_describe_range(value)}'.strip())
    return ', '.join(words)


def _describe_range(value: Mapping[str, float]) -> str:
    if 'mean' not in value:
        return f'{value["min"]:g} to {value["max"]:g}'
    return f'{value["mean"]:.2f}' + (f' ± {value["std"]:g}' if 'std' in value else '')


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository."""
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count('/') == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f'{repo_id!r} cannot be a repository of the Hub; write OWNER/NAME of letters, digits, "-", "_" and "."')


# -- expected ---------------------------------------------------------------------------------------------------------


def _check_expected(section: Mapping, components: Optional[Collection[str]], where: str) -> None:
    _text(section.get('source'), f'{where}: source', 'say who found these figures, and over how many runs')
    _one_of(section.get('split'), _SPLITS, f'{where}: split')
    metrics = [key for key in section if key not in ('source', 'split')]
    if not metrics:
        raise UserError(f'{where}: has no figure; leave the section out where nobody has measured it')
    for key in metrics:
        _check_metric(key, components, f'{where}: {key}')
        _check_range(section[key], f'{where}: {key}')


def _split_metric(key: str) -> tuple[str, str]:
    """`top1_dtd` -> ('top1', 'dtd'); the metric is empty where it is none."""
    metric = next((m for m in _METRICS if key == m or key.startswith(f'{m}_')), '')
    return metric, key[len(metric) + 1:] if metric else key


def _check_metric(key: Any, components: Optional[Collection[str]], where: str) -> None:
    metric, whose = _split_metric(str(key))
    known = (*(components or ()), *_WHOSE)
    if not metric:
        choices = ('source', 'split', *_METRICS, *(f'top1_{name}' for name in known))
        raise UserError(
            f'{where}: unknown key{nearest(str(key), choices) or f"; there are source, split, {_listed(_METRICS)}"}')
    if whose and components is not None and whose not in known and not re.fullmatch(r'top[1-9]\d*', whose):
        raise UserError(
            f'{where}: {whose!r} is no component of the data'
            f'{nearest(whose, known) or f"; there are {_listed(components)}, and {_listed(_WHOSE)}"}')


def _check_range(value: Any, where: str) -> None:
    """A mean, with its deviation where it has one, or the least and the most; percent."""
    _mapping(value, where, 'write {mean: 93.01, std: 0.2}, or {min: 96, max: 98}')
    _known_keys(value, ('mean', 'std', 'min', 'max'), where)
    if 'mean' not in value and not {'min', 'max'} <= set(value):
        raise UserError(f'{where}: has no mean; write {{mean: 93.01, std: 0.2}}, or {{min: 96, max: 98}}')
    if 'mean' in value and {'min', 'max'} & set(value):
        raise UserError(f'{where}: has a mean and a least or most; give one of both')
    if 'std' in value and 'mean' not in value:
        raise UserError(f'{where}: std: belongs to a mean')
    for key, number in value.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 100:
            raise UserError(f'{where}: {key}: must be a number of percent from 0 to 100, not {number!r}')
    if 'min' in value and value['min'] > value['max']:
        raise UserError(f'{where}: min {value["min"]:g} is above max {value["max"]:g}; exchange them')


# -- card -------------------------------------------------------------------------------------------------------------


def _check_card(section: Mapping, name: str, model: Optional[str], where: str) -> None:
    _known_keys(section, (
        'license', 'license_name', 'license_link', 'repo_id', 'published', 'base_model', 'datasets', 'tags', 'paper'),
        where)
    _one_of(section.get('license'), _LICENSES, f'{where}: license')
    for key in ('license_name', 'license_link'):
        if (key in section) != (section['license'] == 'other'):
            raise UserError(f'{where}: {key}: goes with license other, and only with it')
        if key in section:
            _text(section[key], f'{where}: {key}', 'write what is meant')
    _texts(section.get('datasets'), f'{where}: datasets')
    for key, check in (('base_model', check_repo_id), ('tags', _check_tag)):
        if key in section:
            for item in _texts(section[key], f'{where}: {key}'):
                try:
                    check(item)
                except UserError as e:
                    raise UserError(f'{where}: {key}: {e}') from None
    if 'paper' in section:
        _one_of(section['paper'], tuple(PAPERS), f'{where}: paper')
    if 'published' in section and not isinstance(section['published'], bool):
        raise UserError(f'{where}: published: must be true or false, not {section["published"]!r}')
    if 'repo_id' in section:
        _check_own_id(section['repo_id'], name, model, f'{where}: repo_id')
    elif section.get('published'):
        raise UserError(f'{where}: published: is true without a repo_id; name the repository')


def _check_own_id(repo_id: Any, name: str, model: Optional[str], where: str) -> None:
    """Repository, recipe and tag have one name: who has one finds the others."""
    _text(repo_id, where, 'write OWNER/NAME')
    try:
        check_repo_id(repo_id)
    except UserError as e:
        raise UserError(f'{where}: {e}') from None
    if repo_id.split('/')[1] != name:
        raise UserError(f'{where}: {repo_id!r} must end in the name of the recipe, {name}')
    architecture = str(model).partition('.')[0]
    if model and not name.startswith(f'{architecture}.'):
        raise UserError(f'{where}: the recipe trains {architecture}; name its file {architecture}.TAG.yaml')


def _check_tag(tag: str) -> None:
    if not re.fullmatch(r'[a-z0-9][a-z0-9.-]*', tag):
        raise UserError(f'{tag!r} is no tag of the Hub; write it in small letters, digits and "-"')


# -- kinds of values --------------------------------------------------------------------------------------------------


def _listed(names: Collection[str]) -> str:
    return ', '.join(names)


def _mapping(value: Any, where: str, remedy: str = 'write keys and values') -> None:
    if not isinstance(value, Mapping):
        raise UserError(f'{where}: must be a mapping, not {value!r}; {remedy}')


def _known_keys(section: Mapping, keys: Collection[str], where: str) -> None:
    for key in section:
        if key not in keys:
            raise UserError(f'{where}: {key}: unknown key{nearest(str(key), keys) or f"; there are {_listed(keys)}"}')


def _one_of(value: Any, choices: Collection[str], where: str) -> None:
    if value is None:
        raise UserError(f'{where}: is missing; give one of {_listed(choices)}')
    if value not in choices:
        near = nearest(str(value), choices)
        raise UserError(f'{where}: {value!r} is unknown{near or f"; give one of {_listed(choices)}"}')


def _text(value: Any, where: str, remedy: str) -> None:
    if value is None:
        raise UserError(f'{where}: is missing; {remedy}')
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise UserError(f'{where}: must be a line of text, not {value!r}; {remedy}')


def _texts(value: Any, where: str) -> list[str]:
    if value is None:
        raise UserError(f'{where}: is missing; give a list of names')
    if not isinstance(value, list) or not value:
        raise UserError(f'{where}: must be a list of names, such as [{value or "a"}], not {value!r}')
    for item in value:
        _text(item, where, 'give a list of names')
        if value.count(item) > 1:
            raise UserError(f'{where}: {item} is there twice; once will do')
    return value
