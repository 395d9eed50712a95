"""A calibration set names its images by hash: the same pixels pass, any other do not, and nobody held out gets in."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from appliance.errors import CalibrationInvalid
from calibration import sets
from calibration.sets import CalibrationSet, digest, make, prepare, select
from kernels.preprocess import letterbox, normalise
from models import data, detector, grader, phantom, segmenter

ITEMS = ("phantom:1", "phantom:2")
TRAIN, TEST = min(data.split()["train"]), min(data.split()["test"])


@pytest.fixture(scope="module")
def two() -> CalibrationSet:
    return make(segmenter.SPEC, ITEMS, None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder of the right shape, with drawn images."""
    for folder, name, seed in (
        ("midsagittal", f"{TRAIN}_t2.png", 1),
        ("midsagittal", f"{TEST}_t2.png", 2),
        ("t2space/images", f"{TRAIN}_007.png", 3),
        ("t2space/images", f"{TEST}_007.png", 4),
    ):
        path = tmp_path / "lumbar_mri" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 255, (60, 50), np.uint8))
    assert cv2.imwrite(str(tmp_path / "secret.png"), np.full((9, 9), 7, np.uint8))
    return tmp_path


def test_the_hash_is_that_of_the_preprocessed_pixels(two: CalibrationSet) -> None:
    assert two.items == ITEMS
    assert two.family == "segmenter"
    pixels, _ = phantom.draw(np.random.default_rng(1))
    x = letterbox(normalise(pixels), segmenter.SPEC.input_hw)[0]
    np.testing.assert_array_equal(prepare("phantom:1", segmenter.SPEC, None), x)
    assert two.sha256[0] == digest(x)
    inputs = list(two.inputs(segmenter.SPEC, None))
    assert [i.shape for i in inputs] == [(1, 1, 384, 384)] * 2
    assert [digest(i) for i in inputs] == list(two.sha256)


def test_csv_and_back(two: CalibrationSet) -> None:
    content = two.to_csv()
    assert content.startswith(b"item,sha256\nphantom:1,")
    assert CalibrationSet.from_csv("segmenter", content) == two
    crop = CalibrationSet("grader", ("phantom:1#1.0,2.0,30.5,20.0",), ("ab" * 32,))
    assert CalibrationSet.from_csv("grader", crop.to_csv()) == crop


@pytest.mark.parametrize(
    "content",
    [b"", b"item,sha256\n", b"name,sha256\na,b\n", b"item,sha256\na\n", b"item,sha256\na,b,c\n", b"\xff\xfe\x00", b"\x89PNG\r\n"],
)
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(CalibrationInvalid, match="not a calibration manifest"):
        CalibrationSet.from_csv("segmenter", content)


def test_a_manifest_has_a_limit() -> None:
    rows = b"".join(b"phantom:%d,%s\n" % (i, b"0" * 64) for i in range(sets.MAX_ITEMS + 1))
    with pytest.raises(CalibrationInvalid):
        CalibrationSet.from_csv("segmenter", b"item,sha256\n" + rows)


def test_one_changed_pixel_changes_the_root_and_the_order_does_not(two: CalibrationSet, root: Path) -> None:
    assert CalibrationSet("segmenter", two.items[::-1], two.sha256[::-1]).root == two.root
    items = [f"midsagittal/{TRAIN}_t2.png", f"t2space/{TRAIN}_007.png"]
    before = make(segmenter.SPEC, items, root)
    assert make(segmenter.SPEC, items, root) == before
    path = root / "lumbar_mri/midsagittal" / f"{TRAIN}_t2.png"
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    image[30, 20] ^= 16
    cv2.imwrite(str(path), image)
    after = make(segmenter.SPEC, items, root)
    assert after.root != before.root
    assert [a == b for a, b in zip(after.sha256, before.sha256, strict=True)] == [False, True]
    inputs = before.inputs(segmenter.SPEC, root)
    with pytest.raises(CalibrationInvalid, match="not the one") as caught:
        next(inputs)
    assert caught.value.value == items[0]


def test_a_wrong_digest_is_refused_at_its_item_and_the_good_ones_come_first(two: CalibrationSet) -> None:
    wrong = CalibrationSet("segmenter", two.items, (two.sha256[0], "0" * 64))
    inputs = wrong.inputs(segmenter.SPEC, None)
    assert digest(next(inputs)) == two.sha256[0]
    with pytest.raises(CalibrationInvalid) as caught:
        next(inputs)
    assert caught.value.value == "phantom:2"


@pytest.mark.parametrize("item", [f"midsagittal/{TEST}_t2.png", f"t2space/{TEST}_007.png", f"midsagittal/{TEST}_t2.png#1,1,30,12"])
def test_a_held_out_patient_never_calibrates(item: str, root: Path) -> None:
    with pytest.raises(CalibrationInvalid, match="held out"):
        make(segmenter.SPEC, [item], root)


@pytest.mark.parametrize(
    "item",
    [
        "../secret.png",
        "midsagittal/../../secret.png",
        f"midsagittal/../midsagittal/{TRAIN}_t2.png",
        "midsagittal/.hidden.png",
        "t2space/masks/1_007.png",
        "/etc/passwd",
        "spine_xray_ap/1_a.png",
        "secret.png",
    ],
)
def test_an_item_outside_the_training_images_is_refused(item: str, root: Path) -> None:
    with pytest.raises(CalibrationInvalid, match="outside the training data"):
        prepare(item, segmenter.SPEC, root)


