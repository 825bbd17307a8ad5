"""All candidates of a block-wise search in one pass: each with its own tuned layers, all in the same frozen network.

Candidates differ in a few layers; all else is frozen and common to them. So the images go through the frozen network
once, without gradients. Where a candidate's layers begin, its own copies of them take what arrives there, and from then
on the outputs of all candidates that have begun go through the frozen network together, as one batch. The losses are
summed; no candidate has a parameter of another, so each gets the gradient that it would have alone.

`LockstepModel` is that as a model which the engine's `Trainer` trains. A view of the network, which shares all its
parameters, has a `_Unit` in the place of each block, of each layer outside of blocks, and of the classifier. What the
architecture computes between them, it computes itself, on a batch that grows from unit to unit.
"""
import contextlib
import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from timm_amf.models.blocks import Units, classifiers, is_within
from timm_amf.models.folding import Folds, view_with
from timm_amf.models.method import Method
from timm_amf.search.candidates import Candidate

__all__ = [
    'HEAD', 'Lockstep', 'LockstepModel', 'LockstepUnfit', 'Member', 'create_member', 'plain_logits',
]

_BATCH = 3  # images of the comparison with the plain network
_HEAD_UNIT = '\0head'
# Before the names of a classifier's parameters: no module's name begins like that.
HEAD = '@head.'


class LockstepUnfit(Exception):
    """Why an architecture's candidates cannot run in one pass."""


def pairs_below(pairs: Iterable[tuple[str, str]], path: str) -> list[tuple[str, str]]:
    """The pairs within a module, by their names in it."""
    prefix = f'{path}.'
    return [(c[len(prefix):], n[len(prefix):]) for c, n in pairs if c.startswith(prefix) and n.startswith(prefix)]


# -- a candidate with weights of its own ------------------------------------------------------------------------------


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
            for name, module in unit.named_modules(prefix=path):
                if mode and is_within(name, self.candidate.modules):
                    module.training = not (isinstance(module, _NormBase) and getattr(module, 'norm_is_fixed', False))
        self.head.train(mode)

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes: parameters, and the statistics of its norms."""
        buffers = {
            name: b for path, unit in self.copies.items() for name, b in unit.named_buffers(path)
            if is_within(name, self.candidate.modules)}
        return {**self.params, **buffers, **{f'{HEAD}{n}': b for n, b in self.head.named_buffers()}}


def create_member(
        model: nn.Module,
        candidate: Candidate,
        head: nn.Module,
        trains: Iterable[str],
        probe: Optional[Units] = None,
) -> Member:
    """A candidate with its own copies of the units that it tunes, which share what is frozen.

    Args:
        model: The frozen network, left as it is.
        candidate: What to tune.
        head: Classifier to copy.
        trains: Names of the parameters that train, as the Plan has it.
        probe: What `probe_units` told of the network. Without it the candidate has a network to itself: the one that
            tunes all layers, or each where lockstep does not apply.
    """
    trains, member = set(trains), Member(candidate, {}, copy.deepcopy(head))
    for path in [''] if probe is None else _units_of(probe, candidate):
        unit = model.get_submodule(path)
        named = [*unit.named_parameters(path), *unit.named_buffers(path)]
        unit = copy.deepcopy(unit, {id(t): t for n, t in named if not is_within(n, candidate.modules)})
        member.copies[path] = unit
        for name, param in unit.named_parameters(path):
            if name in trains:
                member.params[name] = param.requires_grad_(True)
        for name, module in unit.named_modules(prefix=path):
            own = [n for n, _ in module.named_parameters(name, recurse=False)]
            if isinstance(module, _NormBase) and own and not trains.intersection(own):
                module.norm_is_fixed = True
    member.params.update({f'{HEAD}{n}': p.requires_grad_(True) for n, p in member.head.named_parameters()})
    member.train(False)
    return member


def _units_of(probe: Units, candidate: Candidate) -> list[str]:
    """The units in which a candidate lies."""
    def meet(one: str, other: str) -> bool:
        return is_within(one, [other]) or is_within(other, [one])

    for path in candidate.modules:
        missed = [n for n in probe.refused if meet(n, path)]
        if missed or not path or not any(meet(u, path) for u in probe.order):
            reason = probe.refused[missed[0]] if missed else 'is in no block and no layer'
            raise LockstepUnfit(f'{missed[0] if missed else path or "the whole network"} {reason}')
    return [u for u in probe.order if any(meet(u, path) for path in candidate.modules)]


# -- the network that candidates share --------------------------------------------------------------------------------


def plain_logits(model: nn.Module, head: nn.Module, x: Tensor, own_head: bool) -> Tensor:
    """Logits of images (B, C, H, W) with another classifier: in the place of the network's, or on its features."""
    if not own_head:
        return head(model.forward_features(x))
    (own,) = classifiers(model)
    name = next(n for n, m in model.named_modules() if m is own)
    return view_with(model, {name: head})(x)


