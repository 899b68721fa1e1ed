"""Jobs of a warm-up run side by side."""

from __future__ import annotations

import threading

import pytest

from omni_jax.engine.warmup import WarmUpJob, run_jobs


def test_jobs_run_side_by_side_and_large_ones_do_not() -> None:
    barrier = threading.Barrier(2, timeout=60)
    running: list[int] = []
    most: list[int] = []

    def large() -> None:
        running.append(1)
        most.append(len(running))
        running.pop()

    jobs = [WarmUpJob(lambda: None), *[WarmUpJob(lambda: barrier.wait())] * 2, *[WarmUpJob(large, is_large=True)] * 3]
    shown: list[tuple[int, int]] = []
    run_jobs(jobs, num_threads=3, progress=lambda done, total: shown.append((done, total)))
    assert most == [1, 1, 1]
    assert shown[0] == (0, 6) and shown[-1] == (6, 6)
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)


def test_one_thread_takes_them_in_order() -> None:
    order: list[str] = []
    jobs = [WarmUpJob(lambda name=name: order.append(name), is_large=name == "c") for name in "abc"]
    run_jobs(jobs, num_threads=1, progress=lambda done, total: None)
    assert order == ["c", "a", "b"]


def test_an_error_of_a_job_is_raised() -> None:
    def fail() -> None:
        raise ValueError("does not compile")

    with pytest.raises(ValueError, match="does not compile"):
        run_jobs([WarmUpJob(fail), WarmUpJob(lambda: None)], num_threads=2, progress=lambda done, total: None)
