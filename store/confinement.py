"""The kernel's own read-only switch for a process that runs callers' SQL: a seccomp filter and resource limits.

DuckDB's settings alone do not hold here (1.5.5): every attached READ_ONLY database and every path in `allowed_paths` can be
overwritten with `COPY … TO … (USE_TMP_FILE false)`. File modes do not bind root, and Landlock is missing from many
kernels. A seccomp filter is there on every Linux since 3.17, containers included: it refuses each way to change a file
system, to start a program and, where no segment lies behind a URL, to open a socket.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import resource
import struct
import sys
from collections.abc import Mapping

from schemas.errors import QueryError

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1
_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC: the same numbers on both machines
_CLONE_THREAD = 0x00010000

# Numbers of (x86_64, aarch64) from the kernel's tables; None where the machine never had the call.
_SECCOMP = (317, 277)
_OPEN: dict[str, tuple[tuple[int | None, int | None], int]] = {
    "open": ((2, None), 1),
    "openat": ((257, 56), 2),
}  # and which argument holds the flags
_CHANGING: dict[str, tuple[int | None, int | None]] = {
    "creat": (85, None),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rmdir": (84, None),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_by_handle_at": (304, 265),
}
_ESCAPING: dict[str, tuple[int | None, int | None]] = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kill": (62, 129),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bind": (49, 200),
    "listen": (50, 201),
}
_ABSENT: dict[str, tuple[int, int]] = {"openat2": (437, 437), "clone3": (435, 435)}  # flags stand behind a pointer: libc falls back
_CLONE = (56, 220)
_SOCKETS: dict[str, tuple[int, int]] = {"socket": (41, 198), "connect": (42, 203)}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def confine(*, network: bool, memory_bytes: int, cpu_s: float) -> None:
    """Take from this process, all its threads and for good, what reading does not need.

    Afterwards opening a file for writing gives EROFS, starting a program EPERM and, without `network`, a socket EACCES.
    `memory_bytes` bounds the address space on top of what is mapped now; `cpu_s` is processor time from the start.

    Raises:
        QueryError: this system has no seccomp; nothing may run then.
    """
    limit(memory_bytes=memory_bytes, cpu_s=cpu_s)
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise _unconfined(f"{sys.platform} on {platform.machine()}")
    _install(_program(platform.machine(), network=network), platform.machine())


def limit(*, memory_bytes: int, cpu_s: float) -> None:
    """Resource limits: address space, processor time, no core file, and no growing file anywhere."""
    mapped = _mapped_bytes()
    for what, value in (
        (resource.RLIMIT_AS, mapped + memory_bytes),
        (resource.RLIMIT_CPU, int(cpu_s) + 1),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _mapped_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 4 << 30


def _program(machine: str, *, network: bool) -> bytes:
    """The filter as classic BPF. Every test jumps over one return, so that no jump can miss."""
    column, arch = _MACHINES[machine]
    code = [_op(_LD, _ARCH), _op(_JEQ, arch, 1, 0), _op(_RET, _KILL), _op(_LD, _NR)]
    if machine == "x86_64":
        code += [_op(_JGE, 0x40000000, 0, 1), _op(_RET, _ERRNO | errno.EPERM)]  # the x32 numbers are another door to the same calls
    refused: list[tuple[Mapping[str, tuple[int | None, int | None]], int]] = [
        (_CHANGING, errno.EROFS),
        (_ESCAPING, errno.EPERM),
        (_ABSENT, errno.ENOSYS),
    ]
    refused += [] if network else [(_SOCKETS, errno.EACCES)]
    for calls, code_number in refused:
        for number in (numbers[column] for numbers in calls.values()):
            if number is not None:
                code += [_op(_JEQ, number, 0, 1), _op(_RET, _ERRNO | code_number)]
    for numbers, argument in _OPEN.values():
        if (number := numbers[column]) is not None:
            code += _by_flags(number, argument, _WRITING, refuse_when_set=True, error=errno.EROFS)
    code += _by_flags(_CLONE[column], 0, _CLONE_THREAD, refuse_when_set=False, error=errno.EPERM)
    return b"".join([*code, _op(_RET, _ALLOW)])


def _by_flags(number: int, argument: int, mask: int, *, refuse_when_set: bool, error: int) -> list[bytes]:
    """Refuse one call by the low 32 bits of an argument, and allow it otherwise."""
    hit, miss = (0, 1) if refuse_when_set else (1, 0)
    return [
        _op(_JEQ, number, 0, 4),
        _op(_LD, _ARG0 + 8 * argument),
        _op(_JSET, mask, hit, miss),
        _op(_RET, _ERRNO | error),
        _op(_RET, _ALLOW),
    ]


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, k)


def _install(program: bytes, machine: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise _unconfined(f"prctl: {errno.errorcode.get(ctypes.get_errno(), '?')}")
    body = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(body))
    number = _SECCOMP[_MACHINES[machine][0]]
    # TSYNC: threads that the libraries started before are bound too.
    if libc.syscall(number, _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.create_string_buffer(filter_, len(filter_))) != 0:
        raise _unconfined(f"seccomp: {errno.errorcode.get(ctypes.get_errno(), '?')}")


def _unconfined(why: str) -> QueryError:
    hint = "run it on Linux (x86_64 or aarch64) with seccomp, which the usual container engines allow"
    return QueryError(f"SQL cannot be confined here: {why}", operation="start sandbox", hint=hint)
