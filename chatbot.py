"""Talk to a trained model: it goes on from what you type, one character at a time.

    python chatbot.py
    python chatbot.py -prompt "It was" -show

Nothing is needed but the model file, which holds weights, shape and vocabulary. The model is not an assistant; it
continues text in the manner of the text that it was trained on.
"""

import argparse
import contextlib
import errno
import io
import math
import os
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from model import (
    REPLACEMENT,
    Cache,
    GPTLanguageModel,
    ModelFileError,
    Vocabulary,
    bounded,
    choose_device,
    default_dtype,
    first_line,
    is_out_of_memory,
    load_model,
    make_parser,
    name_file_in_errors,
    prepare_streams,
)

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  (gives input() arrow keys and a history)

STDOUT = "standard output"
# Colours of a terminal that can be read on white and on black, each for surprises up to so many bits
COLOURS = {1: 28, 3: 32, 5: 166}  # green, blue, orange
RED = 160  # for all above


# Prompts -------------------------------------------------------------------------------------------------------------


def ask() -> str:
    """Return the next prompt that is typed or piped in. Raises EOFError at the end of the input."""
    typed = sys.stdin.isatty()
    with name_file_in_errors("standard input"):
        prompt = input("Prompt: " if typed else "")
        while prompt.endswith("\\"):  # goes on in the next line, as in a shell
            prompt = prompt[:-1] + "\n"
            with contextlib.suppress(EOFError):
                prompt += input("... " if typed else "")
    return prompt


