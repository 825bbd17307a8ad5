"""`timm-amf search`: find the layers, blocks or windows that are worth tuning (the block-wise paper).

    timm-amf search DIR --model resnet50
    timm-amf search DIR --model resnet50 --ways layer block window top3 top5
    train_amf.py --config RUN/best.yaml

It takes the flags of train_amf.py, so the search is for the run that these name. Its candidates are trained by the
engine's `Trainer`: a chunk of them at a time, as one `LockstepModel`, in a run folder of its own.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Optional, Union

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import resolve_data_config
from timm.utils import dispatch_clip_grad
from torch import nn

from timm_amf.data import Mixture
from timm_amf.engine import build
from timm_amf.engine.checkpoint import write_text
from timm_amf.engine.evaluate import Tally, reduce_tensors
from timm_amf.engine.loop import Trainer
from timm_amf.engine.memory import saved_bytes
from timm_amf.engine.options import parse_args, resolve_lr, save_args
from timm_amf.engine.run import find_resume, prepare_folder
from timm_amf.engine.task import AdaptiveTask, criterion_kwargs
from timm_amf.errors import CommandParser, UserError
from timm_amf.files import replacing
from timm_amf.models.block_probe import in_eval
from timm_amf.models.blocks import classifiers
from timm_amf.models.method import RunSettings
from timm_amf.search.candidates import (
    CUTS,
    Candidate,
    baseline_candidates,
    block_candidates,
    candidate_plan,
    layer_candidates,
    top_candidate,
    weighted_layers,
    window_candidates,
)
from timm_amf.search.keywords import parse_keywords, words_of
from timm_amf.search.lockstep import (
    HEAD,
    Lockstep,
    LockstepModel,
    LockstepUnfit,
    Member,
    Probe,
    lockstep_member,
    plain_member,
    probe_units,
)
from timm_amf.search.proposal import config_text
from timm_amf.search.results import BASELINES, CandidateResult, SearchResults, ranking, summary, write_csv
from timm_amf.tuning import GroupScheduler, Plan, Schedule, model_roles, plan_from_args
from timm_amf.tuning.groups import optimizer_of, param_groups
from timm_amf.tuning.roles import role_blocks, role_defaults

__all__ = ['BlockSearch', 'Search', 'main', 'search_blocks']

_logger = logging.getLogger(__name__)

_WAYS = ('layer', 'block', 'window')
# Of train_amf.py: what a search cannot train with, and what candidates do without.
_REFUSED = (
    'jsd_loss', 'aug_splits', 'split_bn', 'kd_model_name', 'global_k', 'torchcompile', 'dry_run', 'eval_only')
_LEFT_OUT = ('model_ema', 'branch_loss', 'policy_balance')


# -- Flags.

def _build_parser() -> argparse.ArgumentParser:
    """The flags that train_amf.py has not."""
    parser = CommandParser(
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
        help='train the best of each way and both baselines again, for --epochs, on this share (default: do not)')
    add('--search-head', choices=('own', 'mlp'), default='own',
        help="the model's own classifier, or the paper's of three layers (default: own)")
    add('--chunk', type=int, metavar='N', help='most candidates that train at once')
    add('--memory', type=float, metavar='GB', help='most memory for their activations (default: half of what is free)')
    add('--one-by-one', action='store_true', help='train each candidate in a network of its own')
    return parser


def _checked(own: argparse.Namespace, args: argparse.Namespace) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Both sets of flags, with what follows from them; refuses what a search cannot have."""
    for way in own.ways:
        if way not in _WAYS and not (way.startswith('top') and way[3:].isdigit() and int(way[3:]) > 0):
            raise UserError(f'--ways {way}: unknown; choose from {", ".join(_WAYS)} and topK, such as top3')
    if own.cut not in CUTS:
        raise UserError(f'--cut {own.cut}: unknown; choose one of {", ".join(CUTS)}')
    for name in ('search_share', 'final_share'):
        value = getattr(own, name)
        if not (0 < value <= 1 or (value == 0 and name == 'final_share')):
            raise UserError(f'--{name.replace("_", "-")} {value:g}: must be above 0 and at most 1')
    for name in ('search_epochs', 'chunk', 'memory'):
        value = getattr(own, name)
        if value is not None and value <= 0:
            raise UserError(f'--{name.replace("_", "-")} {value:g}: must be above 0')
    if 'model' not in args.explicit:
        raise UserError('no model: name one with --model, or a recipe with --config')
    for name in _REFUSED:
        if getattr(args, name):
            raise UserError(f'--{name.replace("_", "-")}: a search cannot train with it; leave it out of the search')
    if args.resume not in ('', 'auto'):
        raise UserError(f'--resume {args.resume}: give auto, and the --output and --experiment of the search')
    if args.resume and not args.experiment:
        raise UserError('--resume auto: name the search that goes on with --experiment')
    if not args.initial_checkpoint and not args.pretrained:
        args.pretrained = True
        args.explicit.add('pretrained')
    own.search_epochs = own.search_epochs or min(10, args.epochs)
    return own, args


