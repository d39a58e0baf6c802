"""Train a GPT on the text that data_extract.py made, and keep the best model in `model-01.pkl`.

    python training.py -batch_size 32
    python training.py -resume
    torchrun --standalone --nproc_per_node=8 training.py -batch_size 256

A step draws random places in the training text, takes `block_size` + 1 characters from each, and asks the model to
predict every character from those before it. The texts are memory-mapped, so they may be larger than memory. Started by
`torchrun`, several processes share the rows of each step.

Beside the best model a run keeps `model-01.state.pkl`, from which `-resume` goes on as if nothing had happened, and
`model-01.metrics.csv`, with a row for each evaluation.
"""

from __future__ import annotations

import copy
import glob
import importlib.util
import math
import mmap
import os
import signal
import sys
import time
import zlib
from argparse import Namespace
from codecs import utf_8_decode
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    GPTLanguageModel,
    ModelFileError,
    Parser,
    Vocabulary,
    atomic_write,
    bounded,
    device,
    explain,
    load_model,
    prepare_streams,
    read_model_file,
    save_model,
    show,
)

# torchrun tells each process how many there are, and which one it is.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0

# What random numbers are drawn for: each use has a key of its own, so that no two uses see the same numbers.
TRAIN_ROWS, EVAL_ROWS, DROPOUT = range(3)

# Tuned at 600 steps, 128 numbers per character and 768 tokens a step. Other runs may need less: default_learning_rate.
LEARNING_RATES = {"adamw": 3e-3, "muon": 0.02}
# Learning rate at the end, as a share of the highest. It need not fall to 0: the average of the weights settles what
# the last steps leave open, and more is learnt on the way.
MIN_LR_SHARES = {"adamw": 0.3, "muon": 0.1}
ADAMW_SHARE_BESIDE_MUON = 0.075  # of Muon's learning rate
# Three polynomials (a, b, c) that, one after another, bring every number between 0.003 and 1 close to 1. Amsel et al.
# 2025, "The Polar Express", say how to find them. Jordan's own five end at the same loss and take 1.5 times as long.
POLYNOMIALS = ((8.138, -22.714, 16.325), (3.965, -2.836, 0.522), (3.524, -2.640, 0.527))
AVERAGED_SHARE = 0.05  # of the steps so far, over which weights are averaged
SOON = 60  # seconds; a run that ends sooner, perhaps started by mistake, displaces no earlier one
STATE_VERSION = 3  # of the state files; others can't be resumed


class TrainingError(Exception):
    """Training can't start or go on; the message says why and what to do."""


# The training loop ---------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """All that a run is made of. The loop changes the models, the optimizer and the record."""

    settings: Namespace  # the flags, with all defaults worked out
    model: GPTLanguageModel
    average: GPTLanguageModel  # its weights, averaged over the last steps: what is evaluated and kept
    vocabulary: Vocabulary
    train_text: Text
    val_text: Text
    optimizer: Optimizer
    record: Record
    files: Files


def train(run: Run, interruption: Interruption) -> None:
    """Train until the last step, until `-patience` is exhausted or until a signal arrives, and save on the way.

    Raises OSError, and TrainingError once the loss is no longer a number.
    """
    settings, model, optimizer, record = run.settings, run.model, run.optimizer, run.record
    forward = prepare_forward(run)
    started = time.monotonic() - record.seconds  # a resumed run counts on
    tokens = settings.batch_size * settings.block_size  # in a step
    with tqdm(total=settings.max_iters, initial=record.step, unit="tok", unit_scale=tokens, disable=None) as bar:
        while not (is_finished(record, settings) or interruption.received_by_any()):
            # 1. Draw a batch, and seed dropout. Both depend on the step alone, so a resumed run sees the same ones.
            inputs, targets = get_batch(run.train_text, record.step, settings)
            torch.manual_seed(np.random.default_rng([settings.seed, record.step, DROPOUT, RANK]).integers(2**63))

            # 2. Forward and backward. Matrices are multiplied in `dtype`; weights, norms and losses stay in float32.
            model.zero_grad()
            with torch.autocast(settings.device.type, settings.dtype, enabled=settings.dtype != torch.float32):
                _, loss = forward(inputs, targets)
            optimizer.scaler.scale(loss).backward()

            # 3. Step: move the weights against their gradients.
            optimizer.step(learning_rate_at(record.step, settings), settings.grad_clip)
            update_average(run.average, model, record.step)
            record.step += 1
            record.seconds = time.monotonic() - started

            # 4. Show the progress on a terminal. Reading the loss waits for a GPU, so it is read only for the bar.
            if bar.update():
                bar.set_description_str(f"loss {check_loss(loss.item(), run):.3f}", refresh=False)

            # 5. Evaluate, and save: the model if it is the best so far, and the state from which `-resume` goes on.
            if record.step % settings.eval_interval == 0 or record.step == settings.max_iters:
                check_loss(loss.item(), run)
                train_loss = mean_loss(run.average, run.train_text, draw_rows(run.train_text, settings), settings)
                val_loss = mean_loss(run.average, run.val_text, draw_rows(run.val_text, settings), settings)
                is_best = record.add(train_loss, check_loss(val_loss, run), settings)
                if RANK == 0:
                    save(run, is_best)
                    with tqdm.external_write_mode():  # which prints above the bar
                        show(describe_evaluation(run, is_best))


