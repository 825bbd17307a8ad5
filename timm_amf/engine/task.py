"""The training task: the model's forward pass with the loss, in timm's frame."""
import argparse
from typing import Optional

import torch
from timm.task import ClassificationTask
from torch import nn

from timm_amf.models.method import RunSettings, check_takes, method_of

__all__ = ['AdaptiveTask', 'TrainForward', 'criterion_kwargs']


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

    Raises:
        UserError: If a setting does not act on the model.
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


def criterion_kwargs(args: argparse.Namespace, soft_targets: bool) -> dict:
    """timm's loss flags as arguments of `timm.loss.create_classification_loss`."""
    loss = args.loss or ('bce' if args.bce_loss else 'jsd' if args.jsd_loss else 'ce')
    kwargs = dict(loss_type=loss, smoothing=args.smoothing, soft_targets=soft_targets)
    if loss == 'bce':
        kwargs.update(bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    if loss == 'jsd':
        kwargs.update(jsd_splits=args.aug_splits)
    return kwargs
