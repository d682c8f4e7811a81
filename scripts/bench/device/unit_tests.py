"""The quick unit tests of kernels and losses, with the accelerator as JAX's first device."""

import os
import re
import subprocess
import sys

import jax

from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes
from scripts.bench.device.worker import Case

_LIMIT = 100.0
_OPTIONS = ("-v", "-p", "no:cacheprovider", "-m", "not slow")


def run_unit_tests(report: Report, size: Sizes) -> None:
    """Those that did not end in time count as neither passed nor failed."""
    platform = jax.devices()[0].platform
    platforms = {"cpu": "cpu", "gpu": "cuda,cpu"}.get(platform, f"{platform},cpu")
    exact = {"JAX_PLATFORMS": platforms, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    tests = subprocess.Popen(
        [sys.executable, "-m", "pytest", *_OPTIONS, *size.unit_tests],
        env=os.environ | exact,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = tests.communicate(timeout=0.9 * size.patience * _LIMIT)
    except subprocess.TimeoutExpired:
        tests.kill()
        output, _ = tests.communicate()
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    failed += re.findall(r"(?:FAILED|ERROR) .*?(\S+::\S+)", output)
    passed = len(re.findall(r" PASSED|PASSED ", output))
    report.line(
        "pytest",
        passed=passed,
        failed=sorted(set(failed))[:20],
        said=output.strip().splitlines()[-1] if output.strip() else "",
        ok=tests.returncode == 0 and passed > 0,
    )


CASES = (Case("unit tests", _LIMIT, run_unit_tests),)
