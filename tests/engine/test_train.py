"""What a run does and leaves: every option in use, equalities that must hold, mistakes."""
import json
import os
import subprocess
import sys
import time

import pytest
import timm
import torch
import yaml
from conftest_engine import ONE, ROOT, SMALL, assert_same_run, rows
from safetensors.torch import load_file

from timm_amf import Plan, UserError


def weights(folder):
    return load_file(folder / 'last/model.safetensors')


def plain(*flags):
    """A small plain model without batch norm: its gradients are sums over samples."""
    return [
        '--model', 'test_vit', '--model-kwargs', 'img_size=32', '--img-size', '32', '-b', '8', '--epochs', '2',
        '--workers', '0', '--lr', '0.05', '--warmup-epochs', '0', '--cpu', '--tracker', 'none', *flags,
    ]


# -- the folder of a run ----------------------------------------------------------------------------------------------

def test_the_folder_of_a_run(run, capsys):
    folder = run('first', '--tracker', 'tensorboard')
    assert {p.name for p in folder.iterdir()} >= {
        'args.yaml', 'plan.yaml', 'summary.csv', 'policy.csv', 'model_best.safetensors', 'last'}
    assert list(folder.rglob('events.out.tfevents.*'))
    assert not list(folder.rglob('*.tmp')) and not list(folder.glob('checkpoint-*'))

    summary = rows(folder / 'summary.csv')
    # timm's columns first, in its order
    assert list(summary[0])[:5] == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5']
    assert [r['epoch'] for r in summary] == ['0', '1', '2']
    assert float(summary[0]['lr_branch.0']) == 0.01 and float(summary[0]['lr_policy']) == 0.02
    policy = rows(folder / 'policy.csv')
    for row in policy:
        assert float(row['weight_0']) + float(row['weight_1']) == pytest.approx(1)
        assert float(row['stripes_weight_0']) + float(row['stripes_weight_1']) == pytest.approx(1)
        assert 50 <= float(row['assignment_accuracy']) <= 100
        for name in ('stripes', 'blobs'):  # the matching stays that of the first evaluation
            assert row[f'{name}_branch'] == policy[0][f'{name}_branch']
            share = float(row[f'{name}_assigned_{row[f"{name}_branch"]}'])
            assert float(row[f'{name}_assignment_accuracy']) == pytest.approx(100 * share)

    plan = Plan.from_yaml(folder / 'plan.yaml')
    assert plan.role('branch.1').lr == 0.05 and plan.epochs == 3
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert args['model'] == 'amf' and args['batch_size'] == 8

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('epoch')]
    assert len(lines) == 3
    for word in ('train loss', 'top1', 'top5', 'stripes', 'blobs', 'assignment', 'branch.0 0.01', 'img/s', 'left'):
        assert word in lines[0]


def test_the_run_can_be_repeated_from_its_own_args(run):
    first = run('first', '--aa', 'rand-m5-mstd0.5', '--reprob', '0.3', '--epochs', '2')
    again = run('again', '--config', str(first / 'args.yaml'), base=(), data=())
    assert_same_run(first, again)


def test_a_run_learns(run):
    folder = run('learns', '--epochs', '12', '--smoothing', '0', '--no-aug', '--sched', 'constant', base=ONE)
    summary = rows(folder / 'summary.csv')
    assert float(summary[-1]['train_loss']) < 0.5 * float(summary[0]['train_loss'])
    assert max(float(r['eval_top1']) for r in summary) > 60  # five classes


def test_the_number_of_workers_changes_nothing(run):
    flags = ['--aa', 'rand-m5-mstd0.5', '--reprob', '0.5', '--mixup', '0.2', '--epochs', '2']
    assert_same_run(run('none', *flags, base=ONE), run('two', *flags, '--workers', '2', base=ONE))


def test_seeds_differ(run):
    a, b = (weights(run(f's{seed}', '--seed', str(seed), '--epochs', '1', base=ONE)) for seed in (1, 2))
    assert not torch.equal(a['fc.weight'], b['fc.weight'])


def test_best_weights_evaluate_to_the_recorded_metric(run, trained, capsys):
    folder = trained('first')
    best = max(rows(folder / 'summary.csv'), key=lambda r: float(r['eval_top1']))
    capsys.readouterr()
    run('other', '--initial-checkpoint', str(folder / 'model_best.safetensors'), '--eval-only')
    line = capsys.readouterr().out.splitlines()[-1]
    assert f'eval loss {float(best["eval_loss"]):.4f} top1 {float(best["eval_top1"]):.2f}' in line


