"""Holds a load on a mount, and injects faults: ``python -m tests.soak [--seconds N] [--seed N] [-o OPTIONS]``.

The load is that of client.c: services, clients that check every answer and every one-way call, garbage, forks, freezes.
The faults come from here, a few every second, to processes chosen at random: SIGKILL, SIGSTOP for a while, signals,
clients with threads stuck in memory that is not there, and, now and then, the death of the context manager, which ends
everything.

Every few seconds the server checks its engine's invariants (`binder-control` has a text for that), and what it occupies
is noted. In the end all clients are killed, and nothing may be left of them. The exit status says whether all that was
so.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from binderfs_fuse.command import servers

HERE: Final = Path(__file__).parent
CHECKOUT: Final = HERE.parent.parent
ACTOR: Final = HERE.parent / "hostile" / "actor.c"

FIELDS: Final = (
    "pid", "progress", "calls", "nested", "files", "notes", "acknowledged", "deaths", "dead", "frozen", "full",
    "failed", "interrupted", "garbage", "forks", "wrong", "lost",
)  # fmt: skip
SLOT: Final = struct.Struct("20Q")

SERVICES: Final = 3
CLIENTS: Final = 4
ROLES: Final = (
    ["manager"]
    + [f"service {number}" for number in range(SERVICES)]
    + [f"client {SERVICES}"] * CLIENTS
    + ["garbage", "garbage", "forker", f"zero {1 + SERVICES + CLIENTS}"]
)
# How often each fault is chosen. Each ends by itself, or by the process being replaced.
FAULTS: Final = {
    "kill a client": 20,
    "kill a service": 12,
    "kill garbage": 6,
    "kill a forker": 4,
    "stop": 20,
    "signal": 40,
    "stuck memory": 10,
    "kill the manager": 1,
}
FAULTS_PER_SECOND: Final = 8
CHECK_SECONDS: Final = 5.0
STUCK_SECONDS: Final = 60.0
WARM_UP: Final = 0.1
"""The share of the time after which the server has to stay as large as it is."""
GROWTH: Final = 1.10
"""What it may be larger in the end: Python's memory is not given back in order."""


class Broken(Exception):  # noqa: N818 - it is
    """Something is not as it must be."""


@dataclass
class Worker:
    """A process of the load, and what it has to show."""

    slot: int
    role: str
    process: subprocess.Popen[bytes]
    progress: int = 0
    moved: float = field(default_factory=time.monotonic)
    resume_at: float = 0.0


