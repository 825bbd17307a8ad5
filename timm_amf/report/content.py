"""What a report says: charts and tables from the files of runs, and from one evaluation of each."""
import argparse
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import nn

from timm_amf.data import Mixture
from timm_amf.engine.build import build_model, set_start
from timm_amf.engine.evaluation import Evaluation, Row
from timm_amf.engine.intervals import mean_interval
from timm_amf.engine.opened import Opened, RunOptions, open_trained
from timm_amf.engine.options import parse_args
from timm_amf.engine.run_folder import choose_device, eval_loader, is_run
from timm_amf.errors import UserError
from timm_amf.models.charts import Chart, Seen
from timm_amf.models.method import method_of
from timm_amf.search.charts import search_charts, sweep_charts
from timm_amf.search.results import SearchResults, ranking, summary
from timm_amf.search.sweep_results import HOW, Sweep
from timm_amf.text import read_rows
from timm_amf.tuning import Plan, describe_depths, param_groups
from timm_amf.tuning.resolve import resolve
from timm_amf.yaml_text import load_yaml

__all__ = [
    'Section', 'Table', 'Told', 'compared', 'curves', 'differences', 'model_sections', 'policy_of', 'read_told',
    'results_of', 'search_sections', 'setting', 'sweep_sections',
]

_ERRORS = 25
_CONFUSIONS = 10
_EMBEDDED = 1000  # images of the t-SNE


@dataclass(frozen=True)
class Table:
    """A table of a page: a caption, the headings of its columns, and its rows, whose first cells are headings."""
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a page; a part is a chart, a table or a paragraph."""
    title: str
    parts: list[Union[Chart, Table, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Told:
    """What the files of a run tell.

    Attributes:
        folder: Its folder.
        options: Of its `args.yaml`.
        plan: How it was fine-tuned.
        summary: Columns of `summary.csv`, NaN where a cell is empty; epochs from 1.
        policy: Columns of `policy.csv`; empty without one.
        speed: Columns of `speed.csv`; empty without one.
        environment: Command, versions and hardware, where they were kept.
    """
    folder: Path
    options: dict[str, Any]
    plan: Plan
    summary: dict[str, list[float]]
    policy: dict[str, list[float]]
    speed: dict[str, list[float]]
    environment: dict[str, Any]


def read_told(folder: Path) -> Told:
    """Read the files of a run."""
    for name in ('plan.yaml', 'summary.csv'):
        if not (folder / name).is_file():
            raise UserError(f'{folder / name}: is missing; the run has no finished epoch, or is of an older version')
    return Told(
        folder, load_yaml(folder / 'args.yaml'), Plan.from_yaml(folder / 'plan.yaml'),
        _columns(folder / 'summary.csv', ('epoch', 'train_loss', 'eval_loss', 'eval_top1')),
        *(_columns(folder / name, ('epoch',)) for name in ('policy.csv', 'speed.csv')),
        _environment(folder))


def _environment(folder: Path) -> dict[str, Any]:
    """Empty of a version that did not keep it."""
    return load_yaml(folder / 'environment.yaml') if (folder / 'environment.yaml').is_file() else {}


def _columns(path: Path, needed: Sequence[str]) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    rows = read_rows(path)
    for name in needed:
        if not rows or name not in rows[0]:
            raise UserError(f'{path}: has no column {name!r}' if rows else f'{path}: has no rows; train the run on')
    try:
        # Epochs count from 1, as in what a run prints; in its files from 0, as timm's.
        return {name: [float(row[name] or 'nan') + (name == 'epoch') for row in rows] for name in rows[0]}
    except (TypeError, ValueError) as e:
        raise UserError(f'{path}: is damaged ({e})') from None


# -- from the files ---------------------------------------------------------------------------------------------------


_EACH = 'On the validation images, after each epoch.'
_TRAIN_LOSS = (
    'That of training is what was minimised: on augmented images, with label smoothing, and with the terms that AMF, '
    'MultiTune and global-k add. Compare it with itself.')
# Name, title, caption, the columns that it shows, and their unit.
_CURVES = (
    ('loss', 'Loss', f'Mean over the images of an epoch. {_TRAIN_LOSS}', 'train_loss|eval_loss', ''),
    ('accuracy', 'Accuracy', _EACH, 'eval_(top1|top5|balanced_accuracy|macro_f1)', 'percent'),
    ('components', 'Accuracy by component', _EACH, 'eval_top1_.+', 'percent'),
    ('lr', 'Learning rate', 'The highest of each role, at the end of an epoch.', 'lr_.+', 'LR'),
    ('lr', 'Learning rate', 'At the end of an epoch.', 'lr', 'LR'),  # of a version without roles
    ('speed', 'Images per second', 'In training, over all processes, loading included.', 'images_per_s', 'images/s'),
)


def curves(told: Told) -> Section:
    """Loss, metrics, LR and images/s by epoch."""
    found: dict[str, Chart] = {}
    for name, title, caption, shown, y in _CURVES:
        columns = told.speed if name == 'speed' else told.summary
        table = {column: values for column, values in columns.items() if re.fullmatch(shown, column)}
        if table:
            found.setdefault(name, Chart(
                name, title, caption, 'lines', {'epoch': columns['epoch'], **table}, x='epoch', y=y,
                range=(0, 100) if y == 'percent' else None))
    return Section('Training', list(found.values()))


def policy_of(told: Told, model: nn.Module) -> list[Section]:
    """The model's own figures of what its policy did in training."""
    parts = {name.removesuffix('_assigned_0') for name in told.policy if name.endswith('_assigned_0')}
    parts -= {'train', *(f'train_{part}' for part in parts)} | {'assigned_0'}
    charts = method_of(model).charts(Seen(told.policy, sorted(parts)))
    return [Section('The policy', charts)] if charts else []


