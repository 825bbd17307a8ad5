"""Tests run two at a time on two cores: one thread each, no cache of the user's is touched, no disk is waited for."""
import gc
import os
import tempfile

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.fsync = lambda handle: None  # what is written here need not outlive a power cut
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='timm_amf_cache_')

import torch  # noqa: E402  after the number of threads

torch.set_num_threads(1)


def pytest_collection_finish(session):
    gc.freeze()  # a collection is quick where it need not look at what was imported
