"""chatbot.py: where prompts come from, how they are completed and shown, how a chat ends.

The page of -look is in test_look.py, flags and damaged files are in test_bad_input.py.
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
from conftest import MISSING, assert_fails, signals

import chatbot
from model import GPTLanguageModel, Vocabulary, load_model, save_model

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz"
BOM = "\ufeff".encode()
SHORT = ("-max_new_tokens=10", "-temperature=0")


class Terminal(io.TextIOWrapper):
    """A stream that says that it is a terminal, and keeps what it is given."""

    trouble = "", None  # a text that can't be written, and the error then

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8", newline="\n", write_through=True)

    def write(self, text: str) -> int:
        if self.trouble[0] and self.trouble[0] in text:
            raise self.trouble[1]
        return super().write(text)

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        return self.buffer.getvalue().decode()


def save(path, characters: str, favourite: str = "") -> None:
    torch.manual_seed(1)
    model = GPTLanguageModel(len(characters), 16, 2, 1, block_size=16)
    model.lm_head.bias.data[Vocabulary(characters).encode(favourite)] = 30
    save_model(path, model, Vocabulary(characters))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small untrained model."""
    folder = tmp_path_factory.mktemp("chat")
    save(folder / "model-01.pkl", CHARACTERS)
    return folder


@pytest.fixture
def chat(folder, run_main):
    """`chat("-top_k", 3, typed=b"one\\n")` runs chatbot.py in the folder, with this piped in."""

    def run(*flags, typed: bytes = b"", encoding: str = "utf-8", status: int = 0, **streams):
        streams = {"stdin": io.TextIOWrapper(io.BytesIO(typed), encoding), **streams}
        done = run_main("chatbot.py", "-device=cpu", *flags, cwd=folder, **streams)
        assert done.returncode == status, done.stderr
        return done

    return run


def answers(output: str) -> list[str]:
    """Return what stands below each "Completion:", without the line of -show."""
    output = re.sub("bits per character: .*\n", "", output)
    return [answer.removesuffix("\n") for answer in re.split("Completion.*:\n", output)[1:]]


@pytest.mark.parametrize("prompt", ["hello", "the quick brown fox jumps over the lazy dog"])
def test_a_prompt_is_completed_by_150_characters_also_one_longer_than_the_window(chat, prompt):
    done = chat("-prompt", prompt)
    assert re.fullmatch(rf"Completion:\n{prompt}[a-z\s]{{150}}\n", done.stdout + done.stderr)


def test_seed_and_temperature_decide_the_answer(chat):
    def different(*flags):
        return {chat("-prompt", "a", "-max_new_tokens", 40, *flags).stdout for _ in range(3)}

    assert len(different()) == 3
    assert len(different("-seed", 1)) == len(different("-temperature", 0)) == 1
    assert different("-seed", 1) != different("-seed", 2)
    assert different("-top_k", 1) == different("-temperature", 0)


def test_several_completions_are_made_together_and_no_further_than_one_needs(chat, monkeypatch):
    stream = Mock(side_effect=GPTLanguageModel.stream)
    monkeypatch.setattr(GPTLanguageModel, "stream", lambda *given: stream(*given))
    done = chat("-prompt=abc", "-batch_size=3", "-max_new_tokens=30")
    pattern = "".join(rf"Completion {n}:\nabc[a-z\s]{{30}}\n" for n in (1, 2, 3))
    assert re.fullmatch(pattern, done.stdout) and len(set(answers(done.stdout))) == 3
    assert [call.args[1].shape for call in stream.call_args_list] == [(3, 3)]
    # Without an end at the last stop, this would take hours.
    done = chat("-prompt=abc", "-batch_size=3", "-max_new_tokens=100000000", "-stop=a")
    assert all(re.fullmatch(r"abc[b-z\s]*", answer) for answer in answers(done.stdout))


