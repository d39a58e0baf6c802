"""chatbot.py: where prompts come from, how they are completed and shown, how a chat ends.

Then the page of -look: its numbers are compared with the plain maths in reference.py, and Chromium,
where there is one, shows what a person would see. Flags and damaged files are in test_bad_input.py.
"""

import errno
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import MISSING, assert_fails, put, read_folder, signals, wait_until_shown
from reference import PlainGPT

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


def save(folder, characters=CHARACTERS, shape=(16, 2, 1, 16), scale=1) -> None:
    torch.manual_seed(1)
    model = GPTLanguageModel(len(set(characters)), *shape)
    model.load_state_dict({name: scale * weights for name, weights in model.state_dict().items()})
    save_model(folder / "model-01.pkl", model, Vocabulary(characters))


@pytest.fixture
def chat(tmp_path, run_main):
    """`chat("-top_k", 3, typed=b"one\\n")` runs chatbot.py with this piped in.

    The model is one that `save` makes: small, untrained, and it knows these characters.
    """

    def run(
        *flags,
        characters=CHARACTERS,
        shape=(16, 2, 1, 16),
        scale=1,
        typed=b"",
        encoding="utf-8",
        status=0,
        **streams,
    ):
        save(tmp_path, characters, shape, scale)
        # Some input of Windows keeps its \r, as newline="\n" does.
        stdin = io.TextIOWrapper(io.BytesIO(typed), encoding, newline="\n")
        streams = {"stdin": stdin, **streams}
        done = run_main("chatbot.py", "-device=cpu", *flags, **streams)
        assert done.returncode == status, done.stderr
        return done

    return run


def answers(output: str) -> list[str]:
    """Return what stands below each "Completion:", without the line of -show."""
    return re.findall(r"(?s)Completion[ \d]*:\n(.*?)\n(?=Completion|bits per|\Z)", output)


@pytest.mark.parametrize("prompt", ["hello", "the quick brown fox jumps over the lazy dog"])
def test_a_prompt_is_completed_by_150_characters_also_one_longer_than_the_window(chat, prompt):
    done = chat("-prompt", prompt)
    assert re.fullmatch(rf"Completion:\n{prompt}[a-z\s]{{150}}\n", done.stdout + done.stderr)


