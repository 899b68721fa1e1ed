"""When words are spoken: found from sounds whose words are known, and written as captions."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.processing.captions import Caption, make_captions, write_captions
from omni_jax.processing.word_times import Word, find_word_times
from tests.evaluation.renderings import RATE, render

TOLERANCE = 0.05  # seconds: two frames of 25 ms
# where nothing but the spelling tells two words apart, which are equally long here: a fifth of a word
BETWEEN_WORDS = 0.06


def times(words: tuple[Word, ...]) -> np.ndarray:
    return np.array([(word.begin, word.end) for word in words])


def test_words_are_found_between_pauses() -> None:
    rendering = render("bada (0.3) gidu (0.08) nobo (0.5) lami", lead=0.25, tail=0.4)
    assert rendering.transcript.words is not None
    found = find_word_times("“Bada, gidu nobo. Lami!”", rendering.samples, RATE)
    assert [word.text for word in found] == ["“Bada,", "gidu", "nobo.", "Lami!”"]
    np.testing.assert_allclose(times(found), times(rendering.transcript.words), atol=TOLERANCE)
    # twice the rate is the same sound
    np.testing.assert_allclose(
        times(find_word_times("bada gidu nobo lami", np.repeat(rendering.samples, 2), 2 * RATE)),
        times(rendering.transcript.words),
        atol=TOLERANCE,
    )


def test_a_pause_belongs_to_punctuation() -> None:
    rendering = render("bada gidu (0.3) nobo lami dode", lead=0.1)
    assert rendering.transcript.words is not None
    found = find_word_times("bada gidu. nobo lami dode", rendering.samples, RATE)
    np.testing.assert_allclose(times(found), times(rendering.transcript.words), atol=BETWEEN_WORDS)
    # in the text the pause is behind the first word now, which is spoken slowly
    other = find_word_times("bada. gidu nobo lami dode", rendering.samples, RATE)
    assert other[0].end == pytest.approx(0.7, abs=TOLERANCE) and other[1].begin == pytest.approx(1.0, abs=TOLERANCE)


def test_words_last_as_long_as_they_are_written() -> None:
    samples = render("a b c d e f g h i j", lead=0, tail=0).samples  # three seconds of noise without a pause
    found = find_word_times("no understanding", samples, RATE)
    assert [word.text for word in found] == ["no", "understanding"]
    # 3 of 16 consonants: 1 + n + o, and 1 + 8 consonants + 4 vowels
    assert found[0].end == found[1].begin == pytest.approx(3 * 3 / 16, abs=TOLERANCE)
    chinese = find_word_times("你好，世界 123", samples, RATE)
    assert [word.text for word in chinese] == ["你", "好，", "世", "界", "123"]
    lengths = np.diff(times(chinese), axis=1)[:, 0]
    np.testing.assert_allclose(lengths, 3 * np.array([4, 4, 4, 4, 13]) / 29, atol=TOLERANCE)


def test_letters_of_other_writing_are_syllables() -> None:
    samples = render("a b c d e f g h i j", lead=0, tail=0).samples
    # two syllables; two vowels, of which the last has an accent and is spoken, and two consonants; one syllable
    found = find_word_times("\uc548\ub155 caf\u00e9 \u4f60", samples, RATE)
    lengths = np.diff(times(found), axis=1)[:, 0]
    np.testing.assert_allclose(lengths, 3 * np.array([7, 5, 4]) / 16, atol=TOLERANCE)


def test_a_word_does_not_last_for_minutes() -> None:
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(120 * RATE)).astype(np.float32)
    (found,) = find_word_times("word", samples, RATE)
    assert 0 <= found.begin < found.end <= 120 and found.end - found.begin <= 5


def test_long_speech_does_not_drift() -> None:
    # five words a sentence, and a pace that is a fifth slower in its second half
    sentences = " (0.25) ".join(["ba gi do la mi"] * 40)
    rendering = render(sentences)
    assert rendering.transcript.words is not None
    slow = rendering.samples[(np.arange(1.2 * len(rendering.samples)) / 1.2).astype(int)]
    samples = np.concatenate([rendering.samples, slow])
    text = ". ".join(["ba gi do la mi"] * 40) + ". "
    found = times(find_word_times(text + text, samples, RATE))
    expected = times(rendering.transcript.words)
    second = 1.2 * expected + len(rendering.samples) / RATE
    np.testing.assert_allclose(found, np.concatenate([expected, second]), atol=0.3)
    assert np.median(np.abs(found - np.concatenate([expected, second]))) < BETWEEN_WORDS


@pytest.mark.parametrize("seconds", (0.0, 0.01, 0.03, 0.2, 20.0))
@pytest.mark.parametrize("is_silence", (False, True))
def test_any_sound_gives_every_word_in_order(seconds: float, is_silence: bool) -> None:
    rng = np.random.default_rng(0)
    samples = 0.1 * rng.standard_normal(round(seconds * RATE)) * (not is_silence)
    text = "Some seventeen words, which may or may not be spoken: nobody can tell where they are here."
    found = find_word_times(text, samples.astype(np.float32), RATE)
    assert len(found) == (0 if seconds < 0.025 else 17)
    flat = times(found).reshape(-1)
    assert (np.diff(flat) >= 0).all() and (flat >= 0).all() and (flat <= seconds).all()
    assert find_word_times("...", samples, RATE) == ()


def test_captions_are_of_sentences() -> None:
    text = "One two. Three & <four>,\nfive --> six"
    words = [
        Word(text_of, number, number + 0.5) for number, text_of in enumerate("One two Three four five six".split())
    ]
    captions = make_captions(text, words)
    assert captions == [Caption("One two.", 0, 1.5), Caption("Three & <four>, five --> six", 2, 5.5)]
    assert write_captions(captions, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne two.\n\n2\n00:00:02,000 --> 00:00:05,500\nThree & <four>, five → six\n"
    )
    assert write_captions(captions, "vtt").startswith("WEBVTT\n\n1\n00:00:00.000 --> 00:00:01.500\nOne two.\n\n2\n")
    assert "Three &amp; &lt;four&gt;, five → six" in write_captions(captions, "vtt")
    assert make_captions("", []) == [] and write_captions([], "vtt") == "WEBVTT\n"
    assert write_captions([Caption("late", 3725.0006, 3726)], "vtt").splitlines()[3] == "01:02:05.001 --> 01:02:06.000"


def test_captions_are_parted_where_they_are_too_long() -> None:
    text = " ".join(["word"] * 40)
    captions = make_captions(text, [Word("word", 0.2 * number, 0.2 * number + 0.2) for number in range(40)])
    assert " ".join(caption.text for caption in captions) == text
    assert max(len(caption.text) for caption in captions) == 84
    # at most seven seconds, and a new one behind a second of silence
    slow = make_captions("a b c d", [Word("a", 0, 1), Word("b", 1, 6), Word("c", 6, 8), Word("d", 9.5, 10)])
    assert [caption.text for caption in slow] == ["a b", "c", "d"]
    # Chinese letters take two places
    chinese = "世" * 50
    captions = make_captions(chinese, [Word("世", 0.1 * number, 0.1 * number + 0.1) for number in range(50)])
    assert [len(caption.text) for caption in captions] == [42, 8]
