"""A sweep: every configuration once, whoever works on it and whatever stops it; ranked as its numbers say."""
import csv
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest_advise import reset_accelerate

pytest.importorskip('optuna')

import optuna
from optuna.trial import TrialState
from scipy import stats

import timm_amf
import train_amf
from timm_amf.cli import main
from timm_amf.engine.intervals import holm, mean_interval, paired_p
from timm_amf.engine.run import claim_folder
from timm_amf.errors import Diverged, Interrupted, UserError
from timm_amf.search import sweep as module
from timm_amf.search.charts import write_figure
from timm_amf.search.sweep_results import Configuration, Sweep, ranked
from timm_amf.search.sweep_space import Space


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.fixture
def data(images, tmp_path) -> Path:
    """Three splits; those for validation and test hold the same images."""
    folder = tmp_path / 'data'
    folder.mkdir()
    for split, source in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        (folder / split).symlink_to(images / 'colours' / source)
    return folder


@pytest.fixture
def words(data, flags, tmp_path) -> list[str]:
    return ['sweep', str(data), *flags, '--epochs', '1', '--output', str(tmp_path), '--experiment', 'found']


@pytest.fixture
def quick(monkeypatch):
    """Trainings that are a formula: top1 is highest at an LR of 0.01 and rises with the epochs; 1 and above diverge."""
    calls = []

    def train(argv, after_epoch=None, args=None):
        if args.dry_run:
            return
        folder = Path(args.output) / args.experiment
        calls.append((folder.name, args.lr))
        if args.lr >= 1:
            raise Diverged('the loss is not finite in epoch 1')
        folder.mkdir(exist_ok=True)
        (folder / 'args.yaml').write_text('eval_metric: top1')
        timm_amf.Plan(lr=args.lr, epochs=args.epochs).to_yaml(folder / 'plan.yaml')
        rows = []
        for epoch in range(args.epochs):
            top1 = 90 - 10 * abs(math.log10(args.lr) + 2) + args.seed + epoch
            rows.append(f'{epoch},{top1},{100 - top1}')
            (folder / 'summary.csv').write_text('\n'.join(['epoch,eval_top1,eval_loss', *rows]))
            if after_epoch is not None:
                after_epoch(epoch, top1)

    monkeypatch.setattr(train_amf, 'train', train)
    monkeypatch.setattr(module, 'write_figure', lambda *args: [])
    return calls


