"""One set of random weights in both implementations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniThinkerForConditionalGeneration

from omni_jax.checkpoint import store
from omni_jax.checkpoint.convert import to_jax
from omni_jax.config import OmniConfig
from omni_jax.layers.stack import unstack_layers
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from tests.oracle import load, load_thinker


@dataclass
class Pair:
    folder: Path  # in our layout
    config: OmniConfig
    torch: Qwen2_5OmniThinkerForConditionalGeneration
    params: dict[str, Any]  # of the Thinker, layers stacked
    both_forms: bool  # of layers: scanned and single

    def models(self) -> list[tuple[Thinker, Any]]:
        """The Thinker with scanned layers, and with single ones where ``both_forms`` are to be compared."""
        config = self.config.thinker_config
        models = [(Thinker(config), self.params)]
        if self.both_forms:
            models.append((Thinker(config, scan_layers=False), unstack_layers(self.params)))
        return models


def load_pair(published: Path, folder: Path, both_forms: bool) -> Pair:
    """Both Thinkers of a folder in the published layout; ours is converted into ``folder``."""
    to_jax(published, folder, components=["thinker"])
    params = store.load(folder, ["thinker"])["thinker"]
    return Pair(folder, OmniConfig.load(folder), load_thinker(published), params, both_forms)


@dataclass
class Whole:
    """All of the model but Token2Wav, which has no part in what its tests compare."""

    folder: Path  # in our layout
    config: OmniConfig
    torch: Qwen2_5OmniForConditionalGeneration
    talker: dict[str, Any]  # its parameters, layers stacked
    both_forms: bool  # of layers: scanned and single

    def talkers(self) -> list[tuple[Talker, Any]]:
        """The Talker with scanned layers, and with single ones where ``both_forms`` are to be compared."""
        config = self.config.talker_config
        models = [(Talker(config), self.talker)]
        if self.both_forms:
            models.append((Talker(config, scan_layers=False), unstack_layers(self.talker)))
        return models


def load_whole(published: Path, folder: Path, both_forms: bool) -> Whole:
    """Both models of a folder in the published layout; ours is converted into ``folder``."""
    to_jax(published, folder)
    talker = store.load(folder, ["talker"])["talker"]
    return Whole(folder, OmniConfig.load(folder), load(published), talker, both_forms)


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest magnitude of the reference."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
