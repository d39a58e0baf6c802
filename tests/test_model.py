"""model.py: the mathematics of the design, generation with a cache, files that run no code.

At the end stands the rule of the house: what each script may import.
"""

import argparse
import ast
import io
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
from conftest import ROOT, TINY, put, wait_for, write_texts
from hostile import calls, hostile_files
from reference import PlainGPT

import model as gpt
from model import GPTLanguageModel, ModelFileError, Vocabulary, load_model, save_model

SHAPE = {"vocab_size": 11, "n_embd": 24, "n_head": 3, "n_layer": 2, "block_size": 16}
VOCABULARY = Vocabulary("abcdefghijk")
SAVERS = pytest.mark.parametrize("dump", [torch.save, pickle.dump])


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
    assert x.grad.equal(y)  # what was dropped gets no gradient, the rest the same factor


@pytest.mark.parametrize("is_causal", [True, False])
def test_dropout_on_attention_weights_drops_whole_weights_at_the_right_scale(is_causal):
    torch.manual_seed(8)
    head = gpt.Head(head_size=32, n_embd=64, block_size=32, dropout=0.25)
    values = torch.eye(32).expand(500, 2, 32, 32)  # so that what comes out are the weights
    equal = torch.zeros(500, 2, 32, 32)
    weights = gpt.fused_attention(equal, equal, values, head.tril, head.dropout, is_causal)
    last = weights[:, :, -1]
    assert (last != 0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(last[last != 0].unique(), torch.tensor([1 / 32 / 0.75]))
    assert not weights.triu(1).any()


def test_multi_head_attention_equals_its_heads_one_by_one(both_ways):
    torch.manual_seed(3)
    many = gpt.MultiHeadAttention(4, head_size=8, n_embd=32, block_size=20, dropout=0.3).eval()
    for time_steps in (1, 7, 20):
        x = torch.randn(5, time_steps, 32)
        one_by_one = many.proj(torch.cat([head(x) for head in many.heads], dim=-1))
        torch.testing.assert_close(many(x), one_by_one, atol=1e-5, rtol=1e-5)


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
    *({"n_embd": 25}, {"n_head": 5}),
    *({"dropout": value} for value in (1.0, -0.1, math.nan)),
]


@pytest.mark.parametrize("arguments", BAD_SHAPES, ids=str)
def test_impossible_shapes_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        GPTLanguageModel(**{**SHAPE, **arguments})


@pytest.mark.parametrize("time_steps", [1, 2, 15, 16])
def test_logits_loss_and_gradients_equal_the_references(model, plain, time_steps, both_ways):
    index, targets = random_ids(3, time_steps), random_ids(3, time_steps).flip(0)
    (logits, loss), (plain_logits, plain_loss) = model(index, targets), plain(index, targets)
    torch.testing.assert_close(logits, plain_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, plain_loss, atol=1e-6, rtol=1e-6)
    loss.backward()
    plain_loss.backward()
    plain_gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain_gradients[name], atol=1e-5, rtol=1e-4)


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
        caches = [gpt.Cache(block.sa, rows) for block in model.blocks]
        logits = [model.next_logits(part, caches) for part in index.split(lengths, dim=1)]
    ends = torch.tensor(lengths).cumsum(0) - 1
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, ends], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [3, 16, 40])
def test_the_model_sees_all_of_a_short_text_and_at_least_half_a_window(model, plain, length):
    prompt = random_ids(2, length)
    text = model.generate(prompt, 30, temperature=0)
    assert text.shape == (2, length + 30) and text[:, :length].equal(prompt)
    seen = min(length, 16)
    for position in range(length, length + 30):
        if seen > 16:  # a full window is started anew from its second half
            seen = 8
        expected = plain(text[:, position - seen : position])[0][:, -1].argmax(-1)
        assert text[:, position].equal(expected), position
        seen += 1


def test_stream_yields_what_generate_returns_and_repeats_with_the_generator(model):
    prompt = random_ids(2, 4)

    def options(seed):
        return dict(temperature=1.3, top_k=5, generator=torch.Generator().manual_seed(seed))

    text = model.generate(prompt, 20, **options(1))
    assert torch.cat([prompt, *model.stream(prompt, 20, **options(1))], dim=1).equal(text)
    assert not model.generate(prompt, 20, **options(2)).equal(text)


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


