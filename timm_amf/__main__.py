"""`python -m timm_amf`: the command `timm-amf`, where it is not installed."""
import sys

from timm_amf.cli import main

if __name__ == '__main__':
    sys.exit(main())