def setting(told: Told, model: Optional[nn.Module], name: str = '', config: str = 'args.yaml') -> Section:
    """The Plan in words, what trains, command, versions, hardware and cost."""
    plan, about, parts = told.plan, told.environment, []
    parts.append(
        f'{plan.epochs} epoch{"s" * (plan.epochs != 1)} of {plan.opt}, on a {plan.schedule.sched} schedule; images of '
        f'{told.options.get("img_size") or "the size of the model"}{" px" if told.options.get("img_size") else ""}, '
        f'{told.options.get("batch_size")} a step.')
    if model is not None:
        rows, groups, table = [], param_groups(model, plan), resolve(model, plan)
        for role, settings in table.roles.items():
            mine = [group for group in groups if group['role'] == role]
            total = sum(s.place.role == role for s in table.parameters.values())
            rows.append((
                role, _trains(settings.plan.train, mine), _span([group['lr'] for group in mine]),
                _span([group['weight_decay'] for group in mine]), f'{sum(len(g["params"]) for g in mine)} of {total}',
                f'{sum(p.numel() for g in mine for p in g["params"]):,}'))
        parts.append(Table(
            'What trains', ('role', 'trains', 'LR', 'weight decay', 'tensors', 'parameters'), rows))
        parts += [line for line in describe_depths(model, plan).splitlines() if line]
    facts = [('folder', str(told.folder))]
    if about.get('command'):
        facts.append(('command', str(about['command'])))
    facts.append((
        'the same run', f'timm-amf train --config {shlex.quote(str(told.folder / config))} --experiment again'))
    for title in ('versions', 'hardware'):
        found = about.get(title) or {}
        facts.append((title, ', '.join(f'{k} {v}' for k, v in found.items()) or 'not kept by the version that ran it'))
    if model is not None:
        trained = sum(p.numel() for g in groups for p in g['params'])
        facts.append((
            'parameters', f'{sum(p.numel() for p in model.parameters()):,}, of which {trained:,} were trained'))
    if told.speed:
        seconds, epochs = np.nansum(told.speed['seconds']), len(told.speed['epoch'])
        cost = f'{timedelta(seconds=round(seconds))} of training steps in {epochs} epoch{"s" * (epochs != 1)}'
        facts.append(('cost', cost))
    parts.append(Table('The run', ('', ''), facts))
    if (told.folder / 'fit.csv').is_file():
        parts.append(Table(
            'What fit tried, on the validation images',
            ('candidate', 'flags', 'pilot', str(told.options.get('eval_metric')), 'seconds', ''),
            [(row['candidate'], row['flags'], *(row[key] and f'{float(row[key]):.2f}' for key in ('pilot', 'metric')),
              row['seconds'], 'trained to the end' * (row['winner'] == 'True'))
             for row in read_rows(told.folder / 'fit.csv') if row['seconds'] != '0.0']))
    if (told.folder / 'mix.csv').is_file():
        floor = 'frozen features, logistic regression' if told.options.get('head_start') == 'probe' else 'the start'
        ends = {'0.0': f'0: {floor}', '1.0': '1: the best epoch'}
        parts.append(Table(
            'Weights mixed, on the validation images',
            ('share of the fine-tuned weights', str(told.options.get('eval_metric')), 'loss', ''),
            [(ends.get(row['share'], row['share']), f'{float(row["metric"]):.2f}', f'{float(row["loss"]):.4f}',
              'kept' * (row['kept'] == 'True')) for row in read_rows(told.folder / 'mix.csv')]))
    return Section(f'How it was fine-tuned{name and f": {name}"}', parts)