class Soak:
    """One run."""

    def __init__(self, mountpoint: Path, folder: Path, seed: int) -> None:
        self.mountpoint = mountpoint
        self.device = mountpoint / "binder"
        self.random = random.Random(seed)
        self.seed = seed
        self.client = self._build(folder / "client", HERE / "client.c")
        self.actor = self._build(folder / "actor", ACTOR)
        self.figures_file = folder / "figures"
        self.figures_file.write_bytes(bytes(1 << 16))
        self._descriptor = os.open(self.figures_file, os.O_RDWR | os.O_CLOEXEC)
        self.figures = mmap.mmap(self._descriptor, 1 << 16)
        self.complaints = (folder / "complaints").open("w+b")
        self.workers: list[Worker] = []
        self.stuck: list[subprocess.Popen[bytes]] = []
        self.totals: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.checks = 0
        self.server = servers.information(mountpoint)["pid"]
        self._spawned = 0

    @staticmethod
    def _build(program: Path, source: Path) -> Path:
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", f"-I{CHECKOUT / 'uapi'}"]
        subprocess.run(["cc", *flags, "-o", program, source], check=True)
        return program

    # The load.

    def start(self) -> None:
        """Start all workers."""
        for slot, role in enumerate(ROLES):
            self.workers.append(self._spawn(slot, role))

    def _spawn(self, slot: int, role: str) -> Worker:
        self._spawned += 1
        self.figures[slot * SLOT.size : (slot + 1) * SLOT.size] = bytes(SLOT.size)
        arguments = [str(self.client), str(self.device), str(self.figures_file), str(slot), str(self._spawned)]
        process = subprocess.Popen([*arguments, *role.split()], stdin=subprocess.DEVNULL, stderr=self.complaints)
        return Worker(slot, role, process)

    def _progress(self, worker: Worker) -> int:
        progress: int = SLOT.unpack_from(self.figures, worker.slot * SLOT.size)[1]
        return progress

    def _gather(self, worker: Worker) -> None:
        """Add what a worker, that has ended, has done."""
        values = SLOT.unpack_from(self.figures, worker.slot * SLOT.size)
        for name, value in zip(FIELDS[2:], values[2:], strict=False):
            self.totals[name] += value

    def replace(self, worker: Worker) -> None:
        """Have a new process in the place of one that has ended."""
        self._gather(worker)
        self.workers[worker.slot] = self._spawn(worker.slot, worker.role)

    def look_after(self, now: float) -> None:
        """Wake who was stopped, replace who has ended, and find who does not get on."""
        for worker in self.workers:
            if worker.resume_at and now >= worker.resume_at:
                worker.resume_at = 0.0
                worker.moved = now
                worker.process.send_signal(signal.SIGCONT)
            status = worker.process.poll()
            if status is not None:
                # Services go with their manager.
                if status not in (0, -signal.SIGKILL):
                    raise Broken(f"{worker.role} ended with status {status}: {self._complaints()}")
                self.replace(worker)
                continue
            progress = self._progress(worker)
            if progress != worker.progress:
                worker.progress = progress
                worker.moved = now
            elif now - worker.moved > STUCK_SECONDS and worker.role.split()[0] not in ("service", "manager"):
                raise Broken(f"{worker.role} (pid {worker.process.pid}) is stuck\n{self._state()}")
        if any(SLOT.unpack_from(self.figures, worker.slot * SLOT.size)[15] for worker in self.workers):
            raise Broken(self._complaints())

    def _complaints(self) -> str:
        self.complaints.flush()
        return Path(self.complaints.name).read_text(errors="replace")[-2000:]

    def _state(self) -> str:
        return (self.mountpoint / "binder_logs/state").read_text()

    # Faults.

    def _one_of(self, role: str) -> Worker:
        return self.random.choice([worker for worker in self.workers if worker.role.startswith(role)])

    def inject(self, now: float) -> None:
        """Do something bad to somebody."""
        kind = self.random.choices(list(FAULTS), list(FAULTS.values()))[0]
        self.faults[kind] += 1
        if kind.startswith("kill"):
            victim = self._one_of(kind.split()[-1])
            victim.process.kill()
            victim.process.wait()
            self.replace(victim)
        elif kind == "stop":
            victim = self._one_of(self.random.choice(("cl", "s", "g")))
            victim.process.send_signal(signal.SIGSTOP)
            victim.resume_at = now + self.random.random() / 2
        elif kind == "signal":
            victim = self._one_of(self.random.choice(("cl", "s", "m")))
            # A process that has just been started would die of it.
            if self._progress(victim):
                victim.process.send_signal(signal.SIGUSR1)
        else:
            self._stick()

    def _stick(self) -> None:
        part = self.random.choice(("commands", "data", "offsets", "buffer", "read", "reply"))
        process = subprocess.Popen([self.actor, self.device], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert process.stdin is not None
        process.stdin.write(f"open\nstuck 2 {part}\n".encode())
        process.stdin.flush()
        self.stuck.append(process)
        if len(self.stuck) > 6:
            self._unstick()

    def _unstick(self) -> None:
        process = self.stuck.pop(0)
        process.kill()
        process.communicate()

    # The server.

    def check(self) -> tuple[int, int, int]:
        """Have the server check its engine; return its memory in KiB, its descriptors and its threads."""
        complaint = self._ask("check").decode()
        self.checks += 1
        if complaint:
            raise Broken(f"the engine: {complaint}")
        status = Path(f"/proc/{self.server}/status").read_text()
        memory = int(status.partition("VmRSS:")[2].split()[0])
        descriptors, threads = (len(list(Path(f"/proc/{self.server}/{what}").iterdir())) for what in ("fd", "task"))
        return memory, descriptors, threads

    def _ask(self, name: str) -> bytes:
        """Ask the server, who is patient only for users: here it may be short of processor time."""
        deadline = time.monotonic() + STUCK_SECONDS
        while True:
            try:
                return servers.ask(self.mountpoint, name)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise Broken("the server does not answer") from None

    def end(self) -> None:
        """Kill everybody; nothing may be left of them."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
            self._gather(worker)
        while self.stuck:
            self._unstick()
        deadline = time.monotonic() + STUCK_SECONDS
        while len(self._state().splitlines()) > 1:
            if time.monotonic() > deadline:
                raise Broken(f"left over:\n{self._state()}")
            time.sleep(0.05)


def run(soak: Soak, seconds: float) -> list[tuple[int, int, int]]:
    """Run for so long; return what the server occupied from time to time. Raises `Broken`."""
    began = time.monotonic()
    next_check = began + CHECK_SECONDS
    next_fault = began + 1
    samples = []
    soak.start()
    while (now := time.monotonic()) < began + seconds:
        soak.look_after(now)
        if now >= next_fault:
            soak.inject(now)
            next_fault = now + soak.random.expovariate(FAULTS_PER_SECOND)
        if now >= next_check:
            samples.append(soak.check())
            next_check = now + CHECK_SECONDS
            if len(samples) % 60 == 1:
                report(soak, now - began, samples[-1])
        time.sleep(0.01)
    return samples


def report(soak: Soak, seconds: float, sample: tuple[int, int, int]) -> None:
    """Print one line on how it goes."""
    totals = Counter(soak.totals)
    for worker in soak.workers:
        for name, value in zip(FIELDS[2:], SLOT.unpack_from(soak.figures, worker.slot * SLOT.size)[2:], strict=False):
            totals[name] += value
    memory, descriptors, threads = sample
    print(
        f"{seconds:6.0f} s: {totals['calls']} calls, {totals['notes']} one-way, {totals['garbage']} garbage, "
        f"{sum(soak.faults.values())} faults, {totals['wrong']} wrong, {totals['lost']} lost; "
        f"server {memory / 1024:.1f} MiB, {descriptors} descriptors, {threads} threads",
        flush=True,
    )


def print_figures(soak: Soak, seconds: float, samples: list[tuple[int, int, int]]) -> None:
    """Print what was done, as docs/reliability.md has it."""
    totals = soak.totals
    rows: list[tuple[str, Any]] = [
        ("seconds", round(seconds)),
        ("seed", soak.seed),
        ("calls answered and checked", totals["calls"] + totals["nested"] + totals["files"]),
        ("  of them with a call back", totals["nested"]),
        ("  of them with files both ways", totals["files"]),
        ("calls a second", round((totals["calls"] + totals["nested"] + totals["files"]) / seconds)),
        ("one-way calls made", totals["notes"]),
        ("  acknowledged, all in order", totals["acknowledged"]),
        ("bad inputs", totals["garbage"]),
        ("forks", totals["forks"]),
        *((f"fault: {name}", soak.faults[name]) for name in FAULTS),
        ("processes started", soak._spawned),
        ("calls that found the callee dead", totals["dead"]),
        ("calls that found the callee frozen", totals["frozen"]),
        ("calls that found no room", totals["full"]),
        ("calls that failed otherwise", totals["failed"]),
        ("calls interrupted by a signal", totals["interrupted"]),
        ("deaths told", totals["deaths"]),
        ("checks of the engine's invariants", soak.checks),
    ]
    for column, name in enumerate(("memory of the server, KiB", "descriptors of the server", "threads of the server")):
        values = [sample[column] for sample in samples]
        rows.append((name, f"{values[0]} at first, {max(values)} at most, {values[-1]} at last" if values else "-"))
    rows += [("wrong replies", totals["wrong"]), ("lost one-way calls", totals["lost"])]
    for name, value in rows:
        print(f"{name:38} {value}")


def flat(samples: list[tuple[int, int, int]]) -> None:
    """Want the server not to have grown since it was warm. Raises `Broken`."""
    warm = samples[int(len(samples) * WARM_UP) :]
    tenth = max(len(warm) // 10, 1)
    if len(warm) < 20:
        return
    for column, name in ((0, "memory"), (1, "descriptors")):
        early = max(sample[column] for sample in warm[: 2 * tenth])
        late = sorted(sample[column] for sample in warm[-2 * tenth :])[tenth]
        if late > early * GROWTH:
            raise Broken(f"{name} of the server grew from {early} to {late}")


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("-o", dest="options", default="log_level=warning", help="options of the mount")
    parsed = parser.parse_args()
    status = 0
    with tempfile.TemporaryDirectory(prefix="binderfs-soak-") as name:
        folder = Path(name)
        mountpoint = folder / "mount"
        mountpoint.mkdir()
        log = folder / "log"
        mount = [sys.executable, str(CHECKOUT / "mount.py")]
        subprocess.run([*mount, str(mountpoint), "-o", f"log={log},{parsed.options}"], check=True)
        soak = Soak(mountpoint, folder, parsed.seed)
        samples: list[tuple[int, int, int]] = []
        began = time.monotonic()
        try:
            samples = run(soak, parsed.seconds)
            seconds = time.monotonic() - began
            soak.end()
            print_figures(soak, seconds, samples)
            flat(samples)
            if soak.totals["wrong"] or soak.totals["lost"]:
                raise Broken(soak._complaints())
        except Broken as broken:
            print(f"BROKEN after {time.monotonic() - began:.0f} s (seed {parsed.seed}): {broken}")
            status = 1
        finally:
            for worker in soak.workers:
                worker.process.kill()
                worker.process.wait()
            with contextlib.suppress(IndexError):
                while True:
                    soak._unstick()
            subprocess.run([*mount, "-u", str(mountpoint)], check=False)
        if log.exists() and log.read_text():
            print(f"the server's log:\n{log.read_text()[-4000:]}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
