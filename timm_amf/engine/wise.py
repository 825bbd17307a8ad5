"""WiSE-FT: at the end, the weights of the start and of the best epoch mixed in the shares that validate best.

Wortsman et al., "Robust fine-tuning of zero-shot models", 2022. Mixed so, a run never ends below its start on the
validation images. A run's folder keeps `model_start.safetensors` (also of a run from a logistic regression that mixes
nothing) and, of the best epoch, `model_tuned.safetensors`.
"""
import shutil
from pathlib import Path
from typing import Optional

import torch
from safetensors.torch import load_file

from timm_amf.engine.checkpoint import save_tensors, save_weights
from timm_amf.engine.loop import Trainer
from timm_amf.files import write_text
from timm_amf.text import csv_of

__all__ = ['SHARES', 'mix_with_start', 'prepare_mix']

SHARES = (0., 0.25, 0.5, 0.75, 1.)


def prepare_mix(folder: Path, start: Optional[dict[str, torch.Tensor]]) -> None:
    """Keep the weights of the start; in a run that is resumed, which has them, undo a mix that was made already."""
    if start is not None:
        save_tensors(start, folder / 'model_start.safetensors')
    tuned = folder / 'model_tuned.safetensors'
    if tuned.exists():
        (folder / 'mix.csv').unlink(missing_ok=True)
        tuned.replace(folder / 'model_best.safetensors')


def mix_with_start(trainer: Trainer) -> str:
    """Write the mix that validates best as the best weights of a trained run.

    Returns:
        What it came to, on one line.
    """
    args, folder, model = trainer.args, trainer.folder, trainer.evaluated_model
    start, best, tuned = (folder / f'model_{name}.safetensors' for name in ('start', 'best', 'tuned'))
    first = load_file(start)
    last = {name: tensor.clone() for name, tensor in load_file(best).items()}  # Windows replaces no file that is mapped
    found = []
    for share in SHARES:
        mixed = {
            name: torch.lerp(first[name], tensor, share) if tensor.is_floating_point() else tensor
            for name, tensor in last.items()}
        model.load_state_dict(mixed)
        metrics = trainer.start if share == 0 and trainer.start is not None else trainer.evaluate_now()
        metric = metrics[args.eval_metric]
        found.append((-metric if trainer.decreasing else metric, -metrics['loss'], share, metrics, mixed))
    *_, share, metrics, mixed = max(found, key=lambda entry: entry[:3])
    model.load_state_dict(mixed)
    if trainer.accelerator.is_main_process:
        shutil.copy2(best, tuned)
        save_weights(model, best)
        write_text(folder / 'mix.csv', csv_of(dict(
            share=one, metric=own[args.eval_metric], loss=own['loss'], kept=one == share,
            **{f'eval_{name}': value for name, value in own.items() if isinstance(value, float)},
        ) for *_, one, own, _ in found))
    trainer.checkpoints.best_metric = metrics[args.eval_metric]
    trainer.accelerator.wait_for_everyone()
    by_share = ', '.join(f'{one:g}: {own[args.eval_metric]:.2f}' for *_, one, own, _ in found)
    return f'weights {share:g} of the way from the start to the best epoch ({args.eval_metric} by share: {by_share})'
