"""A loader whose batches depend on nothing but (seed, epoch, step): not on workers, processes or resumption.

Workers decode and transform to uint8; normalisation and random erasing run on the batch on its device, as in timm's
PrefetchLoader.
"""
import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.loader import adapt_to_chs

from timm_amf.errors import UserError
from timm_amf.flags import CORES

from .mixture import Mixture
from .sampler import EvalSampler, Key, StepSampler
from .transforms import SeededRandomErasing, adapt_transform, kept_random_state, sample_seed, seed_globals

__all__ = ['Batch', 'SeededLoader', 'create_loader']

# What stops a run, and the seconds that a worker lives on after a SIGTERM.
_STOPPING, _GRACE = (signal.SIGINT, signal.SIGTERM), 10


class Batch(NamedTuple):
    """One process's part of a step, on the device.

    Args:
        input: Normalised images, (B, C, H, W).
        target: Class of each, (B,) int64.
        component: Component of each, (B,) int64.
        index: Index into the dataset of each, (B,) int64.
        step_size: Samples of this step over all processes. A loss that is a mean over the B samples, times
            `B * processes / step_size`, gives the mean over the step once gradients are averaged over processes.
    """
    input: torch.Tensor
    target: torch.Tensor
    component: torch.Tensor
    index: torch.Tensor
    step_size: int


@dataclass(eq=False)
class SeededSamples(torch.utils.data.Dataset):
    """The samples of a mixture by `Key`, each transformed under its own seed.

    A sample is its images, one for each augmentation split, and a row of target, component and key; or, if it could not
    be read, the message, so that the user gets a line and no traceback from a worker.

    Args:
        dataset: The mixture.
        transform: Gives a uint8 tensor (C, H, W); with augmentation splits timm's triple of transforms.
        seed: The run's seed, None for a transform that draws nothing.
        splits: Augmentation splits, 0 for none.
        skip_bad: Give black in the place of an image that cannot be read, with class -1.
    """
    dataset: Mixture
    transform: Any
    seed: Optional[int]
    splits: int = 0
    skip_bad: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Key]) -> list:
        """A batch at once; a worker has no other use for its generators, the main process gets its states back."""
        draws_here = self.seed is not None and torch.utils.data.get_worker_info() is None
        with kept_random_state() if draws_here else contextlib.nullcontext():
            return [self[key] for key in keys]

    def __getitem__(self, key: Key) -> Union[str, tuple[list[torch.Tensor], tuple]]:
        target = int(self.dataset.targets[key.index])
        try:
            images = self._images(key)
        except UserError as e:
            if not self.skip_bad:
                return str(e)
            images, target = [self.transform(Image.new(self.dataset.input_img_mode or 'RGB', (64, 64)))], -1
        except Exception as e:
            raise RuntimeError(f'{self.dataset.filename(key.index)}: {type(e).__name__}: {e}') from e
        return images, (target, int(self.dataset.component_of[key.index]), *key)

    def _images(self, key: Key) -> list[torch.Tensor]:
        image = self.dataset.load(key.index)
        if self.seed is not None:
            seed_globals(sample_seed(self.seed, key))
        if not self.splits:
            return [self.transform(image)]
        base, augment, final = self.transform
        image = base(image)
        images = [final(image)]
        for split in range(1, self.splits):
            seed_globals(sample_seed(self.seed, key, stream=2 * split))
            images.append(final(augment(image)))
        return images


def _collate(samples: list) -> Union[str, tuple[torch.Tensor, np.ndarray]]:
    """The images, augmentation splits one after the other as timm has them, and a row for each sample."""
    failure = next((sample for sample in samples if isinstance(sample, str)), None)
    if failure is not None:
        return failure
    images = [image for split in zip(*(images for images, _ in samples), strict=True) for image in split]
    # In a worker, straight into shared memory.
    return torch.utils.data.default_collate(images), np.array([row for _, row in samples], dtype=np.int64)


