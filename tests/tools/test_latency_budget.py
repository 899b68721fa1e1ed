"""How often each program runs until the first packet, and what is said of sizes that give none."""

from __future__ import annotations

import pytest

from omni_jax.engine.request import ChunkSizes
from omni_jax.errors import ConfigError, InputError
from tools.aot_programs import Shapes
from tools.latency_budget import BudgetCommand, make_lines

BLOCK_CODES = 12
ONE = Shapes(batch=1, cache=2048)


def count_runs(sizes: ChunkSizes) -> dict[str, tuple[int, int]]:
    return {line.label: (line.first, line.second) for line in make_lines(sizes, BLOCK_CODES, ONE)}


def test_tokens_and_codes_to_the_first_packet() -> None:
    """Two tokens more than codes, in calls of 12 after the first 2."""
    usual = count_runs(ChunkSizes())
    assert usual["Thinker, a token"] == (38, 24) and usual["Talker, a code"] == (36, 24)
    short = count_runs(ChunkSizes(first_chunk_codes=24, first_look_ahead=10))
    assert short["Thinker, a token"] == (26, 24) and short["Talker, a code"] == (24, 24)
    # calls of 8 do not end where the codes do
    assert count_runs(ChunkSizes(tokens=8))["Thinker, a token"] == (42, 24)


def test_the_first_chunk_has_its_own_programs() -> None:
    usual = {line.label: line for line in make_lines(ChunkSizes(), BLOCK_CODES, ONE)}
    short = {
        line.label: line for line in make_lines(ChunkSizes(first_chunk_codes=24, first_look_ahead=10), BLOCK_CODES, ONE)
    }
    first = "vocoder, the first chunk"
    assert (usual[first].program, usual[first].shapes.blocks) == ("vocoder-first", 2)
    assert (short[first].program, short[first].shapes.blocks) == ("vocoder-first", 1)
    assert usual["DiT, the first chunk"].shapes.blocks == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(first_chunk_codes=24), ConfigError, "--first-chunk-codes 24 gives no sound: the vocoder looks 34 frames"),
        (dict(first_chunk_codes=40), ConfigError, "take a larger multiple of 12"),
        (dict(first_look_ahead=-1), InputError, "chunk_sizes.first_look_ahead is -1; it must be from 0 to 4096"),
        (dict(model="9b"), ConfigError, "--model is '9b'; there are 7b, 3b, tiny"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_compiles(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BudgetCommand("v5e:2x2", **options).run()
