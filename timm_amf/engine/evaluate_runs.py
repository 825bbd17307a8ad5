"""Trained runs evaluated from their folders: one crop or ten, each alone, their mean and their ensemble.

    timm-amf evaluate runs/seed0 runs/seed1 runs/seed2 runs/seed3 --split test --ten-crop --ensemble

This is how papers report: mean and standard deviation of several runs, and beside the state of the art the ensemble of
all of them over ten crops (Plested, Shen and Gedeon, "Rethinking binary hyperparameters for deep transfer learning for
image classification", section 3.3). What is averaged the paper leaves open; here it is the softmax, over the crops of
an image as in Krizhevsky et al. (2012, section 4.1), and over the runs.
"""
import argparse
import csv
import io
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional, Union

import torch
from torch import nn
from tqdm import tqdm

from timm_amf.data import Mixture, check_images, create_dataset, data_spec_from_args, splits_from_args
from timm_amf.engine.build import input_channels
from timm_amf.engine.checkpoint import read_class_names
from timm_amf.engine.evaluate import Tally
from timm_amf.engine.intervals import mean_interval, wilson_interval
from timm_amf.engine.run_folder import WEIGHTS, choose_device, eval_loader, find_weights, is_run, load_run, read_run
from timm_amf.errors import CommandParser, UserError
from timm_amf.files import write_text
from timm_amf.models.method import method_of
from timm_amf.tuning import Plan

__all__ = ['Row', 'RunOptions', 'evaluate_runs', 'is_for_runs', 'main', 'predict', 'table']

_AT_ONCE = 4096  # images of the ensemble that are counted at a time


@dataclass(frozen=True)
class RunOptions:
    """How runs are evaluated.

    Args:
        split: Any name that `--val-split` takes. None: what each run was validated on.
        data_dir: Folder of the data. None: where each run had it.
        weights: Of `run_folder.WEIGHTS`.
        ten_crop: Average over the four corners and the centre, and their mirror images.
        blocks: Path of all images through a SpotTune: `tuned`, `frozen`, or blocks with commas between; `policy`
            gives it to the policy where the run itself evaluates otherwise. None: as the run evaluates.
        sampling_seed: Draw a SpotTune's decisions with this seed instead of taking the likelier ones.
        batch_size: Images that go through the network at a time, ten crops being ten. None: the run's.
        workers: Worker processes. None: the run's.
        cpu: Compute on the CPU even where there is a GPU.
        precision: Type that autocast computes in. None: float32, whatever the run trained in.
        level: Confidence of the intervals, between 0 and 1.
    """
    split: Optional[str] = None
    data_dir: Optional[str] = None
    weights: str = 'best'
    ten_crop: bool = False
    blocks: Optional[str] = None
    sampling_seed: Optional[int] = None
    batch_size: Optional[int] = None
    workers: Optional[int] = None
    cpu: bool = False
    precision: Optional[torch.dtype] = None
    level: float = 0.95


@dataclass(frozen=True)
class Row:
    """Metrics of one run, of the mean of the runs, or of their ensemble.

    Args:
        run: The run's folder, `mean of N runs` or `ensemble of N runs`.
        component: Component of the mixture, '' for all images.
        images: Number of images.
        loss: Mean of -log of the averaged softmax at the target; of the mean row the mean of the runs'.
        top1: Percent.
        top1_std: Over the runs (ddof 1), of the mean row alone.
        top1_low: Lower limit: of a run and of the ensemble Wilson's over the images, of the mean Student's over the
            runs, cut to 0 to 100.
        top1_high: Upper limit.
        top5: Percent.
    """
    run: str
    component: str
    images: int
    loss: float
    top1: float
    top1_std: Optional[float]
    top1_low: float
    top1_high: float
    top5: float


@dataclass
class _Opened:
    """A run whose options and images are open."""
    name: str
    args: argparse.Namespace
    data: Mixture
    plan: Plan


