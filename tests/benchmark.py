"""Measure speed against the plain form in reference.py and against what the machine can do at best.

    python tests/benchmark.py              all quick rows, one table, in a few minutes
    python tests/benchmark.py -only step   one row
    python tests/benchmark.py -only learning -data_dir shakespeare    on another text
    python tests/benchmark.py -only step -nanogpt ../nanoGPT          against nanoGPT, a clone of it

Both sides of a row run in turn, A B A B ..., in this one process, so that a machine whose speed drifts still gives a
fair ratio. Figures are medians; the ratio is the median of the pairs' ratios, with the lowest and the highest. On a
machine with a GPU, steps and generation are measured on it (CUDA_VISIBLE_DEVICES= hides it).
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
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference import PlainGPT  # noqa: E402

import training  # noqa: E402
from model import GPTLanguageModel, Vocabulary, default_dtype, save_model  # noqa: E402

SHAPES = {
    "default": ({"vocab_size": 100, "n_embd": 384, "block_size": 128, "dropout": 0.2}, 32),
    "small": ({"vocab_size": 100, "n_embd": 128, "block_size": 64, "dropout": 0.0}, 12),
    "shakespeare": ({"vocab_size": 65, "n_head": 6, "n_layer": 6, "block_size": 256}, 64),  # nanoGPT's, for a GPU
    "large": ({"vocab_size": 100, "n_embd": 768, "n_head": 12, "n_layer": 12, "block_size": 1024, "dropout": 0.0}, 32),
}
TARGET = 1.898  # which nanoGPT reaches on tiny Shakespeare in the small shape after its 2000 steps
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = default_dtype(DEVICE)
nanogpt: ModuleType | None = None  # its model.py


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(ours: Callable, theirs: Callable, pairs: int) -> tuple[float, float, list[float]]:
    """Median seconds of each side and the ratios theirs/ours of all pairs, after one run of each to warm up."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    mine, other = (statistics.median(side) for side in zip(*times))
    return mine, other, [b / a for a, b in times]


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


def row(name: str, ours: str, reference: str, ratio: str, note: str = "") -> None:
    print(f"| {name} | {ours} | {reference} | {ratio} | {note} |", flush=True)


# Training ------------------------------------------------------------------------------------------------------------


def matmul_rate(dtype: torch.dtype) -> float:
    """The best rate of a square multiplication, in FLOP/s: the ceiling for a training step."""
    rates = []
    for size in (1024, 2048, 4096) if DEVICE.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        seconds(lambda: a @ b)  # noqa: B023
        rates.append(2 * size**3 / statistics.median(seconds(lambda: a @ b) for _ in range(5)))  # noqa: B023
    return max(rates)


def our_step(shape: str, dtype: torch.dtype, optimizer: str, folder: Path) -> tuple[Callable, GPTLanguageModel]:
    """One step of training.py: batch, forward, backward, clipping and optimizer."""
    config, batch_size = SHAPES[shape]
    flags = ["-batch_size", str(batch_size), "-optimizer", optimizer, "-dtype", name_of(dtype)]
    args = training.parse_args(flags)
    model = GPTLanguageModel(**config).to(DEVICE).train()
    learner = training.Optimizer(model, args)
    text = training.Text(folder / "output_train.txt", Vocabulary.from_file(folder / "vocab.txt"), config["block_size"])
    steps = iter(range(10**9))
    compiled = args.compile == "on"
    forward = training.compiled(model, training.get_batch(text, 0, args), args) if compiled else model

    def one_step():
        step = next(steps)
        training.train_step(forward, learner, training.get_batch(text, step, args), step, args).item()

    return one_step, model


