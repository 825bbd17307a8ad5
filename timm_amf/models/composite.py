"""Building a model of several networks through `build_model_with_cfg`, with weights from its parts or of its own."""
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Optional, Union

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._input import update_model_input_size
from timm.optim._param_groups import _matches_pattern
from torch import Tensor, nn

from ..errors import UserError
from .blocks import layer_ids
from .method import Method
from .parts import Part, as_pair, build_parts, part_cfg
from .policy import PolicyNetwork
from .renorm import create_renorm
from .sources import as_names, check_source, has_source, loading
from .tags import fine_tuned_cfgs, tag_arguments

__all__ = ['Composite', 'build_networks', 'checkpoint_within', 'composite_cfg', 'joint_input_cfg', 'register_variants']

_logger = logging.getLogger(__name__)

# The tag whose weights are those of the parts, each from its own source. Other tags are checkpoints of the whole model
# (see `tags`).
PARTS_TAG = 'in1k'

# What the composite takes over from the backbone that its images are prepared for.
_INPUT_KEYS = (
    'input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'test_crop_pct',
    'crop_mode', 'mean', 'std', 'license',
)


class Composite(Method, nn.Module):
    """timm networks, the last a policy if there is one, that are one timm model.

    Attributes:
        backbone_parts: What its networks, the policy apart, are built from.
        policy: A `PolicyNetwork`, or None.
        img_size: (H, W) of the input in pixels, which networks of a fixed input size are built for.
    """

    @classmethod
    def outline(cls, img_size: Optional[tuple[int, int]] = None, **kwargs) -> tuple[dict[str, Any], int]:
        """The `pretrained_cfg` of the model with these arguments, and the number of levels of its `feature_info`.

        Without an `img_size` no network is probed: levels are 0, and the cfg may lack `pool_size`.
        """
        raise NotImplementedError

    def _networks(self) -> dict[str, nn.Module]:
        """Path -> network, the policy's last."""
        raise NotImplementedError

    def _plain_net(self, path: str, net: nn.Module) -> nn.Module:
        """The network as timm builds it."""
        return net

    def _plain_name(self, path: str, name: str) -> str:
        """The name that a parameter of a network has in it as timm builds it."""
        return name

    def networks(self) -> list[nn.Module]:
        return list(self._networks().values())

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {
            f'{path}.{name}' for path, net in self._networks().items() if hasattr(net, 'no_weight_decay')
            for name, _ in net.named_parameters()
            if _matches_pattern(self._plain_name(path, name), net.no_weight_decay())}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layers of all networks, aligned at the top: the last blocks of a deep and a shallow one are one layer."""
        layers, top = self._layers(coarse)
        return lambda name: layers.get(name, top)

    def _layers(self, coarse: bool = False) -> tuple[dict[str, int], int]:
        """The layer of each parameter and module, and the top one."""
        networks = self._networks()
        layered = {path: layer_ids(self._plain_net(path, net), coarse) for path, net in networks.items()}
        top = max(t for _, t in layered.values())
        layers = {}
        for path, net in networks.items():
            ids, own_top = layered[path]
            for name, _ in (*net.named_parameters(), *net.named_modules()):
                layers[f'{path}.{name}'] = top - own_top + ids.get(self._plain_name(path, name), own_top)
        return layers, top

    def set_input_size(self, img_size: Union[int, tuple[int, int]]) -> None:
        """Resize the networks whose input size is fixed, such as a ViT's, to (H, W) pixels or a square of this side.

        A policy that resizes its own input stays as it is.
        """
        self.img_size = as_pair(img_size)
        for net in self.networks():
            own = self.policy is not None and net is self.policy.net and self.policy.input_size is not None
            if not own and hasattr(net, 'set_input_size'):
                net.set_input_size(img_size=self.img_size)
        for part in self.backbone_parts:
            if 'img_size' in part.kwargs:
                part.kwargs['img_size'] = self.img_size
        update_model_input_size(self, self.img_size)


def build_networks(
        backbones: Sequence[Part],
        policy: Optional[Part],
        in_chans: int,
        policy_input_size: Optional[int] = None,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        pretrained_parts: bool = False,
        cache_dir=None,
        random_policy: bool = False,
        device=None,
        dtype=None,
) -> tuple[list[nn.Module], list[nn.Module], Optional[PolicyNetwork]]:
    """Backbones, what takes the composite's input to the statistics of each, and the policy with its own.

    Args:
        backbones: What to build.
        policy: The policy, if any.
        in_chans: Image channels.
        policy_input_size: Side in pixels that the policy resizes its input to.
        mean: Mean that the composite's input is normalised with; None is the first backbone's.
        std: Standard deviation that it is normalised with; None is the first backbone's.
        pretrained_parts: Load the pretrained weights of each architecture into its networks.
        cache_dir: Where those are cached.
        random_policy: A policy of which no weights were published starts from random ones.
        device: Of the networks.
        dtype: Of the networks.
    """
    dd = {'device': device, 'dtype': dtype}
    parts = [*backbones, *([] if policy is None else [policy])]
    load = [pretrained_parts] * len(parts)
    if pretrained_parts and random_policy and not has_source(part_cfg(policy)):
        load[-1] = False
        _logger.info(f"timm has no pretrained weights for the policy '{policy.name}': it starts from random weights.")
    nets = build_parts(parts, load, cache_dir=cache_dir, in_chans=in_chans, **dd)
    cfg = joint_input_cfg(backbones)
    stats = mean or cfg['mean'], std or cfg['std']
    renorms = [
        create_renorm(*stats, net.pretrained_cfg['mean'], net.pretrained_cfg['std'], in_chans, **dd) for net in nets]
    if policy is None:
        return nets, renorms, None
    network = PolicyNetwork(nets.pop(), renorms.pop(), policy_input_size)
    # One that was trained for as many outputs keeps its classifier.
    if not (load[-1] and network.net.pretrained_cfg['num_classes'] == policy.num_classes):
        network.init_classifier()
    return nets, renorms, network


def register_variants(module: str, variants: Mapping[str, tuple[type[Composite], dict[str, Any], str]]) -> None:
    """Register composites with timm: entry points and `default_cfgs` in a module, as every model file of timm has.

    Args:
        module: Name of the module.
        variants: Registered name -> class, arguments, description.
    """
    def cfg_of(name: str, tagged: Mapping[str, Any]) -> dict[str, Any]:
        cls, args, _ = variants[name]
        return cls.outline(**{**args, **tagged})[0]

    # The parts' last, so that it is the default, also where they have no weights.
    cfgs = dict(fine_tuned_cfgs(variants, cfg_of))
    cfgs.update({f'{name}.{PARTS_TAG}*': cfg_of(name, {}) for name in variants})
    sys.modules[module].default_cfgs = generate_default_cfgs(cfgs)
    for name, (cls, args, description) in variants.items():
        _register(module, name, cls, args, description)


def _register(module: str, name: str, cls: type[Composite], args: dict[str, Any], description: str) -> None:
    def entry_point(pretrained: bool = False, **kwargs) -> nn.Module:
        of_tag = tag_arguments(name, kwargs.get('pretrained_cfg'))
        model = _build(cls, name, pretrained, **{**args, **of_tag, **kwargs})
        # timm adds what it was given, so that a checkpoint says how to build the model again.
        model._model_args = of_tag
        return model

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = description
    setattr(sys.modules[module], name, register_model(entry_point))


def joint_input_cfg(backbones: Sequence[Part]) -> dict[str, Any]:
    """How images are prepared for all backbones together.

    As for the first backbone; its size gives way to the first backbone of a fixed input size.
    """
    cfgs = [part_cfg(p) for p in backbones]
    sized = next((c for c in cfgs if c.get('fixed_input_size')), cfgs[0])
    sources = {key: sized if 'input_size' in key else cfgs[0] for key in _INPUT_KEYS}
    return {key: cfg[key] for key, cfg in sources.items() if key in cfg}


def composite_cfg(parts: dict[str, Part], num_backbones: int = 1, **overrides) -> dict[str, Any]:
    """The `pretrained_cfg` of a composite whose weights are those of its parts.

    Args:
        parts: Module path within the composite -> part.
        num_backbones: The first of them are those that images are prepared for; the first also lends its Hub id, so
            that timm lists the composite among the pretrained models.
        **overrides: Entries that replace the derived ones.
    """
    cfgs = {path: part_cfg(part) for path, part in parts.items()}
    return {
        **joint_input_cfg(list(parts.values())[:num_backbones]),
        'hf_hub_id': next(iter(cfgs.values())).get('hf_hub_id'),
        'num_classes': 1000,
        'first_conv': tuple(f'{path}.{n}' for path, c in cfgs.items() for n in as_names(c.get('first_conv'))) or None,
        'classifier': 'fc',
        'tag': PARTS_TAG,
        **overrides,
    }


def checkpoint_within(net: nn.Module, enable: bool) -> bool:
    """Switch a network's own gradient checkpointing; whether it has any."""
    try:
        net.set_grad_checkpointing(enable)
    except (AssertionError, AttributeError, NotImplementedError):
        return False
    return True


