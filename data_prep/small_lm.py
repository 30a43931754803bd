"""Train a small causal language model on gene descriptions, for work without downloaded weights.

It is a LLaMA of a few million parameters with a byte-level BPE tokenizer of its own, saved as any
model of transformers is. It has read nothing but the tables: it stands for no pretrained model.

    python data_prep/small_lm.py --text data/SGD_features_170331.tab --out models/small_lm
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers import logging as transformers_logging

from seq2expr.dna.genes import read_gene_list
from seq2expr.errors import UserError
from seq2expr.progress import wants_progress
from seq2expr.store import write_text
from seq2expr.text.prompts import Prompts, render_prompts
from seq2expr.text.tables import read_texts

log = logging.getLogger("seq2expr.data_prep.small_lm")

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
RECORD = "small_lm.json"


@dataclass(frozen=True)
class Recipe:
    """What decides the model, besides the corpus; about 6 million parameters by default.

    ``held_out`` is the share of texts that are kept for the perplexity, ``max_tokens`` the longest
    text, ``max_positions`` how far the model may be asked to look.
    """

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    max_tokens: int = 256
    max_positions: int = 4096
    epochs: float = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    held_out: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Distinct texts, shuffled: the first ones train, the last ones are held out."""

    train: list[str]
    held_out: list[str]
    n_repeated: int
    n_empty: int

    @property
    def digest(self) -> str:
        """sha256 of all texts in their order."""
        return hashlib.sha256("\n".join([*self.train, *self.held_out]).encode()).hexdigest()


def make_corpus(prompts: Prompts, recipe: Recipe) -> Corpus:
    """Split the texts; one that several genes share is taken once, so none is on both sides.

    Raises
    ------
    UserError
        When fewer than two texts would be on one side.
    """
    filled = [text for text in prompts.table["text"] if text]
    texts = sorted(set(filled))
    order = np.random.default_rng(recipe.seed).permutation(len(texts))
    n_held_out = round(recipe.held_out * len(texts))
    if min(n_held_out, len(texts) - n_held_out) < 2:
        raise UserError(
            f"Of {len(texts)} texts {n_held_out} would be held out; both sides need 2 or more. "
            "Give more genes, or another share to hold out."
        )
    shuffled = [texts[i] for i in order]
    return Corpus(
        shuffled[:-n_held_out],
        shuffled[-n_held_out:],
        n_repeated=len(filled) - len(texts),
        n_empty=len(prompts.table) - len(filled),
    )


def train_tokenizer(texts: Sequence[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text can be written in it, so it needs no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=wants_progress(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=recipe.max_positions,
    )


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> list[list[int]]:
    """Return the ids of every text between BOS and EOS, the first ``max_tokens`` of them."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[bos, *row, eos][: recipe.max_tokens] for row in ids]


def train_model(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerFast, recipe: Recipe
) -> LlamaForCausalLM:
    """Train the model on rows of token ids, with a cosine schedule after a warm-up of 5 %."""
    set_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    cpu = not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            weight_decay=0.01,
            warmup_steps=0.05,  # a share of all steps
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=cpu,
            bf16=not cpu,
            seed=recipe.seed,
            disable_tqdm=not wants_progress(),
            log_level="error",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": list(row)} for row in rows],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.cpu().eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: Sequence[Sequence[int]]) -> float:
    """Return exp(mean negative log likelihood) of all tokens after BOS."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([list(row)])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return math.exp(total / sum(len(row) - 1 for row in rows))


def unigram_perplexity(
    train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], n_tokens: int
) -> float:
    """Return the perplexity of token frequencies, each of ``n_tokens`` seen once more."""
    counts = np.bincount([i for row in train for i in row[1:]], minlength=n_tokens) + 1.0
    tokens = np.array([i for row in held_out for i in row[1:]])
    return float(np.exp(-np.log(counts[tokens] / counts.sum()).mean()))


def build(out: Path, prompts: Prompts, recipe: Recipe) -> dict[str, Any]:
    """Train tokenizer and model, save both in ``out`` with a record; give the record.

    Raises
    ------
    UserError
        When ``out`` is not empty, or there are too few texts.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another --out.")
    corpus = make_corpus(prompts, recipe)
    tokenizer = train_tokenizer(corpus.train, recipe)
    train, held_out = (encode(x, tokenizer, recipe) for x in (corpus.train, corpus.held_out))
    model = train_model(train, tokenizer, recipe)
    record = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "corpus": {
            "digest": corpus.digest,
            "train_texts": len(train),
            "held_out_texts": len(held_out),
            "train_tokens": sum(map(len, train)),
            "held_out_tokens": sum(map(len, held_out)),
            "characters": sum(map(len, [*corpus.train, *corpus.held_out])),
            "shortened_texts": sum(row[-1] != tokenizer.eos_token_id for row in train + held_out),
            "repeated_texts": corpus.n_repeated,
            "empty_texts": corpus.n_empty,
            "template": prompts.template,
            "options": dict(prompts.options),
            "files": [source._asdict() for source in prompts.sources],
        },
        "held_out_perplexity": {
            "model": perplexity(model, held_out),
            "unigram": unigram_perplexity(train, held_out, len(tokenizer)),
        },
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "tokenizers")
        },
    }
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_text(out / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def main(
    text: Annotated[list[Path], typer.Option(help="A table of gene descriptions; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder of the model.")],
    genes: Annotated[str, typer.Option(help="all, a comma list, or a file of ids.")] = "all",
    vocabulary: Annotated[int, typer.Option(help="Tokens of the tokenizer.")] = Recipe.vocabulary,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = Recipe.hidden,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = Recipe.layers,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = Recipe.heads,
    epochs: Annotated[float, typer.Option(help="Passes over the texts.")] = Recipe.epochs,
    seed: Annotated[int, typer.Option(help="Of split, weights and order.")] = Recipe.seed,
) -> None:
    """Train a small language model on gene descriptions."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    sizes = {"vocabulary": vocabulary, "hidden": hidden, "layers": layers, "heads": heads}
    try:
        wanted = read_gene_list(genes)
        texts = read_texts(text, None if wanted == "all" else wanted)
        recipe = Recipe(**sizes, epochs=epochs, seed=seed)
        record = build(out, render_prompts(texts), recipe)
    except UserError as error:
        log.error("%s", error)
        raise typer.Exit(2) from error
    corpus, held_out = record["corpus"], record["held_out_perplexity"]
    log.info(
        "%s: %s parameters, trained on %s tokens of %s texts",
        *(out, f"{record['parameters']:,}"),
        *(f"{corpus['train_tokens']:,}", f"{corpus['train_texts']:,}"),
    )
    log.info(
        "Perplexity per token on %d held-out texts (n = %d tokens): %.1f, unigram %.1f",
        *(corpus["held_out_texts"], corpus["held_out_tokens"] - corpus["held_out_texts"]),
        *(held_out["model"], held_out["unigram"]),
    )


if __name__ == "__main__":
    typer.run(main)
