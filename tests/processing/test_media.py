import io
import re
import struct

import av
import numpy as np
import pytest
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing import containers, media
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.container_bytes import is_pcm_wav
from omni_jax.processing.vision import PixelSettings
from tests.processing.conftest import MEDIA

MEL, PIXELS = MelSettings(), PixelSettings()


def make_video(seconds=2.0, fps=10, size=(64, 48), times=None, kind="mp4"):
    """A silent video whose frame i is grey of level 6 i; ``times`` are in frames, for an uneven one."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(len(times) if times else int(seconds * fps)):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 6 * i, np.uint8), format="rgb24")
            frame.pts = times[i] if times else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def make_sound(seconds=1.0, rate=16000, kind="wav", codec="pcm_s16le"):
    """A tone of 440 Hz, mono."""
    file = io.BytesIO()
    samples = (np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate) * 16000).astype(np.int16)
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def grey(frames):
    return [round(float(np.asarray(frame).mean()) / 6) for frame in frames]


@pytest.mark.parametrize(("name", "seconds"), [("speech.wav", 3.2136), ("speech2.mp3", 2.09), ("video.mp4", 3.0)])
def test_real_sound(name, seconds):
    samples = media.read_audio(MEDIA / name, MEL)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert len(samples) / 16000 == pytest.approx(seconds, abs=0.1)
    assert 0.05 < np.abs(samples).max() <= 1.01


@pytest.mark.parametrize(
    ("kind", "codec", "rate"),
    [
        ("wav", "pcm_s16le", 16000),
        ("wav", "pcm_u8", 44100),
        ("wav", "pcm_s24le", 8000),
        ("wav", "pcm_f32le", 48000),
        ("flac", "flac", 22050),
        ("aiff", "pcm_s16be", 16000),
    ],
)
def test_formats_give_the_same_sound(kind, codec, rate):
    samples = media.read_audio(make_sound(1.0, rate, kind, codec), MEL)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) * 16000 / 32768
    assert len(samples) == 16000
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=0.012)


@pytest.mark.parametrize(
    ("codec", "is_pcm"), [("pcm_s16le", True), ("pcm_f32le", True), ("adpcm_ms", False), ("pcm_mulaw", False)]
)
def test_only_wav_of_plain_samples_is_opened_without_a_search(codec, is_pcm):
    """Files of other codecs, or whose header does not come first, are searched as ever, and read alike."""
    data = make_sound(1.0, 16000, "wav", codec)
    assert is_pcm_wav(io.BytesIO(data)) == is_pcm
    junk = data[:12] + b"JUNK" + struct.pack("<I", 4) + bytes(4) + data[12:]
    junk = junk[:4] + struct.pack("<I", len(junk) - 8) + junk[8:]
    assert not is_pcm_wav(io.BytesIO(junk))
    np.testing.assert_array_equal(media.read_audio(data, MEL), media.read_audio(junk, MEL))
    assert not is_pcm_wav(io.BytesIO(make_sound(1.0, 16000, "flac", "flac")))


def test_a_range_of_sound():
    samples = media.read_audio(make_sound(2.0), MEL, begin=0.5, end=1.25)
    np.testing.assert_array_equal(samples, media.read_audio(make_sound(2.0), MEL)[8000:20000])
    array = media.array_audio(media.read_audio(make_sound(2.0), MEL), 16000, MEL, begin=0.5, end=1.25)
    np.testing.assert_array_equal(samples, array)
    with pytest.raises(InputError, match=re.escape("the range begins at 2.5 s, but the sound ends after 2.00 s")):
        media.read_audio(make_sound(2.0), MEL, begin=2.5)


def test_a_long_sound_is_refused_and_never_cut():
    short = MelSettings(max_seconds=1.5)
    with pytest.raises(InputError, match=r"the sound lasts 2\.00 s, over the limit of 1\.5 s"):
        media.read_audio(make_sound(2.0), short)
    assert len(media.read_audio(make_sound(2.0), short, begin=1.0)) == 16000
    # a stream that does not say how long it is
    streamed = bytearray(make_sound(2.0))
    data = streamed.index(b"data")
    streamed[4:8] = streamed[data + 4 : data + 8] = b"\xff\xff\xff\xff"
    assert len(media.read_audio(bytes(streamed), MEL)) == 32000
    with pytest.raises(InputError, match=r"over the limit of 1\.5 s"):
        media.read_audio(bytes(streamed), short)


@pytest.mark.parametrize(("riff", "data"), [(0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0x7FFFF024, 0x7FFFF000)])
def test_a_wav_that_went_through_a_pipe_is_read_to_its_end(riff, data):
    """The sizes that FFmpeg, other writers and SoX leave where they cannot go back to the header."""
    streamed = bytearray(make_sound(2.0))
    place = streamed.index(b"data")
    streamed[4:8] = riff.to_bytes(4, "little")
    streamed[place + 4 : place + 8] = data.to_bytes(4, "little")
    assert len(media.read_audio(bytes(streamed), MEL)) == 32000


def test_sound_that_is_an_array():
    tone = np.sin(np.arange(22050) * 0.1)
    mono = media.array_audio(tone, 22050, MEL)
    assert mono.dtype == np.float32 and len(mono) == 16000
    np.testing.assert_array_equal(media.array_audio(np.stack([tone, tone]), 22050, MEL), mono)
    np.testing.assert_array_equal(media.array_audio(np.stack([tone, tone], 1), 22050, MEL), mono)
    whole = (tone * 32767).astype(np.int16)
    np.testing.assert_allclose(media.array_audio(whole, 22050, MEL), mono, atol=1e-4)
    for array, message in [
        (np.zeros(0), "the array holds no samples in this range"),
        (np.array([0.0, np.nan]), "the array holds NaN or infinity"),
        (np.zeros((40, 40)), "an array of sound must be numbers [n] or [n, channels], got float64 [40, 40]"),
        (np.zeros(9, complex), "an array of sound must be numbers"),
        (np.array(["a"]), "an array of sound must be numbers"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            media.array_audio(array, 16000, MEL)


@pytest.mark.parametrize("name", ["speech.wav", "speech2.mp3", "video.mp4", "silent.mp4"])
@pytest.mark.parametrize("part", [0.01, 0.4, 0.9])
def test_a_cut_file_is_refused(name, part):
    data = (MEDIA / name).read_bytes()
    cut = data[: int(len(data) * part)]
    with pytest.raises(InputError, match="cut off"):
        if name.startswith("speech"):
            media.read_audio(cut, MEL)
        else:
            media.read_video(cut, PIXELS, {})


@pytest.mark.parametrize(
    ("kind", "codec"),
    [("flac", "flac"), ("aiff", "pcm_s16be"), ("ogg", "libopus"), ("matroska", "pcm_s16le"), ("webm", "libopus")],
)
def test_every_format_that_knows_its_length(kind, codec):
    data = make_sound(3.0, 48000, kind, codec)
    assert len(media.read_audio(data, MEL)) == pytest.approx(48000, abs=2000)
    with pytest.raises(InputError, match="cut off"):
        media.read_audio(data[: int(len(data) * 0.6)], MEL)


def test_a_damaged_middle_is_refused():
    data = bytearray((MEDIA / "video.mp4").read_bytes())
    begin = data.index(b"mdat") + 4
    data[begin + 8 : begin + 9000] = bytes(8992)
    with pytest.raises(InputError, match=r"damaged|cannot decode"):
        list(media.read_video(bytes(data), PIXELS, {}).frames)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"this is no media file, whatever it is called", "cannot decode it"),
        (b"#EXTM3U\n#EXTINF:10,\n/etc/hostname\n#EXT-X-ENDLIST\n", "cannot decode it"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot decode it"),
        (MEDIA / "picture.jpg", "cannot decode it"),
        (MEDIA / "silent.mp4", "it has no sound"),
        (5, "expected a path, a URL or bytes, got int"),
    ],
)
def test_what_is_not_sound(value, message):
    with pytest.raises(InputError, match=message):
        media.read_audio(value, MEL)


def test_real_videos():
    video = media.read_video(MEDIA / "video.mp4", PIXELS, {})
    assert (video.count, video.fps, video.has_audio) == (6, 2.0, True)
    frames = list(video.frames)
    assert len(frames) == 6 and {frame.size for frame in frames} == {(160, 120)}
    silent = media.read_video(MEDIA / "silent.mp4", PIXELS, {})
    assert (silent.count, silent.fps, silent.has_audio) == (4, pytest.approx(1.6), False)


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi", "mpegts"])
def test_the_frames_that_are_chosen(kind):
    video = media.read_video(make_video(4.0, kind=kind), PIXELS, {"fps": 1.0})
    assert grey(video.frames) == [0, 13, 26, 39]
    assert video.fps == pytest.approx(1.0)
    video = media.read_video(make_video(4.0, kind=kind), PIXELS, {"nframes": 2, "video_start": 1.0, "video_end": 2.0})
    assert grey(video.frames) == [10, 20]
    assert video.fps == pytest.approx(10 * 2 / 11)


def test_the_times_of_frames_outweigh_a_wrong_rate():
    slow = make_video(times=[4 * i for i in range(12)])  # says 10 frames a second, has 2.5
    video = media.read_video(slow, PIXELS, {"nframes": 12})
    assert video.fps == pytest.approx(2.5, rel=0.1)


def test_frames_are_resized_as_they_are_decoded():
    counts = []

    def halve(frame, count):
        counts.append(count)
        return frame.reduce(2)

    video = media.read_video(make_video(2.0), PIXELS, {}, resize=halve)
    assert [frame.size for frame in video.frames] == [(32, 24)] * 4 and counts == [4] * 4


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (MEDIA / "speech.wav", {}, "it holds no frames of video"),
        (make_video(0.1), {}, "the video has 1 frames to look at; at least 2 are needed"),
        (make_video(1.0), {"video_start": 5.0}, "no frame lies in the range 5 to inf s; the last is at 0.90 s"),
        (make_video(1.0), {"nframes": 40}, "nframes is 40; this video allows 2 to 10"),
        ([], {}, "the list of frames is empty"),
        ({"a": 1}, {}, "a video must be a path, a URL, bytes, or a list of frames, got dict"),
        (
            [MEDIA / "picture.jpg"],
            {"nframes": 1},
            "nframes chooses among the frames of a file; of a list of frames all",
        ),
    ],
)
def test_videos_that_are_refused(value, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        media.read_video(value, PIXELS, options)


def test_a_video_of_huge_frames_is_refused(monkeypatch):
    monkeypatch.setattr(containers, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(InputError, match="frames are over the limit of 1000 pixels"):
        media.read_video(make_video(), PIXELS, {})


def test_a_list_of_frames():
    array = np.zeros((2, 20, 30, 3), np.uint8)
    video = media.read_video([Image.new("RGB", (30, 20)), array[0], array[1]], PIXELS, {})
    assert (video.count, video.fps, video.has_audio) == (3, 2.0, False)
    assert len(list(video.frames)) == 3
    assert media.read_video(array, PIXELS, {"fps": 5}).fps == 5
    uneven = media.read_video([array[0], MEDIA / "picture.jpg"], PIXELS, {})
    with pytest.raises(InputError, match=re.escape("frame 1 has (320, 240) pixels, the first has (30, 20)")):
        list(uneven.frames)
    with pytest.raises(InputError, match="frame 0: no such file"):
        list(media.read_video(["nowhere.png"], PIXELS, {}).frames)


def test_pictures_of_every_kind(tmp_path):
    assert media.read_image(MEDIA / "picture.jpg").size == (320, 240)
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for picture in (levels, Image.fromarray(levels)):
        np.testing.assert_array_equal(np.asarray(media.read_image(picture)), levels)
    np.testing.assert_array_equal(np.asarray(media.read_image(levels[..., 0]))[..., 2], levels[..., 0])
    np.testing.assert_array_equal(np.asarray(media.read_image(levels[..., :1]))[..., 2], levels[..., 0])
    Image.fromarray(levels.astype(np.uint16)[..., 0] * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(media.read_image(tmp_path / "deep.png"))[..., 1], levels[..., 0])


def test_what_is_transparent_becomes_white():
    for mode in ("RGBA", "LA", "P"):
        clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
        if mode == "P":
            clear.info["transparency"] = clear.getpixel((0, 0))
        assert set(media.read_image(clear).get_flattened_data()) == {(255, 255, 255)}, mode
    half = media.read_image(Image.new("RGBA", (1, 1), (0, 100, 200, 128))).getpixel((0, 0))
    np.testing.assert_allclose(half, (127, 177, 227), atol=1)


def test_a_picture_stands_upright():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (40, 20)).save(file, "jpeg", exif=exif)
    assert media.read_image(file.getvalue()).size == (20, 40)


def png_header(width, height):
    """A picture of this size in 60 bytes, as far as its header goes."""
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(13, head), (0, b"IDAT"), (0, b"IEND")]
    body = b"".join(struct.pack(">I", n) + data + struct.pack(">I", zlib.crc32(data)) for n, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (png_header(9000, 9000), "9000 x 9000 pixels are over the limit of 80000000; make it smaller"),
        (png_header(60000, 60000), "it has more pixels than the limit of 80000000"),
        ((MEDIA / "picture.jpg").read_bytes()[:3000], "not a picture that can be read: image file is truncated"),
        (MEDIA / "speech.wav", "not a picture that can be read"),
        (np.zeros((4, 4, 3)), "an array must be uint8 [height, width] or [height, width, 1, 3 or 4], got float64"),
        (np.zeros((4, 4, 2), np.uint8), "an array must be uint8"),
        (Image.new("F", (4, 4)), "a picture of mode F has no fixed range of brightness"),
        (5, "expected a path, a URL or bytes, got int"),
    ],
)
def test_pictures_that_are_refused(value, message):
    with pytest.raises(InputError, match=re.escape(message)):
        media.read_image(value)


def test_what_a_file_holds():
    info = containers.read_info(io.BytesIO((MEDIA / "video.mp4").read_bytes()))
    assert sorted(info.tracks) == ["audio", "video"]
    video = info.tracks["video"]
    assert video.num_packets == len(video.times) == 30 and video.end == pytest.approx(3.0)
    assert list(containers.read_info(io.BytesIO((MEDIA / "silent.mp4").read_bytes())).tracks) == ["video"]