def load_nanogpt(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt", folder / "model.py")
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference(config: dict) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The tutorial's model and optimizer, or nanoGPT's, compiled on a GPU as it is by default."""
    if nanogpt is None:
        model = PlainGPT(**config).to(DEVICE)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)
    with redirect_stdout(io.StringIO()):
        model = nanogpt.GPT(nanogpt.GPTConfig(**{"n_layer": 4, "n_head": 4, "bias": False, **config})).to(DEVICE)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), DEVICE.type)
    if DEVICE.type == "cuda":
        model.compile()
    return model, optimizer


def reference_dtype() -> torch.autocast:
    """float32, but nanoGPT's default on a GPU."""
    return torch.autocast(DEVICE.type, FAST, enabled=nanogpt is not None and DEVICE.type == "cuda")


def reference_step(shape: str) -> Callable:
    """The same work as the tutorial and nanoGPT do it: the batch cut from encoded text in a loop."""
    config, batch_size = SHAPES[shape]
    block_size = config["block_size"]
    model, optimizer = reference(config)
    model.train()
    data = torch.randint(0, config["vocab_size"], (100_000,), device=DEVICE)

    def step():
        starts = torch.randint(len(data) - block_size, (batch_size,))
        x = torch.stack([data[i : i + block_size] for i in starts])
        y = torch.stack([data[i + 1 : i + block_size + 1] for i in starts])
        with reference_dtype():
            _, loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if nanogpt:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def measure_step(shape: str, dtype: torch.dtype, optimizer: str, folder: Path, pairs: int) -> None:
    step, model = our_step(shape, dtype, optimizer, folder)
    rate = matmul_rate(dtype)
    mine, other, ratios = in_turn(step, reference_step(shape), pairs)
    rate = max(rate, matmul_rate(dtype))
    config, batch_size = SHAPES[shape]
    attention = 12 * len(model.blocks) * config["n_embd"] * config["block_size"]  # per token, see PaLM, appendix B
    weights = sum(p.numel() for p in model.parameters())
    flops = (6 * weights + attention) * batch_size * config["block_size"] / mine
    share = f"{flops / 1e9:.0f} GFLOP/s, {flops / rate:.0%} of the {rate / 1e9:.0f} of a matmul"
    name = f"training step, {shape} shape, {name_of(dtype)}, {optimizer}"
    row(name, f"{mine * 1e3:.1f} ms", f"{other * 1e3:.1f} ms", spread(ratios), share)


def step(folder: Path) -> None:
    for optimizer in training.LEARNING_RATES:
        measure_step("default", FAST, optimizer, folder, pairs=7)


def step_float32(folder: Path) -> None:
    measure_step("default", torch.float32, "adamw", folder, pairs=5)


def step_small(folder: Path) -> None:
    for optimizer in training.LEARNING_RATES:
        measure_step("small", FAST, optimizer, folder, pairs=40)


def step_shakespeare(folder: Path) -> None:
    for optimizer in training.LEARNING_RATES:
        measure_step("shakespeare", FAST, optimizer, folder, pairs=5)


def step_large(folder: Path) -> None:
    measure_step("large", FAST, "adamw", folder, pairs=5)


def batch(folder: Path) -> None:
    text = training.Text(folder / "output_train.txt", Vocabulary.from_file(folder / "vocab.txt"), 128)
    data = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="w+", shape=(1_000_000,))
    steps, args = iter(range(10**9)), training.parse_args(["-device", "cpu"])

    def from_encoded():  # the way of nanoGPT's get_batch, from tokens encoded beforehand
        starts = torch.randint(len(data) - 128, (32,))
        x = torch.stack([torch.from_numpy(data[i : i + 128].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 129].astype(np.int64)) for i in starts])
        return x, y

    mine, other, ratios = in_turn(lambda: training.get_batch(text, next(steps), args), from_encoded, 500)
    row("batch of 32 x 128 from the text", f"{mine * 1e3:.3f} ms", f"{other * 1e3:.3f} ms", spread(ratios), "encoded")


# Learning ------------------------------------------------------------------------------------------------------------


