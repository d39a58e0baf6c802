"""Train a GPT on the text that data_extract.py made, and keep the best model in `model-01.pkl`.

    python training.py -batch_size 32
    python training.py -resume
    torchrun --standalone --nproc_per_node=8 training.py -batch_size 256

The texts are memory-mapped, never read whole: a step draws random places in the training text, takes `block_size` + 1
characters from each, and asks the model to predict every character from those before it. Started by `torchrun`, many
processes share the rows of each step.

Beside the best model a run keeps `model-01.state.pkl`, from which `-resume` goes on as if nothing had happened, and
`model-01.metrics.csv`, a line for each evaluation.
"""

import argparse
import importlib.util
import math
import mmap
import os
import re
import signal
import sys
import time
from codecs import utf_8_decode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import model as model_module
from model import (
    MAX_BLOCK_SIZE,
    GPTLanguageModel,
    ModelFileError,
    Vocabulary,
    atomic_write,
    bounded,
    build_model,
    choose_device,
    default_dtype,
    first_line,
    is_out_of_memory,
    load_model,
    prepare_streams,
    read_model_file,
    save_model,
)

RANK = int(os.environ.get("RANK", 0))  # of this process among those that torchrun has started
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many these are
MEMORY = 80_000  # tokens over which AdamW averages a gradient's square
STEP, EVALUATION = 0, 1  # what rows of text are drawn for
CHUNK = 2**24  # bytes
ADAMW_SHARE = 0.075  # AdamW's learning rate beside Muon, as a share of Muon's
LEARNING_RATES = {"adamw": 3e-3, "muon": 0.02}
RISING = 5  # evaluations without a better one until the run says so


class TrainingError(Exception):
    """Training can't start or go on; the message says why and what to do."""


# Text ----------------------------------------------------------------------------------------------------------------


class Text:
    """A memory-mapped UTF-8 text from which random rows of token ids are drawn.

    Only the parts that are drawn are ever read, so a text may be larger than memory. Raises OSError, and TrainingError
    for a text too short for a single row.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, block_size: int):
        self.path, self.row_length = path, block_size + 1
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        if self.size and hasattr(mmap, "MADV_RANDOM"):  # or the system reads megabytes around every row
            self.bytes.madvise(mmap.MADV_RANDOM)
        self.array = np.frombuffer(self.bytes, dtype=np.uint8)
        tail = self.array[-4 * self.row_length :]  # a character has at most 4 bytes
        starts = np.flatnonzero(~is_continuation(tail))
        if len(starts) < self.row_length:
            raise TrainingError(
                f"{path}: holds {len(starts)} characters, -block_size {block_size} takes {self.row_length} or more; "
                "use a longer text or a smaller block"
            )
        self.last_start = self.size - len(tail) + int(starts[-self.row_length])
        self.ids = np.full(sys.maxunicode + 1, -1, dtype=np.int64)  # code point -> token id
        self.ids[[ord(character) for character in vocabulary.characters]] = np.arange(len(vocabulary))

    def draw_offsets(self, count: int, key: list[int]) -> np.ndarray:
        """Byte offsets of `count` independent uniformly drawn characters; `key` alone decides which."""
        random = np.random.default_rng(key)
        offsets = random.integers(0, self.last_start, count, endpoint=True)
        while (inside := is_continuation(self.array[offsets])).any():
            offsets[inside] = random.integers(0, self.last_start, np.count_nonzero(inside), endpoint=True)
        return offsets

    def windows(self) -> tuple[np.ndarray, int]:
        """The whole text in rows that share only one character: byte offsets, and the length of the last row.

        So every character but the very first is predicted exactly once.
        """
        block_size = self.row_length - 1
        found, count = [], 0
        for start in range(0, self.size, CHUNK):
            characters = np.flatnonzero(~is_continuation(self.array[start : start + CHUNK]))
            found.append(start + characters[-count % block_size :: block_size])
            count += len(characters)
        windows = -(-(count - 1) // block_size)  # a last character alone predicts nothing
        return np.concatenate(found)[:windows], count - (windows - 1) * block_size

    def rows(self, offsets: np.ndarray, length: int | None = None) -> np.ndarray:
        """Token ids (len(offsets), length) of the texts that begin at these bytes; a row has block_size + 1 by default.

        Raises TrainingError if that is not UTF-8, or not in the vocabulary.
        """
        texts, length = [], length or self.row_length
        for offset in offsets.tolist():
            try:  # decodes whole characters and leaves out the one that may be torn at the end
                text, _ = utf_8_decode(self.bytes[offset : offset + 4 * length], "strict", False)
            except UnicodeDecodeError as error:
                raise TrainingError(f"{self.path}: not UTF-8 text at byte {offset + error.start}") from error
            if len(text) < length:
                raise TrainingError(f"{self.path}: ends inside a character; it was cut short")
            texts.append(text[:length])
        code_points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        ids = self.ids[code_points].reshape(len(offsets), length)
        if ids.min() < 0:
            row, column = np.argwhere(ids < 0)[0]
            offset = int(offsets[row]) + len(texts[row][:column].encode())
            raise TrainingError(
                f"{self.path}: the character {texts[row][column]!r} at byte {offset} is not in vocab.txt; "
                "run data_extract.py again so that both belong together"
            )
        return ids


def is_continuation(array: np.ndarray) -> np.ndarray:
    """Which bytes of UTF-8 text are inside a character, not at the start of one."""
    return (array & 0xC0) == 0x80


def get_batch(text: Text, step: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step, token ids (B, T) each: the targets are the characters that follow the inputs.

    The rows of a step depend on seed and step alone; of the `batch_size` of them, each process takes its share, B.
    """
    offsets = text.draw_offsets(args.batch_size, [args.seed, step, STEP])
    share = args.batch_size // WORLD_SIZE
    rows = torch.from_numpy(text.rows(offsets[RANK * share :][:share]))
    cuda = args.device.type == "cuda"  # which can copy from pinned memory while it computes
    rows = (rows.pin_memory() if cuda else rows).to(args.device, non_blocking=cuda)
    return rows[:, :-1], rows[:, 1:]


