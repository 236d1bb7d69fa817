"""Seconds of things that are compared: measured in turns, so that a machine that slows down slows down all of them."""

import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
from tqdm import tqdm


def clock(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall seconds of `run()`, the work of a CUDA device included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: object) -> None:
    """Wait until a CUDA device has done what it was given; other devices have by then."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def in_turns(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each variant, a function that returns its seconds: A B C, C B A, ... after a run of each."""
    for run in variants.values():
        run()
    seconds = {name: np.empty(rounds) for name in variants}
    for index in tqdm(range(rounds), desc="rounds", file=sys.stderr):
        for name in list(variants)[:: -1 if index % 2 else 1]:
            seconds[name][index] = variants[name]()
    return seconds


def cost(plain: np.ndarray, other: np.ndarray) -> dict:
    """What `other` costs over `plain`, from seconds [rounds] of both: the median of their ratios, with quartiles."""
    low, median, high = np.quantile(other / plain, [0.25, 0.5, 0.75])
    return {
        "plain_seconds": np.median(plain),
        "capture_seconds": np.median(other),
        "ratio": median,
        "ratio_quartiles": [low, high],
        "cost_percent": 100 * (median - 1),
    }
