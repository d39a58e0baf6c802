"""Set up a run of training.py and drive its loop for some steps, for the tests on a GPU and for the
benchmark.
"""

import copy
from argparse import Namespace

import training


def settings_with(flags: list[str], **changed) -> Namespace:
    """Return the settings that these flags come to. `changed` are what no flag can be."""
    settings, _ = training.parse_args([*flags])
    return Namespace(**{**vars(settings), **changed})


def new_run(settings: Namespace, start: tuple = (None, None, None)) -> training.Run:
    """Return a run at its beginning, on the texts in the folder of the settings."""
    model, vocabulary, state = start
    if state is None:
        model, vocabulary = training.new_model(settings, model, "")
    model.to(settings.device)
    texts = [
        training.Text(settings.data_dir / name, vocabulary, settings.block_size)
        for name in ("output_train.txt", "output_val.txt")
    ]
    optimizer = training.Optimizer(model, settings)
    record, files = training.Record(), training.Files(settings.model)
    return training.Run(
        settings, model, copy.deepcopy(model).eval(), vocabulary, *texts, optimizer, record, files
    )


class Steps:
    """Takes the place of Interruption, which the loop asks before each step, and ends the loop
    after some steps.
    """

    def __init__(self, count: int):
        self.left = count

    def received_by_any(self) -> bool:
        self.left -= 1
        return self.left < 0
