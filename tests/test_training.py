"""training.py: rows from any text, a recipe that learns, runs that can be stopped and resumed.

What goes wrong with flags and texts is in test_bad_input.py, full disks in test_whole_files.py.
"""

import errno
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from threading import Timer
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    STOPS,
    TINY,
    Output,
    assert_fails,
    metrics,
    posix,
    put,
    read_folder,
    signals,
    wait_until_shown,
    write_texts,
)
from steps import new_run, settings_with, settle
from torch.utils._pytree import tree_map_only

import model as gpt
import training
from model import GPTLanguageModel, Vocabulary, load_model, read_model_file, save_model

MIXED = "Plain text, Привет мир, γειά, 中文字符, नमस्ते, שלום, “quoted” – é🙂🚀\n"
FAST = ["-learning_rate=0.01", "-min_lr=0.01", "-warmup_iters=9"]
ENDLESS = ["-max_iters=1000000", "-eval_interval=1000000"]
THREE = ("model-01.pkl", "model-01.state.pkl", "model-01.metrics.csv")


def tiny_settings(*flags) -> training.Namespace:
    return settings_with([*TINY, "-dropout=0", *flags])


def open_text(folder: Path, block_size: int) -> training.Text:
    path, vocabulary = folder / "output_train.txt", Vocabulary.from_file(folder / "vocab.txt")
    return training.Text(path, vocabulary, block_size)


def shuffled_text(count: int) -> str:
    return "".join(random.Random(1).sample(MIXED * count, len(MIXED) * count))


@pytest.fixture
def train(texts, run_main, short_samples):
    """`train("-max_iters=3", status=0)` runs training.py on the texts, in the TINY shape."""

    def run(*flags, status: int = 0, **streams):
        shape = ["-device=cpu"] if "-resume" in flags else TINY
        done = run_main("training.py", *shape, *flags, **streams)
        assert done.returncode == status, done.stderr
        return done

    return run


def state_of(folder: Path, name: str = "model-01") -> dict:
    return read_model_file((folder / f"{name}.state.pkl").read_bytes())


def last_step(folder: Path, name: str = "model-01") -> int:
    return state_of(folder, name)["training"]["record"]["step"]


def losses(folder: Path, name: str = "model-01") -> list[float]:
    return [
        float(row[column]) for row in metrics(folder, name) for column in ("train_loss", "val_loss")
    ]


def evaluations(output: str) -> list[tuple[int, float, bool]]:
    """Return the step, the validation loss, and whether the model was saved, of each."""
    found = re.findall(r"(?m)^step (\d+): train loss [\d.]+, val loss ([\d.]+)(, saved)?", output)
    return [(int(step), float(loss), bool(saved)) for step, loss, saved in found]


def in_step(monkeypatch, number: int, action) -> None:
    """Call `action` in the middle of the step with this number."""
    get_batch = training.get_batch

    def get_batch_and_act(text, step, *more):
        if step + 1 == number:
            action()
        return get_batch(text, step, *more)

    monkeypatch.setattr(training, "get_batch", get_batch_and_act)


