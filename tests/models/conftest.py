import pytest
import torch

import timm_amf.models  # noqa: F401  registers the models


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
