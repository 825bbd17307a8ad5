"""The command line of `train_amf.py`: timm's train flags, ours beside them, and a YAML file that sets any of them.

    train_amf.py DIR --model amf_resnet18x2 --epochs 30 ...
    train_amf.py --config demo --output runs
    train_amf.py --config runs/demo/args.yaml --epochs 60     (what the command line says wins)

Every mistake raises `UserError` with one line, before anything slow is imported or built where that is possible.
"""
import argparse
import copy
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Optional

from timm_amf.engine.config_file import derived_flags, find_config, read_config, save_args
from timm_amf.engine.option_checks import check_names, check_values
from timm_amf.engine.timm_flags import REFUSED_VALUES, REPLACED, TIMM_FLAGS, why_refused
from timm_amf.errors import CommandParser, UserError
from timm_amf.flags import HelpFormatter, add_flags, amount, count, number, path, share, words_of

__all__ = ['build_parser', 'keyword_words', 'parse_args', 'resolve_trackers', 'save_args']

_logger = logging.getLogger(__name__)

# Trackers of Accelerate and the modules that each can use.
TRACKERS = {
    'tensorboard': ('tensorboard', 'tensorboardX'),
    **{name: (name,) for name in (
        'wandb', 'trackio', 'comet_ml', 'aim', 'mlflow', 'clearml', 'dvclive', 'swanlab')},
}

RUN_FLAGS = (
    ('--mixed-precision', str, None, "precision of the arithmetic; --amp sets it, else accelerate launch's",
     {'choices': ('no', 'fp16', 'bf16')}),
    ('--cpu', bool, False, 'train on the CPU even where there is a GPU'),
    ('--tracker', str, ['auto'], 'where to log to; auto: tensorboard if it is installed',
     {'nargs': '+', 'choices': ('auto', 'none', *TRACKERS)}),
    ('--no-progress', bool, False, 'no progress bar, also on a terminal'),
    ('--eval-only', bool, False, 'evaluate the model that the other flags name, and leave'),
    ('--head-start', str, None, 'classifier to start from: timm draws it, zero, or probe: a logistic regression on the '
     'features (default: zero for a new classifier on pretrained weights, else timm)',
     {'choices': ('timm', 'zero', 'probe')}),
    ('--backbone-weights', path, None, 'weights file of the backbone of a composite, or one for each branch; sets '
     '--pretrained', {'nargs': '+', 'metavar': 'FILE'}),
    ('--policy-weights', path, None, 'weights file of the policy network of a composite; sets --pretrained',
     {'metavar': 'FILE'}),
    ('--wise-ft', bool, False, 'at the end mix the weights of the start and the best ones, in the shares that validate '
     'best'),
    ('--class-weight', path, None, 'weight of each class in the loss: balanced, or a CSV file with columns class and '
     'weight', {'metavar': 'balanced|FILE'}),
    ('--class-sampling', str, None, 'balanced: draw each class equally often in an epoch', {'choices': ('balanced',)}),
    ('--early-stop', count, None, 'stop when the --eval-metric has not improved for this many epochs',
     {'metavar': 'EPOCHS'}),
    ('--budget', number(float, above=0), None,
     'minutes that it may take, about: they set --epochs where it is not given', {'metavar': 'MINUTES'}),
    ('--branch-loss', amount, None, "weight of an extra loss on each branch's own logits (AMF, MultiTune; default: 1, "
     "in recipes of the paper 0)"),
    ('--policy-balance', amount, 0., "weight of a penalty on branches that get more than their share of the policy's "
     'weight on average (AMF)'),
    ('--routing-eps', share, None, 'evaluate an AMF without the branches whose weight for an image is below this, and '
     'tell what that changes'),
    ('--eval-blocks', str, None, "evaluate a SpotTune with the same path for all images: tuned, frozen, or the tuned "
     "blocks' indices with commas between", {'metavar': 'BLOCKS'}),
    ('--eval-sampling-seed', int, None, 'evaluate a SpotTune with decisions drawn with this seed, as its paper '
     'does, instead of the likelier ones', {'metavar': 'SEED'}),
    ('--report', bool, False, 'draw a page of the run when it is complete, as timm-amf report does'),
    ('--publish', str, '', 'publish the run on the Hub when it is complete, as timm-amf publish does',
     {'metavar': 'OWNER/NAME'}),
    ('--publish-license', str, '', 'licence of the published weights, as the Hub names it', {'metavar': 'ID'}),
    ('--publish-private', bool, False, 'publish for yourself alone'),
    ('--publish-revision', str, None, 'branch to publish to; made if it is not there', {'metavar': 'BRANCH'}),
    ('--publish-message', str, None, 'message of the commit', {'metavar': 'TEXT'}),
    ('--dry-run', bool, False, "build everything, print the plan's parameter groups, and leave"),
    ('--overwrite', bool, False, 'write into an experiment folder that is not empty'),
)


