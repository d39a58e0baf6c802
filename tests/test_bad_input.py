"""Bad input of every kind is one sentence: what each script says to it, and that it leaves
everything as it was.

The table shows each kind once: flags, files and archives, in the order of the scripts.
"""

import errno
import io
import os
import re
import sys
from contextlib import suppress
from typing import NamedTuple

import pytest
import torch
from archives import DAMAGED, NAMES, tar, xz
from conftest import SCRIPTS, TINY, assert_fails, posix, put, read_folder

from model import GPTLanguageModel, Vocabulary, save_model

FOLDER = "a folder"
GONE = "no such file"
MISSING = os.strerror(errno.ENOENT)
IS_FOLDER = os.strerror(errno.EACCES if sys.platform == "win32" else errno.EISDIR)
TEXTS = ("output_train.txt", "output_val.txt")
EXTRACT, TRAIN, CHAT = SCRIPTS


class Case(NamedTuple):
    """`script` with `flags`, in a folder changed by `files`, ends with `status` and says `message`
    (a pattern).
    """

    script: str
    flags: list[str]
    status: int
    message: str
    files: dict[str, bytes | str] = {}  # noqa: RUF012

    def __str__(self) -> str:
        return ascii(" ".join([self.script[:-3], *self.flags, *self.files]))[1:120]


