"""Frozen is frozen, weights and statistics, and thawed trains again."""
import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from timm_amf import Plan, apply_freeze, create_optimizer


def build(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(
        'amf', backbones=('test_resnet', 'test_resnet'), policy='test_resnet', num_classes=3, **kwargs)


def state(model, prefix):
    return {n: v.clone() for n, v in model.state_dict().items() if n.startswith(prefix)}


def train_steps(model, optimizer, steps=2):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 64, 64, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()


def equal(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def test_a_frozen_branch_keeps_weights_and_statistics_through_train_calls():
    model = build()
    plan = Plan(lr=0.1, roles={'branch.0': dict(train='none')})
    optimizer = create_optimizer(model, plan)
    assert apply_freeze(model, plan)
    model.eval()
    model.train()
    before = {p: state(model, p) for p in ('branches.0', 'branches.1', 'policy')}
    train_steps(model, optimizer)
    assert equal(before['branches.0'], state(model, 'branches.0'))
    assert not equal(before['branches.1'], state(model, 'branches.1'))
    mean = 'policy.net.bn1.running_mean'
    assert not torch.equal(before['policy'][mean], model.state_dict()[mean])
    assert not apply_freeze(model, plan), 'a second call changes nothing'


def test_only_the_listed_blocks_norms_move():
    model = build()
    plan = Plan(lr=0.1, roles={'branch.0': dict(train=[-1])})
    optimizer = create_optimizer(model, plan)
    apply_freeze(model, plan)
    model.train()
    before = state(model, 'branches.0')
    train_steps(model, optimizer)
    after = state(model, 'branches.0')
    last = [n for n in after if n.startswith('branches.0.layer4.0.')]
    assert last and all(not torch.equal(before[n], after[n]) for n in last)
    assert all(torch.equal(before[n], after[n]) for n in after if n not in last)


def test_freeze_bn_of_a_role_that_trains():
    model = build()
    plan = Plan(lr=0.1, roles={'branch.0': dict(freeze_bn=True)})
    optimizer = create_optimizer(model, plan)
    apply_freeze(model, plan)
    model.train()
    before = state(model, 'branches.0')
    train_steps(model, optimizer)
    after = state(model, 'branches.0')
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name in after:
        moved = not torch.equal(before[name], after[name])
        assert moved != (name.rsplit('.', 1)[0] in norms), name


def test_norms_without_affine_parameters_follow_their_block():
    model = build()
    model.branches[0].layer4[0].bn1 = nn.BatchNorm2d(model.branches[0].layer4[0].bn1.num_features, affine=False)
    model.branches[0].layer1[0].bn1 = nn.BatchNorm2d(model.branches[0].layer1[0].bn1.num_features, affine=False)
    apply_freeze(model, Plan(roles={'branch.0': dict(train=[-1])}))
    model.train()
    assert model.branches[0].layer4[0].bn1.training and not model.branches[0].layer1[0].bn1.training


def test_a_norm_that_is_unfrozen_is_in_the_mode_of_its_model():
    model, plan = build().train(), Plan(roles={'branch.0': dict(start_epoch=1)})
    norm = model.branches[0].layer1[0].bn1
    apply_freeze(model, plan, 0)
    model.train()
    assert not norm.training
    apply_freeze(model, plan, 1)
    assert norm.training
    apply_freeze(model.eval(), plan, 0)
    apply_freeze(model, plan, 1)
    assert not norm.training


def test_unfreezing_later_trains_with_fresh_momentum_and_nothing_else_changes():
    """A role that starts at epoch 1 trains from then on exactly as one that an optimiser first meets then."""
    plan = Plan(lr=0.1, roles=dict(policy=dict(start_epoch=1)))
    model = build()
    optimizer = create_optimizer(model, plan)
    apply_freeze(model, plan, 0)
    model.train()
    before = state(model, 'policy')
    train_steps(model, optimizer)
    assert equal(before, state(model, 'policy'))

    # Reference: rebuild from here, hand over the momentum of the others, let everything train.
    reference = copy.deepcopy(model)
    everything = Plan(lr=0.1)
    apply_freeze(reference, everything)
    reference.train()
    other = create_optimizer(reference, everything)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        if a in optimizer.state:
            other.state[b] = copy.deepcopy(optimizer.state[a])

    assert apply_freeze(model, plan, 1)
    model.train()
    train_steps(model, optimizer)
    train_steps(reference, other)
    assert not equal(before, state(model, 'policy'))
    assert equal(state(model, ''), state(reference, ''))


def test_survives_deepcopy_and_pickle():
    model = build()
    apply_freeze(model, Plan(roles={'branch.0': dict(train='none')}))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.train()
        norms = [m for m in copied.branches[0].modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and not any(m.training for m in norms)
        norms[0].train(True)
        assert not norms[0].training, 'the method is bound to the copy'
        assert all(m.training for m in copied.branches[1].modules() if isinstance(m, nn.BatchNorm2d))


def test_a_checkpoint_of_a_frozen_model_has_no_other_keys():
    model = build()
    keys = set(model.state_dict())
    apply_freeze(model, Plan(roles=dict(branch=dict(train='none'))))
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'mobilenetv3_small_050', 'efficientnet_b0'])
def test_plain_models(name):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=4)
    apply_freeze(model, Plan(roles=dict(backbone=dict(train='none'))))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {id(p) for p in model.get_classifier().parameters()}
    assert trains == {n for n, p in model.named_parameters() if id(p) in head}
