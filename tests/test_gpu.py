"""On a GPU: the same results as on a CPU, no waiting for the device, memory that does not grow.

`python -m pytest tests/test_gpu.py` runs them. What a CPU can prove comes first; the rest is
skipped without a card.
"""

import math
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, assert_fails, metrics
from steps import Steps, new_run, settings_with

import training
from model import GPTLanguageModel

CARD = "cuda"
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
too_old = pytest.mark.skipif(
    "torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)",
    reason="this card is too old for bfloat16, as the T4 is",
)
BFLOAT16 = pytest.param("bfloat16", marks=too_old)
each_optimizer = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16])
SAME = [*TINY, "-dropout=0", "-dtype=float32", "-max_iters=20"]
ENDLESS = ["-max_iters=1000", "-eval_interval=1000"]

# How far a result may be from the CPU's in float32: the length of the difference, as a share of
# that of the result. On a CPU, bfloat16 comes to 0.006 (logits) and 0.028 (gradients), float16 to
# 0.0007 and 0.008.
BOUNDS = {"float32": (1e-5, 1e-4), "float16": (0.003, 0.03), "bfloat16": (0.015, 0.06)}


@pytest.fixture
def run(texts, run_main, short_samples):
    """`run("-max_iters=9")` runs training.py; gives what it printed, and the last val_loss."""

    def run(*flags: str) -> tuple[str, float]:
        done = run_main("training.py", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout, float(metrics(texts)[-1]["val_loss"])

    return run


# What a CPU can prove for a GPU -------------------------------------------------------------------


@pytest.mark.parametrize("spoilt", ["lm_head.weight", "blocks.0.ffwd.net.0.weight"])
@each_optimizer
def test_an_overflow_in_float16_reaches_no_weight(texts, optimizer, spoilt):
    """With Muon two optimizers share the weights, and only one has the spoilt gradient."""
    run = new_run(
        settings_with([*TINY, f"-data_dir={texts}", f"-optimizer={optimizer}", "-dtype=float16"])
    )
    scale, found = run.optimizer.scaler.get_scale(), []
    for value in (1.0, math.inf, math.nan):
        _, loss = run.model(*training.get_batch(run.train_text, 0, run.settings))
        run.model.zero_grad()
        run.optimizer.scaler.scale(loss).backward()
        run.model.get_parameter(spoilt).grad[0, 0] = value
        run.optimizer.step(1e-3, 1.0)
        found.append(torch.nn.utils.parameters_to_vector(run.model.parameters()).clone())
    assert found[0].isfinite().all() and found[0].equal(found[1]) and found[0].equal(found[2])
    assert run.optimizer.scaler.get_scale() == scale / 4 and scale > 1


@pytest.mark.parametrize(
    ("device", "how", "far"),
    [
        ("cpu", {"backend": "aot_eager", "fullgraph": True}, 5e-5),  # needs no C++ compiler
        pytest.param(CARD, {}, 0.01, marks=card),
    ],
)
def test_a_compiled_model_learns_as_it_does_uncompiled(run, monkeypatch, device, how, far):
    monkeypatch.setattr(torch, "compile", Mock(side_effect=partial(torch.compile, **how)))
    losses = [run(*SAME, f"-device={device}", *more)[1] for more in ([], ["-compile"])]
    assert losses[0] == pytest.approx(losses[1], rel=far) and torch.compile.call_count == 1


# On a card ----------------------------------------------------------------------------------------


def logits_and_gradients(model: GPTLanguageModel, device: str, dtype: str) -> list[torch.Tensor]:
    index = torch.randint(0, 11, (4, 64), generator=torch.Generator().manual_seed(2)).to(device)
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        logits, loss = model(index, index.flip(0))
    model.zero_grad()
    (loss * (scale := 1024)).backward()  # or small gradients would vanish in float16
    gradients = torch.cat([parameter.grad.flatten() / scale for parameter in model.parameters()])
    return [logits.detach().double().cpu(), gradients.double().cpu()]


@card
@each_dtype
@pytest.mark.parametrize("head_size", [16, 64, 96])
def test_logits_and_gradients_equal_the_cpus(head_size, dtype):
    torch.manual_seed(1)
    model = GPTLanguageModel(11, 2 * head_size, n_head=2, n_layer=2, block_size=64, dropout=0.0)
    with torch.no_grad():  # weights far from their small initial values, so that differences show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = logits_and_gradients(model, "cpu", "float32")
    found = logits_and_gradients(model.to(CARD), CARD, dtype)
    distances = [((b - a).norm() / a.norm()).item() for a, b in zip(expected, found)]
    assert all(far < bound for far, bound in zip(distances, BOUNDS[dtype])), distances


@card
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@each_dtype
@each_optimizer
def test_training_lowers_the_loss(run, texts, optimizer, dtype, dropout):
    flags = [f"-device={CARD}", f"-optimizer={optimizer}", f"-dtype={dtype}", f"-dropout={dropout}"]
    _, last = run(*TINY, *flags, "-max_iters=100", "-eval_interval=10")
    assert last < 0.7 * float(metrics(texts)[0]["val_loss"])


@card
@each_optimizer
@pytest.mark.parametrize(("first", "second"), [(CARD, "cpu"), ("cpu", CARD)])
def test_a_run_saved_on_one_device_goes_on_on_the_other(run, texts, optimizer, first, second):
    files = [f"-data_dir={texts}", f"-model={texts / 'model-01.pkl'}"]
    flags = [*SAME, *files, f"-optimizer={optimizer}", f"-device={first}"]
    _, whole = run(*flags)
    half = new_run(settings_with(flags))
    training.train(half, Steps(10))
    training.save(half)
    output, last = run("-resume", f"-device={second}")
    assert "after step 10 of 20" in output and last == pytest.approx(whole, rel=0.005)


class WatchedSteps(Steps):
    """Steps of which the last ten may not wait for the card; those before find memory and so on."""

    def received_by_any(self) -> bool:
        if self.left == 10:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        return super().received_by_any()


@card
@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])  # float16 has to know of an overflow
@each_optimizer
def test_a_step_does_not_wait_for_the_card(texts, request, optimizer, dtype):
    flags = [*TINY, *ENDLESS, f"-data_dir={texts}", f"-device={CARD}"]
    run = new_run(settings_with([*flags, f"-optimizer={optimizer}", f"-dtype={dtype}"]))
    request.addfinalizer(partial(torch.cuda.set_sync_debug_mode, "default"))
    training.train(run, WatchedSteps(14))
    assert run.record.step == 14  # a bar would ask for the loss; there is no terminal here


