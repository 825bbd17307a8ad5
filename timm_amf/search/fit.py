"""`timm-amf fit DIR`: one line that fine-tunes.

    timm-amf fit photos
    timm-amf fit photos --model convnext_tiny.fb_in22k --budget 30

It measures instead of asking. A logistic regression on the frozen features is the floor and the start of every
candidate; candidates are ordinary command lines of `timm-amf train`, which differ in how fast what depth trains. Few
epochs have time for the last layers only. Many have time for all, unless the pilots object: whole trainings, schedule
and all, of a sixth of the epochs. The chosen one trains in full; then the weights between its start and its best epoch
that validate best are kept, so that it never ends below the floor on the validation images. What is left is an ordinary
run: `args.yaml` repeats the training of the winner, and `fit.csv` says what was tried.
"""
import argparse
import contextlib
import csv
import importlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from torch import nn

from timm_amf.data import create_datasets, data_spec_from_args, splits_from_args
from timm_amf.data.spec import DEFAULT_SPLITS, SPLIT_NAMES
from timm_amf.data.table import is_table, read_table
from timm_amf.engine.build import input_channels
from timm_amf.engine.checkpoint import read_state
from timm_amf.engine.options import build_parser, parse_args
from timm_amf.engine.run_folder import best_epoch
from timm_amf.errors import CommandParser, Diverged, Interrupted, UserError
from timm_amf.files import write_text
from timm_amf.tuning import Plan
from timm_amf.tuning.plan_args import common_plan
from timm_amf.yaml_text import load_yaml

__all__ = ['COMMON', 'Candidate', 'Fit', 'complete', 'fit', 'fit_words', 'main']

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
        metric: Of the winner, that of the best epoch of its whole training.
        seconds: What both took.
    """
    name: str
    flags: tuple[str, ...]
    pilot: Optional[float] = None
    loss: Optional[float] = None
    metric: Optional[float] = None
    seconds: float = 0.


# From so many epochs and updates on there is time for all layers, and for pilots.
_MANY_EPOCHS, _MANY_UPDATES = 12, 250
# For few, and for many.
CANDIDATES = (
    Candidate('layer decay 0.75, LR 1e-3', ('--lr', '1e-3', '--layer-decay', '0.75')),
    Candidate('all, LR 1e-3', ('--lr', '1e-3')),
)


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
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        """The model, with its weights, in evaluation mode."""
        from timm_amf.hub.load import load

        return load(self.folder)

    def write(self, path: Union[str, Path]) -> None:
        """Write the table as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator='\n')
        writer.writerow(['candidate', 'flags', 'pilot', 'pilot_loss', 'metric', 'seconds', 'winner'])
        writer.writerow(['frozen features', '', '', '', self.floor, '', ''])
        for c in self.candidates:
            writer.writerow(
                [c.name, ' '.join(c.flags), c.pilot, c.loss, c.metric, round(c.seconds, 1), c is self.winner])
        write_text(path, text.getvalue())

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.candidates)
        lines = [f'{"":{width}}  pilot  validation   minutes']
        lines += [f'{"frozen features":{width}}  {"":5}  {self.floor:10.2f}']
        for c in self.candidates if self.candidates[0].pilot is not None else [self.winner]:
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
    from timm_amf.flags import words_of

    words = [data_dir] if data_dir is not None else []
    options['budget'] = budget
    return fit_words([*words, '--model', model, *words_of(build_parser(), {
        name: value for name, value in options.items() if value is not None})])


