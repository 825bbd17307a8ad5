"""What `import timm_amf` costs, against `import timm`, each in fresh interpreters.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --modules 20    # what it imports beyond timm, and the time of each

Limit: CPU time of `import timm_amf` (which imports timm) at most 1.1 of that of `import timm`.
"""
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Optional

from _timing import Row, create_parser, per_round, report

LIMIT = 1.1
# Side -> statement. The control is the first once more.
SIDES = {'timm': 'import timm', 'control': 'import timm', 'timm_amf': 'import timm_amf', 'torch': 'import torch'}


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = create_parser(__doc__, rounds=9)
    parser.add_argument('--modules', type=int, default=8, help='how many of the slowest modules to list (default: 8)')
    args = parser.parse_args(argv)
    times = measure(1, warmup=0) if args.quick else measure(args.rounds)

    def ratio(a: str, b: str) -> list[float]:
        return per_round(lambda x, y: x / y, times[a], times[b])

    passed = report('import, CPU time', [
        Row('timm', times['timm'], unit=' s'),
        Row('control: timm / timm', ratio('control', 'timm')),
        Row('torch / timm', ratio('torch', 'timm')),
        Row('timm_amf / timm', ratio('timm_amf', 'timm'), LIMIT),
    ])
    if args.modules:
        print('\nimported beyond timm, slowest first (ms of their own)')
        for name, milliseconds in beyond_timm()[:args.modules]:
            print(f'  {name:50} {milliseconds:7.1f}')
    return int(args.check and not passed and not args.quick)


def measure(rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of user and system time of each side in each round, after rounds that fill the disk cache."""
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(-warmup, rounds):
        for name in SIDES if number % 2 else reversed(SIDES):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, '-c', SIDES[name]], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if number >= 0:
                times[name].append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return times


def beyond_timm() -> list[tuple[str, float]]:
    """Modules that `import timm_amf` imports and `import timm` does not, with their own milliseconds."""
    ours, theirs = own_times('import timm_amf'), own_times('import timm')
    return sorted(((m, t) for m, t in ours.items() if m not in theirs), key=lambda item: -item[1])


def own_times(statement: str) -> dict[str, float]:
    """Module -> milliseconds of its own, without what it imports."""
    command = [sys.executable, '-X', 'importtime', '-c', statement]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    matches = (re.match(r'import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)', line) for line in lines)
    return {match[2]: int(match[1]) / 1000 for match in matches if match}


if __name__ == '__main__':
    sys.exit(main())
