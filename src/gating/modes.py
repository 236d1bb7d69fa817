"""What is compared: gates, and the controls matched to them. A mode is a row of columns; its name is made of them.

The columns, which stand in every table of gates beside the name, are: kind, gate, hard, signal, temperature, threshold,
recipe, matched_to, cheap_path, uses_document and share_target (docs/columns.md says what they mean). Names are for
people and for joining tables; nothing takes them apart.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from src.base.errors import UserError
from src.gating import controls
from src.hybrid.gates import ActivationGate, FixedGate, LearnedGate, RoutingGate
from src.models.families import decoder_layers, has_gated_mlp, has_router, resolve_layers

# What the gate that leads a share goes by: BlockFFN's router, or the activations of a dense model's FFN.
LEADERS = ("routing", "ffn_sparsity")
# Recipes of controls that are drawn at random: one run for each mask seed. The others have one run.
DRAWN = ("random", *controls.SHUFFLED_BLOCKS)
# The columns that say what a mode is.
MODE_COLUMNS = (
    "kind", "gate", "hard", "signal", "temperature", "threshold", "recipe", "matched_to", "cheap_path",
    "uses_document", "share_target",
)  # fmt: skip
BASELINE = dict(zip(MODE_COLUMNS, ("none", "none", False, "none", None, "", "", "", "", False, 0.0), strict=True))


@dataclass(frozen=True)
class Mode:
    """A deployable gate to measure, and what it is compared with.

    name: in tables. gate: not calibrated. share: the mean Mamba share asked for; None for an uncalibrated threshold.
    threshold: `own` (each layer has one, calibrated), `shared` (one for all layers), or `fixed` (not calibrated).
    variant: what tells it from the gate of its kind that leads the share; "" for that gate itself.
    against: the name of the random control that its `vs_random` compares it with.
    recipes: controls to match to it, of `controls.CONTROLS` or a name that the caller's scores know.
    all_draws: whether controls that are drawn at random have a run for each mask seed, or one.
    """

    name: str
    gate: FixedGate | RoutingGate | ActivationGate | LearnedGate
    share: float | None
    threshold: str = "own"
    variant: str = ""
    against: str = ""
    recipes: tuple[str, ...] = ()
    all_draws: bool = False

    @property
    def is_calibrated(self) -> bool:
        """Whether its share is set on calibration text."""
        return self.threshold in ("own", "shared")

    def columns(self) -> dict:
        """The columns MODE_COLUMNS of its row."""
        return BASELINE | {
            "kind": self.gate.mode,
            "gate": self.gate.mode,
            "hard": bool(getattr(self.gate, "hard", False)),
            "signal": getattr(self.gate, "signal", "none"),
            "temperature": None if getattr(self.gate, "hard", True) else self.gate.temperature,
            "threshold": "" if self.gate.mode == "fixed" else self.threshold,
            "cheap_path": "mamba",
            "share_target": self.share,
        }

    def control_columns(self, recipe: str, share: float) -> dict:
        """The columns of a control matched to it; `share` is the one that it has."""
        columns = {"kind": "control", "gate": recipe, "hard": True, "recipe": recipe, "matched_to": self.name}
        return BASELINE | columns | {"cheap_path": "mamba", "uses_document": True, "share_target": share}

    def control_name(self, recipe: str) -> str:
        """The name of a control matched to it: `control_random_0.5`, `control_random_lookahead_0.5`."""
        share = "" if self.share is None else f"{self.share:g}"
        return "_".join(part for part in ("control", recipe, self.variant, share) if part)

    def depends(self) -> dict:
        """What a run of it depends on, the text and the sidecars aside."""
        settings = {key: value for key, value in asdict(self.gate).items() if key not in ("distributions", "cutoffs")}
        return {"gate": self.gate.mode, "gate_settings": settings, "threshold": self.threshold}


def leader_of(model: nn.Module) -> str | None:
    """What a model's leading gate goes by, of LEADERS; None for a model with neither router nor gated FFN."""
    if has_router(model):
        return "routing"
    return "ffn_sparsity" if has_gated_mlp(model) else None


def hybrid_layers(model: nn.Module, spec: str, signal: str) -> list[int]:
    """The layers that a spec names, for gates that read `signal`.

    A named set starts at layer 1 where the gate reads the layer before; raises UserError where layer 0 is asked for by
    its index.
    """
    layers, leader = resolve_layers(spec, len(decoder_layers(model))), leader_of(model)
    if 0 in layers and (leader == "ffn_sparsity" or (leader == "routing" and signal == "previous")):
        if spec[0].isdigit():
            raise UserError("layer 0 has no layer before it: leave it out of --layers, or take --signal lookahead")
        return layers[1:]
    return layers


