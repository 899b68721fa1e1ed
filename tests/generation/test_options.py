"""What the keyword arguments of a request must be."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.engine.sampling import SamplingParams
from omni_jax.errors import InputError
from omni_jax.generation.options import Options


def test_flat_names() -> None:
    options = Options.create(temperature=0.5, top_k=7, seed=3, max_tokens=9, stop="end", stop_token_ids=[5])
    assert options.sampling == SamplingParams(0.5, 7, seed=3)
    assert (options.max_tokens, options.stop, options.stop_token_ids) == (9, ("end",), (5,))
    assert not options.speaks and Options.create(modalities=["text", "audio"]).speaks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 5}, "unknown option max_new_tokens; known: max_tokens, stop"),
        ({"sampling": None}, "unknown option sampling"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be from 1 to 2147483647"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be a whole number"),
        ({"stop": [""]}, "each must be a string of at least one character"),
        ({"stop": ["x"] * 65}, "stop has 65 strings; it may have at most 64"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a list of whole numbers"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids is 1099511627776; it must be from 0 to 2147483647"),
        ({"top_p": 2.0}, "top_p is 2.0; it must be above 0 and at most 1"),
        ({"assume_fps": -1}, "assume_fps is -1; it must be above 0 and at most 1000"),
        ({"noise_seed": -1}, "noise_seed is -1; it must be from 0 to 4294967295"),
        ({"voice": 3}, "voice is 3; it must be a name"),
        ({"modalities": [["text"]]}, "modalities is [['text']]; it must be"),
    ],
)
def test_a_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Options.create(**options)


NUMBERS = st.one_of(
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
    st.none(),
    st.lists(st.integers()),
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(Options.names()), value=NUMBERS)
def test_any_value_is_taken_or_an_input_error(name: str, value: Any) -> None:
    try:
        options = Options.create(**{name: value})
    except InputError as error:
        assert name in str(error) and len(str(error)) < 300
    else:
        assert isinstance(options, Options)
