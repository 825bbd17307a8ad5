"""The verb `timm-amf export`.

    timm-amf export runs/amf --format onnx
    timm-amf export runs/spottune --format torchscript --output spottune.pt --weights last
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

from timm_amf.engine.run_folder import WEIGHTS
from timm_amf.errors import UserError
from timm_amf.verbs import VerbParser, run_verb

from .checked import Exported, check_output, export_model
from .formats import FORMATS
from .source import Source, open_source

__all__ = ['export_run', 'main']


def export_run(
        path: Union[str, Path],
        format: str,
        output: Optional[Union[str, Path]] = None,
        batch: int = 5,
        opset: Optional[int] = None,
        overwrite: bool = False,
        **kwargs,
) -> tuple[Exported, Source]:
    """Export the model of a run or of a published folder.

    Args:
        path: The folder.
        format: Of `FORMATS`.
        output: The file. None: `exported` with the suffix of the format, in the folder.
        batch: The largest batch of random images that the file is checked with; 1 and 2 are checked always.
        opset: ONNX operator set. None: the exporter's.
        overwrite: Replace a file that is there.
        **kwargs: To `open_source`.

    Raises:
        UserError: As `open_source` and `export_model` do.
    """
    form = FORMATS[format]
    form.require()
    output = Path(path) / f'exported{form.suffix}' if output is None else Path(output)
    check_output(output, overwrite)  # before the model is loaded
    source = open_source(path, **kwargs)
    return export_model(source, format, output, sorted({1, 2, batch}), opset, overwrite), source


def main(argv: Sequence[str]) -> int:
    """Run `timm-amf export`; returns the exit code."""
    return run_verb('timm-amf export', lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    args = vars(_parser().parse_args(argv))
    if args['batch'] < 1:
        raise UserError(f'--batch: must be at least 1, not {args["batch"]}')
    exported, source = export_run(args.pop('run'), **args)
    for note in source.notes:
        print(f'note: {note}')
    print(exported)


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog='timm-amf export',
        description='Write the model of a run, or of a published folder, to one file that others can run; run the file '
                    'on random images, and keep it if it computes what the model computes.',
    )
    add = parser.add_argument
    add('run', metavar='RUN', help='folder of a run (args.yaml), or a published one (config.json, model.safetensors)')
    add('--format', required=True, choices=tuple(FORMATS), help='onnx needs timm_amf[export]')
    add('--output', metavar='FILE', help='default: exported.onnx, .pt or .safetensors in RUN')
    add('--overwrite', action='store_true', help='replace a file that is there')
    add('--weights', choices=tuple(WEIGHTS), default='best',
        help='of the best epoch; of the last, the moving average if there is one; the moving average; what the average '
             'is of (default: %(default)s)')
    add('--img-size', type=int, nargs='+', metavar='N', help='side, or height and width (default: as RUN evaluates)')
    add('--blocks', metavar='BLOCKS', help='path through a SpotTune: tuned, frozen, policy, or blocks as in 0,3,5')
    add('--data-dir', metavar='DIR', help="folder of a run's data, for the class names (default: where the run had it)")
    add('--class-names', metavar='FILE', help='text file with one class name a line')
    add('--batch', type=int, default=5, metavar='N', help='largest batch of the check (default: %(default)s)')
    add('--opset', type=int, metavar='N', help="ONNX operator set (default: the exporter's)")
    return parser
