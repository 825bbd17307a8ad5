"""A Plan in the Trainer of Hugging Face's transformers: optimiser, schedule and freezing of any timm model.

    pip install transformers
    python examples/huggingface_trainer.py DIR --model resnet18
"""
import math

import torch
import torch.nn.functional as F
from images import PLAN, model_and_images
from transformers import Trainer, TrainerCallback, TrainingArguments

import timm_amf


class Freeze(TrainerCallback):
    def __init__(self, plan):
        self.plan = plan

    def on_epoch_begin(self, args, state, control, model, **kwargs):
        timm_amf.apply_freeze(model, self.plan, int(state.epoch))


class PlanTrainer(Trainer):
    """A Trainer of a timm model with its pretrained weights, for data of images and labels in pairs."""

    def __init__(self, model, plan, args, train_dataset, **kwargs):
        timm_amf.reinit(model, plan)
        optimizer = timm_amf.create_optimizer(model, plan)  # here: before a resume loads other weights
        batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        scheduler = timm_amf.lr_scheduler(optimizer, plan, math.ceil(len(train_dataset) / batch))
        args.num_train_epochs, args.label_names = plan.epochs, ['labels']
        super().__init__(
            model, args, self.collate, train_dataset, callbacks=[Freeze(plan)], optimizers=(optimizer, scheduler),
            **kwargs)

    def collate(self, pairs):
        return dict(x=torch.stack([x for x, _ in pairs]), labels=torch.tensor([y for _, y in pairs]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(inputs['x'])
        loss = F.cross_entropy(logits, inputs['labels'])
        return (loss, dict(logits=logits)) if return_outputs else loss


if __name__ == '__main__':
    model, train, val = model_and_images(__doc__)
    args = TrainingArguments(
        'output/huggingface', per_device_train_batch_size=16, eval_strategy='epoch', report_to='none')
    PlanTrainer(
        model, PLAN, args, train.dataset, eval_dataset=val.dataset,
        compute_metrics=lambda p: dict(accuracy=(p.predictions.argmax(1) == p.label_ids).mean())).train()
