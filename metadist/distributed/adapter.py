"""The adapter: samples the episodes of a range of chunks, adapts to each, and sums their meta-gradients.

A plain class: the in-process executor calls it, and Ray runs it as an actor.
"""

import hashlib
import platform
import time
import traceback
from typing import Any

import numpy as np
import torch

from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import EpisodeScores, MetaGradient, Sums, score_episodes
from metadist.core.plan import Plan, Range
from metadist.core.reduction import reduce_tree
from metadist.core.task_source import spec_of
from metadist.distributed.seconds import Seconds
from metadist.errors import AdapterError, ClusterError, MetadistError, NonFiniteError
from metadist.experiment import Experiment


class Adapter:
    """Computes sums and scores over ranges of chunks; has no state that a result depends on."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.device = torch.device(experiment.device)
        self._seconds = Seconds()
        torch.set_num_threads(experiment.threads)
        self.meta_gradient = MetaGradient(
            experiment.algorithm,
            experiment.network,
            experiment.theta,
            strategy=experiment.strategy,
            compile=experiment.compile,
        )

    def fingerprint(self) -> dict[str, Any]:
        """What a result's bits depend on, with the hash of a canonical chunk's meta-gradient at the first theta.

        Computing it compiles what is to be compiled.
        """
        experiment = self.experiment
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ClusterError(
                "scaling.use_gpu is true, but torch sees no CUDA device in an adapter. Set it to false, or run"
                " where `metadist doctor` lists a GPU."
            )
        plan = Plan(experiment.run_seed, "train", 0, experiment.chunk_size, experiment.chunk_size)
        published = np.concatenate([experiment.initial_theta, experiment.initial_statistics])
        canonical = self.sum_range(plan, Range(0, 1), published)
        self.take_seconds()  # They are those of compiling.
        on_gpu = self.device.type == "cuda"
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": experiment.threads,
            "strategy": experiment.strategy,
            "compile": experiment.compile,
            "dtype": "float32",
            "chunk_size": experiment.chunk_size,
            "canonical_gradient": hashlib.sha256(canonical.gradient.tobytes()).hexdigest(),
        }

    def sum_range(self, plan: Plan, span: Range, published: np.ndarray) -> Sums:
        """Sums over an aligned range of chunks, in tree order; `published` is theta and the running statistics."""
        theta, statistics = self._split(published)

        def node(chunks: Range) -> Sums | None:
            if chunks.stop - chunks.start > 1:
                return None
            chunk, keys = chunks.start, plan.keys(chunks.start)
            where = f"step {plan.step}, chunk {chunk}"
            began = time.perf_counter()
            batch = self._sample(where, keys)
            sampled = time.perf_counter()
            try:
                return self.meta_gradient.sum_chunk(theta, statistics, batch, plan.weights(chunk), keys)
            except NonFiniteError as error:
                raise NonFiniteError(f"{where}, {error}") from None
            except MetadistError:
                raise
            except Exception as error:
                raise _named(error, f"{where} (tasks {keys[0]} to {keys[-1]}): adapting") from error
            finally:
                self._seconds += Seconds(sampled - began, time.perf_counter() - sampled)

        return reduce_tree(span, node, Sums.__add__)

    def take_seconds(self) -> Seconds:
        """What sampling and adapting for sums took since the last call."""
        taken, self._seconds = self._seconds, Seconds()
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

    def _sample(self, where: str, keys: list[TaskKey]) -> EpisodeBatch:
        source = self.experiment.source
        try:
            batch = source.sample(keys)
        except MetadistError:
            raise
        except Exception as error:
            raise _named(
                error, f"{where} (tasks {keys[0]} to {keys[-1]}): task source {type(source).__name__}"
            ) from error
        spec_of(source, keys[0].split).check(batch, keys, source)
        return EpisodeBatch(*(Examples(*(tensor.to(self.device) for tensor in part)) for part in batch))

    def _split(self, published: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        # A copy: arrays from Ray's object store are read-only and shared by every process of the node.
        vector = torch.tensor(published, device=self.device)
        size = self.experiment.theta.size
        return vector[:size], vector[size:]


def _named(error: Exception, where: str) -> AdapterError:
    """A foreign exception as one message that says where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return AdapterError(f"{where} raised {type(error).__name__}: {error}{place}. Correct it and resume the run.")
