import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.mini_config import mini_config
from omni_jax.processing.processor import Processor
from omni_jax.processing.processor_config import ProcessorConfig
from omni_jax.processing.tokenizer import TextStream, TextTokenizer
from omni_jax.processing.tokenizer_files import ADDED_TOKENS, write_tokenizer
from omni_jax.processing.vision import PixelSettings


@pytest.fixture(scope="module")
def tokenizer(folder):
    return TextTokenizer.load(folder)


def test_special_names_mean_tokens_only_where_they_are_trusted(tokenizer):
    end = tokenizer.special_id("<|im_end|>")
    assert tokenizer.encode([("<|im_end|>", True)]) == [end]
    typed = tokenizer.encode([("<|im_end|>", False)])
    assert end not in typed and tokenizer.decode(typed) == "<|im_end|>"
    # not even when the user ends what the template begins
    assert end not in tokenizer.encode([("<|im", True), ("_end|>", False)])


texts = st.one_of(st.text(max_size=12), st.sampled_from([*ADDED_TOKENS, "<|", "|>", "\n", " ", "hello world", "the"]))


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(texts, max_size=8))
def test_no_typed_text_becomes_a_special_token(tokenizer, pieces):
    ids = tokenizer.encode([(piece, False) for piece in pieces])
    assert not {tokenizer.special_id(name) for name in ADDED_TOKENS} & set(ids)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 700), max_size=40))
def test_the_pieces_of_a_stream_add_up(tokenizer, ids):
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_never_gives_half_a_character(tokenizer):
    text = "a\u00e9\U0001f600 \u4f60\u597d"
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode([(text, False)])]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text
    assert stream.flush() == ""
    for i in tokenizer.encode([("\U0001f600", False)])[:-1]:
        assert stream.push(i) == ""
    assert stream.flush() == "\ufffd"


def test_broken_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json: No such file"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {}}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer.load(tmp_path)


def test_bpe_of_texts(tmp_path):
    """Words of the texts are tokens and other words are not; ids of added tokens stand behind all pieces."""
    config = mini_config(600)
    write_tokenizer(tmp_path, config, ["The quiet monkey.", "A quiet river, the monkey."] * 3)
    config.save(tmp_path)
    processor = Processor.load(tmp_path)
    tokenizer = processor.tokenizer
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode([("A quiet monkey ran.", False)])]
    assert pieces == ["A", " quiet", " monkey", " ", "r", "a", "n", "."]
    assert tokenizer.special_id("<|endoftext|>") == 600
    prompt = processor([{"role": "user", "content": "A quiet river"}])
    assert processor.decode(prompt.tokens.tolist()).count("river") == 1
    again = tmp_path / "again"
    write_tokenizer(again, config, ["The quiet monkey.", "A quiet river, the monkey."] * 3)
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_sizes_of_pictures(tmp_path):
    """What a model is trained with is what it is asked with; a minimum over a new maximum goes down."""
    write_tokenizer(tmp_path, OmniConfig.tiny(), pixels={"video_max_pixels": 112 * 112, "fps": 4.0})
    pixels = ProcessorConfig.load(tmp_path).pixels
    assert (pixels.video_min_pixels, pixels.video_max_pixels, pixels.fps) == (112 * 112, 112 * 112, 4.0)
    assert pixels.max_pixels == PixelSettings.max_pixels
    assert pixels.find_differences({"fps": 4.0, "video_max_pixels": 84 * 84}) == [
        ("video_max_pixels", 84 * 84, 112 * 112)
    ]
