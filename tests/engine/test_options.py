"""The command line of train_amf.py: timm's flags as timm has them, recipes, and one line for every mistake."""
import argparse
import ast
import importlib.util
import logging
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from timm_amf.engine import config_file
from timm_amf.engine.options import build_parser, parse_args, resolve_trackers, save_args
from timm_amf.engine.timm_flags import REFUSED, REFUSED_VALUES, REPLACED, why_refused
from timm_amf.errors import UserError
from timm_amf.flags import KeyValues, words_of
from timm_amf.tuning import Plan, Schedule, plan_args, plan_from_args
from timm_amf.tuning.plan_args import resolve_lr

# The parser of timm's train.py as it was read in August 2026: names | default | type and number of values.
TIMM_PARSER = """
data | None | str?
--kd-model-name | None | str
--kd-distill-type | 'logit' | str
--kd-loss-type | 'kl' | str
--distill-loss-weight | None | float
--task-loss-weight | None | float
--kd-temperature | 4.0 | float
--kd-student-feature-dim | None | int
--kd-teacher-feature-dim | None | int
--kd-token-distill-type | 'soft' | str
--data-dir | None | str
--dataset | '' | str
--train-split | 'train' | str
--val-split | 'validation' | str
--train-num-samples | None | int
--val-num-samples | None | int
--dataset-download | False | switch
--class-map | '' | str
--input-img-mode | None | str
--input-key | None | str
--target-key | None | str
--dataset-trust-remote-code | False | switch
--model | 'resnet50' | str
--pretrained | False | switch
--pretrained-path | None | str
--initial-checkpoint | '' | str
--resume | '' | str
--no-resume-opt | False | switch
--num-classes | None | int
--gp | None | str
--img-size | None | int
--in-chans | None | int
--input-size | None | int3
--crop-pct | None | float
--mean | None | float+
--std | None | float+
--interpolation | '' | str
-b --batch-size | 128 | int
-vb --validation-batch-size | None | int
--channels-last | False | switch
--fuser | '' | str
--grad-accum-steps | 1 | int
--grad-checkpointing | False | switch
--fast-norm | False | switch
--model-kwargs | {} | mapping
--head-init-scale | None | float
--head-init-bias | None | float
--torchcompile-mode | None | str
--torchscript | False | switch
--torchcompile | None | str?
--device | 'cuda' | str
--amp | False | switch
--amp-dtype | 'float16' | str
--model-dtype | None | str
--no-ddp-bb | False | switch
--synchronize-step | False | switch
--local_rank | 0 | int
--device-modules | None | str+
--opt | 'sgd' | str
--opt-eps | None | float
--opt-betas | None | float+
--momentum | 0.9 | float
--weight-decay | 2e-05 | float
--clip-grad | None | float
--clip-mode | 'norm' | str
--layer-decay | None | float
--layer-decay-min-scale | 0 | float
--layer-decay-no-opt-scale | None | float
--opt-kwargs | {} | mapping
--sched | 'cosine' | str
--sched-on-updates | False | switch
--lr | None | float
--lr-base | 0.1 | float
--lr-base-size | 256 | int
--lr-base-scale | '' | str
--lr-noise | None | float+
--lr-noise-pct | 0.67 | float
--lr-noise-std | 1.0 | float
--lr-cycle-mul | 1.0 | float
--lr-cycle-decay | 0.5 | float
--lr-cycle-limit | 1 | int
--lr-k-decay | 1.0 | float
--warmup-lr | 1e-05 | float
--min-lr | 0 | float
--epochs | 300 | int
--epoch-repeats | 0.0 | float
--start-epoch | None | int
--decay-milestones | [90, 180, 270] | int+
--decay-epochs | 90 | float
--warmup-epochs | 5 | int
--warmup-prefix | False | switch
--cooldown-epochs | 0 | int
--patience-epochs | 10 | int
--decay-rate --dr | 0.1 | float
--no-aug | False | switch
--train-crop-mode | None | str
--scale | [0.08, 1.0] | float+
--ratio | [0.75, 1.3333333333333333] | float+
--hflip | 0.5 | float
--vflip | 0.0 | float
--color-jitter | 0.4 | float
--color-jitter-prob | None | float
--grayscale-prob | None | float
--gaussian-blur-prob | None | float
--aa | None | str
--aug-repeats | 0 | float
--aug-splits | 0 | int
--jsd-loss | False | switch
--bce-loss | False | switch
--bce-sum | False | switch
--bce-target-thresh | None | float
--bce-pos-weight | None | float
--reprob | 0.0 | float
--remode | 'pixel' | str
--recount | 1 | int
--resplit | False | switch
--mixup | 0.0 | float
--cutmix | 0.0 | float
--cutmix-minmax | None | float+
--mixup-prob | 1.0 | float
--mixup-switch-prob | 0.5 | float
--mixup-mode | 'batch' | str
--mixup-off-epoch | 0 | int
--smoothing | 0.1 | float
--train-interpolation | 'random' | str
--drop | 0.0 | float
--drop-connect | None | float
--drop-path | None | float
--drop-block | None | float
--bn-momentum | None | float
--bn-eps | None | float
--sync-bn | False | switch
--dist-bn | 'reduce' | str
--split-bn | False | switch
--model-ema | False | switch
--model-ema-force-cpu | False | switch
--model-ema-decay | 0.9998 | float
--model-ema-warmup | False | switch
--seed | 42 | int
--worker-seeding | 'all' | str
--log-interval | 50 | int
--val-interval | 1 | int
--recovery-interval | 0 | int
--checkpoint-hist | 10 | int
-j --workers | 4 | int
--save-images | False | switch
--pin-mem | False | switch
--no-prefetcher | False | switch
--output | '' | str
--experiment | '' | str
--eval-metric | 'top1' | str
--tta | 0 | int
--use-multi-epochs-loader | False | switch
--log-wandb | False | switch
--wandb-project | None | str
--wandb-tags | [] | str+
--wandb-resume-id | '' | str
--train-img-sizes | None | int+
--train-batch-sizes | None | int+
--train-size-probs | None | float+
--train-size-schedule | 'constant' | str
--train-size-schedule-spread | 0.65 | float
--train-size-random-mix | 0.1 | float
--train-batches-per-epoch --train-steps-per-epoch | None | int
--variable-batch-loss-scale | 'none' | str
--naflex-loader | False | switch
--naflex-train-seq-lens | [128, 256, 576, 784, 1024] | int+
--naflex-max-seq-len | 576 | int
--naflex-patch-sizes | None | int+
--naflex-patch-size-probs | None | float+
--naflex-loss-scale | 'linear' | str
--naflex-patchify-channels-first | False | switch
"""
# What timm added since.
LATER_FLAGS = """
--pretrained-cfg-overlay | {} | mapping
--task | 'classification' | str
--loss | None | str
--target-format | None | str
--multilabel-threshold | 0.5 | float
--lr-decay-fn | None | str
--lr-stable-timescale | None | float
--stop-epoch | None | int
--save-epochs | None | int+
"""


