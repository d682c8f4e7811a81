"""Writes a trained detector as programs that serve without this code.

    python -m detection.export_model --workdir=WORK --output=DIR --formats=stablehlo,saved_model

DIR gets what its programs need to be used, and one entry a format (docs/guides/serving_formats.md):

    detector.json    canvases, classes, names and types of inputs and outputs
    stablehlo/       HxW.bin for each canvas: pixels of any number of photos to detections, for
                     `jax.export.deserialize`, on CPU, GPU and TPU
    saved_model/     a TensorFlow SavedModel: the same of one photo, and its bytes to detections

Weights are inside, suppression of double detections too. --config.FIELD=VALUE
overrides a field of the run's config, such as data.canvas or model.detections.score_threshold.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from common.data.canvases import Canvas, orientations
from common.data.images import canvas_shape
from common.io import run_flags
from common.io.atomic import atomic_folder, write_json
from common.io.commands import run_main
from common.io.errors import UserError
from common.io.paths import to_epath
from common.masks.probability import PROBABILITY_ONE
from common.training import command
from common.training.preemption import stoppable
from detection.detector import Detector
from detection.loading import open_detector
from detection.serving import PLATFORMS, detector_function, exported_with_weights
from detection.settings import RunSettings

FORMATS = ("stablehlo", "saved_model")


def define_flags() -> None:
    flags.DEFINE_string("output", None, "Folder to write.")
    flags.DEFINE_list("formats", ["stablehlo"], "Some of stablehlo, saved_model.")
    flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "Devices that the programs run on.")
    flags.DEFINE_integer("step", None, "Checkpoint to use; default: the newest.")


def main() -> None:
    mesh, say = command.start()
    args = flags.FLAGS
    check_names("--formats", args.formats, FORMATS)
    check_names("--platforms", args.platforms, PLATFORMS)
    output = to_epath(args.output)
    if output.exists():
        raise UserError(f"--output={output}: exists already, expected a new directory")
    if jax.process_count() > 1:
        raise UserError(f"--output: found {jax.process_count()} processes, expected one")
    detector = open_detector(args.workdir, args.config, args.step, mesh, say=say)
    if detector.settings.test_time.is_on:
        raise UserError("config.test_time: found several views, a program has one")
    canvases = padded_canvases(detector.settings)
    with atomic_folder(output) as folder:
        write_json(folder / "detector.json", description(detector, canvases))
        write_programs(detector, folder, canvases, args.formats, args.platforms)
    say(f"wrote {detector} as {', '.join(args.formats)} to {output}", flush=True)


def check_names(flag: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Refuses names that are not among those expected, or none at all.

    Raises:
      UserError: naming the first one.
    """
    wrong = [name for name in found if name not in expected]
    if wrong or not found:
        shown = repr(wrong[0]) if wrong else "none"
        raise UserError(f"{flag}: found {shown}, expected some of {', '.join(expected)}")


def padded_canvases(settings: RunSettings) -> list[tuple[Canvas, Canvas]]:
    """Height, width without and with padding, of landscape and portrait photos; a square once."""
    data = settings.data
    pairs = [
        (canvas, canvas_shape(canvas, data.pad_multiple)) for canvas in orientations(data.canvas)
    ]
    return list(dict.fromkeys(pairs))


def description(detector: Detector, canvases: Sequence[tuple[Canvas, Canvas]]) -> dict[str, Any]:
    """What a program's caller has to know, for detector.json."""
    outputs = {
        "boxes": "float32 (b, d, 4): xmin, ymin, xmax, ymax in pixels of the canvas",
        "scores": "float32 (b, d), descending",
        "classes": "int32 (b, d): places in `labels`",
        "valid": "bool (b, d): which of the d rows are detections",
    }
    if detector.settings.model.has_masks:
        outputs["masks"] = (
            "uint16 (b, d, s, s): probability of the object in cells of the box, of "
            f"{PROBABILITY_ONE}"
        )
    return {
        "name": detector.settings.name,
        "step": detector.step,
        "labels": list(detector.classes.labels),
        "names": list(detector.classes.names),
        "inputs": {
            "image": "uint8 (b, height, width, 3): RGB, the photo top left, the rest 0",
            "image_size": "float32 (b, 2): height and width of the photo on the canvas",
        },
        "outputs": outputs,
        "canvases": [
            {"fit_into": list(canvas), "height": shape[0], "width": shape[1]}
            for canvas, shape in canvases
        ],
    }


def write_programs(
    detector: Detector,
    folder: epath.Path,
    canvases: Sequence[tuple[Canvas, Canvas]],
    formats: Sequence[str],
    platforms: Sequence[str],
) -> None:
    """Writes the programs of each format into a folder.

    Raises:
      Stopped: the command was asked to end.
    """
    detect = detector_function(detector.model)
    variables = jax.tree.map(np.asarray, detector.variables)
    if "stablehlo" in formats:
        (folder / "stablehlo").mkdir()
        for _, shape in stoppable(canvases):
            program = exported_with_weights(detect, variables, shape, platforms)
            path = folder / "stablehlo" / f"{shape[0]}x{shape[1]}.bin"
            path.write_bytes(bytes(program.serialize()))
    if "saved_model" in formats:
        # TensorFlow takes seconds to import, and only this format needs it.
        from detection import saved_model

        labels = detector.classes.labels
        saved_model.save(detect, variables, folder / "saved_model", canvases, labels, platforms)


if __name__ == "__main__":
    run_flags.define_flags(config_required=False)
    define_flags()
    flags.mark_flag_as_required("output")
    run_main(main)
