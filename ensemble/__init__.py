"""Ensembles: `merge_arrays` merges in memory; commands are `python -m ensemble.COMMAND`."""

from typing import TYPE_CHECKING, Any

from common.io.early_answers import answer

if TYPE_CHECKING:
    from ensemble.arrays import merge_arrays, merge_batch

__all__ = ["merge_arrays", "merge_batch"]

answer(__name__)


def __getattr__(name: str) -> Any:
    """Imports JAX only for those who merge arrays: commands answer before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ensemble import arrays

    return getattr(arrays, name)
