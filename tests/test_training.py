"""training.py: rows drawn from memory-mapped text, the recipe, and runs as a person starts and stops them."""

import math
import random
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import training
from model import GPTLanguageModel, Vocabulary, load_model

SCRIPTS = "Plain text, Привет мир, γειά, 中文字符, नमस्ते, שלום, “quoted” – é🙂🚀\n"
TINY = ["-batch_size=4", "-block_size=8", "-n_embd=16", "-n_head=2", "-n_layer=1", "-eval_iters=2", "-device=cpu"]


def write_texts(folder: Path, train: str, val: str | None = None, vocabulary: str | None = None) -> Path:
    val = val or train
    for name, text in (("output_train.txt", train), ("output_val.txt", val)):
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    characters = sorted(set(vocabulary or train + val))
    (folder / "vocab.txt").write_text("".join(f"{c}\n" for c in characters), encoding="utf-8", newline="\n")
    return folder


@pytest.fixture
def texts(tmp_path):
    """A folder with texts long enough for the TINY shape."""
    return write_texts(tmp_path, "the cat sat on the mat\n" * 200, "the mat sat on the cat\n" * 20)


def open_text(folder: Path, block_size: int) -> training.Text:
    vocabulary = Vocabulary.from_file(folder / "vocab.txt")
    return training.Text(folder / "output_train.txt", vocabulary, block_size)


# Rows of text


def shuffled_text(count: int) -> str:
    characters = list(SCRIPTS * count)
    random.Random(1).shuffle(characters)
    return "".join(characters)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_rows_are_whole_characters_of_the_text(tmp_path, block_size):
    content = shuffled_text(20)
    text = open_text(write_texts(tmp_path, content), block_size)
    starts = np.cumsum([0] + [len(character.encode()) for character in content])
    vocabulary = Vocabulary(content)
    offsets = text.draw_offsets(500, [1, 2])
    for offset, row in zip(offsets, text.rows(offsets)):
        (position,) = np.flatnonzero(starts == offset)  # a byte inside a character is at no start
        assert vocabulary.decode(row) == content[position : position + block_size + 1]


def test_every_character_is_equally_likely_to_begin_a_row(tmp_path):
    content = "a🙂é" * 5
    text = open_text(write_texts(tmp_path, content), block_size=2)
    offsets = text.draw_offsets(13 * 2000, [3])
    found, counts = np.unique(offsets, return_counts=True)
    starts = np.cumsum([0] + [len(character.encode()) for character in content])
    assert found.tolist() == starts[: len(content) - 2].tolist()  # the last possible row included
    assert counts.min() > 1800 and counts.max() < 2200


def test_rows_depend_on_their_key_alone(texts):
    text = open_text(texts, 8)
    first = text.draw_offsets(32, [1337, 5, 0])
    text.draw_offsets(100, [1337, 6, 0])
    assert np.array_equal(open_text(texts, 8).draw_offsets(32, [1337, 5, 0]), first)
    for other in ([1337, 6, 0], [1338, 5, 0], [1337, 5, 1]):
        assert not np.array_equal(text.draw_offsets(32, other), first)


def test_targets_are_the_characters_after_the_inputs(texts):
    text = open_text(texts, 8)
    x, y = training.get_batch(text, 16, [1, 2, 0], torch.device("cpu"))
    assert x.shape == y.shape == (16, 8) and x.dtype == torch.int64
    assert x[:, 1:].equal(y[:, :-1])
    vocabulary = Vocabulary.from_file(texts / "vocab.txt")
    content = (texts / "output_train.txt").read_text()
    for inputs, targets in zip(x.tolist(), y.tolist()):
        assert vocabulary.decode(inputs + targets[-1:]) in content


@pytest.mark.parametrize("content", ["", "a", "12345678", "🙂" * 8])
def test_a_text_shorter_than_a_row_is_refused_at_the_start(tmp_path, content):
    write_texts(tmp_path, content, "long enough to validate with", vocabulary="12345678a🙂")
    with pytest.raises(training.TrainingError, match=f"output_train.txt: holds {len(content)} characters"):
        open_text(tmp_path, 8)


def test_a_text_of_exactly_one_row_is_enough(tmp_path):
    text = open_text(write_texts(tmp_path, "日本語テキスト!é"), 8)
    assert text.draw_offsets(5, [0]).tolist() == [0] * 5
    assert text.rows(np.array([0])).shape == (1, 9)


def test_an_unknown_character_is_named_with_its_place(tmp_path):
    text = open_text(write_texts(tmp_path, "ééé∞é" * 4, vocabulary="é"), 8)
    with pytest.raises(training.TrainingError, match=r"output_train.txt: the character '∞' at byte 6 is not in vocab"):
        text.rows(np.array([2]))


