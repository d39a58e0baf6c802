"""The tutorial's training script, cut down to what makes its model file.

`python tutorial.py FOLDER` leaves a file for each way of saving, `vocab.txt`, and `logits.pt`: the
ids that went into the models, and the logits that came out, by the names of the files. Run so, it
stands in `__main__` as theirs did. Their maths is that of reference.py, the class names are theirs.
"""

import pickle
import sys
from pathlib import Path

import torch
from reference import PlainBlock, PlainFeedForward, PlainGPT, PlainHead, PlainMultiHeadAttention

CHARACTERS = "\n abcdefghi"


class Head(PlainHead):
    def __init__(self, head_size, n_embd, block_size, dropout):
        super().__init__(head_size, n_embd, block_size, dropout)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))


class MultiHeadAttention(PlainMultiHeadAttention):
    Head = Head


class FeedFoward(PlainFeedForward):  # its author's spelling, and so the name in the files
    pass


class Block(PlainBlock):
    Attention, FeedForward = MultiHeadAttention, FeedFoward


class GPTLanguageModel(PlainGPT):
    Block = Block


folder = Path(sys.argv[1])
torch.manual_seed(1)
model = GPTLanguageModel(len(CHARACTERS), n_embd=12, n_head=3, n_layer=2, block_size=8).eval()
index = torch.randint(0, len(CHARACTERS), (4, 8))
logits, loss = model(index, index)
loss.backward()  # as when theirs were saved

for prefix in ("", "module-", "cuda-"):
    if prefix == "module-":
        sys.modules.update(dict.fromkeys(("my", "my.gpt_2"), sys.modules["__main__"]))
        for kind in (Head, MultiHeadAttention, FeedFoward, Block, GPTLanguageModel):
            kind.__module__ = "my.gpt_2"
    if prefix == "cuda-":  # as if the storages were on a GPU
        torch.serialization.register_package(0, lambda _: "cuda:0", lambda *_: None)
    pickles = {
        f"protocol-{number}": pickle.dumps(model, number)
        for number in range(pickle.HIGHEST_PROTOCOL + 1)
    }
    pickles["pickled_state_dict"] = pickle.dumps(model.state_dict())
    for name, content in pickles.items():
        (folder / f"{prefix}{name}.pkl").write_bytes(content)
    torch.save(model, folder / f"{prefix}saved.pkl")
    torch.save(model.state_dict(), folder / f"{prefix}state_dict.pkl")

expected = {path.name: logits.detach() for path in folder.glob("*.pkl")}
torch.save((index, expected), folder / "logits.pt")
(folder / "vocab.txt").write_text("\n".join(CHARACTERS), encoding="utf-8")
