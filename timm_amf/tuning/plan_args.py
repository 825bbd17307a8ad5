"""The Plan on the command line: its flags follow from its fields."""
import argparse
import dataclasses
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Optional, Union

from timm_amf.errors import UserError, nearest
from timm_amf.flags import add_flags, path
from timm_amf.tuning.plan import Plan, RolePlan, Schedule
from timm_amf.yaml_text import load_yaml, parse_yaml

__all__ = ['add_plan_args', 'common_plan', 'plan_from_args', 'resolve_lr']

# Roles that the flags of depth pass over: they have no blocks of their own, or none that train.
_WITHOUT_BLOCKS = ('frozen', 'head', 'policy', 'stem', 'tail')


def _flags(cls, prefix: str = '') -> Iterator[tuple[dataclasses.Field, str, str]]:
    """(field, names of its flag, its key in the namespace) of the fields that have a flag.

    With a prefix, of those that the policy has a flag of its own for.
    """
    for field in dataclasses.fields(cls):
        names = field.metadata.get('flag', f'--{field.name}').replace('_', '-')
        if prefix:
            names = f'--{prefix}{field.name}'.replace('_', '-') if field.metadata.get('policy') else ''
        if names:
            yield field, names, names.split()[0][2:].replace('-', '_')


def _row(cls, field: dataclasses.Field, names: str, whose: str) -> tuple:
    """The row of a field for `add_flags`. Its default is None: what is not given changes nothing."""
    hint, keywords = typing.get_type_hints(cls)[field.name], {}
    if typing.get_origin(hint) is Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        hint = kinds[0] if len(kinds) == 1 else _number_or_word
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
        keywords['nargs'] = field.metadata.get('nargs', '+')
    choices, text = field.metadata.get('choices'), field.metadata['help']
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if choices:
        keywords['choices'] = (*choices, 'none') if field.name == 'sched' else choices
    if not (whose or 'default' in text or default in (None, {}, False)):
        text += f' (default: {" ".join(map(str, default)) if isinstance(default, list) else default})'
    return names, typing.get_origin(hint) or hint, None, whose + text, keywords


_ROLE_FLAGS = (
    ('--branch-lr', float, None, 'LR of each branch, in order', {'nargs': '+', 'metavar': 'LR'}),
    ('--policy-lr', float, None, 'LR of the policy network', {'metavar': 'LR'}),
    ('--head-lr', float, None, 'LR of the classifier', {'metavar': 'LR'}),
    ('--backbone-lr', float, None, 'LR of a plain model apart from its classifier', {'metavar': 'LR'}),
    ('--freeze', str, [], 'roles that do not train', {'nargs': '+', 'metavar': 'ROLE'}),
    ('--freeze-bn', str, [], 'roles whose batch norms stay fixed', {'nargs': '+', 'metavar': 'ROLE'}),
    ('--role', str, [], 'any setting of any role, e.g. branch.0.lr=0.0008 policy.schedule.sched=cosine '
     'backbone.train=[-1,-2]', {'nargs': '+', 'metavar': 'ROLE.FIELD=VALUE', 'dest': 'role_settings'}),
)


def add_plan_args(parser: argparse.ArgumentParser) -> None:
    """Add the group `Plan parameters`: the flags of the fields of Plan, Schedule and RolePlan."""
    rows = [('--plan', path, '', 'read a Plan (plan.yaml of a run, or a recipe); flags override it; auto: the one that '
             'timm-amf fit finds', {'metavar': 'FILE'})]
    for cls, prefix, whose in (
            (Plan, '', ''), (Schedule, '', ''), (RolePlan, '', 'backbone or each branch: '),
            (RolePlan, 'policy_', 'policy: '), (Schedule, 'policy_', 'policy: ')):
        rows += [_row(cls, field, names, whose) for field, names, _ in _flags(cls, prefix)]
    add_flags(parser, 'Plan parameters', [*rows, *_ROLE_FLAGS], 'How the model, and each of its roles, is fine-tuned.')


def _number_or_word(text: str) -> Union[int, str]:
    return int(text) if text.lstrip('-').isdigit() else text


