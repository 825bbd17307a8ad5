"""What a mixture is made of: plain data, read from YAML (the `data:` section of a recipe) or from flags."""
import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from timm_amf.errors import UserError
from timm_amf.fields import Named, build, check_fields, check_names, setting
from timm_amf.flags import add_flags, path

__all__ = [
    'Component', 'DataSpec', 'add_data_args', 'data_spec_from_args', 'list_presets', 'load_preset', 'splits_from_args',
]

DEFAULT_SPLITS = {'train': 'train', 'val': 'validation', 'test': 'test'}
_PRESET_DIR = Path(__file__).parent / 'presets'
# As timm's dataset factory, and 'test' beside them.
SPLIT_NAMES = {
    'train': ('train', 'training'),
    'val': ('validation', 'val', 'valid', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}


def split_of(name: str) -> Optional[str]:
    """`train`, `val` or `test` of a name of it; None for any other name."""
    return next((split for split, names in SPLIT_NAMES.items() if name in names), None)


@dataclass(frozen=True)
class Component(Named):
    """One named part of a mixture."""
    name: str = setting(help='name in logs, tables and columns: letters, digits, `_`, `-` and `.`')
    dataset: str = setting(
        '', "as timm names it: '' for a folder, `torch/...`, `decathlon/...`, `hfds/...`, `tfds/...`, `wds/...`")
    root: Optional[str] = setting(None, 'folder of the dataset')
    classes: Optional[int] = setting(
        None, "only the first this many classes, in the dataset's own order (default: all)", low=1)
    per_class: Union[int, dict[str, Optional[int]], None] = setting(
        None, 'most images of each class, one number for all splits or one by split', low=1)
    skip: Union[int, dict[str, Optional[int]], None] = setting(
        None, 'images left out at the start of each class, one number or one by split', low=0)
    splits: dict[str, str] = setting({}, "the dataset's name for each of `train`, `val` and `test`")
    class_offset: Optional[int] = setting(
        None, 'index of the first class; components with the same one share their labels (default: after the classes '
        'of the components before it)', low=0)
    class_map: Optional[str] = setting(None, "timm's class map, a file of class names in order")
    input_key: Optional[str] = setting(
        None, "timm's input key (a folder: extensions of image files, `.jpg;.webp`)")
    target_key: Optional[str] = setting(None, "timm's target key (`hfds/`, `tfds/`, `wds/`)")

    def __post_init__(self):
        where = f'data component {self.name!r}'
        check_fields(self, where)
        if not re.fullmatch(r'[\w.-]+', self.name):
            raise UserError(f'{where}: a name is made of letters, digits, "_", "-" and "."')
        for field in ('splits', 'per_class', 'skip'):
            given = getattr(self, field)
            for split in given if isinstance(given, dict) else ():
                if split_of(split) is None:
                    raise UserError(f'{where}: {field}: unknown split {split!r}; there are train, val and test')
            if isinstance(given, dict):
                object.__setattr__(self, field, {split_of(k): v for k, v in given.items() if v is not None})

    def split_name(self, split: str) -> str:
        """The dataset's own name of `train`, `val` or `test`."""
        return self.splits.get(split, DEFAULT_SPLITS[split])

    def limit(self, split: str) -> tuple[int, Optional[int]]:
        """(images left out at the start of each class, most images taken of each class) of a split."""
        skip = self.skip.get(split, 0) if isinstance(self.skip, dict) else self.skip or 0
        number = self.per_class.get(split) if isinstance(self.per_class, dict) else self.per_class
        return skip, number


@dataclass(frozen=True)
class DataSpec(Named):
    """All that is needed to open a mixture."""
    components: tuple[Component, ...] = setting(help='the parts, in order; a plain dataset is a mixture of one')
    download: bool = setting(False, 'let the datasets that can download themselves do so')
    input_img_mode: Optional[str] = setting(
        None, 'Pillow mode that images are converted to (default: `RGB`, or `L` for one input channel)')
    num_samples: dict[str, int] = setting(
        {}, 'samples by split of iterable datasets that do not know their own number')
    trust_remote_code: bool = setting(False, 'passed to Hugging Face datasets')
    cache_dir: Optional[str] = setting(
        None, "where iterable datasets are kept once read (default: `timm_amf` in the user's cache folder)")
    val_share: float = setting(
        0., 'share of the training images of each class that is the validation split instead; it is drawn by the names '
        "of the images, so that moved or copied folders are split alike (0: the dataset's own)", low=0, high=1)
    test_share: float = setting(0., 'the same of the test split; both together are below 1', low=0, high=1)
    group: Optional[str] = setting(
        None, 'images of one group stay on one side of these splits: a column of the table, or a regular expression '
        'with one group that is searched in the path relative to the root (default: each image by itself)')
    split_file: Optional[str] = setting(
        None, 'the `split.csv` of a run, which says what was drawn then (default: draw)')

    def __post_init__(self):
        check_fields(self, 'data')
        if self.val_share + self.test_share >= 1:
            raise UserError(
                f'data: val_share {self.val_share:g} and test_share {self.test_share:g} leave nothing to train on; '
                f'together they must be below 1')
        if self.group is not None and not self.shares:
            raise UserError('data: --group has no effect without --val-share or --test-share; add one, or leave it out')
        if not self.components:
            raise UserError('data: no component; give a folder (--data-dir), a dataset (--dataset) or components')
        names = [c.name for c in self.components]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f'data: two components are named {name!r}; give each its own name')

    @property
    def shares(self) -> dict[str, float]:
        """Share of each split that is drawn from the training images."""
        return {split: share for split, share in (('val', self.val_share), ('test', self.test_share)) if share}

    @classmethod
    def from_mapping(cls, data: Mapping, defaults: Optional[Mapping] = None) -> 'DataSpec':
        """Read the `data:` section of a recipe.

        Args:
            data: `{preset: NAME, root: DIR}`, or `{components: [...]}` (a list of mappings, or a mapping from names
                to mappings), or the mapping of a single component. `root` beside components is their default.
            defaults: Values of components that do not set them (from flags).
        """
        if not isinstance(data, Mapping):
            raise UserError(f'data: expected a mapping with components or a preset, not {data!r}')
        data, defaults = dict(data), {k: v for k, v in (defaults or {}).items() if v is not None}
        if 'preset' in data:
            if 'components' in data:
                raise UserError('data: give either a preset or components, not both')
            data = {**load_preset(data.pop('preset')), **data}
        common = {f.name: data.pop(f.name) for f in fields(cls) if f.name in data}
        if 'components' not in common:
            common['components'], data = [data], {}
        root = data.pop('root', data.pop('path', None))
        if root is not None:
            defaults['root'] = root
        common['components'] = tuple(_component(item, defaults) for item in _component_list(common['components']))
        return build(cls, {**data, **common}, 'data')

    def to_mapping(self) -> dict[str, Any]:
        """Plain data that `from_mapping` reads back, without what is default."""
        components = [{k: v for k, v in asdict(c).items() if v not in (None, '', {})} for c in self.components]
        rest = {k: v for k, v in asdict(self).items() if k not in ('components', 'split_file') and v}
        return {'components': components, **rest}


