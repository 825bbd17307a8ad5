"""SpotTune: every residual block frozen and tuned, and a policy network that routes each image block by block.

SpotTune (Guo et al., "SpotTune: Transfer Learning through Adaptive Fine-tuning", Section 3): block l of a pretrained
network is frozen, a copy of it is tuned, and I_l(x) in {0, 1} says which of the two an image takes (equation 2). The
policy network gives the logits of all decisions at once; in training they are drawn by straight-through Gumbel-softmax
(equations 3 and 4). In evaluation the likelier one is taken, which is the one to deploy; the paper draws there, too
(Section 3.1: the policy's output "is sampled"), as its code does, and so does `set_sampling(seed)`, repeatably.

Input: one image, normalised as the model's `pretrained_cfg` says, which is the backbone's; the policy renormalises
inside. What the backbone has besides its blocks exists once: before and between them (role `stem`, frozen unless a Plan
says otherwise), after the last one (`tail`) and the classifier (`head`).

The frozen copies are frozen in the paper's sense: weights, affine parameters and statistics of their batch norms. The
published code freezes convolutions only, so that the norms of its "frozen" path train; `frozen_bn='official'` does
that.

How an image's path is computed is `routing`: `both` computes all copies for all images, `routed` what the paths need,
with the same outputs and gradients; `auto` takes `routed` where it is exact.
"""
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Union

import torch
from timm.layers import get_device_dtype
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UserError
from . import decathlon, policy_resnet  # noqa: F401  registered before they are named below
from .blocks import classifier_names, classifiers, probe_part
from .charts import Chart, Seen, route_charts
from .composite import (
    Composite,
    build_networks,
    checkpoint_within,
    composite_cfg,
    joint_input_cfg,
    register_variants,
)
from .global_k import global_k_loss, update_shares
from .method import RunSettings
from .parts import Part, as_pair, create_part, part_cfg
from .policy import gumbel_noise, straight_through
from .records import RoutingRecord
from .routed_block import Decision, PartOfBlock, Route, RoutedBlock
from .routing import eager
from .sources import as_names

__all__ = ['SpotTune']

ROUTINGS = ('auto', 'both', 'routed')


