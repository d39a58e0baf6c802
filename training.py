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
import importlib.util
import math
import mmap
import os
import re
import signal
import sys
import time
import zlib
from argparse import ArgumentParser, Namespace
from codecs import utf_8_decode
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

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
    make_parser,
    name_file_in_errors,
    prepare_streams,
    read_model_file,
    save_model,
)

# torchrun tells each process which one it is, and how many there are.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

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
ADAMW_AVERAGING_TOKENS = 80_000  # over which AdamW averages the square of a gradient
AVERAGED_SHARE = 0.05  # of the run's steps, over which weights are averaged
PLATEAU_EVALUATIONS = 5  # without a better one, after which the run says so
CHUNK = 2**24  # bytes of text looked at in one go
STATE_VERSION = 2  # of the state files; others can't be resumed


class TrainingError(Exception):
    """Training can't start or go on; the message says why and what to do."""


# The training loop ---------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """All that a run is made of. The loop changes the models, the optimizer and the record."""

    settings: Settings
    model: GPTLanguageModel
    average: GPTLanguageModel  # its weights, averaged over the last steps: what is evaluated and kept
    vocabulary: Vocabulary
    train_text: Text
    val_text: Text
    optimizer: Optimizer
    record: Record


def train(run: Run, interruption: Interruption) -> None:
    """Train until the last step, until `-patience` is exhausted or until a signal arrives, and save on the way.

    Raises OSError, and TrainingError once the loss is no longer a number.
    """
    settings, model, optimizer, record = run.settings, run.model, run.optimizer, run.record
    evaluation = evaluation_rows(run)
    forward = prepare_forward(run)
    started = time.monotonic() - record.seconds  # a resumed run counts on
    with Progress(settings, record.step, evaluation) as progress:
        while not (is_finished(record, settings) or interruption.received_by_any()):
            # 1. Draw a batch, and seed dropout. Both depend on the step alone, so a resumed run sees the same ones.
            inputs, targets = get_batch(run.train_text, record.step, settings)
            torch.manual_seed(random_seed(settings.seed, record.step, DROPOUT, RANK))

            # 2. Forward and backward, in `grad_accum` parts; their gradients add up.
            model.zero_grad()
            losses = []
            for x, y in zip(inputs.chunk(settings.grad_accum), targets.chunk(settings.grad_accum)):
                is_last = len(losses) == settings.grad_accum - 1
                with sharing_gradients(forward, is_last):
                    with autocast(settings.device, settings.dtype):
                        _, loss = forward(x, y)
                    optimizer.scaler.scale(loss / settings.grad_accum).backward()
                losses.append(loss.detach())  # its value, without the graph that led to it
            loss = torch.stack(losses).mean()

            # 3. Step: move the weights against their gradients.
            optimizer.step(learning_rate_at(record.step, settings), settings.grad_clip)
            update_average(run.average, model, settings.max_iters)
            record.step += 1
            record.seconds = time.monotonic() - started

            # 4. Show the progress. Reading the loss waits for a GPU, so it is read only when it is shown or saved.
            if progress.is_due(record.step):
                progress.show(record.step, check_loss(loss.item(), run))

            # 5. Evaluate, and keep the model if it is the best so far.
            is_evaluated = record.step % settings.eval_interval == 0 or record.step == settings.max_iters
            if is_evaluated:
                train_loss, val_loss = evaluate(run.average, evaluation, settings)
                is_best = record.add(train_loss, check_loss(val_loss, run), settings)
                if RANK == 0:
                    save_evaluation(run, is_best)
                    progress.print(describe_evaluation(run, is_best))

            # 6. Save the state, from which `-resume` goes on.
            if is_evaluated or record.step % settings.save_interval == 0:
                check_loss(loss.item(), run)
                save_state(run)


def is_finished(record: Record, settings: Settings) -> bool:
    is_out_of_patience = 0 < settings.patience <= record.evaluations_since_best  # 0 is endless patience
    return record.step >= settings.max_iters or is_out_of_patience


def check_loss(loss: float, run: Run) -> float:
    """Return the loss. Raises TrainingError if it is no longer a number."""
    if math.isfinite(loss):
        return loss
    step = run.record.step
    rate = learning_rate_at(step - 1, run.settings)
    kept = f"; the best model so far is in {run.settings.model}" if run.record.best_loss < math.inf else ""
    raise TrainingError(
        f"the loss is {loss} after step {step}, at learning rate {rate:.2g}; "
        f"try a lower -learning_rate or a longer -warmup_iters{kept}"
    )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context that multiplies matrices in `dtype`; weights, norms and losses stay in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def random_seed(*key: int) -> int:
    """Return a seed for torch that depends on all numbers of the key."""
    return int(np.random.default_rng(key).integers(2**63))


def prepare_forward(run: Run) -> torch.nn.Module:
    """Return what runs the model in training: the model, compiled and shared among processes where that is wanted."""
    forward = run.model.train()
    if run.settings.compile == "on":
        forward = compile_model(run.model, get_batch(run.train_text, 0, run.settings), run.settings)
    if WORLD_SIZE > 1:
        # Gradients are sent from where they lie, without a copy. Masks are the same everywhere: they need not be sent.
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True, broadcast_buffers=False)
    return forward


def compile_model(model: GPTLanguageModel, batch: tuple, settings: Settings) -> torch.nn.Module:
    """Return the model, compiled for such batches; or the model as it is, with a notice, where that can't be done."""
    show("compiling   the model, which takes a minute or so ...")
    forward = torch.compile(model)
    started = time.monotonic()
    inputs, targets = (part.chunk(settings.grad_accum)[0] for part in batch)
    try:
        # torch compiles when the model is first called. Call it here, where training can still go on without.
        with autocast(settings.device, settings.dtype):
            _, loss = forward(inputs, targets)
        loss.backward()
    except Exception as error:  # no compiler, or one of many things that it can't do
        if is_out_of_memory(error):
            raise
        print(f"-compile on: can't be done here, training goes on without: {first_line(error)}", file=sys.stderr)
        return model
    show(f"compiled    in {time.monotonic() - started:.0f} s")
    return forward


# Text ----------------------------------------------------------------------------------------------------------------