# -- Training candidates by the engine's trainer.

class _GroupsOf:
    """A candidate's share of an optimiser's groups, for its own scheduler."""

    def __init__(self, optimizer: torch.optim.Optimizer, start: int, stop: int):
        self.optimizer, self.range = optimizer, slice(start, stop)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups[self.range]  # the dicts are others after `load_state_dict`


class _Schedulers:
    """The schedulers of several candidates as one: `plateau` follows the metric of each.

    Attributes:
        latest: (top1, loss) of each candidate at the last evaluation.
        curves: (epochs trained, top1, loss) of each evaluation, by candidate.
    """

    def __init__(self, schedulers: Sequence[GroupScheduler], decreasing: bool):
        self.schedulers, self.decreasing = list(schedulers), decreasing
        self.latest: list[tuple[float, float]] = []
        self.curves: list[list[tuple[int, float, float]]] = [[] for _ in schedulers]

    def step(self, epoch: int, metric: Optional[float] = None) -> None:
        for i, scheduler in enumerate(self.schedulers):
            if metric is None:
                scheduler.step(epoch)
            else:
                top1, loss = self.latest[i]
                self.curves[i].append((epoch, top1, loss))
                scheduler.step(epoch, loss if self.decreasing else top1)

    def step_update(self, num_updates: int) -> None:
        for scheduler in self.schedulers:
            scheduler.step_update(num_updates)

    def state_dict(self) -> dict[str, Any]:
        return dict(schedulers=[s.state_dict() for s in self.schedulers], curves=self.curves)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for scheduler, values in zip(self.schedulers, state['schedulers']):
            scheduler.load_state_dict(values)
        self.curves = [[tuple(point) for point in curve] for curve in state['curves']]


class _CandidateTrainer(Trainer):
    """The trainer of a `LockstepModel`: what it does for a model as a whole, it does for each candidate."""

    def _clip(self) -> None:
        args = self.args
        if args.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            for member in self.task.model.members:
                params = [p for n, p in member.params.items() if not ('agc' in args.clip_mode and n.startswith(HEAD))]
                dispatch_clip_grad(params, value=args.clip_grad, mode=args.clip_mode)

    def _check_finite(self, meter) -> None:
        """One that diverges does not stop the others: it ranks last."""

    @torch.no_grad()
    def evaluate_now(self) -> dict[str, Any]:
        model = self.task.model.eval()
        tallies = [Tally(self.components, self.accelerator.device) for _ in model.members]
        for batch in self.val_loader:
            with self.accelerator.autocast():
                outputs = model(batch.input)
            for tally, logits in zip(tallies, outputs):
                tally.update(logits, batch.target, batch.component)
        reduce_tensors(self.accelerator, *tallies)
        found = [tally.metrics() for tally in tallies]
        self.scheduler.latest = [(metrics['top1'], metrics['loss']) for metrics in found]
        columns = {
            f'{key}_{member.name}': metrics[key]
            for member, metrics in zip(model.members, found) for key in ('top1', 'loss')}
        means = {key: fmean(metrics[key] for metrics in found) for key in found[0]}
        return dict(means, policy=columns, headline='')


@dataclass
class _Stage:
    """Loaders, and how candidates train on them.

    Attributes:
        name: What its folders are named after.
        train_loader: Seeded loader of training batches.
        val_loader: Loader of evaluation batches.
        plan: How candidates are trained, as if each were the only one; of roles, `head` and the one searched train.
    """
    name: str
    train_loader: Any
    val_loader: Any
    plan: Plan


