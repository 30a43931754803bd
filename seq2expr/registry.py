"""What can be named in a configuration, with paper, size, licence and access.

Trunks and language models are other people's: nothing of them is in this package, and who names
one accepts its terms. What is marked :data:`REMEMBERED` was not looked up.
"""

from typing import NamedTuple


class SystemEntry(NamedTuple):
    """One row of ``seq2expr list systems``."""

    name: str
    reads: str
    paper: str
    code_licence: str


class BackboneEntry(NamedTuple):
    """One row of ``seq2expr list backbones``."""

    name: str
    what: str


class TrunkEntry(NamedTuple):
    """One row of ``seq2expr list trunks``."""

    name: str
    size: str
    reads: str
    """Context and output."""
    licence: str
    how: str
    """``model.trunk`` for it (its ``kind``), and what that needs."""


class EncoderEntry(NamedTuple):
    """One row of ``seq2expr list encoders``."""

    name: str
    size: str
    """Parameters, and the width of a token."""
    reads: str
    """Pixels, and the scale it was trained at."""
    licence: str
    how: str
    """``model.encoder`` for it (its ``kind``), and what that needs."""


class LlmEntry(NamedTuple):
    """One row of ``seq2expr list llms``."""

    name: str
    size: str
    """Parameters without a separate output layer, width, layers, longest input."""
    licence: str
    access: str


SYSTEMS = (
    SystemEntry(
        "seq2exp",
        "DNA window, epigenomic tracks, gene features",
        "Su et al. 2025, Learning to Discover Regulatory Elements for Gene Expression Prediction",
        "ours (MIT); the authors' code is GPL-3 and not used",
    ),
    SystemEntry(
        "gta",
        "a frozen DNA trunk, text on the gene, a frozen language model",
        "after Honig et al. 2024, Long-range gene expression prediction with token alignment of "
        "large language model (of which only the abstract could be read)",
        "ours (MIT); no code of the authors is published",
    ),
    SystemEntry(
        "nsl",
        "H&E patches, colour alone: 11 weights a gene",
        "after Dawood et al. 2021, All You Need is Color (of which only the abstract could be "
        "read)",
        "ours (MIT); no code of the authors is published",
    ),
    SystemEntry(
        "mclstexp",
        "H&E patches; expression of the training spots (also as BLEEP: configuration bleep)",
        "Min et al. 2024, Multimodal contrastive learning for spatial gene expression prediction "
        "using histology images",
        "ours (MIT); the authors' code is not used",
    ),
    SystemEntry(
        "hescape",
        "H&E patches; expression of the training spots",
        "Gindra et al. 2025, A Large-Scale Benchmark of Cross-Modal Learning for Histology and "
        "Gene Expression in Spatial Transcriptomics",
        "ours (MIT); the authors' code (MIT) is not used",
    ),
    SystemEntry(
        "triplex",
        "H&E patches, the tiles around them, and the whole slide",
        "Chung et al. 2024, Accurate Spatial Gene Expression Prediction by Integrating "
        "Multi-Resolution Features",
        "ours (MIT); the authors' code is not used",
    ),
    SystemEntry(
        "bg_triplex",
        "the same, and maps of edges and nuclei (slides of up to 1 um per pixel)",
        "Qu et al. 2024, Boundary-Guided Learning for Gene Expression Prediction in Spatial "
        "Transcriptomics (of which only the abstract and summaries could be read)",
        "ours (MIT); the authors' code is not used",
    ),
    SystemEntry(
        "dkan",
        "as triplex, and texts on the genes; expression of the training spots",
        "Zhang et al. 2026, DKAN (arXiv 2511.17685; of which only the abstract and notes could "
        "be read)",
        "ours (MIT); the authors' code is not used",
    ),
    SystemEntry(
        "agl",
        "as the system that it wraps (triplex); all measured genes of the training spots",
        "Shiku et al. 2026, Auxiliary Gene Learning: Spatial Gene Expression Estimation by "
        "Auxiliary Gene Selection",
        "ours (MIT); the authors' code is not used",
    ),
    SystemEntry(
        "stem",
        "H&E patches; answers with samples of all genes of a spot",
        "Zhu et al. 2025, Diffusion Generative Modeling for Spatially Resolved Gene Expression "
        "Inference from Histology Images",
        "ours (MIT); the authors' code is not used",
    ),
    SystemEntry(
        "comtip",
        "H&E patches, texts on the genes; expression of the training spots",
        "after Qian et al. 2025, Learning from Gene Names, Expression Values and Images: "
        "Contrastive Masked Text-Image Pretraining for Spatial Transcriptomics Representation "
        "Learning (of which only the abstract could be read)",
        "ours (MIT); no code of the authors was found",
    ),
)
"""Systems that train, predict and evaluate in this version."""

