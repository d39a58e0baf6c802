"""What README.md says is so: its commands run, its flags, messages, names and links exist, every
flag has a help text.

The commands run from the top of the page to its end in one folder, as a reader types them, on tiny
shapes. Those that need several processes are parsed only, and those of other programs are known by
their first word.
"""

import argparse
import ast
import gzip
import io
import json
import re
import runpy
import shlex
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import benchmark
import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, put, write_texts
from torch.distributed.run import parse_args as parse_torchrun

import data_extract
import training
from model import GPTLanguageModel, Vocabulary, save_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "model.py")}
PROSE = re.sub(
    r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL
)  # all but the fenced blocks
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
FIRST_SCREEN = PROSE.partition("\n## ")[0]
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PROSE, flags=re.MULTILINE | re.DOTALL))
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")

OUR_PROGRAMS = ("python", "torchrun")
OTHER_PROGRAMS = (
    "pip",
    "python3",
    "py",
    "mkdir",
    "curl",
    "tar",
    "pdftotext",
    "pandoc",
    "iconv",
    "Set-ExecutionPolicy",
)
FLAGS_WITHOUT_A_DEFAULT = {"init_from", "vocab", "plot", "prompt", "prompt_file", "stop"}
SMALL = {
    "data_extract.py": [],
    "training.py": [*TINY, "-max_iters=2"],
    "chatbot.py": ["-max_new_tokens=5", "-device=cpu"],
}


# Commands -----------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Return the commands of a part of the page, in their order: those in blocks, and those in the
    text.
    """
    found = []
    for line in text.splitlines():
        if line.startswith("    "):
            line = line.strip().removeprefix("$ ").removeprefix("!")
            if line.startswith((*OUR_PROGRAMS, "pip")) and ".venv" not in line:
                found += line.split(" && ")
        else:
            found += [
                code for code in INLINE_CODE.findall(line) if " " in code and is_command(code)
            ]
    return found


def is_command(code: str) -> bool:
    return code.startswith("echo ") or code.split()[0] in OUR_PROGRAMS + OTHER_PROGRAMS


def text_of_a_book(characters: str = "abcdefgh ") -> bytes:
    return f"{characters}\n".encode() * 200


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what a reader has who follows the recipes, but for `openwebtext`, which comes
    later.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("my_texts", "shakespeare", "theirs"):
        put(tmp_path, {f"{name}/text.txt": text_of_a_book()})
    vocabulary = Vocabulary("abcdefgh \n")
    model = GPTLanguageModel(len(vocabulary), n_embd=16, n_head=2, n_layer=1, block_size=8)
    torch.save(model.state_dict(), "theirs.pkl")
    write_texts(tmp_path / "theirs", train="abcdefgh \n")
    put(tmp_path, {"prompt.txt": b"The", "my_texts/book.txt.gz": gzip.compress(text_of_a_book())})
    with zipfile.ZipFile("texts.zip", "w") as archive:
        archive.writestr("zipped.txt", text_of_a_book())
    with tarfile.open("texts.tar.gz", "w:gz") as archive:
        archive.add("prompt.txt")
    return tmp_path


@pytest.fixture
def run_command(reader, run_main, monkeypatch):
    """`run_command("python chatbot.py -show")` runs a command of the page on tiny shapes; returns
    what it printed.
    """

    def run(command: str) -> str:
        typed, _, piped_to = command.rpartition("|")
        program, *arguments = shlex.split(piped_to)
        if program in OTHER_PROGRAMS:
            return ""
        if program == "torchrun":
            check_torchrun(arguments)
        elif arguments[0] in SCRIPTS:
            return run_script(arguments[0], arguments[1:], typed.removeprefix("echo "))
        elif arguments[0] == "tests/benchmark.py":
            check_benchmark(arguments[1:])
        elif arguments[:2] == ["-m", "pytest"]:
            check_pytest(arguments[2:])
        elif arguments[0] == "-m":
            monkeypatch.setattr(sys, "argv", arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__")
        else:
            pytest.fail(f"nobody knows how to try this: {command}")
        return ""

    def run_script(name: str, arguments: list[str], typed: str) -> str:
        stdin = io.TextIOWrapper(io.BytesIO(typed.encode()), "utf-8")
        done = run_main(name, *arguments, *SMALL[name], cwd=reader, stdin=stdin)
        assert done.returncode == 0, (name, arguments, done.stderr)
        return done.stderr + done.stdout

    def check_benchmark(arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(benchmark, "ROWS", dict.fromkeys(benchmark.ROWS, ()))
            patch.setattr(benchmark, "QUICK", ())
            patch.setattr(
                benchmark, "DEVICE", SimpleNamespace(type="cuda")
            )  # or `-only gpu` would be refused
            patch.setattr(
                torch.cuda, "get_device_name", lambda: "a card that is not asked for anything"
            )
            patch.setattr(benchmark, "provide_text", lambda folder, data_dir: None)
            patch.setattr(benchmark, "load_nanogpt", lambda folder: None)
            patch.setattr(sys, "argv", ["benchmark.py", *arguments])
            benchmark.main()

    return run


def check_torchrun(arguments: list[str]) -> None:
    """Parse the launcher's flags and those of the script; see that the processes can share a batch."""
    launcher = parse_torchrun(arguments)
    assert launcher.training_script == "training.py"
    args = training.training_parser().parse_args(launcher.training_script_args)
    assert (
        args.batch_size % (int(launcher.nnodes.split(":")[-1]) * int(launcher.nproc_per_node)) == 0
    )


