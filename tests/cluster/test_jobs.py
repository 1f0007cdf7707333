"""The client of a cluster that takes jobs; `tests/cli/test_cli_submit.py` has what is said of jobs."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_dist.cluster import jobs
from rlhf_dist.errors import InputError


def test_rays_own_lines_about_packing_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loggers have levels of their own, so that of the handler counts."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda address: address)
    handlers = logging.getLogger("ray").handlers
    before = [handler.level for handler in handlers]
    try:
        assert jobs.connect(jobs.Cluster("http://127.0.0.1:2", {})) == "http://127.0.0.1:2"
        assert handlers and all(handler.level == logging.ERROR for handler in handlers)
    finally:
        for handler, level in zip(handlers, before, strict=True):
            handler.setLevel(level)


def test_a_folder_that_is_too_large_is_bad_input() -> None:
    def refuse(**_: object) -> str:
        raise RuntimeError("Request failed with status code 413: Maximum request body size 104857600 exceeded")

    client: Any = SimpleNamespace(submit_job=refuse)
    with pytest.raises(InputError, match=r"too large to be sent, .* or name them in \.gitignore .*status code 413"):
        jobs.send(client, ["train", "run.yaml"], "", {})
