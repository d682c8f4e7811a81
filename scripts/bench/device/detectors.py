"""Training and inference of the detectors in bfloat16, beside torchvision's on the same device."""

import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from common.training import distributed
from detection.batch_fields import INFERENCE_FIELDS
from scripts.bench.bench_train_step import TASKS, example, torchvision_calls
from scripts.bench.device.clock import Side, time_sides
from scripts.bench.device.models import MASKS, detector_batch, trained_detector
from scripts.bench.device.programs import Program, Trained, compile_program, matrix_rate
from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes

PLAIN = "R50-FPN"
WITH_PEERS = (PLAIN, MASKS)


def main_detector(size: Sizes) -> str:
    """The one that is timed first and profiled; a dry run tries one only, that with most parts."""
    return MASKS if size.dry else PLAIN


def title(name: str, task: str, count: int) -> str:
    return f"{name}, {task}, {count} images"


@functools.cache
def trained(name: str, size: Sizes) -> Trained:
    return trained_detector(name, size)


def batch_of(name: str, count: int, size: Sizes) -> dict[str, jax.Array]:
    batch = detector_batch(count, size.photo, size.canvas, size.classes, name == MASKS)
    return jax.device_put(batch, distributed.batch_sharded(trained(name, size).mesh))


def arguments(model: Trained, task: str, batch: dict) -> tuple[Any, Any]:
    """Of the step of a task."""
    if task == "train":
        return model.state, batch
    return model.state.variables, {name: batch[name] for name in INFERENCE_FIELDS}


def jobs(names: Iterable[str], counts: Iterable[int], size: Sizes) -> dict[str, Any]:
    """Title -> what compiles the step of a task."""

    def compile_task(name: str, count: int, task: str) -> Program:
        model = trained(name, size)
        step = model.train if task == "train" else model.predict
        return compile_program(step, *arguments(model, task, batch_of(name, count, size)))

    names = [*names]
    for name in names:
        trained(name, size)  # one after the other: threads would make a model twice
    return {
        title(name, task, count): functools.partial(compile_task, name, count, task)
        for name in names
        for count in counts
        for task in TASKS
    }


def our_side(model: Trained, task: str, program: Program, batch: dict) -> Side:
    """`batch`: the fields of the task."""

    def train() -> Any:
        model.state, metrics = program.run(model.state, batch)
        return metrics["loss"]

    def inference() -> Any:
        return program.run(model.state.variables, batch)

    def wait(result: Any) -> None:
        jax.block_until_ready(result)
        if task == "train" and not np.isfinite(result):
            raise FloatingPointError(f"the loss became {result}")

    return Side(train if task == "train" else inference, wait)


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def peer_calls(
    name: str, count: int, size: Sizes, compiled: bool = False
) -> dict[str, Callable[[], str]]:
    data = example(count, size.photo, size.classes)
    options: dict[str, Any] = {
        "masks": name == MASKS,
        "device": torch_device(),
        "compiled": compiled,
    }
    return torchvision_calls(data, size.classes, size.torch_threads, **options)


def torch_memory() -> float:
    """GiB at most since the last call."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def free_torch() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def torch_side(call: Callable[[], Any]) -> Side:
    import torch

    cuda = torch.cuda.is_available()
    return Side(call, lambda _: torch.cuda.synchronize() if cuda else None)


def time_detector(report: Report, size: Sizes, name: str, found: dict, count: int) -> None:
    """Both tasks of one detector, beside torchvision's where it has that."""
    model = trained(name, size)
    batch = batch_of(name, count, size)
    calls = {}
    if name in WITH_PEERS:
        calls = peer_calls(name, count, size)
    for task in TASKS:
        program = found[title(name, task, count)]
        if isinstance(program, Exception):
            raise program
        if calls:
            torch_memory()
        seen = arguments(model, task, batch)[1]
        sides = {"ours": our_side(model, task, program, seen)}
        if calls:
            sides["torchvision"] = torch_side(calls[task])
        times = time_sides(sides, size)
        seconds = times["ours"].median
        rate = matrix_rate(size)
        figures: dict[str, Any] = {
            "images_per_second": count / seconds,
            "share_of_peak": program.flops / seconds / rate,
            "gib": program.gib,
            **times["ours"].figures("ours"),
        }
        if calls:
            figures |= times["torchvision"].figures("torchvision")
            figures |= {
                "torchvision_images_per_second": count / times["torchvision"].median,
                "speed_up": times["torchvision"].median / seconds,
                "torchvision_gib": torch_memory(),
            }
        report.line(title(name, task, count), **figures)
    calls.clear()
    free_torch()


def time_compiled_torch(report: Report, size: Sizes) -> None:
    """torchvision's plain detector with its trunk through torch.compile."""
    if torch_device() == "cpu":
        report.line("torch.compile", left_out="minutes on a CPU")
        return
    count = size.variant_batch
    calls = peer_calls(PLAIN, count, size, compiled=True)
    for task in TASKS:
        taken = time_sides({"torchvision": torch_side(calls[task])}, size)["torchvision"]
        report.line(
            f"torch.compile, {title(PLAIN, task, count)}",
            torchvision_images_per_second=count / taken.median,
            **taken.figures("torchvision"),
        )
    calls.clear()
    free_torch()
