"""The vLLM engine of one rollout worker; with `weight_receiver.py` the only importer of vllm.

The engine's core runs in this process (no EngineCore process), so that weights can be changed between two decoding
steps and every call is a plain Python call. vllm is imported inside `VllmEngine`, after its environment is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_dist.config.schema import RolloutConfig
from rlhf_dist.models.text_format import text_format
from rlhf_dist.rollout.masked_sampling import MaskReader, MaskStart, Reading
from rlhf_dist.rollout.shared_names import forget_names
from rlhf_dist.rollout.trajectories import Response, Turn
from rlhf_dist.rollout.weight_receiver import RECEIVER, EngineWeights
from rlhf_dist.rollout.worker import Usage
from rlhf_dist.types import UNFINISHED, Receipt, Sampling
from rlhf_dist.weights.receipts import Announcement

HALF_CHARACTER = "\ufffd"
"""What a tokenizer makes of tokens that end in the middle of a character."""
WEIGHTS, CACHE = SLEEP_TAGS = ("weights", "kv_cache")
"""vLLM's names for what an engine gives back when it sleeps, in the order in which it takes them again."""
MASKED = "masked"
"""In a request's extra arguments: its tokens are drawn under the mask."""


def set_environment(config: RolloutConfig, device: str, threads: int, masked: bool) -> None:
    """Settings that vLLM and OpenMP read once, at import."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_DO_NOT_TRACK"] = "1"
    # Colour codes and the banner do not belong into a log file.
    os.environ["VLLM_LOGGING_COLOR"] = "0"
    if masked:
        # The second runner, vLLM's choice on a GPU, has another interface for processors of logits.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if config.tensor_parallel > 1:
        # A fork of a process that has threads may wait for ever for a lock that one of them held.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        os.environ["VLLM_HOST_IP"] = "127.0.0.1"  # its processes are on one node
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // config.tensor_parallel))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Which sequences are split among threads depends on what else is decoded, and a split one rounds differently.
        os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, and stronger than what `VllmEngine` asks for
        if config.enforce_eager:
            # vLLM compiles a few of its small functions even so, which takes longer than to start the engine.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"


def memory_of(config: RolloutConfig, device: str, sleeps: bool) -> dict[str, Any]:
    """vLLM's settings for the memory that it takes."""
    if device == "cpu":
        return {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30 / config.tensor_parallel)}
    return {"gpu_memory_utilization": config.gpu_memory_utilization, "enable_sleep_mode": sleeps}


def processes_of(config: RolloutConfig) -> dict[str, Any]:
    """vLLM's settings for the processes that compute."""
    # Inside a Ray actor vLLM would by itself ask Ray for more GPUs than the actor was given.
    backend = "mp" if config.tensor_parallel > 1 else "uni"
    return {"tensor_parallel_size": config.tensor_parallel, "distributed_executor_backend": backend}


def can_exchange(config: RolloutConfig, device: str) -> bool:
    """Whether a version can be prepared beside the engine's steps, to be exchanged for the one in use.

    Compiled steps and those on a GPU hold on to the memory that the weights lie in. Several processes take orders from
    one thread only.
    """
    return device == "cpu" and config.enforce_eager and config.tensor_parallel == 1


