"""The adapter: samples the episodes of a range of chunks, adapts to each, and sums their meta-gradients.

A plain class: the in-process executor calls it, and Ray runs it as an actor.
"""

import hashlib
import platform
import time
from typing import Any

import numpy as np
import torch

from metadist.core.bad_episode import BadEpisode
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.keys import TaskKey
from metadist.core.memory import keep_freed_memory
from metadist.core.meta_gradient import METRICS, EpisodeScores, MetaGradient, Sums, score_episodes
from metadist.core.plan import Plan, Range
from metadist.core.reduction import reduce_tree
from metadist.core.task_source import spec_of
from metadist.distributed.receipt import Receipt
from metadist.distributed.sampling import (
    is_out_of_memory,
    named,
    sample_or_name,
    sample_what_can_be,
    with_rows_replaced,
)
from metadist.distributed.seconds import Seconds
from metadist.errors import ClusterError, MetadistError, NonFiniteError
from metadist.experiment import Experiment

Sampled = tuple[EpisodeBatch | None, dict[int, str]]
"""A chunk's episodes, and the tasks that have none; None where no task has one."""


def has_bf16(device: str) -> bool:
    """Whether a device computes in bfloat16 itself; a CPU at least gives the right results."""
    return device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)


class Adapter:
    """Computes sums and scores over ranges of chunks; has no state that a result depends on."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.device = torch.device(experiment.device)
        self._source_name = type(experiment.source).__name__
        self._receipt = Receipt()
        self._sampled: dict[tuple[Plan, int], Sampled] = {}
        """Chunks that are sampled already; at most those of one range."""
        torch.set_num_threads(experiment.threads)
        keep_freed_memory()
        self.meta_gradient = MetaGradient(
            experiment.algorithm,
            experiment.network,
            experiment.theta,
            strategy=experiment.strategy,
            compile=experiment.compile,
            device=experiment.device,
            precision=experiment.precision,
        )

    def fingerprint(self) -> dict[str, Any]:
        """What a result's bits depend on, with the hash of a canonical chunk's meta-gradient at the first theta.

        Computing it compiles what is to be compiled.
        """
        experiment = self.experiment
        on_gpu = self.device.type == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise ClusterError(
                "scaling.use_gpu is true, but torch sees no CUDA device in an adapter. Set it to false, or run"
                " where `metadist doctor` lists a GPU."
            )
        if experiment.precision == "bf16-mixed" and not has_bf16(experiment.device):
            raise ClusterError(
                f"training.precision is bf16-mixed, but {torch.cuda.get_device_name()} cannot compute in bfloat16. Use"
                " float32, or a newer GPU."
            )
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)  # Of this run, and of none before it in the same process.
        plan = Plan(experiment.run_seed, "train", 0, experiment.chunk_size, experiment.chunk_size)
        published = np.concatenate([experiment.initial_theta, experiment.initial_statistics])
        canonical = self.sum_range(plan, Range(0, 1), published)
        self.take_receipt()  # It is that of compiling.
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": experiment.threads,
            "strategy": experiment.strategy,
            "compile": experiment.compile,
            "dtype": experiment.precision,
            "chunk_size": experiment.chunk_size,
            "canonical_gradient": hashlib.sha256(canonical.gradient.tobytes()).hexdigest(),
            **({"learner": experiment.learner_device} if experiment.learner_device != "cpu" else {}),
        }

    def sample_ahead(self, plan: Plan, span: Range) -> None:
        """Samples the episodes of a range that `sum_range` will be asked for: they do not depend on theta."""
        self._sampled.clear()
        for chunk in range(span.start, span.stop):
            self._sampled[plan, chunk] = self._sample_for_training(plan, chunk)

    def sum_range(self, plan: Plan, span: Range, published: np.ndarray) -> Sums:
        """Sums over an aligned range of chunks, in tree order; `published` is theta and the running statistics."""
        theta, statistics = self._split(published)

        # What a call that raised has left behind is not this one's.
        self._receipt = Receipt(self._receipt.seconds)

        def node(chunks: Range) -> Sums | None:
            if chunks.stop - chunks.start > 1:
                return None
            return self._sum_chunk(plan, chunks.start, theta, statistics)

        return reduce_tree(span, node, Sums.__add__)

    def _sum_chunk(self, plan: Plan, chunk: int, theta: torch.Tensor, statistics: torch.Tensor) -> Sums:
        """Sums over one chunk, without its bad tasks where training.on_bad_episode says so."""
        keys, weights = plan.keys(chunk), plan.weights(chunk)
        where = _place(plan, chunk)
        ahead = self._sampled.pop((plan, chunk), None)
        batch, bad = ahead if ahead is not None else self._sample_for_training(plan, chunk)
        began = time.perf_counter()
        try:
            sums = None
            if batch is not None and not bad:
                try:
                    sums = self.meta_gradient.sum_chunk(theta, statistics, batch, weights, keys)
                except Exception as error:
                    if not self.experiment.skips_bad_episodes or is_out_of_memory(error):
                        raise
                    bad = self.meta_gradient.bad_tasks(theta, statistics, batch, weights, keys)
                    if not bad:
                        raise
            return sums or self._sum_good(plan, chunk, theta, statistics, batch, bad)
        except NonFiniteError as error:
            raise NonFiniteError(f"{where}, task source {self._source_name}, {error}") from None
        except MetadistError:
            raise
        except Exception as error:
            raise named(error, f"{where} (tasks {keys[0]} to {keys[-1]}): adapting") from error
        finally:
            self._receipt += Receipt(Seconds(adapting=time.perf_counter() - began))

    def _sum_good(
        self,
        plan: Plan,
        chunk: int,
        theta: torch.Tensor,
        statistics: torch.Tensor,
        batch: EpisodeBatch | None,
        bad: dict[int, str],
    ) -> Sums:
        """Sums over a chunk some of whose tasks are known to be bad; others may be found on the way."""
        keys, weights = plan.keys(chunk), plan.weights(chunk)
        if batch is not None:
            rest = np.array([weight * (task not in bad) for task, weight in enumerate(weights)], np.float32)
            bad = bad | self.meta_gradient.bad_tasks(theta, statistics, batch, rest, keys)
        good = [task for task, weight in enumerate(weights) if weight > 0 and task not in bad]
        left_out = [task for task, weight in enumerate(weights) if weight > 0 and task in bad]
        self._receipt += Receipt(
            bad=tuple(BadEpisode(keys[task], chunk, self._source_name, bad[task]) for task in left_out)
        )
        sums = Sums(
            np.zeros(len(theta), np.float32), np.zeros(len(statistics), np.float32), np.zeros(len(METRICS), np.float32)
        )
        if batch is not None and good:
            for task in left_out:
                weights[task] = 0
            batch = with_rows_replaced(batch, left_out, good[0])
            sums = self.meta_gradient.sum_chunk(theta, statistics, batch, weights, keys)
        return sums._replace(left_out=np.array([len(left_out)], np.float32))

    def take_receipt(self) -> Receipt:
        """What sampling and adapting for sums took since the last call, and the last range's bad tasks."""
        taken, self._receipt = self._receipt, Receipt()
        if self.device.type == "cuda":
            taken += Receipt(device_bytes=torch.cuda.max_memory_allocated(self.device))
        return taken

    def score_range(
        self, plan: Plan, span: Range, published: np.ndarray, inner_steps: int, policies: list[BatchNormPolicy]
    ) -> EpisodeScores:
        """Scores of the adapted models of a range of chunks, `[policies, episodes, inner_steps + 1, ..]`."""
        theta, statistics = self._split(published)
        parts = []
        for chunk in range(span.start, span.stop):
            scores = score_episodes(
                self.experiment.algorithm,
                self.experiment.network,
                self.experiment.theta,
                theta,
                statistics,
                self._sample(f"evaluation, chunk {chunk}", plan.keys(chunk)),
                inner_steps=inner_steps,
                policies=policies,
                strategy=self.experiment.strategy,
                # Episodes of the training split may have other ways than those of the spec.
                ways=spec_of(self.experiment.source, plan.split).output_size,
            )
            kept = int(plan.weights(chunk).sum())
            parts.append(EpisodeScores(*(part[:, :kept] for part in scores)))
        return EpisodeScores(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)))

    def _sample_for_training(self, plan: Plan, chunk: int) -> Sampled:
        began = time.perf_counter()
        try:
            if not self.experiment.skips_bad_episodes:
                return self._sample(_place(plan, chunk), plan.keys(chunk)), {}
            batch, bad = sample_what_can_be(self.experiment.source, plan.keys(chunk))
            return None if batch is None else self._moved(batch), bad
        finally:
            self._receipt += Receipt(Seconds(sampling=time.perf_counter() - began))

    def _sample(self, where: str, keys: list[TaskKey]) -> EpisodeBatch:
        return self._moved(sample_or_name(self.experiment.source, keys, where))

    def _moved(self, batch: EpisodeBatch) -> EpisodeBatch:
        if self.device.type == "cpu":
            return batch
        # From pinned memory, so that this process need not wait for the copy.
        return EpisodeBatch(
            *(Examples(*(part.pin_memory().to(self.device, non_blocking=True) for part in pair)) for pair in batch)
        )

    def _split(self, published: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        # A copy: arrays from Ray's object store are read-only and shared by every process of the node.
        vector = torch.tensor(published, device=self.device)
        size = self.experiment.theta.size
        return vector[:size], vector[size:]


def _place(plan: Plan, chunk: int) -> str:
    return f"step {plan.step}, chunk {chunk}"
