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
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from unittest.mock import Mock, call

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
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map_only

import training
from model import GPTLanguageModel, Vocabulary, load_model, read_model_file, save_model

MIXED = "Plain text, Привет мир, γειά, 中文字符, नमस्ते, שלום, “quoted” – é🙂🚀\n"
FAST = ["-learning_rate=0.01", "-min_lr=0.01", "-warmup_iters=9"]
ENDLESS = ["-max_iters=1000000", "-eval_interval=1000000"]
THREE = ("model-01.pkl", "model-01.state.pkl", "model-01.metrics.csv")

drawing = pytest.mark.skipif(find_spec("matplotlib") is None, reason="draws with matplotlib")


def tiny_settings(*flags) -> training.Namespace:
    return settings_with([*TINY, "-dropout=0", *flags])


def open_text(folder: Path, block_size: int) -> training.Text:
    return training.Text(
        folder / "output_train.txt", Vocabulary.from_file(folder / "vocab.txt"), block_size
    )


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
    return read_model_file((folder / f"{name}.state.pkl").read_bytes())["training"]


def last_step(folder: Path, name: str = "model-01") -> int:
    return state_of(folder, name)["record"]["step"]


def losses(folder: Path, name: str = "model-01") -> list[float]:
    return [
        float(row[column]) for row in metrics(folder, name) for column in ("train_loss", "val_loss")
    ]


def evaluations(output: str) -> list[tuple[int, float, bool]]:
    """Return the step, the validation loss, and whether the model was saved, of each."""
    found = re.findall(r"(?m)^step (\d+): train loss [\d.]+, val loss ([\d.]+)(, saved)?", output)
    return [(int(step), float(loss), bool(saved)) for step, loss, saved in found]


def in_step(monkeypatch, number: int, action, *arguments) -> None:
    """Call `action` in the middle of the step with this number."""
    get_batch = training.get_batch

    def get_batch_and_act(text, step, *more):
        if step + 1 == number:
            action(*arguments)
        return get_batch(text, step, *more)

    monkeypatch.setattr(training, "get_batch", get_batch_and_act)


# Rows of text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_every_row_is_drawn_and_begins_with_a_whole_character(tmp_path, block_size):
    content = shuffled_text(4)
    text, data = open_text(write_texts(tmp_path, content), block_size), content.encode()
    for place in range(len(data) - 4 * (block_size + 1)):
        rest = data[place:].decode(errors="ignore")  # without the end of a character begun before
        assert text.row(place) == rest[: block_size + 1]
    rows = {content[i : i + block_size + 1] for i in range(len(content) - block_size)}
    assert set(text.draw(20_000, [1337, 5, 0])) == rows  # the first and the last, too


def test_targets_are_the_characters_after_the_inputs(texts):
    vocabulary, content = Vocabulary.from_file(texts / "vocab.txt"), read_folder(texts)
    x, y = training.get_batch(open_text(texts, 8), 2, tiny_settings("-batch_size=16"))
    assert x.shape == y.shape == (16, 8) and x.dtype == torch.int64 and x[:, 1:].equal(y[:, :-1])
    for row in torch.cat([x, y[:, -1:]], dim=1).tolist():
        assert vocabulary.decode(row).encode() in content["output_train.txt"]


def test_an_unknown_character_is_read_as_u_fffd_where_the_vocabulary_has_that(tmp_path):
    text = open_text(write_texts(tmp_path, "ééé∞é" * 4, vocabulary="é\ufffd"), 8)
    assert text.encode(["é∞\0", "🙂é\n"]).tolist() == [[1, 2, 2], [2, 1, 0]]


@pytest.mark.parametrize(
    "bad",
    [b"\xff", b"\x80" * 5, b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"],
)
@pytest.mark.parametrize("place", [0, 20, 40])
def test_text_that_is_not_utf_8_is_named_with_its_place(tmp_path, bad, place):
    put(
        write_texts(tmp_path, "abc"), {"output_train.txt": b"a" * place + bad + b"a" * (40 - place)}
    )
    places = "|".join(map(str, range(place, place + len(bad))))
    with pytest.raises(
        training.TrainingError, match=f"output_train.txt: not UTF-8 text at byte ({places})$"
    ):
        list(open_text(tmp_path, 8).from_the_start())


# Learning -----------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_its_end_at_the_last_step():
    settings = tiny_settings(
        "-learning_rate=1", "-min_lr=0.1", "-warmup_iters=10", "-max_iters=111"
    )
    rates = [training.learning_rate_at(step, settings) for step in (0, 4, 9, 10, 35, 60, 85, 110)]
    quarter = 0.45 * math.cos(math.pi / 4)
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55 + quarter, 0.55, 0.55 - quarter, 0.1])


