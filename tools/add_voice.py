"""Adds a voice to a converted checkpoint, or removes one.

    python tools/add_voice.py out/7b --name Ada --audio ada.wav --text "What the clip says." \
        --consent "Ada Example agreed in writing on 2026-11-02 to ..." --speaker-model campplus.onnx --like Chelsie
    python tools/add_voice.py out/7b --name Ada --remove

Whose voice may be added, and what the statement has to say: docs/responsible-use.md. The statement is written beside
the voice, into voices.consent.json, and removed with it. The other voices keep every bit.
"""

from __future__ import annotations

import datetime
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from jaxtyping import Float

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint import voice_edits
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checkpoint.voice_edits import VoiceRecord
from omni_jax.checkpoint.voice_recipe import check_recipe
from omni_jax.checkpoint.voices import Voice, choose
from omni_jax.checks import printable
from omni_jax.config import OmniConfig
from omni_jax.engine.speaker_engine import SpeakerEngine
from omni_jax.errors import InputError
from omni_jax.generation.components import load_speaker_model
from omni_jax.processing.speaker_vectors import normalize_vector
from omni_jax.processing.voice_clip import VoiceClip, read_clip
from omni_jax.speaker_verifier_config import SPEAKER_VERIFIER
from tools.command_errors import exit_on_error


@dataclass(frozen=True)
class Options:
    """A voice, and where it comes from."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A converted checkpoint; or a training run's folder, whose last one it is."""
    name: str
    """What requests call the voice."""
    audio: Annotated[Path | None, tyro.conf.arg(metavar="CLIP.wav")] = None
    """One to thirty seconds of it, with nobody else and no music."""
    text: str | None = None
    """What the clip says, word for word."""
    consent: str | None = None
    """Who agreed to this voice, when, and to what."""
    speaker_vector: Annotated[Path | None, tyro.conf.arg(metavar="FILE.npy")] = None
    """The speaker vector, an array of numbers; it is scaled to length 1."""
    speaker_model: Annotated[Path | None, tyro.conf.arg(metavar="FILE.onnx|DIR")] = None
    """A network that makes it of the clip: CAM++, which needs pip install -e '.[onnx]'; or a checkpoint of a run of
    speaker-verifier. Without any, that of MODEL, if it has one."""
    no_speaker_vector: bool = False
    """Zeros in place of the vector, for a Token2Wav that was trained on rows without any."""
    like: str | None = None
    """The voice whose manner of speaking the Talker is to take: the new one has its token. The default voice if left
    out."""
    own_token: bool = False
    """Give the voice a token of its own, which the Talker must then be trained with."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write a new checkpoint, whose parameters are hard links; MODEL is changed in place if left out."""
    remove: bool = False
    """Remove the voice and its statement instead."""


class SpeakerVector(NamedTuple):
    """Of a clip.

    Attributes:
      numbers: of length 1; or zeros.
      source: where they came from, for the record; None: they are zeros.
    """

    numbers: Float[np.ndarray, " width"]
    source: str | None


def make_vector(options: Options, clip: VoiceClip, config: OmniConfig) -> SpeakerVector:
    """The speaker vector of a clip: a file's, or what a network makes of the clip.

    Raises:
      InputError: if the options do not say where it is to come from, or the clip gives none.
      CheckpointError, ConfigError: if it cannot be had from there.
    """
    width = config.token2wav_config.dit_config.enc_emb_dim
    sources = (options.speaker_vector is not None, options.speaker_model is not None, options.no_speaker_vector)
    one_of = "give one of --speaker-vector, --speaker-model and --no-speaker-vector"
    if sum(sources) > 1:
        raise InputError(one_of)
    if options.no_speaker_vector:
        return SpeakerVector(np.zeros(width, np.float32), None)
    if options.speaker_vector is not None:
        path = options.speaker_vector
        return SpeakerVector(normalize_vector(read_vector(path), width, str(path)), path.name)
    model = load_speaker_model(resolve_checkpoint(options.model), config, options.speaker_model)
    if model is None:
        raise InputError(f"{one_of}: {options.model} has no speaker verifier of its own")
    vector = model(clip.samples)
    if isinstance(model, SpeakerEngine):
        return SpeakerVector(vector, f"{SPEAKER_VERIFIER} {model.fingerprint}")
    assert options.speaker_model is not None
    return SpeakerVector(vector, options.speaker_model.name)


