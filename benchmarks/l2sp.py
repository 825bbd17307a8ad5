"""What L2-SP costs: a training step with decay towards the start against the same step with weight decay.

    python benchmarks/l2sp.py
    python benchmarks/l2sp.py --device cuda -b 32

Forward, backward and update of the same architecture on the same batch; on one side all of the backbone decays towards
its start, on the other towards zero. Coupled (SGD) and decoupled (AdamW). Limit: at most 1.03 of a step.
"""
import sys
from collections.abc import Callable, Sequence
from typing import Optional

import timm
import torch
import torch.nn.functional as F
from _timing import Row, create_parser, interleave, parse, per_round, report

from timm_amf import Plan, create_optimizer

LIMIT = 1.03


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = create_parser(__doc__, rounds=21)
    parser.add_argument('--model', default='resnet18', help='timm architecture (default: resnet18)')
    parser.add_argument('--img-size', type=int, default=128, help='pixels (default: 128)')
    parser.add_argument('-b', '--batch-size', type=int, default=16, help='images (default: 16)')
    args = parse(parser, argv)
    if args.quick:
        args.model, args.img_size, args.batch_size = 'test_resnet', 32, 2

    sides = {}
    for opt in ('sgd', 'adamw'):
        sides[opt] = step(args, opt)
        sides[f'{opt}, L2-SP'] = step(args, opt, dict(l2sp_alpha=0.01))
    sides['control'] = step(args, 'sgd')
    times = interleave(sides, args)

    def ratio(a: str, b: str) -> list[float]:
        return per_round(lambda x, y: x / y, times[a], times[b])

    passed = report(f'{args.model}, {args.img_size} px, batch {args.batch_size}, a training step', [
        Row('step with weight decay, sgd', [t * 1000 for t in times['sgd']], unit=' ms'),
        Row('control: sgd / sgd', ratio('control', 'sgd')),
        Row('sgd: L2-SP / weight decay', ratio('sgd, L2-SP', 'sgd'), LIMIT),
        Row('adamw: L2-SP / weight decay', ratio('adamw, L2-SP', 'adamw'), LIMIT),
    ])
    return int(args.check and not passed and not args.quick)


def step(args, opt: str, backbone: Optional[dict] = None) -> Callable[[], None]:
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=10).to(args.device)
    plan = Plan(lr=1e-5, opt=opt, weight_decay=1e-4, roles=dict(backbone=backbone or {}))
    optimizer = create_optimizer(model, plan)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    y = torch.randint(10, (args.batch_size,), device=args.device)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return run


if __name__ == '__main__':
    sys.exit(main())
