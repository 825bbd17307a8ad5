"""The flags of `timm-amf search`, and what of the train script's a search has not."""
import argparse
from collections.abc import Sequence

from timm_amf.engine.options import parse_args
from timm_amf.errors import UserError
from timm_amf.search.candidates import CUTS
from timm_amf.tuning.plan_args import common_plan
from timm_amf.verbs import VerbParser

__all__ = ['LEFT_OUT', 'PAPER_OPTIONS', 'PAPER_SHARES', 'WAYS', 'build_search_parser', 'parse_search_args']

WAYS = ('layer', 'block', 'window')
_PAPER_WAYS = ('layer', 'block', 'window', 'top3', 'top5')
# Section V of the paper, whose text has lost the LR. At Keras' own for Adam, 0.001, a network that is tuned as a whole
# forgets what it knew.
PAPER_OPTIONS = dict(
    opt='adam', lr=1e-4, weight_decay=0, batch_size=4, epochs=50, sched='plateau', patience_epochs=10, decay_rate=0.1,
    warmup_epochs=0, smoothing=0, no_aug=True,
)
PAPER_SHARES = dict(search_share=0.1, final_share=0.7, val_share=0.2)
# Of train_amf.py: what would give other results than candidates get here, and what only its own loop has.
_REFUSED = (
    'loss', 'bce_loss', 'jsd_loss', 'aug_splits', 'split_bn', 'kd_model_name', 'grad_accum_steps', 'global_k',
    'torchcompile', 'dry_run', 'eval_only',
)
LEFT_OUT = ('model_ema', 'mixup_off_epoch', 'branch_loss', 'policy_balance')


def build_search_parser() -> argparse.ArgumentParser:
    """The flags that train_amf.py has not."""
    parser = VerbParser(
        prog='timm-amf search', add_help=False, allow_abbrev=False,
        usage='%(prog)s [DIR] --model NAME [flags of train_amf.py] [flags below]',
        description='Find the layers, blocks or windows of layers that are worth tuning.')
    add = parser.add_argument
    add('-h', '--help', action='store_true', help='show this; timm-amf train --help shows the flags of train_amf.py')
    add('--ways', nargs='+', default=['block'], metavar='WAY',
        help='what to choose from: layer, block, window, and topK of the layers, such as top3 (default: block)')
    add('--cut', default='residual', metavar='WHERE', help=f'what ends a block: {", ".join(CUTS)} (default: residual)')
    add('--window', type=int, default=3, metavar='N', help='layers of a window (default: %(default)s)')
    add('--separate-norms', action='store_true', help='norms are layers of their own, as in the paper')
    add('--search-role', metavar='ROLE', help='part of the model to search, such as branch.0 (default: the backbone)')
    add('--search-epochs', type=int, metavar='N', help='epochs of each candidate (default: 10, or --epochs if fewer)')
    add('--search-share', type=float, default=1., metavar='X',
        help='share of the training images that candidates are trained on (default: all)')
    add('--final-share', type=float, default=0., metavar='X',
        help='train the best of each way and both baselines anew, for --epochs, on this share (default: do not)')
    add('--protocol', choices=('paper',), help="the paper's: 10 %% of all images for the search, 70 %% for training "
        'the best of each way, 20 %% for validation; its classifier, optimiser and schedule')
    add('--search-head', choices=('own', 'mlp'), help="the model's own classifier, or the paper's of three layers")
    add('--budget', type=float, metavar='MINUTES', help='let this decide on images and epochs')
    add('--halving', type=float, metavar='SHARE', help='successive halving: keep this share at each rung')
    add('--chunk', type=int, metavar='N', help='most candidates that train at once')
    add('--memory', type=float, metavar='GB', help='most memory for their activations (default: half of what is free)')
    add('--cache-gb', type=float, default=4., metavar='GB',
        help='most disk for what arrives at the candidates, where images are not augmented; 0: none (default: '
             '%(default)s)')
    add('--one-by-one', action='store_true', help='train each candidate in a network of its own')
    add('--compare', nargs='+', metavar='RUN', help="the paper's Table I from folders of finished searches")
    add('--table-file', metavar='FILE', help='with --compare: write it as CSV, and the figure beside it')
    return parser


