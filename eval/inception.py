"""Inception v3 as torchvision stores its weights: the network behind FID and the Inception score.

C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna, Rethinking the Inception Architecture for Computer Vision,
CVPR 2016. The names of parameters and buffers are torchvision's, so that its weight files fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, N_FEATURES, N_CLASSES = 299, 2048, 1000
# Torchvision's normalisation of images in [0, 1], by channel.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AUXILIARY = "AuxLogits."

Kernel = int | tuple[int, int]
Step = tuple[str, int, Kernel]  # a convolution: its name, output channels and kernel


class _Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, n_in: int, n_out: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(n_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Branches of convolutions side by side, their channels concatenated; the last branch pools.

    A branch is a chain of steps; where its end is a list, both of its steps read what comes before (a fork). With
    `pool_features` the block keeps the image's size, without it halves it: the last step of each branch has stride 2,
    and the maximum is pooled.
    """

    def __init__(self, n_in: int, branches: Sequence[Sequence[Step | list[Step]]], pool_features: int = 0) -> None:
        super().__init__()
        self.chains: list[list[list[str]]] = []
        self.n_out = pool_features or n_in
        for branch in branches:
            chain, width = [], n_in
            for step in branch:
                fork = step if isinstance(step, list) else [step]
                halves = not pool_features and step is branch[-1]
                for name, n_out, kernel in fork:
                    height, across = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    same = (height // 2, across // 2)
                    conv = _Conv(width, n_out, kernel, *((2, 0) if halves else (1, same)))
                    self.add_module(name, conv)
                chain.append([name for name, _, _ in fork])
                width = sum(n_out for _, n_out, _ in fork) if step is branch[-1] else fork[0][1]
            self.n_out += width
            self.chains.append(chain)
        self.branch_pool = _Conv(n_in, pool_features, 1) if pool_features else None

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for chain in self.chains:
            ends = [x]
            for names in chain:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            out += ends
        if self.branch_pool is None:
            out.append(F.max_pool2d(x, 3, 2))
        else:
            out.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1)))
        return torch.cat(out, 1)


def _block_a(n_in: int, pool_features: int) -> _Mixed:
    double: list[Step] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return _Mixed(
        n_in, [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)], double], pool_features
    )


def _block_b(n_in: int) -> _Mixed:
    double: list[Step] = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    return _Mixed(n_in, [[("branch3x3", 384, 3)], double])


def _block_c(n_in: int, width: int) -> _Mixed:
    single: list[Step] = [
        ("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1)),
    ]  # fmt: skip
    double: list[Step] = [
        ("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, (7, 1)), ("branch7x7dbl_3", width, (1, 7)),
        ("branch7x7dbl_4", width, (7, 1)), ("branch7x7dbl_5", 192, (1, 7)),
    ]  # fmt: skip
    return _Mixed(n_in, [[("branch1x1", 192, 1)], single, double], 192)


def _block_d(n_in: int) -> _Mixed:
    long: list[Step] = [
        ("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3),
    ]  # fmt: skip
    return _Mixed(n_in, [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], long])


def _block_e(n_in: int) -> _Mixed:
    fork: list[Step] = [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]
    double_fork: list[Step] = [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]
    double: list[Step | list[Step]] = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), double_fork]
    return _Mixed(n_in, [[("branch1x1", 320, 1)], [("branch3x3_1", 384, 1), fork], double], 192)


class InceptionV3(nn.Module):
    """Inception v3 without its auxiliary head, as torchvision builds it for its weights (`transform_input=True`).

    `forward` maps images [n, 3, 299, 299], normalised by `MEAN` and `STD`, to the pooled features [n, 2048] and the
    logits [n, 1000].
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280)
        self.Mixed_7c = _block_e(2048)
        self.fc = nn.Linear(N_FEATURES, N_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The weights were trained on images in [-1, 1].
        x = x * (2 * x.new_tensor(STD).view(3, 1, 1)) + (2 * x.new_tensor(MEAN).view(3, 1, 1) - 1)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed_"):
                x = block(x)
        features = x.mean((2, 3))
        return features, self.fc(features)


def inception_from(tensors: Mapping[str, Tensor]) -> InceptionV3:
    """The network in evaluation mode, from a state dict in torchvision's format; its auxiliary head is left out.

    Raises:
        ValueError: names or shapes that are not Inception v3's.
    """
    network = InceptionV3()
    own = {name: value for name, value in tensors.items() if not name.startswith(_AUXILIARY)}
    expected = network.state_dict()
    # Files older than the batch counters do not have them, and nothing here reads them.
    missing = [name for name in expected if name not in own and not name.endswith("num_batches_tracked")]
    extra = [name for name in own if name not in expected]
    if missing or extra:
        problem = f"{missing[0]} is missing" if missing else f"{extra[0]} is not in it"
        raise ValueError(f"these are not the weights of torchvision's Inception v3 ({problem})")
    for name, value in own.items():
        shape, right = list(value.shape), list(expected[name].shape)
        if shape != right:
            raise ValueError(f"{name} has shape {shape}, in Inception v3 it is {right}")
    network.load_state_dict(own, strict=False)
    return network.eval()


def normalised(x: Tensor) -> Tensor:
    """Images [n, 1 or 3, h, w] in [0, 1] as the network takes them: [n, 3, 299, 299], grey repeated to RGB.

    Resized bilinearly, with antialiasing where they shrink.

    Raises:
        ValueError: another number of channels.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"Inception v3 takes grey or RGB images, not samples of shape {list(x.shape[1:])}")
    x = F.interpolate(x.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
