"""The flags of timm's train script as a table: their names, types and defaults, and what becomes of each here.

`flags.add_flags` says what a row holds. A flag that is not in `REPLACED` means what it means in timm.
"""
from typing import Optional

from timm_amf.flags import amount, count, natural, number, path, share, workers

__all__ = ['TIMM_FLAGS', 'REPLACED', 'REFUSED', 'REFUSED_VALUES', 'SWITCHES', 'why_refused']

_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')

TIMM_FLAGS = {
    'Dataset parameters': (
        ('--data-dir', path, None, 'folder of the dataset; the same as the positional argument', {'metavar': 'DIR'}),
        ('--dataset', str, '', 'dataset as timm names it: empty for a folder, or torch/, hfds/, tfds/, wds/...'),
        ('--train-split', str, 'train', 'split to train on'),
        ('--val-split', str, 'validation', 'split to evaluate on'),
        ('--train-num-samples', count, None, 'size of the train split, where the dataset cannot tell'),
        ('--val-num-samples', count, None, 'size of the evaluation split, where the dataset cannot tell'),
        ('--dataset-download', bool, False, 'let torch/, tfds/ and hfids/ datasets download themselves'),
        ('--class-map', path, '', 'file that maps class names to indices', {'metavar': 'FILE'}),
        ('--input-img-mode', str, None, 'PIL mode that images are converted to, such as RGB or L'),
        ('--input-key', str, None, 'field of the dataset that holds the image'),
        ('--target-key', str, None, 'field of the dataset that holds the target'),
        ('--dataset-trust-remote-code', bool, False, 'let hfds/ datasets run code of their own repository'),
    ),
    'Model parameters': (
        ('--model', str, None, 'network to fine-tune, any of timm and of timm_amf (default: resnet50)'),
        ('--pretrained', bool, False, 'start from pretrained weights'),
        ('--pretrained-path', path, None, 'file of pretrained weights, whose classifier is adapted to the classes',
         {'metavar': 'FILE'}),
        ('--pretrained-cfg-overlay', dict, {}, 'entries of the pretrained configuration to override'),
        ('--initial-checkpoint', path, '', 'weights to load into the finished model', {'metavar': 'FILE'}),
        ('--resume', path, '', 'checkpoint to go on from; auto: the last one of the experiment, if there is one',
         {'metavar': 'PATH'}),
        ('--no-resume-opt', bool, False, 'resume the weights but not the optimiser'),
        ('--num-classes', count, None, 'number of classes, the default is that of the data or of the model'),
        ('--gp', str, None, 'global pooling, such as avg, max, avgmax, catavgmax'),
        ('--img-size', count, None, 'side of the image in pixels'),
        ('--in-chans', count, None, 'number of image channels'),
        ('--input-size', count, None, 'channels, height and width, such as 3 224 224', {'nargs': 3, 'metavar': 'N'}),
        ('--crop-pct', number(float, 0.05, 1), None, 'share of the image that the centre crop of the evaluation keeps'),
        ('--mean', float, None, 'mean to normalise with, one value or one a channel', {'nargs': '+'}),
        ('--std', number(float, above=0), None, 'standard deviation to normalise with, one value or one a channel',
         {'nargs': '+'}),
        ('--interpolation', str, '', 'interpolation of the evaluation', {'choices': ('',) + _INTERPOLATIONS}),
        ('-b --batch-size', count, None, 'images a step and process (default: 128)'),
        ('-vb --validation-batch-size', count, None, 'images a step and process in evaluation'),
        ('--channels-last', bool, False, 'use the channels_last memory format'),
        ('--fuser', str, '', 'TorchScript fuser'),
        ('--grad-accum-steps', count, 1, 'batches to add up before each step of the optimiser'),
        ('--grad-checkpointing', bool, False, 'recompute activations in the backward pass to save memory'),
        ('--fast-norm', bool, False, "timm's fast normalisation layers"),
        ('--model-kwargs', dict, {}, "arguments for the model's constructor"),
        ('--head-init-scale', float, None, "factor on the initial weight of the model's classifier"),
        ('--head-init-bias', float, None, "initial bias of the model's classifier"),
        ('--torchcompile-mode', str, None, 'mode of torch.compile'),
        ('--torchscript', bool, False, 'script the model'),
        ('--torchcompile', str, None, 'compile the model, with this backend',
         {'nargs': '?', 'const': 'inductor', 'metavar': 'BACKEND'}),
    ),
    'Device parameters': (
        ('--device', str, 'cuda', 'device to train on; cpu acts as --cpu'),
        ('--amp', bool, False, 'mixed precision, in the type of --amp-dtype'),
        ('--amp-dtype', str, 'float16', 'type of the mixed precision', {'choices': ('float16', 'bfloat16')}),
        ('--model-dtype', str, None, 'type of the model without mixed precision',
         {'choices': ('float32', 'float16', 'bfloat16')}),
        ('--no-ddp-bb', bool, False, 'do not broadcast buffers between processes at each step'),
        ('--synchronize-step', bool, False, 'synchronise the device after each step'),
        ('--local_rank', int, 0, 'rank of the process on its machine'),
        ('--device-modules', str, None, 'modules to import first, such as one that registers models of your own',
         {'nargs': '+', 'metavar': 'MODULE'}),
    ),
    'Gradient parameters': (
        ('--clip-grad', amount, None, 'limit on the gradient, not clipped without'),
        ('--clip-mode', str, 'norm', 'what --clip-grad limits', {'choices': ('norm', 'value', 'agc')}),
    ),
    'Learning rate schedule parameters': (
        ('--lr', float, None, 'learning rate; without it, --lr-base scaled with the global batch size'),
        ('--lr-base', amount, None, 'learning rate at a global batch of --lr-base-size (default: 0.1)'),
        ('--lr-base-size', count, None, 'global batch size that --lr-base is for (default: 256)'),
        ('--lr-base-scale', str, None, 'growth of the LR with the batch (default: sqrt for Adam and kin, else linear)',
         {'choices': ('', 'linear', 'sqrt')}),
        ('--warmup-lr', amount, None, 'LR at the start of the warm-up (default: 1e-5)'),
        ('--min-lr', amount, None, 'LR that the decay does not go below (default: 0)'),
        ('--epoch-repeats', amount, 0., 'passes over the dataset that make one epoch'),
        ('--start-epoch', natural, None, 'number of the first epoch, instead of that of the checkpoint'),
        ('--stop-epoch', natural, None, 'leave after this many epochs without changing the schedule'),
        ('--save-epochs', natural, None, 'epochs whose checkpoints are always kept', {'nargs': '+', 'metavar': 'N'}),
    ),
    'Augmentation and regularization parameters': (
        ('--no-aug', bool, False, 'no augmentation at all'),
        ('--train-crop-mode', str, None, 'how training images are cropped', {'choices': ('rrc', 'rkrc', 'rkrr')}),
        ('--scale', float, [0.08, 1.0], 'least and largest area of the random crop', {'nargs': '+'}),
        ('--ratio', float, [3. / 4., 4. / 3.], 'least and largest aspect ratio of the random crop', {'nargs': '+'}),
        ('--hflip', share, 0.5, 'probability of a horizontal flip'),
        ('--vflip', share, 0., 'probability of a vertical flip'),
        ('--color-jitter', float, 0.4, 'strength of the colour jitter'),
        ('--color-jitter-prob', share, None, 'probability of the colour jitter, always without'),
        ('--grayscale-prob', share, None, 'probability of a conversion to grey'),
        ('--gaussian-blur-prob', share, None, 'probability of a blur'),
        ('--aa', str, None, 'AutoAugment, RandAugment or AugMix, such as rand-m9-mstd0.5-inc1'),
        ('--aug-repeats', amount, 0, 'augmented copies of each image in a batch'),
        ('--aug-splits', number(int, 0, 64), 0, 'augmentation splits of a batch'),
        ('--jsd-loss', bool, False, 'Jensen-Shannon consistency loss over the splits'),
        ('--loss', str, None, 'loss, cross-entropy without',
         {'choices': ('ce', 'bce', 'asl', 'poly', 'jsd', 'twoway', 'zlpr', 'db')}),
        ('--bce-loss', bool, False, 'binary cross-entropy, the same as --loss bce'),
        ('--bce-sum', bool, False, 'sum the binary cross-entropy over the classes'),
        ('--bce-target-thresh', float, None, 'threshold that makes soft targets binary'),
        ('--bce-pos-weight', float, None, 'weight of the positive targets'),
        ('--reprob', share, 0., 'probability of random erasing'),
        ('--remode', str, 'pixel', 'what random erasing fills in', {'choices': ('const', 'rand', 'pixel')}),
        ('--recount', count, 1, 'most areas that random erasing takes'),
        ('--resplit', bool, False, 'do not erase in the first augmentation split'),
        ('--mixup', amount, 0.0, 'alpha of mixup, off at 0'),
        ('--cutmix', amount, 0.0, 'alpha of cutmix, off at 0'),
        ('--cutmix-minmax', float, None, 'least and largest share of cutmix, instead of its alpha', {'nargs': '+'}),
        ('--mixup-prob', share, 1.0, 'probability of either where one is on'),
        ('--mixup-switch-prob', share, 0.5, 'probability of cutmix where both are on'),
        ('--mixup-mode', str, 'batch', 'what shares its mixup parameters', {'choices': ('batch', 'pair', 'elem')}),
        ('--mixup-off-epoch', natural, 0, 'epoch from which mixup and cutmix are off, never at 0'),
        ('--smoothing', share, 0.1, 'label smoothing'),
        ('--train-interpolation', str, 'random', 'interpolation of the training',
         {'choices': ('', 'random') + _INTERPOLATIONS}),
        ('--drop', share, 0.0, 'dropout'),
        ('--drop-connect', float, None, 'older name of --drop-path'),
        ('--drop-path', share, None, 'stochastic depth'),
        ('--drop-block', share, None, 'DropBlock'),
    ),
    'Batch norm parameters': (
        ('--bn-momentum', share, None, 'momentum of the batch norms'),
        ('--bn-eps', amount, None, 'epsilon of the batch norms'),
        ('--sync-bn', bool, False, 'batch statistics over all processes'),
        ('--dist-bn', str, 'reduce', 'how running statistics are shared after an epoch',
         {'choices': ('broadcast', 'reduce', '')}),
        ('--split-bn', bool, False, 'separate batch norms for each augmentation split'),
    ),
    'Model exponential moving average parameters': (
        ('--model-ema', bool, False, 'track a moving average of the weights and evaluate it too'),
        ('--model-ema-force-cpu', bool, False, 'keep the average on the CPU'),
        ('--model-ema-decay', share, 0.9998, 'decay of the average'),
        ('--model-ema-warmup', bool, False, 'warm the decay up'),
    ),
    'Miscellaneous parameters': (
        ('--seed', natural, 42, 'random seed'),
        ('--worker-seeding', str, 'all', 'what is seeded in a worker'),
        ('--log-interval', count, 50, 'batches between lines of the log'),
        ('--val-interval', count, 1, 'epochs between evaluations'),
        ('--recovery-interval', natural, 0, 'batches between checkpoints within an epoch, none at 0'),
        ('--checkpoint-hist', count, None, 'checkpoints to keep (default: the best and the last)'),
        ('-j --workers', workers, 4, 'processes that load data, at most one a core'),
        ('--save-images', bool, False, 'save the images of a batch at each line of the log'),
        ('--pin-mem', bool, False, 'load into pinned memory'),
        ('--no-prefetcher', bool, False, 'do without the prefetching loader'),
        ('--output', path, '', 'folder of the experiments (default: output/train)', {'metavar': 'DIR'}),
        ('--experiment', str, '', 'name of the experiment, its folder in --output (default: date, time and model)'),
        ('--eval-metric', str, 'top1', 'metric that says which checkpoint is best',
         {'choices': ('top1', 'top5', 'loss', 'balanced_accuracy', 'macro_f1')}),
        ('--use-multi-epochs-loader', bool, False, 'keep the workers from epoch to epoch'),
        ('--log-wandb', bool, False, 'log to Weights & Biases, the same as adding it to --tracker'),
        ('--wandb-project', str, None, 'project there'),
        ('--wandb-tags', str, [], 'tags there', {'nargs': '+'}),
        ('--wandb-resume-id', str, '', 'run to go on with there'),
        ('--train-batches-per-epoch --train-steps-per-epoch', count, None, 'batches that make one epoch of them'),
    ),
    'Task parameters': (
        ('--task', str, 'classification', 'what is trained', {'choices': ('classification', 'multilabel')}),
    ),
}

