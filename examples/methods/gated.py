"""Two branches whose logits a gate mixes for each image: a method of its own, in one file.

    train_amf.py DIR --device-modules gated --model gated --branch-lr 0.001 0.02 --policy-lr 0.01 --head-lr 0.02 ...

Where an AMF weighs features before one classifier, each branch here has a classifier of its own, and the gate, one
logistic unit on the first branch's features, mixes what they say: g * a + (1 - g) * b.
"""
import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from timm_amf.models import Method, Record

__all__ = ['Gated']


class Gated(Method, nn.Module):
    method_name = 'gated'
    tuning_roles = {'branch.0': 'branches.0', 'branch.1': 'branches.1', 'policy': 'gate', 'head': 'heads'}

    def __init__(self, backbones=('resnet18', 'resnet18'), num_classes=1000, in_chans=3, **kwargs):
        super().__init__()
        self.branches = nn.ModuleList(timm.create_model(name, num_classes=0, in_chans=in_chans) for name in backbones)
        self.num_classes, self.num_features = num_classes, sum(b.head_hidden_size for b in self.branches)
        self.gate = nn.Linear(self.branches[0].head_hidden_size, 1)
        self.heads = nn.ModuleList(nn.Linear(b.head_hidden_size, num_classes) for b in self.branches)

    def get_classifier(self):
        return self.heads

    def forward_train(self, x, settings):
        features = [branch(x) for branch in self.branches]
        first, second = (head(m) for head, m in zip(self.heads, features))
        gate = self.gate(features[0]).sigmoid()
        return dict(output=gate * first + (1 - gate) * second, gate=gate)

    def forward(self, x):
        return self.forward_train(x, None)['output']

    def create_record(self, components, device=None):
        return Record('gate', ['gate'], components, device)

    def networks(self):
        return list(self.branches)

    def sentence(self):
        return f'{" and ".join(self.architectures())}, whose logits a gate mixes for each image.'


def _to_both(state_dict, model):
    """The weights of one backbone go to both branches; those of a whole model stay as they are."""
    if 'gate.weight' in state_dict:
        return state_dict
    return {f'branches.{i}.{name}': tensor for i in range(2) for name, tensor in state_dict.items()}


_resnet18 = timm.get_pretrained_cfg('resnet18').to_dict()
default_cfgs = generate_default_cfgs({'gated.in1k': {**_resnet18, 'classifier': None}})


@register_model
def gated(pretrained=False, **kwargs):
    """Two backbones and a gate; `--pretrained` starts both branches from the weights of resnet18."""
    return build_model_with_cfg(
        Gated, 'gated', pretrained, pretrained_filter_fn=_to_both, pretrained_strict=False, **kwargs)
