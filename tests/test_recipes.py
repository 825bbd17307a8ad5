"""Every recipe parses, and its Plan fits its model."""
import ast
from functools import cache

import pytest
import timm
import torch

from timm_amf.data import data_spec_from_args
from timm_amf.engine.config_file import list_recipes
from timm_amf.engine.options import parse_args
from timm_amf.tuning import GroupScheduler, create_optimizer, model_roles, plan_from_args
from timm_amf.tuning.plan_args import resolve_lr
from timm_amf.tuning.resolve import resolve


def meta_model(args):
    """The model of a recipe, without memory and to be read only: many recipes have the same."""
    return _meta_model(args.model, repr(args.model_kwargs))


@cache
def _meta_model(name, kwargs):
    with torch.device('meta'):
        return timm.create_model(name, num_classes=10, **ast.literal_eval(kwargs))


@pytest.mark.parametrize('name', list_recipes())
def test_recipe(name, tmp_path):
    args = parse_args(['--config', name, '--data-dir', str(tmp_path)])
    spec = data_spec_from_args(args)
    assert spec.components
    model = meta_model(args)
    plan = plan_from_args(args, model_roles(model), resolve_lr(args, args.batch_size))
    scheduler = GroupScheduler(create_optimizer(model, plan), plan)
    assert scheduler.total_epochs == plan.epochs
    training = {s.place.role for s in resolve(model, plan).parameters.values() if s.trains}
    assert {g['role'] for g in scheduler.optimizer.param_groups} == training
    # What does not train does so because the recipe or the model says it.
    defaults = getattr(model, 'role_defaults', {})
    for role in set(model_roles(model)) - training:
        assert plan.role(role, defaults).train == 'none'


def test_the_papers_setting():
    args = parse_args(['--config', 'amf_inception_v4x2.aircraft_dtd', '--data-dir', '.'])
    plan = plan_from_args(args, ['branch.0', 'branch.1', 'policy', 'head'], 1.)
    assert [plan.role(r).lr for r in ('branch.0', 'branch.1', 'head', 'policy')] == [0.0008, 0.03, 0.008, 3e-5]
    assert (args.batch_size, args.aa, args.reprob) == (32, 'rand-m9-mstd0.5-inc1', 0.5)
    assert plan.opt == 'sgd' and plan.momentum == 0.9 and plan.schedule.sched == 'step'
    assert 0.9 <= plan.schedule.decay_rate <= 0.96 and 20 <= plan.schedule.decay_epochs <= 25
