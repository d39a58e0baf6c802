"""model.py: the mathematics of the design, generation with a cache, and model files that run no
code.
"""

import argparse
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections import Counter, defaultdict, deque
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, put, wait_for, write_texts
from hostile import ATTACKS, calls, hostile_files
from reference import PlainGPT

import model as gpt
from model import GPTLanguageModel, ModelFileError, Vocabulary, load_model, save_model

SHAPE = {"vocab_size": 11, "n_embd": 24, "n_head": 3, "n_layer": 2, "block_size": 16}
VOCABULARY = Vocabulary("abcdefghijk")


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = GPTLanguageModel(**SHAPE, dropout=0.0)
    with torch.no_grad():  # weights far from their small initial values, so that differences show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture
def plain(model):
    plain = PlainGPT(**SHAPE, dropout=0.0)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


@pytest.fixture(params=["as one operation", "as it is spelt out"])
def both_ways(request, monkeypatch):
    """Run attention in both of its ways."""
    if request.param == "as it is spelt out":
        monkeypatch.setattr(
            gpt, "fused_attention", lambda *arguments, is_causal: gpt.attention(*arguments)
        )


def random_ids(*shape):
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(2))


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p):
    torch.manual_seed(6)
    x = torch.ones(1001, 999, requires_grad=True)
    y = gpt.Dropout(p)(x)
    assert (y == 0).any() and (y != 0).float().mean().item() == pytest.approx(1 - p, abs=0.002)
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=0.02)
    assert y.mean().item() == pytest.approx(1, rel=0.05)
    y.sum().backward()
    assert torch.equal(
        x.grad, y.detach()
    )  # what was dropped gets no gradient, the rest the same factor


def test_dropout_takes_any_size_and_repeats_with_the_seed():
    for x in map(torch.ones, (1, 7, 8, 9, 1023)):
        states = [torch.manual_seed(7).get_state()] * 2
        first, second = (torch.set_rng_state(state) or gpt.Dropout(0.5)(x) for state in states)
        assert first.equal(second)
        assert gpt.Dropout(0.5).eval()(x).equal(x) and gpt.Dropout(0.0)(x).equal(x)


def test_dropout_on_attention_weights_drops_whole_weights_at_the_right_scale():
    torch.manual_seed(8)
    head = gpt.Head(head_size=32, n_embd=64, block_size=32, dropout=0.25)
    eye = torch.eye(32).expand(500, 2, 32, 32)
    equal = torch.zeros(500, 2, 32, 32)
    for is_causal in (True, False):
        weights = gpt.fused_attention(
            equal, equal, eye, head.tril, head.dropout, is_causal
        )  # since the values are 1
        kept = weights[:, :, -1] != 0
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
        torch.testing.assert_close(weights[:, :, -1][kept].unique(), torch.tensor([1 / 32 / 0.75]))
        assert not weights.triu(1).any()


def test_multi_head_attention_equals_its_heads_one_by_one(both_ways):
    torch.manual_seed(3)
    many = gpt.MultiHeadAttention(
        num_heads=4, head_size=8, n_embd=32, block_size=20, dropout=0.3
    ).eval()
    for time_steps in (1, 7, 20):
        x = torch.randn(5, time_steps, 32)
        one_by_one = many.proj(torch.cat([head(x) for head in many.heads], dim=-1))
        torch.testing.assert_close(many(x), one_by_one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (3, 8), (1, 8)], ids=str)
def test_fused_attention_sees_what_its_mask_says(shape):
    torch.manual_seed(5)
    time_steps, others = shape
    q, k, v = (
        torch.randn(2, 3, time_steps, 4),
        torch.randn(2, 3, others, 4),
        torch.randn(2, 3, others, 4),
    )
    visible = torch.rand(shape) < 0.5  # no triangle, also where it is square
    visible[:, 2] = True
    expected = gpt.attention(q, k, v, visible, gpt.Dropout(0.0))
    torch.testing.assert_close(
        gpt.fused_attention(q, k, v, visible, gpt.Dropout(0.0), is_causal=False), expected
    )