def _outlive_signals(_: int) -> None:
    """Let a worker outlive the signals that stop a run, so that the main process can finish its step and save.

    A terminal, torchrun and job schedulers signal the whole process group. A worker ends when its loader closes; if
    that should not come, a while after SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Around the start of workers, which inherit it: none of them meets a signal before `_outlive_signals`."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SeededLoader:
    """Iterates over `Batch`es; see `create_loader`.

    Attributes:
        dataset: The mixture.
        sampler: The batch sampler.
        transform: The transform of each sample.
    """

    def __init__(
            self,
            dataset: Mixture,
            sampler: Union[StepSampler, EvalSampler],
            transform: Any,
            seed: Optional[int],
            mean: Sequence[float],
            std: Sequence[float],
            device: torch.device,
            img_dtype: torch.dtype = torch.float32,
            erasing: Optional[SeededRandomErasing] = None,
            splits: int = 0,
            channels_last: bool = False,
            workers: int = 0,
            pin_memory: bool = False,
            persistent_workers: bool = True,
            skip_bad: bool = False,
    ):
        self.dataset = dataset
        self.sampler = sampler
        self.transform = transform
        self.device = device
        self.img_dtype = img_dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.erasing = erasing
        self.splits = max(1, splits)
        self.mean, self.std = (
            torch.tensor([x * 255 for x in values], device=device, dtype=img_dtype).view(1, -1, 1, 1)
            for values in (mean, std))
        self._stream: Any = None
        workers = min(workers, CORES)  # more are slower, and torch warns of them
        self._loader = torch.utils.data.DataLoader(
            SeededSamples(dataset, transform, seed, splits, skip_bad),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory and device.type == 'cuda',
            persistent_workers=persistent_workers and workers > 0,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else every epoch draws from the global generator
        )

    def __len__(self) -> int:
        """Steps in an epoch (of this process, in evaluation)."""
        return len(self.sampler)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and the step it begins at: earlier steps are not even decoded."""
        self.sampler.set_epoch(epoch, start_step)

    def close(self) -> None:
        """End the workers that are kept from epoch to epoch."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None and hasattr(iterator, '_shutdown_workers'):
            iterator._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type == 'cuda':
            return self._overlapped()
        return (self._finish(*raw) for raw in self._raw())

    def _raw(self) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        with _signals_wait():
            batches = iter(self._loader)
        while True:
            try:
                raw = next(batches)
            except StopIteration:
                return
            except RuntimeError as e:
                self.close()
                if 'exited unexpectedly' in str(e) or 'killed by signal' in str(e):
                    raise UserError(
                        f'a data loading worker died ({str(e).splitlines()[0]}), most often for lack of memory; '
                        f'lower --workers or --batch-size') from e
                raise
            if isinstance(raw, str):
                self.close()
                raise UserError(raw)
            yield raw

    def _finish(self, images: torch.Tensor, rows: np.ndarray) -> Batch:
        """To the device, normalised (with timm's arithmetic) and erased."""
        input = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        input = input.to(self.img_dtype).sub_(self.mean).div_(self.std)
        if self.erasing is not None:
            self.erasing(input, [Key(*row) for row in rows[:, 2:].tolist()], self.splits)
        meta = torch.from_numpy(rows[:, [0, 1, 3]].T.copy()).repeat(1, self.splits)
        target, component, index = meta.to(self.device, non_blocking=True)
        return Batch(input, target, component, index, int(rows[0, 6]) * self.splits)

    def _overlapped(self) -> Iterator[Batch]:
        """Prepare the next batch on a side stream while the consumer works on this one (timm's PrefetchLoader)."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device=self.device)  # one for all epochs: memory is pooled by stream
        ready = None
        for raw in self._raw():
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # freed blocks may be reused below
            with torch.cuda.stream(self._stream):
                batch = self._finish(*raw)
            if ready is not None:
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            ready = batch
        if ready is not None:
            yield ready


def create_loader(
        dataset: Mixture,
        input_size: Union[int, Sequence[int]],
        batch_size: int,
        is_training: bool = False,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        device: Union[str, torch.device] = 'cpu',
        workers: int = 4,
        no_aug: bool = False,
        re_prob: float = 0.,
        re_mode: str = 'const',
        re_count: int = 1,
        re_split: bool = False,
        num_aug_repeats: float = 0,
        num_aug_splits: int = 0,
        epoch_repeats: float = 0,
        balanced_classes: bool = False,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        img_dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        pin_memory: bool = False,
        persistent_workers: bool = True,
        **transform_kwargs,
) -> SeededLoader:
    """Build a loader; arguments that timm's `create_loader` has too have its meaning.

    Args:
        dataset: The mixture.
        input_size: Size of the images, (C, H, W) or a number.
        batch_size: Samples a step and process, at most.
        is_training: Random order and augmentation; otherwise each sample once, in order, over all processes.
        seed: Seed of order and augmentation.
        rank: This process.
        world_size: Number of processes.
        device: Where batches go.
        workers: Worker processes, at most one a core; 0 loads in the main process.
        epoch_repeats: Passes over the dataset in an epoch.
        balanced_classes: Draw each class equally often.
        img_dtype: Type of the normalised images.
        channels_last: Give the images in this memory format.
        transform_kwargs: Of timm's `create_transform`: crops, flips, augmentation, interpolation.
    """
    channels = input_size[0] if isinstance(input_size, Sequence) and len(input_size) == 3 else len(mean)
    mean, std = tuple(adapt_to_chs(mean, channels)), tuple(adapt_to_chs(std, channels))
    splits = num_aug_splits if is_training else 0
    try:
        transform = create_transform(
            input_size,
            is_training=is_training,
            no_aug=no_aug,
            mean=mean,
            std=std,
            use_prefetcher=True,
            separate=splits > 0,
            **transform_kwargs,
        )
    except (ValueError, TypeError, AssertionError, ArithmeticError) as e:  # timm and torchvision check their values
        raise UserError(f'the transforms of images cannot be built: {str(e) or type(e).__name__}') from e
    device, erasing = torch.device(device), None
    if is_training and not no_aug and re_prob > 0:
        clean = (splits or 2) if re_split else 0
        erasing = SeededRandomErasing(
            re_prob, mode=re_mode, max_count=re_count, num_splits=clean, device=device, seed=seed)
    if is_training:
        sampler = StepSampler(
            len(dataset), batch_size, seed, rank, world_size, num_aug_repeats, epoch_repeats,
            dataset.targets if balanced_classes else None)
    else:
        sampler = EvalSampler(len(dataset), batch_size, rank, world_size)
    return SeededLoader(
        dataset,
        sampler,
        adapt_transform(transform),
        seed=seed if is_training and not no_aug else None,
        mean=mean,
        std=std,
        erasing=erasing,
        splits=splits,
        device=device,
        img_dtype=img_dtype,
        channels_last=channels_last,
        workers=workers,
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
    )
