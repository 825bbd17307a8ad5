"""The recipes of `hub_configs` as Python data.

A recipe is a file for `--config` (`config_file`) with two sections more: `expected`, what it comes to and who says so,
and `card`, what publishing and the list of models need to know. docs/recipes.md has all keys.
"""
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from timm_amf.engine.config_file import SECTIONS, find_config
from timm_amf.errors import UserError
from timm_amf.yaml_text import load_yaml

__all__ = ['PAPERS', 'check_repo_id', 'describe_expected', 'read_recipe', 'split_metric']

# What `card: paper:` may name.
PAPERS = {
    'amf': 'AMF: Adaptable Weighting Fusion with Multiple Fine-tuning for Image Classification',
    'blockwise': 'Improving Reliability of Fine-tuning with Block-wise Optimisation',
    'nonbinary': 'Rethinking Binary Hyperparameters for Deep Transfer Learning for Image Classification',
    'spottune': 'SpotTune: Transfer Learning through Adaptive Fine-tuning',
}
_METRICS = ('top1', 'top5', 'assignment_accuracy')


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by its name or its path: its flags, and all sections, empty where it has none."""
    return {**dict.fromkeys(SECTIONS, {}), **load_yaml(find_config(name))}


def describe_expected(expected: Mapping[str, Any]) -> str:
    """The figures of a section `expected` in a few words: `aircraft 93.01 ± 0.2, dtd 76.91 ± 0.2`."""
    words = []
    for key, value in expected.items():
        if isinstance(value, Mapping):
            metric, whose = split_metric(key)
            name = ' '.join(filter(None, ['' if metric == 'top1' else metric.replace('_', ' '), whose]))
            words.append(f'{name} {_describe_range(value)}'.strip())
    return ', '.join(words)


def split_metric(key: str) -> tuple[str, str]:
    """`top1_dtd` -> ('top1', 'dtd'); the metric is empty where it is none."""
    metric = next((m for m in _METRICS if key == m or key.startswith(f'{m}_')), '')
    return metric, key[len(metric) + 1:] if metric else key


def _describe_range(value: Mapping[str, float]) -> str:
    if 'mean' not in value:
        return f'{value["min"]:g} to {value["max"]:g}'
    return f'{value["mean"]:.2f}' + (f' ± {value["std"]:g}' if 'std' in value else '')


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository."""
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count('/') == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f'{repo_id!r} cannot be a repository of the Hub; write OWNER/NAME of letters, digits, "-", "_" and "."')
