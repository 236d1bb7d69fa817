"""What gates see of a running forward pass, and the record of what they did."""

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class ForwardState:
    """What the gates of one forward pass share.

    past: tokens in the cache before this pass. padding_mask [B, T] True for real tokens, or None (all real).
    document_keys [B], positions [B, T] int64: see `GateInputs`. documents: id per row, or None where not told;
    starts: first position of each row's window.
    sparsity: layer -> [B, T] of the routers (or dense feed-forward layers) that have run.
    """

    past: int
    shape: tuple[int, int]
    padding_mask: torch.Tensor | None
    document_keys: torch.Tensor
    positions: torch.Tensor
    documents: list[str] | None
    starts: list[int]
    sparsity: dict[int, torch.Tensor] = field(default_factory=dict)


class GateRecord:
    """What gates did while `record_gates` was open.

    shares: document id -> layer -> m per input position, float32 [N], NaN where the model was never fed. A position
        that several windows hold counts as in the earliest of them, the one that scores its successor. Rows whose
        document was not told only enter the sums behind `layer_shares`.
    scores: the same for the gates' scores (sparsity, or the learned gate's output), where they have one.
    """

    def __init__(self):
        self._shares: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self._scores: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self._anonymous: dict[int, list[float]] = {}

    @property
    def shares(self) -> dict[str, dict[int, np.ndarray]]:
        """See the class."""
        return _values_only(self._shares)

    @property
    def scores(self) -> dict[str, dict[int, np.ndarray]]:
        """See the class."""
        return _values_only(self._scores)

    def layer_shares(self) -> dict[int, float]:
        """Realised share per layer: the mean of m over all tokens. Raises ValueError when nothing was recorded."""
        sums = {layer: list(pair) for layer, pair in self._anonymous.items()}
        for layers in self.shares.values():
            for layer, values in layers.items():
                _add(sums, layer, values[~np.isnan(values)])
        if not sums:
            raise ValueError("no gate ran while it was recorded")
        return {layer: total / count for layer, (total, count) in sorted(sums.items())}

    def mean_share(self) -> float:
        """Mean of `layer_shares` over layers (every layer sees the same tokens)."""
        return float(np.mean(list(self.layer_shares().values())))

    def document_shares(self) -> dict[str, dict[int, float]]:
        """document id -> layer -> realised share."""
        return {
            document: {layer: float(np.nanmean(values, dtype=np.float64)) for layer, values in sorted(layers.items())}
            for document, layers in self.shares.items()
        }

    def add(self, layer: int, share: torch.Tensor | float, scores: torch.Tensor | None, state: ForwardState) -> None:
        """Take in one layer's m (and scores), [B, T] or a float, of one forward pass."""
        share = share if torch.is_tensor(share) else torch.full(state.shape, float(share))
        share = share.detach().float().cpu().numpy()
        real = np.ones(state.shape, bool) if state.padding_mask is None else state.padding_mask.cpu().numpy()
        if state.documents is None:
            _add(self._anonymous, layer, share[real])
            return
        positions = state.positions.cpu().numpy()
        scores = None if scores is None else scores.detach().float().cpu().numpy()
        for row, document in enumerate(state.documents):
            where, start = positions[row][real[row]], state.starts[row]
            for kept, values in ((self._shares, share), (self._scores, scores)):
                if values is not None:
                    layers = kept.setdefault(document, {})
                    layers[layer] = _keep_earliest(layers.get(layer), start, where, values[row][real[row]])


def _add(sums: dict[int, list[float]], layer: int, values: np.ndarray) -> None:
    """Add values to a layer's [sum, count]."""
    total, count = sums.get(layer, (0.0, 0))
    sums[layer] = [total + float(values.sum(dtype=np.float64)), count + len(values)]


def _values_only(kept: dict[str, dict[int, tuple]]) -> dict[str, dict[int, np.ndarray]]:
    return {document: {layer: pair[0] for layer, pair in sorted(layers.items())} for document, layers in kept.items()}


def _keep_earliest(
    kept: tuple[np.ndarray, np.ndarray] | None, start: int, positions: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(values, window starts) with `values` put at `positions` wherever no earlier window has written."""
    held, starts = kept or (np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64))
    missing = int(positions.max(initial=-1)) + 1 - len(held)
    if missing > 0:
        held = np.concatenate([held, np.full(missing, np.nan, dtype=np.float32)])
        starts = np.concatenate([starts, np.full(missing, np.iinfo(np.int64).max)])
    new = start < starts[positions]
    held[positions[new]], starts[positions[new]] = values[new], start
    return held, starts
