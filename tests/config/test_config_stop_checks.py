import pytest

from rlhf_dist.config.checks import problems
from rlhf_dist.config.schema import Config, RolloutConfig


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ([], []),
        (["\n", " ", "</answer>"], []),
        ([""], ["rollout.stop[0] is ''; every response would end before its first token"]),
        (["a", ""], ["rollout.stop[1] is ''"]),
        (["a", "b", "a"], ["rollout.stop[2] is 'a', as rollout.stop[0] is"]),
        (["x" * 1001], ["rollout.stop[0] is 'xxx"]),
        ([str(i) for i in range(65)], ["rollout.stop has 65 texts; it must have at most 64"]),
        (["", ""], ["rollout.stop[0] is ''", "rollout.stop[1] is ''"]),
    ],
)
def test_stop_texts_that_cannot_be_meant_are_named_by_their_index(stop: list[str], words: list[str]) -> None:
    found = problems(Config(rollout=RolloutConfig(stop=stop)), "train")
    assert len(found) == len(words) and all(word in told for word, told in zip(words, found, strict=True)), found
