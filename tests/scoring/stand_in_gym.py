"""A small reasoning_gym: tasks whose items, answers and scores are known, without the seconds of the real one."""

from __future__ import annotations

from pathlib import Path

FACTORY = '''
import random

from reasoning_gym.code_tasks import Sums


class Backward:
    def __init__(self, seed, size, min_word_len=3, max_word_len=5):
        assert min_word_len <= max_word_len, "max_word_len must be >= min_word_len"
        self.seed, self.lengths = seed, (min_word_len, max_word_len)

    def __getitem__(self, index):
        rng = random.Random(self.seed + index)
        word = "".join(rng.choices("abc", k=rng.randint(*self.lengths)))
        return {"question": f"Spell {word} backward", "answer": word[::-1], "metadata": {"letters": sorted(word)}}

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.25 if sorted(answer) == entry["metadata"]["letters"] else 0.0


class Few(Backward):
    """As many items as it was asked for, and no answer."""

    def __init__(self, seed, size):
        super().__init__(seed, size)
        self.size = size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        return super().__getitem__(index) | {"answer": None}


DATASETS = {"spell_backward": Backward, "few": Few, "sums": Sums}


def create_dataset(name, **settings):
    return DATASETS[name](**settings)
'''
CODE = """
class Sums:
    def __init__(self, seed, size):
        pass

    def __getitem__(self, index):
        return {"question": f"{index} + 1", "answer": str(index + 1), "metadata": {}}

    def score_answer(self, answer, entry):
        return float(eval(answer) == int(entry["answer"]))
"""


def write_library(folder: Path) -> None:
    """Write the package `reasoning_gym` into a folder."""
    package = folder / "reasoning_gym"
    package.mkdir(parents=True)
    for name, text in {"__init__": "", "factory": FACTORY, "code_tasks": CODE}.items():
        (package / f"{name}.py").write_text(text)
