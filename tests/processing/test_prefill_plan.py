"""Prompts cut into chunks hold what the prompts hold."""

import dataclasses
from types import SimpleNamespace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_jax import mrope
from omni_jax.batch import NO_FEATURE, PADDING, AudioBlocks
from omni_jax.processing.collate import collate
from omni_jax.processing.prefill_plan import (
    AUDIO_BLOCKS,
    BLOCK_WIDTH,
    CALL_BLOCKS,
    NARROW_CHUNK,
    WIDE_CHUNK,
    PromptPiece,
    PromptPlan,
    plan_prefill,
    stack_blocks,
)
from tests.processing.test_collate import CONFIG, features, prompts
from tests.rope_index import expand_table


def pad_text(batch, more=WIDE_CHUNK):
    """The batch with more padding behind its text, for the last chunk to end in."""

    def pad(array, value):
        return np.pad(array, ((0, 0), (0, more)), constant_values=value)

    return dataclasses.replace(
        batch,
        tokens=pad(batch.tokens, 0),
        segment_ids=pad(batch.segment_ids, PADDING),
        media_index=pad(batch.media_index, NO_FEATURE),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(prompts, min_size=1, max_size=3))
def test_chunks_hold_what_the_whole_holds(prompts):
    """Tokens, position ids and features of each chunk are those of the batch that is read at once."""
    whole = pad_text(collate(prompts, CONFIG))
    ids, _ = expand_table(whole.spans, whole.segment_ids)
    values = features(whole)
    pieces = [PromptPiece(p, mrope.resolve_spans(p.segments, CONFIG.thinker_config)) for p in prompts]
    plan = plan_prefill(pieces, CONFIG)
    of_calls = [features(part) for part in map(only, plan.encoder_inputs)]
    assert {c.mel.shape[0] for c in plan.encoder_inputs if isinstance(c, AudioBlocks)} <= {1, AUDIO_BLOCKS}
    begin = 0
    for chunk in plan.chunks:
        part = slice(begin, begin + chunk.tokens.shape[1])
        assert part.stop - begin in (NARROW_CHUNK, WIDE_CHUNK)
        np.testing.assert_array_equal(chunk.valid, whole.segment_ids[:, part] == 1)
        np.testing.assert_array_equal(chunk.tokens[chunk.valid], whole.tokens[:, part][chunk.valid])
        own, _ = expand_table(chunk.spans, chunk.valid.astype(np.int32))
        np.testing.assert_array_equal(own[:, chunk.valid], ids[:, :, part][:, chunk.valid])
        found = np.full(chunk.tokens.shape, -1.0)
        for number, index in chunk.feature_index.items():
            assert (found[index >= 0] == -1).all()
            found[index >= 0] = of_calls[number][index[index >= 0]]
        index = whole.media_index[:, part]
        np.testing.assert_array_equal(chunk.is_media, index >= 0)
        np.testing.assert_array_equal(found[index >= 0], values[index[index >= 0]])
        begin = part.stop
    assert begin >= max(map(len, prompts))


def only(call):
    """A batch that holds one call of an encoder."""
    audio = call if isinstance(call, AudioBlocks) else None
    return SimpleNamespace(audio=audio, vision=() if audio else (call,))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(prompts, min_size=1, max_size=3))
def test_blocks_hold_what_the_whole_holds(prompts):
    """The same of blocks, of which a call takes several, whosever they are."""
    whole = pad_text(collate(prompts, CONFIG))
    ids, _ = expand_table(whole.spans, whole.segment_ids)
    values = features(whole)
    waiting = []
    arrays = []
    first_features = []
    for slot, prompt in enumerate(prompts):
        plan = PromptPlan(PromptPiece(prompt, mrope.resolve_spans(prompt.segments, CONFIG.thinker_config)), CONFIG)
        blocks = plan.cut_blocks(0, slot)
        waiting += blocks
        first_features += [len(arrays)] * len(blocks)
        arrays += [features(part) for part in map(only, plan.encoder_inputs)]
        assert sum(chunk.num_tokens for chunk in plan.cut_chunks()) == len(prompt)
    seen = [0] * len(prompts)
    for begin in range(0, len(waiting), CALL_BLOCKS[-1]):
        part = slice(begin, begin + CALL_BLOCKS[-1])
        call = stack_blocks(waiting[part], first_features[part])
        chunk = call.chunk
        assert chunk.tokens.shape[0] in CALL_BLOCKS and chunk.tokens.shape[1] == BLOCK_WIDTH
        own_ids, _ = expand_table(chunk.spans, chunk.valid.astype(np.int32))
        found = np.full(chunk.tokens.shape, -1.0)
        for number, index in chunk.feature_index.items():
            found[index >= 0] = arrays[number][index[index >= 0]]
        for row in range(len(waiting[part])):
            slot, start, count = call.slot[row], call.start[row], int(chunk.valid[row].sum())
            assert start == seen[slot]  # without gaps
            seen[slot] += count
            places = slice(start, start + count)
            np.testing.assert_array_equal(chunk.tokens[row, :count], whole.tokens[slot, places])
            np.testing.assert_array_equal(own_ids[:, row, :count], ids[:, slot, places])
            index = whole.media_index[slot, places]
            np.testing.assert_array_equal(chunk.is_media[row, :count], index >= 0)
            np.testing.assert_array_equal(found[row, :count][index >= 0], values[index[index >= 0]])
        assert not chunk.valid[len(waiting[part]) :].any()
    assert seen == list(map(len, prompts))
