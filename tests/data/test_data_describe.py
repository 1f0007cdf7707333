"""The built-in preference task: gold reward by hand, and comparisons that follow it with the stated noise."""

import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from rlhf_dist.config.schema import DataConfig, PreferencesConfig, SftConfig, TaskConfig
from rlhf_dist.data.demonstrations import demonstrations, held_out_demonstrations
from rlhf_dist.data.describe import (
    HARSH,
    KIND,
    PLAIN,
    THINGS,
    best_accuracy,
    draw_order,
    draw_response,
    draw_writer,
    gold,
)
from rlhf_dist.data.judgements import Comparison, Pair, held_out_judgements, judgements
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.data.tasks import split_of
from rlhf_dist.errors import ConfigError
from rlhf_dist.types import Message

DATA = DataConfig(task=TaskConfig(name="describe", min_length=3, max_length=6, train_size=500))
WORDS = {*KIND, *PLAIN, *HARSH}


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("kind warm old", 2.0),
        ("kind warm mean", 1.0),
        ("old big new", 0.0),
        ("kind kind kind", 3 - 2 * 1.0),
        ("ugly ugly", -2 - 1.0),
        ("kind blah", 1 - 1.0),
        ("blah blah", -2 - 1.0),
        ("Kind", -1.0),
        ("  kind \n warm ", 2.0),
        (" ".join(KIND), 8.0),
        ("", -3.0),
        (" \n", -3.0),
    ],
)
def test_gold_by_hand(response, value):
    assert gold(["q"], [response]).tolist() == [value]


def test_gold_is_an_array_for_as_many_responses():
    values = gold(["q", "q"], ["kind", "ugly"])
    assert (values.dtype, values.shape) == (np.float32, (2,))
    assert gold([], []).shape == (0,)
    with pytest.raises(ValueError, match="shorter"):
        gold(["q", "q"], ["kind"])


def test_words_are_few_short_and_plain():
    assert [len(set(pool)) for pool in (KIND, PLAIN, HARSH)] == [8, 8, 8]
    assert len(WORDS) == 24, "no word is in two pools"
    assert all(3 <= len(word) <= 5 and word.isascii() and word.islower() for word in WORDS)
    assert not WORDS & set(THINGS.split())
    assert len(set(THINGS.split())) == len(THINGS.split()) >= 40


def test_questions_are_many_and_the_splits_apart():
    prompts = PromptStream(DATA, seed=1, held_out=0).take(500)
    train = {p.messages[-1].content for p in prompts}
    kept = {p.messages[-1].content for p in held_out(DATA, 300)}
    assert len(train) > 350 and len(kept) > 150
    assert not train & kept
    assert {split_of(q) for q in train} == {"train"}
    assert {p.answer for p in prompts} == {""}
    assert {p.source for p in prompts} == {"describe"}


def test_demonstrations_draw_lengths_and_pools_alike():
    shown = demonstrations(DATA, SftConfig(), seed=0, held_out=0)
    assert shown[3] == shown[3] != demonstrations(DATA, SftConfig(), seed=1, held_out=0)[3]
    words = [word for demo in shown for word in demo.response.split()]
    lengths = [len(demo.response.split(" ")) for demo in shown]
    assert set(words) == WORDS
    assert [lengths.count(n) / 500 for n in (3, 4, 5, 6)] == pytest.approx([0.25] * 4, abs=0.08)
    for pool in (KIND, PLAIN, HARSH):
        assert sum(word in pool for word in words) / len(words) == pytest.approx(1 / 3, abs=0.05)
    kept = held_out_demonstrations(DATA, SftConfig(), 20)
    assert [d.messages for d in kept] == [p.messages for p in held_out(DATA, 20)]
    assert all(d.response for d in kept)
    with pytest.raises(ConfigError, match=r"sft\.wrong_share=0\.5 has no effect with data\.task\.name=describe"):
        demonstrations(DATA, SftConfig(wrong_share=0.5), seed=0, held_out=0)


def test_demonstrations_in_order_say_no_word_twice():
    ordered = DataConfig(task=replace(DATA.task, in_order=True))
    shown = [demo.response.split(" ") for demo in demonstrations(ordered, SftConfig(), seed=0, held_out=0)]
    assert all(words == sorted({*words}) for words in shown) and {word for words in shown for word in words} == WORDS
    assert [sum(len(words) == n for words in shown) / 500 for n in (3, 4, 5, 6)] == pytest.approx([0.25] * 4, abs=0.08)
    long = DataConfig(task=replace(ordered.task, min_length=99, max_length=99))
    assert set(demonstrations(long, SftConfig(), seed=0, held_out=0)[0].response.split()) == WORDS, "there are no more"
    made, same = (judgements(PreferencesConfig(train_size=9), data, seed=2)[0] for data in (DATA, ordered))
    assert made == same, "what people compare is of any order"


def test_comparisons_are_two_different_demonstrations_to_one_question():
    made = judgements(PreferencesConfig(train_size=300), DATA, seed=2)
    assert len(made) == 300
    assert made[7] == made[7] == made[-293] == made[7:8][0]
    with pytest.raises(IndexError):
        made[300]
    for comparison in made:
        assert isinstance(comparison, Comparison)
        first, second = comparison.responses
        assert first != second
        assert {*first.split(), *second.split()} <= WORDS
        assert comparison.pairs in ((Pair(0, 1, 0.0),), (Pair(1, 0, 0.0),))
        assert split_of(comparison.messages[-1].content) == "train"
    assert len({c.pairs for c in made if isinstance(c, Comparison)}) == 2, "the better one is on either side"
    assert made[0] != judgements(PreferencesConfig(train_size=300), DATA, seed=3)[0]


