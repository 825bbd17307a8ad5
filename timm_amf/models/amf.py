"""Adaptable Multi-tuning (AMF) and MultiTune: several fine-tuned networks fused by concatenation.

AMF (Shen et al., "AMF: Adaptable Weighting Fusion with Multiple Fine-tuning for Image Classification", Section III):
n branches give pooled features m_i, a policy network's softmax gives one weight h_i a branch and image, and one linear
classifier reads the concatenation of z_i = h_i * m_i. MultiTune is the same without the policy: the plain concatenation
(z_i = m_i), as the paper re-implements it (Section IV-A6).

Input: one image, normalised as the model's `pretrained_cfg` says (`mean` and `std` of the first backbone, unless
`pretrained_cfg_overlay` says otherwise). Every network behind it was trained with its own statistics, so each part
renormalises inside: (x * std + mean - mean_part) / std_part, one multiply-add a value, and nothing where they agree.
The policy sees the same resolution as the branches unless `policy_input_size` makes its input smaller. Architectures of
a fixed input size are built for the model's.

Features: `forward_features` has the weights applied, is 4-D, and has `num_features` channels in all:
- the branches' maps side by side, if all are of one architecture that pools by a plain spatial mean: (B, C, H, W), or
  (B, H, W, C) for an architecture of that layout, which `output_fmt` tells;
- else (class tokens, a norm or layer after the pooling, different architectures) the weighted pooled features
  themselves as (B, C, 1, 1), since the weight must come after everything that a branch does.
"""
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from timm.layers import Format, get_channel_dim, get_device_dtype, get_spatial_dim, nchw_to
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import UserError
from .blocks import probe_part
from .charts import Chart, Seen, weight_charts
from .composite import (
    Composite,
    build_networks,
    checkpoint_within,
    composite_cfg,
    joint_input_cfg,
    register_variants,
)
from .method import RunSettings
from .parts import Part, as_pair
from .records import PolicyRecord
from .routing import eager, kept_branches, routing_error, take

__all__ = ['AMF', 'MultiTune']

KwargsT = Union[dict[str, Any], Sequence[dict[str, Any]], None]


def _backbone_parts(
        backbones: Sequence[str],
        backbone_kwargs: KwargsT = None,
        **common,
) -> list[Part]:
    """The branches as parts, `common` in the keyword arguments of each where it is not None."""
    if isinstance(backbones, str) or len(backbones) < 1:
        raise UserError(f"backbones must name an architecture a branch, like ('resnet18', 'resnet50'): {backbones!r}")
    if backbone_kwargs is None or isinstance(backbone_kwargs, dict):
        backbone_kwargs = [backbone_kwargs or {}] * len(backbones)
    if len(backbone_kwargs) != len(backbones):
        raise UserError(
            f'backbone_kwargs has {len(backbone_kwargs)} entries for {len(backbones)} backbones; give one for each (in '
            f'commands --backbone-weights FILE...), or one for all.')
    common = {k: v for k, v in common.items() if v is not None}
    return [Part(name, 0, {**common, **kw}) for name, kw in zip(backbones, backbone_kwargs, strict=True)]


