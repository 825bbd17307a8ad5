"""The formats: how a model is written to each, and how a written file is run.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from timm_amf.errors import UserError

from .source import Source, first_line

__all__ = ['CONFIG', 'FORMATS', 'INPUT', 'OUTPUT', 'Format', 'build_from_config']

_logger = logging.getLogger(__name__)

INPUT, OUTPUT = 'input', 'logits'
# Name of the extra file of a TorchScript archive, and of the metadata entry of a safetensors file.
CONFIG = 'config.json'
_EXTRA = '{} is not installed, and ONNX export needs it: pip install "timm_amf[export]"'
_LIMIT = 2 ** 31  # bytes of a protobuf message


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        name: As on the command line.
        suffix: Of its files.
        require: Fails where a package is missing.
        write: Writes a source to a file, with an example batch and the ONNX operator set that was asked for.
        read: Opens a file; gives what maps images (B, C, H, W) to logits (B, classes).
    """
    name: str
    suffix: str
    require: Callable[[], None]
    write: Callable[[Source, Tensor, Path, Optional[int]], None]
    read: Callable[[Path], Callable[[Tensor], Tensor]]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of exporters on how they trace; what they fail at is raised."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'torch.export', 'onnxscript', 'onnx_ir')]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


# ---- ONNX


def _require_onnx() -> None:
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        try:
            __import__(package)
        except ImportError:
            raise UserError(_EXTRA.format(package)) from None


def _write_onnx(source: Source, example: Tensor, path: Path, opset: Optional[int]) -> None:
    size = sum(t.numel() * t.element_size() for t in source.model.state_dict().values())
    if size >= _LIMIT:
        raise UserError(f'{size / 2 ** 30:.1f} GiB of weights do not fit one ONNX file (2 GiB); '
                        f'take --format torchscript or safetensors')
    with _quiet(), _plain_attention(source.model):
        program = torch.onnx.export(
            source.model,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            opset_version=opset,
            verbose=False,
        )
        proto = program.model_proto
    got = next(o.version for o in proto.opset_import if o.domain in ('', 'ai.onnx'))
    if opset is not None and got != opset:
        raise UserError(
            f'--opset {opset}: this PyTorch writes the model in {got} instead; take a number near it, or none')
    _strip(proto)
    for key, value in source.config.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    path.write_bytes(proto.SerializeToString())


@contextlib.contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """timm's attention by products and softmax: of the fused one PyTorch's exporter assumes strides that fail views."""
    fused = [m for m in model.modules() if getattr(m, 'fused_attn', None) is True]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _strip(proto: Any) -> None:
    """Removes the notes of the exporter: stack traces, with the paths of the machine."""
    proto.doc_string = ''
    for graph in (proto.graph, *proto.functions):
        graph.doc_string = ''
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ''
            del node.metadata_props[:]
        for value in (*getattr(graph, 'value_info', ()), *getattr(graph, 'initializer', ())):
            del value.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


# ---- TorchScript


def _write_torchscript(source: Source, example: Tensor, path: Path, opset: Optional[int]) -> None:
    with _quiet(), torch.no_grad():
        # What the tracer would check by a second trace is checked on the file, with other batch sizes.
        traced = torch.jit.trace(source.model, example, check_trace=False)
        full = path.with_name(f'{path.name}.full')
        try:
            torch.jit.save(traced, full, _extra_files={CONFIG: json.dumps(source.config)})
            _repack(full, path)
        finally:
            full.unlink(missing_ok=True)


def _repack(full: Path, path: Path) -> None:
    """The archive without its notes for debugging, which name files of this machine, and with a root of one name."""
    with zipfile.ZipFile(full) as given, zipfile.ZipFile(path, 'w') as kept:
        for info in given.infolist():
            if info.filename.endswith('.debug_pkl'):
                continue
            entry = zipfile.ZipInfo(f'model/{info.filename.partition("/")[2]}', info.date_time)
            entry.compress_type = info.compress_type
            entry.file_size = info.file_size
            with given.open(info) as record, kept.open(entry, 'w') as copy:
                shutil.copyfileobj(record, copy, 1 << 20)


def _read_torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    with _quiet():
        return torch.jit.load(path)


# ---- safetensors


def _write_safetensors(source: Source, example: Tensor, path: Path, opset: Optional[int]) -> None:
    # Copies: safetensors takes no two names for one storage. One entry: it writes several in random order.
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in source.model.state_dict().items()}
    save_file(tensors, path, metadata={CONFIG: json.dumps(source.config)})


def _read_safetensors(path: Path) -> Callable[[Tensor], Tensor]:
    with safe_open(path, 'pt') as file:
        config = json.loads(file.metadata()[CONFIG])
    model = build_from_config(config)
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as e:
        raise UserError(
            f'the weights do not fit {config["architecture"]} as its arguments alone describe it '
            f'({" ".join(str(e).split())[:160]}); take --format onnx or torchscript') from None
    return model.eval()


def build_from_config(config: dict[str, Any]) -> nn.Module:
    """The model that `describe` described, with random weights.

    Args:
        config: Of an exported safetensors file.

    Raises:
        UserError: If timm does not build it.
    """
    overlay = dict(mean=tuple(config['mean']), std=tuple(config['std']))
    try:
        return timm.create_model(config['architecture'], pretrained_cfg_overlay=overlay, **config['model_args'])
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'{config["architecture"]} cannot be built again ({first_line(e)})') from None


FORMATS = {
    f.name: f for f in (
        Format('onnx', '.onnx', _require_onnx, _write_onnx, _read_onnx),
        Format('torchscript', '.pt', lambda: None, _write_torchscript, _read_torchscript),
        Format('safetensors', '.safetensors', lambda: None, _write_safetensors, _read_safetensors),
    )
}