@pytest.mark.parametrize(
    ("name", "value", "flags"),
    [  # of a text of 4,600 bytes
        ("learning_rate", 0.003, ["-n_embd=64"]),
        ("learning_rate", 0.003, ["-batch_size=512"]),
        ("learning_rate", 0.001 * math.sqrt(32 * 128 / 768), ["-max_iters=9"]),
        ("learning_rate", 0.001 * math.sqrt(8 * 128 / 768), ["-batch_size=8"]),
        ("learning_rate", 0.02, ["-optimizer=muon"]),
        ("learning_rate", 0.01, ["-optimizer=muon", "-max_iters=4800"]),
        ("min_lr", 0.15, ["-learning_rate=0.5"]),
        ("min_lr", 0.05, ["-learning_rate=0.5", "-optimizer=muon"]),
        ("warmup_iters", 20, ["-max_iters=60"]),
        ("warmup_iters", 150, ["-max_iters=9000"]),
        ("dropout", 0, [*TINY, f"-max_iters={10 * 4600 // 32}"]),  # ten passes
        ("dropout", 0.1, [*TINY, f"-max_iters={175 * 460 // 32}"]),
        ("dropout", 0.2, [*TINY, f"-max_iters={100 * 4600 // 32}"]),
    ],
)
def test_what_is_not_given_follows_from_the_other_flags(texts, name, value, flags):
    settings = settings_with([*flags, f"-data_dir={texts}"])
    assert getattr(settings, name) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("flag", ["-optimizer=adamw", "-optimizer=muon"])
def test_only_matrices_are_decayed(flag):
    model = GPTLanguageModel(7, n_embd=8, n_head=2, n_layer=1, block_size=4)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    training.Optimizer(model, tiny_settings("-weight_decay=0.3", flag)).step(0.01, grad_clip=1.0)
    for name, parameter in model.named_parameters():
        assert (parameter < 1).all() == (parameter.dim() == 2), name


def test_muon_equals_torchs_on_the_joined_heads_of_a_layer(monkeypatch):
    monkeypatch.setattr(training, "POLYNOMIALS", ((3.4445, -4.7750, 2.0315),) * 5)  # torch's
    model = GPTLanguageModel(7, n_embd=16, n_head=2, n_layer=2, block_size=4)
    matrices = [
        [head.value.weight for head in model.blocks[1].sa.heads],
        [model.blocks[0].sa.proj.weight],
        [model.blocks[1].ffwd.net[0].weight],
        [model.blocks[0].ffwd.net[2].weight],
    ]
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
    found = [torch.cat(parts) for parts in matrices]  # which have moved by up to 3e-2
    torch.testing.assert_close(found, joined, atol=2e-3, rtol=0)  # torch itself works in bfloat16


def test_the_kept_model_is_as_good_as_the_weights_early_in_a_long_run(train, texts, monkeypatch):
    flags = [*FAST, "-dropout=0", "-eval_interval=60"]
    train(*flags, "-max_iters=60")
    short = losses(texts)
    assert short[1] < 2.25  # from ln(11) = 2.4, of which weights of the beginning would have all
    in_step(monkeypatch, 60, signal.raise_signal, signal.SIGINT)
    train(*flags, "-max_iters=1000000", status=130)
    assert losses(texts) == short


# Many processes -----------------------------------------------------------------------------------


