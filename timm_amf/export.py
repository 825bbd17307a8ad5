"""A trained model as one file for those who do not have this package, checked by running the file.

    timm-amf export runs/amf --format onnx
    timm-amf export runs/spottune --format torchscript --output spottune.pt --weights last

ONNX files come from PyTorch's exporter by `torch.export`, not from the older one by TorchScript: that one has no
operator for the antialiased resize of a policy's input and is no longer developed. TorchScript files are traces: a
SpotTune has no other script, and a trace holds what evaluation computes without the code that led there.
"""
import contextlib
import json
import logging
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import to_2tuple
from timm.models import get_model_args
from torch import Tensor, nn

from timm_amf.engine.run_folder import WEIGHTS, is_run, open_run
from timm_amf.errors import CommandParser, UserError
from timm_amf.files import replacing
from timm_amf.hub.load import load, portable_args
from timm_amf.models.method import method_of
from timm_amf.version import __version__

__all__ = ['FORMATS', 'Exported', 'Format', 'Source', 'describe', 'export_model', 'main', 'open_source']

INPUT, OUTPUT = 'input', 'logits'
# Name of the extra file of a TorchScript archive, and of the metadata entry of a safetensors file.
CONFIG = 'config.json'
# Largest difference of a logit as a share of the largest logit: float32 in another order. A share, since the logits of
# a model that is hardly trained may all be so small that a file of zeros would pass for it.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        model: In evaluation mode, in float32, on the CPU.
        config: What goes with the file, from `describe`.
        notes: Lines that the user should read.
    """
    model: nn.Module
    config: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A file that was written, and what its check found.

    Attributes:
        path: The file.
        batches: Sizes of the batches of random images.
        difference: Largest difference of a logit between file and model.
        largest: Largest logit of the model, in absolute value.
        same_class: Number of images to which both give the same class.
    """
    path: Path
    batches: tuple[int, ...]
    difference: float
    largest: float
    same_class: int

    def __str__(self) -> str:
        return (
            f'{self.path}: {self.path.stat().st_size / 1e6:.1f} MB; on {sum(self.batches)} random images, in batches '
            f'of {", ".join(map(str, self.batches))}, its logits differ from the model\'s by at most '
            f'{self.difference:.1e} (largest logit {self.largest:.2g}), with the same class for {self.same_class}')


# -- what is exported -------------------------------------------------------------------------------------------------


def describe(
        model: nn.Module,
        data_config: Optional[dict[str, Any]] = None,
        class_names: Optional[Sequence[str]] = None,
) -> dict[str, Any]:
    """What the user of an exported file must know: how to prepare an image, what the outputs are, what the model was.

    Args:
        model: Any timm model, or a composite of this package.
        data_config: As `timm.data.resolve_data_config` gives it. None: the model's own.
        class_names: Name of each output, in order.

    Returns:
        Plain data: `input_size` (channels, height, width), `mean` and `std` (a value a channel, of pixels from 0 to 1),
        `interpolation`, `crop_pct`, `crop_mode`, `num_classes`, `class_names` (if known), `architecture` and
        `model_args` (of `timm.create_model`), and the versions of the packages.
    """
    data = resolve_data_config({}, model=model, verbose=False) if data_config is None else data_config
    config = dict(
        architecture=model.pretrained_cfg['architecture'],
        model_args=portable_args(get_model_args(model)),
        num_classes=model.num_classes,
        input_size=data['input_size'],
        mean=adapt_to_chs(data['mean'], data['input_size'][0]),
        std=adapt_to_chs(data['std'], data['input_size'][0]),
        interpolation=data['interpolation'],
        crop_pct=data['crop_pct'],
        crop_mode=data['crop_mode'],
        versions=dict(timm_amf=__version__, timm=timm.__version__, torch=torch.__version__),
    )
    if class_names is not None:
        config['class_names'] = list(class_names)
    return json.loads(json.dumps(config))


