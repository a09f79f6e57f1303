"""How many threads this process may run."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cores() -> int:
    """How many threads of this process can run at the same time.

    The cores that it may run on, or less where a control group limits its CPU time (as containers
    and batch systems do) or OMP_NUM_THREADS asks for fewer threads.
    """
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        cores = min(cores, int(wanted))
    return max(1, math.ceil(min(cores, _cpu_quota())))


def _cpu_quota(root: Path = Path("/")) -> float:
    """CPU seconds a second that this process's control groups allow; infinite without a limit.

    Args:
        root: of the file system that has ``proc/self/cgroup`` and ``sys/fs/cgroup``.
    """
    quota = math.inf
    try:
        entries = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return quota
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.strip("/")
        # A limit of a parent holds, too. Inside a container the path may not exist below the mount.
        for folder in (group, *group.parents):
            quota = min(quota, _quota_of(folder))
            if folder == mount:
                break
    return quota


def _quota_of(group: Path) -> float:
    """The limit of one control group, of version 2 or 1; infinite if it has none."""
    try:
        if (group / "cpu.max").exists():
            allowed, period = (group / "cpu.max").read_text().split()
        else:
            allowed = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return math.inf if allowed == "max" or int(allowed) <= 0 else int(allowed) / int(period)
    except (OSError, ValueError):
        return math.inf
