"""Task sources by the name that a config gives them."""

from metadist.tasks.few_shot import FewShot
from metadist.tasks.function_shapes import FunctionShapes
from metadist.tasks.pooled_classes import PooledClasses
from metadist.tasks.sinusoid import Sinusoid

TASKS: dict[str, type] = {
    "sinusoid": Sinusoid,
    "function_shapes": FunctionShapes,
    "few_shot": FewShot,
    "pooled_classes": PooledClasses,
}
