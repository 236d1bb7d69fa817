"""Router signals: captured as they are, without a trace; and what is measured on them, by brute force."""

import gc
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats as scipy_stats
from torch.nn import functional

from src.base.text_data import TokenDocument
from src.eval_utils import score_documents
from src.gating.routing_text import (
    CHUNKS,
    TOKEN_KINDS,
    chunk_level_counts,
    collect_routing,
    correlation_table,
    decode_pieces,
    expert_table,
    extreme_tokens,
    group_table,
    layer_table,
    position_bucket,
    token_arrays,
    token_kinds,
    token_level_counts,
)
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM
from src.routing_extractor import RoutingExtractor
from tests.tiny import GOLDEN, byte_tokenizer, llama_folder


def tiny_model(num_layers: int = 3) -> BlockFFNForCausalLM:
    torch.manual_seed(0)
    config = BlockFFNConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=10,
        expert_size=4,
        max_position_embeddings=128,
        dim_model_base=16,
    )
    return BlockFFNForCausalLM(config).eval()


def ids_of(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 259, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def hook_count(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ------------------------------------------------------------------------------------------------------------ capture


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_signals_are_the_official_ones(case):
    model = BlockFFNForCausalLM.from_pretrained(GOLDEN / case, dtype=torch.float32).eval()
    expected = load_file(GOLDEN / case / "expected.safetensors")
    extractor = RoutingExtractor(model)
    with torch.no_grad():
        model(expected["input_ids"])
    signals = extractor.get_routing_signals()
    assert list(signals) == [0, 1, 2, 3]
    for layer, signal in signals.items():
        official = expected[f"layers.{layer}.router_activations"]
        torch.testing.assert_close(signal, official, atol=2e-5, rtol=0)
        assert torch.equal(signal == 0, official == 0)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_works_as_is(num_layers):
    """The documented calls, uncalibrated, without `with`, and without no_grad."""
    model, ids = tiny_model(num_layers), ids_of(2, 9)
    extractor = RoutingExtractor(model)
    model(ids)
    signals = extractor.get_routing_signals()
    stats = extractor.compute_sparsity_stats()
    assert list(signals) == list(range(num_layers))
    assert all(signal.shape == (2, 9, 10) and not signal.requires_grad for signal in signals.values())
    by_hand = np.zeros((num_layers, 2, 9))
    for layer, row, token in itertools.product(range(num_layers), range(2), range(9)):
        by_hand[layer, row, token] = sum(value == 0 for value in signals[layer][row, token].tolist()) / 10
    np.testing.assert_array_equal(stats["per_token_sparsity"], by_hand)
    np.testing.assert_array_equal(extractor.token_sparsity(), by_hand)
    assert stats["overall_sparsity"] == pytest.approx(by_hand.mean())
    assert stats["per_layer_sparsity"] == pytest.approx({layer: by_hand[layer].mean() for layer in range(num_layers)})
    assert 0 < stats["overall_sparsity"] < 1


def test_forward_is_unchanged_bit_for_bit():
    model, ids = tiny_model(), ids_of(2, 17)
    before = model(ids, labels=ids)
    with RoutingExtractor(model):
        during = model(ids, labels=ids)
        during.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    after = model(ids, labels=ids)
    after.loss.backward()
    assert torch.equal(before.logits, during.logits) and torch.equal(before.logits, after.logits)
    assert all(torch.equal(one, two.grad) for one, two in zip(gradients, model.parameters(), strict=True))


def test_hooks_go_with_the_context_an_error_and_the_last_reference():
    model, ids = tiny_model(), ids_of(1, 5)
    assert hook_count(model) == 0
    with RoutingExtractor(model) as extractor:
        assert hook_count(model) > 0
        model(ids)
    assert hook_count(model) == 0 and extractor.get_routing_signals()[0].shape == (1, 5, 10)
    extractor.close()
    with pytest.raises(RuntimeError, match="mine"), RoutingExtractor(model):
        raise RuntimeError("mine")
    assert hook_count(model) == 0
    extractor = RoutingExtractor(model)
    model(ids)
    del extractor
    gc.collect()
    assert hook_count(model) == 0
    first = RoutingExtractor(model)
    first = RoutingExtractor(model)  # the notebook's second run of a cell
    gc.collect()
    assert hook_count(model) == 1 + 2 * 3
    first.close()
    assert hook_count(model) == 0


def test_two_extractors_do_not_disturb_each_other():
    model, ids = tiny_model(), ids_of(1, 5)
    with RoutingExtractor(model) as one, RoutingExtractor(model) as two:
        model(ids)
        two.close()
        assert all(
            torch.equal(one.get_routing_signals()[layer], two.get_routing_signals()[layer]) for layer in range(3)
        )
        model(ids_of(1, 7))
        assert one.token_sparsity().shape == (3, 1, 7) and two.token_sparsity().shape == (3, 1, 5)


def test_a_failed_forward_leaves_no_mixture():
    model = tiny_model()
    with RoutingExtractor(model) as extractor:
        with pytest.raises(ValueError, match="no routing signal"):
            extractor.get_routing_signals()
        model(ids_of(1, 5))
        handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids_of(1, 8))
        handle.remove()
        assert {signal.shape for signal in extractor.get_routing_signals().values()} == {(1, 8, 10)}
        model(ids_of(1, 6))
        assert extractor.token_sparsity().shape == (3, 1, 6)


def test_a_second_call_of_the_router_is_not_mistaken_for_the_signal():
    """A look-ahead gate runs layer l's router on other input, before layer l's MLP does."""
    model, ids = tiny_model(), ids_of(1, 6)
    with RoutingExtractor(model) as extractor:
        model(ids)
        expected = extractor.get_routing_signals()

        def look_ahead(module, arguments, keywords):
            mlp = model.model.layers[1].mlp
            mlp.router_act_fn(mlp.router_proj(torch.randn(1, 6, 32)))

        handle = model.model.layers[1].self_attn.register_forward_pre_hook(look_ahead, with_kwargs=True)
        calls = []
        with RoutingExtractor(model, on_layer=lambda layer, signal: calls.append((layer, signal))):
            model(ids)
        handle.remove()
        assert [layer for layer, _ in calls] == [0, 1, 2]
        assert all(torch.equal(signal, expected[layer]) for layer, signal in calls)
        assert all(torch.equal(signal, expected[layer]) for layer, signal in extractor.get_routing_signals().items())


def test_attention_may_be_replaced():
    model, ids = tiny_model(), ids_of(1, 6)

    class Half(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, *arguments, **keywords):
            output, weights = self.attention(*arguments, **keywords)
            return output / 2, weights

    extractor = RoutingExtractor(model)
    model(ids)
    before = extractor.token_sparsity()
    model.model.layers[0].self_attn = Half(model.model.layers[0].self_attn)
    model(ids)
    assert extractor.token_sparsity().shape == before.shape
    assert RoutingExtractor(model).layers == [0, 1, 2]


def test_callback_keeps_nothing():
    model, ids, seen = tiny_model(), ids_of(2, 6), []
    with RoutingExtractor(model, on_layer=lambda layer, signal: seen.append((layer, signal))) as extractor:
        model(ids)
        with pytest.raises(ValueError, match="no routing signal"):
            extractor.get_routing_signals()
    with RoutingExtractor(model) as reference:
        model(ids)
    assert [layer for layer, _ in seen] == [0, 1, 2]
    assert all(torch.equal(signal, reference.get_routing_signals()[layer]) for layer, signal in seen)


def test_padding_is_left_out():
    model, rows = tiny_model(), [ids_of(1, 4, 1), ids_of(1, 9, 2)]
    ids = torch.cat([functional.pad(row, (0, 9 - row.shape[1]), value=2) for row in rows])
    mask = torch.tensor([[1] * 4 + [0] * 5, [1] * 9])
    with RoutingExtractor(model) as extractor, torch.no_grad():
        model(ids, attention_mask=mask)
        stats = extractor.compute_sparsity_stats(mask)
        singles = []
        for row in rows:
            model(row)
            singles.append(extractor.token_sparsity()[:, 0])
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 9\)"):
            extractor.compute_sparsity_stats(mask)
    by_hand = np.concatenate(singles, axis=1)
    assert stats["per_layer_sparsity"] == pytest.approx({layer: by_hand[layer].mean() for layer in range(3)})
    assert stats["overall_sparsity"] == pytest.approx(by_hand.mean())
    assert (
        np.isnan(stats["per_token_sparsity"][:, 0, 4:]).all() and not np.isnan(stats["per_token_sparsity"][:, 1]).any()
    )


