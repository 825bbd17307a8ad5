"""The Plan on the command line: its flags, and timm's flags read as a Plan."""
import argparse
from collections.abc import Iterable
from typing import Any

import yaml

from timm_amf.errors import UserError
from timm_amf.tuning.plan import Plan

__all__ = ['add_plan_args', 'plan_from_args']

# timm's flags that are fields of the Plan, and of its Schedule.
_PLAN_FLAGS = {
    name: name for name in (
        'epochs', 'opt', 'momentum', 'weight_decay', 'layer_decay', 'layer_decay_min_scale', 'layer_decay_no_opt_scale',
        'opt_eps', 'opt_betas', 'opt_kwargs', 'sched_on_updates', 'temperature', 'temperature_end', 'global_k',
        'global_k_weights', 'global_k_window',
    )
}
_SCHEDULE_FLAGS = {
    'sched': 'sched', 'warmup_epochs': 'warmup_epochs', 'warmup_prefix': 'warmup_prefix',
    'decay_epochs': 'decay_epochs', 'decay_milestones': 'decay_milestones', 'decay_rate': 'decay_rate',
    'cooldown_epochs': 'cooldown_epochs', 'patience_epochs': 'patience_epochs', 'lr_cycle_mul': 'cycle_mul',
    'lr_cycle_decay': 'cycle_decay', 'lr_cycle_limit': 'cycle_limit', 'lr_k_decay': 'k_decay',
    'lr_decay_fn': 'decay_fn', 'lr_stable_timescale': 'stable_timescale', 'lr_noise': 'noise',
    'lr_noise_pct': 'noise_pct', 'lr_noise_std': 'noise_std', 'seed': 'noise_seed',
}
_POLICY_SCHEDULE_FLAGS = {
    'policy_sched': 'sched', 'policy_hold_epochs': 'hold_epochs', 'policy_warmup_epochs': 'warmup_epochs',
    'policy_decay_epochs': 'decay_epochs', 'policy_decay_rate': 'decay_rate',
}
# Of the roles that have blocks, all alike.
_DEPTH_FLAGS = (
    'low_blocks', 'low_lr_scale', 'reinit_blocks', 'l2sp_alpha', 'l2sp_blocks', 'train_share', 'train_seed',
)
# Roles that the flags of depth pass over: they have no blocks of their own, or none that train.
_WITHOUT_BLOCKS = ('frozen', 'head', 'policy', 'stem', 'tail')
_LR_FLAGS = ('lr', 'lr_base', 'lr_base_size', 'lr_base_scale')


