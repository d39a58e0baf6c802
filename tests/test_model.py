"""model.py: the mathematics of the design, generation with a cache, files that run no code.

At the end stands the rule of the house: what each script may import.
"""

import argparse
import ast
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections import Counter, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, put, wait_for
from hostile import calls, hostile_files, torch_dumps
from reference import PlainGPT

from model import (
    Cache,
    Dropout,
    GPTLanguageModel,
    Head,
    ModelFileError,
    MultiHeadAttention,
    Vocabulary,
    attention,
    fused_attention,
    load_model,
    read_model_file,
    sample,
    save_model,
)

SHAPE = {"vocab_size": 11, "n_embd": 24, "n_head": 3, "n_layer": 2, "block_size": 16}
VOCABULARY = Vocabulary("abcdefghijk")
SAVED_BOTH_WAYS = pytest.mark.parametrize("dumps", [torch_dumps, pickle.dumps])


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(1)


@pytest.fixture
def model():
    model = GPTLanguageModel(**SHAPE, dropout=0.0)
    for weights in model.parameters():  # far from small initial values, so that differences show
        weights.data += torch.randn_like(weights) * 0.3
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
            "model.fused_attention", lambda *arguments, is_causal: attention(*arguments)
        )


def random_ids(*shape):
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(2))


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p):
    x = torch.ones(1001, 999, requires_grad=True)
    y = Dropout(p)(x)
    assert (y == 0).any() and (y != 0).float().mean().item() == pytest.approx(1 - p, abs=0.002)
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=0.02)
    assert y.mean().item() == pytest.approx(1, rel=0.05)
    y.sum().backward()
    assert x.grad.equal(y)  # what was dropped gets no gradient, the rest the same factor


@pytest.mark.parametrize("is_causal", [True, False])
def test_dropout_on_attention_weights_drops_whole_weights_at_the_right_scale(is_causal):
    head = Head(head_size=32, n_embd=64, block_size=32, dropout=0.25)
    equal = torch.zeros(500, 2, 32, 32)
    values = torch.eye(32).expand(500, 2, 32, 32)  # so that what comes out are the weights
    weights = fused_attention(equal, equal, values, head.tril, head.dropout, is_causal)
    last = weights[:, :, -1]
    assert (last != 0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(last[last != 0].unique(), torch.tensor([1 / 32 / 0.75]))
    assert not weights.triu(1).any()


@pytest.mark.parametrize("time_steps", [1, 7, 20])
def test_multi_head_attention_equals_its_heads_one_by_one(both_ways, time_steps):
    many = MultiHeadAttention(4, head_size=8, n_embd=32, block_size=20, dropout=0.3).eval()
    x = torch.randn(5, time_steps, 32)
    one_by_one = many.proj(torch.cat([head(x) for head in many.heads], dim=-1))
    torch.testing.assert_close(many(x), one_by_one, atol=1e-5, rtol=1e-5)


def test_weights_have_the_names_and_shapes_of_the_tutorial_and_masks_are_not_in_the_file():
    model = GPTLanguageModel(100)
    assert model.config == dict(
        vocab_size=100, n_embd=384, n_head=4, n_layer=4, block_size=128, dropout=0.2
    )
    PlainGPT(100).load_state_dict(model.state_dict())  # which is strict
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    masks = {name: (one.dtype, one.device.type) for name, one in model.to("meta").named_buffers()}
    names = [f"blocks.{b}.sa.heads.{h}.tril" for b in range(4) for h in range(4)]
    assert masks == dict.fromkeys(names, (torch.bool, "meta"))


def test_initial_weights_are_small_normal_and_biases_zero():
    parameters = dict(GPTLanguageModel(vocab_size=200, n_embd=128, n_layer=2).named_parameters())
    assert not [name for name in parameters if name.endswith("bias") and parameters[name].any()]
    for name, weight in parameters.items():
        if weight.dim() == 2:  # neither a bias nor of a LayerNorm
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(weight.mean().item()) < 0.001, name


@pytest.mark.parametrize(
    "arguments",
    [
        *({name: value} for name in SHAPE for value in (0, -1)),
        *({"n_embd": 25}, {"n_head": 5}),
        *({"dropout": value} for value in (1.0, -0.1, math.nan)),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        GPTLanguageModel(**{**SHAPE, **arguments})


@pytest.mark.parametrize("time_steps", [1, 2, 15, 16])
def test_logits_loss_and_gradients_equal_the_references(model, plain, time_steps, both_ways):
    index, targets = random_ids(3, time_steps), random_ids(3, time_steps).flip(0)
    (logits, loss), (plain_logits, plain_loss) = model(index, targets), plain(index, targets)
    torch.testing.assert_close(logits, plain_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, plain_loss, atol=1e-6, rtol=1e-6)
    torch.autograd.backward([loss, plain_loss])
    gradients, plain_gradients = (
        {name: parameter.grad for name, parameter in one.named_parameters()}
        for one in (model, plain)
    )
    torch.testing.assert_close(gradients, plain_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 0), (1, 17), (4, 100)])
def test_no_time_steps_and_too_many_are_refused(model, shape):
    with pytest.raises(ValueError, match="1 to 16 time steps"):
        model(torch.zeros(shape, dtype=torch.long))


# Generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[16], [1] * 16, [5, 1, 1, 9], [15, 1]], ids=str)
@pytest.mark.parametrize(("rows", "threads"), [(2, 1), (1, 1), (1, 2), (1, 5)])
@pytest.mark.parametrize("gradients", [True, False])
def test_logits_with_a_cache_equal_those_without(
    model, lengths, rows, threads, gradients, both_ways
):
    torch.set_num_threads(threads)  # among which a multiplication by a single row is shared out
    index = random_ids(rows, 16)
    expected, loss = model(index)
    assert loss is None
    with torch.set_grad_enabled(gradients):
        caches = [Cache(block.sa, rows) for block in model.blocks]
        logits = [model.next_logits(part, caches) for part in index.split(lengths, dim=1)]
    ends = torch.tensor(lengths).cumsum(0) - 1
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, ends], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [3, 16, 40])
def test_the_model_sees_all_of_a_short_text_and_at_least_half_a_window(model, plain, length):
    prompt = random_ids(2, length)
    text = model.generate(prompt, 30, temperature=0)
    assert text.shape == (2, length + 30) and text[:, :length].equal(prompt)
    # A full window of 16 is started anew from its second half.
    windows = [*range(min(length, 16), 17), *[*range(8, 17)] * 4]
    for position, seen in zip(range(length, length + 30), windows):
        expected = plain(text[:, position - seen : position])[0][:, -1].argmax(-1)
        assert text[:, position].equal(expected), position


