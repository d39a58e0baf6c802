"""Bad input of every kind is one sentence, and leaves everything as it was. So are flags and help.

The table shows each kind once, in the order of the scripts: flags, files and archives. Model files
of other kinds are in test_model.py, archives in test_data_extract.py.
"""

import errno
import io
import os
import re
from argparse import ArgumentParser
from unittest.mock import patch

import pytest
import torch
from archives import DAMAGED, NAMES, tar, xz
from conftest import MISSING, SCRIPTS, TINY, Output, assert_fails, put, read_folder

from model import load_model

IS_FOLDER = os.strerror(errno.EACCES if os.name == "nt" else errno.EISDIR)
TRAIN_TEXT, VAL_TEXT, VOCAB = NAMES
EXTRACT, TRAIN, CHAT = SCRIPTS
OF_ALL = {  # flags that every script refuses
    "-nonsense": "unrecognized arguments: -nonsense",
    "-see=1": "unrecognized arguments: -see=1",
    "--seed": "argument -seed.*expected one argument",
    "-seed=1\n2\udcff": r"argument -seed.*invalid int value: '1\\n2\\udcff'",
}
BAD_TEXTS = [
    (b"", "holds 0 characters, -block_size 8 takes 9 or more; use a longer text or a smaller"),
    ("🙂".encode() * 8, "holds 8 characters"),
    (bytes(5000), r"the character '\\x00' is not in vocab.txt; run data_extract.py again"),
    ("\N{LINE SEPARATOR}".encode() * 100, r"the character '\\u2028' is not in"),
    (b"abc" + b"\xff" * 5000, r"not UTF-8 text at byte \d+"),
]
LINE_END_TAR = {"in/a\nb.tar": tar({"a.txt": b"text" * 500})[:1500]}
OUTSIDE = tar({"../../escaped.txt": b"text", "/escaped.txt": b"text"})
HARMFUL = b"cos\nsystem\n(S'touch harm'\ntR."
NO_STEP = ["-learning_rate=0", "-min_lr=0", "-weight_decay=0", "-grad_clip=0", "-patience=1"]


def case(script: str, flags: list[str], status: int, message: str, files: dict | None = None):
    """Return the case in which `script` ends with `status` and this message (a pattern).

    `files` are in its folder instead of those of the same names, or None, for no file.
    """
    name = ascii(" ".join([script[:-3], *flags, *(files or {})]))[1:120]
    return pytest.param(script, flags, status, message, files or {}, id=name)


