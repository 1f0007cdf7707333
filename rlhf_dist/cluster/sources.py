"""Which models a run starts from: found, checked and named before any process is started."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rlhf_dist.cluster import actors, learner_hosts as hosts
from rlhf_dist.config.prefer_keys import PREFER_METHODS, START
from rlhf_dist.config.schema import Config, RewardSpec
from rlhf_dist.errors import ModelError
from rlhf_dist.learner.checkpoint_files import CRITIC_FOLDER, MASK_FOLDER
from rlhf_dist.planning.placement import Command, local_machine, needs_reference
from rlhf_dist.scoring.reference_files import REFERENCE_FOLDER


def preflight_rewards(config: Config) -> None:
    """Try every reward cheaply: models are looked at and not loaded, servers asked for a sign of life."""
    from rlhf_dist.scoring.scorer import asked_by, preflight

    def look(name: str, reward: RewardSpec) -> object:
        from rlhf_dist.scoring.reward_model import reward_source

        policy = model_path(config, config.model.path, "model.path")
        return reward_source(name, reward, actors.model_setting(config, policy, "cpu"))

    preflight(config.scoring, look, asked_by(config))


def reward_model_doubts(config: Config, begins: bool) -> list[str]:
    """A sentence for each reason to doubt a reward model that the run uses, by what is stored with it.

    `begins`: whether a critic is made, which may start from one.
    """
    from rlhf_dist.models.scalar import read_scale

    used = {f"scoring.rewards.{name}.path": r.path for name, r in config.scoring.rewards.items() if r.kind == "model"}
    means = dict.fromkeys(used, "its rewards")
    if begins and hosts.algorithm(config.algo).needs_critic and config.critic.start not in ("policy", "shared"):
        used["critic.start"], means["critic.start"] = config.critic.start, "the critic's first values"
    found = {key: (path, read_scale(model_path(config, path, key))) for key, path in used.items()}
    return [
        f"{key} = {path}: {doubt}; {means[key]} may mean nothing, train another one with `rlhf-dist reward`"
        for key, (path, scale) in found.items()
        for doubt in scale.doubts()
    ]


def model_source(config: Config, checkpoint: Path | None, command: Command = "train") -> str:
    """The Hugging Face directory to start from: the checkpoint's, or what `model.path` names, after checks."""
    from rlhf_dist.models.capabilities import check_heads, check_positions, check_shared_rows
    from rlhf_dist.models.hf import load_tokenizer
    from rlhf_dist.models.inspect import inspect
    from rlhf_dist.models.model_config import load_config
    from rlhf_dist.models.scalar import inspect_scalar
    from rlhf_dist.models.text_format import check_format

    if checkpoint is not None:
        source = str((checkpoint / "hf").absolute())
    else:
        source = model_path(config, config.model.path, "model.path")
    tokens, keys = longest(config, command)
    if command != "eval":
        check_shared_rows(source, load_config(source), config.learner.sequence_parallel)
    if command == "reward":
        inspect_scalar(source, tokens, keys, attention(config))
        check_format(load_tokenizer(source), config.data.chat, config.data.system)
        return source
    inspect(source, config.data.chat, device(config), tokens, attention(config), keys, config.data.system)
    if command in ("train", "eval"):
        check_heads(source, load_config(source), config.rollout.tensor_parallel, "rollout.tensor_parallel")
    if command == "train" and config.ptx.coef:
        check_positions(source, load_config(source), config.ptx.max_tokens, "ptx.max_tokens")
    return source


def longest(config: Config, command: Command) -> tuple[int, str]:
    """Tokens of the longest sequence that `command` puts through its models, and the config keys that say so."""
    from rlhf_dist.models.capabilities import ROLLOUT_TOKENS

    if command == "sft":
        return config.sft.max_tokens, "sft.max_tokens"
    if command in ("reward", "prefer"):
        return config.preferences.max_tokens, "preferences.max_tokens"
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens, ROLLOUT_TOKENS


def device(config: Config) -> Literal["cpu", "cuda"]:
    """Where models will run, as far as this machine tells."""
    return "cuda" if config.cluster.device != "cpu" and local_machine().gpus else "cpu"


def attention(config: Config) -> str:
    """The attention that models will be loaded with, as far as this machine tells."""
    from rlhf_dist.models.attention import choose_attention

    asked = config.model.attention
    return choose_attention(asked, device(config), config.model.dtype) if asked == "auto" else asked


def check_run_models(config: Config, command: Command, skip: Container[str] = ()) -> None:
    """Compare each model that comes from a run with the hashes in its checkpoint, once. Raises ModelError.

    `skip`: keys whose model is not there yet, or is not read.
    """
    from rlhf_dist.models.run_model import check_run_model

    paths = {"model.path": config.model.path}
    if command in ("train", "eval"):
        models = {name: spec.path for name, spec in config.scoring.rewards.items() if spec.kind == "model"}
        paths |= {f"scoring.rewards.{name}.path": path for name, path in models.items()}
        paths |= {"reference.path": config.reference.path} if needs_reference(config) else {}
    if command == "train" and hosts.algorithm(config.algo).needs_critic:
        paths |= {"critic.start": config.critic.start}
    if command == "prefer" and PREFER_METHODS[config.prefer.method].reference:
        paths |= {"prefer.reference": config.prefer.reference}
    seen: set[str] = set()
    for key, path in paths.items():
        if path and path not in seen and key not in skip and path not in ("tiny", "policy", "shared", START):
            check_run_model(path, key)
            seen.add(path)


