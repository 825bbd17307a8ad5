"""`timm-amf sweep DIR`: flags and Plan settings of `timm-amf train` over a grid, or by Optuna's search.

    timm-amf sweep DIR --model resnet50 --pretrained --epochs 20 --grid lr=1e-3,1e-2 head.lr=0.01,0.1 --seeds 0,1,2
    timm-amf sweep DIR --model resnet50 --pretrained --epochs 20 --space lr=log:1e-4:1e-1 --trials 30

A trial is a configuration: one run folder for each seed, and as its score the mean of their best epochs on the
validation images. All trials wait in the queue of an Optuna study from the start on, which gives each to one process,
however many work on it. `GridSampler` would not: it hands out what runs elsewhere once nothing else is left.
"""
import argparse
import contextlib
import importlib
import io
import json
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Optional, Union

import optuna
from filelock import FileLock
from optuna.distributions import distribution_to_json
from optuna.exceptions import ExperimentalWarning, TrialPruned
from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from optuna.trial import Trial, TrialState
from sqlalchemy.event import listen

from timm_amf.data import create_dataset, data_spec_from_args, splits_from_args
from timm_amf.engine.build import input_channels
from timm_amf.engine.config_file import args_content
from timm_amf.engine.evaluate_runs import RunOptions, evaluate_runs, table
from timm_amf.engine.options import build_parser, parse_args
from timm_amf.engine.run import check_kind, folder_by_data
from timm_amf.engine.run_folder import best_epoch, is_run
from timm_amf.errors import Diverged, Interrupted, UserError
from timm_amf.files import writing
from timm_amf.flags import words_of
from timm_amf.report import check_installed, report
from timm_amf.search.charts import sweep_charts, write_figure
from timm_amf.search.sweep_results import Configuration, Sweep, ranked, write_rows
from timm_amf.search.sweep_space import Space, pairs
from timm_amf.text import differences
from timm_amf.tuning.plan_args import common_plan

__all__ = ['main', 'sweep']

