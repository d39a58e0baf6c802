"""training.py: rows drawn from memory-mapped text, the recipe, and runs as a person starts and stops them."""

import csv
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import training
from model import GPTLanguageModel, ModelFileError, Vocabulary, load_model, read_model_file, save_model

SCRIPTS = "Plain text, Привет мир, γειά, 中文字符, नमस्ते, שלום, “quoted” – é🙂🚀\n"
CPU = torch.device("cpu")
ADDMM = torch.addmm
TINY = ["-batch_size=4", "-block_size=8", "-n_embd=16", "-n_head=2", "-n_layer=1", "-eval_iters=2", "-device=cpu"]


def write_texts(folder: Path, train: str, val: str | None = None, vocabulary: str | None = None) -> Path:
    val = val or train
    for name, text in (("output_train.txt", train), ("output_val.txt", val)):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    characters = sorted(set(vocabulary or train + val))
    (folder / "vocab.txt").write_text("".join(f"{c}\n" for c in characters), encoding="utf-8", newline="\n")
    return folder


@pytest.fixture
def texts(tmp_path):
    """A folder with texts long enough for the TINY shape."""
    return write_texts(tmp_path, "the cat sat on the mat\n" * 200, "the mat sat on the cat\n" * 20)


def open_text(folder: Path, block_size: int) -> training.Text:
    vocabulary = Vocabulary.from_file(folder / "vocab.txt")
    return training.Text(folder / "output_train.txt", vocabulary, block_size)


# Rows of text


def shuffled_text(count: int) -> str:
    characters = list(SCRIPTS * count)
    random.Random(1).shuffle(characters)
    return "".join(characters)


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


@pytest.mark.parametrize("content", ["", "a", "12345678", "🙂" * 8])
def test_a_text_shorter_than_a_row_is_refused_at_the_start(tmp_path, content):
    write_texts(tmp_path, content, "long enough to validate with", vocabulary="12345678a🙂")
    with pytest.raises(training.TrainingError, match=f"output_train.txt: holds {len(content)} characters"):
        open_text(tmp_path, 8)


def test_a_text_of_exactly_one_row_is_enough(tmp_path):
    text = open_text(write_texts(tmp_path, "日本語テキスト!é"), 8)
    assert text.draw_offsets(5, [0]).tolist() == [0] * 5
    assert text.rows(np.array([0])).shape == (1, 9)


def test_an_unknown_character_is_named_with_its_place(tmp_path):
    text = open_text(write_texts(tmp_path, "ééé∞é" * 4, vocabulary="é"), 8)
    with pytest.raises(training.TrainingError, match=r"output_train.txt: the character '∞' at byte 6 is not in vocab"):
        text.rows(np.array([2]))


@pytest.mark.parametrize(("data", "place"), [(b"good" + b"\xff" + b"text" * 9, 4), (b"abcd" * 5 + b"\xe2\x82", None)])
def test_text_that_is_not_utf8_is_named(tmp_path, data, place):
    write_texts(tmp_path, "abcdefghijklmnopqrstuvwxyz")
    (tmp_path / "output_train.txt").write_bytes(data)
    text = open_text(tmp_path, 8)
    with pytest.raises(training.TrainingError, match=f"at byte {place}" if place else "cut short"):
        text.rows(np.arange(text.last_start + 1))


# Evaluating


def args(*flags):
    return training.parse_args([*TINY, *map(str, flags)])


@pytest.mark.parametrize("block_size", [1, 2, 7, 64])
def test_windows_predict_every_character_but_the_first_once(tmp_path, monkeypatch, block_size):
    monkeypatch.setattr(training, "CHUNK", 10)  # so that chunks end inside windows and inside characters
    vocabulary = Vocabulary(SCRIPTS)
    for length in range(block_size + 1, block_size + 70):
        content = shuffled_text(2)[:length]
        text = open_text(write_texts(tmp_path, content, vocabulary=SCRIPTS), block_size)
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


