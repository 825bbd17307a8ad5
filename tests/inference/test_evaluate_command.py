"""`timm-amf evaluate`: files beside the table, what the policy did, images of another folder, metrics of training."""
import csv
import json
import shutil

import numpy as np
import pytest
import yaml
from conftest_engine import reset_accelerate
from sklearn.metrics import balanced_accuracy_score, f1_score

import train_amf
from timm_amf.cli import main
from timm_amf.data.sources import FileSource
from timm_amf.engine.evaluate_runs import RunOptions, evaluate_runs, evaluations, table

OPTIONS = RunOptions(cpu=True)


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('kind', ['amf', 'spottune', 'plain'])
def test_files_beside_the_table(runs, kind, tmp_path, capsys):
    run = str(runs[kind])
    for name in ('r.json', 'r.csv'):
        capsys.readouterr()
        assert main(['evaluate', run, '--cpu', '--results-file', str(tmp_path / name)]) == 0
    text = capsys.readouterr().out
    found, = evaluations([run], OPTIONS)
    as_json, as_csv = json.loads((tmp_path / 'r.json').read_text()), rows(tmp_path / 'r.csv')
    assert [row['component'] for row in as_csv] == ['', 'stripes', 'blobs']
    for one, two, row in zip(as_json['results'], as_csv, found.rows(), strict=True):
        assert one['macro_f1'] == float(two['macro_f1']) == row.macro_f1
        assert one['ece_mended'] == float(two['ece_mended']) and one['weights'] == two['weights'] == 'best'
    classes = rows(tmp_path / 'r.classes.csv')
    assert [row['class'] for row in classes] == found.class_names == [row['class'] for row in as_json['classes']]
    for row in classes:
        assert f'{float(row["accuracy"]):.2f}' in next(line for line in text.splitlines() if row['class'] in line)

    # What the policy did is what the run itself recorded of the epoch of these weights.
    if kind == 'plain':
        assert not as_json['policy'] and not (tmp_path / 'r.policy.csv').exists() and found.decisions is None
        return
    best = max(rows(runs[kind] / 'summary.csv'), key=lambda row: float(row['eval_top1']))
    recorded = next(row for row in rows(runs[kind] / 'policy.csv') if row['epoch'] == best['epoch'])
    policy, = as_json['policy']
    numbers = {name: value for name, value in policy.items() if name != 'run'}
    assert {name: float(recorded[name]) for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    assert rows(tmp_path / 'r.policy.csv')[0].keys() == policy.keys()
    name = 'stripes_assigned_1' if kind == 'amf' else 'blobs_probability_2'
    assert name in policy and f'{policy[name]:.3f}' in text
    of_blobs = found.decisions[found.component_of == 1]
    for column, mean in zip(found.decision_names, of_blobs.mean(0)):
        assert policy[f'blobs_{column}'] == pytest.approx(mean, abs=1e-6)
    if kind == 'amf':
        most = (found.decisions.argmax(1) == 1)[found.component_of == 0].mean()
        assert policy['stripes_assigned_1'] == pytest.approx(most)
    else:
        assert sum(policy[f'images_{i}'] for i in range(5)) == 25 and f'{policy["tuned_blocks"]:.2f}' in text


def test_one_pass_has_all_that_a_report_draws(runs):
    amf, plain, both = evaluations([runs['amf'], runs['plain']], OPTIONS, ensemble=True)
    assert amf.paths == plain.paths and len(amf.paths) == 25 and amf.components == ['stripes', 'blobs']
    assert amf.probabilities.shape == (25, 5) and amf.probabilities.sum(1) == pytest.approx(np.ones(25))
    assert both.probabilities == pytest.approx((amf.probabilities + plain.probabilities) / 2, abs=1e-6)
    assert amf.decisions.shape == (25, 2) and both.decisions is None and not both.policy()
    assert amf.confusion().sum() == amf.reliability()['images'].sum() == 25
    assert (amf.confusion().sum(1) == np.bincount(amf.targets, minlength=5)).all()


def test_what_is_printed(runs, capsys):
    found = evaluate_runs([runs['plain'], runs['amf']], OPTIONS)
    assert [row.run.rpartition('/')[2] for row in found if not row.component] == ['plain', 'amf']
    text = table(found)
    for row in found:
        assert f'{row.balanced_accuracy:.2f}' in text and f'{row.macro_f1_low:.1f} to {row.macro_f1_high:.1f}' in text
        assert row.component or row.temperature is None or (
            f'at temperature {row.temperature:.2f}, {row.ece_mended:.2f} %' in text)
    assert max(map(len, text.splitlines()[1:])) < 260
    assert main(['evaluate', str(runs['plain']), '--cpu', '--img-size', '16', '--crop-pct', '1']) == 0
    smaller = capsys.readouterr().out
    assert main(['evaluate', '--device', 'cpu', str(runs['plain'])]) == 0  # flags may come first
    assert capsys.readouterr().out != smaller


def test_images_of_another_folder(run_of_colours, tmp_path, capsys, caplog):
    """Whatever the run's own images were: all of a folder without splits, those of the split of one that has it."""
    run, data = run_of_colours
    flat, drawn = tmp_path / 'flat', tmp_path / 'drawn'
    shutil.copytree(data / 'validation', flat)
    for path in list(flat.rglob('*.png')):  # a folder of the same names would be taken for the run's own, moved
        path.rename(path.with_name(f'new{path.name}'))
    expected = evaluate_runs([run], OPTIONS)[0]
    assert expected.images == 18 and expected.top1 > 50
    metrics = (expected.loss, expected.top1, expected.macro_f1)

    def evaluated(folder, where, split=None):
        row, = evaluate_runs([folder], RunOptions(cpu=True, data_dir=str(where), split=split))
        return row.images, (row.loss, row.top1, row.macro_f1)

    assert evaluated(run, flat) == (18, metrics)
    assert 'has no folders of splits: all of its images are evaluated' in caplog.text
    # A run whose validation images were drawn from its training images, and are listed in its folder.
    reset_accelerate()
    train_amf.train(['--config', str(run / 'args.yaml'), '--data-dir', str(data / 'train'), '--val-share', '0.34',
                     '--epochs', '1', '--output', str(tmp_path), '--experiment', 'drawn'])
    shutil.copy(run / 'model_best.safetensors', drawn / 'model_best.safetensors')
    own, = evaluate_runs([drawn], OPTIONS)
    assert own.images == 6
    assert evaluated(drawn, flat) == (18, metrics)
    for folder in ('train', 'validation'):
        shutil.copytree(flat, tmp_path / 'split' / folder)
    assert evaluated(drawn, tmp_path / 'split') == (18, metrics)
    moved = shutil.copytree(data / 'train', tmp_path / 'moved')
    assert evaluated(drawn, moved) == (6, (own.loss, own.top1, own.macro_f1))
    (flat / 'red/new0.png').write_text('no image')
    words = ['evaluate', str(drawn), '--data-dir', str(flat), '--cpu']
    assert main(words) == 2
    assert 'new0.png (not an image); mend or remove it, or go on without' in capsys.readouterr().err
    assert main([*words, '--skip-bad-images']) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[1] == '17'
    (flat / 'red').rename(flat / 'rouge')
    assert main(words) == 2
    assert "class 'rouge' is not among the 3 classes" in capsys.readouterr().err


def test_a_relative_folder_is_found_from_elsewhere(run_of_colours, tmp_path, monkeypatch, capsys):
    run, data = run_of_colours
    for given, key in (([data.name], 'data_dir'), ([f'--component=name=c,path={data.name},per_class=4'], 'component')):
        monkeypatch.chdir(tmp_path)
        options = {k: v for k, v in yaml.safe_load((run / 'args.yaml').read_text()).items() if k != 'data_dir'}
        (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(options))
        reset_accelerate()
        train_amf.train([*given, '--config', 'recipe.yaml', '--epochs', '1', '--output', str(tmp_path), '--experiment',
                         key])
        assert str(data) in str(yaml.safe_load((tmp_path / key / 'args.yaml').read_text())[key])
        monkeypatch.chdir('/')
        assert evaluate_runs([tmp_path / key], OPTIONS)[0].images == (18 if key == 'data_dir' else 12)
    # A run of an older version has it as it was given: the message says where it was looked for.
    text = (tmp_path / 'data_dir/args.yaml').read_text()
    (tmp_path / 'data_dir/args.yaml').write_text(text.replace(str(data), data.name))
    assert main(['evaluate', str(tmp_path / 'data_dir'), '--cpu']) == 2
    assert f'--data-dir: {data.name} does not exist in /; name a folder' in capsys.readouterr().err


@pytest.mark.parametrize('metric, of', [
    ('balanced_accuracy', balanced_accuracy_score),
    ('macro_f1', lambda t, p: f1_score(t, p, average='macro')),
])
def test_the_best_epoch_by_the_metric(run_of_colours, tmp_path, capsys, metric, of):
    run, data = run_of_colours
    for k, name in enumerate(('red', 'green')):  # unequal classes: the accuracy is another number
        for i in range(3 + k):
            (data / 'validation' / name / f'{i}.png').unlink()
    reset_accelerate()
    train_amf.train(['--config', str(run / 'args.yaml'), '--epochs', '3', '--output', str(tmp_path), '--experiment',
                     'm', '--eval-metric', metric, '--checkpoint-hist', '3'])
    text = capsys.readouterr().out
    table = rows(tmp_path / 'm/summary.csv')
    values = [float(row[f'eval_{metric}']) for row in table]
    assert f'best {metric} {max(values):.3f}' in text and f'{metric} {values[0]:.2f}' in text
    found, = evaluations([tmp_path / 'm'], OPTIONS)
    assert max(values) == pytest.approx(100 * of(found.targets, found.predicted))
    assert values != [float(row['eval_top1']) for row in table]


def test_weights_are_evaluated_in_one_look_at_each_image(runs, folders, tmp_path, monkeypatch):
    looks = []
    open_file = FileSource.open
    monkeypatch.setattr(FileSource, 'open', lambda self, i: looks.append(self.filename(i)) or open_file(self, i))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    weights = runs['plain'] / 'model_best.safetensors'
    assert main([
        'evaluate', '--component', f'name=stripes,path={folders / "stripes"}', '--component',
        f'name=blobs,path={folders / "blobs"}', '--model', 'test_resnet', '--initial-checkpoint', str(weights),
        '--img-size', '32', '--cpu', '-j', '0']) == 0
    assert len(looks) == len(set(looks)) == 25