FLAGS = [
    *(Case(script, ["-nonsense"], 2, "unrecognized arguments: -nonsense") for script in SCRIPTS),
    *(Case(script, ["-see=1"], 2, "unrecognized arguments: -see=1") for script in SCRIPTS),
    *(Case(script, ["--seed"], 2, "argument -seed.*expected one argument") for script in SCRIPTS),
    *(
        Case(script, ["-seed=1\n2\udcff"], 2, r"argument -seed.*invalid int value: '1\\n2\\udcff'")
        for script in SCRIPTS
    ),
    Case(EXTRACT, ["-sample_rate=nan"], 2, "argument -sample_rate: "),
    Case(EXTRACT, ["-min_count=0"], 2, "argument -min_count: 0 is not "),
    Case(TRAIN, ["--batch_size=0"], 2, "argument -batch_size: 0 is not "),
    Case(TRAIN, ["-n_layer=1e3"], 2, "argument -n_layer: invalid int value: '1e3'"),
    Case(TRAIN, ["-max_iters=1" + "0" * 30], 2, "argument -max_iters: 10+ is not "),
    Case(TRAIN, ["-seed=-1"], 2, "argument -seed: -1 is not "),
    Case(TRAIN, ["-learning_rate=nan"], 2, "argument -learning_rate: nan is not "),
    Case(TRAIN, ["-dropout=1"], 2, "argument -dropout: 1 is not "),
    Case(TRAIN, ["-dtype=FLOAT32"], 2, "argument -dtype: invalid choice: 'FLOAT32'"),
    Case(TRAIN, ["-device=nosuch"], 2, "argument -device: 'nosuch' can't be used here"),
    Case(TRAIN, ["-compile=on"], 2, "argument -compile: ignored explicit argument 'on'"),
    Case(TRAIN, ["-n_embd=10", "-n_head=3"], 2, "-n_embd: 10 is not a multiple of -n_head 3"),
    Case(TRAIN, ["-vocab=vocab.txt"], 2, "argument -vocab: goes with -init_from only"),
    Case(
        TRAIN,
        ["-plot=a\nb\udcff"],
        2,
        r"argument -plot: 'a\\nb\\udcff' does not end in .png, .svg or .pdf",
    ),
    *(
        Case(TRAIN, [f"-model={name}"], 2, "argument -model: .* must end in .pkl")
        for name in ("m", "m.state.pkl", "")
    ),
    Case(TRAIN, ["-n_embd=2147483646"], 1, "not enough memory; try a smaller -batch_size"),
    Case(CHAT, ["\x1b]0;x\x07"], 2, r"unrecognized arguments: \\x1b\]0;x\\x07"),
    Case(CHAT, ["-temperature=-inf"], 2, "argument -temperature: -inf is not "),
    Case(CHAT, ["-top_k=12"], 2, "-top_k: .*the model knows only 11 characters"),
]
NOT_MODELS = [
    b"",
    b"just text",
    b"PK\5\6" + bytes(18),
    b"\x80\x04K\x01.",
    b"cos\nsystem\n(S'touch harm'\ntR.",
]
FILES = [
    Case(EXTRACT, ["-data_dir=a\nb"], 1, r"a\\nb: "),
    Case(EXTRACT, ["-data_dir=x"], 1, "x: holds no .*\\.txt", {"x/README.md": b"text"}),
    Case(EXTRACT, ["-data_dir=x"], 1, "too little text", {"x/a.txt": b""}),
    Case(EXTRACT, ["-output_dir=vocab.txt"], 1, "vocab.txt: "),
    Case(EXTRACT, [], 1, "a.xz: .*-skip_corrupt", {"in/a.xz": DAMAGED["cut short.xz"]}),
    Case(
        EXTRACT,
        [],
        1,
        r"a\\nb.tar: .*-skip_corrupt",
        {"in/a\nb.tar": tar({"a.txt": b"text" * 500})[:1500]},
    ),
    Case(
        TRAIN,
        ["-data_dir=gone"],
        1,
        f"gone/output_train.txt: {MISSING}; run data_extract.py first, or name its",
    ),
    *(
        Case(TRAIN, [], 1, f"{name}: {MISSING}; run data_ex", {name: GONE})
        for name in (*TEXTS, "vocab.txt")
    ),
    *(Case(TRAIN, [], 1, f"{name}: {IS_FOLDER}", {name: FOLDER}) for name in (*TEXTS, "vocab.txt")),
    *(
        Case(TRAIN, [], 1, f"{TEXTS[1]}: {message}", {TEXTS[1]: content})
        for content, message in (
            (
                b"",
                "holds 0 characters, -block_size 8 takes 9 or more; use a longer text or a smaller block",
            ),
            ("🙂".encode() * 8, "holds 8 characters"),
            (bytes(5000), r"the character '\\x00' is not in vocab.txt; run data_extract.py again"),
            ("\N{LINE SEPARATOR}".encode() * 100, r"the character '\\u2028' is not in"),
            (b"abc" + b"\xff" * 5000, r"not UTF-8 text at byte \d+"),
        )
    ),
    Case(
        TRAIN,
        [],
        1,
        "vocab.txt: holds no UTF-8 text; run data_extract.py again",
        {"vocab.txt": b"a\n\xff\n"},
    ),
    Case(TRAIN, ["-model=gone/x.pkl"], 1, f"gone/x.pkl.*: {MISSING}"),
    Case(TRAIN, ["-init_from=a\nb"], 1, rf"a\\nb: {MISSING}"),
    Case(TRAIN, ["-init_from=chat.pkl", "-vocab=in"], 1, f"in: {IS_FOLDER}"),
    Case(TRAIN, ["-init_from=bare.pkl"], 1, "bare.pkl: knows 11 characters, .*-vocab vocab.txt"),
    Case(CHAT, ["-model=a\nb"], 1, rf"a\\nb: {MISSING}"),
    *(
        Case(TRAIN, ["-init_from=x.pkl"], 1, "x.pkl: not a model", {"x.pkl": data})
        for data in NOT_MODELS
    ),
    *(
        Case(TRAIN, ["-resume", "-model=x.pkl"], 1, "x.st.*not a", {"x.state.pkl": data})
        for data in NOT_MODELS
    ),
    *(
        Case(CHAT, ["-model=x.pkl"], 1, "x.pkl: not a model file", {"x.pkl": data})
        for data in NOT_MODELS
    ),
    Case(
        CHAT,
        ["-model=bare.pkl", "-vocab=x"],
        1,
        "bare.pkl: knows 11 characters, .* 3;",
        {"x": b"a\nb\n"},
    ),
]
TAKEN = [  # unusual, but good
    Case(TRAIN, ["-warmup_iters=9", "-min_lr=0.1"], 0, "best model"),
    Case(
        TRAIN,
        ["-learning_rate=0", "-min_lr=0", "-weight_decay=0", "-grad_clip=0", "-patience=1"],
        0,
        "best model",
    ),
    Case(
        TRAIN,
        ["-optimizer=muon"],
        0,
        "best model",
        dict.fromkeys((*TEXTS, "vocab.txt"), b"\n" * 500),
    ),
    Case(TRAIN, ["-model=a\nb\udcff.pkl"], 0, "best model"),
    Case(TRAIN, ["--init_from=bare.pkl", "--vocab=vocab.txt"], 0, "best model"),
    Case(CHAT, ["-temperature=1e-320", "-seed=9223372036854775807"], 0, "^Completion:\na"),
    Case(CHAT, ["-prompt=\0\xff\udcff🙂a"], 0, "^Completion:\na"),
    Case(EXTRACT, ["-skip_corrupt"], 0, r"left out: a\\nb.xz", {"in/a\nb.xz": b""}),
    Case(
        EXTRACT,
        [],
        0,
        "train",
        {"in/a.xz": xz(tar({"../../escaped.txt": b"text", "/escaped.txt": b"text"}))},
    ),
]
PLAIN_FLAGS = {
    EXTRACT: ["-data_dir=in", "-output_dir=out"],
    TRAIN: [*TINY, "-max_iters=2"],
    CHAT: ["-model=chat.pkl", "-device=cpu", "-max_new_tokens=2", "-prompt=a"],
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
    return read_folder(put(folder, {f"out/{name}": b"of an earlier run" for name in NAMES}))


@pytest.fixture
def run_here(contents, tmp_path, run_main, short_samples):
    """`run_here(script, flags, files, **streams)` runs it, with its plain flags, in a folder with
    the contents.

    Gives what run_main gives, and the folder's contents before and after.
    """
    put(tmp_path, contents)

    def run(script: str, flags: list[str], files: dict[str, bytes | str] | None = None, **streams):
        for name, content in (files or {}).items():
            (tmp_path / name).unlink(missing_ok=True)
            if content == FOLDER:
                (tmp_path / name).mkdir(parents=True)
            elif content != GONE:
                put(tmp_path, {name: content})
        before = read_folder(tmp_path)
        result = run_main(script, *PLAIN_FLAGS[script], *flags, **streams)
        return result, before, read_folder(tmp_path)

    return run


@pytest.mark.parametrize("case", [*FLAGS, *FILES, *TAKEN], ids=str)
def test_bad_input_is_a_sentence_and_changes_nothing(run_here, case):
    if os.name != "posix" and re.search(r"[\n\udcff]", str([*case.flags, *case.files])):
        pytest.skip("such names exist on POSIX only")
    result, before, after = run_here(case.script, case.flags, case.files)
    if case.status:
        assert_fails(result, case.message, case.status)
        assert after == before
    else:
        assert result.returncode == 0, result.stderr
        assert re.search(case.message, result.stdout + result.stderr)
    assert not any(re.search("escaped|harm", name) for name in after)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_once_with_its_default(run_here, script):
    shown, *more = (run_here(script, [flag])[0] for flag in ("-h", "--help", "-help"))
    assert shown.returncode == 0 and all(
        same.stdout == shown.stdout and not same.stderr for same in more
    )
    flags = re.findall(r"^  (-\w+)", shown.stdout, re.MULTILINE)
    assert len(flags) == len(set(flags)) == {EXTRACT: 7, TRAIN: 27, CHAT: 13}[script]
    assert re.search(r"-seed \w+ .*\(default:\s+\S+\)", shown.stdout, re.DOTALL)
    assert not re.search("None|False|==", shown.stdout)


@posix
@pytest.mark.parametrize("script", SCRIPTS)
def test_output_that_can_not_be_written_is_a_sentence(run_here, script):
    full = open("/dev/full", "w")  # noqa: SIM115
    result, *_ = run_here(script, [], stdout=full)
    with suppress(OSError):
        full.close()
    assert_fails(result, f"standard output: {os.strerror(errno.ENOSPC)}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_terminal_that_knows_only_ascii_is_enough(run_here, script):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii", "strict", write_through=True)
    flags = {EXTRACT: ["-output_dir=é"], TRAIN: ["-model=é.pkl"], CHAT: ["-prompt=éa"]}
    assert run_here(script, flags[script], stdout=stdout)[0].returncode == 0
    assert stdout.buffer.getvalue()
