"""A Plan in Lightning, where unfreezing is right under DDP and after a resume.

    pip install lightning
    python examples/lightning_callback.py DIR --model resnet18
"""
import lightning as L
import torch.nn.functional as F
from images import PLAN, model_and_images
from lightning.pytorch.strategies import DDPStrategy

import timm_amf


class PlanCallback(L.Callback):
    """Freezes and unfreezes `module.model` as `module.plan` says, by the number of the epoch alone."""

    def on_train_epoch_start(self, trainer, module):
        changed = timm_amf.apply_freeze(module.model, module.plan, trainer.current_epoch)
        if changed and isinstance(trainer.strategy, DDPStrategy):  # a reducer knows what trained when it was built
            trainer.strategy.model = module
            trainer.strategy.configure_ddp()


class Classifier(L.LightningModule):
    """Any timm model with its pretrained weights."""

    def __init__(self, model, plan):
        super().__init__()
        timm_amf.reinit(model, plan)
        self.model, self.plan = model, plan
        self.optimizer = timm_amf.create_optimizer(model, plan)  # here: before a resume loads other weights

    def configure_optimizers(self):
        updates = self.trainer.estimated_stepping_batches // self.trainer.max_epochs
        scheduler = timm_amf.lr_scheduler(self.optimizer, self.plan, updates)
        return [self.optimizer], [dict(scheduler=scheduler, interval='step')]

    def training_step(self, batch, _):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log('val_acc', (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True, sync_dist=True)


if __name__ == '__main__':
    model, train, val = model_and_images(__doc__)
    trainer = L.Trainer(max_epochs=PLAN.epochs, callbacks=[PlanCallback()], default_root_dir='output/lightning')
    trainer.fit(Classifier(model, PLAN), train, val)
    print(trainer.callback_metrics)
