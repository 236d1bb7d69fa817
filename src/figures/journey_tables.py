"""Tables of the journey study, and its findings in words, from the files of scripts/journeys/02_analyze.py.

Each `*_table` function takes what `style.read_result` returned and returns a DataFrame for display, or raises
NothingToDraw: a complete file may have nothing for a table (one layer, one data set, no token texts).
"""

import textwrap

import pandas as pd

from src.figures.style import counted, interval_texts, needs, number_text, number_texts, pairs_of


def _short_path(path, most=14):
    """ "6>5>0" as "6·5·0"; of a long path the first and the last experts."""
    experts = path.split(">")
    if len(experts) > most:
        experts = [*experts[:6], "…", *experts[-3:]]
    return "·".join(experts)


def path_table(top_paths, most=10):
    """The most common paths of every length for display, at most `most` of each. `top_paths`: top_paths.csv."""
    table = top_paths[top_paths["rank"] <= most]
    return pd.DataFrame(
        {
            "layers": table["length"].to_numpy(),
            "first layer": table["start_layer"].to_numpy(),
            "path": [_short_path(path) for path in table["path"]],
            "tokens": table["count"].to_numpy(),
            "share (%)": [f"{value:.2f}" for value in table["percent"]],
            "token texts": table["token_texts"].to_numpy(),
        },
        index=pd.Index(table["rank"], name="rank"),
    )


def token_table(routing, order="count", most=20):
    """At most `most` tokens: how alike their occurrences are routed, their paths, the nearest token. token_routing.csv.

    order: the column by which tokens are sorted, the largest first: `count`; `agreement`, those whose occurrences are
    routed most alike; `nearest_agreement`, those that share routing with another token.
    """
    needs(len(routing), "the records name no tokens")
    table = routing.sort_values(order, ascending=False, kind="stable").head(most)
    return pd.DataFrame(
        {
            "token": [repr(token) for token in table["token"]],
            "occurrences": table["count"].to_numpy(),
            "agreement (%)": number_texts(100 * table["agreement"]),
            "different paths": table["paths"].to_numpy(),
            "on the commonest (%)": number_texts(table["common_path_percent"]),
            "nearest token": [repr(token) for token in table["nearest"]],
            "agreement with it (%)": number_texts(100 * table["nearest_agreement"]),
        }
    )


def domain_table(summary):
    """domain_summary.csv for display."""
    return pd.DataFrame(
        {
            "domain": summary["domain"],
            "problems": summary["problems"],
            "tokens": [f"{tokens:,}" for tokens in summary["tokens"]],
            "mean probability of the strongest": number_texts(summary["mean_confidence"], "{:.3f}"),
            "confident decisions (%)": number_texts(summary["high_confidence_percent"]),
            "different experts per token": number_texts(summary["unique_experts"], "{:.2f}"),
        }
    )


def specific_expert_table(difference, most=10):
    """The experts that differ most between two domains, at most `most` for each preference. domain_difference.csv."""
    pairs_of(difference)
    marked = difference[difference["prefers"] != ""]
    needs(len(marked), "no expert's usage differs by more than --domain-percent of scripts/journeys/02_analyze.py")
    marked = marked.assign(size=marked["difference"].abs()).sort_values("size", ascending=False, kind="stable")
    marked = marked.groupby(["domain_a", "domain_b", "prefers"], sort=False).head(most)
    table = marked.sort_values(["domain_a", "domain_b", "prefers", "size"], ascending=[True, True, True, False])
    return pd.DataFrame(
        {
            "preferred in": table["prefers"],
            "compared": table["domain_a"] + " / " + table["domain_b"],
            "layer": table["layer"],
            "expert": table["expert"],
            "usage (%)": [f"{a:.1f} / {b:.1f}" for a, b in zip(table["percent_a"], table["percent_b"], strict=True)],
            "difference (points)": [f"{value:+.1f}" for value in table["difference"]],
        }
    ).reset_index(drop=True)


def hop_table(hops, shown=(1, 2, 3, 5, 10, 15, 20, 25, 31)):
    """hop_accuracy.csv for display, at some hops and the last."""
    needs(len(hops), "one layer only: there is no layer ahead")
    table = hops[hops["hop"].isin([*shown, hops["hop"].max()])]
    return pd.DataFrame(
        {
            "in-sample (%)": number_texts(table["accuracy"]),
            "majority, in-sample (%)": number_texts(table["majority"]),
            "held out (%)": number_texts(table["held_out_accuracy"]),
            "95 % interval": interval_texts(table["ci_low"], table["ci_high"]),
            "majority, held out (%)": number_texts(table["held_out_majority"]),
            "random (%)": number_texts(table["random"]),
        },
        index=pd.Index(table["hop"], name="layers ahead"),
    )


