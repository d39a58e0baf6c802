"""data_extract.py gives clean text from archives of every nesting, or one line that says what is wrong."""

import errno
import gzip
import io
import lzma
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
from archives import (
    AB,
    BINARY,
    BOM,
    COMPRESSED,
    DAMAGED,
    FOREIGN,
    LIKE_TEXT,
    NAMES,
    NESTINGS,
    OUTER,
    OUTER_MEMBER,
    SHORT,
    TEXT,
    as_files,
    as_outer_tars,
    documents,
    flip,
    invalid_sequences,
    member,
    pax,
    plain,
    read_three,
    shards,
    tar,
    text_file,
    three_files,
    v7,
    xz,
)
from conftest import assert_fails, linux, notices, posix, processes_of, put, wait_for

import data_extract
from data_extract import Counts, Damaged, find_archives, read_clean, take_sample

SCRIPT = "data_extract.py"
TINYSHAKESPEARE = Path(__file__).resolve().parents[2] / "shared" / "corpora" / "tinyshakespeare"
CHARACTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))


def read_all(folder: Path) -> tuple[str, Counts]:
    """Return the clean text of all archives in a folder, one after the other, and its counts."""
    total, texts = Counts(), []
    for archive in find_archives(folder)[0]:
        found = Counts()
        texts.append(b"".join(read_clean(archive, found)))
        total.add(found)
    return b"".join(texts).decode(), total


def extract(folder: Path, **options) -> tuple:
    """Extract folder/in to folder/out; return what is in both texts and what was left out."""
    (folder / "out").mkdir(exist_ok=True)
    return data_extract.extract(find_archives(folder / "in")[0], folder / "out", **options)


@pytest.fixture
def earlier(tmp_path):
    """An output folder with the files of an earlier run; checks that a test leaves it as it was."""
    contents = {name: f"{name} of an earlier run".encode() for name in NAMES}
    folder = put(tmp_path / "out", contents)
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


