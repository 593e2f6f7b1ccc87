"""Small language models with random weights, a tokenizer for them, and a text, all made here."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sbpatch.data.preprocessing import TextPreprocessing

SPECIAL = ["[PAD]", "[UNK]", "[BOS]"]
VOCABULARY = [*SPECIAL, *(f"w{i}" for i in range(61))]


def words(begin: bool = False) -> PreTrainedTokenizerFast:
    """One token a word, `w0` to `w60`; with `begin` every text starts with [BOS]."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", model_max_length=64
    )


def preprocessing(tokens: int = 16, begin: bool = False) -> TextPreprocessing:
    return TextPreprocessing(words(begin), tokens)


def prose(paragraphs: int = 40, size: int = 80, seed: int = 0) -> str:
    """Paragraphs of `size` words, over 200 characters from 70 words on, each under a heading."""
    draw = random.Random(seed)
    lines = []
    for i in range(paragraphs):
        lines += [f" = Heading {i} = ", "", " ".join(f"w{int(draw.triangular(0, 60, 3))}" for _ in range(size)), ""]
    return "\n".join(lines)


def llama(seed: int = 0, **change: Any) -> LlamaForCausalLM:
    """Two layers, four heads on two key heads, weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
        "bos_token_id": 2, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape | change)).eval()


def bert(seed: int = 0, cls: type[nn.Module] = BertModel, **change: Any) -> Any:
    """Two layers of two heads; `cls` is BertModel (features) or BertForMaskedLM (tokens)."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0,
    }  # fmt: skip
    return cls(BertConfig(**shape | change)).eval()
