"""`rlhf-dist compare`: several policies answer the same held-out prompts, one engine after the other."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlhf_dist.cluster.build import eval_display, policy_at_work
from rlhf_dist.cluster.preflight import check_before_start
from rlhf_dist.cluster.session import ray_session
from rlhf_dist.cluster.sources import model_path, model_source, reward_model_doubts
from rlhf_dist.config.compare_keys import judge_of
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.reward_words import reward_lines
from rlhf_dist.config.schema import Config
from rlhf_dist.data.stream import held_out
from rlhf_dist.data.token_checks import require_prompts_fit
from rlhf_dist.errors import ConfigError
from rlhf_dist.loop.compare_directory import new_directory, require_new
from rlhf_dist.loop.compare_page import compare_page
from rlhf_dist.loop.compare_report import answer_rows, as_json, judged_by, tables
from rlhf_dist.loop.comparing import HeadToHead, Policy, answer, compare, labels
from rlhf_dist.loop.run_directory import write_json, write_text
from rlhf_dist.scoring.non_finite import told
from rlhf_dist.telemetry.console_tables import show
from rlhf_dist.types import Prompt


def compare_policies(config: Config, paths: Sequence[str]) -> None:
    """Sample each policy's answers, judge each two, print the table, and leave JSON and a page in `output/name`.

    Raises what an evaluation raises, and ConfigError where two paths are the same model.
    """
    started = time.monotonic()
    require_new(config.output, config.name)
    configs = [of_policy(config, path) for path in paths]
    require_different(configs)
    prompts: list[Prompt] = held_out(config.data, config.eval.prompts)
    warnings = dict.fromkeys(text for one in configs for text in checked(one, prompts))
    with new_directory(config.output, config.name) as folder:
        policies = answers_of(configs, labels(paths), prompts, list(warnings))
        found = compare(
            policies,
            len(prompts),
            config.eval.samples,
            judge=judge_of(config),
            tie_margin=config.compare.tie_margin,
            seed=config.seed,
        )
        write_results(folder, config, found, policies, prompts)
    print(judged_by(found))
    show(partial(tables, found), sys.stdout)
    seconds = time.monotonic() - started
    print(f"page: {folder}/compare.html  figures: compare.json  all answers: answers.jsonl  ({seconds:.0f} s)")


def of_policy(config: Config, path: str) -> Config:
    """The config with which one policy is asked: without a reference, whose KL nobody looks at here."""
    kl = replace(config.algo.kl, coef=0.0, measure=False)
    return replace(config, model=replace(config.model, path=path), algo=replace(config.algo, kl=kl))


def require_different(configs: Sequence[Config]) -> None:
    """Raise ConfigError where two of the policies are the same directory, or the same hub name."""
    seen: dict[str, str] = {}
    for config in configs:
        path = config.model.path
        source = str(Path(model_path(config, path, "policy")).resolve())
        if source in seen:
            same = "is given twice" if seen[source] == path else f"is the same model as {seen[source]}"
            raise ConfigError(f"policy {path}: {same}; name different ones")
        seen[source] = path


def checked(config: Config, prompts: Sequence[Prompt]) -> list[str]:
    """What can be known to be wrong with a policy before an engine starts; returns what to warn of."""
    from rlhf_dist.models.hf import load_tokenizer

    warnings = check_before_start(config, "eval")
    source = model_source(config, None, "eval")
    limit = config.rollout.max_prompt_tokens
    require_prompts_fit(prompts, load_tokenizer(source), config.model.path, config.data.chat, limit)
    return warnings


def answers_of(
    configs: Sequence[Config], names: Sequence[str], prompts: Sequence[Prompt], warnings: Sequence[str]
) -> list[Policy]:
    """All policies' answers, by one engine after the other in one Ray session."""
    first, policies = configs[0], list[Policy]()
    with eval_display(first) as (progress, logs):
        for line in reward_lines(first)[:1]:
            progress.note(line)
        for doubt in (*warnings, *reward_model_doubts(first, begins=False)):
            progress.warn(doubt)
        progress.stage(f"starting Ray (logs in {logs})")
        with ray_session(first.cluster, logs / "ray", progress.note) as nodes:
            for number, (config, name) in enumerate(zip(configs, names, strict=True), start=1):
                progress.stage(f"policy {number} of {len(configs)}, {name}: {len(prompts)} prompts")
                source = model_source(config, None, "eval")
                with policy_at_work(config, source, nodes, logs / str(number), progress.warn) as (shell, sampling):
                    responses, left_out = answer(
                        prompts,
                        config.eval.samples,
                        sampling,
                        seed=config.seed,
                        shell=shell,
                        judge=judge_of(config),
                    )
                policies.append(Policy(name, config.model.path, responses, left_out))
        for policy in policies:
            if policy.left_out:
                progress.note(f"{policy.label}: {told(policy.left_out, first.scoring.non_finite)}")
    return policies


def write_results(
    folder: Path, config: Config, found: HeadToHead, policies: Sequence[Policy], prompts: Sequence[Prompt]
) -> None:
    """Raises DiskError."""
    write_text(folder / "config.yaml", to_yaml(config))
    rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in answer_rows(prompts, policies))
    write_text(folder / "answers.jsonl", "".join(rows))
    write_json(folder / "compare.json", as_json(found, policies, config.seed))
    write_text(folder / "compare.html", compare_page(found, prompts))
