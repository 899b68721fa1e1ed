"""Files that users have: other writers' clocks, odd headers, and files made to do harm. See ``tests/cases``."""

import io
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing import media
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.images import IMAGE_FORMATS, read_image
from omni_jax.processing.vision import PixelSettings, choose_frames, frame_indices
from tests.processing.conftest import CASES, MEDIA

MEL, PIXELS = MelSettings(), PixelSettings()


def decode_all(name):
    """Times and pixels of every frame that the decoder gives."""
    with av.open(str(CASES / name)) as container:
        frames = list(container.decode(video=0))
    return np.array([frame.time for frame in frames]), [frame.to_ndarray(format="rgb24") for frame in frames]


def pixels_of(video):
    return [np.asarray(frame) for frame in video.frames]


def loudest_pitch(samples):
    middle = samples[len(samples) // 2 :][:8000]
    return np.argmax(np.abs(np.fft.rfft(middle))) * 16000 / len(middle)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("two_audio.mp4", 4.096),
        ("segment_1.mkv", 3.904),
        ("ogg_cut_from_webm.ogg", 5.0),
        ("webm_duration_plus300ms.webm", 3.0),
        ("concatenated.mp3", 7.054),
        ("late_audio.mp4", 6.032),
        ("default_second_track.mkv", 4.096),
    ],
)
def test_seconds_of_sound(name, seconds):
    assert len(media.read_audio(CASES / name, MEL)) / 16000 == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize(
    ("name", "num_frames", "seconds"),
    [
        ("two_audio.mp4", 40, 4.0),
        ("segment_1.mkv", 39, 3.9),
        ("webm_duration_plus300ms.webm", 30, 3.0),
        ("vp8_2p.webm", 200, 8.0),
        ("late_audio.mp4", 60, 6.0),
        ("default_second_track.mkv", 40, 4.0),
    ],
)
def test_frames_of_a_constant_rate(name, num_frames, seconds):
    """They are the reference's: even in their number, which is the decoder's and not that of packets."""
    video = media.read_video(CASES / name, PIXELS, {})
    assert video.count / video.fps == pytest.approx(seconds)
    _, pixels = decode_all(name)
    assert len(pixels) == num_frames
    for frame, i in zip(pixels_of(video), frame_indices(num_frames, video.count), strict=True):
        np.testing.assert_array_equal(frame, pixels[i])
    with pytest.raises(InputError, match=f"this video allows 2 to {num_frames // 2 * 2}"):
        media.read_video(CASES / name, PIXELS, {"nframes": num_frames + 2})


def test_a_range_of_frames_where_packets_are_more():
    times, pixels = decode_all("vp8_2p.webm")
    inside = np.flatnonzero((times >= 5.0) & (times <= 7.0))
    video = media.read_video(CASES / "vp8_2p.webm", PIXELS, {"video_start": 5.0, "video_end": 7.0})
    for frame, i in zip(pixels_of(video), inside[frame_indices(len(inside), video.count)], strict=True):
        np.testing.assert_array_equal(frame, pixels[i])


@pytest.mark.parametrize(("name", "error_before"), [("vfr2.mp4", 3.0), ("tr.gif", 1.5)])
def test_frames_of_a_variable_rate(name, error_before):
    times, pixels = decode_all(name)
    video = media.read_video(CASES / name, PIXELS, {})
    grid_times = times[0] + np.arange(video.count) / video.fps
    nearest = [int(np.argmin(np.abs(times - second))) for second in grid_times]
    # frames are up to half of the longest gap from where they are said to be
    assert np.abs(times[nearest] - grid_times).max() <= np.diff(times).max() / 2 + 1e-6
    # and an even choice by number is not
    by_number = times[frame_indices(len(times), video.count)]
    assert np.abs(by_number - grid_times).max() > error_before
    for frame, i in zip(pixels_of(video), nearest, strict=True):
        if name.endswith("mp4"):
            np.testing.assert_array_equal(frame, pixels[i])


def test_a_small_jitter_is_a_constant_rate():
    times = np.arange(100) / 10
    even = choose_frames(times, 10.0, PIXELS, {})
    rng = np.random.default_rng(0)
    jittered = choose_frames(times + rng.uniform(-0.04, 0.04, 100) * (times > 0), 10.0, PIXELS, {})
    np.testing.assert_array_equal(even.indices, jittered.indices)
    assert even.fps == jittered.fps == 2.0


def test_pictures_that_begin_late_stand_from_the_beginning():
    choice = choose_frames(2.0 + np.arange(30) / 10, 10.0, PIXELS, {})
    grid_times = np.arange(len(choice.indices)) / choice.fps
    np.testing.assert_array_equal(choice.indices[grid_times <= 2.0], 0)
    late = grid_times > 2.0
    np.testing.assert_allclose(2.0 + choice.indices[late] / 10, grid_times[late], atol=0.051)


def test_late_sound_lies_where_its_time_stamps_say():
    samples = media.read_audio(CASES / "late_audio.mp4", MEL)
    begin = round(1.936 * 16000)
    assert not samples[:begin].any()
    assert np.abs(samples[begin : begin + 4000]).max() > 0.05
    options = {"video_start": 1.0, "video_end": 3.0}
    video = media.read_video(CASES / "late_audio.mp4", PIXELS, options, mel=MEL)
    np.testing.assert_array_equal(video.sound.samples, samples[16000:48000])
    np.testing.assert_array_equal(pixels_of(video)[0], decode_all("late_audio.mp4")[1][10])
    silent = media.read_video(CASES / "late_audio.mp4", PIXELS, {"video_end": 1.5}, mel=MEL)
    assert len(silent.sound.samples) == 24000 and not silent.sound.samples.any()


