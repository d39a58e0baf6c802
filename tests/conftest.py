"""What all tests share: making texts, running a script as a person does, judging how it ended.

A script runs in a process of its own where processes, signals or files of the system matter, and
else in this one, since it takes seconds to start. Both ways give a CompletedProcess.
"""

import csv
import ctypes
import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
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
PROGRESS = r"extracting|replacing|loss|\s*\d+%|\s*$"
NOTICES = "no openwebtext|passed over|left out|.*there is no run to go on with"

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
posix = pytest.mark.skipif(
    os.name != "posix", reason="Windows has no such links, limits, devices or permissions"
)
signals = pytest.mark.skipif(
    os.name != "posix", reason="Windows has no SIGHUP and sends no signal to another process"
)

# A pattern of what the system says of a file that isn't there. Some of Windows's own functions say
# it in other words, which depend on its language, and on whether a file or a folder is missing.
WORDS = [ctypes.FormatError(code).rstrip(".") for code in (2, 3)] if os.name == "nt" else []
MISSING = "(" + "|".join(map(re.escape, [os.strerror(errno.ENOENT), *WORDS])) + ")"

STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])]

# A shell that starts pytest in the background lets it ignore Ctrl-C, and so would the scripts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    """Write the three files that training.py reads; by default texts that TINY learns easily."""
    if train is None:
        train, val = "the cat sat on the mat\n" * 200, val or "the mat sat on the cat\n" * 20
    texts = {"output_train.txt": train, "output_val.txt": val or train}
    characters = sorted(set(vocabulary or "".join(texts.values())))
    texts["vocab.txt"] = "".join(f"{character}\n" for character in characters)
    return put(folder, {name: text.encode() for name, text in texts.items()})


def metrics(folder: Path, name: str = "model-01") -> list[dict]:
    """Return the rows of the metrics that a run has left."""
    text = (folder / f"{name}.metrics.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> dict[str, bytes]:
    """Return the files of a run of two steps, by name: run.pkl and those beside it, its texts."""
    folder = write_texts(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["training.py", *TINY, "-max_iters=2", "-model=run.pkl"])
        assert training.main() == 0
    return read_folder(folder)


# Running a script ---------------------------------------------------------------------------------


def popen_options(name: str, args: tuple, cwd: Path, processes: int = 1, **options) -> dict:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    return {
        "args": [sys.executable, *launcher, str(ROOT / name), *map(str, args)],
        "cwd": cwd,
        # One thread, as in the fixture of this name.
        "env": {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        "encoding": "utf-8",
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        **options,
    }


@pytest.fixture
def run_script(tmp_path):
    """`run_script("chatbot.py", "-top_k", 3, stdin="…")` runs it to its end in its own process."""

    def run(name: str, *args, cwd: Path = tmp_path, stdin: str = "", timeout=60, **options):
        return subprocess.run(
            **popen_options(name, args, cwd, **options), input=stdin, timeout=timeout
        )

    return run


@pytest.fixture
def start_script(tmp_path):
    """`start_script("training.py", …)` starts it in a process group and gives the Popen.

    With `processes=2`, torchrun starts it twice. What is left of it when the test ends is killed.
    """
    with ExitStack() as ends:

        def start(name: str, *args, cwd: Path = tmp_path, processes: int = 1, **options):
            options = {"stdin": subprocess.DEVNULL, "start_new_session": True, **options}
            process = ends.enter_context(
                subprocess.Popen(**popen_options(name, args, cwd, processes, **options))
            )
            ends.callback(end_group, process, processes)
            return process

        yield start


def end_group(process: subprocess.Popen, processes: int) -> None:
    if processes > 1:
        process.terminate()  # torchrun ends its own, which are in other groups, within 30 seconds
        process.wait(timeout=60)
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: more are no faster for tiny models, and far slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def extract_here(monkeypatch):
    """Extract archives in this process, as others would not see what a test has changed."""

    def extract_all(archives, parts):
        return (
            data_extract.extract_archive(archive, parts / str(index))
            for index, archive in enumerate(archives)
        )

    monkeypatch.setattr(data_extract, "extract_all", extract_all)


@pytest.fixture
def short_samples(monkeypatch):
    """Let the model write 8 characters after an evaluation: 160 take most of a tiny run's time."""
    generate = GPTLanguageModel.generate
    monkeypatch.setattr(
        GPTLanguageModel, "generate", lambda *args, **options: generate(*args[:2], 8, **options)
    )


@pytest.fixture
def run_main(tmp_path, monkeypatch, extract_here):
    """`run_main("chatbot.py", "-top_k", 3, stdin=…)` runs a script's main() in this process."""
    handlers = {number: signal.getsignal(number) for number in STOPS}

    def run(name: str, *args, cwd: Path = tmp_path, **streams) -> subprocess.CompletedProcess:
        arguments = [name, *map(str, args)]
        modes = {"stdin": "strict", "stdout": "strict", "stderr": "backslashreplace"}  # Python's
        own = {
            stream: io.TextIOWrapper(io.BytesIO(), "utf-8", mode, newline="\n", write_through=True)
            for stream, mode in modes.items()
        }
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", arguments)
            for stream, file in (own | streams).items():
                patch.setattr(sys, stream, file)
            try:
                status = SCRIPTS[name].main()
            except SystemExit as end:
                status = end.code
        shown = [own[stream].buffer.getvalue().decode() for stream in ("stdout", "stderr")]
        return subprocess.CompletedProcess(arguments, status, *shown)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Output(io.StringIO):
    """A standard output that can't be written any more once `error`, an errno, is set."""

    error = None

    def write(self, text: str) -> int:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


# How it goes and how it ends ----------------------------------------------------------------------


def notices(errors: str) -> list[str]:
    """Return the lines on standard error but those of progress bars."""
    return [line for line in re.findall(r"[^\r\n]+", errors) if not re.match(PROGRESS, line)]


def assert_fails(result: subprocess.CompletedProcess, message: str, status: int = 1) -> None:
    """Check that a run ended with this status and, after notices, one line with this message.

    The message is a pattern; a `/` in it stands for whatever parts the names in the system's paths.
    """
    assert result.returncode == status, result.stderr
    script = next(Path(arg).name for arg in result.args if arg.endswith(".py"))
    message = message.replace("/", r"[/\\]")
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
        character = getattr(process, stream).read(1)
        assert character, shown
        shown += character


def processes_of(group: int) -> dict[int, str]:
    """Return the living processes of a process group, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended just now
            command = (folder / "cmdline").read_text(encoding="utf-8", errors="replace")
            if os.getpgid(int(folder.name)) == group and command:  # a zombie has none
                found[int(folder.name)] = command.replace("\0", " ")
    return found
