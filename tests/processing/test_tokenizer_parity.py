"""Token ids and text against ``Qwen2TokenizerFast`` on the same files."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from omni_jax.processing.tokenizer import TextTokenizer
from omni_jax.processing.tokenizer_files import ADDED_TOKENS

text = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["hello world", "the  system's 123\n\n", "e\u0301", "\u212b", " \n ", "I'm you'LL", "?!\r\n"]),
)
markup = st.sampled_from(ADDED_TOKENS)


@pytest.fixture(scope="module")
def both(folder):
    return TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(st.one_of(st.tuples(text, st.booleans()), st.tuples(markup, st.just(True)))))
def test_ids_are_those_of_the_whole_text(both, pieces):
    ours, theirs = both
    whole = "".join(piece for piece, _ in pieces)
    names = re.compile("|".join(map(re.escape, ADDED_TOKENS)))
    if len(names.findall(whole)) != sum(piece in ADDED_TOKENS for piece, _ in pieces):
        return  # pieces of text that make up a special name together: these are walled off
    assert ours.encode(pieces) == theirs(whole)["input_ids"]


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.integers(0, 533), max_size=40))
def test_text_of_ids(both, ids):
    ours, theirs = both
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