class AMF(Composite):
    """n branches, a policy network that weighs their pooled features for each image, and one linear classifier.

    `branches[i]` is a plain timm model without classifier, `policy` a `PolicyNetwork`, and `fc`, the classifier, holds
    the last two parameters.
    """
    channel_dim: torch.jit.Final[int]
    spatial_dim: torch.jit.Final[tuple[int, int]]
    has_maps: torch.jit.Final[bool]
    pools: torch.jit.Final[bool]
    __jit_unused_properties__ = ['tuning_roles']
    method_name = 'amf'
    takes = frozenset({'branch_loss', 'policy_balance', 'routing_eps'})

    def __init__(
            self,
            backbones: Sequence[str] = ('resnet18', 'resnet18'),
            policy: Optional[str] = 'resnet10t',
            backbone_kwargs: KwargsT = None,
            policy_kwargs: Optional[dict[str, Any]] = None,
            policy_input_size: Optional[int] = None,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: Optional[str] = None,
            drop_rate: float = 0.,
            drop_path_rate: Optional[float] = None,
            img_size: Optional[Union[int, tuple[int, int]]] = None,
            fc_init_std: float = 0.1,
            **build,
    ):
        """
        Args:
            backbones: timm architectures, with or without a pretrained tag, one a branch.
            policy: timm architecture of the policy network; None for fixed weights of one.
            backbone_kwargs: Keyword arguments of the branches' `timm.create_model`: one dict for all, or one a branch.
            policy_kwargs: Keyword arguments of the policy's.
            policy_input_size: Side in pixels that the policy's input is resized to; None keeps the branches' size.
            num_classes: Classes; 0 gives the fused pooled features.
            in_chans: Image channels.
            global_pool: '' gives unpooled features; another name is the branches' own pooling; None leaves it to them.
            drop_rate: Dropout before the classifier.
            drop_path_rate: Stochastic depth of the branches, for architectures that have it.
            img_size: Input size in pixels for the architectures whose input size is fixed.
            fc_init_std: Standard deviation of the classifier's initial weights (AMF, Section IV-C1).
            **build: `mean`, `std`, `pretrained_parts`, `cache_dir`, `device`, `dtype`: see `composite.build_networks`.
        """
        super().__init__()
        n = len(backbones)
        parts = _backbone_parts(
            backbones, backbone_kwargs, global_pool=global_pool or None, drop_path_rate=drop_path_rate)
        size = as_pair(img_size) or tuple(joint_input_cfg(parts)['input_size'][-2:])
        self.backbone_parts = [p.sized(size) for p in parts]
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.fc_init_std = fc_init_std
        self.grad_checkpointing = False
        self._whole = ()
        self.routing_eps = None
        self._set_features(size, global_pool)

        of_policy = None if policy is None else Part(policy, n, policy_kwargs).sized(as_pair(policy_input_size) or size)
        branches, renorms, network = build_networks(
            self.backbone_parts, of_policy, in_chans, policy_input_size, **build)
        self.renorms = nn.ModuleList(renorms)
        self.branches = nn.ModuleList(branches)
        self.policy = network
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = self._create_fc()

    @classmethod
    def outline(
            cls,
            backbones: Sequence[str],
            policy: Optional[str] = None,
            backbone_kwargs: KwargsT = None,
            policy_kwargs: Optional[dict[str, Any]] = None,
            global_pool: Optional[str] = None,
            in_chans: int = 3,
            img_size: Optional[tuple[int, int]] = None,
            **_,
    ) -> tuple[dict[str, Any], int]:
        parts = _backbone_parts(backbones, backbone_kwargs, global_pool=global_pool or None)
        named = {f'branches.{i}': p for i, p in enumerate(parts)}
        if policy is not None:
            named['policy.net'] = Part(policy, len(parts), policy_kwargs)
        smallest = next((_MIN_INPUT_SIZES[b] for b in backbones if b in _MIN_INPUT_SIZES), None)
        cfg = composite_cfg(named, len(parts), **{'min_input_size': smallest} if smallest else {})
        if img_size is None:
            return cfg, 0
        features = _joint_features([p.sized(img_size) for p in parts], (in_chans, *img_size))
        return {**cfg, 'pool_size': features.map_size or (1, 1)}, len(features.levels)

    def _set_features(self, size: tuple[int, int], global_pool: Optional[str]) -> None:
        """Read the features' widths and layout from the architectures."""
        features = _joint_features(self.backbone_parts, (self.in_chans, *size))
        self.img_size = size
        self.global_pool = global_pool
        self.pools = global_pool != ''
        self.has_maps = features.map_size is not None
        self.output_fmt = features.map_fmt
        self.channel_dim = get_channel_dim(self.output_fmt)
        self.spatial_dim = get_spatial_dim(self.output_fmt)
        self.widths = features.widths
        self.num_features = self.head_hidden_size = sum(features.widths)
        self.feature_info = features.levels
        self._levels = features.own_levels

    def _create_fc(self) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        fc = nn.Linear(self.head_hidden_size, self.num_classes, **get_device_dtype(self))
        nn.init.normal_(fc.weight, std=self.fc_init_std)
        nn.init.zeros_(fc.bias)
        return fc

    @property
    def tuning_roles(self) -> dict[str, str]:
        """Role -> path of the module that it covers; every parameter is in exactly one."""
        roles = {f'branch.{i}': f'branches.{i}' for i in range(len(self.branches))}
        if self.policy is not None:
            roles['policy'] = 'policy'
        if self.num_classes > 0:
            roles['head'] = 'fc'
        return roles

    def _networks(self) -> dict[str, nn.Module]:
        nets = {f'branches.{i}': b for i, b in enumerate(self.branches)}
        if self.policy is not None:
            nets['policy.net'] = self.policy.net
        return nets

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Each branch checkpoints in its own way, and as a whole if it has none; the policy if it can."""
        without = [i for i, net in enumerate(self.networks()) if not checkpoint_within(net, enable)]
        self._whole = tuple(i for i in without if enable and i < len(self.branches))
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new classifier, drawn from N(0, fc_init_std), or none for 0 classes; no `global_pool` keeps the pooling."""
        if global_pool is not None and global_pool != self.global_pool:
            if global_pool:
                for part, branch in zip(self.backbone_parts, self.branches, strict=True):
                    part.kwargs['global_pool'] = global_pool
                    branch.reset_classifier(0, global_pool)
            self._set_features(self.img_size, global_pool)
        self.num_classes = num_classes
        self.fc = self._create_fc().train(self.training)

    def forward_policy(self, x: Tensor) -> Tensor:
        """Weights (B, n) of the branches: the policy's softmax, or ones where the weights are fixed."""
        if self.policy is not None:
            return self.policy(x)
        return torch.ones((x.shape[0], len(self.branches)), device=x.device, dtype=x.dtype)

    def forward_branches(self, x: Tensor) -> list[Tensor]:
        """Pooled features (B, C_i) of each branch, not weighted."""
        pooled = []
        if torch.jit.is_scripting():  # which cannot index modules
            for renorm, branch in zip(self.renorms, self.branches):
                pooled.append(branch.forward_head(branch.forward_features(renorm(x)), pre_logits=True))
        else:
            for i in range(len(self.branches)):
                pooled.append(checkpoint(self._run_branch, i, x) if i in self._whole else self._run_branch(i, x))
        return pooled

    def _run_branch(self, index: int, x: Tensor) -> Tensor:
        branch = self.branches[index]
        return branch.forward_head(branch.forward_features(self.renorms[index](x)), pre_logits=True)

    def _weights(self, x: Tensor) -> Optional[Tensor]:
        if self.policy is not None:
            return self.policy(x)
        return None

    def _fuse(self, x: Tensor) -> Tensor:
        """The concatenation (B, head_hidden_size) of the weighted pooled features z_i = h_i * m_i."""
        return _weigh_and_concat(self.forward_branches(x), self._weights(x))

    def _fuse_routed(self, x: Tensor, eps: float) -> Tensor:
        """The same, each branch run on the images for which it counts, and zero for the others."""
        weights = self.policy(x)
        kept, pooled = kept_branches(weights, eps), []
        for i, count in enumerate(kept.sum(dim=0).tolist()):  # the one point at which the host waits for the device
            if count == len(x):
                pooled.append(self._run_branch(i, x))
                continue
            m = x.new_zeros(len(x), self.widths[i])
            if count:
                index = kept[:, i].nonzero().squeeze(1)
                of_kept = self._run_branch(i, take(x, index))
                m = m.to(of_kept.dtype).index_copy(0, index, of_kept)
            pooled.append(m)
        return _weigh_and_concat(pooled, weights)

    def forward_train(self, x: Tensor, settings: RunSettings) -> dict[str, Tensor]:
        """`output` (B, classes); with a policy `weights` (B, n); `branch_outputs` (n, B, classes) if a loss needs them.

        A branch's own logits are its features through its columns of the classifier.
        """
        if self.routing_eps is not None and not self.training:
            return dict(output=self(x))
        pooled = self.forward_branches(x)
        weights = self._weights(x)
        parts = dict(output=self.fc(self.head_drop(_weigh_and_concat(pooled, weights))))
        if weights is not None:
            parts['weights'] = weights
        if settings.branch_loss:
            columns = self.fc.weight.split([m.shape[1] for m in pooled], dim=1)
            parts['branch_outputs'] = torch.stack([F.linear(m, w, self.fc.bias) for m, w in zip(pooled, columns)])
        return parts

    def extra_loss(self, parts, target, criterion, settings: RunSettings) -> Union[Tensor, float]:
        """The mean loss of the branches on their own, and the importance loss of Shazeer et al., 2017, equation 6.

        The first keeps a branch learning after a faster sibling has fitted the training set; the second, the squared
        coefficient of variation of the mean weights over the batch, works against a policy that ignores a branch. The
        paper has neither.
        """
        loss = 0.
        if settings.branch_loss:
            loss = settings.branch_loss * torch.stack([criterion(o, target) for o in parts['branch_outputs']]).mean()
        if settings.policy_balance and 'weights' in parts:
            importance = parts['weights'].float().mean(0)
            loss = loss + settings.policy_balance * importance.var(unbiased=False) / importance.mean().square()
        return loss

    def create_record(self, components, device=None) -> Optional[PolicyRecord]:
        return None if self.policy is None else PolicyRecord(len(self.branches), components, device)

    def charts(self, seen: Seen) -> list[Chart]:
        def features(x: Tensor) -> Sequence[Tensor]:
            return self._fuse(x).split(list(self.widths), dim=1)

        return [] if self.policy is None else weight_charts(seen, features)

    def sentence(self) -> str:
        names = self.architectures()
        branches, policy = names[:len(self.branches)], names[len(self.branches):]
        counted = ' and '.join(f'{n} x {name}' if n > 1 else name for name, n in Counter(branches).items())
        if not policy:
            return f'A MultiTune: {counted}, each fine-tuned its own way, fused by concatenation.'
        return (
            f'An AMF: {counted}, each fine-tuned its own way, weighted for each image by a policy network '
            f'({policy[0]}) and fused by concatenation.')

    def usage_note(self) -> str:
        if self.policy is None:
            return ''
        return '`model.forward_policy(x)` gives the weights of the branches for each image, (batch, branches).'

    routing_error = routing_error

    def forward_features(self, x: Tensor) -> Tensor:
        if self.has_maps:
            maps = []
            for renorm, branch in zip(self.renorms, self.branches):
                maps.append(branch.forward_features(renorm(x)))
            return _weigh_and_concat(maps, self._weights(x), self.channel_dim, True)
        return self._fuse(x)[:, :, None, None]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pools:
            x = x.mean(self.spatial_dim) if self.has_maps else x.flatten(1)
        x = self.head_drop(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pools:
            return self.forward_head(self.forward_features(x))
        if not torch.jit.is_scripting():
            if self.routing_eps is not None and not self.training and eager(x):
                return self.fc(self.head_drop(self._fuse_routed(x, self.routing_eps)))
        return self.fc(self.head_drop(self._fuse(x)))

    def set_routing(self, eps: Optional[float] = None) -> None:
        """Routed evaluation: `forward` leaves a branch out for the images that weigh it below `eps`.

        In eager evaluation only; training, scripting, tracing and compiling always run all branches, and so do
        `forward_features` and `forward_intermediates`. `routing_error` reports what it costs in accuracy.

        Args:
            eps: Least weight in [0, 1]; the largest weight of an image always runs. None runs all branches.
        """
        if eps is not None and self.policy is None:
            raise UserError('a MultiTune has fixed weights and no branch to leave out; routing needs an AMF.')
        if eps is not None and not 0. <= eps <= 1.:
            raise UserError(f'the routing threshold is a weight between 0 and 1, not {eps}.')
        self.routing_eps = eps

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, list[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """Features at the levels of `feature_info`, the branches' maps side by side, weighted as everything else.

        The arguments are timm's; `norm` applies each branch's last norm to its maps.
        """
        taken = self._take(indices)
        finals, levels = [], []
        for renorm, branch, own in zip(self.renorms, self.branches, self._levels, strict=True):
            result = branch.forward_intermediates(
                renorm(x),
                indices=[own[i] for i in taken],
                norm=norm,
                stop_early=stop_early,
                output_fmt='NCHW',
                intermediates_only=intermediates_only,
            )
            levels.append(result if intermediates_only else result[1])
            finals.append(None if intermediates_only else result[0])
        weights = self._weights(x)
        fused = [_weigh_and_concat(_same_size(maps), weights, 1, True) for maps in zip(*levels, strict=True)]
        fused = [nchw_to(f, Format(output_fmt)) for f in fused]
        if intermediates_only:
            return fused
        if self.has_maps:
            return _weigh_and_concat(finals, weights, self.channel_dim, True), fused
        pooled = [b.forward_head(f, pre_logits=True) for b, f in zip(self.branches, finals, strict=True)]
        return _weigh_and_concat(pooled, weights)[:, :, None, None], fused

    def _take(self, indices: Optional[Union[int, list[int]]]) -> list[int]:
        if not self.feature_info:
            names = ', '.join(p.name for p in self.backbone_parts)
            raise UserError(f'{names} have no level of features in common, so there are no intermediate features.')
        return feature_take_indices(len(self.feature_info), indices)[0]

    def prune_intermediate_layers(
            self,
            indices: Union[int, list[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove from the branches what `forward_intermediates` does not need for these levels; the policy stays.

        With `prune_head` only `forward_intermediates` runs afterwards.
        """
        taken = self._take(indices)
        for branch, own in zip(self.branches, self._levels, strict=True):
            if hasattr(branch, 'prune_intermediate_layers'):
                branch.prune_intermediate_layers([own[i] for i in taken], prune_norm=prune_norm, prune_head=prune_head)
        if prune_head:
            self.reset_classifier(0)
        return taken

    def set_input_size(self, img_size: Union[int, tuple[int, int]]) -> None:
        super().set_input_size(img_size)
        self._set_features(self.img_size, self.global_pool)


def _weigh_and_concat(
        tensors: list[Tensor],
        weights: Optional[Tensor],
        dim: int = 1,
        maps: bool = False,
) -> Tensor:
    """Each branch's pooled features (B, C) or 4-D maps times its column of the weights (B, n), concatenated."""
    if weights is not None:
        shape = [-1, 1, 1, 1] if maps else [-1, 1]
        tensors = [t * weights[:, i].view(shape) for i, t in enumerate(tensors)]
    return torch.cat(tensors, dim=dim)


def _same_size(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, C, H, W) at the size of the first: paddings differ between architectures."""
    size = maps[0].shape[-2:]
    return [m if m.shape[-2:] == size else F.interpolate(m, size=size, mode='bilinear') for m in maps]


class _Features(NamedTuple):
    """What branches give together."""
    widths: list[int]  # of the pooled features of each
    map_size: Optional[tuple[int, int]]  # (H, W) of their unpooled features, if these fuse side by side
    map_fmt: Format
    levels: list[dict[str, Any]]  # `feature_info` of the levels that all have
    own_levels: list[list[int]]  # for each branch, which of its own levels those are


def _joint_features(parts: Sequence[Part], input_size: tuple[int, int, int]) -> _Features:
    probes = [probe_part(p, input_size) for p in parts]
    for probe in probes:
        probe.require_width()
    alike = len({p.layout for p in parts}) == 1
    return _Features(
        [p.width for p in probes],
        probes[0].map_size if alike else None,
        probes[0].map_fmt if alike else Format.NCHW,
        *_joint_levels([p.levels for p in probes]),
    )


def _joint_levels(infos: Sequence[Sequence[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Branches with the same reductions match one to one; others at the deepest level of each reduction all have."""
    strides = [[f['reduction'] for f in info] for info in infos]
    if all(s == strides[0] for s in strides):
        own = [list(range(len(strides[0])))] * len(infos)
    else:
        common = sorted(set(strides[0]).intersection(*strides[1:]))
        own = [[len(s) - 1 - s[::-1].index(r) for r in common] for s in strides]
    levels = []
    for indices in zip(*own, strict=True):
        taken = [info[i] for info, i in zip(infos, indices, strict=True)]
        levels.append(dict(
            num_chs=sum(f['num_chs'] for f in taken),
            reduction=taken[0]['reduction'],
            module=f"branches.0.{taken[0]['module']}",
        ))
    return levels, own


class MultiTune(AMF):
    """AMF without a policy: the plain concatenation of the branches' features, each of fixed weight one."""
    method_name = 'multitune'
    takes = frozenset({'branch_loss'})

    def __init__(self, backbones: Sequence[str] = ('resnet18', 'resnet18'), **kwargs):
        """
        Args:
            backbones: timm architectures, one a branch.
            **kwargs: As for `AMF`, but nothing about a policy.
        """
        for name in kwargs:
            if name.startswith('policy'):
                raise TypeError(f"MultiTune.__init__() got an unexpected keyword argument '{name}'")
        super().__init__(backbones, policy=None, **kwargs)


# Unpadded convolutions: below this, its last maps are less than half of what their reduction says.
_MIN_INPUT_SIZES = {'inception_v4': (3, 160, 160)}


def _twins(backbone: str, policy: Optional[str], description: str, n: int = 2) -> tuple[type[AMF], dict, str]:
    """Class, arguments and description of n branches of one architecture; without a policy of a MultiTune."""
    args = {'backbones': (backbone,) * n}
    return (MultiTune, args, description) if policy is None else (AMF, {**args, 'policy': policy}, description)


register_variants(__name__, {
    'amf': _twins(
        'resnet18', 'resnet10t', "AMF of any architectures: `backbones=('resnet18', 'resnet50'), policy='resnet10t'`."),
    'amf_inception_v4x2': _twins(
        'inception_v4', 'resnet34',
        "The paper's network: two Inception-v4 and a ResNet-34 policy (AMF, Section IV-A5)."),
    'amf_inception_v4x3': _twins(
        'inception_v4', 'resnet34', 'Three Inception-v4 and a ResNet-34 policy (the n = 3 of AMF, Figure 2).', n=3),
    'amf_resnet18x2': _twins('resnet18', 'resnet10t', 'Two ResNet-18 and a ResNet-10-T policy.'),
    'amf_resnet50x2': _twins('resnet50', 'resnet18', 'Two ResNet-50 and a ResNet-18 policy.'),
    'amf_mobilenetv2_100x2': _twins(
        'mobilenetv2_100', 'mobilenetv3_small_050', 'Two MobileNetV2 and a MobileNetV3-Small 0.5 policy.'),
    'amf_convnext_tinyx2': _twins('convnext_tiny', 'resnet18', 'Two ConvNeXt-Tiny and a ResNet-18 policy.'),
    'amf_vit_small_patch16_224x2': _twins(
        'vit_small_patch16_224', 'resnet18', 'Two ViT-Small/16 and a ResNet-18 policy.'),
    'multitune': _twins(
        'resnet18', None, "MultiTune of any architectures: `backbones=('resnet18', 'resnet50')`."),
    'multitune_inception_v4x2': _twins(
        'inception_v4', None, "The paper's baseline: two Inception-v4, concatenated (AMF, Section IV-A6)."),
})
