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
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from archives import as_files, as_outer_tars, documents, read_three, shards, three_files, xz
from conftest import TINY, processes_of, put, wait_until_shown, write_texts

from model import GPTLanguageModel, Vocabulary, save_model

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="looks at processes through /proc"
)


def memory(pid: int | str) -> float:
    """Megabytes that a process has for itself."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1000


def watch(run: subprocess.Popen) -> tuple[float, int]:
    """Megabytes and open files of the largest process of a run that has to end well."""
    most, files, printed = 0, 0, []
    reader = threading.Thread(target=lambda: printed.extend(run.communicate()))
    reader.start()
    while reader.is_alive():
        for pid in processes_of(run.pid):
            with suppress(OSError, TypeError):  # it has ended just now
                most, files = max(most, memory(pid)), max(files, len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.02)
    assert run.returncode == 0, printed
    return most, files


def check_extraction(start_script, folder: str, limit: int = 200) -> None:
    started = time.monotonic()
    run = start_script("data_extract.py", f"-data_dir={folder}")
    megabytes, files = watch(run)
    print(f"{folder}: took {time.monotonic() - started:.1f} s")
    print(f"the largest process had {megabytes:.0f} MB, and {files} files open")
    assert megabytes < limit and files < 40


def test_an_archive_that_unpacks_to_300_times_its_size_is_streamed(start_script, tmp_path):
    packed = xz(b"the quick brown fox jumps over the lazy dog\n" * 200_000) * 12
    put(tmp_path, {f"in/{i}.xz": packed if i in (0, 9) else xz(b"text") for i in range(10)})
    check_extraction(start_script, "in", limit=130)
    for name, size in (("train", 12 * 200_000 * 44 + 8 * 4), ("val", 12 * 200_000 * 44)):
        assert (tmp_path / f"output_{name}.txt").stat().st_size == size > 300 * len(packed)


@pytest.mark.soak
def test_as_many_archives_as_openwebtext_has(start_script, tmp_path):
    corpus = shards(20_610)
    put(tmp_path / "files", as_files(corpus))
    put(tmp_path / "tars", as_outer_tars(corpus))
    expected = three_files([documents(corpus[name]) for name in sorted(corpus)])
    for folder in ("files", "tars"):
        check_extraction(start_script, folder)
        assert read_three(tmp_path) == expected


FLAGS = [*TINY, "-max_iters=200", "-eval_interval=50", "-batch_size=32"]


def train_on(start_script, folder: Path, size: int, *flags) -> tuple[float, float]:
    """Seconds until the first evaluation, and megabytes at most, of a run on two texts of this
    size.
    """
    write_texts(folder, "the cat sat on the mat\n\0")
    for name in (
        "output_train.txt",
        "output_val.txt",
    ):  # NULs that take no room, but for some pages of text
        with open(folder / name, "wb") as file:
            for place in (0, size // 2, size - 2_300_000):
                file.seek(place)
                file.write(b"the cat sat on the mat\n" * 100_000)
        assert (status := (folder / name).stat()).st_size == size and status.st_blocks * 512 < 10e6
    started = time.monotonic()
    run = start_script("training.py", *flags, cwd=folder)
    wait_until_shown(run, ": train loss", "stdout")
    seconds = time.monotonic() - started
    return seconds, watch(run)[0]


def test_training_on_a_text_larger_than_memory(start_script, tmp_path):
    seconds, megabytes = train_on(start_script, tmp_path, 50_000_000_000, *FLAGS, "-max_iters=60")
    assert seconds < 30 and megabytes < 500


@pytest.mark.soak
@pytest.mark.parametrize(
    "flags", [FLAGS, [*FLAGS, "-optimizer=muon"], ["-max_iters=10", "-eval_interval=5"]]
)
def test_training_on_a_text_larger_than_memory_takes_no_more_than_on_a_small_one(
    start_script, tmp_path, flags
):
    for more in (flags, ["-resume", "-max_iters=400" if flags[0] in FLAGS else "-max_iters=20"]):
        small, large = (
            train_on(start_script, tmp_path / str(n), n, *more) for n in (5_000_000, 50_000_000_000)
        )
        assert large[0] < small[0] + 5
        assert large[1] < small[1] + 60


class Clock(io.StringIO):
    """A standard output that notes when it is written to, and how much memory the process has then."""

    def __init__(self):
        super().__init__()
        self.times, self.megabytes = [], []

    def write(self, text: str) -> int:
        self.times += [time.perf_counter()] if text else []
        self.megabytes += [memory("self")] if text and len(self.times) % 100 == 0 else []
        return super().write(text)


LONG = pytest.param(10_000, (384, 4, 4, 128), marks=pytest.mark.soak)


@pytest.mark.parametrize(("count", "shape"), [(1_500, (32, 2, 1, 16)), LONG])
def test_every_token_of_a_long_chat_takes_the_same_time_and_memory(
    tmp_path, run_main, count, shape
):
    vocabulary = Vocabulary("\n abcdefghijklmnopqrstuvwxyz")
    save_model(tmp_path / "model-01.pkl", GPTLanguageModel(len(vocabulary), *shape), vocabulary)
    clock, part = Clock(), count // 5
    flags = ["-prompt=a", "-device=cpu", f"-max_new_tokens={count}", "-seed=1"]
    assert run_main("chatbot.py", *flags, stdout=clock).returncode == 0
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:])][:count]
    first, last = (statistics.quantiles(times)[0] for times in (seconds[:part], seconds[-part:]))
    assert (
        len(seconds) == count
        and last < 1.5 * first
        and max(clock.megabytes) < clock.megabytes[0] + 8
    )
