"""What is computed: the networks, registered with timm on import."""
from timm.models import _registry

from .amf import AMF, MultiTune
from .blocks import list_blocks
from .decathlon import DecathlonResNet, convert_adapter_keys
from .method import Method, PlainMethod, RunSettings, method_of
from .policy import PolicyNetwork
from .records import Record
from .routing import routing_error
from .spottune import SpotTune
from .tags import FINE_TUNED

# A tag that is not published is one to train, not one that `timm.list_pretrained` may promise.
_registry._model_has_pretrained.difference_update(name for name, tuned in FINE_TUNED.items() if not tuned.published)

__all__ = [
    'AMF', 'DecathlonResNet', 'Method', 'MultiTune', 'PlainMethod', 'PolicyNetwork', 'Record', 'RunSettings',
    'SpotTune', 'convert_adapter_keys', 'list_blocks', 'method_of', 'routing_error',
]