# The flags that matter most, which --help tells first.
FIRST = (
    'data', 'config', 'model', 'pretrained', 'pretrained_path', 'img_size', 'epochs', 'batch_size', 'lr', 'output',
    'experiment', 'resume',
)


def build_parser() -> CommandParser:
    """The parser of `train_amf.py`. Its `parse_args` knows nothing of `--config`: use `parse_args` below."""
    from timm_amf.data.spec import add_data_args
    from timm_amf.tuning.plan_args import add_plan_args

    parser = CommandParser(
        prog='train_amf.py' if Path(*sys.argv[:1]).name == 'train_amf.py' else 'timm-amf train',
        usage='%(prog)s [DIR] [--config FILE] [flags]',
        description='Fine-tune any timm model, or an adaptive composite of several, on any image classification data.',
        epilog='[replaced]: accepted with a warning, something else does its work. docs/flags.md says which and why, '
               "and which of timm's flags there are not.",
        formatter_class=HelpFormatter,
    )
    parser._negative_number_matcher = re.compile(r'-\.?\d')  # argparse takes -1e-5 for a flag
    parser.add_argument(
        'data', nargs='?', type=path, default=None, metavar='DIR',
        help='folder of images: train and validation, and in each a folder for every class')
    parser.add_argument(
        '-c', '--config', default='', metavar='FILE',
        help='YAML file that sets any of the flags, or the name of a recipe such as demo')
    for title, rows in TIMM_FLAGS.items():
        add_flags(parser, title, rows)
    add_plan_args(parser)
    add_data_args(parser)
    add_flags(parser, 'Run parameters', RUN_FLAGS)
    first = parser.add_argument_group('What matters most')
    parser._action_groups.insert(0, parser._action_groups.pop())
    for action in sorted(parser._actions, key=lambda action: (*FIRST, action.dest).index(action.dest)):
        if action.dest in FIRST:
            next(g for g in parser._action_groups if action in g._group_actions)._group_actions.remove(action)
            first._group_actions.append(action)
        action.help = '[replaced] ' * (action.dest in REPLACED) + action.help
    return parser


def parse_args(
        argv: Optional[Sequence[str]] = None,
        data: Optional[Mapping[str, Any]] = None,
        others: Iterable[str] = (),
        plan: Optional[Mapping[str, Any]] = None,
) -> argparse.Namespace:
    """Read the options from `--config` and the command line, which wins, and check them.

    Args:
        argv: Arguments, those of the process if None.
        data: Section `data` of a recipe, instead of that of the file.
        others: Flags of a command that it read before, to tell who mistyped one.
        plan: Section `plan`, likewise.

    Returns:
        A namespace with every flag by name, those of a Plan None unless they were given, and besides: `recipe`, the
        sections (`plan`, `data`, `expected`, `card`) of the YAML file, and `explicit`, the names of the flags that are
        not at the parser's defaults, which is what a written recipe needs. A folder of data is in `data_dir`, whichever
        way it was given.
    """
    before = CommandParser(add_help=False, allow_abbrev=False)
    before.add_argument('-c', '--config', default='')
    config, rest = before.parse_known_args(argv)
    parser = build_parser()
    defaults = copy.deepcopy({action.dest: action.default for action in parser._actions})
    values, recipe = read_config(find_config(config.config), parser) if config.config else ({}, {})
    components = values.pop('component', None)  # argparse would append to them
    parser.set_defaults(**values)
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        _reject(unknown, parser, others)
    args.component = args.component or components
    args = copy.deepcopy(args)  # lists and mappings of the defaults are not shared
    args.config = config.config
    given = {'data': data, 'plan': plan}
    args.recipe = {**recipe, **{name: dict(section) for name, section in given.items() if section is not None}}
    from_file = {**defaults, **values}
    _settle(args, {name for name in from_file if getattr(args, name, None) != from_file[name]}, defaults)
    args.explicit = {name for name in defaults if getattr(args, name, None) != defaults[name]} - {'help', 'config'}
    args.explicit -= set(derived_flags(args))
    args.model, args.batch_size = args.model or 'resnet50', args.batch_size or 128
    _check_applicable(args, defaults)
    check_values(args)
    resolve_trackers(args)
    check_names(args)
    return args


def keyword_words(options: Mapping[str, Any]) -> tuple[list[str], Optional[Mapping[str, Any]]]:
    """The command line that Python keywords stand for, and the data where they are a mapping; for `parse_args`.

    Args:
        options: Flags by name (None leaves one out), `config` among them, over which the others win; and `data`, a
            mapping of the form of a recipe's section.
    """
    data = options['data'] if isinstance(options.get('data'), Mapping) else None
    return words_of(build_parser(), {**options, 'data': None} if data else options), data