def test_stream_yields_what_generate_returns_and_repeats_with_the_generator(model):
    prompt = random_ids(2, 4)
    options, same_options, others = (
        {"temperature": 1.3, "top_k": 5, "generator": torch.Generator().manual_seed(seed)}
        for seed in (1, 1, 2)
    )
    text = model.generate(prompt, 20, **options)
    assert torch.cat([prompt, *model.stream(prompt, 20, **same_options)], dim=1).equal(text)
    assert not model.generate(prompt, 20, **others).equal(text)


@pytest.mark.parametrize(("temperature", "top_k"), [(2.0, 4), (1.0, None), (0.5, 3), (1.0, 11)])
def test_sampling_follows_temperature_and_top_k(model, temperature, top_k):
    prompt = random_ids(1, 2).expand(20000, 2)
    logits = model(prompt[:1])[0][0, -1]
    likeliest, ids = logits.topk(top_k or 11)
    expected = torch.zeros(11).scatter(0, ids, torch.softmax(likeliest / temperature, dim=0))
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
    drawn = sample(logits, 1.0, 4, torch.Generator().manual_seed(1))
    assert len(drawn.unique()) == 4 and (drawn == 3).any()
    assert sample(logits, 1.0, 1, None).unique().tolist() == [3]


@pytest.mark.parametrize("training", [True, False])
def test_generation_needs_no_gradients_and_leaves_the_mode_as_it_was(model, training):
    model.train(training)
    stream = model.stream(random_ids(1, 3), 5)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()  # a reader may stop early
    text = model.generate(random_ids(1, 3), 5)
    assert model.training is training and not text.requires_grad
    model(text, text)[1].backward()  # what was generated may be learnt from


@pytest.mark.parametrize(
    "options",
    [
        *({"top_k": 0}, {"top_k": 12}, {"temperature": -0.5}, {"temperature": math.nan}),
        *({"index": torch.tensor([ids]).long()} for ids in ([], [11], [-1])),
    ],
    ids=str,
)
def test_generation_refuses_bad_ids_and_options(model, options):
    with pytest.raises(ValueError, match="must be"):
        model.generate(**{"max_new_tokens": 1, "index": random_ids(1, 1), **options})


# The vocabulary -----------------------------------------------------------------------------------


def test_a_vocabulary_turns_text_into_ids_and_back():
    vocabulary = Vocabulary("\n\t aé“中🙂a")
    assert len(vocabulary) == 8 and vocabulary.characters == "".join(sorted("\n\t aé“中🙂"))
    assert vocabulary.encode("\t\n🙂") == [0, 1, 7]
    assert vocabulary.decode(vocabulary.encode("中 é\n🙂")) == "中 é\n🙂"
    with pytest.raises(KeyError, match="'b'"):
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


UNREADABLE = r"not a model file that can be read \([ -~]{1,100}\); train one with training\.py"


