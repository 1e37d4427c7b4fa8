"""The processes of one run: how they start, how they agree, and how they come back after one has died."""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from . import signals
from .output_dir import check_output_dir, claim

logger = logging.getLogger(__name__)

# Messages of gloo and nccl if the other end of a connection is gone.
_LOST = re.compile(r"[Cc]onnection (closed|reset|refused)|Broken pipe|remote process exited|NCCL (error|communicator)")
# torch's message if a worker of a data loader is gone.
_LOADER = "DataLoader worker (pid"
# torch's addition before an error in a worker.
_IN_LOADER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback")
# torch's message, in a RuntimeError, if the CPU has no memory.
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_STARTED_BY = ".started_by"


class RunFailed(RuntimeError):
    """An error that ends a run; the command prints its message as one line."""


class _EndOfChild(Exception):
    """Ends a process that `launch` has started; the launching process prints the message, once for all."""


def run_distributed(main: Callable[..., Any], args: Any, check: Callable[..., None] | None = None) -> None:
    """Calls `main(args)` in as many processes as the command line or torchrun asks for.

    Under torchrun the processes are there already and join by nccl, or by gloo without a GPU. Else Detectron2's
    `launch` starts one for each of --num-gpus. Without a GPU, or with --num-gpus 0, it is one process on the CPU.
    A mistake of the user's ends the process with one line, as do signals and the loss of another process.

    Args:
        main: the work of one process.
        args: the arguments of Detectron2's `default_argument_parser`.
        check: shows mistakes before any work, by `check(args, num_processes)`. It is called once, before
            `launch` starts processes, or in the main one of torchrun's.

    Raises:
        SystemExit: the run ended early.
    """
    signals.install()
    try:
        with _told_in_one_line():
            _run(main, args, check or (lambda args, num_processes: None))
    except (ProcessExitedException, ProcessRaisedException) as error:  # of `launch`
        if signals.requested():
            raise SystemExit(128 + signals.requested()) from None
        # The message is the trace of a child's error.
        _, _, told = str(error).partition(f"\n{__name__}.{_EndOfChild.__name__}: ")
        if told:
            raise SystemExit(told.strip()) from None
        if isinstance(error, ProcessExitedException):
            raise SystemExit(f"error: {error}") from None
        raise


def _run(main: Callable[..., Any], args: Any, check: Callable[..., None]) -> None:
    use_gpus = torch.cuda.is_available() and args.num_gpus > 0
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local_rank = int(os.environ["LOCAL_RANK"])
        if use_gpus and local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started process {local_rank} on a machine with {torch.cuda.device_count()} GPUs. Start one "
                "for each GPU, or give --num-gpus 0 for the CPU."
            )
        if use_gpus:
            torch.cuda.set_device(local_rank)
        _join("nccl" if use_gpus else "gloo")
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        try:
            with _told_in_one_line():
                _in_main_process(partial(check, args, comm.get_world_size()))
                main(args)
        finally:
            distributed.destroy_process_group()
        return
    if not use_gpus:
        if args.num_machines > 1:
            raise ValueError(f"--num-machines is {args.num_machines}: several machines without GPUs need torchrun.")
        check(args, 1)
        main(args)
        return
    if args.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus is {args.num_gpus}, but this machine has {torch.cuda.device_count()}.")
    check(args, args.num_gpus * args.num_machines)
    if args.num_gpus * args.num_machines == 1:
        main(args)
        return
    with signals.passed_on():
        launch(_in_child, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(main, args))


def _in_main_process(check: Callable[[], None]) -> None:
    """Calls a check in the main process of a run. All processes must call this, and raise its error."""
    failure = None
    if comm.is_main_process():
        try:
            check()
        except Exception as error:
            failure = error
    failure = comm.all_gather(failure)[0]
    if failure is not None:
        raise failure


