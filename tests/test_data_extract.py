"""data_extract.py: clean text from archives of every nesting, or one line that says what is wrong.

What belongs here: finding and reading archives, what is text, the three outputs, and how a run ends
beside other runs, on odd disks, and by a signal.
"""

import errno
import io
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, MagicMock, Mock

import pytest
from archives import (
    BOM,
    DAMAGED,
    FOREIGN,
    IN_ONE_XZ,
    NAMES,
    NESTINGS,
    NOT_TEXT,
    OUTER,
    OUTER_MEMBER,
    SHORT,
    TEXT,
    as_files,
    as_outer_tars,
    documents,
    flip,
    member,
    nested,
    pax,
    plain,
    read_three,
    shards,
    tar,
    three_files,
    v7,
    xz,
)
from conftest import (
    ROOT,
    assert_fails,
    linux,
    notices,
    posix,
    processes_of,
    put,
    wait_for,
)

import data_extract

SCRIPT = "data_extract.py"
TINYSHAKESPEARE = ROOT.parent / "shared" / "corpora" / "tinyshakespeare"
IN_TO_OUT = ["-data_dir", "in", "-output_dir", "out"]
YES = {"a.txt": b"yes\n", "b.txt": b"yes\n"}
OF_YES = three_files(["yes\n"] * 2)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
SIZES = range(65_000, 66_600, 64)  # so that headers lie wherever a buffer may end
OTHER_KIND = 'no .tar, .xz or .txt file; see README, "Other kinds of data"'
TAR_NAMES = pytest.mark.parametrize("name", ["a.tar", "a.txt", "a.xz"])


def pack(name: str, data: bytes) -> dict[str, bytes]:
    return {name: xz(data) if name.endswith(".xz") else data}


def read_all(folder: Path) -> tuple[str, Counter]:
    """Return the text of all archives in a folder, joined, and its counts. Raises Damaged."""
    part = folder.parent / f"{folder.name}.part"
    total, texts = Counter(), []
    for archive in data_extract.find_archives(folder)[0]:
        counts, seen, damage = data_extract.extract_archive(archive, part)
        if damage:
            raise data_extract.Damaged(damage)
        texts.append(part.read_bytes().decode())
        assert seen.keys() == set(texts[-1]) and counts["characters"] == len(texts[-1])
        total.update(counts)
    return "".join(texts), total


def passed_over(said: str) -> list[str]:
    return sorted(re.findall(r"^passed over \((.+)$", said, re.MULTILINE))


def only_outputs(folder: Path) -> list[bytes]:
    assert sorted(os.listdir(folder)) == sorted(NAMES)
    return read_three(folder)


@pytest.fixture
def extract(run_main, tmp_path):
    """`extract(files, *flags)` makes the three outputs of these files, and nothing else.

    Returns their contents and what the run has said.
    """

    def run(files: dict[str, bytes], *flags, folder: str = "in", **streams):
        put(tmp_path / folder, files)
        result = run_main(SCRIPT, "-data_dir", folder, "-output_dir", "out", *flags, **streams)
        assert (result.returncode, result.stderr) == (0, "")
        return only_outputs(tmp_path / "out"), result.stdout

    return run


@pytest.fixture
def yes_folder(tmp_path):
    """The folder `in` with two short texts."""
    return put(tmp_path / "in", YES)


@pytest.fixture
def earlier(tmp_path):
    """An output folder with the files of an earlier run; checks that a test leaves it as it was."""
    contents = [f"{name} of an earlier run".encode() for name in NAMES]
    folder = put(tmp_path / "out", dict(zip(NAMES, contents)))
    yield folder
    assert only_outputs(folder) == contents


# Finding archives ---------------------------------------------------------------------------------


def test_hidden_files_outputs_and_other_kinds_are_never_corpus_and_are_counted(extract):
    never = [
        *(".a.txt", "._b.xz", ".c.tar", ".d/e.txt", "f/.g/h/i.xz", "..a/b.txt"),
        *(*NAMES, "down/train_split.txt", "down/VAL_split.TXT", "requirements.txt"),
        *("README.md", "vocab.json", "xz", "a.txt.bak", *(f"{i}.jsonl" for i in range(1200))),
    ]
    members = [
        *("._a.txt", ".x/a.txt", "x/.y/a.txt", ".a.xz", ".b.tar", "./.f", "./vocab.txt"),
        *(f"{'long/' * 20}.a.txt", "x/train_split.txt"),
    ]
    files = YES | dict.fromkeys(never, b"no")
    for format in FORMATS:
        inner = tar({**dict.fromkeys(members, b"no"), "a.txt": b"yes"}, format)
        data = tar({"inner.tar": inner, ".no.tar": inner, "b.txt": b"yes"}, format)
        files |= {f"c{format}.tar": data, f"d{format}.xz": xz(data)}
    (train, val, _), said = extract(files)
    assert (train + val).split() == [b"yes"] * 14
    assert passed_over(said) == [
        "an output of these scripts, or requirements.txt): 18",
        "hidden): 54",
        f"{OTHER_KIND}): 1,204",
    ]


@posix
def test_links_are_followed_but_nothing_is_read_twice_and_pipes_are_passed_over(
    run_script, tmp_path
):
    put(tmp_path, {"other/b.txt": b"second\n", "in/a.txt": b"first\n", "in/sub/c.txt": b"third\n"})
    links = {
        **{"one": "../other", "two": "../other", "same.txt": "a.txt", "sub/round": "../../in"},
        **{"sub/self": ".", "loop.xz": "loop.xz", "gone.txt": "nowhere", "gone.tar": "nowhere"},
    }
    for link, target in links.items():
        (tmp_path / "in" / link).symlink_to(target)
    os.mkfifo(tmp_path / "in/pipe.txt")
    said = run_script(SCRIPT, "-data_dir", "in", timeout=20).stdout
    assert read_three(tmp_path) == three_files(["first\n", "second\n", "third\n"])
    assert passed_over(said) == ["a link to what is read anyway): 4", f"{OTHER_KIND}): 4"]


