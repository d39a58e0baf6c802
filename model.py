"""A GPT over characters, from one attention head up to the model that writes text, and the file it is kept in.

Read it from the top: each class is made of those before it. What only makes it faster comes after: `Linear` and
`Dropout`, which do as torch's own do, and `Cache`, which a model does without until it writes text.

Shapes: B sequences in a batch, T time steps (characters) in a sequence, C = n_embd numbers per character,
V = vocab_size characters, H heads of D = head_size numbers each.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from pickletools import markobject
from typing import BinaryIO

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MAX_BLOCK_SIZE = 2**15  # for which the mask alone takes 1 GiB
REPLACEMENT = "\ufffd"
MAX_WEIGHT = 1000.0  # from which on numbers inside the model might become infinite; trained weights are about 1


class Head(nn.Module):
    """One head of self-attention: every time step gathers what it looks for from itself and the steps before it.

    Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """

    def __init__(self, head_size: int, n_embd: int, block_size: int, dropout: float):
        super().__init__()
        self.key = Linear(n_embd, head_size, bias=False)
        self.query = Linear(n_embd, head_size, bias=False)
        self.value = Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", lower_triangle(block_size), persistent=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, D)"""
        T = x.shape[1]
        return self.attend(self.query(x), self.key(x), self.value(x), self.tril[:T, :T])

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Queries (..., T, D), keys and values (..., S, D), who may see whom (T, S) -> (..., T, D)"""
        head_size = q.shape[-1]
        weights = (q * head_size**-0.5) @ k.transpose(-2, -1)  # (..., T, S): how well each key answers each query
        weights = weights.masked_fill(~visible, float("-inf"))  # nothing comes from the future
        weights = F.softmax(weights, dim=-1)  # each query's weights add up to 1
        return self.dropout(weights) @ v  # a weighted mean of the values


@lru_cache(maxsize=1)
def lower_triangle(block_size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """(block_size, block_size) booleans: row t is True at the time steps that step t may see, those up to t."""
    return torch.ones(block_size, block_size, dtype=torch.bool, device=device).tril()


class MultiHeadAttention(nn.Module):
    """Several heads side by side, each free to look for something else, and a projection that mixes what they found."""

    def __init__(self, num_heads: int, head_size: int, n_embd: int, block_size: int, dropout: float):
        super().__init__()
        self.heads = nn.ModuleList(Head(head_size, n_embd, block_size, dropout) for _ in range(num_heads))
        self.proj = Linear(num_heads * head_size, n_embd)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)

        The same as `dropout(proj(cat([head(x) for head in heads], dim=-1)))`, with all heads in one multiplication.
        With a cache, x holds only new time steps, those at `positions` (T,), and earlier ones are remembered.
        """
        B, T, _ = x.shape
        tril = self.heads[0].tril
        weight = self.joined_weight() if cache is None else cache.weight
        qkv = linear(x, weight).view(B, T, 3, len(self.heads), -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, kv = qkv[0], qkv[1:]
        if cache is None:
            visible = tril[:T, :T]
        else:
            kv = cache.append(kv, positions)  # (2, B, H, S, D) with the earlier time steps
            visible = tril[positions, : kv.shape[3]]
        q = q.to(kv.dtype)
        attend = self.attend_fused if self.prefers_fused(q) else self.heads[0].attend
        y = attend(q, *kv, visible)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2).to(x.dtype)  # (B, T, H·D): the heads side by side
        return self.dropout(self.proj(y))

    def prefers_fused(self, q: torch.Tensor) -> bool:
        """Whether the fused operation is the faster one: always on a GPU, on a CPU in float32 if nothing is dropped.

        There, forward and backward took 0.9 (64 time steps) to 0.4 (1024) of the plain form's time; in bfloat16, 3.0 to
        0.8.
        """
        drops = self.training and self.dropout.p > 0
        return q.is_cuda or (q.is_cpu and q.dtype == torch.float32 and not drops)

    def attend_fused(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """What `Head.attend` spells out, as one operation of torch's."""
        T, S = visible.shape
        dropout = self.dropout.p if self.training else 0.0
        if T == S:  # all time steps at once, for which there is a kernel that needs no mask
            return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, visible, dropout)

    def joined_weight(self) -> torch.Tensor:
        """(3·H·D, C): the queries' weights of all heads, then the keys', then the values'."""
        parts = ("query", "key", "value")
        return torch.cat([getattr(head, part).weight for part in parts for head in self.heads])


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

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, cache: Cache | None = None
    ) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)"""
        y = self.sa(x, positions, cache)
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
            raise ValueError(f"block_size must be at most {MAX_BLOCK_SIZE}, not {block_size}")
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
        self._share_tril()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _share_tril(self) -> None:
        """Let all heads hold one and the same triangle instead of a copy each."""
        tril = lower_triangle(self.block_size, self.lm_head.weight.device)
        for module in self.modules():
            if isinstance(module, Head):
                module.tril = tril

    def _apply(self, *args, **kwargs):
        """What `.to(device)` calls; it would leave each head a triangle of its own."""
        super()._apply(*args, **kwargs)
        self._share_tril()
        return self

    def forward(
        self,
        index: torch.Tensor,
        targets: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids (B, T) and those that follow each of them (B, T) -> logits (B, T, V), mean cross-entropy in nats.

        Without targets the loss is None. With `caches` (see `new_caches`) the ids stand at the time steps `positions`
        (T,), after those of earlier calls. Raises ValueError if there are no time steps or more than `block_size`.
        """
        T = index.shape[1]
        if not 0 < T <= self.block_size:
            raise ValueError(f"the model takes 1 to {self.block_size} time steps, not {T}")
        if positions is None:
            positions = torch.arange(T, device=index.device)
        x = self.token_embedding_table(index) + self.position_embedding_table(positions)  # (B, T, C) + (T, C)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x = block(x, positions, cache)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def new_caches(self, batch_size: int) -> list[Cache]:
        """Empty caches, one for each block, to pass to `forward`."""
        return [Cache(block.sa, batch_size) for block in self.blocks]

    def generate(self, index: torch.Tensor, max_new_tokens: int, **options) -> torch.Tensor:
        """Token ids (B, T) -> (B, T + max_new_tokens): what `stream` yields with these options, appended."""
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
        `top_k` leaves only the k likeliest to choose from, `banned_ids` are never sampled. `caches` are those of an
        earlier call, to be used again. Raises ValueError for bad arguments or ids.

        While the text fits into `block_size`, caches give exactly what the whole model would. From then on the model
        sees the latest half to whole `block_size` tokens: whenever the window is full, it is started anew from its
        second half, since a cache can't slide (each position has its own embedding). On held-out text the default
        model lost less than 0.01 nats per character by that.
        """
        vocab_size = self.config["vocab_size"]
        if index.shape[1] == 0 or index.min() < 0 or index.max() >= vocab_size:
            raise ValueError(f"the context must be one or more token ids from 0 to {vocab_size - 1}")
        if not temperature >= 0 or (top_k is not None and not 0 < top_k <= vocab_size):
            raise ValueError(f"temperature must be 0 or more and top_k between 1 and {vocab_size}")
        if not set(banned_ids) < set(range(vocab_size)):
            raise ValueError(f"banned_ids must be some token ids from 0 to {vocab_size - 1}, not all")
        banned = torch.tensor(banned_ids, dtype=torch.long, device=index.device)
        was_training = self.training
        self.eval()
        caches = caches or self.new_caches(len(index))
        try:
            context = new = index[:, -self.block_size :]
            start = 0
            for _ in range(max_new_tokens):
                if start + new.shape[1] > self.block_size:
                    new, start = context[:, -max(1, self.block_size // 2) :], 0
                    context = new
                positions = torch.arange(start, start + new.shape[1], device=index.device)
                start += new.shape[1]
                # Single tokens take the way that `model.compile` may have compiled.
                step = self if new.shape[1] == 1 else self.forward
                with torch.inference_mode():  # 1.05 times as fast as without gradients alone
                    logits, _ = step(new, None, positions, caches)
                    logits = logits[:, -1].index_fill(1, banned, -math.inf)
                    new = sample(logits, temperature, top_k, generator)
                new = new.clone()  # an ordinary tensor, which may be trained on
                context = torch.cat([context, new], dim=1)
                yield new
        finally:
            self.train(was_training)


def sample(
    logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> torch.Tensor:
    """Logits (B, V) -> ids (B, 1)"""
    if temperature < 1e-30:  # by less, float32 can't divide
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0, so that nothing overflows
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probabilities = F.softmax(logits, dim=-1)
    # What torch.multinomial does, less its checks, for which Python would have to wait for a GPU.
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1, keepdim=True)


# What makes it faster and changes nothing else -----------------------------------------------------------------------


class Cache(nn.Module):
    """What one MultiHeadAttention remembers while text is generated, so that each new token costs one time step.

    Holds keys and values (2, B, H, block_size, D), zeros until they are filled.
    """

    def __init__(self, attention: MultiHeadAttention, batch_size: int):
        super().__init__()
        head = attention.heads[0]
        weight = attention.joined_weight().detach()  # joined once here and not for every token
        # On a GPU every token is to be the same work at the same addresses, which can be captured once and replayed. A
        # CPU attends faster to the filled part alone, and a single query does so 4 times as fast in float32.
        self.whole = weight.is_cuda
        dtype = weight.dtype if self.whole else torch.float32
        kv = weight.new_zeros(2, batch_size, len(attention.heads), len(head.tril), head.key.out_features, dtype=dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("kv", kv)

    def append(self, kv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keep keys and values (2, B, H, T, D) of these time steps (T,); return those of all so far, (2, B, H, S, D).

        Or those of all `block_size` time steps, where `whole`, of which the later ones mean nothing.
        """
        self.kv.index_copy_(3, positions, kv.to(self.kv.dtype))
        return self.kv if self.whole else self.kv.narrow(3, 0, int(positions[-1]) + 1)


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
        keep = max(1, round((1 - self.p) * 256))
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) <= keep - 1
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
    if not one_row or torch.is_grad_enabled() or len(weight) % (cores := torch.get_num_threads()):
        return F.linear(x, weight, bias)
    pieces = weight.view(cores, -1, x.shape[-1]).transpose(1, 2)  # (cores, in_features, out_features / cores)
    y = torch.bmm(x.reshape(1, 1, -1).expand(cores, 1, -1), pieces).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


