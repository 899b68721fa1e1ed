"""Pictures of the server's page, after a question about a picture was answered: desk and phone, light and dark.

    python serve.py http --model checkpoints/omni-tiny
    python tools/page_screenshots.py http://127.0.0.1:8000 docs --picture star.png --text "What colour is the star?"

Needs Debian's chromium (apt install chromium) and pip install -e '.[test-page]'.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import printable

# an optional dependency; without it there is nothing to do here
try:
    from playwright.sync_api import Error, sync_playwright  # pyright: ignore[reportMissingImports]
except ImportError:
    sys.exit("this needs playwright: pip install -e '.[test-page]'")

SIZES = {"desk": (1100, 700), "phone": (390, 760)}  # of the window: width and height in pixels
SCHEMES = ("light", "dark")
_PATIENCE = 300_000  # milliseconds, that compiling may take


@dataclass(frozen=True)
class Options:
    """What is asked."""

    address: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Of a running server."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Where pictures are written: page_desk_light.png and so on."""
    text: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")]
    """A question; given again, the next one of the dialogue."""
    picture: Path | None = None
    """That is asked about."""


def draw_page(options: Options, chromium: str) -> list[Path]:
    """Asks the questions and writes the pictures; returns their files.

    Raises:
      playwright.sync_api.Error: if the page does not answer.
    """
    written = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--autoplay-policy=no-user-gesture-required"]
        )
        # what waits for an answer is a text that is run, which the page's policy would not let run
        width, height = SIZES["desk"]
        page = browser.new_page(bypass_csp=True, viewport={"width": width, "height": height})
        page.goto(options.address)
        page.wait_for_selector("#voice option", state="attached")
        for number, text in enumerate(options.text, 1):
            if options.picture is not None and number == 1:
                page.set_input_files("#files", str(options.picture))
            page.fill("#text", text)
            page.press("#text", "Enter")
            page.wait_for_function(
                f"document.querySelectorAll('li.assistant .latency').length >= {number}", timeout=_PATIENCE
            )
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            for scheme in SCHEMES:
                page.emulate_media(color_scheme=scheme)
                written.append(options.out / f"page_{size}_{scheme}.png")
                page.screenshot(path=str(written[-1]))
        browser.close()
    return written


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("error: no chromium found: apt install chromium")
    try:
        written = draw_page(options, chromium)
    except Error as e:
        raise SystemExit(f"error: {options.address}: {printable(e.message)}") from None
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
