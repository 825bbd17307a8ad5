"""Parameter groups against timm's own, and against the Plan's words taken literally."""
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

import timm_amf
from timm_amf import Plan, UserError, param_groups
from timm_amf.tuning.roles import model_roles, places, role_blocks

PLAIN = ['resnet18', 'mobilenetv2_100', 'vit_tiny_patch16_224', 'convnext_atto', 'swin_tiny_patch4_window7_224']


def build(name, **kwargs):
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


def by_param(model, groups, key='lr'):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: g[key] for g in groups for p in g['params']}


@pytest.fixture(scope='module')
def amf():
    return build('amf', backbones=('resnet18', 'mobilenetv2_100'), policy='resnet10t', num_classes=7)


@pytest.mark.parametrize('name', PLAIN)
def test_plain_plan_gives_timms_groups(name):
    model = build(name, num_classes=5)
    ours = param_groups(model, Plan(lr=0.1, weight_decay=0.05))
    exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt)
    assert by_param(model, ours, 'weight_decay') == by_param(model, theirs, 'weight_decay')
    assert set(by_param(model, ours).values()) == {0.1}


@pytest.mark.parametrize('name', PLAIN)
def test_layer_decay_is_timms(name):
    model = build(name, num_classes=5)
    ours = by_param(model, param_groups(model, Plan(lr=2., layer_decay=0.7, layer_decay_min_scale=0.05)))
    theirs = by_param(model, param_groups_layer_decay(model, layer_decay=0.7, min_scale=0.05), 'lr_scale')
    assert ours == pytest.approx({n: 2. * s for n, s in theirs.items()})


def test_layer_decay_of_a_branch_is_that_of_the_whole_model(amf):
    ours = by_param(amf, param_groups(amf, Plan(lr=1., layer_decay=0.7)))
    plain = build('resnet18', num_classes=5)
    theirs = by_param(plain, param_groups_layer_decay(plain, layer_decay=0.7), 'lr_scale')
    assert {n: lr for n, lr in ours.items() if n.startswith('branches.0.')} == pytest.approx(
        {f'branches.0.{n}': s for n, s in theirs.items() if not n.startswith('fc.')})
    assert ours['fc.weight'] == 1


def test_every_parameter_is_in_one_group_and_has_its_roles_lr(amf):
    plan = Plan(lr=1., roles={
        'branch.0': dict(lr=2.), 'branch.1': dict(lr=3.), 'policy': dict(lr=4.), 'head': dict(lr=5.),
    })
    lrs = by_param(amf, param_groups(amf, plan))
    assert len(lrs) == len(list(amf.parameters()))
    expected = {'branches.0': 2., 'branches.1': 3., 'policy': 4., 'fc': 5.}
    for name, lr in lrs.items():
        assert lr == next(v for prefix, v in expected.items() if name.startswith(f'{prefix}.')), name


def test_the_papers_low_blocks():
    """AMF, section IV-B1: the LR of the first 8 layers of Inception-v4 is reduced by 60 %."""
    model = build('inception_v4', num_classes=5)
    lrs = by_param(model, param_groups(model, Plan(lr=1., roles=dict(backbone=dict(low_blocks=8)))))
    for name, lr in lrs.items():
        parts = name.split('.')
        low = parts[0] == 'features' and int(parts[1]) < 8
        assert lr == (0.4 if low else 1.), name
    assert {parts.split('.')[1] for parts, lr in lrs.items() if lr == 0.4} == {str(i) for i in range(8)}


def test_low_blocks_take_the_stem_with_them():
    model = build('resnet18', num_classes=5)
    lrs = by_param(model, param_groups(model, Plan(lr=1., roles=dict(backbone=dict(low_blocks=2, low_lr_scale=0.1)))))
    low = ('conv1.', 'bn1.', 'layer1.0.', 'layer1.1.')
    assert all((lr == pytest.approx(0.1)) == name.startswith(low) for name, lr in lrs.items())