def make_voice(
    options: Options, clip: VoiceClip, vector: SpeakerVector, voices: Mapping[str, Voice], config: OmniConfig
) -> Voice:
    """The voice of a clip.

    Raises:
      InputError: if the options do not say where its token is to come from.
      CheckpointError: if it cannot be had.
    """
    if options.own_token and options.like is not None:
        raise InputError("--like takes the token of another voice, and --own-token takes none; give one of them")
    if not voices and not options.own_token:
        raise InputError(f"{options.model} has no voice yet that this one could begin like; give --own-token")
    if options.own_token:
        token = voice_edits.choose_token(resolve_checkpoint(options.model), voices, config)
    else:
        token = choose(voices, options.like).bos_token
    return Voice(options.name, token, vector.numbers[None], clip.mel[None])


def read_vector(path: Path) -> np.ndarray:
    """An array in a file of numpy's; one axis of length 1 before the numbers is taken off.

    Raises:
      InputError: if it is none.
    """
    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"--speaker-vector {path} is no array of numpy's: {e}") from e
    if not isinstance(vector, np.ndarray):
        raise InputError(f"--speaker-vector {path} holds several arrays; give one")
    return vector[0] if vector.ndim == 2 and len(vector) == 1 else vector


def make_record(
    options: Options, clip: VoiceClip, vector: SpeakerVector, voice: Voice, voices: Mapping[str, Voice]
) -> VoiceRecord:
    assert options.audio is not None and options.text is not None and options.consent is not None
    return VoiceRecord(
        consent=options.consent,
        text=options.text,
        clip=options.audio.name,
        clip_sha256=hashlib.sha256(options.audio.read_bytes()).hexdigest(),
        seconds=round(clip.seconds, 3),
        bos_token=voice.bos_token,
        like=None if options.own_token else choose(voices, options.like).name,
        speaker_vector=vector.source,
        added=datetime.date.today().isoformat(),
    )


def check_options(options: Options) -> None:
    """Checks what is needed for a voice to be added.

    Raises:
      InputError: for what is missing.
    """
    if not (options.consent or "").strip():
        raise InputError(
            "no voice is added without the consent of the person whose voice it is: --consent with who agreed, when, "
            "and to what (docs/responsible-use.md)"
        )
    if options.audio is None or not (options.text or "").strip():
        raise InputError("give the clip, --audio CLIP.wav, and what it says, --text")


def run(options: Options) -> str:
    """Does what the options say; returns what to print.

    Raises:
      CheckpointError, ConfigError, InputError: if it cannot be done; the checkpoint is then as it was.
    """
    folder = resolve_checkpoint(options.model)
    target = options.out or folder
    if options.remove:
        voice_edits.remove_voice(folder, options.name, options.out)
        return f"{target}: {options.name} and what was stated of it are removed"
    check_options(options)
    voices = voice_edits.read_voices(folder)
    config = OmniConfig.load(folder)
    try:
        clip = read_clip(options.audio)
    except InputError as e:
        raise InputError(f"--audio {options.audio}: {e}") from e
    vector = make_vector(options, clip, config)
    voice = make_voice(options, clip, vector, voices, config)
    record = make_record(options, clip, vector, voice, voices)
    voice_edits.add_voice(folder, voice, record, options.out)
    lines = [f"{target}: {voice.name} added, token {voice.bos_token}, a clip of {clip.seconds:.2f} s"]
    for finding in check_recipe(voice, config):
        if not finding.fits:
            lines.append(f"{finding.part} is {finding.found}; the recipe has {finding.expected}")
    if options.own_token:
        lines.append("the embedding of this token is untrained: train the Talker with rows of this voice")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; ``arguments`` are those of the process if None."""
    options = tyro.cli(Options, description=__doc__, args=arguments)
    with exit_on_error():
        print(printable(run(options)))


if __name__ == "__main__":
    main()