def test_generation_keeps_the_last_token():
    model, ids = tiny_model(), ids_of(1, 6)
    with RoutingExtractor(model) as extractor:
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
        last = extractor.get_routing_signals()
        assert last[2].shape == (1, 1, 10)
        model(text[:, :-1])
        for layer, signal in extractor.get_routing_signals().items():
            torch.testing.assert_close(signal[:, -1:], last[layer], atol=1e-5, rtol=1e-4)


def test_model_without_router_is_named(tmp_path):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="llama has no router"):
        RoutingExtractor(AutoModelForCausalLM.from_pretrained(llama_folder(tmp_path)))
    with pytest.raises(ValueError, match="Linear has no router"):
        RoutingExtractor(torch.nn.Linear(2, 2))


# ----------------------------------------------------------------------------------------------------- TLS, CLS, kinds


def brute_chunk_level(active: np.ndarray, chunk: int) -> tuple[int, int]:
    silent = total = 0
    for start in range(0, len(active) - chunk + 1, chunk):
        for expert in range(active.shape[1]):
            total += 1
            silent += not any(active[token, expert] for token in range(start, start + chunk))
    return silent, total


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("chunk", [1, *CHUNKS])
def test_chunk_level_counts(tokens, chunk):
    active = np.random.default_rng(tokens * 100 + chunk).random((tokens, 6)) < 0.2
    assert chunk_level_counts(active, chunk) == brute_chunk_level(active, chunk)
    assert chunk_level_counts(active, 1) == token_level_counts(active)


