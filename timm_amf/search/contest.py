"""Training the candidates of a search side by side: the same batches, each with weights, optimiser and schedule of its
own."""
import argparse
import functools
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from tqdm import tqdm

from timm_amf.engine.build import seed_step, seed_torch
from timm_amf.engine.evaluate import Tally, reduce_tensors
from timm_amf.engine.memory import saved_bytes
from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.models.blocks import classifiers
from timm_amf.search.candidates import Candidate, candidate_plan
from timm_amf.search.contestant import Contestant
from timm_amf.search.lockstep import Lockstep, plain_logits
from timm_amf.search.members import HEAD, LockstepUnfit, Member, lockstep_member, plain_member
from timm_amf.search.results import CandidateResult
from timm_amf.search.taps import TapCache
from timm_amf.search.units import Probe, probe_units
from timm_amf.tuning import GroupScheduler, Plan
from timm_amf.tuning.optim import optimizer_of, param_groups
from timm_amf.tuning.roles import role_defaults

__all__ = ['Contest', 'Stage']

_logger = logging.getLogger(__name__)


@dataclass
class Stage:
    """Loaders, and how long to train on them.

    Attributes:
        name: What its files are named after.
        train_loader: Seeded loader of training batches.
        val_loader: Loader of evaluation batches.
        epochs: Epochs.
        rungs: Epochs after which the worse candidates are left behind, none for successive halving not at all.
        keep: Share that goes on, above 0 and below 1.
    """
    name: str
    train_loader: Any
    val_loader: Any
    epochs: int
    rungs: Sequence[int] = ()
    keep: float = 0.5


