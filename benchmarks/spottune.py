"""What routing costs against the plain network: evaluation, training steps, memory kept for the backward pass.

    python benchmarks/spottune.py
    python benchmarks/spottune.py --only train --device cuda --batch-size 32

eval: a SpotTune with random decisions against the plain network of the same weights, in channels_last. `routed`
    without the policy: at most 1.03 at batch 1, 1.15 at 8, 1.20 at 32; at most 1.03 where all images agree; at most
    0.60 of computing both copies. The policy network: at most 0.22 of the plain network.
train: a step of a SpotTune, policy included, against a full fine-tuning step of the plain network. With the norms of
    the tuned path in evaluation mode (of the plain network too): at most 1.55, and 0.78 of computing both; with norms
    in training mode: at most 1.80; with the stem and the first 7 blocks frozen and unrouted: at most 1.08.
memory: bytes that autograd keeps for the backward pass, parameters apart, against the plain network's: at most 1.25.
"""
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Optional

import timm
import torch
import torch.nn.functional as F
from _timing import Row, create_parser, interleave, parse, per_round, report
from torch import Tensor, nn

import timm_amf  # noqa: F401  registers the models
from timm_amf.engine.memory import keep_freed_memory
from timm_amf.tuning import Plan, apply_freeze

EVAL_LIMITS = {1: 1.03, 8: 1.15, 32: 1.20}
AGREE_LIMIT, OF_BOTH_LIMIT, POLICY_LIMIT = 1.03, 0.60, 0.22
TRAIN_LIMIT, TRAIN_OF_BOTH_LIMIT, TRAIN_MODE_LIMIT, LATE_LIMIT = 1.55, 0.78, 1.80, 1.08
MEMORY_LIMIT = 1.25
OTHERS = ('mobilenetv2_100', 'convnext_tiny', 'vit_small_patch16_224')


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = create_parser(__doc__, rounds=9)
    parser.add_argument('--only', nargs='+', choices=('eval', 'train', 'memory'), default=('eval', 'train', 'memory'))
    parser.add_argument('--backbone', default='resnet50', help='any timm model (default: resnet50)')
    parser.add_argument('--img-size', type=int, default=128, help='side in pixels (default: 128)')
    parser.add_argument('-b', '--batch-size', type=int, default=16, help='of training (default: 16)')
    args = parse(parser, argv)
    if args.quick:
        args.backbone, args.img_size, args.batch_size = 'resnet10t', 32, 4
    if args.device.type == 'cpu':
        keep_freed_memory()
    passed = True
    title = f'{args.backbone}, {args.img_size} px'
    if 'eval' in args.only:
        for batch in (2,) if args.quick else EVAL_LIMITS:
            passed &= report(f'evaluation: {title}, batch {batch}', eval_rows(args, batch))
    if 'train' in args.only:
        passed &= report(f'training step: {title}, batch {args.batch_size}', train_rows(args))
    if 'memory' in args.only:
        passed &= report(f'kept for backward: batch {args.batch_size}', memory_rows(args))
    return int(args.check and not passed and not args.quick)


def create(args, backbone: Optional[str] = None, first_block: int = 0, freeze_bn: bool = True) -> nn.Module:
    """A SpotTune in training as a Plan has it: frozen copies and stem frozen."""
    backbone = backbone or args.backbone
    fixed = timm.create_model(backbone, pretrained=False, device='meta').pretrained_cfg.get('fixed_input_size')
    model = timm.create_model(
        'spottune', backbone=backbone, policy='policy_resnet10', first_block=first_block,
        **(dict(img_size=args.img_size) if fixed else {}))
    model = model.to(args.device, memory_format=torch.channels_last).train()
    apply_freeze(model, Plan.from_dict(dict(roles=dict(tuned=dict(freeze_bn=freeze_bn)))))
    return model


def fixed_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if 'running_var' in module._buffers:
            module.eval()
    return model


