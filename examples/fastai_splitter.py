"""A Plan in fastai: a splitter for any timm model, an LR for each part and depth, and gradual unfreezing.

    pip install fastai
    python examples/fastai_splitter.py DIR --model resnet18
"""
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy
from images import PLAN, model_and_images
from torch.utils.data import DataLoader

import timm_amf


def splitter(plan):
    """What `Learner(splitter=)` takes: groups of parameters that share an LR; what never trains is in none."""
    return lambda model: [group['params'] for group in timm_amf.param_groups(model, plan)]


class PlanCallback(Callback):
    """The LRs, weight decays and start epochs of a Plan; fastai's own schedule (`fit_one_cycle`) drives the LRs."""

    def __init__(self, plan):
        self.plan = plan

    def before_fit(self):
        groups = timm_amf.param_groups(self.model, self.plan)
        self.opt.set_hyper('wd', [group['weight_decay'] for group in groups])

    def before_epoch(self):
        timm_amf.apply_freeze(self.model, self.plan, self.epoch)


def lrs(model, plan):
    """The `lr_max` of `fit_one_cycle`, one for each group of the splitter."""
    return [group['lr'] for group in timm_amf.param_groups(model, plan)]


if __name__ == '__main__':
    model, train, val = model_and_images(__doc__)
    loaders = DataLoaders(DataLoader(train, 16, shuffle=True, drop_last=True), DataLoader(val, 32))
    learn = Learner(
        loaders, model, loss_func=CrossEntropyLossFlat(), splitter=splitter(PLAN), cbs=PlanCallback(PLAN),
        metrics=accuracy)
    learn.fit_one_cycle(PLAN.epochs, lr_max=lrs(model, PLAN))