def learn(folder: Path, optimizer: str, max_iters: int) -> tuple[float, float, float]:
    """Train the small shape on a schedule of this length.

    Gives the loss on the whole validation text, the seconds for training and those for evaluating.
    """
    config, batch_size = SHAPES["small"]
    shape = {"block_size": config["block_size"], "n_embd": config["n_embd"], "batch_size": batch_size, "dropout": 0}
    flags = {**shape, "optimizer": optimizer, "max_iters": max_iters, "data_dir": folder}
    args = training.parse_args([f"-{name}={value}" for name, value in flags.items()])
    torch.manual_seed(args.seed)
    model, vocabulary = training.starting_model(args)
    model.to(DEVICE)
    train_text, val_text = (
        training.Text(folder / name, vocabulary, args.block_size) for name in ("output_train.txt", "output_val.txt")
    )
    learner = training.Optimizer(model, args)

    def train():
        for step in range(max_iters):
            training.train_step(model, learner, training.get_batch(train_text, step, args), step, args)

    trained = seconds(train)
    whole, _ = training.evaluation_batches(val_text, val_text.size, 0, args)
    start = time.perf_counter()
    return training.mean_loss(model, val_text, whole, DEVICE), trained, time.perf_counter() - start


def learning(folder: Path) -> None:
    """Steps and seconds to the target loss, on the shortest of these schedules that gets there."""
    for optimizer in training.LEARNING_RATES:
        for max_iters in (500, 600, 700, 850, 1000, 1400, 2000):
            loss, trained, told = learn(folder, optimizer, max_iters)
            if loss <= TARGET:
                break
        name = f"loss {TARGET}, small shape, {optimizer}"
        row(name, f"{max_iters} steps, {trained:.1f} s", "", "", f"ends at {loss:.4f}, evaluated in {told:.1f} s")


