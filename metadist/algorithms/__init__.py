"""Algorithms by the name that a config gives them."""

from metadist.algorithms.anil import ANIL
from metadist.algorithms.boil import BOIL
from metadist.algorithms.cavia import CAVIA
from metadist.algorithms.imaml import IMAML
from metadist.algorithms.maml import MAML
from metadist.algorithms.maml_plus_plus import MAMLPlusPlus
from metadist.algorithms.matching_net import MatchingNet
from metadist.algorithms.meta_curvature import MetaCurvature
from metadist.algorithms.meta_sgd import MetaSGD
from metadist.algorithms.nearest_centroid import NearestCentroid
from metadist.algorithms.proto_net import ProtoNet
from metadist.algorithms.r2d2 import R2D2
from metadist.algorithms.reptile import Reptile
from metadist.algorithms.scratch import Scratch
from metadist.algorithms.transfer import Transfer

ALGORITHMS: dict[str, type] = {
    "anil": ANIL,
    "boil": BOIL,
    "cavia": CAVIA,
    "imaml": IMAML,
    "maml": MAML,
    "maml_plus_plus": MAMLPlusPlus,
    "matching_net": MatchingNet,
    "meta_curvature": MetaCurvature,
    "meta_sgd": MetaSGD,
    "nearest_centroid": NearestCentroid,
    "proto_net": ProtoNet,
    "r2d2": R2D2,
    "reptile": Reptile,
    "scratch": Scratch,
    "transfer": Transfer,
}
