"""`train` names single layers: these train, with all that is in them, and nothing else of their block."""
import pytest
import timm
import torch
from torch import nn

from timm_amf import Plan, UserError, apply_freeze, create_optimizer, param_groups
from timm_amf.tuning import describe_groups
from timm_amf.tuning.resolve import resolve


def build(name='test_resnet', **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs)


@pytest.fixture(scope='module')
def amf():
    return build('amf', backbones=('test_resnet', 'test_resnet'), policy='test_resnet')


def trained(model, role, train, **others):
    """Names that train without the head, by the Plan and by `apply_freeze` alike."""
    plan = Plan(roles={role: dict(train=train, **others)})
    by_plan = {n for n, s in resolve(model, plan).parameters.items() if s.trains}
    apply_freeze(model, plan)
    assert by_plan == {n for n, p in model.named_parameters() if p.requires_grad}
    assert by_plan == {n for g in param_groups(model, plan) for n in g['param_names']}
    return by_plan - {'fc.weight', 'fc.bias'}


def of_branch(names, branch):
    return {n for n in names if n.startswith(f'branches.{branch}.')}


def test_only_the_layer_trains():
    model = build()
    assert trained(model, 'backbone', ['layer2.0.conv1']) == {'layer2.0.conv1.weight'}
    assert trained(model, 'backbone', ['layer2.0.conv1', 'layer2.0.bn2', 'bn1']) == {
        'layer2.0.conv1.weight', 'layer2.0.bn2.weight', 'layer2.0.bn2.bias', 'bn1.weight', 'bn1.bias'}


def test_a_layer_may_hold_others():
    assert trained(build(), 'backbone', ['layer2.0.downsample']) == {
        'layer2.0.downsample.1.weight', 'layer2.0.downsample.2.weight', 'layer2.0.downsample.2.bias'}


def test_names_count_by_whole_components():
    model = build('vit_tiny_patch16_224', depth=11)
    assert trained(model, 'backbone', ['blocks.1.mlp.fc1']) - {'head.weight', 'head.bias'} == {
        'blocks.1.mlp.fc1.weight', 'blocks.1.mlp.fc1.bias'}


def test_a_parameter_of_a_module_with_others_below_it():
    names = trained(build('convnext_atto'), 'backbone', ['stages.0.blocks.1.gamma'])
    assert names == {'stages.0.blocks.1.gamma', 'head.fc.weight', 'head.fc.bias'}


def test_with_blocks_indices_and_words():
    model = build()
    names = trained(model, 'backbone', [-1, 'layer1.0', 'stem', 'layer2.0.conv2'])
    assert names == {'layer2.0.conv2.weight'} | {
        n for n, _ in model.named_parameters() if n.startswith(('layer4.0.', 'layer1.0.', 'conv1.', 'bn1.'))}


@pytest.mark.parametrize('name', ['layer2.0.conv1', 'branches.1.layer2.0.conv1'])
def test_in_a_branch_by_either_name(amf, name):
    names = trained(amf, 'branch.1', [name])
    assert of_branch(names, 1) == {'branches.1.layer2.0.conv1.weight'}
    assert of_branch(names, 0) == of_branch(dict(amf.named_parameters()), 0), 'the other branch trains as before'


def test_one_name_for_both_branches(amf):
    names = trained(amf, 'branch', ['layer2.0.conv1'])
    assert {n for n in names if n.startswith('branches')} == {f'branches.{i}.layer2.0.conv1.weight' for i in (0, 1)}


def test_in_the_tuned_path_of_spottune():
    model = build('spottune', backbone='test_resnet', policy='test_resnet')
    names = trained(model, 'tuned', ['backbone.layer2.0.tuned.conv1'])
    assert {n for n in names if n.startswith('backbone.layer')} == {'backbone.layer2.0.tuned.conv1.weight'}
    assert {n for n in trained(model, 'stem', ['conv1.3']) if n.startswith(('backbone.conv1', 'backbone.bn1'))} == {
        'backbone.conv1.3.weight'}
    with pytest.raises(UserError, match="tuned has several modules 'conv1'; name one of backbone.layer1.0.tuned.conv1"):
        resolve(model, Plan(roles=dict(tuned=dict(train=['conv1']))))
    for above in ('backbone.layer2.0', 'backbone', 'backbone.layer2.0.frozen.conv1'):
        with pytest.raises(UserError, match='tuned has no block or layer'):
            resolve(model, Plan(roles=dict(tuned=dict(train=[above]))))


