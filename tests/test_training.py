"""training.py: rows drawn from any text, a recipe that learns, and runs that can be stopped, resumed and trusted."""

import errno
import io
import math
import os
import random
import re
import shlex
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

import training
from model import GPTLanguageModel, Vocabulary, load_model, read_model_file, save_model

MIXED = "Plain text, Привет мир, γειά, 中文字符, नमस्ते, שלום, “quoted” – é🙂🚀\n"
CPU = torch.device("cpu")
BADDBMM = torch.baddbmm
SAME = ["-max_iters", 25, "-eval_interval", 5, "-dropout", 0, "-learning_rate", 0.01, "-dtype", "float32"]


def args(*flags):
    settings, _ = training.parse_args([*TINY, *map(str, flags)])
    return settings


def open_text(folder: Path, block_size: int) -> training.Text:
    vocabulary = Vocabulary.from_file(folder / "vocab.txt")
    return training.Text(folder / "output_train.txt", vocabulary, block_size)


def shuffled_text(count: int) -> str:
    characters = list(MIXED * count)
    random.Random(1).shuffle(characters)
    return "".join(characters)


@pytest.fixture
def train(texts, run_main, short_samples):
    """`train("-max_iters", 3)` runs training.py on the texts, in the TINY shape, to its end, which is to be a good one.

    `train("-resume")` goes on with what it has saved. Another `status` is the one that it is to end with.
    """

    def run(*flags, status: int = 0):
        done = run_main("training.py", *(["-device=cpu"] if "-resume" in flags else TINY), *flags)
        assert done.returncode == status, done.stderr
        return done

    return run


def weights(folder: Path) -> torch.Tensor:
    return load_model(folder / "model-01.pkl")[0].lm_head.weight


def losses(folder: Path, name: str = "model-01") -> list[float]:
    return [float(row[column]) for row in metrics(folder, name) for column in ("train_loss", "val_loss")]


def evaluations(output: str) -> list[tuple[int, float, bool]]:
    found = re.findall(r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)(, saved)?", output, re.MULTILINE)
    return [(int(step), float(loss), bool(saved)) for step, loss, saved in found]


# Rows of text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_rows_are_whole_characters_of_the_text(tmp_path, block_size):
    content = shuffled_text(20)
    text = open_text(write_texts(tmp_path, content), block_size)
    starts = np.cumsum([0] + [len(character.encode()) for character in content])
    vocabulary = Vocabulary(content)
    offsets = text.draw_offsets(500, [1, 2])
    for offset, row in zip(offsets, text.rows(offsets)):
        (position,) = np.flatnonzero(starts == offset)  # a byte inside a character is at no start
        assert vocabulary.decode(row) == content[position : position + block_size + 1]


def test_every_character_is_equally_likely_to_begin_a_row(tmp_path):
    content = "a🙂é" * 5
    text = open_text(write_texts(tmp_path, content), block_size=2)
    offsets = text.draw_offsets(13 * 2000, [3])
    found, counts = np.unique(offsets, return_counts=True)
    starts = np.cumsum([0] + [len(character.encode()) for character in content])
    assert found.tolist() == starts[: len(content) - 2].tolist()  # the last possible row included
    assert counts.min() > 1800 and counts.max() < 2200


def test_rows_depend_on_their_key_alone(texts):
    text = open_text(texts, 8)
    first = text.draw_offsets(32, [1337, 5, 0])
    text.draw_offsets(100, [1337, 6, 0])
    assert np.array_equal(open_text(texts, 8).draw_offsets(32, [1337, 5, 0]), first)
    for other in ([1337, 6, 0], [1338, 5, 0], [1337, 5, 1]):
        assert not np.array_equal(text.draw_offsets(32, other), first)


def test_targets_are_the_characters_after_the_inputs(texts):
    text = open_text(texts, 8)
    x, y = training.get_batch(text, 2, args("-batch_size", 16))
    assert x.shape == y.shape == (16, 8) and x.dtype == torch.int64
    assert x[:, 1:].equal(y[:, :-1])
    vocabulary = Vocabulary.from_file(texts / "vocab.txt")
    content = (texts / "output_train.txt").read_text()
    for inputs, targets in zip(x.tolist(), y.tolist()):
        assert vocabulary.decode(inputs + targets[-1:]) in content


def test_a_text_of_exactly_one_row_is_enough(tmp_path):
    text = open_text(write_texts(tmp_path, "日本語テキスト!é"), 8)
    assert text.draw_offsets(5, [0]).tolist() == [0] * 5
    assert text.rows(np.array([0])).shape == (1, 9)


@pytest.mark.parametrize("content", ["", "a", "12345678", "🙂" * 8])
def test_a_text_shorter_than_a_row_is_refused_at_the_start(tmp_path, content):
    write_texts(tmp_path, content, vocabulary="12345678a🙂")
    with pytest.raises(training.TrainingError, match=f"output_train.txt: holds {len(content)} characters"):
        open_text(tmp_path, 8)


def test_an_unknown_character_is_named_with_its_place(tmp_path):
    text = open_text(write_texts(tmp_path, "ééé∞é" * 4, vocabulary="é"), 8)
    with pytest.raises(training.TrainingError, match=r"output_train.txt: the character '∞' at byte 6 is not in vocab"):
        text.rows(np.array([2]))


@pytest.mark.parametrize(("data", "place"), [(b"good" + b"\xff" + b"text" * 9, 4), (b"abcd" * 5 + b"\xe2\x82", None)])
def test_text_that_is_not_utf_8_is_named_with_its_place(tmp_path, data, place):
    write_texts(tmp_path, "abcdefghijklmnopqrstuvwxyz")
    (tmp_path / "output_train.txt").write_bytes(data)
    text = open_text(tmp_path, 8)
    with pytest.raises(training.TrainingError, match=f"at byte {place}" if place else "cut short"):
        text.rows(np.arange(text.last_start + 1))


# Learning ------------------------------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    recipe = args("-learning_rate", 1.0, "-min_lr", 0.1, "-warmup_iters", 10, "-max_iters", 110)
    rates = [training.learning_rate_at(step, recipe) for step in (0, 4, 9, 10, 35, 60, 85, 110)]
    quarter = 0.45 * math.cos(math.pi / 4)
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55 + quarter, 0.55, 0.55 - quarter, 0.1])


def test_the_ends_of_the_schedule_follow_from_the_other_flags():
    recipe = args("-learning_rate", 0.5, "-max_iters", 60)
    assert (recipe.min_lr, recipe.warmup_iters) == (0.15, 20)
    assert args("-max_iters", 10_000).warmup_iters == 150
    assert args("-optimizer", "muon").learning_rate > args().learning_rate
    assert args("-optimizer", "muon", "-learning_rate", 0.5).min_lr == 0.05


