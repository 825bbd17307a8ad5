"""`timm-amf evaluate`: runs, published models and files evaluated; each, their mean, and their ensemble."""
import argparse
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Optional

from timm_amf.engine.evaluate_runs import evaluations, summary, table, why_no_mean
from timm_amf.engine.evaluation import Evaluation, Row, short, top_k
from timm_amf.engine.opened import RunOptions
from timm_amf.errors import UserError
from timm_amf.files import replacing, write_text
from timm_amf.inference.sources import open_model, options_from
from timm_amf.text import columns, csv_of

__all__ = ['main', 'prediction_rows']

_SHOWN_CLASSES = 20


def main(args: argparse.Namespace) -> list[Row]:
    """Print the table of the runs, write the files that are asked for, and give the rows."""
    if not 0 < args.confidence < 100:
        raise UserError(f'--confidence: must be between 0 and 100, not {args.confidence:g}')
    options = options_from(args)
    options = replace(
        options, split=args.split, data_dir=args.data_dir, level=args.confidence / 100,
        flags=options.flags + ('--skip-bad-images',) * args.skip_bad_images)
    with replacing(args.predictions, 'name another file') if args.predictions else nullcontext() as file:
        if file:
            file.touch()  # before any work
        found = evaluations([open_model(run, options) for run in args.runs], options, args.ensemble)
        if file:
            rows = (dict(run=e.run, **row) for e in found for row in prediction_rows(e))
            file.write_text(csv_of(rows), encoding='utf-8')
    rows = summary(found, options.level)
    crops = 'ten crops (average of their softmax)' if options.ten_crop else 'one crop'
    print(f'{options.split or "validation"} split, {crops}, {options.weights} weights')
    print(table(rows, options.level))
    if why := why_no_mean(found):
        print(f'no mean: {why}')
    if len(found) == 1 or args.ensemble:
        print(_details(found[-1], options.level))
    if args.results_file:
        _write_results(rows, found, options, Path(args.results_file), args.results_format)
    return rows


# -- what is printed --------------------------------------------------------------------------------------------------


def _details(found: Evaluation, level: float) -> str:
    """Accuracy by class, the worst first, and what the policy did."""
    classes = sorted(found.by_class(level), key=lambda row: (row['accuracy'], row['class']))
    shown = classes if len(classes) <= _SHOWN_CLASSES else classes[:_SHOWN_CLASSES // 2]
    title = 'class' if shown is classes else f'class (the worst of {len(classes)})'
    lines = [[title, 'images', 'accuracy', f'{100 * level:g} % interval', 'precision', 'F1']]
    lines += [[
        row['class'], f'{row["images"]}', f'{row["accuracy"]:.2f}', f'{row["low"]:.2f} to {row["high"]:.2f}',
        f'{row["precision"]:.2f}', f'{row["f1"]:.2f}'] for row in shown]
    return '\n\n'.join(['\n' + columns(lines, range(1, 6)), *_policy(found.policy())])


def _policy(row: dict[str, Any]) -> Iterable[str]:
    """Columns of `policy.csv`: those that are numbered side by side, the others beneath."""
    numbered: dict[str, dict[int, Any]] = {}
    single = []
    for name, value in row.items():
        match = re.fullmatch(r'(.*)_(\d+)', name)
        if match:
            numbered.setdefault(match[1], {})[int(match[2])] = value
        elif value != '':
            single.append(f'{name} {value:.2f}' if isinstance(value, float) else f'{name} {value}')
    if not row:
        return
    lines = [['policy', *numbered]]
    for i in range(max(map(max, numbered.values()), default=-1) + 1):
        cells = (values.get(i, '') for values in numbered.values())
        lines.append([f'{i}', *(f'{cell:.3f}' if isinstance(cell, float) else f'{cell}' for cell in cells)])
    yield '\n'.join([columns(lines, range(1, len(lines[0]))), *single])


# -- files ------------------------------------------------------------------------------------------------------------


def prediction_rows(found: Evaluation, k: int = 5) -> Iterable[dict[str, Any]]:
    """A row an image: `path`, `label` (its class), `component`; names `label_0`, ... and probabilities `prob_0`, ... of
    the k likeliest classes; and what the model decided for it.
    """
    indices, probabilities = top_k(found.log_probs, k)
    names = dict(enumerate(found.class_names))
    for i, path in enumerate(found.paths):
        yield dict(
            path=path, label=found.class_names[found.targets[i]], component=found.components[found.component_of[i]],
            **{f'label_{j}': names.get(index, f'{index}') for j, index in enumerate(indices[i].tolist())},
            **{f'prob_{j}': short(p) for j, p in enumerate(probabilities[i])},
            **({} if found.decisions is None else dict(zip(found.decision_names, map(short, found.decisions[i])))))


def _write_results(
        rows: Sequence[Row],
        found: Sequence[Evaluation],
        options: RunOptions,
        path: Path,
        format: Optional[str],
) -> None:
    """The rows with the settings of the evaluation in each; with a format of JSON also classes and policy of each run,
    which for CSV are in files beside it.
    """
    settings = dict(
        split=options.split or '', weights=options.weights, crops=10 if options.ten_crop else 1,
        blocks=options.blocks or '', sampling_seed=options.sampling_seed, level=options.level)
    results = [{**asdict(row), **settings} for row in rows]
    classes = [dict(run=e.run, **row) for e in found for row in e.by_class(options.level)]
    policy = [dict(run=e.run, **e.policy()) for e in found if e.record is not None]
    remedy = 'name another --results-file; the results are above'
    if format == 'json' or not format and path.suffix == '.json':
        write_text(path, json.dumps(dict(results=results, classes=classes, policy=policy), indent=2) + '\n', remedy)
        return
    for name, part in (('', results), ('.classes', classes), ('.policy', policy)):
        if part:
            write_text(path.with_name(f'{path.stem}{name}{path.suffix}'), csv_of(part), remedy)
