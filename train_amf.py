#!/usr/bin/env python3
"""Fine-tune any timm model, or an adaptive composite of several, by a Plan.

    accelerate launch train_amf.py --config demo
    python train_amf.py DIR --model amf_resnet18x2 --pretrained --branch-lr 0.0008 0.03 --head-lr 0.008 --policy-lr 3e-5
    torchrun --nproc_per_node 2 train_amf.py DIR --model resnet50 --pretrained --lr 0.01 --cpu

It takes the flags of timm's own train script, with their names and meaning, and others beside them (`--help`,
docs/flags.md). A run writes the folder --output/--experiment: args.yaml and plan.yaml (what was run), summary.csv and
policy.csv (a row an epoch), model_best.safetensors, and last/ (from which --resume auto goes on).
"""
import argparse
import contextlib
import copy
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

from accelerate import Accelerator

from timm_amf.data.shares import write_splits
from timm_amf.engine import build
from timm_amf.engine.checkpoint import set_class_names
from timm_amf.engine.head import start_head
from timm_amf.engine.loop import Trainer
from timm_amf.engine.options import parse_args, save_args
from timm_amf.engine.run import claim_folder, find_resume, prepare_folder, write_environment
from timm_amf.engine.task import AdaptiveTask, create_criterion
from timm_amf.engine.wise import mix_with_start, prepare_mix
from timm_amf.errors import UserError, run_command
from timm_amf.models.method import RunSettings, method_of
from timm_amf.tuning import create_optimizer, describe_depths, describe_groups, model_roles, plan_from_args
from timm_amf.tuning.lora import add_lora, merge_lora
from timm_amf.tuning.plan_args import resolve_lr
from timm_amf.tuning.resolve import resolve


def train(
        argv: Optional[Sequence[str]] = None,
        after_epoch: Optional[Callable[[int, Optional[float]], None]] = None,
        args: Optional[argparse.Namespace] = None,
) -> tuple[Path, Optional[dict[str, float]]]:
    """Parse, build, loop; raises `Interrupted` after a signal, with the checkpoint written.

    Args:
        argv: Arguments, those of the process if None.
        after_epoch: Is told each epoch that was trained, from 0, and its `--eval-metric` (None if it was not due), once
            its checkpoint is written; what it raises ends the training.
        args: What `parse_args` made of the arguments, if it did already.

    Returns:
        The run's folder; metrics of `--eval-only`, none of `--dry-run`, None where the folder has them.
    """
    args = args or parse_args(argv)
    if args.report:
        from timm_amf.report import check_installed, report  # what it takes is imported only where it is asked for

        check_installed()
    if args.finds_plan:
        from timm_amf.search.fit import fit_words  # which calls this with the Plans that it tries

        found = fit_words([*(sys.argv[1:] if argv is None else argv), '--plan', ''])
        print(found)
        return found.folder, None
    if args.budget is not None and args.epochs is None:
        from timm_amf.search.fit import epochs_within

        args.epochs = epochs_within(args)
    if args.publish:
        from timm_amf.hub.publish import check_flags  # what it takes is imported only where it is asked for

        check_flags(args)
    accelerator = build.build_accelerator(args)
    folder = build.run_folder(args, accelerator)
    resume = find_resume(args, folder)
    writes = accelerator.is_main_process and not (args.dry_run or args.eval_only)
    # A run that was killed before its first checkpoint begins again.
    over = args.overwrite or (args.resume == 'auto' and resume is None)
    with claim_folder(folder, over, resume) if writes else contextlib.nullcontext():
        metrics = _train(args, accelerator, folder, resume, after_epoch)
    if args.report and writes:
        print(report([folder]))
    if args.publish and writes:
        from timm_amf.hub.publish import publish_finished

        publish_finished(args, folder)
    return folder, metrics


