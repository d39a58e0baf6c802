"""model.py: the design's maths, generation with and without a full window, and the file a model is kept in."""

import math

import pytest
import torch
from reference import PlainGPT

from model import (
    Dropout,
    GPTLanguageModel,
    Head,
    ModelFileError,
    MultiHeadAttention,
    Vocabulary,
    load_model,
    save_model,
)

SHAPE = {"vocab_size": 11, "n_embd": 24, "n_head": 3, "n_layer": 2, "block_size": 16}


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


# The maths


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("time_steps", [1, 2, 15, 16])
def test_logits_loss_and_gradients_equal_the_plain_implementation(model, plain, time_steps, fused, monkeypatch):
    monkeypatch.setattr(MultiHeadAttention, "prefers_fused", lambda self, q: fused)
    index, targets = random_ids(3, time_steps), random_ids(3, time_steps).flip(0)
    (logits, loss), (plain_logits, plain_loss) = model(index, targets), plain(index, targets)
    torch.testing.assert_close(logits, plain_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, plain_loss, atol=1e-6, rtol=1e-6)
    loss.backward()
    plain_loss.backward()
    plain_gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain_gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 16)])
def test_logits_are_the_same_with_and_without_gradients(model, shape):
    with torch.no_grad():  # takes the fused attention, and for a single row a multiplication of its own
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


@pytest.mark.parametrize("fused", [True, False])
def test_multi_head_attention_equals_its_heads_one_by_one(fused, monkeypatch):
    monkeypatch.setattr(MultiHeadAttention, "prefers_fused", lambda self, q: fused)
    torch.manual_seed(3)
    attention = MultiHeadAttention(num_heads=4, head_size=8, n_embd=32, block_size=20, dropout=0.3).eval()
    x = torch.randn(5, 20, 32)
    one_by_one = attention.proj(torch.cat([head(x) for head in attention.heads], dim=-1))
    torch.testing.assert_close(attention(x), one_by_one, atol=1e-5, rtol=1e-5)


def test_head_is_a_causal_softmax_average_of_values():
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


def test_default_model_is_the_designs():
    model = GPTLanguageModel(100)
    assert model.config == {
        "vocab_size": 100, "n_embd": 384, "n_head": 4, "n_layer": 4, "block_size": 128, "dropout": 0.2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("vocab_size", "n_embd", "n_head", "n_layer", "block_size"), [(7, 12, 3, 1, 5), (100, 32, 4, 3, 8)]
)
def test_parameter_count_by_formula(vocab_size, n_embd, n_head, n_layer, block_size):
    model = GPTLanguageModel(vocab_size, n_embd, n_head, n_layer, block_size)
    attention = 3 * n_embd**2 + n_embd**2 + n_embd
    feed_forward = 4 * n_embd**2 + 4 * n_embd + 4 * n_embd**2 + n_embd
    norms = 2 * 2 * n_embd
    ends = vocab_size * n_embd + block_size * n_embd + 2 * n_embd + n_embd * vocab_size + vocab_size
    assert sum(p.numel() for p in model.parameters()) == n_layer * (attention + feed_forward + norms) + ends


def test_state_dict_has_the_tutorials_names():
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


@pytest.mark.parametrize(
    "move", [lambda model: model, lambda model: model.to(torch.bfloat16), lambda model: model.to("cpu")]
)
def test_all_heads_share_one_boolean_triangle(move):
    model = move(GPTLanguageModel(**SHAPE))
    trils = [module.tril for module in model.modules() if isinstance(module, Head)]
    assert len(trils) == 6 and all(tril is trils[0] for tril in trils)
    assert trils[0].dtype == torch.bool and trils[0].equal(torch.ones(16, 16).tril().bool())


@pytest.mark.parametrize("shape", [(1, 0), (1, 17), (4, 100)])
def test_too_many_or_no_time_steps_are_refused(model, shape):
    with pytest.raises(ValueError, match="1 to 16 time steps"):
        model(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"block_size": -1}, "block_size must be at least 1"),
        ({"n_embd": 25}, "must be a multiple of n_head"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"dropout": -0.1}, "dropout must be"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPTLanguageModel(**{**SHAPE, **arguments})


