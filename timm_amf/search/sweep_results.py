"""What a sweep found: its configurations, ranked, with paired tests against the best, and the files that say so."""
import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Optional

from timm_amf.engine.intervals import holm, mean_interval, paired_p
from timm_amf.errors import UserError
from timm_amf.files import write_text
from timm_amf.search.proposal import config_text
from timm_amf.text import columns, csv_of, read_rows
from timm_amf.tuning import Plan
from timm_amf.yaml_text import load_yaml

__all__ = ['HOW', 'Configuration', 'Sweep', 'ranked', 'shown', 'write_rows']

HOW = "Interval: Student's t over the seeds, none where all agree; p: paired t test against the best"
_STATISTICS = ('mean', 'std', 'low', 'high', 'difference', 'p', 'p_holm')


@dataclass
class Configuration:
    """A trial of a sweep.

    Attributes:
        number: Its place in the queue; its runs are the folders `trial{number}-seed{seed}`.
        values: What differs, by flag or ROLE.FIELD.
        runs: Validation metrics of the best epoch of each finished run, by seed.
        end: `complete`, or how it ended else: `pruned: ...`, `diverged: ...`.
        mean: Of the runs' metrics, None if it is not complete.
        std: Standard deviation over the seeds (ddof 1).
        low: Lower limit of Student's 95 % interval of the mean over seeds, 0 at least; None, as `std` and `high`, of
            one seed and where all seeds agree, which would be a width of 0.
        high: Upper limit; of percentages 100 at most.
        difference: Of the means, from the best configuration's.
        p: P value of the paired t test against the best, over the seeds; NaN where all differences are the same.
        p_holm: Corrected by Holm for the number of configurations that are compared with the best.
    """
    number: int
    values: dict[str, Any]
    runs: dict[int, dict[str, float]]
    end: str
    mean: Optional[float] = None
    std: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None
    difference: Optional[float] = None
    p: Optional[float] = None
    p_holm: Optional[float] = None

    def __str__(self) -> str:
        return ' '.join(f'{key}={shown(value)}' for key, value in self.values.items())

    def scores(self, metric: str) -> list[float]:
        """A metric of its runs, in the order of the seeds."""
        return [self.runs[seed][metric] for seed in sorted(self.runs)]


def shown(value: Any) -> str:
    """A value as a table and a figure have it."""
    return f'{value:.3g}' if isinstance(value, float) else str(value)


def ranked(configurations: Sequence[Configuration], metric: str) -> list[Configuration]:
    """The configurations with their statistics, the best first; after them those that are not complete."""
    complete = [c for c in configurations if c.end == 'complete']
    for c in complete:
        scores = c.scores(metric)
        c.mean = fmean(scores)
        if len(set(scores)) > 1:
            c.mean, c.std, low, high = mean_interval(scores)
            c.low, c.high = max(low, 0.), high if metric == 'loss' else min(high, 100.)
    sign = 1 if metric == 'loss' else -1
    complete.sort(key=lambda c: (sign * c.mean, c.number))
    best, others = complete[:1], complete[1:]
    for c in others:
        c.difference = c.mean - best[0].mean
    if others and len(best[0].runs) > 1:
        for c in others:
            c.p = paired_p(c.scores(metric), best[0].scores(metric))
        for c, p in zip(others, holm([c.p for c in others])):
            c.p_holm = p
    return complete + [c for c in configurations if c.end != 'complete']


