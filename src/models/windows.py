"""The loop over the windows of documents, one per forward, that everything which looks inside a model shares."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from src.base.text_data import TokenDocument, Window, score_windows


@dataclass(frozen=True)
class Reading:
    """One window of a document as a model reads it, without padding."""

    document: TokenDocument
    window: Window  # one of `text_data.score_windows`
    input_ids: torch.Tensor  # [1, T], on the model's device
    new: int  # the first of the T positions that no earlier window of the document has read

    @property
    def start(self) -> int:
        """The document's position of the first token that is read."""
        return self.window.start

    def targets(self) -> torch.Tensor:
        """The tokens [T] that follow those that are read."""
        return torch.as_tensor(
            self.document.ids[self.window.start + 1 : self.window.stop], device=self.input_ids.device
        )

    def scored(self) -> torch.Tensor:
        """Which positions' next tokens count in this window, [1, T] bool: those that no earlier window scored."""
        keep = torch.zeros_like(self.input_ids, dtype=torch.bool)
        keep[:, self.new :] = True
        return keep


def read_windows(
    model: nn.Module,
    token_documents: Sequence[TokenDocument],
    max_seq_len: int,
    stride: int,
    progress: str | None = None,
) -> Iterator[Reading]:
    """Every window of every document, in order; `progress` labels a progress bar over documents.

    The caller runs the forwards, in evaluation mode (`evaluation_mode`). Raises ValueError for no documents, and for a
    document without a token behind its prefix.
    """
    if not token_documents:
        raise ValueError("there are no documents to read")
    device = model.get_input_embeddings().weight.device
    for document in tqdm(token_documents, desc=progress, disable=progress is None, leave=False):
        windows = score_windows(len(document.ids), max_seq_len, stride)
        if not windows:
            raise ValueError(f"document {document.id!r} has no token behind its prefix")
        for window in windows:
            input_ids = torch.as_tensor(document.ids[window.start : window.stop - 1], device=device)[None]
            yield Reading(document, window, input_ids, window.first_scored - 1 - window.start)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)
