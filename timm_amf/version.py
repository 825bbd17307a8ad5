__version__ = '0.1.0'
# Where to get it, as long as the package index has it not.
SOURCE = 'https://github.com/timm-amf/timm_amf'
