"""Token2Wav's DiT is distilled: what takes two evaluations becomes one, and what takes many steps becomes a few.

The teacher is the DiT that the run begins from, and the student begins as its copy. Guidance is put into the student
as in https://arxiv.org/abs/2210.03142 (section 3.1): with all conditions it is to give the teacher's guided velocity.
It forgets the velocity without conditions, which nobody asks it for any more.

With ``steps`` the student is to make mel by so many steps of Euler's rule. Its velocity at the beginning of a step is
then to lead to where the teacher's flow is at the end of it: the target is the difference of the two, over the step's
size. That is a deterministic function of the state, so that nothing is averaged in a mean of squares. A step begins
where the student itself gets to from noise, as in inference. This is progressive distillation
(https://arxiv.org/abs/2202.00512) of all its rounds at once, on states of the student's own.

Letters: B rows, N blocks of a row, F frames of a block, M mel bins, U utterances of a row; blocks of rows in one list
are B*N.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.checkpoint import store
from omni_jax.checkpoint.model_files import TOKEN2WAV_FILE
from omni_jax.data.speech_packing import SpeechBatch
from omni_jax.errors import ConfigError
from omni_jax.models import token2wav
from omni_jax.models.dit import Conditions, DiT
from omni_jax.models.flow_matching import guided_velocity, integrate, solve
from omni_jax.models.ode_solver import Solver, make_table_over, sway_grid
from omni_jax.sharding import map_over_batch
from omni_jax.training.objective import Loss, Metrics, Params
from omni_jax.training.objectives.packed_speech import (
    BlockList,
    PackedSpeechObjective,
    SpeechInputs,
    evaluate,
    list_blocks,
    make_conditions,
    make_model,
    make_modulations,
)
from omni_jax.training.options import FlowDistillationOptions
from omni_jax.training.recipe import Recipe

TEACHER = "teacher"
_TEACHER_SOLVER = Solver()  # the published one


@struct.dataclass
class Draws:
    """What a step draws for its utterances, and what it knows of them."""

    noise: Float[Array, "B N F M"]  # standard normal
    time: Float[Array, "B U"]  # from 0, noise, to 1, mel; where velocities are compared
    step: Int[Array, "B U"]  # of the student's, which is compared
    mel: Float[Array, "B N F M"]
    speech: SpeechInputs


@dataclass(frozen=True)
class _Network:
    """A network with the conditions that it makes of a list of blocks.

    Attributes:
      dit: the module.
      params: its parameters.
      conditions: of each block.
      listed: the blocks.
    """

    dit: DiT
    params: Any
    conditions: Conditions
    listed: BlockList

    def velocity(self, mel: jax.Array, times: Float[Array, "B U"]) -> Float[jax.Array, "B*N F M"]:
        """At the time of each utterance; guided if the conditions are."""
        modulations = make_modulations(self.dit, self.params, times, self.listed)
        return guided_velocity(*evaluate(self.dit, self.params, mel, self.conditions, modulations, self.listed))

    def solve(self, noise: Float[Array, "B*N F M"], solver: Solver) -> Float[jax.Array, "B*N F M"]:
        """From noise to mel, as in inference."""
        mel, _ = solve(self.dit, self.params, noise, self.conditions, self.listed.blocks, solver=solver)
        return mel


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class FlowDistillation(PackedSpeechObjective):
    """The mean squared error of the student's velocity; see ``Objective`` for its methods."""

    options: FlowDistillationOptions = dataclasses.field(default_factory=FlowDistillationOptions)

    @property
    def initial_copies(self) -> Mapping[str, str]:
        return {TEACHER: "token2wav"}

    @property
    def solver(self) -> Solver:
        """What the student is to be used with."""
        if not self.options.steps:
            return dataclasses.replace(_TEACHER_SOLVER, guidance=False)
        return Solver("euler", self.options.steps, guidance=False)

    def abstract_params(self) -> dict[str, Any]:
        params = token2wav.abstract_params(self.model)
        return {"token2wav": params, TEACHER: params}

    def check_start(self, folder: Path) -> None:
        if "token2wav" not in store.components(folder):
            raise ConfigError(f"{folder} has no token2wav, whose DiT is the teacher; begin from a checkpoint with one")
        if not Solver.load(folder).guidance:
            raise ConfigError(
                f"the DiT of {folder} is distilled already ({TOKEN2WAV_FILE}), and would be a worse teacher than its "
                "own; begin from the checkpoint that its distillation began from"
            )

    def convert_frozen(self, frozen: Params) -> Params:
        # of the teacher no vocoder
        return {**frozen, TEACHER: {"dit": frozen[TEACHER]["dit"]}}

    def extra_files(self) -> dict[str, str]:
        return {TOKEN2WAV_FILE: self.solver.to_json()}

    def loss(
        self, params: Params, batch: SpeechBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        draws = self.draw(batch, key)
        networks = params["token2wav"]["dit"], params[TEACHER]["dit"]

        def mean(compare: Any) -> jax.Array:
            errors = map_over_batch(functools.partial(compare, self), networks, draws)  # [B, N, F, M]
            by_frame = jnp.mean(jnp.square(errors), axis=-1)  # [B, N, F]
            return jnp.sum(jnp.where(draws.speech.valid, by_frame, 0)) / denominators["frames"]

        total = mean(compare_steps if self.options.steps else compare_velocities)
        terms = {"loss": total}
        # many evaluations, which are only worth it for held-out rows
        if not trained:
            terms["mel_error"] = mean(compare_mels)
        return Loss(total, terms)

    def draw(self, batch: SpeechBatch, key: jax.Array) -> Draws:
        """The random numbers of a step, and its batch."""
        noise_key, time_key, step_key, length_key, begin_key = jax.random.split(key, 5)
        shape = batch.length.shape  # [B, U]
        clips = self.draw_clips(batch, length_key, begin_key)
        return Draws(
            noise=jax.random.normal(noise_key, batch.mel.shape),
            time=jax.random.uniform(time_key, shape),
            step=jax.random.randint(step_key, shape, 0, max(self.options.steps, 1)),
            mel=batch.mel,
            speech=self.make_inputs(batch, clips),
        )

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        student = "token2wav/dit/"
        forward = self.count_frame_flops(sizes, student)
        # forward, the gradient of the frames, and that of the kernels that train
        per_frame = 2 * forward + self.count_frame_flops({path: sizes[path] for path in trained}, student)
        evaluations = 1
        if self.options.steps:
            # all steps but the last may come before the one that is compared
            per_frame += (self.options.steps - 1) * forward
            evaluations = _teacher_table(self.options).times.size
        per_frame += 2 * evaluations * self.count_frame_flops(sizes, f"{TEACHER}/dit/")
        return counts["tokens"] * self.config.repeats * per_frame


def make_flow_distillation(recipe: Recipe) -> FlowDistillation:
    """The recipe's student and teacher.

    Raises:
      ConfigError: if the recipe asks for what this objective has not, or there is no teacher.
    """
    assert isinstance(recipe.objective, FlowDistillationOptions)
    if recipe.is_random:
        raise ConfigError("--init random has no teacher; distillation begins from a checkpoint")
    return FlowDistillation(make_model(recipe), recipe.objective)


def compare_velocities(
    objective: FlowDistillation, params: tuple[Any, Any], draws: Draws
) -> Float[jax.Array, "B N F M"]:
    """The student's velocity less the teacher's guided one, between noise and mel."""
    student, teacher = _make_networks(objective, params, draws)
    time = _of_list(draws.time, student.listed)  # [B * N, 1, 1]
    noisy = (1 - time) * _to_list(draws.noise) + time * _to_list(draws.mel)  # [B * N, F, M]
    with jax.named_scope("teacher"):
        target = teacher.velocity(noisy, draws.time)
    with jax.named_scope("student"):
        return (student.velocity(noisy, draws.time) - target).reshape(draws.noise.shape)


def compare_steps(objective: FlowDistillation, params: tuple[Any, Any], draws: Draws) -> Float[jax.Array, "B N F M"]:
    """The student's velocity at the beginning of a step less what leads to the teacher's end of it."""
    student, teacher = _make_networks(objective, params, draws)
    grid = jnp.asarray(sway_grid(objective.options.steps))
    begin = grid[draws.step]  # [B, U]
    size = grid[jnp.asarray(draws.step) + 1] - begin
    with jax.named_scope("own_steps"):
        start = jax.lax.stop_gradient(_take_steps(student, objective.options.steps, draws))  # [B * N, F, M]
    with jax.named_scope("teacher"):
        target = _mean_velocity(teacher, objective.options, start, begin, size)  # [B * N, F, M]
    with jax.named_scope("student"):
        return (student.velocity(start, begin) - target).reshape(draws.noise.shape)


def compare_mels(objective: FlowDistillation, params: tuple[Any, Any], draws: Draws) -> Float[jax.Array, "B N F M"]:
    """The mel that the student makes of noise less that which the teacher makes of it, as both are used."""
    student, teacher = _make_networks(objective, params, draws)
    noise = _to_list(draws.noise)
    error = student.solve(noise, objective.solver) - teacher.solve(noise, _TEACHER_SOLVER)  # [B * N, F, M]
    return error.reshape(draws.noise.shape)


def _make_networks(objective: FlowDistillation, params: tuple[Any, Any], draws: Draws) -> tuple[_Network, _Network]:
    """The student, which is not guided, and the teacher, which is, and learns nothing."""
    listed = list_blocks(draws.speech)
    networks = []
    for own, guidance in zip((params[0], jax.lax.stop_gradient(params[1])), (False, True), strict=True):
        conditions = make_conditions(objective.dit, own, draws.speech, listed, guidance)
        networks.append(_Network(objective.dit, own, conditions, listed))
    return networks[0], networks[1]


def _take_steps(student: _Network, num_steps: int, draws: Draws) -> Float[jax.Array, "B*N F M"]:
    """Where the student gets to from noise before the step of each utterance that is compared."""
    grid = sway_grid(num_steps)
    wanted = _of_list(draws.step, student.listed)  # [B * N, 1, 1]

    def take_step(state: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        number, time, size = inputs
        velocity = student.velocity(state, jnp.full(draws.step.shape, time))
        return jnp.where(number < wanted, state + size * velocity, state), None

    steps = (jnp.arange(num_steps - 1), jnp.asarray(grid[:-2]), jnp.asarray(np.diff(grid)[:-1]))
    state, _ = jax.lax.scan(take_step, _to_list(draws.noise), steps)
    return state


def _mean_velocity(
    teacher: _Network, options: FlowDistillationOptions, start: jax.Array, begin: jax.Array, size: jax.Array
) -> Float[jax.Array, "B*N F M"]:
    """What the teacher's flow goes through from ``begin`` on, over the ``size`` of the step."""
    table = _teacher_table(options)

    # the rule goes from 0 to 1 in the time of a step, which is of another size for each utterance
    def velocity(mel: jax.Array, part: jax.Array, carry: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return _of_list(size, teacher.listed) * teacher.velocity(mel, begin + part * size), carry

    end, _ = integrate(velocity, start, table, jnp.asarray(table.times), ())
    return (end - start) / _of_list(size, teacher.listed)


def _teacher_table(options: FlowDistillationOptions) -> Any:
    """The published rule over a step of the student's."""
    return make_table_over(_TEACHER_SOLVER.method, np.linspace(0, 1, options.teacher_steps + 1, dtype=np.float32))


def _to_list(rows: Array) -> jax.Array:
    """[B, N, F, M] to [B * N, F, M]"""
    return jnp.asarray(rows).reshape(-1, *rows.shape[2:])


def _of_list(values: Array, listed: BlockList) -> jax.Array:
    """What each block's utterance has. [B, U] to [B * N, 1, 1]"""
    return jnp.asarray(values).reshape(-1)[listed.utterance][:, None, None]
