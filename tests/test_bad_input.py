"""Bad input of every kind is one sentence: what each script says to it, and that it leaves everything as it was.

The table holds them all: flags, files and archives, in the order of the scripts. A few are tried with processes too.
"""

import errno
import io
import itertools
import os
import re
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from archives import AB, DAMAGED, NAMES, OUTER, OUTER_MEMBER, member, pax, tar, xz
from conftest import SCRIPTS, TINY, assert_fails, posix, put, read_folder

from model import GPTLanguageModel, Vocabulary, save_model

FOLDER = "a folder"
GONE = "no such file"


class Case(NamedTuple):
    """`script` with `flags`, in a folder changed by `files`, ends with `status` and says `message` (a pattern)."""

    script: str
    flags: list[str]
    status: int
    message: str
    files: dict[str, bytes | str] = {}  # noqa: RUF012

    def __str__(self) -> str:
        return ascii(" ".join([self.script[:-3], *self.flags, *self.files]))[1:120]


# Flags: every one of every script, with values that are of the wrong kind or out of range ----------------------------

HUGE = "1" + "0" * 30
NO_INT = [(value, f"invalid int value: '{value}'") for value in ("", "1.5", "text", "nan", "inf", "0x10", "1e3")]
NO_INT += [("\udcff", r"invalid int value: '\\udcff'"), ("1\n2\n3", r"invalid int value: '1\\n2\\n3'")]
TOO_LOW = [("0", "0 is not 1 or more"), ("-1", "-1 is not 1 or more"), (f"-{HUGE}", "is not 1 or more")]
SIZE = [*NO_INT, *TOO_LOW, ("2147483648", "is not below 2147483648"), (HUGE, "is not below 2147483648")]
FROM_0 = [*NO_INT, ("-1", "-1 is not 0 or more"), (HUGE, "is not below 2147483648")]
SEED = [*NO_INT, ("-1", "-1 is not 0 or more"), (HUGE, "is not below 9223372036854775808")]
RATE = [
    *((value, f"invalid float value: '{value}'") for value in ("", "text", "0x10", "1,5")),
    *((value, f"{value} is not 0 or more") for value in ("-1", "-1e-9", "nan", "-inf", "-1e400")),
    *((value, f"{value} is not below inf") for value in ("inf", "1e400", "9" * 400)),
]
ON_OFF = [(value, f"ignored explicit argument '{value}'") for value in ("", "0", "yes")]
CHOICE = [(value, f"invalid choice: '{value}'") for value in ("", "0", "nonsense", "FLOAT32", "On")]
DEVICES = ["", "0", "nonsense", "CPU", "meta", "xla", "vulkan", "cuda:99", "cuda:-1", "cpu:x", f"cuda:{HUGE}"]
DEVICES += [] if torch.cuda.is_available() else ["cuda", "cuda:0", "cuda:7"]
DEVICES += [] if torch.backends.mps.is_available() else ["mps"]
DEVICES += [] if torch.xpu.is_available() else ["xpu", "xpu:1"]
DEVICE = [(value, f"there is no device '{value}' here") for value in DEVICES]

