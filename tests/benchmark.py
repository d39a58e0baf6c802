"""Measure speed against the plain form in reference.py, or against nanoGPT.

    python tests/benchmark.py                        all quick rows in one table, some minutes
    python tests/benchmark.py -only step             one row
    python tests/benchmark.py -only gpu              the rows for a GPU
    python tests/benchmark.py -nanogpt ../nanoGPT    against nanoGPT, a clone of it
    python tests/benchmark.py -only learning -data_dir shakespeare    on another text

A training step is timed in `training.train`, the loop that runs in training, and compared with what
the machine can do at best. Both sides of a row run in turn, A B A B ..., in one process, so the
ratio is fair even if the speed of the machine drifts. Figures are medians; the ratio is the median
of the pairs' ratios, with the lowest and the highest. On a machine with a GPU, steps and generation
are measured on it (CUDA_VISIBLE_DEVICES= hides it).
"""

import argparse
import importlib.util
import io
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference import PlainGPT  # noqa: E402
from steps import Steps, new_run, settings_with  # noqa: E402

import training  # noqa: E402
from model import GPTLanguageModel  # noqa: E402

SHAPES = {
    "default": ["-dropout=0"],
    "small": ["-batch_size=12", "-n_embd=128", "-block_size=64", "-dropout=0"],
    # nanoGPT's, for a GPU
    "shakespeare": ["-batch_size=64", "-n_head=6", "-n_layer=6", "-block_size=256", "-dropout=0.2"],
    "large": [
        "-batch_size=32",
        "-n_embd=768",
        "-n_head=12",
        "-n_layer=12",
        "-block_size=1024",
        "-dropout=0",
    ],
}
TARGET = 1.898  # nanoGPT's loss on tiny Shakespeare, small shape, after its 2000 steps
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = getattr(torch, training.default_dtype(DEVICE))
nanogpt: ModuleType | None = None  # its model.py


def now() -> float:
    """Return the time in seconds when all work on the GPU is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(work: Callable[[], object]) -> float:
    started = now()
    work()
    return now() - started


def in_turn(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int
) -> tuple[float, float, list[float]]:
    """Return the median seconds of each side, which times itself, and all ratios theirs/ours."""
    times = [(ours(), theirs()) for _ in range(pairs)]
    mine, other = (statistics.median(side) for side in zip(*times))
    return mine, other, [b / a for a, b in times]


def work_in_turn(ours: Callable, theirs: Callable, pairs: int) -> tuple[float, float, list[float]]:
    """Do the same for work that has to be timed, after one run of each side to warm up."""
    ours()
    theirs()
    return in_turn(lambda: seconds(ours), lambda: seconds(theirs), pairs)


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


def row(name: str, ours: str, reference: str, ratio: str, note: str = "") -> None:
    print(f"| {name} | {ours} | {reference} | {ratio} | {note} |", flush=True)


# Training -----------------------------------------------------------------------------------------


def matmul_rate(dtype: torch.dtype) -> float:
    """The best rate of a square multiplication, in FLOP/s: the ceiling for a training step."""
    rates = []
    for size in (1024, 2048, 4096) if DEVICE.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        seconds(lambda: a @ b)  # noqa: B023
        rates.append(2 * size**3 / statistics.median(seconds(lambda: a @ b) for _ in range(5)))  # noqa: B023
    return max(rates)


class Stopwatch:
    """Times some steps and ends the loop, in the place of Interruption, which the loop asks.

    The first step is not timed, since it warms up and shows the progress. On a GPU, time is taken
    only when all work is done, so the steps between may overlap as they do in training.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.calls = 0
        self.started = self.ended = 0.0

    def received_by_any(self) -> bool:
        self.calls += 1
        if self.calls == 2:
            self.started = now()
        if self.calls == self.steps + 2:
            self.ended = now()
        return self.calls == self.steps + 2

    def seconds_per_step(self) -> float:
        return (self.ended - self.started) / self.steps


def begin(shape: str, dtype: torch.dtype, optimizer: str, folder: Path) -> argparse.Namespace:
    """Return a run of this shape that is never evaluated or saved."""
    flags = [
        *SHAPES[shape],
        f"-device={DEVICE}",
        f"-dtype={name_of(dtype)}",
        f"-optimizer={optimizer}",
    ]
    flags += [f"-data_dir={folder}", "-max_iters=1000000", "-eval_interval=1000000"]
    return new_run(settings_with(flags))


def time_our_steps(run: argparse.Namespace, steps: int) -> float:
    """Return the seconds per step of the training loop."""
    stopwatch = Stopwatch(steps)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        training.train(run, stopwatch)
    return stopwatch.seconds_per_step()


def time_their_steps(step: Callable[[], float], steps: int) -> float:
    """Return the seconds per step of a reference, after one step that is not timed."""
    step()
    started = now()
    for _ in range(steps):
        step()
    return (now() - started) / steps


