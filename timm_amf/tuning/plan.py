"""The Plan: how a model is fine-tuned, as plain data.

A model says what is computed, a Plan how it is fine-tuned: for each role of the model (`branch.0`, `policy`, `head`,
...) and each depth within it, what trains, how fast and on which schedule. It is a dataclass that reads from and writes
to YAML, is validated when it is built, and knows nothing of any model: `timm_amf.param_groups(model, plan)` joins the
two.
"""
import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import yaml

from timm_amf.errors import UserError
from timm_amf.fields import Named, build, check_fields, check_names, setting
from timm_amf.files import write_text
from timm_amf.yaml_text import load_yaml

__all__ = ['Plan', 'RolePlan', 'Schedule', 'SCHEDULES']

SCHEDULES = ('constant', 'cosine', 'multistep', 'plateau', 'poly', 'rsqrt', 'step', 'tanh', 'wsd')
_TIMM_WARMUP_LR = 1e-5  # default of timm's --warmup-lr


@dataclass
class Schedule(Named):
    """The course of a learning rate over the epochs, as fractions of each group's own LR.

    Because everything is relative, one schedule is right for a group at 3e-5 and for one at 0.03. Shapes, names and
    defaults are those of timm's train script; `timm.scheduler.create_scheduler_v2` computes them. Each field says what
    it is in its declaration.
    """
    sched: str = setting('cosine', 'shape of the schedule', choices=SCHEDULES, policy=True)
    warmup_epochs: Optional[float] = setting(
        None, "epochs of linear warm-up, which counts updates (default: timm's 5, at most a tenth of the run)", low=0,
        policy=True)
    warmup_scale: Optional[float] = setting(
        None, "fraction of the LR at which the warm-up starts; null is timm's 1e-5, of the Plan's LR",
        low=0, high=1, flag='')
    warmup_prefix: bool = setting(False, 'count the epochs of the schedule from the end of the warm-up')
    hold_epochs: float = setting(
        0, 'epochs at the full LR between the warm-up and the decay', low=0, flag='', policy=True)
    min_scale: float = setting(0., 'fraction of the LR that the decay does not go below', low=0, high=1, flag='')
    decay_epochs: Optional[float] = setting(
        90, 'epochs between the decays of step; length of the decay of wsd and rsqrt', above=0, policy=True)
    decay_milestones: list[int] = setting([90, 180, 270], 'epochs at which multistep decays')
    decay_rate: float = setting(
        0.1, 'factor of each decay; power of poly', low=0, flag='--decay-rate --dr', policy=True)
    cooldown_epochs: int = setting(0, 'epochs at the least LR, after the schedule', low=0)
    patience_epochs: int = setting(10, 'epochs without improvement before plateau decays', low=0)
    cycle_mul: float = setting(
        1., 'factor from the length of a cycle to that of the next', low=0, flag='--lr-cycle-mul')
    cycle_decay: float = setting(0.5, 'factor from the LR of a cycle to that of the next', flag='--lr-cycle-decay')
    cycle_limit: int = setting(1, 'number of cycles', low=1, flag='--lr-cycle-limit')
    k_decay: float = setting(1., 'k of the k-decay of cosine and poly', flag='--lr-k-decay')
    decay_fn: Optional[str] = setting(
        None, 'shape of the decay phase of wsd and rsqrt', flag='--lr-decay-fn',
        choices=('linear', '1-sqrt', 'cosine', 'power', 'exp'))
    stable_timescale: Optional[float] = setting(
        None, 'time scale of rsqrt in epochs', above=0, flag='--lr-stable-timescale')
    noise: Optional[list[float]] = setting(
        None, 'start, or start and end, of LR noise as fractions of the epochs', flag='--lr-noise')
    noise_pct: float = setting(0.67, 'largest LR noise, as a fraction', low=0, flag='--lr-noise-pct')
    noise_std: float = setting(1., 'standard deviation of the LR noise', flag='--lr-noise-std')
    noise_seed: int = setting(42, 'seed of the LR noise; of a run it is --seed, unless it is set here', flag='')

    def __post_init__(self):
        check_fields(self, 'schedule')
        if self.decay_milestones != sorted(set(self.decay_milestones)):
            raise UserError(f'schedule: decay_milestones must increase, not {self.decay_milestones}')
        if self.noise is not None and (len(self.noise) not in (1, 2) or self.noise != sorted(self.noise)):
            raise UserError(f'schedule: noise must be 1 or 2 values in increasing order, not {self.noise}')


