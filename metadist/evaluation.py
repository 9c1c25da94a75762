"""Evaluation: a fixed list of episodes, adapted and scored after each inner step, with intervals."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.text import Text

from metadist.checkpoint import Checkpoints
from metadist.config import Config, config_from_document
from metadist.config_file import parse_document
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.plan import plan_evaluation
from metadist.distributed.executor import Executor
from metadist.distributed.learner import LearnerState
from metadist.distributed.start import make_executor
from metadist.errors import CheckpointError, RunDirectoryError
from metadist.experiment import Experiment, check_splits, make_experiment
from metadist.pictures import draw_evaluation
from metadist.run_directory import RunDirectory
from metadist.scores import NO_BATCH_NORM, Evaluation, PolicyScores
from metadist.sections import EvaluationSettings
from metadist.versions import Versions


def evaluate_with(
    executor: Executor, config: Config, settings: EvaluationSettings, *, own_policy_alone: bool = False
) -> Evaluation:
    """Evaluates the learner's theta on the executor's adapters, under the run's batch-norm policy and `support`."""
    policy = config.training.batch_norm
    policies: list[BatchNormPolicy] = [policy or "transductive"]
    if policy is not None and policy != "support" and not own_policy_alone:
        policies.append("support")
    steps = config.inner_steps_at_test if settings.inner_steps is None else settings.inner_steps
    plan = plan_evaluation(settings.seed, settings.split, settings.episodes, config.training.tasks_per_chunk)
    scores = executor.evaluate(plan, executor.newest(), steps, policies)
    names = policies if policy is not None else [NO_BATCH_NORM]
    return Evaluation(
        split=settings.split,
        episodes=settings.episodes,
        seed=settings.seed,
        step=executor.state().step,
        policies=[
            PolicyScores.of(name, scores.loss[index], scores.accuracy[index], scores.calibration[index])
            for index, name in enumerate(names)
        ],
    )


def save_evaluation(
    evaluation: Evaluation, directory: RunDirectory, config: Config, experiment: Experiment, state: LearnerState
) -> None:
    """Writes evaluation.json and its pictures into the run directory."""
    directory.write_json("evaluation.json", evaluation.as_dict())
    draw_evaluation(evaluation, directory.local, config, experiment, state)
    directory.upload()


def evaluate(
    run_dir: str,
    *,
    split: str | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    step: int | None = None,
    num_workers: int | tuple[int, int] | None = None,
    address: str | None = None,
    config: Config | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Evaluates a run directory's newest checkpoint (or that of `step`), and writes evaluation.json and a picture.

    What is left out is as the run's config has it. `config` is needed only where the run's task, model
    or algorithm is an object of your own program. Raises UserError for wrong input.
    """
    console = console or Console(stderr=True)
    directory = RunDirectory(run_dir)
    try:
        config = asked_of(config or load_run_config(directory), split, episodes, seed, num_workers, address)
        experiment = experiment_to_score(config)
        state = load_state(directory, experiment, step, console)
        evaluation = score_state(config, experiment, state, console)
        save_evaluation(evaluation, directory, config, experiment, state)
        return evaluation
    finally:
        directory.close()


def asked_of(
    config: Config,
    split: str | None,
    episodes: int | None,
    seed: int | None,
    num_workers: int | tuple[int, int] | None,
    address: str | None,
) -> Config:
    """A config with those settings of its evaluation and scaling that are not None; 0 workers are of no backend."""
    if num_workers == 0:
        config = _on_actors(config)
    evaluation = {"split": split, "episodes": episodes, "seed": seed}
    scaling = {"num_workers": num_workers, "address": address}

    def given(asked: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in asked.items() if value is not None}

    return dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, **given(evaluation)),
        scaling=dataclasses.replace(config.scaling, **given(scaling)),
    )


def experiment_to_score(config: Config) -> Experiment:
    """The experiment of a config whose evaluation is about to be made. Raises UserError where that cannot be."""
    # Scores need no meta-gradient, so nothing is worth compiling.
    experiment = dataclasses.replace(make_experiment(config), compile=False)
    check_splits(experiment.source, config.evaluation.seed, [config.evaluation.split])
    return experiment


def score_state(
    config: Config,
    experiment: Experiment,
    state: LearnerState,
    console: Console,
    *,
    own_policy_alone: bool = False,
) -> Evaluation:
    """Evaluates a checkpoint as `config.evaluation` says, on adapters of its own."""
    # Scores are not reduced, and an actor's loss costs less than a rank's.
    executor = make_executor(_on_actors(config), experiment, console)
    try:
        executor.start(state, None, lambda: False)
        return evaluate_with(executor, config, config.evaluation, own_policy_alone=own_policy_alone)
    finally:
        executor.close()


def _on_actors(config: Config) -> Config:
    scaling = dataclasses.replace(config.scaling, backend="actors", reduce="exact", shard_optimizer=False)
    return dataclasses.replace(config, scaling=scaling)


def load_run_config(directory: RunDirectory) -> Config:
    """The resolved config of a run. Raises RunDirectoryError or ConfigError."""
    return config_from_document(parse_document(read_config_text(directory), f"{directory.location}/config.yaml"))


def read_config_text(directory: RunDirectory) -> str:
    """A run's config.yaml as it stands there. Raises RunDirectoryError."""
    if not directory.exists("config.yaml"):
        raise RunDirectoryError(
            f"{directory.location} is no run directory: it holds no config.yaml."
            " Give the directory that `metadist train` printed."
        )
    try:
        return directory.read("config.yaml").decode()
    except UnicodeDecodeError:
        raise RunDirectoryError(f"{directory.location}/config.yaml is damaged: it is no text. Restore it.") from None


def load_state(directory: RunDirectory, experiment: Experiment, step: int | None, console: Console) -> LearnerState:
    """The state of the version in use (the newest checkpoint, unless the run was updated), or that of `step`.

    Raises MetadistError where there is none.
    """
    checkpoints = Checkpoints(directory, experiment.theta, experiment.network.statistics_layout)
    saved = checkpoints.steps()
    versions = Versions(directory)
    if step is None and (number := versions.current):
        record = versions.record(number)
        console.print(Text(f"version {number} of {directory.location}, updated with {record['tasks']} tasks"))
        if saved and saved[-1] > record["trained_steps"]:
            console.print(
                Text(
                    f"It was trained from step {record['trained_steps']} to {saved[-1]} since, and version {number} has"
                    f" none of that: metadist update {directory.location} --rollback 0, then update again.",
                    "yellow",
                )
            )
        return versions.load(number, experiment)
    if step is not None and step not in saved:
        has = ", ".join(map(str, saved)) or "none"
        raise RunDirectoryError(f"{directory.location} has no checkpoint of step {step}; it has {has}. Choose one.")
    if step is not None:
        try:
            return checkpoints.load(step)
        except CheckpointError as error:
            others = ", ".join(str(other) for other in saved if other != step) or "none"
            raise CheckpointError(f"{error} Choose another --step; there are {others}.") from None
    state = checkpoints.load_latest(lambda text: console.print(Text(text, "yellow")))
    if state is None:
        raise RunDirectoryError(f"{directory.location} holds no checkpoint yet. Train it further.")
    return state
