"""The checkpoints that ship with the repository are whole, of the shape their cards state, and really trained."""

import json

import numpy as np
import pytest
import torch

from src.journeys import collection
from src.models.loading import ASSETS_DIR, SHIPPED_MODELS, load_model
from src.routing_extractor import RoutingExtractor, TopKExtractor, router_shape


@pytest.fixture(scope="module")
def problems():
    humaneval = collection.load_problems("humaneval", 12).problems
    return humaneval + collection.load_problems("gsm_symbolic", 12).problems


def nll_and_ids(model, tokenizer, problems):
    """NLL in nats of every token but the first of each problem, and those tokens' ids."""
    nll, ids = [], []
    for row in collection.encode_prompts(tokenizer, problems, 512):
        row = torch.tensor(row)
        with torch.inference_mode():
            logits = model(input_ids=row[None]).logits[0, :-1].float()
        nll.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").numpy())
        ids.append(row[1:].numpy())
    return np.concatenate(nll), np.concatenate(ids)


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_shipped_model_beats_the_best_unigram_model(name, problems):
    model, tokenizer = load_model(name, "cpu", "float32")
    nll, ids = nll_and_ids(model, tokenizer, problems)
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    # fitted to this very text, which no unigram model of other text can beat
    assert nll.mean() < -(shares * np.log(shares)).sum() - 1.0
    card = (ASSETS_DIR / name / "README.md").read_text()
    seen = json.loads((ASSETS_DIR / name / "training.json").read_text())
    assert f"{seen['tokens_seen'] / 1e6:.2f} M tokens" in card and f"{seen['steps']:,} steps" in card


def test_blockffn_tiny_is_sparse(problems):
    model, tokenizer = load_model("blockffn-tiny", "cpu", "float32")
    with RoutingExtractor(model) as extractor:
        nll_and_ids(model, tokenizer, problems[:1])
        stats = extractor.compute_sparsity_stats()
    assert len(stats["per_layer_sparsity"]) == 12 and 0.6 < stats["overall_sparsity"] < 0.95


def test_mixtral_tiny_has_mixtrals_routing_shape_and_no_idle_expert(problems):
    model, tokenizer = load_model("mixtral-tiny", "cpu", "float32")
    model.set_experts_implementation("eager")
    shape = router_shape(model)
    assert (len(shape.layers), shape.num_experts, shape.top_k) == (32, 8, 2)
    prompts = collection.encode_prompts(tokenizer, problems, 512)
    with TopKExtractor(model) as extractor:
        recorded = collection.collect(model, extractor, prompts)
    experts = np.concatenate([problem.experts for problem in recorded])
    counts = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in experts.swapaxes(0, 1)])
    assert counts.shape == (32, 8) and counts.min() > 0
    stated = json.loads((ASSETS_DIR / "mixtral-tiny" / "evaluation.json").read_text())
    assert stated["smallest_expert_share"] >= 0.01
