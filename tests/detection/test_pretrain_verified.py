"""Pre-training on verified image-level labels: batches, losses, the metric, and the command."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from common.data.dataset import ABSENT, PRESENT, DatasetWriter
from common.data.labelled_batches import train_batches
from common.data.labelled_images import open_verified
from common.data.settings import LabelledDataSettings
from common.io.errors import UserError
from common.io.settings import read_settings
from common.metrics.ranking import average_precision, class_average_precisions
from configs.pretrain import resnet50
from detection.pretrain import build_model, without_photos
from detection.settings import read_pretrain
from tests import tiny
from tests.commands import ROOT, run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    # With this seed each class is on some of the validation photos and absent from others.
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "tiny", num_images=24, seed=4)


def data_config(**changes) -> LabelledDataSettings:
    config = resnet50.get_config().data
    config.update(batch_size=6, image_size=32, num_threads=2, **changes)
    return read_settings(LabelledDataSettings, config, "config.data")


def test_batches_say_what_was_verified_and_show_classes_equally_often(dataset):
    images = open_verified(str(dataset), "train")
    data = data_config(dataset=str(dataset), sampler="class_aware")
    batches = list(train_batches(images, data, seed=1, start_step=0, num_steps=8))
    for batch in batches:
        assert batch["labels"].shape == (6, 3) and batch["labels"].dtype == np.int8
        for index, labels in zip(batch["image_index"], batch["labels"], strict=True):
            classes, states = images.source.dataset.image_labels(int(images.source.images[index]))
            expected = {PRESENT: 1, ABSENT: -1}
            found = dict(zip(classes.tolist(), [expected[s] for s in states.tolist()], strict=True))
            assert labels.tolist() == [found[c] for c in range(3)]
        assert (np.sum(batch["labels"] > 0, axis=0) >= 2).all()  # six slots, three classes
    (again,) = train_batches(images, data, seed=1, start_step=5, num_steps=1)
    for name, value in again.items():
        np.testing.assert_array_equal(value, batches[5][name])
    halves = [
        next(train_batches(images, data, seed=1, start_step=5, num_steps=1, **hosts))
        for hosts in (dict(process_index=p, process_count=2) for p in (0, 1))
    ]
    for name, value in again.items():
        np.testing.assert_array_equal(value, np.concatenate([half[name] for half in halves]))


def test_unknown_classes_and_padding_have_no_loss():
    config = resnet50.get_config("resnet10")
    config.model.update(norm="group", label_smoothing=0.0, dtype="float32")
    model = build_model(read_pretrain(config).model, 3).clone(axis_name=None)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 255, (3, 32, 32, 3)).astype(np.uint8),
        "labels": np.int8([[1, -1, 0], [0, 0, 1], [1, 1, 1]]),
        "image_valid": np.array([True, True, False]),
    }
    variables = jax.jit(lambda: model.init(jax.random.key(0), batch, train=True))()
    loss, logits = jax.jit(
        lambda v: (
            model.apply(v, batch, train=True)["losses"]["classification"],
            model.apply(v, batch["image"], False, method="logits"),
        )
    )(variables)
    z = np.asarray(logits, np.float64)
    terms = [np.log1p(np.exp(-z[0, 0])), np.log1p(np.exp(z[0, 1])), np.log1p(np.exp(-z[1, 2]))]
    np.testing.assert_allclose(loss, sum(terms) / 2, rtol=1e-5)
    scores = model.apply(variables, batch, train=False)["scores"]
    np.testing.assert_allclose(scores, jax.nn.sigmoid(jnp.asarray(logits)), rtol=1e-5)


def test_average_precision_is_that_of_the_twin():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, present = rng.integers(0, 6, 15) / 6, rng.random(15) < 0.4
        precisions = [np.mean(present[scores >= score]) for score in scores[present]]
        expected = np.mean(precisions) if precisions else np.nan
        np.testing.assert_allclose(average_precision(scores, present), expected)
    labels = np.int8([[1, 0, 1], [-1, 0, 1], [0, -1, 0]])
    found = class_average_precisions(np.array([[0.2, 1, 1], [0.9, 1, 0], [0.95, 1, 1]]), labels)
    assert found[0] == 0.5  # the third photo's first class is unknown
    assert np.isnan(found[1:]).all()  # no photo shows the second, none lacks the third


def test_classes_without_photos_are_named_and_sets_without_labels_refused(tmp_path):
    with DatasetWriter(tmp_path / "x", "x", ["a", "b"], ["a", "b"], None) as writer:
        writer.add_image("1", "1.jpg", (4, 4), label_classes=[0, 1], label_confidences=[1, 0])
        writer.add_image("2", "2.jpg", (4, 4))
        writer.add_split("train", [0, 1])
        writer.add_split("empty", [1])
    images = open_verified(str(tmp_path / "x"), "train")
    assert len(images) == 1
    assert without_photos(images) == "1 classes have training photos, none have b"
    with pytest.raises(UserError, match="split 'empty' has no photo with an image-level label"):
        open_verified(str(tmp_path / "x"), "empty")
    with DatasetWriter(tmp_path / "y", "y", ["a"], ["a"], None) as writer:
        writer.add_image("1", "1.jpg", (4, 4), label_classes=[0], label_confidences=[ABSENT])
        writer.add_split("train", [0])
    images = open_verified(str(tmp_path / "y"), "train")
    data = data_config(dataset="y", sampler="class_aware")
    with pytest.raises(UserError, match="none shows a class, sampler 'class_aware'"):
        train_batches(images, data, seed=0, start_step=0, num_steps=1)
    with pytest.raises(UserError, match="config.data.dataset: found 'x', expected ''"):
        data_config(dataset="x", dir="y")
    with pytest.raises(UserError, match="config.data.sampler: found 'class_aware'"):
        data_config(tfds="x", sampler="class_aware")


@pytest.mark.parametrize("exhaustive", [True, False])
def test_boxes_alone_say_what_is_absent_only_where_all_are_there(tmp_path, exhaustive):
    """Otherwise "present" would be right everywhere."""
    names, box = ["a", "b"], np.array([[0.1, 0.1, 0.5, 0.5]])
    extra = {"exhaustive": exhaustive}
    with DatasetWriter(tmp_path / "x", "x", names, names, None, extra=extra) as writer:
        writer.add_image("1", "1.jpg", (4, 4), box, [1])
        writer.add_image("2", "2.jpg", (4, 4))
        writer.add_image("3", "3.jpg", (4, 4), np.tile(box, (2, 1)), [0, 1])
        writer.add_split("train", [0, 1, 2])
        writer.add_split("all", [2])
    for split in ("all",) if exhaustive else ("all", "train"):
        message = f"nothing says of a photo of split '{split}' that a class is absent"
        with pytest.raises(UserError, match=message):
            open_verified(str(tmp_path / "x"), split)
    if exhaustive:
        images = open_verified(str(tmp_path / "x"), "train")
        labels = [images.labels.of_image(images.source, i).tolist() for i in range(3)]
        assert len(images) == 3 and labels == [[-1, 1], [-1, -1], [1, 1]]


@pytest.mark.slow
def test_command_reports_each_class_resumes_and_writes_weights(dataset, tmp_path):
    flags = [
        f"--config={ROOT / 'configs/pretrain/resnet50.py'}:resnet18",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.dataset={dataset}",
        "--config.data.sampler=class_aware",
        "--config.data.batch_size=6",
        "--config.data.image_size=64",
        "--config.data.crop_area=(0.9, 1.0)",
        "--config.data.eval_crop=1.0",
        "--config.optimizer.num_epochs=6.0",
        "--config.optimizer.warmup_epochs=1.0",
        "--config.optimizer.learning_rate_per_image=0.002",
        "--config.optimizer.clip_norm=5.0",
        "--config.evaluation.batch_size=4",
        "--config.evaluation.every_epochs=0",
        "--config.log.every_steps=1",
        "--config.model.dtype=float32",
        "--config.model.norm=group",
        "--config.checkpoint.every_steps=9",
    ]
    done = run("detection.pretrain", *flags)
    assert "labels: 3 classes have training photos\n" in done
    figure = done.split("mAP ")[1].split()[0]
    assert 0.3 < float(figure) <= 1.0 and "of 3 classes on 6 images" in done
    logged = (tmp_path / "run/metrics.jsonl").read_text()
    assert all(f"evaluation/AP/{name}" in logged for name in ("red", "green", "blue"))
    weights = load_file(tmp_path / "run/backbone.safetensors")

    (tmp_path / "run/checkpoints/18").rename(tmp_path / "lost")
    again = run("detection.pretrain", *flags)
    assert "resuming at step 9" in again and again.split("mAP ")[1].split()[0] == figure
    for name, value in load_file(tmp_path / "run/backbone.safetensors").items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
