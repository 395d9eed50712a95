"""Names are counted from the sacrum or not given at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.levels import DISC_LEVELS, RIVAL_SCORE, SACRUM_SCORE, VERTEBRA_LEVELS, Column, name_levels

STEP, DISC_H, BODY_H, WIDTH = 40.0, 10.0, 30.0, 44.0
BOTTOM = 600.0
Boxes = np.ndarray


def _box(cx: float, cy: float, height: float) -> list[float]:
    return [cx - WIDTH / 2, cy - height / 2, cx + WIDTH / 2, cy + height / 2]


def _column(count: int, step: float = STEP) -> tuple[Boxes, Boxes, Boxes]:
    """`count` discs from the lowest upwards on a slanting line, a body above each, the sacrum below the lowest."""
    discs = np.array([_box(100 + 3 * i, BOTTOM - step * i, DISC_H) for i in range(count)], np.float32).reshape(-1, 4)
    bodies = np.array([_box(101.5 + 3 * i, BOTTOM - step * (i + 0.5), BODY_H) for i in range(count)], np.float32).reshape(-1, 4)
    sacrum = np.array([[80, BOTTOM - 2, 124, BOTTOM + 40]], np.float32)
    return discs, bodies, sacrum


def _sure(count: int = 1) -> np.ndarray:
    return np.full(count, 0.9, np.float32)


def _named(column: Column) -> dict[int, str | None]:
    return dict(zip(column.discs, column.disc_levels, strict=True))


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_whole_column_is_named_upwards(count: int) -> None:
    discs, bodies, sacrum = _column(count)
    out = name_levels(discs, bodies, sacrum, _sure())
    assert out.discs == tuple(range(count))
    assert out.disc_levels == DISC_LEVELS[:count]
    assert out.vertebrae == tuple(range(count))
    # Of a single disc no typical distance is known, and still the body next above it is L5.
    assert out.vertebra_levels == VERTEBRA_LEVELS[:count]
    assert out.reason == "Levels are counted upwards from the sacrum."


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_the_order_of_the_boxes_does_not_matter(order: list[int], body_order: list[int]) -> None:
    discs, bodies, sacrum = _column(6)
    out = name_levels(discs[order], bodies[body_order], sacrum, _sure())
    assert {order[i]: level for i, level in _named(out).items()} == dict(enumerate(DISC_LEVELS[:6]))
    assert [body_order[i] for i in out.vertebrae] == list(range(6))
    assert out.vertebra_levels == VERTEBRA_LEVELS[:6]


def test_without_a_sacrum_nothing_is_named_but_everything_is_listed_from_the_lowest() -> None:
    discs, bodies, _ = _column(5)
    out = name_levels(discs[::-1], bodies, np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    assert out.discs == (4, 3, 2, 1, 0)
    assert out.disc_levels == (None,) * 5
    assert out.vertebra_levels == (None,) * 5
    assert "not in view" in out.reason


@pytest.mark.parametrize(("score", "named"), [(SACRUM_SCORE - 0.01, False), (SACRUM_SCORE + 0.01, True)])
def test_a_doubtful_sacrum_names_nothing(score: float, named: bool) -> None:
    discs, bodies, sacrum = _column(4)
    out = name_levels(discs, bodies, sacrum, np.array([score], np.float32))
    assert out.disc_levels == (DISC_LEVELS[:4] if named else (None,) * 4)


def test_the_best_sacrum_counts() -> None:
    discs, bodies, sacrum = _column(5)
    elsewhere = sacrum - np.array([0, 2 * STEP, 0, 2 * STEP], np.float32)
    both = np.concatenate([elsewhere, sacrum])
    faint = RIVAL_SCORE - 0.01
    assert name_levels(discs, bodies, both, np.array([faint, 0.9], np.float32)).disc_levels == DISC_LEVELS[:5]
    wrong = name_levels(discs, bodies, both, np.array([0.9, faint], np.float32))
    assert _named(wrong)[2] == "L5/S1"


def test_two_places_that_look_like_a_sacrum_name_nothing() -> None:
    discs, bodies, sacrum = _column(5)
    elsewhere = sacrum - np.array([0, STEP + 20, 0, STEP + 20], np.float32)
    both = np.concatenate([elsewhere, sacrum])
    out = name_levels(discs, bodies, both, np.array([RIVAL_SCORE + 0.01, 0.9], np.float32))
    assert out.disc_levels == (None,) * 5
    assert "Two places" in out.reason
    # Two boxes of one place are no contradiction.
    near = np.concatenate([sacrum + np.float32(4), sacrum])
    assert name_levels(discs, bodies, near, np.array([0.5, 0.9], np.float32)).disc_levels == DISC_LEVELS[:5]


def test_a_sacrum_far_from_every_disc_names_nothing() -> None:
    discs, bodies, sacrum = _column(4)
    out = name_levels(discs, bodies, sacrum + np.array([0, 80, 0, 80], np.float32), _sure())
    assert out.disc_levels == (None,) * 4
    assert "no disc lies on it" in out.reason


def test_a_missed_disc_between_two_bodies_is_skipped() -> None:
    discs, bodies, sacrum = _column(6)
    out = name_levels(np.delete(discs, 2, axis=0), bodies, sacrum, _sure())
    assert out.disc_levels == ("L5/S1", "L4/L5", "L2/L3", "L1/L2", "T12/L1")
    assert "was not found" in out.reason
    # The body right above the missed disc has no disc below it to take its name from.
    assert out.vertebra_levels[1] == "L4"
    assert out.vertebra_levels[2] in (None, "L3")
    assert out.vertebra_levels[3:] == ("L2", "L1", "T12")


@pytest.mark.parametrize("bodies_left", [[0, 1, 3, 4, 5], [0, 3, 4, 5], []])
def test_an_unexplained_gap_ends_the_names(bodies_left: list[int]) -> None:
    discs, bodies, sacrum = _column(6)
    out = name_levels(np.delete(discs, 2, axis=0), bodies[bodies_left], sacrum, _sure())
    assert out.disc_levels == ("L5/S1", "L4/L5", None, None, None)
    assert "as far as the column is unbroken" in out.reason
    assert all(level in (None, "L5", "L4") for level in out.vertebra_levels)


def test_two_missed_discs_are_never_guessed_over() -> None:
    discs, bodies, sacrum = _column(7)
    out = name_levels(np.delete(discs, [2, 3], axis=0), bodies, sacrum, _sure())
    assert out.disc_levels[:2] == ("L5/S1", "L4/L5")
    assert out.disc_levels[2:] == (None,) * 3


@pytest.mark.parametrize("step", [30.0, 36.0, 40.0, 50.0])
def test_a_missed_lowest_disc_does_not_shift_the_names(step: float) -> None:
    """L4/L5 can lie within one width of the sacrum; the body between them gives it away."""
    discs, bodies, sacrum = _column(5, step)
    out = name_levels(discs[1:], bodies, sacrum, _sure())
    assert out.disc_levels == (None,) * 4
    assert out.vertebra_levels == (None,) * 5


def test_what_lies_in_the_sacrum_is_left_out() -> None:
    discs, bodies, sacrum = _column(4)
    below = np.array([_box(98, BOTTOM + 36, 6)], np.float32)
    s1 = np.array([_box(98, BOTTOM + 18, 25)], np.float32)
    out = name_levels(np.concatenate([below, discs]), np.concatenate([s1, bodies]), sacrum, _sure())
    assert out.discs == (1, 2, 3, 4)
    assert out.disc_levels == DISC_LEVELS[:4]
    assert out.vertebrae == (1, 2, 3, 4)
    assert out.vertebra_levels == VERTEBRA_LEVELS[:4]


def test_nothing_found() -> None:
    none, _, sacrum = _column(0)
    out = name_levels(none, none, sacrum, _sure())
    assert out == Column((), (), (), (), "No disc was found.")
    out = name_levels(none, _column(2)[1], sacrum, _sure())
    assert out.vertebra_levels == (None, None)


def test_more_discs_than_names() -> None:
    count = len(DISC_LEVELS) + 3
    discs, bodies, sacrum = _column(count, step=30.0)
    out = name_levels(discs, bodies, sacrum, _sure())
    assert out.disc_levels == (*DISC_LEVELS, None, None, None)
    assert out.vertebra_levels == (*VERTEBRA_LEVELS, None, None, None)


def test_shorter_bodies_higher_up_are_no_gap() -> None:
    heights = [44.0, 42.0, 40.0, 38.0, 35.0, 32.0, 29.0]
    y = BOTTOM - np.cumsum([0.0, *heights])
    discs = np.array([_box(100, v, DISC_H) for v in y], np.float32)
    out = name_levels(discs, np.zeros((0, 4), np.float32), _column(1)[2], _sure())
    assert out.disc_levels == DISC_LEVELS[:8]


@given(st.integers(0, 2**31), st.integers(1, 9))
def test_a_name_is_given_once_and_in_order(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    discs, bodies, sacrum = _column(9)
    keep = np.sort(rng.permutation(9)[:count])
    kept_bodies = bodies[rng.uniform(size=9) < 0.7]
    shaken = (discs[keep] + rng.normal(0, 2, (count, 1))).astype(np.float32)
    out = name_levels(shaken, kept_bodies, sacrum, _sure())
    places = [DISC_LEVELS.index(level) for level in out.disc_levels if level]
    assert places == sorted(set(places))
    assert len(out.discs) == len(out.disc_levels)
    assert len(out.vertebrae) == len(out.vertebra_levels)
    if places:
        assert out.disc_levels[0] == "L5/S1"
