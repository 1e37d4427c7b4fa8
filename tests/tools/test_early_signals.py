"""Ctrl-C while a command still imports, which takes seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "benchmark": ["--output", "out"],
    "check_gpu": [],
    "compile_attention": [],
    "convert_weights": ["in.pth", "out.pth"],
    "pretrain_net": [],
    "study": ["--study", "study.yaml", "--output", "out"],
    "train_net": [],
    "visualize_predictions": ["--config-file", "c.yaml", "--weights", "w.pth", "--input", "i", "--output", "out"],
}


def test_every_command_ends_at_ctrl_c_in_one_line(tmp_path):
    # The demos have no slow imports, and say how to go on.
    assert COMMANDS.keys() == {path.stem for path in (ROOT / "tools").glob("*.py")} - {
        *("demo", "demo_pretrained", "early_signals", "install_detectron2")
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = {
        name: subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments],
            **{"cwd": tmp_path, "env": environment, "text": True},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        for name, arguments in COMMANDS.items()
    }
    time.sleep(1.5)
    for run in runs.values():
        run.send_signal(signal.SIGINT)
    ends = {name: (run.communicate(timeout=60)[0], run.returncode) for name, run in runs.items()}
    assert ends == dict.fromkeys(COMMANDS, ("Ended at once by SIGINT.\n", 130))
