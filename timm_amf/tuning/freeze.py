"""Freezing that stays frozen: weights and batch-norm statistics, and the way back."""
import functools

from torch import nn

from timm_amf.tuning.groups import checked_roles, running_norms, settings
from timm_amf.tuning.plan import Plan
from timm_amf.tuning.roles import places

__all__ = ['apply_freeze', 'freeze_norm', 'unfreeze_norm']


def apply_freeze(model: nn.Module, plan: Plan, epoch: int = 0) -> bool:
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

    Raises:
        UserError: If the Plan does not fit the model.
    """
    states = settings(model, plan)
    trains = {name: s.trains and epoch >= s.start_epoch for name, s in states.items()}
    training_blocks = {(s.place.role, s.place.block) for name, s in states.items() if trains[name]}
    roles, norms = checked_roles(model, plan), running_norms(model)
    where = places(model, norms)
    for name, norm in norms.items():
        own = [f'{name}.{n}' for n, _ in norm.named_parameters(recurse=False)]
        # A norm without affine parameters goes with the block around it, or with a layer of it that holds the norm.
        place = where[name]
        role = roles[place.role]
        around = (place.role, place.block) in training_blocks and role.trained(name, place) and not role.plan.freeze_bn
        moves = any(trains[n] for n in own) if own else around
        unfreeze_norm(norm) if moves else freeze_norm(norm)
    changed = False
    for name, param in model.named_parameters():
        if param.requires_grad != trains[name]:
            param.requires_grad_(trains[name])
            changed = True
            if not trains[name]:
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


def unfreeze_norm(norm: nn.Module) -> None:
    """Let a norm follow the mode of the model again. It keeps its present mode until that is next set."""
    norm.__dict__.pop('train', None)