def is_finished(record: Record, settings: Namespace) -> bool:
    is_out_of_patience = 0 < settings.patience <= record.evaluations_since_best  # 0 is endless patience
    return record.step >= settings.max_iters or is_out_of_patience


def check_loss(loss: float, run: Run) -> float:
    """Return the loss. Raises TrainingError if it is no longer a number."""
    if not math.isfinite(loss):
        problem = f"the loss is {loss} after step {run.record.step}"
        raise TrainingError(f"{problem}; try a lower -learning_rate or a longer -warmup_iters")
    return loss


def prepare_forward(run: Run) -> torch.nn.Module:
    """Return what runs the model in training: the model, compiled and shared among processes where that is wanted."""
    forward = run.model.train()
    if run.settings.compile:
        forward = torch.compile(forward)
    if WORLD_SIZE > 1:
        forward = DistributedDataParallel(forward)
    return forward


# Text ----------------------------------------------------------------------------------------------------------------


class Text:
    """A UTF-8 text from which rows of up to block_size + 1 characters are read.

    It is memory-mapped: only the parts that are read ever get into memory. Raises OSError, and TrainingError for a text
    too short for a single row.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, block_size: int):
        self.path = path
        self.row_length = block_size + 1
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # An empty file can't be mapped.
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        if self.size and hasattr(mmap, "MADV_RANDOM"):  # or the system may read megabytes around every row
            self.bytes.madvise(mmap.MADV_RANDOM)
        # The last row: a character has at most 4 bytes, and the first of these may be the end of another character.
        tail = self.bytes[-4 * self.row_length :].decode(errors="ignore")[-self.row_length :]
        if len(tail) < self.row_length:
            self.row(max(0, self.size - 4 * self.row_length))  # raises an error if this is not UTF-8
            problem = f"{path}: holds {len(tail)} characters, -block_size {block_size} takes {self.row_length} or more"
            raise TrainingError(f"{problem}; use a longer text or a smaller block")
        self.last_start = self.size - len(tail.encode())
        # Every code point's token id. Characters outside the vocabulary are read as U+FFFD, or are an error (-1).
        self.ids = np.full(sys.maxunicode + 1, vocabulary.ids.get(vocabulary.substitute, -1), dtype=np.int64)
        self.ids[[ord(character) for character in vocabulary.characters]] = np.arange(len(vocabulary))

    @cached_property
    def fingerprint(self) -> list[int]:
        """Return the size and a checksum, of the whole text up to 64 MB, else of 64 parts of it."""
        checksum = 0
        for place in range(0, self.size, max(2**20, self.size // 64)):
            checksum = zlib.crc32(self.bytes[place : place + 2**20], checksum)
        return [self.size, checksum]

    def draw(self, count: int, key: list[int]) -> list[str]:
        """Return this process's share of `count` rows from anywhere in the text; `key` alone decides which."""
        # Every process draws all places, so that the same rows are seen whatever the number of processes.
        places = np.random.default_rng(key).integers(0, self.last_start, count, endpoint=True)
        return [self.row(place) for place in places.tolist()[RANK::WORLD_SIZE]]

    def from_the_start(self) -> Iterator[str]:
        """Yield rows that begin with the last character of the row before, so that each is predicted once."""
        place = 0
        while len(row := self.row(place)) > 1:
            yield row
            place += len(row[:-1].encode())

    def row(self, place: int) -> str:
        """Return the row that begins at this byte or, inside a character, at the next one; shorter at the text's end.

        Raises TrainingError if the text there is not UTF-8.
        """
        data = self.bytes[place : place + 4 * self.row_length + 3]
        start = next((i for i, byte in enumerate(data[:4]) if byte & 0b1100_0000 != 0b1000_0000), 0)
        is_end = place + len(data) == self.size  # elsewhere the last character may be cut in two
        try:
            text, _ = utf_8_decode(data[start:], "strict", is_end)
        except UnicodeDecodeError as error:
            raise TrainingError(f"{self.path}: not UTF-8 text at byte {place + start + error.start}") from error
        return text[: self.row_length]

    def encode(self, rows: list[str]) -> torch.Tensor:
        """Return the token ids of N rows of T characters: (N, T). Raises TrainingError for unknown characters."""
        text = "".join(rows)
        # In UTF-32, each character is a number of 4 bytes: its code point.
        ids = self.ids[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
        if ids.min() < 0:
            problem = f"{self.path}: the character {text[ids.argmin()]!r} is not in vocab.txt"
            raise TrainingError(f"{problem}; run data_extract.py again so that both belong together")
        return torch.from_numpy(ids.reshape(len(rows), -1))


def get_batch(text: Text, step: int, settings: Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of a step, token ids (B, T) each: the targets are the characters after the inputs.

    Seed and step alone decide which rows these are. Each process takes its share of them, B = batch_size / processes.
    """
    ids = text.encode(text.draw(settings.batch_size, [settings.seed, step, TRAIN_ROWS]))
    is_cuda = settings.device.type == "cuda"  # a GPU copies from pinned memory while it computes
    ids = (ids.pin_memory() if is_cuda else ids).to(settings.device, non_blocking=is_cuda)
    return ids[:, :-1], ids[:, 1:]


# Optimizing ----------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, settings: Namespace) -> float:
    """Return the learning rate: a linear warm-up, then a cosine down to `min_lr` at the last step."""
    warmup = settings.warmup_iters
    if step < warmup:  # at full speed from the start, this kind of model diverges
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.max_iters - 1 - warmup)  # from 0 to 1
    return settings.min_lr + (settings.learning_rate - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average: GPTLanguageModel, model: GPTLanguageModel, step: int) -> None:
    """Move the averaged weights towards the model's, so that they follow the last few per cent of the steps so far.

    Each step leaves the weights a little to one side of where they are going, another one each time. In the average
    that cancels out.
    """
    share = 1 / max(1.0, AVERAGED_SHARE * (step + 1))  # not of all steps planned, or the average would start as noise
    for averaged, weight in zip(average.parameters(), model.parameters()):
        averaged.lerp_(weight, share)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: each update moves a matrix equally far in all directions, frequent and rare ones.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The heads of a layer are joined: all
    queries make up one matrix, as do all keys and all values. One by one, the loss ends 0.005 nats higher.
    """

    def __init__(self, blocks: torch.nn.Sequential, weight_decay: float, dtype: torch.dtype):
        self.dtype = dtype  # of the products
        names = ("query", "key", "value")
        heads = [getattr(head, name).weight for block in blocks for name in names for head in block.sa.heads]
        n_embd = heads[0].shape[1]
        groups = [
            {"params": heads + [block.sa.proj.weight for block in blocks], "rows": n_embd},
            {"params": [block.ffwd.net[0].weight for block in blocks], "rows": 4 * n_embd},
            {"params": [block.ffwd.net[2].weight for block in blocks], "rows": n_embd},
        ]
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights, rows = group["params"], group["rows"]
            gradients = torch.cat([weight.grad for weight in weights])
            gradients = gradients.unflatten(0, (-1, rows))  # (N, rows, columns): N matrices are worked on together
            state = self.state[weights[0]]  # the whole group's, kept with its first weight
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1 - group["momentum"])
            ahead = gradients.lerp(state["momentum"], group["momentum"])  # Nesterov: where the next step will be
            updates = orthogonalize(ahead, self.dtype).flatten(0, 1).split([len(weight) for weight in weights])
            # A tall matrix has more rows than directions to move in, so each row gets less: make up for it.
            length = group["lr"] * max(1, rows / gradients.shape[2]) ** 0.5
            for weight, update in zip(weights, updates):
                weight.mul_(1 - group["lr"] * group["weight_decay"])  # apart from the gradient, as in AdamW
                weight.add_(update, alpha=-length)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Move all singular values of each matrix to about 1: (N, rows, columns) -> (N, rows, columns).

    A polynomial a x + b (x x^T) x + c (x x^T)^2 x keeps the directions of x and changes its singular values alone. It
    only multiplies, so it is much faster than a singular value decomposition.
    """
    norms = matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)  # no singular value is larger
    x = (matrices / norms).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    for a, b, c in POLYNOMIALS:
        square = x.mT @ x if is_tall else x @ x.mT  # the smaller of the two
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if is_tall else torch.baddbmm(x, factor, x, beta=a)
    return x.to(matrices.dtype)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) for all weights; or Muon for the matrices in the blocks, AdamW for the rest.

    Weight decay applies to matrices only, not to biases and norms. `scaler` keeps small gradients from vanishing in
    float16, and does nothing for other dtypes.
    """

    def __init__(self, model: GPTLanguageModel, settings: Namespace):
        for_muon = {*model.blocks.parameters()} if settings.optimizer == "muon" else set()
        matrices = [weight for weight in model.parameters() if weight.dim() == 2 and weight not in for_muon]
        vectors = [weight for weight in model.parameters() if weight.dim() == 1]
        decay = settings.weight_decay
        # Average the squares of gradients over 80,000 tokens, however many a step has: Marek et al. 2025, "Small Batch
        # Size Training for Language Models".
        beta2 = min(max(0.95, 1 - settings.batch_size * settings.block_size / 80_000), 0.999)
        adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            # With the usual beta1 of 0.9, the loss ends 0.01 nats higher.
            betas=(0.8, beta2),
            fused=True,  # one operation for all weights, not several for each
        )
        self.rate_shares = {adamw: 1.0}
        if for_muon:
            # Muon is exact enough in bfloat16, but the largest number of float16 is too small for it.
            dtype = torch.bfloat16 if settings.dtype == torch.bfloat16 else torch.float32
            muon = Muon(model.blocks, decay, dtype)
            # Muon's rate says how far a matrix turns; what AdamW moves beside it needs a smaller one.
            self.rate_shares = {muon: 1.0, adamw: ADAMW_SHARE_BESIDE_MUON}
        groups = [group for part in self.rate_shares for group in part.param_groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.dtype == torch.float16)

    def step(self, learning_rate: float, grad_clip: float) -> None:
        """Clip the gradients to a norm of `grad_clip` over all weights (0: don't), and move the weights."""
        for part, share in self.rate_shares.items():
            self.scaler.unscale_(part)  # or the norm would be that of scaled gradients
            for group in part.param_groups:
                group["lr"] = learning_rate * share
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, grad_clip or math.inf)
        # In float16 a gradient may overflow: then no weight moves, and the scaler scales less from now on.
        if not self.scaler.is_enabled() or norm.isfinite():
            for part in self.rate_shares:
                self.scaler.step(part)
        self.scaler.update()

    def state(self) -> dict:
        # Rates and decays, the rest of a state_dict, follow from the settings.
        return {"parts": [list(part.state.values()) for part in self.rate_shares], "scaler": self.scaler.state_dict()}

    def restore(self, saved: dict) -> None:
        """Go back to a saved state. Raises one of many exceptions for anything but the state of such an optimizer."""
        if self.scaler.is_enabled() and saved["scaler"]:  # it has none if the run was in another dtype so far
            self.scaler.load_state_dict(saved["scaler"])
        # The fused step trusts shapes blindly, so a wrong one would let it write to memory of something else. Therefore
        # make a state by a step that moves nothing, and copy the saved numbers into it.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for part, saved_part in zip(self.rate_shares, saved["parts"], strict=True):
            for group in part.param_groups:
                group["lr"] = 0.0
            part.step()
            for values, saved_values in zip(part.state.values(), saved_part, strict=True):
                for name, value in values.items():
                    value.copy_(saved_values[name].view_as(value))


