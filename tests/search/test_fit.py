"""One line that fine-tunes: never below its floor, an ordinary run, and what it left is what it says."""
import csv
import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

import timm_amf
import train_amf
from timm_amf import fit
from timm_amf.cli import main
from timm_amf.engine.head import C_GRID, logistic_regression
from timm_amf.engine.options import parse_args
from timm_amf.errors import Diverged
from timm_amf.search.fit import CANDIDATES, Candidate, _choose, _contest, _Progress, complete

FLAGS = ['--model', 'test_resnet', '--img-size', '32', '--cpu', '-j', '0', '--batch-size', '8']


@pytest.fixture
def images(tmp_path):
    """An unsplit folder of three classes that differ by colour and stripes."""
    rng = np.random.default_rng(0)
    x = np.arange(40)
    for k, name in enumerate(('ant', 'bee', 'cat')):
        folder = tmp_path / 'images' / name
        folder.mkdir(parents=True)
        for i in range(20):
            wave = np.sin(x * (0.4 + 0.3 * k) + rng.uniform(0, 6))[None, :, None] * 60
            pixels = 128 + wave + rng.normal(0, 30, (40, 40, 3)) + 15 * k
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
    return tmp_path / 'images'


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / 'w.safetensors'
    save_file(timm.create_model('test_resnet').state_dict(), path)
    return str(path)


