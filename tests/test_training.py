"""training.py: rows drawn from any text, a recipe that learns, and runs that can be stopped,
resumed and trusted.
"""

import errno
import io
import math
import os
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import steps
import torch
from conftest import (
    ROOT,
    TINY,
    assert_fails,
    metrics,
    posix,
    put,
    read_folder,
    signals,
    wait_until_shown,
    write_texts,
)
from torch.utils._pytree import tree_map_only

import training
from model import GPTLanguageModel, Vocabulary, load_model, read_model_file, save_model

MIXED = "Plain text, Привет мир, γειά, 中文字符, नमस्ते, שלום, “quoted” – é🙂🚀\n"
SAME = [
    "-max_iters",
    25,
    "-eval_interval",
    5,
    "-dropout",
    0,
    "-learning_rate",
    0.01,
    "-dtype",
    "float32",
]
ENDLESS = [*TINY, "-max_iters", 10**6, "-eval_interval", 10**6]
THREE = ("model-01.pkl", "model-01.state.pkl", "model-01.metrics.csv")


def args(*flags):
    return training.parse_args([*TINY, "-dropout=0", *map(str, flags)])[0]


def open_text(folder: Path, block_size: int) -> training.Text:
    return training.Text(
        folder / "output_train.txt", Vocabulary.from_file(folder / "vocab.txt"), block_size
    )


def shuffled_text(count: int) -> str:
    return "".join(random.Random(1).sample(MIXED * count, len(MIXED) * count))


@pytest.fixture
def train(texts, run_main, short_samples):
    """`train("-max_iters", 3, status=0)` runs training.py on the texts, in the TINY shape, to its
    end.
    """

    def run(*flags, status: int = 0, **streams):
        done = run_main(
            "training.py", *(["-device=cpu"] if "-resume" in flags else TINY), *flags, **streams
        )
        assert done.returncode == status, done.stderr
        return done

    return run


def new_run(folder: Path, *flags) -> training.Run:
    return steps.new_run(args("-data_dir", folder, "-model", folder / "model-01.pkl", *flags))


def last_step(folder: Path, name: str = "model-01") -> int:
    return read_model_file((folder / f"{name}.state.pkl").read_bytes())["training"]["record"][
        "step"
    ]


def losses(folder: Path, name: str = "model-01") -> list[float]:
    return [
        float(row[column]) for row in metrics(folder, name) for column in ("train_loss", "val_loss")
    ]


def evaluations(output: str) -> list[tuple[int, float, bool]]:
    found = re.findall(
        r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)(, saved)?", output, re.MULTILINE
    )
    return [(int(step), float(loss), bool(saved)) for step, loss, saved in found]


def during_each_step(monkeypatch, action) -> None:
    """Call `action` in the middle of each step, with the number that the step has when it is done."""
    get_batch = training.get_batch
    monkeypatch.setattr(
        training,
        "get_batch",
        lambda text, step, *more: action(step + 1) or get_batch(text, step, *more),
    )


def interrupt_after(monkeypatch, last: int, number: int = signal.SIGINT) -> None:
    """Let Ctrl-C, or another signal, come in the middle of a step."""
    during_each_step(
        monkeypatch, lambda step: signal.raise_signal(number) if step == last else None
    )


def assert_same(a, b) -> None:
    """Compare data with tensors in it, bit for bit."""
    a, b = (tree_map_only(torch.Tensor, torch.Tensor.tolist, data) for data in (a, b))
    same = a == b
    assert same  # not more, since to show the difference would take minutes


# Rows of text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_a_row_begins_with_the_next_whole_character_from_any_byte_on(tmp_path, block_size):
    content = shuffled_text(4)
    text = open_text(write_texts(tmp_path, content), block_size)
    for place in range(len(content.encode()) - 4 * (block_size + 1)):
        rest = content.encode()[place:].decode(
            errors="ignore"
        )  # without the end of a character that began before
        assert text.row(place) == rest[: block_size + 1]


def test_every_row_of_a_text_is_drawn_and_the_key_alone_says_which(tmp_path):
    content = "".join(dict.fromkeys(MIXED))[:30]
    text = open_text(write_texts(tmp_path, content), block_size=2)
    rows = text.draw(3000, [1337, 5, 0])
    assert set(rows) == {
        content[i : i + 3] for i in range(28)
    }  # the first and the last are among them
    assert open_text(tmp_path, 2).draw(3000, [1337, 5, 0]) == rows
    assert all(
        text.draw(3000, other) != rows for other in ([1337, 6, 0], [1338, 5, 0], [1337, 5, 1])
    )


