"""What the command lines of the journeys' scripts have in common. Nothing here imports NumPy or torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from src.base import cli

# The settings behind flags whose defaults are other ones for journeys than for the gate study.
SETTINGS = {"model": "JOURNEY_MODEL", "resamples": "JOURNEY_RESAMPLES"}
RECORD_FLAGS = ("limit", "strict", "num_experts")


def name_after_records(arguments: argparse.Namespace, source: Path) -> None:
    """Call the model after the records unless --model names it: they must not be filed under the default model.

    The name then counts as given, so that the `next:` line repeats it.
    """
    if "model" not in arguments.given:
        arguments.model = source.resolve().stem
        arguments.given.add("model")


def check_input(arguments: argparse.Namespace) -> None:
    """Refuse flags that only records have where --input names none; else call the model after them."""
    if arguments.input is None:
        cli.refuse(arguments, RECORD_FLAGS, "it is for records given with --input")
    else:
        name_after_records(arguments, arguments.input)


def passed_on(arguments: argparse.Namespace) -> Sequence[str]:
    """The words of a command line that make another script of the journeys read what this one wrote."""
    given = {name: getattr(arguments, name) for name in ("model", "seed", "quick", "output_dir")}
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in given.items() if name in arguments.given]  # fmt: skip
