"""Group schedules against closed forms and against timm's schedulers on absolute LRs."""
import math

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from timm_amf import GroupScheduler, Plan, Schedule, UserError, lr_scheduler


def optimizer_for(*roles, start=None):
    """One group of one parameter a role: (role, lr)."""
    start = start or {}
    return torch.optim.SGD([
        dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=lr, role=role, start_epoch=start.get(role, 0))
        for role, lr in roles
    ], lr=1.)


def course(scheduler, epochs, metrics=None):
    """The LRs of every group in each epoch, the way the train loop steps."""
    lrs = []
    for epoch in range(epochs):
        lrs.append([g['lr'] for g in scheduler.optimizer.param_groups])
        scheduler.step(epoch + 1, None if metrics is None else metrics[epoch])
    return lrs


def test_step_decay_of_the_paper_in_closed_form():
    plan = Plan(epochs=100, schedule=Schedule(sched='step', warmup_epochs=0, decay_rate=0.94, decay_epochs=20))
    scheduler = GroupScheduler(optimizer_for(('branch.0', 3e-5), ('branch.1', 0.03)), plan)
    for epoch, lrs in enumerate(course(scheduler, 100)):
        assert lrs == pytest.approx([lr * 0.94 ** (epoch // 20) for lr in (3e-5, 0.03)], rel=1e-12)


def test_cosine_with_warm_up_and_minimum_in_closed_form():
    schedule = Schedule(sched='cosine', warmup_epochs=4, warmup_scale=0.1, min_scale=0.01)
    plan = Plan(epochs=20, schedule=schedule)
    lrs = course(GroupScheduler(optimizer_for(('head', 3e-5), ('policy', 0.03)), plan), 20)
    for t, row in enumerate(lrs):
        warm = 0.1 + 0.9 * t / 4
        cosine = 0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * t / 20))
        assert row == pytest.approx([lr * (warm if t < 4 else cosine) for lr in (3e-5, 0.03)], rel=1e-12)


@pytest.mark.parametrize('on_updates', [False, True])
@pytest.mark.parametrize('schedule', [
    dict(sched='cosine', cycle_limit=2, cycle_mul=2., cycle_decay=0.5),
    dict(sched='cosine', warmup_prefix=True, cooldown_epochs=3),
    dict(sched='cosine', noise=[0.2, 0.8]),
    dict(sched='tanh'),
    dict(sched='poly', decay_rate=0.9),
    dict(sched='multistep', decay_milestones=[3, 7], decay_rate=0.1),
    dict(sched='step', decay_epochs=2.5),
    dict(sched='constant'),
    dict(sched='wsd', decay_epochs=4),
    dict(sched='rsqrt', decay_epochs=3, stable_timescale=2),
])
def test_equals_timm_on_absolute_lrs(schedule, on_updates):
    lr, epochs, updates = 0.02, 12, 5
    plan = Plan(
        epochs=epochs, sched_on_updates=on_updates,
        schedule=Schedule(**schedule, warmup_epochs=2, warmup_scale=0.25, min_scale=0.05))
    ours = GroupScheduler(optimizer_for(('backbone', lr)), plan, updates)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    kwargs = {k: v for k, v in vars(plan.schedule).items() if k not in ('warmup_scale', 'min_scale', 'hold_epochs')}
    timms, total = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_lr=0.25 * lr, min_lr=0.05 * lr, step_on_epochs=not on_updates,
        updates_per_epoch=updates, **{**kwargs, 'warmup_epochs': 2})
    assert ours.total_epochs == total
    for t in range(1, total * (updates if on_updates else 1)):
        if on_updates:
            ours.step_update(t)
            timms.step_update(t)
        else:
            ours.step(t)
            timms.step(t)
        assert ours.optimizer.param_groups[0]['lr'] == pytest.approx(optimizer.param_groups[0]['lr'], rel=1e-9), t


