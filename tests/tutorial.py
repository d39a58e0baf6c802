"""The tutorial's training script, cut down to what makes its model file: run, it stands in `__main__` as theirs did.

`python tutorial.py FOLDER` leaves a file for each way of saving, `vocab.txt`, and `logits.pt` with the ids that went
into the models and the logits that came out, by the names of the files.
Sizes are constants and every head keeps a triangle of floats of its own, as there; the words are ours.
"""

import copy
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
        self.key = nn.Linear(N_EMBD, head_size, bias=False)
        self.query = nn.Linear(N_EMBD, head_size, bias=False)
        self.value = nn.Linear(N_EMBD, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(BLOCK_SIZE, BLOCK_SIZE)))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        T = x.shape[1]
        k, q = self.key(x), self.query(x)
        scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
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
    def __init__(self, n_embd):
        super().__init__()
        layers = [nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(DROPOUT)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.sa = MultiHeadAttention(n_head, n_embd // n_head)
        self.ffwd = FeedFoward(n_embd)
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x):
        x = self.ln1(x + self.sa(x))
        return self.ln2(x + self.ffwd(x))


class GPTLanguageModel(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, N_EMBD)
        self.position_embedding_table = nn.Embedding(BLOCK_SIZE, N_EMBD)
        self.blocks = nn.Sequential(*[Block(N_EMBD, n_head=N_HEAD) for _ in range(N_LAYER)])
        self.ln_f = nn.LayerNorm(N_EMBD)
        self.lm_head = nn.Linear(N_EMBD, vocab_size)

    def forward(self, index):
        x = self.token_embedding_table(index) + self.position_embedding_table(torch.arange(index.shape[1]))
        return self.lm_head(self.ln_f(self.blocks(x)))


def main(folder):
    torch.manual_seed(1)
    model = GPTLanguageModel(VOCAB_SIZE)
    for _ in range(3):  # so that gradients hang on the parameters, as when theirs were saved
        index = torch.randint(0, VOCAB_SIZE, (4, BLOCK_SIZE))
        loss = F.cross_entropy(model(index).flatten(0, 1), index.flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():  # a plain step: the first optimizer of a process takes a second to import
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    model.eval()
    logits = {}

    def save(name, model, content, dump):
        with open(folder / name, "wb") as file:
            dump(content, file)
        logits[name] = model(index).detach()

    def save_all(prefix):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            save(f"{prefix}protocol-{protocol}.pkl", model, model, lambda m, f: pickle.dump(m, f, protocol))  # noqa: B023
        save(f"{prefix}saved.pkl", model, model, torch.save)
        save(f"{prefix}state_dict.pkl", model, model.state_dict(), torch.save)
        save(f"{prefix}pickled_state_dict.pkl", model, model.state_dict(), pickle.dump)

    save_all("")
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        cast = copy.deepcopy(model).to(dtype)
        name = str(dtype).removeprefix("torch.")
        save(f"{name}.pkl", copy.deepcopy(cast).float(), cast, pickle.dump)
    torch.serialization.register_package(0, lambda storage: "cuda:0", lambda storage, location: None)
    save_all("cuda-")  # as if the storages were on a GPU
    torch.save((index, logits), folder / "logits.pt")
    with open(folder / "vocab.txt", "w", encoding="utf-8") as file:
        for character in CHARACTERS:
            file.write(character + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
