"""From decisions to a Plan, and to the file that `train_amf.py --config` runs."""
import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from timm_amf.engine.options import build_parser, resolve_lr, save_args
from timm_amf.errors import UserError
from timm_amf.models.parts import Part, part_cfg
from timm_amf.models.sources import check_source
from timm_amf.search.networks import Target, read_target
from timm_amf.search.rules import PAPER, PAPER_BATCH, PAPER_BLOCKS, Decision
from timm_amf.tuning import Plan, add_plan_args, plan_from_args

__all__ = ['Proposal', 'body_settings', 'config_text', 'plan_flags', 'propose']

# Branches of an AMF: its classifier (AMF paper, section IV-B3), and its policy for long runs (the paper's, about a
# thousand epochs) and for short ones (docs/results.md).
_AMF_HEAD_LR = 0.008
_POLICY_LR, _POLICY_LR_SHORT = 3e-5, 0.003
_SHORT = 300  # epochs
# Table 6 has a separate LR for the classifier once, 0.01; the LR of well-suited weights would train a new one slowly.
_HEAD_LR = 0.01
_POLICY = 'resnet10t'
_LR_FLAGS = ('lr', 'lr_base', 'lr_base_size', 'lr_base_scale')
# Flags of one run, or of its evaluation, that the file must not repeat.
_NOT_WRITTEN = (
    'config', 'experiment', 'resume', 'eval_only', 'dry_run', 'overwrite', 'no_progress', 'routing_eps', 'plan')


@dataclass
class Proposal:
    """A Plan and what belongs to it.

    Attributes:
        model: Model that it is for.
        plan: The Plan.
        config: Text of the YAML file.
        followed: For each body of the model the advice of the component that it follows.
        notes: What is left open, in sentences.
    """
    model: str
    plan: Plan
    config: str
    followed: dict[str, Any]
    notes: list[str]


def body_settings(decision: Decision, blocks: int, lr_scale: float, high_lr: Optional[float] = None) -> dict[str, Any]:
    """Settings of a backbone or branch by Table 7, in the sizes of Tables 3 to 6.

    Args:
        decision: Side of the table, and the paper's data set that is nearest.
        blocks: Number of blocks of the network.
        lr_scale: Factor of the paper's LRs.
        high_lr: The high LR where the paper's have no meaning, that is, without SGD; the low one is a tenth of it.
    """
    like = PAPER[decision.like]
    if decision.suited:
        lr = like.lr * lr_scale if high_lr is None else high_lr / 10
        reinit = min(1, max(0, blocks - 1))
        alpha, beta, layers = like.l2sp
        kept = max(0, min(round(layers / PAPER_BLOCKS * blocks), blocks - reinit))
        settings = dict(lr=lr, low_blocks=0, reinit_blocks=reinit, l2sp_alpha=alpha, weight_decay=beta)
        # A model without blocks decays towards its start as a whole.
        return {**settings, 'l2sp_blocks': kept} if kept else settings
    low = round(like.low_layers / PAPER_BLOCKS * blocks)
    return dict(
        lr=like.lr * lr_scale if high_lr is None else high_lr, low_blocks=low, low_lr_scale=like.low_lr / like.lr,
        reinit_blocks=0, l2sp_alpha=0.)


def propose(
        args: argparse.Namespace,
        target: Target,
        advices: Sequence[Sequence[Any]],
        num_classes: int,
        policy: Optional[str] = None,
) -> Proposal:
    """The Plan for the options' model; for components on different sides of Table 7, an AMF of a plain model.

    Args:
        args: Options of `train_amf.py`.
        target: Its model.
        advices: For each body of the model, the advice for each component.
        num_classes: Classes of the data.
        policy: Policy network of a proposed AMF; `none` for MultiTune, None for a small one.

    Raises:
        UserError: If an option does not fit the proposed model.
    """
    notes = []
    args = copy.deepcopy(args)
    sides = {c.decision.suited for c in advices[0]}
    if not target.is_composite and len(sides) == 2:
        notes += _become_composite(args, policy)
        network = target.networks[0]
        target = read_target(args, num_classes)
        target.networks = [network] * len(target.bodies)
        order = [max((c for c in advices[0] if c.decision.suited == side), key=lambda c: c.decision.sure)
                 for side in (True, False)]
        followed = dict(zip(target.bodies, order))
    else:
        followed = {
            role: _spread(advices[i], i, len(target.bodies)) for i, role in enumerate(target.bodies)}
    plan, more = _build_plan(args, target, followed)
    header = [
        f'# {role}: {c.name} under {c.network}; the weights are {"" if c.decision.suited else "not "}well suited, like '
        f'{c.decision.like}' for role, c in followed.items()]
    header.insert(0, '# By `timm-amf advise`, from Table 7 of Plested et al., "Rethinking binary hyperparameters".')
    return Proposal(args.model, plan, config_text(args, plan, header), followed, notes + more)


def _spread(advices: Sequence[Any], branch: int, branches: int):
    """Whose advice a branch follows: its own component's where there are as many, else from one end to the other."""
    if len(advices) == branches:
        return advices[branch]
    ordered = sorted(advices, key=lambda c: -c.decision.sure if c.decision.suited else 1 + c.decision.sure)
    if branches == 1:
        return max(advices, key=lambda c: c.decision.sure)
    return ordered[round(branch * (len(ordered) - 1) / (branches - 1))]