# Evaluating, and telling about it ------------------------------------------------------------------------------------


def draw_rows(text: Text, settings: Namespace) -> list[str]:
    """Return this process's share of the rows to evaluate on during a run, always the same ones.

    They depend on no flag that -resume may change, so that "best" always compares losses on the same rows.
    """
    return text.draw(settings.eval_iters * settings.batch_size, [settings.seed, 0, EVAL_ROWS])


def in_batches(rows: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield the rows in batches of up to `size`, each of rows of one length."""
    for _, same in groupby(rows, key=len):
        while batch := list(islice(same, size)):
            yield batch


@torch.no_grad()
def mean_loss(model: GPTLanguageModel, text: Text, rows: Iterable[str], settings: Namespace) -> float:
    """Return the mean cross-entropy in nats per character over the rows of all processes; the model is in eval mode."""
    totals = torch.zeros(2, device=settings.device)  # nats, characters
    for batch in in_batches(rows, settings.batch_size // WORLD_SIZE):
        ids = text.encode(batch).to(settings.device)
        with torch.autocast(settings.device.type, settings.dtype, enabled=settings.dtype != torch.float32):
            _, loss = model(ids[:, :-1], ids[:, 1:])
        # Weigh each batch by its characters: the last one may be smaller.
        count = ids[:, 1:].numel()
        totals += torch.stack([loss * count, torch.full_like(loss, count)])
    nats, characters = all_reduce(totals).tolist()  # read only now, since Python has to wait for a GPU here
    return nats / characters


def all_reduce(values: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
    """All-reduce `values` across processes, in place, and return them."""
    if distributed.is_initialized():
        distributed.all_reduce(values, getattr(distributed.ReduceOp, operation))
    return values


def describe_evaluation(run: Run, is_best: bool) -> str:
    """Return the lines to show after an evaluation: the losses, and two lines of what the model writes now."""
    settings, step, vocabulary = run.settings, run.record.step, run.vocabulary
    _, train_loss, val_loss, *_ = run.record.metrics[-1]
    saved = f", saved {settings.model}" if is_best else ""
    # A generator of its own, so that a sample does not change the random numbers of the training.
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    start = torch.tensor([[vocabulary.ids.get("\n", 0)]], device=settings.device)
    ids = run.average.generate(start, 160, temperature=0.8, generator=generator)
    text = vocabulary.decode(ids[0, 1:].tolist())
    sample = [f"    {line[:76]}" for line in text.splitlines() if line.strip()][:2]
    return "\n".join([f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{saved}", *sample])


def describe(run: Run) -> str:
    """Return what is trained, and on what."""
    settings = run.settings
    parameters = sum(weight.numel() for weight in run.model.parameters())
    return f"""\
device      {WORLD_SIZE} x {settings.device}, {str(settings.dtype).removeprefix("torch.")}
model       {parameters:,} parameters, {len(run.vocabulary):,} characters
text        {run.train_text.size / 1e6:,.2f} MB to train on, {run.val_text.size / 1e6:,.2f} MB to validate with
step        {settings.batch_size} x {settings.block_size} = {settings.batch_size * settings.block_size:,} tokens
optimizer   {settings.optimizer}, learning rate {settings.learning_rate:.3g}"""


def describe_end(run: Run) -> str:
    """Return why the run ended, and the loss of the best model on the whole validation text.

    Of a long text, only as much is evaluated as a tenth of what the run has seen. Raises OSError and ModelFileError.
    """
    settings, record, text = run.settings, run.record, run.val_text
    limit = max(1, settings.max_iters * settings.batch_size // 10)
    rows = text.from_the_start()
    # In float32, so that runs in different dtypes can be compared; from the file, so that the file is known to be good.
    model, _ = load_model(settings.model, settings.device)
    float32 = Namespace(**{**vars(settings), "dtype": torch.float32})
    nats = mean_loss(model, text, islice(rows, limit), float32)
    part = f"first {limit * settings.block_size:,} characters of the" if next(rows, None) else "whole"
    end = f"""\
best model, of step {record.best_step}: {nats:.4f} nats = {nats / math.log(2):.3f} bits per character
over the {part} validation text; talk to it: python chatbot.py -model {settings.model}"""
    if record.step < settings.max_iters:
        end = f"stopped after step {record.step}: no better model in {settings.patience} evaluations\n{end}"
    return end


# The record and the files of a run -----------------------------------------------------------------------------------

METRICS = ("step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds")


@dataclass
class Record:
    """How far a run has come: what a resumed run needs besides the weights and the optimizer's state."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0
    best_loss: float = math.inf  # on the validation text
    best_step: int = 0
    evaluations_since_best: int = 0
    metrics: list[list[float]] = field(default_factory=list)  # a row of METRICS for each evaluation

    def add(self, train_loss: float, val_loss: float, settings: Namespace) -> bool:
        """Add an evaluation; return whether its model is the best so far."""
        rate = learning_rate_at(self.step - 1, settings)
        tokens = self.step * settings.batch_size * settings.block_size
        self.metrics.append([self.step, round(train_loss, 6), round(val_loss, 6), rate, tokens, round(self.seconds, 3)])
        is_best = val_loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step, self.evaluations_since_best = val_loss, self.step, 0
        else:
            self.evaluations_since_best += 1
        return is_best


def sibling(model: Path, ending: str) -> Path:
    """Return the path of a file that belongs to a model: model-01.pkl, ".state.pkl" -> model-01.state.pkl"""
    return model.with_name(model.name.removesuffix(".pkl") + ending)


class Files:
    """The files of a run. Its first save renames those of an earlier run, so a run that never saves displaces nothing.

    `stamp` is the time and size of the state that this run has read or written last, by which it knows the state again.
    """

    def __init__(self, model: Path):
        self.model = model
        self.state = sibling(model, ".state.pkl")
        self.metrics = sibling(model, ".metrics.csv")
        self.stamp = None

    def stamp_on_disk(self) -> tuple[int, int] | None:
        status = self.state.stat() if self.state.exists() else None
        return status and (status.st_mtime_ns, status.st_size)

    def claim(self) -> None:
        """Rename the files of an earlier run: model-01.pkl to model-01.old.pkl, and so on; of a link, its target.

        Raises OSError, and TrainingError if another run has taken this run's place.
        """
        if self.stamp and self.stamp_on_disk() not in (None, self.stamp):
            problem = f"{self.state}: another run has put its own state here, so this run stops"
            raise TrainingError(f"{problem}; what it had saved is now called .old, or the other run goes on from it")
        for path in () if self.stamp else (self.state, self.metrics, self.model):
            ending = path.name.removeprefix(self.model.stem)
            target = Path(os.path.realpath(path))
            if target.exists():
                os.replace(target, target.with_name(target.name.removesuffix(ending) + f".old{ending}"))


def prepare_folders(*paths: Path | None) -> None:
    """Remove what a killed run was writing in place of these files. Raises OSError if they can't be written."""
    for path in filter(None, paths):
        target = Path(os.path.realpath(path))
        target.with_name(f"{target.name}.0.tmp").touch()  # better an error now than at the first save
        for litter in target.parent.glob(f"{glob.escape(target.name)}.*.tmp"):
            litter.unlink(missing_ok=True)


def save(run: Run, is_best: bool = False) -> None:
    """Save the model if it is the best so far or the only one, the state and the losses. Raises OSError, TrainingError.

    In this order: after a kill in between, the resumed run repeats the steps that led to the model.
    """
    settings, files = run.settings, run.files
    files.claim()
    if is_best or not files.model.exists():
        save_model(files.model, run.average, run.vocabulary)
    state = {
        "version": STATE_VERSION,
        "model": settings.model.name.replace(".old", ""),
        "flags": settings.flags,
        "texts": [run.train_text.fingerprint, run.val_text.fingerprint],
        "record": asdict(run.record),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state(),
    }
    save_model(files.state, run.model, run.vocabulary, training=state)
    files.stamp = files.stamp_on_disk()
    # All rows each time: a row that is appended could be cut short when the disk is full.
    with atomic_write(files.metrics) as file:
        for row in (METRICS, *run.record.metrics):
            file.write(",".join(map(str, row)).encode() + b"\n")
    if settings.plot and run.record.metrics:
        draw_losses(settings.plot, run.record)


def draw_losses(path: Path, record: Record) -> None:
    """Draw both losses over the steps and mark the best model. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps, train_losses, val_losses, *_ = zip(*record.metrics)
    axes.plot(steps, train_losses, marker=".", label="training text")
    axes.plot(steps, val_losses, marker=".", label="validation text")
    axes.plot(record.best_step, record.best_loss, "*", markersize=14, label=f"best model, {record.best_loss:.3f} nats")
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


def restore(run: Run, state: dict) -> None:
    """Bring the run back to where its state was saved. Raises ModelFileError, and TrainingError for other texts."""
    try:
        vars(run.record).update(vars(Record(**state["record"])))
        run.files.stamp = run.files.stamp_on_disk()
        run.average.load_state_dict(state["average"])
        run.optimizer.restore(state["optimizer"])
        texts = state["texts"]
    except Exception as error:  # parts that are missing, of the wrong type or of the wrong shape
        raise ModelFileError(f"{run.files.state}: does not hold a run to go on with") from error
    if texts != [run.train_text.fingerprint, run.val_text.fingerprint]:
        problem = f"{run.settings.data_dir}: the texts are not those that {run.files.state} began with"
        raise TrainingError(f"{problem}; put those back, or start anew without -resume")


# Interruption --------------------------------------------------------------------------------------------------------


class Interruption:
    """Lets Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the loop in good order. A second one ends it at once.

    Under torchrun a second signal is ignored, because torchrun forwards every signal to its processes.
    """

    def __init__(self):
        self.received = 0  # by this process
        self.signal = 0  # by any process, once all have agreed on it

    def __enter__(self) -> Interruption:
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP. A run that nohup started ignores it, and goes on when the terminal is closed.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame) -> None:
        # Only take note of it: it may come in the middle of a step, when some weights have moved and others have not.
        self.received = number
        if WORLD_SIZE == 1:
            signal.signal(number, signal.SIG_DFL)  # from now on the system ends the program, without Python's delay

    def received_by_any(self) -> bool:
        """Return whether any process has received a signal: all of them have to end after the same step."""
        self.signal = int(all_reduce(torch.tensor(self.received), "MAX"))
        return self.signal != 0


# The command line ----------------------------------------------------------------------------------------------------

# Flags that don't change what is learnt, or that a resumed run may change on purpose. -max_iters may grow, too.
MAY_CHANGE_ON_RESUME = {"max_iters", "data_dir", "device", "dtype", "patience"}
NOT_SAVED = {"model", "plot", "resume", "compile"}  # what each command says for itself; no state names files to write
SHAPE = ("n_embd", "n_head", "n_layer", "block_size")


def training_parser() -> Parser:
    parser = Parser("Train a GPT on output_train.txt and keep the best model.")
    flag = parser.flag
    integer, positive, real = bounded(int, 0), bounded(int, 1), bounded(float, 0)
    flag("batch_size", type=positive, default=32, help="sequences per optimizer step, over all processes")
    flag("block_size", type=positive, default=128, help="characters that the model sees at once")
    flag("max_iters", type=positive, default=550, help="optimizer steps")
    flag("optimizer", choices=tuple(LEARNING_RATES), default="adamw", help="muon learns more per step, for the blocks")
    rates = ", ".join(f"{rate} with {name}" for name, rate in LEARNING_RATES.items())
    flag("learning_rate", type=real, help=f"highest rate, after the warm-up (default: at most {rates})")
    shares = ", ".join(f"{share} of the highest with {name}" for name, share in MIN_LR_SHARES.items())
    flag("min_lr", type=real, help=f"rate at the last step (default: {shares})")
    flag("warmup_iters", type=integer, help="steps of rising rate (default: 150, at most a third of -max_iters)")
    flag("weight_decay", type=real, default=0.1, help="weight decay, on matrices only")
    flag("grad_clip", type=real, default=1.0, help="longest gradient (norm over all weights); 0: any")
    flag("n_embd", type=positive, default=384, help="numbers per character inside the model")
    flag("n_head", type=positive, default=4, help="attention heads per layer")
    flag("n_layer", type=positive, default=4, help="layers (blocks)")
    dropout = "share of numbers dropped in training (default: 0 up to 10 passes over the text, 0.2 from 25 on)"
    flag("dropout", type=bounded(float, 0, below=1), help=dropout)
    flag("eval_interval", type=positive, default=100, help="steps from one evaluation, which also saves, to the next")
    flag("eval_iters", type=positive, default=8, help="batches per evaluation and text")
    flag("patience", type=integer, default=0, help="stop after so many evaluations without a better one; 0: never")
    flag("seed", type=bounded(int, 0, below=2**63), default=1337, help="decides initial weights, rows and dropout")
    flag("device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    flag("dtype", choices=("float32", "bfloat16", "float16"), help="for multiplications (default: the fastest here)")
    flag("compile", action="store_true", help="torch.compile: a minute or more at the start, then faster on a GPU")
    flag("data_dir", type=Path, default=Path("."), help="folder with output_train.txt, output_val.txt and vocab.txt")
    flag("model", type=Path, default=Path("model-01.pkl"), help="file for the trained model")
    flag("resume", action="store_true", help="go on with the run whose state is beside -model; without one, start it")
    flag("init_from", type=Path, help="start from the weights and shape of this model file, not from random ones")
    flag("vocab", type=Path, help="vocab.txt of the -init_from model, if that file holds none")
    flag("plot", type=Path, help="draw the losses into this .png, .svg or .pdf file; needs matplotlib")
    return parser


def parse_args(arguments: list[str] | None = None) -> tuple[Namespace, tuple]:
    """Return the settings, and what the run starts from: a model, its vocabulary, a state; None for what is not there.

    Raises OSError and ModelFileError.
    """
    parser = training_parser()
    args = parser.parse_args(arguments)
    if args.model.suffix != ".pkl" or args.model.name.endswith(".state.pkl"):
        parser.error(f"argument -model: {str(args.model)!r} must end in .pkl, but not in .state.pkl")
    state_path = sibling(args.model, ".state.pkl")
    model = vocabulary = state = None
    if args.resume and state_path.exists():
        model, vocabulary = load_model(state_path)
        state = read_state(state_path, args.model)
        # As text, so that the parser checks what may come from a stranger as it checks what a user types.
        saved = dict.fromkeys(vars(args).keys() - NOT_SAVED)  # what was not given then contradicts what is given now
        saved |= {name: str(value) for name, value in state["flags"].items() if name not in NOT_SAVED}
        args = parse_again(parser, arguments, saved, state_path)
    elif args.init_from:
        given = Vocabulary.from_file(args.vocab) if args.vocab else None
        model, vocabulary = load_model(args.init_from, vocabulary=given)
        args = parse_again(parser, arguments, {name: model.config[name] for name in SHAPE}, args.init_from)
    elif args.vocab:
        parser.error("argument -vocab: goes with -init_from only; training takes the vocab.txt in -data_dir")
    work_out_defaults(args)
    check_together(parser, args)
    if args.resume and not state:
        show(f"{state_path}: there is no run to go on with, so a new one starts", sys.stderr)
    return args, (model, vocabulary, state)


def read_state(path: Path, model: Path) -> dict:
    """Return the state of the run that trains this model. Raises OSError and ModelFileError."""
    state = read_model_file(path.read_bytes()).get("training")
    name = model.name.replace(".old", "")  # under which a kept model was trained
    if not isinstance(state, dict) or (state.get("version"), state.get("model")) != (STATE_VERSION, name):
        problem = f"{path}: is not the state of a {name} that this version of training.py has trained"
        raise ModelFileError(f"{problem}; -init_from {path} starts a new run from its weights")
    return state


def parse_again(parser: Parser, arguments: list[str] | None, settled: dict, source: Path) -> Namespace:
    """Parse with what a file has settled as defaults. Ends the program if a flag contradicts the file."""
    parser.set_defaults(**settled)
    args = parser.parse_args(arguments)
    before = parser.parse_args(["-device=cpu"])  # the saved one may be missing here
    for name in sorted(settled.keys() - MAY_CHANGE_ON_RESUME):
        given, value = getattr(args, name), settled[name] or "none"
        if given != getattr(before, name):
            parser.error(f"argument -{name}: {given} contradicts {source}, which has {value}; leave it out")
    # A shorter schedule would have had other learning rates in the steps that are done.
    if "max_iters" in settled and args.max_iters < before.max_iters:
        parser.error(f"argument -max_iters: {source} has {before.max_iters}, which may only grow")
    return args


def work_out_defaults(args: Namespace) -> None:
    """Fill in what follows from other flags or from this machine where a flag is not given."""
    if WORLD_SIZE > 1 and args.device.type == "cuda":  # a card for each process
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if args.dropout is None:
        args.dropout = default_dropout(args)
    if args.dtype is None:
        args.dtype = str(default_dtype(args.device)).removeprefix("torch.")
    # What -resume parses again. Left out are the defaults below, since they follow -max_iters, which may grow.
    args.flags = {name: str(value) for name, value in vars(args).items() if value is not None and name not in NOT_SAVED}
    args.dtype = getattr(torch, args.dtype)
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(args)
    if args.min_lr is None:
        args.min_lr = MIN_LR_SHARES[args.optimizer] * args.learning_rate
    if args.warmup_iters is None:
        args.warmup_iters = min(150, args.max_iters // 3)


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that the device multiplies fastest."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # A CPU without units for bfloat16 is many times slower with it than with float32. These names are private to torch.
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_units = any(getattr(torch.cpu, name, bool)() for name in units)  # bool() is False
    return torch.bfloat16 if device.type == "cpu" and has_units else torch.float32


def default_learning_rate(args: Namespace) -> float:
    """Return the highest learning rate of the run.

    AdamW's falls with the width (Yang et al. 2022, "Tensor Programs V") and rises with the square root of the tokens in
    a step, since fewer give noisier gradients (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive
    Gradient Algorithms"). At 0.003, the default model learns nothing from 768 tokens a step. Muon's falls with the
    length of the run (Bjorck et al. 2025, "Scaling Optimal LR Across Token Horizons").
    """
    if args.optimizer == "muon":
        share = (600 / args.max_iters) ** (1 / 3)
    else:
        share = 128 / args.n_embd * math.sqrt(args.batch_size * args.block_size / 768)
    return LEARNING_RATES[args.optimizer] * min(1.0, share)


def default_dropout(args: Namespace) -> float:
    """Return how much to drop: the more often a run passes over the text, the easier it learns it by heart.

    Of 0, 0.1 and 0.2, the best was 0 for 5 and for 10 passes, and 0.2 for 25. Raises OSError if there is no text.
    """
    size = (args.data_dir / "output_train.txt").stat().st_size
    passes = args.max_iters * args.batch_size * args.block_size / max(1, size)
    return round(0.2 * min(1.0, max(0.0, (passes - 10) / 15)), 3)


def check_together(parser: Parser, args: Namespace) -> None:
    """End the program if flags do not fit one another."""
    if args.batch_size % WORLD_SIZE:
        parser.error(f"argument -batch_size: {args.batch_size} can't be shared evenly among {WORLD_SIZE} processes")
    if args.n_embd % args.n_head:
        parser.error(f"argument -n_embd: {args.n_embd} is not a multiple of -n_head {args.n_head}")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument -plot: {str(args.plot)!r} does not end in .png, .svg or .pdf")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("argument -plot: needs matplotlib; pip install matplotlib")


# The command ---------------------------------------------------------------------------------------------------------


def new_model(settings: Namespace, old: GPTLanguageModel | None, known: str) -> tuple[GPTLanguageModel, Vocabulary]:
    """Return a model and its vocabulary: random weights, or those of an old model that knows the characters `known`."""
    vocabulary = Vocabulary(known + Vocabulary.from_file(settings.data_dir / "vocab.txt").characters)
    torch.manual_seed(settings.seed)
    shape = {name: getattr(settings, name) for name in SHAPE}
    model = GPTLanguageModel(len(vocabulary), dropout=settings.dropout, **shape)
    if old:
        rows = vocabulary.encode(known)  # of the tables; characters that are new to the model have other rows
        weights = model.state_dict()
        for name, weight in old.state_dict().items():
            weights[name][rows if name.startswith(("token_embedding_table", "lm_head")) else ...] = weight
    return model, vocabulary


def run_training(settings: Namespace, start: tuple[GPTLanguageModel | None, Vocabulary | None, dict | None]) -> int:
    """Train as the settings say; return the exit status. Raises OSError, ModelFileError and TrainingError."""
    model, vocabulary, state = start
    if state is None:
        model, vocabulary = new_model(settings, model, vocabulary.characters if vocabulary else "")
    model.to(settings.device)
    texts = [
        Text(settings.data_dir / f"output_{part}.txt", vocabulary, settings.block_size) for part in ("train", "val")
    ]
    optimizer, record, files = Optimizer(model, settings), Record(), Files(settings.model)
    run = Run(settings, model, copy.deepcopy(model).eval(), vocabulary, *texts, optimizer, record, files)
    show(describe(run))
    if state:
        restore(run, state)
        show(f"resumed     after step {record.step} of {settings.max_iters}")
    prepare_folders(files.model, files.state, files.metrics, settings.plot)
    if WORLD_SIZE > 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait until all processes are there
        if settings.device.type == "cuda":
            torch.cuda.set_device(settings.device)
        # Signals are agreed upon on the CPU, also where gradients are shared among GPUs.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if settings.device.type == "cuda" else "gloo")
    with Interruption() as interruption:
        train(run, interruption)
        if WORLD_SIZE > 1:  # what follows needs no other process, so that none waits for one that has ended
            distributed.destroy_process_group()
        if RANK == 0:
            show(describe_interruption(run) if interruption.signal else describe_end(run))
    return 128 + interruption.signal if interruption.signal else 0


def describe_interruption(run: Run) -> str:
    """Save what was learnt, unless the run has hardly begun; return how to go on. Raises OSError and TrainingError."""
    where = f"interrupted after step {run.record.step}"
    if run.files.stamp is None and run.record.seconds < SOON:  # perhaps started by mistake
        return f"{where}, within a minute: nothing was saved"
    save(run)
    return f"{where} and saved; the same command with -resume goes on"


def main() -> int:
    prepare_streams()
    errors = sys.stderr
    if RANK > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        return run_training(*parse_args())
    except KeyboardInterrupt:  # before or after the loop, which ends in good order
        return 128 + signal.SIGINT
    except Exception as error:
        message = str(error) if isinstance(error, TrainingError) else explain(error)
        if message is None:
            raise
        if isinstance(error, FileNotFoundError) and str(error.filename).endswith(".txt"):
            message += "; run data_extract.py first, or name its -data_dir"
        if message == "not enough memory":
            message += "; try a smaller -batch_size, -n_embd or -block_size"
        show(f"training.py: {message}".replace("\n", r"\n"), errors)
        return 1


if __name__ == "__main__":
    sys.exit(main())