def open_source(
        path: Union[str, Path],
        weights: str = 'best',
        img_size: Optional[Union[int, Sequence[int]]] = None,
        blocks: Optional[str] = None,
        data_dir: Optional[str] = None,
        class_names: Optional[Union[str, Path]] = None,
) -> Source:
    """The model of a run's folder, or of a published folder (`config.json` and `model.safetensors`).

    Args:
        path: The folder.
        weights: Of a run: one of `run_folder.WEIGHTS`.
        img_size: Side in pixels, or (height, width), of the images. None: what the run evaluates, or the model's own.
        blocks: Path of all images through a SpotTune, as `timm-amf evaluate --blocks` takes it. None: as the run
            evaluates.
        data_dir: Folder of a run's data, which name the classes. None: where the run had it.
        class_names: Text file with the name of each class on a line of its own. None: those that the weights carry.
    """
    path, notes, global_k, settings = Path(path), [], None, {}
    if (path / 'config.json').is_file():  # it may hold the options of its run, too
        if weights != 'best' or data_dir is not None:
            flag = '--data-dir' if data_dir is not None else f'--weights {weights}'
            raise UserError(
                f'{flag}: {path} is a published folder, with one set of weights and its class names; leave it out')
        model = load(path)
        names = model.pretrained_cfg.get('label_names')
        if isinstance(names, dict):  # index -> name, where not every output has one
            names = [names.get(str(i), str(i)) for i in range(model.num_classes)]
        missing = 'its config.json has none'
        if getattr(model, 'fixed_blocks', None) is not None:  # its results are of this path
            blocks = blocks or ','.join(map(str, model.fixed_blocks)) or 'frozen'
    else:
        run = open_run(path, weights, data_dir, need_data=False)
        model, missing, settings, global_k = run.model, run.missing, vars(run.args), run.plan.global_k
        names = run.class_names
        if names and (len(names) > model.num_classes or (len(names) < model.num_classes and not run.args.num_classes)):
            missing = f'the data have {len(names)} classes by now, and the model {model.num_classes} outputs'
            names = None
        blocks = blocks or run.args.eval_blocks
    if class_names is not None:
        if not Path(class_names).is_file():
            raise UserError(f'--class-names: {class_names} is not a file; check the path')
        given = [line.strip() for line in Path(class_names).read_text(encoding='utf-8-sig').rstrip().splitlines()]
        if len(given) != len(names or given) or len(given) > model.num_classes or len(set(filter(None, given))) < max(
                1, len(given)):
            raise UserError(
                f'--class-names {class_names}: has {len(given)} lines for the {len(names or ()) or model.num_classes} '
                'classes of the model; give one name a line, each once, and no empty lines')
        if names and given != names and sorted(given) == sorted(names):
            raise UserError(f'--class-names {class_names}: has the names of the weights in another order; leave it out')
        names = given
    if not names:
        notes.append(f'the class names are left out: {missing}; give --data-dir DIR or --class-names FILE')
    data = resolve_data_config(settings, model=model, verbose=False)
    if blocks and 'eval_blocks' not in method_of(model).takes:
        raise UserError(f'{path}: --blocks does not act on {type(model).__name__}; leave it out')
    fixed = None if blocks == 'policy' else method_of(model).fixed_path(global_k, blocks)
    if 'eval_blocks' in method_of(model).takes:
        model.set_blocks(None)
    if fixed is not None:
        model = model.compact(fixed)
        # A plain model wants its backbone's statistics, where the whole model's may be another convention.
        data = dict(data, mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std'])
        notes.append(
            f'all images take one path, {len(fixed)} tuned blocks: exported as a plain '
            f'{model.pretrained_cfg["architecture"]}')
    if img_size is not None:
        size = to_2tuple(img_size[0] if isinstance(img_size, Sequence) and len(img_size) == 1 else img_size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f'--img-size: takes one side or height and width in pixels, not {" ".join(map(str, size))}')
        if hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=size)
        data = dict(data, input_size=(data['input_size'][0], *size))
    model = model.float().eval().requires_grad_(False)
    return Source(model, describe(model, data, names or None), tuple(notes))


