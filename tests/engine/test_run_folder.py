"""A run's folder has one owner, is touched after the first step, and holds what the last line names."""
import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest_engine import rows
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from timm_amf import UserError
from timm_amf.engine import build, loop
from timm_amf.engine.checkpoint import read_class_names
from timm_amf.engine.evaluate_runs import RunOptions, evaluate_runs
from timm_amf.engine.opened import open_trained
from timm_amf.engine.run import claim_folder
from timm_amf.errors import Diverged

PLAIN = [
    '--model', 'test_resnet', '--img-size', '32', '-b', '8', '--epochs', '2', '--workers', '0', '--lr', '0.05',
    '--warmup-epochs', '0', '--cpu', '--tracker', 'none', '--no-aug',
]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def test_one_owner_at_a_time(run, tmp_path):
    with claim_folder(tmp_path / 'first', False, None):
        with pytest.raises(UserError, match='first: another run is writing there; choose another --experiment'):
            run('first', base=PLAIN)
    assert not (tmp_path / 'first').exists()  # it stayed empty
    assert (run('first', base=PLAIN) / 'args.yaml').exists()


@pytest.mark.parametrize('flags', [
    ['--resume', 'auto', '--model', 'test_vit'],
    ['--resume', 'auto', '--opt', 'adamw'],
    ['--overwrite', '--aug-splits', '2', '--jsd-loss', '--in-chans', '4', '--mean', '0.5', '0.5'],
    ['--overwrite', '--branch-loss', '0.3'],
])
def test_what_is_refused_leaves_the_run_as_it_was(run, trained, flags):
    folder = trained('first', base=PLAIN)
    before = contents(folder)
    with pytest.raises(UserError):
        run('first', *flags, '--epochs', '3', base=PLAIN)
    assert contents(folder) == before


def test_a_first_step_that_fails_leaves_the_run_as_it_was(run, trained, monkeypatch):
    folder = trained('first', base=PLAIN)
    before = contents(folder)

    def fail(*_):
        raise ValueError('no such thing')

    monkeypatch.setattr(loop.Trainer, '_train_step', fail)
    message = r'the first step fails \(ValueError: no such thing\); try another --batch-size .*--traceback'
    with pytest.raises(UserError, match=message):
        run('first', '--overwrite', base=PLAIN)
    assert contents(folder) == before


@pytest.mark.parametrize('batch', ['1', '14'])  # of 45 images: steps of 1, and of 12 and 11
def test_the_smallest_step_is_tried_first(run, monkeypatch, tmp_path, batch):
    """No batch norm of this network takes a single value a channel."""
    seen = []
    original = build.build_model

    def narrow(*args):
        model = original(*args)
        model.register_forward_pre_hook(lambda module, inputs: seen.extend([len(inputs[0])] * module.training))
        return model

    monkeypatch.setattr(build, 'build_model', narrow)
    if batch == '1':
        with pytest.raises(UserError, match='the first step fails .*more than 1 value per channel'):
            run('first', '-b', batch, '--img-size', '32', base=PLAIN)
        assert not (tmp_path / 'first').exists()
    else:
        run('first', '-b', batch, base=PLAIN)
        assert seen[0] == min(seen)


def test_the_trial_changes_no_bit(run, monkeypatch):
    """45 images in batches of 14 have steps of 12 and 11."""
    tried = run('tried', '-b', '14', base=PLAIN)
    monkeypatch.setattr(loop.Trainer, '_try_smallest', lambda *_: None)
    plain = run('plain', '-b', '14', base=PLAIN)
    assert (tried / 'last/model.safetensors').read_bytes() == (plain / 'last/model.safetensors').read_bytes()


def test_resumed_elsewhere_has_what_it_names(run, trained, capsys):
    first = trained('first', base=PLAIN)
    second = run('second', '--resume', str(first), base=PLAIN)  # nothing is left to train
    named = capsys.readouterr().out.strip().splitlines()[-1].split('; ')[-1]
    assert os.path.isfile(named) and 'second' in named
    assert [r['epoch'] for r in rows(second / 'summary.csv')] == ['0', '1']