def _build(
        cls: type[Composite],
        variant: str,
        pretrained: bool,
        pretrained_cfg=None,
        pretrained_cfg_overlay: Optional[dict[str, Any]] = None,
        features_only: bool = False,
        cache_dir=None,
        **kwargs,
) -> nn.Module:
    """`build_model_with_cfg` for composites.

    With `pretrained`, the tag of the parts makes the class load each network's own weights (`pretrained_parts=True`);
    any other source (another tag, a Hub id, a local folder, `pretrained_cfg_overlay=dict(file=...)`) is a checkpoint of
    the whole model, and then no part is downloaded.
    """
    parts_cfg, _ = cls.outline(**{**kwargs, 'img_size': None})
    size = as_pair(kwargs.get('img_size')) or tuple(parts_cfg['input_size'][-2:])
    parts_cfg, levels = cls.outline(**{'in_chans': parts_cfg['input_size'][0], **kwargs, 'img_size': size})
    registered = resolve_pretrained_cfg(variant, pretrained_cfg if isinstance(pretrained_cfg, str) else None)
    named = registered.tag not in (PARTS_TAG, None)
    if not pretrained_cfg or isinstance(pretrained_cfg, str):
        own = {k: v for k, v in registered.to_dict().items() if v is not None} if named else {}
        pretrained_cfg = {**parts_cfg, **own, 'architecture': variant}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    ids = (None, parts_cfg.get('hf_hub_id'), None if named else registered.hf_hub_id)
    elsewhere = cfg.get('source') in ('hf-hub', 'local-dir') or any(cfg.get(k) for k in ('file', 'state_dict', 'url'))
    of_parts = not elsewhere and cfg.get('hf_hub_id') in ids
    whole = pretrained and not of_parts
    if whole:
        check_source(variant, cfg, cache_dir)
    with loading(variant, cfg) if whole else nullcontext():
        return build_model_with_cfg(
            partial(
                cls, mean=cfg['mean'], std=cfg['std'], pretrained_parts=pretrained and of_parts, cache_dir=cache_dir),
            variant,
            whole,
            pretrained_cfg=cfg,
            pretrained_filter_fn=partial(_check_checkpoint, features_only=features_only),
            # All levels of a pyramid; the last three where there are many of few reductions, as timm has it for a ViT.
            feature_cfg=dict(feature_cls='getter', out_indices=tuple(range(levels)) if levels <= 5 else 3),
            features_only=features_only,
            cache_dir=cache_dir,
            **kwargs,
        )


