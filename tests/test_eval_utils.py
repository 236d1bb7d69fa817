"""Perplexity against brute force, closed forms and lm-eval; generation and speed against plain loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import ByteLevelBPETokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from src import eval_utils
from src.base.text_data import Document, TokenDocument, score_windows, tokenize
from src.eval_utils import WindowRef, decode_speed, generate_texts, score_documents
from src.models.blockffn import BlockFFNConfig, BlockFFNForCausalLM

ROOT = Path(__file__).parent.parent
VOCAB = 300
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 6,
    "def add(a, b):\n    return a + b\n\n" * 9,
    "x",
    "Routers are linear layers; ReLU makes zeros exact. Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. " * 3,
    "1 + 1 = 2. 2 + 2 = 4. 3 + 3 = 6. 4 + 4 = 8. ",
    "import",
    "jumps over the lazy",
    "Sylter Deich, and no further",
]


@pytest.fixture(scope="module")
def tokenizer():
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(TEXTS, vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def documents(tokenizer):
    return tokenize([Document(f"d{i}", "test", text) for i, text in enumerate(TEXTS)], tokenizer)


def sharpen(model):
    """Large weights, so that predictions differ by position and context; eval mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    return model.eval()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return sharpen(LlamaForCausalLM(config))


def blockffn() -> BlockFFNForCausalLM:
    config = BlockFFNConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=6,
        expert_size=8,
        max_position_embeddings=512,
        dim_model_base=32,
    )
    return sharpen(BlockFFNForCausalLM(config))


@pytest.fixture(scope="module", params=[llama, blockffn])
def model(request):
    return request.param()


def brute_force(model, document, max_seq_len, stride):
    """Token NLLs window by window, one at a time, without mask or batch, log-softmax in float64."""
    values = np.full(len(document.ids) - 1, np.nan)
    scored = 0
    while scored < len(values):
        end = min(scored + (max_seq_len if scored == 0 else stride), len(values))
        begin = max(0, end - max_seq_len)
        ids = torch.from_numpy(document.ids[begin : end + 1])
        with torch.no_grad():
            logits = model(ids[None, :-1], use_cache=False).logits[0]
        nll = -logits.double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        values[scored:end] = nll[scored - begin :].numpy()
        scored = end
    return values


@pytest.mark.parametrize(("max_seq_len", "stride"), [(512, 512), (24, 24), (24, 7), (24, 1)])
def test_equals_brute_force(model, documents, max_seq_len, stride):
    scores = score_documents(model, documents, max_seq_len, stride, batch_size=4)
    assert scores.ids == [d.id for d in documents] and scores.domains == ["test"] * len(documents)
    for index, document in enumerate(documents):
        expected = brute_force(model, document, max_seq_len, stride)
        np.testing.assert_allclose(scores.token_nll[index], expected, rtol=2e-5, atol=2e-5)
        assert scores.nll[index] == pytest.approx(expected.sum(), rel=1e-6)
        assert scores.tokens[index] == len(document.ids) - 1
        assert scores.num_bytes[index] == len(TEXTS[index].encode())
    total = scores.nll.sum()
    assert scores.perplexity == pytest.approx(math.exp(total / scores.tokens.sum()))
    assert scores.bits_per_byte == pytest.approx(total / math.log(2) / sum(len(t.encode()) for t in TEXTS))
    assert scores.kl is None and scores.top1 is None and scores.tokens_per_second > 0


def test_equals_lm_eval_rolling_loglikelihood(model, documents, tokenizer):
    max_seq_len = 24
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_seq_len, batch_size=1, device="cpu")
    requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(TEXTS)]
    expected = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    scores = score_documents(model, documents, max_seq_len, max_seq_len)
    np.testing.assert_allclose(-scores.nll, expected, rtol=1e-6)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(documents):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = score_documents(model, documents, 24, 8)
    assert scores.perplexity == pytest.approx(VOCAB, rel=1e-6)
    np.testing.assert_allclose(scores.nll, scores.tokens * math.log(VOCAB), rtol=1e-6)


