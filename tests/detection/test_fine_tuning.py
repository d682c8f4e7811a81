"""A trained detector starts another with other classes: what fits is taken, the rest is named."""

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from common.io.errors import UserError
from common.nn.weights.fine_tuning import (
    TrainedModel,
    fine_tuned,
    read_trained_model,
    save_trained_model,
)
from detection.fine_tuning import trained_in
from tests import tiny
from tests.commands import ROOT, refusal, run
from tests.remote import use_fake_store

OLD, NEW = ("red", "green", "blue"), ("violet", "blue", "red")


def head(num_classes, value, class_agnostic=False, leading=1):
    boxes = 1 if class_agnostic else num_classes
    shapes = {
        "box_head/fc1/kernel": (5, 4),
        "box_head/classifier/kernel": (4, num_classes + leading),
        "box_head/classifier/bias": (num_classes + leading,),
        "box_head/regressor/kernel": (4, 4 * boxes),
        "box_head/regressor/bias": (4 * boxes,),
        "mask_head/predictor/kernel": (4, boxes),
        "mask_head/predictor/bias": (boxes,),
    }
    return {
        f"params/{name}": (value + np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)
        for name, shape in shapes.items()
    }


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def test_rows_of_classes_follow_their_labels():
    old, new = head(3, 1000), head(3, 0)
    variables, report = fine_tuned(nested(new), NEW, TrainedModel("x", OLD, old))
    layer = variables["params"]["box_head"]
    np.testing.assert_array_equal(layer["fc1"]["kernel"], old["params/box_head/fc1/kernel"])
    for ours, theirs in ((0, 0), (2, 3), (3, 1)):  # background, blue, red
        for name in ("kernel", "bias"):
            np.testing.assert_array_equal(
                layer["classifier"][name][..., ours],
                old[f"params/box_head/classifier/{name}"][..., theirs],
            )
    masks = variables["params"]["mask_head"]["predictor"]
    for ours, theirs in ((1, 2), (2, 0)):
        np.testing.assert_array_equal(
            masks["kernel"][:, ours], old["params/mask_head/predictor/kernel"][:, theirs]
        )
        np.testing.assert_array_equal(
            layer["regressor"]["kernel"][:, 4 * ours : 4 * ours + 4],
            old["params/box_head/regressor/kernel"][:, 4 * theirs : 4 * theirs + 4],
        )
    np.testing.assert_array_equal(
        layer["regressor"]["bias"][:4], new["params/box_head/regressor/bias"][:4]
    )
    assert report.new == ["violet"] and report.given_up == ["green"]
    assert report.shared == ["blue", "red"]


def test_class_layers_are_taken_from_classifiers_of_the_same_columns_only():
    """Sigmoids have no column of background, Seesaw loss has two of objects (0 and 2 leading)."""
    for leading in (0, 2):
        old, new = head(3, 1000, leading=leading), head(3, 0, leading=leading)
        variables, _ = fine_tuned(nested(new), NEW, TrainedModel("x", OLD, old))
        bias = variables["params"]["box_head"]["classifier"]["bias"]
        theirs = old["params/box_head/classifier/bias"]
        np.testing.assert_array_equal(bias[:leading], theirs[:leading])
        assert bias[leading + 1] == theirs[leading + 2]  # blue
        assert bias[leading] == leading  # violet is new
    # Three classes with background have as many columns as four without.
    new = head(4, 0, leading=0)
    variables, report = fine_tuned(
        nested(new), (*NEW, "green"), TrainedModel("x", OLD, head(3, 1000))
    )
    np.testing.assert_array_equal(
        variables["params"]["box_head"]["classifier"]["kernel"],
        new["params/box_head/classifier/kernel"],
    )
    assert any("classifier/kernel" in text for text in report.other_shape)


def test_what_does_not_fit_is_named_and_what_all_classes_share_is_taken_whole():
    old = head(3, 1000, class_agnostic=True)
    old["params/rpn/kernel"] = np.zeros(7, np.float32)
    old["params/extra"] = np.zeros(1, np.float32)
    new = head(2, 0, class_agnostic=True)
    new["params/rpn/kernel"] = np.zeros(9, np.float32)
    new["params/other"] = np.zeros(2, np.float32)
    variables, report = fine_tuned(nested(new), ("red", "x"), TrainedModel("x", OLD, old))
    np.testing.assert_array_equal(
        variables["params"]["box_head"]["regressor"]["kernel"],
        old["params/box_head/regressor/kernel"],
    )
    assert "params/mask_head/predictor/kernel" in report.taken
    text = str(report)
    assert "params/rpn/kernel (found (7,), expected (9,))" in text
    assert "params/extra" in text and "params/other" in text