@pytest.mark.parametrize("characters", [CHARACTERS, "\t" + CHARACTERS])
def test_unknown_characters_are_left_out_and_named(chat, folder, characters):
    save(folder / "other.pkl", characters)
    done = chat("-prompt", "aÄbÄ🙂c\x1b", "-model=other.pkl")
    assert done.stdout.startswith("Completion:\nabc")
    assert done.stderr == r"left out, as the model has never seen them: '\x1b' 'Ä' '🙂'" + "\n"
    for prompt in ("", "ÄÖ"):  # with nothing known, an answer goes on from a line end
        shown = chat("-prompt", prompt, "-model=other.pkl").stdout
        assert re.fullmatch(r"Completion:\n\n[a-z\s]{150}\n", shown)


@pytest.mark.parametrize("flag", ["-seed=1", "-temperature=0", "-top_k=4", "-batch_size=2"])
def test_u_fffd_is_read_in_place_of_unknown_characters(chat, folder, flag):
    save(folder / "replacement.pkl", "ab\ufffd🙂")
    done = chat("-prompt", "aÄ\ufffdb🚀", "-model=replacement.pkl", flag)
    pattern = "a\ufffd\ufffdb\ufffd[ab\ufffd🙂]{150}"
    assert all(re.fullmatch(pattern, answer) for answer in answers(done.stdout))
    assert done.stderr == "replaced by U+FFFD, as the model has never seen them: 'Ä' '🚀'\n"
    assert chat("-prompt", "ab\ufffd", "-model=replacement.pkl", flag).stderr == ""


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "cp1251", "ascii"])
@pytest.mark.parametrize(
    "typed",
    [b"one\n\ntwo", b"one\r\n\r\ntwo\r\n", b"one\n\\n\ntwo\n", BOM + b"one\r\n\r\ntwo\r\n"],
)
def test_piped_lines_are_answered_each_by_itself_without_being_asked_for(chat, typed, encoding):
    done = chat(*SHORT, typed=typed, encoding=encoding)
    alone = [chat(*SHORT, "-prompt", prompt).stdout for prompt in ("one", "", "two")]
    assert done.stdout == "".join(alone) and done.stderr == ""


