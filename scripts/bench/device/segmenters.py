"""Training and inference of HRNet segmenters in bfloat16, beside timm's trunk in torch."""

import functools
from typing import Any

import jax

from common.training import distributed
from scripts.bench.bench_segmenter import TASKS, torch_calls
from scripts.bench.device.clock import time_sides
from scripts.bench.device.detectors import free_torch, our_side, torch_device, torch_side
from scripts.bench.device.models import crop_batch, trained_segmenter
from scripts.bench.device.programs import Program, Trained, compile_program, matrix_rate
from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes
from segmentation.batch_fields import INFERENCE_FIELDS

Canvas = tuple[int, int]


@functools.cache
def trained(size: Sizes) -> Trained:
    return trained_segmenter(size)


def arguments(task: str, count: int, canvas: Canvas, size: Sizes) -> tuple[Any, Any]:
    model = trained(size)
    batch = jax.device_put(crop_batch(count, canvas), distributed.batch_sharded(model.mesh))
    if task == "train":
        return model.state, batch
    return model.state.variables, {name: batch[name] for name in INFERENCE_FIELDS}


def title(size: Sizes, task: str, count: int, canvas: Canvas) -> str:
    return f"{size.hrnet}, {task}, {count} crops of {canvas[0]}x{canvas[1]}"


def jobs(size: Sizes) -> dict[str, Any]:
    """Title -> what compiles the step of a task."""

    def compile_task(task: str, count: int, canvas: Canvas) -> Program:
        model = trained(size)
        step = model.train if task == "train" else model.predict
        return compile_program(step, *arguments(task, count, canvas, size))

    trained(size)
    return {
        title(size, task, count, canvas): functools.partial(compile_task, task, count, canvas)
        for count, canvas, _ in size.crops
        for task in TASKS
    }


def time_segmenters(report: Report, size: Sizes, found: dict[str, Any]) -> None:
    model = trained(size)
    rate = matrix_rate(size)
    for count, canvas, peer_canvas in size.crops:
        calls = torch_calls(
            crop_batch(count, peer_canvas), size.hrnet, size.torch_threads, torch_device()
        )
        for task in TASKS:
            program = found[title(size, task, count, canvas)]
            if isinstance(program, Exception):
                raise program
            seen = arguments(task, count, canvas, size)[1]
            ours = our_side(model, task, program, seen)
            times = time_sides({"ours": ours, "timm": torch_side(calls[task])}, size)
            seconds = times["ours"].median
            figures = {
                "crops_per_second": count / seconds,
                "share_of_peak": program.flops / seconds / rate,
                "gib": program.gib,
                **times["ours"].figures("ours"),
                **times["timm"].figures("timm"),
                "timm_canvas": peer_canvas,
                "speed_up": times["timm"].median / seconds,
            }
            report.line(title(size, task, count, canvas), **figures)
        calls.clear()
        free_torch()
