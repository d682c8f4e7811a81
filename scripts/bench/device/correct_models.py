"""Losses, gradients and results of whole models on the device against the CPU."""

import jax

from common.training.step import variable_shapes
from detection.batch_fields import init_shapes
from scripts.bench.device.compared import decisions, on_both, relative_error
from scripts.bench.device.models import MASKS, crop_batch, detector, detector_batch, segmenter_model
from scripts.bench.device.programs import random_values
from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes
from scripts.bench.device.worker import Case
from segmentation import batch_fields as crop_fields

LOSSES = 1e-3
# A proposal that NMS keeps on one side alone changes which regions are sampled.
GRADIENTS = 3e-2
RESULTS = 1e-3


def gradients(model, batch_stats):
    """Function of parameters and batch: losses by name, and the gradients of their sum."""

    def terms(params, batch):
        streams = {"sampling": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = {"params": params, "batch_stats": batch_stats}
        out, _ = model.apply(variables, batch, train=True, rngs=streams, mutable=["batch_stats"])
        return sum(out["losses"].values()), out["losses"]

    return jax.grad(terms, has_aux=True)


def compare_model(report: Report, name: str, model, shapes: dict, batch: dict) -> None:
    """Reports the largest error of a loss, that of the gradients, and that of inference."""
    variables = random_values(shapes)
    function = gradients(model, variables["batch_stats"])
    (ours, our_losses), (theirs, losses) = on_both(function, variables["params"], batch)
    worst = max(relative_error(our_losses[key], losses[key]) for key in losses)
    error = relative_error(ours, theirs)
    report.line(f"{name}: losses", error=worst, limit=LOSSES, ok=worst <= LOSSES)
    report.line(f"{name}: gradients", error=error, limit=GRADIENTS, ok=error <= GRADIENTS)
    seen = {key: batch[key] for key in batch if not key.startswith(("gt_", "mask"))}
    found, expected = on_both(lambda v, b: model.apply(v, b, train=False), variables, seen)
    differing, of = decisions(found, expected)
    error = relative_error(found, expected)
    report.line(
        f"{name}: inference",
        error=error,
        limit=RESULTS,
        differing=differing,
        of=of,
        ok=error <= RESULTS or differing <= 0.02 * of,
    )


def check_detector(name: str):
    def check(report: Report, size: Sizes) -> None:
        if size.dry:  # the cases of speed try a detector
            report.line(name, left_out="in a dry run")
            return
        model, settings = detector(name, size, "float32", axis_name=None)
        shapes = variable_shapes(model, init_shapes(settings.data))
        batch = detector_batch(2, size.small_canvas, size.small_canvas, size.classes, name == MASKS)
        compare_model(report, name, model, shapes, batch)

    return check


def check_segmenter(report: Report, size: Sizes) -> None:
    model, _ = segmenter_model(size, "float32", axis_name=None)
    shapes = variable_shapes(model, crop_fields.init_shapes())
    compare_model(report, size.hrnet, model, shapes, crop_batch(4, (64, 64)))


CASES = (
    Case("Decoupling Head", 90, check_detector("Decoupling Head")),
    Case(MASKS, 90, check_detector(MASKS)),
    Case("HRNet", 90, check_segmenter),
)
