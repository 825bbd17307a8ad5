"""A Plan in a bare PyTorch loop.

    python examples/bare_loop.py DIR --model resnet18
"""
import torch
import torch.nn.functional as F
from images import PLAN, model_and_images
from torch import nn
from torch.utils.data import DataLoader

import timm_amf


def fine_tune(model: nn.Module, plan: timm_amf.Plan, loader: DataLoader) -> nn.Module:
    """Train a model that has its pretrained weights, on the device that it is on."""
    device = next(model.parameters()).device
    timm_amf.reinit(model, plan)
    optimizer = timm_amf.create_optimizer(model, plan)
    scheduler = timm_amf.lr_scheduler(optimizer, plan, updates_per_epoch=len(loader))
    for epoch in range(plan.epochs):
        timm_amf.apply_freeze(model, plan, epoch)
        model.train()
        losses = []
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        print(f'epoch {epoch}: training loss {sum(losses) / len(losses):.3f}')
    return model.eval()


if __name__ == '__main__':
    model, train, val = model_and_images(__doc__)
    fine_tune(model, PLAN, DataLoader(train, 16, shuffle=True, drop_last=True))
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y in DataLoader(val, 32)])
    print(f'validation accuracy {100 * right.float().mean():.1f} %')
