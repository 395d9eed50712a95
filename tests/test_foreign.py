"""Foreign models: preprocessing, decoders of export layouts, and the Subject that measures an engine with or without labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.compiler import foreign, graph
from appliance.compiler.card import Card
from appliance.compiler.drafting import draft
from appliance.errors import CalibrationInvalid, CalibrationLeaks, CardInvalid
from models import foreign as decode
from models.evaluate import paired_drop
from tests import foreign_models as fm

RULES = decode.BoxRules("yolov8")


@pytest.fixture
def subjects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A maker of Subjects; the graph's own process is left out, which has tests of its own."""

    def job(name: str, plan: dict[str, Any], model: Any = None, timeout_s: float = 0) -> bytes:
        if name == "load":
            return bytes(graph.read_model(Path(plan["path"])).SerializeToString())
        if name == "probe":
            return json.dumps(graph._probe(model, plan)).encode()
        return bytes(graph._prepare(model, plan, tmp_path).SerializeToString(deterministic=True))

    monkeypatch.setattr(graph, "_isolated", job)
    for name, count in (("MEASURED", 6), ("TUNED", 3)):
        monkeypatch.setattr(foreign, name, count)

    def make(model: Any, card: Card | None = None, *folders: Path | None, images: int = 4) -> Any:
        return foreign.subject(fm.save(model, tmp_path / "m.onnx"), card, *folders, images=images)

    return make


# -- preprocessing --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    h=st.integers(5, 200), w=st.integers(5, 200), rows=st.integers(16, 96), columns=st.integers(16, 96),
    resize=st.sampled_from(["stretch", "letterbox", "letterbox-corner", "crop"]),
)  # fmt: skip
def test_an_image_fills_its_place_and_boxes_come_back(h: int, w: int, rows: int, columns: int, resize: str) -> None:
    image = np.full((h, w, 3), 200, np.uint8)
    x, at = decode.image_input(image, (rows, columns), "rgb", 1.0, (0.0,), (1.0,), resize, 7.0)
    assert x.shape == (1, 3, rows, columns)
    assert set(np.unique(x)) <= {7.0, 200.0}
    box = np.array([[w * 0.4, h * 0.4, w * 0.6, h * 0.6]], np.float32)
    if resize != "crop":  # which may cut the box
        np.testing.assert_allclose(at.boxes_to_source(at.boxes_to_input(box)), box, atol=1e-2)
    y0, x0 = (int(v) for v in np.floor(at.boxes_to_input(box)[0, 1::-1]))
    assert x[0, 0, min(y0, rows - 1), min(x0, columns - 1)] == 200.0
    covered = (x == 200).mean()
    assert covered == 1.0 if resize in ("stretch", "crop") else covered <= 1.0


def test_colour_order_and_normalisation() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0] = 255  # blue
    rgb, _ = decode.image_input(image, (4, 4), "rgb", 1 / 255, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0), "stretch", 0)
    np.testing.assert_allclose(rgb[0, :, 0, 0], [-1.0, -0.25, 0.5])
    bgr, _ = decode.image_input(image, (4, 4), "bgr", 1.0, (0.0,), (1.0,), "stretch", 0)
    np.testing.assert_allclose(bgr[0, :, 0, 0], [255.0, 0.0, 0.0])
    assert decode.image_input(image, (4, 4), "grey", 1.0, (0.0,), (1.0,), "stretch", 0)[0].shape == (1, 1, 4, 4)


# -- decoders -------------------------------------------------------------------------------------------------------

TRUTH = np.array([[10, 10, 30, 30], [11, 11, 31, 31], [40, 5, 60, 25]], np.float32)  # the second overlaps the first
SCORES = np.array([[0.9, 0.1], [0.8, 0.0], [0.2, 0.7]], np.float32)
CENTRES = np.concatenate([(TRUTH[:, :2] + TRUTH[:, 2:]) / 2, TRUTH[:, 2:] - TRUTH[:, :2]], 1)