BAD_OPTIONS = [
    *({"top_k": 0}, {"top_k": 12}, {"temperature": -0.5}, {"temperature": math.nan}),
    *({"index": [[]]}, {"index": [[11]]}, {"index": [[-1]]}),
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_generation_refuses_bad_ids_and_options(model, options):
    index = torch.tensor(options.get("index", [[0]])).long()
    with pytest.raises(ValueError, match="must be"):
        model.generate(**{"max_new_tokens": 1, **options, "index": index})


# The vocabulary -----------------------------------------------------------------------------------


def test_a_vocabulary_turns_text_into_ids_and_back():
    vocabulary = Vocabulary("\n\t aé“中🙂a")
    assert len(vocabulary) == 8 and vocabulary.characters == "".join(sorted("\n\t aé“中🙂"))
    assert vocabulary.encode("\t\n🙂") == [0, 1, 7]
    assert vocabulary.decode(vocabulary.encode("中 é\n🙂")) == "中 é\n🙂"
    with pytest.raises(KeyError, match="'b'"):
        vocabulary.encode("ab")


VOCABULARY_FILES = ["\n\n \n中\n🙂\n", "b\na\n", "abc", "cab\n", "a\nb", "\n", "\ufeffa\n"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["Linux", "Windows"])
@pytest.mark.parametrize("text", VOCABULARY_FILES)
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


VISION_MODEL = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
TENSOR = b'{"lm_head.bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
NOT_MODELS = [
    *(b"", b"no pickle", b"<!DOCTYPE html>", b".", b"\x80\x04", b"PK\5\6" + bytes(18), b"PK"),
    len(TENSOR).to_bytes(8, "little") + TENSOR,  # as in a file of safetensors
    *("text", None, {1: 2}, [{}], {"model": 1}, {"weights": None}, torch.zeros(3)),
    {"transformer.wte.weight": torch.zeros(65, 8)},  # GPT-2's name
    *(VISION_MODEL, VISION_MODEL.state_dict(), {"model": VISION_MODEL}),
]


@SAVERS
def test_what_is_no_model_is_refused_in_one_line(tmp_path, dump):
    path = tmp_path / "model.pkl"
    wrong = rf"^{re.escape(str(path))}: not a model file that can be read \([ -~]+$"
    for content in NOT_MODELS:
        with open(path, "wb") as file:
            file.write(content) if isinstance(content, bytes) else dump(content, file)
        with pytest.raises(ModelFileError, match=wrong) as caught:
            load_model(path)
        assert len(str(caught.value).removeprefix(str(path))) < 200


OTHER_NAMES = ["more", "blocks.2.ln1.bias", "blocks.0.sa.heads.3.key.weight", 1]
OTHER_SHAPES = [torch.zeros(23), torch.zeros(24, 1), torch.zeros(1).expand(2**40)]
SPOILT = {  # in a file of ours: what takes the place of a part, or of a part of it
    ("config", "dropout"): ["0.1", math.nan, True, 9],
    ("config", "layers"): [1],
    ("config",): [[1], 1],
    ("vocabulary",): [11, None],
    ("weights",): [{}, None],
    ("weights", "ln_f.bias"): [*OTHER_SHAPES, [0.0] * 24, None],
    **{("weights", name): [torch.zeros(24)] for name in OTHER_NAMES},
}


@pytest.mark.parametrize("place", SPOILT, ids=str)
def test_parts_that_do_not_make_a_model_are_refused(saved, place):
    original = saved.read_bytes()
    for value in SPOILT[place]:
        content = torch.load(io.BytesIO(original), weights_only=True)
        part = content[place[0]] if len(place) == 2 else content
        part[place[-1]] = value
        torch.save(content, saved)
        with pytest.raises(ModelFileError, match=r"model\.pkl: not a model file .*\([ -~]+$"):
            load_model(saved)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e30])
def test_weights_that_no_model_can_use_are_named(model, tmp_path, value):
    model.blocks[1].ln1.bias.data[3] = value
    save_model(tmp_path / "model.pkl", model, VOCABULARY)
    with pytest.raises(ModelFileError, match=r"model\.pkl: blocks\.1\.ln1\.bias is NaN or [ -~]+$"):
        load_model(tmp_path / "model.pkl")


def test_a_flipped_bit_changes_no_weight_in_silence(model, saved):
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
    return subprocess.check_output(command, cwd=cwd, env=environment, encoding="utf-8")


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
        assert vocabulary.characters == "\n abcdefghi"
        torch.testing.assert_close(model(index)[0], expected, atol=1e-5, rtol=0)


BESIDE_THE_WEIGHTS = {  # what people put into a checkpoint
    "args": argparse.Namespace(lr=0.1, data=Path("data"), seen={1, 2}),
    "numbers": [np.float64(2.5), np.zeros(3), 1 + 2j, Counter("ab")],
    "torch": [torch.float16, torch.device("cpu"), torch.get_rng_state()],
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.AdamW([torch.zeros(1)]), 1),
}