def _become_composite(args: argparse.Namespace, policy: Optional[str]) -> list[str]:
    """Turn the options of a plain model into those of an AMF of two of it."""
    if args.initial_checkpoint:
        raise UserError(
            'the components want different settings, that is, an AMF, and its branches cannot start from '
            '--initial-checkpoint; give the weights with --pretrained-path')
    overlay = dict(args.pretrained_cfg_overlay)
    overlay.update({'file': args.pretrained_path} if args.pretrained_path else {})
    overlay.update({k: list(getattr(args, k)) for k in ('mean', 'std') if getattr(args, k) is not None})
    kwargs: dict[str, Any] = {'backbones': [args.model] * 2}
    backbone_kwargs = {**args.model_kwargs, **({'pretrained_cfg_overlay': overlay} if overlay else {})}
    if backbone_kwargs:
        kwargs['backbone_kwargs'] = backbone_kwargs
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
    args.explicit |= {'model', 'model_kwargs'}
    return notes


def _build_plan(args: argparse.Namespace, target: Target, followed: dict[str, Any]) -> tuple[Plan, list[str]]:
    notes = []
    batch = args.batch_size * args.grad_accum_steps
    flags_lr = resolve_lr(args, batch)
    base = _without_lrs(args)
    plan = plan_from_args(base, target.roles, flags_lr)
    sgd = plan.opt.lower().removeprefix('lookahead_') in ('sgd', 'momentum', 'nesterov', 'sgdw', 'nesterovw')
    scale, high = batch / PAPER_BATCH, None if sgd else flags_lr
    for role, advice in followed.items():
        plan = plan.with_role(role, **body_settings(advice.decision, target.blocks[role], scale, high))
    lrs = [plan.role(role).lr for role in target.bodies]
    if sgd:
        notes.append(
            f'LRs are those of the paper (SGD, taken to be at batch {PAPER_BATCH}) times {scale:g} for batch {batch}.')
    else:
        notes.append(
            f'The LRs of the paper are those of SGD. For {plan.opt} the high one is that of the flags, {flags_lr:g}, '
            f'and the low one a tenth of it.')
    if 'head' in target.roles:
        head = (_AMF_HEAD_LR if target.is_composite else max(_HEAD_LR, *(
            PAPER[c.decision.like].head_lr for c in followed.values()))) * scale if sgd else high
        decay = {plan.role(r).weight_decay for r in target.bodies}
        plan = plan.with_role('head', lr=head, **({'weight_decay': decay.pop()} if len(decay) == 1 else {}))
    short = plan.epochs < _SHORT
    if 'policy' in target.roles:
        plan = plan.with_role('policy', lr=_POLICY_LR_SHORT if short else _POLICY_LR)
    if target.is_composite and short and 'branch_loss' not in args.explicit:
        args.branch_loss = 1.
        args.explicit.add('branch_loss')
        policy = f'the policy has an LR of {_POLICY_LR_SHORT:g} and ' if 'policy' in target.roles else ''
        notes.append(
            f'For {plan.epochs} epochs {policy}each branch has a loss of its own (docs/results.md); the AMF paper '
            f'trains for about a thousand.')
    plan = plan.updated({'lr': max(lrs)})
    if not any(c.decision.suited for c in followed.values()):
        notes.append(f'L2 (weight decay {plan.weight_decay:g}) is that of the flags: the paper does not say its own.')
    return plan, notes


def plan_flags() -> set[str]:
    """Names of the options that only a Plan has, not timm."""
    parser = argparse.ArgumentParser()
    add_plan_args(parser)
    return {action.dest for action in parser._actions} - {'help'}


def _without_lrs(args: argparse.Namespace) -> argparse.Namespace:
    """The options without what the advice is about; `--freeze`, `--role` and the rest stay."""
    base = copy.deepcopy(args)
    defaults = vars(build_parser().parse_args([]))
    advised = [*_LR_FLAGS, 'branch_lr', 'policy_lr', 'head_lr', 'backbone_lr', 'low_blocks', 'low_lr_scale',
               'reinit_blocks', 'l2sp_alpha', 'l2sp_blocks']
    for name in advised:
        if name in defaults:
            setattr(base, name, copy.deepcopy(defaults[name]))
    base.explicit = set(args.explicit) - set(advised)
    return base


def config_text(args: argparse.Namespace, plan: Plan, header: Sequence[str]) -> str:
    """The YAML of what the options say, the Plan, and nothing that another file would not need.

    Args:
        args: Options of `train_amf.py`.
        plan: The Plan, instead of what the options say of it.
        header: Lines of comment to begin with.
    """
    skip = {*_LR_FLAGS, *_NOT_WRITTEN, *plan_flags(), 'data', 'weight_decay'}
    chosen = {name: getattr(args, name) for name in {'model', *args.explicit} - skip}
    recipe = {**({'data': args.recipe['data']} if 'data' in args.recipe else {}), 'plan': plan.to_dict()}
    options = argparse.Namespace(**chosen, recipe=recipe, explicit=set(chosen))
    with tempfile.TemporaryDirectory(prefix='timm_amf-') as folder:
        path = Path(folder) / 'args.yaml'
        save_args(options, path)
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    first, last = ('model', 'data_dir', 'pretrained'), ('data', 'plan')
    keys = [*(k for k in first if k in content), *(k for k in content if k not in (*first, *last))]
    content = {key: content[key] for key in [*keys, *(k for k in last if k in content)]}
    text = yaml.safe_dump(content, sort_keys=False)
    return '\n'.join([*header, text])
