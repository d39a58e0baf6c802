"""Talk to a trained model: it goes on from what you type, one character at a time.

Nothing is needed but the model file, which holds weights, shape and vocabulary. The model is not an assistant; it
continues text in the manner of the text that it was trained on.
"""

import argparse
import contextlib
import errno
import sys
from pathlib import Path

import torch

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
    prepare_streams,
)

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  (gives input() arrow keys and a history)


def encode_prompt(prompt: str, vocabulary: Vocabulary) -> list[int]:
    """The prompt's token ids; characters that the model has never seen become U+FFFD or nothing, with a notice."""
    unknown = sorted(set(prompt) - set(vocabulary.characters))
    substitute = REPLACEMENT if vocabulary.banned_ids else ""
    if unknown:
        names = " ".join(repr(character) for character in unknown)
        fate = "replaced by U+FFFD" if substitute else "left out"
        print(f"{fate}, as the model has never seen them: {names}", file=sys.stderr)
    known = "".join(character if character in vocabulary.ids else substitute for character in prompt)
    return vocabulary.encode(known or ("\n" if "\n" in vocabulary.ids else vocabulary.characters[0]))


def answer(prompt: str, model: GPTLanguageModel, vocabulary: Vocabulary, args: argparse.Namespace) -> None:
    """Print the prompt and what the model makes of it, as it is made; several completions whole, one after another."""
    ids = encode_prompt(prompt, vocabulary)
    index = torch.tensor([ids], device=args.device).expand(args.batch_size, -1)
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "generator", "caches")}
    options["banned_ids"] = vocabulary.banned_ids
    if args.batch_size > 1:
        for i, row in enumerate(model.generate(index, args.max_new_tokens, **options).tolist(), start=1):
            print(f"Completion {i}:\n{vocabulary.decode(row)}")
        return
    print(f"Completion:\n{vocabulary.decode(ids)}", end="", flush=True)
    try:
        for token in model.stream(index, args.max_new_tokens, **options):
            print(vocabulary.decode([token.item()]), end="", flush=True)
    finally:
        print()


def capture(model: GPTLanguageModel, caches: list[Cache], args: argparse.Namespace) -> None:
    """Let a GPU do all the work of a token at a single call, not wait for Python to ask for one operation at a time."""
    print("compiling the model, which takes up to a minute ...", file=sys.stderr)
    try:
        model.decode = torch.compile(model.decode, mode="reduce-overhead", fullgraph=True)
        model.generate(torch.zeros(args.batch_size, 1, dtype=torch.long, device=args.device), 4, caches=caches)
    except Exception as error:  # no compiler, or one of many things that it can't do
        torch.compiler.set_stance("force_eager")
        print(f"can't be done here, answers take longer: {first_line(error)}", file=sys.stderr)


def chat(model: GPTLanguageModel, vocabulary: Vocabulary, args: argparse.Namespace) -> None:
    """Answer prompts until the input ends or Ctrl-C at the prompt; Ctrl-C in an answer ends that answer."""
    while True:
        try:
            prompt = input("Prompt: ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            answer(prompt, model, vocabulary, args)
        except KeyboardInterrupt:
            print("(stopped)", file=sys.stderr)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser, flag = make_parser("Talk to a model that training.py has made.")
    flag("model", type=Path, default=Path("model-01.pkl"), help="file of the trained model")
    flag("vocab", type=Path, help="vocab.txt of the model, for a file that holds none, such as the tutorial's")
    flag("prompt", help="answer this prompt and exit; without it, prompts are asked for")
    flag("max_new_tokens", type=bounded(int, 1), default=150, help="characters to add to a prompt")
    flag("temperature", type=bounded(float, 0), default=0.8, help="0: always the likeliest; 1: as learnt; more: wilder")
    flag("top_k", type=bounded(int, 1), help="sample only from the k likeliest characters; without it, from all")
    flag("seed", type=bounded(int, 0, below=2**63), help="makes answers repeatable; without it, they differ")
    flag("batch_size", type=bounded(int, 1), default=1, help="completions per prompt")
    flag("device", help="cpu, cuda, cuda:1, ...; without it, cuda if there is one, else cpu")
    flag("dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; without it, what is fast here")
    args = parser.parse_args(arguments)
    dtype_given = args.dtype is not None
    args.device = choose_device(parser, args.device)
    args.dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(args.device)
    if args.device.type == "cpu" and args.batch_size == 1 and not dtype_given:
        args.dtype = torch.float32  # which writes a single sequence 1.1 times as fast as bfloat16
    return args


def run(args: argparse.Namespace) -> int:
    model, vocabulary = load_model(args.model, args.device, Vocabulary.from_file(args.vocab) if args.vocab else None)
    if args.top_k and args.top_k > len(vocabulary):
        print(f"chatbot.py: argument -top_k: the model knows only {len(vocabulary)} characters", file=sys.stderr)
        return 2
    if vocabulary.characters == REPLACEMENT:
        raise ModelFileError(f"{args.model}: knows no character but U+FFFD, so it can't answer; train on other text")
    model.to(args.dtype)
    args.generator = torch.Generator(args.device)
    args.generator.seed() if args.seed is None else args.generator.manual_seed(args.seed)
    args.caches = model.new_caches(args.batch_size)
    if args.device.type == "cuda":
        capture(model, args.caches, args)
    if args.prompt is not None:
        answer(args.prompt, model, vocabulary, args)
    else:
        chat(model, vocabulary, args)
    sys.stdout.flush()
    return 0


def main() -> int:
    prepare_streams("replace")
    args = parse_args()
    try:
        return run(args)
    except ModelFileError as error:
        message = str(error)
    except OSError as error:
        if not error.filename:
            sys.stdout = None  # or Python would try to write to it once more
            if error.errno in (errno.EPIPE, errno.EINVAL):  # a reader such as `head` has seen enough
                return 0
        message = f"{error.filename or 'standard output'}: {error.strerror}"
        if error.filename == str(args.model) and isinstance(error, FileNotFoundError):
            message += "; train one with training.py, or name yours with -model"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = "not enough memory; try a smaller -batch_size"
    except KeyboardInterrupt:
        return 130
    print("chatbot.py: " + message.replace("\n", r"\n"), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
