"""A reward model as a reward: scores of packed rows, read at the last token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.schema import ModelConfig, RewardSpec, ScoringConfig
from rlhf_dist.data.render import render, tokenize_response
from rlhf_dist.errors import ModelError, RewardError
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.capabilities import positions
from rlhf_dist.models.hf import load_tokenizer, resolve
from rlhf_dist.models.model_config import load_config
from rlhf_dist.models.scalar import NO_SCALE, PackedScalar, check_scalar, inspect_scalar, load_scalar, read_scale
from rlhf_dist.models.text_format import check_format
from rlhf_dist.scoring.batching import TokenBatcher
from rlhf_dist.scoring.packed_rows import boundaries, laid, passes
from rlhf_dist.scoring.texts import Texts, texts_of
from rlhf_dist.scoring.time_limits import SHARE_OF_LIMIT
from rlhf_dist.types import Group, Message

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSetting:
    """What a reward model has to know of the run it scores for."""

    policy: str
    """Hugging Face directory or hub name of the policy; empty where there is none: everything goes through text."""
    max_tokens: int
    """Longest prompt plus response of the policy; 0 without one."""
    chat: bool
    """`data.chat`."""
    model: ModelConfig
    """Its dtype and attention are the reward model's too."""
    device: str
    """`cpu` or `cuda`."""
    cache: Path
    """Where `resolve` may make models."""
    system: str = ""
    """`data.system`; empty where conversations come from elsewhere."""


@dataclass(frozen=True, slots=True)
class RewardSource:
    """A reward model that was found and passed every check but the loading of its weights."""

    path: str
    """Absolute Hugging Face directory, or hub name."""
    tokenizer: PreTrainedTokenizerBase
    """Its own."""
    through_text: bool
    """Whether responses are tokenised anew, with its own tokenizer and template."""


def reward_source(name: str, spec: RewardSpec, setting: ModelSetting) -> RewardSource:
    """Find and check the model of a reward of kind model; reads no weights.

    Raises ModelError: not there, no reward model, no end token, or another tokenizer than the policy's and no chat
    template of its own.
    """
    key = f"scoring.rewards.{name}.path"
    found = resolve(replace(setting.model, path=spec.path), setting.cache, key).path
    path = str(Path(found).absolute()) if Path(found).exists() else found
    config = load_config(path)
    architectures = config.architectures or ()
    if not any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        raise ModelError(
            f"{key} = {spec.path}: is {' or '.join(architectures) or 'a model of no named architecture'}, not a reward "
            "model (sequence classification with one label); train one with `rlhf-dist reward`"
        )
    own, rows = load_tokenizer(path), config.get_text_config().vocab_size
    if len(own) > rows:
        raise ModelError(f"{key} = {spec.path}: its tokenizer has {len(own)} tokens, its model embeds only {rows}")
    difference = differs(own, load_tokenizer(setting.policy), setting.chat) if setting.policy else ""
    through_text = not setting.policy or difference != ""
    attention = choose_attention(setting.model.attention, setting.device, setting.model.dtype)
    # Another tokenizer makes other lengths: those are checked response by response.
    inspect_scalar(path, 0 if through_text else setting.max_tokens, attention=attention)
    if through_text and setting.chat and not own.chat_template:
        reason = f"its {difference} is not that of {setting.policy}" if difference else "it is to read text"
        raise ModelError(
            f"{key} = {spec.path}: {reason}, and its tokenizer has no chat template to write a conversation with; "
            "add chat_template.jinja to the directory, or set data.chat=false"
        )
    if through_text:
        try:
            check_format(own, setting.chat, setting.system)
        except ModelError as error:
            raise ModelError(f"{key}: {error}") from error
    return RewardSource(path, own, through_text)


def differs(own: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase, chat: bool) -> str:
    """In what two tokenizers differ so that tokens of one mean something else to the other; empty: in nothing."""
    if own.get_vocab() != policy.get_vocab():
        return "vocabulary"
    if (own.eos_token_id, own.bos_token_id) != (policy.eos_token_id, policy.bos_token_id):
        return "end or start token"
    if chat and own.chat_template != policy.chat_template:
        return "chat template"
    return ""