def assert_refused(path: Path, message: str = UNREADABLE) -> None:
    with pytest.raises(ModelFileError, match=rf"^{re.escape(str(path))}: {message}$") as caught:
        load_model(path, vocabulary=VOCABULARY)
    assert len(str(caught.value).removeprefix(str(path))) < 200


VISION_MODEL = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
TENSOR = b'{"lm_head.bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@SAVED_BOTH_WAYS
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"no pickle", b"<!DOCTYPE html>", b".", b"\x80\x04", b"PK\5\6" + bytes(18), b"PK"),
        len(TENSOR).to_bytes(8, "little") + TENSOR,  # as in a file of safetensors
        *("text", None, {1: 2}, [{}], {"model": 1}, {"weights": None}, torch.zeros(3)),
        {"transformer.wte.weight": torch.zeros(65, 8)},  # GPT-2's name
        *(VISION_MODEL, VISION_MODEL.state_dict(), {"model": VISION_MODEL}),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, content, dumps):
    path = tmp_path / "model.pkl"
    path.write_bytes(content if isinstance(content, bytes) else dumps(content))
    assert_refused(path)


ABSURD = [torch.tensor([0.0, value, *[0.0] * 22]) for value in (math.nan, -math.inf, 1e30)]


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [  # in a file of ours: what takes the place of a part, or of a part of it
        (("config", "dropout"), ["0.1", math.nan, True, 9], UNREADABLE),
        (("config", "layers"), [1], UNREADABLE),
        (("config",), [[1], 1], UNREADABLE),
        (("vocabulary",), [11, None], UNREADABLE),
        (("weights",), [{}, None], UNREADABLE),
        (("weights", "ln_f.bias"), [torch.zeros(23), torch.zeros(24, 1)], UNREADABLE),
        (("weights", "ln_f.bias"), [torch.zeros(1).expand(2**40)], UNREADABLE),
        (("weights", "ln_f.bias"), [[0.0] * 24, None], UNREADABLE),
        (("weights", "blocks.0.sa.heads.3.key.weight"), [torch.zeros(24)], UNREADABLE),
        (("weights", "blocks.2.ln1.bias"), [torch.zeros(24)], UNREADABLE),
        (("weights", "more"), [torch.zeros(24)], UNREADABLE),
        (("weights", 1), [torch.zeros(24)], UNREADABLE),
        (("weights", "blocks.1.ln1.bias"), ABSURD, r"blocks\.1\.ln1\.bias is NaN or [ -~]+"),
    ],
)
def test_parts_that_do_not_make_a_model_are_refused(saved, place, values, message):
    content = torch.load(saved, weights_only=True)
    part = content[place[0]] if len(place) == 2 else content
    for value in values:
        part[place[-1]] = value
        torch.save(content, saved)
        assert_refused(saved, message)


@pytest.mark.parametrize("step", [4999, pytest.param(97, marks=pytest.mark.soak)])
def test_a_flipped_bit_changes_no_weight_in_silence(model, saved, step):
    data, weights, refused = saved.read_bytes(), model.state_dict(), 0
    for place in range(7, len(data), step):
        saved.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            loaded, _ = load_model(saved)  # in what fills up the archive, a bit changes nothing
            assert all(weight.equal(weights[name]) for name, weight in loaded.state_dict().items())
        except ModelFileError:
            refused += 1
    assert refused > len(data) // step * 0.8


# Other people's files -----------------------------------------------------------------------------


