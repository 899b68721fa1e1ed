import json
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.processing.layout import AudioInput
from omni_jax.processing.processor import Processor
from omni_jax.processing.processor_config import ProcessorConfig
from omni_jax.processing.tokenizer_files import PREPROCESSOR
from omni_jax.segments import Grid, Interleaved
from tests.processing.conftest import MEDIA

WAV, MP3 = str(MEDIA / "speech.wav"), str(MEDIA / "speech2.mp3")
VIDEO, SILENT, PICTURE = str(MEDIA / "video.mp4"), str(MEDIA / "silent.mp4"), str(MEDIA / "picture.jpg")


def video(path=VIDEO, **options):
    return {"type": "video", "video": path, **options}


def test_text_in_and_out(processor):
    prompt = processor([{"role": "user", "content": "hello world"}])
    expected = "system\nYou are a helpful assistant.\nuser\nhello world\nassistant\n"
    assert processor.decode(prompt.tokens) == expected
    stream = processor.text_stream()
    assert "".join(stream.push(int(i)) for i in prompt.tokens) + stream.flush() == expected
    shorter = processor([{"role": "user", "content": "hello world"}], add_generation_prompt=False)
    assert expected.startswith(processor.decode(shorter.tokens)) and len(shorter) < len(prompt)


def test_typed_placeholders_stay_text(ask, config):
    prompt = ask({"type": "text", "text": "<|AUDIO|> <|vision_bos|><|IMAGE|><|vision_eos|>"})
    assert prompt.media == () and config.thinker_config.audio_token_index not in prompt.tokens


@pytest.mark.parametrize("setting", ["auto", True, None])
def test_a_video_has_its_sound(ask, setting):
    prompt = ask(video(use_audio_in_video=setting))
    assert any(isinstance(s, Interleaved) for s in prompt.segments)
    assert [type(m).__name__ for m in prompt.media] == ["VisionInput", "AudioInput"]
    assert prompt.usage.audio == 75 and prompt.usage.audio_seconds == pytest.approx(3.0, abs=0.05)


def test_each_video_is_asked_for_itself(ask):
    prompt = ask(video(), video(SILENT), video(use_audio_in_video=False), {"type": "audio", "audio": WAV}, video())
    kinds = [type(s).__name__ for s in prompt.segments if type(s).__name__ != "Text"]
    assert kinds == ["Interleaved", "Grid", "Grid", "Interleaved"]
    assert sum(isinstance(m, AudioInput) for m in prompt.media) == 3
    with pytest.raises(InputError, match="use_audio_in_video is true, but it has no sound"):
        ask(video(SILENT, use_audio_in_video=True))


def grid_of(prompt):
    (segment,) = (s for s in prompt.segments if isinstance(s, Grid | Interleaved))
    return segment.grid if isinstance(segment, Interleaved) else segment


def test_seconds_of_a_video_are_measured_or_assumed(ask):
    assert grid_of(ask(video(SILENT))).seconds == pytest.approx(2 / 1.6)
    assert grid_of(ask(video(SILENT), assume_fps=2.0)).seconds == 1.0
    assert grid_of(ask(video(fps=4))).seconds == pytest.approx(0.5)
    assert grid_of(ask(video(nframes=10))).frames == 5


def test_a_range_of_a_video_has_pictures_and_sound(ask):
    prompt = ask(video(video_start=1.0, video_end=2.0, fps=10))
    assert grid_of(prompt).frames == 5
    assert prompt.usage.audio_seconds == pytest.approx(1.0, abs=0.05)


def test_frames_as_a_video(ask):
    frames = [Image.new("RGB", (64, 48), (i, 0, 0)) for i in range(3)]
    for source in (frames, np.stack([np.asarray(f) for f in frames]), [PICTURE, PICTURE, PICTURE]):
        prompt = ask(video(source, fps=1.0))
        assert grid_of(prompt).frames == 2 and grid_of(prompt).seconds == 2.0
    with pytest.raises(InputError, match=r"video a list of 3 frames\): use_audio_in_video is true"):
        ask(video(frames, use_audio_in_video=True))


def test_sound_as_an_array(ask):
    part = {"type": "audio", "audio": np.zeros(8000, np.float32), "sampling_rate": 8000}
    assert ask(part).usage.audio_seconds == 1.0
    assert ask({**part, "audio_start": 0.5}).usage.audio_seconds == 0.5
    with pytest.raises(InputError, match="an array of samples needs its sampling_rate beside it"):
        ask({"type": "audio", "audio": np.zeros(8000, np.float32)})
    with pytest.raises(InputError, match="sampling_rate is for an array of samples; a file knows its own"):
        ask({"type": "audio", "audio": WAV, "sampling_rate": 16000})
    with pytest.raises(InputError, match="a sound must be a path, a URL, bytes or an array, got list"):
        ask({"type": "audio", "audio": [0.0]})


