"""Trained runs evaluated from their folders: one crop or ten, each alone, their mean and their ensemble.

    timm-amf evaluate runs/seed0 runs/seed1 runs/seed2 runs/seed3 --split test --ten-crop --ensemble

This is how papers report: mean and standard deviation of several runs, and beside the state of the art the ensemble of
all of them over ten crops (Plested, Shen and Gedeon, "Rethinking binary hyperparameters for deep transfer learning for
image classification", section 3.3). What is averaged the paper leaves open; here it is the softmax, over the crops of
an image as in Krizhevsky et al. (2012, section 4.1), and over the runs.
"""
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch

from timm_amf.data import DataSpec, Mixture, check_images, create_dataset, data_spec_from_args, splits_from_args
from timm_amf.data.datasets import split_folders
from timm_amf.data.shares import OtherImages
from timm_amf.data.spec import SPLIT_NAMES
from timm_amf.engine.build import input_channels
from timm_amf.engine.evaluation import Evaluation, Row, mean_rows
from timm_amf.engine.opened import Opened, RunOptions, open_trained
from timm_amf.engine.run_folder import is_run, settings_of
from timm_amf.errors import UserError
from timm_amf.models.method import method_of
from timm_amf.text import CsvLog, columns
from timm_amf.tuning import Plan
from timm_amf.yaml_text import load_yaml

__all__ = ['Row', 'RunOptions', 'evaluate_runs', 'evaluations', 'open_images', 'summary', 'table', 'why_no_mean']


_logger = logging.getLogger(__name__)
_ENSEMBLE = 'ensemble of '


def evaluate_runs(
        runs: Sequence[Union[str, Path, Opened]],
        options: Optional[RunOptions] = None,
        ensemble: bool = False,
) -> list[Row]:
    """The metrics of runs; see `evaluations` and `summary`."""
    options = options or RunOptions()
    return summary(evaluations(runs, options, ensemble), options.level)


def summary(found: Sequence[Evaluation], level: float = 0.95) -> list[Row]:
    """Rows of each run; where there are several that differ in nothing but their seed, also of their mean; of their
    ensemble if there is one. The rows of a mixture's components follow each.
    """
    runs = [e for e in found if not e.run.startswith(_ENSEMBLE)]
    rows = [e.rows(level) for e in runs]
    if len(runs) > 1 and not why_no_mean(found):
        rows.append(mean_rows(rows, level))
    rows += [e.rows(level) for e in found[len(runs):]]
    return [row for part in rows for row in part]


def why_no_mean(found: Sequence[Evaluation]) -> str:
    """In what but their seed runs differ, which then are no sample of one training; '' if in nothing."""
    first, *others = (e for e in found if not e.run.startswith(_ENSEMBLE))
    for other in others:
        one, two = map(_settings, (first.run, other.run))
        name = next((name for name in {**one, **two} if one.get(name) != two.get(name)), None)
        if name is not None:
            return f'{first.run} and {other.run} differ in their {name} ({one.get(name)} and {two.get(name)})'
        if _difference(first, other):
            return _difference(first, other)
    return ''


def _settings(run: str) -> dict[str, Any]:
    """What the training of a run followed from besides its seed; of what is no run, only what it is."""
    if not is_run(run):
        return {'model': run}
    found = settings_of(load_yaml(Path(run) / 'args.yaml'), Plan.from_yaml(Path(run) / 'plan.yaml').to_dict())
    return {name: value for name, value in found.items() if name not in ('seed', 'noise_seed')}


def evaluations(
        runs: Sequence[Union[str, Path, Opened]],
        options: Optional[RunOptions] = None,
        ensemble: bool = False,
) -> list[Evaluation]:
    """Evaluate runs, in float32 unless the options say otherwise: one pass over the images for each.

    Args:
        runs: Their folders, or what was opened already.
        options: How.
        ensemble: Evaluate the average of all runs' probabilities, too.

    Returns:
        Of each run, in their order, and last on request of their ensemble.
    """
    options = options or RunOptions()
    opened = [run if isinstance(run, Opened) else open_trained(run, options) for run in runs]
    folders = [run.folder.resolve() for run in opened]
    for run, folder in zip(opened, folders):
        if folders.count(folder) > 1:
            raise UserError(f'{run.name}: is given twice; a run has one part in a mean or an ensemble')
    if ensemble and len(opened) < 2:
        raise UserError('--ensemble: there is one run; give two or more')
    images = [open_images(run, options) for run in opened]
    found = [_blank(run.name, data) for run, data in zip(opened, images)]
    reason = next((r for r in (_difference(found[0], other) for other in found[1:]) if r), None)
    if ensemble and reason:
        raise UserError(f'--ensemble: {reason}; an ensemble needs the same images and classes')
    for i, (run, data) in enumerate(zip(opened, images)):
        found[i] = _evaluate(run, data, found[i], options)
        outputs = found[0].log_probs.shape[1], found[i].log_probs.shape[1]
        if ensemble and outputs[0] != outputs[1]:
            raise UserError(
                f'--ensemble: {found[0].run} has {outputs[0]} outputs and {run.name} {outputs[1]}; '
                f'an ensemble needs the same classes')
    if ensemble:
        joint = np.logaddexp.reduce([e.log_probs.astype(np.float64) for e in found]) - math.log(len(found))
        found.append(replace(
            found[0], run=f'{_ENSEMBLE}{len(found)} runs', log_probs=joint.astype(np.float32), decision_names=(),
            decisions=None, record=None))
    return found


