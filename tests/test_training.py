"""training.py: rows drawn from any text, a recipe that learns, and runs that can be stopped, resumed and trusted."""

import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, assert_fails, metrics, put, signals, wait_until_shown, write_texts

import training
from model import GPTLanguageModel, Vocabulary, load_model, read_model_file, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = "Plain text, Привет мир, γειά, 中文字符, नमस्ते, שלום, “quoted” – é🙂🚀\n"
CPU = torch.device("cpu")
ADDMM = torch.addmm
SAME = ["-max_iters", 50, "-eval_interval", 5, "-dropout", 0, "-learning_rate", 0.01, "-dtype", "float32"]


def args(*flags):
    return training.parse_args([*TINY, *map(str, flags)])


def open_text(folder: Path, block_size: int) -> training.Text:
    vocabulary = Vocabulary.from_file(folder / "vocab.txt")
    return training.Text(folder / "output_train.txt", vocabulary, block_size)


def shuffled_text(count: int) -> str:
    characters = list(MIXED * count)
    random.Random(1).shuffle(characters)
    return "".join(characters)


@pytest.fixture
def train(texts, run_main):
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
    assert (recipe.min_lr, recipe.warmup_iters) == (0.05, 20)
    assert args("-max_iters", 10_000).warmup_iters == 150
    assert args("-optimizer", "muon").learning_rate > args().learning_rate
    assert args("-optimizer", "muon").min_lr == 0


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
    optimizer.step(0)
    for name, parameter in model.named_parameters():
        assert (parameter.norm() < before[name].norm()) if parameter.dim() == 2 else parameter.equal(before[name]), name


def test_muon_gets_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = GPTLanguageModel(7, n_embd=8, n_head=2, n_layer=3, block_size=4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon, adamw = training.Optimizer(model, args("-optimizer", "muon", "-weight_decay", 0)).parts
    muon.join_gradients()
    muon.step()
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) == (parameter.dim() < 2 or not name.startswith("blocks.")), name
    model.load_state_dict(before)
    adamw.step()
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) == (parameter.dim() == 2 and name.startswith("blocks.")), name


