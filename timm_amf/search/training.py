"""Training the candidates of a search by the engine's `Trainer`: a chunk of them at a time, as one `LockstepModel`."""
import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, Optional

import torch
from accelerate import Accelerator
from timm.utils import dispatch_clip_grad
from torch import nn

from timm_amf.engine import build
from timm_amf.engine.evaluate import Tally, reduce_tensors
from timm_amf.engine.loop import Trainer
from timm_amf.engine.memory import saved_bytes
from timm_amf.engine.run import find_resume, prepare_folder
from timm_amf.engine.task import AdaptiveTask, create_criterion
from timm_amf.errors import UserError
from timm_amf.files import write_text
from timm_amf.models.blocks import Units, classifiers, probe_units
from timm_amf.models.method import RunSettings
from timm_amf.search.candidates import Candidate, Traced, candidate_plan
from timm_amf.search.lockstep import (
    HEAD,
    Lockstep,
    LockstepModel,
    LockstepUnfit,
    Member,
    create_member,
)
from timm_amf.search.results import CandidateResult
from timm_amf.text import CsvLog
from timm_amf.tuning import GroupScheduler, Plan
from timm_amf.tuning.optim import optimizer_of
from timm_amf.tuning.resolve import param_groups, resolve
from timm_amf.tuning.roles import role_defaults

__all__ = ['CandidateRuns', 'CandidateTrainer', 'Stage']

_logger = logging.getLogger(__name__)


