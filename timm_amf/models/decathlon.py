"""The residual networks of the Visual Decathlon experiments.

`resnet26_decathlon` is the ResNet-26 of Rebuffi et al., "Learning multiple visual domains with residual adapters" (NIPS
2017, section 5) without its adapters, which SpotTune's section 4.1 takes over: three stages of four basic blocks each
for images of 64 pixels. `resnet8_decathlon`, one block a stage, is SpotTune's policy network for it.

It is not timm's `resnet26`, which has four stages of two bottleneck blocks, a stem of stride 4, and shortcuts with
weights.
"""
import re
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__ = ['DecathlonResNet', 'convert_adapter_keys']


class PaddedShortcut(nn.Module):
    """Shortcut without weights to a map of half the size: 2x2 means, and channels of zeros after those of the input."""

    def __init__(self, in_chs: int, out_chs: int):
        super().__init__()
        if out_chs < in_chs:
            raise ValueError(f'a shortcut without weights cannot narrow {in_chs} channels to {out_chs}')
        self.extra = out_chs - in_chs
        # Where the map has an odd side, the convolution beside it rounds up.
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.pool(x), (0, 0, 0, 0, 0, self.extra))


class DecathlonBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, a shortcut without weights, and a ReLU after their sum."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, drop_path: float = 0., device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(out_chs, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = PaddedShortcut(in_chs, out_chs) if stride == 2 else nn.Identity()
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.drop_path(self.bn2(self.conv2(x)))
        return self.act2(x + shortcut)


class DecathlonResNet(nn.Module):
    """Stem of stride 1 with batch norm and no activation, stages that each begin by halving the map, and one more batch
    norm with a ReLU before the pooling.
    """

    def __init__(
            self,
            layers: Sequence[int] = (4, 4, 4),
            channels: Sequence[int] = (64, 128, 256),
            stem_chs: int = 32,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            layers: Blocks of each stage.
            channels: Width of each stage.
            stem_chs: Width of the stem.
            num_classes: Classes, 0 for the pooled features.
            in_chans: Channels of the images.
            global_pool: Global pooling; '' for none.
            drop_rate: Dropout before the classifier.
            drop_path_rate: Stochastic depth of the last block; it grows linearly over the blocks.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, stem_chs, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_chs, **dd)
        self.feature_info = [dict(num_chs=stem_chs, reduction=1, module='bn1')]
        drop_path = calculate_drop_path_rates(drop_path_rate, list(layers), stagewise=True)
        stages, in_chs = [], stem_chs
        for i, (depth, out_chs) in enumerate(zip(layers, channels, strict=True)):
            stages.append(nn.Sequential(*[
                DecathlonBlock(out_chs if j else in_chs, out_chs, 1 if j else 2, drop_path[i][j], **dd)
                for j in range(depth)
            ]))
            in_chs = out_chs
            self.feature_info.append(dict(num_chs=out_chs, reduction=2 ** (i + 1), module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(in_chs, **dd)
        self.act = nn.ReLU(inplace=True)

        self.num_features = in_chs
        self.global_pool, self.fc = create_classifier(in_chs, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = in_chs * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw the convolutions from N(0, 2 / (9 * outputs)); the classifier is PyTorch's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r'^(?:conv1|bn1)\.',
            blocks=r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.(\d+)', None), (r'^norm', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier; the pooling stays as it is if not given."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, list[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """Features and the levels on the way to them: the stem's map, then that of each stage. Arguments as in timm."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        x = self.bn1(self.conv1(x))
        intermediates = [x] if 0 in take_indices else []
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max_index]
        level = 0
        for level, stage in enumerate(stages, start=1):  # noqa: B007
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if level in take_indices:
                # The ReLU works in place: not on the level itself.
                intermediates.append(F.relu(self.norm(x)) if norm and level == len(self.stages) else x)
        if intermediates_only:
            return intermediates
        return self.act(self.norm(x)) if level == len(self.stages) else x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, list[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove what the levels of the given indices do not need, and return those indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        prune_end = max_index < len(self.stages)
        if prune_norm or prune_end:
            self.norm, self.act = nn.Identity(), nn.Identity()
        self.stages = self.stages[:max_index]
        if prune_end:
            # The features now end at the last level that is kept, and no head fits them.
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps (B, num_features, H / 8, W / 8): each stage halves them."""
        x = self.bn1(self.conv1(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of the maps; with `pre_logits` the pooled features."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# Modules of the residual adapters' networks, as patterns, and their names here.
_ADAPTER_MODULES = {
    r'pre_layers_conv\.conv': 'conv1',
    r'pre_layers_conv\.bns\.0': 'bn1',
    r'end_bns\.0\.0': 'norm',
    r'linears\.0': 'fc',
}
for _stage in range(3):
    for _theirs, _ours in (('conv1', '1'), (r'conv2\.1', '2')):
        _block = rf'layer{_stage + 1}\.(\d+)\.{_theirs}\.'
        _ADAPTER_MODULES[_block + 'conv'] = rf'stages.{_stage}.\1.conv{_ours}'
        _ADAPTER_MODULES[_block + r'bns\.0'] = rf'stages.{_stage}.\1.bn{_ours}'


def convert_adapter_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network of the residual adapters' code (github.com/srebuffi/residual_adapters) under our names.

    Their ResNet-26 holds a batch norm and a classifier for each of its tasks; the first task's are taken, which in the
    published ImageNet network is the only one. A state dict that is already ours is returned as it is.

    Args:
        state_dict: `net.state_dict()`, with or without `module.` of DataParallel before the names.

    Raises:
        ValueError: If the network has adapters, which have no place here.
    """
    state_dict = {name.removeprefix('module.'): tensor for name, tensor in state_dict.items()}
    if 'pre_layers_conv.conv.weight' not in state_dict:
        return state_dict
    converted = {}
    for name, tensor in state_dict.items():
        if re.search(r'(^end_bns|^linears|\.bns)\.(?!0\.)', name):  # another task's
            continue
        module, _, leaf = name.rpartition('.')
        matches = ((re.fullmatch(pattern, module), ours) for pattern, ours in _ADAPTER_MODULES.items())
        found = next((match.expand(ours) for match, ours in matches if match), None)
        if found is None:
            raise ValueError(
                f'{name} has no place in a ResNet-26 without adapters; take the network that was trained without them')
        converted[f'{found}.{leaf}'] = tensor
    return converted


def _checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    return convert_adapter_keys(state_dict.get('state_dict', state_dict))


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 64, 64), 'pool_size': (8, 8),
        # The challenge's images have a short side of 72, of which the middle 64 are looked at.
        'crop_pct': 64 / 72, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'resnet26_decathlon.untrained': _cfg(),
    'resnet8_decathlon.untrained': _cfg(),
})


def _create(variant: str, pretrained: bool = False, **kwargs) -> DecathlonResNet:
    return build_model_with_cfg(
        DecathlonResNet,
        variant,
        pretrained,
        pretrained_filter_fn=_checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


@register_model
def resnet26_decathlon(pretrained: bool = False, **kwargs) -> DecathlonResNet:
    """ResNet-26 of the Visual Decathlon: 12 basic blocks of 64, 128 and 256 channels for images of 64 pixels."""
    return _create('resnet26_decathlon', pretrained, **{'layers': (4, 4, 4), **kwargs})


@register_model
def resnet8_decathlon(pretrained: bool = False, **kwargs) -> DecathlonResNet:
    """SpotTune's policy network for it: the same with one block of each width."""
    return _create('resnet8_decathlon', pretrained, **{'layers': (1, 1, 1), **kwargs})
