"""Weights from one process to another through shared memory: layout, receipts, what is refused, what is swept."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.errors import DiskError, ResourceError, WeightSyncError
from rlhf_dist.types import Receipt
from rlhf_dist.weights import shared_memory
from rlhf_dist.weights.buckets import ALIGNMENT, make_plan
from rlhf_dist.weights.receipts import Announcement, Problem, changed_share, receipt_problem
from rlhf_dist.weights.shared_memory import WeightReader, WeightWriter, sweep

SHAPES = [("a", (4, 3), "float32"), ("b", (100,), "bfloat16"), ("scalar", (), "float32"), ("none", (0, 5), "float32")]


def tensors(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(shape, generator=generator).to(getattr(torch, dtype))) for name, shape, dtype in SHAPES]


@pytest.fixture
def writer() -> Iterator[WeightWriter]:
    made = WeightWriter(make_plan(SHAPES, bucket_bytes=100))
    yield made
    made.close()


def test_plan_by_hand() -> None:
    """48 bytes take 64, 200 take 256; a bucket closes once it holds 100 bytes."""
    plan = make_plan(SHAPES, bucket_bytes=100)
    assert [(slot.name, slot.offset, slot.nbytes) for bucket in plan.buckets for slot in bucket.slots] == [
        ("a", 0, 48),
        ("b", 64, 200),
        ("scalar", 320, 4),
        ("none", 384, 0),
    ]
    assert [(bucket.offset, bucket.nbytes) for bucket in plan.buckets] == [(0, 320), (320, 64)]
    assert plan.nbytes == 384 and plan.names == ("a", "b", "scalar", "none")


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(["float32", "bfloat16"])), max_size=20),
    st.integers(1, 500),
)
def test_slots_never_overlap_and_buckets_cover_them(sizes: list[tuple[list[int], str]], bucket_bytes: int) -> None:
    plan = make_plan([(str(i), tuple(shape), dtype) for i, (shape, dtype) in enumerate(sizes)], bucket_bytes)
    assert plan.names == tuple(str(i) for i in range(len(sizes)))
    end = 0
    for bucket in plan.buckets:
        assert bucket.offset == end
        for slot in bucket.slots:
            assert slot.offset % ALIGNMENT == 0 and slot.offset >= end
            end = slot.offset + slot.nbytes
            assert end <= bucket.offset + bucket.nbytes
        end = bucket.offset + bucket.nbytes
    assert end == plan.nbytes


def receive(announcement: Announcement) -> list[tuple[str, torch.Tensor]]:
    with closing(WeightReader().take(announcement)) as lease:
        return [(name, tensor.clone()) for name, tensor in lease.tensors()]


def test_what_was_written_is_read_bit_for_bit(writer: WeightWriter) -> None:
    found = receive(writer.write(1, tensors()))
    for (name, tensor), (expected_name, expected) in zip(found, tensors(), strict=True):
        assert name == expected_name and tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def read_elsewhere(announcement: Announcement, answers: multiprocessing.Queue) -> None:
    answers.put([(name, tensor.float().tolist()) for name, tensor in receive(announcement)])


def test_another_process_reads_it(writer: WeightWriter) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=read_elsewhere, args=(writer.write(1, tensors()), answers))
    process.start()
    assert answers.get(timeout=60) == [(name, tensor.float().tolist()) for name, tensor in tensors()]
    process.join(30)


def test_one_reader_follows_the_versions(writer: WeightWriter) -> None:
    reader = WeightReader()
    for version in (1, 2, 3):
        with closing(reader.take(writer.write(version, tensors(version)))) as lease:
            for (_, tensor), (_, expected) in zip(lease.tensors(), tensors(version), strict=True):
                assert torch.equal(tensor, expected)


def test_a_version_stays_as_it_is_while_the_next_is_written(writer: WeightWriter) -> None:
    first, second = writer.write(1, tensors(1)), writer.write(2, tensors(2))
    assert {first.offset, second.offset} == {0, second.offset}
    for version, announcement in ((1, first), (2, second)):
        assert all(torch.equal(t, e) for (_, t), (_, e) in zip(receive(announcement), tensors(version), strict=True))
    writer.write(3, tensors(3))
    assert torch.equal(receive(second)[0][1], tensors(2)[0][1]), "the older of the two was taken"


def test_a_buffer_is_used_again_when_no_reader_holds_it(writer: WeightWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = [WeightReader(), WeightReader()]
    first = writer.write(1, tensors(1))
    held = readers[0].take(first)
    assert writer.write(2, tensors(2)).offset != first.offset
    third = writer.write(3, tensors(3))
    assert third.offset != first.offset, "a reader holds the older one"
    assert torch.equal(held.tensors()[0][1], tensors(1)[0][1])
    also_held = readers[1].take(third)
    monkeypatch.setattr(shared_memory, "READERS_LIMIT_S", 0.05)
    with pytest.raises(WeightSyncError, match=r"both copies of the weights are still being read after 0\.05 s; .*none"):
        writer.write(4, tensors(4))
    held.close()
    held.close()
    assert writer.write(4, tensors(4)).offset == first.offset
    also_held.close()


def hold_a_version(announcement: Announcement, taken: multiprocessing.Queue) -> None:
    lease = WeightReader().take(announcement)
    taken.put(lease.hashes)
    time.sleep(600)


def test_a_reader_that_is_killed_holds_nothing_and_one_that_hangs_is_named(
    writer: WeightWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("spawn")
    first, second = writer.write(1, tensors(1)), writer.write(2, tensors(2))
    taken = context.Queue()
    process = context.Process(target=hold_a_version, args=(first, taken))
    process.start()
    try:
        assert taken.get(timeout=60) == first.hashes
        monkeypatch.setattr(shared_memory, "READERS_LIMIT_S", 0.05)
        with closing(WeightReader().take(second)), pytest.raises(WeightSyncError, match=rf"open: {process.pid}$"):
            writer.write(3, tensors(3))
    finally:
        process.kill()
        process.join(30)
    assert writer.write(3, tensors(3)).offset == first.offset


def test_a_reader_that_comes_too_late_refuses(writer: WeightWriter) -> None:
    """The buffer holds a later version already: every bucket's hash is another one."""
    old = writer.write(1, tensors(1))
    writer.write(2, tensors(2))
    writer.write(3, tensors(3))
    with pytest.raises(
        WeightSyncError, match=r"version 1: bucket 0 arrived as .* was announced as .*; nothing was loaded"
    ):
        receive(old)