class _Candidates:
    """Trains candidates of one network, in chunks.

    Args:
        model: The network with its starting weights and a new classifier, on its device. No candidate changes it.
        input_size: (C, H, W) of the images.
        role: The role that they are in.
        args: Options of `train_amf.py`.
        accelerator: Accelerate's context.
        folder: Where runs are while they last.
        head: Classifier that each starts from, on the features before pooling; None for the network's own.
        alone: Why each gets a network of its own; empty to train in lockstep where the network allows it.
        chunk: Most candidates that train at once, or None.
        memory: Most bytes that their activations take at once, or None. One candidate is trained whatever it takes.
        progress: Show what the trainer prints.
    """

    def __init__(
            self,
            model: nn.Module,
            input_size: Sequence[int],
            role: str,
            args: argparse.Namespace,
            accelerator: Accelerator,
            folder: Path,
            head: Optional[nn.Module] = None,
            alone: str = '',
            chunk: Optional[int] = None,
            memory: Optional[float] = None,
            progress: bool = False,
    ):
        self.model = model.requires_grad_(False).eval()
        self.input_size, self.role, self.args, self.accelerator = tuple(input_size), role, args, accelerator
        heads = classifiers(model)
        if len(heads) != 1:
            raise UserError(f'{type(model).__name__} has {len(heads)} classifiers; search a model with one')
        self.own_head, self.head = head is None, heads[0] if head is None else head
        self.folder, self.chunk, self.memory, self.progress = folder, chunk, memory, progress
        self.alone = alone
        self.probe: Optional[Probe] = None
        if not alone:
            try:
                self.probe = probe_units(model, input_size)
            except Exception as e:  # whatever an architecture without the usual two halves raises
                self.alone = f'{type(model).__name__} does not show its blocks ({str(e).splitlines()[0]})'

    def run(self, candidates: Sequence[Candidate], stage: _Stage) -> list[CandidateResult]:
        """Train and evaluate candidates, or go on with that; a result for each, in their order."""
        results = {}
        for i, members in enumerate(self._chunks(self._members(candidates, stage.plan))):
            results.update(self._train(members, stage, self.folder / f'{stage.name}-{i}'))
        return [results[candidate] for candidate in candidates]

    # -- members ------------------------------------------------------------------------------------------------------

    def _members(self, candidates: Iterable[Candidate], plan: Plan) -> list[Member]:
        """The candidates with weights of their own, those of the network and the same classifier."""
        members = [self._member(c, plan) for c in candidates]
        shared = [m for m in members if not m.alone]
        if shared:
            try:
                self._network(shared).check(self.input_size)
            except LockstepUnfit as e:
                self.alone = f'lockstep does not apply to {type(self.model).__name__}: {e}'
                self.probe = None
                return self._members(candidates, plan)
        return members

    def _member(self, candidate: Candidate, plan: Plan) -> Member:
        groups = param_groups(self.model, candidate_plan(plan, candidate, self.role))
        names = [n for group in groups if group['role'] != 'head' for n in group['param_names']]
        if self.probe is not None and '' not in candidate.modules:
            try:
                return lockstep_member(self.model, self.probe, candidate, self.head, names)
            except LockstepUnfit as e:
                _logger.info('%s trains on its own: %s', candidate.name, e)
        return plain_member(self.model, candidate, self.head, names)

    def _network(self, members: Sequence[Member]) -> Lockstep:
        return Lockstep(self.model, self.probe, members, self.own_head)

    def _chunks(self, members: Sequence[Member]) -> list[list[Member]]:
        """What trains at once: each that has a network to itself, then the others from the classifier's end on."""
        result, used = [[m] for m in members if m.alone], math.inf
        order = {name: i for i, name in enumerate(self.probe.order)} if self.probe is not None else {}
        shared = [m for m in members if not m.alone]
        for member in sorted(shared, key=lambda m: -min((order[u] for u in m.copies), default=len(order))):
            need = self._activation_bytes(member) if self.memory else 0
            full = self.chunk is not None and result and len(result[-1]) >= self.chunk
            if used == math.inf or full or (self.memory and used + need > self.memory):
                result.append([])
                used = 0
            result[-1].append(member)
            used += need
        return result

    def _activation_bytes(self, member: Member) -> int:
        """What one batch of a member keeps for the backward pass."""
        net = self._network([member])
        kept = [t.clone() for t in member.tensors().values()]
        member.train()
        images = next(self.model.parameters()).new_zeros((3, *self.input_size))
        sizes = [saved_bytes(functools.partial(net, images[:count])) for count in (2, 3)]
        member.train(False)
        with torch.no_grad():
            for tensor, value in zip(member.tensors().values(), kept):
                tensor.copy_(value)  # the statistics of norms moved
        return (sizes[1] - sizes[0]) * self.args.batch_size

    def _groups(self, member: Member, plan: Plan) -> list[dict[str, Any]]:
        """The groups of the Plan, over the member's own parameters."""
        groups = param_groups(self.model, candidate_plan(plan, member.candidate, self.role))
        result = [
            {**g, 'params': [member.params[n] for n in g['param_names']]} for g in groups if g['role'] != 'head']
        of_head = next(g for g in groups if g['role'] == 'head')
        decay = plan.role('head', role_defaults(self.model)).weight_decay
        own = {n: p for n, p in member.params.items() if n.startswith(HEAD)}
        for decays in (True, False):
            chosen = {n: p for n, p in own.items() if decays == (p.ndim > 1 or not plan.weight_decay_exclude_1d)}
            if chosen:
                result.append({
                    **of_head, 'weight_decay': decay if decays else 0., 'params': list(chosen.values()),
                    'param_names': list(chosen)})
        # Unique in the optimiser of all.
        return [{**g, 'param_names': [f'{member.name}/{n}' for n in g['param_names']]} for g in result]

    # -- a run --------------------------------------------------------------------------------------------------------

    def _train(self, members: list[Member], stage: _Stage, folder: Path) -> dict[Candidate, CandidateResult]:
        done = folder / 'results.json'
        if done.exists():
            found = [CandidateResult.from_dict(v) for v in json.loads(done.read_text(encoding='utf-8'))]
            return {r.candidate: r for r in found}
        trainer = self._trainer(members, stage, folder)
        resume = find_resume(argparse.Namespace(resume='auto', experiment=folder.name), folder)
        if self.accelerator.is_main_process:
            prepare_folder(argparse.Namespace(overwrite=True), folder, resume)
        self.accelerator.wait_for_everyone()
        # The trainer's lines on its epochs are not what the search is to print.
        with contextlib.redirect_stdout(sys.stderr if self.progress else None), trainer.signals:
            if resume is not None:
                trainer.resume(resume)
            while trainer.epoch < trainer.epochs:
                trainer.finish_epoch(trainer.train_epoch(), trainer.evaluate())
        images, epochs = len(stage.val_loader.dataset), trainer.epochs
        results = {}
        for member, curve in zip(members, trainer.scheduler.curves):
            _, top1, loss = curve[-1]
            parameters = sum(p.numel() for p in member.params.values())
            results[member.candidate] = CandidateResult(
                member.candidate, top1, loss, images, parameters, epochs, tuple(curve))
        if self.accelerator.is_main_process:
            write_text(done, json.dumps([r.to_dict() for r in results.values()]))
            shutil.rmtree(folder / 'last', ignore_errors=True)
        self.accelerator.free_memory()
        return results

    def _trainer(self, members: list[Member], stage: _Stage, folder: Path) -> _CandidateTrainer:
        args, plan = self.args, stage.plan
        shared = not members[0].alone
        model = LockstepModel(members, self._network(members) if shared else None, self.own_head)
        groups = [self._groups(member, plan) for member in members]
        optimizer = optimizer_of([group for of_member in groups for group in of_member], plan)
        mixup = build.build_mixup(args, self.model.num_classes)
        # Its parameters are known to the trainer as one role, which trains from the start.
        common = dataclasses.replace(plan, roles={})
        task = AdaptiveTask(
            model, RunSettings(common), device=self.accelerator.device,
            criterion_kwargs=criterion_kwargs(args, soft_targets=mixup is not None))
        own_args = argparse.Namespace(**{
            **vars(args), 'model_ema': False, 'start_epoch': None, 'stop_epoch': None, 'save_epochs': (),
            'no_progress': not self.progress or args.no_progress, 'explicit': args.explicit - {'checkpoint_hist'}})
        trainer = _CandidateTrainer(
            own_args, self.accelerator, task, common, optimizer, stage.train_loader, stage.val_loader, folder, mixup)
        ends = np.cumsum([0, *map(len, groups)])
        mode = 'min' if trainer.decreasing else 'max'
        trainer.scheduler = _Schedulers([
            GroupScheduler(_GroupsOf(optimizer, start, stop), plan, trainer.updates_per_epoch, mode)
            for start, stop in zip(ends, ends[1:])], trainer.decreasing)
        return trainer