CASES = [
    # Flags
    *(case(script, [flag], 2, OF_ALL[flag]) for flag in OF_ALL for script in SCRIPTS),
    case(EXTRACT, ["-sample_rate=nan"], 2, "argument -sample_rate: "),
    case(EXTRACT, ["-min_count=0"], 2, "argument -min_count: 0 is not "),
    case(TRAIN, ["--batch_size=0"], 2, "argument -batch_size: 0 is not "),
    case(TRAIN, ["-n_layer=1e3"], 2, "argument -n_layer: invalid int value: '1e3'"),
    case(TRAIN, ["-max_iters=1" + "0" * 30], 2, "argument -max_iters: 10+ is not "),
    case(TRAIN, ["-seed=-1"], 2, "argument -seed: -1 is not "),
    case(TRAIN, ["-learning_rate=nan"], 2, "argument -learning_rate: nan is not "),
    case(TRAIN, ["-dropout=1"], 2, "argument -dropout: 1 is not "),
    case(TRAIN, ["-dtype=FLOAT32"], 2, "argument -dtype: invalid choice: 'FLOAT32'"),
    case(TRAIN, ["-device=nosuch"], 2, "argument -device: 'nosuch' can't be used here"),
    case(TRAIN, ["-compile=on"], 2, "argument -compile: ignored explicit argument 'on'"),
    case(TRAIN, ["-n_embd=10", "-n_head=3"], 2, "-n_embd: 10 is not a multiple of -n_head 3"),
    case(TRAIN, ["-vocab=vocab.txt"], 2, "argument -vocab: goes with -init_from only"),
    case(TRAIN, ["-plot=a\nb\udcff"], 2, r"argument -plot: 'a\\nb\\udcff' does not end in .png"),
    case(TRAIN, ["-model=m"], 2, "argument -model: .* must end in .pkl"),
    case(TRAIN, ["-model=m.state.pkl"], 2, "argument -model: .* must end in .pkl"),
    case(TRAIN, ["-model="], 2, "argument -model: .* must end in .pkl"),
    case(TRAIN, ["-n_embd=2147483646"], 1, "not enough memory; try a smaller -batch_size"),
    case(CHAT, ["\x1b]0;x\x07"], 2, r"unrecognized arguments: \\x1b\]0;x\\x07"),
    case(CHAT, ["-temperature=-inf"], 2, "argument -temperature: -inf is not "),
    case(CHAT, ["-top_k=12"], 2, "-top_k: .*the model knows only 11 characters"),
    # Files
    case(EXTRACT, ["-data_dir=a\nb"], 1, r"a\\nb: "),
    case(EXTRACT, ["-data_dir=x"], 1, "x: holds no .*\\.txt", {"x/README.md": b"text"}),
    case(EXTRACT, ["-data_dir=x"], 1, "too little text", {"x/a.txt": b""}),
    case(EXTRACT, ["-output_dir=vocab.txt"], 1, "vocab.txt: "),
    case(EXTRACT, [], 1, "a.xz: .*-skip_corrupt", {"in/a.xz": DAMAGED["cut short.xz"]}),
    case(EXTRACT, [], 1, r"a\\nb.tar: .*-skip_corrupt", LINE_END_TAR),
    case(TRAIN, ["-data_dir=gone"], 1, f"gone/{TRAIN_TEXT}: {MISSING}; run data_extract.py first"),
    *(case(TRAIN, [], 1, f"{name}: {MISSING}; run data_ex", {name: None}) for name in NAMES),
    *(case(TRAIN, [], 1, f"{name}: {IS_FOLDER}", {name: None, f"{name}/a": b""}) for name in NAMES),
    *(case(TRAIN, [], 1, f"{VAL_TEXT}: {words}", {VAL_TEXT: text}) for text, words in BAD_TEXTS),
    case(TRAIN, [], 1, f"{VOCAB}: holds no UTF-8 text; run data_ex", {VOCAB: b"a\n\xff\n"}),
    case(TRAIN, ["-init_from=a\nb"], 1, r"a\\nb: "),
    case(TRAIN, ["-init_from=run.pkl", "-vocab=in"], 1, f"in: {IS_FOLDER}"),
    case(TRAIN, ["-init_from=bare.pkl"], 1, "bare.pkl: knows 11 characters, .*-vocab vocab.txt"),
    case(TRAIN, ["-init_from=x.pkl"], 1, "x.pkl: not a model file", {"x.pkl": HARMFUL}),
    case(TRAIN, ["-resume", "-model=x.pkl"], 1, "x.state.pkl: ", {"x.state.pkl": HARMFUL}),
    case(CHAT, ["-model=a\nb"], 1, r"a\\nb: "),
    case(CHAT, ["-model=in"], 1, f"in: {IS_FOLDER}"),
    case(CHAT, ["-model=x.pkl"], 1, "x.pkl: not a model file", {"x.pkl": HARMFUL}),
    case(CHAT, ["-model=bare.pkl", "-vocab=x"], 1, "bare.pkl: knows 11.* 3;", {"x": b"a\nb\n"}),
    # Unusual, but good
    case(TRAIN, ["-warmup_iters=9", "-min_lr=0.1"], 0, "best model"),
    case(TRAIN, NO_STEP, 0, "best model"),
    case(TRAIN, ["-optimizer=muon"], 0, "best model", dict.fromkeys(NAMES, b"\n" * 500)),
    case(TRAIN, ["-model=gone/x.pkl"], 0, "best model"),
    case(TRAIN, ["-model=a\nb\udcff.pkl"], 0, "best model"),
    case(TRAIN, ["--init_from=bare.pkl", "--vocab", "vocab.txt"], 0, "best model"),
    case(CHAT, ["-temperature=1e-320", "-seed=9223372036854775807"], 0, "^Completion:\na"),
    case(CHAT, ["-prompt=\0\xff\udcff🙂a"], 0, "^Completion:\na"),
    case(CHAT, ["--prompt=--hat"], 0, "^Completion:\nhat"),
    case(CHAT, ["--prompt", "--hat c"], 0, "^Completion:\nhat c"),
    case(EXTRACT, ["-skip_corrupt"], 0, r"left out: a\\nb.xz", {"in/a\nb.xz": b""}),
    case(EXTRACT, [], 0, "train", {"in/a.xz": xz(OUTSIDE)}),
]
PLAIN_FLAGS = {
    EXTRACT: ["-data_dir=in", "-output_dir=out"],
    TRAIN: [*TINY, "-max_iters=2"],
    CHAT: ["-model=run.pkl", "-device=cpu", "-max_new_tokens=2", "-prompt=a"],
}


