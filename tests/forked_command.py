"""A command as a user runs it, in a process forked from that of the tests: without the seconds that imports take."""

import importlib
import io
import logging
import multiprocessing.forkserver
import multiprocessing.process
import multiprocessing.util
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.utils import logger as detectron2_logger
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from karat_det.data import images
from karat_det.data.digits import register_digits

TOOLS = Path(__file__).parents[1] / "tools"


def run_command(name, *arguments, **how):
    """Runs tools/<name>.py to its end.

    Args: see `start_command`.

    Returns:
        A CompletedProcess with status, stdout and stderr.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = start_command(name, *arguments, output=output, errors=errors, **how)
        status = process.wait()
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(io.TextIOWrapper(file, "utf-8").read())
    return subprocess.CompletedProcess([name, *arguments], status, *texts)


def run_in_fork(command, *, env, stdout=None, stderr=None, stdin=None):
    """subprocess.run, in the place of a module's, for commands of the tools: [python, tools/<name>.py, *words]."""
    _, script, *arguments = command
    done = run_command(Path(script).stem, *arguments, folder=".", environment=env)
    print(done.stdout, file=stdout)
    print(done.stderr, file=stderr)
    return done


def start_command(name, *arguments, output, errors, folder, environment=None, prepare=None, torchrun=()):
    """Starts tools/<name>.py.

    Args:
        name: the command; or the path of another script, without .py.
        arguments: its words.
        output, errors: open files, for stdout and stderr.
        folder: the working directory.
        environment: variables that it has beside those of the tests. Imports are made already.
        prepare: called in the new process first.
        torchrun: its options, to run under torchrun; its processes are forked too.
    """
    command = [str(TOOLS / f"{name}.py"), *map(str, arguments)]
    child = os.fork()
    if not child:
        # Whatever happens, the child ends here: it would go on as a second run of the tests.
        status = 1
        try:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            status = _run(command, folder, environment or {}, prepare, torchrun)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return Forked(child)


class Forked:
    """A process that was forked, with the methods of subprocess.Popen."""

    def __init__(self, pid):
        self.pid = pid
        self.status = None

    def poll(self):
        return self._wait(os.WNOHANG)

    def wait(self, timeout=None):
        deadline = time.monotonic() + (timeout or 0)
        while timeout and self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.pid, timeout)
            time.sleep(0.02)
        return self._wait(0)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def _wait(self, options):
        if self.status is None:
            ended, status = os.waitpid(self.pid, options)
            if ended:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status


def _run(command, folder, environment, prepare, torchrun):
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w"), "utf-8", write_through=True) for number in (1, 2)
    )
    status = 1
    try:
        signal.alarm(300)
        # The tests' children are not its own: it can neither wait for them nor end them.
        multiprocessing.process._children.clear()
        multiprocessing.forkserver._forkserver.__init__()
        os.chdir(folder)
        os.environ.update(environment)
        # What the tests have left: loggers that write to them, and Detectron2's memory of having set them up.
        for each in (logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)):
            each.handlers.clear()
        detectron2_logger.setup_logger.cache_clear()
        images._named.clear()  # What was logged once in the tests' process.
        # They are where the environment says.
        DatasetCatalog.clear()
        MetadataCatalog.clear()
        importlib.reload(builtin)
        register_digits()
        sys.argv = command
        sys.path.insert(0, str(TOOLS))
        sys.modules.pop("early_signals", None)
        if prepare:
            prepare()
        if torchrun:
            _run_under_torchrun(command[0], torchrun)
        else:
            _run_script(command[0])
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            status = end.code or 0
    except BaseException:
        traceback.print_exc()
    multiprocessing.util._exit_function()
    return status


def _run_script(path):
    runpy.run_path(path, run_name="__main__")


def _run_under_torchrun(path, options):
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    config, _, _ = config_from_args(parse_args([*options, *rendezvous, path]))
    config.start_method = "fork"
    elastic_launch(config, _run_script)(path)
