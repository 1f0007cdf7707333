"""Bubblewrap around the process of a reward: what it can see of this machine, and how much it may use.

docs/security.md says what this defends against, and what it does not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import rlhf_dist
from rlhf_dist.config.bubblewrap import BWRAP, bubblewrap_problem
from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import ConfigError
from rlhf_dist.scoring.process_tree import below
from rlhf_dist.scoring.system_calls import denial

SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/alternatives",
)
"""Programs and libraries; of /etc nothing else."""
WIDE = frozenset(
    Path("/", part)
    for part in (
        *("boot", "dev", "dev/shm", "etc", "home", "media", "mnt", "proc", "root", "run", "run/shm", "run/user"),
        *("sys", "tmp", "tmp/ray", "var", "var/lib", "var/log", "var/run", "var/tmp"),
    )
)
"""Folders that belong to no one project: others' files, the machine's, weights in shared memory, Ray's sessions."""
TEMPORARY = ("RAY_TMPDIR", "TMPDIR")
"""Variables that name the folder of Ray's session, with its logs and sockets."""
PASSED = ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "OMP_NUM_THREADS", "PYTHONHASHSEED")
"""Of the environment nothing else: it may hold keys and tokens."""
SCRATCH = "/tmp"
SCRATCH_BYTES = 64 << 20
"""Of all files in /tmp together, and of those in /dev/shm; of one file, too."""
OPEN_FILES = 256
THREADS = 1024
"""Of all its processes together; each has one at least."""
PROCESSES = 2 * THREADS
"""And threads, by the kernel's own limit, which the superuser does not have. Above ours, so that ours is reported."""
COUNTED_APART = (5, 14)
"""The version of Linux from which a sandbox's processes are counted separately from the user's others."""
OUTPUT_BYTES = 4 << 20
"""Of what it prints in all; the rest is thrown away."""
WATCH_S = 0.1
"""Between two checks of its processes."""
TRY_LIMIT_S = 20.0
APART = (
    *("--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
    *("--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
    *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
)


class Sandbox:
    """For one process, with all that it starts."""

    def __init__(self, memory_mib: int) -> None:
        """`memory_mib`: that they may use together."""
        self._memory = memory_mib << 20
        self.broken = ""
        """The limit that they broke, for which they were killed, as in `it had more than 1024 threads`."""

    def limits(self) -> dict[str, int]:
        """What the process has to set for itself before it runs anything; see `child_main`."""
        limits = {"DATA": self._memory, "NOFILE": OPEN_FILES, "FSIZE": SCRATCH_BYTES, "CORE": 0}
        return limits | ({"NPROC": PROCESSES} if linux_version(os.uname().release) >= COUNTED_APART else {})

    def start(self, words: Sequence[str], channel: int) -> subprocess.Popen[bytes]:
        """Start a command of this Python, with the descriptor `channel`. What it prints comes to our standard error.

        Raises OSError, and ConfigError where it would see too much.
        """
        with denial() as filtered:
            process = subprocess.Popen(
                enclosed(words, filtered.fileno()),
                stdin=subprocess.DEVNULL,
                # Pipes: a log file could be reopened through /proc/self/fd, and truncated.
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(channel, filtered.fileno()),
                start_new_session=True,
                env=environment(),
            )
        for body in (self._show, self._watch):
            threading.Thread(target=body, args=(process,), daemon=True, name="sandbox").start()
        return process

    def _show(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        left = OUTPUT_BYTES
        with process.stdout as output:
            while part := os.read(output.fileno(), 1 << 16):
                if left > 0:
                    with suppress(OSError):
                        os.write(2, part[:left])
                        if left <= len(part):
                            os.write(2, b"\n[a reward printed more than is shown]\n")
                left -= len(part)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        page, over = os.sysconf("SC_PAGE_SIZE"), threading.Event()
        while process.poll() is None:
            pids = below(process.pid, THREADS)
            threads, pages = used(pids[: THREADS + 1])
            if threads > THREADS:
                self.broken = f"it had more than {THREADS} threads"
            elif pages * page > self._memory and proportional(pids) > self._memory:
                self.broken = f"it used more than {self._memory >> 20} MiB of memory"
            if self.broken:
                process.kill()  # and all below it die with it
                return
            over.wait(WATCH_S)


def sandbox_of(spec: RewardSpec) -> Sandbox | None:
    """What a process of the reward is enclosed in; None where it is not to be."""
    return Sandbox(spec.memory_mib) if spec.sandbox else None


def require_sandbox(rewards: Mapping[str, RewardSpec]) -> None:
    """Raise ConfigError where a reward needs a sandbox and none can be made on this machine."""
    name = next((name for name, spec in rewards.items() if spec.sandbox), None)
    if name is not None and (problem := sandbox_problem()):
        raise ConfigError(
            f"scoring.rewards.{name}.sandbox is true, and {problem}; or set it to false to run the reward without a "
            "sandbox"
        )


def linux_version(release: str) -> tuple[int, ...]:
    """`6.1.0-13-amd64` -> (6, 1); of what begins otherwise, nothing."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return tuple(map(int, found.groups())) if found else ()


def used(pids: Iterable[int]) -> tuple[int, int]:
    """(threads, pages in memory) of these processes together; a page that several share counts for each."""
    threads = pages = 0
    for pid in pids:
        with suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            threads += int(fields[17])
            pages += int(fields[21])
    return threads, pages


def proportional(pids: Iterable[int]) -> int:
    """Bytes in memory of these processes together; a page that several share counts once. Takes long."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def environment() -> dict[str, str]:
    """Of the process."""
    kept = {name: os.environ[name] for name in PASSED if name in os.environ}
    own = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": SCRATCH, "TMPDIR": SCRATCH, "USER": "nobody"}
    return kept | own | {"PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def enclosed(words: Sequence[str], filtered: int) -> list[str]:
    """The command inside a sandbox. `filtered`: descriptor of its filter. Raises ConfigError for too wide a view."""
    here = os.getcwd()
    scratch = [word for place in (SCRATCH, "/dev/shm") for word in ("--size", str(SCRATCH_BYTES), "--tmpfs", place)]
    # /proc too: its switches of the whole machine (/proc/sys) are the superuser's to set, here as well as outside.
    fixed = [word for place in ("/proc", "/dev", "/") for word in ("--remount-ro", place)]
    # What maps /dev/zero to share it has memory that is not counted; /dev/full reads the same and cannot be mapped.
    devices = ["--dev", "/dev", "--dev-bind", "/dev/full", "/dev/zero"]
    seen = [*SYSTEM, sys.executable, sys.prefix, sys.base_prefix, *rlhf_dist.__path__, here]
    seen += [entry for entry in sys.path if entry]
    opened = ["--proc", "/proc", *devices, *scratch, *view(seen), *fixed]
    return [shutil.which(BWRAP) or BWRAP, *APART, "--seccomp", str(filtered), *opened, "--chdir", here, "--", *words]


def view(paths: Iterable[str]) -> list[str]:
    """What shows these files and directories at their own places, to read; links on the way to them stay links."""
    shown: set[Path] = set()
    links: dict[Path, str] = {}
    for path in dict.fromkeys(paths):
        if os.path.exists(path):
            _follow(Path(path).absolute(), shown, links)
    for path in shown:
        _require_narrow(path)
    roots = sorted(path for path in shown if not shown & set(path.parents))
    words = [word for root in roots for word in ("--ro-bind", str(root), str(root))]
    for link, target in sorted(links.items()):
        if not set(roots) & set(link.parents):
            words += ["--symlink", target, str(link)]
    return words


def _follow(path: Path, shown: set[Path], links: dict[Path, str]) -> None:
    """Add what the path leads to, and each link on the way."""
    here = Path("/")
    for place, part in enumerate(path.parts[1:], 2):
        step = here.parent if part == ".." else here / part
        if step.is_symlink():
            links[step] = os.readlink(step)
            return _follow((here / links[step]).joinpath(*path.parts[place:]), shown, links)
        here = step
    shown.add(here)
    return None


def _require_narrow(path: Path) -> None:
    home = Path(os.path.expanduser("~")).resolve()
    kept = {name: Path(os.environ[name]).resolve() for name in TEMPORARY if os.environ.get(name)}
    inside = next((name for name, folder in kept.items() if path in (folder, *folder.parents)), "")
    if path in WIDE or path in (home, *home.parents):
        shows = f"all of {path}"
    elif inside:
        shows = f"{kept[inside]}, the run's folder for temporary files ({inside})"
    else:
        return
    raise ConfigError(
        f"a sandbox would show {shows}, because the current directory or an entry of PYTHONPATH is {path}; "
        "run the command in a directory of its own, with the function's files and no secrets"
    )


def sandbox_problem() -> str:
    """Why no sandbox can be made on this machine, with the way out; empty: one was made."""
    if problem := bubblewrap_problem():
        return problem
    bwrap = shutil.which(BWRAP)
    try:
        with denial() as filtered:
            done = subprocess.run(
                enclosed([sys.executable, "-P", "-c", ""], filtered.fileno()),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=(filtered.fileno(),),
                env=environment(),
                timeout=TRY_LIMIT_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return f"{bwrap} did not come to an end within {TRY_LIMIT_S:g} s"
    except OSError as error:
        return f"{bwrap} cannot be started: {error.strerror}"
    except ConfigError as error:
        return str(error)
    if not done.returncode:
        return ""
    said = " ".join(done.stderr.decode(errors="replace").split())[:300] or f"exit code {done.returncode}"
    return (
        f"{bwrap} cannot make a sandbox here ({said}): it has to be version 0.8 or later; user namespaces may be "
        "forbidden (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
        "kernel.apparmor_restrict_unprivileged_userns), and a container has to allow them, and mounts"
    )
