"""Blocks that networks of the shelf share. Hides torch, as `models/backbone.py` does: it is imported inside functions.

Inputs are N x C x H x W float32. Batch norm follows every convolution, so that export can fold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from models.backbone import residual

if TYPE_CHECKING:
    from torch import Tensor, nn

Act = Literal["relu", "relu6", "silu", "hardswish", "none"]


def activation(kind: Act) -> nn.Module:
    from torch import nn

    made: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish}
    return made[kind](inplace=True) if kind != "none" else nn.Identity()


def unit(
    cin: int, cout: int, kernel: int | tuple[int, int] = 1, stride: int = 1, act: Act = "relu", groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Convolution without bias that keeps the size (or divides it by `stride`), batch norm, activation."""
    from torch import nn

    high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    pads = (high // 2 * dilation, wide // 2 * dilation)
    return nn.Sequential(
        nn.Conv2d(cin, cout, (high, wide), stride, pads, dilation, groups, bias=False),
        nn.BatchNorm2d(cout, eps=1e-3, momentum=0.03),
        activation(act),
    )


def squeeze_excite(channels: int, reduced: int, gate: nn.Module | None = None) -> nn.Module:
    """Channel attention (Hu et al., "Squeeze-and-excitation networks", CVPR 2018); `gate` None is the sigmoid."""
    from torch import nn

    class SqueezeExcite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(channels, reduced, 1)
            self.up = nn.Conv2d(reduced, channels, 1)
            self.act = nn.ReLU(inplace=True)
            self.gate = gate or nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x * self.gate(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))
            return out

    return SqueezeExcite()


def inverted_residual(
    cin: int, mid: int, cout: int, kernel: int = 3, stride: int = 1, act: Act = "relu6", se: nn.Module | None = None
) -> nn.Module:
    """Expand to `mid`, depthwise, `se` where there is one, project (linear); identity where the shapes agree."""
    body = [unit(cin, mid, act=act)] if mid != cin else []
    body.append(unit(mid, mid, kernel, stride, act, groups=mid))
    if se is not None:
        body.append(se)
    body.append(unit(mid, cout, act="none"))
    return residual(body, identity=stride == 1 and cin == cout)


def classifier(trunk: nn.Module, channels: int, classes: int, features: int = 256, act: Act = "relu6") -> nn.Module:
    """`trunk`, a 1x1 convolution to `features`, global average pooling, one linear layer: the class activation map is exact."""
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = trunk
            self.features = unit(channels, features, act=act)
            self.drop = nn.Dropout(0.3)
            self.head = nn.Linear(features, classes)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.drop(self.features(self.trunk(x)).mean((2, 3))))
            return logits

    return Classifier()


