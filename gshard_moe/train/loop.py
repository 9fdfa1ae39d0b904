"""The training loop: steps, metrics, evaluation, checkpoints, and every way to stop."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Iterator

import jax
import numpy as np

from gshard_moe.layout import Layout
from gshard_moe.train import data
from gshard_moe.train.checkpoint import Checkpoints, Restored
from gshard_moe.train.corpus import Corpus, gzip_bits_per_byte
from gshard_moe.train.interrupt import Interrupts
from gshard_moe.train.metrics import MetricsLog
from gshard_moe.train.progress import Reporter
from gshard_moe.train.run import Run, RunError
from gshard_moe.train.state import Model, TrainState, abstract_state, init_state
from gshard_moe.train.step import StepMetrics, eval_sums, jit_train_step

# The tokens are bytes.
_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
      step: the last step taken; it is saved.
      stopped_by: the signal that ended it early, or None.
      eval_loss: nats per held-out byte after the last step; None if it ended early.
    """

    step: int
    stopped_by: signal.Signals | None = None
    eval_loss: float | None = None


class Training:
    """One training. Nothing is written before `run`."""

    def __init__(self, run: Run, layout: Layout, corpus: Corpus):
        """Refuses what could not be trained.

        Args:
          run: what is trained.
          layout: bound to the mesh.
          corpus: of the digest that the run has.
        Raises:
          RunError: if the vocabulary does not hold every byte, or the seed is out of range.
          DataError: if the corpus is shorter than a sequence.
        """
        if run.model.vocab_size < _BYTES:
            raise RunError(
                "vocab_size: must hold every byte of the text; "
                f"got vocab_size={run.model.vocab_size}, bytes={_BYTES}"
            )
        if not 0 <= run.seed < 2**32:  # JAX's keys hold no more
            raise RunError(f"seed: must be from 0 to 2^32 - 1; got {run.seed}")
        self.spec = run
        self.options = run.options
        self.corpus = corpus
        self.config = run.model.train
        self.model = Model(run.model, layout)
        self.tokens = layout.sharding("token_ids")
        self.data = data.TrainData(
            corpus,
            batch_size=self.config.batch_size,
            seq_len=self.config.seq_len,
            seed=run.seed,
        )
        self.first = jax.process_index() == 0
        self._step = jit_train_step(self.model)
        whole = jax.sharding.NamedSharding(layout.mesh(), jax.sharding.PartitionSpec())
        sums = functools.partial(eval_sums, model=self.model)
        self._eval = jax.jit(sums, out_shardings=(whole, whole))

    def run(self, *, resume: bool) -> Outcome:
        """Trains to the last step, or until a signal.

        Args:
          resume: goes on from the newest whole checkpoint, if there is one.
        Raises:
          RunError: if the loss is not finite.
          CheckpointError: if a checkpoint cannot be written, or none of those there can be read.
        """
        with contextlib.ExitStack() as stack:
            self.report = stack.enter_context(
                Reporter(enabled=self.first, total_steps=self.config.steps)
            )
            interrupts = stack.enter_context(Interrupts(self.report.say))
            self.checkpoints = stack.enter_context(
                Checkpoints(self.spec.checkpoints, keep=self.options.keep)
            )
            restored = self._restore() if resume else None
            if restored is None:
                done = position = 0
                state = init_state(self.model, self.spec.seed)
            else:
                done, position = restored.step, restored.extra["position"]
                state = restored.state
            self.metrics = stack.enter_context(
                MetricsLog(
                    self.spec.directory, resume_after=done if resume else None, enabled=self.first
                )
            )
            return self._steps(state, done, position, interrupts)

    def _restore(self) -> Restored | None:
        restored = self.checkpoints.restore(abstract_state(self.model), say=self.report.say)
        if restored is None:
            self.report.say("no checkpoint yet: starting from step 0")
        else:
            self.report.say(f"going on from {self.checkpoints.name(restored.step)}")
        return restored

    def _steps(
        self, state: TrainState, done: int, position: int, interrupts: Interrupts
    ) -> Outcome:
        """Steps until the end or a signal; the last state is saved in either case."""
        batches = data.batches(self.data, start=position, sharding=self.tokens)
        self._logged_at = time.perf_counter(), done
        pending: tuple[int, StepMetrics] | None = None
        eval_loss = stopped = None
        with contextlib.closing(batches):
            while done < self.config.steps and stopped is None:
                batch = next(batches)
                state, metrics = self._step(state, batch.inputs_BL, batch.targets_BL)
                done += 1
                # One step stays in flight while the one before it is looked at.
                if pending is not None:
                    self._look_at(*pending)
                pending = done, metrics
                stopped = interrupts.after_step(done)
                last = done == self.config.steps
                evaluate = self._due(self.options.eval_every, done) or last
                save = self._due(self.options.save_every, done) or last or stopped is not None
                if evaluate or save:
                    self._look_at(*pending)
                    pending = None
                if evaluate:  # also on a signal: a resumed run does not evaluate this step again
                    eval_loss = self._evaluate(state, done)
                if save:
                    self.checkpoints.save(done, state, {"position": batch.position})
        self.checkpoints.wait()
        if stopped is not None and done < self.config.steps:
            self.report.say(
                f"{stopped.name}: saved {self.checkpoints.name(done)}; --resume goes on"
            )
            return Outcome(done, stopped)
        if eval_loss is None:  # resumed after the last step
            eval_loss = self._held_out_loss(state)
        self._conclude(done, eval_loss)
        return Outcome(done, eval_loss=eval_loss)

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _look_at(self, step: int, metrics: StepMetrics) -> None:
        """Stops on a loss that is not finite; logs the step if it is to be logged."""
        values = {name: np.asarray(value).item() for name, value in metrics._asdict().items()}
        if not values.pop("finite") and not self.options.skip_nonfinite:
            self.checkpoints.wait()
            latest = self.checkpoints.latest()
            newest = "there is none yet" if latest is None else self.checkpoints.name(latest)
            raise RunError(
                f"step {step}: loss and gradient must be finite; got loss={values['loss']}, "
                f"grad_norm={values['grad_norm']}; the newest checkpoint: {newest}; start another "
                "--run with a lower --learning-rate, or --resume this one with --skip-nonfinite "
                "to leave such steps out"
            )
        values["bpb"] = values["loss"] / math.log(2)
        if self._due(self.options.log_every, step) or step == self.config.steps:
            now, (since, first) = time.perf_counter(), self._logged_at
            tokens = (step - first) * self.config.batch_size * self.config.seq_len
            values["tokens_per_s"] = tokens / max(now - since, 1e-9)
            self._logged_at = now, step
            self.metrics.train(step, **values)
            self.report.update(step, values)

    def _evaluate(self, state: TrainState, step: int) -> float:
        loss = self._held_out_loss(state)
        self.metrics.eval(step, eval_loss=loss, eval_bpb=loss / math.log(2))
        self.report.say(f"step {step}: held out {loss / math.log(2):.4f} bits/byte")
        # The time of an evaluation is not the training's.
        self._logged_at = time.perf_counter(), step
        return loss

    def _held_out_loss(self, state: TrainState) -> float:
        """Returns the mean cross-entropy over every held-out byte but the first, in nats."""
        nats = count = 0.0
        for batch in self._held_out():
            total, targets = self._eval(
                state.params,
                batch.inputs_BL,
                batch.targets_BL,
                batch.mask_BL,
                biases=state.biases,
            )
            nats += float(total)
            count += float(targets)
        return nats / count

    def _held_out(self) -> Iterator[data.EvalBatch]:
        return data.held_out_batches(
            self.corpus,
            batch_size=self.config.microbatch_size,
            seq_len=self.config.seq_len,
            sharding=self.tokens,
        )

    def _conclude(self, done: int, eval_loss: float) -> None:
        gzip = gzip_bits_per_byte(self.corpus.held_out)
        self.report.say(f"trained {done} steps; saved {self.checkpoints.name(done)}")
        self.report.say(
            f"held-out files: this model {eval_loss / math.log(2):.3f} bits/byte, "
            f"gzip -9 {gzip.together:.3f} (file by file {gzip.file_by_file:.3f})"
        )