def test_weights_have_the_names_and_shapes_of_the_tutorial_and_masks_are_not_in_the_file():
    model = GPTLanguageModel(100)
    shape = {"vocab_size": 100, "n_embd": 384, "n_head": 4, "n_layer": 4, "block_size": 128}
    assert model.config == {**shape, "dropout": 0.2}
    PlainGPT(100).load_state_dict(model.state_dict())  # which is strict
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    masks = dict(model.to("meta").named_buffers())
    assert masks.keys() == {f"blocks.{b}.sa.heads.{h}.tril" for b in range(4) for h in range(4)}
    assert all((mask.dtype, mask.device.type) == (torch.bool, "meta") for mask in masks.values())


def test_initial_weights_are_small_normal_and_biases_zero():
    torch.manual_seed(5)
    model = GPTLanguageModel(vocab_size=200, n_embd=128, n_layer=2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln" not in name and "ln_f" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.001, name


BAD_SHAPES = [
    *({name: value} for name in SHAPE for value in (0, -1)),
    {"n_embd": 25},
    {"n_head": 5},
]


@pytest.mark.parametrize(
    "arguments", [*BAD_SHAPES, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": math.nan}]
)
def test_impossible_shapes_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        GPTLanguageModel(**{**SHAPE, **arguments})


@pytest.mark.parametrize("time_steps", [1, 2, 15, 16])
def test_logits_loss_and_gradients_equal_those_of_the_reference(
    model, plain, time_steps, both_ways
):
    index, targets = random_ids(3, time_steps), random_ids(3, time_steps).flip(0)
    (logits, loss), (plain_logits, plain_loss) = model(index, targets), plain(index, targets)
    torch.testing.assert_close(logits, plain_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, plain_loss, atol=1e-6, rtol=1e-6)
    loss.backward()
    plain_loss.backward()
    plain_gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain_gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 16)])
def test_logits_are_the_same_with_and_without_gradients(model, shape, threads):
    torch.set_num_threads(
        threads
    )  # by which a multiplication by a single row is cut, where that goes
    with torch.no_grad():
        without, loss = model(random_ids(*shape))
    assert without.shape == (*shape, SHAPE["vocab_size"]) and loss is None
    torch.testing.assert_close(without, model(random_ids(*shape))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 0), (1, 17), (4, 100)])
def test_no_time_steps_and_too_many_are_refused(model, shape):
    with pytest.raises(ValueError, match="1 to 16 time steps"):
        model(torch.zeros(shape, dtype=torch.long))


# Generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[16], [1] * 16, [5, 1, 1, 9], [15, 1]], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_logits_with_a_cache_equal_those_without(model, lengths, gradients, both_ways):
    index = random_ids(2, 16)
    expected = model(index)[0]
    with torch.set_grad_enabled(gradients):
        caches = [gpt.Cache(block.sa, 2) for block in model.blocks]
        logits = [model.next_logits(part, caches) for part in index.split(lengths, dim=1)]
    ends = torch.tensor(lengths).cumsum(0) - 1
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, ends], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [3, 16, 40])
def test_the_model_sees_all_of_a_short_text_and_half_a_window_to_a_window_of_a_long_one(
    model, plain, length
):
    prompt = random_ids(2, length)
    text = model.generate(prompt, 30, temperature=0)
    assert text.shape == (2, length + 30) and text[:, :length].equal(prompt)
    seen = min(
        length, 16
    )  # a prompt is cropped to the window; a full window is started anew from its second half
    for position in range(length, length + 30):
        seen = seen if seen <= 16 else 8
        expected = plain(text[:, position - seen : position])[0][:, -1].argmax(-1)
        assert text[:, position].equal(expected), position
        seen += 1


def test_stream_yields_what_generate_returns_and_repeats_with_the_generator(model):
    prompt, seeds = random_ids(2, 4), [1, 1, 2, 1]
    *options, last = (
        {"top_k": 5, "generator": torch.Generator().manual_seed(seed)} for seed in seeds
    )
    first, same, other = (
        model.generate(prompt, 20, temperature=1.3, **option) for option in options
    )
    assert first.equal(same) and not first.equal(other)
    assert torch.cat([prompt, *model.stream(prompt, 20, temperature=1.3, **last)], dim=1).equal(
        first
    )


