"""Exported programs find what the model finds, for any number of photos."""

import functools
import io
import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from common.data.model_classes import write_model_classes
from common.io.errors import Stopped, UserError
from common.masks.probability import PROBABILITY_ONE
from common.training import preemption
from common.training.checkpoint import Checkpoints
from common.training.step import variable_shapes
from common.training.workdir import prepare_workdir
from configs.detection import base
from detection import batch_fields, export_model
from detection.export_model import check_names
from detection.models.faster_rcnn import build
from detection.serving import detector_function, exported_with_weights
from detection.settings import read_run
from tests import tiny
from tests.commands import run

LABELS = ["red", "green", "blue"]


def tiny_settings():
    config = base.get_config()
    config.model.mask_head.kind = "class_specific"
    config = tiny.shrink(config)
    config.data.canvas = (32, 64)
    return read_run(config)


@pytest.fixture(scope="module")
def detector():
    """(settings, variables, what inference computes)."""
    settings = tiny_settings()
    model = build(settings.model, 3)
    shapes = variable_shapes(model, batch_fields.init_shapes(settings.data))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        """Scores that differ by more than rounding: compilers agree on their order."""
        if path[-1].key != "kernel":
            return np.full(leaf.shape, path[-1].key == "scale", np.float32)
        spread = np.prod(leaf.shape[:-1]) ** -0.5
        return rng.normal(0, spread, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return settings, variables, detector_function(model)


def photos(count, height, width):
    rng = np.random.default_rng(count)
    size = np.full((count, 2), (height, width), np.float32)
    return rng.integers(0, 255, (count, height, width, 3)).astype(np.uint8), size


def test_stablehlo_of_photos_is_the_model_bit_for_bit(detector):
    _, variables, detect = detector
    image, size = photos(2, 32, 64)
    program = exported_with_weights(detect, variables, (32, 64)).serialize()
    found = jax.export.deserialize(bytearray(program)).call(image, size)
    # Weights are constants in both: as arguments they round otherwise, in the last bit.
    expected = jax.jit(functools.partial(detect, variables))(image, size)
    assert found.keys() == expected.keys() and expected["valid"].any()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_unknown_formats_are_named():
    check_names("--formats", ["a"], ["a", "b"])
    with pytest.raises(UserError, match="--formats: found 'c', expected some of a, b"):
        check_names("--formats", ["a", "c"], ["a", "b"])
    with pytest.raises(UserError, match="--formats: found none, expected some of a, b"):
        check_names("--formats", [], ["a", "b"])


def test_a_signal_stops_between_two_programs(tmp_path, monkeypatch):
    made, points = [], preemption.StopPoints()
    monkeypatch.setattr(preemption, "_points", points)

    def export(detect, variables, shape, platforms):
        made.append(shape)
        points.ask("SIGTERM at host")
        return types.SimpleNamespace(serialize=lambda: b"program")

    monkeypatch.setattr(export_model, "exported_with_weights", export)
    monkeypatch.setattr(export_model, "detector_function", lambda model: model)
    detector = types.SimpleNamespace(model=None, variables={})
    canvases = [((32, 64), (32, 64)), ((64, 32), (64, 32))]
    with pytest.raises(Stopped):
        export_model.write_programs(detector, tmp_path, canvases, ["stablehlo"], ["cpu"])
    assert made == [(32, 64)]


@pytest.mark.slow
def test_the_command_writes_both_formats(detector, tmp_path):
    settings, variables, _ = detector
    workdir, output = tmp_path / "run", tmp_path / "served"
    prepare_workdir(workdir, settings.to_dict())
    write_model_classes(workdir, LABELS, LABELS, {"LabelName": "root"})
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(7, {"step": np.int32(7), **variables}, {}, wait=True)
    flags = [f"--workdir={workdir}", f"--output={output}", "--formats=stablehlo,saved_model"]
    assert "step 7, 3 classes, canvas 32x64) as stablehlo" in run("detection.export_model", *flags)
    about = json.loads((output / "detector.json").read_text())
    assert about["labels"] == LABELS and "masks" in about["outputs"]
    assert [c["fit_into"] for c in about["canvases"]] == [[32, 64], [64, 32]]
    assert (output / "stablehlo" / "32x64.bin").exists()
    program = (output / "stablehlo" / "64x32.bin").read_bytes()
    loaded = jax.export.deserialize(bytearray(program))
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    image, size = photos(1, 64, 32)
    expected = jax.tree.map(np.asarray, loaded.call(image, size))
    assert expected["valid"].any()

    tf = pytest.importorskip("tensorflow")
    model = tf.saved_model.load(str(output / "saved_model"))
    assert set(model.signatures) == {"serving_default", "canvas_32x64", "canvas_64x32"}
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, "PNG")  # on its canvas as it is
    found = model.signatures["serving_default"](photo=tf.constant(file.getvalue()))
    rows = expected["valid"][0]
    real = {key: value[0][rows] for key, value in expected.items() if key != "valid"}
    real["boxes"] = real["boxes"] / [32, 64, 32, 64]
    real["masks"] = real["masks"] / PROBABILITY_ONE
    labels = [label.decode() for label in found.pop("labels").numpy()]
    assert labels == [LABELS[number] for number in real["classes"]]
    assert found.keys() == real.keys()
    for key, value in real.items():  # TensorFlow's XLA rounds otherwise
        np.testing.assert_allclose(found[key], value, atol=1e-4, err_msg=key)