def check_pytest(arguments: list[str]) -> None:
    """See that the file to test, or the marker, exists."""
    known = (ROOT / ".pytest.ini").read_text(encoding="utf-8")
    assert (
        not arguments
        or (ROOT / arguments[0]).is_file()
        or (arguments[0] == "-m" and f"{arguments[1]}:" in known)
    )


def test_every_command_runs(run_command, reader):
    page = [FIRST_SCREEN, *SECTIONS.values()]
    assert sum(len(commands(text)) for text in page) > 35
    for text in page:
        if text == SECTIONS["Recipes"]:
            put(reader, {f"openwebtext/{i}.txt": text_of_a_book() for i in range(2)})
        for command in commands(text):
            run_command(command)
    assert (reader / "my_texts/zipped.txt").exists() and (reader / "my_texts/book.txt").exists()
    assert {"mine.pkl", "model-01.state.pkl"} <= {path.name for path in reader.iterdir()}


def test_ci_finds_the_command_that_runs_the_tests():
    line = next(
        line for line in README.splitlines() if "python -m pytest" in line
    )  # as .ci/run looks for it
    assert line == "    pip install -r requirements.txt pytest && python -m pytest"


def without_figures(text: str) -> str:
    """Return a text with 0 for every number, without what differs between machines or sizes, and
    with single blanks.
    """
    text = re.sub(r"\d[\d.,]*\d|\d", "0", text)
    text = re.sub(r"\w*float0", "float", text)
    text = text.replace("threads,", "thread,")
    text = text.replace(
        "first 0 characters of the", "whole"
    )  # all of it would take a tiny run too long
    return " ".join(text.split())


def test_the_session_is_what_the_scripts_print(run_command):
    blocks = re.findall(
        r"^    \$ python (?:data_extract|training).*\n(?:    .*\n)+", FIRST_SCREEN, re.MULTILINE
    )
    assert len(blocks) == 2
    for block in blocks:
        command, *lines = [line.removeprefix("    ") for line in block.splitlines()]
        printed = without_figures(run_command(command.removeprefix("$ ")))
        for line in lines:
            if line != "..." and not line.startswith("    "):  # which are samples
                assert without_figures(line) in printed, line


# Flags --------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Ends a script once it has made its parser, which it carries."""


def actions(script: str, monkeypatch) -> dict[str, argparse.Action]:
    """Return the flags of a script by name."""

    def stop(parser, *_):
        raise Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [script])
        with pytest.raises(Parsed) as caught:
            SCRIPTS[script].parse_args(*([[]] if script == "data_extract.py" else []))
    return {
        action.dest: action for action in caught.value.args[0]._actions if action.dest != "help"
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text_that_names_its_default(script, monkeypatch):
    for name, action in actions(script, monkeypatch).items():
        assert len(action.help) > 10, name
        if action.default not in (None, False):
            assert "(default: %(default)s)" in action.help, name
        elif action.default is None and name not in FLAGS_WITHOUT_A_DEFAULT:
            assert "(default: " in action.help, name


def test_every_flag_in_the_text_exists(monkeypatch):
    known = {name for script in SCRIPTS for name in actions(script, monkeypatch)}
    known |= {"h", "m", "only", "nanogpt"}  # of Python, pytest and the benchmark
    for code in INLINE_CODE.findall(PROSE):
        if code.startswith("-"):
            assert re.match(r"--?(\w+)", code).group(1) in known, code


def test_what_a_resumed_run_may_change_is_named():
    paragraph = next(text for text in SECTIONS["Recipes"].split("\n\n") if "may change" in text)
    named = re.findall(r"`-(\w+)`", paragraph.partition("may change")[0])
    assert sorted(named) == sorted({*training.MAY_CHANGE_ON_RESUME, "plot", "compile"})


# Messages, names and links ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section", ["How the model works", "How training works", "Reading the code"]
)
def test_names_in_the_text_are_those_in_the_code(section):
    names = [
        code
        for code in INLINE_CODE.findall(SECTIONS[section])
        if re.fullmatch(r"[A-Za-z]\w+", code)
    ]
    assert names
    for name in names:
        assert any(re.search(rf"\b{name}\b", source) for source in SOURCES.values()), name