@dataclass
class Sweep:
    """What `sweep` found.

    Attributes:
        folder: Where its files and the folders of its runs are.
        metric: Name of the validation metric that ranks.
        configurations: The best first; those that were pruned or diverged last.
        model: Name of the model.
        plan: The best configuration's Plan, None where its runs are on another machine.
        config: The YAML file that repeats its run of the least seed.
        test: Table of its runs on the test images, if that was asked for.
        notes: What else there is to say, in sentences.
    """
    folder: Path
    metric: str
    configurations: list[Configuration]
    model: str = ''
    plan: Optional[Plan] = None
    config: str = ''
    test: str = ''
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Configuration:
        return self.configurations[0]

    def runs(self, configuration: Configuration) -> list[Path]:
        """The folders of a configuration's runs, in the order of the seeds."""
        return [self.folder / f'trial{configuration.number}-seed{seed}' for seed in sorted(configuration.runs)]

    @property
    def table(self) -> list[list[str]]:
        """Rows: the configurations, with intervals and tests where there are several seeds."""
        several = len(self.best.runs) > 1
        rows = [['trial', *self.best.values, 'seeds', self.metric,
                 *(('95 % interval', 'difference', 'p', 'p (Holm)') if several else ())]]
        for c in self.configurations:
            rows.append([
                str(c.number), *map(shown, c.values.values()), str(len(c.runs)),
                c.end if c.mean is None else f'{c.mean:.2f}'])
            if several:
                rows[-1] += ['' if c.low is None else f'{c.low:.2f} to {c.high:.2f}', _number(c.difference, '+.2f'),
                             _number(c.p, '.2g'), _number(c.p_holm, '.2g')]
        return rows

    def __str__(self) -> str:
        text = columns(self.table, right=range(len(self.best.values) + 1, len(self.table[0])))
        if len(self.best.runs) > 1:
            text += f'\n{HOW}'
        return '\n\n'.join([text, *filter(None, [self.test]), *self.notes])

    def write(self) -> None:
        """Write `sweep.csv`, a row a configuration, and `runs.csv`, a row a run."""
        write_rows(self.folder / 'sweep.csv', [
            {'trial': c.number, **c.values, 'seeds': len(c.runs), 'metric': self.metric,
             **{name: getattr(c, name) for name in _STATISTICS}, 'end': c.end} for c in self.configurations])
        write_rows(self.folder / 'runs.csv', [
            {'trial': c.number, **c.values, 'seed': seed, **c.runs[seed], 'run': run.name}
            for c in self.configurations for seed, run in zip(sorted(c.runs), self.runs(c))])

    @classmethod
    def read(cls, folder: Path) -> 'Sweep':
        """What `write` and `write_best` wrote."""
        tables = []
        for name in ('sweep.csv', 'runs.csv'):
            if not (folder / name).is_file():
                raise UserError(
                    f'{folder / name}: is missing; the sweep has not ended: wait, or give its command again')
            tables.append(read_rows(folder / name))
        try:
            rows, runs = tables
            keys = list(rows[0])[1:list(rows[0]).index('seeds')]
            found = [Configuration(
                int(row['trial']), {key: _value(row[key]) for key in keys}, {}, row['end'],
                **{name: float(row[name]) if row[name] else None for name in _STATISTICS}) for row in rows]
            of_number = {c.number: c for c in found}
            for row in runs:
                of_number[int(row['trial'])].runs[int(row['seed'])] = {
                    name: float(value) for name, value in row.items()
                    if value and name not in ('trial', 'seed', 'run', *keys)}
            best = load_yaml(folder / 'best.yaml') if (folder / 'best.yaml').is_file() else {}
            return cls(folder, rows[0]['metric'], found, best.get('model', ''))
        except (KeyError, ValueError, IndexError, TypeError) as e:
            raise UserError(f'{folder / "sweep.csv"}: is damaged ({type(e).__name__}: {e})') from None

    def write_best(self, args: argparse.Namespace) -> None:
        """Write `best.yaml`, which repeats the best configuration's run of the least seed.

        Args:
            args: The options of that run.
        """
        self.plan = Plan.from_yaml(self.runs(self.best)[0] / 'plan.yaml')
        seeds = ', '.join(map(str, sorted(self.best.runs)))
        self.config = config_text(args, self.plan, [
            '# By `timm-amf sweep`: of all configurations the best on validation images.',
            f'# {self.best}: {self.metric} {self.best.mean:.2f}, mean of seeds {seeds}'])
        write_text(self.folder / 'best.yaml', self.config)


def _value(text: str) -> Any:
    """A value of a CSV file; numbers with a point come from a range, and are shown rounded."""
    try:
        return float(text) if '.' in text else text
    except ValueError:
        return text


def _number(value: Optional[float], form: str) -> str:
    return '' if value is None or math.isnan(value) else format(value, form)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same columns as CSV."""
    write_text(path, csv_of(rows))