# Learning ------------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to `learning_rate`, then a cosine down to `min_lr` at the last step."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def beta2(args: argparse.Namespace) -> float:
    """What AdamW keeps of its average square in a step: less, the more tokens a step has, as the noise is less.

    Marek et al. 2025, "Small Batch Size Training for Language Models", keeps its half-life in tokens fixed.
    """
    return min(max(0.95, 1 - args.batch_size * args.block_size / MEMORY), 0.999)


class Muon(torch.optim.Muon):
    """torch's Muon for the matrices inside the blocks: a step turns each of them equally far in all directions.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The heads' matrices of a layer are
    joined, queries, keys and values apart: a loss of 1.582 where heads one by one gave 1.588 (means of two seeds).
    """

    def __init__(self, model: GPTLanguageModel, weight_decay: float):
        self.heads = [
            [getattr(head, part).weight for head in block.sa.heads]
            for block in model.blocks
            for part in ("query", "key", "value")
        ]
        self.joined = [torch.nn.Parameter(torch.cat(weights)) for weights in self.heads]
        for joined, weights in zip(self.joined, self.heads):
            for weight, rows in zip(weights, joined.data.chunk(len(weights))):
                weight.data = rows
        self.taken = {p for p in model.blocks.parameters() if p.dim() == 2}
        alone = self.taken.difference(*self.heads)
        super().__init__([*self.joined, *(p for p in model.parameters() if p in alone)], weight_decay=weight_decay)
        fast = default_dtype(model.lm_head.weight.device)
        self.precision = nullcontext() if fast == torch.bfloat16 else Float32()

    def join_gradients(self) -> None:
        """Has to come before each step."""
        for joined, weights in zip(self.joined, self.heads):
            joined.grad = torch.cat([weight.grad for weight in weights])

    def step(self) -> None:
        with self.precision:
            super().step()