def gate_modes(
    arguments,
    leader: str | None,
    learned: bool,
    main_share: float,
    main_recipes: Sequence[str] = ("random",),
    other_recipes: Sequence[str] = ("random",),
    shared_threshold: bool = False,
) -> list[Mode]:
    """All modes of the main set of sidecars, per share the leading gate first.

    arguments: shares, signal, threshold, temperature, temperatures and seed, as flags have them. leader: what the
    leading, hard gate goes by (of LEADERS). For None fixed alpha leads, whose random control has as many tokens as its
    shares sum to. learned: whether there is a learned gate. main_recipes: controls matched to the leading gate at
    main_share, the verdict's, at which the variants stand too; other_recipes: those at the other shares.
    shared_threshold: also the routing gate with one threshold for all layers.
    """
    modes = []
    for share in arguments.shares:
        recipes = tuple(main_recipes if share == main_share else other_recipes)
        random = f"control_random_{share:g}"
        fixed = Mode(f"fixed_{share:g}", FixedGate(share), share, "fixed", against=random)
        if leader:
            hard, soft = (_scored(arguments, leader, share, hard) for hard in (True, False))
            is_main = share == main_share
            modes.append(Mode(f"{leader}_hard_{share:g}", hard, share, "own", "", random, recipes, is_main))
            modes.append(fixed)
            modes.append(Mode(f"{leader}_soft_{share:g}", soft, share, against=random))
        else:
            modes.append(replace(fixed, recipes=tuple(recipe for recipe in recipes if recipe == "random")))
        if learned:
            gate = LearnedGate(share, hard=True, seed=arguments.seed)
            modes.append(_with_own_random(Mode(f"learned_{share:g}", gate, share, variant="learned")))
    if leader == "routing":
        share = main_share if main_share in arguments.shares else arguments.shares[0]
        modes += _routing_variants(arguments, share, shared_threshold)
    return modes


def _scored(arguments, leader: str, share: float, hard: bool) -> RoutingGate | ActivationGate:
    if leader == "routing":
        return RoutingGate(
            share, signal=arguments.signal, threshold=arguments.threshold, hard=hard,
            temperature=arguments.temperature, seed=arguments.seed,
        )  # fmt: skip
    return ActivationGate(share, hard=hard, temperature=arguments.temperature, seed=arguments.seed)


def _routing_variants(arguments, share: float, shared_threshold: bool) -> list[Mode]:
    """Other temperatures, the other signal, one threshold for all layers, and a threshold that is not calibrated."""
    common = {"threshold": arguments.threshold, "seed": arguments.seed}
    hard, own = f"routing_hard_{share:g}", {"signal": arguments.signal, **common}
    modes = []
    for other in arguments.temperatures:
        if other != arguments.temperature:
            gate, name = RoutingGate(share, temperature=other, **own), f"routing_soft_{share:g}_t{other:g}"
            modes.append(Mode(name, gate, share, variant=f"t{other:g}", against=f"control_random_{share:g}"))
    if arguments.signal == "previous":  # the other way round, layer 0 may be among the layers
        gate = RoutingGate(share, signal="lookahead", hard=True, **common)
        modes.append(_with_own_random(Mode(f"{hard}_lookahead", gate, share, variant="lookahead")))
    if shared_threshold:
        gate = RoutingGate(share, hard=True, **own)
        modes.append(_with_own_random(Mode(f"{hard}_shared", gate, share, "shared", "shared")))
    gate = RoutingGate(hard=True, **own)
    return [*modes, _with_own_random(Mode("routing_threshold", gate, None, "fixed", "threshold"))]


def _with_own_random(mode: Mode) -> Mode:
    """A hard gate that leads no share, with a random control of its own counts."""
    return replace(mode, against=mode.control_name("random"), recipes=("random",))


def further_modes(modes: Sequence[Mode], share: float, explained: bool) -> list[Mode]:
    """What the further sets of sidecars measure: hard routing against random and its own shuffled decisions, and fixed
    alpha, at `share`; where the answer is explained at every share, with the oracle, and the learned gate too."""
    leading, plain = [], []
    for mode in modes:
        kind, wanted = mode.gate.mode, explained or mode.share == share
        if kind == "routing" and mode.gate.hard and mode.variant == "" and wanted:
            kept = [recipe for recipe in mode.recipes if recipe in DRAWN or (explained and recipe == "oracle")]
            leading.append(replace(mode, recipes=tuple(kept)))
        elif (kind == "fixed" and wanted) or (kind == "learned" and explained and mode.share == share):
            plain.append(mode)
    return leading + plain
