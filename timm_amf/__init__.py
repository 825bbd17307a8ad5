"""timm_amf: adaptive fine-tuning for any timm backbone.

Importing the package registers its models with timm. Everything else is imported when it is first used, so that the
import costs little more than timm's own.
"""
import os
import sys
from pathlib import Path
from typing import Any

from .errors import user_errors
from .lazy import lazy
from .version import __version__

# What Apple's GPUs cannot do, the CPU does; torch says so in a line, and reads this when it is imported.
os.environ.setdefault('PYTORCH_ENABLE_MPS_FALLBACK', '1')
# The command, also as `python -m timm_amf`, imports them, and torch, when its arguments make sense.
if Path(*sys.argv[:1]).stem not in ('timm-amf', '-m'):
    from . import models  # noqa: F401  registers the models

# The public API: name -> module that holds it.
_PUBLIC = {
    'Plan': 'tuning.plan',
    'RolePlan': 'tuning.plan',
    'Schedule': 'tuning.plan',
    'GroupScheduler': 'tuning.schedule',
    'lr_scheduler': 'tuning.schedule',
    'apply_freeze': 'tuning.freeze',
    'create_optimizer': 'tuning.optim',
    'param_groups': 'tuning.resolve',
    'model_roles': 'tuning.roles',
    'resolve': 'tuning.resolve',
    'reinit': 'tuning.reinit',
    'L2SP': 'tuning.l2sp',
    'global_k_loss': 'models.global_k',
    'list_blocks': 'models.blocks',
    'fit': 'search.fit',
    'train': 'api',
    'evaluate': 'api',
    'predict': 'api',
    'advise': 'search.advise',
    'search': 'search',
    'search_blocks': 'search.block_search',
    'sweep': 'search.sweep',
    'report': 'report',
    'export': 'export',
    'publish': 'hub.publish',
    'load': 'hub.load',
    'Run': 'api',
    'UserError': 'errors',
}

__all__ = ['__version__', *_PUBLIC]


_get = lazy(__name__, _PUBLIC)


def __getattr__(name: str) -> Any:
    with user_errors():  # one that an extra is missing
        thing = _get(name)
    return user_errors()(thing) if name in ('fit', 'advise', 'search_blocks', 'sweep') else thing


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
