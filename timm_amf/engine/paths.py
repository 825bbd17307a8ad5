"""Which paths a SpotTune takes in evaluation, and the plain model that is left of one with a global policy."""
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional, Union

from timm.models import save_for_hf
from torch import nn

from timm_amf.engine.checkpoint import load_weights
from timm_amf.errors import UserError
from timm_amf.models.spottune import SpotTune

__all__ = ['chosen_paths', 'parse_blocks', 'write_compact']

_logger = logging.getLogger(__name__)


def parse_blocks(text: Optional[str]) -> Optional[Union[str, list[Union[int, str]]]]:
    """`tuned`, `frozen`, or block indices and names with commas between; None for an empty text."""
    if not text or text in ('tuned', 'frozen'):
        return text or None
    return [int(item) if item.lstrip('-').isdigit() else item for item in text.split(',') if item]


@contextmanager
def chosen_paths(
        model: nn.Module,
        global_k: Optional[int] = None,
        blocks: Optional[str] = None,
        sampling_seed: Optional[int] = None,
) -> Iterator[None]:
    """Around an evaluation: a SpotTune takes the paths that are asked for, and is its own again afterwards.

    Args:
        model: Any model; others than a SpotTune are left alone if nothing is asked of them.
        global_k: All images take the tuned copy of this many most used blocks: what `compact` gives.
        blocks: All images take the tuned copy of these, as `parse_blocks` reads them; goes before `global_k`.
        sampling_seed: Draw the decisions instead of taking the likelier one.

    Raises:
        UserError: If the model has no such paths.
    """
    if not isinstance(model, SpotTune):
        if blocks or sampling_seed is not None:
            raise UserError(
                f'--eval-blocks and --eval-sampling-seed need a SpotTune, not {type(model).__name__}; remove them')
        yield
        return
    before = model.fixed_blocks, model.sampling
    if blocks:
        model.set_blocks(parse_blocks(blocks))
    elif global_k is not None:
        model.set_blocks(model.chosen_blocks(global_k))
    model.set_sampling(sampling_seed)
    try:
        yield
    finally:
        model.fixed_blocks, model.sampling = before


def write_compact(model: SpotTune, weights: Path, k: int, folder: Path) -> Path:
    """Writes the plain model that a global policy leaves, as a folder that `timm.create_model('local-dir:...')` reads.

    Args:
        model: The trained model; it gets the weights.
        weights: The run's best checkpoint.
        k: Number of tuned blocks.
        folder: Where to write `compact/`.
    """
    if weights.exists():
        load_weights(model, weights)
    target = folder / 'compact'
    compact = model.compact(k).to('cpu')
    # Of the arguments all but where the weights came from.
    kwargs = {k: v for k, v in model.backbone_part.kwargs.items() if not k.startswith('pretrained_cfg')}
    save_for_hf(compact, str(target), model_args=kwargs, safe_serialization=True)
    return target
