"""Freed memory stays with the process, and what was counted is freed."""
import subprocess
import sys
import weakref

import pytest
import torch

from timm_amf.engine.memory import saved_bytes

# Page faults of twenty allocations of 64 MB, each freed before the next, after one that is not counted.
SCRIPT = '''
import resource, torch
from timm_amf.engine.memory import keep_freed_memory

def faults():
    torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
'''


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='of glibc')
def test_freed_memory_is_used_again():
    output = subprocess.run([sys.executable, '-c', SCRIPT], check=True, capture_output=True, text=True).stdout
    before, able, after = output.split()
    if able == 'False':
        pytest.skip('the C library is not glibc')
    # A page is 4 KB at least and, with huge pages, 2 MB.
    assert int(before) >= 20 * 32
    assert int(after) < int(before) / 20


def test_what_was_counted_is_freed():
    """A search counts for each candidate. The output of `relu` is kept by its own node, which must not keep itself."""
    x = torch.ones(3)
    weight = torch.ones(3, requires_grad=True)
    kept = weakref.ref(x)
    assert saved_bytes(lambda x=x: torch.relu(x * weight)) == 24
    del x
    assert kept() is None
