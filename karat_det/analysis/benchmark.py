"""What KArAt costs on this machine, in time and memory, beside softmax and beside its equation as written."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .benchmark_attention import (
    GRIDS,
    REL_POS,
    WINDOWS,
    AttentionShape,
    compare_memory,
    compare_peaks,
    compare_times,
    measure_scaling,
)
from .benchmark_detector import compare_inference, compare_steps, with_and_without
from .benchmark_report import Results
from .measuring import Turns, describe_machine, keep_freed_memory

logger = logging.getLogger(__name__)

PARTS = ("core", "step", "inference", "scaling")


def run_benchmark(
    parts: Sequence[str],
    config_file: str,
    opts: Sequence[str],
    turns: Turns,
    max_memory: float,
) -> Iterator[Results]:
    """Measures some parts, with a line in the log for each comparison begun, and yields all results after each.

    From here on the process reuses freed memory. Otherwise page faults would be a third of an attention's time, and
    their number depends on earlier allocations.

    Args:
        parts: some of PARTS.
        config_file: YAML of the detector with KArAt, for "step" and "inference".
        opts: overrides of its keys, KEY VALUE.
        turns: how the variants of each comparison are timed, and their device.
        max_memory: "scaling" leaves out what would need more bytes.

    Raises:
        ValueError, OSError: the config is not valid, or the system does not report a process's peak memory.
        RuntimeError: a process died, most likely because memory ran out.
    """
    if {"step", "inference"} & set(parts):
        with_and_without(config_file, opts, turns.device)  # a mistake shows before minutes have passed
    results = Results(describe_machine(turns.device))
    logger.info("On %s", results.machine)
    keep_freed_memory()
    if "core" in parts:
        results.comparisons += compare_times(turns)
        for shape in (WINDOWS, REL_POS):
            results.comparisons += compare_memory(shape, turns.device)
        results.comparisons.append(compare_peaks(AttentionShape(batch_size=1, grid=GRIDS[-1]), turns.device))
        yield results
    if "step" in parts:
        results.comparisons += compare_steps(config_file, opts, turns)
        yield results
    if "inference" in parts:
        results.comparisons.append(compare_inference(config_file, opts, turns))
        yield results
    if "scaling" in parts:
        for grid in GRIDS:
            shape = AttentionShape(batch_size=1, grid=grid)
            logger.info("Scaling, %s", shape)
            results.scaling += measure_scaling(shape, replace(turns, seconds=turns.seconds / len(GRIDS)), max_memory)
        yield results
