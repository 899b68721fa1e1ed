"""Converts checkpoints between PyTorch and JAX.

    python tools/convert.py to-jax Qwen2.5-Omni-7B model          # a PyTorch folder -> one that runs here
    python tools/convert.py to-hf model Qwen2.5-Omni-7B-trained   # and back
    python tools/convert.py to-peft runs/lora adapter             # the adapter of a run alone, for peft

PyTorch is not needed for either.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint import convert, export, peft
from omni_jax.errors import CheckpointError
from tools.command_errors import exit_on_error

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
    """Converts a Hugging Face folder into one that runs here.

    SRC is what the Hub or ``save_pretrained`` of transformers 4 or 5 gives: config.json, tokenizer.json, the
    preprocessor's configuration, the safetensors files and, for speech, spk_dict.pt. A Thinker that was saved alone
    converts too; ``save_pretrained`` of its processor writes the files that are missing beside it. (No release of
    transformers saves spk_dict.pt: copy it out of the published folder.)

    For text alone: ``to-jax SRC DST --components thinker``.

    Args:
      src: the folder to read.
      dst: where to; nothing may be there yet, and on failure nothing is.
      components: what to convert; all that the files hold if left out.
      dtype: what to cast the Thinker and the Talker to; they keep the dtype of the files if left out. Token2Wav always
        keeps it, because it needs float32.
      verify: compare the logits of the result with those of PyTorch, on a text, a sound and a picture. Needs torch
        and transformers, and memory for the model in float32.
    """
    # before the conversion, which takes minutes
    if verify:
        _check_that_verify_can_run(components)
    _convert_with_progress(
        dst, lambda progress: convert.to_jax(src, dst, components=components, dtype=dtype, progress=progress)
    )
    if verify:
        from tools.verify import verify as compare  # only here, because it imports PyTorch

        compare(src, dst)


def to_hf(src: Source, dst: Target) -> None:
    """Writes the Hugging Face folder of a checkpoint that runs here.

    DST is what PyTorch's Qwen2_5OmniForConditionalGeneration loads, in transformers 4 and 5. Tensors that were neither
    cast nor trained have the bits that they came with. A checkpoint with a Thinker and nothing else becomes a folder
    for Qwen2_5OmniThinkerForConditionalGeneration. An adapter of the checkpoint (LoRA) is merged.

    Args:
      src: the checkpoint: what to-jax wrote, or a checkpoint of a training run.
      dst: where to; nothing may be there yet, and on failure nothing is.
    """
    _convert_with_progress(dst, lambda progress: export.to_hf(src, dst, progress=progress))


def to_peft(src: Source, dst: Target) -> None:
    """Writes the adapter (LoRA) of a training run alone, as a folder of peft's.

    peft's ``PeftModel.from_pretrained`` loads DST for the PyTorch model that the run began from; ``serve.py --adapter``
    takes it too.

    Args:
      src: the folder of a run with --lora.rank, or one of its checkpoints.
      dst: where to; nothing may be there yet, and on failure nothing is.
    """
    adapter = peft.write_adapter(src, dst)
    print(f"{dst}: rank {adapter.rank}, {len(adapter.modules)} kinds of linear maps")


def _check_that_verify_can_run(components: tuple[Component, ...] | None) -> None:
    if components and "thinker" not in components:
        raise CheckpointError("--verify compares the Thinker, which --components leaves out")
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise CheckpointError(
                f"--verify compares with PyTorch, but {library} is not installed: pip install -e .[test]"
            )


def _convert_with_progress(dst: Path, convert_folder: Callable[[convert.Progress], convert.Conversion]) -> None:
    """Converts beside a progress bar, and prints components, sizes and time."""
    started = time.monotonic()
    columns = TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"), TimeRemainingColumn()
    with Progress(*columns) as bar:
        # not shown before the first tensor: an error of the checks is to stand alone
        task = bar.add_task("", total=None, visible=False)
        done = convert_folder(lambda n, total: bar.update(task, completed=n, total=total, visible=True))
    seconds = time.monotonic() - started
    # tensors are converted one at a time, so memory follows from the largest and not from the model
    promised = int(1.2 * done.largest) + 10**9
    print(f"{dst}: {', '.join(done.components)}; {done.tensors} tensors, {done.nbytes:,} bytes in {seconds:.1f} s")
    if done.left_out:
        print(f"left out: {', '.join(done.left_out)}, for which the published model has no place")
    print(f"peak host memory {_peak_memory():,} bytes; at most {promised:,} are promised here")


def _peak_memory() -> int:
    """The peak of this process's memory so far, in bytes.

    From Linux's account of this process: the one of ``getrusage`` includes the peak of the process that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; ``arguments`` are those of the process if None."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with something else
    commands = {"to-jax": to_jax, "to-hf": to_hf, "to-peft": to_peft}
    with exit_on_error():
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, args=arguments)


if __name__ == "__main__":
    main()
