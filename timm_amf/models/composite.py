"""Building a model of several networks through `build_model_with_cfg`, with weights from its parts or of its own."""
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Optional, Union

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ..errors import UserError
from .parts import Part, as_pair, part_cfg
from .sources import as_names, check_source, loading
from .tags import fine_tuned_cfgs

__all__ = [
    'build_composite', 'checkpoint_within', 'composite_cfg', 'joint_input_cfg', 'register_variant', 'resize_networks',
    'variant_cfgs',
]

_logger = logging.getLogger(__name__)

# The tag whose weights are those of the parts, each from its own source. Other tags are checkpoints of the whole model
# (see `tags`).
PARTS_TAG = 'in1k'

# What the composite takes over from the backbone that its images are prepared for.
_INPUT_KEYS = (
    'input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation', 'crop_pct', 'test_crop_pct',
    'crop_mode', 'mean', 'std', 'license',
)


def register_variant(module: str, name: str, description: str, create: Callable[..., nn.Module]) -> None:
    """Register `create(name, pretrained, **kwargs)` with timm, as an entry point in the module of its cfgs."""
    def entry_point(pretrained: bool = False, **kwargs) -> nn.Module:
        return create(name, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = description
    setattr(sys.modules[module], name, register_model(entry_point))


def variant_cfgs(variants: Iterable[str], cfg_of: Callable[[str, Mapping], dict[str, Any]]) -> dict[str, Any]:
    """The `default_cfgs` of some composites: the weights of their parts, and their fine-tuned tags.

    Args:
        variants: Registered names.
        cfg_of: From a registered name and the arguments of a tag to the `pretrained_cfg` of that composite.
    """
    tuned = dict(fine_tuned_cfgs(variants, cfg_of))
    # Last, so that it is the default, also where the parts have no weights.
    return generate_default_cfgs({**tuned, **{f'{name}.{PARTS_TAG}*': cfg_of(name, {}) for name in variants}})


def joint_input_cfg(backbones: Sequence[Part]) -> dict[str, Any]:
    """How images are prepared for all backbones together.

    As for the first backbone; its size gives way to the first backbone of a fixed input size.
    """
    cfgs = [part_cfg(p) for p in backbones]
    cfg = {k: cfgs[0][k] for k in _INPUT_KEYS if k in cfgs[0]}
    fixed = next((c for c in cfgs if c.get('fixed_input_size')), None)
    if fixed is not None and fixed is not cfgs[0]:
        for key in ('input_size', 'test_input_size', 'min_input_size', 'fixed_input_size'):
            cfg.pop(key, None)
            if key in fixed:
                cfg[key] = fixed[key]
    return cfg


def composite_cfg(parts: dict[str, Part], backbones: Sequence[str], **overrides) -> dict[str, Any]:
    """The `pretrained_cfg` of a composite whose weights are those of its parts.

    Args:
        parts: Module path within the composite -> part.
        backbones: Paths of those that images are prepared for; the first also lends its Hub id, so that timm lists the
            composite among the pretrained models.
        **overrides: Entries that replace the derived ones.
    """
    cfgs = {path: part_cfg(part) for path, part in parts.items()}
    cfg = joint_input_cfg([parts[path] for path in backbones])
    cfg.update(
        hf_hub_id=cfgs[backbones[0]].get('hf_hub_id'),
        num_classes=1000,
        first_conv=tuple(f'{path}.{n}' for path, c in cfgs.items() for n in as_names(c.get('first_conv'))) or None,
        classifier='fc',
        tag=PARTS_TAG,
    )
    return {**cfg, **overrides}


def resize_networks(
        model: nn.Module,
        parts: Iterable[Part],
        img_size: Union[int, tuple[int, int]],
) -> tuple[int, int]:
    """Resize the networks of a composite whose input size is fixed, except a policy that resizes its own input.

    Args:
        model: The composite.
        parts: Those of its networks that are built again from their arguments; changed in place.
        img_size: In pixels, (H, W) or a side; the result is (H, W).
    """
    size = as_pair(img_size)
    policy = model.policy
    for net in model.networks():
        resized = policy is None or net is not policy.net or policy.input_size is None
        if resized and hasattr(net, 'set_input_size'):
            net.set_input_size(img_size=size)
    for part in parts:
        if 'img_size' in part.kwargs:
            part.kwargs['img_size'] = size
    update_model_input_size(model, size)
    return size


def checkpoint_within(net: nn.Module, enable: bool) -> bool:
    """Switch a network's own gradient checkpointing; whether it has any."""
    try:
        net.set_grad_checkpointing(enable)
    except (AssertionError, AttributeError, NotImplementedError):
        return False
    return True


def _of_parts(cfg: dict[str, Any], parts_cfg: dict[str, Any], registered: Optional[str]) -> bool:
    """Whether a resolved `pretrained_cfg` means the weights of the parts, not a checkpoint of the composite."""
    if cfg.get('source') in ('hf-hub', 'local-dir') or cfg.get('file') or cfg.get('state_dict') or cfg.get('url'):
        return False
    return cfg.get('hf_hub_id') in (None, parts_cfg.get('hf_hub_id'), registered)


def build_composite(
        model_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool,
        parts_cfg: dict[str, Any],
        num_levels: int,
        pretrained_cfg=None,
        pretrained_cfg_overlay: Optional[dict[str, Any]] = None,
        features_only: bool = False,
        cache_dir=None,
        **kwargs,
) -> nn.Module:
    """`build_model_with_cfg` for composites.

    With `pretrained`, the tag of the parts makes `model_cls` load each network's own weights (`pretrained_parts=True`);
    any other source (another tag, a Hub id, a local folder, `pretrained_cfg_overlay=dict(file=...)`) is a checkpoint of
    the whole model, and then no part is downloaded.

    Args:
        model_cls: Called with the keyword arguments, `mean`, `std`, `pretrained_parts` and `cache_dir`.
        variant: Registered name.
        pretrained: Load weights.
        parts_cfg: From `composite_cfg`.
        num_levels: Levels of its `feature_info`.
        pretrained_cfg: Tag or cfg, as `timm.create_model` passes it.
        pretrained_cfg_overlay: Entries that replace those of the cfg.
        features_only: As in timm.
        cache_dir: As in timm.
        **kwargs: To `model_cls` and timm's builder.
    """
    registered = resolve_pretrained_cfg(variant, pretrained_cfg if isinstance(pretrained_cfg, str) else None)
    named = registered.tag not in (PARTS_TAG, None)
    if not pretrained_cfg or isinstance(pretrained_cfg, str):
        own = {k: v for k, v in registered.to_dict().items() if v is not None} if named else {}
        pretrained_cfg = {**parts_cfg, **own, 'architecture': variant}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    of_parts = _of_parts(cfg, parts_cfg, None if named else registered.hf_hub_id)
    model_cls = partial(
        model_cls,
        mean=cfg['mean'],
        std=cfg['std'],
        pretrained_parts=pretrained and of_parts,
        cache_dir=cache_dir,
    )
    own = pretrained and not of_parts
    if own:
        check_source(variant, cfg, cache_dir)
    with loading(variant, cfg) if own else nullcontext():
        return build_model_with_cfg(
            model_cls,
            variant,
            own,
            pretrained_cfg=cfg,
            pretrained_filter_fn=partial(_check_checkpoint, features_only=features_only),
            # All levels of a pyramid; the last three where there are many of few reductions, as timm has it for a ViT.
            feature_cfg=dict(feature_cls='getter', out_indices=tuple(range(num_levels)) if num_levels <= 5 else 3),
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
            'the classifier stays random and must be trained.'
        )

    adapted = {f'{n}.weight' for n in as_names(cfg.get('first_conv'))}  # by timm, to the input channels
    own = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(tuple(f'{c}.' for c in classifiers))}
    missing = [k for k in own if k not in state_dict]
    if len(missing) > len(own) // 2:
        raise UserError(
            f'this is no checkpoint of {name}: {len(missing)} of its {len(own)} tensors are missing. Weights of one '
            "network go into backbone_kwargs={'pretrained_cfg_overlay': {'file': ...}}."
        )
    unlike = missing or [k for k, shape in own.items() if k not in adapted and state_dict[k].shape != shape]
    if unlike:
        k = unlike[0]
        has = f'no {k}' if missing else f'{k} of shape {tuple(state_dict[k].shape)}, not {tuple(own[k])}'
        raise UserError(
            f'this checkpoint does not fit {name}: it has {has}; build the model with the arguments that it was '
            'trained with.'
        )
    return state_dict