class VllmEngine:
    """Continuous batching of responses, with weights that can be replaced between two steps."""

    def __init__(
        self,
        model: Path,
        config: RolloutConfig,
        *,
        dtype: str,
        device: str,
        threads: int,
        name: str,
        chat: bool,
        special_texts: bool = False,
        mask: MaskStart | None = None,
        sleeps: bool = False,
    ) -> None:
        """Start the engine: about 12 s on a CPU. `model` is a Hugging Face directory; `mask`: what may be drawn.

        `chat` is `data.chat`: then a response ends at the chat template's end of turn, too. `special_texts`: whether
        responses have a `special_text`. `sleeps`: whether it shares its GPU with a learner rank.
        """
        set_environment(config, device, threads, masked=mask is not None)
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model),
                dtype=dtype,  # pyright: ignore[reportArgumentType]
                max_model_len=config.max_prompt_tokens + config.max_response_tokens,
                max_num_seqs=config.max_concurrent,
                enforce_eager=config.enforce_eager,
                enable_prefix_caching=True,
                # On a CPU a request with a seed fails where its prefill is cut: torch's generator there cannot go back.
                enable_chunked_prefill=False if device == "cpu" else None,
                # Log-probabilities of the distribution that was drawn from: temperature and cuts included.
                logprobs_mode="processed_logprobs",
                logits_processors=None if mask is None else [mask_processor()],
                # One step at a time: no batch is in flight when weights are loaded, so a token has the version of the
                # weights that it was sampled with; and a mask sees the newest token before the next is scheduled.
                async_scheduling=False,
                worker_extension_cls=RECEIVER,
                trust_remote_code=False,
                disable_log_stats=True,
                **processes_of(config) | memory_of(config, device, sleeps),
            )
        )
        if config.tensor_parallel > 1:
            forget_names()
        if mask is not None:
            self._engine.collective_rpc("start_mask", args=(mask,))
        self._turns: dict[str, Turn] = {}
        self.kv_after_push = config.kv_after_push
        self._can_exchange = can_exchange(config, device)
        self._asleep = set[str]()  # what has no memory until it is needed
        self._loads = 0
        self._salt = ""  # of new requests: vLLM lets them share cached keys and values with those of the same salt only
        self._weights = EngineWeights(name, self._engine, self._renew_caches)
        self.tokenizer: Any = self._engine.get_tokenizer()
        self._special_texts = special_texts
        # vLLM by itself stops at the tokenizer's end token and at those of generation_config.json.
        self._stops = text_format(self.tokenizer, chat).stops

    def submit(self, turn: Turn) -> None:
        """See `worker.Engine`. vLLM's own n is not used: it draws all samples from seeds in a row, and keeps their
        responses back until the last has ended."""
        self._weights.require_clean()
        self._wake(*SLEEP_TAGS)
        self._begin(turn)

    def step(self) -> list[Response]:
        """See `worker.Engine`."""
        self._weights.require_clean()
        ended = [output for output in self._engine.step() if output.finished]
        found = [self._response(output) for output in ended]
        for response in found:
            del self._turns[response.key]
        return found

    def usage(self) -> Usage:
        """See `worker.Engine`; from vLLM's scheduler, whose own statistics cost time in every step."""
        core: Any = self._engine.engine_core
        scheduler = core.engine_core.scheduler
        return Usage(len(scheduler.running), scheduler.kv_cache_manager.usage)

    def abort(self, keys: Iterable[str]) -> None:
        """See `worker.Engine`."""
        ended = [key for key in keys if self._turns.pop(key, None) is not None]
        if ended:
            self._engine.abort_request(ended)

    def interrupt(self, keys: Sequence[str]) -> list[Response]:
        """See `worker.Engine`. vLLM's own abort tells nothing of what was sampled."""
        found = self.so_far(keys)
        self.abort(keys)
        return found

    def so_far(self, keys: Sequence[str]) -> list[Response]:
        """See `worker.Engine`. What vLLM makes of an ending request does not end it."""
        from vllm.v1.engine import FinishReason

        outputs = [self._state(key).make_request_output([], None, FinishReason.ABORT, None) for key in keys]
        return [replace(self._response(output, ended=False), finish_reason=UNFINISHED) for output in outputs]

    def sampled(self, key: str) -> int:
        """Tokens so far of a response that is under way; what it begins with does not count."""
        return self._state(key).detokenizer.num_output_tokens()

    def sleep(self) -> None:
        """See `worker.Engine`. Weights go to the host's memory, cached keys and values are gone. Only a GPU has this;
        on a CPU vLLM notes that it was asked."""
        self._weights.require_clean()
        self._engine.sleep(level=1)
        self._asleep = set(SLEEP_TAGS)

    def _wake(self, *tags: str) -> None:
        """Take memory for these again, each once."""
        for tag in tags:
            if tag in self._asleep:
                self._engine.wake_up([tag])
                self._asleep.discard(tag)

    def prepare_weights(self, announcement: Announcement) -> None:
        """See `worker.Engine`. With `recompute` nothing is prepared: computing keys and values again takes longer
        than a load, and spare weights take as much memory as the weights."""
        if self._can_exchange and self.kv_after_push == "keep":
            # In a thread that ends: OpenMP would keep helpers for one that stays, and let the engine's spin no more.
            # Like a plain call: whoever asked for the load has the limit.
            with ThreadPoolExecutor(1, "prepare") as once:
                once.submit(self._weights.prepare, announcement).result()

    def load_weights(self, announcement: Announcement) -> Receipt:
        """Load a published version into every process of the engine, and say what it holds."""
        self._wake(WEIGHTS)  # not the cache yet: the learner may still hold its memory
        return self._weights.load(announcement)

    def _state(self, key: str) -> Any:
        """vLLM's own of a response that is under way."""
        processor: Any = self._engine.output_processor
        (request,) = processor.external_req_ids[key]
        return processor.request_states[request]

    def _begin(self, turn: Turn) -> None:
        begun = turn.begun.tokens if turn.begun is not None else ()
        sampling = replace(turn.sampling, max_tokens=turn.sampling.max_tokens - len(begun))
        prompt: Any = {"prompt_token_ids": [*turn.context, *begun]}
        if self._salt:
            prompt["cache_salt"] = self._salt
        self._engine.add_request(turn.key, prompt, sampling_params(sampling, turn.seed, self._stops))
        self._turns[turn.key] = turn
        if begun and sampling.stop:
            # vLLM looks for stop texts in what it samples itself, and one may have begun before.
            before = max(map(len, sampling.stop)) - 1
            text = text_of(self.tokenizer, begun, special=False).rstrip(HALF_CHARACTER)
            self._state(turn.key).detokenizer.output_text = text[-before:] if before else ""

    def _renew_caches(self) -> str:
        """See `EngineWeights`."""
        return self._compute_again() if self.kv_after_push == "recompute" else self._begin_again()

    def _compute_again(self) -> str:
        """Requests that run are prefilled again; without them vLLM would forget nothing while there are any."""
        why = ""
        try:
            if self._engine.reset_prefix_cache(reset_running_requests=True):
                return ""
        except RuntimeError as error:  # what vLLM raises where it cannot take its running requests back
            why = f" ({error})"
        what = f"vLLM did not give up the keys and values of the old weights{why}"
        return f"{what}; with rollout.kv_after_push keep it would not have to"

    def _begin_again(self) -> str:
        """What is cached stays with the requests that it belongs to.

        No other request may read it, so new ones get another salt, and those without a token begin again with that. The
        version would not do: after a loss of the learner the same number may come again with other weights.
        """
        self._loads += 1
        self._salt = str(self._loads)
        waiting = [turn for turn in self._turns.values() if not self.sampled(turn.key)]
        try:
            self.abort([turn.key for turn in waiting])
            for turn in waiting:
                self._begin(turn)
        except Exception as error:  # whatever vLLM raises, some of them are not under way any more
            what = f"vLLM did not take requests without a token again ({type(error).__name__}: {error})"
            return f"{what}; with rollout.kv_after_push recompute it would not have to"
        return ""

    def _response(self, output: Any, ended: bool = True) -> Response:
        """With what it begins with. Without its text while it has not `ended`: who goes on with it makes the whole."""
        turn, (sample,) = self._turns[output.request_id], output.outputs
        versions = np.full(len(sample.token_ids), self._weights.version, dtype=np.int32)
        for span in sample.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        # What is kept was made when the first token was sampled, or later; else all was made again at the last push.
        oldest = versions.copy()
        if self.kv_after_push == "keep":
            oldest[:] = versions[:1]
        logprobs, begun = sampled_logprobs(sample), turn.begun
        if begun is not None:
            sample = replace(sample, token_ids=[*begun.tokens, *sample.token_ids])
            logprobs = np.concatenate([begun.logprobs, logprobs])
            versions = np.concatenate([begun.versions, versions])
            oldest = np.concatenate([begun.cache_versions, oldest])
        known = begun is None and turn.sampling.stop  # vLLM has made the text
        special = decoded(self.tokenizer, sample, special=True) if ended and self._special_texts else ""
        return Response(
            key=turn.key,
            tokens=sample.token_ids,
            logprobs=logprobs,
            versions=versions,
            cache_versions=oldest,
            finish_reason=str(sample.finish_reason),
            text=sample.text if known else decoded(self.tokenizer, sample, special=False) if ended else "",
            special_text=special if self._special_texts else None,
        )


