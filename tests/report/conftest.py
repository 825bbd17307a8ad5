"""The runs of the tests of evaluation, which are trained once."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / 'inference'))
