"""What the train loop of `train_amf.py` costs against a bare PyTorch loop.

    python benchmarks/train_loop.py
    python benchmarks/train_loop.py --device cuda --mixed-precision bf16

Both loops have the same architecture, batches (loaded before), loss and optimiser; the bare one is five lines with no
framework. Limits: at most 1.02 of the bare loop on a network of the size of resnet10t, and at most 0.3 ms a step more,
measured on tiny networks, where it shows, without what an epoch costs once (epochs of many steps less epochs of one).
"""
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

import timm
import torch
from _timing import Row, create_parser, interleave, parse, per_round, report
from torch import nn

import timm_amf  # noqa: F401  registers the models
from timm_amf.data.loader import Batch
from timm_amf.data.sampler import StepSampler
from timm_amf.engine.build import build_accelerator
from timm_amf.engine.loop import Trainer
from timm_amf.engine.options import parse_args
from timm_amf.engine.task import AdaptiveTask, create_criterion
from timm_amf.tuning import create_optimizer, model_roles, plan_from_args
from timm_amf.tuning.resolve import resolve

RATIO_LIMIT, OVERHEAD_LIMIT = 1.02, 0.3
CLASSES, COMPONENTS = 10, ['a', 'b']
TINY_AMF = dict(backbones=('test_resnet', 'test_resnet'), policy='test_resnet')


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = create_parser(__doc__, rounds=31)
    parser.add_argument('--mixed-precision', choices=('no', 'bf16'), default='no', help='of both loops (default: no)')
    parser.add_argument('--img-size', type=int, default=128, help='for resnet10t (default: 128)')
    parser.add_argument('-b', '--batch-size', type=int, default=16, help='for resnet10t (default: 16)')
    args = parse(parser, argv)
    few, many = (2, 4) if args.quick else (4, 20)
    passed = True
    large = 64 if args.quick else args.img_size
    for title, create, size, batch, steps, limit in (
        ('resnet10t', partial(timm.create_model, 'resnet10t'), large, args.batch_size, few, RATIO_LIMIT),
        ('one linear layer', Linear, 8, 4, many, None),
        ('AMF of test_resnet', partial(timm.create_model, 'amf', **TINY_AMF), 32, 4, many, None),
    ):
        with tempfile.TemporaryDirectory() as folder:
            rows = loop_rows(create, size, batch, steps, limit, args, folder)
        passed &= report(f'train loop: {title}, {size} px, batch {batch}, epochs of {steps} steps', rows)
    return int(args.check and not passed and not args.quick)


class Linear(nn.Module):
    """The least that trains, so that all else shows."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def loop_rows(create, size, batch, steps, limit, args, folder) -> list[Row]:
    loader = PreloadedLoader(steps, batch, size, args.device)
    bare, ours = (create(num_classes=CLASSES).to(args.device) for _ in range(2))
    trainer = create_trainer(ours, loader, args, folder)
    optimizer = create_optimizer(bare, trainer.plan)

    times = interleave({
        'bare': lambda: bare_epoch(bare, optimizer, loader, steps, args),
        'control': lambda: bare_epoch(bare, optimizer, loader, steps, args),
        'loop': lambda: trainer_epoch(trainer, steps),
        'bare, 1 step': lambda: bare_epoch(bare, optimizer, loader, 1, args),
        'loop, 1 step': lambda: trainer_epoch(trainer, 1),
    }, args)
    more = {name: per_round(lambda a, b: (a - b) * 1000, times[f'loop{name}'], times[f'bare{name}'])
            for name in ('', ', 1 step')}
    return [
        Row('bare loop, a step', [t * 1000 / steps for t in times['bare']], unit=' ms'),
        Row('control: bare / bare', per_round(lambda a, b: a / b, times['control'], times['bare'])),
        Row('control: bare - bare, a step', per_round(
            lambda a, b: (a - b) * 1000 / steps, times['control'], times['bare']), unit=' ms'),
        Row('loop / bare', per_round(lambda a, b: a / b, times['loop'], times['bare']), limit),
        Row('loop - bare, a step', per_round(lambda a, b: (a - b) / (steps - 1), more[''], more[', 1 step']),
            None if limit else OVERHEAD_LIMIT, unit=' ms'),
        Row('loop - bare, once an epoch', more[', 1 step'], unit=' ms'),
    ]


class PreloadedLoader:
    """The interface of `SeededLoader` over a few batches that lie on the device."""

    def __init__(self, steps: int, batch_size: int, size: int, device: torch.device):
        self.dataset = _Dataset(steps * batch_size)
        self.sampler = StepSampler(len(self.dataset), batch_size)
        self.batches = [
            Batch(
                torch.randn(batch_size, 3, size, size, device=device),
                torch.randint(CLASSES, (batch_size,), device=device),
                torch.randint(len(COMPONENTS), (batch_size,), device=device),
                torch.arange(batch_size, device=device),
                batch_size,
            ) for _ in range(min(steps, 8))
        ]

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.sampler.set_epoch(epoch, start_step)

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(itertools.cycle(self.batches), len(self))


class _Dataset:
    def __init__(self, length: int):
        self.length = length
        self.components = COMPONENTS

    def __len__(self) -> int:
        return self.length


def create_trainer(model: nn.Module, loader: PreloadedLoader, args, folder: str) -> Trainer:
    """The Trainer of `train_amf.py`, with its defaults but for the label smoothing."""
    argv = ['.', '--lr', '1e-4', '--smoothing', '0', '--output', folder, '--tracker', 'none']
    options = parse_args([*argv, '--mixed-precision', args.mixed_precision, *['--cpu'] * (args.device.type == 'cpu')])
    accelerator = build_accelerator(options)
    table = resolve(model, plan_from_args(options, model_roles(model), options.lr))
    task = AdaptiveTask(model, device=accelerator.device, criterion=create_criterion(options, False))
    return Trainer(
        options, accelerator, task, table, create_optimizer(model, table), loader, loader, Path(folder))


def trainer_epoch(trainer: Trainer, steps: int) -> None:
    trainer.steps = steps
    trainer.train_epoch()
    trainer.epoch, trainer.step = trainer.epoch + 1, 0


def bare_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: PreloadedLoader, steps: int, args) -> None:
    criterion = nn.CrossEntropyLoss()
    bf16 = torch.autocast(args.device.type, torch.bfloat16, enabled=args.mixed_precision == 'bf16')
    model.train()
    for images, target, *_ in itertools.islice(loader, steps):
        with bf16:
            loss = criterion(model(images), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == '__main__':
    sys.exit(main())