def run_apart(script: str, folder: Path, *numbers: int) -> str:
    """Return what a script of tests/ prints, in a process of its own that works in this folder."""
    command = [sys.executable, ROOT / "tests" / script, folder, *map(str, numbers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.check_output(command, cwd=folder, env=environment, encoding="utf-8")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Return a folder with the models that tutorial.py makes, and its vocab.txt."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_apart("tutorial.py", folder)
    return folder


def test_the_tutorials_models_load_whatever_their_module_is_called(theirs):
    index, logits = torch.load(theirs / "logits.pt", map_location="cpu")
    given = Vocabulary.from_file(theirs / "vocab.txt")
    for name, expected in logits.items():
        assert name.startswith("cuda") == (b"cuda:0" in (theirs / name).read_bytes())
        model, vocabulary = load_model(theirs / name, vocabulary=given)
        assert vocabulary.characters == "\n abcdefghi"
        torch.testing.assert_close(model(index)[0], expected, atol=1e-5, rtol=0)


BESIDE_THE_WEIGHTS = {  # what people put into a checkpoint
    "args": argparse.Namespace(lr=0.1, data=Path("data"), seen={1, 2}),
    "numbers": [np.float64(2.5), np.zeros(3), 1 + 2j, Counter("ab")],
    "torch": [torch.float16, torch.device("cpu"), torch.get_rng_state()],
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.AdamW([torch.zeros(1)]), 1),
}


@SAVED_BOTH_WAYS
def test_weights_are_found_where_people_keep_them(model, tmp_path, dumps):
    path, weights = tmp_path / "model.pkl", model.state_dict()
    prefixed = [
        {prefix + name: weight for name, weight in weights.items()}
        for prefix in ("", "_orig_mod.", "module.", "module._orig_mod.")
    ]
    compiled = {name.replace(".0.", ".0._orig_mod."): weight for name, weight in weights.items()}
    contents = [*prefixed, compiled, model, torch.nn.DataParallel(model)]
    for key in ("model", "model_state_dict", "state_dict"):
        contents += [{key: content, **BESIDE_THE_WEIGHTS} for content in (*prefixed[:2], model)]
    if dumps is pickle.dumps:  # torch.load refuses these
        contents += [{"model": model, "losses": deque([1]), "more": defaultdict(list, a=[1])}]
    for content in contents:
        path.write_bytes(dumps(content))
        loaded, _ = load_model(path, vocabulary=VOCABULARY)
        torch.testing.assert_close(loaded.state_dict(), weights, atol=0, rtol=0)
        assert read_model_file(path.read_bytes()).keys() == {"weights"}


# Hostile and damaged files, read in a process of their own ----------------------------------------


def outcomes_of(folder: Path, *numbers: int) -> dict[str, str]:
    """Return what comes of each model file in a folder, and of mutations of them: see fuzz.py."""
    return dict(map(json.loads, run_apart("fuzz.py", folder, *numbers).splitlines()))


def test_hostile_files_are_refused_and_no_code_in_them_runs(tmp_path, model):
    files = hostile_files(tmp_path, model.state_dict())
    put(tmp_path, {**files, "vocab.txt": VOCABULARY.characters.encode()})
    save_model(tmp_path / "z.pkl", model, VOCABULARY)  # is read last: no file may change how
    outcomes = outcomes_of(tmp_path)
    assert len(outcomes) == len(files) + 1 and not (tmp_path / "ran").exists()
    assert outcomes.pop("z.pkl") == "works"
    for name, outcome in outcomes.items():
        refused = rf"refused: .*{re.escape(name)}: {UNREADABLE}"
        allowed = f"works|{refused}" if "beside" in name else refused
        assert re.fullmatch(allowed, outcome), name
    for call in calls(tmp_path).values():
        pickle.loads(pickle.dumps(call))  # Python's own unpickler does make the call
        wait_for((tmp_path / "ran").exists)
        (tmp_path / "ran").unlink()


@pytest.fixture
def sources(finished_run, theirs, tmp_path, run_main):
    """Return a folder with files of every kind that the scripts read, to be damaged."""
    names = ["protocol-0.pkl", "protocol-2.pkl", "protocol-4.pkl", "saved.pkl", "state_dict.pkl"]
    put(tmp_path, {**finished_run, **{name: (theirs / name).read_bytes() for name in names}})
    assert run_main("training.py", *TINY, "-max_iters=2", "-optimizer=muon").returncode == 0
    return tmp_path


@pytest.mark.parametrize("step", [2999, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "name", ["run.pkl", "model-01.state.pkl", "state_dict.pkl", "protocol-4.pkl"]
)
def test_a_file_cut_short_is_refused(sources, name, step):
    data = (sources / name).read_bytes()
    for end in (*range(0, len(data), step), len(data) - 1):
        (sources / name).write_bytes(data[:end])
        assert_refused(sources / name)


@pytest.mark.parametrize(
    ("first", "count"),
    [
        (0, 50),
        *(pytest.param(first, 1000, marks=pytest.mark.soak) for first in range(0, 12000, 1000)),
    ],
)
def test_mutated_files_load_or_are_refused(sources, first, count):
    outcomes = [*outcomes_of(sources, first, count).values()]
    originals, mutated = outcomes[:-count], outcomes[-count:]
    assert len(mutated) == count and set(originals) == {"works"}
    assert not [outcome for outcome in mutated if not re.fullmatch("works|refused: .+", outcome)]
    assert 0 < mutated.count("works") < 0.8 * count


# The rule of the house ----------------------------------------------------------------------------

MAY_IMPORT = {
    "model.py": {"torch", "numpy"},
    "data_extract.py": {"numpy", "tqdm", "pydoc_data"},  # without torch workers start sooner
    "training.py": {"model", "torch", "numpy", "tqdm", "matplotlib", "data_extract.locked"},
    "chatbot.py": {"model", "torch"},
}


@pytest.mark.parametrize("script", MAY_IMPORT)
def test_a_script_imports_only_what_it_may(script):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {module + alias.name for alias in node.names}
    allowed = MAY_IMPORT[script] | sys.stdlib_module_names
    assert not {name for name in imported if not allowed & {name, name.partition(".")[0]}}
