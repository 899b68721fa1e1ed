"""Writes what a training run has made as a checkpoint to hand on: some components, cast, without the state of the run.

    python tools/pack_checkpoint.py out/omni-tiny/pretrain2 checkpoints/omni-tiny --dtype bfloat16

With ``--thinker`` the Thinker is that of another checkpoint: what speaks and what understands may be trained apart;
with ``--decoder`` its language model alone is, and the encoders stay. With ``--token2wav`` Token2Wav is that of another
one, and so is how its flow is integrated: codes and what becomes of them may be trained apart, too. With
``--average-talker`` the Talker is the mean of the run's and of another one's: half way back to the one that preference
training began from, what that training cost comes back and most of its gain stays (weight-space ensembles,
https://arxiv.org/abs/2109.01903). All components are cast, those of speech too. Compare what the copy answers with what
the run's checkpoint answers (``tools/score_world.py``, ``tools/measure_speech.py``) before it is handed on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint import store
from omni_jax.checkpoint.model_files import TOKEN2WAV_FILE, TOKENIZER_FILE
from omni_jax.checkpoint.train_checkpoints import RUN_FILES, resolve_checkpoint
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.plain_files import copy_file, has_file
from omni_jax.training.optimizer import flatten_params
from tools.command_errors import exit_on_error


@dataclass(frozen=True)
class Options:
    """What to read and write."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A checkpoint, or the folder of a run, whose latest is taken."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Where to; nothing may be there yet."""
    components: tuple[str, ...] = ()
    """What to keep; all but discriminators if nothing is said."""
    thinker: Path | None = None
    """A checkpoint of the same config and vocabulary, or the folder of a run, whose Thinker is taken instead."""
    decoder: Path | None = None
    """The same, of which the Thinker's language model alone is taken instead."""
    token2wav: Path | None = None
    """A checkpoint of the same config, or the folder of a run, whose Token2Wav is taken instead."""
    average_talker: Path | None = None
    """A checkpoint of the same config, or the folder of a run, whose Talker is averaged with that of SRC."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """What all of it is cast to; it keeps its own if left out."""


def pack_checkpoint(options: Options) -> int:
    """Writes the copy; returns the bytes of its arrays.

    Raises:
      CheckpointError, ConfigError: if a source is no checkpoint or has no such component, the Thinkers differ in config
        or vocabulary, Talkers or Token2Wav in config, or the target exists.
    """
    source = resolve_checkpoint(options.source)
    found = store.components(source)
    wanted = options.components or tuple(name for name in found if name != "discriminators")
    params = dict(store.load(source, wanted))
    if options.thinker is not None:
        params["thinker"] = _load_thinker(source, options.thinker)
    if options.decoder is not None:
        params["thinker"] = {**params["thinker"], "decoder": _load_thinker(source, options.decoder)["decoder"]}
    token2wav = source
    if options.token2wav is not None:
        token2wav = resolve_checkpoint(options.token2wav)
        _check_same_token2wav(source, token2wav)
        params["token2wav"] = store.load(token2wav, ["token2wav"])["token2wav"]
    if options.average_talker is not None:
        params["talker"] = _average_talkers(source, resolve_checkpoint(options.average_talker))
    leaves = []
    for component, tree in params.items():
        for path, array in flatten_params(tree).items():
            leaves.append(_make_leaf((component, *path.split("/")), array, options.dtype))

    def write_beside(folder: Path) -> None:
        for path in sorted(source.iterdir()):
            if has_file(path) and path.name not in (*RUN_FILES, store.ABOUT_FILE, TOKEN2WAV_FILE):
                copy_file(path, folder / path.name)
        # of the published flow there is none
        if has_file(token2wav / TOKEN2WAV_FILE):
            copy_file(token2wav / TOKEN2WAV_FILE, folder / TOKEN2WAV_FILE)

    store.save(options.target, leaves, write_beside)
    return sum(leaf.nbytes for leaf in leaves)


def _load_thinker(source: Path, other: Path) -> Any:
    """The Thinker of another checkpoint, which can stand in the place of that of ``source``."""
    folder = resolve_checkpoint(other)
    _check_same_thinker(source, folder)
    return store.load(folder, ["thinker"])["thinker"]


def _check_same_thinker(source: Path, other: Path) -> None:
    """Raises CheckpointError if one's Thinker cannot stand in the other's place."""
    if OmniConfig.load(source).thinker_config != OmniConfig.load(other).thinker_config:
        raise CheckpointError(f"the Thinker of {other} is of another config than that of {source}")
    if (source / TOKENIZER_FILE).read_bytes() != (other / TOKENIZER_FILE).read_bytes():
        raise CheckpointError(f"{other} has another {TOKENIZER_FILE} than {source}")


def _check_same_token2wav(source: Path, other: Path) -> None:
    """Raises CheckpointError if one's Token2Wav cannot stand in the other's place."""
    if OmniConfig.load(source).token2wav_config != OmniConfig.load(other).token2wav_config:
        raise CheckpointError(f"the Token2Wav of {other} is of another config than that of {source}")


def _average_talkers(source: Path, other: Path) -> Any:
    """The mean of two Talkers, in float32.

    Raises:
      CheckpointError: if their configs differ, or one has none.
    """
    if OmniConfig.load(source).talker_config != OmniConfig.load(other).talker_config:
        raise CheckpointError(f"the Talker of {other} is of another config than that of {source}")
    talkers = [store.load(folder, ["talker"])["talker"] for folder in (source, other)]
    return jax.tree.map(lambda a, b: (a.astype(jnp.float32) + b.astype(jnp.float32)) / 2, *talkers)


def _make_leaf(path: tuple[str, ...], array: jax.Array, dtype: str | None) -> store.Leaf:
    cast = np.asarray(array if dtype is None else array.astype(jnp.dtype(dtype)))

    def read() -> Iterator[np.ndarray]:
        yield cast

    return store.Leaf(path, cast.shape, cast.dtype, stacked=False, read=read)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with exit_on_error():
        num_bytes = pack_checkpoint(options)
    print(f"{options.target}: {num_bytes / 2**20:.1f} MiB of parameters")


if __name__ == "__main__":
    main()
