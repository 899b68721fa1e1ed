"""Makes the small pictures, sounds and videos of tests/media; run once, the results are kept in the repository.

    python tools/make_media.py [FOLDER]

Needs the programs espeak-ng, flite and ffmpeg (apt-get install espeak-ng flite ffmpeg).
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw

SENTENCE = "The quick brown fox jumps over the lazy dog near the river."
QUESTION = "What can you see in this picture?"


def run_program(*command: str | Path) -> None:
    # what the program writes is not shown; where it fails, the error has its command
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def make_sounds(folder: Path, scratch: Path) -> None:
    run_program("espeak-ng", "-v", "en", "-s", "185", "-w", scratch / "speech.wav", SENTENCE)
    # 22.05 kHz, mono, 8 bits to keep it small
    run_program("ffmpeg", "-y", "-i", scratch / "speech.wav", "-c:a", "pcm_u8", "-bitexact", folder / "speech.wav")
    run_program("flite", "-voice", "slt", "-t", QUESTION, "-o", scratch / "question.wav")
    # 44.1 kHz, the right channel later and softer than the left
    stereo = "aresample=44100,asplit[l][r];[r]adelay=8,volume=0.6[q];[l][q]join=inputs=2:channel_layout=stereo"
    encoder = ("-c:a", "libmp3lame", "-b:a", "64k", "-bitexact")
    run_program(
        "ffmpeg", "-y", "-i", scratch / "question.wav", "-filter_complex", stereo, *encoder, folder / "speech2.mp3"
    )


def draw_frame(width: int, height: int, time: float = 0.0) -> Image.Image:
    """A colour gradient, a disc that moves to the right and a square that moves down."""
    rows, columns = np.mgrid[0:height, 0:width]  # [height, width] each
    pixels = np.stack([columns * 255 // width, rows * 255 // height, 160 + 0 * rows], -1).astype(np.uint8)
    # what moves depends on time alone, so a frame can be drawn at any time
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    size = min(width, height) // 4
    x = int((0.15 + 0.2 * time) * width)
    y = int((0.1 + 0.15 * time) * height)
    pen.ellipse((x, height // 2 - size, x + 2 * size, height // 2 + size), fill=(230, 40, 40))
    pen.rectangle((width - 2 * size, y, width - size, y + size), fill=(250, 250, 90), outline=(0, 0, 0))
    return picture


def make_pictures(folder: Path) -> None:
    draw_frame(320, 240).save(folder / "picture.jpg", quality=85)
    # odd sides, and transparent from top to bottom, more and more opaque: what is behind it must become white
    clear = draw_frame(171, 123).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "picture.png", optimize=True)


def make_videos(folder: Path, scratch: Path) -> None:
    for i in range(30):
        draw_frame(160, 120, i / 10).save(scratch / f"{i:03}.png")
    # -bitexact leaves out versions and times, so that the same programs make the same bytes
    frames = ("-framerate", "10", "-i", scratch / "%03d.png")
    encoder = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "28", "-bitexact")
    sound = ("-i", folder / "speech.wav", "-c:a", "aac", "-b:a", "48k", "-t", "3")
    run_program("ffmpeg", "-y", *frames, *sound, *encoder, folder / "video.mp4")
    run_program("ffmpeg", "-y", *frames, "-t", "2.5", *encoder, folder / "silent.mp4")


def main(folder: tyro.conf.Positional[Path] = Path("tests/media")) -> None:
    """Makes the small pictures, sounds and videos of the tests. Needs espeak-ng, flite and ffmpeg.

    Args:
      folder: where to; files of the same names in it are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        make_sounds(folder, Path(name))
        make_pictures(folder)
        make_videos(folder, Path(name))


if __name__ == "__main__":
    tyro.cli(main)
