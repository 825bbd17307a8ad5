"""How a model is fine-tuned: the Plan, and what it drives."""
from .freeze import apply_freeze
from .l2sp import L2SP
from .optim import create_optimizer, describe_depths, describe_groups, param_groups
from .plan import Plan, RolePlan, Schedule
from .plan_args import add_plan_args, plan_from_args
from .reinit import reinit
from .resolve import Resolved, resolve
from .roles import Place, model_roles, places
from .schedule import GroupScheduler

__all__ = [
    'GroupScheduler', 'L2SP', 'Place', 'Plan', 'Resolved', 'RolePlan', 'Schedule', 'add_plan_args', 'apply_freeze',
    'create_optimizer', 'describe_depths', 'describe_groups', 'model_roles', 'param_groups', 'places',
    'plan_from_args', 'reinit', 'resolve',
]