# -- The search.

@dataclass
class BlockSearch:
    """What `search_blocks` found.

    Attributes:
        results: All candidates, and how they fared.
        plan: The Plan that trains the best of them.
        config: The whole YAML file that `train_amf.py --config` runs.
        notes: What else there is to say, in sentences.
        folder: Where its files are.
    """
    results: SearchResults
    plan: Plan
    config: str
    notes: list[str] = field(default_factory=list)
    folder: Optional[Path] = None

    @property
    def best(self) -> CandidateResult:
        """The best candidate, a baseline if that is better than all."""
        return self.results.winner()

    def __str__(self) -> str:
        return '\n\n'.join([ranking(self.results, limit=5), summary(self.results), *self.notes])

    def to_yaml(self, path: Union[str, Path]) -> None:
        """Write the file for `train_amf.py --config`, whole or not at all."""
        with replacing(path, 'choose another folder') as temporary:
            temporary.write_text(self.config, encoding='utf-8')


class Search:
    """A search.

    Args:
        own: Its flags.
        args: Those of train_amf.py.
        progress: Show bars and the trainer's lines.

    Attributes:
        accelerator: Accelerate's context.
        folder: Where its files go.
    """

    def __init__(self, own: argparse.Namespace, args: argparse.Namespace, progress: bool):
        self.own, self.args = _checked(own, args)
        untracked = argparse.Namespace(**{**vars(args), 'tracker': ['none'], 'log_wandb': False})
        self.accelerator = build.build_accelerator(untracked)
        self.progress = progress and not args.no_progress and self.accelerator.is_local_main_process
        left_out = [f'--{n.replace("_", "-")}' for n in _LEFT_OUT if getattr(args, n)]
        self.notes = [f'Candidates were trained without {", ".join(left_out)}.'] if left_out else []
        self.started = time.monotonic()
        # Not args.output's default, where runs are.
        named = argparse.Namespace(**{**vars(args), 'output': args.output or 'output/search'})
        self.folder = build.run_folder(named, self.accelerator)

    def run(self) -> BlockSearch:
        own, args = self.own, self.args
        search, final, val = self._open_data()
        model, plan = self._build_model(search.num_classes)
        self.input_size = resolve_data_config(vars(args), model=model, verbose=False)['input_size']
        found, layers = self._candidates(model)
        candidates = self._trained_by(model, plan, search.num_classes)
        self._prepare_folder()
        if (self.folder / 'results.json').exists():  # nothing is left to do
            return self._finish(SearchResults.read(self.folder / 'results.json'), plan)
        self._keep_chunks(candidates)
        results = SearchResults(args.model, self.role, args.seed, search.num_classes, len(search))
        with self._stage(model, 'search', search, val, _shorter(plan, own.search_epochs)) as stage:
            results.results = candidates.run(found, stage)
            tops = self._top_candidates(layers, results)
            if tops:
                results.results += candidates.run(tops, dataclasses.replace(stage, name='top'))
        if final is not None:
            chosen = [results.winner(way).candidate for way in (*BASELINES, *results.ways)]
            results.final_images = len(final)
            with self._stage(model, 'final', final, val, plan) as stage:
                results.final = candidates.run(chosen, stage)
        results.seconds = time.monotonic() - self.started
        if candidates.alone:
            self.notes.append(f'Candidates were trained one after the other: {candidates.alone}.')
        return self._finish(results, plan)

    def _open_data(self) -> tuple[Mixture, Optional[Mixture], Mixture]:
        """Images for the search, for training its winners (or None), and for validation."""
        own, seed = self.own, self.args.seed
        train, val = build.build_data(self.args, self.accelerator)
        if own.final_share and own.search_share + own.final_share <= 1:
            return (*_stratified(train, [own.search_share, own.final_share], seed), val)
        search, final = (
            _stratified(train, [share], seed + i)[0] if 0 < share < 1 else train
            for i, share in enumerate((own.search_share, own.final_share)))
        return search, final if own.final_share else None, val

    def _build_model(self, num_classes: int) -> tuple[nn.Module, Plan]:
        args = self.args
        model = build.place_model(build.build_model(args, num_classes), args, self.accelerator)
        roles = model_roles(model)
        self.role = self.own.search_role or next((r for r in roles if r not in ('head', 'policy')), '')
        if self.role not in roles or not role_blocks(model, self.role):
            raise UserError(f'--search-role {self.role}: the model has no blocks there; it has {", ".join(roles)}')
        lr = resolve_lr(args, args.batch_size * self.accelerator.num_processes * args.grad_accum_steps)
        plan = plan_from_args(args, roles, lr)
        if plan.role('head').train == 'none':
            raise UserError('plan: the classifier must train in a search; leave the train of role head out')
        for name in (self.role, 'head'):
            if plan.role(name).start_epoch:
                raise UserError(f'plan: role {name} must train from the start in a search; leave its start_epoch out')
        build.set_start(model, plan, args, num_classes)
        for other in roles:
            if other not in (self.role, 'head'):
                plan = plan.with_role(other, train='none')
        return model, plan

    def _candidates(self, model: nn.Module) -> tuple[list[Candidate], list]:
        """Both baselines and the candidates of all ways but the tops, which wait for the layers'; and the layers."""
        own = self.own
        tops = [way for way in own.ways if way not in _WAYS]
        norms = 'separate' if own.separate_norms else 'joined'
        try:
            layers = weighted_layers(model, self.input_size, self.role, norms)
        except (AssertionError, RuntimeError, ValueError) as e:  # whatever an architecture makes of another size
            size, cause = 'x'.join(map(str, self.input_size)), (str(e) or repr(e)).splitlines()[0]
            raise UserError(
                f'--img-size: {self.args.model} takes no images of {size} ({cause}); give another, '
                f'or --model-kwargs img_size={self.input_size[-1]} if it is built for a size') from e
        found = baseline_candidates()
        if tops or 'layer' in own.ways:
            found += layer_candidates(layers)
        if 'block' in own.ways:
            found += block_candidates(model, self.input_size, self.role, own.cut)
        if 'window' in own.ways:
            found += window_candidates(layers, own.window)
        for way in tops:
            if int(way[3:]) > len(layers):
                raise UserError(f'--ways {way}: the model has {len(layers)} layers')
        return found, layers

    def _top_candidates(self, layers: list, results: SearchResults) -> list[Candidate]:
        accuracies = {r.candidate.name: r.top1 for r in results.of_way('layer')}
        ways = dict.fromkeys(way for way in self.own.ways if way not in _WAYS)
        return [top_candidate(layers, accuracies, int(way[3:])) for way in ways]

    def _trained_by(self, model: nn.Module, plan: Plan, num_classes: int) -> _Candidates:
        own, alone = self.own, ''
        if own.one_by_one:
            alone = 'as asked for'
        elif self.role != 'backbone':
            alone = 'they are in a branch of a composite'
        elif 'lamb' in plan.opt.lower():
            alone = f'{plan.opt} scales by the gradients of all parameters'
        return _Candidates(
            model, self.input_size, self.role, self.args, self.accelerator, self.folder / 'state',
            _mlp_head(model, self.input_size, num_classes, self.args.seed) if own.search_head == 'mlp' else None,
            alone, own.chunk, own.memory * 2**30 if own.memory else _free_memory(self.accelerator) / 2, self.progress)

    @contextlib.contextmanager
    def _stage(self, model: nn.Module, name: str, train: Mixture, val: Mixture, plan: Plan):
        # Copies, since loaders give them a cache, after which no share of them can be taken.
        loaders = build.build_loaders(self.args, model, copy.copy(train), copy.copy(val), self.accelerator)
        try:
            yield _Stage(name, *loaders, plan)
        finally:
            for loader in loaders:
                loader.close()

    def _keep_chunks(self, candidates: _Candidates) -> None:
        """Cut what goes on into the chunks of its first start: how much memory is free changes."""
        path = self.folder / 'state' / 'chunks.yaml'
        limits = [candidates.chunk, candidates.memory]
        if self.accelerator.is_main_process:
            if path.exists():
                limits = yaml.safe_load(path.read_text(encoding='utf-8'))
            else:
                path.write_text(yaml.safe_dump(limits), encoding='utf-8')
        # Of the main process: less may be free where another one runs.
        candidates.chunk, candidates.memory = broadcast_object_list(limits)
        own = self.own
        if own.chunk not in (None, candidates.chunk) or own.memory not in (None, candidates.memory / 2**30):
            raise UserError(
                f'{self.folder}: --chunk and --memory stay as they were; leave them out, or add --overwrite')

    # -- files --------------------------------------------------------------------------------------------------------

    def _identity(self) -> str:
        """What the results follow from, as text."""
        skip = ('overwrite', 'resume', 'no_progress', 'workers', 'explicit', 'config', 'output', 'experiment')
        values = {k: v for k, v in vars(self.args).items() if k not in skip}
        flags = {k: v for k, v in vars(self.own).items() if k not in ('chunk', 'memory', 'help')}
        return json.dumps({'search': flags, 'options': values}, indent=1, sort_keys=True, default=str)

    def _prepare_folder(self) -> None:
        """Make the folder, or find that it holds this search, which goes on."""
        args, path, identity = self.args, self.folder / 'search.yaml', self._identity()
        if self.accelerator.is_main_process:
            if path.exists() and not args.overwrite:
                if not args.resume:
                    raise UserError(
                        f'{self.folder}: holds a search already; go on with --resume auto, or add --overwrite')
                if path.read_text(encoding='utf-8') != identity:
                    raise UserError(
                        f'{self.folder}: holds a search with other settings; give the same ones, or add --overwrite')
            elif args.overwrite:
                shutil.rmtree(self.folder / 'state', ignore_errors=True)
                (self.folder / 'results.json').unlink(missing_ok=True)
            (self.folder / 'state').mkdir(parents=True, exist_ok=True)
            path.write_text(identity, encoding='utf-8')
            save_args(args, self.folder / 'args.yaml')
        self.accelerator.wait_for_everyone()

    def _finish(self, results: SearchResults, plan: Plan) -> BlockSearch:
        best = results.winner()
        chosen = candidate_plan(plan, best.candidate, self.role)
        header = [
            '# By `timm-amf search`: of all candidates the best on validation images.',
            f'# {best.candidate.way} {best.candidate.name}: {best.top1:.2f} % of {best.images}; classifier only '
            f'{results.winner("classifier").top1:.2f}, all layers {results.winner("all").top1:.2f}']
        found = BlockSearch(results, chosen, config_text(self.args, chosen, header), self.notes, self.folder)
        if self.accelerator.is_main_process:
            results.write(self.folder / 'results.json')
            write_csv(results, self.folder / 'candidates.csv')
            found.to_yaml(self.folder / 'best.yaml')
            from timm_amf.search.plots import plot_search

            try:
                plot_search(results, self.folder / 'search.png')
            except (ImportError, UserError) as e:  # the figure is an extra; the rest is there
                self.notes.append(f'No figure: {e}')
            shutil.rmtree(self.folder / 'state', ignore_errors=True)
        return found


