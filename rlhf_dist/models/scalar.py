"""A decoder with one number per position: reward models and critics. Load, check, run on packed rows, save."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf_dist.algo.logprobs import chunked_logprobs
from rlhf_dist.errors import ModelError
from rlhf_dist.models.attention import SEGMENTED
from rlhf_dist.models.by_parameter import Scatter
from rlhf_dist.models.capabilities import ROLLOUT_TOKENS, check_attention, check_layers, check_positions
from rlhf_dist.models.fit import check_fit
from rlhf_dist.models.hf import (
    Companions,
    collect,
    load_config,
    load_model,
    load_tokenizer,
    load_weights,
    new_model_directory,
    read_companions,
    refuse_missing,
)
from rlhf_dist.models.model_files import reason_of
from rlhf_dist.models.packed import PackedModel
from rlhf_dist.models.packed_policy import logit_shape
from rlhf_dist.models.score_scale import NO_SCALE, ScoreScale, parse_scale
from rlhf_dist.models.text_format import end_tokens

SCALE_KEY = "rlhf_dist"
HEAD = "score"
HEAD_WEIGHT = f"{HEAD}.weight"
SUPPORTED = "a decoder whose classification head is a linear layer `score` works: Qwen, Llama, Mistral, GPT-2"


class PackedScalar(PackedModel):
    """Wraps a sequence classification model with one label (loaded by `load_scalar`); its parameters are `model.*`."""

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Tensor:
        """The number at each of `positions` (int64 [M], in the packed row), raw, float32 [M]; the rest as `hidden`."""
        return self._scalars(self.hidden(tokens, cu_seqlens), positions)

    def _scalars(self, hidden: Tensor, positions: Tensor) -> Tensor:
        head: nn.Module = self.model.get_submodule(HEAD)
        starts = self.sequence.starts(len(hidden), positions)
        return self.sequence.whole(head(self.sequence.read(hidden, positions, starts))[:, 0].float(), starts)


class PackedScalarWithLM(PackedScalar):
    """The same with a language-model head `lm_head` beside it on the same trunk, to be trained along."""

    def __init__(self, model: PreTrainedModel, lm_head: nn.Linear, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, gradient_checkpointing)
        self.lm_head = lm_head

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor,
        predict: Tensor,
        targets: Tensor,
        chunk: int,
        least_chunks: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """(numbers float32 [M], logprobs float32 [N] of `targets` read at `predict`); as in PackedPolicy.forward."""
        hidden = self.hidden(tokens, cu_seqlens)
        starts = self.sequence.starts(len(hidden), predict)
        read, own = self.sequence.read(hidden, predict, starts), self.sequence.own(targets, starts)
        logprobs, _ = chunked_logprobs(read, self.lm_head, own, 1.0, chunk, "none", least_chunks=least_chunks)
        return self._scalars(hidden, positions), self.sequence.whole(logprobs, starts)


def inspect_scalar(path: str | Path, max_tokens: int, keys: str = ROLLOUT_TOKENS, attention: str = SEGMENTED) -> None:
    """Refuse what `load_scalar` or packed rows could not use, before anything is started; no weights are read.

    `max_tokens` is the longest sequence, `keys` the config keys that say so. Raises ModelError: no config or tokenizer,
    damaged or missing weights, weights that are not the config's, more than one label, no `score` head, too few
    positions, layers that packed rows do not work with.
    """
    config = _scalar_config(path)
    shell = _shell(config, torch.float32, path)
    if Path(path).is_dir():
        # A language model has no score yet: its weights have to be those of a language model.
        check_fit(
            Path(path), config, AutoModelForSequenceClassification if _is_classifier(config) else AutoModelForCausalLM
        )
    check_attention(path, shell)
    check_positions(path, config, max_tokens, keys)
    check_layers(path, config, max_tokens, keys, attention)
    read_scale(path)
    if load_tokenizer(path).eos_token_id is None:
        raise ModelError(f"{path}: its tokenizer has no end token; set eos_token in tokenizer_config.json")


def load_scalar(path: str | Path, dtype: str, attention: str, scatter: Scatter | None = None) -> PreTrainedModel:
    """A sequence classification model with one label, weights on the CPU, in evaluation mode.

    `path`: such a model, or a causal LM, which gets a new head `score` of zeros. `dtype` is `float32` or `bfloat16`,
    `attention` what `choose_attention` gave, `scatter` as in `load_model`. Raises ModelError when it is neither, has
    more than one label, has only pickled weights, or lacks some of them.
    """
    config = _scalar_config(path)
    _shell(config, torch.float32, path)
    model, missing = load_weights(AutoModelForSequenceClassification, path, config, dtype, attention, scatter)
    if not _is_classifier(config) and missing == {HEAD_WEIGHT}:
        torch.nn.init.zeros_(model.get_submodule(HEAD).get_parameter("weight"))
        missing = set()
    refuse_missing(path, missing)
    return model


def require_lm_head(path: str | Path) -> None:
    """Refuse a start without a language-model head. Reads its config only. Raises ModelError."""
    if _is_classifier(load_config(path)):
        raise ModelError(
            f"{path}: is a reward model, without the language-model head that reward.lm_coef needs; set "
            "reward.lm_coef=0, or start from a causal language model"
        )


def load_lm_head(path: str | Path, dtype: str) -> nn.Linear:
    """A copy of a causal LM's output embeddings. Raises ModelError when `path` has none, or none that is linear."""
    require_lm_head(path)
    model = load_model(path, dtype, SEGMENTED)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or logit_shape(model.config) != (1.0, None):
        raise ModelError(f"{path}: its language-model head is no plain linear layer; set reward.lm_coef=0")
    return linear(head.state_dict())