@pytest.mark.parametrize(("data", "place"), [(b"good" + b"\xff" + b"text" * 9, 4), (b"abcd" * 5 + b"\xe2\x82", None)])
def test_text_that_is_not_utf8_is_named(tmp_path, data, place):
    write_texts(tmp_path, "abcdefghijklmnopqrstuvwxyz")
    (tmp_path / "output_train.txt").write_bytes(data)
    text = open_text(tmp_path, 8)
    with pytest.raises(training.TrainingError, match=f"at byte {place}" if place else "cut short"):
        text.rows(np.arange(text.last_start + 1))


# The recipe


def args(*flags):
    return training.parse_args([*TINY, *map(str, flags)])


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    recipe = args("-learning_rate", 1.0, "-min_lr", 0.1, "-warmup_iters", 10, "-max_iters", 110)
    rates = [training.learning_rate_at(step, recipe) for step in (0, 4, 9, 10, 35, 60, 85, 110)]
    quarter = 0.45 * math.cos(math.pi / 4)
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55 + quarter, 0.55, 0.55 - quarter, 0.1])


def test_the_ends_of_the_schedule_follow_from_the_other_flags():
    recipe = args("-learning_rate", 0.5, "-max_iters", 60)
    assert (recipe.min_lr, recipe.warmup_iters) == (0.05, 20)
    assert args("-max_iters", 10_000).warmup_iters == 150


def test_only_matrices_are_decayed():
    model = GPTLanguageModel(7, n_embd=8, n_head=2, n_layer=1, block_size=4)
    decays = {
        p: group["weight_decay"] for group in training.make_optimizer(model, 0.3).param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert decays[parameter] == (0.3 if parameter.dim() == 2 else 0.0), name
    assert len(decays) == len(list(model.parameters()))


def test_evaluation_repeats_and_leaves_the_model_training(texts):
    text = open_text(texts, 8)
    model = GPTLanguageModel(len(Vocabulary.from_file(texts / "vocab.txt")), 16, 2, 1, 8).train()
    first, second = (training.estimate_loss(model, text, args()) for _ in range(2))
    assert first == second and model.training


# Runs


def run_in(folder, *flags):
    with training.Interruption() as interruption:
        return training.run(args("-data_dir", folder, "-model", folder / "model-01.pkl", *flags), interruption)


def weights_after(folder, *flags) -> torch.Tensor:
    run_in(folder, *flags)
    return load_model(folder / "model-01.pkl")[0].lm_head.weight


def evaluations(output: str) -> list[tuple[int, float, bool]]:
    found = re.findall(r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)(, saved)?", output, re.MULTILINE)
    return [(int(step), float(loss), bool(saved)) for step, loss, saved in found]


def test_a_run_reports_what_it_does_and_keeps_the_best_model(texts, capsys):
    assert run_in(texts, "-max_iters", 25, "-eval_interval", 10) == 0
    output = capsys.readouterr().out
    for expected in ("cpu", "parameters", "vocabulary  11 characters", "0.00 MB to validate", "4 x 8 = 32 tokens"):
        assert expected in output
    lines = evaluations(output)
    assert [step for step, _, _ in lines] == [10, 20, 25]  # the last step is always evaluated
    best = math.inf
    for _, loss, saved in lines:
        assert saved == (loss < best)
        best = min(best, loss)
    assert f"best validation loss {best:.4f}" in output and "python chatbot.py" in output
    model, vocabulary = load_model(texts / "model-01.pkl")
    assert model.config["n_embd"] == 16 and vocabulary.characters == "\n acehmnost"


def test_it_learns(texts, capsys):
    run_in(texts, "-max_iters", 150, "-eval_interval", 150, "-learning_rate", 0.02, "-warmup_iters", 5, "-dropout", 0)
    ((_, loss, _),) = evaluations(capsys.readouterr().out)
    assert loss < 1.0  # from ln(11) = 2.4


def test_the_seed_decides_everything(texts):
    weights = [weights_after(texts, "-max_iters", 5, "-seed", seed) for seed in (1, 1, 2)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_an_earlier_model_is_kept(texts, capsys):
    run_in(texts, "-max_iters", 2)
    first = (texts / "model-01.pkl").read_bytes()
    assert not (texts / "model-01.old.pkl").exists()
    run_in(texts, "-max_iters", 4, "-eval_interval", 2, "-seed", 2)
    assert (texts / "model-01.old.pkl").read_bytes() == first
    assert (texts / "model-01.pkl").read_bytes() != first
    assert "kept as" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_model(texts):
    run_in(texts, "-max_iters", 2)
    before = (texts / "model-01.pkl").read_bytes()
    with pytest.raises(training.TrainingError, match=r"the loss is (nan|inf) after step 6, at .* -learning_rate"):
        run_in(texts, "-max_iters", 20, "-eval_interval", 6, "-learning_rate", 1e30, "-warmup_iters", 0)
    assert (texts / "model-01.pkl").read_bytes() == before


def test_a_clip_of_0_clips_nothing(texts):
    weights = [weights_after(texts, "-max_iters", 3, "-grad_clip", clip) for clip in (0, 1e9, 0.01)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_precisions_train_and_save_float32_weights(texts, capsys, dtype):
    run_in(texts, "-max_iters", 60, "-dtype", dtype, "-learning_rate", 0.02, "-warmup_iters", 5, "-eval_interval", 60)
    output = capsys.readouterr().out
    assert dtype in output
    ((_, loss, _),) = evaluations(output)
    assert loss < 2.0
    assert load_model(texts / "model-01.pkl")[0].lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
def test_an_interrupted_run_leaves_a_usable_model(texts, start_script, number, status):
    run = start_script("training.py", *TINY, "-max_iters", 10**6, "-eval_interval", 10**6, cwd=texts)
    shown = ""
    while "loss" not in shown:  # the progress bar, once it has drawn a few steps
        shown += run.stderr.read(1) or pytest.fail(shown)
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == status
    assert "interrupted; the model is in model-01.pkl" in errors and "Traceback" not in errors
    model, vocabulary = load_model(texts / "model-01.pkl")
    assert len(vocabulary) == model.config["vocab_size"] == 11


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["-batch_size", "0"], 2, "argument -batch_size"),
        (["-max_iters", "many"], 2, "argument -max_iters"),
        (["-dropout", "1"], 2, "argument -dropout"),
        (["-learning_rate", "nan"], 2, "argument -learning_rate"),
        (["-n_embd", "10", "-n_head", "3"], 2, "not a multiple of -n_head 3"),
        (["-device", "nonsense"], 2, "argument -device"),
        (["-dtype", "float8"], 2, "argument -dtype"),
        (["-unknown"], 2, "unrecognized"),
        (["-data_dir", "nowhere"], 1, "vocab.txt"),
        (["-block_size", "5000"], 1, "output_train.txt: holds 4600 characters"),
        (["-model", "nowhere/model.pkl"], 1, "nowhere/model.pkl: -model must name a file in a folder that exists"),
        (["-model", "."], 1, ".: -model must name a file"),
        (["-seed", "9" * 30], 2, "argument -seed"),
        (["-n_embd", "2000000000", "-n_head", "1"], 1, "not enough memory"),
    ],
)
def test_bad_input_is_one_line(texts, monkeypatch, capsys, flags, status, message):
    monkeypatch.chdir(texts)
    monkeypatch.setattr(sys, "argv", ["training.py", *TINY, *flags])
    try:
        assert training.main() == status
    except SystemExit as end:
        assert end.code == status
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and "Traceback" not in errors
    assert not list(texts.glob("*.pkl*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"", "vocab.txt: holds no characters"),
        ("vocab.txt", b"\xff\n", "vocab.txt: not UTF-8"),
        ("output_val.txt", None, "output_val.txt: No such file or directory; run data_extract.py first"),
        ("output_train.txt", b"", "output_train.txt: holds 0 characters"),
    ],
)
def test_files_that_do_not_belong_together_are_one_line(texts, monkeypatch, capsys, name, content, message):
    if content is None:
        (texts / name).unlink()
    else:
        (texts / name).write_bytes(content)
    monkeypatch.chdir(texts)
    monkeypatch.setattr(sys, "argv", ["training.py", *TINY])
    assert training.main() == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_named_and_leaves_the_former_model(texts, run_script):
    run_in(texts, "-max_iters", 2)
    before = (texts / "model-01.pkl").read_bytes()

    def small_disk():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    run = run_script("training.py", *TINY, "-max_iters", 2, cwd=texts, preexec_fn=small_disk)
    assert run.returncode == 1 and "model-01" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
    assert (texts / "model-01.pkl").read_bytes() == before and not list(texts.glob("*.tmp"))


