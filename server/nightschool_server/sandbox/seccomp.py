"""Which system calls code may make: those that a Python process needs, and no other.

Owns the list and its compilation with libseccomp. Whatever is not on it does not exist (ENOSYS), so that libraries
fall back; what people expect to work elsewhere says "not permitted" (EPERM). Without new processes every limit of the
process is the sandbox's; without links and device nodes nothing that is left in a workspace leads out of it.
"""

from __future__ import annotations

import errno
import tempfile
from functools import cache

from nightschool_server.errors import FailedPreconditionError


def _names(text: str) -> list[str]:
    return text.split()


CLONE_THREAD = 0x00010000
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""

ALLOWED = _names("""
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 sendfile copy_file_range lseek _llseek
open openat openat2 close close_range creat dup dup2 dup3 fcntl fcntl64 pipe pipe2 eventfd eventfd2 flock
stat stat64 fstat fstat64 lstat lstat64 newfstatat fstatat64 statx statfs statfs64 fstatfs fstatfs64
access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir
mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 chmod fchmod fchmodat fchmodat2 umask
truncate truncate64 ftruncate ftruncate64 fallocate fsync fdatasync sync_file_range fadvise64 fadvise64_64
utime utimes utimensat utimensat_time64 futimesat
mmap mmap2 munmap mremap mprotect madvise msync mincore brk membarrier
poll ppoll ppoll_time64 select _newselect pselect6 pselect6_time64
epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait epoll_pwait2
socketpair sendto recvfrom send recv sendmsg recvmsg shutdown getsockname getpeername getsockopt setsockopt
rt_sigaction rt_sigprocmask rt_sigreturn sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack tgkill
alarm setitimer getitimer pause restart_syscall wait4 waitid
execve exit exit_group arch_prctl prctl set_tid_address set_robust_list get_robust_list rseq
futex futex_time64 futex_waitv futex_wake futex_wait futex_requeue
getpid getppid gettid getpgrp getpgid getsid getuid geteuid getgid getegid getresuid getresgid getgroups
getrlimit ugetrlimit setrlimit prlimit64 getrusage getpriority times
sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu
clock_gettime clock_gettime64 clock_getres clock_getres_time64 clock_nanosleep clock_nanosleep_time64 nanosleep
gettimeofday time getrandom sysinfo uname
""")

NOT_PERMITTED = _names("""
fork vfork socket connect bind listen accept accept4 kill tkill ptrace process_vm_readv process_vm_writev
symlink symlinkat link linkat mknod mknodat chown fchown lchown fchownat setxattr lsetxattr fsetxattr
mount umount2 pivot_root chroot unshare setns setuid setgid setreuid setregid setresuid setresgid setgroups setsid
setpgid capset personality keyctl add_key request_key bpf perf_event_open userfaultfd memfd_create shmget shmat msgget
semget io_uring_setup clock_settime settimeofday adjtimex sethostname reboot init_module finit_module kexec_load
swapon acct quotactl sched_setaffinity sched_setscheduler setpriority mlock mlockall
""")


@cache
def program() -> bytes:
    """The filter as BPF. Raises FailedPreconditionError where libseccomp is missing."""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        raise FailedPreconditionError(f"libseccomp cannot be used ({error})") from error
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ERRNO(errno.ENOSYS))
    known = {name for name in (*ALLOWED, *NOT_PERMITTED) if _is_known(name)}
    for name in ALLOWED:
        if name in known:
            rules.add_rule(pyseccomp.ALLOW, name)
    for name in NOT_PERMITTED:
        if name in known:
            rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    threads = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD)
    rules.add_rule(pyseccomp.ALLOW, "clone", threads)
    # The C library asks for clone3 first and takes clone, whose flags a filter can read, where that does not exist.
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, CLONE_THREAD, 0))
    for request in IOCTLS:
        rules.add_rule(pyseccomp.ALLOW, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, 0xFFFFFFFF, request))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _is_known(name: str) -> bool:
    """Whether libseccomp knows the call on this machine; a list for several architectures names some that are not."""
    import pyseccomp

    try:
        return bool(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) >= 0)
    except (OSError, ValueError):
        return False
