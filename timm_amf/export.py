"""A trained model as one file for those who do not have this package, checked by running the file.

    timm-amf export runs/amf --format onnx
    timm-amf export runs/amf --format onnx --int8
    timm-amf export runs/spottune --format pt2 --output spottune.pt2 --weights last

Both ONNX and `.pt2` files come from `torch.export`: a graph of what evaluation computes, without the code that led
there, for any number of images.
"""
import argparse
import contextlib
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import to_2tuple
from timm.models import get_model_args
from torch import Tensor, nn

from timm_amf.data import Mixture, SeededLoader, create_loader
from timm_amf.engine.checkpoint import contiguous
from timm_amf.engine.opened import RunOptions, open_trained
from timm_amf.engine.run_folder import is_run
from timm_amf.errors import UserError
from timm_amf.files import replacing
from timm_amf.hub.load import load, portable_args
from timm_amf.lazy import callable_module
from timm_amf.models.method import method_of
from timm_amf.version import __version__

__all__ = [
    'FORMATS', 'Exported', 'Format', 'Source', 'describe', 'export_model', 'main', 'open_source', 'quantize',
]

callable_module(__name__)  # timm_amf.export(RUN, 'onnx')

INPUT, OUTPUT = 'input', 'logits'
# Name of the extra file of a .pt2 archive, and of the metadata entry of a safetensors file.
CONFIG = 'config.json'
# Largest difference of a logit as a share of the largest logit: float32 in another order. A share, since the logits of
# a model that is hardly trained may all be so small that a file of zeros would pass for it.
TOLERANCE = 1e-4
# Bytes of weights up to which an ONNX file is one file: the format of its messages ends at 2 GiB, graph included.
ONE_FILE = 2 ** 31 - 2 ** 24
# Training images that show the quantiser the ranges of activations.
CALIBRATION = 128


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
        notes: Lines that the user should read.
        int8: Of a file of 8 bits beside it, the sizes and accuracies of both, in a line.
    """
    path: Path
    batches: tuple[int, ...]
    difference: float
    largest: float
    same_class: int
    notes: tuple[str, ...] = ()
    int8: str = ''

    def __str__(self) -> str:
        data = sorted(_data_files(self.path))
        size = sum(file.stat().st_size for file in (self.path, *data)) / 1e6
        beside = f', the weights in {data[0].name}' if data else ''
        checked = (
            f'{self.path}: {size:.1f} MB{beside}; on {sum(self.batches)} random images, in batches '
            f'of {", ".join(map(str, self.batches))}, its logits differ from the model\'s by at most '
            f'{self.difference:.1e} (largest logit {self.largest:.2g}), with the same class for {self.same_class}')
        return '\n'.join(filter(None, [*(f'note: {note}' for note in self.notes), checked, self.int8]))


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
        model, missing = load(path), 'its config.json has none'
        names = model.pretrained_cfg.get('label_names')
        if isinstance(names, dict):  # index -> name, where not every output has one
            names = [names.get(str(i), str(i)) for i in range(model.num_classes)]
        if getattr(model, 'fixed_blocks', None) is not None:  # its results are of this path
            blocks = blocks or ','.join(map(str, model.fixed_blocks)) or 'frozen'
    else:
        run = open_trained(path, RunOptions(data_dir=data_dir, weights=weights), needs_data=data_dir is not None)
        try:
            names = run.data[0].class_names if data_dir else run.names
        except (UserError, OSError) as e:
            if data_dir:
                raise
            names, missing = None, str(e)
        model, settings, global_k = run.load(None), vars(run.args), run.plan.global_k
        blocks = blocks or run.args.eval_blocks
        if names and (len(names) > model.num_classes or (len(names) < model.num_classes and not run.args.num_classes)):
            missing = f'the data have {len(names)} classes by now, and the model {model.num_classes} outputs'
            names = None
    if class_names is not None:
        names = _read_class_names(Path(class_names), names, model.num_classes)
    if not names:
        notes.append(f'the class names are left out: {missing}; give --data-dir DIR or --class-names FILE')
    data, method = resolve_data_config(settings, model=model, verbose=False), method_of(model)
    if 'eval_blocks' in method.takes:
        fixed = None if blocks == 'policy' else method.fixed_path(global_k, blocks)
        model.set_blocks(None)
        if fixed is not None:
            model = model.compact(fixed)
            # A plain model wants its backbone's statistics, where the whole model's may be another convention.
            data = dict(data, mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std'])
            notes.append(
                f'all images take one path, {len(fixed)} tuned blocks: exported as a plain '
                f'{model.pretrained_cfg["architecture"]}')
    elif blocks:
        raise UserError(f'{path}: --blocks does not act on {type(model).__name__}; leave it out')
    if img_size is not None:
        size = to_2tuple(img_size[0] if isinstance(img_size, Sequence) and len(img_size) == 1 else img_size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f'--img-size: takes one side or height and width in pixels, not {" ".join(map(str, size))}')
        if hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=size)
        data = dict(data, input_size=(data['input_size'][0], *size))
    model = model.float().eval().requires_grad_(False)
    return Source(model, describe(model, data, names or None), tuple(notes))


def _read_class_names(file: Path, names: Optional[Sequence[str]], outputs: int) -> list[str]:
    """The lines of a file, which must fit the names of the weights, or the outputs."""
    if not file.is_file():
        raise UserError(f'--class-names: {file} is not a file; check the path')
    given = [line.strip() for line in file.read_text(encoding='utf-8-sig').rstrip().splitlines()]
    if not 0 < len(given) == len(names or given) <= outputs or len(set(filter(None, given))) < len(given):
        raise UserError(
            f'--class-names {file}: has {len(given)} lines for the {len(names or ()) or outputs} classes of the model; '
            'give one name a line, each once, and no empty lines')
    if names and given != names and sorted(given) == sorted(names):
        raise UserError(f'--class-names {file}: has the names of the weights in another order; leave it out')
    return given


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
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) <= ONE_FILE:
        path.write_bytes(proto.SerializeToString())
        return
    import onnx

    final = path.with_name(path.name.removesuffix('.tmp'))
    there = {file.name for file in _data_files(final)}  # of the file that this one replaces
    names = (f'{final.name}{f".{i}" if i else ""}.data' for i in range(len(there) + 1))
    onnx.save_model(proto, str(path), save_as_external_data=True, location=next(n for n in names if n not in there))


def _data_files(path: Path) -> set[Path]:
    """The files that hold the weights of an ONNX file of more than 2 GiB."""
    name = re.compile(re.escape(path.name) + r'(\.\d+)?\.data')
    return {file for file in path.parent.glob('*.data') if name.fullmatch(file.name)}


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _write_pt2(source: Source, example: Tensor, path: Path, opset: Optional[int]) -> None:
    program = torch.export.export(source.model, (example,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    for module in program.graph_module.modules():
        for node in getattr(module, 'graph', torch.fx.Graph()).nodes:
            node.meta.pop('stack_trace', None)  # with the paths of the machine
    with path.open('wb') as file:
        torch.export.save(program, file, extra_files={CONFIG: json.dumps(source.config)})


def _read_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open('rb') as file:
        return torch.export.load(file).module()


def _write_safetensors(source: Source, example: Tensor, path: Path, opset: Optional[int]) -> None:
    # One entry of metadata: it writes several in random order.
    save_file(contiguous(source.model.state_dict()), path, metadata={CONFIG: json.dumps(source.config)})


def _read_safetensors(path: Path) -> Callable[[Tensor], Tensor]:
    with safe_open(path, 'pt') as file:
        config = json.loads(file.metadata()[CONFIG])
    overlay = dict(mean=tuple(config['mean']), std=tuple(config['std']))
    model = timm.create_model(config['architecture'], pretrained_cfg_overlay=overlay, **config['model_args'])
    model.load_state_dict(load_file(path))
    return model.eval()


FORMATS = {
    'onnx': Format('.onnx', _write_onnx, _read_onnx),
    'pt2': Format('.pt2', _write_pt2, _read_pt2),
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
    """Write a model to a file, run the file, and keep it if it computes what the model computes; else there is no file,
    or the one that was there.

    Args:
        source: The model and what goes with the file.
        format: Of `FORMATS`.
        path: The file.
        batches: Sizes of the batches of random images that it is run on.
        opset: ONNX operator set. None: the exporter's.
        overwrite: Replace a file that is there.
    """
    path = Path(path)
    _check_request(path, format, opset, overwrite)
    size, differences, same = source.config['input_size'], [], 0
    images = {n: torch.randn(n, *size, generator=torch.Generator().manual_seed(n)) for n in batches}
    example = torch.randn(2, *size)  # 0 and 1 are sizes that `torch.export` takes for constants
    problem = f'{source.config["architecture"]} cannot be exported: the {format} file cannot be made or run'
    with _data_of(path), replacing(path, 'name another', f'--output {path}') as temporary, torch.no_grad():
        temporary.touch()  # before any work
        expected = {n: source.model(x) for n, x in images.items()}
        with _exporting(problem, 'take another --format'):
            with method_of(source.model).exportable():
                FORMATS[format].write(source, example, temporary, opset)
            run = FORMATS[format].read(temporary)
            found = {n: run(x) for n, x in images.items()}
        for n, logits in expected.items():
            if found[n].shape != logits.shape:
                raise UserError(
                    f'{path}: was not written: the {format} file gives {tuple(found[n].shape)} in the place of '
                    f'{tuple(logits.shape)} for a batch of {n}; take another --format')
            differences.append((found[n] - logits).abs().max())
            same += (found[n].argmax(1) == logits.argmax(1)).sum().item()
        difference = torch.stack(differences).max().item()
        largest = max(logits.abs().max().item() for logits in expected.values())
        if not difference <= TOLERANCE * largest:  # not a number is no pass
            raise UserError(
                f'{path}: was not written: the {format} file differs from the model by {difference:.1e} in logits of '
                f'up to {largest:.2g} on random images; take another --format')
    return Exported(path, tuple(batches), difference, largest, same)


@contextlib.contextmanager
def _data_of(path: Path) -> Iterator[None]:
    """Around the writing of a file: of the weights beside it remain those that it names."""
    before = _data_files(path)
    try:
        yield
    except BaseException:
        for file in _data_files(path) - before:
            file.unlink()
        raise
    for file in before:
        file.unlink()


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
def _exporting(problem: str, remedy: str) -> Iterator[None]:
    """Around exporters and runtimes: they raise exceptions of their own kinds, and remark on how they trace."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as e:
        cause = e
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().partition('\n')[0] or type(cause).__name__
        raise UserError(f'{problem} ({reason[:200]}); {remedy}') from e
    finally:
        logging.disable(level)


