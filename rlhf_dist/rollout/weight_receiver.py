"""The receiving end of a push: from shared memory, or straight from the learner, into vLLM's model, all or nothing.

A load has two parts. First every process of the engine takes the version: it hashes all buckets that lie in shared
memory, or agrees with the learner on a transfer. What is wrong there is refused, and the engine keeps what it holds.
Then the model is loaded; from a transfer bucket by bucket, each hashed as it comes. From here on a failure leaves it
with parts of two versions (vLLM takes its layers apart to load them, and would not notice at the next load), so the
engine is broken for good:

    clean -> loading -> clean, or broken

Where the model has a spare one, both parts are done with that while the model is in use (`prepare`), and a load only
exchanges the two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal

from rlhf_dist.errors import EngineBroken, WeightSyncError
from rlhf_dist.models.hf import load_model, own_memory
from rlhf_dist.rollout.masked_sampling import MaskReader, MaskStart
from rlhf_dist.rollout.spare_model import SpareModel
from rlhf_dist.types import NO_VERSION, Receipt
from rlhf_dist.weights.direct_reader import DirectReader, Incoming
from rlhf_dist.weights.receipts import Announcement, receipt_problem
from rlhf_dist.weights.shared_memory import Lease, WeightReader
from rlhf_dist.weights.tally import ReadTally

RECEIVER = "rlhf_dist.rollout.weight_receiver.WeightReceiver"
"""What vLLM mixes into its workers."""
UNPUBLISHED = NO_VERSION
"""Version of weights that the engine loaded itself, before the learner published any."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """One process's answer to the second part."""

    elements: Mapping[str, int]
    """Announced parameter -> elements that were copied; of its own shard where the engine has several processes."""
    unfilled: tuple[str, ...]
    """See `Receipt`."""
    hashes: tuple[str, ...]
    """Of each bucket, as it arrived."""
    failure: str = ""
    """Why the load failed in the middle; empty where it did not. An answer: of several processes that raise, vLLM reads
    the first one's error, and takes the next one's for the answer to a later call."""


