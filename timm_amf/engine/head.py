"""The classifier that a fine-tuning starts with.

timm draws a new classifier with a deviation that depends on the architecture, up to 0.4 in EfficientNets and
MobileNets: the first steps then fit the features to random weights, which destroys them before the classifier has
learned anything. A classifier of zeros passes no gradient to the features until it says something. One from a logistic
regression on the features as they are is the best that the frozen network can do, and fine-tuning goes on from there
(Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", 2022).
"""
import argparse
import warnings

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from timm_amf.data import Mixture
from timm_amf.engine.run_folder import eval_loader
from timm_amf.errors import UserError
from timm_amf.tuning import Resolved

__all__ = ['held_out', 'logistic_regression', 'probe_features', 'start_head']

# Inverse L2 penalties of the regression on standardised features, increasing.
C_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1., 10.)


def start_head(
        model: nn.Module,
        args: argparse.Namespace,
        train: Mixture,
        accelerator: Accelerator,
        table: Resolved,
) -> None:
    """Give a model that does not resume the classifier that `--head-start` names.

    Without the flag it is zero where a pretrained network gets a classifier of other classes, else timm's.

    A classifier that does not learn from the start, by `table`, must not be zero. The main process fits the regression
    to the training images; the others get it with the weights.
    """
    given = args.head_init_scale is not None or args.head_init_bias is not None or args.initial_checkpoint
    kept = (getattr(model, 'pretrained_cfg', None) or {}).get('num_classes') == model.num_classes
    how = args.head_start or ('timm' if given or kept or not args.pretrained else 'zero')
    if how == 'timm':
        return
    if how == 'zero' and not _learns(model, table):
        if args.head_start:
            raise UserError('--head-start zero: the classifier does not train from the start; give timm or probe')
        return
    layers = _linear_layers(model)
    if how == 'zero':
        for parameter in (p for layer in layers for p in layer.parameters()):
            nn.init.zeros_(parameter)
    elif accelerator.is_main_process:
        if len(layers) != 1 or layers[0].weight.flatten(1).shape[1] != model.head_hidden_size:
            raise UserError('--head-start probe: the classifier is not one linear layer on pooled features; give zero')
        features = probe_features(model, args, train, accelerator)
        weight, bias, _ = logistic_regression(features, train.targets, layers[0].weight.shape[0])
        with torch.no_grad():
            layers[0].weight.copy_(torch.from_numpy(weight).view_as(layers[0].weight))
            layers[0].bias.copy_(torch.from_numpy(bias))


def _learns(model: nn.Module, table: Resolved) -> bool:
    head = {id(p) for layer in _linear_layers(model) for p in layer.parameters()}
    own = [table.parameters.get(name) for name, p in model.named_parameters() if id(p) in head]
    return all(setting is not None and setting.trains and setting.start_epoch == 0 for setting in own)


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that give logits; of a distilled model there are two."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    layers = [m for head in heads for m in head.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if not layers or any(layer.weight.shape[0] != model.num_classes for layer in layers):
        raise UserError('--head-start: the classifier is no linear layer; give timm')
    return layers


@torch.inference_mode()
def probe_features(
        model: nn.Module,
        args: argparse.Namespace,
        data: Mixture,
        accelerator: Accelerator,
) -> np.ndarray:
    """What the classifier of a model sees of each image, in evaluation mode and without augmentation.

    Returns:
        (images, features) float32, in the order of the data.
    """
    was_training = model.training
    model.eval()
    loader = eval_loader(args, model, data, accelerator.device)
    rows, indices = [], []
    bar = tqdm(loader, desc='features', leave=False, disable=not accelerator.is_main_process or None)
    for batch in bar:
        images = batch.input.to(next(model.parameters()).dtype)
        rows.append(model.forward_head(model.forward_features(images), pre_logits=True).float().flatten(1).cpu())
        indices.append(batch.index.cpu())
    loader.close()
    model.train(was_training)
    features = torch.cat(rows)
    return torch.empty_like(features).index_copy_(0, torch.cat(indices), features).numpy()


def logistic_regression(
        features: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """A linear classifier: multinomial logistic regression on standardised features, its L2 penalty chosen on a quarter
    of the images (of each class) and then fitted to all of them.

    Args:
        features: (N, D).
        labels: (N,), below `num_classes`.
        num_classes: Classes; those without images get a classifier of zeros.

    Returns:
        Weight (num_classes, D) and bias (num_classes,) for the features as they are, float32, and the inverse penalty.

    Raises:
        ImportError: Without scikit-learn.
    """
    from sklearn.linear_model import LogisticRegression

    features = features.astype(np.float64)
    mean, scale = features.mean(0), features.std(0)
    scale[scale == 0] = 1.
    kept = (features - mean) / scale
    held = held_out(labels, 0.25, seed=0)
    classes, best, accuracy, worse = np.unique(labels), C_GRID[len(C_GRID) // 2], -1., 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # penalties so weak that the solver does not converge are not chosen
        model = LogisticRegression(warm_start=True, max_iter=300, tol=1e-3)
        for c in C_GRID if held.any() else ():  # of one image a class none can be held out
            found = model.set_params(C=c).fit(kept[~held], labels[~held]).score(kept[held], labels[held])
            best, accuracy, worse = (c, found, 0) if found > accuracy else (best, accuracy, worse + 1)
            if worse == 3:  # beyond the best penalty, weaker ones only overfit more
                break
        model = LogisticRegression(C=best, max_iter=300, tol=1e-3).fit(kept, labels)
    coef, intercept = model.coef_, model.intercept_
    if len(classes) == 2:  # scikit-learn has one row for two classes
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    weight, bias = np.zeros((num_classes, features.shape[1])), np.zeros(num_classes)
    weight[classes] = coef / scale
    bias[classes] = intercept - weight[classes] @ mean
    return weight.astype(np.float32), bias.astype(np.float32), best


def held_out(labels: np.ndarray, part: float, seed: int) -> np.ndarray:
    """Mask (N,) of a share of each class, one image at least and all but one at most."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for k in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == k))
        held[members[:min(max(1, round(part * len(members))), len(members) - 1)]] = True
    return held