def decoded(tokenizer: Any, sample: Any, special: bool) -> str:
    """The text of one of vLLM's samples without the token or the stop text that ended it.

    `special`: with the special tokens inside.
    """
    ids = sample.token_ids[:-1] if ended_by_token(sample) else sample.token_ids
    text, stop = text_of(tokenizer, ids, special), sample.stop_reason
    return text[: text.rindex(stop)] if isinstance(stop, str) and stop in text else text


def text_of(tokenizer: Any, ids: Sequence[int], special: bool) -> str:
    """A token without text, as a model with more rows than its tokenizer has tokens can sample, is left out."""
    size = len(tokenizer)
    return tokenizer.decode([token for token in ids if token < size], skip_special_tokens=not special)


def ended_by_token(sample: Any) -> bool:
    """Whether the last token of one of vLLM's samples is the one that ended it."""
    return sample.finish_reason == "stop" and not isinstance(sample.stop_reason, str)


def sampling_params(sampling: Sampling, seed: int, stops: Sequence[int]) -> Any:
    """vLLM's form of `Sampling`: final outputs, the sampled tokens' logprobs, no text unless stop strings need it.

    `stops`: tokens that end a response; each is its last token then, as the end token is.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(stops),
        seed=seed if sampling.temperature > 0 else None,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        extra_args={MASKED: True} if sampling.masked else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled_logprobs(sample: Any) -> np.ndarray:
    """float32 [tokens]: the logprob of each sampled token; the first entry of a position is the sampled one."""
    flat = sample.logprobs
    return np.asarray([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32)


@cache
def mask_processor() -> Any:
    """The class of vLLM's form of `MaskReader`; made here, since vllm is imported after its environment is set."""
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    class MaskProcessor(LogitsProcessor):
        """Takes what is outside the mask from the logits. vLLM makes it with the engine, `start_mask` fills it."""

        reader: MaskReader

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            self._readings: dict[int, Reading] = {}

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            process_dict_updates(self._readings, batch_update, self._begin)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            if self._readings:
                rows = torch.tensor(list(self._readings), device=logits.device)
                allowed = self.reader.allowed(list(self._readings.values()))
                logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
            return logits

        @staticmethod
        def _begin(params: Any, prompt: list[int] | None, response: list[int]) -> Reading | None:
            if not (params.extra_args or {}).get(MASKED):
                return None
            assert prompt is not None, "a prompt of tokens"
            return Reading(prompt, response, params.temperature or 1.0)  # greedy: the likeliest of what is allowed

    return MaskProcessor