def test_a_reader_that_comes_while_the_buffer_is_written_refuses(writer: WeightWriter) -> None:
    old = writer.write(1, tensors(1))
    writer.write(2, tensors(2))

    def late() -> Iterator[tuple[str, torch.Tensor]]:
        with pytest.raises(WeightSyncError, match="version 1: a later version is being written in its place"):
            receive(old)
        yield from tensors(3)

    assert receipt_of(writer.write(3, late())) is None


def receipt_of(announcement: Announcement) -> Problem | None:
    """What is wrong after an honest load."""
    loaded = {name: tensor.numel() for name, tensor in receive(announcement)}
    return receipt_problem(announcement, Receipt("w", announcement.version, announcement.hashes, loaded))


@pytest.mark.parametrize(("byte", "bucket"), [(0, 0), (321, 1)])
def test_a_damaged_bucket_is_refused_before_any_is_handed_out(writer: WeightWriter, byte: int, bucket: int) -> None:
    announcement = writer.write(1, tensors())
    writer._map[announcement.offset + byte] ^= 1
    with pytest.raises(WeightSyncError, match=f"bucket {bucket}"):
        WeightReader().take(announcement)
    assert [writer.write(version, tensors()).version for version in (2, 3)] == [2, 3], "it holds nothing"


def test_receipts(writer: WeightWriter) -> None:
    announcement = writer.write(4, tensors())
    loaded = {"a": 12, "b": 100, "scalar": 1}
    good = Receipt("rollout worker 1", 4, announcement.hashes, loaded)
    assert receipt_problem(announcement, good) is None
    for wrong, broken, parts in (
        (replace(good, version=3), False, ["rollout worker 1, version 4", "for version 3"]),
        (replace(good, hashes=("0" * 32, *good.hashes[1:])), False, ["bucket 0 arrived as 000", good.hashes[0]]),
        (replace(good, hashes=good.hashes[:1]), False, ["1 buckets received, 2 sent"]),
        (replace(good, loaded=loaded | {"b": 99}), True, ["its engine loaded 99 of 100 elements of b"]),
        (replace(good, loaded={"b": 100}), True, ["loaded 0 of 12 elements of a (and not all of 1 others)"]),
        (replace(good, unfilled=("qkv", "norm")), True, ["reports 2 parameters as not loaded whole, first qkv"]),
    ):
        problem = receipt_problem(announcement, wrong)
        assert problem is not None and problem.broken == broken
        assert all(part in problem.text for part in parts), problem


def test_changed_share_by_hand(writer: WeightWriter) -> None:
    first = writer.write(1, tensors())
    assert changed_share((), first) == 1.0, "nothing came before"
    assert changed_share(first.hashes, writer.write(2, tensors())) == 0.0
    moved = [(name, tensor + 1 if name == "scalar" else tensor) for name, tensor in tensors()]
    assert changed_share(first.hashes, writer.write(3, moved)) == 64 / 384


def test_parameters_out_of_order_are_a_mistake_of_ours(writer: WeightWriter) -> None:
    with pytest.raises(AssertionError, match="b came where a was planned"):
        writer.write(1, tensors()[1:])


