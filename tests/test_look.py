"""The page of `chatbot.py -look`: its numbers, what it does with any text, and how it looks.

The numbers are compared with the plain maths in reference.py. Chromium, where there is one, shows
what a person would see.
"""

import html
import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import assert_fails, put, read_folder
from reference import PlainGPT

from model import GPTLanguageModel, Vocabulary, load_model, save_model

BROWSERS = [*filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))]
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
HIDDEN = "\u2028\u202e\ud800\0\x1b\x85\t\r"  # can't be seen, or would do something to the text
HOSTILE = f"</script><!--<b>&amp;$DATA🙂e\u0301\n{HIDDEN}"


@pytest.fixture
def look(tmp_path, run_main):
    """`look("-prompt=a", characters="abc")` gives how the chat ended, its page and the data."""

    def run(*flags, characters="\n abcdefgh", shape=(24, 3, 2, 16), typed=""):
        torch.manual_seed(1)
        model = GPTLanguageModel(len(set(characters)), *shape)
        weights = model.state_dict()  # as they are, every head would look at all characters alike
        model.load_state_dict({name: 8 * weight for name, weight in weights.items()})
        save_model(tmp_path / "model-01.pkl", model, Vocabulary(characters))
        fixed = ("-device=cpu", "-look=page.html", "-temperature=0", "-max_new_tokens=6")
        done = run_main("chatbot.py", *fixed, *flags, stdin=io.StringIO(typed))
        page = read_folder(tmp_path).get("page.html", b"").decode()
        found = re.search('<script type="application/json" id="data">(.*?)</script>', page)
        return done, page, json.loads(found[1]) if found else None

    return run


