"""model.py: the mathematics of the design, generation with a cache, and model files that run no code."""

import argparse
import errno
import json
import math
import os
import pickle
import re
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, posix, put, write_texts
from hostile import ATTACKS, IMPOSSIBLE, Call, as_archive, calls, hostile_files
from reference import PlainGPT
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import model as model_module
from model import (
    MAX_BLOCK_SIZE,
    Dropout,
    GPTLanguageModel,
    Head,
    ModelFileError,
    MultiHeadAttention,
    Vocabulary,
    atomic_write,
    attention,
    bounded,
    choose_device,
    is_out_of_memory,
    load_model,
    make_parser,
    name_file_in_errors,
    read_model_file,
    save_model,
)

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


def random_ids(*shape):
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(2))


# Dropout -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9, 0.999])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p):
    torch.manual_seed(6)
    x = torch.ones(1001, 999, requires_grad=True)
    y = Dropout(p)(x)
    kept = max(1, round((1 - p) * 256)) / 256
    assert (y != 0).float().mean().item() == pytest.approx(kept, abs=0.002)
    assert y.max().item() == pytest.approx(1 / kept, rel=1e-6)
    assert y.mean().item() == pytest.approx(1, rel=0.05)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # what was dropped gets no gradient, the rest the same factor


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1023])
def test_dropout_takes_any_size_and_repeats_with_the_seed(size):
    torch.manual_seed(7)
    first = Dropout(0.5)(torch.ones(size))
    torch.manual_seed(7)
    assert torch.equal(Dropout(0.5)(torch.ones(size)), first)
    assert torch.equal(Dropout(0.5).eval()(torch.ones(size)), torch.ones(size))
    assert torch.equal(Dropout(0.0)(torch.ones(size)), torch.ones(size))


def test_dropout_on_attention_weights_drops_whole_weights_at_the_right_scale():
    torch.manual_seed(8)
    head = Head(head_size=32, n_embd=64, block_size=32, dropout=0.25)
    eye = torch.eye(32).expand(500, 2, 32, 32)
    equal = torch.zeros(500, 2, 32, 32)
    weights = attention(equal, equal, eye, head.tril, head.dropout)  # values that show the weights themselves
    kept = weights[:, :, -1] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(weights[:, :, -1][kept].unique(), torch.tensor([1 / 32 / 0.75]))
    assert not weights.triu(1).any()


# Attention -----------------------------------------------------------------------------------------------------------


def test_a_head_is_a_causal_softmax_average_of_values():
    torch.manual_seed(4)
    head = Head(head_size=2, n_embd=3, block_size=4, dropout=0.0)
    x = torch.randn(1, 4, 3)
    y = head(x)
    for t in range(4):
        query = head.query.weight @ x[0, t]
        scores = [(query @ (head.key.weight @ x[0, s])).item() / math.sqrt(2) for s in range(t + 1)]
        shares = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        expected = sum(share * (head.value.weight @ x[0, s]) for s, share in enumerate(shares))
        torch.testing.assert_close(y[0, t], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_multi_head_attention_equals_its_heads_one_by_one(fused, monkeypatch):
    monkeypatch.setattr(model_module, "fused_is_faster", lambda q, dropout: fused)
    torch.manual_seed(3)
    many = MultiHeadAttention(num_heads=4, head_size=8, n_embd=32, block_size=20, dropout=0.3).eval()
    x = torch.randn(5, 20, 32)
    one_by_one = many.proj(torch.cat([head(x) for head in many.heads], dim=-1))
    torch.testing.assert_close(many(x), one_by_one, atol=1e-5, rtol=1e-5)


# The model -----------------------------------------------------------------------------------------------------------


def test_the_default_model_has_the_sizes_of_the_design():
    model = GPTLanguageModel(100)
    assert model.config == {
        "vocab_size": 100, "n_embd": 384, "n_head": 4, "n_layer": 4, "block_size": 128, "dropout": 0.2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("vocab_size", "n_embd", "n_head", "n_layer", "block_size"), [(7, 12, 3, 1, 5), (100, 32, 4, 3, 8)]
)
def test_the_number_of_weights_follows_the_formula(vocab_size, n_embd, n_head, n_layer, block_size):
    model = GPTLanguageModel(vocab_size, n_embd, n_head, n_layer, block_size)
    attention = 3 * n_embd**2 + n_embd**2 + n_embd
    feed_forward = 4 * n_embd**2 + 4 * n_embd + 4 * n_embd**2 + n_embd
    norms = 2 * 2 * n_embd
    ends = vocab_size * n_embd + block_size * n_embd + 2 * n_embd + n_embd * vocab_size + vocab_size
    assert sum(p.numel() for p in model.parameters()) == n_layer * (attention + feed_forward + norms) + ends


def test_weights_have_the_tutorials_names():
    names = {"token_embedding_table.weight", "position_embedding_table.weight"}
    names |= {f"{layer}.{part}" for layer in ("ln_f", "lm_head") for part in ("weight", "bias")}
    for block in ("blocks.0", "blocks.1"):
        names |= {f"{block}.sa.heads.{h}.{part}.weight" for h in range(3) for part in ("key", "query", "value")}
        layers = ("sa.proj", "ffwd.net.0", "ffwd.net.2", "ln1", "ln2")
        names |= {f"{block}.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert set(GPTLanguageModel(**SHAPE).state_dict()) == names


def test_initial_weights_are_small_normal_and_biases_zero():
    torch.manual_seed(5)
    model = GPTLanguageModel(vocab_size=200, n_embd=128)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln" not in name and "ln_f" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.001, name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_head_has_its_mask_on_the_models_device_and_the_file_has_none(device):
    moved = GPTLanguageModel(**SHAPE).to(device)
    with torch.device(device):
        made_there = GPTLanguageModel(**SHAPE)
    for model in (moved, made_there):
        masks = dict(model.named_buffers())
        assert len(masks) == SHAPE["n_head"] * SHAPE["n_layer"]
        assert all(name.endswith(".tril") and mask.device.type == device for name, mask in masks.items())
        assert not masks.keys() & model.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"block_size": -1}, "block_size must be at least 1"),
        ({"block_size": MAX_BLOCK_SIZE + 1}, "block_size must be at most 8192, not 8193: masks would fill memory"),
        ({"n_embd": 25}, "must be a multiple of n_head"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": -0.1}, "dropout must be"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPTLanguageModel(**{**SHAPE, **arguments})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("time_steps", [1, 2, 15, 16])
def test_logits_loss_and_gradients_equal_those_of_the_reference(model, plain, time_steps, fused, monkeypatch):
    monkeypatch.setattr(model_module, "fused_is_faster", lambda q, dropout: fused)
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
    torch.set_num_threads(threads)  # by which a multiplication by a single row is cut, where that goes
    with torch.no_grad():
        without = model(random_ids(*shape))[0]
    torch.testing.assert_close(without, model(random_ids(*shape))[0], atol=1e-5, rtol=1e-5)


def test_without_targets_there_is_no_loss(model):
    logits, loss = model(random_ids(2, 5))
    assert logits.shape == (2, 5, SHAPE["vocab_size"]) and loss is None


def test_a_later_token_never_changes_an_earlier_logit(model):
    index = random_ids(1, 16)
    before = model(index)[0]
    for position in range(1, 16):
        changed = index.clone()
        changed[0, position] = (changed[0, position] + 1) % SHAPE["vocab_size"]
        after = model(changed)[0]
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=0, rtol=0)
        assert not torch.allclose(after[:, position:], before[:, position:])