@pytest.mark.parametrize(("temperature", "top_k"), [(2.0, 4), (1.0, None), (0.5, 3), (1.0, 11)])
def test_sampling_follows_temperature_and_top_k(model, temperature, top_k):
    prompt = random_ids(1, 2).expand(20000, 2)
    logits = model(prompt[:1])[0][0, -1]
    likeliest = logits.topk(top_k or 11).indices
    expected = torch.zeros(11)
    expected[likeliest] = torch.softmax(logits[likeliest] / temperature, dim=0)
    options = {"top_k": top_k, "generator": torch.Generator().manual_seed(9)}
    drawn = model.generate(prompt, 1, temperature=temperature, **options)[:, -1]
    shares = drawn.bincount(minlength=11) / len(drawn)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert not shares[expected == 0].any()
    for greedy in ({"temperature": 0}, {"temperature": 1e-40}, {"top_k": 1}):
        assert model.generate(prompt[:1], 1, **{**options, **greedy})[0, -1] == logits.argmax()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_keeps_exactly_k_of_equally_likely_tokens(dtype):
    logits = torch.zeros(2000, 9, dtype=dtype)
    logits[:, 3] = 1
    drawn = gpt.sample(logits, 1.0, 4, torch.Generator().manual_seed(1))
    assert len(drawn.unique()) == 4 and (drawn == 3).any()
    assert gpt.sample(logits, 1.0, 1, None).unique().tolist() == [3]
    assert len(gpt.sample(logits * 0, 1.0, 1, None).unique()) == 1


@pytest.mark.parametrize("training", [True, False])
def test_generation_needs_no_gradients_and_leaves_the_mode_as_it_was(model, training):
    model.train(training)
    text = model.generate(random_ids(1, 3), 5)
    assert model.training is training and not text.requires_grad
    model(text, text)[1].backward()  # what was generated may be learnt from
    stream = model.stream(random_ids(1, 3), 5)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()  # a reader may stop early
    assert model.training is training


BAD_OPTIONS = [{"top_k": 0}, {"top_k": 12}, {"temperature": -0.5}, {"temperature": math.nan}]


@pytest.mark.parametrize(
    "options", [{"index": [[]]}, {"index": [[11]]}, {"index": [[-1]]}, *BAD_OPTIONS]
)
def test_generation_refuses_bad_ids_and_options(model, options):
    with pytest.raises(ValueError, match="must be"):
        model.generate(
            max_new_tokens=1,
            **{**options, "index": torch.tensor(options.get("index", [[0]])).long()},
        )


# The vocabulary -----------------------------------------------------------------------------------


def test_a_vocabulary_turns_text_into_ids_and_back():
    vocabulary = Vocabulary("\n\t aé“中🙂a")
    assert len(vocabulary) == 8 and vocabulary.characters == "".join(sorted("\n\t aé“中🙂"))
    assert vocabulary.encode("\t\n🙂") == [0, 1, 7]
    assert vocabulary.decode(vocabulary.encode("中 é\n🙂")) == "中 é\n🙂"
    with pytest.raises(ValueError, match="'b' is not in the vocabulary"):
        vocabulary.encode("ab")


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["Linux", "Windows"])
@pytest.mark.parametrize(
    "text", ["\n\n \n中\n🙂\n", "b\na\n", "abc", "cab\n", "a\nb", "\n", "\ufeffa\n"]
)
def test_a_vocabulary_file_gives_the_characters_in_it(tmp_path, text, newline):
    path = tmp_path / "vocab.txt"
    path.write_text(text, encoding="utf-8", newline=newline)
    assert Vocabulary.from_file(path).characters == "".join(sorted(set(text)))


# The file -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tmp_path):
    """Return a file of the model."""
    save_model(tmp_path / "model.pkl", model.train(), VOCABULARY)
    return tmp_path / "model.pkl"