@pytest.mark.parametrize("block_size", [1, 2, 7, 64])
def test_rows_from_the_start_predict_every_character_but_the_first_once(tmp_path, block_size):
    for length in range(block_size + 1, block_size + 70):  # the shortest text is a single row
        content = shuffled_text(2)[:length]
        rows = list(open_text(write_texts(tmp_path, content), block_size).from_the_start())
        assert all(len(row) == block_size + 1 for row in rows[:-1])
        assert rows[0][0] + "".join(row[1:] for row in rows) == content


def test_targets_are_the_characters_after_the_inputs(texts):
    x, y = training.get_batch(open_text(texts, 8), 2, args("-batch_size", 16))
    assert x.shape == y.shape == (16, 8) and x.dtype == torch.int64 and x[:, 1:].equal(y[:, :-1])
    vocabulary, content = (
        Vocabulary.from_file(texts / "vocab.txt"),
        (texts / "output_train.txt").read_text(),
    )
    for inputs, targets in zip(x.tolist(), y.tolist()):
        assert vocabulary.decode(inputs + targets[-1:]) in content


def test_an_unknown_character_is_read_as_u_fffd_where_the_vocabulary_has_that(tmp_path):
    text = open_text(write_texts(tmp_path, "ééé∞é" * 4, vocabulary="é\ufffd"), 8)
    assert text.encode(["é∞\0", "🙂é\n"]).tolist() == [[1, 2, 2], [2, 1, 0]]


@pytest.mark.parametrize(
    "bad", [b"\xff", b"\x80" * 5, b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"]
)
@pytest.mark.parametrize("place", [0, 20, 40])
def test_text_that_is_not_utf_8_is_named_with_its_place(tmp_path, bad, place):
    data = b"a" * place + bad + b"a" * (40 - place)
    (write_texts(tmp_path, "abc") / "output_train.txt").write_bytes(data)
    with pytest.raises(
        training.TrainingError, match=rf"output_train.txt: not UTF-8 text at byte {place}"
    ):
        list(open_text(tmp_path, 8).from_the_start())


def test_a_changed_byte_anywhere_is_another_text(tmp_path):
    path = write_texts(tmp_path, "the cat sat on the mat\n" * 50) / "output_train.txt"
    data, found = path.read_bytes(), []
    for place in [None, *range(0, len(data), 13), len(data) - 1]:
        path.write_bytes(data if place is None else data[:place] + b"X" + data[place + 1 :])
        found.append(tuple(open_text(tmp_path, 8).fingerprint))
    assert len(set(found)) == len(found) > 80


# Learning -----------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_its_end_at_the_last_step():
    recipe = args("-learning_rate", 1.0, "-min_lr", 0.1, "-warmup_iters", 10, "-max_iters", 111)
    rates = [training.learning_rate_at(step, recipe) for step in (0, 4, 9, 10, 35, 60, 85, 110)]
    quarter = 0.45 * math.cos(math.pi / 4)
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55 + quarter, 0.55, 0.55 - quarter, 0.1])


