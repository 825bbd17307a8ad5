"""The Plan as data: round trips, precedence, validation."""
import argparse
import dataclasses
from pathlib import Path

import pytest
import yaml

from timm_amf import Plan, RolePlan, Schedule, UserError
from timm_amf.tuning.plan_args import add_plan_args, plan_from_args

ROLES = ['branch.0', 'branch.1', 'policy', 'head']


def paper_plan() -> Plan:
    return Plan(
        lr=0.008,
        epochs=1000,
        schedule=Schedule(sched='step', decay_rate=0.94, decay_epochs=20),
        roles={
            'branch': RolePlan(low_blocks=8),
            'branch.0': RolePlan(lr=0.0008),
            'branch.1': RolePlan(lr=0.03),
            'policy': RolePlan(lr=3e-5, schedule=dict(hold_epochs=5)),
        },
    )


def schedule_of(plan: Plan, role: str) -> Schedule:
    return plan.complete_schedule(plan.role(role).schedule)


def test_yaml_round_trip(tmp_path):
    plan = paper_plan()
    plan.to_yaml(tmp_path / 'plan.yaml')
    assert Plan.from_yaml(tmp_path / 'plan.yaml') == plan
    # A bare mapping, without the key `plan`, reads the same.
    bare = yaml.safe_load((tmp_path / 'plan.yaml').read_text())['plan']
    (tmp_path / 'bare.yaml').write_text(yaml.safe_dump(bare))
    assert Plan.from_yaml(tmp_path / 'bare.yaml') == plan


def test_a_role_takes_its_own_then_its_kinds_then_the_common_value():
    plan = paper_plan()
    assert [plan.role(r).lr for r in ROLES] == [0.0008, 0.03, 3e-5, 0.008]
    assert [plan.role(r).low_blocks for r in ROLES] == [8, 8, 0, 0]
    assert plan.role('branch.1').low_lr_scale == 0.4  # the paper: the first layers' LR is "reduced 60%"
    assert schedule_of(plan, 'policy').hold_epochs == 5
    assert schedule_of(plan, 'policy').decay_rate == 0.94
    assert schedule_of(plan, 'head').hold_epochs == 0


def test_with_role_leaves_the_original_alone():
    plan = paper_plan()
    other = plan.with_role('policy', start_epoch=3, schedule=dict(sched='cosine'))
    assert schedule_of(other, 'policy').sched == 'cosine' and schedule_of(other, 'policy').hold_epochs == 5
    assert other.role('policy').lr == 3e-5 and other.role('policy').start_epoch == 3
    assert plan == paper_plan()


@pytest.mark.parametrize('data, words', [
    (dict(lrr=1), ['lrr', 'mean lr?']),
    (dict(lr='fast'), ['lr', 'fast']),
    (dict(lr=-1), ['lr', '-1']),
    (dict(lr=float('nan')), ['lr']),
    (dict(epochs=1.5), ['epochs', '1.5']),
    (dict(schedule=dict(sched='cosin')), ['cosin', 'cosine']),
    (dict(schedule=dict(min_scale=2)), ['min_scale', '2']),
    (dict(schedule=dict(warmup=2)), ['warmup', 'warmup_']),
    (dict(roles=dict(head=dict(train='some'))), ['train', 'some']),
    (dict(roles=dict(head=dict(lr=-1))), ['head', 'lr']),
    (dict(roles=dict(head=dict(schedule=dict(sched='x')))), ['sched', 'x']),
    (dict(roles=['head']), ['roles']),
    (dict(opt_betas='0.9'), ['opt_betas']),
])
def test_a_mistake_is_one_line_that_names_it(data, words):
    with pytest.raises(UserError) as error:
        Plan.from_dict(data)
    message = str(error.value)
    assert '\n' not in message and all(word in message for word in words), message


