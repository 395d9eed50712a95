"""Compression on nets small enough to know the answer: what is pruned was worth nothing, what is rounded is what INT8 rounds."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import compress
from models.compress import MULTIPLE, STEPS, WEIGHT_LEVELS
from models.shelf.design import shelf


def test_importing_and_asking_for_help_needs_no_torch() -> None:
    code = "import sys, models.compress; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_three_steps_that_the_field_names_and_their_control_are_there() -> None:
    assert set(STEPS) == {"prune", "distil", "qat", "more"}


# -- with torch -----------------------------------------------------------------------------------------------------

training = pytest.mark.training


def _net(attention: bool = False) -> Any:
    """Two inverted residuals that expand, one of them with attention where asked, and one that does not expand."""
    import torch
    from torch import nn

    from models.shelf.blocks import inverted_residual, squeeze_excite, unit

    torch.manual_seed(5)
    se = squeeze_excite(32, 8) if attention else None
    net = nn.Sequential(
        unit(1, 8, 3, 2), inverted_residual(8, 8, 8), inverted_residual(8, 32, 8, se=se), inverted_residual(8, 64, 16, 3, 2), nn.Flatten(2)
    )
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                # Between the ends of ReLU6, so that every channel is alive.
                m.weight.uniform_(0.2, 0.5)
                m.bias.uniform_(1.0, 2.0)
                m.running_mean.uniform_(-0.2, 0.2)
                m.running_var.uniform_(0.5, 2.0)
    return net.eval()


def _silence(net: Any, block: str, channels: list[int]) -> None:
    """Hidden channels that say nothing: their depthwise batch norm gives zero, whatever comes in."""
    import torch

    norm = compress.hidden_blocks(net)[block][1][1]
    with torch.no_grad():
        norm.weight[channels] = 0.0
        norm.bias[channels] = 0.0


@training
def test_only_blocks_that_expand_have_hidden_channels() -> None:
    assert list(compress.hidden_blocks(_net())) == ["2", "3"]
    assert len(compress.hidden_blocks(shelf()["mobilenet_v2"].network())) == 16
    assert len(compress.hidden_blocks(shelf()["efficientnet_lite0"].network())) == 10
    assert compress.hidden_blocks(shelf()["unet"].network()) == {}


@training
@pytest.mark.parametrize("by", ["scale", "taylor"])
@pytest.mark.parametrize("attention", [False, True])
def test_channels_that_say_nothing_go_and_the_answer_stays(by: str, attention: bool) -> None:
    import torch

    net = _net(attention)
    silent = {"2": list(range(8)), "3": [*range(16), *range(17, 64, 2)]}
    for block, channels in silent.items():
        _silence(net, block, channels)
    x = torch.randn(8, 1, 16, 16)
    before = net(x).detach()
    if by == "scale":
        importance = compress.importance_by_scale(net)
    else:
        batch = {"image": x.numpy(), "names": np.array(["a"] * 8)}
        importance = compress.importance_by_taylor(net, lambda out, _: out.square().mean(), [batch])
    for block, channels in silent.items():
        assert importance[block][channels].abs().max() == 0
    kept = compress.prune(net, importance, 0.5)
    assert kept == {"2": 24, "3": 24}
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    assert net[3].body[1][0].weight.shape == (24, 1, 3, 3)


@training
def test_taylor_ranks_channels_as_taking_them_out_does() -> None:
    """On a batch: the sum of squared first-order terms, against the change of the loss when one channel is silenced."""
    import torch

    net = _net()
    x = torch.rand(4, 1, 16, 16)

    def loss(out: Any, _: Any) -> Any:
        return (out - 0.3).square().mean()

    importance = compress.importance_by_taylor(net, loss, [{"image": x.numpy()}])["3"]
    base = loss(net(x), None).item()
    change = []
    for channel in range(64):
        state = {k: v.clone() for k, v in net.state_dict().items()}
        _silence(net, "3", [channel])
        change.append((loss(net(x), None).item() - base) ** 2)
        net.load_state_dict(state)
    order = np.argsort(np.argsort(importance.numpy())), np.argsort(np.argsort(change))
    assert np.corrcoef(*order)[0, 1] > 0.7


@training
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_pruning_takes_the_share_in_whole_registers(share: float) -> None:
    import torch

    net = _net()
    kept = compress.prune(net, compress.importance_by_scale(net), share)
    assert all(n % MULTIPLE == 0 and n >= MULTIPLE for n in kept.values())
    assert abs(sum(kept.values()) - (1 - share) * 96) <= 2 * MULTIPLE
    assert net(torch.rand(1, 1, 16, 16)).shape == (1, 16, 16)


@training
@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_nothing_is_refused(share: float) -> None:
    net = _net()
    with pytest.raises(ValueError, match="cannot be pruned"):
        compress.prune(net, compress.importance_by_scale(net), share)


@training
def test_a_pruned_state_dict_finds_its_shape_again() -> None:
    import torch

    x = torch.rand(1, 1, 128, 128)
    for name in ("mobilenet_v2", "mobilenet_v3_small"):
        net = shelf()[name].network().eval()
        compress.prune(net, compress.importance_by_taylor(net, lambda out, _: out.square().sum(), [{"image": x.numpy()}]), 0.4)
        again = compress.fit(shelf()[name].network(), net.state_dict()).eval()
        torch.testing.assert_close(again(x), net(x))
        assert sum(p.numel() for p in again.parameters()) < 0.85 * sum(p.numel() for p in shelf()[name].network().parameters())


@training
def test_rounded_weights_are_those_of_the_engine() -> None:
    """On the same grid as the quantiser's: s8 of reduced range for each output channel, batch norm folded or not."""
    import torch

    net = compress.round_like_int8(_net())
    conv, norm = net[0][0], net[0][1]
    raw = conv.parametrizations.weight.original.detach()
    scale = raw.abs().amax((1, 2, 3), keepdim=True) / WEIGHT_LEVELS
    steps = conv.weight.detach() / scale
    torch.testing.assert_close(steps, steps.round())
    assert (conv.weight.detach() - raw).abs().max() <= scale.max() / 2 + 1e-7
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None].detach()
    folded = raw * factor
    folded_scale = folded.abs().amax((1, 2, 3), keepdim=True) / WEIGHT_LEVELS
    torch.testing.assert_close((folded / folded_scale).round() * folded_scale, conv.weight.detach() * factor)


