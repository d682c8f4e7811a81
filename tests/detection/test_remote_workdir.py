"""Work directories and tables at gs:// addresses, as the README's recipe for pods has them."""

import json

import jax
from etils import epath

from common.data.dataset import Dataset
from common.tables import read_detections
from common.training import distributed
from common.training.checkpoint import Checkpoints
from common.training.workdir import MetricsLog, keep_classes, prepare_workdir, read_config
from detection.evaluate import evaluate_variables
from tests import tiny
from tests.detection.test_test_time import BrightArea
from tests.remote import use_fake_store

RUN = epath.Path("gs://bucket/run")


def test_evaluation_writes_its_table_and_figures_there(monkeypatch, tmp_path):
    store = tmp_path / "store"
    use_fake_store(monkeypatch, store)
    dataset = Dataset.open(tiny.write_dataset(tmp_path / "tiny"))
    settings = tiny.settings()
    results = evaluate_variables(
        settings,
        BrightArea(settings.model),
        dataset,
        distributed.make_mesh(jax.devices()[:1]),
        {},
        7,
        RUN / "evaluation" / "7",
        say=lambda *_, **__: None,
    )
    folder = store / "bucket" / "run" / "evaluation" / "7"
    assert sorted(file.name for file in folder.iterdir()) == [
        "validation.parquet",
        "validation_metrics.json",
    ]
    metrics = json.loads((folder / "validation_metrics.json").read_text())
    assert results and results.items() <= metrics.items()
    table = read_detections(RUN / "evaluation" / "7" / "validation.parquet")
    assert len(table.image_ids) == 3 and table.metadata["step"] == 7


def test_checkpoints_are_looked_for_there(monkeypatch, tmp_path):
    """Their arrays are written and read by tensorstore, which has no stand-in for a store."""
    use_fake_store(monkeypatch, tmp_path)
    folder = tmp_path / "bucket" / "run" / "checkpoints"
    for step in (2, 10):
        (folder / f"{step}").mkdir(parents=True)
        (folder / f"{step}" / "commit_success.txt").touch()
    (folder / "12").mkdir()  # half-written
    checkpoints = Checkpoints(RUN / "checkpoints")
    assert str(checkpoints.directory) == "gs://bucket/run/checkpoints"
    assert checkpoints.all_steps() == [2, 10] and checkpoints.choose_step(None) == 10


def test_config_and_metrics_of_a_run_are_kept_there(monkeypatch, tmp_path):
    use_fake_store(monkeypatch, tmp_path)
    config = tiny.settings().to_dict()
    workdir = prepare_workdir("gs://bucket/run", config)
    assert read_config(workdir)["data"]["canvas"] == [64, 64]
    assert prepare_workdir(RUN, config) == workdir
    dataset = Dataset.open(tiny.write_dataset(tmp_path / "tiny"))
    for _ in range(2):  # the second start finds the classes of the first
        keep_classes(workdir, dataset)
    assert (tmp_path / "bucket" / "run" / "classes.csv").exists()
    for start_step, steps in ((0, (1, 2, 3)), (2, (3,))):  # killed after step 3, saved at step 2
        log = MetricsLog(workdir, start_step)
        for step in steps:
            log.write(step, {"loss": step / (1 + start_step)})
        log.close()
    lines = map(json.loads, (tmp_path / "bucket/run/metrics.jsonl").read_text().splitlines())
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 1.0)]
