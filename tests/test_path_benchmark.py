"""What `benchmarks.path` prints is what was measured: sums, ratios of neighbours, and two trees that take turns."""

from __future__ import annotations

import pytest

from benchmarks import path


def test_a_ratio_is_that_of_neighbouring_turns_and_both_go_first_as_often() -> None:
    turns: list[str] = []
    busy = iter(range(1, 1000))

    def tree(name: str, ms: float) -> path.Stages:
        turns.append(name)
        slow = 1.0 + (next(busy) // 8) % 3  # both are slowed alike
        return {"run": ms * slow, f"only {name}": 1.0}

    found = path.compare(lambda _: tree("before", 30.0), lambda _: tree("after", 10.0), 32)
    assert list(found) == list(path.PROTOCOLS)
    pair = found["spine-xray-ap"]["run"]
    assert list(found["spine-xray-ap"]) == ["run"]
    assert pair.ratio == pytest.approx(3.0)
    assert pair.b.runs == 32
    firsts = turns[::2]
    assert abs(firsts.count("before") - firsts.count("after")) <= 2


def test_the_first_runs_do_not_count() -> None:
    calls = iter(range(1000))
    found = path.profile(lambda _: {"run": 1000.0 if next(calls) % (path.WARM + 3) < path.WARM else 2.0}, 3)
    assert found["lumbar-mri-sagittal"]["run"].p99_ms == 2.0


def test_each_protocol_has_a_study_that_is_answered_as_its_own() -> None:
    whole = path.WholePath("onnxruntime")
    for protocol in path.PROTOCOLS:
        stages = whole.answer(protocol)
        inside = [name for name in stages if name.startswith("  ")]
        assert {"  decode", "  overlay"} <= set(inside)
        assert stages["pictures"] == pytest.approx(sum(stages[f"  {name}"] for name in path.PICTURES))
        assert sum(ms for name, ms in stages.items() if name in inside and name.strip() not in path.PICTURES) <= stages["run"]
    whole.engine.close()