@pytest.fixture
def limit_file_size():
    """A function after which, until the end of the test, no file may grow beyond some size, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def small_chunks(monkeypatch, request):
    """Clean fewer bytes at once, so that small texts are cut into chunks."""
    monkeypatch.setattr(data_extract, "CHUNK", request.param)


# Finding archives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "order"),
    [
        (["b/1.txt", "a/2.txt", "3.txt"], ["1", "2", "3"]),
        (["b/1.txt", "a/1.txt", "1.txt"], ["1.txt", "a/1.txt", "b/1.txt"]),
        (["z/1.xz", "a.tar/x/2.xz", "b.tar/y/0.xz"], ["0", "1", "2"]),
        (["b.tar/1.xz", "a.tar/1.xz", "0/1.xz"], ["0/", "a.tar/", "b.tar/"]),
        (["10.txt", "9.txt", "B.txt", "a.txt"], ["10", "9", "B", "a"]),
    ],
)
def test_archives_are_sorted_by_their_own_file_name_then_by_path(tmp_path, files, order):
    outer = {name.partition("/")[0]: {} for name in files if ".tar/" in name}
    for name in files:
        folder, _, rest = name.partition("/")
        content = name.encode() + b" "
        if folder in outer:
            outer[folder][rest] = xz(content)
        else:
            put(tmp_path, {name: xz(content) if name.endswith(".xz") else content})
    put(tmp_path, {name: tar(members) for name, members in outer.items()})
    names = read_all(tmp_path)[0].split()
    assert len(names) == len(order)
    assert all(part in name for part, name in zip(order, names)), names


@pytest.mark.parametrize(
    "files",
    [
        {".a.txt": b"no", "._b.xz": b"no", ".c.tar": b"no", ".d/e.txt": b"no", "f/.g/h/i.xz": b"no"},
        {"README.md": b"no", "vocab.json": b"no", "xz": b"no", "a.txt.bak": b"no", "b.tmp": b"no"},
        {"b.tar": tar({"._b.xz": b"no", "x/._c.txt": b"no", ".d/e.xz": b"no", "./.f": b"no"})},
        {"b.xz": xz(tar({"._a.txt": b"no", ".x/a.txt": b"no", "x/.y/a.txt": b"no", ".a.xz": b"no", ".b.tar": b"no"}))},
        {"b.xz": xz(tar({".x/" + "long/" * 30 + "a.txt": b"no"}, tarfile.GNU_FORMAT))},
        {"b.xz": xz(tar({".x/" + "long/" * 30 + "a.txt": b"no"}, tarfile.PAX_FORMAT))},
        {"b.xz": xz(tar({".x/" + "long/" * 20 + "a.txt": b"no"}, tarfile.USTAR_FORMAT))},
    ],
)
def test_dotfiles_and_other_files_are_skipped(tmp_path, files):
    text, found = read_all(put(tmp_path, {**files, "a.txt": b"yes"}))
    assert text == "yes\n"
    assert found.replaced == 0


def test_a_folder_in_an_outer_tar_from_before_there_was_a_standard_is_no_document(tmp_path):
    put(tmp_path, {"outer.tar": v7({"x/": b"", "x/1.xz": xz(b"a"), "x/2.xz": xz(b"b")})})
    assert [archive.name for archive in find_archives(tmp_path)[0]] == ["outer.tar/x/1.xz", "outer.tar/x/2.xz"]


def test_a_sample_is_the_same_for_every_nesting(run_main, tmp_path):
    corpus = shards(40)
    for nesting, pack in (("files", as_files), ("tars", as_outer_tars)):
        args = ["-data_dir", put(tmp_path / nesting, pack(corpus)), "-output_dir", "out", "-sample_rate", "0.25"]
        assert run_main(SCRIPT, *args, "-seed", "7").returncode == 0
        files = read_three(tmp_path / "out")
        taken = [name for name in sorted(corpus) if documents(corpus[name]).encode() in b"".join(files[:2])]
        assert len(taken) == 10
        assert files == three_files([documents(corpus[name]) for name in taken])
        assert taken == [Path(archive.name).stem for archive in take_sample(find_archives(args[1])[0], 0.25, 7)]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 20_610])
def test_a_higher_rate_contains_what_a_lower_one_takes(count):
    archives = [data_extract.Archive(f"{i:05d}.xz", Path(f"{i:05d}.xz"), 0, 1) for i in range(count)]
    previous = set()
    for rate in (1e-9, 0.001, 0.01, 0.1, 0.5, 0.99, 1):
        sample = take_sample(archives, rate, seed=1337)
        assert sample == sorted(sample) and previous <= set(sample)
        assert abs(len(sample) - rate * count) <= 1
        previous = set(sample)
    assert sample == archives
    assert count < 100 or take_sample(archives, 0.1, seed=1) != take_sample(archives, 0.1, seed=2)


@posix
def test_a_pipe_among_the_archives_does_not_hang(run_script, tmp_path):
    put(tmp_path / "in", {"a.txt": b"first ", "b.txt": b"second"})
    os.mkfifo(tmp_path / "in/pipe.txt")
    assert run_script(SCRIPT, "-data_dir", "in", timeout=8).returncode in (0, 1)


# What is passed over, and said ---------------------------------------------------------------------------------------

YES = {"a.txt": b"yes\n", "b.txt": b"yes\n"}


def passed_over(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in notices(result.stderr) if line.startswith("passed over")]


@pytest.mark.parametrize("folder", ["", "down/", "down/here/"])
def test_outputs_and_requirements_are_never_corpus_and_one_notice_names_them(run_main, tmp_path, folder):
    names = [*NAMES, "train_split.txt", "VAL_split.TXT", "requirements.txt"]
    put(tmp_path / "in", {**YES, **{f"{folder}{name}": b"no" for name in names}})
    result = run_main(SCRIPT, "-data_dir", "in")
    assert read_three(tmp_path) == three_files(["yes\n", "yes\n"])
    (line,) = passed_over(result)
    assert f"{folder}VAL_split.TXT" in line and "and 3 more" in line


def test_outputs_in_a_tar_are_not_corpus_either_and_do_not_change_the_order_of_archives(run_main, tmp_path):
    members = {"vocab.txt": b"no", "x/train_split.txt": b"no", "._1.xz": b"no"}
    outer = tar({**members, "1.xz": xz(tar({**members, "a": b"yes"})), "2.xz": xz(b"yes\n")})
    put(tmp_path / "in", {"a.tar": outer})
    with pytest.raises(Damaged, match="another archive"):
        read_all(put(tmp_path / "nested", {"a.xz": xz(tar({"1.xz": SHORT}))}))
    result = run_main(SCRIPT, "-data_dir", "in")
    assert read_three(tmp_path) == three_files(["yes\n\n", "yes\n"])
    assert any("a.tar/vocab.txt, a.tar/x/train_split.txt" in line for line in passed_over(result))
    assert "members of tars left out (an output of these scripts, or requirements.txt): 2, such as" in result.stdout
    assert "members of tars left out (hidden): 1, such as ._1.xz" in result.stdout


def test_hidden_folders_virtual_environments_and_other_kinds_are_named_in_one_line_each(run_main, tmp_path):
    others = {".git/x.txt": b"no", ".cache.txt": b"no", "my env/pyvenv.cfg": b"", "my env/lib/licence.txt": b"no"}
    others |= {f"{i}.jsonl": b"no" for i in range(1200)}
    put(tmp_path / "in", YES | others)
    result = run_main(SCRIPT, "-data_dir", "in")
    assert read_three(tmp_path) == three_files(["yes\n", "yes\n"])
    lines = passed_over(result)
    assert len(lines) == 3 and all(len(line) < 200 for line in lines)
    assert "passed over (hidden): .git, .cache.txt" in lines
    assert "passed over (a virtual environment): my env" in lines
    assert re.search(r"\.jsonl.* and 1,197 more", lines[2]) and 'README, "Other kinds of data"' in lines[2]


@pytest.mark.parametrize("name", [".mirror/a.txt", "env/pyvenv.cfg", "a.parquet", "vocab.txt"])
def test_a_folder_in_which_everything_is_passed_over_is_reported_with_why(run_main, tmp_path, name):
    put(tmp_path / "in", {name: b"text"})
    result = run_main(SCRIPT, "-data_dir", "in")
    assert_fails(result, rf"in: holds no .tar, .xz or .txt file; .*; passed over \(.+\): {name.partition('/')[0]}$")


@posix
def test_links_to_folders_and_files_are_followed_but_nothing_is_read_twice(run_main, tmp_path):
    put(tmp_path, {"elsewhere/b.txt": b"second\n", "in/a.txt": b"first\n", "in/sub/c.txt": b"third\n"})
    links = {"in/one": "../elsewhere", "in/two": "../elsewhere", "in/same.txt": "a.txt"}
    links |= {"in/sub/round": "../../in", "in/sub/self": "."}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    result = run_main(SCRIPT, "-data_dir", "in")
    assert read_three(tmp_path) == three_files(["first\n", "second\n", "third\n"])
    (line,) = passed_over(result)
    assert "a link to what is read anyway" in line


@pytest.mark.parametrize("count", [1, 2, 10, 11])
def test_the_summary_says_which_of_a_few_files_are_for_training_and_which_for_validation(run_main, tmp_path, count):
    put(tmp_path / "in", {f"{i:02d}.txt": b"text\n" for i in range(count)})
    lines = run_main(SCRIPT, "-data_dir", "in").stdout.splitlines()
    names = [f"{i:02d}.txt" for i in range(count)]
    first_val = int(0.9 * count)
    expected = [
        f"training text is from {', '.join(names[:first_val])}",
        f"validation text is from {', '.join(names[first_val:])}",
    ]
    assert [line for line in lines if "text is from" in line] == (expected if count in (2, 10) else [])


# Reading one archive -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.txt": TEXT}, plain(TEXT)),
        ({"a.txt": b"one", "b.txt": b"two\r\n", "c.txt": b"three\n\n", "d.txt": b"four"}, "one\ntwo\nthree\n\nfour\n"),
        ({"a.xz": xz(b"one text cut in"), "b.xz": xz(b" two")}, "one text cut in two"),
        ({"a.xz": xz(TEXT)}, plain(TEXT)),
        ({"A.TXT": b"A", "B.XZ": xz(b"B"), "C.TAR": tar({"D.XZ": xz(b"D"), "E.TXT": b"E"})}, "A\nBE\n\nD"),
        ({"a.xz": xz(b"short")}, "short"),
        ({"a.txt": b"one", "b.txt": b"", "c.xz": xz(b""), "d.txt": b"two\n\n\n"}, "one\ntwo\n\n\n"),
        ({"a.xz": xz(tar({"a.txt": TEXT}))}, documents([TEXT])),
        ({"a.tar.xz": xz(tar({"a.txt": TEXT}))}, documents([TEXT])),
        ({"a.tar.xz": xz(TEXT)}, plain(TEXT)),
        ({"a.txt": tar({"a.txt": TEXT})}, documents([TEXT])),
        ({"a.tar": tar({"a.txt": TEXT, "b": b"two"})}, documents([TEXT, b"two"])),
        ({"a.tar": tar({"a/b.xz": xz(TEXT), "c.xz": xz(tar({"d": b"x"}))})}, plain(TEXT) + "x\n\n"),
        ({"a.tar": tar({"b.xz": xz(b"packed"), "c.txt": b"text"})}, "text\n\npacked"),
        ({"a.tar": tar({}), "b.xz": xz(b"b"), "c.xz": xz(tar({}))}, "b"),
        ({"a.xz": xz(TEXT) + xz(b"") + xz(b"more") + xz(tar({})[:512])}, plain(TEXT) + "more" + "\0" * 512),
        ({"a.xz": xz(TEXT) + bytes(4) + xz(b"more") + bytes(1 << 17)}, plain(TEXT) + "more"),
        ({"a.xz": xz(tar({"a": TEXT})[:700]) + bytes(8) + xz(tar({"a": TEXT})[700:])}, documents([TEXT])),
        ({"a.xz": xz(tar({"a": b"a"}) + bytes(1 << 20))}, "a\n\n"),
    ],
)  # fmt: skip
def test_archives_are_read_by_what_they_hold(tmp_path, files, expected):
    assert read_all(put(tmp_path, files))[0] == expected


@pytest.mark.parametrize("pack", [lambda data: {"a.tar": data}, lambda data: {"a.xz": xz(data)}], ids=["tar", "xz"])
@pytest.mark.parametrize(
    "others",
    [
        [(member("link", tarfile.SYMTYPE, linkname="/etc/passwd"), b"")],
        [(member("link", tarfile.LNKTYPE, linkname="../../etc/passwd"), b"")],
        [(member("link", tarfile.SYMTYPE, linkname="long/" * 50), b"")],
        [(member("disk", tarfile.BLKTYPE), b""), (member("tty", tarfile.CHRTYPE), b"")],
        [(member("pipe.xz", tarfile.FIFOTYPE), b""), (member("folder.xz", tarfile.DIRTYPE), b"")],
        [(member("folder", tarfile.DIRTYPE, size=5000), b"")],
        [(member("link", tarfile.SYMTYPE, size=5000, linkname="x"), b"")],
        [(member("disk", tarfile.BLKTYPE, size=5000), b"")],
        [(member("unknown", b"Z", size=700), b"z" * 700)],
        [(member("comment", tarfile.XGLTYPE, size=700), b"z" * 700)],
    ],
)
def test_links_devices_and_unknown_members_of_a_tar_are_skipped(tmp_path, pack, others):
    data = tar([("a", b"first"), *others, ("b", b"second")])
    assert read_all(put(tmp_path, pack(data)))[0] == "first\n\nsecond\n\n"


MEMBERS = {"a.txt": TEXT, "long/" * 18 + "b.txt": b"b" * 512, "c.txt": b"", "d.txt": b"d" * 513, "e.txt": b"e" * 1024}


@pytest.mark.parametrize("pack", [lambda data: {"a.tar": data}, lambda data: {"a.xz": xz(data)}], ids=["tar", "xz"])
@pytest.mark.parametrize(
    ("data", "names"),
    [
        (v7(MEMBERS), MEMBERS),
        (tar(MEMBERS, tarfile.USTAR_FORMAT), MEMBERS),
        (tar(MEMBERS, tarfile.GNU_FORMAT), MEMBERS),
        (tar(MEMBERS, tarfile.PAX_FORMAT), MEMBERS),
        (tar({"long/" * 100 + "a": TEXT, "b": b"b"}, tarfile.GNU_FORMAT), {"a": TEXT, "b": b"b"}),
        (tar({"long/" * 100 + "a": TEXT, "Привет": b"b"}, tarfile.PAX_FORMAT), {"a": TEXT, "b": b"b"}),
        (pax(b"12 size=700\n", (member("a"), b""))[:1536] + b"a" * 700 + bytes(324 + 1024), {"a": b"a" * 700}),
        (tar([(member("a", tarfile.CONTTYPE, 1), b"a"), (member("b", tarfile.AREGTYPE, 1), b"b")]), AB),
        (tar([("a\udcff.txt", b"a")]), {"a": b"a"}),
    ],
    ids=["v7", "ustar", "gnu", "pax", "gnu long names", "pax long names", "pax size", "old kinds", "foreign name"],
)  # fmt: skip
def test_every_kind_of_tar_gives_its_documents(tmp_path, pack, data, names):
    assert read_all(put(tmp_path, pack(data)))[0] == documents(list(names.values()))


@pytest.mark.parametrize("content", [tar({"a": b"a" * 700, "b": b"b"}), b"text"], ids=["tar", "text"])
def test_no_byte_of_an_xz_file_can_be_lost_or_changed_unnoticed(tmp_path, content):
    packed = lzma.compress(content)
    damaged = [packed[:end] for end in range(len(packed))] + [flip(packed, at) for at in range(len(packed))]
    for data in damaged:
        (archive,) = find_archives(put(tmp_path, {"a.xz": data}))[0]
        with pytest.raises(Damaged):
            list(read_clean(archive, Counts()))


@pytest.mark.parametrize(
    "data",
    [
        *(OUTER[:end] for end in (100, 512, 600, OUTER_MEMBER + 100, 2 * OUTER_MEMBER - 1, 2 * OUTER_MEMBER + 512)),
        OUTER[: 2 * OUTER_MEMBER],
        *(flip(OUTER, OUTER_MEMBER + at) for at in (0, 130, 150, 258)),
        *(flip(OUTER, 2 * OUTER_MEMBER + at) for at in (0, 130, 150, 258)),
        OUTER[:OUTER_MEMBER] + b"not a header" * 100 + OUTER[OUTER_MEMBER:],
    ],
    ids=[
        "cut in the first header",
        "cut after the first header",
        "cut in the first member",
        "cut in the second header",
        "cut in the second member",
        "cut after the third header",
        "cut between members",
        *(f"flipped {field} of the second member" for field in ("name", "size", "sum", "magic")),
        *(f"flipped {field} of the third member" for field in ("name", "size", "sum", "magic")),
        "garbage between members",
    ],
)
def test_damage_to_an_outer_tar_is_noticed(tmp_path, data):
    put(tmp_path, {"outer.tar": data})
    with pytest.raises(Damaged):
        read_all(tmp_path)


def test_random_damage_is_reported_or_gives_no_more_text_than_there_was(tmp_path):
    generator = random.Random(0)
    sound = tar({"a.txt": TEXT, "long/" * 30 + "b": b"b" * 700, "c.txt": b"c"}, tarfile.PAX_FORMAT)
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(len(sound))] = generator.randrange(256)
        damaged = bytes(data[: generator.choice([len(sound), generator.randrange(len(sound))])])
        try:
            text, _ = read_all(put(tmp_path, {"a.tar": damaged, "b.xz": xz(damaged)}))
        except Damaged:
            continue
        assert len(text) < 2 * len(sound)


@posix
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root can read everything")
@pytest.mark.parametrize("name", ["a.txt", "b.xz", "c.tar", "folder"])
def test_an_unreadable_file_is_reported_in_one_line(run_main, earlier, tmp_path, name):
    put(tmp_path / "in", {"a.txt": TEXT, "b.xz": SHORT, "c.tar": OUTER, "folder/d.txt": TEXT})
    (tmp_path / "in" / name).chmod(0)
    try:
        assert_fails(run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out"), f"{name}: ")
    finally:
        (tmp_path / "in" / name).chmod(0o700)


def test_an_archive_that_cannot_be_read_to_its_end_is_named(run_main, earlier, tmp_path, monkeypatch):
    def fail(self, buffer):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    put(tmp_path / "in", {"a.txt": TEXT})
    monkeypatch.setattr(data_extract.Window, "readinto", fail)
    assert_fails(run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out"), f"a.txt: {os.strerror(errno.EIO)}")


# Other data than text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*COMPRESSED, *BINARY])
@pytest.mark.parametrize("name", ["a.txt", "a.xz"])
def test_other_data_under_the_name_of_a_text_is_refused(run_main, earlier, tmp_path, kind, name):
    data, remedy = (COMPRESSED | BINARY)[kind]
    put(tmp_path / "in", {name: data if name == "a.txt" else xz(data), "b.txt": b"text\n", "c.txt": b"text\n"})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert_fails(result, f"{name}: it holds {kind}.* data, not UTF-8 text; .*{remedy}.*, or .* -skip_corrupt")
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "new", "-skip_corrupt")
    assert read_three(tmp_path / "new") == [b"text\n", b"text\n", b"\n\ne\nt\nx\n"]


@pytest.mark.parametrize("pack", [lambda data: {"a.tar": data}, lambda data: {"a.xz": xz(data)}], ids=["tar", "xz"])
def test_members_of_a_tar_that_are_no_text_are_left_out_and_counted(run_main, tmp_path, pack):
    members = {f"{kind}.data": data for kind, (data, _) in (COMPRESSED | BINARY).items()}
    members |= {"first.txt": b"first", "last.txt": b"last", "b.gz": gzip.compress(b"text"), "tar.data": tar(AB)}
    members |= {"gbk.txt": "你好，世界。".encode("gbk") * 99, "large.gz": gzip.compress(b"") + bytes(9_000_000)}
    put(tmp_path / "in", pack(tar({name: members[name] for name in sorted(members)})))
    result = run_main(SCRIPT, "-data_dir", "in")
    assert result.returncode == 0, result.stderr
    assert b"".join(read_three(tmp_path)[:2]) == b"first\n\nlast\n\n"
    assert "members of tars left out (gzip data): 3, such as b.gz" in result.stdout
    assert re.search(r"left out \(.*GBK.*\): 1, such as gbk.txt", result.stdout)
    for kind in [*COMPRESSED, *BINARY, "tar"]:
        assert re.search(rf"members of tars left out \({kind}.* data\): \d", result.stdout), kind


def test_a_tar_that_holds_no_text_at_all_is_reported_with_what_it_holds(run_main, tmp_path):
    put(tmp_path / "in", {"a.tar": tar({"a.gz": gzip.compress(b"text")})})
    result = run_main(SCRIPT, "-data_dir", "in")
    assert_fails(result, r"too little text: .*; members of tars left out \(gzip data\): 1, such as a.gz")


@pytest.mark.parametrize("data", LIKE_TEXT)
def test_text_that_begins_like_other_data_is_text(tmp_path, data):
    put(tmp_path, {"a.txt": data, "b.xz": xz(data), "c.tar": tar({"a.txt": data})})
    assert read_all(tmp_path)[0] == 2 * plain(data) + documents([data])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("small_chunks", [7, 1023, 1 << 20], indirect=True)
def test_utf_16_with_a_byte_order_mark_is_decoded(tmp_path, small_chunks, encoding):
    text = f"{FOREIGN}\r\n" * 40 + "last"
    data = f"\ufeff{text}".encode(encoding)
    put(tmp_path, {"a.txt": data, "b.xz": xz(data), "c.xz": xz(tar({"a": data, "b": data[:100], "c": b"c"}))})
    utf_8 = text.encode()
    result, counts = read_all(tmp_path)
    parts = [utf_8, data[:100].decode("utf-16").encode(), b"c"]
    assert result == text_file(utf_8) + plain(utf_8) + documents(parts)
    assert counts.replaced == 0


@pytest.mark.parametrize(("data", "replaced"), [(b"\xff\xfea\0b", 1), (b"\xfe\xff\0a\xd8\0\0b", 3)])
def test_what_is_damaged_in_utf_16_is_counted(tmp_path, data, replaced):
    put(tmp_path, {"a.xz": xz(data), "b.tar": tar({"a": data})})
    assert read_all(tmp_path)[1].replaced == 2 * replaced


CHINESE = "我们在这里说的是一个人的故事，他不是有名的人，了解他的人不多。\n"
TEXTS_BY_ENCODING = {
    "GBK": CHINESE,
    "BIG5": "我們在這裡說的是一個人的故事，他不是有名的人，了解他的人不多。\n",
    "EUC-KR": "이 이야기는 한 사람의 이야기이다. 그는 유명하지 않고, 그를 아는 사람은 많지 않다.\n",
    "SHIFT_JIS": "これはある人の物語です。その人を知っている人は、あまりいませんでした。\n",
    "EUC-JP": "これはある人の物語です。その人を知っている人は、あまりいませんでした。\n",
    "WINDOWS-1251": "Это рассказ об одном человеке, которого мало кто знает.\n",
    "KOI8-R": "Это рассказ об одном человеке, которого мало кто знает.\n",
    "UTF-16LE": "A text without a byte-order mark.\n",
    "UTF-16BE": "A text without a byte-order mark.\n",
}


@pytest.mark.parametrize("encoding", TEXTS_BY_ENCODING)
@pytest.mark.parametrize("name", ["a.txt", "a.xz"])
def test_a_text_in_another_encoding_is_named_with_what_to_do(run_main, earlier, tmp_path, encoding, name):
    data = TEXTS_BY_ENCODING[encoding].encode(encoding) * 200
    put(tmp_path / "in", {name: data if name == "a.txt" else xz(data), "b.txt": b"text\n"})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert_fails(result, f"{name}: it holds text in another encoding .*; convert it with iconv -f {encoding} -t UTF-8,")


def test_an_encoding_that_cannot_be_guessed_is_still_named_as_the_reason(run_main, earlier, tmp_path):
    put(
        tmp_path / "in",
        {"a.txt": "Ένα κείμενο, όχι πολύ μεγάλο. Στην αρχή ήταν ο λόγος.\n".encode("cp1253") * 200, "b.txt": b"text\n"},
    )
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert_fails(result, "a.txt: it holds text in an unknown encoding, not UTF-8 text; convert it with iconv")


def test_the_summary_names_archives_with_many_invalid_sequences_and_a_likely_reason(run_main, tmp_path):
    french = "C’était déjà l’été, et très tôt le matin nous étions prêts à partir.\n" * 99
    few = b"text\n" * 999 + b"\xff"
    broken = (b"a text that lost some bytes \x81\x8d\n") * 99
    files = {"1.txt": french.encode("cp1252"), "2.txt": few, "3.txt": broken, "4.txt": b"text\n"}
    result = run_main(SCRIPT, "-data_dir", put(tmp_path / "in", files))
    assert result.returncode == 0, result.stderr
    named = re.findall(
        r"^(\S+): (\d+\.\d)% of its characters replaced, as not UTF-8 \((.*)\)$", result.stdout, re.MULTILINE
    )
    share = 100 * sum(character > "\x7f" for character in french) / len(french)
    assert [name for name, _, _ in named] == ["1.txt", "3.txt"]
    assert float(named[0][1]) == pytest.approx(share, abs=0.1)
    assert "WINDOWS-1252" in named[0][2] and "damaged" in named[1][2]


def test_the_summary_names_only_some_of_many_archives_with_invalid_sequences(run_main, tmp_path):
    put(tmp_path / "in", {f"{i:02d}.txt": b"an odd byte: \xff\n" * 9 for i in range(30)})
    result = run_main(SCRIPT, "-data_dir", "in")
    assert result.stdout.count("% of its characters replaced") == 10
    assert "in 20 more archives" in result.stdout


# Tars in a row, sparse members, limits -------------------------------------------------------------------------------

ONE, TWO = tar({"1": b"one"}), tar({"2": b"two"}, tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    "files",
    [
        {"a.tar": ONE + TWO},
        {"a.txt": ONE + TWO},
        {"a.tar.xz": xz(ONE + TWO)},
        {"a.xz": xz(ONE) + xz(TWO)},
        {"a.xz": xz(ONE) + bytes(4) + xz(bytes(512 * 99)) + xz(TWO)},
        {"a.tar": ONE[:1024] + bytes(512) + TWO},
        {"a.tar": tar({}) + ONE + v7({"2": b"two"}) + bytes(3000)},
        {"a.tar.xz": xz(tar({}) + ONE + v7({"2": b"two"}) + bytes(3000))},
    ],
)
def test_tars_in_a_row_are_all_read(tmp_path, files):
    assert read_all(put(tmp_path, files))[0] == "one\n\ntwo\n\n"


def test_archives_in_outer_tars_in_a_row_are_all_found(tmp_path):
    put(tmp_path, {"a.tar": tar({"1.xz": xz(b"one")}) + tar({"2.xz": xz(b"two")})})
    assert [archive.name for archive in find_archives(tmp_path)[0]] == ["a.tar/1.xz", "a.tar/2.xz"]


@pytest.mark.parametrize("name", ["a.tar", "a.txt", "a.xz"])
@pytest.mark.parametrize(
    "data",
    [ONE + b"text" * 500, ONE + TWO[:800], ONE + bytes(512) + flip(TWO, 3)],
    ids=["text after it", "cut in the second", "flipped in the second"],
)
def test_what_follows_a_tar_and_is_none_is_damage(tmp_path, name, data):
    put(tmp_path, {name: xz(data) if name == "a.xz" else data})
    with pytest.raises(Damaged):
        read_all(tmp_path)


@pytest.mark.parametrize("name", ["a.tar", "a.txt"])
@pytest.mark.parametrize("cut", [400, 512, 1024, 1100, 1536, 2048, 2560])
def test_a_cut_tar_is_damaged_under_any_name(tmp_path, name, cut):
    put(tmp_path, {name: tar({"a": b"a" * 700, "b": b"b"})[:cut]})
    with pytest.raises(Damaged):
        read_all(tmp_path)


@pytest.mark.parametrize("place", [0, 130, 150, 1024, 1536 + 130])
def test_a_tar_with_a_damaged_header_is_damaged_also_under_the_name_of_a_text(tmp_path, place):
    put(tmp_path, {"a.txt": flip(tar({"a": b"a" * 700, "b": b"b"}), place if place != 1024 else 1536)})
    with pytest.raises(Damaged):
        read_all(tmp_path)


@pytest.mark.parametrize("pack", [lambda data: {"a.tar": data}, lambda data: {"a.xz": xz(data)}], ids=["tar", "xz"])
@pytest.mark.parametrize(
    "data",
    [
        tar([("a", b"a"), (member("hole.txt", tarfile.GNUTYPE_SPARSE, 512), b"x" * 512)]),
        pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", ("hole.txt", b"1\n0\n4\n" + bytes(506) + b"text")),
        pax(b"26 GNU.sparse.map=0,4,9,1\n", ("hole.txt", b"text!")),
    ],
    ids=["gnu", "pax 1.0", "pax 0.1"],
)
def test_sparse_members_of_a_tar_are_refused_by_name(tmp_path, pack, data):
    put(tmp_path, pack(data))
    with pytest.raises(Damaged, match=r"sparse file, 'hole.txt'; unpack it with tar -xf"):
        read_all(tmp_path)


def test_an_xz_file_that_needs_much_memory_is_not_called_damaged(run_main, earlier, tmp_path):
    fast = {"id": lzma.FILTER_LZMA2, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "dict_size": 256 << 20}
    put(tmp_path / "in", {"a.xz": lzma.compress(b"text", filters=[fast])})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert_fails(result, "a.xz: it needs more than 128 MB to unpack; unpack it with xz -d, or")


# Cleaning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text", "document", "replaced"),
    [
        (b"a\r\nb\rc\nd", "a\nb\nc\nd", "a\nb\nc\nd\n\n", 0),
        (b"a\r\r\n\n\rb", "a\n\n\n\nb", "a\n\n\n\nb\n\n", 0),
        (b"a\n\r\n\r\r\n", "a\n\n\n\n", "a\n\n", 0),
        (b"\n\n a \n\n", "\n\n a \n\n", "\n\n a \n\n", 0),
        (BOM + b"a", "a", "a\n\n", 0),
        (BOM + BOM + b"a" + BOM, "\ufeffa\ufeff", "\ufeffa\ufeff\n\n", 0),
        (BOM, "", "", 0),
        (b"", "", "", 0),
        (b"\r\n\r\n", "\n\n", "", 0),
        (b" ", " ", " \n\n", 0),
        (b"\0a\x0b\x1c\x85", "\0a\x0b\x1c\ufffd", "\0a\x0b\x1c\ufffd\n\n", 1),
        ("\u2028\x85".encode(), "\u2028\x85", "\u2028\x85\n\n", 0),
        ("é\ufffd".encode() + b"\xe2\x82", "é\ufffd\ufffd", "é\ufffd\ufffd\n\n", 1),
        (b"\xe2\x82\n\xf0\x9f\x99", "\ufffd\n\ufffd", "\ufffd\n\ufffd\n\n", 2),
        (b"\xed\xa0\x80\xc0\x80", "\ufffd" * 5, "\ufffd" * 5 + "\n\n", 5),
    ],
)
def test_text_comes_out_as_valid_utf_8_with_plain_line_ends(tmp_path, data, text, document, replaced):
    for files, expected in (
        ({"a.txt": data}, text_file(data)),
        ({"a.xz": xz(data)}, text),
        ({"a.tar": tar({"a": data})}, document),
        ({"a.xz": xz(tar({"a": data, "b": b"next"}))}, document + "next\n\n"),
    ):
        name = next(iter(files))
        (tmp_path / name).unlink(missing_ok=True)
        found = Counts()
        (archive,) = (a for a in find_archives(put(tmp_path, files))[0] if a.name == name)
        assert b"".join(read_clean(archive, found)).decode() == expected
        assert (found.replaced, found.characters, found.size) == (replaced, len(expected), len(expected.encode()))
        assert set(found.characters_seen) == set(expected)


MOSTLY_TEXT = "🙂".encode() * 601  # before what is not: of so much, a fifth may be strange
LONG = {
    "lines": f"{FOREIGN}\n".encode() * 25,
    "dos lines": f"{FOREIGN}\r\n".encode() * 25,
    "mac lines": f"{FOREIGN}\r".encode() * 25,
    "mixed line ends": f"{FOREIGN}\r{FOREIGN}\r\n{FOREIGN}\n".encode() * 10,
    "one endless line": FOREIGN.encode() * 25,
    "one line, then none": FOREIGN.encode() + b"\n" + "🙂".encode() * 600,
    "emoji": "🙂".encode() * 601,
    "an odd byte, then emoji": b"a" + "🙂".encode() * 601,
    "two bytes each": "ж".encode() * 2001,
    "three bytes each": b"ab" + "你".encode() * 2001,
    "with a byte-order mark": BOM + FOREIGN.encode() * 25,
    "stray continuation bytes": MOSTLY_TEXT + b"\x80" * 121,
    "stray lead bytes": MOSTLY_TEXT + b"\xf0" * 121,
    "characters cut short": MOSTLY_TEXT + b"\xf0\x9f\x99" * 121,
    "cut short at the end": "🙂".encode() * 601 + b"\xf0\x9f",
    "trailing newlines": FOREIGN.encode() * 25 + b"\r\n" * 1001,
    "carriage returns": b"a" + b"a\r" * 2001 + b"\n",
    "a carriage return at the end": b"a\n" + b"b" * 300 + b"\r",
    "nothing but newlines": b"\n" * 2001,
}


@pytest.mark.parametrize("small_chunks", [7, 512, 1023, 1024], indirect=True)
@pytest.mark.parametrize("name", LONG)
def test_large_text_is_never_cut_inside_a_character_or_line_end(tmp_path, small_chunks, name):
    data = LONG[name]
    put(tmp_path, {"a.txt": data, "b.xz": xz(data), "c.xz": xz(tar({"1": data, "2": b"x", "3": data}))})
    expected = text_file(data) + plain(data) + documents([data, b"x", data])
    text, found = read_all(tmp_path)
    assert text == expected
    assert found.replaced == 4 * invalid_sequences(data)
    assert found.documents == 2 + sum(bool(plain(content).strip("\n")) for content in (data, b"x", data))


def test_large_text_comes_out_whole_from_worker_processes(run_script, tmp_path):
    line = FOREIGN.encode() * 60_000
    put(tmp_path / "in", {"a.xz": xz(tar({"1": line, "2": line + b"\r\n\r\n", "3": b"x"})), "b.txt": b"y" + line})
    assert len(line) > 1.5 * data_extract.CHUNK
    assert run_script(SCRIPT, "-data_dir", "in").returncode == 0
    assert read_three(tmp_path) == three_files([documents([line, line, b"x"]), text_file(b"y" + line)])


@pytest.mark.parametrize("seed", range(8))
def test_random_corpora_match_a_plain_implementation(tmp_path, monkeypatch, seed):
    generator = random.Random(seed)
    parts = [*FOREIGN, "word ", "\ufffd", b"\xff", b"\xe2\x82", b"\x80", b"\xf0\x9f"]
    ends = ["\n", "\r\n", "\r", "\n\n", "", "", ""]

    def content() -> bytes:
        pairs = ((generator.choice(parts), generator.choice(ends)) for _ in range(generator.choice([0, 1, 9, 300])))
        data = b"".join(part.encode() if isinstance(part, str) else part for pair in pairs for part in pair)
        return generator.choice([b"", b"", BOM]) + data + generator.choice([b"", b"\n", b"\r\n\r\n"])

    def pack(contents: list[bytes]) -> bytes:
        members = {f"{i}.txt": data for i, data in enumerate(contents)}
        format = generator.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, None])
        return v7(members) if format is None else tar(members, format)

    for round in range(25):
        monkeypatch.setattr(data_extract, "CHUNK", generator.choice([7, 64, 512, 1024, 1 << 20]))
        contents = [content() for _ in range(generator.randrange(1, 5))]
        if generator.random() < 0.5:
            used, data = contents, pack(contents)
            texts = [documents(contents)] * 2
        else:
            used, data = contents[:1], contents[0]
            texts = [plain(data), text_file(data)]
        result, found = read_all(put(tmp_path / str(round), {"a.xz": xz(data), "b.txt": data}))
        assert result == "".join(texts)
        assert found.replaced == 2 * sum(map(invalid_sequences, used))
        assert set(found.characters_seen) == set(result)


# The whole corpus ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_of_a_corpus_gives_the_same_three_files(run_main, tmp_path, nesting):
    corpus = shards(11)
    put(tmp_path / ".cache/in", NESTINGS[nesting](corpus))  # a folder that is named may be hidden
    result = run_main(SCRIPT, "-data_dir", ".cache/in", "-output_dir", "out")
    assert result.returncode == 0, result.stderr
    assert read_three(tmp_path / "out") == three_files([documents(corpus[name]) for name in sorted(corpus)])


@pytest.mark.skipif(not TINYSHAKESPEARE.is_dir(), reason="the corpora are not beside this folder")
@pytest.mark.parametrize("as_one_text", [False, True])
def test_tinyshakespeare_comes_out_as_published(run_main, tmp_path, as_one_text):
    texts = [lzma.decompress(path.read_bytes()) for path in sorted(TINYSHAKESPEARE.iterdir())]
    put(tmp_path / "in", {"input.txt": b"".join(texts)})
    folder = tmp_path / "in" if as_one_text else TINYSHAKESPEARE
    assert run_main(SCRIPT, "-data_dir", folder).returncode == 0
    train, val, vocab = read_three(tmp_path)
    assert (train, val) == (b"".join(texts[:9]), texts[9])
    assert (len(train.decode()), len(val.decode()), len(set(vocab.decode()))) == (1_003_854, 111_540, 65)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_does_not_change_the_result(tmp_path, workers):
    corpus = shards(7)
    corpus["urlsf_subset00-2_data"] *= 2500  # the later ones are ready before it
    put(tmp_path / "in", as_outer_tars({name: [b"\n".join(texts)] for name, texts in corpus.items()}))
    extract(tmp_path, workers=workers)
    expected = three_files([documents([b"\n".join(corpus[name])]) for name in sorted(corpus)])
    assert read_three(tmp_path / "out") == expected


def test_idle_workers_are_not_waited_for(tmp_path, monkeypatch):
    start = multiprocessing.context.SpawnProcess.start

    def start_slowly(process):
        start(process)
        time.sleep(1)  # so that the first worker is done before all are started

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start_slowly)
    put(tmp_path / "in", {f"{i}.txt": b"text" for i in range(8)})
    began = time.monotonic()
    extract(tmp_path, workers=8)
    assert time.monotonic() - began < 30  # each would cost 10


@pytest.mark.parametrize(("count", "training"), [(2, 1), (3, 2), (10, 9), (19, 17)])
def test_the_first_nine_tenths_of_the_archives_are_training_text(extract_here, tmp_path, count, training):
    put(tmp_path / "in", {f"{i:02d}.txt": b"%02d" % i for i in range(count)})
    train, val, _ = extract(tmp_path)
    assert (train.documents, val.documents) == (training, count - training)
    assert read_three(tmp_path / "out") == three_files([f"{i:02d}\n" for i in range(count)])


@pytest.mark.parametrize("suffix", [".txt", ".xz", ".tar"])
@pytest.mark.parametrize("length", [2, 9, 10, 999, 100_003])
@pytest.mark.parametrize("small_chunks", [1024], indirect=True)
def test_a_single_archive_is_cut_at_nine_tenths_of_its_characters(extract_here, small_chunks, tmp_path, suffix, length):
    text = "a" + "".join(random.Random(length).choices(FOREIGN + "\nab", k=length - 2)) + "."
    data = text.encode()
    texts = {".txt": text_file(data), ".xz": text, ".tar": documents([data])}
    put(tmp_path / "in", {f"a{suffix}": {".txt": data, ".xz": xz(data), ".tar": tar({"a.txt": data})}[suffix]})
    extract(tmp_path)
    assert read_three(tmp_path / "out") == three_files([texts[suffix]])


def test_a_second_run_that_reads_the_folder_it_writes_to_gives_the_same_files(run_main, tmp_path):
    put(tmp_path, {"a.txt": b"first ", "b.txt": b"second"})
    for _ in range(2):
        assert run_main(SCRIPT, "-data_dir", ".").returncode == 0
        assert read_three(tmp_path) == three_files(["first \n", "second\n"])


def test_leftovers_of_a_killed_run_do_not_matter(run_main, tmp_path):
    put(tmp_path, {f"out/{name}.tmp": b"litter" * 100 for name in (*NAMES, "output_parts.tmp/0")})
    put(tmp_path / "in", {"a.txt": b"first ", "b.txt": b"second"})
    assert run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out").returncode == 0
    assert read_three(tmp_path / "out") == three_files(["first \n", "second\n"])
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_skip_corrupt_leaves_damaged_archives_out_and_lists_them(run_main, tmp_path):
    put(tmp_path / "in", {f"down/{name}": content for name, content in DAMAGED.items()})
    put(tmp_path / "in", {"a.tar": tar({"0.xz": SHORT, "1.xz": SHORT[:-4]}), "b.txt": b"b", "zz.txt": b"last"})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out", "-skip_corrupt")
    assert (result.returncode, notices(result.stderr)) == (0, [])
    listed = sorted(re.findall(r"^left out: (.+?): ", result.stdout, re.MULTILINE))
    assert listed == sorted(["a.tar/1.xz", *(f"down/{name}" for name in DAMAGED)])
    train, val, vocab = read_three(tmp_path / "out")
    assert train + val == b"a" * 700 + b"\n\nb\nlast\n"
    assert vocab.decode() == "".join(f"{character}\n" for character in sorted(set((train + val).decode())))


def test_skip_corrupt_leaves_nothing_if_the_only_archive_is_damaged(run_main, tmp_path):
    put(tmp_path / "in", {"a.xz": SHORT[:-4]})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out", "-skip_corrupt")
    assert_fails(result, "too little text: .*; a.xz: it is cut short")
    assert not list((tmp_path / "out").iterdir())


def test_skip_corrupt_takes_back_what_a_large_damaged_archive_has_already_written(run_main, tmp_path):
    text = b"0123456789abcde\n" * (1 << 16)
    large = xz(text) * 60
    assert 60 * len(text) > 10 * data_extract.CHUNK
    put(tmp_path / "in", {"1.txt": b"1", "2.xz": large[:-9], "3.txt": b"3", "4.xz": large[:-9]})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out", "-skip_corrupt", "-sample_rate", "1")
    assert_fails(result, "too little text")  # the last archive was all of the validation text
    put(tmp_path / "in", {"5.txt": b"5"})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out", "-skip_corrupt")
    assert result.returncode == 0, result.stderr
    assert read_three(tmp_path / "out") == [b"1\n3\n", b"5\n", b"\n\n1\n3\n5\n"]


@posix
@pytest.mark.parametrize(
    ("files", "limit", "full"),
    [
        ({"a.txt": b"a" * 50_000, "b.xz": xz(b"b" * 500_000)}, 20_000, "output_parts.tmp/0"),
        ({"a.txt": b"a", "b.xz": xz(b"b" * 500_000), "c.txt": b"c"}, 20_000, "output_parts.tmp/1"),
        ({"a.txt": b"a", "b.xz": xz(b"b" * 500_000)}, 20_000, "output_parts.tmp/1"),
        ({"a.txt": CHARACTERS.encode()}, 17_000, "vocab.txt.tmp"),
    ],
    ids=["first archive", "second archive", "validation", "vocabulary"],
)
def test_a_full_disk_is_reported_in_one_line(run_main, earlier, tmp_path, limit_file_size, files, limit, full):
    put(tmp_path / "in", files)
    limit_file_size(limit)
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert_fails(result, f"{full}: {os.strerror(errno.EFBIG)}")


@posix
def test_a_disk_that_is_full_for_a_worker_process_is_reported_in_one_line(
    run_script, earlier, tmp_path, limit_file_size
):
    put(tmp_path / "in", {"a.txt": b"a", "b.xz": xz(b"b" * 500_000)})
    limit_file_size(20_000)  # for the processes that are started too
    result = run_script(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert_fails(result, f"output_parts.tmp/1: {os.strerror(errno.EFBIG)}")


def test_a_disk_that_fills_up_while_the_validation_text_is_cut_off_is_reported_in_one_line(
    run_main, earlier, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put(tmp_path / "in", {"a.txt": TEXT})
    monkeypatch.setattr(data_extract.shutil, "copyfileobj", fail)
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert_fails(result, f"output_val.txt.tmp: {os.strerror(errno.ENOSPC)}")


@posix
def test_outputs_that_are_links_stay_links_and_what_they_lead_to_is_replaced(run_main, tmp_path):
    put(tmp_path, {"in/a.txt": b"first\n", "in/b.txt": b"second\n", "disk/train": b"old", "other/val": b"old"})
    put(tmp_path, {"out/vocab.txt": b"old"})
    (tmp_path / "out/output_train.txt").symlink_to("../disk/train")
    (tmp_path / "out/output_val.txt").symlink_to(tmp_path / "other/new")
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/output_train.txt").is_symlink() and (tmp_path / "out/output_val.txt").is_symlink()
    assert read_three(tmp_path / "out") == three_files(["first\n", "second\n"])
    assert (tmp_path / "disk/train").read_bytes() == b"first\n"
    assert {path.name for path in tmp_path.glob("*/*")} == {"a.txt", "b.txt", "train", "new", "val", *NAMES}


@posix
@pytest.mark.parametrize("flags", [[], ["-min_count", "2"]])
def test_linked_outputs_may_lie_on_other_disks(run_main, tmp_path, monkeypatch, flags):
    rename = os.rename

    def rename_on_one_disk(old, new):
        """Each folder is a disk of its own, but for the folder of temporary files."""
        disks = [Path(path).resolve().relative_to(tmp_path).parts[0] for path in (old, new)]
        if disks[0] != disks[1]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), old, None, new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", rename_on_one_disk)
    monkeypatch.setattr(os, "replace", rename_on_one_disk)
    put(tmp_path, {"in/a.txt": b"first line\n", "in/b.txt": b"second line\n", "disk/val": b"", "third/vocab": b""})
    put(tmp_path, {"out/output_train.txt": b"old"})
    (tmp_path / "out/output_val.txt").symlink_to("../disk/val")
    (tmp_path / "out/vocab.txt").symlink_to("../third/vocab")
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out", *flags)
    assert result.returncode == 0, result.stderr
    texts = ["first line\n", "second line\n"]
    if flags:
        seen = Counter("".join(texts))
        texts = ["".join(c if seen[c] > 1 else "\ufffd" for c in text) for text in texts]
    assert read_three(tmp_path / "out") == three_files(texts)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["val"]


@posix
def test_a_device_is_no_place_for_an_output(run_main, tmp_path):
    put(tmp_path, {"in/a.txt": b"first\n", "in/b.txt": b"second\n", "out/x": b""})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out/output_val.txt").symlink_to("../pipe")
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out")
    assert_fails(result, "output_val.txt: is no ordinary file where the output belongs")
    assert (tmp_path / "pipe").is_fifo() and not list(tmp_path.glob("out/*.tmp"))


# Progress, streams and the true reason -------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream as IDLE has it: a terminal that can't be reconfigured."""

    def isatty(self) -> bool:
        return True


