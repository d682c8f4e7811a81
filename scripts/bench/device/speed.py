"""The cases of speed, what matters most first.

Programs are compiled side by side in two waves, and nothing is timed meanwhile: compilers try their
algorithms on the device.
"""

import functools
from typing import Any

from scripts.bench.device import detectors, ensembles, kernels, segmenters
from scripts.bench.device.models import DETECTORS
from scripts.bench.device.programs import Program, compile_all
from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes
from scripts.bench.device.worker import Case

_OTHERS = tuple(name for name in DETECTORS if name != detectors.PLAIN)


@functools.cache
def first(size: Sizes) -> dict[str, Any]:
    return compile_all(detectors.jobs([detectors.main_detector(size)], size.batches, size))


@functools.cache
def second(size: Sizes) -> dict[str, Any]:
    """A dry run has no time for the other detectors."""
    names = () if size.dry else _OTHERS
    others = detectors.jobs(names, [size.variant_batch], size)
    return compile_all(others | segmenters.jobs(size))


def compile_wave(wave):
    def compile_programs(report: Report, size: Sizes) -> None:
        """An error comes with the case that needs the program."""
        for name, program in wave(size).items():
            if isinstance(program, Program):
                figures = {"seconds": program.seconds, "gib": program.gib}
                report.line(f"compiled {name}", **figures, tflop=program.flops / 1e12)
        report.line("programs", compiled=len(wave(size)))

    return compile_programs


def time_plain(report: Report, size: Sizes) -> None:
    for count in size.batches:
        detectors.time_detector(report, size, detectors.main_detector(size), first(size), count)


def time_others(report: Report, size: Sizes) -> None:
    found = second(size)
    for name in _OTHERS:
        if detectors.title(name, "train", size.variant_batch) in found:
            detectors.time_detector(report, size, name, found, size.variant_batch)
        else:
            report.line(name, left_out="in a dry run")


def time_segmenters(report: Report, size: Sizes) -> None:
    segmenters.time_segmenters(report, size, second(size))


CASES = (
    Case("peaks", 30, kernels.measure_peaks),
    Case("compile the plain detector", 150, compile_wave(first)),
    Case("time the plain detector", 90, time_plain),
    Case("NMS", 60, kernels.time_nms),
    Case("RoIAlign", 60, kernels.time_roi_align),
    Case("deformable convolution", 45, kernels.time_deform),
    Case("deformable RoI pooling", 30, kernels.time_deform_roi),
    Case("compile the other models", 200, compile_wave(second)),
    Case("time the other detectors", 60, time_others),
    Case("time the segmenters", 60, time_segmenters),
    Case("operators", 90, ensembles.time_operators),
    Case("torch.compile", 120, detectors.time_compiled_torch),
)
