"""What `make demo` and `make demo-pretrained` run and say, without the hours that it takes."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def demos(monkeypatch, tmp_path):
    """demo.py and demo_pretrained.py as modules; instead of a step's command, what `ran` holds is done with it."""
    monkeypatch.syspath_prepend(str(TOOLS))
    modules = [importlib.import_module(name) for name in ("demo", "demo_pretrained")]
    for module in modules:
        monkeypatch.delitem(sys.modules, module.__name__)
    demo = modules[0]
    commands = []

    def run_step(what, *arguments):
        commands.append(arguments)
        if "tools/train_net.py" in arguments:
            folder = tmp_path / arguments[arguments.index("OUTPUT_DIR") + 1]
            folder.mkdir(parents=True)
            (folder / "model_final.pth").touch()
            # The pretrained run is the better one. The last line is that of a run that was killed.
            better = 10 * ("MODEL.WEIGHTS" in arguments)
            lines = [{"iteration": 9, "bbox/AP": 20.04 + better, "segm/AP": 10.0 + better}, {"iteration": 19, "lr": 1}]
            (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + '\n{"iter')

    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "number_of_gpus", lambda: 0)
    monkeypatch.setattr(demo, "number_of_cpu_processes", lambda: 2)
    for module in modules:
        monkeypatch.setattr(module, "run_step", run_step)
    return *modules, commands


def test_the_demo_trains_once_and_tells_the_figures(demos, capsys):
    demo, _, commands = demos
    demo.main()
    assert [next(word for word in command if word.endswith(".py")) for command in commands] == [
        "datasets/prepare_digits.py",
        "tools/train_net.py",
        "tools/visualize_predictions.py",
    ]
    assert commands[1][:2] == ("-m", "torch.distributed.run") and "--resume" in commands[1]
    told = capsys.readouterr().out
    assert "box AP   20.0" in told and "mask AP  10.0" in told
    demo.main()
    assert sum("tools/train_net.py" in command for command in commands) == 1
    assert "holds a finished run" in capsys.readouterr().out


def test_the_pretrained_demo_trains_two_detectors_alike_but_for_their_start(demos, capsys):
    _, demo_pretrained, commands = demos
    demo_pretrained.main()
    _, pretraining, random, pretrained = commands
    assert "tools/pretrain_net.py" in pretraining and "configs/pretrain/digits.yaml" in pretraining
    classifier = pretraining[pretraining.index("OUTPUT_DIR") + 1]
    *same, key, weights = pretrained
    assert (key, weights) == ("MODEL.WEIGHTS", f"{classifier}/model_last.pth")
    assert [word for word in same if "output/" not in word] == [word for word in random if "output/" not in word]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "random" in line or "pretrained" in line]
    assert rows[-2:] == [["random", "weights", "20.0", "10.0"], ["pretrained", "30.0", "20.0"]]


def test_a_run_without_an_evaluation_is_named(demos):
    demo, *_ = demos
    with pytest.raises(SystemExit, match=r"output/quickstart/metrics\.json has no evaluation: remove"):
        demo.average_precision(demo.OUTPUT)


def test_at_ctrl_c_the_demo_waits_for_the_checkpoint_of_its_step(tmp_path):
    step = tmp_path / "step.py"
    step.write_text(
        "import pathlib, signal, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "def save(*_): time.sleep(1); (here / 'saved').touch(); raise SystemExit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "(here / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    # What a shell starts in the background, as a suite may be, ignores SIGINT, and so does what it starts in turn.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; import demo; demo.run(lambda: demo.run_step('Training', {str(step)!r}))"
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=TOOLS, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    told, _ = run.communicate(timeout=30)
    assert run.returncode == 130 and "Interrupted." in told and (tmp_path / "saved").exists()