@pytest.mark.parametrize("shape", [(1, 0), (1, 17), (4, 100)])
def test_no_time_steps_and_too_many_are_refused(model, shape):
    with pytest.raises(ValueError, match="1 to 16 time steps"):
        model(torch.zeros(shape, dtype=torch.long))


# Generation ----------------------------------------------------------------------------------------------------------


def test_greedy_text_equals_the_uncached_model_until_the_window_is_full(model, plain):
    prompt = random_ids(4, 3)
    expected = plain.generate(prompt, 13, greedy=True)  # the last of these is predicted from 15 tokens
    assert model.generate(prompt, 13, temperature=0).equal(expected)


def test_a_trained_models_greedy_text_equals_the_uncached_models():
    torch.manual_seed(10)
    model, plain = GPTLanguageModel(**SHAPE, dropout=0.1), PlainGPT(**SHAPE, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):  # to count up from any start
        rows = (torch.randint(0, 11, (8, 1)) + torch.arange(17)) % SHAPE["vocab_size"]
        loss = model(rows[:, :-1], rows[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain.load_state_dict(model.state_dict())
    prompt = torch.arange(5)[:, None]
    text = model.generate(prompt, 15, temperature=0)
    assert text.equal(plain.eval().generate(prompt, 15, greedy=True))
    assert text.equal((prompt + torch.arange(16)) % SHAPE["vocab_size"])


@pytest.mark.parametrize("lengths", [[16], [1] * 16, [5, 1, 1, 9], [15, 1]])
@pytest.mark.parametrize("static", [True, False], ids=["as on a GPU", "as on a CPU"])
@pytest.mark.parametrize("gradients", [True, False])
def test_logits_with_a_cache_equal_those_without(model, lengths, gradients, static):
    index = random_ids(2, 16)
    caches = model.new_caches(2)
    for cache in caches:
        cache.static = static
    expected = model(index)[0]
    first, *others = index.split(lengths, dim=1)
    with torch.set_grad_enabled(gradients):
        for _ in range(2):  # caches are used again for the next text
            logits = [model.prefill(first, caches), *(model.decode(part, caches) for part in others)]
            ends = torch.tensor(lengths).cumsum(0) - 1
            torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, ends], atol=1e-5, rtol=1e-5)


def test_a_cache_of_a_bfloat16_model_on_a_cpu_is_in_float32_and_gives_bfloat16(model):
    model.bfloat16()
    caches = model.new_caches(1)
    assert model.prefill(random_ids(1, 5), caches).dtype == torch.bfloat16
    assert {cache.kv.dtype for cache in caches} == {torch.float32}


def test_beyond_the_window_the_model_sees_at_least_half_of_it(model):
    prompt = random_ids(1, 40)
    text = model.generate(prompt, 30, temperature=0)
    assert text.shape == (1, 70) and text[:, :40].equal(prompt)
    seen = 16  # a prompt is cropped to the window; a full window is started anew from its second half
    for position in range(40, 70):
        seen = seen if seen <= 16 else 8
        expected = model(text[:, position - seen : position])[0][:, -1].argmax()
        assert text[0, position] == expected, position
        seen += 1


