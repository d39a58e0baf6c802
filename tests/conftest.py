"""What the tests of all scripts share: making texts, running a script as a person does, and judging
how it ended.

A script runs in a process of its own where processes, signals or files of the system matter, and
else in this one, since it takes seconds to start. Both ways give a CompletedProcess.
"""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import chatbot
import data_extract
import training
from model import GPTLanguageModel

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"data_extract.py": data_extract, "training.py": training, "chatbot.py": chatbot}
TINY = [
    "-batch_size=4",
    "-block_size=8",
    "-n_embd=16",
    "-n_head=2",
    "-n_layer=1",
    "-eval_iters=2",
    "-device=cpu",
]
PROGRESS = r"extracting|replacing|loss|\s*\d+%"
NOTICES = "no openwebtext|passed over|left out|.*there is no run to go on with"

posix = pytest.mark.skipif(
    os.name != "posix", reason="POSIX links, limits, devices and permissions"
)
signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
linux = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks at processes through /proc"
)

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # as when a shell starts pytest in the background
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # or the scripts would not see a Ctrl-C either

# Files --------------------------------------------------------------------------------------------


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_texts(
    folder: Path, train: str | None = None, val: str | None = None, vocabulary: str = ""
) -> Path:
    """Write the three files that training.py reads. By default, the texts are easy to learn for the
    TINY shape.
    """
    if train is None:
        train, val = "the cat sat on the mat\n" * 200, val or "the mat sat on the cat\n" * 20
    texts = {"output_train.txt": train, "output_val.txt": val or train}
    characters = sorted(set(vocabulary or "".join(texts.values())))
    texts["vocab.txt"] = "".join(f"{character}\n" for character in characters)
    return put(folder, {name: text.encode() for name, text in texts.items()})


def metrics(folder: Path, name: str = "model-01") -> list[dict]:
    """The rows of the metrics that a run has left."""
    return list(csv.DictReader((folder / f"{name}.metrics.csv").read_text().splitlines()))


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run of two steps, by name: run.pkl and those beside it, and its texts."""
    folder = write_texts(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            training.run_training(*training.parse_args([*TINY, "-max_iters=2", "-model=run.pkl"]))
            == 0
        )
    return read_folder(folder)


# Running a script ---------------------------------------------------------------------------------


def popen_options(name: str, args: tuple, cwd: Path, processes: int = 1) -> dict:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return {
        "args": [
            sys.executable,
            *(torchrun if processes > 1 else []),
            str(ROOT / name),
            *map(str, args),
        ],
        "cwd": cwd,
        "env": {
            **os.environ,
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "1",
        },  # fast enough for tiny models
        "encoding": "utf-8",
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


@pytest.fixture
def run_script(tmp_path):
    """`run_script("chatbot.py", "-top_k", 3, cwd=..., stdin="...")` runs it to its end, in its own
    process.
    """

    def run(
        name: str, *args, cwd: Path = tmp_path, stdin: str = "", timeout: float = 60, **options
    ):
        return subprocess.run(
            **popen_options(name, args, cwd), input=stdin, timeout=timeout, **options
        )

    return run


@pytest.fixture
def start_script(tmp_path):
    """`start_script("training.py", ...)` starts it in a process group of its own and gives the
    Popen, for signals.

    With `processes=2`, torchrun starts it twice. What is left of the group is killed when the test
    ends.
    """
    started = []

    def start(
        name: str, *args, cwd: Path = tmp_path, processes: int = 1, **options
    ) -> subprocess.Popen:
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
        process = subprocess.Popen(**popen_options(name, args, cwd, processes) | options)
        started.append((process, processes, threading.Timer(600, process.kill)))
        started[-1][-1].start()  # so that no test can wait for ever
        return process

    yield start
    for process, processes, alarm in started:
        alarm.cancel()
        if process.poll() is None and processes > 1:
            process.terminate()  # torchrun's processes are in groups of their own, which it ends within 30 seconds
            process.wait(timeout=60)
        if os.name == "posix":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, as the processes do: more are no faster for tiny models, and far slower on a
    busy machine.
    """
    torch.set_num_threads(1)


@pytest.fixture
def extract_here(monkeypatch):
    """Let archives be extracted in this process, since others would not see what a test has
    changed.
    """

    def extract_all(archives, parts):
        for index, archive in enumerate(archives):
            yield data_extract.extract_archive(archive, parts / str(index))

    monkeypatch.setattr(data_extract, "extract_all", extract_all)


@pytest.fixture
def short_samples(monkeypatch):
    """Let the model write 8 characters after each evaluation, not 160, which take most of the time
    of a tiny run.
    """
    generate = GPTLanguageModel.generate
    monkeypatch.setattr(
        GPTLanguageModel, "generate", lambda *args, **options: generate(*args[:2], 8, **options)
    )


@pytest.fixture
def run_main(tmp_path, monkeypatch, extract_here):
    """`run_main("chatbot.py", "-top_k", 3, stdin=..., stdout=...)` runs a script's main() in this
    process.
    """
    handlers = {
        number: signal.getsignal(number) for number in (2, 15, getattr(signal, "SIGHUP", 2))
    }

    def run(name: str, *args, cwd: Path = tmp_path, **streams) -> subprocess.CompletedProcess:
        modes = {
            "stdin": "strict",
            "stdout": "strict",
            "stderr": "backslashreplace",
        }  # as Python has it
        own = {
            name: io.TextIOWrapper(io.BytesIO(), "utf-8", mode, write_through=True)
            for name, mode in modes.items()
        }
        arguments = [name, *map(str, args)]
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", arguments)
            for stream in modes:
                patch.setattr(sys, stream, streams.get(stream, own[stream]))
            try:
                status = SCRIPTS[name].main()
            except SystemExit as end:
                status = end.code
        shown = (
            own[stream].buffer.getvalue().decode("utf-8", "replace")
            for stream in ("stdout", "stderr")
        )
        return subprocess.CompletedProcess(arguments, status, *shown)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# How it goes and how it ends ----------------------------------------------------------------------


def notices(errors: str) -> list[str]:
    """The lines on standard error but those of progress bars."""
    return [
        line
        for line in re.split(r"[\r\n]+", errors)
        if line.strip() and not re.match(PROGRESS, line)
    ]


def assert_fails(result: subprocess.CompletedProcess, message: str, status: int = 1) -> None:
    """Check that a run ended with this status and, after notices, one line with this message (a
    pattern).
    """
    assert result.returncode == status, result.stderr
    script = next(Path(arg).name for arg in result.args if arg.endswith(".py"))
    *before, line = notices(result.stderr)
    assert re.match(rf"{script}: .*{message}", line) and "None" not in line, result.stderr
    assert all(re.match(NOTICES, notice) for notice in before), result.stderr


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_until_shown(process: subprocess.Popen, text: str, stream: str = "stderr") -> None:
    """Read standard error, or another stream, up to this text."""
    shown = ""
    while text not in shown:
        shown += (character := getattr(process, stream).read(1))
        assert character, shown


def processes_of(group: int) -> dict[int, str]:
    """The living processes of a process group, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            pass  # it has ended just now
    return found