# Accepted with a warning, because something else does their work here: dest -> what.
REPLACED = {
    'device': 'Accelerate chooses the device; use --cpu, CUDA_VISIBLE_DEVICES or accelerate launch --gpu_ids',
    'local_rank': 'torchrun and accelerate launch give each process its rank through the environment',
    'fuser': 'torch.compile replaced the TorchScript fusers; use --torchcompile',
    'torchscript': 'torch.compile replaced TorchScript for training; use --torchcompile',
    'synchronize_step': 'Accelerate decides when processes wait for each other; it does not change the result',
    'no_prefetcher': 'there is one loader, whose batches come on the device and normalised',
    'use_multi_epochs_loader': 'the one loader always keeps its workers from epoch to epoch',
    'worker_seeding': "each sample's augmentation is drawn from seed, epoch and index, whatever the worker",
    'drop_connect': 'it acts as --drop-path, the name that replaced it',
}

_DISTILLATION = 'distillation is not part of this script; train the student with the train.py of timm'
_MULTI_SIZE = 'training at several image sizes is not part of this script; choose one with --img-size'
_NAFLEX = 'the NaFlex loader is not part of this script; leave it out or use the train.py of timm'
_MULTI_LABEL = 'targets with several labels are not part of this script; use the train.py of timm'

