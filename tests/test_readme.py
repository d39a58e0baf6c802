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
import sys
import zipfile

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
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")

# In a block at the beginning of a line or after another command, in the text in backticks. What
# other programs do is not tried.
COMMAND = re.compile(r"(?:^    |\$ |&& |`)((?:python|torchrun) [^`&\n]+)", re.MULTILINE)
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
    put(tmp_path, {f"{name}/text.txt": book for name in ("my_texts", "shakespeare")})
    put(tmp_path, {"my_texts/book.txt.gz": gzip.compress(book)})
    write_texts(tmp_path / "theirs", train="abcdefgh \n")
    model = GPTLanguageModel(vocab_size=10, n_embd=16, n_head=2, n_layer=1, block_size=8)
    torch.save(model.state_dict(), "theirs.pkl")
    with zipfile.ZipFile("texts.zip", "w") as archive:
        archive.writestr("zipped.txt", book)
    return tmp_path


@pytest.fixture
def run_command(reader, run_main, monkeypatch):
    """`run_command("python chatbot.py -show")` runs a command of the page on tiny shapes.

    It returns what the command printed.
    """

    def run(command: str) -> str:
        program, name, *arguments = shlex.split(command)
        if program == "torchrun":
            check_torchrun([name, *arguments])
        elif name in SCRIPTS:
            return run_script(name, *arguments)
        elif name == "tests/benchmark.py":
            check_benchmark(arguments)
        elif arguments[0] == "pytest":
            check_pytest(arguments[1:])
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_module(arguments[0], run_name="__main__")
        return ""

    def run_script(name: str, *arguments) -> str:
        stdin = io.TextIOWrapper(io.BytesIO(b"A prompt\n"), "utf-8")
        done = run_main(name, *arguments, *SMALL[name], cwd=reader, stdin=stdin)
        assert done.returncode == 0, (name, arguments, done.stderr)
        return done.stderr + done.stdout

    return run


def check_torchrun(arguments: list[str]) -> None:
    """Parse the flags of the launcher and the script; see that the processes can share a batch."""
    launcher = parse_torchrun(arguments)
    assert launcher.training_script == "training.py"
    args = training.training_parser().parse_args(launcher.training_script_args)
    assert args.batch_size % int(launcher.nproc_per_node) == 0


def check_benchmark(arguments: list[str]) -> None:
    """See that the benchmark, which takes minutes, has these flags and rows."""
    source = (ROOT / "tests/benchmark.py").read_text(encoding="utf-8")
    assert all(f'"{word}"' in source for word in arguments if "/" not in word)


def check_pytest(arguments: list[str]) -> None:
    """See that the file to test, or the marker after `-m`, exists."""
    settings = (ROOT / ".pytest.ini").read_text(encoding="utf-8")
    assert not arguments or (ROOT / arguments[0]).is_file() or f"{arguments[1]}:" in settings


def test_every_command_runs(run_command, reader):
    page = [FIRST_SCREEN, *SECTIONS.values()]
    assert sum(len(COMMAND.findall(text)) for text in page) > 25
    for text in page:
        if text == SECTIONS["Recipes"]:
            put(reader, {f"openwebtext/{i}.txt": b"The text of a book\n" * 100 for i in range(2)})
        for command in COMMAND.findall(text):
            run_command(command)
    made = {"my_texts/zipped.txt", "my_texts/book.txt", "page.html", "mine.pkl"}
    assert made <= {path.relative_to(reader).as_posix() for path in reader.rglob("*")}


def test_the_rows_of_what_each_part_buys_run(run_command):
    section = SECTIONS["What each part buys"]
    command = COMMAND.search(section)[1]
    rows = [line for line in section.splitlines() if "`-block_size" in line]
    assert len(rows) > 5
    run_command("python data_extract.py -data_dir shakespeare")
    for row in rows:
        run_command(" ".join([command, *INLINE_CODE.findall(row)]))


def test_ci_finds_the_command_that_runs_the_tests():
    lines = [line for line in README.splitlines() if "python -m pytest" in line]
    # .ci/run takes the first.
    assert lines[0] == "    pip install -r requirements.txt pytest && python -m pytest"


def without_figures(text: str) -> str:
    """Return a text with 0 for every number and with single blanks."""
    return " ".join(re.sub(r"\d[\d.,]*\d|\d", "0", text).split())


def test_the_session_is_what_training_prints(run_command):
    run_command("python data_extract.py")
    session = re.search(r"^    \$ (python training.*)\n((?:    .+\n)+)", FIRST_SCREEN, re.MULTILINE)
    printed = without_figures(run_command(session[1]))
    lines = [without_figures(line) for line in session[2].splitlines() if "..." not in line]
    assert len(lines) > 3
    for line in lines:
        assert line in printed


# Flags, names, files and links --------------------------------------------------------------------


def test_every_flag_in_the_text_exists(run_main):
    help_texts = "".join(run_main(script, "-h").stdout for script in SCRIPTS)
    known = set(re.findall(r"^ +(-\w+)", help_texts, re.MULTILINE))
    codes = [code for code in INLINE_CODE.findall(PROSE) if code.startswith("-")]
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
    names = re.findall(r"`([\w./]+\.py)`", SECTIONS["Reading the code"])
    assert sorted(names) == sorted(SOURCES)


def test_pictures_are_what_their_names_say():
    look, show = re.findall(r"!\[[^]]+\]\((.+?)\)", PROSE)
    assert look.endswith(".png") and (ROOT / look).read_bytes().startswith(b"\x89PNG")
    assert show.endswith(".svg") and (ROOT / show).read_bytes().startswith(b"<svg")


def anchor(heading: str) -> str:
    """Return the part of an address that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_and_messages_lead_to_headings():
    targets = re.findall(r"(?<!!)\[[^]]+\]\(([^)]+)\)", PROSE)
    inside = {target for target in targets if target.startswith("#")}
    assert inside and inside <= {f"#{anchor(heading)}" for heading in SECTIONS}
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
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zipped_json_lines(rows: list[dict]) -> bytes:
    return gzip.compress(json_lines(rows))


def parquet(rows: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="the recipe for .parquet needs pyarrow")
    buffer = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "ending, pack",
    [("jsonl", json_lines), ("jsonl.gz", zipped_json_lines), ("parquet", parquet)],
)
def test_the_recipe_for_tables_of_texts(tmp_path, monkeypatch, ending, pack):
    put(tmp_path, {"my_texts/a.txt": b"", "downloads/README.md": b"not a text to train on"})
    put(tmp_path / "downloads", {f"a.{ending}": pack(ROWS[:1]), f"b.{ending}": pack(ROWS)})
    monkeypatch.chdir(tmp_path)
    exec(TABLES, {})
    one, other = (f"{ROWS[number]['text']}\n\n" for number in (0, 2))
    assert (tmp_path / "my_texts/downloads.txt").read_bytes().decode() == one + one + other