def _trains(train: Any, groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return 'nothing'
    start = min(group['start_epoch'] for group in groups)
    what = 'all' if train in ('all', None) else train if isinstance(train, str) else ', '.join(map(str, train))
    return f'{what}, from epoch {start + 1} on' if start else what


def _span(values: Sequence[float]) -> str:
    low, high = min(values, default=0.), max(values, default=0.)
    return f'{high:g}' if low == high else f'{low:g} to {high:g}'


# -- from an evaluation -----------------------------------------------------------------------------------------------


def results_of(rows: Sequence[Row]) -> Table:
    """The metrics, a row a run and component."""
    head = ('run', 'component', 'images', 'top-1', '95 % interval', 'top-5', 'balanced', 'macro F1', 'loss',
            'calibration error')
    return Table('Results in percent', head, [(
        row.run, row.component or 'all', f'{row.images}', f'{row.top1:.2f}',
        f'{row.top1_low:.2f} to {row.top1_high:.2f}', f'{row.top5:.2f}', f'{row.balanced_accuracy:.2f}',
        f'{row.macro_f1:.2f}', f'{row.loss:.4f}',
        f'{row.ece:.2f}' + ('' if row.temperature is None else
                            f' ({row.ece_mended:.2f} at temperature {row.temperature:.2f})')) for row in rows])


def model_sections(
        told: Told,
        run: Opened,
        model: nn.Module,
        data: Mixture,
        found: Evaluation,
        options: RunOptions,
) -> Iterator[Section]:
    """What the evaluation of one run shows: errors, calibration, the model's own figures, and the features."""
    names = [*found.class_names, *(f'output {i}' for i in range(len(found.class_names), found.log_probs.shape[1]))]
    confidence = np.exp(found.log_probs.max(1))
    texts = [
        f'{names[t]}, {Path(p).name}' if t == q else f'{names[t]} taken for {names[q]}, {Path(p).name}'
        for t, q, p in zip(found.targets, found.predicted, found.paths)]
    yield Section('Classes and errors', [*_confusions(found, names, confidence, texts), *_classes(found)])
    bins = {key: values[found.reliability()['images'] > 0] for key, values in found.reliability().items()}
    yield Section('Calibration', [Chart(
        'reliability', 'Reliability diagram',
        'Accuracy of the images of each bin of confidence; on the line of perfect calibration both are the same.',
        'lines', {'confidence': bins['confidence'], 'accuracy': bins['accuracy'], 'perfect': bins['confidence'],
                  'images': bins['images']}, ('accuracy', 'perfect'), 'confidence', 'accuracy', (0, 1))])

    def samples(indices: Sequence[int]) -> torch.Tensor:
        device = choose_device(options.cpu or run.args.cpu)
        loader = eval_loader(run.args, model, data.subset(indices), device, workers=0)
        return torch.cat([batch.input for batch in loader])

    decisions = None if run.args.eval_blocks or options.blocks else found.decisions
    seen = Seen(told.policy, found.components, found.component_of, decisions, texts, samples)
    with torch.inference_mode():
        own = method_of(model).charts(seen)
    if own:
        yield Section('The policy', own)
    features = _features(told, run, model, data, found, options)
    if features:
        yield features


def _confusions(found: Evaluation, names: list[str], confidence: np.ndarray, texts: list[str]) -> Iterator:
    matrix = found.confusion()
    yield Chart(
        'confusion', 'Confusion matrix', 'Number of images by class (rows) and predicted class (columns).', 'heat',
        {'class': names, **{f'{name}': matrix[:, i].tolist() for i, name in enumerate(_distinct(names))}},
        x='predicted class', y='class')
    errors = matrix * (1 - np.eye(len(matrix), dtype=int))
    worst = [np.unravel_index(i, matrix.shape) for i in np.argsort(-errors, axis=None, kind='stable')[:_CONFUSIONS]]
    worst = [(int(of), int(to)) for of, to in worst if errors[of, to]]
    order = np.argsort(-confidence, kind='stable')
    if worst:
        yield Table('The worst confusions', ('class', 'taken for', 'images', 'of the class'), [
            (names[of], names[to], f'{matrix[of, to]}', f'{100 * matrix[of, to] / matrix[of].sum():.0f} %')
            for of, to in worst])
        seen = Seen(texts=texts)
        groups = {
            f'{names[of]} taken for {names[to]}':
            [i for i in order if found.targets[i] == of and found.predicted[i] == to][:4] for of, to in worst}

        def sure(i: int) -> str:
            return f'confidence {100 * confidence[i]:.0f} %'

        yield Chart(
            'worst_confusions', 'Images of the worst confusions', 'The most confident of each.', 'images',
            seen.images(groups, sure))
        yield Chart(
            'errors', 'The most confident errors', f'Up to {_ERRORS}.', 'images',
            seen.images({'': [i for i in order if not found.hit[i]][:_ERRORS]}, sure))
    else:
        yield 'No image was taken for another class.'


def _distinct(names: Sequence[str]) -> list[str]:
    """Columns of a table: a class may be called like the first of them."""
    return [f'{name} ' if name == 'class' else name for name in names]


def _classes(found: Evaluation) -> Iterator[Chart]:
    rows = sorted(found.by_class(), key=lambda row: (row['accuracy'], row['class']))
    table = {name: [row[name] for row in rows] for name in rows[0]}
    table['accuracy_low'], table['accuracy_high'] = table.pop('low'), table.pop('high')
    yield Chart(
        'classes', 'Accuracy by class', "The worst first; whiskers are Wilson's 95 % intervals.", 'bars', table,
        ('accuracy',), 'percent of the images of the class', range=(0, 100))


# -- features ---------------------------------------------------------------------------------------------------------


def _features(told, run, model, data, found, options) -> Optional[Section]:
    """t-SNE of the features that the classifier sees, before fine-tuning and after (AMF, Figures 3 and 5)."""
    from sklearn.manifold import TSNE

    chosen = np.arange(len(data))
    if len(chosen) > _EMBEDDED:
        chosen = np.sort(np.random.default_rng(0).choice(len(chosen), _EMBEDDED, replace=False))
    if len(chosen) < 5:
        return None
    part, device = data.subset(chosen), choose_device(options.cpu or run.args.cpu)
    section, tables = Section('Features'), []
    groups = [found.components[i] for i in found.component_of[chosen]] if len(found.components) > 1 else [
        found.class_names[i] for i in found.targets[chosen]]
    nets = {'after': model}
    try:
        nets = {'before fine-tuning': _start(told, run, model, data.num_classes), **nets}
    except (UserError, OSError) as e:
        section.parts.append(f'Not shown before fine-tuning: {e}')
    for panel, pooled in zip(nets, _pooled([net.eval().to(device) for net in nets.values()], run.args, part, device)):
        # Distances in t-SNE are of single values: features of a hundredth of the size would all be one point.
        pooled = pooled / max(pooled.std(), 1e-12)
        xy = TSNE(perplexity=min(30., (len(pooled) - 1) / 3), init='pca', random_state=0).fit_transform(pooled)
        tables.append({
            'x': xy[:, 0].tolist(), 'y': xy[:, 1].tolist(), 'group': groups, 'panel': [panel] * len(xy),
            'class': [found.class_names[i] for i in found.targets[chosen]], 'image': chosen.tolist()})
    of = 'component' if len(found.components) > 1 else 'class'
    section.parts.append(Chart(
        'features', 't-SNE of the features', f'Of {len(chosen)} validation images, by {of}: what the classifier sees. '
        'Each half is an embedding of its own (scikit-learn, seed 0).', 'points',
        {name: [v for table in tables for v in table[name]] for name in tables[0]}))
    return section


def _start(told: Told, run: Opened, model: nn.Module, num_classes: int) -> nn.Module:
    """The model as it was before the first step, but for its classifier."""
    args = parse_args([
        '--config', str(told.folder / 'args.yaml'), '--plan', '', '--resume', '', '--class-weight', '', '--tracker',
        'none', *(['--data-dir', run.args.data_dir] if run.args.data_dir else [])])
    if not (args.pretrained or args.initial_checkpoint):
        raise UserError('the run began with random weights')
    net = build_model(args, num_classes)
    set_start(net, resolve(net, told.plan), args, num_classes)
    return net


@torch.inference_mode()
def _pooled(nets: list[nn.Module], args: argparse.Namespace, data: Mixture, device: torch.device) -> list[np.ndarray]:
    found = [
        [net.forward_head(net.forward_features(batch.input), pre_logits=True).float().flatten(1).cpu() for net in nets]
        for batch in eval_loader(args, nets[0], data, device, workers=0)]
    return [torch.cat(of_net).numpy() for of_net in zip(*found)]


# -- several runs -----------------------------------------------------------------------------------------------------


def compared(every: Sequence[Told], found: Sequence[Evaluation]) -> Section:
    """Curves of several runs on shared axes, and differences of their accuracies over the same images."""
    section, epochs = Section('Compared'), sorted({epoch for told in every for epoch in told.summary['epoch']})
    columns = {
        'train_loss': 'Training loss', 'eval_loss': 'Validation loss', 'eval_top1': 'Validation accuracy',
        **{name: f'Validation accuracy: {name[10:]}' for name in every[0].summary if name.startswith('eval_top1_')}}
    for column, title in columns.items():
        table = {'epoch': epochs}
        for told in every:
            values = dict(zip(told.summary['epoch'], told.summary.get(column, [])))
            table[str(told.folder)] = [values.get(epoch, math.nan) for epoch in epochs]
        percent = column.startswith('eval_top1')
        caption = _TRAIN_LOSS if column == 'train_loss' else 'After each epoch.'
        section.parts.append(Chart(
            column, title, caption, 'lines', table, x='epoch', y='percent' if percent else '',
            range=(0, 100) if percent else None))
    if len(found) > 1:
        section.parts.append(differences(found))
    return section


def differences(found: Sequence[Evaluation]) -> Table:
    """Differences of the accuracy of evaluations from that of the first, paired over the images."""
    rows, first = [], found[0]
    for one in found[1:]:
        name = f'{one.run} less {first.run}'
        same = (one.paths, one.class_names, one.targets.tolist()) == (
            first.paths, first.class_names, first.targets.tolist())
        if not same or len(one.paths) < 2:
            rows.append((name, '', 'not the same images and classes' if not same else 'one image', ''))
            continue
        points = 100 * (one.hit.astype(float) - first.hit)
        mean, _, low, high = mean_interval(points.tolist())
        rows.append((
            name, f'{mean:+.2f}', f'{low:+.2f} to {high:+.2f}', f'{(points > 0).sum()} and {(points < 0).sum()}'))
    return Table(
        "Differences of top-1 accuracy, percentage points, paired over the images (Student's t interval)",
        ('runs', 'difference', '95 % interval', 'images that one of them alone gets right'), rows)


# -- a search, a sweep ------------------------------------------------------------------------------------------------


def search_sections(folder: Path) -> list[Section]:
    """Of a block-wise search: accuracy by position with both baselines, the tables, the best Plan."""
    if not (folder / 'results.json').is_file():
        raise UserError(f'{folder}: the search has not ended; wait, or give its command with --resume auto')
    results = SearchResults.read(folder / 'results.json')
    best, ways, candidates = results.winner().candidate, summary(results), ranking(results)
    plan = setting(Told(
        folder, load_yaml(folder / 'args.yaml'), Plan.from_yaml(folder / 'best.yaml'), {}, {}, {},
        _environment(folder)), None, config='best.yaml')
    what = 'everything' if best.way == 'all' else ', '.join(best.modules) or 'nothing'
    plan.parts.insert(0, f'Beside the classifier {what} trains.')
    return [
        Section('Search', [
            f'{results.title}. It took {timedelta(seconds=round(results.seconds))}.', *search_charts(results),
            Table('The best of each way', ways[0], ways[1:])]),
        Section('Candidates', [Table('All candidates, the best first', candidates[0], candidates[1:])]), plan]


def sweep_sections(folder: Path) -> list[Section]:
    """Of a sweep: the metric by each setting, the table with its tests, the test images, the best Plan."""
    found = Sweep.read(folder)
    head, *rows = found.table
    section = Section('Sweep', [
        f'Of {len(rows)} configurations the best on the validation images is {found.best}: {found.metric} '
        f'{found.best.mean:.2f}.', *sweep_charts(found), Table('Configurations, the best first', head, rows)])
    if len(found.best.runs) > 1:
        section.parts.append(f'{HOW}.')
    sections = [section]
    if (folder / 'test.csv').is_file():
        tested = [
            Row(row.pop('run'), row.pop('component'), int(row.pop('images')),
                **{name: float(value) if value else None for name, value in row.items()})
            for row in read_rows(folder / 'test.csv')]
        sections.append(Section('Test images', [
            'The runs of the best configuration, evaluated once.', results_of(tested)]))
    run = found.runs(found.best)[0]
    if is_run(run):
        model = open_trained(run, RunOptions(), False).load(None)
        sections.append(setting(read_told(run), model, run.name))
    return sections