@training
def test_rounded_activations_have_256_values_and_pass_gradients() -> None:
    import torch

    net = compress.round_like_int8(_net()).train()
    x = torch.rand(4, 1, 32, 32)
    seen: list[Any] = []
    net[3].body[-1].register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    for _ in range(3):
        net(x)
    assert len(seen[-1].unique()) <= 256
    net(x).square().mean().backward()
    assert net[0][0].parametrizations.weight.original.grad.abs().max() > 0
    low, high = net[3].body[-1].seen_range
    assert low < 0 < high
    net.eval()
    frozen = net[3].body[-1].seen_range.clone()
    net(100 * x)
    torch.testing.assert_close(net[3].body[-1].seen_range, frozen)


@training
def test_the_rounding_can_be_taken_off() -> None:
    import torch

    net = _net()
    x = torch.rand(1, 1, 16, 16)
    before = net(x).detach()
    state = compress.unrounded(compress.round_like_int8(net).state_dict())
    plain = _net()
    with torch.no_grad():
        plain[0][0].weight.zero_()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), before)


@training
def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn() -> None:
    import torch

    torch.manual_seed(2)
    said = torch.randn(6, 8)
    logits = said.clone().requires_grad_()
    least = compress.distance_to_teacher(logits, said)
    least.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6
    for _ in range(5):
        assert compress.distance_to_teacher(said + 0.5 * torch.randn(6, 8), said) > least
    shifted = said.clone()
    shifted[:, :5] += 3.0  # a softmax does not see it
    assert compress.distance_to_teacher(shifted, said) == pytest.approx(least.item(), abs=1e-5)


class _Toy:
    """Crops whose grade is their brightness."""

    name, steps, learning_rate, batch_size = "toy", 2, 1e-3, 4

    def network(self, pretrained: bool) -> Any:
        raise AssertionError("the shelf's network is trained, not the family's")

    def batch(self, rng: np.random.Generator, step: int) -> dict[str, Any]:
        grade = rng.integers(0, 5, 4)
        image = np.broadcast_to((grade / 2.5 - 1)[:, None, None, None], (4, 1, 64, 64)) + rng.normal(0, 0.1, (4, 1, 64, 64))
        return {"image": image.astype(np.float32), "soft": np.eye(5, dtype=np.float32)[grade]}

    def loss(self, out: Any, batch: dict[str, Any]) -> Any:
        from torch.nn import functional as f

        return f.cross_entropy(out.float()[:, :5], batch["soft"])


@training
@pytest.mark.filterwarnings("ignore")
def test_each_step_trains_with_the_loop_and_leaves_weights_that_load(tmp_path: Path) -> None:
    import torch

    from models.shelf.train import ShelfRecipe, run

    entry = shelf()["mobilenet_v2"]
    base = ShelfRecipe(entry, _Toy())
    run(base, tmp_path / "base", 3, 2)
    weights = tmp_path / "base/final.pt"
    facts = json.loads((tmp_path / "base/run.json").read_text())
    assert (facts["network"], facts["steps"], facts["seed"], facts["batch_size"]) == ("mobilenet_v2", 2, 3, 4)
    teacher = entry.network().eval()
    sizes = {}
    for step, made in {
        "more": compress.Continued(base, weights),
        "prune": compress.Pruned(base, weights, 0.5, "taylor", 3),
        "qat": compress.Rounded(base, weights),
        "distil": compress.Distilled(base, teacher),
    }.items():
        state = compress.unrounded(run(made, tmp_path / step, 3, 2))
        net = compress.fit(entry.network(), state).eval()
        assert torch.isfinite(net(torch.rand(1, 1, 128, 128))).all()
        sizes[step] = sum(p.numel() for p in net.parameters())
    assert sizes["prune"] < 0.8 * sizes["more"] == 0.8 * sizes["qat"]
    # A finished run that is started again ends where it ended.
    again = run(compress.Pruned(base, weights, 0.5, "taylor", 3), tmp_path / "prune", 3, 2)
    assert compress.fit(entry.network(), again) is not None


def test_a_step_says_the_command_that_makes_it_again() -> None:
    def said(**given: Any) -> str:
        usual = {"step": "qat", "name": "mobilenet_v2", "of": None, "run": None, "steps": None, "share": 0.4, "by": "taylor", "teacher": []}
        return compress.command_of(argparse.Namespace(**{**usual, **given}))

    assert said() == "qat mobilenet_v2 --data DIR --pseudo DIR"
    assert said(steps=40, run="x", of="y") == "qat mobilenet_v2 --data DIR --pseudo DIR --of y --run x --steps 40"
    assert said(step="prune", share=0.25) == "prune mobilenet_v2 --data DIR --pseudo DIR --share 0.25 --by taylor"
    assert said(step="distil", teacher=["a", "b"]).endswith("--teacher a --teacher b")
