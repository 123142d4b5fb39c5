"""The training loop, of any task.

::

    batches ─► task.forward_backward ─► engine.step ─► log ─► evaluate ─► save ─► stop
                        │ agree

All processes agree on every step before its last backward pass: on its loss, on numbers that are
not finite, on signals, and on whether rank 0 can still write. One small sum carries all of it. It
stays on the device until the step is launched: the host waits for the device once a step, for the
norm of the gradient.

Parts around the loop keep a run of days alive: :mod:`.health` (skipped steps, warnings of losses
and rates), :mod:`.watchdog` (ends a process that hangs), :mod:`.checkpointer` (writes in the
background), :mod:`.run_dir` (lock and status). Beside it: :mod:`.evaluation` (scores on the way),
:mod:`.trackers` (where numbers go).
"""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType

from torch import Tensor

from ..config import plain
from ..errors import CheckpointError, InterruptedRunError, RadioDistillError
from ..protocols import Task
from ..stage import Stage
from ..system import signals
from ..system.distributed import World, all_gather_object, run_on_main
from ..system.files import reason_of
from ..system.memory import explain_oom
from ..system.progress import Progress
from .checkpoint import Checkpoint, Origin, folder_of
from .checkpointer import AsyncCheckpointer, clear_unfinished, save
from .deepspeed_engine import zero_hint
from .evaluation import Evaluations
from .health import (
    Agreement,
    LossMonitor,
    NonFinite,
    NonFiniteGuard,
    SkipCounter,
    StepStatus,
    WriteError,
    agree,
    describe,
)
from .meters import Throughput
from .optim import every
from .run_dir import RunLock, State, StatusFile
from .trackers import Trackers, WriteImage, open_trackers, rewind
from .watchdog import Watchdog

logger = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
"""One line for each skipped step: its number and what was not finite."""

_ABORT_SECONDS = 1.0
"""Time that an aborted run waits for a checkpoint which is nearly written."""