def _reject(unknown: Sequence[str], parser: CommandParser, others: Iterable[str]) -> NoReturn:
    """`CommandParser.reject`, after what is known of flags of timm."""
    flag = next((word.partition('=')[0] for word in unknown if word.startswith('-')), '')
    if why_refused(flag[2:]):
        raise UserError(f'{flag}: {why_refused(flag[2:])}')
    parser.reject(unknown, others)


def _settle(args: argparse.Namespace, given: Container[str], defaults: Mapping) -> None:
    """Bring together the flags that say the same thing in two ways; `given` are those of the command line."""
    for pair in (('data', 'data_dir'), ('amp', 'mixed_precision'), ('bce_loss', 'loss')):
        for one, other in (pair, pair[::-1]):
            if one in given and other not in given:  # the command line wins over the file here, too
                setattr(args, other, defaults[other])
    if args.data and args.data_dir and args.data != args.data_dir:
        raise UserError(f'two folders of data, {args.data} and --data-dir {args.data_dir}: give one')
    if args.data:
        args.data_dir = args.data
    args.data = None
    if args.pretrained_path:
        args.pretrained = True
    _settle_part_weights(args)
    args.finds_plan, args.plan = args.plan == 'auto', '' if args.plan == 'auto' else args.plan
    if args.plan:
        args.recipe.pop('plan', None)  # the file that the flag names takes its place
    if 'dataset' in given:
        args.recipe.pop('data', None)  # likewise
    if args.device == 'cpu':
        args.cpu = True
    if args.amp:
        precision = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype]
        if args.mixed_precision not in (None, precision):
            raise UserError(
                f'--amp with --amp-dtype {args.amp_dtype} and --mixed-precision {args.mixed_precision}: give one')
        args.mixed_precision = precision
    if args.drop_connect is not None and args.drop_path is None:
        args.drop_path = args.drop_connect
    if args.bce_loss:
        if args.loss not in (None, 'bce'):
            raise UserError(f'--bce-loss and --loss {args.loss}: give one')
        args.loss = 'bce'


def _settle_part_weights(args: argparse.Namespace) -> None:
    """Bring the weights files of a composite's parts where `timm.create_model` takes them, the model's keywords."""
    def with_file(kwargs: Optional[Mapping[str, Any]], file: str) -> dict[str, Any]:
        overlay = (kwargs or {}).get('pretrained_cfg_overlay') or {}
        return {**(kwargs or {}), 'pretrained_cfg_overlay': {**overlay, 'file': file}}

    kwargs, files = args.model_kwargs, args.backbone_weights
    if args.policy_weights:
        kwargs['policy_kwargs'] = with_file(kwargs.get('policy_kwargs'), args.policy_weights)
    if files:
        given = kwargs.get('backbone_kwargs')
        many = isinstance(given, (list, tuple))
        given = given if many else [given] * len(files)
        files = files if len(files) > 1 else files * len(given)
        if len(given) != len(files):
            raise UserError(f'--backbone-weights: {len(files)} files for {len(given)} branches; give one for each')
        found = [with_file(one, file) for one, file in zip(given, files)]
        kwargs['backbone_kwargs'] = found if many or len(found) > 1 else found[0]
    args.pretrained = bool(args.pretrained or args.policy_weights or files)
    args.policy_weights = args.backbone_weights = None


def _check_applicable(args: argparse.Namespace, defaults: Mapping) -> None:
    """Refuse values whose work nobody does here, and warn of flags whose work something else does."""
    for (dest, value), reason in REFUSED_VALUES.items():
        if getattr(args, dest) == value:
            raise UserError(f'--{dest} {value}: {reason}')
    first_process = os.environ.get('RANK', '0') == '0'
    for dest, reason in REPLACED.items():
        acts_as_cpu = dest == 'device' and args.device == 'cpu'
        if getattr(args, dest) != defaults[dest] and not acts_as_cpu and first_process:
            flag = '--local_rank' if dest == 'local_rank' else '--' + dest.replace('_', '-')
            _logger.warning(f'{flag} has no effect of its own: {reason}')


def resolve_trackers(args: argparse.Namespace) -> list[str]:
    """The names of Accelerate's trackers to log to."""
    names = [name for name in args.tracker if name != 'none']
    if 'auto' in names:
        names.remove('auto')
        names += ['tensorboard'] if _installed('tensorboard') else []
    names += ['wandb'] if args.log_wandb else []
    names = list(dict.fromkeys(names))
    for name in names:
        if not _installed(name):
            raise UserError(f'tracker {name}: not installed; pip install {TRACKERS[name][0].replace("_", "-")}')
    return names


def _installed(tracker: str) -> bool:
    return any(importlib.util.find_spec(module) for module in TRACKERS[tracker])
