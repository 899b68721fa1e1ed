"""What answers lines of requests: a model with the processes that decode its media, made from a picklable description.

The run on one machine and the actors of a Ray cluster make theirs from the same ``WorkerSpec``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from omni_jax.engine.warmup import Compilations
from omni_jax.serving.batch_lines import Line, Result
from omni_jax.serving.batch_runner import BatchRunner, FileLocations, RunStatus
from omni_jax.serving.model_spec import ModelSpec, SetPhase


@dataclass(frozen=True)
class WorkerSpec:
    """A worker before it is made.

    Attributes:
      model: that answers.
      locations: of the files that requests name and of those that are written.
    """

    model: ModelSpec
    locations: FileLocations


class Worker:
    """A loaded model that answers lines; a context manager that ends its media processes.

    Attributes:
      status: how the run stands.
    """

    def __init__(self, spec: WorkerSpec, set_phase: SetPhase = lambda phase: None):
        """Loads the model and compiles.

        Args:
          spec: what to load.
          set_phase: is told what is being done, for those who wait.

        Raises:
          CheckpointError, ConfigError, InputError: where ``omni_jax.load`` does.
        """
        self.status = RunStatus()
        model = spec.model.load(set_phase)
        # last, so that a model that cannot be loaded leaves no processes behind
        self._media = spec.model.start_media_workers(model)
        self._runner = BatchRunner(
            model, spec.model.name, self._media, spec.model.scheduler, spec.locations, self.status
        )

    def answer(self, lines: Iterable[Line]) -> Iterator[Result]:
        """The results of lines, in the order in which they are done; see ``BatchRunner.run``."""
        # counts from here on, so that what the warm-up has compiled is left out
        with Compilations() as self.status.compilations:
            yield from self._runner.run(lines)

    def close(self) -> None:
        """Ends the media processes."""
        self._media.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