# -- eight bits -------------------------------------------------------------------------------------------------------


def quantize(
        path: Path,
        small: Path,
        config: dict[str, Any],
        train: Mixture,
        val: Mixture,
        workers: int = 0,
) -> str:
    """Write an ONNX file with weights and activations of 8 bits, by ONNX Runtime's quantiser, and run both files.

    Scales of weights are by channel; ranges of activations are those of `CALIBRATION` training images, spread evenly.

    Args:
        path: The ONNX file of float32, as `export_model` wrote it.
        small: The file to write.
        config: What the file says of itself, from `describe`; the images are prepared by it.
        train: Images of the ranges.
        val: Images on which both files are compared.
        workers: Worker processes that load the images.

    Returns:
        Size and top-1 accuracy of both, on one line.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if _data_files(path):
        raise UserError('--int8: the quantiser takes no model above 2 GiB; leave it out')
    keys = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    shown = train.subset(np.linspace(0, len(train) - 1, min(CALIBRATION, len(train))).round())
    loaders = [create_loader(data, batch_size=16, workers=workers, **{k: config[k] for k in keys})
               for data in (shown, val)]
    with (replacing(small, 'name another --output') as temporary, tempfile.TemporaryDirectory() as folder,
          _exporting('--int8: ONNX Runtime cannot quantise it', 'leave it out')):
        prepared, images = Path(folder) / 'prepared.onnx', ({INPUT: batch.input.numpy()} for batch in loaders[0])
        try:
            quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared), str(temporary), SimpleNamespace(get_next=lambda: next(images, None)), per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
            proto, given = onnx.load(str(temporary)), onnx.load(str(path))
            del proto.metadata_props[:]
            proto.metadata_props.extend(given.metadata_props)
            temporary.write_bytes(proto.SerializeToString())
            before, after, same = _compare(_read_onnx(path), _read_onnx(temporary), loaders[1])
        finally:
            for loader in loaders:
                loader.close()
    sizes = [file.stat().st_size / 1e6 for file in (small, path)]
    return (
        f'{small}: {sizes[0]:.1f} MB in the place of {sizes[1]:.1f}; validation images: {len(val)}, top-1 {after:.2f} '
        f'in the place of {before:.2f} ({after - before:+.2f} points), the same class for {same:.2f} %')


def _compare(first: Callable, second: Callable, loader: SeededLoader) -> tuple[float, float, float]:
    """Percent of the images that each of two models classifies right, and of those to which both give one class."""
    hits = torch.zeros(3, dtype=torch.long)
    for batch in loader:
        one, two = (run(batch.input).argmax(1) for run in (first, second))
        hits += torch.stack([(one == batch.target).sum(), (two == batch.target).sum(), (one == two).sum()])
    return tuple((100 * hits / len(loader.dataset)).tolist())


# -- the verb ---------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> Exported:
    """Write a file, check it, and print and give what the check found."""
    output = Path(args.output or Path(args.run) / f'exported{FORMATS[args.format].suffix}')
    _check_request(output, args.format, args.opset, args.overwrite)
    small, trained = output.with_suffix('.int8.onnx'), None
    if args.int8:
        if args.format != 'onnx':
            raise UserError(f'--int8: is for --format onnx, not {args.format}')
        _check_request(small, 'onnx', None, args.overwrite)
        run = open_trained(args.run, RunOptions(data_dir=args.data_dir, weights=args.weights))
        trained = *run.data, run.args.workers
    source = open_source(args.run, args.weights, args.img_size, args.blocks, args.data_dir, args.class_names)
    exported = export_model(source, args.format, output, sorted({1, 2, args.batch}), args.opset, args.overwrite)
    exported = replace(exported, notes=source.notes)
    if trained is not None:
        exported = replace(
            exported, int8=quantize(output, small, source.config, *trained))
    print(exported)
    return exported