def evaluate_runs(
        runs: Sequence[Union[str, Path]],
        options: Optional[RunOptions] = None,
        ensemble: bool = False,
) -> list[Row]:
    """Evaluate runs, in float32 unless the options say otherwise.

    Args:
        runs: Their folders.
        options: How.
        ensemble: Evaluate the average of all runs' probabilities, too.

    Returns:
        Rows of each run; where there are several on the same images, also of their mean; on request of their ensemble.
        The rows of a mixture's components follow each.

    Raises:
        UserError: If a folder holds no run, or weights or data are not as its options have them; for an ensemble also
            if the runs have other classes or images.
    """
    options = options or RunOptions()
    opened = [_open(run, options) for run in runs]
    _check_once(opened)
    reason = next((r for r in (_difference(opened[0], other) for other in opened[1:]) if r), None)
    if ensemble and len(opened) < 2:
        raise UserError('--ensemble: there is one run; give two or more')
    if ensemble and reason:
        raise UserError(f'--ensemble: {reason}; an ensemble needs the same images and classes')
    rows, tallies, joint = [], [], None
    for run in opened:
        model = load_run(run.args, run.name, run.data.num_classes, options.weights)
        if joint is not None and model.num_classes != joint.shape[1]:
            raise UserError(
                f'--ensemble: {opened[0].name} has {joint.shape[1]} outputs and {run.name} {model.num_classes}; '
                f'an ensemble needs the same classes')
        log_probs = _predict_run(run, model, options)
        tallies.append(_tally(log_probs, run.data))
        rows += _rows(run.name, tallies[-1], options.level)
        if ensemble:
            log_probs = log_probs.double()
            joint = log_probs if joint is None else torch.logaddexp(joint, log_probs)
    if len(opened) > 1 and not reason:
        rows += _mean_rows(f'mean of {len(opened)} runs', tallies, options.level)
    if joint is not None:
        tally = _tally(joint - math.log(len(opened)), opened[0].data)
        rows += _rows(f'ensemble of {len(opened)} runs', tally, options.level)
    return rows


def _open(run: Union[str, Path], options: RunOptions) -> _Opened:
    flags = ['--val-split', options.split] if options.split else []
    flags += ['--data-dir', options.data_dir] if options.data_dir else []
    args = read_run(run, flags)
    channels = input_channels(args)
    spec, split = data_spec_from_args(args, args.recipe.get('data')), splits_from_args(args)[1]
    if split == 'val' and options.split and options.split not in ('val', 'validation', 'valid', 'eval'):
        # A dataset's own name. A component that says itself what its splits are does not heed it.
        fixed = [c.name for c in spec.components if c.split_name('val') != options.split]
        if fixed:
            raise UserError(
                f'--split {options.split}: {run} says what the splits of component {fixed[0]!r} are; give train, '
                f'validation or test')
    elsewhere = [c for c in spec.components if options.data_dir and c.root != options.data_dir]
    if elsewhere:
        raise UserError(
            f'--data-dir: {run} names the folder of component {elsewhere[0].name!r} itself ({elsewhere[0].root}); '
            f'change it in its args.yaml')
    try:
        data = create_dataset(spec, split, channels, read_class_names(find_weights(run, options.weights)))
    except UserError as e:
        raise UserError(f'{run}: {e}') from None
    if args.skip_bad_images:
        check_images(data, True, args.cache_dir, args.workers, sys.stderr.isatty())
    return _Opened(str(run), args, data, Plan.from_yaml(Path(run) / 'plan.yaml'))


def _check_once(opened: Sequence[_Opened]) -> None:
    folders = [Path(run.name).resolve() for run in opened]
    for run, folder in zip(opened, folders):
        if folders.count(folder) > 1:
            raise UserError(f'{run.name}: is given twice; a run has one part in a mean or an ensemble')


def _difference(one: _Opened, other: _Opened) -> Optional[str]:
    """What keeps two runs from being averaged; None where they have the same images and classes."""
    a, b = one.data, other.data
    if a.class_names != b.class_names:
        numbers = f'{a.num_classes} and {b.num_classes} of them' if a.num_classes != b.num_classes else 'other names'
        return f'{one.name} and {other.name} differ in their classes ({numbers})'
    if len(a) != len(b):
        return f'{one.name} and {other.name} differ in their images ({len(a)} and {len(b)} of them)'
    for i in range(len(a)):
        if a.filename(i) != b.filename(i) or a.targets[i] != b.targets[i]:
            return f'{one.name} and {other.name} differ in their images ({a.filename(i)} and {b.filename(i)})'
    if a.components != b.components:
        return f'{one.name} and {other.name} differ in their components ({", ".join(a.components + b.components)})'
    return None


