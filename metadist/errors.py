"""Every error a user can meet. Each says the field or file, the rule, the value and the remedy."""


class MetadistError(Exception):
    """Base of all our errors; the command line prints the message alone, without a traceback."""

    exit_status = 1


class UserError(MetadistError):
    """The input is wrong: a config, a data file, a command line, a run directory."""

    exit_status = 2


class ConfigError(UserError):
    """A config key is unknown, missing, of the wrong type, or impossible beside another."""


class DataError(UserError):
    """A data file or an archive does not hold what it must."""


class EpisodeError(UserError):
    """A task source made an episode that does not fit its own specification."""


class ModelError(UserError):
    """A model cannot be meta-trained as it is."""


class RunDirectoryError(UserError):
    """A run directory is missing, belongs to another config, or holds no usable checkpoint."""


class LeaseError(UserError):
    """Another process trains in the run directory."""


class ClusterError(UserError):
    """The cluster cannot be reached, refuses us, or is too small for what is asked."""


class CheckpointError(MetadistError):
    """A checkpoint is torn or altered, or could not be written."""


class FingerprintError(MetadistError):
    """A process computes other bits than the run's first one."""


class NonFiniteError(MetadistError):
    """A loss or a meta-gradient is NaN or infinite."""


class AdapterError(MetadistError):
    """A range of chunks failed in the same way twice."""


class BadEpisodesError(MetadistError):
    """More of a run's training episodes are bad than may be left out."""


class LearnerLostError(MetadistError):
    """The learner died; training goes on from the last checkpoint."""


class RanksResizedError(LearnerLostError):
    """The cluster has room for another number of ranks; training goes on from the last checkpoint with them."""


class LeaseLostError(MetadistError):
    """This process was silent for so long that another has taken over its run directory."""


class InterruptedRun(MetadistError):
    """Training was interrupted; its checkpoint is written."""

    exit_status = 130


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message, short enough to stand inside one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
