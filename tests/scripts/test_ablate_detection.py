"""An ablation changes what a variant names and compares any figure of its runs, once trained."""

import json

import pytest

from common.io.errors import UserError
from configs.detection import long_tail_lite0, quickstart, weak_lite0
from detection.settings import read_run
from scripts.bench.ablate_detection import run_config, score
from tests.commands import run

TREE = "OpenImagesDetectionChallenge_PerformanceByCategory/AP@0.5IOU/Tree"


@pytest.mark.parametrize(
    ("variant", "kind", "stages"),
    [
        ("sibling", "two_fc", 1),
        ("uniform", "two_fc", 1),
        ("dh", "decoupling", 1),
        ("cascade4", "two_fc", 4),
    ],
)
def test_a_variant_changes_the_heads_of_a_config(variant, kind, stages):
    config = run_config(quickstart.get_config(), variant, seed=2)
    assert config.model.box_head.kind == kind and len(config.model.stages.iou) == stages
    assert config.seed == 2
    assert config.optimizer.to_dict() == quickstart.get_config().optimizer.to_dict()


@pytest.mark.parametrize(
    ("variant", "classifier", "sampler"),
    [("ce", "softmax", "uniform"), ("eql", "eql", "uniform"), ("rfs", "softmax", "repeat_factor")],
)
def test_a_variant_changes_classifier_and_sampler(variant, classifier, sampler):
    config = run_config(long_tail_lite0.get_config(), variant, seed=1)
    assert config.model.box_head.classifier.kind == classifier
    assert config.data.sampler == sampler


@pytest.mark.parametrize(
    ("variant", "splits", "epochs", "kind"),
    [
        ("half", ["boxes"], 12, "none"),
        ("half_long", ["boxes"], 24, "none"),
        ("half_weak", ["boxes", "labels"], 12, "wsddn"),
        ("all", ["train"], 6, "none"),
    ],
)
def test_a_variant_changes_what_supervises(variant, splits, epochs, kind):
    config = run_config(weak_lite0.get_config(), variant, seed=0)
    assert [source["split"] for source in config.data.sources] == splits
    assert config.optimizer.num_epochs == epochs and config.model.weak.kind == kind
    assert config.optimizer.decay_epochs[0] == pytest.approx(epochs * 10 / 12)
    read_run(config)
    short = run_config(weak_lite0.get_config(), variant, seed=0, epochs=3)
    assert short.optimizer.num_epochs == epochs / 4 and short.model.weak.mining.start_steps == 125


def test_a_config_without_image_level_labels_has_no_weak_variant():
    with pytest.raises(UserError, match="quickstart has no steps of image-level labels"):
        run_config(quickstart.get_config(), "half_weak", seed=0)


def test_epochs_stretch_the_whole_schedule():
    optimizer = run_config(quickstart.get_config(), "dh", seed=0, epochs=11).optimizer
    assert (optimizer.num_epochs, optimizer.warmup_steps) == (11, 15)
    assert optimizer.decay_epochs == (8.5, 10) and optimizer.warmup_epochs == 0.5


@pytest.fixture
def finished(tmp_path):
    for name, value in {"sibling_0": 0.4, "sibling_1": 0.5, "dh_0": 0.5, "dh_1": 0.6}.items():
        folder = tmp_path / name / "evaluation" / "220"
        folder.mkdir(parents=True)
        (folder / "validation_metrics.json").write_text(json.dumps({TREE: value, "AP": value / 2}))
    return tmp_path


def test_finished_runs_are_compared_by_any_of_their_figures(finished):
    output = run(
        "scripts.bench.ablate_detection",
        f"--workdir={finished}",
        f"--metric={TREE},AP",
        "--config=configs/detection/quickstart.py",
        "--variants=sibling,dh",
        "--seeds=2",
    )
    assert "| sibling | 45.00 | 40.00 to 50.00 | +0.00 |" in output
    assert "| sibling | 22.50 | 20.00 to 25.00 | +0.00 |" in output
    assert "| dh | 55.00 | 50.00 to 60.00 | +10.00 |" in (finished / "table.md").read_text()


def test_a_figure_that_a_run_lacks_is_named(finished):
    with pytest.raises(UserError, match="validation_metrics.json: found no 'APr', expected a name"):
        score(quickstart.get_config(), finished / "dh_0", ["AP", "APr"])