def flag_rows(table):
    rows = [[cell.strip() for cell in line.split('|')] for line in table.strip().splitlines()]
    return [pytest.param(names.split(), ast.literal_eval(default), kind, id=names) for names, default, kind in rows]


@pytest.fixture(scope='module')
def parser():
    return build_parser()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / 'images'
    (path / 'train').mkdir(parents=True)
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / 'recipe.yaml'
        path.write_text(textwrap.dedent(text))
        return str(path)
    return write


def other_value(action):
    """A value on the command line, and what it is read as, that differs from the default of a flag."""
    if action.nargs == 0:
        return [], not action.default
    if isinstance(action, KeyValues):
        return ['a=1', 'b=x'], {'a': 1, 'b': 'x'}
    word = next((c for c in action.choices or () if c and c != action.default), '3')
    value = action.type(word)
    if action.nargs == 3:
        return [word] * 3, [value] * 3
    return ([word], [value]) if action.nargs == '+' else ([word], value)


def effective_defaults(parser):
    """Defaults of the flags; of those that leave a Plan's value, the Plan's, and of a rule, those of its help."""
    values = vars(parser.parse_args([]))
    for cls in (Plan, Schedule):
        for field, _, dest in plan_args._flags(cls):
            values[dest] = getattr(cls(), field.name)
    rules = dict(warmup_epochs=5, lr_base=0.1, lr_base_size=256, lr_base_scale='', warmup_lr=1e-5, min_lr=0.)
    return values | rules | dict(model='resnet50', batch_size=128, checkpoint_hist=10)


# timm's flags

def test_timm_parser_is_complete():
    assert len(flag_rows(TIMM_PARSER)) == 172


@pytest.mark.parametrize('names, default, kind', flag_rows(TIMM_PARSER) + flag_rows(LATER_FLAGS))
def test_timm_flag(parser, names, default, kind):
    dest = names[-1 if names[0].startswith('-') and not names[0].startswith('--') else 0].lstrip('-').replace('-', '_')
    if why_refused(dest):
        with pytest.raises(UserError, match=f'^{names[0]}: .*; '):
            parse_args(['.', f'{names[0]}=3'])
        return
    got = effective_defaults(parser)[dest]
    assert got == default and type(got) in (type(default), float)

    values = {
        'switch': ([], True), 'mapping': (['a=1', 'b=x'], {'a': 1, 'b': 'x'}),
        'int': (['3'], 3), 'float': (['1'], 1.0), 'int+': (['3', '4'], [3, 4]), 'float+': (['3', '4'], [3.0, 4.0]),
        'int3': (['3', '4', '5'], [3, 4, 5]), 'str': (['x'], 'x'), 'str?': (['x'], 'x'),
        'str+': (['x', 'y'], ['x', 'y']),
    }
    words, value = values[kind]
    action = next(a for a in parser._actions if a.dest == dest)
    if action.choices and kind == 'str':
        words, value = [action.choices[-1]], action.choices[-1]
    for name in names:
        flag = [name] if name.startswith('-') else []
        got = getattr(parser.parse_args(flag + words), dest)
        assert got == value and (type(got) is type(value) or dest == 'warmup_epochs')
    if kind in ('int', 'float', 'int+', 'float+', 'int3'):
        with pytest.raises(UserError, match='invalid (int|float) value'):
            parser.parse_args([names[-1]] + ['x'] * len(words))