def test_a_grid_with_seeds(words, tmp_path, capsys):
    """Scores are means over seeds of what the runs' summaries have; the best YAML repeats the best run to the bit."""
    keys = ['--grid', 'lr=0.05,0.0001', 'head.lr=0.1,0.0002', '--seeds', '3,1', '--report']
    assert main([*words, *keys, '--test-split', 'test']) == 0
    out = capsys.readouterr().out
    folder = tmp_path / 'found'
    scores = {}
    for number, (lr, head) in enumerate(itertools.product(('0.05', '0.0001'), ('0.1', '0.0002'))):
        for seed in (3, 1):
            run = folder / f'trial{number}-seed{seed}'
            summary = read(run / 'summary.csv')
            assert float(summary[0]['lr_head']) != float(summary[0]['lr_backbone'])
            plan = timm_amf.Plan.from_yaml(run / 'plan.yaml')
            assert (plan.lr, plan.roles['head'].lr) == (float(lr), float(head))
            assert yaml.safe_load((run / 'args.yaml').read_text())['seed'] == seed
            scores.setdefault((lr, head), []).append(max(float(row['eval_top1']) for row in summary))
    rows = read(folder / 'sweep.csv')
    assert {(row['lr'], row['head.lr']): float(row['mean']) for row in rows} == {
        key: pytest.approx(np.mean(values)) for key, values in scores.items()}
    assert [float(row['mean']) for row in rows] == sorted((float(row['mean']) for row in rows), reverse=True)
    runs = read(folder / 'runs.csv')
    assert len(runs) == 8 and {row['run'] for row in runs} == {path.name for path in folder.glob('trial*')}
    assert (folder / 'sweep.png').read_bytes()[1:4] == b'PNG' and b'<svg' in (folder / 'sweep.svg').read_bytes()

    # Read from its files it is what it was; one page, of the sweep and not of its runs.
    found = Sweep.read(folder)
    assert str(found) in out and [c.runs for c in found.configurations] == [
        {int(r['seed']): {k[5:]: float(v) for k, v in read(folder / r['run'] / 'summary.csv')[0].items()
                          if k.startswith('eval_') and v} for r in runs if r['trial'] == row['trial']} for row in rows]
    assert f'Report: {folder / "report" / "index.html"}' in out and not list(folder.glob('trial*/report'))
    page = (folder / 'report' / 'index.html').read_text(encoding='utf-8')
    for words_ in ('id="sweep_lr"', 'id="sweep_head.lr"', 'p (Holm)', 'Test images', 'What trains'):
        assert words_ in page
    assert [row['lr'] for row in read(folder / 'report' / 'sweep_lr.csv')] == ['0.0001', '0.05']

    best = rows[0]
    assert f'timm-amf train --config {folder / "best.yaml"}' in out
    reset_accelerate()
    train_amf.train(['--config', str(folder / 'best.yaml'), '--experiment', 'again'])
    for name in ('model_best.safetensors', 'last/model.safetensors', 'summary.csv'):
        run = folder / f'trial{best["trial"]}-seed1'
        assert (run / name).read_bytes() == (tmp_path / 'again' / name).read_bytes(), name
    # The test images here are the validation images.
    tested = [row for row in read(folder / 'test.csv') if row['run'].endswith(('seed1', 'seed3'))]
    assert [float(row['top1']) for row in tested] == pytest.approx(
        [float(row['top1']) for s in '13' for row in runs if row['trial'] == best['trial'] and row['seed'] == s])

    capsys.readouterr()
    # Complete, it trains nothing and leaves the test images alone.
    before = {path: path.stat().st_mtime_ns for path in [*folder.glob('trial*/summary.csv'), folder / 'test.csv']}
    assert main([*words, *keys, '--test-split', 'test']) == 0
    again = capsys.readouterr().out
    assert again.strip().splitlines() == out[out.index('\ntrial  lr'):].strip().splitlines()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def _child(words, output, stalls):
    """A process of a sweep, forked from this one, which has imported all that it takes."""
    with open(output, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, 'w', buffering=1) for n in (1, 2))
    original = train_amf.train

    def train(argv, after_epoch=None, args=None):
        def after(epoch, metric):
            after_epoch(epoch, metric)
            if stalls in argv and epoch == 1:
                output.with_suffix('.stalled').touch()
                time.sleep(600)

        original(argv, after_epoch and after, args)

    train_amf.train = train
    os._exit(main(words))


def _start(words, output, stalls=''):
    child = multiprocessing.get_context('fork').Process(target=_child, args=(words, output, stalls))
    child.start()
    return child


def test_killed_and_resumed(words, tmp_path, monkeypatch):
    """The same command goes on in the run that was killed, and finds what a sweep does that never stopped."""
    keys = ['--grid', 'lr=0.05,0.001', '--seeds', '0,1', '--epochs', '3']
    assert main([*words, '--experiment', 'whole', *keys]) == 0
    reset_accelerate()
    monkeypatch.setattr(module, '_HEARTBEAT', 1)
    monkeypatch.setattr(module, '_GRACE', 2)
    child = _start([*words, *keys], tmp_path / 'killed.txt', stalls='trial0-seed1')
    deadline = time.monotonic() + 60
    while not (tmp_path / 'killed.stalled').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    folder = tmp_path / 'found'
    first = folder / 'trial0-seed0' / 'summary.csv'
    assert len(read(first)) == 3 and len(read(folder / 'trial0-seed1' / 'summary.csv')) == 2
    untouched = first.stat().st_mtime_ns

    found, resumed = train_amf.find_resume, []
    monkeypatch.setattr(train_amf, 'find_resume', lambda *a: resumed.append((a[1].name, found(*a))) or resumed[-1][1])
    assert main([*words, *keys]) == 0
    assert sorted((name, source is not None) for name, source in resumed) == [
        ('trial0-seed1', True), ('trial1-seed0', False), ('trial1-seed1', False)]
    assert first.stat().st_mtime_ns == untouched
    for name in ('runs.csv', 'sweep.csv'):
        assert read(folder / name) == read(tmp_path / 'whole' / name)