# Seconds between two signs of life of a process, and without one until its trial is another's.
_HEARTBEAT, _GRACE = 15, 60
_PRUNERS = {  # of the epochs of a run
    'none': lambda epochs: NopPruner(),
    'median': lambda epochs: MedianPruner(n_warmup_steps=epochs // 3),
    'hyperband': lambda epochs: HyperbandPruner()}
_REFUSED = {'resume': '--resume', 'dry_run': '--dry-run', 'eval_only': '--eval-only', 'publish': '--publish',
            'finds_plan': '--plan auto', 'budget': '--budget'}
# What the scores do not follow from.
_ANYWHERE = ('overwrite', 'no_progress', 'workers', 'output', 'experiment', 'seed', 'tracker', 'report')


class _Repeated(Exception):
    """A trial that another one makes needless."""


def _open_database(url: str, on_stale: Callable) -> RDBStorage:
    sqlite = url.startswith('sqlite')
    try:
        storage = RDBStorage(
            url, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE, heartbeat_stale_trial_callback=on_stale,
            engine_kwargs={'connect_args': {'timeout': 60, 'isolation_level': None}} if sqlite else None)
    except ImportError as e:
        raise UserError(f'--storage: the driver of this database is missing ({e})') from e
    if sqlite:  # it has no SELECT FOR UPDATE, by which Optuna gives a trial to one process only
        listen(storage.engine, 'begin', lambda connection: connection.exec_driver_sql('BEGIN IMMEDIATE'))
    return storage


class _Worker:
    """One of the processes that work on a sweep; for the arguments see `sweep`."""

    def __init__(
            self,
            space: Space,
            seeds: Sequence[int],
            trials: Optional[int],
            pruner: str,
            storage: Union[str, BaseStorage, None],
            test_split: Optional[str],
    ):
        self.space, self.args = space, space.args
        self.seeds, self.metric = list(seeds) or [self.args.seed], self.args.eval_metric
        self.trials, self.storage, self.test_split = trials or 20, storage, test_split
        self._check(trials, pruner)
        self.folder = folder_by_data(self.args, 'sweep')
        check_kind(self.folder, 'sweep')
        self.lock = FileLock(self.folder / 'sweep.lock')
        self.pruner = _PRUNERS[pruner](common_plan(self.args).epochs)
        self.retry = RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)
        self.number: Optional[int] = None  # of the trial that it trains

    def _check(self, trials: Optional[int], pruner: str) -> None:
        if 'model' not in self.args.explicit:
            raise UserError('no model: name one with --model, or a recipe with --config')
        if int(os.environ.get('WORLD_SIZE', 1)) > 1:
            raise UserError('a process of a sweep trains on one device; start the command several times instead')
        for name, flag in _REFUSED.items():
            if getattr(self.args, name):
                raise UserError(f'{flag}: is nothing for a sweep; leave it out')
        if trials is not None and (self.space.is_grid or trials < 1):
            raise UserError('--trials: give 1 or more with --space; a grid trains all its configurations')
        if self.args.report:
            check_installed()
        if pruner not in _PRUNERS:
            raise UserError(f'--pruner {pruner}: unknown; choose from {", ".join(_PRUNERS)}')
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError('--seeds: give different ones')
        chooses = splits_from_args(self.args)[1]
        if chooses == 'test':
            raise UserError('--val-split: a sweep chooses by it, so it must not be test; try --val-share 0.2')
        if self.test_split:
            args = parse_args([*self.space.given, '--val-split', self.test_split])
            split = splits_from_args(args)[1]
            if split == chooses:
                raise UserError(f'--test-split {self.test_split}: the sweep chooses by it; give another')
            create_dataset(data_spec_from_args(args), split, input_channels(args))

    def run(self) -> Sweep:
        study, told = self._open_study(), False
        while True:
            states = {trial.state for trial in study.get_trials(deepcopy=False)}
            if TrialState.WAITING in states:
                self._try_next(study)
            elif TrialState.RUNNING in states and self.heartbeats:
                if not told:
                    print('the last trials run elsewhere, or were killed a moment ago: waiting for them', flush=True)
                told = True
                time.sleep(1)
                optuna.storages.fail_stale_trials(study)
            else:
                return self._finish(study)

    # -- the study ----------------------------------------------------------------------------------------------------

    def _open_study(self) -> optuna.Study:
        """The study of the folder's name; its first process makes it and puts all trials in its queue."""
        with writing(self.folder, 'choose another --output'):
            self.folder.mkdir(parents=True, exist_ok=True)
        name, args = self.folder.name, self.args
        given = {key: getattr(args, key) for key in args.explicit - set(_ANYWHERE)}
        given = args_content(argparse.Namespace(**given, recipe=args.recipe, explicit=set(given)))
        over = {f'values of {key}': distribution_to_json(over) for key, over in self.space.over.items()}
        asked = json.loads(json.dumps({**given, **over, 'seeds': self.seeds}))
        with self.lock:
            storage = self._open_storage()
            if args.overwrite:
                with contextlib.suppress(KeyError):
                    optuna.delete_study(study_name=name, storage=storage)
                for run in self.folder.glob('trial*-seed*'):
                    shutil.rmtree(run)
                for file in ('sweep.csv', 'runs.csv', 'test.csv'):  # a report would read them
                    (self.folder / file).unlink(missing_ok=True)
            known = {s.study_name: s.user_attrs.get('asked') for s in optuna.get_all_study_summaries(storage)}
            if name not in known:
                for values in self.space.samples():  # mistakes are found before anything is trained
                    self._train([*self.space.words(values), '--dry-run'])
            elif known[name] not in (asked, None):
                before = known[name]
                differing = differences({**dict.fromkeys(asked), **before}, {**dict.fromkeys(before), **asked})
                raise UserError(f'{self.folder}: holds a sweep with other settings ({"; ".join(differing)}); name '
                                'another with --experiment, or add --overwrite')
            study = optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, pruner=self.pruner,
                direction='minimize' if self.metric == 'loss' else 'maximize')
            study.set_user_attr('asked', asked)
            queued = {trial.user_attrs.get('place') for trial in study.get_trials(deepcopy=False)}
            for place, params in enumerate(self.space.queue(self.trials)):
                if place not in queued:
                    study.enqueue_trial(params, user_attrs={'place': place})
        return study

    def _open_storage(self) -> BaseStorage:
        url = self.storage or f'sqlite:///{self.folder / "study.db"}'
        self.heartbeats = isinstance(url, str) and '://' in url and not url.startswith('redis')
        if not isinstance(url, str):
            return url
        if not self.heartbeats:
            return JournalStorage(JournalRedisBackend(url) if '://' in url else JournalFileBackend(url))
        return _open_database(url, self.retry)

    # -- a trial ------------------------------------------------------------------------------------------------------

    def _try_next(self, study: optuna.Study) -> None:
        self.number = None
        try:
            study.optimize(self._objective, n_trials=1, catch=(_Repeated,))
        except (Exception, KeyboardInterrupt) as e:
            if self.number is not None:  # whatever stopped it, it goes back into the queue
                self.retry(study, study.trials[self.number])
            if isinstance(e, Interrupted):
                raise Interrupted(e.signum, 'stopped; the same command goes on where it stopped') from e
            raise

    def _objective(self, trial: Trial) -> float:
        study, place = trial.study, trial.user_attrs.get('place')
        if place is None:  # the queue was empty: another process was faster
            raise _Repeated
        self.number = trial.number
        # By the trial, so that neither two processes nor a second start draw the same values.
        study.sampler = optuna.samplers.TPESampler(seed=self.args.seed + place)
        values = self.space.suggest(trial)
        for other in study.get_trials(deepcopy=False)[:trial.number]:
            if other.params == trial.params and other.state != TrialState.FAIL:
                raise _Repeated
        runs = dict(trial.user_attrs.get('runs', {}))  # of a trial that was stopped, what is done
        for seed in self.seeds:
            if str(seed) not in runs:
                runs[str(seed)] = self._run(trial, place, seed, values)
                trial.set_user_attr('runs', runs)
        return fmean(run[self.metric] for run in runs.values())

    def _run(self, trial: Trial, place: int, seed: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Train a configuration with a seed; the metrics of its best epoch."""
        words, name = [*self.space.words(values), '--seed', str(seed)], f'trial{place}-seed{seed}'
        epochs = common_plan(parse_args(words)).epochs
        before, last = self.seeds.index(seed) * epochs, seed == self.seeds[-1]
        configuration = Configuration(place, dict(values), {}, '')

        def after_epoch(epoch: int, metric: Optional[float]) -> None:
            if metric is None:
                return
            trial.report(metric, before + epoch)
            if trial.should_prune() and not (last and epoch + 1 >= epochs):
                raise TrialPruned(f'pruned: seed {seed}, epoch {epoch + 1}')

        try:
            self._train([*words, '--output', str(self.folder), '--experiment', name, '--resume', 'auto'], after_epoch)
        except (Diverged, TrialPruned) as e:
            end = str(e) if isinstance(e, TrialPruned) else f'diverged: seed {seed}'
            trial.set_user_attr('end', end)
            print(f'trial {place} ({configuration}): {end}', flush=True)
            raise TrialPruned(end) from e
        found = best_epoch(self.folder / name)
        print(f'trial {place} ({configuration}), seed {seed}: {self.metric} {found[self.metric]:.4g}', flush=True)
        return found

    def _train(self, words: Sequence[str], after_epoch: Optional[Callable] = None) -> None:
        args = parse_args(words)
        args.report = False  # of the sweep, not of its runs
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module('train_amf').train(words, after_epoch, args)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, study: optuna.Study) -> Sweep:
        """Rank, and write what was found; the first process that is here evaluates on the test images."""
        found = Sweep(self.folder, self.metric, ranked(self._configurations(study), self.metric), self.args.model)
        if not found.configurations or found.best.mean is None:
            raise UserError(f'{self.folder}: no configuration was trained to its end; lower the LRs, or do not prune')
        with self.lock:
            found.write()
            found.notes += write_figure(
                sweep_charts(found), *(self.folder / f'sweep.{kind}' for kind in ('png', 'svg')))
            if all(map(is_run, found.runs(found.best))):
                found.write_best(parse_args([*self.space.words(found.best.values), '--seed', str(min(self.seeds))]))
                if self.test_split:
                    self._test(found, study)
            else:
                found.notes.append(f'Runs of {found.best} are on another machine: no best.yaml, no test.')
            if self.args.report:
                found.notes.append(f'Report: {report([self.folder])}')
        return found

    def _test(self, found: Sweep, study: optuna.Study) -> None:
        """Evaluate the best configuration on the test images, unless one was before."""
        if study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            found.notes.append('Trials run elsewhere or were killed, which this storage cannot tell: no test yet.')
            return
        if 'test' not in study.user_attrs:
            options = RunOptions(self.test_split, cpu=self.args.cpu, workers=self.args.workers)
            rows = evaluate_runs(found.runs(found.best), options)
            write_rows(self.folder / 'test.csv', [asdict(row) for row in rows])
            text = f'best configuration, split {self.test_split}\n{table(rows)}'
            study.set_user_attr('test', [found.best.number, text])
        number, found.test = study.user_attrs['test']
        if number != found.best.number:
            found.notes.append(
                f'Trial {number} was the best when the test images were looked at, which is done once. For others '
                'see timm-amf evaluate.')

    def _configurations(self, study: optuna.Study) -> list[Configuration]:
        found = []
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            runs = {int(seed): run for seed, run in trial.user_attrs.get('runs', {}).items()}
            values, end = {key: trial.params[key] for key in self.space.over}, trial.user_attrs.get('end', 'complete')
            found.append(Configuration(trial.user_attrs['place'], values, runs, end))
        return sorted(found, key=lambda c: c.number)


def sweep(
        data_dir: Optional[str] = None,
        model: Optional[str] = None,
        grid: Optional[Mapping[str, Sequence]] = None,
        space: Optional[Mapping[str, Any]] = None,
        seeds: Sequence[int] = (),
        trials: Optional[int] = None,
        pruner: str = 'none',
        storage: Union[str, BaseStorage, None] = None,
        test_split: Optional[str] = None,
        **options: Any,
) -> Sweep:
    """Train a model by all configurations of a grid, or by those that Optuna's TPE draws from a space.

    Args:
        data_dir: Folder of the images.
        model: timm architecture, or a composite; else the one of `config`.
        grid: Values by key: a flag of `timm-amf train`, or ROLE.FIELD of a Plan. All combinations are trained.
        space: What to draw from by key: `'1e-4:1e-1'`, `'log:1e-4:1e-1'`, `'1:8'` (whole numbers), a list of values,
            or a distribution of Optuna.
        seeds: Each configuration is trained with each of them; its score is the mean. Empty: the option `seed`.
        trials: Configurations that are drawn from the space (default: 20).
        pruner: `none`, `median` or `hyperband`, of Optuna.
        storage: URL, journal file or storage of Optuna (default: SQLite in the sweep's folder). Processes that name the
            same one, and the same `output` and `experiment`, share the work.
        test_split: Split that the best configuration is evaluated on, once, at the end. None: no split.
        **options: Flags of `timm-amf train` by name, such as `epochs`, `pretrained`, `config`, `output`, `experiment`.

    Returns:
        What was found: `best`, `plan`, `config`, `configurations`; `print` shows the table.
    """
    words = words_of(build_parser(), {'data_dir': data_dir, 'model': model, **options})
    return _sweep(words, grid or {}, space or {}, seeds, trials, pruner, storage, test_split)


def _sweep(words: Sequence[str], grid: Mapping, space: Mapping, *how: Any) -> Sweep:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ExperimentalWarning)
        return _Worker(Space(words, grid, space), *how).run()


def main(args: argparse.Namespace) -> None:
    """`timm-amf sweep`."""
    found = _sweep(
        args.words, pairs(args.grid, '--grid'), pairs(args.space, '--space'), args.seeds, args.trials, args.pruner,
        args.storage, args.test_split)
    print(f'\n{found}')
    if found.config:
        print(f'\nNext: timm-amf train --config {shlex.quote(str(found.folder / "best.yaml"))}')
        print(f'      timm-amf evaluate {shlex.join(map(str, found.runs(found.best)))}')
