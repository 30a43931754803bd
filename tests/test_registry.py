"""What can be named: every row says size, licence and access, and the sizes are right."""

from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import seq2expr.systems
from seq2expr.cli import app
from seq2expr.model.trunks import KINDS
from seq2expr.registry import LISTS, LLMS, REMEMBERED, SYSTEMS, TRUNKS


@pytest.mark.parametrize("what", LISTS)
def test_rows_are_full_and_have_names_of_their_own(what):
    rows = LISTS[what]
    assert all(isinstance(field, str) and field for row in rows for field in row)
    assert len({row.name for row in rows}) == len(rows)


def test_every_system_is_listed():
    modules = Path(seq2expr.systems.__file__).parent.glob("*.py")
    names = {path.stem for path in modules} - {"__init__"}
    assert {row.name for row in SYSTEMS} == names


@pytest.mark.parametrize("what", ["trunks", "encoders", "llms"])
def test_list_shows_size_licence_and_access(what):
    answer = CliRunner().invoke(app, ["list", what])
    assert answer.exit_code == 0
    fields = [line.strip() for line in answer.output.splitlines()]
    assert fields == [f"{what}:", *(field for row in LISTS[what] for field in row)]


def test_the_default_comes_first_and_what_is_gated_is_called_so():
    assert LLMS[0].name == "HuggingFaceTB/SmolLM2-135M"
    gated = [row.name for row in LLMS if row.access.startswith("gated")]
    assert gated == ["meta-llama/Llama-3.2-1B"]
    assert all(REMEMBERED in row.licence for row in LLMS if row.licence != "yours")
    closed = {row.name: row.licence for row in TRUNKS if "non-commercial" in row.licence}
    assert len(closed) == 3


def test_every_trunk_is_of_a_kind_that_there_is():
    kinds = [row.how.split()[1].rstrip(",;") for row in TRUNKS if row.how.startswith("kind: ")]
    assert len(kinds) == len(TRUNKS)
    assert set(kinds) == set(KINDS)


ARCHITECTURES = {
    "HuggingFaceTB/SmolLM2-135M": transformers.LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192,
    ),
    "openai-community/gpt2": transformers.GPT2Config(),
    "EleutherAI/pythia-160m": transformers.GPTNeoXConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        vocab_size=50304,
    ),
    "EleutherAI/pythia-410m": transformers.GPTNeoXConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        vocab_size=50304,
    ),
    "Qwen/Qwen2.5-0.5B": transformers.Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151936, max_position_embeddings=32768,
    ),
    "Qwen/Qwen3-0.6B-Base": transformers.Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, vocab_size=151936, max_position_embeddings=32768,
    ),
    "meta-llama/Llama-3.2-1B": transformers.LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=8192, vocab_size=128256, max_position_embeddings=131072,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_those_of_the_architecture(name):
    config = ARCHITECTURES[name]
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    count = sum(weight.numel() for weight in model.parameters()) / 1e6
    size = next(row.size for row in LLMS if row.name == name)
    assert size.startswith(
        f"{count:,.1f} M parameters, width {config.hidden_size:,}, "
        f"{config.num_hidden_layers} layers, {config.max_position_embeddings:,} tokens"
    )
