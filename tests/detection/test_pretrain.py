"""Pre-training of backbones: batches of labelled photos, and the command from photos to weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from common.data.labelled_batches import eval_batches, random_crop, train_batches
from common.data.labelled_images import open_class_folder, open_tfds
from common.data.settings import LabelledDataSettings
from common.io.errors import UserError
from common.io.settings import read_settings
from common.nn.backbones import make_backbone
from common.nn.weights.backbone_weights import load_backbone_weights
from common.training.optimizer import OptimizerSettings, make_schedule
from common.training.step import variable_shapes
from configs.pretrain import resnet50
from detection.pretrain import build_model, init_batch
from detection.settings import read_pretrain
from tests.commands import ROOT, refusal, run

COLOURS = {"blue": (40, 60, 220), "green": (40, 180, 60), "red": (210, 40, 40)}
SIZES = {"train": 8, "validation": 3}  # photos of a class


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A class folder whose classes are colours; photos differ in brightness and size."""
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for split, count in SIZES.items():
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.tile(np.array(colour), (*rng.integers(40, 60, 2), 1))
                pixels = np.clip(pixels + rng.integers(-30, 30, pixels.shape), 0, 255)
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / split / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


def data_config(**changes) -> LabelledDataSettings:
    config = resnet50.get_config().data
    config.update(batch_size=4, image_size=32, num_threads=2, **changes)
    return read_settings(LabelledDataSettings, config)


def test_class_folder_is_read_in_alphabetical_order(photos):
    source = open_class_folder(photos, "train")
    assert list(source.class_names) == ["blue", "green", "red"]
    assert len(source) == 24 and source.labels.tolist() == sorted(source.labels.tolist())
    data, label = source.read(23)
    assert label == 2 and data == (photos / "train/red/7.png").read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ([], "found no such folder"),
        (["train/readme.txt"], "found no sub-folders"),
        (["train/a/x.jpg", "train/b/notes.txt"], "train/b: found no photos"),
    ],
)
def test_a_folder_that_is_no_class_folder_is_named(tmp_path, make, message):
    for name in make:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        open_class_folder(tmp_path, "train")


def take(source, start, count, seed=1, **hosts):
    return list(
        train_batches(source, data_config(), seed=seed, start_step=start, num_steps=count, **hosts)
    )


def test_steps_do_not_depend_on_where_a_run_starts_nor_on_hosts(photos):
    source = open_class_folder(photos, "train")
    whole = take(source, 0, 7)
    assert {i for batch in whole[:6] for i in batch["image_index"].tolist()} == set(range(24))
    for later, batch in zip(take(source, 5, 2), whole[5:], strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(value, later[name])
    halves = [take(source, 3, 1, process_index=i, process_count=2)[0] for i in (0, 1)]
    for name, value in whole[3].items():
        np.testing.assert_array_equal(value, np.concatenate([half[name] for half in halves]))
    assert not np.array_equal(whole[0]["image"], take(source, 0, 1, seed=2)[0]["image"])
    assert whole[0]["image"].shape == (4, 32, 32, 3) and whole[0]["image"].dtype == np.uint8


def test_evaluation_sees_each_photo_once(photos):
    source = open_class_folder(photos, "validation")
    batches = list(eval_batches(source, data_config(), batch_size=4))
    index = np.concatenate([batch["image_index"] for batch in batches])
    assert index.tolist() == [*range(9), -1, -1, -1]
    assert [b["image_valid"].tolist() for b in batches][-1] == [True, False, False, False]
    for batch in batches:  # the photos have the colours of their labels
        colour = np.argmax(batch["image"].mean((1, 2)), -1)
        assert np.all((2 - colour == batch["label"])[batch["image_valid"]])


def test_a_broken_photo_is_named(photos, tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/x.jpg").write_bytes(b"\xff\xd8 no photo")
    with pytest.raises(UserError, match="train/a/x.jpg: cannot read the image"):
        take(open_class_folder(tmp_path, "train"), 0, 1)


def test_crops_have_the_areas_and_aspects_asked_for():
    config = data_config(crop_area=(0.2, 0.5), crop_aspect=(0.8, 1.25))
    rng = np.random.default_rng(0)
    flips = 0
    for shape in ((300, 400), (1000, 500)):
        for _ in range(200):
            crop = random_crop(shape, 224, config, rng)
            h, w = (224 / full * side for full, side in zip(crop.full, shape, strict=True))
            assert 0.19 < h * w / np.prod(shape) < 0.51 and 0.78 < w / h < 1.28
            assert all(0 <= o <= f - 224 for o, f in zip(crop.offset, crop.full, strict=True))
            flips += crop.flip
    assert 150 < flips < 250
    narrow = random_crop((1000, 10), 224, config, rng)  # nothing fits: the middle
    assert narrow.full[1] == 224 and abs(narrow.offset[0] - narrow.full[0] / 2) < 224


def test_cosine_ends_at_zero_and_other_shapes_are_refused():
    config = resnet50.get_config().optimizer
    schedule = make_schedule(
        read_settings(OptimizerSettings, config), batch_size=256, steps_per_epoch=10
    )
    rates = [float(schedule(step)) for step in (0, 25, 50, 475, 900)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.05, 0], atol=1e-7)
    config.decay = "linear"
    with pytest.raises(UserError, match="config.optimizer.decay: found 'linear'"):
        read_settings(OptimizerSettings, config, "config.optimizer")


def test_tfds_without_such_a_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match="config.data.tfds=no_such_set: TFDS finds no"):
        open_tfds("no_such_set", "train", str(tmp_path))


