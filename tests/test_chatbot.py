"""chatbot.py: where prompts come from, how they are completed and shown, how a chat ends.

The page of -look is in test_look.py, flags and damaged files are in test_bad_input.py.
"""

import errno
import io
import os
import re
import signal
import time
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import MISSING, assert_fails, signals, wait_until_shown

import chatbot
from model import GPTLanguageModel, Vocabulary, load_model, save_model

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz"
BOM = "\ufeff".encode()
SHORT = ("-max_new_tokens=10", "-temperature=0")


class Terminal(io.TextIOWrapper):
    """A stream that says that it is a terminal, and keeps what it is given.

    Any text with a `bad` character in it can't be written: `error` is raised then.
    """

    def __init__(self, bad: str = "", error: BaseException | None = None):
        super().__init__(io.BytesIO(), "utf-8", newline="\n", write_through=True)
        self.bad, self.error = bad, error

    def write(self, text: str) -> int:
        if self.error and self.bad in text:
            raise self.error
        return super().write(text)

    def isatty(self) -> bool:
        return True

    def shown(self) -> str:
        return self.buffer.getvalue().decode()


def save(folder, characters: str = CHARACTERS) -> None:
    torch.manual_seed(1)
    model = GPTLanguageModel(len(characters), 16, 2, 1, block_size=16)
    save_model(folder / "model-01.pkl", model, Vocabulary(characters))


@pytest.fixture
def chat(tmp_path, run_main):
    """`chat("-top_k", 3, typed=b"one\\n")` runs chatbot.py with this piped in.

    The model is small and untrained; it knows these characters.
    """

    def run(*flags, characters=CHARACTERS, typed=b"", encoding="utf-8", status=0, **streams):
        save(tmp_path, characters)
        streams = {"stdin": io.TextIOWrapper(io.BytesIO(typed), encoding), **streams}
        done = run_main("chatbot.py", "-device=cpu", *flags, **streams)
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
    runs = {
        flag: {chat("-prompt=a", "-max_new_tokens=40", flag).stdout for _ in range(3)}
        for flag in ("-batch_size=1", "-seed=1", "-seed=2", "-temperature=0", "-top_k=1")
    }
    assert [len(shown) for shown in runs.values()] == [3, 1, 1, 1, 1]
    assert runs["-seed=1"] != runs["-seed=2"]
    assert runs["-top_k=1"] == runs["-temperature=0"]


@patch.object(GPTLanguageModel, "stream", autospec=True, side_effect=GPTLanguageModel.stream)
def test_several_completions_are_made_together_and_no_further_than_one_needs(stream, chat):
    done = chat("-prompt=abc", "-batch_size=3", "-max_new_tokens=30")
    pattern = "".join(rf"Completion {n}:\nabc[a-z\s]{{30}}\n" for n in (1, 2, 3))
    assert re.fullmatch(pattern, done.stdout) and len(set(answers(done.stdout))) == 3
    assert [call.args[1].shape for call in stream.call_args_list] == [(3, 3)]
    # Without an end at the last stop, this would take hours.
    done = chat("-prompt=abc", "-batch_size=3", "-max_new_tokens=100000000", "-stop=a")
    assert re.fullmatch(r"(Completion \d:\nabc[b-z\s]*\n){3}", done.stdout)


