"""Which blocks of an architecture can exist twice: found by one forward pass in which nothing is computed."""
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from .blocks import list_blocks
from .folding import find_pairs
from .parts import Part, meta_part, part_cfg

__all__ = ['BlockProbe', 'in_eval', 'probe_blocks', 'probe_pairs', 'tensor_problem']

# A batch size that no map, window or table of an architecture is likely to have among its dimensions.
_BATCH = 101


@dataclass(frozen=True)
class BlockProbe:
    """What a forward pass told of an architecture.

    Attributes:
        blocks: Names of the blocks that take and give one tensor, batch first, once a pass; in order of execution.
        refused: The other blocks, and why each of them cannot be routed.
        pairs: Names of convolutions and the batch norms that alone read them.
        tokens: The features are (B, tokens, width), of which one linear classifier reads a pooled vector.
    """
    blocks: list[str]
    refused: dict[str, str]
    pairs: list[tuple[str, str]]
    tokens: bool = False


@dataclass
class _Calls:
    """What hooks saw of one block."""
    order: int = -1
    count: int = 0
    version: int = 0
    problem: str = ''

    def start(self, args: tuple) -> None:
        self.version = args[0]._version if args and torch.is_tensor(args[0]) else 0

    def see(self, order: int, args: tuple, kwargs: dict, output) -> None:
        self.order, self.count = order, self.count + 1
        self.problem = self.problem or _problem(args, kwargs, output, self.version)


def tensor_problem(args: tuple, output, version: Optional[int], batch: int) -> str:
    """Why a call was none that takes one tensor and gives one, batch first; empty if it was.

    Args:
        args: Its arguments.
        output: What it gave.
        version: Version of the first argument before the call.
        batch: Size of the batch.
    """
    if not args or not torch.is_tensor(args[0]):
        return 'takes no single tensor'
    if not torch.is_tensor(output):
        return f'gives a {type(output).__name__}, not one tensor'
    if args[0].shape[:1] != (batch,) or output.shape[:1] != (batch,):
        return 'has no batch as its first dimension'
    return 'works in place on its input' if args[0]._version != version else ''


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards each of its modules in the mode that it had."""
    # Restored one by one and not by `train()`, which models override.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _problem(args: tuple, kwargs: dict, output, version: int) -> str:
    problem = tensor_problem(args, output, version, _BATCH)
    if problem:
        return problem
    others = (*args[1:], *kwargs.values())
    # What holds tensors may be written to, or differ from image to image.
    if any(isinstance(a, (list, dict, set)) for a in others):
        return 'takes a container beside the tensor'
    if any(size and size % _BATCH == 0 for a in tree_leaves(others) if torch.is_tensor(a) for size in a.shape):
        return 'takes a second tensor that differs from image to image'
    return ''


@dataclass
class _Watch:
    model: nn.Module
    calls: dict[str, _Calls] = field(default_factory=dict)
    finished: int = 0

    def __enter__(self) -> '_Watch':
        self.hooks = []
        for name in list_blocks(self.model):
            self.calls[name] = _Calls()
            module = self.model.get_submodule(name)
            self.hooks.append(module.register_forward_pre_hook(self._pre_hook(name)))
            self.hooks.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def _pre_hook(self, name: str):
        def before(module, args):
            self.calls[name].start(args)
        return before

    def _hook(self, name: str):
        def after(module, args, kwargs, output):
            self.finished += 1
            self.calls[name].see(self.finished, args, kwargs, output)
        return after

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


_probes: dict[tuple, BlockProbe] = {}


def probe_blocks(part: Part, input_size: tuple[int, int, int]) -> BlockProbe:
    """Probes an architecture on the meta device.

    Args:
        part: What to probe.
        input_size: (C, H, W) of the input.

    Raises:
        UserError: If it fails on such an input, or none of its blocks can be routed.
    """
    key = part.layout, tuple(input_size)
    if key not in _probes:
        # Some constructors draw numbers even on meta: a cached probe must not change what a seed gives.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            _probes[key] = _probe(part, tuple(input_size))
    return _probes[key]


def _probe(part: Part, input_size: tuple[int, int, int]) -> BlockProbe:
    net = meta_part(Part(part.name, 0, part.kwargs), input_size[0]).eval()
    x = torch.empty(_BATCH, *input_size, device='meta')
    if not (hasattr(net, 'get_classifier') and hasattr(net, 'forward_head')):
        raise UserError(f"'{part.name}' cannot be routed: it is an encoder without a classifier.")
    try:
        with _Watch(net) as watch, find_pairs(net) as finder:
            result = net.forward_features(x)
    except Exception as e:  # whatever the architecture raises, the user chose one that does not fit
        reason = str(e).strip().split('\n')[0] or type(e).__name__
        shape = 'x'.join(str(s) for s in input_size)
        raise UserError(f"'{part.name}' cannot be routed: it fails on a {shape} input ({reason}).") from e
    pairs = finder.pairs(result) if isinstance(result, Tensor) else []
    refused = {}
    for name, calls in watch.calls.items():
        problem = calls.problem or ('' if calls.count == 1 else f'runs {calls.count} times an image')
        if problem:
            refused[name] = problem
    blocks = sorted((n for n in watch.calls if n not in refused), key=lambda n: watch.calls[n].order)
    if not blocks:
        raise UserError(f"'{part.name}' cannot be routed: {_first_reason(refused)}.")
    return BlockProbe(blocks, refused, pairs, _gives_tokens(part, net, result))


_pairs: dict[tuple, list[tuple[str, str]]] = {}


def probe_pairs(part: Part, input_size: tuple[int, int, int]) -> list[tuple[str, str]]:
    """Names of convolutions of an architecture and the batch norms that alone read them; none if it cannot be probed.

    Args:
        part: What to probe.
        input_size: (C, H, W) of the input.
    """
    key = part.layout, tuple(input_size)
    if key not in _pairs:
        net = meta_part(Part(part.name, 0, part.kwargs), input_size[0]).eval()
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device('meta'):
            try:
                with find_pairs(net) as finder:
                    result = net.forward_features(torch.empty(_BATCH, *input_size))
            except Exception:  # the model's own forward pass will tell what is wrong
                result = None
        _pairs[key] = finder.pairs(result) if isinstance(result, Tensor) else []
    return _pairs[key]


def _gives_tokens(part: Part, net: nn.Module, result) -> bool:
    if not torch.is_tensor(result) or result.ndim != 3:
        return False
    classifier = part_cfg(part).get('classifier')
    return isinstance(classifier, str) and '.' not in classifier


def _first_reason(refused: dict[str, str]) -> str:
    if not refused:
        return 'it has no blocks that timm_amf.list_blocks could find'
    name, why = next(iter(refused.items()))
    return f'none of its {len(refused)} blocks takes and gives one tensor ({name} {why})'
