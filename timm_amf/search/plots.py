"""What a search found, as plots.

Of a block-wise search accuracy by position (the paper's Figs. 4 to 6); of a sweep accuracy by LR, or what else differs
(AMF, Fig. 4; non-binary transfer learning, Figs. 1 to 6).

Everything is drawn with matplotlib's objects, without pyplot: no window system is needed, and the figures of a notebook
stay as they are.
"""
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.search.results import BASELINES, CandidateResult, SearchResults, labelled, title
from timm_amf.search.sweep_results import Configuration, Sweep, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['plot_search', 'plot_sweep', 'search_figure', 'sweep_figure']

# Okabe and Ito, "Color universal design" (2008): told apart with any colour vision. Their yellow is too faint on white.
_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _RED, _PURPLE = (
    '#000000', '#E69F00', '#56B4E9', '#009E73', '#0072B2', '#D55E00', '#CC79A7')
_BASELINE_COLOURS = {'classifier': _ORANGE, 'all': _GREEN}
_BASELINE_LINES = {'classifier': (0, (6, 2)), 'all': 'solid'}
_TOP_COLOURS, _TOP_LINES = (_PURPLE, _SKY, _BLACK, _RED), ((0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1)), 'solid')
_PANELS = {'layer': 'Layers', 'block': 'Blocks', 'window': 'Windows'}
_POINT = {'markersize': 5, 'markeredgewidth': 1.1, 'linestyle': 'none'}
_STAR = {'marker': '*', 'markersize': 13, 'markeredgewidth': 1.1, 'linestyle': 'none', 'color': _RED}
# Inches: of a tick label that stands upright, of the figure beside its axes, and of an entry of the legend.
_LABEL_WIDTH, _MARGIN, _ENTRY_WIDTH = 0.14, 0.9, 2.1
_LETTERS = 11  # of a title, to the inch
_LONGEST_LABEL = 30  # characters
_SLANTED = 20  # labels, beyond which they stand upright
# Of the lines of a panel of a sweep; there are no more than these.
_SERIES = (
    (_BLUE, 'o', 'solid'), (_ORANGE, 's', (0, (6, 2))), (_GREEN, '^', (0, (1, 1))), (_PURPLE, 'D', (0, (5, 1, 1, 1))),
    (_SKY, 'v', (0, (3, 1))), (_BLACK, 'P', 'solid'))
_LOG = 8  # ratio of the largest to the least value, from which an axis is logarithmic


def plot_search(results: SearchResults, path: Union[str, Path], level: float = 0.95) -> None:
    """Draw accuracy by position, a panel for each way with more than one candidate.

    Args:
        results: Of a search, finished or not.
        path: A name with `.png` or `.svg`. Its folder is made where it is missing; the file is whole or not there.
        level: Confidence of Wilson's intervals, between 0 and 1.

    """
    _check_suffix(path)
    _save(search_figure(results, level), path)


def search_figure(results: SearchResults, level: float = 0.95) -> 'Figure':
    """The figure of `plot_search`.

    The input is on the left, the output on the right. Bars and bands are intervals of each accuracy. Where top layers
    were trained together, they are lines in the panel of the layers.

    Args:
        results: Of a search, finished or not.
        level: Confidence of Wilson's intervals, between 0 and 1.

    """
    ways = [way for way in dict.fromkeys([*_PANELS, *results.ways]) if len(results.of_way(way)) > 1]
    if not ways:
        raise UserError(f'{results.model}: no way of the search has two candidates yet, so there is no plot of it')
    most = max(r.candidate.position for r in results.results) + 1
    width = min(max(_MARGIN + _LABEL_WIDTH * 1.2 * most, 8.), 14.)
    figure = _figure(width, sum(_panel_height(results.of_way(way)) for way in ways) + 0.9)
    panels = figure.subplots(len(ways), 1, sharey=True, squeeze=False)[:, 0]
    for way, axes in zip(ways, panels):
        _draw_baselines(axes, results, level)
        if way == 'layer':
            _draw_tops(axes, results)
        _draw_candidates(axes, results.of_way(way), results.winner(way), level)
        _name_positions(axes, results.of_way(way), results.winner(way), int((width - _MARGIN) / _LABEL_WIDTH))
        _finish_panel(axes, way, results.winner(way))
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(max(low, -2.), min(high, 102.))  # so that points at 0 and 100 are whole
    figure.suptitle(
        f'{_wrapped(title(results), figure)}\nbars and bands: {100 * level:g} % intervals', fontsize=10)
    _add_legend(figure, panels)
    return figure


def _panel_height(found: Sequence[CandidateResult]) -> float:
    """Inches; points have about the same room under any names."""
    longest = max(map(len, _short_names([r.candidate.name for r in found])))
    return 3.2 + (0.06 if len(found) > _SLANTED else 0.04) * longest