BACKBONES = (
    BackboneEntry("conv", "strided convolution tower; fast on a CPU"),
    BackboneEntry("bimamba", "bidirectional Mamba at base resolution (the published backbone)"),
)
"""Interchangeable DNA backbones (``model.backbone``)."""

REMEMBERED = "as remembered, check the model card"
"""Mark of facts that were not looked up."""

_TRUST = "kind: hub, with trust_remote_code: true"

TRUNKS = (
    TrunkEntry(
        "a run of seq2expr",
        "any size",
        "its own window and tracks; its own bins and channels",
        "yours",
        "kind: run, or just its directory or hub id",
    ),
    TrunkEntry(
        "EleutherAI/enformer-official-rough",
        "251 M parameters",
        "196,608 bp; 896 bins of 128 bp, 3,072 channels",
        "CC-BY-4.0",
        "kind: enformer, with the weights in a file; pip install 'seq2expr[enformer]'",
    ),
    TrunkEntry(
        "johahi/borzoi-replicate-0 (to 3)",
        "186 M parameters",
        "524,288 bp; 6,144 bins of 32 bp, 1,920 channels",
        "not found on the model card; ported with permission",
        "kind: process, for its package needs transformers below 4.51",
    ),
    TrunkEntry(
        "johahi/flashzoi-replicate-0 (to 3)",
        "about 186 M parameters",
        "524,288 bp; 6,144 bins of 32 bp, 1,920 channels",
        "MIT",
        "kind: process; needs flash-attn 2 and autocast on a recent NVIDIA GPU",
    ),
    TrunkEntry(
        "InstaDeepAI/nucleotide-transformer-v2-50m (to 500m)",
        f"56 to 498 M parameters ({REMEMBERED})",
        f"about 12 kb, longer windows in tiles; 6-mers, 512 to 1,024 channels ({REMEMBERED})",
        f"CC-BY-NC-SA-4.0, non-commercial ({REMEMBERED})",
        _TRUST,
    ),
    TrunkEntry(
        "InstaDeepAI/NTv3_pretrained",
        "up to 650 M parameters",
        "up to 1 Mb; one position per base",
        "InstaDeep Open Model Licence: non-commercial, also for what is made with it",
        f"{_TRUST}; gated: ask for access on its page",
    ),
    TrunkEntry(
        "LongSafari/hyenadna-tiny-1k-seqlen-hf (to large-1m)",
        f"1.6 to 55 M parameters ({REMEMBERED})",
        "1 kb to 1 Mb; one position per base, 128 to 256 channels",
        "BSD-3-Clause",
        _TRUST,
    ),
    TrunkEntry(
        "kuleshov-group/caduceus-ph_seqlen-131k_d_model-256_n_layer-16 (and -ps_)",
        "7.7 M parameters",
        "131 kb; one position per base, 256 channels (ps 512)",
        "Apache-2.0",
        f"{_TRUST}; needs the CUDA kernels of mamba-ssm",
    ),
    TrunkEntry(
        "Google AlphaGenome, all_folds",
        "size not stated",
        "1 Mb; bins of 128 bp and single bases",
        "model terms of Google, non-commercial",
        "kind: process (JAX); accept the terms where it is downloaded",
    ),
    TrunkEntry(
        "Evo2-7B of the Arc Institute",
        "7 B parameters",
        "1 Mb; one position per base",
        f"Apache-2.0 ({REMEMBERED})",
        "kind: process",
    ),
)
"""DNA models that can stand frozen below a system (``model.trunk``)."""

_ANY = "ours; no weights of others"
_TIMM = "kind: timm (pip install 'seq2expr[encoders]')"
_GATED = "gated: accept the terms on its page"
_NC = f"CC-BY-NC-ND-4.0, non-commercial ({REMEMBERED})"