@dataclass
class RolePlan(Named):
    """How one role is fine-tuned. A field that is None takes the Plan's common value, else the default in its text."""
    lr: Optional[float] = setting(None, "learning rate (default: the Plan's)", low=0, flag='')
    weight_decay: Optional[float] = setting(
        None, "weight decay; none on biases, norms and what the model excludes (default: the Plan's)", low=0, flag='')
    low_blocks: Optional[int] = setting(
        None, 'the first N blocks, counted from the input and including the stem, train slower', low=0, otherwise=0)
    low_lr_scale: Optional[float] = setting(None, 'factor of the LR of the low blocks', low=0, otherwise=0.4)
    layer_decay: Optional[float] = setting(
        None, "factor of the LR for each step of depth, as timm's (default: the Plan's)", low=0, high=1, flag='')
    train: Optional[Union[str, list[Union[int, str]]]] = setting(
        None, 'all, none, random, or a list of blocks (names, indices, stem, tail) and layers (names of modules or '
        'parameters); the rest is frozen, batch-norm statistics included', flag='', otherwise='all')
    train_share: Optional[float] = setting(
        None, 'share of the blocks that train: random draws, rounded, at least one; the stem is frozen, what lies '
        'after the last block trains', above=0, high=1, otherwise=0.5)
    train_seed: Optional[int] = setting(None, 'what the draw of train: random follows from', low=0, otherwise=0)
    reinit_blocks: Optional[int] = setting(
        None, 'the last N blocks, and what lies after them, start with new weights', low=0, otherwise=0)
    l2sp_alpha: Optional[float] = setting(
        None, 'weight decay towards the starting point instead of zero (L2-SP): the gradient is alpha * (w - w_0); '
        '0 is none', low=0)
    l2sp_blocks: Optional[Union[int, str]] = setting(
        None, 'L2-SP on the first N transferred blocks only, weight decay on the rest (default: all)', low=0)
    l2sp_1d: Optional[bool] = setting(
        None, 'pull what weight decay spares, too: biases and norms', flag='', otherwise=False)
    lora_rank: Optional[int] = setting(
        None, 'train adapters of this rank beside the weights of linear layers and convolutions, and nothing else of '
        'the role (LoRA, by peft; default: none)', low=1)
    start_epoch: Optional[int] = setting(
        None, 'epoch at which the role starts to train; frozen until then, and its schedule counts from there', low=0,
        flag='', policy=True, otherwise=0)
    freeze_bn: Optional[bool] = setting(
        None, 'batch norms stay fixed though the role trains (default: false)', flag='')
    schedule: Optional[dict[str, Any]] = setting(None, "what differs from the Plan's schedule", flag='')

    def __post_init__(self):
        check_fields(self, 'role')
        if isinstance(self.train, str) and self.train not in ('all', 'none', 'random'):
            raise UserError(
                f'role: train must be "all", "none", "random" or a list of blocks or layers, not {self.train!r}')
        if isinstance(self.l2sp_blocks, str) and self.l2sp_blocks != 'all':
            raise UserError(f'role: l2sp_blocks must be a number of blocks or "all", not {self.l2sp_blocks!r}')
        if self.schedule is not None:
            check_names(self.schedule, Schedule, 'role.schedule')
            Schedule(**self.schedule)

    def merged(self, other: 'RolePlan') -> 'RolePlan':
        """This role's settings with every field that `other` sets taken from `other`."""
        theirs = {name: value for name, value in vars(other).items() if value is not None}
        if other.schedule is not None:
            theirs['schedule'] = {**(self.schedule or {}), **other.schedule}
        return dataclasses.replace(self, **theirs)


