"""chatbot.py: where prompts come from, how they are completed and shown, and how a chat ends."""

import errno
import io
import math
import os
import re
import signal
import subprocess
import time
from contextlib import suppress

import pytest
import torch
from conftest import assert_fails, signals, wait_until_shown

import chatbot
from model import GPTLanguageModel, Vocabulary, load_model, save_model

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small untrained model."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("chat")
    model = GPTLanguageModel(len(CHARACTERS), n_embd=16, n_head=2, n_layer=1, block_size=16)
    save_model(folder / "model-01.pkl", model, Vocabulary(CHARACTERS))
    return folder


@pytest.fixture
def chat(folder, run_main):
    """`chat("-top_k", 3, typed="one\\n")` runs chatbot.py in the folder, with these lines as its input."""

    def run(*flags, typed: str = "", status: int = 0):
        done = run_main(
            "chatbot.py", "-device=cpu", *flags, cwd=folder, stdin=io.TextIOWrapper(io.BytesIO(typed.encode()))
        )
        assert done.returncode == status, done.stderr
        return done

    return run


def completion(output: str) -> str:
    return output.removeprefix("Completion:\n").removesuffix("\n")


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [[], ["-dtype=float32"], ["-dtype=bfloat16"]])
def test_a_prompt_is_completed_once_by_150_characters(chat, dtype):
    done = chat("-prompt", "hello", *dtype)
    assert done.stdout.startswith("Completion:\nhello") and len(completion(done.stdout)) == 5 + 150
    assert done.stderr == ""


def test_a_prompt_longer_than_the_window_is_shown_whole(chat):
    prompt = "the quick brown fox jumps over the lazy dog"
    output = chat("-prompt", prompt, "-max_new_tokens", 40).stdout
    assert completion(output).startswith(prompt) and len(completion(output)) == len(prompt) + 40


def test_seed_and_temperature_decide_the_answer(chat):
    def answers(*flags):
        return {chat("-prompt", "a", "-max_new_tokens", 40, *flags).stdout for _ in range(3)}

    assert len(answers("-seed", 1)) == 1
    assert len(answers("-temperature", 0)) == 1
    assert len(answers()) == 3
    assert answers("-seed", 1) != answers("-seed", 2)
    assert answers("-top_k", 1) == answers("-temperature", 0)


def test_several_completions_are_numbered_and_whole(chat):
    done = chat("-prompt", "abc", "-batch_size", 3, "-max_new_tokens", 30)
    parts = done.stdout.split("Completion ")[1:]
    assert [part[:6] for part in parts] == ["1:\nabc", "2:\nabc", "3:\nabc"]
    assert all(len(part.removesuffix("\n")) == 3 + 33 for part in parts)
    assert len({part[3:] for part in parts}) == 3