@pytest.mark.parametrize("flag", ["-seed=1", "-temperature=0", "-top_k=4", "-batch_size=2"])
@pytest.mark.parametrize("first", ["", "\t"])
@pytest.mark.parametrize(
    "characters, prompt, read, notice",
    [
        (CHARACTERS, "aÄbÄ🙂c\x1b", "abc", "left out: '\\x1b' 'Ä' '🙂'\n"),
        (CHARACTERS, "ÄÖ", "\n", "left out: 'Ä' 'Ö'\n"),  # something to go on from
        (CHARACTERS, "", "\n", ""),
        ("ab\ufffd🙂", "aÄ\ufffdb🚀", "a\ufffd\ufffdb\ufffd", "replaced by U+FFFD: 'Ä' '🚀'\n"),
        ("ab\ufffd🙂", "ab\ufffd", "ab\ufffd", ""),
    ],
)
def test_unknown_characters_are_named_and_left_out_or_read_as_u_fffd(
    chat, flag, first, characters, prompt, read, notice
):
    done = chat("-prompt", prompt, flag, characters=first + characters)
    answer = rf"Completion.*:\n{read}[{first}{characters}]{{150}}\n"
    assert re.fullmatch(f"({answer})+", done.stdout)
    assert done.stderr == notice.replace(":", ", as the model has never seen them:")


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "cp1251", "ascii"])
@pytest.mark.parametrize(
    "typed",
    [b"one\n\ntwo", b"one\r\n\r\ntwo\r\n", b"one\n\\n\ntwo\n", BOM + b"one\r\n\r\ntwo\r\n"],
)
def test_piped_lines_are_answered_each_by_itself_without_being_asked_for(chat, typed, encoding):
    done = chat(*SHORT, typed=typed, encoding=encoding)
    alone = [chat(*SHORT, "-prompt", prompt).stdout for prompt in ("one", "", "two")]
    assert done.stdout == "".join(alone) and done.stderr == ""


def test_a_backslash_and_an_n_mean_a_line_end(chat):
    expected = chat(*SHORT, "-prompt", "abc\ndef\n").stdout
    assert expected.startswith("Completion:\nabc\ndef\n")
    assert chat(*SHORT, "-prompt", r"abc\ndef\n").stdout == expected
    assert chat(*SHORT, typed=rb"abc\ndef\n").stdout == expected
    assert answers(chat("-prompt=", "-stop", r"\n\n", characters="\n").stdout) == ["\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "mark, encoding",
    [(b"", "utf-8"), (BOM, "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")],
)
def test_a_prompt_file_is_decoded_as_a_text_of_the_corpus_is(chat, tmp_path, mark, encoding, end):
    # In a file, a backslash and an n are themselves; in a prompt, the Ä keeps them apart.
    (tmp_path / "prompt.txt").write_bytes(mark + rf"ab\nÄc{end}def{end}".encode(encoding))
    expected = chat(*SHORT, "-prompt", "ab\\Änc\ndef\n")
    done = chat(*SHORT, "-prompt_file=prompt.txt")
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


def test_show_gives_the_bits_of_the_probabilities_that_the_model_gave(chat, tmp_path):
    flags = ("-prompt=the quick brown fox jumps", "-seed=1", "-max_new_tokens=19")
    text = answers(chat(*flags).stdout)[0]
    model, vocabulary = load_model(tmp_path / "model-01.pkl")
    ids = vocabulary.encode(text)
    bits = chatbot.surprises(model, ids)
    assert [len(chatbot.surprises(model, ids[:n])) for n in (1, 2, 44)] == [0, 1, 43]
    for place in range(1, 44):  # up to 16 characters, all are seen; of more, 8 to 16
        starts = [0] if place <= 16 else range(place - 16, place - 7)
        logits = [model(torch.tensor([ids[start:place]]))[0][0, -1] for start in starts]
        ratios = [step.softmax(0)[ids[place]].item() * 2 ** bits[place - 1] for step in logits]
        assert min(abs(ratio - 1) for ratio in ratios) < 1e-4
    means = f"{sum(bits[:24]) / 24:.2f} in the prompt, {sum(bits[24:]) / 19:.2f} in the completion"
    assert chat(*flags, "-show").stdout == f"Completion:\n{text}\nbits per character: {means}\n"


def test_colours_are_shown_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    chatbot.show_surprises("abcdef", [0.0, 1.0, 2.9, 5.0, 99.0], 1)
    green, blue, orange, red = (f"\x1b[38;5;{number}m" for number in (28, 32, 166, 160))
    assert terminal.shown() == (
        f"a{green}b{green}c{blue}d{orange}e{red}f\x1b[0m\n"
        "bits per character: 21.58 in the completion\n"
    )


def test_ctrl_c_leaves_no_terminal_coloured(chat):
    terminal = Terminal("c", KeyboardInterrupt())
    chat("-prompt=abcd", "-show", stdout=terminal, status=130)
    assert re.fullmatch("Completion:\na\x1b.*b\x1b.*\x1b\\[0m\n", terminal.shown())


