"""Freezing that stays frozen: weights and batch-norm statistics, and the way back."""
import functools
from typing import Union

from torch import nn

from timm_amf.tuning.plan import Plan
from timm_amf.tuning.resolve import Resolved, resolve, running_norms

__all__ = ['apply_freeze', 'freeze_norm']


def apply_freeze(model: nn.Module, plan: Union[Plan, Resolved], epoch: int = 0) -> bool:
    """Freeze what the Plan says does not train at an epoch, and unfreeze what does.

    A frozen parameter has `requires_grad=False`. A norm with running statistics that stands in a frozen place is kept
    in evaluation mode, also through later calls of `model.train()`, so that its statistics do not move. Calling this
    with another epoch brings the model to that epoch's state, whatever its state was, so a resumed run needs
    nothing else. What changes `requires_grad` after `DistributedDataParallel` was built goes unnoticed by its reducer:
    wrap the bare model anew when this returns True.

    Args:
        model: The model, not wrapped.
        plan: How it is fine-tuned.
        epoch: The epoch that is about to run, from 0.

    Returns:
        Whether any parameter's `requires_grad` changed.
    """
    table, norms = resolve(model, plan), running_norms(model)
    for name, start in table.norms.items():
        if start is None or epoch < start:
            freeze_norm(norms[name])
        elif norms[name].__dict__.pop('train', None):
            norms[name].train(model.training)
    changed = False
    for name, param in model.named_parameters():
        setting = table.parameters[name]
        trains = setting.trains and epoch >= setting.start_epoch
        if param.requires_grad != trains:
            param.requires_grad_(trains)
            changed = True
            if not trains:
                param.grad = None
    return changed


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def freeze_norm(norm: nn.Module) -> None:
    """Keep a norm in evaluation mode whatever mode the model around it is set to."""
    # An attribute of the instance, since `nn.Module.train` recurses through `child.train(mode)`. A partial follows its
    # module through deepcopy (EMA) and pickling; a bound method would be pickled by a name the module has not.
    norm.train = functools.partial(_stay_in_eval, norm)
    norm.train(False)