def test_a_model_that_can_not_be_compiled_still_answers(folder, capsys, monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no working compiler\nand a long story")

    model, _ = load_model(folder / "model-01.pkl")
    args = chatbot.parse_args(["-batch_size=2", "-device=cpu"])
    caches = model.new_caches(2)
    monkeypatch.setattr(torch, "compile", broken)
    try:
        chatbot.capture(model, caches, args)
    finally:
        torch.compiler.set_stance("default")
    assert capsys.readouterr().err.endswith("can't be done here, answers take longer: no working compiler\n")
    assert model.generate(torch.zeros(2, 1, dtype=torch.long), 5, caches=caches).shape == (2, 6)


# Characters that the model does not know -----------------------------------------------------------------------------


def test_unknown_characters_are_left_out_with_one_notice(chat):
    done = chat("-prompt", "aÄbÄ🙂c")
    assert done.stdout.startswith("Completion:\nabc")
    assert done.stderr == "left out, as the model has never seen them: 'Ä' '🙂'\n"


@pytest.mark.parametrize("prompt", ["", "ÄÖ"])
def test_a_prompt_with_nothing_known_is_answered_from_a_newline(chat, prompt):
    output = chat("-prompt", prompt).stdout
    assert output.startswith("Completion:\n\n") and len(completion(output)) == 151


@pytest.fixture
def with_replacement(folder):
    """Return flags for a model that would write hardly anything but U+FFFD if that were allowed."""
    characters = "ab\ufffd🙂"
    model = GPTLanguageModel(len(characters), n_embd=16, n_head=2, n_layer=1, block_size=16)
    with torch.no_grad():
        model.lm_head.bias[characters.index("\ufffd")] = 30
    save_model(folder / "replacement.pkl", model, Vocabulary(characters))
    return "-model", "replacement.pkl"


def test_unknown_characters_become_u_fffd_where_the_model_has_it(chat, with_replacement):
    done = chat("-prompt", "aÄ\ufffdbÄ🚀", *with_replacement)
    assert done.stdout.startswith("Completion:\na\ufffd\ufffdb\ufffd\ufffd")
    assert done.stderr == "replaced by U+FFFD, as the model has never seen them: 'Ä' '🚀'\n"
    done = chat("-prompt", "ab\ufffd", *with_replacement)
    assert done.stdout.startswith("Completion:\nab\ufffd") and done.stderr == ""


@pytest.mark.parametrize("flags", [(), ("-temperature", 0), ("-top_k", 1), ("-top_k", 4), ("-dtype", "bfloat16")])
def test_u_fffd_is_never_written(chat, with_replacement, flags):
    for more in ((), ("-batch_size", 2)):
        output = chat("-prompt", "Ä", "-max_new_tokens", 100, *flags, *more, *with_replacement).stdout
        assert output.count("\ufffd") == (2 if more else 1)
        assert len(output) > 100


def test_a_model_that_knows_only_u_fffd_is_a_sentence(chat, folder):
    model = GPTLanguageModel(1, n_embd=4, n_head=1, n_layer=1, block_size=4)
    save_model(folder / "only.pkl", model, Vocabulary("\ufffd"))
    done = chat("-prompt", "a", "-model", "only.pkl", status=1)
    assert_fails(done, "only.pkl: knows no character but U[+]FFFD")
    assert done.stdout == ""


# The chat ------------------------------------------------------------------------------------------------------------


def test_piped_lines_are_answered_one_by_one_without_being_asked_for(chat):
    done = chat("-max_new_tokens", 10, "-seed", 1, typed="one\n\ntwo")
    nothing, *answers = done.stdout.split("Completion:\n")
    assert nothing == done.stderr == "" and len(answers) == 3
    for prompt, answer in zip(("one", "\n", "two"), answers):
        assert answer.startswith(prompt) and len(answer.removesuffix("\n")) == len(prompt) + 10


def test_each_prompt_stands_alone(chat):
    both, alone = (chat("-max_new_tokens", 20, "-temperature", 0, typed=lines) for lines in ("one\ntwo\n", "two\n"))
    assert both.stdout.split("Completion:\n")[2] == alone.stdout.split("Completion:\n")[1]


@pytest.mark.parametrize(
    ("typed", "prompt"), [("one\\\ntwo\n", "one\ntwo"), ("one\\\n\n", "one\n"), ("one\\", "one\n")]
)
def test_a_line_that_ends_in_a_backslash_goes_on_in_the_next(chat, typed, prompt):
    done = chat("-max_new_tokens", 10, "-temperature", 0, typed=typed)
    assert done.stdout == chat("-max_new_tokens", 10, "-temperature", 0, "-prompt", prompt).stdout
    assert done.stdout.startswith(f"Completion:\n{prompt}")


@signals
@pytest.mark.parametrize("leave", ["Ctrl-C", "Ctrl-D"])
def test_someone_at_a_terminal_is_asked_for_prompts_until_they_leave(start_script, folder, leave):
    import pty

    ours, theirs = pty.openpty()
    flags = ["-max_new_tokens=5", "-temperature=0", "-device=cpu", "-show"]
    run = start_script("chatbot.py", *flags, cwd=folder, stdin=theirs, stdout=theirs)
    os.close(theirs)
    shown = ""

    def read_until(text):
        nonlocal shown
        while text not in shown:
            shown += os.read(ours, 1000).decode()

    read_until("Prompt: ")
    os.write(ours, b"ab\\\n")
    read_until("... ")
    os.write(ours, b"cd\n")
    read_until("in the completion\r\nPrompt: ")
    assert "Completion:\r\na\x1b[38;5;" in shown and "\x1b[0m\r\nbits per character: " in shown
    time.sleep(0.3)  # Python, once it has asked, does not notice a Ctrl-C that comes before it waits for the line
    if leave == "Ctrl-C":
        run.send_signal(signal.SIGINT)
    else:
        os.write(ours, b"\x04")
    assert run.wait(timeout=30) == 0
    assert os.read(ours, 1000).decode().endswith("\r\n")
    os.close(ours)


@signals
def test_ctrl_c_stops_an_answer(start_script, folder):
    run = start_script("chatbot.py", "-max_new_tokens", str(10**7), cwd=folder, stdin=subprocess.PIPE)
    run.stdin.write("abc\nxyz\n")
    run.stdin.flush()
    shown = run.stdout.read(len("Completion:\nabc") + 5)
    assert shown.startswith("Completion:\nabc")  # text arrives while more is being made
    run.send_signal(signal.SIGINT)
    while "\nCompletion:\nxyz" not in shown:
        shown += run.stdout.read(1) or pytest.fail(shown)
    run.send_signal(signal.SIGINT)
    wait_until_shown(run, "(stopped)\n(stopped)\n")
    _, errors = run.communicate(timeout=30)  # which ends the input
    assert run.returncode == 0 and errors == ""


# Where a prompt comes from and where its completion ends -------------------------------------------------------------


@pytest.mark.parametrize("content", [b"abc\ndef\n", b"abc\r\ndef\r\n", b"\xef\xbb\xbfabc\ndef\n"])
def test_a_prompt_file_is_answered_as_it_is(chat, folder, content):
    flags = ["-max_new_tokens", 10, "-temperature", 0]
    expected = chat(*flags, "-prompt", "abc\ndef\n").stdout
    (folder / "prompt.txt").write_bytes(content)
    assert chat(*flags, "-prompt_file", "prompt.txt").stdout == expected
    assert expected.startswith("Completion:\nabc\ndef\n")
    assert chat(*flags, "-prompt_file", "-", typed="abc\ndef\n").stdout == expected


def test_a_prompt_file_that_can_not_be_read_is_a_sentence(chat, folder):
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, message in (
        ("latin.txt", "latin.txt: not UTF-8 text; save it as UTF-8"),
        ("gone.txt", f"gone.txt: {os.strerror(errno.ENOENT)}$"),
        (".", r"\.: "),
    ):
        assert_fails(chat("-prompt_file", name, status=1), message)


@pytest.mark.parametrize("batch", [(), ("-batch_size", 2), ("-show",)])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_completion_ends_before_the_text_that_stops_it(chat, batch, length):
    flags = ["-prompt", "abc", "-temperature", 0, "-max_new_tokens", 60, "-dtype", "float32"]
    full = completion(chat(*flags).stdout).removeprefix("abc")
    stop = full[20 : 20 + length]
    expected = "abc" + full[: full.index(stop)]
    output = chat(*flags, *batch, "-stop", stop).stdout
    if batch == ("-show",):
        output, _, bits = output.partition("\nbits per character: ")
        assert bits
    answers = output.replace(" 1:", ":").split("Completion 2:\n")
    assert [completion(answer) for answer in answers] == [expected] * len(answers)
    assert len(answers) == (2 if "-batch_size" in batch else 1)


def test_a_stop_that_does_not_come_changes_nothing(chat):
    flags = ["-prompt", "abc", "-seed", 1]
    full = chat(*flags).stdout
    assert chat(*flags, "-stop", "Z").stdout == chat(*flags, "-stop", "").stdout == full
    assert chat(*flags, "-stop", completion(full)[-1] + "Z").stdout == full  # what was held back is shown


@pytest.mark.parametrize("stop", ["ab", "aab", "abab", "aaa"])
def test_all_that_may_be_the_beginning_of_a_stop_is_held_back(stop):
    for number in range(2**10):
        text = f"{number:010b}".replace("0", "a").replace("1", "b")
        assert "".join(chatbot.until(stop, text)) == text.partition(stop)[0]


# The surprises of a text ---------------------------------------------------------------------------------------------


def test_surprises_are_the_bits_of_the_probabilities_that_the_model_gave(folder):
    model, vocabulary = load_model(folder / "model-01.pkl")
    ids = vocabulary.encode("the quick brown fox jumps over the lazy dog\n" * 2)
    bits = chatbot.surprises(model, ids)
    assert len(bits) == len(ids) - 1
    for place in range(1, 17):  # the whole text before it fits into the window
        probability = model(torch.tensor([ids[:place]]))[0][0, -1].softmax(0)[ids[place]]
        assert 2 ** -bits[place - 1] == pytest.approx(probability.item(), rel=1e-4)
    for place in range(17, len(ids)):  # of a longer one, the model sees 8 to 16 characters
        seen = [model(torch.tensor([ids[place - t : place]]))[0][0, -1].softmax(0)[ids[place]] for t in range(8, 17)]
        assert any(2 ** -bits[place - 1] == pytest.approx(probability.item(), rel=1e-4) for probability in seen)


@pytest.mark.parametrize("ids", [[3], [3, 4]])
def test_the_first_character_has_no_surprise(folder, ids):
    model, _ = load_model(folder / "model-01.pkl")
    assert len(chatbot.surprises(model, ids)) == len(ids) - 1


def test_show_gives_the_bits_and_no_colours_where_there_is_no_terminal(chat, folder):
    flags = ["-prompt", "hello", "-seed", 1, "-max_new_tokens", 20]
    text = completion(chat(*flags).stdout)
    output = chat(*flags, "-show").stdout
    model, vocabulary = load_model(folder / "model-01.pkl")
    bits = chatbot.surprises(model, vocabulary.encode(text))
    means = f"{sum(bits[:4]) / 4:.2f} in the prompt, {sum(bits[4:]) / 20:.2f} in the completion"
    assert output == f"Completion:\n{text}\nbits per character: {means}\n"
    assert "bits per character: " in chat("-prompt", "a", "-show").stdout
    assert chat("-prompt", "a", "-show", "-batch_size", 2).stdout.count("bits per character: ") == 2


def test_colours_tell_how_surprising_a_character_was():
    text = chatbot.coloured("abcdef", [0.0, 1.0, 2.9, 5.0, 99.0])
    assert re.findall(r"\x1b\[38;5;(\d+)m(\w)", text) == [
        ("28", "b"), ("28", "c"), ("32", "d"), ("166", "e"), ("160", "f")
    ]  # fmt: skip
    assert re.sub(r"\x1b\[[\d;]+m", "", text) == "abcdef" and text.startswith("a") and text.endswith("\x1b[0m")


# How a chat ends -----------------------------------------------------------------------------------------------------


def test_a_closed_pipe_ends_the_chat_quietly(start_script, folder):
    run = start_script("chatbot.py", "-prompt", "a", "-max_new_tokens", str(10**7), cwd=folder)
    run.stdout.read(20)
    run.stdout.close()
    assert run.wait(timeout=30) == 0 and run.stderr.read() == ""


def test_a_closed_pipe_on_windows_ends_the_chat_quietly(run_main, folder):
    class Closed(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    closed = io.TextIOWrapper(io.BufferedWriter(Closed()), "utf-8", write_through=True)
    ended = run_main("chatbot.py", "-device=cpu", "-prompt=a", cwd=folder, stdout=closed)
    with suppress(OSError):
        closed.close()
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_error_that_nobody_foresaw_keeps_its_traceback(folder, run_main, monkeypatch):
    for error in (
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(5, "Input/output error"),
    ):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(chatbot, "load_model", fail)
        with pytest.raises(type(error)) as caught:
            run_main("chatbot.py", "-device=cpu", "-prompt=a", cwd=folder)
        assert caught.value is error


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_too_little_memory_is_a_sentence(folder, run_main, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(chatbot, "load_model", fail)
    assert_fails(run_main("chatbot.py", "-device=cpu", "-prompt=a", cwd=folder), "not enough memory$")
    flags = ["-device=cpu", "-prompt=a", "-batch_size=2"]
    assert_fails(run_main("chatbot.py", *flags, cwd=folder), "not enough memory; try a smaller -batch_size$")


# Surroundings --------------------------------------------------------------------------------------------------------


class NotebookStream(io.StringIO):
    """A stream as IDLE and Jupyter have it: it can't be reconfigured and has no file number."""

    encoding = "utf-8"

    def __init__(self, text: str = ""):
        super().__init__(text)
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    @property
    def reconfigure(self):
        raise AttributeError("reconfigure")


def test_streams_of_a_notebook_are_enough(run_main, folder):
    shown, errors = NotebookStream(), NotebookStream()
    streams = {"stdin": NotebookStream("abc\n"), "stdout": shown, "stderr": errors}
    done = run_main("chatbot.py", "-device=cpu", "-max_new_tokens=5", "-show", cwd=folder, **streams)
    assert done.returncode == 0 and errors.text == ""
    assert shown.text.startswith("Completion:\nabc") and "bits per character" in shown.text


def test_the_encoding_of_a_terminal_is_respected(run_main, folder):
    characters = "\n中文\N{THAI CHARACTER KO KAI}"  # the last of which GBK does not have
    model = GPTLanguageModel(len(characters), n_embd=16, n_head=2, n_layer=1, block_size=16)
    save_model(folder / "chinese.pkl", model, Vocabulary(characters))
    buffer = io.BytesIO()
    streams = {
        "stdin": io.TextIOWrapper(io.BytesIO("中文".encode("gbk") + b"\xff\n"), "gbk"),
        "stdout": io.TextIOWrapper(buffer, "gbk", write_through=True),
    }
    flags = ["-device=cpu", "-model=chinese.pkl", "-max_new_tokens=60", "-seed=1"]
    done = run_main("chatbot.py", *flags, cwd=folder, **streams)
    assert done.returncode == 0 and "left out" in done.stderr
    shown = buffer.getvalue().decode("gbk")
    assert shown.startswith("Completion:\n中文") and len(completion(shown)) == 2 + 60 and "?" in shown


# From Python or a notebook -------------------------------------------------------------------------------------------


def test_the_readmes_lines_for_python_work_as_pasted(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    namespace = {}
    exec(COMPLETE, namespace)
    assert capsys.readouterr().out.startswith("it was ") and len(namespace["text"]) == len("it was ") + 100
    exec(LOSS, namespace)
    nats, bits = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    model, vocabulary = namespace["model"], namespace["vocabulary"]
    expected = chatbot.surprises(model, vocabulary.encode("it was"))
    assert bits == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    assert nats == pytest.approx(bits * math.log(2), abs=1e-3)
    exec(LENS, namespace)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(model.blocks) and all(re.fullmatch(r"after layer \d: .+", line) for line in lines)
    best = model(vocabulary_tensor(vocabulary, "it was"))[0][0, -1].topk(5).indices.tolist()
    assert lines[-1].endswith(repr(vocabulary.decode(best)))  # the last layer says what the model says


def vocabulary_tensor(vocabulary: Vocabulary, text: str) -> torch.Tensor:
    return torch.tensor([vocabulary.encode(text)])


COMPLETE = """
import torch
from model import load_model

model, vocabulary = load_model("model-01.pkl")
index = torch.tensor([vocabulary.encode("it was ")])
text = vocabulary.decode(model.generate(index, 100, temperature=0.8)[0].tolist())
print(text)
"""
LOSS = """
import math

ids = torch.tensor([vocabulary.encode("it was")])
with torch.no_grad():
    logits, loss = model(ids[:, :-1], ids[:, 1:])
print(f"{loss:.4f} nats = {loss / math.log(2):.4f} bits per character")
"""
LENS = """
with torch.no_grad():
    x = model.token_embedding_table(ids) + model.position_embedding_table.weight[: ids.shape[1]]
    for layer, block in enumerate(model.blocks, start=1):
        x = block(x)
        likeliest = model.lm_head(model.ln_f(x))[0, -1].topk(5).indices.tolist()
        print(f"after layer {layer}: {vocabulary.decode(likeliest)!r}")
"""