class _Reached(Exception):
    """All that the frozen network was asked for is known."""


class _Unit(nn.Module):
    """A place of the network in which candidates may differ."""

    def __init__(self, name: str, index: int, module: nn.Module, pairs: Sequence[tuple[str, str]]):
        super().__init__()
        self.name = name
        self.index = index
        self.folds = Folds(pairs)
        self._frozen = (module,)  # in a tuple, so that it is not registered: it belongs to the network
        self.net: Optional['Lockstep'] = None

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the architecture asks its part for (`patch_embed.grid_size`)
            return getattr(self.__dict__['_frozen'][0], name)

    def frozen(self, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        return self.folds.of(self._frozen[0])(x, *args, **kwargs)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.net.run_unit(self, x, args, kwargs)


class Lockstep:
    """Candidates that share a network.

    Args:
        model: The network with its starting weights. It is put in evaluation mode and stays as it is otherwise; no
            parameter of it may require a gradient.
        probe: What `probe_units` told of it.
        members: The candidates, by `create_member`.
        own_head: Whether their classifiers stand in the place of the network's; else they take the network's features.

    Attributes:
        step_seed: What random numbers of the candidates' layers (dropout) follow from, the same for all of them.
    """

    def __init__(self, model: nn.Module, probe: Units, members: Sequence[Member], own_head: bool = True):
        heads = classifiers(model)
        if len(heads) != 1:
            raise LockstepUnfit(f'it has {len(heads)} classifiers')
        self.model = model.eval()
        self.members = list(members)
        self.own_head = own_head
        self.step_seed = 0
        self.units = [
            _Unit(name, i, model.get_submodule(name), pairs_below(probe.pairs, name))
            for i, name in enumerate(probe.order)]
        self.head_unit = _Unit(_HEAD_UNIT, len(self.units), heads[0], [])
        self._places = [*self.units, self.head_unit]
        for unit in self._places:
            # Weakly: in a cycle the folded copy of the frozen network would stay until a collection of garbage.
            unit.net = weakref.proxy(self)
        replaced: dict[str, nn.Module] = {unit.name: unit for unit in self.units}
        if own_head:
            replaced.update({n: self.head_unit for n, m in model.named_modules() if m is heads[0]})
        self.view = view_with(model, replaced)
        # Of each copy what to fold in evaluation, and in training, where what trains has its batch's statistics.
        self._folds: dict[tuple[str, str], tuple[Folds, Folds]] = {}
        self._starts: dict[int, list[Member]] = {}
        for member in self.members:
            first = next((u.index for u in self.units if u.name in member.copies), self.head_unit.index)
            self._starts.setdefault(first, []).append(member)
            for path in member.copies:
                pairs = pairs_below(probe.pairs, path)
                fixed = [p for p in pairs if not is_within(f'{path}.{p[1]}', member.candidate.modules)]
                self._folds[member.name, path] = Folds(pairs), Folds(fixed)
        self._pass = _Pass()
        self._shapes: dict[str, torch.Size] = {}  # of what a unit gives of one image

    @torch.no_grad()
    def check(self, input_size: Sequence[int]) -> None:
        """Compare with the plain network, which all candidates equal until they are trained."""
        first = next(self.model.parameters())
        images = torch.randn(2, _BATCH, *input_size, device=first.device, dtype=first.dtype)
        for member in self.members:
            member.train(False)
        if not self.members:
            return
        expected = [plain_logits(self.model, self.members[0].head, x, self.own_head) for x in images]
        try:
            # Two batches by turns, so that candidates whose images reach each other do not find equal ones.
            both = [self.taps(x) for x in images]
            found = self(images[0], {name: both[i % 2][name] for i, name in enumerate(both[0])})
        except Exception as e:  # whatever the architecture makes of a batch that grows
            raise LockstepUnfit(f'it fails on a batch that grows ({str(e).splitlines()[0]})') from e
        starts = [self._starts[i] for i in sorted(self._starts)]
        for i, name in ((i, m.name) for i, members in enumerate(starts) for m in members):
            right, logits = expected[i % 2], found[name]
            scale = right.abs().max().clamp(min=1)
            if logits.shape != right.shape or (logits - right).abs().max() > 1e-3 * scale:
                raise LockstepUnfit(f'it gives other values for candidate {name} than alone')

    def taps(self, x: Tensor) -> dict[str, Tensor]:
        """What arrives in the frozen network where candidates begin, by the name of the unit, without a graph."""
        self._pass = _Pass(trunk=True)
        with torch.no_grad(), contextlib.suppress(_Reached):
            self._run(x)
        return self._pass.taps

    def __call__(self, x: Tensor, taps: Optional[Mapping[str, Tensor]] = None) -> dict[str, Tensor]:
        """Logits (B, classes) of each candidate, by name.

        Args:
            x: Images, (B, C, H, W).
            taps: In the place of `taps(x)`, of other images of the same shape, which `check` gives.
        """
        self._pass = _Pass(batch=len(x), taps=dict(taps or self.taps(x)))
        # Before the first candidate begins there is nothing to compute: one image, and units that pass on zeros.
        logits = self._run(x[:1])
        order, self._pass = self._pass.order, _Pass()
        return dict(zip([m.name for m in order], logits.split(len(x))))

    def _run(self, x: Tensor) -> Tensor:
        features = self.view.forward_features(x)
        return self.view.forward_head(features) if self.own_head else self.head_unit(features)

    def run_unit(self, unit: _Unit, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """What a unit gives for the batch that stands before it."""
        if self._pass.trunk:
            return self._run_trunk(unit, x, args, kwargs)
        if unit.index < min(self._starts):
            return x.new_zeros((1, *self._shapes[unit.name]))
        order, batch = self._pass.order, self._pass.batch
        begin = self._starts.get(unit.index, [])
        rest = [m for m in order if unit is not self.head_unit and unit.name not in m.copies]
        here = [m for m in order if m not in rest]
        if rest != order[:len(rest)]:
            # Those behind their own layers are mostly the first to have begun; else they are brought together.
            rows = dict(zip((m.name for m in order), x.split(batch)))
            x = torch.cat([rows[m.name] for m in (*rest, *here)])
        # One split, whose gradient is one concatenation; and none where nothing is to be split.
        sizes = [len(rest) * batch] * bool(rest) + [batch] * len(here)
        pieces = list(x.split(sizes)) if len(sizes) > 1 else [x] * len(sizes)
        parts = [unit.frozen(pieces.pop(0), args, kwargs)] if rest else []
        own = [*zip(here, pieces), *((m, self._pass.taps[unit.name]) for m in begin)]
        parts += [self._run_own(member, unit, rows, args, kwargs) for member, rows in own]
        self._pass.order = [*rest, *here, *begin]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _run_trunk(self, unit: _Unit, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        if unit.index in self._starts:
            self._pass.taps[unit.name] = x
            if unit.index == max(self._starts):
                raise _Reached
        y = unit.frozen(x, args, kwargs)
        self._shapes[unit.name] = y.shape[1:]
        return y

    def _run_own(self, member: Member, unit: _Unit, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        module = member.head
        if unit is not self.head_unit:
            own = member.copies[unit.name]
            module = self._folds[member.name, unit.name][member.head.training].of(own)
        if member.head.training:
            # The same for every candidate, as it would be for each alone.
            torch.manual_seed(self.step_seed * 4099 + unit.index)
        return module(x, *args, **kwargs)


@dataclass
class _Pass:
    """The state of one pass through the view.

    Attributes:
        trunk: The pass of the frozen network alone.
        batch: Number of images.
        taps: What arrives at the units where candidates begin.
        order: Candidates that have begun, in the order of their rows.
    """
    trunk: bool = False
    batch: int = 0
    taps: dict[str, Tensor] = field(default_factory=dict)
    order: list[Member] = field(default_factory=list)


# -- as a model of the engine's trainer -------------------------------------------------------------------------------


class LockstepModel(Method, nn.Module):
    """Candidates as one model: it trains their layers and classifiers side by side, each as if it were alone.

    Its parameters and buffers are those that training changes; the frozen network is not registered, so that neither
    checkpoints nor reducers see it.

    Args:
        members: The candidates that share `net`; without one, a single candidate with a network to itself.
        net: The network.
        own_head: As for `Lockstep`.
    """
    tuning_roles = {'head': 'trained'}

    def __init__(self, members: Sequence[Member], net: Optional[Lockstep] = None, own_head: bool = True):
        super().__init__()
        self.members, self.net, self.own_head = list(members), net, own_head
        self.trained = nn.ModuleList(_holder(member) for member in self.members)

    def train(self, mode: bool = True) -> 'LockstepModel':
        for member in self.members:
            member.train(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits (B, classes) of each candidate."""
        # From the step's seed, which is that of training alone.
        step_seed = int(torch.randint(2**32, ())) if self.training else 0
        if self.net is None:
            (member,) = self.members
            if self.training:
                torch.manual_seed(step_seed * 4099)
            return [plain_logits(member.copies[''], member.head, x, self.own_head)]
        self.net.step_seed = step_seed
        outputs = self.net(x)
        return [outputs[member.name] for member in self.members]

    def forward_train(self, x: Tensor, settings) -> dict[str, Any]:
        first, *rest = self(x)
        return dict(output=first, rest=rest)

    def extra_loss(self, parts, target, criterion, settings):
        return sum(criterion(logits, target) for logits in parts['rest'])


def _holder(member: Member) -> nn.Module:
    """A module that registers what of a candidate training changes, under names that a module may have."""
    holder = nn.Module()
    for name, tensor in member.tensors().items():
        name = name.replace('.', '/')
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
        else:
            holder.register_buffer(name, tensor)
    return holder