def test_flags_without_a_value(parser):
    assert parser.parse_args(['--torchcompile']).torchcompile == 'inductor'
    assert parser.parse_args(['--torchcompile', 'eager']).torchcompile == 'eager'
    assert parser.parse_args(['--model-kwargs']).model_kwargs == {}


def test_key_values_are_literals_or_strings(parser):
    words = ['depths=(2, 2)', 'act=gelu', 'eps=1e-6', 'flag=False', 'eq=a=b']
    assert parser.parse_args(['--model-kwargs', *words]).model_kwargs == {
        'depths': (2, 2), 'act': 'gelu', 'eps': 1e-6, 'flag': False, 'eq': 'a=b'}
    assert parser.parse_args(['--opt-kwargs', 'betas=(0.9, 0.95)', 'x=...']).opt_kwargs == {
        'betas': (0.9, 0.95), 'x': '...'}


def test_command_line_of_timms_documentation(folder):
    args = parse_args(
        f'{folder} --model seresnet34 --sched cosine --epochs 150 --warmup-epochs 5 --lr 0.4 --reprob 0.5 '
        '--remode pixel --batch-size 256 --amp -j 4'.split())
    given = dict(
        data_dir=folder, model='seresnet34', sched='cosine', epochs=150, warmup_epochs=5, lr=0.4, reprob=0.5,
        remode='pixel', batch_size=256, amp=True, workers=4)
    assert {name: getattr(args, name) for name in given} == given
    assert args.explicit == set(given) - {'workers', 'remode'}  # these two are at their defaults
    assert args.mixed_precision == 'fp16'
    assert args.recipe == {}


def test_adamw_mixup_ema_command_line(folder, caplog):
    args = parse_args(
        f'{folder} --model vit_small_patch16_224.augreg_in1k --pretrained --opt adamw --lr 5e-4 --weight-decay 0.05 '
        '--mixup 0.8 --cutmix 1.0 --aa rand-m9-mstd0.5-inc1 --model-ema --amp --amp-dtype bfloat16 --clip-grad 1 '
        '--mean 0.5 0.5 0.5 --std 0.5 --input-size 3 224 224 --layer-decay 0.75 -vb 64 --dr 0.2'.split())
    assert (args.opt, args.mixup, args.cutmix, args.clip_grad) == ('adamw', 0.8, 1.0, 1.0)
    assert (args.mixed_precision, args.validation_batch_size, args.decay_rate) == ('bf16', 64, 0.2)
    assert (args.mean, args.std, args.input_size) == ([0.5] * 3, [0.5], [3, 224, 224])
    assert not caplog.records


def test_data_config_of_timm_reads_the_namespace(folder):
    from timm.data import resolve_data_config
    args = parse_args([folder, '--img-size', '96', '--mean', '0.4', '--crop-pct', '0.9'])
    config = resolve_data_config(vars(args))
    assert (config['input_size'], config['mean'], config['crop_pct']) == ((3, 96, 96), (0.4,) * 3, 0.9)


# What becomes of flags that do not apply

@pytest.mark.parametrize('dest', REPLACED)
def test_replaced_flag_warns_in_one_line(parser, folder, caplog, monkeypatch, dest):
    action = next(a for a in parser._actions if a.dest == dest)
    words = ['0.1'] if dest == 'drop_connect' else other_value(action)[0]
    with caplog.at_level(logging.WARNING):
        args = parse_args([folder, action.option_strings[0], *words])
    [record] = caplog.records
    assert record.message.startswith(action.option_strings[0]) and '\n' not in record.message
    assert '[replaced]' in action.help
    monkeypatch.setenv('RANK', '1')
    parse_args([folder, action.option_strings[0], *words])
    assert len(caplog.records) == 1  # the other processes keep silent
    assert args.drop_path == (0.1 if dest == 'drop_connect' else None)


@pytest.mark.parametrize('dest, value', REFUSED_VALUES)
def test_refused_value(folder, dest, value):
    with pytest.raises(UserError, match=f'^--{dest} {value}: '):
        parse_args([folder, f'--{dest}', value])


def test_refused_flag_of_a_recipe(recipe, folder):
    with pytest.raises(UserError, match='naflex_loader: the NaFlex loader is not part of this script'):
        parse_args([folder, '--config', recipe('naflex_loader: true')])
    assert parse_args([folder, '--config', recipe('naflex_loader: false\nkd_temperature: 4.0\ntta: 0')])


def test_device_cpu_acts_as_cpu(folder, caplog):
    assert parse_args([folder, '--device', 'cpu']).cpu
    assert not parse_args([folder, '--device', 'cuda']).cpu
    assert not caplog.records


def test_documentation_names_every_flag_that_differs(parser):
    text = (Path(__file__).parents[2] / 'docs' / 'flags.md').read_text()
    replaced, refused = text[text.index('## Replaced'):].split('## Refused')
    for action in parser._actions:
        if action.dest in REPLACED:
            assert all(f'`{name}`' in replaced for name in action.option_strings), action.dest
    for dest, value in REFUSED_VALUES:
        assert f'`--{dest} {value}`' in refused
    assert all(f'`--{begin}' in refused for begin in REFUSED)
    known = parser._option_string_actions.keys() | {'--gpu_ids'}  # of accelerate launch
    assert all(flag in known or why_refused(flag[2:]) for flag in re.findall(r'(?<![\w-])--[a-z][\w-]*', text))


