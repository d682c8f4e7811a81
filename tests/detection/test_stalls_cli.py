"""A photo whose file system does not answer ends an export and an evaluation, which say so."""

import pytest

from common.data.dataset import Dataset
from tests import tiny
from tests.commands import ROOT, SECONDS, start
from tests.untrained import write_run

pytestmark = pytest.mark.slow
# Python imports it before a command.
HANGS = """
import builtins, time

def hanging(file, *arguments, really=open, **options):
    if str(file).endswith("photo011.png"):
        time.sleep(1000)
    return really(file, *arguments, **options)

builtins.open = hanging
"""


@pytest.mark.parametrize("module", ["detection.export", "detection.evaluate"])
def test_a_photo_that_never_comes_ends_the_command(tmp_path, module):
    dataset = Dataset.open(tiny.write_dataset(tmp_path / "set"))
    workdir = write_run(tmp_path / "run", tiny.get_config(), dataset)
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    output = [f"--output={tmp_path / 'x.parquet'}"] if module == "detection.export" else []
    process = start(
        module,
        f"--workdir={workdir}",
        f"--config.data.dir={dataset.directory}",
        "--split=validation",
        "--config.log.stall_seconds=6",
        *output,
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, said
    assert "error: waiting for input: no step finished for" in said, said