def test_seed_and_temperature_decide_the_answer(chat):
    runs = {  # the first flag changes nothing
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


@pytest.mark.parametrize(
    "flag, first",  # a tab takes the first id from the line end
    [("-seed=1", ""), ("-temperature=0", "\t"), ("-top_k=4", ""), ("-batch_size=2", "\t")],
)
@pytest.mark.parametrize(
    "characters, prompt, read, notice",
    [
        (CHARACTERS, "aÄbÄ🙂c\x1b", "abc", "left out: '\\x1b' 'Ä' '🙂'\n"),
        # With nothing known, an answer goes on from a line end.
        (CHARACTERS, "ÄÖ", "\n", "left out: 'Ä' 'Ö'\n"),
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
    done, expected = chat(*SHORT, "-prompt_file=prompt.txt"), chat(*SHORT, "-prompt=ab\\Änc\ndef\n")
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


def test_each_character_is_shown_before_the_next_one_is_made(chat, monkeypatch):
    output, shown, stream = io.BytesIO(), [], GPTLanguageModel.stream

    def watched(*arguments):
        for token in stream(*arguments):
            shown.append(len(output.getvalue()))
            yield token

    monkeypatch.setattr(GPTLanguageModel, "stream", watched)
    stdout = io.TextIOWrapper(io.BufferedWriter(output), "utf-8", newline="\n")
    chat("-prompt=a", "-max_new_tokens=5", stdout=stdout)
    assert shown == [len("Completion:\na") + count for count in range(5)]


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


# The page of -look --------------------------------------------------------------------------------

BROWSERS = [
    name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)
]
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
HIDDEN = "\u2028\u202e\ud800\0\x1b\x85\t\r"  # can't be seen, or would do something to the text
HOSTILE = f"</script><!--<b>&amp;$DATAe\u0301\n🙂{HIDDEN}"


@pytest.fixture
def look(tmp_path, chat):
    """`look("-prompt=a", characters="abc")` gives how the chat ended, its page and the data."""

    def run(*flags, characters="\n abcdefgh", shape=(24, 3, 2, 16), **options):
        fixed = ("-look=page.html", "-temperature=0", "-max_new_tokens=6")
        # With usual weights, every head would look at all characters alike.
        done = chat(*fixed, *flags, characters=characters, shape=shape, scale=8, **options)
        page = read_folder(tmp_path).get("page.html", b"").decode()
        found = re.search('<script type="application/json" id="data">(.*?)</script>', page)
        return done, page, json.loads(found[1]) if found else None

    return run


@pytest.mark.parametrize("shape", [(24, 3, 2, 16), (8, 1, 1, 20), (12, 2, 3, 5), (4, 1, 1, 1)])
@pytest.mark.parametrize("characters", ["\n abcdefgh", "ab "])
def test_the_numbers_are_those_of_the_plain_maths(look, tmp_path, shape, characters):
    done, _, data = look("-prompt=ab ", characters=characters, shape=shape)
    length = min(9, shape[3])
    assert data["text"] == done.stdout.removeprefix("Completion:\n")[:-1][-length:]
    assert (data["cut"], data["start"]) == (9 - length, 3 - (9 - length))
    model, vocabulary = load_model(tmp_path / "model-01.pkl")
    plain = PlainGPT(**model.config).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([vocabulary.encode(data["text"])])
    weights, chances = plain.inside(ids)
    given = chances[-1, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert data["bits"] == pytest.approx((-given.log2()).tolist(), abs=2e-3)
    # The rows of each head are a triangle; zeros make it the square that it is in the maths.
    square = [
        [[row + [0] * (length - t - 1) for t, row in enumerate(head)] for head in heads]
        for heads in data["attention"]
    ]
    torch.testing.assert_close(torch.tensor(square) / 1000, weights, atol=6e-4, rtol=0)
    best = chances.topk(min(5, len(vocabulary))).values
    shares = [[[share for _, share in five] for five in steps] for steps in data["guesses"]]
    named = [[vocabulary.encode(dict(five)) for five in steps] for steps in data["guesses"]]
    torch.testing.assert_close(torch.tensor(shares) / 1000, best, atol=6e-4, rtol=0)
    torch.testing.assert_close(chances.gather(2, torch.tensor(named)), best, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flags", [(), ("-show",), ("-stop=\ud800",)])
def test_no_text_can_be_markup(look, flags):
    _, page, data = look("-prompt", HOSTILE, *flags, characters=HOSTILE)
    assert data["start"] + data["cut"] == len(HOSTILE) and len(data["text"]) == 16
    written = page[page.index('id="data">') : page.rindex("<script>")]
    assert written.isascii() and written.count("<") == 1  # where the data end


def test_each_answer_is_shown_up_to_its_stop_and_the_next_takes_its_place(look):
    full = look("-prompt=bad")[2]["text"]
    stop = full[5:7]
    done, _, data = look("-show", "-stop", stop.replace("\n", r"\n"), typed=b"abc\nbad\n")
    assert data["text"] == "bad" + full[3:].partition(stop)[0]
    assert done.stderr == "wrote page.html; open it in a browser\n" * 2


@pytest.mark.parametrize(
    "flag, status, message",
    [
        ("-look=gone/page.html", 1, "gone/page.html: "),
        ("-look=.", 1, r"\.: "),
        ("-batch_size=2", 2, "argument -look: shows one completion only"),
        ("-look=model-01.pkl", 2, "argument -look: model-01.pkl is no name for a page"),
    ],
)
def test_what_can_be_foreseen_is_one_line_and_leaves_nothing(look, tmp_path, flag, status, message):
    assert_fails(look("-prompt=a", flag, status=status)[0], message, status)
    assert list(read_folder(tmp_path)) == ["model-01.pkl"]
    assert load_model(tmp_path / "model-01.pkl")


# What a person sees, as data: of each character and guess its class, text and strength
SEEN = """
const all = (names, parent = document) => [...parent.querySelectorAll(names)];
const see = part => [part.className, part.textContent, +part.style.getPropertyValue("--share")];
const texts = all(".text").map(text => all("span", text).map(see));
const seen = { texts, guesses: all("td").map(see), rows: all(".row").length, about: $("about")
  .textContent, read: $("read").textContent, place: $("place").value };
document.body.replaceChildren(JSON.stringify(seen));
"""
ACTIONS = {  # what a person does, by what stands behind the page's address at first
    "#6": "",
    "#5": "for (const way of ['Right', 'Right', 'Left']) onkeydown({ key: `Arrow${way}` });",
    "": "characters[5].dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));"
    "choose(16);",
    "#bad": "$('place').value = 6; $('place').dispatchEvent(new Event('input'));",
}


def named(character: str) -> str:
    """Return how the page names a single character."""
    sign = f"\\u{{{ord(character):x}}}" if character in HIDDEN else character
    return {" ": "␣", "\n": "↵"}.get(character, sign)


@pytest.mark.skipif(not BROWSERS, reason="there is no Chromium here")
@pytest.mark.parametrize(
    "prompt, characters", [("abcd", "\n abcdefgh"), (HOSTILE, HOSTILE)], ids=["plain", "hostile"]
)
@pytest.mark.parametrize("place", ACTIONS)
def test_a_person_sees_text_guesses_and_boxes(look, tmp_path, capfd, prompt, characters, place):
    _, page, data = look("-prompt", prompt, characters=characters)
    put(tmp_path, {"seen.html": f"{page}<script>{ACTIONS[place]}{SEEN}</script>".encode()})
    address = (tmp_path / "seen.html").as_uri() + place
    # Into capfd's files: pipes would, at a time-out, be waited for until all its processes end.
    subprocess.run([BROWSERS[0], *OPTIONS, f"--user-data-dir={tmp_path}", address], timeout=60)
    shown, errors = capfd.readouterr()
    assert "CONSOLE" not in errors, errors
    seen = json.loads(html.unescape(re.search("<body>(.*)</body>", shown)[1]))
    text, *boxes = seen["texts"]
    length, start = len(data["text"]), data["start"]
    assert seen["read"].startswith(f"“{named(data['text'][5])}” is character 6 of {length}, ")
    assert ("no more at once" in seen["about"]) == (prompt == HOSTILE)
    assert (seen["place"], seen["rows"]) == ("6", 2)

    signs = [{" ": " ", "\n": "↵\n"}.get(character, named(character)) for character in data["text"]]
    assert [[sign for _, sign, _ in part] for part in seen["texts"]] == [signs] * (1 + 2 * 3)
    kinds = [*["prompt"] * start, "start", *[""] * (length - start - 1)]
    kinds[5] = f"{kinds[5]} chosen".strip()
    assert [kind for kind, *_ in text] == kinds

    chosen = [*[""] * 5, "chosen", *[""] * (length - 6)]
    assert [[kind for kind, *_ in box] for box in boxes] == [chosen] * 6
    strengths = [strength**2 / 1000 for box in boxes for *_, strength in box[:6]]
    looks = [share for heads in data["attention"] for head in heads for share in head[5]]
    assert strengths == pytest.approx(looks)

    fives = [five for block in data["guesses"] for five in block[5]]
    expected = [["right" * (c == data["text"][6]), named(c), share] for c, share in fives]
    guesses = [[kind, sign.partition(" ")[0], share] for kind, sign, share in seen["guesses"]]
    assert guesses == expected and len(guesses) == 3 * 5
