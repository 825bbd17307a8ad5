"""What the examples share: a timm model and a folder of images, from a command line.

    DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg; `--weights FILE` for weights that are on this machine
"""
import argparse

import timm
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import timm_amf

# The classifier first; from the second epoch on all of it.
PLAN = timm_amf.Plan(
    opt='adamw', lr=3e-4, weight_decay=0.01, epochs=4, roles=dict(backbone=dict(start_epoch=1), head=dict(lr=3e-3)))


def model_and_images(doc: str) -> tuple[nn.Module, DataLoader, DataLoader]:
    """The model with a new classifier, and batches of the training and of the validation images in its transforms."""
    parser = argparse.ArgumentParser(description=doc.partition('\n')[0])
    parser.add_argument('data', metavar='DIR')
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--weights', metavar='FILE', help='default: those of the Hub')
    parser.add_argument('--img-size', type=int, default=224)
    args = parser.parse_args()
    train, val = (ImageFolder(f'{args.data}/{split}') for split in ('train', 'val'))
    overlay = dict(file=args.weights) if args.weights else None
    model = timm.create_model(
        args.model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=len(train.classes))
    nn.init.zeros_(model.get_classifier().weight)  # with timm's own start the first loss of some networks is 15
    config = resolve_data_config(dict(img_size=args.img_size), model=model)
    train.transform, val.transform = (create_transform(**config, is_training=on) for on in (True, False))
    return model, DataLoader(train, 16, shuffle=True, drop_last=True), DataLoader(val, 32)
