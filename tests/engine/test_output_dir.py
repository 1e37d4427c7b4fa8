"""Who may write into the folder of a run."""

import multiprocessing
import os
import time

import pytest

from karat_det.engine.output_dir import begin, check_output_dir, claim, claims

FORK = multiprocessing.get_context("fork")


def test_an_output_folder_with_checkpoints_is_refused(tmp_path):
    check_output_dir(str(tmp_path / "new"))
    check_output_dir(str(tmp_path))
    (tmp_path / "model_0000399.pth").touch()
    with pytest.raises(ValueError, match=r"model_0000399.pth.*--resume.*another OUTPUT_DIR"):
        check_output_dir(str(tmp_path))


def other(folder, seconds):
    """Another process that claims the folder and keeps it for some time, and what it says."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=claim_and_wait, args=(str(folder), seconds, theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    return process, ours.recv()


def claim_and_wait(folder, seconds, pipe):
    with claims():
        try:
            claim(folder)
        except ValueError as error:
            pipe.send(str(error))
            return
        pipe.send("claimed")
        time.sleep(seconds)


def test_a_folder_belongs_to_one_run_until_it_ends_or_is_killed(tmp_path):
    folder = tmp_path / "a" / "out"
    first, said = other(folder, 60)
    assert said == "claimed"
    message = rf"out', into which another run writes just now \(process {first.pid} on "
    with claims(), pytest.raises(ValueError, match=message):
        claim(str(folder))
    first.kill()
    first.join()
    with claims():
        claim(str(folder))
        claim(str(folder))
        # A process that it forks, as to load images, does not keep the folder.
        loader = FORK.Process(target=time.sleep, args=(60,), daemon=True)
        loader.start()
        assert f"process {os.getpid()} on" in other(folder, 0)[1]
    assert other(folder, 0)[1] == "claimed"
    loader.kill()
    loader.join()


def test_a_run_that_is_refused_leaves_the_config_of_the_one_before(tmp_path):
    config = tmp_path / "config.yaml"
    for begins, left in ((True, "first"), (False, "first"), (True, "third")):
        with claims():
            claim(str(tmp_path))
            config.write_text(left if begins else "refused")
            if begins:
                begin(str(tmp_path))
        assert config.read_text() == left


def test_a_run_that_ends_is_waited_for(tmp_path):
    first, said = other(tmp_path, 1)
    with claims():
        claim(str(tmp_path), patience=30)
    assert said == "claimed" and not first.exitcode


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with claims(), pytest.raises(ValueError, match=r"OUTPUT_DIR is '.*file/out', which cannot be written to: "):
        claim(str(tmp_path / "file" / "out"))
