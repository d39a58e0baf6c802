"""data_extract.py gives clean text from archives of every nesting, or one line that says what is
wrong.
"""

import errno
import io
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import archives
import pytest
from archives import (
    FOREIGN,
    NAMES,
    SHORT,
    TEXT,
    documents,
    flip,
    member,
    plain,
    read_three,
    tar,
    three_files,
    v7,
    xz,
)
from conftest import assert_fails, linux, notices, posix, processes_of, put, wait_for

import data_extract
from data_extract import Damaged, find_archives

SCRIPT = "data_extract.py"
TINYSHAKESPEARE = Path(__file__).resolve().parents[2] / "shared" / "corpora" / "tinyshakespeare"
IN_TO_OUT = ["-data_dir", "in", "-output_dir", "out"]
YES = {"a.txt": b"yes\n", "b.txt": b"yes\n"}
LIKE_OTHER_DATA = [
    "RIFF as WAVE is",
    "%PDF-1.7 is",
    "BZh91AY&SY is",
    "GIF89a\n\tis",
    "\x1b[1mbold" * 90,
]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
TAR_NAMES = pytest.mark.parametrize("name", ["a.tar", "a.txt", "a.xz"])


def pack(name: str, data: bytes) -> dict[str, bytes]:
    return {name: xz(data) if name.endswith(".xz") else data}


def read_all(folder: Path) -> tuple[str, Counter]:
    """Return the clean text of all archives in a folder, one after the other, and its counts.
    Raises Damaged.
    """
    part = folder.parent / f"{folder.name}.part"
    total, texts = Counter(), []
    for archive in find_archives(folder)[0]:
        counts, seen, damage = data_extract.extract_archive(archive, part)
        if damage:
            raise Damaged(damage)
        texts.append(part.read_bytes().decode())
        assert seen.keys() == set(texts[-1]) and counts["characters"] == len(texts[-1])
        total.update(counts)
    return "".join(texts), total


def passed_over(result: subprocess.CompletedProcess) -> list[str]:
    return sorted(re.findall(r"^passed over \((.+)$", result.stdout, re.MULTILINE))


@pytest.fixture
def earlier(tmp_path):
    """An output folder with the files of an earlier run; checks that a test leaves it as it was."""
    contents = {name: f"{name} of an earlier run".encode() for name in NAMES}
    folder = put(tmp_path / "out", contents)
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


# Finding archives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [
        ["b/1.txt", "a/2.txt", "3.txt"],
        ["b.tar/y/0.xz", "z/1.xz", "a.tar/x/2.xz"],
        ["0/1.xz", "a.tar/1.xz", "b.tar/1.xz"],
        ["10.txt", "9.txt", "B.txt", "a.txt"],
    ],
)
def test_archives_are_sorted_by_their_own_file_name_then_by_path(tmp_path, order):
    for name in reversed(order):
        content = xz(name.encode() + b" ") if name.endswith(".xz") else name.encode()
        folder, _, rest = name.partition("/")
        put(tmp_path, {folder: tar({rest: content})} if ".tar/" in name else {name: content})
    assert read_all(tmp_path)[0].split() == order


def test_hidden_files_outputs_and_other_kinds_are_never_corpus_and_are_counted(run_main, tmp_path):
    hidden = [".a.txt", "._b.xz", ".c.tar", ".d/e.txt", "f/.g/h/i.xz", "..a/b.txt"]
    outputs = [*NAMES, "down/train_split.txt", "down/VAL_split.TXT", "requirements.txt"]
    others = [
        "README.md",
        "vocab.json",
        "xz",
        "a.txt.bak",
        "b.tmp",
        *(f"{i}.jsonl" for i in range(1200)),
    ]
    put(tmp_path / "in", YES | dict.fromkeys([*hidden, *outputs, *others], b"no"))
    members = [
        "._a.txt",
        ".x/a.txt",
        "x/.y/a.txt",
        ".a.xz",
        ".b.tar",
        "./.f",
        f"{'long/' * 20}.a.txt",
    ]
    members += ["x/vocab.txt", "train_split.txt"]
    for format in FORMATS:
        data = tar({**dict.fromkeys(members, b"no"), "a.txt": b"yes"}, format)
        put(tmp_path / "in", {f"c{format}.tar": data, f"d{format}.xz": xz(data)})
    result = run_main(SCRIPT, "-data_dir", "in")
    assert read_three(tmp_path) == three_files(["yes\n"] * 2 + ["yes\n\n"] * 6)
    assert passed_over(result) == [
        "an output of these scripts, or requirements.txt): 18",
        "hidden): 48",
        'no .tar, .xz or .txt file; see README, "Other kinds of data"): 1,205',
    ]


