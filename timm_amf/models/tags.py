"""Fine-tuned tags: a checkpoint of a whole composite in a Hub repository of its own, and the recipe that trains it.

`amf_inception_v4x2.aircraft_dtd` is the tag `aircraft_dtd`; its repository and its recipe have the same name, behind
`OWNER` and in `hub_configs`. A tag says what the model is built with, because that is not always what the bare name is
built with. What is here of a recipe's is repeated, so that importing the package does not read its YAML files.
"""
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from timm.models import PretrainedCfg

__all__ = ['FINE_TUNED', 'OWNER', 'FineTuned', 'fine_tuned_cfgs', 'tag_arguments', 'unpublished']

# Of all repositories that tags name.
OWNER = 'timm-amf'
# Nothing else is asked for: where there is no such file, timm would go on to a pickle.
_WEIGHTS = 'model.safetensors'


@dataclass(frozen=True)
class FineTuned:
    """What a tag stands for.

    Args:
        num_classes: Classes of its data.
        license: Licence of the weights, as the Hub names it.
        model_args: Keyword arguments that the model is built with, where they are not given.
        published: Whether its repository was there when this version was released.
    """
    num_classes: int
    license: str = 'apache-2.0'
    model_args: Mapping[str, Any] = field(default_factory=dict)
    published: bool = False


# Both are of the papers' experiments: torchvision's weights, which are prepared for other crops than timm's; a first
# macro block that is neither tuned nor routed (SpotTune, section 4.1).
_TORCHVISION = {'backbone': 'resnet50.tv_in1k', 'temperature': 5.0}
_DECATHLON = {'first_block': 4, 'temperature': 5.0}
# Classes, and mean and standard deviation of each channel over train and val, as the challenge's code has them.
_DOMAINS = {
    'aircraft': (100, [0.4798, 0.5107, 0.5344], [0.2107, 0.2051, 0.2373]),
    'cifar100': (100, [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    'daimlerpedcls': (2, [0.482, 0.482, 0.482], [0.2361, 0.2361, 0.2361]),
    'dtd': (47, [0.527, 0.4703, 0.424], [0.2523, 0.2409, 0.2499]),
    'gtsrb': (43, [0.3392, 0.3118, 0.3205], [0.2756, 0.2658, 0.2709]),
    'omniglot': (1623, [0.081, 0.081, 0.081], [0.2705, 0.2705, 0.2705]),
    'svhn': (10, [0.4377, 0.4438, 0.4728], [0.198, 0.201, 0.197]),
    'ucf101': (101, [0.4995, 0.4988, 0.4998], [0.109, 0.1081, 0.1068]),
    'vgg-flowers': (102, [0.4341, 0.3831, 0.2971], [0.2851, 0.2384, 0.264]),
}


def _decathlon(classes: int, mean: list[float], std: list[float]) -> FineTuned:
    """Both networks see images normalised by their own domain, whatever they were trained with."""
    own = {'pretrained_cfg_overlay': {'mean': mean, 'std': std}}
    return FineTuned(classes, model_args={**_DECATHLON, 'backbone_kwargs': own, 'policy_kwargs': own})


# Name with tag -> what it stands for.
FINE_TUNED: dict[str, FineTuned] = {
    'amf_inception_v4x2.aircraft_dtd': FineTuned(94),
    'amf_inception_v4x2.aircraft_cars': FineTuned(122),
    'amf_inception_v4x2.cifar10': FineTuned(10),
    'amf_inception_v4x2.fashion_mnist': FineTuned(10),
    'multitune_inception_v4x2.aircraft_dtd': FineTuned(94),
    **{
        f'spottune_resnet50.{data}': FineTuned(classes, 'bsd-3-clause', _TORCHVISION)
        for data, classes in (('cub', 200), ('cars', 196), ('flowers', 102), ('wikiart', 195), ('sketches', 250))
    },
    **{f'spottune_resnet26.decathlon_{domain}': _decathlon(*about) for domain, about in _DOMAINS.items()},
}


def fine_tuned_cfgs(variants: Mapping[str, Any], cfg_of: Callable[[str, Mapping], dict]) -> Iterator[tuple[str, dict]]:
    """Name and `pretrained_cfg` of each tag of some registered models.

    Args:
        variants: Registered names.
        cfg_of: From a name and the arguments of a tag to the `pretrained_cfg`.
    """
    for name, tuned in FINE_TUNED.items():
        variant, _, tag = name.partition('.')
        if variant in variants:
            yield name, {
                **cfg_of(variant, tuned.model_args),
                'hf_hub_id': f'{OWNER}/{name}',
                'hf_hub_filename': _WEIGHTS,
                'num_classes': tuned.num_classes,
                'license': tuned.license,
                'tag': tag,
            }


def tag_arguments(variant: str, pretrained_cfg: Any) -> dict[str, Any]:
    """The keyword arguments that a tag (or the tag of a cfg) of a registered model stands for, if any."""
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = vars(pretrained_cfg)
    tag = pretrained_cfg.get('tag') if isinstance(pretrained_cfg, Mapping) else pretrained_cfg
    tuned = FINE_TUNED.get(f'{variant}.{tag}')
    return dict(tuned.model_args) if tuned else {}


def unpublished(cfg: Mapping[str, Any], why: str) -> Optional[str]:
    """What to tell somebody who wants weights that this version does not know as published; None for other weights."""
    name = f'{cfg.get("architecture")}.{cfg.get("tag")}'
    tuned = FINE_TUNED.get(name)
    if tuned is None or tuned.published or cfg.get('hf_hub_id') != f'{OWNER}/{name}':
        return None
    return (
        f"'{name}' is not published yet ({why}): train it with `timm-amf train --config {name} --data-dir DIR`, "
        f'publish it with `timm-amf publish RUN --repo-id OWNER/NAME --license {tuned.license}`, and load '
        f"'hf-hub:OWNER/NAME'."
    )
