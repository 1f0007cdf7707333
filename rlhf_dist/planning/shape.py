"""The sizes of a model that a plan needs: from its files, from a table of public models, or from `model.tiny`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rlhf_dist.config.paths import expanded
from rlhf_dist.config.schema import Config, ModelConfig, TinyConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.models.head_parts import require_head_parts
from rlhf_dist.models.model_files import read_object
from rlhf_dist.models.run_model import run_model
from rlhf_dist.models.weight_files import read_headers

TINY_VOCABULARY = 102
"""Tokens of the tiny model's tokenizer: 96 characters and 6 special ones."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder. Two models of one shape take the same memory and the same work."""

    parameters: int
    """All of them; an output head that is tied to the input embedding counts once."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the feed-forward layers."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.vocabulary, self.intermediate) * self.hidden

    @property
    def kv_elements(self) -> int:
        """Elements that one token takes in a key-value cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def products(self) -> int:
        """Weights that each token is multiplied with: all but those of the input embedding."""
        embedding = self.vocabulary * self.hidden
        return self.parameters - embedding * (self.parameters >= self.of_layers + 2 * embedding)

    @property
    def of_layers(self) -> int:
        """Weights of the matrices in the layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


def gated(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool,
    bias: bool = False,
    head_dim: int = 0,
    head_norms: bool = False,
) -> ModelShape:
    """A model like Llama, Qwen or Mistral: gated feed-forward layers, and two norms a layer.

    `bias`: of queries, keys and values (Qwen2); `head_norms`: of queries and keys (Qwen3).
    """
    head_dim = head_dim or hidden // heads
    wide, narrow = heads * head_dim, kv_heads * head_dim
    layer = 2 * hidden * (wide + narrow) + 3 * hidden * intermediate + 2 * hidden
    layer += (wide + 2 * narrow) * bias + 2 * head_dim * head_norms
    parameters = vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden
    return ModelShape(parameters, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary)


KNOWN: Mapping[str, ModelShape] = {
    "Qwen/Qwen2.5-0.5B": gated(24, 896, 4864, 14, 2, 151936, True, bias=True),
    "Qwen/Qwen2.5-1.5B": gated(28, 1536, 8960, 12, 2, 151936, True, bias=True),
    "Qwen/Qwen2.5-3B": gated(36, 2048, 11008, 16, 2, 151936, True, bias=True),
    "Qwen/Qwen2.5-7B": gated(28, 3584, 18944, 28, 4, 152064, False, bias=True),
    "Qwen/Qwen2.5-14B": gated(48, 5120, 13824, 40, 8, 152064, False, bias=True),
    "Qwen/Qwen2.5-32B": gated(64, 5120, 27648, 40, 8, 152064, False, bias=True),
    "Qwen/Qwen2.5-72B": gated(80, 8192, 29568, 64, 8, 152064, False, bias=True),
    "Qwen/Qwen3-0.6B": gated(28, 1024, 3072, 16, 8, 151936, True, head_dim=128, head_norms=True),
    "Qwen/Qwen3-1.7B": gated(28, 2048, 6144, 16, 8, 151936, True, head_dim=128, head_norms=True),
    "Qwen/Qwen3-4B": gated(36, 2560, 9728, 32, 8, 151936, True, head_dim=128, head_norms=True),
    "Qwen/Qwen3-8B": gated(36, 4096, 12288, 32, 8, 151936, False, head_dim=128, head_norms=True),
    "Qwen/Qwen3-32B": gated(64, 5120, 25600, 64, 8, 151936, False, head_dim=128, head_norms=True),
    "meta-llama/Llama-3.2-1B": gated(16, 2048, 8192, 32, 8, 128256, True),
    "meta-llama/Llama-3.2-3B": gated(28, 3072, 8192, 24, 8, 128256, True, head_dim=128),
    "meta-llama/Llama-3.1-8B": gated(32, 4096, 14336, 32, 8, 128256, False),
    "meta-llama/Llama-3.1-70B": gated(80, 8192, 28672, 64, 8, 128256, False),
    "meta-llama/Llama-3.3-70B": gated(80, 8192, 28672, 64, 8, 128256, False),
    "mistralai/Mistral-7B-v0.3": gated(32, 4096, 14336, 32, 8, 32768, False),
    "HuggingFaceTB/SmolLM2-135M": gated(30, 576, 1536, 9, 3, 49152, True),
    "HuggingFaceTB/SmolLM2-360M": gated(32, 960, 2560, 15, 5, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B": gated(24, 2048, 8192, 32, 32, 49152, True),
}
"""Sizes that the models' config.json files on the hub give, so that a plan needs no download."""
VARIANTS = ("-Instruct", "-Base", "-Math", "-Coder")
"""Endings of names whose models have the shape of the model without them."""