def _draw_baselines(axes: 'Axes', results: SearchResults, level: float) -> None:
    for result in results.results:
        way = result.candidate.way
        if way in BASELINES:
            colour = _BASELINE_COLOURS[way]
            axes.axhspan(*result.interval(level), color=colour, alpha=0.13, linewidth=0, zorder=0)
            axes.axhline(
                result.top1, color=colour, linestyle=_BASELINE_LINES[way], linewidth=1.6, zorder=1, label=labelled(way))


def _draw_tops(axes: 'Axes', results: SearchResults) -> None:
    tops = [r for r in results.results if r.candidate.way.startswith('top')]
    tops.sort(key=lambda r: (len(r.candidate.way), r.candidate.way))
    for i, result in enumerate(tops):
        axes.axhline(
            result.top1, color=_TOP_COLOURS[i % 4], linestyle=_TOP_LINES[(i + i // 4) % 4], linewidth=1.4,
            zorder=1, label=f'{result.candidate.way} layers together')


def _draw_candidates(axes: 'Axes', found: Sequence[CandidateResult], winner: CandidateResult, level: float) -> None:
    limits = [r.interval(level) for r in found]
    axes.vlines(
        [r.candidate.position for r in found], [low for low, _ in limits], [high for _, high in limits], color=_BLUE,
        linewidth=1, alpha=0.6, zorder=2)
    others = [r for r in found if r is not winner]
    axes.plot(
        [r.candidate.position for r in others], [r.top1 for r in others], marker='o', color=_BLUE, zorder=3,
        label='candidate', **_POINT)
    axes.plot(
        [winner.candidate.position], [winner.top1], zorder=4, label='best of the way', **_STAR)


def _name_positions(
        axes: 'Axes',
        found: Sequence[CandidateResult],
        winner: CandidateResult,
        room: int,
) -> None:
    """Names under the points: every one where there is room, else each second, third, ..., and the winner's always."""
    names = _short_names([r.candidate.name for r in found])
    first, last, best = (r.candidate.position for r in (found[0], found[-1], winner))
    step = -(-(last - first + 1) // room)
    chosen = {}
    for name, position in zip(names, (r.candidate.position for r in found)):
        crowds = 0 < abs(position - best) < step  # it would lie over the winner's name
        if position == best or (position - first) % step == 0 and not crowds:
            chosen[position] = name
    if len(found) > _SLANTED:
        how = {'rotation': 90}
    else:
        how = {'rotation': 40, 'ha': 'right', 'rotation_mode': 'anchor'}
    axes.set_xticks(list(chosen), list(chosen.values()), fontsize=7, **how)
    axes.get_xticklabels()[list(chosen).index(best)].set(color=_RED, fontweight='bold')
    axes.set_xlim(first - 0.7, last + 0.7)
    axes.grid(axis='x', color='#f0f0f0', linewidth=0.7)


def _short_names(names: Sequence[str]) -> list[str]:
    """Names that fit below an axis: of spans the first layer, if one is long, and of a long path its end."""
    if any(len(name) > _LONGEST_LABEL for name in names):
        names = [f'{name.partition("..")[0]}..' if '..' in name else name for name in names]
    return [name if len(name) <= _LONGEST_LABEL else f'…{name[1 - _LONGEST_LABEL:]}' for name in names]


def _finish_panel(axes: 'Axes', way: str, winner: CandidateResult) -> None:
    text = f'{_PANELS.get(way, way)}: best is {winner.candidate.name}, {winner.top1:.1f} %'
    axes.set_title(_wrapped(text, axes.get_figure()), fontsize=10, loc='left')
    axes.set_ylabel('top-1 accuracy (%)')
    axes.set_xlabel('from the input (left) to the output (right)', fontsize=8)
    _plain(axes)


def plot_sweep(found: Sweep, path: Union[str, Path]) -> None:
    """Draw the metric by each setting that differs.

    Args:
        found: A sweep.
        path: A name with `.png` or `.svg`; the file is whole or not there.
    """
    _check_suffix(path)
    _save(sweep_figure(found), path)


def sweep_figure(found: Sweep) -> 'Figure':
    """The figure of `plot_sweep`: a panel for each setting that has two values.

    A line joins the means of configurations that differ in the panel's setting alone. Of a mixture the lines are its
    components', with all other settings as in the best configuration. Where settings were drawn from a range, nothing
    differs alone, and points have no lines.

    Args:
        found: A sweep.
    """
    keys = [key for key in found.best.values if len({c.values[key] for c in found.configurations}) > 1]
    if not keys:
        raise UserError(f'{found.folder}: nothing differs between the configurations, so there is no plot of them')
    wide = min(2, len(keys))
    high = -(-len(keys) // wide)
    figure = _figure(6. * wide, 3.3 * high + 0.9)
    panels = figure.subplots(high, wide, sharey=True, squeeze=False).ravel()
    for key, axes in zip(keys, panels):
        _draw_setting(axes, found, key)
    for axes in panels[len(keys):]:
        axes.remove()
    panels = panels[:len(keys)]
    if len({tuple(axes.get_legend_handles_labels()[1]) for axes in panels}) == 1:
        _add_legend(figure, panels)
    else:
        for axes in panels:
            axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1.), fontsize=8, frameon=False)
    text = f'{found.model}: best is {found.best}, {found.metric} {found.best.mean:.2f}'
    figure.suptitle(_wrapped(text, figure), fontsize=10)
    return figure


def _draw_setting(axes: 'Axes', found: Sweep, key: str) -> None:
    place = _setting_axis(axes, key, [c.values[key] for c in sorted(found.configurations, key=lambda c: c.number)])
    series = _series(found, key)
    for (label, metric, members), (colour, marker, line) in zip(series, _SERIES):
        members = sorted(members, key=lambda c: place(c.values[key]))
        if len(members[0].runs) > 1:
            axes.plot(
                [place(c.values[key]) for c in members for _ in c.runs], [y for c in members for y in c.scores(metric)],
                color=colour, marker=marker, markersize=3.5, linestyle='none', alpha=0.4, markeredgewidth=0, zorder=2)
        means = [sum(c.scores(metric)) / len(c.runs) for c in members]
        axes.plot(
            [place(c.values[key]) for c in members], means, color=colour, marker=marker, markersize=5.5, linewidth=1.5,
            linestyle=line if label else 'none', label=label or 'configuration', zorder=3)
    axes.plot([place(found.best.values[key])], [found.best.mean], label='best', zorder=4, **_STAR)
    ended = [c for c in found.configurations if c.mean is None]
    if ended:  # at the foot of the panel: they have no score
        axes.plot(
            [place(c.values[key]) for c in ended], [0.03] * len(ended), transform=axes.get_xaxis_transform(),
            marker='x', color='#707070', label='pruned or diverged', zorder=3, **_POINT)
    axes.set_ylabel(f'validation {found.metric}{"" if found.metric == "loss" else " (%)"}')
    axes.yaxis.set_tick_params(labelleft=True)
    _plain(axes)


def _series(found: Sweep, key: str) -> list[tuple[str, str, list[Configuration]]]:
    """(label, metric, configurations) of each line of a panel; without a label, of points that no line joins."""
    groups: dict[tuple, list[Configuration]] = {}
    complete = [c for c in found.configurations if c.mean is not None]
    for c in complete:
        groups.setdefault(tuple(item for item in c.values.items() if item[0] != key), []).append(c)
    alone = next(iter(groups.values()))  # with the best
    parts = [name for name in next(iter(found.best.runs.values())) if name.startswith(f'{found.metric}_')]
    if len(alone) > 1 and 1 < len(parts) < len(_SERIES):
        return [('all', found.metric, alone), *((name[len(found.metric) + 1:], name, alone) for name in parts)]
    if len(groups) > len(_SERIES) or max(map(len, groups.values())) == 1:
        return [('', found.metric, complete)]
    series = [
        (' '.join(f'{name}={shown(value)}' for name, value in others) or 'mean', found.metric, members)
        for others, members in groups.items()]
    return sorted(series, key=lambda item: min(c.number for c in item[2]))


def _setting_axis(axes: 'Axes', key: str, values: Sequence) -> Callable[[Any], float]:
    """Set up the axis of a setting; where on it a value is."""
    axes.set_xlabel(key)
    names = list(dict.fromkeys(values))
    try:
        numbers = {value: float(value) for value in names}
    except ValueError:  # words
        numbers = {value: float(i) for i, value in enumerate(names)}
        slanted = {'rotation': 40, 'ha': 'right', 'rotation_mode': 'anchor'} if sum(map(len, names)) > 60 else {}
        axes.set_xticks(list(numbers.values()), _short_names(names), fontsize=8, **slanted)
        axes.set_xlim(-0.5, len(names) - 0.5)
        return numbers.__getitem__
    low, high = min(numbers.values()), max(numbers.values())
    if low > 0 and high / low >= _LOG:
        axes.set_xscale('log')
    if len(names) <= 8:
        axes.set_xticks(list(numbers.values()), [shown(value) for value in names])
        axes.set_xticks([], minor=True)
    return numbers.__getitem__


def _figure(width: float, height: float) -> 'Figure':
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _wrapped(text: str, figure: 'Figure') -> str:
    return textwrap.fill(text, int(figure.get_figwidth() * _LETTERS))


def _plain(axes: 'Axes') -> None:
    axes.grid(axis='y', color='#e4e4e4', linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def _add_legend(figure: 'Figure', panels: Sequence['Axes']) -> None:
    """One legend of all panels, below them: it covers nothing."""
    entries = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    columns = min(len(entries), int(figure.get_figwidth() / _ENTRY_WIDTH))
    figure.legend(
        entries.values(), entries.keys(), loc='outside lower center', ncols=columns, fontsize=9, frameon=False)


def _check_suffix(path: Union[str, Path]) -> None:
    if Path(path).suffix.lower() not in ('.png', '.svg'):
        raise UserError(f'{path}: plots are written as .png or .svg; name a file with one of these')


def _save(figure: 'Figure', path: Union[str, Path]) -> None:
    kind = Path(path).suffix.lower()[1:]
    # No date: the same results give the same picture.
    metadata = {'Date': None} if kind == 'svg' else None
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
