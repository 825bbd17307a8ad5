"""The training task: the model's forward pass with the loss, in timm's frame."""
import argparse
import math
from typing import Optional

import torch
from timm.loss import create_classification_loss
from timm.task import ClassificationTask
from torch import nn

from timm_amf.data import Mixture
from timm_amf.data.table import read_table
from timm_amf.errors import UserError
from timm_amf.models.method import RunSettings, check_takes, method_of

__all__ = ['AdaptiveTask', 'TrainForward', 'WeightedCrossEntropy', 'class_weights', 'create_criterion']


class TrainForward(nn.Module):
    """A model whose forward is its `forward_train`: logits, and besides them what its adaptive parts decided.

    It is what the task trains and `DistributedDataParallel` wraps: everything the loss needs leaves one forward pass,
    so the reducer sees every use of a parameter.
    """

    def __init__(self, model: nn.Module, settings: RunSettings):
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return method_of(self.model).forward_train(x, self.settings)


class AdaptiveTask(ClassificationTask):
    """Classification with any model, and with the extra losses that it may have.

    Args:
        model: The bare model.
        settings: What the model may read of the run's settings.
        **kwargs: Arguments of `timm.task.ClassificationTask`.
    """

    def __init__(self, model: nn.Module, settings: Optional[RunSettings] = None, **kwargs):
        settings = settings or RunSettings()
        super().__init__(TrainForward(model, settings), verbose=False, **kwargs)
        plan = settings.plan
        check_takes(
            model, branch_loss=settings.branch_loss, policy_balance=settings.policy_balance,
            global_k=plan and plan.global_k, temperature=plan and plan.temperature)
        self.settings = settings

    @property
    def model(self) -> nn.Module:
        """The bare model, whatever wraps it at the moment."""
        module = self.trainable_module
        return getattr(module, 'module', module).model

    @property
    def ema_model(self) -> Optional[nn.Module]:
        """The bare moving average, or None."""
        ema = self.get_trainable_module(ema=True)
        return None if ema is None else ema.module.model

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss and outputs of a batch.

        Args:
            input: Images (B, C, H, W).
            target: Class indices (B,) or soft targets (B, classes).

        Returns:
            `loss` (scalar), `output` (B, classes) and the other parts of the model's forward pass.
        """
        parts = self.trainable_module(input)
        loss = self.criterion(parts['output'], target)
        loss = loss + method_of(self.model).extra_loss(parts, target, self.criterion, self.settings)
        return dict(parts, loss=loss)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy with a weight for each class, averaged over the images.

    `nn.CrossEntropyLoss` divides by the sum of the weights in the batch, so that an image would count by its company.

    Args:
        weight: Of each class.
        smoothing: Of the labels; not of soft targets, which are smoothed already.
    """

    def __init__(self, weight: torch.Tensor, smoothing: float = 0.):
        super().__init__()
        self.register_buffer('weight', weight)
        self.smoothing = smoothing

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        smoothing = 0. if target.is_floating_point() else self.smoothing
        total = nn.functional.cross_entropy(
            x, target, self.weight.to(x.dtype), reduction='sum', label_smoothing=smoothing)
        return total / len(x)


def create_criterion(args: argparse.Namespace, soft_targets: bool, train: Optional[Mixture] = None) -> nn.Module:
    """The loss of timm's flags, with `--class-weight`; mixup and cutmix make soft targets."""
    loss = args.loss or ('jsd' if args.jsd_loss else 'ce')
    weight = class_weights(args.class_weight, train, args.num_classes) if args.class_weight else None
    if weight is not None and loss == 'ce':
        return WeightedCrossEntropy(weight, args.smoothing)
    kwargs = dict(loss_type=loss, smoothing=args.smoothing, soft_targets=soft_targets)
    if loss == 'bce':
        kwargs.update(
            bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight,
            class_weight=weight)
    if loss == 'jsd':
        kwargs.update(jsd_splits=args.aug_splits)
    return create_classification_loss(**kwargs)


def class_weights(choice: str, train: Mixture, num_classes: Optional[int] = None) -> torch.Tensor:
    """Weight of each output in the loss.

    Args:
        choice: `balanced`, n / (k * n_c) as scikit-learn for n images of k classes, or a CSV file `class,weight` with
            a row for each class.
        train: The training images.
        num_classes: Outputs of the model, where they are more than the classes of the data; the others weigh 1.
    """
    weights = torch.ones(max(num_classes or 0, train.num_classes))
    if choice == 'balanced':
        counts = torch.from_numpy(train.class_counts())
        there = counts.nonzero().squeeze(1)
        weights[there] = (len(train) / (len(there) * counts[there])).float()
        return weights
    where = f'--class-weight: {choice}'
    columns = read_table(choice, where)
    if not {'class', 'weight'} <= set(columns):
        raise UserError(f'{where}: the columns are class and weight, not {", ".join(columns) or "none"}')
    given = dict(zip(columns['class'], columns['weight']))
    for name in (*given, *train.class_names):
        if name not in given or name not in train.class_names:
            text = f'class {name!r} has no weight' if name not in given else f'no class is named {name!r}'
            raise UserError(f'{where}: {text}; give a row for each of the {train.num_classes} classes')
    for i, name in enumerate(train.class_names):
        try:
            weights[i] = float(given[name])
        except ValueError:
            weights[i] = math.nan
        if not 0 <= weights[i] < math.inf:
            raise UserError(f'{where}: the weight of class {name!r} is {given[name]!r}; give a number of at least 0')
    if not weights.any():
        raise UserError(f'{where}: all weights are 0, so nothing would train; give at least one above 0')
    return weights
