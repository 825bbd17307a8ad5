"""Throughput of the loader against timm's own, and of the image cache against the loader without it.

    python benchmarks/loader.py                         # synthetic 500x400 JPEGs
    python benchmarks/loader.py /data/flowers/train     # your own folder of class folders

Both loaders have the same transforms (timm's default training transform) and the same number of workers. Each round
runs all of them once, in turn; the figures are medians over the rounds of ratios within a round, so that a busy
machine slows all sides alike. The control divides timm by timm: what it is away from 1 is noise.

Expected: loader / timm at least 0.95, cache / loader at least 2.0.
"""
import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image

from timm_amf.data import Component, DataSpec, build_cache, cache_short_side, create_dataset, create_loader

CLOCKS = {'wall': time.perf_counter, 'cpu': lambda: sum(os.times()[:4])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='?', help='folder of class folders (default: synthetic JPEGs of 500x400)')
    parser.add_argument('--images', type=int, default=512, help='how many synthetic images')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('-b', '--batch-size', type=int, default=32)
    parser.add_argument('-j', '--workers', type=int, default=1, help='worker processes of each loader')
    parser.add_argument(
        '--clock', choices=('wall', 'cpu'), default='wall',
        help='cpu: count the CPU time of main process and workers instead, for a machine that others use too')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--aa', default=None, help='automatic augmentation, such as rand-m9-mstd0.5-inc1')
    parser.add_argument('--reprob', type=float, default=0.)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or synthetic_images(Path(folder) / 'images', args.images)
        loaders = build_loaders(args, data, Path(folder) / 'cache')
        report(measure(loaders, args.rounds, CLOCKS[args.clock]))


def synthetic_images(folder: Path, number: int) -> str:
    """JPEGs of 500x400 and about 80 KB, which decode as fast as photographs of that size (900 a second and core)."""
    rng = np.random.default_rng(0)
    for i in range(number):
        coarse = rng.integers(0, 256, (13, 16, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((500, 400), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = np.clip(pixels + rng.normal(0, 9, pixels.shape), 0, 255).astype(np.uint8)
        path = folder / f'class{i % 4}' / f'{i:05}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=92)
    return str(folder)


def build_loaders(args: argparse.Namespace, data: str, cache_dir: Path) -> dict:
    shared = dict(
        input_size=(3, args.img_size, args.img_size), batch_size=args.batch_size, is_training=True,
        auto_augment=args.aa, re_prob=args.reprob, re_mode='pixel',
        persistent_workers=args.clock == 'wall')  # the CPU time of workers is known once they have ended

    def timms():
        dataset = timm.data.create_dataset('', root=data, search_split=False)
        return timm.data.create_loader(dataset, num_workers=args.workers, device=torch.device('cpu'), **shared)

    def ours(cached: bool):
        dataset = create_dataset(DataSpec((Component('data', root=data, splits={'train': '.'}),)), 'train')
        if cached:
            build_cache(dataset, cache_short_side(args.img_size), cache_dir=cache_dir)
        return create_loader(dataset, workers=args.workers, **shared)

    return {'timm': timms(), 'control (timm)': timms(), 'loader': ours(False), 'cache': ours(True)}


def measure(loaders: dict, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Images a second of each loader in each round, after one epoch of warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for round_number in range(rounds + 1):
        order = list(loaders)
        for name in order if round_number % 2 else reversed(order):
            start = clock()
            images = sum(len(batch[0]) for batch in loaders[name])
            if round_number:
                rates[name].append(images / (clock() - start))
    return rates


def report(rates: dict[str, list[float]]) -> None:
    for name, values in rates.items():
        print(f'{name:16} {statistics.median(values):8.0f} images/s')
    for over, under in (('control (timm)', 'timm'), ('loader', 'timm'), ('cache', 'loader'), ('cache', 'timm')):
        ratios = sorted(a / b for a, b in zip(rates[over], rates[under], strict=True))
        print(f'{over} / {under}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})')


if __name__ == '__main__':
    main()
