import subprocess
import sys

import pytest

# The largest block is beyond what an int counts: a training step's temporary memory often is.
PROGRAM = """
import ctypes, resource, sys
from common.io.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
for size in (100 << 20, 5 << 29):
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(size)
        ctypes.memset(block, 1, 16 << 20)
        libc.free(block)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(setting):
    """Of the first and the second use of a block, for a middle-sized and a huge one."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, setting], capture_output=True, text=True, check=True
    )
    return [int(line) for line in found.stdout.split()]


def test_freed_blocks_of_any_size_are_used_again_without_page_faults():
    kept = page_faults("keep")  # in a process of its own: this one keeps malloc's defaults
    if not kept:
        pytest.skip("this C library's malloc cannot be told to keep freed memory")
    first, again, huge_first, huge_again = kept
    assert first > 1000 and again < 100
    assert huge_again < 100 and huge_first < 2 * first
    assert page_faults("default")[3] > 1000  # what the setting is for