def test_two_processes_share_the_trials(words, tmp_path):
    keys = ['--grid', 'lr=0.05,0.02,0.01,0.005,0.002,0.001', '--test-split', 'test']
    outputs = [tmp_path / f'{i}.txt' for i in range(2)]
    children = [_start([*words, *keys], output) for output in outputs]
    for child in children:
        child.join(90)
    texts = [output.read_text() for output in outputs]
    assert [child.exitcode for child in children] == [0, 0], texts
    trained = [[line for line in text.splitlines() if line.startswith('trial ') and 'seed' in line] for text in texts]
    trained = [[line for line in lines if ', seed' in line] for lines in trained]
    assert all(trained) and len({line.split()[1] for lines in trained for line in lines}) == 6
    assert sum(map(len, trained)) == 6 and len(read(tmp_path / 'found' / 'runs.csv')) == 6
    study = optuna.load_study(study_name='found', storage=f'sqlite:///{tmp_path / "found" / "study.db"}')
    assert sum(t.state == TrialState.COMPLETE for t in study.trials) == 6
    tables = [text[text.index('\ntrial  lr'):] for text in texts]
    assert tables[0] == tables[1]


def test_a_trial_is_given_to_one(tmp_path, monkeypatch):
    """Also where two processes look at it before either writes."""
    first, second = (module._open_database(f'sqlite:///{tmp_path / "study.db"}', None) for _ in range(2))
    study = optuna.create_study(storage=first)
    study.enqueue_trial({})
    check = type(first).check_trial_is_updatable
    monkeypatch.setattr(  # between the look and the writing
        type(first), 'check_trial_is_updatable', lambda *args: time.sleep(0.3) or check(*args))
    with ThreadPoolExecutor(2) as pool:
        took = pool.map(lambda storage: storage.set_trial_state_values(1, TrialState.RUNNING), (first, second))
        assert sorted(took) == [False, True]


def test_interrupted(words, quick, tmp_path, monkeypatch, capsys):
    original, calls = train_amf.train, []

    def stopped(argv, after_epoch=None, args=None):
        calls.append(argv)
        if len(calls) == 4:
            raise Interrupted(signal.SIGTERM, 'stopped in epoch 1')
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(argv, after_epoch, args)

    monkeypatch.setattr(train_amf, 'train', stopped)
    keys = ['--grid', 'lr=0.1,0.01,0.001']  # three calls look at what it names
    assert [main([*words, *keys]) for _ in range(3)] == [143, 130, 0]
    assert 'the same command goes on' in capsys.readouterr().err
    assert [row['trial'] for row in read(tmp_path / 'found' / 'sweep.csv')] == ['1', '0', '2']


def test_search(words, quick, tmp_path):
    """TPE finds the peak; the same seed draws the same values, however often it stops."""
    options = dict(
        pretrained_path=words[5], epochs=2, output=str(tmp_path), cpu=True, seed=7,
        storage=optuna.storages.InMemoryStorage())
    space = {'lr': 'log:1e-5:1e-1', 'reinit_blocks': '0:2', 'opt': ['sgd', 'adamw']}
    found = timm_amf.sweep(words[1], 'test_resnet', space=space, **options)
    values = [c.values for c in sorted(found.configurations, key=lambda c: c.number)]
    assert len(values) == 20 and len({v['lr'] for v in values}) == 20
    assert all(1e-5 <= v['lr'] <= 0.1 and v['reinit_blocks'] in (0, 1, 2) for v in values)
    assert found.best.values['lr'] == pytest.approx(0.01, rel=0.3)
    assert found.plan.lr == found.best.values['lr']  # to the last digit
    far = [abs(math.log10(v['lr']) + 2) for v in values]
    assert np.mean(far[10:]) < 0.75 * np.mean(far[:10])  # it learns
    del quick[:]
    for trials in (8, 20):  # more trials are added to the study
        found = timm_amf.sweep(words[1], 'test_resnet', space=space, trials=trials, experiment='half', **options)
    assert [c.values for c in sorted(found.configurations, key=lambda c: c.number)] == values and len(quick) == 20


def test_storages(words, quick, tmp_path):
    """A database elsewhere, a journal, an object: the same values, and nothing in the folder."""
    found = []
    for name, storage in (
            ('a', f'sqlite:///{tmp_path / "elsewhere.db"}'), ('b', str(tmp_path / 'journal.log')),
            ('c', optuna.storages.InMemoryStorage())):
        result = timm_amf.sweep(
            words[1], 'test_resnet', space={'lr': optuna.distributions.FloatDistribution(0.01, 0.1)}, trials=3,
            storage=storage, cpu=True, epochs=1, output=str(tmp_path), experiment=name)
        found.append([c.values for c in result.configurations])
        assert not (tmp_path / name / 'study.db').exists()
    assert found[0] == found[1] == found[2] and len(quick) == 9
    assert (tmp_path / 'elsewhere.db').exists() and (tmp_path / 'journal.log').exists()