def test_the_best_epoch_is_by_the_metric_asked_for(run, capsys):
    flags = ['--eval-metric', 'loss', '--checkpoint-hist', '2', '--save-epochs', '0', '--epochs', '4']
    folder = run('loss', *flags, base=ONE)
    losses = [float(r['eval_loss']) for r in rows(folder / 'summary.csv')]
    state = json.loads((folder / 'last/state.json').read_text())
    assert state['best_metric'] == min(losses) and state['best_epoch'] == losses.index(min(losses))
    best_two = sorted(range(4), key=losses.__getitem__)[:2]
    kept = {p.name for p in folder.glob('checkpoint-*')}
    assert kept == {f'checkpoint-{e}.safetensors' for e in {*best_two, 0}}


# -- equalities -------------------------------------------------------------------------------------------------------

def test_accumulated_steps_equal_one_large_step(run):
    flags = ['--opt', 'momentum', '--no-aug', '--drop', '0', '--epochs', '2']
    # Only one full update of all samples is comparable: others part the epoch otherwise.
    one = weights(run('one', *flags, '-b', '64', base=plain()))
    parts = weights(run('parts', *flags, '-b', '13', '--grad-accum-steps', '4', base=plain()))
    for name in one:
        torch.testing.assert_close(parts[name], one[name], rtol=1e-4, atol=1e-6)


def test_an_update_is_sgd_on_the_mean_loss_of_its_samples(run, folders):
    """One epoch of one step against a loop written out: timm's transform, cross-entropy, one SGD step."""
    flags = ['--opt', 'momentum', '--no-aug', '--smoothing', '0', '--weight-decay', '0', '--epochs', '1', '-b', '64',
             '--sched', 'constant', '--interpolation', 'bilinear', '--train-interpolation', 'bilinear']
    trained = weights(run('one', *flags, base=plain()))
    torch.manual_seed(0)
    from timm.data import ImageDataset, create_transform

    from timm_amf.engine.build import seed_step

    seed_step(42, 0, 0, 0)
    model = timm.create_model('test_vit', num_classes=5, img_size=32)
    cfg = model.pretrained_cfg
    transform = create_transform(
        (3, 32, 32), is_training=True, no_aug=True, mean=cfg['mean'], std=cfg['std'], interpolation='bilinear')
    images, targets = [], []
    for offset, name in ((0, 'stripes'), (3, 'blobs')):
        data = ImageDataset(str(folders / name / 'train'), transform=transform)
        images += [data[i][0] for i in range(len(data))]
        targets += [data[i][1] + offset for i in range(len(data))]
    loss = torch.nn.functional.cross_entropy(model(torch.stack(images)), torch.tensor(targets))
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], (p - 0.05 * p.grad).detach(), rtol=1e-4, atol=1e-6)


def test_frozen_roles_leave_the_checkpoint_unchanged(run):
    start = run('first', '--epochs', '1')
    first = weights(start)
    frozen = run('frozen', '--epochs', '1', '--freeze', 'branch.0', 'policy', '--initial-checkpoint',
                 str(start / 'last/model.safetensors'))
    after = weights(frozen)
    assert all(torch.equal(first[n], after[n]) for n in first if n.startswith(('branches.0', 'policy')))
    moving = [n for n in first if n.startswith('branches.1') and n.endswith('conv1.weight')]
    assert moving and not any(torch.equal(first[n], after[n]) for n in moving)


def test_multitune_and_plain_models_have_no_policy_csv(run):
    kwargs = ['--model-kwargs', "backbones=('test_resnet','test_resnet')"]
    base = [f for f in SMALL if f not in ('--policy-lr', '0.02')]
    base[base.index('amf')] = 'multitune'
    at = base.index('--model-kwargs')
    base = base[:at] + kwargs + base[at + 3:]
    folder = run('multi', '--epochs', '1', base=base)
    assert not (folder / 'policy.csv').exists()
    assert not (run('plain', '--epochs', '1', base=plain()) / 'policy.csv').exists()


