"""The report of a plan as a page for people."""

from typing import Any

from common.training.pod.topologies import GIB


def print_report(report: dict[str, Any]) -> None:
    """The report as a page for people."""
    height, width = report["canvas"]
    print(
        f"{report['config']} on {report['slice']}: {report['devices']} devices x "
        f"{report['images_per_device']} images of {height}x{width}, {report['num_classes']} "
        f"classes, {report['parameters'] / 1e6:.1f} M parameters"
    )
    names = ", ".join(f"{h}x{w}" for h, w in report["canvases"])
    print(f"  programs of the run: {names}; the figures are those of {height}x{width}")
    print_prediction(report)
    if "memory_bytes" in report:
        print_program(report)


def print_prediction(report: dict[str, Any]) -> None:
    """Times, which are computed and not measured."""

    def span(values, unit: str = "") -> str:
        return f"{values[0]:.3g} to {values[1]:.3g}{unit}"

    bound, (low, high) = report["bound_seconds"], report["step_seconds"]
    parts = sorted(bound.items(), key=lambda item: -item[1])
    print(f"  compute {report['flops_per_image'] / 1e12:.3f} TFLOP per image")
    print(f"  step at best {1000 * sum(bound.values()):.1f} ms by the roofline")
    for name, seconds in parts:
        print(f"    {name:<30}{1000 * seconds:8.2f} ms")
    print(
        f"  step expected {span((1000 * low, 1000 * high), ' ms')}: "
        f"{span([100 * x for x in report['mfu']], ' %')} of the peak, "
        f"{span(report['images_per_second'])} images/s"
    )
    per_host = [rate / report["hosts"] for rate in report["images_per_second"]]
    cores = [rate / report["images_per_core"] for rate in per_host]
    print(
        f"  input {span(per_host)} images/s a host: {span(cores)} cores at "
        f"{report['images_per_core']:g} images/s each (scripts.bench.bench_input measures it)"
    )
    size = report["checkpoint_bytes"] / 1e9
    print(
        f"  checkpoint {size:.2f} GB: {size / report['storage_rate']:.1f} s at "
        f"{report['storage_rate']:g} GB/s, beside the steps"
    )
    hours = [report["steps"] * seconds / 3600 for seconds in (low, high)]
    chip_hours = [report["chips"] * h for h in hours]
    cost = f", cost {span([report['price'] * h for h in chip_hours])}" if report["price"] else ""
    kind = "" if (every := report["steps_of_run"]) == report["steps"] else f" of {every}"
    print(
        f"  schedule {report['steps']} steps{kind}: {span(hours, ' h')}, "
        f"{span(chip_hours)} chip-hours{cost}"
    )


def print_program(report: dict[str, Any]) -> None:
    """What the compiled program needs."""
    for name, size in report["memory_bytes"].items():
        print(f"  memory {name:<12}{size / GIB:8.3f} GiB per device")
    headroom = report["hbm_bytes"] - report["memory_bytes"]["total"]
    print(
        f"  memory {'headroom':<12}{headroom / GIB:8.3f} GiB under "
        f"{report['hbm_bytes'] / GIB:.0f} GiB"
    )
    if report["collectives_of"] == "lowered":
        print("  traffic as the program asks for it (this jaxlib cannot read what libtpu made):")
    for c in report["collectives"]:
        print(
            f"  traffic {c['kind']} {c['dtype']}: {c['count']} arrays, {c['bytes'] / 1e6:.3f} MB, "
            f"largest {c['largest']}"
        )
    print(f"  compiled in {report['compile_seconds']:.0f} s")
    if tried := [str(trial["images_per_device"]) for trial in report.get("search", [])]:
        print(
            f"  largest batch {report['images_per_device']} a device, of {', '.join(tried)} tried"
        )