# The file ------------------------------------------------------------------------------------------------------------


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
        """The characters in a `vocab.txt`. Raises OSError and ModelFileError."""
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFileError(f"{path}: not UTF-8 text; run data_extract.py again") from None
        if not text:
            raise ModelFileError(f"{path}: holds no characters; run data_extract.py again")
        windows = re.search(r"(?<!\r)\n", text) is None  # Python's text mode ended every line with \r\n
        return cls(text.replace("\r\n", "\n") if windows else text)

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError, naming it, for a character that is not in the vocabulary."""
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            raise ValueError(f"the character {error.args[0]!r} is not in the vocabulary") from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self.characters[i] for i in ids)


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

    Until then, what stood at `path` stays as it was. Of a symbolic link the target is replaced. Raises OSError.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    temporary = Path(f"{target}.tmp")  # in the same folder, since a file can't be moved to another disk at once
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
    """The model of a file in eval mode, and its vocabulary, or the one given for a file that has none.

    Reads what `save_model` writes and the tutorial's models, whole or as a state_dict, from `pickle.dump` or
    `torch.save`. Only data and tensors are read: no code in a file can run. Raises OSError and ModelFileError.
    """
    model, vocabulary = build_model(read_model_file(path), path, vocabulary)
    return model.to(device), vocabulary


def read_model_file(path: str | Path) -> dict:
    """What `save_model` has put into a file; of other files, the weights alone. Raises OSError and ModelFileError."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        try:
            reader = read_archive if zipfile.is_zipfile(file) else unpickle
            file.seek(0)
            content = reader(file)
            if "weights" not in content:
                content = {"weights": weights_of(content) if isinstance(content, Module) else content}
            content["weights"] = float_weights(content["weights"], size)
        except NotDataError as error:
            raise ModelFileError(
                f"{path}: not a model file: it asks for {error}, which no model needs; use one that training.py saved"
            ) from None
        except Exception as error:  # whatever a damaged or foreign file may cause
            raise ModelFileError(f"{path}: not a model file, or a damaged one; train one with training.py") from error
    return content