def test_a_backslash_and_an_n_mean_a_line_end_but_not_in_a_file(chat, folder):
    expected = chat(*SHORT, "-prompt", "abc\ndef\n").stdout
    assert expected.startswith("Completion:\nabc\ndef\n")
    typed = chat(*SHORT, typed=rb"abc\ndef\n").stdout
    assert chat(*SHORT, "-prompt", r"abc\ndef\n").stdout == typed == expected
    (folder / "prompt.txt").write_bytes(rb"abc\ndef")
    assert "left out" in chat(*SHORT, "-prompt_file", "prompt.txt").stderr
    save(folder / "lines.pkl", "\na", favourite="\n")  # which writes line ends only
    assert answers(chat("-model=lines.pkl", "-prompt=a", "-stop", r"\n\n").stdout) == ["a"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", BOM, b"\xff\xfe", b"\xfe\xff"])
def test_a_prompt_file_is_decoded_as_a_text_of_the_corpus_is(chat, folder, line_end, mark):
    encoding = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(mark, "utf-8")
    (folder / "prompt.txt").write_bytes(mark + f"abÄc{line_end}def{line_end}".encode(encoding))
    done, expected = chat(*SHORT, "-prompt_file=prompt.txt"), chat(*SHORT, "-prompt=abÄc\ndef\n")
    assert (done.stdout, done.stderr) == (expected.stdout, expected.stderr)


@pytest.mark.parametrize("flags", [(), ("-batch_size=2",), ("-show",)])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_completion_ends_before_the_text_that_stops_it(chat, flags, length):
    flags = ("-prompt=abc", "-temperature=0", "-max_new_tokens=60", *flags)
    full = answers(chat(*flags).stdout)
    for stop in (full[0][23 : 23 + length], full[0][-1] + "Z", ""):
        done = chat(*flags, "-stop", stop.replace("\n", r"\n"))
        expected = "abc" + full[0][3:].partition(stop)[0] if stop else full[0]
        assert answers(done.stdout) == [expected] * len(full)


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
        starts = [0] if place <= 16 else range(place - 16, place - 7)
        logits = [model(torch.tensor([ids[start:place]]))[0][0, -1] for start in starts]
        ratios = [step.softmax(0)[ids[place]].item() * 2 ** bits[place - 1] for step in logits]
        assert min(abs(ratio - 1) for ratio in ratios) < 1e-4


def test_show_gives_the_bits(chat, folder):
    flags = ("-prompt=hello", "-seed=1", "-max_new_tokens=20")
    text = answers(chat(*flags).stdout)[0]
    model, vocabulary = load_model(folder / "model-01.pkl")
    bits = chatbot.surprises(model, vocabulary.encode(text))
    means = f"{sum(bits[:4]) / 4:.2f} in the prompt, {sum(bits[4:]) / 20:.2f} in the completion"
    assert chat(*flags, "-show").stdout == f"Completion:\n{text}\nbits per character: {means}\n"


def test_colours_are_shown_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    chatbot.show_surprises("abcdef", [0.0, 1.0, 2.9, 5.0, 99.0], 1)
    green, blue, orange, red = (f"\x1b[38;5;{number}m" for number in (28, 32, 166, 160))
    coloured = f"a{green}b{green}c{blue}d{orange}e{red}f\x1b[0m\n"
    assert terminal.shown() == f"{coloured}bits per character: 21.58 in the completion\n"


def test_ctrl_c_leaves_no_terminal_coloured(chat):
    terminal = Terminal()
    terminal.trouble = "c", KeyboardInterrupt()
    chat("-prompt=abcd", "-show", stdout=terminal, status=130)
    assert re.fullmatch("Completion:\na\x1b.*b\x1b.*\x1b\\[0m\n", terminal.shown())


@pytest.mark.parametrize("flags", [(), ("-batch_size=2",), ("-show",), ("-stop=zz",)])
def test_no_control_character_reaches_a_terminal(chat, folder, flags):
    characters = "a\n\t\x00\x07\x1b\r\x7f\x85\x9b"
    save(folder / "control.pkl", characters)
    flags = ("-model=control.pkl", "-seed=1", "-prompt", "\x1b]0;a\x07\r\t\x9b\x01", *flags)
    terminal, errors = Terminal(), Terminal()
    chat(*flags, stdout=terminal, stderr=errors)
    chat("-model=\x1b]0;\x07\x9b", stderr=errors, status=1)  # which an error names
    shown = re.sub(r"\x1b\[(38;5;\d+|0)m", "", terminal.shown()) + errors.shown()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert all(escape in shown for escape in (r"\x1ba\x07\r", "\t", r"'\x01'", r"\x07\x9b: "))
    assert set(characters) <= set(chat(*flags).stdout)  # what is piped stays as it is


@signals
def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(start_script, folder):
    import pty

    ours, theirs = pty.openpty()
    flags = ("-max_new_tokens", str(10**7))
    run = start_script("chatbot.py", *flags, cwd=folder, stdin=theirs, stdout=theirs)
    os.close(theirs)
    asked, answered = ("Prompt: ", b"ab\\nc\n"), ("Completion:\r\nab\r\nc", b"")
    for expected, typed in (asked, answered, ("Prompt: ", b"")):
        shown = ""
        while expected not in shown:
            shown += os.read(ours, 1000).decode()
        os.write(ours, typed)
        if not typed:
            # Python, once it has asked, misses a Ctrl-C that comes before it waits for the line.
            time.sleep(0.3)
            run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 0 and run.stderr.read() == "(stopped)\n"
    assert os.read(ours, 1000).decode().endswith("\r\n")
    os.close(ours)


def test_characters_appear_as_they_are_made_and_a_closed_pipe_ends_the_chat(start_script, folder):
    run = start_script("chatbot.py", "-prompt", "a", "-max_new_tokens", str(10**7), cwd=folder)
    assert len(run.stdout.read(20)) == 20
    run.stdout.close()
    assert run.wait(timeout=30) == 0 and run.stderr.read() == ""


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EINVAL, errno.ENOSPC])
@pytest.mark.parametrize("flags", [(), ("-batch_size=2",), ("-show",)])
def test_an_output_that_cannot_be_written_is_told_unless_its_reader_is_gone(chat, flags, number):
    terminal = Terminal()
    terminal.trouble = "a", OSError(number, os.strerror(number))  # EINVAL: a closed pipe of Windows
    full = number == errno.ENOSPC
    done = chat("-prompt=z", "-max_new_tokens=999", *flags, stdout=terminal, status=int(full))
    assert done.stderr == (f"chatbot.py: standard output: {os.strerror(number)}\n" if full else "")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_streams_of_idle_and_of_a_notebook_are_enough(chat, is_terminal):
    shown, errors = io.StringIO(), io.StringIO()  # which can't be reconfigured
    shown.isatty = errors.isatty = lambda: is_terminal
    chat("-max_new_tokens=5", "-show", stdin=io.StringIO("abc\n"), stdout=shown, stderr=errors)
    expected = r"Completion:\nabc[a-z\s]{5}\nbits per character: .*\n"
    assert re.fullmatch(expected, shown.getvalue()) and errors.getvalue() == ""


