"""A candidate in training, and what it takes to go on with it."""
from dataclasses import dataclass, field
from typing import Any

import torch

from timm_amf.search.members import Member
from timm_amf.search.results import CandidateResult
from timm_amf.tuning import GroupScheduler

__all__ = ['Contestant']


@dataclass
class Contestant:
    """A candidate in training.

    Attributes:
        member: Its weights.
        optimizer: Over what it trains.
        scheduler: Of its learning rates.
        curve: (epochs trained, top1, loss) of each evaluation.
        stopped: It was left behind.
    """
    member: Member
    optimizer: torch.optim.Optimizer
    scheduler: GroupScheduler
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    stopped: bool = False

    def result(self, images: int) -> CandidateResult:
        """How it fared on so many validation images."""
        epochs, top1, loss = self.curve[-1]
        parameters = sum(p.numel() for p in self.member.params.values())
        return CandidateResult(
            self.member.candidate, top1, loss, images, parameters, epochs, self.stopped, tuple(self.curve))

    def state(self) -> dict[str, Any]:
        """All that it takes to go on, as tensors and plain data."""
        return dict(
            tensors={n: t.detach().cpu() for n, t in self.member.tensors().items()},
            optimizer=self.optimizer.state_dict(),
            start={} if self.optimizer.l2sp is None else self.optimizer.l2sp.state_dict(),
            schedule=self.scheduler.state_dict(),
            curve=[list(point) for point in self.curve],
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        with torch.no_grad():
            for name, tensor in self.member.tensors().items():
                tensor.copy_(state['tensors'][name])
        self.optimizer.load_state_dict(state['optimizer'])
        if self.optimizer.l2sp is not None:
            self.optimizer.l2sp.load_state_dict(state['start'])
        self.scheduler.load_state_dict(state['schedule'])
        self.curve = [tuple(point) for point in state['curve']]