def _train(
        args: argparse.Namespace,
        accelerator: Accelerator,
        folder: Path,
        resume: Optional[Path],
        after_epoch: Optional[Callable[[int, Optional[float]], None]],
) -> Optional[dict[str, float]]:
    args.split_file = str(resume.parent / 'split.csv') if resume else None
    train_set, val_set = build.build_data(args, accelerator, build.known_classes(args, resume))
    model = build.build_model(args, train_set.num_classes)
    set_class_names(model, train_set.class_names)
    model = build.place_model(model, args, accelerator)
    if not (args.pretrained or args.initial_checkpoint or resume):
        accelerator.print(
            f'{args.model} starts from random weights; for trained ones add --pretrained, or --pretrained-path FILE')
    train_loader, val_loader = build.build_loaders(args, model, train_set, val_set, accelerator)

    lr = resolve_lr(args, args.batch_size * accelerator.num_processes * args.grad_accum_steps)
    plan = plan_from_args(args, model_roles(model), lr)
    table = resolve(model, plan)
    if resume is None and not args.eval_only:
        build.set_start(model, table, args, train_set.num_classes)
        start_head(model, args, train_set, accelerator, table)
    keeps_start = (args.wise_ft or args.head_start == 'probe') and not (args.dry_run or args.eval_only)
    start = copy.deepcopy(model.state_dict()) if keeps_start and resume is None else None
    if add_lora(model, table, args.seed):
        table = resolve(model, plan)
    optimizer = create_optimizer(model, table)
    mixup = build.build_mixup(args, model.num_classes)
    branch_loss = args.branch_loss
    if branch_loss is None:  # without it, a branch that fits the images first leaves the others no gradient
        branch_loss = float('branch_loss' in method_of(model).takes)
    task = AdaptiveTask(
        model, RunSettings(plan, branch_loss, args.policy_balance), device=accelerator.device,
        criterion=create_criterion(args, mixup is not None, train_set))
    trainer = Trainer(args, accelerator, task, table, optimizer, train_loader, val_loader, folder, mixup)

    accelerator.print(describe_groups(optimizer.param_groups))
    accelerator.print(describe_depths(model, table), end='')
    if args.dry_run:
        return {}
    if resume is not None:
        trainer.resume(resume)
    elif args.head_start == 'probe' and not args.eval_only:
        trainer.start = trainer.evaluate_now()
        accelerator.print(f'frozen features, logistic regression: {trainer.report(trainer.start)}')
    if args.eval_only:
        metrics = trainer.evaluate_now()
        if not math.isfinite(metrics['loss']):
            raise UserError('the evaluation loss is not finite: the weights are damaged or not those of this model')
        accelerator.print(trainer.report(metrics))
        if args.routing_eps is not None:
            accelerator.print(trainer.report_routing(args.routing_eps))
        return metrics

    def begin() -> None:
        nonlocal start
        if accelerator.is_main_process:
            prepare_folder(folder, resume)
            if keeps_start:
                prepare_mix(folder, start)
            if trainer.epoch < trainer.epochs or not (folder / 'args.yaml').exists():  # else it stays what trained it
                save_args(args, folder / 'args.yaml')
                plan.to_yaml(folder / 'plan.yaml')
                write_environment(folder, accelerator)
            if train_set.drawn and not (folder / 'split.csv').exists():
                write_splits(folder / 'split.csv', train_set.drawn)
        start = None  # a copy of the network on the device
        accelerator.wait_for_everyone()
        build.start_trackers(args, accelerator, plan)

    trainer.train(begin, after_epoch)
    for trained in filter(None, (model, task.ema_model)):
        merge_lora(trained)
    if args.wise_ft and trainer.epoch >= trainer.total_epochs:
        accelerator.print(mix_with_start(trainer))
    trainer.write_compact()
    accelerator.end_training()
    accelerator.print(trainer.closing_line())
    return None


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run `train` as a command; see `errors.run_command` for the exit codes."""
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word != '--traceback']
    return run_command('train_amf.py', lambda: train(words) and None, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main())
