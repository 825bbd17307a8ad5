"""From measures to a Plan: which settings a data set wants (Table 7 of the non-binary paper), and the file to run.

Plested, Shen and Gedeon, "Rethinking binary hyperparameters for deep transfer learning for image classification". The
paper has four data sets and one network, Inception-v4. Its rules are here as they stand in the paper, and so are the
numbers that the thresholds come from; another network's features have other scales, so a threshold is approximate and
what it says is never more than likely.
"""
import argparse
import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Optional

import torch
import yaml
from timm.models import is_model_in_modules

from timm_amf.engine import build
from timm_amf.engine.config_file import args_content
from timm_amf.engine.options import build_parser
from timm_amf.errors import UserError
from timm_amf.models.parts import Part, part_cfg
from timm_amf.models.sources import check_source
from timm_amf.tuning import Plan, add_plan_args, plan_from_args
from timm_amf.tuning.roles import model_roles, role_blocks

__all__ = [
    'PAPER', 'PAPER_BLOCKS', 'RELIABILITY', 'RULES', 'Decision', 'PaperSet', 'Vote', 'body_settings',
    'config_text', 'decide', 'is_sgd', 'plan_flags', 'propose', 'read_target', 'sureness', 'with_defaults',
    'without_advised',
]

# Inception-v4 counts `features.0` to `features.21`; "new layers" 1, 2 and 3 are the classifier and 0, 1, 2 of these.
PAPER_BLOCKS = 22


@dataclass(frozen=True)
class PaperSet:
    """A data set of the paper.

    Attributes:
        suited: The pretrained weights are well suited (Table 7's left side; section 4.6).
        classes: Number of classes (section 3.1.2).
        random_init: Accuracy from random initialisation (Table 1).
        fixed: Accuracy of fixed features (Table 1).
        fisher: Normalised Fisher score (Table 1).
        low_layers: Number of low layers of the optimal settings together (Table 6), as are the rest.
        low_lr_scale: LR of the low layers, as a share of that of the others.
        l2sp: (alpha, beta, number of L2-SP layers), or None.
    """
    suited: bool
    classes: int
    random_init: float
    fixed: float
    fisher: float
    low_layers: int = 0
    low_lr_scale: float = 1.
    l2sp: Optional[tuple[float, float, int]] = None

    @property
    def measures(self) -> dict[str, float]:
        """By the names of `RELIABILITY`."""
        chance = 100 / self.classes
        return {
            'random_minus_fixed': self.random_init - self.fixed,
            'fixed_accuracy': 100 * (self.fixed - chance) / (100 - chance),
            'fisher': self.fisher,
        }


PAPER = {
    'Caltech-256-30': PaperSet(True, 256, 67.2, 83.4, 1.35, l2sp=(0.01, 0.01, PAPER_BLOCKS)),
    'DTD': PaperSet(True, 47, 66.8, 74.6, 3.47, l2sp=(0.001, 0.001, 14)),
    'Cars': PaperSet(False, 196, 92.7, 64.2, 1.18, 8, 0.01 / 0.025),
    'Aircraft': PaperSet(False, 100, 88.8, 59.9, 0.83, 8, 0.01 / 0.025),
}

# Measure -> how far it can be trusted, and why (section 4.6). EMD similarity has no vote: "a poor predictor".
RELIABILITY = {
    'random_minus_fixed': (1.0, "the paper's best measure; its threshold is 0"),
    'fixed_accuracy': (0.5, "one half of the best measure; parts the paper's four sets"),
    'fisher': (0.25, 'less pronounced; its scale depends on the network'),
}

# The rows of Table 7: (what it sets, for well-suited weights, for others, share of the paper's own results that agree
# with it: for each data set, the setting alone, whose gain must exceed the standard deviations (Tables 2 to 5), and in
# the best combination (Table 6)).
RULES = (
    ('learning rate', 'low', 'high', 1.),
    ('L2-SP', 'yes', 'no (L2)', 1.),
    ('more blocks re-initialised', 'yes', 'no', 0.75),
    ('low LR for low blocks', 'no', 'yes', 1.),
)


@dataclass(frozen=True)
class Vote:
    """What one measure says.

    Attributes:
        measure: `random_minus_fixed` (points), `fixed_accuracy` (percent, corrected for chance) or `fisher`.
        value: Its value.
        threshold: Where it changes sides, from the paper's numbers.
        score: Distance from there in units of half the distance between the paper's two sides, in [-1, 1]; above 0 for
            well-suited weights.
    """
    measure: str
    value: float
    threshold: float
    score: float


