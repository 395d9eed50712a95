"""Radiograph families on their way into a bundle: three sides of persons, pictures named by content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from appliance import backends
from appliance.compiler import families, frontal
from appliance.compiler.signature import signature_of
from appliance.compiler.verdict import Verdict
from appliance.errors import CalibrationInvalid, CalibrationLeaks
from calibration import sets
from models import familiarity, known, phantom_ap, radiographs, spine_class, vertebra_ap

SIDES = ("boxes_train", "boxes_validation", "boxes_test", "class_train", "class_test")
EACH = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of frontal phantoms laid out like the radiographs, and the split that belongs to it."""
    folder = tmp_path_factory.mktemp("data")
    sides: dict[str, dict[str, int]] = {side: {} for side in SIDES}
    image, truth = phantom_ap.draw(np.random.default_rng(1))  # drawn once: drawing takes longer than all else here
    for at, side in enumerate(SIDES):
        for i in range(EACH):
            seed = 10 * at + i
            height, width = image.shape
            if side.startswith("boxes"):
                path = folder / f"spine_xray_ap/train/images/{seed:02}.jpg"
                rows = [
                    f"0 {(x0 + x1) / 2 / width:.6f} {(y0 + y1) / 2 / height:.6f} {(x1 - x0) / width:.6f} {(y1 - y0) / height:.6f}"
                    for x0, y0, x1, y1 in (v.box_px for v in truth.vertebrae)
                    if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
                ]
                label = path.parent.parent / f"labels/{seed:02}.txt"
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text("\n".join(rows))
            else:
                path = folder / f"spine_xray_class/{radiographs.CLASSES[i % 3]}/{seed:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.clip(image / 4095 * 250 + seed / 10, 0, 255).astype(np.uint8))
            sides[side][radiographs.digest(path)] = seed
    patch = pytest.MonkeyPatch()
    patch.setattr(radiographs, "split", lambda: sides)
    yield folder
    patch.undo()


@pytest.mark.parametrize("module", [vertebra_ap, spine_class], ids=lambda m: m.SPEC.name)
def test_a_family_on_three_sides(root: Path, module: Any) -> None:
    (subject,) = families.subjects(root, 8, names=(module.SPEC.name,))
    session = backends.load("onnxruntime").open(subject.model.SerializeToString(), signature_of(subject.model), precision="f32", threads=1)
    calibrated = set(subject.calibration.manifest.items)
    learnt = "boxes_train" if module is vertebra_ap else "class_train"
    assert calibrated == {f"{sets.RADIOGRAPH}{d}" for d in radiographs.split()[learnt]}
    assert len(list(subject.calibration.inputs())) == EACH
    assert sets.CalibrationSet.from_csv(module.SPEC.name, subject.calibration.to_csv()).root == subject.calibration.root
    scores = subject.examiner.scores(session.run)
    assert scores.source == "held-out persons"
    assert 0 <= scores[scores.main].value <= 1
    assert (subject.validator is None) == (module is spine_class)
    assert subject.heatmap.kind == module.SPEC.heatmap_kind
    for sample in subject.explainer.samples():
        outputs = session.run({"image": sample.x})
        target = subject.explainer.target(outputs)
        assert subject.explainer.map(outputs, target).ndim == 2
        assert 0 <= subject.explainer.score(outputs, target) <= 1
        assert (sample.truth is None) == (module is spine_class)
    assert [x.shape for x in subject.golden] == [(1, 1, *module.SPEC.input_hw)] * 2
    answers = known.read(module.SPEC.name)
    assert subject.fitted_on.startswith(answers.sha256 if answers is not None else "")
    assert (answers is None) == (module is vertebra_ap)
    if module is spine_class:
        assert subject.confidence(session.run, session.run).passed is None  # three persons are too few
    session.close()


@pytest.mark.parametrize(("drift", "refused"), [(0.0, False), (0.1, False), (3.0, True)])
def test_an_engine_that_no_longer_knows_a_spine_is_refused(drift: float, refused: bool) -> None:
    """No logit moves, and every picture is carried a little away from the mean."""
    rng = np.random.default_rng(0)
    numbers = familiarity.fit(rng.normal(0, 1, (400, 80)), rng.normal(0, 1, (300, 80)))
    plain = rng.normal(0, 1, (200, 80)).astype(np.float32)
    good = Verdict("confidence", True, "T 1.00", 0.01, limit=0.05, details={"heads": []})
    found = frontal.familiar(good, [plain, plain + np.float32(drift)], numbers)
    assert found.passed is not refused
    assert ("strangers" in found.note) == refused
    assert found.details["familiar"]["pictures"] == 200
    assert found.details["heads"] == []
    bad = frontal.familiar(replace(good, passed=False, note="ECE"), [plain, plain + np.float32(drift)], numbers)
    assert bad.passed is False
    assert bad.note.startswith("ECE")


def test_the_numbers_of_what_is_familiar_are_part_of_what_a_verdict_depends_on(root: Path, tmp_path: Path) -> None:
    for name in (f"{spine_class.SPEC.name}.onnx", familiarity.FILE.name):
        (tmp_path / name).write_bytes((families.WEIGHTS / name).read_bytes())
    (first,) = families.subjects(root, 4, tmp_path, names=(spine_class.SPEC.name,))
    numbers = familiarity.read(tmp_path / familiarity.FILE.name)
    familiarity.write(replace(numbers, limit=numbers.limit + 1), tmp_path / familiarity.FILE.name)
    (second,) = families.subjects(root, 4, tmp_path, names=(spine_class.SPEC.name,))
    assert first.fitted_on != second.fitted_on


def test_examined_pictures_are_part_of_the_identity(root: Path) -> None:
    pictures = radiographs.boxed(root, "test")
    assert len(pictures) == EACH
    whole, part = (frontal.PictureExaminer("vertebra_ap", p, "held-out persons").identity for p in (pictures, pictures[1:]))
    assert whole != part
    assert whole == frontal.PictureExaminer("vertebra_ap", pictures, "held-out persons").identity
    first = pictures[0]
    pixels, boxes = first.pixels.copy(), first.boxes.copy()
    pixels[0, 0] ^= 1
    boxes[0, 0] += 1
    for changed in (replace(first, pixels=pixels), replace(first, boxes=boxes)):
        assert frontal.PictureExaminer("vertebra_ap", [changed, *pictures[1:]], "held-out persons").identity != whole


@pytest.mark.parametrize("side", ["boxes_validation", "boxes_test", "class_test"])
def test_pictures_that_choose_or_judge_never_calibrate(root: Path, side: str) -> None:
    item = f"{sets.RADIOGRAPH}{next(iter(radiographs.split()[side]))}"
    with pytest.raises(CalibrationLeaks, match="may be learnt from"):
        sets.make(vertebra_ap.SPEC, [item], root)


def test_a_picture_that_is_nowhere_is_named(root: Path) -> None:
    with pytest.raises(CalibrationLeaks, match="unknown"):
        sets.make(vertebra_ap.SPEC, [f"{sets.RADIOGRAPH}{'0' * 16}"], root)
    with pytest.raises(CalibrationInvalid, match="this content"):
        sets.prepare(f"{sets.RADIOGRAPH}{'0' * 16}", vertebra_ap.SPEC, root)
    with pytest.raises(CalibrationInvalid, match="on radiographs"):
        sets.for_family(vertebra_ap.SPEC, None, 4)


def test_without_radiographs_the_lumbar_families_stand_alone(tmp_path: Path) -> None:
    assert not frontal.there(None)
    assert not frontal.there(tmp_path)
    assert families.subjects(None, 4, names=("vertebra_ap", "spine_class")) == []