def load_nanogpt(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt", folder / "model.py")
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference(config: dict) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return the tutorial's model and optimizer, or nanoGPT's, compiled on a GPU as by default."""
    if nanogpt is None:
        model = PlainGPT(**config).to(DEVICE)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    with redirect_stdout(io.StringIO()):
        model = nanogpt.GPT(nanogpt.GPTConfig(**config, bias=False)).to(DEVICE)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE.type)
    if DEVICE.type == "cuda":
        model.compile()
    return model, optimizer


def reference_dtype() -> torch.autocast:
    """Return a context with float32, or on a GPU, with nanoGPT's default."""
    return torch.autocast(DEVICE.type, FAST, enabled=nanogpt is not None and DEVICE.type == "cuda")


def cut_batch(
    data: torch.Tensor, batch_size: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random rows of encoded text, cut in a loop as the tutorial and nanoGPT do it."""
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in starts])
    y = torch.stack([data[i + 1 : i + block_size + 1] for i in starts])
    return x.to(DEVICE), y.to(DEVICE)


def reference_step(config: dict, batch_size: int) -> Callable[[], float]:
    """Return a function that does the work of a step as the tutorial and nanoGPT do it."""
    model, optimizer = reference(config)
    model.train()
    data = torch.randint(0, config["vocab_size"], (100_000,))
    # nanoGPT scales the gradients of float16, which cards without bfloat16 use.
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=name_of(FAST) == "float16")

    def step() -> None:
        x, y = cut_batch(data, batch_size, config["block_size"])
        with reference_dtype():
            _, loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if nanogpt:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def measure_step(
    shape: str, dtype: torch.dtype, optimizer: str, folder: Path, pairs: int, steps: int
) -> None:
    """Time `pairs` blocks of `steps` steps of each side, in turn."""
    run = begin(shape, dtype, optimizer, folder)
    batch_size, config = run.settings.batch_size, run.model.config
    their_step = reference_step(config, batch_size)
    rate = matmul_rate(dtype)
    mine, other, ratios = in_turn(
        lambda: time_our_steps(run, steps), lambda: time_their_steps(their_step, steps), pairs
    )
    rate = max(rate, matmul_rate(dtype))
    # Per token, see PaLM, appendix B
    attention = 12 * config["n_layer"] * config["n_embd"] * config["block_size"]
    weights = sum(p.numel() for p in run.model.parameters())
    flops = (6 * weights + attention) * batch_size * config["block_size"] / mine
    note = f"{flops / 1e9:.0f} GFLOP/s, {flops / rate:.0%} of the {rate / 1e9:.0f} of a matmul"
    name = f"training step, {shape} shape, {name_of(dtype)}, {optimizer}"
    row(name, f"{mine * 1e3:.1f} ms", f"{other * 1e3:.1f} ms", spread(ratios), note)


def step(folder: Path) -> None:
    for optimizer in training.LEARNING_RATES:
        measure_step("default", FAST, optimizer, folder, pairs=5, steps=3)


def step_small(folder: Path) -> None:
    for optimizer in training.LEARNING_RATES:
        measure_step("small", FAST, optimizer, folder, pairs=10, steps=10)


def step_float32(folder: Path) -> None:
    measure_step("default", torch.float32, "adamw", folder, pairs=5, steps=3)
    measure_step("small", torch.float32, "adamw", folder, pairs=10, steps=10)


def step_gpu(folder: Path) -> None:
    for shape in ("shakespeare", "large"):
        measure_step(shape, FAST, "adamw", folder, pairs=5, steps=10)


# Learning -----------------------------------------------------------------------------------------


def learn(folder: Path, optimizer: str, max_iters: int) -> tuple[float, float]:
    """Train the small shape on a schedule of this length.

    Return the loss on the whole validation text, and the seconds for training.
    """
    flags = [
        *SHAPES["small"],
        f"-device={DEVICE}",
        f"-optimizer={optimizer}",
        f"-max_iters={max_iters}",
    ]
    flags += [f"-eval_interval={max_iters}", f"-data_dir={folder}"]
    run = new_run(settings_with([*flags, f"-model={folder / 'learnt.pkl'}"]))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        training.train(run, Steps(max_iters + 1))
    settings = argparse.Namespace(**{**vars(run.settings), "dtype": torch.float32})
    loss = training.mean_loss(run.average, run.val_text, run.val_text.from_the_start(), settings)
    return loss, run.record.seconds


def learning(folder: Path) -> None:
    """Find the shortest schedule, and its seconds, that comes to TARGET."""
    for optimizer in training.LEARNING_RATES:
        for max_iters in (400, 500, 600, 700, 850, 1000, 1400, 2000):
            loss, ours = learn(folder, optimizer, max_iters)
            if loss <= TARGET:
                break
        name = f"loss {TARGET}, small shape, {optimizer}"
        row(name, f"{max_iters} steps, {ours:.1f} s", "2000 steps", "")


# Generating ---------------------------------------------------------------------------------------


def measure_generation(
    name: str, dtype: torch.dtype, sequences: int, tokens: int, pairs: int
) -> None:
    ours = GPTLanguageModel(vocab_size=100).eval().to(DEVICE, dtype)
    theirs, _ = reference(ours.config)
    theirs.eval()
    prompt = torch.zeros(sequences, 1, dtype=torch.long, device=DEVICE)
    block_size, few = ours.block_size, tokens // 10
    # The others run the whole context for every token. A tenth of the tokens, around the mean
    # context, will do.
    mean_context = statistics.mean(min(t, block_size) for t in range(1, tokens + 1))
    context = torch.zeros(sequences, int(mean_context - few / 2), dtype=torch.long, device=DEVICE)

    def generate_few():
        with reference_dtype():
            theirs.generate(context, few)

    mine, other, ratios = work_in_turn(lambda: ours.generate(prompt, tokens), generate_few, pairs)
    scale = tokens / few
    rates = f"{sequences * tokens / mine:.0f} tok/s", f"{sequences * few / other:.0f} tok/s"
    row(name, *rates, spread([ratio * scale for ratio in ratios]), f"{name_of(dtype)}")


def generate(folder: Path) -> None:
    for dtype in dict.fromkeys((torch.float32, FAST)):
        measure_generation("generate 500 tokens, one sequence", dtype, 1, 500, pairs=5)


def generate16(folder: Path) -> None:
    for dtype in dict.fromkeys((torch.float32, FAST)):
        measure_generation("generate 150 tokens, 16 sequences", dtype, 16, 150, pairs=5)


# Extracting ---------------------------------------------------------------------------------------


def write_archives(folder: Path, megabytes: int) -> list[Path]:
    """Write .xz of tars of 400 documents as OpenWebText has them, 2 MB each, of Python code."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    paths, distinct = [], 8
    for number in range(megabytes // 2):
        path = folder / f"{number:04d}_data.xz"
        if number < distinct:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for i in range(400):
                    start = (number * 400 + i) * 5000 % (len(text) - 5000)
                    content = f"Привет, 你好 – “{i}”\n{text[start : start + 5000]}".encode()
                    member = tarfile.TarInfo(f"{i:07d}.txt")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            path.write_bytes(lzma.compress(buffer.getvalue()))
        else:
            shutil.copyfile(paths[number % distinct], path)
        paths.append(path)
    return paths


def extract(folder: Path) -> None:
    archives, output = folder / "archives", folder / "extracted"
    archives.mkdir()
    output.mkdir()
    paths = write_archives(archives, 64)
    command = [sys.executable, str(ROOT / "data_extract.py")]
    command += ["-data_dir", str(archives), "-output_dir", str(output)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cores = os.cpu_count()

    def unpack_on_all_cores():
        running = []
        for core in range(cores):
            with open(output / f"{core}.txt", "wb") as file:
                unpack = ["xz", "-dc", *map(str, paths[core::cores])]
                running.append(subprocess.Popen(unpack, stdout=file))
        for process in running:
            assert process.wait() == 0

    if shutil.which("xz") is None:
        raise SystemExit("extract: install xz to compare with")

    def extract_all():
        subprocess.run(command, check=True, **quiet)

    mine, other, ratios = work_in_turn(extract_all, unpack_on_all_cores, 7)
    seconds_of_both = f"{mine:.2f} s", f"{other:.2f} s"
    note = f"against xz -dc on {cores} cores"
    row("extract 64 MB of OpenWebText's shape", *seconds_of_both, spread(ratios), note)


# The table ----------------------------------------------------------------------------------------

QUICK = (step, step_small, step_float32, generate, generate16, extract)
GPU = (step_gpu, generate, generate16)
ROWS = {function.__name__: (function,) for function in dict.fromkeys((*QUICK, *GPU, learning))}
ROWS["gpu"] = GPU


def provide_text(folder: Path, data_dir: Path | None) -> None:
    """Put the three files of `data_dir` into the folder, or those of the built-in sample."""
    if data_dir is None:
        command = [sys.executable, str(ROOT / "data_extract.py")]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    else:
        for name in ("output_train.txt", "output_val.txt", "vocab.txt"):
            shutil.copyfile(data_dir / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-only", choices=ROWS, help="measure this row alone, or those for a GPU")
    parser.add_argument("-data_dir", type=Path, help="three files of a text; else, the sample's")
    parser.add_argument("-nanogpt", type=Path, help="clone of nanoGPT, to compare with")
    args = parser.parse_args()
    if args.only == "gpu" and DEVICE.type != "cuda":
        parser.error("argument -only: gpu needs a GPU, and there is none here")
    global nanogpt
    nanogpt = load_nanogpt(args.nanogpt) if args.nanogpt else None
    machine = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    print(f"{machine}, torch {torch.__version__}, Python {sys.version.split()[0]}\n")
    print("| work | this | reference | ratio reference/this | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        provide_text(Path(folder), args.data_dir)
        for measure in ROWS[args.only] if args.only else QUICK:
            measure(Path(folder))


if __name__ == "__main__":
    main()
