"""What keeps a run of days alive, or ends it well; the training loops call it at every step.

::

    agree      all processes learn of a step's loss, of numbers that are not finite, and of signals
    end_step   heartbeat; how the stage is doing, for those who look from outside
    save       a checkpoint, written in the background
    stop       save, and end, because a signal asked for it

One small sum over all processes a step carries everything that they must agree on.
"""

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import plain
from ..errors import CheckpointError, InterruptedRunError, RadioDistillError
from ..stage import Stage
from ..system import signals as interruption
from ..system.distributed import World, all_gather_object, all_reduce_sum, run_on_main
from ..system.files import reason_of
from ..system.memory import explain_oom
from ..types import TeacherSpec
from .checkpoint import Checkpoint, Origin, folder_of
from .checkpointer import AsyncCheckpointer, clear_unfinished, save
from .health import LossMonitor, NonFinite, NonFiniteGuard, SkipCounter, describe
from .run_dir import RunLock, Status, write_status
from .watchdog import Watchdog

logger = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"
"""One line for each skipped step: its number and what was found."""

_ABORT_SECONDS = 1.0
"""That an aborted run waits for a checkpoint which is nearly written."""
_STATUS_SECONDS = 5.0  # between two writes of the status, which may be a network file


class Signs(NamedTuple):
    """What all processes know of a step before any of them ends it."""

    loss: float
    """Of the whole step."""
    trouble: bool
    """Something is not finite, on some process."""
    signal: int
    """That asked some process to stop; 0 for none."""


def agree(loss: Tensor, findings: NonFiniteGuard, problem: bool = False) -> Signs:
    """Sum up over all processes; ``problem`` is one of rank 0's, see :class:`Lifeline`.

    Args:
        loss: this process's part.
        findings: what its passes gave.
        problem: whether this process cannot go on.

    Raises:
        _ProblemError: on every process, where one cannot go on.
    """
    asked = interruption.requested()
    flags = torch.tensor(
        [asked == number for number in interruption.SIGNALS] + [problem],
        dtype=torch.float64,
        device=loss.device,
    )
    values = torch.stack([loss.detach().double(), findings.flag(loss.device)])
    total, trouble, *asked_by, problems = all_reduce_sum(torch.cat([values, flags])).tolist()
    if problems:
        raise _ProblemError
    numbers = zip(interruption.SIGNALS, asked_by, strict=True)
    return Signs(total, trouble > 0, next((int(number) for number, by in numbers if by), 0))


class _ProblemError(Exception):
    """Rank 0 cannot go on; what it is follows."""