def require_parts(config: Config, shape: ModelShape) -> None:
    """Refuse to cut the policy among more processes or ranks than its heads allow. Raises ModelError."""
    for key, parts in (
        ("rollout.tensor_parallel", config.rollout.tensor_parallel),
        ("learner.sequence_parallel", config.learner.sequence_parallel),
    ):
        require_head_parts(config.model.path, shape.heads, shape.kv_heads, parts, key)


def shape_of(model: ModelConfig, key: str = "model.path") -> ModelShape:
    """Sizes of `model.path`, without a download. Raises ModelError where they cannot be known, or its files are bad."""
    if model.path == "tiny":
        return tiny_shape(model.tiny)
    path = expanded(model.path)
    directory = run_model(path, key) or path
    if directory.is_dir():
        parameters = sum(math.prod(tensor.shape) for tensor in read_headers(directory).values())
        return described(read_object(directory / "config.json"), directory / "config.json", parameters)
    name = model.path
    for ending in VARIANTS:
        name = name.replace(ending, "")
    if name in KNOWN:
        return KNOWN[name]
    try:
        cached = try_to_load_from_cache(model.path, "config.json") if "/" in model.path else None
    except HFValidationError:  # a path, not a hub name
        cached = None
    if isinstance(cached, str):
        return described(read_object(Path(cached)), Path(cached))
    raise ModelError(
        f"{key} = {model.path}: there is no such directory here, and its sizes are not known without a download; "
        f"download it first, or plan with a model of the same size, such as {_nearest(model.path)}"
    )


def tiny_shape(tiny: TinyConfig) -> ModelShape:
    """Of the tiny model, which is made like Qwen2 with a tied head."""
    sizes = tiny.layers, tiny.hidden_size, tiny.intermediate_size, tiny.heads, tiny.kv_heads
    return gated(*sizes, TINY_VOCABULARY, tied=True, bias=True)


def described(raw: Mapping[str, Any], path: Path, parameters: int = 0) -> ModelShape:
    """What a config.json says; `parameters`: of the weights beside it, 0 where there are none yet.

    Raises ModelError where a size is missing.
    """
    text = raw.get("text_config") or raw

    def size(*names: str, default: int | None = None) -> int:
        found = next((text[name] for name in names if isinstance(text.get(name), int)), default)
        if found is None:
            raise ModelError(f"{path}: has no {names[0]}, which a plan needs; give a decoder such as Qwen or Llama")
        if isinstance(found, bool) or found < 1:
            raise ModelError(f"{path}: {names[0]} is {found}; it must be 1 or more")
        return int(found)

    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head", "num_heads")
    layers, vocabulary = size("num_hidden_layers", "n_layer", "num_layers"), size("vocab_size")
    intermediate = size("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    kv_heads, head_dim = size("num_key_value_heads", default=heads), size("head_dim", default=hidden // heads)
    tied = bool(raw.get("tie_word_embeddings", False))
    kind = str(raw.get("model_type", ""))
    own = gated(
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        vocabulary,
        tied,
        bias=kind.startswith("qwen2"),
        head_dim=head_dim,
        head_norms=kind.startswith("qwen3"),
    )
    count = parameters or own.parameters
    return ModelShape(count, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary)


def _nearest(name: str) -> str:
    """A known model whose size the name says, else the first."""
    sizes = {known.rsplit("-", 1)[-1].upper(): known for known in KNOWN}
    return next((known for size, known in sizes.items() if f"-{size}" in name.upper()), next(iter(KNOWN)))