def test_what_is_not_given_follows_from_the_other_flags(texts):
    def value(name: str, *flags) -> float:
        return getattr(training.parse_args([*map(str, flags), f"-data_dir={texts}"])[0], name)

    rate, muon = partial(value, "learning_rate"), ["-optimizer", "muon"]
    half = pytest.approx(rate() / 2)
    assert rate("-n_embd", 768) == rate("-batch_size", 8) == rate("-block_size", 32) == half
    assert rate("-n_embd", 64) == rate("-batch_size", 512) == training.LEARNING_RATES["adamw"]
    assert (
        rate(*muon)
        == rate(*muon, "-batch_size", 8, "-n_embd", 768)
        == training.LEARNING_RATES["muon"]
    )
    assert rate(*muon, "-max_iters", 4800) == pytest.approx(rate(*muon) / 2)
    assert (
        value("min_lr", "-learning_rate", 0.5) == 0.15
        and value("min_lr", *muon, "-learning_rate", 0.5) == 0.05
    )
    assert (
        value("warmup_iters", "-max_iters", 60) == 20
        and value("warmup_iters", "-max_iters", 9000) == 150
    )
    for passes, expected in ((1, 0), (10, 0), (17.5, 0.1), (25.1, 0.2), (100, 0.2)):
        assert value("dropout", *TINY, "-max_iters", round(passes * 4600 / 32)) == pytest.approx(
            expected, abs=0.002
        )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_are_decayed(optimizer):
    model = GPTLanguageModel(7, n_embd=8, n_head=2, n_layer=1, block_size=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    training.Optimizer(model, args("-weight_decay", 0.3, "-optimizer", optimizer)).step(
        0.01, grad_clip=1.0
    )
    for name, parameter in model.named_parameters():
        assert (
            (parameter.norm() < before[name].norm())
            if parameter.dim() == 2
            else parameter.equal(before[name])
        ), name


def test_muon_equals_torchs_on_the_joined_heads_of_a_layer(monkeypatch):
    """Three steps with the polynomials of torch, in float32; torch itself works in bfloat16, hence
    the tolerance.
    """
    dtypes, baddbmm = set(), torch.baddbmm
    monkeypatch.setattr(training, "POLYNOMIALS", ((3.4445, -4.7750, 2.0315),) * 5)
    monkeypatch.setattr(
        torch, "baddbmm", lambda *args, **more: dtypes.add(args[1].dtype) or baddbmm(*args, **more)
    )
    model = GPTLanguageModel(7, n_embd=16, n_head=2, n_layer=2, block_size=4)
    first, second = model.blocks
    matrices = [[head.value.weight for head in second.sa.heads], [first.sa.proj.weight]]
    matrices += [[second.ffwd.net[0].weight], [first.ffwd.net[2].weight]]
    joined = [torch.nn.Parameter(torch.cat(parts).detach().clone()) for parts in matrices]
    theirs = torch.optim.Muon(joined, weight_decay=0.1, lr=0.01)
    optimizer = training.Optimizer(
        model, args("-optimizer", "muon", "-weight_decay", 0.1, "-dtype", "float32")
    )
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for whole, parts in zip(joined, matrices):
            whole.grad = torch.cat([part.grad for part in parts])
        optimizer.step(0.01, 0.0)
        assert dtypes == {torch.float32}
        theirs.step()
        dtypes.clear()
    for whole, parts in zip(joined, matrices):
        torch.testing.assert_close(
            torch.cat(parts), whole, atol=2e-3, rtol=0
        )  # of updates of up to 3e-2


@pytest.mark.parametrize("step", [0, 9, 199, 99_999])
def test_the_average_follows_5_per_cent_of_the_steps_so_far(texts, step):
    run = new_run(texts)
    run.model.lm_head.bias.data += 1
    start = run.average.lm_head.bias.clone()
    training.update_average(run.average, run.model, step)
    share = 1 / max(1, 0.05 * (step + 1))
    torch.testing.assert_close(run.average.lm_head.bias - start, torch.full_like(start, share))


@signals
def test_the_kept_model_is_as_good_as_the_weights_early_in_a_long_run(train, texts, monkeypatch):
    flags = [
        "-learning_rate",
        0.01,
        "-min_lr",
        0.01,
        "-warmup_iters",
        9,
        "-eval_interval",
        60,
        "-dropout",
        0,
    ]
    train(*flags, "-max_iters", 60)
    short, kept = losses(texts), read_model_file((texts / "model-01.pkl").read_bytes())["weights"]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    interrupt_after(monkeypatch, 60)
    interrupt_after(monkeypatch, 30, signal.SIGHUP)
    train(*flags, "-max_iters", 10**6, status=130)
    state = read_model_file((texts / "model-01.state.pkl").read_bytes())
    assert_same(dict(kept), dict(state["training"]["average"]))
    assert losses(texts) == short and not kept["lm_head.weight"].equal(
        state["weights"]["lm_head.weight"]
    )
    assert short[1] < 2.25  # from ln(11) = 2.4; the weights of the beginning would have all of that


# Many processes -----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the processes with pgrep")
def test_two_processes_learn_as_one_end_after_the_same_step_and_go_on_as_one(
    train, texts, start_script, monkeypatch
):
    train("-max_iters", 2)
    flags = [*SAME, "-optimizer", "muon", "-batch_size", 8, "-max_iters", 10**6, "-init_from"]
    run = start_script("training.py", *TINY, *flags, "model-01.state.pkl", processes=2)
    for text in ("2 x cpu", "step 25: "):
        wait_until_shown(run, text, "stdout")
    found = subprocess.run(
        ["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True
    )
    os.kill(max(map(int, found.stdout.split())), signal.SIGTERM)  # one of them
    output, errors = run.communicate(timeout=60)
    (step,) = map(
        int, re.findall(r"interrupted after step (\d+) ", output)
    )  # said by the first process alone
    assert run.returncode != 0 and not re.search(
        "training.py: |deprecated|broadcast_buffers", errors
    ), errors
    assert last_step(texts) == step and last_step(texts, "model-01.old") == 2
    with monkeypatch.context() as patch:
        interrupt_after(patch, 25)
        train(*flags, "model-01.old.state.pkl", "-model", "one.pkl", status=130)
    assert losses(texts)[:10] == pytest.approx(losses(texts, "one"), abs=1e-4)
    interrupt_after(monkeypatch, step + 1)
    assert f"after step {step} of 1000000" in train("-resume", status=130).stdout


@signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_another_ends_at_a_signal(texts, start_script, number):
    ranks = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "PYTHONUNBUFFERED": "1",
    }
    run = start_script("training.py", *TINY, cwd=texts, env={**os.environ, **ranks})
    wait_until_shown(run, "learning rate", "stdout")
    time.sleep(0.5)  # until it waits; a signal that comes earlier has to end it too
    run.send_signal(number)
    _, errors = run.communicate(timeout=10)
    assert run.returncode in (-number, 128 + number) and "Traceback" not in errors


@pytest.mark.parametrize("ranks", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}])
def test_a_rank_alone_is_ignored(texts, monkeypatch, capsys, ranks):
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(texts)
    monkeypatch.setattr("sys.argv", ["training.py", *TINY, "-max_iters=2"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "training.py"), run_name="__main__")
    assert "best model" in capsys.readouterr().out and last_step(texts) == 2


