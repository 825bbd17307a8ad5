"""The training loop: what happens in a step and around an epoch."""
import argparse
import contextlib
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from timm.data import Mixup
from timm.models import model_parameters, save_for_hf
from timm.utils import dispatch_clip_grad, distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from tqdm import tqdm

from timm_amf.engine.build import seed_step
from timm_amf.engine.checkpoint import Checkpointer, class_names, load_weights, read_state, restoring, set_class_names
from timm_amf.engine.config_file import args_content
from timm_amf.engine.evaluate import evaluate, reduce_tensors
from timm_amf.engine.run_folder import settings_of, shown_as
from timm_amf.engine.task import AdaptiveTask
from timm_amf.errors import Diverged, Interrupted, UserError
from timm_amf.models.method import check_takes, method_of
from timm_amf.models.records import Record, exact_device
from timm_amf.text import CsvLog, differences
from timm_amf.tuning import GroupScheduler, Resolved, apply_freeze
from timm_amf.yaml_text import load_yaml

__all__ = ['Signals', 'Trainer']

_logger = logging.getLogger(__name__)

# Processes agree to stop every so many updates: an agreement is a collective operation.
_AGREE_EVERY = 10


class Signals:
    """Turns SIGINT and SIGTERM into a flag that the loop reads at the end of a step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received: Optional[int] = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> 'Signals':
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame) -> None:
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum


class _TrainMeter:
    """Sum of the loss over samples, and the first step whose loss was not finite."""

    def __init__(self, device: torch.device, first_step: int = 0):
        self.sums = torch.zeros(2, dtype=torch.float64, device=exact_device(device))
        self._loss, self._samples = self.sums.unbind()  # views
        self._unseen: list[torch.Tensor] = []
        self._first_unseen = first_step

    def update(self, loss: torch.Tensor, samples: int) -> None:
        loss = loss.detach()
        self._loss.add_(loss.to(self.sums.device), alpha=samples)
        self._samples.add_(samples)
        self._unseen.append(loss)

    def bad_step(self) -> int:
        """The first step since the last look whose loss was not finite, -1 if all were. Waits for the device."""
        for step, loss in enumerate(self._unseen, start=self._first_unseen):
            if not math.isfinite(loss):
                return step
        self._first_unseen += len(self._unseen)
        self._unseen.clear()
        return -1

    def tensors(self) -> list[torch.Tensor]:
        return [self.sums]

    def loss(self) -> float:
        total, count = self.sums.tolist()
        return total / max(count, 1)


class Trainer:
    """Trains a task by a Plan, and keeps the run's folder.

    It holds no random state: all draws follow from seed, epoch, step and sample, so a run that was stopped at any
    moment and resumed from its last checkpoint gives the same bits as one that never stopped.

    Args:
        args: Options.
        accelerator: Accelerate's context.
        task: The task, its model on its device; wrapped for distributed training here.
        table: How the model is fine-tuned.
        optimizer: Over the groups of `param_groups(model, table)`.
        train_loader: Seeded loader of training batches.
        val_loader: Loader of evaluation batches.
        folder: The run's folder.
        mixup: timm's Mixup, or None.
    """
    stops_at_nan = True

    def __init__(
            self,
            args: argparse.Namespace,
            accelerator: Accelerator,
            task: AdaptiveTask,
            table: Resolved,
            optimizer: torch.optim.Optimizer,
            train_loader,
            val_loader,
            folder: Path,
            mixup: Optional[Mixup] = None,
    ):
        self.args, self.accelerator, self.task, self.table = args, accelerator, task, table
        self.plan = plan = table.plan
        self.train_loader, self.val_loader, self.mixup = train_loader, val_loader, mixup
        self.folder = Path(folder)
        self.components = train_loader.dataset.components
        self.decreasing = args.eval_metric == 'loss'
        self.checkpoints = Checkpointer(
            folder, args.checkpoint_hist or 0, args.save_epochs or (), self.decreasing, finite=self.stops_at_nan)
        self.steps = min(len(train_loader), args.train_batches_per_epoch or len(train_loader))
        self.updates_per_epoch = math.ceil(self.steps / args.grad_accum_steps)
        self.scheduler = GroupScheduler(
            optimizer, plan, self.updates_per_epoch, plateau_mode='min' if self.decreasing else 'max')
        self.total_epochs = self.scheduler.total_epochs
        self.epochs = min(self.total_epochs, args.stop_epoch or self.total_epochs)
        warmup = plan.schedule.warmup_epochs or 0
        if warmup >= self.total_epochs > 0 and plan.schedule.sched != 'constant':
            _logger.warning(
                'The warm-up of %g epochs is as long as the run of %g: its LR stays below %g; lower --warmup-epochs.',
                warmup, self.total_epochs, plan.lr)
        if self.updates_per_epoch < 5 and accelerator.is_main_process:
            _logger.warning(
                'An epoch has %d updates, of %d images: lower --batch-size (%d).', self.updates_per_epoch,
                len(train_loader.dataset), args.batch_size)
        if self.epochs and min(group['start_epoch'] for group in optimizer.param_groups) > 0:
            raise UserError('plan: nothing trains in epoch 0; set start_epoch of at least one role to 0')
        check_takes(
            task.model, eval_blocks=args.eval_blocks, eval_sampling_seed=args.eval_sampling_seed,
            routing_eps=args.routing_eps)
        with self._evaluation(task.model):
            pass  # says so now if there are no such paths
        if args.model_ema:
            # Before anything wraps the model: the average is of the bare one.
            device = torch.device('cpu') if args.model_ema_force_cpu else None
            task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=device)
        self.epoch, self.step, self.updates = 0, 0, 0
        self.resumed_meters: Optional[list] = None
        self.start: Optional[dict[str, Any]] = None  # the metrics before the first step, where they were asked for
        self.bare_optimizer = optimizer
        apply_freeze(task.model, table, 0)
        if args.torchcompile:
            try:
                task.trainable_module.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
            except Exception as e:  # it compiles later; now it looks at backend and mode
                raise UserError(f'--torchcompile {args.torchcompile}: {e}') from e
        task.trainable_module = accelerator.prepare_model(task.trainable_module)
        self.l2sp = getattr(optimizer, 'l2sp', None)
        if self.l2sp is not None and accelerator.num_processes > 1:
            self.l2sp.take()  # now the weights are those of the first process everywhere
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._open_logs()
        if train_loader.dataset.copies:  # of all warnings the last: what is wrong otherwise has been told by now
            _logger.warning(train_loader.dataset.copies)
        self.signals = Signals()
        self._begin: Optional[Callable[[], None]] = None
        self._owns_folder = False
        self._started = time.monotonic()
        self._epochs_done = 0

    # -- resuming -----------------------------------------------------------------------------------------------------

    def resume(self, source: Path) -> None:
        """Continue from a `last/` folder."""
        args = self.args
        with restoring(source):
            state = read_state(source)
            self._check_same_run(source, state)
            before = state['plan'].get('opt', self.plan.opt)
            if before != self.plan.opt and not args.no_resume_opt:
                raise UserError(
                    f'{source}: is of a run with --opt {before}, not {self.plan.opt}; give it, or add --no-resume-opt')
            optimizer = None if args.no_resume_opt else self.bare_optimizer
            self.checkpoints.load_last(source, self.task.model, self.task.ema_model, optimizer, self.l2sp)
            self.epoch, self.step, self.updates = state['epoch'], state['step'], state['updates']
            self.start = state.get('start')
            if optimizer is not None:
                self.scheduler.load_state_dict(state['schedule'])
            self.resumed_meters = state['meters']
            if args.start_epoch is not None:
                self.epoch, self.step, self.updates = args.start_epoch, 0, args.start_epoch * self.updates_per_epoch
                self.resumed_meters = None
            self.scheduler.step(self.epoch)
            self._open_logs()

    def _open_logs(self) -> None:
        self.summary = CsvLog(self.folder / 'summary.csv', self.epoch)
        self.policy_log = CsvLog(self.folder / 'policy.csv', self.epoch)
        self.speed_log = CsvLog(self.folder / 'speed.csv', self.epoch)  # what no two runs have alike

    def _identity(self) -> dict[str, Any]:
        """What the order and size of the steps, and the loss, follow from."""
        return dict(
            {name: getattr(self.args, name) for name in (
                'seed', 'batch_size', 'grad_accum_steps', 'class_sampling', 'class_weight', 'val_share', 'test_share',
                'group')},
            samples=len(self.train_loader.dataset), steps=self.steps, processes=self.accelerator.num_processes)

    def _check_same_run(self, source: Path, state: dict[str, Any]) -> None:
        before = state['identity']  # earlier versions wrote fewer
        differing = differences(before, self._identity())
        if differing and state['step']:
            raise UserError(
                f'{source}: stands in the middle of an epoch, and the steps would differ ({"; ".join(differing)}); '
                f'resume with the same settings')
        args = source.parent / 'args.yaml'  # which is not beside a checkpoint that was copied
        options = load_yaml(args) if args.is_file() else {}
        differing = differences(
            settings_of({**options, **before}, state['plan']),
            settings_of({**args_content(self.args), **self._identity()}, self.plan.to_dict()))
        if differing:
            _logger.warning('%s: resumed with other settings (%s)', source, '; '.join(differing))

    # -- one epoch ----------------------------------------------------------------------------------------------------

    def train(
            self,
            begin: Optional[Callable[[], None]] = None,
            after_epoch: Optional[Callable[[int, Optional[float]], None]] = None,
    ) -> None:
        """Train to the last epoch.

        Args:
            begin: Makes the folder ready to be written, once the first update has been made: a run that cannot train
                leaves everything as it was.
            after_epoch: Called with each epoch and its metric when its checkpoint is there.
        """
        self._begin = begin
        self._stop_early()  # as the run did that is resumed
        if begin is not None and self.epoch and self.epoch >= self.epochs:
            begin()
            self.accelerator.print(
                f'{self.folder}: epoch {self.epoch} was the last, and nothing is left to train; --epochs N trains on')
        try:
            with self.signals:
                while self.epoch < self.epochs:
                    epoch, metric = self.epoch, self.finish_epoch(self.train_epoch(), self.evaluate())
                    if after_epoch is not None:
                        after_epoch(epoch, metric)
        except (UserError, Interrupted, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            if self._begin is None:
                raise
            # Whatever a model or an augmentation says of images that it cannot take.
            raise UserError(
                f'the first step fails ({type(e).__name__}: {e}); try another --batch-size or --img-size; --traceback '
                f'shows where') from e
        finally:
            self.train_loader.close()
            self.val_loader.close()

    def _try_smallest(self, batch) -> None:
        """A forward and a backward pass of the smallest share of a step that any process will have; nothing is kept."""
        sampler, world = self.train_loader.sampler, self.accelerator.num_processes
        size = sampler.step_size(len(sampler) - 1) // world
        if size == math.ceil(sampler.step_size(0) / world) or self.args.aug_splits > 1:
            return  # the first step is one, on every process
        buffers = {name: buffer.clone() for name, buffer in self.task.model.named_buffers()}
        inputs, target = batch.input[:size].clone(), batch.target[:size].clone()
        if self.mixup is not None:
            inputs, target = self.mixup(inputs, target)
        self.accelerator.backward(self.task(inputs, target)['loss'])
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, buffer in self.task.model.named_buffers():
                buffer.copy_(buffers[name])

    def train_epoch(self) -> dict[str, float]:
        """Train the current epoch, from the current step on.

        Returns:
            `loss`, the mean over the epoch's samples of all processes, and of composites the columns of `policy.csv`
            with the prefix `train_`; also `seconds` and `images_per_s`.

        Raises:
            Interrupted: After a signal, with a checkpoint written.
            Diverged: If the loss is no longer finite.
        """
        self._apply_plan()
        meter, record = _TrainMeter(self.accelerator.device, self.step), self._record_of_epoch()
        holders = [meter] if record is None else [meter, record]
        for holder, saved in zip(holders, self.resumed_meters or ()):
            for tensor, values in zip(holder.tensors(), saved):
                tensor.copy_(torch.tensor(values[self.accelerator.process_index], dtype=tensor.dtype))
        self.resumed_meters = None
        if self.mixup is not None and self.args.mixup_off_epoch and self.epoch >= self.args.mixup_off_epoch:
            self.mixup.mixup_enabled = False
        self.task.train()
        self.train_loader.set_epoch(self.epoch, self.step)
        self.scheduler.step_update(self.updates)
        start, images = time.monotonic(), 0
        bar = tqdm(
            self.train_loader, total=self.steps, initial=self.step, desc=f'epoch {self.epoch + 1}', leave=False,
            disable=not self._progress, dynamic_ncols=True)
        for step, batch in enumerate(bar, start=self.step):
            if self._begin is not None and not images:
                self._try_smallest(batch)
            due = self.args.save_images and step % self.args.log_interval == 0 and self.accelerator.is_main_process
            seen = batch.input.clone() if due else None  # mixup works in place
            ends_update = (step + 1) % self.args.grad_accum_steps == 0 or step + 1 == self.steps
            self._train_step(step, batch, ends_update, meter, record)
            images += batch.step_size
            self.step = step + 1
            if ends_update:
                self.updates += 1
                self.scheduler.step_update(self.updates)
                self._after_update(meter, holders, bar)
            if due and self._begin is None:
                name = f'train-batch-{self.epoch}-{step}.jpg'
                save_image(seen.float(), self.folder / name, padding=0, normalize=True)
            if self.step == self.steps:
                break
        self._check_finite(meter)
        seconds = time.monotonic() - start
        reduce_tensors(self.accelerator, *holders)
        if self.accelerator.num_processes > 1 and self.args.dist_bn:
            distribute_bn(self.task.model, self.accelerator.num_processes, self.args.dist_bn == 'reduce')
            if self.task.has_ema():
                # That of the first process, which a checkpoint holds: a resumed run has no other.
                distribute_bn(self.task.ema_model, self.accelerator.num_processes, False)
        policy = {} if record is None else record.row('train_')
        return dict(policy, loss=meter.loss(), seconds=seconds, images_per_s=images / max(seconds, 1e-9))

    def _train_step(self, step, batch, ends_update, meter, record) -> None:
        args, accelerator = self.args, self.accelerator
        seed_step(args.seed, self.epoch, step, accelerator.process_index)
        inputs, target = batch.input, batch.target
        if self.mixup is not None:
            inputs, target = self.mixup(inputs, target)
        sync = contextlib.nullcontext() if ends_update else accelerator.no_sync(self.task.trainable_module)
        with sync:
            result = self.task(inputs, target)
            weight = self._weight(step, len(inputs), batch.step_size)
            accelerator.backward(result['loss'] if weight == 1 else result['loss'] * weight)
        meter.update(result['loss'], len(inputs))
        if record is not None:
            record.update(result, batch.component)
        if ends_update:
            self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.task.update_ema(step=self.updates)

    def _weight(self, step: int, samples: int, step_size: int) -> float:
        """What makes the gradient of an update the mean over its samples, of all processes and accumulated steps.

        A loss is the mean over this process's samples of the step, and a reducer averages over processes.
        """
        accum = self.args.grad_accum_steps
        first = step // accum * accum
        sizes = [self.train_loader.sampler.step_size(s) for s in range(first, min(first + accum, self.steps))]
        share = self.train_loader.sampler.step_size(step) / sum(sizes)
        return samples * self.accelerator.num_processes / step_size * share

    def _clip(self) -> None:
        args = self.args
        if args.clip_grad is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            parameters = model_parameters(self.task.model, exclude_head='agc' in args.clip_mode)
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)

    def _after_update(self, meter, holders, bar) -> None:
        """Look at the loss, save and stop where due. Between updates there are no gradients to be lost."""
        args = self.args
        look = self.step % args.log_interval < args.grad_accum_steps
        if look or self.accelerator.device.type == 'cpu':
            self._check_finite(meter)
        if self._begin is not None:
            begin, self._begin = self._begin, None
            begin()
            self._owns_folder = True
            self._open_logs()  # those of the run that goes on here
        if look and self._progress:
            bar.set_postfix(loss=f'{meter.loss():.3f}')
        due = args.recovery_interval and self.step // args.recovery_interval > (
            self.step - args.grad_accum_steps) // args.recovery_interval
        alone = self.accelerator.num_processes == 1
        stop = 0 if self.updates % _AGREE_EVERY and not alone else self._most(self.signals.received or 0)
        if (due or stop) and self.step < self.steps:
            self._check_finite(meter)
            self.save(holders)
        if stop and self.step < self.steps:
            raise Interrupted(
                stop, f'stopped in epoch {self.epoch + 1} after step {self.step} of {self.steps}; '
                f'{self.checkpoints.last} is complete: go on with --resume auto')

    def _most(self, number: int) -> int:
        """The largest of the numbers of all processes."""
        if self.accelerator.num_processes == 1:
            return number
        return int(gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _check_finite(self, meter: _TrainMeter) -> None:
        step = self._most(meter.bad_step()) if self.stops_at_nan else -1
        if step >= 0:
            lrs = ', '.join(f'{role} {lr:.3g}' for role, lr in self._lrs().items())
            raise Diverged(
                f'the loss is not finite in epoch {self.epoch + 1}, step {step + 1} (LR {lrs}); '
                f'{self._remedy}')

    @property
    def _remedy(self) -> str:
        last = self.checkpoints.last
        where = f'the last good checkpoint is {last}' if last.exists() else 'there is no checkpoint yet'
        return f'{where}; lower the LR, clip gradients (--clip-grad), or use bf16 instead of fp16'

    def _apply_plan(self) -> None:
        """Freeze and unfreeze for the epoch. A reducer knows only what trained when it was built: build it anew."""
        changed = apply_freeze(self.task.model, self.table, self.epoch)
        method_of(self.task.model).start_epoch(self.epoch, self.task.settings)
        module = self.task.trainable_module
        if changed and isinstance(module, DistributedDataParallel):
            self.task.trainable_module = DistributedDataParallel(
                module.module, device_ids=module.device_ids, broadcast_buffers=module.broadcast_buffers)

    def _record_of_epoch(self) -> Optional[Record]:
        return method_of(self.task.model).create_record(self.components, self.accelerator.device)

    def _evaluation(self, model: torch.nn.Module):
        """The paths that evaluation takes through a model."""
        args = self.args
        return method_of(model).evaluation(self.plan.global_k, args.eval_blocks, args.eval_sampling_seed)

    # -- around the epochs --------------------------------------------------------------------------------------------

    def evaluate(self) -> Optional[dict[str, Any]]:
        """Evaluate after the current epoch, if it is due: the moving average where there is one, as timm.

        Returns:
            The metrics of `evaluate` and, of composites, the columns of `policy.csv`; None if not due.
        """
        due = (self.epoch + 1) % self.args.val_interval == 0 or self.epoch + 1 >= self.epochs
        return self.evaluate_now() if due else None

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The bare model that `evaluate_now` looks at: the moving average where there is one on the device."""
        has_ema = self.task.has_ema() and not self.args.model_ema_force_cpu
        return self.task.ema_model if has_ema else self.task.model

    def evaluate_now(self) -> dict[str, Any]:
        """Evaluate the current weights."""
        model, record = self.evaluated_model, self._record_of_epoch()
        module = self.task.get_trainable_module(ema=model is not self.task.model)
        # Processes may hold different numbers of batches: evaluate without the reducer around the model.
        module = module.module if isinstance(module, DistributedDataParallel) else module
        with self._evaluation(model):
            metrics = evaluate(module, self.val_loader, self.accelerator, record, progress=self._progress)
        if record is None or not record.count:
            return dict(metrics, policy={}, headline='')
        record.history = self.policy_log.rows
        return dict(metrics, policy=record.row(), headline=record.headline())

    def finish_epoch(self, train: dict[str, Any], val: Optional[dict[str, Any]]) -> Optional[float]:
        """Record the epoch, save what it earned, set the next epoch's LRs and report; returns its `--eval-metric`."""
        if val is not None and self.stops_at_nan and not math.isfinite(val['loss']):
            raise Diverged(
                f'the evaluation loss is not finite after epoch {self.epoch + 1}, which is not saved; {self._remedy}')
        metric = None if val is None else val[self.args.eval_metric]
        epoch, lrs, best = self.epoch, self._lrs(), False
        if self.accelerator.is_main_process:
            self._record(epoch, train, val, lrs)
            weights = self.task.ema_model if self.task.has_ema() else self.task.model
            best = self.checkpoints.save_epoch(weights, epoch, metric)
        self._epochs_done += 1
        self.epoch, self.step = epoch + 1, 0
        self.scheduler.step(self.epoch, metric)
        self.save([])
        if self.accelerator.is_main_process:
            print(self._line(epoch, train, val, lrs, best), flush=True)
        self._stop_early()
        stop = self._most(self.signals.received or 0)
        if stop and self.epoch < self.epochs:
            raise Interrupted(
                stop, f'stopped after epoch {epoch + 1}; {self.checkpoints.last} is complete: go on with --resume auto')
        return metric

    def _stop_early(self) -> None:
        """Make the epochs so far all of them where the last `--early-stop` brought nothing better.

        It follows from what a checkpoint holds, so a resumed run stops at the same epoch.
        """
        patience, best = self.args.early_stop, self.checkpoints.best_epoch
        if not patience or self.epoch >= self.epochs or self.epoch % self.args.val_interval:
            return
        # The first process alone keeps the best epoch.
        if self._most(best is not None and self.epoch - 1 - best >= patience):
            self.epochs = self.total_epochs = self.epoch
            if self.accelerator.is_main_process:
                name, ago = self.args.eval_metric, self.epoch - 1 - best
                print(f'early stop: {name} is no better than after epoch {best + 1}, {ago} epochs ago')

    def save(self, holders) -> None:
        """Write `last/`: the state at this moment, from which a resumed run gives the same bits."""
        # The tensors of every process, by rank, exact to the bit in JSON.
        meters = [[gather(tensor[None]).tolist() for tensor in holder.tensors()] for holder in holders] or None
        if self._owns_folder and not (self.folder / 'args.yaml').exists():
            raise UserError(f'{self.folder}: was removed or emptied while the run was writing there; start it again')
        if self.accelerator.is_main_process:
            self.checkpoints.save_last(self.task.model, self.task.ema_model, self.bare_optimizer, dict(
                epoch=self.epoch,
                step=self.step,
                updates=self.updates,
                identity=self._identity(),
                plan=self.plan.to_dict(),
                schedule=self.scheduler.state_dict(),
                meters=meters,
                **({} if self.start is None else {'start': self.start}),
            ), self.l2sp)
        self.accelerator.wait_for_everyone()

    def _record(self, epoch, train, val, lrs) -> None:
        val = val or {}
        columns = ['loss', 'top1', 'top5', *(f'top1_{name}' for name in self.components if len(self.components) > 1)]
        row = {
            'epoch': epoch, 'train_loss': train['loss'],
            **{f'eval_{name}': val.get(name, '') for name in (*columns, 'balanced_accuracy', 'macro_f1')},
            'lr': self.bare_optimizer.param_groups[0]['lr'],
            **{f'lr_{role}': lr for role, lr in lrs.items()}}
        self.summary.append(row)
        policy = {**val.get('policy', {}), **{k: v for k, v in train.items() if k.startswith('train_')}}
        if policy:
            self.policy_log.append(dict(epoch=epoch, **policy))
        self.speed_log.append(dict(epoch=epoch, seconds=train['seconds'], images_per_s=train['images_per_s']))
        numbers = {**row, **policy, 'images_per_s': train['images_per_s']}
        self.accelerator.log({k: v for k, v in numbers.items() if k != 'epoch' and v != ''}, step=epoch)

    def _lrs(self) -> dict[str, float]:
        """The highest LR of each role at this moment."""
        lrs: dict[str, float] = {}
        for group in self.bare_optimizer.param_groups:
            lrs[group['role']] = max(group['lr'], lrs.get(group['role'], 0.))
        return lrs

    def report(self, val: dict[str, Any]) -> str:
        """The metrics of an evaluation, on one line."""
        parts = [f'eval loss {val["loss"]:.4f} top1 {val["top1"]:.2f} top5 {val["top5"]:.2f}']
        if self.args.eval_metric not in ('loss', 'top1', 'top5'):
            parts[0] += f' {self.args.eval_metric} {val[self.args.eval_metric]:.2f}'
        if len(self.components) > 1:
            parts.append(' '.join(f'{name} {val[f"top1_{name}"]:.2f}' for name in self.components))
        if val['headline']:
            parts.append(val['headline'])
        return ' | '.join(parts)

    def report_routing(self, eps: float) -> str:
        """Evaluate without the branches whose weight is below `eps`: the metrics, and what changed, on one line."""
        self.task.model.set_routing(eps)
        try:
            metrics = self.evaluate_now()
            errors = [(len(b.input), self.task.model.routing_error(b.input)) for b in self.val_loader]
        finally:
            self.task.model.set_routing(None)
        count = sum(n for n, _ in errors)
        run, kept, off = (
            sum(n * e[name] for n, e in errors) / count for name in ('branches_run', 'top1_agreement', 'mean_abs'))
        return (
            f'routed at {eps:g}: {self.report(metrics)} | {100 * run:.1f} % of the branches run, '
            f'{100 * kept:.2f} % of the predictions kept, logits off by {off:.2g} on average')

    def write_compact(self) -> None:
        """Of a finished run whose images all take one path, the plain model that is left: `compact/`, for timm."""
        if self.plan.global_k is None or self.epoch < self.epochs or not self.accelerator.is_main_process:
            return
        model, weights = self.task.model, self.folder / 'model_best.safetensors'
        if weights.exists():
            load_weights(model, weights)
        method, target = method_of(model), self.folder / 'compact'
        compact = method.compact(method.fixed_path(self.plan.global_k)).to('cpu')
        if class_names(model) is not None:
            set_class_names(compact, class_names(model))
        save_for_hf(
            compact, str(target), model_args=method.compact_args(), safe_serialization=True,
            data_config=shown_as(self.args, model))
        print(f"compact model: timm.create_model('local-dir:{target}', pretrained=True)")

    def closing_line(self) -> str:
        """What the run came to."""
        name, best, metric = self.args.eval_metric, self.checkpoints.best_epoch, self.checkpoints.best_metric
        if not (self.start is None or best is None or self.args.wise_ft or self.decreasing):
            if metric < self.start[name]:
                _logger.warning(
                    'The best epoch, %s %.2f, is below the frozen features with a logistic regression, %.2f: lower the '
                    'LR, or add --wise-ft.', name, metric, self.start[name])
        done = f'done in {timedelta(seconds=round(time.monotonic() - self._started))}'
        done = done if self._epochs_done else 'nothing is left to train'
        if best is None:
            return f'{done}; {self.folder}'
        which = 'of the mix' if self.args.wise_ft and self.epoch >= self.total_epochs else f'after epoch {best + 1}'
        return f'{done}: best {name} {metric:.3f} {which}; {self.folder / "model_best.safetensors"}'

    def _line(self, epoch, train, val, lrs, best) -> str:
        parts = [f'epoch {epoch + 1}/{self.epochs}', f'train loss {train["loss"]:.4f}']
        if val is not None:
            parts.append(self.report(val))
        parts.append('lr ' + ' '.join(f'{role} {lr:.3g}' for role, lr in lrs.items()))
        each = (time.monotonic() - self._started) / self._epochs_done
        left = timedelta(seconds=round(each * (self.epochs - epoch - 1)))
        parts.append(f'{train["images_per_s"]:.0f} img/s, {left} left')
        return ' | '.join(parts) + (' *' if best else '')

    @property
    def _progress(self) -> bool:
        return self.accelerator.is_main_process and not self.args.no_progress and sys.stderr.isatty()
