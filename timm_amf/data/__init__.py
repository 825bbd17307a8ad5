"""Mixtures of datasets, and a loader whose batches depend on the seed alone."""
from ..lazy import lazy
from .spec import (
    Component,
    DataSpec,
    add_data_args,
    data_spec_from_args,
    list_presets,
    load_preset,
    splits_from_args,
)

_LAZY = {
    'build_cache': 'cache', 'cache_short_side': 'cache', 'BadImage': 'check', 'check_images': 'check',
    'Batch': 'loader', 'SeededLoader': 'loader', 'create_loader': 'loader',
    'Mixture': 'mixture', 'create_dataset': 'mixture', 'create_datasets': 'mixture',
}
__all__ = [
    'Component', 'DataSpec', 'add_data_args', 'data_spec_from_args', 'list_presets', 'load_preset', 'splits_from_args',
    *_LAZY,
]
__getattr__ = lazy(__name__, _LAZY)
