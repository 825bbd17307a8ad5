"""What a block-wise search found: as data, as tables for the terminal, and as CSV."""
import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Optional, Union

from timm_amf.engine.intervals import wilson_interval
from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.search.candidates import Candidate
from timm_amf.text import columns

__all__ = [
    'BASELINES', 'CandidateResult', 'SearchResults', 'difference_interval', 'labelled', 'ranking', 'summary', 'title',
    'write_csv',
]

# The paper's names of the ways of choosing (its Table I).
_PAPER_NAMES = {
    'classifier': 'Baseline I', 'all': 'Baseline II', 'layer': 'LW', 'block': 'BW', 'top3': 'BWT3', 'top5': 'BWT5',
    'window': 'BWSW',
}
_COLUMNS = (
    'way', 'position', 'name', 'modules', 'phase', 'top1', 'top1_low', 'top1_high', 'loss', 'images', 'parameters',
    'epochs', 'rank',
)
# The paper's baselines I and II.
BASELINES = ('classifier', 'all')


@dataclass(frozen=True)
class CandidateResult:
    """How a candidate fared.

    Attributes:
        candidate: What was tuned.
        top1: Validation accuracy after the last epoch, in percent.
        loss: Validation loss after it.
        images: Validation images.
        parameters: Number of parameters that trained, the classifier's included.
        epochs: Epochs that it trained.
        curve: (epochs trained, top1, loss) of each evaluation.
    """
    candidate: Candidate
    top1: float
    loss: float
    images: int
    parameters: int
    epochs: int
    curve: tuple[tuple[int, float, float], ...] = ()

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the accuracy, in percent: what other images of the same kind could have given."""
        low, high = wilson_interval(self.top1 / 100 * self.images, self.images, level)
        return 100 * low, 100 * high

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        values = dataclasses.asdict(self)
        # JSON has no NaN, which is the loss of what diverged.
        values['loss'] = self.loss if math.isfinite(self.loss) else None
        values['curve'] = [[e, t, v if math.isfinite(v) else None] for e, t, v in self.curve]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'CandidateResult':
        """From `to_dict`."""
        candidate = Candidate(**{**values['candidate'], 'modules': tuple(values['candidate']['modules'])})
        curve = tuple((e, t, math.nan if v is None else v) for e, t, v in values['curve'])
        loss = math.nan if values['loss'] is None else values['loss']
        values = {k: v for k, v in values.items() if k != 'stopped'}  # of versions with successive halving
        return cls(**{**values, 'candidate': candidate, 'curve': curve, 'loss': loss})


@dataclass
class SearchResults:
    """All candidates of a search.

    Attributes:
        model: Name of the network.
        role: Its role that was searched.
        seed: Seed of splits, weights of the classifier, order and augmentation.
        classes: Number of classes.
        train_images: Images that the candidates were trained on.
        results: Of the search: both baselines and all candidates of all ways, in the order in which they run.
        final_images: Images that the winners were trained on afterwards; 0 where that was not asked for.
        final: Then: both baselines and the best of each way, trained anew on those.
        seconds: Time that it took; where it was resumed, the last part of it.
    """
    model: str
    role: str
    seed: int
    classes: int
    train_images: int
    results: list[CandidateResult] = field(default_factory=list)
    final_images: int = 0
    final: list[CandidateResult] = field(default_factory=list)
    seconds: float = 0.

    @property
    def ways(self) -> list[str]:
        """The ways that were searched, without the baselines."""
        return list(dict.fromkeys(r.candidate.way for r in self.results if r.candidate.way not in BASELINES))

    def of_way(self, way: str) -> list[CandidateResult]:
        """The candidates of a way, from the input to the output."""
        return sorted((r for r in self.results if r.candidate.way == way), key=lambda r: r.candidate.position)

    def ranked(self, way: Optional[str] = None) -> list[CandidateResult]:
        """All candidates, or those of a way, the best first; baselines are among all of them.

        Of equal ones the one with fewer parameters comes first.
        """
        chosen = [r for r in self.results if way in (None, r.candidate.way)]
        return sorted(chosen, key=_order)

    def winner(self, way: Optional[str] = None) -> CandidateResult:
        """The best of a way; without one, of all ways and both baselines."""
        return self.ranked(way)[0]

    def write(self, path: Union[str, Path]) -> None:
        """Write as JSON, whole or not at all."""
        values = {**dataclasses.asdict(self), 'results': [r.to_dict() for r in self.results],
                  'final': [r.to_dict() for r in self.final]}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=1), encoding='utf-8')

    @classmethod
    def read(cls, path: Union[str, Path]) -> 'SearchResults':
        """Read what `write` wrote."""
        try:
            values = json.loads(Path(path).read_text(encoding='utf-8'))
            parts = {name: [CandidateResult.from_dict(v) for v in values[name]] for name in ('results', 'final')}
            return cls(**{**values, **parts})
        except OSError as e:
            raise UserError(f'{path}: cannot be read ({e.strerror}); give the folder of a finished search') from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f'{path}: holds no results of a search ({type(e).__name__}: {e})') from None


# -- Tables.

def ranking(results: SearchResults, level: float = 0.95, limit: Optional[int] = None) -> str:
    """All candidates and both baselines, the best first.

    Interval: Wilson's, of the accuracy of each. Level with the best is what trained to its end like the best, and where
    the interval of the difference between both accuracies (`difference_interval`) includes zero. It is not corrected
    for the best being the best of many.

    Args:
        results: Of a search, finished or not.
        level: Confidence, between 0 and 1.
        limit: Rows of each way, the best ones; baselines are always there. Without it, all.

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
            rows.append((
                str(rank), labelled(way), result.candidate.name, f'{result.top1:.2f}', _interval(result, level),
                str(result.epochs), f'{result.parameters:,}', note))
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
    return '\n'.join(lines)