@pytest.mark.parametrize("stride", [24, 5])
def test_batch_size_and_order_do_not_matter(model, documents, stride):
    one = score_documents(model, documents, 24, stride, batch_size=1)
    for batch_size in (3, 64):
        many = score_documents(model, documents[::-1], 24, stride, batch_size=batch_size)
        assert many.ids == one.ids[::-1]
        for a, b in zip(one.token_nll, many.token_nll[::-1], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(one.nll, many.nll[::-1], rtol=1e-6)


def test_right_padding_is_masked_and_batches_stay_in_budget(documents):
    model, seen, told = blockffn(), [], []

    def spy(module, args, kwargs):
        seen.append((kwargs["input_ids"].clone(), kwargs["attention_mask"].clone(), kwargs["use_cache"]))

    model.register_forward_pre_hook(spy, with_kwargs=True)
    score_documents(model, documents, 24, 6, batch_size=5, on_batch=told.append)
    by_id = {document.id: document.ids for document in documents}
    assert len(seen) == len(told)
    for (input_ids, mask, use_cache), rows in zip(seen, told, strict=True):
        assert use_cache is False and input_ids.numel() <= 5 * 24 and len(rows) == len(input_ids)
        for row, ref in enumerate(rows):
            assert isinstance(ref, WindowRef)
            ids = by_id[ref.document][ref.start : ref.start + ref.length]
            assert input_ids[row, : ref.length].tolist() == ids.tolist()
            assert mask[row].tolist() == [1] * ref.length + [0] * (mask.shape[1] - ref.length)
    assert any((mask == 0).any() for _, mask, _ in seen), "no batch was padded: the test tests nothing"
    expected = sorted(
        (d.id, w.start, w.stop - 1 - w.start) for d in documents for w in score_windows(len(d.ids), 24, 6)
    )
    assert sorted((r.document, r.start, r.length) for rows in told for r in rows) == expected


def test_head_computes_scored_positions_only(documents):
    model, rows = llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    score_documents(model, documents, 24, 5)
    assert sum(rows) == sum(len(d.ids) - 1 for d in documents)


def test_model_without_logits_to_keep(documents):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    plain, kept = (score_documents(m, documents, 24, 5) for m in (Plain(), llama()))
    np.testing.assert_allclose(plain.nll, kept.nll, rtol=1e-6)


def test_nothing_looks_ahead(model, documents):
    document = documents[0]
    position = 30
    changed = document.ids.copy()
    changed[position:] = (changed[position:] + 7) % VOCAB
    other = TokenDocument(document.id, document.domain, changed, document.num_bytes)
    before, after = (score_documents(model, [d], 512, 512).token_nll[0] for d in (document, other))
    # entry j scores ids[j + 1]
    np.testing.assert_array_equal(before[: position - 1], after[: position - 1])
    assert (before[position - 1 :] != after[position - 1 :]).any()


def test_overlapping_windows_help_a_model_that_copies():
    """Its NLL of token t is small exactly if token t - 8 is in the window: a uniform model with a copying head."""

    class Copier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCAB, 1)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, attention_mask, use_cache):
            logits = torch.zeros(*input_ids.shape, VOCAB)
            # the logits at p predict p + 1, which repeats p - 7
            logits[:, 7:].scatter_(-1, input_ids[:, :-7, None], 9.0)
            return torch.nn.Module.__new__(type("Output", (torch.nn.Module,), {"logits": logits}))

    ids = np.tile(np.arange(10, 18), 12)
    document = TokenDocument("copy", "test", ids, 96)
    by_stride = [score_documents(Copier(), [document], 16, stride).nll_per_token for stride in (16, 8, 4, 1)]
    assert by_stride == sorted(by_stride, reverse=True) and by_stride[1] < by_stride[0] - 0.1
    miss, hit = math.log(VOCAB), math.log(math.exp(9) + VOCAB - 1) - 9
    # full context from the second window on: only the first seven tokens find nothing to copy
    assert by_stride[-1] == pytest.approx((7 * miss + (len(ids) - 8) * hit) / (len(ids) - 1), rel=1e-5)


def test_reference_equal_to_the_model_has_no_divergence(model, documents):
    def same(input_ids, attention_mask):
        return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    scores = score_documents(model, documents, 24, 6, reference=same)
    np.testing.assert_allclose(scores.kl, 0, atol=1e-5)
    assert scores.kl_per_token == pytest.approx(0, abs=1e-7)
    np.testing.assert_array_equal(scores.top1, scores.tokens)
    assert scores.top1_agreement == 1