def test_low_detail_is_a_smaller_picture(ask, tmp_path):
    Image.new("RGB", (1200, 900)).save(tmp_path / "large.png")
    url = (tmp_path / "large.png").as_uri()
    whole = ask({"type": "image_url", "image_url": {"url": url}}).usage.image
    small = ask({"type": "image_url", "image_url": {"url": url, "detail": "low"}}).usage.image
    assert 28 * 28 * small <= 512 * 512 < 28 * 28 * whole


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "image": "a.png"}, "messages[0].content[1] (image 'a.png'): no such file"),
        ({"type": "audio", "audio": b""}, "messages[0].content[1] (audio 0 bytes): it is empty"),
        (
            {"type": "audio_url", "audio_url": "http://a/b.wav"},
            "(audio 'http://a/b.wav'): fetching from the web is off",
        ),
        ({"type": "audio", "audio": SILENT}, f"messages[0].content[1] (audio {SILENT!r}): it has no sound"),
        ({"type": "video", "video": WAV}, f"messages[0].content[1] (video {WAV!r}): it holds no frames of video"),
        ({"type": "video", "video": PICTURE}, f"(video {PICTURE!r}): cannot decode it"),
    ],
)
def test_errors_name_their_place(ask, part, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ask({"type": "text", "text": "What is this?"}, part)


def test_a_prompt_over_the_limit_says_what_took_it(ask):
    parts = [{"type": "image", "image": PICTURE}, video(), {"type": "text", "text": "x"}]
    whole = ask(*parts)
    with pytest.raises(InputError) as error:
        ask(*parts, max_length=len(whole) - 1)
    usage = whole.usage
    for piece in (
        f"the prompt has {len(whole)} tokens, over the limit of {len(whole) - 1}",
        f"({usage.text} text, {usage.image} image, {usage.video} video, {usage.audio} audio)",
        f"the largest item is messages[0].content[1] (video {VIDEO!r}) with {usage.video + usage.audio}",
    ):
        assert piece in str(error.value)
    assert len(ask(*parts, max_length=len(whole))) == len(whole)
    with pytest.raises(InputError, match="over the limit of 32768"):
        ask({"type": "text", "text": "1" * 40_000})


def test_stop_ids(folder, tmp_path):
    assert Processor.load(folder).stop_ids == (514,)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for stop, expected in ((512, (512,)), ([514, 512], (514, 512))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
        assert Processor.load(tmp_path).stop_ids == expected
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "end"}))
    with pytest.raises(CheckpointError, match="eos_token_id must be a token under 640 or up to 100 of them, got 'end'"):
        Processor.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_missing_files_are_named(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"cannot read .*{re.escape(name)}: No such file"):
        Processor.load(tmp_path)


def test_files_that_do_not_belong_together(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace("<|IMAGE|>", "<|image_pad|>"))
    with pytest.raises(CheckpointError, match=re.escape("<|IMAGE|> is token None, but config.json has it as 524")):
        Processor.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    for change, message in [
        ({"feature_size": 80}, "feature_size is 80, but the model takes 128"),
        ({"hop_length": 320}, "sampling_rate / hop_length is 50.0, but the model takes 100"),
        ({"patch_size": 16}, "patch_size is 16, but the model takes 14"),
        ({"merge_size": 3}, "merge_size is 3, but the model takes 2"),
        ({"dither": 0.1}, "dither is 0.1; only 0.0 is supported"),
        ({"sharpen": True}, "unknown key 'sharpen' (value True); known: chunk_length"),
    ]:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **change}))
        with pytest.raises(ConfigError, match=re.escape(message)):
            Processor.load(tmp_path)
    for text in ("[]", "{"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
            Processor.load(tmp_path)


def test_the_preprocessor_file_is_followed():
    settings = ProcessorConfig.from_dict(PREPROCESSOR)
    assert settings == ProcessorConfig()
    later = {"size": {"shortest_edge": 784, "longest_edge": 7840}, "min_pixels": None, "do_resize": True, "fps": 1.0}
    settings = ProcessorConfig.from_dict(later)
    assert (settings.pixels.min_pixels, settings.pixels.max_pixels, settings.pixels.fps) == (784, 7840, 1.0)
    assert ProcessorConfig.from_dict({"max_seconds": 30}).mel.max_seconds == 30


def test_a_dialogue_says_whose_words_its_tokens_are(processor):
    messages = [("user", "hello"), ("assistant", "\nworld"), ("user", "and"), ("assistant", "")]
    prompt, replies = processor.dialogue([{"role": role, "content": text} for role, text in messages])
    end = processor.tokenizer.special_id("<|im_end|>")
    assert processor.decode(prompt.tokens[replies == 0]) == "\nworld"
    assert prompt.tokens[replies == 1].tolist() == [end] and (prompt.tokens[replies >= 0] == end).sum() == 2
    before = processor([{"role": "user", "content": "hello"}])
    assert (replies[: len(before)] == -1).all() and replies[len(before)] == 0
    np.testing.assert_array_equal(prompt.tokens[: len(before)], before.tokens)


def test_a_dialogue_needs_a_template_of_chatml(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
    (tmp_path / "other" / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=re.escape("wrote 0 replies as ChatML has them ('<|im_start|>assistant")):
        Processor.load(tmp_path / "other").dialogue([{"role": "assistant", "content": "hello"}])


def test_a_document_ends_with_its_mark(processor):
    prompt = processor.document("hello <|im_end|>")
    assert prompt.tokens[-1] == processor.tokenizer.special_id("<|endoftext|>")
    assert processor.decode(prompt.tokens) == "hello <|im_end|>" and len(prompt.segments) == 1
    with pytest.raises(InputError, match="the text is empty"):
        processor.document("")
    with pytest.raises(InputError, match="tokens, over the limit of 3"):
        processor.document("hello " * 9, max_length=3)


def test_other_pixels(processor):
    small = processor.with_pixels(max_pixels=112 * 112, video_max_pixels=56 * 56, max_frames=2)
    messages = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, video(SILENT)]}]
    assert small(messages).usage.image <= 16 < processor(messages).usage.image
    assert small(messages).usage.video <= 4 < processor(messages).usage.video


def test_a_processor_travels_between_processes(processor):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "image", "image": PICTURE}]}]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(processor))(messages).tokens, processor(messages).tokens)
