"""Converts checkpoints.

``python tools/convert.py to-jax SRC DST`` makes of a PyTorch folder one that runs here, ``to-hf SRC DST`` the way back.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint import convert, export
from omni_jax.errors import CheckpointError, ConfigError

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
Component = Literal["thinker", "talker", "token2wav"]


def to_jax(
    src: Source,
    dst: Target,
    components: tuple[Component, ...] | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None,
    verify: bool = False,
) -> None:
    """Converts a Hugging Face folder. PyTorch is not needed, but for --verify.

    Args:
      src: the folder, with config.json, tokenizer.json, the safetensors files and, for speech, spk_dict.pt.
      dst: where to; nothing may be there yet, and on failure nothing is.
      components: what to convert; without it, all that the files hold.
      dtype: what to cast the Thinker and the Talker to; without it, they keep the dtype of the files. Token2Wav always
        keeps it, because it needs float32.
      verify: compare the logits of the result with those of PyTorch, on a text, a sound and a picture. Needs torch
        and transformers, and memory for the model in float32.
    """
    if verify:
        _check_that_verify_can_run(components)
    _report(dst, lambda progress: convert.to_jax(src, dst, components=components, dtype=dtype, progress=progress))
    if verify:
        from tools.verify import verify as compare  # only here, because it brings PyTorch in

        compare(src, dst)


def to_hf(src: Source, dst: Target) -> None:
    """Writes the Hugging Face folder of a checkpoint that runs here, for PyTorch. PyTorch is not needed.

    Args:
      src: the checkpoint, with Thinker, Talker and Token2Wav.
      dst: where to; nothing may be there yet, and on failure nothing is.
    """
    _report(dst, lambda progress: export.to_hf(src, dst, progress=progress))


def _check_that_verify_can_run(components: tuple[Component, ...] | None) -> None:
    if components and "thinker" not in components:
        raise CheckpointError("--verify compares the Thinker, which --components leaves out")
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise CheckpointError(
                f"--verify compares with PyTorch, but {library} is not installed: pip install -e .[test]"
            )


def _report(dst: Path, work: Callable[[convert.Progress], convert.Conversion]) -> None:
    """Does the work with a bar of its progress, and prints what it came to."""
    started = time.monotonic()
    columns = TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"), TimeRemainingColumn()
    with Progress(*columns) as bar:
        task = bar.add_task("", total=None, visible=False)
        done = work(lambda n, total: bar.update(task, completed=n, total=total, visible=True))
    seconds = time.monotonic() - started
    print(f"{dst}: {', '.join(done.components)}; {done.tensors} tensors, {done.nbytes:,} bytes in {seconds:.1f} s")
    print(f"peak host memory {_peak_memory():,} bytes; at most {int(1.2 * done.largest) + 10**9:,} are promised here")


def _peak_memory() -> int:
    """The most bytes of memory this process has had at a time.

    From Linux's account of this process: the one of ``getrusage`` also counts what its parent had when it started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with something else
    try:
        tyro.extras.subcommand_cli_from_dict({"to-jax": to_jax, "to-hf": to_hf}, description="Converts checkpoints.")
    except (CheckpointError, ConfigError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
