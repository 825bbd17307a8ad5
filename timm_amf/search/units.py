"""Where in a network candidates of a search may differ: found by watching one forward pass."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from timm_amf.models.block_probe import in_eval, tensor_problem
from timm_amf.models.blocks import classifiers, list_blocks
from timm_amf.models.folding import find_pairs

__all__ = ['Probe', 'pairs_below', 'probe_units']

# Of the pass that is watched.
_BATCH = 3


@dataclass
class Probe:
    """What one forward pass told of a network.

    Attributes:
        order: Units by name, in order of execution: those that take and give one tensor, batch first, once a pass.
        refused: The other places with weights, and why each can be none.
        pairs: Names of convolutions and of the batch norms that alone read them.
    """
    order: list[str]
    refused: dict[str, str]
    pairs: list[tuple[str, str]]


def _places(model: nn.Module) -> list[str]:
    """Blocks, and the outermost modules with weights that hold none of them, without the classifier."""
    blocks = set(list_blocks(model))
    heads = {id(m) for m in classifiers(model)}

    def walk(path: str, module: nn.Module) -> list[str]:
        if path in blocks:
            return [path]
        holds = any(b.startswith(f'{path}.' if path else '') for b in blocks)
        holds = holds or any(id(m) in heads for m in module.modules())
        if path and not holds:
            return [path] if next(module.parameters(), None) is not None else []
        children = ((f'{path}.{n}' if path else n, m) for n, m in module.named_children() if id(m) not in heads)
        return [found for child, m in children for found in walk(child, m)]

    return walk('', model)


def probe_units(model: nn.Module, input_size: Sequence[int]) -> Probe:
    """Watch one forward pass.

    Args:
        model: A timm model; its parameters, buffers and modes are left as they are.
        input_size: (C, H, W) of the input.
    """
    places = _places(model)
    seen: dict[str, list[str]] = {name: [] for name in places}
    order: list[str] = []

    def before(name):
        def hook(module, args):
            versions[name] = args[0]._version if args and torch.is_tensor(args[0]) else None
        return hook

    def after(name):
        def hook(module, args, kwargs, output):
            order.append(name)
            seen[name].append(tensor_problem(args, output, versions[name], _BATCH))
        return hook

    versions: dict[str, Optional[int]] = {}
    hooks = []
    for name in places:
        module = model.get_submodule(name)
        hooks += [module.register_forward_pre_hook(before(name)),
                  module.register_forward_hook(after(name), with_kwargs=True)]
    first = next(model.parameters())
    try:
        with in_eval(model), torch.enable_grad(), torch.random.fork_rng(), find_pairs(model) as finder:
            x = torch.randn(_BATCH, *input_size, device=first.device, dtype=first.dtype).requires_grad_(True)
            result = model.forward_features(x)
            logits = model.forward_head(result)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = finder.pairs(logits) if torch.is_tensor(logits) else []
    refused = {}
    for name in places:
        problems = seen[name] or ['is not run']
        reason = next((p for p in problems if p), '' if len(problems) == 1 else f'runs {len(problems)} times an image')
        if reason:
            refused[name] = reason
    return Probe([n for n in order if n not in refused], refused, pairs)


def pairs_below(pairs: Iterable[tuple[str, str]], path: str) -> list[tuple[str, str]]:
    """The pairs within a module, by their names in it."""
    prefix = f'{path}.'
    return [(c[len(prefix):], n[len(prefix):]) for c, n in pairs if c.startswith(prefix) and n.startswith(prefix)]
