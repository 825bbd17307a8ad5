"""What a block-wise search costs: all candidates in lockstep against one after the other.

    python benchmarks/block_search.py
    python benchmarks/block_search.py --device cuda --models resnet50

A training step of every block of the network and of the classifier alone, on the same batch. One after the other: each
in the plain network, all else frozen (`requires_grad=False`, norms in evaluation mode), as a search is usually
written. In lockstep: all in one frozen network, at once or in chunks. Limits: 1 / 2.4 of the time in full lockstep,
1 / 2.2 in chunks of 6; 5.5 and 3.2 times what a full fine-tuning step keeps for its backward pass.
"""
import copy
import sys
from collections.abc import Callable, Sequence
from typing import Optional

import timm
import torch
import torch.nn.functional as F
from _timing import Row, create_parser, interleave, parse, per_round, report
from torch import nn

from timm_amf.engine.memory import keep_freed_memory, saved_bytes
from timm_amf.models.blocks import classifiers, probe_units
from timm_amf.search.candidates import Candidate, Traced, candidate_parameters
from timm_amf.search.lockstep import Lockstep, Member, create_member
from timm_amf.tuning.freeze import freeze_norm
from timm_amf.tuning.resolve import running_norms

SIZES = {'resnet50': 96, 'mobilenetv2_100': 128}
LIMITS = dict(full=1 / 2.4, chunks=1 / 2.2, memory=5.5, chunk_memory=3.2)
CHUNK = 6


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = create_parser(__doc__, rounds=5)
    parser.add_argument('--models', nargs='+', default=list(SIZES), help='timm architectures')
    parser.add_argument('--img-size', type=int, help='pixels (default: 96 for resnet50, 128 for mobilenetv2_100)')
    parser.add_argument('-b', '--batch-size', type=int, default=4, help="images (default: 4, the paper's)")
    args = parse(parser, argv)
    if args.quick:
        args.models, args.img_size, args.batch_size = ['test_resnet'], 32, 2
    if args.device.type == 'cpu':
        keep_freed_memory()  # as train_amf.py and the search do, for both sides
    passed = all([measure(args, name) for name in args.models])
    return int(args.check and not passed and not args.quick)


def measure(args, name: str) -> bool:
    size = args.img_size or SIZES.get(name, 128)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).to(args.device, memory_format=torch.channels_last)
    model.requires_grad_(False).eval()
    x = torch.randn(args.batch_size, 3, size, size, device=args.device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (args.batch_size,), device=args.device)
    candidates = [*Traced(model, (3, size, size)).blocks(), Candidate('classifier', 'classifier', 0, ())]
    alone = [usual(model, c, x, y) for c in candidates]
    probe = probe_units(model, (3, size, size))
    (head,) = classifiers(model)

    def lockstep(chosen: Sequence[Candidate]) -> tuple[Lockstep, Callable[[], None]]:
        members = [create_member(model, c, head, candidate_parameters(model, c), probe) for c in chosen]
        net = Lockstep(model, probe, members)
        return net, stepper(lambda: net(x), members, y)

    full, full_step = lockstep(candidates)
    backwards = candidates[::-1]
    chunks = [lockstep(backwards[i:i + CHUNK]) for i in range(0, len(backwards), CHUNK)]
    last = lockstep(candidates[-2:-1])
    sides = {
        'alone': lambda: [run() for run in alone],
        'lockstep': full_step,
        'chunks': lambda: [run() for _, run in chunks],
        'last alone': alone[-2],
        'last lockstep': last[1],
        'control': lambda: [run() for run in alone],
    }
    times = interleave(sides, args, warmup=1)

    def ratio(a: str, b: str) -> list[float]:
        return per_round(lambda p, q: p / q, times[a], times[b])

    whole = copy.deepcopy(model).requires_grad_(True).train()
    step = saved_bytes(lambda: whole(x))
    return report(f'{name}, {size} px, batch {args.batch_size}: {len(candidates)} candidates', [
        Row('one after the other', times['alone'], unit=' s'),
        Row('control: one after the other / the same', ratio('control', 'alone')),
        Row('lockstep / one after the other', ratio('lockstep', 'alone'), LIMITS['full'], '1/2.4'),
        Row(f'chunks of {CHUNK} / one after the other', ratio('chunks', 'alone'), LIMITS['chunks'], '1/2.2'),
        Row('last block: lockstep / alone', ratio('last lockstep', 'last alone')),
        Row('kept for backward: lockstep / full fine-tuning', [saved_bytes(lambda: full(x)) / step], LIMITS['memory']),
        Row(f'kept for backward: largest chunk of {CHUNK}', [
            max(saved_bytes(lambda net=net: net(x)) for net, _ in chunks) / step], LIMITS['chunk_memory']),
    ])


def usual(model: nn.Module, candidate: Candidate, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """A step of one candidate in a network of its own."""
    net = copy.deepcopy(model)
    for name in candidate_parameters(net, candidate):
        net.get_parameter(name).requires_grad_(True)
    (head,) = classifiers(net)
    head.requires_grad_(True)
    for norm in running_norms(net).values():
        if not any(p.requires_grad for p in norm.parameters()):
            freeze_norm(norm)
    net.train()
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=1e-5, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return run


def stepper(forward: Callable[[], dict], members: Sequence[Member], y: torch.Tensor) -> Callable[[], None]:
    """A step of members that share a network."""
    for member in members:
        member.train()
    optimizers = [torch.optim.SGD(m.params.values(), lr=1e-5, momentum=0.9) for m in members]

    def run() -> None:
        torch.stack([F.cross_entropy(logits, y) for logits in forward().values()]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return run


if __name__ == '__main__':
    sys.exit(main())