class Trainer:
    """Trains a task to the end of its stage, on one process of the run; use it once.

    Args:
        stage: the resolved stage.
        task: what is trained.
        world: this process's place.
        lock: rank 0's lock on the stage's folder.
        resumed: the checkpoint that the run goes on from.
        origin: where the student came from, for checkpoints.
    """

    def __init__(
        self,
        stage: Stage,
        task: Task,
        world: World,
        lock: RunLock | None = None,
        resumed: Checkpoint | None = None,
        origin: Origin | None = None,
    ):
        self._stage, self._task, self._world, self._lock = stage, task, world, lock
        self._origin = origin or Origin()
        self._start = self._done = resumed.step if resumed else 0
        self._evaluations = Evaluations(
            stage, task, world.is_main, resumed.best if resumed else None
        )
        self._checkpointer = AsyncCheckpointer(resumed.folder if resumed else None)
        self._monitor = LossMonitor(stage.watch)
        self._watchdog = Watchdog(
            stage.watch.hang_seconds,
            world.rank,
            stage.folder,
            lambda _, reason: self._report("hung", reason),
            self._start,
        )
        counts = resumed.counts if resumed else {}
        self._skips = SkipCounter(
            min(stage.watch.max_skipped, stage.steps - 1),  # a stage takes one step at least
            counts.get("skipped_steps", 0),
            counts.get("skipped_in_a_row", 0),
        )
        self._throughput = Throughput(self._start * stage.images_per_step)
        self._losses: list[float] = []
        self._status = StatusFile(stage.folder, stage.steps, stage.images_per_step, lock)
        self._is_aborted = False

    def run(self) -> Path:
        """Train to the end; returns the last checkpoint's folder.

        Raises:
            DivergedError: where numbers stay not finite; the message names the last checkpoint.
            CheckpointError: where a checkpoint or the log cannot be written.
            InterruptedRunError: where a signal asked to stop; everything is saved.
            TakenOverError: where a process started later has the folder.
        """
        stage, task, total = self._stage, self._task, self._stage.steps
        batches = task.batches(self._start)
        with self._running() as (progress, trackers):
            coming = self._throughput.next(batches) if self._start < total else None
            for step in range(self._start, total):
                assert coming is not None, "every step has its batches"
                guard = NonFiniteGuard()
                agreement = task.forward_backward(step, coming, guard, self._agree)
                # The device is at work, and the host about to wait for it.
                coming = self._throughput.next(batches) if step + 1 < total else None
                with explain_oom("the update", f"step {step + 1}", zero_hint(stage.engine)):
                    is_taken = task.engine.step(task.learning_rates(step))
                status, done = self._read(agreement), step + 1
                is_taken = is_taken and not status.is_bad
                task.end_step(is_taken)
                self._end_step(done, status, is_taken, guard)
                progress.update(done, f"loss {status.loss:.4f}")
                values: dict[str, float] = {}
                if every(done, plain(stage.log.every), total):
                    values |= self._log_values(done)
                if self._evaluations.is_due(done) and not status.signal:
                    values |= self._evaluate(done, trackers.write_image)
                if values:
                    with self._writing("its metrics"):
                        trackers.write(done, values)
                if self._save_is_due(done, status):
                    self._save(done)
                if status.signal and done < total:
                    self._stop(status.signal)
            return self._finish()

    @contextmanager
    def _running(self) -> Iterator[tuple[Progress, Trackers]]:
        """Listen to signals, watch for hangs, and say in the status how the run ends."""
        stage, is_main = self._stage, self._world.is_main
        name, steps = stage.folder.name, stage.steps
        notice = f"{name}: stopping after this step, with a checkpoint; Ctrl-C again stops at "
        notice += "once, without one"
        with ExitStack() as stack:
            stack.push(self._report_end)
            stack.enter_context(signals.listening(True, notice if is_main else ""))
            stack.enter_context(self._watchdog)
            stack.push(self._end_saving)
            if is_main:
                clear_unfinished(stage.folder / "checkpoints")
                if (stage.folder / SKIPPED).exists():
                    with self._writing(SKIPPED):
                        rewind(stage.folder / SKIPPED, self._start)
            self._report("running")
            bar = Progress(name, steps, "steps", self._start, is_main, stage.images_per_step)
            progress = stack.enter_context(bar)
            trackers = stack.enter_context(open_trackers(stage, is_main, self._start))
            self._throughput.start()
            yield progress, trackers

    def _end_saving(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Wait for the checkpoint that is under way; not for long where the run is aborted."""
        self._is_aborted = isinstance(error, KeyboardInterrupt)
        self._checkpointer.wait(_ABORT_SECONDS if self._is_aborted else None)

    def _report_end(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state: State = "failed"
        reason = " ".join(str(error).split())
        is_interrupted = isinstance(error, InterruptedRunError)
        if error is None or (is_interrupted and self._done == self._stage.steps):
            state, reason = "complete", ""
        elif is_interrupted:
            state, reason = "interrupted", str(error)
        elif isinstance(error, KeyboardInterrupt):
            state, reason = "interrupted", "aborted by Ctrl-C, without saving"
        elif not isinstance(error, RadioDistillError):
            reason = f"{type(error).__name__}: {reason}"
        self._report(state, reason)

    def _agree(self, loss: Tensor, guard: NonFiniteGuard) -> Agreement:
        return agree(loss, guard, cannot_write=self._checkpointer.error is not None)

    def _read(self, agreement: Agreement) -> StepStatus:
        try:
            return agreement.read()
        except WriteError:
            self._raise_error()
            raise

    def _end_step(
        self, done: int, status: StepStatus, is_taken: bool, guard: NonFiniteGuard
    ) -> None:
        """Count a step that was taken, or skip it; tell the watchdog and those who look at us."""
        if is_taken:
            self._skips.reset()
            self._losses.append(status.loss)
        else:
            self._skip(done, guard.causes() if status.is_bad else guard.gradient())
        self._done = done
        self._watchdog.beat(done)
        if self._world.is_main and not status.is_bad:
            _warn(self._monitor.loss(done, status.loss))
        if self._status.is_due:
            self._report("running")

    def _skip(self, done: int, causes: list[NonFinite]) -> None:
        """Log a skipped step; raises DivergedError on every rank where it is one too many."""
        causes = all_gather_object(causes)
        self._checkpointer.wait()
        last_good = run_on_main(self._world, lambda: self._checkpointer.newest)
        if self._world.is_main:
            logger.warning("step %d is skipped: %s", done, describe(causes))
            row = {"step": done, "found": [cause._asdict() for cause in causes]}
            path = self._stage.folder / SKIPPED
            with self._writing(SKIPPED), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._skips.add(done, causes, last_good)

    def _log_values(self, done: int) -> dict[str, float]:
        """Return what is logged of the steps since the last log line; every rank must call."""
        values = {"loss/total": fmean(self._losses)} if self._losses else {}
        self._losses.clear()
        values |= self._task.log_values()
        values["gradient_norm"] = self._task.engine.gradient_norm()
        rates = self._throughput.end_window(
            done * self._stage.images_per_step, self._world.world_size
        )
        if self._world.is_main:
            warning = self._monitor.rate(done, rates["images_per_second"], rates["data_wait_share"])
            _warn(warning)
        return {**values, **rates, "skipped_steps": self._skips.total}

    def _evaluate(self, done: int, write_image: WriteImage) -> dict[str, float]:
        """Score what is trained; every rank must call."""

        def beat() -> None:
            self._watchdog.beat(done)
            # There may be no time left to save after it; the others wait for rank 0 to say so.
            if self._world.is_main and signals.requested():
                raise InterruptedRunError("a signal asks the run to stop")

        with self._throughput.paused():
            return self._evaluations.run(done, beat, write_image, not self._skips.in_a_row)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Let a log that cannot be written end the run on every process, at the next step."""
        try:
            yield
        except OSError as error:
            self._checkpointer.error = self._checkpointer.error or CheckpointError(
                f"cannot write {self._stage.folder / what}: {reason_of(error)}; make room, and go "
                "on with --resume"
            )

    def _save_is_due(self, done: int, status: StepStatus) -> bool:
        """Return whether a checkpoint is to be saved after ``done`` steps.

        Not while steps are skipped: whatever made numbers run away may be in the weights already,
        and the checkpoint before is the one to go back to.
        """
        if status.signal or done == self._stage.steps:
            return True
        best = self._evaluations.best
        is_best = best is not None and best.step == done
        is_due = done % plain(self._stage.log.save_every) == 0
        return (is_due or is_best) and not self._skips.in_a_row

    def _save(self, step: int) -> None:
        """Begin to write a checkpoint; every rank must call."""
        stage = self._stage
        with self._throughput.saving():
            self._checkpointer.wait()
            hint = "free memory on the host of rank 0"
            with explain_oom("the checkpoint", f"step {step}", hint):
                tensors = self._task.tensors()
            checkpoint = Checkpoint(
                folder_of(stage.folder / "checkpoints", step),
                step,
                stage.name,
                stage.recipe,
                dict(stage.specs),
                self._task.source.fingerprint,
                {"skipped_steps": self._skips.total, "skipped_in_a_row": self._skips.in_a_row},
                world_size=self._world.world_size,
                origin=self._origin,
                best=self._evaluations.best,
            )
            keep = stage.log.keep_last, stage.log.keep_every
            if self._world.is_main and self._checkpointer.error is None:
                self._checkpointer.start(
                    lambda: save(checkpoint, tensors, *keep, may_write=self._check_may_write)
                )
        self._watchdog.beat(step)

    def _finish(self) -> Path:
        """Wait for the last checkpoint and return it; every rank must call."""
        newest = self._wait_for_checkpoint()
        is_interrupted = signals.requested() == signal.SIGINT
        if run_on_main(self._world, lambda: is_interrupted) and self._done == self._stage.steps:
            raise InterruptedRunError(  # nothing that follows the stage is to begin
                f"{self._stage.folder.name}: asked to stop by SIGINT after its last step; it is "
                f"complete: {newest}"
            )
        return newest

    def _stop(self, number: int) -> None:
        """Wait for the checkpoint of this step, and end the run; every rank must call."""
        newest, name = self._wait_for_checkpoint(), signal.Signals(number).name
        raise InterruptedRunError(
            f"{self._stage.folder.name}: asked to stop by {name} after step {self._done} of "
            f"{self._stage.steps}; saved {newest}, --resume goes on"
        )

    def _wait_for_checkpoint(self) -> Path:
        with self._throughput.saving():
            self._checkpointer.wait()
        self._raise_error()
        newest = run_on_main(self._world, lambda: self._checkpointer.newest)
        assert newest is not None, "nothing was saved"
        return newest

    def _check_may_write(self) -> None:
        if self._is_aborted:  # what is left has been told, or is about to be
            raise CheckpointError(f"{self._stage.folder.name} was aborted")
        if self._lock is not None:
            self._lock.check()

    def _raise_error(self) -> None:
        def check() -> None:
            if self._checkpointer.error is not None:
                raise self._checkpointer.error

        run_on_main(self._world, check)

    def _report(self, state: State, reason: str = "") -> None:
        """Write the status on rank 0; where another process has the folder, the run is to end."""
        if self._world.is_main:
            error = self._status.write(state, self._done, self._throughput.rate, reason)
            self._checkpointer.error = self._checkpointer.error or error


def _warn(line: str | None) -> None:
    if line:
        logger.warning("%s", line)