def test_held_out_comparisons_are_of_the_other_split_and_have_the_system_turn():
    data = DataConfig(task=DATA.task, system="be kind")
    kept = held_out_judgements(PreferencesConfig(held_out=100), data)
    assert len(kept) == 100
    assert {split_of(c.messages[-1].content) for c in kept} == {"eval"}
    assert kept[0].messages[0] == Message("system", "be kind")


def test_one_word_responses_still_differ():
    data = DataConfig(task=TaskConfig(name="describe", min_length=1, max_length=1))
    made = judgements(PreferencesConfig(train_size=200), data, seed=0)
    assert all(len(set(c.responses)) == 2 for c in made if isinstance(c, Comparison))


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_labels_follow_bradley_terry(noise):
    rng = random.Random(0)
    for responses, difference in ((("kind", "old"), 1.0), (("ugly", "kind"), -2.0)):
        share = sum(draw_order(rng, responses, noise)[0] == 0 for _ in range(4000)) / 4000
        expected = 1 / (1 + math.exp(-difference / noise))
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))


def test_a_judge_without_noise_never_errs_nor_overflows():
    rng = random.Random(0)
    assert {draw_order(rng, ("kind", "ugly"), 1e-9)[0] for _ in range(50)} == {0}
    assert {draw_order(rng, ("ugly", "kind"), 1e-9)[0] for _ in range(50)} == {1}


def test_any_two_of_a_ranking_follow_bradley_terry():
    """Of "kind", "old" and "ugly" the first is before the last with probability sigmoid(2), whatever lies between."""
    rng = random.Random(1)
    orders = [draw_order(rng, ("kind", "old", "ugly"), 1.0) for _ in range(4000)]
    share = sum(order.index(0) < order.index(2) for order in orders) / 4000
    assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=0.025)


def test_rankings_tell_all_their_pairs():
    made = judgements(PreferencesConfig(train_size=20, responses=4), DATA, seed=2)
    for ranking in made:
        assert isinstance(ranking, Comparison)
        assert len(set(ranking.responses)) == 4
        told = {frozenset((pair.better, pair.worse)) for pair in ranking.pairs}
        assert len(ranking.pairs) == len(told) == 6
        wins = sorted(sum(pair.better == place for pair in ranking.pairs) for place in range(4))
        assert wins == [0, 1, 2, 3], "the pairs are those of one order"


def test_writers_of_comparisons_differ_in_taste_and_in_words():
    """So a reward model sees more of the scale and more repeated words than demonstrations have."""

    def deviation_and_repeats(texts):
        words = [text.split() for text in texts]
        repeats = np.mean([len(said) - len(set(said)) for said in words])
        return float(np.std(gold([""] * len(texts), texts))), float(repeats)

    made = judgements(PreferencesConfig(train_size=500), DATA, seed=2)
    deviation, repeats = deviation_and_repeats(
        [text for c in made if isinstance(c, Comparison) for text in c.responses]
    )
    rng = random.Random(2)
    shown, shown_repeats = deviation_and_repeats([draw_response(rng, 3, 6) for _ in range(1000)])
    assert 2.2 < deviation < 2.9 and 1.7 < shown < 2.1
    assert repeats > 2 * shown_repeats
    assert max(len(draw_writer(rng).pools[0]) for _ in range(50)) == len(KIND)


def compared(better: str, worse: str) -> Comparison:
    return Comparison("p", (Message("user", "q"),), (worse, better), (Pair(1, 0, 0.0),))


def test_best_accuracy_by_hand():
    agrees, tie, against = compared("kind", "ugly"), compared("old", "new"), compared("ugly", "kind")
    assert best_accuracy([agrees]) == 1.0
    assert best_accuracy([tie]) == 0.5
    assert best_accuracy([agrees, agrees, tie, against]) == 2.5 / 4
    ranking = Comparison("p", (Message("user", "q"),), ("kind", "old", "ugly"), (Pair(0, 1, 0), Pair(2, 0, 0)))
    assert best_accuracy([ranking]) == 0.5


def test_best_accuracy_falls_with_noise():
    def best(noise):
        kept = held_out_judgements(PreferencesConfig(noise=noise, held_out=1500), DATA)
        return best_accuracy([c for c in kept if isinstance(c, Comparison)])

    assert best(1e-6) > 0.93 > best(1.0) > 0.75
    assert best(1e6) == pytest.approx(0.5, abs=0.05)


def test_another_process_makes_the_same_comparisons():
    code = (
        "from rlhf_dist.config.schema import DataConfig, PreferencesConfig, TaskConfig;"
        "from rlhf_dist.data.judgements import judgements;"
        "data = DataConfig(task=TaskConfig(name='describe'));"
        "print(judgements(PreferencesConfig(), data, 4)[:20])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "12345"}, capture_output=True, text=True, timeout=60
    )
    data = DataConfig(task=TaskConfig(name="describe"))
    assert done.stdout.strip() == str(judgements(PreferencesConfig(), data, 4)[:20]), done.stderr


def test_comparisons_need_the_task():
    with pytest.raises(ConfigError, match=r"data\.task\.name=describe, data\.task\.name is reverse; set them so"):
        judgements(PreferencesConfig(), DataConfig(), 0)
    with pytest.raises(ConfigError, match=r"data\.source is jsonl"):
        held_out_judgements(PreferencesConfig(), DataConfig(source="jsonl", path="x"))
    with pytest.raises(ConfigError, match="min_length=3 and max_length=2"):
        judgements(PreferencesConfig(), DataConfig(task=TaskConfig(name="describe", max_length=2)), 0)
