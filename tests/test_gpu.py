"""On a GPU: the same results as on a CPU, no waiting for the device, memory that does not grow.

`python -m pytest tests/test_gpu.py` runs them. What a CPU can prove comes first; the rest is
skipped without a card.
"""

import math
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from conftest import TINY, assert_fails, metrics
from steps import Steps, new_run, settings_with

import training
from model import GPTLanguageModel

CARD = "cuda"
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
each_optimizer = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
SAME = [*TINY, "-dropout=0", "-dtype=float32", "-max_iters=20"]

# How far a result may be from the CPU's in float32: the length of the difference, as a share of
# that of the result. On a CPU, bfloat16 comes to 0.006 (logits) and 0.028 (gradients), float16 to
# 0.0007 and 0.008.
BOUNDS = {"float32": (1e-5, 1e-4), "float16": (0.003, 0.03), "bfloat16": (0.015, 0.06)}


def skip_if_missing(dtype: str) -> None:
    if dtype == "bfloat16" and training.default_dtype(torch.device(CARD)) != torch.bfloat16:
        pytest.skip("this card is too old for bfloat16, as the T4 is")


@pytest.fixture
def run(texts, run_main, short_samples):
    """`run("-max_iters=9")` runs training.py and gives what it printed, and the last validation
    loss.
    """

    def run(*flags: str) -> tuple[str, float]:
        done = run_main("training.py", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout, float(metrics(texts)[-1]["val_loss"])

    return run


# What a CPU can prove for a GPU -------------------------------------------------------------------


@pytest.mark.parametrize("spoilt", ["lm_head.weight", "blocks.0.ffwd.net.0.weight"])
@each_optimizer
def test_an_overflow_in_float16_reaches_no_weight(texts, optimizer, spoilt):
    """With Muon the weights are shared between two optimizers, and only one of them has the spoilt
    gradient.
    """
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
        found.append(torch.cat([weight.detach().flatten() for weight in run.model.parameters()]))
    assert found[0].isfinite().all() and found[0].equal(found[1]) and found[0].equal(found[2])
    assert run.optimizer.scaler.get_scale() == scale / 4 and scale > 1


def test_a_compiled_model_learns_as_it_does_uncompiled(run, monkeypatch):
    compiled, compile_whole = [], partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(
        torch, "compile", lambda model: compiled.append(compile_whole(model)) or compiled[-1]
    )
    losses = [run(*SAME, "-max_iters=4", *more)[1] for more in ([], ["-compile"])]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(compiled) == 1


# On a card ----------------------------------------------------------------------------------------


@contextmanager
def errors_on_waiting():
    """Within it, whatever waits for the card is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def logits_and_gradients(model: GPTLanguageModel, device: str, dtype: str) -> list[torch.Tensor]:
    model = model.to(device)
    index = torch.randint(0, 11, (4, 64), generator=torch.Generator().manual_seed(2)).to(device)
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        logits, loss = model(index, index.flip(0))
    model.zero_grad()
    (loss * (scale := 1024)).backward()  # or small gradients would vanish in float16
    gradients = torch.cat([parameter.grad.flatten() / scale for parameter in model.parameters()])
    return [logits.detach().double().cpu(), gradients.double().cpu()]


@card
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("head_size", [16, 64, 96])
def test_logits_and_gradients_equal_the_cpus(head_size, dtype):
    skip_if_missing(dtype)
    torch.manual_seed(1)
    model = GPTLanguageModel(
        11, n_embd=2 * head_size, n_head=2, n_layer=2, block_size=64, dropout=0.0
    )
    with torch.no_grad():  # weights far from their small initial values, so that differences show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    pairs = zip(
        logits_and_gradients(model, "cpu", "float32"), logits_and_gradients(model, CARD, dtype)
    )
    distances = [((found - expected).norm() / expected.norm()).item() for expected, found in pairs]
    assert all(far < bound for far, bound in zip(distances, BOUNDS[dtype])), distances


@card
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", BOUNDS)
@each_optimizer
def test_training_lowers_the_loss(run, texts, optimizer, dtype, dropout):
    skip_if_missing(dtype)
    flags = [f"-device={CARD}", f"-optimizer={optimizer}", f"-dtype={dtype}", f"-dropout={dropout}"]
    _, last = run(*TINY, *flags, "-max_iters=100", "-eval_interval=10")
    assert last < 0.7 * float(metrics(texts)[0]["val_loss"])


@card
def test_training_compiled_and_eager_agree(run):
    losses = [run(*SAME, f"-device={CARD}", *more)[1] for more in ([], ["-compile"])]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@card
@each_optimizer
@pytest.mark.parametrize(("first", "second"), [(CARD, "cpu"), ("cpu", CARD)])
def test_a_run_saved_on_one_device_goes_on_on_the_other(run, texts, optimizer, first, second):
    flags = [*SAME, f"-optimizer={optimizer}", f"-device={first}"]
    _, whole = run(*flags)
    half = new_run(
        settings_with([*flags, f"-data_dir={texts}", f"-model={texts / 'model-01.pkl'}"])
    )
    training.train(half, Steps(10))
    training.save(half)
    output, last = run("-resume", f"-device={second}")
    assert "after step 10 of 20" in output and last == pytest.approx(whole, rel=0.005)


class WatchedSteps(Steps):
    """Ten steps in which whatever waits for the card is an error, after four in which memory is
    found and so on.
    """

    def received_by_any(self) -> bool:
        ends = super().received_by_any()
        if self.left == 9:
            self.watch.enter_context(errors_on_waiting())
        return ends


@card
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16"]
)  # float16 has to know of an overflow before it moves a weight
@each_optimizer
def test_a_step_does_not_wait_for_the_card(texts, optimizer, dtype):
    skip_if_missing(dtype)
    flags = [
        *TINY,
        f"-data_dir={texts}",
        f"-device={CARD}",
        f"-optimizer={optimizer}",
        f"-dtype={dtype}",
    ]
    run = new_run(settings_with([*flags, "-max_iters=1000", "-eval_interval=1000"]))
    steps = WatchedSteps(14)
    with ExitStack() as steps.watch:
        training.train(run, steps)
    assert run.record.step == 14  # a bar would ask for the loss; there is no terminal here


@card
def test_memory_does_not_grow(texts):
    peaks = []
    flags = [
        "-batch_size=64",
        "-block_size=256",
        "-n_embd=64",
        "-max_iters=1000",
        "-eval_interval=1000",
    ]
    run = new_run(settings_with([*flags, f"-data_dir={texts}", f"-device={CARD}"]))
    for steps in (5, 20):
        torch.cuda.reset_peak_memory_stats()
        training.train(run, Steps(steps))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.02 * peaks[0]


@card
def test_no_memory_on_the_card_is_the_one_line_error(texts, run_main):
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        done = run_main(
            "training.py",
            *TINY,
            f"-device={CARD}",
            "-n_embd=1024",
            "-n_layer=12",
            "-batch_size=512",
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_fails(done, "not enough memory; try a smaller -batch_size, -n_embd or -block_size")


@cards
def test_all_cards_together_learn_what_one_does(texts, start_script):
    losses = []
    for processes in (1, torch.cuda.device_count()):
        flags = [*SAME, f"-batch_size={4 * torch.cuda.device_count()}", f"-device={CARD}"]
        process = start_script("training.py", *flags, cwd=texts, processes=processes)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and (processes == 1 or f"{processes} x cuda" in output), (
            errors
        )
        losses.append(float(metrics(texts)[-1]["val_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
