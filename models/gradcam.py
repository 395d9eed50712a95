"""Autograd's Grad-CAM of the grader: the reference that the fused map is held against. Needs torch; never on a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import grader
from models.export import SMALLEST_HALVED, fold_batch_norm


def reference(weights: Path) -> Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """A function of one crop (1 x 1 x H x W) -> (logits C, Grad-CAM before its ReLU, C x h x w).

    Grad-CAM of class k (Selvaraju et al., ICCV 2017): alpha_c = mean over the map of d logit_k / d F_c,
    map = sum_c alpha_c F_c. Weights are rounded to the half precision that the shipped file stores.
    """
    import torch

    net: Any = grader.network()
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()
    fold_batch_norm(net)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.numel() >= SMALLEST_HALVED:
                parameter.copy_(parameter.half().float())

    def maps(crop: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        features = torch.from_numpy(crop)
        for stage in net.stages:
            features = stage(features)
        features = net.features(features).detach().requires_grad_()
        logits = net.head(features.mean((2, 3)))
        out = []
        for k in range(logits.shape[1]):
            (gradient,) = torch.autograd.grad(logits[0, k], features, retain_graph=True)
            out.append((gradient.mean((2, 3), keepdim=True) * features).sum(1)[0].detach().numpy())
        return logits[0].detach().numpy(), np.stack(out)

    return maps
