"""YAML that people and runs write, read as plain data of a bounded size; all that is wrong with it is a `UserError`."""
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Union

import yaml

from timm_amf.errors import UserError

__all__ = ['MAX_NUMBER', 'load_yaml', 'parse_yaml']

_MAX_CHARS, _MAX_DEPTH, _MAX_VALUES = 1_000_000, 30, 50_000
MAX_NUMBER = 2 ** 63 - 1  # what numbers of YAML and of flags may be
_KINDS = ('null', 'bool', 'int', 'float', 'str', 'seq', 'map')


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader of text, numbers, lists and mappings alone, without repeated keys.

    `1e-3` is a number, as in YAML 1.2, and a date is text.
    """
    yaml_constructors = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f'tag:yaml.org,2002:{kind}' for kind in _KINDS))}
    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in rows if not tag.endswith(':timestamp')]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_node(self, parent, index):
        """Refuse what is nested deeply, holds itself, or is much longer than it looks because of aliases."""
        self.depth = getattr(self, 'depth', 0) + 1
        if self.depth > _MAX_DEPTH:
            _refuse('is nested too deeply', self.peek_event())
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and not hasattr(node, 'size'):
            _refuse('holds itself', node)
        if not is_alias:
            pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = itertools.chain(*pairs) if isinstance(node, yaml.MappingNode) else pairs
            node.size = 1 + sum(part.size for part in parts)
        if node.size > _MAX_VALUES:
            _refuse('has too many values', node)
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                _refuse(f'{key[:80]} is given twice', key_node)
            if key_node.tag not in ('tag:yaml.org,2002:str', 'tag:yaml.org,2002:merge', 'tag:yaml.org,2002:value'):
                _refuse('a key is a list or a mapping' if key is None else f'the key {key[:80]} is no text; put it in '
                        'quotes', key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:  # what int() and kin say of the text
            return _refuse(f'{str(node.value)[:80]!r} is no {node.tag.rpartition(":")[2]} ({str(e)[:80]})', node)
        if type(value) is int and abs(value) > MAX_NUMBER:
            _refuse(f'{node.value[:80]} is too large a number', node)
        return value


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$'), list('-+0123456789'))


def _refuse(problem: str, at: Union[yaml.Node, yaml.Event]) -> NoReturn:
    raise yaml.MarkedYAMLError(None, None, problem, at.start_mark)


def parse_yaml(text: str, where: Union[str, Path]) -> Any:
    """Read YAML; `where` is what messages call it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        line = f', line {mark.line + 1}' if mark else ''
        problem = getattr(error, 'problem', None) or error
        raise UserError(f'{where}{line}: not valid YAML: {problem}') from error


def load_yaml(path: Union[str, Path]) -> Mapping:
    """Read a YAML file of keys and values."""
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read(_MAX_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read: {error}') from error
    if len(text) > _MAX_CHARS:
        raise UserError(f'{path}: is too long for a file of settings, which has at most {_MAX_CHARS} characters')
    content = parse_yaml(text, path)
    if not isinstance(content, Mapping):
        what = 'nothing' if content is None else f'a {type(content).__name__}'
        raise UserError(f'{path}: must hold keys and values, such as "epochs: 30", not {what}')
    return content
