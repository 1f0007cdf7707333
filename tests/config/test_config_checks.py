"""Cross-field rules: each problem is found, named with key and value, and all come at once."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from rlhf_dist.config.checks import CPU_HEAD_DIMS, Command, check, problems
from rlhf_dist.config.keys import given
from rlhf_dist.config.load import load
from rlhf_dist.config.pipeline_checks import load_stages
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def config(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text("", encoding="utf-8")
    return load(path, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_passes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_dist.config.effects.missing_library", lambda kind: "")  # of extras
    own_data = load(path, []).data.source != "task"  # then the data is the user's: any file stands for it
    (stand_in := tmp_path / "data").touch()
    overrides = [f"data.path={stand_in}", "data.eval_path="] if own_data else []
    if load(path, overrides).pipeline.stages:
        assert load_stages(path, overrides)
    else:
        assert problems(load(path, overrides), "train") == []
        assert path.parent.name != "prefer" or problems(load(path, overrides), "prefer") == []


def test_there_are_shipped_configs() -> None:
    assert ROOT / "configs" / "local.yaml" in CONFIGS


def test_defaults_pass_for_every_command() -> None:
    for command in ("train", "sft", "eval"):
        assert problems(Config(), command) == []


def test_a_reward_model_needs_but_the_task_that_has_judgements(tmp_path: Path) -> None:
    for command in ("reward", "prefer"):
        assert problems(config(tmp_path, "data.task.name=describe"), command) == []


def test_bfloat16_passes_where_it_works(tmp_path: Path) -> None:
    assert problems(config(tmp_path, "model.dtype=bfloat16", "learner.zero_stage=1"), "train") == []
    assert problems(config(tmp_path, "model.dtype=bfloat16"), "eval") == [], "an evaluation has no learner"


def numbers(kind: Any, prefix: str = "") -> set[str]:
    found = set()
    for name, inner in get_type_hints(kind).items():
        if dataclasses.is_dataclass(inner):
            found |= numbers(inner, f"{prefix}{name}.")
        elif inner in (int, float):
            found.add(prefix + name)
    return found


def test_every_number_of_the_schema_has_a_range() -> None:
    assert {key.name for key in given(Config()) if key.right} == numbers(Config)


@pytest.mark.parametrize(
    ("command", "overrides", "parts"),
    [
        ("train", ["algo.group_size=1"], ["algo.group_size is 1", "no baseline", "at least 2"]),
        ("train", ["algo.group_size=0"], ["algo.group_size is 0", "at least 1"]),
        ("train", ["rollout.temperature=0"], ["rollout.temperature is 0", "greater than 0"]),
        ("train", ["rollout.temperature=-1"], ["rollout.temperature is -1", "0 or more"]),
        ("train", ["rollout.top_p=1.5"], ["rollout.top_p is 1.5", "at most 1"]),
        ("train", ["rollout.top_p=0"], ["rollout.top_p is 0"]),
        ("train", ["algo.clip_low=1.5"], ["algo.clip_low is 1.5", "at most 1"]),
        ("train", ["algo.dual_clip=0.5"], ["algo.dual_clip is 0.5", "greater than 1"]),
        ("train", ["learner.optimizer.lr=.nan"], ["learner.optimizer.lr is nan", "greater than 0"]),
        ("train", ["learner.optimizer.lr=.inf"], ["learner.optimizer.lr is inf"]),
        ("train", ["learner.zero_stage=4"], ["learner.zero_stage is 4", "0, 1, 2 or 3"]),
        (
            "train",
            ["loop.max_policy_lag=1", "loop.window=18", "algo.ratio_to=behaviour"],
            ["loop.window is 18", "prompts_per_step 16", "2 versions", "at most 17"],
        ),
        ("train", ["loop.window=2"], ["loop.window is 2", "max_policy_lag is 0", "at most 1"]),
        ("train", ["loop.oversample=0.9"], ["loop.oversample is 0.9", "between 1 and 100"]),
        (
            "train",
            ["loop.oversample=1.5", "loop.max_policy_lag=1", "algo.ratio_to=behaviour"],
            ["loop.oversample is 1.5 and has no effect with loop.max_policy_lag 1"],
        ),
        ("train", ["loop.stale=keep"], ["loop.stale is keep and has no effect with loop.max_policy_lag 0"]),
        ("train", ["loop.age=mean"], ["loop.age is mean and has no effect with loop.max_policy_lag 0"]),
        (
            "train",
            ["rollout.kv_after_push=keep"],
            ["rollout.kv_after_push is keep and has no effect with loop.max_policy_lag 0", "set that above 0"],
        ),
        ("train", ["loop.max_policy_lag=-1"], ["loop.max_policy_lag is -1", "0 or more"]),
        ("train", ["learner.updates_per_batch=3"], ["learner.updates_per_batch is 3", "16", "1, 2, 4, 8, 16 do"]),
        (
            "train",
            ["loop.prompts_per_step=1", "algo.group_size=2", "learner.ranks=3"],
            ["is 2 responses", "learner.ranks 3"],
        ),
        ("sft", ["sft.batch_size=1", "learner.ranks=2"], ["sft.batch_size is 1", "learner.ranks, 2"]),
        ("sft", ["learner.ranks=3", "learner.sequence_parallel=2"], ["sequence_parallel is 2", "learner.ranks, 3"]),
        ("sft", ["sft.max_tokens=513"], ["sft.max_tokens is 513", "model.tiny.max_positions, 512"]),
        ("eval", ["eval.samples=-1"], ["eval.samples is -1", "0 or more"]),
        ("eval", ["rollout.temperature=0"], ["rollout.temperature is 0", "eval.samples 4"]),
        ("train", ["rollout.kv_cache_gib=0"], ["rollout.kv_cache_gib is 0", "greater than 0"]),
        ("train", ["weights.timeout_s=0"], ["weights.timeout_s is 0", "greater than 0"]),
        ("train", ["cluster.start_timeout_s=1e300"], ["cluster.start_timeout_s is 1e+300", "at most 1e9"]),
        (
            "train",
            ["scoring.rewards.a={kind: regex, pattern: x, timeout_s: 1e10}"],
            ["scoring.rewards.a.timeout_s is 10000000000.0", "at most 1e9"],
        ),
        ("train", ["model.tiny.heads=12"], ["model.tiny.hidden_size is 256", "multiple of model.tiny.heads, 12"]),
        ("train", ["model.tiny.kv_heads=3"], ["model.tiny.kv_heads is 3", "1, 2, 4, 8 do"]),
        ("train", ["model.tiny.heads=16"], ["head_dim 16", "CPU engine refuses", "32, 64, 80", "hidden_size 512"]),
        ("train", ["rollout.max_response_tokens=300"], ["is 556", "model.tiny.max_positions 512"]),
        ("train", ["model.attention=varlen"], ["model.attention is varlen", "bfloat16"]),
        ("train", ["model.dtype=bfloat16"], ["model.dtype is bfloat16", "learner.zero_stage 0", "1, 2 or 3"]),
        ("sft", ["model.dtype=bfloat16"], ["model.dtype is bfloat16", "learner.zero_stage 0", "1, 2 or 3"]),
        ("train", ["data.path=x.jsonl"], ["data.path is 'x.jsonl'", "no effect with data.source task"]),
        ("train", ["data.source=jsonl"], ["data.path is empty", "data.source jsonl"]),
        ("train", ["data.source=jsonl", "data.path=no/such.jsonl"], ["data.path is 'no/such.jsonl'", "does not exist"]),
        ("train", ["data.source=jsonl", "data.path=no/such"], [f"does not exist (looked in {Path.cwd()}); give"]),
        ("train", ["data.source=jsonl", "data.path=/no/such"], ["data.path is '/no/such', which does not exist; give"]),
        ("train", ["data.source=jsonl", "data.path=."], ["data.path is '.'", "needs a file"]),
        ("train", ["data.task.min_length=9"], ["data.task.min_length is 9", "data.task.max_length, 6"]),
        ("train", ["name=../up"], ["name is '../up'", "below `output`"]),
        ("train", ["name=/abs"], ["name is '/abs'"]),
        ("train", ["name="], ["name is ''"]),
        ("train", ["output="], ["output is empty"]),
        ("train", ["scoring.rewards={}", "scoring.rewards.exact.weight=0"], ["weight of every reward"]),
        ("train", ["scoring.rewards.a={kind: regex}"], ["scoring.rewards.a.pattern is empty"]),
        (
            "train",
            ["scoring.rewards.a={kind: regex, pattern: '('}"],
            ["scoring.rewards.a.pattern is '('", "expression"],
        ),
        ("train", ["scoring.rewards.a={kind: function, function: f}"], ["is 'f'", "package.module:function"]),
        (
            "train",
            ["scoring.rewards.a={pattern: x}"],
            ["scoring.rewards.a.pattern is 'x'", "no effect with kind exact"],
        ),
        ("train", ["scoring.rewards.a={function: 'm:f'}"], ["scoring.rewards.a.function is 'm:f'", "no effect"]),
        ("train", ["scoring.rewards.a={timeout_s: 0}"], ["scoring.rewards.a.timeout_s is 0"]),
        ("train", ["scoring.rewards.a={weight: .nan}"], ["scoring.rewards.a.weight is nan"]),
        ("train", ["scoring.rewards.exact.weight=0.5"], ["eval.solved_at is 1.0", "at most 0.5"]),
        ("eval", ["eval.solved_at=.inf"], ["eval.solved_at is inf", "a finite number"]),
        ("train", ["scoring.rewards={'a b': {}}"], ["the name 'a b'"]),
        ("train", ["algo.gamma=0.9"], ["algo.gamma is 0.9", "no effect with algo.name grpo", "choose ppo"]),
        ("train", ["algo.name=dr_grpo", "algo.lam=1"], ["algo.lam is 1.0", "algo.name dr_grpo", "take it out"]),
        ("train", ["algo.whiten_advantages=false"], ["algo.whiten_advantages is false", "no effect", "choose ppo"]),
        ("train", ["algo.advantage_clip=5"], ["algo.advantage_clip is 5.0", "no effect with algo.name grpo"]),
        ("train", ["critic.start=shared"], ["critic.start is shared", "no effect with algo.name grpo"]),
        ("train", ["critic.side_by_side=true"], ["critic.side_by_side is true", "no effect"]),
        ("train", ["critic.warmup_steps=2"], ["critic.warmup_steps is 2", "no effect"]),
        ("train", ["critic.clip=0.5"], ["critic.clip is 0.5", "no effect"]),
        ("train", ["critic.coef=0.5"], ["critic.coef is 0.5", "no effect"]),
        (
            "train",
            ["algo.name=ppo", "critic.start=shared", "critic.side_by_side=true"],
            ["critic.side_by_side is true with critic.start shared", "set it to false"],
        ),
        (
            "train",
            ["algo.name=ppo", "critic.start=shared", "critic.warmup_steps=5"],
            ["critic.warmup_steps is 5 with critic.start shared", "set it to 0, or critic.start to policy"],
        ),
        ("train", ["algo.name=ppo", "critic.start="], ["critic.start is empty", "`shared` or a reward model"]),
        (
            "train",
            ["algo.name=ppo", "critic.warmup_steps=100"],
            ["critic.warmup_steps is 100 of loop.steps 100", "never learn", "lower it"],
        ),
        (
            "train",
            ["algo.kl.controller=adaptive"],
            ["algo.kl.coef is 0 with algo.kl.controller adaptive", "start above 0"],
        ),
        (
            "train",
            ["algo.kl.controller=adaptive", "algo.kl.coef=0.1", "algo.kl.horizon=25"],
            ["algo.kl.horizon is 25 with 128 responses", "more than 25.6"],
        ),
        (
            "train",
            ["reference.path=model"],
            ["reference.path is model", "algo.kl.coef is 0", "algo.kl.measure to true"],
        ),
        ("train", ["reference.update_every=5"], ["reference.update_every is 5", "no reference is run"]),
        (
            "train",
            ["algo.kl.coef=0.1", "reference.ema=0.9"],
            ["reference.ema is 0.9", "reference.update_every 0", "both or none"],
        ),
        (
            "train",
            ["algo.kl.coef=0.1", "rollout.top_p=0.9"],
            ["rollout.top_p is 0.9 and rollout.top_k 0", "cut distribution", "algo.kl.coef to 0"],
        ),
        (
            "train",
            ["algo.kl.measure=true", "rollout.top_k=5"],
            ["rollout.top_k 5 with a reference", "set top_p to 1 and top_k to 0"],
        ),
        (
            "train",
            ["algo.kl_stop=0.1"],
            ["algo.kl_stop is 0.1 with one optimizer step a batch", "raise those, or set it to 0"],
        ),
        ("train", ["algo.name=ppo", "algo.gamma=1.5"], ["algo.gamma is 1.5", "between 0 and 1"]),
        ("train", ["algo.name=rlo"], ["algo.name is rlo", "one of ppo", "did you mean rloo"]),
        ("sft", ["algo.name=rlo"], ["algo.name is rlo"]),
        (
            "train",
            ["algo.name=rloo", "algo.clip_low=0.1"],
            ["algo.clip_low is 0.1", "no effect with algo.name rloo", "take it out, or choose ppo", "grpo"],
        ),
        ("train", ["algo.name=cispo", "algo.dual_clip=3"], ["algo.dual_clip is 3", "algo.name cispo"]),
        (
            "train",
            ["algo.name=reinforce_pp", "algo.lam=0.5"],
            ["algo.lam is 0.5", "choose ppo, decoupled_ppo, nlpo, a2c"],
        ),
        (
            "train",
            ["algo.name=gspo", "algo.clip_low=3e-4", "algo.clip_high=4e-4", "algo.aggregation=sequence_sum"],
            ["algo.aggregation is sequence_sum", "no effect with algo.name gspo"],
        ),
        ("train", ["algo.name=rloo", "algo.group_size=1"], ["algo.group_size is 1 with algo.name rloo", "at least 2"]),
        (
            "train",
            ["algo.name=opo", "learner.updates_per_batch=2"],
            ["learner.updates_per_batch 2 with algo.name opo", "both must be 1"],
        ),
        ("train", ["algo.name=a2c", "learner.epochs=2"], ["learner.epochs is 2", "algo.name a2c"]),
        ("train", ["algo.mask_every=5"], ["algo.mask_every is 5", "no effect with algo.name grpo", "or choose nlpo"]),
        (
            "train",
            ["algo.name=nlpo", "learner.sequence_parallel=2", "learner.ranks=2"],
            ["learner.sequence_parallel is 2 with algo.name nlpo", "set it to 1, or choose ppo"],
        ),
        (
            "train",
            ["algo.name=nlpo", "rollout.tensor_parallel=2"],
            ["rollout.tensor_parallel is 2 with algo.name nlpo", "set it to 1, or choose ppo"],
        ),
        (
            "train",
            ["algo.name=nlpo", "rollout.top_p=0.9"],
            ["rollout.top_p is 0.9", "set top_p to 1", "algo.mask_top_p instead"],
        ),
        ("train", ["algo.name=nlpo", "algo.mask_top_p=1"], ["algo.mask_top_p is 1", "greater than 0 and less than 1"]),
        ("train", ["algo.name=nlpo", "algo.mask_every=0"], ["algo.mask_every is 0", "at least 1"]),
        ("train", ["algo.name=gspo"], ["algo.clip_high 0.2 with algo.name gspo", "3e-4 and 4e-4"]),
        (
            "train",
            ["algo.name=reinforce", "critic.clip=0.5"],
            ["critic.clip is 0.5", "algo.name reinforce, which has no critic", "choose ppo"],
        ),
        ("train", ["algo.name=decoupled_ppo"], ["algo.correction.level is off", "set it to token"]),
        (
            "train",
            ["algo.correction.high=3"],
            ["algo.correction.high is 3", "no effect with algo.correction.level off"],
        ),
        (
            "train",
            ["algo.correction.level=token", "algo.correction.high=0.5"],
            ["algo.correction.high is 0.5", "at least 1"],
        ),
        (
            "train",
            ["algo.correction.level=token", "algo.correction.low=2"],
            ["algo.correction.low is 2", "between 0 and 1"],
        ),
        ("train", ["algo.entropy_share=0"], ["algo.entropy_share is 0", "at most 1"]),
        ("train", ["algo.off_policy_limit=-1"], ["algo.off_policy_limit is -1", "0 or more"]),
        (
            "train",
            ["algo.shaping.overlong_buffer=1000"],
            ["algo.shaping.overlong_buffer is 1000", "rollout.max_response_tokens", "at most that"],
        ),
        ("train", ["algo.shaping.repetition_penalty=-1"], ["algo.shaping.repetition_penalty is -1", "0 or more"]),
        (
            "train",
            ["algo.name=remax", "algo.shaping.missing_end_penalty=1"],
            ["algo.shaping.missing_end_penalty is 1.0 with algo.name remax", "not shaped", "take it out"],
        ),
        (
            "train",
            ["algo.name=remax", "algo.shaping.normalize=running"],
            ["algo.shaping.normalize is running", "off or scale"],
        ),
        (
            "train",
            ["algo.name=reinforce", "algo.group_size=1", "loop.prompts_per_step=1"],
            ["loop.prompts_per_step is 1 and algo.group_size 1", "raise one"],
        ),
        ("train", ["algo.filter_rounds=2"], ["algo.filter_rounds is 2", "no effect with algo.filter_groups false"]),
        ("train", ["algo.filter_groups=true", "algo.filter_rounds=1"], ["algo.filter_rounds is 1", "give 2 or more"]),
        ("train", ["algo.kl.place=loss"], ["algo.kl.place is loss", "no effect with algo.kl.coef 0"]),
        (
            "train",
            ["algo.kl.place=loss", "algo.kl.coef=0.1", "algo.kl.estimator=k1"],
            ["algo.kl.estimator is k1", "gradient is 0 on average", "k3+"],
        ),
        (
            "train",
            ["algo.correction.level=token", "algo.correction.low=1", "algo.correction.high=1"],
            ["algo.correction.low and algo.correction.high are both 1", "cut to it"],
        ),
        (
            "train",
            ["algo.name=ppo", "critic.coef=0.5"],
            ["critic.coef is 0.5 and has no effect with critic.start policy", "critic.start to shared"],
        ),
        ("train", ["algo.correction.level=token", "algo.correction.high=.inf"], ["is inf; it must be a finite number"]),
        ("train", ["algo.kl.estimator=k2", "algo.kl.coef=0.1"], ["algo.kl.estimator is k2", "algo.kl.place to loss"]),
        ("train", ["algo.kl.target=3", "algo.kl.coef=0.1"], ["algo.kl.target is 3", "algo.kl.controller fixed"]),
        (
            "train",
            ["algo.shaping.overlong_penalty=2"],
            ["algo.shaping.overlong_penalty is 2.0", "no effect", "set both or none"],
        ),
        ("train", ["learner.epochs=0"], ["learner.epochs is 0", "at least 1"]),
        ("train", ["learner.ema_decay=1"], ["learner.ema_decay is 1", "less than 1"]),
    ],
)
def test_each_problem(tmp_path: Path, command: Command, overrides: list[str], parts: list[str]) -> None:
    found = problems(config(tmp_path, *overrides), command)
    assert len(found) == 1, found
    assert all(part in found[0] for part in parts), found


def test_a_reward_cannot_have_the_name_of_another_metric(tmp_path: Path) -> None:
    """Every reward/... and eval/... that docs/metrics.md lists, but for those that stand for names of the run."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(?:reward|eval)/(\w+)`", page, re.MULTILINE)) - {"NAME", "pass_at_K"}
    assert {"running_mean", "running_std", "score_clipped", "shaped_mean"} <= listed and len(listed) > 15
    for name in sorted(listed):
        (found,) = problems(config(tmp_path, f"scoring.rewards={{{name}: {{kind: exact}}}}"), "train")
        assert f"scoring.rewards.{name}: the name '{name}' is that of another metric" in found