@dataclass(frozen=True)
class Decision:
    """Which side of Table 7 a data set is on.

    Attributes:
        suited: The weights are well suited.
        sure: How surely, in [0, 1].
        votes: Of each measure, the most reliable first.
        like: The data set of the paper on that side that the most reliable measure is nearest to.
    """
    suited: bool
    sure: float
    votes: tuple[Vote, ...]
    like: str


def _scaled(measure: str, value: float) -> float:
    return math.log(max(value, 1e-12)) if measure == 'fisher' else value


def _of_paper(measure: str, suited: bool) -> dict[str, float]:
    """What a measure is on one side, by data set."""
    return {name: _scaled(measure, s.measures[measure]) for name, s in PAPER.items() if s.suited == suited}


def _vote(measure: str, value: float) -> Vote:
    suited, unsuited = (list(_of_paper(measure, side).values()) for side in (True, False))
    half = (fmean(suited) - fmean(unsuited)) / 2  # below 0 where less speaks for well-suited weights
    # Of the difference, section 5 says so.
    middle = 0. if measure == 'random_minus_fixed' else (max(unsuited) + min(suited)) / 2
    score = max(-1., min(1., (_scaled(measure, value) - middle) / half))
    return Vote(measure, value, math.exp(middle) if measure == 'fisher' else middle, score)


def decide(measures: Mapping[str, float]) -> Decision:
    """The side of Table 7 that the measures speak for.

    The most reliable measure decides. The others make it surer or less sure: the sureness is the mean of all scores in
    its direction, weighted by reliability, times the reliability of the best.

    Args:
        measures: Values by name of `RELIABILITY`, one at least; others are ignored.
    """
    votes = tuple(_vote(name, measures[name]) for name in RELIABILITY if name in measures)
    best, suited = votes[0], votes[0].score > 0
    weights = [RELIABILITY[vote.measure][0] for vote in votes]
    mean = sum(w * vote.score for w, vote in zip(weights, votes)) / sum(weights)
    side, value = _of_paper(best.measure, suited), _scaled(best.measure, best.value)
    return Decision(
        suited, max(0., mean if suited else -mean) * weights[0], votes, min(side, key=lambda n: abs(side[n] - value)))


def sureness(value: float) -> str:
    """A number in [0, 1] in words; four data sets are not enough for more than `fairly sure`."""
    return next(word for limit, word in (
        (0.6, 'fairly sure'), (0.3, 'likely'), (0.1, 'weak'), (-1., 'a guess')) if value >= limit)


def body_settings(decision: Decision, blocks: int) -> dict[str, Any]:
    """Settings of a backbone or branch by Table 7, in the sizes of Tables 3 to 6; all but the LR, which is measured.

    Args:
        decision: Side of the table, and the paper's data set that is nearest.
        blocks: Number of blocks of the network.
    """
    like = PAPER[decision.like]
    if not decision.suited:
        low = round(like.low_layers / PAPER_BLOCKS * blocks)
        return dict(low_blocks=low, low_lr_scale=like.low_lr_scale, reinit_blocks=0, l2sp_alpha=0.)
    alpha, beta, layers = like.l2sp
    reinit = int(blocks > 1)
    kept = min(round(layers / PAPER_BLOCKS * blocks), blocks - reinit)
    settings = dict(low_blocks=0, reinit_blocks=reinit, l2sp_alpha=alpha, weight_decay=beta)
    # A model without blocks decays towards its start as a whole.
    return {**settings, 'l2sp_blocks': kept} if kept else settings


# -- The networks that are asked about.

def read_target(
        args: argparse.Namespace,
        num_classes: int,
) -> tuple[list[str], dict[str, int], list[argparse.Namespace]]:
    """What the options' model is made of, without its weights.

    Args:
        args: Options of `train_amf.py`.
        num_classes: Classes of the data.

    Returns:
        Its roles; the number of blocks of each that starts from pretrained weights (`backbone`, or `branch.0`, ...);
        and for each of these options that name its plain network.
    """
    bare = copy.copy(args)
    bare.pretrained, bare.initial_checkpoint = False, ''
    with torch.device('meta'):
        model = build.build_model(bare, num_classes)
    roles = list(model_roles(model))
    blocks = {r: len(role_blocks(model, r)) for r in roles if r == 'backbone' or r.startswith('branch.')}
    if 'backbone' in blocks:
        return roles, blocks, [args]
    if not is_model_in_modules(args.model.split('.')[0], ['amf']):
        raise UserError(
            f'--model {args.model}: advice is for plain models, AMF and MultiTune; ask about its backbone by name, and '
            f'give its settings to the roles {", ".join(roles)}')
    if args.pretrained_path or args.initial_checkpoint:
        raise UserError(
            f'--model {args.model}: advice is about the weights that the branches start from; name a file of these in '
            f'backbone_kwargs, not a checkpoint of the whole')
    return roles, blocks, [_of_part(args, part) for part in model.backbone_parts]


