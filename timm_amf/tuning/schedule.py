"""One LR schedule for each parameter group, all of them timm's."""
import copy
import dataclasses
import math
import warnings
from typing import Any, Optional

import torch
from timm.scheduler import create_scheduler_v2
from torch.optim.lr_scheduler import LambdaLR

from timm_amf.errors import UserError
from timm_amf.tuning.plan import Plan, Schedule

__all__ = ['GroupScheduler', 'lr_scheduler']


class _Shape:
    """One timm scheduler over a single group of LR 1: its value is the fraction of the LR at a time."""

    def __init__(self, schedule: Schedule, start_epoch: int, plan: Plan, updates_per_epoch: int, plateau_mode: str):
        if schedule.warmup_epochs is None:
            schedule = dataclasses.replace(schedule, warmup_epochs=min(5, plan.epochs / 10))
        self.on_updates = plan.sched_on_updates
        unit = updates_per_epoch if self.on_updates else 1
        self.start, self.warmup = start_epoch * unit, schedule.warmup_epochs * unit
        self.hold = round(schedule.hold_epochs * unit)  # timm's noise wants whole times
        self.is_plateau, self.noisy = schedule.sched == 'plateau', schedule.noise is not None
        before = start_epoch + int(schedule.hold_epochs)
        self._proxy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.)
        try:
            with warnings.catch_warnings():
                # timm deprecates plateau for its state, which is saved here.
                warnings.simplefilter('ignore', FutureWarning)
                self._scheduler, total = create_scheduler_v2(
                    self._proxy,
                    **_timm_kwargs(schedule),
                    num_epochs=max(1, plan.epochs - before),
                    plateau_mode=plateau_mode,
                    step_on_epochs=not self.on_updates,
                    updates_per_epoch=updates_per_epoch,
                )
            self.total_epochs = math.ceil(total + before)
        except (ArithmeticError, AssertionError, ValueError) as e:
            raise UserError(f'schedule {schedule.sched!r} cannot be made: {e}') from None

    def factor(self, t: float, metric: Optional[float] = None) -> float:
        """The fraction of the LR at time t, in epochs or updates."""
        t -= self.start
        if t < 0:
            return 0.
        if self.warmup <= t < self.warmup + self.hold:
            return 1.
        if t >= self.warmup + self.hold:
            t -= self.hold
        if self.on_updates:
            self._scheduler.step_update(t)
        elif not (self.is_plateau and t == 0):  # timm's plateau takes any step as the end of an epoch
            self._scheduler.step(t, metric)
        return self._proxy.param_groups[0]['lr']

    def warms_up(self, epoch: float) -> bool:
        """Whether an epoch, given with its fraction, is one of those in which the LR rises with each update."""
        return self.start <= epoch < self.start + math.ceil(self.warmup) and not (self.is_plateau or self.noisy)

    def state_dict(self) -> dict[str, Any]:
        if not self.is_plateau:
            return {}  # a pure function of time
        return dict(
            lr=self._proxy.param_groups[0]['lr'],
            restore_lr=self._scheduler.restore_lr,
            plateau=copy.deepcopy(self._scheduler.lr_scheduler.state_dict()),
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.is_plateau and state:
            _check_like(state, self.state_dict(), 'schedule')
            self._proxy.param_groups[0]['lr'] = state['lr']
            self._scheduler.restore_lr = state['restore_lr']
            self._scheduler.lr_scheduler.load_state_dict(state['plateau'])


def _check_like(value: Any, ours: Any, name: str) -> None:
    """Refuse a state whose values are not of the kinds of ours."""
    if isinstance(ours, dict) and isinstance(value, dict):
        for key, item in ours.items():
            _check_like(value[key], item, f'{name}.{key}')
    elif isinstance(ours, list) and isinstance(value, list) and len(value) == len(ours):
        for mine, theirs in zip(ours, value):
            _check_like(theirs, mine, name)
    else:
        number = isinstance(value, (int, float)) and isinstance(ours, (int, float, type(None)))
        if not number and type(value) is not type(ours):
            raise ValueError(f'{name} must be like {ours!r}')


def _timm_kwargs(schedule: Schedule) -> dict[str, Any]:
    kwargs = {k: v for k, v in vars(schedule).items() if k not in ('warmup_scale', 'min_scale', 'hold_epochs')}
    # timm's counts of epochs become floats with a float here.
    kwargs['warmup_epochs'] = int(schedule.warmup_epochs) if schedule.warmup_epochs % 1 == 0 else schedule.warmup_epochs
    return dict(kwargs, warmup_lr=schedule.warmup_scale, min_lr=schedule.min_scale)


class GroupScheduler:
    """Sets the LR of every parameter group of an optimiser to its own LR times its own schedule.

    Each group's `role` picks its schedule from the Plan, and its `start_epoch` the time from which that counts (LR 0
    before it). Values are timm's, computed on fractions: warm-up and minimum are fractions of the group's own LR,
    where a plain timm scheduler shares the absolute ones between all groups.

    Args:
        optimizer: Optimiser over the groups of `timm_amf.param_groups`.
        plan: The Plan of the groups.
        updates_per_epoch: Optimiser updates an epoch; needed for `step_update`.
        plateau_mode: `max` or `min`: the direction in which the metric of `plateau` improves.

    Attributes:
        total_epochs: Epochs to train: the Plan's, with warm-up prefix, cycles and cool-down, as timm counts them.
    """

    def __init__(
            self,
            optimizer: torch.optim.Optimizer,
            plan: Plan,
            updates_per_epoch: int = 1,
            plateau_mode: str = 'max',
    ):
        self.optimizer = optimizer
        self.on_updates, self.updates_per_epoch = plan.sched_on_updates, updates_per_epoch
        self._shapes: dict[str, _Shape] = {}
        self._keys = [f'{group["role"]}@{group["start_epoch"]}' for group in optimizer.param_groups]
        for group, key in zip(optimizer.param_groups, self._keys):
            if key not in self._shapes:
                # The group's own, since the model may have a say in it (`role_defaults`).
                own = group.get('schedule')
                schedule = plan.complete_schedule(plan.role(group['role']).schedule if own is None else own)
                self._shapes[key] = _Shape(schedule, group['start_epoch'], plan, updates_per_epoch, plateau_mode)
        self._lrs = [group.get('initial_lr', group['lr']) for group in optimizer.param_groups]
        self.total_epochs = max(shape.total_epochs for shape in self._shapes.values()) if plan.epochs else 0
        self._set(0)

    def step(self, epoch: int, metric: Optional[float] = None) -> None:
        """Set the LRs of an epoch.

        Args:
            epoch: The epoch about to run, from 0: the number of epochs that have ended.
            metric: The metric of the epoch that ended, for `plateau`.
        """
        if not self.on_updates:
            self._set(epoch, metric)

    def step_update(self, num_updates: int) -> None:
        """Set the LRs of an update: of all groups if the Plan steps on updates, else of those that warm up.

        Args:
            num_updates: The number of updates done.
        """
        if self.on_updates:
            self._set(num_updates)
            return
        epoch = num_updates / self.updates_per_epoch
        for group, key, lr in zip(self.optimizer.param_groups, self._keys, self._lrs):
            if self._shapes[key].warms_up(epoch):
                group['lr'] = lr * self._shapes[key].factor(epoch)

    def factor(self, group: int, num_updates: int) -> float:
        """The fraction of a group's LR after a number of updates: what `step` and `step_update` together set."""
        shape, epoch = self._shapes[self._keys[group]], num_updates / self.updates_per_epoch
        if shape.is_plateau:
            raise UserError('schedule plateau: follows a metric, not the updates; use GroupScheduler')
        return shape.factor(num_updates if self.on_updates else epoch if shape.warms_up(epoch) else int(epoch))

    def _set(self, t: float, metric: Optional[float] = None) -> None:
        try:
            factors = {key: shape.factor(t, metric) for key, shape in self._shapes.items()}
        except ArithmeticError as e:
            raise UserError(f'schedule: has no value at {t:g} ({e}); its settings are too extreme') from None
        # The Plan's LRs, also after an optimiser's state of an older Plan was loaded.
        for group, key, lr in zip(self.optimizer.param_groups, self._keys, self._lrs):
            group['initial_lr'], group['lr'] = lr, lr * factors[key]

    def state_dict(self) -> dict[str, Any]:
        """The state that time alone does not give (that of `plateau`)."""
        return {key: shape.state_dict() for key, shape in self._shapes.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        for key, shape in self._shapes.items():
            shape.load_state_dict(state.get(key, {}))


def lr_scheduler(optimizer: torch.optim.Optimizer, plan: Plan, updates_per_epoch: int) -> LambdaLR:
    """The schedules of all parameter groups as one of torch's schedulers, for trainers that take such a one.

    Args:
        optimizer: Optimiser over the groups of `timm_amf.param_groups`.
        plan: The Plan of the groups.
        updates_per_epoch: Optimiser updates an epoch.

    Returns:
        A scheduler to `step()` after each update of the optimiser; the LRs are those of `GroupScheduler`.

    Raises:
        UserError: If a schedule is `plateau`, which follows a metric.
    """
    groups = GroupScheduler(optimizer, plan, updates_per_epoch)
    return LambdaLR(optimizer, [
        lambda updates, group=i: groups.factor(group, updates) for i in range(len(optimizer.param_groups))])