FLAGS = {
    "data_extract.py": {
        "skip_corrupt": ON_OFF,
        "sample_rate": [
            *((value, f"invalid (float|share) value: '{value}'") for value in ("", "half", "1/2")),
            *((value, "is not above 0 and at most 1") for value in ("0", "-1", "1.01", "nan", "inf", "-inf", HUGE)),
        ],
        "min_count": [*NO_INT, *TOO_LOW],
        "seed": NO_INT,
    },
    "training.py": {
        **dict.fromkeys(("batch_size", "block_size", "max_iters", "eval_interval", "eval_iters"), SIZE),
        **dict.fromkeys(("save_interval", "n_embd", "n_head", "n_layer", "grad_accum"), SIZE),
        **dict.fromkeys(("learning_rate", "min_lr", "weight_decay", "grad_clip"), RATE),
        "block_size": [*NO_INT, *TOO_LOW, ("8193", "is not below 8193"), (HUGE, "is not below 8193")],
        "dropout": [*RATE[:9], ("1", "1 is not below 1"), ("inf", "inf is not below 1")],
        **dict.fromkeys(("patience", "warmup_iters"), FROM_0),
        "seed": SEED,
        "resume": ON_OFF,
        **dict.fromkeys(("optimizer", "dtype", "compile"), CHOICE),
        "device": DEVICE,
    },
    "chatbot.py": {
        **dict.fromkeys(("max_new_tokens", "batch_size"), SIZE),
        "top_k": [*SIZE, ("12", "the model knows only 11 characters")],
        "temperature": RATE,
        "seed": SEED,
        "show": ON_OFF,
        "dtype": CHOICE,
        "device": DEVICE,
    },
}
WRONG_FLAGS = [
    Case(script, [f"-{flag}={value}"], 2, f"argument -{flag}.*{message}")
    for script, flags in FLAGS.items()
    for flag, values in flags.items()
    for value, message in values
]
TOGETHER = [
    *(Case(script, ["-nonsense"], 2, "unrecognized arguments: -nonsense") for script in SCRIPTS),
    *(Case(script, ["-see=1"], 2, "unrecognized arguments: -see=1") for script in SCRIPTS),
    *(Case(script, ["text"], 2, "unrecognized arguments: text") for script in SCRIPTS),
    *(Case(script, ["-seed"], 2, "argument -seed.*expected one argument") for script in SCRIPTS),
    Case("training.py", ["-n_embd=10", "-n_head=3"], 2, "-n_embd: 10 is not a multiple of -n_head 3"),
    Case("training.py", ["-n_head=17"], 2, "-n_embd: 16 is not a multiple of -n_head 17"),
    Case("training.py", ["-grad_accum=3"], 2, "-batch_size: 4 sequences can't be shared .* 3 and 6 can"),
    Case("training.py", ["-grad_accum=2147483647"], 2, "-batch_size: 4 sequences .* evenly; 2147483647 can"),
    Case("training.py", ["-vocab=vocab.txt"], 2, "argument -vocab: goes with -init_from only"),
    Case("training.py", ["-plot=loss.txt"], 2, "argument -plot: 'loss.txt' does not end in .png, .svg or .pdf"),
    Case("training.py", ["-plot="], 2, "argument -plot: '.' does not end in"),
    Case("training.py", ["-plot=a\nb\udcff"], 2, r"argument -plot: 'a\\nb\\udcff' does not end in"),
    *(  # Sizes that no memory can hold
        Case("training.py", [f"-{flag}={size}" for flag in flags], 1, "not enough memory; try a higher -grad_accum or")
        for flags, size in (
            (["n_embd"], 2**31 - 2),
            (["batch_size"], 2**31 - 1),
            (["eval_iters"], 2**31 - 1),
            (["batch_size", "eval_iters"], 2**31 - 1),
        )
    ),
    Case("chatbot.py", ["-batch_size=2147483647"], 1, "not enough memory; try a smaller -batch_size"),
    *(  # Numbers that lead nowhere, though each is allowed
        Case("training.py", [f"-{flag}={value}", "-warmup_iters=0"], 1, "the loss is (nan|inf) .* try a lower")
        for flag, value in (("learning_rate", "1e30"), ("learning_rate", "1e308"), ("weight_decay", "1e30"))
    ),
    Case("training.py", ["-block_size=5000"], 1, "output_train.txt: holds 4600 characters, -block_size 5000 takes"),
]
EXTREME = [  # must work
    *(Case("chatbot.py", [f"-temperature={value}"], 0, "^Completion:\na") for value in ("1e-320", "1e-30", HUGE)),
    Case("chatbot.py", ["-top_k=11", "-seed=9223372036854775807"], 0, "^Completion:\na"),
    Case("training.py", ["-learning_rate=0", "-min_lr=0", "-weight_decay=0", "-grad_clip=0"], 0, "best model"),
    Case("training.py", ["-grad_clip=1e308", "-warmup_iters=2147483647", "-eval_interval=2147483647"], 0, "best model"),
    Case(
        "data_extract.py", ["-seed=-1", "-sample_rate=1e-320", "-data_dir=one"], 0, "training", {"one/a.txt": b"abcd"}
    ),
    Case("data_extract.py", [f"-seed={HUGE}"], 0, "training"),
]

