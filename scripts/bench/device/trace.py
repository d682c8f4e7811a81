"""Where the time of a training step goes: operations that take most of it, and their modules."""

import collections
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

from scripts.bench.device.clock import time_sides
from scripts.bench.device.detectors import (
    arguments,
    batch_of,
    main_detector,
    our_side,
    title,
    trained,
)
from scripts.bench.device.programs import compile_program
from scripts.bench.device.report import Report
from scripts.bench.device.sizes import Sizes
from scripts.bench.device.worker import Case

_STEPS = 3
_TOP = 25
_DEPTH = 3  # modules of a path that are told apart
# %fusion.7 = f32[...] fusion(...), ..., metadata={op_name="jit(train_step)/backbone/conv" ...}
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)


def origins(program_text: str) -> dict[str, str]:
    """Instruction of a compiled program -> path of the modules and functions that it comes from."""
    return dict(_INSTRUCTION.findall(program_text))


def durations(folder: Path, names: dict[str, str]) -> collections.Counter[str]:
    """Nanoseconds of each instruction of the program, of all devices and threads together.

    An accelerator's kernels say which instruction they belong to, or are named after it, or are of
    a library and count by themselves; a CPU's threads name instructions among much else.
    """
    (file,) = folder.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    # An installed compiler for TPUs adds a plane of a device that is not there.
    return _on_planes(devices, names, True) or _on_planes(planes, names, False)


def _on_planes(
    planes: list[Any], names: dict[str, str], of_device: bool
) -> collections.Counter[str]:
    total: collections.Counter[str] = collections.Counter()
    by_kernel = {re.sub(r"[.-]", "_", name): name for name in names}
    for plane in planes:
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or lines:
            for event in line.events:
                stats: dict[Any, Any] = dict(event.stats) if of_device else {}
                kernel = by_kernel.get(event.name, event.name)
                instruction = str(stats.get("hlo_op") or kernel)
                if instruction in names or streams:
                    total[instruction] += int(event.duration_ns)
    return total


def place(path: str) -> str:
    """The innermost modules of a path, without what JAX wraps around them."""
    words = [w for w in path.split("/") if not re.match(r"jit\(|jvp\(|transpose\(|shard_map", w)]
    backward = "transpose(" in path
    return "/".join(words[:_DEPTH]) + (" (backward)" if backward else "")


def profile_training(report: Report, size: Sizes) -> None:
    name = main_detector(size)
    model = trained(name, size)
    seen = arguments(model, "train", batch_of(name, size.variant_batch, size))[1]
    program = compile_program(model.train, model.state, seen)
    side = our_side(model, "train", program, seen)
    seconds = time_sides({"ours": side}, size)["ours"].median
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_STEPS):
                side.wait(side.call())
        names = origins(program.run.as_text())
        taken = durations(Path(folder), names)
    total = sum(taken.values()) or 1
    report.line(
        title(name, "train", size.variant_batch),
        step_ms=1e3 * seconds,
        busy_ms=total / _STEPS / 1e6,
        operations=len(taken),
        ok=bool(taken),
    )
    places: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in taken.items():
        places[place(names.get(name, name))] += nanoseconds
    for kind, counter in (("in", places), ("operation", taken)):
        for name, nanoseconds in counter.most_common(_TOP):
            report.line(
                f"{kind} {name}",
                ms=nanoseconds / _STEPS / 1e6,
                share=nanoseconds / total,
                **({"from": names.get(name, "")} if kind == "operation" else {}),
            )


CASES = (Case("training step", 110, profile_training),)