def test_hrnet_is_classified_by_all_its_taps():
    """With the last one alone, parts of its last exchange would not be trained."""
    settings = read_pretrain(resnet50.get_config("hrnet_w18"))
    model = build_model(settings.model, 3).clone(axis_name=None)
    shapes = variable_shapes(model, init_batch(settings.data))
    assert shapes["params"]["head"]["kernel"].shape == (18 + 36 + 72 + 144, 3)


@pytest.mark.slow
def test_tfds_is_read_at_random_places(photos, tmp_path):
    import tensorflow_datasets as tfds

    class TinyColours(tfds.core.GeneratorBasedBuilder):
        """Three classes of photos."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=list(COLOURS))
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(photos / "train")}

        def _generate_examples(self, folder):
            for path in sorted(folder.glob("*/*.png")):
                yield str(path), {"image": str(path), "label": path.parent.name}

    for file_format in ("tfrecord", "array_record"):
        builder = TinyColours(data_dir=tmp_path / file_format, file_format=file_format)
        builder.download_and_prepare()
    source = open_tfds("tiny_colours", "train", str(tmp_path / "array_record"))
    assert list(source.class_names) == list(COLOURS) and len(source) == 12
    originals = {path.read_bytes(): path.parent.name for path in photos.glob("train/*/*.png")}
    data, label = source.read(7)
    assert originals[data] == source.class_names[label]
    assert take(source, 1, 1)[0]["image"].shape == (4, 32, 32, 3)
    with pytest.raises(UserError, match="prepared as tfrecord, expected array_record"):
        open_tfds("tiny_colours", "train", str(tmp_path / "tfrecord"))
    with pytest.raises(UserError, match="found no split 'validation', expected train"):
        open_tfds("tiny_colours", "validation", str(tmp_path / "array_record"))


def flags(photos, workdir):
    return [
        f"--config={ROOT / 'configs/pretrain/resnet50.py'}:resnet18",
        f"--workdir={workdir}",
        f"--config.data.dir={photos}",
        "--config.data.batch_size=8",
        "--config.data.image_size=32",
        "--config.data.crop_area=(0.5, 1.0)",
        "--config.optimizer.num_epochs=10.0",
        "--config.optimizer.decay_epochs=(30,60,80)",
        "--config.optimizer.warmup_epochs=1.0",
        # Low enough that the running statistics of batch norm keep up with the weights: all
        # validation photos are right from the fourth epoch on, whatever the processor's rounding.
        "--config.optimizer.learning_rate_per_image=0.0002",
        "--config.evaluation.batch_size=4",
        "--config.evaluation.every_epochs=0",
        "--config.log.every_steps=1",
        "--config.model.dtype=float32",
        "--config.checkpoint.every_steps=24",
    ]


@pytest.mark.slow
def test_command_reports_top1_resumes_and_writes_weights_for_detectors(photos, tmp_path):
    done = run("detection.pretrain", *flags(photos, tmp_path / "run"))
    top1 = done.split("top-1 ")[1].split()[0]
    assert 0.6 < float(top1) <= 1.0, done  # a third by chance

    # The run that lost everything after step 24 ends at the same place.
    lost = tmp_path / "run/checkpoints/30"
    lost.rename(tmp_path / "lost")
    (tmp_path / "run/backbone.safetensors").rename(tmp_path / "first.safetensors")
    again = run("detection.pretrain", *flags(photos, tmp_path / "run"))
    assert "resuming at step 24" in again
    assert again.split("top-1 ")[1].split()[0] == top1
    written = tmp_path / "run/backbone.safetensors"
    first, second = map(load_file, (tmp_path / "first.safetensors", written))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)

    module = make_backbone("resnet18", norm="frozen", frozen_stages=1)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), False)
    )
    loaded, report = load_backbone_weights(written, shapes)
    assert not report.missing and not report.unused
    kernel = loaded["params"]["stem"]["conv"]["kernel"]
    assert kernel.shape == (7, 7, 3, 64) and np.isfinite(kernel).all()


@pytest.mark.slow
def test_classes_of_one_split_alone_are_refused_in_one_line(photos, tmp_path):
    (tmp_path / "photos/train").mkdir(parents=True)
    for name in COLOURS:
        (tmp_path / "photos/train" / name).symlink_to(photos / "train" / name)
    (tmp_path / "photos/validation").symlink_to(photos / "train")
    (tmp_path / "photos/train/red").unlink()
    line = refusal("detection.pretrain", *flags(tmp_path / "photos", tmp_path / "run"))
    assert "classes in only one of train and validation: red" in line
