"""chatbot.py: prompts are completed as asked, in the characters that the model knows, until the person has enough."""

import argparse
import errno
import io
import os
import signal
import subprocess
from contextlib import suppress

import pytest
import torch
from conftest import assert_fails, signals

import chatbot
from model import GPTLanguageModel, Vocabulary, load_model, save_model

CHARACTERS = "\n abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small untrained model."""
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
        return {chat("-prompt", "a", *flags).stdout for _ in range(3)}

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


def test_what_can_not_be_compiled_is_answered_as_it_is(folder, capsys, monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no working compiler\nand a long story")

    model, _ = load_model(folder / "model-01.pkl")
    args = argparse.Namespace(batch_size=2, device=torch.device("cpu"))
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
    """A model that would hardly write anything but U+FFFD, if it were let."""
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


def test_piped_lines_are_answered_one_by_one(chat):
    done = chat("-max_new_tokens", 10, "-seed", 1, typed="one\n\ntwo")
    answers = done.stdout.split("Prompt: ")[1:]
    assert len(answers) == 4 and done.stderr == ""  # three lines and the end of the input
    for prompt, answer in zip(("one", "\n", "two"), answers):
        assert answer.startswith(f"Completion:\n{prompt}") and len(completion(answer)) == len(prompt) + 10


def test_each_prompt_stands_alone(chat):
    both, alone = (chat("-max_new_tokens", 20, "-temperature", 0, typed=lines) for lines in ("one\ntwo\n", "two\n"))
    assert both.stdout.split("Prompt: ")[2] == alone.stdout.split("Prompt: ")[1]


@signals
def test_ctrl_c_stops_an_answer_and_then_leaves(start_script, folder):
    run = start_script("chatbot.py", "-max_new_tokens", str(10**7), cwd=folder, stdin=subprocess.PIPE)
    run.stdin.write("abc\n")
    run.stdin.flush()
    shown = run.stdout.read(len("Prompt: Completion:\nabc") + 5)
    assert shown.startswith("Prompt: Completion:\nabc")  # text arrives while more is being made
    run.send_signal(signal.SIGINT)
    while "\nPrompt: " not in shown:
        shown += run.stdout.read(1) or pytest.fail(shown)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 0 and errors == "(stopped)\n"


def test_a_reader_that_has_seen_enough_ends_the_chat_quietly(start_script, folder):
    run = start_script("chatbot.py", "-prompt", "a", "-max_new_tokens", str(10**7), cwd=folder)
    run.stdout.read(20)
    run.stdout.close()
    assert run.wait(timeout=30) == 0 and run.stderr.read() == ""


def test_windows_word_for_a_reader_that_has_seen_enough_ends_the_chat_quietly(run_main, folder):
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