def test_the_policys_own_schedule():
    """Frozen for 3 epochs, 2 of warm-up, 4 held, then step decay; the others decay from the start."""
    plan = Plan(
        epochs=20,
        schedule=Schedule(sched='step', warmup_epochs=0, decay_rate=0.5, decay_epochs=5),
        roles=dict(policy=dict(
            start_epoch=3,
            schedule=dict(warmup_epochs=2, warmup_scale=0, hold_epochs=4, decay_rate=0.1, decay_epochs=2))),
    )
    lrs = course(GroupScheduler(optimizer_for(('branch.0', 1.), ('policy', 2.), start=dict(policy=3)), plan), 20)
    assert [row[0] for row in lrs] == pytest.approx([0.5 ** (t // 5) for t in range(20)])

    def policy(t):
        t -= 3
        if t < 0:
            return 0.
        if t < 2:
            return 2. * t / 2
        return 2. if t < 6 else 2. * 0.1 ** ((t - 4) // 2)

    assert [row[1] for row in lrs] == pytest.approx([policy(t) for t in range(20)])


def test_groups_of_one_role_keep_their_ratio():
    plan = Plan(epochs=10, schedule=Schedule(sched='cosine', warmup_epochs=2, warmup_scale=0.01))
    for a, b in course(GroupScheduler(optimizer_for(('branch.0', 0.4), ('branch.0', 1.)), plan), 10):
        assert a == pytest.approx(0.4 * b)


def test_plateau_decays_on_its_metric_and_its_state_is_restored():
    plan = Plan(epochs=40, schedule=Schedule(sched='plateau', warmup_epochs=0, patience_epochs=2, decay_rate=0.1))
    metrics = [10, 20, 30, 30, 30, 30, 30, 30, 31, 30, 30, 30, 30, 30, 30, 30]
    whole = course(GroupScheduler(optimizer_for(('head', 0.5)), plan), 16, metrics)
    assert len({row[0] for row in whole}) >= 3

    first = GroupScheduler(optimizer_for(('head', 0.5)), plan)
    half = course(first, 7, metrics)
    second = GroupScheduler(optimizer_for(('head', 0.5)), plan)
    second.load_state_dict(first.state_dict())
    second.step(7)
    rest = []
    for epoch in range(7, 16):
        rest.append([g['lr'] for g in second.optimizer.param_groups])
        second.step(epoch + 1, metrics[epoch])
    assert half + rest == whole


def test_a_schedule_that_cannot_be():
    with pytest.raises(UserError, match='wsd'):
        GroupScheduler(optimizer_for(('head', 1.)), Plan(epochs=5, schedule=Schedule(sched='wsd', decay_epochs=50)))


@pytest.mark.parametrize('given, epochs, warmup', [(None, 300, 5), (None, 20, 2), (None, 5, 0.5), (4, 20, 4)])
def test_a_warm_up_counts_updates_and_is_a_tenth_of_the_run_at_most(given, epochs, warmup):
    """Linear over its updates; where it ends, the LRs are timm's again, which change once an epoch."""
    plan = Plan(epochs=epochs, schedule=Schedule(sched='cosine', warmup_epochs=given, warmup_scale=0.1))
    scheduler = GroupScheduler(optimizer_for(('head', 0.02)), plan, updates_per_epoch=4)
    group, updates = scheduler.optimizer.param_groups[0], 0
    for epoch in range(epochs):
        for _ in range(4):
            scheduler.step_update(updates)
            done = updates / 4
            t = done if epoch < warmup else epoch
            wanted = 0.1 + 0.9 * done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * t / epochs))
            assert group['lr'] == pytest.approx(0.02 * wanted, rel=1e-12), (epoch, updates)
            updates += 1
        scheduler.step(epoch + 1)


@pytest.mark.parametrize('on_updates', [False, True])
@pytest.mark.parametrize('sched', ['cosine', 'step', 'multistep'])
def test_torchs_form_has_the_lrs_of_the_train_loop(sched, on_updates):
    updates = 5
    plan = Plan(
        epochs=8, sched_on_updates=on_updates, roles={'policy': dict(lr=1., schedule=dict(warmup_epochs=0))},
        schedule=Schedule(sched=sched, warmup_epochs=2, decay_epochs=3, decay_milestones=[2, 5]))
    optimizers = [optimizer_for(('head', 0.02), ('policy', 0.5), start={'policy': 3}) for _ in range(2)]
    loop, ours = GroupScheduler(optimizers[0], plan, updates), lr_scheduler(optimizers[1], plan, updates)
    seen = set()
    for epoch in range(8):
        for i in range(updates):
            loop.step_update(epoch * updates + i)
            lrs, found = ([g['lr'] for g in optimizer.param_groups] for optimizer in optimizers)
            assert found == pytest.approx(lrs, rel=1e-12), (epoch, i)
            seen.add(tuple(lrs))
            optimizers[1].step()
            ours.step()
        loop.step(epoch + 1)
    assert len(seen) > 3
    again = lr_scheduler(optimizer_for(('head', 0.02), ('policy', 0.5), start={'policy': 3}), plan, updates)
    again.load_state_dict(ours.state_dict())
    assert again.get_last_lr() == ours.get_last_lr()


def test_torchs_form_has_no_metric():
    plan = Plan(epochs=8, schedule=Schedule(sched='plateau'))
    with pytest.raises(UserError, match='plateau'):
        lr_scheduler(optimizer_for(('head', 0.02)), plan, 5)