@pytest.fixture
def words(images, weights, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return ['fit', str(images), *FLAGS, '--pretrained-path', weights, '--output', str(tmp_path), '--experiment', 'run']


def test_fit(words, tmp_path, capsys):
    drawn = importlib.util.find_spec('matplotlib') and importlib.util.find_spec('jinja2')
    assert main([*words, '--epochs', '3', *(['--report'] if drawn else [])]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / 'run'
    with open(folder / 'fit.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert rows[1]['winner'] == 'True' and not any(row['pilot'] for row in rows)  # 3 epochs pay for no pilots
    floor = float(rows[0]['metric'])
    with open(folder / 'mix.csv', newline='') as file:
        shares = {row['share']: float(row['metric']) for row in csv.DictReader(file)}
    assert shares['0.0'] == pytest.approx(floor) and max(shares.values()) >= floor
    assert f'best top1 {max(shares.values()):.3f} of the mix; ' in out
    assert 'frozen features' in out and f'timm-amf evaluate {folder}' in out
    assert out.count('no validation split: 12 images are kept for it, a fifth of each class (--val-share 0.2)') == 1
    assert not list(tmp_path.glob('run-pilots'))
    # An ordinary run: it is evaluated, loaded, and its options repeat the training of the winner to the bit.
    assert main(['evaluate', str(folder)]) == 0
    assert f'{max(shares.values()):.2f}' in capsys.readouterr().out
    assert timm_amf.load(folder).pretrained_cfg['label_names'] == ['ant', 'bee', 'cat']
    if drawn:
        page = (folder / 'report' / 'index.html').read_text(encoding='utf-8')
        assert [f'>{row["candidate"]}<' in page for row in rows] == [True, True, False]
        assert f'>{float(rows[1]["metric"]):.2f}<' in page
        cells = re.findall('<t[hd][^>]*>([^<]*)', page[page.index('share of the fine-tuned weights'):])
        assert cells[3:5] == ['0: frozen features, logistic regression', f'{floor:.2f}'] and 'kept' in cells
    train_amf.train(['--config', str(folder / 'args.yaml'), '--experiment', 'again'])
    for name in ('last/model.safetensors', 'model_best.safetensors', 'summary.csv', 'mix.csv'):
        assert (folder / name).read_bytes() == (tmp_path / 'again' / name).read_bytes(), name


def test_a_batch_size_that_is_given_is_kept(images, tmp_path):
    (tmp_path / 'run.yaml').write_text('batch_size: 128')
    for given in (['--batch-size', '128'], ['-b', '127'], ['-c', str(tmp_path / 'run.yaml')]):
        words = [str(images), *given]
        assert parse_args(complete(words)).batch_size == parse_args(words).batch_size >= 127
    assert parse_args(complete([str(images)])).batch_size == 4


def test_an_interrupted_fit_goes_on(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(_contest.__globals__, '_MANY_UPDATES', 1)
    assert main([*words, '--epochs', '16']) == 0
    whole = tmp_path / 'whole'
    (tmp_path / 'run').rename(whole)
    original, calls = _contest.__globals__['run'], []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setitem(_contest.__globals__, 'run', stopped)
    codes = [main([*words, '--epochs', '16']) for _ in range(2)]
    assert codes == [130, 130] and 'the same command goes on' in capsys.readouterr().err
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'args.yaml').touch()
    assert main([*words, '-b', '4', '--epochs', '17']) == 2
    assert 'holds a run already, begun with --epochs 16 and without --epochs 17 -b 4, which' in capsys.readouterr().err
    shutil.rmtree(tmp_path / 'run')
    assert main([*words, '-j', '1', '--no-progress', '--epochs', '16']) == 0  # no result follows from these
    for name in ('last/model.safetensors', 'model_best.safetensors', 'summary.csv', 'mix.csv'):
        assert (whole / name).read_bytes() == (tmp_path / 'run' / name).read_bytes(), name
    with open(whole / 'fit.csv', newline='') as file:
        rows = list(csv.DictReader(file))[1:]
    assert all(0 <= float(row['pilot']) <= 100 for row in rows)
    assert main([*words, '--epochs', '16']) == 2  # it is complete
    assert 'holds a finished run already; name' in capsys.readouterr().err


@pytest.mark.parametrize('pilots, metric, winner', [
    ((80., 75.), 'top1', 1),  # 4 of 100 images are the standard error
    ((80., 71.), 'top1', 0),
    ((71., 80.), 'top1', 1),
    ((80., float('-inf')), 'top1', 0),  # it diverged
    ((100., 99.), 'top1', 0),
    ((0.7, 0.8), 'loss', 0),
])
def test_choice(images, monkeypatch, pilots, metric, winner):
    """The faster one, unless it is behind by two standard errors."""
    monkeypatch.setitem(_choose.__globals__, 'create_dataset', lambda *args: range(100))
    args = parse_args([str(images), '--model', 'test_resnet', '--eval-metric', metric])
    candidates = [Candidate(str(i), (), pilot, 1.) for i, pilot in enumerate(pilots)]
    assert _choose(candidates, args) is candidates[winner]


@pytest.mark.parametrize('metric', ['top1', 'loss'])
@pytest.mark.parametrize('bad', ['a', 'b'])
def test_a_pilot_that_diverges_is_not_chosen(images, tmp_path, monkeypatch, metric, bad):
    def train(candidate, *_, **__):
        if candidate.name == bad:
            raise Diverged('the loss is not finite in epoch 1')
    for name, value in (('_train', train), ('_MANY_UPDATES', 1), ('best_epoch', lambda _: dict(top1=50., loss=1.))):
        monkeypatch.setitem(_contest.__globals__, name, value)
    args = parse_args([str(images), '--val-share', '0.2', '--model', 'test_resnet', '--epochs', '16', '--eval-metric',
                       metric])
    progress = _Progress(tmp_path / 'pilots', [], [], [Candidate('a', ()), Candidate('b', ())])
    _contest(progress, args)
    assert {progress.winner, bad} == {'a', 'b'}


def test_the_twin_in_python(images, weights, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    result = fit(
        str(images), 'test_resnet', img_size=32, cpu=True, workers=0, batch_size=8, pretrained_path=weights, epochs=2,
        output=str(tmp_path), experiment='run')
    with open(tmp_path / 'run' / 'summary.csv') as file:
        rows = file.read()
    train_amf.train([
        str(images), '--plan', 'auto', *FLAGS, '--pretrained-path', weights, '--epochs', '2', '--output', str(tmp_path),
        '--experiment', 'auto'])
    assert (tmp_path / 'auto' / 'summary.csv').read_text() == rows
    assert result.metric >= result.floor and result.winner in result.candidates
    assert result.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_an_unsplit_table_in_groups(words, images, tmp_path):
    """A fifth validates, whole groups of it, and the run, which has the table's name, says which."""
    table = tmp_path / 'animals.csv'
    rows = [f'{path},{path.parent.name},{path.parent.name}{int(path.stem) // 4}' for path in images.glob('*/*.png')]
    table.write_text('\n'.join(['path,label,clip', *rows]))
    words[1] = str(table)
    assert main([*words[:-2], '--epochs', '2', '--group', 'clip']) == 0
    with open(tmp_path / 'animals' / 'split.csv', newline='') as file:
        drawn = list(csv.DictReader(file))
    sides: dict[str, set] = {}
    for row in drawn:
        clip = f'{row["label"]}{int(row["path"].rpartition("/")[2].partition(".")[0]) // 4}'
        sides.setdefault(clip, set()).add(row['split'])
    assert len(drawn) == 60 and all(len(splits) == 1 for splits in sides.values())
    assert 0 < sum(row['split'] in ('val', 'validation') for row in drawn) <= 20


@pytest.mark.parametrize('flags, message', [
    (['--budget', '0'], 'must be above 0'), (['--val-share', '1.5'], 'val_share'),
    (['--model', 'nothing_such'], 'is unknown'), (['--output', f'{__file__}/x'], 'choose another --output'),
])
def test_mistakes(words, flags, message, capsys, tmp_path):
    assert main([*words, *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / 'run').exists()


def test_a_budget_sets_the_epochs(words, tmp_path):
    assert main([*words, '--budget', '0.05']) == 0
    epochs = json.loads(json.dumps(timm_amf.Plan.from_yaml(tmp_path / 'run' / 'plan.yaml').epochs))
    assert 3 <= epochs <= 100


def test_train_within_a_budget(words, tmp_path):
    """A resumed run keeps its epochs, however fast the machine is then."""
    plain = ['train', *words[1:], '--val-share', '0.2', '--budget', '0.03']
    assert main(plain) == 0
    plan = tmp_path / 'run' / 'plan.yaml'
    before = timm_amf.Plan.from_yaml(plan).epochs
    assert 1 <= before
    assert main([*plain[:-1], '9', '--resume', 'auto']) == 0
    assert timm_amf.Plan.from_yaml(plan).epochs == before


# -- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('classes', [2, 5])
def test_logistic_regression_is_scikit_learns(classes):
    """Weights for raw features give the probabilities of the regression on standardised ones."""
    rng = np.random.default_rng(classes)
    labels = np.arange(60) % classes
    features = (rng.normal(size=(60, 8)) * np.arange(1, 9) + labels[:, None]).astype(np.float32)
    features[:, 3] = 7  # constant
    weight, bias, c = logistic_regression(features, labels, classes + 1)
    assert c in C_GRID and not weight[classes].any() and not bias[classes]
    scale = features.std(0) + (features.std(0) == 0)
    standard = (features - features.mean(0)) / scale
    own = torch.from_numpy(features @ weight[:classes].T + bias[:classes]).softmax(1).numpy()
    theirs = LogisticRegression(C=c, max_iter=300, tol=1e-3).fit(standard, labels).predict_proba(standard)
    assert np.abs(own - theirs).max() < 1e-3


@pytest.mark.parametrize('model, kwargs', [
    ('test_vit', []), ('amf', ["backbones=('test_resnet','test_resnet')", 'policy=test_resnet']),
    ('spottune', ['backbone=test_resnet', 'policy=test_resnet']),
])
def test_head_starts(images, tmp_path, monkeypatch, model, kwargs, capsys):
    """Zero: a loss of log(classes). Probe: the regression's accuracy before any step."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    base = [str(images), '--val-share', '0.3', '--model', model, *(['--model-kwargs', *kwargs] if kwargs else []),
            '--img-size', {'test_vit': '160'}.get(model, '32'), '-b', '16', '--epochs', '1', '--cpu', '-j', '0',
            '--tracker', 'none', '--output', str(tmp_path), '--lr', '1e-30', '--warmup-epochs', '0', '--smoothing', '0']
    train_amf.train([*base, '--experiment', 'zero', '--head-start', 'zero'])
    with open(tmp_path / 'zero' / 'summary.csv', newline='') as file:
        row = next(csv.DictReader(file))
    assert float(row['eval_loss']) == pytest.approx(np.log(3), abs=1e-5)
    train_amf.train([*base, '--experiment', 'probe', '--head-start', 'probe', '--norms', 'frozen'])
    out = capsys.readouterr().out
    assert 'frozen features, logistic regression: eval loss' in out
    with open(tmp_path / 'probe' / 'summary.csv', newline='') as file:
        row = next(csv.DictReader(file))
    assert f'top1 {float(row["eval_top1"]):.2f}' in out.split('logistic regression')[1].splitlines()[0]
    assert float(row['eval_loss']) < np.log(3)


def test_a_mix_is_undone_when_the_run_goes_on(words, tmp_path, capsys):
    flags = [*words[1:], '--head-start', 'probe', '--norms', 'frozen', '--wise-ft', '--opt', 'adamw', '--lr', '1e-3',
             '--val-share', '0.2', '--warmup-epochs', '0', '--tracker', 'none']
    train_amf.train([*flags, '--epochs', '2'])
    shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
    train_amf.train([*flags, '--epochs', '2', '--resume', 'auto'])  # nothing is left to train
    for name in ('model_best.safetensors', 'model_tuned.safetensors', 'model_start.safetensors'):
        assert (tmp_path / 'copy' / name).read_bytes() == (tmp_path / 'run' / name).read_bytes(), name
    start, tuned, best = (load_file(tmp_path / 'run' / f'model_{n}.safetensors') for n in ('start', 'tuned', 'best'))
    with open(tmp_path / 'run' / 'mix.csv', newline='') as file:
        share = next(float(row['share']) for row in csv.DictReader(file) if row['kept'] == 'True')
    for name, tensor in best.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, start[name] + share * (tuned[name] - start[name]), atol=1e-6), name


def test_what_is_told_of_a_mix_is_of_the_mix(words, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_amf.engine.wise.SHARES', (0.25, 0.5))  # so that it is not the best epoch
    run = timm_amf.train(words[1], config=None, **{
        'model': 'test_resnet', 'pretrained_path': words[words.index('--pretrained-path') + 1], 'val_share': 0.2,
        'head_start': 'probe', 'norms': 'frozen', 'wise_ft': True, 'opt': 'adamw', 'lr': 1e-2, 'epochs': 1,
        'img_size': 32, 'output': tmp_path, 'experiment': 'run', 'cpu': True, 'tracker': 'none', 'workers': 0})
    (found,) = timm_amf.evaluate(run.folder)
    epoch = list(csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))[0]
    assert found.loss == pytest.approx(run.metrics['loss'], rel=1e-5) != pytest.approx(float(epoch['eval_loss']))
    assert found.macro_f1 == pytest.approx(run.metrics['macro_f1'])
    timm_amf.publish(run.folder, 'me/mix', 'mit', dry_run=tmp_path / 'card')
    (told, *_), = (json.loads((tmp_path / 'card' / 'metrics.json').read_text())['results'],)
    assert told['top1'] == pytest.approx(found.top1) and 'of the way there from the start' in told['how']
    summary = json.loads((tmp_path / 'card' / 'metrics.json').read_text())['summary']
    assert summary['eval_loss'] == pytest.approx(found.loss, rel=1e-5)


def test_a_network_that_an_epoch_spoils_gets_lower_lrs(words, tmp_path, monkeypatch, capsys):
    module = importlib.import_module('timm_amf.search.fit')
    monkeypatch.setattr(module, 'CANDIDATES', tuple((name, ('--lr', '10')) for name, _ in CANDIDATES))
    monkeypatch.setattr(module, '_LOWER', (('LR 9', ('--lr', '9')), module._LOWER[-1]))
    monkeypatch.setattr(module, '_KEPT', 0.99)
    monkeypatch.setattr(module, '_COLLAPSED', 0.99)
    assert main([*words, '--epochs', '2']) == 0
    out = capsys.readouterr().out
    assert 'LR 3e-4 is too high; once more with LR 9' in out and 'LR 9 is too high; once more with LR 3e-5' in out
    with open(tmp_path / 'run' / 'fit.csv', newline='') as file:
        _, *tried, winner = csv.DictReader(file)
    assert winner['flags'] == '--lr 3e-5' and winner['winner'] == 'True'
    collapsed = [row for row in tried if row['metric']]
    assert [row['flags'] for row in collapsed] == ['--lr 10', '--lr 9']
    for row in (*collapsed, winner):
        assert float(row['seconds']) > 0 and f'{row["candidate"]} ' in out.partition('validation ')[2]
    assert 'lr: 3.0e-05' in (tmp_path / 'run' / 'plan.yaml').read_text()


def test_pilots_are_not_published(words, monkeypatch):
    """Nor is what a budget times."""
    published = []
    monkeypatch.setattr('timm_amf.hub.publish.check_flags', lambda args: None)
    monkeypatch.setattr('timm_amf.hub.publish.publish_finished', lambda args, folder: published.append(folder.name))
    for name in ('_MANY_EPOCHS', '_MANY_UPDATES'):
        monkeypatch.setattr(f'timm_amf.search.fit.{name}', 1)
    publish = ['--publish', 'a/b', '--publish-license', 'mit']
    assert main([*words, '--epochs', '6', *publish]) == 0
    assert main(['train', *words[1:], '--val-share', '.2', '--budget', '0.001', '--overwrite', *publish]) == 0
    assert published == ['run', 'run']


def test_a_given_lr_is_the_only_candidate(words, tmp_path, capsys):
    assert main([*words, '--epochs', '2', '--lr', '10']) == 0
    assert 'once more' not in capsys.readouterr().out
    with open(tmp_path / 'run' / 'fit.csv', newline='') as file:
        assert [row['candidate'] for row in csv.DictReader(file)] == ['frozen features', 'LR 10']


def test_what_is_not_of_a_run_is_left(words, images, tmp_path, capsys, monkeypatch):
    before = sorted(images.rglob('*'))
    where = ['fit', str(images), *words[2:-4], '--epochs', '1', '--output', str(tmp_path)]
    assert main(where) == 2 and 'holds the images' in capsys.readouterr().err
    assert sorted(images.rglob('*')) == before
    for name in ('run', 'run-pilots'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'notes.txt').write_text('mine')
    assert main([*words, '--epochs', '1']) == 2 and 'run-pilots' in capsys.readouterr().err
    shutil.rmtree(tmp_path / 'run-pilots')
    assert main([*words, '--epochs', '1']) == 0 and main([*words, '--epochs', '1', '--overwrite']) == 0
    assert (tmp_path / 'run' / 'notes.txt').read_text() == 'mine'
    (tmp_path / 'run-pilots').mkdir()
    (tmp_path / 'run-pilots' / 'fit.json').write_text('{}')  # of another fit, which was interrupted
    assert main([*words, '--epochs', '1']) == 2 and (tmp_path / 'run-pilots' / 'fit.json').exists()
