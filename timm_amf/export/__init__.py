"""A trained model as one file for those who do not have this package: ONNX, TorchScript, safetensors."""
from .checked import Exported, export_model
from .command import export_run, main
from .formats import FORMATS
from .source import Source, describe, open_source

__all__ = ['FORMATS', 'Exported', 'Source', 'describe', 'export_model', 'export_run', 'main', 'open_source']
