"""The measure of how familiar a picture is: distances on known Gaussians, the limit, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models import familiarity


def drawn(count: int, seed: int, shift: float = 0.0) -> np.ndarray:  # type: ignore[type-arg]
    """Correlated channels of very different spread, as pooled activations are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(0, 1, (80, 80)) / 9 + np.eye(80)
    return (rng.normal(shift, 1, (count, 80)) @ mixing) * np.geomspace(0.1, 10, 80)


@pytest.fixture(scope="module")
def known() -> familiarity.Familiarity:
    return familiarity.fit(drawn(600, 1), drawn(300, 2))


def test_a_usual_picture_is_at_about_one_and_99_of_100_are_known(known: familiarity.Familiarity) -> None:
    fresh = known.distance(drawn(2000, 3))
    assert fresh.mean() == pytest.approx(1.0, abs=0.12)
    assert 0.97 <= (fresh <= known.limit).mean() <= 1.0


def test_strangers_are_told_apart_whatever_the_channel(known: familiarity.Familiarity) -> None:
    usual = drawn(300, 4)
    for channel in (0, 40, 79):
        strange = usual.copy()
        strange[:, channel] += 40 * usual[:, channel].std()
        assert (known.distance(strange) > known.limit).mean() > 0.95
    assert (known.distance(drawn(300, 5, shift=1.5)) > known.limit).mean() > 0.95
    assert known.known(usual[:1])
    assert not known.known(drawn(1, 5, shift=5.0))


def test_what_is_no_number_is_infinitely_strange(known: familiarity.Familiarity) -> None:
    x = drawn(3, 6)
    x[0, 5], x[1, 5] = np.nan, np.inf
    assert np.isinf(known.distance(x)).tolist() == [True, True, False]
    assert not known.known(x[:1])


def test_a_channel_that_never_fires_divides_by_nothing() -> None:
    learnt, choosing = drawn(200, 7), drawn(200, 8)
    learnt[:, 3] = choosing[:, 3] = 0.0
    found = familiarity.fit(learnt, choosing)
    assert np.isfinite(found.distance(choosing)).all()


def test_rare_pictures_are_known_where_they_were_among_the_learnt(known: familiarity.Familiarity) -> None:
    with_rare = familiarity.fit(drawn(600, 1), drawn(300, 2), drawn(60, 10, shift=1.0))
    fresh = drawn(200, 11, shift=1.0)
    assert (known.distance(fresh) <= known.limit).mean() < 0.5
    assert (with_rare.distance(fresh) <= with_rare.limit).mean() > 0.9


def test_rare_pictures_are_not_judged_by_themselves() -> None:
    learnt, choosing, rare = drawn(600, 1), drawn(300, 2), drawn(60, 10) * 3
    crossed = familiarity.fit(learnt, choosing, rare)
    # Had they set their own mean and covariance too, the limit would only have to hold these distances.
    assert crossed.limit > float(np.quantile(np.concatenate([crossed.distance(choosing), crossed.distance(rare)]), familiarity.KEPT))


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 50"):
        familiarity.fit(drawn(49, 1), drawn(80, 2))


def test_written_and_read_again_it_says_the_same(known: familiarity.Familiarity, tmp_path: Path) -> None:
    path = tmp_path / "known.npz"
    familiarity.write(known, path)
    again = familiarity.read(path)
    x = drawn(20, 9)
    assert again.distance(x) == pytest.approx(known.distance(x), rel=1e-3)
    assert again.limit == pytest.approx(known.limit, rel=1e-6)


@pytest.mark.parametrize("change", ["shape", "nan", "missing", "pickle"])
def test_another_file_is_refused(known: familiarity.Familiarity, tmp_path: Path, change: str) -> None:
    path = tmp_path / "known.npz"
    fields: dict[str, object] = {"mean": known.mean, "root": known.root, "limit": np.float32(known.limit)}
    if change == "shape":
        fields["root"] = known.root[:4]
    elif change == "nan":
        fields["limit"] = np.float32(np.nan)
    elif change == "missing":
        del fields["limit"]
    else:
        fields["mean"] = np.array([{}], object)
    np.savez(path, **fields)  # type: ignore[arg-type]
    with pytest.raises((ValueError, KeyError)):
        familiarity.read(path)
