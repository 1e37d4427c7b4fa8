"""Several processes of one run, forked from that of the tests: without the seconds that imports take."""

import multiprocessing
import traceback

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
