"""The limits of control groups, read from trees as kernels and containers make them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from features import limits

GIB = 1 << 30
V1 = "31 23 0:30 {inside} /sys/fs/cgroup/{name} rw,relatime shared:9 - cgroup cgroup rw,{controllers}\n"
V2 = "31 23 0:30 {inside} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture(autouse=True)
def big_machine(monkeypatch):
    """A machine of 64 processors and 256 GiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 << 20}[name])


def tree(root: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(path: str, cpu_inside: str = "/", memory_inside: str = "/") -> tuple[str, str]:
    mounts = V1.format(inside=cpu_inside, name="cpu,cpuacct", controllers="cpu,cpuacct")
    mounts += V1.format(inside=memory_inside, name="memory", controllers="memory")
    mounts += "40 31 0:99 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
    return mounts, f"12:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:/elsewhere\n0::/elsewhere\n"


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("9900000 100000", 64)],
)
def test_version_2_by_quota(tmp_path, quota, cores):
    root = tree(tmp_path, V2.format(inside="/"), "0::/\n", {"sys/fs/cgroup/cpu.max": f"{quota}\n"})
    assert limits.cores(root) == cores


def test_version_2_takes_the_tightest_of_the_groups_around(tmp_path):
    files = {
        "sys/fs/cgroup/pods/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/pods/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pods/one/memory.max": "max\n",
        "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
        "sys/fs/cgroup/other/memory.max": "1000000\n",
    }
    root = tree(tmp_path, V2.format(inside="/"), "0::/pods/one\n", files)
    assert (limits.cores(root), limits.memory(root)) == (3, 4 * GIB)
    (root / "sys/fs/cgroup/pods/one/memory.high").write_text(f"{2 * GIB}\n")
    assert limits.memory(root) == 2 * GIB


def test_version_1_with_its_own_hierarchies(tmp_path):
    files = {
        "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/docker/memory.limit_in_bytes": f"{3 * GIB}\n",
    }
    root = tree(tmp_path, *v1("/docker/a"), files)
    assert (limits.cores(root), limits.memory(root)) == (3, 3 * GIB)


def test_a_container_sees_only_its_own_group(tmp_path):
    # As Docker mounts version 1: the kernel names the group on the host, and the mount shows that group.
    files = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "50000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
    }
    root = tree(tmp_path, *v1("/docker/a", "/docker/a", "/docker/a"), files)
    assert (limits.cores(root), limits.memory(root)) == (2, GIB)


@pytest.mark.parametrize("group", ["0::/../../system.slice/x\n", "0::/not/mounted/here\n", "", "nonsense\n"])
def test_a_group_that_cannot_be_found_is_the_one_mounted(tmp_path, group):
    root = tree(tmp_path, V2.format(inside="/"), group, {"sys/fs/cgroup/cpu.max": "100000 100000\n"})
    assert limits.cores(root) == 1


def test_both_versions_at_once(tmp_path):
    mounts, groups = v1("/a")
    mounts += "50 31 0:77 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    files = {
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "400000\n",
        "sys/fs/cgroup/unified/elsewhere/memory.max": f"{5 * GIB}\n",
    }
    root = tree(tmp_path, mounts, groups, files)
    assert (limits.cores(root), limits.memory(root)) == (4, 5 * GIB)


def test_without_mountinfo_the_usual_places_are_looked_at(tmp_path):
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text(f"{GIB}\n")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("50000 100000\n")
    assert (limits.cores(tmp_path), limits.memory(tmp_path)) == (1, GIB)


def test_a_kernel_without_groups_grants_the_machine(tmp_path):
    assert (limits.cores(tmp_path), limits.memory(tmp_path)) == (64, 256 * GIB)


def test_the_affinity_mask_is_a_limit_too(tmp_path, monkeypatch):
    root = tree(tmp_path, V2.format(inside="/"), "0::/\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 9})
    assert limits.cores(root) == 2


def test_a_mount_with_blanks_in_its_name(tmp_path):
    mounts = V2.format(inside="/").replace("/sys/fs/cgroup", "/sys/fs/my\\040groups")
    root = tree(tmp_path, mounts, "0::/\n", {"sys/fs/my groups/cpu.max": "100000 100000\n"})
    assert limits.cores(root) == 1


def test_what_no_kernel_writes_is_no_limit_and_no_error(tmp_path):
    mounts = "no line\n\n" + V2.format(inside="/") + "30 23 - \n"
    files = {"sys/fs/cgroup/cpu.max": "inf 100000\n", "sys/fs/cgroup/memory.max": "nan\n"}
    files["sys/fs/cgroup/memory.high"] = f"{GIB}\n"
    root = tree(tmp_path, mounts, "0::/\n", files)
    assert (limits.cores(root), limits.memory(root)) == (64, GIB)


def test_this_machine_answers():
    assert 1 <= limits.cores() <= 64
    assert 0 < limits.memory() <= 256 * GIB
