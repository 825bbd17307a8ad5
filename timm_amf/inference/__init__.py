"""Asking trained models: `timm-amf evaluate` and `timm-amf predict`."""
