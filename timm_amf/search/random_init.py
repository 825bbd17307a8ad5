"""Training from random weights for a given number of epochs: one half of the paper's best measure, and its dear one."""
import argparse
import contextlib
import copy
import csv
import io
import logging
import tempfile
from pathlib import Path

from timm_amf.data import DataSpec
from timm_amf.engine.options import build_parser, resolve_lr, save_args
from timm_amf.errors import UserError
from timm_amf.search.proposal import plan_flags

__all__ = ['random_init_accuracy']

_logger = logging.getLogger(__name__)

_LR = 0.05  # of SGD, at batch 32: far enough from bad for every network with batch norm
_OPTIMIZER = {'opt', 'momentum', 'weight_decay', 'opt_eps', 'opt_betas', 'opt_kwargs'}
# What belongs to another run, or to the weights; besides all that a Plan's own flags set.
_RESET = (
    'pretrained', 'pretrained_path', 'initial_checkpoint', 'resume',
    'eval_only', 'dry_run', 'start_epoch', 'stop_epoch', 'component', 'data_preset', 'data_dir', 'dataset',
    'log_wandb', 'branch_loss', 'policy_balance', 'routing_eps', 'num_classes',
)


def random_init_accuracy(args: argparse.Namespace, data: DataSpec, epochs: int) -> tuple[float, float]:
    """Train the network from random weights (Plested et al., Table 1).

    By the train script, with the augmentation of the options. The optimiser is SGD with a cosine schedule, a tenth of
    the epochs of warm-up and an LR of 0.05 at batch 32, unless the options name an optimiser and an LR of their own:
    the paper's difference "should still be pronounced even if suboptimal".

    Args:
        args: Options of `train_amf.py` that name a plain timm model.
        data: The data.
        epochs: Epochs.

    Returns:
        Validation accuracy in percent and mean training loss, both of the last epoch.

    Raises:
        UserError: As the train script.
    """
    import train_amf

    options = copy.deepcopy(args)
    defaults = vars(build_parser().parse_args([]))
    for name in (*_RESET, *plan_flags() - _OPTIMIZER):
        setattr(options, name, copy.deepcopy(defaults[name]))
    if 'lr' not in args.explicit:
        options.lr = _LR * args.batch_size * args.grad_accum_steps / 32
    if 'opt' not in args.explicit:
        options.opt, options.momentum, options.weight_decay = 'sgd', 0.9, 1e-4
    elif 'lr' not in args.explicit:
        options.lr = resolve_lr(args, args.batch_size * args.grad_accum_steps)
    options.sched, options.epochs, options.warmup_epochs = 'cosine', epochs, epochs // 10
    options.min_lr, options.warmup_lr = 0., 0.
    options.tracker = ['none']
    options.recipe = {'data': data.to_mapping()}
    with tempfile.TemporaryDirectory(prefix='timm_amf-') as folder:
        options.output, options.experiment = folder, 'random'
        config = Path(folder) / 'args.yaml'
        save_args(options, config)
        with contextlib.redirect_stdout(io.StringIO()):
            train_amf.train(['--config', str(config)])
        with open(Path(folder) / 'random' / 'summary.csv', newline='') as file:
            rows = list(csv.DictReader(file))
    if not rows:
        raise UserError('--random-init: no epoch was trained; give 1 or more')
    return float(rows[-1]['eval_top1']), float(rows[-1]['train_loss'])