def _predict_run(run: _Opened, model: nn.Module, options: RunOptions) -> torch.Tensor:
    asked = bool(options.blocks) or options.sampling_seed is not None
    if asked and 'eval_blocks' not in method_of(model).takes:
        raise UserError(
            f'{run.name}: --blocks and --sampling-seed do not act on {type(model).__name__}; leave them out')
    blocks, k, seed = run.args.eval_blocks, run.plan.global_k, run.args.eval_sampling_seed
    if options.blocks:
        blocks, k = (None, None) if options.blocks == 'policy' else (options.blocks, None)
    if options.sampling_seed is not None:
        seed = options.sampling_seed
    device = choose_device(options.cpu or run.args.cpu)
    batch_size = options.batch_size or run.args.validation_batch_size or run.args.batch_size
    if options.ten_crop:
        batch_size = max(1, batch_size // 10)
    model = model.to(device)
    loader = eval_loader(run.args, model, run.data, device, batch_size, options.workers, options.ten_crop)
    try:
        with method_of(model).evaluation(k, blocks, seed):
            return predict(model, loader, options.precision, run.name)
    finally:
        loader.close()


@torch.inference_mode()
def predict(
        model: nn.Module,
        loader,
        precision: Optional[torch.dtype] = None,
        description: str = '',
) -> torch.Tensor:
    """Log of the probabilities that a model gives, averaged over the crops of each image.

    Args:
        model: In evaluation mode, on the loader's device.
        loader: Its batches are (B, C, H, W), or (B, crops, C, H, W).
        precision: Type that autocast computes in. None: the model's own.
        description: Label of the progress bar.

    Returns:
        (images, classes) float32 on the CPU, in the order of the dataset.
    """
    device = loader.device
    context = nullcontext() if precision is None else torch.autocast(device.type, precision)
    rows, indices = [], []
    bar = tqdm(loader, desc=description, leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for batch in bar:
        crops = batch.input.shape[1] if batch.input.ndim == 5 else 1
        with context:
            logits = model(batch.input.flatten(0, 1) if batch.input.ndim == 5 else batch.input)
        log_probs = logits.float().log_softmax(1).unflatten(0, (-1, crops))
        rows.append((log_probs.logsumexp(1) - math.log(crops)).cpu())
        indices.append(batch.index.cpu())
    rows, indices = torch.cat(rows), torch.cat(indices)
    if rows.isnan().any():
        count = int(rows.isnan().any(1).sum())
        raise UserError(f'{description}: gives NaN for {count} images; its weights are damaged')
    return torch.empty_like(rows).index_copy_(0, indices, rows)


def _tally(log_probs: torch.Tensor, data: Mixture) -> Tally:
    tally = Tally(data.components)
    targets, components = torch.from_numpy(data.targets), torch.from_numpy(data.component_of)
    for part in torch.arange(len(data)).split(_AT_ONCE):
        tally.update(log_probs[part], targets[part], components[part])  # a log of probabilities is its own log-softmax
    return tally


def _parts(tally: Tally) -> list[tuple[str, list[float]]]:
    """Name and sums (images, loss, top-1 and top-5 hits) of all images, and of the components if there are several."""
    parts = [('', tally.sums.sum(0).tolist())]
    if len(tally.components) > 1:
        parts += [(name, sums) for name, sums in zip(tally.components, tally.sums.tolist()) if sums[0]]
    return parts


def _rows(name: str, tally: Tally, level: float) -> list[Row]:
    rows = []
    for component, (images, loss, top1, top5) in _parts(tally):
        low, high = wilson_interval(top1, images, level)
        rows.append(Row(
            name, component, int(images), loss / images, 100 * top1 / images, None, 100 * low, 100 * high,
            100 * top5 / images))
    return rows


def _mean_rows(name: str, tallies: Sequence[Tally], level: float) -> list[Row]:
    rows = []
    for parts in zip(*(_parts(tally) for tally in tallies)):
        component, (images, *_) = parts[0]
        loss, top5 = (sum(sums[i] for _, sums in parts) / len(parts) / images for i in (1, 3))
        mean, deviation, low, high = mean_interval([100 * sums[2] / images for _, sums in parts], level)
        if deviation == 0:  # that all runs agree says nothing of other images
            low, high = (100 * limit for limit in wilson_interval(parts[0][1][2], images, level))
        limits = max(low, 0.), min(high, 100.)  # of a few runs that differ much, the interval knows no percent
        rows.append(Row(name, component, int(images), loss, mean, deviation, *limits, 100 * top5))
    return rows


def table(rows: Sequence[Row], level: float = 0.95) -> str:
    """The rows as text."""
    names = [f'  {row.component}' if row.component else row.run for row in rows]
    width = max(map(len, names))
    lines = [f'{"":{width}}{"images":>8}{"top1":>8}{"std":>7}{f"{100 * level:g} % interval":>18}{"top5":>8}{"loss":>9}']
    for name, row in zip(names, rows):
        deviation = '' if row.top1_std is None else f'{row.top1_std:.2f}'
        interval = f'{row.top1_low:.2f} to {row.top1_high:.2f}'
        lines.append(
            f'{name:{width}}{row.images:>8}{row.top1:>8.2f}{deviation:>7}{interval:>18}{row.top5:>8.2f}'
            f'{row.loss:>9.4f}')
    if any(row.top1_std is not None for row in rows):
        lines.append("intervals: of the mean Student's t over the runs (std: ddof 1), else, and where all runs agree,\n"
                     "Wilson's over the images")
    return '\n'.join(lines)


def _write(rows: Sequence[Row], options: RunOptions, path: Path) -> None:
    """A CSV file with the settings of the evaluation in every row."""
    settings = dict(
        split=options.split or '', weights=options.weights, crops=10 if options.ten_crop else 1,
        blocks=options.blocks or '', sampling_seed='' if options.sampling_seed is None else options.sampling_seed,
        level=options.level)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*Row.__dataclass_fields__, *settings], lineterminator='\n')
    writer.writeheader()
    writer.writerows({**asdict(row), 'top1_std': '' if row.top1_std is None else row.top1_std, **settings}
                     for row in rows)
    write_text(path, text.getvalue(), 'name another --results-file; the results are above')


