"""Finds objects on photos, with a trained detector and nothing else.

    python -m detection.predict --workdir=RUN --images='photos/**/*.jpg' --output=found --pictures
    python -m detection.predict --workdir=RUN --images=gs://bucket/photos --output=x.parquet

Config and classes are those of the run; `--config.FIELD=VALUE` overrides a field, such as
test_time.scales. RUN may also be a file of scripts.export_weights. The output is a detections table
(`common.tables`), in a folder `detections.parquet`; image ids are paths below the folder that
--images names, which the table's metadata tell as `photo_root`. Photos that cannot be read are
named and left out.

With --pictures each photo is drawn with what was found, into `pictures` in the output folder or
`NAME_pictures` beside the table. With --masks=SEGMENTATION_RUN a segmenter outlines the boxes
(`segmentation.export`). Several processes share the photos, and each writes a shard of the table.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags
from etils import epath

from common.data.photo_errors import PhotoErrors
from common.data.photo_list import PhotoList, find_photos
from common.data.table_photos import CLASS_NAMES, PHOTO_ROOT
from common.io import run_flags
from common.io.atomic import atomic_file
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.paths import to_epath
from common.io.progress import Progress
from common.report.table_pictures import draw_table
from common.tables import DetectionsReader, DetectionsWriter, shard_name
from common.training import command, distributed
from common.training.cluster import find_cluster
from common.training.compile_cache import use_compile_cache
from common.training.preemption import stoppable
from common.training.watchdog import StallWatchdog
from detection.detector import Detector
from detection.loading import open_detector


def detect(
    detector: Detector,
    photos: PhotoList,
    output: epath.Path,
    *,
    score_threshold: float | None = None,
    classes: Sequence[str] = (),
    say: Callable = print,
) -> None:
    """Writes the detections of photos as a table (a folder of shards with several processes).

    Raises:
      UserError: a class that the model lacks, or the table cannot be written.
    """
    process, processes = jax.process_index(), jax.process_count()
    share = PhotoList(photos.root, photos.names[process::processes], 0)
    settings, labels = detector.settings, detector.classes.labels
    metadata = {
        "model": settings.name,
        "config": settings.to_dict(),
        "dataset": "",
        "split": "",
        "step": detector.step,
        "classes": list(labels),
        "expanded": False,
        CLASS_NAMES: list(detector.classes.names),
        PHOTO_ROOT: photos.root,
    }
    errors = PhotoErrors("skip", tolerant=True)
    progress = Progress(len(share), what="detect", unit="photos", say=say)
    found = detector.stream(
        share.files, score_threshold=score_threshold, classes=classes, errors=errors
    )
    done = rows = 0
    with DetectionsWriter(
        output,
        metadata,
        process_index=process,
        process_count=processes,
        masks=settings.model.has_masks,
    ) as writer:
        for place, result in stoppable(found, together=False):
            writer.add(
                share.names[place],
                [labels[number] for number in result.labels],
                result.scores,
                result.normalised_boxes,
                result.mask_counts,
                np.tile(np.array(result.size, np.int32), (len(result), 1)),
            )
            done, rows = done + 1, rows + len(result)
            progress.report(done, {"detections": rows})
        if not done:
            raise UserError(f"--images: none of the {len(share)} photos can be read")
    skipped = f", {errors.skipped} unreadable left out" if errors.skipped else ""
    say(f"wrote {output}: {done} photos{skipped}, {rows} detections", flush=True)
    distributed.barrier("predict")


def detect_and_outline(table: epath.Path, segmenter: str) -> None:
    """Runs this command without masks, then `segmentation.export` on what it found.

    They are processes of their own, one after the other: each has the devices to itself.

    Raises:
      UserError: several processes, or one of the two commands has failed.
    """
    if find_cluster() is not None:
        raise UserError(
            "--masks: found several processes, expected one (segmentation.export takes the table "
            "that they write without it)"
        )
    with tempfile.TemporaryDirectory() as folder:
        boxes = f"{folder}/boxes.parquet"
        # Of a flag that is given twice the last value counts.
        _run("detection.predict", *sys.argv[1:], f"--output={boxes}", "--masks=", "--nopictures")
        if DetectionsReader(boxes).num_rows:
            _run(
                "segmentation.export",
                f"--workdir={segmenter}",
                f"--boxes={boxes}",
                f"--output={table}",
            )
            return
        with atomic_file(table) as temporary:
            shutil.copyfile(boxes, temporary)
        print(f"wrote {table}: no boxes to outline", flush=True)


def _run(module: str, *arguments: str) -> None:
    status = subprocess.run([sys.executable, "-m", module, *arguments]).returncode
    if status:
        raise UserError(f"--masks: {module} ended with status {status}, see the lines above")


def main() -> None:
    values = flags.FLAGS
    photos = find_photos(values.images)
    table, pictures = outputs(values.output)
    if values.masks:
        if not to_epath(values.masks).exists():
            raise UserError(f"--masks={values.masks}: no such work directory")
        detect_and_outline(table, values.masks)
        if values.pictures:
            draw_table(table, pictures, values.min_score, values.side)
        return
    mesh, say = command.start()
    use_compile_cache()
    others = f" ({photos.left_out} other files left out)" if photos.left_out else ""
    say(f"photos: {len(photos)} below {photos.root}{others}", flush=True)
    detector = open_detector(
        values.workdir, values.config, values.step, mesh, batch_size=values.batch_size, say=say
    )
    say(f"detector: {detector}", flush=True)
    with StallWatchdog.of(detector.settings.log):
        detect(
            detector,
            photos,
            table,
            score_threshold=values.score_threshold,
            classes=values.classes,
            say=say,
        )
    if values.pictures:
        if jax.process_count() > 1:  # each process draws the photos of its own shard
            table = table / shard_name(jax.process_index(), jax.process_count())
        draw_table(table, pictures, values.min_score, values.side, say)


def outputs(output: str) -> tuple[epath.Path, epath.Path]:
    """Table and folder of pictures that --output stands for."""
    if output.endswith(".parquet"):
        return to_epath(output), to_epath(f"{output.removesuffix('.parquet')}_pictures")
    return to_epath(output) / "detections.parquet", to_epath(output) / "pictures"


def define_flags() -> None:
    flags.DEFINE_multi_string(
        "images", None, "Photos: file, folder, 'pattern/**/*.jpg', list.txt; may be given again."
    )
    flags.DEFINE_string("output", None, "Folder, or .parquet file, to write.")
    flags.DEFINE_float(
        "score_threshold", None, "Weaker detections are left out; default: the config's.", 0.0, 1.0
    )
    flags.DEFINE_list(
        "classes", [], "Labels or names of the classes that are wanted; default: all."
    )
    flags.DEFINE_bool("pictures", False, "Draw what was found.")
    flags.DEFINE_float("min_score", 0.4, "Weaker detections stay out of the pictures.", 0.0, 1.0)
    flags.DEFINE_integer("side", 1280, "Longest side of a picture at most, pixels.", lower_bound=64)
    flags.DEFINE_string("masks", None, "Work directory of a segmenter that outlines the boxes.")
    flags.DEFINE_integer("step", None, "Checkpoint to use; default: the newest.")
    flags.DEFINE_integer(
        "batch_size", 0, "Photos at a time; 0: one on a CPU, else the config's.", lower_bound=0
    )
    flags.mark_flags_as_required(["images", "output"])


if __name__ == "__main__":
    run_flags.define_flags(config_required=False)
    define_flags()
    run_main(main)
