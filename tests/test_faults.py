"""Two processes of which one fails, or was started differently, or whose torchrun has ended."""
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

SCRIPT = pathlib.Path(__file__).parent / "faults.py"


def environment(rank, port):
    """The variables with which torchrun starts a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(kind):
    """What two processes that start together say on stderr, and their exit codes."""
    port = free_port()
    runs = [subprocess.Popen([sys.executable, SCRIPT, kind], env=environment(rank, port), text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in range(2)]
    try:
        return [run.communicate(timeout=300)[1] for run in runs], [run.returncode for run in runs]
    finally:
        for run in runs:
            run.kill()


@pytest.mark.parametrize("kind, words", [
    ("settings", "the processes differ in seed: 0 on process 0, 1 on process 1: start all with"),
    ("error", "a mistake that one process sees")])
def test_a_mistake_is_said_once_and_ends_all_processes(tuned, kind, words):
    said, codes = run_two(kind)
    assert codes == [2, 2] and "".join(said).count(words) == 1
    assert "Traceback" not in "".join(said) and "another process" not in "".join(said)
    assert not pathlib.Path("drawn/distilled.png").exists()


def test_processes_whose_torchrun_has_ended_save_and_end():
    port = free_port()
    both = [{**environment(rank, port), "TORCHELASTIC_RUN_ID": "x"} for rank in range(2)]
    start = f"subprocess.Popen([sys.executable, {str(SCRIPT)!r}, 'orphan'], env=variables)"
    code = f"import subprocess, sys; [run.wait() for run in [{start} for variables in {both!r}]]"
    with open("said.txt", "w") as file:                         # a quick stand-in for torchrun
        torchrun = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file,
                                    start_new_session=True)
    log = pathlib.Path("out/digits/base.log.jsonl")
    while not log.exists():                                     # the first tenth is done
        time.sleep(0.1)
        assert torchrun.poll() is None, pathlib.Path("said.txt").read_text()
    torchrun.send_signal(signal.SIGKILL)
    torchrun.wait()
    began = time.monotonic()
    while running(torchrun.pid):
        time.sleep(0.1)
        assert time.monotonic() - began < 60
    state = torch.load("out/digits/base.resume.pt", weights_only=True)
    assert 90 <= state["step"] < 900
    said = pathlib.Path("said.txt").read_text()
    assert f"torchrun has ended: step {state['step']} is saved, and the same command resumes" in said
    assert "Traceback" not in said


def running(session):
    """Whether processes of the session, which are those that `torchrun` started, are there."""
    done = subprocess.run(["ps", "-o", "pid=", "--sid", str(session)], capture_output=True, text=True)
    return bool(done.stdout.strip())
