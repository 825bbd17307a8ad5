"""SpotTune over architectures of every module of timm; as a script it writes docs/spottune_architectures.csv.

    OMP_NUM_THREADS=1 python tests/models/spottune_sweep.py --file all.csv          # all of them, anew
    OMP_NUM_THREADS=1 python tests/models/spottune_sweep.py --names resnet50        # a row of the file anew

Rows that are already in the file are not computed again. Each architecture has a process of its own, with limits of
time and memory (`--seconds`, `--gib`).
"""
import argparse
import copy
import csv
import multiprocessing
import resource
import sys
from collections import Counter
from pathlib import Path

import timm
import torch
from architectures import ARCHITECTURES, MORE_ARCHITECTURES

import timm_amf
from timm_amf.errors import UserError
from timm_amf.models.blocks import probe_part
from timm_amf.models.parts import Part

FILE = Path(__file__).resolve().parents[2] / 'docs' / 'spottune_architectures.csv'
COLUMNS = ('module', 'architecture', 'px', 'routed', 'not_routed', 'parameters_m', 'refused')
NAMES = sorted([*ARCHITECTURES.values(), *MORE_ARCHITECTURES], key=timm.models._registry._model_to_module.get)
BATCH = 3
SIZES = (64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
POLICY = 'test_efficientnet'
# Parameters above which float64 asks for too much memory.
LARGE = 7e8
TOLERANCE = {'float64': 1e-6, 'float32': 1e-3}


def spread(model):
    """Makes the copies of each block differ, and every layer count: many networks begin with layers that do nothing."""
    frozen = {p for block in model.blocks_frozen for p in block.parameters()}
    with torch.no_grad():
        for p in model.backbone.parameters():
            if p.numel() == max(p.shape, default=1):
                p.add_(torch.randn_like(p), alpha=0.1)
            elif p not in frozen:
                p.mul_(1 + 0.2 * torch.randn_like(p))
        for name, buffer in model.backbone.named_buffers():
            if name.endswith('running_mean'):
                buffer.add_(torch.randn_like(buffer), alpha=0.1)
            elif name.endswith('running_var'):
                buffer.mul_(0.75 + 0.5 * torch.rand_like(buffer))
        # Some draw the classifier so small that its bias is all that shows.
        head = model.get_classifier()
        for layer in head if isinstance(head, (tuple, list)) else [head]:
            for p in layer.parameters():
                p.normal_(std=0.1)


def without_dropout(model):
    """No random numbers but the policy's: the two ways of computing draw others in another order."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.
        for name in ('drop_prob', 'drop_rate', 'drop_path_rate', 'drop_path_prob'):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.)
    return model


def error(got, expected):
    """The largest difference, of the largest value."""
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def fixed_shares(model, shares):
    """All forward passes take these decisions."""
    model.forward_shares = lambda x: shares.to(x)


@torch.no_grad()
def check_evaluation(model, x):
    """The outputs and levels of `routed` against those of `both`; the larger error."""
    shares = (torch.rand(len(x), len(model.block_names)) > 0.5).float()
    fixed_shares(model, shares)
    results = []
    for model.routing in ('both', 'routed'):
        levels = [model(x)]
        if hasattr(model.backbone, 'forward_intermediates'):
            try:
                levels += model.forward_intermediates(x, intermediates_only=True)
            except UserError as e:
                assert 'within its blocks' in str(e), e
        results.append(levels)
    fixed_shares(model, 1 - shares)
    others = model(x)
    del model.forward_shares
    assert error(others, results[0][0]) > 1e-4, 'the two copies compute the same'
    return max(error(routed, both) for both, routed in zip(*results, strict=True))


def check_training(model, x):
    """One step with the frozen path frozen: gradients of `routed` against those of `both`; the largest error."""
    timm_amf.apply_freeze(model, timm_amf.Plan(lr=0.1))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    gradients = []
    for routing in ('both', 'routed'):
        for n, b in model.named_buffers():
            b.copy_(buffers[n])
        model.zero_grad()
        model.routing = routing
        torch.manual_seed(1)
        y = model(x)
        (y * torch.randn_like(y)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    none = [n for n, g in gradients[1].items() if g is None and gradients[0][n] is not None]
    assert not none, f'no gradient: {none[:3]}'
    both, routed = ({n: g for n, g in grads.items() if g is not None} for grads in gradients)
    assert all(g.isfinite().all() for g in routed.values()), 'a gradient that is not finite'
    # Some gradients are truly zero (the bias before a norm), and their noise says nothing.
    least = 1e-6 * max(g.abs().max() for g in both.values())
    worst = max(((routed[n] - g).abs().max() / g.abs().max().clamp(min=least)).item() for n, g in both.items())
    assert any(g.abs().max() > 0 for n, g in routed.items() if n.startswith('policy.')), 'the policy does not learn'

    before = [copy.deepcopy(block.state_dict()) for block in model.blocks_frozen]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    for block, old in zip(model.blocks_frozen, before):
        assert all(torch.equal(t, old[n]) for n, t in block.state_dict().items()), 'the frozen path moved'
    return worst


def smallest_size(name):
    """The smallest input that an architecture takes, and what its probe then says.

    Raises:
        UserError: If it cannot be routed.
    """
    own = max(timm.get_pretrained_cfg(name).input_size[-2:])
    problem = None
    for size in sorted({*(s for s in SIZES if s <= own), own}):
        try:
            probe = probe_part(Part(name).sized((size, size)), (3, size, size))
            probe.require_blocks()
            return size, probe
        except UserError as e:
            problem = e
            if 'fails on' not in str(e) and 'cannot be built' not in str(e):
                raise
    raise problem


def check_architecture(name):
    """A row of the table."""
    row = dict(name=name, module=timm.models._registry._model_to_module[name])
    try:
        size, probe = smallest_size(name)
        row.update(size=size, blocks=len(probe.blocks), unroutable=Counter(probe.refused.values()))
        torch.manual_seed(0)
        model = without_dropout(timm.create_model(
            'spottune', backbone=name, policy=POLICY, num_classes=10, img_size=size, policy_input_size=64))
    except UserError as e:
        return dict(row, refused=str(e))
    row['params'] = sum(p.numel() for p in model.parameters())
    spread(model)
    x = torch.randn(BATCH, 3, size, size)
    row['eval_error'] = check_evaluation(model.eval(), x)
    # Without rounding that counts, which batch norms over three images enlarge; memory permitting.
    row['dtype'] = 'float64' if row['params'] < LARGE else 'float32'
    dtype = getattr(torch, row['dtype'])
    row['grad_error'] = check_training(model.to(dtype).train(), x.to(dtype))
    return row


def problem(row):
    """What is wrong with an architecture that was not refused; nothing if all is well."""
    if 'failure' in row:
        return row['failure']
    if not row['eval_error'] < 1e-4:
        return f'outputs differ by {row["eval_error"]:.1e}'
    if not row['grad_error'] < TOLERANCE[row['dtype']]:
        return f'gradients differ by {row["grad_error"]:.1e}'
    return ''


def _child(name, connection, gib):
    resource.setrlimit(resource.RLIMIT_AS, (gib << 30, gib << 30))
    try:
        row = check_architecture(name)
    except Exception as e:  # whatever an architecture raises belongs into its row
        row = dict(name=name, module=timm.models._registry._model_to_module[name],
                   failure=f'{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ""}'[:200])
    connection.send(row)


def check_within_limits(name, seconds, gib):
    """`check_architecture` in a process of its own."""
    context = multiprocessing.get_context('fork')
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, send, gib))
    process.start()
    send.close()
    try:
        row = receive.recv() if receive.poll(seconds) else None
        reason = f'took more than {seconds} s'
    except EOFError:
        row, reason = None, f'ended without a result (it may use {gib} GiB)'
    process.kill()
    process.join()
    return row or dict(name=name, module=timm.models._registry._model_to_module[name], failure=reason)


def told(row):
    """The row of the file."""
    refused = row.get('refused') or problem(row)
    found = dict(module=row['module'], architecture=row['name'], refused=refused)
    if not refused:
        why = '; '.join(f'{count}: {reason}' for reason, count in row['unroutable'].items())
        found.update(
            px=row['size'], routed=row['blocks'], not_routed=why, parameters_m=f'{row["params"] / 1e6:.1f}')
    return {column: str(found.get(column, '')) for column in COLUMNS}


def read(file=FILE):
    """Its rows by the name of the architecture."""
    with open(file, newline='', encoding='utf-8') as f:
        return {row['architecture']: row for row in csv.DictReader(f)}


def write(rows, file):
    with open(file, 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description='SpotTune over the architectures of timm.')
    parser.add_argument('--file', default=FILE, type=Path, metavar='CSV', help='its rows are not computed again')
    parser.add_argument('--names', nargs='+', metavar='NAME', help='architectures to do again')
    parser.add_argument('--seconds', type=int, default=300, help='limit for each architecture')
    parser.add_argument('--gib', type=int, default=24, help='limit of address space for each architecture')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(args.file) if args.file.exists() else {}
    worst = Counter()
    for name in args.names or [n for n in NAMES if n not in rows]:
        row = check_within_limits(name, args.seconds, args.gib)
        rows[name] = told(row)
        write([rows[n] for n in NAMES if n in rows], args.file)
        print(name, rows[name]['refused'] or 'works', file=sys.stderr, flush=True)
        if not rows[name]['refused']:
            for key, error in (('eval', row['eval_error']), (f'gradient, {row["dtype"]}', row['grad_error'])):
                worst[key] = max(worst[key], error)
    refused = sum(bool(row['refused']) for row in rows.values())
    print(f'{len(rows)} architectures of {len({row["module"] for row in rows.values()})} modules of timm '
          f'{timm.__version__}: {len(rows) - refused} work, {refused} do not; largest errors {dict(worst)}')


if __name__ == '__main__':
    main()
