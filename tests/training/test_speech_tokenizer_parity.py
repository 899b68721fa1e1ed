"""The content loss of the speech tokenizer against PyTorch's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax.data.sources import Row
from omni_jax.data.transcribed_examples import PrepareTranscribed
from omni_jax.data.transcribed_packing import TranscribedBatch, TranscribedPacking
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.training.objectives import make_objective
from tests.training.test_speech_tokenizer import CONFIG, make_recipe


@pytest.fixture(scope="module")
def rows(tone_rows: Path) -> Path:
    return tone_rows


@pytest.fixture(scope="module")
def batch(rows: Path) -> TranscribedBatch:
    objective = make_objective(make_recipe(rows))
    budget = objective._budget(make_recipe(rows).data)
    reader = PrepareTranscribed(MelSettings(), max_codes=80, max_labels=48, access=NO_ACCESS)
    packing = TranscribedPacking(reader, dataclasses.replace(budget, rows=1), CONFIG)
    parts = [packing.new_part(), packing.new_part()]
    for number, line in enumerate(rows.read_text().splitlines()):
        found = reader(Row(str(rows), number, line.encode()))
        assert isinstance(found, list)
        assert parts[number % 2].place(found[0])
    return packing.assemble(parts, first=0, streams=2)


def test_content_loss_is_that_of_each_utterance(rows: Path, batch: TranscribedBatch) -> None:
    """Packed in rows, by PyTorch's CTC loss of the positions of each."""
    objective = make_objective(make_recipe(rows))
    rng = np.random.default_rng(5)
    size = CONFIG.block_codes
    logits = rng.standard_normal((batch.audio.mel.shape[0], size, CONFIG.num_labels)).astype(np.float32)
    found = objective._content_loss(jnp.asarray(logits), batch)
    row_blocks = len(logits) // len(batch.begin)
    expected = 0.0
    for row, number in np.argwhere(batch.length > 0):
        first = (row * row_blocks + batch.begin[row, number]) * size
        count = (batch.length[row, number] + 1) // 2
        own = torch.tensor(logits.reshape(-1, CONFIG.num_labels)[first : first + count])
        labels = batch.labels[row, number]
        labels = torch.tensor(labels[labels > 0])
        loss = torch.nn.functional.ctc_loss(
            own.log_softmax(-1)[:, None], labels[None], [int(count)], [len(labels)], reduction="sum"
        )
        expected += float(loss)
    assert float(found) == pytest.approx(expected, rel=1e-5)
