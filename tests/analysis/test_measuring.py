"""karat_det.analysis.measuring: turns, bytes and multiply-adds, and peaks in processes of their own."""

import os
import resource
from functools import partial

import pytest
import torch

from karat_det.analysis import measuring
from karat_det.analysis.measuring import (
    Turns,
    bytes_kept,
    in_fresh_process,
    keep_freed_memory,
    multiply_adds,
    peak_memory,
)


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def test_bytes_kept_counts_each_storage_once_and_whole():
    x, y = torch.randn(10, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    assert bytes_kept(Function(lambda x, y: x * y), (x, y)) == 2 * 240
    assert bytes_kept(Function(lambda x, y: x * x.detach() + y), (x, y)) == 240
    assert bytes_kept(Function(lambda x, y: (x[:2] * y[:2]).exp()), (x, y)) == 2 * 240 + 2 * 6 * 4
    assert bytes_kept(Function(lambda x, y: x + y), (x, y)) == 0


def test_multiply_adds_are_those_of_the_matrix_products_for_one_of_the_batch():
    product = Function(lambda x, y: (x @ y).exp())
    assert multiply_adds(product, (torch.randn(5, 2, 3), torch.randn(5, 3, 4))) == 2 * 3 * 4


def test_functions_are_timed_in_turns_and_the_median_counts(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])
    durations = {"a": iter([100.0, 100.0, 3.0, 50.0, 4.0]), "b": iter([100.0, 100.0, 7.0, 8.0, 9.0])}

    def function(name):
        def run():
            calls.append(name)
            clock[0] += next(durations[name])

        return run

    medians = Turns(repeats=3, seconds=1000).median_seconds({name: function(name) for name in durations})
    assert medians == {"a": 4.0, "b": 8.0}  # without the 100 of the first calls
    assert "".join(calls) == "aabbababab"


def test_a_turn_of_a_fast_function_is_several_calls(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def fast():
        calls.append(1)
        clock[0] += 0.25

    assert Turns(repeats=2, seconds=1000, turn_seconds=1.0).median_seconds({"a": fast}) == {"a": 0.25}
    assert len(calls) == 2 + 2 * 4


def test_slow_functions_have_three_turns_at_least():
    calls = []
    turns = Turns(repeats=5, seconds=0, turn_seconds=0)
    turns.median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert "".join(calls) == "aabb" + "ab" * 3


def _peaks_of_ones(*sizes):
    torch.ones(2**20)  # a process's first call brings code into memory
    return [peak_memory(partial(torch.ones, size), "cpu") for size in sizes]


def test_peak_memory_is_what_a_call_adds():
    mib = 2**20
    # This process has free memory of earlier tests, which a call would fill without adding any.
    small, large = in_fresh_process(_peaks_of_ones, 1, 16 * mib)
    assert small < 2 * mib
    assert large == pytest.approx(64 * mib, abs=2 * mib)


def _page_faults_of_large_tensors(keep):
    if keep:
        keep_freed_memory()
    for _ in range(3):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_steps_are_timed_without_the_page_faults_of_large_tensors():
    given_back, kept = (in_fresh_process(_page_faults_of_large_tensors, keep) for keep in (False, True))
    assert kept < 0.1 * given_back


def test_a_process_that_dies_is_named_with_what_to_do():
    with pytest.raises(RuntimeError, match=r"was killed.*--max-memory"):
        in_fresh_process(os._exit, 1)
