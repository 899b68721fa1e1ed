"""Prompts that come in pieces: together they are the offline prompt of the same dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax import mrope
from omni_jax.errors import InputError
from omni_jax.processing import media
from omni_jax.processing.audio import MelSettings, audio_input, resample
from omni_jax.processing.chat import parse_messages
from omni_jax.processing.layout import AudioInput, Item, Prompt, VisionInput, audio_tokens, lay_out
from omni_jax.processing.live import LivePrompt
from omni_jax.processing.prefill_plan import PromptPiece
from omni_jax.processing.processor import Processor
from omni_jax.processing.vision import video_input
from omni_jax.segments import Text
from tests.processing.conftest import MEDIA

BEFORE = [
    {"role": "system", "content": "be kind"},
    {
        "role": "user",
        "content": [{"type": "image", "image": np.zeros((56, 84, 3), np.uint8)}, {"type": "text", "text": "a"}],
    },
    {"role": "assistant", "content": "yes"},
]
TEXT = "what was that?"
BLOCK = 32_000  # samples
IDS = jax.jit(mrope.position_ids)


@pytest.fixture(scope="module")
def processor(processor: Processor) -> Processor:
    """One that sees small pictures, to save time."""
    return processor.with_pixels(video_min_pixels=1, video_max_pixels=56 * 84)


def sound(samples: int, rate: int = 16_000) -> np.ndarray:
    """Noise that fades, so that the floor is known after the first block."""
    noise = np.random.default_rng(0).standard_normal(samples) * np.exp(-np.arange(samples) / rate / 2)
    return (noise * 0.1).astype(np.float32)


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 256, (count, 120, 160, 3), np.uint8))


def offline(processor: Processor, messages: Sequence[Any], kind: Any, item: Item) -> Prompt:
    """What the processor makes of the dialogue with this item in it, given as a whole."""
    c = processor.config.thinker_config
    parsed = parse_messages(messages) if messages else ()
    before = processor.before_media(parsed, kind)
    delimiters = {
        "audio": (c.audio_start_token_id, c.audio_token_index, c.audio_end_token_id),
        "video": (c.vision_start_token_id, c.video_token_index, c.vision_end_token_id),
    }
    part = lay_out([*delimiters[kind], *processor.after_media(parsed, kind, TEXT)], [item], c)
    own = part.media_item >= 0
    return Prompt(
        np.concatenate([before.tokens, part.tokens]),
        (*before.segments, *part.segments),
        (*before.media, *part.media),
        np.concatenate([before.media_item, np.where(own, part.media_item + len(before.media), -1)]),
        np.concatenate([before.media_token, part.media_token]),
        before.usage,
    )


def ids_of(processor: Processor, spans: Sequence[mrope.Span], length: int) -> np.ndarray:
    size = 1024 if length <= 1024 else 1 << 15  # few shapes, compiled once
    table = mrope.stack_spans([spans], size, width=64)
    real = (np.arange(size) < length)[None].astype(np.int32)
    return np.asarray(IDS(table, real)[0])[:, 0, :length]


def features_of(prompt: Prompt, item: int) -> int:
    return int((prompt.media_item == item).sum())


def check(
    processor: Processor, live: LivePrompt, pieces: Sequence[PromptPiece], wanted: Prompt, *, exact: bool = True
) -> None:
    """Tokens, position ids, and which feature of what each position takes."""
    whole = live.whole_prompt(TEXT)
    pieces = [live.head, *pieces, *live.end(TEXT)]
    tokens = np.concatenate([p.prompt.tokens for p in pieces])
    np.testing.assert_array_equal(tokens, wanted.tokens)
    np.testing.assert_array_equal(whole.tokens, wanted.tokens)
    c = processor.config.thinker_config
    ids = np.concatenate([ids_of(processor, p.spans, len(p.prompt)) for p in pieces], axis=1)
    np.testing.assert_array_equal(ids, ids_of(processor, mrope.resolve_spans(wanted.segments, c), len(wanted)))
    after = [mrope.resolve_spans((*p.segments, Text(2)), c)[-1] for p in (whole, wanted)]
    assert after[0] == after[1]

    before = len(live.head.prompt.media)
    done: dict[type, int] = {}
    taken: list[tuple[type, int] | None] = []
    for piece in pieces[1:]:
        kinds = [type(m) for m in piece.prompt.media]
        pairs = zip(piece.prompt.media_item, piece.prompt.media_token, strict=True)
        taken += [None if i < 0 else (kinds[i], int(j) + done.get(kinds[i], 0)) for i, j in pairs]
        for i, kind in enumerate(kinds):
            done[kind] = done.get(kind, 0) + features_of(piece.prompt, i)
    pairs = list(zip(wanted.media_item, wanted.media_token, strict=True))[len(live.head.prompt) :]
    assert taken == [None if i < 0 else (type(wanted.media[i]), int(j)) for i, j in pairs]
    new = [m for p in pieces[1:] for m in p.prompt.media]
    for item in wanted.media[before:]:
        if isinstance(item, VisionInput):
            own = [m for m in new if isinstance(m, VisionInput)]
            np.testing.assert_array_equal(np.concatenate([m.patches for m in own]), item.patches)
            assert sum(m.grid[0] for m in own) == item.grid[0] and {m.grid[1:] for m in own} == {item.grid[1:]}
        elif exact:
            mel = np.concatenate([m.mel for m in new if isinstance(m, AudioInput)])
            assert len(item.mel) - len(mel) < 3 and audio_tokens(len(mel)) == item.tokens
            np.testing.assert_array_equal(mel, item.mel[: len(mel)])


# shorter than a block, a token, exactly a block, a block and what its last frame sees, some frames more, many blocks
@pytest.mark.parametrize(
    "samples", [400, 8000, BLOCK - 1, BLOCK, BLOCK + 39, BLOCK + 40, BLOCK + 160, 2 * BLOCK + 700, 150_000]
)
def test_sound(processor: Processor, samples: int) -> None:
    x = sound(samples)
    for size in (1600, 50_001):
        live = LivePrompt(processor, BEFORE, audio=True, video=False)
        pieces = [p for i in range(0, samples, size) for p in live.audio(x[i : i + size], 16_000)]
        assert len(pieces) == max(0, (samples - 40) // BLOCK)
        assert all(len(p.prompt.media) == 1 for p in pieces)
        check(processor, live, pieces, offline(processor, BEFORE, "audio", audio_input(x, processor.settings.mel)))


def test_it_is_what_the_processor_makes_of_the_messages(processor: Processor) -> None:
    x = sound(40_000)
    content = [{"type": "audio", "audio": x, "sampling_rate": 16_000}, {"type": "text", "text": TEXT}]
    for messages in ([], BEFORE):
        wanted = processor([*messages, {"role": "user", "content": content}])
        live = LivePrompt(processor, messages, audio=True, video=False)
        pieces = live.audio(x, 16_000)
        assert live.whole_prompt(TEXT).usage == wanted.usage
        check(processor, live, pieces, wanted)


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_sound_of_another_rate(processor: Processor, rate: int) -> None:
    x = sound(rate * 5 + 17, rate)
    live = LivePrompt(processor, (), audio=True, video=False)
    pieces = [p for i in range(0, len(x), 1000) for p in live.audio(x[i : i + 1000], rate)]
    assert len(pieces) == 2
    settings = processor.settings.mel
    check(processor, live, pieces, offline(processor, (), "audio", audio_input(resample(x, rate, 16_000), settings)))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 11])
def test_video(processor: Processor, count: int) -> None:
    frames = pictures(count)
    live = LivePrompt(processor, BEFORE, audio=False, video=True)
    pieces = [p for i, frame in enumerate(frames) for p in live.video(frame, i / 2)]
    assert len(pieces) == count // 4
    video = {"type": "video", "video": frames, "fps": 2.0}
    wanted = processor([*BEFORE, {"role": "user", "content": [video, {"type": "text", "text": TEXT}]}])
    assert live.whole_prompt(TEXT).usage == wanted.usage
    check(processor, live, pieces, wanted)


@pytest.mark.parametrize(
    ("count", "samples"), [(8, 4 * 16_000), (9, 52_800), (6, 103_999), (13, 20_000), (1, 400), (4, BLOCK + 40)]
)
def test_video_with_sound(processor: Processor, count: int, samples: int) -> None:
    frames, x, size = pictures(count), sound(samples), 1600
    live = LivePrompt(processor, BEFORE, audio=True, video=True)
    pieces = []
    for at in range(max(samples // size + 1, count * 5)):
        pieces += live.video(frames[at // 5], at / 10) if at % 5 == 0 and at // 5 < count else []
        pieces += live.audio(x[at * size : (at + 1) * size], 16_000)
    assert len(pieces) == min(count // 4, max(0, (samples - 40) // BLOCK))
    pixels = processor.settings.pixels
    seen = video_input([media.read_image(f) for f in frames], count, 2.0, pixels, {})
    pair = (seen, audio_input(x, processor.settings.mel))
    check(processor, live, pieces, offline(processor, BEFORE, "video", pair))


def test_a_real_video(processor: Processor) -> None:
    settings, file = processor.settings, MEDIA / "video.mp4"
    wanted = processor(
        [{"role": "user", "content": [{"type": "video", "video": str(file)}, {"type": "text", "text": TEXT}]}]
    )
    live = LivePrompt(processor, (), audio=True, video=True)
    pieces = live.audio(media.read_audio(str(file), settings.mel), 16_000)
    for i, frame in enumerate(media.read_video(str(file), settings.pixels, {}).frames):
        pieces += live.video(frame, i / 2)
    assert len(pieces) == 1
    check(processor, live, pieces, wanted, exact=False)


def test_pictures_are_taken_when_it_is_time(processor: Processor) -> None:
    """In each half second the first that comes, or the last before it if none does."""
    fast, taken = pictures(61), [0, 14, 29, 44, 59]  # a picture may come a tenth of half a second early
    live = LivePrompt(processor, (), audio=False, video=True)
    pieces = [p for i, frame in enumerate(fast) for p in live.video(frame, i / 30)]
    wanted = offline(processor, (), "video", seen(processor, [fast[i] for i in taken]))
    check(processor, live, pieces, wanted)
    slow = pictures(3)
    live = LivePrompt(processor, (), audio=False, video=True)
    pieces = [p for frame, at in zip(slow, (0.2, 0.9, 2.6), strict=True) for p in live.video(frame, at)]
    order = [slow[i] for i in (0, 1, 1, 1, 1, 2)]
    check(processor, live, pieces, offline(processor, (), "video", seen(processor, order)))


def test_what_resampling_held_back_is_read_block_by_block(processor: Processor) -> None:
    x = sound(4 * 48_000 + 1500, 48_000)
    live = LivePrompt(processor, (), audio=True, video=False)
    pieces = [*live.audio(x, 48_000), *live.end(TEXT)]
    lengths = [len(m.mel) for p in pieces for m in p.prompt.media if isinstance(m, AudioInput)]
    assert lengths == [200, 200, 4]


def seen(processor: Processor, frames: Sequence[np.ndarray]) -> VisionInput:
    return video_input([media.read_image(f) for f in frames], len(frames), 2.0, processor.settings.pixels, {})


def test_bad_sound_is_refused_and_the_rest_is_taken(processor: Processor) -> None:
    live = LivePrompt(processor, (), audio=True, video=False)
    x = sound(40_000)
    bad = np.where(np.arange(100) == 3, np.nan, 0).astype(np.float32)
    refused: list[tuple[Any, Any, str]] = [
        (bad, 16_000, "NaN or infinity"),
        (x[:100], 0, "rate is 0; it must be from 1000 to 1000000"),
        (x[:100], 16_000.0, "rate is 16000.0"),
        ((x[:100] * 32768).astype(np.int16), 16_000, r"got int16 \[100\]; divide int16 by 32768"),
        (x[:100].reshape(2, 50), 16_000, r"one channel, got float32 \[2, 50\]"),
        (x[:100].tolist(), 16_000, "got list"),
        (np.zeros(301 * 16_000, np.float32), 16_000, "would last 301.00 s, over the limit of 300 s"),
    ]
    for samples, rate, message in refused:
        with pytest.raises(InputError, match=message):
            live.audio(samples, rate)
    with pytest.raises(InputError, match="nothing has been heard yet"):
        live.whole_prompt(TEXT)
    pieces = live.audio(x[:20_000], 16_000)
    with pytest.raises(InputError, match="rate is 8000, but the sound began at 16000"):
        live.audio(x, 8000)
    with pytest.raises(InputError, match="takes no pictures"):
        live.video(pictures(1)[0], 0.0)
    pieces += live.audio(x[20_000:], 16_000)
    check(processor, live, pieces, offline(processor, (), "audio", audio_input(x, processor.settings.mel)))


def test_bad_pictures_are_refused_and_the_rest_is_seen(processor: Processor) -> None:
    live, frames = LivePrompt(processor, (), audio=False, video=True), pictures(4)
    with pytest.raises(InputError, match="nothing has been seen yet"):
        live.whole_prompt(TEXT)
    pieces = [p for i in (0, 1) for p in live.video(frames[i], i / 2)]
    for picture, seconds, message in (
        (frames[0], 0.4, "a picture at 0.4 s follows one at 0.5 s"),
        (frames[0], float("nan"), "seconds is nan"),
        (frames[0], -1, "seconds is -1"),
        (frames[0], 1e9, "over the limit of 384 s"),
        (frames[0][:60], 1.0, r"the picture has \(160, 60\) pixels, the first has \(160, 120\)"),
        (frames[0].astype(np.float32), 1.0, "an array must be uint8"),
    ):
        with pytest.raises(InputError, match=message):
            live.video(picture, seconds)
    with pytest.raises(InputError, match="takes no sound"):
        live.audio(sound(100), 16_000)
    pieces += [p for i in (2, 3) for p in live.video(frames[i], i / 2)]
    check(processor, live, pieces, offline(processor, (), "video", seen(processor, frames)))


def test_the_context_is_not_overrun(processor: Processor) -> None:
    context = processor.config.thinker_config.text_config.max_position_embeddings
    before = [{"role": "user", "content": "7" * (context - 200)}]  # of digits each is a token
    live = LivePrompt(processor, before, audio=True, video=False)
    samples = sound(10 * 16_000)
    room = r"over the limit of 32767 \(\d+ before the media, 250 audio, 0 video, \d+ after them\); this was not taken"
    with pytest.raises(InputError, match=room):
        live.audio(samples, 16_000)
    pieces = live.audio(samples[:40_000], 16_000)
    with pytest.raises(InputError, match=room.replace("250", "62")):
        live.whole_prompt("7" * 200)
    check(processor, live, pieces, offline(processor, before, "audio", audio_input(samples[:40_000], MelSettings())))
    with pytest.raises(InputError, match="the prompt has"):
        LivePrompt(processor, before * 2, audio=True, video=False)


def test_what_cannot_be_taken_live(processor: Processor) -> None:
    with pytest.raises(InputError, match="audio and video are both false"):
        LivePrompt(processor, (), audio=False, video=False)
    with pytest.raises(InputError, match="must be at least 1"):
        LivePrompt(processor.with_pixels(fps=0.5), (), audio=False, video=True)