def _layouts() -> dict[str, tuple[dict[str, np.ndarray], decode.BoxRules]]:
    v8 = np.concatenate([CENTRES, SCORES], 1).T[None]
    v5 = np.concatenate([CENTRES, np.full((3, 1), 0.5, np.float32), SCORES / 0.5], 1)[None]
    more = np.full((3, 4), 9.0, np.float32)  # mask coefficients, larger than any score
    cells = decode.yolox_cells((64, 64))
    at = [3, 40, 83]
    grid = np.zeros((len(cells), 7), np.float32)
    grid[at, :2] = CENTRES[:, :2] / cells[at, 2:] - cells[at, :2]
    grid[at, 2:4] = np.log(CENTRES[:, 2:] / cells[at, 2:])
    grid[at, 4], grid[at, 5:] = 0.5, SCORES / 0.5
    kept = [0, 2]
    best, which = SCORES.max(1)[kept, None], SCORES.argmax(1)[kept, None].astype(np.float32)
    zero = np.zeros((2, 1), np.float32)
    corner, unit = TRUTH[kept], TRUTH[kept] / 64
    return {
        "yolov8": ({"main": v8}, decode.BoxRules("yolov8")),
        "yolov5": ({"main": v5}, decode.BoxRules("yolov5")),
        "yolov8 with masks": ({"main": np.concatenate([CENTRES, SCORES, more], 1).T[None]}, decode.BoxRules("yolov8", extra=4)),
        "yolov5 with masks": ({"main": np.concatenate([v5[0], more], 1)[None]}, decode.BoxRules("yolov5", extra=4)),
        "yolox": ({"main": grid[None]}, decode.BoxRules("yolox")),
        "nms of six": ({"main": np.concatenate([corner, best, which], 1)[None]}, decode.BoxRules("nms", "xyxy")),
        "nms of seven": ({"main": np.concatenate([zero, corner, which, best], 1)}, decode.BoxRules("nms", "xyxy")),
        "class first": ({"main": np.concatenate([which, best, corner], 1)}, decode.BoxRules("nms-class-first", "xyxy")),
        "separate, yxyx, shares": (
            {"boxes": unit[None][..., [1, 0, 3, 2]], "scores": best.T, "classes": which.T, "count": np.array([2.0])},
            decode.BoxRules("boxes-scores", "yxyx", normalised=True),
        ),
        "separate and dense": ({"boxes": TRUTH[None], "scores": SCORES[None]}, decode.BoxRules("boxes-scores", "xyxy")),
        "separate and dense, classes first": (
            {"boxes": TRUTH[None], "scores": SCORES.T[None]},
            decode.BoxRules("boxes-scores", "xyxy"),
        ),
    }


@pytest.mark.parametrize("name", _layouts())
def test_every_layout_gives_the_same_boxes(name: str) -> None:
    outputs, rules = _layouts()[name]
    found = decode.boxes({k: np.asarray(v, np.float32) for k, v in outputs.items()}, rules, (64, 64), 0.25)
    np.testing.assert_allclose(found.boxes, TRUTH[[0, 2]], atol=1e-4)
    np.testing.assert_allclose(found.scores, [0.9, 0.7], atol=1e-6)
    assert found.classes.tolist() == [0, 1]


def test_yolox_counts_cells_by_stride_and_row() -> None:
    cells = decode.yolox_cells((64, 96))
    assert len(cells) == 8 * 12 + 4 * 6 + 2 * 3
    assert cells[[0, 1, 12, 96, -1]].tolist() == [[0, 0, 8], [1, 0, 8], [0, 1, 8], [0, 0, 16], [2, 1, 32]]


def test_a_size_that_overflows_is_no_box() -> None:
    rows = np.zeros((1, 84, 6), np.float32)
    rows[0, 3] = [0, 0, 200, 200, 1, 1]
    assert not len(decode.boxes({"main": rows}, decode.BoxRules("yolox"), (64, 64), 0.1).scores)


def test_rows_of_zeros_and_nan_are_no_boxes() -> None:
    rows = np.zeros((5, 6), np.float32)
    rows[1] = [1, 1, 5, 5, np.nan, 0]
    rows[2] = [np.inf, 1, 5, 5, 0.9, 0]
    assert not len(decode.boxes({"main": rows}, decode.BoxRules("nms", "xyxy"), (64, 64), 0.0).scores)


def test_boxes_turned_inside_out_are_no_boxes() -> None:
    rows = np.array([[30, 30, 10, 10, 0.9, 0], [10, 10, 10, 30, 0.8, 0], [10, 10, 30, 30, 0.7, 0]], np.float32)
    found = decode.boxes({"main": rows}, decode.BoxRules("nms", "xyxy"), (64, 64), 0.1)
    np.testing.assert_allclose(found.scores, [0.7])