@pytest.mark.parametrize("flags", [(), ("-batch_size=2",), ("-show",), ("-stop=zz",)])
def test_no_control_character_reaches_a_terminal(chat, flags):
    characters = "a\n\t\x00\x07\x1b\r\x7f\x85\x9b"
    flags = ("-seed=1", "-prompt", "\x1b]0;a\x07\r\t\x9b\x01", *flags)
    terminal, errors = Terminal(), Terminal()
    chat(*flags, characters=characters, stdout=terminal, stderr=errors)
    chat("-model=\x1b]0;\x07\x9b", stderr=errors, status=1)  # which an error names
    shown = re.sub(r"\x1b\[(38;5;\d+|0)m", "", terminal.shown()) + errors.shown()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert all(escape in shown for escape in (r"\x1ba\x07\r", "\t", r"'\x01'", r"\x07\x9b: "))
    # What is piped stays as it is.
    assert set(characters) <= set(chat(*flags, characters=characters).stdout)


@signals
def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(start_script, tmp_path):
    import pty

    save(tmp_path)
    ours, theirs = pty.openpty()
    run = start_script("chatbot.py", "-max_new_tokens=10000000", stdin=theirs, stdout=theirs)
    os.close(theirs)
    run.stdout = os.fdopen(ours, encoding="utf-8", newline="")
    for expected, typed in (
        ("Prompt: ", b"ab\\nc\n"),
        ("Completion:\r\nab\r\nc", b""),
        ("Prompt: ", b""),
    ):
        wait_until_shown(run, expected, "stdout")
        os.write(ours, typed)
        if not typed:
            # Python, once it has asked, misses a Ctrl-C that comes before it waits for the line.
            time.sleep(0.3)
            run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 0 and run.stderr.read() == "(stopped)\n"
    wait_until_shown(run, "\r\n", "stdout")


def test_characters_appear_as_they_are_made_and_a_closed_pipe_ends_the_chat(start_script, tmp_path):
    save(tmp_path)
    run = start_script("chatbot.py", "-prompt=a", "-max_new_tokens=10000000")
    assert len(run.stdout.read(20)) == 20
    run.stdout.close()
    assert run.wait(timeout=30) == 0 and run.stderr.read() == ""


@pytest.mark.parametrize(
    "number, status, notice",
    [
        (errno.EPIPE, 0, ""),
        (errno.EINVAL, 0, ""),  # a closed pipe of Windows
        (errno.ENOSPC, 1, f"chatbot.py: standard output: {os.strerror(errno.ENOSPC)}\n"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("-batch_size=2",), ("-show",)])
def test_an_output_that_cannot_be_written_is_told_unless_its_reader_is_gone(
    chat, flags, number, status, notice
):
    terminal = Terminal("a", OSError(number, os.strerror(number)))
    done = chat("-prompt=z", "-max_new_tokens=999", *flags, stdout=terminal, status=status)
    assert done.stderr == notice


@pytest.mark.parametrize("is_terminal", [True, False])
def test_streams_of_idle_and_of_a_notebook_are_enough(chat, is_terminal):
    shown = io.StringIO()  # which can't be reconfigured
    shown.isatty = lambda: is_terminal
    chat("-max_new_tokens=5", "-show", stdin=io.StringIO("abc\n"), stdout=shown, stderr=shown)
    expected = r"Completion:\nabc[a-z\s]{5}\nbits per character: .*\n"
    assert re.fullmatch(expected, shown.getvalue())


@pytest.mark.parametrize("flags", [(), ("-prompt=a",), ("-prompt=a", "-show")])
def test_streams_may_be_missing(chat, flags):
    assert chat(*flags, stdin=None, stdout=None, stderr=None).stdout == ""


@pytest.mark.parametrize("encoding", ["gbk", "ascii", "cp1252"])
def test_the_encoding_of_a_terminal_is_respected(chat, encoding):
    characters = "\nab中文\N{THAI CHARACTER KO KAI}"  # GBK does not have the last
    stream = io.TextIOWrapper(io.BytesIO(), encoding, newline="\n", write_through=True)
    done = chat(
        "-max_new_tokens=60",
        "-seed=1",
        characters=characters,
        typed=b"ab\xff\xff\n",
        encoding=encoding,
        stdout=stream,
    )
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
