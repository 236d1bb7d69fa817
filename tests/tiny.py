"""Tiny model folders for tests: random weights with a byte-level tokenizer beside them."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

GOLDEN = Path(__file__).parent / "golden"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: <unk> 0, <s> 1, </s> 2, then the bytes; puts <s> in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def blockffn_folder(folder: Path, case: str = "vanilla_gqa_block") -> Path:
    """A golden checkpoint (4 layers, 12 experts, context 256) with a tokenizer."""
    shutil.copytree(GOLDEN / case, folder, dirs_exist_ok=True)
    (folder / "expected.safetensors").unlink()
    byte_tokenizer().save_pretrained(folder)
    return folder


def llama_folder(folder: Path, qwen: bool = False) -> Path:
    """A random Llama or Qwen3 of 3 layers with a tokenizer."""
    settings = dict(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **settings)) if qwen else LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes) -> Path:
    """Edit config.json in place."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder
