"""The attempts of hostile code in `escapes.txt`, read; and the system calls that code must not have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PREAMBLE = """
import ctypes, os, socket, stat, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def tried(action):
    try: print('ESCAPED', repr(action())[:300])
    except Exception as error: print('held', type(error).__name__, str(error).partition(':')[0])
def is_open(number):
    try: return bool(os.fstat(number))
    except OSError: return False
descriptors = [number for number in range(64) if is_open(number)]
peer = next(number for number in descriptors if stat.S_ISSOCK(os.fstat(number).st_mode))
def send(body):
    os.write(peer, len(body).to_bytes(4, 'big') + bytes(4) + body)
"""
PATTERNS = {
    "MISSING": r"held FileNotFoundError \[Errno 2\].*",
    "DENIED": r"held PermissionError \[Errno 1\] Operation not permitted",
    "READ_ONLY": r"held OSError \[Errno 30\] Read-only file system",
    "KILLED": r"error: the code (took too long|used more than 1 s of CPU time) and was killed",
    "FRAME": r"error: the code wrote to its tools' connection and was killed: .*",
}


@dataclass(frozen=True)
class Escape:
    """One attempt."""

    name: str
    held: str
    """Pattern of the whole observation."""
    code: str

    @property
    def goes_on(self) -> bool:
        """Whether its time is what ends it."""
        return "CPU time" in self.held


def read_escapes() -> list[Escape]:
    """The blocks of the file, in their order."""
    text = Path(__file__).with_name("escapes.txt").read_text(encoding="utf-8")
    found = []
    for block in re.split(r"^## ", re.sub(r"^# .*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)[1:]:
        name, held, code = block.strip("\n").split("\n", 2)
        for key, pattern in PATTERNS.items():
            held = held.replace(f"{{{key}}}", pattern)
        found.append(Escape(name, held.removeprefix("=> "), code))
    return found


ESCAPES = read_escapes()

SYSTEM_CALLS = re.findall(
    r"\w+",
    """
ptrace process_vm_readv process_vm_writev mount umount2 pivot_root chroot unshare setns clone3 fork vfork kill tkill
setuid setgid setresuid setgroups setsid capset personality keyctl add_key request_key bpf perf_event_open
userfaultfd memfd_create shmget shmat msgget semget io_uring_setup io_uring_enter kexec_load init_module
finit_module delete_module open_by_handle_at name_to_handle_at clock_settime settimeofday adjtimex swapon reboot
acct quotactl socket connect bind listen mknod mknodat symlink symlinkat link linkat chown fchownat setxattr
fanotify_init move_mount open_tree fsopen fsmount fspick mount_setattr pidfd_open pidfd_getfd pidfd_send_signal
process_madvise iopl ioperm modify_ldt lookup_dcookie syslog vhangup sethostname setdomainname mbind move_pages
migrate_pages sched_setaffinity sched_setscheduler setpriority ioprio_set landlock_create_ruleset seccomp execveat
""",
)