# -- the formats ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: Of its files.
        write: Writes a source to a file, with an example batch and the ONNX operator set that was asked for.
        read: Opens a file; gives what maps images (B, C, H, W) to logits (B, classes).
    """
    suffix: str
    write: Callable[[Source, Tensor, Path, Optional[int]], None]
    read: Callable[[Path], Callable[[Tensor], Tensor]]


def _write_onnx(source: Source, example: Tensor, path: Path, opset: Optional[int]) -> None:
    # Of timm's fused attention PyTorch's exporter assumes strides that fail views; products and softmax are the same.
    fused = [m for m in source.model.modules() if getattr(m, 'fused_attn', None) is True]
    for module in fused:
        module.fused_attn = False
    try:
        proto = torch.onnx.export(
            source.model,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            opset_version=opset,
            verbose=False,
        ).model_proto
    finally:
        for module in fused:
            module.fused_attn = True
    got = next(o.version for o in proto.opset_import if o.domain in ('', 'ai.onnx'))
    if opset is not None and got != opset:
        raise UserError(
            f'--opset {opset}: this PyTorch writes the model in {got} instead; take a number near it, or none')
    # The notes of the exporter are stack traces, with the paths of the machine.
    for graph in (proto.graph, *proto.functions):
        values = (*getattr(graph, 'value_info', ()), *getattr(graph, 'initializer', ()))
        for item in (graph, *graph.node, *values, *proto.graph.input, *proto.graph.output):
            item.doc_string = ''
            del item.metadata_props[:]
    proto.doc_string = ''
    for key, value in source.config.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    path.write_bytes(proto.SerializeToString())


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_torchscript(source: Source, example: Tensor, path: Path, opset: Optional[int]) -> None:
    # What the tracer would check by a second trace is checked on the file, with other batch sizes.
    traced = torch.jit.trace(source.model, example, check_trace=False)
    full = path.with_name(f'{path.name}.full')
    try:
        torch.jit.save(traced, full, _extra_files={CONFIG: json.dumps(source.config)})
        # Without its notes for debugging, which name files of this machine, and with a root of one name.
        with zipfile.ZipFile(full) as given, zipfile.ZipFile(path, 'w') as kept:
            for info in given.infolist():
                if not info.filename.endswith('.debug_pkl'):
                    entry = zipfile.ZipInfo(f'model/{info.filename.partition("/")[2]}', info.date_time)
                    entry.compress_type, entry.file_size = info.compress_type, info.file_size
                    with given.open(info) as record, kept.open(entry, 'w') as copy:
                        shutil.copyfileobj(record, copy, 1 << 20)
    finally:
        full.unlink(missing_ok=True)


def _write_safetensors(source: Source, example: Tensor, path: Path, opset: Optional[int]) -> None:
    # Copies: safetensors takes no two names for one storage. One entry: it writes several in random order.
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in source.model.state_dict().items()}
    save_file(tensors, path, metadata={CONFIG: json.dumps(source.config)})


def _read_safetensors(path: Path) -> Callable[[Tensor], Tensor]:
    with safe_open(path, 'pt') as file:
        config = json.loads(file.metadata()[CONFIG])
    overlay = dict(mean=tuple(config['mean']), std=tuple(config['std']))
    model = timm.create_model(config['architecture'], pretrained_cfg_overlay=overlay, **config['model_args'])
    model.load_state_dict(load_file(path))
    return model.eval()


FORMATS = {
    'onnx': Format('.onnx', _write_onnx, _read_onnx),
    'torchscript': Format('.pt', _write_torchscript, torch.jit.load),
    'safetensors': Format('.safetensors', _write_safetensors, _read_safetensors),
}


# -- the check --------------------------------------------------------------------------------------------------------


def export_model(
        source: Source,
        format: str,
        path: Union[str, Path],
        batches: Sequence[int] = (1, 2, 5),
        opset: Optional[int] = None,
        overwrite: bool = False,
) -> Exported:
    """Write a model to a file, run the file, and keep it if it computes what the model computes.

    Args:
        source: The model and what goes with the file.
        format: Of `FORMATS`.
        path: The file.
        batches: Sizes of the batches of random images that it is run on.
        opset: ONNX operator set. None: the exporter's.
        overwrite: Replace a file that is there.

    Raises:
        UserError: If the file is there or cannot be written, the model cannot be exported, or the file computes
            something else. Then there is no file, or the one that was there.
    """
    path = Path(path)
    _check_request(path, format, opset, overwrite)
    size = source.config['input_size']
    images = {n: torch.randn(n, *size, generator=torch.Generator().manual_seed(n)) for n in batches}
    example = torch.randn(2, *size)  # 0 and 1 are sizes that `torch.export` takes for constants
    differences, same = [], 0
    with replacing(path, 'name another', f'--output {path}') as temporary, _quiet(), torch.no_grad():
        temporary.touch()  # before any work
        expected = {n: source.model(x) for n, x in images.items()}
        try:
            with method_of(source.model).exportable():
                FORMATS[format].write(source, example, temporary, opset)
            run = FORMATS[format].read(temporary)
            for n, logits in expected.items():
                found = run(images[n])
                if found.shape != logits.shape:
                    raise UserError(
                        f'{path}: was not written: the {format} file gives {tuple(found.shape)} in the place of '
                        f'{tuple(logits.shape)} for a batch of {n}; take another --format')
                differences.append((found - logits).abs().max())
                same += (found.argmax(1) == logits.argmax(1)).sum().item()
        except (UserError, OSError, MemoryError):
            raise
        except Exception as e:  # exporters and runtimes raise exceptions of their own kinds
            cause = e
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().partition('\n')[0] or type(cause).__name__
            raise UserError(
                f'{source.config["architecture"]} cannot be exported: the {format} file cannot be made or run '
                f'({reason[:200]}); take another --format') from e
        difference = torch.stack(differences).max().item()
        largest = max(logits.abs().max().item() for logits in expected.values())
        if not difference <= TOLERANCE * largest:  # not a number is no pass
            raise UserError(
                f'{path}: was not written: the {format} file differs from the model by {difference:.1e} in logits of '
                f'up to {largest:.2g} on random images; take another --format')
    return Exported(path, tuple(batches), difference, largest, same)


def _check_request(path: Path, format: str, opset: Optional[int], overwrite: bool) -> None:
    """What can be refused before a model is loaded and exported."""
    if format == 'onnx':
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    elif opset is not None:
        raise UserError(f'--opset: {format} has no operator sets; leave it out')
    if path.is_dir():
        raise UserError(f'--output {path}: is a folder; name a file')
    if path.suffix == '.safetensors' and is_run(path.parent) and not (
            path.parent / 'config.json').exists() and path.name.startswith('model'):
        raise UserError(f'--output {path}: is a file of the run itself; name another')
    if path.exists() and not overwrite:
        raise UserError(f'--output {path}: is there already; name another, or add --overwrite')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of exporters on how they trace; what they fail at is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)


# -- the verb ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """`timm-amf export`: write a file and check it."""
    parser = CommandParser(
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
    args = parser.parse_args(argv)
    if args.batch < 1:
        raise UserError(f'--batch: must be at least 1, not {args.batch}')
    output = Path(args.output or Path(args.run) / f'exported{FORMATS[args.format].suffix}')
    _check_request(output, args.format, args.opset, args.overwrite)
    source = open_source(args.run, args.weights, args.img_size, args.blocks, args.data_dir, args.class_names)
    exported = export_model(source, args.format, output, sorted({1, 2, args.batch}), args.opset, args.overwrite)
    for note in source.notes:
        print(f'note: {note}')
    print(exported)