# Recipes and args.yaml

def test_command_line_overrides_the_recipe(recipe, folder):
    path = recipe("""
        model: resnet18
        batch-size: 32
        lr: 1e-3          # a string to YAML 1.1
        weight_decay: 0
        amp: true
        mean: [0.5, 0.5, 0.5]
        opt_kwargs: {nesterov: false}
    """)
    args = parse_args(['--config', path, folder, '--batch-size', '8', '--opt', 'sgd'])
    assert (args.model, args.batch_size, args.lr, args.amp) == ('resnet18', 8, 1e-3, True)
    assert args.weight_decay == 0 and type(args.weight_decay) is float
    assert args.opt_kwargs == {'nesterov': False}
    assert args.explicit == {
        'model', 'batch_size', 'lr', 'weight_decay', 'amp', 'mean', 'opt_kwargs', 'opt', 'data_dir'}
    assert parse_args([folder, '-c', path]).batch_size == 32


def test_command_line_overrides_the_other_flag_of_a_pair(recipe, folder, tmp_path):
    path = recipe(f'amp: true\nbce_loss: true\nbce_sum: true\ndevice: cpu\namp_dtype: bfloat16\ndata_dir: {tmp_path}')
    args = parse_args(['-c', path])
    assert (args.mixed_precision, args.loss, args.cpu, args.data_dir) == ('bf16', 'bce', True, str(tmp_path))
    save_args(args, tmp_path / 'args.yaml')
    for config in (path, str(tmp_path / 'args.yaml')):
        args = parse_args(['-c', config, folder])
        assert args.data_dir == folder
        args = parse_args(['-c', config, '--amp-dtype', 'float16', '--device', 'cuda'])
        assert (args.mixed_precision, args.cpu) == ('fp16', False)
        args = parse_args(['-c', config, '--mixed-precision', 'no'])
        assert (args.mixed_precision, args.amp) == ('no', False) and 'amp' not in args.explicit
        with pytest.raises(UserError, match='--bce-sum: only the binary cross-entropy has it'):
            parse_args(['-c', config, '--loss', 'ce'])
    args = parse_args([folder, '-c', recipe('mixed_precision: bf16'), '--amp'])
    assert args.mixed_precision == 'fp16' and 'mixed_precision' not in args.explicit


def test_old_run_means_what_it_meant(recipe, folder):
    """An args.yaml with `explicit` lists every flag; a Plan without a schedule was the step decay of then."""
    args = parse_args([folder, '-c', recipe("""
        epochs: 300
        decay_rate: 0.1
        tta: 0
        batch_size: 8
        explicit: [batch_size]
        plan: {epochs: 4}
    """)])
    plan = plan_from_args(args, ['backbone', 'head'], resolve_lr(args, 8))
    assert args.batch_size == 8 and args.epochs is None
    assert (plan.lr, plan.epochs) == (0.01, 4)
    assert (plan.schedule.sched, plan.schedule.decay_rate, plan.schedule.warmup_epochs) == ('step', 0.94, 0)


def test_defaults_are_not_shared(folder):
    parse_args([folder]).tracker.append('none')
    assert parse_args([folder]).tracker == ['auto']


def test_sections_of_a_recipe(recipe, folder):
    sections = {
        'plan': {'roles': {'head': {'lr': 1e-3}}}, 'data': {'preset': 'aircraft-dtd'},
        'expected': {'top1': [90, 92]}, 'card': {'license': 'apache-2.0'},
    }
    args = parse_args(['-c', recipe(yaml.safe_dump(sections) + 'epochs: 3\n')])
    assert args.recipe == sections and args.explicit == {'epochs'}
    assert parse_args(['-c', recipe(f'data: {folder}')]).data_dir == folder
    assert parse_args(['-c', recipe('data: {preset: x}'), folder]).data_dir == folder
    assert parse_args(['-c', recipe('data: {dataset: torch/x}'), folder, '--dataset', 'torch/dtd']).recipe == {}
    assert parse_args(['-c', recipe('data: {dataset: torch/x}\ndataset: torch/dtd'), folder]).recipe['data']


