"""Every stage of Token2Wav against PyTorch, float32, random weights, several widths and seeds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniDiTConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import DiTDecoderLayer, Qwen2_5OmniDiTRotaryEmbedding

from omni_jax.checkpoint import store
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import DiTConfig, Token2WavConfig
from omni_jax.engine.token2wav_engine import Token2WavEngine, make_vocoder_weights
from omni_jax.layers.stack import unstack_layers
from omni_jax.models.bigvgan import apply_input, apply_output, apply_stage
from omni_jax.models.dit import DiTLayer, LayerInputs, Modulations
from omni_jax.models.dit_blocks import Blocks, pack
from omni_jax.models.dit_rotary import rotary_tables
from omni_jax.models.row_ends import make_row_ends
from omni_jax.models.token2wav import Token2Wav, parts
from tests.pairs import Whole, relative_error

# float32 sums in another order; some 1e-6 a stage, and the flow does not add to it
TOLERANCE = 1e-5
# the fastest sines of time turn by 1000 radians, of which a float32 rounding is 6e-5
TIME_TOLERANCE = 1e-4
# A random vocoder is badly conditioned: sines of large arguments turn one rounding into many. PyTorch's own float32
# is some 1e-4 from its float64 over the whole, and so is ours.
STAGE_TOLERANCE = 5e-5
WAVE_TOLERANCE = 1e-3

LENGTHS = (29, 5, 36)  # codes: a partial block at the end, less than one block, whole blocks


@dataclass
class Speaking:
    torch: Any
    config: Token2WavConfig
    params: dict[str, Any]  # layers stacked
    voice: Voice
    codes: list[np.ndarray]
    noise: list[np.ndarray]

    @property
    def dit(self) -> DiTConfig:
        return self.config.dit_config

    both_forms: bool  # of layers: scanned and single

    def models(self) -> Iterator[tuple[Token2Wav, Any]]:
        """With scanned layers, and with single ones where ``both_forms`` are to be compared."""
        yield Token2Wav(self.config), self.params
        if self.both_forms:
            yield Token2Wav(self.config, scan_layers=False), unstack_layers(self.params)

    def call(self, part: str, method: str, *args: Any) -> Any:
        model, params = next(self.models())
        return _call(model, params, part, method, *args)


def _call(model: Token2Wav, params: Any, part: str, method: str, *args: Any) -> Any:
    def inside(module: Token2Wav, *args: Any) -> Any:
        for name in (part, method):
            module = getattr(module, name)
        return module(*args)

    return jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=inside))(params, *args)


@pytest.fixture(scope="module")
def speaking(whole: Whole) -> Speaking:
    rng = np.random.default_rng(0)
    c = whole.config.token2wav_config.dit_config
    voice = Voice("someone", 0, _random(rng, 1, c.enc_emb_dim), _random(rng, 1, 37, c.mel_dim))
    codes = [rng.integers(0, c.num_embeds + 1, n) for n in LENGTHS]
    noise = [_random(rng, len(row) * c.repeats, c.mel_dim) for row in codes]
    params = store.load(whole.folder, ["token2wav"])["token2wav"]
    sizes = whole.config.token2wav_config
    return Speaking(whole.torch.token2wav, sizes, params, voice, codes, noise, whole.both_forms)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _blocked(config: DiTConfig, frames: np.ndarray) -> tuple[np.ndarray, Blocks]:
    """One request's frames [T, ...] as blocks, and which are real."""
    count = -(-len(frames) // config.block_size)
    blocks, _ = pack([len(frames)], config.block_size, count)
    out = np.zeros((count * config.block_size, *frames.shape[1:]), frames.dtype)
    out[: len(frames)] = frames
    return out.reshape(count, config.block_size, *frames.shape[1:]), blocks


@pytest.mark.parametrize("frames", [5, 37, 200])
def test_speaker_encoder(speaking: Speaking, frames: int) -> None:
    clip = _random(np.random.default_rng(frames), 1, frames, speaking.dit.mel_dim)
    encoder = speaking.torch.code2wav_dit_model.input_embed.spk_encoder
    theirs = encoder(torch.tensor(np.concatenate([clip, np.zeros_like(clip)]))).numpy()
    # what stands behind the clip's end must not matter
    padded = np.pad(clip, ((0, 0), (0, 50), (0, 0)), constant_values=3)
    ours = speaking.call("dit", "speakers", padded, np.array([frames]))
    assert relative_error(ours, theirs) < TOLERANCE
    assert np.abs(theirs[1]).max() > 0  # no voice is a row of its own, not zeros


def test_time_embedding(speaking: Speaking) -> None:
    times = np.linspace(0, 1, 11, dtype=np.float32)
    theirs = speaking.torch.code2wav_dit_model.time_embed(torch.tensor(times)).numpy()
    assert relative_error(speaking.call("dit", "time_embed", times), theirs) < TIME_TOLERANCE


def _inputs(speaking: Speaking) -> dict[str, torch.Tensor]:
    """The reference's arguments for the first request."""
    cond = torch.tensor(speaking.voice.cond)[:, None].repeat(1, len(speaking.noise[0]), 1)
    return dict(speaker_embedding=cond, condition_vector=torch.tensor(speaking.voice.ref_mel))


def _conditions(speaking: Speaking, codes: np.ndarray) -> Any:
    count = len(codes)
    rows = speaking.call("dit", "speakers", speaking.voice.ref_mel, np.array([speaking.voice.ref_mel.shape[1]]))
    cond = np.broadcast_to(speaking.voice.cond, (count, speaking.dit.enc_emb_dim))
    return speaking.call("dit", "conditions", codes, np.broadcast_to(rows, (count, *rows.shape)), cond)


def test_input_embedding(speaking: Speaking) -> None:
    dit = speaking.torch.code2wav_dit_model
    codes = speaking.codes[0]
    noise = speaking.noise[0]
    embedded = [dit.text_embed(torch.tensor(codes)[None], drop_code=drop) for drop in (False, True)]
    parts = dict(code_embed=embedded[0], code_embed_uncond=embedded[1], **_inputs(speaking))
    theirs = dit.input_embed(torch.tensor(noise)[None], **parts).numpy()
    frames, _ = _blocked(speaking.dit, np.repeat(codes, speaking.dit.repeats))
    conditions = _conditions(speaking, frames)
    model, params = next(speaking.models())
    variable = model.apply(
        {"params": params}, _blocked(speaking.dit, noise)[0], method=lambda m, mel: m.dit.input_proj.project_mel(mel)
    )
    for half, constant in enumerate((conditions.cond, conditions.uncond)):
        ours = np.asarray(variable + constant).reshape(-1, speaking.dit.hidden_size)[: len(noise)]
        assert relative_error(ours, theirs[half]) < TOLERANCE


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("frames", [7, 58])
def test_layer_of_each_kind(speaking: Speaking, behind: int, ahead: int, frames: int) -> None:
    """A layer that sees its own block, and the one before it, and the one after it; alone, and chosen in a scan."""
    block = copy.copy(speaking.torch.code2wav_dit_model.transformer_blocks[1])
    block.look_backward_block, block.look_ahead_block = behind, ahead
    lists = dict(look_backward_layers=(1,) * behind, look_ahead_layers=(1,) * ahead)
    config = dataclasses.replace(speaking.dit, **lists)
    leaves = jax.tree.map(lambda a: a[1], speaking.params["dit"]["layers"])
    _compare_layer(config, block, leaves, speaking.torch.code2wav_dit_model.rotary_embed, frames)


def test_layer_of_the_published_size() -> None:
    torch.manual_seed(0)
    theirs = Qwen2_5OmniDiTConfig()
    theirs._attn_implementation = "sdpa"
    block = DiTDecoderLayer(theirs, look_backward_block=1).eval()
    n = theirs.num_attention_heads
    h = theirs.head_dim
    d = theirs.hidden_size

    def linear(module: Any, shape: tuple[int, ...] | None = None, bias: tuple[int, ...] | None = None) -> Any:
        kernel, offset = module.weight.T.numpy(), module.bias.numpy()
        return {"kernel": kernel.reshape(shape or kernel.shape), "bias": offset.reshape(bias or offset.shape)}

    attention = {"query": block.attn.to_q, "key": block.attn.to_k, "value": block.attn.to_v}
    leaves = {
        "modulation": linear(block.attn_norm.linear),
        "attention": {k: linear(m, (d, n, h), (n, h)) for k, m in attention.items()}
        | {"out": linear(block.attn.to_out[0], (n, h, d))},
        "mlp": {"up": linear(block.ff.ff[0]), "down": linear(block.ff.ff[3])},
    }
    config = DiTConfig(look_backward_layers=(1,), look_ahead_layers=())
    _compare_layer(config, block, leaves, Qwen2_5OmniDiTRotaryEmbedding(h), 58)


def _compare_layer(config: DiTConfig, block: Any, leaves: Any, rotary: Any, frames: int) -> None:
    """``block`` against our layer 1 of ``config`` with the weights ``leaves``."""
    rng = np.random.default_rng(frames)
    x, rows = _random(rng, frames, config.hidden_size), _random(rng, 1, config.hidden_size)
    place = torch.arange(frames) // config.block_size
    difference = (place[None] - place[:, None]).expand(1, config.num_attention_heads, -1, -1)
    hidden = torch.tensor(x)[None]
    tables = rotary(hidden)
    theirs = block(hidden, torch.tensor(rows), position_embeddings=tables, block_diff=difference)[0].numpy()
    padded, blocks = _blocked(config, x)
    layer = DiTLayer(config)
    variables = {"params": leaves}
    _, modulation = layer.apply(variables, (), 1, jax.nn.silu(rows), method="modulate")
    table = jnp.broadcast_to(modulation, (config.num_hidden_layers, *modulation.shape[1:]))
    shared = LayerInputs(
        table, blocks, rotary_tables(blocks.index, blocks.valid.shape[1], config.head_dim, config.rope_theta)
    )
    for index in (1, jnp.int32(1)):
        (ours, _), _ = jax.jit(lambda x, i=index: layer.apply(variables, (x, None), i, shared))(padded)
        assert relative_error(np.asarray(ours).reshape(-1, config.hidden_size)[:frames], theirs) < TOLERANCE


def test_one_evaluation(speaking: Speaking) -> None:
    dit = speaking.torch.code2wav_dit_model
    codes = speaking.codes[0]
    noise = speaking.noise[0]
    time = np.float32(0.3)
    arguments = dict(quantized_code=torch.tensor(codes)[None], time_step=torch.tensor(time), **_inputs(speaking))
    theirs = dit(hidden_states=torch.tensor(noise)[None], **arguments).numpy()
    frames, blocks = _blocked(speaking.dit, np.repeat(codes, speaking.dit.repeats))
    conditions = _conditions(speaking, frames)
    for model, params in speaking.models():
        moments: Modulations = _call(model, params, "dit", "modulations", time[None])
        moment = jax.tree.map(lambda a: a[0], moments)
        ours = _call(model, params, "dit", "velocity", _blocked(speaking.dit, noise)[0], conditions, moment, blocks)
        for half in (0, 1):
            velocity = np.asarray(ours[half]).reshape(-1, speaking.dit.mel_dim)[: len(noise)]
            assert relative_error(velocity, theirs[half]) < TOLERANCE


def _solve_reference(speaking: Speaking, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The reference's mel of each request, [frames, mel]; it draws its noise inside, so the draw is replaced."""
    mels = []
    for codes, noise in zip(speaking.codes, speaking.noise, strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", lambda *_, noise=noise, **__: torch.tensor(noise)[None])
            arguments = (torch.tensor(a) for a in (speaking.voice.cond, speaking.voice.ref_mel, codes[None]))
            mels.append(speaking.torch.code2wav_dit_model.sample(*arguments)[0].T.numpy())
    return mels


def test_from_codes_to_mel_to_samples(speaking: Speaking, monkeypatch: pytest.MonkeyPatch) -> None:
    mels = _solve_reference(speaking, monkeypatch)
    vocoder = speaking.torch.code2wav_bigvgan_model
    waves = [vocoder(torch.tensor(mel.T[None].copy())).numpy() for mel in mels[::2]]
    voices, seeds = [speaking.voice] * len(mels), [0] * len(mels)
    for model, params in speaking.models():
        engine = Token2WavEngine(model, params)
        ours = engine.make_mels(speaking.codes, voices, speaking.noise, seeds)
        for mel, theirs in zip(ours, mels, strict=True):
            assert relative_error(mel, theirs) < TOLERANCE
    for wave, theirs in zip(engine.vocode(ours[::2]), waves, strict=True):
        assert relative_error(wave, theirs) < WAVE_TOLERANCE
        assert np.abs(theirs).mean() > 0.01


def test_vocoder_stage_by_stage(speaking: Speaking) -> None:
    """Each stage is given what the reference's stage was given, so that errors do not add up."""
    theirs = speaking.torch.code2wav_bigvgan_model
    blocks = theirs.num_residual_blocks
    mel = torch.tensor(_random(np.random.default_rng(3), 1, theirs.config.mel_dim, 31))
    x, length = theirs.conv_pre(theirs.process_mel_spectrogram(mel)), np.array([31])
    model, params = next(speaking.models())
    config = speaking.config.bigvgan_config
    weights = make_vocoder_weights(parts(model)[1], params["bigvgan"])
    ours = jax.jit(apply_input)(weights, _frames_first(mel), make_row_ends(31, length))
    assert relative_error(ours, _frames_first(x)) < TOLERANCE
    for i, rate in enumerate(theirs.config.upsample_rates):
        # a longer array than the row: what stands behind the row's end must not matter
        padded = np.pad(_frames_first(x), ((0, 0), (0, 7), (0, 0)), constant_values=np.nan)
        ends = make_row_ends(padded.shape[1], length)
        stage = jax.jit(apply_stage, static_argnums=(0, 4))(config, weights, padded, ends, i)
        ours = np.asarray(stage)[:, : length[0] * rate]
        x = theirs.ups[i][0](x)
        x = sum(theirs.resblocks[i * blocks + b](x) for b in range(blocks)) / blocks
        length = length * rate
        assert relative_error(ours, _frames_first(x)) < STAGE_TOLERANCE
    wave = torch.clamp(theirs.conv_post(theirs.activation_post(x)), -1, 1)[:, 0].numpy()
    ours = jax.jit(apply_output)(weights, _frames_first(x), make_row_ends(x.shape[2], length))
    assert relative_error(ours, wave) < STAGE_TOLERANCE


def _frames_first(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 1).copy()