def test_the_three_commands_in_sequence(tmp_path, run_script):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.txt").write_text(SCRIPTS * 40, encoding="utf-8")
    extraction = run_script("data_extract.py", "-data_dir", "mine", cwd=tmp_path)
    assert extraction.returncode == 0, extraction.stderr
    run = run_script(
        "training.py", *TINY, "-max_iters", 6, "-eval_interval", 3, "--learning_rate", "0.01", cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert [step for step, _, _ in evaluations(run.stdout)] == [3, 6]
    assert "tok/s" in run.stderr  # the progress bar
    chat = run_script("chatbot.py", "-max_new_tokens", 12, "-device", "cpu", cwd=tmp_path, stdin="Plain\nПривет\n")
    assert chat.returncode == 0, chat.stderr
    completions = chat.stdout.split("Completion:\n")[1:]
    assert len(completions) == 2 and completions[0].startswith("Plain") and completions[1].startswith("Привет")
    assert len(completions[0].partition("\nPrompt")[0]) == len("Plain") + 12


def test_help_explains_every_flag(run_script):
    for script in ("data_extract.py", "training.py", "chatbot.py"):
        shown = run_script(script, "-h")
        assert shown.returncode == 0
        for flag in re.findall(r'flag\("(\w+)"', (Path(training.__file__).parent / script).read_text()):
            assert re.search(rf"-{flag}, --{flag}|-{flag} \S+, --{flag} ", shown.stdout), flag
