"""The policy network of SpotTune's ResNet-50 experiments: a ResNet of four blocks, 64 to 512 channels (Section 4.1)."""
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor

__all__ = []

default_cfgs = generate_default_cfgs({
    'policy_resnet10.in1k': {
        # Its layers are a subset of this network's.
        'hf_hub_id': 'timm/resnet18.a1_in1k',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
    },
})


def _first_blocks(state_dict: dict[str, Tensor], model: ResNet) -> dict[str, Any]:
    """Of a ResNet-18 the stem, the first block of each stage, and the classifier."""
    return {k: v for k, v in state_dict.items() if not k.startswith('layer') or k.split('.')[1] == '0'}


@register_model
def policy_resnet10(pretrained: bool = False, **kwargs) -> ResNet:
    """A ResNet of one basic block a stage. The paper does not say where its weights start; here from ResNet-18's."""
    return build_model_with_cfg(
        ResNet,
        'policy_resnet10',
        pretrained,
        pretrained_filter_fn=_first_blocks,
        **dict(dict(block=BasicBlock, layers=(1, 1, 1, 1)), **kwargs),
    )