def test_a_sample_is_the_same_for_every_nesting_and_grows_with_the_rate(extract):
    corpus, taken = shards(40), []
    texts = {name: documents(corpus[name]) for name in sorted(corpus)}
    for pack, seed, count in [
        (as_files, 7, 10),
        (as_outer_tars, 7, 10),
        (as_files, 8, 10),
        (as_files, 7, 20),
    ]:
        flags = ["-sample_rate", count / 40, "-seed", seed]
        files, said = extract(pack(corpus), *flags, folder=pack.__name__)
        assert f" {count} of 40 archives\n" in said
        joined = b"".join(files[:2]).decode()
        taken.append([name for name, text in texts.items() if text in joined])
        assert files == three_files([texts[name] for name in taken[-1]])
    assert taken[0] == taken[1] != taken[2] and set(taken[0]) < set(taken[3])
    assert list(map(len, taken)) == [10, 10, 10, 20]
    assert " 1 of 1 archives\n" in extract({"one.txt": b"a text\n"}, "-sample_rate", 0.01)[1]


# Reading one archive ------------------------------------------------------------------------------

ONE, TWO = tar({"a": b"a"}), tar({"b": b"b"}, tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # In the order of their own file names, then of their paths.
        ({"3.txt": b"3", "a/2.txt": b"2", "b/1.txt": b"1"}, "1\n2\n3\n"),
        (
            {
                "a.tar": tar({"x/2.xz": xz(b"2")}),
                "b.tar": tar({"y/0.xz": xz(b"0")}),
                "z/1.xz": xz(b"1"),
            },
            "012",
        ),
        (
            {
                "b.tar": tar({"1.xz": xz(b"third")}),
                "a.tar": tar({"1.xz": xz(b"second ")}),
                "0/1.xz": xz(b"first "),
            },
            "first second third",
        ),
        ({"a.txt": b"a", "B.txt": b"B", "9.txt": b"9", "10.txt": b"10"}, "10\n9\nB\na\n"),
        # Plain texts end with a newline, shards of packed text are joined as they are.
        (
            {"a.txt": b"one", "b.txt": b"two\r\n", "c.txt": b"three\n\n", "d.txt": b"four"},
            "one\ntwo\nthree\n\nfour\n",
        ),
        ({"a.xz": xz(b"one text cut in"), "b.xz": xz(b" two")}, "one text cut in two"),
        (
            {"A.TXT": b"A", "B.XZ": xz(b"B"), "C.TAR": tar({"D.XZ": xz(b"D"), "E.TXT": b"E"})},
            "A\nBE\n\nD",
        ),
        (
            {"a.tar": tar({"./a.txt": b"a", "../b.txt": b"b", "x/../c.txt": b"c"})},
            "a\n\nb\n\nc\n\n",
        ),
        ({"a.tar": v7({"x/": b"", "x/1.xz": xz(b"a"), "x/2.xz": xz(b"b")})}, "ab"),
        ({"a.txt": b"one", "b.txt": b"", "c.xz": xz(b""), "d.txt": b"two\n\n\n"}, "one\ntwo\n\n\n"),
        ({"a.txt": b"\n\n", "b.xz": xz(b"\r\n\r\n"), "c.tar": tar({"c": b"\n\n"})}, "\n\n"),
        ({"a.tar.xz": xz(TEXT)}, plain(TEXT)),
        ({"a.tar": tar({"b.xz": xz(b"packed"), "c.txt": b"text"})}, "text\n\npacked"),
        ({"a.tar": tar({}), "b.xz": xz(b"b")}, "b"),
        ({"a.xz": xz(TEXT) + xz(b"") + xz(b"more")}, plain(TEXT) + "more"),
        ({"a.xz": xz(tar({"a": TEXT})[:70]) + xz(tar({"a": TEXT})[70:])}, documents([TEXT])),
        ({"a.tar": tar({}) + tar({"1.xz": xz(b"one")}) + tar({"2.xz": xz(b"two")})}, "onetwo"),
        ({"a.xz": xz(tar({"a": b"a"}) + bytes(1 << 20))}, "a\n\n"),
        # Archives in archives: opened by what they hold, with nothing of what is beside them lost.
        ({"a.tar.xz": xz(tar({"b.xz": xz(b"B"), "c.txt": b"C", "d.txt.xz": xz(b"D")}))}, "BC\n\nD"),
        ({"a.tar": tar({"b.TAR": tar({"c": b"C", "d.xz": xz(b"D")}), "e": b"E"})}, "E\n\nC\n\nD"),
        ({"a.tar": tar({"b": tar({"c": b"C", "d.xz": xz(b"D")}), "e": b"E"})}, "C\n\nDE\n\n"),
        ({"a.txt": tar({"b.tar": tar({"c": b"C", "d.xz": xz(b"D")}), "e": b"E"})}, "C\n\nDE\n\n"),
        (
            {
                "a.tar": tar(
                    {"b.txt": b"B", "c.tar": tar({}), "d.xz": xz(tar({"e.tar": ONE + TWO}))}
                )
            },
            "B\n\na\n\nb\n\n",
        ),
        (
            {"a.xz": xz(tar({"b.xz": xz(tar({"c": b"C"})), "d.tar": tar({}), "e": b"E"}))},
            "C\n\nE\n\n",
        ),
        (
            {"a.xz": xz(tar({str(n): tar({"b": b"b" * n}) for n in SIZES}))},
            documents([b"b" * n for n in SIZES]),
        ),
        (
            {
                "a.tar": nested(20, "a.tar"),
                "b.xz": xz(nested(19, "b")),
                "c.xz": nested(9, "c.tar.xz", xz),
            },
            "a text\n\n" * 3,
        ),
    ],
)
def test_archives_are_sorted_by_name_and_read_by_what_they_hold(tmp_path, files, expected):
    assert read_all(put(tmp_path, files))[0] == expected