class Contest:
    """Trains candidates of one network.

    Args:
        model: The network with its starting weights and a new classifier, on its device. No candidate changes it.
        input_size: (C, H, W) of the images.
        plan: How candidates are trained, as if each were the only one; roles other than `role` and `head` are frozen.
        role: The role that they are in.
        args: Options of `train_amf.py`: seed, label smoothing, clipping, evaluation metric and interval.
        accelerator: Accelerate's context.
        head: Classifier that each starts from, on the features before pooling; None for the network's own.
        lockstep: Train in lockstep where the network bears it.
        chunk: Most candidates that train at once, or None.
        memory: Most bytes that their activations take at once, or None. One candidate is trained whatever it takes.
        mixup: timm's Mixup, or None.
        folder: Where the state is kept, or None.
        cache_bytes: Most bytes on disk in `folder` for what arrives at the candidates of a chunk (`TapCache`).
        progress: Show a bar.
    """

    def __init__(
            self,
            model: nn.Module,
            input_size: Sequence[int],
            plan: Plan,
            role: str,
            args: argparse.Namespace,
            accelerator: Accelerator,
            head: Optional[nn.Module] = None,
            lockstep: bool = True,
            chunk: Optional[int] = None,
            memory: Optional[float] = None,
            mixup: Optional[Mixup] = None,
            folder: Optional[Path] = None,
            cache_bytes: float = 0,
            progress: bool = False,
    ):
        self.model = model.requires_grad_(False).eval()
        self.input_size = tuple(input_size)
        self.role, self.args, self.accelerator = role, args, accelerator
        self.plan = plan
        self.own_head = head is None
        heads = classifiers(model)
        if len(heads) != 1:
            raise UserError(f'{type(model).__name__} has {len(heads)} classifiers; search a model with one')
        self.head = heads[0] if head is None else head
        self.chunk, self.memory, self.mixup = chunk, memory, mixup
        self.folder = folder
        self.cache_bytes = cache_bytes
        self.progress = progress
        self.why_alone = '' if lockstep else 'as asked for'
        self.probe: Optional[Probe] = None
        if lockstep:
            try:
                self.probe = probe_units(model, input_size)
            except Exception as e:  # whatever an architecture without the usual two halves raises
                self.why_alone = f'{type(model).__name__} does not show its blocks ({str(e).splitlines()[0]})'
        self._bar: Optional[tqdm] = None
        self._ticks: list[float] = []
        self._bytes: dict[str, int] = {}

    # -- candidates ---------------------------------------------------------------------------------------------------

    def enter(self, candidates: Iterable[Candidate], stage: Stage) -> list[Contestant]:
        """New contestants, all with the network's weights and the same classifier."""
        contestants = [self._contestant(c, stage) for c in candidates]
        net = self._lockstep(contestants)
        if net is not None:
            try:
                net.check(self.input_size)
            except LockstepUnfit as e:
                self.why_alone = f'lockstep does not apply to {type(self.model).__name__}: {e}'
                self.probe = None
                return self.enter([c.member.candidate for c in contestants], stage)
        return contestants

    def _lockstep(self, part: Sequence[Contestant]) -> Optional[Lockstep]:
        """The network that contestants share; None where none of them does."""
        shared = [c.member for c in part if not c.member.alone]
        return Lockstep(self.model, self.probe, shared, self.own_head) if shared else None

    def _contestant(self, candidate: Candidate, stage: Stage) -> Contestant:
        plan = candidate_plan(self.plan, candidate, self.role).updated({'epochs': stage.epochs})
        groups = param_groups(self.model, plan)
        names = [n for group in groups if group['role'] != 'head' for n in group['param_names']]
        member = self._member(candidate, names)
        groups = self._own_groups(groups, member, plan)
        optimizer = optimizer_of(groups, plan)
        scheduler = GroupScheduler(
            optimizer, plan, len(stage.train_loader), 'min' if self.args.eval_metric == 'loss' else 'max')
        return Contestant(member, optimizer, scheduler)

    def _member(self, candidate: Candidate, names: list[str]) -> Member:
        if self.probe is not None and '' not in candidate.modules:
            try:
                return lockstep_member(self.model, self.probe, candidate, self.head, names)
            except LockstepUnfit as e:
                _logger.info('%s trains on its own: %s', candidate.name, e)
        return plain_member(self.model, candidate, self.head, names)

    def _own_groups(self, groups: list[dict[str, Any]], member: Member, plan: Plan) -> list[dict[str, Any]]:
        """The groups of the Plan, over the member's own parameters."""
        result = [
            {**g, 'params': [member.params[n] for n in g['param_names']]} for g in groups if g['role'] != 'head']
        of_head = [g for g in groups if g['role'] == 'head']
        if not of_head:
            raise UserError('plan: the classifier must train in a search; leave the train of role head out')
        decay = plan.role('head', role_defaults(self.model)).weight_decay
        own = {n: p for n, p in member.params.items() if n.startswith(HEAD)}
        for decays in (True, False):
            chosen = {n: p for n, p in own.items() if decays == (p.ndim > 1 or not plan.weight_decay_exclude_1d)}
            if chosen:
                result.append({
                    **of_head[0], 'weight_decay': decay if decays else 0., 'params': list(chosen.values()),
                    'param_names': list(chosen)})
        return result

    def chunks(self, contestants: Sequence[Contestant]) -> list[list[Contestant]]:
        """What trains at once: those with a network to themselves, then the others from the classifier's end on."""
        alone = [c for c in contestants if c.member.alone]
        order = {name: i for i, name in enumerate(self.probe.order)} if self.probe is not None else {}
        shared = sorted((c for c in contestants if not c.member.alone), key=lambda c: -min(
            (order[u] for u in c.member.copies), default=len(order)))
        result, used = [alone] if alone else [], math.inf
        for contestant in shared:
            need = self._activation_bytes(contestant.member) if self.memory else 0
            full = self.chunk is not None and result and len(result[-1]) >= self.chunk
            if used == math.inf or full or (self.memory and used + need > self.memory):
                result.append([])
                used = 0
            result[-1].append(contestant)
            used += need
        return result

    def _activation_bytes(self, member: Member) -> int:
        """What one batch of a member keeps for the backward pass; measured once, though chunks are cut at each rung."""
        if member.name in self._bytes:
            return self._bytes[member.name]
        net = Lockstep(self.model, self.probe, [member], self.own_head)
        kept = [t.clone() for t in member.tensors().values()]
        member.train()
        images = next(self.model.parameters()).new_zeros((3, *self.input_size))
        sizes = [saved_bytes(functools.partial(net, images[:count])) for count in (2, 3)]
        member.train(False)
        with torch.no_grad():
            for tensor, value in zip(member.tensors().values(), kept):
                tensor.copy_(value)  # the statistics of norms moved
        self._bytes[member.name] = (sizes[1] - sizes[0]) * self.args.batch_size
        return self._bytes[member.name]

    # -- training -----------------------------------------------------------------------------------------------------

    def run(self, candidates: Sequence[Candidate], stage: Stage) -> list[CandidateResult]:
        """Train and evaluate candidates.

        What was interrupted goes on from the last evaluation that was finished.

        Returns:
            A result for each candidate, in their order.

        Raises:
            UserError: If the Plan does not fit the model, or the state on disk is that of something else.
        """
        everyone = self.enter(candidates, stage)
        running, start = everyone, 0
        steps = len(stage.train_loader)
        with tqdm(desc=stage.name, unit='step', disable=not self.progress, dynamic_ncols=True) as self._bar:
            for end in [*stage.rungs, stage.epochs]:
                parts = self.chunks(running)
                self._bar.total = self._bar.n + len(parts) * (end - start) * steps
                for i, part in enumerate(parts):
                    self._train_chunk(part, stage, start, end, f'{stage.name}-{end}-{i}')
                if end < stage.epochs:
                    running = self._halve(running, stage.keep)
                start = end
        images = len(stage.val_loader.dataset)
        return [c.result(images) for c in everyone]

    def _halve(self, running: list[Contestant], keep: float) -> list[Contestant]:
        """Those that go on: both baselines, and the best of the rest."""
        rest = [c for c in running if c.member.candidate.way not in ('classifier', 'all')]
        count = max(1, math.ceil(keep * len(rest)))
        for loser in sorted(rest, key=lambda c: -c.curve[-1][1])[count:]:
            loser.stopped = True
        return [c for c in running if not c.stopped]

    def _train_chunk(self, part: list[Contestant], stage: Stage, start: int, end: int, name: str) -> None:
        epoch = self._restore(part, name, start)
        self._bar.update((epoch - start) * len(stage.train_loader))
        net = self._lockstep(part)
        stores = {
            stage.train_loader: self._store(net, stage.train_loader, f'{name}-train', self.mixup is not None),
            stage.val_loader: self._store(net, stage.val_loader, f'{name}-val'),
        }
        interval = self.args.val_interval or 1
        while epoch < end:
            self._train_epoch(part, net, stage.train_loader, epoch, stores[stage.train_loader])
            epoch += 1
            evaluates = epoch % interval == 0 or epoch == end
            if evaluates:
                self._evaluate(part, net, stage.val_loader, epoch, stores[stage.val_loader])
            for contestant in part:
                contestant.scheduler.step(epoch, self._metric(contestant) if evaluates else None)
            if evaluates:
                self._save(part, name, epoch)
        for store in stores.values():
            if store is not None:
                store.close()

    def _metric(self, contestant: Contestant) -> float:
        _, top1, loss = contestant.curve[-1]
        return loss if self.args.eval_metric == 'loss' else top1

    def _store(self, net: Optional[Lockstep], loader, name: str, changes: bool = False) -> Optional[TapCache]:
        """Where what arrives at the candidates is kept, if images are the same in every epoch."""
        if net is None or self.folder is None or not self.cache_bytes or changes or not loader.repeats_images:
            return None
        folder = self.folder / f'{name}-taps-{self.accelerator.process_index}'
        return TapCache(net, len(loader.dataset), folder, self.cache_bytes)

    def costs(self, candidates: Sequence[Candidate], stage: Stage, steps: int) -> tuple[float, float]:
        """Seconds that an image of the training and of the validation set takes, for all candidates together.

        Timed on a few batches, of candidates that are thrown away. A chunk's first batch, which is slower, is left out.
        """
        seconds = [0., 0.]
        self._bar = tqdm(disable=True)
        for part in self.chunks(self.enter(candidates, stage)):
            net = self._lockstep(part)
            runs = (
                (stage.train_loader, lambda p=part, n=net: self._train_epoch(p, n, stage.train_loader, 0, None, steps)),
                (stage.val_loader, lambda p=part, n=net: self._evaluate(p, n, stage.val_loader, 0, None, steps)),
            )
            for i, (loader, run) in enumerate(runs):
                run()
                taken = np.diff(self._ticks)
                images = self.accelerator.num_processes * loader.sampler.batch_size
                seconds[i] += float(np.median(taken) if len(taken) else self._ticks[0]) / images
        return seconds[0], seconds[1]

    def _batches(self, loader, steps: Optional[int]) -> Iterator[Any]:
        """The batches of a loader, or the first of them, and when each was done with."""
        start, self._ticks = time.perf_counter(), []
        for batch in itertools.islice(loader, steps):
            yield batch
            if steps is not None:
                if self.accelerator.device.type == 'cuda':
                    torch.cuda.synchronize(self.accelerator.device)
                self._ticks.append(time.perf_counter() - start)

    def _train_epoch(
            self,
            part: Sequence[Contestant],
            net: Optional[Lockstep],
            loader,
            epoch: int,
            store: Optional[TapCache],
            steps: Optional[int] = None,
    ) -> None:
        for contestant in part:
            contestant.member.train()
        loader.set_epoch(epoch)
        scaler = self.accelerator.scaler
        for step, batch in enumerate(self._batches(loader, steps)):
            seed_step(self.args.seed, epoch, step, self.accelerator.process_index)
            inputs, target = batch.input, batch.target
            if self.mixup is not None:
                inputs, target = self.mixup(inputs, target)
            for contestant in part:
                contestant.scheduler.step_update(epoch * len(loader) + step)
            draw = int(np.random.SeedSequence(
                [self.args.seed, epoch, step, self.accelerator.process_index]).generate_state(1)[0])
            weight = len(inputs) * self.accelerator.num_processes / batch.step_size
            for losses in self._losses(part, net, inputs, target, batch.index, draw, store):
                total = torch.stack(losses).sum() * weight
                (total if scaler is None else scaler.scale(total)).backward()
            self._update(part, scaler)
            self._bar.update()

    def _losses(self, part, net, inputs, target, index, draw: int, store) -> Iterator[list[Tensor]]:
        """The losses of those that share a network, and of each other; each list in a graph of its own."""
        smoothing = self.args.smoothing if self.mixup is None else 0.
        for contestant in part:
            if contestant.member.alone:
                seed_torch(draw * 4099)
                with self.accelerator.autocast():
                    logits = plain_logits(contestant.member.copies[''], contestant.member.head, inputs, self.own_head)
                yield [F.cross_entropy(logits.float(), target, label_smoothing=smoothing)]
        if net is not None:
            net.step_seed = draw
            with self.accelerator.autocast():
                outputs = net(inputs, None if store is None else store.taps(inputs, index))
            yield [F.cross_entropy(o.float(), target, label_smoothing=smoothing) for o in outputs.values()]

    def _update(self, part: Sequence[Contestant], scaler) -> None:
        self._reduce_gradients(part)
        for contestant in part:
            if scaler is not None:
                scaler.unscale_(contestant.optimizer)
            if self.args.clip_grad is not None:
                params = [p for n, p in contestant.member.params.items()
                          if not ('agc' in self.args.clip_mode and n.startswith(HEAD))]
                dispatch_clip_grad(params, value=self.args.clip_grad, mode=self.args.clip_mode)
            if scaler is None:
                contestant.optimizer.step()
            else:
                scaler.step(contestant.optimizer)
            contestant.optimizer.zero_grad()
        if scaler is not None:
            scaler.update()

    def _reduce_gradients(self, part: Sequence[Contestant]) -> None:
        """The mean over processes, of all gradients at once."""
        if self.accelerator.num_processes == 1:
            return
        grads = [p.grad for c in part for p in c.member.params.values() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in grads]), 'mean')
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(mean.view_as(grad))

    @torch.no_grad()
    def _evaluate(self, part, net, loader, epoch: int, store, steps: Optional[int] = None) -> None:
        tallies = {}
        for contestant in part:
            contestant.member.train(False)
            self._mean_statistics(contestant.member)
            tallies[contestant.member.name] = Tally(loader.dataset.components, self.accelerator.device)
        for batch in self._batches(loader, steps):
            with self.accelerator.autocast():
                outputs = {} if net is None else net(
                    batch.input, None if store is None else store.taps(batch.input, batch.index))
                outputs.update({
                    c.member.name: plain_logits(c.member.copies[''], c.member.head, batch.input, self.own_head)
                    for c in part if c.member.alone})
            for name, logits in outputs.items():
                tallies[name].update(logits, batch.target, batch.component)
        reduce_tensors(self.accelerator, *tallies.values())
        for contestant in part:
            metrics = tallies[contestant.member.name].metrics()
            contestant.curve.append((epoch, metrics['top1'], metrics['loss']))

    def _mean_statistics(self, member: Member) -> None:
        """The mean over processes of the statistics of norms, as timm's `--dist-bn reduce`."""
        if self.accelerator.num_processes > 1:
            for name, tensor in member.tensors().items():
                if name not in member.params and tensor.is_floating_point():
                    tensor.copy_(self.accelerator.reduce(tensor, 'mean'))

    # -- state on disk ------------------------------------------------------------------------------------------------

    def _save(self, part: Sequence[Contestant], name: str, epoch: int) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        path = self.folder / f'{name}.pt'
        with replacing(path, 'make room, and go on with --resume') as temporary:
            torch.save(dict(epoch=epoch, contestants={c.member.name: c.state() for c in part}), temporary)

    def _restore(self, part: Sequence[Contestant], name: str, start: int) -> int:
        """Bring contestants to where they were; returns the epochs that they have trained."""
        path = None if self.folder is None else self.folder / f'{name}.pt'
        if path is None or not path.exists():
            return start
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
            for contestant in part:
                contestant.restore(state['contestants'][contestant.member.name])
        except Exception as e:  # whatever a damaged or foreign file raises
            raise UserError(
                f'{path}: holds no state of this search ({type(e).__name__}); start anew with --overwrite') from e
        for contestant in part:
            contestant.scheduler.step(state['epoch'])
        return state['epoch']
