"""What a sweep varies: keys, what each is drawn from, and the command line that sets a configuration.

A key is a flag of `timm-amf train` without its dashes, or ROLE.FIELD as `--role` takes it.
"""
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from timm_amf.engine.options import build_parser, parse_args
from timm_amf.errors import UserError, nearest

__all__ = ['Space', 'pairs']

# Flags that are the same for all runs of a sweep.
_FIXED = ('config', 'output', 'experiment', 'resume', 'overwrite', 'eval_metric', 'dry_run', 'eval_only', 'publish',
          'budget')
_RANGE = re.compile(r'(log:)?([^:,\[\]]+):([^:,\[\]]+)')


class Space:
    """The configurations that a sweep can train.

    Args:
        words: The command line that is common to all.
        grid: Values by key, in text with commas between or as a list; all combinations are trained.
        space: In its place, what is drawn from by key: `LOW:HIGH`, `log:LOW:HIGH` (whole numbers where both limits
            are), values, or a distribution of Optuna.
    """

    def __init__(self, words: Sequence[str], grid: Mapping[str, Any], space: Mapping[str, Any]):
        if bool(grid) == bool(space):
            raise UserError('give --grid KEY=VALUE,... or --space KEY=LOW:HIGH: one of the two')
        self.is_grid, self.given = bool(grid), list(words)
        self.args = parse_args(words)
        self._actions = {a.dest: a for a in build_parser()._actions if a.option_strings and a.dest not in _FIXED}
        self.over = {key: self._distribution(key, given) for key, given in (grid or space).items()}
        for values in self.samples():
            try:
                parse_args(self.words(values))
            except UserError as e:
                given = ' '.join(f'{key}={value}' for key, value in values.items())
                raise UserError(f'--{"grid" if self.is_grid else "space"} {given}: {e}') from None

    def _distribution(self, key: str, given: Any) -> BaseDistribution:
        flag = key.replace('-', '_')
        if flag == 'seed':
            raise UserError('seed: seeds are no configurations; give them with --seeds')
        if '.' not in key and flag not in self._actions:
            near = nearest(flag, self._actions)
            raise UserError(f'{key}: no flag that runs can differ in{near}; a setting of a role is ROLE.FIELD')
        if flag in self.args.explicit:
            raise UserError(f'{key}: --{flag.replace("_", "-")} gives it one value already; leave that out')
        if isinstance(given, BaseDistribution):
            return given
        match = None if self.is_grid or not isinstance(given, str) else _RANGE.fullmatch(given)
        if match:
            return self._range(f'--space {key}={given}', *match.groups())
        if isinstance(given, str):  # commas within brackets belong to a value
            values = [value.strip() for value in re.split(r',(?![^\[\](){}]*[\])}])', given)]
        else:  # several words of a flag, or what YAML reads
            listed = (list, tuple) if '.' not in key else ()
            given = given if isinstance(given, Sequence) else [given]
            values = [' '.join(map(str, value)) if isinstance(value, listed) else str(value) for value in given]
        if not all(values) or len(set(values)) < len(values):
            raise UserError(f'{key}={",".join(values)}: give different values with commas between')
        return CategoricalDistribution(values)

    @staticmethod
    def _range(where: str, log: Optional[str], low: str, high: str) -> BaseDistribution:
        try:
            if f'{low}{high}'.replace('-', '').isdigit():
                return IntDistribution(int(low), int(high), log=bool(log))
            return FloatDistribution(float(low), float(high), log=bool(log))
        except ValueError:
            above = ', above 0' if log else ''
            raise UserError(f'{where}: write two numbers, LOW:HIGH, the lower one first{above}') from None

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """The values of a trial."""
        values = {}
        for key, over in self.over.items():
            if isinstance(over, CategoricalDistribution):
                values[key] = trial.suggest_categorical(key, over.choices)
            elif isinstance(over, IntDistribution):
                values[key] = trial.suggest_int(key, over.low, over.high, step=over.step, log=over.log)
            else:
                values[key] = trial.suggest_float(key, over.low, over.high, step=over.step, log=over.log)
        return values

    def queue(self, trials: int) -> list[dict[str, Any]]:
        """What is fixed of each trial: of a grid all; the rest is drawn when its turn comes."""
        if not self.is_grid:
            return [{} for _ in range(trials)]
        return [dict(zip(self.over, values)) for values in itertools.product(*(d.choices for d in self.over.values()))]

    def samples(self) -> list[dict[str, Any]]:
        """Configurations that have, together, each value of a list and both ends of a range."""
        ends = {
            key: over.choices if isinstance(over, CategoricalDistribution) else (over.low, over.high)
            for key, over in self.over.items()}
        most = max(map(len, ends.values()))
        return [{key: values[min(i, len(values) - 1)] for key, values in ends.items()} for i in range(most)]

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """The command line of a configuration."""
        words, roles = [word for word in self.given if word != '--overwrite'], []
        for key, value in values.items():
            if '.' in key:
                roles.append(f'{key}={value}')
                continue
            action = self._actions[key.replace('-', '_')]
            flag = action.option_strings[-1]
            if action.nargs == 0:
                if str(value).lower() not in ('true', 'false') or getattr(self.args, action.dest):
                    raise UserError(f'{key}={value}: is a switch; give true,false and leave {flag} itself out')
                words += [flag] * (str(value).lower() == 'true')
            else:
                words += [f'{flag}={value}'] if action.nargs is None else [flag, *str(value).split()]
        return words + (['--role', *self.args.role_settings, *roles] if roles else [])


def pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """What `--grid` or `--space` says, by key."""
    found = {}
    for text in texts:
        key, equals, values = text.lstrip('-').partition('=')
        if not (key and equals and values):
            raise UserError(f'{flag} {text}: write KEY=VALUES, and the folder of data before the flags')
        found[key] = values
    return found