def resolve_lr(args: argparse.Namespace, global_batch_size: int) -> float:
    """The learning rate by the rule of timm's train script.

    `--lr` if given, else `lr_base` times the batch ratio `global_batch_size / lr_base_size`, or times its square root
    with `lr_base_scale` sqrt, which is the default for optimisers whose name holds `ada` or `lamb`.

    Args:
        args: Options with `lr`, `lr_base`, `lr_base_size`, `lr_base_scale`, `opt` and `recipe`.
        global_batch_size: Images a step of the optimiser: batch size times processes times accumulated batches.
    """
    if args.lr is not None:
        return args.lr
    opt = args.opt or args.recipe.get('plan', {}).get('opt', 'sgd')
    adaptive = any(part in opt.lower() for part in ('ada', 'lamb'))
    scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
    ratio = global_batch_size / (args.lr_base_size or 256)
    base = 0.1 if args.lr_base is None else args.lr_base
    return base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def plan_from_args(args: argparse.Namespace, roles: Iterable[str], lr: float) -> Plan:
    """The Plan of a run: that of `--plan` or of the recipe, with the flags that were given over it.

    What neither says has the Plan's default, except the LR, which follows timm's rule.

    Args:
        args: Parsed flags, with `recipe` (the sections of `--config`).
        roles: The roles of the model.
        lr: The LR that the flags give (`resolve_lr`).
    """
    roles = list(roles)
    plan = common_plan(args, lr)
    for role in plan.roles if args.plan else ():
        _known(role, roles, args.plan)
    for name, settings in _role_settings(args, roles):
        plan = plan.with_role(name, **settings)
    return plan


def common_plan(args: argparse.Namespace, lr: Optional[float] = None) -> Plan:
    """The Plan without the flags of single roles, which need a model.

    timm's `--warmup-lr` and `--min-lr` are absolute; they become fractions of the Plan's LR. Without `lr` they are not
    read.
    """
    section = dict(args.recipe.get('plan', {}))
    if args.plan:
        Plan.from_yaml(args.plan)  # names the file in its messages
        section = dict(load_yaml(args.plan))
        section = dict(section.get('plan', section))
    plan = Plan.from_dict(section).updated(_values(args, Plan))
    noise_seed = (section.get('schedule') or {}).get('noise_seed', args.seed)
    schedule = {'noise_seed': noise_seed, **_values(args, Schedule)}
    if schedule.get('sched') == 'none':
        schedule.update(sched='constant', warmup_epochs=0)
    if lr is not None:
        asks_lr = any(getattr(args, name) is not None for name in ('lr', 'lr_base', 'lr_base_size', 'lr_base_scale'))
        plan = plan.updated(dict(lr=lr)) if asks_lr or 'lr' not in section else plan
        for name, value, field in (('warmup', args.warmup_lr, 'warmup_scale'), ('min', args.min_lr, 'min_scale')):
            if value is not None and value > plan.lr:
                raise UserError(f'--{name}-lr {value:g} is above the LR of {plan.lr:g}; lower it, or raise --lr')
            if value is not None:
                schedule[field] = value / plan.lr if plan.lr else 0.
    return plan.updated(dict(schedule=schedule))


def _values(args, cls, prefix: str = '') -> dict[str, Any]:
    """The fields whose flags were given."""
    values = {field.name: getattr(args, dest) for field, _, dest in _flags(cls, prefix)}
    return {name: value for name, value in values.items() if value is not None}


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
    depths = _values(args, RolePlan)
    if args.train_share is not None:
        depths['train'] = 'random'
    result += [(r, depths) for r in bodies if depths]
    if 'tail' in roles and 'l2sp_alpha' in depths and depths.get('l2sp_blocks', 'all') == 'all':
        # Of all that is transferred; where the block before it starts anew, it has nothing to stay near to.
        result += [] if depths.get('reinit_blocks') else [('tail', dict(l2sp_alpha=depths['l2sp_alpha']))]
    result += [(_known(r, roles, '--freeze'), dict(train='none')) for r in args.freeze]
    result += [(_known(r, roles, '--freeze-bn'), dict(freeze_bn=True)) for r in args.freeze_bn]
    policy, schedule = _values(args, RolePlan, 'policy_'), _values(args, Schedule, 'policy_')
    if policy or schedule:
        settings = dict(policy, schedule=schedule) if schedule else policy
        result.append((_known('policy', roles, '--policy-*'), settings))
    return result + [_parse_setting(text, roles) for text in args.role_settings]


def _known(role: str, roles: list[str], flag: str) -> str:
    if role not in roles and role not in {r.split('.')[0] for r in roles}:
        raise UserError(f'{flag}: the model has no role {role!r}; it has {", ".join(roles)}{nearest(role, roles)}')
    return role


def _parse_setting(text: str, roles: list[str]) -> tuple[str, dict[str, Any]]:
    """`branch.0.lr=0.0008` -> ('branch.0', {'lr': 0.0008}); `policy.schedule.sched=cosine` nests."""
    where, separator, value = text.partition('=')
    names = sorted([*roles, *{r.split('.')[0] for r in roles}], key=len, reverse=True)
    role = next((r for r in names if where.startswith(f'{r}.')), None)
    if not separator or role is None:
        raise UserError(f'--role {text}: write ROLE.FIELD=VALUE with a role of the model ({", ".join(roles)})')
    field, _, inner = where[len(role) + 1:].partition('.')
    value = parse_yaml(value, f'--role {text[:200]}')
    return role, {field: {inner: value} if inner else value}