def test_two_runs_of_one_second_have_two_folders(run, monkeypatch, tmp_path):
    class Clock(build.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1)

    monkeypatch.setattr(build, 'datetime', Clock)
    run('', '--epochs', '1', base=PLAIN)
    run('', '--epochs', '1', base=PLAIN)
    assert sorted(p.name for p in tmp_path.glob('2026*')) == [
        '20260101-000000-test_resnet', '20260101-000000-test_resnet-2']


# -- names of classes -------------------------------------------------------------------------------------------------


@pytest.fixture
def colours(tmp_path):
    """Folders of easy classes: colours(root, split, names) makes one image of a name's own colour after the other."""
    shades = dict(red=(220, 40, 40), green=(40, 200, 60), blue=(50, 60, 220))

    def make(root, split, names, number=8):
        rng = np.random.default_rng(len(names))
        for name in names:
            folder = tmp_path / root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.array(shades[name]) + rng.normal(0, 9, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
        return str(tmp_path / root)
    return make


def test_a_run_is_evaluated_by_the_names_of_its_classes(run, colours):
    data = colours('data', 'train', ('red', 'green', 'blue'))
    colours('data', 'val', ('red', 'green', 'blue'))
    folder = run('first', '--epochs', '15', base=PLAIN, data=[data])
    assert all(read_class_names(folder / name) == ['blue', 'green', 'red']
               for name in ('model_best.safetensors', 'last/model.safetensors'))
    fewer = colours('fewer', 'test', ('green', 'red'))
    assert evaluate_runs([folder], RunOptions('test', fewer))[0].top1 == 100
    opened = open_trained(folder, RunOptions(), needs_data=False)
    assert opened.class_names == opened.names == ['blue', 'green', 'red']
    os.rename(f'{fewer}/test/red', f'{fewer}/test/rouge')
    with pytest.raises(UserError, match="class 'rouge' is not among the 3 classes of the model"):
        evaluate_runs([folder], RunOptions('test', fewer))


def test_a_resume_keeps_the_labels(run, colours, tmp_path):
    data = colours('data', 'train', ('red', 'blue'))
    colours('data', 'val', ('red', 'blue'))
    run('first', base=PLAIN, data=[data])
    os.rename(tmp_path / 'data/train/red', tmp_path / 'data/train/a')
    os.rename(tmp_path / 'data/val/red', tmp_path / 'data/val/a')
    with pytest.raises(UserError, match="class 'a' is not among the 2 classes of the model"):
        run('first', '--resume', 'auto', '--epochs', '3', base=PLAIN, data=[data])


def test_weights_of_before_have_no_names(trained):
    """They are evaluated as they were."""
    folder = trained('first', base=PLAIN)
    path = folder / 'model_best.safetensors'
    with_names = evaluate_runs([folder])[0]
    save_file(load_file(path), path, metadata={'format': 'pt'})
    assert read_class_names(path) is None and evaluate_runs([folder])[0] == with_names


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('name', ['model.safetensors', 'optimizer.pt', 'state.json', 'digests.json'])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_goes_on(run, trained, name, tmp_path):
    whole = trained('whole', base=PLAIN)
    folder = trained('first', base=PLAIN)
    flip(folder / 'last' / name, 0.4)
    with pytest.raises(UserError, match=rf'last/.*is (damaged|not there).*--resume {folder}/last.old'):
        run('first', '--resume', 'auto', base=PLAIN)
    run('first', '--resume', str(folder / 'last.old'), base=PLAIN)
    for file in ('last/model.safetensors', 'last/state.json', 'model_best.safetensors', 'summary.csv'):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize('keys, value', [
    (('schedule', 'backbone@0', 'plateau', 'best'), {'x': 1}),
    (('schedule', 'backbone@0', 'lr'), None),
    (('schedule', 'backbone@0', 'plateau'), []),
    (('kept',), [[{}, 1]]),
    (('identity',), {'seed': []}),
    (('plan',), {}),
])
def test_a_state_of_other_types_is_damaged(run, trained, keys, value):
    folder = trained('first', '--sched', 'plateau', base=PLAIN)
    (folder / 'last/digests.json').unlink()
    whole = state = json.loads((folder / 'last/state.json').read_text())
    for key in keys[:-1]:
        state = state[key]
    state[keys[-1]] = value
    (folder / 'last/state.json').write_text(json.dumps(whole))
    if keys[-1] in ('identity', 'plan'):  # they are compared, and that is all
        run('first', '--sched', 'plateau', '--resume', 'auto', '--epochs', '3', base=PLAIN)
    else:
        with pytest.raises(UserError, match='last: is damaged .*last.old'):
            run('first', '--sched', 'plateau', '--resume', 'auto', '--epochs', '3', base=PLAIN)


def test_an_optimizer_of_other_groups_is_damaged(run, trained):
    folder = trained('first', base=PLAIN)
    (folder / 'last/digests.json').unlink()
    state = torch.load(folder / 'last/optimizer.pt', weights_only=True)
    state['param_groups'][0]['params'].pop()
    torch.save(state, folder / 'last/optimizer.pt')
    with pytest.raises(UserError, match='last: is damaged .*last.old'):
        run('first', '--resume', 'auto', '--epochs', '3', base=PLAIN)


@pytest.mark.parametrize('names', ['5', '[', '[1, null]', '[' * 100_000, '{}'])
def test_names_of_classes_that_are_no_names_are_damaged(trained, names):
    path = trained('first', base=PLAIN) / 'model_best.safetensors'
    save_file(load_file(path), path, metadata={'class_names': names})
    with pytest.raises(UserError, match='model_best.safetensors: is damaged: its names of classes'):
        read_class_names(path)


@pytest.mark.parametrize('content', [b'12345', b'', None])
def test_weights_that_are_no_weights_are_named(trained, content):
    path = trained('first', base=PLAIN) / 'model_best.safetensors'
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match='model_best.safetensors: is damaged or no safetensors file'):
        open_trained(path.parent, RunOptions()).load(None)


