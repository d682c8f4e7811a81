"""Detectors: `detection.load` opens a trained one; commands are `python -m detection.COMMAND`."""

from typing import TYPE_CHECKING, Any

from common.io.early_answers import answer

if TYPE_CHECKING:
    from detection.detector import Detector
    from detection.loading import load
    from detection.result import Result

__all__ = ["Detector", "Result", "load"]

answer(__name__)


def __getattr__(name: str) -> Any:
    """Imports JAX and the models only for those who ask for them: commands answer before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detection import detector, loading

    return loading.load if name == "load" else getattr(detector, name)
