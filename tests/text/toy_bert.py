"""A BERT of a few thousand random weights, saved as any text model of transformers is."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

_TEXT = ["Gene: a kinase of the cell cycle that binds keratin. Family: collagen alpha chain."]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}


def write_tokenizer(place: Path) -> None:
    """Save a byte-level tokenizer that puts CLS before a text and SEP after it."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = zip(("pad_token", "unk_token", "cls_token", "sep_token"), _SPECIAL, strict=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(names)).save_pretrained(place)


def write_bert(place: Path, *, seed: int = 0) -> Path:
    """Save a model without its pooler, as most text models are, and a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(BertConfig(**SHAPE), add_pooling_layer=False).save_pretrained(place)
    write_tokenizer(place)
    return place