# Files ---------------------------------------------------------------------------------------------------------------

WINDOWS = sys.platform == "win32"
MISSING = os.strerror(errno.ENOENT)
IS_FOLDER = os.strerror(errno.EACCES if WINDOWS else errno.EISDIR)
INSIDE_FILE = os.strerror(errno.ENOENT if WINDOWS else errno.ENOTDIR)
NO_MODEL = "not a model file"
NOT_FILES = [  # for a flag that names a file to read
    ("gone", f"gone: {MISSING}"),
    ("in", f"in: {IS_FOLDER}"),
    ("", rf"\.: {IS_FOLDER}"),
    ("vocab.txt/file", f"vocab.txt/file: {INSIDE_FILE}"),
    ("a\nb", rf"a\\nb: {MISSING}"),
    ("gone\udcff", f"gone.+: {MISSING}"),
    ("x" * 5000, "x: File name too long"),
]
NOT_MODELS = {
    "empty": b"",
    "text": b"just text",
    "NULs": bytes(1000),
    "a zip file": b"PK\5\6" + bytes(18),
    "an xz file": xz(b"text"),
    "a pickle of a number": b"\x80\x04K\x01.",
    "a pickle of code": b"cos\nsystem\n(S'touch harm'\ntR.",
}
MUST_NAME = "must name a file in a folder that exists and can be written to"
TEXTS = ("output_train.txt", "output_val.txt")
FILES = [
    # data_extract.py
    *(
        Case("data_extract.py", [f"-data_dir={name}"], 1, f"{message}: no such folder; name the folder")
        for name, message in (
            ("gone", "gone"),
            ("openwebtext", "openwebtext"),
            ("vocab.txt", "vocab.txt"),
            ("vocab.txt/in", "vocab.txt/in"),
            ("a\nb", r"a\\nb"),
            ("a\udcff", "a.+"),
        )
    ),
    Case("data_extract.py", [], 1, "in: holds no .tar, .xz or .txt file", {"in/a.txt": GONE, "in/b.txt": GONE}),
    Case("data_extract.py", ["-data_dir=x"], 1, "x: holds no .tar, .xz or .txt file", {"x/README.md": b"text"}),
    Case("data_extract.py", ["-data_dir=x"], 1, "x: holds no", {"x/.a.txt": b"text", "x/.b/c.txt": b"text"}),
    Case("data_extract.py", ["-data_dir=x"], 1, "x: holds no", {"x/a.txt": FOLDER}),
    Case("data_extract.py", ["-data_dir=x"], 1, "too little text: training and validation both", {"x/a.txt": b""}),
    Case("data_extract.py", ["-data_dir=x"], 1, "too little text", {"x/a.xz": xz(b"a")}),
    Case("data_extract.py", [], 1, "too little text", {"in/b.txt": GONE, "in/b.xz": xz(tar({"empty": b"\n"}))}),
    Case("data_extract.py", ["-min_count=999"], 1, "no character is seen 999 times; lower -min_count"),
    Case("data_extract.py", ["-output_dir=vocab.txt"], 1, "vocab.txt: File exists"),
    Case("data_extract.py", ["-output_dir=vocab.txt/out"], 1, f"vocab.txt/out: {INSIDE_FILE}"),
    *(
        Case("data_extract.py", [], 1, f"{name}: is a folder where the output belongs", {f"out/{name}": FOLDER})
        for name in NAMES
    ),
    *(Case("data_extract.py", [], 1, f"{name}.tmp: is a folder", {f"out/{name}.tmp": FOLDER}) for name in TEXTS),
    # training.py
    Case("training.py", ["-data_dir=gone"], 1, f"gone/vocab.txt: {MISSING}; run data_extract.py first, or name its"),
    Case("training.py", ["-data_dir=vocab.txt"], 1, f"vocab.txt/vocab.txt: {INSIDE_FILE}"),
    Case("training.py", ["-data_dir=a\nb"], 1, r"a\\nb/vocab.txt: "),
    *(Case("training.py", [], 1, f"{n}: {MISSING}; run data_extract.py", {n: GONE}) for n in (*TEXTS, "vocab.txt")),
    *(Case("training.py", [], 1, f"{name}: {IS_FOLDER}", {name: FOLDER}) for name in (*TEXTS, "vocab.txt")),
    *(
        Case("training.py", [], 1, f"{name}: {message}", {name: content})
        for name in TEXTS
        for content, message in (
            (b"", "holds 0 characters, -block_size 8 takes 9 or more; use a longer text or a smaller block"),
            (b"the mat ", "holds 8 characters"),
            ("🙂".encode() * 8, "holds 8 characters"),
            (bytes(5000), r"the character '\\x00' at byte \d+ is not in vocab.txt; run data_extract.py again"),
            (b"xyz" * 100, r"the character '[xyz]' at byte \d+ is not in vocab.txt"),
            ("\N{LINE SEPARATOR}".encode() * 100, r"the character '\\u2028' at byte"),
            (b"abc" + b"\xff" * 5000, r"not UTF-8 text at byte \d+"),
            (b"\xed\xa0\x80" * 100, r"not UTF-8 text at byte \d+"),
            (b"\x80" * 100, "holds 0 characters"),
            (b"\x1f\x8b" + bytes(range(256)) * 40, r"(not UTF-8 text|the character .*) at byte"),
        )
    ),
    Case("training.py", [], 1, "vocab.txt: holds no characters; run data_extract.py again", {"vocab.txt": b""}),
    Case("training.py", [], 1, "vocab.txt: not UTF-8 text; run data_extract.py again", {"vocab.txt": b"a\n\xff\n"}),
    Case("training.py", [], 1, "the character .* is not in vocab.txt", {"vocab.txt": bytes(100)}),
    Case("training.py", [], 1, "the character .* is not in vocab.txt", {"vocab.txt": b"a\nc\n"}),
    *(
        Case("training.py", [f"-{flag}={name}"], 1, f"{message}: -{flag} {MUST_NAME}")
        for flag, name, message in (
            ("model", "gone/model.pkl", "gone/model.pkl"),
            ("model", "vocab.txt/model.pkl", "vocab.txt/model.pkl"),
            ("model", "in", "in"),
            ("model", "", r"\."),
            ("model", "..", r"\.\."),
            ("model", "a\nb/m.pkl", r"a\\nb/m.pkl"),
            ("plot", "gone/loss.png", "gone/loss.png"),
            ("plot", "vocab.txt/loss.png", "vocab.txt/loss.png"),
        )
    ),
    Case("training.py", ["-plot=loss.png"], 1, f"loss.png: -plot {MUST_NAME}", {"loss.png": FOLDER}),
    Case("training.py", [f"-model={'x' * 300}"], 1, "x: File name too long"),
    Case("training.py", ["-resume", "-model=."], 1, r"\.\.state\.pkl: "),
    Case("training.py", [], 1, f"model-01.pkl.tmp: {IS_FOLDER}", {"model-01.pkl.tmp": FOLDER}),
    *(Case("training.py", [f"-init_from={name}"], 1, message) for name, message in NOT_FILES),
    *(Case("training.py", ["-init_from=chat.pkl", f"-vocab={name}"], 1, message) for name, message in NOT_FILES),
    Case("training.py", ["-resume"], 1, f"model-01.state.pkl: {MISSING}; there is no run to go on with, start one"),
    Case("training.py", ["-resume", "-model=chat.pkl"], 1, f"chat.state.pkl: {MISSING}; there is no run"),
    Case("training.py", ["-resume", "-model=in/m.pkl"], 1, f"in/m.state.pkl: {IS_FOLDER}", {"in/m.state.pkl": FOLDER}),
    *(
        Case("training.py", ["-resume", "-model=run.pkl", f"-{flag}={value}"], 2, f"argument -{flag}: {message}")
        for flag, value, message in (
            *(
                (flag, value, f"{value} contradicts run.state.pkl, which has .*; leave it out")
                for flag, value in (
                    ("batch_size", "5"),
                    ("block_size", "9"),
                    ("learning_rate", "0.5"),
                    ("optimizer", "muon"),
                    ("seed", "2"),
                    ("dropout", "0.5"),
                    ("n_layer", "2"),
                    ("eval_interval", "9"),
                    ("init_from", "chat.pkl"),
                )
            ),
            ("max_iters", "1", "run.state.pkl has 2, which may only grow"),
        )
    ),
    *(
        Case("training.py", ["-resume", "-model=run.pkl"], 1, f"run.state.pkl: {NO_MODEL}", {"run.state.pkl": content})
        for content in NOT_MODELS.values()
    ),
    Case("training.py", ["-resume", "-model=run.pkl"], 1, f"run.metrics.csv: {IS_FOLDER}", {"run.metrics.csv": FOLDER}),
    *(Case("training.py", ["-init_from=x.pkl"], 1, f"x.pkl: {NO_MODEL}", {"x.pkl": c}) for c in NOT_MODELS.values()),
    # chatbot.py
    *(Case("chatbot.py", [f"-model={name}"], 1, message) for name, message in NOT_FILES),
    Case(
        "chatbot.py", ["-model=no.pkl"], 1, f"no.pkl: {MISSING}; train one with training.py, or name yours with -model"
    ),
    *(Case("chatbot.py", [f"-vocab={name}"], 1, f"{message}$") for name, message in NOT_FILES),
    Case("chatbot.py", ["-prompt_file=-"], 2, "argument -prompt_file: goes without -prompt"),
    Case("chatbot.py", ["-vocab=empty"], 1, "empty: holds no characters", {"empty": b""}),
    Case("chatbot.py", ["-vocab=binary"], 1, "binary: not UTF-8 text", {"binary": b"\0\xff\0"}),
    *(Case("chatbot.py", ["-model=x.pkl"], 1, f"x.pkl: {NO_MODEL}", {"x.pkl": c}) for c in NOT_MODELS.values()),
    Case("chatbot.py", ["-model=bare.pkl"], 1, "bare.pkl: holds no vocabulary; name the vocab.txt it was trained"),
    Case(
        "chatbot.py",
        ["-model=bare.pkl", "-vocab=x"],
        1,
        "knows 11 characters, the given vocabulary has 2;",
        {"x": b"a\nb\n"},
    ),
    Case("chatbot.py", ["-model=bare.pkl", "-vocab=chat.pkl"], 1, "chat.pkl: not UTF-8 text"),
]
TAKEN = [  # unusual, but good
    Case("training.py", [], 0, "best model", dict.fromkeys((*TEXTS, "vocab.txt"), b"\n" * 500)),
    Case("training.py", ["-optimizer=muon"], 0, "best model", dict.fromkeys((*TEXTS, "vocab.txt"), b"\n" * 500)),
    Case("training.py", [], 0, "best model", dict.fromkeys((*TEXTS, "vocab.txt"), b"a" * 500)),
    Case("training.py", ["-model=a\nb\udcff.pkl"], 0, r"best model"),
    Case(
        "training.py",
        [],
        0,
        "vocabulary  12 char",
        {TEXTS[0]: bytes(900), "vocab.txt": b"\0\n\n\n \na\nc\ne\nh\nm\nn\no\ns\nt\n"},
    ),
    Case("training.py", ["-init_from=bare.pkl", "-vocab=vocab.txt"], 0, "best model"),
    Case("chatbot.py", ["-prompt="], 0, "^Completion:\n\n"),
    Case("chatbot.py", ["-prompt=\0\xff\udcff🙂a"], 0, "^Completion:\na"),
    Case("chatbot.py", ["-model=bare.pkl", "-vocab=vocab.txt"], 0, "^Completion:\na"),
    Case("data_extract.py", ["-data_dir=x"], 0, "U[+]FFFD: 3", {"x/a.txt": b"\0\xff\0\xfe\xff" + bytes(99)}),
    Case("data_extract.py", ["-data_dir=x"], 0, "vocabulary: 1 char", {"x/a.txt": b"\n" * 99}),
    Case("data_extract.py", ["-output_dir=a\nb\udcff"], 0, "wrote a\nb"),
]