class Text:
    """A UTF-8 text from which rows of token ids are drawn at random.

    It is memory-mapped: only the parts that are drawn are ever read, so a text may be larger than memory. Raises
    OSError, and TrainingError for a text too short for a single row.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, block_size: int):
        self.path = path
        self.row_length = block_size + 1
        self.bytes = map_file(path)
        self.array = np.frombuffer(self.bytes, dtype=np.uint8)
        self.size = len(self.bytes)
        # A row may start only where a whole row follows. A character has at most 4 bytes, so the last such start is in
        # these last bytes.
        tail = self.array[-4 * self.row_length :]
        starts = np.flatnonzero(~is_continuation(tail))
        if len(starts) < self.row_length:
            raise TrainingError(
                f"{path}: holds {len(starts)} characters, -block_size {block_size} takes {self.row_length} or more; "
                "use a longer text or a smaller block"
            )
        self.last_start = self.size - len(tail) + int(starts[-self.row_length])
        # Every code point's token id; -1 for characters outside the vocabulary.
        self.ids = np.full(sys.maxunicode + 1, -1, dtype=np.int64)
        self.ids[[ord(character) for character in vocabulary.characters]] = np.arange(len(vocabulary))

    def fingerprint(self) -> list[int]:
        """Return the size and a checksum of 16 places: enough to notice another text, however long it is."""
        places = [self.size * i // 16 for i in range(16)] + [max(0, self.size - 4096)]
        return [self.size, zlib.crc32(b"".join(self.bytes[place : place + 4096] for place in places))]

    def draw_offsets(self, count: int, key: list[int]) -> np.ndarray:
        """Draw `count` characters uniformly; return their byte offsets, which depend on `key` alone."""
        random = np.random.default_rng(key)
        offsets = random.integers(0, self.last_start, count, endpoint=True)
        # Draw again what fell inside a character; else characters of many bytes would be drawn more often.
        inside = is_continuation(self.array[offsets])
        while inside.any():
            offsets[inside] = random.integers(0, self.last_start, np.count_nonzero(inside), endpoint=True)
            inside = is_continuation(self.array[offsets])
        return offsets

    def windows(self) -> tuple[np.ndarray, int]:
        """Cut the whole text into rows of block_size + 1 that share one character, so that each is predicted once.

        Return the byte offsets of the rows, and the length of the last row in characters, which may be shorter.
        """
        block_size = self.row_length - 1
        offsets = []
        count = 0  # characters so far
        # In chunks: a place takes 8 bytes in NumPy, so those of all characters may not fit into memory.
        for start in range(0, self.size, CHUNK):
            characters = np.flatnonzero(~is_continuation(self.array[start : start + CHUNK]))
            first = -count % block_size  # of these characters, the first that begins a row
            offsets.append(start + characters[first::block_size])
            count += len(characters)
        rows = math.ceil((count - 1) / block_size)  # the last character predicts nothing
        return np.concatenate(offsets)[:rows], count - (rows - 1) * block_size

    def rows(self, offsets: np.ndarray, length: int | None = None) -> np.ndarray:
        """Return the token ids (len(offsets), length) of the rows that begin at these bytes.

        A row has block_size + 1 characters unless told otherwise. Raises TrainingError if the text there is not UTF-8,
        or not in the vocabulary.
        """
        length = length or self.row_length
        texts = [self.characters(offset, length) for offset in offsets.tolist()]
        # In UTF-32, each character is a number of 4 bytes: its code point.
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

    def characters(self, offset: int, length: int) -> str:
        """Return the `length` characters that begin at this byte. Raises TrainingError."""
        try:
            # More may follow these bytes (False: they are not the end), so a character cut in two is left out.
            text, _ = utf_8_decode(self.bytes[offset : offset + 4 * length], "strict", False)
        except UnicodeDecodeError as error:
            raise TrainingError(f"{self.path}: not UTF-8 text at byte {offset + error.start}") from error
        if len(text) < length:
            raise TrainingError(f"{self.path}: ends inside a character; it was cut short")
        return text[:length]


def map_file(path: Path) -> mmap.mmap | bytes:
    """Memory-map a file. Where the file system can't do that, read it whole. Raises OSError."""
    with name_file_in_errors(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # which can't be mapped
            return b""
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:  # as on some network drives and shared folders
            print(f"{path}: read into memory, as it can't be mapped here ({error.strerror})", file=sys.stderr)
            return file.read()
        if hasattr(mmap, "MADV_RANDOM"):  # or the system reads megabytes around every row
            mapped.madvise(mmap.MADV_RANDOM)
        return mapped


def is_continuation(array: np.ndarray) -> np.ndarray:
    """Return which bytes of UTF-8 text are inside a character, not at its start: those of the form 10xxxxxx."""
    return (array & 0b1100_0000) == 0b1000_0000


def get_batch(text: Text, step: int, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of a step, token ids (B, T) each: the targets are the characters after the inputs.

    Seed and step alone decide which rows these are. Each process takes its share of them, B = batch_size / processes.
    """
    # All processes draw all rows, which costs nothing, so that the same rows are seen whatever their number.
    offsets = text.draw_offsets(settings.batch_size, [settings.seed, step, TRAIN_ROWS])
    share = settings.batch_size // WORLD_SIZE
    rows = torch.from_numpy(text.rows(offsets[RANK * share :][:share]))
    if settings.device.type == "cuda":  # which copies from pinned memory while it computes
        rows = rows.pin_memory().to(settings.device, non_blocking=True)
    else:
        rows = rows.to(settings.device)
    return rows[:, :-1], rows[:, 1:]


# Optimizing ----------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, settings: Settings) -> float:
    """Return the learning rate: a linear warm-up, then a cosine down to `min_lr` at the last step."""
    if step < settings.warmup_iters:  # at full speed from the start, this kind of model diverges
        return settings.learning_rate * (step + 1) / settings.warmup_iters
    progress = (step - settings.warmup_iters) / (settings.max_iters - settings.warmup_iters)  # from 0 to 1
    return settings.min_lr + (settings.learning_rate - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw_beta2(tokens_per_step: int) -> float:
    """Return AdamW's beta2: larger batches are less noisy, so the average needs fewer steps.

    Marek et al. 2025, "Small Batch Size Training for Language Models", keep its half-life in tokens fixed.
    """
    return min(max(0.95, 1 - tokens_per_step / ADAMW_AVERAGING_TOKENS), 0.999)


@torch.no_grad()
def update_average(average: GPTLanguageModel, model: GPTLanguageModel, max_iters: int) -> None:
    """Move the averaged weights towards the model's, so that they follow its last few per cent of the run.

    Each step leaves the weights a little to one side of where they are going, another one each time. In the average
    that cancels out.
    """
    share = min(1.0, 1 / (AVERAGED_SHARE * max_iters))  # older weights fade: after 5 % of the run, a third is left
    for averaged, weight in zip(average.parameters(), model.parameters()):
        averaged.lerp_(weight, share)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: each update moves a matrix equally far in all directions, frequent and rare ones.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". The parameters of a group, one below
    the other, are cut into matrices of `rows` rows: so the heads of a layer are joined.
    """

    def __init__(self, groups: list[dict], weight_decay: float):
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters, rows = group["params"], group["rows"]
            gradients = torch.cat([parameter.grad for parameter in parameters])
            gradients = gradients.unflatten(0, (-1, rows))  # (N, rows, columns): all matrices are worked on together
            state = self.state[parameters[0]]  # the whole group's, kept with its first parameter
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1 - group["momentum"])
            ahead = gradients.lerp(state["momentum"], group["momentum"])  # Nesterov: where the next step will be
            updates = orthogonalize(ahead).flatten(0, 1).split([len(parameter) for parameter in parameters])
            # A tall matrix has more rows than directions to move in, so each row gets less: make up for it.
            length = group["lr"] * max(1, rows / gradients.shape[2]) ** 0.5
            for parameter, update in zip(parameters, updates):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])  # apart from the gradient, as in AdamW
                parameter.add_(update, alpha=-length)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Move all singular values of each matrix to about 1: (N, rows, columns) -> (N, rows, columns).

    A polynomial a x + b (x x^T) x + c (x x^T)^2 x keeps the directions of x and changes its singular values alone. It
    only multiplies, so it is much faster than a singular value decomposition.
    """
    # bfloat16 is exact enough. float16 is not: its largest number is too small.
    fast = default_dtype(matrices.device) == torch.bfloat16
    norms = matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)  # no singular value is larger
    x = (matrices / norms).to(torch.bfloat16 if fast else torch.float32)
    is_tall = x.shape[1] > x.shape[2]
    for a, b, c in POLYNOMIALS:
        square = x.mT @ x if is_tall else x @ x.mT  # the smaller of the two
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if is_tall else torch.baddbmm(x, factor, x, beta=a)
    return x.to(matrices.dtype)


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019) for all weights; or Muon for the matrices in the blocks, AdamW for the rest.

    Weight decay applies to matrices only: biases and norms have no need of it. `scaler` keeps small gradients from
    vanishing in float16, and does nothing for other dtypes.
    """

    def __init__(self, model: GPTLanguageModel, settings: Settings):
        muon_groups = matrices_in_blocks(model) if settings.optimizer == "muon" else []
        taken = {parameter for group in muon_groups for parameter in group["params"]}
        others = [parameter for parameter in model.parameters() if parameter not in taken]
        matrices = [parameter for parameter in others if parameter.dim() >= 2]
        vectors = [parameter for parameter in others if parameter.dim() < 2]
        # Muon's rate says how far a matrix turns; what AdamW moves beside it needs a smaller one.
        share = ADAMW_SHARE_BESIDE_MUON if muon_groups else 1.0
        adamw = torch.optim.AdamW(
            [
                {"params": matrices, "lr_share": share, "weight_decay": settings.weight_decay},
                {"params": vectors, "lr_share": share, "weight_decay": 0.0},
            ],
            # With the usual beta1 of 0.9, the loss ends 0.01 nats higher.
            betas=(0.8, adamw_beta2(settings.batch_size * settings.block_size)),
            fused=True,  # one operation for all weights, not several for each
        )
        self.parts = [Muon(muon_groups, settings.weight_decay), adamw] if muon_groups else [adamw]
        self.scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.dtype == torch.float16)

    def step(self, learning_rate: float, grad_clip: float) -> None:
        """Clip the gradients to a norm of `grad_clip` over all weights (0: don't), and move the weights."""
        groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:  # or the norm would be that of scaled gradients
            self.scaler.unscale_(part)
        parameters = [parameter for group in groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        for group in groups:
            group["lr"] = learning_rate * group.get("lr_share", 1.0)  # Muon's groups take the whole rate
        # In float16 a gradient may overflow. The scaler then skips the part that it belongs to; but clipping has spoilt
        # the other part's gradients too.
        spoilt = len(self.parts) > 1 and self.scaler.is_enabled() and not norm.isfinite()
        if not spoilt:
            for part in self.parts:
                self.scaler.step(part)
        self.scaler.update()

    def state(self) -> dict:
        # The rest of a state_dict, rates and decays, follows from the settings.
        return {"parts": [part.state_dict()["state"] for part in self.parts], "scaler": self.scaler.state_dict()}

    def restore(self, state: dict) -> None:
        """Go back to a saved state. Raises one of many exceptions for anything but the state of such an optimizer."""
        if self.scaler.is_enabled() and state["scaler"]:  # it has none if the run was in another dtype so far
            self.scaler.load_state_dict(state["scaler"])
        for part, saved in zip(self.parts, state["parts"], strict=True):
            expected = shapes_of_state(part)
            part.load_state_dict({**part.state_dict(), "state": saved})
            found = {
                parameter: {name: value.shape for name, value in values.items() if value.is_contiguous()}
                for parameter, values in part.state.items()
            }
            # The fused step trusts shapes blindly: it would write to memory that belongs to something else. Before the
            # first step there is no state.
            if found not in ({}, expected):
                raise ValueError("the state of another optimizer or model")


def matrices_in_blocks(model: GPTLanguageModel) -> list[dict]:
    """Return the matrices inside the blocks in groups for Muon, with the `rows` of a matrix.

    The heads of a layer are joined: their queries make up one matrix, as do their keys and their values.
    """
    heads = [
        getattr(head, part).weight
        for block in model.blocks
        for part in ("query", "key", "value")
        for head in block.sa.heads
    ]
    projections = [block.sa.proj.weight for block in model.blocks]
    n_embd = model.config["n_embd"]
    return [
        {"params": heads + projections, "rows": n_embd},
        {"params": [block.ffwd.net[0].weight for block in model.blocks], "rows": 4 * n_embd},
        {"params": [block.ffwd.net[2].weight for block in model.blocks], "rows": n_embd},
    ]


def shapes_of_state(part: torch.optim.Optimizer) -> dict:
    """Return the shapes of what an optimizer keeps after its first step, by parameter and name."""
    shapes = {}
    for group in part.param_groups:
        parameters = group["params"]
        if isinstance(part, Muon):
            rows, columns = sum(len(parameter) for parameter in parameters), parameters[0].shape[1]
            shapes[parameters[0]] = {"momentum": (rows // group["rows"], group["rows"], columns)}
        else:
            for parameter in parameters:
                shapes[parameter] = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    return shapes


# Several processes ---------------------------------------------------------------------------------------------------


def all_reduce(values: torch.Tensor, operation: str = "SUM") -> torch.Tensor:
    """All-reduce `values` across processes, in place, and return them."""
    if WORLD_SIZE > 1 and distributed.is_initialized():
        distributed.all_reduce(values, getattr(distributed.ReduceOp, operation))
    return values


def sharing_gradients(forward: torch.nn.Module, is_last: bool):
    """Return a context whose backward pass shares gradients among processes only for the last part of a step."""
    # They add up in each process until then. Sent with every part, they would cross the network `grad_accum` times.
    if is_last or WORLD_SIZE == 1:
        return nullcontext()
    return forward.no_sync()


# Evaluating ----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The rows of a text to evaluate on: batches, each with its byte offsets and the characters in a row."""

    text: Text
    batches: list[tuple[np.ndarray, int]]
    is_whole: bool  # whether they make up the whole text


def evaluation_rows(run: Run) -> list[Rows]:
    """Return this process's share of the rows to evaluate on, of the training text and of the validation text.

    A validation text is evaluated whole if that takes at most 4 % of the time: a row costs a third of what it costs in
    training. The rows depend on no flag that -resume may change, so that "best" always compares the same rows.
    """
    settings = run.settings
    count = settings.eval_iters * settings.batch_size
    limit = int(0.12 * settings.eval_interval * settings.batch_size)
    rows = [choose_rows(run.train_text, 0, count, settings), choose_rows(run.val_text, limit, count, settings)]
    return [part._replace(batches=part.batches[RANK::WORLD_SIZE]) for part in rows]


def choose_rows(text: Text, limit: int, count: int, settings: Settings) -> Rows:
    """Return all rows of a text that has at most `limit`; else `count` from anywhere, always the same ones."""
    last = []
    # A character has at most 4 bytes, so the size alone rules out most long texts, without reading them.
    is_whole = text.size <= 4 * settings.block_size * limit and len(text.windows()[0]) <= limit
    if is_whole:
        offsets, last_length = text.windows()
        last = [(offsets[-1:], last_length)]  # a batch of its own, since it may be shorter
        offsets = offsets[:-1]
    else:
        # A key without the step: with other rows each time, two losses would differ though the model is the same.
        offsets = text.draw_offsets(count, [settings.seed, 0, EVAL_ROWS])
    size = settings.batch_size // (WORLD_SIZE * settings.grad_accum)
    batches = [(offsets[i : i + size], settings.block_size + 1) for i in range(0, len(offsets), size)]
    return Rows(text, batches + last, is_whole)


def evaluate(model: GPTLanguageModel, evaluation: list[Rows], settings: Settings) -> list[float]:
    """Return the losses on the training and the validation text."""
    return [mean_loss(model, rows, settings.device, settings.dtype) for rows in evaluation]


@torch.no_grad()
def mean_loss(model: GPTLanguageModel, rows: Rows, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Return the mean cross-entropy in nats per character over the rows of all processes, without dropout."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, device=device)  # nats, characters
    for offsets, length in rows.batches:
        ids = torch.from_numpy(rows.text.rows(offsets, length)).to(device)
        with autocast(device, dtype):
            _, loss = model(ids[:, :-1], ids[:, 1:])
        # Weigh each batch by its characters: the last one may be shorter.
        count = ids[:, 1:].numel()
        totals[0] += loss * count
        totals[1] += count
    model.train(was_training)
    nats, characters = all_reduce(totals).tolist()  # read only now, since Python has to wait for a GPU here
    return nats / characters


def describe_evaluation(run: Run, is_best: bool) -> str:
    """Return the lines to show after an evaluation: the losses, a sample, and a warning if the loss no longer falls."""
    record = run.record
    saved = f", saved {run.settings.model}" if is_best else ""
    _, train_loss, val_loss, *_ = record.metrics[-1]
    lines = [f"step {record.step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{saved}"]
    lines += [f"    {line}" for line in sample_lines(run.average, run.vocabulary, run.settings)]
    if record.evaluations_since_best == PLATEAU_EVALUATIONS:
        lines.append(
            f"the validation loss has been above that of step {record.best_step} for {PLATEAU_EVALUATIONS} "
            "evaluations: the model learns the training text by heart. More text or a higher -dropout helps; "
            "-patience N stops such a run"
        )
    return "\n".join(lines)


def sample_lines(model: GPTLanguageModel, vocabulary: Vocabulary, settings: Settings) -> list[str]:
    """Return two lines of what the model writes now, with a fixed seed, so that samples can be compared."""
    # A generator of its own, so that a sample does not change the random numbers of the training.
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    start = torch.tensor([[vocabulary.ids.get("\n", 0)]], device=settings.device)
    banned_ids = vocabulary.banned_ids if len(vocabulary) > 1 else []  # or there would be nothing to write
    ids = model.generate(start, 160, temperature=0.8, generator=generator, banned_ids=banned_ids)
    text = vocabulary.decode(ids[0, 1:].tolist())
    lines = [line for line in text.splitlines() if line.strip()]
    pieces = [line[i : i + 76] for line in lines for i in range(0, len(line), 76)]
    return ["".join(c if c.isprintable() else " " for c in piece) for piece in pieces[:2]]


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

    def add(self, train_loss: float, val_loss: float, settings: Settings) -> bool:
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
    return Path(str(model).removesuffix(".pkl") + ending)


def save_evaluation(run: Run, is_best: bool) -> None:
    """Save the metrics, the plot, and the model if it is the best so far. Raises OSError."""
    settings = run.settings
    if is_best:
        save_model(settings.model, run.average, run.vocabulary)
    save_metrics(sibling(settings.model, ".metrics.csv"), run.record)
    if settings.plot and has_matplotlib():
        draw_losses(settings.plot, settings.model.name.removesuffix(".pkl"), run.record)


def save_metrics(path: Path, record: Record) -> None:
    # All rows each time: a row that is appended could be cut short when the disk is full.
    with atomic_write(path) as file:
        for row in (METRICS, *record.metrics):
            file.write(",".join(map(str, row)).encode() + b"\n")


def draw_losses(path: Path, title: str, record: Record) -> None:
    """Draw both losses over the steps, in nats and in bits, and mark the best model. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps, train_losses, val_losses, *_ = zip(*record.metrics)
    axes.plot(steps, train_losses, marker=".", label="training text")
    axes.plot(steps, val_losses, marker=".", label="validation text")
    axes.plot(record.best_step, record.best_loss, "*", markersize=14, label=f"best model, {record.best_loss:.3f} nats")
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.set_title(title, parse_math=False)  # "$" in a name is no formula
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits per character")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


def save_state(run: Run) -> None:
    """Save all that `-resume` needs. Raises OSError."""
    if RANK > 0:
        return
    settings = run.settings
    state = {
        "version": STATE_VERSION,
        "model": settings.model.name,
        "arguments": settings.arguments,
        "fast_dtype": name_of(default_dtype(settings.device)),  # so that -resume can say if another is faster there
        "texts": [run.train_text.fingerprint(), run.val_text.fingerprint()],
        "record": asdict(run.record),
        "average": run.average.state_dict(),
        "optimizer": run.optimizer.state(),
    }
    save_model(sibling(settings.model, ".state.pkl"), run.model, run.vocabulary, training=state)


def restore(run: Run, state: dict) -> Run:
    """Return the run as it was when its state was saved.

    Raises OSError, ModelFileError for what is no state of such a run, and TrainingError for other texts.
    """
    settings = run.settings
    source = sibling(settings.model, ".state.pkl")
    try:
        record = checked_record(state["record"])
        run.optimizer.restore(state["optimizer"])
        run.average.load_state_dict(state["average"])
        fingerprints, fast_dtype = state["texts"], state["fast_dtype"]
    except Exception as error:  # parts that are missing, of the wrong type or of the wrong shape
        raise ModelFileError(f"{source}: does not hold a run to go on with") from error
    if fingerprints != [run.train_text.fingerprint(), run.val_text.fingerprint()]:
        raise TrainingError(
            f"{settings.data_dir}: the texts are not those that {source} began with; "
            "put those back, or start anew without -resume"
        )
    now = name_of(default_dtype(settings.device))
    if now not in (fast_dtype, name_of(settings.dtype)):
        print(
            f"this run multiplies in {name_of(settings.dtype)}; here, {now} may be much faster: -dtype {now}",
            file=sys.stderr,
        )
    if not settings.model.exists():
        print(
            f"{settings.model} is gone: the run goes on with the weights of step {record.step}, "
            "and the next evaluation saves a model again",
            file=sys.stderr,
        )
        record.best_loss, record.best_step, record.evaluations_since_best = math.inf, record.step, 0
    if RANK == 0:
        save_metrics(sibling(settings.model, ".metrics.csv"), record)  # without the rows of steps that were lost
    return run._replace(record=record)


def checked_record(saved: dict) -> Record:
    """Return the record of a state file. Raises one of many exceptions for what no run can have saved."""
    expected = {name: type(value) for name, value in asdict(Record()).items()}
    if {name: type(value) for name, value in saved.items()} != expected:
        raise ValueError("other fields than those of a record")
    record = Record(**saved)
    for row in record.metrics:
        if len(row) != len(METRICS) or not all(math.isfinite(number) for number in row):
            raise ValueError("metrics of another shape")
    if record.step < 0:
        raise ValueError("a step before the first")
    return record


def original_name(model: str) -> str:
    """Return the name under which a kept model was trained: model-01.old.pkl -> model-01.pkl"""
    return re.sub(r"\.old(-2)?(?=(\.pkl)?$)", "", model)


def keep_earlier_run(model: Path, start: Path | None) -> None:
    """Copy the files of an earlier run: model-01.pkl to model-01.old.pkl, and so on. Raises OSError.

    The model itself stays, until this run has a better one to put in its place.
    """
    suffix = ".pkl" if model.suffix == ".pkl" else ""
    backup = sibling(model, f".old{suffix}")
    replaced = [os.path.realpath(backup), os.path.realpath(sibling(backup, ".state.pkl"))]
    if start is not None and os.path.realpath(start) in replaced:  # the file that this run starts from has to stay
        backup = sibling(model, f".old-2{suffix}")
    if model.exists():
        copy_file(model, backup)
        print(f"the earlier {model} is kept as {backup}", file=sys.stderr)
    for ending in (".state.pkl", ".metrics.csv"):
        earlier = sibling(model, ending)
        if earlier.exists():
            copy_file(earlier, sibling(backup, ending))
            # Or -resume would go on with the earlier run until this one has saved. Of a link only the target goes: the
            # new file is written to the same disk.
            Path(os.path.realpath(earlier)).unlink()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file. Until the copy is whole, an earlier one stays. Raises OSError."""
    with name_file_in_errors(source):
        content = source.read_bytes()
    with atomic_write(target) as file:
        file.write(content)


# Showing how it goes -------------------------------------------------------------------------------------------------


def show(text: str) -> None:
    """Print a result. Raises OSError if standard output can't be written to."""
    with name_file_in_errors("standard output"):
        print(text, flush=True)


class Progress:
    """Shows on standard error how a run goes: a bar on a terminal; elsewhere, as in a log file, one line a minute."""

    def __init__(self, settings: Settings, first_step: int, evaluation: list[Rows]):
        self.settings = settings
        self.is_terminal = sys.stderr.isatty()
        # A row costs a third of what it costs in training, so an evaluation takes as long as this many steps.
        rows = sum(len(offsets) for part in evaluation for offsets, _ in part.batches) * WORLD_SIZE
        self.evaluation_steps = rows / settings.batch_size / 3
        self.first_work = self.work_until(first_step)
        self.started = time.monotonic()
        self.shown = -math.inf  # when it was shown last
        self.bar = tqdm(
            total=settings.max_iters,
            initial=first_step,
            disable=not self.is_terminal,
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {percentage:3.0f}%",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def work_until(self, step: int) -> float:
        """Return the work up to this step, with the evaluations on the way, counted in steps."""
        evaluations = step // self.settings.eval_interval
        if step == self.settings.max_iters and step % self.settings.eval_interval:  # the last step is always evaluated
            evaluations += 1
        return step + evaluations * self.evaluation_steps

    def is_due(self, step: int) -> bool:
        if self.is_terminal and step == self.settings.max_iters:  # so that the bar is full when it is left behind
            return True
        return time.monotonic() - self.shown >= (0.5 if self.is_terminal else 60)

    def show(self, step: int, loss: float) -> None:
        self.shown = time.monotonic()
        settings = self.settings
        work = self.work_until(step)
        seconds = max(0.001, self.shown - self.started)  # the clock of Windows stands still for up to 16 ms
        seconds_per_step = seconds / (work - self.first_work)
        tokens_per_second = settings.batch_size * settings.block_size / seconds_per_step
        left = tqdm.format_interval((self.work_until(settings.max_iters) - work) * seconds_per_step)
        text = f"step {step}/{settings.max_iters}: loss {loss:.3f}, {tokens_per_second:,.0f} tok/s, {left} left"
        if self.is_terminal:
            self.bar.n = step
            self.bar.set_description_str(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Print a result above the bar. Raises OSError if standard output can't be written to."""
        with tqdm.external_write_mode(file=sys.stdout):
            show(text)


def describe(run: Run) -> None:
    """Print what is trained, and on what."""
    settings = run.settings
    device = [str(settings.device)]
    if settings.device.type == "cpu":
        threads = torch.get_num_threads()
        device.append(f"{threads} thread{'s' if threads > 1 else ''}")
    device.append(name_of(settings.dtype))
    if WORLD_SIZE > 1:
        device.append(f"{WORLD_SIZE} processes")
    train_size, val_size = run.train_text.size / 1e6, run.val_text.size / 1e6
    tokens = settings.batch_size * settings.block_size
    show(f"device      {', '.join(device)}")
    show(f"model       {sum(p.numel() for p in run.model.parameters()):,} parameters")
    show(f"vocabulary  {len(run.vocabulary):,} characters")
    show(f"text        {train_size:,.2f} MB to train on, {val_size:,.2f} MB to validate with")
    show(f"step        {settings.batch_size} x {settings.block_size} = {tokens:,} tokens")
    show(f"optimizer   {settings.optimizer}, learning rate {settings.learning_rate:.3g}")


def describe_end(run: Run) -> None:
    """Print why the run ended, and the loss of the best model on the whole validation text.

    Of a long text, only as much is evaluated as takes 3 % of the run. Raises OSError and ModelFileError.
    """
    settings, record, text = run.settings, run.record, run.val_text
    if record.step < settings.max_iters:
        show(
            f"stopped after step {record.step} of {settings.max_iters}: no better model in {settings.patience} "
            f"evaluations; to go on: {resume_command(settings)} -patience {2 * settings.patience}"
        )
    limit = max(1, settings.max_iters * settings.batch_size // 10)
    rows = choose_rows(text, limit, limit, settings)
    # In float32, so that runs in different dtypes can be compared; from the file, so that the file is known to be good.
    model, _ = load_model(settings.model, settings.device)
    nats = mean_loss(model, rows, settings.device)
    share = "the whole"
    if not rows.is_whole:
        characters = text.size * (1 - is_continuation(text.array[:CHUNK]).mean())
        share = f"{limit * settings.block_size / characters:.2%} of the"
    bits = nats / math.log(2)
    show(f"best model, of step {record.best_step}: {nats:.4f} nats = {bits:.3f} bits per character")
    show(f"over {share} validation text; talk to it: python chatbot.py{model_flag(settings.model)}")


def model_flag(model: Path) -> str:
    """Return what a command needs to find this model."""
    quote = '"' if " " in str(model) else ""
    return "" if model == Path("model-01.pkl") else f" -model {quote}{model}{quote}"


def resume_command(settings: Settings) -> str:
    """Return the command that goes on with this run."""
    python = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}" if WORLD_SIZE > 1 else "python"
    return f"{python} training.py -resume{model_flag(settings.model)}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Interruption --------------------------------------------------------------------------------------------------------


class Interruption:
    """Lets Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the loop in good order. A second one ends it at once.

    Under torchrun the second signal is ignored, because torchrun forwards every signal to its processes.
    """

    def __init__(self):
        self.received = 0  # by this process
        self.signal = 0  # by any process, once all have agreed on it
        self.handlers = {}

    def __enter__(self) -> Interruption:
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP. A run that nohup started ignores it, and goes on when the terminal is closed.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame) -> None:
        # Only take note of it: it may come in the middle of a step, when some weights have moved and others have not.
        self.received = number
        if WORLD_SIZE == 1:
            # From now on the system ends the program: Python would wait for the end of a backward pass.
            for handled in self.handlers:
                signal.signal(handled, signal.SIG_DFL)
        if number == getattr(signal, "SIGHUP", None):
            # The terminal is gone. Printing to it would fail before the state is saved.
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def received_by_any(self) -> bool:
        """Return whether any process has received a signal: all of them have to end after the same step."""
        self.signal = int(all_reduce(torch.tensor(self.received), "MAX"))
        return self.signal != 0


# The command line ----------------------------------------------------------------------------------------------------

# Flags that don't change what is learnt, or that a resumed run may change on purpose. -max_iters may grow, too.
MAY_CHANGE_ON_RESUME = ("data_dir", "device", "dtype", "compile", "grad_accum", "save_interval", "patience", "plot")
SHAPE = ("n_embd", "n_head", "n_layer", "block_size")


class Settings(SimpleNamespace):
    """The flags of a run with all defaults worked out; frozen. `arguments` are what a resumed run parses again."""

    def __setattr__(self, name: str, value) -> None:
        raise AttributeError(f"{name}: settings don't change during a run")


class Start(NamedTuple):
    """What a run starts from: the content of a model file, and the state if it resumes."""

    model: GPTLanguageModel
    vocabulary: Vocabulary
    state: dict | None = None


def training_parser() -> ArgumentParser:
    parser, flag = make_parser("Train a GPT on output_train.txt and keep the best model.")
    integer, positive, real = bounded(int, 0), bounded(int, 1), bounded(float, 0)
    rates = " and ".join(f"{rate} with {optimizer}" for optimizer, rate in LEARNING_RATES.items())
    flag("batch_size", type=positive, default=32, help="sequences per optimizer step, over all processes")
    flag("grad_accum", type=positive, default=1, help="parts of a step, one after another: takes less memory")
    block_sizes = bounded(int, 1, below=MAX_BLOCK_SIZE + 1)
    flag("block_size", type=block_sizes, default=128, help="characters that the model sees at once")
    flag("max_iters", type=positive, default=550, help="optimizer steps")
    flag("optimizer", choices=("adamw", "muon"), default="adamw", help="muon learns more per step, for the blocks")
    flag("learning_rate", type=real, help=f"highest learning rate, after the warm-up; without it, at most {rates}")
    flag("min_lr", type=real, help="learning rate at the end; without it, 0.3 of the highest with adamw, 0.1 with muon")
    warmup = "steps in which the learning rate rises from 0; without it, 150 or at most a third of -max_iters"
    flag("warmup_iters", type=integer, help=warmup)
    flag("weight_decay", type=real, default=0.1, help="weight decay, on matrices only")
    flag("grad_clip", type=real, default=1.0, help="longest gradient (norm over all weights); 0: any")
    flag("n_embd", type=positive, default=384, help="numbers per character inside the model")
    flag("n_head", type=positive, default=4, help="attention heads per layer")
    flag("n_layer", type=positive, default=4, help="layers (blocks)")
    dropout = "share of numbers dropped in training; without it, 0 up to 10 passes over the text, 0.2 from 25 on"
    flag("dropout", type=bounded(float, 0, below=1), help=dropout)
    flag("eval_interval", type=positive, default=100, help="steps from one evaluation to the next")
    flag("eval_iters", type=positive, default=8, help="batches per evaluation and text")
    flag("patience", type=integer, default=0, help="stop after so many evaluations without a better one; 0: never")
    flag("save_interval", type=positive, default=100, help="steps from one saved state to the next")
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


def parse_args(arguments: list[str] | None = None) -> tuple[Settings, Start | None]:
    """Return the settings, and the model file that the run starts from, if any. Raises OSError and ModelFileError."""
    parser = training_parser()
    # Parse once to see where the run starts, and again with what that file has settled.
    args = parser.parse_args(arguments)
    start = None
    if args.resume:
        args, start = parse_resumed(parser, arguments, args.model)
    elif args.init_from:
        given = Vocabulary.from_file(args.vocab) if args.vocab else None
        start = Start(*load_model(args.init_from, vocabulary=given))
        shape = {name: start.model.config[name] for name in SHAPE}
        args = parse_again(parser, arguments, shape, args.init_from)
    elif args.vocab:
        parser.error("argument -vocab: goes with -init_from only; training takes the vocab.txt in -data_dir")
    check_together(parser, args)
    return work_out_defaults(parser, args), start


def parse_again(parser: ArgumentParser, arguments: list[str] | None, settled: dict, source: Path) -> Namespace:
    """Parse with the values of a file in place of the defaults. A flag that contradicts the file ends the program."""
    args = parser.parse_args(arguments, Namespace(**settled))
    for name in sorted(settled.keys() - {*MAY_CHANGE_ON_RESUME, "max_iters"}):
        given, value = getattr(args, name), settled[name]
        if given != value:
            value = "no value" if value is None else value
            parser.error(f"argument -{name}: {given} contradicts {source}, which has {value}; leave it out")
    return args


def parse_resumed(parser: ArgumentParser, arguments: list[str] | None, model: Path) -> tuple[Namespace, Start]:
    """Return the settings of the saved run, with those that the user may change, and its model and state.

    Raises OSError and ModelFileError.
    """
    source = sibling(model, ".state.pkl")
    content = read_model_file(source)
    state = content.get("training")
    check_state(state, model, source)
    # The saved flags go through the same parser as a user's: a state may come from a stranger.
    saved = vars(parser.parse_args(state["arguments"]))
    start = Start(*build_model(content, source), state)
    # Which files to write is for the user to say: "plot" is not taken from the state.
    settled = {**saved, "model": model, "plot": None, "resume": True}
    args = parse_again(parser, arguments, settled, source)
    # A shorter schedule would have had other learning rates in the steps that are done.
    if args.max_iters < saved["max_iters"]:
        parser.error(f"argument -max_iters: {source} has {saved['max_iters']}, which may only grow")
    if args.max_iters > saved["max_iters"]:
        print(f"the learning rate now follows a schedule of {args.max_iters} steps", file=sys.stderr)
    return args, start


def check_state(state: object, model: Path, source: Path) -> None:
    """Raise ModelFileError unless this is the state of the run that trains this model."""
    arguments = state.get("arguments") if isinstance(state, dict) else None
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        raise ModelFileError(f"{source}: does not hold a run to go on with")
    if state.get("version") != STATE_VERSION:
        raise ModelFileError(
            f"{source}: was saved by another version of training.py, so it can't be resumed; "
            f"-init_from {source} starts a new run from its weights"
        )
    owner = str(state.get("model"))
    if original_name(owner) != original_name(model.name):
        raise ModelFileError(f"{source}: is the state of {owner!r}, not of {model.name!r}; give it back its name")


def work_out_defaults(parser: ArgumentParser, args: Namespace) -> Settings:
    """Return the settings, with what follows from other flags or from this machine where a flag is not given."""
    device_name = args.device
    if device_name in (None, "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # a card for each process
    device = choose_device(parser, device_name)
    if args.dropout is None:
        args.dropout = default_dropout(args)
    if args.dtype is None:
        args.dtype = name_of(default_dtype(device))
    # What -resume parses again. The files to write are left out: each command names its own. So are the defaults below:
    # they follow -max_iters, which may grow, and the device.
    kept = vars(args).keys() - {"model", "resume", "plot"}
    arguments = [f"-{name}={value}" for name, value in vars(args).items() if name in kept and value is not None]
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(args)
    if args.min_lr is None:
        args.min_lr = MIN_LR_SHARES[args.optimizer] * args.learning_rate
    if args.warmup_iters is None:
        args.warmup_iters = min(150, args.max_iters // 3)
    if args.compile is None:
        args.compile = "on" if device.type == "cuda" else "off"
    resolved = {"device": device, "dtype": getattr(torch, args.dtype), "arguments": arguments}
    return Settings(**(vars(args) | resolved))


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

    Of 0, 0.1 and 0.2, the best was 0 for 5 and for 10 passes, and 0.2 for 25.
    """
    text = args.data_dir / "output_train.txt"
    size = text.stat().st_size if text.is_file() else 0  # a missing text has an error of its own later
    passes = args.max_iters * args.batch_size * args.block_size / max(1, size)
    return round(0.2 * min(1.0, max(0.0, (passes - 10) / 15)), 3)


def check_together(parser: ArgumentParser, args: Namespace) -> None:
    """End the program if flags do not fit one another."""
    pieces = WORLD_SIZE * args.grad_accum
    if args.batch_size % pieces:
        below = args.batch_size // pieces * pieces
        fitting = [str(size) for size in (below, below + pieces) if size > 0]
        parser.error(
            f"argument -batch_size: {args.batch_size} sequences can't be shared among {WORLD_SIZE} processes x "
            f"-grad_accum {args.grad_accum} evenly; {' and '.join(fitting)} can"
        )
    if args.n_embd % args.n_head:
        parser.error(f"argument -n_embd: {args.n_embd} is not a multiple of -n_head {args.n_head}")
    if args.model.name.endswith(".state.pkl"):
        parser.error(f"argument -model: {args.model} is the name of a state; name the model that it belongs to")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument -plot: {str(args.plot)!r} does not end in .png, .svg or .pdf")


# The command ---------------------------------------------------------------------------------------------------------


def check_outputs(settings: Settings) -> None:
    """Raise TrainingError before a run that could not save what it learns."""
    for flag, path in (("model", settings.model), ("plot", settings.plot)):
        if path is None:
            continue
        folder = Path(os.path.realpath(path)).parent  # of the target, if it is a link
        writable = folder.is_dir() and os.access(folder, os.W_OK)
        if not writable or (path.exists() and not path.is_file()):
            raise TrainingError(f"{path}: -{flag} must name a file in a folder that exists and can be written to")
    twin = sibling(settings.model, "" if settings.model.suffix == ".pkl" else ".pkl")
    if twin.is_file():
        raise TrainingError(f"{settings.model}: would share its state and metrics with {twin}; name another -model")
    if settings.plot and not has_matplotlib():
        print("no picture will be drawn: -plot needs matplotlib, pip install matplotlib", file=sys.stderr)


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def starting_model(settings: Settings, start: Start | None) -> tuple[GPTLanguageModel, Vocabulary]:
    """Return the model of a resumed run; or a new one, with the weights of `-init_from` where it has any."""
    if settings.resume:
        return start.model, start.vocabulary
    vocabulary = Vocabulary.from_file(settings.data_dir / "vocab.txt")
    if start:
        vocabulary = Vocabulary(start.vocabulary.characters + vocabulary.characters)
    # The new text's characters get rows of their own in the tables; the old ones keep theirs.
    shape = {name: getattr(settings, name) for name in SHAPE}
    model = GPTLanguageModel(len(vocabulary), dropout=settings.dropout, **shape)
    if start:
        copy_weights(start, model, vocabulary)
    return model, vocabulary


def copy_weights(start: Start, model: GPTLanguageModel, vocabulary: Vocabulary) -> None:
    """Copy the weights into a model of the same shape, whose vocabulary has all the old characters and perhaps more."""
    rows = [vocabulary.ids[character] for character in start.vocabulary.characters]
    weights = model.state_dict()
    for name, old_weight in start.model.state_dict().items():
        if name.startswith(("token_embedding_table", "lm_head")):  # a row for each character
            weights[name][rows] = old_weight
        else:
            weights[name].copy_(old_weight)


def run_training(settings: Settings, start: Start | None, interruption: Interruption) -> int:
    """Train as the settings say; return the exit status. Raises OSError, ModelFileError and TrainingError."""
    check_outputs(settings)
    torch.manual_seed(settings.seed)
    model, vocabulary = starting_model(settings, start)
    model.to(settings.device)
    train_text = Text(settings.data_dir / "output_train.txt", vocabulary, settings.block_size)
    val_text = Text(settings.data_dir / "output_val.txt", vocabulary, settings.block_size)
    optimizer = Optimizer(model, settings)
    run = Run(settings, model, copy.deepcopy(model), vocabulary, train_text, val_text, optimizer, Record())
    describe(run)
    if settings.resume:
        run = restore(run, start.state)
        end = "; a higher -max_iters goes on" if run.record.step >= settings.max_iters else ""
        show(f"resumed     after step {run.record.step} of {settings.max_iters}{end}")
    elif RANK == 0:
        keep_earlier_run(settings.model, settings.init_from)
    if WORLD_SIZE > 1:
        # Signals are agreed upon on the CPU, also where gradients are shared among GPUs.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if settings.device.type == "cuda" else "gloo")
    train(run, interruption)
    if WORLD_SIZE > 1:  # what follows needs no other process, so that none waits for one that has ended
        distributed.destroy_process_group()
    if interruption.signal:
        save_state(run)
        message = f"interrupted after step {run.record.step}; to go on: {resume_command(settings)}"
        print(f"training.py: {message}", file=sys.stderr)
        return 128 + interruption.signal
    if RANK == 0:
        if not settings.model.exists():  # it was deleted, and the run was at its end already
            save_model(settings.model, run.average, vocabulary)
        describe_end(run)
    return 0


def is_lost_process(error: Exception) -> bool:
    """Return whether an error means that another process of the run has ended."""
    if isinstance(error, distributed.DistBackendError):  # of NCCL
        return True
    return isinstance(error, RuntimeError) and "gloo/transport/" in str(error)


def explain(error: Exception) -> str | None:
    """Return what to tell the user of an error that can be foreseen; None for any other."""
    if isinstance(error, (TrainingError, ModelFileError)):
        return str(error)
    # An OSError without a file's name is one that nobody foresaw: whatever can be foreseen names its file.
    if isinstance(error, OSError) and error.filename is not None:
        hint = ""
        if isinstance(error, FileNotFoundError) and str(error.filename).endswith(".txt"):
            hint = "; run data_extract.py first, or name its -data_dir"
        if isinstance(error, FileNotFoundError) and str(error.filename).endswith(".state.pkl"):
            hint = "; there is no run to go on with, start one without -resume"
        return f"{error.filename}: {error.strerror}{hint}"
    if is_out_of_memory(error):
        return "not enough memory; try a higher -grad_accum or a smaller -batch_size, -n_embd or -block_size"
    if is_lost_process(error):
        return "lost another process; -resume goes on from the last saved state"
    return None


def main() -> int:
    prepare_streams("backslashreplace")  # names of files need not fit the encoding
    errors = sys.stderr
    who = "training.py:"
    if WORLD_SIZE > 1:
        who += f" process {RANK} of {WORLD_SIZE}:"
    if RANK > 0:  # the first process speaks for all
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        settings, start = parse_args()
        with Interruption() as interruption:
            return run_training(settings, start, interruption)
    except KeyboardInterrupt:  # before or after the loop, which ends in good order
        return 128 + signal.SIGINT
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if isinstance(error, OSError) and error.filename == "standard output":
            sys.stdout = None  # or Python would try to write to it once more
        print(who, message.replace("\n", r"\n"), file=errors)
        return 1


if __name__ == "__main__":
    sys.exit(main())
