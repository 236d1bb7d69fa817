"""06: which layers' attention can a Mamba-2 sidecar stand in for, alone and together?

Every layer alone at alpha 1 with its stage A sidecar (one in memory at a time), ranked; then the k safest together.
Which layers are safest is decided on calibration text, what they cost is reported on evaluation text. Writes
layer_replacement_results.csv, layer_replacement_calibration.csv and the sums per document of both. What an earlier run
measured with the same model, text and sidecars is taken from it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

FLAGS = (*cli.SESSION_FLAGS, *cli.SCORING_FLAGS, "calibration_documents", "layers", "together", "sidecar_dir",
    "resamples", "confidence_level",
)  # fmt: skip


def parse(argv: list[str] | None = None):
    """The command line."""
    settings = {"documents": "LAYER_EVAL_SAMPLES", "layers": "STAGE_A_LAYERS"}
    return cli.parse(__doc__, config, FLAGS, argv, settings)


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

from src.base import results, stats
from src.gating import tables
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.checkpoints import available_layers
from src.hybrid.session import Session, open_session, print_plan, with_shorter_windows
from src.hybrid.sidecar_sets import SidecarSet, find_sidecars, sidecar_folder

COLUMNS = ("perplexity", "delta", "pct_change", "delta_nll", "ci_low", "ci_high")
FILES = {"calibration": "layer_replacement_calibration", "evaluation": "layer_replacement_results"}


def layers_with_sidecars(session: Session) -> list[int]:
    """The layers asked for; of all layers those that have a stage A sidecar."""
    layers = session.layers()
    if session.arguments.layers != "all":
        return layers
    folder = sidecar_folder(session.arguments.sidecar_dir, session.folder, session.arguments.model)
    there = available_layers(folder, "a")
    if set(there) < set(layers):
        print(f"only layers {there} have a stage A sidecar in {folder}; the others are left out")
        return there
    return layers


def score_replaced(session: Session, sidecars: SidecarSet, layers: list[int], split: str):
    """Sums per document of a split with these layers on Mamba alone."""
    own = SidecarSet(sidecars.seed, sidecars.folder, "a", layers)
    attach_mamba_sidecar(session.model, layers, alpha=1.0, gate_mode="fixed", **own.source())
    try:
        return session.score(f"layers {layers} replaced, {split}", {"alpha": 1.0} | own.key(), split)
    finally:
        detach_mamba_sidecars(session.model)


def row_of(layer: str, table, baseline, bootstrap: stats.Bootstrap) -> dict:
    """One row of a result file."""
    values = tables.quality(table, baseline, bootstrap)
    return {"layer": layer} | {column: values[column] for column in COLUMNS}


def print_summary(singles: list[dict], combined: list[dict], ranking: list[int], members: list[list[int]]) -> None:
    """Both tables, and the answer in a sentence; `members` are the layers of each combination."""
    print("\nLayer replacement at alpha 1 (delta NLL in nats per token, intervals over documents)")
    print(f"{'layer':>28} {'perplexity':>11} {'change':>9} {'delta NLL':>10} {'interval':>20} {'chosen as':>10}")
    ranks = {str(layer): place + 1 for place, layer in enumerate(ranking)}
    for row in [*singles, *combined]:
        interval = f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        print(
            f"{row['layer']:>28} {row['perplexity']:>11.3f} {row['pct_change']:>+8.2f}% {row['delta_nll']:>+10.4f} "
            f"{interval:>20} {ranks.get(row['layer'], ''):>10}"
        )
    safest, dearest = singles[0], singles[-1]
    print(
        f"Answer: layer {safest['layer']} is the cheapest to replace ({safest['delta_nll']:+.4f} nats per token), "
        f"layer {dearest['layer']} the dearest ({dearest['delta_nll']:+.4f})."
    )
    alone = {row["layer"]: row["delta_nll"] for row in singles}
    for row, layers in zip(combined, members, strict=True):
        total = sum(alone[str(layer)] for layer in layers)
        print(f"  {row['layer']} together {row['delta_nll']:+.4f}; the sum of them alone {total:+.4f}.")


def run(arguments, window_tokens: int) -> None:
    """The replacement with windows of so many tokens."""
    counts = {"calibration": arguments.calibration_documents, "evaluation": arguments.documents}
    session = open_session(arguments, counts, window_tokens)
    layers = layers_with_sidecars(session)
    sidecars = find_sidecars(session.model, arguments, session.folder, layers, "a")
    together = [count for count in arguments.together if count <= len(layers)]
    print(f"model {arguments.model}, layers {layers}, stage A sidecars of {sidecars.folder}")
    print_plan(session, 1 + len(layers) + len(together), tuple(FILES))

    sums = {split: {"baseline": session.score(f"baseline, {split}", {}, split)} for split in FILES}
    bootstrap = stats.Bootstrap(arguments.resamples, arguments.seed, arguments.confidence_level)
    rows = {split: [] for split in FILES}
    for layer in layers:
        for split in FILES:
            table = sums[split][str(layer)] = score_replaced(session, sidecars, [layer], split)
            rows[split].append(row_of(str(layer), table, sums[split]["baseline"], bootstrap))
    for split in FILES:
        rows[split].sort(key=lambda row: (results.as_written([row["delta_nll"]])[0], int(row["layer"])))
    ranking = [int(row["layer"]) for row in rows["calibration"]]
    members = [sorted(ranking[:count]) for count in together]
    combined = []
    for chosen in members:
        name = f"combined_[{','.join(map(str, chosen))}]"
        table = sums["evaluation"][name] = score_replaced(session, sidecars, chosen, "evaluation")
        combined.append(row_of(name, table, sums["evaluation"]["baseline"], bootstrap))
    session.say_reused()

    print_summary(rows["evaluation"], combined, ranking, members)
    meta, written = session.meta(sidecars.identity(), layer_indices=layers), []
    for split, name in FILES.items():
        table = rows[split] + (combined if split == "evaluation" else [])
        written.append(results.write_csv(session.folder / f"{name}.csv", table, meta))
        documents = tables.stacked(sums[split], "layer")
        written.append(results.write_csv(session.folder / f"{name}_documents.csv", documents, meta))
    cli.say_written(written, "scripts/07_gated_hybrid.py")


def main(arguments) -> None:
    """Run the replacement; after running out of GPU memory once more with shorter windows."""
    with_shorter_windows(lambda tokens: run(arguments, tokens), arguments)


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))