def interrupt_in(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Let Ctrl-C, or another signal, come in the middle of a step."""
    in_step(monkeypatch, step, lambda: signal.raise_signal(number))


def assert_same(a, b) -> None:
    """Compare data with tensors in it, bit for bit."""
    a, b = (tree_map_only(torch.Tensor, torch.Tensor.tolist, data) for data in (a, b))
    same = a == b
    assert same  # not more, since to show the difference would take minutes


# Rows of text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_a_row_begins_with_the_next_whole_character_from_any_byte_on(tmp_path, block_size):
    content = shuffled_text(4)
    text, data = open_text(write_texts(tmp_path, content), block_size), content.encode()
    for place in range(len(data) - 4 * (block_size + 1)):
        rest = data[place:].decode(errors="ignore")  # without the end of a character begun before
        assert text.row(place) == rest[: block_size + 1]


def test_every_row_of_a_text_is_drawn(tmp_path):
    content = "".join(dict.fromkeys(MIXED))[:30]
    text = open_text(write_texts(tmp_path, content), block_size=2)
    rows = {content[i : i + 3] for i in range(28)}  # the first and the last, too
    assert set(text.draw(3000, [1337, 5, 0])) == rows


def test_targets_are_the_characters_after_the_inputs(texts):
    vocabulary, content = Vocabulary.from_file(texts / "vocab.txt"), read_folder(texts)
    x, y = training.get_batch(open_text(texts, 8), 2, tiny_settings("-batch_size=16"))
    assert x.shape == y.shape == (16, 8) and x.dtype == torch.int64 and x[:, 1:].equal(y[:, :-1])
    for row in torch.cat([x, y[:, -1:]], dim=1).tolist():
        assert vocabulary.decode(row).encode() in content["output_train.txt"]


def test_an_unknown_character_is_read_as_u_fffd_where_the_vocabulary_has_that(tmp_path):
    text = open_text(write_texts(tmp_path, "ééé∞é" * 4, vocabulary="é\ufffd"), 8)
    assert text.encode(["é∞\0", "🙂é\n"]).tolist() == [[1, 2, 2], [2, 1, 0]]


NOT_UTF_8 = [b"\xff", b"\x80" * 5, b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"]


@pytest.mark.parametrize("bad", NOT_UTF_8)
@pytest.mark.parametrize("place", [0, 20, 40])
def test_text_that_is_not_utf_8_is_named_with_its_place(tmp_path, bad, place):
    data = b"a" * place + bad + b"a" * (40 - place)
    put(write_texts(tmp_path, "abc"), {"output_train.txt": data})
    wrong = r"output_train.txt: not UTF-8 text at byte \d+$"
    with pytest.raises(training.TrainingError, match=wrong) as caught:
        list(open_text(tmp_path, 8).from_the_start())
    assert int(str(caught.value).split()[-1]) - place in range(len(bad))


# Learning -----------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_its_end_at_the_last_step():
    flags = ["-learning_rate=1", "-min_lr=0.1", "-warmup_iters=10", "-max_iters=111"]
    settings = tiny_settings(*flags)
    rates = [training.learning_rate_at(step, settings) for step in (0, 4, 9, 10, 35, 60, 85, 110)]
    quarter = 0.45 * math.cos(math.pi / 4)
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55 + quarter, 0.55, 0.55 - quarter, 0.1])


DEFAULTS = [  # of a text of 4,600 bytes
    ("learning_rate", 0.003, "-n_embd=64"),
    ("learning_rate", 0.003, "-batch_size=512"),
    ("learning_rate", 0.001 * math.sqrt(32 * 128 / 768), "-max_iters=9"),
    ("learning_rate", 0.001 * math.sqrt(8 * 128 / 768), "-batch_size=8"),
    ("learning_rate", 0.02, "-optimizer=muon"),
    ("learning_rate", 0.01, "-optimizer=muon", "-max_iters=4800"),
    ("min_lr", 0.15, "-learning_rate=0.5"),
    ("min_lr", 0.05, "-learning_rate=0.5", "-optimizer=muon"),
    ("warmup_iters", 20, "-max_iters=60"),
    ("warmup_iters", 150, "-max_iters=9000"),
    ("dropout", 0, *TINY, f"-max_iters={10 * 4600 // 32}"),  # ten passes
    ("dropout", 0.1, *TINY, f"-max_iters={175 * 460 // 32}"),
    ("dropout", 0.2, *TINY, f"-max_iters={100 * 4600 // 32}"),
]


@pytest.mark.parametrize(("name", "value", "flags"), [(n, v, f) for n, v, *f in DEFAULTS])
def test_what_is_not_given_follows_from_the_other_flags(texts, name, value, flags):
    settings = settings_with([*flags, f"-data_dir={texts}"])
    assert getattr(settings, name) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_are_decayed(optimizer):
    model = GPTLanguageModel(7, n_embd=8, n_head=2, n_layer=1, block_size=4)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    settings = tiny_settings("-weight_decay=0.3", f"-optimizer={optimizer}")
    training.Optimizer(model, settings).step(0.01, grad_clip=1.0)
    for name, parameter in model.named_parameters():
        assert (parameter < 1).all() == (parameter.dim() == 2), name


def test_muon_equals_torchs_on_the_joined_heads_of_a_layer(monkeypatch):
    """Torch itself works in bfloat16, hence the tolerance."""
    monkeypatch.setattr(training, "POLYNOMIALS", ((3.4445, -4.7750, 2.0315),) * 5)  # torch's
    model = GPTLanguageModel(7, n_embd=16, n_head=2, n_layer=2, block_size=4)
    first, second = model.blocks
    single = [first.sa.proj.weight, second.ffwd.net[0].weight, first.ffwd.net[2].weight]
    matrices = [[head.value.weight for head in second.sa.heads], *([weight] for weight in single)]
    joined = [torch.nn.Parameter(torch.cat(parts).detach().clone()) for parts in matrices]
    theirs = torch.optim.Muon(joined, weight_decay=0.1, lr=0.01)
    ours = training.Optimizer(model, tiny_settings("-optimizer=muon", "-dtype=float32"))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for whole, parts in zip(joined, matrices):
            whole.grad = torch.cat([part.grad for part in parts])
        ours.step(0.01, grad_clip=0.0)
        theirs.step()
    for whole, parts in zip(joined, matrices):  # which have moved by up to 3e-2
        torch.testing.assert_close(torch.cat(parts), whole, atol=2e-3, rtol=0)


def test_the_kept_model_is_as_good_as_the_weights_early_in_a_long_run(train, texts, monkeypatch):
    flags = [*FAST, "-dropout=0", "-eval_interval=60"]
    train(*flags, "-max_iters=60")
    short = losses(texts)
    assert short[1] < 2.25  # from ln(11) = 2.4, of which weights of the beginning would have all
    interrupt_in(monkeypatch, 60)
    train(*flags, "-max_iters=1000000", status=130)
    assert losses(texts) == short


# Many processes -----------------------------------------------------------------------------------


@signals
@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the processes with pgrep")
def test_two_processes_learn_as_one_end_after_the_same_step_and_go_on_as_one(
    train, texts, start_script, monkeypatch
):
    flags = [*FAST, "-dropout=0", "-dtype=float32", "-optimizer=muon", "-batch_size=8"]
    flags += ["-max_iters=1000000", "-eval_interval=5"]
    run = start_script("training.py", *TINY, *flags, processes=2)
    wait_until_shown(run, "2 x cpu", "stdout")
    wait_until_shown(run, "step 25: ", "stdout")
    children = subprocess.check_output(["pgrep", "-P", str(run.pid)], text=True)
    os.kill(max(map(int, children.split())), signal.SIGTERM)  # one of them
    output, errors = run.communicate(timeout=60)
    (step,) = re.findall(r"interrupted after step (\d+) ", output)  # only the first process says it
    assert run.returncode != 0 and last_step(texts) == int(step)
    assert not re.search("training.py: |deprecated|broadcast_buffers", errors), errors
    with monkeypatch.context() as patch:
        interrupt_in(patch, 25)
        train(*flags, "-model=one.pkl", status=130)
    assert losses(texts)[:10] == pytest.approx(losses(texts, "one"), abs=1e-4)
    interrupt_in(monkeypatch, int(step) + 1)
    assert f"after step {step} of 1000000" in train("-resume", status=130).stdout


@signals
@pytest.mark.parametrize("number", STOPS[:2])
def test_a_process_that_waits_for_another_ends_at_a_signal(texts, start_script, number):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = start_script("training.py", *TINY, cwd=texts, env={**os.environ, **ranks})
    wait_until_shown(run, "learning rate", "stdout")
    time.sleep(0.5)  # until it waits; a signal that comes earlier has to end it too
    run.send_signal(number)
    _, errors = run.communicate(timeout=10)
    assert run.returncode in (-number, 128 + number) and "Traceback" not in errors


# A run --------------------------------------------------------------------------------------------


def test_a_run_reports_what_it_does_and_keeps_the_best_model(train, texts):
    flags = ["-batch_size=64", "-dtype=float32", "-learning_rate=0.5", "-min_lr=0.1"]
    done = train(*flags, "-max_iters=25", "-eval_interval=10")
    for expected in ("cpu", "parameters, 11 characters", "0.00 MB to validate", "512 tokens"):
        assert expected in done.stdout
    assert done.stderr == ""  # a log file gets no bar
    assert len(re.findall(r"^step.*\n    \S", done.stdout, re.MULTILINE)) == 3  # samples
    _, found, saved = zip(*evaluations(done.stdout))
    assert list(saved) == [loss == min(found[: i + 1]) for i, loss in enumerate(found)]
    rows = metrics(texts)
    assert list(rows[0]) == ["step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds"]
    assert [row["step"] for row in rows] == ["10", "20", "25"] and rows[-1]["tokens"] == "12800"
    assert losses(texts)[1::2] == pytest.approx(found, abs=6e-5)  # which has four decimals
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0.1)


def test_at_the_end_the_whole_validation_text_counts_or_as_much_as_a_tenth_of_the_run(train, texts):
    val = shuffled_text(10)[:460]  # which are 58 rows, as many as a tenth of 145 steps of 4 rows
    write_texts(texts, val=val)
    assert "over the first 160 characters of the validation text" in train("-max_iters=50").stdout
    output = train("-max_iters=150", "-dtype=float32", "-dropout=0.5", "-eval_interval=150").stdout
    pattern = r"([\d.]+) nats = ([\d.]+) bits per character\nover the whole val"
    nats, bits = map(float, re.search(pattern, output).groups())
    model, vocabulary = load_model(texts / "model-01.pkl")
    ids, expected = torch.tensor([vocabulary.encode(val)]), []
    for i in range(1, 460):
        logits, _ = model(ids[:, (i - 1) // 8 * 8 : i])
        expected.append(-logits[0, -1].log_softmax(0)[ids[0, i]].item())
    assert nats == pytest.approx(np.mean(expected), abs=1e-4)
    assert bits == pytest.approx(nats / math.log(2), abs=1e-3)


def test_evaluations_see_the_same_rows_whatever_may_change(train, texts):
    write_texts(texts, shuffled_text(9))
    flags = ["-eval_interval=5", "-learning_rate=0", "-min_lr=0", "-dtype=float32"]
    first = evaluations(train(*flags, "-max_iters=10").stdout)
    later = evaluations(train("-resume", "-max_iters=200").stdout)
    assert len({loss for _, loss, _ in first + later}) == 1  # nothing was learnt in between


@pytest.mark.parametrize("start", [b"\x89PNG", b"<?xml svg", b"%PDF"])
def test_a_plot_is_drawn(train, texts, start):
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    name = f"loss.{start[-3:].decode().lower()}"
    train("-max_iters=4", "-eval_interval=2", f"-plot={name}")
    assert (texts / name).read_bytes().startswith(start.split()[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_learns_in_every_precision_and_saves_float32_weights(train, texts, dtype):
    flags = ["-max_iters=150", "-eval_interval=150", "-learning_rate=0.02", "-warmup_iters=5"]
    output = train(*flags, "-dropout=0", f"-dtype={dtype}").stdout
    ((_, loss, _),) = evaluations(output)
    assert dtype in output and loss < 1.0  # from ln(11) = 2.4
    assert load_model(texts / "model-01.pkl")[0].lm_head.weight.dtype == torch.float32
    assert "float16" in train("-resume", "-max_iters=151", "-dtype=float16").stdout  # may change


def test_the_seed_decides_everything(train, texts):
    found = []
    for seed in (1, 1, 2):
        train("-max_iters=5", f"-seed={seed}")
        found.append((texts / "model-01.pkl").read_bytes())
    assert found[0] == found[1] != found[2]


def test_patience_stops_a_run_which_says_so_and_can_be_resumed(train, texts):
    write_texts(texts, val=shuffled_text(10))  # of which nothing is learnt
    flags = ["-learning_rate=0.03", "-warmup_iters=1", "-min_lr=0.03", "-eval_interval=5"]
    output = train(*flags, "-max_iters=120", "-patience=7").stdout
    steps, found, _ = zip(*evaluations(output))
    assert len(found) == found.index(min(found)) + 1 + 7 and steps[-1] < 120
    assert f"stopped after step {steps[-1]}: no better model in 7 evaluations" in output
    output = train("-resume").stdout
    assert "no better model in 7 evaluations" in output and not evaluations(output)
    assert len(evaluations(train("-resume", "-patience=9").stdout)) >= 2
    assert evaluations(train("-resume", "-patience=0").stdout)[-1][0] == 120  # 0 means: never stop


@pytest.mark.parametrize("flag", ["-learning_rate=2e9", "-weight_decay=2e9"])
def test_a_loss_that_is_no_number_ends_the_run_with_what_to_do(train, texts, flag):
    done = train("-max_iters=20", "-eval_interval=6", flag, "-warmup_iters=0", status=1)
    assert_fails(done, r"the loss is (nan|inf) after step [1-6]; .* -learning_rate")


def test_a_loss_that_is_no_number_later_leaves_the_last_good_model(train, texts, monkeypatch):
    rates = [0.01] * 3 + [1e30] * 20
    monkeypatch.setattr(training, "learning_rate_at", lambda step, settings: rates[step])
    done = train("-max_iters=20", "-eval_interval=3", status=1)
    assert_fails(done, r"the loss is (nan|inf) after step [456]")
    assert last_step(texts) == 3 and load_model(texts / "model-01.pkl")


@pytest.fixture
def old_model(texts):
    """Return a model of the characters "abc", which is in a file beside the texts."""
    model = GPTLanguageModel(3, n_embd=12, n_head=3, n_layer=2, block_size=9)
    save_model(texts / "old.pkl", model, Vocabulary("abc"))
    return model


OLD_SHAPE = ["-n_embd=12", "-n_head=3", "-n_layer=2", "-block_size=9"]


@pytest.mark.parametrize("shape", [[], OLD_SHAPE], ids=len)
def test_fine_tuning_takes_over_shape_and_weights_and_grows_the_vocabulary(texts, old_model, shape):
    write_texts(texts, "dcaé" * 20)
    run = new_run(*settle([f"-data_dir={texts}", f"-init_from={texts / 'old.pkl'}", *shape]))
    assert run.vocabulary.characters == "\nabcdé"
    assert {**run.model.config, "dropout": 0.2} == {**old_model.config, "vocab_size": 6}
    weights = run.model.state_dict()
    for name, weight in old_model.state_dict().items():
        is_table = name.startswith(("token_embedding_table", "lm_head"))
        known = weights[name][1:4] if is_table else weights[name]
        assert known.equal(weight), name


@pytest.mark.parametrize("flag", ["-n_embd=32", "-n_head=4", "-n_layer=1", "-block_size=8"])
def test_fine_tuning_takes_no_other_shape(train, old_model, flag):
    done = train("-init_from=old.pkl", *OLD_SHAPE, flag, status=2)
    name, _, value = flag.partition("=")
    assert_fails(done, f"argument {name}: {value} contradicts old.pkl", status=2)


# Interrupting and going on ------------------------------------------------------------------------

LONG = ["-max_iters=30", "-eval_interval=10", "-dropout=0.2"]


def everything_after(folder: Path) -> tuple:
    """Return all that a run leaves, less the seconds."""
    state = state_of(folder)
    state["training"]["record"].update(seconds=0.0, metrics=[])
    rows = [(row["step"], row["train_loss"], row["val_loss"]) for row in metrics(folder)]
    return read_model_file((folder / "model-01.pkl").read_bytes()), state, rows


@pytest.mark.parametrize("flags", [[], ["-optimizer=muon"], ["-dtype=bfloat16"]], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_bits(train, texts, monkeypatch, flags):
    train(*LONG, *flags)
    undisturbed = everything_after(texts)
    monkeypatch.setattr(training, "SOON", 0)
    # Before anything is saved, between evaluations, and at one.
    for step, number in zip((1, 13, 20), STOPS):
        with monkeypatch.context() as patch:
            interrupt_in(patch, step, number)
            output = train(*LONG, *flags, status=128 + number).stdout
        assert f"interrupted after step {step} " in output and "-resume" in output
        load_model(texts / "model-01.pkl")  # can be talked to, also before the first evaluation
        assert f"after step {step} of 30" in train("-resume").stdout
        assert_same(everything_after(texts), undisturbed)


@pytest.mark.parametrize("more", ["-init_from=old.pkl", "-optimizer=muon", "-min_lr=0"])
def test_the_same_command_with_resume_starts_a_run_and_goes_on_with_it(
    texts, run_main, old_model, monkeypatch, more
):
    monkeypatch.setattr(training, "SOON", 0)
    command = ["training.py", "-device=cpu", "-max_iters=5", more, *OLD_SHAPE, "-resume"]
    with monkeypatch.context() as patch:
        interrupt_in(patch, 3)
        done = run_main(*command)
    assert done.returncode == 130 and "there is no run to go on with, so a new" in done.stderr
    done = run_main(*command)
    assert done.returncode == 0 and "after step 3 of 5" in done.stdout and not done.stderr


def test_a_resumed_run_may_become_longer(train, texts):
    train("-max_iters=10", "-eval_interval=5")
    train("-resume", "-max_iters=20")
    rows = metrics(texts)
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    expected = training.learning_rate_at(14, tiny_settings("-max_iters=20"))
    assert float(rows[2]["learning_rate"]) == pytest.approx(expected)
    assert_fails(train("-resume", "-max_iters=15", status=2), "argument -max_iters: ", status=2)
    assert "after step 20 of 20" in train("-resume").stdout  # which is at its end and only reports


FIXED = [
    *("batch_size=8", "block_size=9", "learning_rate=0.5", "min_lr=0", "warmup_iters=0", "seed=2"),
    *("optimizer=muon", "dropout=0.5", "n_layer=2", "eval_interval=9", "weight_decay=0"),
    "init_from=run.pkl",
]


@pytest.mark.parametrize("flag", FIXED)
def test_a_flag_that_contradicts_the_saved_run_is_refused(train, texts, finished_run, flag):
    before = read_folder(put(texts, finished_run))
    done = train("-resume", "-model=run.pkl", "-max_iters=3", f"-{flag}", status=2)
    name, _, _ = flag.partition("=")
    assert_fails(done, f"argument -{name}: .* contradicts run.state.pkl", status=2)
    assert read_folder(texts) == before


@pytest.mark.parametrize("name", ["output_train.txt", "output_val.txt"])
@pytest.mark.parametrize("place", [0, 200, 459])
def test_a_run_does_not_go_on_with_other_texts(train, texts, finished_run, name, place):
    text = finished_run[name]
    put(texts, {**finished_run, name: text[:place] + b" " + text[place + 1 :]})
    done = train("-resume", "-model=run.pkl", "-max_iters=3", status=1)
    assert_fails(done, "the texts are not those")


DAMAGES = {
    "fewer weights": lambda state: state["optimizer"]["parts"][0].pop(0),
    "other shapes": lambda state: state["optimizer"]["parts"][0][0].update(exp_avg=torch.zeros(9)),
    "one number": lambda state: state["optimizer"]["parts"][0][0].update(exp_avg=torch.zeros(())),
    "many steps": lambda state: state["optimizer"]["parts"][0][0].update(step=torch.zeros(9)),
    "another version": lambda state: state.update(version=2),
    "no state": lambda state: state.clear(),
    "a missing device": lambda state: state["flags"].update(device="cuda:99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_is_a_sentence_unless_a_flag_mends_it(
    train, texts, finished_run, damage
):
    path = put(texts, finished_run) / "run.state.pkl"
    content = read_model_file(path.read_bytes())
    DAMAGES[damage](content["training"])
    torch.save(content, path)
    status = 0 if damage == "a missing device" else 1
    done = train("-resume", "-model=run.pkl", "-max_iters=4", "-device=cpu", status=status)
    if status == 1:
        assert_fails(done, "run.state.pkl: (does not hold a run|is not a state of this) ")


# One run never destroys another -------------------------------------------------------------------


def test_runs_that_were_started_by_mistake_displace_nothing(train, texts, monkeypatch):
    for max_iters in (2, 3):  # so that there are .old files too
        train(f"-max_iters={max_iters}")
    before = read_folder(texts)
    interrupt_in(monkeypatch, 4)
    for seed in (1, 2):
        assert "nothing was saved" in train(*ENDLESS, f"-seed={seed}", status=130).stdout
        assert read_folder(texts) == before
    monkeypatch.setattr(training, "SOON", 0)  # as if it had gone on for more than a minute
    assert "nothing was saved" not in train(*ENDLESS, status=130).stdout
    after = read_folder(texts)
    for name in THREE:
        assert after[name.replace("01", "01.old")] == before[name] != after[name]


@posix
def test_links_stay_and_their_targets_are_replaced(train, texts):
    (disk := texts / "disk").mkdir()
    for name in THREE:
        (texts / name).symlink_to(disk / name)
    for max_iters in (1, 2):  # with nothing at the targets, and with an earlier run's files
        train(f"-max_iters={max_iters}", "-eval_interval=1")
        assert all((texts / name).is_symlink() for name in THREE)
        assert len(metrics(disk)) == last_step(disk) == max_iters
    assert last_step(disk, "model-01.old") == 1 and load_model(disk / "model-01.pkl")


# One run at a time, on any disk ------------------------------------------------------------------


def test_a_second_run_of_a_model_is_told_so_and_a_killed_one_blocks_nothing(
    texts, start_script, run_script
):
    first = start_script("training.py", *TINY, *ENDLESS, "-eval_interval=50", cwd=texts)
    wait_until_shown(first, "step 50:", "stdout")
    for flags in ([*TINY, "-max_iters=2"], ["-resume", "-device=cpu"]):
        done = run_script("training.py", *flags)
        assert_fails(done, "model-01.pkl: another run is at work on it; wait for its end$")
    assert run_script("training.py", *TINY, "-max_iters=2", "-model=b.pkl").returncode == 0
    wait_until_shown(first, "step 150:", "stdout")  # nothing has stopped it
    first.kill()
    first.wait()
    put(texts, {f"{name}.tmp": b"what a kill may leave" for name in THREE})
    done = run_script("training.py", "-resume", "-device=cpu", "-max_iters=1000001", "-patience=1")
    assert done.returncode == 0 and "resumed     after step" in done.stdout, done.stderr
    assert not list(texts.glob("*.tmp"))


def test_the_times_of_files_mean_nothing(train, texts, monkeypatch):
    """They change by `touch`, by a backup, and on disks that settle them after a save."""
    in_step(monkeypatch, 4, lambda: os.utime(texts / THREE[1], (1, 1)))
    train("-max_iters=6", "-eval_interval=2")
    assert last_step(texts) == 6 and not list(texts.glob("*.old*"))


def hold(monkeypatch, name: str, tries: int) -> list[float]:
    """Let so many renames onto a file fail, as while another program has it open on Windows.

    Returns the list of the waits between.
    """
    rename, waits = os.replace, []

    def refuse(source, target):
        if Path(target).name == name and len(waits) < tries:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        rename(source, target)

    clock = iter(range(10**9))
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(gpt, "time", Mock(sleep=waits.append, monotonic=lambda: next(clock) / 10))
    return waits


@pytest.mark.parametrize("name", THREE)
def test_a_file_that_is_open_elsewhere_for_a_moment_costs_nothing(train, texts, monkeypatch, name):
    waits = hold(monkeypatch, name, tries=25)
    done = train("-max_iters=2")
    assert (
        len(waits) == 25 and done.stderr == "" and last_step(texts) == 2 == len(metrics(texts)) + 1
    )


@pytest.mark.parametrize("name", [*THREE, "loss.png"])
def test_a_file_that_stays_open_ends_a_run_only_if_it_holds_the_work(
    train, texts, monkeypatch, name
):
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    hold(monkeypatch, name, tries=10**6)
    question = f"{name}: .*; does another program have it open[?]"
    if name in THREE[:2]:
        assert_fails(train("-max_iters=4", "-plot=loss.png", status=1), f"{question}$")
    else:
        done = train("-max_iters=4", "-eval_interval=2", "-plot=loss.png")
        assert len(re.findall(f"not written: {question}; the run goes on", done.stderr)) == 2
        assert last_step(texts) == 4
    assert not list(texts.glob("*.tmp"))


@pytest.mark.skipif(os.name != "nt", reason="elsewhere an open file can be replaced")
def test_open_files_are_waited_for_on_windows(train, texts):
    train("-max_iters=2")
    for name in THREE:
        file = open(texts / name, "rb")  # noqa: SIM115
        Timer(1, file.close).start()
    train("-max_iters=4")
    assert last_step(texts) == 4 and last_step(texts, "model-01.old") == 2


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EINVAL, 0), (errno.ENOTSUP, 0), (errno.EIO, 1)]
)
def test_a_disk_without_fsync_is_enough_but_a_bad_one_is_named(train, monkeypatch, number, status):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, os.strerror(number))))
    done = train("-max_iters=2", status=status)
    if status:
        assert_fails(done, f"model-01.pkl: {os.strerror(number)}")


def test_a_model_may_lie_in_a_folder_that_is_not_there_yet(train, texts):
    train("-max_iters=2", "-model=new/folder/m.pkl")
    assert load_model(texts / "new/folder/m.pkl")
    put(texts, {"file": b""})
    assert_fails(train("-max_iters=2", "-model=file/m.pkl", status=1), "file/m.pkl: ")


@pytest.mark.parametrize("name", ["model-01.old.pkl", "model-01.old.state.pkl"])
def test_a_run_never_displaces_the_file_that_it_starts_from(train, texts, name):
    for _ in range(2):
        train("-max_iters=2")
    before = read_folder(texts)
    done = train("-max_iters=2", f"-init_from={name}", status=2)
    assert_fails(done, f"-init_from: .* would displace {name}; name another -model", status=2)
    assert read_folder(texts) == before
    train("-max_iters=2", f"-init_from={name}", "-model=b.pkl")


# The end of a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, None])
def test_a_signal_at_the_end_ends_the_run_without_the_last_evaluation(
    train, texts, monkeypatch, step
):
    """That is in the last step, and in the evaluation of the whole validation text."""
    handlers, found = [*map(signal.getsignal, STOPS)], []

    def interrupted_end(run):
        found.extend(map(signal.getsignal, STOPS))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "describe_end", interrupted_end)
    if step:
        interrupt_in(monkeypatch, step)
    done = train("-max_iters=2", status=130)
    assert "best model" not in done.stdout and done.stderr == "" and last_step(texts) == 2
    assert found == ([] if step else handlers)


def test_the_last_evaluation_is_as_long_as_the_run_was_and_no_shorter_than_another(train, texts):
    write_texts(texts, val="the mat sat on the cat\n" * 2000)
    first = r"over the first {:,} characters of the validation text"
    flags = ["-learning_rate=0", "-min_lr=0", "-eval_interval=10", "-patience=2"]
    for steps, rows in ((5, 8), (300, 120)):  # an evaluation has 2 batches of 4 rows
        assert first.format(rows * 8) in train(f"-max_iters={steps}", "-eval_interval=300").stdout
    done = train(*flags, "-max_iters=1000000")  # which ends after 30 steps
    assert first.format(12 * 8) in done.stdout


# Streams, cards and reasons -----------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["stdin", "stdout", "stderr"])
def test_a_run_without_a_standard_stream_is_as_good(train, texts, missing):
    train("-max_iters=2", **{missing: None})
    assert last_step(texts) == 2


def test_each_process_touches_its_own_card_only_and_a_state_names_no_number(monkeypatch, texts):
    touched = []
    zeros = torch.zeros
    monkeypatch.setattr(training, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: touched.append(card))
    monkeypatch.setattr(torch, "zeros", lambda *a, **b: touched.append(b["device"]) or zeros(*a))
    monkeypatch.setattr(training, "run_training", lambda *_: 0)
    monkeypatch.setattr("sys.argv", ["training.py", "-device=cuda"])
    assert training.main() == 0 and touched == [1, "cuda"]
    monkeypatch.setattr(training, "device", lambda name: torch.device("cuda:1"))
    settings = settings_with([*TINY[:-1], "-dtype=float16", f"-data_dir={texts}"])
    assert settings.flags["device"] == "cuda" and str(settings.device) == "cuda:1"


def test_processes_share_gradients_and_send_no_masks(monkeypatch, texts):
    monkeypatch.setattr(training, "WORLD_SIZE", 2)
    monkeypatch.setattr(training, "DistributedDataParallel", Mock())
    run = new_run(tiny_settings(f"-data_dir={texts}"))
    assert training.prepare_forward(run).broadcast_buffers is False


def test_a_state_of_float16_from_before_the_first_good_step_can_be_resumed(
    train, texts, monkeypatch
):
    monkeypatch.setattr(training, "SOON", 0)
    with monkeypatch.context() as patch:
        interrupt_in(patch, 1)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
        train("-dtype=float16", "-max_iters=4", status=130)
    assert state_of(texts)["training"]["optimizer"]["parts"] == [[]]
    assert "after step 1 of 4" in train("-resume").stdout


def test_a_state_is_read_once(train, texts, monkeypatch):
    train("-max_iters=2")
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    train("-resume", "-max_iters=3")
    assert read.count("model-01.state.pkl") == 1


def test_a_state_that_is_damaged_says_what_would_help(train, texts):
    train("-max_iters=2")
    path = texts / "model-01.state.pkl"
    path.write_bytes(path.read_bytes()[:-100])
    advice = "-init_from model-01.pkl starts a new run from the best model"
    assert_fails(train("-resume", status=1), f"state.pkl: not a model file .*; .*{advice}")
    train("-max_iters=2", "-init_from=model-01.pkl")


# Terminals, logs and signals ----------------------------------------------------------------------


@signals
def test_a_closed_terminal_saves_the_run(texts, run_main, monkeypatch):
    """Whatever the run prints from then on can't be written, and nobody sees how it ends."""
    monkeypatch.setattr(training, "SOON", 0)
    master, slave = os.openpty()

    def hang_up() -> None:
        os.close(master)
        signal.raise_signal(signal.SIGHUP)

    in_step(monkeypatch, 3, hang_up)
    terminal = io.TextIOWrapper(os.fdopen(slave, "wb", buffering=0), write_through=True)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run_main("training.py", *TINY, *ENDLESS, stdout=terminal, stderr=terminal)
    assert last_step(texts) == 3


@signals
def test_a_run_that_nohup_has_started_goes_on_when_the_terminal_is_closed(train, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    interrupt_in(monkeypatch, 1, signal.SIGHUP)
    assert "best model, of step 2" in train("-max_iters=2").stdout


@signals
def test_a_second_interrupt_ends_at_once(texts, start_script):
    # A step takes long, though no operation in it does: two signals in one would come as one.
    shape = ["-n_embd=64", "-n_head=1", "-n_layer=100", "-block_size=64", "-batch_size=128"]
    run = start_script("training.py", *shape, "-device=cpu", cwd=texts)
    wait_until_shown(run, "learning rate", "stdout")  # the last line before the first step
    for _ in range(2):
        time.sleep(0.3)  # more than a busy machine lets a process wait
        run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=5)
    assert run.returncode == -signal.SIGINT and "Traceback" not in errors  # which a shell calls 130
    assert not (texts / "model-01.state.pkl").exists()


@pytest.mark.parametrize(
    ("kills", "steps"), [(1, 100), pytest.param(20, 4000, marks=pytest.mark.soak)]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    tmp_path, start_script, run_main, short_samples, kills, steps
):
    # Most of the time is saving.
    command = ["training.py", *TINY, f"-max_iters={steps}", "-eval_interval=4", "-resume"]
    disturbed, undisturbed = (write_texts(tmp_path / name) for name in ("disturbed", "undisturbed"))
    chance = random.Random(kills)
    for _ in range(kills):
        run = start_script(*command, cwd=disturbed)
        wait_until_shown(run, ": train loss", "stdout")
        time.sleep(chance.uniform(0, 0.5))
        run.kill()
        run.wait()
    done = run_main(*command, cwd=disturbed)
    assert done.returncode == run_main(*command, cwd=undisturbed).returncode == 0
    assert 4 * kills <= int(re.search(r"after step (\d+) of", done.stdout)[1]) < steps
    assert_same(everything_after(disturbed), everything_after(undisturbed))
    assert read_folder(disturbed).keys() == read_folder(undisturbed).keys()  # no litter


@pytest.mark.parametrize("reason", [errno.EPIPE, errno.ENOSPC], ids=errno.errorcode.get)
def test_output_that_can_not_be_written_ends_a_run_that_has_saved_its_state(
    train, texts, monkeypatch, reason
):
    """As in `training.py | head`, or with a log on a disk that is full."""
    log = Output()
    in_step(monkeypatch, 7, lambda: setattr(log, "error", reason))
    done = train("-max_iters=30", "-eval_interval=5", status=1, stdout=log)
    assert_fails(done, f"standard output: {os.strerror(reason)}")
    assert last_step(texts) == 10 and [row["step"] for row in metrics(texts)] == ["5", "10"]


class Notebook(io.StringIO):
    """A stream as in IDLE and Jupyter: text without an encoding to change, a file or a buffer."""

    encoding = errors = buffer = property(lambda self: None)


def test_it_runs_with_the_streams_of_a_notebook_and_without_an_output(train):
    output = Notebook()
    train("-max_iters=2", stdout=output, stderr=Notebook(), stdin=Notebook())
    assert "best model" in output.getvalue()
    train("-max_iters=2", stdout=None, stdin=None)


@posix
def test_on_a_terminal_there_is_a_bar_and_no_control_character_of_the_model(
    texts, train, monkeypatch
):
    import fcntl
    import termios

    write_texts(texts, "\x1b]52;c;\x07\x9b" * 200)
    master, slave = os.openpty()
    size = np.array([24, 80, 0, 0], dtype=np.uint16)  # lines, columns, and both in pixels
    fcntl.ioctl(slave, termios.TIOCSWINSZ, size.tobytes())
    in_step(monkeypatch, 2, lambda: time.sleep(0.2))  # a bar is drawn ten times a second
    with open(slave, "w", encoding="utf-8") as terminal:
        train("-max_iters=4", "-model=a\x1bb.pkl", stdout=terminal, stderr=terminal)
        shown = os.read(master, 10_000).decode().replace("\x1b[A", "")  # tqdm goes up a line
    assert re.search(r"loss \d\.\d+: +\d+%", shown) and "tok/s" in shown
    assert r"saved a\x1bb.pkl" in shown
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown)


FORESEEN = [
    (MemoryError(), "not enough memory; try a smaller -batch_size"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "not enough memory; try a smaller"),
    (OSError(errno.ENOSPC, "No space left", "model-01.pkl"), "model-01.pkl: No space left"),
]


@pytest.mark.parametrize(("error", "message"), FORESEEN, ids=str)
def test_an_error_that_can_be_foreseen_is_a_sentence(train, monkeypatch, error, message):
    in_step(monkeypatch, 1, Mock(side_effect=error))
    assert_fails(train("-max_iters=1", status=1), message)


def test_an_error_that_nobody_foresaw_keeps_its_traceback(train, monkeypatch):
    in_step(monkeypatch, 1, Mock(side_effect=RuntimeError("an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal"):
        train("-max_iters=1")