def test_a_checkpoint_without_its_state_does_not_start_again(run, trained):
    folder = trained('first', base=PLAIN)
    (folder / 'last/state.json').unlink()
    with pytest.raises(UserError, match='state.json: is not there; .*--resume .*last.old'):
        run('first', '--resume', 'auto', base=PLAIN)


def test_a_checkpoint_between_two_renames_is_found(trained):
    folder = trained('first', base=PLAIN)
    os.rename(folder / 'last', folder / 'last.new')
    before = contents(folder)
    assert evaluate_runs([folder], RunOptions(weights='last'))[0].images
    assert contents(folder) == before  # reading changes nothing


# -- not a number -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('flags', [
    ['--lr', '1e10', '--train-batches-per-epoch', '2'],
    ['--lr', '1e6', '--clip-grad', '1', '--recovery-interval', '1'],
    ['--lr', '1e10', '--epochs', '1', '--train-batches-per-epoch', '1'],
    ['--lr', '1e30', '--model-ema', '--train-batches-per-epoch', '1', '--val-interval', '9'],
])
def test_nothing_that_is_saved_is_not_finite(run, tmp_path, flags):
    with pytest.raises(Diverged, match='not finite.*lower the LR'):
        run('first', *flags, base=PLAIN)
    for path in (tmp_path / 'first').rglob('*.safetensors'):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_an_evaluation_that_is_not_finite_is_no_best_epoch(run, trained, tmp_path, monkeypatch):
    weights = load_file(trained('first', base=PLAIN) / 'model_best.safetensors')
    weights['conv1.1.running_var'].fill_(float('nan'))
    save_file(weights, tmp_path / 'nan.safetensors')
    with pytest.raises(UserError, match='not finite'):
        run('second', '--initial-checkpoint', str(tmp_path / 'nan.safetensors'), base=PLAIN)
    assert not (tmp_path / 'second' / 'model_best.safetensors').exists()


# -- weights that are named -------------------------------------------------------------------------------------------


def test_naming_weights_loads_them(run, trained, tmp_path):
    """Also without --pretrained, and by a path from home."""
    first = trained('first', base=PLAIN)
    shutil.copy(first / 'model_best.safetensors', tmp_path / 'w.safetensors')
    second = run('second', '--pretrained-path', str(tmp_path / 'w.safetensors'), '--lr', '1e-9', base=PLAIN)
    a, b = (load_file(folder / 'model_best.safetensors') for folder in (first, second))
    assert torch.allclose(a['conv1.0.weight'], b['conv1.0.weight'], atol=1e-6)
    with safe_open(second / 'model_best.safetensors', 'pt') as file:
        assert 'class_names' in file.metadata()


