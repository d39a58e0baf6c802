"""Every output of every script is whole or as it was: full disks, read-only folders, kills."""

import errno
import os
import random
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from archives import NAMES, read_three, three_files, xz
from conftest import TINY, assert_fails, metrics, put, read_folder, wait_for, write_texts

import training
from model import load_model, read_model_file

linux_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system, as root on Linux"
)
FORMER = {
    "model-01.pkl": b"a model" * 999,
    "model-01.state.pkl": b"state" * 999,
    "model-01.metrics.csv": b"metrics",
}
KEPT = {name: name.replace("model-01", "model-01.old") for name in FORMER}
FORMER_TEXTS = {name: name.encode() for name in NAMES}
CHINESE = "".join(map(chr, range(0x4E00, 0x6E00)))


@pytest.fixture
def disk(tmp_path):
    """Return a disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk, files: dict[str, bytes], free: int) -> None:
    """Let only these files be there, and so many kilobytes free beside them."""
    for path in disk.iterdir():
        path.unlink()
    status = os.statvfs(put(disk, files))
    put(disk, {".filler": bytes(max(0, status.f_bavail * status.f_frsize - 1024 * free))})


@pytest.fixture
def run_here(tmp_path, run_main, short_samples):
    """run_main in a folder with texts and archives."""
    put(write_texts(tmp_path), {"in/a.txt": b"a" * 60_000, "in/b.txt": CHINESE.encode()})
    return run_main


def check_training(folder, failed: bool) -> None:
    """Each file is a former one, as it was, under one of its names, or a new one that is whole.

    After a run that has not failed, both are there, but perhaps for the new losses, without which
    a run goes on.
    """
    files = read_folder(folder)
    for name, content in FORMER.items():
        assert content in (files.get(name), files.get(KEPT[name]))
        if files.get(name, content) == content:
            continue
        if name == "model-01.metrics.csv":
            assert [row["step"] for row in metrics(folder)] == ["2"]
        else:
            load_model(folder / name)
    assert not list(folder.glob("*.tmp"))
    assert failed or files.keys() >= {"model-01.pkl", "model-01.state.pkl", *KEPT.values()}


def check_extraction(folder, failed: bool) -> None:
    """The three files are the former ones, or new after a run that has not failed; that is all."""
    whole = three_files([f"{'a' * 60_000}\n", f"{CHINESE}\n"])
    assert read_three(folder) == (list(FORMER_TEXTS.values()) if failed else whole)
    assert read_folder(folder).keys() == {*NAMES, ".filler"}


TRAIN = ["training.py", *TINY, "-max_iters=2"]
each_script = pytest.mark.parametrize(
    ("command", "former", "check"),
    [
        ([*TRAIN, "-model=disk/model-01.pkl"], FORMER, check_training),
        (["data_extract.py", "-data_dir=in", "-output_dir=disk"], FORMER_TEXTS, check_extraction),
    ],
    ids=["training", "extracting"],
)


@linux_root
@each_script
def test_a_disk_that_is_full_sooner_or_later(disk, run_here, command, former, check):
    named = set()
    for free in [*range(0, 200, 4), 900]:
        fill(disk, former, free)
        result = run_here(*command)
        check(disk, failed=result.returncode != 0)
        if result.returncode:
            assert_fails(result, "disk/.*: No space left on device")
            named.add(Path(result.stderr.split(": ")[-2]).name)
    assert result.returncode == 0 and read_folder(disk).keys() >= former.keys()
    assert len(named) > 1 and named >= {name for name in former if name.endswith(".pkl")}


@linux_root
@each_script
def test_a_folder_that_can_only_be_read_is_a_sentence_at_the_start(
    disk, run_here, command, former, check
):
    fill(disk, former, free=900)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert_fails(run_here(*command), "disk/.*: Read-only file system")
    check(disk, failed=True)


def test_a_limit_on_file_sizes_is_named_and_leaves_the_former_model(tmp_path, run_here, request):
    resource = pytest.importorskip("resource", reason="Windows limits no sizes of files")
    put(tmp_path, FORMER)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    assert_fails(run_here(*TRAIN), "model-01.*: File too large")
    check_training(tmp_path, failed=True)


@pytest.mark.soak
def test_a_killed_extraction_leaves_former_or_whole_files(tmp_path, start_script, run_script):
    put(
        tmp_path,
        {f"in/{i}.xz": xz((b"%d is the text of this archive\n" % i) * 30_000) for i in range(12)},
    )
    assert run_script("data_extract.py", "-data_dir=in", "-output_dir=whole").returncode == 0
    new, outcomes, chance = read_three(tmp_path / "whole"), [], random.Random(1)
    for _ in range(40):  # from the first byte to the last rename
        out = put(tmp_path / "out", dict.fromkeys(NAMES, b"former"))
        run = start_script("data_extract.py", "-data_dir=in", "-output_dir=out")
        wait_for(lambda: list(out.glob("*.tmp")) or run.poll() is not None)  # noqa: B023
        time.sleep(chance.uniform(0, 1.5))
        run.kill()
        run.communicate()
        outcomes.append(read_three(out))
        assert all(file in (b"former", whole) for file, whole in zip(outcomes[-1], new))
    assert new in outcomes and [b"former"] * 3 in outcomes
    assert run_script("data_extract.py", "-data_dir=in", "-output_dir=out").returncode == 0
    assert sorted(os.listdir(out)) == sorted(NAMES) and read_three(out) == new


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [0.1, 0.3, 1, 1.6, 2.5, 5])
@pytest.mark.parametrize("name", FORMER)
def test_a_file_of_a_run_that_is_held_open_at_each_save(
    tmp_path, run_here, monkeypatch, name, seconds
):
    """Hold it by an open file on Windows, elsewhere by renames that fail so long."""
    save, rename, until = training.save, os.replace, [0.0]

    def refuse(source, target) -> None:
        if Path(target).name == name and time.monotonic() < until[0]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        rename(source, target)

    def hold_and_save(*args) -> None:
        until[0] = time.monotonic() + seconds
        if os.name == "nt" and (tmp_path / name).exists():
            threading.Timer(seconds, open(tmp_path / name, "rb").close).start()  # noqa: SIM115
        save(*args)

    if os.name != "nt":
        monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(training, "save", hold_and_save)
    result = run_here("training.py", *TINY, "-max_iters=12", "-eval_interval=4")
    lost = seconds > 3 and name != "model-01.metrics.csv"
    assert result.returncode == int(lost), result.stderr
    assert ("does another program have it open" in result.stderr) == (seconds > 3)
    if not lost:
        load_model(tmp_path / "model-01.pkl")
        state = read_model_file((tmp_path / "model-01.state.pkl").read_bytes())
        assert state["training"]["record"]["step"] == 12