@pytest.fixture
def compiler():
    """Let torch forget what it has compiled, before and after the test."""
    torch.compiler.reset()
    yield torch.compiler
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def test_one_compiled_graph_serves_every_token(model, compiler):
    prompt = random_ids(2, 3)
    expected = model.generate(prompt, 40, temperature=0)
    caches = model.new_caches(2)
    for cache in caches:
        cache.static = True  # as on a GPU
    model.decode = torch.compile(model.decode, backend="eager", fullgraph=True)
    model.generate(prompt[:, :1], 2, caches=caches)
    compiler.set_stance("fail_on_recompile")
    assert model.generate(prompt, 40, temperature=0, caches=caches).equal(expected)


def test_stream_yields_what_generate_returns_and_repeats_with_the_generator(model):
    prompt = random_ids(2, 4)
    generated = [
        model.generate(prompt, 20, temperature=1.3, top_k=5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    stream = model.stream(prompt, 20, temperature=1.3, top_k=5, generator=torch.Generator().manual_seed(1))
    assert torch.cat([prompt, *stream], dim=1).equal(generated[0])
    assert generated[0].equal(generated[1]) and not generated[0].equal(generated[2])


def test_sampling_follows_temperature_and_top_k(model):
    prompt = random_ids(1, 2).expand(20000, 2)
    generator = torch.Generator().manual_seed(9)
    logits = model(prompt[:1])[0][0, -1]
    drawn = model.generate(prompt, 1, temperature=2.0, top_k=4, generator=generator)[:, -1]
    shares = drawn.bincount(minlength=SHAPE["vocab_size"]) / len(drawn)
    expected = torch.zeros(SHAPE["vocab_size"])
    likeliest = logits.topk(4).indices
    expected[likeliest] = torch.softmax(logits[likeliest] / 2.0, dim=0)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert not shares[expected == 0].any()


@pytest.mark.parametrize(("banned_ids", "top_k"), [([0, 7], None), ([2], 4), (list(range(10)), 3)])
def test_banned_ids_do_not_count_among_the_top_k(model, banned_ids, top_k):
    prompt = random_ids(1, 2).expand(20000, 2)
    logits = model(prompt[:1])[0][0, -1].clone()
    banned_ids = logits.argsort(descending=True)[banned_ids]
    logits[banned_ids] = -math.inf
    top_k_of_rest = min(top_k or len(logits), len(logits) - len(banned_ids))
    generator = torch.Generator().manual_seed(9)
    drawn = model.generate(prompt, 1, top_k=top_k, generator=generator, banned_ids=banned_ids.tolist())[:, -1]
    likeliest = logits.topk(top_k_of_rest).indices
    expected = torch.zeros(len(logits))
    expected[likeliest] = torch.softmax(logits[likeliest], dim=0)
    shares = drawn.bincount(minlength=len(logits)) / len(drawn)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert not shares[expected == 0].any()
    greedy = model.generate(prompt[:1], 1, temperature=0, banned_ids=banned_ids.tolist())[0, -1]
    assert greedy == logits.argmax()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_keeps_exactly_k_of_equally_likely_tokens(dtype):
    logits = torch.zeros(2000, 9, dtype=dtype)
    logits[:, 3] = 1
    drawn = model_module.sample(logits, 1.0, 4, torch.Generator().manual_seed(1))
    assert len(drawn.unique()) == 4 and (drawn == 3).any()
    assert model_module.sample(logits, 1.0, 1, None).unique().tolist() == [3]


def test_top_k_1_is_greedy_also_in_bfloat16():
    torch.manual_seed(3)
    model = GPTLanguageModel(**{**SHAPE, "vocab_size": 500}).bfloat16()  # new, so many logits are equal
    prompt = torch.tensor([[7, 8]]).expand(16, -1)
    expected = model.generate(prompt, 40, temperature=0)
    assert model.generate(prompt, 40, top_k=1).equal(expected)
    assert len(expected.unique(dim=0)) == 1


def test_a_very_low_temperature_is_greedy(model):
    prompt = random_ids(2, 4)
    assert model.generate(prompt, 9, temperature=1e-40).equal(model.generate(prompt, 9, temperature=0))


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


@pytest.mark.parametrize(
    ("index", "options"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}),
        (torch.tensor([[11]]), {}),
        (torch.tensor([[-1]]), {}),
        (torch.tensor([[0]]), {"temperature": -0.5}),
        (torch.tensor([[0]]), {"temperature": math.nan}),
        (torch.tensor([[0]]), {"top_k": 0}),
        (torch.tensor([[0]]), {"top_k": 12}),
        (torch.tensor([[0]]), {"banned_ids": range(11)}),
        (torch.tensor([[0]]), {"banned_ids": [11]}),
        (torch.tensor([[0]]), {"banned_ids": [-1]}),
    ],
)
def test_generation_refuses_bad_ids_and_options(model, index, options):
    with pytest.raises(ValueError, match="must be"):
        model.generate(index, 1, **options)


# The vocabulary ------------------------------------------------------------------------------------------------------


def test_a_vocabulary_reads_its_file_and_turns_text_into_ids_and_back(tmp_path):
    characters = "\n\t aé“中🙂"
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{c}\n" for c in sorted(characters)), encoding="utf-8", newline="\n")
    vocabulary = Vocabulary.from_file(path)
    assert len(vocabulary) == len(characters)
    assert vocabulary.characters == "".join(sorted(characters))
    assert vocabulary.decode(vocabulary.encode("中 é\n🙂")) == "中 é\n🙂"
    with pytest.raises(ValueError, match="'b' is not in the vocabulary"):
        vocabulary.encode("ab")


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["Linux", "Windows"])
@pytest.mark.parametrize("characters", ["\n\rab", "\nab", "\n\r", "ab", "a", "\rab"])
def test_a_vocabulary_file_gives_exactly_its_characters(tmp_path, characters, newline):
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{c}\n" for c in characters), encoding="utf-8", newline=newline)
    assert Vocabulary.from_file(path).characters == characters