@pytest.mark.parametrize('text, message', [
    ('epochs: ten', "epochs: invalid int value: 'ten'"),
    ('epochs: 3.0', "epochs: invalid int value: '3.0'"),
    ('epochs: true', 'epochs: must be int, not True'),
    ('epochs: [3]', r'epochs: must be int, not \[3\]'),
    ('lr: fast', 'lr: invalid float value'),
    ('reprob: 2', 'reprob: must be between 0 and 1, not 2'),
    ('mean: {a: 1}', 'mean: must be float'),
    ('epohcs: 3', 'epohcs: unknown key, did you mean epochs?'),
    ('learning-rate: 3', 'learning_rate: unknown key, did you mean lr?'),
    ('seed:', 'seed: has no value'),
    ('experiment: 007', 'experiment: must be text, not 7; put it in quotes'),
    ('amp: 1', 'amp: must be true or false, not 1'),
    ('check_images: maybe', 'check_images: must be true or false'),
    ('input_size: [3, 224]', 'input_size: expected 3 arguments'),
    ('opt_betas: []', 'opt_betas: expected at least one argument'),
    ('opt_betas: [0.9, x]', "opt_betas: invalid float value: 'x'"),
    ('model_kwargs: 3', 'model_kwargs: must be a mapping'),
    ('sched: cosin', "sched: invalid choice: 'cosin' .*cosine"),
    ('plan: 3', r'plan: must be a section \(a mapping\), not 3'),
    ('card: text', 'card: must be a section'),
    ('config: other.yaml', 'config: unknown key'),
    ('epochs: 3\nepochs: 4', 'line 2: not valid YAML: epochs is given twice'),
    ('plan: {lr: 1, lr: 2}', 'lr is given twice'),
    ('epochs: [', 'line 1: not valid YAML'),
    ('- epochs', 'must hold keys and values'),
    ('', 'must hold keys and values, .*, not nothing'),
    ('seed: 1' + '0' * 400, 'line 1: not valid YAML: 1000.* is too large a number'),
    ('seed: ' + '9' * 5000, "line 1: not valid YAML: '999.*' is no int"),
    ('lr: !!float x', "'x' is no float"),
    ('seed: 2024-01-01', "seed: invalid int value: '2024-01-01'"),
    ('seed: !!timestamp x', 'could not determine a constructor'),
    ('seed: !!python/object/apply:os.getcwd []', 'could not determine a constructor'),
    ('model_kwargs: {1: 2}', 'the key 1 is no text; put it in quotes'),
    ('model_kwargs: {[1]: 2}', 'a key is a list or a mapping'),
    ('mean: &a [*a]', 'line 1: not valid YAML: holds itself'),
    ('mean: ' + '[' * 5000, 'line 1: not valid YAML: is nested too deeply'),
    ('a0: &a0 [1]\n' + ''.join(f'a{i}: &a{i} [{f"*a{i - 1}, " * 9}]\n' for i in range(1, 12)),
     'not valid YAML: has too many values'),
    ('mean: &a {b: *a}', 'holds itself'),
    ('mean: [' + '0, ' * 60_000 + ']', 'not valid YAML: has too many values'),
    ('explicit: 5', 'explicit: must be a list of flags, not 5'),
    ('# ' + 'x' * 2 ** 21, 'is too long for a file of settings'),
])
def test_mistake_in_a_recipe(recipe, folder, text, message):
    path = recipe(text)
    with pytest.raises(UserError, match=f'^{re.escape(path)}.*{message}') as error:
        parse_args([folder, '--config', path])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['plan: {schedule: [1]}', 'explicit: [lr]\nplan: {schedule: [1]}'])
def test_a_schedule_is_a_mapping(recipe, folder, text):
    with pytest.raises(UserError, match=r'plan.schedule must be a mapping of settings, not \[1\]'):
        parse_args([folder, '--config', recipe(text)])


def test_a_date_is_text_and_aliases_are_read(recipe, folder):
    args = parse_args([folder, '--config', recipe('experiment: 2024-01-01\nmean: &x [0.5]\nstd: *x')])
    assert args.experiment == '2024-01-01' and args.std == [0.5]


def test_recipes_of_the_package(monkeypatch, tmp_path, folder):
    recipes, wheel = tmp_path / 'hub_configs', tmp_path / 'wheel' / 'hub_configs'
    recipes.mkdir()
    (recipes / 'small.yaml').write_text('epochs: 7')
    monkeypatch.setattr(config_file, '_RECIPE_DIRS', (wheel, recipes))
    monkeypatch.chdir(tmp_path)
    assert parse_args([folder, '--config', 'small']).epochs == 7
    assert parse_args([folder, '--config', 'small.yaml']).epochs == 7
    wheel.mkdir(parents=True)
    (wheel / 'large.yaml').write_text('epochs: 8')
    assert parse_args([folder, '--config', 'large']).epochs == 8
    (tmp_path / 'small.yaml').write_text('epochs: 9')
    assert parse_args([folder, '--config', 'small.yaml']).epochs == 9  # a file of the user's comes first
    with pytest.raises(UserError, match='--config smal: no such file, .* recipe, did you mean small?'):
        parse_args([folder, '--config', 'smal'])


def test_recipes_are_looked_for_in_wheel_and_checkout():
    package = Path(config_file.__file__).parents[1]
    assert config_file._RECIPE_DIRS == (package / 'hub_configs', package.parent / 'hub_configs')