def build_model(
    content: dict, path: str | Path, vocabulary: Vocabulary | None = None
) -> tuple[GPTLanguageModel, Vocabulary]:
    """The model in eval mode and the vocabulary of what `read_model_file` has read. Raises ModelFileError."""
    try:
        shape = shape_of(content["weights"])
        config = {**content.get("config", {}), **shape}
        if config != content.get("config", shape):
            raise ValueError("a shape that is not that of the weights")
        with WithoutInit():
            model = GPTLanguageModel(**config)
        model.load_state_dict(content["weights"], assign=True)
        if "vocabulary" in content:
            if type(content["vocabulary"]) is not str or len(set(content["vocabulary"])) != shape["vocab_size"]:
                raise ValueError("a vocabulary that is not that of the weights")
            vocabulary = Vocabulary(content["vocabulary"])
    except Exception as error:  # parts that are missing, of the wrong type or of the wrong shape
        raise ModelFileError(
            f"{path}: not a GPTLanguageModel: weights, shape and vocabulary do not fit; train one with training.py"
        ) from error
    for name, weight in content["weights"].items():
        if not (weight.abs() <= MAX_WEIGHT).all():
            raise ModelFileError(f"{path}: {name} is NaN or absurd in places; use a file from before that happened")
    if vocabulary is None:
        raise ModelFileError(f"{path}: holds no vocabulary; name the vocab.txt it was trained with: -vocab vocab.txt")
    knows = shape["vocab_size"]
    if len(vocabulary) == knows + 1:  # the tutorial reads its vocab.txt in Python's text mode, which has no \r
        vocabulary = Vocabulary(vocabulary.characters.replace("\r", ""))
    if len(vocabulary) != knows:
        raise ModelFileError(
            f"{path}: knows {knows} characters, the given vocabulary has {len(vocabulary)}; "
            "name the vocab.txt it was trained with: -vocab vocab.txt"
        )
    return model.eval(), vocabulary


