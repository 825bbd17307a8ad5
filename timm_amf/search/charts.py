"""What a search and a sweep found, as charts: of `search.png` and `sweep.png`, and of the page of `timm-amf report`."""
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from timm_amf.figures import write_sheet
from timm_amf.models.charts import Chart
from timm_amf.search.results import BASELINES, CandidateResult, SearchResults, labelled
from timm_amf.search.sweep_results import Configuration, Sweep, shown

__all__ = ['search_charts', 'sweep_charts', 'write_figure']

_TITLES = {'layer': 'Layers', 'block': 'Blocks', 'window': 'Windows'}
_MOST_LINES = 6  # of a chart of a sweep; more are dots
_LOG = 8  # ratio of the largest to the least value, from which an axis is logarithmic


def write_figure(charts: Sequence[Chart], *paths: Path) -> list[str]:
    """Write charts as one figure; the note that there is none where the extra is not installed."""
    try:
        for path in paths:
            write_sheet(charts, path)
    except ImportError as e:
        return [f'No figure: {e}']
    return []


def search_charts(results: SearchResults) -> list[Chart]:
    """Accuracy by position, a chart for each way with several candidates (the block-wise paper, Figures 4 to 6).

    The input is on the left, the output on the right. Baselines are lines, and where layers were trained together, so
    are these, beside the single layers.
    """
    ways = {way: results.of_way(way) for way in results.ways}
    alone = [found for way, found in ways.items() if way.startswith(('top', 'random'))]
    found = []
    for way in (way for way in ways if len(ways[way]) > 1):
        best, candidates = results.winner(way), ways[way]
        table: dict[str, list] = {
            'candidate': [r.candidate.name for r in candidates], **_with_limits('accuracy', candidates),
            'best': [r.top1 if r is best else math.nan for r in candidates]}
        for baseline in BASELINES:
            table.update(_with_limits(labelled(baseline), results.of_way(baseline) * len(candidates)))
        if way == 'layer':
            table.update({f'{one[0].candidate.way} layers': [one[0].top1] * len(candidates) for one in alone})
        found.append(Chart(
            f'search_{way}', f'{_TITLES[way]}: best is {best.candidate.name}, {best.top1:.1f} %',
            "Shaded: Wilson's 95 % intervals.", 'lines',
            {name: values for name, values in table.items() if values},
            x='from the input (left) to the output (right)', y='top-1 accuracy (%)'))
    return found


def _with_limits(name: str, found: list[CandidateResult]) -> dict[str, list[float]]:
    low, high = zip(*(r.interval() for r in found)) if found else ((), ())
    return {name: [r.top1 for r in found], f'{name}_low': list(low), f'{name}_high': list(high)}


def sweep_charts(found: Sweep) -> list[Chart]:
    """The metric by each setting that differs (AMF, Figure 4; non-binary transfer learning, Figures 1 to 6).

    A line joins the means of configurations that differ in the chart's setting alone. Of a mixture the lines are its
    components', with all other settings as in the best configuration. Where settings were drawn from a range, nothing
    differs alone, and there are dots.
    """
    keys = [key for key in found.best.values if len({c.values[key] for c in found.configurations}) > 1]
    return [_setting(found, key) for key in keys]


def _setting(found: Sweep, key: str) -> Chart:
    complete = [c for c in found.configurations if c.mean is not None]
    every = sorted({c.values[key]: None for c in sorted(complete, key=lambda c: c.number)}, key=_number)
    numbers = [_number(value) for value in every]
    lines, kind = _lines_of(found, key, complete), 'lines'
    if lines is None:
        kind, every = 'dots', [c.values[key] for c in complete]
        lines = {'configuration': (found.metric, dict(enumerate(complete)))}
    places = list(range(len(every))) if kind == 'dots' else every
    are_numbers = math.inf not in numbers
    table: dict[str, list] = {key: [_number(value) if are_numbers else shown(value) for value in every]}
    for name, (metric, members) in lines.items():
        scores = [members[place].scores(metric) if place in members else [math.nan] for place in places]
        table[name] = [sum(values) / len(values) for values in scores]
        if max(map(len, scores)) > 1:
            table[f'{name}_low'], table[f'{name}_high'] = list(map(min, scores)), list(map(max, scores))
    at = complete.index(found.best) if kind == 'dots' else every.index(found.best.values[key])
    table['best'] = [found.best.mean if i == at else math.nan for i in range(len(every))]
    return Chart(
        f'sweep_{key}', f'Validation {found.metric} by {key}', f'{found.model}, validation images; best: {found.best}.'
        + (' Limits: the lowest and the highest seed.' if len(found.best.runs) > 1 else ''), kind, table, x=key,
        y=f'validation {found.metric}{"" if found.metric == "loss" else " (%)"}',
        log=are_numbers and min(numbers) > 0 and max(numbers) >= _LOG * min(numbers))


def _lines_of(
        found: Sweep,
        key: str,
        complete: list[Configuration],
) -> Optional[dict[str, tuple[str, dict[Any, Configuration]]]]:
    """(metric, configurations by value) of each line; None where nothing differs alone."""
    groups: dict[str, dict[Any, Configuration]] = {}
    for c in sorted(complete, key=lambda c: c.number):
        others = ' '.join(f'{name}={shown(value)}' for name, value in c.values.items() if name != key)
        groups.setdefault(others or 'mean', {})[c.values[key]] = c
    alone = next(group for group in groups.values() if found.best in group.values())
    parts = [name for name in next(iter(found.best.runs.values())) if name.startswith(f'{found.metric}_')]
    if len(alone) > 1 and 1 < len(parts) < _MOST_LINES:
        return {'all': (found.metric, alone), **{name[len(found.metric) + 1:]: (name, alone) for name in parts}}
    if len(groups) > _MOST_LINES or max(map(len, groups.values())) == 1:
        return None
    return {name: (found.metric, group) for name, group in groups.items()}


def _number(value: Any) -> float:
    """Infinite for a word."""
    try:
        return float(value)
    except ValueError:
        return math.inf