@pytest.mark.parametrize('words', [
    [],
    ['--amp', '--amp-dtype', 'bfloat16', '--mean', '.1', '-1e-5', '.3', '--model-kwargs', 'a=1', 'b=x', '--lr', '1e-5'],
    ['--branch-lr', '1e-4', '0.1', '--freeze', 'policy', '--role', 'branch.0.lr=1', '--no-check-images', '--bce-loss'],
    ['--tracker', 'none', '--cpu', '--torchcompile', '--wandb-tags', '1', 'yes', '--experiment', '007'],
    ['--device', 'cpu', '--drop-con', '0.1', '--resume', 'auto', '--dist-bn', '', '--clip-grad', '1', '--pin-mem'],
    ['--model-kwargs', 'depths=(2, 2)', "name='1'", 'rest=[(1,), {"a": (2, 3)}]', 'odd=1j', 'none=None', 'f=1e-5',
     'bytes=[b"x"]', 'keys={1: 2}', 'keyless={[]: 1}', 'long=' + '9' * 400, 'minus=' + '-' * 5000 + '1'],
])
def test_saved_options_load_to_an_equal_namespace(tmp_path, folder, recipe, words):
    sections = {'plan': {'lr': 1e-5, 'roles': {}}, 'data': {'components': [{'name': 'a', 'root': 'b'}]}, 'card': {}}
    for config in ([], ['--config', recipe(yaml.safe_dump(sections) + 'weight_decay: 0.1\n')]):
        args = parse_args([folder, *words, *config])
        save_args(args, tmp_path / 'args.yaml')
        again = parse_args(['--config', str(tmp_path / 'args.yaml')])
        again.config = args.config
        args.explicit |= {'batch_size'}  # written by whatever it was chosen
        assert vars(again) == vars(args)
        assert all(type(value) is type(getattr(args, name)) for name, value in vars(again).items())
    changed = parse_args(['--config', str(tmp_path / 'args.yaml'), '--seed', '1'])
    assert changed.seed == 1 and changed.explicit == args.explicit | {'seed'}


def test_a_setting_is_the_same_in_python_in_a_file_and_on_the_command_line(recipe, folder):
    settings = dict(
        model='resnet18', batch_size=8, lr=1e-3, amp=True, mean=[0.5, -1e-5, 0], model_kwargs={'a': (1, 'x'), 'b': '1'},
        branch_lr=[0.1, 0.2], freeze=['policy'], check_images=False, torchcompile='eager', mixup=0.2, seed=0)
    words = words_of(build_parser(), settings)
    line = parse_args([folder, *words])
    assert {name: getattr(line, name) for name in settings} == settings
    with pytest.raises(UserError, match='lr: takes one value'):
        words_of(build_parser(), {'lr': [1, 2]})
    text = yaml.safe_dump({**settings, 'model_kwargs': {'a': "(1, 'x')", 'b': '1'}})
    file = parse_args([folder, '--config', recipe(text)])
    file.config = line.config
    assert vars(file) == vars(line)


def test_plan_file_takes_the_place_of_the_section(tmp_path, folder, recipe):
    plan = tmp_path / 'plan.yaml'
    plan.write_text('lr: 0.1')
    args = parse_args([folder, '--plan', str(plan), '--config', recipe('plan: {lr: 0.2}')])
    assert args.plan == str(plan) and args.recipe == {}
    save_args(args, tmp_path / 'args.yaml')
    assert parse_args(['--config', str(tmp_path / 'args.yaml')]).plan == str(plan)


def test_saved_options_hold_no_secrets(tmp_path, folder, recipe):
    token = 'hf_' + 'a1B2' * 8
    words = ['--model-kwargs', f'token={token}', f'note=see-{token}', 'class_token=True', 'global_pool=token']
    args = parse_args([folder, *words, '-c', recipe('card: {hub: {api_key: k3y}}')])
    save_args(args, tmp_path / 'args.yaml')
    saved = yaml.safe_load((tmp_path / 'args.yaml').read_text())
    assert saved['model_kwargs'] == {'note': 'see-***', 'class_token': True, 'global_pool': 'token'}
    assert saved['card'] == {'hub': {}}
    assert args.model_kwargs['token'] == token


# Mistakes