def test_chunk_level_by_hand():
    """Windows (0,1), (2,3): expert 0 fires on token 1, expert 1 never; the fifth token, on which both fire, drops."""
    active = np.array([[0, 0], [1, 0], [0, 0], [0, 0], [1, 1]], dtype=bool)
    assert token_level_counts(active) == (7, 10)
    assert chunk_level_counts(active, 2) == (3, 4)
    assert chunk_level_counts(active, 4) == (1, 2)
    assert chunk_level_counts(active, 8) == (0, 0)
    with pytest.raises(ValueError, match="chunk is 0"):
        chunk_level_counts(active, 0)


def test_longer_chunks_are_never_sparser():
    active = np.random.default_rng(0).random((64, 12)) < 0.1
    ratios = [silent / total for silent, total in (chunk_level_counts(active, chunk) for chunk in (1, *CHUNKS))]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize(
    "pieces, kinds",
    [
        (["The", " cat", " sat"], ["function word", "content word", "content word"]),
        (["the", "rapy", " of", "fice"], ["content word", "continuation", "content word", "continuation"]),
        ([" x", "1", "23", " 45"], ["content word", "digit", "digit", "digit"]),
        (
            ["(", "the", ")", ",", "\n", "    ", "\n\n  "],
            ["punctuation", "function word", "punctuation", "punctuation", "newline", "space", "newline"],
        ),
        (["caf", "\ufffd", "é", "s"], ["content word", "continuation", "continuation", "continuation"]),
        ([" don", "'t", " 'tis"], ["content word", "continuation", "content word"]),
        (["snake", "_", "case"], ["content word", "punctuation", "content word"]),
        ([" A", "ND"], ["function word", "continuation"]),
    ],
)
def test_token_kinds(pieces, kinds):
    assert token_kinds(pieces) == kinds
    assert set(kinds) <= set(TOKEN_KINDS)