def test_empty_rewards_are_refused() -> None:
    empty = dataclasses.replace(Config(), scoring=dataclasses.replace(Config().scoring, rewards={}))
    assert ["scoring.rewards is empty" in problem for problem in problems(empty, "train")] == [True]


def test_data_without_answers_cannot_be_matched(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.touch()
    overrides = ["data.source=jsonl", f"data.path={data}", "data.answer_key="]
    found = problems(config(tmp_path, *overrides), "train")
    assert len(found) == 1 and "data.answer_key is empty" in found[0]
    assert problems(config(tmp_path, *overrides, "data.answer_key=answer"), "train") == []


def test_head_dim_is_free_on_cuda(tmp_path: Path) -> None:
    assert problems(config(tmp_path, "model.tiny.heads=16", "cluster.device=cuda"), "train") == []


def test_head_dims_are_those_of_the_installed_engine() -> None:
    backend = pytest.importorskip("vllm.v1.attention.backends.cpu_attn", reason="vLLM's CPU build is not installed")
    assert list(CPU_HEAD_DIMS) == backend.CPUAttentionBackend.get_supported_head_sizes()


def test_rules_of_other_commands_do_not_apply(tmp_path: Path) -> None:
    assert problems(config(tmp_path, "algo.group_size=1", "rollout.temperature=0"), "sft") == []
    assert problems(config(tmp_path, "sft.batch_size=1", "learner.ranks=2"), "train") == []


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    bad = config(tmp_path, "algo.group_size=1", "name=..", "rollout.top_p=2", "loop.max_policy_lag=-2")
    with pytest.raises(ConfigError) as caught:
        check(bad, "train")
    message = str(caught.value)
    assert message.startswith("the config has 4 problems:")
    for key in ("algo.group_size", "name is", "rollout.top_p", "loop.max_policy_lag"):
        assert key in message


def test_check_accepts_a_good_config() -> None:
    check(Config(), "train")
