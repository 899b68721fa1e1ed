"""``serve.py batch`` as a user runs it: its lines, its errors, and what is left when it is killed."""

from __future__ import annotations

import io
import json
import pickle
import signal
import socket
import subprocess
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
import serve
from omni_jax.checkpoint.convert import to_jax
from omni_jax.config import OmniConfig, TalkerConfig, TextConfig, ThinkerConfig
from omni_jax.engine.outputs import Reply
from omni_jax.errors import InputError
from omni_jax.processing.files import open_file
from omni_jax.serving.batch import make_spec, run_batch
from omni_jax.serving.commands import BatchCommand
from omni_jax.sharding import MeshConfig
from tests.bucket import Bucket
from tests.processes import ROOT, run, start
from tests.serving import requests
from tools.make_checkpoint import write_checkpoint

NUM_GOOD = 35  # every medium, spoken and not
BAD_LINES = {2 + 2 * i: i for i in range(25)}  # of the file, from 0 on
NUM_LINES = NUM_GOOD + len(BAD_LINES)
# results; the second kill tears a line
KILLED_AFTER = (0, 25)
SLOWEST_START = 120.0  # seconds
TIMES = ("created", "expires_at")


def command(model: Path, folder: Path, name: str, *options: str) -> list[str]:
    files = ["-i", str(folder / "requests.jsonl"), "-o", str(folder / f"{name}.jsonl")]
    usual = ["--warmup-tokens", "0", "--workers", "2", "--slots", "8", "--audio-dir", str(folder / name)]
    return ["serve.py", "batch", "--model", str(model), *files, *usual, *options]


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(data) for data in (folder / f"{name}.jsonl").read_bytes().splitlines()]


def compared(values: Any, name: str) -> Any:
    """Without times and the name of the run."""
    if isinstance(values, dict):
        return {k: compared(v, name) for k, v in values.items() if k not in TIMES}
    if isinstance(values, list):
        return [compared(v, name) for v in values]
    return values.replace(f"/{name}/", "/run/") if isinstance(values, str) else values


