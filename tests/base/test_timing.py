"""Turns, and what is made of their seconds."""

import numpy as np

from src.base.timing import clock, cost, in_turns


def test_variants_run_in_turns_after_a_warm_up():
    order = []

    def variant(name, seconds):
        return lambda: order.append(name) or seconds

    seconds = in_turns({"a": variant("a", 1.0), "b": variant("b", 3.0)}, 3)
    assert "".join(order) == "ab" + "abbaab"
    assert seconds["a"].tolist() == [1.0] * 3 and seconds["b"].tolist() == [3.0] * 3


def test_cost_is_the_median_of_the_ratios():
    figures = cost(np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.2, 8.0]))
    assert (figures["ratio"], figures["plain_seconds"], figures["capture_seconds"]) == (1.5, 2.0, 2.2)
    np.testing.assert_allclose([figures["cost_percent"], *figures["ratio_quartiles"]], [50.0, 1.3, 1.75])


def test_clock_waits_for_what_it_runs():
    done = []
    assert clock(lambda: done.append(1)) >= 0.0 and done == [1]
