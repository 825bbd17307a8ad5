"""What train_amf.py makes of a file of advice."""
import sys
from pathlib import Path

from timm_amf.tuning import create_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / 'engine'))

from conftest_engine import clean, reset_accelerate, train_amf  # noqa: E402, F401  a fixture


def dry_run(path) -> list[dict]:
    """The parameter groups of `train_amf.py --config path --dry-run`."""
    groups = []

    def create(model, plan):
        optimizer = create_optimizer(model, plan)
        groups.extend(dict(group) for group in optimizer.param_groups)  # before the warm-up sets their LRs
        return optimizer

    reset_accelerate()
    original, train_amf.create_optimizer = train_amf.create_optimizer, create
    try:
        train_amf.train(['--config', str(path), '--dry-run'])
    finally:
        train_amf.create_optimizer = original
    return groups
