"""Bad input of every kind is one sentence, and leaves everything as it was. So are flags and help.

The table shows each kind once, in the order of the scripts: flags, files and archives. Model files
of other kinds are in test_model.py, archives in test_data_extract.py.
"""

import argparse
import errno
import io
import os
import re
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from archives import DAMAGED, NAMES, tar, xz
from conftest import MISSING, SCRIPTS, TINY, Output, assert_fails, put, read_folder

from model import GPTLanguageModel, Vocabulary, save_model

FOLDER = "a folder"
GONE = "no such file"
IS_FOLDER = os.strerror(errno.EACCES if os.name == "nt" else errno.EISDIR)
TRAIN_TEXT, VAL_TEXT, VOCAB = NAMES
EXTRACT, TRAIN, CHAT = SCRIPTS


class Case(NamedTuple):
    """In a folder changed by `files`, `script` ends with `status` and this message (a pattern)."""

    script: str
    flags: list[str]
    status: int
    message: str
    files: dict[str, bytes | str] = {}  # noqa: RUF012

    def __str__(self) -> str:
        return ascii(" ".join([self.script[:-3], *self.flags, *self.files]))[1:120]


def of_all(flags: list[str], message: str) -> list[Case]:
    """Return the cases in which every script refuses these flags."""
    return [Case(script, flags, 2, message) for script in SCRIPTS]


FLAGS = [
    *of_all(["-nonsense"], "unrecognized arguments: -nonsense"),
    *of_all(["-see=1"], "unrecognized arguments: -see=1"),
    *of_all(["--seed"], "argument -seed.*expected one argument"),
    *of_all(["-seed=1\n2\udcff"], r"argument -seed.*invalid int value: '1\\n2\\udcff'"),
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
    Case(TRAIN, ["-plot=a\nb\udcff"], 2, r"argument -plot: 'a\\nb\\udcff' does not end in .png"),
    Case(TRAIN, ["-model=m"], 2, "argument -model: .* must end in .pkl"),
    Case(TRAIN, ["-model=m.state.pkl"], 2, "argument -model: .* must end in .pkl"),
    Case(TRAIN, ["-model="], 2, "argument -model: .* must end in .pkl"),
    Case(TRAIN, ["-n_embd=2147483646"], 1, "not enough memory; try a smaller -batch_size"),
    Case(CHAT, ["\x1b]0;x\x07"], 2, r"unrecognized arguments: \\x1b\]0;x\\x07"),
    Case(CHAT, ["-temperature=-inf"], 2, "argument -temperature: -inf is not "),
    Case(CHAT, ["-top_k=12"], 2, "-top_k: .*the model knows only 11 characters"),
]
BAD_TEXTS = [
    (b"", "holds 0 characters, -block_size 8 takes 9 or more; use a longer text or a smaller"),
    ("🙂".encode() * 8, "holds 8 characters"),
    (bytes(5000), r"the character '\\x00' is not in vocab.txt; run data_extract.py again"),
    ("\N{LINE SEPARATOR}".encode() * 100, r"the character '\\u2028' is not in"),
    (b"abc" + b"\xff" * 5000, r"not UTF-8 text at byte \d+"),
]
LINE_END_TAR = {"in/a\nb.tar": tar({"a.txt": b"text" * 500})[:1500]}
HARMFUL = b"cos\nsystem\n(S'touch harm'\ntR."
FILES = [
    Case(EXTRACT, ["-data_dir=a\nb"], 1, r"a\\nb: "),
    Case(EXTRACT, ["-data_dir=x"], 1, "x: holds no .*\\.txt", {"x/README.md": b"text"}),
    Case(EXTRACT, ["-data_dir=x"], 1, "too little text", {"x/a.txt": b""}),
    Case(EXTRACT, ["-output_dir=vocab.txt"], 1, "vocab.txt: "),
    Case(EXTRACT, [], 1, "a.xz: .*-skip_corrupt", {"in/a.xz": DAMAGED["cut short.xz"]}),
    Case(EXTRACT, [], 1, r"a\\nb.tar: .*-skip_corrupt", LINE_END_TAR),
    Case(TRAIN, ["-data_dir=gone"], 1, f"gone/{TRAIN_TEXT}: {MISSING}; run data_extract.py first"),
    *(Case(TRAIN, [], 1, f"{name}: {MISSING}; run data_ex", {name: GONE}) for name in NAMES),
    *(Case(TRAIN, [], 1, f"{name}: {IS_FOLDER}", {name: FOLDER}) for name in NAMES),
    *(Case(TRAIN, [], 1, f"{VAL_TEXT}: {words}", {VAL_TEXT: text}) for text, words in BAD_TEXTS),
    Case(TRAIN, [], 1, f"{VOCAB}: holds no UTF-8 text; run data_ex", {VOCAB: b"a\n\xff\n"}),
    Case(TRAIN, ["-init_from=a\nb"], 1, r"a\\nb: "),
    Case(TRAIN, ["-init_from=chat.pkl", "-vocab=in"], 1, f"in: {IS_FOLDER}"),
    Case(TRAIN, ["-init_from=bare.pkl"], 1, "bare.pkl: knows 11 characters, .*-vocab vocab.txt"),
    Case(TRAIN, ["-init_from=x.pkl"], 1, "x.pkl: not a model file", {"x.pkl": HARMFUL}),
    Case(TRAIN, ["-resume", "-model=x.pkl"], 1, "x.state.pkl: ", {"x.state.pkl": HARMFUL}),
    Case(CHAT, ["-model=a\nb"], 1, r"a\\nb: "),
    Case(CHAT, ["-model=in"], 1, f"in: {IS_FOLDER}"),
    Case(CHAT, ["-model=x.pkl"], 1, "x.pkl: not a model file", {"x.pkl": HARMFUL}),
    Case(CHAT, ["-model=bare.pkl", "-vocab=x"], 1, "bare.pkl: knows 11.* 3;", {"x": b"a\nb\n"}),
]
NO_STEP = ["-learning_rate=0", "-min_lr=0", "-weight_decay=0", "-grad_clip=0", "-patience=1"]
OUTSIDE = tar({"../../escaped.txt": b"text", "/escaped.txt": b"text"})
TAKEN = [  # unusual, but good
    Case(TRAIN, ["-warmup_iters=9", "-min_lr=0.1"], 0, "best model"),
    Case(TRAIN, NO_STEP, 0, "best model"),
    Case(TRAIN, ["-optimizer=muon"], 0, "best model", dict.fromkeys(NAMES, b"\n" * 500)),
    Case(TRAIN, ["-model=gone/x.pkl"], 0, "best model"),
    Case(TRAIN, ["-model=a\nb\udcff.pkl"], 0, "best model"),
    Case(TRAIN, ["--init_from=bare.pkl", "--vocab", "vocab.txt"], 0, "best model"),
    Case(CHAT, ["-temperature=1e-320", "-seed=9223372036854775807"], 0, "^Completion:\na"),
    Case(CHAT, ["-prompt=\0\xff\udcff🙂a"], 0, "^Completion:\na"),
    Case(CHAT, ["--prompt=--hat"], 0, "^Completion:\nhat"),
    Case(CHAT, ["--prompt", "--hat c"], 0, "^Completion:\nhat c"),
    Case(EXTRACT, ["-skip_corrupt"], 0, r"left out: a\\nb.xz", {"in/a\nb.xz": b""}),
    Case(EXTRACT, [], 0, "train", {"in/a.xz": xz(OUTSIDE)}),
]
PLAIN_FLAGS = {
    EXTRACT: ["-data_dir=in", "-output_dir=out"],
    TRAIN: [*TINY, "-max_iters=2"],
    CHAT: ["-model=chat.pkl", "-device=cpu", "-max_new_tokens=2", "-prompt=a"],
}