@SAVERS
def test_weights_are_found_where_people_keep_them(model, tmp_path, dump):
    path, weights = tmp_path / "model.pkl", model.state_dict()
    contents = [
        {prefix + name: weight for name, weight in weights.items()}
        for prefix in ("", "_orig_mod.", "module.", "module._orig_mod.")
    ]
    compiled = {name.replace(".0.", ".0._orig_mod."): weight for name, weight in weights.items()}
    for key in ("model", "model_state_dict", "state_dict"):
        contents += [{key: content, **BESIDE_THE_WEIGHTS} for content in contents[:2]]
    contents += [compiled, model, torch.nn.DataParallel(model)]
    contents += [{"model": model, **BESIDE_THE_WEIGHTS}]
    if dump is pickle.dump:  # torch.load refuses these
        contents += [{"model": model, "losses": deque([1]), "more": defaultdict(list, a=[1])}]
    for content in contents:
        with open(path, "wb") as file:
            dump(content, file)
        loaded, _ = load_model(path, vocabulary=VOCABULARY)
        assert loaded.state_dict().keys() == weights.keys()
        assert all(weight.equal(weights[name]) for name, weight in loaded.state_dict().items())
        assert gpt.read_model_file(path.read_bytes()).keys() == {"weights"}


# Hostile and damaged files, read in a process of their own ----------------------------------------


def read_apart(folder: Path, *numbers: int) -> list[tuple[str, str, float]]:
    """Return name, outcome and seconds of each model file in a folder, or mutation: see fuzz.py."""
    lines = run_python(ROOT / "tests" / "fuzz.py", folder, *numbers, cwd=folder).splitlines()
    return [tuple(json.loads(line)) for line in lines]


def test_hostile_files_are_refused_and_no_code_in_them_runs(tmp_path, model):
    files = hostile_files(tmp_path, model.state_dict())
    put(tmp_path, {f"{name}.pkl": content for name, content in files.items()})
    save_model(tmp_path / "z.pkl", model, VOCABULARY)  # is read last: no file may change how
    outcomes = {name: outcome for name, outcome, _ in read_apart(tmp_path)}
    assert len(outcomes) == len(files) + 1 and not (tmp_path / "ran").exists()
    assert outcomes.pop("z.pkl") == "works"
    refused = r"refused: .*\.pkl: not a model file that can be read \([ -~]{1,100}\); train one.*"
    for name, outcome in outcomes.items():
        allowed = "works|refused: .*" if "beside" in name else refused
        assert re.fullmatch(allowed, outcome), name
    for call in calls(tmp_path).values():
        pickle.loads(pickle.dumps(call))  # Python's own unpickler does make the call
        wait_for((tmp_path / "ran").exists)
        (tmp_path / "ran").unlink()


@pytest.fixture
def sources(theirs, tmp_path, run_main):
    """Return a folder with files of every kind that the scripts read, to be damaged."""
    names = ["protocol-0.pkl", "protocol-2.pkl", "protocol-4.pkl", "saved.pkl", "state_dict.pkl"]
    write_texts(tmp_path, "abc def ghi\n" * 30)
    put(tmp_path, {name: (theirs / name).read_bytes() for name in [*names, "vocab.txt"]})
    for optimizer in ("adamw", "muon"):
        flags = ["-n_embd=4", "-max_iters=2", f"-optimizer={optimizer}", f"-model={optimizer}.pkl"]
        assert run_main("training.py", *TINY, *flags, f"-data_dir={tmp_path}").returncode == 0
    return tmp_path


@pytest.mark.parametrize("step", [1999, pytest.param(1, marks=pytest.mark.soak)])
def test_a_file_cut_short_is_refused(sources, step):
    cut = sources / "cut.pkl"
    for name in ("adamw.pkl", "muon.state.pkl", "state_dict.pkl", "protocol-4.pkl"):
        data = (sources / name).read_bytes()
        for end in (*range(0, len(data), step), len(data) - 1):
            cut.write_bytes(data[:end])
            with pytest.raises(ModelFileError, match=r"cut\.pkl: not a model file[^\n]*$"):
                load_model(cut, vocabulary=VOCABULARY)


MANY = [pytest.param(first, 1000, marks=pytest.mark.soak) for first in range(0, 12000, 1000)]


@pytest.mark.parametrize(("first", "count"), [(0, 50), *MANY])
def test_mutated_files_load_or_are_refused(sources, first, count):
    outcomes = [outcome for _, outcome, _ in read_apart(sources, first, count)]
    originals, mutated = outcomes[:-count], outcomes[-count:]
    assert len(mutated) == count and set(originals) == {"works"}
    assert not [outcome for outcome in mutated if not re.fullmatch("works|refused: .+", outcome)]
    assert 0 < mutated.count("works") < 0.8 * count


# The rule of the house ----------------------------------------------------------------------------

MAY_IMPORT = {
    "model.py": {"torch", "numpy"},
    "data_extract.py": {"numpy", "tqdm", "pydoc_data"},  # without torch workers start sooner
    "training.py": {"model", "torch", "numpy", "tqdm", "matplotlib", "data_extract"},
    "chatbot.py": {"model", "torch"},
}


@pytest.mark.parametrize("script", MAY_IMPORT)
def test_a_script_imports_only_what_it_may(script):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    packages = {name.partition(".")[0] for name in imported}
    assert packages - sys.stdlib_module_names <= MAY_IMPORT[script]
    assert {name for name in imported if name.startswith("data_extract")} <= {"data_extract.locked"}