def test_streams_that_cannot_be_reconfigured_are_good_enough(run_main, tmp_path):
    put(tmp_path / "in", YES)
    stdout = io.StringIO()
    assert run_main(SCRIPT, "-data_dir", "in", stdout=stdout, stderr=Terminal()).returncode == 0
    assert "wrote output_train.txt" in stdout.getvalue()


def test_a_terminal_shows_a_bar_and_a_log_file_a_line_a_minute(run_main, tmp_path, monkeypatch):
    put(tmp_path / "in", {f"{i}.txt": "text é\n".encode() for i in range(3)})
    terminal = Terminal()
    run_main(SCRIPT, "-data_dir", "in", stderr=terminal)
    assert "3/3" in terminal.getvalue() and "MB of text" in terminal.getvalue()
    assert run_main(SCRIPT, "-data_dir", "in").stderr == ""
    half_minutes = iter(range(0, 30_000, 31))
    monkeypatch.setattr(data_extract.time, "monotonic", lambda: next(half_minutes))
    lines = run_main(SCRIPT, "-data_dir", "in").stderr.splitlines()
    assert lines == ["extracting: 67%, 0.0 MB of text"]


def fail_with(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EROFS, errno.ENOSYS])
def test_processes_that_cannot_be_started_are_the_reason_that_is_named(tmp_path, monkeypatch, number):
    put(tmp_path / "in", YES)
    monkeypatch.setattr(data_extract, "ProcessPoolExecutor", fail_with(number))
    with pytest.raises(data_extract.DataError, match=f"processes can't be started: {os.strerror(number)}; .*/dev/shm"):
        extract(tmp_path)


