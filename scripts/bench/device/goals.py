"""What is aimed at on an H100, and whether the figures of a run reach it."""

from collections.abc import Iterator, Mapping
from typing import Any

_TRAIN_RATE = 160.0  # images a second; MLPerf's tuned Mask R-CNN reaches 182
_TRAIN, _INFERENCE, _KERNEL = 1.5, 2.0, 1.0  # speed-ups over torchvision


def judge(parts: Mapping[str, Any]) -> list[str]:
    """One line a goal that was measured."""
    lines = dict(_lines(parts.get("fast", {"cases": {}})))
    goals = []
    for name, figures in lines.items():
        if "speed_up" in figures:
            goal = _INFERENCE if ", inference, " in name else _KERNEL
            goal = _TRAIN if ", train, " in name else goal
            goals.append(_line(f"{name}: speed-up", figures["speed_up"], goal))
    rates = [
        figures["images_per_second"]
        for name, figures in lines.items()
        if name.startswith("R50-FPN, train, ") and "images_per_second" in figures
    ]
    if rates:
        goals.append(_line("R50-FPN: images a second of training", max(rates), _TRAIN_RATE))
    return goals


def _lines(part: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for case in part["cases"].values():
        for line in case["lines"]:
            yield line["name"], line


def _line(name: str, found: float, goal: float) -> str:
    return f"{name} {found:.3g}, {'reaches' if found >= goal else 'misses'} {goal:g}"
