"""Voices that requests bring along as clips, on a small random model without a speech tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax import SPEECH_SYSTEM_PROMPT, ClonedVoice
from omni_jax.checkpoint.voices import Voice
from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import MAX_CLIPS, SpeakerTable
from omni_jax.generation.model import OmniModel
from omni_jax.processing.speech_mel import RATE
from omni_jax.processing.voice_clip import make_clip, read_clip

MEDIA = Path(__file__).parents[1] / "media"
SPEECH = MEDIA / "speech.wav"
SPEAK: dict[str, Any] = dict(max_tokens=8, modalities=("text", "audio"))
SPEAK["talker"] = dict(max_tokens=24, temperature=0.3, top_k=0, top_p=1.0)
QUESTIONS = [
    [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, {"role": "user", "content": text}]
    for text in ("hello", "a longer question " * 8, "and a third")
]
# float32 through 36 evaluations and the vocoder's waves, summed in another order for another batch
TOLERANCE = 1e-3


class MeanSpectrum:
    """A speaker model: the mean of the first bins of the mel."""

    width = 12

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        self.num_calls += 1
        vector = make_clip(samples).mel.mean(axis=0)[: self.width]
        return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture(scope="module")
def speaker_model() -> MeanSpectrum:
    return MeanSpectrum()


@pytest.fixture(scope="module")
def model(tiny_model: Path, speaker_model: MeanSpectrum) -> OmniModel:
    """With a voice, Ada, that was made of the clip by hand, and begins like Ethan."""
    loaded = omni_jax.load(tiny_model)
    clip = read_clip(SPEECH)
    ada = Voice("Ada", loaded.voices["Ethan"].bos_token, speaker_model(clip.samples)[None], clip.mel[None])
    voices = {**loaded.voices, "Ada": ada}
    return OmniModel(loaded.config, loaded.processor, loaded.engines, voices, speaker_model)


def assert_same(reply: Any, other: Any, tolerance: float = 0.0) -> None:
    assert (reply.token_ids, reply.codec_ids, len(reply.audio)) == (other.token_ids, other.codec_ids, len(other.audio))
    assert np.abs(reply.audio - other.audio).max(initial=0) <= tolerance


def test_a_clip_of_a_voice_is_spoken_as_the_voice(model: OmniModel) -> None:
    named = model.generate(QUESTIONS[0], **SPEAK, voice="Ada")
    assert named.audio is not None and len(named.audio)
    for voice in (ClonedVoice(SPEECH, like="Ethan"), {"ref_audio": str(SPEECH), "like": "Ada"}):
        assert_same(model.generate(QUESTIONS[0], **SPEAK, voice=voice), named)
    # of another one, only the timbre changes
    ethan = model.generate(QUESTIONS[0], **SPEAK, voice="Ethan")
    assert ethan.codec_ids == named.codec_ids and ethan.audio is not None
    assert np.abs(ethan.audio - named.audio).max() > TOLERANCE
    # the default voice is Chelsie
    chelsie = model.generate(QUESTIONS[0], **SPEAK)
    assert model.generate(QUESTIONS[0], **SPEAK, voice=ClonedVoice(SPEECH)).codec_ids == chelsie.codec_ids


def test_all_ways_to_ask_agree(model: OmniModel) -> None:
    voice = ClonedVoice(SPEECH, like="Ethan")
    single = [model.generate(question, **SPEAK, voice=voice) for question in QUESTIONS]
    together = model.generate_batch(QUESTIONS, **SPEAK, voice=voice)
    for reply, other in zip(together, single, strict=True):
        assert_same(reply, other, TOLERANCE)
    *events, last = model.stream(QUESTIONS[0], **SPEAK, voice=voice)
    assert last.reply is not None
    assert_same(last.reply, single[0], TOLERANCE)
    pieces = [event.audio for event in (*events, last) if event.audio is not None]
    np.testing.assert_array_equal(np.concatenate(pieces), last.reply.audio)
    wav = model.synthesize(single[0].codec_ids, voice=voice)
    assert single[0].audio is not None and np.abs(wav - single[0].audio).max() <= TOLERANCE


def test_a_live_session_speaks_in_it(model: OmniModel) -> None:
    voice = ClonedVoice(SPEECH, like="Ethan")
    system = QUESTIONS[0][:1]
    replies = []
    cases: list[tuple[dict[str, Any], dict[str, Any]]]
    cases = [({"voice": "Ada"}, {}), ({"voice": voice}, {}), ({}, {"voice": voice})]
    for options, changes in cases:
        session = model.listen(system, **SPEAK, **options)
        session.audio(np.sin(np.arange(8_000) * 0.1).astype(np.float32), 16_000)
        *_, last = session.answer(**changes)
        replies.append(last.reply)
    assert_same(replies[1], replies[0])
    assert_same(replies[2], replies[0])


def test_a_clip_is_prepared_once(model: OmniModel, speaker_model: MeanSpectrum) -> None:
    samples = np.sin(np.arange(2 * RATE) * 0.05).astype(np.float32)
    before = speaker_model.num_calls
    voice = ClonedVoice(samples, sampling_rate=RATE)
    model.synthesize([1, 2], voice=voice)
    first = model.synthesize([1, 2], voice={"ref_audio": samples.copy(), "sampling_rate": RATE})
    assert speaker_model.num_calls == before + 1
    # a vector of the request's own needs no model
    vector = [0.0] * 11 + [2.0]
    other = model.synthesize([1, 2], voice=ClonedVoice(samples, sampling_rate=RATE, speaker_vector=vector))
    assert speaker_model.num_calls == before + 1
    assert np.abs(other - first).max() > TOLERANCE


def test_what_is_kept_is_bounded(model: OmniModel, speaker_model: MeanSpectrum) -> None:
    table = SpeakerTable(model.engines, model.processor, speaker_model, None)
    clips = [make_clip(np.sin(np.arange(RATE) * (0.05 + 0.001 * i)).astype(np.float32)) for i in range(MAX_CLIPS + 1)]
    wanted = ClonedVoice("unused")
    voices = [table.choose(model.voices, wanted, clip).voice for clip in clips]
    assert table.choose(model.voices, wanted, clips[-1]).voice is voices[-1]
    assert table.choose(model.voices, wanted, clips[1]).voice is voices[1]
    assert table.choose(model.voices, wanted, clips[0]).voice is not voices[0]


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        ({"ref_text": "hello"}, "voice has no ref_audio, the clip of the voice; it has ref_text"),
        ({}, "voice has no ref_audio, the clip of the voice; it has nothing"),
        ({"ref_audio": "a.wav", "speed": 2}, "unknown key of voice speed; known: ref_audio, ref_text"),
        ({"ref_audio": "missing.wav"}, "voice: ref_audio ('missing.wav'): no such file"),
        ({"ref_audio": str(MEDIA / "silent.mp4")}, "it has no sound"),
        ({"ref_audio": str(MEDIA / "picture.png")}, "cannot decode it"),
        ({"ref_audio": "http://example.com/a.wav"}, "fetching from the web is off"),
        (
            {"ref_audio": np.ones(100, np.float32), "sampling_rate": RATE},
            "the clip lasts 0.01 s; a clip of",
        ),
        ({"ref_audio": np.ones(31 * RATE, np.float32), "sampling_rate": RATE}, "the clip lasts 31.00 s"),
        ({"ref_audio": np.ones(RATE, np.float32)}, "an array of samples needs its sampling rate"),
        ({"ref_audio": np.ones(RATE), "sampling_rate": 0}, "voice: sampling_rate is 0; it must be from 1"),
        ({"ref_audio": SPEECH, "like": "Eve"}, "voice 'Eve' is unknown; this checkpoint has Chelsie, Ethan, Ada"),
        ({"ref_audio": SPEECH, "like": 3}, "voice: like is 3; it must be the name of a voice"),
        ({"ref_audio": SPEECH, "ref_text": " "}, "voice: ref_text is ' '; it must be what the clip says"),
        ({"ref_audio": SPEECH, "ref_text": "a" * 2001}, "voice: ref_text has 2001 characters; at most 2000"),
        ({"ref_audio": SPEECH, "ref_text": "hello"}, "voice: ref_text needs a speech tokenizer"),
        ({"ref_audio": SPEECH, "speaker_vector": [1, 2]}, "voice: speaker_vector is no list of 12 numbers"),
        ({"ref_audio": SPEECH, "speaker_vector": [[1], 2]}, "voice: speaker_vector is no list of 12 numbers"),
        (3, "voice is 3; it must be a name, or a clip: {'ref_audio': ...}"),
    ],
)
def test_what_is_no_voice(model: OmniModel, voice: Any, message: str) -> None:
    for ask in (model.generate, model.stream):
        with pytest.raises(InputError, match=re.escape(message)):
            ask(QUESTIONS[0], **SPEAK, voice=voice)
    with pytest.raises(InputError, match=re.escape(message)):
        model.generate_batch(QUESTIONS, **SPEAK, voice=voice)


def test_without_a_speaker_model(model: OmniModel, tiny_model: Path) -> None:
    plain = OmniModel(model.config, model.processor, model.engines, model.voices)
    with pytest.raises(InputError, match=r"there is no speaker vector; load the model with a speaker_model"):
        plain.generate(QUESTIONS[0], **SPEAK, voice=ClonedVoice(SPEECH))
    # text alone needs no voice, and its clip is not looked at
    assert plain.generate(QUESTIONS[0], max_tokens=2, voice=ClonedVoice("missing.wav")).token_ids


def test_an_isolated_reader_reads_clips(model: OmniModel, tiny_model: Path) -> None:
    isolated = omni_jax.load(tiny_model, isolate_media=True)
    vector = [1.0] + [0.0] * 11
    expected = model.synthesize([5, 6], voice=ClonedVoice(SPEECH, speaker_vector=vector))
    found = isolated.synthesize([5, 6], voice=ClonedVoice(SPEECH, speaker_vector=vector))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match=r"voice: ref_audio \('.*silent.mp4'\): .*it has no sound"):
        isolated.synthesize([5], voice=ClonedVoice(MEDIA / "silent.mp4", speaker_vector=vector))