ENCODERS = (
    EncoderEntry(
        "colour",
        "3 or 15 numbers, or grid x grid tokens of them",
        "any patch",
        _ANY,
        "kind: colour, what: mean_od or colour15, grid: 1",
    ),
    EncoderEntry(
        "texture",
        "61 numbers, or grid x grid tokens of them",
        "any patch from 32 px (each cell of the grid)",
        _ANY,
        "kind: texture, grid: 1",
    ),
    EncoderEntry("od", "grid x grid tokens of 3", "any patch", _ANY, "kind: od, grid: 28"),
    EncoderEntry(
        "cnn", "0.19 M parameters, 128", "64 px", "ours; trained with the system", "kind: cnn"
    ),
    EncoderEntry(
        "densenet121",
        "7.0 M parameters, 1,024",
        "224 px; pictures (ImageNet)",
        f"weights of torchvision: BSD-3-Clause ({REMEMBERED})",
        "kind: densenet121, with the weights in a file; else random",
    ),
    EncoderEntry(
        "resnet18",
        "11.2 M parameters, 49 tokens of 512 or their mean",
        "224 px; histology (Ciga et al. 2022, self-supervised) or pictures (ImageNet)",
        f"weights of Ciga et al.: MIT ({REMEMBERED}); of torchvision: BSD-3-Clause ({REMEMBERED})",
        "kind: resnet18, with the weights in a file; else random",
    ),
    EncoderEntry(
        "microsoft/resnet-50",
        "23.5 M parameters, 2,048",
        "224 px; pictures (ImageNet)",
        f"Apache-2.0 ({REMEMBERED})",
        "kind: transformers, or just its id",
    ),
    EncoderEntry(
        "facebook/dinov2-small (to giant)",
        f"22 M to 1.1 B parameters, 384 to 1,536 ({REMEMBERED})",
        "224 px; pictures",
        f"Apache-2.0 ({REMEMBERED})",
        "kind: transformers, or just its id",
    ),
    EncoderEntry(
        "openai/clip-vit-base-patch32",
        f"87 M parameters, 768 ({REMEMBERED})",
        "224 px; pictures",
        f"MIT ({REMEMBERED})",
        "kind: transformers, or just its id",
    ),
    EncoderEntry(
        "vinid/plip",
        f"87 M parameters, 768 ({REMEMBERED})",
        f"224 px; pathology of any scale ({REMEMBERED})",
        "not stated where it was looked for",
        "kind: transformers, or just its id",
    ),
    EncoderEntry(
        "owkin/phikon",
        f"86 M parameters, 768 ({REMEMBERED})",
        f"224 px, 0.5 um/px ({REMEMBERED})",
        f"Owkin's, non-commercial ({REMEMBERED})",
        "kind: transformers, or just its id",
    ),
    EncoderEntry(
        "owkin/phikon-v2",
        f"0.3 B parameters, 1,024 ({REMEMBERED})",
        f"224 px, 0.5 um/px ({REMEMBERED})",
        f"Owkin's, non-commercial ({REMEMBERED})",
        "kind: transformers, or just its id",
    ),
    EncoderEntry(
        "histai/hibou-b (and -L)",
        f"86 M and 0.3 B parameters, 768 and 1,024 ({REMEMBERED})",
        f"224 px, 0.5 um/px ({REMEMBERED})",
        f"Apache-2.0 ({REMEMBERED})",
        "brings its own code, which is not run; save it as Dinov2WithRegisters, give that",
    ),
    EncoderEntry(
        "MahmoodLab/UNI",
        "303 M parameters, 1,024",
        f"224 px, 0.5 um/px ({REMEMBERED})",
        _NC,
        f"{_TIMM}; {_GATED}",
    ),
    EncoderEntry(
        "MahmoodLab/UNI2-h",
        f"681 M parameters, 1,536 ({REMEMBERED})",
        f"224 px, 0.5 um/px ({REMEMBERED})",
        _NC,
        f"{_TIMM}, arguments of its model card; {_GATED}",
    ),
    EncoderEntry(
        "MahmoodLab/CONCH",
        "about 86 M parameters (image part), 512 or 768",
        "448 or 480 px",
        _NC,
        f"a package of its own, which is not read here; {_GATED}",
    ),
    EncoderEntry(
        "paige-ai/Virchow2",
        f"632 M parameters, 2,560 with pool: cls+mean ({REMEMBERED})",
        f"224 px, 0.25 to 2 um/px ({REMEMBERED})",
        _NC,
        f"{_TIMM}, arguments of its model card; {_GATED}",
    ),
    EncoderEntry(
        "bioptimus/H-optimus-0",
        "1.1 B parameters, 1,536",
        f"224 px, 0.5 um/px ({REMEMBERED})",
        f"Apache-2.0 ({REMEMBERED})",
        f"{_TIMM}; {_GATED}",
    ),
    EncoderEntry(
        "prov-gigapath/prov-gigapath",
        "1.1 B parameters, 1,536",
        f"224 px, 0.5 um/px ({REMEMBERED})",
        f"Apache-2.0, for research ({REMEMBERED})",
        f"{_TIMM}; {_GATED}",
    ),
    EncoderEntry(
        "CTransPath",
        "28 M parameters, 768",
        f"224 px, 0.5 um/px ({REMEMBERED})",
        f"GPL-3.0 ({REMEMBERED})",
        "needs a changed timm of its own, which is not read here",
    ),
    EncoderEntry(
        "a directory",
        "any vision model that transformers saved",
        "as its preprocessor_config.json says",
        "yours",
        "kind: transformers, or just its path",
    ),
)
"""Image encoders (``model.encoder``). Give patches the scale that an encoder was trained at."""
LLMS = (
    LlmEntry(
        "HuggingFaceTB/SmolLM2-135M",
        "134.5 M parameters, width 576, 30 layers, 8,192 tokens",
        f"Apache-2.0 ({REMEMBERED})",
        "open; the default",
    ),
    LlmEntry(
        "HuggingFaceTB/SmolLM2-360M",
        f"about 360 M parameters, width 960, 32 layers, 8,192 tokens ({REMEMBERED})",
        f"Apache-2.0 ({REMEMBERED})",
        "open",
    ),
    LlmEntry(
        "openai-community/gpt2",
        f"124.4 M parameters, width 768, 12 layers, 1,024 tokens ({REMEMBERED})",
        f"MIT ({REMEMBERED})",
        "open",
    ),
    LlmEntry(
        "EleutherAI/pythia-160m",
        f"123.7 M parameters, width 768, 12 layers, 2,048 tokens ({REMEMBERED})",
        f"Apache-2.0 ({REMEMBERED})",
        "open",
    ),
    LlmEntry(
        "EleutherAI/pythia-410m",
        f"353.8 M parameters, width 1,024, 24 layers, 2,048 tokens ({REMEMBERED})",
        f"Apache-2.0 ({REMEMBERED})",
        "open",
    ),
    LlmEntry(
        "Qwen/Qwen2.5-0.5B",
        "494.0 M parameters, width 896, 24 layers, 32,768 tokens",
        f"Apache-2.0 ({REMEMBERED})",
        "open",
    ),
    LlmEntry(
        "Qwen/Qwen3-0.6B-Base",
        "596.0 M parameters, width 1,024, 28 layers, 32,768 tokens",
        f"Apache-2.0 ({REMEMBERED})",
        "open",
    ),
    LlmEntry(
        "microsoft/biogpt",
        f"about 350 M parameters, width 1,024, 1,024 tokens ({REMEMBERED})",
        f"MIT ({REMEMBERED})",
        "open; biomedical",
    ),
    LlmEntry(
        "meta-llama/Llama-3.2-1B",
        "1,235.8 M parameters, width 2,048, 16 layers, 131,072 tokens",
        f"Llama 3.2 Community License, with duties of attribution and naming ({REMEMBERED})",
        "gated: accept the terms on its page",
    ),
    LlmEntry(
        "a directory",
        "any causal model that transformers saved, such as one of data_prep/small_lm.py",
        "yours",
        "on disk",
    ),
)
"""Language models that can stand frozen in a system (``model.llm``)."""

LISTS = {
    "systems": SYSTEMS,
    "backbones": BACKBONES,
    "trunks": TRUNKS,
    "encoders": ENCODERS,
    "llms": LLMS,
}
"""What ``seq2expr list`` shows."""
