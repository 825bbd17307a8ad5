"""`timm-amf fit DIR`: one line that fine-tunes.

    timm-amf fit photos
    timm-amf fit photos --model convnext_tiny.fb_in22k --budget 30

It measures instead of asking. A logistic regression on the frozen features is the floor and the start of every
candidate; candidates are ordinary command lines of `timm-amf train`, which differ in their LR. Few epochs get a low
one. Many have time for a high one, unless the pilots object: whole trainings, schedule and all, of a sixth of the
epochs. The chosen one trains in full, with a lower LR if the first epoch spoils the features; then the weights
between its start and its best epoch that validate best are kept, so that it never ends below the floor on the
validation images. What is left is an ordinary run: `args.yaml` repeats the training of the winner, and `fit.csv` says
what was tried.
"""
import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional, Union

from torch import nn

from timm_amf.data import Mixture, create_dataset, data_spec_from_args, splits_from_args
from timm_amf.data.datasets import lacks_split
from timm_amf.engine.build import input_channels
from timm_amf.engine.checkpoint import Checkpointer, read_state
from timm_amf.engine.options import build_parser, parse_args
from timm_amf.engine.run import check_kind, folder_by_data
from timm_amf.engine.run_folder import best_epoch, settings_of
from timm_amf.errors import Diverged, Interrupted, UserError
from timm_amf.files import write_text
from timm_amf.flags import words_of
from timm_amf.text import csv_text
from timm_amf.tuning import Plan
from timm_amf.tuning.plan_args import common_plan

__all__ = ['COMMON', 'Candidate', 'Fit', 'complete', 'epochs_within', 'fit', 'fit_words', 'main', 'run']

MODEL = 'tf_efficientnet_lite0'
# Of all candidates: what is measured to fine-tune well from a logistic regression (docs/fit.md).
COMMON = (
    '--head-start', 'probe', '--norms', 'frozen', '--opt', 'adamw', '--weight-decay', '0.01', '--sched', 'cosine',
    '--sched-on-updates', '--warmup-epochs', '0.5')


@dataclass
class Candidate:
    """One way to fine-tune.

    Attributes:
        name: Its name.
        flags: Its own flags of `timm-amf train`.
        pilot: Validation metric of its pilot (`--eval-metric`), None without one, and the loss.
        metric: That of the best epoch of its whole training, of one that collapsed as far as it went.
        seconds: What both took.
    """
    name: str
    flags: Sequence[str]
    pilot: Optional[float] = None
    loss: Optional[float] = None
    metric: Optional[float] = None
    seconds: float = 0.


# From so many epochs and updates on there is time for a high LR, and for pilots.
_MANY_EPOCHS, _MANY_UPDATES = 12, 250
# (name, flags): for few, and for many.
CANDIDATES = (('LR 3e-4', ('--lr', '3e-4')), ('LR 1e-3', ('--lr', '1e-3')))
# What follows, in turn, where the first epoch keeps less than a share of the accuracy of the frozen features: for the
# first of few epochs more than these bring back, else a collapse (docs/fit.md).
_LOWER = (('LR 1e-4', ('--lr', '1e-4')), ('LR 3e-5', ('--lr', '3e-5')))
_KEPT, _COLLAPSED = 0.8, 1 / 3


@dataclass
class Fit:
    """What `fit` found.

    Attributes:
        folder: The run that it leaves.
        floor: Validation metric of the logistic regression on frozen features.
        metric: That of the weights that are left.
        winner: The candidate that was trained to the end.
        candidates: All of them.
    """
    folder: Path
    floor: float
    metric: float
    winner: Candidate
    candidates: list[Candidate]

    @property
    def model(self) -> nn.Module:
        """The model, with its weights, in evaluation mode."""
        from timm_amf.hub.load import load

        return load(self.folder)

    def write(self, path: Union[str, Path]) -> None:
        """Write the table as CSV."""
        write_text(path, csv_text([
            ['candidate', 'flags', 'pilot', 'pilot_loss', 'metric', 'seconds', 'winner'],
            ['frozen features', '', '', '', self.floor, '', ''],
            *([c.name, ' '.join(c.flags), c.pilot, c.loss, c.metric, round(c.seconds, 1), c is self.winner]
              for c in self.candidates)]))

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.candidates)
        lines = [f'{"":{width}}  pilot  validation   minutes']
        lines += [f'{"frozen features":{width}}  {"":5}  {self.floor:10.2f}']
        for c in filter(lambda c: c.seconds, self.candidates):
            pilot, metric = ('' if value is None else f'{value:.2f}' for value in (c.pilot, c.metric))
            star = ' *' if c is self.winner else ''
            lines.append(f'{c.name:{width}}  {pilot:>5}  {metric:>10}  {c.seconds / 60:8.1f}{star}')
        return '\n'.join([*lines, f'{"kept":{width}}  {"":5}  {self.metric:10.2f}'])