# Links, devices and folders, and members of kinds that nobody knows.
NO_FILES = [
    *(
        (member("no.xz", bytes([kind]), size, target), b"")
        for kind in b"123456"
        for size, target in [(0, "long/" * 50), (0, "../../etc/passwd"), (5000, "/etc/passwd")]
    ),
    *((member("unknown", kind, 700), b"z" * 700) for kind in (b"Z", b"g")),
]
A_AND_B = {"a": b"a", "b": b"b"}
MEMBERS = {"a.txt": TEXT, "long/" * 18 + "b.txt": b"b" * 512, "c.txt": b"", "d.txt": b"d" * 513}


@TAR_NAMES
@pytest.mark.parametrize(
    ("data", "members"),
    [
        (v7(MEMBERS), MEMBERS),
        *((tar(MEMBERS, format), MEMBERS) for format in FORMATS),
        (tar({"long/" * 100 + "a": TEXT, "b": b"b"}, tarfile.GNU_FORMAT), {"a": TEXT, "b": b"b"}),
        (
            tar({"long/" * 100 + "a": TEXT, "Привет": b"b"}, tarfile.PAX_FORMAT),
            {"a": TEXT, "b": b"b"},
        ),
        (
            pax(b"12 size=700\n", (member("a"), b""))[:1536] + b"a" * 700 + bytes(324 + 1024),
            {"a": b"a" * 700},
        ),
        (pax(b"37 comment=one\n19 path=no/.x.txt\n\n..\n", ("a", b"a"), ("b", b"b")), A_AND_B),
        (pax(b"27 comment=\n13 size=1000\n\xff\n", ("a", b"a"), ("b", b"b")), A_AND_B),
        (
            tar(
                [(member("a", tarfile.CONTTYPE, 1), b"a"), (member("b", tarfile.AREGTYPE, 1), b"b")]
            ),
            A_AND_B,
        ),
        (tar([("a\udcff.txt", b"a")]), {"a": b"a"}),
        (tar([("a", b"a"), *NO_FILES, ("b", b"b")]), A_AND_B),
        (ONE + TWO, A_AND_B),
        (ONE[:1024] + bytes(512) + TWO, A_AND_B),
        (ONE + v7({"b": b"b"}) + bytes(3000), A_AND_B),
    ],
)
def test_every_kind_of_tar_gives_its_documents_and_nothing_else(tmp_path, name, data, members):
    assert read_all(put(tmp_path, pack(name, data)))[0] == documents(list(members.values()))


CUT = tar({"a": b"a" * 700, "b": b"b"})


