"""A GPT over characters: the model, from one attention head up to the text that it writes, and its file.

Read it from the top: each class is made of those before it. Further down come what only makes it faster, the
vocabulary, the model file, and what training.py and chatbot.py share of their command lines.

Shapes: B sequences in a batch, T time steps (characters) in a sequence, C = n_embd numbers per character,
V = vocab_size characters, H heads of D = head_size numbers each.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn
from torch.nn import functional as F

# Every head keeps a mask of block_size² bytes: 64 MiB at this size, 1 GiB in the 16 heads of the default model.
MAX_BLOCK_SIZE = 2**13
REPLACEMENT = "\ufffd"  # stands for characters that are rare or invalid in the training text
MAX_WEIGHT = 1000.0  # larger weights may overflow inside the model; trained weights are about 1


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, dropout: nn.Module
) -> torch.Tensor:
    """Return a mean of the values for each query, weighted by how well their keys match it.

    Queries (..., T, D), keys and values (..., S, D); `visible` (T, S) is True where a query may look -> (..., T, D).
    Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    head_size = q.shape[-1]
    # Without the division by √D, scores would grow with the head size, and softmax would give one key all the weight.
    scores = (q * head_size**-0.5) @ k.transpose(-2, -1)  # (..., T, S)
    scores = scores.masked_fill(~visible, -math.inf)  # which softmax turns into a weight of 0
    weights = F.softmax(scores, dim=-1)  # each query's weights add up to 1
    weights = dropout(weights)
    return weights @ v


