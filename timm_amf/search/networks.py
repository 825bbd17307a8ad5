"""Which networks the options ask about: a plain model, or the branches of a composite."""
import argparse
import copy
from dataclasses import dataclass

import torch
from timm.models import is_model_in_modules

from timm_amf.engine import build
from timm_amf.errors import UserError
from timm_amf.tuning.roles import model_roles, role_blocks

__all__ = ['Target', 'read_target']


@dataclass
class Target:
    """The model that is to be fine-tuned.

    Attributes:
        roles: Its roles.
        bodies: Those that have blocks and start from pretrained weights: `backbone`, or `branch.0`, `branch.1`, ...
        blocks: Number of blocks of each of these.
        networks: Options that name the plain network of each of these, with its pretrained weights.
    """
    roles: list[str]
    bodies: list[str]
    blocks: dict[str, int]
    networks: list[argparse.Namespace]

    @property
    def is_composite(self) -> bool:
        return self.bodies != ['backbone']


def read_target(args: argparse.Namespace, num_classes: int) -> Target:
    """What the options' model is made of, without its weights.

    Args:
        args: Options of `train_amf.py`.
        num_classes: Classes of the data.

    Raises:
        UserError: If the model cannot be built, or has networks that no advice is known for.
    """
    bare = copy.copy(args)
    bare.pretrained, bare.initial_checkpoint = False, ''
    with torch.device('meta'):
        model = build.build_model(bare, num_classes)
    roles = list(model_roles(model))
    if roles[0] == 'backbone':
        return Target(roles, ['backbone'], {'backbone': len(role_blocks(model, 'backbone'))}, [copy.deepcopy(args)])
    if not is_model_in_modules(args.model.split('.')[0], ['amf']):
        raise UserError(
            f'--model {args.model}: advice is for plain models, AMF and MultiTune; ask about its backbone by name, and '
            f'give its settings to the roles {", ".join(roles)}')
    if args.pretrained_path or args.initial_checkpoint:
        raise UserError(
            f'--model {args.model}: advice is about the weights that the branches start from; name a file of these in '
            f'backbone_kwargs, not a checkpoint of the whole')
    bodies = [role for role in roles if role.startswith('branch.')]
    blocks = {role: len(role_blocks(model, role)) for role in bodies}
    return Target(roles, bodies, blocks, [_of_part(args, part) for part in model.backbone_parts])


def _of_part(args: argparse.Namespace, part) -> argparse.Namespace:
    """Options that name a branch's network as a model of its own; a composite normalises images for each itself."""
    plain = copy.deepcopy(args)
    kwargs = {k: v for k, v in part.kwargs.items() if v is not None}
    plain.model = part.name
    plain.pretrained_cfg_overlay = kwargs.pop('pretrained_cfg_overlay', {})
    plain.model_kwargs = kwargs
    plain.mean = plain.std = plain.gp = None
    return plain
