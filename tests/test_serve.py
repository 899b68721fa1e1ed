"""``serve.py`` as a user runs it: once in a process of its own, otherwise in this one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tyro

import omni_jax
import serve
from omni_jax.checks import printable
from omni_jax.engine.outputs import Reply, Timings
from omni_jax.errors import InputError
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.layout import Usage
from omni_jax.serving.chat import describe_reply, make_messages, make_options, run_chat, write_caption_files
from omni_jax.serving.commands import ChatCommand
from tests.processes import ROOT, run

MEDIA = ROOT / "tests" / "media"


def run_serve(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run("serve.py", *arguments)


def chat(*arguments: str) -> ChatCommand:
    return tyro.cli(ChatCommand, args=["--model", "m", *arguments])


def test_only_the_reply_goes_to_stdout(tiny_model: Path) -> None:
    picture, speech, video = MEDIA / "picture.jpg", MEDIA / "speech.wav", MEDIA / "video.mp4"
    media = ("--image", picture, "--audio", speech, "--video", video)
    choice = ("--max-tokens", "12", "--temperature", "1", "--seed", "3")
    done = run_serve("chat", "--model", tiny_model, *media, "--text", "What is this?", *choice)
    assert done.returncode == 0, done.stderr

    parts = [{"type": "image", "image": picture}, {"type": "audio", "audio": speech}, {"type": "video", "video": video}]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]
    reply = omni_jax.load(tiny_model).generate(messages, max_tokens=12, temperature=1.0, seed=3)
    assert done.stdout == printable(reply.text) + "\n"  # of a random model, which writes control characters too
    for stage in ("load", "prepare", "encode", "prefill", "decode"):
        assert f"\n{stage} " in done.stderr
    usage = reply.usage
    kinds = f"{usage.text} text, {usage.image} image, {usage.video} video, {usage.audio} audio"
    assert f"prompt: {usage.total} tokens ({kinds})" in done.stderr
    assert f"reply: {len(reply.token_ids)} tokens, " in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "nothing to answer: give --text, --image, --audio or --video"),
        (("--text", "hi", "--top-p", "1.5"), "top_p is 1.5"),
        (("--image", "nowhere.jpg"), "messages[0].content[0] (image 'nowhere.jpg'): no such file"),
        (
            ("--video", str(MEDIA / "silent.mp4"), "--use-audio-in-video", "true"),
            f"messages[0].content[0] (video '{MEDIA / 'silent.mp4'}'): use_audio_in_video is true, but it has no sound",
        ),
    ],
    ids=["nothing", "option", "file", "video"],
)
def test_a_bad_request_is_one_line_and_status_1(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert serve.main(["chat", "--model", str(tiny_model), *arguments]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1 and errors.startswith("error: ")
    assert message in errors


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["chat", "--model", str(tmp_path), "--text", "hi"]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert f"error: {tmp_path} is no checkpoint of omni_jax" in errors
    assert "tools/convert.py to-jax" in errors


@pytest.mark.parametrize(
    "arguments, example", [((), "chat"), (("chat",), "chat"), (("batch",), "batch"), (("http",), "http")]
)
def test_help_teaches(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], example: str) -> None:
    with pytest.raises(SystemExit) as ended:
        serve.main([*arguments, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python serve.py {example} --model" in text


def test_a_reply_of_one_token_has_figures(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["chat", "--model", str(tiny_model), "--text", "hi", "--max-tokens", "1"]) == 0
    assert "reply: 1 tokens" in capsys.readouterr().err
    assert describe_reply(Reply("", (1,), "length", Usage(), Timings())).startswith("1 tokens; cut at --max-tokens")


def test_a_seed_of_the_talker_counts() -> None:
    spoken = ("--text", "hi", "--speak", "--seed", "5")
    assert make_options(chat(*spoken, "--talker.seed", "0"))["talker"]["seed"] == 0
    options = make_options(chat(*spoken, "--talker.max-tokens", "7", "--talker.top-k", "3"))
    talker = options["talker"]
    assert (options["seed"], talker["max_tokens"], talker["top_k"]) == (5, 7, 3)
    assert "seed" not in talker  # it is that of the text, then
    assert "talker" not in make_options(chat("--text", "hi", "--talker.seed", "0"))


def test_media_come_before_text_and_keep_their_order() -> None:
    command = chat("--text", "a", "--video", "v", "--image", "i", "--audio", "s", "--image", "j")
    (message,) = make_messages(command)
    given = [part[part["type"]] for part in message["content"]]
    assert given == ["i", "j", "s", "v", "a"]


def test_the_system_prompt_and_the_options_of_a_video() -> None:
    asked = chat("--system", "Be brief.", "--video", "v", "--use-audio-in-video", "false", "--fps", "1")
    system, user = make_messages(asked)
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == [{"type": "video", "video": "v", "use_audio_in_video": False, "fps": 1.0}]
    assert make_messages(chat("--video", "v"))[0]["content"][0]["use_audio_in_video"] == "auto"


def test_a_text_that_is_to_be_spoken() -> None:
    command = chat("--reply-text", "Good morning.", "--out", "a.wav")
    assert make_options(command)["reply_text"] == "Good morning."
    assert make_messages(command) == [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}]
    assert len(make_messages(chat("--reply-text", "a", "--text", "b", "--speak"))) == 2
    assert "reply_text" not in make_options(chat("--text", "b"))


def test_captions_are_written_beside_the_sound(tmp_path: Path) -> None:
    audio = np.sin(np.arange(24_000)).astype(np.float32)
    reply = Reply("Good day.", (1, 2), "stop", Usage(), audio=audio)
    write_caption_files(reply, tmp_path / "a.wav", chat("--captions", "srt", "--captions", "vtt").captions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.srt", "a.vtt"]
    assert (tmp_path / "a.srt").read_text().splitlines()[2] == "Good day."
    with pytest.raises(InputError, match="--captions are written beside a file of sound"):
        run_chat(chat("--text", "hi", "--captions", "srt"))


def test_the_voice_of_a_clip() -> None:
    command = ChatCommand(Path("model"), text=("hi",), speak=True, ref_audio="ada.wav", ref_text="hello", voice="Ethan")
    assert make_options(command)["voice"] == {"ref_audio": "ada.wav", "ref_text": "hello", "like": "Ethan"}
    with pytest.raises(InputError, match="--ref-text is what a clip says; give the clip too"):
        make_options(ChatCommand(Path("model"), text=("hi",), speak=True, ref_text="hello"))


def test_nothing_to_answer() -> None:
    with pytest.raises(InputError, match="nothing to answer"):
        make_messages(chat("--system", "Be brief."))
