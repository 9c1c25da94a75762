"""Models by the name that a config gives them."""

from metadist.models.conv4 import Conv4
from metadist.models.mlp import MLP
from metadist.models.resnet12 import ResNet12

MODELS: dict[str, type] = {
    "mlp": MLP,
    "conv4": Conv4,
    "resnet12": ResNet12,
}
