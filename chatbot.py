"""Talk to a trained model: it goes on from what you type, one character at a time.

    python chatbot.py
    python chatbot.py -prompt "It was" -show
    python chatbot.py -prompt "It was" -look page.html

Only the model file is needed, which holds weights, shape and vocabulary. The model is not an
assistant; it continues text in the manner of the text that it was trained on.
"""

import contextlib
import errno
import io
import json
import math
import os
import sys
from argparse import Namespace
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from model import (
    GPTLanguageModel,
    Parser,
    Vocabulary,
    atomic_write,
    attention,
    bounded,
    device,
    explain,
    load_model,
    prepare_streams,
    show,
)

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  (gives input() arrow keys and a history)

# Colours of a terminal, each for surprises up to so many bits; readable on white and on black
COLOURS = {1: 28, 3: 32, 5: 166, math.inf: 160}  # green, blue, orange, red


# Prompts ------------------------------------------------------------------------------------------


def text(typed: str) -> str:
    r"""Turn each \n that was typed as two characters into a line end.

    The shells of Windows can't pass on a real one.
    """
    return typed.replace("\\n", "\n")


def ask() -> str:
    """Return the next prompt that is typed or piped in. Raises EOFError at the end of the input."""
    prompt = input("Prompt: " if sys.stdin.isatty() else "")
    # Windows may put a byte-order mark before what is piped, also where it is read as cp1252,
    # and \r behind each line.
    mark = BOM_UTF8.decode(sys.stdin.encoding or "utf-8", "replace")
    return text(prompt.removeprefix(mark).removesuffix("\r"))


def read_prompt(path: Path) -> str:
    """Return the text in a file: UTF-8, or UTF-16 with a byte-order mark. Raises OSError."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig"
    return io.TextIOWrapper(io.BytesIO(content), encoding, errors="replace").read()


def encode_prompt(prompt: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of a prompt. Characters that the model does not know are told in a notice.

    They are read as U+FFFD if the vocabulary has it; otherwise they are left out.
    """
    unknown = sorted(set(prompt) - vocabulary.ids.keys())
    if unknown:
        fate = "replaced by U+FFFD" if vocabulary.substitute else "left out"
        names = " ".join(map(repr, unknown))
        show(f"{fate}, as the model has never seen them: {names}", sys.stderr)
    for character in unknown:
        prompt = prompt.replace(character, vocabulary.substitute)
    return vocabulary.encode(prompt) or [vocabulary.ids.get("\n", 0)]  # something to go on from


# Answers ------------------------------------------------------------------------------------------


def until(stop: str, characters: Iterable[str]) -> Iterator[str]:
    """Yield the characters before the text `stop`; all of them if it is empty.

    The last len(stop) - 1 are held back until it is known that they do not begin it.
    """
    held = ""
    for character in characters:
        held += character
        if held == stop:
            return
        if len(held) >= len(stop):
            yield held[0]
            held = held[1:]
    yield held


def read_together(columns: Iterable[str], stop: str, count: int) -> list[str]:
    """Return the texts of completions that are made together, each up to its own `stop`.

    Each column has the next character of every completion.
    """
    texts = [""] * count
    for column in columns:
        texts = [text + character for text, character in zip(texts, column)]
        if stop and all(stop in text for text in texts):
            break
    return ["".join(until(stop, text)) for text in texts]