@pytest.mark.parametrize('base, flags', [
    (ONE, ['--model-ema', '--model-ema-warmup', '--clip-grad', '0.1', '--clip-mode', 'value', '--bce-loss',
           '--smoothing', '0.1']),
    (ONE, ['--mixup', '0.8', '--cutmix', '1.0', '--mixup-off-epoch', '1', '-b', '7', '--clip-grad', '1.0']),
    (SMALL, ['--channels-last', '--grad-checkpointing', '--clip-grad', '0.1', '--clip-mode', 'agc', '--epochs', '1']),
    (SMALL, ['--mixed-precision', 'bf16', '--branch-loss', '0.5', '--policy-balance', '0.1', '--epochs', '1']),
    (ONE, ['--model-dtype', 'bfloat16', '--model-ema', '--model-ema-force-cpu']),
    (SMALL, ['--opt', 'adamw', '--layer-decay', '0.7', '--opt-betas', '0.9', '0.95', '--drop-path', '0.1', '--epochs',
             '1']),
    (ONE, ['--opt', 'lookahead_adam', '--mean', '0.5', '--std', '0.5', '--gp', 'max']),
    (ONE, ['--aug-splits', '2', '--jsd-loss', '--aa', 'augmix-m5-w3', '--resplit', '--reprob', '0.5']),
    (ONE, ['--aug-repeats', '3', '--epoch-repeats', '2', '--cache-images']),
    (ONE, ['--train-batches-per-epoch', '2', '--grad-accum-steps', '3', '--val-interval', '2']),
    (ONE, ['--sched-on-updates', '--sched', 'cosine', '--warmup-epochs', '1', '--cooldown-epochs', '1', '--save-images',
           '--log-interval', '2']),
    (SMALL, ['--bn-momentum', '0.01', '--bn-eps', '1e-3', '--head-init-scale', '0.1', '--head-init-bias', '-1',
             '--in-chans', '1', '--epochs', '1']),
])
def test_options_at_work(run, base, flags):
    folder = run('first', '--epochs', '2', *flags, base=base)
    summary = rows(folder / 'summary.csv')
    assert len(summary) == (3 if '--cooldown-epochs' in flags else 1 if flags[-2:] == ['--epochs', '1'] else 2)
    assert all(0 < float(r['train_loss']) < 20 for r in summary)
    assert all(v.isfinite().all() for v in weights(folder).values())
    if '--save-images' in flags:
        assert list(folder.glob('train-batch-*.jpg'))
    if '--val-interval' in flags:
        assert [r['eval_top1'] == '' for r in summary] == [True, False]


@pytest.mark.slow
def test_compiled(run):
    eager = run('eager', '--epochs', '1')
    compiled = run('compiled', '--epochs', '1', '--torchcompile', 'eager')
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(compiled)[name], value, rtol=1e-4, atol=1e-5)


def test_the_moving_average_in_closed_form(run):
    """Decay d, started from the first update's weights: one update leaves those of the model."""
    folder = run('ema', '--model-ema', '--model-ema-decay', '0.5', '--epochs', '1', '-b', '64')
    ema, model = (load_file(folder / f'last/{name}.safetensors') for name in ('ema', 'model'))
    assert all(torch.equal(ema[n], model[n]) for n in model)  # timm's step count: the first update copies


# -- several processes ------------------------------------------------------------------------------------------------

def torchrun(tmp_path, processes, *flags):
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(processes), '--master_port', '0',
        '--rdzv_backend', 'c10d', '--rdzv_endpoint', 'localhost:0', str(ROOT / 'train_amf.py'), *flags,
        '--output', str(tmp_path)]
    environment = dict(os.environ, OMP_NUM_THREADS='1', XDG_CACHE_HOME=str(tmp_path / 'cache'))
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_two_processes_train_as_one(run, components, tmp_path):
    """Without batch norm, two processes with half the batch take the same steps; 45 images do not divide evenly."""
    flags = ['--opt', 'momentum', '--no-aug', '--smoothing', '0', '--epochs', '2', '--clip-grad', '1.0']
    one = run('one', *flags, '-b', '16', base=plain())
    torchrun(tmp_path, 2, *plain(), *components, *flags, '-b', '8', '--experiment', 'two')
    a, b = weights(one), weights(tmp_path / 'two')
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5)
    for left, right in zip(rows(one / 'summary.csv'), rows(tmp_path / 'two' / 'summary.csv')):
        assert float(left['train_loss']) == pytest.approx(float(right['train_loss']), rel=1e-4)
        assert left['eval_top1'] == right['eval_top1']


@pytest.mark.slow
def test_two_processes_evaluate_as_one(run, components, tmp_path, capsys):
    first = run('first', '--epochs', '1')
    flags = [
        '--initial-checkpoint', str(first / 'model_best.safetensors'), '--eval-only', '-b', '7', '--eval-metric',
        'macro_f1']
    capsys.readouterr()
    run('e', *flags)
    one = capsys.readouterr().out.splitlines()[-1]
    two = torchrun(tmp_path, 2, *SMALL, *components, *flags).splitlines()[-1]
    assert one == two


@pytest.mark.slow
def test_two_processes_unfreeze_and_resume(components, tmp_path):
    """A role that starts late trains on both alike, and a resumed pair gives the bits of one never stopped."""
    flags = [*SMALL, *components, '--role', 'policy.start_epoch=1', '--recovery-interval', '2']
    torchrun(tmp_path, 2, *flags, '--experiment', 'whole')
    torchrun(tmp_path, 2, *flags, '--experiment', 'half', '--stop-epoch', '1')
    torchrun(tmp_path, 2, *flags, '--experiment', 'half', '--resume', 'auto')
    assert_same_run(tmp_path / 'whole', tmp_path / 'half')
    start = load_file(tmp_path / 'whole/last/model.safetensors')
    assert any(n.startswith('policy') for n in start)


