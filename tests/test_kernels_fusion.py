"""The forest on a device: an ordinal answer whatever is missing, in parts that add up, and no file that is believed unseen."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import fusion
from kernels.fusion import FLAGS, GRADES, GROUPS, NAMES, TARGETS, Fusion, read, rows
from models import fusion as fitting
from models import grader

COLUMN = {name: i for i, name in enumerate(NAMES)}


def discs(count: int = 160, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Rows and truths where grade follows the network and the brightness, and a flag the height; some numbers are missing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (count, len(NAMES))).astype(np.float32)
    score = x[:, COLUMN["network_grade"]] - x[:, COLUMN["median_fluid"]] + 0.3 * rng.normal(0, 1, count)
    grade = np.searchsorted(np.quantile(score, [0.2, 0.45, 0.7, 0.88]), score) + 1
    flags = np.stack([x[:, COLUMN["height"]] > 0.5, rng.random(count) < 0.4, grade > 3], 1)
    holes = rng.random(x.shape) < 0.05
    holes[:, [COLUMN[name] for name in fusion.NEEDED]] = False
    x[holes] = np.nan
    return x, np.column_stack([grade, flags]).astype(np.int64)


@pytest.fixture(scope="module")
def forest() -> Fusion:
    x, truth = discs()
    return fitting.grow(x, fitting.targets(truth), fitting.Forest(trees=25), 1, "ab" * 32)


values = st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6, width=32))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(values, min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 2**31))
def test_the_answer_is_ordinal_and_a_distribution_whatever_is_known(forest: Fusion, some: list[list[float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.full((len(some), len(NAMES)), np.nan, np.float32)
    x[:, rng.permutation(len(NAMES))[:6]] = np.array(some, np.float32)
    network = rng.normal(0, 3, (len(some), GRADES + FLAGS)).astype(np.float32)
    shares = forest.shares(x)
    assert (np.diff(shares[:, : GRADES - 1], axis=1) <= 1e-6).all()
    found = forest.logits(network, x)
    assert np.isfinite(found).all()
    for grade in grader.decode(found):
        assert sum(grade.probabilities) == pytest.approx(1)
        assert min(grade.probabilities) >= 0
        assert all(0 < p < 1 for p in grade.flags.values())


def test_no_grade_is_impossible_and_the_energy_is_the_networks_own(forest: Fusion) -> None:
    x, _ = discs()
    network = np.random.default_rng(1).normal(0, 4, (len(x), GRADES + FLAGS)).astype(np.float32)
    found = forest.logits(network, x)
    energy = [np.logaddexp.reduce(z[:, :GRADES].astype(float), axis=1) for z in (network, found)]
    np.testing.assert_allclose(energy[0], energy[1], atol=1e-5)
    p = np.exp(found[:, :GRADES] - energy[1][:, None])
    assert p.min() >= fusion.SMOOTHING / (1 + GRADES * fusion.SMOOTHING) - 1e-6
    raw = p * (1 + GRADES * fusion.SMOOTHING) - fusion.SMOOTHING
    np.testing.assert_allclose(raw[:, 1:].sum(1), forest.shares(x)[:, 0], atol=1e-5)


def test_a_walk_goes_as_the_trees_say(forest: Fusion) -> None:
    x, _ = discs(30, seed=9)

    def slowly(row: np.ndarray, at: int) -> np.ndarray:
        while forest.feature[at] >= 0:
            value = row[forest.feature[at]]
            value = forest.fill[forest.feature[at]] if np.isnan(value) else value
            at = int(forest.child[at]) + int(value > forest.threshold[at])
        return forest.value[at]

    expected = [np.mean([slowly(row, int(r)) for r in forest.roots], axis=0) for row in x]
    np.testing.assert_allclose(forest.shares(x), expected, rtol=1e-6)


def test_the_parts_of_a_grade_add_up_to_it(forest: Fusion) -> None:
    x, _ = discs(40, seed=10)
    average, parts = forest.parts(x)
    assert set(parts) == set(GROUPS)
    np.testing.assert_allclose(average + sum(parts.values()), 1 + forest.shares(x)[:, : GRADES - 1].sum(1), atol=1e-6)
    # What the grade was made of is what moves it.
    strength = {name: float(np.abs(p).mean()) for name, p in parts.items()}
    assert sorted(strength, key=lambda n: -strength[n])[:2] in (["network", "brightness"], ["brightness", "network"])


def test_a_disc_without_a_reference_brightness_keeps_the_networks_answer(forest: Fusion) -> None:
    x, _ = discs(4)
    x[1, COLUMN["median_fluid"]] = np.nan
    x[2, COLUMN["median_marrow"]] = np.nan
    network = np.random.default_rng(2).normal(0, 3, (4, GRADES + FLAGS)).astype(np.float32)
    assert forest.usable(x).tolist() == [True, False, False, True]
    found = forest.logits(network, x)
    np.testing.assert_array_equal(found[1:3], network[1:3])
    assert (found[[0, 3]] != network[[0, 3]]).any()


def test_rows_hold_the_disc_its_neighbours_and_its_column() -> None:
    rng = np.random.default_rng(4)
    z = rng.normal(0, 2, (4, GRADES + FLAGS)).astype(np.float32)
    looks = rng.normal(0, 1, (4, len(fusion.appearance.NAMES)))
    x = rows(z, looks, [1, 2, 3, 5], [1, 2, 3, None])
    assert x.shape == (4, len(NAMES))
    assert x.dtype == np.float32
    p = np.exp(z[:, :5].astype(float)) / np.exp(z[:, :5].astype(float)).sum(1, keepdims=True)
    grade = p @ np.arange(1, 6)
    np.testing.assert_allclose(x[:, COLUMN["network_grade"]], grade, rtol=1e-5)
    np.testing.assert_allclose(np.diff(x[:, :5], axis=1), np.diff(z[:, :5], axis=1), atol=1e-4)
    np.testing.assert_allclose(x[:2, COLUMN["above_grade"]], grade[1:3], rtol=1e-5)
    np.testing.assert_allclose(x[1:3, COLUMN["below_bulging"]], z[:2, 7], rtol=1e-6)
    assert np.isnan(x[2:, COLUMN["above_grade"]]).all()  # the fifth place is no neighbour of the third
    assert np.isnan(x[3, [COLUMN["below_grade"], COLUMN["beside_less_own"], COLUMN["level"]]]).all()
    assert x[1, COLUMN["beside_less_own"]] == pytest.approx((grade[0] + grade[2]) / 2 - grade[1], abs=1e-5)
    np.testing.assert_allclose(x[:, COLUMN["column_grade"]], grade.mean(), rtol=1e-5)
    np.testing.assert_array_equal(x[:, -looks.shape[1] :], looks.astype(np.float32))


def test_a_network_that_is_beyond_doubt_makes_no_infinity() -> None:
    z = np.array([[900.0, -900, 0, 0, 0, 900, -900, 0]], np.float32)
    x = rows(z, np.zeros((1, len(fusion.appearance.NAMES))), [1], [1])
    assert np.isfinite(x[0, : COLUMN["above_grade"]]).all()


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_the_forest(forest: Fusion) -> None:
    again = read(forest.to_bytes())
    x, _ = discs(20, seed=11)
    np.testing.assert_array_equal(again.shares(x), forest.shares(x))
    assert again.grader == "ab" * 32
    assert again.to_bytes() == forest.to_bytes()


def stored(forest: Fusion, **changed: Any) -> bytes:
    with np.load(io.BytesIO(forest.to_bytes())) as found:
        arrays = {name: found[name] for name in found.files}
    out = io.BytesIO()
    np.savez_compressed(out, **{k: v for k, v in {**arrays, **changed}.items() if v is not None})
    return out.getvalue()


def test_bytes_that_are_no_forest_are_refused(forest: Fusion) -> None:
    blob = forest.to_bytes()
    for bad in (b"", b"no archive", blob[: len(blob) // 2], blob[:-40]):
        with pytest.raises(ValueError, match=r"no file of a fusion|zip"):
            read(bad)


def test_a_pickle_in_the_file_is_never_opened(forest: Fusion) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return pytest.fail, ("the file was believed",)

    for name in ("feature", "names", "grader"):
        with pytest.raises(ValueError, match="pickle"):
            read(stored(forest, **{name: np.array([Evil()], object)}))


def test_a_file_that_unpacks_to_gigabytes_is_not_unpacked(forest: Fusion) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("value.npy", bytes(fusion.MOST_BYTES + 1))
    assert len(out.getvalue()) < 100_000
    with pytest.raises(ValueError, match="unpacks to more"):
        read(out.getvalue())


def test_missing_arrays_other_kinds_and_other_columns_are_refused(forest: Fusion) -> None:
    for name in ("format", "names", "grader", "fill", "feature", "threshold", "child", "value", "roots"):
        with pytest.raises(ValueError, match="no file of a fusion"):
            read(stored(forest, **{name: None}))
    for name, other in (("value", forest.value.astype(np.float64)), ("child", forest.child.astype(np.int64)), ("grader", np.array(7))):
        with pytest.raises(ValueError, match="wrong kind"):
            read(stored(forest, **{name: other}))
    with pytest.raises(ValueError, match="other columns"):
        read(stored(forest, names=np.array(NAMES[::-1])))
    with pytest.raises(ValueError, match="other columns"):
        read(stored(forest, format=np.array("2")))


def _changed(array: np.ndarray, at: Any, value: Any) -> np.ndarray:
    out = array.copy()
    out[at] = value
    return out


def test_a_forest_that_cannot_be_walked_is_none(forest: Fusion) -> None:
    inner = int(np.flatnonzero(forest.feature >= 0)[3])
    nodes = len(forest.feature)
    cases: dict[str, tuple[str, np.ndarray]] = {
        "a circle": ("child", _changed(forest.child, inner, inner)),
        "a way back": ("child", _changed(forest.child, inner, 0)),
        "a way out": ("child", _changed(forest.child, inner, nodes - 1)),
        "a column too many": ("feature", _changed(forest.feature, inner, len(NAMES))),
        "a column below none": ("feature", _changed(forest.feature, inner, -2)),
        "no number to compare with": ("threshold", _changed(forest.threshold, inner, np.nan)),
        "no number to answer": ("value", _changed(forest.value, (inner, 2), np.inf)),
        "a share above one": ("value", _changed(forest.value, (inner, 5), 1.5)),
        "a share below none": ("value", _changed(forest.value, (inner, 5), -0.5)),
        "shares that rise": ("value", _changed(forest.value, inner, np.array([0.1, 0.9, 0.1, 0.1, 0, 0, 0]))),
        "a root outside": ("roots", _changed(forest.roots, 0, nodes)),
        "a root below none": ("roots", _changed(forest.roots, 0, -1)),
        "no tree": ("roots", forest.roots[:0]),
        "another number of columns": ("fill", forest.fill[:-1]),
        "another number of answers": ("value", forest.value[:, :-1]),
        "nodes that lack a threshold": ("threshold", forest.threshold[:-1]),
    }
    believed = []
    for name, (field, array) in cases.items():
        with contextlib.suppress(ValueError):
            dataclasses.replace(forest, **{field: array})
            believed.append(name)
        with contextlib.suppress(ValueError):
            read(stored(forest, **{field: array}))
            believed.append(name)
    assert not believed


def test_targets_are_as_many_as_a_leaf_holds() -> None:
    assert TARGETS == GRADES - 1 + FLAGS == len(grader.SPEC.classes) - 1
    assert grader.FLAGS == ("herniation", "narrowing", "bulging")


def test_one_walk_tells_shares_and_parts(forest: Fusion) -> None:
    x, _ = discs(40, seed=9)
    shares, average, parts = forest.explained(x)
    np.testing.assert_array_equal(shares, forest.shares(x))
    np.testing.assert_allclose(average + sum(parts.values()), 1 + shares[:, : GRADES - 1].sum(axis=1), atol=1e-5)
    network = np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
    np.testing.assert_array_equal(forest.logits(network, x, shares), forest.logits(network, x))
    assert forest.explained(x[:0])[0].shape == (0, TARGETS)