def test_a_count_that_lies_is_held_to_what_is_there() -> None:
    outputs, rules = _layouts()["separate, yxyx, shares"]
    assert len(decode.boxes(outputs | {"count": np.array([99.0])}, rules, (64, 64), 0.1).scores) == 2
    assert len(decode.boxes(outputs | {"count": np.array([-5.0])}, rules, (64, 64), 0.1).scores) == 0


def test_segment_and_classify() -> None:
    logits = np.array([[[[2.0, -1.0]], [[0.0, -3.0]]]], np.float32)
    assert decode.segment(logits, "argmax").tolist() == [[0, 0]]
    assert decode.segment(logits, "sigmoid").tolist() == [[1, 0]]
    assert decode.segment(np.array([[[[0.6, 0.4]]]]), "probability").tolist() == [[1, 0]]
    assert decode.segment(np.array([[[1, 2]]]), "labels").tolist() == [[1, 2]]
    np.testing.assert_allclose(decode.classify(np.array([[0.0, np.log(3)]]), "softmax"), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(decode.classify(np.array([[-1e9, 1e9]]), "sigmoid"), [0, 1], atol=1e-20)


def test_ctc_merges_repeats_and_drops_blanks() -> None:
    steps = np.eye(4, dtype=np.float32)[[0, 2, 2, 0, 2, 3, 3, 0]][None]
    assert decode.ctc(steps) == (2, 2, 3)
    assert decode.edit_distance((1, 2, 3), (2, 3, 3)) == 2
    assert decode.edit_distance((), (1, 2)) == 2


def test_an_angle_of_one_value_is_no_agreement() -> None:
    one, many = np.ones(1, np.float32), np.arange(1, 20, dtype=np.float32)
    assert foreign.cosine(one, 0.5 * one) == 0.5
    assert foreign.cosine(one, -one) == 0.0
    assert foreign.cosine(many, 3 * many) == pytest.approx(1.0)
    assert foreign.cosine(many, many[::-1]) < 0.7
    assert foreign.cosine(many, 0 * many) == 0.0
    assert foreign.cosine(0 * many, 0 * many) == 1.0


# -- subjects -------------------------------------------------------------------------------------------------------


def _runner(subject: Any, change: Any = None) -> Any:
    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        out = fm.run(subject.model, inputs["image"])
        return {k: change(k, v) for k, v in out.items()} if change else out

    return run


MODELS = {
    "classifier": (lambda: fm.classifier(side=64), "cam", "agreement_top1", lambda k, v: v[:, ::-1]),
    "yolov8": (lambda: fm.detector("yolov8"), "class-evidence", "agreement_map50", lambda k, v: v * 0 if k == "out" else v),
    "yolov5": (lambda: fm.detector("yolov5"), "class-evidence", "agreement_map50", lambda k, v: v * 0 if k == "out" else v),
    "chosen inside": (lambda: fm.detector("yolov8", chosen=True), "", "agreement_map50", lambda k, v: v * 0 if k == "rows_out" else v),
    "labels": (lambda: fm.segmenter("ArgMax"), "class-evidence", "agreement_dice", lambda k, v: v + 1 if k == "out" else v),
}


@pytest.mark.parametrize("name", MODELS)
def test_agreement_is_one_for_itself_and_falls_for_a_broken_engine(subjects: Any, name: str) -> None:
    make, kind, main, broken = MODELS[name]
    model = make()
    card, _ = draft(model, "net")
    if name == "chosen inside":
        card = replace(card, box="cxcywh")
    if name == "labels":
        card = Card(name="net", task="segmentation", decoder="labels", input_name="image", shape=(1, 3, 64, 64), outputs={"main": "out"})
    s = subjects(model, card)
    assert s.heatmap.kind == kind or not kind
    own = s.examiner.scores(_runner(s))
    assert (own.main, own[main].value, own.source) == (main, 1.0, "agreement with FP32")
    worse = s.examiner.scores(_runner(s, broken))
    held_against = s.examiner.baseline(_runner(s))
    assert paired_drop(held_against, worse).value > 0.1
    assert held_against[main].value > 0.8
    assert "synthetic" in s.calibration.source
    assert any("synthetic" in x for x in s.card["limits"])
    assert len(s.golden) == 2
    assert set(s.keep_float) <= {n.name for n in s.model.graph.node}


def test_the_float_model_is_held_against_itself_in_noise_that_nobody_sees(subjects: Any) -> None:
    s = subjects(fm.classifier())
    seen: list[np.ndarray] = []
    run = _runner(s)

    def spy(feed: Any) -> Any:
        seen.append(feed["image"])
        return run(feed)

    assert s.examiner.scores(spy)["agreement_probability"].value == 1.0
    clean, seen[:] = list(seen), []
    first = s.examiner.baseline(spy)
    assert 0.5 < first["agreement_probability"].value < 1.0
    level = s.preprocess["scale"] / np.asarray(s.preprocess["std"])
    spread = [float(np.std((a - b) / level.reshape(1, -1, 1, 1))) for a, b in zip(clean, seen, strict=True)]
    assert spread == pytest.approx([foreign.NOISE_LEVELS] * len(spread), rel=0.05)
    assert s.examiner.baseline(run).metrics == first.metrics  # seeded


def test_pictures_are_drawn_once_unless_they_are_large() -> None:
    foreign._kept.cache_clear()
    first = foreign._drawn(5, (48, 64))
    assert foreign._drawn(5, (48, 64)) is first
    np.testing.assert_array_equal(first, foreign.synthetic(5, (48, 64)))
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 0
    side = int(foreign.KEPT_PIXELS**0.5) + 1
    assert foreign._drawn(5, (side, side)) is not foreign._drawn(5, (side, side))
    assert foreign._kept.cache_info().currsize == 1


def test_pooled_dice_counts_pixels_not_pictures() -> None:
    page, speck, nothing = np.ones((40, 40), np.int64), np.zeros((40, 40), np.int64), np.zeros((40, 40), np.int64)
    speck[0, 0] = 1
    over = foreign._pooled_dice([(page, page), (nothing, speck)])
    assert over(np.array([0, 1])) == pytest.approx(3200 / 3201)
    assert over(np.array([1])) == 0.0
    assert foreign._pooled_dice([(nothing, nothing)])(np.array([0])) == 1.0


def test_a_detector_keeps_its_box_arithmetic_in_float(subjects: Any) -> None:
    s = subjects(fm.detector("yolov8"))
    assert {"pixels", "out", "sure"} <= set(s.keep_float)
    assert not {"stem", "deep", "head0", "box1"} & set(s.keep_float)


def test_class_evidence_of_a_detector_is_the_logit_of_its_scales(subjects: Any) -> None:
    s = subjects(fm.detector("yolov8"))
    x = s.golden[0]
    out = fm.run(s.model, x)
    sure = out["out"][0, 4:]
    logits = np.log(sure / (1 - sure))
    fine, coarse = logits[:, :256].reshape(3, 16, 16), logits[:, 256:].reshape(3, 8, 8)
    expected = np.maximum(fine, coarse.repeat(2, 1).repeat(2, 2))
    np.testing.assert_allclose(out["evidence"][0], expected, atol=1e-3)


def test_the_same_file_gives_the_same_subject(subjects: Any) -> None:
    a, b = (subjects(fm.classifier(side=64)) for _ in range(2))
    assert a.model.SerializeToString(deterministic=True) == b.model.SerializeToString(deterministic=True)
    assert (a.calibration.root, a.calibration.to_csv(), a.examiner.identity) == (
        b.calibration.root,
        b.calibration.to_csv(),
        b.examiner.identity,
    )
    assert a.examiner.identity != a.validator.identity
    for x, y in zip(a.calibration.inputs(), b.calibration.inputs(), strict=True):
        np.testing.assert_array_equal(x, y)


# -- folders --------------------------------------------------------------------------------------------------------


def _images(folder: Path, count: int, first: int = 500) -> Path:
    folder.mkdir()
    for i in range(count):
        cv2.imwrite(str(folder / f"{i:02}.png"), foreign.synthetic(first + i, (64, 64)))
    return folder


def _classifier_card(labels: str = "") -> Card:
    return Card(
        name="net", task="classification", decoder="probabilities", input_name="image", shape=(1, 3, 64, 64), labels=labels,
        outputs={"main": "probabilities"}, classes=("a", "b", "c"),
    )  # fmt: skip


def test_labelled_classes(subjects: Any, tmp_path: Path) -> None:
    folder = _images(tmp_path / "eval", 6)
    plain = subjects(fm.classifier(side=64), _classifier_card(), None, folder)
    answers = [int(a.probabilities.argmax()) for a in plain.examiner.reference()]
    names = [c.source.item for c in plain.examiner.cases]
    rows = [f"{n},{'abc'[k]}" if i else f"{n},{k}" for i, (n, k) in enumerate(zip(names, answers, strict=True))]
    (folder / "labels.csv").write_text("file,label\n" + "\n".join(rows) + "\n")
    s = subjects(fm.classifier(side=64), _classifier_card("labels.csv"), None, folder)
    scores = s.examiner.scores(_runner(s))
    assert (scores.main, scores["accuracy"].value, scores.source) == ("accuracy", 1.0, "labelled images")
    (folder / "labels.csv").write_text("00.png,zebra\n")
    with pytest.raises(CardInvalid, match=r"line 1 of labels\.csv"):
        subjects(fm.classifier(side=64), _classifier_card("labels.csv"), None, folder)


def test_labelled_boxes(subjects: Any, tmp_path: Path) -> None:
    folder = _images(tmp_path / "eval", 3)
    (folder / "truth").mkdir()
    card, _ = draft(fm.detector("yolov8"), "net")
    card = replace(card, labels="truth")
    for i in range(3):
        (folder / "truth" / f"{i:02}.txt").write_text("0 0.5 0.5 0.2 0.2\n\n1 0.2 0.2 0.1 0.1\n")
    s = subjects(fm.detector("yolov8"), card, None, folder)
    perfect = decode.Boxes(s.examiner.cases[0].boxes.boxes, np.ones(2, np.float32), np.array([0, 1]))
    assert foreign._mean_ap([foreign._match(perfect, perfect)])(np.array([0])) == 1.0
    assert 0 <= s.examiner.scores(_runner(s))["map50"].value < 1
    (folder / "truth" / "00.txt").write_text("0 0.5 0.5\n")
    with pytest.raises(CardInvalid, match=r"line 1 of 00\.txt"):
        subjects(fm.detector("yolov8"), card, None, folder)


def test_one_folder_is_shared_out_without_overlap(subjects: Any, tmp_path: Path) -> None:
    s = subjects(fm.classifier(side=64), _classifier_card(), _images(tmp_path / "images", 9), images=50)
    used = {x.item for x in s.calibration.sources}
    assert s.calibration.count == 6
    assert not used & {c.source.item for c in s.examiner.cases}
    assert s.calibration.source == "images named by the card"


def test_an_image_on_both_sides_is_a_leak(subjects: Any, tmp_path: Path) -> None:
    folder = _images(tmp_path / "images", 4)
    with pytest.raises(CalibrationLeaks, match="calibrated on and measured on"):
        subjects(fm.classifier(side=64), _classifier_card(), folder, folder)


def test_one_changed_byte_changes_the_root(subjects: Any, tmp_path: Path) -> None:
    folder = _images(tmp_path / "images", 4)
    card = _classifier_card()
    before = subjects(fm.classifier(side=64), card, folder, None).calibration
    path = folder / before.sources[0].item
    image = cv2.imread(str(path))
    image[image.shape[0] // 2, image.shape[1] // 2] ^= 64
    cv2.imwrite(str(path), image)
    assert subjects(fm.classifier(side=64), card, folder, None).calibration.root != before.root
    with pytest.raises(CalibrationInvalid, match="not the one"):
        list(before.inputs())


@pytest.mark.parametrize("bad", ["constant", "text", "cut", "bomb", "one", "none"])
def test_bad_calibration_images(subjects: Any, tmp_path: Path, bad: str) -> None:
    folder = _images(tmp_path / "images", 0 if bad == "none" else 1 if bad == "one" else 4)
    path = folder / "00.png"
    if bad == "constant":
        cv2.imwrite(str(path), np.full((64, 64, 3), 90, np.uint8))
    elif bad == "text":
        path.write_text("no image")
    elif bad == "cut":
        path.write_bytes(path.read_bytes()[:40])
    elif bad == "bomb":
        data = bytearray(path.read_bytes())
        data[16:24] = (60000).to_bytes(4, "big") * 2
        path.write_bytes(data)
    with pytest.raises(CalibrationInvalid) as caught:
        subjects(fm.classifier(side=64), _classifier_card(), folder, _images(tmp_path / "eval", 3, 900))
    assert (bad in ("one", "none")) or "00.png" in caught.value.value


def test_synthetic_images_are_seeded_and_differ() -> None:
    a, b, c = foreign.synthetic(1, (48, 64)), foreign.synthetic(1, (48, 64)), foreign.synthetic(2, (48, 64))
    np.testing.assert_array_equal(a, b)
    assert a.shape != c.shape or (a != c).any()
    assert a.std() > 5
