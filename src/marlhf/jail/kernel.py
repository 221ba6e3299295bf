"""Confinement by Linux, through ctypes: namespaces, mounts, capabilities, seccomp.

All functions raise OSError where the system refuses.
"""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import re
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET, _NEWCGROUP = (
    *(0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x02000000),
)
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = (
    *(0x1, 0x2, 0x4, 0x8, 0x20, 0x1000, 0x4000, 0x40000),
)
_MNT_DETACH = 2
_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _CAPBSET_DROP, _SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_CAPABILITY_VERSION_3 = 0x20080522
_NOBODY = 65534

# System calls denied to programs: numbers on x86-64 and arm64 (None: does not exist there).
_DENIED = {
    # other processes: signals, debugging
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "get_robust_list": (274, 100),
    "ioprio_set": (251, 30),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    # new processes and programs; `clone` is judged by its flags, since threads are allowed
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # the network (abstract sockets are reachable from `socketpair` too), and new namespaces
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "unshare": (272, 97),
    "setns": (308, 268),
    # memory that the limit on the address space does not count
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "mq_open": (240, 180),
    # large parts of the kernel that no program under test needs
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    # a program could use it to outlive the process that watches it
    "prctl": (157, 167),
    # files of the host: locks that block it, notifications of its accesses, names of its mounts
    "flock": (73, 32),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # any number of timers
    "timer_create": (222, 107),
    # calls of the superuser, whom the weak sandbox does not demote
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "vhangup": (153, 58),
}
# System calls judged by their arguments: numbers, and conditions that must all hold, each with an
# argument's index and the only values allowed ("only"), values denied ("not"), or bits denied
# ("without"). SELF is the program's process.
SELF = -1
_JUDGED = {
    # limits and priorities of other processes
    "prlimit64": ((302, 261), [(0, "only", (0, SELF))]),
    "setpriority": ((141, 140), [(0, "only", (0,)), (1, "only", (0, SELF))]),
    "sched_setaffinity": ((203, 122), [(0, "only", (0, SELF))]),
    "sched_setparam": ((142, 118), [(0, "only", (0, SELF))]),
    "sched_setscheduler": ((144, 119), [(0, "only", (0, SELF))]),
    "sched_setattr": ((314, 274), [(0, "only", (0, SELF))]),
    # signals through a file: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY; memory in
    # pipes: F_SETPIPE_SZ
    "fcntl": ((72, 25), [(1, "not", (8, 10, 15, 1024, 1026, 1031))]),
    # allowed are queries of a terminal or stream, and settings of its blocking and inheritance;
    # others signal, write a terminal's input or reach devices
    "ioctl": (
        (16, 29),
        [(1, "only", (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A))],
    ),
    # datagrams to an address; `send` has none
    "sendto": ((44, 206), [(4, "only", (0,)), (4.5, "only", (0,))]),
    # devices: S_IFCHR and S_IFBLK share a bit
    "mknod": ((133, None), [(1, "without", (0o020000,))]),
    "mknodat": ((259, 33), [(2, "without", (0o020000,))]),
}
_CLONE, _CLONE3 = (56, 220), (435, 435)
_CLONE_THREAD = 0x00010000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000  # x86-64's second table of system calls

_libc = ctypes.PyDLL(None, use_errno=True)  # keeps the GIL: a clone must find it held