@pytest.fixture(scope="session")
def contents(tmp_path_factory, finished_run) -> dict[str, bytes]:
    """Return a run, its texts, a model, one without its vocabulary, and archives, by name."""
    folder = put(tmp_path_factory.mktemp("good"), finished_run)
    vocabulary = Vocabulary.from_file(folder / VOCAB)
    model = GPTLanguageModel(len(vocabulary), n_embd=16, n_head=2, n_layer=1, block_size=8)
    save_model(folder / "chat.pkl", model, vocabulary)
    torch.save(model.state_dict(), folder / "bare.pkl")
    put(folder, {"in/a.txt": b"first ", "in/b.txt": b"second"})
    return read_folder(put(folder, {f"out/{name}": b"of an earlier run" for name in NAMES}))


@pytest.fixture
def run_here(contents, tmp_path, run_main, short_samples):
    """`run_here(script, flags, files, **streams)` runs it, with its plain flags, on the contents.

    Returns what run_main returns, and the folder's contents before and after.
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
    made = [*case.files, *(case.flags if case.status == 0 else [])]
    if os.name == "nt" and "\n" in "".join(made):
        pytest.skip("Windows allows no line end in the name of a file")
    result, before, after = run_here(case.script, case.flags, case.files)
    if case.status:
        assert_fails(result, case.message, case.status)
        assert after == before
    else:
        assert result.returncode == 0, result.stderr
        assert re.search(case.message, result.stdout + result.stderr)
    assert not any(re.search("escaped|harm", name) for name in after)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_once_with_its_default(run_here, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # so that no text is broken
    shown, *same = [run_here(script, [flag])[0] for flag in ("-h", "-help", "--help")]
    assert shown.returncode == 0 and [done.stdout for done in same] == [shown.stdout] * 2
    texts = re.findall(r"^  (-\w+)(.*(?:\n {3,}.*)?)", shown.stdout, re.MULTILINE)
    with patch.object(argparse.ArgumentParser, "print_help", autospec=True) as print_help:
        run_here(script, ["-h"])
    (parser,) = print_help.call_args.args
    defaults = {"h": None, **vars(parser.parse_args([])), **getattr(parser, "defaults", {})}
    assert sorted(flag for flag, _ in texts) == sorted(f"-{name}" for name in defaults)
    for flag, text in texts:
        default = defaults[flag[1:]]
        assert default in (None, False, "") or text.endswith(f"(default: {default})")
        assert re.search("[a-z]{3}", text) and not re.search("None|False|==", text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_output_that_can_not_be_written_is_a_sentence(run_here, script):
    output = Output()
    output.error = errno.ENOSPC
    result, *_ = run_here(script, [], stdout=output)
    assert_fails(result, f"standard output: {os.strerror(errno.ENOSPC)}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_terminal_that_knows_only_ascii_is_enough(run_here, script):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii", "strict", write_through=True)
    flags = {EXTRACT: ["-output_dir=é"], TRAIN: ["-model=é.pkl"], CHAT: ["-prompt=éa"]}
    assert run_here(script, flags[script], stdout=stdout)[0].returncode == 0
    assert stdout.buffer.getvalue()
