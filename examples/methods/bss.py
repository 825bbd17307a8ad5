"""Batch spectral shrinkage for any timm model: a penalty on its features, in one file.

    train_amf.py DIR --device-modules bss --model bss --model-kwargs backbone=resnet50 weight=0.001 --pretrained ...

Chen et al., "Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe Transfer Learning"
(NeurIPS 2019), equation 6: the k smallest singular values of a batch's features are pulled towards zero.
"""
import timm
import torch
from timm.models import register_model

from timm_amf.models import PlainMethod, Record

__all__ = ['BSS']


class BSS(PlainMethod):
    """The penalty weight * (sum of the squares of the k smallest singular values of the pooled features)."""
    method_name = 'bss'
    citation = '''@inproceedings{chen2019catastrophic,
  title={Catastrophic Forgetting Meets Negative Transfer: Batch Spectral Shrinkage for Safe Transfer Learning},
  author={Chen, Xinyang and Wang, Sinan and Fu, Bo and Long, Mingsheng and Wang, Jianmin},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}'''

    def __init__(self, model, weight, k):
        super().__init__(model)
        self.weight, self.k = weight, k

    def forward_train(self, x, settings):
        features = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        return dict(output=self.model.get_classifier()(features), features=features)

    def extra_loss(self, parts, target, criterion, settings):
        return self.weight * self.smallest(parts['features']).square().sum()

    def smallest(self, features):
        return torch.linalg.svdvals(features.float())[-self.k:]

    def create_record(self, components, device=None):
        return FeatureNorm('features', ['feature_norm'], components, device)

    def sentence(self):
        return f'{self.model.backbone_name}, fine-tuned with batch spectral shrinkage (weight {self.weight:g}).'


class FeatureNorm(Record):
    """Mean norm of the features, which the penalty should shrink."""

    def values_of(self, parts):
        return super().values_of(parts).norm(dim=1, keepdim=True)


@register_model
def bss(pretrained=False, backbone='resnet18', weight=0.001, k=1, **kwargs):
    """A timm model of any architecture whose training has the penalty; its weights are those of the plain model."""
    model = timm.create_model(backbone, pretrained=pretrained, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, 'architecture': 'bss'}
    model.backbone_name = backbone
    model.method = BSS(model, weight, k)
    return model