def eval_rows(args, batch: int) -> list[Row]:
    model = create(args).eval()
    plain = model.compact('frozen').to(args.device, memory_format=torch.channels_last).eval()
    x = torch.randn(batch, 3, args.img_size, args.img_size, device=args.device).to(memory_format=torch.channels_last)
    shares = (torch.rand(batch, len(model.block_names), device=args.device) > 0.5).float()

    def routed(routing: str, decisions: Tensor) -> None:
        model.routing = routing
        model.forward_shares = lambda x: decisions  # the policy is timed on its own
        model(x)

    with torch.no_grad():
        times = interleave({
            'plain': lambda: plain(x),
            'control': lambda: plain(x),
            'routed': partial(routed, 'auto', shares),
            'agree': partial(routed, 'auto', shares[:1].expand(batch, -1)),
            'both': partial(routed, 'both', shares),
            'policy': lambda: model.forward_policy(x),
        }, args)
    ratio = partial(per_round, lambda a, b: a / b)
    limit = EVAL_LIMITS.get(batch)
    return [
        Row('control: plain / plain', ratio(times['control'], times['plain'])),
        Row('routed / plain', ratio(times['routed'], times['plain']), limit),
        Row('all images agree / plain', ratio(times['agree'], times['plain']), AGREE_LIMIT),
        Row('routed / both', ratio(times['routed'], times['both']), None if batch == 1 else OF_BOTH_LIMIT),
        Row('policy / plain', ratio(times['policy'], times['plain']), POLICY_LIMIT),
    ]


def train_rows(args) -> list[Row]:
    x, y = batch_of(args)
    model, in_training = create(args), create(args, freeze_bn=False)
    plain = model.compact('frozen').to(args.device, memory_format=torch.channels_last).train()
    late = None if args.quick else create(args, first_block=7)
    sides = {
        'plain': partial(step, fixed_norms(plain), x, y),
        'control': partial(step, plain, x, y),
        'both': partial(step, model, x, y, 'both'),
        'routed': partial(step, model, x, y, 'auto'),
        'train mode': partial(step, in_training, x, y, 'auto'),
    }
    if late is not None:
        sides['late'] = partial(step, late, x, y, 'auto')
    times = interleave(sides, args, warmup=1)
    ratio = partial(per_round, lambda a, b: a / b)
    rows = [
        Row('control: plain / plain', ratio(times['control'], times['plain'])),
        Row('routed / plain', ratio(times['routed'], times['plain']), TRAIN_LIMIT),
        Row('routed / both', ratio(times['routed'], times['both']), TRAIN_OF_BOTH_LIMIT),
        Row('both / plain', ratio(times['both'], times['plain'])),
        Row('norms in training mode, routed / plain', ratio(times['train mode'], times['plain']), TRAIN_MODE_LIMIT),
    ]
    if late is not None:
        rows.append(Row('first 7 blocks unrouted / plain', ratio(times['late'], times['plain']), LATE_LIMIT))
    return rows


def batch_of(args) -> tuple[Tensor, Tensor]:
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    y = torch.randint(0, 1000, (args.batch_size,), device=args.device)
    return x.to(memory_format=torch.channels_last), y


def step(model: nn.Module, x: Tensor, y: Tensor, routing: Optional[str] = None) -> None:
    if routing is not None:
        model.routing = routing
    F.cross_entropy(model(x), y).backward()
    model.zero_grad()


def memory_rows(args) -> list[Row]:
    x, y = batch_of(args)
    rows = []
    for backbone in (args.backbone, *(() if args.quick else OTHERS)):
        model = create(args, backbone)
        plain = model.compact('frozen').to(args.device, memory_format=torch.channels_last).train()
        base = kept_bytes(fixed_norms(plain), x, y)
        for routing, limit in (('both', None), ('auto', MEMORY_LIMIT)):
            model.routing = routing
            name = f'{backbone}: {"routed" if routing == "auto" else "both"} / plain'
            rows.append(Row(name, [kept_bytes(model, x, y) / base], limit))
    return rows


def kept_bytes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps, those of parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    keep: Callable[[Tensor], Tensor] = lambda t: t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, keep):
        loss = F.cross_entropy(model(x), y)
        total = sum(kept.values())
    loss.backward()
    model.zero_grad()
    return total


if __name__ == '__main__':
    sys.exit(main())