def _check_checkpoint(state_dict: dict[str, Tensor], model: nn.Module, features_only: bool) -> dict[str, Tensor]:
    """Refuse a checkpoint of another model, and warn of a classifier that does not fit.

    timm compares the number of classes with what the cfg claims; here the checkpoint itself says how many it has, so
    that a fine-tuned classifier is kept wherever it fits.
    """
    cfg = model.pretrained_cfg
    name = cfg.get('architecture', type(model).__name__)
    classifiers = as_names(cfg.get('classifier')) or ('fc',)
    weight = state_dict.get(f'{classifiers[0]}.weight')
    if weight is not None:
        cfg['num_classes'] = weight.shape[0]
    if model.num_classes and not features_only and (weight is None or weight.shape[0] != model.num_classes):
        has = 'no classifier' if weight is None else f'a classifier of {weight.shape[0]} classes'
        _logger.warning(
            f'The checkpoint of {name} has {has} and the model has {model.num_classes}: '
            'the classifier stays random and must be trained.')

    adapted = {f'{n}.weight' for n in as_names(cfg.get('first_conv'))}  # by timm, to the input channels
    own = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(tuple(f'{c}.' for c in classifiers))}
    missing = [k for k in own if k not in state_dict]
    if len(missing) > len(own) // 2:
        raise UserError(
            f'this is no checkpoint of {name}: {len(missing)} of its {len(own)} tensors are missing. Weights of one '
            "network go into backbone_kwargs={'pretrained_cfg_overlay': {'file': ...}}.")
    unlike = missing or [k for k, shape in own.items() if k not in adapted and state_dict[k].shape != shape]
    if unlike:
        k = unlike[0]
        has = f'no {k}' if missing else f'{k} of shape {tuple(state_dict[k].shape)}, not {tuple(own[k])}'
        raise UserError(
            f'this checkpoint does not fit {name}: it has {has}; build the model with the arguments that it was '
            'trained with.')
    return state_dict