# Dropout


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
    attention = MultiHeadAttention(num_heads=2, head_size=32, n_embd=64, block_size=32, dropout=0.25)
    eye = torch.eye(32).expand(500, 2, 32, 32)
    equal = torch.zeros(500, 2, 32, 32)
    weights = attention.heads[0].attend(
        equal, equal, eye, attention.heads[0].tril
    )  # values that show the weights themselves
    kept = weights[:, :, -1] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(weights[:, :, -1][kept].unique(), torch.tensor([1 / 32 / 0.75]))
    assert not weights.triu(1).any()


# Generation


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
@pytest.mark.parametrize("whole", [True, False], ids=["as on a GPU", "as on a CPU"])
@pytest.mark.parametrize("gradients", [True, False])
def test_cached_logits_equal_the_whole_models(model, lengths, gradients, whole):
    index, positions = random_ids(2, 16), torch.arange(16)
    caches = model.new_caches(2)
    for cache in caches:
        cache.whole = whole
    with torch.set_grad_enabled(gradients):
        parts = [
            model(*part, caches=caches)[0]
            for part in zip(index.split(lengths, dim=1), [None] * 16, positions.split(lengths))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(index)[0], atol=1e-5, rtol=1e-5)


@pytest.fixture
def compiler():
    """What torch has compiled, and how it is to use it, is forgotten before and after."""
    torch.compiler.reset()
    yield torch.compiler
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def test_the_work_for_a_token_is_one_graph_that_fits_every_token(model, compiler):
    prompt = random_ids(2, 3)
    expected = model.generate(prompt, 40, temperature=0)
    caches = model.new_caches(2)
    for cache in caches:
        cache.whole = True  # as on a GPU
    model.compile(backend="eager", fullgraph=True)
    model.generate(prompt[:, :1], 2, caches=caches)
    compiler.set_stance("fail_on_recompile")
    assert model.generate(prompt, 40, temperature=0, caches=caches).equal(expected)


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
    prompt = random_ids(1, 6).expand(20000, 6)
    generator = torch.Generator().manual_seed(9)
    logits = model(prompt[:1])[0][0, -1]
    drawn = model.generate(prompt, 1, temperature=2.0, top_k=4, generator=generator)[:, -1]
    shares = drawn.bincount(minlength=SHAPE["vocab_size"]) / len(drawn)
    expected = torch.zeros(SHAPE["vocab_size"])
    likeliest = logits.topk(4).indices
    expected[likeliest] = torch.softmax(logits[likeliest] / 2.0, dim=0)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert not shares[expected == 0].any()


@pytest.mark.parametrize(("never", "top_k"), [([0, 7], None), ([2], 4), (list(range(10)), 3)])
def test_what_is_never_sampled_takes_no_place_among_the_likeliest(model, never, top_k):
    prompt = random_ids(1, 6).expand(20000, 6)
    logits = model(prompt[:1])[0][0, -1].clone()
    never = logits.argsort(descending=True)[never]
    logits[never] = -math.inf
    top_k_of_rest = min(top_k or len(logits), len(logits) - len(never))
    generator = torch.Generator().manual_seed(9)
    drawn = model.generate(prompt, 1, top_k=top_k, generator=generator, never=never.tolist())[:, -1]
    likeliest = logits.topk(top_k_of_rest).indices
    expected = torch.zeros(len(logits))
    expected[likeliest] = torch.softmax(logits[likeliest], dim=0)
    shares = drawn.bincount(minlength=len(logits)) / len(drawn)
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert not shares[expected == 0].any()
    greedy = model.generate(prompt[:1], 1, temperature=0, never=never.tolist())[0, -1]
    assert greedy == logits.argmax()


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
        (torch.tensor([[0]]), {"never": range(11)}),
        (torch.tensor([[0]]), {"never": [11]}),
        (torch.tensor([[0]]), {"never": [-1]}),
    ],
)
def test_generation_refuses_bad_ids_and_options(model, index, options):
    with pytest.raises(ValueError, match="must be"):
        model.generate(index, 1, **options)


