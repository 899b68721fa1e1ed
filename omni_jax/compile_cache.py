"""Compiled programs that are kept on disk, so that the next start of a process does not compile them again."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_log = logging.getLogger("omni_jax")


def keep_compiled_programs(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Has this process keep what it compiles from here on, and look there before it compiles.

    A cache that has been chosen before stays: by an earlier call, ``jax_compilation_cache_dir`` or the variable
    JAX_COMPILATION_CACHE_DIR. ``jax_enable_compilation_cache`` switches every cache off.

    Args:
      folder: any, also in a bucket; ``default_folder`` if None. Whoever can write there can run code here.

    Returns:
      The folder that is used; None if there is none, because it cannot be made.
    """
    chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None and chosen:
        return chosen
    if folder is None:
        folder = default_folder()
        try:
            # for this user alone
            Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            _log.warning("compiled programs are not kept: %s: %s", folder, error.strerror or error)
            return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    compilation_cache.reset_cache()  # or one that is in use stays in use
    # small programs too: there are many of them, and each costs tracing besides
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _log.info("compiled programs are kept in %s", folder)
    return os.fspath(folder)


def default_folder() -> Path:
    """``~/.cache/omni_jax/compiled``, or the same below XDG_CACHE_HOME, with a folder for each kind of processor.

    Programs for a CPU use what that CPU can do, and a home may be shared by machines that differ.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "omni_jax" / "compiled" / _describe_processor()


def keep_programs_of_run(workdir: Path) -> str | None:
    """``keep_compiled_programs`` in the folder of a training run, where its restarts find them, on any machine.

    Returns:
      The folder that is used; another one if it has been chosen before.
    """
    chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return chosen or keep_compiled_programs(workdir / "compiled" / _describe_processor())


@functools.cache
def _describe_processor() -> str:
    machine = os.uname().machine
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return machine
    # of the first core: what it is able to do
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{machine}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"
