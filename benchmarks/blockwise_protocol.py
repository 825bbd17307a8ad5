"""The block-wise paper's protocol (section V), and its Table I: accuracy of each way of choosing what to tune.

    python benchmarks/blockwise_protocol.py FLOWERS --models mobilenetv2_100 vgg16 --seeds 0 1 2
    python benchmarks/blockwise_protocol.py FLOWERS --models mobilenetv2_100 --options img_size=64 search_epochs=5

All images below FLOWERS (their folder is their class) are drawn class by class into 70 % for training and 30 % for
validation: every accuracy of the paper's Table I is a multiple of 1/1101, and 1101 is 30 % of tf_flowers' 3670 images.
So the 10 % of the search lie within the 70 % on which the best of each way and both baselines are trained again.
docs/search.md: where the paper is silent.
"""
import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Optional

import numpy as np
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils import ParseKwargs

import timm_amf
from timm_amf.text import columns

VALIDATION = 0.3  # see above
OPTIONS = dict(
    # Paper, section V. Its text has lost the LR: this is ours, since at Keras' own for Adam, 0.001, a network that is
    # tuned as a whole forgets what it knew. Patience and factor of the plateau are Keras' own.
    opt='adam', lr=1e-4, weight_decay=0, batch_size=4, epochs=50, search_epochs=50, sched='plateau', patience_epochs=10,
    decay_rate=0.1, warmup_epochs=0, smoothing=0, no_aug=True, search_head='mlp',
    search_share=0.1 / (1 - VALIDATION), final_share=1.,
    # Its networks are Keras', where a norm is a layer: a window of three (section III-B) is three of those.
    separate_norms=True, window=3,
    # Table I, and the three random layers of Figure 3.
    ways=('layer', 'block', 'window', 'top3', 'top5', 'random3'))
WAYS = ('classifier', 'all', *OPTIONS['ways'])


def cut_of(model: str) -> str:
    """Where the blocks of a network end (section III-B): at the pooling of a VGG, at the activations of the others."""
    return 'pooling' if model.startswith('vgg') else 'activation'


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='folder of images by class')
    parser.add_argument('--models', nargs='+', required=True, help='timm architectures')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='a search for each (default: 0)')
    parser.add_argument('--options', nargs='*', default={}, action=ParseKwargs, help='flags by name, such as epochs=15')
    args = parser.parse_args(argv)
    rows = [('network', *WAYS)]
    for model in args.models:
        shares: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                split(args.data, Path(folder), seed)
                found = timm_amf.search_blocks(
                    model, folder, seed=seed, experiment=f'{model}-{seed}',
                    **{**OPTIONS, 'cut': cut_of(model), **args.options})
            for result in found.results.final:
                shares[result.candidate.way].append(result.top1 / 100)
        rows.append((model, *(
            f'{fmean(s):.4f}' + (f' ± {stdev(s):.4f}' if len(s) > 1 else '') if s else '' for s in shares.values())))
        print(columns(rows), flush=True)
    return 0


def split(source: Path, target: Path, seed: int) -> None:
    """Links to the images: of each class its share in `val`, the others in `train`."""
    classes: dict[str, list[Path]] = {}
    for path in sorted(source.resolve().rglob('*')):
        if path.suffix.lower() in get_img_extensions(as_set=True):
            classes.setdefault(path.parent.name, []).append(path)
    for number, (name, paths) in enumerate(classes.items()):
        order = np.random.RandomState((seed + 7919 * number) % 2**32).permutation(len(paths))
        for place, i in enumerate(order):
            folder = target / ('val' if place < max(1, round(VALIDATION * len(paths))) else 'train') / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f'{i}{paths[i].suffix}').symlink_to(paths[i])


if __name__ == '__main__':
    sys.exit(main())