def open_images(run: Opened, options: RunOptions) -> Mixture:
    """The images that a run is evaluated on, with the labels that its class names give them."""
    args = run.args
    spec, split = data_spec_from_args(args), splits_from_args(args)[1]
    if options.data_dir and len(spec.components) == 1:  # which may have named its folder itself
        spec = replace(spec, components=(replace(spec.components[0], root=options.data_dir),))
    if split == 'val' and options.split and options.split not in SPLIT_NAMES['val']:
        # A dataset's own name. A component that says itself what its splits are does not heed it.
        fixed = [c.name for c in spec.components if c.split_name('val') != options.split]
        if fixed:
            raise UserError(
                f'--split {options.split}: {run.name} says what the splits of component {fixed[0]!r} are; give train, '
                f'validation or test')
    elsewhere = [c for c in spec.components if options.data_dir and c.root != options.data_dir]
    if elsewhere:
        raise UserError(
            f'--data-dir: {run.name} names the folder of component {elsewhere[0].name!r} itself '
            f'({elsewhere[0].root}); change it in its args.yaml')
    try:
        try:
            data = _open_images(run, spec, split, options)
        except OtherImages:
            if not options.data_dir:
                raise
            # Nothing was drawn from these images: they are all for evaluation.
            spec = replace(spec, val_share=0., test_share=0., group=None, split_file=None)
            data = _open_images(run, spec, split, options)
    except UserError as e:
        raise UserError(f'{run.name}: {e}') from None
    if args.skip_bad_images:
        check_images(data, True, args.cache_dir, args.workers, sys.stderr.isatty())
    return data


def _open_images(run: Opened, spec: DataSpec, split: str, options: RunOptions) -> Mixture:
    root = spec.components[0].root or ''
    if options.data_dir and not spec.shares and os.path.isdir(root) and not split_folders(root):
        _logger.warning(f'{root} has no folders of splits: all of its images are evaluated.')
        split = 'train'
    return create_dataset(spec, split, input_channels(run.args), run.class_names)


def _difference(a: Evaluation, b: Evaluation) -> Optional[str]:
    """What keeps two runs from an ensemble; None where they have the same images and classes."""
    for what, one, other in (
            ('classes', a.class_names, b.class_names), ('images', a.paths, b.paths),
            ('labels', a.targets.tolist(), b.targets.tolist()), ('components', a.components, b.components)):
        if one != other:
            first = next((f'{x} and {y}' for x, y in zip(one, other) if x != y), '')
            how = first if len(one) == len(other) else f'{len(one)} and {len(other)} of them'
            return f'{a.run} and {b.run} differ in their {what} ({how})'
    return None


def _blank(name: str, data: Mixture) -> Evaluation:
    """What is known before the pass."""
    return Evaluation(
        name, data.class_names, data.components, [data.filename(i) for i in range(len(data))], data.targets,
        data.component_of, np.zeros((len(data), 0), dtype=np.float32))


def _evaluate(run: Opened, data: Mixture, blank: Evaluation, options: RunOptions) -> Evaluation:
    model = run.load(data.num_classes)
    if run.class_names is None and run.plan is None:  # a run of an older version labels by the order of its folders
        if model.num_classes != data.num_classes:
            raise UserError(
                f'{run.name}: does not name its {model.num_classes} classes, and the images have {data.num_classes}; '
                f'name them in order with --class-map FILE')
        _logger.warning(f'{run.name} does not name its classes: they are taken in the order of the folders.')
    record, log_probs, decisions = method_of(model).create_record(data.components), None, None
    if record is not None:  # to match components and branches as the run did
        record.history = CsvLog(run.folder / 'policy.csv', sys.maxsize).rows
    for batch in run.answers(model, data, options):
        if log_probs is None:
            log_probs = np.empty((len(data), batch.log_probs.shape[1]), dtype=np.float32)
            if batch.decisions is not None:
                decisions = np.empty((len(data), batch.decisions.shape[1]), dtype=np.float32)
        index = batch.index.numpy()
        log_probs[index] = batch.log_probs.numpy()
        if decisions is not None:
            decisions[index] = batch.decisions.numpy()
            record.add(batch.decisions, torch.from_numpy(data.component_of[index]))
    if decisions is None:
        return replace(blank, log_probs=log_probs)
    return replace(
        blank, log_probs=log_probs, decision_names=record.image_names, decisions=decisions, record=record)


def table(rows: Sequence[Row], level: float = 0.95) -> str:
    """The rows as text."""
    spread = any(row.top1_std is not None for row in rows)
    interval = f'{100 * level:g} % interval'
    lines = [['', 'images', 'top1', *(['std'] if spread else []), interval, 'top5', 'balanced', interval, 'macro F1',
              interval, 'loss']]
    for row in rows:
        deviation = '' if row.top1_std is None else f'{row.top1_std:.2f}'
        lines.append([
            f'  {row.component}' if row.component else row.run, f'{row.images}', f'{row.top1:.2f}',
            *([deviation] if spread else []), f'{row.top1_low:.2f} to {row.top1_high:.2f}', f'{row.top5:.2f}',
            f'{row.balanced_accuracy:.2f}', f'{row.balanced_accuracy_low:.1f} to {row.balanced_accuracy_high:.1f}',
            f'{row.macro_f1:.2f}', f'{row.macro_f1_low:.1f} to {row.macro_f1_high:.1f}', f'{row.loss:.4f}'])
    notes = ["intervals: of top1 Wilson's and of the others the bootstrap's over the images"]
    if spread:
        notes.append("of the mean Student's t over the runs (std: ddof 1), unless all runs agree")
    calibration = [
        f'{row.run}: calibration error {row.ece:.2f} %' + (
            '' if row.temperature is None else f'; at temperature {row.temperature:.2f}, {row.ece_mended:.2f} %')
        for row in rows if not row.component]
    return '\n'.join([columns(lines, range(1, 99)), *calibration, '; '.join(notes)])