def fit(
        data_dir: Optional[str] = None,
        model: str = MODEL,
        budget: Optional[float] = None,
        **options: Any,
) -> Fit:
    """Fine-tune a model on a folder of images.

    Args:
        data_dir: Folder of class folders, or of splits of class folders.
        model: timm architecture with pretrained weights.
        budget: Minutes that it may take, about; it sets the number of epochs where `epochs` does not.
        **options: Flags of `timm-amf train` by name, such as `epochs`, `img_size`, `pretrained_path`, `output`.

    Returns:
        What was found; `Fit.model` is the model, and `print` shows what was tried.
    """
    options.update(data_dir=data_dir, model=model, budget=budget)
    return fit_words(words_of(build_parser(), options))


def fit_words(words: Sequence[str]) -> Fit:
    """`fit` by the words of a command line."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UserError('fit runs in one process; start it without accelerate launch or torchrun')
    import sklearn  # noqa: F401  the regression's, before there is work that its absence would end

    args = parse_args(words)
    if args.dry_run or args.eval_only:
        raise UserError('fit trains; leave --dry-run and --eval-only out')
    if args.report:
        from timm_amf.report import check_installed, report  # what it takes is imported only where it is asked for

        check_installed()
    folder = folder_by_data(args, 'fit')
    progress = _Progress.open(folder.with_name(f'{folder.name}-pilots'), list(words))
    if args.data_dir and folder.resolve() == Path(args.data_dir).resolve():
        raise UserError(f'{folder}: holds the images; name another place for the run with --output or --experiment')
    check_kind(folder, 'run')
    earlier = Checkpointer(folder)  # which removes files of a run only, whatever else lies there
    if earlier.holds_run() and not args.overwrite and not progress.winner:
        finished = 'finished ' if (folder / 'fit.csv').exists() else ''
        raise UserError(f'{folder}: holds a {finished}run already{progress.begun}; name another with --experiment, or '
                        'add --overwrite')
    if progress.added is None:
        progress.added = complete(words)[len(words):]
        shutil.rmtree(progress.folder, ignore_errors=True)  # of another fit, which a refusal leaves
    progress.write()
    if not progress.winner:
        if args.lr is not None:  # then there is nothing to choose
            progress.candidates = [Candidate(f'LR {args.lr:g}', ())]
        _contest(progress, parse_args(progress.words))
        earlier.discard()
    tried = None
    while tried is not progress.chosen:
        start, tried = time.monotonic(), progress.chosen
        lower = [Candidate(*c) for c in _LOWER if args.lr is None and c[0] not in {c.name for c in progress.candidates}]
        try:
            _train(tried, [*progress.words, '--wise-ft'], folder,
                   after_epoch=_stop_if_wrecked(folder, args, progress) if lower else None)
        except Diverged as e:
            if not lower:
                raise
            print(f'{e}: {tried.name} is too high; once more with {lower[0].name}', flush=True)
            with contextlib.suppress(OSError, ValueError, UserError):  # it diverged before the end of an epoch
                tried.metric = best_epoch(folder, mixed=False)[args.eval_metric]
            earlier.discard()
            progress.candidates.append(lower[0])
            progress.winner = lower[0].name
        finally:
            tried.seconds += time.monotonic() - start
            progress.write()
    tried.metric = best_epoch(folder, mixed=False)[args.eval_metric]
    floor = read_state(folder / 'last')['start'][args.eval_metric]
    result = Fit(folder, floor, best_epoch(folder)[args.eval_metric], tried, progress.candidates)
    result.write(folder / 'fit.csv')
    shutil.rmtree(progress.folder)
    if args.report:
        print(report([folder]))
    return result


@dataclass
class _Progress:
    """What an interrupted `fit` goes on from: `fit.json` in the folder of its pilots.

    Attributes:
        folder: That folder.
        asked: The command line.
        added: What `complete` adds to it.
        candidates: All, with what is known of them.
        winner: Name of the one that is trained to the end.
        before: Command line of another fit, which was interrupted.
    """
    folder: Path
    asked: list[str]
    added: Optional[list[str]]
    candidates: list[Candidate]
    winner: str = ''
    before: Sequence[str] = ()

    @property
    def words(self) -> list[str]:
        return [*self.asked, *self.added]

    @property
    def chosen(self) -> Candidate:
        return next(c for c in self.candidates if c.name == self.winner)

    @property
    def begun(self) -> str:
        """In what the command line of the fit that was interrupted differs."""
        was, now = (set(re.split(r' (?=--?[a-z])', shlex.join(words))) for words in (self.before, self.asked))
        pairs = (('with', was - now), ('without', now - was))
        found = ' and '.join(f'{how} {" ".join(sorted(flags))}' for how, flags in pairs if flags)
        return f', begun {found}, which goes on with the same flags' if self.before else ''

    @classmethod
    def open(cls, folder: Path, asked: list[str]) -> '_Progress':
        file = folder / 'fit.json'
        state = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
        if 'added' in state and _settings(state['asked']) == _settings(asked):
            return cls(folder, asked, state['added'], [Candidate(**c) for c in state['candidates']], state['winner'])
        if folder.exists() and not file.exists():
            raise UserError(f'{folder}: is where the pilots go, and is there already; name another --experiment')
        return cls(folder, asked, None, [Candidate(*c) for c in CANDIDATES], before=state.get('asked', ()))

    def write(self) -> None:
        state = json.dumps({**asdict(self), 'folder': None}, indent=1)
        write_text(self.folder / 'fit.json', state, 'choose another --output')


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """What a fit follows from, by its command line; no result follows from other flags, such as `--workers`."""
    args = parse_args(words)
    return {**settings_of(vars(args), {}), 'plan': args.plan, 'budget': args.budget, 'overwrite': args.overwrite}


def _contest(progress: _Progress, args: argparse.Namespace) -> None:
    """Give all candidates a pilot and choose; with few epochs or updates, the first."""
    whole, candidates = common_plan(args).epochs, progress.candidates
    many = len(candidates) > 1 and whole >= _MANY_EPOCHS
    many = many and whole * len(_images(args, 'train')) >= _MANY_UPDATES * args.batch_size
    shared = None
    for candidate in candidates if many else ():
        folder = progress.folder / re.sub(r'[^\w.-]', '-', candidate.name)
        words = progress.words
        if shared is None:
            shared = folder / 'model_start.safetensors'
        elif shared.exists():  # the features' classifier, which the first one fits
            words = [*words, '--initial-checkpoint', str(shared), '--head-start', 'timm']
        start, best = time.monotonic(), {}
        try:
            epochs = str(whole // 6)  # two at least: fewer favour low LRs even more
            _train(candidate, [*words, '--epochs', epochs, '--val-interval', epochs], folder, quiet=True)
            best = best_epoch(folder)
        except Diverged:
            pass  # its LR is too high for these data
        candidate.loss = best.get('loss', math.inf)
        candidate.pilot = candidate.loss if args.eval_metric == 'loss' else best.get(args.eval_metric, -math.inf)
        candidate.seconds += time.monotonic() - start
        print(f'pilot of {candidate.name}: {candidate.pilot:.2f}', flush=True)
        progress.write()
    progress.winner = (_choose(candidates, args) if many else candidates[0]).name
    progress.write()


def _choose(candidates: Sequence[Candidate], args: argparse.Namespace) -> Candidate:
    """The last candidate, which moves the features most, unless its pilot is behind by two standard errors.

    A short training favours what moves them least, so that the better pilot is not the better training (docs/fit.md).
    """
    if args.eval_metric == 'loss':
        return min(candidates, key=lambda c: c.pilot)
    best = max(c.pilot for c in candidates)
    error = 100 * (max(best / 100 * (1 - best / 100), 0.) / len(_images(args, splits_from_args(args)[1]))) ** 0.5
    return next(c for c in reversed(candidates) if c.pilot >= best - 2 * error)


def _images(args: argparse.Namespace, split: str) -> Mixture:
    return create_dataset(data_spec_from_args(args), split, input_channels(args))


def complete(words: Sequence[str], data: Optional[Mapping] = None) -> list[str]:
    """Add what the data decide, where it was not given: a validation split, batch size, epochs; and the weights.

    Args:
        words: Command line of `timm-amf train`.
        data: The data, where the command line does not name them, of the form of a recipe's section.
    """
    words = list(words)
    given = parse_args([*words, '--epochs', '1'], data)
    if given.val_share is None and not given.recipe.get('data'):
        # Groups are of the shares, which are not known yet.
        spec = data_spec_from_args(argparse.Namespace(**{**vars(given), 'group': None}))
        roots = [c.root or '' for c in spec.components if not c.dataset and not c.splits]
        if roots and all(lacks_split(root, 'val') for root in roots):
            words += ['--val-share', '0.2']
            given.val_share = 0.2
            kept = len(_images(given, splits_from_args(given)[1]))
            print(f'no validation split: {kept} images are kept for it, a fifth of each class (--val-share 0.2)')
    images, plain = len(_images(given, 'train')), parse_args(words, data)
    if 'batch_size' not in plain.explicit:
        batch = 32
        while batch > 4 and images < 8 * batch:
            batch //= 2
        words += ['--batch-size', str(batch)]
    if plain.epochs == 0:
        raise UserError('--epochs: fit trains for one epoch or more, not 0')
    if plain.epochs is None and 'epochs' not in plain.recipe.get('plan', {}):
        epochs = max(5, min(30, round(10000 / images)))
        if plain.budget is not None:
            epochs = max(3, min(100, epochs_within(parse_args([*COMMON, *words], data), pilots=1.5)))
        words += ['--epochs', str(epochs)]
    if not plain.initial_checkpoint and not plain.pretrained:
        words.append('--pretrained')
    return words


def epochs_within(args: argparse.Namespace, pilots: float = 1.) -> int:
    """Epochs that `--budget` pays for, by the time of one; of a run that is resumed, those that it had.

    Args:
        args: Options of `timm-amf train`.
        pilots: Cost of all that is trained, in trainings.
    """
    folder = Path(args.output or 'output/train', args.experiment or '') if args.resume == 'auto' else Path(args.resume)
    before = [base / 'plan.yaml' for base in (folder, folder.parent) if (base / 'plan.yaml').exists()]
    if args.resume and before:
        return Plan.from_yaml(before[0]).epochs
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UserError('--budget: times an epoch in one process; give --epochs')
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='timm_amf-') as scratch:
        timed = dict(epochs=1, head_start='zero', resume='', output=scratch, experiment='timing', tracker=['none'])
        run(argparse.Namespace(**{**vars(args), **timed}), quiet=True)
    return max(1, round(60 * args.budget / (pilots * (time.monotonic() - start))))


def _stop_if_wrecked(
        folder: Path, args: argparse.Namespace, progress: _Progress) -> Callable[[int, Optional[float]], None]:
    first = progress.chosen is progress.candidates[0] and progress.chosen.pilot is None
    kept = _KEPT if first else _COLLAPSED

    def stop_if_wrecked(epoch: int, metric: Optional[float]) -> None:
        if epoch == 0 and metric is not None and args.eval_metric != 'loss':
            floor = read_state(folder / 'last')['start'][args.eval_metric]
            if metric < kept * floor:
                raise Diverged(f'one epoch took the features from {floor:.2f} to {metric:.2f}')
    return stop_if_wrecked


def _train(candidate: Candidate, words: Sequence[str], folder: Path, quiet: bool = False, **options: Any) -> None:
    """Train a candidate, or go on with that."""
    try:
        where = ['--output', str(folder.parent), '--experiment', folder.name, '--tracker', 'none']
        run(parse_args([*COMMON, *candidate.flags, *words, '--resume', 'auto', *where]), quiet, **options)
    except Interrupted as e:
        raise Interrupted(e.signum, 'stopped; the same command goes on where it stopped') from e


def run(args: argparse.Namespace, quiet: bool = False, **options: Any) -> None:
    """`timm-amf train` without a report; quiet: a trial, which prints and publishes nothing."""
    from train_amf import train  # which calls this module

    args = argparse.Namespace(**{**vars(args), 'report': False, **({'publish': ''} if quiet else {})})
    with contextlib.redirect_stdout(io.StringIO() if quiet else sys.stdout):
        train(args=args, **options)


def main(args: argparse.Namespace) -> None:
    """`timm-amf fit`."""
    words = args.words
    if not any(word.split('=')[0] in ('--model', '--config', '-c') for word in words):
        words += ['--model', MODEL]
    found = fit_words(words)
    folder = shlex.quote(str(found.folder))
    print(f'{found}\n\nNext: timm-amf report {folder}\n      timm-amf evaluate {folder}\n'
          f'      timm-amf export {folder} --format onnx\n'
          f'      timm-amf publish {folder} --repo-id OWNER/NAME --license ID')
