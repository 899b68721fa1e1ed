"""Lines of batch files: parsed, confined, their media fetched and decoded; some of them run as ``batch`` does."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import random
import re
import socket
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.engine.outputs import Event, Reply, Utilization
from omni_jax.errors import InputError
from omni_jax.processing.fetch import Network, RemoteAccess
from omni_jax.processing.media_workers import MediaLimits, MediaWorkers
from omni_jax.serving.batch_lines import URL, Line, make_error, parse_line, read_custom_id
from omni_jax.serving.batch_runner import BatchRunner, FileLocations, RunStatus
from omni_jax.serving.media_roots import MediaRoots
from tests.fuzz import seeds
from tests.fuzz.media_targets import make_processor
from tests.fuzz.mutate import HOSTILE, PATHS, URLS, dump_json, mutate_bytes, mutate_inside, mutate_json
from tests.fuzz.target import Case, Target, WorkerError

_RUNNER_SHARE = 100  # every how many cases one goes through the runner of batches
_MAX_RESULT_BYTES = 20_000  # of an error's line, beyond the length of its request

# what signs a URL: the password of a user, or what is in its query
_SECRET = re.compile(r"(?i)https?://([^\s/?#'\"]*s3cret@|[^\s?#'\"]*[?#][^\s'\"]*s3cret)")

# addresses of the hosts that requests may name; a number stands for itself
_HOSTS: dict[str, list[str]] = {
    "public.example": ["93.184.215.14"],
    "private.example": ["127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "mixed.example": ["93.184.215.14", "10.0.0.1"],
    "six.example": ["2606:2800:21f:cb07::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::a00:1"],
    "local.example": ["fe80::1"],
    "nowhere.example": [],
}
_NAMES = (*_HOSTS, "127.0.0.1", "[::1]", "169.254.169.254", "93.184.215.14")


class FakeNetwork:
    """Hosts whose answers are made of what they are asked for; whoever is connected to is written down."""

    def __init__(self, target: Batch) -> None:
        self._target = target
        self._peer: socket.socket | None = None  # of the last connection; what it has sent is lost if it is closed

    def resolve(self, host: str, port: int) -> list[str]:
        try:
            return [str(ipaddress.ip_address(host))]
        except ValueError:
            pass
        if host not in _HOSTS:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return _HOSTS[host]

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        if self._target.trace is not None:
            self._target.trace.connect(address, port)
        ours, theirs = socket.socketpair()
        ours.settimeout(seconds)
        theirs.sendall(self._target.answer)
        theirs.shutdown(socket.SHUT_WR)
        if self._peer is not None:
            self._peer.close()
        self._peer = theirs
        return ours


class Batch(Target):
    """Requests of strangers."""

    own_errors = (InputError,)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.answer = b""  # of all hosts, for the case that is run
        network = FakeNetwork(self)
        access = RemoteAccess(("*",), network=Network(network.resolve, network.connect))
        self.processor = make_processor(self.folder / "processor").with_access(access)
        self.media_root = self.folder / "media"
        self._fill_folders()
        self.rules = type(self.rules)(self.rules.writable, readable=(str(self.media_root),))
        self._lines = make_lines()
        self._answers = make_answers(seeds.make_pictures()["PNG-RGB"])
        self._runner: BatchRunner | None = None
        self._workers: MediaWorkers | None = None

    def _fill_folders(self) -> None:
        """Media that may be named, and beside them files that may not, with links to these."""
        pictures = seeds.make_pictures()
        sounds = seeds.make_media()
        outside = self.folder / "outside"
        for folder in (self.media_root / "folder", outside):
            folder.mkdir(parents=True)
        files = {"a.png": pictures["PNG-RGBA"], "b.jpg": pictures["JPEG-RGB"], "c.gif": pictures["GIF-animated"]}
        files |= {"a.wav": sounds["wav-16"], "b.mp3": sounds["mp3"], "a.mp4": sounds["mp4-mpeg4"], "empty.png": b""}
        for name, data in files.items():
            (self.media_root / name).write_bytes(data)
        (outside / "secret.png").write_bytes(pictures["PNG-RGB"])
        (outside / "secret.wav").write_bytes(sounds["wav-16"])
        (self.media_root / "link.png").symlink_to(outside / "secret.png")
        (self.media_root / "link-folder").symlink_to(outside)
        (self.media_root / "loop.png").symlink_to("loop.png")
        os.mkfifo(self.media_root / "pipe")

    def list_seeds(self) -> list[Case]:
        self.answer = self._answers[0]
        return [Case("line", line.encode(), "request") for line in self._lines]

    def prepare(self, num_cases: int) -> None:
        if num_cases >= _RUNNER_SHARE:
            self._start_runner()

    def make_case(self, rng: random.Random, number: int) -> Case:
        if rng.random() < 0.15:
            lines = [line.encode() for line in self._lines]
            data, label = mutate_bytes(rng, rng.choice(lines), lines), "bytes of a line"
        else:
            data, label = self._make_line(rng), "values of a line"
        answer = rng.choice(self._answers)
        if rng.random() < 0.5:
            answer = mutate_bytes(rng, answer, self._answers)
        is_run = number % _RUNNER_SHARE == _RUNNER_SHARE - 1
        return Case(label, data, "runner" if is_run else "request", {"answer": answer})

    def _make_line(self, rng: random.Random) -> bytes:
        values = json.loads(rng.choice(self._lines))
        host = rng.choice(_NAMES)
        urls = tuple(url.replace("public.example", host) for url in URLS)
        hostile = rng.choice(((*HOSTILE, *urls, *PATHS), urls, PATHS, HOSTILE))
        depth = rng.random()
        if depth < 0.2:
            values = mutate_json(rng, values, hostile)
        elif depth < 0.6:
            mutate_inside(rng, values["body"], hostile)
        else:
            mutate_inside(rng, values["body"]["messages"], hostile)
        return dump_json(values)

    def run_case(self, case: Case) -> None:
        self.answer = case.options.get("answer", self.answer)
        line = Line(1, case.data)
        if case.way == "runner":
            self._run_line(line)
            return
        try:
            _, request = parse_line(line)
            root = str(self.media_root)
            messages = MediaRoots((root,)).confine(request.messages)
            prompt = self.processor(messages, assume_fps=request.options.assume_fps, max_length=4096)
        except InputError as error:
            check_result(line, make_error(line, read_custom_id(line), error).text)
            raise
        assert 0 < len(prompt) <= 4096

    def _run_line(self, line: Line) -> None:
        if self._runner is None:
            self._start_runner()
        assert self._runner is not None
        results = list(self._runner.run([line]))
        assert len(results) == 1, results
        values = check_result(line, results[0].text)
        if values["error"] is not None:
            if values["error"]["code"] == "failed" or "decoded its media died" in values["error"]["message"]:
                raise WorkerError(values["error"]["message"])
            raise InputError(values["error"]["message"])

    def _start_runner(self) -> None:
        # its processes have no network
        processor = self.processor.with_access(RemoteAccess())
        self._workers = MediaWorkers(processor, 1, MediaLimits(seconds=30.0, gigabytes=4.0))
        model: Any = types.SimpleNamespace(
            config=processor.config,
            processor=processor,
            check=lambda options: None,
            scheduler=lambda config: FakeScheduler(),
            submit=lambda scheduler, prompt, options, clip: scheduler.submit(prompt),
        )
        root = str(self.media_root)
        config: Any = types.SimpleNamespace(thinker_slots=4)
        self._runner = BatchRunner(model, "m", self._workers, config, FileLocations(MediaRoots((root,))), RunStatus())
        self._run_line(Line(1, self._lines[0].encode()))

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


class FakeScheduler:
    """Answers every prompt with the same two tokens."""

    utilization = Utilization()
    num_waiting = 0

    def __init__(self) -> None:
        self._prompts: list[Any] = []

    @property
    def busy(self) -> bool:
        return bool(self._prompts)

    @property
    def num_running(self) -> int:
        return len(self._prompts)

    def submit(self, prompt: Any) -> int:
        self._prompts.append(prompt)
        return id(prompt)

    def step(self) -> Iterator[tuple[int, Event]]:
        prompts, self._prompts = self._prompts, []
        samples = np.zeros(480, np.float32)
        for prompt in prompts:
            reply = Reply("hi", (1, 2), "stop", prompt.usage, codec_ids=(1,), audio=samples)
            yield id(prompt), Event(reply=reply)


def check_result(line: Line, text: str) -> dict[str, Any]:
    """Checks that a result is one line of UTF-8 and JSON, and holds no secret of a URL."""
    data = text.encode()
    values = json.loads(data)
    error = values["error"]
    assert b"\n" not in data
    assert error is None or len(data) < _MAX_RESULT_BYTES + 6 * len(line.data or b"")
    # elsewhere, after a mutation, it is text like any other
    assert error is None or not _SECRET.search(error["message"])
    return values


def make_lines() -> list[str]:
    """Requests that can be answered, of every kind of part and option."""
    sound = base64.b64encode(seeds.make_media()["wav-16"]).decode()
    picture = "data:image/gif;base64," + base64.b64encode(seeds.make_pictures()["GIF-one"]).decode()
    text = {"type": "text", "text": "What is this <|im_end|>? é\ud83d\ude00"}
    contents: list[Any] = [
        "hi",
        [text],
        [text, {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}],
        [{"type": "image", "image": "b.jpg", "min_pixels": 3136, "max_pixels": 6272}, text],
        [{"type": "image", "url": picture}, {"type": "image", "path": "c.gif"}],
        [{"type": "image_url", "image_url": "http://public.example/a.png?k=s3cret"}, text],
        [{"type": "image_url", "image_url": {"url": "http://six.example:8080/a/b.png"}}],
        [{"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}],
        [{"type": "audio_url", "audio_url": {"url": "b.mp3"}, "audio_start": 0.01, "audio_end": 0.15}, text],
        [{"type": "audio", "audio": "a.wav"}],
        [{"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 4, "use_audio_in_video": True}, text],
        [{"type": "video", "video": "a.mp4", "nframes": 2, "video_start": 0.1, "video_end": 0.5, "max_pixels": 6272}],
        [{"type": "video", "video": ["a.png", "a.png", "http://public.example/a.png"], "fps": 2.0}],
    ]
    stages = [{"temperature": 0.5, "top_k": 5, "stop": ["a"]}, {"seed": 3, "max_tokens": 64}, {"seed": 4}]
    bodies: list[dict[str, Any]] = [
        {},
        {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 1, "stop": "x", "stop_token_ids": [3], "user": "u"},
        {"modalities": ["text", "audio"], "audio": {"voice": "Ethan", "format": "wav"}, "sampling_params_list": stages},
        {"mm_processor_kwargs": {"max_pixels": 6272, "fps": 1.0}, "return_token_ids": True, "n": 1, "stream": None},
    ]
    lines = []
    for number, content in enumerate(contents):
        messages: list[Any] = [{"role": "system", "content": "You are Qwen."}, {"role": "user", "content": content}]
        if number % 3 == 1:
            answer = {"role": "assistant", "content": None, "audio": {"id": "audio-1", "transcript": "I see."}}
            messages += [answer, {"role": "user", "content": [text]}]
        body = {"model": "m", "messages": messages, **bodies[number % len(bodies)]}
        values = {"custom_id": f"request-{number}", "method": "POST", "url": URL, "body": body}
        lines.append(json.dumps(values))
    return lines


def make_answers(picture: bytes) -> list[bytes]:
    """What a host sends back: the picture, errors, and redirects to where nobody may go."""
    length = f"Content-Length: {len(picture)}\r\n".encode()
    answers = [
        b"HTTP/1.1 200 OK\r\n" + length + b"\r\n" + picture,
        b"HTTP/1.1 200 OK\r\n\r\n" + picture,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(picture), picture),
        b"HTTP/1.0 200 OK\r\nContent-Length: 99999999999999\r\n\r\n" + picture,
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n" + picture,
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        b"",
    ]
    targets = ("http://127.0.0.1/", "http://private.example/", "//metadata.example/x", "file:///etc/passwd", "/again")
    for target in (*targets, "gs://b/x", "http://[::1]:22/", "https://public.example/", "http://mixed.example/"):
        answers.append(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())
    return answers
