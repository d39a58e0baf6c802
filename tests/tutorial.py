"""The tutorial's training script, cut down to what makes its model file.

`python tutorial.py FOLDER` leaves a file for each way of saving, `vocab.txt`, and `logits.pt`: the
ids that went into the models, and the logits that came out, by the names of the files. Run so, it
stands in `__main__` as theirs did. The words are ours.
"""

import pickle
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

CHARACTERS = "\n abcdefghi"
VOCAB_SIZE, N_EMBD, N_HEAD, N_LAYER, BLOCK_SIZE, DROPOUT = len(CHARACTERS), 12, 3, 2, 8, 0.2


class Head(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        key, query, value = (nn.Linear(N_EMBD, head_size, bias=False) for _ in range(3))
        self.key, self.query, self.value = key, query, value
        self.register_buffer("tril", torch.tril(torch.ones(BLOCK_SIZE, BLOCK_SIZE)))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        k, T = self.key(x), x.shape[1]
        scores = self.query(x) @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ self.value(x)


class MultiHeadAttention(nn.Module):
    def __init__(self, num_heads, head_size):
        super().__init__()
        self.heads = nn.ModuleList([Head(head_size) for _ in range(num_heads)])
        self.proj = nn.Linear(head_size * num_heads, N_EMBD)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=-1)))


class FeedFoward(nn.Module):  # its author's spelling, and so the name in the files
    def __init__(self, n):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n, 4 * n), nn.ReLU(), nn.Linear(4 * n, n), nn.Dropout(DROPOUT)
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.sa = MultiHeadAttention(n_head, n_embd // n_head)
        self.ffwd = FeedFoward(n_embd)
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)

    def forward(self, x):
        x = self.ln1(x + self.sa(x))
        return self.ln2(x + self.ffwd(x))


class GPTLanguageModel(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, N_EMBD)
        self.position_embedding_table = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.blocks = nn.Sequential(*[Block(N_EMBD, n_head=N_HEAD) for _ in range(N_LAYER)])
        self.ln_f, self.lm_head = nn.LayerNorm(N_EMBD), nn.Linear(N_EMBD, vocab_size)

    def forward(self, index):
        positions = torch.arange(index.shape[1])
        x = self.token_embedding_table(index) + self.position_embedding_table(positions)
        return self.lm_head(self.ln_f(self.blocks(x)))


folder = Path(sys.argv[1])
torch.manual_seed(1)
model = GPTLanguageModel(VOCAB_SIZE).eval()
index = torch.randint(0, VOCAB_SIZE, (4, BLOCK_SIZE))
F.cross_entropy(model(index).flatten(0, 1), index.flatten()).backward()  # as when theirs were saved
logits = {}


def save(name, content, dump=pickle.dump, **options):
    with open(folder / name, "wb") as file:
        dump(content, file, **options)
    logits[name] = model(index).detach()


for prefix in ("", "module-", "cuda-"):
    if prefix == "module-":
        sys.modules.update(dict.fromkeys(("my", "my.gpt_2"), sys.modules["__main__"]))
        for kind in (Head, MultiHeadAttention, FeedFoward, Block, GPTLanguageModel):
            kind.__module__ = "my.gpt_2"
    if prefix == "cuda-":  # as if the storages were on a GPU
        torch.serialization.register_package(0, lambda _: "cuda:0", lambda *_: None)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        save(f"{prefix}protocol-{protocol}.pkl", model, protocol=protocol)
    save(f"{prefix}saved.pkl", model, torch.save)
    save(f"{prefix}state_dict.pkl", model.state_dict(), torch.save)
    save(f"{prefix}pickled_state_dict.pkl", model.state_dict())
torch.save((index, logits), folder / "logits.pt")
(folder / "vocab.txt").write_text("\n".join(CHARACTERS), encoding="utf-8")