def test_gaps_in_sound_are_silent():
    """Three seconds of a tone, of which the packets of one second are left out."""
    written = io.BytesIO()
    tone = (np.sin(2 * np.pi * 440 * np.arange(48000) / 16000) * 16000).astype(np.int16)
    with av.open(written, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for begin in [*range(0, 16000, 800), *range(32000, 48000, 800)]:
            frame = av.AudioFrame.from_ndarray(tone[None, begin : begin + 800], format="s16", layout="mono")
            frame.sample_rate = 16000
            frame.pts = begin
            container.mux(stream.encode(frame))
    expected = tone / np.float32(32768)
    expected[16000:32000] = 0
    np.testing.assert_array_equal(media.read_audio(written.getvalue(), MEL), expected)


def test_the_default_track_is_taken():
    assert loudest_pitch(media.read_audio(CASES / "default_second_track.mkv", MEL)) == 880
    assert loudest_pitch(media.read_audio(CASES / "two_audio.mp4", MEL)) == 440


def test_a_bad_packet_is_skipped_and_counted(ask):
    sound = media.read_sound(CASES / "concatenated.mp3", MEL)
    assert sound.num_bad_packets == 1
    usage = ask({"type": "audio", "audio": str(CASES / "concatenated.mp3")}).usage
    assert usage.num_bad_packets == 1 and usage.audio_seconds == pytest.approx(7.05, abs=0.01)
    assert ask({"type": "audio", "audio": str(MEDIA / "speech2.mp3")}).usage.num_bad_packets == 0


def test_a_video_is_as_long_in_pictures_and_sound(ask):
    usage = ask({"type": "video", "video": str(CASES / "two_audio.mp4")}).usage
    assert usage.video_seconds == 4.0 and usage.audio_seconds == pytest.approx(4.1, abs=0.01)


def test_colours_are_those_of_the_file():
    """BT.709 in limited range: red, green and blue bands as they were drawn."""
    first = np.asarray(next(iter(media.read_video(CASES / "colour_bt709.mp4", PIXELS, {}).frames))).astype(int)
    np.testing.assert_allclose(first[0, 0], (200, 28, 38), atol=2)
    np.testing.assert_allclose(first[0, 32], (29, 179, 58), atol=2)


def set_display_matrix(data, a, b, c, d):
    """The same MP4 file with another matrix in the header of its first track."""
    begin = data.index(b"tkhd") + 4
    begin += 40 if data[begin] == 0 else 52
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return data[:begin] + matrix + data[begin + 36 :]


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_pictures_are_turned_and_mirrored(matrix):
    """A stored pixel (x, y) is shown at (a x + c y, b x + d y), moved so that all lies in the picture."""
    data = set_display_matrix((CASES / "m_hflip.mp4").read_bytes(), *matrix)
    shown = pixels_of(media.read_video(data, PIXELS, {"nframes": 2}))[0]
    stored = decode_all("m_hflip.mp4")[1][0]
    a, b, c, d = matrix
    y, x = np.mgrid[: stored.shape[0], : stored.shape[1]]
    column = a * x + c * y
    line = b * x + d * y
    expected = np.zeros_like(shown)
    expected[line - line.min(), column - column.min()] = stored
    np.testing.assert_array_equal(shown, expected)


def test_the_mirrored_case_is_mirrored():
    stored = decode_all("m_hflip.mp4")[1][0]
    shown = pixels_of(media.read_video(CASES / "m_hflip.mp4", PIXELS, {}))[0]
    np.testing.assert_array_equal(shown, stored[:, ::-1])


def test_damaged_metadata_turn_nothing():
    assert read_image(CASES / "bad_exif.png").size == (64, 64)


@pytest.mark.parametrize("name", [*IMAGE_FORMATS, "MPO"])
def test_every_format_of_pictures(name):
    written = io.BytesIO()
    picture = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    options = {"save_all": True} if name == "MPO" else {}
    picture.save(written, name, **options)
    np.testing.assert_allclose(np.asarray(read_image(written.getvalue())).astype(int), np.asarray(picture), atol=12)


def test_pictures_start_no_program(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(InputError, match="not a picture that can be read; known formats: PNG"):
        read_image(CASES / "hostile" / "eps-runs-ghostscript.png")


CHILD = """
import re, resource, sys, time
from omni_jax.processing import media
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.images import read_image

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20), -1))
begin = time.process_time()
for name in sys.argv[1:]:
    try:
        read_image(name) if not name.endswith("mp4") else media.read_audio(name, MelSettings())
        print("read")
    except media.InputError as e:
        print(e)
print(time.process_time() - begin)
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_hostile_files_are_refused_in_little_time_and_memory():
    names = ["png-100000.png", "webp-8900.webp", "mp4-samples-bomb.mp4"]
    paths = [str(CASES / "hostile" / name) for name in names]
    run = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, check=True)
    png, webp, bomb, seconds, peak = run.stdout.splitlines()
    assert "not a picture that can be read" in png or "pixels" in png
    assert webp == "8900 x 8900 pixels are over the limit of 25000000; make it smaller"
    assert bomb == "its tables describe over 4000000 samples, in a file of 594 bytes; cut it into pieces"
    assert float(seconds) < 10  # of this process; to open the bomb takes over a minute, and 2.5 GB
    assert int(peak) < 1 << 20  # KiB; of this process alone, for getrusage counts what its parent held before it


@pytest.mark.parametrize("field", ["stts", "stsz"])
def test_either_table_of_samples_is_counted(field):
    data = bytearray((CASES / "hostile" / "mp4-samples-bomb.mp4").read_bytes())
    table = {"stts": data.index(b"stsz") + 12, "stsz": data.index(b"stts") + 12}[field]
    data[table : table + 4] = struct.pack(">I", 1)
    with pytest.raises(InputError, match="its tables describe over 4000000 samples"):
        media.read_audio(bytes(data), MEL)


@pytest.mark.parametrize(
    "name",
    ["two_audio.mp4", "default_second_track.mkv", "vp8_2p.webm", "webm_duration_plus300ms.webm", "tr.gif", "vfr2.mp4"],
)
@pytest.mark.parametrize("part", [0.3, 0.95])
def test_the_same_files_cut_off_are_refused(name, part):
    data = (CASES / name).read_bytes()
    with pytest.raises(InputError, match="cut off"):
        media.read_video(data[: int(len(data) * part)], PIXELS, {}, mel=MEL)


def test_an_unexpected_error_of_a_decoder_is_an_input_error(monkeypatch, ask):
    def fail(*args, **options):
        raise RuntimeError("of an unknown type")

    monkeypatch.setattr(media, "decode_tracks", fail)
    with pytest.raises(InputError, match=r"content\[0\] \(audio '.*speech.wav'\): cannot decode it: RuntimeError"):
        ask({"type": "audio", "audio": str(MEDIA / "speech.wav")})
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match=r"content\[0\] \(image '.*picture.jpg'\): not a picture that can be read"):
        ask({"type": "image", "image": str(MEDIA / "picture.jpg")})
