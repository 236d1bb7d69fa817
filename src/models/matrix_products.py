"""The matrix products of a model's forwards alone: what a machine allows at best."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from src.models import costs


class MatrixProducts:
    """The matrix products of a run, recorded once and replayed alone, on buffers that exist already.

    Linear layers are replayed with the model's own weights in their own order; attention as q k^T and p v over the full
    T x T square of every batch, each head for itself. Nothing elementwise runs, nothing is allocated or checked.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.linear: list[tuple[torch.Tensor, int]] = []
        self.batches: list[tuple[int, int]] = []  # rows, tokens of the longest
        self.positions = self.padding = 0
        self.buffers: dict[tuple, torch.Tensor] = {}
        self.shape = costs.model_shape(model.config)

    def note_batch(self, lengths: Sequence[int]) -> None:
        """A batch with rows of these lengths comes next."""
        self.batches.append((len(lengths), max(lengths)))
        self.positions += len(lengths) * max(lengths)
        self.padding += len(lengths) * max(lengths) - sum(lengths)

    def record(self, run: Callable[[], object]) -> object:
        """What `run()` returns; its linear layers are noted on the way."""

        def note(module, arguments):
            self.linear.append((self._weight(module), arguments[0].shape[:-1].numel()))

        linears = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        with ExitStack() as stack:
            for module in linears:
                stack.callback(module.register_forward_pre_hook(note).remove)
            return run()

    def _weight(self, module: nn.Linear) -> torch.Tensor:
        # 8-bit weights compute in the model's type
        return module.weight if module.weight.is_floating_point() else self._buffer("weight", *module.weight.shape)

    def _buffer(self, role: str, *shape: int) -> torch.Tensor:
        key = (role, *shape)
        if key not in self.buffers:
            self.buffers[key] = torch.randn(shape, device=self.device, dtype=self.model.dtype)
        return self.buffers[key]

    def replay_linear(self) -> None:
        """The products of all linear layers."""
        for weight, rows in self.linear:
            outputs, inputs = weight.shape
            torch.mm(self._buffer("in", rows, inputs), weight.t(), out=self._buffer("out", rows, outputs))

    def replay_attention(self) -> None:
        """The products of all attention layers."""
        attention = self.shape.attention
        for rows, tokens in self.batches:
            many = rows * attention.num_heads
            query, key = (self._buffer(role, many, tokens, attention.head_dim) for role in ("query", "key"))
            value, output = (self._buffer(role, many, tokens, attention.v_head_dim) for role in ("value", "mixed"))
            scores = self._buffer("scores", many, tokens, tokens)
            for _ in range(self.shape.num_layers):
                torch.bmm(query, key.transpose(1, 2), out=scores)
                torch.bmm(scores, value, out=output)
