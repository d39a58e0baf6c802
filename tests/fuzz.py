"""Read model files as the scripts do, in a process of its own, since a bad file may hang or crash.

`python fuzz.py FOLDER [FIRST COUNT]` prints a line of JSON for each model file in the folder: its
name and what came of it. With FIRST and COUNT, that many mutated files take the places of these;
`mutate` makes one for each number. A file that takes too long ends the process. The folder's
vocab.txt goes with the models that have none.
"""

import faulthandler
import io
import json
import os
import random
import sys
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from hostile import zipped
from steps import Steps, new_run, settle

import training
from model import Vocabulary, explain, load_model

SECONDS, GIGABYTES = 60, 1  # that a file may take


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Change a few bits or bytes in one to three places."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        start = chance.randrange(len(data) + 1)
        before, after = data[:start], data[start:]
        length = chance.choice((1, 2, 4, 8, 64, 1000))
        noise = chance.choice((bytes(length), b"\xff" * length, chance.randbytes(length)))
        flipped = bytes([byte ^ 1 << chance.randrange(8) for byte in after[:1]]) + after[1:]
        changed = (
            *(b"", flipped, flipped, flipped),  # cut, or flipped
            noise + after[length:],  # overwritten
            noise + after,  # inserted
            after[length:],  # removed
        )
        data = before + chance.choice(changed)
    return data


def mutate(data: bytes, number: int) -> bytes:
    """Return the mutation of this number; mostly inside an archive, with the right check sums."""
    chance = random.Random(number)
    if not data.startswith(b"PK") or chance.random() < 0.2:
        return mutate_bytes(data, chance)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    name = pickled if chance.random() < 0.8 else chance.choice(sorted(members))
    return zipped({**members, name: mutate_bytes(members[name], chance)})


def load(path: Path) -> None:
    """Load and use a model as chatbot.py does."""
    given = Vocabulary.from_file(path.with_name("vocab.txt"))
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
    except SystemExit:
        return f"refused: {errors.getvalue().strip()}"
    except Exception as error:  # as in main() of training.py
        message = str(error) if isinstance(error, training.TrainingError) else explain(error)
        return f"refused: {message}" if message else f"{type(error).__name__}: {error}"


def report(path: Path, name: str) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    print(json.dumps([name, outcome(path)]), flush=True)
    faulthandler.cancel_dump_traceback_later()


def limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30,) * 2)


def main(folder: Path, first: int = 0, count: int = 0) -> None:
    sources = [(path, path.read_bytes()) for path in sorted(folder.glob("*.pkl"))]
    limit_memory()
    for path, _ in sources:
        report(path, path.name)
    for number in range(first, first + count):
        path, content = sources[number % len(sources)]
        path.write_bytes(mutate(content, number))  # its own name: a state belongs to a model's name
        report(path, f"{number} {path.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