def list_presets() -> list[str]:
    return sorted(path.stem for path in _PRESET_DIR.glob('*.yaml'))


def load_preset(name: str) -> dict[str, Any]:
    """The `data:` section that a preset stands for."""
    if name not in list_presets():
        raise UserError(f'data: unknown preset {name!r}; there are {", ".join(list_presets())}')
    return yaml.safe_load((_PRESET_DIR / f'{name}.yaml').read_text(encoding='utf-8'))


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the data that timm does not have, in a group of their own."""
    add_flags(parser, 'Mixture parameters', (
        ('--component', str, None, 'add a component to the mixture: name=signs,path=/data/signs,classes=10,'
         'per_class=33; also dataset=, class_offset=, class_map=, and by split per_class.train=, skip.train=, '
         'splits.val=; repeatable', {'action': 'append', 'metavar': 'KEY=VALUE,...'}),
        ('--data-preset', str, None, f'a ready-made mixture: {", ".join(list_presets())}; --data-dir is its folder'),
        ('--val-share', float, None, 'share of the training images, of each class, that is the validation split, where '
         'there is none'),
        ('--test-share', float, None, 'the same for the test split, which evaluate --split test reads'),
        ('--group', str, None, 'images of one group stay on one side of the splits that the shares draw: a column of '
         "the table, or a regular expression with one group, searched in the path: '(clip\\d+)_'",
         {'metavar': 'COLUMN|REGEX'}),
        ('--cache-images', bool, False,
         'decode and shrink the training images once, and read them from a cache on disk'),
        ('--cache-dir', path, None, 'folder of what is decoded or checked once (default: timm_amf in the cache folder '
         'of the user)', {'metavar': 'DIR'}),
        ('--skip-bad-images', bool, False, 'train without the images that cannot be read, instead of stopping before '
         'training'),
        ('--no-check-images', bool, True, 'do not read every image once before training',
         {'dest': 'check_images', 'action': 'store_false'}),
    ))


def data_spec_from_args(args: argparse.Namespace) -> DataSpec:
    """Build the mixture from flags and the `data:` section of their recipe.

    `--component` and `--data-preset` replace the section, as `--dataset` on the command line does (`parse_args`); with
    none of the three, timm's own flags name one dataset, which is a mixture of one component. timm's flags are also the
    defaults of components that do not say.

    Args:
        args: Parsed flags: timm's dataset flags and those of `add_data_args`; and `recipe`, the sections of a file.
    """
    given = {key: value for key, value in vars(args).items() if value not in (None, '')}
    # A dataset's own name ('valid') is passed on to it, also where it says which split of the mixture is meant.
    names = {role: given[f'{role}_split'] for role in ('train', 'val') if f'{role}_split' in given}
    own = {_mixture_split(name) or role: name for role, name in names.items()}
    defaults = {
        'root': given.get('data_dir', given.get('data')),
        'splits': {role: name for role, name in own.items() if DEFAULT_SPLITS.get(role, name) != name},
        **{key: given.get(key) for key in ('class_map', 'input_key', 'target_key')},
    }
    if 'component' in given:
        section = {'components': [_parse_component(text) for text in args.component]}
    elif 'data_preset' in given:
        section = {'preset': args.data_preset}
    else:
        section = given.get('recipe', {}).get('data') or {'dataset': given.get('dataset', '')}
    spec = DataSpec.from_mapping(section, defaults)
    num_samples = {role: given[f'{role}_num_samples'] for role in ('train', 'val') if f'{role}_num_samples' in given}
    return replace(
        spec,
        download=spec.download or given.get('dataset_download', False),
        num_samples=spec.num_samples or num_samples,
        trust_remote_code=spec.trust_remote_code or given.get('dataset_trust_remote_code', False),
        split_file=given['split_file'] if os.path.isfile(given.get('split_file', '')) else None,
        **{key: given[key] for key in ('input_img_mode', 'cache_dir', 'val_share', 'test_share', 'group')
           if key in given},
    )


def splits_from_args(args: argparse.Namespace) -> tuple[str, str]:
    """The splits of the mixture that `--train-split` and `--val-split` name: `train`, `val`, `test`, or `train+val`.

    Any other name is a dataset's own, which `data_spec_from_args` gives to the components that have none.
    """
    return _mixture_split(args.train_split) or 'train', _mixture_split(args.val_split) or 'val'


def _mixture_split(name: Optional[str]) -> Optional[str]:
    parts = [split_of(part) for part in (name or '').split('+')]
    return '+'.join(parts) if all(parts) else None


def _component_list(items: Any) -> list[dict]:
    if isinstance(items, Mapping):
        items = [{'name': name, **(item or {})} if isinstance(item, (Mapping, type(None))) else item
                 for name, item in items.items()]
    if not isinstance(items, (list, tuple)):
        raise UserError(f'data: components is a list or a mapping, not {items!r}')
    items = [{'root': item} if isinstance(item, str) else item for item in items]
    for item in items:
        if not isinstance(item, Mapping):
            raise UserError(f'data: a component is a mapping or the path of a folder, not {item!r}')
    return [dict(item) for item in items]


def _component(item: dict, defaults: Mapping) -> Component:
    if 'path' in item:
        item['root'] = item.pop('path')
    check_names(item, Component, 'a data component')
    splits = item.get('splits') or {}
    if isinstance(splits, Mapping):  # else the component refuses it
        splits = {**defaults.get('splits', {}), **splits}
    item = {**defaults, **{k: v for k, v in item.items() if v is not None}, 'splits': splits}
    if 'name' not in item:
        name = str(item.get('dataset') or '').rstrip('/').split('/')[-1] or Path(str(item.get('root') or '')).name
        item['name'] = re.sub(r'[^\w.-]+', '-', name) or 'data'
    return Component(**item)


def _parse_component(text: str) -> dict[str, Any]:
    """`name=a,classes=3,per_class.train=5` to a mapping; `Component` reads the numbers."""
    item: dict[str, Any] = {}
    for part in text.split(','):
        key, sep, value = part.partition('=')
        key, _, split = key.strip().partition('.')
        if not sep or not key:
            raise UserError(f'--component {text!r}: {part!r} is not KEY=VALUE')
        inner = item.setdefault(key, {}) if split else item
        if not isinstance(inner, dict):
            raise UserError(f'--component {text!r}: {key} is given both for all splits and for {split}')
        if (split or key) in inner:
            raise UserError(f'--component {text!r}: {key} is given twice; a component has a flag of its own')
        inner[split or key] = value
    return item