class Head(nn.Module):
    """One head of self-attention: every time step gathers what it looks for from itself and the steps before it."""

    def __init__(self, head_size: int, n_embd: int, block_size: int, dropout: float):
        super().__init__()
        self.key = Linear(n_embd, head_size, bias=False)
        self.query = Linear(n_embd, head_size, bias=False)
        self.value = Linear(n_embd, head_size, bias=False)
        # Row t is True up to column t: no step sees the future. Not persistent, since a file does not need it.
        tril = torch.ones(block_size, block_size, dtype=torch.bool).tril()
        self.register_buffer("tril", tril, persistent=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, D)"""
        T = x.shape[1]
        return attention(self.query(x), self.key(x), self.value(x), self.tril[:T, :T], self.dropout)


class MultiHeadAttention(nn.Module):
    """Several heads side by side, each free to look for something else, and a projection that mixes what they found."""

    def __init__(self, num_heads: int, head_size: int, n_embd: int, block_size: int, dropout: float):
        super().__init__()
        self.heads = nn.ModuleList(Head(head_size, n_embd, block_size, dropout) for _ in range(num_heads))
        self.proj = Linear(num_heads * head_size, n_embd)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)

        Equals `dropout(proj(cat([head(x) for head in heads], dim=-1)))`, with all heads in one multiplication.
        With a cache, x holds only the new time steps, and they also see those that the cache remembers.
        """
        B, T, _ = x.shape
        H = len(self.heads)
        head = self.heads[0]  # mask and dropout are the same in all heads

        weight = self.joined_weight() if cache is None else cache.weight
        qkv = linear(x, weight).view(B, T, 3, H, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        if cache is None:
            q, k, v = qkv
            visible = head.tril[:T, :T]
        else:
            q, k, v, visible = cache.append(qkv)  # keys and values of all S time steps now: (B, H, S, D)

        attend = fused_attention if fused_is_faster(q, head.dropout) else attention
        y = attend(q, k, v, visible, head.dropout)  # (B, H, T, D)

        y = y.transpose(1, 2).flatten(2)  # (B, T, H·D): the heads side by side
        return self.dropout(self.proj(y.to(x.dtype)))

    def joined_weight(self) -> torch.Tensor:
        """Return the weights of all heads' queries, then keys, then values, one below the other: (3·H·D, C)."""
        queries = [head.query.weight for head in self.heads]
        keys = [head.key.weight for head in self.heads]
        values = [head.value.weight for head in self.heads]
        return torch.cat(queries + keys + values)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between: each time step works on what attention brought it, on its own."""

    def __init__(self, n_embd: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(
            Linear(n_embd, 4 * n_embd),  # (B, T, 4C)
            nn.ReLU(),
            Linear(4 * n_embd, n_embd),  # (B, T, C)
            Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        return self.net(x)


class Block(nn.Module):
    """Communication (attention), then computation (feed-forward), each added to its input and normalised after.

    The order "add, then normalise" (post-norm) is that of Vaswani et al. 2017, section 3.1.
    """

    def __init__(self, n_embd: int, n_head: int, block_size: int, dropout: float):
        super().__init__()
        self.sa = MultiHeadAttention(n_head, n_embd // n_head, n_embd, block_size, dropout)
        self.ffwd = FeedForward(n_embd, dropout)
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        y = self.sa(x, cache)
        x = self.ln1(x + y)
        y = self.ffwd(x)
        return self.ln2(x + y)


class GPTLanguageModel(nn.Module):
    """A decoder-only Transformer: for every time step, a score for each character of the vocabulary to come next.

    `config` holds the constructor's arguments. Raises ValueError for sizes below 1, a block_size above MAX_BLOCK_SIZE
    and an n_embd that n_head does not divide.
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
        sizes = {
            "vocab_size": vocab_size,
            "n_embd": n_embd,
            "n_head": n_head,
            "n_layer": n_layer,
            "block_size": block_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if block_size > MAX_BLOCK_SIZE:
            raise ValueError(f"block_size must be at most {MAX_BLOCK_SIZE}, not {block_size}: masks would fill memory")
        if n_embd % n_head:
            raise ValueError(f"n_embd ({n_embd}) must be a multiple of n_head ({n_head}), the heads share it")
        self.config = {**sizes, "dropout": dropout}
        self.block_size = block_size
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*[Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = Linear(n_embd, vocab_size)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """Start near zero, so that the first predictions are nearly uniform: a loss of about ln V."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self, index: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids (B, T) and those that follow each of them (B, T) -> logits (B, T, V), mean cross-entropy in nats.

        Without targets the loss is None. Raises ValueError if there are no time steps or more than `block_size`.
        """
        T = index.shape[1]
        if not 0 < T <= self.block_size:
            raise ValueError(f"the model takes 1 to {self.block_size} time steps, not {T}")
        positions = torch.arange(T, device=index.device)
        x = self.token_embedding_table(index) + self.position_embedding_table(positions)  # (B, T, C) + (T, C)
        x = self.blocks(x)  # (B, T, C)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def prefill(self, index: torch.Tensor, caches: list[Cache]) -> torch.Tensor:
        """Read the beginning of a text, ids (B, T), and forget an earlier one -> logits (B, V) of the next token."""
        for cache in caches:
            cache.length.zero_()
        return self._read(index, caches)

    def decode(self, token: torch.Tensor, caches: list[Cache]) -> torch.Tensor:
        """Read one more token (B, 1) of the text in the caches -> logits (B, V) of the next token."""
        return self._read(token, caches)

    def _read(self, index: torch.Tensor, caches: list[Cache]) -> torch.Tensor:
        """Do what `forward` does for ids (B, T) that follow those in the caches -> logits (B, V) of the last one."""
        positions = caches[0].next_positions(index.shape[1])
        x = self.token_embedding_table(index) + self.position_embedding_table(positions)
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache)
        return self.lm_head(self.ln_f(x))[:, -1]

    def new_caches(self, batch_size: int) -> list[Cache]:
        """Return empty caches, one for each block."""
        return [Cache(block.sa, batch_size) for block in self.blocks]

    def generate(self, index: torch.Tensor, max_new_tokens: int, **options) -> torch.Tensor:
        """Append what `stream` yields with these options: token ids (B, T) -> (B, T + max_new_tokens)."""
        return torch.cat([index, *self.stream(index, max_new_tokens, **options)], dim=1)

    def stream(
        self,
        index: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        banned_ids: Sequence[int] = (),
        caches: list[Cache] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the next token of each sequence (B, 1), `max_new_tokens` times, while the model is in eval mode.

        `temperature` divides the logits: below 1 the likely characters get likelier, 0 always takes the likeliest.
        `top_k` leaves only the k likeliest to choose from; `banned_ids` are never chosen. `caches` are those of an
        earlier call, to be used again. Raises ValueError for bad arguments or ids.

        While the text fits into `block_size`, the result is the same as with `forward`. A cache can't slide, since each
        position has its own embedding. So a full window starts anew from its second half: the model always sees the
        latest half to whole `block_size` tokens. On held-out text that cost less than 0.01 nats per character.
        """
        vocab_size = self.config["vocab_size"]
        if index.shape[1] == 0 or index.min() < 0 or index.max() >= vocab_size:
            raise ValueError(f"the context must be one or more token ids from 0 to {vocab_size - 1}")
        if not temperature >= 0 or (top_k is not None and not 0 < top_k <= vocab_size):
            raise ValueError(f"temperature must be 0 or more and top_k between 1 and {vocab_size}")
        if not set(banned_ids) < set(range(vocab_size)):
            raise ValueError(f"banned_ids must be some token ids from 0 to {vocab_size - 1}, not all")
        banned = torch.tensor(banned_ids, dtype=torch.long, device=index.device)
        caches = caches or self.new_caches(len(index))
        window = index[:, -self.block_size :]  # what the model sees
        new = None
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                with torch.inference_mode():  # 1.05 times as fast as no_grad
                    if new is None:
                        logits = self.prefill(window, caches)
                    elif window.shape[1] <= self.block_size:
                        logits = self.decode(new, caches)
                    else:
                        window = window[:, -max(1, self.block_size // 2) :]
                        logits = self.prefill(window, caches)
                    logits = logits.index_fill(1, banned, -math.inf)
                    new = sample(logits, temperature, top_k, generator)
                new = new.clone()  # an ordinary tensor, which may be trained on
                window = torch.cat([window, new], dim=1)
                yield new
        finally:
            self.train(was_training)


def sample(
    logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> torch.Tensor:
    """Draw a token for each sequence, or take the likeliest: logits (B, V) -> ids (B, 1)."""
    if temperature < 1e-30 or top_k == 1:  # float32 can't divide by less
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0, so that nothing overflows
    if top_k is not None:
        # By their ids, not by a threshold: in bfloat16 many logits are equal to the k-th.
        values, ids = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(1, ids, values)
    probabilities = F.softmax(logits, dim=-1)
    # Divided by exponentially distributed noise, each token is the largest as often as its probability says. This is
    # torch.multinomial without its checks, for which Python would have to wait for the GPU.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(dim=-1, keepdim=True)


# What makes it faster and changes nothing else -----------------------------------------------------------------------


class Cache(nn.Module):
    """What one MultiHeadAttention remembers while text is generated, so that each new token costs one time step.

    Holds keys and values (2, B, H, block_size, D), zeros until they are filled, and how many time steps are filled.
    Its tensors are buffers, changed in place: a GPU that replays a recorded step looks for them at the same addresses.
    """

    def __init__(self, attention: MultiHeadAttention, batch_size: int):
        super().__init__()
        weight = attention.joined_weight().detach()  # joined once here and not for every token
        # On a GPU the work is the same for every token, whatever the length, so that it can be recorded and replayed.
        # A CPU is faster if it reads only the filled part, and in float32, 4 times as fast for a single query.
        self.static = weight.is_cuda
        dtype = weight.dtype if self.static else torch.float32
        head = attention.heads[0]
        shape = (2, batch_size, len(attention.heads), len(head.tril), head.key.out_features)
        self.register_buffer("weight", weight)
        self.register_buffer("kv", weight.new_zeros(shape, dtype=dtype))
        self.register_buffer("length", weight.new_zeros((), dtype=torch.long))

    def next_positions(self, count: int) -> torch.Tensor:
        """Return the positions (count,) of the time steps that follow those in the cache."""
        return self.length + torch.arange(count, device=self.length.device)

    def append(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keep keys and values of the next time steps, which come after the queries in (3, B, H, T, D).

        Returns queries, keys and values in the dtype of the cache, keys and values of all S time steps so far, and
        which of those each query sees (T, S). If `static`, S is block_size, and no query sees the empty rest.
        """
        T = qkv.shape[3]
        positions = self.next_positions(T)
        qkv = qkv.to(self.kv.dtype)
        self.kv.index_copy_(3, positions, qkv[1:])
        self.length.add_(T)
        S = self.kv.shape[3] if self.static else int(self.length)
        visible = torch.arange(S, device=positions.device) <= positions[:, None]
        k, v = self.kv[:, :, :, :S]
        return qkv[0], k, v, visible


def fused_is_faster(q: torch.Tensor, dropout: Dropout) -> bool:
    """Return whether to prefer the fused operation: always on a GPU, on a CPU in float32 if nothing is dropped.

    There, forward and backward took 0.9 (64 time steps) to 0.4 (1024) of the plain form's time; in bfloat16, 3.0 to
    0.8.
    """
    drops = dropout.training and dropout.p > 0
    return q.is_cuda or (q.is_cpu and q.dtype == torch.float32 and not drops)


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, dropout: Dropout
) -> torch.Tensor:
    """Do what `attention` spells out, as one operation of torch's."""
    p = dropout.p if dropout.training else 0.0
    T, S = visible.shape
    if T == S:  # all time steps at once, for which there is a kernel that needs no mask
        return F.scaled_dot_product_attention(q, k, v, None, p, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, visible, p)


class Dropout(nn.Module):
    """Zero each number with probability `p` while training and scale up the rest, so that the mean stays.

    A network that can't rely on any single number learns more robust ones (Srivastava et al. 2014, "Dropout", JMLR 15).
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {p}")
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        # One 64-bit random number decides for eight elements, 8 bits each, so p is rounded to 256ths. F.dropout draws
        # one number per element on a single core: a training step took 760 ms with it, takes 634 so, and 590 without.
        keep = max(1, round((1 - self.p) * 256))  # of the 256 values of a byte
        words = torch.empty(math.ceil(x.numel() / 8), dtype=torch.int64).random_(-(2**63), None)
        random = words.view(torch.uint8)[: x.numel()].view(x.shape)
        kept = random <= keep - 1  # "< keep" would fail for 256, which is no byte
        return x * (kept.to(x.dtype) * (256 / keep))


class Linear(nn.Linear):
    """torch's own linear layer, with a faster way for a single row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias: (..., in_features) -> (..., out_features)

    On a CPU, torch multiplies a float32 matrix by a single row on one core. Cut into as many pieces as there are cores,
    it generates text 1.5 times as fast.
    """
    one_row = x.device.type == "cpu" and x.numel() == x.shape[-1] and x.dtype == torch.float32
    if not one_row or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    cores = torch.get_num_threads()
    if len(weight) % cores:
        return F.linear(x, weight, bias)
    pieces = weight.view(cores, -1, x.shape[-1]).transpose(1, 2)  # (cores, in_features, out_features / cores)
    y = torch.bmm(x.reshape(1, 1, -1).expand(cores, 1, -1), pieces).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


# Vocabulary ----------------------------------------------------------------------------------------------------------


class ModelFileError(ValueError):
    """A model file or vocabulary can't be used; the message names it, says why and what to do."""


class Vocabulary:
    """The characters a model knows, sorted by code point; a character's token id is its place among them.

    `banned_ids` holds the id of U+FFFD, if that is one of them: it stands for rare or invalid characters, is read, but
    never to be written.
    """

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self.ids = {character: i for i, character in enumerate(self.characters)}
        self.banned_ids = [self.ids[REPLACEMENT]] if REPLACEMENT in self.ids else []

    @classmethod
    def from_file(cls, path: str | Path) -> Vocabulary:
        """Read a `vocab.txt`: each character followed by a line end, or any text. Raises OSError and ModelFileError."""
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFileError(f"{path}: not UTF-8 text; run data_extract.py again") from None
        if not text:
            raise ModelFileError(f"{path}: holds no characters; run data_extract.py again")
        if not re.search(r"(?<!\r)\n", text):  # every line ends with \r\n: written in Python's text mode on Windows
            text = text.replace("\r\n", "\n")
        characters, line_ends = text[::2], text[1::2]
        if len(characters) == len(line_ends) and set(line_ends) == {"\n"}:
            return cls(characters)
        return cls(text)  # of another shape, made by hand

    def as_in_the_tutorial(self) -> Vocabulary:
        """Return the characters that the tutorial finds in the same file, which it reads whole in text mode.

        It takes the line ends for a character of the text, and text mode turns a carriage return into a line end.
        """
        return Vocabulary(self.characters.replace("\r", "\n") + "\n")

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the characters. Raises ValueError, naming it, for one not in the vocabulary."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            raise ValueError(f"the character {error.args[0]!r} is not in the vocabulary") from None

    def decode(self, ids: list[int]) -> str:
        """Return the text of these token ids."""
        return "".join(self.characters[i] for i in ids)


# The model file ------------------------------------------------------------------------------------------------------


@contextmanager
def name_file_in_errors(name: str | Path) -> Iterator[None]:
    """Within it, every OSError names this file. Python names none when a disk is full or a pipe is closed."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(name)) from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Give a new binary file that replaces `path` when the block has succeeded and all of it is on the disk.

    Until then, what stood at `path` stays as it was. If it is a symbolic link, its target is replaced. Raises OSError.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    temporary = Path(f"{target}.tmp")  # in the same folder, since only there a rename is atomic
    try:
        with name_file_in_errors(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path: str | Path, model: GPTLanguageModel, vocabulary: Vocabulary, **more) -> None:
    """Save weights, constructor arguments and vocabulary, all that is needed to use the model. Raises OSError.

    `more` is further data and tensors for `read_model_file` to return.
    """
    content = {"config": model.config, "vocabulary": vocabulary.characters, "weights": model.state_dict(), **more}
    with atomic_write(path) as file:
        torch.save(content, file)


def load_model(
    path: str | Path, device: torch.device | str = "cpu", vocabulary: Vocabulary | None = None
) -> tuple[GPTLanguageModel, Vocabulary]:
    """Return the model of a file in eval mode, and its vocabulary, or the given one for a file that has none.

    Reads what `save_model` writes and the tutorial's models, from `pickle.dump` or `torch.save`: whole, or their
    weights, also in a checkpoint. No code in a file ever runs. Raises OSError and ModelFileError.
    """
    model, vocabulary = build_model(read_model_file(path), path, vocabulary)
    return model.to(device), vocabulary


def build_model(
    content: dict, path: str | Path, vocabulary: Vocabulary | None = None
) -> tuple[GPTLanguageModel, Vocabulary]:
    """Make the model, in eval mode, and the vocabulary of what `read_model_file` returned. Raises ModelFileError."""
    weights = content["weights"]
    try:
        shape = shape_of(weights)
        config = {**content.get("config", {}), **shape}
        if config != content.get("config", shape):
            raise ValueError("the shape is not that of the weights")
        model = GPTLanguageModel(**config)
        model.load_state_dict(weights, assign=True)
        if "vocabulary" in content:
            characters = content["vocabulary"]
            if type(characters) is not str or len(set(characters)) != shape["vocab_size"]:
                raise ValueError("the vocabulary is not that of the weights")
            vocabulary = Vocabulary(characters)
    except Exception as error:  # parts that are missing, of the wrong type or of the wrong shape
        if is_out_of_memory(error):
            raise
        reason = f" ({error})" if isinstance(error, ValueError) else ""  # the others speak to programmers
        raise ModelFileError(
            f"{path}: not a GPTLanguageModel: weights, shape and vocabulary do not fit{reason}; "
            "train one with training.py"
        ) from error
    for name, weight in weights.items():
        if not (weight.abs() <= MAX_WEIGHT).all():
            raise ModelFileError(f"{path}: {name} is NaN or absurd in places; use a file from before that happened")
    if vocabulary is None:
        raise ModelFileError(f"{path}: holds no vocabulary; name the vocab.txt it was trained with: -vocab vocab.txt")
    if "vocabulary" not in content and len(vocabulary.as_in_the_tutorial()) == shape["vocab_size"]:
        vocabulary = vocabulary.as_in_the_tutorial()
    if len(vocabulary) != shape["vocab_size"]:
        raise ModelFileError(
            f"{path}: knows {shape['vocab_size']} characters, the given vocabulary has {len(vocabulary)}; "
            "name the vocab.txt it was trained with: -vocab vocab.txt"
        )
    return model.eval(), vocabulary


def shape_of(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the constructor's arguments that fit the weights. Raises one of many exceptions for other weights."""
    vocab_size, n_embd = weights["token_embedding_table.weight"].shape
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    heads = {name.split(".")[4] for name in weights if name.startswith("blocks.0.sa.heads.")}
    if len(weights) != 6 + len(layers) * (10 + 3 * len(heads)):
        raise ValueError("weights are missing or left over")
    return {
        "vocab_size": vocab_size,
        "n_embd": n_embd,
        "n_head": len(heads),
        "n_layer": len(layers),
        "block_size": len(weights["position_embedding_table.weight"]),
    }


# Reading a model file without running it -----------------------------------------------------------------------------
#
# A pickle may name any function to be called while it is read. So each name in a file is either in a short list of
# functions that make plain data, or replaced by a StandIn that does nothing, or refused. Python's own look-up of names
# is never used, and no code from a file runs.

# Classes of models, in modules of any name; the tutorial spells one of them FeedFoward
MODEL_CLASSES = (
    *("Head", "MultiHeadAttention", "FeedForward", "FeedFoward", "Block", "GPTLanguageModel"),
    *("Linear", "Dropout"),
)
HARMLESS = ("torch.", "numpy.", "argparse.Namespace", "pathlib.")  # what models and checkpoints hold beside weights
WEIGHT_KEYS = ("weights", "model", "model_state_dict", "state_dict")  # where checkpoints hold the weights
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the beginning of what torch.save wrote before version 1.6


class UnreadableError(ValueError):
    """A file is no model file; the message says why and what to do."""


class StandIn:
    """Takes the place of any class or function, keeps the attributes of a module, and does nothing else."""

    def __init__(self, *_):
        self.attributes = {}

    def __setstate__(self, state) -> None:
        self.attributes = state if type(state) is dict else {}


def read_model_file(path: str | Path) -> dict:
    """Return what `save_model` has put into a file; of other files, the weights. Raises OSError and ModelFileError."""
    with name_file_in_errors(path):
        data = Path(path).read_bytes()
    try:
        content = unpickle(data)
        weights = find_weights(content, len(data))
    except UnreadableError as error:
        raise ModelFileError(f"{path}: not a model file: {error}") from error
    except Exception as error:  # whatever a damaged or foreign file may cause
        if is_out_of_memory(error):
            raise
        raise ModelFileError(f"{path}: {unreadable_because(data)}") from error
    ours = type(content) is dict and "weights" in content
    return {**(content if ours else {}), "weights": weights}


def unreadable_because(data: bytes) -> str:
    """Return what is wrong with a file that can't be read, judged by its bytes, and what to do."""
    if not data:
        return "not a model file: it is empty; copy or download it again, or train one with training.py"
    if data[8:10] == b'{"':
        return "not a model file but one of safetensors, which is not read; train one with training.py"
    if zipfile.is_zipfile(io.BytesIO(data)):
        return "not a model file, or one that is damaged, or not in the default format of torch.save; save it again"
    if data.startswith((b"PK", b"\x80")):  # the beginning of an archive or a pickle
        return "not a model file, or one that is cut short or damaged; copy or download it again"
    return "not a model file; train one with training.py"


def unpickle(data: bytes):
    """Return the content of a file of `torch.save` or `pickle.dump`. Raises one of many exceptions for other files."""
    if data.startswith(OLD_FORMAT):
        return load_with_torch(data)
    if not data.startswith(b"PK"):
        try:
            return DataUnpickler(io.BytesIO(data)).load()
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                # A damaged pickle may ask for any amount. A good one takes less than this, which fails for the same
                # reason if memory is really too small.
                bytearray(4 * len(data))
            raise ValueError("a pickle that can't be read") from error
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        # torch.save never compresses, and a compressed member could unpack to a thousand times its size.
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("members that take more memory than the file")
        if archive.testzip() is not None:  # torch.load ignores the check sums
            raise ValueError("a member is damaged")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    with torch.serialization.safe_globals([(stand_in(name), name) for name in sorted(names)]):
        return load_with_torch(data)


def load_with_torch(data: bytes):
    """Read what `torch.save` wrote with PyTorch's weights-only unpickler, which calls only a list of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickle protocols; what can't be read is an error anyway
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def stand_in(name: str) -> type[StandIn]:
    """Return what a class or function of this full name becomes. Raises UnreadableError if no model needs it."""
    if name.rpartition(".")[2] in MODEL_CLASSES or name.startswith(HARMLESS):
        return StandIn
    raise UnreadableError(f"it asks for {name[:80]!a}, which no GPTLanguageModel needs; train one with training.py")


class DataUnpickler(pickle.Unpickler):
    """Read data, tensors and the attributes of modules from a file of `pickle.dump`."""

    def find_class(self, module: str, name: str):
        """Return what the pickle may call by this name. Raises UnreadableError if that is nothing."""
        name = f"{module}.{name}"
        # Functions are made anew for each name, since a pickle can set attributes of what it is given.
        known = {
            # A storage is a whole file of torch.save, in its old format.
            "torch.storage._load_from_bytes": lambda data: load_with_torch(data),
            "torch._utils._rebuild_tensor_v2": lambda *arguments: rebuild_tensor(*arguments),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            # In protocols 0 to 2:
            "__builtin__.set": set,
            "__builtin__.object": object,
            "copy_reg._reconstructor": lambda *_: StandIn(),
            "_codecs.encode": lambda text, _: text.encode("latin1"),
        }
        return known[name] if name in known else stand_in(name)


def rebuild_tensor(storage: torch.TypedStorage, start: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
    """Return the tensor of this shape in a storage; as_strided refuses what would lie outside."""
    return torch.empty(0, dtype=storage.dtype).set_(storage).as_strided(size, stride, start)


def find_weights(content, size: int) -> dict[str, torch.Tensor]:
    """Return the weights in what a file of `size` bytes holds, by their names in a GPTLanguageModel.

    They are in float32 and share no memory. Raises UnreadableError if there are no such weights.
    """
    if isinstance(content, dict):
        content = next((content[key] for key in WEIGHT_KEYS if key in content), content)
    if isinstance(content, StandIn):
        content = module_weights(content)
    named = dict(content) if isinstance(content, dict) else {}
    weights = {}
    for name, weight in named.items():
        # torch.compile and DistributedDataParallel wrap a module in another, whose name is then part of the names.
        parts = [part for part in str(name).split(".") if part not in ("_orig_mod", "module")]
        if parts[-1:] != ["tril"]:  # the tutorial saves its masks with the weights
            weights[".".join(parts)] = weight
    if "token_embedding_table.weight" not in weights:
        others = f" but {next(iter(weights))[:80]!a}" if weights else ""
        raise UnreadableError(f"it holds no weights of a GPTLanguageModel{others}; train one with training.py")
    total = 0
    for name, weight in weights.items():
        if not (isinstance(weight, torch.Tensor) and weight.layout == torch.strided and weight.is_floating_point()):
            raise UnreadableError(f"{name[:80]!a} in it is no weight; train one with training.py")
        total += weight.numel() * weight.element_size()
        if total > size:  # one number can stand for 2^40 of them
            raise UnreadableError("it holds more numbers than it has room for; train one with training.py")
        weights[name] = torch.empty(weight.shape).copy_(weight.detach())
    return weights


def module_weights(module: StandIn, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the weights of a whole module by their names. Raises one of many exceptions for anything else."""
    parameters = module.attributes.get("_parameters", {})
    weights = {prefix + name: weight for name, weight in parameters.items() if weight is not None}
    for name, child in module.attributes.get("_modules", {}).items():
        weights |= module_weights(child, f"{prefix}{name}.")
    return weights


# What training.py and chatbot.py share of their command lines --------------------------------------------------------

METAVARS = {"int": "N", "float": "X", "Path": "FILE"}


def make_parser(description: str) -> tuple[argparse.ArgumentParser, Callable[..., None]]:
    """Return a parser, and a function that adds a flag to it: `flag("batch_size", type=int, default=32, help="…")`."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=description)
    parser.add_argument("-help", action="help", help=argparse.SUPPRESS)  # else argparse takes it for -h and "elp"

    def flag(name: str, help: str, **options) -> None:
        takes_value = "action" not in options
        if takes_value and "choices" not in options:
            kind = options["type"].__name__ if "type" in options else "str"
            metavar = "FOLDER" if name.endswith("_dir") else METAVARS.get(kind, "TEXT")
            options.setdefault("metavar", metavar)
        if takes_value and options.get("default") is not None:
            help += " (default: %(default)s)"
        parser.add_argument(f"-{name}", help=help, **options)
        # Two dashes work too, but would only double the length of the help.
        hidden = {**options, "dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(f"--{name}", **hidden)

    return parser, flag


def bounded(kind: type, least: float, below: float | None = None) -> Callable:
    """Return a type for argparse: an int or a finite float of at least `least`, and below `below`."""
    limit = below or (2**31 if kind is int else math.inf)

    def parse(text: str):
        value = kind(text)
        if not value >= least:  # so that NaN is refused too
            raise argparse.ArgumentTypeError(f"{text} is not {least} or more")
        if not value < limit:
            raise argparse.ArgumentTypeError(f"{text} is not below {limit}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def choose_device(parser: argparse.ArgumentParser, name: str | None) -> torch.device:
    """Return the device of this name; without one, CUDA if it is there, else the CPU.

    Ends the program with a usage error if there is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails for devices that only have shapes, such as "meta"
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = f"the memory of {name!r} is full" if is_out_of_memory(error) else f"there is no device {name!r} here"
        parser.error(f"argument -device: {reason}")
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    return probe.device  # with its number, as cuda:0


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that the device multiplies fastest."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    # A CPU without units for bfloat16 is many times slower with it than with float32.
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and has_units else torch.float32


def prepare_streams(encoding_errors: str) -> None:
    """Let the standard streams handle characters outside their encoding in this way, as "replace" does.

    Streams that the program was started without (`<&-`, `>&-`) lead nowhere from now on. Those of IDLE and Jupyter,
    which are no files, stay as they are, and so does the encoding, which is the terminal's.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=encoding_errors)


def first_line(error: Exception) -> str:
    """Return what an error says, without the pages that torch.compile may add to it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",  # torch on Linux and macOS
    "DefaultCPUAllocator: not enough memory: you tried to allocate",  # torch on Windows
    "Storage size calculation overflowed",  # torch, for sizes beyond 64 bits
    "Maximum allowed dimension exceeded",  # NumPy
    "array is too big",  # NumPy
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "Invalid buffer size",  # MPS
)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory was too small, by its type or else by a whole phrase of its message.

    The word "memory" alone proves nothing: "an illegal memory access was encountered" is a bug.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(phrase in str(error) for phrase in OUT_OF_MEMORY)
