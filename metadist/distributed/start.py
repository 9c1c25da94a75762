"""Choosing and starting the executor that a config asks for. Ray is imported only where it is used."""

from rich.console import Console

from metadist.config import Config
from metadist.distributed.executor import Executor
from metadist.distributed.in_process import InProcessExecutor
from metadist.experiment import Experiment


def make_executor(config: Config, experiment: Experiment, console: Console) -> Executor:
    """The in-process executor for `scaling.num_workers: 0`, else the backend's on a Ray cluster, joined or started."""
    arguments = (experiment, config.outer, config.training.steps)
    if config.scaling.worker_limits[1] == 0:
        return InProcessExecutor(*arguments)
    from metadist.distributed.cluster import connect

    disconnect = connect(config.scaling, console)
    if config.scaling.backend == "train":
        from metadist.distributed.train_executor import TrainExecutor

        failures = config.run.failure_config.max_failures
        return TrainExecutor(*arguments, config.scaling, failures, disconnect, console.print)
    from metadist.distributed.ray_executor import RayExecutor

    return RayExecutor(*arguments, config.scaling, disconnect, console.print)