def _in_child(main: Callable[..., Any], args: Any) -> None:
    """The work of a process that `launch` has started. A user's mistake is reported once for all processes."""
    signals.install()
    try:
        with _told_in_one_line():
            main(args)
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        raise _EndOfChild(end.code) from None


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Ends the process with one line for errors of the user, the machine or the data."""
    try:
        with _lack_of_memory_named():
            yield
    except (ValueError, OSError, FloatingPointError, RunFailed) as error:
        raise SystemExit(f"error: {without_trace(error)}") from None
    except RuntimeError as error:
        if not is_loss(error):
            raise
        if _LOADER in str(error):
            raise SystemExit(
                f"error: A process that reads images has died. {str(error).strip().splitlines()[0]} If memory was "
                "short, lower DATALOADER.NUM_WORKERS. Go on with --resume."
            ) from None
        raise SystemExit(f"error: Process {comm.get_rank()} lost another process of the run.") from None


@contextmanager
def _lack_of_memory_named() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        what = without_trace(error).partition("\n")[0] or "MemoryError."
        raise RunFailed(
            f"There is not enough memory for the run: {what} Lower SOLVER.IMS_PER_BATCH or the model's IMG_SIZE."
        ) from None


def _join(backend: str) -> None:
    """Joins the other processes of torchrun.

    torchrun's restarts share one store. A dead attempt's entries would mislead the next one, so each attempt has its
    own names. On several machines the counts of restarts may differ: there torchrun must make a store for each attempt,
    by TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    timeout = timedelta(minutes=30)
    store, rank, world_size = next(distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = distributed.PrefixStore(f"attempt {restarts()}", store)
    elif rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        logger.warning(
            "With --max-restarts, a restart may hang on what the attempt before has left: on several machines set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started."
        )
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def is_loss(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone, of the run or one that reads images."""
    lost = comm.get_world_size() > 1 and _LOST.search(str(error))
    return isinstance(error, RuntimeError) and bool(lost or _LOADER in str(error))


def is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that a processor or a GPU has no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY in str(error)
    )


def without_trace(error: BaseException) -> str:
    """An error's message, without the trace that torch puts in front of one of a process that reads images."""
    message = str(error).strip()
    if caught := _IN_LOADER.match(message):
        return re.split(rf"^(?:[\w.]+\.)?{caught[1]}(?:: |$)", message, flags=re.MULTILINE)[-1].strip()
    return message


def restarts() -> int:
    """How often torchrun has started this run again after a process of it had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def goes_on(output_dir: str, resume: bool) -> bool:
    """Whether a run goes on from its folder's checkpoints; a new run must not have any. All processes must call it.

    A run that torchrun has started again goes on by itself, as with --resume, if its first attempt began the folder.

    Args:
        output_dir: the folder.
        resume: whether --resume is given.

    Raises:
        ValueError: the folder holds the checkpoints of another run.
    """
    if resume:
        return True
    path = Path(output_dir, _STARTED_BY)
    again = comm.all_gather(restarts() > 0 and path.is_file() and path.read_text(encoding="utf-8") == _mark())[0]
    if again:
        return True
    check_output_dir(output_dir)
    return False


def take_folder(output_dir: str) -> None:
    """Makes the folder of a run, locks it, and marks it as begun by this torchrun; all processes must call it.

    Raises:
        ValueError: another run has the folder, or it cannot be written to.
    """
    # Processes of a failed attempt may take a moment to end.
    claim(output_dir, patience=30.0 if restarts() else 0.0)
    if "TORCHELASTIC_RUN_ID" in os.environ and comm.is_main_process():
        Path(output_dir, _STARTED_BY).write_text(_mark(), encoding="utf-8")


def _mark() -> str:
    return f"{socket.gethostname()} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"


def agree(*values: float) -> tuple[float, ...]:
    """The largest of each value over all processes, which must call it together; some 0.2 ms."""
    if comm.get_world_size() == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=_group())
    return tuple(largest.tolist())


@lru_cache
def _group() -> distributed.ProcessGroup:
    """All processes, by gloo, so that they can agree without a GPU."""
    return distributed.group.WORLD if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