def test_special_tokens_are_not_text():
    assert token_kinds(["<s>", "the", "</s>"], [True, False, True]) == ["special", "function word", "special"]


def test_pieces_of_a_byte_tokenizer():
    tokenizer = byte_tokenizer()
    text = "aé ☃b\n"
    pieces = decode_pieces(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert pieces == ["a", "\ufffd", "é", " ", "\ufffd", "\ufffd", "☃", "b", "\n"]


def test_pieces_join_to_the_text():
    from src.models.loading import load_tokenizer, resolve_model_path

    tokenizer = load_tokenizer(resolve_model_path("blockffn-tiny"))
    text = 'def f(x):\n    """Return x — naïve, but 1234 fine."""\n    return x  # ok\n'
    pieces = decode_pieces(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(piece for piece in pieces if piece != "\ufffd") == text


@pytest.mark.parametrize(
    "position, label",
    [(1, "001-003"), (3, "001-003"), (4, "004-015"), (1023, "512-1023"), (1024, "1024+"), (9999, "1024+")],
)
def test_position_bucket(position, label):
    assert position_bucket(position) == label


# ------------------------------------------------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(5)
    lengths = (40, 3, 17, 64, 2, 33)
    return [
        TokenDocument(f"doc/{i}", "docs", np.concatenate(([1], rng.integers(3, 60, length))), length)
        for i, length in enumerate(lengths)
    ] + [TokenDocument("doc/short", "docs", np.array([1, 7]), 1)]


@pytest.fixture(scope="module")
def record(documents):
    return collect_routing(tiny_model(), documents, batch_size=2)


def test_record_equals_one_document_at_a_time(documents, record):
    model = tiny_model()
    kept = [document for document in documents if len(document.ids) > 2]
    assert record.documents == [document.id for document in kept] and "doc/short" not in record.documents
    usage, activation = np.zeros((3, 10)), np.zeros((3, 10))
    for index, document in enumerate(kept):
        ids = torch.from_numpy(document.ids)[None]
        with RoutingExtractor(model) as extractor, torch.no_grad():
            logits = model(ids).logits
        loss = functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").numpy()
        # the prefix token and the last token, which is only predicted, are left out
        signals = {layer: signal[0, 1:-1].numpy() for layer, signal in extractor.get_routing_signals().items()}
        np.testing.assert_array_equal(record.tokens[index], document.ids[1:-1])
        np.testing.assert_array_equal(record.positions[index], np.arange(1, len(document.ids) - 1))
        np.testing.assert_allclose(record.nll[index], loss[:-1], atol=1e-4)
        np.testing.assert_allclose(record.next_nll[index], loss[1:], atol=1e-4)
        for layer, signal in signals.items():
            active = signal != 0
            np.testing.assert_array_equal(record.counts[index][layer], active.sum(axis=1))
            assert tuple(record.tls[index, layer]) == token_level_counts(active)
            for slot, chunk in enumerate(CHUNKS):
                assert tuple(record.cls[index, layer, slot]) == brute_chunk_level(active, chunk)
            usage[layer] += active.sum(axis=0)
            activation[layer] += signal.sum(axis=0)
    np.testing.assert_array_equal(record.usage, usage)
    np.testing.assert_allclose(record.activation, activation, rtol=1e-5)
    assert record.num_tokens == sum(len(document.ids) - 2 for document in kept)


def test_record_does_not_depend_on_the_batches_and_leaves_no_hooks(documents, record):
    model = tiny_model()
    other = collect_routing(model, documents, batch_size=7)
    np.testing.assert_array_equal(other.tls, record.tls)
    assert hook_count(model) == 0
    # capturing changes no score
    kept = [document for document in documents if len(document.ids) > 2]
    plain = score_documents(model, kept, 64, 64, batch_size=7)
    for values, token_nll in zip(other.nll, plain.token_nll, strict=True):
        np.testing.assert_array_equal(values, token_nll[:-1])


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="nothing to measure"):
        collect_routing(tiny_model(), [TokenDocument("a", "docs", np.array([1, 7]), 1)], batch_size=1)


def test_layer_table(record):
    table = layer_table(record, resamples=200)
    assert [row["layer"] for row in table] == [0, 1, 2]
    for layer, row in enumerate(table):
        sparse = np.concatenate(record.counts, axis=1)[layer]
        assert row["tls"] == pytest.approx(1 - sparse.mean() / 10)
        assert row["tls_ci_low"] <= row["tls"] <= row["tls_ci_high"]
        assert row["tls"] >= row["cls_2"] >= 0 and row["cls_2_windows"] == sum(len(ids) // 2 for ids in record.tokens)
        assert row["cls_32_windows"] == sum(len(ids) // 32 for ids in record.tokens)


def test_expert_table(record):
    table = expert_table(record)
    assert len(table) == 30
    for layer in range(3):
        mean_active = np.concatenate(record.counts, axis=1)[layer].mean()
        assert sum(row["usage"] for row in table if row["layer"] == layer) == pytest.approx(mean_active)
    assert all(row["mean_activation"] > 0 for row in table if row["usage"] > 0)


def test_group_table(record):
    groups = np.where(np.concatenate(record.tokens) % 2, "odd", "even")
    table = group_table(record, "parity", groups, resamples=100)
    assert [(row["layer"], row["parity"]) for row in table] == list(itertools.product(range(3), ("even", "odd")))
    values = record.sparsity()
    for row in table:
        member = groups == row["parity"]
        assert row["sparsity"] == pytest.approx(values[row["layer"], member].mean()) and row["tokens"] == member.sum()
        assert row["documents"] == len(set(record.clusters()[member]))


def test_a_group_in_one_document_has_no_interval(record):
    groups = np.where(record.clusters() == 0, "first", "rest")
    rows = [row for row in group_table(record, "group", groups, resamples=50) if row["group"] == "first"]
    assert all(row["documents"] == 1 and row["sparsity_ci_low"] is None and row["sparsity"] > 0 for row in rows)


def test_correlations(record):
    table = correlation_table(record, resamples=50)
    assert len(table) == 9
    ids = np.concatenate(record.tokens).tolist()
    known = {
        "surprisal": np.concatenate(record.nll),
        "next_surprisal": np.concatenate(record.next_nll),
        "frequency": [ids.count(token) for token in ids],
    }
    for row in table:
        expected = scipy_stats.spearmanr(record.sparsity()[row["layer"]], known[row["covariate"]]).statistic
        assert (
            row["rho"] == pytest.approx(expected) and row["ci_low"] <= row["ci_high"] and not math.isnan(row["ci_low"])
        )


def test_extreme_tokens(record):
    pieces = [[f"<{token}>" for token in ids] for ids in record.tokens]
    table = extreme_tokens(record, pieces, number=5, context=1)
    mean = record.sparsity().mean(axis=0)
    most = [row for row in table if row["extreme"] == "most"]
    assert [row["sparsity"] for row in most] == sorted(mean, reverse=True)[:5]
    assert [row["sparsity"] for row in table if row["extreme"] == "least"] == sorted(mean)[:5]
    for row in table:
        document = record.documents.index(row["document"])
        assert row["token"] == f"<{record.tokens[document][row['position'] - 1]}>" and row["token"] in row["context"]
        assert row["context"].count("<") <= 3


def test_token_arrays(record):
    arrays = token_arrays(record)
    assert arrays["active"].dtype == np.uint8 and arrays["active"].shape == (record.num_tokens, 3)
    np.testing.assert_array_equal(1 - arrays["active"].T / arrays["num_experts"], record.sparsity())
    assert list(arrays["documents"][arrays["document"]][:3]) == ["doc/0"] * 3
    assert {len(arrays[name]) for name in ("document", "position", "token", "nll")} == {record.num_tokens}
