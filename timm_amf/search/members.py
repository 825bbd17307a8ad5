"""A candidate of a search with weights of its own, in a network that it shares or alone."""
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from timm_amf.models.blocks import is_within
from timm_amf.search.candidates import Candidate
from timm_amf.search.units import Probe

__all__ = ['HEAD', 'LockstepUnfit', 'Member', 'lockstep_member', 'plain_member']

# Before the names of a classifier's parameters: no module's name begins like that.
HEAD = '@head.'


class LockstepUnfit(Exception):
    """Why an architecture's candidates cannot run in one pass."""


@dataclass
class Member:
    """A candidate with weights of its own.

    Attributes:
        candidate: What it tunes.
        copies: Its copies of the units in which that lies; the whole network, under '', if it runs alone.
        head: Its classifier.
        params: What it trains, by name in the plain network; the classifier's by name in the classifier, after `HEAD`.
    """
    candidate: Candidate
    copies: dict[str, nn.Module]
    head: nn.Module
    params: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique among all ways."""
        return f'{self.candidate.way}:{self.candidate.name}'

    @property
    def alone(self) -> bool:
        """It has a network to itself."""
        return '' in self.copies

    def train(self, mode: bool = True) -> None:
        """Put what is tuned in training mode, or all in evaluation mode; what is frozen stays in evaluation mode."""
        for path, unit in self.copies.items():
            unit.eval()
            for name, module in unit.named_modules():
                full = _join(path, name)
                if mode and is_within(full, self.candidate.modules):
                    module.training = not (isinstance(module, _NormBase) and getattr(module, 'norm_is_fixed', False))
        self.head.train(mode)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes: parameters, and the statistics of its norms."""
        buffers = {
            _join(path, name): b for path, unit in self.copies.items() for name, b in unit.named_buffers()
            if is_within(_join(path, name), self.candidate.modules)}
        return {**self.params, **buffers, **{f'{HEAD}{n}': b for n, b in self.head.named_buffers()}}


def _own_copy(unit: nn.Module, path: str, modules: Sequence[str]) -> nn.Module:
    """A copy of a unit that shares what is frozen."""
    named = [*unit.named_parameters(), *unit.named_buffers()]
    shared = {id(t): t for n, t in named if not is_within(_join(path, n), modules)}
    return copy.deepcopy(unit, shared)


def _member(candidate: Candidate, copies: dict[str, nn.Module], head: nn.Module, trains: Iterable[str]) -> Member:
    trains = set(trains)
    member = Member(candidate, copies, head)
    for path, unit in copies.items():
        for name, param in unit.named_parameters():
            full = _join(path, name)
            if full in trains:
                member.params[full] = param.requires_grad_(True)
        for name, module in unit.named_modules():
            own = [_join(path, name, n) for n, _ in module.named_parameters(recurse=False)]
            if isinstance(module, _NormBase) and own and not trains.intersection(own):
                module.norm_is_fixed = True
    member.params.update({f'{HEAD}{n}': p.requires_grad_(True) for n, p in head.named_parameters()})
    member.train(False)
    return member


def plain_member(model: nn.Module, candidate: Candidate, head: nn.Module, trains: Iterable[str]) -> Member:
    """A candidate with a network to itself: the one that tunes all layers, or each where lockstep does not apply.

    Args:
        model: The frozen network, left as it is.
        candidate: What to tune.
        head: Classifier to copy.
        trains: Names of the parameters that train, as the Plan has it.
    """
    return _member(candidate, {'': _own_copy(model, '', candidate.modules)}, copy.deepcopy(head), trains)


def lockstep_member(
        model: nn.Module,
        probe: Probe,
        candidate: Candidate,
        head: nn.Module,
        trains: Iterable[str],
) -> Member:
    """A candidate that shares a network with others, with its own copies of the units that it tunes.

    Args:
        model: The frozen network, left as it is.
        probe: What `probe_units` told of it.
        candidate: What to tune.
        head: Classifier to copy.
        trains: Names of the parameters that train, as the Plan has it.

    Raises:
        LockstepUnfit: It tunes what is in no unit.
    """
    reached = {path: [u for u in probe.order if is_within(path, [u]) or is_within(u, [path])]
               for path in candidate.modules}
    for path, units in reached.items():
        missed = [n for n in probe.refused if is_within(n, [path]) or is_within(path, [n])]
        if missed or not units or not path:
            reason = probe.refused[missed[0]] if missed else 'is in no block and no layer'
            raise LockstepUnfit(f'{missed[0] if missed else path or "the whole network"} {reason}')
    units = [u for u in probe.order if any(u in found for found in reached.values())]
    copies = {u: _own_copy(model.get_submodule(u), u, candidate.modules) for u in units}
    return _member(candidate, copies, copy.deepcopy(head), trains)


def _join(*names: str) -> str:
    return '.'.join(n for n in names if n)
