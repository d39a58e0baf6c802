"""Much data: archives as many as OpenWebText has or packed a thousandfold, texts larger than
memory, long chats.

The memory of a process is what it has for itself (RssAnon): pages of a mapped file are the system's
to take back.
"""

import io
import os
import re
import statistics
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from archives import NAMES, as_files, as_outer_tars, documents, read_three, shards, three_files, xz
from conftest import TINY, linux, processes_of, put, write_texts

from model import GPTLanguageModel, Vocabulary, save_model

pytestmark = linux


def memory(pid: int | str) -> float:
    """Return the megabytes that a process has for itself."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1000


def watch(run: subprocess.Popen) -> tuple[float, int]:
    """Return megabytes and open files of the largest process of a run that has to end well."""
    most, files = 0, 0
    while run.poll() is None:  # what it prints has room in its pipes
        for pid in processes_of(run.pid):
            with suppress(OSError, TypeError):  # it has ended just now
                most, files = max(most, memory(pid)), max(files, len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.02)
    assert run.returncode == 0, run.communicate()
    return most, files


def check_extraction(start_script, folder: str, limit: int = 200) -> None:
    megabytes, files = watch(start_script("data_extract.py", f"-data_dir={folder}"))
    assert megabytes < limit and files < 40


def test_an_archive_that_unpacks_to_300_times_its_size_is_streamed(start_script, tmp_path):
    packed = xz(b"the quick brown fox jumps over the lazy dog\n" * 200_000) * 12
    put(tmp_path, {f"in/{i}.xz": packed if i in (0, 9) else xz(b"text") for i in range(10)})
    check_extraction(start_script, "in", limit=130)
    train, val = ((tmp_path / name).stat().st_size for name in NAMES[:2])
    assert train == val + 8 * len("text") and val == 12 * 200_000 * 44 > 300 * len(packed)


@pytest.mark.soak
@pytest.mark.parametrize("pack", [as_files, as_outer_tars])
def test_as_many_archives_as_openwebtext_has(start_script, tmp_path, pack):
    corpus = shards(20_610)
    put(tmp_path / "in", pack(corpus))
    check_extraction(start_script, "in")
    assert read_three(tmp_path) == three_files([documents(corpus[name]) for name in sorted(corpus)])


FLAGS = [*TINY, "-max_iters=200", "-eval_interval=50", "-batch_size=32"]


def train_on(start_script, folder: Path, size: int, *flags) -> float:
    """Return the megabytes that a run on two texts of this size has at most.

    The texts take little room on the disk: they are NULs with some pages of text among them.
    """
    write_texts(folder, "the cat sat on the mat\n\0")
    for name in ("output_train.txt", "output_val.txt"):
        with open(folder / name, "wb") as file:
            for place in (0, size // 2, size - 2_300_000):
                file.seek(place)
                file.write(b"the cat sat on the mat\n" * 100_000)
        assert (folder / name).stat().st_blocks * 512 < 10e6
    return watch(start_script("training.py", *flags, cwd=folder))[0]


def test_training_on_a_text_larger_than_memory(start_script, tmp_path):
    assert train_on(start_script, tmp_path, 50_000_000_000, *FLAGS, "-max_iters=60") < 500


@pytest.mark.soak
@pytest.mark.parametrize(
    ("flags", "more"),
    [
        (FLAGS, 400),
        ([*FLAGS, "-optimizer=muon"], 400),
        (["-max_iters=10", "-eval_interval=5"], 20),  # the default shape
    ],
)
def test_training_on_a_text_larger_than_memory_takes_no_more_than_on_a_small_one(
    start_script, tmp_path, flags, more
):
    for command in (flags, ["-resume", f"-max_iters={more}"]):
        small = train_on(start_script, tmp_path / "small", 5_000_000, *command)
        large = train_on(start_script, tmp_path / "large", 50_000_000_000, *command)
        assert large < small + 60


class Clock(io.StringIO):
    """A standard output that notes when it is written to, and what memory the process has then."""

    def __init__(self):
        super().__init__()
        self.times, self.megabytes = [], []

    def write(self, text: str) -> int:
        if text:
            self.times.append(time.perf_counter())
        if len(self.times) % 100 == 0:
            self.megabytes.append(memory("self"))
        return super().write(text)


@pytest.mark.parametrize(
    ("count", "shape"),
    [(1_500, (32, 2, 1, 16)), pytest.param(10_000, (384, 4, 4, 128), marks=pytest.mark.soak)],
)
def test_every_token_of_a_long_chat_takes_the_same_time_and_memory(
    tmp_path, run_main, count, shape
):
    vocabulary = Vocabulary("\n abcdefghijklmnopqrstuvwxyz")
    save_model(tmp_path / "model-01.pkl", GPTLanguageModel(len(vocabulary), *shape), vocabulary)
    clock, part = Clock(), count // 5
    flags = ["-prompt=a", "-device=cpu", f"-max_new_tokens={count}", "-seed=1"]
    assert run_main("chatbot.py", *flags, stdout=clock).returncode == 0
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:])]
    first, last = (statistics.quantiles(times)[0] for times in (seconds[:part], seconds[-part:]))
    assert len(seconds) >= count and last < 1.5 * first
    assert max(clock.megabytes) < clock.megabytes[0] + 8
