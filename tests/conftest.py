"""Fixtures shared by the tests of all scripts: running them as a person does, in a process of their own."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def popen_options(name: str, args: tuple, cwd: Path) -> dict:
    return {
        "args": [sys.executable, str(ROOT / name), *map(str, args)],
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

    What is left of the group is killed when the test ends.
    """
    started = []

    def start(name: str, *args, cwd: Path = tmp_path, **options) -> subprocess.Popen:
        options = {**popen_options(name, args, cwd), "stdin": subprocess.DEVNULL, "start_new_session": True, **options}
        started.append(subprocess.Popen(**options))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
