"""Four CPU devices for every test, so that sharding is tested on any machine."""

import os
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
# torch imports triton where it is installed, and triton crashes in a process that has TensorFlow.
# The comparisons run on CPUs, which do not need it: for this process it is not installed.
sys.modules["triton"] = None


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """Commands that tests start inherit this: what one of them compiled the next ones read."""
    with pytest.MonkeyPatch.context() as patch:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a developer's own outlives the session
            patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        yield