def _stratified(dataset: Mixture, shares: Sequence[float], seed: int) -> list[Mixture]:
    """Disjoint parts of a data set, drawn class by class; what the shares leave is in none.

    A part of each class has its share of the images, rounded, and one at least.
    """
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for number in range(dataset.num_classes):
        members = np.flatnonzero(dataset.targets == number)
        if len(members) < len(shares):
            raise UserError(
                f'data: class {dataset.class_names[number]!r} has {len(members)} images, too few for {len(shares)} '
                f'parts; add images, or search without shares')
        drawn = np.random.RandomState((seed + 7919 * number) % 2**32).permutation(members)
        start = 0
        for i, end in enumerate(np.cumsum(shares)):
            left = len(shares) - i - 1
            stop = min(max(round(float(end) * len(members)), start + 1), len(members) - left)
            parts[i].append(drawn[start:stop])
            start = stop
    return [dataset.subset(np.sort(np.concatenate(part))) for part in parts]


def _mlp_head(model: nn.Module, input_size: Sequence[int], num_classes: int, seed: int) -> nn.Module:
    """The paper's classifier: flatten, 128 units, dropout of 0.5, 64 units with ReLU, and classes (section V).

    On the features before pooling. The paper gives no activation of the first layer, so it has none, as is the default
    of its library, whose initialisation is used too (Glorot's uniform one).
    """
    first = next(model.parameters())
    with in_eval(model), torch.no_grad():  # else norms would take this image for data
        width = model.forward_features(first.new_zeros((1, *input_size))).numel()
    with torch.random.fork_rng():
        build.seed_step(seed, 0, 0, 0)
        head = nn.Sequential(
            nn.Flatten(), nn.Linear(width, 128), nn.Dropout(0.5), nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, num_classes))
        for layer in head:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    return head.to(device=first.device, dtype=first.dtype)