def linear(state: dict[str, Tensor]) -> nn.Linear:
    """A linear layer that holds copies of the tensors `weight` and, if there is one, `bias`."""
    weight = state["weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in state, dtype=weight.dtype)
    layer.load_state_dict(state)
    return layer


def read_scale(path: str | Path) -> ScoreScale:
    """The normalisation stored with a reward model; mean 0 and deviation 1 where there is none.

    Raises ModelError when what is stored cannot be one.
    """
    stored: Any = getattr(load_config(path), SCALE_KEY, None)
    if stored is None:
        return NO_SCALE
    scale = parse_scale(stored)
    if scale is None:
        raise ModelError(
            f"{path}/config.json: {SCALE_KEY} is {stored}; it must hold score_mean, a number, and score_std, a number "
            "above 0, or be taken out"
        )
    return scale


def save_scalar(
    weights: PreTrainedModel | Iterator[tuple[str, Tensor]],
    source: str | Path | Companions,
    target: Path,
    scale: ScoreScale | None,
) -> Path:
    """Write a Hugging Face directory for AutoModelForSequenceClassification at `target`, as `save_hf` does.

    `scale`: stored in config.json; None keeps what `source` has. Where padding and end are one token the config names
    no padding: transformers would look for the last token that is not padding and read the score before the end.
    Raises DiskError, ModelError.
    """
    state = collect(weights)
    beside = source if isinstance(source, Companions) else read_companions(source)
    config = _with_one_label(deepcopy(beside.config), beside.source)
    if scale is not None:
        setattr(config, SCALE_KEY, scale.stored())
    shell = _shell(config, next(iter(state.values())).dtype, beside.source)
    text = shell.config.get_text_config()
    if text.pad_token_id in end_tokens(beside.tokenizer):
        text.pad_token_id = None
    with new_model_directory(shell, state, beside.tokenizer, target):
        pass
    return target


@torch.no_grad()
def check_scalar(scalar: PackedScalar) -> None:
    """Compare the packed scores of two short sequences with the model's own, each alone.

    Finds models whose score is more than a linear map of the last hidden state and models whose layers let sequences
    of a packed row see each other. Where the head is new, all zero, the trunk's last states are compared instead.
    Collective under ZeRO-3: every rank calls it. Raises ModelError when they differ.
    """
    model = scalar.model
    config = model.config.get_text_config()
    device = next(scalar.parameters()).device
    lengths = (7, 12)
    tokens = torch.arange(1, sum(lengths) + 1, device=device) * 7919 % config.vocab_size
    if config.pad_token_id is not None:  # transformers takes it for no part of the sequence
        tokens = torch.where(tokens == config.pad_token_id, (config.pad_token_id + 1) % config.vocab_size, tokens)
    boundaries = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    last = (boundaries[1:] - 1).long()
    hidden = scalar.hidden(tokens, boundaries).index_select(0, last)
    packed = torch.cat([hidden, scalar._scalars(hidden, torch.arange(2, device=device))[:, None]], dim=1).float()
    rows = [row[None] for row in tokens.split(lengths)]
    trunk: Any = model.base_model
    states = torch.cat([trunk(input_ids=row, use_cache=False).last_hidden_state[:, -1] for row in rows])
    scores = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows])
    alone = torch.cat([states, scores], dim=1).float()
    difference = float((packed - alone).abs().max())
    limit = (1e-3 if model.dtype == torch.float32 else 5e-2) * max(1.0, float(alone.abs().max()))
    if not difference <= limit:
        raise ModelError(
            f"{config.name_or_path or type(model).__name__} ({config.model_type}): scores of packed sequences differ "
            f"from the model's own by {difference:.2g} (limit {limit:.2g}). Models whose layers are not plain "
            "attention are not supported; use one such as Qwen, Llama or Mistral"
        )


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _scalar_config(path: str | Path) -> Any:
    """The config, with one label. Raises ModelError for a classifier of more."""
    return _with_one_label(load_config(path), path)


def _with_one_label(config: Any, path: str | Path) -> Any:
    if _is_classifier(config):
        if config.num_labels != 1:
            raise ModelError(f"{path}: has {config.num_labels} labels; a reward model has exactly 1: its score")
        return config
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ()):
        raise ModelError(
            f"{path}: is {' or '.join(config.architectures or ['of no named architecture'])}; neither a reward model "
            f"(sequence classification with one label) nor a causal language model to start one from; {SUPPORTED}"
        )
    config.num_labels = 1
    return config


def _shell(config: Any, dtype: torch.dtype, path: str | Path) -> PreTrainedModel:
    """The model without weights. Raises ModelError when its head is not a linear layer `score`."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"{path} ({config.model_type}): transformers has no sequence classification model of this kind; {SUPPORTED}"
        )
    try:
        with torch.device("meta"):
            shell: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    except Exception as error:
        # Here only transformers runs, and what it raises on a config that it cannot use has no common type.
        raise ModelError(
            f"{path} ({config.model_type}): transformers cannot make a sequence classification model of it: "
            f"{reason_of(error)} ({SUPPORTED})"
        ) from error
    if not isinstance(getattr(shell, HEAD, None), nn.Linear):
        raise ModelError(f"{path} ({config.model_type}): cannot give one score per position; {SUPPORTED}")
    return shell