def test_labels_of_another_model_and_models_without_anything_in_common_are_refused():
    with pytest.raises(UserError, match="found 2 labels, expected one for each .* of the 12 outp"):
        fine_tuned(nested(head(3, 0)), OLD, TrainedModel("x", OLD[:2], head(3, 0)))
    with pytest.raises(UserError, match="found 1 labels, expected one for each .* of the 4 outp"):
        fine_tuned(nested(head(3, 0)), OLD, TrainedModel("x", OLD[:1], head(3, 0)))
    with pytest.raises(UserError, match="'params/y', none of which fits"):
        fine_tuned(nested(head(3, 0)), OLD, TrainedModel("x", (), {"params/y": np.zeros(1)}))


@pytest.mark.parametrize("address", ["local", "gs"])
def test_weights_file_keeps_values_and_labels(tmp_path, monkeypatch, address):
    path = tmp_path / "x.safetensors"
    if address == "gs":
        use_fake_store(monkeypatch, tmp_path)
        path = "gs://bucket/x.safetensors"
    model = TrainedModel("run", list(OLD), head(3, 5))
    save_trained_model(path, model)
    found = read_trained_model(path)
    assert found.labels == list(OLD) and found.weights.keys() == model.weights.keys()
    for name, value in model.weights.items():
        np.testing.assert_array_equal(found.weights[name], value)


@pytest.mark.parametrize("labels", ["red, blue", '{"red": 1}', "[1, 2, 3]", '["a", "b", "a"]'])
def test_a_weights_file_of_other_labels_than_unique_texts_is_refused(tmp_path, labels):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_numpy.save(head(3, 5), {"labels": labels}))
    with pytest.raises(UserError, match="x.safetensors: found labels .*expected a JSON list"):
        read_trained_model(path)


def test_a_folder_with_the_name_of_a_weights_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no readable safetensors file .*directory") as error:
        read_trained_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_fine_tuning_through_the_command_line(tmp_path):
    config = f"--config={ROOT / 'tests' / 'tiny.py'}:1"
    old = tiny.write_dataset(tmp_path / "old")
    new = tiny.write_dataset(tmp_path / "new", labels=NEW, seed=1)
    run("detection.train", config, f"--config.data.dir={old}", f"--workdir={tmp_path / 'first'}")
    still = [  # a first step that changes nothing, so that its checkpoint is the start
        config,
        f"--config.data.dir={new}",
        "--config.optimizer.warmup_start=0.0",
        "--config.checkpoint.every_steps=1",
        "--config.checkpoint.keep_last=3",
    ]
    second = [*still, f"--workdir={tmp_path / 'second'}", f"--config.init_from={tmp_path}/first"]
    output = run("detection.train", *second)
    assert "1 new classes, at their random start: violet" in output
    assert "1 classes of the trained model that this run lacks: green" in output
    before, after = trained_in(tmp_path / "first"), trained_in(tmp_path / "second", step=1)
    assert after.labels == list(NEW)
    kernel = "params/box_head/classifier/kernel"
    assert not np.array_equal(after.weights[kernel][:, 1], before.weights[kernel][:, 1])
    for path, value in after.weights.items():
        layer, old_value = path.split("/")[-2], before.weights[path]
        if layer == "classifier":
            value, old_value = value[..., [0, 2, 3]], old_value[..., [0, 3, 1]]
        elif layer == "regressor":
            shape = (*value.shape[:-1], 3, 4)
            value = value.reshape(shape)[..., [1, 2], :]
            old_value = old_value.reshape(shape)[..., [2, 0], :]
        np.testing.assert_array_equal(value, old_value, err_msg=path)

    # The same command goes on from its own checkpoint, and other classes are refused there.
    assert "init_from" not in run("detection.train", *second, "--config.optimizer.num_epochs=2")
    assert "classes are none of the model's" in refusal(
        "detection.train", *second, f"--config.data.dir={old}"
    )

    # A file of the checkpoint starts the same run.
    file = tmp_path / "first.safetensors"
    run("scripts.export_weights", f"--workdir={tmp_path / 'first'}", f"--output={file}")
    run("detection.train", *still, f"--workdir={tmp_path / 'third'}", f"--config.init_from={file}")
    third = trained_in(tmp_path / "third", step=1)
    for path, value in after.weights.items():
        np.testing.assert_array_equal(third.weights[path], value, err_msg=path)