def read_prompt_file(path: Path) -> str:
    """Return the text of a file, or of the standard input for `-`, as it is. Raises OSError and ModelFileError."""
    if str(path) == "-":
        return sys.stdin.read()
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows' editors may put a mark in front
    except UnicodeDecodeError:
        raise ModelFileError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def encode_prompt(prompt: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of a prompt; characters that the model does not know become U+FFFD or nothing, with a notice."""
    unknown = sorted(set(prompt) - set(vocabulary.characters))
    # U+FFFD is what data_extract.py makes of rare characters, so the model has learnt what goes with one.
    substitute = REPLACEMENT if REPLACEMENT in vocabulary.ids else ""
    if unknown:
        names = " ".join(repr(character) for character in unknown)
        fate = "replaced by U+FFFD" if substitute else "left out"
        print(f"{fate}, as the model has never seen them: {names}", file=sys.stderr)
    known = "".join(character if character in vocabulary.ids else substitute for character in prompt)
    # The model needs something to go on from: a line end, after which anything may come.
    start = "\n" if "\n" in vocabulary.ids else vocabulary.characters[0]
    return vocabulary.encode(known or start)


# Answers -------------------------------------------------------------------------------------------------------------


def show(text: str) -> None:
    """Write to the standard output at once. Raises an OSError that says so."""
    with name_file_in_errors(STDOUT):
        print(text, end="", flush=True)


def until(stop: str, characters: Iterable[str]) -> Iterator[str]:
    """Yield the characters that come before the text `stop`; what may be its beginning is held back."""
    held = ""
    for character in characters:
        held += character
        while not stop.startswith(held):
            yield held[0]
            held = held[1:]
        if held == stop:
            return
    yield from held


@torch.inference_mode()
def surprises(model: GPTLanguageModel, ids: list[int]) -> list[float]:
    """Return how many bits each token but the first was worth: -log2 of the probability that the model gave it.

    The model sees at least half a window of the text before each token.
    """
    device = model.lm_head.weight.device
    bits = []
    done = 1  # the first token has nothing before it to be predicted from
    while done < len(ids):
        start = max(0, done - max(1, model.block_size // 2))
        window = torch.tensor(ids[start : start + model.block_size + 1], device=device)
        logits, _ = model(window[None, :-1])
        nats = F.cross_entropy(logits[0].float(), window[1:], reduction="none")  # of window[1], window[2], ...
        new = nats[done - start - 1 :]  # the others are known from the window before
        bits += (new / math.log(2)).tolist()
        done = start + len(window)
    return bits


def coloured(text: str, bits: list[float]) -> str:
    """Return the text with codes that let a terminal show each character but the first in the colour of its bits."""
    parts = [text[0]]
    for character, surprise in zip(text[1:], bits):
        colour = next((colour for limit, colour in COLOURS.items() if surprise <= limit), RED)
        parts.append(f"\033[38;5;{colour}m{character}")  # "38;5" selects one of 256 colours, "0" none
    return "".join(parts) + "\033[0m"


def show_surprises(model: GPTLanguageModel, text: str, ids: list[int], prompt_length: int) -> None:
    """Show a text in colours, where it can have any, and the mean surprise of the prompt and of the rest."""
    bits = surprises(model, ids)
    # IDLE says that it is a terminal, but shows the codes of colours as they are; it has no TextIOWrapper.
    is_terminal = isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty()
    if is_terminal and os.name == "nt":
        os.system("")  # makes a Windows console understand colours
    show(coloured(text, bits) if is_terminal else text)
    means = []
    for part, name in ((bits[: prompt_length - 1], "prompt"), (bits[prompt_length - 1 :], "completion")):
        if part:
            means.append(f"{statistics.fmean(part):.2f} in the {name}")
    show(f"\nbits per character: {', '.join(means)}\n")


def answer(
    prompt: str, model: GPTLanguageModel, vocabulary: Vocabulary, args: argparse.Namespace, sampling: dict
) -> None:
    """Show the prompt and what the model makes of it, as it is made. Several completions, and colours, come whole."""
    ids = encode_prompt(prompt, vocabulary)
    index = torch.tensor([ids], device=args.device).expand(args.batch_size, -1)
    if args.batch_size > 1 or args.show:
        # Several texts can't grow side by side in a terminal, and bits are counted once a text is whole.
        for number, row in enumerate(model.generate(index, args.max_new_tokens, **sampling).tolist(), start=1):
            completion = vocabulary.decode(row[len(ids) :])
            if args.stop:
                completion = completion.partition(args.stop)[0]
            text = vocabulary.decode(ids) + completion
            show(f"Completion {number}:\n" if args.batch_size > 1 else "Completion:\n")
            if args.show:
                show_surprises(model, text, row[: len(text)], len(ids))
            else:
                show(f"{text}\n")
        return
    show(f"Completion:\n{vocabulary.decode(ids)}")
    tokens = model.stream(index, args.max_new_tokens, **sampling)
    characters = (vocabulary.decode([token.item()]) for token in tokens)
    try:
        for character in until(args.stop, characters) if args.stop else characters:
            show(character)
    finally:
        show("\n")


def chat(model: GPTLanguageModel, vocabulary: Vocabulary, args: argparse.Namespace, sampling: dict) -> None:
    """Answer prompts until the input ends or Ctrl-C at the prompt; Ctrl-C in an answer ends that answer."""
    while True:
        try:
            prompt = ask()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                show("\n")  # or the shell's own prompt would stand behind ours
            return
        try:
            answer(prompt, model, vocabulary, args, sampling)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)


# The command ---------------------------------------------------------------------------------------------------------


def capture(model: GPTLanguageModel, caches: list[Cache], args: argparse.Namespace) -> None:
    """Let a GPU do all the work of a token at a single call, not wait for Python to ask for one operation at a time."""
    print("compiling the model, which takes up to a minute ...", file=sys.stderr)
    try:
        model.decode = torch.compile(model.decode, mode="reduce-overhead", fullgraph=True)
        model.generate(torch.zeros(args.batch_size, 1, dtype=torch.long, device=args.device), 4, caches=caches)
    except Exception as error:  # no compiler, or one of many things that it can't do
        torch.compiler.set_stance("force_eager")  # or torch would try again for every token
        print(f"can't be done here, answers take longer: {first_line(error)}", file=sys.stderr)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser, flag = make_parser("Talk to a model that training.py has made.")
    flag("model", type=Path, default=Path("model-01.pkl"), help="file of the trained model")
    flag("vocab", type=Path, help="vocab.txt of the model, for a file that holds none, such as the tutorial's")
    flag("prompt", help="answer this prompt and exit; without it, prompts are asked for")
    flag("prompt_file", type=Path, help="answer the text in this file and exit; - reads the standard input")
    flag("max_new_tokens", type=bounded(int, 1), default=150, help="characters to add to a prompt")
    flag("stop", help="end a completion before this text")
    flag("temperature", type=bounded(float, 0), default=0.8, help="0: always the likeliest; 1: as learnt; more: wilder")
    flag("top_k", type=bounded(int, 1), help="sample only from the k likeliest characters; without it, from all")
    flag("seed", type=bounded(int, 0, below=2**63), help="makes answers repeatable; without it, they differ")
    flag("batch_size", type=bounded(int, 1), default=1, help="completions per prompt")
    colours = "green from 1/2, blue from 1/8, orange from 1/32, red below"
    flag("show", action="store_true", help=f"colour characters by the probability that the model gave them: {colours}")
    flag("device", metavar="NAME", help="cpu, cuda, cuda:1, ...; without it, cuda if there is one, else cpu")
    flag("dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; without it, what is fast here")
    args = parser.parse_args(arguments)
    if args.prompt is not None and args.prompt_file is not None:
        parser.error("argument -prompt_file: goes without -prompt")
    args.device = choose_device(parser, args.device)
    if args.dtype:
        args.dtype = getattr(torch, args.dtype)
    elif args.device.type == "cpu" and args.batch_size == 1:
        args.dtype = torch.float32  # writes a single sequence 1.1 times as fast as bfloat16
    else:
        args.dtype = default_dtype(args.device)
    return args


def run(args: argparse.Namespace) -> int:
    """Load the model and answer. Returns the exit status; raises OSError and ModelFileError."""
    given = Vocabulary.from_file(args.vocab) if args.vocab else None
    model, vocabulary = load_model(args.model, args.device, given)
    # Only the model file tells how many characters there are, so the parser can't check this.
    if args.top_k and args.top_k > len(vocabulary):
        print(f"chatbot.py: argument -top_k: the model knows only {len(vocabulary)} characters", file=sys.stderr)
        return 2
    if vocabulary.characters == REPLACEMENT:
        raise ModelFileError(f"{args.model}: knows no character but U+FFFD, so it can't answer; train on other text")
    model.to(args.dtype)
    generator = torch.Generator(args.device)
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    caches = model.new_caches(args.batch_size)
    if args.device.type == "cuda":
        capture(model, caches, args)
    sampling = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "generator": generator,
        "banned_ids": vocabulary.banned_ids,
        "caches": caches,
    }
    if args.prompt is not None:
        answer(args.prompt, model, vocabulary, args, sampling)
    elif args.prompt_file is not None:
        answer(read_prompt_file(args.prompt_file), model, vocabulary, args, sampling)
    else:
        chat(model, vocabulary, args, sampling)
    return 0


def main() -> int:
    prepare_streams("replace")
    args = parse_args()
    try:
        return run(args)
    except ModelFileError as error:
        message = str(error)
    except OSError as error:
        if not error.filename:  # all that is foreseen names a file, so this is a fault of the program
            raise
        if error.filename == STDOUT:
            sys.stdout = None  # or Python would try to write to it once more at exit, and complain
            # A reader such as `head` has seen enough and closed the pipe, for which Windows says EINVAL.
            if error.errno in (errno.EPIPE, errno.EINVAL):
                return 0
        message = f"{error.filename}: {error.strerror}"
        if error.filename == str(args.model) and isinstance(error, FileNotFoundError):
            message += "; train one with training.py, or name yours with -model"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = "not enough memory" + ("; try a smaller -batch_size" if args.batch_size > 1 else "")
    except KeyboardInterrupt:
        return 130
    print("chatbot.py: " + message.replace("\n", r"\n"), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
