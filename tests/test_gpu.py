"""On a GPU: the same results as on a CPU, graphs that are really captured, and no waiting for the device.

The first section needs no card: it proves what a CPU can prove. The rest is skipped where there is none.
"""

import argparse
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from conftest import TINY, assert_fails, metrics
from steps import Steps, new_run, settings_with
from torch.utils._python_dispatch import TorchDispatchMode

import chatbot
import model as model_module
import training
from model import Cache, GPTLanguageModel, default_dtype

COUNT_UP = {"vocab_size": 11, "n_embd": 32, "n_head": 2, "n_layer": 2, "block_size": 16, "dropout": 0.0}
NO_EVALUATION = ["-max_iters=1000", "-eval_interval=1000", "-save_interval=1000"]


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(2))


def counting_model(device: str) -> GPTLanguageModel:
    """Return a model that has learnt to count, and is so sure of it that no rounding changes what it writes."""
    torch.manual_seed(10)
    model = GPTLanguageModel(**COUNT_UP).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        rows = (torch.randint(0, 11, (8, 1)) + torch.arange(17)) % 11
        loss = model(rows[:, :-1].to(device), rows[:, 1:].to(device))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def compiler():
    """What torch has compiled, and how it is to use it, is forgotten before and after."""
    torch.compiler.reset()
    yield torch.compiler
    torch.compiler.set_stance("default")
    torch.compiler.reset()


# What a CPU can prove for a GPU --------------------------------------------------------------------------------------

# Operations whose result Python, or the size of a tensor, depends on: a GPU has to finish all its work first.
WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "unique", "bincount")


class OperationLog(TorchDispatchMode):
    """Notes the operations of each step and the devices of what they make. Takes the place of Interruption too."""

    def __init__(self, steps: int = 0):
        super().__init__()
        self.steps = steps
        self.operations = []  # a list for each step, of names and devices

    def received_by_any(self) -> bool:
        self.operations.append([])
        return len(self.operations) > self.steps

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.operations:
            results = result if isinstance(result, (tuple, list)) else [result]
            devices = {tensor.device.type for tensor in results if isinstance(tensor, torch.Tensor)}
            self.operations[-1].append((function._schema.name.removeprefix("aten::"), devices))
        return result


def waits(operations: list[tuple[str, set]]) -> list[str]:
    return [name for name, _ in operations if name.startswith(WAITING)]


# Not Muon in float16: it has to know whether a gradient has overflowed before it moves a weight.
WITHOUT_WAITING = pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adamw", "float32"), ("adamw", "bfloat16"), ("adamw", "float16"), ("muon", "float32"), ("muon", "bfloat16")],
)


@pytest.fixture
def due_at(monkeypatch):
    """Let the progress be due after these steps only, whatever the time."""

    def patch(*steps: int) -> None:
        asked = iter(range(1, 10**6))
        monkeypatch.setattr(training.Progress, "is_due", lambda self, step: next(asked) in steps)

    return patch


@WITHOUT_WAITING
def test_a_step_waits_for_the_device_only_to_show_the_loss(texts, due_at, optimizer, dtype):
    due_at(3, 6)
    flags = [*TINY, *NO_EVALUATION, f"-data_dir={texts}", f"-optimizer={optimizer}", f"-dtype={dtype}"]
    run = new_run(settings_with([*flags, "-grad_accum=2", "-compile=off"]))
    with OperationLog(steps=7) as log:
        training.train(run, log)
    assert run.record.step == 7
    found = [waits(operations) for operations in log.operations[:7]]
    assert found == [[], [], ["_local_scalar_dense"], [], [], ["_local_scalar_dense"], []]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_makes_nothing_on_the_cpu_but_its_batch(texts, due_at, monkeypatch, optimizer):
    """On the device "meta", which has shapes only: to ask for a value is an error there, as is mixing devices."""
    due_at()
    monkeypatch.setattr(training, "autocast", lambda *_: nullcontext())  # which "meta" has not
    monkeypatch.setattr(model_module, "fused_is_faster", lambda *_: True)  # as on a GPU
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)  # there is none for "meta"
    flags = [*TINY, *NO_EVALUATION, f"-data_dir={texts}", f"-optimizer={optimizer}", "-dtype=float32", "-compile=off"]
    run = new_run(settings_with([*flags, "-grad_accum=2"], device=torch.device("meta")))
    with OperationLog(steps=3) as log:
        training.train(run, log)
    for operations in log.operations[:3]:
        on_cpu = [name for name, devices in operations if "cpu" in devices]
        assert len(operations) > 100 and set(on_cpu) <= {"detach", "lift_fresh"}  # the batch, from a NumPy array