def _check_own(own: argparse.Namespace) -> None:
    for way in own.ways:
        if way not in WAYS and not (way.startswith('top') and way[3:].isdigit() and int(way[3:]) > 0):
            raise UserError(f'--ways {way}: unknown; choose from {", ".join(WAYS)} and topK, such as top3')
    if own.cut not in CUTS:
        raise UserError(f'--cut {own.cut}: unknown; choose one of {", ".join(CUTS)}')
    for name in ('search_share', 'final_share'):
        value = getattr(own, name)
        if not (0 < value <= 1 or (value == 0 and name == 'final_share')):
            raise UserError(f'--{name.replace("_", "-")} {value:g}: must be above 0 and at most 1')
    if own.halving is not None and not 0 < own.halving < 1:
        raise UserError(f'--halving {own.halving:g}: must be above 0 and below 1, such as 0.5')
    for name in ('search_epochs', 'budget', 'chunk', 'memory'):
        value = getattr(own, name)
        if value is not None and value <= 0:
            raise UserError(f'--{name.replace("_", "-")} {value:g}: must be above 0')
    if not own.cache_gb >= 0:
        raise UserError(f'--cache-gb {own.cache_gb:g}: must be 0 or above')
    if own.protocol and own.budget:
        raise UserError('--budget changes images and epochs, which --protocol fixes; give one of them')


def _check_args(args: argparse.Namespace) -> None:
    """What of train_amf.py the search has not."""
    if 'model' not in args.explicit:
        raise UserError('no model: name one with --model, or a recipe with --config')
    usual = {'loss': 'ce', 'grad_accum_steps': 1}
    for name in _REFUSED:
        value = getattr(args, name)
        if value and value != usual.get(name):
            raise UserError(f'--{name.replace("_", "-")}: a search cannot train with it; leave it out of the search')
    if args.resume not in ('', 'auto'):
        raise UserError(f'--resume {args.resume}: give auto, and the --output and --experiment of the search')
    if args.resume and not args.experiment:
        raise UserError('--resume auto: name the search that goes on with --experiment')


def _preset_flags() -> list[str]:
    flags = []
    for name, value in PAPER_OPTIONS.items():
        flags += [f'--{name.replace("_", "-")}', *([] if value is True else [str(value)])]
    return flags


def parse_search_args(argv: Sequence[str], preset: bool = True) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The flags of a search, and those of train_amf.py.

    Args:
        argv: The command line.
        preset: Put what `--protocol` stands for before it.

    Raises:
        UserError: If a flag is unknown, out of range, or nothing that a search can have.
    """
    parser = build_search_parser()
    own, rest = parser.parse_known_args(argv)
    if own.protocol:
        given = {a.split('=')[0] for a in argv}
        for name in ('--search-share', '--final-share'):
            if name in given:
                raise UserError(f'{name}: --protocol fixes it; leave one of them out')
        own.ways = own.ways if '--ways' in given else list(_PAPER_WAYS)
        own.search_head = own.search_head or 'mlp'
        own.search_share, own.final_share = PAPER_SHARES['search_share'], PAPER_SHARES['final_share']
        rest = [*_preset_flags(), *rest] if preset else rest
    _check_own(own)
    args = parse_args(rest)
    _check_args(args)
    if not args.initial_checkpoint and not args.pretrained:
        args.pretrained = True
        args.explicit.add('pretrained')
    epochs = common_plan(args).epochs
    default = epochs if own.protocol else min(10, epochs)
    own.search_epochs = own.search_epochs or default
    own.search_head = own.search_head or 'own'
    return own, args