@pytest.mark.parametrize('flag, content', [
    *(('--pretrained-path', content) for content in (b'', b'PK\x03\x04 half', b'\x80\x04', None)),
    ('--initial-checkpoint', b'PK\x03\x04 half'),
])
def test_damaged_weights_are_named(run, tmp_path, flag, content):
    path = tmp_path / 'w.pth'
    if content is None:
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r'w\.pth') as error:
        run('first', flag, str(path), base=PLAIN)
    assert '\n' not in str(error.value) and not (tmp_path / 'first').exists()


def test_weights_are_as_readable_as_other_files(trained):
    folder = trained('first', base=PLAIN)
    assert {oct(p.stat().st_mode & 0o777) for p in folder.rglob('*') if p.is_file()} == {'0o644'}


# -- what a first reader broke ----------------------------------------------------------------------------------------


def test_another_run_is_not_resumed_over_this_one(run, trained):
    first, second = trained('first', base=PLAIN), trained('second', '--seed', '1', base=PLAIN)
    before = contents(second)
    with pytest.raises(UserError, match='second: holds a run already'):
        run('second', '--resume', str(first), '--epochs', '3', base=PLAIN)
    assert contents(second) == before
    shutil.rmtree(second / 'last')
    shutil.rmtree(second / 'last.old')
    with pytest.raises(UserError, match='second: holds a run already'):  # what is left of it is a run, too
        run('second', base=PLAIN)


def test_a_folder_that_is_removed_stops_the_run(run, monkeypatch):
    original = loop.Trainer.evaluate

    def remove(self):
        shutil.rmtree(self.folder)
        return original(self)

    monkeypatch.setattr(loop.Trainer, 'evaluate', remove)
    with pytest.raises(UserError, match='first: was removed or emptied while the run was writing there'):
        run('first', base=PLAIN)


def test_a_best_file_that_is_gone_is_not_named(run, trained, capsys, caplog):
    folder = trained('first', base=PLAIN)
    (folder / 'model_best.safetensors').unlink()
    run('first', '--resume', 'auto', '--epochs', '3', base=PLAIN)
    assert (folder / 'model_best.safetensors').exists() and 'is gone' in caplog.text
    assert 'after epoch 3' in capsys.readouterr().out.splitlines()[-1]


def test_damage_is_seen_by_evaluation_too(trained):
    folder = trained('first', base=PLAIN)
    flip(folder / 'last/model.safetensors', 0.9)
    with pytest.raises(UserError, match=r'last/model.safetensors: is damaged'):
        evaluate_runs([folder], RunOptions(weights='last'))


def test_a_classifier_that_does_not_train_is_not_zero(run, tmp_path, colours):
    data = colours('data', 'train', ('red', 'green', 'blue'))
    colours('data', 'val', ('red', 'green', 'blue'))
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet').state_dict(), tmp_path / 'w.safetensors')
    flags = ['--pretrained-path', str(tmp_path / 'w.safetensors'), '--epochs', '1', '--freeze', 'head']
    folder = run('first', *flags, base=PLAIN, data=[data])
    assert load_file(folder / 'model_best.safetensors')['fc.weight'].any()
    with pytest.raises(UserError, match='--head-start zero: the classifier does not train'):
        run('second', *flags, '--head-start', 'zero', base=PLAIN, data=[data])
    # A classifier of the same classes is kept, and one of a run is evaluated by its names wherever it comes from.
    trained = run('third', '--epochs', '15', base=PLAIN, data=[data]) / 'model_best.safetensors'
    kept = run('fourth', '--pretrained-path', str(trained), '--lr', '1e-30', '--epochs', '1', base=PLAIN, data=[data])
    assert float(rows(kept / 'summary.csv')[0]['eval_top1']) == 100
    os.rename(f'{data}/train/red', f'{data}/train/a')
    os.rename(f'{data}/val/red', f'{data}/val/a')
    for flag in ('--pretrained-path', '--initial-checkpoint'):
        with pytest.raises(UserError, match="class 'a' is not among the 3 classes"):
            run('fifth', flag, str(trained), '--eval-only', base=PLAIN, data=[data])