@signals
@pytest.mark.skipif(shutil.which("pkill") is None, reason="sends a signal with pkill")
def test_two_processes_learn_as_one_end_after_the_same_step_and_go_on_as_one(
    train, texts, start_script, monkeypatch
):
    flags = [
        *(*FAST, "-dropout=0", "-dtype=float32", "-optimizer=muon", "-batch_size=8"),
        *(*ENDLESS, "-eval_interval=5"),
    ]
    run = start_script("training.py", *TINY, *flags, processes=2)
    wait_until_shown(run, "2 x cpu", "stdout")
    wait_until_shown(run, "step 25: ", "stdout")
    subprocess.run(["pkill", "-TERM", "-n", "-P", str(run.pid)], check=True)  # one of them
    output, errors = run.communicate(timeout=60)
    (step,) = re.findall(r"interrupted after step (\d+) ", output)  # only the first process says it
    assert run.returncode != 0 and last_step(texts) == int(step)
    assert not re.search("training.py: |deprecated|broadcast_buffers", errors), errors
    in_step(monkeypatch, 25, signal.raise_signal, signal.SIGINT)
    train(*flags, "-model=one.pkl", status=130)
    assert losses(texts)[:10] == pytest.approx(losses(texts, "one"), abs=1e-4)
    in_step(monkeypatch, int(step) + 1, signal.raise_signal, signal.SIGINT)
    assert f"after step {step} of 1000000" in train("-resume", status=130).stdout


# A run --------------------------------------------------------------------------------------------


def test_a_run_reports_what_it_does_and_keeps_the_best_model(train, texts):
    flags = ["-batch_size=64", "-dtype=float32", "-learning_rate=0.5", "-min_lr=0.1"]
    done = train(*flags, "-max_iters=25", "-eval_interval=10")
    assert re.search(
        "(?s)cpu.* parameters, 11 characters.*0.00 MB to validate.*512 tokens", done.stdout
    )
    assert done.stderr == ""  # a log file gets no bar
    assert len(re.findall(r"^step.*\n    \S", done.stdout, re.MULTILINE)) == 3  # samples
    _, found, saved = zip(*evaluations(done.stdout))
    assert list(saved) == [loss == min(found[: i + 1]) for i, loss in enumerate(found)]
    rows = metrics(texts)
    assert list(rows[0]) == ["step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds"]
    assert [row["step"] for row in rows] == ["10", "20", "25"] and rows[-1]["tokens"] == "12800"
    assert losses(texts)[1::2] == pytest.approx(found, abs=6e-5)  # which has four decimals
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0.1)


def test_at_the_end_the_whole_of_a_short_validation_text_counts(train, texts):
    val = shuffled_text(10)[:460]  # which are 58 rows, as many as a tenth of 145 steps of 4 rows
    write_texts(texts, val=val)
    output = train("-max_iters=150", "-dtype=float32", "-dropout=0.5", "-eval_interval=150").stdout
    pattern = r"([\d.]+) nats = ([\d.]+) bits per character\nover the whole val"
    nats, bits = map(float, re.search(pattern, output).groups())
    model, vocabulary = load_model(texts / "model-01.pkl")
    ids = torch.tensor([vocabulary.encode(val)])
    logits = torch.cat([model(row)[0] for row in ids[:, :-1].split(8, dim=1)], dim=1)
    assert nats == pytest.approx(cross_entropy(logits[0], ids[0, 1:]).item(), abs=1e-4)
    assert bits == pytest.approx(nats / math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        (["-max_iters=5"], 8),  # as an evaluation has: 2 batches of 4 rows
        (["-max_iters=50"], 20),
        (["-max_iters=300"], 120),
        (["-max_iters=1000000", "-eval_interval=10", "-patience=2"], 12),  # which are 30 steps
    ],
)
def test_of_a_long_one_as_much_as_a_tenth_of_the_run_and_no_less_than_in_another_evaluation(
    train, texts, flags, rows
):
    write_texts(texts, val="the mat sat on the cat\n" * 2000)
    output = train("-learning_rate=0", "-min_lr=0", "-eval_interval=300", *flags).stdout
    assert f"over the first {rows * 8:,} characters of the validation text" in output


def test_evaluations_see_the_same_rows_whatever_may_change(train, texts):
    write_texts(texts, shuffled_text(9))
    flags = ["-eval_interval=5", "-learning_rate=0", "-min_lr=0", "-dtype=float32"]
    output = train(*flags, "-max_iters=10").stdout + train("-resume", "-max_iters=200").stdout
    assert len({loss for _, loss, _ in evaluations(output)}) == 1  # nothing was learnt in between


