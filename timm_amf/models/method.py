"""What a model may tell the trainer, the Hub and the reports of itself.

Engine, Hub and export know no architecture by its class: they ask `method_of(model)`. A model of this package or of
yours answers by inheriting from `Method` beside `nn.Module` and overriding what differs from a plain model; any other
timm model gets the answers of a plain one. docs/add_a_method.md shows two methods of less than 80 lines each.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..errors import UserError
from .charts import Chart, Seen
from .records import Record

__all__ = ['Method', 'PlainMethod', 'RunSettings', 'check_takes', 'method_of']


@dataclass(frozen=True)
class RunSettings:
    """What of a run's settings a model may read.

    Attributes:
        plan: The Plan, None outside training.
        branch_loss: Weight of an extra loss on each branch's own logits; 0 for none, as in an evaluation.
        policy_balance: Weight of a penalty on branches that get more than their share of the policy's weight.
    """
    plan: Any = None
    branch_loss: float = 0.
    policy_balance: float = 0.


class Method:
    """The protocol, with the answers of a plain model.

    Optional attributes that only some models have: `tuning_roles` (role -> module path or paths), `role_defaults`
    (role -> fields of `RolePlan` beneath the Plan's), `role_layers()` (parameter -> position for layer decay).
    """
    method_name = ''
    # BibTeX of the method's paper, for the card.
    citation = ''
    # Names of the run's settings that act on this model; of the settings of methods all others are refused.
    takes: frozenset[str] = frozenset()

    def _network(self) -> nn.Module:
        return self

    def forward_train(self, x: Tensor, settings: RunSettings) -> dict[str, Tensor]:
        """One pass: `output`, the logits (B, classes), and whatever `extra_loss` and the record look at.

        Everything that the loss needs must leave this one pass, so that a distributed reducer sees each parameter used.
        It serves evaluation, too.
        """
        return dict(output=self._network()(x))

    def extra_loss(
            self,
            parts: dict[str, Tensor],
            target: Tensor,
            criterion: Callable[[Tensor, Tensor], Tensor],
            settings: RunSettings,
    ) -> Union[Tensor, float]:
        """What comes on top of the criterion on `output`.

        Args:
            parts: What `forward_train` gave.
            target: Class indices (B,) or soft targets (B, classes).
            criterion: The run's loss, logits and targets -> scalar.
            settings: The run's.
        """
        return 0.

    def start_epoch(self, epoch: int, settings: RunSettings) -> None:
        """Set what changes from epoch to epoch, from the epoch's number alone, so that a resumed run needs no more."""

    def create_record(self, components: Sequence[str], device: Optional[torch.device] = None) -> Optional[Record]:
        """The columns of `policy.csv`; None for none."""
        return None

    @contextmanager
    def evaluation(
            self,
            global_k: Optional[int] = None,
            blocks: Optional[str] = None,
            sampling_seed: Optional[int] = None,
    ) -> Iterator[None]:
        """Around an evaluation: the paths that are asked for (see `SpotTune.evaluation`)."""
        yield

    def charts(self, seen: Seen) -> list[Chart]:
        """Figures of its own, for a report."""
        return []

    def fixed_path(self, global_k: Optional[int] = None, blocks: Optional[str] = None) -> Optional[list[int]]:
        """The tuned blocks that all images take alike; None where there is no such path."""
        return None

    def networks(self) -> list[nn.Module]:
        """The timm networks that it is made of, a policy last."""
        return [self._network()]

    def architectures(self) -> list[str]:
        """Their names."""
        return [net.pretrained_cfg['architecture'] for net in self.networks()]

    def sentence(self) -> str:
        """What the model is, for its card and report."""
        return f'{self.architectures()[0]}, fine-tuned.'

    def usage_note(self) -> str:
        """What else it can be asked, for its card."""
        return ''

    @contextmanager
    def exportable(self) -> Iterator[nn.Module]:
        """The model in a form that a tracer can follow: nothing that it computes depends on values."""
        yield self._network()


class PlainMethod(Method):
    """The answers for a model that has none itself.

    A method that changes how a timm model is trained and not what it computes, such as a penalty on its features,
    inherits from this and is put on the model as `model.method`; the model stays the timm model that it is.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def _network(self) -> nn.Module:
        return self.model


def method_of(model: nn.Module) -> Method:
    """Who answers for a model: itself where it is a `Method`, else its attribute `method`, else a `PlainMethod`."""
    return model if isinstance(model, Method) else getattr(model, 'method', None) or PlainMethod(model)


def check_takes(model: nn.Module, **asked: Any) -> None:
    """Refuse settings that would not act on a model.

    Args:
        model: The model.
        **asked: Settings by name; those that are None, 0 or empty are not asked for.

    Raises:
        UserError: For the first that the model does not take.
    """
    takes = method_of(model).takes
    for name, value in asked.items():
        if name not in takes and value is not None and (value or name == 'eval_sampling_seed'):
            raise UserError(
                f'--{name.replace("_", "-")} does not act on this model ({type(model).__name__}); leave it out')