def steps_by_torchrun(folder: Path, processes: int, batch_size: int, count: int = 8) -> subprocess.Popen:
    """Start a run of the default shape in processes of one thread each, and leave its seconds to `seconds_of`."""
    flags = {"batch_size": batch_size, "max_iters": count, "eval_interval": count, "eval_iters": 1, "device": "cpu"}
    model = Path(tempfile.mkdtemp(dir=folder)) / "model.pkl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*torchrun, str(ROOT / "training.py"), f"-data_dir={folder}", f"-model={model}"]
    command += [f"-{name}={value}" for name, value in flags.items()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    run.metrics, run.count = model.with_suffix(".metrics.csv"), count
    return run


def seconds_of(*runs: subprocess.Popen) -> float:
    """Seconds per step of runs side by side, the mean of them."""
    for run in runs:
        assert run.wait() == 0
    return statistics.mean(float(run.metrics.read_text().split(",")[-1]) / run.count for run in runs)


def scale(folder: Path) -> None:
    """One process, two that share the same rows, and two that have half of them each and nothing to tell each other."""
    times = []
    for _ in range(5):
        one = seconds_of(steps_by_torchrun(folder, 1, 32))
        two = seconds_of(steps_by_torchrun(folder, 2, 32))
        apart = seconds_of(steps_by_torchrun(folder, 1, 16), steps_by_torchrun(folder, 1, 16))
        times.append((one, two, apart))
    one, two, _ = (statistics.median(side) for side in zip(*times))
    talk = statistics.median(1 - apart / two for _, two, apart in times)
    ratios = [one / two for one, two, _ in times]
    note = f"talking takes {talk:.0%} of a step"
    row("step in two processes, against one", f"{two * 1e3:.0f} ms", f"{one * 1e3:.0f} ms", spread(ratios), note)


# Generating ----------------------------------------------------------------------------------------------------------


def measure_generation(name: str, dtype: torch.dtype, sequences: int, tokens: int, pairs: int) -> None:
    config, _ = SHAPES["default"]
    ours, (theirs, _) = GPTLanguageModel(**config).eval().to(DEVICE, dtype), reference(config)
    theirs.eval()
    prompt = torch.zeros(sequences, 1, dtype=torch.long, device=DEVICE)
    caches = ours.new_caches(sequences)
    if DEVICE.type == "cuda":
        ours.decode = torch.compile(ours.decode, mode="reduce-overhead", fullgraph=True)
    block_size, few = config["block_size"], tokens // 10
    # The others run the whole context for every token. A tenth of the tokens, around the mean context, will do.
    mean_context = statistics.mean(min(t, block_size) for t in range(1, tokens + 1))
    context = torch.zeros(sequences, int(mean_context - few / 2), dtype=torch.long, device=DEVICE)

    def generate_few():
        with reference_dtype():
            theirs.generate(context, few)

    mine, other, ratios = in_turn(lambda: ours.generate(prompt, tokens, caches=caches), generate_few, pairs)
    scale = tokens / few
    rates = f"{sequences * tokens / mine:.0f} tok/s", f"{sequences * few / other:.0f} tok/s"
    row(name, *rates, spread([ratio * scale for ratio in ratios]), f"{name_of(dtype)}")


def generate(folder: Path) -> None:
    for dtype in dict.fromkeys((torch.float32, FAST)):
        measure_generation("generate 500 tokens, one sequence", dtype, 1, 500, pairs=5)


def generate16(folder: Path) -> None:
    for dtype in dict.fromkeys((torch.float32, FAST)):
        measure_generation("generate 150 tokens, 16 sequences", dtype, 16, 150, pairs=5)


def startup(folder: Path) -> None:
    vocabulary = Vocabulary("".join(map(chr, range(32, 132))))
    save_model(folder / "model-01.pkl", GPTLanguageModel(100), vocabulary)
    chat = [sys.executable, str(ROOT / "chatbot.py"), "-prompt", "x", "-max_new_tokens", "1"]
    run = {"cwd": folder, "stdout": subprocess.DEVNULL, "check": True}
    mine, other, ratios = in_turn(
        lambda: subprocess.run(chat, **run), lambda: subprocess.run([sys.executable, "-c", "import torch"], **run), 7
    )
    row("chatbot.py -prompt x -max_new_tokens 1", f"{mine:.2f} s", f"{other:.2f} s", spread(ratios), "import torch")


# Extracting ----------------------------------------------------------------------------------------------------------


def write_archives(folder: Path, megabytes: int) -> list[Path]:
    """Archives of OpenWebText's shape, from Python's own source: tars of about 400 documents, 2 MB of text, in .xz."""
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
    archives.mkdir(), output.mkdir()
    paths = write_archives(archives, 64)
    command = [sys.executable, str(ROOT / "data_extract.py"), "-data_dir", str(archives), "-output_dir", str(output)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cores = os.cpu_count()

    def unpack_on_all_cores():
        running = []
        for core in range(cores):
            with open(output / f"{core}.txt", "wb") as file:
                running.append(subprocess.Popen(["xz", "-dc", *map(str, paths[core::cores])], stdout=file))
        for process in running:
            assert process.wait() == 0

    if shutil.which("xz") is None:
        raise SystemExit("extract: install xz to compare with")
    mine, other, ratios = in_turn(lambda: subprocess.run(command, check=True, **quiet), unpack_on_all_cores, 7)
    against = f"xz -dc on {cores} cores"
    row("extract 64 MB of OpenWebText's shape", f"{mine:.2f} s", f"{other:.2f} s", spread(ratios), against)


# The table -----------------------------------------------------------------------------------------------------------

QUICK = (step, step_float32, step_small, generate, generate16, batch, startup, extract)
ROWS = {function.__name__: function for function in (*QUICK, learning, scale, step_shakespeare, step_large)}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def provide_text(folder: Path, data_dir: Path | None) -> None:
    """Put the three files of `data_dir` into the folder, or those of the built-in sample."""
    if data_dir is None:
        subprocess.run([sys.executable, str(ROOT / "data_extract.py")], cwd=folder, check=True, capture_output=True)
    else:
        for name in ("output_train.txt", "output_val.txt", "vocab.txt"):
            shutil.copyfile(data_dir / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-only", choices=ROWS, help="measure this row alone; some, which take long, only so")
    parser.add_argument("-data_dir", type=Path, help="folder with the three files of a text; else, the built-in sample")
    parser.add_argument("-nanogpt", type=Path, help="clone of nanoGPT, to compare steps and generation with")
    args = parser.parse_args()
    global nanogpt
    nanogpt = load_nanogpt(args.nanogpt) if args.nanogpt else None
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version.split()[0]}\n")
    print("| work | this | reference | ratio reference/this | |\n|---|---|---|---|---|")
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        provide_text(Path(folder), args.data_dir)
        for name, measure in ROWS.items():
            if args.only == name or (args.only is None and measure in QUICK):
                measure(Path(folder))


if __name__ == "__main__":
    main()