@dataclass
class Plan(Named):
    """How a model is fine-tuned: what is common, and what differs by role.

    Keys of `roles` are the roles of the model (`branch.0`, `branch.1`, `policy`, `head`; `backbone` and `head` for a
    plain timm model), or a kind (`branch`) that stands for all roles `branch.*`; the exact name wins field by field.
    """
    lr: float = setting(
        0.01, 'learning rate; in a run that names none, --lr-base scaled with the batch', low=0, flag='')
    epochs: int = setting(300, 'number of epochs of the schedule', low=0)
    opt: str = setting('sgd', 'optimiser, any of timm.optim.list_optimizers()')
    momentum: float = setting(0.9, 'momentum of the optimiser', low=0, high=1)
    weight_decay: float = setting(2e-5, 'weight decay', low=0)
    weight_decay_exclude_1d: bool = setting(True, 'no weight decay on biases and norms', flag='')
    layer_decay: Optional[float] = setting(None, 'factor on the LR from each layer to the one below', low=0, high=1)
    layer_decay_min_scale: float = setting(0., 'least factor that layer_decay may reach', low=0, high=1)
    layer_decay_no_opt_scale: Optional[float] = setting(None, 'factor below which a layer is not trained at all')
    norms: str = setting(
        'train', 'batch norms of every role that does not say otherwise: train, or frozen at their pretrained '
        'statistics and weights', choices=('train', 'frozen'))
    opt_eps: Optional[float] = setting(None, "epsilon of the optimiser (default: the optimiser's)", low=0)
    opt_betas: Optional[list[float]] = setting(None, "betas of the optimiser (default: the optimiser's)")
    opt_kwargs: dict[str, Any] = setting({}, "arguments for the optimiser's constructor")
    schedule: Schedule = setting(Schedule, 'the schedule of every role that has none of its own', flag='')
    sched_on_updates: bool = setting(False, 'step the schedule at every update instead of every epoch')
    temperature: Optional[float] = setting(
        None, "temperature of a SpotTune's policy (default: the model's, 5)", above=0)
    temperature_end: Optional[float] = setting(
        None, 'temperature of the last epoch, reached by equal factors (default: as the first)', above=0)
    global_k: Optional[int] = setting(
        None, 'a SpotTune learns this many blocks to tune for all images alike (default: any)', low=0)
    global_k_weights: list[float] = setting([3., 3.], 'lambda 1 and 2 of its losses', low=0, nargs=2)
    global_k_window: int = setting(100, 'images over which its shares are counted', above=0)
    roles: dict[str, RolePlan] = setting({}, 'settings by role', flag='')

    def __post_init__(self):
        self.schedule = build(Schedule, self.schedule, 'plan.schedule')
        if not isinstance(self.roles, Mapping):
            raise UserError(f'plan.roles must be a mapping of role to settings, not {self.roles!r}')
        self.roles = {str(k): build(RolePlan, v, f'plan.roles.{k}') for k, v in self.roles.items()}
        check_fields(self, 'plan')
        if len(self.global_k_weights) != 2:
            raise UserError(f'plan: global_k_weights must be two values of 0 or more, not {self.global_k_weights}')
        if self.temperature_end is not None and self.temperature is None:
            raise UserError('plan: temperature_end needs a temperature to start from; set temperature')

    def role(self, name: str, defaults: Optional[Mapping[str, Mapping[str, Any]]] = None) -> RolePlan:
        """The settings of one role with every field filled in.

        Args:
            name: The role.
            defaults: A model's own settings by role or kind (`role_defaults`). What is later in this order wins, field
                by field: the package's defaults, the Plan's common values, these, then the Plan's for the kind of the
                role and for the role itself.
        """
        merged = RolePlan(
            lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay,
            freeze_bn=self.norms == 'frozen', schedule={},
            **{f.name: f.metadata['otherwise'] for f in dataclasses.fields(RolePlan) if 'otherwise' in f.metadata})
        keys = tuple(dict.fromkeys((name.split('.')[0], name)))
        for settings in (defaults or {}, self.roles):
            for key in keys:
                if key in settings:
                    merged = merged.merged(build(RolePlan, settings[key], f'role_defaults.{key}'))
        return merged

    def complete_schedule(self, changes: Optional[Mapping[str, Any]] = None) -> Schedule:
        """The Plan's schedule with some fields changed and timm's absolute start of the warm-up as a fraction."""
        schedule = dataclasses.replace(self.schedule, **(changes or {}))
        if schedule.warmup_scale is None:
            schedule.warmup_scale = min(1., _TIMM_WARMUP_LR / self.lr) if self.lr else 0.
        return schedule

    def temperature_at(self, epoch: int) -> Optional[float]:
        """The temperature of an epoch, from 0; None leaves the model its own."""
        if self.temperature is None or self.temperature_end is None:
            return self.temperature
        progress = min(1., epoch / max(self.epochs - 1, 1))
        return self.temperature * (self.temperature_end / self.temperature) ** progress

    def with_role(self, name: str, **settings) -> 'Plan':
        """A copy of the Plan in which the role `name` has the given settings besides those that it had."""
        return self.updated({'roles': {name: settings}})

    def updated(self, mapping: Mapping[str, Any]) -> 'Plan':
        """A copy with the settings of a mapping (the `plan:` section of a recipe) laid over this Plan's."""
        check_names(mapping, Plan, 'plan')
        before = self.to_dict()
        values = {**before, **mapping}
        if isinstance(values['schedule'], Mapping):
            values['schedule'] = {**before['schedule'], **values['schedule']}
        if isinstance(values['roles'], Mapping):
            values['roles'] = {**copy.deepcopy(self.roles), **{
                name: self.roles.get(name, RolePlan()).merged(build(RolePlan, settings, f'plan.roles.{name}'))
                for name, settings in values['roles'].items()}}
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
        """Build a Plan from plain data."""
        check_names(data, cls, 'plan')
        return cls(**data)

    def to_yaml(self, path: Union[str, Path]) -> None:
        """Write the Plan under the key `plan`, so that `train_amf.py --config` takes the file as it is."""
        write_text(path, yaml.safe_dump({'plan': self.to_dict()}, sort_keys=False))

    @classmethod
    def from_yaml(cls, path: Union[str, Path]) -> 'Plan':
        """Read a Plan from a file that holds it alone, or under the key `plan` of a recipe.

        A `plan.yaml` of a run has every common field, so that it means the same when defaults change.
        """
        data = load_yaml(path)
        try:
            return cls.from_dict(data.get('plan', data))
        except UserError as e:
            raise UserError(f'{path}: {e}') from None
