"""The parts of `rlhf-dist bench hh_reward`: the split, a tokenizer and a language model of the same text, the test.

`python _hh.py make FOLDER` and `python _hh.py score FOLDER RUN` run in processes of their own. The texts are
offensive in places: nothing here shows or stores one, beyond the files of the work folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.schema import Config, DataConfig, PreferencesConfig, TinyConfig
from rlhf_dist.data.files import read_rows
from rlhf_dist.data.judgement_rows import Comparison, NoJudgement, judgement
from rlhf_dist.data.records import Row
from rlhf_dist.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from rlhf_dist.learner.micro_batch_rows import Packed
    from rlhf_dist.learner.preference_learner import HeldOutScores

VOCABULARY = 2000
"""Tokens at most; a small text has fewer."""
TRAIN_FILE, TEST_FILE, TEXT_FILE = "train.jsonl", "test.jsonl", "texts.jsonl"
CONFIG_FILE = "config.yaml"
MADE_FILE, SCORED_FILE = "made.json", "scored.json"
MODEL_FOLDER = "model"
PICTURE_FILE = "test.png"
SIDES = {"train": TRAIN_FILE, "test": TEST_FILE}


@dataclass(frozen=True, slots=True)
class Split:
    """The pairs of the file, in its order."""

    train: tuple[Row, ...]
    """For everything that is learnt or chosen: tokenizer, language model, reward model, early stop."""
    test: tuple[Row, ...]
    """For the one measurement at the end."""
    unusable: tuple[str, ...]
    """`file:line` of pairs from which nothing can be learnt (an empty side, say); they are on neither side."""


def split(rows: Sequence[Row], train: int, preferences: PreferencesConfig) -> Split:
    """The first `train` rows and the rest, each without its unusable ones. Raises DataError when too few are there."""
    if len(rows) <= train:
        raise DataError(f"the file has {len(rows)} pairs; with --train {train} none is left for the test: lower it")
    sides: tuple[list[Row], list[Row]] = ([], [])
    unusable: list[str] = []
    for number, row in enumerate(rows):
        try:
            judgement(row, preferences, DataConfig())
        except NoJudgement:
            unusable.append(row.place)
        else:
            sides[number >= train].append(row)
    kept, tested = tuple(sides[0]), tuple(sides[1])
    if len(kept) <= preferences.held_out or not tested:
        raise DataError(
            f"{len(kept)} pairs to train on and {len(tested)} to test on can be used; needed are more than "
            f"preferences.held_out={preferences.held_out} and at least 1: give a larger file"
        )
    return Split(kept, tested, tuple(unusable))


def write_split(found: Split, folder: Path) -> None:
    """Each side as JSON lines."""
    for rows, name in ((found.train, TRAIN_FILE), (found.test, TEST_FILE)):
        (folder / name).write_text("".join(json.dumps(dict(row.fields)) + "\n" for row in rows), encoding="utf-8")


def read_side(config: Config, path: Path) -> list[Comparison]:
    """The comparisons of one side."""
    rows = read_rows("jsonl", str(path), "--data")
    found = [judgement(row, config.preferences, config.data) for row in rows]
    return [cast(Comparison, comparison) for comparison in found]


def make(config: Config, folder: Path) -> dict[str, Any]:
    """Tokenizer, random model and the language model's texts, from the training side alone; counts of what there is.

    The texts are the better sides. Those of the last `preferences.held_out` pairs come last, where both `sft` and
    `reward` hold out, so that neither the tokenizer nor a model has seen them when training is stopped by them.
    """
    from rlhf_dist.learner.preference_learner import tokenize_judgement

    sides = {side: read_side(config, folder / name) for side, name in SIDES.items()}
    learnt = sides["train"][: -config.preferences.held_out]
    tokenizer = train_tokenizer(
        text for comparison in learnt for text in (*(m.content for m in comparison.messages), chosen(comparison))
    )
    parameters = write_model(config.model.tiny, tokenizer, folder / MODEL_FOLDER)
    (folder / TEXT_FILE).write_text(
        "".join(json.dumps({config.data.response_key: as_text(tokenizer, c)}) + "\n" for c in sides["train"])
    )
    counts: dict[str, Any] = {"vocabulary": len(tokenizer), "parameters": parameters, "pairs": {}, "too_long": {}}
    for side, comparisons in sides.items():
        rows = [tokenize_judgement(tokenizer, comparison, chat=True).rows for comparison in comparisons]
        lengths = [max(len(row.tokens) for row in pair) for pair in rows]
        counts["pairs"][side] = len(rows)
        counts["too_long"][side] = sum(length > config.preferences.max_tokens for length in lengths)
    return counts


def chosen(comparison: Comparison) -> str:
    """The better side's response."""
    return comparison.responses[comparison.pairs[0].better]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `VOCABULARY` tokens with the tiny model's special tokens and chat template.

    Of the class Qwen2Tokenizer, as which transformers and vLLM load the tokenizer of every qwen2 directory.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    from rlhf_dist.models.tokenizer import CHAT_TEMPLATE, END, PAD, ROLE_TOKENS, UNKNOWN, character_tokenizer

    backend: Any = Tokenizer(models.BPE())
    # Cut into words as Qwen2Tokenizer does, or the merges would not be those that it comes upon.
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = cast(Any, character_tokenizer()).backend_tokenizer.pre_tokenizer
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, UNKNOWN, END, *ROLE_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learnt["merges"]]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def as_text(tokenizer: PreTrainedTokenizerBase, comparison: Comparison) -> str:
    """Prompt and better response as one text: its tokens are those that the reward model reads, less the end token."""
    turns = [{"role": message.role, "content": message.content} for message in comparison.messages]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return cast(str, prompt) + chosen(comparison)


