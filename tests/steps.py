"""Set up a run of training.py and drive its loop for some steps: for tests and the benchmark."""

from argparse import Namespace

import training


def settle(flags: list) -> tuple[Namespace, tuple]:
    """Return the settings that these flags come to, and what the run starts from."""
    parser = training.training_parser()
    return training.settle(parser, *parser.parse([*map(str, flags)]))


def settings_with(flags: list) -> Namespace:
    return settle(flags)[0]


def new_run(settings: Namespace, start: tuple = (None, None, None)) -> Namespace:
    return training.new_run(settings, start)


class Steps:
    """Takes the place of Interruption, which the loop asks before each step: ends it after some."""

    def __init__(self, count: int):
        self.left = count

    def received_by_any(self) -> bool:
        self.left -= 1
        return self.left < 0
