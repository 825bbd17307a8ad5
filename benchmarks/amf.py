"""What an AMF costs against its parts: training steps, reduced precision, routed evaluation.

    python benchmarks/amf.py
    python benchmarks/amf.py --only eval --device cuda --batch-size 64

train: a training step of an AMF against the sum of its parts, plain timm networks of the same architectures that each
    run alone on the same input: every branch (pooled features), the policy (logits), the classifier with the loss. Both
    the bare model and the model in `AdaptiveTask`, as `train_amf.py` trains it. Limit 1.03. On a CPU, as there, with
    `keep_freed_memory`; `--plain-malloc` shows what goes to the system without it, more for a step with more memory.
eval: evaluation in channels_last with bf16 autocast against contiguous fp32. Limit 0.55, which needs bf16 arithmetic in
    the processor (AMX or AVX-512 BF16, or a GPU) and kernels that use it.
routing: routed evaluation against the arithmetic, the policy and the classifier once and of each branch the share of
    the images that it runs for, at its cost an image in a full batch. The policy is random, and its bias is set so that
    each branch has the larger weight for half of the images. Limit 1.05.
"""
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

import timm
import torch
import torch.nn.functional as F
from _timing import Row, create_parser, interleave, parse, per_round, report
from torch import Tensor, nn

import timm_amf  # noqa: F401  registers the models
from timm_amf.engine.memory import keep_freed_memory
from timm_amf.engine.task import AdaptiveTask
from timm_amf.models.routing import kept_branches

TRAIN_LIMIT, EVAL_LIMIT, ROUTING_LIMIT = 1.03, 0.55, 1.05
CLASSES = 10
# Title -> (backbones, policy, side in pixels, batch size).
LARGE = {'amf_resnet18x2': (('resnet18', 'resnet18'), 'resnet10t', 128, 16)}
SMALL = {'amf of two resnet10t': (('resnet10t', 'resnet10t'), 'mobilenetv3_small_050', 96, 8)}
TINY = {'amf of two test_resnet': (('test_resnet', 'test_resnet'), 'test_resnet', 32, 4)}


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = create_parser(__doc__, rounds=15)
    parser.add_argument('--only', nargs='+', choices=('train', 'eval', 'routing'), default=('train', 'eval', 'routing'))
    parser.add_argument('-b', '--batch-size', type=int, help='instead of the batch sizes of the cases')
    parser.add_argument('--img-size', type=int, help='instead of the image sizes of the cases')
    parser.add_argument('--plain-malloc', action='store_true', help='let the C library return freed memory')
    args = parse(parser, argv)
    if args.device.type == 'cpu' and not args.plain_malloc:
        keep_freed_memory()
    print(f'{describe(args.device)}; {args.threads} thread(s), {args.clock} time, {args.rounds} rounds')
    passed = True
    for title, (backbones, policy, size, batch) in (TINY if args.quick else {**LARGE, **SMALL}).items():
        case = backbones, policy, args.img_size or size, args.batch_size or batch
        name = f'{title}, {case[2]} px, batch {case[3]}'
        if 'train' in args.only:
            passed &= report(f'train step: {name}', train_rows(*case, args))
    for title, (backbones, policy, size, batch) in (TINY if args.quick else LARGE).items():
        case = backbones, policy, args.img_size or size, args.batch_size or (batch if args.quick else 32)
        name = f'{title}, {case[2]} px, batch {case[3]}'
        if 'eval' in args.only:
            passed &= report(f'evaluation: {name}', eval_rows(*case, args))
        if 'routing' in args.only:
            passed &= report(f'routed evaluation: {name}', routing_rows(*case, args))
    return int(args.check and not passed and not args.quick)