def test_files_in_the_text_exist():
    for name in re.findall(r"`((?:tests/|\.ci/)[\w./]+)", PROSE) + list(SOURCES):
        assert (ROOT / name).is_file() and f"`{name}" in PROSE, name
    for name in re.findall(r"!\[[^]]+\]\((.+?)\)", PROSE):
        assert (ROOT / name).read_text(encoding="utf-8").startswith("<svg"), name


def anchor(heading: str) -> str:
    """Return the part of an address that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_to_headings():
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)}
    targets = [
        target
        for target in re.findall(r"\]\(([^)]+)\)", PROSE)
        if not target.startswith(".readme/")
    ]
    assert sum(target.startswith("#") for target in targets) >= 2
    for target in targets:
        assert target[1:] in anchors if target.startswith("#") else target.startswith("https://"), (
            target
        )


def test_the_section_that_messages_name_exists():
    assert re.search('README, "(.+)"', data_extract.ELSEWHERE).group(1) in SECTIONS


def test_each_script_imports_only_what_it_may():
    """The rule of the house: workers of data_extract.py start in a tenth of the time without torch."""
    may = {
        "model.py": {"torch", "numpy"},
        "data_extract.py": {"numpy", "tqdm"},
        "training.py": {"model", "torch", "numpy", "tqdm", "matplotlib"},
        "chatbot.py": {"model", "torch"},
    }
    for name, source in SOURCES.items():
        imported = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
        assert imported - sys.stdlib_module_names - {"pydoc_data"} <= may[name], name


# Python -------------------------------------------------------------------------------------------


def snippet(word: str) -> str:
    """Return the only Python snippet that has this word."""
    (found,) = [code for code in SNIPPETS if word in code]
    return found


def test_python_for_a_notebook_works_as_pasted(tmp_path, monkeypatch, capsys):
    vocabulary = Vocabulary("The object\n")
    model = GPTLanguageModel(len(vocabulary), n_embd=16, n_head=2, n_layer=3, block_size=16)
    save_model(tmp_path / "model-01.pkl", model, vocabulary)
    monkeypatch.chdir(tmp_path)
    exec(snippet("load_model"), {})
    shown = capsys.readouterr().out
    assert shown.startswith("The object") and re.search(r"\n\d\.\d\d nats per character\n$", shown)


ROWS = [
    {"text": "One “text” of\ntwo lines"},
    {"text": None},
    {"text": "Another: 你好 🙂", "url": "not this"},
]
EXPECTED = "One “text” of\ntwo lines\n\nAnother: 你好 🙂\n\n"


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("ending, pack", [("jsonl.gz", gzip.compress), ("jsonl", bytes)])
def test_the_recipe_for_json_lines(tmp_path, monkeypatch, ending, pack):
    files = {"a": pack(json_lines(ROWS[:1])), "b": pack(json_lines(ROWS))}
    put(tmp_path / "downloads", {f"{name}.{ending}": content for name, content in files.items()})
    (tmp_path / "my_texts").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(snippet("gzip.open"), {})
    one = "One “text” of\ntwo lines\n\n"
    assert (tmp_path / "my_texts/jsonl.txt").read_bytes().decode() == one + EXPECTED


def test_the_recipe_for_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="the recipe for .parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("downloads", "my_texts"):
        (tmp_path / name).mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "downloads/a.parquet")
    monkeypatch.chdir(tmp_path)
    exec(snippet("pyarrow"), {})
    assert (tmp_path / "my_texts/parquet.txt").read_bytes().decode() == EXPECTED


def test_every_snippet_is_tried():
    assert sorted(SNIPPETS) == sorted(map(snippet, ("load_model", "gzip.open", "pyarrow")))
