"""A causal LM that takes packed rows and gives log-probabilities instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_dist.algo.logprobs import chunked_logprobs
from rlhf_dist.errors import ModelError


class PackedPolicy(torch.nn.Module):
    """Wraps a Hugging Face causal LM (loaded by `rlhf_dist.models.hf.load_model`); its parameters are `model.*`.

    Weights are only ever used by calling the modules that own them, so ZeRO-3 can gather them. Dropout is turned off
    for good: the engine that samples has none, and with it the two would disagree on every log-probability.
    """

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            # Many models keep theirs as plain numbers: attention_dropout, dropout, layerdrop, router_jitter_noise.
            for name, value in vars(module).items():
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(module, name, 0.0)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers checkpoints in training mode only, and loads models in the other; without dropout they are alike.
        model.train()

    def hidden(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Last hidden states [T, hidden] of a packed row; arguments as in `forward`."""
        lengths = cu_seqlens.diff()
        starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=tokens.shape[0])
        positions = torch.arange(tokens.shape[0], device=tokens.device) - starts
        longest = int(lengths.max())
        output: Any = self.model.base_model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        return output.last_hidden_state[0]

    def forward(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        predict: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of `targets` and the entropies of the distributions they are from.

        tokens int64 [T], the sequences one after another; cu_seqlens int32 [S + 1], their boundaries (0 first, T
        last, none empty); predict int64 [M], positions in the row whose next token is asked for; targets int64 [M],
        those next tokens. temperature divides the logits; chunk: positions whose logits are held at once.
        Returns (logprobs float32 [M], entropy float32 [M]), in nats.
        """
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal LM has output embeddings"
        hidden = self.hidden(tokens, cu_seqlens).index_select(0, predict)
        if self.softcap is not None:
            head = _CappedHead(head, self.softcap)
        return chunked_logprobs(hidden, head, targets, temperature, chunk)


class _CappedHead(torch.nn.Module):
    """logits -> cap x tanh(logits / cap) (Gemma 2, arXiv:2408.00118). Made per call: it must not own the head twice."""

    def __init__(self, head: torch.nn.Module, cap: float) -> None:
        super().__init__()
        self.head = head
        self.cap = cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.cap * torch.tanh(self.head(hidden) / self.cap)


@torch.no_grad()
def check_head(policy: PackedPolicy) -> None:
    """Compare the packed log-probabilities of two short sequences with the model's own, each alone.

    Finds models whose logits are more than the output embedding of the last hidden state (scaled logits) and models
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
    packed, _ = policy(tokens, boundaries, predict, targets, 1.0, len(predict))
    logits = [model(input_ids=row[None], use_cache=False).logits[0, :-1].float() for row in tokens.split(lengths)]
    alone = torch.cat(logits).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    difference = float((packed - alone).abs().max())
    largest = max(1.0, float(torch.cat(logits).abs().max()))
    limit = 1e-3 if model.dtype == torch.float32 else 2e-2 * largest
    if not difference <= limit:
        raise ModelError(
            f"{config.name_or_path or type(model).__name__} ({config.model_type}): log-probabilities of packed "
            f"sequences differ from the model's own by {difference:.2g} (limit {limit:.2g}). Models that scale their "
            "logits or whose layers are not plain attention are not supported; use one such as Qwen, Llama or Mistral"
        )
