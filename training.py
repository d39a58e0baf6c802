"""Train a GPT on the text that data_extract.py made, and keep the best model in `model-01.pkl`.

    python training.py -batch_size 32
    python training.py -resume
    torchrun --standalone --nproc_per_node=8 training.py -batch_size 256

A step draws random places in the training text, takes `block_size` + 1 characters from each, and
asks the model to predict every character from those before it. The texts are memory-mapped, so they
may be larger than memory. Started by `torchrun`, several processes share the rows of each step.

Beside the best model a run keeps `model-01.state.pkl`, from which `-resume` goes on as if nothing
had happened, and `model-01.metrics.csv`, with a row for each evaluation.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import mmap
import os
import re
import signal
import sys
import time
import zlib
from argparse import Namespace
from codecs import utf_8_decode
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data_extract import locked
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
    read_model,
    replace,
    save_model,
    show,
)

# torchrun tells each process how many there are, and which one it is.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0

# What random numbers are drawn for: each use has a key of its own, so that no two uses see the same
# numbers.
TRAIN_ROWS, EVAL_ROWS, DROPOUT = range(3)

# Tuned at 600 steps, 128 numbers per character and 768 tokens a step. Other runs may need less:
# default_learning_rate.
LEARNING_RATES = {"adamw": 3e-3, "muon": 0.02}
# Learning rate at the end, as a share of the highest. It need not fall to 0: the average of the
# weights settles what the last steps leave open, and more is learnt on the way.
MIN_LR_SHARES = {"adamw": 0.3, "muon": 0.1}
ADAMW_SHARE_BESIDE_MUON = 0.075  # of Muon's learning rate
# Three polynomials (a, b, c) that, one after another, bring every number between 0.003 and 1 close
# to 1. Amsel et al. 2025, "The Polar Express", say how to find them. Jordan's own five end at the
# same loss and take 1.5 times as long.
POLYNOMIALS = ((8.138, -22.714, 16.325), (3.965, -2.836, 0.522), (3.524, -2.640, 0.527))
AVERAGED_SHARE = 0.05  # of the steps so far, over which weights are averaged
SOON = 60  # seconds; a run that ends sooner, perhaps started by mistake, displaces no earlier one
STATE_VERSION = 3  # of the state files; others can't be resumed


class TrainingError(Exception):
    """Training can't start or go on; the message says why and what to do."""


# The training loop --------------------------------------------------------------------------------


def train(run: Namespace, interruption: Interruption) -> None:
    """Train until the last step, until `-patience` is exhausted or until a signal arrives.

    `new_run` makes the run: its settings, model, texts, optimizer and record of losses. Each
    evaluation saves. Raises OSError, and TrainingError once the loss is no longer a number.
    """
    settings, model, optimizer, record = run.settings, run.model, run.optimizer, run.record
    forward = prepare_forward(run)
    started = time.monotonic() - record.seconds  # a resumed run counts on
    tokens = settings.batch_size * settings.block_size  # in a step
    with tqdm(
        total=settings.max_iters,
        initial=record.step,
        unit="tok",
        unit_scale=tokens,
        disable=None,  # where there is no terminal
    ) as bar:
        while not (is_finished(record, settings) or interruption.received_by_any()):
            # 1. Draw a batch, and seed dropout. Both depend on the step alone, so a resumed run
            # sees the same ones.
            inputs, targets = get_batch(run.train_text, record.step, settings)
            generator = np.random.default_rng([settings.seed, record.step, DROPOUT, RANK])
            torch.manual_seed(generator.integers(2**63))

            # 2. Forward and backward. Matrices are multiplied in `dtype`; weights, norms and losses
            # stay in float32.
            model.zero_grad()
            with precision(settings):
                _, loss = forward(inputs, targets)
            optimizer.scaler.scale(loss).backward()

            # 3. Step: move the weights against their gradients.
            optimizer.step(learning_rate_at(record.step, settings), settings.grad_clip)
            update_average(run.average, model, record.step)
            record.step += 1
            record.seconds = time.monotonic() - started

            # 4. Show the progress on a terminal. Reading the loss waits for a GPU, so it is read
            # only for the bar.
            if bar.update():
                bar.set_description_str(f"loss {check_loss(loss.item(), run):.3f}", refresh=False)

            # 5. Evaluate, and save: the model if it is the best so far, and the state from which
            # `-resume` goes on.
            if record.step % settings.eval_interval == 0 or record.step == settings.max_iters:
                train_loss = evaluate(run, run.train_text)
                val_loss = check_loss(evaluate(run, run.val_text), run)
                is_best = record.add(train_loss, val_loss, settings)
                if RANK == 0:
                    save(run, is_best)
                    with tqdm.external_write_mode():  # which prints above the bar
                        show(describe_evaluation(run, is_best))


def is_finished(record: Record, settings: Namespace) -> bool:
    is_out_of_patience = 0 < settings.patience <= record.evaluations_since_best  # 0 is endless
    return record.step >= settings.max_iters or is_out_of_patience


def precision(settings: Namespace) -> torch.autocast:
    """Return a context in which matrices are multiplied in `-dtype`."""
    is_lower = settings.dtype != torch.float32
    return torch.autocast(settings.device.type, settings.dtype, enabled=is_lower)