@pytest.mark.parametrize("flags", [(), ("-prompt=a",), ("-prompt=a", "-show")])
def test_streams_may_be_missing(chat, flags):
    assert chat(*flags, stdin=None, stdout=None, stderr=None).stdout == ""


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "cp1252"])
def test_the_encoding_of_a_terminal_is_respected(chat, folder, encoding):
    save(folder / "chinese.pkl", "\nab中文\N{THAI CHARACTER KO KAI}")  # GBK does not have the last
    stream = io.TextIOWrapper(io.BytesIO(), encoding, newline="\n", write_through=True)
    flags = ("-model=chinese.pkl", "-max_new_tokens=60", "-seed=1")
    done = chat(*flags, typed=b"ab\xff\xff\n", encoding=encoding, stdout=stream)
    shown = answers(stream.buffer.getvalue().decode(encoding))[0]
    assert shown.startswith("ab") and len(shown) == 2 + 60 and "?" in shown
    assert ("中" in shown) == (encoding == "gbk") and "left out" in done.stderr


@pytest.mark.parametrize(
    "flag, message",
    [
        ("-model=gone.pkl", f"gone.pkl: {MISSING}; train a model with training.py, or name yours"),
        ("-prompt_file=gone", f"gone: {MISSING}$"),
        ("-vocab=gone", f"gone: {MISSING}$"),
        ("-vocab=model-01.pkl", "model-01.pkl: holds no UTF-8 text; run data_extract.py again$"),
    ],
)
def test_a_file_that_is_missing_or_of_another_kind_is_one_line(chat, flag, message):
    assert_fails(chat(flag, status=1), message)


@pytest.mark.parametrize("place", ["torch.load", "model.GPTLanguageModel", "chatbot.answer"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to"),
    ],
)
def test_too_little_memory_is_told_as_that(chat, monkeypatch, place, error):
    monkeypatch.setattr(place, Mock(side_effect=error))
    assert_fails(chat("-prompt=a", status=1), "not enough memory$")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("an illegal memory access was encountered"), OSError(5, "Input/output error")],
)
def test_what_nobody_foresaw_keeps_its_traceback(chat, monkeypatch, error):
    monkeypatch.setattr("chatbot.answer", Mock(side_effect=error))
    with pytest.raises(type(error), match=error.args[-1]):
        chat("-prompt=a")
