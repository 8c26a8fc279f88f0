"""Where the method is tested: by numpy and scipy, by torch on the CPU, and by torch on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from frodctl.method.kernels import Kernels, kernels_of
from frodctl.method.kernels.device import Device

KERNELS: dict[str, Kernels] = {"host": kernels_of("cpu"), "device": Device("cpu")}
if torch.cuda.is_available():
    KERNELS["gpu"] = Device("cuda:0")

#: By their names, as `device` takes them, where torch computes: "cpu" would be numpy and scipy.
DEVICES = ["cpu:0", pytest.param("cuda:0", marks=pytest.mark.skipif("gpu" not in KERNELS, reason="no GPU here"))]