@pytest.mark.parametrize("packed", [xz(CUT) * 2, xz(b"text") * 2], ids=len)
def test_no_byte_of_an_xz_file_can_be_lost_or_changed_unnoticed(tmp_path, packed):
    shortened = [packed[:end] for end in range(0, len(packed), 3) if end != len(packed) // 2]
    for data in [*shortened, *(flip(packed, at) for at in range(0, len(packed), 2))]:
        with pytest.raises(data_extract.Damaged):
            read_all(put(tmp_path, {"a.xz": data}))


@TAR_NAMES
@pytest.mark.parametrize(
    "data",
    [
        *(CUT[:end] for end in (400, 512, 1024, 1100, 1536, 2048, 2560)),
        *(ONE + b"text" * 500, ONE + TWO[:800], ONE + bytes(512) + flip(TWO, 3)),
        tar([("a", b"a"), (member("hole.txt", tarfile.GNUTYPE_SPARSE, 512), b"x" * 512)]),
        pax(
            b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n31 GNU.sparse.realsize=10000\n",
            ("hole.txt", b"1\n0\n4\n" + bytes(506)),
        ),
        *(OUTER[:end] for end in (100, 512, 600, OUTER_MEMBER + 100)),
        *(OUTER[:end] for end in range(2 * OUTER_MEMBER - 1, 3 * OUTER_MEMBER, 512)),
        *(flip(OUTER, OUTER_MEMBER * i + at) for i in (1, 2) for at in (0, 130, 150, 258)),
        OUTER[:OUTER_MEMBER] + b"not a header" * 100 + OUTER[OUTER_MEMBER:],
        *(tar({"a.tar": CUT[:end], "b.txt": b"b" * 2000}) for end in (0, 400, 1100, 1536, 2560)),
        tar({"a": CUT[:1100], "b.txt": b"b" * 2000}),
        tar({"a.tar": tar({"b.xz": SHORT[:-4]})}),
        tar({"a.tar": b"no tar", "b.txt": b"b"}),
        *(nested(levels, name) for levels in (22, 1000) for name in ("a", "a.tar")),
        nested(30, "a.tar.xz", xz),
    ],
)
def test_a_tar_that_is_cut_sparse_too_deep_or_followed_by_something_is_damaged(
    tmp_path, name, data
):
    with pytest.raises(data_extract.Damaged):
        read_all(put(tmp_path, pack(name, data)))


@TAR_NAMES
@pytest.mark.parametrize(
    "record",
    [
        *(b"12 path=a.b", b"8 path=a\n", b"99 path=a\n", b"path=a\n", b"0 path=a\n", b"9 path:a\n"),
        b"size=12\n",
    ],
)
def test_a_record_that_is_none_is_damage_or_means_nothing(tmp_path, name, record):
    """The tarfile of each version of Python decides which."""
    with suppress(data_extract.Damaged):
        assert read_all(put(tmp_path, pack(name, pax(record, ("a", b"a")))))[0] == "a\n\n"


@pytest.mark.parametrize("seed", range(200))
def test_random_damage_is_reported_or_gives_no_more_text_than_there_was(tmp_path, seed):
    generator = random.Random(seed)
    sound = tar({"a.txt": TEXT, "long/" * 30 + "b": b"b" * 700, "c.txt": b"c"}, tarfile.PAX_FORMAT)
    data = bytearray(sound[: generator.choice([len(sound), generator.randrange(1, len(sound))])])
    for _ in range(generator.randrange(1, 6)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    files = {"a.tar": data, "b.xz": xz(data), "c.tar": tar({"a.tar": data})}
    with suppress(data_extract.Damaged):
        assert len(read_all(put(tmp_path, files))[0]) < 3 * len(sound)


@posix
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root can read everything")
@pytest.mark.parametrize("name", ["a.txt", "b.xz", "c.tar", "folder"])
def test_an_unreadable_file_is_reported_in_one_line(run_main, earlier, tmp_path, name):
    put(tmp_path / "in", {"a.txt": TEXT, "b.xz": SHORT, "c.tar": OUTER, "folder/d.txt": TEXT})
    (tmp_path / "in" / name).chmod(0)
    try:
        assert_fails(run_main(SCRIPT, *IN_TO_OUT), f"{name}: ")
    finally:
        (tmp_path / "in" / name).chmod(0o700)


# Text, and other data than text -------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOT_TEXT)
@pytest.mark.parametrize("name", ["a.txt", "a.xz"])
def test_other_data_under_the_name_of_a_text_is_refused_or_left_out_and_listed(
    run_main, extract, tmp_path, kind, name
):
    put(tmp_path / "in", YES | pack(name, NOT_TEXT[kind]) | {"c.txt": b"yes\n"})
    reason = r"it is not text: (a NUL is|\d+ % of its characters are not UTF-8)"
    assert_fails(run_main(SCRIPT, *IN_TO_OUT), f"{name}: {reason}.*, or leave it .* -skip_corrupt")
    assert not list((tmp_path / "out").iterdir())
    (train, val, _), said = extract({}, "-skip_corrupt")
    assert re.search(rf"^left out: {name}: {reason}", said, re.MULTILINE)
    assert (train + val).strip(b"yes\n") == b""


@TAR_NAMES
def test_members_of_a_tar_that_are_not_text_are_left_out_and_counted(extract, name):
    others = NOT_TEXT | {"1.zip": b"PK\3\4\0", "no ending": SHORT}
    data = tar(
        {
            "0.txt": b"first",
            **others,
            "a tar": tar({**others, "1.xz": xz(b"RIFF\0")}),
            "zz.txt": b"last",
        }
    )
    files, said = extract(pack(name, data))
    assert files == three_files(["first\n\nlast\n\n"])
    assert passed_over(said) == [f"not text): {2 * len(others) + 1}"]
    assert "replaced by U+FFFD: 0\n" in said


LINES = TEXT.replace(b"\n", b"\r\n") + b"last"


@pytest.mark.parametrize("chunk", [7, 1023, 2 << 20])
@pytest.mark.parametrize(
    ("data", "text", "document", "replaced"),
    [
        ((BOM + LINES).decode().encode("utf-16-le"), plain(LINES), plain(LINES) + "\n\n", 0),
        ((BOM + LINES).decode().encode("utf-16-be"), plain(LINES), plain(LINES) + "\n\n", 0),
        (b"a\r\nb\rc\nd", "a\nb\nc\nd", "a\nb\nc\nd\n\n", 0),
        (b"a\n\r\n\r\r\n", "a\n\n\n\n", "a\n\n", 0),
        (b"\n\n a \n\n", "\n\n a \n\n", "\n\n a \n\n", 0),
        (BOM + b"a", "a", "a\n\n", 0),
        (BOM * 2 + b"a" + BOM, "\ufeffa\ufeff", "\ufeffa\ufeff\n\n", 0),
        (BOM, "", "", 0),
        (b"abc\x0b\x1c\x85", "abc\x0b\x1c\ufffd", "abc\x0b\x1c\ufffd\n\n", 1),
        ("\u2028\x85".encode(), "\u2028\x85", "\u2028\x85\n\n", 0),
        ("éabc\ufffd".encode() + b"\xe2\x82", "éabc\ufffd\ufffd", "éabc\ufffd\ufffd\n\n", 1),
        (
            b"a" * 20 + b"\xed\xa0\x80\xc0\x80",
            "a" * 20 + "\ufffd" * 5,
            "a" * 20 + "\ufffd" * 5 + "\n\n",
            5,
        ),
        (b"\xff\xfe" + b"a\0" * 9 + b"b", "a" * 9 + "\ufffd", "a" * 9 + "\ufffd\n\n", 1),
        (b"\xfe\xff" + b"\0a" * 9 + b"\xd8\0\0b", "a" * 9 + "\ufffdb", "a" * 9 + "\ufffdb\n\n", 1),
        (
            b"a" * 8000 + b"\0\xff" * 1000,
            "a" * 8000 + "\ufffd" * 2000,
            "a" * 8000 + "\ufffd" * 2000 + "\n\n",
            2000,
        ),
        (b"RIFF as WAVE is", "RIFF as WAVE is", "RIFF as WAVE is\n\n", 0),
        (b"%PDF-1.7 is", "%PDF-1.7 is", "%PDF-1.7 is\n\n", 0),
        (b"\x1b[1mb" * 90, "\x1b[1mb" * 90, "\x1b[1mb" * 90 + "\n\n", 0),
    ],
)
def test_text_comes_out_as_valid_utf_8_with_plain_line_ends(
    tmp_path, monkeypatch, chunk, data, text, document, replaced
):
    monkeypatch.setattr(data_extract, "CHUNK", chunk)
    members = {"a": data, "b": b"b", "c.txt.xz": xz(data)}
    files = {"a.txt": data, "b.xz": xz(data), "c.tar": tar({"a": data}), "d.xz": xz(tar(members))}
    result, counts = read_all(put(tmp_path, files))
    end = "\n" if text and not text.endswith("\n") else ""  # that a .txt gets
    assert result == text + end + text + 2 * document + "b\n\n" + text
    assert counts["invalid"] == 5 * replaced


PARTS = [
    *[character.encode() for character in [*FOREIGN * 2, "word ", "\ufffd"]] * 2,
    *[b"\xff", b"\xe2\x82", b"\x80", b"\xf0\x9f"] * 2,
    *[b"\n", b"\r\n", b"\r", b"\n\n"] * 10,
]
START = BOM + b"what is not text is left out, so most of this is valid. " * 9


@pytest.mark.parametrize("seed", range(150))
def test_random_corpora_match_a_plain_implementation(tmp_path, monkeypatch, seed):
    generator = random.Random(seed)
    monkeypatch.setattr(data_extract, "CHUNK", generator.choice([7, 64, 512, 1024, 1 << 20]))
    contents = [
        START + b"".join(generator.choices(PARTS, k=generator.choice([1, 9, 300])))
        for _ in range(generator.randrange(1, 5))
    ]
    pack = generator.choice([v7, *(partial(tar, format=format) for format in FORMATS)])
    data = pack({f"{i}.txt": data for i, data in enumerate([b"", *contents])})
    files = {"a.xz": xz(data), "b.txt": data, "c.xz": xz(contents[0]), "d.txt": contents[0]}
    result, found = read_all(put(tmp_path, files))
    text = plain(contents[0])
    assert result == documents(contents) * 2 + text + text.removesuffix("\n") + "\n"
    sound = b"".join([*contents, contents[0]]).count("\ufffd".encode())
    assert found["invalid"] == result.count("\ufffd") - 2 * sound


# The whole corpus ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nesting", NESTINGS)
def test_every_nesting_of_a_corpus_gives_the_same_three_files(extract, nesting):
    corpus = shards(11)
    # A folder that is named may be hidden.
    files, _ = extract(NESTINGS[nesting](corpus), folder=".cache/in")
    assert files == three_files([documents(corpus[name]) for name in sorted(corpus)])


@pytest.mark.parametrize("nesting", IN_ONE_XZ)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_corpus_in_one_xz_gives_its_documents_in_their_order(extract, nesting, reverse):
    corpus = shards(11)
    subset = slice(15 if "outer" in nesting else 0)  # an outer tar holds one of the subsets
    names = sorted(sorted(corpus, reverse=reverse), key=lambda name: name[subset])
    corpus = {name: corpus[name] for name in names}
    files, said = extract({"openwebtext.tar.xz": xz(tar(IN_ONE_XZ[nesting](corpus)))})
    assert files == three_files(["".join(map(documents, corpus.values()))])
    assert f" of {11 if 'texts' in nesting else 33} " in said


@pytest.mark.skipif(not TINYSHAKESPEARE.is_dir(), reason="the corpora are not beside this folder")
def test_tinyshakespeare_comes_out_as_published(run_main, tmp_path):
    texts = [lzma.decompress(path.read_bytes()) for path in sorted(TINYSHAKESPEARE.iterdir())]
    for folder in (TINYSHAKESPEARE, put(tmp_path / "in", {"input.txt": b"".join(texts)})):
        assert run_main(SCRIPT, "-data_dir", folder).returncode == 0
        files = read_three(tmp_path)
        assert files[:2] == [b"".join(texts[:9]), texts[9]]
        assert list(map(len, files)) == [1_003_854, 111_540, 2 * 65]


@linux
@pytest.mark.parametrize("count", [1, None])
def test_the_number_of_cores_does_not_change_the_result(run_script, tmp_path, count):
    # The later ones are ready before the long one.
    corpus = shards(11) | {"urlsf_subset00-2_data": [b"long " * 400_000]}
    put(tmp_path / "in", as_outer_tars(corpus))
    cores = sorted(os.sched_getaffinity(0))[:count]
    run_script(SCRIPT, *IN_TO_OUT, preexec_fn=partial(os.sched_setaffinity, 0, cores))
    assert read_three(tmp_path / "out") == three_files(
        [documents(corpus[name]) for name in sorted(corpus)]
    )


@pytest.mark.parametrize(
    "sizes",
    [
        *([0], [7], [8], [997], [30_001], [400_000, 700], [3, 50_000, 9], [1] * 9),
        *map(range, (10, 11, 19, 20)),
    ],
)
def test_the_text_of_fewer_than_ten_files_is_cut_and_more_are_shared_out(
    extract, monkeypatch, sizes
):
    monkeypatch.setattr(data_extract, "CHUNK", 1024)
    choices = random.Random(len(sizes)).choices
    texts = ["".join(choices(FOREIGN[:-1] + "\nab", k=size)) + "." for size in sizes]
    files, said = extract({f"{i:02d}.txt": text.encode() for i, text in enumerate(texts)})
    assert files == three_files([text + "\n" for text in texts])
    # What is cut can't be told apart.
    assert said.count(f" of {len(sizes)} ") == (2 if len(sizes) < 10 else 0)


@pytest.mark.parametrize(
    ("least", "kept"),
    [
        (1, "\naéж你🙂"),
        (2, "\naж你\ufffd🙂"),
        (300, "\na你\ufffd🙂"),
        (301, "\na\ufffd🙂"),
        (10**6, "\na\ufffd"),
    ],
)
def test_min_count_leaves_rare_characters_out_of_the_vocabulary_only(
    extract, monkeypatch, least, kept
):
    monkeypatch.setattr(data_extract, "CHUNK", 64)
    texts = [f"a\né{'ж' * 299}", *["你" * 30 + "🙂" * 100] * 10]
    files, said = extract(
        {f"{i:02d}.xz": xz(text.encode()) for i, text in enumerate(texts)}, "-min_count", least
    )
    vocabulary = "".join(f"{character}\n" for character in kept)
    assert files == [*three_files(texts)[:2], vocabulary.encode()]
    assert f"vocabulary: {len(kept)} characters; " in said


def test_skip_corrupt_leaves_damaged_archives_out_and_lists_them(extract):
    files = {
        "a.tar": tar({"0.xz": SHORT, "1.xz": SHORT[:-4], "2.tar": tar({"3.xz": SHORT[:-4]})}),
        "b.txt": b"b",
        "zz.txt": b"last",
        **{f"down/{name}": data for name, data in DAMAGED.items()},
    }
    (train, val, vocab), said = extract(files, "-skip_corrupt")
    listed = re.findall(r"^left out: (.+?): ", said, re.MULTILINE)
    damaged = [f"down/{name}".replace("\x80", r"\x80") for name in DAMAGED]
    assert sorted(listed) == sorted(["a.tar/1.xz", "a.tar/2.tar/3.xz", *damaged])
    assert (train + val, vocab) == (b"a" * 700 + b"\n\nb\nlast\n", b"\n\na\nb\nl\ns\nt\n")


# Other runs, odd disks and files that are in use --------------------------------------------------


def test_a_second_run_that_reads_the_folder_it_writes_to_and_leftovers_give_the_same_files(
    run_main, tmp_path
):
    put(
        tmp_path,
        {
            "a.txt": b"first ",
            "b.txt": b"second",
            "data_extract.lock.tmp": b"",
            "data_extract.tmp/0": b"litter",
        },
    )
    for _ in range(2):
        assert run_main(SCRIPT, "-data_dir", ".").returncode == 0
        assert read_three(tmp_path) == three_files(["first \n", "second\n"])
        assert len(list(tmp_path.iterdir())) == 5


@pytest.fixture
def slow_corpus(tmp_path):
    """Archives that take seconds to read but give little text: each hides a member of 8 GB."""
    hidden = member(".hidden", size=0o77777777777).tobuf(tarfile.GNU_FORMAT)
    data = xz(tar({"a.txt": b"text"})[:1024] + hidden) + xz(bytes(1 << 24)) * 480
    return put(tmp_path / "slow", {f"{i}.xz": data for i in range(3)})


def test_a_second_run_is_told_so_and_a_killed_one_blocks_nothing(
    start_script, run_script, tmp_path, slow_corpus, yes_folder
):
    process = start_script(SCRIPT, "-data_dir", slow_corpus, "-output_dir", "out")
    wait_for(lambda: list((tmp_path / "out").glob("data_extract.tmp/*")), 60)
    assert_fails(
        run_script(SCRIPT, *IN_TO_OUT), "out: another run is at work on it; wait for its end$"
    )
    assert process.poll() is None
    process.kill()
    process.communicate()
    # Its workers end in moments. Before that, Windows removes no file that they have open.
    wait_for(lambda: run_script(SCRIPT, *IN_TO_OUT).returncode == 0, 30)
    assert only_outputs(tmp_path / "out") == OF_YES


# Windows opens no file that is about to be removed.
HELD = [BlockingIOError, *([PermissionError] if os.name == "nt" else [])]


def test_only_one_holds_a_lock_also_where_one_begins_as_another_ends(tmp_path):
    came_and_went = []

    def lock_often(name: str) -> None:
        for _ in range(300):
            with suppress(*HELD), data_extract.locked(tmp_path / "lock"):
                came_and_went.append(name)
                time.sleep(0)
                came_and_went.append(name)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lock_often, "abc"))  # raises what one of them raises
    assert came_and_went[::2] == came_and_went[1::2] != []
    assert not list(tmp_path.iterdir())