class Lifeline:
    """One process's part in keeping a stage alive; a context around its training loop.

    Args:
        stage: gives how often what is done, and what is watched for.
        teachers: what the checkpoints' heads belong to.
        world: this process's place.
        ownership: rank 0's claim on the folder.
        resumed: the checkpoint that the run goes on from.
        shards: fingerprint of the data.
        origin: where the student came from, for checkpoints.
    """

    def __init__(
        self,
        stage: Stage,
        teachers: Mapping[str, TeacherSpec],
        world: World,
        ownership: RunLock | None,
        resumed: Checkpoint | None = None,
        shards: str = "",
        origin: Origin | None = None,
    ):
        self._origin = origin
        self._folder, self._stage, self._world = stage.folder, stage, world
        self._steps, self._ownership = stage.steps, ownership
        self._step = resumed.step if resumed else 0
        self._teachers, self._shards = teachers, shards
        self._saver = AsyncCheckpointer(resumed.folder if resumed else None)
        self._watch = LossMonitor(stage.watch)
        self._heartbeat = Watchdog(
            stage.watch.hang_seconds, world.rank, stage.folder, self._on_hang, self._step
        )
        counts = resumed.counts if resumed else {}
        self.skips = SkipCounter(
            min(stage.watch.max_skipped, stage.steps - 1),  # a stage takes one step at least
            counts.get("skipped_steps", 0),
            counts.get("skipped_in_a_row", 0),
        )
        self._images_per_step = stage.images_per_step
        self._rate, self._status_time = 0.0, -math.inf
        self._saving = 0.0  # seconds that this process has waited for checkpoints
        self._log_time, self._log_images = time.monotonic(), self._step * stage.images_per_step
        self._log_waited = self._log_saving = 0.0
        self._stack = ExitStack()
        self._is_aborted = False

    def __enter__(self) -> "Lifeline":
        self._log_time = time.monotonic()
        notice = f"{self._folder.name}: stopping after this step, with a checkpoint; Ctrl-C again "
        notice += "stops at once, without one"
        listening = interruption.listening(True, notice if self._world.is_main else "")
        self._stack.enter_context(listening)
        self._stack.enter_context(self._heartbeat)
        if self._world.is_main:
            clear_unfinished(self._folder / "checkpoints")
        self._report("running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_aborted = isinstance(error, KeyboardInterrupt)
        self._saver.wait(_ABORT_SECONDS if self._is_aborted else None)
        self._stack.close()
        is_complete = isinstance(error, InterruptedRunError) and self._step == self._steps
        if error is None or is_complete:
            self._report("complete")
        elif isinstance(error, InterruptedRunError):
            self._report("interrupted", str(error))
        elif isinstance(error, KeyboardInterrupt):
            self._report("interrupted", "aborted by Ctrl-C, without saving")
        else:
            reason = " ".join(str(error).split())
            own = isinstance(error, RadioDistillError)
            self._report("failed", reason if own else f"{type(error).__name__}: {reason}")

    def agree(self, loss: Tensor, findings: NonFiniteGuard) -> Signs:
        """Let all processes know of the step; see :func:`agree`.

        Raises:
            CheckpointError, TakenOverError: on every process, where rank 0 cannot write.
        """
        try:
            return agree(loss, findings, problem=self._saver.error is not None)
        except _ProblemError:
            self._raise_problem()
            raise

    def skip(self, step: int, findings: Sequence[NonFinite]) -> None:
        """Note that a step was skipped, counted from 1; every rank calls with its findings.

        Raises:
            DivergedError: on every rank, where it is one too many in a row.
        """
        found = all_gather_object(list(findings))
        self._saver.wait()
        last_good = run_on_main(self._world, lambda: self._saver.newest)
        if self._world.is_main:
            logger.warning("step %d is skipped: %s", step, describe(found))
            row = {"step": step, "found": [item._asdict() for item in found]}
            with (
                self.writing(SKIPPED),
                (self._folder / SKIPPED).open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(row) + "\n")
        self.skips.add(step, found, last_good)

    def end_step(self, done: int, signs: Signs) -> None:
        """Note that ``done`` steps are done."""
        self._step = done
        self._heartbeat.beat(done)
        if not self._world.is_main:
            return
        if not signs.trouble:
            _warn(self._watch.loss(done, signs.loss))
        if time.monotonic() - self._status_time >= _STATUS_SECONDS:
            self._report("running")

    def end_log(self, images: int, waited: float) -> dict[str, float]:
        """Measure how it went since the last log line; every rank must call.

        Args:
            images: of the stage, that are done.
            waited: seconds that this process has waited for data so far.

        Returns:
            Rate and shares, for the log.
        """
        now = time.monotonic()
        seconds = max(now - self._log_time, 1e-9)
        shares = torch.tensor([waited - self._log_waited, self._saving - self._log_saving])
        data, saving = (all_reduce_sum(shares) / (seconds * self._world.world_size)).tolist()
        rate = (images - self._log_images) / seconds
        self._log_time, self._log_waited = now, waited
        self._log_saving, self._log_images = self._saving, images
        self._rate = rate
        if self._world.is_main:
            _warn(self._watch.rate(self._step, rate, data))
        return {
            "images_per_second": rate,
            "data_wait_share": data,
            "checkpoint_wait_share": saving,
            "skipped_steps": self.skips.total,
        }

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Let a log that cannot be written end the run on every process, at the next agreement."""
        try:
            yield
        except OSError as error:
            self._saver.error = self._saver.error or CheckpointError(
                f"cannot write {self._folder / what}: {reason_of(error)}; make room, and go on "
                "with --resume"
            )

    def due(self, done: int, signs: Signs) -> bool:
        """Return whether a checkpoint is to be saved after ``done`` steps.

        Not while steps are skipped: whatever made numbers run away may be in the weights already,
        and the checkpoint before is the one to go back to.
        """
        if signs.signal or done == self._steps:
            return True
        return done % plain(self._stage.log.save_every) == 0 and not self.skips.in_a_row

    def save(self, step: int, parts: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Begin to write a checkpoint; every rank must call.

        Args:
            step: steps that are done.
            parts: gathers the tensors of each file, on the host of rank 0; called on every rank.
        """
        begin = time.monotonic()
        self._saver.wait()
        with explain_oom("the checkpoint", f"step {step}", "free memory on the host of rank 0"):
            tensors = parts()
        counts = {"skipped_steps": self.skips.total, "skipped_in_a_row": self.skips.in_a_row}
        if self._world.is_main and self._saver.error is None:
            self._saver.start(lambda: self._write(step, tensors, counts))
        self._saving += time.monotonic() - begin
        self._heartbeat.beat(step)

    def finish(self) -> Path:
        """Wait for the last checkpoint and return it; every rank must call.

        Raises:
            CheckpointError, TakenOverError: on every rank, where rank 0 could not write.
            InterruptedRunError: on every rank, where Ctrl-C came with the last step: nothing that
                follows the stage is to begin.
        """
        newest, asked = self._wait(), interruption.requested() == signal.SIGINT
        if run_on_main(self._world, lambda: asked) and self._step == self._steps:
            raise InterruptedRunError(
                f"{self._folder.name}: asked to stop by SIGINT after its last step; it is "
                f"complete: {newest}"
            )
        return newest

    def _wait(self) -> Path:
        begin = time.monotonic()
        self._saver.wait()
        self._saving += time.monotonic() - begin
        self._raise_problem()
        newest = run_on_main(self._world, lambda: self._saver.newest)
        assert newest is not None, "nothing was saved"
        return newest

    def stop(self, number: int) -> None:
        """Wait for the checkpoint of this step, and end the run; every rank must call."""
        folder, name = self._wait(), signal.Signals(number).name
        raise InterruptedRunError(
            f"{self._folder.name}: asked to stop by {name} after step {self._step} of "
            f"{self._steps}; saved {folder}, --resume goes on"
        )

    def _write(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], counts: Mapping[str, int]
    ) -> Path:
        log = self._stage.log
        checkpoint = Checkpoint(
            folder_of(self._folder / "checkpoints", step),
            step,
            self._stage.name,
            self._stage.recipe,
            dict(self._teachers),
            self._shards,
            dict(counts),
            world_size=self._world.world_size,
            origin=self._origin or Origin(),
        )
        return save(checkpoint, tensors, log.keep_last, log.keep_every, self._check_may_write)

    def _check_may_write(self) -> None:
        if self._is_aborted:  # what is left has been told, or is about to be
            raise CheckpointError(f"{self._folder.name} was aborted")
        self._check_ownership()

    def _check_ownership(self) -> None:
        if self._ownership is not None:
            self._ownership.check()

    def _raise_problem(self) -> None:
        def check() -> None:
            if self._saver.error is not None:
                raise self._saver.error

        run_on_main(self._world, check)

    def _report(self, state: Any, reason: str = "") -> None:
        """Write the status, unless another process has taken over, or the disk is full."""
        if not self._world.is_main:
            return
        self._status_time = time.monotonic()
        left = (self._steps - self._step) * self._images_per_step
        status = Status(
            state=state,
            step=self._step,
            steps=self._steps,
            images_per_second=self._rate,
            seconds_left=left / self._rate if self._rate else 0.0,
            reason=reason,
        )
        try:
            self._check_ownership()
            write_status(self._folder, status)
        except OSError as error:
            logger.warning("cannot write the status of %s: %s", self._folder, error)
        except RadioDistillError as error:
            self._saver.error = self._saver.error or error

    def _on_hang(self, step: int, reason: str) -> None:
        del step
        self._report("hung", reason)


def _warn(line: str | None) -> None:
    if line:
        logger.warning("%s", line)
