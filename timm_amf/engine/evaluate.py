"""Evaluation that counts every sample once, over any number of processes."""
from typing import Any, Optional

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from timm_amf.engine.metrics import class_metrics
from timm_amf.models.records import Record, exact_device

__all__ = ['Tally', 'evaluate', 'reduce_tensors']


class Tally:
    """Sums of loss and hits, over all samples, by component and by class, in float64 (see `exact_device`).

    Args:
        components: Names of the components of the data.
        num_classes: Classes of the data.
        device: Device of the model's outputs.
    """

    def __init__(self, components: list[str], num_classes: int, device: Optional[torch.device] = None):
        self.components = list(components)
        # columns: samples, loss, top-1 hits, top-5 hits
        device = exact_device(device)
        self.sums = torch.zeros(len(components), 4, dtype=torch.float64, device=device)
        # rows: samples, predictions, hits; the last column is for outputs that are no class of the data
        self.classes = torch.zeros(3, num_classes + 1, dtype=torch.float64, device=device)

    def update(self, output: torch.Tensor, target: torch.Tensor, component: torch.Tensor) -> None:
        """Record a batch: logits (B, classes), class indices (B,), components (B,)."""
        output = output.detach().float()
        loss = F.cross_entropy(output, target, reduction='none')
        best = output.topk(min(5, output.shape[1]), dim=1).indices
        top = best == target[:, None]
        columns = torch.stack([torch.ones_like(loss), loss, top[:, 0].to(loss), top.any(1).to(loss)], dim=1)
        component, target, columns, best = (t.to(self.sums.device) for t in (component, target, columns, best))
        columns = columns.to(self.sums.dtype)
        self.sums.index_add_(0, component, columns)
        ones, predicted = self.classes.new_ones(len(target)), best[:, 0].clamp(max=self.classes.shape[1] - 1)
        for row, index, values in zip(self.classes, (target, predicted, target), (ones, ones, columns[:, 2])):
            row.index_add_(0, index, values)

    def tensors(self) -> list[torch.Tensor]:
        """The accumulators, to be summed over processes in place or saved."""
        return [self.sums, self.classes]

    def metrics(self) -> dict[str, float]:
        """`loss`; in percent `top1`, `top5`, `balanced_accuracy` and `macro_f1` (see `class_metrics`), and with several
        components `top1_<name>` of each.
        """
        count, loss, top1, top5 = self.sums.sum(0).tolist()
        count = max(count, 1)
        balanced, f1 = class_metrics(*self.classes[:, :-1].cpu().numpy())
        metrics = dict(
            loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count,
            balanced_accuracy=float(balanced), macro_f1=float(f1))
        if len(self.components) > 1:
            for name, (n, _, hits, _) in zip(self.components, self.sums.tolist()):
                metrics[f'top1_{name}'] = 100 * hits / max(n, 1)
        return metrics


def reduce_tensors(accelerator: Accelerator, *holders: Any) -> None:
    """Sum the accumulators of tallies and records over all processes, in place."""
    if accelerator.num_processes > 1:
        for holder in holders:
            for tensor in holder.tensors():
                tensor.copy_(accelerator.reduce(tensor, 'sum'))


@torch.no_grad()
def evaluate(
        model: nn.Module,
        loader,
        accelerator: Accelerator,
        record: Optional[Record] = None,
        progress: bool = False,
) -> dict[str, float]:
    """Evaluate a model on the share of the data that each process holds, and sum over the processes.

    Args:
        model: Module whose output is a dict with `output` (logits) and, of composites, what the policy decided.
        loader: Loader of evaluation batches; processes may hold different numbers of batches.
        accelerator: Accelerate's context.
        record: Sums what the model decided.
        progress: Show a progress bar.

    Returns:
        The metrics of `Tally`, of all samples, each counted once, the same on every process.
    """
    model.eval()
    tally = Tally(loader.dataset.components, loader.dataset.num_classes, accelerator.device)
    bar = tqdm(loader, desc='eval', leave=False, disable=not progress, dynamic_ncols=True)
    for batch in bar:
        with accelerator.autocast():
            result = model(batch.input)
        tally.update(result['output'], batch.target, batch.component)
        if record is not None:
            record.update(result, batch.component)
    reduce_tensors(accelerator, tally, *([record] if record is not None else []))
    return tally.metrics()
