"""Charts drawn with matplotlib, and written as SVG for a page of light or dark colours, as PNG, and as CSV.

Nothing is told by colour alone: lines have dashes and markers, bars hatches, points shapes. matplotlib's objects are
used without pyplot, so that no window system is needed.
"""
import html
import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from PIL import Image

from timm_amf.files import replacing
from timm_amf.models.charts import Chart
from timm_amf.text import csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['DARK', 'LIGHT', 'draw', 'png', 'shown', 'svg', 'table_csv', 'write_sheet']

# Okabe and Ito, "Color universal design" (2008), without yellow and with violet and grey; on white, and brighter on
# black. In an SVG each is a variable of the page's style sheet.
LIGHT = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#5b3a8c', '#777777')
DARK = ('#4aa8e8', '#ff8a3c', '#2fc79a', '#e39cc4', '#9ad6f9', '#f4c04a', '#b79be0', '#a8a8a8')
_INK, _GRID = '#1b1b1c', '#d8d8d9'
_DASHES = ('solid', (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
_MARKERS = 'os^DvPX*'
_HATCHES = ('', '///', '...', '\\\\\\', 'xxx', '---', '+++', 'ooo')
_STYLE = {
    'svg.fonttype': 'none', 'text.parse_math': False, 'font.size': 9, 'text.color': _INK, 'axes.edgecolor': _INK,
    'axes.labelcolor': _INK, 'xtick.color': _INK, 'ytick.color': _INK, 'axes.facecolor': 'none', 'hatch.linewidth': 0.6,
    'legend.frameon': False, 'font.family': 'DejaVu Sans'}
_WIDTH = 6.8  # inches
_ROW = 0.16  # inches of a label in a column of labels
_LONGEST = 28  # letters of a label
_PANEL_ROWS = 50
_NUMBERED = 20  # classes to which a matrix has its numbers written into it

Thumbnail = Callable[[int], Image.Image]


@contextmanager
def _drawing(name: str = ''):
    from matplotlib import rc_context

    with rc_context({**_STYLE, 'svg.hashsalt': name}), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing')  # the page has more fonts than the PNG
        yield


def draw(chart: Chart, thumbnail: Optional[Thumbnail] = None) -> 'Figure':
    """The figure of a chart.

    Args:
        chart: What is drawn.
        thumbnail: Gives an image of the data by its index.
    """
    drawers = dict(
        lines=_lines, dots=_lines, columns=_columns, bars=_bars, heat=_heat, points=_points, panels=_panels,
        images=partial(_images, thumbnail=thumbnail))
    with _drawing():
        return _laid_out(drawers[chart.kind](chart))


def write_sheet(charts: Sequence[Chart], path: Path) -> None:
    """Charts of lines or dots below each other, with their titles, as one file, whole or not at all.

    Args:
        charts: Without any there is no file.
        path: A name with `.png` or `.svg`.
    """
    if not charts:
        return
    with _drawing():
        sizes = [_lines_size(chart) for chart in charts]
        figure = _figure(max(wide for wide, _ in sizes), sum(high for _, high in sizes) + 0.4 * len(charts))
        parts = figure.subfigures(len(charts), 1, height_ratios=[high for _, high in sizes], squeeze=False)[:, 0]
        for part, chart in zip(parts, charts):
            _draw_lines(part, chart)
            part.suptitle(textwrap.fill(chart.title, int(figure.get_figwidth() * 11)), fontsize=10)
        data = _saved(_laid_out(figure), path.suffix[1:])
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def svg(figure: 'Figure', name: str, title: str) -> str:
    """The figure as an element of a page: its text is text, its ids begin with the name, its colours are the page's."""
    text = '<svg ' + _saved(figure, 'svg', name).decode().partition('<svg ')[2]
    text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', text)
    variables = {**{colour: f's{i}' for i, colour in enumerate(LIGHT)}, _INK: 'ink', '#000000': 'ink', _GRID: 'grid'}
    for colour, variable in variables.items():
        text = text.replace(colour, f'var(--{variable})')
    own = f'style="--own: {72 * figure.get_figwidth():.0f}pt"'
    return text.replace('<svg ', f'<svg {own} role="img" aria-label="{html.escape(title)}" ', 1)


def png(figure: 'Figure') -> bytes:
    """The figure as a PNG file on white."""
    return _saved(figure, 'png')


def _laid_out(figure: 'Figure') -> 'Figure':
    figure.draw_without_rendering()
    figure.set_layout_engine('none')  # found once, for all files
    return figure


def _saved(figure: 'Figure', kind: str, name: str = '') -> bytes:
    file = io.BytesIO()
    with _drawing(name):
        if kind == 'svg':
            figure.savefig(file, format=kind, bbox_inches='tight', transparent=True, metadata={'Date': None})
        else:
            figure.savefig(file, format=kind, bbox_inches='tight', dpi=150, facecolor='white')
    return file.getvalue()


def table_csv(chart: Chart) -> str:
    """The chart's table as CSV; what is no number is empty."""
    return csv_text([list(chart.table), *zip(*(map(_plain, column) for column in chart.table.values()))])


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return '' if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """A cell as on the page."""
    value = _plain(value)
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def _figure(width: float, height: float) -> 'Figure':
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def _plain_axes(axes: 'Axes', chart: Chart, grid: str = 'y') -> None:
    axes.grid(axis=grid, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.set(xlabel=chart.x, ylabel=chart.y)


def _legend(figure: 'Figure', axes: 'Axes') -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        widest = max(map(len, labels)) * 0.075 + 0.6
        figure.legend(
            handles, [_short(label) for label in labels], loc='outside lower center',
            ncols=max(1, min(len(labels), int(figure.bbox.width / figure.dpi / widest))))


def _short(name: Any) -> str:
    name = str(name)
    return name if len(name) <= _LONGEST else f'{name[:_LONGEST // 2 - 1]}…{name[-_LONGEST // 2:]}'


def _numbers(values: Sequence) -> list[float]:
    return [math.nan if value is None or value == '' else float(value) for value in values]


# -- kinds ------------------------------------------------------------------------------------------------------------


def _lines(chart: Chart) -> 'Figure':
    figure = _figure(*_lines_size(chart))
    _draw_lines(figure, chart)
    return figure


def _lines_size(chart: Chart) -> tuple[float, float]:
    """Inches; names below the axis take room."""
    x = next(iter(chart.table.values()))
    names = set(x) if _are_names(x) else ()
    longest = max(map(len, _ticks(names)), default=0)
    return min(max(_WIDTH, 1 + 0.14 * len(names)), 14.), 3.2 + 0.1 * len(chart.drawn) + 0.06 * longest


def _draw_lines(figure: Any, chart: Chart) -> None:
    """Lines or dots with their limits, over numbers or over names in their order."""
    from matplotlib.ticker import MaxNLocator

    axes, given = figure.subplots(), next(iter(chart.table.values()))
    names = list(dict.fromkeys(given)) if _are_names(given) else []
    x = [names.index(name) for name in given] if names else _numbers(given)
    for i, name in enumerate(chart.drawn):
        y, best = _numbers(chart.table[name]), name == 'best'
        look = dict(
            color=LIGHT[i % 8], marker='*' if best else _MARKERS[i % 8], markersize=11 if best else 4.5, label=name,
            zorder=4 if best else 3)
        limits = [_numbers(chart.table[f'{name}_{end}']) for end in ('low', 'high') if f'{name}_{end}' in chart.table]
        if chart.kind == 'dots':
            axes.plot(x, y, linestyle='none', **look)
            if limits:
                axes.vlines(x, *limits, color=LIGHT[i % 8], linewidth=1, alpha=0.6)
            continue
        axes.plot(
            x, y, linestyle=_DASHES[i % 4], markevery=max(1, sum(v == v for v in y) // 15), linewidth=1.6, **look)
        if limits:
            axes.fill_between(x, *limits, color=LIGHT[i % 8], alpha=0.13, linewidth=0)
    _plain_axes(axes, chart)
    if chart.range:
        margin = (chart.range[1] - chart.range[0]) * 0.03  # lines at the limits are whole
        axes.set_ylim(chart.range[0] - margin, chart.range[1] + margin)
    if names:
        step = -(-len(names) // int((_lines_size(chart)[0] - 1) * 8))
        labels = _ticks(names)[::step]
        upright = sum(map(len, labels)) > 80
        axes.set_xticks(range(0, len(names), step), labels, rotation=90 * upright, fontsize=7)
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif chart.log:
        axes.set_xscale('log')
        if len(set(x)) <= 8:
            axes.set_xticks(sorted(set(x)))
            axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter('{x:g}')
    elif all(value == round(value) for value in x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(figure, axes)


def _are_names(values: Sequence) -> bool:
    return any(isinstance(value, str) for value in values)


def _ticks(names: Sequence[str]) -> list[str]:
    """Of spans the first name, if one is long; of long paths the end."""
    names = [str(name) for name in names]
    if max(map(len, names), default=0) > _LONGEST:
        names = [re.sub(r'(?<=\.\.).*', '', name) for name in names]
    return [name if len(name) <= _LONGEST else f'…{name[1 - _LONGEST:]}' for name in names]


def _columns(chart: Chart) -> 'Figure':
    names = [str(name) for name in next(iter(chart.table.values()))]
    figure = _figure(max(_WIDTH, min(14., 0.12 * len(names) * len(chart.drawn))), 3.4)
    axes = figure.subplots()
    for place, values, _, look in _bar_groups(chart, slice(None)):
        axes.bar(place, values, 0.84 / len(chart.drawn), **look)
    step = -(-len(names) // int(figure.get_figwidth() * 4))
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlim(-0.7, len(names) - 0.3)
    _plain_axes(axes, chart)
    if chart.range:
        axes.set_ylim(*chart.range)
    _legend(figure, axes)
    return figure


def _bars(chart: Chart) -> 'Figure':
    names = [_short(name) for name in next(iter(chart.table.values()))]
    count = len(chart.drawn)
    panels = -(-len(names) // _PANEL_ROWS)
    rows = -(-len(names) // panels)
    figure = _figure(max(_WIDTH, 3.6 * panels), 1.3 + rows * max(_ROW, 0.13 * count + 0.05))
    every = figure.subplots(1, panels, sharex=True, squeeze=False)[0]
    for k, axes in enumerate(every):
        part = slice(k * rows, (k + 1) * rows)
        for place, values, error, look in _bar_groups(chart, part):
            whisker = dict(ecolor=_INK, elinewidth=0.9, capsize=1.5)
            axes.barh(place, values, 0.84 / count, xerr=error, error_kw=whisker, **look)
        axes.set_yticks(range(len(names[part])), names[part], fontsize=9 if rows < 30 else 8)
        axes.set_ylim(rows - 0.4, -0.6)
        _plain_axes(axes, chart, 'x')
        if chart.range:
            axes.set_xlim(*chart.range)
    _legend(figure, every[0])
    return figure


def _bar_groups(chart: Chart, part: slice) -> Iterator[tuple[np.ndarray, np.ndarray, Optional[np.ndarray], dict]]:
    """Of each series places, values, lengths of whiskers, and look of its bars."""
    for i, name in enumerate(chart.drawn):
        values, error = np.array(_numbers(chart.table[name]))[part], None
        if f'{name}_low' in chart.table:
            low, high = (np.array(chart.table[f'{name}_{end}'], dtype=float)[part] for end in ('low', 'high'))
            error = np.maximum([values - low, high - values], 0)
        place = np.arange(len(values)) + (i - (len(chart.drawn) - 1) / 2) * 0.84 / len(chart.drawn)
        yield place, values, error, dict(
            color=LIGHT[i % 8], hatch=_HATCHES[i % 8], edgecolor=_INK, linewidth=0.4, label=name)


def _heat(chart: Chart) -> 'Figure':
    """A matrix of which each row's share is the darkness; empty cells are not drawn."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch, Rectangle

    names = [_short(name) for name in next(iter(chart.table.values()))]
    columns = [_short(name) for name in chart.drawn]
    matrix = np.array([_numbers(chart.table[name]) for name in chart.drawn]).T
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    label = 0.075 * max(map(len, names))
    side = min(max(len(names) * (0.34 if len(names) <= _NUMBERED else 0.17), 2.2), 11.)
    figure = _figure(side + label + 1.6, side + 0.075 * max(map(len, columns)) + 1.)
    axes = figure.subplots()
    rows, places = np.nonzero(matrix)
    strength = 0.15 + 0.53 * shares[rows, places]
    axes.add_collection(PatchCollection(
        [Rectangle((c - 0.5, r - 0.5), 1, 1) for r, c in zip(rows, places)],
        facecolor=[to_rgba(LIGHT[0], s) for s in strength], edgecolor='none'))
    if len(names) <= _NUMBERED:
        for r, c in zip(rows, places):
            axes.text(c, r, f'{matrix[r, c]:g}', ha='center', va='center', fontsize=7)
    for axis, found in ((axes.xaxis, columns), (axes.yaxis, names)):
        step = max(1, -(-len(found) * 15 // int(side * 100)))  # a label takes 0.15 inches
        axis.set_ticks(range(0, len(found), step), found[::step])
    axes.tick_params(axis='both', labelsize=8 if len(names) <= 60 else 7)
    axes.tick_params(axis='x', rotation=90)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect='equal')
    axes.set(xlabel=chart.x, ylabel=chart.y)
    axes.legend(
        [Patch(facecolor=to_rgba(LIGHT[0], 0.15 + 0.53 * s)) for s in (0.1, 0.5, 1)], ['10 %', '50 %', '100 %'],
        title='of the row', loc='upper left', bbox_to_anchor=(1, 1), alignment='left')
    return figure


def _points(chart: Chart) -> 'Figure':
    x, y = (np.array(_numbers(chart.table[name])) for name in ('x', 'y'))
    groups, panels = (np.array([str(v) for v in chart.table[name]]) for name in ('group', 'panel'))
    titles, kinds = dict.fromkeys(panels.tolist()), list(dict.fromkeys(groups.tolist()))
    figure = _figure(3.4 * max(len(titles), 2), 3.9 + 0.03 * len(kinds))
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles):
        for i, kind in enumerate(kinds):
            chosen = (panels == title) & (groups == kind)
            axes.scatter(
                x[chosen], y[chosen], s=13, color=LIGHT[i % 8], marker=_MARKERS[(i + i // 8) % 8], alpha=0.75,
                linewidths=0, label=kind)
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    if len(kinds) <= 24:
        _legend(figure, axes)
    return figure


def _panels(chart: Chart) -> 'Figure':
    names, groups = (list(dict.fromkeys(chart.table[name])) for name in ('panel', 'group'))
    position, value = (np.array(_numbers(chart.table[name])) for name in ('position', 'value'))
    across = min(2, len(names))
    figure = _figure(_WIDTH, 0.6 + 1.35 * -(-len(names) // across))
    every = figure.subplots(-(-len(names) // across), across, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(every.flat, names):
        for i, group in enumerate(groups):
            chosen = [p == name and g == group for p, g in zip(chart.table['panel'], chart.table['group'])]
            axes.bar(position[chosen], value[chosen], 1, color=LIGHT[i % 8], hatch=_HATCHES[i % 8], label=group)
        axes.set_title(_short(name), fontsize=8, loc='left')
        _plain_axes(axes, chart)
        axes.set(xlabel='', ylabel='')
        axes.set_xticks([])
    for axes in every.flat[len(names):]:
        axes.set_axis_off()
    every[-1, 0].set_xlabel(chart.x)  # a label of the figure would lie below the legend
    figure.supylabel(chart.y, fontsize=9)
    _legend(figure, every[0, 0])
    return figure


def _images(chart: Chart, thumbnail: Thumbnail, across: int = 8) -> 'Figure':
    """A sheet of images; the page shows them otherwise."""
    count = len(chart.table['image'])
    figure = _figure(1.3 * across, 1.75 * max(1, -(-count // across)))
    figure.set_layout_engine('none')  # it takes a second for so many axes, and there is nothing to align
    every = figure.subplots(
        max(1, -(-count // across)), across, squeeze=False, gridspec_kw=dict(
            left=0.01, right=0.99, bottom=0.01, top=0.88, hspace=0.45)).ravel()
    for axes in every:
        axes.set_axis_off()
    for axes, index, text in zip(every, chart.table['image'], chart.table['text']):
        axes.imshow(thumbnail(index).convert('RGB'))
        axes.set_title(textwrap.fill(text, 24), fontsize=5)
    return figure
