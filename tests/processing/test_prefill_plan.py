"""Prompts cut into chunks hold what the prompts hold."""

import dataclasses
from types import SimpleNamespace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_jax import mrope
from omni_jax.batch import NO_FEATURE, PADDING, AudioBlocks
from omni_jax.processing.collate import collate
from omni_jax.processing.prefill_plan import AUDIO_BLOCKS, NARROW_CHUNK, WIDE_CHUNK, PromptPiece, plan_prefill
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
