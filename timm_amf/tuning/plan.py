"""The Plan: how a model is fine-tuned, as plain data.

A model says what is computed, a Plan how it is fine-tuned: for each role of the model (`branch.0`, `policy`, `head`,
...) and each depth within it, what trains, how fast and on which schedule. It is a dataclass that reads from and writes
to YAML, is validated when it is built, and knows nothing of any model: `timm_amf.param_groups(model, plan)` joins the
two.
"""
import copy
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from timm_amf.errors import UserError

__all__ = ['Plan', 'RolePlan', 'Schedule', 'SCHEDULES']

SCHEDULES = ('constant', 'cosine', 'multistep', 'plateau', 'poly', 'rsqrt', 'step', 'tanh', 'wsd')


@dataclass
class Schedule:
    """The course of a learning rate over the epochs, as fractions of each group's own LR.

    Because everything is relative, one schedule is right for a group at 3e-5 and for one at 0.03. Shapes and names are
    those of `timm.scheduler.create_scheduler_v2`, which computes them. The defaults are those of the AMF paper (section
    IV-B3 "Other hyper-parameters": decay epochs 20 to 25, decay rate 0.9 to 0.96).

    Attributes:
        sched: Shape, one of `SCHEDULES`.
        warmup_epochs: Epochs of linear warm-up from `warmup_scale` to 1.
        warmup_scale: Fraction of the group's LR at which the warm-up starts, in [0, 1].
        warmup_prefix: The decay starts after the warm-up instead of counting from epoch 0.
        hold_epochs: Epochs at the full LR between the warm-up and the decay.
        min_scale: Fraction of the group's LR below which the decay does not go, in [0, 1]
            (cosine, tanh, poly, plateau, wsd, rsqrt).
        decay_epochs: Interval of `step`; length of the decay phase of `wsd` and `rsqrt`.
        decay_milestones: Epochs at which `multistep` decays.
        decay_rate: Factor of each decay (step, multistep, plateau); power of `poly`.
        cooldown_epochs: Epochs at the minimum after the end (cosine, tanh, poly).
        patience_epochs: Epochs without improvement before `plateau` decays.
        cycle_mul: Length of each cycle relative to the one before (cosine, tanh, poly).
        cycle_decay: Peak of each cycle relative to the one before.
        cycle_limit: Number of cycles.
        k_decay: k-decay exponent (cosine, poly).
        decay_fn: Shape of the decay phase (wsd, rsqrt).
        stable_timescale: Time scale of `rsqrt`, in epochs.
        noise: Start, or start and end, of multiplicative LR noise, as fractions of the epochs.
        noise_pct: Largest noise, as a fraction.
        noise_std: Standard deviation of the noise.
        noise_seed: Seed of the noise.
    """
    sched: str = 'step'
    warmup_epochs: float = 0
    warmup_scale: float = 0.
    warmup_prefix: bool = False
    hold_epochs: float = 0
    min_scale: float = 0.
    decay_epochs: Optional[float] = 20
    decay_milestones: list[int] = field(default_factory=lambda: [90, 180, 270])
    decay_rate: float = 0.94
    cooldown_epochs: int = 0
    patience_epochs: int = 10
    cycle_mul: float = 1.
    cycle_decay: float = 0.5
    cycle_limit: int = 1
    k_decay: float = 1.
    decay_fn: Optional[str] = None
    stable_timescale: Optional[float] = None
    noise: Optional[list[float]] = None
    noise_pct: float = 0.67
    noise_std: float = 1.
    noise_seed: int = 42

    def __post_init__(self):
        _check_types(self, 'schedule')
        if self.sched not in SCHEDULES:
            raise UserError(f'schedule: sched {self.sched!r} is unknown; choose one of {", ".join(SCHEDULES)}')
        _check_range('schedule', self, 0, 1, 'warmup_scale', 'min_scale')
        _check_range(
            'schedule', self, 0, None,
            'warmup_epochs', 'hold_epochs', 'cooldown_epochs', 'patience_epochs', 'decay_rate', 'noise_pct',
        )
        if self.decay_epochs is not None and self.decay_epochs <= 0:
            raise UserError(f'schedule: decay_epochs must be above 0, not {self.decay_epochs}')

    def replace(self, **changes) -> 'Schedule':
        """A copy with some fields changed, validated again."""
        _check_names(changes, Schedule, 'schedule')
        return dataclasses.replace(self, **changes)