def fit_words(words: Sequence[str]) -> Fit:
    """`fit` by the words of a command line."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UserError('fit runs in one process; start it without accelerate launch or torchrun')
    args = parse_args(words)
    if args.dry_run or args.eval_only:
        raise UserError('fit trains; leave --dry-run and --eval-only out')
    folder = Path(args.output or 'output/fit') / (args.experiment or Path(args.data_dir or 'mixture').resolve().name)
    progress = _Progress(folder.with_name(f'{folder.name}-pilots'), words)
    if (folder / 'args.yaml').exists() and not args.overwrite and progress.winner is None:
        raise UserError(f'{folder}: holds a run already; name another with --experiment, or add --overwrite')
    words = progress.words = progress.words or complete(words)
    if progress.winner is None:
        args = parse_args(words)
        progress.candidates = [Candidate(c.name, c.flags) for c in CANDIDATES]
        _contest(progress, words, args)
        if folder.exists():
            shutil.rmtree(folder)
    winner = progress.winner
    _train(winner, words, folder.parent, folder.name)
    floor = read_state(folder / 'last')['start'][args.eval_metric]
    with open(folder / 'mix.csv', newline='', encoding='utf-8') as file:
        kept = next(float(row['metric']) for row in csv.DictReader(file) if row['kept'] == 'True')
    result = Fit(folder, floor, kept, winner, progress.candidates)
    result.write(folder / 'fit.csv')
    shutil.rmtree(progress.folder)
    return result


def _contest(progress: '_Progress', words: Sequence[str], args: argparse.Namespace) -> None:
    """Give all candidates a pilot and choose; with few epochs or updates, the first."""
    images = len(create_datasets(
        data_spec_from_args(args, args.recipe.get('data')), ('train',), input_channels(args))[0])
    whole = common_plan(args).epochs
    many = whole >= _MANY_EPOCHS and whole * images >= _MANY_UPDATES * args.batch_size
    epochs = whole // 6 if many else 0  # two at least: fewer favour low LRs even more
    start = progress.folder / _slug(progress.candidates[0]) / 'model_start.safetensors'
    for candidate in progress.candidates if epochs else ():
        # They share the features' classifier, which the first one fits.
        own = ['--initial-checkpoint', str(start), '--head-start', 'timm'] if start.exists() else []
        _train(candidate, [*words, *own, '--epochs', str(epochs), '--val-interval', str(epochs)], progress.folder)
        progress.write()
    progress.winner = _choose(progress.candidates, args) if epochs else progress.candidates[0]
    progress.write()


def _choose(candidates: Sequence[Candidate], args: argparse.Namespace) -> Candidate:
    """The last candidate, which moves the features most, unless its pilot is behind by two standard errors.

    A short training favours what moves them least, so that the better pilot is not the better training (docs/fit.md).
    """
    if args.eval_metric == 'loss':
        return min(candidates, key=lambda c: c.pilot)
    split = splits_from_args(args)[1]
    spec = data_spec_from_args(args, args.recipe.get('data'))
    images = len(create_datasets(spec, (split,), input_channels(args))[0])
    best = max(c.pilot for c in candidates)
    error = 100 * (max(best / 100 * (1 - best / 100), 0.) / images) ** 0.5
    return next(c for c in reversed(candidates) if c.pilot >= best - 2 * error)


class _Progress:
    """What an interrupted `fit` goes on from: `fit.json` in the folder of its pilots."""

    def __init__(self, folder: Path, asked: Sequence[str]):
        self.folder, self.asked = folder, list(asked)
        self.words: list[str] = []
        self.candidates: list[Candidate] = []
        self.winner: Optional[Candidate] = None
        file = folder / 'fit.json'
        state = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
        if state.get('asked') != self.asked:
            shutil.rmtree(folder, ignore_errors=True)  # of another fit
        else:
            self.words = state['words']
            self.candidates = [Candidate(**{**c, 'flags': tuple(c['flags'])}) for c in state['candidates']]
            self.winner = next((c for c in self.candidates if c.name == state['winner']), None)

    def write(self) -> None:
        state = dict(
            asked=self.asked, words=self.words, winner=self.winner and self.winner.name,
            candidates=[asdict(c) for c in self.candidates])
        write_text(self.folder / 'fit.json', json.dumps(state, indent=1))


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
        if _unsplit(data_spec_from_args(argparse.Namespace(**{**vars(given), 'group': None}))):
            words += ['--val-share', '0.2']
            given.val_share = 0.2
    train = create_datasets(
        data_spec_from_args(given, given.recipe.get('data')), ('train',), input_channels(given))[0]
    plain = parse_args(words, data)
    if 'batch_size' not in plain.explicit:
        batch = 32
        while batch > 4 and len(train) < 8 * batch:
            batch //= 2
        words += ['--batch-size', str(batch)]
    if plain.epochs is None and 'epochs' not in plain.recipe.get('plan', {}):
        epochs = max(5, min(30, round(10000 / len(train))))
        if plain.budget is not None:
            epochs = max(3, min(100, epochs_within([*COMMON, *words], pilots=1.5)))
        words += ['--epochs', str(epochs)]
    if not plain.initial_checkpoint and not plain.pretrained:
        words.append('--pretrained')
    return words


def _unsplit(spec) -> bool:
    roots = [os.path.expanduser(c.root or '') for c in spec.components if not c.dataset and not c.splits]
    names = {*SPLIT_NAMES['val'], DEFAULT_SPLITS['val']}
    return bool(roots) and all(
        'split' not in read_table(root, root) if is_table(root) else
        os.path.isdir(root) and not any(os.path.exists(os.path.join(root, name)) for name in names) for root in roots)


def epochs_within(words: Sequence[str], pilots: float = 1.) -> int:
    """Epochs that `--budget` pays for, by the time of one; of a run that is resumed, those that it had.

    Args:
        words: Command line of `timm-amf train`.
        pilots: Cost of all that is trained, in trainings.
    """
    args = parse_args(words)
    folder = Path(args.output or 'output/train', args.experiment or '') if args.resume == 'auto' else Path(args.resume)
    before = [base / 'plan.yaml' for base in (folder, folder.parent) if (base / 'plan.yaml').exists()]
    if args.resume and before:
        return Plan.from_yaml(before[0]).epochs
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UserError('--budget: times an epoch in one process; give --epochs')
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='timm_amf-') as scratch:
        _run([*words, '--epochs', '1', '--head-start', 'zero', '--resume', ''], Path(scratch) / 'timing', quiet=True)
    return max(1, round(60 * args.budget / (pilots * (time.monotonic() - start))))


def _slug(candidate: Candidate) -> str:
    return ''.join(c if c.isalnum() or c in '.-' else '-' for c in candidate.name)


def _run(words: Sequence[str], folder: Path, quiet: bool) -> None:
    train = importlib.import_module('train_amf').train
    where = ['--output', str(folder.parent), '--experiment', folder.name, '--tracker', 'none']
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        train([*words, *where])


def _train(candidate: Candidate, words: Sequence[str], output: Path, experiment: Optional[str] = None) -> None:
    """Train a candidate: its pilot, or as the experiment that is left."""
    start, folder = time.monotonic(), output / (experiment or _slug(candidate))
    mix = ['--wise-ft'] if experiment else []
    words = words if experiment else [word for word in words if word != '--report']
    try:
        _run([*COMMON, *candidate.flags, *words, *mix, '--resume', 'auto'], folder, quiet=not experiment)
        best = best_epoch(folder)
        metric, loss = best[load_yaml(folder / 'args.yaml').get('eval_metric', 'top1')], best['loss']
    except Interrupted as e:
        raise Interrupted(e.signum, 'stopped; the same command goes on where it stopped') from e
    except Diverged:
        if experiment:
            raise
        metric, loss = float('-inf'), float('inf')  # its LR is too high for these data
    if experiment:
        candidate.metric = metric
    else:
        candidate.pilot, candidate.loss = metric, loss
        print(f'pilot of {candidate.name}: {metric:.2f}', flush=True)
    candidate.seconds += time.monotonic() - start


def main(argv: Sequence[str]) -> None:
    """`timm-amf fit`."""
    parser = CommandParser(
        prog='timm-amf fit', add_help=False, allow_abbrev=False, usage='%(prog)s [DIR] [--model NAME] [flags of train]',
        description='Fine-tune a model: measure a few ways on the data, train the best to the end.')
    parser.add_argument('-h', '--help', action='store_true', help='show this; timm-amf train --help shows its flags')
    # Listed here, read with the rest.
    parser.add_argument('--budget', metavar='MINUTES', help='about how long it may take, pilots included')
    own, words = parser.parse_known_args(argv)
    if own.help:
        parser.print_help()
        return
    if own.budget is not None:
        words = [*words, '--budget', own.budget]
    if not any(word.split('=')[0] in ('--model', '--config', '-c') for word in words):
        words = [*words, '--model', MODEL]
    found = fit_words(words)
    run = found.folder
    print(f'{found}\n\nNext: timm-amf evaluate {run}')
    print(f'      timm-amf export {run} --format onnx')
    print(f'      timm-amf publish {run} --repo-id OWNER/NAME --license ID')
