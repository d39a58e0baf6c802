"""Talk to a trained model: it goes on from what you type, one character at a time.

    python chatbot.py
    python chatbot.py -prompt "It was" -show

Only the model file is needed, which holds weights, shape and vocabulary. The model is not an assistant; it continues
text in the manner of the text that it was trained on.
"""

import contextlib
import io
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch.nn import functional as F

from model import GPTLanguageModel, Parser, Vocabulary, bounded, device, explain, load_model, prepare_streams, show

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  (gives input() arrow keys and a history)

# Colours of a terminal that can be read on white and on black, each for surprises up to so many bits
COLOURS = {1: 28, 3: 32, 5: 166, math.inf: 160}  # green, blue, orange, red


# Prompts -------------------------------------------------------------------------------------------------------------


def text(typed: str) -> str:
    r"""Turn each \n that was typed as two characters into a line end, which Windows' shells can't pass on."""
    return typed.replace("\\n", "\n")


def ask() -> str:
    """Return the next prompt that is typed or piped in. Raises EOFError at the end of the input."""
    prompt = input("Prompt: " if sys.stdin.isatty() else "")
    return text(prompt.strip("\ufeff\r"))  # Windows may add a byte-order mark and \r to what is piped


def encode_prompt(prompt: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of a prompt; characters that the model does not know become U+FFFD or nothing, with a notice."""
    unknown = sorted(set(prompt) - vocabulary.ids.keys())
    if unknown:
        fate = "replaced by U+FFFD" if vocabulary.substitute else "left out"
        show(f"{fate}, as the model has never seen them: {' '.join(map(repr, unknown))}", sys.stderr)
    known = "".join(vocabulary.substitute if character in unknown else character for character in prompt)
    return vocabulary.encode(known or vocabulary.characters[vocabulary.ids.get("\n", 0)])  # something to go on from


# Answers -------------------------------------------------------------------------------------------------------------


def until(stop: str, characters: Iterable[str]) -> Iterator[str]:
    """Yield the characters before the text `stop`. The last len(stop) - 1 are held back, since they may begin it."""
    held = ""
    for character in characters:
        held += character
        if held == stop:
            return
        if len(held) == len(stop):
            yield held[0]
            held = held[1:]
    yield held


@torch.inference_mode()
def surprises(model: GPTLanguageModel, ids: list[int]) -> list[float]:
    """Return how many bits each token but the first was worth: -log2 of the probability that the model gave it.

    The model sees at least half a window of the text before each token.
    """
    bits = []
    done = 1  # the first token has nothing before it to be predicted from
    while done < len(ids):
        start = max(0, done - max(1, model.block_size // 2))
        window = torch.tensor(ids[start : start + model.block_size + 1], device=model.lm_head.weight.device)
        logits, _ = model(window[None, :-1])
        nats = F.cross_entropy(logits[0], window[1:], reduction="none")  # of window[1], window[2], ...
        bits += (nats[done - start - 1 :] / math.log(2)).tolist()  # the others are known from the window before
        done = start + len(window)
    return bits


def show_surprises(completion: str, bits: list[float], prompt_length: int) -> None:
    """Show each character but the first in the colour of its bits, and the mean of the prompt and of the rest."""
    # IDLE says that it is a terminal, but shows the codes of colours as they are; it has no TextIOWrapper.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
        if os.name == "nt":
            os.system("")  # lets a Windows console show colours
        show(completion[0], end="")
        for character, surprise in zip(completion[1:], bits):
            colour = next(colour for limit, colour in COLOURS.items() if surprise <= limit)
            print(f"\033[38;5;{colour}m", end="")  # "38;5" selects one of 256 colours
            show(character, end="")
        print("\033[0m")  # none
    else:
        show(completion)
    parts = {"prompt": bits[: prompt_length - 1], "completion": bits[prompt_length - 1 :]}
    means = [f"{sum(part) / len(part):.2f} in the {name}" for name, part in parts.items() if part]
    if means:
        show(f"bits per character: {', '.join(means)}")


def answer(prompt: str, model: GPTLanguageModel, vocabulary: Vocabulary, args: Namespace) -> None:
    """Show the prompt and what the model makes of it, as it is made or, with colours, once it is whole."""
    ids = encode_prompt(prompt, vocabulary)
    index = torch.tensor([ids], device=args.device)
    for number in range(1, args.batch_size + 1):
        show(f"Completion {number}:" if args.batch_size > 1 else "Completion:")
        tokens = model.stream(index, args.max_new_tokens, args.temperature, args.top_k, args.generator)
        characters = (vocabulary.decode([token.item()]) for token in tokens)
        if args.stop:
            characters = until(args.stop, characters)
        if args.show:
            completion = vocabulary.decode(ids) + "".join(characters)
            show_surprises(completion, surprises(model, vocabulary.encode(completion)), len(ids))
            continue
        try:
            for character in chain(vocabulary.decode(ids), characters):
                show(character, end="")
        finally:
            show("")


def chat(model: GPTLanguageModel, vocabulary: Vocabulary, args: Namespace) -> None:
    """Answer prompts until the input ends or Ctrl-C at the prompt; Ctrl-C in an answer ends that answer."""
    while True:
        try:
            prompt = ask()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                show("")  # or the shell's own prompt would stand behind ours
            return
        try:
            answer(prompt, model, vocabulary, args)
        except KeyboardInterrupt:
            show("(stopped)", sys.stderr)


# The command ---------------------------------------------------------------------------------------------------------


def parse_args() -> tuple[Namespace, GPTLanguageModel, Vocabulary]:
    """Return the flags, and the model and its vocabulary. Raises OSError and ModelFileError."""
    parser = Parser("Talk to a model that training.py has made.")
    flag, positive = parser.flag, bounded(int, 1)
    flag("model", type=Path, default=Path("model-01.pkl"), help="file of the trained model")
    flag("vocab", type=Path, help="vocab.txt of the model, for a file that holds none, such as the tutorial's")
    flag("prompt", type=text, help=r"answer this prompt and exit; \n in it means a line end")
    flag("prompt_file", type=Path, help="answer the text in this file and exit")
    flag("max_new_tokens", type=positive, default=150, help="characters to add to a prompt")
    flag("stop", type=text, help=r"end a completion before this text; \n in it means a line end")
    flag("temperature", type=bounded(float, 0), default=0.8, help="0: always the likeliest; 1: as learnt; more: wilder")
    flag("top_k", type=positive, help="sample only from the k likeliest characters (default: from all)")
    flag("seed", type=bounded(int, 0, below=2**63), help="makes answers repeatable (default: they differ)")
    flag("batch_size", type=positive, default=1, help="completions per prompt")
    flag("show", action="store_true", help="colours by probability: green from 1/2, blue 1/8, orange 1/32, red below")
    flag("device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args()
    given = Vocabulary.from_file(args.vocab) if args.vocab else None
    model, vocabulary = load_model(args.model, args.device, given)
    if args.top_k and args.top_k > len(vocabulary):
        parser.error(f"argument -top_k: the model knows only {len(vocabulary)} characters")
    args.generator = torch.Generator(args.device).manual_seed(torch.seed() if args.seed is None else args.seed)
    return args, model, vocabulary


def main() -> int:
    prepare_streams()
    try:
        args, model, vocabulary = parse_args()
        if args.prompt_file:
            args.prompt = args.prompt_file.read_text(encoding="utf-8-sig", errors="replace")
        if args.prompt is None:
            chat(model, vocabulary, args)
        else:
            answer(args.prompt, model, vocabulary, args)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # a reader such as `head` has seen enough
        return 0
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if isinstance(error, FileNotFoundError) and str(error.filename).endswith(".pkl"):
            message += "; train a model with training.py, or name yours with -model"
        show(f"chatbot.py: {message}".replace("\n", r"\n"), sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
