"""`dbnet doctor`: what is wrong with a machine is found and said with the fix; what several hosts find becomes one line."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from finished import Finished

from dbnet.commands.see.doctor import command, host, onesided, software
from dbnet.commands.see.doctor.base import BROKEN, OK, SLOW, Finding, looked, shown, summary, together


def one(found: object) -> Finding:
    (finding,) = found
    return finding


def test_hosts_of_one_kind_are_a_line() -> None:
    def disk(slow: bool) -> Finding:
        return Finding("disk", SLOW, "x", "buy one") if slow else Finding("disk", OK, "x")

    lists = [(f"n{i}", [Finding("cores", OK, f"{8 + i} may be used"), disk(i == 2)]) for i in range(6)]
    found = together(lists)
    text = shown(found, 6)
    assert text.split("\n") == [
        "  ok      cores  8 may be used (n0; 5 more are alike)", "  ok      disk   [n0, n1, ... n5 (5)] x",
        "  slow    disk   [n2] x", "                 -> buy one",
    ]  # fmt: skip
    assert summary(found) == "0 broken, 1 slow, 2 ok." and summary(found[:1]) == "All 1 are ok."


def test_a_look_that_fails_is_a_finding() -> None:
    def look() -> Finding:
        raise OSError("no such\nthing")

    assert one(looked("disk", look))[:3] == ("disk", BROKEN, "OSError: no such thing")
    assert list(looked("clocks", lambda: None)) == []


@pytest.mark.parametrize(
    ("groups", "files", "wanted"),
    [
        ("0::/docker/a\n", {"docker/a/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        ("0::/deep\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("5:cpu,cpuacct:/b\n", {"cpu,cpuacct/b/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/b/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
    ],
)
def test_what_a_container_allows(groups: str, files: dict, wanted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in files.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(content)
    (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(host, "_CGROUP", tmp_path / "sys")
    monkeypatch.setattr(host, "_MINE", tmp_path / "cgroup")
    assert host.quota() == wanted


def test_a_host_with_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(host, "quota", lambda: 0.5)
    monkeypatch.setattr(host, "shared_memory", lambda: 64 << 20)
    monkeypatch.setattr(host.os, "getloadavg", lambda: (1000.0, 0, 0))
    monkeypatch.setattr(host.socket, "gethostbyname", nameless)
    monkeypatch.setattr(host.resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    found = {finding.subject: finding for finding in host.findings(tmp_path)}
    slow = {subject: finding.fix for subject, finding in found.items() if finding.state == SLOW}
    assert set(slow) >= {"cores", "load", "shared memory", "host name", "open files", "disk"} and all(slow.values())
    assert "taskset" in slow["cores"] and "--shm-size" in slow["shared memory"] and "/etc/hosts" in slow["host name"]
    broken = {finding.subject: finding for finding in host.findings(tmp_path / "none")}["disk"]
    assert broken.state == BROKEN and "run.folder" in broken.fix
    assert not list(tmp_path.iterdir()), "what was tried is taken away"


def test_software_with_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_FLOPS", 1e9)
    monkeypatch.setattr(software, "_NEEDED", ("numpy", "no_such_package"))
    monkeypatch.setattr(software, "cache", lambda: Path(software.tempfile.gettempdir()) / "dbnet-0" / "kernels")
    found = {finding.subject: finding for finding in software.findings(tmp_path)}
    assert (found["BLAS"].state, found["packages"].state, found["HDF5"].state) == (SLOW, BROKEN, OK)
    assert "no_such_package is missing" in found["packages"].said and "DBNET_CACHE" in found["kernels"].fix
    nowhere = {finding.subject: finding for finding in software.findings(tmp_path / "none")}["HDF5"]
    assert nowhere.state == OK and "not tried, as nothing can be written in " in nowhere.said
    assert not list(tmp_path.iterdir())


def test_libraries_that_are_too_old() -> None:
    known = {("MPICH", (4, 0)): BROKEN, ("MPICH", (4, 1)): OK, ("Open MPI", (4, 1)): BROKEN, ("Open MPI", (5, 0)): OK,
             ("Intel MPI", (2021, 9)): OK, ("Elsewhere", (1, 0)): SLOW}  # fmt: skip
    assert {key: onesided.judged(*key, "").state for key in known} == known


def test_ranks_that_crowd_on_some_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onesided.os, "cpu_count", lambda: 4)
    crowd = onesided.pinning([("a", [0], 0.0), ("a", [0], 0.0), ("b", [1], 0.0)])
    assert crowd.state == SLOW and crowd.said == "the 2 ranks on a share 1 of its 4 cores" and "--bind-to none" in crowd.fix
    assert onesided.pinning([("a", [0, 1, 2, 3], 0.0)] * 5)[1:3] == (OK, "the 5 ranks on a share 4 of its 4 cores")
    assert onesided.pinning([("a", [0, 1], 0.0), ("a", [2, 3], 0.0)]).said == "each rank may run on 2 cores"
    assert onesided.clocks([("a", [], 0.0), ("a", [], 9.0)]) is None
    assert onesided.clocks([("a", [], 0.0), ("b", [], 9.0)]).state == SLOW


FAULTS = [
    (["false"], 30, "two ranks could not be started by false: no word of why"),
    (["sh", "-c", "sleep 60", "sh"], 0.2, "gave no answer within 0.2 s"),
    (["env", "OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK=0"], 60, "mpirun belongs to another MPI than mpi4py's"),
]


@pytest.mark.parametrize(("words", "patience", "said"), FAULTS, ids=["fails", "hangs", "another"])
def test_launchers_that_do_not_start_ranks(
    words: list[str], patience: float, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "launch", lambda _: words)
    monkeypatch.setattr(command, "_PATIENCE", patience)
    finding = one(command.two_ranks())
    assert (finding.subject, finding.state) == ("launcher", BROKEN) and said in finding.said and finding.fix


def test_the_command(place: Path, dbnet: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "launch", lambda _: None)
    monkeypatch.setenv("FI_PROVIDER", "tcp")
    monkeypatch.setenv("DBNET_API_KEY", "hidden")
    rows = json.loads(dbnet("doctor", "--json").out)
    assert {"Python", "BLAS", "cores", "disk", "launcher"} <= {row["subject"] for row in rows}
    assert all(row["where"] == [socket.gethostname()] and (row["fix"] or row["state"] == OK) for row in rows)
    text = dbnet("doctor", "--report")
    assert text.code == 0 and text.out.startswith("```\ndbnet doctor: ") and "slow    launcher" in text.out
    assert "  FI_PROVIDER=tcp\n" in text.out and "hidden" not in text.out
    monkeypatch.setattr(host, "_disk", lambda folder: Finding("disk", BROKEN, "gone", "mount it"))
    broken = dbnet("doctor")
    assert broken.code == 1 and "  broken  disk " in broken.out and "-> mount it\n" in broken.out and "1 broken, " in broken.out
    assert dbnet("doctor", "--folder", "none").err == "dbnet: --folder: there is no folder 'none'.\n"
    assert not list(place.iterdir())