@dataclass
class RolePlan:
    """How one role is fine-tuned. A field that is None takes the Plan's common value.

    Attributes:
        lr: Learning rate of the role's upper blocks.
        weight_decay: Weight decay of the role (none on biases, norms and what the model excludes).
        low_blocks: Number of blocks, counted from the input and including the stem before them, that train at
            `low_lr_scale` times the LR (AMF paper, section IV-B1: the first 8 at 0.4; non-binary paper, section 4.4).
        low_lr_scale: Factor of the LR of the low blocks.
        layer_decay: Factor of the LR for each step of depth towards the input, as timm's `--layer-decay`.
        train: `all`, `none`, or a list of blocks: names or indices (negative ones count from the end) of
            `timm_amf.list_blocks`, and `stem` or `tail` for what lies before the first and after the last block; and of
            layers: modules by name, or single parameters, of which all trains and nothing else of their block.
            What is not listed is frozen, batch-norm statistics included. `random` draws the blocks ("stochastic
            fine-tuning", SpotTune paper, section 4.1): the stem is frozen, what lies after the last block trains.
        train_share: Share of the blocks that `random` draws, above 0 to 1; rounded to the nearest number, at least one.
        train_seed: What the draw of `random` follows from, besides the number of blocks.
        reinit_blocks: Number of blocks, counted from the output, that start anew with the architecture's own
            initialisation, and with them what lies after the last block (non-binary paper, section 4.3: 0, 1, 2 are
            its 1, 2, 3 layers, of which the classifier is the first).
        l2sp_alpha: Weight decay towards the starting point instead of zero (L2-SP): the penalty is
            alpha / 2 * ||w - w_0||^2, its gradient alpha * (w - w_0). 0 is none, and then weight decay acts.
        l2sp_blocks: Number of transferred blocks, counted from the input and including the stem before them, on which
            `l2sp_alpha` acts instead of `weight_decay`; `all` (the default) takes all that is transferred, also what
            lies after the last block. The rest, and what is re-initialised, has `weight_decay` (non-binary paper,
            Table 5, where it is called beta).
        l2sp_1d: Also pull what weight decay spares: biases, norms, and what the model exempts from it.
        start_epoch: Epoch at which the role starts to train; frozen until then, and its schedule counts from there.
        freeze_bn: Keep the statistics and the affine parameters of the batch norms fixed though the role trains.
        schedule: Fields of `Schedule` that differ from the Plan's.
    """
    lr: Optional[float] = None
    weight_decay: Optional[float] = None
    low_blocks: Optional[int] = None
    low_lr_scale: Optional[float] = None
    layer_decay: Optional[float] = None
    train: Optional[Union[str, list[Union[int, str]]]] = None
    train_share: Optional[float] = None
    train_seed: Optional[int] = None
    reinit_blocks: Optional[int] = None
    l2sp_alpha: Optional[float] = None
    l2sp_blocks: Optional[Union[int, str]] = None
    l2sp_1d: Optional[bool] = None
    start_epoch: Optional[int] = None
    freeze_bn: Optional[bool] = None
    schedule: Optional[dict[str, Any]] = None

    def __post_init__(self):
        _check_types(self, 'role')
        _check_range(
            'role', self, 0, None,
            'lr', 'weight_decay', 'low_blocks', 'low_lr_scale', 'start_epoch', 'train_seed', 'reinit_blocks',
            'l2sp_alpha',
        )
        _check_range('role', self, 0, 1, 'layer_decay', 'train_share')
        if self.train_share == 0:
            raise UserError('role: train_share must be above 0; to train nothing, set train to "none"')
        if isinstance(self.train, str) and self.train not in ('all', 'none', 'random'):
            raise UserError(
                f'role: train must be "all", "none", "random" or a list of blocks or layers, not {self.train!r}')
        if isinstance(self.l2sp_blocks, str) and self.l2sp_blocks != 'all':
            raise UserError(f'role: l2sp_blocks must be a number of blocks or "all", not {self.l2sp_blocks!r}')
        if isinstance(self.l2sp_blocks, int):
            _check_range('role', self, 0, None, 'l2sp_blocks')
        if self.schedule is not None:
            _check_names(self.schedule, Schedule, 'role.schedule')
            Schedule(**self.schedule)

    def merged(self, other: 'RolePlan') -> 'RolePlan':
        """This role's settings with every field that `other` sets taken from `other`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in values:
            theirs = getattr(other, name)
            if name == 'schedule' and theirs is not None:
                theirs = {**(self.schedule or {}), **theirs}
            if theirs is not None:
                values[name] = theirs
        return RolePlan(**values)


# What a role does when neither it nor the Plan says otherwise.
_ROLE_DEFAULTS = dict(
    low_blocks=0, low_lr_scale=0.4, train='all', train_share=0.5, train_seed=0, reinit_blocks=0, l2sp_1d=False,
    start_epoch=0, freeze_bn=False, schedule={},
)


@dataclass
class Plan:
    """How a model is fine-tuned: what is common, and what differs by role.

    Keys of `roles` are the roles of the model (`branch.0`, `branch.1`, `policy`, `head`; `backbone` and `head` for a
    plain timm model), or a kind (`branch`) that stands for all roles `branch.*`; the exact name wins field by field.

    Attributes:
        lr: Learning rate of every role that has none of its own.
        epochs: Number of epochs of the schedules (warm-up prefix and cool-down come on top, as in timm).
        opt: Optimiser, any name of `timm.optim.list_optimizers`.
        momentum: Momentum, for optimisers that have one.
        weight_decay: Weight decay of every role that has none of its own.
        weight_decay_exclude_1d: No weight decay on biases and norms (timm's rule).
        layer_decay: Factor of the LR for each step of depth, for every role that has none of its own.
        layer_decay_min_scale: Lower limit of the layer-decay factor.
        layer_decay_no_opt_scale: Blocks whose layer-decay factor is below this are frozen.
        opt_eps: Epsilon of the optimiser (None: its default).
        opt_betas: Betas of the optimiser (None: its default).
        opt_kwargs: Further arguments of the optimiser.
        schedule: The schedule of every role that has none of its own.
        sched_on_updates: Step the schedules on every update instead of every epoch.
        temperature: Temperature of a SpotTune's Gumbel-softmax, above 0 (None: the model's own; 5 in the paper).
        temperature_end: Temperature of the last epoch, reached by equal factors from epoch to epoch (None: constant).
        global_k: Number of blocks that a SpotTune may tune for all images alike (SpotTune, section 3.3; None: any).
        global_k_weights: lambda_1 and lambda_2 of its losses (equation 7), which the paper does not give.
        global_k_window: Images over which the share of each block is counted.
        roles: Settings by role.

    Raises:
        UserError: If a field is unknown, of the wrong type or out of range.
    """
    lr: float = 0.01
    epochs: int = 300
    opt: str = 'sgd'
    momentum: float = 0.9
    weight_decay: float = 2e-5
    weight_decay_exclude_1d: bool = True
    layer_decay: Optional[float] = None
    layer_decay_min_scale: float = 0.
    layer_decay_no_opt_scale: Optional[float] = None
    opt_eps: Optional[float] = None
    opt_betas: Optional[list[float]] = None
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)
    sched_on_updates: bool = False
    temperature: Optional[float] = None
    temperature_end: Optional[float] = None
    global_k: Optional[int] = None
    global_k_weights: list[float] = field(default_factory=lambda: [0.1, 0.1])
    global_k_window: int = 1000
    roles: dict[str, RolePlan] = field(default_factory=dict)

    def __post_init__(self):
        self.schedule = _build(Schedule, self.schedule, 'plan.schedule')
        if not isinstance(self.roles, Mapping):
            raise UserError(f'plan.roles must be a mapping of role to settings, not {self.roles!r}')
        self.roles = {str(k): _build(RolePlan, v, f'plan.roles.{k}') for k, v in self.roles.items()}
        _check_types(self, 'plan')
        _check_range('plan', self, 0, None, 'lr', 'epochs', 'momentum', 'weight_decay', 'global_k')
        for name in ('temperature', 'temperature_end', 'global_k_window'):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f'plan: {name} must be above 0, not {value}')
        if len(self.global_k_weights) != 2 or min(self.global_k_weights) < 0:
            raise UserError(f'plan: global_k_weights must be two values of 0 or more, not {self.global_k_weights}')
        if self.temperature_end is not None and self.temperature is None:
            raise UserError('plan: temperature_end needs a temperature to start from; set temperature')
        _check_range('plan', self, 0, 1, 'layer_decay', 'layer_decay_min_scale')

    def role(self, name: str, defaults: Optional[Mapping[str, Mapping[str, Any]]] = None) -> RolePlan:
        """The settings of one role with every field filled in.

        Args:
            name: The role.
            defaults: A model's own settings by role or kind (`role_defaults`). What is later in this order wins, field
                by field: the package's defaults, the Plan's common values, these, then the Plan's for the kind of the
                role and for the role itself.
        """
        merged = RolePlan(
            lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay, **copy.deepcopy(_ROLE_DEFAULTS))
        keys = tuple(dict.fromkeys((name.split('.')[0], name)))
        for settings in (defaults or {}, self.roles):
            for key in keys:
                if key in settings:
                    merged = merged.merged(_build(RolePlan, settings[key], f'role_defaults.{key}'))
        return merged

    def role_schedule(self, name: str, defaults: Optional[Mapping[str, Mapping[str, Any]]] = None) -> Schedule:
        """The schedule of one role; `defaults` as in `role`."""
        return self.schedule.replace(**self.role(name, defaults).schedule)

    def temperature_at(self, epoch: int) -> Optional[float]:
        """The temperature of an epoch, from 0; None leaves the model its own."""
        if self.temperature is None or self.temperature_end is None:
            return self.temperature
        progress = min(1., epoch / max(self.epochs - 1, 1))
        return self.temperature * (self.temperature_end / self.temperature) ** progress

    def with_role(self, name: str, **settings) -> 'Plan':
        """A copy of the Plan in which the role `name` has the given settings besides those that it had."""
        _check_names(settings, RolePlan, f'plan.roles.{name}')
        plan = copy.deepcopy(self)
        plan.roles[name] = plan.roles.get(name, RolePlan()).merged(RolePlan(**settings))
        return plan

    def updated(self, mapping: Mapping[str, Any]) -> 'Plan':
        """A copy with the settings of a mapping (the `plan:` section of a recipe) laid over this Plan's."""
        _check_names(mapping, Plan, 'plan')
        values = self.to_dict()
        for key, value in mapping.items():
            if key == 'schedule' and isinstance(value, Mapping):
                value = {**values.get('schedule', {}), **value}
            values[key] = value
        roles = values.get('roles') or {}
        if mapping.get('roles') is not None and isinstance(roles, Mapping):
            merged = dict(self.roles)
            for name, settings in roles.items():
                settings = _build(RolePlan, settings, f'plan.roles.{name}')
                merged[name] = merged[name].merged(settings) if name in merged else settings
            values['roles'] = merged
        return Plan(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every common field, and of the roles the fields that are set."""
        data = dataclasses.asdict(self)
        data['roles'] = {
            name: {k: v for k, v in settings.items() if v is not None} for name, settings in data['roles'].items()
        }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> 'Plan':
        """Build a Plan from plain data.

        Raises:
            UserError: If a field is unknown, of the wrong type or out of range.
        """
        _check_names(data, cls, 'plan')
        return cls(**data)

    def to_yaml(self, path: Union[str, Path]) -> None:
        """Write the Plan under the key `plan`, so that `train_amf.py --config` takes the file as it is."""
        text = yaml.safe_dump({'plan': self.to_dict()}, sort_keys=False)
        Path(path).write_text(text, encoding='utf-8')

    @classmethod
    def from_yaml(cls, path: Union[str, Path]) -> 'Plan':
        """Read a Plan from a file that holds it alone, or under the key `plan` of a recipe.

        Raises:
            UserError: If the file is missing, is no YAML mapping or holds no valid Plan.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
        except OSError as e:
            raise UserError(f'{path}: cannot be read ({e.strerror}); give the path of a plan.yaml') from None
        except yaml.YAMLError as e:
            raise UserError(f'{path}: is not valid YAML ({" ".join(str(e).split())})') from None
        if not isinstance(data, Mapping):
            raise UserError(f'{path}: holds no mapping of settings')
        try:
            return cls.from_dict(data.get('plan', data))
        except UserError as e:
            raise UserError(f'{path}: {e}') from None


def _build(cls, value, where: str):
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f'{where} must be a mapping of settings, not {value!r}')
    _check_names(value, cls, where)
    try:
        return cls(**value)
    except UserError as e:
        raise UserError(f'{where}: {str(e).split(": ", 1)[-1]}') from None