@drawing
@pytest.mark.parametrize(
    ("name", "start"), [("loss.png", b"\x89PNG"), ("loss.svg", b"<?xml"), ("loss.pdf", b"%PDF")]
)
def test_a_plot_is_drawn(train, texts, name, start):
    train("-max_iters=4", "-eval_interval=2", f"-plot={name}")
    assert (texts / name).read_bytes().startswith(start)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_learns_in_every_precision_and_saves_float32_weights(train, texts, dtype):
    output = train(*FAST, "-max_iters=150", "-eval_interval=150", f"-dtype={dtype}").stdout
    ((_, loss, _),) = evaluations(output)
    assert dtype in output and loss < 1.0  # from ln(11) = 2.4
    assert load_model(texts / "model-01.pkl")[0].lm_head.weight.dtype == torch.float32
    assert "float16" in train("-resume", "-max_iters=151", "-dtype=float16").stdout  # may change


def test_the_seed_decides_everything(train, texts):
    for name, seed in (("first", 1), ("same", 1), ("other", 2)):
        train("-max_iters=5", f"-seed={seed}", f"-model={name}.pkl")
    files = read_folder(texts)
    assert files["first.pkl"] == files["same.pkl"] != files["other.pkl"]


def test_patience_stops_a_run_which_says_so_and_can_be_resumed(train, texts):
    write_texts(texts, val=shuffled_text(10))  # of which nothing is learnt
    output = train(*FAST, "-eval_interval=5", "-max_iters=120", "-patience=7").stdout
    steps, found, _ = zip(*evaluations(output))
    assert len(found) == found.index(min(found)) + 1 + 7 and steps[-1] < 120
    assert f"stopped after step {steps[-1]}: no better model in 7 evaluations" in output
    output = train("-resume").stdout
    assert "no better model in 7 evaluations" in output and not evaluations(output)
    assert len(evaluations(train("-resume", "-patience=9").stdout)) >= 2
    assert evaluations(train("-resume", "-patience=0").stdout)[-1][0] == 120  # 0 means: never stop


@pytest.mark.parametrize("flag", ["-learning_rate=2e9", "-weight_decay=2e9"])
def test_a_loss_that_is_no_number_ends_the_run_with_what_to_do(train, texts, flag):
    assert_fails(
        train("-max_iters=20", "-eval_interval=6", flag, "-warmup_iters=0", status=1),
        r"the loss is (nan|inf) after step [1-6]; .* -learning_rate",
    )


def test_a_loss_that_is_no_number_later_leaves_the_last_good_model(train, texts, monkeypatch):
    monkeypatch.setattr(training, "learning_rate_at", lambda step, _: 0.01 if step < 3 else 1e30)
    assert_fails(
        train("-max_iters=20", "-eval_interval=3", status=1),
        r"the loss is (nan|inf) after step [456]",
    )
    assert last_step(texts) == 3 and load_model(texts / "model-01.pkl")


@pytest.mark.parametrize(
    "shape", [[], ["-n_embd=12", "-n_head=3", "-n_layer=2", "-block_size=9"]], ids=len
)
def test_fine_tuning_takes_over_shape_and_weights_and_grows_the_vocabulary(texts, shape):
    old = GPTLanguageModel(3, n_embd=12, n_head=3, n_layer=2, block_size=9)
    save_model(write_texts(texts, "dcaé" * 20) / "old.pkl", old, Vocabulary("abc"))
    run = new_run(*settle([f"-data_dir={texts}", f"-init_from={texts / 'old.pkl'}", *shape]))
    assert run.vocabulary.characters == "\nabcdé"
    assert {**run.model.config, "dropout": 0.2} == {**old.config, "vocab_size": 6}
    for (name, weight), old_weight in zip(run.model.named_parameters(), old.parameters()):
        known = weight[1:4] if len(weight) == 6 else weight  # of the characters "abc"
        assert known.equal(old_weight), name


# Interrupting and going on ------------------------------------------------------------------------


def everything_after(folder: Path) -> tuple:
    """Return all that a run leaves, less the seconds; of tensors the shape and a hash."""
    model, state = (read_model_file((folder / name).read_bytes()) for name in THREE[:2])
    state["training"]["record"].update(seconds=0.0, metrics=[])
    rows = [(row["step"], row["train_loss"], row["val_loss"]) for row in metrics(folder)]
    return tree_map_only(
        torch.Tensor,
        lambda tensor: (tensor.shape, hash(tensor.numpy().tobytes())),
        (model, state, rows),
    )