def test_a_real_image_needs_its_folder() -> None:
    with pytest.raises(CalibrationInvalid, match="training images") as caught:
        prepare(f"midsagittal/{TRAIN}_t2.png", segmenter.SPEC, None)
    assert "--data" in caught.value.remedy


def test_an_empty_list_and_a_constant_image_measure_nothing(root: Path) -> None:
    with pytest.raises(CalibrationInvalid, match="at least one"):
        make(segmenter.SPEC, [], None)
    path = root / "lumbar_mri/midsagittal" / f"{TRAIN}_t1.png"
    cv2.imwrite(str(path), np.full((60, 50), 90, np.uint8))
    with pytest.raises(CalibrationInvalid, match="constant image"):
        make(segmenter.SPEC, [f"midsagittal/{TRAIN}_t1.png"], root)


def test_an_item_with_a_box_is_the_crop_that_the_device_would_cut() -> None:
    pixels, truth = phantom.draw(np.random.default_rng(3))
    x0, y0, x1, y1 = truth.discs[0].box_px
    item = f"phantom:3#{x0},{y0},{x1},{y1}"
    x = prepare(item, grader.SPEC, None)
    assert x.shape == (1, 1, 128, 128)
    np.testing.assert_array_equal(x[0], grader.crop(normalise(pixels), (x0, y0, x1, y1)))


BAD = ["phantom:x", "phantom:-1", "phantom:", "phantom:1#1,2,3", "phantom:1#a,b,c,d", "phantom:1#nan,0,9,9", "midsagittal/none.png"]


@pytest.mark.parametrize("item", [*BAD, "midsagittal/999999_t2.png", "midsagittal/x_t2.png"])
def test_a_broken_item_is_a_calibration_error_and_nothing_else(item: str, root: Path) -> None:
    with pytest.raises(CalibrationInvalid):
        make(grader.SPEC, [item], root)


def test_selection_is_seeded_of_training_patients_and_half_and_half(root: Path) -> None:
    assert select(root, 4) == [f"midsagittal/{TRAIN}_t2.png", f"t2space/{TRAIN}_007.png"]
    extra = sorted(data.split()["train"])[1:7]
    for n in extra:
        cv2.imwrite(str(root / "lumbar_mri/midsagittal" / f"{n}_t1.png"), np.zeros((9, 9), np.uint8))
        cv2.imwrite(str(root / "lumbar_mri/t2space/images" / f"{n}_001.png"), np.zeros((9, 9), np.uint8))
    chosen = select(root, 7)
    assert chosen == select(root, 7)
    assert len(chosen) == len(set(chosen)) == 7
    assert sum(i.startswith("midsagittal/") for i in chosen) == 4
    assert not any(f"/{TEST}_" in i for i in chosen)


def test_selection_without_images_is_phantoms_and_of_crops_a_seeded_part() -> None:
    assert select(None, 3) == [f"phantom:{sets.SEED + i}" for i in range(3)]
    crops = [f"phantom:{i}#0,0,9,9" for i in range(40)]
    chosen = select(None, 10, crops)
    assert chosen == select(None, 10, crops)
    assert len(set(chosen)) == 10
    assert set(chosen) < set(crops)
    assert select(None, 100, crops) == sorted(crops)


# -- the committed split --------------------------------------------------------------------------------------------


def test_no_patient_is_on_both_sides_of_the_split() -> None:
    lists = json.loads(data.SPLIT_FILE.read_text())
    train, test = lists["train"], lists["test"]
    assert not set(train) & set(test)
    assert len(train) == len(set(train))
    assert len(test) == len(set(test))
    assert train == sorted(train)
    assert all(isinstance(n, int) and n > 0 for n in train + test)
    assert 0.18 < len(test) / len(train + test) < 0.22
    assert lists["seed"] == 20261122
    assert data.split() == {"train": frozenset(train), "test": frozenset(test)}


def test_the_split_is_seeded_and_takes_a_fifth_of_each_stratum(tmp_path: Path) -> None:
    for folder, numbers in (("midsagittal", range(1, 101)), ("t2space/masks", range(1, 41))):
        (tmp_path / "lumbar_mri" / folder).mkdir(parents=True)
        for n in numbers:
            (tmp_path / "lumbar_mri" / folder / f"{n}_x.png").touch()
    first = data.make_split(tmp_path)
    assert first == data.make_split(tmp_path)
    assert first != data.make_split(tmp_path, seed=1)
    assert sorted(first["train"] + first["test"]) == list(range(1, 101))
    assert len(first["test"]) == 20
    assert sum(n <= 40 for n in first["test"]) == 8


def test_phantom_seeds_of_calibration_and_evaluation_are_apart() -> None:
    from models import evaluate

    calibration = {sets.SEED + i for i in range(sets.MAX_ITEMS)}
    assert not calibration & {evaluate.PHANTOM_SEED + i for i in range(evaluate.PHANTOMS)}
    assert detector.SPEC.input_hw == segmenter.SPEC.input_hw