LOCK = "msvcrt.locking" if os.name == "nt" else "fcntl.flock"


@pytest.mark.parametrize(
    "no_lock",
    [
        *(errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL),
        # Windows means by these that another process has the lock.
        *(pytest.param(number, marks=posix) for number in (errno.EACCES, errno.EPERM)),
    ],
)
@pytest.mark.parametrize("no_fsync", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_may_know_no_locks_and_no_fsync(extract, monkeypatch, no_lock, no_fsync):
    monkeypatch.setattr(LOCK, Mock(side_effect=OSError(no_lock, os.strerror(no_lock))))
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(no_fsync, os.strerror(no_fsync))))
    assert extract(YES)[0] == OF_YES


FAST_CLOCK = iter(range(0, 1_000_000, 2)).__next__  # which spares waiting for three seconds


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("seconds", "clock"),
    [
        (0.5, time.monotonic),
        (60, FAST_CLOCK),
        *(
            pytest.param(n, time.monotonic, marks=pytest.mark.soak)
            for n in (0.1, 0.3, 1, 1.6, 2.5, 3.2, 4, 5, 60)
        ),
    ],
)
def test_an_output_that_is_open_elsewhere_is_waited_for_and_then_none_is_replaced(
    run_main, monkeypatch, tmp_path, yes_folder, name, seconds, clock
):
    monkeypatch.setattr(time, "monotonic", clock)
    out = put(tmp_path / "out", dict.fromkeys(NAMES, b"earlier"))

    def refuse(*paths):  # as Windows does it
        if out / name in map(Path.absolute, paths) and not file.closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), *map(str, paths))
        return DEFAULT  # which lets the mock rename it

    with open(out / name, "rb") as file:
        timer = threading.Timer(seconds, file.close)
        timer.start()
        if os.name == "posix":
            monkeypatch.setattr(os, "replace", Mock(wraps=os.replace, side_effect=refuse))
        result = run_main(SCRIPT, *IN_TO_OUT)
        timer.cancel()
    if seconds > 4 or result.returncode:
        assert_fails(result, rf"{name}: .*; does another program have it open\?")
    assert seconds > 2 or result.returncode == 0
    assert only_outputs(out) == ([b"earlier"] * 3 if result.returncode else OF_YES)


