"""`rlhf-dist bench step`: arithmetic, inputs, the limit, and one tiny run of the whole. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _canonical  # noqa: E402
import _limit  # noqa: E402
import step as bench  # noqa: E402

from rlhf_dist.config.schema import TinyConfig  # noqa: E402
from rlhf_dist.errors import ConfigError, InputError, RunError  # noqa: E402

TINY = TinyConfig(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1)
TINY_WORDS = [
    *(f"model.tiny.{key}={getattr(TINY, key)}" for key in ("hidden_size", "intermediate_size", "layers")),
    *("model.tiny.heads=2", "model.tiny.kv_heads=1", "rollout.kv_cache_gib=0.1"),
    *("rollout.max_response_tokens=8", "loop.prompts_per_step=2", "algo.group_size=4"),
]


def a_step(generate: float, train: float, tokens: float) -> bench.Step:
    return bench.Step({"generate": generate, "train": train, "sync": 0.0, "other": 1.0}, tokens)


def test_a_step_of_the_metrics() -> None:
    metrics = {"time/step": 10.0, "time/generate": 4.0, "time/train": 3.0, "time/sync": 1.0, "time/value": 0.5}
    metrics["rollout/response_tokens"] = 50.0
    found = bench.step_of(metrics, bench.PHASES["grpo"])
    assert found.seconds == {"generate": 4.0, "train": 3.0, "sync": 1.0, "other": 2.0}
    assert found.tokens_per_s == 5.0
    found = bench.step_of(metrics, bench.PHASES["ppo"])
    assert found.seconds == {"generate": 4.0, "value": 0.5, "train": 3.0, "sync": 1.0, "other": 1.5}


def test_summary_takes_medians_and_the_fastest_limit() -> None:
    slow = [a_step(10.0, 20.0, 400.0)]
    limit = [a_step(1.0, 2.0, 400.0), a_step(2.0, 1.0, 800.0), a_step(50.0, 49.0, 100.0)]  # 100, 200, 1 tokens/s
    ours = [a_step(3.0, 4.0, 400.0)]  # 50 tokens/s
    found = bench.summary([slow, limit], ours, start_s=31.0, target=1.3)
    assert found["limit"]["tokens_per_s"] == 100.0
    assert found["limit"]["seconds"] == {"generate": 2.0, "train": 2.0, "sync": 0.0, "other": 1.0}
    assert found["limit"]["step_s"] == 4.0
    assert found["ratio"] == 2.0
    assert found["reached"] == {"ratio": False, "start": False}


def test_the_table_says_where_our_scoring_is(tmp_path: Path) -> None:
    limit = bench.Step({"generate": 1.0, "score": 2.0, "value": 3.0, "train": 4.0, "sync": 0.0, "other": 0.0}, 80.0)
    ours = bench.Step({"generate": 5.0, "value": 6.0, "train": 7.0, "sync": 1.0, "other": 1.0}, 100.0)
    result = bench.summary([[limit]], [ours], start_s=1.0, target=1.08)
    config = _canonical.canonical_config(tmp_path, "ppo", [], steps=1)
    head, columns, *rows = bench.table(result, config).splitlines()
    assert head.startswith("one synchronous PPO step: 8 prompts x 8 samples")
    assert " ".join(columns.split()) == "medians step s generate score value train sync other response tok/s"
    assert " ".join(rows[0].split()) == "limit 10.00 1.00 2.00 3.00 4.00 0.00 0.00 8"
    assert " ".join(rows[1].split()) == "ours 20.00 5.00 - 6.00 7.00 1.00 1.00 5"
    assert "within generate" in rows[2] and "1.60" in rows[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/local.yaml"], "`configs/local.yaml` is not of the form key=value"),
        (["loop.steps=3"], "loop.steps=3: the benchmark sets loop.steps itself"),
        (["--runs", "1"], "'1' is not a whole number of 2 or more"),
        (["--steps", "0"], "'0' is not a whole number of 1 or more"),
        (["rollout.wokers=2"], "rollout.wokers"),
        (["learner.ranks=2"], "learner.ranks"),
        (["--algo", "ppo", "learner.epochs=2"], "learner.epochs"),
        (["--algo", "rloo"], "rloo"),
        (["algo.kl.measure=true"], r"algo.kl.measure=true: the benchmark sets algo.kl.measure itself"),
        (
            ["--algo", "ppo", "scoring.rewards.judge.kind=http"],
            r"the benchmark sets scoring\.rewards\.judge\.kind itself",
        ),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench.main(words)


def test_a_process_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)probe ended with exit code 3; .*probe\.log:\nlast words"):
        bench.run_process([sys.executable, "-c", "print('last words'); exit(3)"], tmp_path / "probe.log", {})


def test_prompts_are_tokenised_as_the_product_does(tmp_path: Path) -> None:
    from rlhf_dist.data.render import render
    from rlhf_dist.data.stream import PromptStream
    from rlhf_dist.models.hf import load_tokenizer

    config = _canonical.canonical_config(tmp_path, "grpo", TINY_WORDS, steps=3)
    _canonical.write_config(config, tmp_path)
    _canonical.write_model(TINY, tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert len(tokenizer) == 64
    texts = [json.loads(line)["prompt"] for line in Path(config.data.path).read_text().splitlines()]
    assert len(texts) - config.eval.prompts == _canonical.PROMPTS
    prompts = PromptStream(config.data, config.seed, config.eval.prompts).take(_canonical.PROMPTS)
    assert {prompt.messages[-1].content for prompt in prompts} == set(texts[: _canonical.PROMPTS])
    for prompt in prompts:
        assert _canonical.prompt_tokens(prompt) == render(tokenizer, prompt.messages, chat=False)
    with pytest.raises(ConfigError, match=r"model\.path"):
        _canonical.canonical_config(tmp_path, "grpo", ["model.path=elsewhere"], steps=3)


ROWS = [[2, 5, 6, 7, 8], [3, 9, 10, 11, 12], [1, 13, 14, 15, 16, 17, 18]]  # prompt length, tokens


def test_the_limit_has_the_gradient_of_every_row_alone(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_dist.models.attention import SEGMENTED, register_attention

    register_attention()
    _canonical.write_model(TINY, tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=SEGMENTED)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    work = replace(a_work(), micro_batch_tokens=9, max_grad_norm=1e9)
    _limit.update(packed, torch.optim.SGD(packed.parameters(), lr=1.0), _limit.policy_losses, ROWS, work)
    loss = torch.zeros(())
    for index, (length, *tokens) in enumerate(ROWS):
        logprobs = alone(torch.tensor([tokens])).logits[0].log_softmax(-1)
        asked = range(length - 1, len(tokens) - 1)
        sign = 1.0 if index % 2 else -1.0
        loss = loss - sign * torch.stack([logprobs[i, tokens[i + 1]] for i in asked]).sum() / 8
    loss.backward()
    for (name, moved), reference in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert reference.grad is not None and reference.grad.abs().max() > 0, name
        torch.testing.assert_close(moved, reference.detach() - reference.grad, rtol=1e-4, atol=1e-6)


def test_the_limit_reads_scores_and_learns_values_of_every_row_alone(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from rlhf_dist.models.attention import register_attention

    register_attention()
    config = _canonical.canonical_config(tmp_path, "ppo", TINY_WORDS, steps=1)
    _canonical.write_models(config)
    work = replace(a_work(), model=config.model.path, reward=str(_canonical.reward_folder(tmp_path)))
    work = replace(work, micro_batch_tokens=9, max_grad_norm=1e9)
    others = _limit.Others(work)
    assert set(others.read(ROWS, work)) == {"score", "value"}
    packed, alone = others.reward, AutoModelForSequenceClassification.from_pretrained(work.reward)
    scores = torch.cat([_limit.numbers(packed, m, m.last) for m in _limit.micro_batches(ROWS, 1000)])
    expected = torch.cat([alone(torch.tensor([row[1:]])).logits[0] for row in ROWS])
    assert expected.abs().max() > 0
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)

    _limit.update(packed, torch.optim.SGD(packed.parameters(), lr=1.0), _limit.value_losses, ROWS, work)
    loss = torch.zeros(())
    for index, (length, *tokens) in enumerate(ROWS):
        values = alone.score(alone.model(torch.tensor([tokens])).last_hidden_state)[0, length - 1 : -1, 0]
        loss = loss + 0.5 * (values - (1.0 if index % 2 else -1.0)).square().sum() / 8
    loss.backward()
    for (name, moved), reference in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert reference.grad is not None and reference.grad.abs().max() > 0, name
        torch.testing.assert_close(moved, reference.detach() - reference.grad, rtol=1e-4, atol=1e-6)


def a_work() -> _limit.Work:
    return _limit.Work(
        model="",
        reward="",
        dtype="float32",
        prompts=[],
        seeds=[],
        max_prompt_tokens=8,
        max_response_tokens=8,
        temperature=1.0,
        max_concurrent=8,
        kv_cache_bytes=0,
        enforce_eager=True,
        generate_threads=1,
        train_threads=1,
        micro_batch_tokens=64,
        learning_rate=1.0,
        max_grad_norm=1.0,
        rollouts="",
        timings="",
    )


@pytest.mark.engines
@pytest.mark.faults  # for its time
def test_a_tiny_run_of_the_whole(tmp_path: Path) -> None:
    """With PPO: everything that GRPO's has, and three models more."""
    out = tmp_path / "step.json"
    command = [sys.executable, "-m", "rlhf_dist", "bench", "step", "--algo", "ppo"]
    command += ["--steps", "2", "--warmup", "1", "--runs", "2", "rollout.cpus=1", "learner.cpus=1"]
    result = subprocess.run(
        [*command, "--out", str(out), *TINY_WORDS], capture_output=True, text=True, timeout=280, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    for side in ("limit", "ours"):
        assert len(found[side]["steps"]) == 2
        assert f"{found[side]['tokens_per_s']:.0f}" in result.stdout
        for measured in found[side]["steps"]:
            assert 8 <= measured["tokens"] <= 64  # 2 prompts x 4 samples, of 1 to 8 tokens each
            assert measured["generate"] > 0 and measured["train"] > 0
    tokens = [[measured["tokens"] for measured in found[side]["steps"]] for side in ("limit", "ours")]
    assert tokens[0] == tokens[1], "equal work"
    assert all(measured["sync"] > 0 for measured in found["ours"]["steps"])
    assert all(measured["sync"] == 0 for measured in found["limit"]["steps"])
    assert f"{found['ratio']:.2f}" in result.stdout
    limit, ours = (set(found[side]["steps"][0]) - {"tokens"} for side in ("limit", "ours"))
    assert limit == set(bench.PHASES["ppo"]) and ours == limit - {"score"}
    assert all(measured[phase] > 0 for measured in found["limit"]["steps"] for phase in limit - {"sync", "other"})
    assert found["start_s"] > 1.0  # a vLLM engine is started within it
    assert found["machine"]["versions"]["torch"] and found["machine"]["date"]
