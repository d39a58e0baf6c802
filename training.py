"""Train a GPT on the text that data_extract.py made, and keep the best model in `model-01.pkl`.

The texts are memory-mapped, never read whole: a step draws random places in the training text, takes `block_size` + 1
characters from each, and asks the model to predict every character from those before it.
"""

import argparse
import math
import mmap
import os
import signal
import sys
from codecs import utf_8_decode
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import GPTLanguageModel, Vocabulary, choose_device, number, replacing, save_model

BETAS = (0.9, 0.95)
STEP, EVALUATION = 0, 1  # what rows of text are drawn for


class TrainingError(Exception):
    """Training can't start or go on; the message says why and what to do."""


# Text ----------------------------------------------------------------------------------------------------------------


class Text:
    """A memory-mapped UTF-8 text from which random rows of token ids are drawn.

    Only the parts that are drawn are ever read, so a text may be larger than memory. Raises OSError, and TrainingError
    for a text too short for a single row.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary, block_size: int):
        self.path, self.row_length = path, block_size + 1
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        self.array = np.frombuffer(self.bytes, dtype=np.uint8)
        tail = self.array[-4 * self.row_length :]  # a character has at most 4 bytes
        starts = np.flatnonzero(~is_continuation(tail))
        if len(starts) < self.row_length:
            raise TrainingError(
                f"{path}: holds {len(starts)} characters, -block_size {block_size} takes {self.row_length} or more; "
                "use a longer text or a smaller block"
            )
        self.last_start = self.size - len(tail) + int(starts[-self.row_length])
        self.ids = np.full(sys.maxunicode + 1, -1, dtype=np.int64)  # code point -> token id
        self.ids[[ord(character) for character in vocabulary.characters]] = np.arange(len(vocabulary))

    def draw_offsets(self, count: int, key: list[int]) -> np.ndarray:
        """Byte offsets of `count` independent uniformly drawn characters; `key` alone decides which."""
        random = np.random.default_rng(key)
        offsets = random.integers(0, self.last_start, count, endpoint=True)
        while (inside := is_continuation(self.array[offsets])).any():
            offsets[inside] = random.integers(0, self.last_start, np.count_nonzero(inside), endpoint=True)
        return offsets

    def rows(self, offsets: np.ndarray) -> np.ndarray:
        """Token ids (len(offsets), block_size + 1) of the texts that begin at these bytes. Raises TrainingError."""
        texts = []
        for offset in offsets.tolist():
            try:  # decodes whole characters and leaves out the one that may be torn at the end
                text, _ = utf_8_decode(self.bytes[offset : offset + 4 * self.row_length], "strict", False)
            except UnicodeDecodeError as error:
                raise TrainingError(f"{self.path}: not UTF-8 text at byte {offset + error.start}") from error
            if len(text) < self.row_length:
                raise TrainingError(f"{self.path}: ends inside a character; it was cut short")
            texts.append(text[: self.row_length])
        code_points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        ids = self.ids[code_points].reshape(len(offsets), self.row_length)
        if ids.min() < 0:
            row, column = np.argwhere(ids < 0)[0]
            offset = int(offsets[row]) + len(texts[row][:column].encode())
            raise TrainingError(
                f"{self.path}: the character {texts[row][column]!r} at byte {offset} is not in vocab.txt; "
                "run data_extract.py again so that both belong together"
            )
        return ids


def is_continuation(array: np.ndarray) -> np.ndarray:
    """Which bytes of UTF-8 text are inside a character, not at the start of one."""
    return (array & 0xC0) == 0x80


def get_batch(text: Text, batch_size: int, key: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, token ids (B, T) each: the targets are the characters that follow the inputs."""
    rows = torch.from_numpy(text.rows(text.draw_offsets(batch_size, key))).to(device)
    return rows[:, :-1], rows[:, 1:]


