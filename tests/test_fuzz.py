"""Readers of other people's files under mutated input: read, or refused in one line."""

import os
import subprocess
import sys

import pytest

from tests.fuzz_readers import READERS

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0.7"))
SEED = os.environ.get("FUZZ_SEED", "0")
GROUPS = 3  # readers share a process, since imports take longer than reading


@pytest.mark.parametrize("group", range(GROUPS))
def test_mutated_inputs_are_read_or_refused_in_one_line(group):
    names = list(READERS)[group::GROUPS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", ",".join(names), str(SECONDS), SEED],
        capture_output=True,
        text=True,
        check=False,
        timeout=120 + 3 * SECONDS * len(names),
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
