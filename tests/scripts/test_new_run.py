"""Configs that are written for a dataset fit it, load as any config, and train."""

import numpy as np
import pytest

from common.data.dataset import Dataset
from common.io.command_line import load_config
from detection import recipe
from detection.recipe import Device, Facts
from detection.settings import read_run
from scripts import new_run
from tests import tiny, tiny_masks
from tests.commands import refusal, run

CPU, GPU = Device("cpu", "cpu", 1, 0.0), Device("gpu", "H100", 8, 80.0)


def facts(**changes) -> Facts:
    given = dict(
        directory="set",
        train_split="train",
        eval_split="validation",
        sizes=np.array([[480, 640], [640, 480], [500, 500]]),
        num_photos=1000,
        boxes_per_photo=np.array([1, 3, 12]),
        sides=np.array([0.05, 0.2, 0.5]),
        photos_of_class=np.array([400, 300, 500]),
        has_masks=False,
        metric="coco",
    )
    return Facts(**{**given, **changes})


def fields(choices) -> dict:
    return {name: value for choice in choices for name, value in choice.fields.items()}


def test_small_objects_and_long_photos_get_the_canvas_that_they_need():
    assert recipe.choose_canvas(facts(), CPU).fields["data.canvas"] == (256, 352)
    small = facts(sides=np.full(5, 0.04))
    short, long = recipe.choose_canvas(small, CPU).fields["data.canvas"]
    assert short == 384 and "16 is aimed at." in recipe.choose_canvas(small, CPU).why
    tiny_objects = recipe.choose_canvas(facts(sides=np.full(5, 0.01)), GPU)
    assert tiny_objects.fields["data.canvas"][0] == 800 and "would cost" in tiny_objects.why


def test_batch_and_schedule_follow_the_device_and_the_set():
    assert recipe.choose_batch(facts(), GPU, (800, 1344)).fields["data.batch_size"] == 80
    assert recipe.choose_batch(facts(), CPU, (256, 352)).fields["data.batch_size"] == 4
    assert recipe.choose_batch(facts(num_photos=3), CPU, (256, 352)).fields["data.batch_size"] == 3
    long = recipe.choose_schedule(facts(num_photos=100_000), GPU, 16)
    short = recipe.choose_schedule(facts(num_photos=100), CPU, 4)
    assert long.fields["optimizer.num_epochs"] == 14 and short.fields["optimizer.num_epochs"] == 35


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({}, "uniform"),
        (dict(photos_of_class=np.array([1000, 3, 0])), "class_aware"),
        (dict(metric="lvis"), "repeat_factor"),
    ],
)
def test_the_sampler_follows_the_tail(changes, sampler):
    assert fields(recipe.choose_sampler(facts(**changes)))["data.sampler"] == sampler


def test_masks_and_weights_are_taken_where_there_are_some():
    chosen = fields(recipe.choose_model(facts(has_masks=True), GPU, "r50.safetensors"))
    assert chosen["model.mask_head.kind"] == "class_specific" and chosen["data.mask_size"] == 112
    assert chosen["model.norm"] == "frozen" and chosen["model.pretrained"] == "r50.safetensors"
    assert fields(recipe.choose_model(facts(), CPU, ""))["model.norm"] == "group"


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("masks", [False, True])
def test_the_file_loads_and_says_why(tmp_path, device, masks):
    folder = tmp_path / "set"
    (tiny_masks if masks else tiny).write_dataset(folder)
    dataset = Dataset.open(folder)
    choices = new_run.choose(dataset, "train", device, "")
    path = tmp_path / "my_run.py"
    path.write_text(new_run.render(path, dataset, device, choices))
    settings = read_run(load_config(str(path)))
    assert settings.name == "my_run" and settings.data.dir == str(folder)
    assert settings.model.has_masks == masks
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 100 + len(str(tmp_path))
    assert text.count("    # ") >= len(choices)


@pytest.mark.slow
def test_the_written_config_trains(tmp_path):
    folder, config = tmp_path / "set", tmp_path / "my_run.py"
    tiny.write_dataset(folder)
    output = run("scripts.new_run", f"--dataset={folder}", f"--output={config}", "--device=cpu")
    assert f"wrote {config}" in output
    assert "is there already" in refusal(
        "scripts.new_run", f"--dataset={folder}", f"--output={config}"
    )
    steps = ["--config.optimizer.num_steps=2", "--config.optimizer.warmup_steps=1"]
    smaller = [
        "--config.data.canvas=(64,64)",
        "--config.model.backbone=resnet10",
        "--config.model.fpn_channels=16",
        "--config.evaluation.every_epochs=-1",
    ]
    output = run(
        "detection.train", f"--config={config}", f"--workdir={tmp_path / 'run'}", *steps, *smaller
    )
    assert "step 2/2" in output