def test_muon_turns_the_heads_of_a_layer_together():
    model = GPTLanguageModel(7, n_embd=16, n_head=2, n_layer=1, block_size=4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    heads = [head.value.weight for head in model.blocks[0].sa.heads]
    joined = torch.nn.Parameter(torch.cat(heads))
    joined.grad = torch.cat([weight.grad for weight in heads])
    torch.optim.Muon([joined], weight_decay=0.1).step()
    muon, _ = training.Optimizer(model, args("-optimizer", "muon", "-weight_decay", 0.1)).parts
    muon.join_gradients()
    muon.param_groups[0]["lr"] = 1e-3  # torch's default
    muon.step()
    torch.testing.assert_close(torch.cat(heads), joined, atol=1e-5, rtol=0)


def test_muon_works_in_float32_where_bfloat16_is_slow(monkeypatch):
    seen = []
    monkeypatch.setattr(training, "default_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: seen.append(args[0].dtype) or ADDMM(*args, **kwargs))
    model = GPTLanguageModel(7, n_embd=16, n_head=2, n_layer=1, block_size=4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    training.Optimizer(model, args("-optimizer", "muon")).step(0)
    assert seen and set(seen) == {torch.float32}


def test_a_clip_of_0_clips_nothing(train, texts):
    without, with_a_high_one, with_a_low_one = (
        train("-max_iters", 3, "-grad_clip", clip) and weights(texts) for clip in (0, 1e9, 0.01)
    )
    assert without.equal(with_a_high_one) and not without.equal(with_a_low_one)


def test_float16_scales_gradients_and_skips_a_step_that_overflows(texts):
    recipe = args("-dtype", "float16", "-dropout", 0)
    model, text = GPTLanguageModel(11, 16, 2, 1, 8, dropout=0.0), open_text(texts, 8)
    optimizer = training.Optimizer(model, recipe)
    scale = optimizer.scaler.get_scale()
    assert scale > 1

    def learn(step: int) -> float:
        return training.train_step(model, optimizer, training.get_batch(text, step, recipe), step, recipe).item()

    losses = [learn(step) for step in range(60)]
    assert losses[-1] < losses[0] - 0.3
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer.scaler.load_state_dict({**optimizer.scaler.state_dict(), "scale": 2.0**120})
    learn(60)
    assert_same(dict(model.state_dict()), before)
    assert optimizer.scaler.get_scale() < 2.0**120


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_in_parts_learns_as_a_whole_one_does(train, texts, optimizer):
    train(*SAME, "-optimizer", optimizer)
    whole = losses(texts)
    train(*SAME, "-optimizer", optimizer, "-grad_accum", 4)
    assert losses(texts) == pytest.approx(whole, abs=1e-4) and min(whole) < max(whole) - 0.2


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


# Many processes ------------------------------------------------------------------------------------------------------

ENDLESS = [*TINY, "-max_iters", 10**6, "-eval_interval", 10**6]


def children(process) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


needs_pgrep = pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the processes with pgrep")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_learn_as_one_and_go_on_as_one(train, texts, start_script, optimizer):
    run = start_script("training.py", *TINY, *SAME, "-optimizer", optimizer, "-model", "two.pkl", processes=2)
    train(*SAME, "-optimizer", optimizer)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "2 processes" in output and output.count("best model") == 1  # the first process speaks for all
    assert losses(texts, "two") == pytest.approx(losses(texts), abs=1e-4)
    assert "after step 50 of 51" in train("-resume", "-model", "two.pkl", "-max_iters", 51).stdout


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
    assert run.returncode != 0 and state["progress"][0] == int(step)


# Evaluating ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 7, 64])
def test_evaluation_predicts_every_character_but_the_first_once(tmp_path, monkeypatch, block_size):
    monkeypatch.setattr(training, "CHUNK", 10)  # so that chunks end inside windows and inside characters
    vocabulary = Vocabulary(MIXED)
    for length in range(block_size + 1, block_size + 70):
        content = shuffled_text(2)[:length]
        text = open_text(write_texts(tmp_path, content, vocabulary=MIXED), block_size)
        batches, whole = training.evaluation_batches(text, 70, 1, args("-batch_size", 3, "-block_size", block_size))
        rows = [row.tolist() for offsets, row_length in batches for row in text.rows(offsets, row_length)]
        assert whole and all(len(row) == block_size + 1 for row in rows[:-1])
        assert vocabulary.decode([rows[0][0], *(i for row in rows for i in row[1:])]) == content


def test_the_loss_of_a_whole_text_is_the_mean_over_its_characters(tmp_path):
    content = shuffled_text(3)[:101]
    text = open_text(write_texts(tmp_path, content), 8)
    vocabulary = Vocabulary.from_file(tmp_path / "vocab.txt")
    model = GPTLanguageModel(len(vocabulary), 16, 2, 1, 8)
    torch.nn.init.normal_(model.lm_head.weight)  # so that characters differ in their loss
    batches, whole = training.evaluation_batches(text, 13, 1, args("-batch_size", 3))
    losses, ids = [], vocabulary.encode(content)
    model.eval()
    for i in range(1, 101):
        start = (i - 1) // 8 * 8
        logits, _ = model(torch.tensor([ids[start:i]]))
        losses.append(-logits[0, -1].log_softmax(0)[ids[i]].item())
    assert whole
    assert training.mean_loss(model, text, batches, CPU) == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_text_too_long_to_evaluate_whole_is_seen_at_fixed_places(texts):
    text = open_text(texts, 8)
    first, second = (training.evaluation_batches(text, 10, 30, args()) for _ in range(2))
    assert not first[1] and sum(len(offsets) for offsets, _ in first[0]) == 30
    assert all(np.array_equal(a, b) and length == 9 for (a, length), (b, _) in zip(first[0], second[0]))
    assert training.evaluation_batches(text, 575, 30, args())[1]  # 4600 characters are 575 windows


def test_evaluation_leaves_the_model_as_it_was(texts):
    text = open_text(texts, 8)
    model = GPTLanguageModel(len(Vocabulary.from_file(texts / "vocab.txt")), 16, 2, 1, 8).train()
    batches, _ = training.evaluation_batches(text, 0, 16, args())
    first, second = (training.mean_loss(model, text, batches, CPU) for _ in range(2))
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
    end = output.splitlines()[-1]
    nats, bits = map(
        float, re.search(r"([\d.]+) nats = ([\d.]+) bits per character over the whole valid", end).groups()
    )
    assert nats == pytest.approx(best, abs=2e-4) and bits == pytest.approx(nats / math.log(2), abs=1e-3)
    assert "python chatbot.py" in end
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
    first, again, other = (train("-max_iters", 5, "-seed", seed) and weights(texts) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_two_lines_of_the_models_own_text_follow_each_evaluation(train):
    lines = train("-max_iters", 4, "-eval_interval", 2).stdout.splitlines()
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


def test_patience_stops_a_run(train, texts):
    validate_with_other_text(texts)
    output = train(*OVERFITTING, "-max_iters", 200, "-patience", 3).stdout
    steps, losses, _ = zip(*evaluations(output))
    assert len(losses) == losses.index(min(losses)) + 1 + 3 and steps[-1] < 200
    assert "best model, of step" in output


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
    assert "after step 3 of 3" in train("-model", "mine.old.pkl", "-resume").stdout


# Starting from a trained model ---------------------------------------------------------------------------------------


@pytest.fixture
def old_model(tmp_path):
    """A model of the characters "abc", in a file."""
    model = GPTLanguageModel(3, n_embd=16, n_head=2, n_layer=1, block_size=8)
    save_model(tmp_path / "old.pkl", model, Vocabulary("abc"))
    return model


def test_fine_tuning_keeps_what_is_known_and_grows_the_vocabulary(tmp_path, old_model):
    write_texts(tmp_path, "dcaé\n" * 20)
    start = args("-data_dir", tmp_path, "-init_from", tmp_path / "old.pkl")
    model, vocabulary = training.starting_model(start)
    assert vocabulary.characters == "\nabcdé"
    known, new = [1, 2, 3], [0, 4, 5]
    for name, weight in model.state_dict().items():
        old = old_model.state_dict()[name]
        if name.startswith(("token_embedding_table", "lm_head")):
            assert weight[known].equal(old) and len(weight) == 6, name
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
        assert {**model.config, "vocab_size": 3} == {**old_model.config, "vocab_size": 3}
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
    training_state["progress"][1] = 0
    training_state.pop("metrics")  # those of the file
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


def interrupt_after(monkeypatch, step: int) -> None:
    """Let Ctrl-C come in the middle of a step."""
    train_step = training.train_step

    def interrupted(model, optimizer, batch, current, args):
        if current + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return train_step(model, optimizer, batch, current, args)

    monkeypatch.setattr(training, "train_step", interrupted)


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
    state = training.Run.save_state

    def killed(self):
        if self.step == 20:  # evaluated, but not saved
            raise KeyboardInterrupt
        state(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "save_state", killed)
        train(*LONG, status=130)
    assert [row["step"] for row in metrics(texts)] == ["10", "20"]
    assert "after step 14 of 30" in train("-resume").stdout
    assert [row["val_loss"] for row in metrics(texts)] == [row["val_loss"] for row in whole]


def test_flags_that_repeat_the_saved_run_are_welcome(train, texts, finished_run):
    put(texts, finished_run)
    train("-resume", "-model=run.pkl", *TINY, "-max_iters", 3)


def test_a_run_does_not_go_on_with_other_texts(train, texts, finished_run):
    write_texts(put(texts, finished_run), "the cat sat on the mat\n" * 201)
    assert_fails(train("-resume", "-model=run.pkl", status=1), "the texts are not those")


def first(optimizer_state: dict) -> dict:
    return optimizer_state["optimizer"]["parts"][0][0]


def momentum_only(weight_state: dict) -> None:
    """What Muon keeps for a weight, in place of what AdamW keeps."""
    weight_state["momentum_buffer"] = weight_state["exp_avg"]
    del weight_state["exp_avg"], weight_state["exp_avg_sq"], weight_state["step"]


DAMAGES = {
    "training is a number": lambda content: content.update(training=3),
    "arguments are numbers": lambda content: content["training"].update(arguments=[1, 2]),
    "no progress": lambda content: content["training"].pop("progress"),
    "progress of text": lambda content: content["training"].update(progress=["a"] * 5),
    "no optimizer": lambda content: content["training"]["optimizer"].update(parts=[]),
    "an optimizer of lists": lambda content: content["training"]["optimizer"].update(parts=[[1]]),
    "an optimizer of text": lambda content: content["training"].update(optimizer="adamw"),
    "other names": lambda content: first(content["training"]).update(nonsense=torch.zeros(1)),
    "other shapes": lambda content: first(content["training"]).update(exp_avg=torch.zeros(99)),
    "numbers for tensors": lambda content: first(content["training"]).update(exp_avg=1.0),
    "one number for many": lambda content: first(content["training"]).update(exp_avg=torch.zeros(())),
    "many steps": lambda content: first(content["training"]).update(step=torch.zeros(11, 16)),
    "the other optimizer": lambda content: momentum_only(first(content["training"])),
    "fewer weights": lambda content: content["training"]["optimizer"]["parts"][0].pop(0),
    "steps before the first": lambda content: content["training"]["progress"].__setitem__(0, -1),
    "metrics of text": lambda content: content["training"].update(metrics=[["1"] * 6]),
    "metrics that end early": lambda content: content["training"].update(metrics=[[1.0] * 5]),
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


@signals
def test_an_interrupted_run_prints_the_command_that_goes_on(texts, start_script):
    command, steps = shlex.join(["training.py", *map(str, ENDLESS), "-model=mine.pkl"]), []
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = start_script(*shlex.split(command))
        wait_until_shown(run, "loss")  # the progress bar, once it has drawn a few steps
        run.send_signal(number)
        output, errors = run.communicate(timeout=60)
        assert run.returncode == status and "Traceback" not in errors
        assert all(f"after step {step} of 1000000" in output for step in steps)
        step, command = re.search(r"interrupted after step (\d+); to go on: python (.*)", errors).groups()
        steps.append(step)
    assert int(steps[1]) > int(steps[0])
    model, vocabulary = load_model(texts / "mine.state.pkl")  # can be talked to before the first evaluation
    assert len(vocabulary) == model.config["vocab_size"] == 11


@signals
def test_a_second_interrupt_ends_at_once(texts, start_script):
    shape = ["-n_embd=512", "-n_layer=8", "-block_size=256", "-batch_size=256", "-device=cpu"]  # a step takes long
    run = start_script("training.py", *shape, cwd=texts)
    wait_until_shown(run, "0%")
    for _ in range(2):
        time.sleep(2)  # or, on a busy machine, two signals could come as one
        run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=5)
    assert run.returncode == -signal.SIGINT and "Traceback" not in errors  # which a shell calls 130
    assert not (texts / "model-01.state.pkl").exists()


def kill_and_go_on(folder: Path, kills: int, start_script, flags: list) -> list[int]:
    """Kill a run at random moments, going on after each, until it ends; the steps at which it went on."""
    chance, resumed = random.Random(kills), []
    run = start_script("training.py", *flags, cwd=folder)
    for _ in range(kills):
        while not (folder / "model-01.state.pkl").exists():  # before that there is nothing to go on with
            time.sleep(0.01)
            assert run.poll() is None
        wait_until_shown(run, "loss")
        time.sleep(chance.uniform(0, 0.5))
        run.kill()
        output, _ = run.communicate()
        resumed += map(int, re.findall(r"after step (\d+) of", output))
        run = start_script("training.py", "-resume", cwd=folder)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    return resumed + [int(step) for step in re.findall(r"after step (\d+) of", output)]


def check_kills(folder: Path, start_script, kills: int, steps: int) -> list[int]:
    flags = [*TINY, "-max_iters", steps, "-eval_interval", 20, "-save_interval", 2]  # most of the time is saving
    disturbed, undisturbed = folder / "disturbed", folder / "undisturbed"
    for apart in (disturbed, undisturbed):
        write_texts(apart)
    whole = start_script("training.py", *flags, cwd=undisturbed)
    resumed = kill_and_go_on(disturbed, kills, start_script, flags)
    assert whole.communicate(timeout=600) and whole.returncode == 0
    assert len(resumed) == kills and resumed == sorted(resumed) and resumed[-1] < steps
    assert_same(everything_after(disturbed), everything_after(undisturbed))
    litter = {path.name for path in disturbed.iterdir()} - {path.name for path in undisturbed.iterdir()}
    assert not litter
    return resumed


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, start_script):
    check_kills(tmp_path, start_script, kills=1, steps=400)


@pytest.mark.soak
def test_a_run_killed_20_times_goes_on_to_the_same_bits(tmp_path, start_script):
    print("went on after steps", check_kills(tmp_path, start_script, kills=20, steps=8000))


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
