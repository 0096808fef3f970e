"""Published results, reproduced: which recipes are trained, what is measured of each, and what is drawn.

A new one is a file here, and a line in `REPRODUCTIONS`. `cluster.reproduce` runs them.
"""

from __future__ import annotations

from cluster.reproductions.autoencoders import SWAEMNIST
from cluster.reproductions.details import Details
from cluster.reproductions.responsibility import (
    ResponsibilityCompression,
    ResponsibilityImbalance,
    ResponsibilityMNIST,
)
from cluster.reproductions.study import Reproduction
from cluster.reproductions.thesis_critics import Critics
from cluster.reproductions.thesis_mnist import ThesisMNIST
from cluster.reproductions.thesis_toys import Ring, SwissRoll

REPRODUCTIONS: dict[str, Reproduction] = {
    each.name: each
    for each in (
        *(Ring(), SwissRoll(), ThesisMNIST(), Critics(), SWAEMNIST()),
        *(ResponsibilityMNIST(), ResponsibilityCompression(), ResponsibilityImbalance(), Details()),
    )
}