def add_plan_args(parser: argparse.ArgumentParser) -> None:
    """Add the group `Plan parameters`: what differs by role. Everything common has timm's own flags."""
    description = "How each role of the model is fine-tuned; what is common has timm's own flags."
    add = parser.add_argument_group('Plan parameters', description).add_argument
    add('--plan', default='', metavar='FILE', help='read a Plan (plan.yaml of a run, or a recipe); flags override it')
    add('--branch-lr', type=float, nargs='+', metavar='LR', help='LR of each branch, in order')
    add('--policy-lr', type=float, metavar='LR', help='LR of the policy network')
    add('--head-lr', type=float, metavar='LR', help='LR of the classifier')
    add('--backbone-lr', type=float, metavar='LR', help='LR of a plain model apart from its classifier')
    add('--low-blocks', type=int, metavar='N', help='the first N blocks of the backbone or of each branch train slower')
    add('--low-lr-scale', type=float, metavar='F', help='factor of the LR of the low blocks (default: 0.4)')
    add('--reinit-blocks', type=int, metavar='N',
        help='the last N blocks of the backbone or of each branch start anew, as the classifier does')
    add('--l2sp-alpha', type=float, metavar='A',
        help='weight decay of the backbone or of each branch towards its start instead of zero (L2-SP)')
    add('--l2sp-blocks', type=_number_or_all, metavar='N',
        help='L2-SP on the first N blocks only, weight decay on the rest (default: all)')
    add('--train-share', type=float, metavar='F',
        help='only this share of the blocks of the backbone or of each branch trains, drawn at random')
    add('--train-seed', type=int, metavar='N', help='what the draw of --train-share follows from (default: 0)')
    add('--freeze', nargs='+', default=[], metavar='ROLE', help='roles that do not train')
    add('--freeze-bn', nargs='+', default=[], metavar='ROLE', help='roles whose batch norms stay fixed')
    add('--policy-start-epoch', type=int, metavar='N', help='the policy network is frozen before this epoch')
    add('--policy-sched', metavar='NAME', help='schedule of the policy network (default: as --sched)')
    add('--policy-warmup-epochs', type=float, metavar='N', help='warm-up of the policy network')
    add('--policy-hold-epochs', type=float, metavar='N', help='epochs at the full policy LR before it decays')
    add('--policy-decay-epochs', type=float, metavar='N', help='epoch interval of the policy LR\'s decay')
    add('--policy-decay-rate', type=float, metavar='F', help='decay rate of the policy LR')
    add('--temperature', type=float, metavar='T', help="temperature of a SpotTune's policy (default: the model's, 5)")
    add('--temperature-end', type=float, metavar='T', help='temperature of the last epoch (default: as the first)')
    add('--global-k', type=int, metavar='K', help='a SpotTune learns K blocks to tune for all images alike')
    add('--global-k-weights', type=float, nargs=2, metavar='L', help='lambda 1 and 2 of its losses (default: 0.1 0.1)')
    add('--global-k-window', type=int, metavar='N', help='images over which its shares are counted (default: 1000)')
    add('--role', nargs='+', default=[], metavar='ROLE.FIELD=VALUE', dest='role_settings',
        help='any setting of any role, e.g. branch.0.lr=0.0008 policy.schedule.sched=cosine backbone.train=[-1,-2]')


def _number_or_all(text: str):
    return text if text == 'all' else int(text)


def plan_from_args(args: argparse.Namespace, roles: Iterable[str], lr: float) -> Plan:
    """The Plan of a command line.

    Without a Plan, all of timm's flags make one, timm's defaults included. A Plan (`--plan`, or else the recipe's
    `plan:` section) means here what it means to `Plan.from_yaml`: what it leaves out takes the Plan's own defaults, and
    only flags that were given, on the command line or in the recipe, override it.

    timm's `--warmup-lr` and `--min-lr` are absolute, for the LR of `--lr`; they become fractions of it.

    Args:
        args: Parsed flags, with `explicit` (the names of those that were given) and `recipe` (the sections of
            `--config`).
        roles: The roles of the model.
        lr: The LR that the flags give (`--lr`, or `--lr-base` scaled by the batch size).

    Returns:
        The Plan.

    Raises:
        UserError: If a setting is out of range, or names a role that the model has not.
    """
    roles = list(roles)
    given = set(args.explicit)
    if args.plan:
        plan = Plan.from_yaml(args.plan)
    elif 'plan' in args.recipe:
        plan = Plan.from_dict(args.recipe['plan'])
    else:
        plan = Plan(lr=lr, **_values(args, _PLAN_FLAGS), schedule=_schedule_values(args, lr))
    over: dict[str, Any] = {k: v for k, v in _values(args, _PLAN_FLAGS).items() if k in given}
    if given.intersection(_LR_FLAGS):
        over['lr'] = lr
    # The seed names the noise's draw but does not ask for it: a Plan's own noise seed stays.
    plan = plan.updated(over)
    plan = plan.updated(dict(schedule=_schedule_values(args, plan.lr, given - {'seed'})))
    for name, settings in _role_settings(args, roles):
        plan = plan.with_role(name, **settings)
    return plan


