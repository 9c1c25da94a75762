"""Almost no inner loop."""

from pydantic import Field

from metadist.algorithms.inner_loop import GradientBased
from metadist.core.settings import settings


@settings
class ANIL(GradientBased):
    """ANIL (Raghu et al. 2020, arXiv:1909.09157, sec. 4.1): MAML whose inner loop changes the last layer alone.

    The body is learned by the outer loop, through the adapted head; its features serve all tasks as
    they are. `adapt: head` is the last layer that has parameters; say which where that is another.
    """

    adapts: str | tuple[str, ...] = Field(default="head", alias="adapt")
