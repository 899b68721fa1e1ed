"""Recipes by name. Each module makes those of one stage, for every size; ``omni_tiny`` those of one small model."""

from configs import (
    omni_tiny,
    pretrain1,
    pretrain2,
    pretrain3,
    speaker_verifier,
    speech_tokenizer,
    talker,
    talker_dpo,
    thinker_lora,
    thinker_sft,
    token2wav_distill,
    token2wav_dit,
    vocoder,
)

RECIPES = {
    **pretrain1.RECIPES,
    **pretrain2.RECIPES,
    **pretrain3.RECIPES,
    **thinker_sft.RECIPES,
    **thinker_lora.RECIPES,
    **speaker_verifier.RECIPES,
    **speech_tokenizer.RECIPES,
    **talker.RECIPES,
    **talker_dpo.RECIPES,
    **token2wav_dit.RECIPES,
    **token2wav_distill.RECIPES,
    **vocoder.RECIPES,
    **omni_tiny.RECIPES,
}