def _of_part(args: argparse.Namespace, part: Part) -> argparse.Namespace:
    """Options that name a branch's network as a model of its own; a composite normalises images for each itself."""
    of_roles = {name for name in plan_flags() if name.startswith('policy_')} | {'freeze', 'freeze_bn', 'role_settings'}
    plain = with_defaults(args, {'mean', 'std', 'gp', *of_roles})
    kwargs = {k: v for k, v in part.kwargs.items() if v is not None}
    plain.model, plain.pretrained_cfg_overlay = part.name, kwargs.pop('pretrained_cfg_overlay', {})
    plain.model_kwargs = kwargs
    return plain


# -- The Plan.

# Of the policy of an AMF that SGD trains: for long runs (the paper's, a thousand epochs and more) and for short ones.
_POLICY_LR, _POLICY_LR_SHORT = 3e-5, 0.003
_SHORT = 300  # epochs
_POLICY = 'resnet10t'
_LR_FLAGS = ('lr', 'lr_base', 'lr_base_size', 'lr_base_scale')
# Flags of one run, or of its evaluation, that the file must not repeat.
_NOT_WRITTEN = (
    'config', 'experiment', 'resume', 'eval_only', 'dry_run', 'overwrite', 'no_progress', 'routing_eps', 'plan')


def propose(
        args: argparse.Namespace,
        roles: Sequence[str],
        blocks: Mapping[str, int],
        advices: Sequence[Sequence[Any]],
        num_classes: int,
        policy: Optional[str] = None,
) -> tuple[str, Plan, str, list[str], dict[str, Any]]:
    """The Plan for the options' model; for components on different sides of Table 7, an AMF of a plain model.

    Args:
        args: Options of `train_amf.py`.
        roles: Of their model, from `read_target`, as are its `blocks`.
        blocks: Number of blocks of each role that starts from pretrained weights.
        advices: For each network of the model, the `ComponentAdvice` for each component.
        num_classes: Classes of the data.
        policy: Policy network of a proposed AMF; `none` for MultiTune, None for a small one.

    Returns:
        The model, the Plan, the text of the YAML file, what is left open (in sentences), and for each body of the model
        the advice that it follows.
    """
    args, notes = copy.deepcopy(args), []
    followed = [_spread(of_network, i, len(advices)) for i, of_network in enumerate(advices)]
    if 'backbone' in blocks and len({c.decision.suited for c in advices[0]}) == 2:
        notes += _become_composite(args, policy)
        roles, blocks, _ = read_target(args, num_classes)
        followed = [max((c for c in advices[0] if c.decision.suited == side), key=_sure) for side in (True, False)]
    followed = dict(zip(blocks, followed))
    plan, more = _build_plan(args, roles, followed)
    header = ['# By `timm-amf advise`, from Table 7 of Plested et al., "Rethinking binary hyperparameters".', *(
        f'# {role}: {c.name} under {c.network}; the weights are {"" if c.decision.suited else "not "}well suited, like '
        f'{c.decision.like}' for role, c in followed.items())]
    return args.model, plan, config_text(args, plan, header), notes + more, followed


def _sure(advice: Any) -> float:
    return advice.decision.sure


def _spread(advices: Sequence[Any], branch: int, branches: int) -> Any:
    """Whose advice a branch follows: its own component's where there are as many, else from one end to the other."""
    if len(advices) == branches:
        return advices[branch]
    if branches == 1:
        return max(advices, key=_sure)
    ordered = sorted(advices, key=lambda c: -_sure(c) if c.decision.suited else 1 + _sure(c))
    return ordered[round(branch * (len(ordered) - 1) / (branches - 1))]


