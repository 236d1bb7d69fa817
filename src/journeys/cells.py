"""What predictors of a token's next experts see: journeys cut into cells, and the splits into training and test.

A cell is one (journey n, layer l): known are the experts and gate probabilities of layers 0 .. l, the token's position
and the whole journey of the token before, which is complete by then; the target is layer l + h, for a hop h.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from src.journeys.measures import consecutive_pairs, problem_folds

PARTS = ("train", "validation", "test")
# With fewer problems a split by problem leaves parts empty; then each problem's tokens are cut into BLOCKS runs.
MIN_PROBLEMS = 5
BLOCKS = 25


# -- data
@dataclass(frozen=True, eq=False)
class Data:
    """What predictors see of N journeys over L layers, K slots, E experts, P problems.

    experts [N, L, K] int16: strongest first, -1 is none. gates [N, L, K] float32: 0 where unknown. position [N]: of the
    token in its problem. problem [N]: 0 .. P-1. previous [N]: row of the problem's token before, or -1.
    problem_names, domain_of_problem [P]; domain_names; layers: the L layers' numbers in the model.
    hidden: `store.Hidden` or None; hidden_row [N]: a journey's row in it, or -1.
    in_blocks: runs of tokens stand in for problems, because there are fewer than MIN_PROBLEMS.
    """

    experts: np.ndarray
    gates: np.ndarray
    position: np.ndarray
    problem: np.ndarray
    previous: np.ndarray
    problem_names: tuple[str, ...]
    domain_of_problem: np.ndarray
    domain_names: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: int
    hidden: object | None
    hidden_row: np.ndarray
    in_blocks: bool

    @property
    def scored(self) -> np.ndarray:
        """Journeys that every predictor can be scored on, bool [N]: those with router inputs where there are any."""
        return self.hidden_row >= 0 if self.hidden is not None else np.ones(len(self.problem), dtype=bool)


def prepare(sample, hidden=None) -> Data:
    """The arrays of a `Sample`, and the router inputs from `store.read_hidden`, as predictors need them.

    Router inputs are left out where fewer than MIN_PROBLEMS problems have them: no split would have some in each part.
    """
    num_rows, problem = len(sample.clusters), sample.clusters
    previous = np.full(num_rows, -1)
    first, second = consecutive_pairs(sample.clusters, sample.token_idx)
    previous[second] = first
    in_blocks = int(problem.max()) + 1 < MIN_PROBLEMS
    block = np.zeros(num_rows, dtype=np.int64)
    if in_blocks:
        tokens = pd.Series(sample.token_idx).groupby(problem)
        block = ((tokens.rank(method="first") - 1) * BLOCKS // tokens.transform("size")).to_numpy(np.int64)
    _, first, problem = np.unique(problem * BLOCKS + block, return_index=True, return_inverse=True)
    names = [f"{sample.domain_names[sample.domains[row]]}/{sample.problem_ids[row]}" for row in first]
    if in_blocks:
        names = [f"{name}, part {block[row] + 1} of {BLOCKS}" for name, row in zip(names, first, strict=True)]
    hidden_row = np.full(num_rows, -1)
    if hidden is not None:
        hidden_row[hidden.rows] = np.arange(len(hidden.rows))
        if len(np.unique(problem[hidden.rows])) < MIN_PROBLEMS:
            hidden, hidden_row = None, np.full(num_rows, -1)
    return Data(
        experts=sample.experts.astype(np.int16),
        gates=np.nan_to_num(sample.gating_probs.astype(np.float32), nan=0.0),
        position=sample.token_idx,
        problem=problem,
        previous=previous,
        problem_names=tuple(names),
        domain_of_problem=sample.domains[first],
        domain_names=sample.domain_names,
        layers=sample.layers,
        num_experts=sample.num_experts,
        hidden=hidden,
        hidden_row=hidden_row,
        in_blocks=in_blocks,
    )


@dataclass(frozen=True, eq=False)
class Cells:
    """M cells: journey [M] and layer [M] (place among the L layers) from which layer + hop is predicted."""

    journey: np.ndarray
    layer: np.ndarray
    hop: int

    def __len__(self) -> int:
        return len(self.journey)

    def select(self, rows: np.ndarray) -> "Cells":
        """The cells at `rows` (indices or mask), in that order."""
        return Cells(self.journey[rows], self.layer[rows], self.hop)


def cells_of(data: Data, hop: int, journeys: np.ndarray | None = None) -> Cells:
    """All cells of `journeys` (mask [N]; all) whose target layer has an expert, layer by layer."""
    present = data.experts[:, hop:, 0] >= 0
    if journeys is not None:
        present &= journeys[:, None]
    layer, journey = np.nonzero(present.T)
    return Cells(journey, layer, hop)


def targets_of(data: Data, cells: Cells) -> np.ndarray:
    """The experts of the target layers, int64 [M, K], strongest first."""
    return data.experts[cells.journey, cells.layer + cells.hop].astype(np.int64)


# -- splits
@dataclass(frozen=True, eq=False)
class Split:
    """Cells to train on, to choose on, and to score (those whose journey is in `Data.scored`)."""

    train: Cells
    validation: Cells
    test: Cells


def problem_parts(data: Data, seed: int) -> np.ndarray:
    """Part of each problem [P] (an index into PARTS): 60/20/20, even over domains and problems with router inputs.

    Raises ValueError for fewer than MIN_PROBLEMS problems.
    """
    num_problems = len(data.problem_names)
    if num_problems < MIN_PROBLEMS:
        raise ValueError(f"{num_problems} problems cannot be split 60/20/20; {MIN_PROBLEMS} are needed")
    with_hidden = np.bincount(data.problem[data.hidden_row >= 0], minlength=num_problems) > 0
    folds = problem_folds(data.domain_of_problem + len(data.domain_names) * with_hidden, 5, seed)
    return np.array([0, 0, 0, 1, 2])[folds]


def split_by_problem(data: Data, parts: np.ndarray, hop: int) -> Split:
    """The honest split: all cells of a problem lie in its part [P]."""
    part = parts[data.problem]
    return Split(cells_of(data, hop, part == 0), cells_of(data, hop, part == 1),
                 cells_of(data, hop, (part == 2) & data.scored))  # fmt: skip


def split_by_row(data: Data, hop: int, seed: int) -> Split:
    """The leaky split: the same cells, scattered at random 60/20/20, whichever journey they belong to."""
    cells = cells_of(data, hop)
    order = np.random.default_rng([seed, hop]).permutation(len(cells))
    first, second = round(0.6 * len(cells)), round(0.8 * len(cells))
    train, validation, test = (np.sort(rows) for rows in np.split(order, [first, second]))
    test = cells.select(test)
    return Split(cells.select(train), cells.select(validation), test.select(data.scored[test.journey]))


@dataclass(frozen=True, eq=False)
class Predictor:
    """A predictor that has been fitted: predict(cells) -> probabilities [M, E]; parameters: numbers that it stores."""

    name: str
    predict: Callable[[Cells], np.ndarray]
    parameters: int


def drawn(cells: Cells, most: int, rng: np.random.Generator) -> Cells:
    """At most `most` of the cells, at random, in their order."""
    return cells if len(cells) <= most else cells.select(np.sort(rng.permutation(len(cells))[:most]))


def history(data: Data, cells: Cells, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(experts [M, length, K] int64, E where there is none; gates likewise; layers [M, length]), the newest last.

    Nothing after layer l is read.
    """
    layers = cells.layer[:, None] - np.arange(length - 1, -1, -1)
    before = (layers < 0)[:, :, None]
    layers = np.maximum(layers, 0)
    experts = data.experts[cells.journey[:, None], layers].astype(np.int64)
    gates = np.where(before, 0.0, data.gates[cells.journey[:, None], layers]).astype(np.float32)
    return np.where(before | (experts < 0), data.num_experts, experts), gates, layers
