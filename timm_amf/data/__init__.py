"""Mixtures of datasets, and a loader whose batches depend on the seed alone."""
from .cache import build_cache, cache_short_side
from .check import BadImage, check_images
from .loader import Batch, SeededLoader, create_loader
from .mixture import Mixture, create_dataset, create_datasets
from .spec import (
    Component,
    DataSpec,
    add_data_args,
    data_spec_from_args,
    list_presets,
    load_preset,
    splits_from_args,
)

__all__ = [
    'BadImage', 'Batch', 'Component', 'DataSpec', 'Mixture', 'SeededLoader', 'add_data_args', 'build_cache',
    'cache_short_side', 'check_images', 'create_dataset', 'create_datasets', 'create_loader', 'data_spec_from_args',
    'list_presets', 'load_preset', 'splits_from_args',
]