def efficient_channel_attention(kernel: int = 3) -> nn.Module:
    """ECA (Wang et al., CVPR 2020): the pooled channels talk to their neighbours through one small convolution."""
    import torch
    from torch import nn

    class Eca(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.talk = nn.Conv2d(1, 1, (1, kernel), padding=(0, kernel // 2), bias=False)

        def forward(self, x: Tensor) -> Tensor:
            n, c = x.shape[:2]
            weight = torch.sigmoid(self.talk(x.mean((2, 3)).reshape(n, 1, 1, c)))
            return x * weight.reshape(n, c, 1, 1)

    return Eca()


def spatial_channel_attention(channels: int) -> nn.Module:
    """scSE (Roy et al., MICCAI 2018): channel attention and a map over places, the greater of both."""
    import torch
    from torch import nn

    class Scse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channel = squeeze_excite(channels, max(4, channels // 2))
            self.place = nn.Conv2d(channels, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.maximum(self.channel(x), x * torch.sigmoid(self.place(x)))

    return Scse()


def double_conv(cin: int, cout: int) -> nn.Sequential:
    """Two 3x3 convolutions, U-Net's step."""
    from torch import nn

    return nn.Sequential(unit(cin, cout, 3), unit(cout, cout, 3))


def unet(classes: int, widths: tuple[int, ...], attention: bool) -> nn.Module:
    """U-Net from half the input size downwards: N x 1 x H x W -> N x classes x H/2 x W/2; scSE after each step where `attention`."""
    from torch import nn

    def step(cin: int, cout: int) -> nn.Module:
        return nn.Sequential(double_conv(cin, cout), spatial_channel_attention(cout)) if attention else double_conv(cin, cout)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = unit(1, widths[0], 3, 2)
            self.down = nn.ModuleList([step(a, b) for a, b in zip((widths[0], *widths), widths, strict=False)])
            self.up = nn.ModuleList([step(a + b, b) for b, a in zip(widths[-2::-1], widths[:0:-1], strict=True)])
            self.head = nn.Conv2d(widths[0], classes, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            skips: list[Tensor] = []
            for i, down in enumerate(self.down):
                x = down(x if i == 0 else nn.functional.max_pool2d(x, 2))
                skips.append(x)
            logits: Tensor = self.head(climb(x, skips, self.up))
            return logits

    return UNet()


def climb(x: Tensor, skips: Sequence[Tensor], ups: Iterable[nn.Module]) -> Tensor:
    """A U-Net's way up: twice the size, joined with what the way down gave at it, one step. `skips` end with `x` itself."""
    import torch
    from torch import nn

    for i, up in enumerate(ups):
        x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        x = up(torch.cat([x, skips[-2 - i]], 1))
    return x


def spp_fast(channels: int, act: Act) -> nn.Module:
    """SPPF of YOLOv5: three 5x5 max-poolings in a row, all kept."""
    import torch
    from torch import nn

    class SppFast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = unit(channels, channels // 2, act=act)
            self.last = unit(2 * channels, channels, act=act)

        def forward(self, x: Tensor) -> Tensor:
            parts = [self.first(x)]
            for _ in range(3):
                parts.append(nn.functional.max_pool2d(parts[-1], 5, 1, 2))
            out: Tensor = self.last(torch.cat(parts, 1))
            return out

    return SppFast()


def c3(cin: int, cout: int, repeats: int, shortcut: bool, act: Act = "silu") -> nn.Module:
    """YOLOv5's step: half the channels through bottlenecks, half past them."""
    import torch
    from torch import nn

    class C3(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            half = cout // 2
            self.past, self.into = unit(cin, half, act=act), unit(cin, half, act=act)
            self.body = nn.ModuleList([nn.Sequential(unit(half, half, act=act), unit(half, half, 3, act=act)) for _ in range(repeats)])
            self.merge = unit(2 * half, cout, act=act)

        def forward(self, x: Tensor) -> Tensor:
            y = self.into(x)
            for block in self.body:
                y = y + block(y) if shortcut else block(y)
            out: Tensor = self.merge(torch.cat([y, self.past(x)], 1))
            return out

    return C3()


def c2f(cin: int, cout: int, repeats: int, shortcut: bool, act: Act = "silu") -> nn.Module:
    """YOLOv8's step: as C3, and what comes out of every bottleneck is kept."""
    import torch
    from torch import nn

    class C2f(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            half = cout // 2
            self.past, self.into = unit(cin, half, act=act), unit(cin, half, act=act)
            self.body = nn.ModuleList([nn.Sequential(unit(half, half, 3, act=act), unit(half, half, 3, act=act)) for _ in range(repeats)])
            self.merge = unit((2 + repeats) * half, cout, act=act)

        def forward(self, x: Tensor) -> Tensor:
            parts = [self.past(x), self.into(x)]
            for block in self.body:
                y = block(parts[-1])
                parts.append(parts[-1] + y if shortcut else y)
            out: Tensor = self.merge(torch.cat(parts, 1))
            return out

    return C2f()


def yolo(
    kind: Literal["c3", "c2f"], widths: tuple[int, int, int, int, int], repeats: tuple[int, int, int, int], attention: bool
) -> nn.Module:
    """Backbone and two-way neck (PAN) of YOLOv5 and YOLOv8: N x 1 x H x W -> maps at strides 8, 16, 32 with widths[2:] channels.

    ECA follows every step of the neck where `attention`.
    """
    import torch
    from torch import nn

    make = {"c3": c3, "c2f": c2f}[kind]
    w1, w2, w3, w4, w5 = widths

    def join(cin: int, cout: int) -> nn.Module:
        plain = make(cin, cout, 1, False)
        return nn.Sequential(plain, efficient_channel_attention()) if attention else plain

    class Yolo(nn.Module):
        def __init__(self) -> None:
            super().__init__()

            def stage(cin: int, cout: int, n: int) -> nn.Sequential:
                return nn.Sequential(unit(cin, cout, 3, 2, "silu"), make(cout, cout, n, True))

            self.stem = unit(1, w1, 3, 2, "silu")
            self.stage2, self.stage3 = stage(w1, w2, repeats[0]), stage(w2, w3, repeats[1])
            self.stage4, self.stage5 = stage(w3, w4, repeats[2]), stage(w4, w5, repeats[3])
            self.pool = spp_fast(w5, "silu")
            self.down4, self.down3 = join(w5 + w4, w4), join(w4 + w3, w3)
            self.to4, self.up4 = unit(w3, w3, 3, 2, "silu"), join(w3 + w4, w4)
            self.to5, self.up5 = unit(w4, w4, 3, 2, "silu"), join(w4 + w5, w5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            p3 = self.stage3(self.stage2(self.stem(x)))
            p4 = self.stage4(p3)
            p5 = self.pool(self.stage5(p4))

            def twice(y: Tensor) -> Tensor:
                return nn.functional.interpolate(y, scale_factor=2, mode="nearest")

            n4 = self.down4(torch.cat([twice(p5), p4], 1))
            n3 = self.down3(torch.cat([twice(n4), p3], 1))
            n4 = self.up4(torch.cat([self.to4(n3), n4], 1))
            n5 = self.up5(torch.cat([self.to5(n4), p5], 1))
            return n3, n4, n5

    return Yolo()


def decoupled_heads(trunk: nn.Module, widths: tuple[int, int, int], hidden: int, classes: int, bins: int) -> nn.Module:
    """Class logits and box distances from branches of their own, as `models/detector.py` gives them out: class_8 ... box_32."""
    from torch import nn

    class Decoupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = trunk

            def stems() -> nn.ModuleList:
                return nn.ModuleList([nn.Sequential(unit(w, hidden, 3, act="silu"), unit(hidden, hidden, 3, act="silu")) for w in widths])

            self.class_stems, self.box_stems = stems(), stems()
            self.class_heads = nn.ModuleList([nn.Conv2d(hidden, classes, 1) for _ in widths])
            self.box_heads = nn.ModuleList([nn.Conv2d(hidden, 4 * bins, 1) for _ in widths])
            for head in self.class_heads:
                nn.init.constant_(head.bias, -4.6)  # prior of 1 % a cell, as in RetinaNet

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            maps = self.trunk(x)
            classes_out = [h(s(f)) for h, s, f in zip(self.class_heads, self.class_stems, maps, strict=True)]
            boxes_out = [h(s(f)) for h, s, f in zip(self.box_heads, self.box_stems, maps, strict=True)]
            return (*classes_out, *boxes_out)

    return Decoupled()