@torch.inference_mode()
def surprises(model: GPTLanguageModel, ids: list[int]) -> list[float]:
    """Return how many bits each token but the first was worth: -log2 of its probability.

    The model sees at least half a window of the text before each token.
    """
    bits = []
    done = 1  # the first token has nothing before it to be predicted from
    while done < len(ids):
        start = max(0, done - max(1, model.block_size // 2))
        window = torch.tensor(
            ids[start : start + model.block_size + 1], device=model.lm_head.weight.device
        )
        logits, _ = model(window[None, :-1])
        nats = F.cross_entropy(logits[0], window[1:], reduction="none")  # of window[1], window[2]…
        # Those before `done` are known from the window before.
        bits += (nats[done - start - 1 :] / math.log(2)).tolist()
        done = start + len(window)
    return bits


def show_surprises(completion: str, bits: list[float], prompt_length: int) -> None:
    """Show each character but the first in the colour of its bits, and the parts' mean bits."""
    # IDLE says that it is a terminal, but shows the codes of colours as they are; it has no
    # TextIOWrapper.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
        if os.name == "nt":
            os.system("")  # lets a Windows console show colours
        try:
            show(completion[0], end="")
            for character, surprise in zip(completion[1:], bits):
                colour = next(colour for limit, colour in COLOURS.items() if surprise <= limit)
                print(f"\033[38;5;{colour}m", end="")  # "38;5" selects one of 256 colours
                show(character, end="")
        finally:  # also after Ctrl-C, or the terminal would stay coloured
            print("\033[0m")
    else:
        show(completion)
    parts = {"prompt": bits[: prompt_length - 1], "completion": bits[prompt_length - 1 :]}
    means = [f"{sum(part) / len(part):.2f} in the {name}" for name, part in parts.items() if part]
    if means:
        show(f"bits per character: {', '.join(means)}")


def answer(prompt: str, model: GPTLanguageModel, vocabulary: Vocabulary, args: Namespace) -> None:
    """Show the prompt and what the model makes of it, and write the page of -look.

    A completion appears as it is made; with colours, or if there are several, once all are whole.
    """
    ids = encode_prompt(prompt, vocabulary)
    index = torch.tensor([ids] * args.batch_size, device=args.device)
    options = (args.max_new_tokens, args.temperature, args.top_k, args.generator)
    # One character for each completion, then the next ones, as long as they are asked for.
    columns = (vocabulary.decode(new[:, 0].tolist()) for new in model.stream(index, *options))
    if args.batch_size > 1:
        endings = read_together(columns, args.stop, args.batch_size)
    else:
        endings = [until(args.stop, columns)]
    for number, ending in enumerate(endings, 1):
        show(f"Completion {number}:" if args.batch_size > 1 else "Completion:")
        completion = vocabulary.decode(ids)
        if args.show:
            completion += "".join(ending)
            show_surprises(completion, surprises(model, vocabulary.encode(completion)), len(ids))
            continue
        show(completion, end="")
        try:
            for character in ending:
                show(character, end="")
                completion += character
        finally:
            show("")
    if args.look:  # shows the only one
        read = vocabulary.encode(completion)
        cut = max(0, len(read) - model.block_size)  # the model sees no more at once
        data = look_inside(model, vocabulary, read[cut:])
        write_page(args.look, {"cut": cut, "start": len(ids) - cut, **data})


def chat(model: GPTLanguageModel, vocabulary: Vocabulary, args: Namespace) -> None:
    """Answer prompts until the input ends or Ctrl-C at the prompt; in an answer it ends that."""
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


# Looking inside -----------------------------------------------------------------------------------


@torch.inference_mode()
def look_inside(model: GPTLanguageModel, vocabulary: Vocabulary, ids: list[int]) -> dict:
    """Return what heads and blocks make of a text of at most `block_size` tokens, as plain data.

    `bits`: the surprise of each character but the first. `attention[block][head][t][s]`: how much
    of what a head takes over at time step t comes from s, for s <= t. `guesses[0 … blocks][t]`: the
    five likeliest [character, probability] to follow t, before the first block and after each.
    Attention and probabilities are in thousandths.
    """
    T = len(ids)
    index = torch.tensor([ids], device=model.lm_head.weight.device)
    x = model.embed(index, start=0)  # (1, T, C)
    # If every value is 1 at a place of its own, the weighted means of the values are the weights.
    one_each = torch.eye(T, device=x.device)
    states, maps, guesses = [x], [], []
    for block in model.blocks:
        maps.append([])
        for head in block.sa.heads:
            q, k, visible = head.query(x), head.key(x), head.tril[:T, :T]
            weights = attention(q, k, one_each, visible, head.dropout)[0]
            rows = (1000 * weights).round().int().tolist()
            maps[-1].append([row[: t + 1] for t, row in enumerate(rows)])
        x = block(x)
        states.append(x)
    for x in states:  # as if the model ended there
        probabilities = F.softmax(model.lm_head(model.ln_f(x[0])), dim=-1)
        shares, likeliest = probabilities.topk(min(5, len(vocabulary)))  # (T, 5)
        rows = zip(likeliest.tolist(), (1000 * shares).round().int().tolist())
        guesses.append([list(zip(vocabulary.decode(five), row)) for five, row in rows])
    return {
        "text": vocabulary.decode(ids),
        "bits": [round(surprise, 3) for surprise in surprises(model, ids)],
        "attention": maps,
        "guesses": guesses,
    }


def write_page(path: Path, data: dict) -> None:
    """Write the page that shows what `look_inside` has returned. Raises OSError."""
    # Without a "<", nothing in a text can be markup.
    content = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")
    with atomic_write(path) as file:
        file.write(PAGE.replace("$DATA", content).encode())
    show(f"wrote {path}; open it in a browser", sys.stderr)


# The command --------------------------------------------------------------------------------------


def parse_args() -> tuple[Namespace, GPTLanguageModel, Vocabulary]:
    """Return the flags, and the model and its vocabulary. Raises OSError and ModelFileError."""
    positive, any_seed = bounded(int, 1), bounded(int, 0, below=2**63)
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    # fmt: off
    flags = [
        ("model", Path, Path("model-01.pkl"), "file of the trained model"),
        ("vocab", Path, None, "vocab.txt of a model whose file holds none, such as the tutorial's"),
        ("prompt", text, None, r"answer this prompt and exit; \n in it means a line end"),
        ("prompt_file", Path, None, "answer the text in this file and exit"),
        ("max_new_tokens", positive, 150, "characters to add to a prompt"),
        ("stop", text, "", r"end a completion before this text; \n in it means a line end"),
        ("temperature", bounded(float, 0), 0.8,
            "0: always the likeliest; 1: as learnt; more: wilder"),
        ("top_k", positive, None, "sample only from the k likeliest characters (default: all)"),
        ("seed", any_seed, None, "makes answers repeatable (default: they differ)"),
        ("batch_size", positive, 1, "completions per prompt, made together"),
        ("show", {"action": "store_true"}, None,
            "colours by probability: green from 1/2, blue 1/8, orange 1/32, red below"),
        ("look", Path, None, "write a page that shows the inside of the model, as page.html"),
        ("device", device, fastest, "cpu, cuda, cuda:1, ..."),
    ]
    # fmt: on
    parser = Parser("Talk to a model that training.py has made.", flags)
    args, _ = parser.parse()
    parser.error_if(
        args.look and args.batch_size > 1,
        "argument -look: shows one completion only; leave out -batch_size",
    )
    parser.error_if(
        args.look and args.look.suffix == ".pkl",  # which would be lost
        f"argument -look: {args.look} is no name for a page; try page.html",
    )
    given = Vocabulary.from_file(args.vocab) if args.vocab else None
    model, vocabulary = load_model(args.model, args.device, given)
    parser.error_if(
        args.top_k and args.top_k > len(vocabulary),
        f"argument -top_k: the model knows only {len(vocabulary)} characters",
    )
    seed = torch.seed() if args.seed is None else args.seed
    args.generator = torch.Generator(args.device).manual_seed(seed)
    return args, model, vocabulary


def main() -> int:
    prepare_streams()
    try:
        args, model, vocabulary = parse_args()
        if args.prompt_file:
            args.prompt = read_prompt(args.prompt_file)
        if args.prompt is None:
            chat(model, vocabulary, args)
        else:
            answer(args.prompt, model, vocabulary, args)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        # A reader such as `head` has seen enough. Windows calls it an invalid argument.
        is_end = getattr(error, "errno", None) in (errno.EPIPE, errno.EINVAL)
        if is_end and error.filename == "standard output":
            return 0
        if isinstance(error, FileNotFoundError) and str(error.filename).endswith(".pkl"):
            message += "; train a model with training.py, or name yours with -model"
        show(f"chatbot.py: {message}".replace("\n", r"\n"), sys.stderr)
        return 1


# The page of -look, which needs no network --------------------------------------------------------

PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Inside a GPT</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"><style>
:root { color-scheme: light dark; --paper: #f1f1f6; --card: #fff; --ink: #191b24; --soft: #595e70;
  --ring: #6d28d9; --s0: #22c55e44; --s1: #3b82f644; --s2: #f9731655; --s3: #f43f5e66; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1117; --card: #191c25; --ink: #e9ebf2;
  --soft: #a2a8ba; --ring: #b794ff; } }
body { font: 15px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 75rem; margin: auto; padding: .8rem; accent-color: var(--ring); }
h1, h2, p, figure { margin: 0 0 .5rem; } h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; }
small, th, figcaption { color: var(--soft); font: .85rem/1.4 system-ui, sans-serif; }
main, .row { display: grid; gap: .7rem; --least: 28rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); }
section { background: var(--card); padding: .9rem 1rem; border-radius: .6rem; min-width: 0; }
section:last-child { grid-column: 1 / -1; } input, table { width: 100%; } #text { cursor: pointer; }
.text, td { font: 1rem/1.6 ui-monospace, monospace; white-space: break-spaces; }
.text, td { overflow-wrap: anywhere; } i { font-style: normal; padding: 0 .3rem; }
.chosen, .right, :focus-visible { outline: 2px solid var(--ring); } .right::after { content: " ✓"; }
.prompt { font-weight: bold; } .start { border-left: 3px solid var(--ring); }
th { white-space: nowrap; } td { width: 18%; padding: 0 .3rem; border-radius: 3px;
  background: linear-gradient(90deg, #a78bfa88 calc(var(--share) * .1%), var(--paper) 0); }
figure { content-visibility: auto; contain-intrinsic-size: auto 6rem; padding: 2px; }
.row { --least: 13rem; } .row .text { font-size: .7rem; line-height: 1.3; margin: 0; }
.row span { background: hsl(265 90% 66% / calc(.0008 * var(--share, 0))); }
.row .chosen ~ span { background: none; opacity: .4; }
</style><h1>Inside a GPT</h1><p id="about"></p>
<main><section><h2>The text, coloured by surprise</h2><p><small>The chance that the model gave each
  character before it read it: <i style="background: var(--s0)">1/2 or more</i>
  <i style="background: var(--s1)">1/8</i> <i style="background: var(--s2)">1/32</i>
  <i style="background: var(--s3)">less</i>. Bold: the prompt. Look for words: their first letter
  surprises most, their end hardly at all.</small><p class="text" id="text"></p>
  <input type="range" id="place" min="1" aria-label="Chosen character"><p id="read" role="status">
</section><section><h2>What it would guess next, after each block</h2><p><small>As if the model
  ended there. Before block 1 it knows this one character only; each block adds what it finds in
  those before. Look for the block that brings up what really follows (✓).</small>
  <table id="guesses"></table></section>
<section id="heads"><h2>Where each head looks</h2><p><small>The stronger the colour, the more of
  what a head takes over comes from there; above, where it looks most. Grey is not read yet. Look
  for heads that look at the last space, the first letter of the word, the character before, or at
  nothing in particular.</small></section></main>
<script type="application/json" id="data">$DATA</script><script>
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
const text = [...data.text], boxes = [], percent = share => `${Math.round(share / 10)}\u00a0%`;
const sign = c => ({ " ": "␣", "\n": "↵" })[c] ??  // also of what can't be seen
  (/[\p{C}\p{Z}]/u.test(c) ? `\\u{${c.codePointAt().toString(16)}}` : c);
const add = (parent, tag, textContent = "", className = "") =>  // as text, never as markup
  Object.assign(parent.appendChild(document.createElement(tag)), { textContent, className });
const write = p => text.map(c => add(p, "span", c === " " ? c : sign(c) + (c === "\n" ? c : "")));
const characters = write($("text"));
characters.forEach((span, t) => {
  const level = [1, 3, 5].filter(limit => data.bits[t - 1] > limit).length;
  if (t) span.style.background = `var(--s${level})`;
  span.className = t < data.start ? "prompt" : t === data.start ? "start" : "";
});
data.attention.forEach((heads, block) => {
  const row = add($("heads"), "div", "", "row");
  heads.forEach((looks, head) => {
    const box = add(row, "figure"), caption = add(box, "figcaption"), p = add(box, "p", "", "text");
    p.ariaHidden = "true";
    boxes.push({ looks, caption, name: `Block ${block + 1}, head ${head + 1}`, spans: write(p) });
  });
});
let chosen, held = false;
function choose(t) {
  if (!(t in text)) return;
  for (const span of document.querySelectorAll(".chosen")) span.classList.remove("chosen");
  for (const { looks, caption, name, spans } of boxes) {
    const share = Math.max(...looks[t]), most = text[looks[t].indexOf(share)];
    caption.textContent = `${name}: “${sign(most)}” ${percent(share)}`;
    looks[t].forEach((share, s) => spans[s].style.setProperty("--share", Math.sqrt(1000 * share)));
    spans[t].className = "chosen";
  }
  $("guesses").replaceChildren();
  data.guesses.forEach((steps, block) => {
    const row = add($("guesses"), "tr");
    add(row, "th", block ? `block ${block}` : "before");
    for (const [c, share] of steps[t]) {
      const cell = add(row, "td", `${sign(c)} ${percent(share)}`, c === text[t + 1] ? "right" : "");
      cell.style.setProperty("--share", share);
    }
  });
  const bits = data.bits[t - 1];
  const cost = t ? `, ${bits.toFixed(1)} bits: a chance of ${percent(1000 / 2 ** bits)}` : "";
  $("read").textContent = `“${sign(text[t])}” is character ${t + 1} of ${text.length}${cost}.`;
  characters[t].classList.add("chosen");
  chosen = t;
  $("place").value = t + 1;
}
const cut = data.cut ? `The last ${text.length} characters: the model sees no more at once. ` : "";
$("about").textContent = cut + "Move over a character, touch it, or use ← and →; a click holds it.";
$("place").max = text.length;
$("place").oninput = event => choose(event.target.value - 1);
$("text").onpointerover = event => held || choose(characters.indexOf(event.target));
$("text").onclick = event => { held = !held; choose(characters.indexOf(event.target)); };
onkeydown = event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && event.target !== $("place")) choose(chosen + step);
};
choose(Math.max(0, data.start - 1));
choose(location.hash.slice(1) - 1);  // page.html#12 shows the twelfth character
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
