"""The synthetic AP radiograph: its truth is consistent with itself and with what is drawn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from appliance.errors import UsageError
from models import phantom_ap
from models.phantom_ap import LEVELS, Swing

DOUBLE = (Swing(0, -12.0), Swing(6, 25.0), Swing(16, -15.0))


def plate_tilt(plate: tuple[tuple[float, float], tuple[float, float]]) -> float:
    (x0, y0), (x1, y1) = plate
    return float(np.rad2deg(np.arctan2(y0 - y1, x1 - x0)))


def test_the_same_seed_draws_the_same_bytes() -> None:
    (a, truth_a), (b, truth_b) = (phantom_ap.draw(np.random.default_rng(4), (416, 229)) for _ in range(2))
    assert a.tobytes() == b.tobytes()
    assert truth_a == truth_b
    assert a.shape == (416, 229)
    assert a.min() >= 0
    assert a.max() <= 4095
    assert (a == np.rint(a)).all()


def test_the_truth_is_known_without_drawing() -> None:
    for seed in range(3):
        assert phantom_ap.truth(np.random.default_rng(seed)) == phantom_ap.draw(np.random.default_rng(seed))[1]


def test_angles_are_those_between_the_drawn_end_plates() -> None:
    _, truth = phantom_ap.draw(np.random.default_rng(1), (416, 229), DOUBLE)
    assert [(c.upper, c.lower, c.angle_deg) for c in truth.curves] == [("T1", "T7", 37.0), ("T7", "L5", 40.0)]
    for curve in truth.curves:
        upper, lower = (truth.vertebrae[LEVELS.index(name)] for name in (curve.upper, curve.lower))
        assert abs(plate_tilt(upper.upper_px) - plate_tilt(lower.lower_px)) == pytest.approx(curve.angle_deg, abs=1e-6)


def test_no_plate_is_tilted_more_than_those_of_the_end_vertebrae() -> None:
    _, truth = phantom_ap.draw(np.random.default_rng(1), (416, 229), DOUBLE)
    tilts = [t for v in truth.vertebrae for t in (v.upper_tilt_deg, v.lower_tilt_deg)]
    assert max(tilts) == 25.0
    assert min(tilts) == -15.0


def test_seventeen_vertebrae_inside_the_picture_one_below_the_other() -> None:
    for seed in range(4):
        image, truth = phantom_ap.draw(np.random.default_rng(seed), (512, 300))
        assert tuple(v.level for v in truth.vertebrae) == LEVELS
        for v in truth.vertebrae:
            x0, y0, x1, y1 = v.box_px
            assert 0 <= x0 < x1 <= image.shape[1]
            assert 0 <= y0 < y1 <= image.shape[0]
        middles = [(v.box_px[1] + v.box_px[3]) / 2 for v in truth.vertebrae]
        assert all(a < b for a, b in pairwise(middles))


def test_bodies_are_brighter_than_the_discs_between_them() -> None:
    image, truth = phantom_ap.draw(np.random.default_rng(2), (1024, 560))
    brighter = 0
    for above, below in pairwise(truth.vertebrae[9:]):
        (x0, y0), (x1, y1) = (np.mean(p, axis=0) for p in (above.lower_px, below.upper_px))
        disc = image[round((y0 + y1) / 2), round((x0 + x1) / 2)]
        body = np.mean(
            image[round(above.box_px[1]) + 3 : round(above.box_px[3]) - 2, round(above.box_px[0]) + 8 : round(above.box_px[2]) - 8]
        )
        brighter += body > disc
    assert brighter >= 6


@pytest.mark.parametrize(
    "swings",
    [(Swing(0, 0.0),), (Swing(1, 0.0), Swing(16, 9.0)), (Swing(0, 0.0), Swing(2, 9.0), Swing(16, 0.0)), (Swing(0, -50.0), Swing(16, 9.0))],
)
def test_a_spine_that_cannot_be_is_refused(swings: tuple[Swing, ...]) -> None:
    with pytest.raises(UsageError):
        phantom_ap.draw(np.random.default_rng(0), (416, 229), swings)


@pytest.mark.parametrize("hw", [(100, 229), (416, 4000)])
def test_a_picture_of_another_size_is_refused(hw: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="sides"):
        phantom_ap.draw(np.random.default_rng(0), hw)


def test_random_spines_can_all_be_drawn() -> None:
    for seed in range(3000):
        swings = phantom_ap.random_swings(np.random.default_rng(seed))
        assert max(abs(s.tilt_deg) for s in swings) <= phantom_ap.STEEPEST_DEG