def _become_composite(args: argparse.Namespace, policy: Optional[str]) -> list[str]:
    """Turn the options of a plain model into those of an AMF of two of it."""
    if args.initial_checkpoint:
        raise UserError(
            'the components want different settings, that is, an AMF, and its branches cannot start from '
            '--initial-checkpoint; give the weights with --pretrained-path')
    given = {'file': args.pretrained_path, 'mean': args.mean and list(args.mean), 'std': args.std and list(args.std)}
    overlay = {**args.pretrained_cfg_overlay, **{k: v for k, v in given.items() if v}}
    of_backbone = {**args.model_kwargs, **({'pretrained_cfg_overlay': overlay} if overlay else {})}
    kwargs = {'backbones': [args.model] * 2, **({'backbone_kwargs': of_backbone} if of_backbone else {})}
    name, notes = policy or _POLICY, []
    if name != 'none':
        try:
            check_source(name, part_cfg(Part(name)))
            kwargs['policy'] = name
        except UserError as e:
            if policy is not None:
                raise UserError(f'--policy {policy}: {e}') from e
            name = 'none'
            notes.append(
                f'The AMF is a MultiTune, without policy network, since the weights of {_POLICY} cannot be had; '
                f'--policy NAME names another.')
    notes.insert(0, 'The components want different settings, which one network cannot have: the proposal is '
                    f'{"a MultiTune" if name == "none" else "an AMF"} of two.')
    args.model = 'multitune' if name == 'none' else 'amf'
    args.model_kwargs, args.pretrained_path, args.pretrained_cfg_overlay = kwargs, '', {}
    args.explicit -= {'pretrained_path', 'pretrained_cfg_overlay'}
    args.explicit |= {'model', 'model_kwargs', 'pretrained'}
    return notes


def _build_plan(args: argparse.Namespace, roles: Sequence[str], followed: dict[str, Any]) -> tuple[Plan, list[str]]:
    notes = []
    lr = max(advice.lr for advice in followed.values())
    plan = plan_from_args(without_advised(args), roles, lr)
    for role, advice in followed.items():
        plan = plan.with_role(role, lr=advice.lr, **advice.settings)
    if 'head' in roles:
        decay = {plan.role(r).weight_decay for r in followed}
        plan = plan.with_role('head', lr=lr, **({'weight_decay': decay.pop()} if len(decay) == 1 else {}))
    if 'policy' in roles and is_sgd(plan.opt):
        short = plan.epochs < _SHORT
        plan = plan.with_role('policy', lr=_POLICY_LR_SHORT if short else _POLICY_LR)
        if short:
            notes.append(f'For {plan.epochs} epochs the policy has an LR of {_POLICY_LR_SHORT:g}; the AMF paper, '
                         f'{_POLICY_LR:g}, trains for a thousand and more.')
    return plan, notes


def is_sgd(opt: str) -> bool:
    """An optimiser of timm that takes the LRs of SGD."""
    return opt.lower().removeprefix('lookahead_') in ('sgd', 'momentum', 'nesterov', 'sgdw', 'nesterovw')


def plan_flags() -> set[str]:
    """Names of the options that only a Plan has, not timm."""
    parser = argparse.ArgumentParser(add_help=False)
    add_plan_args(parser)
    return {action.dest for action in parser._actions}


def with_defaults(args: argparse.Namespace, names: Iterable[str]) -> argparse.Namespace:
    """A copy of the options, some of them as if they were not given."""
    defaults = vars(build_parser().parse_args([]))
    changed = {name: defaults[name] for name in names}
    return copy.deepcopy(argparse.Namespace(**{**vars(args), **changed, 'explicit': args.explicit - set(changed)}))


def without_advised(args: argparse.Namespace) -> argparse.Namespace:
    """The options without what the advice is about; `--freeze`, `--role` and the rest stay."""
    return with_defaults(args, (
        *_LR_FLAGS, 'branch_lr', 'policy_lr', 'head_lr', 'backbone_lr', 'low_blocks', 'low_lr_scale', 'reinit_blocks',
        'l2sp_alpha', 'l2sp_blocks'))


def config_text(args: argparse.Namespace, plan: Plan, header: Sequence[str]) -> str:
    """The YAML of what the options say, the Plan, and nothing that another file would not need.

    Args:
        args: Options of `train_amf.py`.
        plan: The Plan, instead of what the options say of it.
        header: Lines of comment to begin with.
    """
    skip = {*_LR_FLAGS, *_NOT_WRITTEN, *plan_flags(), 'data'}
    chosen = {name: getattr(args, name) for name in {'model', *args.explicit} - skip}
    recipe = {**({'data': args.recipe['data']} if 'data' in args.recipe else {}), 'plan': plan.to_dict()}
    content = args_content(argparse.Namespace(**chosen, recipe=recipe, explicit=set(chosen)))
    content = yaml.safe_load(yaml.safe_dump(content))  # sorted at every level
    order = ('model', 'data_dir', 'pretrained', *sorted({*content} - {'data', 'plan'}), 'data', 'plan')
    content = {key: content[key] for key in dict.fromkeys(order) if key in content}
    return '\n'.join([*header, yaml.safe_dump(content, sort_keys=False)])
