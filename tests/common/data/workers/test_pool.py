"""Batches that worker processes load are those of threads, whatever becomes of the processes."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from common.data import input as inputs
from common.data import labelled_batches, remote
from common.data.batches import stack_examples
from common.data.dataset import Dataset
from common.data.labelled_images import open_class_folder
from common.data.photo_errors import PhotoErrors
from common.data.plans.plan import train_plan
from common.data.settings import ElaborateSettings, LabelledDataSettings
from common.data.views import DatasetPhotos, format_canvases, view_batches
from common.data.workers import pool
from common.io.errors import UserError
from common.io.settings import read_settings
from configs.pretrain import resnet50
from segmentation.crops import batches as crops
from segmentation.crops.plan import make_plan
from tests.commands import ROOT
from tests.common.data.factories import data_settings
from tests.common.data.workers.loaders import Failing, Numbers, Sleeping
from tests.segmentation import coded_photos as coded

ELABORATE = ElaborateSettings(scale="crop", rotate=True, boxes="hull", max_zoom=4.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return coded.write_dataset(tmp_path_factory.mktemp("workers"))


@pytest.fixture
def broken(dataset, tmp_path) -> Dataset:
    """The same with two photos that cannot be read."""
    changed = _copy(dataset, tmp_path)
    for index in (1, 4):
        path = changed.image_file(index)
        os.truncate(path, os.path.getsize(path) // 2)
    return changed


def _copy(dataset, folder) -> Dataset:
    shutil.copytree(dataset.image_root, folder / "photos")
    return Dataset.open(dataset.directory, image_root=str(folder / "photos"))


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = _descriptors()
    yield
    gc.collect()  # an error that was caught holds the frames that it went through
    assert not _children()
    assert _descriptors() == before


def _children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read().split()


def _descriptors() -> list[str]:
    """Open files that have to do with workers."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the listing itself
            continue
    return sorted(path for path in found if "memfd:examples" in path)


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert list(batch) == list(other)
        for name in batch:
            assert batch[name].dtype == other[name].dtype and not batch[name].flags.writeable
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def training(dataset, processes, start=0, count=4, **changes):
    fields = dict(canvas=(64, 96), batch_size=4, mask_size=16, max_boxes=2, max_ignore=1)
    fields |= dict(scale_jitter=(1.0, 1.0), elaborate=ELABORATE, num_processes=processes)
    settings = data_settings(**fields | changes)
    plan = train_plan(dataset, settings, 3)
    return inputs.train_batches(
        dataset, plan, settings, seed=5, start_step=start, num_steps=count - start
    )


def test_training_batches_resumed_ones_and_counts_are_those_of_threads(dataset, capfd):
    threads = training(dataset, 1)
    expected = list(threads)
    printed = capfd.readouterr().err
    workers = training(dataset, 2)
    assert_equal(list(workers), expected)
    assert expected[0]["gt_has_mask"].any() and threads.dropped_boxes > 0
    assert workers.left_out == threads.left_out
    assert len(capfd.readouterr().err.splitlines()) == len(printed.splitlines()) == 2
    assert_equal(list(training(dataset, 3, start=3)), expected[3:])


def test_photos_and_masks_that_are_skipped_are_counted_and_told_once(broken, capfd):
    options = dict(on_image_error="skip", sampler="uniform", count=12)
    threads, workers = training(broken, 1, **options), training(broken, 2, **options)
    expected = list(threads)
    printed = sorted(capfd.readouterr().err.splitlines())
    assert_equal(list(workers), expected)
    assert workers.skipped_images == threads.skipped_images > 2
    assert workers.left_out == threads.left_out
    told = sorted(capfd.readouterr().err.splitlines())
    skipped = [line for line in told if "skipped, cannot read" in line]
    assert skipped == [line for line in printed if "skipped, cannot read" in line]
    assert len(skipped) == 2


def test_evaluation_stops_at_the_photo_at_which_threads_stop(broken):
    def read(processes):
        settings, seen = data_settings(canvas=(64, 96), num_processes=processes), []
        with pytest.raises(UserError) as error:
            for batch in inputs.eval_batches(broken, "train", settings, batch_size=1):
                seen.append(batch)
        return seen, str(error.value)

    (seen, message), (expected, expected_message) = read(2), read(1)
    assert_equal(seen, expected)
    assert message == expected_message and "cannot read the image" in message


def test_crops_of_the_segmenter_are_those_of_threads(dataset, tmp_path):
    photos = _copy(dataset, tmp_path)
    for index in range(0, photos.num_images, 2):  # of JPEG files TensorFlow decodes parts
        with Image.open(photos.image_file(index)) as image:
            image.save(photos.image_file(index), "PNG")

    def read(processes):
        data = coded.config(num_processes=processes)
        plan = make_plan(photos, data, 5)
        return list(crops.train_batches(photos, plan, data, num_steps=3))

    assert_equal(read(2), read(1))


def test_labelled_photos_are_those_of_threads(dataset, tmp_path):
    for number in range(4):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(dataset.image_file(number), folder)
    source = open_class_folder(tmp_path, "train")

    def read(processes):
        config = resnet50.get_config().data
        config.update(batch_size=2, image_size=32, num_threads=2, num_processes=processes)
        data = read_settings(LabelledDataSettings, config)
        trained = labelled_batches.train_batches(source, data, seed=1, start_step=0, num_steps=3)
        return [*trained, *labelled_batches.eval_batches(source, data, batch_size=3)]

    assert_equal(read(2), read(1))