# -- mistakes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, words', [
    (['--branch-lr', '0.1'], ['--branch-lr', '2 branches']),
    (['--num-classes', '3'], ['--num-classes 3', '5 classes']),
    (['--freeze', 'backbone'], ['backbone', 'branch.0']),
    (['--model-kwargs', "backbones=('test_resnet',)", 'policy=test_resnet', 'nonsense=1'], ['nonsense']),
    (['--opt-kwargs', 'nonsense=1'], ['sgd', 'nonsense']),
    (['--freeze', 'branch', 'policy', 'head'], ['nothing trains']),
    (['--policy-start-epoch', '1', '--freeze', 'branch', 'head'], ['nothing trains in epoch 0']),
    (['--output', '/proc/nowhere'], ['/proc/nowhere', '--output']),
])
def test_a_mistake_is_one_line(run, flags, words):
    with pytest.raises(UserError) as error:
        run('first', *flags)
    message = str(error.value)
    assert '\n' not in message and all(word in message for word in words), message


def test_a_size_that_a_model_is_not_built_for(run):
    base = [
        '--model', 'vit_tiny_patch16_224', '--img-size', '32', '--workers', '0', '--cpu', '--tracker', 'none',
        '-b', '8', '--epochs', '1', '--model-kwargs', 'depth=1', 'embed_dim=24', 'num_heads=2']
    with pytest.raises(UserError, match='vit_tiny_patch16_224 is built for images of 224x224, not 32x32.*img_size=32'):
        run('first', base=base)
    run('second', base=[*base, 'img_size=32'])


def test_a_loss_that_is_not_finite_names_step_lr_and_checkpoint(run):
    with pytest.raises(UserError) as error:
        run('first', '--branch-lr', '1e18', '1e18', '--opt', 'momentum', '--epochs', '5')
    message = str(error.value)
    assert 'not finite in epoch 1' in message and 'step' in message and '1e+18' in message


def test_the_last_checkpoint_before_the_loss_failed_is_good(run, monkeypatch):
    from timm_amf.engine.task import AdaptiveTask

    original, calls = AdaptiveTask.forward, []

    def failing(self, *args):
        calls.append(1)
        result = original(self, *args)
        return dict(result, loss=result['loss'] * float('nan')) if len(calls) == 9 else result

    monkeypatch.setattr(AdaptiveTask, 'forward', failing)
    with pytest.raises(UserError, match=r'epoch 2, step 2 .*last good checkpoint is .*last'):
        run('first', base=ONE)  # six steps an epoch
    monkeypatch.undo()
    assert_same_run(run('first', '--resume', 'auto', base=ONE), run('whole', base=ONE))


def test_routed_evaluation_reports_its_error(run, trained, capsys):
    folder = trained('first')
    flags = ['--initial-checkpoint', str(folder / 'model_best.safetensors'), '--eval-only']
    lines = {}
    for eps in ('0', '1'):
        capsys.readouterr()
        run('e', *flags, '--routing-eps', eps)
        lines[eps] = capsys.readouterr().out.splitlines()[-2:]
    dense, routed = lines['0']
    assert dense.split(' | assignment')[0] in routed and '100.0 % of the branches run' in routed
    assert '50.0 % of the branches run' in lines['1'][1]  # one of two branches for each image
    with pytest.raises(UserError, match='--eval-only'):
        run('second', '--routing-eps', '0.1')


@pytest.mark.parametrize('model', ['test_resnet', 'amf_resnet18x2'])
def test_without_network_pretrained_weights_fail_at_once(run, monkeypatch, model):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    start = time.monotonic()
    with pytest.raises(UserError, match='pretrained weights of .*timm/.*') as error:
        run('first', base=plain(), data=['--data-preset', 'demo', '--model', model, '--model-kwargs', 'drop_rate=0',
                                         '--pretrained'])
    assert time.monotonic() - start < 20 and '\n' not in str(error.value)


@pytest.mark.parametrize('flags, message', [
    (['--color-jitter', '-1'], 'the transforms of images cannot be built: '),
    (['--lr-k-decay', '1e9'], 'schedule: has no value at 0'),
    (['--policy-hold-epochs', 'inf'], '--policy-hold-epochs: must be finite, not inf'),
    (['--torchcompile', 'nothing'], '--torchcompile nothing: '),
])
def test_values_that_only_others_can_check(run, flags, message):
    with pytest.raises(UserError, match=message):
        run('run', *flags)