@posix
def test_links_are_followed_but_nothing_is_read_twice_and_pipes_and_dead_links_are_passed_over(
    run_script, tmp_path
):
    put(
        tmp_path,
        {"elsewhere/b.txt": b"second\n", "in/a.txt": b"first\n", "in/sub/c.txt": b"third\n"},
    )
    links = {
        "in/one": "../elsewhere",
        "in/two": "../elsewhere",
        "in/same.txt": "a.txt",
        "in/loop.xz": "loop.xz",
    }
    links |= {
        "in/sub/round": "../../in",
        "in/sub/self": ".",
        "in/gone.txt": "nowhere",
        "in/gone.tar": "nowhere",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    os.mkfifo(tmp_path / "in/pipe.txt")
    result = run_script(SCRIPT, "-data_dir", "in", timeout=20)
    assert read_three(tmp_path) == three_files(["first\n", "second\n", "third\n"])
    kind = 'no .tar, .xz or .txt file; see README, "Other kinds of data"'
    assert passed_over(result) == ["a link to what is read anyway): 4", f"{kind}): 4"]


def test_a_sample_is_the_same_for_every_nesting_and_grows_with_the_rate(run_main, tmp_path):
    corpus, taken = archives.shards(40), []
    runs = [(archives.as_files, 7, 10), (archives.as_outer_tars, 7, 10), (archives.as_files, 8, 10)]
    for packed, seed, count in [*runs, (archives.as_files, 7, 20)]:
        args = ["-data_dir", put(tmp_path / packed.__name__, packed(corpus)), "-output_dir", "out"]
        assert run_main(SCRIPT, *args, "-sample_rate", count / 40, "-seed", seed).returncode == 0
        files = read_three(tmp_path / "out")
        taken.append(
            [
                name
                for name in sorted(corpus)
                if documents(corpus[name]).encode() in b"".join(files[:2])
            ]
        )
        assert len(taken[-1]) == count
        assert files == three_files([documents(corpus[name]) for name in taken[-1]])
    assert taken[0] == taken[1] != taken[2] and set(taken[0]) < set(taken[3])


# Reading one archive ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.txt": b"one", "b.txt": b"two\r\n", "c.txt": b"three\n\n", "d.txt": b"four"}, "one\ntwo\nthree\n\nfour\n"),
        ({"a.xz": xz(b"one text cut in"), "b.xz": xz(b" two")}, "one text cut in two"),
        ({"A.TXT": b"A", "B.XZ": xz(b"B"), "C.TAR": tar({"D.XZ": xz(b"D"), "E.TXT": b"E"})}, "A\nBE\n\nD"),
        ({"a.tar": tar({"./a.txt": b"a", "../b.txt": b"b", "x/../c.txt": b"c"})}, "a\n\nb\n\nc\n\n"),
        ({"a.tar": v7({"x/": b"", "x/1.xz": xz(b"a"), "x/2.xz": xz(b"b")})}, "ab"),
        ({"a.txt": b"one", "b.txt": b"", "c.xz": xz(b""), "d.txt": b"two\n\n\n"}, "one\ntwo\n\n\n"),
        ({"a.tar.xz": xz(TEXT)}, plain(TEXT)),
        ({"a.tar": tar({"b.xz": xz(b"packed"), "c.txt": b"text"})}, "text\n\npacked"),
        ({"a.tar": tar({}), "b.xz": xz(b"b"), "c.xz": xz(tar({}))}, "b"),
        ({"a.xz": xz(TEXT) + xz(b"") + xz(b"more")}, plain(TEXT) + "more"),
        ({"a.xz": xz(tar({"a": TEXT})[:700]) + xz(tar({"a": TEXT})[700:])}, documents([TEXT])),
        ({"a.tar": tar({}) + tar({"1.xz": xz(b"one")}) + tar({"2.xz": xz(b"two")})}, "onetwo"),
        ({"a.xz": xz(tar({"a": b"a"}) + bytes(1 << 20))}, "a\n\n"),
    ],
)  # fmt: skip
def test_archives_are_read_by_what_they_hold(tmp_path, files, expected):
    assert read_all(put(tmp_path, files))[0] == expected


KINDS = [
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
]
TARGETS = [(0, "long/" * 50), (0, "../../etc/passwd"), (5000, "/etc/passwd")]
NO_FILES = [member("no.xz", kind, size, target) for kind in KINDS for size, target in TARGETS]
UNKNOWN = [(member("unknown", kind, 700), b"z" * 700) for kind in (b"Z", tarfile.XGLTYPE)]
A_AND_B = {"a": b"a", "b": b"b"}
ONE, TWO = tar({"a": b"a"}), tar({"b": b"b"}, tarfile.PAX_FORMAT)
MEMBERS = {
    "a.txt": TEXT,
    "long/" * 18 + "b.txt": b"b" * 512,
    "c.txt": b"",
    "d.txt": b"d" * 513,
    "e.txt": b"e" * 1024,
}