def comparable(folder: Path, name: str) -> list[str]:
    """The lines in order, as text."""
    return sorted(json.dumps(compared(values, name)) for values in results(folder, name))


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good requests of every kind, and bad ones of every kind among them."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "media").symlink_to(requests.MEDIA)
    lines = [requests.good(i).encode() for i in range(NUM_GOOD)]
    for place, (data, _) in zip(BAD_LINES, requests.bad(), strict=True):
        lines.insert(place, data if isinstance(data, bytes) else data.encode())
    (folder / "requests.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return run(*command(tiny_model, folder, "unbroken"), "--media-root", str(ROOT))


def test_every_line_has_its_result(folder: Path, unbroken: subprocess.CompletedProcess[str]) -> None:
    assert unbroken.returncode == 0, unbroken.stderr
    values_of_lines = results(folder, "unbroken")
    wrong = requests.bad()
    assert len(wrong) == 25 and len(values_of_lines) == NUM_LINES
    failed = [values for values in values_of_lines if values["error"] is not None]
    assert all((values["response"] is None) == (values["error"] is not None) for values in values_of_lines)
    messages = {values["id"]: values["error"]["message"] for values in failed}
    for place, i in BAD_LINES.items():
        assert wrong[i][1] in messages[f"batch_req_{place + 1:08d}"]
    assert len(failed) == len(wrong)
    summary = json.loads(unbroken.stdout)
    assert (summary["answered"], summary["failed"]) == (NUM_GOOD, len(wrong))
    assert summary["tokens_per_second"] > 0 and 0 <= summary["padding"]["text"] < 1
    assert f"{NUM_LINES}/{NUM_LINES}" in unbroken.stderr.replace(" ", "")


def test_answers_are_those_of_generate(model: omni_jax.OmniModel, folder: Path, unbroken: Any) -> None:
    by_id = {values["custom_id"]: values["response"] for values in results(folder, "unbroken") if values["response"]}
    for number in (0, 1, 2, 3, 4, 15, 25):
        request = json.loads(requests.good(number))["body"]
        for message in request["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] in ("image_url", "video_url", "video"):
                    part |= requests.SMALL
                    for key in ("video", "video_url"):
                        if key in part:
                            part[key] = str(folder / part[key])
                    if part["type"] == "image_url":
                        part["image_url"]["url"] = str(folder / part["image_url"]["url"])
        options: dict[str, Any] = dict(max_tokens=request["max_completion_tokens"])
        if "modalities" in request:
            talker, noise = request["sampling_params_list"][1:]
            options |= dict(modalities=("text", "audio"), voice="Ethan", talker=talker, noise_seed=noise["seed"])
        check(by_id[f"good-{number}"], model.generate(request["messages"], **options))


def check(response: dict[str, Any], reply: Reply) -> None:
    body = response["body"]
    (choice,) = body["choices"]
    assert choice["message"]["content"] == reply.text
    assert (choice["token_ids"], choice["finish_reason"]) == (list(reply.token_ids), reply.finish_reason)
    assert body["usage"]["prompt_tokens"] == reply.usage.total
    if reply.audio is None:
        assert "audio" not in choice["message"]
        return
    audio = choice["message"]["audio"]
    assert audio["codec_ids"] == list(reply.codec_ids) and audio["transcript"] == reply.text
    speech = samples(Path(audio["path"]))
    assert len(speech) == len(reply.audio)
    # as for batches in tests/generation/test_model_speech.py: the blocks of several replies are one list
    assert np.abs(speech / 32767 - reply.audio).max(initial=0) < 1e-3


@pytest.mark.long
def test_killed_it_goes_on(tiny_model: Path, folder: Path, unbroken: Any) -> None:
    """The results are those of the unbroken run; no line twice, none torn, every sound complete."""
    name = "killed"
    words = [*command(tiny_model, folder, name), "--media-root", str(ROOT)]
    file = folder / f"{name}.jsonl"
    for num_results in KILLED_AFTER:
        process = start(*words)
        started = time.monotonic()
        while not file.exists() or file.read_bytes().count(b"\n") < num_results:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() - started < SLOWEST_START
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if num_results == 25:  # torn in the middle of a line, as a machine that stops may leave it
            with file.open("ab") as out:
                out.write(b'{"id": "batch_req_00000499", "custom')
    assert file.read_bytes().count(b"\n") < NUM_LINES
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert len(results(folder, name)) == NUM_LINES
    assert comparable(folder, name) == comparable(folder, "unbroken")
    sounds = sorted(path.name for path in (folder / "unbroken").glob("*.wav"))
    assert sounds == sorted(path.name for path in (folder / name).glob("*.wav")) and sounds
    for sound in sounds:
        a, b = samples(folder / "unbroken" / sound), samples(folder / name / sound)
        assert a.shape == b.shape and np.abs(a - b).max(initial=0) <= 33  # 1e-3, as above
    assert json.loads(done.stdout)["before"]["answered"] > 0


@pytest.fixture(scope="module")
def meshed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads two devices can share, three requests, and what one device answers."""
    folder = tmp_path_factory.mktemp("meshed")
    text, talker = TextConfig.tiny(num_key_value_heads=2), TalkerConfig.tiny(num_key_value_heads=2)
    config = OmniConfig.tiny(thinker_config=ThinkerConfig.tiny(text_config=text), talker_config=talker)
    write_checkpoint(folder / "published", config, dtype="float32")
    to_jax(folder / "published", folder / "model")
    (folder / "media").symlink_to(requests.MEDIA)
    (folder / "requests.jsonl").write_text("\n".join(requests.good(i) for i in (2, 5, 9)) + "\n")
    batch(folder / "model", str(folder / "requests.jsonl"), str(folder / "one.jsonl"), media_root=str(ROOT))
    assert len(results(folder, "one")) == 3
    return folder


def ids_by_name(folder: Path, name: str) -> dict[str, tuple[list[int], list[int]]]:
    return {values["custom_id"]: ids(values) for values in results(folder, name)}


@pytest.mark.long
def test_over_a_mesh_the_ids_are_the_same(meshed: Path) -> None:
    words = [*command(meshed / "model", meshed, "two"), "--media-root", str(ROOT), "--mesh.tensor", "2"]
    done = run(*words, devices=2)
    assert done.returncode == 0, done.stderr
    assert ids_by_name(meshed, "two") == ids_by_name(meshed, "one")


@pytest.mark.long
def test_over_two_hosts_the_ids_are_the_same(meshed: Path) -> None:
    """From where a run has left off."""
    done = (meshed / "one.jsonl").read_bytes().splitlines(keepends=True)
    (meshed / "hosts.jsonl").write_bytes(b"".join(done[:2]))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    together = ["--mesh.tensor", "2", "--distributed", "--coordinator", address, "--processes", "2"]
    words = [*command(meshed / "model", meshed, "hosts"), "--media-root", str(ROOT), *together]
    hosts = [start(*words, "--process", str(i)) for i in range(2)]
    outputs = [host.communicate(timeout=900) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert json.loads(outputs[0][0].splitlines()[-1])["answered"] == 1
    assert "{" not in outputs[1][0]  # nor does the other one print anything, but for what its collectives do
    assert ids_by_name(meshed, "hosts") == ids_by_name(meshed, "one")
    assert len(results(meshed, "hosts")) == 3


@pytest.fixture
def slice_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster with a slice of two hosts, whose four chips each are promised and not there."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for worker in range(2):
        labels = {"ray.io/tpu-slice-name": "slice", "ray.io/tpu-worker-id": str(worker)}
        labels |= {"ray.io/tpu-pod-type": "v4-16", "ray.io/tpu-topology": "2x2x2"}
        head = {"TPU-v4-16-head": 1} if worker == 0 else {}
        # what hosts of Google are told of themselves
        described = {"TPU_NAME": "slice", "TPU_WORKER_ID": str(worker), "TPU_ACCELERATOR_TYPE": "v4-16"}
        resources = {"TPU": 4, **head}
        cluster.add_node(
            num_cpus=1, resources=resources, labels=labels, env_vars={**described, "TPU_TOPOLOGY": "2x2x2"}
        )
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.mark.long
def test_an_actor_over_the_hosts_of_a_slice(meshed: Path, slice_address: str) -> None:
    """With the ids of one host."""
    words = [*command(meshed / "model", meshed, "slice"), "--media-root", str(ROOT), "--mesh.tensor", "2"]
    engine = ["--engine", "ray", "--ray.address", slice_address, "--ray.slice", "v4:2x2x2"]
    done = run(*words, *engine)
    assert done.returncode == 0, done.stderr
    assert ids_by_name(meshed, "slice") == ids_by_name(meshed, "one")


def batch(model: Path, input: str, output: str, **options: Any) -> dict[str, tuple[list[int], list[int]]]:
    """The ids of a run in this process."""
    command = BatchCommand(model=model, input=input, output=output, slots=4, workers=1, warmup_tokens=0, **options)
    run_batch(command)
    with open_file(output) as file:
        lines = [json.loads(data) for data in file]
    return {values["custom_id"]: ids(values) for values in lines}


def test_in_a_bucket(tiny_model: Path, tmp_path: Path, gs: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    """What is on a disk in the other tests. Media have one in tests/data; workers do not know of this one."""
    lines = "\n".join(requests.good(i) for i in (0, 2, 5, 9))
    (tmp_path / "requests.jsonl").write_text(lines)
    here = batch(tiny_model, str(tmp_path / "requests.jsonl"), str(tmp_path / "r.jsonl"))
    gs.pipe("gs://b/in/requests.jsonl", lines.encode())
    places = ("gs://b/in/requests.jsonl", "gs://b/out/r.jsonl")
    there = batch(tiny_model, *places, audio_dir="gs://b/speech", captions=("srt", "vtt"))
    assert there == here and len(here) == 4
    paths = [f"/b/speech/batch_req_0000000{i}.{form}" for i in (1, 3) for form in ("srt", "vtt", "wav")]
    assert gs.find("b") == ["/b/in/requests.jsonl", "/b/out/r.jsonl", *paths]
    assert gs.cat_file(paths[1]).startswith(b"WEBVTT\n") and b" --> " in gs.cat_file(paths[3])
    with wave.open(io.BytesIO(gs.cat_file(paths[-1]))) as file:
        assert file.getnframes() == 480 * len(here["good-5"][1]) > 0
    assert batch(tiny_model, *places) == here  # nothing is left to do
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["before"] == {"answered": 4, "failed": 0}
    with pytest.raises(InputError, match=r"-i gs://b/none.jsonl: no such file"):
        batch(tiny_model, "gs://b/none.jsonl", "gs://b/r.jsonl")


def test_speech_that_cannot_be_written_ends_the_run(tiny_model: Path, tmp_path: Path) -> None:
    """It is not the line's fault, so that it must not have a result; the run can go on when there is room."""
    (tmp_path / "requests.jsonl").write_text(requests.good(0))
    (tmp_path / "speech" / "batch_req_00000001.wav").mkdir(parents=True)
    places = (str(tmp_path / "requests.jsonl"), str(tmp_path / "r.jsonl"))
    with pytest.raises(InputError, match=r"cannot write .*00000001.wav: .*goes on"):
        batch(tiny_model, *places, audio_dir=str(tmp_path / "speech"))
    (tmp_path / "speech" / "batch_req_00000001.wav").rmdir()
    assert len(batch(tiny_model, *places, audio_dir=str(tmp_path / "speech"))) == 1


def ids(values: dict[str, Any]) -> tuple[list[int], list[int]]:
    (choice,) = values["response"]["body"]["choices"]
    return choice["token_ids"], choice["message"].get("audio", {}).get("codec_ids", [])


@pytest.mark.parametrize(
    "options, message",
    [
        (("--slots", "0"), "--slots is 0"),
        (("--workers", "0"), "--workers is 0"),
        (("--media.seconds", "0"), "--media.seconds is 0.0; it must be above 0"),
        (("--ray.actors", "-1"), "--ray.actors is -1"),
        (("--media-root", "/nowhere"), "--media-root: the folder /nowhere does not exist"),
        (("--captions", "srt", "--audio-dir", "None"), "--captions are written beside files of sound"),
        (("--distributed",), "--distributed is of one model over several hosts: give --mesh"),
        (("--mesh.tensor", "3"), "a mesh of data=1 x fsdp=1 x sequence=1 x tensor=3 needs 3 devices"),
    ],
)
def test_mistakes_are_told_in_a_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "requests.jsonl").write_text(requests.good(0) + "\n")
    assert serve.main(command(tiny_model, tmp_path, "out", *options)[1:]) == 1
    assert message in capsys.readouterr().err


def test_a_worker_is_made_from_a_spec_that_can_be_sent(tmp_path: Path) -> None:
    places = dict(model=tmp_path, input=str(tmp_path / "in.jsonl"), output="out.jsonl")
    spec = make_spec(BatchCommand(**places, mesh=MeshConfig(tensor=4)))
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec.model.mesh.num_devices == 4 and spec.locations.media_roots.base_dir == str(tmp_path.resolve())
