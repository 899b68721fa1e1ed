"""Offline inference from the command line: a file of requests to a file of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from omni_jax.distributed import gather, is_main_process, join_processes
from omni_jax.errors import InputError
from omni_jax.processing.files import (
    bucket_errors,
    check_bucket_url,
    folder_of,
    is_file,
    is_remote,
    open_file,
    resolve_path,
)
from omni_jax.serving.batch_lines import Line, LineError, Result, SeenIds, make_error, read_custom_id, read_lines
from omni_jax.serving.batch_progress import BatchProgress, print_summary
from omni_jax.serving.batch_ray import answer_over_ray
from omni_jax.serving.batch_results import KnownResults, Results, open_results
from omni_jax.serving.batch_runner import FileLocations
from omni_jax.serving.batch_worker import Worker, WorkerSpec
from omni_jax.serving.commands import BatchCommand
from omni_jax.serving.media_roots import MediaRoots
from omni_jax.serving.model_spec import check_model_options, make_model_spec
from omni_jax.serving.ray_cluster import check_ray_options

_BLOCK_LINES = 8  # lines that a Ray actor is given at a time, for each slot
_READ_BYTES = 1 << 24


def run_batch(command: BatchCommand) -> None:
    """Answers the file of requests, and prints how it went.

    Raises:
      InputError, CheckpointError, ConfigError: where no request can be answered.
    """
    check_command(command)
    # processes find each other before anything else of jax is used
    is_main = True
    if command.distributed:
        join_processes(command.coordinator, command.processes, command.process)
        is_main = is_main_process()
    # all processes do the same work; one of them prints
    terminal = Console(stderr=True, quiet=not is_main, markup=False)
    total = _count_lines(command.input)
    with _open_results(command, is_main) as results, BatchProgress(terminal, total, results) as progress:
        # written before the next one is asked for, so that a run which is killed loses as little as possible
        for result in _answer(command, results, progress):
            progress.add(result)
            results.add(result.text)
    summary = progress.summarize()
    print_summary(terminal, summary, progress.status, command.output)
    if is_main:
        print(json.dumps(summary))


def check_command(command: BatchCommand) -> None:
    """Finds what is wrong with the options before anything is loaded, and makes the folder of the speech.

    Raises:
      InputError: naming the option.
    """
    check_model_options(command)
    check_ray_options(command.ray)
    # files and folders; in a bucket there are no folders that could be missing
    places = {"-i": command.input, "-o": command.output, "--audio-dir": command.audio_dir}
    for name, place in {**places, "--media-root": command.media_root}.items():
        if place is not None and is_remote(place):
            _check_remote(name, place)
    if not _is_file(command.input):
        raise InputError(f"-i {command.input}: no such file")
    if command.distributed and (command.engine == "ray" or command.mesh.num_devices == 1):
        raise InputError("--distributed is of one model over several hosts: give --mesh, and not --engine ray")
    if resolve_path(command.input) == resolve_path(command.output):
        raise InputError(f"-o {command.output} is the file of requests; name another")
    for name, folder in (("-o", folder_of(command.output)), ("--media-root", command.media_root)):
        if folder is not None and not is_remote(folder) and not Path(folder).is_dir():
            raise InputError(f"{name}: the folder {folder} does not exist")
    if command.captions and command.audio_dir is None:
        raise InputError("--captions are written beside files of sound: give --audio-dir too")
    if command.audio_dir is not None and not is_remote(command.audio_dir):
        Path(command.audio_dir).mkdir(parents=True, exist_ok=True)


def _check_remote(option: str, url: str) -> None:
    try:
        check_bucket_url(url)
    except InputError as e:
        raise InputError(f"{option} {url}: {e}") from None


def _is_file(name: str) -> bool:
    try:
        return is_file(name)
    except OSError as e:  # a bucket that cannot be looked into
        raise InputError(f"-i {name}: {e.strerror or e}") from e


def make_spec(command: BatchCommand) -> WorkerSpec:
    """What the options say of each worker."""
    # paths in requests are relative to their file, wherever the command is started
    base_dir = folder_of(command.input)
    media_roots = MediaRoots((command.media_root or base_dir,), base_dir)
    locations = FileLocations(media_roots, command.audio_dir, command.captions)
    return WorkerSpec(make_model_spec(command), locations)


def _open_results(command: BatchCommand, is_main: bool) -> Results:
    """Where results go; of several processes only the first has them, and tells the others what is done."""
    if not command.distributed:
        return open_results(command.output)
    # all processes must leave out the same lines, or they would make different calls and wait for each other forever
    results = open_results(command.output) if is_main else KnownResults({})
    finished = gather(list(results.finished.items()))[0]
    return results if is_main else KnownResults(dict(finished))


def _answer(command: BatchCommand, results: Results, progress: BatchProgress) -> Iterator[Result]:
    """The results of the lines that have none, from this process or from actors."""
    # read as they are needed: a file may be larger than the memory
    lines = _unfinished_lines(command.input, results, progress)
    spec = make_spec(command)
    if command.engine == "ray":
        yield from answer_over_ray(spec, command.ray, command.input, lines, _BLOCK_LINES * command.slots)
        return
    with Worker(spec, progress.set_phase) as worker:
        progress.start_clock(worker.status)
        yield from worker.answer(lines)


def _unfinished_lines(name: str, results: Results, progress: BatchProgress) -> Iterator[Line]:
    """The lines that have no result; one whose custom_id was there before gets its result here.

    Raises:
      InputError: if the results are of another file.
    """
    seen = SeenIds()
    for line in read_lines(name):
        custom_id = read_custom_id(line)
        finished = line.number in results.finished
        known_id = results.finished.get(line.number)
        # the number alone would take the results of another file for those of this one
        if known_id is not None and known_id != custom_id:
            raise InputError(
                f"the results are of another file of requests: line {line.number} of {name} has custom_id "
                f"{custom_id!r}, its result {known_id!r}; name another file with -o"
            )
        # of the lines that are done too: a custom_id may have been used by one of them
        is_new = custom_id is None or seen.add(custom_id)
        if finished:
            continue
        if is_new:
            yield line
        else:
            error = LineError(f"custom_id {custom_id!r} was there before; each must be another")
            result = make_error(line, custom_id, error)
            progress.add(result)
            results.add(result.text)


def _count_lines(name: str) -> int:
    """Requests in a file, roughly: it is only for the progress bar, and read in big pieces."""
    count = 0
    last_byte = b"\n"  # of an empty file, which has no last line either
    try:
        with bucket_errors(name), open_file(name) as file:
            while piece := file.read(_READ_BYTES):
                count += piece.count(b"\n")
                last_byte = piece[-1:]
    except OSError as e:
        raise InputError(f"cannot read {name}: {e.strerror or e}") from e
    # the last line need not end in a line break
    return count + (last_byte != b"\n")