def in_words(items, most=24):
    """Items in words, cut after `most`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none") + more


def transition_table(findings):
    """P(target expert | source expert) of the most predictable pair of neighbouring layers. findings.json."""
    best = findings["most_predictable"]
    needs(best, "one layer only: there are no transitions")
    table = pd.DataFrame(best["transitions"]).astype(float).round(3)
    table.index = [f"layer {best['source_layer']}, expert {expert}" for expert in table.index]
    table.columns = [f"layer {best['target_layer']}, expert {expert}" for expert in table.columns]
    return table.rename_axis(columns=f"affinity {best['affinity']:.3f}")


def strong_transition_table(strong, most=20):
    """The likeliest transitions between neighbouring layers. `strong`: strong_transitions.csv."""
    needs(len(strong), "no transition is likelier than --strong-percent of scripts/journeys/02_analyze.py")
    table = strong.sort_values(["percent", "count"], ascending=False, kind="stable").head(most)
    return pd.DataFrame(
        {
            "layers": [f"{a} to {b}" for a, b in zip(table["source_layer"], table["target_layer"], strict=True)],
            "experts": [f"{a} to {b}" for a, b in zip(table["source_expert"], table["target_expert"], strict=True)],
            "tokens": table["count"].to_numpy(),
            "probability (%)": [f"{value:.1f}" for value in table["percent"]],
        }
    )


def correlation_table(findings, correlation):
    """Strongest id correlations of layers that are no neighbours, beside what renumbering makes of them."""
    rows = findings["strongest_id_correlations"]
    needs(rows, "there are no layers two apart, or none that uses two experts")
    place = {int(layer): index for index, layer in enumerate(correlation["layers"])}
    cells = [place[row["layer_a"]] for row in rows], [place[row["layer_b"]] for row in rows]
    return pd.DataFrame(
        {
            "layers": [f"{row['layer_a']} and {row['layer_b']}" for row in rows],
            "r of ids": [f"{row['r']:+.3f}" for row in rows],
            "r, renumbered": number_texts(correlation["id_correlation_relabelled"][cells], "{:+.3f}"),
            "Cramér's V": number_texts(correlation["cramers_v"][cells], "{:.3f}"),
        }
    )


def findings_text(findings, width=110):
    """findings.json in words: a few wrapped paragraphs of plain text."""
    parts = [
        f"{counted(findings['tokens'], 'token')} of {counted(findings['problems'], 'problem')} "
        f"({', '.join(findings['domains'])}), {counted(findings['layers'])}, "
        f"{findings['experts_per_token']} of {findings['experts']} experts per token."
    ]
    dominant = findings["dominant_experts"]
    listed = [f"layer {e['layer']} E{e['expert']} ({e['percent']:.1f} %)" for e in dominant["experts"]]
    parts.append(f"Experts that take over {dominant['above_percent']:g} % of a layer's tokens: {in_words(listed)}.")
    for gate in findings["gates"][:1]:
        mean, std = number_texts([gate["mean"], gate["std"]], "{:.3f}")
        parts.append(
            f"Gates: the strongest expert gets {mean} on average (standard deviation {std}); "
            f"{number_text(gate['percent_above'])} % of the decisions are above {gate['threshold']:g}."
        )
    affinity = findings["affinity"]
    if affinity["adjacent"] is not None:
        far, gain = affinity["non_adjacent"], affinity["adjacent_advantage_percent"]
        others = f", of others {far:.3f} ({gain:+.1f} % for neighbours)" if far else ""
        parts.append(f"Affinity (the reference's measure) of neighbouring layers {affinity['adjacent']:.3f}{others}.")
    accuracy = [f"{value:.1f} % at {hop}" for hop, value in findings["hop_accuracy_percent"].items()]
    if accuracy:
        low = findings["low_accuracy"]
        below = f"under {low['below_percent']:g} %"
        when = f"{below} for the first time at {low['hop']}" if low["reached"] else f"never {below}"
        parts.append(f"In-sample accuracy by layers ahead: {', '.join(accuracy)}; {when}.")
    best = findings["most_predictable"]
    if best is not None:
        strong = [f"E{s['source_expert']} to E{s['target_expert']} ({s['percent']:.1f} %)" for s in best["strong"]]
        parts.append(
            f"Most predictable neighbours: layer {best['source_layer']} to {best['target_layer']} (affinity "
            f"{best['affinity']:.3f}); strong transitions: {in_words(strong, 12)}."
        )
    paths = findings["paths"]
    parts.append(
        f"{paths['unique']:,} different paths, {100 * paths['uniqueness_ratio']:.2f} % of the tokens; a token meets "
        f"{findings['unique_experts_per_token']:.2f} different experts on its way."
    )
    rows = findings["strongest_id_correlations"]
    if rows:
        correlations = [f"layers {row['layer_a']} and {row['layer_b']} ({row['r']:+.3f})" for row in rows]
        parts.append(
            f"Strongest correlations of expert ids of layers that are no neighbours: {', '.join(correlations)}. "
            f"{findings['id_correlation_note']}"
        )
    return "\n".join(textwrap.fill(part, width, subsequent_indent="    ") for part in parts)
