"""A trained model ready to be asked: how it is loaded, how its images are prepared, and which paths they take."""
import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import nn
from tqdm import tqdm

from timm_amf.data import Mixture, check_images, create_datasets, data_spec_from_args, splits_from_args
from timm_amf.engine.build import input_channels
from timm_amf.engine.checkpoint import read_class_names
from timm_amf.engine.run_folder import choose_device, eval_loader, find_weights, load_run, read_run
from timm_amf.errors import UserError
from timm_amf.models.method import RunSettings, method_of
from timm_amf.tuning import Plan
from timm_amf.yaml_text import load_yaml

__all__ = ['Answers', 'Opened', 'RunOptions', 'open_trained']


@dataclass(frozen=True)
class RunOptions:
    """How runs are evaluated.

    Args:
        split: Any name that `--val-split` takes. None: what each run was validated on.
        data_dir: Folder of the data. None: where each run had it.
        weights: Of `run_folder.WEIGHTS`.
        ten_crop: Average over the four corners and the centre, and their mirror images.
        blocks: Path of all images through a SpotTune: `tuned`, `frozen`, or blocks with commas between; `policy`
            gives it to the policy where the run itself evaluates otherwise. None: as the run evaluates.
        sampling_seed: Draw a SpotTune's decisions with this seed instead of taking the likelier ones.
        batch_size: Images that go through the network at a time, ten crops being ten. None: the run's.
        workers: Worker processes. None: the run's.
        cpu: Compute on the CPU even where there is a GPU.
        precision: Type that autocast computes in. None: float32, whatever the run trained in.
        level: Confidence of the intervals, between 0 and 1.
        flags: What else differs from the run, as on the command line of `train_amf.py`: size of the images, say.
    """
    split: Optional[str] = None
    data_dir: Optional[str] = None
    weights: str = 'best'
    ten_crop: bool = False
    blocks: Optional[str] = None
    sampling_seed: Optional[int] = None
    batch_size: Optional[int] = None
    workers: Optional[int] = None
    cpu: bool = False
    precision: Optional[torch.dtype] = None
    level: float = 0.95
    flags: tuple[str, ...] = ()


class Answers(NamedTuple):
    """What a model says of a batch of B images, on the CPU.

    Args:
        index: Their indices into the data, (B,).
        target: Their classes, (B,); -1 of an image that could not be read.
        log_probs: Log of the probabilities, averaged over the crops, (B, outputs) float32.
        decisions: What it decided for each, (B, width) float32, averaged over the crops; None if nothing.
    """
    index: torch.Tensor
    target: torch.Tensor
    log_probs: torch.Tensor
    decisions: Optional[torch.Tensor]


@dataclass(frozen=True)
class Opened:
    """A run, a published model or a file, which `load` loads.

    Attributes:
        name: Its folder or file.
        args: The run's options; of others the defaults.
        load: Gives the model in evaluation mode, on the CPU, for a number of classes; None is that of the weights.
        class_names: Of its outputs; None where the weights do not say.
        plan: How it was fine-tuned, if that is known.
        options: What the `args.yaml` of a run holds: how it was started, with pretrained weights, say.
    """
    name: str
    args: argparse.Namespace
    load: Callable[[Optional[int]], nn.Module]
    class_names: Optional[list[str]] = None
    plan: Optional[Plan] = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.name)

    @cached_property
    def data(self) -> tuple[Mixture, Mixture]:
        """The training and the validation images of a run."""
        args = self.args
        data = create_datasets(
            data_spec_from_args(args), splits_from_args(args), input_channels(args), self.class_names)
        if args.skip_bad_images:  # an accuracy is of the images that the run could read
            check_images(data[1], True, args.cache_dir, args.workers, False)
        return data

    @property
    def names(self) -> list[str]:
        """Its class names; of a run of an older version, which does not have them, those of its data."""
        return self.class_names or self.data[0].class_names

    @torch.inference_mode()
    def answers(
            self,
            model: nn.Module,
            data: Mixture,
            options: RunOptions,
            skip_bad: bool = False,
            progress: bool = True,
    ) -> Iterator[Answers]:
        """Go through images once, in order, as the run evaluates; with `skip_bad` also where one cannot be read."""
        args, method = self.args, method_of(model)
        asked = bool(options.blocks) or options.sampling_seed is not None
        if asked and 'eval_blocks' not in method.takes:
            raise UserError(
                f'{self.name}: --blocks and --sampling-seed do not act on {type(model).__name__}; leave them out')
        blocks, k = args.eval_blocks, self.plan and self.plan.global_k
        if options.blocks:
            blocks, k = options.blocks if options.blocks != 'policy' else None, None
        seed = args.eval_sampling_seed if options.sampling_seed is None else options.sampling_seed
        device = choose_device(options.cpu or args.cpu)
        batch_size = options.batch_size or args.validation_batch_size or args.batch_size
        batch_size = max(1, batch_size // 10) if options.ten_crop else batch_size
        workers = args.workers if options.workers is None else options.workers
        # To start one takes longer than a batch.
        workers = min(workers, math.ceil(len(data) / batch_size) - 1)
        model.to(device)
        loader = eval_loader(args, model, data, device, batch_size, workers, options.ten_crop, skip_bad)
        context = nullcontext() if options.precision is None else torch.autocast(device.type, options.precision)
        record = method.create_record(data.components)
        shown = progress and sys.stderr.isatty()
        bar = tqdm(loader, desc=self.name, leave=False, disable=not shown, dynamic_ncols=True)
        try:
            with method.evaluation(k, blocks, seed):
                for batch in bar:
                    crops = batch.input.shape[1] if batch.input.ndim == 5 else 1
                    with context:
                        x = batch.input.flatten(0, 1) if batch.input.ndim == 5 else batch.input
                        parts = method.forward_train(x, RunSettings())
                    log_probs = parts['output'].float().log_softmax(1).unflatten(0, (-1, crops))
                    log_probs = log_probs.logsumexp(1) - math.log(crops)
                    if log_probs.isnan().any():
                        raise UserError(f'{self.name}: gives no number for an image; its weights are damaged')
                    decisions = None
                    if record is not None and record.key in parts:
                        decisions = record.values_of(parts).float().unflatten(0, (-1, crops)).mean(1).cpu()
                    yield Answers(batch.index.cpu(), batch.target.cpu(), log_probs.cpu(), decisions)
        finally:
            bar.close()
            loader.close()


def open_trained(run: Union[str, Path], options: RunOptions, needs_data: bool = True) -> Opened:
    """A run from its folder; `needs_data` says whether the folder of its images must be there."""
    flags = ['--val-split', options.split] if options.split else []
    flags += ['--data-dir', options.data_dir] if options.data_dir and needs_data else []
    args = read_run(run, [*flags, *options.flags], needs_data)
    return Opened(
        str(run), args,
        load=lambda num_classes: load_run(args, run, num_classes, options.weights),
        class_names=read_class_names(find_weights(run, options.weights)),
        plan=Plan.from_yaml(Path(run) / 'plan.yaml'),
        options=load_yaml(Path(run) / 'args.yaml'))
