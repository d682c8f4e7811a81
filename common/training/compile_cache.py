"""Compiled programs are kept on disk for the next start, which would wait a minute for them."""

import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def use_compile_cache() -> None:
    """Keeps programs in `default_folder`, unless JAX has been told another place.

    JAX_COMPILATION_CACHE_DIR=FOLDER in the environment chooses the folder; empty, nothing is kept.
    """
    if _VARIABLE in os.environ or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(default_folder()))
    compilation_cache.reset_cache()  # what was compiled before had none, which JAX remembers


def default_folder() -> Path:
    """~/.cache/openimages-detection/compiled/CPU, below XDG_CACHE_HOME if that is set.

    Each kind of processor has its own: machines that share a home folder cannot run one another's
    programs.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "openimages-detection" / "compiled" / _processor()


def _processor() -> str:
    """A short name for what this processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    abilities = [line for line in lines if line.startswith(("flags", "Features"))][:1] or lines[:1]
    digest = hashlib.sha256(" ".join(abilities).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{digest}"