def _shorter(plan: Plan, epochs: int) -> Plan:
    """A Plan for fewer epochs, its schedules compressed to fit."""
    factor = epochs / max(1, plan.epochs)
    if factor == 1:
        return plan

    def scaled(values: Mapping[str, Any]) -> dict[str, Any]:
        changed = {k: factor * values[k] for k in ('warmup_epochs', 'hold_epochs', 'decay_epochs') if values.get(k)}
        if values.get('decay_milestones'):
            changed['decay_milestones'] = [max(1, round(factor * m)) for m in values['decay_milestones']]
        return {**values, **changed}

    schedule = Schedule(**{**scaled(vars(plan.schedule)), 'cooldown_epochs': 0})
    roles = {name: role if role.schedule is None else dataclasses.replace(role, schedule=scaled(role.schedule))
             for name, role in plan.roles.items()}
    return dataclasses.replace(plan, epochs=epochs, schedule=schedule, roles=roles)


def _free_memory(accelerator: Accelerator) -> float:
    """Bytes."""
    if accelerator.device.type == 'cuda':
        return float(torch.cuda.mem_get_info(accelerator.device)[0])
    try:
        return float(os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    except (ValueError, OSError, AttributeError):  # not on every system
        return 4. * 2**30


def search_blocks(
        model: Optional[str] = None,
        data_dir: Union[str, Path, None] = None,
        config: Union[str, Path, None] = None,
        ways: Union[str, Sequence[str], None] = None,
        progress: bool = True,
        **options,
) -> BlockSearch:
    """Find the layers, blocks or windows of layers that are worth tuning (Algorithms 1 and 2 of the block-wise paper).

    Args:
        model: timm model, or a composite.
        data_dir: Folder of the data; other data are among the options, or a mapping `data` of the recipe's form.
        config: Recipe or YAML file that sets options; those given here win.
        ways: What to choose from: `layer`, `block`, `window`, and `topK` such as `top3`. `block` without it.
        progress: Show a bar.
        **options: Flags of `timm-amf search` and of `train_amf.py` by name.

    Returns:
        Results, Plan and the file for `train_amf.py`; `print` shows tables.
    """
    parser = _build_parser()
    known = {action.dest for action in parser._actions} - {'help'}
    own = {name: value for name, value in options.items() if name in known and value is not None}
    if ways is not None:
        own['ways'] = [ways] if isinstance(ways, str) else ways
    rest = {name: value for name, value in options.items() if name not in known}
    args = parse_keywords(config, dict(rest, model=model, data_dir=data_dir))
    with torch.random.fork_rng():
        return Search(parser.parse_args(words_of(parser, own)), args, progress).run()


def main(argv: Optional[Sequence[str]] = None) -> None:
    """`timm-amf search`: print the tables, write the files."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    own, rest = _build_parser().parse_known_args(argv)
    if own.help:
        _build_parser().print_help()
        return
    search = Search(own, parse_args(rest), progress=True)
    found = search.run()
    if search.accelerator.is_main_process:
        print(found)
        print(f'\nRun it: train_amf.py --config {found.folder / "best.yaml"}')
