"""What every script of the hybrid study opens alike."""

from collections.abc import Callable

import torch
from torch import nn

from src.models.families import memory_estimate


def print_plan(
    model: nn.Module, tokens: int, passes: int, tokens_per_second: float, batch_tokens: int, kept_gb: float = 0.0
) -> None:
    """What a run will take, before it starts. kept_gb: memory that is held besides the model's and a batch's."""
    kept = f", kept logits up to {kept_gb:.1f} GB" if kept_gb else ""
    print(
        f"time estimate: {passes} passes over {tokens:,} tokens at about {tokens_per_second:,.0f} tokens/s: "
        f"{tokens * passes / tokens_per_second / 60:.1f} min\n{memory_estimate(model, batch_tokens)}{kept}",
        flush=True,
    )


def retry_shorter(run: Callable[[int], None], max_seq_len: int, fallback: int) -> None:
    """run(max_seq_len); after running out of GPU memory once more with `fallback`, where that is shorter."""
    try:
        run(max_seq_len)
    except torch.OutOfMemoryError:
        if fallback >= max_seq_len:
            raise
        print(f"out of GPU memory at {max_seq_len} tokens per window; trying again with {fallback}", flush=True)
        torch.cuda.empty_cache()
        run(fallback)
