"""Ratios of costs that mean something on a machine with other work: what the benchmarks have in common.

Each round runs all sides once, in an order that alternates from round to round; a figure is the median over the rounds
of the ratio within a round, so that what slows the machine slows both sides of a ratio. A control divides a side by
itself, run a second time: what it is away from 1 is the noise of that run.
"""
import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch

__all__ = ['Row', 'create_parser', 'interleave', 'parse', 'per_round', 'report']


def create_parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have; `rounds` is the default of `--rounds`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=rounds, help=f'rounds to take the median of (default: {rounds})')
    parser.add_argument('--threads', type=int, default=1, help='threads of PyTorch on the CPU (default: 1)')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: cpu)')
    parser.add_argument(
        '--clock', choices=('cpu', 'wall'), help='count CPU time, which other processes disturb less, or wall time '
        '(default: cpu for one thread on the CPU, else wall)')
    parser.add_argument(
        '--quick', action='store_true', help='tiny sizes and few rounds, at which no limit means anything')
    parser.add_argument('--check', action='store_true', help='exit with 1 if a figure is above its limit')
    return parser


def parse(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse, set PyTorch's threads, and give `args` its device and clock."""
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.device = torch.device(args.device)
    if args.device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
    if args.clock is None:
        # Threads that wait for each other spin, and the spinning would count.
        args.clock = 'cpu' if args.device.type == 'cpu' and args.threads == 1 else 'wall'
    if args.quick:
        args.rounds = min(args.rounds, 2)
    return args


def interleave(
        sides: dict[str, Callable[[], None]],
        args: argparse.Namespace,
        calls: int = 1,
        warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds a call of each side in each round.

    Args:
        sides: What to time.
        args: Namespace of `parse`.
        calls: Calls that one timing covers.
        warmup: Rounds before the first that counts.
    """
    clock = time.process_time if args.clock == 'cpu' else time.perf_counter
    wait = torch.cuda.synchronize if args.device.type == 'cuda' else lambda: None
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warmup, args.rounds):
        for name in sides if number % 2 else reversed(sides):
            side = sides[name]
            wait()
            start = clock()
            for _ in range(calls if number >= 0 else 1):
                side()
            wait()
            if number >= 0:
                times[name].append((clock() - start) / calls)
    return times


def per_round(function: Callable[..., float], *times: Sequence[float]) -> list[float]:
    """The function of the times of each round: `per_round(lambda a, b: a / b, times['a'], times['b'])`."""
    return list(itertools.starmap(function, zip(*times, strict=True)))


@dataclass(frozen=True)
class Row:
    """A figure of the report.

    Args:
        name: What was measured.
        values: Its value in each round.
        limit: What the median may be at most; None where nothing is asked.
        note: What is to be said of it.
        unit: Empty for a ratio.
    """
    name: str
    values: Sequence[float]
    limit: Optional[float] = None
    note: str = ''
    unit: str = ''

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def passed(self) -> bool:
        return self.limit is None or self.median <= self.limit

    def __str__(self) -> str:
        low, high = _middle_half(self.values)
        limit = '' if self.limit is None else f'{self.limit:.2f}'
        verdict = '' if self.limit is None else 'pass' if self.passed else 'FAIL'
        spread = f'({low:.3f} to {high:.3f})'
        return f'{self.name:52} {self.median:8.3f}{self.unit:3} {spread:20} {limit:>5} {verdict:5} {self.note}'.rstrip()


def _middle_half(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    quartiles = statistics.quantiles(values, n=4, method='inclusive')
    return quartiles[0], quartiles[2]


def report(title: str, rows: Sequence[Row]) -> bool:
    """Print the rows under a title; whether all are within their limits."""
    print(f'\n{title}')
    print(f'{"":52} {"median":>8}    {"(middle half)":20} {"limit":>5}')
    for row in rows:
        print(row)
    sys.stdout.flush()
    return all(row.passed for row in rows)
