"""The sections of a config that are the same for every task, model and algorithm."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.meta_gradient import Precision
from metadist.core.settings import settings

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Label = Annotated[str, Field(pattern=r"^!?([\w.-]*|in\([\w.-]+(, ?[\w.-]+)*\))$")]
Split = Literal["train", "val", "test"]


@settings
class TrainingSettings:
    """Section `training`."""

    steps: Count = 1000
    meta_batch_size: Count = 32
    """Tasks a step."""
    chunk_size: Count | None = None
    """Tasks adapted in one call; left out, an eighth of the meta-batch. Fixes the bits: never follows the workers."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch_norm: BatchNormPolicy | None = None
    """Must be given where the model has batch norm."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the outer loop's cross entropy (Szegedy et al. 2016, arXiv:1512.00567, sec. 7); evaluation has none."""
    on_bad_episode: Literal["raise", "skip"] = "raise"
    """Of a training task whose sampling or adapting raises, or whose loss or meta-gradient is NaN or infinite: ends the
    run with its name, or leaves it out of the step's mean and writes it into bad_episodes.jsonl."""
    max_bad_episodes: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Of `skip`: the largest share of the tasks of 100 steps, the last ones, that may be bad until the run ends."""
    strategy: Literal["auto", "vmap", "loop"] = "auto"
    """`auto`: one by one for models with convolutions on a CPU, all tasks of a chunk at once otherwise. One by one
    and compiled on a CPU, plain layers are computed in another way (`metadist/core/layers.py`)."""
    compile: Literal["auto"] | bool = "auto"
    """`auto`: compiled for models with convolutions, whose runs are long enough to repay it, where a C++
    compiler is there (on a GPU none is needed); never with algorithm.checkpoint_inner_steps, since the compiler
    itself decides what it keeps."""

    precision: Precision = "float32"
    """`bf16-mixed`: matrix products and convolutions of a meta-gradient in bfloat16, forward and backward; parameters,
    batch norm, losses and all sums stay float32, and so does evaluation. For GPUs that have it; on a CPU for trying."""

    @property
    def tasks_per_chunk(self) -> int:
        return self.chunk_size or -(-self.meta_batch_size // 8)


@settings
class EvaluationSettings:
    """Section `evaluation`."""

    split: Split = "test"
    episodes: Count = 600
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    inner_steps: CountOrZero | None = None
    """Inner steps at test; left out, the algorithm's own."""
    every: CountOrZero = 0
    """Steps between evaluations on the validation split while training; 0 for none."""
    val_episodes: Count = 200
    """Episodes of each of those."""


@settings
class ScalingSettings:
    """Section `scaling`, in the words of Ray's ScalingConfig."""

    num_workers: CountOrZero | tuple[Count, Count] = 2
    """Adapters: a number, or (min, max) for as many as the cluster has room for; 0 trains in this process."""
    backend: Literal["actors", "train"] = "actors"
    """`actors`: a dead adapter costs its own chunks, and the learner is one process. `train`: ranks of Ray Train that
    all-reduce among themselves, each with a learner, for big models on equal nodes; a dead rank restarts all of them
    from the last checkpoint."""
    reduce: Literal["exact", "fast"] = "exact"
    """Of backend `train`. `exact`: all ranges' sums go to every rank and are added in tree order, with the bits of any
    other backend. `fast`: a float all-reduce, whose last bits depend on the number of ranks."""
    shard_optimizer: bool = False
    """Of backend `train`: each rank keeps the optimizer's state of its share of theta (ZeRO-1). Changes no bit."""
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] = field(default_factory=lambda: {"CPU": 1.0})
    use_gpu: bool = False
    """One GPU an adapter, unless resources_per_worker says otherwise: `{CPU: 1, GPU: 0.25}` for four a GPU."""
    learner_gpus: Annotated[float, Field(ge=0)] = 0.0
    """The share of a GPU on which the learner steps, of the driver's node; 0 for the CPU, whose bits are others. With
    backend `train` anything above 0 has each rank step on its own GPU."""
    label_selector: dict[str, Label] = field(default_factory=dict)
    """Labels of the nodes for adapters, each with Ray's rule for it: `a`, `!a`, `in(a,b)` or `!in(a,b)`."""
    placement_strategy: Literal["PACK", "SPREAD"] = "PACK"
    threads_per_worker: Count = 1
    """torch's threads in every process that computes, with Ray or without: the bits depend on it."""
    address: str | None = None
    """A Ray cluster's address; left out, $RAY_ADDRESS or a new local one."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """How long to wait for the first (or the least number of) adapters."""
    hung_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """How long an adapter may stay silent after another has answered for it, and a learner after its longest answers,
    until it is ended and replaced."""

    @property
    def worker_limits(self) -> tuple[int, int]:
        """Least and largest number of adapters."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


@settings
class FailureSettings:
    """`run.failure_config`, in the words of Ray's FailureConfig."""

    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How often a lost learner, or with backend `train` the group of ranks, is replaced; -1 for always. Lost adapters
    are always replaced."""


@settings
class CheckpointSettings:
    """`run.checkpoint_config`, in the words of Ray's CheckpointConfig."""

    num_to_keep: Count = 3
    """The last so many are kept, and the best by validation."""
    checkpoint_frequency: Count = 1000
    """Steps between checkpoints; the last step always has one."""


@settings
class RunSettings:
    """Section `run`, in the words of Ray's RunConfig: the run directory is `storage_path/name`."""

    name: str | None = None
    """Left out, the config file's name."""
    storage_path: str = "runs"
    """A local directory or a URI (s3://, gs://)."""
    failure_config: FailureSettings = field(default_factory=FailureSettings)
    checkpoint_config: CheckpointSettings = field(default_factory=CheckpointSettings)
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Experiment trackers to tell too; see `metadist/trackers/`."""
