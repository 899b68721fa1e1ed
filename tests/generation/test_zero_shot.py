"""Speech that goes on from a clip and its text, on a small random model, with codes that a table gives."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import omni_jax
from omni_jax import SPEECH_SYSTEM_PROMPT, ClonedVoice
from omni_jax.checkpoint.store import ABOUT_FILE, Leaf, save
from omni_jax.config import OmniConfig
from omni_jax.engine.request import SchedulerConfig
from omni_jax.engine.speech_tokenizer_engine import SpeechTokenizerEngine
from omni_jax.engine.talker_engine import CLIP_CODES_PER_CALL, CLIP_ROWS
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from omni_jax.models import speech_tokenizer
from omni_jax.models.speech_tokenizer import SpeechTokenizer
from omni_jax.processing.speech_mel import RATE
from omni_jax.processing.voice_clip import read_clip
from omni_jax.speech_tokenizer_config import SPEECH_TOKENIZER, SPEECH_TOKENIZER_FILE, SpeechTokenizerConfig
from tests.engine.speaking import suppress_ends
from tests.generation.test_cloned_voice import SPEECH, TOLERANCE, MeanSpectrum, assert_same

SPEAK: dict[str, Any] = dict(max_tokens=12, modalities=("text", "audio"))
SPEAK["talker"] = dict(max_tokens=30, temperature=0.3, top_k=0, top_p=1.0)
QUESTIONS = [
    [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, {"role": "user", "content": text}]
    for text in ("hello", "a longer question " * 8, "and a third")
]
CODES_PER_SECOND = 50
# a stream's blocks see one block ahead, which whole replies do not end at (docs/streaming.md)
STREAM_TOLERANCE = 1e-2


class CountedTokenizer:
    """Codes that depend on the loudness of each 20 ms; counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def encode(self, sounds: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.num_calls += 1
        return [self.encode_one(samples) for samples in sounds]

    def encode_one(self, samples: np.ndarray) -> np.ndarray:
        count = len(samples) * CODES_PER_SECOND // RATE
        loudness = np.abs(samples[: count * RATE // CODES_PER_SECOND]).reshape(count, -1).mean(axis=1)
        return (1000 * loudness).astype(np.int64) % 65


class FixedTokenizer:
    """Codes that are given."""

    def __init__(self, codes: np.ndarray) -> None:
        self.codes = codes

    def encode(self, sounds: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.codes] * len(sounds)


@pytest.fixture(scope="module")
def tokenizer() -> CountedTokenizer:
    return CountedTokenizer()


@pytest.fixture(scope="module")
def model(tiny_model: Path, tokenizer: CountedTokenizer) -> OmniModel:
    """It ends no speech by itself, so that each has codes to compare."""
    loaded = omni_jax.load(tiny_model)
    assert loaded.engines.talker is not None
    suppress_ends(loaded.engines.talker, loaded.config)
    return OmniModel(loaded.config, loaded.processor, loaded.engines, loaded.voices, MeanSpectrum(), tokenizer)


def make_clip(seconds: float, text: str = "a few words", **options: Any) -> ClonedVoice:
    samples = np.random.default_rng(int(100 * seconds)).standard_normal(int(seconds * RATE)) * 0.1
    # louder and softer, so that its codes are many
    samples *= 1 + np.sin(np.arange(len(samples)) / 2000)
    return ClonedVoice(samples, text, sampling_rate=RATE, **options)


# fewer codes than rows of text, more of them, and more than a call takes
CLIPS = [make_clip(1.0, "word " * 16), make_clip(1.5), make_clip(3.2, "some words that are spoken")]


def test_replies_together_equal_single_ones(model: OmniModel) -> None:
    assert 3.2 * CODES_PER_SECOND > CLIP_CODES_PER_CALL
    for clip in (CLIPS[0], CLIPS[2]):
        single = [model.generate(question, **SPEAK, voice=clip) for question in QUESTIONS]
        together = model.generate_batch(QUESTIONS, **SPEAK, voice=clip)
        for reply, other in zip(together, single, strict=True):
            assert_same(reply, other, TOLERANCE)
        assert [len(reply.codec_ids) for reply in single] == [30] * 3


def test_unlike_clips_share_a_scheduler(model: OmniModel) -> None:
    """Slots with clips of unequal length, with a named voice and without one, each as alone."""
    voices = [CLIPS[0], None, CLIPS[2], "Ethan", CLIPS[1]]
    alone = [model.generate(QUESTIONS[i % 3], **SPEAK, voice=voice) for i, voice in enumerate(voices)]
    scheduler = model.scheduler(SchedulerConfig(4, 4, (32,)))
    states = {}
    for i, voice in enumerate(voices):
        options = Options.create(**SPEAK, voice=voice)
        states[model.submit(scheduler, model.processor(QUESTIONS[i % 3]), options)] = i
    found = {states[state]: event.reply for state, event in scheduler.run() if event.reply is not None}
    for i, reply in enumerate(alone):
        assert_same(found[i], reply, TOLERANCE)
    assert len({reply.codec_ids for reply in alone}) == len(alone)


def test_a_stream_equals_the_reply(model: OmniModel) -> None:
    # a stop string makes the host count what is spoken
    for clip, options in ((CLIPS[0], {}), (CLIPS[2], {}), (CLIPS[0], {"stop": "\N{SNOWMAN}"})):
        reply = model.generate(QUESTIONS[1], **SPEAK, voice=clip)
        *events, last = model.stream(QUESTIONS[1], **SPEAK, **options, voice=clip)
        assert last.reply is not None
        assert_same(last.reply, reply, STREAM_TOLERANCE)
        pieces = [event.audio for event in (*events, last) if event.audio is not None]
        np.testing.assert_array_equal(np.concatenate(pieces), last.reply.audio)


def test_speech_begins_before_a_long_text_ends(model: OmniModel) -> None:
    """The clip's codes take rows of the reply; with more of them than the text has yet, it waits."""
    clip = CLIPS[0]
    codes_before_end = 0
    finished = False
    for event in model.stream(QUESTIONS[0], **{**SPEAK, "max_tokens": 120}, voice=clip):
        finished = finished or event.reply is not None
        codes_before_end += 0 if event.audio is None or finished else len(event.audio)
    whole = model.generate(QUESTIONS[0], **{**SPEAK, "max_tokens": 120}, voice=clip)
    assert whole.audio is not None and codes_before_end > 0


def test_the_text_is_the_same_whoever_speaks(model: OmniModel) -> None:
    texts = {model.generate(QUESTIONS[0], **SPEAK, voice=voice).text for voice in (None, *CLIPS)}
    assert len(texts) == 1


def test_the_codes_of_the_clip_count(model: OmniModel) -> None:
    """What its text and the token do to the next logits, tests/engine/test_talker_clips.py has."""
    clip = CLIPS[1]
    voices = (clip, clip.without_text(), make_clip(1.6))
    assert len({model.generate(QUESTIONS[0], **SPEAK, voice=voice).codec_ids for voice in voices}) == len(voices)


def test_a_clip_is_read_once(model: OmniModel, tokenizer: CountedTokenizer) -> None:
    before = tokenizer.num_calls
    clip = ClonedVoice(SPEECH, "what it says")
    for question in QUESTIONS:
        model.generate(question, **SPEAK, voice=clip)
    model.generate_batch(QUESTIONS, **SPEAK, voice={"ref_audio": str(SPEECH), "ref_text": "what it says"})
    assert tokenizer.num_calls == before + 1
    # sound alone needs no codes of the clip
    model.synthesize([1, 2], voice=dataclasses.replace(clip, ref_text="something else"))
    assert tokenizer.num_calls == before + 1


def test_a_reply_of_one_token_is_silent(model: OmniModel) -> None:
    reply = model.generate(QUESTIONS[0], **{**SPEAK, "max_tokens": 1}, voice=CLIPS[0])
    assert reply.codec_ids == () and reply.audio is not None and not len(reply.audio)


def test_a_text_that_is_too_long(model: OmniModel) -> None:
    message = re.escape(f"the text of the clip has 400 tokens; at most {CLIP_ROWS} are taken")
    with pytest.raises(InputError, match=message):
        model.generate(QUESTIONS[0], **SPEAK, voice=make_clip(1.0, "a" * 400))


def write_speech_tokenizer(folder: Path) -> Path:
    """A checkpoint of a random speech tokenizer alone."""
    config = SpeechTokenizerConfig.tiny()
    params = nn.unbox(speech_tokenizer.init_params(SpeechTokenizer(config), jax.random.key(0)))
    leaves = []
    for path, value in flatten_dict(params).items():
        array = np.asarray(value)
        leaves.append(
            Leaf((SPEECH_TOKENIZER, *path), array.shape, array.dtype, False, lambda array=array: iter([array]))
        )

    def write_beside(unfinished: Path) -> None:
        OmniConfig.tiny().save(unfinished)
        (unfinished / SPEECH_TOKENIZER_FILE).write_text(config.to_json())

    save(folder, leaves, write_beside)
    return folder


def test_a_speech_tokenizer_of_another_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_speech_tokenizer(tmp_path / "tokenizer")
    loaded = omni_jax.load(tiny_model, speech_tokenizer=folder)
    voice = ClonedVoice(SPEECH, "what it says", speaker_vector=[1.0] + [0.0] * 11)
    engine = SpeechTokenizerEngine.load(folder)
    (codes,) = engine.encode([read_clip(SPEECH).recording])
    assert len(set(codes.tolist())) > 1
    # the same codes from a table
    table = OmniModel(loaded.config, loaded.processor, loaded.engines, loaded.voices, None, FixedTokenizer(codes))
    assert_same(loaded.generate(QUESTIONS[0], **SPEAK, voice=voice), table.generate(QUESTIONS[0], **SPEAK, voice=voice))
    with pytest.raises(CheckpointError, match=r"has no speech_tokenizer\.json"):
        omni_jax.load(tiny_model, speech_tokenizer=tiny_model)


def test_a_speech_tokenizer_of_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """As the checkpoints of training runs have it."""
    folder = write_speech_tokenizer(tmp_path / "tokenizer")
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.copytree(folder / "params" / SPEECH_TOKENIZER, model / "params" / SPEECH_TOKENIZER)
    shutil.copy(folder / SPEECH_TOKENIZER_FILE, model)
    about = json.loads((model / ABOUT_FILE).read_text())
    about["components"][SPEECH_TOKENIZER] = ["float32"]
    (model / ABOUT_FILE).write_text(json.dumps(about))
    loaded = omni_jax.load(model)
    voice = ClonedVoice(SPEECH, "what it says", speaker_vector=[1.0] + [0.0] * 11)
    assert loaded.generate(QUESTIONS[0], **SPEAK, voice=voice).audio is not None
    # text alone needs no codes
    assert omni_jax.load(model, components=("thinker",)).generate(QUESTIONS[0], max_tokens=2).token_ids
