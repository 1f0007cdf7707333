"""A tokenizer from the files of a Hugging Face directory, or by its hub name."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_dist.errors import ModelError
from rlhf_dist.models.model_config import unloadable
from rlhf_dist.models.model_files import check_large_files, check_small_files, is_there

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory or hub name. Raises ModelError when there is none that loads."""
    if Path(path).is_dir() and True not in [is_there(Path(path) / name) for name in TOKENIZER_FILES]:
        # transformers would make an empty tokenizer of the model's class
        raise ModelError(
            f"{path}: has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the files of its base model there"
        )
    if Path(path).is_dir():
        check_small_files(Path(path))
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # Here only transformers runs, and what its tokenizers raise has no common type.
        if Path(path).is_dir():
            check_large_files(Path(path))
        raise unloadable(path, "tokenizer", error) from error