class EngineWeights:
    """What the engine as a whole holds: the state machine, over all of its processes."""

    version: int
    """Of the weights that new tokens are sampled with."""

    def __init__(self, name: str, engine: Any, renew_caches: Callable[[], str]) -> None:
        """`name`: of the rollout worker, for receipts. `engine`: vLLM's, whose workers are `WeightReceiver`s.

        `renew_caches` is called once the weights of a version are in. It returns why requests that begin from now
        on may read keys and values of older weights; nothing where they do not.
        """
        self._name = name
        self._engine = engine
        self._renew_caches = renew_caches
        self._lock = Lock()
        """A version is prepared in another thread than it is loaded in."""
        self._prepared: tuple[Announcement, Receipt] | None = None
        """What the spare model holds, if it is whole and was not put into use."""
        self._take_version(UNPUBLISHED)
        self._state: Literal["clean", "loading", "broken"] = "clean"
        self._held: tuple[Announcement, Receipt] | None = None

    def require_clean(self) -> None:
        """Raise `EngineBroken` unless the engine holds one version, whole."""
        if self._state != "clean":
            raise EngineBroken("a load of weights failed in the middle, so its engine is not to be used any more")

    def prepare(self, announcement: Announcement) -> None:
        """Load a version into the spare model, while the engine may step in another thread. Raises as `load`."""
        with self._lock:
            self.require_clean()
            if self._holds(announcement) is None:
                self._prepared = None
                self._prepared = announcement, self._fill(announcement, spare=True)

    def load(self, announcement: Announcement) -> Receipt:
        """Load a version and say what the engine holds; weights that it holds already only get the new number.

        Raises `WeightSyncError` where the buckets are not the announced ones: then the weights are as before. Raises
        `EngineBroken` where the load failed later. A receipt that does not prove the version breaks the engine too.
        """
        with self._lock:
            return self._load(announcement)

    def _load(self, announcement: Announcement) -> Receipt:
        self.require_clean()
        self._state = "loading"
        held = self._holds(announcement)
        if held is not None:
            receipt = replace(held, version=announcement.version)
        else:
            receipt = self._take(announcement)
            self._require_renewed(announcement)
        self._held = announcement, receipt
        refusals = self._engine.collective_rpc("follow_mask", args=(announcement,))
        self._state = "clean" if receipt_problem(announcement, receipt) is None else "broken"
        # Before a mask's refusal: whatever becomes of that, tokens are sampled with these weights from now on.
        self._take_version(announcement.version)
        raise_refusal(refusals)
        return receipt

    def _holds(self, announcement: Announcement) -> Receipt | None:
        """The receipt for these weights, if they are the model's already."""
        if announcement.round is not None:  # the others wait for this engine to take part
            return None
        return self._held[1] if self._held is not None and self._held[0].same_weights(announcement) else None

    def _take(self, announcement: Announcement) -> Receipt:
        """The weights into the model, by an exchange where that is possible."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared[0] != announcement:
            return self._fill(announcement, spare=False)
        self._engine.collective_rpc("exchange_weights")
        return prepared[1]

    def _fill(self, announcement: Announcement, spare: bool) -> Receipt:
        call = self._engine.collective_rpc
        refusals: list[str] = call("take_weights", args=(announcement,))
        if any(refusals):
            call("release_weights")
            self._state = "clean"
            raise_refusal(refusals)
        try:
            loaded: list[Loaded] = call("load_taken_weights", args=(spare,))
            call("release_weights")
        except Exception as error:  # one of the processes has ended
            raise self._broken(announcement, f"failed ({type(error).__name__}: {error})") from error
        for answer in loaded:
            if answer.failure:
                raise self._broken(announcement, f"failed ({answer.failure})")
        unfilled = {name for answer in loaded for name in answer.unfilled}
        return Receipt(
            self._name, announcement.version, loaded[0].hashes, merged(announcement, loaded), tuple(sorted(unfilled))
        )

    def _require_renewed(self, announcement: Announcement) -> None:
        problem = self._renew_caches()
        if problem:
            raise self._broken(announcement, f"is done, but {problem}")

    def _take_version(self, version: int) -> None:
        self.version = version
        self._engine.set_weight_version(str(version))

    def _broken(self, announcement: Announcement, what: str) -> EngineBroken:
        self._state = "broken"
        return EngineBroken(f"the load of version {announcement.version} {what}")


def raise_refusal(refusals: Sequence[str]) -> None:
    """Raise the first of the processes' refusals that says something."""
    for refusal in filter(None, refusals):
        raise WeightSyncError(refusal)


def merged(announcement: Announcement, loaded: Sequence[Loaded]) -> dict[str, int]:
    """Elements by announced name over all processes of an engine, of which each has a shard or a copy."""
    return {
        slot.name: min(sum(answer.elements[slot.name] for answer in loaded), slot.elements)
        for slot in announcement.plan.slots
    }