def describe(device: torch.device) -> str:
    """The device, and of a CPU what bf16 arithmetic it has."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    flags = Path('/proc/cpuinfo').read_text().split() if Path('/proc/cpuinfo').exists() else []
    have = [name for name in ('avx512f', 'avx512_bf16', 'amx_bf16') if name in flags]
    return f'CPU with {", ".join(have) or "no AVX-512"}'


def create_amf(backbones: Sequence[str], policy: str, device: torch.device) -> nn.Module:
    return timm.create_model('amf', backbones=backbones, policy=policy, num_classes=CLASSES).to(device)


def create_parts(backbones: Sequence[str], policy: str, device: torch.device) -> dict[str, nn.Module]:
    """Plain networks, none of which knows of the others."""
    parts = {f'branch.{i}': timm.create_model(name, num_classes=0) for i, name in enumerate(backbones)}
    parts['policy'] = timm.create_model(policy, num_classes=len(backbones))
    parts['classifier'] = nn.Linear(sum(parts[f'branch.{i}'].num_features for i in range(len(backbones))), CLASSES)
    return {name: part.to(device) for name, part in parts.items()}


# -- training ---------------------------------------------------------------------------------------------------------

def train_rows(backbones, policy, size, batch, args) -> list[Row]:
    x = torch.randn(batch, 3, size, size, device=args.device)
    target = torch.randint(CLASSES, (batch,), device=args.device)
    model, parts = create_amf(backbones, policy, args.device), create_parts(backbones, policy, args.device)
    task = AdaptiveTask(create_amf(backbones, policy, args.device), device=args.device)
    features = torch.randn(batch, parts['classifier'].in_features, device=args.device)
    losses = {
        'amf': (model, lambda: F.cross_entropy(model(x), target)),
        'task': (task.model, lambda: task(x, target)['loss']),
        'classifier': (parts['classifier'], lambda: F.cross_entropy(
            parts['classifier'](features.detach().requires_grad_()), target)),
        **{name: (part, lambda part=part: part(x)) for name, part in parts.items() if name != 'classifier'},
    }
    sides = {}
    for name, (network, forward) in losses.items():
        sides[name] = backward_step(network, forward)
        sides[f'{name} + update'] = backward_step(network, forward, updates=True)
    sides['control'] = sides['amf']
    task.train()
    times = interleave(sides, args)
    rows = [Row('control: amf / amf', per_round(lambda a, b: a / b, times['control'], times['amf']))]
    for label, suffix in (('forward + backward', ''), ('forward + backward + update', ' + update')):
        alone = per_round(lambda *t: sum(t), *(times[name + suffix] for name in parts))
        for name in ('amf', 'task'):
            ratios = per_round(lambda a, b: a / b, times[name + suffix], alone)
            rows.append(Row(f'{label}: {name} / sum of parts', ratios, TRAIN_LIMIT))
    shares = {name: sum(times[name]) / sum(times['amf']) for name in parts}
    rows[0] = Row(rows[0].name, rows[0].values, note=', '.join(f'{n} {s:.0%}' for n, s in shares.items()))
    return rows


def backward_step(network: nn.Module, forward: Callable[[], Tensor], updates: bool = False) -> Callable[[], None]:
    """Forward and backward of a loss, or from a gradient of ones where there is no loss; SGD with momentum."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        output = forward()
        output.backward(torch.ones_like(output))
        if updates:
            optimizer.step()
        optimizer.zero_grad()

    return step


# -- evaluation -------------------------------------------------------------------------------------------------------

def eval_rows(backbones, policy, size, batch, args) -> list[Row]:
    contiguous = create_amf(backbones, policy, args.device).eval()
    last = create_amf(backbones, policy, args.device).eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=args.device)
    x_last = x.to(memory_format=torch.channels_last)

    def side(model: nn.Module, x: Tensor, bf16: bool) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=bf16):
                model(x)
        return run

    times = interleave({
        'fp32': side(contiguous, x, False),
        'control: fp32 / fp32': side(contiguous, x, False),
        'channels_last / fp32': side(last, x_last, False),
        'bf16 autocast / fp32': side(contiguous, x, True),
        'channels_last + bf16 autocast / fp32': side(last, x_last, True),
    }, args)
    base = times.pop('fp32')
    limits = {'channels_last + bf16 autocast / fp32': EVAL_LIMIT}
    return [Row(name, per_round(lambda a, b: a / b, t, base), limits.get(name)) for name, t in times.items()]


# -- routed evaluation ------------------------------------------------------------------------------------------------

@torch.no_grad()
def routing_rows(backbones, policy, size, batch, args) -> list[Row]:
    model = create_amf(backbones, policy, args.device).eval()
    parts = {name: part.eval() for name, part in create_parts(backbones, policy, args.device).items()}
    x = torch.randn(batch, 3, size, size, device=args.device)
    features = torch.randn(batch, parts['classifier'].in_features, device=args.device)
    share_images(model, x)
    weights = model.forward_policy(x)
    second = weights.topk(2, dim=1).values[:, 1].quantile(0.5).item()
    cases = {'one branch an image (eps 1)': 1., f'between (eps {second:.4f})': second, 'all branches (eps 0)': 0.}

    def routed(eps: Optional[float]) -> Callable[[], None]:
        def run() -> None:
            model.set_routing(eps)
            model(x)
        return run

    sides = {name: (lambda part=part: part(features if part is parts['classifier'] else x))
             for name, part in parts.items()}
    sides |= {name: routed(eps) for name, eps in cases.items()} | {'dense': routed(None), 'control': routed(None)}
    with torch.inference_mode():
        times = interleave(sides, args)
    rows = [Row('control: dense / dense', per_round(lambda a, b: a / b, times['control'], times['dense']))]
    for name, eps in cases.items():
        shares = kept_branches(weights, eps).float().mean(0).tolist()
        factors = [shares[int(part.split('.')[1])] if part.startswith('branch.') else 1. for part in parts]
        expected = per_round(lambda *t, f=factors: sum(a * b for a, b in zip(f, t)), *(times[part] for part in parts))
        rows.append(Row(
            f'{name} / arithmetic', per_round(lambda a, b: a / b, times[name], expected), ROUTING_LIMIT,
            note=f'{sum(shares):.2f} branches an image'))
    rows.append(Row('one branch an image / dense', per_round(
        lambda a, b: a / b, times['one branch an image (eps 1)'], times['dense'])))
    return rows


def share_images(model: nn.Module, x: Tensor) -> None:
    """Move the policy's bias so that each of two branches has the larger weight for half of the images."""
    logits = model.policy.forward_logits(x)
    model.policy.get_classifier().bias[0] -= (logits[:, 0] - logits[:, 1]).quantile(0.5)


if __name__ == '__main__':
    sys.exit(main())
