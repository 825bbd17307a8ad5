"""What a block-wise search found, as tables: for the terminal, and as CSV."""
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Optional, Union

from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.search.results import BASELINES, CandidateResult, SearchResults
from timm_amf.text import columns

__all__ = [
    'PAPER_NAMES', 'Cell', 'Methods', 'Network', 'compare_methods', 'difference_interval', 'labelled', 'methods_table',
    'methods_title', 'ranking', 'summary', 'title', 'write_csv', 'write_methods_csv',
]

# The columns of the paper's Table I, with its own names for them.
PAPER_NAMES = {
    'classifier': 'Baseline I', 'all': 'Baseline II', 'layer': 'LW', 'block': 'BW', 'top3': 'BWT3', 'top5': 'BWT5',
    'window': 'BWSW',
}
_COLUMNS = (
    'way', 'position', 'name', 'modules', 'phase', 'top1', 'top1_low', 'top1_high', 'loss', 'images', 'parameters',
    'epochs', 'stopped', 'rank',
)


# --- One search.

def ranking(results: SearchResults, level: float = 0.95, limit: Optional[int] = None) -> str:
    """All candidates and both baselines, the best first.

    Interval: Wilson's, of the accuracy of each. Level with the best is what trained to its end like the best, and where
    the interval of the difference between both accuracies (`difference_interval`) includes zero. It is not corrected
    for the best being the best of many.

    Args:
        results: Of a search, finished or not.
        level: Confidence, between 0 and 1.
        limit: Rows of each way, the best ones; baselines are always there. Without it, all.

    Raises:
        UserError: If there are no results, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f'a ranking of {limit} rows of each way: show at least 1')
    ranked = _ranked(results)
    best = ranked[0]
    rows = [('rank', 'way', 'candidate', 'top-1', f'{100 * level:g} % interval', 'epochs', 'parameters', '')]
    shown: dict[str, int] = {}
    for rank, result in enumerate(ranked, 1):
        way = result.candidate.way
        shown[way] = shown.get(way, 0) + 1
        if limit is None or shown[way] <= limit or way in BASELINES:
            note = 'best' if result is best else 'level with the best' if _is_level(result, best, level) else ''
            epochs = f'{result.epochs}{" stopped" * result.stopped}'
            rows.append((
                str(rank), labelled(way), result.candidate.name, f'{result.top1:.2f}', _interval(result, level),
                epochs, f'{result.parameters:,}', note))
    left_out = len(ranked) - len(rows) + 1
    lines = [title(results), columns(rows, right=(0, 3, 6))]
    if left_out:
        lines.append(f'and {left_out} more, beyond the first {limit} of each way')
    return '\n'.join(lines)


def summary(results: SearchResults, level: float = 0.95) -> str:
    """A row for each baseline and each way: how many candidates, the best, and how the others fared.

    The accuracy of the best is high by the choice alone, the more so the more candidates there were and the fewer
    images; what was trained anew on more images (`final`) has its own columns, where it is there.

    Args:
        results: Of a search, finished or not.
        level: Confidence of the intervals, between 0 and 1.

    Raises:
        UserError: If there are no results.
    """
    _ranked(results)  # says so if there are none
    interval = f'{100 * level:g} % interval'
    rows = [('way', 'candidates', 'best', 'top-1', interval, 'mean', 'worst')]
    if results.final:
        rows[0] += (f'on {results.final_images} images', interval)
    for way in _ways([results]):
        found, final = results.ranked(way), _best(results.final, way)
        if not found and final is None:
            continue
        cells = ('0', '', '', '', '', '')
        if found:
            accuracies = [r.top1 for r in found]
            cells = (
                str(len(found)), found[0].candidate.name, f'{found[0].top1:.2f}', _interval(found[0], level),
                f'{fmean(accuracies):.2f}', f'{min(accuracies):.2f}')
        if results.final:
            cells += ('', '') if final is None else (f'{final.top1:.2f}', _interval(final, level))
        rows.append((labelled(way), *cells))
    lines = [title(results), columns(rows, right=(1, 3, 5, 6, 7))]
    stopped = sum(r.stopped for r in results.results)
    if stopped:
        lines.append(f'mean and worst: what was stopped ({stopped}) counts with its accuracy then')
    return '\n'.join(lines)


def write_csv(results: SearchResults, path: Union[str, Path], level: float = 0.95) -> None:
    """Write all candidates as CSV, whole or not at all; those of the search first, each phase the best first.

    Accuracies are in percent. `modules` are separated by spaces; `classifier` has none and `all` has all, so that both
    are empty. A loss that diverged is empty. Ranks are over all candidates of the phase.

    Args:
        results: Of a search, finished or not.
        path: Its folder is made where it is missing.
        level: Confidence of Wilson's interval from `top1_low` to `top1_high`, between 0 and 1.

    Raises:
        UserError: If it cannot be written.
    """
    rows = []
    for phase, found in (('search', results.results), ('final', results.final)):
        for rank, result in enumerate(sorted(found, key=_order), 1):
            candidate, (low, high) = result.candidate, result.interval(level)
            rows.append((
                candidate.way, candidate.position, candidate.name, ' '.join(candidate.modules), phase,
                *(round(v, 6) for v in (result.top1, low, high)), result.loss if math.isfinite(result.loss) else '',
                result.images, result.parameters, result.epochs, int(result.stopped), rank))
    _write_rows(path, [_COLUMNS, *rows])


def difference_interval(
        first: CandidateResult,
        second: CandidateResult,
        level: float = 0.95,
) -> tuple[float, float]:
    """Interval of the accuracy of the first less that of the second, in percentage points.

    Which images each of them got right is not kept, so they count as two independent shares (Newcombe, "Interval
    estimation for the difference between independent proportions", 1998, method 10), though the images are the same:
    where both are right about the same images, as they mostly are, it is wider than an interval of paired data.

    Args:
        first: A candidate or baseline.
        second: Another.
        level: Confidence, between 0 and 1.
    """
    (low1, high1), (low2, high2) = first.interval(level), second.interval(level)
    difference = first.top1 - second.top1
    return (
        difference - math.hypot(first.top1 - low1, high2 - second.top1),
        difference + math.hypot(high1 - first.top1, second.top1 - low2))


# --- Several searches.

@dataclass(frozen=True)
class Cell:
    """The accuracy of a way of choosing for a network.

    Attributes:
        mean: Over the seeds, a share of 0 to 1.
        std: Standard deviation over the seeds (n - 1 in the denominator); None of one.
        seeds: How many there are.
    """
    mean: float
    std: Optional[float]
    seeds: int

    def __str__(self):
        return f'{self.mean:.4f}' if self.std is None else f'{self.mean:.4f} ± {self.std:.4f}'


@dataclass(frozen=True)
class Network:
    """A row of the paper's Table I.

    Attributes:
        name: Of the network, with the role that was searched where the same network has several.
        seeds: How many searches there are of it.
        cells: By way; what was not searched is not in it.
    """
    name: str
    seeds: int
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Methods:
    """The paper's Table I: accuracies as shares of 0 to 1.

    Attributes:
        phase: `final` if the winners were trained anew in every search, else `search`.
        images: Fewest and most images that they were trained on.
        ways: The columns.
        networks: The rows, in the order of the searches.
        mean: Of each way, over the networks that have it.
        variance: The same, with n - 1 in the denominator as in the paper; not of ways that one network alone has.
    """
    phase: str
    images: tuple[int, int]
    ways: tuple[str, ...]
    networks: tuple[Network, ...]
    mean: dict[str, float]
    variance: dict[str, float]


def compare_methods(searches: Sequence[SearchResults]) -> Methods:
    """The ways of choosing over several networks (the paper's Table I); of each way its best candidate counts.

    Searches of one network are those of several seeds. Accuracies of the search itself (where not every search trained
    its winners anew) are high by the choice of the best, in ways with many candidates more than in those with few.

    Raises:
        UserError: If there are no searches, one has no results, one is there twice, or they are of different data.
    """
    if not searches:
        raise UserError('no searches to compare; give the folders of finished ones')
    for search in searches:
        _ranked(search)
    if len({s.classes for s in searches}) > 1:
        classes = ', '.join(f'{s.model} {s.classes}' for s in searches)
        raise UserError(f'searches of different data cannot be compared: numbers of classes are {classes}')
    phase = 'final' if all(s.final for s in searches) else 'search'
    several_roles = len({s.model for s in searches}) < len({(s.model, s.role) for s in searches})
    groups: dict[str, list[SearchResults]] = {}
    for search in searches:
        group = groups.setdefault(f'{search.model} {search.role}' if several_roles else search.model, [])
        if any(other.seed == search.seed for other in group):
            raise UserError(f'{search.model}: two searches with seed {search.seed}; give one of each seed')
        group.append(search)
    networks = tuple(Network(n, len(group), _cells(group, phase)) for n, group in groups.items())
    ways = tuple(_ways(searches))
    by_way = {way: [n.cells[way].mean for n in networks if way in n.cells] for way in ways}
    images = [s.final_images if phase == 'final' else s.train_images for s in searches]
    return Methods(
        phase, (min(images), max(images)), ways, networks,
        {way: fmean(values) for way, values in by_way.items() if values},
        {way: variance(values) for way, values in by_way.items() if len(values) > 1})


def methods_table(searches: Sequence[SearchResults]) -> str:
    """The paper's Table I as text, with mean and variance over the networks; accuracies are shares of 0 to 1.

    A cell is the mean over the seeds of a network ± their standard deviation; in brackets how many, where some lack it.

    Raises:
        UserError: As `compare_methods` does.
    """
    methods = compare_methods(searches)
    rows = [('', *methods.ways), ('network', *(PAPER_NAMES.get(way, '') for way in methods.ways))]
    for network in methods.networks:
        cells = []
        for cell in (network.cells.get(way) for way in methods.ways):
            fewer = cell is not None and cell.seeds < network.seeds
            cells.append('' if cell is None else f'{cell} ({cell.seeds})' if fewer else str(cell))
        rows.append((f'{network.name}, {network.seeds} seeds' if network.seeds > 1 else network.name, *cells))
    for name, digits, values in (('mean', 4, methods.mean), ('variance', 6, methods.variance)):
        rows.append((name, *(f'{values[w]:.{digits}f}' if w in values else '' for w in methods.ways)))
    return f'{methods_title(methods)}\n{columns(rows)}'


def write_methods_csv(searches: Sequence[SearchResults], path: Union[str, Path]) -> None:
    """Write the paper's Table I as CSV, whole or not at all: a row for each network, then `mean` and `variance`.

    Columns: network, phase (`final`, or `search`), seeds, and for each way its accuracy as a share of 0 to 1 and, as
    `<way>_std`, the standard deviation over the seeds.

    Raises:
        UserError: If it cannot be written, and as `compare_methods` does.
    """
    methods = compare_methods(searches)
    rows = [('network', 'phase', 'seeds', *(name for way in methods.ways for name in (way, f'{way}_std')))]
    for network in methods.networks:
        cells = []
        for cell in (network.cells.get(way) for way in methods.ways):
            values = (None, None) if cell is None else (cell.mean, cell.std)
            cells += ['' if v is None else f'{v:.6f}' for v in values]
        rows.append((network.name, methods.phase, network.seeds, *cells))
    for name, values in (('mean', methods.mean), ('variance', methods.variance)):
        cells = [c for way in methods.ways for c in (f'{values[way]:.6f}' if way in values else '', '')]
        rows.append((name, methods.phase, '', *cells))
    _write_rows(path, rows)


def methods_title(methods: Methods) -> str:
    """Which accuracies these are."""
    low, high = methods.images
    images = f'{low} images' if low == high else f'{low} to {high} images'
    how = 'the best of each way trained anew' if methods.phase == 'final' else 'the best of each way in the search'
    return f'Share of validation images classified correctly; {how}, on {images}'


def _cells(group: Sequence[SearchResults], phase: str) -> dict[str, Cell]:
    """A network's accuracies over its seeds, by way."""
    cells = {}
    for way in _ways(group):
        found = [_best(s.final if phase == 'final' else s.results, way) for s in group]
        shares = [r.top1 / 100 for r in found if r is not None]
        if shares:
            cells[way] = Cell(fmean(shares), stdev(shares) if len(shares) > 1 else None, len(shares))
    return cells


def _ways(searches: Sequence[SearchResults]) -> list[str]:
    """The columns of Table I, with other numbers of top layers in their order, and then what else there is."""
    found = dict.fromkeys(r.candidate.way for s in searches for r in (*s.results, *s.final))
    ways = list(dict.fromkeys([*PAPER_NAMES, *found]))
    tops = sorted((w for w in ways if w[:3] == 'top' and w[3:].isdigit()), key=lambda w: int(w[3:]))
    others = [w for w in ways if w not in tops]
    after = others.index('block') + 1
    return [*others[:after], *tops, *others[after:]]


# --- Helpers.

def _order(result: CandidateResult) -> tuple:
    """That of `SearchResults.ranked`."""
    return result.stopped, -result.top1, result.parameters


def _best(found: Sequence[CandidateResult], way: str) -> Optional[CandidateResult]:
    return min((r for r in found if r.candidate.way == way), key=_order, default=None)


def _ranked(results: SearchResults) -> list[CandidateResult]:
    ranked = results.ranked()
    if not ranked:
        raise UserError(f'{results.model}: the search has no results yet; let it finish its first candidates')
    return ranked


def _is_level(result: CandidateResult, best: CandidateResult, level: float) -> bool:
    if result.stopped != best.stopped:
        return False  # after fewer epochs: not comparable
    low, high = difference_interval(best, result, level)
    return low <= 0 <= high


def labelled(way: str) -> str:
    """The way, a baseline with the paper's name of it."""
    return f'{way} (b{PAPER_NAMES[way][1:]})' if way in BASELINES else way


def _interval(result: CandidateResult, level: float) -> str:
    low, high = result.interval(level)
    return f'{low:.2f} to {high:.2f}'


def title(results: SearchResults) -> str:
    """What was searched, on what."""
    images = {r.images for r in results.results}
    validation = f'{min(images)}' if len(images) == 1 else f'{min(images)} to {max(images)}'
    return f'{results.model} {results.role}, seed {results.seed}: {results.classes} classes, trained on ' \
           f'{results.train_images} images, validated on {validation}'


def _write_rows(path: Union[str, Path], rows: Sequence[Sequence]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding='utf-8')
