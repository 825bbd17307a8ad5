"""What a block-wise search found: as data, as tables, and as CSV."""
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Optional, Union

from timm_amf.engine.intervals import wilson_interval
from timm_amf.errors import UserError
from timm_amf.files import write_text
from timm_amf.search.candidates import Candidate
from timm_amf.text import csv_text

__all__ = [
    'BASELINES', 'CandidateResult', 'SearchResults', 'difference_interval', 'labelled', 'ranking', 'summary',
    'write_csv',
]

# By the paper's names; the order is that of its Table I.
BASELINES = {'classifier': 'baseline I', 'all': 'baseline II'}
_ORDER = (*BASELINES, 'layer', 'block', 'top', 'window', 'random')
_COLUMNS = (
    'way', 'position', 'name', 'modules', 'phase', 'top1', 'top1_low', 'top1_high', 'loss', 'images', 'parameters',
    'epochs', 'rank',
)


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

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, in percent: what other images of the same kind could have given."""
        low, high = wilson_interval(self.top1 / 100 * self.images, self.images)
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
        """The ways that were searched, without the baselines, in the order of Table I."""
        return sorted({r.candidate.way for r in self.results} - set(BASELINES), key=_way_order)

    @property
    def title(self) -> str:
        """What was searched, on what."""
        validation = ' to '.join(map(str, sorted({r.images for r in self.results})))
        return f'{self.model} {self.role}, seed {self.seed}: {self.classes} classes, trained on ' \
               f'{self.train_images} images, validated on {validation}'

    def of_way(self, way: str) -> list[CandidateResult]:
        """The candidates of a way, from the input to the output."""
        return sorted((r for r in self.results if r.candidate.way == way), key=lambda r: r.candidate.position)

    def ranked(self, way: Optional[str] = None) -> list[CandidateResult]:
        """All candidates, or those of a way, the best first; baselines are among all of them.

        Of equal ones the one with fewer parameters comes first.
        """
        return _ranked(r for r in self.results if way in (None, r.candidate.way))

    def winner(self, way: Optional[str] = None) -> CandidateResult:
        """The best of a way; without one, of all ways and both baselines."""
        return self.ranked(way)[0]

    def write(self, path: Union[str, Path]) -> None:
        """Write as JSON, whole or not at all."""
        values = {**dataclasses.asdict(self), 'results': [r.to_dict() for r in self.results],
                  'final': [r.to_dict() for r in self.final]}
        write_text(path, json.dumps(values, indent=1))

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


# -- tables -----------------------------------------------------------------------------------------------------------


def ranking(results: SearchResults, limit: float = math.inf) -> list[list[str]]:
    """Rows of all candidates and both baselines, the best first.

    Interval: Wilson's, of the accuracy of each. Level with the best is where the interval of the difference between
    both accuracies (`difference_interval`) includes zero. It is not corrected for the best being the best of many.

    Args:
        results: Of a search.
        limit: Rows of each way, the best ones; baselines are always there.
    """
    ranked, shown = results.ranked(), Counter[str]()
    rows = [['rank', 'way', 'candidate', 'top-1', '95 % interval', 'epochs', 'parameters', '']]
    for rank, result in enumerate(ranked, 1):
        candidate, (low, high) = result.candidate, difference_interval(ranked[0], result)
        shown[candidate.way] += 1
        if shown[candidate.way] <= limit:
            note = 'best' if rank == 1 else 'level with the best' if low <= 0 <= high else ''
            rows.append([
                str(rank), labelled(candidate.way), candidate.name, *_accuracy(result), str(result.epochs),
                f'{result.parameters:,}', note])
    return rows


def summary(results: SearchResults) -> list[list[str]]:
    """Rows of each baseline and each way: how many candidates, the best, and how the others fared.

    The accuracy of the best is high by the choice alone, the more so the more candidates there were and the fewer
    images; what was trained anew on more images (`final`) has its own columns, where it is there.
    """
    rows = [['way', 'candidates', 'best', 'top-1', '95 % interval', 'mean', 'worst']]
    if results.final:
        rows[0] += [f'on {results.final_images} images', '95 % interval']
    for way in (*BASELINES, *results.ways):
        found = results.ranked(way)
        accuracies = [r.top1 for r in found]
        rows.append([
            labelled(way), str(len(found)), found[0].candidate.name, *_accuracy(found[0]), f'{fmean(accuracies):.2f}',
            f'{min(accuracies):.2f}'])
        if results.final:
            again = [r for r in results.final if r.candidate.way == way]
            rows[-1] += _accuracy(again[0]) if again else ['', '']
    return rows


def write_csv(results: SearchResults, path: Union[str, Path]) -> None:
    """Write all candidates as CSV, whole or not at all; those of the search first, each phase the best first.

    Accuracies are in percent. `modules` are separated by spaces; `classifier` has none and `all` has all, so that both
    are empty. A loss that diverged is empty. Ranks are over all candidates of the phase.
    """
    rows: list[tuple] = [_COLUMNS]
    for phase, found in (('search', results.results), ('final', results.final)):
        for rank, result in enumerate(_ranked(found), 1):
            candidate, loss = result.candidate, result.loss if math.isfinite(result.loss) else None
            rows.append((
                candidate.way, candidate.position, candidate.name, ' '.join(candidate.modules), phase,
                *(round(v, 6) for v in (result.top1, *result.interval())), loss, result.images, result.parameters,
                result.epochs, rank))
    write_text(path, csv_text(rows))


def difference_interval(first: CandidateResult, second: CandidateResult) -> tuple[float, float]:
    """95 % interval of the accuracy of the first less that of the second, in percentage points.

    Which images each of them got right is not kept, so they count as two independent shares (Newcombe, "Interval
    estimation for the difference between independent proportions", 1998, method 10), though the images are the same:
    where both are right about the same images, as they mostly are, it is wider than an interval of paired data.

    Args:
        first: A candidate or baseline.
        second: Another.
    """
    (low1, high1), (low2, high2) = first.interval(), second.interval()
    difference = first.top1 - second.top1
    return (
        difference - math.hypot(first.top1 - low1, high2 - second.top1),
        difference + math.hypot(high1 - first.top1, second.top1 - low2))


def labelled(way: str) -> str:
    """The way, a baseline with the paper's name of it."""
    return f'{way} ({BASELINES[way]})' if way in BASELINES else way


def _ranked(found: Iterable[CandidateResult]) -> list[CandidateResult]:
    return sorted(found, key=lambda r: (-r.top1, r.parameters))


def _way_order(way: str) -> tuple[int, int]:
    kind = way.rstrip('0123456789')
    return _ORDER.index(kind), int(way[len(kind):] or 0)


def _accuracy(result: CandidateResult) -> list[str]:
    low, high = result.interval()
    return [f'{result.top1:.2f}', f'{low:.2f} to {high:.2f}']