class SpotTune(Composite):
    """A backbone whose blocks exist twice, and a policy network that chooses for each image and block.

    `backbone` is the timm model with a `RoutedBlock` in the place of each of its blocks, and its own classifier.
    """
    method_name = 'spottune'
    takes = frozenset({'global_k', 'temperature', 'eval_blocks', 'eval_sampling_seed'})

    def __init__(
            self,
            backbone: str = 'resnet18',
            policy: str = 'resnet10t',
            backbone_kwargs: Optional[dict[str, Any]] = None,
            policy_kwargs: Optional[dict[str, Any]] = None,
            policy_input_size: Optional[int] = None,
            first_block: int = 0,
            temperature: float = 5.,
            frozen_bn: str = 'frozen',
            routing: str = 'auto',
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: Optional[str] = None,
            drop_rate: float = 0.,
            drop_path_rate: Optional[float] = None,
            img_size: Optional[Union[int, tuple[int, int]]] = None,
            **build,
    ):
        """
        Args:
            backbone: timm architecture, with or without a pretrained tag.
            policy: timm architecture of the policy network.
            backbone_kwargs: Keyword arguments of the backbone's `timm.create_model`.
            policy_kwargs: Keyword arguments of the policy's.
            policy_input_size: Side in pixels that the policy's input is resized to; None keeps the backbone's size.
            first_block: Number of blocks before the first that is routed; they exist once and belong to the stem (the
                first macro block of the decathlon experiments, Section 4.1).
            temperature: Of the Gumbel-softmax, above 0 (5 in all of the paper's experiments).
            frozen_bn: `frozen`, or `official` for norms of the frozen path that train.
            routing: `auto`, `both` or `routed`.
            global_pool: The backbone's pooling; None leaves it to the backbone.
            drop_rate: The backbone's dropout before the classifier.
            drop_path_rate: Stochastic depth of the tuned path, for architectures that have it.

        The others are those of `AMF`.
        """
        super().__init__()
        if frozen_bn not in ('frozen', 'official'):
            raise UserError(f"frozen_bn is 'frozen' or 'official', not {frozen_bn!r}.")
        if routing not in ROUTINGS:
            raise UserError(f'routing is one of {", ".join(ROUTINGS)}, not {routing!r}.')
        part = _backbone_part(backbone, backbone_kwargs, num_classes, drop_rate, drop_path_rate)
        size = as_pair(img_size) or tuple(joint_input_cfg([part])['input_size'][-2:])
        part = part.sized(size)
        probe = probe_part(part, (in_chans, *size))
        probe.require_blocks()
        if not 0 <= first_block < len(probe.blocks):
            raise UserError(
                f"first_block is {first_block}, but '{backbone}' has {len(probe.blocks)} blocks that can be routed: "
                f'choose 0 to {len(probe.blocks) - 1}.')
        self.tokens = probe.tokens
        self.unpooled = global_pool == ''
        self.backbone_parts = [_pooling(part, global_pool, probe.tokens)]
        self.in_chans = in_chans
        self.img_size = size
        self.temperature = temperature
        self.frozen_bn = frozen_bn
        self.routing = routing
        self.first_block = first_block
        self.fixed_blocks: Optional[tuple[int, ...]] = None
        self.sampling: Optional[torch.Generator] = None
        self.grad_checkpointing = False
        self._route = Route()
        self._names = tuple(probe.blocks[first_block:])
        self._tail = probe.tail

        of_policy = Part(policy, 2 * len(self._names), policy_kwargs).sized(as_pair(policy_input_size) or size)
        # In this order, which the states of optimisers follow.
        (net,), (renorm,), self.policy = build_networks(
            self.backbone_parts, of_policy, in_chans, policy_input_size, random_policy=True, **build)
        self.renorm, self.backbone = renorm, net
        dd = get_device_dtype(self)
        for index, name in enumerate(self._names):
            block = self.backbone.get_submodule(name)
            routed = RoutedBlock(block, copy.deepcopy(block), index, self._route, frozen_bn)
            self.backbone.set_submodule(name, routed.train(block.training))
        # The share of images that took each tuned copy lately; what `compact` goes by.
        self.register_buffer('tuned_share', torch.full((len(self._names),), 0.5, **dd))
        self._adopt()

    @classmethod
    def outline(
            cls,
            backbone: str,
            policy: str,
            backbone_kwargs: Optional[dict[str, Any]] = None,
            policy_kwargs: Optional[dict[str, Any]] = None,
            num_classes: int = 1,
            drop_rate: float = 0.,
            drop_path_rate: Optional[float] = None,
            in_chans: int = 3,
            img_size: Optional[tuple[int, int]] = None,
            **_,
    ) -> tuple[dict[str, Any], int]:
        part = _backbone_part(backbone, backbone_kwargs, num_classes, drop_rate, drop_path_rate)
        own = part_cfg(part)
        names = tuple(f'backbone.{c}' for c in as_names(own.get('classifier')))
        cfg = composite_cfg(
            {'backbone': part, 'policy.net': Part(policy, 2, policy_kwargs)},
            classifier=names[0] if len(names) == 1 else names, pool_size=own.get('pool_size') or (1, 1))
        return cfg, 0 if img_size is None else len(probe_part(part.sized(img_size), (in_chans, *img_size)).levels)

    def _adopt(self) -> None:
        """What timm asks of a model, as the backbone has it."""
        self.num_classes = self.backbone.num_classes
        self.num_features = self.backbone.num_features
        self.head_hidden_size = getattr(self.backbone, 'head_hidden_size', self.num_features)
        levels = getattr(self.backbone, 'feature_info', None) or []
        self.feature_info = [dict(f, module=f'backbone.{f["module"]}') for f in levels]
        if hasattr(self.backbone, 'output_fmt'):
            self.output_fmt = self.backbone.output_fmt

    @property
    def global_pool(self) -> Any:
        """The backbone's pooling, which is a name, a module or None; '' where there is none."""
        return '' if self.unpooled else getattr(self.backbone, 'global_pool', None)

    # -- the parts ----------------------------------------------------------------------------------------------------

    @property
    def routed_blocks(self) -> list[RoutedBlock]:
        """The routed blocks that the model has, in order of execution."""
        return [m for m in self.backbone.modules() if isinstance(m, RoutedBlock)]

    @property
    def blocks_frozen(self) -> list[nn.Module]:
        """The frozen copies, in order of execution."""
        return [b.frozen for b in self.routed_blocks]

    @property
    def blocks_tuned(self) -> list[nn.Module]:
        """The tuned copies, in order of execution."""
        return [b.tuned for b in self.routed_blocks]

    @property
    def block_names(self) -> list[str]:
        """Paths of the routed blocks, in order of execution."""
        return [f'backbone.{name}' for name in self._names]

    @property
    def tuning_roles(self) -> dict[str, Union[str, list[str]]]:
        """Role -> paths of the modules that it covers; the innermost path counts."""
        present = [n for n, m in self.named_modules() if isinstance(m, RoutedBlock)]
        tuned = [f'{name}.tuned' for name in present]
        if self.frozen_bn == 'official':
            tuned += [
                f'{name}.frozen.{norm}' for name in present
                for norm, m in self.get_submodule(name).frozen.named_modules() if isinstance(m, _BatchNorm)
            ]
        modules = dict(self.backbone.named_modules())  # some may have been pruned
        tail = [f'backbone.{n}' for n in self._tail if n in modules and any(True for _ in modules[n].parameters())]
        roles = dict(
            stem=['backbone'], frozen=[f'{name}.frozen' for name in present], tuned=tuned, tail=tail, policy='policy',
            head=[f'backbone.{n}' for n in classifier_names(self.backbone)])
        return {role: paths for role, paths in roles.items() if paths}

    @property
    def role_defaults(self) -> dict[str, dict[str, Any]]:
        """What a role does where a Plan says nothing: the frozen copies and the stem do not train."""
        return {'frozen': {'train': 'none'}, 'stem': {'train': 'none'}}

    def role_layers(self) -> dict[str, int]:
        """Position of each parameter for layer decay, counted from the top."""
        layers, top = self._layers()
        return {n: top - layers.get(n, top) for n, _ in self.named_parameters()}

    def _networks(self) -> dict[str, nn.Module]:
        return {'backbone': self.backbone, 'policy.net': self.policy.net}

    def _plain_net(self, path: str, net: nn.Module) -> nn.Module:
        return probe_part(self.backbone_parts[0], (self.in_chans, *self.img_size)).net if path == 'backbone' else net

    def _plain_name(self, path: str, name: str) -> str:
        for block in self._names if path == 'backbone' else ():
            for copy_name in ('frozen', 'tuned'):
                if name.startswith(f'{block}.{copy_name}.'):
                    return f'{block}.{name[len(block) + len(copy_name) + 2:]}'
        return name

    # -- deciding -----------------------------------------------------------------------------------------------------

    def forward_policy(self, x: Tensor) -> Tensor:
        """Logits (B, blocks, 2) of the decisions: column 0 for the frozen copy, 1 for the tuned one."""
        return self.policy.forward_logits(x).unflatten(1, (len(self._names), 2))

    def forward_shares(self, x: Tensor) -> Tensor:
        """Which copy each image takes, (B, blocks): exactly 0 for the frozen one and 1 for the tuned one.

        In training they are drawn, and their gradient is that of the relaxed ones.
        """
        if self.fixed_blocks is not None:
            fixed = torch.zeros(len(self._names), device=x.device)
            fixed[list(self.fixed_blocks)] = 1.
            self._route.logits = None
            return fixed.expand(x.shape[0], -1)
        logits = self.forward_policy(x)
        self._route.logits = logits.detach()
        if self.training:
            logits = logits.to(torch.promote_types(self.tuned_share.dtype, torch.float32))  # whatever autocast does
            return straight_through(logits, gumbel_noise(logits), self.temperature)[..., 1]
        if self.sampling is not None:
            logits = logits + gumbel_noise(logits, self.sampling)
        return (logits[..., 1] > logits[..., 0]).to(logits.dtype)

    def set_blocks(self, blocks: Optional[Union[str, Sequence[Union[int, str]]]] = None) -> None:
        """Fix the path of all images, or give it back to the policy.

        Args:
            blocks: The blocks whose tuned copy is taken, by index or name (`block_names`); `tuned` for all of them
                ("running fine-tuned blocks", Section 4.2.1), `frozen` for none; None for the policy.
        """
        self.fixed_blocks = None if blocks is None else self._block_indices(blocks)

    def _block_indices(self, blocks: Union[str, Sequence[Union[int, str]]]) -> tuple[int, ...]:
        if isinstance(blocks, str):
            if blocks not in ('tuned', 'frozen'):
                raise UserError(f"blocks are 'tuned', 'frozen' or a list of blocks, not {blocks!r}.")
            return tuple(range(len(self._names))) if blocks == 'tuned' else ()
        names = {n: i for i, name in enumerate(self._names) for n in (name, f'backbone.{name}')}
        indices = set()
        for block in blocks:
            index = names.get(block, block)
            if isinstance(index, str) or not -len(self._names) <= index < len(self._names):
                raise UserError(f'there is no routed block {block!r}: they are {", ".join(self._names)}.')
            indices.add(index % len(self._names))
        return tuple(sorted(indices))

    def set_sampling(self, seed: Optional[int] = None) -> None:
        """Evaluation draws the decisions with this seed, from now on, as the paper does; None takes the likelier."""
        self.sampling = None if seed is None else torch.Generator().manual_seed(seed)

    def _routed(self, x: Tensor) -> bool:
        if self.routing == 'both' or not eager(x):
            return False
        if not (self.training and torch.is_grad_enabled()):
            return not (self.training and self.frozen_bn == 'official')
        exact = all(block.exact() for block in self.routed_blocks)
        if self.routing == 'routed' and not exact:
            raise UserError(
                "routing='routed' cannot train a frozen path that is not frozen: freeze its parameters and norms "
                "(timm_amf.apply_freeze), or set routing='auto'.")
        return exact

    def _decide(self, x: Tensor) -> None:
        routed = self._routed(x)
        self._route.decision = Decision(self.forward_shares(x), routed)

    # -- computing ----------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """The backbone's unpooled maps; of a backbone of tokens the pooled features, as (B, C, 1, 1)."""
        self._decide(x)
        x = self.backbone.forward_features(self.renorm(x))
        return self.backbone.forward_head(x, pre_logits=True)[:, :, None, None] if self.tokens else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not self.tokens:
            return self.backbone.forward_head(x, pre_logits=pre_logits)
        x = x if self.unpooled else x.flatten(1)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def __getstate__(self):
        return {**self.__dict__, 'sampling': None}

    def forward_intermediates(self, x: Tensor, *args, **kwargs) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """The backbone's intermediate features, each image on its path; arguments as the backbone's."""
        self._decide(x)
        try:
            return self.backbone.forward_intermediates(self.renorm(x), *args, **kwargs)
        except PartOfBlock as e:
            raise UserError(
                f"'{self.backbone_parts[0].name}' has no intermediate features here, for they lie within its blocks "
                f'({e}); take those of model.compact(...).') from e

    def prune_intermediate_layers(
            self, indices: Union[int, list[int]] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Remove from the backbone what `forward_intermediates` does not need for these levels; the policy stays."""
        take = self.backbone.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        self.num_classes = 0 if prune_head else self.num_classes
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Every routed block is recomputed in the backward pass; the policy if it can."""
        self.grad_checkpointing = enable
        for block in self.routed_blocks:
            block.grad_checkpointing = enable
        checkpoint_within(self.policy.net, enable)

    def get_classifier(self) -> nn.Module:
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new classifier, as the backbone draws it, or none for 0 classes; no `global_pool` keeps the pooling."""
        dd = get_device_dtype(self)
        if global_pool is not None:
            self.unpooled = global_pool == ''
            self.backbone_parts = [_pooling(self.backbone_parts[0], global_pool, self.tokens)]
        part = self.backbone_parts[0]
        part.num_classes = num_classes
        own_pool = None if global_pool is None else part.kwargs.get('global_pool')
        self.backbone.reset_classifier(num_classes, *(() if own_pool is None else (own_pool,)))
        for layer in classifiers(self.backbone):
            layer.to(**dd).train(self.training)
        self._adopt()

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` takes in place of this model: its dense form, traced.

        A backbone's own code calls its blocks with one argument, so a script has no way to hand them a decision; a
        trace follows it through. The batch size stays free.
        """
        p = next(self.parameters())
        example = torch.zeros(2, self.in_chans, *self.img_size, device=p.device, dtype=p.dtype)
        with torch.no_grad():
            return _Traced(torch.jit.trace(self, example, check_trace=False))

    # -- as a method (see `Method`) -----------------------------------------------------------------------------------

    def forward_train(self, x: Tensor, settings: RunSettings) -> dict[str, Tensor]:
        """`output` (B, num_classes), the decisions `shares` (B, blocks) that led to it, and the policy's
        `probabilities` of the tuned copies, of a fixed path 0 or 1.
        """
        output, shares, logits = self(x), self._route.decision.shares, self._route.logits
        probabilities = shares if logits is None else logits.softmax(-1)[..., 1]
        return dict(output=output, shares=shares, probabilities=probabilities)

    def extra_loss(self, parts, target, criterion, settings: RunSettings) -> Union[Tensor, float]:
        """The losses of global-k, if the Plan asks for them (Section 3.3)."""
        plan = settings.plan
        if plan is None or plan.global_k is None:
            return 0.
        running = update_shares(self.tuned_share, parts['shares'], plan.global_k_window)
        return global_k_loss(parts['shares'], plan.global_k, tuple(plan.global_k_weights), running)

    def start_epoch(self, epoch: int, settings: RunSettings) -> None:
        temperature = settings.plan.temperature_at(epoch)
        if temperature is not None:
            self.temperature = temperature

    def create_record(self, components, device=None) -> RoutingRecord:
        return RoutingRecord(len(self._names), components, device)

    def charts(self, seen: Seen) -> list[Chart]:
        return route_charts(seen)

    @contextmanager
    def evaluation(
            self,
            global_k: Optional[int] = None,
            blocks: Optional[str] = None,
            sampling_seed: Optional[int] = None,
    ) -> Iterator[None]:
        """Around an evaluation: the paths that are asked for, and the model's own again afterwards.

        Args:
            global_k: All images take the tuned copy of this many most used blocks: what `compact` gives.
            blocks: All images take the tuned copy of these: `tuned`, `frozen`, or indices and names with commas
                between; goes before `global_k`.
            sampling_seed: Draw the decisions instead of taking the likelier one.
        """
        before = self.fixed_blocks, self.sampling
        path = self.fixed_path(global_k, blocks)
        if path is not None:
            self.set_blocks(path)
        self.set_sampling(sampling_seed)
        try:
            yield
        finally:
            self.fixed_blocks, self.sampling = before

    def fixed_path(self, global_k: Optional[int] = None, blocks: Optional[str] = None) -> Optional[list[int]]:
        if blocks:
            named = blocks if blocks in ('tuned', 'frozen') else [
                int(item) if item.lstrip('-').isdigit() else item for item in blocks.split(',') if item]
            return list(self._block_indices(named))
        return None if global_k is None else list(self.chosen_blocks(global_k))

    def compact_args(self) -> dict[str, Any]:
        """Keyword arguments with which `timm.create_model` builds the plain model: all but where weights came from."""
        return {k: v for k, v in self.backbone_parts[0].kwargs.items() if not k.startswith('pretrained_cfg')}

    def sentence(self) -> str:
        backbone, policy = self.architectures()
        return (
            f'A SpotTune: every residual block of {backbone} exists frozen and tuned, and a policy network ({policy}) '
            'routes each image through one of the two, block by block.')

    def usage_note(self) -> str:
        return '`model.forward_policy(x)` gives the logits of frozen and tuned, (batch, blocks, 2).'

    @contextmanager
    def exportable(self) -> Iterator[nn.Module]:
        """Both copies of each block computed: a file cannot split a batch by what it decides."""
        before, self.routing = self.routing, 'both'
        try:
            yield self
        finally:
            self.routing = before

    # -- one set of blocks for all images -----------------------------------------------------------------------------

    def chosen_blocks(self, k: Optional[int] = None) -> tuple[int, ...]:
        """The blocks whose tuned copy most images took lately (`tuned_share`).

        Args:
            k: Number of blocks, the most used first; None for all that more than half of the images used.
        """
        shares = self.tuned_share.tolist()
        if k is None:
            return tuple(i for i, share in enumerate(shares) if share > 0.5)
        if not 0 <= k <= len(shares):
            raise UserError(f'k is {k}, but {len(shares)} blocks are routed: choose 0 to {len(shares)}.')
        return tuple(sorted(sorted(range(len(shares)), key=lambda i: -shares[i])[:k]))

    @torch.no_grad()
    def compact(self, blocks: Optional[Union[int, str, Sequence[Union[int, str]]]] = None) -> nn.Module:
        """A plain timm model with the tuned copy of some blocks and the frozen copy of the others (Section 3.3).

        It computes what this model computes under `set_blocks(blocks)`, needs nothing of this package, and is saved,
        pushed and exported as any timm model.

        Args:
            blocks: As for `set_blocks`; a number for that many most used ones; None for those that most images used.

        Returns:
            A new model in this one's mode, its `pretrained_cfg` saying which normalisation it expects.
        """
        by_use = blocks is None or isinstance(blocks, int)
        tuned = self.chosen_blocks(blocks) if by_use else self._block_indices(blocks)
        dd = get_device_dtype(self)
        plain = create_part(self.backbone_parts[0], in_chans=self.in_chans, **dd)
        dropped = tuple(f'{name}.{"frozen" if i in tuned else "tuned"}.' for i, name in enumerate(self._names))
        plain.load_state_dict({
            self._plain_name('backbone', name): tensor for name, tensor in self.backbone.state_dict().items()
            if not name.startswith(dropped)
        })
        plain.pretrained_cfg['num_classes'] = self.num_classes
        return plain.train(self.training)


class _Traced(nn.Module):
    """What a trace becomes for `torch.jit.script`."""

    def __init__(self, traced: torch.jit.ScriptModule):
        super().__init__()
        self.traced = traced

    def forward(self, x: Tensor) -> Tensor:
        return self.traced(x)


def _backbone_part(
        backbone: str,
        kwargs: Optional[dict[str, Any]] = None,
        num_classes: int = 0,
        drop_rate: float = 0.,
        drop_path_rate: Optional[float] = None,
) -> Part:
    common = dict(drop_path_rate=drop_path_rate, drop_rate=drop_rate or None)
    return Part(backbone, num_classes, {**{k: v for k, v in common.items() if v is not None}, **(kwargs or {})})


def _pooling(part: Part, global_pool: Optional[str], tokens: bool) -> Part:
    """The part with another pooling. Tokens are always pooled: unpooled, their pooled features are a map of 1x1."""
    if global_pool is None or (tokens and global_pool == ''):
        return part
    return Part(part.name, part.num_classes, {**part.kwargs, 'global_pool': global_pool})


def _variant(backbone: str, policy: str, description: str) -> tuple[type[SpotTune], dict[str, Any], str]:
    return SpotTune, {'backbone': backbone, 'policy': policy}, description


register_variants(__name__, {
    'spottune': _variant(
        'resnet18', 'resnet10t', "SpotTune of any architecture: `backbone='resnet50', policy='resnet10t'`."),
    'spottune_resnet26': _variant(
        'resnet26_decathlon', 'resnet8_decathlon',
        'The ResNet-26 of the Visual Decathlon, 12 blocks, and a policy of three (SpotTune, Section 4.1). '
        'There the first macro block is frozen and unrouted: `first_block=4`.'),
    'spottune_resnet18': _variant('resnet18', 'policy_resnet10', 'ResNet-18, 8 blocks, and a policy of four blocks.'),
    'spottune_resnet50': _variant(
        'resnet50', 'policy_resnet10',
        "The paper's network: ResNet-50, 16 blocks, and a policy of four blocks (SpotTune, Section 4.1)."),
    'spottune_resnet101': _variant(
        'resnet101', 'policy_resnet10', 'ResNet-101, 33 blocks, and a policy of four blocks.'),
    'spottune_mobilenetv2_100': _variant(
        'mobilenetv2_100', 'mobilenetv3_small_050', 'MobileNetV2, 17 blocks, and a MobileNetV3-Small 0.5 policy.'),
    'spottune_convnext_tiny': _variant(
        'convnext_tiny', 'policy_resnet10', 'ConvNeXt-Tiny, 18 blocks, and a policy of four blocks.'),
    'spottune_vit_small_patch16_224': _variant(
        'vit_small_patch16_224', 'policy_resnet10', 'ViT-Small/16, 12 blocks, and a policy of four blocks.'),
})
