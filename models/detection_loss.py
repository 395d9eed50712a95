"""The detector's training loss: task-aligned assignment, CIoU, distribution focal loss. Training only.

Assignment after Feng et al., "TOOD", ICCV 2021, with score^0.5 x IoU^6 as the alignment; CIoU after Zheng et al., AAAI 2020.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from models.detector import BINS, STRIDES

if TYPE_CHECKING:
    from torch import Tensor

TOP_K = 10


def ciou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """N x 4 against N x 4 -> (IoU, complete IoU), each N."""
    import torch

    lt, rb = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    overlap = (rb - lt).clamp(min=0).prod(1)
    wa, wb = (a[:, 2:] - a[:, :2]).clamp(min=1e-3), (b[:, 2:] - b[:, :2]).clamp(min=1e-3)
    iou = overlap / (wa.prod(1) + wb.prod(1) - overlap + 1e-7)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    centres = ((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]) / 2).pow(2).sum(1)
    v = 4 / math.pi**2 * (torch.atan(wb[:, 0] / wb[:, 1]) - torch.atan(wa[:, 0] / wa[:, 1])).pow(2)
    with torch.no_grad():
        alpha = v / (1 - iou + v + 1e-7)
    return iou, iou - centres / (hull.pow(2).sum(1) + 1e-7) - alpha * v


def detection_loss(out: tuple[Tensor, ...], boxes: Tensor, kinds: Tensor, known: Tensor, strides_px: tuple[int, ...] = STRIDES) -> Tensor:
    """Maps of the detector (classes, then boxes, one of each for every stride), boxes B x M x 4 (input pixels), kinds B x M
    (-1 = none), known B x C (0 = class not labelled)."""
    import torch
    from torch.nn import functional as f

    class_maps, box_maps = out[: len(strides_px)], out[len(strides_px) :]
    logits = torch.cat([m.float().flatten(2) for m in class_maps], 2).transpose(1, 2)
    bins = torch.cat([m.float().flatten(2) for m in box_maps], 2).transpose(1, 2).unflatten(2, (4, BINS))
    centres, strides = [], []
    for m, s in zip(class_maps, strides_px, strict=True):
        y, x = torch.meshgrid(torch.arange(m.shape[2]), torch.arange(m.shape[3]), indexing="ij")
        centres.append((torch.stack([x, y], -1).reshape(-1, 2).float() + 0.5) * s)
        strides.append(torch.full((m.shape[2] * m.shape[3],), float(s)))
    anchor, stride = torch.cat(centres), torch.cat(strides)
    distance = (bins.softmax(-1) * torch.arange(BINS, dtype=torch.float32)).sum(-1) * stride[:, None]
    predicted = torch.cat([anchor - distance[..., :2], anchor + distance[..., 2:]], -1)

    target_score = torch.zeros_like(logits)
    box_losses, dfl_losses, weights = [], [], []
    for b in range(logits.shape[0]):
        real = kinds[b] >= 0
        if not bool(real.any()):
            continue
        truth, kind = boxes[b][real], kinds[b][real]
        with torch.no_grad():
            inside = torch.cat([anchor[None] - truth[:, None, :2], truth[:, None, 2:] - anchor[None]], -1).amin(-1) > 0.5
            n, m = truth.shape[0], anchor.shape[0]
            pairs = predicted[b].detach()[None].expand(n, m, 4).reshape(-1, 4)
            iou = ciou(pairs, truth[:, None].expand(n, m, 4).reshape(-1, 4))[0].reshape(n, m).clamp(min=0)
            score = logits[b].detach().sigmoid()[:, kind].T
            align = score.sqrt() * iou.pow(6) * inside
            # A box whose every cell misses still needs a teacher: distance to the centre breaks the tie.
            centre = (truth[:, :2] + truth[:, 2:]) / 2
            align = align + 1e-9 * inside / (1 + (anchor[None] - centre[:, None]).pow(2).sum(-1))
            top = align.topk(min(TOP_K, m), 1)
            chosen = torch.zeros_like(align, dtype=torch.bool).scatter_(1, top.indices, top.values > 0)
            owner_iou = torch.where(chosen, iou + 1e-6, torch.zeros_like(iou))
            best, owner = owner_iou.max(0)
            cells = best > 0
            mine = torch.zeros_like(chosen)
            mine[owner[cells], cells.nonzero()[:, 0]] = True
            kept = align * mine
            peak = kept.amax(1, keepdim=True)
            best_iou = (iou * mine).amax(1, keepdim=True)
            soft = (kept / (peak + 1e-12) * best_iou).amax(0)
        index = cells.nonzero()[:, 0]
        if index.numel() == 0:
            continue
        t = owner[index]
        target_score[b, index, kind[t]] = soft[index]
        weight = soft[index]
        box_losses.append((1 - ciou(predicted[b, index], truth[t])[1]) * weight)
        want = torch.cat([anchor[index] - truth[t, :2], truth[t, 2:] - anchor[index]], -1) / stride[index, None]
        want = want.clamp(0, BINS - 1.01)
        low = want.long()
        part = want - low
        flat = bins[b, index].reshape(-1, BINS)
        dfl = f.cross_entropy(flat, low.reshape(-1), reduction="none") * (1 - part.reshape(-1))
        dfl = dfl + f.cross_entropy(flat, low.reshape(-1) + 1, reduction="none") * part.reshape(-1)
        dfl_losses.append(dfl.reshape(-1, 4).mean(1) * weight)
        weights.append(weight)
    norm = target_score.sum().clamp(min=1.0)
    entropy = f.binary_cross_entropy_with_logits(logits, target_score, reduction="none") * known[:, None, :]
    total = entropy.sum() / norm
    if weights:
        total = total + 7.5 / 2 * torch.cat(box_losses).sum() / norm + 1.5 / 2 * torch.cat(dfl_losses).sum() / norm
    return total