# ---- the command


def is_for_runs(argv: Sequence[str]) -> bool:
    """Whether the arguments of `timm-amf evaluate` are those of this module, and not those of `train_amf.py`.

    They are if a word before the first flag is the folder of a run, or a flag is among them that only this module has.
    """
    first = next((i for i, word in enumerate(argv) if word.startswith('-')), len(argv))
    if any(is_run(word) for word in argv[:first]):
        return True
    own = {'-h', '--help', '--split', '--weights', '--ten-crop', '--ensemble', '--blocks', '--sampling-seed',
           '--confidence', '--results-file'}
    return any(word.partition('=')[0] in own for word in argv)


def main(argv: Sequence[str]) -> None:
    """`timm-amf evaluate RUN ...`: print the table of the runs."""
    args = _parser().parse_args(argv)
    options = _options(args)
    print(_heading(options))
    rows = evaluate_runs(args.runs, options, args.ensemble)
    print(table(rows, options.level))
    if len(args.runs) > 1 and not any(row.run.startswith('mean of') for row in rows):
        print('no mean: the runs differ in their images or classes')
    if args.results_file:
        _write(rows, options, Path(args.results_file))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog='timm-amf evaluate',
        usage='%(prog)s RUN [RUN ...] [flags]\n       %(prog)s [DIR] --model NAME --initial-checkpoint FILE [flags of '
              'train_amf.py]',
        description='Evaluate trained runs from their folders: each, their mean, their ensemble.',
        epilog='The second form evaluates any weights, with the flags of train_amf.py (train_amf.py --help). It is '
               'meant where no word before the first flag is the folder of a run and no flag of the first form that '
               'train_amf.py lacks is given.',
    )
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='folder of a run: args.yaml and weights')
    add('--split', metavar='NAME', help='train, validation, test, ... (default: what each run was validated on)')
    add('--data-dir', metavar='DIR', help='folder of the data (default: where each run had it)')
    add('--weights', choices=tuple(WEIGHTS), default='best',
        help='of the best epoch; of the last, the moving average if there is one; the moving average; what the average '
             'is of (default: %(default)s)')
    add('--ten-crop', action='store_true', help='average over four corners and the centre, and their mirror images')
    add('--ensemble', action='store_true', help='also the average of the probabilities of all runs')
    add('--blocks', metavar='BLOCKS', help='path through a SpotTune: tuned, frozen, policy, or blocks as in 0,3,5')
    add('--sampling-seed', type=int, metavar='N', help="draw a SpotTune's decisions with this seed")
    add('--confidence', type=float, default=95., metavar='PERCENT', help='of the intervals (default: 95)')
    add('--results-file', metavar='FILE', help='CSV file to write')
    add('-b', '--batch-size', type=int, metavar='N', help="images at a time, ten crops being ten (default: the run's)")
    add('-j', '--workers', type=int, metavar='N', help="worker processes (default: the run's)")
    add('--cpu', action='store_true', help='use no GPU')
    add('--amp', action='store_true', help='compute in --amp-dtype (default: in float32, whatever the run trained in)')
    add('--amp-dtype', choices=('float16', 'bfloat16'), default='float16', help='default: %(default)s')
    return parser


def _options(args: argparse.Namespace) -> RunOptions:
    if not 0 < args.confidence < 100:
        raise UserError(f'--confidence: must be between 0 and 100, not {args.confidence:g}')
    for name, low in (('batch_size', 1), ('workers', 0), ('sampling_seed', 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f'--{name.replace("_", "-")}: must be at least {low}, not {value}')
    if args.amp and args.amp_dtype == 'float16' and choose_device(args.cpu).type == 'cpu':
        raise UserError('--amp: float16 needs a GPU; on the CPU add --amp-dtype bfloat16')
    return RunOptions(
        split=args.split,
        data_dir=args.data_dir,
        weights=args.weights,
        ten_crop=args.ten_crop,
        blocks=args.blocks,
        sampling_seed=args.sampling_seed,
        batch_size=args.batch_size,
        workers=args.workers,
        cpu=args.cpu,
        precision=getattr(torch, args.amp_dtype) if args.amp else None,
        level=args.confidence / 100,
    )


def _heading(options: RunOptions) -> str:
    crops = 'ten crops (average of their softmax)' if options.ten_crop else 'one crop'
    return f'{options.split or "validation"} split, {crops}, {options.weights} weights'
