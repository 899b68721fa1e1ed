"""The plan of a recipe: it counts what the model has and what trains, and divides it as the mesh says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from configs import RECIPES
from omni_jax.checkpoint.name_map import parameter_count
from omni_jax.errors import ConfigError
from omni_jax.sharding import MeshConfig
from omni_jax.training.dry_run import estimate_memory, measure_fill, print_dry_run, summarize_parameters
from omni_jax.training.recipe import Phase
from tests.processes import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_is_in_the_plan(name: str) -> None:
    recipe = RECIPES[name]
    for phase in recipe.phases:
        rows = summarize_parameters(recipe, phase)
        assert len({row.path for row in rows}) == len(rows)
        if name.startswith("speech-tokenizer"):
            own = [row for row in rows if row.path.startswith("speech_tokenizer/")]
            frozen = {row.path.split("/")[1] for row in own if row.learning_rate is None}
            if "match" in name:
                assert frozen == {"quantizer", "quantized_proj", "back", "norm", "proj", "content", "mel_decoder"}
                assert not any(row.learning_rate for row in rows if row.path.startswith("token2wav/"))
                continue
            has_thinker = name.startswith("speech-tokenizer-thinker")
            not_trained = {"quantizer"} if has_thinker else {"quantizer", "proj"}
            assert frozen == not_trained | ({"mel_decoder"} if phase.name == "content" else set())
            size = parameter_count(recipe.model, ("thinker",)) if has_thinker else 0
            assert sum(row.size for row in rows) - sum(row.size for row in own) == size
            continue
        if name.startswith("vocoder"):
            trained = {"/".join(row.path.split("/")[:2]) for row in rows if row.learning_rate}
            assert "token2wav/bigvgan" in trained and not any(path.startswith("token2wav/dit") for path in trained)
            own = [path for path in trained if path.startswith("discriminators/")]
            assert bool(own) == (phase is not recipe.phases[0])
            continue
        if name.startswith("speaker-verifier"):
            assert {row.path.split("/")[1] for row in rows} == {"encoder", "speakers"}
            assert all(row.path.startswith("speaker_verifier/") and row.learning_rate for row in rows)
            continue
        # beside the model: adapters, and the DiT as it was where a distillation began
        of_model = [row for row in rows if not row.path.startswith(("lora/", "teacher/"))]
        teacher = {row.path: row.learning_rate for row in rows if row.path.startswith("teacher/")}
        assert bool(teacher) == name.startswith(("token2wav-guidance", "token2wav-distill"))
        assert set(teacher.values()) <= {None}
        components = {"token2wav": ["token2wav"], "talker": ["thinker", "talker"]}.get(name.split("-")[0], ["thinker"])
        size = sum(parameter_count(recipe.model, (component,)) for component in components)
        assert sum(row.size for row in of_model) == size
        rate = {row.path: row.learning_rate for row in rows if row.path not in teacher}
        if name.startswith("thinker-lora"):
            assert {path for path, value in rate.items() if value} == {
                path for path in rate if path.startswith("lora/")
            }
            assert len(rows) - len(of_model) == 14
            continue
        if name.startswith("token2wav"):
            assert {path for path, value in rate.items() if value is None} == {
                path for path in rate if path.startswith("token2wav/bigvgan/")
            }
            continue
        if name.startswith("talker"):
            trained = {path for path, value in rate.items() if value}
            own = {path for path in rate if path.startswith("talker/")}
            new_voices = {"thinker/decoder/embed/embedding"} if "voices" in name else set()
            assert trained == own | new_voices
            continue
        assert rate["thinker/audio_encoder/bos_eos/embedding"] is None
        # these learn from text alone
        of_text = name in ("thinker-sft-mini", "lists-omni-tiny", "language-omni-tiny")
        assert (rate["thinker/vision_encoder/merger/up/kernel"] is None) == of_text
        assert (rate["thinker/decoder/norm/scale"] is None) == name.startswith(("pretrain1", "encoders"))
        encoders_are_frozen = of_text or phase.name in ("adapters", "dialogues")
        assert (rate["thinker/vision_encoder/patch_embed/kernel"] is None) == encoders_are_frozen


def test_the_mesh_divides_what_it_should() -> None:
    recipe = dataclasses.replace(RECIPES["thinker-sft-7b"], mesh=MeshConfig(data=2, fsdp=16, tensor=4))
    rows = {row.path: row for row in summarize_parameters(recipe, recipe.phases[0])}
    assert rows["thinker/decoder/layers/mlp/gate/kernel"].device_shape == (28, 3584 // 16, 18944 // 4)
    assert rows["thinker/decoder/head/kernel"].device_shape == (3584 // 16, 152064 // 4)
    assert rows["thinker/decoder/norm/scale"].device_shape == (3584,)
    whole, part = (sum(getattr(row, name) for row in rows.values()) for name in ("size", "device_size"))
    assert 1 / 64 <= part / whole < 1.01 / 64  # all but norms and biases are spread over fsdp x tensor
    sizes = estimate_memory(recipe, recipe.phases[0])
    trained = sum(row.device_size for row in rows.values() if row.learning_rate is not None)
    assert sizes["parameters that train"] == sizes["gradients"] == 4 * trained
    assert sizes["moments of the optimizer"] == 8 * trained
    assert sizes["frozen parameters"] == 2 * (part - trained)


def test_a_mesh_that_does_not_divide() -> None:
    recipe = dataclasses.replace(RECIPES["thinker-sft-7b"], mesh=MeshConfig(tensor=8))
    with pytest.raises(ConfigError, match=r"heads of 28 over \('tensor',\) = 8"):
        summarize_parameters(recipe, recipe.phases[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mesh=MeshConfig(fsdp=3)), "data.rows is 64, which must be a multiple of mesh.data x mesh.fsdp = 3"),
        (dict(mesh=MeshConfig(sequence=3)), "mesh.sequence 3 does not divide data.tokens 8192"),
        (dict(steps=0), "steps is 0; it must be from 1 to"),
        (dict(phases=(Phase("a", (), 3),)), "the last goes on to the end"),
        (dict(phases=(Phase("a", (), 3), Phase("a", ()))), "two phases have the same name"),
    ],
)
def test_recipes_that_are_wrong(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(RECIPES["thinker-sft-7b"], **changes).check()


def test_phases_follow_each_other() -> None:
    recipe = dataclasses.replace(RECIPES["pretrain1-7b"], steps=5000)
    names = [(recipe.phase_at(step)[0].name, recipe.phase_at(step)[1]) for step in (0, 1999, 2000, 4999, 5000)]
    assert names == [("adapters", 2000)] * 2 + [("encoders", 3000)] * 3
    short = dataclasses.replace(recipe, steps=2000)
    assert short.phase_at(2000) == (recipe.phases[0], 2000)


def test_how_full_batches_are(make_recipe) -> None:
    found = measure_fill(make_recipe())
    assert found["examples"] > 2 and 0 < found["target_tokens"] < found["tokens"] <= 1


def test_a_run_from_nothing_is_shown_in_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(RECIPES["thinker-sft-3b"], init=Path("random"), files="tiny", steps=50)
    data = dataclasses.replace(recipe.data, train=("rows.jsonl",), rows=1, streams=1)
    print_dry_run(dataclasses.replace(recipe, data=data, mesh=MeshConfig()))
    shown = capsys.readouterr().out
    assert "218,016 parameters, of which 123,056 train" in shown
    assert "note: the phase dialogues has 50 steps and a warm-up of 100" in shown
    assert "a checkpoint as --init, to see how full" in shown


def test_the_command() -> None:
    arguments = ["train.py", "thinker-sft-tiny", "--dry-run", "--data.streams", "2", "--mesh.fsdp"]
    done = run(*arguments, "2")
    assert "decoder/layers/attention/query/kernel" in done.stdout and "frozen" in done.stdout
    assert "218,016 parameters, of which 123,056 train" in done.stdout and "GiB a device in all" in done.stdout
    done = run(*arguments, "5")
    assert (done.returncode, done.stderr.splitlines()[-1].startswith("error: data.rows is 2")) == (1, True), done.stderr
