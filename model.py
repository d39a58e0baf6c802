"""A GPT over characters: the model, from one attention head up to the text it writes, and its file.

Read it from the top: each class is made of those before it. Further down come what only makes it
faster, the vocabulary, the model file, and what training.py and chatbot.py share of their command
lines.

Shapes: B sequences in a batch, T time steps (characters) in a sequence, C = n_embd numbers per
character, V = vocab_size characters, H heads of D = head_size numbers each.
"""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import pickle
import re
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn, TextIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: nn.Module) -> Tensor:
    """Return a mean of the values for each query, weighted by how well their keys match it.

    Takes queries (..., T, D), keys and values (..., S, D), and `visible` (T, S): True where a query
    may look. Returns (..., T, D). Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    head_size = q.shape[-1]
    # Without the division by √D, scores would grow with the head size, and softmax would give one
    # key all the weight.
    scores = (q * head_size**-0.5) @ k.transpose(-2, -1)  # (..., T, S)
    scores = scores.masked_fill(~visible, -math.inf)  # softmax turns -inf into a weight of 0
    weights = F.softmax(scores, dim=-1)  # each query's weights add up to 1
    weights = dropout(weights)
    return weights @ v


class Head(nn.Module):
    """One head of self-attention: each time step looks for something in itself and those before it.

    `Linear` and `Dropout` do what torch's own do, only faster; they stand further down.
    """

    def __init__(self, head_size: int, n_embd: int, block_size: int, dropout: float):
        super().__init__()
        self.key = Linear(n_embd, head_size, bias=False)
        self.query = Linear(n_embd, head_size, bias=False)
        self.value = Linear(n_embd, head_size, bias=False)
        # Row t is True up to column t, so that no step sees the future. Not persistent: files do
        # without it.
        self.register_buffer(
            "tril", torch.ones(block_size, block_size, dtype=torch.bool).tril(), persistent=False
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, D)

        A model calls `MultiHeadAttention.forward` instead, which runs `attention` for all heads at
        once. The result is the same.
        """
        T = x.shape[1]
        return attention(self.query(x), self.key(x), self.value(x), self.tril[:T, :T], self.dropout)


