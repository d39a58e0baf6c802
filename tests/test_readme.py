"""What README.md says is so: commands, flags, names, files, links, a session, Python to paste.

The commands run from the top of the page to its end in one folder, as a reader types them, on tiny
shapes. Those that need several processes, a GPU or minutes are only checked for their flags.
"""

import gzip
import io
import json
import re
import runpy
import shlex
import shutil
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, put, write_texts
from torch.distributed.run import parse_args as parse_torchrun

import data_extract
import training
from model import GPTLanguageModel, Vocabulary, save_model

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "model.py")}
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
NOTEBOOK, TABLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
FIRST_SCREEN = PROSE.partition("\n## ")[0]
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PROSE, flags=re.MULTILINE | re.DOTALL))
SMALL = {
    "data_extract.py": [],
    "training.py": [*TINY, "-max_iters=2"],
    "chatbot.py": ["-max_new_tokens=5", "-device=cpu"],
}


# Commands -----------------------------------------------------------------------------------------


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what a reader has who follows the page, but for `openwebtext`."""
    monkeypatch.chdir(tmp_path)
    book = b"abcdefgh \n" * 200
    put(
        tmp_path,
        {
            "my_texts/text.txt": book,
            "my_texts/book.txt.gz": gzip.compress(book),
            "shakespeare/input.txt": book,
        },
    )
    shutil.make_archive("texts", "zip", "shakespeare")
    write_texts(tmp_path / "theirs", train="abcdefgh \n")
    model = GPTLanguageModel(vocab_size=10, n_embd=16, n_head=2, n_layer=1, block_size=8)
    torch.save(model.state_dict(), "theirs.pkl")
    return tmp_path


@pytest.fixture
def run_command(reader, run_main, monkeypatch):
    """`run_command("python chatbot.py -show")` runs a command of the page on tiny shapes.

    It returns what the command printed.
    """

    def run(command: str) -> str:
        program, name, *arguments = shlex.split(command)
        if program == "python" and name in SCRIPTS:
            done = run_main(name, *arguments, *SMALL[name], stdin=io.StringIO("A prompt\n"))
            assert done.returncode == 0, (command, done.stderr)
            return done.stderr + done.stdout
        if program == "torchrun":  # see that the processes can share a batch
            launcher = parse_torchrun([name, *arguments])
            args, _ = training.training_parser().parse(launcher.training_script_args)
            assert launcher.training_script == "training.py"
            assert args.batch_size % int(launcher.nproc_per_node) == 0
        elif name == "tests/benchmark.py":  # it takes minutes: see that it has these flags and rows
            source = (ROOT / name).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in arguments if "/" not in word)
        elif arguments[0] == "pytest":  # see that the file to test, or the marker, exists
            settings = (ROOT / ".pytest.ini").read_text(encoding="utf-8")
            assert all(
                (ROOT / word).is_file() or f"{word}:" in settings
                for word in arguments[1:]
                if word != "-m"
            )
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_module(arguments[0], run_name="__main__")
        return ""

    return run


def commands_in(section: str) -> list[str]:
    """Return the commands of a section, also the first one with the flags of each row of a table.

    In a block they are at the beginning of a line or after another command, in the text in
    backticks. What other programs do is not tried.
    """
    commands = re.findall(
        r"(?:^    |\$ |&& |`)((?:python|torchrun) [^`&\n]+)", section, re.MULTILINE
    )
    rows = re.findall(r"^\|.*<br>`(-block_size .+?)`", section, re.MULTILINE)
    return commands + [f"{commands[0]} {flags}" for flags in rows]


def without_figures(text: str) -> list[str]:
    """Return the lines of a text with 0 for every number and with single blanks."""
    lines = re.sub(r"\d[\d.,]*\d|\d", "0", text).splitlines()
    return [" ".join(line.split()) for line in lines]


def test_every_command_runs_and_the_session_is_what_training_prints(run_command, reader):
    printed = {}
    for section in [FIRST_SCREEN, *SECTIONS.values()]:
        if section == SECTIONS["Recipes"]:
            put(reader, {f"openwebtext/{i}.txt": b"The text of a book\n" * 100 for i in range(2)})
        printed |= {command: run_command(command) for command in commands_in(section)}
    assert len(printed) > 31 and len(commands_in(SECTIONS["What each part buys"])) > 6
    made = {"my_texts/input.txt", "my_texts/book.txt", "page.html", "mine.pkl"}
    assert made <= {path.relative_to(reader).as_posix() for path in reader.rglob("*")}
    session = re.search(r"^    \$ (python training.*)\n((?:    .+\n)+)", FIRST_SCREEN, re.MULTILINE)
    lines = without_figures(session[2])
    assert len(lines) > 4 and {*lines} <= {*without_figures(printed[session[1]]), "..."}


def test_ci_finds_the_command_that_runs_the_tests():
    # .ci/run takes the first.
    line = re.search(".*python -m pytest.*", README)[0]
    assert line == "    pip install -r requirements.txt pytest && python -m pytest"


# Flags, names, files and links --------------------------------------------------------------------


def test_every_flag_in_the_text_exists(run_main):
    help_texts = "".join(run_main(script, "-h").stdout for script in SCRIPTS)
    known = set(re.findall(r"^ +(-\w+)", help_texts, re.MULTILINE))
    codes = [code for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PROSE) if code.startswith("-")]
    assert len(codes) > 30
    assert set(re.findall(r"(?<!\S)-[a-z]\w*", " ".join(codes))) <= known


def test_what_a_resumed_run_may_change_is_named():
    paragraph = next(text for text in SECTIONS["Recipes"].split("\n\n") if "may change" in text)
    named = re.findall(r"`-(\w+)`", paragraph.partition("may change")[0])
    assert sorted(named) == sorted({*training.MAY_CHANGE_ON_RESUME, "plot", "compile"})


@pytest.mark.parametrize("section", ["How the model works", "Reading the code"])
def test_names_in_the_text_are_those_in_the_code(section):
    names = set(re.findall(r"`([A-Za-z]\w+)`", SECTIONS[section]))
    assert names and names <= set(re.findall(r"\w+", "".join(SOURCES.values())))


def test_files_in_the_text_exist():
    assert sorted(re.findall(r"`([\w./]+\.py)`", SECTIONS["Reading the code"])) == sorted(SOURCES)


def test_pictures_are_what_their_names_say():
    look, show = re.findall(r"!\[[^]]+\]\((.+?)\)", PROSE)
    assert look.endswith(".png") and (ROOT / look).read_bytes().startswith(b"\x89PNG")
    assert show.endswith(".svg") and (ROOT / show).read_bytes().startswith(b"<svg")


def test_links_and_messages_lead_to_headings():
    targets = re.findall(r"(?<!!)\[[^]]+\]\(([^)]+)\)", PROSE)
    inside = {target for target in targets if target.startswith("#")}
    # GitHub leaves other characters than these out of the part of an address that leads to one.
    headings = {re.sub(r"[^\w\- ]", "", heading.lower()) for heading in SECTIONS}
    assert inside and inside <= {"#" + heading.replace(" ", "-") for heading in headings}
    assert all(target.startswith(("#", "https://")) for target in targets)
    assert re.search('README, "(.+)"', data_extract.ELSEWHERE)[1] in SECTIONS


# Python -------------------------------------------------------------------------------------------


def test_python_for_a_notebook_works_as_pasted(tmp_path, monkeypatch, capsys):
    vocabulary = Vocabulary("The object\n")
    model = GPTLanguageModel(len(vocabulary), n_embd=16, n_head=2, n_layer=3, block_size=16)
    save_model(tmp_path / "model-01.pkl", model, vocabulary)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(NOTEBOOK, names)
    assert capsys.readouterr().out.startswith("The object")
    assert 1 < names["loss"].item() < 4


ROWS = [
    {"text": "One “text” of\ntwo lines"},
    {"text": None},
    {"text": "Another: 你好 🙂", "url": "not this"},
]


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="the recipe for .parquet needs pyarrow")
    buffer = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "ending, pack",
    [
        ("jsonl", json_lines),
        ("jsonl.gz", lambda rows: gzip.compress(json_lines(rows))),
        ("parquet", parquet),
    ],
)
def test_the_recipe_for_tables_of_texts(tmp_path, monkeypatch, ending, pack):
    put(
        tmp_path,
        {
            "my_texts/a.txt": b"",
            "downloads/README.md": b"not a text to train on",
            f"downloads/a.{ending}": pack(ROWS[:1]),
            f"downloads/b.{ending}": pack(ROWS),
        },
    )
    monkeypatch.chdir(tmp_path)
    exec(TABLES, {})
    one, other = (f"{ROWS[number]['text']}\n\n" for number in (0, 2))
    assert (tmp_path / "my_texts/downloads.txt").read_bytes().decode() == one + one + other