@pytest.mark.parametrize('line, message', [
    ('--epocs 3', 'unknown flag --epocs, did you mean --epochs?'),
    ('--zzzzzz', 'unknown flag --zzzzzz; --help lists them'),
    ('--learning-rate 3', 'unknown flag --learning-rate, did you mean --lr?'),
    ('--lerning_rate 3', 'unknown flag --lerning_rate, did you mean --lr?'),
    ('--num-epoch 3', 'unknown flag --num-epoch, did you mean --epochs?'),
    ('--min-rl 3', 'unknown flag --min-rl, did you mean --min-lr?'),
    ('extra', "unexpected argument 'extra'"),
    ('--epochs ten', "--epochs: invalid int value: 'ten'"),
    ('--epochs', '--epochs: expected one argument'),
    ('--input-size 3 224', '--input-size: expected 3 arguments'),
    ('--sched cos', "--sched: invalid choice: 'cos'"),
    ('--eval-metric f1', "--eval-metric: invalid choice: 'f1'"),
    ('--model-kwargs x', "--model-kwargs: 'x' is not of the form key=value"),
    ('--data-dir elsewhere', 'two folders of data'),
    ('--epochs -1', 'plan: epochs must be at least 0, not -1'),
    ('-b 0', '--batch-size: must be at least 1, not 0'),
    ('-j -1', '--workers: must be between 0 and 1024, not -1'),
    ('--lr -0.1', '--lr: must be above 0, not -0.1'),
    ('--lr nan', '--lr: must be finite, not nan'),
    ('--lr 0.1 --min-lr 0.2', '--min-lr 0.2 is above the LR of 0.1; lower it, or raise --lr'),
    ('--lr 0.1 --warmup-lr 0.2', '--warmup-lr 0.2 is above the LR of 0.1'),
    ('--mixup-off-epoch 3', '--mixup-off-epoch: has no effect without --mixup or --cutmix or --cutmix-minmax'),
    ('--aug-splits 2 --batch-size x', "--batch-size: invalid int value: 'x'"),
    ('--decay-milestones 3 2', 'plan.schedule: decay_milestones must increase, not [3, 2]'),
    ('--start-epoch 301', '--start-epoch: 301 is beyond the 300 epochs of the run'),
    ('--reprob 1.5', '--reprob: must be between 0 and 1, not 1.5'),
    ('--scale 0.5', '--scale: must be 2 values in increasing order, not 0.5'),
    ('--ratio 2 1', '--ratio: must be 2 values in increasing order, not 2 1'),
    ('--crop-pct 1.5', '--crop-pct: must be between 0.05 and 1, not 1.5'),
    ('--mean 0.5 0.5', '--mean: has 2 values for 3 channels'),
    ('--std 0', '--std: must be above 0'),
    ('--mean nan', '--mean: must be finite, not nan'),
    ('--seed 9' + '9' * 400, '--seed: must be a number of at most'),
    ('--aug-splits 1000000', '--aug-splits: must be between 0 and 64, not 1000000'),
    ('--workers 1000000', '--workers: must be between 0 and 1024, not 1000000'),
    ('--in-chans 1 --input-size 3 32 32', '--in-chans: 1 contradicts the 3 channels'),
    ('--mixup 0.2 -b 1', '--batch-size: must be at least 2 for mixup'),
    ('--model-ema-decay 0.9', '--model-ema-decay: has no effect without --model-ema'),
    ('--publish-license mit', '--publish-license: has no effect without --publish'),
    ('--loss asl --mixup 0.2', '--loss: asl cannot take the soft targets'),
    ('--bce-sum', '--bce-sum: only the binary cross-entropy has it; add --bce-loss'),
    ('--bce-loss --loss ce', '--bce-loss and --loss ce: give one'),
    ('--amp --mixed-precision bf16', '--amp with --amp-dtype float16 and --mixed-precision bf16: give one'),
    ('--amp --cpu', '--cpu: fp16 mixed precision needs a GPU; use --amp-dtype bfloat16'),
    ('--mixed-precision bf16 --model-dtype bfloat16', '--model-dtype: bfloat16 and mixed precision'),
    ('--eval-only', '--eval-only: there are no weights to evaluate'),
    ('--resume nowhere', '--resume: nowhere does not exist'),
    ('--initial-checkpoint nowhere', '--initial-checkpoint: nowhere is not a file'),
    ('--pretrained-path nowhere', '--pretrained-path: nowhere is not a file'),
    ('--plan nowhere', '--plan: nowhere is not a file'),
    ('--model resnet18s', '--model: resnet18s is unknown, did you mean resnet18?'),
    ('--model amf_resnet18x3', '--model: amf_resnet18x3 is unknown, did you mean amf_resnet18x2?'),
    ('--model resnet18.a1_ink', '--model: resnet18.a1_ink has an unknown tag, did you mean resnet18.a1_in1k?'),
    ('--model timm/resnet18', '--model: timm/resnet18 is no architecture; write hf-hub:OWNER/NAME'),
    ('--opt adamx', '--opt: adamx is unknown, did you mean adam'),
    ('--aa rand-z9', '--aa: timm cannot read'),
    ('--device-modules no_such_module_at_all', '--device-modules: no_such_module_at_all cannot be imported'),
])
def test_mistake_on_the_command_line(folder, line, message):
    with pytest.raises(UserError, match='^' + re.escape(message)) as error:
        parse_args([folder, *line.split()])
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('line', ['--epocs 3', '--epochs ten', '', '--config nowhere', '. --tta 3'])
def test_mistake_is_one_line_and_exit_code_2(capsys, line):
    path = Path(__file__).parents[2] / 'train_amf.py'
    spec = importlib.util.spec_from_file_location('train_amf_script', path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == '' and re.fullmatch(r'train_amf\.py: error: .+\n', captured.err)


def test_modules_of_the_options_need_neither_torch_nor_timm():
    # A stand-in for the package, whose own import registers the models.
    package = Path(config_file.__file__).parents[1]
    code = textwrap.dedent(f'''
        import sys, types
        for name, path in (('timm_amf', {str(package)!r}), ('timm_amf.engine', {str(package / 'engine')!r})):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
        import timm_amf.engine.options
        assert not {{'torch', 'timm', 'accelerate', 'numpy'}} & set(sys.modules)
    ''')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_no_data(tmp_path):
    with pytest.raises(UserError, match='^no data: name a folder'):
        parse_args([])
    with pytest.raises(UserError, match='^--data-dir: .*missing does not exist'):
        parse_args([str(tmp_path / 'missing')])
    for line in ('--dataset torch/cifar10', '--component name=a,path=b', '--data-preset aircraft-dtd'):
        parse_args(line.split())


def test_names_that_pass(folder, tmp_path):
    for line in (
        '--model hf-hub:owner/name', f'--model local-dir:{tmp_path}', '--model amf_resnet18x2', '--opt lookahead_adamw',
        '--aa original-mstd0.5', '--aa augmix-m5-w4', '--aa 3a', '--resume auto', '--eval-only --resume auto',
        '--epochs 0', '--tracker none',
    ):
        parse_args([folder, *line.split()])


def test_device_modules_register_models_of_the_user(monkeypatch, tmp_path, folder):
    (tmp_path / 'models_of_a_user.py').write_text(textwrap.dedent("""
        from timm.models import register_model

        @register_model
        def net_of_a_user(pretrained=False, **kwargs):
            pass
    """))
    with pytest.raises(UserError, match='--model: net_of_a_user is unknown'):
        parse_args([folder, '--model', 'net_of_a_user'])
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        parse_args([folder, '--model', 'net_of_a_user', '--device-modules', 'models_of_a_user'])
    finally:
        from timm.models import _registry
        _registry._model_entrypoints.pop('net_of_a_user', None)
        _registry._model_to_module.pop('net_of_a_user', None)
        _registry._module_to_models.pop('models_of_a_user', None)
        sys.modules.pop('models_of_a_user', None)


def test_help(capsys):
    with pytest.raises(SystemExit) as leave:
        parse_args(['--help'])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert text.index('What matters most') < text.index('--model NAME') < text.index('Dataset parameters:')
    for title in ('Dataset', 'Model', 'Gradient', 'Miscellaneous', 'Plan', 'Mixture', 'Run'):
        assert f'\n{title} parameters:' in text
    assert '--naflex' not in text and '(default: 0.9998)' in text and '(default: None)' not in text


# Learning rate and trackers

@pytest.mark.parametrize('line, batch, lr', [
    ('', 256, 0.1),
    ('', 64, 0.025),
    ('--lr-base 0.5 --lr-base-size 512', 1024, 1.0),
    ('--opt adamw --lr-base 1e-3', 1024, 2e-3),
    ('--opt lamb --lr-base 1e-3', 64, 5e-4),
    ('--opt RAdam --lr-base 1e-3', 64, 5e-4),
    ('--opt adamw --lr-base 1e-3 --lr-base-scale linear', 1024, 4e-3),
    ('--opt lion --lr-base 1e-3', 1024, 4e-3),
    ('--lr-base-scale sqrt', 64, 0.05),
    ('--lr 0.3 --opt adamw', 4096, 0.3),
])
def test_learning_rate_of_timm(folder, line, batch, lr):
    assert resolve_lr(parse_args([folder, *line.split()]), batch) == pytest.approx(lr, rel=1e-12)


def test_trackers(monkeypatch):
    def trackers(names, log_wandb=False, installed=()):
        monkeypatch.setattr('importlib.util.find_spec', lambda name: name if name in installed else None)
        return resolve_trackers(argparse.Namespace(tracker=names, log_wandb=log_wandb))

    assert trackers(['auto']) == []
    assert trackers(['auto'], installed=['tensorboard']) == ['tensorboard']
    assert trackers(['auto'], installed=['tensorboardX']) == ['tensorboard']
    assert trackers(['none'], installed=['tensorboard']) == []
    assert trackers(['auto'], True, ['tensorboard', 'wandb']) == ['tensorboard', 'wandb']
    assert trackers(['wandb'], True, ['wandb']) == ['wandb']
    with pytest.raises(UserError, match='tracker wandb: not installed; pip install wandb'):
        trackers(['none'], True)
    with pytest.raises(UserError, match='tracker comet_ml: not installed; pip install comet-ml'):
        trackers(['comet_ml'])


def test_weights_of_parts_have_flat_flags():
    """They are the keywords that timm.create_model takes, and keep what else is in them."""
    def kwargs(*words):
        args = parse_args(['.', '--model', 'amf_resnet18x2', *words])
        assert args.pretrained and args.backbone_weights is None and args.policy_weights is None
        return args.model_kwargs

    def file(name, **others):
        return {**others, 'pretrained_cfg_overlay': {'file': name}}

    assert kwargs('--backbone-weights', 'a', '--policy-weights', 'p') == {
        'backbone_kwargs': file('a'), 'policy_kwargs': file('p')}
    assert kwargs('--backbone-weights', 'a', 'b') == {'backbone_kwargs': [file('a'), file('b')]}
    own = ['--model-kwargs', "backbone_kwargs=[{'x':1},{'x':2}]"]
    assert kwargs('--backbone-weights', 'a', *own) == {'backbone_kwargs': [file('a', x=1), file('a', x=2)]}
    with pytest.raises(UserError, match='3 files for 2 branches'):
        kwargs('--backbone-weights', 'a', 'b', 'c', *own)


def test_two_components_after_one_flag():
    """The second would be the folder of the data, and the mixture would lack it."""
    with pytest.raises(UserError, match='takes one component; write --component name=b,path=y'):
        parse_args(['--model', 'resnet18', '--component', 'name=a,path=x', 'name=b,path=y'])