@pytest.mark.parametrize("spoilt", ["lm_head.weight", "blocks.0.ffwd.net.0.weight"])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_in_float16_reaches_no_weight(texts, optimizer, value, grad_clip, spoilt):
    """With Muon the weights are shared between two optimizers, and only one of them has the spoilt gradient."""
    flags = [*TINY, f"-data_dir={texts}", f"-optimizer={optimizer}", "-dtype=float16"]
    run = new_run(settings_with(flags))
    scale = run.optimizer.scaler.get_scale()
    for overflows in (False, True, False):
        _, loss = run.model(*training.get_batch(run.train_text, 0, run.settings))
        run.model.zero_grad()
        run.optimizer.scaler.scale(loss).backward()
        if overflows:
            run.model.get_parameter(spoilt).grad[0, 0] = value
        run.optimizer.step(1e-3, grad_clip)
    assert all(weight.isfinite().all() for weight in run.model.parameters())
    assert run.optimizer.scaler.get_scale() == scale / 2


def test_no_memory_while_compiling_is_the_one_line_error(texts, run_main, monkeypatch):
    def compile_model(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(torch, "compile", lambda model: compile_model)
    done = run_main("training.py", *TINY, "-compile=on", "-max_iters=2")
    assert_fails(done, "not enough memory; try a higher -grad_accum")


class Recorder:
    """A backend for torch.compile that runs the graph as it is, and notes what a GPU would have to know of it."""

    def __init__(self):
        self.graphs = 0
        self.calls = 0
        self.changed = {}  # the addresses of each input that was changed, by its place
        self.unmarked = set()  # places of the inputs that may lie elsewhere for each call, so they have to be copied

    def __call__(self, graph: torch.fx.GraphModule, _):
        self.graphs += 1

        def run(*inputs: torch.Tensor):
            self.calls += 1
            versions = [tensor._version for tensor in inputs]
            outputs = graph(*inputs)
            for place, (tensor, version) in enumerate(zip(inputs, versions)):
                if tensor._version != version:
                    self.changed.setdefault(place, set()).add(tensor.data_ptr())
                if not hasattr(tensor, "_dynamo_static_input_type"):
                    self.unmarked.add(place)
            return outputs

        return run


def caches_as_on_a_gpu(model: GPTLanguageModel, batch_size: int) -> list[Cache]:
    caches = model.new_caches(batch_size)
    for cache in caches:
        cache.static = True
    return caches


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_token_is_one_graph_that_a_gpu_can_record_and_replay(batch_size, compiler, monkeypatch, capsys):
    """The window of 16 is full after every eighth of the 300 tokens, and the cache starts anew."""
    monkeypatch.setattr(model_module, "fused_is_faster", lambda *_: True)  # as on a GPU
    model = counting_model("cpu").double()  # a single row of float32 takes a way that is made for a CPU
    prompt = torch.arange(batch_size)[:, None]
    expected = model.generate(prompt, 300, temperature=0)
    recorder, compile_function = Recorder(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, mode, **options: compile_function(function, backend=recorder, **options)
    )
    caches = caches_as_on_a_gpu(model, batch_size)
    chatbot.capture(model, caches, argparse.Namespace(batch_size=batch_size, device=torch.device("cpu")))
    assert "can't be done here" not in capsys.readouterr().err  # a graph with a break would end there
    compiler.set_stance("fail_on_recompile")
    assert model.generate(prompt, 300, temperature=0, caches=caches).equal(expected)
    assert recorder.graphs == 1 and recorder.calls > 250
    # Capture is skipped if the graph changes an input that is not known to stay where it is.
    assert recorder.changed and not recorder.changed.keys() & recorder.unmarked
    assert all(len(addresses) == 1 for addresses in recorder.changed.values())
    assert len(recorder.unmarked) == 1  # the token


def test_training_is_one_graph(texts, compiler, monkeypatch):
    """On the device "meta", since dropout takes another way on a CPU."""
    recorder, compile_function = Recorder(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model: compile_function(model, backend=recorder, fullgraph=True, dynamic=False)
    )
    monkeypatch.setattr(training, "autocast", lambda *_: nullcontext())  # which "meta" has not
    monkeypatch.setattr(model_module, "fused_is_faster", lambda *_: True)  # as on a GPU
    flags = [*TINY, f"-data_dir={texts}", "-dtype=float32", "-grad_accum=2", "-compile=on"]
    run = new_run(settings_with(flags, device=torch.device("meta")))
    forward = training.prepare_forward(run)
    assert forward is not run.model  # which it is where compiling failed
    compiler.set_stance("fail_on_recompile")
    for step in range(3):
        inputs, targets = training.get_batch(run.train_text, step, run.settings)
        for x, y in zip(inputs.chunk(2), targets.chunk(2)):
            forward(x, y)[1].backward()
    assert recorder.graphs == 1 and recorder.calls == 7


def test_a_token_makes_nothing_on_the_cpu_and_waits_for_nothing(monkeypatch):
    """On the device "meta", see above."""
    monkeypatch.setattr(model_module, "fused_is_faster", lambda *_: True)
    model = GPTLanguageModel(**COUNT_UP).eval().to("meta")
    caches = caches_as_on_a_gpu(model, 2)
    token = torch.zeros(2, 1, dtype=torch.long, device="meta")
    banned = torch.tensor([3], device="meta")
    with torch.inference_mode(), OperationLog() as log:
        log.received_by_any()
        logits = model.prefill(token.expand(2, 5), caches)
        logits = model.decode(token, caches).index_fill(1, banned, -torch.inf)
        model_module.sample(logits, 0.8, 5, None)
        model_module.sample(logits, 0, None, None)
    (operations,) = log.operations
    assert len(operations) > 100 and not waits(operations)
    assert all(devices <= {"meta"} for _, devices in operations)


# On a card -----------------------------------------------------------------------------------------------------------
#
# Everything is small, since compiling takes most of the time: four times about half a minute on a T4.

CARD = "cuda"
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# How far a result may be from the CPU's in float32: the length of the difference, as a share of that of the result.
# On a CPU, bfloat16 comes to 0.006 (logits) and 0.028 (gradients), float16 to 0.0007 and 0.008.
BOUNDS = {"float32": (1e-5, 1e-4), "float16": (0.003, 0.03), "bfloat16": (0.015, 0.06)}


def name_of_default() -> str:
    return training.name_of(default_dtype(torch.device(CARD)))


def skip_if_missing(dtype: str) -> None:
    if dtype == "bfloat16" != name_of_default():
        pytest.skip("this card is too old for bfloat16, as the T4 is")


@pytest.fixture(autouse=True)
def precision():
    """The scripts allow TF32 for what is left in float32. Tests begin without, to compare with a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def errors_on_waiting():
    """Within it, whatever waits for the card is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    result, expected = result.detach().double().cpu(), expected.detach().double().cpu()
    return ((result - expected).norm() / expected.norm()).item()


def logits_and_gradients(model: GPTLanguageModel, device: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = model.to(device)
    index, targets = random_ids(4, 64).to(device), random_ids(4, 64).flip(0).to(device)
    with training.autocast(torch.device(device), getattr(torch, dtype)):
        logits, loss = model(index, targets)
    model.zero_grad()
    scale = 1024  # or small gradients would vanish in float16
    (loss * scale).backward()
    return logits, torch.cat([parameter.grad.flatten() / scale for parameter in model.parameters()])


@card
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("head_size", [16, 64, 96])
def test_logits_and_gradients_equal_the_cpus(head_size, dtype):
    skip_if_missing(dtype)
    torch.manual_seed(1)
    model = GPTLanguageModel(11, n_embd=2 * head_size, n_head=2, n_layer=2, block_size=64, dropout=0.0)
    with torch.no_grad():  # weights far from their small initial values, so that differences show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = logits_and_gradients(model, "cpu", "float32")
    found = logits_and_gradients(model, CARD, dtype)
    distances = [distance(*pair) for pair in zip(found, expected)]
    assert all(far < bound for far, bound in zip(distances, BOUNDS[dtype])), distances


@card
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss(texts, run_main, optimizer, dtype, dropout):
    skip_if_missing(dtype)
    flags = [*TINY, f"-device={CARD}", "-compile=off", f"-optimizer={optimizer}", f"-dtype={dtype}"]
    done = run_main("training.py", *flags, f"-dropout={dropout}", "-max_iters=100", "-eval_interval=10")
    assert done.returncode == 0, done.stderr
    rows = metrics(texts)
    assert float(rows[-1]["val_loss"]) < 0.7 * float(rows[0]["val_loss"])


@card
def test_training_compiled_and_eager_agree(texts, run_main):
    losses = []
    for compiled in ("on", "off"):
        flags = [*TINY, f"-device={CARD}", f"-compile={compiled}", "-dropout=0", "-max_iters=20", "-grad_accum=2"]
        done = run_main("training.py", *flags)
        assert done.returncode == 0 and "can't be done here" not in done.stderr, done.stderr
        losses.append(float(metrics(texts)[-1]["val_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@card
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("first", "second"), [(CARD, "cpu"), ("cpu", CARD)])
def test_a_run_saved_on_one_device_goes_on_on_the_other(texts, run_main, optimizer, first, second):
    flags = [*TINY, f"-optimizer={optimizer}", "-dtype=float32", "-compile=off", "-dropout=0", "-max_iters=20"]
    assert run_main("training.py", *flags, f"-device={first}").returncode == 0
    whole = float(metrics(texts)[-1]["val_loss"])
    run = new_run(settings_with([*flags, f"-device={first}", f"-data_dir={texts}", f"-model={texts / 'model-01.pkl'}"]))
    training.train(run, Steps(10))
    training.save_state(run)
    done = run_main("training.py", "-resume", f"-device={second}")
    assert done.returncode == 0 and "after step 10 of 20" in done.stdout, done.stderr
    assert float(metrics(texts)[-1]["val_loss"]) == pytest.approx(whole, rel=0.005)


class WatchedSteps(Steps):
    """Ten steps in which whatever waits for the card is an error, after four in which memory is found and so on."""

    def __init__(self, watch: ExitStack):
        super().__init__(14)
        self.watch = watch

    def received_by_any(self) -> bool:
        ends = super().received_by_any()
        if self.left == 9:
            self.watch.enter_context(errors_on_waiting())
        return ends


def train_without_waiting(*flags: str) -> None:
    run = new_run(settings_with([*TINY, *NO_EVALUATION, f"-device={CARD}", "-grad_accum=2", *flags]))
    with ExitStack() as watch:
        training.train(run, WatchedSteps(watch))
    assert run.record.step == 14


@card
@WITHOUT_WAITING
def test_a_step_waits_for_the_card_only_to_show_the_loss(texts, due_at, dtype, optimizer):
    skip_if_missing(dtype)
    due_at()
    train_without_waiting(f"-data_dir={texts}", f"-dtype={dtype}", f"-optimizer={optimizer}", "-compile=off")


@card
def test_a_compiled_step_waits_for_the_card_only_to_show_the_loss(texts, due_at, compiler, capsys):
    due_at()
    train_without_waiting(f"-data_dir={texts}", "-optimizer=adamw", "-compile=on")
    assert "can't be done here" not in capsys.readouterr().err


@card
def test_captured_graphs_write_what_the_eager_model_does_at_once_and_without_waiting(compiler, capsys):
    from torch._dynamo.utils import counters

    prompt = torch.tensor([[3]], device=CARD)
    model = counting_model(CARD).to(default_dtype(torch.device(CARD)))
    expected = model.generate(prompt, 300, temperature=0)
    counters.clear()
    caches = model.new_caches(1)
    chatbot.capture(model, caches, argparse.Namespace(batch_size=1, device=torch.device(CARD)))
    assert "can't be done here" not in capsys.readouterr().err
    compiler.set_stance("fail_on_recompile")

    # The same text, though the cache starts anew every 8 tokens, from graphs none of which was left out.
    assert model.generate(prompt, 300, temperature=0, caches=caches).equal(expected)
    assert counters["inductor"]["cudagraph_skips"] == 0

    # Between two tokens Python does not wait for the card, whatever the way to choose them.
    for options in ({"temperature": 0}, {"temperature": 0.8, "top_k": 5, "banned_ids": [1]}):
        stream = model.stream(prompt, 40, caches=caches, **options)
        next(stream)
        with errors_on_waiting():
            for _ in range(30):
                next(stream)

    # A token is one launch of a graph: 9 of 10 tokens, as the first comes from reading the prompt.
    with torch.profiler.profile() as profile:
        model.generate(prompt, 10, caches=caches)
        torch.cuda.synchronize()
    launches = [event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch"]
    assert launches == [9]


@card
def test_memory_does_not_grow_and_parts_of_a_step_take_less(texts, due_at):
    due_at()
    peaks = []
    for grad_accum in (1, 8):
        flags = ["-batch_size=64", "-block_size=256", "-n_embd=64", "-n_head=4", "-n_layer=4", *NO_EVALUATION]
        flags += [f"-data_dir={texts}", f"-device={CARD}", "-compile=off", f"-grad_accum={grad_accum}"]
        run = new_run(settings_with(flags))
        for steps in (5, 20):
            torch.cuda.reset_peak_memory_stats()
            training.train(run, Steps(steps))
            peaks.append(torch.cuda.max_memory_allocated())
    whole, whole_later, parts, parts_later = peaks
    print(f"peak memory: {whole / 1e6:.0f} MB, in 8 parts {parts / 1e6:.0f} MB")
    assert whole_later < 1.02 * whole and parts_later < 1.02 * parts
    assert parts < whole / 3


@card
def test_attention_does_not_keep_a_weight_for_each_pair_of_time_steps():
    """Of 8 x 8 heads, the weights of 2048 x 2048 would take 537 MB in 16 bits, for each of two layers."""
    dtype = default_dtype(torch.device(CARD))
    model = GPTLanguageModel(11, n_embd=256, n_head=8, n_layer=2, block_size=2048, dropout=0.2).to(CARD).train()
    index = random_ids(8, 2048).to(CARD)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with training.autocast(torch.device(CARD), dtype):
        loss = model(index, index)[1]
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.5e9


@card
def test_no_memory_on_the_card_is_the_one_line_error(texts, run_main):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        flags = [*TINY, f"-device={CARD}", "-compile=off", "-n_embd=1024", "-n_layer=12", "-batch_size=512"]
        done = run_main("training.py", *flags)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_fails(done, "not enough memory; try a higher -grad_accum or a smaller -batch_size, -n_embd or -block_size")


@card
def test_with_no_flag_both_scripts_use_the_card_and_compile(texts, run_script):
    flags = [flag for flag in TINY if not flag.startswith("-device")]
    done = run_script("training.py", *flags, "-max_iters=20", cwd=texts, timeout=600)
    assert done.returncode == 0 and "can't be done here" not in done.stderr, done.stderr
    assert f"device      cuda:0, {name_of_default()}" in done.stdout and "compiled    in" in done.stdout
    done = run_script("chatbot.py", "-prompt=the c", "-max_new_tokens=50", cwd=texts, timeout=600)
    assert done.returncode == 0 and "can't be done here" not in done.stderr, done.stderr
    assert done.stdout.startswith("Completion:\nthe c") and len(done.stdout) == len("Completion:\nthe c\n") + 50


@cards
def test_all_cards_together_learn_what_one_does(texts, run_main, start_script):
    count = torch.cuda.device_count()
    flags = [*TINY, f"-batch_size={4 * count}", "-dropout=0", "-dtype=float32", "-compile=off", "-max_iters=20"]
    losses = []
    for processes in (1, count):
        process = start_script("training.py", *flags, "-device=cuda", cwd=texts, processes=processes)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert processes == 1 or f"{processes} processes" in output
        losses.append(float(metrics(texts)[-1]["val_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