def test_repeated_draws_are_not_trained(words, quick, tmp_path):
    assert main([*words, '--space', 'lr=0.1,0.01', '--trials', '12']) == 0
    assert sorted(lr for _, lr in quick) == [0.01, 0.1] and len(read(tmp_path / 'found' / 'sweep.csv')) == 2


def test_pruned_and_diverged(words, quick, tmp_path, capsys):
    grid = 'lr=0.01,0.02,0.005,0.03,0.004,1,1e-5'
    assert main([*words, '--epochs', '6', '--grid', grid, '--pruner', 'median', '--seeds', '0,1']) == 0
    rows = {row['lr']: row for row in read(tmp_path / 'found' / 'sweep.csv')}
    assert rows['1']['end'] == 'diverged: seed 0' and rows['1']['mean'] == ''
    # Not in the first third of the epochs, and after five others.
    assert rows['1e-5']['end'] == 'pruned: seed 0, epoch 3' and rows['1e-5']['mean'] == ''
    assert [row['lr'] for row in rows.values()][0] == '0.01' and rows['0.01']['mean'] == '95.5'
    assert len(read(tmp_path / 'found' / 'trial6-seed0' / 'summary.csv')) == 3
    out = capsys.readouterr().out
    assert 'trial 5 (lr=1): diverged: seed 0' in out and 'trial 6 (lr=1e-5): pruned' in out
    # All differences of two seeds are the same here: no spread, no test.
    assert all(row['p'] == 'nan' for lr, row in rows.items() if row['mean'] and lr != '0.01')


def test_the_test_images_are_looked_at_once(words, quick, tmp_path, monkeypatch):
    """When no trial is running any more, and not again when more trials find a better configuration."""
    tested, storage = [], optuna.storages.InMemoryStorage()
    row = Configuration(0, {}, {}, '')
    monkeypatch.setattr(module, 'evaluate_runs', lambda runs, options: tested.append(runs) or [row])
    monkeypatch.setattr(module, 'table', lambda rows: 'the table')

    def run(trials):
        return timm_amf.sweep(
            words[1], 'test_resnet', space={'lr': 'log:1e-5:1e-1'}, trials=trials, storage=storage, cpu=True, epochs=1,
            output=str(tmp_path), experiment='found', test_split='test')

    optuna.create_study(study_name='found', storage=storage, direction='maximize').ask()
    assert run(2).test == '' and 'no test yet' in run(2).notes[0] and not tested
    optuna.load_study(study_name='found', storage=storage).tell(0, state=TrialState.FAIL)
    first = run(2)
    assert tested == [first.runs(first.best)] and 'the table' in str(first) and not first.notes
    assert run(2).test == first.test and len(tested) == 1
    more = run(15)
    assert more.best.number != first.best.number and more.test == first.test and len(tested) == 1
    assert f'Trial {first.best.number} was the best' in more.notes[0]


def test_report_of_what_has_not_ended(tmp_path, capsys):
    (tmp_path / 'trial0-seed0').mkdir()
    assert main(['report', str(tmp_path)]) == 2 and 'the sweep has not ended' in capsys.readouterr().err
    for name in ('sweep.csv', 'runs.csv'):
        (tmp_path / name).write_text('trial,lr,seeds,metric,mean\nx,0.1,1,top1,50\n')
    assert main(['report', str(tmp_path)]) == 2 and 'sweep.csv: is damaged' in capsys.readouterr().err


def test_nothing_is_left(words, quick, tmp_path, capsys):
    assert main([*words, '--grid', 'lr=1,2']) == 2
    assert 'no configuration was trained to its end' in capsys.readouterr().err


