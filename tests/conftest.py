"""Fixtures shared by the tests of all scripts: running them as a person does, in a process of their own."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def popen_options(name: str, args: tuple, cwd: Path, processes: int = 1) -> dict:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return {
        "args": [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name), *map(str, args)],
        "cwd": cwd,
        "env": {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},  # fast enough for tiny models
        "encoding": "utf-8",
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


@pytest.fixture
def run_script(tmp_path):
    """`run_script("chatbot.py", "-top_k", 3, cwd=..., stdin="...")` runs it to its end, giving a CompletedProcess."""

    def run(name: str, *args, cwd: Path = tmp_path, stdin: str = "", timeout: float = 60, **options):
        return subprocess.run(**popen_options(name, args, cwd), input=stdin, timeout=timeout, **options)

    return run


@pytest.fixture
def start_script(tmp_path):
    """`start_script("training.py", ...)` starts it in a process group of its own and gives the Popen, for signals.

    With `processes=2`, torchrun starts it twice. What is left of the group is killed when the test ends.
    """
    started = []

    def start(name: str, *args, cwd: Path = tmp_path, processes: int = 1, **options) -> subprocess.Popen:
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
        started.append(subprocess.Popen(**popen_options(name, args, cwd, processes) | options))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None and "torch.distributed.run" in process.args:
            process.terminate()  # torchrun's processes are in groups of their own, which it ends within 30 seconds
            process.wait(timeout=60)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
