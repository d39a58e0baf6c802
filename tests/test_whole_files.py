"""Every output of all scripts is whole or as it was before: full disks, read-only folders, kills."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from archives import NAMES, read_three, three_files, xz
from conftest import TINY, assert_fails, metrics, put, signals, write_texts

import training
from model import load_model, read_model_file

linux_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None,
    reason="mounts a file system, for which it has to be root on Linux",
)
FORMER = {
    "model-01.pkl": b"a former model" * 2000,
    "model-01.state.pkl": b"its state" * 2000,
    "model-01.metrics.csv": b"its metrics",
    "loss.svg": b"its picture",
}
KEPT = {
    "model-01.old.pkl": "model-01.pkl",
    "model-01.old.state.pkl": "model-01.state.pkl",
    "model-01.old.metrics.csv": "model-01.metrics.csv",
}


class Disk:
    """A file system of one megabyte, of which `leave` leaves so many bytes free."""

    def __init__(self, folder: Path):
        self.folder = folder
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)

    def leave(self, free: int) -> None:
        filler = self.folder / ".filler"
        filler.unlink(missing_ok=True)
        status = os.statvfs(self.folder)
        filler.write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - free)))

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.name != ".filler"}


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", disk.folder], check=True)


@pytest.fixture
def run_here(tmp_path, run_main, short_samples):
    """run_main in a folder with texts and archives."""
    put(
        write_texts(tmp_path),
        {"in/a.txt": b"a" * 60_000, "in/b.txt": "".join(map(chr, range(0x4E00, 0x6E00))).encode()},
    )
    return run_main


def train_into(folder: Path) -> list:
    flags = [f"-model={folder / 'model-01.pkl'}", f"-plot={folder / 'loss.svg'}", "-save_interval=1", "-max_iters=2"]
    return ["training.py", *TINY, *flags]


def check_training(files: dict[str, bytes], folder: Path) -> None:
    """Each file is a former one, as it was, or a new one that is whole."""
    for name, content in files.items():
        if content == FORMER.get(KEPT.get(name, name)):
            continue
        assert name in FORMER, name
        if name == "model-01.pkl":
            load_model(folder / name)
        elif name == "model-01.state.pkl":
            assert read_model_file(folder / name)["training"]["record"]["step"] > 0
        elif name == "loss.svg":
            assert content.endswith(b"</svg>\n")
        else:
            assert [row["step"] for row in metrics(folder)] == ["2"]
    assert "model-01.pkl" in files  # the former one stays until there is a better one


# Full disks, and folders that can only be read -----------------------------------------------------------------------


@linux_root
def test_training_on_a_disk_that_is_full_sooner_or_later(disk, run_here):
    pytest.importorskip("matplotlib")
    named = set()
    for free in [*range(0, 240 << 10, 24 << 10), 900 << 10]:
        for name in disk.files():
            (disk.folder / name).unlink()
        put(disk.folder, FORMER)
        disk.leave(free)
        result = run_here(*train_into(disk.folder))
        files = disk.files()
        check_training(files, disk.folder)
        if result.returncode:
            assert_fails(result, "disk/.*: No space left on device")
            named.add(result.stderr.split(": ")[-2].rpartition("/")[2])
    assert result.returncode == 0 and files.keys() == FORMER.keys() | KEPT.keys()
    assert named >= {"model-01.old.pkl", "model-01.state.pkl", "model-01.pkl"}


@linux_root
@pytest.mark.parametrize(
    ("moment", "full"),
    [
        ((training, "keep_earlier_run"), "model-01.old.pkl"),
        ((training, "save_state"), "model-01.state.pkl"),
        ((training, "evaluate"), "model-01.pkl"),
        ((training, "save_metrics"), "model-01.metrics.csv"),
        ((training, "draw_losses"), "loss.svg"),
    ],
)
def test_training_on_a_disk_that_fills_up_at_one_moment(disk, run_here, monkeypatch, moment, full):
    pytest.importorskip("matplotlib")
    function = getattr(*moment)

    def after_filling_the_disk(*args, **more):
        disk.leave(0)
        return function(*args, **more)

    monkeypatch.setattr(*moment, after_filling_the_disk)
    put(disk.folder, FORMER)
    assert_fails(run_here(*train_into(disk.folder)), f"disk/{full}: No space left on device")
    files = disk.files()
    check_training(files, disk.folder)
    assert files.get(full, FORMER.get(full)) == FORMER.get(full)


@linux_root
def test_extracting_to_a_disk_that_is_full_sooner_or_later(tmp_path, disk, run_here):
    former, named = {name: name.encode() for name in NAMES}, set()
    for free in [*range(0, 140 << 10, 4 << 10), 900 << 10]:
        put(disk.folder, former)
        disk.leave(free)
        result = run_here("data_extract.py", "-data_dir=in", f"-output_dir={disk.folder}")
        if result.returncode:
            assert_fails(result, "disk/.*.tmp(/.)?: No space left on device")
            named.add(result.stderr.split(": ")[-2].rpartition("/")[2].removesuffix(".tmp"))
            assert disk.files() == former
    assert result.returncode == 0 and named == {"0", "1", "vocab.txt"}
    assert read_three(disk.folder) == three_files(
        [(tmp_path / "in" / name).read_text("utf-8") + "\n" for name in ("a.txt", "b.txt")]
    )


@linux_root
def test_a_folder_that_can_only_be_read_is_a_sentence_at_the_start(disk, run_here):
    put(disk.folder, FORMER)
    disk.make_read_only()
    must = "must name a file in a folder that exists and can be written to"
    elsewhere = f"-plot={disk.folder.parent / 'loss.svg'}"
    result = run_here(*train_into(disk.folder), elsewhere)
    assert_fails(result, f"-model {must}")
    assert result.stderr.count("\n") == 1
    assert_fails(run_here("training.py", *TINY, f"-plot={disk.folder / 'loss.svg'}"), f"-plot {must}")
    result = run_here("data_extract.py", "-data_dir=in", f"-output_dir={disk.folder}")
    assert_fails(result, "output_train.txt.tmp: Read-only file system")
    assert disk.files() == FORMER


def test_a_limit_on_file_sizes_is_named_and_leaves_the_former_model(tmp_path, run_here):
    resource = pytest.importorskip("resource")
    put(tmp_path, FORMER)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        result = run_here("training.py", *TINY, "-max_iters=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_fails(result, "model-01.*: File too large")
    assert (tmp_path / "model-01.pkl").read_bytes() == FORMER["model-01.pkl"]
    assert not list(tmp_path.glob("*.tmp"))


# Temporary files -----------------------------------------------------------------------------------------------------


def test_what_a_killed_run_has_left_is_overwritten_and_removed(tmp_path, run_here):
    pytest.importorskip("matplotlib")
    put(tmp_path, FORMER | {f"{name}.tmp": b"litter" * 30_000 for name in (*FORMER, "model-01.old.pkl")})
    assert run_here(*train_into(tmp_path)).returncode == 0
    assert not list(tmp_path.glob("*.tmp"))
    check_training({name: (tmp_path / name).read_bytes() for name in FORMER}, tmp_path)
    assert (tmp_path / "model-01.old.pkl").read_bytes() == FORMER["model-01.pkl"]


@pytest.mark.parametrize("name", [*FORMER, "model-01.old.pkl"])
def test_a_folder_in_the_place_of_a_temporary_file_is_a_sentence(tmp_path, run_here, name):
    pytest.importorskip("matplotlib")
    put(tmp_path, FORMER)
    (tmp_path / f"{name}.tmp").mkdir()
    assert_fails(run_here(*train_into(tmp_path)), f"{name}.tmp: ")
    assert [path.name for path in tmp_path.glob("*.tmp")] == [f"{name}.tmp"]
    check_training({name: (tmp_path / name).read_bytes() for name in FORMER if (tmp_path / name).exists()}, tmp_path)


# Long campaigns: pytest -m soak --------------------------------------------------------------------------------------


@pytest.mark.soak
@signals
def test_a_killed_extraction_leaves_former_or_whole_files(tmp_path, start_script, run_script):
    """Killed at 40 random moments, from the first byte to the last rename."""
    texts = {f"in/{i}.xz": xz(f"{i} is the text of this archive\n".encode() * 30_000) for i in range(12)}
    put(tmp_path, texts)
    assert run_script("data_extract.py", "-data_dir=in", "-output_dir=whole").returncode == 0
    former, new = dict.fromkeys(NAMES, b"former"), read_three(tmp_path / "whole")
    outcomes, chance = [], random.Random(1)
    for _ in range(40):
        out = put(tmp_path / "out", former)
        run = start_script("data_extract.py", "-data_dir=in", "-output_dir=out")
        started = time.monotonic()
        while not list(out.glob("*.tmp")) and run.poll() is None:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 1.5))
        run.kill()
        run.communicate()
        files = read_three(out)
        assert all(file in (b"former", whole) for file, whole in zip(files, new))
        outcomes.append((files == new, round(time.monotonic() - started, 2)))
    print(f"killed {sum(not done for done, _ in outcomes)} times before its end, {sum(d for d, _ in outcomes)} after")
    assert any(done for done, _ in outcomes) and not all(done for done, _ in outcomes)
    assert run_script("data_extract.py", "-data_dir=in", "-output_dir=out").returncode == 0
    assert sorted(os.listdir(out)) == sorted(NAMES) and read_three(out) == new