@TAR_NAMES
@pytest.mark.parametrize(
    ("data", "members"),
    [
        (v7(MEMBERS), MEMBERS),
        *((tar(MEMBERS, format), MEMBERS) for format in FORMATS),
        (tar({"long/" * 100 + "a": TEXT, "b": b"b"}, tarfile.GNU_FORMAT), {"a": TEXT, "b": b"b"}),
        (tar({"long/" * 100 + "a": TEXT, "Привет": b"b"}, tarfile.PAX_FORMAT), {"a": TEXT, "b": b"b"}),
        (archives.pax(b"12 size=700\n", (member("a"), b""))[:1536] + b"a" * 700 + bytes(324 + 1024), {"a": b"a" * 700}),
        (tar([(member("a", tarfile.CONTTYPE, 1), b"a"), (member("b", tarfile.AREGTYPE, 1), b"b")]), A_AND_B),
        (tar([("a\udcff.txt", b"a")]), {"a": b"a"}),
        (tar([("a", b"a"), *((info, b"") for info in NO_FILES), *UNKNOWN, ("b", b"b")]), A_AND_B),
        (ONE + TWO, A_AND_B),
        (ONE[:1024] + bytes(512) + TWO, A_AND_B),
        (ONE + v7({"b": b"b"}) + bytes(3000), A_AND_B),
    ],
)  # fmt: skip
def test_every_kind_of_tar_gives_its_documents_and_nothing_else(tmp_path, name, data, members):
    assert read_all(put(tmp_path, pack(name, data)))[0] == documents(list(members.values()))


@pytest.mark.parametrize(
    "content", [tar({"a": b"a" * 700, "b": b"b"}), b"text"], ids=["tar", "text"]
)
def test_no_byte_of_an_xz_file_can_be_lost_or_changed_unnoticed(tmp_path, content):
    packed = lzma.compress(content) + lzma.compress(content)
    damaged = [packed[:end] for end in range(0, len(packed), 3) if end != len(packed) // 2]
    damaged += [flip(packed, at) for at in range(0, len(packed), 2)]
    for data in damaged:
        with pytest.raises(Damaged):
            read_all(put(tmp_path, {"a.xz": data}))


CUT = tar({"a": b"a" * 700, "b": b"b"})
OUTER, OUTER_MEMBER = archives.OUTER, archives.OUTER_MEMBER


@TAR_NAMES
@pytest.mark.parametrize(
    "data",
    [
        *(CUT[:end] for end in (400, 512, 1024, 1100, 1536, 2048, 2560)),
        *(ONE + b"text" * 500, ONE + TWO[:800], ONE + bytes(512) + flip(TWO, 3)),
        tar([("a", b"a"), (member("hole.txt", tarfile.GNUTYPE_SPARSE, 512), b"x" * 512)]),
        archives.pax(
            b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
            ("hole.txt", b"1\n0\n4\n" + bytes(506)),
        ),
        archives.pax(b"26 GNU.sparse.map=0,4,9,1\n", ("hole.txt", b"text!")),
        *(
            OUTER[:end]
            for end in (
                100,
                512,
                600,
                OUTER_MEMBER + 100,
                2 * OUTER_MEMBER - 1,
                2 * OUTER_MEMBER + 512,
            )
        ),
        *(flip(OUTER, OUTER_MEMBER * i + at) for i in (1, 2) for at in (0, 130, 150, 258)),
        OUTER[: 2 * OUTER_MEMBER],
        OUTER[:OUTER_MEMBER] + b"not a header" * 100 + OUTER[OUTER_MEMBER:],
    ],
)
def test_a_tar_that_is_cut_sparse_or_followed_by_something_else_is_damaged(tmp_path, name, data):
    with pytest.raises(Damaged):
        read_all(put(tmp_path, pack(name, data)))


def test_random_damage_is_reported_or_gives_no_more_text_than_there_was(tmp_path):
    generator = random.Random(0)
    sound = tar({"a.txt": TEXT, "long/" * 30 + "b": b"b" * 700, "c.txt": b"c"}, tarfile.PAX_FORMAT)
    for _ in range(200):
        data = bytearray(sound)
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(len(sound))] = generator.randrange(256)
        damaged = bytes(data[: generator.choice([len(sound), generator.randrange(len(sound))])])
        with suppress(Damaged):
            assert len(
                read_all(put(tmp_path, {"a.tar": damaged, "b.xz": xz(damaged)}))[0]
            ) < 2 * len(sound)


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


