"""Processes of a run, forked from that of the tests without the seconds that imports take, and what runs leave."""

import json
import multiprocessing
import os
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.utils import comm

FORK = multiprocessing.get_context("fork")


def in_processes(folder, count, work, *arguments):
    """What work(*arguments) returns in each of some processes that gloo joins, by rank; plain values only.

    Args:
        folder: an empty one, in which they find each other.
    """
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_run, args=(theirs, f"file://{folder}/store", rank, count, work, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        answers = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(1)
            process.kill()
            process.join()
    for failure, _ in answers:
        assert not failure, failure
    return [result for _, result in answers]


def _run(pipe, store, rank, count, work, arguments):
    try:
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
        comm.create_local_process_group(count)
        pipe.send(("", work(*arguments)))
        torch.distributed.barrier()
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def killed(start, owner, name, iteration):
    """Trains what `start` makes in a process that is gone when it calls a function of this name in this iteration."""
    process = FORK.Process(target=_train_and_die, args=(start, owner, name, iteration))
    process.start()
    process.join()
    assert process.exitcode == 9


def _train_and_die(start, owner, name, iteration):
    trainer, function = start(), getattr(owner, name)

    def die(*arguments, **keywords):
        if trainer.iter == iteration:
            os._exit(9)
        return function(*arguments, **keywords)

    setattr(owner, name, die)
    trainer.train()


@contextmanager
def workers_ended(step):
    """Ends the workers of a trainer's loader on leaving: those of garbage in a cycle take ten seconds to end."""
    try:
        yield
    finally:
        step._data_loader_iter_obj = None


def metrics(folder):
    """The lines of metrics.json without what clocks say."""
    clocks = ("time", "data_time", "rank_data_time", "eta_seconds", "images/s")
    lines = [json.loads(line) for line in Path(folder, "metrics.json").read_text().splitlines()]
    return [{key: repr(value) for key, value in line.items() if key not in clocks} for line in lines]


def differences(a, b, where=""):
    """Places in nested containers of tensors and numbers that are not the same, bit by bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b, strict=True)) for place in differences(*pair, f"{where}.{i}")]
    return [] if a == b else [f"{where}: {a}, {b}"]


def differences_of_checkpoints(folder, other):
    """`differences` of the checkpoints in two folders, but for the config that those of a pretraining hold."""
    files = [
        {path.name: torch.load(path, weights_only=True) for path in Path(each).glob("*.pth")}
        for each in (folder, other)
    ]
    for content in (*files[0].values(), *files[1].values()):
        content.pop("config", None)
    return differences(*files)