# A run --------------------------------------------------------------------------------------------


def test_a_run_reports_what_it_does_and_keeps_the_best_model(train, texts):
    flags = ["-batch_size", 64, "-dtype", "float32", "-learning_rate", 0.5, "-min_lr", 0.1]
    done = train(*flags, "-max_iters", 25, "-eval_interval", 10)
    for expected in (
        "cpu",
        "parameters, 11 characters",
        "0.00 MB to validate",
        "64 x 8 = 512 tokens",
        "float32",
    ):
        assert expected in done.stdout
    assert done.stderr == ""  # a log file gets no bar
    assert (
        len(re.findall(r"^step.*\n    \S", done.stdout, re.MULTILINE)) == 3
    )  # what the model writes by then
    best = math.inf
    for _, loss, saved in evaluations(done.stdout):
        assert saved == (loss < best)
        best = min(best, loss)
    assert (
        abs(best - float(re.search(r"best model, of step \d+: (.*) nats", done.stdout)[1])) < 0.05
    )
    assert load_model(texts / "model-01.pkl")[1].characters == "\n acehmnost"
    rows = metrics(texts)
    assert list(rows[0]) == ["step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds"]
    assert [(row["step"], row["tokens"]) for row in rows] == [
        ("10", "5120"),
        ("20", "10240"),
        ("25", "12800"),
    ]
    shown = re.findall(r"(?:train|val) loss ([\d.]+)", done.stdout)
    assert losses(texts) == pytest.approx([*map(float, shown)], abs=6e-5)  # which has four decimals
    rates, seconds = ([float(row[name]) for row in rows] for name in ("learning_rate", "seconds"))
    assert (
        0.5 > rates[0] > rates[1] > rates[2] == pytest.approx(0.1) and 0 < seconds[0] <= seconds[2]
    )


