"""The Hugging Face Hub: publishing a run with all that explains it, and loading it back without trusting it.

`publish` and `load` are also `timm_amf.publish` and `timm_amf.load`.
"""
