"""Language models of a few thousand random weights, saved as any model of transformers is."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

TEXT = [
    "Predict how strongly a gene is expressed. Its text is followed by vectors of its DNA.",
    "A kinase of the cell cycle, in the direction of transcription: protein of the ribosome.",
]
VOCABULARY = 270


def write_tokenizer(place: Path, *, special: tuple[str, ...] = ("<s>", "</s>", "<pad>")) -> None:
    """Save a byte-level tokenizer with the start, end and padding tokens that are given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(place)


def tiny_config(kind: str = "llama", *, width: int = 24, positions: int = 512) -> PreTrainedConfig:
    """Configure a model of three layers; a table a little larger than the vocabulary."""
    rows = VOCABULARY + 5
    if kind == "gpt2":
        return GPT2Config(
            n_embd=width, n_layer=3, n_head=2, vocab_size=rows, n_positions=positions,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
    shared = {
        "hidden_size": width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 36,
        "vocab_size": rows,
        "max_position_embeddings": positions,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if kind == "qwen3":
        return Qwen3Config(head_dim=8, **shared)
    return LlamaConfig(**shared)


def write_llm(place: Path, kind: str = "llama", *, seed: int = 0, **changes: int) -> Path:
    """Save a model and its tokenizer in a directory."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).save_pretrained(place)
    write_tokenizer(place)
    return place