@pytest.mark.parametrize("kind", archives.NOT_TEXT)
@pytest.mark.parametrize("name", ["a.txt", "a.xz"])
def test_other_data_under_the_name_of_a_text_is_refused_or_left_out_and_listed(
    run_main, tmp_path, kind, name
):
    put(tmp_path / "in", YES | pack(name, archives.NOT_TEXT[kind]) | {"c.txt": b"yes\n"})
    # Behind NULs, an .xz is taken for a tar.
    reason = r"(it is not text: (a NUL is|\d+ % of its characters are not UTF-8)|the tar in it is damaged)"
    assert_fails(
        run_main(SCRIPT, *IN_TO_OUT), f"{name}: {reason}.*, or leave it out with -skip_corrupt"
    )
    assert not list((tmp_path / "out").iterdir())
    result = run_main(SCRIPT, *IN_TO_OUT, "-skip_corrupt")
    assert re.search(rf"^left out: {name}: {reason}", result.stdout, re.MULTILINE)
    assert b"".join(read_three(tmp_path / "out")[:2]).strip(b"yes\n") == b""


@TAR_NAMES
def test_members_of_a_tar_that_are_not_text_are_left_out_and_counted(run_main, tmp_path, name):
    others = archives.NOT_TEXT | {"1.tar": OUTER}
    others |= (
        {} if name == "a.tar" else {"1.tar.xz": SHORT, "1.xz": SHORT}
    )  # there they are archives of their own
    put(tmp_path / "in", pack(name, tar({"0.txt": b"first", **others, "zz.txt": b"last"})))
    result = run_main(SCRIPT, "-data_dir", "in")
    assert read_three(tmp_path) == three_files(["first\n\nlast\n\n"]), result.stderr
    assert f"passed over (not text): {len(others)}\n" in result.stdout
    assert "replaced by U+FFFD: 0\n" in result.stdout


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("chunk", [7, 1023, 1 << 20])
def test_utf_16_with_a_byte_order_mark_is_decoded(tmp_path, monkeypatch, chunk, encoding):
    monkeypatch.setattr(data_extract, "CHUNK", chunk)
    text = f"{FOREIGN}\r\n" * 40 + "last"
    data = f"\ufeff{text}".encode(encoding)
    put(
        tmp_path,
        {"a.txt": data, "b.xz": xz(data), "c.xz": xz(tar({"a": data, "b": data[:100], "c": b"c"}))},
    )
    result, counts = read_all(tmp_path)
    utf_8, start = text.encode(), data[:100].decode("utf-16").encode()
    assert result == archives.text_file(utf_8) + plain(utf_8) + documents([utf_8, start, b"c"])
    assert counts["invalid"] == 0


@pytest.mark.parametrize(
    ("data", "text", "document", "replaced"),
    [
        (b"a\r\nb\rc\nd", "a\nb\nc\nd", "a\nb\nc\nd\n\n", 0),
        (b"a\n\r\n\r\r\n", "a\n\n\n\n", "a\n\n", 0),
        (b"\n\n a \n\n", "\n\n a \n\n", "\n\n a \n\n", 0),
        (archives.BOM + b"a", "a", "a\n\n", 0),
        (
            archives.BOM + archives.BOM + b"a" + archives.BOM,
            "\ufeffa\ufeff",
            "\ufeffa\ufeff\n\n",
            0,
        ),
        (archives.BOM, "", "", 0),
        (b"\r\n\r\n", "\n\n", "", 0),
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
        *((text.encode(), text, f"{text}\n\n", 0) for text in LIKE_OTHER_DATA),
    ],
)
def test_text_comes_out_as_valid_utf_8_with_plain_line_ends(
    tmp_path, data, text, document, replaced
):
    put(
        tmp_path,
        {
            "a.txt": data,
            "b.xz": xz(data),
            "c.tar": tar({"a": data}),
            "d.xz": xz(tar({"a": data, "b": b"b"})),
        },
    )
    result, counts = read_all(tmp_path)
    end = "\n" if text and not text.endswith("\n") else ""  # that a .txt gets
    assert result == text + end + text + 2 * document + "b\n\n"
    assert counts["invalid"] == 4 * replaced


@pytest.mark.parametrize("seed", range(6))
def test_random_corpora_match_a_plain_implementation(tmp_path, monkeypatch, seed):
    generator = random.Random(seed)
    parts = [*FOREIGN * 2, "word ", "\ufffd", b"\xff", b"\xe2\x82", b"\x80", b"\xf0\x9f"]
    ends = ["\n", "\r\n", "\r", "\n\n", "", "", ""]

    def content() -> bytes:
        pairs = (
            (generator.choice(parts), generator.choice(ends))
            for _ in range(generator.choice([0, 1, 9, 300]))
        )
        data = b"".join(
            part.encode() if isinstance(part, str) else part for pair in pairs for part in pair
        )
        data = data and b"what is not text is left out, so most of this is valid. " * 9 + data
        return (
            generator.choice([b"", b"", archives.BOM])
            + data
            + generator.choice([b"", b"\n", b"\r\n\r\n"])
        )

    for round in range(25):
        monkeypatch.setattr(data_extract, "CHUNK", generator.choice([7, 64, 512, 1024, 1 << 20]))
        contents = [content() for _ in range(generator.randrange(1, 5))]
        members = {f"{i}.txt": data for i, data in enumerate(contents)}
        format = generator.choice([*FORMATS, None])
        data = v7(members) if format is None else tar(members, format)
        texts = [documents(contents)] * 2
        if generator.random() < 0.5:
            data = contents[0]
            texts = [plain(data), archives.text_file(data)]
        result, found = read_all(put(tmp_path / str(round), {"a.xz": xz(data), "b.txt": data}))
        assert result == "".join(texts)
        assert found["invalid"] == result.count("\ufffd") - 2 * data.count("\ufffd".encode())


# The whole corpus ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nesting", archives.NESTINGS)
def test_every_nesting_of_a_corpus_gives_the_same_three_files(run_main, tmp_path, nesting):
    corpus = archives.shards(11)
    put(
        tmp_path / ".cache/in", archives.NESTINGS[nesting](corpus)
    )  # a folder that is named may be hidden
    result = run_main(SCRIPT, "-data_dir", ".cache/in", "-output_dir", "out")
    assert result.returncode == 0, result.stderr
    assert read_three(tmp_path / "out") == three_files(
        [documents(corpus[name]) for name in sorted(corpus)]
    )


@pytest.mark.skipif(not TINYSHAKESPEARE.is_dir(), reason="the corpora are not beside this folder")
def test_tinyshakespeare_comes_out_as_published(run_main, tmp_path):
    texts = [lzma.decompress(path.read_bytes()) for path in sorted(TINYSHAKESPEARE.iterdir())]
    for folder in (
        TINYSHAKESPEARE,
        put(tmp_path / "in", {"input.txt": b"".join(texts)}),
    ):  # ten texts, and one
        assert run_main(SCRIPT, "-data_dir", folder).returncode == 0
        train, val, vocab = read_three(tmp_path)
        assert (train, val) == (b"".join(texts[:9]), texts[9])
        assert (len(train.decode()), len(val.decode()), len(set(vocab.decode()))) == (
            1_003_854,
            111_540,
            65,
        )


@linux
def test_the_number_of_cores_does_not_change_the_result(run_script, tmp_path):
    corpus = archives.shards(11)
    corpus["urlsf_subset00-2_data"] *= 2500  # the later ones are ready before it
    put(
        tmp_path / "in",
        archives.as_outer_tars({name: [b"\n".join(texts)] for name, texts in corpus.items()}),
    )
    cores = sorted(os.sched_getaffinity(0))
    for count in {1, len(cores)}:
        run_script(SCRIPT, *IN_TO_OUT, preexec_fn=lambda: os.sched_setaffinity(0, cores[:count]))  # noqa: B023
        expected = three_files([documents([b"\n".join(corpus[name])]) for name in sorted(corpus)])
        assert read_three(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [7],
        [8],
        [997],
        [30_001],
        [400_000, 700],
        [3, 50_000, 9],
        [1] * 9,
        *map(range, (10, 11, 19, 20)),
    ],
)
def test_the_text_of_fewer_than_ten_files_is_cut_and_more_are_shared_out(
    run_main, monkeypatch, tmp_path, sizes
):
    monkeypatch.setattr(data_extract, "CHUNK", 1024)
    characters = FOREIGN[:-1] + "\nab"
    texts = [
        "".join(random.Random(i + size).choices(characters, k=size)) + "."
        for i, size in enumerate(sizes)
    ]
    put(tmp_path / "in", {f"{i:02d}.txt": text.encode() for i, text in enumerate(texts)})
    result = run_main(SCRIPT, "-data_dir", "in")
    assert read_three(tmp_path) == three_files([text + "\n" for text in texts])
    assert result.stdout.count(f" of {len(sizes)} ") == (
        2 if len(sizes) < 10 else 0
    )  # cut, they can't be told apart


@pytest.mark.parametrize("seed", range(8))
def test_min_count_leaves_rare_characters_out_of_the_vocabulary_only(
    run_main, tmp_path, monkeypatch, seed
):
    generator = random.Random(seed)
    chunk, length = generator.choice([(64, 2000), (1024, 10_000), (1 << 20, 10_000)])
    monkeypatch.setattr(data_extract, "CHUNK", chunk)
    kinds = ["ab\n\t~\x07", "éж\x80\u07ff", "你\u0800\uffff\ufffd\ufeff", "🙂\U0010ffff𝔘"]
    pool = [*generator.choice(kinds), *FOREIGN, *"ab\n~"]
    weights = [generator.choice([1, 1, 3, 30, 1000]) for _ in pool]
    texts = [
        "a" + "".join(generator.choices(pool, weights, k=generator.randrange(length)))
        for _ in range(seed + 1)
    ]
    put(tmp_path / "in", {f"{i:02d}.xz": xz(text.encode()) for i, text in enumerate(texts)})
    counts = Counter("".join(texts))
    least = generator.choice([1, 2, 5, 100, 1000, 10**6])
    rare = {c for c, count in counts.items() if count < least and not c.isascii()} - {"\ufffd"}
    expected = {*counts} - rare | ({"\ufffd"} if rare else set())
    result = run_main(SCRIPT, "-data_dir", "in", "-min_count", least)
    assert read_three(tmp_path)[:2] == three_files(texts)[:2]
    assert read_three(tmp_path)[2].decode() == "".join(
        f"{character}\n" for character in sorted(expected)
    )
    assert f"vocabulary: {len(expected):,} characters; " in result.stdout


