"""What a server must withstand: damaged media, files that are not for it, addresses of its own network."""

from __future__ import annotations

import base64
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.http_client import find_server, serve_http
from tests.serving.test_damaged import MAX_GROWTH, damaged

MAX_SECONDS = 10.0  # of a request
TYPES = {"image": "image_url", "audio": "audio_url", "video": "video_url"}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    return damaged(tmp_path_factory.mktemp("damaged"))


@pytest.fixture(scope="module")
def address(tiny_model: Path, media: list[tuple[Path, str]]) -> Iterator[str]:
    """It may fetch from all hosts that are public, and read one folder."""
    folder = str(media[0][0].parent)
    limits = ("--media.seconds", "8", "--media.gigabytes", "2", "--workers", "2")
    with serve_http(tiny_model, "--allow-web", "*", "--media-root", folder, *limits) as address:
        yield address


@pytest.fixture
def listener() -> Iterator[tuple[int, list[str]]]:
    """The port of a server of this machine's own, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], asked
        server.shutdown()
        thread.join()


def ask(address: str, kind: str, url: str) -> httpx.Response:
    part = {"type": TYPES[kind], TYPES[kind]: {"url": url}}
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}], "max_tokens": 1}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)


def test_damaged_media(address: str, media: list[tuple[Path, str]]) -> None:
    """Sent along, or named as files: an error of the request or an answer, soon, and no memory that stays."""
    server = find_server(address)
    sizes = []
    statuses = set()
    for _ in range(2):
        for number, (path, kind) in enumerate(media):
            url = str(path)
            if number % 2 and path.is_file() and path.stat().st_size < 1 << 20:
                url = f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"
            started = time.monotonic()
            answer = ask(address, kind, url)
            assert time.monotonic() - started < MAX_SECONDS, path
            assert answer.status_code < 500, (path, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], path
            statuses.add(answer.status_code)
        processes = (server, *server.children(recursive=True))
        sizes.append(sum(process.memory_info().rss for process in processes))
    assert 400 in statuses
    assert sizes[1] - sizes[0] < MAX_GROWTH
    assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::7f00:1]",
        "user@127.0.0.1",
        "example.com@127.0.0.1",
        "127。0。0。1",
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_addresses_of_its_own_network(address: str, listener: tuple[int, list[str]], host: str, kind: str) -> None:
    port, asked = listener
    answer = ask(address, kind, f"http://{host}:{port}/secret")
    assert answer.status_code == 400, answer.text
    # refused by its address, and not for want of an answer
    message = answer.json()["error"]["message"]
    assert any(told in message for told in ("public internet", "in the usual form", "name or the password")), message
    assert asked == []


@pytest.mark.parametrize("host", ["169.254.169.254", "metadata.google.internal", "10.0.0.1", "[fd00:ec2::254]"])
def test_addresses_of_clouds(address: str, host: str) -> None:
    started = time.monotonic()
    answer = ask(address, "image", f"http://{host}/computeMetadata/v1/")
    assert answer.status_code == 400, answer.text
    assert time.monotonic() - started < MAX_SECONDS


def test_files_outside_the_folder(address: str, media: list[tuple[Path, str]], tmp_path: Path) -> None:
    folder = media[0][0].parent
    secret = tmp_path / "secret.png"
    secret.write_bytes((Path(__file__).parents[1] / "media" / "picture.png").read_bytes())
    link = folder / "link.png"
    link.symlink_to(secret)
    names = [secret, link, folder / ".." / tmp_path.name / "secret.png", f"file://{secret}", "/etc/passwd"]
    answers = [ask(address, "image", str(name)) for name in names]
    assert [answer.status_code for answer in answers] == [400] * len(names)
    # nor does an error tell what is there
    missing = ask(address, "image", str(tmp_path / "missing.png"))
    assert missing.json()["error"]["message"].replace("missing", "secret") == answers[0].json()["error"]["message"]
