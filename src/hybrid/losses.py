"""What the distillation of sidecars minimises: errors against the frozen model's attention, and against its output."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from src.hybrid.layer import bypass_sidecars
from src.models.families import decoder_layers

# Logits per piece of the KL: keeps the float32 copies of a large vocabulary small.
KL_PIECE = 1 << 26


def attention_pairs(model: nn.Module, layers: Sequence[int], ids: torch.Tensor, bf16: bool) -> dict:
    """layer -> (input, output), each [B, T, D] float32, of the teacher's attention; the forward ends at the last."""

    captured = {}

    class _Enough(Exception):
        """Ends the forward after the last layer that is asked for."""

    def capture(layer, _module, _args, kwargs, output):
        captured[layer] = (kwargs["hidden_states"].float(), output[0].float())
        if layer == max(layers):
            raise _Enough

    with ExitStack() as hooks, suppress(_Enough), torch.no_grad(), _autocast(ids.device, bf16):
        for layer in layers:
            attention = decoder_layers(model)[layer].self_attn
            hooks.enter_context(attention.register_forward_hook(partial(capture, layer), with_kwargs=True))
        model.model(input_ids=ids, use_cache=False)
    return captured


def relative_error(module: nn.Module, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the target's variance about its mean vector: 1 is as good as a constant."""
    error = (module(inputs) - target).square().mean()
    return error / (target - target.mean(dim=(0, 1))).square().mean()


def kl_from_teacher(model: nn.Module, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean over tokens of KL(base model || hybrid), nats; sidecars must be attached."""
    with _autocast(ids.device, bf16):
        with torch.no_grad(), bypass_sidecars(model):
            teacher = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        student = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    total = 0.0
    piece = max(KL_PIECE // teacher.shape[-1], 1)
    for pair in zip(teacher.split(piece), student.split(piece), strict=True):
        target, given = (F.log_softmax(logits.float(), dim=-1) for logits in pair)
        total = total + F.kl_div(given, target, reduction="sum", log_target=True)
    return total / len(teacher)


def _autocast(device: torch.device, bf16: bool):
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