def with_sources(config: Config, source: str, folder: Path | None, learns: bool) -> Config:
    """The config as the actors get it: `critic.start` and `reference.path` are directories or hub names.

    `source`: where the policy starts from; `folder`: the checkpoint resumed from, whose own critic and reference go on;
    `learns`: false for an evaluation, which has no critic.
    """
    critic, reference = config.critic.start, config.reference.path
    if learns and hosts.algorithm(config.algo).needs_critic and critic != "shared":
        if folder is not None:
            critic = str((folder / CRITIC_FOLDER / "hf").absolute())
        else:
            critic = source if critic == "policy" else model_path(config, critic, "critic.start")
    if needs_reference(config):
        moved = None if folder is None else folder / REFERENCE_FOLDER
        if moved is not None and moved.is_dir():
            reference = str(moved.absolute())
        else:
            key = "reference.path" if reference else "model.path"
            reference = model_path(config, reference or config.model.path, key)
    return replace(
        config,
        critic=replace(config.critic, start=critic),
        reference=replace(config.reference, path=reference),
    )


def mask_source(source: str, folder: Path | None) -> str:
    """Where the mask policy starts: like the policy from `source`, or in the checkpoint `folder`, which has its own."""
    return source if folder is None else str((folder / MASK_FOLDER).absolute())


def model_path(config: Config, path: str, key: str) -> str:
    """The Hugging Face directory, absolute, or hub name that `path`, of the config key `key`, stands for."""
    from rlhf_dist.models.hf import resolve

    found = Path(resolve(replace(config.model, path=path), models_folder(config), key).path)
    return str(found.absolute()) if found.exists() else str(found)


def models_folder(config: Config) -> Path:
    """Where models are made on first use."""
    return Path(config.output).absolute() / ".models"


def check_critic(config: Config) -> None:
    """Refuse a critic that cannot be made, or that cannot read the policy's tokens. Raises `ModelError`."""
    if not hosts.algorithm(config.algo).needs_critic or config.critic.start == "shared":
        return
    from rlhf_dist.models.capabilities import check_shared_rows
    from rlhf_dist.models.model_config import load_config
    from rlhf_dist.models.scalar import inspect_scalar

    of_policy = config.critic.start == "policy"
    critic = model_path(config, config.model.path if of_policy else config.critic.start, "critic.start")
    inspect_scalar(critic, *longest(config, "train"), attention=attention(config))
    if of_policy:
        return
    check_shared_rows(critic, load_config(critic), config.learner.sequence_parallel)
    way_out = "set critic.start=policy, or start from a reward model of the same tokenizer"
    require_same_tokens(
        config, f"critic.start = {config.critic.start}", critic, f"whose tokens it has to value; {way_out}"
    )


def check_reference(config: Config) -> None:
    """Refuse a reference that cannot be used, or that cannot read the policy's tokens. Raises `ModelError`."""
    if needs_reference(config) and config.reference.path:
        why = "with whose probabilities of the same tokens KL compares its own"
        _check_reference(config, "reference.path", config.reference.path, why, "train")


def check_prefer_reference(config: Config) -> None:
    """The same of `prefer.reference`. Raises `ModelError`."""
    path = config.prefer.reference
    if PREFER_METHODS[config.prefer.method].reference and path != START:
        why = f"with whose probabilities of the same responses {config.prefer.method} compares its own"
        _check_reference(config, "prefer.reference", path, why, "prefer")


def _check_reference(config: Config, key: str, path: str, why: str, command: Command) -> None:
    from rlhf_dist.models.inspect import inspect_causal

    reference = model_path(config, path, key)
    tokens, keys = longest(config, command)
    inspect_causal(reference, tokens, attention(config), keys)
    require_same_tokens(config, f"{key} = {path}", reference, f"{why}; give a model of the same tokenizer")


def require_same_tokens(config: Config, which: str, path: str, why: str) -> None:
    """Refuse a model at `path` that cannot read the policy's tokens; `why` ends the message. Raises `ModelError`."""
    from rlhf_dist.models.hf import load_tokenizer
    from rlhf_dist.scoring.reward_model import differs

    policy = model_path(config, config.model.path, "model.path")
    difference = differs(load_tokenizer(path), load_tokenizer(policy), chat=False)
    if difference:
        raise ModelError(f"{which}: its {difference} is not that of the policy, {config.model.path}, {why}")
    require_rows(which, path, policy)


def require_rows(which: str, path: str, policy: str) -> None:
    """Refuse a model that lacks a row for a token that the policy can sample. Raises `ModelError`."""
    from rlhf_dist.models.model_config import load_config

    own, needed = (load_config(source).get_text_config().vocab_size for source in (path, policy))
    if own < needed:
        raise ModelError(f"{which}: has rows for {own} tokens, the policy for {needed}; give a model with as many")
