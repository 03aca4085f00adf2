"""Planned runs in processes of their own, so that one that crashes or diverges leaves the others alone."""

from __future__ import annotations

import fcntl
import json
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from entrecipes.report.comparison.arms import ArmRun
from entrecipes.training.planning import Planned

Listener = Callable[[str, ArmRun], None]


class Processes:
    """Calls of `entrecipes` in processes of their own, which are stopped when the one that waits for them is.

    Args:
        jobs: How many at a time.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        self.lock, self.stopping = threading.Lock(), False
        self.running: set[subprocess.Popen] = set()

    def each(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """`work` of every item, `jobs` at a time; on Ctrl-C the processes that run are asked to stop."""
        pool = ThreadPoolExecutor(self.jobs)
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self._stop()
            raise
        finally:
            pool.shutdown()

    def call(self, arguments: Sequence[str], log: Path) -> str:
        """Call `entrecipes` with these arguments, what it says added to `log`; returns why it failed, or nothing."""
        command = [sys.executable, "-m", "entrecipes", *arguments]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            try:  # The process inherits the lock with its output: as long as it lives, nobody starts a second one.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return f"another process is still at it; see {log}"
            file.write(json.dumps({"kind": "command", "jobs": self.jobs, "command": shlex.join(command[1:])}) + "\n")
            file.flush()
            code = self._wait(command, file)
        if code == 0:
            return ""
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else ""
        return "; ".join(filter(None, (how, _last_words(log)))) or f"exit code {code}"

    def _wait(self, command: list[str], log: object) -> int:
        with self.lock:
            if self.stopping:
                return 130
            # In a session of its own, so that Ctrl-C reaches it once, from us: a second signal would stop it at once.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.running.add(process)
        code = process.wait()
        with self.lock:
            self.running.discard(process)
        return code

    def _stop(self) -> None:
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.terminate()


class Runner:
    """Runs what is not finished yet, several at a time.

    Args:
        output: The comparison's folder; what a run says goes to `logs/ARM-seed-N.log`.
        jobs: Runs at a time.
        listener: Called with the arm's name and each run as it ends.
    """

    def __init__(self, output: Path, jobs: int = 1, listener: Listener | None = None) -> None:
        self.output, self.listener = output, listener
        self.processes = Processes(jobs)

    def run_all(self, plans: Sequence[Planned]) -> list[ArmRun]:
        """All runs, in the order of the plans; on Ctrl-C those that run are stopped with a checkpoint."""
        return self.processes.each(self._run, plans)

    def _run(self, planned: Planned) -> ArmRun:
        reused = planned.finished
        message = "" if reused else self._train(planned)
        state = "failed" if message else "finished"
        run = ArmRun(planned.seed, planned.folder, state, message, reused, jobs_beside(log_of(planned, self.output)))
        with self.processes.lock:
            if self.listener and not self.processes.stopping:
                self.listener(planned.arm, run)
        return run

    def _train(self, planned: Planned) -> str:
        """Train one run to its end; returns why it failed, or nothing."""
        # A folder with another run: `never` moves it aside; else a run that was cut short goes on.
        resume = "never" if planned.foreign or _unreadable(planned) else "auto"
        own = [f"training.output={json.dumps(str(planned.folder))}", f"training.resume={resume}", "hub.repo_id=null"]
        arguments = ["run", str(planned.recipe), *planned.overrides, *own]
        if why := self.processes.call(arguments, log_of(planned, self.output)):
            return why
        return "" if planned.finished else "its recipe changed while the comparison ran"


def log_of(planned: Planned, output: Path) -> Path:
    """Where a run of the comparison in `output` says what it does."""
    return output / "logs" / f"{planned.label}.log"


def look(plans: Sequence[Planned], output: Path) -> list[ArmRun]:
    """What is finished, without running anything."""
    runs = []
    for planned in plans:
        jobs = jobs_beside(log_of(planned, output))
        state = "finished" if planned.finished else "missing"
        runs.append(ArmRun(planned.seed, planned.folder, state, "", state == "finished", jobs))
    return runs


def jobs_beside(log: Path) -> int | None:
    """Most runs that were allowed at the same time as the one of this log; None without a log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return max((json.loads(line)["jobs"] for line in lines if line.startswith('{"kind": "command"')), default=None)


def _unreadable(planned: Planned) -> bool:
    return planned.foreign is None and (planned.folder / "recipe.yaml").exists()


def _last_words(log: Path) -> str:
    """The error of the last attempt: its `error:` line, or what it said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    attempt = max(i for i, line in enumerate(lines) if line.startswith('{"kind": "command"'))
    said = [line for line in lines[attempt + 1 :] if line and not line.startswith("{")]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return (errors or said or [""])[-1][:400]