@linux
@pytest.mark.parametrize("limit", [9, 15])
def test_too_few_open_files_are_the_reason_that_is_named(run_script, earlier, tmp_path, limit):
    resource = pytest.importorskip("resource")

    def limit_open_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    put(tmp_path / "in", YES)
    result = run_script(SCRIPT, "-data_dir=in", "-output_dir=out", preexec_fn=limit_open_files)
    assert_fails(result, f"{os.strerror(errno.EMFILE)}.*ulimit -n")


def test_a_temporary_folder_is_needed_for_the_sample_only(run_main, tmp_path, monkeypatch):
    put(tmp_path / "in", YES)
    monkeypatch.setattr(data_extract.tempfile, "mkdtemp", fail_with(errno.EROFS))
    assert_fails(run_main(SCRIPT), f"a temporary folder for the sample: {os.strerror(errno.EROFS)}")
    assert run_main(SCRIPT, "-data_dir", "in").returncode == 0


def test_an_error_that_names_no_file_is_not_blamed_on_standard_output(run_main, tmp_path, monkeypatch):
    put(tmp_path / "in", YES)
    monkeypatch.setattr(data_extract, "take_sample", fail_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run_main(SCRIPT, "-data_dir", "in")


# Interruption --------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_corpus(tmp_path):
    """Archives that take many seconds to read but give little text: each has a hidden member of 8 GB."""
    hidden = member(".hidden", size=0o77777777777).tobuf(tarfile.GNU_FORMAT)
    data = xz(tar({"a.txt": b"text"})[:1024] + hidden) + xz(bytes(1 << 24)) * 480
    return put(tmp_path / "in", {f"{i}.xz": data for i in range(3)})


def workers_of(process: subprocess.Popen) -> list[int]:
    return [pid for pid, command in processes_of(process.pid).items() if "spawn_main" in command]


@linux
@pytest.mark.parametrize("seconds", [0, 0.1, 0.8, *(pytest.param(s, marks=pytest.mark.soak) for s in (0.05, 0.15))])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_changes_nothing_and_says_so(start_script, earlier, slow_corpus, number, seconds):
    process = start_script(SCRIPT, "-data_dir", slow_corpus, "-output_dir", earlier)
    wait_for(lambda: workers_of(process))
    time.sleep(seconds)
    if number == signal.SIGINT:  # from a terminal it reaches every process, here the parent last
        for worker in workers_of(process):
            os.kill(worker, number)
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert all(line.startswith("data_extract.py: ") for line in notices(stderr)), stderr
    assert len(notices(stderr)) <= 1 and (number == signal.SIGTERM or "interrupted" in stderr)
    wait_for(lambda: not processes_of(process.pid))


@linux
def test_a_closed_terminal_ends_a_run_as_sigterm_does(start_script, earlier, slow_corpus):
    """A terminal sends SIGHUP to every process of its group."""
    process = start_script(SCRIPT, "-data_dir", slow_corpus, "-output_dir", earlier)
    wait_for(lambda: (earlier / "output_parts.tmp/0").exists())  # the workers are at work
    os.killpg(process.pid, signal.SIGHUP)
    _, stderr = process.communicate(timeout=10)
    assert (process.returncode, notices(stderr)) == (128 + signal.SIGHUP, [])
    wait_for(lambda: not processes_of(process.pid))


@linux
def test_sighup_is_ignored_where_nohup_says_so(start_script, tmp_path):
    put(tmp_path / "in", {"a.xz": xz(b"the first text\n" * 4_000_000), "b.txt": b"second\n"})
    process = start_script(SCRIPT, "-data_dir=in", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(lambda: (tmp_path / "output_parts.tmp/0").exists())
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


@linux
def test_a_worker_can_be_ended_with_sigterm(start_script, earlier, slow_corpus):
    process = start_script(SCRIPT, "-data_dir", slow_corpus, "-output_dir", earlier)
    wait_for(lambda: (earlier / "output_parts.tmp/0").exists())
    os.kill(workers_of(process)[0], signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1 and "a worker process was killed" in stderr
    wait_for(lambda: not processes_of(process.pid))


# Rare characters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_min_count_replaces_what_is_rare_in_both_texts_together(extract_here, tmp_path, monkeypatch, seed):
    generator = random.Random(seed)
    chunk, length = generator.choice([(7, 500), (64, 2000), (1024, 10_000), (1 << 20, 10_000)])
    monkeypatch.setattr(data_extract, "CHUNK", chunk)
    kinds = ["ab\n\t~", "éж\x80\u07ff", "你\u0800\uffff\ufffd\ufeff", "🙂\U0010ffff𝔘"]
    pool = [*generator.choice(kinds), *FOREIGN, *"ab\n~"]
    weights = [generator.choice([1, 1, 3, 30, 1000]) for _ in pool]
    files, texts = {}, []
    for i in range(generator.choice([1, 2, 5])):
        text = "a" + "".join(generator.choices(pool, weights, k=generator.randrange(length)))
        if i and seed % 2:
            files[f"{i}-damaged.xz"] = xz(text.encode())[:-9]
            texts.append("")
        files[f"{i}.xz"] = xz(text.encode())
        texts.append(text)
    counts = Counter("".join(texts))
    del counts["\ufffd"]
    least = min(generator.choice([1, 2, 5, 100, 1000, 10**6]), max(counts.values()))
    rare = {character: count for character, count in counts.items() if count < least}

    put(tmp_path / "in", files)
    train, val, left_out = extract(tmp_path, skip_corrupt=True, min_count=least)
    expected = three_files(["".join("\ufffd" if c in rare else c for c in text) for text in texts])
    assert read_three(tmp_path / "out") == expected
    assert train.rare + val.rare == rare and len(left_out) == len(files) - len([text for text in texts if text])
    assert sorted(train.characters_seen | val.characters_seen) == [*expected[2].decode()[::2]]
    assert [train.size, val.size] == [len(data) for data in expected[:2]]


def test_ascii_is_counted_exactly_below_min_count_however_much_text_there_is(tmp_path):
    text = list("a" * 200_000)
    for i in range(33, 96):  # spread over what is looked at first and what is looked at later
        for at in random.Random(i).sample(range(0, 200_000, 64), i):
            text[at + i % 64] = chr(i)
    text = "".join(text)
    (archive,) = find_archives(put(tmp_path, {"a.xz": xz(text.encode())}))[0]
    for least in (1, 50, 64, 1000):
        found = Counts()
        list(read_clean(archive, found, least))
        assert found.characters_seen.keys() == set(text)
        for character, count in found.characters_seen.items():
            assert count == text.count(character) or least <= count <= text.count(character)


def test_the_summary_says_what_was_rare_also_in_a_sample(run_main, tmp_path):
    corpus = shards(11)
    put(tmp_path / "in", as_outer_tars(corpus))
    taken = take_sample(find_archives(tmp_path / "in")[0], 0.5, 7)
    texts = [documents(corpus[Path(archive.name).stem]) for archive in taken]
    rare = {character: count for character, count in Counter("".join(texts)).items() if count < 50}
    assert 5 < len(rare) < 60
    args = ["-data_dir", "in", "-output_dir", "out", "-sample_rate", "0.5", "-seed", "7"]
    result = run_main(SCRIPT, *args, "-min_count", "50")
    assert (result.returncode, notices(result.stderr)) == (0, [])
    expected = three_files(["".join("\ufffd" if c in rare else c for c in text) for text in texts])
    assert read_three(tmp_path / "out") == expected and len(list((tmp_path / "out").iterdir())) == 3
    assert f"vocabulary: {len(expected[2].decode()) // 2} characters" in result.stdout
    assert f"fewer than 50 times replaced by U+FFFD: {sum(rare.values()):,} ({len(rare)} different)" in result.stdout


def test_a_text_in_which_everything_is_rare_is_reported_in_one_line(run_main, earlier, tmp_path):
    put(tmp_path / "in", {"a.txt": ("ab\né" * 98 + "\ufffd" * 100).encode()})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out", "-min_count", "100")
    assert_fails(result, "no character is seen 100 times; lower -min_count")


@posix
def test_a_disk_that_fills_up_while_rare_characters_are_replaced_is_reported(
    run_main, earlier, tmp_path, limit_file_size
):
    text = "".join(map(chr, range(0x80, 0x800))) * 9 + "a" * 100  # two bytes each, of which three become
    put(tmp_path / "in", {"a.txt": text.encode(), "b.txt": b"b"})
    limit_file_size(len(text.encode()) + 99)
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out", "-min_count", "100")
    assert_fails(result, f"output_train.txt.tmp: {os.strerror(errno.EFBIG)}")


# The built-in sample and the command ---------------------------------------------------------------------------------


def test_without_flags_or_data_the_built_in_sample_is_used(run_script, tmp_path):
    result = run_script(SCRIPT)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    train, val, vocab = (content.decode("ascii") for content in read_three(tmp_path))
    assert len(train) == int(0.9 * len(train + val)) > 300_000
    assert vocab == "".join(f"{character}\n" for character in sorted(set(train + val)))
    assert re.fullmatch(r"[\n -~]*", vocab), "nothing but printable ASCII and line ends"
    assert "lambda" in train and "\n\n\n" not in train[:100] and '"' in train and "'" in train
    (notice,) = notices(result.stderr)
    assert "sample" in notice and "openwebtext" in notice
    assert f"{len(train):,}" in result.stdout and f"{len(val):,}" in result.stdout
    assert f"{len(vocab) // 2} characters" in result.stdout


def test_without_flags_an_openwebtext_folder_is_used(run_main, tmp_path):
    put(tmp_path, {"openwebtext/a.txt": b"first ", "openwebtext/b.txt": b"second"})
    result = run_main(SCRIPT)
    assert (result.returncode, notices(result.stderr)) == (0, [])
    assert read_three(tmp_path) == three_files(["first \n", "second\n"])


@posix
def test_a_disk_too_full_for_the_built_in_sample_is_reported_in_one_line(run_main, earlier, limit_file_size):
    limit_file_size(20_000)
    result = run_main(SCRIPT, "-output_dir", "out")
    assert_fails(result, os.strerror(errno.EFBIG))


def test_the_summary_counts_documents_characters_megabytes_vocabulary_and_replacements(run_main, tmp_path):
    put(tmp_path / "in", {"a.xz": xz(tar({"1.txt": "é".encode() * 6000, "2.txt": b"b\xff"})), "b.txt": "ж".encode()})
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "new/out")
    assert result.returncode == 0, result.stderr
    assert [train_or_val.split() for train_or_val in result.stdout.splitlines()[1:3]] == [
        ["training", "2", "6,006", "0.01"],
        ["validation", "1", "2", "0.00"],
    ]
    assert re.search(r"vocabulary: 5 characters; .*: 1\n", result.stdout)
    assert re.search(r"wrote .*output_train.txt.* in \d+\.\d s\n", result.stdout)
    assert "fewer than" not in result.stdout


# Long campaigns: pytest -m soak --------------------------------------------------------------------------------------

MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
print(f"largest process: {peak:.0f} MB, wall time: {time.perf_counter() - started:.1f} s")
sys.exit(status)
"""
LINE = f"{FOREIGN} {'The quick brown fox jumps over the lazy dog. ' * 20}".encode()


def run_measured(*args) -> tuple[float, str]:
    """Return the megabytes of the largest process of a run, workers included, and its standard output."""
    command = [sys.executable, "-c", MEASURE, sys.executable, data_extract.__file__, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return float(re.search(r"largest process: (\d+) MB", result.stdout)[1]), result.stdout


def repeated(block: bytes, size: int) -> bytes:
    """Return an .xz file of `block` repeated to at least `size` bytes, quickly made."""
    block *= (32 << 20) // len(block)
    return lzma.compress(block, preset=0) * -(-size // len(block))


def one_document(size: int) -> bytes:
    header = member("a.txt", size=size).tobuf(tarfile.GNU_FORMAT)
    return xz(header) + repeated(LINE[:512], size) + xz(bytes(1024))


@pytest.mark.soak
@posix
@pytest.mark.parametrize(
    ("name", "data", "size"),
    [
        ("lines.xz", lambda: repeated(LINE + b"\n", 10 << 30), 10 << 30),
        ("one document of one line.xz", lambda: one_document(4 << 30), 4 << 30),
        ("endless short documents.xz", lambda: repeated(tar({"a": b"a"})[:1024], 1 << 30), 3 << 20),
        ("endless short documents.tar", lambda: tar({"a": b"a"})[:1024] * 900_000 + bytes(1024), 2_700_000),
        ("endless newlines.xz", lambda: xz(b"ab") + repeated(b"\n", 1 << 30), 1 << 30),
    ],
)
def test_memory_stays_bounded_whatever_is_in_an_archive(tmp_path, name, data, size):
    put(tmp_path / "in", {name: data()})
    peak, _ = run_measured("-data_dir", tmp_path / "in", "-output_dir", tmp_path / "out")
    assert sum((tmp_path / "out" / output).stat().st_size for output in NAMES[:2]) >= size
    assert peak < 300
    for output in NAMES:
        (tmp_path / "out" / output).unlink()


@pytest.mark.soak
@posix
def test_memory_stays_bounded_while_rare_characters_are_replaced(tmp_path):
    lines = repeated(LINE + b"\n", 2 << 30)
    put(
        tmp_path / "in",
        {"1.xz": lines, "2.xz": xz(CHARACTERS.encode()), "3.xz": repeated(CHARACTERS.encode(), 1 << 25)},
    )
    peak, output = run_measured("-data_dir", tmp_path / "in", "-output_dir", tmp_path / "out", "-min_count", "1000000")
    assert peak < 300 and "(4,997 different)" in output  # 5,000 but for three of LINE's
    for name in NAMES:
        (tmp_path / "out" / name).unlink()


@pytest.mark.soak
@linux
@pytest.mark.parametrize("round", range(5))
@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_killed_process_leaves_earlier_outputs_whole_and_no_process_behind(
    start_script, tmp_path, slow_corpus, victim, round
):
    out = put(tmp_path / "out", dict.fromkeys(NAMES, b"earlier"))
    process = start_script(SCRIPT, "-data_dir", slow_corpus, "-output_dir", out)
    wait_for(lambda: workers_of(process))
    time.sleep(random.Random(round).random() * 2)
    os.kill(process.pid if victim == "parent" else random.Random(round).choice(workers_of(process)), signal.SIGKILL)
    _, stderr = process.communicate(timeout=20)
    assert read_three(out) == [b"earlier"] * 3
    wait_for(lambda: not processes_of(process.pid), seconds=5)
    if victim == "worker":
        assert process.returncode == 1
        (line,) = notices(stderr)
        assert "killed" in line
        assert len(list(out.iterdir())) == 3
