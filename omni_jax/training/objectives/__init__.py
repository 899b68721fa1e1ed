"""Objectives by the options that a recipe has for them."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from omni_jax.checkpoint.lora import LORA
from omni_jax.errors import ConfigError
from omni_jax.training.objective import Objective
from omni_jax.training.objectives.bag_of_words import make_bag_of_words
from omni_jax.training.objectives.code_matching import make_match_codes
from omni_jax.training.objectives.flow_distillation import make_flow_distillation
from omni_jax.training.objectives.flow_matching import make_flow_matching
from omni_jax.training.objectives.lora import LoRA, add_lora
from omni_jax.training.objectives.next_token import make_next_token
from omni_jax.training.objectives.speaker_verifier import make_speaker_verifier
from omni_jax.training.objectives.speech_tokenizer import make_speech_tokenizer
from omni_jax.training.objectives.talker import make_next_code
from omni_jax.training.objectives.talker_dpo import make_talker_dpo
from omni_jax.training.objectives.vocoder import make_vocoder
from omni_jax.training.optimizer import flatten_params, learning_rate_scales
from omni_jax.training.options import (
    BagOfWordsOptions,
    CodeMatchingOptions,
    FlowDistillationOptions,
    FlowMatchingOptions,
    NextTokenOptions,
    SpeakerVerifierOptions,
    SpeechTokenizerOptions,
    TalkerDPOOptions,
    TalkerOptions,
    VocoderOptions,
)
from omni_jax.training.recipe import Recipe

# the objective of a recipe whose options are of this class
_MAKERS: dict[type, Callable[[Recipe], Objective]] = {
    NextTokenOptions: make_next_token,
    BagOfWordsOptions: make_bag_of_words,
    FlowMatchingOptions: make_flow_matching,
    FlowDistillationOptions: make_flow_distillation,
    TalkerOptions: make_next_code,
    SpeechTokenizerOptions: make_speech_tokenizer,
    TalkerDPOOptions: make_talker_dpo,
    VocoderOptions: make_vocoder,
    CodeMatchingOptions: make_match_codes,
    SpeakerVerifierOptions: make_speaker_verifier,
}


def make_objective(recipe: Recipe) -> Objective:
    """What the recipe trains.

    Raises:
      ConfigError: if its fields do not go together.
    """
    recipe.check()
    objective = _MAKERS[type(recipe.objective)](recipe)
    if not recipe.lora.rank:
        return objective
    if not isinstance(recipe.objective, NextTokenOptions):
        raise ConfigError("lora.rank: there are no adapters for this objective; leave it out")
    adapted = add_lora(objective, recipe.model, recipe.lora)
    _check_phases(recipe, adapted)
    return adapted


def _check_phases(recipe: Recipe, objective: LoRA) -> None:
    """Raises ConfigError if something else than adapters trains, which what is exported of the run would lack."""
    paths = list(flatten_params(nn.unbox(objective.abstract_params())))
    for phase in recipe.phases:
        others = [path for path in learning_rate_scales(phase, paths) if not path.startswith(f"{LORA}/")]
        if others:
            raise ConfigError(
                f"lora.rank is {recipe.lora.rank}, and the phase {phase.name} trains {others[0]} too; with adapters "
                f"only paths below {LORA}/ can train, as in the recipes thinker-lora-*; name them with "
                "--phases.0.train.0.paths 'lora/.*'"
            )