def test_views_are_those_of_threads_and_a_broken_photo_counts_once(broken):
    def read(processes):
        errors = PhotoErrors("skip")
        rows = [[np.array([0, 1])], [np.array([0]), np.array([1])]]
        batches = view_batches(
            DatasetPhotos(broken),
            np.arange(broken.num_images),
            [format_canvases(side, (1.5,), max_long=60) for side in (16, 32)],
            (1.5,),
            rows,
            errors,
            pad_multiple=8,
            num_processes=processes,
        )
        return [vars(batch) for batch in batches], errors.skipped

    (batches, skipped), (expected, expected_skipped) = read(2), read(1)
    assert skipped == expected_skipped == 2
    for batch, other in zip(batches, expected, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def numbers(loader, count=12, size=3, processes=2, ahead=6):
    items = [range(start, start + size) for start in range(0, count, size)]
    return stack_examples(loader, items, processes=processes, threads=4, ahead=ahead)


def test_all_processes_load_and_none_imports_a_framework():
    batches = list(numbers(Numbers(), 48))
    got = np.concatenate([batch["number"] for batch in batches])
    np.testing.assert_array_equal(got, np.arange(48)[:, None].repeat(3, 1))
    processes = set(np.concatenate([batch["process"] for batch in batches]).tolist())
    assert len(processes) == 2 and os.getpid() not in processes
    assert not any(batch["heavy"].any() for batch in batches)


def test_memory_is_used_again_but_not_while_somebody_has_it():
    before, most, kept = len(_descriptors()), 0, {}
    for number, batch in enumerate(numbers(Numbers(), 90)):
        most = max(most, len(_descriptors()) - before)
        if number % 10 == 3:
            kept[number] = batch["number"][1:, 0]  # a view keeps all of its batch
    assert sorted(kept) == [3, 13, 23]
    for number, values in kept.items():
        np.testing.assert_array_equal(values, [3 * number + 1, 3 * number + 2])
    # Of each block the file, and the map of it; of the thirty batches few are at work.
    assert most <= 2 * (len(kept) + 8)


def test_closing_early_ends_the_processes():
    batches = numbers(Numbers(), 300)
    first = next(batches)["number"]
    batches.close()
    np.testing.assert_array_equal(first[:, 0], [0, 1, 2])  # held memory stays as it is


def test_closing_does_not_wait_for_reads_that_hang(tmp_path, capfd):
    """The processes are ended in the middle of them, and nobody says so."""
    batches = numbers(Sleeping(str(tmp_path), first=3), 300)
    next(batches)
    _wait(lambda: len(list(tmp_path.iterdir())) == 2)
    begin, threads = time.monotonic(), threading.active_count()
    batches.close()
    assert time.monotonic() - begin < 4 and threading.active_count() < threads
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("killed", UserError, r"data worker [12] of 2 \(process \d+\) was killed \(SIGKILL\)"),
        (
            "mute",
            UserError,
            r"data worker [12] of 2 \(process \d+\) ended with status 1, its error",
        ),
        ("user", UserError, r"^7\.jpg: found nothing, expected a photo$"),
        ("odd", RuntimeError, r"^_OddError: slot 7 is odd"),
    ],
)
def test_a_failure_comes_in_the_place_of_its_batch_in_one_line(how, error, message):
    seen, start = [], time.monotonic()
    with pytest.raises(error, match=message) as caught:
        for batch in numbers(Failing(7, how)):
            seen += batch["number"][:, 0].tolist()
    assert seen == ([] if how in ("killed", "mute") else list(range(6))) or seen == seen[:6]
    assert time.monotonic() - start < 30 and "\n" not in str(caught.value)


def test_repeated_reads_of_workers_are_counted_here(capfd):
    before = remote.repeated.count
    assert len(list(numbers(Failing(7, "busy")))) == 4
    assert remote.repeated.count == before + 1
    assert capfd.readouterr().err.count("7.jpg: read again") == (before == 0)


SCRIPT = """
import sys
from common.data.batches import stack_examples
from tests.common.data.workers.loaders import Sleeping
next(stack_examples(Sleeping(sys.argv[1]), [range(4)], processes=2, threads=2, ahead=4))
"""


def test_workers_outlive_signals_to_stop_but_not_the_run(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT)
    try:
        _wait(lambda: len(list(tmp_path.iterdir())) == 2)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(worker, number)
        time.sleep(0.3)
        assert all(map(_runs, workers))
        run.kill()
        run.wait()
        _wait(lambda: not any(map(_runs, workers)))
    finally:
        run.kill()
        run.wait()


def _wait(holds) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("asked", "examples", "cores", "expected"),
    [(0, 10**6, 2, 1), (0, 10**6, 15, 1), (0, 10**6, 96, 24), (0, 100, 96, 1), (3, 100, 2, 3)],
)
def test_processes_are_started_where_they_pay(monkeypatch, asked, examples, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert pool.worker_count(asked, examples) == expected


def test_systems_without_shared_memory_load_in_threads(monkeypatch):
    monkeypatch.delattr("os.memfd_create")
    assert pool.worker_count(0, 100_000) == 1
    with pytest.raises(UserError, match="num_processes=2: expected 0 or 1"):
        pool.worker_count(2, 100_000)
