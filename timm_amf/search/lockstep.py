"""All candidates of a block-wise search in one pass: each with its own tuned layers, all in the same frozen network.

Candidates differ in a few layers; all else is frozen and common to them. So the images go through the frozen network
once, without gradients. Where a candidate's layers begin, its own copies of them take what arrives there, and from then
on the outputs of all candidates that have begun go through the frozen network together, as one batch. The losses are
summed; no candidate has a parameter of another, so each gets the gradient that it would have alone.

How the network comes to run like that: a view of it, which shares all its parameters, has a `_Unit` in the place of
each block, of each layer outside of blocks, and of the classifier. What the architecture computes between them, it
computes itself, on a batch that grows from unit to unit.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor, nn

from timm_amf.engine.build import seed_torch
from timm_amf.models.blocks import classifiers, is_within
from timm_amf.models.folding import Folds, view_with
from timm_amf.search.members import LockstepUnfit, Member
from timm_amf.search.units import Probe, pairs_below

__all__ = ['Lockstep', 'plain_logits']

_BATCH = 3  # of the comparison with the plain network
_HEAD_UNIT = '\0head'


def plain_logits(model: nn.Module, head: nn.Module, x: Tensor, own_head: bool) -> Tensor:
    """Logits of a network with a classifier other than its own.

    Args:
        model: The network.
        head: The classifier.
        x: Images, (B, C, H, W).
        own_head: Whether `head` stands in the place of the network's classifier; else it takes the network's features.
    """
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
        members: The candidates, by `lockstep_member`.
        own_head: Whether their classifiers stand in the place of the network's; else they take the network's features.

    Attributes:
        step_seed: What random numbers of the candidates' layers (dropout) follow from, the same for all of them.

    Raises:
        LockstepUnfit: The network has several classifiers.
    """

    def __init__(self, model: nn.Module, probe: Probe, members: Sequence[Member], own_head: bool = True):
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
        for unit in (*self.units, self.head_unit):
            unit.net = self
        replaced: dict[str, nn.Module] = {unit.name: unit for unit in self.units}
        if own_head:
            replaced.update({n: self.head_unit for n, m in model.named_modules() if m is heads[0]})
        self.view = view_with(model, replaced)
        self._folds = {(m.name, u): _own_folds(probe, m, u) for m in members for u in m.copies}
        self._starts: dict[int, list[Member]] = {}
        for member in self.members:
            first = next((u.index for u in self.units if u.name in member.copies), self.head_unit.index)
            self._starts.setdefault(first, []).append(member)
        self._pass: Optional[_Pass] = None
        self._shapes: dict[tuple, torch.Size] = {}

    @torch.no_grad()
    def check(self, input_size: Sequence[int]) -> None:
        """Compare with the plain network, which all candidates equal until they are trained.

        Raises:
            LockstepUnfit: They differ, or the network does not run.
        """
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

    @property
    def tap_names(self) -> list[str]:
        """Names of the units whose inputs the candidates begin at; the classifier's is the last if it is one."""
        return [(*self.units, self.head_unit)[i].name for i in sorted(self._starts)]

    def taps(self, x: Tensor) -> dict[str, Tensor]:
        """What arrives in the frozen network at each of `tap_names`, without a graph."""
        self._pass = _Pass(trunk=True, images=x.shape, missing=set(self.tap_names))
        with torch.no_grad():
            try:
                self._run(x)
            except _Reached:
                pass
        return self._pass.taps

    def __call__(self, x: Tensor, taps: Optional[Mapping[str, Tensor]] = None) -> dict[str, Tensor]:
        """Logits (B, classes) of each candidate, by name.

        Args:
            x: Images, (B, C, H, W).
            taps: What `taps(x)` gave, if that is known.
        """
        taps = self.taps(x) if taps is None else taps
        # Before the first candidate begins there is nothing to compute: one image, and units that pass on zeros.
        self._pass = _Pass(trunk=False, images=x.shape, taps=dict(taps), begins=min(self._starts))
        try:
            logits = self._run(x[:1])
            order = self._pass.order
        finally:
            self._pass = None
        return dict(zip([m.name for m in order], logits.split(len(x))))

    def _run(self, x: Tensor) -> Tensor:
        features = self.view.forward_features(x)
        return self.view.forward_head(features) if self.own_head else self.head_unit(features)

    def run_unit(self, unit: _Unit, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """What a unit gives for the batch that stands before it."""
        if self._pass.trunk:
            return self._run_trunk(unit, x, args, kwargs)
        if unit.index < self._pass.begins:
            return self._placeholder(unit, x, args, kwargs)
        order, batch = self._pass.order, self._pass.images[0]
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
        state = self._pass
        if unit.name in state.missing:
            state.taps[unit.name] = x
            state.missing.remove(unit.name)
            if not state.missing:
                raise _Reached
        y = unit.frozen(x, args, kwargs)
        self._shapes[unit.name, state.images[1:]] = y.shape[1:]
        return y

    def _placeholder(self, unit: _Unit, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """One row of zeros in the shape that the unit gives."""
        key = unit.name, self._pass.images[1:]
        if key not in self._shapes:
            with torch.no_grad():
                self._shapes[key] = unit.frozen(x[:1], args, kwargs).shape[1:]
        return x.new_zeros((1, *self._shapes[key]))

    def _run_own(self, member: Member, unit: _Unit, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        module = member.head
        if unit is not self.head_unit:
            own = member.copies[unit.name]
            module = self._folds[member.name, unit.name][member.head.training].of(own)
        if member.head.training:
            # The same for every candidate, as it would be for each alone.
            seed_torch(self.step_seed * 4099 + unit.index)
        return module(x, *args, **kwargs)


@dataclass
class _Pass:
    """The state of one pass through the view.

    Attributes:
        trunk: The pass of the frozen network alone.
        images: Shape of the images.
        taps: What arrives at the units where candidates begin.
        missing: Of those, which the pass has not come to.
        begins: Index of the first of them.
        order: Candidates that have begun, in the order of their rows.
    """
    trunk: bool
    images: torch.Size
    taps: dict[str, Tensor] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    begins: int = 0
    order: list[Member] = field(default_factory=list)


def _own_folds(probe: Probe, member: Member, path: str) -> tuple[Folds, Folds]:
    """For a candidate's copy of a unit, what to fold in evaluation, and in training."""
    pairs = pairs_below(probe.pairs, path)
    # Norms that train have their batch's statistics in training.
    fixed = [p for p in pairs if not is_within(f'{path}.{p[1]}', member.candidate.modules)]
    return Folds(pairs), Folds(fixed)
