"""Four CPU devices for every test, so that sharding is tested on any machine."""

import os
import shutil
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
# torch imports triton where it is installed, and triton crashes in a process that has TensorFlow.
# The comparisons run on CPUs, which do not need it: for this process it is not installed.
sys.modules["triton"] = None


def pytest_addoption(parser):
    parser.addoption(
        "--all_pods",
        action="store_true",
        help="compile every configuration for the TPU slices, minutes each, not only the quickest",
    )


def pytest_configure(config):
    """All workers and the commands that they start share what one of them compiled."""
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a developer's own outlives the session
        folder = tempfile.TemporaryDirectory(prefix="compiled-programs-")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name


@pytest.fixture(scope="module", autouse=True)
def leave_little(request, tmp_path_factory):
    """Frees programs and folders of a file's tests, which make 6 GiB of memory and more on disk.

    Folders stay where a test of the file failed.
    """
    failed, base = request.session.testsfailed, tmp_path_factory.getbasetemp()
    earlier = set(base.iterdir())
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if request.session.testsfailed == failed:
        for path in set(base.iterdir()) - earlier:
            if not path.is_symlink():  # a process that a test killed may still write
                shutil.rmtree(path, ignore_errors=True)
