"""Read model files as the scripts do, in a process of its own, since a bad file may hang or crash.

`python fuzz.py FOLDER [FIRST COUNT]` prints a line of JSON for each file in the folder: its name,
what came of it, and the seconds it took. With FIRST and COUNT, that many mutated files take the
places of these; `mutate` makes one for each number. A file that takes too long ends the process.
"""

import faulthandler
import io
import json
import os
import random
import sys
import time
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from steps import Steps, new_run, settle

import training
from model import ModelFileError, Vocabulary, explain, load_model

SECONDS, GIGABYTES = 60, 1  # that a file may take


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Change a few bits or bytes in one to three places."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        start = chance.randrange(len(data) + 1)
        length = chance.choice((1, 2, 4, 8, 64, 1000))
        kind = chance.choice(("cut", "flip", "flip", "flip", "overwrite", "insert", "remove"))
        if kind == "flip" and start < len(data):
            data[start] ^= 1 << chance.randrange(8)
        noise = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
        if kind == "overwrite":
            data[start : start + length] = noise
        elif kind == "insert":
            data[start:start] = noise
        elif kind == "remove":
            del data[start : start + length]
        elif kind == "cut":
            del data[start:]
    return bytes(data)


def mutate(data: bytes, number: int) -> bytes:
    """Return the mutation of this number; mostly inside an archive, with the right check sums."""
    chance = random.Random(number)
    if not data.startswith(b"PK") or chance.random() < 0.2:
        return mutate_bytes(data, chance)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    name = pickled if chance.random() < 0.8 else chance.choice(sorted(members))
    members[name] = mutate_bytes(members[name], chance)
    mutated = io.BytesIO()
    with zipfile.ZipFile(mutated, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return mutated.getvalue()


def load(path: Path) -> None:
    """Load and use a model as chatbot.py does."""
    given = path.with_name("vocab.txt")
    given = Vocabulary.from_file(given) if given.exists() else None
    model, vocabulary = load_model(path, vocabulary=given)
    text = model.generate(torch.zeros(1, 1, dtype=torch.long), 3, temperature=1.0)
    assert len(vocabulary.decode(text[0].tolist())) == 4


def resume(path: Path) -> None:
    """Go on with a run for one step, as training.py does."""
    model = path.with_name(path.name.removesuffix(".state.pkl") + ".pkl")
    settings, start = settle(["-resume", f"-model={model}", f"-data_dir={path.parent}"])
    # However large a run the file asks for.
    vars(settings).update(batch_size=4, eval_iters=1, max_iters=10**9, eval_interval=10**9)
    run = new_run(settings, start)
    training.restore(run, start[-1])
    training.train(run, Steps(1))


def outcome(path: Path) -> str:
    use = resume if path.name.endswith(".state.pkl") else load
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            use(path)
        return "works"
    except (ModelFileError, OSError, training.TrainingError) as error:
        return f"refused: {error}"
    except SystemExit:
        return f"refused: {errors.getvalue().strip()}"
    except Exception as error:
        message = explain(error)  # of too little memory
        return f"refused: {path}: {message}" if message else f"{type(error).__name__}: {error}"


def report(path: Path, name: str) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    started = time.perf_counter()
    result = outcome(path)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps([name, result, round(time.perf_counter() - started, 3)]), flush=True)


def limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30,) * 2)


def main(folder: Path, first: int = 0, count: int = 0) -> None:
    sources = sorted(folder.glob("*.pkl"))
    contents = [path.read_bytes() for path in sources]
    limit_memory()
    for path in sources:
        report(path, path.name)
    for number in range(first, first + count):
        path = sources[number % len(sources)]  # its own name, as a state belongs to a model's name
        path.write_bytes(mutate(contents[number % len(sources)], number))
        report(path, f"{number} {path.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