def test_the_learning_rate_follows_from_the_shape_and_from_the_length():
    def rate(*flags) -> float:
        return training.parse_args([str(flag) for flag in flags])[0].learning_rate

    half = pytest.approx(rate() / 2)
    assert rate("-n_embd", 768) == rate("-batch_size", 8) == rate("-block_size", 32) == half
    assert rate("-n_embd", 64) == rate("-batch_size", 512) == training.LEARNING_RATES["adamw"]
    assert rate("-batch_size", 8, "-learning_rate", 0.5) == 0.5
    muon = ["-optimizer", "muon"]
    assert rate(*muon) == rate(*muon, "-batch_size", 8, "-n_embd", 768) == training.LEARNING_RATES["muon"]
    assert rate(*muon, "-max_iters", 4800) == pytest.approx(rate(*muon) / 2)
    # A run that is made longer later has the rate of such a run.
    saved = training.parse_args(muon)[0].arguments
    assert rate(*saved, "-max_iters", 4800) == pytest.approx(rate(*muon) / 2)


def test_dropout_follows_from_the_passes_over_the_text(texts):
    def dropout(passes: float, *flags) -> float:
        return args("-data_dir", texts, "-max_iters", round(passes * 4600 / 4 / 8), *flags).dropout

    assert dropout(1) == dropout(10) == 0.0 and dropout(25.1) == dropout(100) == 0.2
    assert dropout(17.5) == pytest.approx(0.1, abs=0.002)
    assert dropout(1, "-dropout", 0.3) == 0.3