def _values(args, table) -> dict[str, Any]:
    return {field: getattr(args, flag) for flag, field in table.items() if getattr(args, flag) is not None}


def _schedule_values(args, lr: float, only=None) -> dict[str, Any]:
    """timm's schedule flags as fields of a Schedule; `only` limits them to the flags named."""
    values = _values(args, {k: v for k, v in _SCHEDULE_FLAGS.items() if only is None or k in only})
    for flag, field in (('warmup_lr', 'warmup_scale'), ('min_lr', 'min_scale')):
        if only is not None and flag not in only:
            continue
        fraction = getattr(args, flag) / lr if lr else 0.
        if fraction > 1 and flag in args.explicit:
            name = flag.replace('_', '-')
            raise UserError(f'--{name} {getattr(args, flag):g} is above the LR of {lr:g}; lower it, or raise --lr')
        values[field] = min(1., fraction)  # timm's default of 1e-5 can lie above a very small LR
    if values.get('sched') == 'none':
        values.update(sched='constant', warmup_epochs=0)
    return values


def _role_settings(args, roles: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """(role, settings) of the flags of the group, those of `--role` last."""
    result = []
    branches = [r for r in roles if r.split('.')[0] == 'branch']
    if args.branch_lr is not None:
        if len(args.branch_lr) != len(branches):
            raise UserError(f'--branch-lr has {len(args.branch_lr)} values, but the model has {len(branches)} branches')
        result += [(r, dict(lr=v)) for r, v in zip(branches, args.branch_lr)]
    for kind in ('policy', 'head', 'backbone'):
        value = getattr(args, f'{kind}_lr')
        if value is not None:
            result.append((_known(kind, roles, f'--{kind}-lr'), dict(lr=value)))
    bodies = branches or [r for r in roles if r not in _WITHOUT_BLOCKS]
    depths = _values(args, {name: name for name in _DEPTH_FLAGS})
    if args.train_share is not None:
        depths['train'] = 'random'
    result += [(r, depths) for r in bodies if depths]
    if 'tail' in roles and 'l2sp_alpha' in depths and depths.get('l2sp_blocks', 'all') == 'all':
        # Of all that is transferred; where the block before it starts anew, it has nothing to stay near to.
        result += [] if depths.get('reinit_blocks') else [('tail', dict(l2sp_alpha=depths['l2sp_alpha']))]
    result += [(_known(r, roles, '--freeze'), dict(train='none')) for r in args.freeze]
    result += [(_known(r, roles, '--freeze-bn'), dict(freeze_bn=True)) for r in args.freeze_bn]
    policy = _values(args, dict(policy_start_epoch='start_epoch'))
    schedule = _values(args, _POLICY_SCHEDULE_FLAGS)
    if policy or schedule:
        settings = dict(policy, schedule=schedule) if schedule else policy
        result.append((_known('policy', roles, '--policy-*'), settings))
    return result + [_parse_setting(text, roles) for text in args.role_settings]


def _known(role: str, roles: list[str], flag: str) -> str:
    if role not in roles and role not in {r.split('.')[0] for r in roles}:
        raise UserError(f'{flag}: the model has no role {role!r}; it has {", ".join(roles)}')
    return role


def _parse_setting(text: str, roles: list[str]) -> tuple[str, dict[str, Any]]:
    """`branch.0.lr=0.0008` -> ('branch.0', {'lr': 0.0008}); `policy.schedule.sched=cosine` nests."""
    path, separator, value = text.partition('=')
    names = sorted([*roles, *{r.split('.')[0] for r in roles}], key=len, reverse=True)
    role = next((r for r in names if path.startswith(f'{r}.')), None)
    if not separator or role is None:
        raise UserError(f'--role {text}: write ROLE.FIELD=VALUE with a role of the model ({", ".join(roles)})')
    field, _, inner = path[len(role) + 1:].partition('.')
    value = yaml.safe_load(value)
    return role, {field: {inner: value} if inner else value}
