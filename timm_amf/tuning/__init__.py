"""How a model is fine-tuned: the Plan, and what it drives.

`reinit.reinit` and `resolve.resolve` have the names of their modules, so the package has no such names.
"""
from ..lazy import lazy
from .plan import Plan, RolePlan, Schedule
from .plan_args import add_plan_args, plan_from_args

_LAZY = {
    'apply_freeze': 'freeze', 'L2SP': 'l2sp', 'create_optimizer': 'optim', 'describe_depths': 'optim',
    'describe_groups': 'optim', 'param_groups': 'resolve', 'Resolved': 'resolve', 'Place': 'roles',
    'model_roles': 'roles', 'places': 'roles', 'GroupScheduler': 'schedule',
}
__all__ = ['Plan', 'RolePlan', 'Schedule', 'add_plan_args', 'plan_from_args', *_LAZY]
__getattr__ = lazy(__name__, _LAZY)