class WeightReceiver:
    """Mixed into vLLM's worker, whose attributes it uses: runs in every process of the engine, beside the model."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    device: Any
    rank: int
    _weight_reader: WeightReader | None = None
    _direct_reader: DirectReader | None = None
    _taken: Lease | Incoming | None = None
    _mask_reader: MaskReader | None = None
    _spare: SpareModel | None = None

    def start_mask(self, mask: MaskStart) -> None:
        """Load the mask policy, and give it to the processor of logits that vLLM made."""
        from rlhf_dist.rollout.vllm_engine import mask_processor

        dtype = str(self.model_config.dtype).removeprefix("torch.")
        model = load_model(mask.source, dtype, "sdpa").to(self.device)
        own_memory(model)
        self._mask_reader = MaskReader(model, mask.lag, mask.version)
        (processor,) = (p for p in self.model_runner.input_batch.logitsprocs.all if isinstance(p, mask_processor()))
        processor.reader = self._mask_reader

    def take_weights(self, announcement: Announcement) -> str:
        """Make sure of a version; nothing of the model is touched.

        Returns why nothing will be loaded, or nothing: an exception would lose its type between processes.
        """
        try:
            if announcement.meeting is not None:
                self._direct_reader = self._direct_reader or DirectReader(self.device)
                self._taken = self._direct_reader.take(announcement, self.rank)
                return ""
            if self._weight_reader is None:
                self._weight_reader = WeightReader(pinned=self.device.type == "cuda")
            self._taken = self._weight_reader.take(announcement)
        except WeightSyncError as error:
            return str(error)
        return ""

    def load_taken_weights(self, spare: bool) -> Loaded:
        """Load that version into the model, or into its spare one."""
        try:
            return self._load_taken(spare)
        except Exception as error:
            logging.getLogger(__name__).exception("the load of weights failed")
            return Loaded({}, (), (), f"{type(error).__name__}: {error}")

    def _load_taken(self, spare: bool) -> Loaded:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        # It warns of layers without weights of their own at every load. What lacks weights is in `unfilled`.
        logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)
        taken: Lease | Incoming | None = self._taken
        model: Any = self.model_runner.model
        assert taken is not None, "take_weights comes first"
        if spare:
            self._spare = self._spare or SpareModel(model)
            model = self._spare.model
        wanted = parameter_names(model)
        with set_current_vllm_config(self.vllm_config), ReadTally() as tally:
            # On a CPU linear layers are packed into another form and the originals freed: they are loaded anew.
            initialize_layerwise_reload(model)
            keep_embeddings(model)
            reported = model.load_weights(watched(taken, tally))
            partial = partly_loaded(model)
            finalize_layerwise_reload(model, self.model_config)
            repack_tied_heads(model)
        # A few models report nothing: then their layers' own counts and the tally are all there is.
        unfilled = partial if reported is None else [*(wanted - set(reported)), *partial]
        return Loaded(tally.counts(), tuple(unfilled), taken.hashes)

    def exchange_weights(self) -> None:
        """Use the spare model's weights."""
        assert self._spare is not None, "load_taken_weights comes first"
        self._spare.exchange()

    def follow_mask(self, announcement: Announcement) -> str:
        """Move the mask policy along with the model, where it is time for that; returns why it could not, if so."""
        if self._mask_reader is None:
            return ""
        try:
            self._mask_reader.follow(announcement.version, self._published(announcement))
        except WeightSyncError as error:
            return str(error)
        return ""

    def _published(self, announcement: Announcement) -> Iterator[tuple[str, Any]]:
        assert self._weight_reader is not None, "the model comes first"
        lease = self._weight_reader.take(announcement)
        try:
            yield from lease.tensors()
        finally:
            lease.close()

    def release_weights(self) -> None:
        """Let the learner write over what was locked, or end the transfer."""
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.close()


def watched(taken: Lease | Incoming, tally: ReadTally) -> Iterator[tuple[str, Any]]:
    """The parameters, one after another, as they come."""
    for part in taken.parts():
        tally.watch(part)
        yield from part
        del part  # before the next one comes


def parameter_names(model: Any) -> set[str]:
    """vLLM's names of a model's parameters; of those that share their memory, the first."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        # Packed layers have an empty tensor in the place of theirs.
        names.setdefault(parameter.data_ptr() or id(parameter), name)
    return set(names.values())


def partly_loaded(model: Any) -> list[str]:
    """Linear layers, fused ones included, of which vLLM has counted some elements and not all, while it loads."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found = []
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):  # others, such as embeddings, may be padded
            info = get_layerwise_info(module)
            if info.can_load() and 0 < info.load_numel < (info.load_numel_total or 0):
                found.append(name)
    return found


def keep_embeddings(model: Any) -> None:
    """Let the embeddings be written where they are, which vLLM would make beside themselves and pack, in vain.

    They are the largest layers, and are looked up in the form that they are sent in. Only where heads are layers of
    their own: an embedding that is the head has a packed form, too.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    tables: list[Any] = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    if any(isinstance(module, ParallelLMHead) for module in tables):
        for module in tables:
            if not isinstance(module, ParallelLMHead):
                info = get_layerwise_info(module)
                _place_kernel_tensors(module, info)
                info.reset()


def repack_tied_heads(model: Any) -> None:
    """Pack anew the heads that share the embedding's weights.

    Such a head is sent no weights of its own, so a reload leaves its packed form (which a CPU computes with) as it was.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    tables: list[Any] = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads: list[Any] = [module for module in tables if isinstance(module, ParallelLMHead)]
    shared = {module.weight.data_ptr() for module in tables if module not in heads}
    for head in heads:
        if head.weight.data_ptr() in shared:
            head.cpu_linear = None  # frees the old packed form first, so that the new one can take its place
            head.quant_method.process_weights_after_loading(head)
