"""A Plan in fastai: a splitter for any timm model, an LR for each part and depth, and gradual unfreezing.

    pip install fastai
    python examples/fastai_splitter.py DIR --model resnet18
"""
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy
from images import PLAN, model_and_images

import timm_amf


class Freeze(Callback):
    def __init__(self, plan):
        self.plan = plan

    def before_epoch(self):
        timm_amf.apply_freeze(self.model, self.plan, self.epoch)


def plan_learner(loaders, model, plan, **kwargs):
    """A Learner with the groups, LRs, weight decays and first epochs of a Plan; `fit_one_cycle` drives the LRs."""
    groups = timm_amf.param_groups(model, plan)  # what never trains is in none
    return Learner(
        loaders, model, splitter=lambda _: [group['params'] for group in groups], lr=[group['lr'] for group in groups],
        wd=[group['weight_decay'] for group in groups], **kwargs).add_cb(Freeze(plan))


if __name__ == '__main__':
    model, train, val = model_and_images(__doc__)
    learn = plan_learner(
        DataLoaders(train, val), model, PLAN, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    learn.fit_one_cycle(PLAN.epochs)
