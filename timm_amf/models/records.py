"""What a model decided for each sample, summed over an epoch: the columns of `policy.csv`."""
import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['PolicyRecord', 'Record', 'RoutingRecord', 'best_assignment', 'exact_device']

_logger = logging.getLogger(__name__)


@functools.cache
def exact_device(device: Optional[torch.device]) -> Optional[torch.device]:
    """Where sums in float64 live: on the device, so that they cost no synchronisation, unless it has no float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # Apple's GPUs
        _logger.warning('The device %s has no float64: sums of losses and records are kept on the CPU.', device)
        return torch.device('cpu')
    return device


class Record:
    """Means, over all samples and by component, of what `forward_train` gives for each sample.

    Sums are float64, see `exact_device`.

    Args:
        key: Which part of `forward_train` it reads, (B, width).
        names: A column name for each of the width values.
        components: Names of the components of the data.
        device: Device of the values.
        bins: Number of bins that `bin_of` sorts the samples into.
    """
    # Whether a single component has columns beside those of all samples.
    splits_one = False
    # The rows of the run's evaluations so far, in order; the trainer sets it before it asks for the next.
    history: Sequence[Mapping[str, Any]] = ()

    def __init__(
            self,
            key: str,
            names: Sequence[str],
            components: Sequence[str],
            device: Optional[torch.device] = None,
            bins: int = 1,
    ):
        self.key, self.names, self.components = key, list(names), list(components)
        device = exact_device(device)
        self.sums = torch.zeros(len(self.components), len(self.names), dtype=torch.float64, device=device)
        self.votes = torch.zeros(len(self.components), bins, dtype=torch.float64, device=device)

    @property
    def image_names(self) -> list[str]:
        """Names of the columns of `values_of`: what a table of images shows."""
        return self.names

    def values_of(self, parts: dict[str, Tensor]) -> Tensor:
        """(B, width) of what is summed."""
        return parts[self.key].detach()

    def bin_of(self, values: Tensor) -> Tensor:
        """The bin (B,) of each sample."""
        return torch.zeros(len(values), dtype=torch.long, device=values.device)

    def update(self, parts: dict[str, Tensor], component: Tensor) -> None:
        """Record a batch: what `forward_train` gave, and the component of each sample (B,)."""
        if self.key in parts:
            self.add(self.values_of(parts), component)

    def add(self, values: Tensor, component: Tensor) -> None:
        """Record the values (B, width) of a batch and the component of each sample (B,)."""
        values, component = values.to(self.sums.device), component.to(self.sums.device)
        self.sums.index_add_(0, component, values.to(self.sums.dtype))
        votes = F.one_hot(self.bin_of(values), self.votes.shape[1])
        self.votes.index_add_(0, component, votes.to(self.votes.dtype))

    def tensors(self) -> list[Tensor]:
        """The accumulators, to be summed over processes in place or saved."""
        return [self.sums, self.votes]

    @property
    def count(self) -> float:
        """Number of samples."""
        return self.votes.sum().item()

    def means(self, sums: Optional[Tensor] = None) -> dict[str, list[float]]:
        """Means by component; those over all samples under the empty name."""
        sums = self.sums if sums is None else sums
        means = {'': (sums.sum(0) / self.votes.sum().clamp(min=1)).tolist()}
        for name, own, count in zip(self.components, sums, self.votes.sum(1)):
            means[name] = (own / count.clamp(min=1)).tolist()
        return means

    def columns(self, component: str, means: list[float]) -> dict[str, Any]:
        """Columns of one component, or of all samples under the empty name."""
        return dict(zip(self.names, means))

    def row(self, prefix: str = '') -> dict[str, Any]:
        """Columns of `policy.csv`, each with the prefix."""
        row = {}
        for component, means in self.means().items():
            if not component or len(self.components) > 1 or self.splits_one:
                start = f'{prefix}{component}_' if component else prefix
                row.update({f'{start}{name}': value for name, value in self.columns(component, means).items()})
        return row

    def headline(self) -> str:
        """A few words for the line that an epoch prints."""
        return ''


class PolicyRecord(Record):
    """The weights that a policy gave to the branches: `weight_0` and on (AMF, figure 6); `assigned_0` and on, the share
    of images that weigh a branch most; `assignment_accuracy`, under the matching of components to branches that suits
    the epoch best.

    Of several components also, of each, `NAME_branch`, the branch that the run's first evaluation matched it to, and
    `NAME_assignment_accuracy`, the percent of its images that weigh that one most (figure 7). These stay with one
    branch, so a policy that flips falls from 100 to 0 there.
    """
    splits_one = True

    def __init__(self, branches: int, components: Sequence[str], device: Optional[torch.device] = None):
        super().__init__('weights', [f'weight_{i}' for i in range(branches)], components, device, bins=branches)

    def bin_of(self, values: Tensor) -> Tensor:
        return values.argmax(1)

    def columns(self, component: str, means: list[float]) -> dict[str, Any]:
        """The mean weights, and the share of images that weigh each branch most."""
        assigned = {f'assigned_{i}': share for i, share in enumerate(self.means(self.votes)[component])}
        return {**super().columns(component, means), **assigned}

    def assignment_accuracy(self) -> Optional[float]:
        """Percent of samples whose largest weight is that of the branch matched to their component (AMF, section
        IV-C5), under the best matching; None with one component, where it means nothing.
        """
        if len(self.components) < 2:
            return None
        hits = sum(self.votes[c, b].item() for c, b in best_assignment(self.votes))
        return 100. * hits / max(self.count, 1.)

    def row(self, prefix: str = '') -> dict[str, Any]:
        """Columns of `policy.csv`, each with the prefix."""
        row = super().row(prefix)
        accuracy = self.assignment_accuracy()
        row[f'{prefix}assignment_accuracy'] = '' if accuracy is None else accuracy
        if accuracy is not None and not prefix:  # of training images there is no first evaluation
            matched = dict(best_assignment(self.votes))
            for c, name in enumerate(self.components):
                key = f'{name}_branch'
                first = next((r[key] for r in self.history if key in r), matched.get(c, ''))
                row[key] = first if first == '' else int(first)
                row[f'{name}_assignment_accuracy'] = '' if first == '' else 100. * row[f'{name}_assigned_{first}']
        return row

    def headline(self) -> str:
        accuracy = self.assignment_accuracy()
        return '' if accuracy is None else f'assignment {accuracy:.1f}'


class RoutingRecord(Record):
    """The paths that a routing policy chose.

    Columns: `tuned_blocks`, the mean number of tuned blocks an image; `block_0` and on, the share of images that used
    the tuned copy of a block (SpotTune, figure 3); `probability_0` and on, the policy's mean probability of it;
    `images_0` and on, the number of images that used so many tuned blocks (figure 4); with several components all but
    the last of each.
    """

    def __init__(self, blocks: int, components: Sequence[str], device: Optional[torch.device] = None):
        super().__init__('shares', [f'block_{i}' for i in range(blocks)], components, device, bins=blocks + 1)
        self.probabilities = torch.zeros_like(self.sums)

    @property
    def image_names(self) -> list[str]:
        return self.names + [f'probability_{i}' for i in range(len(self.names))]

    def values_of(self, parts: dict[str, Tensor]) -> Tensor:
        return torch.cat([super().values_of(parts).round(), parts['probabilities'].detach()], dim=1)

    def add(self, values: Tensor, component: Tensor) -> None:
        shares, probabilities = values.chunk(2, dim=1)
        super().add(shares, component)
        self.probabilities.index_add_(0, component, probabilities.to(self.sums.dtype))

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self.probabilities]

    def bin_of(self, values: Tensor) -> Tensor:
        return values.sum(1).round().long()  # the mean over ten crops is no whole number

    def columns(self, component: str, means: list[float]) -> dict[str, Any]:
        likely = {f'probability_{i}': p for i, p in enumerate(self.means(self.probabilities)[component])}
        tuned = self.means(self.sums.sum(1, keepdim=True))[component][0]
        images = {} if component else {f'images_{i}': int(n) for i, n in enumerate(self.votes.sum(0).tolist())}
        return {'tuned_blocks': tuned, **super().columns(component, means), **likely, **images}

    def headline(self) -> str:
        return f'tuned blocks {self.sums.sum().item() / max(self.count, 1.):.2f}'


def best_assignment(votes: Tensor) -> list[tuple[int, int]]:
    """The matching of components to branches, one to one, that the most votes agree with.

    Args:
        votes: Counts of shape (components, branches).

    Returns:
        Pairs (component, branch), as many as the smaller of the two numbers.
    """
    rows, columns = votes.shape
    if rows > columns:
        return [(c, b) for b, c in best_assignment(votes.T)]
    table = votes.tolist()
    # By trying all of them: components and branches are few.
    best = max(
        itertools.permutations(range(columns), rows),
        key=lambda order: sum(table[c][b] for c, b in enumerate(order)),
    )
    return list(enumerate(best))