def write_csv(results: SearchResults, path: Union[str, Path], level: float = 0.95) -> None:
    """Write all candidates as CSV, whole or not at all; those of the search first, each phase the best first.

    Accuracies are in percent. `modules` are separated by spaces; `classifier` has none and `all` has all, so that both
    are empty. A loss that diverged is empty. Ranks are over all candidates of the phase.

    Args:
        results: Of a search, finished or not.
        path: Its folder is made where it is missing.
        level: Confidence of Wilson's interval from `top1_low` to `top1_high`, between 0 and 1.

    """
    rows = []
    for phase, found in (('search', results.results), ('final', results.final)):
        for rank, result in enumerate(sorted(found, key=_order), 1):
            candidate, (low, high) = result.candidate, result.interval(level)
            rows.append((
                candidate.way, candidate.position, candidate.name, ' '.join(candidate.modules), phase,
                *(round(v, 6) for v in (result.top1, low, high)), result.loss if math.isfinite(result.loss) else '',
                result.images, result.parameters, result.epochs, rank))
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


def _ways(searches: Sequence[SearchResults]) -> list[str]:
    """The columns of Table I, with other numbers of top layers in their order, and then what else there is."""
    found = dict.fromkeys(r.candidate.way for s in searches for r in (*s.results, *s.final))
    ways = list(dict.fromkeys([*_PAPER_NAMES, *found]))
    tops = sorted((w for w in ways if w[:3] == 'top' and w[3:].isdigit()), key=lambda w: int(w[3:]))
    others = [w for w in ways if w not in tops]
    after = others.index('block') + 1
    return [*others[:after], *tops, *others[after:]]


def _order(result: CandidateResult) -> tuple:
    """That of `SearchResults.ranked`."""
    return -result.top1, result.parameters


def _best(found: Sequence[CandidateResult], way: str) -> Optional[CandidateResult]:
    return min((r for r in found if r.candidate.way == way), key=_order, default=None)


def _ranked(results: SearchResults) -> list[CandidateResult]:
    ranked = results.ranked()
    if not ranked:
        raise UserError(f'{results.model}: the search has no results yet; let it finish its first candidates')
    return ranked


def _is_level(result: CandidateResult, best: CandidateResult, level: float) -> bool:
    low, high = difference_interval(best, result, level)
    return low <= 0 <= high


def labelled(way: str) -> str:
    """The way, a baseline with the paper's name of it."""
    return f'{way} (b{_PAPER_NAMES[way][1:]})' if way in BASELINES else way


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
