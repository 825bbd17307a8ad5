"""What a run records of its epochs: running means, the policy's decisions, and the CSV files."""
import csv
import io
import itertools
from pathlib import Path
from typing import Any, Optional, Union

import torch

from timm_amf.engine.checkpoint import write_text
from timm_amf.models.amf import AMF
from timm_amf.models.spottune import SpotTune

__all__ = ['CsvLog', 'PolicyMonitor', 'RoutingMonitor', 'best_assignment', 'create_monitor']

# Batches that a monitor keeps before it adds them: the operations cost more than what they do.
_PENDING = 32


class PolicyMonitor:
    """Accumulates the weights that a policy gave to the branches, over all samples and per component.

    Sums are float64 and live on the device, so that recording costs no synchronisation. Batches are added some at a
    time, in their order: the sums do not depend on when that is done.

    Args:
        branches: Number of branches n.
        components: Names of the components of the data.
        device: Device of the weights.
    """

    reads = 'weights'  # of what the model's forward gives

    def __init__(self, branches: int, components: list[str], device: Optional[torch.device] = None):
        self.components = list(components)
        self._sums = torch.zeros(len(components), branches, dtype=torch.float64, device=device)
        self._votes = torch.zeros(len(components), branches, dtype=torch.float64, device=device)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def sums(self) -> torch.Tensor:
        """Sums (components, branches) of the weights."""
        self._add_pending()
        return self._sums

    @property
    def votes(self) -> torch.Tensor:
        """votes[c, b]: samples of component c whose largest weight is that of branch b."""
        self._add_pending()
        return self._votes

    def update(self, weights: torch.Tensor, component: torch.Tensor) -> None:
        """Record a batch: weights (B, n) and the component of each sample (B,)."""
        # A copy: a CUDA graph's outputs hold until its next replay only.
        self._pending.append((weights.detach().to(self._sums.dtype, copy=True), component))
        if len(self._pending) == _PENDING:
            self._add_pending()

    def _add_pending(self) -> None:
        if not self._pending:
            return
        weights, component = (torch.cat(tensors) for tensors in zip(*self._pending))
        self._pending.clear()
        self._sums.index_add_(0, component, weights)
        votes = torch.nn.functional.one_hot(weights.argmax(1), weights.shape[1])
        self._votes.index_add_(0, component, votes.to(self._votes.dtype))

    def tensors(self) -> list[torch.Tensor]:
        """The accumulators, to be summed over processes in place or saved."""
        return [self.sums, self.votes]

    def row(self, prefix: str = '') -> dict[str, Any]:
        """Columns of `policy.csv`: mean weight by branch, over all and by component, and the assignment accuracy.

        The assignment accuracy (AMF paper, section IV-C5) is the share, in percent, of samples whose largest weight is
        that of the branch matched to their component, under the matching that is best; empty with one component, where
        it means nothing.
        """
        counts = self.votes.sum(1)
        total = counts.sum().clamp(min=1)
        row = {f'{prefix}weight_{i}': v for i, v in enumerate((self.sums.sum(0) / total).tolist())}
        for name, sums, count in zip(self.components, self.sums, counts):
            means = (sums / count.clamp(min=1)).tolist()
            row.update({f'{prefix}{name}_weight_{i}': v for i, v in enumerate(means)})
        if len(self.components) > 1:
            matching = best_assignment(self.votes)
            hits = sum(self.votes[c, b].item() for c, b in matching)
            row[f'{prefix}assignment_accuracy'] = 100. * hits / total.item()
        else:
            row[f'{prefix}assignment_accuracy'] = ''
        return row


class RoutingMonitor:
    """Accumulates the paths that a SpotTune's policy chose, over all samples and per component.

    Args:
        blocks: Number of routed blocks.
        components: Names of the components of the data.
        device: Device of the decisions.
    """

    reads = 'shares'  # of what the model's forward gives

    def __init__(self, blocks: int, components: list[str], device: Optional[torch.device] = None):
        self.components = list(components)
        self.sums = torch.zeros(len(components), blocks, dtype=torch.float64, device=device)
        self.votes = torch.zeros(len(components), blocks + 1, dtype=torch.float64, device=device)

    def update(self, shares: torch.Tensor, component: torch.Tensor) -> None:
        """Record a batch: decisions (B, blocks), 0 or 1, and the component of each sample (B,)."""
        shares = shares.detach().round()
        self.sums.index_add_(0, component, shares.to(self.sums.dtype))
        counts = torch.nn.functional.one_hot(shares.sum(1).long(), self.votes.shape[1])
        self.votes.index_add_(0, component, counts.to(self.votes.dtype))

    def tensors(self) -> list[torch.Tensor]:
        """The accumulators, to be summed over processes in place or saved."""
        return [self.sums, self.votes]

    def row(self, prefix: str = '') -> dict[str, Any]:
        """Columns of `policy.csv`.

        `tuned_blocks`, the mean number of tuned blocks an image; `block_0` and on, for each block the share of images
        that used its tuned copy (SpotTune, figure 3); `images_0` and on, the number of images that used so many tuned
        blocks (figure 4); with several components the shares and the mean number of each.
        """
        total = self.votes.sum().clamp(min=1)
        row = {f'{prefix}tuned_blocks': (self.sums.sum() / total).item()}
        row.update({f'{prefix}block_{i}': v for i, v in enumerate((self.sums.sum(0) / total).tolist())})
        row.update({f'{prefix}images_{i}': int(v) for i, v in enumerate(self.votes.sum(0).tolist())})
        if len(self.components) > 1:
            for name, sums, count in zip(self.components, self.sums, self.votes.sum(1).clamp(min=1)):
                row[f'{prefix}{name}_tuned_blocks'] = (sums.sum() / count).item()
                row.update({f'{prefix}{name}_block_{i}': v for i, v in enumerate((sums / count).tolist())})
        return row


def create_monitor(
        model: torch.nn.Module,
        components: list[str],
        device: Optional[torch.device] = None,
) -> Union[PolicyMonitor, RoutingMonitor, None]:
    """The monitor for what a model's policy decides; None for a model without one."""
    if isinstance(model, SpotTune):
        return RoutingMonitor(len(model.block_names), components, device)
    if isinstance(model, AMF) and model.policy is not None:
        return PolicyMonitor(len(model.branches), components, device)
    return None


def best_assignment(votes: torch.Tensor) -> list[tuple[int, int]]:
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


class CsvLog:
    """A CSV file of one row an epoch, written whole or not at all.

    Args:
        path: The file.
        start_epoch: Rows of this epoch and later ones are dropped: the resumed run writes them again.
    """

    def __init__(self, path: Union[str, Path], start_epoch: int = 0):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        if start_epoch and self.path.exists():
            with open(self.path, newline='', encoding='utf-8') as file:
                self.rows = [row for row in csv.DictReader(file) if int(row['epoch']) < start_epoch]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; a row of the same epoch is replaced."""
        self.rows = [r for r in self.rows if int(r['epoch']) != row['epoch']] + [row]
        columns = list(dict.fromkeys(itertools.chain.from_iterable(self.rows)))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
