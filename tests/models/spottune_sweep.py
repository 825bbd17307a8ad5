"""SpotTune over architectures of every module of timm; as a script it writes the table of the documentation.

    OMP_NUM_THREADS=1 python tests/models/spottune_sweep.py --table docs/spottune_architectures.md --rows rows.jsonl

Rows that are already in the file of `--rows` are not computed again. Each architecture has a process of its own, with
limits of time and memory (`--seconds`, `--gib`).
"""
import argparse
import copy
import json
import multiprocessing
import resource
import sys
import textwrap
from collections import Counter
from pathlib import Path

import timm
import torch
from architectures import ARCHITECTURES, MORE_ARCHITECTURES

import timm_amf
from timm_amf.errors import UserError
from timm_amf.models.blocks import probe_part
from timm_amf.models.parts import Part

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


PAGE = """# Architectures that SpotTune routes

Written by `tests/models/spottune_sweep.py`: {count} small architectures, one to three of each of the {modules} model
modules of timm {version}. {works} work, {refused} are refused, {failed} fail.

Each was built with `timm.create_model('spottune', backbone=...)`, its copies were made unlike, and it was run on three
images of the smallest size, from 64 px on, that it takes. Outputs and intermediate features of `routed` and `both` were
compared in evaluation (float32; the largest error was {eval_error:.0e} of the largest value), then the gradients of
every trainable parameter in training with the frozen path frozen (float64; {grad_error:.0e} of each parameter's
largest). Too large for float64 in the memory at hand, and in float32: {others}. After a step the frozen path was as
before. Parameters count both copies, the policy and a classifier of 10 classes. A block that cannot be routed exists
once and belongs to the stem.
"""


def table(rows):
    """The page of the documentation."""
    works = [r for r in rows if 'refused' not in r and not problem(r)]
    refused = [r for r in rows if 'refused' in r]
    failed = [r for r in rows if 'refused' not in r and problem(r)]
    page = PAGE.format(
        count=len(rows),
        modules=len({r['module'] for r in rows}),
        version=timm.__version__,
        works=len(works),
        refused=len(refused),
        failed=len(failed),
        eval_error=max(r['eval_error'] for r in works),
        grad_error=max(r['grad_error'] for r in works if r['dtype'] == 'float64'),
        others=', '.join(f"`{r['name']}` {r['grad_error']:.0e}" for r in works if r['dtype'] == 'float32') or 'none',
    )
    lines = ['\n\n'.join(textwrap.fill(p, 120, break_on_hyphens=False) for p in page.split('\n\n')), '']
    lines += ['| module | architecture | px | routed | not routed, why | parameters |', '|---|---|---|---|---|---|']
    for r in works:
        why = '; '.join(f'{count}: {reason}' for reason, count in r['unroutable'].items())
        lines.append(
            f'| {r["module"]} | `{r["name"]}` | {r["size"]} | {r["blocks"]} | {why} | {r["params"] / 1e6:.1f} M |')
    for title, those in (('Refused', refused), ('Failing', failed)):
        if those:
            lines += ['', f'## {title}', '', '| module | architecture | why |', '|---|---|---|']
            lines += [f'| {r["module"]} | `{r["name"]}` | {r.get("refused") or problem(r)} |' for r in those]
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description='SpotTune over the architectures of timm.')
    parser.add_argument('--table', metavar='MD', help='page to write')
    parser.add_argument('--rows', metavar='JSONL', default='spottune_rows.jsonl', help='results, which are added to')
    parser.add_argument('--names', nargs='+', metavar='NAME', help='architectures to do again; all if not given')
    parser.add_argument('--seconds', type=int, default=300, help='limit for each architecture')
    parser.add_argument('--gib', type=int, default=24, help='limit of address space for each architecture')
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = Path(args.rows)
    rows = {r['name']: r for r in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    names = sorted([*ARCHITECTURES.values(), *MORE_ARCHITECTURES], key=timm.models._registry._model_to_module.get)
    for name in args.names or [n for n in names if n not in rows]:
        rows[name] = check_within_limits(name, args.seconds, args.gib)
        with file.open('a') as f:
            f.write(json.dumps(rows[name]) + '\n')
        print(name, rows[name].get('refused') or problem(rows[name]) or 'works', file=sys.stderr, flush=True)
    if args.table:
        Path(args.table).write_text(table([rows[n] for n in names if n in rows]))


if __name__ == '__main__':
    main()