def test_a_second_run_that_reads_the_folder_it_writes_to_and_leftovers_give_the_same_files(
    run_main, tmp_path
):
    leftovers = {"data_extract.lock.tmp": b"", "data_extract.tmp/0": b"litter"}
    put(tmp_path, {"a.txt": b"first ", "b.txt": b"second", **leftovers})
    for _ in range(2):
        assert run_main(SCRIPT, "-data_dir", ".").returncode == 0
        assert read_three(tmp_path) == three_files(["first \n", "second\n"])
        assert len(list(tmp_path.iterdir())) == 5


def test_skip_corrupt_leaves_damaged_archives_out_and_lists_them(run_main, tmp_path):
    put(tmp_path / "in", {f"down/{name}": content for name, content in archives.DAMAGED.items()})
    put(
        tmp_path / "in",
        {"a.tar": tar({"0.xz": SHORT, "1.xz": SHORT[:-4]}), "b.txt": b"b", "zz.txt": b"last"},
    )
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "out", "-skip_corrupt")
    assert (result.returncode, notices(result.stderr)) == (0, [])
    listed = sorted(re.findall(r"^left out: (.+?): ", result.stdout, re.MULTILINE))
    damaged = [f"down/{name}".replace("\x80", r"\x80") for name in archives.DAMAGED]
    assert listed == sorted(["a.tar/1.xz", *damaged])
    train, val, vocab = read_three(tmp_path / "out")
    assert (train + val, vocab) == (b"a" * 700 + b"\n\nb\nlast\n", b"\n\na\nb\nl\ns\nt\n")


@posix
@pytest.mark.parametrize(
    ("files", "limit", "full"),
    [
        ({"a.txt": b"a" * 50_000, "b.xz": xz(b"b" * 500_000)}, 20_000, "data_extract.tmp/0"),
        (
            {"a.txt": b"a" * 15_000, "b.txt": b"b" * 15_000},
            20_000,
            "data_extract.tmp/output_train.txt",
        ),
        (
            {"a.txt": "".join(map(chr, range(0x4E00, 0x4E00 + 5000))).encode()},
            17_000,
            "data_extract.tmp/vocab.txt",
        ),
    ],
)
def test_a_full_disk_is_reported_in_one_line(run_script, earlier, tmp_path, files, limit, full):
    put(tmp_path / "in", files)
    resource = pytest.importorskip("resource")
    limits = (resource.RLIMIT_FSIZE, (limit, limit))
    result = run_script(SCRIPT, *IN_TO_OUT, preexec_fn=lambda: resource.setrlimit(*limits))
    assert_fails(result, f"{full}: {os.strerror(errno.EFBIG)}")


# Two runs at once, interruption -------------------------------------------------------------------


@pytest.fixture
def slow_corpus(tmp_path):
    """Archives that take many seconds to read but give little text: each has a hidden member of 8
    GB.
    """
    hidden = member(".hidden", size=0o77777777777).tobuf(tarfile.GNU_FORMAT)
    data = xz(tar({"a.txt": b"text"})[:1024] + hidden) + xz(bytes(1 << 24)) * 480
    return put(tmp_path / "in", {f"{i}.xz": data for i in range(3)})


def workers_of(process: subprocess.Popen) -> list[int]:
    return [pid for pid, command in processes_of(process.pid).items() if "spawn_main" in command]


def wait_until_at_work(process: subprocess.Popen, out: Path) -> None:
    """Wait until each worker is at work, past the moment at which it ignores Ctrl-C."""
    wait_for(
        lambda: (
            workers_of(process)
            and len(list(out.glob("data_extract.tmp/*"))) >= len(workers_of(process))
        )
    )


