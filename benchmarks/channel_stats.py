"""Mean and standard deviation of each channel of a folder of images, to normalise them with.

    python benchmarks/channel_stats.py /data/cubs --split train

It reads whatever train_amf.py reads there: class folders below a split, a table, an archive. `timm-amf decathlon stats`
is the same for the domains of the Visual Decathlon. The two lines go into a recipe or behind --mean and --std.
"""
import argparse
import sys
from collections.abc import Sequence
from typing import Optional

from timm_amf.data.datasets import open_source
from timm_amf.data.decathlon import channel_stats
from timm_amf.data.spec import DataSpec
from timm_amf.errors import run_command


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='folder, table or archive')
    parser.add_argument('--split', default='train', help='default: %(default)s')
    args = parser.parse_args(argv)
    return run_command('channel_stats', lambda: show(args))


def show(args: argparse.Namespace) -> None:
    spec = DataSpec.from_mapping({'root': args.data})
    for name, values in zip(('mean', 'std'), channel_stats(open_source(spec.components[0], args.split, spec))):
        print(f'{name}: [{", ".join(f"{x:.4f}" for x in values)}]')


if __name__ == '__main__':
    sys.exit(main())
