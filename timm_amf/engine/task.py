"""The training task: the model's forward pass with the loss, in timm's frame."""
import argparse
from typing import Optional

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import nn

from timm_amf.errors import UserError
from timm_amf.models.amf import AMF
from timm_amf.models.spottune import SpotTune
from timm_amf.tuning import Plan
from timm_amf.tuning.global_k import global_k_loss, update_shares

__all__ = ['AdaptiveTask', 'Parts', 'criterion_kwargs']


class Parts(nn.Module):
    """A model whose forward gives, besides the logits, what its adaptive parts decided.

    It is what the task trains and `DistributedDataParallel` wraps: everything the loss needs leaves one forward pass,
    so the reducer sees every use of a parameter.

    Args:
        model: Any timm model, or a composite of this package.
        branch_outputs: Also give each branch's own logits (AMF and MultiTune).
    """

    def __init__(self, model: nn.Module, branch_outputs: bool = False):
        super().__init__()
        self.model = model
        self.is_fusion = isinstance(model, AMF)
        self.is_routed = isinstance(model, SpotTune)
        self.branch_outputs = branch_outputs and self.is_fusion

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `output` (B, classes), and what the policy decided.

        That is `weights` (B, n) of an AMF, `shares` (B, blocks) of a SpotTune; and on request `branch_outputs`
        (n, B, classes).
        """
        if self.is_routed:
            output, shares = self.model.forward_parts(x)
            return dict(output=output, shares=shares)
        if not self.is_fusion:
            return dict(output=self.model(x))
        if self.model.routing_eps is not None and not self.training:
            return dict(output=self.model(x))
        output, weights, features = self.model.forward_parts(x)
        result = dict(output=output)
        if weights is not None:
            result['weights'] = weights
        if self.branch_outputs:
            result['branch_outputs'] = self._branch_outputs(features)
        return result

    def _branch_outputs(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Logits (n, B, classes) of each branch alone: its features through its columns of the classifier."""
        fc = self.model.fc
        columns = fc.weight.split([m.shape[1] for m in features], dim=1)
        return torch.stack([F.linear(m, w, fc.bias) for m, w in zip(features, columns)])


class AdaptiveTask(ClassificationTask):
    """Classification with any model, and with the extra losses that a fusion of branches may want.

    With `branch_loss` 0 (the papers' loss) the branches of an AMF are trained through the fused logits alone.

    Args:
        model: The bare model.
        branch_loss: Weight of the mean of the branches' own losses, each on the logits that the classifier gives to its
            features alone. It keeps a branch learning after a faster sibling has fitted the training set.
        policy_balance: Weight of the squared coefficient of variation of the mean branch weights over the batch (the
            importance loss of Shazeer et al., 2017, equation 6), against a policy that ignores a branch.
        plan: Its global-k settings, for a SpotTune.
        **kwargs: Arguments of `timm.task.ClassificationTask`.
    """

    def __init__(
            self,
            model: nn.Module,
            branch_loss: float = 0.,
            policy_balance: float = 0.,
            plan: Optional[Plan] = None,
            **kwargs,
    ):
        super().__init__(Parts(model, branch_outputs=branch_loss > 0), verbose=False, **kwargs)
        if (branch_loss or policy_balance) and not isinstance(model, AMF):
            raise UserError(
                f'--branch-loss and --policy-balance need an AMF or MultiTune, not {type(model).__name__}; remove them')
        if plan is not None and not isinstance(model, SpotTune):
            for name in ('global_k', 'temperature'):
                if getattr(plan, name) is not None:
                    flag = name.replace('_', '-')
                    raise UserError(f'--{flag} needs a SpotTune, not {type(model).__name__}; remove it')
        if plan is not None and plan.global_k is not None:
            model.chosen_blocks(plan.global_k)  # says so if the model has fewer
        self.plan = plan
        self.branch_loss = branch_loss
        self.policy_balance = policy_balance

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
        result = self.trainable_module(input)
        loss = self.criterion(result['output'], target)
        if self.branch_loss:
            outputs = result['branch_outputs']
            loss = loss + self.branch_loss * torch.stack([self.criterion(o, target) for o in outputs]).mean()
        if self.policy_balance and 'weights' in result:
            importance = result['weights'].float().mean(0)
            loss = loss + self.policy_balance * importance.var(unbiased=False) / importance.mean().square()
        if self.plan is not None and self.plan.global_k is not None:
            loss = loss + self._global_k_loss(result['shares'])
        return dict(result, loss=loss)

    def _global_k_loss(self, shares: torch.Tensor) -> torch.Tensor:
        running = update_shares(self.model.tuned_share, shares, self.plan.global_k_window)
        return global_k_loss(shares, self.plan.global_k, tuple(self.plan.global_k_weights), running)


def criterion_kwargs(args: argparse.Namespace, soft_targets: bool) -> dict:
    """timm's loss flags as arguments of `timm.loss.create_classification_loss`."""
    loss = args.loss or ('bce' if args.bce_loss else 'jsd' if args.jsd_loss else 'ce')
    kwargs = dict(loss_type=loss, smoothing=args.smoothing, soft_targets=soft_targets)
    if loss == 'bce':
        kwargs.update(bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    if loss == 'jsd':
        kwargs.update(jsd_splits=args.aug_splits)
    return kwargs