@pytest.fixture(scope="session")
def contents(tmp_path_factory, finished_run) -> dict[str, bytes]:
    """Return a run, its texts, its model without its vocabulary, and archives, by name."""
    folder = put(tmp_path_factory.mktemp("good"), finished_run)
    model, _ = load_model(folder / "run.pkl")
    torch.save(model.state_dict(), folder / "bare.pkl")
    put(folder, {"in/a.txt": b"first ", "in/b.txt": b"second"})
    return read_folder(put(folder, {f"out/{name}": b"of an earlier run" for name in NAMES}))


@pytest.fixture
def run_here(contents, tmp_path, run_main, short_samples):
    """`run_here(script, flags, files, **streams)` runs it, with its plain flags, on the contents.

    Returns what run_main returns, and the folder's contents before and after.
    """

    def run(script: str, flags: list[str], files: dict[str, bytes | None], **streams):
        there = {**contents, **files}
        put(tmp_path, {name: content for name, content in there.items() if content is not None})
        before = read_folder(tmp_path)
        result = run_main(script, *PLAIN_FLAGS[script], *flags, **streams)
        return result, before, read_folder(tmp_path)

    return run


@pytest.mark.parametrize(("script", "flags", "status", "message", "files"), CASES)
def test_bad_input_is_a_sentence_and_changes_nothing(
    run_here, script, flags, status, message, files
):
    made = [*files, *(flags if status == 0 else [])]
    if os.name == "nt" and "\n" in "".join(made):
        pytest.skip("Windows allows no line end in the name of a file")
    result, before, after = run_here(script, flags, files)
    if status:
        assert_fails(result, message, status)
        assert after == before
    else:
        assert result.returncode == 0, result.stderr
        assert re.search(message, result.stdout + result.stderr)
    assert not any(re.search("escaped|harm", name) for name in after)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_once_with_its_default(run_here, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # so that no text is broken
    with patch.object(
        ArgumentParser, "print_help", autospec=True, side_effect=ArgumentParser.print_help
    ) as spy:
        shown, *same = [run_here(script, [flag], {})[0] for flag in ("-h", "-help", "--help")]
    assert shown.returncode == 0 and [done.stdout for done in same] == [shown.stdout] * 2
    texts = re.findall(r"^  (-\w+)(.*(?:\n {3,}.*)?)", shown.stdout, re.MULTILINE)
    (parser,) = spy.call_args.args
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
    message = f"standard output: {os.strerror(errno.ENOSPC)}"
    assert_fails(run_here(script, [], {}, stdout=output)[0], message)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_terminal_that_knows_only_ascii_is_enough(run_here, script):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii", "strict", write_through=True)
    flags = {EXTRACT: ["-output_dir=é"], TRAIN: ["-model=é.pkl"], CHAT: ["-prompt=éa"]}
    assert run_here(script, flags[script], {}, stdout=stdout)[0].returncode == 0
    assert stdout.buffer.getvalue()