def test_a_saved_model_comes_back_whole_and_in_eval_mode(model, saved):
    loaded, vocabulary = load_model(saved)
    assert not loaded.training
    assert loaded.config == model.config and vocabulary.characters == VOCABULARY.characters
    index = random_ids(2, 16)
    assert loaded(index)[0].equal(model.eval()(index)[0])
    assert [file.name for file in saved.parent.iterdir()] == ["model.pkl"]
    assert torch.load(saved, weights_only=True).keys() == {"config", "vocabulary", "weights"}
    loaded(index, index)[1].backward()  # it can be trained on
    assert all(p.grad is not None for p in loaded.parameters())


VISION_MODEL = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
SAFETENSORS = (66).to_bytes(
    8, "little"
) + b'{"lm_head.bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
BYTES = [
    b"",
    b"no pickle",
    b"<!DOCTYPE html>",
    b".",
    b"\x80\x04",
    b"PK\5\6" + bytes(18),
    b"PK",
    SAFETENSORS,
]
NO_MODELS = [
    "text",
    1,
    None,
    {1: 2},
    [{}],
    {"model": 1},
    {"transformer.wte.weight": torch.zeros(65, 8)},
]
NO_MODELS += [
    VISION_MODEL,
    VISION_MODEL.state_dict(),
    torch.zeros(3),
    {"weights": None},
    {"model": VISION_MODEL},
]


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_what_is_no_model_is_refused_in_one_line(tmp_path, dump):
    path = tmp_path / "model.pkl"
    for content in (*BYTES, *NO_MODELS):
        with open(path, "wb") as file:
            file.write(content) if isinstance(content, bytes) else dump(content, file)
        with pytest.raises(
            ModelFileError, match=rf"^{re.escape(str(path))}: not a model file[ -~]+$"
        ) as caught:
            load_model(path)
        assert len(str(caught.value).removeprefix(str(path))) < 200
    for where, kind in (tmp_path, IsADirectoryError), (tmp_path / "no.pkl", FileNotFoundError):
        with pytest.raises(kind):
            load_model(where)


NAMES = (
    "more",
    "blocks.2.ln1.bias",
    "blocks.0.sa.heads.3.key.weight",
    1,
    "lm_head.weight",
    "ln1.bias",
)
SPOILT = {  # in a file of ours: what takes the place of a part, or of a part of it
    ("config", "dropout"): ["0.1", math.nan, True, 9],
    ("config", "layers"): [1],
    ("config",): [[1], 1],
    ("vocabulary",): [11, None],
    ("weights",): [{}, None],
    ("weights", "ln_f.bias"): [
        torch.zeros(23),
        torch.zeros(24, 1),
        [0.0] * 24,
        torch.zeros(1).expand(2**40),
        None,
    ],
    ("weights", "blocks.1.ln1.bias"): [
        torch.tensor([*[0.0] * 23, value]) for value in (math.nan, -math.inf, 1e30)
    ],
    **{("weights", name): [torch.zeros(24)] for name in NAMES},
}


@pytest.mark.parametrize("place", SPOILT, ids=str)
def test_parts_that_do_not_make_a_model_are_refused(saved, place):
    absurd = place == ("weights", "blocks.1.ln1.bias")
    reason = (
        r"blocks\.1\.ln1\.bias is NaN or absurd in places; use"
        if absurd
        else r"not a model file that can be read \("
    )
    original = saved.read_bytes()
    for value in SPOILT[place]:
        content = torch.load(io.BytesIO(original), weights_only=True)
        (content if len(place) == 1 else content[place[0]])[place[-1]] = value
        torch.save(content, saved)
        with pytest.raises(ModelFileError, match=rf"model\.pkl: {reason}[ -~]+$"):
            load_model(saved)