def check_loss(loss: float, run: Namespace) -> float:
    """Return the loss. Raises TrainingError if it is no longer a number."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} after step {run.record.step}; start anew with a lower "
            f"-learning_rate, or go on from the best model: -init_from {run.settings.model} and a "
            "lower -learning_rate"
        )
    return loss


def prepare_forward(run: Namespace) -> torch.nn.Module:
    """Return what runs the model in training.

    That is the model, compiled and shared among processes where that is wanted.
    """
    forward = run.model.train()
    if run.settings.compile:
        forward = torch.compile(forward)
    if WORLD_SIZE > 1:
        forward = DistributedDataParallel(forward)
        # All processes have the same masks. Sent anew before each step, those of 12 layers with 12
        # heads would be 151 MB at a block_size of 1024.
        forward.broadcast_buffers = False
    return forward


# Text ---------------------------------------------------------------------------------------------


class Text:
    """A UTF-8 text from which rows of up to block_size + 1 characters are read.

    It is memory-mapped: only the parts that are read ever get into memory. Raises OSError, and
    TrainingError for a text too short for a single row.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, block_size: int):
        self.path = path
        self.row_length = block_size + 1
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # An empty file can't be mapped.
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        if self.size and hasattr(mmap, "MADV_RANDOM"):
            self.bytes.madvise(mmap.MADV_RANDOM)  # or the system may read megabytes around each row

        # The last row: a character has at most 4 bytes, and the first bytes may be the end of one.
        end = self.bytes[-4 * self.row_length :].decode(errors="ignore")
        last_row = end[-self.row_length :]
        if len(last_row) < self.row_length:
            self.row(max(0, self.size - 4 * self.row_length))  # raises an error if it is not UTF-8
            raise TrainingError(
                f"{path}: holds {len(last_row)} characters, -block_size {block_size} takes "
                f"{self.row_length} or more; use a longer text or a smaller block"
            )
        self.last_start = self.size - len(last_row.encode())

        # The token id of every code point. Characters outside the vocabulary are read as U+FFFD, or
        # are an error (-1).
        substitute = vocabulary.ids.get(vocabulary.substitute, -1)
        self.ids = np.full(sys.maxunicode + 1, substitute, dtype=np.int64)
        self.ids[[ord(character) for character in vocabulary.characters]] = range(len(vocabulary))

    @cached_property
    def fingerprint(self) -> list[int]:
        """Return the size and a checksum, of the whole text up to 64 MB, else of 64 parts of it."""
        checksum = 0
        for place in range(0, self.size, max(2**20, self.size // 64)):
            checksum = zlib.crc32(self.bytes[place : place + 2**20], checksum)
        return [self.size, checksum]

    def draw(self, count: int, key: list[int]) -> list[str]:
        """Return this process's share of `count` rows from anywhere in the text.

        `key` alone decides which rows these are.
        """
        # Every process draws all places, so that the same rows are seen whatever the number of
        # processes.
        places = np.random.default_rng(key).integers(0, self.last_start, count, endpoint=True)
        return [self.row(place) for place in places.tolist()[RANK::WORLD_SIZE]]

    def from_the_start(self) -> Iterator[str]:
        """Yield rows that begin with the last character of the row before.

        So each character but the first is predicted once.
        """
        place = 0
        while len(row := self.row(place)) > 1:
            yield row
            place += len(row[:-1].encode())

    def row(self, place: int) -> str:
        """Return the row that begins at this byte or, inside a character, at the next one.

        It is shorter at the end of the text. Raises TrainingError if the text there is not UTF-8.
        """
        data = self.bytes[place : place + 4 * self.row_length + 3]
        # Bytes 10xxxxxx go on with a character that begins before this place.
        start = re.match(rb"[\x80-\xbf]{0,3}", data).end()
        is_end = place + len(data) == self.size  # elsewhere the last character may be cut in two
        try:
            text, _ = utf_8_decode(data[start:], "strict", is_end)
        except UnicodeDecodeError as error:
            raise TrainingError(
                f"{self.path}: not UTF-8 text at byte {place + start + error.start}"
            ) from error
        return text[: self.row_length]

    def encode(self, rows: list[str]) -> torch.Tensor:
        """Return the token ids of N rows of T characters: (N, T).

        Raises TrainingError for unknown characters.
        """
        text = "".join(rows)
        # In UTF-32, each character is a number of 4 bytes: its code point.
        ids = self.ids[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
        if ids.min() < 0:
            raise TrainingError(
                f"{self.path}: the character {text[ids.argmin()]!r} is not in vocab.txt; "
                "run data_extract.py again so that both belong together"
            )
        return torch.from_numpy(ids.reshape(len(rows), -1))


def get_batch(text: Text, step: int, settings: Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of a step, token ids (B, T) each.

    The targets are the characters after the inputs. Seed and step alone decide which rows these
    are. Each process takes its share of them: B = batch_size / processes.
    """
    ids = text.encode(text.draw(settings.batch_size, [settings.seed, step, TRAIN_ROWS]))
    if settings.device.type == "cuda":  # which copies from pinned memory while it computes
        ids = ids.pin_memory()
    ids = ids.to(settings.device, non_blocking=ids.is_pinned())
    return ids[:, :-1], ids[:, 1:]


# Optimizing ---------------------------------------------------------------------------------------


def learning_rate_at(step: int, settings: Namespace) -> float:
    """Return the learning rate: a linear warm-up, then a cosine down to `min_lr` at the end."""
    warmup, fall = settings.warmup_iters, settings.learning_rate - settings.min_lr
    if step < warmup:  # at full speed from the start, this kind of model diverges
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.max_iters - 1 - warmup)  # from 0 to 1
    return settings.min_lr + fall * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average: GPTLanguageModel, model: GPTLanguageModel, step: int) -> None:
    """Move the averaged weights towards the model's.

    They follow the last few per cent of the steps so far. Each step leaves the weights a little to
    one side of where they are going, another one each time. In the average that cancels out.
    """
    # Of the steps so far, not of all planned, or the average would start as noise.
    share = 1 / max(1.0, AVERAGED_SHARE * (step + 1))
    for averaged, weight in zip(average.parameters(), model.parameters()):
        averaged.lerp_(weight, share)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: each update moves a matrix equally far in all directions.

    So it learns from rare ones as from frequent ones. Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks". The heads of a layer are joined: all queries make up one
    matrix, as do all keys and all values. One by one, the loss ends 0.005 nats higher.
    """

    def __init__(self, blocks: torch.nn.Sequential, weight_decay: float, dtype: torch.dtype):
        self.dtype = dtype  # of the products
        heads = [
            getattr(head, name).weight
            for block in blocks
            for name in ("query", "key", "value")
            for head in block.sa.heads
        ]
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
            weights, rows, momentum = group["params"], group["rows"], group["momentum"]
            gradients = torch.cat([weight.grad for weight in weights])
            gradients = gradients.unflatten(0, (-1, rows))  # (N, rows, columns): N matrices at once
            state = self.state[weights[0]]  # the whole group's, kept with its first weight
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1 - momentum)
            ahead = gradients.lerp(state["momentum"], momentum)  # Nesterov: where it will be next
            updates = orthogonalize(ahead, self.dtype).flatten(0, 1)
            updates = updates.split([len(weight) for weight in weights])
            # A tall matrix has more rows than directions to move in, so each row gets less: make up
            # for it.
            length = group["lr"] * max(1, rows / gradients.shape[2]) ** 0.5
            for weight, update in zip(weights, updates):
                weight.mul_(1 - group["lr"] * group["weight_decay"])  # apart, as in AdamW
                weight.add_(update, alpha=-length)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Move all singular values of each matrix to about 1: (N, rows, columns) -> the same shape.

    A polynomial a x + b (x x^T) x + c (x x^T)^2 x keeps the directions of x and changes its
    singular values alone. It only multiplies, so it is much faster than a singular value
    decomposition.
    """
    norms = matrices.norm(dim=(1, 2), keepdim=True)  # no singular value is larger
    x = (matrices / norms.clamp(min=1e-12)).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    for a, b, c in POLYNOMIALS:
        square = x.mT @ x if is_tall else x @ x.mT  # the smaller of the two
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if is_tall else torch.baddbmm(x, factor, x, beta=a)
    return x.to(matrices.dtype)


class Optimizer:
    """AdamW for all weights; or Muon for the matrices in the blocks, AdamW for the rest.

    AdamW is that of Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization". Weight
    decay applies to matrices only, not to biases and norms. `scaler` keeps small gradients from
    vanishing in float16, and does nothing for other dtypes.
    """

    def __init__(self, model: GPTLanguageModel, settings: Namespace):
        weights = list(model.parameters())
        for_muon = set()
        if settings.optimizer == "muon":
            for_muon = {weight for weight in model.blocks.parameters() if weight.dim() == 2}
        matrices = [weight for weight in weights if weight.dim() == 2 and weight not in for_muon]
        vectors = [weight for weight in weights if weight.dim() == 1]
        decay = settings.weight_decay
        # Average the squares of gradients over 80,000 tokens, however many a step has: Marek et al.
        # 2025, "Small Batch Size Training for Language Models".
        tokens = settings.batch_size * settings.block_size
        beta2 = min(max(0.95, 1 - tokens / 80_000), 0.999)
        adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,  # until `step` is told one
            betas=(0.8, beta2),  # with the usual beta1 of 0.9, the loss ends 0.01 nats higher
            fused=True,  # one operation for all weights, not several for each
        )
        self.rate_shares = {adamw: 1.0}
        if for_muon:
            # Muon is exact enough in bfloat16, but the largest number of float16 is too small.
            dtype = torch.bfloat16 if settings.dtype == torch.bfloat16 else torch.float32
            muon = Muon(model.blocks, decay, dtype)
            # Muon's rate says how far a matrix turns; what AdamW moves beside it needs less.
            self.rate_shares = {muon: 1.0, adamw: ADAMW_SHARE_BESIDE_MUON}
        groups = [group for part in self.rate_shares for group in part.param_groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(
            settings.device.type, enabled=settings.dtype == torch.float16
        )

    def step(self, learning_rate: float, grad_clip: float) -> None:
        """Clip the gradients to a norm of `grad_clip` (0: don't), and move the weights."""
        for part, share in self.rate_shares.items():
            self.scaler.unscale_(part)  # or the norm would be that of scaled gradients
            for group in part.param_groups:
                group["lr"] = learning_rate * share
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, grad_clip or math.inf)
        # In float16 a gradient may overflow: then no weight moves, and the scaler scales less from
        # now on.
        if not self.scaler.is_enabled() or norm.isfinite():
            for part in self.rate_shares:
                self.scaler.step(part)
        self.scaler.update()

    def state(self) -> dict:
        # Rates and decays, the rest of a state_dict, follow from the settings.
        parts = [list(part.state.values()) for part in self.rate_shares]
        return {"parts": parts, "scaler": self.scaler.state_dict()}

    def restore(self, saved: dict) -> None:
        """Go back to a saved state.

        Raises one of many exceptions for anything but the state of such an optimizer.
        """
        if self.scaler.is_enabled() and saved["scaler"]:  # a run in another dtype has none
            self.scaler.load_state_dict(saved["scaler"])
        # The fused step trusts shapes blindly, so a wrong one would let it write to memory of
        # something else. Therefore make a state by a step that moves nothing, and copy the saved
        # numbers into it.
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for part, saved_part in zip(self.rate_shares, saved["parts"], strict=True):
            if saved_part:  # in float16, it may be that no step has moved weights so far
                part.step()
                for values, saved_values in zip(part.state.values(), saved_part, strict=True):
                    for name, value in values.items():
                        value.copy_(saved_values[name].view_as(value))


# Evaluating, and telling about it -----------------------------------------------------------------


def evaluate(run: Namespace, text: Text) -> float:
    """Return the loss of the averaged weights, in nats, on always the same rows of a text.

    These rows depend on no flag that -resume may change, so that "best" compares like with like.
    """
    settings = run.settings
    rows = text.draw(settings.eval_iters * settings.batch_size, [settings.seed, 0, EVAL_ROWS])
    return mean_loss(run.average, text, rows, settings)


def in_batches(rows: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield the rows in batches of up to `size`, each of rows of one length."""
    for _, same in groupby(rows, key=len):
        while batch := list(islice(same, size)):
            yield batch


@torch.no_grad()
def mean_loss(
    model: GPTLanguageModel, text: Text, rows: Iterable[str], settings: Namespace
) -> float:
    """Return the mean cross-entropy over the rows of all processes, in nats per character.

    The model is in eval mode.
    """
    totals = torch.zeros(2, device=settings.device)  # nats, characters
    for batch in in_batches(rows, settings.batch_size // WORLD_SIZE):
        ids = text.encode(batch).to(settings.device)
        with precision(settings):
            _, loss = model(ids[:, :-1], ids[:, 1:])
        # Weigh each batch by its characters: the last one may be smaller.
        count = ids[:, 1:].numel()
        totals += torch.stack([loss * count, torch.full_like(loss, count)])
    # Read the numbers only now, since Python has to wait for a GPU here.
    nats, characters = all_reduce(totals).tolist()
    return nats / characters


def all_reduce(values: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
    """All-reduce `values` across processes, in place, and return them."""
    if distributed.is_initialized():
        distributed.all_reduce(values, getattr(distributed.ReduceOp, operation))
    return values


def describe(run: Namespace) -> str:
    """Return what is trained, and on what."""
    settings = run.settings
    parameters = sum(weight.numel() for weight in run.model.parameters())
    return (
        f"device      {WORLD_SIZE} x {settings.device}, {settings.flags['dtype']}\n"
        f"model       {parameters:,} parameters, {len(run.vocabulary):,} characters\n"
        f"text        {run.train_text.size / 1e6:,.2f} MB to train on, "
        f"{run.val_text.size / 1e6:,.2f} MB to validate with\n"
        f"step        {settings.batch_size} x {settings.block_size} = "
        f"{settings.batch_size * settings.block_size:,} tokens\n"
        f"optimizer   {settings.optimizer}, learning rate {settings.learning_rate:.3g}"
    )


def describe_evaluation(run: Namespace, is_best: bool) -> str:
    """Return the losses, and two lines of what the model writes now."""
    settings, step, vocabulary = run.settings, run.record.step, run.vocabulary
    _, train_loss, val_loss, *_ = run.record.metrics[-1]
    saved = f", saved {settings.model}" if is_best else ""
    # A generator of its own, so that a sample does not change the random numbers of the training.
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    start = torch.tensor([[vocabulary.ids.get("\n", 0)]], device=settings.device)
    ids = run.average.generate(start, 160, temperature=0.8, generator=generator)
    text = vocabulary.decode(ids[0, 1:].tolist())
    sample = [f"    {line[:76]}" for line in text.splitlines() if line.strip()]
    losses = f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{saved}"
    return "\n".join([losses, *sample[:2]])


def describe_end(run: Namespace) -> str:
    """Return why the run ended, and the loss of the best model on the whole validation text.

    Of a long text, only as many rows count as a tenth of those that the run has trained on, or as
    an evaluation has. Raises OSError and ModelFileError.
    """
    settings, record, text = run.settings, run.record, run.val_text
    limit = settings.batch_size * max(record.step // 10, settings.eval_iters)
    rows = text.from_the_start()
    # From the file, so that the file is known to be good; in float32, so that runs in different
    # dtypes can be compared.
    model, _ = load_model(settings.model, settings.device)
    in_float32 = Namespace(**{**vars(settings), "dtype": torch.float32})
    nats = mean_loss(model, text, islice(rows, limit), in_float32)
    is_cut = next(rows, None) is not None
    part = f"first {limit * settings.block_size:,} characters of the" if is_cut else "whole"
    reason = ""
    if record.step < settings.max_iters:
        reason = (
            f"stopped after step {record.step}: no better model in {settings.patience} "
            "evaluations\n"
        )
    return (
        f"{reason}best model, of step {record.best_step}: {nats:.4f} nats = "
        f"{nats / math.log(2):.3f} bits per character\nover the {part} validation text; "
        f"talk to it: python chatbot.py -model {settings.model}"
    )


# The record and the files of a run ----------------------------------------------------------------

METRICS = ("step", "train_loss", "val_loss", "learning_rate", "tokens", "seconds")
ENDINGS = (".state.pkl", ".metrics.csv", ".pkl")  # of the files of a run


@dataclass
class Record:
    """How far a run has come: what it needs to go on, besides weights and optimizer's state."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0
    best_loss: float = math.inf  # on the validation text
    best_step: int = 0
    evaluations_since_best: int = 0
    metrics: list[list[float]] = field(default_factory=list)  # a row of METRICS per evaluation
    is_saved: bool = False

    def add(self, train_loss: float, val_loss: float, settings: Namespace) -> bool:
        """Add an evaluation; return whether its model is the best so far."""
        row = [
            self.step,
            round(train_loss, 6),
            round(val_loss, 6),
            learning_rate_at(self.step - 1, settings),
            self.step * settings.batch_size * settings.block_size,
            round(self.seconds, 3),
        ]
        self.metrics.append(row)
        is_best = val_loss < self.best_loss
        self.evaluations_since_best += 1
        if is_best:
            self.best_loss, self.best_step, self.evaluations_since_best = val_loss, self.step, 0
        return is_best


def sibling(model: Path, ending: str) -> Path:
    """Return a file that belongs to a model: m.pkl, ".state.pkl" -> m.state.pkl"""
    return model.with_name(model.name.removesuffix(".pkl") + ending)


def kept(path: Path) -> Path:
    """Return where a file of an earlier run is kept: m.state.pkl -> m.old.state.pkl

    Of a link, that is beside its target.
    """
    target = Path(os.path.realpath(path))
    ending = r"(\.state\.pkl|\.metrics\.csv|\.pkl|)$"
    return target.with_name(re.sub(ending, r".old\1", target.name, count=1))


def lock_model(model: Path, stack: ExitStack) -> None:
    """Let no other process train this model until the stack is closed.

    Raises OSError if another run is training it, and if nothing can be written there.
    """
    target = Path(os.path.realpath(model))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(sibling(target, ".lock.tmp")))
    except OSError as error:  # which names the lock, a file that nobody knows
        raise OSError(error.errno, error.strerror, str(model)) from error
    for ending in ENDINGS:  # what a killed run was writing
        Path(f"{os.path.realpath(sibling(model, ending))}.tmp").unlink(missing_ok=True)


def save(run: Namespace, is_best: bool = False) -> None:
    """Save the model if it is the best so far or the only one, the state and the losses.

    In this order: after a kill in between, the resumed run repeats the steps that led to the model.
    The first save renames the files of an earlier run, so a run that never saves displaces nothing.
    Raises OSError.
    """
    settings, record = run.settings, run.record
    state_path, metrics_path = (sibling(settings.model, ending) for ending in ENDINGS[:2])
    if not record.is_saved:
        for path in (state_path, metrics_path, settings.model):
            if path.exists():
                replace(Path(os.path.realpath(path)), kept(path))
        record.is_saved = True
    if is_best or not settings.model.exists():
        save_model(settings.model, run.average, run.vocabulary)
    state = {
        "version": STATE_VERSION,
        "flags": settings.flags,
        "texts": [run.train_text.fingerprint, run.val_text.fingerprint],
        "record": asdict(record),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state(),
    }
    save_model(state_path, run.model, run.vocabulary, training=state)
    try:
        # All rows each time: a row that is appended could be cut short when the disk is full.
        with atomic_write(metrics_path) as file:
            for row in (METRICS, *record.metrics):
                file.write(",".join(map(str, row)).encode() + b"\n")
        if settings.plot and record.metrics:
            draw_losses(settings.plot, record)
    except OSError as error:  # perhaps a spreadsheet has it open
        show(f"not written: {explain(error)}; the run goes on", sys.stderr)


def draw_losses(path: Path, record: Record) -> None:
    """Draw both losses over the steps and mark the best model. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps, train_losses, val_losses, *_ = zip(*record.metrics)
    axes.plot(steps, train_losses, marker=".", label="training text")
    axes.plot(steps, val_losses, marker=".", label="validation text")
    axes.plot(record.best_step, record.best_loss, "*", markersize=14, label="best model")
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


def restore(run: Namespace, state: dict) -> None:
    """Bring the run back to where its state was saved.

    Raises ModelFileError, and TrainingError for other texts.
    """
    model = run.settings.model
    try:
        run.record = Record(**state["record"])
        run.average.load_state_dict(state["average"])
        run.optimizer.restore(state["optimizer"])
        texts = state["texts"]
    except Exception as error:  # parts that are missing, of the wrong type or of the wrong shape
        raise ModelFileError(
            f"{sibling(model, '.state.pkl')}: does not hold a run to go on with; without -resume, "
            f"-init_from {model} starts a new one from the best model"
        ) from error
    if texts != [run.train_text.fingerprint, run.val_text.fingerprint]:
        raise TrainingError(
            f"{run.settings.data_dir}: the texts are not those that the run began with; "
            "put those back, or start anew without -resume"
        )


# Interruption -------------------------------------------------------------------------------------


class Interruption:
    """Lets Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the loop in good order.

    A second one ends it at once. Under torchrun a second signal is ignored, because torchrun
    forwards every signal to its processes.
    """

    def __init__(self):
        self.received = 0  # by this process
        self.signal = 0  # by any process, once all have agreed on it

    def __enter__(self) -> Interruption:
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP. A run that nohup started ignores it, and goes on when the terminal
        # is closed.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.handlers = {number: signal.signal(number, self.on_signal) for number in numbers}
        return self

    def __exit__(self, error: type | None, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.received and not self.signal and error is None:
            signal.raise_signal(self.received)  # it came too late for the loop to see it

    def on_signal(self, number: int, frame) -> None:
        # Only take note of it: it may come in the middle of a step, when some weights have moved
        # and others have not.
        self.received = number
        if WORLD_SIZE == 1:
            # From now on the system ends the program, without Python's delay.
            signal.signal(number, signal.SIG_DFL)

    def received_by_any(self) -> bool:
        """Return whether any process has received a signal: all have to end after the same step."""
        self.signal = int(all_reduce(torch.tensor(self.received), "MAX"))
        return self.signal != 0


# The command line ---------------------------------------------------------------------------------

# Flags that don't change what is learnt, or that a resumed run may change on purpose. -max_iters
# may grow, too.
MAY_CHANGE_ON_RESUME = {"max_iters", "data_dir", "device", "dtype", "patience"}
# What each command says for itself. No state names files to write.
NOT_SAVED = {"model", "plot", "resume", "compile"}
SHAPE = ("n_embd", "n_head", "n_layer", "block_size")


def training_parser() -> Parser:
    integer, positive, real = bounded(int, 0), bounded(int, 1), bounded(float, 0)
    share, any_seed = bounded(float, 0, below=1), bounded(int, 0, below=2**63)
    rates = ", ".join(f"{rate} with {name}" for name, rate in LEARNING_RATES.items())
    ends = ", ".join(f"{end} of the highest with {name}" for name, end in MIN_LR_SHARES.items())
    passes = "0 up to 10 passes over the text, 0.2 from 25 on"
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    optimizers = {"choices": tuple(LEARNING_RATES)}
    dtypes = {"choices": ("float32", "bfloat16", "float16")}
    # fmt: off
    flags = [
        ("batch_size", positive, 32, "sequences per optimizer step, over all processes"),
        ("block_size", positive, 128, "characters that the model sees at once"),
        ("max_iters", positive, 550, "optimizer steps"),
        ("optimizer", optimizers, "adamw", "muon learns more per step, for the blocks"),
        ("learning_rate", real, None, f"rate after the warm-up (default: at most {rates})"),
        ("min_lr", real, None, f"rate at the last step (default: {ends})"),
        ("warmup_iters", integer, None,
            "steps of rising rate (default: 150, at most a third of -max_iters)"),
        ("weight_decay", real, 0.1, "weight decay, on matrices only"),
        ("grad_clip", real, 1.0, "longest gradient (norm over all weights); 0: any"),
        ("n_embd", positive, 384, "numbers per character inside the model"),
        ("n_head", positive, 4, "attention heads per layer"),
        ("n_layer", positive, 4, "layers (blocks)"),
        ("dropout", share, None, f"share of numbers dropped in training (default: {passes})"),
        ("eval_interval", positive, 100, "steps between evaluations, each of which saves"),
        ("eval_iters", positive, 8, "batches per evaluation and text"),
        ("patience", integer, 0, "stop after so many evaluations without a better one; 0: never"),
        ("seed", any_seed, 1337, "decides initial weights, rows and dropout"),
        ("device", device, fastest, "cpu, cuda, cuda:1, ..."),
        ("dtype", dtypes, None, "for multiplications (default: the fastest here)"),
        ("compile", {"action": "store_true"}, None,
            "torch.compile: a minute or more at the start, then faster on a GPU"),
        ("data_dir", Path, Path("."), "folder with output_train.txt, output_val.txt and vocab.txt"),
        ("model", Path, Path("model-01.pkl"), "file for the trained model"),
        ("resume", {"action": "store_true"}, None,
            "go on with the run whose state is beside -model; without one, start it"),
        ("init_from", Path, None,
            "start from the weights and shape of this model file, not from random ones"),
        ("vocab", Path, None, "vocab.txt of the -init_from model, if that file holds none"),
        ("plot", Path, None, "draw the losses into this .png, .svg or .pdf file; needs matplotlib"),
    ]
    # fmt: on
    return Parser("Train a GPT on output_train.txt and keep the best model.", flags)


def check_files(parser: Parser, args: Namespace) -> None:
    """End the program if a run can't have these files."""
    parser.error_if(
        args.model.suffix != ".pkl" or args.model.name.endswith(".state.pkl"),
        f"argument -model: {str(args.model)!r} must end in .pkl, but not in .state.pkl",
    )
    displaced = (kept(args.model), kept(sibling(args.model, ".state.pkl")))
    parser.error_if(
        args.init_from and Path(os.path.realpath(args.init_from)) in displaced,
        f"argument -init_from: the first save of {args.model} would displace {args.init_from}; "
        "name another -model",
    )
    parser.error_if(
        args.vocab and not args.init_from,
        "argument -vocab: goes with -init_from only; training takes the vocab.txt in -data_dir",
    )
    parser.error_if(
        args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"),
        f"argument -plot: {str(args.plot)!r} does not end in .png, .svg or .pdf",
    )
    parser.error_if(
        args.plot and importlib.util.find_spec("matplotlib") is None,
        "argument -plot: needs matplotlib; pip install matplotlib",
    )


def settle(parser: Parser, args: Namespace, given: dict) -> tuple[Namespace, tuple]:
    """Return the settings, and what the run starts from: a model, its vocabulary, a state.

    What is not there is None. What is given counts first, then what a state or a model has settled,
    then the defaults. Raises OSError and ModelFileError.
    """
    start = (None, None, None)
    settled = {}
    state_path = sibling(args.model, ".state.pkl")
    if args.resume and state_path.exists():
        start, settled = read_state(parser, state_path, args.model, given)
        refuse_contradictions(parser, given, {**parser.defaults, **settled}, state_path)
    elif args.init_from:
        vocabulary = Vocabulary.from_file(args.vocab) if args.vocab else None
        model, vocabulary = load_model(args.init_from, vocabulary=vocabulary)
        start = (model, vocabulary, None)
        settled = {name: model.config[name] for name in SHAPE}
        refuse_contradictions(parser, given, settled, args.init_from)
    if args.resume and start[-1] is None:
        show(f"{state_path}: there is no run to go on with, so a new one starts", sys.stderr)
    settings = Namespace(**{**parser.defaults, **settled, **given})
    work_out_defaults(settings)
    parser.error_if(
        settings.batch_size % WORLD_SIZE > 0,
        f"argument -batch_size: {settings.batch_size} can't be shared evenly among "
        f"{WORLD_SIZE} processes",
    )
    parser.error_if(
        settings.n_embd % settings.n_head > 0,
        f"argument -n_embd: {settings.n_embd} is not a multiple of -n_head {settings.n_head}",
    )
    return settings, start


def read_state(parser: Parser, path: Path, model: Path, given: dict) -> tuple[tuple, dict]:
    """Return what the run that trains this model has saved, and its flags.

    That is weights, vocabulary and state. The saved device is left out if another is given, since
    it may be missing here. Raises OSError and ModelFileError. Ends the program if a flag is wrong.
    """
    advice = f"without -resume, -init_from {model} starts a new run from the best model"
    weights, vocabulary, content = read_model(path, None, advice)
    state = content.get("training")
    is_state = isinstance(state, dict) and isinstance(state.get("flags"), dict)
    if not is_state or state.get("version") != STATE_VERSION:
        raise ModelFileError(
            f"{path}: is not a state of this version of training.py; "
            f"-init_from {path} starts a new run from its weights"
        )
    names = (parser.defaults.keys() - NOT_SAVED) & state["flags"].keys()
    names -= given.keys() & {"device"}
    # They are read like a command line, since a stranger may have written them.
    _, flags = parser.parse([f"-{name}={state['flags'][name]}" for name in sorted(names)])
    return (weights, vocabulary, state), flags


def refuse_contradictions(parser: Parser, given: dict, settled: dict, source: Path) -> None:
    """End the program if a flag is given that contradicts what a file has settled."""
    for name in sorted((given.keys() & settled.keys()) - MAY_CHANGE_ON_RESUME - NOT_SAVED):
        parser.error_if(
            given[name] != settled[name],
            f"argument -{name}: {given[name]} contradicts {source}; leave it out",
        )
    # A shorter schedule would have had other learning rates in the steps that are done.
    least = settled.get("max_iters", 0)
    parser.error_if(
        given.get("max_iters", least) < least,
        f"argument -max_iters: {source} has {least}, which may only grow",
    )


def work_out_defaults(settings: Namespace) -> None:
    """Fill in what follows from other flags or from this machine where a flag is not given."""
    settings.device = device(settings.device)
    if settings.dropout is None:
        settings.dropout = default_dropout(settings)
    if settings.dtype is None:
        settings.dtype = default_dtype(settings.device)
    # What -resume reads again. The defaults below are left out, since they follow -max_iters, which
    # may grow; so is the number of the card.
    saved = {**vars(settings), "device": settings.device.type}
    settings.flags = {
        name: str(value)
        for name, value in saved.items()
        if value is not None and name not in NOT_SAVED
    }
    settings.dtype = getattr(torch, settings.dtype)
    if settings.learning_rate is None:
        settings.learning_rate = default_learning_rate(settings)
    if settings.min_lr is None:
        settings.min_lr = MIN_LR_SHARES[settings.optimizer] * settings.learning_rate
    if settings.warmup_iters is None:
        settings.warmup_iters = min(150, settings.max_iters // 3)


def default_dtype(device: torch.device) -> str:
    """Return the dtype that the device multiplies fastest."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    # A CPU without units for bfloat16 is many times slower with it than with float32.
    if hasattr(torch.cpu, "get_capabilities"):
        units = torch.cpu.get_capabilities()
        # On ARM they are called bf16, and torch uses them on Linux only.
        names = ("avx512_bf16", "amx_tile", "bf16" if sys.platform == "linux" else "")
        has_units = any(units.get(name) for name in names)
    else:  # torch 2.9 has only these private names
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device.type == "cpu" and has_units else "float32"


def default_learning_rate(settings: Namespace) -> float:
    """Return the highest learning rate of the run.

    AdamW's falls with the width (Yang et al. 2022, "Tensor Programs V") and rises with the square
    root of the tokens in a step, since fewer give noisier gradients (Malladi et al. 2022, "On the
    SDEs and Scaling Rules for Adaptive Gradient Algorithms"). At 0.003, the default model learns
    nothing from 768 tokens a step. Muon's falls with the length of the run (Bjorck et al. 2025,
    "Scaling Optimal LR Across Token Horizons").
    """
    if settings.optimizer == "muon":
        share = (600 / settings.max_iters) ** (1 / 3)
    else:
        share = 128 / settings.n_embd * math.sqrt(settings.batch_size * settings.block_size / 768)
    return LEARNING_RATES[settings.optimizer] * min(1.0, share)


def default_dropout(settings: Namespace) -> float:
    """Return how much to drop: more for a run that passes over its text so often that it learns it.

    Of 0, 0.1 and 0.2, the best was 0 for 5 and for 10 passes, and 0.2 for 25. Raises OSError if
    there is no text.
    """
    size = (settings.data_dir / "output_train.txt").stat().st_size
    passes = settings.max_iters * settings.batch_size * settings.block_size / max(1, size)
    return round(0.2 * min(1.0, max(0.0, (passes - 10) / 15)), 3)


# The command --------------------------------------------------------------------------------------


def new_model(
    settings: Namespace, old: GPTLanguageModel | None, known: Vocabulary | None
) -> tuple[GPTLanguageModel, Vocabulary]:
    """Return a model and its vocabulary.

    The weights are random, or those of an old model that knows these characters.
    """
    vocabulary = Vocabulary.from_file(settings.data_dir / "vocab.txt")
    if old:
        vocabulary = Vocabulary(known.characters + vocabulary.characters)
    torch.manual_seed(settings.seed)
    shape = {name: getattr(settings, name) for name in (*SHAPE, "dropout")}
    model = GPTLanguageModel(len(vocabulary), **shape)
    if old:
        rows = vocabulary.encode(known.characters)
        weights = model.state_dict()
        for name, weight in old.state_dict().items():
            if name.startswith(("token_embedding_table", "lm_head")):
                weights[name][rows] = weight  # other rows are of characters new to the model
            else:
                weights[name].copy_(weight)
    return model, vocabulary


def new_run(settings: Namespace, start: tuple) -> Namespace:
    """Return all that a run is made of, at its beginning.

    Raises OSError, ModelFileError and TrainingError.
    """
    model, vocabulary, state = start
    if state is None:
        model, vocabulary = new_model(settings, model, vocabulary)
    model.to(settings.device)
    return Namespace(
        settings=settings,  # the flags, with all defaults worked out
        model=model,
        average=copy.deepcopy(model).eval(),  # its weights over the last steps: what is kept
        vocabulary=vocabulary,
        train_text=Text(settings.data_dir / "output_train.txt", vocabulary, settings.block_size),
        val_text=Text(settings.data_dir / "output_val.txt", vocabulary, settings.block_size),
        optimizer=Optimizer(model, settings),
        record=Record(),
    )


def run_training(parser: Parser, args: Namespace, given: dict) -> int:
    """Train as these flags say; return the exit status.

    Raises OSError, ModelFileError and TrainingError.
    """
    check_files(parser, args)
    with ExitStack() as stack:
        if RANK == 0:
            lock_model(args.model, stack)
        settings, start = settle(parser, args, given)
        run = new_run(settings, start)
        show(describe(run))
        state = start[-1]
        if state:
            restore(run, state)
            show(f"resumed     after step {run.record.step} of {settings.max_iters}")
        if WORLD_SIZE > 1:
            # Python's own handler of Ctrl-C would wait until all processes are there.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # Signals are agreed upon on the CPU, also where gradients are shared among GPUs.
            backend = "cpu:gloo,cuda:nccl" if settings.device.type == "cuda" else "gloo"
            distributed.init_process_group(backend)
        with Interruption() as interruption:
            train(run, interruption)
            if interruption.signal and RANK == 0:
                show(describe_interruption(run))
        if WORLD_SIZE > 1:  # what follows needs no other process, so none waits for one that ended
            distributed.destroy_process_group()
        if interruption.signal:
            return 128 + interruption.signal
        if RANK == 0:
            show(describe_end(run))
        return 0


def describe_interruption(run: Namespace) -> str:
    """Save what was learnt, unless the run has hardly begun, and return how to go on.

    Raises OSError.
    """
    where = f"interrupted after step {run.record.step}"
    if not run.record.is_saved and run.record.seconds < SOON:  # perhaps started by mistake
        return f"{where}, within a minute: nothing was saved"
    save(run)
    return f"{where} and saved; the same command with -resume goes on"


def main() -> int:
    prepare_streams()
    if WORLD_SIZE > 1 and torch.cuda.is_available():
        # Before anything touches CUDA, or each process would take memory of the first card too.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    errors = sys.stderr
    if RANK > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        parser = training_parser()
        return run_training(parser, *parser.parse())
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
