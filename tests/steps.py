"""Set up a run of training.py and drive its loop for some steps, for tests and the benchmark."""

import copy
from argparse import Namespace

import training


def settle(flags: list) -> tuple[Namespace, tuple]:
    """Return the settings that these flags come to, and what the run starts from."""
    return training.parse_args([*map(str, flags)])


def settings_with(flags: list) -> Namespace:
    return settle(flags)[0]


def new_run(settings: Namespace, start: tuple = (None, None, None)) -> training.Run:
    """Return a run at its beginning, on the texts in the folder of the settings."""
    model, vocabulary, state = start
    if state is None:
        known = vocabulary.characters if vocabulary else ""
        model, vocabulary = training.new_model(settings, model, known)
    model.to(settings.device)
    texts = [
        training.Text(settings.data_dir / name, vocabulary, settings.block_size)
        for name in ("output_train.txt", "output_val.txt")
    ]
    average, optimizer = copy.deepcopy(model).eval(), training.Optimizer(model, settings)
    record, files = training.Record(), training.Files(settings.model)
    return training.Run(settings, model, average, vocabulary, *texts, optimizer, record, files)


class Steps:
    """Takes the place of Interruption, which the loop asks before each step: ends it after some."""

    def __init__(self, count: int):
        self.left = count

    def received_by_any(self) -> bool:
        self.left -= 1
        return self.left < 0
