"""The machine's description, and the limits of a container it is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from owl_deploy.cli.options import use_threads
from owl_deploy.machine import threads
from owl_deploy.machine.cgroup import container_cores, container_memory_bytes
from owl_deploy.machine.description import describe_machine
from owl_deploy.machine.threads import available_cores


def test_a_container_s_limits_are_read(tmp_path: Path) -> None:
    assert container_cores(tmp_path) is None
    assert container_memory_bytes(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert container_cores(tmp_path) == 1.5
    assert container_memory_bytes(tmp_path) == 2**30
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_cores(tmp_path) is None
    assert container_memory_bytes(tmp_path) is None


def test_this_machine_is_described() -> None:
    machine = describe_machine(1)
    assert machine.cores == available_cores()
    assert machine.memory_bandwidth_one_thread_gb_s is not None
    assert machine.memory_bandwidth_all_threads_gb_s is not None
    assert machine.memory_bandwidth_one_thread_gb_s > 0
    assert machine.instruction_set == (machine.instruction_sets or [machine.instruction_set])[0]


def test_the_tightest_of_all_groups_around_a_process_holds(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/system.slice/bench.service\n")
    service = tmp_path / "mount" / "system.slice" / "bench.service"
    service.mkdir(parents=True)
    (service / "cpu.max").write_text("max 100000\n")
    (service / "memory.max").write_text("4096\n")
    (service.parent / "cpu.max").write_text("250000 100000\n")
    (service.parent / "memory.max").write_text("8192\n")
    assert container_cores(tmp_path / "mount", membership) == 2.5
    assert container_memory_bytes(tmp_path / "mount", membership) == 4096


def test_limits_of_control_groups_of_version_1_are_read(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n")
    for name, value in {
        "cpu/cpu.cfs_quota_us": 50_000,
        "cpu/cpu.cfs_period_us": 100_000,
        "memory/memory.limit_in_bytes": 2**30,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    assert container_cores(tmp_path, membership) == 0.5
    assert container_memory_bytes(tmp_path, membership) == 2**30
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert container_cores(tmp_path, membership) is None
    assert container_memory_bytes(tmp_path, membership) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (0.5, 1), (1.5, 2), (4.0, 4), (64.0, 8)])
def test_a_process_has_no_more_cores_than_its_group_has_time_for(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "container_cores", lambda: quota)
    assert available_cores() == cores


def test_torch_does_not_compute_on_more_threads_than_the_group_has_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "container_cores", lambda: 1.0)
    try:
        torch.set_num_threads(2)
        use_threads(None)
        assert torch.get_num_threads() == 1
        use_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