@linux
def test_a_second_run_is_told_so_and_a_killed_one_blocks_nothing(
    start_script, run_script, tmp_path, slow_corpus
):
    put(tmp_path, {"quick/a.txt": b"first\n", "quick/b.txt": b"second\n"})
    process = start_script(SCRIPT, "-data_dir", slow_corpus, "-output_dir", "out")
    wait_until_at_work(process, tmp_path / "out")
    quick = ["-data_dir", "quick", "-output_dir", "out"]
    assert_fails(run_script(SCRIPT, *quick), "out: another extraction is at work there")
    assert process.poll() is None and len(workers_of(process)) > 0
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_of(process.pid))  # the workers end with it
    assert run_script(SCRIPT, *quick).returncode == 0
    assert read_three(tmp_path / "out") == three_files(["first\n", "second\n"])
    assert sorted(os.listdir(tmp_path / "out")) == sorted(NAMES)


@posix
def test_two_runs_are_never_in_one_folder_also_where_one_begins_as_another_ends(tmp_path):
    inside, most, errors = [], [0], []

    def run_often() -> None:
        for _ in range(300):
            with suppress(data_extract.DataError), data_extract.outputs_in(tmp_path) as folder:
                inside.append(1)
                most.append(len(inside))
                put(folder, dict.fromkeys(NAMES, b""))
                inside.pop()

    with ThreadPoolExecutor(3) as pool:
        for run in [pool.submit(run_often) for _ in range(3)]:
            errors.append(run.exception())
    assert max(most) == 1 and errors == [None] * 3


@linux
def test_of_many_runs_at_once_each_is_whole_or_told_so(start_script, tmp_path):
    texts = [f"{name} text\n" * 2000 for name in "abc"]
    runs = []
    for name, text in zip("abc", texts):
        put(tmp_path / name, {"1.txt": text.encode()})
        runs.append(start_script(SCRIPT, "-data_dir", name, "-output_dir", "out"))
    errors = [run.communicate()[1] for run in runs]
    assert 0 in [run.returncode for run in runs]
    assert all("at work" in error for run, error in zip(runs, errors) if run.returncode)
    assert read_three(tmp_path / "out") in [three_files([text]) for text in texts]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(NAMES)


@linux
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, ["data_extract.py: interrupted; nothing was changed"]),
        (signal.SIGTERM, 143, []),
        (
            signal.SIGKILL,
            1,
            ["data_extract.py: a worker process was killed, perhaps for want of memory; run again"],
        ),
    ],
)
def test_a_run_that_ends_by_a_signal_changes_nothing(
    start_script, earlier, slow_corpus, number, status, said
):
    process = start_script(SCRIPT, "-data_dir", slow_corpus, "-output_dir", earlier)
    wait_until_at_work(process, earlier)
    workers = workers_of(process)
    # Ctrl-C on a terminal reaches every process, here the parent last. What kills may take a worker
    # only.
    signalled = {
        signal.SIGINT: [*workers, process.pid],
        signal.SIGTERM: [process.pid],
        signal.SIGKILL: workers[:1],
    }
    for pid in signalled[number]:
        time.sleep(0.05)
        os.kill(pid, number)
    _, stderr = process.communicate(timeout=10)
    assert (process.returncode, notices(stderr)) == (status, said)
    wait_for(lambda: not processes_of(process.pid))


# The built-in sample and the command --------------------------------------------------------------


def test_without_flags_the_built_in_sample_is_used_or_else_an_openwebtext_folder(
    run_script, tmp_path
):
    result = run_script(SCRIPT)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    train, val, vocab = (content.decode("ascii") for content in read_three(tmp_path))
    assert len(train) == int(0.9 * len(train + val)) > 300_000
    # All of printable ASCII, so that the committed file is that of every version of Python.
    assert vocab == "".join(f"{chr(code)}\n" for code in [10, *range(32, 127)])
    assert vocab.encode() == Path(data_extract.__file__).with_name("vocab.txt").read_bytes()
    assert {*vocab} == {*train} and "lambda" in train
    assert notices(result.stderr) == [
        "no openwebtext folder here: using the built-in sample, the Python reference"
    ]
    put(tmp_path / "openwebtext", YES)
    assert notices(run_script(SCRIPT).stderr) == []
    assert read_three(tmp_path) == three_files(["yes\n", "yes\n"])


def test_the_sample_has_every_printable_character_whatever_a_python_has_to_say(
    tmp_path, monkeypatch
):
    topics = {"odd": "tab\there, caf\u00e9 \u201cquoted\u201d \u4f60\x07", "no": ""}
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    data_extract.write_sample(tmp_path)
    text, _ = read_all(tmp_path)
    assert {*text} == {"\n", *map(chr, range(32, 127))} and text.endswith(
        '\n\ntabhere, cafe "quoted" \n\n'
    )


