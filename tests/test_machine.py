"""The machine's description, and the limits of a container it is in."""

from __future__ import annotations

from pathlib import Path

from owl_deploy.machine.description import container_cores, container_memory_bytes, describe_machine
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