def _check(result: int, action: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{action}: {os.strerror(error)}")
    return result


def _call(name: str, *arguments: object) -> int:
    """Call a libc function that returns -1 on failure; integers are passed as longs."""
    if not hasattr(_libc, name):
        raise OSError(f"{name}: this system does not have it")
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    return _check(getattr(_libc, name)(*wide), name)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [None if t is None else os.fsencode(t) for t in (source, target, kind)]
    _call("mount", *texts, flags, data.encode() or None)


def _index() -> int:
    """This machine's column in the tables of system calls."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _AUDIT_ARCH or sys.maxsize < 2**32:
        raise OSError(f"no table of system calls for {sys.platform} on {machine}")
    return list(_AUDIT_ARCH).index(machine)


def enter_namespaces(python_folders: list[str]) -> None:
    """Move this process into user, mount, network, IPC, UTS and cgroup namespaces of its own.

    Its root becomes a read-only file system with `python_folders`, the system's libraries, four
    device files and an empty /tmp. The superuser becomes nobody first, as limits on processes do
    not bind it; that has to happen after the mounts, since nobody may not look into /root.
    """
    proc = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
    everything = _NEWUSER | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    superuser = os.geteuid() == 0
    if superuser:
        _call("unshare", _NEWNS)
        _build_root(python_folders)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self would still belong to root
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", everything)
    for file, text in {
        "setgroups": "deny",
        "uid_map": f"0 {uid} 1",
        "gid_map": f"0 {gid} 1",
    }.items():
        with open(os.open(file, os.O_WRONLY, dir_fd=proc), "w") as opened:
            opened.write(text)
    os.close(proc)
    if not superuser:
        _build_root(python_folders)


def _build_root(python_folders: list[str]) -> None:
    """Change to a read-only root with only what a Python program needs."""
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    existing = sorted({f for f in (*system, *python_folders) if os.path.isdir(f)})
    folders = {f: os.path.realpath(f) for f in existing if not _inside(f, existing)}
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    _call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    os.makedirs("/dev")
    os.mkdir("/tmp")
    for folder, source in folders.items():
        os.makedirs(folder, exist_ok=True)
        _mount("/old" + source, folder, None, _MS_BIND | _MS_REC)
    os.symlink("/tmp", "/dev/shm")  # where a lock of `multiprocessing` has its file for a moment
    for name in ("null", "zero", "random", "urandom"):
        Path("/dev", name).touch()
        _mount(f"/old/dev/{name}", f"/dev/{name}", None, _MS_BIND)
    # installed packages may hold the answers to the problems
    for folder in folders:
        for packages in glob.glob(f"{folder}/python3*/*-packages"):
            _mount("tmpfs", packages, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4k")
    for point in _mount_points("/old/proc/self/mountinfo"):
        if point == "/" or any(_inside(point, [f]) or point == f for f in folders):
            kept = os.statvfs(point).f_flag & _MS_NOEXEC
            flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | kept
            _mount(None, point, None, flags)
    _call("umount2", b"/old", _MNT_DETACH)


def _inside(path: str, folders: list[str]) -> bool:
    return any(path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _mount_points(mountinfo: str) -> list[str]:
    lines = Path(mountinfo).read_text(encoding="utf-8").splitlines()
    points = [line.split()[4] for line in lines]
    return [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point) for point in points]


def clone_namespaces() -> int:
    """Fork a child into new pid, mount and IPC namespaces; returns as `os.fork` does.

    The child is the first process of its pid namespace: when it exits, the kernel kills the rest.
    """
    flags = _NEWPID | _NEWNS | _NEWIPC | signal.SIGCHLD
    number = _CLONE[_index()]
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc.syscall(*(ctypes.c_long(x) for x in (number, flags, 0, 0, 0, 0)))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return _check(pid, "clone")


def mount_scratch(folder: str, megabytes: int) -> None:
    """Mount an empty in-memory file system, which disappears with its mount namespace."""
    options = f"size={megabytes}m,nr_inodes=1024,mode=700"
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent exits."""
    if sys.platform == "linux":
        _call("prctl", _PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def drop_capabilities() -> None:
    """Drop all capabilities irrevocably; also forbids debugging and core dumps."""
    with suppress(OSError):  # beyond the last one that this kernel knows
        for capability in range(64):
            _call("prctl", _CAPBSET_DROP, capability, 0, 0, 0)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, bytes(24))
    _call("prctl", _SET_DUMPABLE, 0, 0, 0, 0)


def deny_system_calls() -> None:
    """Install a seccomp filter, irrevocably: no new process, and no call in `_DENIED`.

    Calls in `_JUDGED` are refused for the arguments that are not allowed. The filter is classic BPF
    over a system call's number and arguments, and needs no privilege. Threads remain possible.
    """
    index = _index()
    eperm, enosys = 0x00050000 | 1, 0x00050000 | 38
    allow, kill = 0x7FFF0000, 0x80000000
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    number, machine, arguments = 0, 4, 16  # offsets in struct seccomp_data, little-endian
    program = [
        (load, 0, 0, machine),
        (equal, 1, 0, _AUDIT_ARCH[platform.machine()]),
        (answer, 0, 0, kill),
        (load, 0, 0, number),
        (at_least, 0, 1, _X32_BIT),
        (answer, 0, 0, eperm),
        # libc falls back to `clone`, whose flags a filter can read
        (equal, 0, 1, _CLONE3[index]),
        (answer, 0, 0, enosys),
    ]
    for numbers in _DENIED.values():
        if numbers[index] is not None:
            program += [(equal, 0, 1, numbers[index]), (answer, 0, 0, eperm)]
    for numbers, conditions in _JUDGED.values():
        if numbers[index] is None:
            continue
        body = []
        for index_of_argument, kind, values in conditions:
            values = [os.getpid() if value == SELF else value for value in values]
            offset = int(8 * index_of_argument)  # an index plus a half: the argument's upper half
            body.append((load, 0, 0, arguments + offset))
            if kind == "only":
                jumps = range(len(values), 0, -1)
                body += [(equal, jump, 0, v) for jump, v in zip(jumps, values, strict=True)]
                body.append((answer, 0, 0, eperm))
            else:
                compare = equal if kind == "not" else any_bit
                body += [x for v in values for x in ((compare, 0, 1, v), (answer, 0, 0, eperm))]
        body.append((answer, 0, 0, allow))
        program += [(equal, 0, len(body), numbers[index]), *body]
    program += [
        (equal, 1, 0, _CLONE[index]),
        (answer, 0, 0, allow),
        (load, 0, 0, arguments),
        (any_bit, 1, 0, _CLONE_THREAD),
        (answer, 0, 0, eperm),
        (answer, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _SET_SECCOMP, 2, header, 0, 0)
