import argparse

import pytest
import torch

from karat_det.engine import signals
from karat_det.engine.processes import run_distributed


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_any_number_of_gpus_is_one_process_on_the_cpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(signals, "install", lambda: None)
    calls = []
    run_distributed(calls.append, argparse.Namespace(num_gpus=8, num_machines=1))
    assert len(calls) == 1
    with pytest.raises(SystemExit, match=r"error: --num-machines is 2.*torchrun"):
        run_distributed(calls.append, argparse.Namespace(num_gpus=1, num_machines=2))
