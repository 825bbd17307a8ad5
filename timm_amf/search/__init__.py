"""What suits a data set: measures of how well pretrained weights fit it, and advice from them."""
from timm_amf.lazy import callable_module

callable_module(__name__)  # timm_amf.search(DIR, 'resnet50')
