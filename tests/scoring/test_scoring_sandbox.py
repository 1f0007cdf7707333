"""A reward's process in a sandbox: what it tries comes to nothing, and the run says what it was."""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import RewardError
from rlhf_dist.scoring import sandbox as sandboxes
from rlhf_dist.scoring.function import FunctionReward
from rlhf_dist.scoring.pattern import PatternReward
from rlhf_dist.scoring.process_tree import below
from rlhf_dist.scoring.sandbox import linux_version, sandbox_problem

NPROC = resource.RLIMIT_NPROC
NO_SANDBOX = sandbox_problem()
in_sandbox = pytest.mark.skipif(bool(NO_SANDBOX), reason=f"no sandbox on this machine: {NO_SANDBOX}")

MODULE = r"""
import asyncio, ctypes, mmap, multiprocessing, os, resource, signal, socket, stat, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory

def connects(family, address):
    with socket.socket(family) as client:
        client.settimeout(2)
        client.connect(address)

def has(found):
    if not found:
        raise OSError("not there")

def tries(prompts, responses, answers):
    "1 for each try that succeeds."
    given = dict(zip(responses, answers))
    def one(what):
        value = given[what]
        if what.startswith("read"):
            has("SECRET" in open(value).read())
        elif what.startswith("write"):
            open(value, "a").close()
        elif what == "tcp":
            connects(socket.AF_INET, ("127.0.0.1", int(value)))
        elif what == "abstract socket":
            connects(socket.AF_UNIX, "\0" + value)
        elif what.startswith("socket file"):
            connects(socket.AF_UNIX, value)
        elif what == "datagram":
            for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
                end.sendto(b"x", value)
        elif what == "the host of this machine":
            socket.socket(socket.AF_VSOCK).close()
        elif what == "environment":
            has("SECRET" in str(os.environ) + open("/proc/self/environ").read())
        elif what == "another process":
            open(value, "rb").read()
        elif what == "signal":
            os.kill(int(value), 0)
        elif what == "switch":
            open(value, "r+").close()
        elif what == "device":
            os.chmod(value, stat.S_IMODE(os.stat(value).st_mode))
        elif what == "hidden memory":
            os.close(os.memfd_create("x"))
        elif what == "memory of a queue":
            system = ctypes.CDLL(None)
            has((queue := system.msgget(0, 0o600)) >= 0)
            system.msgctl(queue, 0, None)  # away with it
        elif what == "memory that is shared without a file":
            mmap.mmap(-1, 1 << 20).close()
        elif what == "memory of a device":
            with open(value, "r+b") as file:
                mmap.mmap(file.fileno(), 1 << 20).close()
        elif what == "namespace":
            subprocess.run(["unshare", "--user", "true"], check=True, stderr=subprocess.DEVNULL)
    def tried(what):
        try:
            one(what)
        except (OSError, subprocess.CalledProcessError):
            return 0.0
        return 1.0
    return [tried(what) for what in responses]

def scratch(prompts, responses, answers):
    "Bytes that can be written."
    os.makedirs(os.path.expanduser("~/mine"))
    written = 0
    try:
        for number in range(10):
            with open(f"{prompts[0]}/{number}", "wb", buffering=0) as file:
                for _ in range(50):
                    written += file.write(bytes(1 << 20))
    except OSError:
        pass
    return [float(written)]

def one_block(prompts, responses, answers):
    return [float(len(bytearray(10 << 30)))]

def many_blocks(prompts, responses, answers):
    for _ in range(4):
        if os.fork() == 0:
            block = bytearray(b"x" * (150 << 20))
            time.sleep(60)
    time.sleep(60)

def processes(prompts, responses, answers):
    for _ in range(1500):  # one after another: a bomb would take the machine from all other tests for a moment
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    time.sleep(60)

def leaves_one(prompts, responses, answers):
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    return [1.0 for _ in responses]

def kills_all(prompts, responses, answers):
    for pid in (os.getppid(), 1, -1):
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    return [1.0 for _ in responses]

def crashes(prompts, responses, answers):
    os.kill(os.getpid(), signal.SIGSEGV)

def exits(prompts, responses, answers):
    os._exit(7)

def hangs(prompts, responses, answers):
    os.fork()
    while True:
        pass

def prints(prompts, responses, answers):
    print("begin", os.readlink("/proc/self/fd/1"), flush=True)
    for _ in range(100):
        print("x" * 10_000)
    return [1.0 for _ in responses]

def uses_others(prompts, responses, answers):
    import numpy
    import helper
    said = subprocess.run([sys.executable, "-c", "print(3)"], capture_output=True, check=True).stdout
    return [float(numpy.float32(helper.VALUE) + int(said)) for _ in responses]

async def uses_processes(prompts, responses, answers):
    words = (sys.executable, "-c", "print(int(input()) + open('/dev/zero', 'rb').read(1)[0])")
    process = await asyncio.create_subprocess_exec(*words, stdin=-1, stdout=-1)
    said = int((await process.communicate(b"1"))[0])
    memory = SharedMemory(create=True, size=1 << 20)
    memory.buf[0] = 10
    with multiprocessing.Pool(1) as pool:
        (most,) = pool.map(abs, [-100])
    value = multiprocessing.Value("i", 1000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        connects(socket.AF_INET, server.getsockname())
    private = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    total = said + memory.buf[0] + most + value.value + private[0]
    memory.close()
    memory.unlink()
    return [float(total), float(resource.getrlimit(resource.RLIMIT_NPROC)[0])]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the functions; `home` and `run` are beside it."""
    for name in ("here", "home", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "mine.py").write_text(MODULE)
    (tmp_path / "here" / "helper.py").write_text("VALUE = 2\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "here"


def call(function: str, sandbox: bool = True, timeout_s: float = 30.0, **given: list[str]) -> list[float]:
    spec = RewardSpec(
        kind="function", function=f"mine:{function}", sandbox=sandbox, timeout_s=timeout_s, memory_mib=400
    )
    reward = FunctionReward("judge", spec)
    try:
        said = {"prompts": ["p"], "responses": ["r"], "answers": ["a"]} | given
        return reward(said["prompts"], said["responses"], said["answers"]).tolist()
    finally:
        reward.close()


@pytest.fixture
def tries(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What a function may try -> on what. Each succeeds without a sandbox."""
    monkeypatch.setenv("WANDB_API_KEY", "SECRET")
    secret = tmp_path / "home" / ".netrc"
    secret.write_text("password SECRET")
    (here / "link").symlink_to(secret)
    shared = Path("/dev/shm") / f"sandbox-test-{os.getpid()}"
    shared.write_text("SECRET")
    with ExitStack() as open_ones:
        unix = [open_ones.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        for one, name in zip(unix, (f"\0sandbox-test-{os.getpid()}", str(tmp_path / "s"), "s"), strict=True):
            one.bind(name)
            one.listen()
        tcp = open_ones.enter_context(socket.create_server(("127.0.0.1", 0)))
        open_ones.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind("d")
        yield {
            "read a file": str(secret),
            "read by a link": "link",
            "read shared memory": str(shared),
            "another process": f"/proc/{os.getpid()}/environ",
            "read through a root": f"/proc/{os.getpid()}/root{secret}",
            "write into the run": str(tmp_path / "run" / "metrics.jsonl"),
            "write beside the function": str(here / "new"),
            "write over the function": str(here / "mine.py"),
            "tcp": str(tcp.getsockname()[1]),
            "abstract socket": f"sandbox-test-{os.getpid()}",
            "socket file": str(tmp_path / "s"),
            "socket file in the current directory": "s",
            "datagram": "d",
            **({"the host of this machine": ""} if has_vsock() else {}),
            "environment": "",
            "signal": str(os.getpid()),
            "hidden memory": "",
            "memory of a queue": "",
            "memory that is shared without a file": "",
            "memory of a device": "/dev/zero",
            **({"write into Python": f"{sys.prefix}/sandbox-test"} if os.access(sys.prefix, os.W_OK) else {}),
            **({"switch": "/proc/sys/kernel/core_pattern", "device": "/dev/null"} if os.geteuid() == 0 else {}),
        }
    shared.unlink()
    Path(f"{sys.prefix}/sandbox-test").unlink(missing_ok=True)


def has_vsock() -> bool:
    """Whether this machine knows sockets between virtual machines and their host."""
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError:
        return False
    return True


@in_sandbox
def test_what_a_function_tries_comes_to_nothing(tries: dict[str, str]) -> None:
    responses = [*tries, "namespace"]
    found = call("tries", responses=responses, answers=[*tries.values(), ""], prompts=["p"] * len(responses))
    assert dict(zip(responses, found, strict=True)) == dict.fromkeys(responses, 0.0)


def test_without_a_sandbox_each_of_them_succeeds(tries: dict[str, str]) -> None:
    found = call("tries", sandbox=False, responses=[*tries], answers=[*tries.values()], prompts=["p"] * len(tries))
    assert dict(zip(tries, found, strict=True)) == dict.fromkeys(tries, 1.0)


@in_sandbox
def test_a_function_does_its_work_with_libraries_its_own_modules_and_programs(here: Path) -> None:
    assert call("uses_others", responses=["a", "b"]) == [5.0, 5.0]
    most = sandboxes.PROCESSES if linux_version(os.uname().release) >= (5, 14) else resource.getrlimit(NPROC)[0]
    assert call("uses_processes", responses=["a", "b"]) == [1111.0, float(most)]


@in_sandbox
def test_a_lower_limit_of_the_user_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(sandboxes, "OPEN_FILES", most + 1)
    assert call("uses_others") == [5.0]


@in_sandbox
@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])
def test_files_have_a_limit(here: Path, place: str) -> None:
    assert 50 << 20 <= call("scratch", prompts=[place])[0] <= sandboxes.SCRATCH_BYTES


@in_sandbox
def test_memory_has_a_limit(here: Path) -> None:
    with pytest.raises(RewardError, match=r"mine:one_block\) raised MemoryError at .*mine\.py"):
        call("one_block")
    with pytest.raises(RewardError, match=r"ended its process \(it used more than 400 MiB of memory\) in a call"):
        call("many_blocks")


@in_sandbox
def test_processes_have_a_limit(here: Path, monkeypatch: pytest.MonkeyPatch, before: set[int]) -> None:
    monkeypatch.setattr(sandboxes, "THREADS", 40)
    with pytest.raises(RewardError, match=r"ended its process \(it had more than 40 threads\)"):
        call("processes")
    assert gone(before)


@pytest.fixture
def before() -> set[int]:
    """Processes that other tests have left."""
    return set(below(os.getpid()))


def gone(before: set[int]) -> bool:
    """Whether no process is left below this one but those that were there."""
    end = time.monotonic() + 10.0
    while time.monotonic() < end:
        if not {pid for pid in below(os.getpid()) if b"child_main" in command(pid)} - before:
            return True
        time.sleep(0.02)
    return False


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@in_sandbox
@pytest.mark.parametrize("function", ["leaves_one", "kills_all"])
def test_nothing_is_left_and_nothing_else_is_killed(here: Path, function: str, before: set[int]) -> None:
    if function == "leaves_one":
        assert call(function) == [1.0]
    else:
        with pytest.raises(RewardError, match=r"ended its process|raised"):
            call(function)
    assert gone(before)


@in_sandbox
def test_how_it_ended_is_told(here: Path, before: set[int]) -> None:
    with pytest.raises(RewardError, match=r"ended its process \(signal SIGSEGV\)"):
        call("crashes")
    with pytest.raises(RewardError, match=r"ended its process \(exit code 7\)"):
        call("exits")
    with pytest.raises(RewardError, match=r"did not return within 0\.3 s"):
        call("hangs", timeout_s=0.3)
    assert gone(before)


@in_sandbox
def test_what_it_prints_is_shown_and_has_a_limit(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandboxes, "OUTPUT_BYTES", 100_000)
    assert call("prints") == [1.0]
    shown = ""
    end = time.monotonic() + 10.0
    while "more than is shown" not in shown and time.monotonic() < end:
        shown += capfd.readouterr().err
        time.sleep(0.01)
    assert shown.startswith("begin pipe:") and shown.endswith("[a reward printed more than is shown]\n")
    assert len(shown) < 101_000


@in_sandbox
def test_patterns_are_matched_in_a_sandbox_too(here: Path) -> None:
    reward = PatternReward("form", RewardSpec(kind="regex", pattern="a+", sandbox=True))
    try:
        assert reward(["aa", "b"]).tolist() == [1.0, 0.0]
        assert any(b"bwrap" in command(pid) for pid in below(os.getpid()))
    finally:
        reward.close()