@pytest.mark.parametrize(
    ("text", "characters"), [("abc", "abc"), ("a\nb\nc", "\nabc"), ("cab\n", "\nabc"), ("a\n\n", "\na"), ("\n", "\n")]
)
def test_a_vocabulary_of_any_other_shape_is_the_characters_in_it(tmp_path, text, characters):
    path = tmp_path / "vocab.txt"
    path.write_text(text, encoding="utf-8", newline="\n")
    assert Vocabulary.from_file(path).characters == characters


# The file ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tmp_path):
    """Return a file of the model."""
    save_model(tmp_path / "model.pkl", model, VOCABULARY)
    return tmp_path / "model.pkl"


def test_a_saved_model_comes_back_whole_and_in_eval_mode(model, tmp_path):
    save_model(tmp_path / "model.pkl", model.train(), VOCABULARY)
    loaded, vocabulary = load_model(tmp_path / "model.pkl")
    assert not loaded.training
    assert loaded.config == model.config and vocabulary.characters == VOCABULARY.characters
    index = random_ids(2, 16)
    assert loaded(index)[0].equal(model.eval()(index)[0])
    assert [file.name for file in tmp_path.iterdir()] == ["model.pkl"]


def test_a_model_can_be_trained_on_after_loading(saved):
    loaded, _ = load_model(saved)
    loaded(random_ids(1, 4), random_ids(1, 4))[1].backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_the_file_holds_only_data_and_tensors(model, saved):
    content = torch.load(saved, weights_only=True)
    assert set(content) == {"config", "vocabulary", "weights"}
    assert set(content["weights"]) == set(model.state_dict())


def test_a_failed_save_leaves_the_old_file(model, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        save_model(saved, model, VOCABULARY)
    assert caught.value.filename == str(saved)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


@posix
@pytest.mark.parametrize("there_before", [True, False])
def test_what_a_symbolic_link_leads_to_is_replaced_and_the_link_stays(tmp_path, there_before):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target.pkl", tmp_path / "model.pkl"
    if there_before:
        target.write_bytes(b"old")
    link.symlink_to(Path("disk") / "target.pkl")
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target.pkl"]


def test_errors_name_the_given_file_and_keep_their_kind():
    with pytest.raises(BrokenPipeError) as caught, name_file_in_errors("standard output"):
        raise OSError(errno.EPIPE, "Broken pipe")
    assert (caught.value.filename, caught.value.strerror) == ("standard output", "Broken pipe")
    with pytest.raises(OSError, match="a reason without a number") as caught, name_file_in_errors("x"):
        raise OSError("a reason without a number")
    assert (caught.value.filename, caught.value.strerror) == ("x", "a reason without a number")


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError("[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Invalid buffer size: 16.00 GiB"),
    ValueError("Maximum allowed dimension exceeded"),
]
OTHER_ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Pin memory thread exited unexpectedly"),
    RuntimeError("memory format option is only supported by strided tensors"),
    ValueError("this number is too big"),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *OTHER_ERRORS], ids=repr)
def test_only_errors_that_say_so_are_out_of_memory(error):
    assert is_out_of_memory(error) is (error in OUT_OF_MEMORY)


@pytest.mark.parametrize("make", [lambda: torch.empty(2**60), lambda: torch.empty(2**40, 2**40), lambda: bytes(2**62)])
def test_real_errors_of_memory_are_seen_as_such(make):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        make()
    assert is_out_of_memory(caught.value)


