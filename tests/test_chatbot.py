"""chatbot.py: where prompts come from, how they are completed and shown, how a chat ends; and flags
of any script.
"""

import errno
import io
import os
import re
import signal
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_fails, signals

import chatbot
from model import GPTLanguageModel, Parser, Vocabulary, bounded, load_model, save_model

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz"


class Terminal(io.TextIOWrapper):
    """A stream that says that it is a terminal, and keeps what it is given."""

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8", newline="\n", write_through=True)

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        return self.buffer.getvalue().decode()


def save(path, characters: str, favourite: str = "") -> None:
    torch.manual_seed(1)
    model, vocabulary = (
        GPTLanguageModel(len(characters), 16, 2, 1, block_size=16),
        Vocabulary(characters),
    )
    model.lm_head.bias.data[vocabulary.encode(favourite)] = 30
    save_model(path, model, vocabulary)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small untrained model."""
    folder = tmp_path_factory.mktemp("chat")
    save(folder / "model-01.pkl", CHARACTERS)
    return folder


@pytest.fixture
def chat(folder, run_main):
    """`chat("-top_k", 3, typed="one\\n")` runs chatbot.py in the folder, with these lines piped in."""

    def run(*flags, typed: str = "", status: int = 0, **streams):
        streams = {"stdin": io.TextIOWrapper(io.BytesIO(typed.encode()), "utf-8"), **streams}
        done = run_main("chatbot.py", "-device=cpu", *flags, cwd=folder, **streams)
        assert done.returncode == status, done.stderr
        return done

    return run


def completion(output: str) -> str:
    return output.removeprefix("Completion:\n").removesuffix("\n")


@pytest.mark.parametrize("prompt", ["hello", "the quick brown fox jumps over the lazy dog"])
def test_a_prompt_is_completed_by_150_characters_also_one_longer_than_the_window(chat, prompt):
    done = chat("-prompt", prompt)
    assert (
        re.fullmatch(rf"Completion:\n{prompt}[a-z\s]{{150}}\n", done.stdout) and done.stderr == ""
    )


def test_seed_and_temperature_decide_the_answer(chat):
    def answers(*flags):
        return {chat("-prompt", "a", "-max_new_tokens", 40, *flags).stdout for _ in range(3)}

    assert len(answers("-seed", 1)) == len(answers("-temperature", 0)) == 1 and len(answers()) == 3
    assert answers("-seed", 1) != answers("-seed", 2) and answers("-top_k", 1) == answers(
        "-temperature", 0
    )
    several = chat("-prompt=abc", "-batch_size=3", "-max_new_tokens=30").stdout
    assert re.fullmatch(
        "".join(rf"Completion {n}:\nabc[a-z\s]{{30}}\n" for n in (1, 2, 3)), several
    )


def test_unknown_characters_are_left_out_and_named(chat, folder):
    done = chat("-prompt", "aÄbÄ🙂c\x1b")
    assert done.stdout.startswith("Completion:\nabc")
    assert done.stderr == r"left out, as the model has never seen them: '\x1b' 'Ä' '🙂'" + "\n"
    save(folder / "tab.pkl", "\t" + CHARACTERS)
    for prompt in ("", "ÄÖ"):  # with nothing known, an answer goes on from a line end
        for flags in ([], ["-model=tab.pkl"]):
            assert re.fullmatch(
                r"Completion:\n\n[a-z\s]{150}\n", chat("-prompt", prompt, *flags).stdout
            )


@pytest.mark.parametrize(
    "flags", [(), ("-temperature=0",), ("-top_k=1",), ("-top_k=4",), ("-batch_size=2",)]
)
def test_u_fffd_is_read_in_place_of_unknown_characters(chat, folder, flags):
    save(folder / "replacement.pkl", "ab\ufffd🙂")
    done = chat("-prompt", "aÄ\ufffdb🚀", "-model=replacement.pkl", *flags)
    answers = re.split(r"Completion.*:\n", done.stdout)[1:]
    assert answers and all(
        re.fullmatch("a\ufffd\ufffdb\ufffd[ab\ufffd🙂]{150}\n", answer) for answer in answers
    )
    assert done.stderr == "replaced by U+FFFD, as the model has never seen them: 'Ä' '🚀'\n"
    assert chat("-prompt", "ab\ufffd", "-model=replacement.pkl", *flags).stderr == ""


@pytest.mark.parametrize("typed", ["one\n\ntwo", "\ufeffone\r\n\r\ntwo\r\n", "one\n\\n\ntwo\n"])
def test_piped_lines_are_answered_each_by_itself_without_being_asked_for(chat, typed):
    done = chat("-max_new_tokens", 10, "-temperature", 0, typed=typed)
    alone = [
        chat("-max_new_tokens", 10, "-temperature", 0, "-prompt", prompt).stdout
        for prompt in ("one", "", "two")
    ]
    assert done.stdout == "".join(alone) and done.stderr == ""


def test_a_backslash_and_an_n_mean_a_line_end_but_not_in_a_file(chat, folder):
    flags = ["-max_new_tokens", 10, "-temperature", 0]
    expected = chat(*flags, "-prompt", "abc\ndef\n").stdout
    assert expected.startswith("Completion:\nabc\ndef\n")
    assert (
        chat(*flags, "-prompt", r"abc\ndef\n").stdout
        == chat(*flags, typed=r"abc\ndef\n").stdout
        == expected
    )
    for content in (b"abc\ndef\n", b"abc\r\ndef\r\n", b"\xef\xbb\xbfabc\ndef\n"):
        (folder / "prompt.txt").write_bytes(content)
        done = chat(*flags, "-prompt_file=prompt.txt")
        assert (done.stdout, done.stderr) == (expected, "")
    (folder / "prompt.txt").write_bytes(rb"abc\ndef")
    assert "left out" in chat(*flags, "-prompt_file", "prompt.txt").stderr
    save(folder / "lines.pkl", "\na", favourite="\n")  # which writes line ends only
    assert (
        chat(*flags, "-model=lines.pkl", "-prompt=a", "-stop", r"\n\n").stdout == "Completion:\na\n"
    )


@pytest.mark.parametrize("flags", [(), ("-batch_size=2",), ("-show",)])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_completion_ends_before_the_text_that_stops_it(chat, flags, length):
    full = completion(
        chat("-prompt=abc", "-temperature=0", "-max_new_tokens=60").stdout
    ).removeprefix("abc")
    stop = full[20 : 20 + length]
    expected = "abc" + full[: full.index(stop)]
    done = chat(
        "-prompt=abc",
        "-temperature=0",
        "-max_new_tokens=60",
        *flags,
        "-stop",
        stop.replace("\n", r"\n"),
    )
    answers = re.split(r"Completion.*:\n", re.sub("bits per character: .*\n", "", done.stdout))[1:]
    assert answers == [f"{expected}\n"] * (2 if "-batch_size=2" in flags else 1)


def test_a_stop_that_does_not_come_changes_nothing(chat):
    full = chat("-prompt=abc", "-seed=1", "-max_new_tokens=20")
    for stop in ("Z", "", completion(full.stdout)[-1] + "Z"):  # what was held back is shown
        done = chat("-prompt=abc", "-seed=1", "-max_new_tokens=20", "-stop", stop)
        assert (done.stdout, done.stderr) == (full.stdout, "")


@pytest.mark.parametrize("stop", ["ab", "aab", "abab", "aaa", "a"])
def test_all_that_may_be_the_beginning_of_a_stop_is_held_back(stop):
    for number in range(2**10):
        text = f"{number:010b}".replace("0", "a").replace("1", "b")
        assert "".join(chatbot.until(stop, text)) == text.partition(stop)[0]


def test_surprises_are_the_bits_of_the_probabilities_that_the_model_gave(folder):
    model, vocabulary = load_model(folder / "model-01.pkl")
    ids = vocabulary.encode("the quick brown fox jumps over the lazy dog\n")
    bits = chatbot.surprises(model, ids)
    assert [len(chatbot.surprises(model, ids[:n])) for n in (1, 2, 44)] == [0, 1, 43]
    for place in range(1, 44):  # up to 16 characters, all are seen; of more, 8 to 16
        counts = [place] if place <= 16 else range(8, 17)
        seen = [
            model(torch.tensor([ids[place - n : place]]))[0][0, -1].softmax(0)[ids[place]].item()
            for n in counts
        ]
        assert any(
            2 ** -bits[place - 1] == pytest.approx(probability, rel=1e-4) for probability in seen
        )


def test_show_gives_the_bits(chat, folder):
    flags = ["-prompt=hello", "-seed=1", "-max_new_tokens=20"]
    text = completion(chat(*flags).stdout)
    model, vocabulary = load_model(folder / "model-01.pkl")
    bits = chatbot.surprises(model, vocabulary.encode(text))
    means = f"{sum(bits[:4]) / 4:.2f} in the prompt, {sum(bits[4:]) / 20:.2f} in the completion"
    assert chat(*flags, "-show").stdout == f"Completion:\n{text}\nbits per character: {means}\n"
    first = completion(chat("-prompt=a", "-temperature=0", "-max_new_tokens=1").stdout)[1]
    assert (
        chat("-prompt=a", "-temperature=0", "-show", "-stop", first).stdout == "Completion:\na\n"
    )  # and no bits


def test_colours_are_shown_on_a_terminal(monkeypatch):
    coloured = (
        "a"
        + "".join(f"\x1b[38;5;{n}m{c}" for n, c in zip((28, 28, 32, 166, 160), "bcdef"))
        + "\x1b[0m\n"
    )
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    chatbot.show_surprises("abcdef", [0.0, 1.0, 2.9, 5.0, 99.0], 1)
    assert terminal.shown() == f"{coloured}bits per character: 21.58 in the completion\n"


@pytest.mark.parametrize("flags", [(), ("-batch_size=2",), ("-show",), ("-stop=zz",)])
def test_no_control_character_reaches_a_terminal(chat, folder, flags):
    characters = "a\n\t\x00\x07\x1b\r\x7f\x85\x9b"
    save(folder / "control.pkl", characters)
    flags = ("-model=control.pkl", "-seed=1", "-prompt", "\x1b]0;a\x07\r\t\x9b\x01", *flags)
    terminal, errors = Terminal(), Terminal()
    chat(*flags, stdout=terminal, stderr=errors)
    shown = re.sub(r"\x1b\[(38;5;\d+|0)m", "", terminal.shown())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown + errors.shown())
    assert r"\x1b" in shown and r"\x07\r" in shown and "\t" in shown and r"'\x01'" in errors.shown()
    assert set(characters) <= set(chat(*flags).stdout)  # what is piped stays as it is


def test_no_control_character_in_the_name_of_a_file_reaches_a_terminal(chat, folder):
    bad = "\x1b]0;\x07\x9b"
    (folder / f"{bad}.pkl").write_bytes(b"no model")
    for flag, name in (
        ("-model", f"no{bad}\n"),
        ("-model", f"{bad}.pkl"),
        ("-vocab", bad),
        ("-prompt_file", bad),
    ):
        errors = Terminal()
        chat(flag, name, stderr=errors, status=1)
        assert (
            re.fullmatch(r"chatbot\.py: [^\x00-\x1f\x7f-\x9f]+\n", errors.shown())
            and r"\x1b" in errors.shown()
        )


@signals
def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(start_script, folder):
    import pty

    ours, theirs = pty.openpty()
    run = start_script(
        "chatbot.py", "-max_new_tokens", str(10**7), cwd=folder, stdin=theirs, stdout=theirs
    )
    os.close(theirs)
    for expected, typed in (
        ("Prompt: ", rb"ab\nc" + b"\n"),
        ("Completion:\r\nab\r\nc", b""),
        ("Prompt: ", b""),
    ):
        shown = ""
        while expected not in shown:
            shown += os.read(ours, 1000).decode()
        os.write(ours, typed)
        if not typed:  # Python, once it has asked, does not notice a Ctrl-C that comes before it waits for the line
            time.sleep(0.3)
            run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 0 and run.stderr.read() == "(stopped)\n"
    assert os.read(ours, 1000).decode().endswith("\r\n")
    os.close(ours)


def test_a_closed_pipe_ends_the_chat_quietly(start_script, folder):
    run = start_script("chatbot.py", "-prompt", "a", "-max_new_tokens", str(10**7), cwd=folder)
    run.stdout.read(20)
    run.stdout.close()
    assert run.wait(timeout=30) == 0 and run.stderr.read() == ""


class Idle(io.StringIO):
    """A stream as IDLE has it: it says that it is a terminal, but has no file number and can't be
    reconfigured.
    """

    flushes = 0

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.flushes += 1


def test_streams_of_idle_and_of_a_notebook_are_enough_and_characters_appear_as_they_are_made(chat):
    for kind in (Idle, io.StringIO):
        shown, errors = kind(), kind()
        chat("-max_new_tokens=5", "-show", stdin=io.StringIO("abc\n"), stdout=shown, stderr=errors)
        assert re.fullmatch(
            r"Completion:\nabc[a-z\s]{5}\nbits per character: .*\n", shown.getvalue()
        )
        assert errors.getvalue() == ""
    shown = Idle()
    chat("-prompt=abc", "-max_new_tokens=30", "-stop=zz", stdout=shown)
    assert shown.flushes > 30
    assert chat("-prompt=a", stdout=None, stderr=None).stdout == ""  # closed, as by `>&-`


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "cp1252"])
def test_the_encoding_of_a_terminal_is_respected(chat, folder, encoding):
    save(
        folder / "chinese.pkl", "\nab中文\N{THAI CHARACTER KO KAI}"
    )  # the last of which GBK does not have
    stream = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    typed = io.TextIOWrapper(io.BytesIO("ab".encode(encoding) + b"\xff\xff\n"), encoding)
    done = chat("-model=chinese.pkl", "-max_new_tokens=60", "-seed=1", stdin=typed, stdout=stream)
    shown = stream.buffer.getvalue().decode(encoding)
    assert shown.startswith("Completion:\nab") and len(completion(shown)) == 2 + 60 and "?" in shown
    assert ("中" in shown) == (encoding == "gbk") and "left out" in done.stderr


def test_flags_take_one_dash_or_two_and_help_names_each_once_with_its_default(capsys):
    parser = Parser("A script.")
    parser.flag("batch_size", type=bounded(int, 1), default=32, help="rows")
    parser.flag("kind", choices=("a", "b"), help="one of two")
    parser.flag("prompt", type=str, help="a text")
    lines = ["-batch_size INT rows (default: 32)", "-kind {a,b} one of two", "-prompt STR a text"]
    for flag in ("-h", "-help", "--help"):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([flag])
        shown = [re.sub(" +", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
        assert [line for line in shown if line.startswith("-")][1:] == lines
    for arguments in (
        ["-batch_size", "4", "-prompt", "--a b"],
        ["--batch_size=4", "--prompt=--a b"],
    ):
        assert vars(parser.parse_args(arguments)) == {
            "batch_size": 4,
            "kind": None,
            "prompt": "--a b",
        }


def test_what_can_be_foreseen_is_one_line(chat, folder):
    (folder / "empty.txt").write_bytes(b"")
    for flag in ("-model", "-prompt_file", "-vocab"):
        assert_fails(chat(flag, "gone", status=1), f"gone: {os.strerror(errno.ENOENT)}$")
    assert_fails(chat("-model=empty.txt", status=1), "empty.txt: not a model file that can be read")
    assert_fails(
        chat("-vocab=empty.txt", status=1),
        "empty.txt: holds no UTF-8 text; run data_extract.py again$",
    )
    assert (
        "argument -top_k: the model knows only 28"
        in chat("-prompt=a", "-top_k=29", status=2).stderr
    )


def test_too_little_memory_is_told_as_that_and_what_nobody_foresaw_keeps_its_traceback(
    chat, monkeypatch
):
    allocator = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    )
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), allocator):
        for place in ("torch.load", "model.GPTLanguageModel", "chatbot.answer"):
            with monkeypatch.context() as patch:
                patch.setattr(place, Mock(side_effect=error))
                assert_fails(chat("-prompt=a", status=1), "not enough memory$")
    for error in (
        RuntimeError("an illegal memory access was encountered"),
        OSError(5, "Input/output error"),
    ):
        monkeypatch.setattr("chatbot.answer", Mock(side_effect=error))
        with pytest.raises(type(error), match=error.args[-1]):
            chat("-prompt=a")