# Vocabulary and file


def test_vocabulary_round_trip(tmp_path):
    characters = "\n\t aé“中🙂"
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{c}\n" for c in sorted(characters)), encoding="utf-8", newline="\n")
    vocabulary = Vocabulary.from_file(path)
    assert len(vocabulary) == len(characters)
    assert vocabulary.characters == "".join(sorted(characters))
    assert vocabulary.decode(vocabulary.encode("中 é\n🙂")) == "中 é\n🙂"
    with pytest.raises(ValueError, match="'b' is not in the vocabulary"):
        vocabulary.encode("ab")


def test_a_saved_model_comes_back_whole_and_in_eval_mode(model, tmp_path):
    vocabulary = Vocabulary("abcdefghijk")
    path = tmp_path / "model.pkl"
    save_model(path, model.train(), vocabulary)
    loaded, loaded_vocabulary = load_model(path)
    assert not loaded.training
    assert loaded.config == model.config and loaded_vocabulary.characters == "abcdefghijk"
    index = random_ids(2, 16)
    assert loaded(index)[0].equal(model.eval()(index)[0])
    assert [file.name for file in tmp_path.iterdir()] == ["model.pkl"]


def test_a_model_can_be_trained_on_after_loading(model, tmp_path):
    save_model(tmp_path / "model.pkl", model, Vocabulary("abcdefghijk"))
    loaded, _ = load_model(tmp_path / "model.pkl")
    loaded(random_ids(1, 4), random_ids(1, 4))[1].backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_the_file_holds_only_data_and_tensors(model, tmp_path):
    save_model(tmp_path / "model.pkl", model, Vocabulary("abcdefghijk"))
    content = torch.load(tmp_path / "model.pkl", weights_only=True)
    assert set(content) == {"config", "vocabulary", "weights"}
    assert set(content["weights"]) == set(model.state_dict())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"\x80\x04cos\nsystem\n(S'echo'\ntR.",
        {"weights": {}},
        {"config": {**SHAPE, "dropout": 0.0}, "vocabulary": "abcdefghijk", "weights": {}},
        {"config": {**SHAPE, "layers": 1}, "vocabulary": "abcdefghijk", "weights": {}},
        ["a list"],
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "model.pkl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ModelFileError, match=r"model\.pkl: not a model"):
        load_model(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content["config"].update(n_layer=10**9), "not a model"),
        (lambda content: content["config"].update(block_size=10**6), "not a model"),
        (lambda content: content["weights"].pop("ln_f.bias"), "not a model"),
        (lambda content: content["weights"].update(more=torch.zeros(1)), "not a model"),
        (lambda content: content["weights"]["ln_f.bias"].fill_(math.nan), "not finite float32"),
        (lambda content: content["weights"].update({"ln_f.bias": torch.zeros(24).double()}), "not finite float32"),
    ],
)
def test_weights_that_do_not_make_a_model_are_refused(model, tmp_path, spoil, message):
    path = tmp_path / "model.pkl"
    save_model(path, model, Vocabulary("abcdefghijk"))
    content = torch.load(path, weights_only=True)
    spoil(content)
    torch.save(content, path)
    with pytest.raises(ModelFileError, match=message):
        load_model(path)


def test_a_vocabulary_that_does_not_fit_is_refused(model, tmp_path):
    save_model(tmp_path / "model.pkl", model, Vocabulary("abc"))
    with pytest.raises(ModelFileError, match="vocabulary does not fit"):
        load_model(tmp_path / "model.pkl")


def test_a_failed_save_leaves_the_former_file(model, tmp_path, monkeypatch):
    path = tmp_path / "model.pkl"
    save_model(path, model, Vocabulary("abcdefghijk"))
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda content, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(path, model, Vocabulary("abcdefghijk"))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