@pytest.mark.parametrize("shape", [(24, 3, 2, 16), (8, 1, 1, 20), (12, 2, 3, 5), (4, 1, 1, 1)])
@pytest.mark.parametrize("characters", ["\n abcdefgh", "ab "])
def test_the_numbers_are_those_of_the_plain_maths(look, tmp_path, shape, characters):
    done, _, data = look("-prompt=ab ", characters=characters, shape=shape)
    length = min(9, shape[3])
    assert data["text"] == done.stdout.removeprefix("Completion:\n")[:-1][-length:]
    assert (data["cut"], data["start"]) == (9 - length, 3 - (9 - length))
    model, vocabulary = load_model(tmp_path / "model-01.pkl")
    plain = PlainGPT(**model.config).eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([vocabulary.encode(data["text"])])
    weights, chances = plain.inside(ids)
    given = chances[-1, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert data["bits"] == pytest.approx((-given.log2()).tolist(), abs=2e-3)
    # The rows of each head are a triangle; zeros make it the square that it is in the maths.
    square = [
        [[row + [0] * (length - t - 1) for t, row in enumerate(head)] for head in heads]
        for heads in data["attention"]
    ]
    torch.testing.assert_close(torch.tensor(square) / 1000, weights, atol=6e-4, rtol=0)
    best = chances.topk(min(5, len(vocabulary))).values
    shares = [[[share for _, share in five] for five in steps] for steps in data["guesses"]]
    named = [[vocabulary.encode(dict(five)) for five in steps] for steps in data["guesses"]]
    torch.testing.assert_close(torch.tensor(shares) / 1000, best, atol=6e-4, rtol=0)
    torch.testing.assert_close(chances.gather(2, torch.tensor(named)), best, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flags", [(), ("-show",), ("-stop=\ud800",)])
def test_no_text_can_be_markup(look, flags):
    _, page, data = look("-prompt", HOSTILE, *flags, characters=HOSTILE)
    assert data["start"] + data["cut"] == len(HOSTILE) and len(data["text"]) == 16
    written = page[page.index('id="data">') : page.rindex("<script>")]
    assert written.isascii() and written.count("<") == 1  # where the data end


def test_each_answer_is_shown_up_to_its_stop_and_the_next_takes_its_place(look):
    full = look("-prompt=bad")[2]["text"]
    stop = full[5:7]
    done, _, data = look("-show", "-stop", stop.replace("\n", r"\n"), typed="abc\nbad\n")
    assert data["text"] == "bad" + full[3:].partition(stop)[0]
    assert done.stderr == "wrote page.html; open it in a browser\n" * 2


@pytest.mark.parametrize(
    "flag, status, message",
    [
        ("-look=gone/page.html", 1, "gone/page.html: "),
        ("-look=.", 1, r"\.: "),
        ("-batch_size=2", 2, "argument -look: shows one completion only"),
        ("-look=model-01.pkl", 2, "argument -look: model-01.pkl is no name for a page"),
    ],
)
def test_what_can_be_foreseen_is_one_line_and_leaves_nothing(look, tmp_path, flag, status, message):
    assert_fails(look("-prompt=a", flag)[0], message, status)
    assert list(read_folder(tmp_path)) == ["model-01.pkl"]
    assert load_model(tmp_path / "model-01.pkl")


# What a person sees, as data: of each character and guess its class, text and strength
SEEN = """
const all = (names, parent = document) => [...parent.querySelectorAll(names)];
const see = part => [part.className, part.textContent, +part.style.getPropertyValue("--share")];
const texts = all(".text").map(text => all("span", text).map(see));
const seen = { texts, guesses: all("td").map(see), rows: all(".row").length, about: $("about")
  .textContent, read: $("read").textContent, place: $("place").value };
document.body.replaceChildren(JSON.stringify(seen));
"""
ACTIONS = {  # by what is behind the address of the page
    "#6": "",
    "#5": "for (const way of ['Right', 'Right', 'Left']) onkeydown({ key: `Arrow${way}` });",
    "": "characters[5].dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));"
    "choose(16);",
    "#bad": "$('place').value = 6; $('place').dispatchEvent(new Event('input'));",
}


def named(character: str) -> str:
    """Return how the page names a single character."""
    sign = f"\\u{{{ord(character):x}}}" if character in HIDDEN else character
    return {" ": "␣", "\n": "↵"}.get(character, sign)


@pytest.mark.skipif(not BROWSERS, reason="there is no Chromium here")
@pytest.mark.parametrize(
    "prompt, characters", [("abcd", "\n abcdefgh"), (HOSTILE, HOSTILE)], ids=["plain", "hostile"]
)
@pytest.mark.parametrize("place", ACTIONS)
def test_a_person_sees_text_guesses_and_boxes(look, tmp_path, capfd, prompt, characters, place):
    _, page, data = look("-prompt", prompt, characters=characters)
    put(tmp_path, {"seen.html": f"{page}<script>{ACTIONS[place]}{SEEN}</script>".encode()})
    address = (tmp_path / "seen.html").as_uri() + place
    # To the files of capfd: at a time-out, pipes would be waited for until all of Chromium's
    # processes end.
    subprocess.run([BROWSERS[0], *OPTIONS, f"--user-data-dir={tmp_path}", address], timeout=60)
    shown, errors = capfd.readouterr()
    assert "CONSOLE" not in errors, errors
    seen = json.loads(html.unescape(re.search("<body>(.*)</body>", shown)[1]))
    text, *boxes = seen["texts"]
    length, start = len(data["text"]), data["start"]
    assert seen["read"].startswith(f"“{named(data['text'][5])}” is character 6 of {length}, ")
    assert ("no more at once" in seen["about"]) == (prompt == HOSTILE)
    assert (seen["place"], seen["rows"]) == ("6", 2)

    signs = [{" ": " ", "\n": "↵\n"}.get(character, named(character)) for character in data["text"]]
    assert [[sign for _, sign, _ in part] for part in seen["texts"]] == [signs] * (1 + 2 * 3)
    kinds = [*["prompt"] * start, "start", *[""] * (length - start - 1)]
    kinds[5] = f"{kinds[5]} chosen".strip()
    assert [kind for kind, *_ in text] == kinds

    kinds = [*[""] * 5, "chosen", *[""] * (length - 6)]
    assert [[kind for kind, *_ in box] for box in boxes] == [kinds] * 6
    strengths = [strength**2 / 1000 for box in boxes for *_, strength in box[:6]]
    looks = [share for heads in data["attention"] for head in heads for share in head[5]]
    assert strengths == pytest.approx(looks)

    fives = [five for block in data["guesses"] for five in block[5]]
    expected = [["right" * (c == data["text"][6]), named(c), share] for c, share in fives]
    guesses = [[kind, sign.partition(" ")[0], share] for kind, sign, share in seen["guesses"]]
    assert guesses == expected and len(guesses) == 3 * 5