def test_adamw_averages_over_the_same_tokens_whatever_the_batch():
    def beta2(batch_size: int, block_size: int) -> float:
        recipe = args("-batch_size", batch_size, "-block_size", block_size)
        (adamw,) = training.Optimizer(GPTLanguageModel(7, 8, 2, 1, 4), recipe).parts
        return adamw.param_groups[0]["betas"][1]

    tokens = [rows * length / (1 - beta2(rows, length)) for rows, length in ((12, 64), (24, 64), (8, 128), (1, 512))]
    assert tokens == pytest.approx([tokens[0]] * 4)
    assert beta2(1, 8) <= 0.999 and beta2(64, 256) >= 0.95  # as a handful or thousands of steps would be no average


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_are_decayed(optimizer):
    model = GPTLanguageModel(7, n_embd=8, n_head=2, n_layer=1, block_size=4)
    optimizer = training.Optimizer(model, args("-weight_decay", 0.3, "-optimizer", optimizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
            parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.step(0.01, grad_clip=1.0)
    for name, parameter in model.named_parameters():
        assert (parameter.norm() < before[name].norm()) if parameter.dim() == 2 else parameter.equal(before[name]), name


def test_muon_gets_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = GPTLanguageModel(7, n_embd=8, n_head=2, n_layer=3, block_size=4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon, adamw = training.Optimizer(model, args("-optimizer", "muon", "-weight_decay", 0)).parts
    for group in muon.param_groups:
        group["lr"] = 0.01
    muon.step()
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) == (parameter.dim() < 2 or not name.startswith("blocks.")), name
    model.load_state_dict(before)
    adamw.step()
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) == (parameter.dim() == 2 and name.startswith("blocks.")), name


def test_muon_equals_torchs_on_the_joined_heads_of_a_layer(monkeypatch):
    """Three steps with the polynomials of torch, in float32; torch itself works in bfloat16, hence the tolerance."""
    monkeypatch.setattr(training, "POLYNOMIALS", ((3.4445, -4.7750, 2.0315),) * 5)
    monkeypatch.setattr(training, "default_dtype", lambda device: torch.float32)
    model = GPTLanguageModel(7, n_embd=16, n_head=2, n_layer=2, block_size=4)
    blocks = model.blocks
    matrices = [[head.value.weight for head in blocks[1].sa.heads]]
    matrices += [[blocks[0].sa.proj.weight], [blocks[1].ffwd.net[0].weight], [blocks[0].ffwd.net[2].weight]]
    joined = [torch.nn.Parameter(torch.cat(parts).detach().clone()) for parts in matrices]
    theirs = torch.optim.Muon(joined, weight_decay=0.1, lr=0.01)
    ours, _ = training.Optimizer(model, args("-optimizer", "muon", "-weight_decay", 0.1)).parts
    for group in ours.param_groups:
        group["lr"] = 0.01
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for whole, parts in zip(joined, matrices):
            whole.grad = torch.cat([part.grad for part in parts])
        ours.step()
        theirs.step()
    for whole, parts in zip(joined, matrices):
        torch.testing.assert_close(torch.cat(parts), whole, atol=2e-3, rtol=0)  # of updates of up to 3e-2


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 32, 8), (2, 8, 32)])
def test_orthogonalized_matrices_have_singular_values_of_about_1(shape, monkeypatch):
    monkeypatch.setattr(training, "default_dtype", lambda device: torch.float32)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    values = torch.linalg.svdvals(training.orthogonalize(matrices))
    assert values.min() > 0.3 and values.max() < 1.7
    alone = torch.cat([training.orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(training.orthogonalize(matrices), alone)


@pytest.mark.parametrize(
    ("fast", "expected"), [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")]
)
def test_muon_works_in_bfloat16_only_where_that_is_fast(monkeypatch, fast, expected):
    seen = set()

    def baddbmm(*matrices, **factors):
        seen.update(str(matrix.dtype) for matrix in matrices)
        return BADDBMM(*matrices, **factors)

    monkeypatch.setattr(training, "default_dtype", lambda device: getattr(torch, fast))
    monkeypatch.setattr(torch, "baddbmm", baddbmm)
    assert training.orthogonalize(torch.ones(1, 2, 2)).dtype == torch.float32
    assert seen == {f"torch.{expected}"}


def test_a_clip_of_0_clips_nothing(train, texts):
    found = {}
    for clip in (0, 1e9, 0.01):
        train("-max_iters", 3, "-grad_clip", clip)
        found[clip] = weights(texts)
    assert found[0].equal(found[1e9]) and not found[0].equal(found[0.01])


def new_run(folder: Path, *flags) -> training.Run:
    """Return a run on the texts in this folder, at its beginning."""
    return steps.new_run(args("-data_dir", folder, "-model", folder / "model-01.pkl", *flags))


def train_until(run: training.Run, step: int) -> None:
    """Go on with a run to this step, in this process."""
    settings = training.Settings(**{**vars(run.settings), "max_iters": step})
    training.train(run._replace(settings=settings), training.Interruption())


def test_float16_scales_gradients_and_skips_a_step_that_overflows(texts):
    run = new_run(texts, "-dtype", "float16", "-dropout", 0, "-eval_interval", 30)
    assert run.optimizer.scaler.get_scale() > 1
    train_until(run, 60)
    (_, first, *_), (_, last, *_) = run.record.metrics
    assert last < first < math.log(11)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    run.optimizer.scaler.load_state_dict({**run.optimizer.scaler.state_dict(), "scale": 2.0**120})
    train_until(run, 61)
    assert_same(dict(run.model.state_dict()), before)
    assert run.optimizer.scaler.get_scale() < 2.0**120


# Muon multiplies in bfloat16 where a processor has units for it, so its results differ more.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-4), ("muon", 1e-3)])
def test_a_step_in_parts_learns_as_a_whole_one_does(train, texts, optimizer, tolerance):
    train(*SAME, "-optimizer", optimizer)
    whole = losses(texts)
    train(*SAME, "-optimizer", optimizer, "-grad_accum", 4)
    assert losses(texts) == pytest.approx(whole, abs=tolerance)
    assert min(whole) < max(whole) - 0.1


def check_compiled(train, folder: Path) -> None:
    train(*SAME, "-max_iters", 4)
    plain = losses(folder)
    done = train(*SAME, "-max_iters", 4, "-compile", "on")
    assert losses(folder) == pytest.approx(plain, abs=1e-4)
    assert "compiled    in" in done.stdout and "goes on without" not in done.stderr


def test_a_compiled_model_learns_as_it_does_uncompiled(train, texts, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    check_compiled(train, texts)


@pytest.mark.soak
def test_a_model_compiled_to_machine_code_learns_as_it_does_uncompiled(train, texts):
    check_compiled(train, texts)


def test_what_can_not_be_compiled_is_trained_as_it_is(train, monkeypatch):
    def broken(*args):
        raise RuntimeError("no working compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    errors = train("-max_iters", 2, "-compile", "on").stderr
    assert "-compile on: can't be done here, training goes on without: no working compiler\n" in errors


def test_the_average_of_the_weights_is_what_is_kept(train, texts):
    train("-max_iters", 60, "-eval_interval", 60)  # so that the average follows the last three steps
    state = read_model_file(texts / "model-01.state.pkl")
    kept = read_model_file(texts / "model-01.pkl")["weights"]
    assert_same(dict(kept), dict(state["training"]["average"]))
    assert not kept["lm_head.weight"].equal(state["weights"]["lm_head.weight"])


def test_the_average_follows_the_last_steps(texts):
    run = new_run(texts, "-max_iters", 200)
    start = run.average.lm_head.bias.clone()
    with torch.no_grad():
        run.model.lm_head.bias += 1
    for _ in range(10):  # 5 % of the run
        training.update_average(run.average, run.model, 200)
    moved = run.average.lm_head.bias - start
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.9**10))


# Many processes ------------------------------------------------------------------------------------------------------

ENDLESS = [*TINY, "-max_iters", 10**6, "-eval_interval", 10**6]


def children(process) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


needs_pgrep = pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the processes with pgrep")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_learn_as_one_and_go_on_as_one(train, texts, start_script, optimizer):
    flags = [*TINY, *SAME, "-optimizer", optimizer, "-model", "two.pkl"]
    run = start_script("training.py", *flags, processes=2)
    train(*SAME, "-optimizer", optimizer)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "2 processes" in output and output.count("best model") == 1  # the first process speaks for all
    assert losses(texts, "two") == pytest.approx(losses(texts), abs=1e-4)
    assert "after step 25 of 26" in train("-resume", "-model", "two.pkl", "-max_iters", 26).stdout


@pytest.mark.parametrize(
    ("processes", "flags", "fits"), [(8, ["-batch_size=100"], "96 and 104"), (2, ["-grad_accum=3"], "6 can")]
)
def test_rows_that_processes_can_not_share_are_a_sentence_that_says_which_they_can(
    train, monkeypatch, processes, flags, fits
):
    monkeypatch.setattr(training, "WORLD_SIZE", processes)
    assert_fails(train(*flags, status=2), f"argument -batch_size: .*{fits}", status=2)


@needs_pgrep
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_takes_the_others_down_by_name(texts, start_script, victim):
    run = start_script("training.py", *ENDLESS, processes=2)
    wait_until_shown(run, "loss")
    pid = children(run)[victim]
    os.kill(pid, signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and f"pid: {pid}" in errors and "exitcode  : -9" in errors


@needs_pgrep
@pytest.mark.parametrize("receiver", ["torchrun", "one process"])
def test_interrupted_processes_end_after_the_same_step(texts, start_script, receiver):
    run = start_script("training.py", *ENDLESS, processes=2)
    wait_until_shown(run, "loss")
    os.kill(run.pid if receiver == "torchrun" else children(run)[1], signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    command = "torchrun --nproc_per_node=2 training.py -resume"
    (step,) = re.findall(rf"interrupted after step (\d+); to go on: {command}", errors)
    state = read_model_file(texts / "model-01.state.pkl")["training"]
    assert run.returncode != 0 and state["record"]["step"] == int(step)


# Evaluating ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 7, 64])
def test_evaluation_predicts_every_character_but_the_first_once(tmp_path, monkeypatch, block_size):
    monkeypatch.setattr(training, "CHUNK", 10)  # so that chunks end inside windows and inside characters
    vocabulary = Vocabulary(MIXED)
    settings = args("-batch_size", 3, "-block_size", block_size)
    for length in range(block_size + 1, block_size + 70):
        content = shuffled_text(2)[:length]
        text = open_text(write_texts(tmp_path, content, vocabulary=MIXED), block_size)
        chosen = training.choose_rows(text, 70, 1, settings)
        rows = [row.tolist() for offsets, row_length in chosen.batches for row in text.rows(offsets, row_length)]
        assert chosen.is_whole and all(len(row) == block_size + 1 for row in rows[:-1])
        assert vocabulary.decode([rows[0][0], *(i for row in rows for i in row[1:])]) == content


def test_the_loss_of_a_whole_text_is_the_mean_over_its_characters(tmp_path):
    content = shuffled_text(3)[:101]
    text = open_text(write_texts(tmp_path, content), 8)
    vocabulary = Vocabulary.from_file(tmp_path / "vocab.txt")
    model = GPTLanguageModel(len(vocabulary), 16, 2, 1, 8)
    torch.nn.init.normal_(model.lm_head.weight)  # so that characters differ in their loss
    rows = training.choose_rows(text, 13, 1, args("-batch_size", 3))
    losses, ids = [], vocabulary.encode(content)
    model.eval()
    for i in range(1, 101):
        start = (i - 1) // 8 * 8
        logits, _ = model(torch.tensor([ids[start:i]]))
        losses.append(-logits[0, -1].log_softmax(0)[ids[i]].item())
    assert rows.is_whole
    assert training.mean_loss(model, rows, CPU) == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_text_too_long_to_evaluate_whole_is_seen_at_fixed_places(texts):
    text = open_text(texts, 8)
    first, second = (training.choose_rows(text, 10, 30, args()) for _ in range(2))
    assert not first.is_whole and sum(len(offsets) for offsets, _ in first.batches) == 30
    for (offsets, length), (same, _) in zip(first.batches, second.batches):
        assert np.array_equal(offsets, same) and length == 9
    assert training.choose_rows(text, 575, 30, args()).is_whole  # 4600 characters are 575 windows


def test_evaluation_leaves_the_model_as_it_was(texts):
    text = open_text(texts, 8)
    model = GPTLanguageModel(len(Vocabulary.from_file(texts / "vocab.txt")), 16, 2, 1, 8).train()
    rows = training.choose_rows(text, 0, 16, args())
    first, second = (training.mean_loss(model, rows, CPU) for _ in range(2))
    assert first == second and model.training


def test_every_evaluation_is_a_row_of_metrics(train, texts):
    output = train("-max_iters", 25, "-eval_interval", 10, "-learning_rate", 0.5, "-min_lr", 0.1).stdout
    rows = metrics(texts)
    assert list(rows[0]) == ["step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds"]
    assert [int(row["step"]) for row in rows] == [10, 20, 25]
    assert [int(row["tokens"]) for row in rows] == [320, 640, 800]
    shown = re.findall(r"^step \d+: train loss ([\d.]+), val loss ([\d.]+)", output, re.MULTILINE)
    written = [(float(row["train_loss"]), float(row["val_loss"])) for row in rows]
    assert np.array(written) == pytest.approx(np.array(shown, dtype=float), abs=6e-5)  # which has four decimals
    rates = [float(row["learning_rate"]) for row in rows]
    assert 0.5 > rates[0] > rates[1] > rates[2] > 0.1
    assert 0 < float(rows[0]["seconds"]) <= float(rows[2]["seconds"])


def test_a_plot_is_drawn(train, texts):
    pytest.importorskip("matplotlib")
    train("-max_iters", 4, "-eval_interval", 2, "-plot", "loss.png")
    assert (texts / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_a_notice(train, texts, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    errors = train("-max_iters", 2, "-plot", "loss.png").stderr
    assert "pip install matplotlib" in errors and not (texts / "loss.png").exists()


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_reports_what_it_does_and_keeps_the_best_model(train, texts):
    output = train("-max_iters", 25, "-eval_interval", 10, "-batch_size", 64, "-dtype", "float32").stdout
    for expected in ("cpu", "parameters", "vocabulary  11 characters", "0.00 MB to validate", "64 x 8 = 512 tokens"):
        assert expected in output
    lines = evaluations(output)
    assert [step for step, _, _ in lines] == [10, 20, 25]  # the last step is always evaluated
    best = math.inf
    for _, loss, saved in lines:
        assert saved == (loss < best)
        best = min(best, loss)
    end = re.search(r"([\d.]+) nats = ([\d.]+) bits per character\nover the whole .*python chatbot.py$", output)
    nats, bits = map(float, end.groups())
    assert nats == pytest.approx(best, abs=2e-4) and bits == pytest.approx(nats / math.log(2), abs=1e-3)
    model, vocabulary = load_model(texts / "model-01.pkl")
    assert model.config["n_embd"] == 16 and vocabulary.characters == "\n acehmnost"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_in_both_precisions_and_saves_float32_weights(train, texts, dtype):
    flags = ["-max_iters=150", "-eval_interval=150", "-learning_rate=0.02", "-warmup_iters=5", "-dropout=0"]
    output = train(*flags, "-dtype", dtype).stdout
    assert dtype in output
    ((_, loss, _),) = evaluations(output)
    assert loss < 1.0  # from ln(11) = 2.4
    assert weights(texts).dtype == torch.float32


def test_the_seed_decides_everything(train, texts):
    found = []
    for seed in (1, 1, 2):
        train("-max_iters", 5, "-seed", seed)
        found.append(weights(texts))
    first, again, other = found
    assert first.equal(again) and not first.equal(other)


def test_two_lines_of_the_models_own_text_follow_each_evaluation(texts, run_main):
    lines = run_main("training.py", *TINY, "-max_iters", 4, "-eval_interval", 2).stdout.splitlines()
    found = [i for i, line in enumerate(lines) if re.match(r"step \d+: train loss", line)]
    assert len(found) == 2
    for i in found:
        assert all(line.startswith("    ") and 4 < len(line) <= 84 for line in lines[i + 1 : i + 3])


OVERFITTING = ["-learning_rate", 0.03, "-warmup_iters", 1, "-min_lr", 0.03, "-eval_interval", 5, "-dropout", 0]


def validate_with_other_text(folder: Path) -> None:
    """Text of the same characters as the training text, which nothing learnt from that predicts."""
    write_texts(folder, val="".join(random.Random(1).choices("\n acehmnost", k=500)))


def test_a_rising_validation_loss_is_said_once(train, texts):
    validate_with_other_text(texts)
    output = train(*OVERFITTING, "-max_iters", 60).stdout
    losses = [loss for _, loss, _ in evaluations(output)]
    best_step = 5 * (1 + losses.index(min(losses)))
    assert len(losses) == 12
    (line,) = re.findall("the validation loss has been above .*", output)
    assert f"that of step {best_step} " in line and "-patience" in line
    assert f"best model, of step {best_step}" in output


def test_patience_stops_a_run_which_says_so_and_can_be_resumed(train, texts):
    validate_with_other_text(texts)
    output = train(*OVERFITTING, "-max_iters", 80, "-patience", 3).stdout
    steps, losses, _ = zip(*evaluations(output))
    assert len(losses) == losses.index(min(losses)) + 1 + 3 and steps[-1] < 80
    stopped = f"stopped after step {steps[-1]} of 80: no better model in 3 evaluations; to go on: "
    assert stopped + "python training.py -resume -patience 6" in output and "best model, of step" in output
    for more in ([], ["-max_iters", 100]):  # nothing has changed, so it says the same again
        output = train("-resume", *more).stdout
        assert "no better model in 3 evaluations" in output and not evaluations(output)
    output = train("-resume", "-patience", 5).stdout
    assert len(evaluations(output)) >= 2
    assert evaluations(train("-resume", "-patience", 0).stdout)[-1][0] == 80  # 0 means: never stop


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_model(train, texts):
    train("-max_iters", 2)
    before = (texts / "model-01.pkl").read_bytes()
    done = train("-max_iters", 20, "-eval_interval", 6, "-learning_rate", 1e30, "-warmup_iters", 0, status=1)
    assert_fails(done, r"the loss is (nan|inf) after step [1-6], at .* -learning_rate")
    assert (texts / "model-01.pkl").read_bytes() == before


def test_the_files_of_an_earlier_run_are_kept_and_can_be_gone_on_with(train, texts):
    train("-max_iters", 3)
    first = (texts / "model-01.pkl").read_bytes()
    assert not list(texts.glob("*.old.*"))
    assert "kept as" in train("-max_iters", 4, "-eval_interval", 2, "-seed", 2).stderr
    assert (texts / "model-01.old.pkl").read_bytes() == first != (texts / "model-01.pkl").read_bytes()
    train("-resume", "-model", "model-01.old.pkl", "-max_iters", 4)
    assert [row["step"] for row in metrics(texts, "model-01.old")] == ["3", "4"]


def test_the_files_of_an_earlier_run_are_kept_if_their_name_has_no_ending(train, texts):
    for max_iters in (3, 4):
        train("-model", "mine", "-max_iters", max_iters)
    assert "after step 3 of 3" in train("-model", "mine.old", "-resume").stdout


# Starting from a trained model ---------------------------------------------------------------------------------------


@pytest.fixture
def old_model(tmp_path):
    """A model of the characters "abc", in a file."""
    model = GPTLanguageModel(3, n_embd=16, n_head=2, n_layer=1, block_size=8)
    save_model(tmp_path / "old.pkl", model, Vocabulary("abc"))
    return model


def test_fine_tuning_keeps_what_is_known_and_grows_the_vocabulary(tmp_path, old_model):
    write_texts(tmp_path, "dcaé" * 20)
    flags = [*TINY, "-data_dir", str(tmp_path), "-init_from", str(tmp_path / "old.pkl")]
    model, vocabulary = training.starting_model(*training.parse_args(flags))
    assert vocabulary.characters == "abcdé"  # no line end: neither text has one
    known, new = [0, 1, 2], [3, 4]
    for name, weight in model.state_dict().items():
        old = old_model.state_dict()[name]
        if name.startswith(("token_embedding_table", "lm_head")):
            assert weight[known].equal(old) and len(weight) == 5, name
        else:
            assert weight.equal(old), name
    for table in (model.token_embedding_table, model.lm_head):
        assert 0.01 < table.weight[new].std() < 0.04  # as initialised


def test_fine_tuning_takes_the_shape_of_the_file(run_main, texts, old_model):
    flags = ["-init_from=old.pkl", "-device=cpu", "-max_iters=1", "-batch_size=4"]
    same = ["-n_embd=16", "-n_head=2", "-n_layer=1", "-block_size=8"]
    for shape in ([], same):
        assert run_main("training.py", *flags, *shape).returncode == 0
        model, _ = load_model(texts / "model-01.pkl")
        unlike = {"vocab_size": 3, "dropout": 0.2}  # the text decides these
        assert {**model.config, **unlike} == {**old_model.config, **unlike}
    for flag in ("-n_embd=32", "-n_head=4", "-n_layer=2", "-block_size=9"):
        name, _, value = flag.partition("=")
        assert_fails(run_main("training.py", *flags, flag), f"argument {name}: {value} contradicts", status=2)


def test_fine_tuning_begins_where_the_trained_model_ended(train, texts):
    shown = train("-max_iters", 100, "-eval_interval", 100, "-learning_rate", 0.02, "-warmup_iters", 5).stdout
    (texts / "model-01.pkl").rename(texts / "old.pkl")
    for more in ([], ["-init_from", "old.pkl"]):
        shown += train("-max_iters", 5, "-learning_rate", 1e-4, *more).stdout
    (_, trained, _), (_, fresh, _), (_, tuned, _) = evaluations(shown)
    assert abs(tuned - trained) < 0.1 < fresh - tuned


# Interrupting and going on -------------------------------------------------------------------------------------------

LONG = ["-max_iters", 30, "-eval_interval", 10, "-save_interval", 7, "-dropout", 0.2]


def everything_after(folder: Path) -> tuple:
    """All that a run leaves, less the seconds."""
    state = read_model_file(folder / "model-01.state.pkl")
    training_state = state.pop("training")
    for name in ("seconds", "metrics"):  # the metrics are compared below, without their seconds
        training_state["record"].pop(name)
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in metrics(folder)]
    return read_model_file(folder / "model-01.pkl"), state, training_state, rows


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.equal(b)
    elif isinstance(a, (dict, list, tuple)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert a == b


def during_each_step(monkeypatch, action) -> None:
    """Call `action` in each step, with the number that the step has when it is done."""
    get_batch = training.get_batch

    def act_and_get_batch(text, step, settings):
        action(step + 1)
        return get_batch(text, step, settings)

    monkeypatch.setattr(training, "get_batch", act_and_get_batch)


def interrupt_after(monkeypatch, last: int, number: int = signal.SIGINT) -> None:
    """Let Ctrl-C, or another signal, come in the middle of a step."""

    def interrupt(step: int) -> None:
        if step == last:
            signal.raise_signal(number)

    during_each_step(monkeypatch, interrupt)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_goes_on_to_the_same_bits(train, texts, monkeypatch, optimizer):
    train(*LONG, "-optimizer", optimizer)
    undisturbed = everything_after(texts)
    for step in (1, 13, 20):  # before anything is saved, between evaluations, and at one
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            errors = train(*LONG, "-optimizer", optimizer, status=130).stderr
        assert f"interrupted after step {step}; to go on: python training.py -resume" in errors
        assert f"after step {step} of 30" in train("-resume").stdout
        assert_same(everything_after(texts), undisturbed)


def test_a_resumed_run_may_become_longer(train, texts):
    train("-max_iters", 10, "-eval_interval", 5)
    assert "a schedule of 20 steps" in train("-resume", "-max_iters", 20).stderr
    rows = metrics(texts)
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    assert float(rows[2]["learning_rate"]) == pytest.approx(training.learning_rate_at(14, args("-max_iters", 20)))
    assert_fails(train("-resume", "-max_iters", 15, status=2), "argument -max_iters: ", status=2)
    assert "a higher -max_iters goes on" in train("-resume").stdout  # which is at its end and only reports


def test_rows_of_metrics_after_the_saved_state_are_dropped(train, texts, monkeypatch):
    train(*LONG)
    whole = metrics(texts)
    save_state = training.save_state

    def killed(run):
        if run.record.step == 20:  # evaluated, but not saved
            raise KeyboardInterrupt
        save_state(run)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", killed)
        train(*LONG, status=130)
    assert [row["step"] for row in metrics(texts)] == ["10", "20"]
    assert "after step 14 of 30" in train("-resume").stdout
    assert [row["val_loss"] for row in metrics(texts)] == [row["val_loss"] for row in whole]


def test_flags_that_repeat_the_saved_run_are_welcome(train, texts, finished_run):
    put(texts, finished_run)
    train("-resume", "-model=run.pkl", *TINY, "-max_iters", 3)


@pytest.mark.parametrize("content", ["the cat sat on the mat\n" * 201, "the cat sat on the mat\n" * 199 + "tac" * 8])
def test_a_run_does_not_go_on_with_other_texts(train, texts, finished_run, content):
    write_texts(put(texts, finished_run), content[: 23 * 201])
    assert_fails(train("-resume", "-model=run.pkl", status=1), "the texts are not those")


def first(optimizer_state: dict) -> dict:
    return optimizer_state["optimizer"]["parts"][0][0]


def momentum_only(weight_state: dict) -> None:
    """What Muon keeps for a weight, in place of what AdamW keeps."""
    weight_state["momentum"] = weight_state["exp_avg"]
    del weight_state["exp_avg"], weight_state["exp_avg_sq"], weight_state["step"]


DAMAGES = {
    "training is a number": lambda content: content.update(training=3),
    "arguments are numbers": lambda content: content["training"].update(arguments=[1, 2]),
    "no record": lambda content: content["training"].pop("record"),
    "a record of text": lambda content: content["training"].update(record="a"),
    "a step of text": lambda content: content["training"]["record"].update(step="a"),
    "more than a record": lambda content: content["training"]["record"].update(more=1),
    "less than a record": lambda content: content["training"]["record"].pop("best_loss"),
    "no texts": lambda content: content["training"].pop("texts"),
    "no optimizer": lambda content: content["training"]["optimizer"].update(parts=[]),
    "an optimizer of lists": lambda content: content["training"]["optimizer"].update(parts=[[1]]),
    "an optimizer of text": lambda content: content["training"].update(optimizer="adamw"),
    "other names": lambda content: first(content["training"]).update(nonsense=torch.zeros(1)),
    "other shapes": lambda content: first(content["training"]).update(exp_avg=torch.zeros(99)),
    "numbers for tensors": lambda content: first(content["training"]).update(exp_avg=1.0),
    "one number for many": lambda content: first(content["training"]).update(exp_avg=torch.zeros(())),
    "one number in many places": lambda content: first(content["training"]).update(
        exp_avg=torch.zeros(1).expand(11, 16)
    ),
    "many steps": lambda content: first(content["training"]).update(step=torch.zeros(11, 16)),
    "the other optimizer": lambda content: momentum_only(first(content["training"])),
    "fewer weights": lambda content: content["training"]["optimizer"]["parts"][0].pop(0),
    "steps before the first": lambda content: content["training"]["record"].update(step=-1),
    "metrics of text": lambda content: content["training"]["record"].update(metrics=[["1"] * 6]),
    "metrics that end early": lambda content: content["training"]["record"].update(metrics=[[1.0] * 5]),
    "no training": lambda content: content.pop("training"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_state_is_a_sentence(train, texts, finished_run, damage):
    path = put(texts, finished_run) / "run.state.pkl"
    content = read_model_file(path)
    damage(content)
    torch.save(content, path)
    done = train("-resume", "-model=run.pkl", "-max_iters", 4, status=1)
    assert_fails(done, "run.state.pkl: does not hold a run to go on with")


def test_a_state_can_not_name_a_file_to_write(train, texts, finished_run):
    path = put(texts, finished_run) / "run.state.pkl"
    content = read_model_file(path)
    content["training"]["arguments"] += ["-plot=loss.png", "-model=other.pkl"]
    torch.save(content, path)
    before = read_folder(texts).keys()
    done = train("-resume", "-model=run.pkl", "-max_iters", 4)
    assert read_folder(texts).keys() == before and "picture" not in done.stderr


def test_a_state_of_an_earlier_version_is_a_sentence(train, texts, finished_run):
    path = put(texts, finished_run) / "run.state.pkl"
    content = read_model_file(path)
    content["training"] = {"arguments": [], "progress": [2, 0.1, 2.0, 2, 0], "texts": [4600, 4600]}
    torch.save(content, path)
    done = train("-resume", "-model=run.pkl", status=1)
    assert_fails(done, "run.state.pkl: was saved by another version of training.py, .* -init_from run.state.pkl starts")


# One run never destroys another --------------------------------------------------------------------------------------


def test_models_whose_names_have_dots_keep_states_of_their_own(train, texts):
    train("-model", "gpt-v1.0", "-max_iters", 2)
    first = read_folder(texts)
    train("-model", "gpt-v1.1", "-max_iters", 3)
    after = read_folder(texts)
    assert {name: after[name] for name in first} == first
    assert "after step 2 of 2" in train("-resume", "-model", "gpt-v1.0").stdout
    assert "after step 3 of 3" in train("-resume", "-model", "gpt-v1.1").stdout


def test_a_state_under_the_name_of_another_model_is_refused(train, texts, finished_run):
    put(texts, finished_run)
    (texts / "run.state.pkl").rename(texts / "other.state.pkl")
    shutil.copy(texts / "run.pkl", texts / "other.pkl")
    done = train("-resume", "-model=other.pkl", status=1)
    assert_fails(done, "other.state.pkl: is the state of 'run.pkl', not of 'other.pkl'")


@pytest.mark.parametrize(("first", "second"), [("run", "run.pkl"), ("run.pkl", "run")])
def test_a_model_that_would_share_its_state_with_another_is_refused(train, texts, first, second):
    train("-model", first, "-max_iters", 1)
    before = read_folder(texts)
    done = train("-model", second, "-max_iters", 1, status=1)
    assert_fails(done, f"{second}: would share its state and metrics with {first}; name another -model")
    assert read_folder(texts) == before


def test_a_model_can_not_have_the_name_of_a_state(train):
    assert_fails(train("-model", "run.state.pkl", status=2), "argument -model: run.state.pkl is the name of a state", 2)


@pytest.mark.parametrize("start", ["model-01.old.pkl", "model-01.old.state.pkl", "./model-01.pkl"])
def test_the_file_that_a_run_starts_from_stays(train, texts, start):
    for max_iters in (1, 2):
        train("-max_iters", max_iters)
    before = (texts / start).read_bytes()
    train("-init_from", start, "-max_iters", 1)
    kept = "model-01.old.pkl" if start == "./model-01.pkl" else start  # which the new run's model replaces
    assert (texts / kept).read_bytes() == before


@posix
def test_links_stay_and_their_targets_are_replaced(train, texts):
    names = ("model-01.pkl", "model-01.state.pkl", "model-01.metrics.csv")
    disk = texts / "disk"
    disk.mkdir()
    for name in names:
        (texts / name).symlink_to(disk / name)
    for max_iters in (1, 2):  # with nothing at the targets, and with an earlier run's files
        train("-max_iters", max_iters, "-eval_interval", 1)
        assert all((texts / name).is_symlink() for name in names)
        assert len(metrics(disk)) == max_iters
        assert read_model_file(disk / "model-01.state.pkl")["training"]["record"]["step"] == max_iters
        load_model(disk / "model-01.pkl")
    assert read_model_file(texts / "model-01.old.state.pkl")["training"]["record"]["step"] == 1


def test_without_its_best_model_a_run_goes_on_from_the_state(train, texts):
    train("-max_iters", 4, "-eval_interval", 2)
    for more, step in (([], 4), (["-max_iters", 6], 6)):  # at its end, and before
        (texts / "model-01.pkl").unlink()
        done = train("-resume", *more)
        assert "model-01.pkl is gone: the run goes on with the weights of step 4" in done.stderr
        assert f"best model, of step {step}" in done.stdout
        load_model(texts / "model-01.pkl")


def test_evaluation_sees_the_same_rows_when_a_run_becomes_longer(train, texts):
    """The validation text has 575 windows: few enough to be evaluated whole only in a run of many steps."""
    flags = ["-batch_size", 64, "-eval_interval", 100, "-learning_rate", 0, "-min_lr", 0, "-dtype", "float32"]
    write_texts(texts, val="the mat sat on the cat\n" * 200)
    short = evaluations(train(*flags, "-max_iters", 1).stdout)
    longer = evaluations(train("-resume", "-max_iters", 100).stdout)
    assert short[0][1] == longer[0][1]  # nothing was learnt in between


def test_the_dtype_is_part_of_the_run(train, texts, monkeypatch):
    monkeypatch.setattr(training, "default_dtype", lambda device: torch.bfloat16)
    train("-max_iters", 2)
    assert "much faster" not in train("-resume").stderr
    monkeypatch.setattr(training, "default_dtype", lambda device: torch.float32)
    done = train("-resume", "-max_iters", 3)
    assert "bfloat16" in done.stdout
    assert "this run multiplies in bfloat16; here, float32 may be much faster: -dtype float32" in done.stderr
    done = train("-resume", "-max_iters", 4, "-dtype", "float32")
    assert "float32" in done.stdout and "much faster" not in done.stderr


def test_a_run_can_change_to_float16_and_back(train):
    train("-max_iters", 2, "-dtype", "float32")
    for max_iters, dtype in ((3, "float16"), (4, "float32"), (5, "float16")):
        assert dtype in train("-resume", "-max_iters", max_iters, "-dtype", dtype).stdout


# Interrupting --------------------------------------------------------------------------------------------------------


def open_terminal() -> tuple[int, int]:
    """Return both ends of a terminal of 80 columns."""
    import fcntl
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    return master, slave


@signals
@pytest.mark.parametrize("terminal", [True, False])
def test_a_closed_terminal_saves_the_run(texts, run_main, monkeypatch, terminal):
    """With a terminal that is gone, whatever the run prints from then on can't be written."""
    streams = {}
    if terminal:
        master, slave = open_terminal()
        streams = {"stdout": open(slave, "w", closefd=False), "stderr": open(slave, "w", closefd=False)}  # noqa: SIM115

    def close(step: int) -> None:
        if step == 3:
            if terminal:
                os.close(master)
            signal.raise_signal(signal.SIGHUP)

    during_each_step(monkeypatch, close)
    done = run_main("training.py", *ENDLESS, **streams)
    assert done.returncode == 128 + signal.SIGHUP
    assert read_model_file(texts / "model-01.state.pkl")["training"]["record"]["step"] == 3
    if terminal:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.write(slave, b"what the run would have to show")
        os.close(slave)


@signals
def test_a_run_that_is_to_outlive_its_terminal_ignores_the_closing(train, texts, monkeypatch):
    def hang_up(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGHUP)
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    during_each_step(monkeypatch, hang_up)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    train("-max_iters", 10**6, status=128 + signal.SIGINT)
    assert read_model_file(texts / "model-01.state.pkl")["training"]["record"]["step"] == 4


@signals
def test_an_interrupted_run_prints_the_command_that_goes_on(texts, start_script, run_main, monkeypatch):
    def run_apart(*command: str) -> tuple[int, str, str]:
        run = start_script(*command)
        wait_until_shown(run, "loss")  # the progress bar, once it has drawn a few steps
        run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=60)
        return run.returncode, output, errors

    def run_here(*command: str) -> tuple[int, str, str]:
        interrupt_after(monkeypatch, int(steps[0]) + 3, signal.SIGTERM)
        done = run_main(*command)
        return done.returncode, done.stdout, done.stderr

    command, steps = shlex.join(["training.py", *map(str, ENDLESS), "-model=mine.pkl"]), []
    for run, status in ((run_apart, 130), (run_here, 143)):
        returncode, output, errors = run(*shlex.split(command))
        assert returncode == status and "Traceback" not in errors
        assert all(f"after step {step} of 1000000" in output for step in steps)
        step, command = re.search(r"interrupted after step (\d+); to go on: python (.*)", errors).groups()
        steps.append(step)
    assert int(steps[1]) > int(steps[0])
    model, vocabulary = load_model(texts / "mine.state.pkl")  # can be talked to before the first evaluation
    assert len(vocabulary) == model.config["vocab_size"] == 11


@signals
def test_a_second_interrupt_ends_at_once(texts, start_script):
    # A step takes long, though no operation in it does: two signals that arrive during one would come as one.
    shape = ["-n_embd=64", "-n_head=1", "-n_layer=100", "-block_size=64", "-batch_size=128", "-device=cpu"]
    run = start_script("training.py", *shape, cwd=texts)
    wait_until_shown(run, "learning rate", "stdout")  # the last line before the first step
    for _ in range(2):
        time.sleep(0.3)  # more than a busy machine lets a process wait
        run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=5)
    assert run.returncode == -signal.SIGINT and "Traceback" not in errors  # which a shell calls 130
    assert not (texts / "model-01.state.pkl").exists()


def kill_and_go_on(folder: Path, kills: int, start_script, run_main, flags: list) -> list[int]:
    """Kill a run at random moments, going on after each, until it ends; the steps at which it went on."""
    chance, resumed = random.Random(kills), []
    for _ in range(kills):
        run = start_script("training.py", *flags, cwd=folder)
        flags = ["-resume"]
        while not (folder / "model-01.state.pkl").exists():  # before that there is nothing to go on with
            time.sleep(0.01)
            assert run.poll() is None
        wait_until_shown(run, "loss")
        time.sleep(chance.uniform(0, 0.5))
        run.kill()
        output, _ = run.communicate()
        resumed += map(int, re.findall(r"after step (\d+) of", output))
    done = run_main("training.py", "-resume", cwd=folder)
    assert done.returncode == 0, done.stderr
    return resumed + [int(step) for step in re.findall(r"after step (\d+) of", done.stdout)]


def check_kills(folder: Path, start_script, run_main, kills: int, steps: int) -> list[int]:
    flags = [*TINY, "-max_iters", steps, "-eval_interval", 40, "-save_interval", 4]  # most of the time is saving
    disturbed, undisturbed = folder / "disturbed", folder / "undisturbed"
    for apart in (disturbed, undisturbed):
        write_texts(apart)
    resumed = kill_and_go_on(disturbed, kills, start_script, run_main, flags)
    assert run_main("training.py", *flags, cwd=undisturbed).returncode == 0
    assert len(resumed) == kills and resumed == sorted(resumed) and resumed[-1] < steps
    assert_same(everything_after(disturbed), everything_after(undisturbed))
    litter = {path.name for path in disturbed.iterdir()} - {path.name for path in undisturbed.iterdir()}
    assert not litter
    return resumed


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, start_script, run_main, short_samples):
    check_kills(tmp_path, start_script, run_main, kills=1, steps=200)


@pytest.mark.soak
def test_a_run_killed_20_times_goes_on_to_the_same_bits(tmp_path, start_script, run_main):
    print("went on after steps", check_kills(tmp_path, start_script, run_main, kills=20, steps=8000))


# Surroundings --------------------------------------------------------------------------------------------------------


class Notebook(io.StringIO):
    """A stream as in IDLE and Jupyter: text without an encoding to change, a file or a buffer."""

    encoding = errors = buffer = property(lambda self: None)


def test_it_runs_with_the_streams_of_a_notebook(texts, run_main):
    output = Notebook()
    done = run_main("training.py", *TINY, "-max_iters", 2, stdout=output, stderr=Notebook(), stdin=Notebook())
    assert done.returncode == 0 and "best model" in output.getvalue()


def test_without_a_terminal_there_is_no_bar_but_a_line_now_and_then(train, monkeypatch):
    errors = train("-max_iters", 50).stderr
    assert re.fullmatch(r"step 1/50: loss [\d.]+, [\d,]+ tok/s, \d\d:\d\d left\n", errors)
    minutes = iter(range(0, 10**6, 30))  # half a minute passes between two looks at the clock
    monkeypatch.setattr(training.time, "monotonic", lambda: next(minutes))
    lines = train("-max_iters", 50).stderr.splitlines()
    assert len(lines) > 5 and all(re.match(r"step \d+/50: loss|the earlier", line) for line in lines)


@posix
def test_on_a_terminal_there_is_a_bar(texts, run_main):
    master, slave = open_terminal()
    with open(slave, "w") as terminal:
        done = run_main("training.py", *TINY, "-max_iters", 5, stderr=terminal)
        shown = os.read(master, 10_000)
    os.close(master)
    assert done.returncode == 0
    states = re.findall(rb"\rstep (\d)/5: loss [\d.]+, [\d,]+ tok/s, \d\d:\d\d left \|.*?\| +(\d+)%", shown)
    assert states[0] == (b"1", b"20")
    assert states[-1] == (b"5", b"100")


def test_the_time_left_counts_the_evaluations(texts, monkeypatch):
    run = new_run(texts, "-max_iters", 100, "-eval_interval", 10, "-eval_iters", 6)
    progress = training.Progress(run.settings, 0, training.evaluation_rows(run))
    # 24 rows of each text, at a third of the cost in training, of which a step has 4: an evaluation is like 4 steps.
    assert progress.work_until(9) == 9 and progress.work_until(10) == pytest.approx(14)
    assert progress.work_until(100) == pytest.approx(140)


def test_a_text_that_can_not_be_mapped_is_read(train, texts, monkeypatch):
    train("-max_iters", 3)
    expected = weights(texts)

    def refuse(*args, **options):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(training.mmap, "mmap", refuse)
    done = train("-max_iters", 3)
    assert "output_train.txt: read into memory, as it can't be mapped here (No such device)" in done.stderr
    assert weights(texts).equal(expected)


def fail_with(monkeypatch, error: Exception) -> None:
    def fail(*args):
        raise error

    monkeypatch.setattr(training, "get_batch", fail)


FORESEEN = [
    (MemoryError(), "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "not enough memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "not enough memory"),
    (RuntimeError("Invalid buffer size: 128.00 GiB"), "not enough memory"),
    (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), "lost another"),
    (torch.distributed.DistBackendError("NCCL error: remote process exited"), "lost another process"),
]
UNFORESEEN = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("shared memory of the kernel is not aligned"),
    RuntimeError("the gloo backend does not support this operation"),
    OSError(errno.ENODEV, "No such device"),
    ValueError("too big a surprise"),
]


@pytest.mark.parametrize(("error", "message"), FORESEEN, ids=str)
def test_an_error_that_can_be_foreseen_is_a_sentence(train, monkeypatch, error, message):
    fail_with(monkeypatch, error)
    assert_fails(train(status=1), message)


@pytest.mark.parametrize("error", UNFORESEEN, ids=str)
def test_an_error_that_nobody_foresaw_keeps_its_traceback(texts, run_main, monkeypatch, error):
    fail_with(monkeypatch, error)
    with pytest.raises(type(error), match=re.escape(str(error))):
        run_main("training.py", *TINY)


def test_help_names_every_flag_once_with_its_default(run_main):
    shown = run_main("training.py", "-h").stdout
    assert "-batch_size N " in shown and "(default: 32)" in shown
    assert "--batch_size" not in shown and "BATCH_SIZE" not in shown and "None" not in shown and "False" not in shown
    flags = re.findall(r"^  (-\w+)", shown, re.MULTILINE)
    assert len(flags) == len(set(flags)) == 28 + 1  # -h is one of them


def test_a_picture_has_the_models_name_as_it_is(train, texts):
    pytest.importorskip("matplotlib")
    train("-max_iters", 2, "-model", "a_$b$_{c.pkl", "-plot", "loss.svg")
    assert "a_$b$_{c" in (texts / "loss.svg").read_text(encoding="utf-8")  # a comment beside the drawn letters


# From end to end -----------------------------------------------------------------------------------------------------


def test_the_three_commands_lead_from_text_to_an_answer(tmp_path, run_script):
    put(tmp_path, {"mine/own.txt": (MIXED * 40).encode()})
    extraction = run_script("data_extract.py", "-data_dir", "mine")
    assert extraction.returncode == 0, extraction.stderr
    run = run_script("training.py", *TINY, "-max_iters", 6, "-eval_interval", 3, "--learning_rate", "0.01")
    assert run.returncode == 0, run.stderr
    assert [step for step, _, _ in evaluations(run.stdout)] == [3, 6]
    assert "tok/s" in run.stderr  # the progress bar
    chat = run_script("chatbot.py", "-max_new_tokens", 12, "-device", "cpu", stdin="Plain\nПривет\n")
    assert chat.returncode == 0, chat.stderr
    completions = chat.stdout.split("Completion:\n")[1:]
    assert len(completions) == 2 and completions[0].startswith("Plain") and completions[1].startswith("Привет")
    assert len(completions[0].removesuffix("\n")) == len("Plain") + 12
