"""Pictures, sound and video of strangers: what is decoded, how much of it, and what comes of decoders that fail."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import types
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pytest
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing import containers, media
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.chat import ChatTemplate, parse_messages
from omni_jax.processing.containers import Track
from omni_jax.processing.decoding import SoundCollector
from omni_jax.processing.images import IMAGE_FORMATS, read_image
from omni_jax.processing.layout import TokenBudget
from omni_jax.processing.live import LivePrompt
from omni_jax.processing.processor import Processor
from omni_jax.processing.vision import PixelSettings, image_input, smart_nframes, video_size
from tests.security.conftest import MEDIA

MEL, PIXELS = MelSettings(), PixelSettings()
PICTURE, WAV, VIDEO = str(MEDIA / "picture.jpg"), str(MEDIA / "speech.wav"), str(MEDIA / "silent.mp4")
HUGE = 2**31 - 1  # the largest number that a request may hold


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


# --- which decoders run ---


def write_pictures() -> dict[str, bytes]:
    """A picture in every format that Pillow writes."""
    Image.init()
    written = {}
    for name in sorted(Image.SAVE):
        for mode in ("RGB", "P", "1"):
            file = io.BytesIO()
            with contextlib.suppress(Exception):
                Image.new(mode, (32, 32)).save(file, name)
                written[name] = file.getvalue()
                break
    return written


def test_pillow_reads_the_tested_formats_and_no_other() -> None:
    written = write_pictures()
    others = set(written) & set(Image.OPEN) - {*IMAGE_FORMATS, "MPO"}
    assert {"EPS", "ICO", "TGA", "PCX", "SGI", "DDS", "IM"} <= others
    for name in others:
        with pytest.raises(InputError, match="not a picture that can be read; known formats: PNG"):
            read_image(written[name])
    for name in IMAGE_FORMATS:
        assert read_image(written[name]).size == (32, 32)


# --- as decoded, and not as a header says ---


def make_jpeg(width: int, height: int) -> bytes:
    """A picture of a few hundred bytes that decodes to this size."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "jpeg")
    data = bytearray(file.getvalue())
    size = data.index(b"\xff\xc0") + 5
    data[size : size + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def make_motion_jpeg(pictures: Sequence[bytes], kind: str) -> bytes:
    """A video whose header says 64 x 64, whatever its frames are."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = 64
        stream.height = 64
        stream.pix_fmt = "yuvj420p"
        for number, data in enumerate(pictures):
            packet = av.Packet(data)
            packet.stream = stream
            packet.pts = packet.dts = number
            packet.time_base = Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["matroska", "avi"])
def test_frames_that_are_larger_than_their_header_says_are_never_made(kind: str) -> None:
    small, large = make_jpeg(64, 64), make_jpeg(14_000, 14_000)
    assert media.read_video(make_motion_jpeg([small] * 8, kind), PIXELS, {}).count == 4
    data = make_motion_jpeg([small, *[large] * 7], kind)
    with pytest.raises(InputError, match="over the limit of 35389440 pixels"):
        media.read_video(data, PIXELS, {})
    # by the decoder, for a frame of 300 MB and one for each of its threads are memory before they can be looked at
    with containers.open_container(io.BytesIO(data)) as container:
        for packet in container.demux(video=0):
            with contextlib.suppress(av.error.FFmpegError):
                assert all(frame.width == 64 for frame in packet.decode())


def make_wav(rate: int, channels: int, samples: int = 16_000) -> bytes:
    """Silence of 8 bits, by a header that says anything."""
    data = bytes([128]) * (samples * channels)
    head = struct.pack("<HHIIHH", 1, channels, rate, min(rate * channels, 2**32 - 1), channels, 8)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("rate", "channels", "message"),
    [
        (1, 1, "its sound has 1 samples a second; it must have from 1000 to 384000"),
        (999, 1, "its sound has 999 samples a second"),
        (2_000_000_000, 1, "its sound has 2000000000 samples a second"),
        (16_000, 65, "its sound has 65 channels; it must have from 1 to 64"),
    ],
)
def test_sound_of_absurd_rates_and_channels(rate: int, channels: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        media.read_audio(make_wav(rate, channels, 2000), MEL)


@pytest.mark.parametrize("rate", [-1, 0, 1, 999, 1_000_001, 2_000_000_000, 10**400, 16_000.0, True])
def test_sound_that_comes_live_has_limits_of_its_rate(processor: Processor, rate: Any) -> None:
    live = LivePrompt(processor, [], audio=True, video=False)
    with pytest.raises(InputError, match=r"rate is .* from 1000 to 1000000"):
        live.audio(np.zeros(100, np.float32), rate)
    live.audio(np.zeros(100, np.float32), 16_000)


@pytest.mark.parametrize(("rate", "channels"), [(1000, 1), (384_000, 2), (16_000, 8)])
def test_sound_of_rare_rates_and_channels(rate: int, channels: int) -> None:
    assert len(media.read_audio(make_wav(rate, channels), MEL)) == -(-16_000 * 16_000 // rate)


def make_float_wav(samples: np.ndarray) -> bytes:
    head = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)  # 3: floats
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head
    body += b"data" + struct.pack("<I", samples.nbytes) + samples.astype("<f4").tobytes()
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_sound_that_is_no_number_is_refused(value: float, recwarn: pytest.WarningsRecorder) -> None:
    samples = np.full(16_000, 0.1, np.float32)
    assert len(media.read_audio(make_float_wav(samples), MEL)) == 16_000
    for rate in (16_000, 48_000):
        samples[100:200] = [value, -value] * 50
        data = bytearray(make_float_wav(samples))
        data[24:28] = struct.pack("<I", rate)
        if np.isfinite(value) and rate == 16_000:  # not resampled, and loud enough for anybody
            continue
        with pytest.raises(InputError, match="its sound holds NaN, infinity, or samples too large for float32"):
            media.read_audio(bytes(data), MEL)
    with pytest.raises(InputError, match="the array holds"):
        media.array_audio(samples, 48_000, MEL)
    assert not recwarn.list


def test_a_file_that_seeks_to_nowhere_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    description = struct.pack(">d4sIIIII", 16_000.0, b"lpcm", 2, 2, 1, 1, 16)
    chunks = b"desc" + struct.pack(">q", len(description)) + description
    chunks += (b"junk" + struct.pack(">q", 1 << 60)) * 3  # each of which leads to behind the largest of files
    path = tmp_path / "a.caf"
    path.write_bytes(b"caff\0\1\0\0" + chunks + b"data" + struct.pack(">qI", 4 + 3200, 0) + bytes(3200))
    with pytest.raises(InputError, match="cannot decode it"):
        media.read_audio(str(path), MEL)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rate", "channels", "samples", "message"),
    [
        (10**9, 1, 1024, "its sound has 1000000000 samples a second"),
        (16_000, 5000, 1024, "its sound has 5000 channels"),
        (16_000, 1, 10**10, "the sound lasts 625000.00 s, over the limit of 300 s"),
    ],
)
def test_sound_is_checked_before_it_becomes_an_array(rate: int, channels: int, samples: int, message: str) -> None:
    """Headers and packets may have said something else than the decoder does."""

    def refuse() -> None:
        raise AssertionError("it has become an array")

    layout = types.SimpleNamespace(nb_channels=channels)
    fields = {"is_corrupt": False, "sample_rate": rate, "layout": layout, "samples": samples, "time": 0.0}
    track = Track(0, "audio", 0.0, np.zeros(1), 1.0, 1.0, 1)
    collector = SoundCollector(track, 0.0, 1.0, MEL)
    with pytest.raises(InputError, match=message):
        collector.add(types.SimpleNamespace(**fields, to_ndarray=refuse))


# --- the model's ceilings ---


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "image": PICTURE, "min_pixels": HUGE}, "min_pixels is 2147483647; it must be at most 128"),
        ({"type": "video", "video": VIDEO, "min_pixels": HUGE}, "min_pixels is 2147483647; it must be at most 602112"),
        ({"type": "video", "video": [PICTURE] * 2, "min_pixels": HUGE}, "min_pixels is 2147483647; it must be at most"),
        ({"type": "video", "video": VIDEO, "nframes": HUGE}, "nframes is 2147483647; this video allows 2 to "),
    ],
)  # fmt: skip
def test_bounds_over_the_model_s(processor: Processor, part: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor(user(part))


def test_a_user_raises_no_size_over_the_model_s() -> None:
    picture = Image.new("RGB", (6000, 3000))
    for options in ({}, {"max_pixels": HUGE}, {"max_pixels": HUGE, "min_pixels": 12_000_000}):
        with pytest.raises(InputError, match=r"with its 16290 tokens"):  # 12.8 million pixels
            image_input(picture, PIXELS, options, TokenBudget(1000))
    assert video_size(1080, 1920, 4, PIXELS, {"max_pixels": HUGE}) == video_size(1080, 1920, 4, PIXELS, {})
    assert smart_nframes(5000, 30.0, PIXELS, {"nframes": 768}) == 768
    with pytest.raises(InputError, match="nframes is 770; this video allows 2 to 768"):
        smart_nframes(5000, 30.0, PIXELS, {"nframes": 770})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": PICTURE, "min_pixels": 12_000_000},
        {"type": "video", "video": VIDEO, "min_pixels": 600_000},
        {"type": "video", "video": [PICTURE] * 4, "min_pixels": 600_000},
    ],
    ids=["picture", "video", "list"],
)
def test_tokens_are_counted_before_anything_is_resized(
    processor: Processor, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("it was resized")

    monkeypatch.setattr(Image.Image, "resize", refuse)
    message = r"messages\[0\].content\[0\] \(.*the prompt has at least \d+ tokens, over the limit of 1000"
    with pytest.raises(InputError, match=message):
        processor(user(part), max_length=1000)


def test_media_share_the_limit_of_tokens(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small items are as many as one large one."""
    read = []
    original = Processor.read_media

    def count(*args: Any) -> Any:
        read.append(args)
        return original(*args)

    monkeypatch.setattr(Processor, "read_media", count)
    for part in ({"type": "image", "image": PICTURE}, {"type": "audio", "audio": WAV}):
        read.clear()
        with pytest.raises(InputError, match=r"over the limit of 300; let media take fewer"):
            processor(user(*[part] * 100), max_length=300)
        assert len(read) < 10


# --- the borders: every exception is an InputError ---


def write_picture(name: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").convert(mode).save(file, name)
    return file.getvalue()


def test_pillow_pictures_that_cannot_be_brought_to_rgb() -> None:
    with pytest.raises(InputError, match="a picture of mode La cannot be brought to RGB"):
        read_image(Image.new("La", (8, 8)))
    # whose pixels are decoded only when they are asked for
    cut = Image.open(io.BytesIO((MEDIA / "picture.jpg").read_bytes()[:3000]))
    with pytest.raises(InputError, match="a picture of mode RGB cannot be brought to RGB: image file is truncated"):
        read_image(cut)


def test_pillow_pictures_have_the_limit_of_files() -> None:
    with pytest.raises(InputError, match="9000 x 9000 pixels are over the limit of 80000000"):
        read_image(Image.new("1", (9000, 9000)))


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_mutants_of_pictures_raise_our_error_alone(processor: Processor, name: str) -> None:
    original = write_picture(name)
    rng = random.Random(name)
    for _ in range(40):
        data = bytearray(original)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(InputError):
            processor(user({"type": "image", "image": bytes(data)}))


@pytest.mark.parametrize(("kind", "name"), [("audio", "speech.wav"), ("audio", "speech2.mp3"), ("video", "video.mp4")])
def test_mutants_of_sound_and_video_raise_our_error_alone(processor: Processor, kind: str, name: str) -> None:
    original = (MEDIA / name).read_bytes()
    rng = random.Random(name)
    for _ in range(15):
        data = bytearray(original)
        for _ in range(rng.randint(1, 8)):
            # headers are at either end
            place = min(rng.randrange(len(data)), rng.randrange(len(data)))
            data[place] = rng.randrange(256)
        with contextlib.suppress(InputError):
            processor(user({"type": kind, kind: bytes(data)}))


def test_tags_of_another_encoding_cost_no_file() -> None:
    wav = make_wav(16_000, 1)
    tag = b"INFO" + b"INAM" + struct.pack("<I", 4) + b"caf\xe9"
    body = wav[8:] + b"LIST" + struct.pack("<I", len(tag)) + tag
    assert len(media.read_audio(b"RIFF" + struct.pack("<I", len(body)) + body, MEL)) == 16_000


def test_a_codec_that_nobody_knows() -> None:
    data = make_motion_jpeg([make_jpeg(64, 64)] * 4, "matroska").replace(b"V_MJPEG", b"V_XJPEG")
    with pytest.raises(InputError, match="its video is in a format that cannot be decoded"):
        media.read_video(data, PIXELS, {})


@pytest.mark.parametrize(
    "part",
    [
        {"type": "audio", "audio": np.array([["a", "b"]]), "sampling_rate": 16_000},
        {"type": "image", "image": "file://[x/y"},
        {"type": "video", "video": ["file://[x/y"]},
    ],
    ids=["letters", "picture", "frame"],
)
def test_whatever_a_library_raises_names_the_item(processor: Processor, part: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"messages\[0\].content\[0\] \("):
        processor(user(part))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content[:-2] ~ '99.' }}",  # a stand-in of nothing
        "{{ messages[0].content[:-2] ~ '9' * 5000 ~ '.' }}",
        "{{ 1 // 0 }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.nothing.at.all }}",
    ],
)
def test_a_template_raises_our_error_alone(source: str) -> None:
    with pytest.raises(InputError, match="the chat template"):
        ChatTemplate(source).render(parse_messages([{"role": "user", "content": "hi"}]))
