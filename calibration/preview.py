"""A contact sheet of a calibration set, for the eyes of whoever made it. It holds patients' images: it is no part of a set."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from appliance.report import DISCLAIMER
from calibration.folders import Image, grey, load
from kernels.preprocess import letterbox, normalise

TILE = 160
MAX_TILES = 400
_COLUMNS, _FOOT = 8, 26


def contact_sheet(chosen: Sequence[tuple[Image, str]], colour: bool = False) -> bytes:
    """PNG: the first MAX_TILES images, numbered as in the manifest, each with its protocol; the disclaimer burned in.

    Raises StudyError, UsageError where an image can no longer be read.
    """
    shown = chosen[:MAX_TILES]
    columns = min(_COLUMNS, max(4, len(shown)))
    rows = -(-len(shown) // columns)
    sheet = np.zeros((rows * TILE + _FOOT, columns * TILE), np.uint8)
    for at, (image, _) in enumerate(shown):
        x = letterbox(normalise(grey(load(image.path, colour)[0])), (TILE, TILE))[0][0, 0]
        tile = np.rint((x + 1) * 127.5).astype(np.uint8)
        _write(tile, str(at + 1), 14)
        _write(tile, image.protocol[:24], TILE - 6)
        y, z = divmod(at, columns)
        sheet[y * TILE : (y + 1) * TILE, z * TILE : (z + 1) * TILE] = tile
    _write(sheet, DISCLAIMER, sheet.shape[0] - 8)
    _, content = cv2.imencode(".png", sheet)
    return bytes(content)


def _write(tile: cv2.typing.MatLike, text: str, y: int) -> None:
    plain = text.encode("ascii", "replace").decode()
    for value, width in ((0, 3), (255, 1)):
        cv2.putText(tile, plain, (4, y), cv2.FONT_HERSHEY_SIMPLEX, 0.38, value, width, cv2.LINE_AA)