class MultiHeadAttention(nn.Module):
    """Several heads side by side, and a projection that mixes what they found.

    Each head is free to look for something else.
    """

    def __init__(
        self, num_heads: int, head_size: int, n_embd: int, block_size: int, dropout: float
    ):
        super().__init__()
        self.heads = nn.ModuleList(
            [Head(head_size, n_embd, block_size, dropout) for _ in range(num_heads)]
        )
        self.proj = Linear(num_heads * head_size, n_embd)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)

        Equals `dropout(proj(cat([head(x) for head in heads], dim=-1)))`, with all heads in one
        multiplication. With a cache, x holds only the T new time steps. They also see the steps
        that the cache remembers: S in all.
        """
        B, T, _ = x.shape
        weight = self.joined_weight() if cache is None else cache.weight
        qkv = linear(x, weight).view(B, T, 3, len(self.heads), -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            q, k, v = cache.append(q, k, v)  # k and v are (B, H, S, D) now
        S = k.shape[2]  # without a cache, S = T
        head = self.heads[0]  # mask and dropout are the same in all heads
        visible = head.tril[S - T : S, :S]
        y = fused_attention(q, k, v, visible, head.dropout, is_causal=cache is None)
        y = y.transpose(1, 2).flatten(2)  # (B, T, H·D): the heads side by side
        return self.dropout(self.proj(y.to(x.dtype)))

    def joined_weight(self) -> Tensor:
        """Return the weights of all queries, then keys, then values, on one another: (3·H·D, C)."""
        names = ("query", "key", "value")
        return torch.cat([getattr(head, name).weight for name in names for head in self.heads])


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between: each time step works alone on what it gathered."""

    def __init__(self, n_embd: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(
            Linear(n_embd, 4 * n_embd),  # (B, T, 4C)
            nn.ReLU(),
            Linear(4 * n_embd, n_embd),  # (B, T, C)
            Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        return self.net(x)


class Block(nn.Module):
    """Communication (attention), then computation (feed-forward).

    The output of each is added to its input, and the sum is normalised. This order (post-norm) is
    that of Vaswani et al. 2017, section 3.1.
    """

    def __init__(self, n_embd: int, n_head: int, block_size: int, dropout: float):
        super().__init__()
        self.sa = MultiHeadAttention(n_head, n_embd // n_head, n_embd, block_size, dropout)
        self.ffwd = FeedForward(n_embd, dropout)
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        y = self.sa(x, cache)
        x = self.ln1(x + y)
        y = self.ffwd(x)
        return self.ln2(x + y)


class GPTLanguageModel(nn.Module):
    """A decoder-only Transformer: at each time step, a score for each character to come next.

    `config` holds the constructor's arguments. Raises ValueError for sizes below 1, for an n_embd
    that can't be shared equally among n_head heads, and unless 0 <= dropout < 1.
    """

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 384,
        n_head: int = 4,
        n_layer: int = 4,
        block_size: int = 128,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.config = {
            "vocab_size": vocab_size,
            "n_embd": n_embd,
            "n_head": n_head,
            "n_layer": n_layer,
            "block_size": block_size,
            "dropout": dropout,
        }
        sizes = (vocab_size, n_embd, n_head, n_layer, block_size)
        if min(sizes) < 1 or n_embd % n_head or not 0 <= dropout < 1:
            raise ValueError(
                "sizes must be 1 or more, n_embd a multiple of n_head, dropout at least 0 and "
                f"below 1: {self.config}"
            )
        self.block_size = block_size
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(
            *[Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)]
        )
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = Linear(n_embd, vocab_size)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Start near zero, so that the first guesses are nearly uniform: a loss of about ln V."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, index: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return logits (B, T, V) for token ids (B, T), and the loss for targets (B, T).

        Targets are the ids that follow each id; the loss is the mean cross-entropy in nats, or None
        without targets. Raises ValueError for no time steps and for more than `block_size`.
        """
        T = index.shape[1]
        if not 0 < T <= self.block_size:
            raise ValueError(f"the model takes 1 to {self.block_size} time steps, not {T}")
        x = self.embed(index, start=0)  # (B, T, C)
        x = self.blocks(x)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def embed(self, index: Tensor, start: int) -> Tensor:
        """Return what each character is plus where it stands, from position `start` on.

        Takes token ids (B, T), returns (B, T, C).
        """
        positions = torch.arange(start, start + index.shape[1], device=index.device)  # (T)
        return self.token_embedding_table(index) + self.position_embedding_table(positions)

    def next_logits(self, index: Tensor, caches: list[Cache]) -> Tensor:
        """Return logits (B, V) of the token after ids (B, T) that follow the text in the caches.

        They are those of `forward` for the whole text at its last time step.
        """
        x = self.embed(index, start=caches[0].length)
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache)
        return self.lm_head(self.ln_f(x[:, -1]))

    def generate(self, index: Tensor, max_new_tokens: int, **options) -> Tensor:
        """Append what `stream` yields with these options: ids (B, T) -> (B, T + max_new_tokens)."""
        return torch.cat([index, *self.stream(index, max_new_tokens, **options)], dim=1)

    @torch.inference_mode()
    def stream(
        self,
        index: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next token of each sequence (B, 1), `max_new_tokens` times, in eval mode.

        `temperature` divides the logits: below 1 the likely characters get likelier, 0 always takes
        the likeliest. `top_k` leaves only the k likeliest to choose from. Raises ValueError for bad
        arguments or ids.

        While the text fits into `block_size`, the result is the same as with `forward`. A cache
        can't slide, since each position has its own embedding. So a full window starts anew from
        its second half: the model always sees the latest half to whole `block_size` tokens. On
        held-out text that cost less than 0.01 nats per character.
        """
        vocab_size = self.config["vocab_size"]
        if index.shape[1] == 0 or index.min() < 0 or index.max() >= vocab_size:
            raise ValueError(f"the context must be one or more ids from 0 to {vocab_size - 1}")
        if not temperature >= 0 or (top_k is not None and not 0 < top_k <= vocab_size):
            raise ValueError(f"temperature must be 0 or more and top_k between 1 and {vocab_size}")
        # What the model sees, and what of it the caches lack.
        window = unread = index[:, -self.block_size :]
        caches = [Cache(block.sa, len(index)) for block in self.blocks]
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                new = sample(self.next_logits(unread, caches), temperature, top_k, generator)
                window = torch.cat([window, new], dim=1)
                unread = new
                if window.shape[1] > self.block_size:
                    window = unread = window[:, -max(1, self.block_size // 2) :]
                    caches = [Cache(block.sa, len(index)) for block in self.blocks]
                yield new
        finally:
            self.train(was_training)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw a token for each sequence, or take the likeliest: logits (B, V) -> ids (B, 1)."""
    if temperature < 1e-30 or top_k == 1:  # float32 can't divide by less
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    # The largest becomes 0, so that nothing overflows.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        # By their ids, not by a threshold: in bfloat16 many logits are equal to the k-th.
        values, ids = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(1, ids, values)
    probabilities = F.softmax(logits, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)


# What makes it faster and changes nothing else ----------------------------------------------------


class Cache:
    """Keys and values that one MultiHeadAttention has computed so far.

    With them, each new token costs one time step. `keys` and `values` (B, H, block_size, D) are
    filled up to `length`. `weight` is joined once here and not for every token.
    """

    def __init__(self, attention: MultiHeadAttention, batch_size: int):
        self.weight = attention.joined_weight()
        head = attention.heads[0]
        shape = (batch_size, len(attention.heads), len(head.tril), head.key.out_features)
        # On a CPU, attention of a single query is 4 times as fast in float32 as in bfloat16.
        dtype = torch.float32 if self.weight.is_cpu else self.weight.dtype
        self.keys = self.weight.new_empty(shape, dtype=dtype)
        self.values = self.weight.new_empty(shape, dtype=dtype)
        self.length = 0

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep keys and values of the next T time steps; return the queries and all S so far.

        Takes (B, H, T, D) each. Returns queries (B, H, T, D), keys and values (B, H, S, D), in the
        dtype of the cache.
        """
        start, S = self.length, self.length + k.shape[2]
        self.keys[:, :, start:S] = k
        self.values[:, :, start:S] = v
        self.length = S
        return q.to(self.keys.dtype), self.keys[:, :, :S], self.values[:, :, :S]


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: Dropout, is_causal: bool
) -> Tensor:
    """Do what `attention` spells out, as one operation of torch's where that is faster.

    That is on an NVIDIA or AMD GPU, and on a CPU in float32 if nothing is dropped: forward and
    backward took 0.9 (64 time steps) to 0.4 (1024) of the plain form's time; in bfloat16, 3.0 to
    0.8. `is_causal` says that `visible` is a lower triangle, for which there is a kernel that needs
    no mask.
    """
    p = dropout.p if dropout.training else 0.0
    if q.is_cuda or (q.is_cpu and q.dtype == torch.float32 and p == 0):
        mask = None if is_causal else visible
        return F.scaled_dot_product_attention(q, k, v, mask, p, is_causal)
    return attention(q, k, v, visible, dropout)


class Dropout(nn.Module):
    """Zero each number with probability `p` while training; scale up the rest to keep the mean.

    A network that can't rely on any single number learns more robust ones (Srivastava et al. 2014,
    "Dropout", JMLR 15).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = round((1 - self.p) * 256)  # of the 256 values of a byte
        if not x.is_cpu or not 0 < keep < 256:
            return F.dropout(x, self.p)
        # One 64-bit random number decides for eight elements, 8 bits each, so p is rounded to
        # 256ths. F.dropout draws one number per element on a single core: a training step took 760
        # ms with it, takes 634 so, and 590 without.
        words = torch.empty(math.ceil(x.numel() / 8), dtype=torch.int64).random_(-(2**63), None)
        random = words.view(torch.uint8)[: x.numel()].view(x.shape)
        return x * ((random < keep).to(x.dtype) * (256 / keep))


class Linear(nn.Linear):
    """torch's own linear layer, with a faster way for a single row."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., in_features) -> (..., out_features)

    On a CPU, torch multiplies a float32 matrix by a single row on one core. Cut into as many pieces
    as there are cores, it generates text 1.5 times as fast.
    """
    is_one_row = x.is_cpu and x.numel() == x.shape[-1] and x.dtype == torch.float32
    if not is_one_row or torch.is_grad_enabled() or len(weight) % torch.get_num_threads():
        return F.linear(x, weight, bias)
    cores = torch.get_num_threads()
    pieces = weight.view(cores, -1, x.shape[-1])  # (cores, out_features / cores, in_features)
    rows = x.reshape(1, 1, -1).expand(cores, 1, -1)  # (cores, 1, in_features)
    y = torch.bmm(rows, pieces.transpose(1, 2)).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


# Vocabulary ---------------------------------------------------------------------------------------


class ModelFileError(ValueError):
    """A model file or vocabulary can't be used; the message names it, says why and what to do."""


class Vocabulary:
    """The characters a model knows, sorted by code point; the id of each is its place there."""

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self.ids = {character: i for i, character in enumerate(self.characters)}
        self.substitute = "\ufffd" if "\ufffd" in self.ids else ""  # what others are read as

    @classmethod
    def from_file(cls, path: str | Path) -> Vocabulary:
        """Return the characters in a `vocab.txt`, its line ends included.

        Raises OSError, and ModelFileError if it holds no text.
        """
        try:
            # In text mode, since the tutorial's on Windows has \r\n.
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = ""
        if not text:
            raise ModelFileError(f"{path}: holds no UTF-8 text; run data_extract.py again")
        return cls(text)

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the characters. Raises KeyError for one that is not known."""
        return [self.ids[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        """Return the text of these token ids."""
        return "".join(self.characters[i] for i in ids)


# The model file -----------------------------------------------------------------------------------

NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # as some mounted cloud folders say


def replace(source: Path, target: Path) -> None:
    """Rename a file, over another if there is one. Raises OSError.

    Windows refuses while another program has either of them open, such as a spreadsheet or a virus
    scanner. So this tries again for three seconds.
    """
    deadline = time.monotonic() + 3
    while True:
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if time.monotonic() > deadline:
                raise PermissionError(
                    error.errno,
                    f"{error.strerror}; does another program have it open?",
                    str(target),
                ) from None
        time.sleep(0.1)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Give a new binary file that replaces `path` when the block has succeeded and all is on disk.

    Until then, what stood at `path` stays as it was. Of a symbolic link, the target is replaced.
    Raises OSError.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.tmp")  # only in the same folder a rename is atomic
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_FSYNC:
                    raise
        replace(temporary, target)
    except (OSError, RuntimeError) as error:
        # torch.save hides what the system says, of a full disk perhaps, behind a RuntimeError.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(reason.errno, reason.strerror or str(reason), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path: str | Path, model: GPTLanguageModel, vocabulary: Vocabulary, **more) -> None:
    """Save weights, constructor arguments and vocabulary: all that is needed to use the model.

    `more` is further data and tensors for `read_model_file` to return. Raises OSError.
    """
    content = {
        "config": model.config,
        "vocabulary": vocabulary.characters,
        "weights": model.state_dict(),
        **more,
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load_model(
    path: str | Path, device: torch.device | str = "cpu", vocabulary: Vocabulary | None = None
) -> tuple[GPTLanguageModel, Vocabulary]:
    """Return the model of a file in eval mode, and its vocabulary.

    If the file holds none, `vocabulary` is returned. Reads what `save_model` writes and the
    tutorial's models, from `pickle.dump` or `torch.save`: whole, or their weights, also in a
    checkpoint. No code in a file ever runs. Raises OSError and ModelFileError.
    """
    model, vocabulary, _ = read_model(path, vocabulary, "train one with training.py")
    return model.to(device).eval(), vocabulary


def read_model(
    path: str | Path, vocabulary: Vocabulary | None, advice: str
) -> tuple[GPTLanguageModel, Vocabulary, dict]:
    """Return the model, its vocabulary, and all that its file holds.

    `advice` says what to do about a file that can't be read. Raises OSError and ModelFileError.
    """
    data = Path(path).read_bytes()
    try:
        content = read_model_file(data)
        # Of a config, only the dropout counts, since the weights themselves show the shape.
        config = {**content.get("config", {}), **shape_of(content["weights"])}
        model = GPTLanguageModel(**config)
        model.load_state_dict(content["weights"])  # fails for a missing, extra or misshapen one
        if "vocabulary" in content:
            vocabulary = Vocabulary(content["vocabulary"])
    except Exception as error:  # whatever a damaged or foreign file may cause
        reason = str(error).rpartition("WeightsUnpickler error:")[2] or type(error).__name__
        reason = escape(" ".join(reason.split()))[:100]
        problem = explain(error) or f"not a model file that can be read ({reason}); {advice}"
        raise ModelFileError(f"{path}: {problem}") from error
    for name, weight in model.named_parameters():
        # Trained weights are about 1. Much larger ones overflow in the model.
        if not (weight.abs() <= 1000).all():
            raise ModelFileError(
                f"{path}: {name} is NaN or absurd in places; use a file from before that happened"
            )
    found = 0 if vocabulary is None else len(vocabulary)
    if found != config["vocab_size"]:
        raise ModelFileError(
            f"{path}: knows {config['vocab_size']} characters, but the vocabulary has {found}; "
            "name the vocab.txt that it was trained with: -vocab vocab.txt"
        )
    return model, vocabulary, content


def shape_of(weights: dict[str, Tensor]) -> dict[str, int]:
    """Return the constructor's arguments that fit the weights.

    Raises one of many exceptions for other weights.
    """
    vocab_size, n_embd = weights["token_embedding_table.weight"].shape
    head_size = len(weights["blocks.0.sa.heads.0.key.weight"])
    layers = [name for name in weights if name.endswith(".ln1.weight")]
    return {
        "vocab_size": vocab_size,
        "n_embd": n_embd,
        "n_head": n_embd // head_size,
        "n_layer": len(layers),
        "block_size": len(weights["position_embedding_table.weight"]),
    }


# Reading a model file without running it ----------------------------------------------------------
#
# A pickle may name any function to be called while it is read. Here a short list of names makes
# plain data and tensors, and every other name becomes a StandIn, which does nothing. Python's own
# look-up of names is never used, so no code from a file runs.


def read_model_file(data: bytes) -> dict:
    """Return what `save_model` has put into the file with these bytes; of other files, the weights.

    Raises one of many exceptions for files that hold anything else.
    """
    if not data.startswith(b"PK"):  # how the zip archives of torch.save begin
        content = DataUnpickler(io.BytesIO(data)).load()
    else:
        if zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:  # torch.load ignores check sums
            raise ValueError("it is damaged")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        with torch.serialization.safe_globals([(StandIn, name) for name in names]):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    is_ours = isinstance(content, dict) and "weights" in content
    return {**(content if is_ours else {}), "weights": find_weights(content)}


class StandIn:
    """Takes the place of any class or function, and keeps the attributes of a module."""

    def __init__(self, *_):
        pass

    # With these a pickle fills a list, a set or a dict. They do nothing either.
    __setitem__ = append = extend = add = __init__

    def __setstate__(self, state) -> None:
        if type(state) is dict:
            vars(self).update(state)


class DataUnpickler(pickle.Unpickler):
    """Read data, tensors and the attributes of modules from a file of `pickle.dump`."""

    def find_class(self, module: str, name: str):
        """Return what the pickle may call by this name."""
        # Functions are made anew for each name: a pickle can set attributes of what it is given.
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch.storage._load_from_bytes": lambda data: torch.load(
                io.BytesIO(data), map_location="cpu", weights_only=True
            ),
            "torch._utils._rebuild_tensor_v2": lambda *arguments: torch._utils._rebuild_tensor_v2(
                *arguments
            ),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes in protocols 0 to 2
        }
        return known.get(f"{module}.{name}", StandIn)


def find_weights(content) -> dict[str, Tensor]:
    """Return the weights in what a file holds, by their names in a GPTLanguageModel.

    Raises one of many exceptions for other content.
    """
    for name in ("weights", "model", "model_state_dict", "state_dict"):  # as in a checkpoint
        if isinstance(content, dict):
            content = content.get(name, content)
    if isinstance(content, StandIn):
        content = module_weights(content)
    # torch.compile and DistributedDataParallel wrap a module in another, whose name is then part of
    # the names. The tutorial saves its masks with the weights.
    weights = {
        re.sub(r"\b(_orig_mod|module)\.", "", str(name)): weight
        for name, weight in content.items()
        if not str(name).endswith(".tril")
    }
    if "token_embedding_table.weight" not in weights:
        raise ValueError("it holds no weights of a GPTLanguageModel")
    return weights


def module_weights(module: StandIn, prefix: str = "") -> dict[str, Tensor]:
    """Return the weights of a whole module by their names.

    Raises one of many exceptions for anything else.
    """
    parameters = vars(module).get("_parameters", {})
    weights = {prefix + name: weight for name, weight in parameters.items() if weight is not None}
    for name, child in vars(module).get("_modules", {}).items():
        weights |= module_weights(child, f"{prefix}{name}.")
    return weights


# What training.py and chatbot.py share of their command lines -------------------------------------


class Parser(argparse.ArgumentParser):
    """Takes flags with one dash or two, as in `-seed 1`, and names each default in the help.

    `flags` has a row for each: its name, its type, its default and its help. The type is a function
    of a text, or other options for argparse, such as choices.
    """

    def __init__(self, description: str, flags: list[tuple]):
        super().__init__(
            description=description,
            usage=argparse.SUPPRESS,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # what is not there is not `given`
        )
        # Without this, -help would be -h with the value "elp".
        self.add_argument("-help", action="help", help=argparse.SUPPRESS)
        self.defaults = {name: default for name, _, default, _ in flags}
        for name, kind, default, help in flags:
            if default not in (None, ""):
                help += f" (default: {default})"
            if not isinstance(kind, dict):
                kind = {"type": kind, "metavar": kind.__name__.upper()}  # "-seed INT"
            self.add_argument(f"-{name}", help=help, **kind)

    def error(self, message: str) -> NoReturn:
        super().error(escape(message))

    def parse(self, arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict]:
        """Return all flags, and by name those that stand on the command line."""
        arguments = sys.argv[1:] if arguments is None else arguments
        # Only whole flags lose a dash: a prompt may begin with two.
        arguments = [re.sub(r"^--(?=\w+(=|$))", "-", argument) for argument in arguments]
        given = vars(self.parse_args(arguments))
        return argparse.Namespace(**{**self.defaults, **given}), given

    def error_if(self, is_wrong: bool, message: str) -> None:
        """End the program with this message about a flag if it is wrong."""
        if is_wrong:
            self.error(message)


def bounded(kind: type, least: float, below: float = 2**31) -> Callable:
    """Return a type for argparse: an int or a float of at least `least` and below `below`."""

    def parse(text: str):
        value = kind(text)
        if not least <= value < below:  # NaN is neither
            raise argparse.ArgumentTypeError(f"{text} is not at least {least} and below {below}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def device(name: str) -> torch.device:
    """Return the device of this name, with its number, as cuda:0; a type for argparse."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} can't be used here: {reason}") from None


def prepare_streams() -> None:
    """Make the standard streams safe to use, whatever started the program.

    A missing one (under pythonw, or closed as by `2>&-`) becomes an empty file. Characters outside
    the encoding of the terminal are replaced.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # those of IDLE and Jupyter lack it
            stream.reconfigure(errors="replace")


def escape(text: str) -> str:
    """Return the text with control characters other than line end and tab as `ascii` writes them.

    A terminal obeys them: in the name of a file or in what a model writes, they could write to the
    clipboard.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def show(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a text at once, escaped on a terminal, to standard output or to another stream.

    Raises OSError.
    """
    stream = stream or sys.stdout
    try:
        print(escape(text) if stream.isatty() else text, end=end, file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout:  # or Python would try to write the rest once more at its end
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        raise OSError(error.errno, error.strerror, "standard output") from error


def explain(error: Exception) -> str | None:
    """Return what to tell the user of an error that can be foreseen.

    Returns None for any other, which keeps its traceback.
    """
    if isinstance(error, ModelFileError):
        return str(error)
    if isinstance(error, OSError) and error.filename:  # whatever can be foreseen names its file
        return f"{error.filename}: {error.strerror}"
    # The word "memory" alone proves nothing: "an illegal memory access was encountered" is a bug.
    is_full = isinstance(error, RuntimeError) and re.search(
        "DefaultCPUAllocator|out of memory|Storage size calculation overflowed", str(error)
    )
    return "not enough memory" if is_full or isinstance(error, MemoryError) else None