def test_what_lies_between_blocks_goes_with_the_one_that_follows():
    model = build('convnext_atto', num_classes=5)
    where = places(model)
    blocks = role_blocks(model, 'backbone')
    first_of_stage_1 = blocks.index('stages.1.blocks.0')
    assert where['stages.1.downsample.1.weight'].depth == first_of_stage_1
    assert where['stem.0.weight'].depth == 0 and where['stem.0.weight'].block == 'stem'
    assert where['head.norm.weight'].block == 'tail'


def test_train_picks_blocks(amf):
    plan = Plan(roles={
        'branch.0': dict(train=[-1, 'layer1.0', 'stem']),
        'branch.1': dict(train='none'),
        'policy': dict(train=['tail']),
    })
    names = set(by_param(amf, param_groups(amf, plan)))
    assert {n for n in names if n.startswith('branches.0')} == {
        n for n, _ in amf.named_parameters()
        if n.startswith(('branches.0.layer4.1.', 'branches.0.layer1.0.', 'branches.0.conv1.', 'branches.0.bn1.'))}
    assert not any(n.startswith('branches.1') for n in names)
    assert {n for n in names if n.startswith('policy')} == {'policy.net.fc.weight', 'policy.net.fc.bias'}


def test_freeze_bn_takes_the_norms_affine_parameters_out(amf):
    names = set(by_param(amf, param_groups(amf, Plan(roles={'branch.0': dict(freeze_bn=True)}))))
    assert 'branches.0.bn1.weight' not in names and 'branches.0.conv1.weight' in names
    assert 'branches.1.bn1.weight' in names


def test_late_roles_are_in_the_optimiser_from_the_start(amf):
    groups = param_groups(amf, Plan(roles=dict(policy=dict(start_epoch=4))))
    assert {g['start_epoch'] for g in groups if g['role'] == 'policy'} == {4}
    assert len(by_param(amf, groups)) == len(list(amf.parameters()))


@pytest.mark.parametrize('roles, words', [
    (dict(brunch={}), ['brunch', 'branch']),
    (dict(backbone={}), ['backbone', 'branch.0']),
    ({'branch.0': dict(low_blocks=99)}, ['branch.0', '99', '8 blocks']),
    ({'branch.0': dict(train=[8])}, ['8', 'branch.0']),
    ({'branch.0': dict(train=['layer9.0'])}, ['layer9.0']),
    (dict(branch=dict(train='none'), policy=dict(train='none'), head=dict(train='none')), ['nothing trains']),
])
def test_a_plan_that_does_not_fit_is_refused(amf, roles, words):
    with pytest.raises(UserError) as error:
        param_groups(amf, Plan(roles=roles))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_groups_train_each_parameter_at_its_lr():
    """One step of plain SGD moves each parameter by its LR times its gradient."""
    model = timm.create_model('amf', backbones=('test_resnet', 'test_resnet'), policy='test_resnet', num_classes=3)
    plan = Plan(lr=0.5, momentum=0., weight_decay=0., roles={
        'branch.0': dict(lr=0.25, low_blocks=1), 'policy': dict(lr=0.125),
    })
    groups = param_groups(model, plan)
    lrs = by_param(model, groups)
    optimizer = create_optimizer_v2(groups, opt='momentum', lr=plan.lr, momentum=0., weight_decay=0.)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - lrs[name] * p.grad, msg=name)


def test_roles_of_plain_models():
    assert model_roles(build('resnet18')) == {'backbone': [''], 'head': ['fc']}
    assert model_roles(build('resnet18', num_classes=0)) == {'backbone': ['']}
    assert model_roles(build('deit_tiny_distilled_patch16_224'))['head'] == ['head', 'head_dist']


def test_public_names():
    assert timm_amf.param_groups is param_groups
    for name in timm_amf.__all__:
        assert getattr(timm_amf, name) is not None
