"""The crop around a disc, the grade that comes out of eight numbers, and where grades go wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.preprocess import normalise
from models import data, evaluate, grader, review

SIZE = grader.SPEC.input_hw[0]
Box = tuple[float, float, float, float]


def _texture(hw: tuple[int, int], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.9, 0.4, hw).astype(np.float32)


@given(st.floats(-50, 600), st.floats(-50, 600), st.floats(1, 300), st.floats(1, 300))
def test_the_crop_is_upright_square_and_centred(x0: float, y0: float, width: float, height: float) -> None:
    box = (x0, y0, x0 + width, y0 + height)
    m = grader.crop_matrix(box)
    assert m[0, 1] == m[1, 0] == 0
    assert m[0, 0] == m[1, 1] > 0
    centre = m @ np.array([x0 + width / 2, y0 + height / 2, 1.0])
    np.testing.assert_allclose(centre, [SIZE / 2, SIZE / 2], atol=1e-6)
    # All of the box lies inside, with room around it, and a flat disc fills the same share as a deep one.
    corners = m @ np.array([[box[0], box[2]], [box[1], box[3]], [1.0, 1.0]])
    assert corners.min() > 0
    assert corners.max() < SIZE
    if width >= 1.2 * height and width >= 4:
        assert (corners[0, 1] - corners[0, 0]) == pytest.approx(SIZE / grader.CROP_WIDTHS)


@pytest.mark.parametrize("box", [(180.0, 150.0, 230.0, 164.0), (30.0, 330.0, 150.0, 352.0), (200.0, 200.0, 340.0, 245.0)])
def test_a_spot_in_the_middle_of_the_box_is_in_the_middle_of_the_crop(box: Box) -> None:
    image = _texture((400, 400))
    cy, cx = (box[1] + box[3]) / 2, (box[0] + box[2]) / 2
    ys, xs = np.mgrid[:400, :400] + 0.5
    image += 3.0 * np.exp(-((xs - cx) ** 2 + (ys - cy) ** 2) / (2 * 3.0**2)).astype(np.float32)
    image = np.clip(image, -1, 3)
    out = grader.crop(image, box)
    assert out.shape == (1, SIZE, SIZE)
    assert out.dtype == np.float32
    bright = np.clip(out[0] - np.percentile(out[0], 90), 0, None)
    bright[: SIZE // 4] = bright[-SIZE // 4 :] = 0
    bright[:, : SIZE // 4] = bright[:, -SIZE // 4 :] = 0
    grid = np.arange(SIZE) + 0.5
    found = (float((bright.sum(0) * grid).sum() / bright.sum()), float((bright.sum(1) * grid).sum() / bright.sum()))
    assert np.hypot(found[0] - SIZE / 2, found[1] - SIZE / 2) < 2.5


def test_beyond_the_image_the_crop_is_black() -> None:
    image = _texture((200, 200)) + 0.5
    out = grader.crop(image, (-20.0, 60.0, 20.0, 72.0))[0]
    assert (out[:, : SIZE // 2 - 2] == -1).all()
    assert float(out[:, SIZE // 2 + 2 :].mean()) > -0.9
    below = grader.crop(image, (80.0, 190.0, 120.0, 202.0))[0]
    assert (below[-40:] == -1).all()


def test_shrinking_blurs_first_so_that_fine_stripes_do_not_alias() -> None:
    stripes = np.tile(np.array([-0.8, 0.6], np.float32), (600, 300))
    stripes[:, 300:] += _texture((600, 300)) * 0.01
    box = (40.0, 200.0, 300.0, 260.0)
    assert grader.crop_matrix(box)[0, 0] < 0.5
    kept = stripes.copy()
    spread = float(grader.crop(stripes[:, :], box)[0, 30:98, 30:60].std())
    np.testing.assert_array_equal(stripes, kept)
    assert spread < 0.25


def test_decode_is_softmax_over_grades_and_a_sigmoid_for_each_flag() -> None:
    logits = np.array([[0.0, 1.0, 2.0, 3.0, 0.5, 0.0, 2.0, -2.0], [5.0, 0, 0, 0, 0, -9, 9, 0]], np.float32)
    first, second = grader.decode(logits)
    e = np.exp(logits[0, :5].astype(float))
    np.testing.assert_allclose(first.probabilities, e / e.sum(), rtol=1e-6)
    assert (first.grade, second.grade) == (4, 1)
    assert first.flags == pytest.approx({"herniation": 0.5, "narrowing": 0.8807971, "bulging": 0.1192029})
    assert sum(second.probabilities) == pytest.approx(1.0)
    assert second.flags["narrowing"] > 0.999


def test_a_temperature_softens_and_never_changes_the_grade() -> None:
    logits = np.array([[0.0, 1.0, 2.0, 3.0, 0.5, 1.0, 2.0, -2.0]], np.float32)
    (plain,), (soft,) = grader.decode(logits), grader.decode(logits, {"pfirrmann": 2.0, "narrowing": 4.0})
    assert soft.grade == plain.grade
    np.testing.assert_allclose(soft.probabilities, grader.decode(logits / 2)[0].probabilities, rtol=1e-6)
    assert soft.flags["narrowing"] == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert soft.flags["herniation"] == plain.flags["herniation"]


def test_plausible_grades_are_those_whose_probability_is_high_enough() -> None:
    logits = np.log(np.array([[0.05, 0.15, 0.5, 0.25, 0.05, 1, 1, 1]], np.float32))
    assert grader.decode(logits)[0].plausible == ()
    assert grader.decode(logits, threshold=0.86)[0].plausible == (2, 3, 4)
    assert grader.decode(logits, threshold=0.74)[0].plausible == (3,)
    assert grader.decode(logits, threshold=0.1)[0].plausible == (3,)  # the given grade is always one of them


@given(st.lists(st.floats(-1e4, 1e4), min_size=8, max_size=8))
def test_huge_logits_stay_probabilities(row: list[float]) -> None:
    with np.errstate(over="ignore"):
        grade = grader.decode(np.array([row]))[0]
    assert 1 <= grade.grade <= 5
    assert sum(grade.probabilities) == pytest.approx(1.0)
    assert all(0 <= p <= 1 for p in (*grade.probabilities, *grade.flags.values()))


def test_no_discs_no_grades() -> None:
    assert grader.decode(np.zeros((0, 8), np.float32)) == []


def _certain(grade: int, share: float = 0.96) -> grader.Grade:
    p = tuple(share if k + 1 == grade else (1 - share) / 4 for k in range(5))
    return grader.Grade(grade, p, dict.fromkeys(grader.FLAGS, 0.5))


def _disc(truth: int, number: int, patient: int = 1) -> evaluate.Crop:
    return evaluate.Crop(patient, _texture((90, 90), seed=number), (20.0, 30.0, 60.0, 44.0), data.Grading(truth, 0, 0, 0), number)


def test_confusion_counts_each_disc_at_its_level_truth_and_answer() -> None:
    discs = [_disc(2, 1), _disc(2, 1), _disc(5, 3), _disc(1, 0)]
    counts = evaluate.confusion([_certain(2), _certain(3), _certain(4), _certain(1)], discs)
    assert counts.shape == (3, 5, 5)
    assert counts.sum() == 3  # a disc without a level is at none
    assert (counts[0, 1, 1], counts[0, 1, 2], counts[2, 4, 3]) == (1, 1, 1)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in review.confusion_table(counts).splitlines()[2:]]
    assert rows == [
        ["L5/S1", "2", "0", "1", "1", "0", "0", "2", "0.50"],
        ["L3/L4", "5", "0", "0", "0", "1", "0", "1", "0.00"],
        ["all", "2", "0", "1", "1", "0", "0", "2", "0.50"],
        ["all", "5", "0", "0", "0", "1", "0", "1", "0.00"],
    ]
    assert evaluate.confusion([], []).shape == (0, 5, 5)


def test_surprise_is_the_expected_distance_in_grades() -> None:
    assert review.surprise(_certain(3, 1.0), 3) == 0
    assert review.surprise(_certain(5, 1.0), 1) == 4
    assert review.surprise(_certain(1, 0.2), 1) == pytest.approx(2.0)


def test_the_worst_disc_comes_first_in_the_picture() -> None:
    discs = [_disc(3, k) for k in range(1, 8)]
    grades = [_certain(3)] * 7
    grades[4] = _certain(1)
    picture = review.worst_picture(grades, discs, count=6)
    rows, tile = 2, review.SIDE + 34
    assert picture.shape == (rows * tile, review.COLUMNS * review.SIDE)
    alone = review.worst_picture([grades[4]], [discs[4]], count=1)
    np.testing.assert_array_equal(picture[:tile, : review.SIDE], alone[:, : review.SIDE])
    assert not picture[tile:, review.SIDE :].any()  # the sixth has four empty places beside it


def test_each_crop_gets_the_answer_to_its_own_pixels() -> None:
    asked: list[np.ndarray] = []  # type: ignore[type-arg]

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        asked.append(inputs["image"])
        return {"logits": np.eye(8, dtype=np.float32)[[len(asked) - 1]] * 9}

    discs, steps = [_disc(1, 1), _disc(2, 2), _disc(3, 3)], []
    grades = evaluate.grade(run, discs, lambda done, of: steps.append((done, of)))
    assert [g.grade for g in grades] == [1, 2, 3]
    assert steps == [(1, 3), (2, 3), (3, 3)]
    for x, c in zip(asked, discs, strict=True):
        np.testing.assert_array_equal(x[0], grader.crop(normalise(c.pixels), c.box))
