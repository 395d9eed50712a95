"""The same numbers as numpy's, to the last bit: a forest was fitted to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import rank


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.sampled_from(["f4", "f8"]), st.floats(0, 100), st.booleans())
def test_they_are_numpys(seed: int, count: int, kind: str, share: float, rough: bool) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=count) * 10 ** rng.uniform(-3, 3)).astype(kind)
    values = np.round(values) if rough else values
    assert rank.median(values) == float(np.median(values))
    assert rank.percentile(values, share) == float(np.percentile(values, share))
    for shares in ((1.0, 99.5), (90, 10), (0, share, 100)):
        assert rank.percentiles(values, shares) == np.percentile(values, shares).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 70_000])
def test_few_and_many_and_more_than_one_axis(count: int) -> None:
    values = np.random.default_rng(count).normal(size=(count, 2)).astype(np.float32)
    assert rank.median(values) == float(np.median(values))
    assert rank.percentiles(values, (2, 50, 98)) == np.percentile(values, (2, 50, 98)).tolist()


def test_the_values_stay_as_they_lie() -> None:
    values = np.array([3.0, 1.0, 2.0])
    rank.median(values)
    rank.percentile(values, 40)
    assert values.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_every_share_is_rounded_as_numpys(kind: str) -> None:
    values = np.random.default_rng(4).normal(size=37).astype(kind)
    shares = np.linspace(0, 100, 1001).tolist()
    assert [rank.percentile(values, share) for share in shares] == [float(np.percentile(values, share)) for share in shares]
    assert rank.percentiles(values, shares) == np.percentile(values, shares).tolist()
