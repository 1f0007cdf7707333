"""System calls that the process of a sandboxed reward may not make, as a filter for the kernel (seccomp).

Memory that belongs to no process would escape the limit on memory: what was asked for without a file, to be shared, is
there after its pages have been given back. A socket could be connected to a file that is shown, and to the host of a
virtual machine. The others are of no use to a reward.
"""

from __future__ import annotations

import errno
import os
import platform
import struct
import tempfile
from typing import IO

MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "memfd_create": 319,
            "memfd_secret": 447,
            "shmget": 29,
            "semget": 64,
            "msgget": 68,
            "ptrace": 101,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "perf_event_open": 298,
            "bpf": 321,
            "userfaultfd": 323,
            "io_uring_setup": 425,
        },
        {"chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452},
        {"mmap": 9, "socket": 41, "socketpair": 53},
    ),
    "aarch64": (
        0xC00000B7,
        {
            "memfd_create": 279,
            "memfd_secret": 447,
            "shmget": 194,
            "semget": 190,
            "msgget": 186,
            "ptrace": 117,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "perf_event_open": 241,
            "bpf": 280,
            "userfaultfd": 282,
            "io_uring_setup": 425,
        },
        {"fchmod": 52, "fchmodat": 53, "fchmodat2": 452},
        {"mmap": 222, "socket": 198, "socketpair": 199},
    ),
}
"""Kind of processor -> its number in the kernel (AUDIT_ARCH_*), those of the calls, those of more calls that a process
of the superuser may not make (devices such as /dev/null are the machine's own, and it owns them), and those of calls
that depend on an argument."""
X32 = 0x40000000
"""Added to the numbers of calls of a second kind that x86_64 has."""
LOAD, AND, EQUALS, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
"""Instructions of BPF."""
ALLOW, KILL, DENY = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16
"""Where a call's number, the processor and the arguments (8 bytes each, the low half first) are, in bytes (struct
seccomp_data)."""
SHARED_WITHOUT_FILE = 0x01 | 0x20
"""MAP_SHARED and MAP_ANONYMOUS, in both kinds of MAP_SHARED."""
FAMILIES = (2, 10, 16)
"""Of sockets: IPv4, IPv6 and netlink, which the sandbox has of its own. UNIX sockets and those of virtual machines lead
out of it."""
DATAGRAMS = 0x02
"""In SOCK_DGRAM and SOCK_RAW, which can be connected anew; pairs of SOCK_STREAM and SOCK_SEQPACKET cannot."""


def instructions(machine: str, superuser: bool) -> bytes:
    """The filter for a kind of processor; of one that is not known, a filter that allows all."""
    if machine not in MACHINES:
        return _one(RETURN, ALLOW)
    arch, calls, more, looked_at = MACHINES[machine]
    denied = sorted((calls | more if superuser else calls).values())
    rest = len(denied)
    program = [_one(LOAD, MACHINE), _one(EQUALS, arch, 1, 0), _one(RETURN, KILL), _one(LOAD, NUMBER)]
    program += _by_argument(looked_at["mmap"], 3, SHARED_WITHOUT_FILE, (SHARED_WITHOUT_FILE,), DENY, ALLOW)
    program += _by_argument(looked_at["socket"], 0, 0xFFFFFFFF, FAMILIES, ALLOW, DENY)
    program += _by_argument(looked_at["socketpair"], 1, DATAGRAMS, (DATAGRAMS,), DENY, ALLOW)
    program += [_one(AT_LEAST, X32, rest + 1, 0)]
    program += [_one(EQUALS, number, rest - place, 0) for place, number in enumerate(denied)]
    return b"".join([*program, _one(RETURN, ALLOW), _one(RETURN, DENY)])


def _by_argument(number: int, argument: int, mask: int, values: tuple[int, ...], found: int, other: int) -> list[bytes]:
    """For the call of this number: `found` where the argument, under the mask, is one of the values, else `other`."""
    body = [_one(LOAD, ARGUMENTS + 8 * argument), _one(AND, mask)]
    body += [_one(EQUALS, value, len(values) - place, 0) for place, value in enumerate(values)]
    body += [_one(RETURN, other), _one(RETURN, found)]
    return [_one(EQUALS, number, 0, len(body)), *body]


def denial() -> IO[bytes]:
    """An open file with the filter for this machine, to be read from its beginning."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    file.write(instructions(platform.machine(), os.geteuid() == 0))
    file.flush()
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    return file


def _one(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, then, otherwise, value)
