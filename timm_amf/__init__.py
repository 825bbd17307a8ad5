"""timm_amf: adaptive fine-tuning for any timm backbone.

Importing the package registers its models with timm. Everything else is imported when it is first used, so that the
import costs little more than timm's own.
"""
import os
import sys
from pathlib import Path

from .lazy import lazy
from .version import __version__

# What Apple's GPUs cannot do, the CPU does; torch says so in a line, and reads this when it is imported.
os.environ.setdefault('PYTORCH_ENABLE_MPS_FALLBACK', '1')
if Path(*sys.argv[:1]).stem != 'timm-amf':  # the command imports them, and torch, when its arguments make sense
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
    'param_groups': 'tuning.optim',
    'model_roles': 'tuning.roles',
    'resolve': 'tuning.resolve',
    'reinit': 'tuning.reinit',
    'L2SP': 'tuning.l2sp',
    'global_k_loss': 'models.global_k',
    'list_blocks': 'models.blocks',
    'fit': 'search.fit',
    'advise': 'search.advise',
    'search_blocks': 'search.block_search',
    'sweep': 'search.sweep',
    'load': 'hub.load',
    'predict': 'inference.predict',
    'publish': 'hub.publish',
    'UserError': 'errors',
}

__all__ = ['__version__', *_PUBLIC]


__getattr__ = lazy(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
