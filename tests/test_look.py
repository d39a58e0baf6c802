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
from conftest import assert_fails, read_folder
from reference import PlainGPT

from model import GPTLanguageModel, Vocabulary, load_model, save_model

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSERS = [path for path in map(shutil.which, NAMES) if path]
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
HIDDEN = "\u2028\u202e\ud800\0\x1b\x85\t\r"  # can't be seen, or would do something to the text
HOSTILE = f"</script><!--<b>&amp;$DATA🙂e\u0301\n{HIDDEN}"


@pytest.fixture
def look(tmp_path, run_main):
    """`look("-prompt=a", characters="abc")` gives how the chat ended, its page and the data."""

    def run(*flags, characters="\n abcdefgh", shape=(24, 3, 2, 16), typed=""):
        torch.manual_seed(1)
        model = GPTLanguageModel(len(set(characters)), *shape)
        for weights in model.parameters():
            weights.data *= 8  # or every head would look at all characters alike
        save_model(tmp_path / "model-01.pkl", model, Vocabulary(characters))
        flags = ["-look=page.html", "-temperature=0", "-max_new_tokens=6", *flags]
        done = run_main("chatbot.py", "-device=cpu", *flags, stdin=io.StringIO(typed))
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
    for block, heads in zip(data["attention"], weights, strict=True):
        for rows, expected in zip(block, heads, strict=True):
            for t, row in enumerate(rows):
                assert row == pytest.approx((1000 * expected[t, : t + 1]).tolist(), abs=0.51)
            assert len(rows) == length
    for steps, expected in zip(data["guesses"], 1000 * chances, strict=True):
        for five, row in zip(steps, expected, strict=True):
            best = row.sort(descending=True).values[:5].tolist()
            assert [share for _, share in five] == pytest.approx(best, abs=0.51)
            named = row[vocabulary.encode([character for character, _ in five])]
            assert named.tolist() == pytest.approx(best, abs=0.1)


@pytest.mark.parametrize("flags", [(), ("-show",), ("-stop=\ud800",)])
def test_no_text_can_be_markup(look, flags):
    _, page, data = look("-prompt", HOSTILE, *flags, characters=HOSTILE)
    assert data["start"] + data["cut"] == len(HOSTILE) and len(data["text"]) == 16
    written = page[page.index('id="data">') : page.rindex("<script>")]
    assert written.isascii() and written.count("<") == 1  # where the data end


def test_each_answer_is_shown_up_to_its_stop_and_the_next_takes_its_place(look):
    full = look("-prompt=bad")[2]["text"]
    stop = full[5:7]
    flags = ("-show", "-stop", stop.replace("\n", r"\n"))
    done, _, data = look(*flags, typed="abc\nbad\n")
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


def browse(page: str, folder, place: str, script: str = "") -> tuple[str, list, list]:
    """Return the page as a browser has it after this script: all of it, its texts, its guesses.

    Characters and guesses are triples of class, style and text.
    """
    if not BROWSERS:
        pytest.skip("there is no Chromium here")
    (folder / "seen.html").write_text(f"{page}<script>{script}</script>", encoding="utf-8")
    address = (folder / "seen.html").as_uri() + place
    command = [BROWSERS[0], *OPTIONS, f"--user-data-dir={folder / 'browser'}", address]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = html.unescape(done.stdout.replace("&lt;", "‹"))  # or it would look like a tag
    item = r'<{0} class="([^"]*)"(?: style="([^"]*)")?>(.*?)</{0}>'
    texts = re.findall('<p class="text".*?</p>', seen, re.DOTALL)
    characters = [re.findall(item.format("span"), text, re.DOTALL) for text in texts]
    return seen.partition("<script")[0], characters, re.findall(item.format("td"), seen)


KEYS = [f"onkeydown({{key: 'Arrow{way}'}});" for way in ("Right", "Right", "Left")]
POINT = "characters[5].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));"


@pytest.mark.parametrize(
    "place, script", [("#6", ""), ("#5", "".join(KEYS)), ("", POINT), ("#bad", POINT)]
)
def test_a_person_sees_boxes_guesses_and_the_chosen_place(look, tmp_path, place, script):
    _, page, data = look("-prompt=abcd")
    seen, (text, *boxes), guesses = browse(page, tmp_path, place, script)
    assert "is character 6 of 10, " in seen and "no more at once" not in seen
    assert [name.strip() for name, *_ in text] == [*4 * ["prompt"], "start", "chosen", *4 * [""]]
    assert len(boxes) == 2 * 3 and seen.count('<div class="row">') == 2
    for box, looks in zip(boxes, [*data["attention"][0], *data["attention"][1]]):
        assert [name for name, *_ in box] == [*5 * [""], "chosen", *4 * [""]]
        shares = [float(style.strip("-share: ;")) ** 2 / 1000 for _, style, _ in box[:6]]
        assert shares == pytest.approx(looks[5])
    expected = [
        ("right" if character == data["text"][6] else "", f"--share: {share};", character)
        for block in data["guesses"]
        for character, share in block[5]
    ]
    signs = {"␣": " ", "↵": "\n"}
    assert expected == [(*it, signs.get(shown[0], shown[0])) for *it, shown in guesses]
    assert len(guesses) == 3 * 5


def test_a_person_sees_any_text_as_text_and_how_much_was_cut(look, tmp_path):
    _, page, data = look("-prompt", HOSTILE, characters=HOSTILE)
    seen, (text, *boxes), _ = browse(page, tmp_path, "#1")
    assert "The last 16 characters: " in seen and "is character 1 of 16." in seen
    escapes = {character: f"\\u{{{ord(character):x}}}" for character in HIDDEN}
    signs = {**escapes, "\n": "↵\n", "<": "‹"}
    expected = [signs.get(character, character) for character in data["text"]]
    assert all([shown for *_, shown in part] == expected for part in (text, *boxes))