class _Schedulers:
    """The schedulers of several candidates as one: `plateau` follows the metric of each.

    Attributes:
        latest: The metric of each candidate at the last evaluation.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Iterable[int], plan: Plan, updates: int, mode: str):
        self.optimizer = optimizer
        self.shares = [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(groups, initial=0))]
        self.each = [
            GroupScheduler(SimpleNamespace(param_groups=optimizer.param_groups[share]), plan, updates, mode)
            for share in self.shares]
        self.latest: list[float] = []

    def step(self, epoch: int, metric: Optional[float] = None) -> None:
        for scheduler, own in zip(self.each, itertools.repeat(None) if metric is None else self.latest):
            scheduler.step(epoch, own)

    def step_update(self, num_updates: int) -> None:
        for scheduler in self.each:
            scheduler.step_update(num_updates)

    def state_dict(self) -> dict[str, Any]:
        return {'schedulers': [scheduler.state_dict() for scheduler in self.each]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for scheduler, share, values in zip(self.each, self.shares, state['schedulers']):
            scheduler.optimizer.param_groups = self.optimizer.param_groups[share]  # those that were loaded
            scheduler.load_state_dict(values)


class CandidateTrainer(Trainer):
    """The trainer of a `LockstepModel`: what it does for a model as a whole, it does for each candidate."""
    stops_at_nan = False  # one that diverges does not stop the others: it ranks last

    def _clip(self) -> None:
        args = self.args
        if args.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            for member in self.task.model.members:
                params = [p for n, p in member.params.items() if not ('agc' in args.clip_mode and n.startswith(HEAD))]
                dispatch_clip_grad(params, value=args.clip_grad, mode=args.clip_mode)

    @torch.no_grad()
    def evaluate_now(self) -> dict[str, Any]:
        model = self.task.model.eval()
        classes = self.val_loader.dataset.num_classes
        tallies = [Tally(self.components, classes, self.accelerator.device) for _ in model.members]
        for batch in self.val_loader:
            with self.accelerator.autocast():
                outputs = model(batch.input)
            for tally, logits in zip(tallies, outputs):
                tally.update(logits, batch.target, batch.component)
        reduce_tensors(self.accelerator, *tallies)
        found = [tally.metrics() for tally in tallies]
        self.scheduler.latest = [metrics[self.args.eval_metric] for metrics in found]
        columns = {
            f'{key}_{member.name}': metrics[key]
            for member, metrics in zip(model.members, found) for key in ('top1', 'loss')}
        means = {key: fmean(metrics[key] for metrics in found) for key in found[0]}
        return dict(means, policy=columns, headline='')


@dataclass
class Stage:
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


class CandidateRuns:
    """Trains candidates of one network, in chunks.

    Args:
        traced: The network with its starting weights and a new classifier, on its device. No candidate changes it.
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
            traced: Traced,
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
        self.model = model = traced.model.requires_grad_(False).eval()
        self.input_size, self.trainable = traced.input_size, traced.trainable
        self.role, self.args, self.accelerator = role, args, accelerator
        heads = classifiers(model)
        if len(heads) != 1:
            raise UserError(f'{type(model).__name__} has {len(heads)} classifiers; search a model with one')
        self.own_head, self.head = head is None, heads[0] if head is None else head
        self.folder, self.chunk, self.memory, self.progress = folder, chunk, memory, progress
        self.alone = alone
        self.probe: Optional[Units] = None
        if not alone:
            try:
                self.probe = probe_units(model, self.input_size)
            except Exception as e:  # whatever an architecture without the usual two halves raises
                self.alone = f'{type(model).__name__} does not show its blocks ({str(e).splitlines()[0]})'

    def run(self, candidates: Sequence[Candidate], stage: Stage) -> list[CandidateResult]:
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
        names = [n for g in groups if g['role'] != 'head' for n in g['param_names'] if n in self.trainable]
        if self.probe is not None and '' not in candidate.modules:
            try:
                return create_member(self.model, candidate, self.head, names, self.probe)
            except LockstepUnfit as e:
                _logger.info('%s trains on its own: %s', candidate.name, e)
        return create_member(self.model, candidate, self.head, names)

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
        two, three = (saved_bytes(functools.partial(net, images[:count])) for count in (2, 3))
        member.train(False)
        with torch.no_grad():
            for tensor, value in zip(member.tensors().values(), kept):
                tensor.copy_(value)  # the statistics of norms moved
        return (three - two) * self.args.batch_size

    def _groups(self, member: Member, plan: Plan) -> list[dict[str, Any]]:
        """The groups of the Plan, over the member's own parameters."""
        groups = param_groups(self.model, candidate_plan(plan, member.candidate, self.role))
        of_head = next(g for g in groups if g['role'] == 'head')
        decay = plan.role('head', role_defaults(self.model)).weight_decay
        head = {True: [], False: []}  # names by whether they decay
        for name, param in member.params.items():
            if name.startswith(HEAD):
                head[param.ndim > 1 or not plan.weight_decay_exclude_1d].append(name)
        wanted = [(g, g['param_names']) for g in groups]  # of the network's own classifier the member has none
        wanted += [({**of_head, 'weight_decay': decay if decays else 0.}, names) for decays, names in head.items()]
        result = []
        for group, names in wanted:
            names = [n for n in names if n in member.params]
            if names:  # unique in the optimiser of all
                result.append({
                    **group, 'params': [member.params[n] for n in names],
                    'param_names': [f'{member.name}/{n}' for n in names]})
        return result

    # -- a run --------------------------------------------------------------------------------------------------------

    def _train(self, members: list[Member], stage: Stage, folder: Path) -> dict[Candidate, CandidateResult]:
        done = folder / 'results.json'
        if done.exists():
            found = [CandidateResult.from_dict(v) for v in json.loads(done.read_text(encoding='utf-8'))]
            return {r.candidate: r for r in found}
        trainer = self._trainer(members, stage, folder)
        resume = find_resume(argparse.Namespace(resume='auto', experiment=folder.name), folder)
        if self.accelerator.is_main_process:
            prepare_folder(folder, resume)
        self.accelerator.wait_for_everyone()
        # The trainer's lines on its epochs are not what the search is to print.
        with contextlib.redirect_stdout(sys.stderr if self.progress else None), trainer.signals:
            if resume is not None:
                trainer.resume(resume)
            while trainer.epoch < trainer.epochs:
                trainer.finish_epoch(trainer.train_epoch(), trainer.evaluate())
        images, epochs = len(stage.val_loader.dataset), trainer.epochs
        rows, results = CsvLog(folder / 'policy.csv', epochs).rows, {}
        for member in members:
            curve = [(int(row['epoch']) + 1, *(float(row[f'{name}_{member.name}']) for name in ('top1', 'loss')))
                     for row in rows]
            parameters = sum(p.numel() for p in member.params.values())
            results[member.candidate] = CandidateResult(
                member.candidate, *curve[-1][1:], images, parameters, epochs, tuple(curve))
        if self.accelerator.is_main_process:
            write_text(done, json.dumps([r.to_dict() for r in results.values()]))
            trainer.checkpoints.discard_last()
        self.accelerator.free_memory()
        return results

    def _trainer(self, members: list[Member], stage: Stage, folder: Path) -> CandidateTrainer:
        args, plan = self.args, stage.plan
        shared = not members[0].alone
        model = LockstepModel(members, self._network(members) if shared else None, self.own_head)
        groups = [self._groups(member, plan) for member in members]
        optimizer = optimizer_of(list(itertools.chain(*groups)), plan)
        mixup = build.build_mixup(args, self.model.num_classes)
        # Its parameters are known to the trainer as one role, which trains from the start.
        common = dataclasses.replace(plan, roles={})
        task = AdaptiveTask(
            model, RunSettings(common), device=self.accelerator.device,
            criterion=create_criterion(args, mixup is not None, stage.train_loader.dataset))
        own_args = argparse.Namespace(**{
            **vars(args), 'model_ema': False, 'start_epoch': None, 'stop_epoch': None, 'early_stop': None,
            'save_epochs': (), 'no_progress': not self.progress or args.no_progress, 'checkpoint_hist': None})
        trainer = CandidateTrainer(
            own_args, self.accelerator, task, resolve(model, common), optimizer, stage.train_loader, stage.val_loader,
            folder, mixup)
        trainer.scheduler = _Schedulers(
            optimizer, map(len, groups), plan, trainer.updates_per_epoch, 'min' if trainer.decreasing else 'max')
        return trainer
