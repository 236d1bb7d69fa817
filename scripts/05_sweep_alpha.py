"""05: the same mamba share for every token of the target layers, from attention only (0) to Mamba only (1).

Writes alpha_sweep_results.csv (a baseline row, then one row per alpha), alpha_sweep_untrained.csv (the same with
sidecars that were never distilled: the control), alpha_sweep_domains.csv, the sums per document of both, and
alpha_sweep_generations.json. What an earlier run measured with the same model, text and sidecars is taken from it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config
from src.base import cli

FLAGS = (*cli.SESSION_FLAGS, *cli.SCORING_FLAGS, "alphas", "layers", "sidecar_dir", "stage", "new_tokens", "resamples",
    "confidence_level",
)  # fmt: skip


def parse(argv: list[str] | None = None):
    """The command line."""
    return cli.parse(__doc__, config, FLAGS, argv)


if __name__ == "__main__":
    ARGUMENTS = cli.run_main(parse)  # before torch is loaded, so that wrong values are answered at once

from src.base import results, stats, text_data
from src.gating import tables
from src.hybrid import ledger
from src.hybrid.attach import attach_mamba_sidecar, detach_mamba_sidecars
from src.hybrid.layer import set_all_alphas
from src.hybrid.session import Session, cached_reference, open_session, print_plan, with_shorter_windows
from src.hybrid.sidecar_sets import SidecarSet, find_sidecars

# Host memory in GB for the baseline's logits, so that the KL of every row need not compute them again.
REFERENCE_CACHE_GB = 1.0
COLUMNS = (
    "perplexity", "delta_nll", "ci_low", "ci_high", "bits_per_byte", "kl", "top1_agreement", "tokens_per_second",
    "decode_tokens_per_second", "memory_gb", "flops_ideal", "flops_executed",
)  # fmt: skip
DOMAIN_COLUMNS = ("perplexity", "delta_nll", "ci_low", "ci_high", "bits_per_byte")


def alpha_name(alpha: float) -> str:
    """0.3 -> "0.3", 1.0 -> "1", 0.00001 -> "0.00001": a plain decimal, never an exponent."""
    return f"{alpha:.10f}".rstrip("0").rstrip(".")


def measure_distilled(session: Session, sidecars: SidecarSet, prompts: list[str]) -> tuple[dict, dict, dict]:
    """Sums per document, speeds and generations of the baseline and of every alpha, by name."""
    alphas = {alpha_name(alpha): alpha for alpha in session.arguments.alphas}
    # At alpha 0 no sidecar runs: nothing there depends on which they are.
    depends = {name: {"alpha": alpha} | (sidecars.key() if alpha else {}) for name, alpha in alphas.items()}
    sums = {"baseline": session.score("baseline", {})}
    speeds = {"baseline": session.speed("speed of the baseline", {})}
    texts = {"baseline": session.generate("texts of the baseline", {}, prompts)}
    attach_mamba_sidecar(session.model, sidecars.layers, gate_mode="fixed", **sidecars.source())
    # Speed and memory of all rows first: the reference's logits, kept below, would count as memory of a row.
    for name, alpha in alphas.items():
        set_all_alphas(session.model, alpha)
        speeds[name] = session.speed(f"speed at alpha {name}", depends[name])
        texts[name] = session.generate(f"texts at alpha {name}", depends[name], prompts)
    reference = cached_reference(session.model, REFERENCE_CACHE_GB)
    for name, alpha in alphas.items():
        set_all_alphas(session.model, alpha)
        sums[name] = session.score(f"alpha {name}", depends[name], reference=reference)
    detach_mamba_sidecars(session.model)
    return sums, speeds, texts


def measure_untrained(session: Session, sidecars: SidecarSet, distilled: dict) -> dict:
    """Sums per document with sidecars of the same geometry that were never distilled; alpha 0 is the distilled one."""
    seed, sums = session.arguments.seed, {"baseline": distilled["baseline"]}
    attach_mamba_sidecar(session.model, sidecars.layers, gate_mode="fixed", settings=sidecars.settings(), seed=seed)
    reference = cached_reference(session.model, REFERENCE_CACHE_GB)
    for alpha in session.arguments.alphas:
        name = alpha_name(alpha)
        set_all_alphas(session.model, alpha)
        depends = {"alpha": alpha, "layers": sidecars.layers, "untrained": seed, "geometry": sidecars.settings()}
        sums[name] = session.score(f"untrained {name}", depends, reference=reference) if alpha else distilled[name]
    detach_mamba_sidecars(session.model)
    return sums


def rows_of(session: Session, sidecars: SidecarSet, sums: dict, speeds: dict, bootstrap: stats.Bootstrap) -> list[dict]:
    """One row per alpha, the baseline first; intervals are derived from the sums, in every run anew."""
    rows, active = [], session.active_experts()
    lengths = [len(document.ids) - 1 for document in session.tokens["evaluation"]]
    shape = ledger.sidecar_shape(session.model, sidecars.settings(), sidecars.layers[0])
    for name, table in sums.items():
        row = tables.quality(table, sums["baseline"], bootstrap) | speeds.get(name, {})
        if name == "baseline":
            row |= {"kl": 0.0, "top1_agreement": 1.0}  # of a model with itself
        shares = None if name == "baseline" else dict.fromkeys(sidecars.layers, float(name))
        row |= ledger.flops_columns(session.model, lengths, active, shape, shares)
        rows.append({"alpha": name} | {column: row.get(column) for column in COLUMNS})
    return rows


def domain_rows(sums: dict, bootstrap: stats.Bootstrap) -> list[dict]:
    """One row per domain and alpha; intervals over sections of one work are named as such."""
    rows = []
    for domain in sorted(sums["baseline"]["domain"].unique()):
        part = {name: table[table["domain"] == domain].reset_index(drop=True) for name, table in sums.items()}
        interval = "within one work" if domain in text_data.ONE_WORK_DOMAINS else "documents"
        for name, table in part.items():
            values = tables.quality(table, part["baseline"], bootstrap)
            counts = {"documents": len(table), "tokens": int(table["tokens"].sum())}
            row = {"domain": domain, "alpha": name} | {key: values[key] for key in DOMAIN_COLUMNS}
            rows.append(row | counts | {"interval": interval})
    return rows


def print_summary(rows: list[dict], untrained: list[dict], layers: list[int]) -> None:
    """The two tables side by side, and the answer in a sentence."""
    control = {row["alpha"]: row["delta_nll"] for row in untrained}
    print(f"\nAlpha sweep on layers {layers} (delta NLL in nats per token, intervals over documents)")
    print(
        f"{'alpha':>9} {'perplexity':>11} {'delta NLL':>10} {'interval':>20} {'KL':>8} {'tok/s':>8} {'untrained':>10}"
    )
    for row in rows:
        interval = f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
        print(
            f"{row['alpha']:>9} {row['perplexity']:>11.3f} {row['delta_nll']:>+10.4f} {interval:>20} "
            f"{row['kl']:>8.4f} {row['tokens_per_second']:>8,.0f} {control[row['alpha']]:>+10.4f}"
        )
    last = rows[-1]
    print(
        f"Answer: at alpha {last['alpha']} the Mamba path costs {last['delta_nll']:+.4f} nats per token; never "
        f"distilled, it costs {control[last['alpha']]:+.4f}."
    )


def run(arguments, window_tokens: int) -> None:
    """The sweep with windows of so many tokens."""
    session = open_session(arguments, {"evaluation": arguments.documents}, window_tokens)
    sidecars = find_sidecars(session.model, arguments, session.folder, session.layers())
    print(f"model {arguments.model}, layers {sidecars.layers}, stage {sidecars.stage.upper()} of {sidecars.folder}")
    active = session.active_experts()  # also what warms the model up before its speed is measured
    print_plan(session, passes=2 + 2 * len(arguments.alphas), kept_gb=REFERENCE_CACHE_GB)
    print(f"a token activates {sum(active) / len(active):.0%} of the experts")
    prompts = cli.setting(config, "TEST_PROMPTS", arguments.model, arguments.quick)
    sums, speeds, texts = measure_distilled(session, sidecars, prompts)
    untrained = measure_untrained(session, sidecars, sums)
    session.say_reused()

    bootstrap = stats.Bootstrap(arguments.resamples, arguments.seed, arguments.confidence_level)
    rows = rows_of(session, sidecars, sums, speeds, bootstrap)
    # Speed and memory do not depend on the weights: the control's columns stay empty.
    control = rows_of(session, sidecars, untrained, {"baseline": speeds["baseline"]}, bootstrap)
    print_summary(rows, control, sidecars.layers)
    meta, folder = session.meta(sidecars.identity()), session.folder
    generations = {"prompts": prompts, "max_new_tokens": arguments.new_tokens, "texts": texts}
    written = [
        results.write_csv(folder / "alpha_sweep_results.csv", rows, meta),
        results.write_csv(folder / "alpha_sweep_documents.csv", tables.stacked(sums, "alpha"), meta),
        results.write_csv(folder / "alpha_sweep_untrained.csv", control, meta),
        results.write_csv(folder / "alpha_sweep_untrained_documents.csv", tables.stacked(untrained, "alpha"), meta),
        results.write_csv(folder / "alpha_sweep_domains.csv", domain_rows(sums, bootstrap), meta),
        results.write_json(folder / "alpha_sweep_generations.json", generations, meta),
    ]
    cli.say_written(written, "scripts/06_replace_layer.py")


def main(arguments) -> None:
    """Run the sweep; after running out of GPU memory once more with shorter windows."""
    with_shorter_windows(lambda tokens: run(arguments, tokens), arguments)


if __name__ == "__main__":
    cli.run_main(lambda: main(ARGUMENTS))