@pytest.mark.parametrize("more", [[], ["-optimizer=muon"], ["-dtype=bfloat16"]], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_bits(train, texts, monkeypatch, more):
    flags = ["-max_iters=50", "-eval_interval=10", "-dropout=0.2", *more]
    train(*flags)
    undisturbed = everything_after(texts)
    monkeypatch.setattr(training, "SOON", 0)
    # Before anything is saved, between evaluations, and at one; late enough for an average.
    for step, number in zip((1, 33, 40), STOPS):
        with monkeypatch.context() as patch:
            in_step(patch, step, signal.raise_signal, number)
            output = train(*flags, status=128 + number).stdout
        assert f"interrupted after step {step} " in output and "-resume" in output
        load_model(texts / "model-01.pkl")  # can be talked to, also before the first evaluation
        assert f"after step {step} of 50" in train("-resume").stdout
        assert everything_after(texts) == undisturbed


@pytest.mark.parametrize("more", ["-init_from=run.pkl", "-optimizer=muon", "-min_lr=0"])
def test_the_same_command_with_resume_starts_a_run_and_goes_on_with_it(
    train, texts, finished_run, monkeypatch, more
):
    put(texts, finished_run)
    monkeypatch.setattr(training, "SOON", 0)
    in_step(monkeypatch, 3, signal.raise_signal, signal.SIGINT)
    command = [*TINY, "-max_iters=5", more, "-resume"]
    assert "there is no run to go on with, so a new" in train(*command, status=130).stderr
    done = train(*command)
    assert "after step 3 of 5" in done.stdout and not done.stderr


def test_a_resumed_run_may_become_longer_and_reads_its_state_once(train, texts, monkeypatch):
    train("-max_iters=10", "-eval_interval=5")
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    train("-resume", "-max_iters=20")
    assert read.count("model-01.state.pkl") == 1
    rows = metrics(texts)
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    assert float(rows[2]["learning_rate"]) == pytest.approx(
        training.learning_rate_at(14, tiny_settings("-max_iters=20"))
    )
    assert "after step 20 of 20" in train("-resume").stdout  # which is at its end and only reports


RESUME = ["-resume", "-model=run.pkl", "-max_iters=3"]
FIXED = {
    **dict(batch_size=8, block_size=9, learning_rate=0.5, min_lr=0, warmup_iters=0, seed=2),
    **dict(optimizer="muon", dropout=0.5, n_layer=2, eval_interval=9, weight_decay=0),
    "init_from": "run.pkl",
}


@pytest.mark.parametrize(
    ("flags", "name", "value", "message"),
    [
        *((RESUME, *flag, ".* contradicts run.state.pkl") for flag in FIXED.items()),
        (RESUME, "max_iters", 1, "run.state.pkl has 2, which may only grow"),
        (["-init_from=run.pkl"], "n_embd", 32, "32 contradicts run.pkl"),
        (["-init_from=run.pkl"], "n_head", 4, "4 contradicts run.pkl"),
        (["-init_from=run.pkl"], "n_layer", 2, "2 contradicts run.pkl"),
        (["-init_from=run.pkl"], "block_size", 9, "9 contradicts run.pkl"),
        *(
            (["-model=run.pkl"], "init_from", file, f".* displace {file}; name another -model")
            for file in ("run.old.pkl", "run.old.state.pkl")
        ),
    ],
)
def test_a_flag_that_contradicts_the_files_that_are_there_is_refused(
    train, texts, finished_run, flags, name, value, message
):
    kept = {file.replace("run", "run.old"): content for file, content in finished_run.items()}
    before = read_folder(put(texts, {**finished_run, **kept}))
    assert_fails(
        train(*flags, f"-{name}={value}", status=2), f"argument -{name}: {message}", status=2
    )
    assert read_folder(texts) == before


@pytest.mark.parametrize(
    ("name", "first", "last", "message"),
    [
        *(
            (name, place, place + 1, "the texts are not those")
            for name in ("output_train.txt", "output_val.txt")
            for place in (0, 200, 459)
        ),
        (
            "run.state.pkl",
            -100,
            -1,
            "state.pkl: not a model file .*; .* -init_from run.pkl starts a new run from the best",
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_texts_or_a_damaged_state_but_its_model_helps(
    train, texts, finished_run, name, first, last, message
):
    content = finished_run[name]
    put(texts, {**finished_run, name: content[:first] + b" " + content[last:]})
    assert_fails(train(*RESUME, status=1), message)
    train("-max_iters=2", "-init_from=run.pkl")


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
    content = read_model_file(finished_run["run.state.pkl"])
    DAMAGES[damage](content["training"])
    torch.save(content, put(texts, finished_run) / "run.state.pkl")
    done = train(*RESUME, status=int(damage != "a missing device"))
    if done.returncode:
        assert_fails(done, "run.state.pkl: (does not hold a run|is not a state of this) ")


# One run never destroys another -------------------------------------------------------------------


def test_runs_that_were_started_by_mistake_displace_nothing(train, texts, monkeypatch):
    for max_iters in (2, 3):  # so that there are .old files too
        train(f"-max_iters={max_iters}")
    before = read_folder(texts)
    in_step(monkeypatch, 4, signal.raise_signal, signal.SIGINT)
    for seed in (1, 2):
        assert "nothing was saved" in train(*ENDLESS, f"-seed={seed}", status=130).stdout
        assert read_folder(texts) == before
    monkeypatch.setattr(training, "SOON", 0)  # as if it had gone on for more than a minute
    assert "nothing was saved" not in train(*ENDLESS, status=130).stdout
    after = read_folder(texts)
    for name in THREE:
        assert after[name.replace("01", "01.old")] == before[name] != after[name]
    for name in ("model-01.old.pkl", "model-01.old.state.pkl"):  # which model-01.pkl would displace
        train("-max_iters=2", f"-init_from={name}", "-model=b.pkl")


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
    train, texts, start_script
):
    first = start_script("training.py", *TINY, *ENDLESS, "-eval_interval=50", cwd=texts)
    wait_until_shown(first, "step 50:", "stdout")
    for flag in ("-max_iters=2", "-resume"):
        assert_fails(
            train(flag, status=1),
            "model-01.pkl: another run is at work on it; wait for its end$",
        )
    train("-max_iters=2", "-model=b.pkl")
    wait_until_shown(first, "step 150:", "stdout")  # nothing has stopped it
    first.kill()
    first.wait()
    put(texts, {f"{name}.tmp": b"what a kill may leave" for name in THREE})
    assert "resumed     after step" in train("-resume", "-max_iters=1000001", "-patience=1").stdout
    assert not list(texts.glob("*.tmp"))


def test_the_times_of_files_mean_nothing(train, texts, monkeypatch):
    # They change by `touch`, by a backup, and on disks that settle them after a save.
    in_step(monkeypatch, 4, os.utime, texts / THREE[1], (1, 1))
    train("-max_iters=6", "-eval_interval=2")
    assert last_step(texts) == 6 and not list(texts.glob("*.old*"))


OPEN = "NAME: .*; does another program have it open[?]"
NOTICES = f"not written: {OPEN}; the run goes on\n" * 2


@pytest.mark.parametrize(
    ("name", "tries", "status", "shown", "flags"),
    [
        *((name, 25, 0, "", []) for name in THREE),  # for a moment
        *((name, 10**6, 1, f"training.py: {OPEN}\n", []) for name in THREE[:2]),
        (THREE[2], 10**6, 0, NOTICES, []),
        pytest.param("loss.png", 10**6, 0, NOTICES, ["-plot=loss.png"], marks=drawing),
    ],
)
def test_a_file_that_is_open_elsewhere_ends_a_run_only_if_it_stays_so_and_holds_the_work(
    train, texts, monkeypatch, name, tries, status, shown, flags
):
    rename, waits = os.replace, []

    def refuse(source, target):  # as on Windows
        if Path(target).name == name and len(waits) < tries:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr("model.time", Mock(sleep=waits.append, monotonic=lambda: len(waits) / 10))
    done = train("-max_iters=4", "-eval_interval=2", *flags, status=status)
    assert re.fullmatch(shown.replace("NAME", name), done.stderr) and len(waits) >= 25
    assert not list(texts.glob("*.tmp"))
    if status == 0:
        assert last_step(texts) == 4
    if shown == "":
        assert len(metrics(texts)) == 2


@pytest.mark.skipif(os.name != "nt", reason="elsewhere an open file can be replaced")
def test_open_files_are_waited_for_on_windows(train, texts):
    train("-max_iters=2")
    for name in THREE:
        Timer(1, open(texts / name, "rb").close).start()  # noqa: SIM115
    train("-max_iters=4")
    assert last_step(texts) == 4 and last_step(texts, "model-01.old") == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_without_fsync_is_enough(train, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(number, os.strerror(number))))
    train("-max_iters=2")


def test_a_model_may_lie_in_a_folder_that_is_not_there_yet(train, texts):
    train("-max_iters=2", "-model=new/folder/m.pkl")
    assert load_model(texts / "new/folder/m.pkl")
    assert_fails(train("-max_iters=2", "-model=vocab.txt/m.pkl", status=1), "vocab.txt/m.pkl: ")


# The end of a run ---------------------------------------------------------------------------------


# In the last step or, as there is no third, in the evaluation of the whole validation text.
@pytest.mark.parametrize("step", [2, 3])
def test_a_signal_at_the_end_ends_the_run_without_the_last_evaluation(
    train, texts, monkeypatch, step
):
    handlers, found = [*map(signal.getsignal, STOPS)], []

    def interrupted_end(run):
        found.extend(map(signal.getsignal, STOPS))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "describe_end", interrupted_end)
    in_step(monkeypatch, step, signal.raise_signal, signal.SIGINT)
    done = train("-max_iters=2", status=130)
    assert "best model" not in done.stdout and done.stderr == "" and last_step(texts) == 2
    assert found == ([] if step == 2 else handlers)


# Streams, cards and reasons -----------------------------------------------------------------------


@pytest.mark.parametrize("missing", [["stdin"], ["stdout"], ["stderr"], ["stdin", "stdout"]])
def test_a_run_without_a_standard_stream_is_as_good(train, texts, missing):
    train("-max_iters=2", **dict.fromkeys(missing))
    assert last_step(texts) == 2


def test_it_runs_with_the_streams_of_a_notebook(train):
    output = io.StringIO()  # as in IDLE and Jupyter: without an encoding to change, and no file
    train("-max_iters=2", stdout=output, stderr=io.StringIO(), stdin=io.StringIO())
    assert "best model" in output.getvalue()


def test_each_process_touches_its_own_card_only_and_a_state_names_no_number(
    monkeypatch, texts, run_main
):
    touched = Mock()
    monkeypatch.setattr(training, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "cuda", Mock(device_count=lambda: 2, set_device=touched.set_device))
    monkeypatch.setattr(torch, "zeros", touched.zeros)
    monkeypatch.setattr(training, "run_training", lambda *_: 0)
    assert run_main("training.py", "-device=cuda").returncode == 0
    assert touched.mock_calls == [call.set_device(1), call.zeros(1, device="cuda")]
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
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        Mock(side_effect=map(torch.tensor, (math.inf, 1.0, 1.0, 1.0))),  # in each of the steps
    )
    in_step(monkeypatch, 1, signal.raise_signal, signal.SIGINT)
    train("-dtype=float16", "-max_iters=4", status=130)
    assert state_of(texts)["optimizer"]["parts"] == [[]]
    assert "after step 1 of 4" in train("-resume").stdout


