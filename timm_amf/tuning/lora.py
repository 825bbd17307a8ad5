"""LoRA: a role trains a product of two thin matrices beside each of its weights, by `peft`.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022. The weights themselves, norms and biases stay.
What a run writes for use is merged: the plain model's names and shapes, with the logits of the adapted one. Its
checkpoint for resuming holds the adapters.
"""
import re
from collections.abc import Mapping

import torch
from torch import nn

from timm_amf.errors import UserError
from timm_amf.models.blocks import ancestors
from timm_amf.tuning.resolve import Resolved

__all__ = ['add_lora', 'merge_lora', 'merged_state']


def add_lora(model: nn.Module, table: Resolved, seed: int) -> bool:
    """Put adapters beside the linear layers and convolutions of every role whose Plan has a `lora_rank`, in place.

    Depthwise and other grouped convolutions have no products of thin matrices and stay as they are. An adapter starts
    at zero: the logits are those of before. Resolve the Plan again afterwards; the parameters have other names.

    Args:
        model: On its device, with the weights that it starts from.
        table: How it is fine-tuned.
        seed: Of the adapters' first factors.

    Returns:
        Whether any role has adapters.
    """
    targets: dict[str, int] = {}
    for name, setting in table.parameters.items():
        owner, _, kind = name.rpartition('.')
        role, module = table.roles[setting.place.role], model.get_submodule(owner)
        fits = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if role.plan.lora_rank and kind == 'weight' and fits and role.trained(name, setting.place):
            targets[owner] = role.plan.lora_rank
    wanted = [name for name, role in table.roles.items() if role.plan.lora_rank]
    if wanted and not targets:
        raise UserError(f'plan: lora_rank of {wanted[0]}: it has no linear layer or convolution that trains')
    if not targets:
        return False
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {f'^{re.escape(name)}$': rank for name, rank in targets.items()}
    config = LoraConfig(
        target_modules='|'.join(map(re.escape, targets)), rank_pattern=ranks, alpha_pattern=ranks,
        r=max(targets.values()), lora_alpha=max(targets.values()))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return True


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, 'lora_A')}


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights, in place: the plain model is left."""
    for name, layer in _adapted(model).items():
        layer.merge()
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def merged_state(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """The state of the plain model with the adapters added, which the model itself keeps apart."""
    layers, merged = _adapted(model), {}
    for name, tensor in model.state_dict().items():
        owner = next((path for path in ancestors(name) if path in layers), None)
        if owner is None:
            merged[name] = tensor
        elif name.startswith(f'{owner}.base_layer.'):
            layer, kind = layers[owner], name.rpartition('.')[2]
            delta = layer.get_delta_weight(layer.active_adapters[0]) if kind == 'weight' else 0
            merged[f'{owner}.{kind}'] = tensor + delta
    return merged