def assert_cuts_are_refused(path: Path, step: int) -> int:
    """Cut the file after every `step`-th byte, and after each of the last hundred; return how many
    times.
    """
    data, cut = path.read_bytes(), path.with_name("cut.pkl")
    ends = [*range(0, len(data) - 100, step), *range(len(data) - 100, len(data))]
    for end in reversed(ends):
        cut.write_bytes(data[:end])
        with pytest.raises(ModelFileError, match=r"cut\.pkl: not a model file[^\n]*$"):
            load_model(cut, vocabulary=VOCABULARY)
    return len(ends)


def test_a_file_cut_short_is_refused_and_so_is_one_with_a_flipped_bit(model, saved):
    assert assert_cuts_are_refused(saved, step=1999) > 100
    data, weights, refused = saved.read_bytes(), model.state_dict(), 0
    for place in range(7, len(data), 997):
        saved.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            loaded, _ = load_model(saved)  # in what fills up the archive, a bit changes nothing
            assert all(weight.equal(weights[name]) for name, weight in loaded.state_dict().items())
        except ModelFileError:
            refused += 1
    assert refused > len(data) // 997 * 0.8


# Other people's files -----------------------------------------------------------------------------


def run_python(*arguments, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, timeout=1200, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Return a folder with the models that tutorial.py makes, and its vocab.txt."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_python(ROOT / "tests" / "tutorial.py", folder, cwd=folder)
    return folder


def test_the_tutorials_models_load_whatever_their_module_is_called(theirs):
    index, logits = torch.load(theirs / "logits.pt", map_location="cpu")
    given = Vocabulary.from_file(theirs / "vocab.txt")
    for name, expected in logits.items():
        assert name.startswith("cuda") == (b"cuda:0" in (theirs / name).read_bytes())
        model, vocabulary = load_model(theirs / name, vocabulary=given)
        assert vocabulary.characters == "\n abcdefghi" and model.lm_head.bias.dtype == torch.float32
        torch.testing.assert_close(model(index)[0], expected, atol=1e-5, rtol=0)
    for vocabulary, count in (None, 0), (Vocabulary("abc"), 3):
        with pytest.raises(
            ModelFileError,
            match=rf"knows 11 .* vocabulary has {count}; name the .* -vocab vocab.txt$",
        ):
            load_model(theirs / "saved.pkl", vocabulary=vocabulary)


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_weights_are_found_where_people_keep_them(model, tmp_path, dump):
    weights = model.state_dict()
    prefixes = ("", "_orig_mod.", "module.", "module._orig_mod.")
    contents = [{prefix + name: weight for name, weight in weights.items()} for prefix in prefixes]
    beside = {  # what people put into a checkpoint
        "args": argparse.Namespace(lr=0.1, data=Path("data"), seen={1, 2}),
        "numbers": [
            np.float64(2.5),
            np.zeros(3),
            1 + 2j,
            Counter("ab"),
            torch.float16,
            torch.device("cpu"),
        ],
        "rng": torch.get_rng_state(),
        "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.AdamW([torch.zeros(1)]), 1),
    }
    contents.append(
        {name.replace(".0.", ".0._orig_mod."): weight for name, weight in weights.items()}
    )
    keys = ("model", "model_state_dict", "state_dict")
    contents += [{key: content, **beside} for key in keys for content in contents[:2]]
    contents += [model, torch.nn.DataParallel(model), {"model": model, **beside}]
    if dump is pickle.dump:  # torch.load refuses these
        contents += [
            {"model": model, "losses": filled} for filled in (defaultdict(list, a=[1]), deque([1]))
        ]
    for content in contents:
        with open(tmp_path / "model.pkl", "wb") as file:
            dump(content, file)
        loaded, _ = load_model(tmp_path / "model.pkl", vocabulary=VOCABULARY)
        assert loaded.state_dict().keys() == weights.keys()
        assert all(weight.equal(weights[name]) for name, weight in loaded.state_dict().items())
        assert gpt.read_model_file((tmp_path / "model.pkl").read_bytes()).keys() == {"weights"}


# Hostile and damaged files, read in a process of their own ----------------------------------------


def read_apart(folder: Path, *numbers: int) -> list[tuple[str, str, float]]:
    """Return names, what came of them, and seconds, of the model files in a folder, or of
    mutations: see fuzz.py.
    """
    lines = run_python(ROOT / "tests" / "fuzz.py", folder, *numbers, cwd=folder).splitlines()
    return [tuple(json.loads(line)) for line in lines]


def test_hostile_files_are_refused_and_no_code_in_them_runs(tmp_path):
    files = hostile_files(tmp_path)
    outcomes = read_apart(
        put(tmp_path, {f"{name}.pkl": content for name, content in files.items()})
    )
    assert len(outcomes) == len(files) and not (tmp_path / "ran").exists()
    wrong = r"refused: [^\n]*\.pkl: not a model file that can be read \([ -~]{1,100}\); train one with training.py"
    assert not [outcome for outcome in outcomes if not re.fullmatch(wrong, outcome[1])]
    for call in calls(tmp_path).values():
        done = pickle.loads(pickle.dumps(call))  # the same does run in Python's own unpickler
        if isinstance(done, map):
            list(done)
        wait_for((tmp_path / "ran").exists)
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_a_call_beside_good_weights_is_not_made(model, tmp_path, dump):
    for name, call in calls(tmp_path).items():
        with open(tmp_path / "model.pkl", "wb") as file:
            dump({"model": model.state_dict(), "more": call}, file)
        with suppress(ModelFileError):
            load_model(tmp_path / "model.pkl", vocabulary=VOCABULARY)
        assert not (tmp_path / "ran").exists(), name


def test_reading_a_hostile_file_leaves_nothing_behind(tmp_path, saved):
    """A pickle can set attributes of whatever it is given, also of functions and classes."""

    def attributes():
        places = [
            *vars(gpt).values(),
            torch._utils._rebuild_tensor_v2,
            torch.storage._load_from_bytes,
        ]
        return [
            str(getattr(p, name, None))
            for p in places
            for name in ("__dict__", "__defaults__", "__code__")
        ]

    before = attributes()
    for content in ATTACKS.values():
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(ModelFileError):
            load_model(tmp_path / "x.pkl")
    assert attributes() == before
    load_model(saved)


@pytest.fixture
def sources(theirs, tmp_path, run_main):
    """Return a folder with files of every kind that the scripts read, to be mutated."""
    names = (
        "protocol-0.pkl",
        "protocol-2.pkl",
        "protocol-4.pkl",
        "saved.pkl",
        "state_dict.pkl",
        "vocab.txt",
    )
    write_texts(tmp_path, "abc def ghi\n" * 30)
    put(tmp_path, {name: (theirs / name).read_bytes() for name in names})
    for optimizer in ("adamw", "muon"):
        flags = ["-n_embd=4", "-max_iters=2", f"-optimizer={optimizer}", f"-model={optimizer}.pkl"]
        assert run_main("training.py", *TINY, *flags, f"-data_dir={tmp_path}").returncode == 0
    return tmp_path


def assert_fuzzed(folder: Path, first: int, count: int) -> int:
    """Read so many mutated files; return how many could be used."""
    outcomes = read_apart(folder, first, count)
    originals, mutated = outcomes[:-count], outcomes[-count:]
    assert (
        len(mutated) == count and originals and all(result == "works" for _, result, _ in originals)
    ), originals
    assert not [
        outcome for outcome in mutated if not re.fullmatch(r"works|refused: [^\n]+", outcome[1])
    ]
    return sum(result == "works" for _, result, _ in mutated)


def test_mutated_files_load_or_are_refused(sources):
    assert 0 < assert_fuzzed(sources, 0, 50) < 40


@pytest.mark.soak
def test_many_mutated_files_load_or_are_refused(sources):
    for first in range(0, 12000, 1000):
        print(
            f"{first} to {first + 999}: {assert_fuzzed(sources, first, 1000)} work, the others are refused"
        )


@pytest.mark.soak
def test_files_cut_short_at_any_byte_are_refused(sources):
    for path in (
        sources / name
        for name in ("adamw.pkl", "muon.state.pkl", "state_dict.pkl", "protocol-4.pkl")
    ):
        print(f"{path.name}: {assert_cuts_are_refused(path, step=1)} cuts")