class WithoutInit(TorchFunctionMode):
    """Within it, modules are left with whatever was in memory: no time is spent on weights that a file replaces.

    A model on the "meta" device would do as well, but makes torch import for a second.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor") if kwargs else args[0]
        return function(*args, **(kwargs or {}))


def shape_of(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """The constructor's arguments that fit the weights. Raises one of many exceptions for other weights."""
    vocab_size, n_embd = weights["token_embedding_table.weight"].shape
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    heads = {name.split(".")[4] for name in weights if name.startswith("blocks.0.sa.heads.")}
    if len(weights) != 6 + len(layers) * (10 + 3 * len(heads)):
        raise ValueError("weights that are missing, before it takes time to build a model for them")
    return {
        "vocab_size": vocab_size,
        "n_embd": n_embd,
        "n_head": len(heads),
        "n_layer": len(layers),
        "block_size": len(weights["position_embedding_table.weight"]),
    }


def float_weights(weights: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """The weights in float32, each with memory of its own, less the triangles, which the tutorial saves with them.

    Raises one of many exceptions for anything else, and for more numbers than a file of this size can hold.
    """
    if sum(weight.nbytes for weight in weights.values()) > size:
        raise ValueError("more numbers than the file has")
    return {name: torch.empty(w.shape).copy_(w) for name, w in weights.items() if not name.endswith(".tril")}


def weights_of(module: Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights of a whole module by their names. Raises one of many exceptions for anything else."""
    if len(prefix) > 100:
        raise ValueError("modules that are nested deeper than a model's")
    weights = {prefix + name: weight for name, weight in module["_parameters"].items() if weight is not None}
    for name, child in module["_modules"].items():
        weights |= weights_of(child, f"{prefix}{name}.")
    return weights


# A pickle is a program for a machine with a stack, which Python's own unpickler lets build anything and call anything.
# The one here has only what data takes, and what it may call is listed in NAMES. The functions raise one of many
# exceptions for what is no such pickle.


class NotDataError(Exception):
    """A pickle asks for something that no model needs; the message names it."""


class Module(dict):
    """The attributes of a module in a file, whatever its class; made empty, whatever it is called with in a file."""

    def __init__(self):
        super().__init__()


def read_archive(file: BinaryIO):
    """The data in a file of `torch.save`: a zip archive with a pickle, and a member for each storage."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
            raise ValueError("members that take more memory than the file")
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    [name] = [name for name in members if name.endswith("data.pkl")]
    folder = name.removesuffix(".pkl") + "/"

    def storage(_, dtype: torch.dtype, key: str, _device, count: int) -> torch.Tensor:
        return numbers(members[folder + key], dtype, count)

    return unpickle(io.BytesIO(members[name]), storage)


def read_storage(data: bytes) -> torch.Tensor:
    """A storage inside a file of `pickle.dump`: five pickles, the count of its numbers, and the numbers."""
    file = io.BytesIO(data)
    _magic, _version, _system, identity, _keys = [unpickle(file, lambda *identity: identity) for _ in range(5)]
    (count,) = struct.unpack("<q", file.read(8))
    return numbers(bytearray(file.read()), identity[1], count)


def numbers(data: bytearray, dtype: torch.dtype, count: int) -> torch.Tensor:
    storage = torch.frombuffer(data, dtype=dtype)
    if len(storage) != count:
        raise ValueError("a storage of another size")
    return storage


def rebuild_tensor(storage: torch.Tensor, start: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
    tensor = storage.as_strided(size, stride, start)
    if not tensor.is_contiguous():  # such as one number in 2^40 places, none of which an optimizer may write to
        raise ValueError("a tensor whose numbers are not side by side")
    return tensor


def unpickle(file: BinaryIO, find_storage: Callable | None = None):
    """Follow the instructions of one pickle and return what they build; `find_storage` finds what is stored elsewhere.

    That is a tree, never larger than the file allows: only names and short strings may occur again.
    """
    stack, marks, memo = [], [], []
    for instruction, argument, _ in pickletools.genops(file):
        takes = instruction.stack_before  # what it takes off the stack
        start = marks.pop() - takes.index(markobject) if markobject in takes else len(stack) - len(takes)
        if start < 0:
            raise ValueError("takes more than is on the stack")
        items = stack[start:]
        del stack[start:]
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                stack += items
                if argument not in (None, len(memo)):
                    raise ValueError("remembers objects out of order")
                memo.append(stack[-1])
            case "GET" | "BINGET" | "LONG_BINGET":
                item = memo[argument]
                if isinstance(item, (tuple, list, dict, bytes)) or (isinstance(item, str) and len(item) > 200):
                    raise ValueError("an object that occurs twice: in 200 bytes, such can be nested to 2^40 items")
                stack.append(item)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in LITERALS:
                stack.append(argument)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
                stack.append(tuple(items))
            case "EMPTY_LIST" | "LIST" | "EMPTY_SET":  # the sets are of no interest
                stack.append(items)
            case "EMPTY_DICT" | "DICT":
                stack.append(as_dict(items))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items[0].extend(items[1:])
                stack.append(items[0])
            case "SETITEM" | "SETITEMS":
                items[0].update(as_dict(items[1:]))
                stack.append(items[0])
            case "GLOBAL" | "STACK_GLOBAL":
                name = argument or " ".join(items)
                if name not in NAMES:
                    raise NotDataError(ascii(name.replace(" ", ".")[:80]))
                stack.append(NAMES[name])
            case "REDUCE" | "NEWOBJ":
                stack.append(items[0](*items[1]))
            case "BUILD":
                if isinstance(items[0], Module):
                    items[0].update(**items[1])
                stack.append(items[0])
            case "BINPERSID":
                stack.append(find_storage(*items[0]))
            case "STOP":
                return items[0]
            case _:
                raise ValueError("an instruction that no model needs")


def as_dict(items: list) -> dict:
    """Keys and values in turn -> dict. No other keys: Python crashes on the hash of deeply nested tuples."""
    keys = items[::2]
    if not all(type(key) is str or (type(key) is int and 0 <= key < 2**31) for key in keys):
        raise ValueError("keys that no model has")
    return dict(zip(keys, items[1::2], strict=True))


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
NAMES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch BoolStorage": torch.bool,
    "torch.storage _load_from_bytes": read_storage,
    "torch._utils _rebuild_tensor_v2": rebuild_tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "collections OrderedDict": lambda: {},
    "builtins set": list,
    "__builtin__ set": list,  # so called before protocol 3
    "__builtin__ object": None,
    "copy_reg _reconstructor": lambda module, *_: module(),  # instead of NEWOBJ in protocols 0 and 1
    "_codecs encode": lambda text, _: text.encode("latin1"),  # bytes in protocols 0 to 2
}
MODULES = {
    "__main__": ("Head", "MultiHeadAttention", "FeedFoward", "FeedForward", "Block", "GPTLanguageModel"),
    "torch.nn.modules.container": ("ModuleList", "Sequential"),
    "torch.nn.modules.sparse": ("Embedding",),
    "torch.nn.modules.linear": ("Linear",),
    "torch.nn.modules.normalization": ("LayerNorm",),
    "torch.nn.modules.activation": ("ReLU",),
    "torch.nn.modules.dropout": ("Dropout",),
}
NAMES |= {f"{module} {name}": Module for module, names in MODULES.items() for name in names}


# What training.py and chatbot.py share of their command lines --------------------------------------------------------

METAVARS = {"int": "N", "float": "X", "Path": "FILE"}


def make_parser(description: str) -> tuple[argparse.ArgumentParser, Callable[..., None]]:
    """Return a parser, and a function that adds a flag to it: `flag("batch_size", type=int, default=32, help="…")`."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False, description=description)

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
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        parser.error(f"argument -device: there is no device {name!r} here")
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