# The recipe


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


@pytest.mark.parametrize(
    ("batch_size", "block_size", "expected"), [(12, 64, 0.9904), (32, 128, 0.95), (64, 256, 0.95), (1, 8, 0.999)]
)
def test_adamw_averages_over_the_same_tokens_whatever_the_batch(batch_size, block_size, expected):
    recipe = args("-batch_size", batch_size, "-block_size", block_size)
    (adamw,) = training.Optimizer(GPTLanguageModel(7, 8, 2, 1, 4), recipe).parts
    assert adamw.param_groups[0]["betas"] == pytest.approx((0.9, expected))


def test_only_matrices_are_decayed():
    model = GPTLanguageModel(7, n_embd=8, n_head=2, n_layer=1, block_size=4)
    optimizer = training.Optimizer(model, args("-weight_decay", 0.3))
    decays = {p: group["weight_decay"] for group in optimizer.groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[parameter] == (0.3 if parameter.dim() == 2 else 0.0), name
    assert len(decays) == len(list(model.parameters()))


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


# Runs


def run_in(folder, *flags):
    with training.Interruption() as interruption:
        return training.run(args("-data_dir", folder, "-model", folder / "model-01.pkl", *flags), interruption)


def weights_after(folder, *flags) -> torch.Tensor:
    run_in(folder, *flags)
    return load_model(folder / "model-01.pkl")[0].lm_head.weight


def evaluations(output: str) -> list[tuple[int, float, bool]]:
    found = re.findall(r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)(, saved)?", output, re.MULTILINE)
    return [(int(step), float(loss), bool(saved)) for step, loss, saved in found]


def test_a_run_reports_what_it_does_and_keeps_the_best_model(texts, capsys):
    assert run_in(texts, "-max_iters", 25, "-eval_interval", 10, "-batch_size", 64, "-dtype", "float32") == 0
    output = capsys.readouterr().out
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


def test_it_learns(texts, capsys):
    run_in(texts, "-max_iters", 150, "-eval_interval", 150, "-learning_rate", 0.02, "-warmup_iters", 5, "-dropout", 0)
    ((_, loss, _),) = evaluations(capsys.readouterr().out)
    assert loss < 1.0  # from ln(11) = 2.4


def test_the_seed_decides_everything(texts):
    weights = [weights_after(texts, "-max_iters", 5, "-seed", seed) for seed in (1, 1, 2)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_an_earlier_model_is_kept(texts, capsys):
    run_in(texts, "-max_iters", 2)
    first = (texts / "model-01.pkl").read_bytes()
    assert not (texts / "model-01.old.pkl").exists()
    run_in(texts, "-max_iters", 4, "-eval_interval", 2, "-seed", 2)
    assert (texts / "model-01.old.pkl").read_bytes() == first
    assert (texts / "model-01.pkl").read_bytes() != first
    assert "kept as" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_model(texts):
    run_in(texts, "-max_iters", 2)
    before = (texts / "model-01.pkl").read_bytes()
    with pytest.raises(training.TrainingError, match=r"the loss is (nan|inf) after step [1-6], at .* -learning_rate"):
        run_in(texts, "-max_iters", 20, "-eval_interval", 6, "-learning_rate", 1e30, "-warmup_iters", 0)
    assert (texts / "model-01.pkl").read_bytes() == before


def test_a_clip_of_0_clips_nothing(texts):
    weights = [weights_after(texts, "-max_iters", 3, "-grad_clip", clip) for clip in (0, 1e9, 0.01)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_precisions_train_and_save_float32_weights(texts, capsys, dtype):
    run_in(texts, "-max_iters", 60, "-dtype", dtype, "-learning_rate", 0.02, "-warmup_iters", 5, "-eval_interval", 60)
    output = capsys.readouterr().out
    assert dtype in output
    ((_, loss, _),) = evaluations(output)
    assert loss < 2.0
    assert load_model(texts / "model-01.pkl")[0].lm_head.weight.dtype == torch.float32


def test_two_lines_of_the_models_own_text_follow_each_evaluation(texts, capsys):
    run_in(texts, "-max_iters", 4, "-eval_interval", 2)
    lines = capsys.readouterr().out.splitlines()
    for i in (i for i, line in enumerate(lines) if line.startswith("step ") and "loss" in line):
        assert all(line.startswith("    ") and 4 < len(line) <= 84 for line in lines[i + 1 : i + 3])


def other_text(folder: Path) -> Path:
    """Validation text of the same characters as the training text, which nothing learnt from the latter predicts."""
    return write_texts(
        folder, "the cat sat on the mat\n" * 200, "".join(random.Random(1).choices("\n acehmnost", k=500))
    )


OVERFITTING = ["-learning_rate", 0.03, "-warmup_iters", 1, "-min_lr", 0.03, "-eval_interval", 5, "-dropout", 0]


def test_a_rising_validation_loss_is_said_once(texts, capsys):
    run_in(other_text(texts), *OVERFITTING, "-max_iters", 60)
    output = capsys.readouterr().out
    losses = [loss for _, loss, _ in evaluations(output)]
    best_step = 5 * (1 + losses.index(min(losses)))
    assert len(losses) == 12
    (line,) = re.findall("the validation loss has been above .*", output)
    assert f"that of step {best_step} " in line and "-patience" in line
    assert f"best model, of step {best_step}" in output


def test_patience_stops_a_run(texts, capsys):
    assert run_in(other_text(texts), *OVERFITTING, "-max_iters", 200, "-patience", 3) == 0
    output = capsys.readouterr().out
    steps, losses, _ = zip(*evaluations(output))
    assert len(losses) == losses.index(min(losses)) + 1 + 3 and steps[-1] < 200
    assert "best model, of step" in output


# Metrics


def metrics(folder: Path) -> list[dict]:
    with open(folder / "model-01.metrics.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_evaluation_is_a_row_of_metrics(texts, capsys):
    run_in(texts, "-max_iters", 25, "-eval_interval", 10, "-learning_rate", 0.5, "-min_lr", 0.1)
    rows = metrics(texts)
    assert list(rows[0]) == ["step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds"]
    assert [int(row["step"]) for row in rows] == [10, 20, 25]
    assert [int(row["tokens"]) for row in rows] == [320, 640, 800]
    shown = re.findall(r"^step \d+: train loss ([\d.]+), val loss ([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    written = [(float(row["train_loss"]), float(row["val_loss"])) for row in rows]
    assert np.array(written) == pytest.approx(np.array(shown, dtype=float), abs=6e-5)  # which has four decimals
    rates = [float(row["learning_rate"]) for row in rows]
    assert 0.5 > rates[0] > rates[1] > rates[2] > 0.1
    assert 0 < float(rows[0]["seconds"]) <= float(rows[2]["seconds"])


def test_a_plot_is_drawn(texts, capsys):
    pytest.importorskip("matplotlib")
    run_in(texts, "-max_iters", 4, "-eval_interval", 2, "-plot", texts / "loss.png")
    assert (texts / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_a_notice(texts, monkeypatch, capsys):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    assert run_in(texts, "-max_iters", 2, "-plot", texts / "loss.png") == 0
    assert "pip install matplotlib" in capsys.readouterr().err and not (texts / "loss.png").exists()


# Starting from a trained model


@pytest.fixture
def old_model(tmp_path):
    """A model of the characters "abc", in a file."""
    model = GPTLanguageModel(3, n_embd=16, n_head=2, n_layer=1, block_size=8)
    save_model(tmp_path / "old.pkl", model, Vocabulary("abc"))
    return model


def test_fine_tuning_keeps_what_is_known_and_grows_the_vocabulary(tmp_path, old_model):
    write_texts(tmp_path, "dcaé" * 20)
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


def test_fine_tuning_takes_the_shape_of_the_file(texts, old_model, capsys):
    shape = ["-n_embd=16", "-n_head=2", "-n_layer=1", "-block_size=8"]
    flags = ["-data_dir", str(texts), "-init_from", str(texts / "old.pkl")]
    settings = training.parse_args(flags)
    assert [getattr(settings, name) for name in ("n_embd", "n_head", "n_layer", "block_size")] == [16, 2, 1, 8]
    assert training.parse_args([*flags, *shape]).n_embd == 16
    for flag in ("-n_embd=32", "-n_head=4", "-n_layer=2", "-block_size=9"):
        with pytest.raises(SystemExit) as end:
            training.parse_args([*flags, flag])
        name, _, value = flag.partition("=")
        assert end.value.code == 2 and f"argument {name}: {value} contradicts" in capsys.readouterr().err


def test_fine_tuning_learns_faster_than_a_fresh_start(texts, capsys):
    run_in(texts, "-max_iters", 100, "-eval_interval", 100, "-learning_rate", 0.02, "-warmup_iters", 5)
    (texts / "model-01.pkl").rename(texts / "old.pkl")
    for more in ([], ["-init_from", texts / "old.pkl"]):
        run_in(texts, "-max_iters", 5, "-learning_rate", 1e-4, *more)
    (_, trained, _), (_, fresh, _), (_, tuned, _) = evaluations(capsys.readouterr().out)
    assert abs(tuned - trained) < 0.1 < fresh - tuned


# Interrupting and going on


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


LONG = ["-max_iters", 30, "-eval_interval", 10, "-save_interval", 7, "-dropout", 0.2]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("step", [1, 13, 20])
def test_a_resumed_run_ends_as_if_never_interrupted(texts, monkeypatch, capsys, optimizer, step):
    run_in(texts, *LONG, "-optimizer", optimizer)
    undisturbed = everything_after(texts)
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        assert run_in(texts, *LONG, "-optimizer", optimizer) == 130
    captured = capsys.readouterr()
    assert f"interrupted after step {step}; to go on: python training.py -resume" in captured.err
    resume = ["-data_dir", str(texts), "-model", str(texts / "model-01.pkl"), "-device", "cpu", "-resume"]
    assert go_on(resume) == 0
    assert f"after step {step} of 30" in capsys.readouterr().out
    assert_same(everything_after(texts), undisturbed)


def go_on(flags: list) -> int:
    with training.Interruption() as interruption:
        return training.run(training.parse_args([*map(str, flags)]), interruption)


def test_a_resumed_run_may_become_longer(texts, capsys):
    run_in(texts, "-max_iters", 10, "-eval_interval", 5)
    resume = ["-data_dir", texts, "-model", texts / "model-01.pkl", "-resume"]
    assert go_on([*resume, "-max_iters", 20]) == 0
    assert "a schedule of 20 steps" in capsys.readouterr().err
    rows = metrics(texts)
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    longer = args("-max_iters", 20)
    assert float(rows[2]["learning_rate"]) == pytest.approx(training.learning_rate_at(14, longer))
    with pytest.raises(SystemExit):
        go_on([*resume, "-max_iters", 15])
    assert "-max_iters: " in capsys.readouterr().err
    assert go_on(resume) == 0  # now at its end: only reports
    assert "a higher -max_iters goes on" in capsys.readouterr().out


def test_rows_of_metrics_after_the_saved_state_are_dropped(texts, monkeypatch, capsys):
    run_in(texts, *LONG)
    whole = metrics(texts)
    state = training.Run.save_state

    def killed(self):
        if self.step == 20:  # evaluated, but not saved
            raise KeyboardInterrupt
        state(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Run, "save_state", killed)
        run_in(texts, *LONG)
    assert [row["step"] for row in metrics(texts)] == ["10", "20"]
    assert go_on(["-data_dir", texts, "-model", texts / "model-01.pkl", "-resume"]) == 0
    assert "after step 14 of 30" in capsys.readouterr().out
    assert [row["val_loss"] for row in metrics(texts)] == [row["val_loss"] for row in whole]


def test_a_new_run_puts_the_old_ones_files_aside(texts, capsys):
    run_in(texts, "-max_iters", 3)
    first = everything_after(texts)
    run_in(texts, "-max_iters", 6, "-seed", 2)
    assert go_on(["-data_dir", texts, "-model", texts / "model-01.old.pkl", "-resume", "-max_iters", 4]) == 0
    assert len(read_model_file(texts / "model-01.pkl")["weights"]) == len(first[0]["weights"])
    assert (texts / "model-01.old.metrics.csv").exists()


def test_flags_that_repeat_the_saved_run_are_welcome(texts, capsys):
    run_in(texts, "-max_iters", 2)
    assert go_on([*TINY, "-data_dir", texts, "-model", texts / "model-01.pkl", "-resume", "-max_iters", 3]) == 0


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
def test_a_damaged_state_is_a_sentence(texts, damage):
    run_in(texts, "-max_iters", 2)
    path = texts / "model-01.state.pkl"
    content = read_model_file(path)
    damage(content)
    torch.save(content, path)
    with pytest.raises(ModelFileError, match=r"model-01.state.pkl: does not hold a run to go on with"):
        go_on(["-data_dir", texts, "-model", texts / "model-01.pkl", "-resume", "-max_iters", 4])


def test_a_run_does_not_go_on_with_other_texts(texts):
    run_in(texts, "-max_iters", 2)
    write_texts(texts, "the cat sat on the mat\n" * 201, "the mat sat on the cat\n" * 20)
    with pytest.raises(training.TrainingError, match="the texts are not those"):
        go_on(["-data_dir", texts, "-model", texts / "model-01.pkl", "-resume"])


def wait_for(process, text: str) -> None:
    shown = ""
    while text not in shown:
        shown += process.stderr.read(1) or pytest.fail(shown)


ENDLESS = [*TINY, "-max_iters", 10**6, "-eval_interval", 10**6]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
def test_an_interrupted_run_prints_the_command_that_goes_on(texts, start_script, number, status):
    run = start_script("training.py", *ENDLESS, "-model", "mine.pkl", cwd=texts)
    wait_for(run, "loss")  # the progress bar, once it has drawn a few steps
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == status and "Traceback" not in errors
    step, command = re.search(r"interrupted after step (\d+); to go on: python (.*)", errors).groups()
    run = start_script(*shlex.split(command), cwd=texts)
    wait_for(run, "loss")
    run.send_signal(number)
    output, _ = run.communicate(timeout=60)
    assert f"after step {step} of 1000000" in output
    model, vocabulary = load_model(texts / "mine.state.pkl")  # can be talked to before the first evaluation
    assert len(vocabulary) == model.config["vocab_size"] == 11


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
def test_a_second_interrupt_ends_at_once(texts, start_script):
    shape = ["-n_embd=512", "-n_layer=8", "-block_size=256", "-batch_size=256", "-device=cpu"]  # a step takes long
    write_texts(texts, "the cat sat on the mat\n" * 200)
    run = start_script("training.py", *shape, cwd=texts)
    wait_for(run, "0%")
    for _ in range(2):
        time.sleep(1)
        run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=2)
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
        wait_for(run, "loss")
        time.sleep(chance.uniform(0, 0.5))
        run.kill()
        output, _ = run.communicate()
        resumed += map(int, re.findall(r"after step (\d+) of", output))
        run = start_script("training.py", "-resume", cwd=folder)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    return resumed + [int(step) for step in re.findall(r"after step (\d+) of", output)]


def check_kills(texts, start_script, run_script, kills: int, steps: int) -> list[int]:
    flags = [*TINY, "-max_iters", steps, "-eval_interval", 20, "-save_interval", 2]  # most of the time is saving
    disturbed, undisturbed = texts / "disturbed", texts / "undisturbed"
    for folder in (disturbed, undisturbed):
        folder.mkdir()
        write_texts(folder, "the cat sat on the mat\n" * 200, "the mat sat on the cat\n" * 20)
    assert run_script("training.py", *flags, cwd=undisturbed).returncode == 0
    resumed = kill_and_go_on(disturbed, kills, start_script, flags)
    assert len(resumed) == kills and resumed == sorted(resumed)
    assert_same(everything_after(disturbed), everything_after(undisturbed))
    litter = {path.name for path in disturbed.iterdir()} - {path.name for path in undisturbed.iterdir()}
    assert not litter
    return resumed


def test_a_killed_run_goes_on_to_the_same_end(texts, start_script, run_script):
    check_kills(texts, start_script, run_script, kills=1, steps=400)


@pytest.mark.soak
def test_a_run_killed_20_times_goes_on_to_the_same_end(texts, start_script, run_script):
    print("went on after steps", check_kills(texts, start_script, run_script, kills=20, steps=8000))


# Many processes, parts of a step, precision and compilation

SAME = ["-max_iters", 50, "-eval_interval", 5, "-dropout", 0, "-learning_rate", 0.01, "-dtype", "float32"]


def losses(folder: Path) -> list[float]:
    return [float(row[name]) for row in metrics(folder) for name in ("train_loss", "val_loss")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_in_parts_learns_as_a_whole_one_does(texts, optimizer):
    run_in(texts, *SAME, "-optimizer", optimizer)
    whole = losses(texts)
    run_in(texts, *SAME, "-optimizer", optimizer, "-grad_accum", 4)
    assert losses(texts) == pytest.approx(whole, abs=1e-4) and min(whole) < max(whole) - 0.2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_learn_as_one_and_go_on_as_one(texts, start_script, capsys, optimizer):
    run_in(texts, *SAME, "-optimizer", optimizer)
    alone = losses(texts)
    run = start_script("training.py", *TINY, *SAME, "-optimizer", optimizer, "-model", "two.pkl", processes=2)
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert "2 processes" in output and output.count("best model") == 1  # the first process speaks for all
    (texts / "two.metrics.csv").replace(texts / "model-01.metrics.csv")
    assert losses(texts) == pytest.approx(alone, abs=1e-4)
    capsys.readouterr()
    assert go_on(["-data_dir", texts, "-model", texts / "two.pkl", "-resume", "-max_iters", 51]) == 0
    assert "after step 50 of 51" in capsys.readouterr().out


def test_processes_share_the_rows_of_a_step(texts, monkeypatch):
    text, recipe = open_text(texts, 8), args("-batch_size", 12)
    whole = training.get_batch(text, 7, recipe)
    monkeypatch.setattr(training, "WORLD_SIZE", 3)
    for rank in range(3):
        monkeypatch.setattr(training, "RANK", rank)
        for part, rows in zip(training.get_batch(text, 7, recipe), whole):
            assert part.equal(rows[4 * rank : 4 * rank + 4])


@pytest.mark.parametrize(
    ("processes", "flags", "fits"),
    [(8, ["-batch_size=100"], "96 and 104"), (2, ["-grad_accum=3"], "6 can"), (1, ["-grad_accum=3"], "3 and 6")],
)
def test_rows_that_do_not_divide_are_an_error_that_says_which_do(monkeypatch, capsys, processes, flags, fits):
    monkeypatch.setattr(training, "WORLD_SIZE", processes)
    with pytest.raises(SystemExit) as end:
        args(*flags)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and "argument -batch_size" in errors and fits in errors


def children(process) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


needs_pgrep = pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the processes with pgrep")


@needs_pgrep
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_takes_the_others_down_by_name(texts, start_script, victim):
    run = start_script("training.py", *ENDLESS, processes=2)
    wait_for(run, "loss")
    pid = children(run)[victim]
    os.kill(pid, signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and f"pid: {pid}" in errors and "exitcode  : -9" in errors


@needs_pgrep
@pytest.mark.parametrize("receiver", ["torchrun", "one process"])
def test_interrupted_processes_end_after_the_same_step(texts, start_script, receiver):
    run = start_script("training.py", *ENDLESS, processes=2)
    wait_for(run, "loss")
    os.kill(run.pid if receiver == "torchrun" else children(run)[1], signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    command = "torchrun --nproc_per_node=2 training.py -resume"
    (step,) = re.findall(rf"interrupted after step (\d+); to go on: {command}", errors)
    state = read_model_file(texts / "model-01.state.pkl")["training"]
    assert run.returncode != 0 and state["progress"][0] == int(step)


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


def check_compiled(texts, capsys) -> None:
    run_in(texts, *SAME, "-max_iters", 4)
    plain = losses(texts)
    run_in(texts, *SAME, "-max_iters", 4, "-compile", "on")
    assert losses(texts) == pytest.approx(plain, abs=1e-4)
    captured = capsys.readouterr()
    assert "compiled    in" in captured.out and captured.err.count("goes on without") == 0


def test_a_compiled_model_learns_as_it_is(texts, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    check_compiled(texts, capsys)


@pytest.mark.soak
def test_a_model_compiled_to_machine_code_learns_as_it_is(texts, capsys):
    check_compiled(texts, capsys)


def test_what_can_not_be_compiled_is_trained_as_it_is(texts, capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("no working compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda model: broken)
    assert run_in(texts, "-max_iters", 2, "-compile", "on") == 0
    captured = capsys.readouterr()
    assert "-compile on: can't be done here, training goes on without: no working compiler\n" in captured.err


def test_every_step_gets_its_own_rows_and_luck(texts, monkeypatch):
    """Whatever is drawn ahead of its step, on whichever device."""
    seen, step = [], training.train_step
    monkeypatch.setattr(
        training,
        "train_step",
        lambda forward, optimizer, batch, number, recipe: (
            seen.append((number, batch[0])) or step(forward, optimizer, batch, number, recipe)
        ),
    )
    run_in(texts, "-max_iters", 7, "-eval_interval", 3)
    text = open_text(texts, 8)
    assert [number for number, _ in seen] == list(range(7))
    for number, x in seen:
        assert x.equal(training.get_batch(text, number, args())[0])


# From end to end


def test_the_three_commands_in_sequence(tmp_path, run_script):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.txt").write_text(SCRIPTS * 40, encoding="utf-8")
    extraction = run_script("data_extract.py", "-data_dir", "mine", cwd=tmp_path)
    assert extraction.returncode == 0, extraction.stderr
    run = run_script(
        "training.py", *TINY, "-max_iters", 6, "-eval_interval", 3, "--learning_rate", "0.01", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert [step for step, _, _ in evaluations(run.stdout)] == [3, 6]
    assert "tok/s" in run.stderr  # the progress bar
    chat = run_script("chatbot.py", "-max_new_tokens", 12, "-device", "cpu", cwd=tmp_path, stdin="Plain\nПривет\n")
    assert chat.returncode == 0, chat.stderr
    completions = chat.stdout.split("Completion:\n")[1:]
    assert len(completions) == 2 and completions[0].startswith("Plain") and completions[1].startswith("Привет")
    assert len(completions[0].partition("\nPrompt")[0]) == len("Plain") + 12


def test_help_explains_every_flag(run_script):
    for script in ("data_extract.py", "training.py", "chatbot.py"):
        shown = run_script(script, "-h")
        assert shown.returncode == 0
        for flag in re.findall(r'flag\("(\w+)"', (Path(training.__file__).parent / script).read_text()):
            assert re.search(rf"-{flag}, --{flag}|-{flag} \S+, --{flag} ", shown.stdout), flag