class Float32(TorchFunctionMode):
    """Within it, nothing is cast to bfloat16, as torch's Muon does: 100 times slower on a CPU without units for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0].clone() if function is torch.Tensor.bfloat16 else function(*args, **(kwargs or {}))


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) for everything, or for what Muon leaves: embeddings, norms, biases, head.

    Only matrices decay: biases and norms have no need of it. `scaler` keeps small gradients from vanishing in float16.
    """

    def __init__(self, model: GPTLanguageModel, args: argparse.Namespace):
        self.args = args
        self.muon = Muon(model, args.weight_decay) if args.optimizer == "muon" else None
        taken = self.muon.taken if self.muon else set()
        others = [p for p in model.parameters() if p not in taken]
        share = ADAMW_SHARE if self.muon else 1.0  # of the learning rate
        groups = [
            {"params": [p for p in others if p.dim() >= 2], "weight_decay": args.weight_decay, "share": share},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "share": share},
        ]
        adamw = torch.optim.AdamW(groups, betas=(0.9, beta2(args)), fused=True)
        self.parts = [self.muon, adamw] if self.muon else [adamw]
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)

    @property
    def groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, step: int) -> None:
        """Change the weights by their gradients, at the learning rate of this step."""
        if self.muon:
            self.muon.join_gradients()
        for part in self.parts:
            self.scaler.unscale_(part)
        parameters = [p for group in self.groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clip or math.inf)
        for group in self.groups:
            group["lr"] = learning_rate_at(step, self.args) * group.get("share", 1.0)
        for part in self.parts:
            self.scaler.step(part)
        self.scaler.update()

    def state(self) -> dict:
        return {"parts": [part.state_dict()["state"] for part in self.parts], "scaler": self.scaler.state_dict()}

    def restore(self, state: dict) -> None:
        """Raises one of many exceptions for anything but the state of such an optimizer."""
        self.scaler.load_state_dict(state["scaler"])
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict({**part.state_dict(), "state": saved})
            if len(saved) not in (0, sum(len(group["params"]) for group in part.param_groups)):
                raise ValueError("the state of another model")
            for parameter, values in part.state.items():  # the fused step trusts these shapes blindly
                if part is self.muon:
                    shapes = {"momentum_buffer": parameter.shape}
                else:
                    shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                if {name: value.shape for name, value in values.items()} != shapes:
                    raise ValueError("the state of another optimizer or model")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Within it, multiplications are done in `dtype`; weights, norms and losses stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def train_step(
    forward: torch.nn.Module,
    optimizer: Optimizer,
    batch: tuple[torch.Tensor, torch.Tensor],
    step: int,
    args: argparse.Namespace,
) -> torch.Tensor:
    """Learn from the inputs and targets of one step; return their loss, still on its device.

    `forward` is the model, or what runs it in several processes or compiled.
    """
    # A generator seeded for each step needs no saving, and is another one in each process.
    torch.manual_seed(int(np.random.default_rng([args.seed, step, RANK]).integers(2**63)))
    forward.zero_grad(set_to_none=True)
    losses = []
    for x, y in zip(*(part.chunk(args.grad_accum) for part in batch)):
        last = len(losses) == args.grad_accum - 1
        with nullcontext() if last or WORLD_SIZE == 1 else forward.no_sync():  # gradients are sent once
            with autocast(args.device, args.dtype):
                _, loss = forward(x, y)
            optimizer.scaler.scale(loss / args.grad_accum).backward()
        losses.append(loss.detach())
    optimizer.step(step)
    return torch.stack(losses).mean()


def compiled(
    model: GPTLanguageModel, batch: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace
) -> torch.nn.Module:
    """The model, compiled for such batches; as it is, with a notice, where that can't be done."""
    print("compiling   the model, which takes a minute or so ...", flush=True)
    forward, started = torch.compile(model), time.monotonic()
    try:
        with autocast(args.device, args.dtype):
            _, loss = forward(*(part.chunk(args.grad_accum)[0] for part in batch))
        loss.backward()
    except Exception as error:  # no compiler, or one of many things that it can't do
        print(f"-compile on: can't be done here, training goes on without: {first_line(error)}", file=sys.stderr)
        return model
    print(f"compiled    in {time.monotonic() - started:.0f} s", flush=True)
    return forward


# Many processes ------------------------------------------------------------------------------------------------------


@contextmanager
def process_group(args: argparse.Namespace) -> Iterator[None]:
    """Connects the processes that torchrun has started, if it has."""
    if WORLD_SIZE == 1:
        yield
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
    yield
    distributed.destroy_process_group()