# Terminals, logs and signals ----------------------------------------------------------------------


@signals
def test_a_closed_terminal_saves_the_run(texts, run_main, monkeypatch):
    # Whatever the run prints from then on can't be written, and nobody sees how it ends.
    monkeypatch.setattr(training, "SOON", 0)
    master, slave = os.openpty()
    in_step(monkeypatch, 3, signal.raise_signal, signal.SIGHUP)
    in_step(monkeypatch, 3, os.close, master)
    terminal = io.TextIOWrapper(os.fdopen(slave, "wb", buffering=0), write_through=True)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run_main("training.py", *TINY, *ENDLESS, stdout=terminal, stderr=terminal)
    assert last_step(texts) == 3


@signals
def test_a_run_that_nohup_has_started_goes_on_when_the_terminal_is_closed(train, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    in_step(monkeypatch, 1, signal.raise_signal, signal.SIGHUP)
    assert "best model, of step 2" in train("-max_iters=2").stdout


RANKS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@signals
@pytest.mark.parametrize(
    ("flags", "ranks", "numbers", "statuses"),
    [  # A signal that comes before it waits has to end it, too, if with another status.
        (TINY, RANKS, [signal.SIGINT], (-signal.SIGINT, 128 + signal.SIGINT)),
        (TINY, RANKS, [signal.SIGTERM], (-signal.SIGTERM, 128 + signal.SIGTERM)),
        # A step takes long, though no operation in it does: two signals in one would come as one.
        (
            [*TINY, "-n_embd=64", "-n_layer=100", "-block_size=64", "-batch_size=128"],
            {},
            [signal.SIGINT, signal.SIGINT],
            (-signal.SIGINT,),  # which a shell calls 130
        ),
    ],
)
def test_a_second_interrupt_ends_at_once_and_the_first_while_waiting_for_another_process(
    texts, start_script, flags, ranks, numbers, statuses
):
    run = start_script("training.py", *flags, cwd=texts, env={**os.environ, **ranks})
    wait_until_shown(run, "learning rate", "stdout")  # the last line before the first step
    for number in numbers:
        time.sleep(0.5)  # more than a busy machine lets a process wait
        run.send_signal(number)
    _, errors = run.communicate(timeout=5)
    assert run.returncode in statuses and "Traceback" not in errors
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
        with start_script(*command, cwd=disturbed) as run:
            wait_until_shown(run, ": train loss", "stdout")
            time.sleep(chance.uniform(0, 0.5))
            run.kill()
    done = run_main(*command, cwd=disturbed)
    assert done.returncode == run_main(*command, cwd=undisturbed).returncode == 0
    assert 4 * kills <= int(re.search(r"after step (\d+) of", done.stdout)[1]) < steps
    assert everything_after(disturbed) == everything_after(undisturbed)
    assert read_folder(disturbed).keys() == read_folder(undisturbed).keys()  # no litter


@pytest.mark.parametrize("reason", [errno.EPIPE, errno.ENOSPC], ids=errno.errorcode.get)
def test_output_that_can_not_be_written_ends_a_run_that_has_saved_its_state(
    train, texts, monkeypatch, reason
):
    log = Output()  # as in `training.py | head`, or on a disk that is full
    in_step(monkeypatch, 7, setattr, log, "error", reason)
    assert_fails(
        train("-max_iters=30", "-eval_interval=5", status=1, stdout=log),
        f"standard output: {os.strerror(reason)}",
    )
    assert last_step(texts) == 10 and [row["step"] for row in metrics(texts)] == ["5", "10"]


@posix
def test_on_a_terminal_there_is_a_bar_and_no_control_character_of_the_model(
    texts, train, monkeypatch
):
    write_texts(texts, "\x1b]52;c;\x07\x9b" * 200)
    master, slave = os.openpty()
    subprocess.run(["stty", "rows", "24", "columns", "80"], stdin=slave, check=True)
    in_step(monkeypatch, 2, time.sleep, 0.2)  # a bar is drawn ten times a second
    with open(slave, "w", encoding="utf-8") as terminal:
        train("-max_iters=4", "-model=a\x1bb.pkl", stdout=terminal, stderr=terminal)
        shown = os.read(master, 10_000).decode().replace("\x1b[A", "")  # tqdm goes up a line
    assert re.search(r"loss \d\.\d+: +\d+%", shown) and "tok/s" in shown
    assert r"saved a\x1bb.pkl" in shown
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown)


@pytest.mark.parametrize(
    ("called", "error", "message"),
    [
        ("training.get_batch", MemoryError(), "not enough memory; try a smaller -batch_size"),
        (
            "training.get_batch",
            torch.OutOfMemoryError("CUDA out of memory. Tried to"),
            "not enough memory; try a smaller",
        ),
        (
            "training.get_batch",
            OSError(errno.ENOSPC, "No space left", "model-01.pkl"),
            "model-01.pkl: No space left",
        ),
        ("os.fsync", OSError(errno.EIO, "Input/output error"), "model-01.pkl: Input/output error"),
    ],
    ids=str,
)
def test_an_error_that_can_be_foreseen_is_a_sentence(train, monkeypatch, called, error, message):
    monkeypatch.setattr(called, Mock(side_effect=error))
    assert_fails(train("-max_iters=1", status=1), message)


def test_an_error_that_nobody_foresaw_keeps_its_traceback(train, monkeypatch):
    in_step(monkeypatch, 1, Mock(side_effect=RuntimeError("an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal"):
        train("-max_iters=1")