def test_a_device_whose_memory_is_full_is_not_called_missing(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", fail)
    parser, _ = make_parser("A script.")
    with pytest.raises(SystemExit):
        choose_device(parser, "cuda")
    assert capsys.readouterr().err.endswith("argument -device: the memory of 'cuda' is full\n")


@pytest.mark.parametrize("error", OUT_OF_MEMORY[:4], ids=repr)
@pytest.mark.parametrize("place", ["torch.load", "model.GPTLanguageModel"])
def test_a_good_model_that_does_not_fit_into_memory_is_not_called_damaged(saved, monkeypatch, error, place):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(type(error)) as caught:
        load_model(saved)
    assert caught.value is error


def write_safetensors(path: Path) -> None:
    header = b'{"lm_head.bias":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def vision_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())


def nano_gpt() -> dict:
    weights = {"_orig_mod.transformer.wte.weight": torch.zeros(65, 8), "_orig_mod.lm_head.weight": torch.zeros(65, 8)}
    return {
        "model": weights,
        "optimizer": {},
        "model_args": {"n_layer": 1},
        "iter_num": 1,
        "best_val_loss": torch.ones(1),
    }


NO_WEIGHTS = "it holds no weights of a GPTLanguageModel"
FOREIGN = {
    "empty": (b"", "it is empty; copy or download it again"),
    "a text": (b"no pickle", "train one with training.py"),
    "a web page": (b"<!DOCTYPE html><html></html>", "train one with training.py"),
    "the end of a pickle": (b".", "train one with training.py"),
    "the beginning of a pickle": (b"\x80\x04", "or one that is cut short or damaged"),
    "an empty zip archive": (b"PK\x05\x06" + bytes(18), "or one that is damaged, or not in the default format"),
    "another zip archive": (as_archive(b"").replace(b"data.pkl", b"text.txt"), "or not in the default format"),
    "safetensors": (write_safetensors, "but one of safetensors, which is not read"),
    "a list": (["a list"], NO_WEIGHTS),
    "a number": (1, NO_WEIGHTS),
    "nothing": (None, NO_WEIGHTS),
    "a dict": ({1: 2}, f"{NO_WEIGHTS} but '1'"),
    "a vision model": (vision_model(), f"{NO_WEIGHTS} but '0.weight'"),
    "weights of a vision model": (vision_model().state_dict(), f"{NO_WEIGHTS} but '0.weight'"),
    "a nanoGPT checkpoint": (nano_gpt(), f"{NO_WEIGHTS} but 'transformer.wte.weight'"),
    "code": (Call(os.system, "touch harm"), r"it asks for '\w+.system', which no GPTLanguageModel needs"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_a_foreign_file_is_refused_for_its_true_reason(tmp_path, name, dump):
    content, reason = FOREIGN[name]
    path = tmp_path / "model.pkl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content) and content is write_safetensors:
        content(path)
    else:
        with open(path, "wb") as file:
            dump(content, file)
    with pytest.raises(ModelFileError, match=rf"model\.pkl: not a model file[^\n]*{reason}[^\n]*$"):
        load_model(path)


def set_weight(content: dict, value: float) -> None:
    content["weights"]["blocks.1.ln1.bias"][-1] = value


SPOILT = [
    (lambda content: content["config"].update(n_layer=10**9), "do not fit"),
    (lambda content: content["config"].update(block_size=10**6), "do not fit"),
    (lambda content: content["config"].update(n_head=1), "do not fit"),
    (lambda content: content["config"].update(n_embd=24.5), "do not fit"),
    (lambda content: content["config"].update(n_embd=2**100000), "not a model file"),
    (lambda content: content["config"].update(vocab_size="11"), "do not fit"),
    (lambda content: content["config"].update(dropout="0.1"), "do not fit"),
    (lambda content: content["config"].update(dropout=True), "do not fit"),
    (lambda content: content["config"].update(dropout=math.nan), "do not fit"),
    (lambda content: content["config"].update(layers=1), "do not fit"),
    (lambda content: content["config"].pop("n_layer"), "do not fit"),
    (lambda content: content.update(config=[1]), "do not fit"),
    (lambda content: content.update(config=None), "do not fit"),
    (lambda content: content.update(vocabulary="abc"), "do not fit"),
    (lambda content: content.update(vocabulary=list("abcdefghijk")), "do not fit"),
    (lambda content: content.update(vocabulary=11), "do not fit"),
    (lambda content: content["weights"].clear(), "it holds no weights of a GPTLanguageModel"),
    (lambda content: content.pop("weights"), "it holds no weights of a GPTLanguageModel but 'config'"),
    (lambda content: content["weights"].pop("ln_f.bias"), "do not fit"),
    (lambda content: content["weights"].update(more=torch.zeros(1)), "do not fit"),
    (lambda content: content["weights"].update({"ln_f.bias": torch.zeros(23)}), "do not fit"),
    (lambda content: content["weights"].update({"lm_head.weight": torch.zeros(24, 11)}), "do not fit"),
    (lambda content: content["weights"].update({"blocks.2.ln1.bias": torch.zeros(24)}), "do not fit"),
    (lambda content: content["weights"].update({"ln_f.bias": [0.0] * 24}), "not a model file"),
    (lambda content: content["weights"].update({"ln_f.bias": torch.zeros(1).expand(2**40)}), "not a model file"),
    (
        lambda content: content["weights"].update({"ln_f.bias": torch.zeros(1).expand(2**62, 1)}),
        "it holds more numbers",
    ),
    (
        lambda content: content["weights"].update({"ln_f.bias": torch.zeros(24, dtype=int)}),
        "'ln_f.bias' in it is no weight",
    ),
    (
        lambda content: content["weights"].update({"ln_f.bias": torch.eye(24).to_sparse()}),
        "'ln_f.bias' in it is no weight",
    ),
    (lambda content: content["weights"].update({"ln_f.bias": torch.zeros(24, device="meta")}), "not a model file"),
    (lambda content: content["weights"].update({1: torch.zeros(24)}), "do not fit"),
    (lambda content: content.update(weights=[torch.zeros(24)]), "not a model file"),
    (partial(set_weight, value=math.nan), "blocks.1.ln1.bias is NaN or absurd in places; use a file from before"),
    (partial(set_weight, value=-math.inf), "blocks.1.ln1.bias is NaN or absurd in places"),
    (partial(set_weight, value=1e30), "blocks.1.ln1.bias is NaN or absurd in places"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_parts_that_do_not_make_a_model_are_refused(saved, spoil, message):
    content = torch.load(saved, weights_only=True)
    spoil(content)
    torch.save(content, saved)
    with pytest.raises(ModelFileError, match=f"^{re.escape(str(saved))}: [^\n]*{message}[^\n]*$"):
        load_model(saved)


def assert_cuts_are_refused(path: Path, step: int) -> int:
    """Cut the file after every `step`-th byte, and after each of the last hundred; return how many times."""
    data, cut = path.read_bytes(), path.with_name("cut.pkl")
    ends = [*range(0, len(data) - 100, step), *range(len(data) - 100, len(data))]
    for end in reversed(ends):
        cut.write_bytes(data[:end])
        with pytest.raises(ModelFileError, match=r"cut\.pkl: not a model file[^\n]*$"):
            load_model(cut, vocabulary=Vocabulary("\n abcdefghi"))
    return len(ends)


def test_a_model_cut_short_is_refused(saved):
    assert assert_cuts_are_refused(saved, step=1999) > 100


# The command line ----------------------------------------------------------------------------------------------------


def test_help_shows_each_flag_once_with_what_it_takes_and_its_real_default(capsys):
    parser, flag = make_parser("A script.")
    flag("batch_size", type=bounded(int, 1), default=32, help="rows")
    flag("rate", type=bounded(float, 0), help="speed")
    flag("model", type=Path, default=Path("m.pkl"), help="a file")
    flag("data_dir", type=Path, help="a folder")
    flag("prompt", help="a text")
    flag("device", metavar="NAME", help="where")
    flag("dtype", choices=("a", "b"), default="b", help="kind")
    flag("resume", action="store_true", help="go on")
    with pytest.raises(SystemExit):
        parser.parse_args(["-h"])
    lines = [re.sub(" +", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[4:] == [
        "-batch_size N rows (default: 32)",
        "-rate X speed",
        "-model FILE a file (default: m.pkl)",
        "-data_dir FOLDER a folder",
        "-prompt TEXT a text",
        "-device NAME where",
        "-dtype {a,b} kind (default: b)",
        "-resume go on",
    ]
    for arguments in (["-batch_size", "4", "-resume"], ["--batch_size=4", "--resume"]):
        args = parser.parse_args(arguments)
        assert vars(args).keys() == {"batch_size", "rate", "model", "data_dir", "prompt", "device", "dtype", "resume"}
        assert (args.batch_size, args.resume, args.rate, args.dtype) == (4, True, None, "b")
    saved = argparse.Namespace(**{**vars(args), "batch_size": 7})  # settings of an earlier run go before the defaults
    assert parser.parse_args(["--dtype", "a"], saved).batch_size == 7


# The tutorial's own files --------------------------------------------------------------------------------------------


def run_python(*arguments, cwd: Path, timeout: float = 300) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, timeout=timeout, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Return a folder with the models that tutorial.py makes, and its vocab.txt."""
    folder = tmp_path_factory.mktemp("tutorial")
    run_python(ROOT / "tests" / "tutorial.py", folder, cwd=folder)
    return folder


WAYS = [*(f"protocol-{protocol}" for protocol in range(6)), "saved", "state_dict", "pickled_state_dict"]


@pytest.mark.parametrize("name", [*WAYS, *(f"cuda-{way}" for way in WAYS), "float64", "float16", "bfloat16"])
def test_the_tutorials_models_load(theirs, name):
    path = theirs / f"{name}.pkl"
    assert name.startswith("cuda") == (b"cuda:0" in path.read_bytes())
    model, vocabulary = load_model(path, vocabulary=Vocabulary.from_file(theirs / "vocab.txt"))
    shape = {"vocab_size": 11, "n_embd": 12, "n_head": 3, "n_layer": 2, "block_size": 8}
    assert shape.items() <= model.config.items() and vocabulary.characters == "\n abcdefghi"
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
    index, logits = torch.load(theirs / "logits.pt", map_location="cpu")
    torch.testing.assert_close(model(index)[0], logits[path.name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("module", [b"__main__", b"gpt", b"mypackage.models.gpt"])
@pytest.mark.parametrize("feed_forward", [b"FeedFoward", b"FeedForward"])
def test_the_tutorials_classes_may_come_from_any_module(theirs, tmp_path, module, feed_forward):
    def rename(pickled: bytes) -> bytes:
        return pickled.replace(b"FeedFoward", feed_forward).replace(b"c__main__\n", b"c" + module + b"\n")

    (tmp_path / "pickled.pkl").write_bytes(rename((theirs / "protocol-0.pkl").read_bytes()))
    with zipfile.ZipFile(theirs / "saved.pkl") as old, zipfile.ZipFile(tmp_path / "saved.pkl", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, rename(data) if name.endswith("data.pkl") else data)
    for name in ("pickled.pkl", "saved.pkl"):
        model, _ = load_model(tmp_path / name, vocabulary=Vocabulary("\n abcdefghi"))
        assert model.config["n_layer"] == 2


def optimizer_state(model: GPTLanguageModel) -> dict:
    optimizer = torch.optim.AdamW(model.parameters())
    model(random_ids(1, 4), random_ids(1, 4))[1].backward()
    optimizer.step()
    return optimizer.state_dict()


def beside_the_weights(model: GPTLanguageModel) -> dict:
    """Return what people put into a checkpoint beside the weights."""
    return {
        "optimizer": optimizer_state(model),
        "epoch": 3,
        "loss": np.float64(2.5),
        "history": np.zeros(3),
        "args": argparse.Namespace(lr=0.1, data=Path("data")),
        "rng": torch.get_rng_state(),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }


def prefixed(model: GPTLanguageModel, prefix: str) -> dict:
    return {prefix + name: weight for name, weight in model.state_dict().items()}


CONTAINERS = {
    "compiled": lambda model: prefixed(model, "_orig_mod."),
    "of DistributedDataParallel": lambda model: prefixed(model, "module."),
    "of both": lambda model: prefixed(model, "module._orig_mod."),
    "with compiled blocks": lambda model: {
        name.replace("blocks.0.", "blocks.0._orig_mod."): weight for name, weight in model.state_dict().items()
    },
    **{
        f"in {key}": lambda model, key=key: {key: model.state_dict(), **beside_the_weights(model)}
        for key in ("model", "model_state_dict", "state_dict")
    },
    "compiled, in a checkpoint": lambda model: {"model": prefixed(model, "_orig_mod."), **beside_the_weights(model)},
    "a whole model": lambda model: model,
    "a whole model in a checkpoint": lambda model: {"model": model, **beside_the_weights(model)},
}


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
@pytest.mark.parametrize("name", CONTAINERS)
def test_weights_are_found_where_people_keep_them(model, tmp_path, name, dump):
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    content = CONTAINERS[name](model)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}  # after a step of the optimizer
    with open(tmp_path / "model.pkl", "wb") as file:
        dump(content, file)
    loaded, _ = load_model(tmp_path / "model.pkl", vocabulary=VOCABULARY)
    assert expected.keys() == loaded.state_dict().keys()
    assert all(weight.equal(weights[name]) for name, weight in loaded.state_dict().items())
    assert read_model_file(tmp_path / "model.pkl").keys() == {"weights"}


@posix
@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_a_whole_distributed_model_loads(model, tmp_path, dump):
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with open(tmp_path / "model.pkl", "wb") as file:
            dump(DistributedDataParallel(model), file)
    finally:
        distributed.destroy_process_group()
    loaded, _ = load_model(tmp_path / "model.pkl", vocabulary=VOCABULARY)
    assert loaded(random_ids(1, 5))[0].equal(model(random_ids(1, 5))[0])


def test_a_file_of_torch_before_1_6_loads(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pkl", _use_new_zipfile_serialization=False)
    loaded, _ = load_model(tmp_path / "model.pkl", vocabulary=VOCABULARY)
    assert loaded(random_ids(1, 5))[0].equal(model(random_ids(1, 5))[0])


def test_a_model_with_a_larger_block_size_than_allowed_is_refused_for_that(tmp_path):
    weights = GPTLanguageModel(3, n_embd=2, n_head=1, n_layer=1, block_size=2).state_dict()
    weights["position_embedding_table.weight"] = torch.zeros(MAX_BLOCK_SIZE + 1, 2)
    torch.save(weights, tmp_path / "model.pkl")
    with pytest.raises(ModelFileError, match=r"do not fit \(block_size must be at most 8192, not 8193"):
        load_model(tmp_path / "model.pkl", vocabulary=Vocabulary("abc"))


def test_loaded_weights_share_no_memory(model, tmp_path):
    weights = model.state_dict()
    weights["blocks.0.ln1.weight"] = weights["blocks.0.ln2.weight"]
    torch.save(weights, tmp_path / "model.pkl")
    loaded, _ = load_model(tmp_path / "model.pkl", vocabulary=VOCABULARY)
    addresses = {weight.untyped_storage().data_ptr() for weight in loaded.state_dict().values()}
    assert len(addresses) == len(weights)


def test_a_file_without_a_vocabulary_asks_for_it(theirs):
    with pytest.raises(ModelFileError, match=r"holds no vocabulary; name the vocab.txt .*: -vocab vocab.txt$"):
        load_model(theirs / "saved.pkl")
    with pytest.raises(ModelFileError, match=r"knows 11 characters, the given vocabulary has 3; .* -vocab vocab.txt$"):
        load_model(theirs / "saved.pkl", vocabulary=Vocabulary("abc"))


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["Linux", "Windows"])
@pytest.mark.parametrize("extra", ["", "\r"])
def test_the_tutorials_vocabulary_is_what_it_read_itself(theirs, tmp_path, newline, extra):
    path = tmp_path / "vocab.txt"
    with open(path, "w", encoding="utf-8", newline=newline) as file:  # what text mode does on these systems
        for character in sorted("\n abcdefghi" + extra):
            file.write(character + "\n")
    characters = sorted(set(path.read_text(encoding="utf-8")))
    _, vocabulary = load_model(theirs / "saved.pkl", vocabulary=Vocabulary.from_file(path))
    assert list(vocabulary.characters) == characters == list("\n abcdefghi")


def test_the_tutorial_counts_the_line_ends_of_its_vocabulary_as_a_character(theirs, tmp_path):
    path = tmp_path / "vocab.txt"
    for extra in ("", "\r"):  # a text with no line end in it, or with carriage returns
        characters = " abcdefghi" + extra
        path.write_bytes("".join(f"{character}\n" for character in sorted(characters)).encode())
        assert list(Vocabulary.from_file(path).characters) == sorted(characters)
        _, vocabulary = load_model(theirs / "saved.pkl", vocabulary=Vocabulary.from_file(path))
        assert list(vocabulary.characters) == sorted(set(path.read_text())) == list("\n abcdefghi")


def test_the_chatbot_talks_with_the_tutorials_model(theirs, run_main):
    flags = ["-model", theirs / "protocol-4.pkl", "-prompt", "abc", "-max_new_tokens", 4, "-dtype", "float32"]
    done = run_main("chatbot.py", *flags, "-vocab", theirs / "vocab.txt")
    assert done.returncode == 0 and done.stdout.startswith("Completion:\nabc")


def test_training_starts_from_the_tutorials_model(theirs, run_main, tmp_path):
    write_texts(tmp_path, "abc def ghi\n" * 30)
    flags = ["-batch_size", 2, "-max_iters", 1, "-learning_rate", 1e-9, "-compile", "off", "-dtype", "float32"]
    flags += ["-init_from", theirs / "protocol-4.pkl", "-vocab", theirs / "vocab.txt"]
    done = run_main("training.py", *flags)
    assert done.returncode == 0, done.stderr
    model, _ = load_model(tmp_path / "model-01.pkl")
    index, logits = torch.load(theirs / "logits.pt", map_location="cpu")
    torch.testing.assert_close(model(index)[0], logits["protocol-4.pkl"], atol=1e-5, rtol=0)


# Hostile and damaged files, read in a process of their own -----------------------------------------------------------


def read_apart(folder: Path, *numbers: int, timeout: float = 300) -> list[tuple[str, str, float]]:
    """Return names, what came of them, and seconds, of the model files in a folder, or of mutations of them.

    See fuzz.py.
    """
    lines = run_python(ROOT / "tests" / "fuzz.py", folder, *numbers, cwd=folder, timeout=timeout).splitlines()
    return [tuple(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Return what came of each hostile file, by its name, and the folder where all of them were read."""
    folder = tmp_path_factory.mktemp("hostile")
    put(folder, {f"{name}.pkl": content for name, content in hostile_files(folder).items()})
    return {name: rest for name, *rest in read_apart(folder)}, folder


def assert_refused(outcome: str, seconds: float) -> None:
    assert re.fullmatch(r"refused: [^\n]*\.pkl: not a (model file|GPTLanguageModel)[^\n]*", outcome)
    assert seconds < 20


@pytest.mark.parametrize("name", [*IMPOSSIBLE, *ATTACKS])
def test_impossible_files_are_refused(hostile, name):
    assert_refused(*hostile[0][f"{name}.pkl"])


def test_calls_in_files_are_refused_and_not_made(hostile, tmp_path):
    outcomes, folder = hostile
    assert not (folder / "ran").exists()
    for name, call in calls(tmp_path).items():
        for way in (*range(6), "in a dict", "in an archive", "in a storage"):
            assert_refused(*outcomes[f"{name} {way}.pkl"])
        done = pickle.loads(pickle.dumps(call))  # the same does run in Python's own unpickler
        if isinstance(done, map):
            list(done)
        elif isinstance(done, subprocess.Popen):
            done.wait(timeout=60)
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_a_call_beside_good_weights_is_not_made(model, tmp_path, dump):
    for name, call in calls(tmp_path).items():
        with open(tmp_path / "model.pkl", "wb") as file:
            dump({"model": model.state_dict(), "more": call}, file)
        try:
            load_model(tmp_path / "model.pkl", vocabulary=VOCABULARY)
        except ModelFileError as error:
            assert "not a model file" in str(error)
        assert not (tmp_path / "ran").exists(), name


def test_reading_a_hostile_file_leaves_nothing_behind(tmp_path, saved):
    """A pickle can set attributes of whatever it is given, also of functions and classes."""
    functions = [value for value in vars(model_module).values() if callable(value) and hasattr(value, "__dict__")]
    before = [(dict(vars(f)), getattr(f, "__defaults__", None), getattr(f, "__code__", None)) for f in functions]
    for content in ATTACKS.values():
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(ModelFileError):
            load_model(tmp_path / "x.pkl")
    after = [(dict(vars(f)), getattr(f, "__defaults__", None), getattr(f, "__code__", None)) for f in functions]
    assert after == before
    load_model(saved)


def test_what_a_file_says_in_an_archive_is_checked_against_its_sums(saved):
    data = bytearray(saved.read_bytes())
    place = data.index(b"data/0") + 500  # in the numbers of a weight
    data[place] ^= 1
    saved.write_bytes(data)
    with pytest.raises(ModelFileError, match="or one that is damaged"):
        load_model(saved)


@pytest.fixture
def sources(theirs, tmp_path, run_main):
    """Return a folder with files of every kind that the scripts read, to be mutated."""
    names = ("protocol-0.pkl", "protocol-2.pkl", "protocol-4.pkl", "saved.pkl", "state_dict.pkl", "vocab.txt")
    write_texts(tmp_path, "abc def ghi\n" * 30)
    put(tmp_path, {name: (theirs / name).read_bytes() for name in names})
    for optimizer in ("adamw", "muon"):
        flags = ["-n_embd=4", "-max_iters=2", f"-optimizer={optimizer}", f"-model={optimizer}.pkl"]
        assert run_main("training.py", *TINY, *flags, f"-data_dir={tmp_path}").returncode == 0
    return tmp_path


def assert_fuzzed(outcomes: list[tuple[str, str, float]], count: int) -> int:
    """Return how many of the files could be read."""
    originals, outcomes = outcomes[:-count], outcomes[-count:]
    assert originals and all(result == "works" for _, result, _ in originals)
    wrong = [line for line in outcomes if not re.fullmatch(r"works|refused: [^\n]+", line[1])]
    assert not wrong and len(outcomes) == count
    return sum(result == "works" for _, result, _ in outcomes)


def test_mutated_files_load_or_are_refused(sources):
    assert 0 < assert_fuzzed(read_apart(sources, 0, 150), 150) < 100


# Long campaigns: pytest -m soak --------------------------------------------------------------------------------------


@pytest.mark.soak
def test_many_mutated_files_load_or_are_refused(sources):
    working, slowest = 0, 0
    for first in range(0, 12000, 1000):
        outcomes = read_apart(sources, first, 1000, timeout=1200)
        working += assert_fuzzed(outcomes, 1000)
        slowest = max(slowest, *(seconds for *_, seconds in outcomes))
        print(f"{first + 1000} mutated files: {working} work, the others are refused; the slowest took {slowest} s")


@pytest.mark.soak
def test_files_cut_short_at_any_byte_are_refused(sources):
    for path in (sources / name for name in ("adamw.pkl", "muon.state.pkl", "state_dict.pkl", "protocol-4.pkl")):
        print(f"{path.name}: {assert_cuts_are_refused(path, step=1)} cuts")