class RewardModel:
    """A sequence classification model with one label; groups that wait are put into one pass."""

    def __init__(self, name: str, spec: RewardSpec, scoring: ScoringConfig, setting: ModelSetting) -> None:
        """Load the model that `spec.path` names. Raises ModelError, see `reward_source`."""
        source = reward_source(name, spec, setting)
        self._label = f"the reward model {name} ({source.path})"
        self._timeout_s = SHARE_OF_LIMIT * scoring.timeout_s
        self._budget = scoring.batch_tokens
        self._chat = setting.chat
        self._tokenizer, self._through_text = source.tokenizer, source.through_text
        attention = choose_attention(setting.model.attention, setting.device, setting.model.dtype)
        model = load_scalar(source.path, setting.model.dtype, attention)
        self._scalar = PackedScalar(model.to(setting.device))  # pyright: ignore[reportArgumentType]
        self._device = torch.device(setting.device)
        check_scalar(self._scalar)
        scale = read_scale(source.path)
        for doubt in scale.doubts():
            LOG.warning(f"{self._label}: {doubt}")
        self._scale = scale if spec.normalize else NO_SCALE
        text = model.config.get_text_config()
        self._vocabulary: int = text.vocab_size
        limit = positions(model.config)
        self._positions = None if limit is None else limit[0]
        self._batcher: TokenBatcher[list[np.ndarray], np.ndarray] = TokenBatcher(
            self._scores, self._budget, self._label
        )

    def score(self, group: Group) -> np.ndarray:
        """float32 [n]; a response that was cut is scored as it is; NaN where the model gives it. May be called from
        several threads.

        Raises RewardError (too long for the model), ActorTimeout.
        """
        # A policy may have more rows than its tokenizer has tokens; such an id has no row here, and no text either.
        rows = [sample.tokens for sample in group.trajectories]
        known = max(int(row.max()) for row in rows) < self._vocabulary
        return self.score_texts(texts_of(group)) if self._through_text or not known else self._submit(rows)

    def score_texts(self, texts: Texts) -> np.ndarray:
        """float32 [n]; each response behind its conversation, with the end token if it ended. Raises as `score`."""
        return self._submit(
            [
                self._row(conversation, response, ended)
                for conversation, response, ended in zip(texts.conversations, texts.responses, texts.ended, strict=True)
            ]
        )

    def close(self) -> None:
        """End the thread that scores."""
        self._batcher.close()

    def _row(self, conversation: Sequence[Message], response: str, ended: bool) -> np.ndarray:
        prompt = render(self._tokenizer, conversation, self._chat)
        return np.array([*prompt, *tokenize_response(self._tokenizer, response, self._chat, ended)], np.int32)

    def _submit(self, rows: list[np.ndarray]) -> np.ndarray:
        for i, row in enumerate(rows):
            if len(row) == 0:
                raise RewardError(f"{self._label}: its tokenizer knows no character of prompt and response {i}")
            if self._positions is not None and len(row) > self._positions:
                raise RewardError(
                    f"{self._label} has {self._positions} positions, and response {i} with its prompt takes "
                    f"{len(row)} of its tokens; lower rollout.max_prompt_tokens or rollout.max_response_tokens"
                )
        return self._batcher.submit(rows, sum(map(len, rows)), self._timeout_s) if rows else np.zeros(0, np.float32)

    @torch.inference_mode()
    def _scores(self, groups: list[list[np.ndarray]]) -> list[np.ndarray]:
        """Each group's scores, all in as few passes as the budget allows."""
        rows = [row for group in groups for row in group]
        raw = np.zeros(len(rows), np.float64)
        for chosen in passes(rows, self._budget):
            tokens, cu_seqlens = laid([rows[i] for i in chosen], self._device)
            raw[chosen] = self._scalar(tokens, cu_seqlens, cu_seqlens[1:].long() - 1).cpu().numpy()
        scores = ((raw - self._scale.score_mean) / self._scale.divisor).astype(np.float32)
        return np.split(scores, boundaries(groups)[1:-1])