@pytest.mark.parametrize('item, near', [
    ('layr2.0.conv1', 'layer2.0.conv1'),  # a module
    ('layr2.0', 'layer2.0'),  # a block
    ('layer2.0.act1', None),  # a module without parameters
    ('fc', None),  # of another role
    ('', None),
    ('zzz', None),
])
def test_what_is_neither_block_nor_layer(item, near):
    with pytest.raises(UserError, match=f"plan: backbone has no block or layer '{item}'") as e:
        resolve(build(), Plan(roles=dict(backbone=dict(train=[item]))))
    assert '\n' not in str(e.value)
    if near:
        assert f'did you mean {near}?' in str(e.value)


def test_near_matches_of_a_branch_are_relative_if_the_name_was(amf):
    with pytest.raises(UserError, match=r"branch\.0 has no block or layer .*, did you mean layer3\.0\.conv3\?"):
        resolve(amf, Plan(roles={'branch.0': dict(train=['layer3.0.conv33'])}))


def test_a_block_wins_over_a_longer_one_that_ends_alike():
    """`blocks.0` is a block of the model itself, and the end of a name in another."""
    model = nn.Sequential()
    for name in ('blocks', 'more'):
        model.add_module(name, nn.Sequential())
    model.blocks.append(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    model.more.add_module('blocks', nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    model.block_names = ['blocks.0', 'more.blocks.0']
    table = resolve(model, Plan(roles=dict(backbone=dict(train=['blocks.0']))))
    names = {n for n, s in table.parameters.items() if s.trains}
    assert names == {n for n, _ in model.named_parameters() if n.startswith('blocks.0.')}


def step(model, optimizer):
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()


def moved_by_training(model, plan):
    optimizer = create_optimizer(model, plan)
    apply_freeze(model, plan)
    model.eval()
    model.train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    step(model, optimizer)
    return {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}


def test_norms_of_a_block_of_which_another_layer_trains_stay_in_evaluation_mode():
    model = build()
    moved = moved_by_training(model, Plan(lr=0.1, roles=dict(backbone=dict(train=['layer2.0.conv1']))))
    assert moved == {'layer2.0.conv1.weight', 'fc.weight', 'fc.bias'}


def test_a_named_norm_trains_and_moves_its_statistics(amf):
    plan = Plan(lr=0.1, roles={
        'branch.0': dict(train=['layer2.0.conv1', 'layer2.0.bn2']), 'branch.1': dict(train='none'),
        'policy': dict(train='none')})
    moved = moved_by_training(amf, plan)
    norm = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    assert moved == {
        'branches.0.layer2.0.conv1.weight', 'fc.weight', 'fc.bias', *(f'branches.0.layer2.0.bn2.{n}' for n in norm)}


def test_a_norm_without_affine_parameters_goes_with_what_holds_it():
    model = build()
    down = model.layer2[0].downsample
    down[2] = nn.BatchNorm2d(down[2].num_features, affine=False)

    def moves(train, **others):
        apply_freeze(model, Plan(roles=dict(backbone=dict(train=train, **others))))
        model.train()
        return down[2].training

    assert moves(['layer2.0']) and moves('all') and moves(['layer2.0.downsample'])
    assert not moves(['layer2.0.conv1']) and not moves(['layer2.0.downsample.1']) and not moves(['layer1.0'])
    assert not moves(['layer2.0.downsample'], freeze_bn=True) and not moves(['layer2.0.downsample'], start_epoch=1)


def test_a_layer_that_starts_later():
    model, plan = build(), Plan(roles=dict(backbone=dict(train=['layer2.0.bn1'], start_epoch=1)))
    apply_freeze(model, plan, 0)
    model.train()
    assert not model.layer2[0].bn1.training and not model.layer2[0].bn1.weight.requires_grad
    assert apply_freeze(model, plan, 1)
    model.train()
    assert model.layer2[0].bn1.training and model.layer2[0].bn1.weight.requires_grad
    assert not model.layer2[0].bn2.training


def test_yaml_and_the_table_of_groups(tmp_path):
    model, plan = build(), Plan(roles=dict(backbone=dict(train=['layer2.0.conv1', 3])))
    plan.to_yaml(tmp_path / 'plan.yaml')
    again = Plan.from_yaml(tmp_path / 'plan.yaml')
    assert again == plan
    size = model.layer2[0].conv1.weight.numel() + sum(p.numel() for p in model.layer4.parameters())
    groups = [g for g in param_groups(model, again) if g['role'] == 'backbone']
    assert sum(p.numel() for g in groups for p in g['params']) == size
    assert describe_groups(groups).splitlines()[1].startswith('backbone')
