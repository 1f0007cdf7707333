"""A causal LM that takes packed rows and gives log-probabilities instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_dist.algo.action_mask import ActionMask
from rlhf_dist.algo.logprobs import Entropy, chunked_logprobs
from rlhf_dist.errors import ModelError
from rlhf_dist.models.packed import PackedModel


class PackedPolicy(PackedModel):
    """Wraps a Hugging Face causal LM (loaded by `rlhf_dist.models.hf.load_model`); its parameters are `model.*`."""

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, gradient_checkpointing)
        self.scale, self.softcap = logit_shape(model.config)

    def forward(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        predict: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        entropy: Entropy = "value",
        mask: ActionMask | None = None,
        least_chunks: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of `targets` and the entropies of the distributions they are from.

        tokens int64 [T], the sequences one after another; cu_seqlens int32 [S + 1], their boundaries (0 first, T
        last, none empty); predict int64 [M], positions in the row whose next token is asked for; targets int64 [M],
        those next tokens. temperature divides the logits; chunk: positions whose logits are held at once.
        entropy: whether it is computed, and whether it carries a gradient; mask: what may be drawn at the M positions;
        least_chunks: see `chunked_logprobs`. Returns (logprobs float32 [M], entropy float32 [M] or None), nats.
        """
        hidden, starts = self.hidden_at(tokens, cu_seqlens, predict)
        own = self.sequence.own(targets, starts)
        logprobs, entropies = chunked_logprobs(
            hidden, self.output_head(), own, temperature, chunk, entropy, mask, least_chunks
        )
        whole = self.sequence.whole
        return whole(logprobs, starts), None if entropies is None else whole(entropies, starts)

    @torch.no_grad()
    def action_mask(
        self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, predict: torch.Tensor, top_p: float
    ) -> ActionMask:
        """What this policy lets another draw at positions `predict` of the packed row; shapes as in `forward`."""
        return ActionMask(self.hidden(tokens, cu_seqlens).index_select(0, predict), self.output_head(), top_p)

    def output_head(self) -> torch.nn.Module:
        """Hidden states -> logits."""
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal LM has output embeddings"
        plain = self.scale == 1.0 and self.softcap is None
        return head if plain else _ShapedHead(head, self.scale, self.softcap)


def logit_shape(config: Any) -> tuple[float, float | None]:
    """(scale, cap) of a kind of model: logits = cap x tanh(scale x head / cap), or scale x head without a cap.

    Cohere multiplies by logit_scale, HyperCLOVA X by logits_scaling; Granite and MiniCPM3 divide by logits_scaling.
    Gemma 2 caps (arXiv:2408.00118). `check_head` finds the kinds that do something else.
    """
    text = config.get_text_config()
    scale, divisor = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    if isinstance(divisor, int | float):
        scale = divisor if text.model_type == "hyperclovax" else 1.0 / divisor
    cap: float | None = getattr(text, "final_logit_softcapping", None)
    return (float(scale) if isinstance(scale, int | float) else 1.0), cap


class _ShapedHead(torch.nn.Module):
    """A head whose logits are scaled, then capped. Made per call: it must not own the head twice."""

    def __init__(self, head: torch.nn.Module, scale: float, cap: float | None) -> None:
        super().__init__()
        self.head = head
        self.scale = scale
        self.cap = cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.scale * self.head(hidden)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@torch.no_grad()
def check_head(policy: PackedPolicy) -> None:
    """Compare the packed log-probabilities of two short sequences with the model's own, each alone.

    Finds models whose logits are more than `logit_shape` of the output embedding of the last hidden state, and models
    whose layers let sequences of a packed row see each other (state spaces, linear attention). Collective under
    ZeRO-3: every rank calls it.

    Raises ModelError when they differ.
    """
    model = policy.model
    config = model.config.get_text_config()
    device = next(policy.parameters()).device
    lengths = (7, 12)
    tokens = torch.arange(1, sum(lengths) + 1, device=device) * 7919 % config.vocab_size
    boundaries = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=device)
    predict = torch.tensor([i for i in range(sum(lengths) - 1) if i != lengths[0] - 1], device=device)
    targets = tokens[predict + 1]
    packed, _ = policy(tokens, boundaries, predict, targets, 1.0, len(predict), "none")
    logits = [model(input_ids=row[None], use_cache=False).logits[0, :-1].float() for row in tokens.split(lengths)]
    alone = torch.cat(logits).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    difference = float((packed - alone).abs().max())
    largest = max(1.0, float(torch.cat(logits).abs().max()))
    limit = 1e-3 if model.dtype == torch.float32 else 2e-2 * largest
    if not difference <= limit:
        raise ModelError(
            f"{config.name_or_path or type(model).__name__} ({config.model_type}): log-probabilities of packed "
            f"sequences differ from the model's own by {difference:.2g} (limit {limit:.2g}). The model does something "
            "of its own to its logits, or its layers are not plain attention; use one such as Qwen, Llama or Mistral"
        )
