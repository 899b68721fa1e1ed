"""The page in a browser: Debian's chromium, with a microphone that plays a voice. ``make test-page`` runs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import requests
from tests.serving.http_client import serve_http

pytestmark = pytest.mark.page

SPEECH = requests.MEDIA / "speech.wav"
HOLD_MILLISECONDS = 2500
PATIENCE = 120_000  # milliseconds, the compiler's included


@pytest.fixture(scope="module")
def address(tiny_model: Path) -> Iterator[str]:
    with serve_http(tiny_model, "--name", "omni") as address:
        yield address


@pytest.fixture
def page(address: str) -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    arguments = [
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        # once and not again and again, so that the speech has an end
        f"--use-file-for-fake-audio-capture={SPEECH}%noloop",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        # the test's own functions are texts, which the page's policy would not let run
        page = browser.new_page(bypass_csp=True, viewport={"width": 1200, "height": 800})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#voice option", state="attached")
        yield page
        assert not problems
        assert not page.locator("#problem").inner_text()
        browser.close()


def count_answers(page: object, count: int) -> None:
    """Waits until so many answers are complete, and were heard."""
    condition = f"document.querySelectorAll('li.assistant .latency').length >= {count}"
    page.wait_for_function(condition, timeout=PATIENCE)  # type: ignore[attr-defined]


def test_a_written_question_is_answered_by_voice(page) -> None:
    page.fill("#text", "Hello there")
    page.press("#text", "Enter")
    # the loudest sample that leaves for the loudspeaker while it speaks
    page.wait_for_function(
        """() => {
            const analyser = window.omni.analyser();
            if (!analyser) return false;
            const samples = new Float32Array(analyser.fftSize);
            analyser.getFloatTimeDomainData(samples);
            return samples.some((sample) => Math.abs(sample) > 1e-3);
        }""",
        timeout=PATIENCE,
    )
    count_answers(page, 1)
    assert page.locator("li.user p").inner_text() == "Hello there"
    assert page.locator("li.assistant p").inner_text()
    assert "first sound after" in page.locator("li.assistant summary").inner_text()


def test_a_spoken_question_is_answered(page) -> None:
    talk = page.locator("#talk")
    talk.dispatch_event("pointerdown")
    page.wait_for_timeout(HOLD_MILLISECONDS)
    assert talk.get_attribute("aria-pressed") == "true"
    talk.dispatch_event("pointerup")
    count_answers(page, 1)
    assert page.locator("li.assistant p").inner_text()
    # the next turn has the sound of this one in its dialogue
    page.select_option("#voice", "")
    page.set_input_files("#files", [str(requests.MEDIA / "picture.jpg")])
    page.fill("#text", "And this?")
    page.press("#text", "Enter")
    count_answers(page, 2)
    assert "first text after" in page.locator("li.assistant summary").nth(1).inner_text()


def test_hands_free_the_server_takes_turns(page) -> None:
    page.click("#hands-free")
    page.wait_for_function("document.querySelectorAll('li.user').length >= 1", timeout=PATIENCE)
    page.wait_for_function(
        "[...document.querySelectorAll('li.assistant p')].some((item) => item.textContent)", timeout=PATIENCE
    )
    page.click("#hands-free")
    assert page.locator("#hands-free").get_attribute("aria-pressed") == "false"


def test_keys_alone_suffice(page) -> None:
    page.locator("#talk").focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(HOLD_MILLISECONDS)
    page.keyboard.press("Enter")
    count_answers(page, 1)


def test_nothing_serious_stands_in_anybodys_way(page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.fill("#text", "Hello there")
    page.press("#text", "Enter")
    count_answers(page, 1)
    for scheme in ("light", "dark"):
        for width in (1200, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.emulate_media(color_scheme=scheme)
            found = Axe().run(page).response["violations"]
            serious = [item for item in found if item["impact"] in ("serious", "critical")]
            assert not serious, [(item["id"], item["help"]) for item in serious]
            # nothing lies beside the screen
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