def _check_names(mapping, cls, where: str) -> None:
    if not isinstance(mapping, Mapping):
        raise UserError(f'{where} must be a mapping of settings, not {mapping!r}')
    names = [f.name for f in dataclasses.fields(cls)]
    for key in mapping:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f'; did you mean {near[0]!r}?' if near else f'; it has {", ".join(names)}'
            raise UserError(f'{where} has no setting {key!r}{hint}')


def _check_types(instance, where: str) -> None:
    """Check the fields against their annotations; YAML gives `1e-4` as a string and `1` for a float."""
    hints = typing.get_type_hints(type(instance))
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        try:
            setattr(instance, f.name, _coerce(value, hints[f.name]))
        except (TypeError, ValueError):
            expected = f.type.__name__ if isinstance(f.type, type) else str(f.type).replace('typing.', '')
            raise UserError(f'{where}: {f.name} must be {expected}, not {value!r}') from None


def _coerce(value, hint):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Union:
        if value is None and type(None) in args:
            return None
        for option in (a for a in args if a is not type(None)):
            try:
                return _coerce(value, option)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is list:
        if isinstance(value, (str, Mapping)):
            raise TypeError
        return [_coerce(v, args[0]) for v in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return {k: _coerce(v, args[1]) for k, v in value.items()}
    if hint in (int, float):
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if number != number or (hint is int and number != int(number)):
            raise ValueError
        return int(number) if hint is int else number
    if not isinstance(value, hint):
        raise TypeError
    return value


def _check_range(where: str, instance, low: float, high: Optional[float], *names: str) -> None:
    for name in names:
        value = getattr(instance, name)
        if value is not None and (value < low or (high is not None and value > high)):
            limits = f'at least {low}' if high is None else f'from {low} to {high}'
            raise UserError(f'{where}: {name} must be {limits}, not {value}')