@card
def test_memory_does_not_grow(texts):
    flags = ["-batch_size=64", "-block_size=256", "-n_embd=64", *ENDLESS]
    run = new_run(settings_with([*flags, f"-data_dir={texts}", f"-device={CARD}"]))
    peaks = []
    for steps in (5, 20):
        torch.cuda.reset_peak_memory_stats()
        training.train(run, Steps(steps))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.02 * peaks[0]


@card
def test_no_memory_on_the_card_is_the_one_line_error(texts, run_main, request):
    request.addfinalizer(partial(torch.cuda.set_per_process_memory_fraction, 1.0))
    torch.cuda.set_per_process_memory_fraction(0.01)
    done = run_main(
        "training.py", *TINY, f"-device={CARD}", "-n_embd=1024", "-n_layer=12", "-batch_size=512"
    )
    assert_fails(done, "not enough memory; try a smaller -batch_size, -n_embd or -block_size")


@cards
def test_all_cards_together_learn_what_one_does(texts, start_script):
    losses, count = [], torch.cuda.device_count()
    flags = [*SAME, f"-batch_size={4 * count}", f"-device={CARD}"]
    for processes in (1, count):
        process = start_script("training.py", *flags, cwd=texts, processes=processes)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and f"{processes} x cuda" in output, errors
        losses.append(float(metrics(texts)[-1]["val_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