def test_at_the_end_the_whole_validation_text_counts_or_as_much_as_a_tenth_of_the_run(train, texts):
    val = (
        "the mat sat on the cat\n" * 20
    )  # 460 characters are 58 rows, a tenth of 145 steps of 4 rows
    write_texts(texts, val=val)
    assert "over the first 160 characters of the validation text" in train("-max_iters", 50).stdout
    output = train(
        "-max_iters", 150, "-dtype", "float32", "-dropout", 0.5, "-eval_interval", 150
    ).stdout
    nats, bits = re.search(
        r"([\d.]+) nats = ([\d.]+) bits per character\nover the whole val", output
    ).groups()
    model, vocabulary = load_model(texts / "model-01.pkl")
    ids, expected = torch.tensor([vocabulary.encode(val)]), []
    for i in range(1, 460):
        logits, _ = model(ids[:, (i - 1) // 8 * 8 : i])
        expected.append(-logits[0, -1].log_softmax(0)[ids[0, i]].item())
    assert float(nats) == pytest.approx(np.mean(expected), abs=1e-4)
    assert float(bits) == pytest.approx(float(nats) / math.log(2), abs=1e-3)


def test_evaluations_see_the_same_rows_whatever_may_change(train, texts):
    write_texts(texts, shuffled_text(9))
    flags = ["-eval_interval", 5, "-learning_rate", 0, "-min_lr", 0, "-dtype", "float32"]
    first = evaluations(train(*flags, "-max_iters", 10).stdout)
    later = evaluations(train("-resume", "-max_iters", 200).stdout)
    assert len({loss for _, loss, _ in first + later}) == 1  # nothing was learnt in between


@pytest.mark.parametrize("name", ["loss.png", "loss.svg", "loss.pdf"])
def test_a_plot_is_drawn(train, texts, name):
    pytest.importorskip("matplotlib", reason="draws with matplotlib, which is not installed")
    train("-max_iters", 4, "-eval_interval", 2, "-plot", name)
    assert (
        (texts / name)
        .read_bytes()
        .startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[name[-4:]])
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_learns_in_every_precision_and_saves_float32_weights(train, texts, dtype):
    flags = [
        "-max_iters=150",
        "-eval_interval=150",
        "-learning_rate=0.02",
        "-warmup_iters=5",
        "-dropout=0",
    ]
    output = train(*flags, "-dtype", dtype).stdout
    ((_, loss, _),) = evaluations(output)
    assert dtype in output and loss < 1.0  # from ln(11) = 2.4
    assert load_model(texts / "model-01.pkl")[0].lm_head.weight.dtype == torch.float32
    assert (
        "float16" in train("-resume", "-max_iters", 151, "-dtype", "float16").stdout
    )  # it may go on in another one


def test_the_seed_decides_everything(train, texts):
    found = []
    for seed in (1, 1, 2):
        train("-max_iters", 5, "-seed", seed)
        found.append((texts / "model-01.pkl").read_bytes())
    assert found[0] == found[1] != found[2]


def test_patience_stops_a_run_which_says_so_and_can_be_resumed(train, texts):
    write_texts(
        texts, val="".join(random.Random(1).choices("\n acehmnost", k=500))
    )  # which nothing learnt predicts
    flags = [
        "-learning_rate",
        0.03,
        "-warmup_iters",
        1,
        "-min_lr",
        0.03,
        "-eval_interval",
        5,
        "-dropout",
        0,
    ]
    output = train(*flags, "-max_iters", 120, "-patience", 7).stdout
    steps, found, _ = zip(*evaluations(output))
    best = found.index(min(found))
    assert len(found) == best + 1 + 7 and steps[-1] < 120
    assert (
        f"stopped after step {steps[-1]}: no better" in output
        and f"best model, of step {steps[best]}" in output
    )
    for more in ([], ["-max_iters", 150]):  # nothing has changed, so it says the same again
        output = train("-resume", *more).stdout
        assert "no better model in 7 evaluations" in output and not evaluations(output)
    assert len(evaluations(train("-resume", "-patience", 9).stdout)) >= 2
    assert evaluations(train("-resume", "-patience", 0).stdout)[-1][0] == 120  # 0 means: never stop


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_model(
    train, texts, monkeypatch
):
    train("-max_iters", 2)
    before = read_folder(texts)
    for flag in ("-learning_rate", "-weight_decay"):
        done = train("-max_iters", 20, "-eval_interval", 6, flag, 2e9, "-warmup_iters", 0, status=1)
        assert_fails(done, r"the loss is (nan|inf) after step [1-6]; .* -learning_rate")
        assert read_folder(texts) == before
    monkeypatch.setattr(
        training, "learning_rate_at", lambda step, settings: 1e30 if step >= 3 else 0.01
    )
    assert_fails(
        train("-max_iters", 20, "-eval_interval", 3, status=1),
        r"the loss is (nan|inf) after step [456]",
    )
    assert last_step(texts) == 3 and load_model(texts / "model-01.pkl")


@pytest.fixture
def old_model(texts):
    """A model of the characters "abc", in a file beside the texts."""
    model = GPTLanguageModel(3, n_embd=12, n_head=3, n_layer=2, block_size=9)
    save_model(texts / "old.pkl", model, Vocabulary("abc"))
    return model


def test_fine_tuning_takes_shape_and_weights_of_the_file_and_grows_the_vocabulary(
    texts, run_main, old_model
):
    write_texts(texts, "dcaé" * 20)
    flags = ["-device=cpu", "-dropout=0.2", f"-data_dir={texts}", f"-init_from={texts / 'old.pkl'}"]

    def load(flags: list[str]) -> tuple[GPTLanguageModel, Vocabulary]:
        settings, (old, known, _) = training.parse_args(flags)
        return training.new_model(settings, old, known.characters)

    for shape in ([], ["-n_embd=12", "-n_head=3", "-n_layer=2", "-block_size=9"]):
        model, vocabulary = load(flags + shape)
        assert vocabulary.characters == "\nabcdé" and model.config == {
            **old_model.config,
            "vocab_size": 6,
        }
    for flag in ("-n_embd=32", "-n_head=4", "-n_layer=1", "-block_size=8"):
        name, _, value = flag.partition("=")
        assert_fails(
            run_main("training.py", *flags, flag),
            f"argument {name}: {value} contradicts .*old.pkl",
            status=2,
        )
    known, new = [1, 2, 3], [0, 4, 5]
    for name, weight in model.state_dict().items():
        rows = known if name.startswith(("token_embedding_table", "lm_head")) else slice(None)
        assert weight[rows].equal(old_model.state_dict()[name]), name
    for table in (model.token_embedding_table, model.lm_head):
        assert 0.01 < table.weight[new].std() < 0.04  # as initialised


# Interrupting and going on ------------------------------------------------------------------------

LONG = ["-max_iters", 30, "-eval_interval", 10, "-dropout", 0.2]


def everything_after(folder: Path) -> tuple:
    """All that a run leaves, less the seconds."""
    state = read_model_file((folder / "model-01.state.pkl").read_bytes())
    for name in ("seconds", "metrics"):  # the metrics are compared below, without their seconds
        state["training"]["record"].pop(name)
    rows = [
        {name: value for name, value in row.items() if name != "seconds"} for row in metrics(folder)
    ]
    return read_model_file((folder / "model-01.pkl").read_bytes()), state, rows


@signals
@pytest.mark.parametrize("flags", [[], ["-optimizer", "muon"], ["-dtype", "bfloat16"]], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_bits(train, texts, monkeypatch, flags):
    train(*LONG, *flags)
    undisturbed = everything_after(texts)
    monkeypatch.setattr(training, "SOON", 0)
    for step, number in ((1, signal.SIGINT), (13, signal.SIGTERM), (20, signal.SIGHUP)):
        with (
            monkeypatch.context() as patch
        ):  # before anything is saved, between evaluations, and at one
            interrupt_after(patch, step, number)
            output = train(*LONG, *flags, status=128 + number).stdout
        assert f"interrupted after step {step} " in output and "-resume" in output
        load_model(texts / "model-01.pkl")  # can be talked to, also before the first evaluation
        assert f"after step {step} of 30" in train("-resume").stdout
        assert_same(everything_after(texts), undisturbed)


@signals
@pytest.mark.parametrize(
    "more", [["-init_from=old.pkl"], ["-optimizer=muon", "-min_lr=0"], ["-dropout=0"]], ids=str
)
def test_the_same_command_with_resume_starts_a_run_and_goes_on_with_it(
    texts, run_main, old_model, monkeypatch, more
):
    monkeypatch.setattr(training, "SOON", 0)
    command = ["training.py", "-device=cpu", "-batch_size=4", "-max_iters=5", *more, "-n_embd=12"]
    command += ["-n_head=3", "-n_layer=2", "-block_size=9", "-resume"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        done = run_main(*command)
    assert (
        done.returncode == 130
        and "there is no run to go on with, so a new one starts" in done.stderr
    )
    done = run_main(*command)
    assert done.returncode == 0 and "after step 3 of 5" in done.stdout and not done.stderr


def test_a_resumed_run_may_become_longer(train, texts):
    train("-max_iters", 10, "-eval_interval", 5)
    train("-resume", "-max_iters", 20)
    rows = metrics(texts)
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    assert float(rows[2]["learning_rate"]) == pytest.approx(
        training.learning_rate_at(14, args("-max_iters", 20))
    )
    assert_fails(train("-resume", "-max_iters", 15, status=2), "argument -max_iters: ", status=2)
    assert "after step 20 of 20" in train("-resume").stdout  # which is at its end and only reports


FIXED = [
    "batch_size=8",
    "block_size=9",
    "learning_rate=0.5",
    "min_lr=0",
    "warmup_iters=0",
    "optimizer=muon",
    "seed=2",
]
FIXED += [
    "dropout=0.5",
    "n_layer=2",
    "eval_interval=9",
    "weight_decay=0",
    "init_from=run.pkl",
    "vocab=vocab.txt",
]


@pytest.mark.parametrize("flag", FIXED)
def test_a_flag_that_contradicts_the_saved_run_is_refused(train, texts, finished_run, flag):
    before = read_folder(put(texts, finished_run))
    done = train("-resume", "-model=run.pkl", "-max_iters=3", f"-{flag}", status=2)
    assert_fails(
        done,
        f"argument -{flag.partition('=')[0]}: .* contradicts run.state.pkl, which has ",
        status=2,
    )
    assert ("which has 0.0;" in done.stderr) == flag.startswith("dropout")
    assert read_folder(texts) == before


@pytest.mark.parametrize("name", ["output_train.txt", "output_val.txt"])
def test_a_run_does_not_go_on_with_other_texts(train, texts, finished_run, name):
    put(texts, {**finished_run, name: finished_run[name].replace(b"on", b"no", 1)})
    assert_fails(
        train("-resume", "-model=run.pkl", "-max_iters=3", status=1), "the texts are not those"
    )


DAMAGES = {
    "fewer weights": lambda content: content["training"]["optimizer"]["parts"][0].pop(0),
    "other shapes": lambda content: content["training"]["optimizer"]["parts"][0][0].update(
        exp_avg=torch.zeros(99)
    ),
    "one number for many": lambda content: content["training"]["optimizer"]["parts"][0][0].update(
        exp_avg=torch.zeros(())
    ),
    "many steps": lambda content: content["training"]["optimizer"]["parts"][0][0].update(
        step=torch.zeros(11, 16)
    ),
    "another version": lambda content: content["training"].update(version=2),
    "another model's": lambda content: content["training"].update(model="other.pkl"),
    "no state": lambda content: content.pop("training"),
    "a missing device": lambda content: content["training"]["flags"].update(device="cuda:99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_is_a_sentence_unless_a_flag_mends_it(
    train, texts, finished_run, damage
):
    path = put(texts, finished_run) / "run.state.pkl"
    content = read_model_file(path.read_bytes())
    DAMAGES[damage](content)
    torch.save(content, path)
    done = train(
        "-resume", "-model=run.pkl", "-max_iters", 4, status=int(damage != "a missing device")
    )
    if done.returncode:
        assert_fails(
            done,
            "run.state.pkl: (does not hold a run to go on with|is not the state of a run.pkl that this)",
        )


# One run never destroys another -------------------------------------------------------------------


@signals
def test_runs_that_were_started_by_mistake_displace_nothing(train, texts, monkeypatch):
    for max_iters in (2, 3):  # so that there are .old files too
        train("-max_iters", max_iters)
    before = read_folder(texts)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        for seed in (1, 2):
            assert "nothing was saved" in train(*ENDLESS, "-seed", seed, status=130).stdout
            assert read_folder(texts) == before
        patch.setattr(training, "SOON", 0)  # as if it had gone on for more than a minute
        done = train(*ENDLESS, status=130)
        assert "nothing was saved" not in done.stdout
    for name in THREE:
        assert (
            (texts / name.replace("01", "01.old")).read_bytes()
            == before[name]
            != (texts / name).read_bytes()
        )
    interrupt_after(monkeypatch, 3)  # after an evaluation, a run is saved however short it was
    assert "nothing" not in train("-max_iters", 9, "-eval_interval", 2, status=130).stdout
    assert last_step(texts) == 3 and last_step(texts, "model-01.old") == 4


@signals
@pytest.mark.parametrize(
    "second", [[*TINY, "-max_iters=4", "-seed=2"], ["-resume", "-max_iters=1000000"]], ids=len
)
def test_a_run_whose_place_another_has_taken_stops_and_nothing_is_lost(
    train, run_main, texts, monkeypatch, second
):
    first = {}

    def start_another(step: int) -> None:
        if step == 7 and not first:
            first.update({name: (texts / name).read_bytes() for name in THREE})
            with monkeypatch.context() as patch:
                interrupt_after(patch, 9)
                assert run_main("training.py", *second).returncode in (0, 130)

    during_each_step(monkeypatch, start_another)
    done = train("-max_iters", 10**6, "-eval_interval", 5, status=1)
    assert_fails(
        done, "model-01.state.pkl: another run has put its own state here, so this run stops"
    )
    assert [step for step, *_ in evaluations(done.stdout)] == [5]
    if "-resume" in second:
        assert last_step(texts) == 9 and (texts / THREE[0]).read_bytes() == first[THREE[0]]
    else:
        assert all(
            (texts / name.replace("01", "01.old")).read_bytes() == first[name] for name in THREE
        )
        assert last_step(texts) == 4 and len(metrics(texts)) == 1
        interrupt_after(monkeypatch, 6)
        train("-resume", "-model=model-01.old.pkl", status=130)
        assert last_step(texts, "model-01.old") == 6


@posix
def test_links_stay_and_their_targets_are_replaced(train, texts):
    (disk := texts / "disk").mkdir()
    for name in THREE:
        (texts / name).symlink_to(disk / name)
    for max_iters in (1, 2):  # with nothing at the targets, and with an earlier run's files
        train("-max_iters", max_iters, "-eval_interval", 1)
        assert all((texts / name).is_symlink() for name in THREE)
        assert len(metrics(disk)) == last_step(disk) == max_iters and load_model(
            disk / "model-01.pkl"
        )
    assert last_step(disk, "model-01.old") == 1


# Terminals, logs and signals ----------------------------------------------------------------------


@signals
def test_a_closed_terminal_saves_the_run(texts, run_main, monkeypatch):
    """Whatever the run prints from then on can't be written, and nobody sees how it ends."""
    monkeypatch.setattr(training, "SOON", 0)
    master, slave = os.openpty()

    hang_up = partial(signal.raise_signal, signal.SIGHUP)
    during_each_step(monkeypatch, lambda step: os.close(master) or hang_up() if step == 3 else None)
    terminal = io.TextIOWrapper(os.fdopen(slave, "wb", buffering=0), write_through=True)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        run_main("training.py", *ENDLESS, stdout=terminal, stderr=terminal)
    assert last_step(texts) == 3


@signals
def test_a_second_interrupt_ends_at_once(texts, start_script):
    # A step takes long, though no operation in it does: two signals that arrive during one would
    # come as one.
    shape = [
        "-n_embd=64",
        "-n_head=1",
        "-n_layer=100",
        "-block_size=64",
        "-batch_size=128",
        "-device=cpu",
    ]
    run = start_script("training.py", *shape, cwd=texts)
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
    flags = [
        *TINY,
        "-max_iters",
        steps,
        "-eval_interval",
        4,
        "-resume",
    ]  # most of the time is saving
    disturbed, undisturbed = (write_texts(tmp_path / name) for name in ("disturbed", "undisturbed"))
    chance, output = random.Random(kills), ""
    for _ in range(kills):
        run = start_script("training.py", *flags, cwd=disturbed)
        while not re.match(r"step \d+:", line := run.stdout.readline()):
            output += line
            assert run.poll() is None
        time.sleep(chance.uniform(0, 0.5))
        run.kill()
        run.wait()
    done = run_main("training.py", *flags, cwd=disturbed)
    assert done.returncode == run_main("training.py", *flags, cwd=undisturbed).returncode == 0
    resumed = [int(step) for step in re.findall(r"after step (\d+) of", output + done.stdout)]
    assert len(resumed) == kills and resumed == sorted(resumed) and 0 < resumed[-1] < steps
    assert_same(everything_after(disturbed), everything_after(undisturbed))
    assert read_folder(disturbed).keys() == read_folder(undisturbed).keys()  # no litter


@posix
@pytest.mark.parametrize("reason", [errno.EPIPE, errno.ENOSPC])
def test_output_that_can_not_be_written_ends_a_run_that_has_saved_its_state(
    train, texts, monkeypatch, reason
):
    """As in `training.py | head`, or with a log on a disk that is full."""
    reader, writer = os.pipe()
    os.close(reader)
    bad = writer if reason == errno.EPIPE else os.open("/dev/full", os.O_WRONLY)
    log = io.TextIOWrapper(
        os.fdopen(os.open(os.devnull, os.O_WRONLY), "wb", buffering=0), write_through=True
    )
    during_each_step(
        monkeypatch, lambda step: os.dup2(bad, log.fileno()) and None if step == 7 else None
    )
    done = train("-max_iters", 30, "-eval_interval", 5, status=1, stdout=log)
    assert_fails(done, f"standard output: {os.strerror(reason)}")
    assert last_step(texts) == 10 and [row["step"] for row in metrics(texts)] == ["5", "10"]


class Notebook(io.StringIO):
    """A stream as in IDLE and Jupyter: text without an encoding to change, a file or a buffer."""

    encoding = errors = buffer = property(lambda self: None)


def test_it_runs_with_the_streams_of_a_notebook_and_without_an_output(train):
    output = Notebook()
    train("-max_iters", 2, stdout=output, stderr=Notebook(), stdin=Notebook())
    assert "best model" in output.getvalue()
    train("-max_iters", 2, stdout=None, stdin=None)


@posix
def test_on_a_terminal_there_is_a_bar_and_no_control_character_of_the_model(
    texts, train, monkeypatch
):
    write_texts(texts, "\x1b]52;c;\x07\x9b" * 200)
    import fcntl
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # lines and columns
    during_each_step(
        monkeypatch, lambda step: time.sleep(0.11 * (step < 5))
    )  # a bar is drawn ten times a second
    with open(slave, "w") as terminal:
        train(
            "-max_iters",
            4,
            "-eval_interval",
            2,
            "-model",
            "a\x1bb.pkl",
            stdout=terminal,
            stderr=terminal,
        )
        shown = os.read(master, 10_000).decode()
    os.close(master)
    assert (
        re.search(r"loss \d\.\d+: +\d+%", shown)
        and "tok/s" in shown
        and r"saved a\x1bb.pkl" in shown
    )
    assert not re.search(
        r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", shown.replace("\x1b[A", "")
    )  # tqdm goes up a line
    done = train("-max_iters", 60, "-eval_interval", 60, "-learning_rate", 0.05)
    assert "\x1b]52" in done.stdout  # piped output stays as it is


NO_MEMORY = "not enough memory; try a smaller -batch_size"
ERRORS = [
    (MemoryError(), NO_MEMORY),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), NO_MEMORY),
    (
        OSError(errno.ENOSPC, "No space left on device", "model-01.pkl"),
        "model-01.pkl: No space left on device",
    ),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
]


@pytest.mark.parametrize(("error", "message"), ERRORS, ids=str)
def test_an_error_is_a_sentence_if_it_can_be_foreseen_else_a_traceback(
    train, monkeypatch, error, message
):
    monkeypatch.setattr(training, "get_batch", lambda *_: (_ for _ in ()).throw(error))
    if message:
        assert_fails(train(status=1), message)
    else:
        with pytest.raises(type(error), match=str(error)):
            train()
