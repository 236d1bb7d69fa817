"""Mamba-2 sidecars beside a decoder's attention, mixed token by token by a gate: the public names of `src.hybrid`.

    model = attach_mamba_sidecar(model, layer_indices=[4, 5, 6, 7], alpha=0.5, gate_mode="routing")
    set_all_alphas(model, alpha=0.3)
    set_gate(model, calibrate_gates(model, RoutingGate(alpha=0.5, hard=True), documents, max_seq_len=1024))
    with record_gates(model) as record:
        score_documents(model, documents, ..., on_batch=attachment_of(model).on_batch)
    set_gate(model, MaskGate(matched_random_masks(record.shares, seed=0)))
    detach_mamba_sidecars(model)

`GatedHybridLayer` takes the place of a decoder layer's `self_attn`, on every causal language model with
`model.model.layers[i].self_attn`. Nothing but those attributes and a few hooks changes on the model, and
`detach_mamba_sidecars` puts both back.
"""

from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.calibration import calibrate_gates
from src.hybrid.checkpoints import (
    available_layers,
    base_fingerprint,
    check_base,
    load_learned_gates,
    load_sidecars,
    read_index,
    save_learned_gates,
    save_sidecar,
    save_sidecars,
    update_index,
)
from src.hybrid.gates import (
    ActivationGate,
    FixedGate,
    LearnedGate,
    MaskGate,
    RandomGate,
    RoutingGate,
    matched_random_masks,
)
from src.hybrid.layer import (
    GatedHybridLayer,
    SidecarAttachment,
    attachment_of,
    base_logits,
    bypass_sidecars,
    is_attached,
    record_gates,
    set_all_alphas,
    set_gate,
)
from src.hybrid.record import GateRecord
from src.hybrid.sidecar import MambaSidecar, SidecarSettings, mamba_kernels

__all__ = [
    "ActivationGate", "FixedGate", "GateRecord", "GatedHybridLayer", "LearnedGate", "MambaSidecar", "MaskGate",
    "RandomGate", "RoutingGate", "SidecarAttachment", "SidecarSettings", "attach_mamba_sidecar",
    "attachment_of", "available_layers", "base_fingerprint", "base_logits", "bypass_sidecars", "calibrate_gates",
    "check_base", "detach_mamba_sidecars", "is_attached", "load_learned_gates", "load_sidecars", "mamba_kernels",
    "matched_random_masks", "read_index", "record_gates", "save_learned_gates", "save_sidecar", "save_sidecars",
    "set_all_alphas", "set_gate", "update_index",
]  # fmt: skip
