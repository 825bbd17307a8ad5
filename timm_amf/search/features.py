"""Features of a data set by pretrained networks, computed once and kept on disk."""
import argparse
import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.numpy import load
from safetensors.torch import save, save_file
from scipy.special import softmax
from tqdm import tqdm

from timm_amf.data import Mixture
from timm_amf.data.cache import fingerprint
from timm_amf.engine import build
from timm_amf.engine.run_folder import eval_loader
from timm_amf.errors import UserError
from timm_amf.files import cache_folder, open_or_write

__all__ = ['Features', 'FeatureNet', 'extract_features']


@dataclass
class Features:
    """What a network computes of each image of a data set, in the data set's order.

    Attributes:
        pooled: Features before the classifier, (N, D) float32.
        logits: The pretrained classifier's, (N, source classes) float32, or None if it has none.
        labels: Class of each, (N,) int64.
        component: Component of each, (N,) int64.
    """
    pooled: np.ndarray
    logits: Optional[np.ndarray]
    labels: np.ndarray
    component: np.ndarray

    def probabilities(self) -> np.ndarray:
        """The pretrained classifier's probabilities, (N, source classes) float64."""
        return softmax(self.logits.astype(np.float64), axis=1)

    def of_component(self, index: int) -> 'Features':
        """Those of one component."""
        chosen = self.component == index
        logits = None if self.logits is None else self.logits[chosen]
        return Features(self.pooled[chosen], logits, self.labels[chosen], self.component[chosen])


class FeatureNet:
    """A pretrained network with its own classifier, ready to be measured.

    Args:
        args: Options of `train_amf.py` that name a plain timm model and its weights.
        accelerator: Accelerate's context.
        classifier: The weights hold the pretrained classifier. False: only the features are used.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, classifier: bool = True):
        self.args = plain = copy.deepcopy(args)
        self.accelerator, self.name = accelerator, args.model
        if not plain.initial_checkpoint:  # a checkpoint's number of classes is that of --num-classes
            plain.num_classes = None
        try:
            # Without a number, the classes are those of the weights.
            model = build.build_model(plain, plain.num_classes if classifier else 0)
        except UserError as e:
            if classifier and 'Missing key' in str(e):
                raise UserError(f'{e} If the weights have no classifier, add --no-source-classifier.') from e
            raise
        self.source_classes = model.num_classes if classifier else 0
        self.model = build.place_model(model, plain, accelerator).eval()

    def fingerprint(self) -> str:
        """Changes with the weights and with what else decides the features of an image."""
        about = (
            self.name, self.args.model_kwargs, self.args.gp, self.args.bn_eps, self.accelerator.mixed_precision,
            self.source_classes)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(save({name: tensor.contiguous()}))
        return digest.hexdigest()


def extract_features(
        net: FeatureNet,
        dataset: Mixture,
        cache_dir: Union[str, Path, None] = None,
        progress: bool = True,
        description: str = 'Features',
) -> Features:
    """Features of every image of a data set, from the cache on disk where they are in it.

    They are found again by the weights, the images (names, sizes, times), the transform and the precision. A file
    appears whole or not at all, whatever interrupts its making.

    Args:
        net: The network.
        dataset: The images.
        cache_dir: Folder of all caches. None: `timm_amf` in the user's cache folder.
        progress: Show a bar.
        description: Its label.
    """
    loader = eval_loader(net.args, net.model, dataset, net.accelerator.device)
    stats = loader.mean.flatten().tolist(), loader.std.flatten().tolist()
    key = fingerprint(dataset, f'features 1 {net.fingerprint()} {loader.transform} {stats}')
    folder = cache_folder(cache_dir, f'features-{key}')

    def read(path: Path) -> Features:
        try:
            # Read, not mapped: what becomes of the file must not reach the arrays.
            tensors = load((path / 'features.safetensors').read_bytes())
        except SafetensorError as e:
            raise ValueError(str(e)) from e
        if len(tensors['pooled']) != len(dataset):
            raise ValueError('the wrong number of images')
        return Features(tensors['pooled'], tensors.get('logits'), dataset.targets, dataset.component_of)

    def write(path: Path) -> None:
        save_file(_compute(net, loader, progress, description), path / 'features.safetensors')

    try:
        return open_or_write(folder, read, write)
    finally:
        loader.close()


@torch.inference_mode()
def _compute(net: FeatureNet, loader, progress: bool, description: str) -> dict[str, torch.Tensor]:
    model, dtype = net.model, next(net.model.parameters()).dtype
    parts: dict[str, list[torch.Tensor]] = {'pooled': [], 'logits': []}
    for batch in tqdm(loader, description, disable=None if progress else True):
        with net.accelerator.autocast():
            maps = model.forward_features(batch.input.to(dtype))
            found = {'pooled': model.forward_head(maps, pre_logits=True)}
            if net.source_classes:
                found['logits'] = model.forward_head(maps)
        if not torch.is_tensor(found['pooled']) or found['pooled'].ndim != 2:
            raise UserError(f'{net.name} gives no flat pooled features to measure; choose another model')
        for name, tensor in found.items():
            parts[name].append(tensor.float().cpu())
            bad = ~parts[name][-1].isfinite().all(dim=1)
            if bad.any():
                image = loader.dataset.filename(int(batch.index[int(bad.nonzero()[0])]))
                raise UserError(
                    f'{net.name} gives NaN or infinite features for {int(bad.sum())} images of a batch, {image} among '
                    f'them; check its weights, and compute without half precision')
    return {name: torch.cat(rows) for name, rows in parts.items() if rows}
