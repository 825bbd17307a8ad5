"""The public API as a user calls it, for the type checker alone: mypy reads it, nothing runs it."""
import torch
from torch import nn

import timm_amf


def fine_tune(model: nn.Module, images: torch.Tensor) -> timm_amf.Plan:
    plan: timm_amf.Plan = timm_amf.Plan.from_yaml('plan.yaml')
    plan = timm_amf.Plan(lr=0.01, epochs=3, roles={'head': timm_amf.RolePlan(lr=0.1)})
    table = timm_amf.resolve(model, plan)
    timm_amf.apply_freeze(model, table, 0)
    optimizer: torch.optim.Optimizer = timm_amf.create_optimizer(model, table)
    scheduler = timm_amf.GroupScheduler(optimizer, plan)
    scheduler.step(1)
    names: list[str] = timm_amf.list_blocks(model)
    loaded: nn.Module = timm_amf.load('me/birds')
    loaded(images)
    print(names, timm_amf.__version__)
    torchs: torch.optim.lr_scheduler.LRScheduler = timm_amf.lr_scheduler(optimizer, plan, 10)
    torchs.step()
    return plan


def commands() -> None:
    run: timm_amf.Run = timm_amf.train('birds', 'resnet18', plan=timm_amf.Plan(), epochs=3)
    accuracy: float = run.metrics['top1']
    low: float = timm_amf.evaluate(run.folder, ten_crop=True)[0].top1_low
    labels: list[str] = next(timm_amf.predict(run.folder, 'photos', batch_size=4)).labels
    found: timm_amf.Plan = timm_amf.search('birds', 'resnet18').plan
    print(accuracy, low, labels, found, timm_amf.report([run.folder]).name, timm_amf.export(run.folder, 'onnx').path)
