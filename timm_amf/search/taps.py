"""What arrives at the candidates in the frozen network, kept on disk where images do not change from epoch to epoch.

The frozen network gives an image the same activations in every epoch, so without augmentation they need to be computed
once. Reading them pays where they are small and the network before them is dear: at late blocks.
"""
import time
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from timm_amf.search.lockstep import Lockstep

__all__ = ['TapCache']

# Times that reading has to be faster than computing: less does not repay the first epoch, which writes.
_MARGIN = 1.5


class TapCache:
    """The inputs of a chunk of candidates, for all images of a loader.

    The first epoch computes and writes them, later ones read. They are memory-mapped files, which the system keeps in
    memory as far as there is room, and they are not kept beyond the search.

    Args:
        net: The candidates.
        count: Number of images.
        folder: Where the files go.
        limit: Most bytes on disk.

    Attributes:
        files: The arrays by name of the unit, once the first batch has shown that they fit and that reading pays; empty
            if not.
    """

    def __init__(self, net: Lockstep, count: int, folder: Path, limit: float):
        self.net = net
        self.count = count
        self.folder = Path(folder)
        self.limit = limit
        self.files: Optional[dict[str, np.memmap]] = None
        self.known = np.zeros(count, dtype=bool)

    def taps(self, images: Tensor, index: Tensor) -> dict[str, Tensor]:
        """As `Lockstep.taps`, from the files where all images are in them.

        Args:
            images: The batch, (B, C, H, W).
            index: Index of each image into the data set, (B,).
        """
        rows = index.cpu().numpy()
        if self.files and self.known[rows].all():
            return {name: self._read(name, rows, images) for name in self.files}
        start = time.perf_counter()
        taps = self.net.taps(images)
        if images.device.type == 'cuda':
            torch.cuda.synchronize(images.device)
        seconds = time.perf_counter() - start
        if self.files is None:
            self.files = self._open(taps, seconds)
        for name, file in self.files.items():
            file[rows] = _bits(taps[name])
            self.known[rows] = True
        return taps

    def _open(self, taps: dict[str, Tensor], seconds: float) -> dict[str, np.memmap]:
        """Files for all images, if they fit and reading a batch of them takes less than computing it took."""
        size = sum(t[0].numel() * t.element_size() for t in taps.values()) * self.count
        if size > self.limit:
            return {}
        start = time.perf_counter()
        copies = [_bits(t).copy() for t in taps.values()]
        reading = time.perf_counter() - start
        if reading * _MARGIN > seconds:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._types = {name: (t.dtype, _is_last(t)) for name, t in taps.items()}
        return {
            name: np.memmap(self.folder / f'{i}.bin', dtype=c.dtype, mode='w+', shape=(self.count, *c.shape[1:]))
            for i, (name, c) in enumerate(zip(taps, copies))}

    def _read(self, name: str, rows: np.ndarray, images: Tensor) -> Tensor:
        dtype, channels_last = self._types[name]
        tensor = torch.from_numpy(self.files[name][rows]).view(dtype)
        if channels_last:
            tensor = tensor.permute(0, 3, 1, 2)
        return tensor.to(images.device, non_blocking=True)

    def close(self) -> None:
        """Remove the files."""
        for file in (self.files or {}).values():
            Path(file.filename).unlink(missing_ok=True)
        self.files = {}


def _is_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous()


def _bits(tensor: Tensor) -> np.ndarray:
    """A tensor as an array, whatever its type; maps that are not in the usual order have their channels last."""
    if _is_last(tensor):
        tensor = tensor.permute(0, 2, 3, 1)
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).numpy()
