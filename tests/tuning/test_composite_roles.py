"""Composites whose roles are lists of modules and which say themselves how their roles are tuned."""
import pytest
import torch
from torch import nn

from timm_amf import Plan, UserError, apply_freeze, create_optimizer, param_groups
from timm_amf.tuning import GroupScheduler
from timm_amf.tuning.roles import places, role_blocks


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.bn(self.conv1(x)).relu())


class TwoPaths(nn.Module):
    """Every block exists twice, as in SpotTune; the token is a parameter of the model itself."""

    def __init__(self, blocks=4, width=4):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.conv = nn.Conv2d(3, width, 3)
        self.blocks_frozen = nn.ModuleList(Residual(width) for _ in range(blocks))
        self.blocks_tuned = nn.ModuleList(Residual(width) for _ in range(blocks))
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 2)

    @property
    def tuning_roles(self):
        return dict(
            stem=['token', 'conv'],
            frozen=[f'blocks_frozen.{i}' for i in range(4)],
            tuned=[*(f'blocks_tuned.{i}' for i in range(4)), 'norm'],
            head='fc',
        )

    @property
    def role_defaults(self):
        return dict(frozen=dict(train='none'), stem=dict(train='none'), tuned=dict(schedule=dict(sched='cosine')))

    def role_layers(self):
        return {n: 4 - int(n.split('.')[1]) for n, _ in self.named_parameters() if n.startswith('blocks_')}

    def forward(self, x):
        x = self.conv(x) + self.token
        for frozen, tuned in zip(self.blocks_frozen, self.blocks_tuned):
            x = 0.5 * frozen(x) + 0.5 * tuned(x)
        return self.fc(self.norm(x).mean((2, 3)))


def names(groups):
    return {n for g in groups for n in g['param_names']}


def lrs(groups):
    return {n: g['lr'] for g in groups for n in g['param_names']}


def test_the_paths_of_a_list_are_the_blocks():
    model = TwoPaths()
    assert role_blocks(model, 'tuned') == [f'blocks_tuned.{i}' for i in range(4)]
    where = places(model)
    assert where['blocks_tuned.2.bn.weight'].depth == 2 and where['blocks_tuned.2.bn.weight'].role == 'tuned'
    assert where['norm.weight'].block == 'tail' and where['token'].role == 'stem'


def test_the_models_defaults_lie_beneath_the_plan():
    model = TwoPaths()
    assert {n.split('.')[0] for n in names(param_groups(model, Plan()))} == {'blocks_tuned', 'norm', 'fc'}
    apply_freeze(model, Plan())
    model.train()
    assert not model.blocks_frozen[0].bn.training and model.blocks_tuned[0].bn.training
    assert not model.token.requires_grad and model.norm.weight.requires_grad

    over = Plan(roles=dict(frozen=dict(train=[1]), stem=dict(train='all')))
    found = {n for n in names(param_groups(model, over)) if n.startswith(('blocks_frozen', 'conv', 'token'))}
    assert {n.split('.')[1] for n in found if n.startswith('blocks_frozen')} == {'1'} and 'token' in found
    apply_freeze(model, over)
    model.train()
    assert model.blocks_frozen[1].bn.training and not model.blocks_frozen[0].bn.training

    # What is common is beneath the model, and a kind of the Plan above it.
    plan = Plan(lr=1., roles=dict(tuned=dict(weight_decay=0.5)))
    role = plan.role('tuned', dict(tuned=dict(lr=2., weight_decay=3.)))
    assert (role.lr, role.weight_decay) == (2., 0.5)
    assert Plan(roles=dict(branch=dict(lr=3.))).role('branch.1', {'branch.1': dict(lr=2.)}).lr == 3.


def test_a_model_may_set_a_schedule_which_the_plan_overrides():
    plan = Plan(lr=1., epochs=10, schedule=dict(sched='constant'))
    for roles, expected in (({}, 0.5), (dict(tuned=dict(schedule=dict(sched='constant'))), 1.)):
        optimizer = create_optimizer(TwoPaths(), plan.updated(dict(roles=roles)))
        GroupScheduler(optimizer, plan.updated(dict(roles=roles))).step(5)
        now = {g['role']: g['lr'] for g in optimizer.param_groups}
        assert now == pytest.approx(dict(tuned=expected, head=1.))


def test_a_wrong_default_names_itself():
    with pytest.raises(UserError, match='role_defaults.tuned.*lrr'):
        Plan().role('tuned', dict(tuned=dict(lrr=1.)))


def test_depth_on_a_list_of_paths():
    model = TwoPaths()
    slow = lrs(param_groups(model, Plan(lr=1., roles=dict(tuned=dict(low_blocks=3, low_lr_scale=0.1)))))
    assert all((lr == 0.1) == (n.startswith('blocks_tuned') and '.3.' not in n) for n, lr in slow.items())
    last = names(param_groups(model, Plan(roles=dict(tuned=dict(train=[-1, -2]), head=dict(train='none')))))
    assert {n[:14] for n in last} == {'blocks_tuned.2', 'blocks_tuned.3'}
    with pytest.raises(UserError, match='tuned is 5.* 4 blocks'):
        param_groups(model, Plan(roles=dict(tuned=dict(low_blocks=5))))


def test_layer_decay_by_the_models_own_layers():
    found = lrs(param_groups(TwoPaths(), Plan(lr=1., layer_decay=0.5)))
    for i in range(4):
        assert found[f'blocks_tuned.{i}.conv1.weight'] == 0.5 ** (4 - i)
    assert found['fc.weight'] == found['norm.weight'] == 1
