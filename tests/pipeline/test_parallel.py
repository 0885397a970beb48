import time

import pytest
import torch

from pipeline.parallel import map_in_order


def test_results_come_in_order_and_threads_are_given_back() -> None:
    before = torch.get_num_threads()

    def slow_first(job: int) -> tuple[int, int]:
        time.sleep(0.05 if job == 0 else 0)
        return job, torch.get_num_threads()

    results = list(map_in_order(slow_first, range(7)))
    assert [job for job, _ in results] == list(range(7))
    assert {threads for _, threads in results} == {1}
    assert torch.get_num_threads() == before


def test_the_first_error_ends_it() -> None:
    done = []

    def work(job: int) -> int:
        if job == 3:
            raise ValueError("matrix 3")
        done.append(job)
        return job

    with pytest.raises(ValueError, match="matrix 3"):
        list(map_in_order(work, range(1000), 4))
    assert len(done) < 20


def test_jobs_are_taken_as_results_are_read() -> None:
    taken = []

    def jobs():
        for job in range(1000):
            taken.append(job)
            yield job

    results = map_in_order(lambda job: job, jobs(), 4)
    assert next(results) == 0
    assert len(taken) < 20
    results.close()