@pytest.mark.parametrize('extra, message', [
    ([], 'give --grid KEY=VALUE,... or --space'), (['--grid', 'lr=1', '--space', 'lr=1:2'], 'one of the two'),
    (['--grid', 'lr'], '--grid lr: write KEY=VALUES'), (['--grid', 'lr=0.1,,0.2'], 'different values'),
    (['--grid', 'lr=0.1,0.1'], 'different values'), (['--grid', 'ler=0.1'], 'did you mean lr?'),
    (['--grid', 'seed=1,2'], '--seeds'), (['--grid', 'lr=0.1', '--seeds', '1,1'], 'give different ones'),
    (['--grid', 'lr=0.1', '--seeds', 'x'], '--seeds x'), (['--grid', 'lr=0.1', '--trials', '3'], 'a grid trains all'),
    (['--space', 'lr=2:1', '--trials', '3'], '--space lr=2:1'), (['--space', 'lr=log:0:1'], '--space lr=log:0:1'),
    (['--grid', 'lr=0.1,high'], 'invalid float value'), (['--grid', 'lr=0.1,-1'], 'must be above 0'),
    (['--grid', 'body.lr=0.1'], 'body.lr'), (['--grid', 'backbone.train=all,[-1],[99]'], '99'),
    (['--grid', 'model-ema=yes,no'], 'give true,false'), (['--grid', 'lr=0.1', '--resume', 'auto'], '--resume'),
    (['--grid', 'lr=0.1', '--plan', 'auto'], '--plan auto'), (['--grid', 'lr=0.1', '--budget', '1'], '--budget'),
    (['--grid', 'lr=0.1', '--val-split', 'test'], 'chooses'),
    (['--grid', 'lr=0.1', '--test-split', 'val'], 'chooses by it'),
    (['--grid', 'lr=0.1', '--test-split', 'holdout'], 'holdout'),
    (['--grid', 'lr=0.1', '--output', f'{__file__}/x'], '/x/found: cannot be written (Not a directory); choose'),
    (['--grid', 'lr=0.1', '--storage', 'nothing://x'], 'the database of the sweep cannot be used'),
])
def test_mistakes(words, extra, message, tmp_path, capsys):
    """One line, and nothing was trained."""
    assert main([*words, *extra]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1], err
    assert not list((tmp_path / 'found').glob('trial*'))


def test_what_was_typed_is_named(words, quick, capsys):
    for extra, message in (
            (['--grid', 'lr=fast'], '--grid lr=fast: --lr: invalid'),
            (['--space', 'lr=3:1'], '--space lr=3:1: write two numbers, LOW:HIGH'),
            (['--space', 'lr=log:0:1'], 'the lower one first, above 0')):
        assert main([*words, *extra]) == 2
        assert message in capsys.readouterr().err


def test_runs_and_sweeps_have_folders_of_their_own(words, quick, tmp_path, capsys):
    folder = tmp_path / 'found'
    folder.mkdir()
    (folder / 'plan.yaml').touch()
    assert main([*words, '--grid', 'lr=0.1', '--overwrite']) == 2
    assert f'{folder}: holds a run; name another folder' in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ['plan.yaml']
    (folder / 'plan.yaml').unlink()
    (folder / 'trial0-seed42').mkdir()
    with pytest.raises(UserError, match='found: holds a sweep'), claim_folder(folder, True, None):
        pass
    assert main(['fit', *words[1:]]) == 2 and 'holds a sweep' in capsys.readouterr().err


def test_no_model(data, capsys):
    assert main(['sweep', str(data), '--grid', 'lr=0.1']) == 2
    assert 'no model: name one with --model' in capsys.readouterr().err


def test_without_the_extras(words, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, 'write_figure', write_figure)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert main([*words, '--grid', 'lr=0.1,0.01']) == 0
    assert 'No figure' in capsys.readouterr().out and (tmp_path / 'found' / 'best.yaml').exists()
    monkeypatch.setitem(sys.modules, 'optuna', None)
    monkeypatch.delitem(sys.modules, 'timm_amf.search.sweep')
    assert main([*words, '--grid', 'lr=0.1,0.01']) == 2
    assert "this needs optuna; pip install 'timm_amf[sweep]'" in capsys.readouterr().err


def test_a_mistake_is_not_in_the_way(words, quick):
    assert main([*words, '--grid', 'lr=0.1', 'opt=sgd,nothing']) == 2
    assert main([*words, '--grid', 'lr=0.1', 'opt=sgd,adamw']) == 0