def test_the_summary_counts_texts_and_invalid_sequences_and_names_archives_with_many(
    run_main, tmp_path
):
    files = {
        f"{i}.xz": xz(tar({"1.txt": "é".encode() * 6000, "2.txt": b"abcdef\xff"})) for i in range(8)
    }
    files["8.txt"] = b"d\xe9j\xe0" * 99 + b"a" * 594  # 198 of 990
    files["9.txt"] = b"lost bytes \x81\n" * 99
    put(tmp_path / "in", files)
    result = run_main(SCRIPT, "-data_dir", "in", "-output_dir", "new/out")
    assert [line.split() for line in result.stdout.splitlines()[1:3]] == [
        ["training", "17", "49,079", "0.10"],
        ["validation", "1", "1,287", "0.00"],
    ]
    assert re.search(r"vocabulary: 16 characters; .*: 305\n", result.stdout)
    named = re.findall(
        r"^(\S+): (\d+) % of its characters are not UTF-8", result.stdout, re.MULTILINE
    )
    assert named == [("8.txt", "20"), ("9.txt", "8")]


class Terminal(io.StringIO):
    """A stream as IDLE has it: a terminal that can't be reconfigured."""

    def isatty(self) -> bool:
        return True


@posix
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_control_characters_in_names_are_escaped(run_main, tmp_path, stream):
    name = "\x1b]52;c;aGk=\x07\x9b31m\n\ta"
    put(tmp_path / "in", YES | {f"{name}.xz": b""})
    shown, errors = stream(), stream()
    escaped = r"\x1b]52;c;aGk=\x07\x9b31m\n" + "\ta"
    assert run_main(SCRIPT, *IN_TO_OUT, stderr=errors).returncode == 1
    assert (
        run_main(
            SCRIPT, "-data_dir", "in", "-output_dir", name, "-skip_corrupt", stdout=shown
        ).returncode
        == 0
    )
    for text in (errors.getvalue(), shown.getvalue()):
        assert escaped in text
        assert not re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text.replace("\x1b[A", ""))


def test_a_terminal_shows_a_bar_with_files_and_bytes(run_main, tmp_path):
    put(tmp_path / "in", {f"{i}.txt": "text é\n".encode() * 200 for i in range(3)})
    terminal = Terminal()
    assert run_main(SCRIPT, "-data_dir", "in").stderr == ""
    run_main(SCRIPT, "-data_dir", "in", stderr=terminal)
    assert "3 of 3 files" in terminal.getvalue() and re.search(
        r"4\.80k/4\.80k", terminal.getvalue()
    )


@posix
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_has_gone_costs_no_output(tmp_path, closed):
    put(tmp_path / "in", YES | {"c.md": b"passed over"})
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as broken:
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, closed: broken}
        subprocess.run(
            [sys.executable, data_extract.__file__, "-data_dir", "in"],
            cwd=tmp_path,
            timeout=60,
            **options,
        )
    assert read_three(tmp_path) == three_files(["yes\n", "yes\n"])


# Long campaigns: pytest -m soak -------------------------------------------------------------------

# Run by a small process, since one that a large one starts counts the memory of that at first.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
LINE = f"{FOREIGN} {'The quick brown fox jumps over the lazy dog. ' * 20}".encode()
HEADER = member("a.txt", size=4 << 30).tobuf(tarfile.GNU_FORMAT)


def repeated(block: bytes, size: int) -> bytes:
    """Return an .xz file of `block` repeated to at least `size` bytes, quickly made."""
    block *= (32 << 20) // len(block)
    return lzma.compress(block, preset=0) * -(-size // len(block))


@pytest.mark.soak
@posix
@pytest.mark.parametrize(
    ("name", "data", "size"),
    [
        ("lines.xz", lambda: repeated(LINE + b"\n", 10 << 30), 10 << 30),
        (
            "one line.xz",
            lambda: xz(HEADER) + repeated(LINE[:512], 4 << 30) + xz(bytes(1024)),
            4 << 30,
        ),
        (
            "endless short documents.xz",
            lambda: repeated(tar({"a": b"a"})[:1024], 1 << 30) + xz(bytes(1024)),
            3 << 20,
        ),
        (
            "endless short documents.tar",
            lambda: tar({"a": b"a"})[:1024] * 900_000 + bytes(1024),
            2_700_000,
        ),
        ("endless newlines.xz", lambda: xz(b"ab") + repeated(b"\n", 1 << 30), 1 << 30),
    ],
)
def test_memory_stays_bounded_whatever_is_in_an_archive(tmp_path, name, data, size):
    put(tmp_path / "in", {name: data()})
    command = [sys.executable, "-c", MEASURE, sys.executable, data_extract.__file__, *IN_TO_OUT]
    peak = int(subprocess.check_output(command, cwd=tmp_path)) / (
        1e6 if sys.platform == "darwin" else 1e3
    )
    assert sum((tmp_path / "out" / output).stat().st_size for output in NAMES[:2]) >= size
    assert peak < 300  # megabytes of the largest process, workers included
    for output in NAMES:
        (tmp_path / "out" / output).unlink()
