"""Body only in the inner loop."""

from pydantic import Field

from metadist.algorithms.inner_loop import GradientBased
from metadist.core.settings import settings


@settings
class BOIL(GradientBased):
    """BOIL (Oh et al. 2021, arXiv:2008.08882, sec. 3): MAML whose inner loop changes all but the last layer.

    The head stays as the outer loop left it, so that a task is learned by a change of representation.
    """

    adapts: str | tuple[str, ...] = Field(default="body", alias="adapt")