# Flags of timm's script that this one does not have, by how their names begin: why, and what to do. An `args.yaml` of
# timm lists them all; a file is refused if one of `SWITCHES` is on there, without which the others do nothing.
REFUSED = {
    'tta': 'the loader makes no copies of an image that could be averaged; leave it out',
    **dict.fromkeys(('target-format', 'multilabel-'), _MULTI_LABEL),
    **dict.fromkeys(('kd-', 'distill-loss-weight', 'task-loss-weight'), _DISTILLATION),
    **dict.fromkeys((
        'train-img-sizes', 'train-batch-sizes', 'train-size-', 'variable-batch-loss-scale'), _MULTI_SIZE),
    'naflex-': _NAFLEX,
}
SWITCHES = ('tta', 'target_format', 'kd_model_name', 'train_img_sizes', 'naflex_loader')


def why_refused(name: str) -> Optional[str]:
    """Why there is no flag of this name, without its dashes, that timm's script has; None if timm has none either."""
    return next((reason for begin, reason in REFUSED.items() if name.replace('_', '-').startswith(begin)), None)


# Single values of flags that are otherwise fine.
REFUSED_VALUES = {
    ('task', 'multilabel'): _MULTI_LABEL,
    ('loss', 'twoway'): _MULTI_LABEL,
    ('loss', 'zlpr'): _MULTI_LABEL,
    ('loss', 'db'): _MULTI_LABEL,
}