def test_too_small_shared_memory_is_an_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for size, told in ((2**21, "16 MiB"), (2**10, "8 KiB")):
        with pytest.raises(DiskError, match=rf": {told} for two copies of the weights: No space left on .*--shm-size"):
            WeightWriter(make_plan([("a", (size,), "float32")], 2**20))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("need", "free_blocks", "told"),
    [
        (5 * 2**19 + 1, 512, r"need 6 MiB for two copies of the weights, and 2 MiB are free; .*--shm-size"),
        (100, 0, r"need 1 KiB for two copies of the weights, and 0 KiB are free"),
        (3 * 2**29, 3 * 2**18 - 1, r"need 3,072 MiB for two copies of the weights, and 3,071 MiB are free"),
    ],
)
def test_shared_memory_without_room_is_told_before_the_start_in_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, need: int, free_blocks: int, told: str
) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free_blocks, f_frsize=4096))
    with pytest.raises(ResourceError, match=told):
        shared_memory.require_room(need)
    shared_memory.require_room(free_blocks * 2048)


def test_shared_memory_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path / "none")
    with pytest.raises(ResourceError, match="none: shared memory cannot be used: No such file or directory"):
        shared_memory.require_room(1)


def test_close_removes_the_file_and_maps_stay_valid(writer: WeightWriter) -> None:
    announcement = writer.write(1, tensors())
    reader = WeightReader()
    lease = reader.take(announcement)
    writer.close()
    assert not writer.path.exists()
    assert torch.equal(lease.tensors()[0][1], tensors()[0][1])
    lease.close()


def test_only_this_user_may_read_the_file_and_its_name_cannot_be_guessed(writer: WeightWriter) -> None:
    assert stat.S_IMODE(writer.path.stat().st_mode) == 0o600
    assert re.fullmatch(rf"rlhf_dist-{os.getuid()}-[0-9a-f]{{16}}\.weights", writer.path.name)


def test_a_file_that_is_there_already_is_never_written_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / f"rlhf_dist-{os.getuid()}-guessed.weights").symlink_to(theirs)
    monkeypatch.setattr(shared_memory, "sweep", lambda folder: None)
    with pytest.raises(DiskError, match="File exists"):
        WeightWriter(make_plan(SHAPES, 100))
    assert theirs.read_text() == "theirs"


def hold_a_file(folder: Path, names: multiprocessing.Queue, stay: bool) -> None:
    shared_memory.SHARED_MEMORY = folder
    held = WeightWriter(make_plan(SHAPES, 100))
    names.put(held.path.name)
    if stay:
        time.sleep(600)
    names.close()
    names.join_thread()
    os._exit(0)  # Without a word, as one that is killed.


def test_files_of_the_dead_are_swept_and_those_of_the_living_and_of_others_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    names = context.Queue()
    alive = context.Process(target=hold_a_file, args=(tmp_path, names, True))
    alive.start()
    try:
        kept = [names.get(timeout=60)]
        dead = context.Process(target=hold_a_file, args=(tmp_path, names, False))
        dead.start()
        swept = names.get(timeout=60)
        dead.join(30)
        assert (tmp_path / swept).exists(), "it was left behind"
        mine = WeightWriter(make_plan(SHAPES, 100))
        kept += [mine.path.name, f"rlhf_dist-{os.getuid() + 1}-7f.weights", "somebody-elses.weights"]
        for name in kept[2:]:
            (tmp_path / name).touch()
        sweep(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
        mine.close()
        mine.close()
    finally:
        alive.kill()
        alive.join(30)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept[2:]), "a lock goes with its process"


def test_a_folder_that_was_written_after_its_run_is_swept_and_that_of_a_run_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    kept, lock = shared_memory.private_folder()
    late = tmp_path / f"{shared_memory.PREFIX}{os.getuid()}-7f{shared_memory.STATE}"
    (late / "step-2.copy").mkdir(parents=True)
    (kept / "step-2").mkdir()
    with lock:
        sweep(tmp_path)
        assert (kept / "step-2").exists() and not late.exists()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_another_process_sweeps_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that start at once: the one sweeps while the other has made its file and not locked it yet."""
    lock, swept = fcntl.flock, list[Path]()

    def late(file: Any, how: int) -> None:
        if not swept:
            swept.append(path)
            with path.open("rb") as other:
                lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        lock(file, how)

    path = tmp_path / f"{shared_memory.PREFIX}{os.getuid()}-a.weights"
    monkeypatch.setattr(fcntl, "flock", late)
    with shared_memory.private_file(path, 100) as file:
        assert swept == [path] and os.fstat(file.fileno()).st_ino == path.stat().st_ino
        shared_memory.sweep(tmp_path)
        assert path.exists(), "it is locked"
    shared_memory.sweep(tmp_path)
    assert not path.exists()