def test_other_settings_are_another_sweep(words, quick, tmp_path, capsys):
    assert main([*words, '--grid', 'lr=0.1,0.01']) == 0
    for other, what in ((['lr=0.1,0.001'], 'values of lr {'), (['lr=0.1,0.01', '--smoothing', '0.2'], 'smoothing None'),
                        (['lr=0.1,0.01', '--seeds', '5'], 'seeds [42] before, [5] now')):
        assert main([*words, '--grid', *other]) == 2
        assert f'holds a sweep with other settings ({what}' in capsys.readouterr().err
    (tmp_path / 'found' / 'test.csv').touch()
    assert main([*words, '--grid', 'lr=0.001', '--overwrite']) == 0
    assert not (tmp_path / 'found' / 'test.csv').exists()
    assert [row['lr'] for row in read(tmp_path / 'found' / 'sweep.csv')] == ['0.001']
    assert [path.name for path in (tmp_path / 'found').glob('trial*')] == ['trial0-seed42']


def test_words(data):
    base = [str(data), '--model', 'resnet18', '--role', 'head.lr=1']
    space = Space(base, {
        'lr': '0.1', 'opt-betas': '0.9 0.99', 'backbone.train': 'all,[-1,-2]', 'model_ema': 'true,false',
        'opt_kwargs': [['a=1', 'b=2']]}, {})
    assert [len(d.choices) for d in space.over.values()] == [1, 1, 2, 2, 1]
    first, *_, last = space.queue(0)
    assert space.words(first)[len(base):] == [
        '--lr=0.1', '--opt-betas', '0.9', '0.99', '--model-ema', '--opt-kwargs', 'a=1', 'b=2', '--role', 'head.lr=1',
        'backbone.train=all']
    assert last['backbone.train'] == '[-1,-2]' and '--model-ema' not in space.words(last)


# -- statistics -------------------------------------------------------------------------------------------------------


def test_holm_is_the_closed_test():
    """The corrected p of a hypothesis is the largest of Bonferroni's over all sets of hypotheses that hold it."""
    rng = np.random.default_rng(0)
    for number in (1, 2, 3, 5, 6):
        for _ in range(20):
            p = rng.uniform(0, 1, number) ** 3
            p[rng.integers(number)] = p[0]  # ties
            sets = [s for size in range(1, number + 1) for s in itertools.combinations(range(number), size)]
            naive = [max(min(1., len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(number)]
            assert holm(list(p)) == pytest.approx(naive)
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.03, math.nan, 0.08], nan_ok=True) and holm([]) == []


@pytest.mark.parametrize('number', [2, 3, 4, 7, 30])
def test_paired_p_is_students(number):
    rng = np.random.default_rng(number)
    for shift in (0, 0.3, 2):
        one, other = rng.normal(70, 1, number), rng.normal(70 + shift, 1, number)
        assert paired_p(list(one), list(other)) == pytest.approx(stats.ttest_rel(one, other).pvalue, abs=1e-12)
    assert math.isnan(paired_p([1., 2.], [2., 3.])) and math.isnan(paired_p([0., 0.], [0., 0.]))


def configuration(number, values, scores, end='complete', **more) -> Configuration:
    return Configuration(number, values, {seed: {'top1': s, 'loss': -s, **more} for seed, s in enumerate(scores)}, end)


def test_ranking():
    scores = {'a': [70., 71., 73.], 'b': [72., 72.5, 75.], 'c': [60., 64., 61.]}
    given = [configuration(i, {'opt': name}, values) for i, (name, values) in enumerate(scores.items())]
    given.insert(1, configuration(3, {'opt': 'd'}, [99.], 'diverged: seed 1'))
    for metric in ('top1', 'loss'):
        found = ranked(given, metric)
        assert [c.values['opt'] for c in found] == ['b', 'a', 'c', 'd']
    b, a, c, d = ranked(given, 'top1')
    assert (b.mean, b.std, b.low, b.high) == pytest.approx(mean_interval(scores['b']))
    raw = [stats.ttest_rel(scores[name], scores['b']).pvalue for name in 'ac']
    assert [a.p, c.p] == pytest.approx(raw) and a.difference == pytest.approx(np.mean(scores['a']) - b.mean)
    assert [a.p_holm, c.p_holm] == pytest.approx(holm(raw)) and b.p is d.mean is None
    text = str(Sweep(Path('x'), 'top1', [b, a, c, d]))
    assert 'diverged: seed 1' in text and f'{b.mean:.2f}' in text and f'{a.p_holm:.2g}' in text
    alone = ranked([configuration(0, {'lr': 1.}, [50.])], 'top1')
    assert alone[0].mean == 50 and alone[0].low is None and '95 %' not in str(Sweep(Path('x'), 'top1', alone))