@pytest.mark.parametrize("number", range(1, 7))
def test_the_three_outputs_are_replaced_together_or_not_at_all(
    run_main, earlier, monkeypatch, yes_folder, number
):
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if target in calls[number - 1 : number]:  # it is mounted, say, and so it fails again
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source), None, str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert_fails(
        run_main(SCRIPT, *IN_TO_OUT),
        rf"out/(output_train|output_val|vocab)\.txt: {os.strerror(errno.EBUSY)}",
    )


def test_a_folder_in_the_place_of_an_output_is_not_touched(
    run_main, tmp_path, yes_folder, monkeypatch
):
    monkeypatch.setattr(time, "monotonic", FAST_CLOCK)
    out = put(tmp_path / "out", {"vocab.txt/precious": b"", "output_val.txt": b""})
    assert_fails(run_main(SCRIPT, *IN_TO_OUT), r"out/vocab\.txt: ")
    assert {path.name for path in out.rglob("*")} == {"output_val.txt", "precious", "vocab.txt"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_outputs_are_replaced_leaves_all_of_them_new(
    extract, monkeypatch, tmp_path, number
):
    def replace(*paths) -> None:
        signal.raise_signal(number)
        os.rename(*paths)
        signal.raise_signal(number)

    monkeypatch.setattr(os, "replace", replace)
    put(tmp_path, {"out/vocab.txt": b"earlier"})
    assert extract(YES)[0] == OF_YES


@posix
@pytest.mark.parametrize(
    ("files", "limit", "full"),
    [
        ({"a.txt": b"a" * 50_000, "b.xz": xz(b"b" * 500_000)}, 20_000, "0"),
        ({"a.txt": b"a" * 15_000, "b.txt": b"b" * 15_000}, 20_000, "output_train.txt"),
        ({"a.txt": "".join(map(chr, range(0x4E00, 0x6188))).encode()}, 17_000, "vocab.txt"),
    ],
)
def test_a_full_disk_is_reported_in_one_line(run_script, earlier, tmp_path, files, limit, full):
    put(tmp_path / "in", files)
    resource = pytest.importorskip("resource")
    result = run_script(
        SCRIPT,
        *IN_TO_OUT,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert_fails(result, f"data_extract.tmp/{full}: {os.strerror(errno.EFBIG)}")


def test_no_output_is_written_and_then_reported_as_failed_however_long_its_path(
    run_main, tmp_path, yes_folder
):
    out = Path(*["long" * 20] * 4)
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", out)
    written = [name for name in NAMES if os.path.exists(tmp_path / out / name)]
    assert written == ([] if result.returncode else [*NAMES]), result.stderr


# Signals and streams ------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(
    ("number", "reached", "status", "said"),
    [
        (2, slice(None), 130, ["data_extract.py: interrupted; nothing was changed"]),
        (15, slice(-1, None), 143, []),
        (
            9,
            slice(1),
            1,
            ["data_extract.py: a worker process was killed, perhaps for want of memory; run again"],
        ),
    ],
)
def test_a_run_that_ends_by_a_signal_changes_nothing(
    start_script, earlier, slow_corpus, number, reached, status, said
):
    def workers() -> list[int]:
        return [pid for pid, line in processes_of(process.pid).items() if "spawn_main" in line]

    process = start_script(SCRIPT, "-data_dir", slow_corpus, "-output_dir", earlier)
    # Each worker is at work then, past the moment at which it ignores Ctrl-C.
    wait_for(lambda: 0 < len(workers()) <= len(list(earlier.glob("data_extract.tmp/*"))))
    # Ctrl-C on a terminal reaches every process, here the parent last. What kills may take one.
    for pid in [*workers(), process.pid][reached]:
        time.sleep(0.05)
        os.kill(pid, number)
    _, stderr = process.communicate(timeout=10)
    assert (process.returncode, notices(stderr)) == (status, said)
    wait_for(lambda: not processes_of(process.pid))


def test_ctrl_c_is_seen_while_a_worker_is_waited_for(monkeypatch):
    pool = MagicMock(__exit__=Mock(return_value=None))
    pool.__enter__().submit.return_value = Future()  # which is never done
    monkeypatch.setattr(data_extract, "ProcessPoolExecutor", lambda *_: pool)
    # On Windows, Ctrl-C sets a flag, as this does, and ends no wait.
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        next(data_extract.extract_all([Mock()], Path()))


class Terminal(io.StringIO):
    """A stream as IDLE has it: a terminal that can't be reconfigured."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [lambda: None, io.StringIO, Terminal])
def test_streams_may_be_missing_or_others_than_usual_and_a_terminal_shows_a_bar(
    extract, run_main, stream
):
    streams = {"stdout": stream(), "stderr": stream()}
    files, _ = extract({f"{i}.txt": "text é\n".encode() * 200 for i in range(3)}, **streams)
    assert files == three_files(["text é\n" * 600])
    if stream is Terminal:
        assert re.search(r"4\.80k/4\.80k.*3 of 3 files", streams["stderr"].getvalue())
    assert run_main(SCRIPT, "-data_dir", "gone", **streams).returncode == 1


@posix  # Windows has no such names
@pytest.mark.parametrize("flags", [[], ["-skip_corrupt"]])
def test_control_characters_in_names_are_escaped(run_main, tmp_path, flags):
    put(tmp_path / "in", YES | {"\x1b]52;c;aGk=\x07\x9b31m\n\ta.xz": b""})
    result = run_main(SCRIPT, *IN_TO_OUT, *flags)
    assert r"\x1b]52;c;aGk=\x07\x9b31m\n" + "\ta" in result.stdout + result.stderr
    assert not re.findall(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", result.stdout + result.stderr)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_has_gone_costs_no_output(run_script, tmp_path, closed):
    put(tmp_path / "in", YES | {"c.md": b"passed over"})
    reader, writer = os.pipe()
    os.close(reader)
    run_script(SCRIPT, "-data_dir", "in", **{closed: writer})
    os.close(writer)
    assert read_three(tmp_path) == OF_YES


# The built-in sample and the summary --------------------------------------------------------------


def test_without_flags_the_built_in_sample_is_used_or_else_an_openwebtext_folder(
    run_script, tmp_path
):
    notice = run_script(SCRIPT).stderr
    assert re.fullmatch("no openwebtext folder here: .*, the Python reference\n", notice)
    train, val, vocab = only_outputs(tmp_path)
    assert len(train) == int(0.9 * len(train + val)) > 300_000 and b"lambda" in train
    # All of printable ASCII, so that the committed file is that of every version of Python.
    printable = b"".join(bytes([code, 10]) for code in [10, *range(32, 127)])
    assert vocab == (ROOT / "vocab.txt").read_bytes() == printable
    put(tmp_path / "openwebtext", YES)
    assert run_script(SCRIPT).stderr == "" and read_three(tmp_path) == OF_YES


def test_the_sample_has_every_printable_character_whatever_a_python_has_to_say(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "pydoc_data.topics.topics",
        {"odd": "tab\there, caf\u00e9 \u201cquoted\u201d \u4f60\x07", "no": ""},
    )
    data_extract.write_sample(tmp_path)
    text, _ = read_all(tmp_path)
    assert {*text} == {"\n", *map(chr, range(32, 127))}
    assert text.endswith('\n\ntabhere, cafe "quoted" \n\n')


def test_the_summary_counts_texts_and_invalid_sequences_and_names_archives_with_many(
    run_main, tmp_path
):
    data = xz(tar({"1.txt": "é".encode() * 6000, "2.txt": b"abcdef\xff"}))
    put(
        tmp_path / "in",
        {
            **{f"{i}.xz": data for i in range(8)},
            "8.txt": b"d\xe9j\xe0" * 99 + b"a" * 594,
            "9.txt": b"lost bytes \x81\n" * 99,
        },
    )
    said = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "new/out").stdout
    assert re.sub(" +", " ", said).splitlines()[1:] == [
        "training 17 49,079 0.10",
        "validation 1 1,287 0.00",
        "vocabulary: 16 characters; invalid sequences replaced by U+FFFD: 305",
        "8.txt: 20 % of its characters are not UTF-8 (NULs included)",
        "9.txt: 8 % of its characters are not UTF-8 (NULs included)",
        f"wrote output_train.txt, output_val.txt, vocab.txt in {tmp_path / 'new' / 'out'}",
    ]


# Long campaigns: pytest -m soak -------------------------------------------------------------------

# Ends as by a kill at the n-th renaming.
KILLED = """
import os, sys
import data_extract
real, left = os.replace, [int(sys.argv.pop(1))]
def replace(*paths):
    left[0] -= 1
    if not left[0]:
        os._exit(9)
    real(*paths)
os.replace = replace
sys.exit(data_extract.main())
"""


@pytest.mark.parametrize(
    "call", [5, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 8))]
)
def test_a_kill_between_the_replacements_leaves_what_training_refuses_or_whole_files(
    extract, tmp_path, yes_folder, call
):
    out = put(tmp_path / "out", dict.fromkeys(NAMES, b"former"))
    command = [sys.executable, "-c", KILLED, str(call), "-data_dir", yes_folder, "-output_dir", out]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == (9 if call < 7 else 0)
    left = read_three(out) if (out / "vocab.txt").exists() else "what training refuses"
    assert left == {1: [b"former"] * 3, 7: OF_YES}.get(call, "what training refuses")
    assert extract(YES)[0] == OF_YES


# Run by a small process, since one that a large one starts counts the memory of that at first.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
LINE = f"{FOREIGN} {'The quick brown fox jumps over the lazy dog. ' * 20}".encode()
ENDLESS = tar({"a": b"a"})[:1024]


def repeated(block: bytes, size: int) -> bytes:
    """Return an .xz file of `block` repeated to at least `size` bytes, quickly made."""
    block *= (32 << 20) // len(block)
    return xz(block) * -(-size // len(block))


@pytest.mark.soak
@posix
@pytest.mark.parametrize(
    ("name", "data", "size"),
    [
        ("lines.xz", lambda: repeated(LINE + b"\n", 10 << 30), 10 << 30),
        (
            "one line.xz",
            lambda: (
                xz(member("a.txt", size=4 << 30).tobuf(tarfile.GNU_FORMAT))
                + repeated(LINE[:512], 4 << 30)
                + xz(bytes(1024))
            ),
            4 << 30,
        ),
        ("in it.tar.xz", lambda: xz(tar({"lines.xz": repeated(LINE + b"\n", 4 << 30)})), 4 << 30),
        ("short documents.xz", lambda: repeated(ENDLESS, 1 << 30) + xz(bytes(1024)), 3 << 20),
        ("short documents.tar", lambda: ENDLESS * 900_000 + bytes(1024), 2_700_000),
        ("endless newlines.xz", lambda: xz(b"ab") + repeated(b"\n", 1 << 30), 1 << 30),
    ],
)
def test_memory_stays_bounded_whatever_is_in_an_archive(tmp_path, name, data, size):
    put(tmp_path / "in", {name: data()})
    measured = subprocess.check_output(
        [sys.executable, "-c", MEASURE, sys.executable, data_extract.__file__, *IN_TO_OUT],
        cwd=tmp_path,
    )
    kilobyte = 1e3 if sys.platform == "darwin" else 1
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) >= size
    assert int(measured) / kilobyte < 300_000  # of the largest process, workers included
    shutil.rmtree(tmp_path / "out")