def write_model(sizes: TinyConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """A Qwen2-shaped language model of random weights, and its tokenizer; returns its parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.max_positions,
        tie_word_embeddings=True,
        # As in the tiny model: a small one with few steps learns faster from larger weights.
        initializer_range=0.04,
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        dtype="float32",
    )
    torch.manual_seed(sizes.seed)
    model = Qwen2ForCausalLM(shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


class Reader:
    """What `PreferenceLearner.evaluate` needs of an engine: raw scores, by a model that is not trained."""

    share = 0

    def __init__(self, model: Path, config: Config) -> None:
        import torch

        from rlhf_dist.models.attention import SEGMENTED
        from rlhf_dist.models.scalar import PackedScalar, check_scalar, load_scalar

        self._scalar = PackedScalar(load_scalar(model, config.model.dtype, SEGMENTED))
        check_scalar(self._scalar)
        self.device = torch.device("cpu")

    def scores(self, packed: Packed) -> torch.Tensor:
        """float32 [S], one per row: read at its last token."""
        from rlhf_dist.learner.scalar_engine import last_tokens

        return self._scalar(packed.tokens, packed.cu_seqlens, last_tokens(packed))


def score(config: Config, folder: Path, model: Path) -> HeldOutScores:
    """What the reward model `model` makes of the test pairs: the evaluation of `rlhf-dist reward`, on other pairs."""
    from rlhf_dist.learner.preference_learner import PreferenceLearner
    from rlhf_dist.models.hf import load_tokenizer

    learner = PreferenceLearner(
        cast(Any, Reader(model, config)),
        config.reward,
        [],
        read_side(config, folder / TEST_FILE),
        load_tokenizer(model),
        chat=config.data.chat,
        max_tokens=config.preferences.max_tokens,
        seed=config.seed,
        shares=1,
        micro_batch_tokens=config.learner.micro_batch_tokens,
    )
    return learner.evaluate()


def longer_is_better(comparisons: Sequence[Comparison]) -> float:
    """How many pairs a judge gets right who takes the response with more characters; equal ones count 1/2."""
    right = 0.0
    for comparison in comparisons:
        pair = comparison.pairs[0]
        better, worse = (len(comparison.responses[side]) for side in (pair.better, pair.worse))
        right += 0.5 * (1 + (better > worse) - (better < worse))
    return right


def scored(config: Config, folder: Path, run: Path) -> dict[str, Any]:
    """The test's figures, and its picture beside them: scores, calibration, accuracy over the steps (early stop)."""
    from rlhf_dist.loop.reward_report import draw, held_out_results
    from rlhf_dist.models.hf import resolve
    from rlhf_dist.telemetry.report import read_metrics

    model = Path(resolve(replace(config.model, path=str(run)), folder).path)
    found = score(config, folder, model)
    draw(found, read_metrics(run / "metrics.jsonl"), None, folder / PICTURE_FILE)
    comparisons = read_side(config, folder / TEST_FILE)
    return {
        "results": held_out_results(found),
        "pairs": found.judgements,
        "longer_is_better": longer_is_better(comparisons) / len(comparisons),
    }


def main(argv: Sequence[str]) -> None:
    """`make FOLDER` or `score FOLDER RUN`; the config is in the folder, the figures go there."""
    part, folder = argv[0], Path(argv[1])
    config = from_yaml((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if part == "make":
        (folder / MADE_FILE).write_text(json.dumps(make(config, folder)), encoding="utf-8")
    else:
        (folder / SCORED_FILE).write_text(json.dumps(scored(config, folder, Path(argv[2]))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
