"""Several datasets in one run, on canvases of both orientations, through the command line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.data.dataset import DatasetWriter
from tests import tiny
from tests.commands import losses, refusal, run

pytestmark = pytest.mark.slow

CONFIG = """
from tests import tiny


def get_config(arg=None):
    config = tiny.get_config("2")
    config.data.dir = {run!r}
    config.data.canvas, config.data.scales = (64, 96), (48, 64)
    config.data.sources = (
        dict(dir={run!r}, share=2.0),
        dict(dir={other!r}, class_map="{class_map}:theirs:ours", others="unknown"),
    )
    return config
"""


def write_other(folder: Path) -> Path:
    """Portrait photos with a class that the run calls otherwise, and one that it has not."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    labels = ["rouge", "car"]
    with DatasetWriter(folder / "set", "other", labels, labels, None, str(folder)) as writer:
        for i in range(6):
            pixels = rng.integers(90, 130, (60, 40, 3)).astype(np.uint8)
            pixels[10:30, 5:25] = tiny.COLOURS[0]
            Image.fromarray(pixels).save(folder / f"{i}.png")
            boxes = np.array([[5 / 40, 10 / 60, 25 / 40, 30 / 60], [0.6, 0.6, 0.9, 0.9]])
            writer.add_image(f"other{i}", f"{i}.png", (60, 40), boxes, [0, 1])
        writer.add_split("train", range(6))
    (folder / "map.csv").write_text("theirs,ours\nrouge,red\n")
    return folder / "set"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    own = tiny.write_dataset(folder / "tiny")
    other = write_other(folder / "other")
    path = folder / "config.py"
    path.write_text(
        CONFIG.format(run=str(own), other=str(other), class_map=folder / "other" / "map.csv")
    )
    return path


def test_two_sources_of_different_classes_train_and_resume_bit_for_bit(config, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    output = run("detection.train", f"--config={config}", f"--workdir={whole}")
    assert "1 of its 2 classes are classes of the run, 2 of the run's are unknown" in output
    assert "  its classes in the run: rouge\n" in output
    assert "programs: one for each canvas, 64x96, 96x64" in output  # 48 x 72 is padded to it too
    command = ["detection.train", f"--config={config}", f"--workdir={halves}"]
    drops = "--config.optimizer.decay_epochs=(9,11)"  # that of the whole run
    run(*command, "--config.optimizer.num_epochs=0.75", drops)
    output = run(*command)
    assert "resuming at step 3" in output
    assert losses(halves) == losses(whole)
    assert [step for step, *_ in losses(whole)] == list(range(1, 9))  # 15 photos, 4 a step


def test_a_map_that_maps_nothing_is_refused_in_one_line(config, tmp_path):
    wrong = tmp_path / "config.py"
    wrong.write_text(config.read_text().replace(":theirs:ours", ":ours:theirs"))
    text = refusal("detection.train", f"--config={wrong}", f"--workdir={tmp_path / 'x'}")
    assert "config.data.sources[1]: no class of the source becomes one of the run" in text
