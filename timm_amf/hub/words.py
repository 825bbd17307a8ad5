"""A Plan in words, for people who have never seen one."""
from collections.abc import Mapping, Sequence
from typing import Any, Union

from torch import nn

from timm_amf.tuning import Plan, model_roles
from timm_amf.tuning.plan import RolePlan, Schedule
from timm_amf.tuning.roles import role_defaults

__all__ = ['describe_plan', 'describe_role', 'describe_schedule', 'join_words']

# A longer list of layers is cut here: a search may have found dozens, and the card is for people.
_MOST_PARTS = 12


def describe_plan(plan: Plan, model: nn.Module) -> list[str]:
    """What was common, then what each role of a model did.

    Args:
        plan: The Plan.
        model: The model that it was of, which says what a role does where the Plan is silent.

    Returns:
        Sentences, without a mark at their end; of a role behind its name and a colon.
    """
    optimizer = plan.opt.upper() if plan.opt == 'sgd' else plan.opt
    momentum = f' with momentum {plan.momentum:g}' if plan.opt in ('sgd', 'momentum') else ''
    lines = [f'{optimizer}{momentum} for {_epochs(plan.epochs)}; {describe_schedule(plan.schedule)}']
    if plan.temperature is not None:
        until = f' to {plan.temperature_end:g}' if plan.temperature_end is not None else ''
        lines.append(f'Gumbel-softmax temperature {plan.temperature:g}{until}')
    if plan.global_k is not None:
        lines.append(f'the same {_blocks(plan.global_k, "tuned ")} for all images (global-k)')
    defaults = role_defaults(model)
    for role in model_roles(model):
        lines.append(f'`{role}`: {describe_role(plan.role(role, defaults), plan)}')
    return lines


def describe_role(role: RolePlan, plan: Plan) -> str:
    """What one role did, `role` being complete (`Plan.role`)."""
    if role.train in ('none', []):
        return 'frozen'
    parts = [f'learning rate {role.lr:g}']
    if role.train == 'random':
        parts.append(f'{100 * role.train_share:g} % of its blocks trained, drawn with seed {role.train_seed}')
    elif role.train != 'all':
        parts.append(_listed_training(role.train))
    if role.low_blocks and role.low_lr_scale != 1:
        parts.append(f'{role.low_lr_scale:g} times that in its first {_blocks(role.low_blocks)}')
    if role.layer_decay is not None:
        parts.append(f'times {role.layer_decay:g} for each layer further down')
    if role.reinit_blocks:
        parts.append(f'its last {_blocks(role.reinit_blocks)} re-initialised')
    if role.l2sp_alpha:
        where = 'everywhere' if role.l2sp_blocks in (None, 'all') else f'in its first {_blocks(role.l2sp_blocks)}'
        parts.append(f'decay {role.l2sp_alpha:g} towards its start {where} (L2-SP)')
    if role.weight_decay:
        beyond = ' elsewhere' if role.l2sp_alpha else ''
        parts.append(f'weight decay {role.weight_decay:g}{beyond}')
    if role.start_epoch:
        parts.append(f'frozen before epoch {role.start_epoch}')
    if role.freeze_bn:
        parts.append('batch norms fixed')
    if role.schedule:
        parts.append(f'its own schedule: {_own_schedule(role.schedule, plan)}')
    return ', '.join(parts)


def _listed_training(train: Sequence[Union[int, str]]) -> str:
    """What `train` as a list of blocks and layers leaves to train, and that the rest does not."""
    count = len(train)
    if sorted(train, key=str) == sorted(range(-count, 0), key=str):
        return f'only its last {_blocks(count)} trained'
    shown = [_part_name(item) for item in train[:_MOST_PARTS]]
    if count > _MOST_PARTS:
        shown.append(f'{count - _MOST_PARTS} more (`plan.yaml` has all)')
    return f'only {join_words(shown)} trained, all else in it frozen'


def _part_name(item: Union[int, str]) -> str:
    if isinstance(item, str):
        return {'stem': 'what lies before its blocks', 'tail': 'what lies after them'}.get(item, f'`{item}`')
    if item < 0:
        return 'its last block' if item == -1 else f'its block {-item} from the end'
    return f'its block {item + 1}'


def _blocks(count: int, kind: str = '') -> str:
    return f'{kind}block' if count == 1 else f'{count} {kind}blocks'


def _epochs(count: float) -> str:
    return f'{count:g} epoch{"" if count == 1 else "s"}'


def _own_schedule(fields: Mapping[str, Any], plan: Plan) -> str:
    return describe_schedule(plan.schedule.replace(**fields))


def join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`; at least one."""
    return words[0] if len(words) == 1 else f'{", ".join(words[:-1])} and {words[-1]}'


def describe_schedule(schedule: Schedule) -> str:
    """The course of a learning rate."""
    s = schedule
    shape = {
        'constant': 'constant learning rates',
        'cosine': f'cosine decay to {s.min_scale:g} of the learning rates',
        'multistep': f'learning rates times {s.decay_rate:g} at epochs {", ".join(map(str, s.decay_milestones))}',
        'step': f'learning rates times {s.decay_rate:g} every {_epochs(s.decay_epochs or 0)}',
        'plateau': f'learning rates times {s.decay_rate:g} after {_epochs(s.patience_epochs)} without improvement',
    }.get(s.sched, f'schedule {s.sched}')
    before = f', {_epochs(s.warmup_epochs)} of warm-up first' if s.warmup_epochs else ''
    hold = f', held for {_epochs(s.hold_epochs)} before it falls' if s.hold_epochs else ''
    return shape + before + hold