# Learning ------------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to `learning_rate`, then a cosine down to `min_lr` at the last step."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.min_lr + (args.learning_rate - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: GPTLanguageModel, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), with weight decay on matrices only: biases and norms have no need of it."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def train_step(
    model: GPTLanguageModel, optimizer: torch.optim.Optimizer, text: Text, step: int, args: argparse.Namespace
) -> torch.Tensor:
    """Learn from the rows of one step; return their loss, still on its device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, args)
    x, y = get_batch(text, args.batch_size, [args.seed, step, STEP], args.device)
    with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
        _, loss = model(x, y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def estimate_loss(model: GPTLanguageModel, text: Text, args: argparse.Namespace) -> float:
    """Mean loss over `eval_iters` batches, the same ones each time so that evaluations can be compared."""
    model.eval()
    losses = []
    for i in range(args.eval_iters):
        x, y = get_batch(text, args.batch_size, [args.seed, i, EVALUATION], args.device)
        with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
            losses.append(model(x, y)[1])
    model.train()
    return torch.stack(losses).mean().item()


class Interruption:
    """Notes Ctrl-C and SIGTERM, so that the loop can end in good order; a second one ends the program at once."""

    def __enter__(self) -> "Interruption":
        self.signal = None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *_) -> None:
        for signal_number, handler in self.before.items():
            signal.signal(signal_number, handler)


class Saver:
    """Keeps the best model of a run in a file, and the model that stood there before the run beside it."""

    def __init__(self, path: Path, vocabulary: Vocabulary):
        self.path, self.vocabulary, self.best = path, vocabulary, math.inf
        self.old = path.with_name(f"{path.stem}.old{path.suffix}")

    def offer(self, model: GPTLanguageModel, loss: float) -> bool:
        """Save the model if its validation loss is the best so far, and say whether it was."""
        if loss >= self.best:
            return False
        if self.best == math.inf and self.path.exists():
            with replacing(self.old) as file:
                file.write(self.path.read_bytes())
            tqdm.write(f"the earlier {self.path} is kept as {self.old}", file=sys.stderr)
        save_model(self.path, model, self.vocabulary)
        self.best = loss
        return True


def evaluate(
    model: GPTLanguageModel, train_text: Text, val_text: Text, step: int, saver: Saver, args: argparse.Namespace
) -> str:
    """Offer the model to the saver; return the line to show. Raises TrainingError if the loss is no longer a number."""
    train_loss, val_loss = (estimate_loss(model, text, args) for text in (train_text, val_text))
    if not math.isfinite(val_loss):
        kept = f"; the best model so far is in {args.model}" if saver.best < math.inf else ""
        raise TrainingError(
            f"the loss is {val_loss} after step {step}, at learning rate {learning_rate_at(step - 1, args):.2g}; "
            f"try a lower -learning_rate or a longer -warmup_iters{kept}"
        )
    note = f", saved {args.model}" if saver.offer(model, val_loss) else ""
    return f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}{note}"


def train(
    model: GPTLanguageModel,
    train_text: Text,
    val_text: Text,
    saver: Saver,
    interruption: Interruption,
    args: argparse.Namespace,
) -> None:
    """Run the training loop to its end or to an interruption."""
    optimizer = make_optimizer(model, args.weight_decay)
    tokens = args.batch_size * args.block_size
    model.train()
    with tqdm(total=args.max_iters * tokens, unit="tok", unit_scale=True, dynamic_ncols=True, mininterval=0.5) as bar:
        for step in range(1, args.max_iters + 1):
            loss = train_step(model, optimizer, train_text, step - 1, args)
            bar.set_description(f"step {step}/{args.max_iters}", refresh=False)
            if bar.update(tokens):  # reading the loss waits for the device, so do it only when the bar is drawn
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            if step % args.eval_interval == 0 or step == args.max_iters or interruption.signal:
                bar.write(evaluate(model, train_text, val_text, step, saver, args), file=sys.stdout)
                sys.stdout.flush()
            if interruption.signal:
                return


# The command ---------------------------------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a GPT on output_train.txt and keep the best model.",
    )

    def flag(name: str, **options):
        parser.add_argument(f"-{name}", f"--{name}", **options)

    flag("batch_size", type=number(int, 1), default=32, help="sequences per optimizer step")
    flag("block_size", type=number(int, 1), default=128, help="characters that the model sees at once")
    flag("max_iters", type=number(int, 1), default=500, help="optimizer steps")
    flag("learning_rate", type=number(float, 0), default=2e-3, help="highest learning rate, after the warm-up")
    flag("min_lr", type=number(float, 0), help="learning rate at the end; without it, a tenth of -learning_rate")
    warmup = "steps in which the learning rate rises from 0; without it, 150 or at most a third of -max_iters"
    flag("warmup_iters", type=number(int, 0), help=warmup)
    flag("weight_decay", type=number(float, 0), default=0.1, help="AdamW's weight decay, on matrices only")
    flag("grad_clip", type=number(float, 0), default=1.0, help="longest gradient (norm over all weights); 0: any")
    flag("n_embd", type=number(int, 1), default=384, help="numbers per character inside the model")
    flag("n_head", type=number(int, 1), default=4, help="attention heads per layer")
    flag("n_layer", type=number(int, 1), default=4, help="layers (blocks)")
    flag("dropout", type=number(float, 0, below=1), default=0.2, help="share of numbers dropped in training")
    flag("eval_interval", type=number(int, 1), default=100, help="steps from one evaluation to the next")
    flag("eval_iters", type=number(int, 1), default=8, help="batches per evaluation and text")
    flag("seed", type=number(int, 0, below=2**63), default=1337, help="decides initial weights, rows and dropout")
    flag("device", help="cpu, cuda, cuda:1, ...; without it, cuda if there is one, else cpu")
    flag("dtype", choices=("float32", "bfloat16"), help="for multiplications; without it, what is fast here")
    flag("data_dir", type=Path, default=Path("."), help="folder with output_train.txt, output_val.txt and vocab.txt")
    flag("model", type=Path, default=Path("model-01.pkl"), help="file for the trained model")
    args = parser.parse_args(arguments)
    if args.n_embd % args.n_head:
        parser.error(f"argument -n_embd: {args.n_embd} is not a multiple of -n_head {args.n_head}")
    choose_device(parser, args)
    if args.min_lr is None:
        args.min_lr = args.learning_rate / 10
    if args.warmup_iters is None:
        args.warmup_iters = min(150, args.max_iters // 3)
    return args


def run(args: argparse.Namespace, interruption: Interruption) -> int:
    if args.model.is_dir() or not args.model.parent.is_dir():
        raise TrainingError(f"{args.model}: -model must name a file in a folder that exists")
    vocabulary = Vocabulary.from_file(args.data_dir / "vocab.txt")
    if not len(vocabulary):
        raise TrainingError(f"{args.data_dir / 'vocab.txt'}: holds no characters; run data_extract.py again")
    train_text, val_text = (
        Text(args.data_dir / name, vocabulary, args.block_size) for name in ("output_train.txt", "output_val.txt")
    )
    torch.manual_seed(args.seed)
    model = GPTLanguageModel(len(vocabulary), args.n_embd, args.n_head, args.n_layer, args.block_size, args.dropout).to(
        args.device
    )
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    print(f"device      {args.device}{threads}, {str(args.dtype).removeprefix('torch.')}")
    print(f"model       {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"vocabulary  {len(vocabulary):,} characters")
    print(f"text        {train_text.size / 1e6:,.2f} MB to train on, {val_text.size / 1e6:,.2f} MB to validate with")
    print(
        f"step        {args.batch_size} x {args.block_size} = {args.batch_size * args.block_size:,} tokens", flush=True
    )
    saver = Saver(args.model, vocabulary)
    train(model, train_text, val_text, saver, interruption, args)
    if interruption.signal:
        print(f"training.py: interrupted; the model is in {args.model}", file=sys.stderr)
        return 128 + interruption.signal
    model_flag = "" if args.model == Path("model-01.pkl") else f" -model {args.model}"
    print(f"best validation loss {saver.best:.4f}, in {args.model}; talk to it: python chatbot.py{model_flag}")
    return 0


def main() -> int:
    args = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not fit the encoding
    try:
        with Interruption() as interruption:
            return run(args, interruption)
    except TrainingError as error:
        print(f"training.py: {error}", file=sys.stderr)
    except OSError as error:
        hint = "; run data_extract.py first, or name its -data_dir" if isinstance(error, FileNotFoundError) else ""
        print(f"training.py: {error.filename or 'standard output'}: {error.strerror}{hint}", file=sys.stderr)
    except UnicodeDecodeError:
        print(f"training.py: {args.data_dir / 'vocab.txt'}: not UTF-8 text; run data_extract.py again", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        print("training.py: not enough memory; try a smaller -batch_size, -n_embd or -block_size", file=sys.stderr)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 1


if __name__ == "__main__":
    sys.exit(main())
