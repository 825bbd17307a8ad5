"""What is computed: the networks, registered with timm on import."""
from .amf import AMF, MultiTune
from .blocks import list_blocks
from .policy import PolicyNetwork
from .routing import routing_error

__all__ = ['AMF', 'MultiTune', 'PolicyNetwork', 'list_blocks', 'routing_error']
