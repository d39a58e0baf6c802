"""The design's model once more, written as plainly as possible: what model.py must equal, and is
timed against.

Every head on its own, a mask cut for every call, torch's own dropout, the whole context anew for
every token. Nothing here is shared with model.py but the parameter names, so that weights can be
copied over. On these classes, tutorial.py builds those of the tutorial, with its names for the
parts.
"""

import math

import torch
from torch import nn


class PlainHead(nn.Module):
    def __init__(self, head_size, n_embd, block_size, dropout):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def weights(self, x):
        """Return how much each time step looks at each other one."""
        k, q = self.key(x), self.query(x)
        scores = q @ k.transpose(1, 2) / math.sqrt(k.shape[2])
        future = torch.ones_like(scores[0]).triu(1) == 1
        scores[:, future] = -math.inf
        return torch.softmax(scores, dim=2)

    def forward(self, x):
        return self.dropout(self.weights(x)) @ self.value(x)


class PlainMultiHeadAttention(nn.Module):
    Head = PlainHead

    def __init__(self, num_heads, head_size, n_embd, block_size, dropout):
        super().__init__()
        self.heads = nn.ModuleList(
            [self.Head(head_size, n_embd, block_size, dropout) for _ in range(num_heads)]
        )
        self.proj = nn.Linear(num_heads * head_size, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([head(x) for head in self.heads], dim=2)))


class PlainFeedForward(nn.Module):
    def __init__(self, n_embd, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd),
            nn.ReLU(),
            nn.Linear(4 * n_embd, n_embd),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class PlainBlock(nn.Module):
    Attention, FeedForward = PlainMultiHeadAttention, PlainFeedForward

    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        self.sa = self.Attention(n_head, n_embd // n_head, n_embd, block_size, dropout)
        self.ffwd = self.FeedForward(n_embd, dropout)
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)

    def forward(self, x):
        x = self.ln1(x + self.sa(x))
        return self.ln2(x + self.ffwd(x))


class PlainGPT(nn.Module):
    Block = PlainBlock

    def __init__(self, vocab_size, n_embd=384, n_head=4, n_layer=4, block_size=128, dropout=0.2):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(
            *[self.Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)]
        )
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size)

    def embed(self, index):
        positions = self.position_embedding_table.weight[: index.shape[1]]
        return self.token_embedding_table(index) + positions

    def forward(self, index, targets=None):
        logits = self.lm_head(self.ln_f(self.blocks(self.embed(index))))
        if targets is None:
            return logits, None
        return logits, nn.functional.cross_entropy(
            logits.view(-1, logits.shape[2]), targets.reshape(-1)
        )

    @torch.no_grad()
    def inside(self, index):
        """Return the heads' weights, and each character's chance before and after each block.

        Their shapes are (blocks, heads, T, T) and (blocks + 1, T, V).
        """
        states, weights = [self.embed(index)], []
        for block in self.blocks:
            weights.append(torch.cat([head.weights(states[-1]) for head in block.sa.heads]))
            states.append(block(states[-1]))
        logits = self.lm_head(self.ln_f(torch.cat(states)))
        return torch.stack(weights), torch.softmax(logits, dim=2)

    @torch.no_grad()
    def generate(self, index, max_new_tokens):
        for _ in range(max_new_tokens):
            window = index[:, -self.position_embedding_table.num_embeddings :]
            chances = torch.softmax(self(window)[0][:, -1], dim=1)
            index = torch.cat([index, torch.multinomial(chances, 1)], dim=1)
        return index