def test_missing_or_damaged_file(tmp_path):
    with pytest.raises(UserError, match='nowhere.yaml'):
        Plan.from_yaml(tmp_path / 'nowhere.yaml')
    (tmp_path / 'bad.yaml').write_text('plan: [')
    with pytest.raises(UserError, match='bad.yaml'):
        Plan.from_yaml(tmp_path / 'bad.yaml')
    (tmp_path / 'list.yaml').write_text('- 1')
    with pytest.raises(UserError, match='must hold keys and values'):
        Plan.from_yaml(tmp_path / 'list.yaml')


def test_yaml_1_1_floats_are_read_as_numbers(tmp_path):
    (tmp_path / 'plan.yaml').write_text('plan: {lr: 1e-4, roles: {head: {lr: 3e-5}}}')  # PyYAML gives strings for these
    plan = Plan.from_yaml(tmp_path / 'plan.yaml')
    assert plan.lr == 1e-4 and plan.role('head').lr == 3e-5


# -- from the command line --------------------------------------------------------------------------------------------

def parse(*argv, recipe=None, **flags) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_plan_args(parser)
    others = dict.fromkeys(('lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'warmup_lr', 'min_lr'))
    given = vars(parser.parse_args(argv))
    return argparse.Namespace(**{**given, **others, 'seed': 42, 'recipe': recipe or {}, **flags})


def field_table(cls) -> str:
    """The table of a class in docs/plan.md."""
    lines = ['| field | default | | flag |', '|---|---|---|---|']
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        shown = default is not None and not isinstance(default, Schedule)
        default = yaml.safe_dump(default, default_flow_style=True).split('\n')[0] if shown else ''
        flags = field.metadata.get('flag', f'--{field.name}').replace('_', '-').split()
        flags += [f'--policy-{field.name}'.replace('_', '-')] if field.metadata.get('policy') else []
        text = field.metadata['help'].replace('|', '\\|')
        lines.append(f'| `{field.name}` | {default} | {text} | {", ".join(f"`{flag}`" for flag in flags)} |')
    return '\n'.join(lines)


def test_a_field_is_declared_once():
    """Its flag, its type, its limits and its row of docs/plan.md follow from the declaration."""
    parser = argparse.ArgumentParser()
    add_plan_args(parser)
    text = (Path(__file__).parents[2] / 'docs' / 'plan.md').read_text()
    for cls in (Plan, Schedule, RolePlan):
        for field in dataclasses.fields(cls):
            assert field.metadata['help'], field.name
            for flag in field.metadata.get('flag', f'--{field.name}').replace('_', '-').split():
                assert parser._option_string_actions[flag].default is None
        assert field_table(cls) in text, f'docs/plan.md is not up to date: {field_table(cls)}'


def test_timms_flags_alone_make_timms_plan():
    plan = plan_from_args(parse(lr=0.1), ROLES, 0.1)
    assert plan.lr == 0.1 and plan.epochs == 300 and plan.schedule.sched == 'cosine'
    assert plan.schedule.warmup_epochs is None and schedule_of(plan, 'head').warmup_scale == pytest.approx(1e-4)
    assert plan.roles == {}


def test_flags_of_roles():
    plan = plan_from_args(
        parse('--branch-lr', '0.0008', '0.03', '--policy-lr', '3e-5', '--head-lr', '0.008', '--low-blocks', '8',
              '--policy-start-epoch', '2', '--policy-hold-epochs', '4', '--freeze', 'branch.0',
              '--role', 'branch.1.train=[-1,-2]', 'policy.schedule.min_scale=0.5', 'head.weight_decay=0'),
        ROLES, 0.1)
    assert [plan.role(r).lr for r in ROLES] == [0.0008, 0.03, 3e-5, 0.008]
    assert [plan.role(r).low_blocks for r in ROLES] == [8, 8, 0, 0]
    assert plan.role('branch.0').train == 'none' and plan.role('branch.1').train == [-1, -2]
    assert plan.role('policy').start_epoch == 2 and plan.role('head').weight_decay == 0
    policy = schedule_of(plan, 'policy')
    assert (policy.sched, policy.hold_epochs, policy.min_scale) == ('cosine', 4, 0.5)


def test_flags_of_depth_go_to_what_has_blocks():
    argv = '--reinit-blocks 2 --l2sp-alpha 0.01 --l2sp-blocks 10 --train-share 0.25 --train-seed 3'.split()
    plan = plan_from_args(parse(*argv, '--role', 'branch.1.l2sp_blocks=all'), ROLES, 0.1)
    role = plan.role('branch.0')
    assert (role.reinit_blocks, role.l2sp_alpha, role.l2sp_blocks) == (2, 0.01, 10)
    assert (role.train, role.train_share, role.train_seed) == ('random', 0.25, 3)
    assert plan.role('branch.1').l2sp_blocks == 'all'
    assert plan.role('policy').reinit_blocks == 0 and plan.role('head').l2sp_alpha is None
    assert Plan.from_dict(plan.to_dict()) == plan
    roles = ['stem', 'frozen', 'tuned', 'tail', 'policy', 'head']
    assert set(plan_from_args(parse(*argv), roles, 0.1).roles) == {'tuned'}
    everything = plan_from_args(parse('--l2sp-alpha', '1'), roles, 0.1)
    assert {r: s.l2sp_alpha for r, s in everything.roles.items()} == dict(tuned=1., tail=1.)
    assert plan_from_args(parse('--l2sp-alpha', '1', '--l2sp-blocks', 'all'), ROLES, 0.1).roles


def test_a_recipes_plan_means_what_it_means_to_from_yaml_and_given_flags_win():
    recipe = dict(plan=paper_plan().to_dict())
    assert plan_from_args(parse(recipe=recipe), ROLES, 0.1) == paper_plan()
    plan = plan_from_args(parse(recipe=recipe, epochs=7, sched='cosine'), ROLES, 0.1)
    assert plan.epochs == 7 and plan.schedule.sched == 'cosine' and plan.lr == 0.008
    assert plan.role('branch.1').lr == 0.03
    assert plan_from_args(parse(recipe=recipe, lr=0.5), ROLES, 0.5).lr == 0.5


def test_a_plan_file(tmp_path):
    paper_plan().to_yaml(tmp_path / 'plan.yaml')
    plan = plan_from_args(parse('--plan', str(tmp_path / 'plan.yaml'), '--head-lr', '1'), ROLES, 0.1)
    assert plan.role('head').lr == 1 and plan.role('branch.0').lr == 0.0008 and plan.lr == 0.008


@pytest.mark.parametrize('argv, words', [
    (['--branch-lr', '0.1'], ['--branch-lr', '1', '2']),
    (['--freeze', 'brunch'], ['brunch', 'branch.0']),
    (['--backbone-lr', '0.1'], ['--backbone-lr', 'backbone']),
    (['--role', 'branch.0'], ['branch.0']),
    (['--role', 'policy.lrr=1'], ['lrr']),
    (['--role', 'policy.lr=fast'], ['lr', 'fast']),
])
def test_mistakes_on_the_command_line(argv, words):
    with pytest.raises(UserError) as error:
        plan_from_args(parse(*argv), ROLES, 0.1)
    assert all(word in str(error.value) for word in words)


def test_a_warm_up_that_would_go_down_is_refused():
    with pytest.raises(UserError, match='--warmup-lr'):
        plan_from_args(parse(warmup_lr=1e-2), ROLES, 1e-3)
    plan = plan_from_args(parse(), ROLES, 1e-6)  # timm's default of 1e-5 with a tiny LR
    assert schedule_of(plan, 'head').warmup_scale == 1


def test_a_setting_that_there_is_not_is_named(tmp_path):
    for cls, name, meant in ((Plan, 'epoch', 'epochs'), (RolePlan, 'lrr', 'lr'), (Schedule, 'shed', 'sched')):
        with pytest.raises(UserError, match=f"{cls.__name__} has no setting '{name}', did you mean {meant}"):
            cls(**{name: 3})
    Plan(roles={'hed': {'lr': 1}}).to_yaml(tmp_path / 'p.yaml')
    with pytest.raises(UserError, match=r"p\.yaml: the model has no role 'hed'"):
        plan_from_args(parse(plan=str(tmp_path / 'p.yaml')), ROLES, 0.1)
