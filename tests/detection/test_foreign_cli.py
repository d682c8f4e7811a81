"""A converted detector is a work directory like any other: evaluated, exported, trained on."""

import numpy as np
import pytest

from common.tables.reader import read_detections
from configs.of_workdir import get_config
from detection.fine_tuning import trained_in
from detection.foreign.conversion import convert_detector
from detection.foreign.converted_run import STEP, write_workdir
from detection.settings import read_run
from tests import tiny
from tests.commands import refusal, run
from tests.detection import foreign_models

torch = pytest.importorskip("torch", reason="optional peer")
pytest.importorskip("torchvision", reason="optional peer")

LABELS = ("red", "green", "blue")


def state_of(model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_config_classes_and_weights_are_those_of_a_run(tmp_path):
    converted = convert_detector(state_of(foreign_models.tiny_torchvision_model(3)))
    assert converted.settings.model.backbone == "resnet10"
    write_workdir(tmp_path / "converted", converted, LABELS, "x.pth")
    assert read_run(get_config(f"{tmp_path}/converted")) == converted.settings
    trained = trained_in(f"{tmp_path}/converted", STEP)
    assert trained.labels == list(LABELS)
    assert trained.weights.keys() == converted.weights.keys()
    for path, value in converted.weights.items():
        np.testing.assert_array_equal(trained.weights[path], value)


@pytest.mark.slow
def test_commands_run_it_and_trainings_start_from_it(tmp_path):
    model = foreign_models.tiny_torchvision_model(3)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "x.pth")
    (tmp_path / "classes.csv").write_text(
        "label,name\n" + "".join(f"{label},{label}\n" for label in LABELS)
    )
    converted = tmp_path / "converted"
    convert = [f"--input={tmp_path}/x.pth", "--detector", f"--output={converted}"]
    assert "expected a CSV file" in refusal("scripts.convert_weights", *convert)
    convert.append(f"--classes={tmp_path}/classes.csv")
    output = run("scripts.convert_weights", *convert)
    assert "x.pth -> torchvision: resnet10, 3 classes" in output and "missing  0" in output

    data = tiny.write_dataset(tmp_path / "data", num_images=4)
    small = ["--config.data.canvas=(64,64)", "--config.evaluation.batch_size=3"]
    flags = [f"--workdir={converted}", f"--config.data.dir={data}", *small]
    output = run("detection.evaluate", *flags, "--split=validation")
    assert "step 1  validation" in output
    table = tmp_path / "x.parquet"
    run("detection.export", *flags, "--split=train", f"--output={table}")
    found = read_detections(table)
    for i in range(3):
        photo = foreign_models.read_photo(tmp_path / "data_photos" / f"photo{i:03d}.png")
        with torch.no_grad():
            theirs = {name: x.numpy() for name, x in model([photo])[0].items()}
        rows = found.take(found.image_index == found.image_ids.index(f"photo{i:03d}"))
        assert len(rows) == len(theirs["scores"]) > 0
        np.testing.assert_allclose(rows.scores, theirs["scores"], atol=1e-4)
        labels = [rows.labels[index] for index in rows.label_index]
        assert labels == [LABELS[number - 1] for number in theirs["labels"]]
        np.testing.assert_allclose(64 * rows.boxes, theirs["boxes"], atol=1e-3)

    other = tiny.write_dataset(tmp_path / "other", num_images=4, labels=("violet", "blue", "red"))
    output = run(
        "detection.train",
        f"--config=configs/of_workdir.py:{converted}",
        f"--config.data.dir={other}",
        f"--config.init_from={converted}",
        "--config.data.batch_size=2",
        "--config.optimizer.num_steps=1",
        *small,
        f"--workdir={tmp_path}/tuned",
    )
    assert "1 new classes, at their random start: violet" in output
    assert "arrays that the trained model lacks" not in output

    back = ["--to=torchvision", f"--workdir={converted}", f"--output={tmp_path}/y.safetensors"]
    assert "3 classes" in run("scripts.convert_weights", *back)
