"""A Plan in a bare PyTorch loop.

    python examples/bare_loop.py DIR --model resnet18
"""
import torch
import torch.nn.functional as F
from images import PLAN, model_and_images

import timm_amf


def fine_tune(model, plan, loader):
    """Train a model that has its pretrained weights."""
    timm_amf.reinit(model, plan)
    optimizer = timm_amf.create_optimizer(model, plan)
    scheduler = timm_amf.lr_scheduler(optimizer, plan, updates_per_epoch=len(loader))
    model.train()
    for epoch in range(plan.epochs):
        timm_amf.apply_freeze(model, plan, epoch)
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        print(f'epoch {epoch}: loss of the last batch {loss.item():.3f}')
    return model.eval()


if __name__ == '__main__':
    model, train, val = model_and_images(__doc__)
    fine_tune(model, PLAN, train)
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) == y for x, y in val])
    print(f'validation accuracy {100 * right.float().mean():.1f} %')