def over_processes(values: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
    """The values of all processes as one."""
    if WORLD_SIZE > 1 and distributed.is_initialized():
        distributed.all_reduce(values, getattr(distributed.ReduceOp, operation))
    return values


# Evaluating ----------------------------------------------------------------------------------------------------------


Batches = list[tuple[np.ndarray, int]]  # byte offsets of rows, and the length of these rows


def evaluation_batches(text: Text, limit: int, count: int, args: argparse.Namespace) -> tuple[Batches, bool]:
    """The rows to evaluate on, and whether they are the whole text, which they are if it has at most `limit` rows.

    Else they are `count` rows from anywhere in it, the same ones every time.
    """
    tail = []
    whole = text.size <= 4 * args.block_size * limit and len(text.windows()[0]) <= limit
    if whole:
        offsets, length = text.windows()
        offsets, tail = offsets[:-1], [(offsets[-1:], length)]
    else:
        offsets = text.draw_offsets(count, [args.seed, 0, EVALUATION])
    size = args.batch_size // (WORLD_SIZE * args.grad_accum)
    return [(offsets[i : i + size], args.block_size + 1) for i in range(0, len(offsets), size)] + tail, whole


@torch.no_grad()
def mean_loss(
    model: GPTLanguageModel,
    text: Text,
    batches: Batches,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Mean cross-entropy in nats per character over the rows of all batches of all processes, in eval mode."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, device=device)  # nats, characters
    for offsets, length in batches:
        rows = torch.from_numpy(text.rows(offsets, length)).to(device)
        with autocast(device, dtype):
            _, loss = model(rows[:, :-1], rows[:, 1:])
        count = rows[:, 1:].numel()
        totals += torch.stack([loss * count, torch.full_like(loss, count)])
    model.train(was_training)
    nats, characters = over_processes(totals).tolist()
    return nats / characters


def sample_lines(model: GPTLanguageModel, vocabulary: Vocabulary, args: argparse.Namespace) -> list[str]:
    """Two lines of what the model writes now, always with the same luck, so that they can be compared."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    start = torch.tensor([[vocabulary.ids.get("\n", 0)]], device=args.device)
    banned_ids = vocabulary.banned_ids if len(vocabulary) > 1 else []
    text = model.generate(start, 160, temperature=0.8, generator=generator, banned_ids=banned_ids)
    text = vocabulary.decode(text[0, 1:].tolist())
    lines = [line[i : i + 80] for line in text.splitlines() for i in range(0, len(line), 80) if line.strip()]
    return ["".join(c if c.isprintable() else " " for c in line) for line in lines[:2]]


class Metrics:
    """A row for each evaluation, in a CSV file that is whole at any time."""

    COLUMNS = ("step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds")

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def add(self, *row: float) -> None:
        self.rows.append(list(row))
        self.save()

    def save(self) -> None:
        with atomic_write(self.path) as file:
            for row in (self.COLUMNS, *self.rows):
                file.write(",".join(map(str, row)).encode() + b"\n")

    def draw(self, path: Path) -> None:
        """Draw both losses over the steps. Needs matplotlib; raises OSError."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        steps, train_losses, val_losses, *_ = zip(*self.rows)
        axes.plot(steps, train_losses, marker=".", label="training text")
        axes.plot(steps, val_losses, marker=".", label="validation text")
        axes.set(xlabel="step", ylabel="loss (nats per character)", title=self.path.name.removesuffix(".metrics.csv"))
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)


# A run ---------------------------------------------------------------------------------------------------------------


def beside(model: Path, ending: str) -> Path:
    """model-01.pkl, ".state.pkl" -> model-01.state.pkl"""
    return Path(os.path.splitext(model)[0] + ending)


class Run:
    """A model in training: its optimizers and texts, how far it has come, and the files that it keeps."""

    def __init__(self, args: argparse.Namespace, model: GPTLanguageModel, vocabulary: Vocabulary):
        self.args, self.model, self.vocabulary = args, model, vocabulary
        self.train_text, self.val_text = (
            Text(args.data_dir / name, vocabulary, args.block_size) for name in ("output_train.txt", "output_val.txt")
        )
        # A row costs a third in evaluation of what it costs in training, so this is at most 4 % of the steps.
        limit = int(0.12 * min(args.eval_interval, args.max_iters) * args.batch_size)
        count = args.eval_iters * args.batch_size
        self.train_batches, self.val_batches = (
            evaluation_batches(text, limit, count, args)[0][RANK::WORLD_SIZE]
            for text, limit in ((self.train_text, 0), (self.val_text, limit))
        )
        self.optimizer = Optimizer(model, args)
        self.step, self.seconds = 0, 0.0
        self.best, self.best_step, self.evaluations_since = math.inf, 0, 0
        self.metrics = Metrics(beside(args.model, ".metrics.csv"))

    def state(self) -> dict:
        """All that a resumed run needs beyond the model."""
        return {
            "arguments": self.args.settings,
            "texts": [self.train_text.size, self.val_text.size],
            "progress": [self.step, self.seconds, self.best, self.best_step, self.evaluations_since],
            "metrics": self.metrics.rows,
            "optimizer": self.optimizer.state(),
        }

    def restore(self, state: dict) -> None:
        """Go back to a saved state. Raises ModelFileError if it does not fit, TrainingError for other texts."""
        source = beside(self.args.model, ".state.pkl")
        try:
            step, seconds, best, best_step, evaluations_since = state["progress"]
            self.step, self.seconds, self.best = int(step), float(seconds), float(best)
            self.best_step, self.evaluations_since = int(best_step), int(evaluations_since)
            rows, texts = state["metrics"], state["texts"]
            fit = all(len(row) == len(Metrics.COLUMNS) and all(map(math.isfinite, row)) for row in rows)
            if self.step < 0 or not fit:
                raise ValueError("what no run comes to")
            self.metrics.rows = rows
            self.optimizer.restore(state["optimizer"])
        except Exception as error:  # parts that are missing, of the wrong type or of the wrong shape
            raise ModelFileError(f"{source}: does not hold a run to go on with") from error
        if texts != [self.train_text.size, self.val_text.size]:
            raise TrainingError(f"{self.args.data_dir}: the texts are not those that {source} began with; start anew")
        if not self.args.model.exists():
            self.best = math.inf
        if RANK == 0:
            self.metrics.save()  # without the rows of steps that were lost

    def save_state(self) -> None:
        if RANK == 0:
            save_model(beside(self.args.model, ".state.pkl"), self.model, self.vocabulary, training=self.state())

    def train(self, interruption: "Interruption") -> None:
        """Run the training loop to its end, to an interruption or to the end of its patience."""
        args, patience = self.args, self.args.patience or math.inf
        tokens = args.batch_size * args.block_size
        started = time.monotonic() - self.seconds
        forward = self.model.train()
        batch = get_batch(self.train_text, self.step, args)
        if args.compile == "on":
            forward = compiled(forward, batch, args)
        if WORLD_SIZE > 1:
            forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
        bar = {"unit": "tok", "unit_scale": True, "dynamic_ncols": True, "mininterval": 0.5, "disable": RANK > 0}
        with tqdm(total=args.max_iters * tokens, initial=self.step * tokens, **bar) as bar:
            while self.step < args.max_iters and self.evaluations_since < patience and not interruption.agreed():
                loss = train_step(forward, self.optimizer, batch, self.step, args)
                self.step += 1
                batch = get_batch(self.train_text, self.step, args)  # while a GPU is still busy with the last one
                self.seconds = time.monotonic() - started
                bar.set_description(f"step {self.step}/{args.max_iters}", refresh=False)
                if bar.update(tokens):  # reading the loss waits for the device, so do it only when the bar is drawn
                    self.check(loss.item())
                    bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                evaluating = self.step % args.eval_interval == 0 or self.step == args.max_iters
                if evaluating:
                    bar.write(self.evaluate(), file=sys.stdout)
                    sys.stdout.flush()
                if evaluating or self.step % args.save_interval == 0:
                    self.check(loss.item())
                    self.save_state()
        if interruption.signal:
            self.save_state()

    def check(self, loss: float) -> None:
        """Raise TrainingError if the loss is no longer a number."""
        if not math.isfinite(loss):
            kept = f"; the best model so far is in {self.args.model}" if self.best < math.inf else ""
            raise TrainingError(
                f"the loss is {loss} after step {self.step}, at learning rate "
                f"{learning_rate_at(self.step - 1, self.args):.2g}; "
                f"try a lower -learning_rate or a longer -warmup_iters{kept}"
            )

    def evaluate(self) -> str:
        """Save the model if it is the best so far; return the lines to show."""
        args = self.args
        train_loss = mean_loss(self.model, self.train_text, self.train_batches, args.device, args.dtype)
        val_loss = mean_loss(self.model, self.val_text, self.val_batches, args.device, args.dtype)
        self.check(val_loss)
        line = f"step {self.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
        self.evaluations_since += 1
        best = val_loss < self.best
        if best:
            self.best, self.best_step, self.evaluations_since = val_loss, self.step, 0
            line += f", saved {args.model}"
        if RANK > 0:
            return line
        if best:
            save_model(args.model, self.model, self.vocabulary)
        rate, tokens = learning_rate_at(self.step - 1, args), self.step * args.batch_size * args.block_size
        self.metrics.add(self.step, round(train_loss, 6), round(val_loss, 6), rate, tokens, round(self.seconds, 3))
        if args.plot:
            self.metrics.draw(args.plot)
        lines = [line, *(f"    {sampled}" for sampled in sample_lines(self.model, self.vocabulary, args))]
        if self.evaluations_since == RISING:
            lines.append(
                f"the validation loss has been above that of step {self.best_step} for {RISING} evaluations: the model "
                "learns the training text by heart. More text or a higher -dropout helps; -patience N stops such a run"
            )
        return "\n".join(lines)

    def report(self) -> None:
        """Show the best model's loss over the whole validation text, or as much as takes 3 % of the run."""
        args = self.args
        limit = max(1, args.max_iters * args.batch_size // 10)
        batches, whole = evaluation_batches(self.val_text, limit, limit, args)
        model, _ = load_model(args.model, args.device)
        loss = mean_loss(model, self.val_text, batches, args.device)
        characters = self.val_text.size * (1 - is_continuation(self.val_text.array[:CHUNK]).mean())
        part = "the whole" if whole else f"{limit * args.block_size / characters:.2%} of the"
        print(
            f"best model, of step {self.best_step}: {loss:.4f} nats = {loss / math.log(2):.3f} bits per character over "
            f"{part} validation text, in {args.model}; talk to it: python chatbot.py{model_flag(args)}",
            flush=True,
        )


class Interruption:
    """Notes Ctrl-C and SIGTERM, so that the loop can end in good order; a second one ends the program at once.

    Not so under torchrun: it passes on to its processes what they have received themselves, and ends them if need be.
    """

    def __enter__(self) -> "Interruption":
        self.noted = self.signal = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        self.noted = number
        if WORLD_SIZE == 1:  # from now on the system ends the program, since Python would wait for a backward pass
            for ending in self.before:
                signal.signal(ending, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal that any process has received, or 0: all of them have to end after the same step."""
        self.signal = int(over_processes(torch.tensor(self.noted), "MAX"))
        return self.signal

    def __exit__(self, *_) -> None:
        for signal_number, handler in self.before.items():
            signal.signal(signal_number, handler)


# The command ---------------------------------------------------------------------------------------------------------

# Flags that don't change what is learnt
FREE = ("model", "data_dir", "device", "compile", "grad_accum", "save_interval", "plot", "resume")
SHAPE = ("n_embd", "n_head", "n_layer", "block_size")


def make_parser() -> argparse.ArgumentParser:
    parser, flag = model_module.make_parser("Train a GPT on output_train.txt and keep the best model.")
    flag("batch_size", type=bounded(int, 1), default=32, help="sequences per optimizer step, over all processes")
    flag("grad_accum", type=bounded(int, 1), default=1, help="parts of a step, one after another: takes less memory")
    flag(
        "block_size",
        type=bounded(int, 1, below=MAX_BLOCK_SIZE + 1),
        default=128,
        help="characters that the model sees at once",
    )
    flag("max_iters", type=bounded(int, 1), default=500, help="optimizer steps")
    flag("optimizer", choices=("adamw", "muon"), default="adamw", help="muon learns more per step, for the blocks")
    rates = " and ".join(f"{rate} with {optimizer}" for optimizer, rate in LEARNING_RATES.items())
    flag("learning_rate", type=bounded(float, 0), help=f"highest learning rate, after the warm-up; without it, {rates}")
    flag("min_lr", type=bounded(float, 0), help="learning rate at the end; without it, 0 with muon, a tenth with adamw")
    warmup = "steps in which the learning rate rises from 0; without it, 150 or at most a third of -max_iters"
    flag("warmup_iters", type=bounded(int, 0), help=warmup)
    flag("weight_decay", type=bounded(float, 0), default=0.1, help="weight decay, on matrices only")
    flag("grad_clip", type=bounded(float, 0), default=1.0, help="longest gradient (norm over all weights); 0: any")
    flag("n_embd", type=bounded(int, 1), default=384, help="numbers per character inside the model")
    flag("n_head", type=bounded(int, 1), default=4, help="attention heads per layer")
    flag("n_layer", type=bounded(int, 1), default=4, help="layers (blocks)")
    flag("dropout", type=bounded(float, 0, below=1), default=0.2, help="share of numbers dropped in training")
    flag("eval_interval", type=bounded(int, 1), default=100, help="steps from one evaluation to the next")
    flag("eval_iters", type=bounded(int, 1), default=8, help="batches per evaluation and text")
    flag(
        "patience", type=bounded(int, 1), help="stop after so many evaluations without a better one; without it, never"
    )
    flag("save_interval", type=bounded(int, 1), default=100, help="steps from one saved state to the next")
    flag("seed", type=bounded(int, 0, below=2**63), default=1337, help="decides initial weights, rows and dropout")
    flag("device", help="cpu, cuda, cuda:1, ...; without it, cuda if there is one, else cpu")
    flag("dtype", choices=("float32", "bfloat16", "float16"), help="for multiplications; without it, what is fast here")
    flag("compile", choices=("on", "off"), help="torch.compile; without it, on with cuda, else off")
    flag("data_dir", type=Path, default=Path("."), help="folder with output_train.txt, output_val.txt and vocab.txt")
    flag("model", type=Path, default=Path("model-01.pkl"), help="file for the trained model")
    flag("resume", action="store_true", help="go on with the run whose state is beside -model, with its settings")
    flag("init_from", type=Path, help="start from the weights and shape of this model file, not from random ones")
    flag("vocab", type=Path, help="vocab.txt of the -init_from model, if that file holds none")
    flag("plot", type=Path, help="draw the losses into this .png, .svg or .pdf file; needs matplotlib")
    return parser


def parse_again(
    parser: argparse.ArgumentParser, arguments: list[str] | None, settled: dict, fixed: Iterable[str], source: Path
) -> argparse.Namespace:
    """Parse with values in place of the defaults. A flag that contradicts one of the fixed ones ends the program."""
    args = parser.parse_args(arguments, argparse.Namespace(**settled))
    for name in sorted(fixed):
        if getattr(args, name) != settled[name]:
            value = "no value" if settled[name] is None else settled[name]
            parser.error(
                f"argument -{name}: {getattr(args, name)} contradicts {source}, which has {value}; leave it out"
            )
    return args


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings; with them `args.start`, the model and vocabulary of the file that a run starts from, or None.

    Raises OSError and ModelFileError for that file.
    """
    parser = make_parser()
    args, start, state = parser.parse_args(arguments), None, None
    if args.resume:
        source = beside(args.model, ".state.pkl")
        content = read_model_file(source)
        start, state = build_model(content, source), content.get("training")
        args = parse_resumed(parser, arguments, args.model, state, source)
    elif args.init_from:
        start = load_model(args.init_from, vocabulary=Vocabulary.from_file(args.vocab) if args.vocab else None)
        args = parse_again(parser, arguments, start[0].config, SHAPE, args.init_from)
    elif args.vocab:
        parser.error("argument -vocab: goes with -init_from only; training takes the vocab.txt in -data_dir")
    check_together(parser, args)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.optimizer]
    unsaved = {"model", "resume", "plot", "vocab_size"}  # a stranger's state is not to say where to draw
    args.settings = [f"-{k}={v}" for k, v in vars(args).items() if k not in unsaved and v is not None]
    args.start, args.state = start, state
    if args.device in (None, "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # a card for each process
    args.device = choose_device(parser, args.device)
    args.dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(args.device)
    args.compile = args.compile or ("on" if args.device.type == "cuda" else "off")
    if args.min_lr is None:
        args.min_lr = 0.0 if args.optimizer == "muon" else args.learning_rate / 10
    if args.warmup_iters is None:
        args.warmup_iters = min(150, args.max_iters // 3)
    return args


def check_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if flags do not fit one another."""
    pieces = WORLD_SIZE * args.grad_accum
    if args.batch_size % pieces:
        fits = [str(n) for n in (args.batch_size // pieces * pieces, (args.batch_size // pieces + 1) * pieces) if n]
        parser.error(
            f"argument -batch_size: {args.batch_size} sequences can't be shared among {WORLD_SIZE} processes x "
            f"-grad_accum {args.grad_accum} evenly; {' and '.join(fits)} can"
        )
    if args.n_embd % args.n_head:
        parser.error(f"argument -n_embd: {args.n_embd} is not a multiple of -n_head {args.n_head}")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument -plot: {str(args.plot)!r} does not end in .png, .svg or .pdf")


def parse_resumed(
    parser: argparse.ArgumentParser, arguments: list[str] | None, model: Path, state: dict, source: Path
) -> argparse.Namespace:
    """The settings of the saved run, with those that the user may change. Raises ModelFileError."""
    try:
        saved = vars(parser.parse_args(state["arguments"]))
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"{source}: does not hold a run to go on with") from error
    fixed = saved.keys() - {*FREE, "max_iters"}
    args = parse_again(parser, arguments, {**saved, "model": model, "resume": True}, fixed, source)
    if args.max_iters < saved["max_iters"]:
        parser.error(f"argument -max_iters: {source} has {saved['max_iters']}, which may only grow")
    if args.max_iters > saved["max_iters"]:
        print(f"the learning rate now follows a schedule of {args.max_iters} steps", file=sys.stderr)
    return args


def starting_model(args: argparse.Namespace) -> tuple[GPTLanguageModel, Vocabulary]:
    """The model of a resumed run, or a new one, with the weights of `-init_from` where it has any."""
    if args.resume:
        return args.start
    vocabulary = Vocabulary.from_file(args.data_dir / "vocab.txt")
    if args.start:
        old_model, old_vocabulary = args.start
        vocabulary = Vocabulary(old_vocabulary.characters + vocabulary.characters)
    shape = {name: getattr(args, name) for name in SHAPE}
    model = GPTLanguageModel(len(vocabulary), dropout=args.dropout, **shape)
    if args.start:
        old_rows = torch.tensor([vocabulary.ids[character] for character in old_vocabulary.characters])
        weights, old_weights = model.state_dict(), old_model.state_dict()
        for name, weight in weights.items():
            if name.startswith(("token_embedding_table", "lm_head")):  # a row for each character
                weight[old_rows] = old_weights[name]
            else:
                weight.copy_(old_weights[name])
    return model, vocabulary


def model_flag(args: argparse.Namespace) -> str:
    quote = '"' if " " in str(args.model) else ""
    return "" if args.model == Path("model-01.pkl") else f" -model {quote}{args.model}{quote}"


def check_outputs(args: argparse.Namespace) -> None:
    """Raise TrainingError before a run that could not save what it learns; leave out a picture that can't be drawn."""
    for flag, path in (("model", args.model), ("plot", args.plot)):
        if path is None:
            continue
        writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
        if not writable or (path.exists() and not path.is_file()):
            raise TrainingError(f"{path}: -{flag} must name a file in a folder that exists and can be written to")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        print("no picture will be drawn: -plot needs matplotlib, pip install matplotlib", file=sys.stderr)
        args.plot = None


def describe(training: Run) -> None:
    args = training.args
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    processes = f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    train_size, val_size = training.train_text.size / 1e6, training.val_text.size / 1e6
    print(f"device      {args.device}{threads}, {str(args.dtype).removeprefix('torch.')}{processes}")
    print(f"model       {sum(p.numel() for p in training.model.parameters()):,} parameters")
    print(f"vocabulary  {len(training.vocabulary):,} characters")
    print(f"text        {train_size:,.2f} MB to train on, {val_size:,.2f} MB to validate with")
    print(f"step        {args.batch_size} x {args.block_size} = {args.batch_size * args.block_size:,} tokens")
    print(f"optimizer   {args.optimizer}, learning rate {args.learning_rate:g}", flush=True)


def run(args: argparse.Namespace, interruption: Interruption) -> int:
    check_outputs(args)
    torch.manual_seed(args.seed)
    model, vocabulary = starting_model(args)
    training = Run(args, model.to(args.device), vocabulary)
    describe(training)
    if args.resume:
        training.restore(args.state)
        end = "; a higher -max_iters goes on" if training.step >= args.max_iters else ""
        print(f"resumed     after step {training.step} of {args.max_iters}{end}", flush=True)
    elif RANK == 0:
        keep_old(args.model)
    with process_group(args):
        training.train(interruption)
    if interruption.signal:
        command = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}" if WORLD_SIZE > 1 else "python"
        print(
            f"training.py: interrupted after step {training.step}; to go on: {command} training.py -resume"
            f"{model_flag(args)}",
            file=sys.stderr,
        )
        return 128 + interruption.signal
    if RANK == 0:
        training.report()
    return 0


def keep_old(model: Path) -> None:
    """Put the files of an earlier run aside; its model also stays where it is, until this run saves one."""
    old = beside(model, f".old{model.suffix or '.pkl'}")
    if model.exists():
        with atomic_write(old) as file:
            file.write(model.read_bytes())
        print(f"the earlier {model} is kept as {old}", file=sys.stderr)
    for ending in (".state.pkl", ".metrics.csv"):
        if beside(model, ending).exists():
            os.replace(beside(model, ending), beside(old, ending))


def main() -> int:
    prepare_streams("backslashreplace")  # names of files need not fit the encoding
    errors, who = sys.stderr, f" process {RANK} of {WORLD_SIZE}:" if WORLD_SIZE > 1 else ""

    def complain(message: str) -> None:
        print(f"training.py:{who} " + message.replace("\n", r"\n"), file=errors)

    if RANK > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        args = parse_args()
        with Interruption() as interruption:
            return run(args, interruption)
    except (TrainingError, ModelFileError) as error:
        complain(str(error))
    except OSError as error:
        name, hint = str(error.filename or "standard output"), ""
        if isinstance(error, FileNotFoundError) and name.endswith(".txt"):
            hint = "; run data_extract.py first, or name its -data_dir"
        if isinstance(error, FileNotFoundError) and name.endswith(".state.pkl"):
            hint = "; there is no run to go on with, start one without -resume"
        if not error.filename:
            sys.stdout = None  # or Python would try to write to it once more
        complain(f"{name}: {error.strerror}{hint}")
    except (MemoryError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            complain("not enough memory; try a higher -grad_accum or a smaller -batch_size, -n_embd or -block_size")
        elif re.search("gloo|NCCL", str(error)):
            complain("lost another process; -resume goes on from the last saved state")
        else:
            raise
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 1


if __name__ == "__main__":
    sys.exit(main())
