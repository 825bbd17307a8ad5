"""A device without float64, as Apple's GPUs are, on the CPU: tensors of a class of their own that refuse it."""
import pytest
import torch
from accelerate import PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from timm_amf.engine import build
from timm_amf.models import records

DEVICE = torch.device('mps', 0)


def _plain(value):
    return value.as_subclass(torch.Tensor) if isinstance(value, OnDevice) else value


class OnDevice(torch.Tensor):
    """A tensor of the CPU that says that it is on the device; what is computed of it is there, too."""
    device = property(lambda self: DEVICE)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return _checked(result)


    def __deepcopy__(self, memo):
        copy = _plain(self.detach()).clone().as_subclass(OnDevice)
        memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy
        return memo[id(self)]


def _checked(result):
    for tensor in tree_flatten(result)[0]:
        if isinstance(tensor, OnDevice) and tensor.dtype == torch.float64:
            raise TypeError('Cannot convert a MPS Tensor to float64 dtype as the MPS framework has none')
    return result


def _is_device(value) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith('mps')


class Emulation(TorchFunctionMode):
    """Makes tensors that are asked for on the device there, and takes those that go to the CPU from it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        flat, _ = tree_flatten((args, kwargs))
        if name == 'numpy' and isinstance(args[0], OnDevice):
            raise TypeError('can not convert mps:0 device type tensor to numpy')
        if name == 'cpu' or (name == 'to' and any(
                str(value) == 'cpu' for value in flat if isinstance(value, (str, torch.device)))):
            return _plain(func(_plain(args[0]), *args[1:], **kwargs))
        if func is torch.device or not any(map(_is_device, flat)):
            # Gradients are plain tensors here, so that of all that mixes devices only sums in float64 are told.
            tensors = [t for t in flat if isinstance(t, torch.Tensor) and t.ndim and name != 'copy_']
            if any(isinstance(t, OnDevice) for t in tensors) and any(t.dtype == torch.float64 for t in tensors):
                raise RuntimeError(f'{name}: Expected all tensors to be on the same device, mps:0 and cpu')
            return _checked(func(*args, **kwargs))
        args, kwargs = tree_map(lambda v: torch.device('cpu') if _is_device(v) else v, (args, kwargs))
        result = func(*map(_plain, args), **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        return _checked(result.as_subclass(OnDevice))


_to = torch.nn.Module.to


def _module_to(module, *args, **kwargs):
    """`Module.to`, which would leave parameters the class that they have."""
    if not any(map(_is_device, (*args, *kwargs.values()))):
        return _to(module, *args, **kwargs)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, OnDevice):
                on = parameter.data.as_subclass(OnDevice)
                part._parameters[name] = torch.nn.Parameter(on, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, OnDevice):
                part._buffers[name] = _checked(buffer.as_subclass(OnDevice))
    return module


@pytest.fixture
def no_float64(monkeypatch):
    """Accelerate chooses the device; returns it."""
    original = build.build_accelerator

    def on_device(args):
        accelerator = original(args)
        PartialState().device = accelerator.state.device = DEVICE
        return accelerator

    records.exact_device.cache_clear()
    monkeypatch.setattr(build, 'build_accelerator', on_device)
    monkeypatch.setattr(torch.nn.Module, 'to', _module_to)
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda device: torch.default_generator.get_state())
    monkeypatch.setattr(torch.mps, 'set_rng_state', lambda state, device: torch.default_generator.set_state(state))
    monkeypatch.setattr(torch.mps, 'manual_seed', lambda seed: None)
    with Emulation():
        yield DEVICE
    records.exact_device.cache_clear()