# Archives ------------------------------------------------------------------------------------------------------------


def absurd(size: int, kind: bytes, name: str) -> bytes:
    """A tar whose one header claims so many bytes."""
    header = bytearray(member(name, kind).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"x" * 1024


def nested(depth: int) -> bytes:
    """An xz in a tar in an xz in a tar ..."""
    data = b"text"
    for _ in range(depth):
        data = xz(tar({"a.xz": xz(data)}))
    return data


HEADERS = [tar([(member("a", kind, 9), b"9 path=a\n")])[:1024] for kind in (b"L", b"x")]  # for the member after it
ESCAPING = ["/escaped.txt", "../../escaped.txt", "/../escaped.txt", "a/../../escaped.txt", "C:\\escaped.txt"]
LINKS = [
    (member("link", tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
    (member("hard", tarfile.LNKTYPE, linkname="../../etc/passwd"), b""),
    (member("disk", tarfile.BLKTYPE), b""),
    (member("terminal", tarfile.CHRTYPE), b""),
    (member("pipe.xz", tarfile.FIFOTYPE), b""),
]
ARCHIVES = [
    *(
        Case(
            "data_extract.py",
            [],
            1,
            f"{name}: .*; .*, or leave it out with -skip_corrupt",
            {f"in/{name}": data},
        )
        for name, data in DAMAGED.items()
    ),
    *(
        Case("data_extract.py", [], 1, f"a.{name}: it holds", {f"in/a.{name}": data})
        for name, data in (
            ("xz", nested(1)),
            ("xz", nested(9)),
            ("xz", xz(xz(b"text"))),
            ("txt", xz(b"text")),
            ("xz", xz(tar({"a.tar": tar(AB)}))),
            ("tar", tar({"a.tar": OUTER})),
        )
    ),
    Case("data_extract.py", [], 1, "a.tar/a.xz: it holds another archive", {"in/a.tar": tar({"a.xz": nested(1)})}),
    *(
        Case(
            "data_extract.py",
            [],
            1,
            "z.*: .*(cut short|damaged|not a sound|another archive|a sparse file)",
            {f"in/z.{end}": pack(absurd(*header))},
        )
        for header in itertools.product((2**60, 2**63 - 1, 2**64, 2**87), (b"0", b"L", b"x", b"g", b"S"), ("a", "a.xz"))
        for end, pack in (("tar", bytes), ("xz", xz))
    ),
    Case("data_extract.py", [], 1, r"a\\nb.xz: it is cut short", {"in/a\nb.xz": b""}),
    Case("data_extract.py", ["-skip_corrupt"], 0, "left out: a\nb.xz", {"in/a\nb.xz": b""}),
    Case("data_extract.py", [], 1, "a.+xz: it is cut short", {"in/a\udcff.xz": b"text"}),
    Case("data_extract.py", ["-skip_corrupt"], 0, r"left out: a.+xz: ", {"in/a\udcff.xz": b"text"}),
    Case("data_extract.py", [], 1, "outer.tar: .*cut short", {"in/outer.tar": OUTER[: 2 * OUTER_MEMBER - 600]}),
    Case("data_extract.py", [], 1, "z.tar: .*damaged", {"in/z.tar": pax(b"14 size=-1024\n", ("a.xz", xz(b"text")))}),
    Case("data_extract.py", [], 0, "training +6 ", {"in/a.tar": tar(dict.fromkeys(ESCAPING, b"text"))}),
    Case("data_extract.py", [], 0, "training +6 ", {"in/a.xz": xz(tar(dict.fromkeys(ESCAPING, b"text")))}),
    Case("data_extract.py", [], 0, "training +2 ", {"in/a.tar": tar([*LINKS, ("a", b"text")])}),
    Case("data_extract.py", [], 0, "training +2 ", {"in/a.xz": xz(tar([*LINKS, ("a", b"text")]))}),
    Case("data_extract.py", [], 0, "training", {"in/a.tar": tar({"a\udcff.txt": b"a", "b\nc.txt": b"b"})}),
    *(
        Case("data_extract.py", [], 0, "training", {"in/a.tar": data})
        for data in (
            *(header * 5000 + tar({"a.txt": b"a"}) for header in HEADERS),
            *(pax(record, ("a.txt", b"text")) for record in (b"0 a=b\n", b"-1 a=b\n", b"9" * 30 + b" a=b\n", b"text")),
            pax(b"9 mtime=\n", ("a.txt", b"text")),
        )
    ),
]

# The table -----------------------------------------------------------------------------------------------------------


CASES = [*WRONG_FLAGS, *TOGETHER, *EXTREME, *FILES, *TAKEN, *ARCHIVES]
PLAIN_FLAGS = {
    "data_extract.py": ["-data_dir=in", "-output_dir=out"],
    "training.py": [*TINY, "-max_iters=2"],
    "chatbot.py": ["-model=chat.pkl", "-device=cpu", "-max_new_tokens=2", "-prompt=a"],
}


@pytest.fixture(scope="session")
def contents(tmp_path_factory, finished_run) -> dict[str, bytes]:
    """A run with its texts, a model, one without its vocabulary, and archives, by name."""
    folder = put(tmp_path_factory.mktemp("good"), finished_run)
    vocabulary = Vocabulary.from_file(folder / "vocab.txt")
    model = GPTLanguageModel(len(vocabulary), n_embd=16, n_head=2, n_layer=1, block_size=8)
    save_model(folder / "chat.pkl", model, vocabulary)
    torch.save(model.state_dict(), folder / "bare.pkl")
    put(folder, {"in/a.txt": b"first ", "in/b.txt": b"second"})
    put(folder, {f"out/{name}": b"of an earlier run" for name in NAMES})
    return read_folder(folder)


def change(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        try:
            (folder / name).unlink(missing_ok=True)
            if content == FOLDER:
                (folder / name).mkdir(parents=True)
            elif content != GONE:
                put(folder, {name: content})
        except OSError as error:
            if sys.platform == "linux":
                raise
            pytest.skip(f"{name!r} is no name here: {error}")


@pytest.fixture
def run_here(contents, tmp_path, run_main, short_samples):
    """`run_here(script, flags, files, **streams)` runs it, with its plain flags, in a folder with the contents.

    Gives what run_main gives, and the folder's contents before and after.
    """
    put(tmp_path, contents)

    def run(script: str, flags: list[str], files: dict[str, bytes | str] | None = None, **streams):
        change(tmp_path, files or {})
        before = read_folder(tmp_path)
        result = run_main(script, *PLAIN_FLAGS[script], *flags, **streams)
        return result, before, read_folder(tmp_path)

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_is_a_sentence_and_changes_nothing(run_here, case):
    result, before, after = run_here(case.script, case.flags, case.files)
    if case.status:
        assert_fails(result, case.message, case.status)
        assert after == before
    else:
        assert result.returncode == 0, result.stderr
        assert re.search(case.message, result.stdout), result.stdout
        assert not any(re.search("escaped|harm", name) for name in after)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_and_the_table_tries_it(run_here, script):
    shown = run_here(script, ["-h"])[0].stdout
    names = set(re.findall(r"^  -(\w+)(?: \S+)?(?:, --\1\b|  |$)", shown, re.MULTILINE))
    paths = {"data_dir", "output_dir", "model", "vocab", "init_from", "plot", "prompt", "prompt_file", "stop"}
    tried = {flag.partition("=")[0][1:] for case in FILES for flag in case.flags if case.script == script}
    assert names - paths == FLAGS[script].keys() and names & paths == tried & paths | names & {"prompt", "stop"}
    assert "seed" in names and re.search(r"\(default: \S+\)", shown)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("spelling", ["--help", "-help"])
def test_help_may_be_spelt_like_a_flag(run_here, script, spelling):
    short, long = (run_here(script, [flag])[0] for flag in ("-h", spelling))
    assert long.returncode == 0 and long.stdout == short.stdout and not long.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_may_be_spelt_with_two_dashes(run_here, script):
    """A wrong value of each flag that takes one gets the same answer."""
    cases = {case.flags[0].partition("=")[0]: case for case in WRONG_FLAGS if case.script == script}
    assert len(cases) >= 4
    for case in cases.values():
        short, long = (run_here(script, [dash + case.flags[0]])[0] for dash in ("", "-"))
        assert short.returncode == long.returncode == 2 and short.stderr == long.stderr.replace(
            "argument --", "argument -"
        )


def test_the_table_holds_no_case_twice():
    assert len({(case.script, *case.flags, *map(repr, case.files.items())) for case in CASES}) == len(CASES)


# What a table can't hold ---------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("in/x.txt", "x.txt", "in/x.txt: Too many levels of symbolic links"),
        ("in/x.xz", "nowhere", f"in/x.xz: {MISSING}"),
        ("new", "new", "new: "),
        ("new", "nowhere", "new: "),
    ],
)
def test_links_that_lead_nowhere_are_a_sentence(run_here, tmp_path, link, target, message):
    (tmp_path / link).symlink_to(target)
    result, before, after = run_here("data_extract.py", ["-output_dir=new"])
    assert_fails(result, message)
    assert after == before


@posix
@pytest.mark.parametrize("flag", ["model", "plot"])
def test_a_device_is_no_place_for_a_model(run_here, tmp_path, flag):
    os.mkfifo(tmp_path / "pipe.png")
    result, before, after = run_here("training.py", [f"-{flag}=pipe.png"])
    assert_fails(result, f"pipe.png: -{flag} {MUST_NAME}")
    assert after == before and (tmp_path / "pipe.png").is_fifo()


@pytest.mark.parametrize("script", SCRIPTS)
def test_closed_streams_do_not_matter(run_here, script):
    closed = {"stdin": None, "stdout": None, "stderr": None}
    assert run_here(script, [], **closed)[0].returncode == 0
    assert run_here(script, ["-seed=x"], **closed)[0].returncode == 2


def test_a_chat_without_input_ends_quietly(run_main, contents, tmp_path):
    def chat(stdin):
        flags = [flag for flag in PLAIN_FLAGS["chatbot.py"] if flag != "-prompt=a"]
        return run_main("chatbot.py", *flags, stdin=stdin)

    put(tmp_path, contents)
    for stdin in (None, io.TextIOWrapper(io.BytesIO(b""))):
        result = chat(stdin)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    result = chat(io.TextIOWrapper(io.BytesIO(b"a\0\xff\r\nb")))
    assert result.returncode == 0 and result.stdout.count("Completion:\n") == 2 and "left out" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("script", SCRIPTS)
def test_output_that_can_not_be_written_is_a_sentence(run_here, script):
    full = open("/dev/full", "w")  # noqa: SIM115
    result, *_ = run_here(script, [], stdout=full)
    with suppress(OSError):
        full.close()
    assert_fails(result, f"standard output: {os.strerror(errno.ENOSPC)}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_terminal_that_knows_only_ascii_is_enough(run_here, script):
    buffer = io.BytesIO()
    stdout = io.TextIOWrapper(buffer, "ascii", "strict", write_through=True)
    flags = {"data_extract.py": ["-output_dir=é"], "training.py": ["-model=é.pkl"], "chatbot.py": ["-prompt=éa"]}
    assert run_here(script, flags[script], stdout=stdout)[0].returncode == 0
    assert buffer.getvalue()


@pytest.mark.parametrize(
    "case",
    [
        Case("data_extract.py", ["-sample_rate=2"], 2, "-sample_rate: 2.0 is not above 0"),
        Case("data_extract.py", [], 1, "a.xz: it is cut short; replace it", {"in/a.xz": DAMAGED["cut short.xz"]}),
        Case("training.py", ["-resume"], 1, f"model-01.state.pkl: {MISSING}"),
        Case("chatbot.py", ["-model=a\udcff\n.pkl"], 1, rf"a.+\\n.pkl: {MISSING}"),
    ],
    ids=str,
)
def test_bad_input_to_real_processes(run_script, contents, tmp_path, monkeypatch, case):
    monkeypatch.setenv("LC_ALL", "C")
    change(put(tmp_path, contents), case.files)
    before = read_folder(tmp_path)
    result = run_script(case.script, *PLAIN_FLAGS[case.script], *case.flags)
    assert_fails(result, case.message, case.status)
    assert result.stdout == "" and read_folder(tmp_path) == before