@pytest.mark.parametrize("stride", [24, 6])
def test_divergence_equals_brute_force(documents, monkeypatch, stride):
    monkeypatch.setattr(eval_utils, "CHUNK_ELEMENTS_CPU", 5 * VOCAB)  # several chunks per batch
    model, other = llama(), blockffn()

    def reference(input_ids, attention_mask):
        return other(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    scores = score_documents(model, documents, 24, stride, batch_size=3, reference=reference)
    for index, document in enumerate(documents):
        divergence = agreement = 0.0
        for window in score_windows(len(document.ids), 24, stride):
            ids = torch.from_numpy(document.ids[window.start : window.stop - 1])[None]
            rows = slice(window.first_scored - 1 - window.start, None)
            with torch.no_grad():
                p = other(ids).logits[0, rows].double().softmax(-1)
                q = model(ids).logits[0, rows].double().softmax(-1)
            divergence += (p * (p.log() - q.log())).sum().item()
            agreement += (p.argmax(-1) == q.argmax(-1)).sum().item()
        assert scores.kl[index] == pytest.approx(divergence, rel=1e-5)
        assert scores.top1[index] == agreement
    assert scores.kl_per_token > 0.1 and scores.top1_agreement < 0.9


def test_training_mode_is_restored_and_off_meanwhile(documents):
    model = llama()
    model.train()
    modes = []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    score_documents(model, documents[:1], 24, 24)
    assert modes and not any(modes) and model.training


def test_wrong_arguments_are_named(documents):
    model = llama()
    with pytest.raises(ValueError, match="no document"):
        score_documents(model, [], 24, 24)
    with pytest.raises(ValueError, match="stride is 25"):
        score_documents(model, documents, 24, 25)
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_documents(model, documents, 24, 24, batch_size=0)
    empty = TokenDocument("void", "test", np.array([0]), 0)
    with pytest.raises(ValueError, match="'void' has no token"):
        score_documents(model, [*documents, empty], 24, 24)


def test_padding_pays_on_long_windows_only_where_it_is_cheap():
    window = eval_utils.Window
    lengths = [1000, 1000, 990, 100, 95, 20, 10]
    windows = [(i, window(0, length + 1, 1)) for i, length in enumerate(lengths)]
    sizes = [[w.stop - 1 for _, w in rows] for rows in eval_utils._batches(windows, 10_000, torch.device("cpu"))]
    assert sizes == [[1000, 1000], [990], [100, 95], [20, 10]]
    sizes = [[w.stop - 1 for _, w in rows] for rows in eval_utils._batches(windows, 3_000, torch.device("cuda"))]
    assert sizes == [[1000, 1000, 990], [100, 95, 20, 10]]


# ---- generation


def greedy_loop(model, tokenizer, prompt, count):
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            following = model(ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], dim=1)
        if following == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_generation_equals_a_greedy_loop_whatever_the_batch(model, tokenizer):
    prompts = ["The quick brown", "def", "Routers are linear layers; ReLU makes", "1 + 1 ="]
    expected = [greedy_loop(model, tokenizer, prompt, 12) for prompt in prompts]
    # Sampling settings of a checkpoint must not reach greedy generation.
    saved = model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    for batch_size in (1, 3, 8):
        assert generate_texts(model, tokenizer, prompts, 12, batch_size=batch_size) == expected
    assert model.generation_config is saved and any(expected)


def test_generation_refuses_a_prompt_without_tokens(tokenizer):
    with pytest.raises(ValueError, match="has no tokens"):
        generate_texts(llama(), tokenizer, ["fine", ""], 4)


# ---- speed and memory


def test_decode_speed_measures_the_new_tokens_after_the_first(monkeypatch):
    model = llama()
    clock = iter(float(tick) for tick in range(1_000))
    monkeypatch.setattr(eval_utils.time, "perf_counter", lambda: next(clock))
    # one tick per generated token: a token per second, prefill outside
    assert decode_speed(model, repeats=2) == 1


def test_peak_memory_sees_what_was_held():
    eval_utils.reset_peak_memory("cpu")
    before = eval_utils.peak_memory_gb("cpu")
    # more than the peak itself, so that it must rise even where the system does not let a process reset it
    held = np.ones(int((before + 0.2) * 1e9 / 8))
    assert before + 0.2 < eval_utils.peak_memory_gb("cpu") < 2 * before + held.nbytes / 1e9


@pytest.mark.gpu
def test_gpu_scores_equal_cpu_scores(documents):
    model = llama()
    on_cpu = score_documents(model, documents, 24, 6)
    on_gpu = score_documents(model.cuda(), documents, 24, 6)
    np.testing.assert_allclose(on_gpu.nll, on_cpu.nll, rtol=1e-4)
    assert eval_utils.peak_memory_gb("cuda") > 0
