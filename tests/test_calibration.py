"""A calibration set names its images by hash: the same pixels pass, any other do not, and nobody held out gets in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from appliance.errors import CalibrationInvalid, CalibrationLeaks
from calibration import sets
from calibration.sets import CalibrationSet, digest, for_family, make, prepare, select, verify
from kernels.preprocess import letterbox, normalise
from models import data, detector, grader, phantom, segmenter

ITEMS = ("phantom:1", "phantom:2")
MAY = sorted(data.split()["train"] - data.validation_patients())
TRAIN, TEST, TUNED = MAY[0], min(data.split()["test"]), min(data.validation_patients())


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


def test_csv_and_back_and_the_same_bytes_again(two: CalibrationSet) -> None:
    content = two.to_csv()
    assert content.splitlines()[0] == b"# spinebox calibration manifest 2"
    assert f"# merkle root: {two.root}\n".encode() in content
    assert b"# preprocess: 2\n# input: 384x384\n# seed: 20261122\n# images: 2\n" in content
    assert CalibrationSet.from_csv("segmenter", content) == two
    assert CalibrationSet.from_csv("", content).to_csv() == content == make(segmenter.SPEC, ITEMS, None).to_csv()
    crop = make(grader.SPEC, ["phantom:1#1.0,2.0,60.5,50.0"], None)
    assert CalibrationSet.from_csv("grader", crop.to_csv()) == crop


def altered(content: bytes) -> list[bytes]:
    first, second = b"segmenter", b"phantom:1"
    digit = content.rindex(b"phantom:2,") + len(b"phantom:2,")
    flipped = bytes([content[digit] ^ 1]) if chr(content[digit] ^ 1) in "0123456789abcdef" else b"0"
    return [
        b"",
        b"item,sha256\nphantom:1,00\n",
        b"\xff\xfe\x00",
        b"\x89PNG\r\n",
        content.replace(b"manifest 2", b"manifest 9"),
        content.replace(first, b"grader"),
        content.replace(b"# seed: 20261122", b"# seed: x"),
        content.replace(b"# seed: 20261122\n", b""),
        content.replace(b"384x384", b"384"),
        content.replace(b"# images: 2", b"# images: 3"),
        content.replace(b",stratum,", b",layer,"),
        content[: content.index(second)],
        content[: content.rindex(b"\n", 0, -1) + 1],
        content + b"a,b\n",
        content + b'"',
        content[:digit] + flipped + content[digit + 1 :],
        content[:digit] + content[digit + 3 :],
    ]


def test_what_is_no_manifest_or_was_altered_is_refused(two: CalibrationSet) -> None:
    for content in altered(two.to_csv()):
        assert content != two.to_csv()
        with pytest.raises(CalibrationInvalid, match="not a calibration manifest of segmenter"):
            CalibrationSet.from_csv("segmenter", content)


def test_a_manifest_has_a_limit(two: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "MAX_ITEMS", 1)
    with pytest.raises(CalibrationInvalid, match="at most 1"):
        CalibrationSet.from_csv("segmenter", two.to_csv())
    monkeypatch.setattr(sets, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(CalibrationInvalid, match="at most 100 bytes"):
        CalibrationSet.from_csv("segmenter", two.to_csv())


def test_a_proof_shows_one_image_and_no_other(two: CalibrationSet) -> None:
    proof = two.prove("phantom:2")
    assert verify(proof)
    assert proof.root == two.root
    assert two.sha256[0] not in repr(proof)
    assert two.source_sha256[0] not in repr(proof)
    for wrong in (
        replace(proof, sha256=two.sha256[0]),
        replace(proof, source_sha256=two.source_sha256[0]),
        replace(proof, index=1 - proof.index),
        replace(proof, count=3),
        replace(proof, root="0" * 64),
        replace(proof, path=()),
        replace(proof, path=(proof.path[0], proof.path[0])),
        replace(proof, sha256="nonsense"),
    ):
        assert not verify(wrong)
    with pytest.raises(CalibrationInvalid, match="not in the calibration set"):
        two.prove("phantom:3")


def test_one_changed_pixel_changes_the_root_and_the_order_does_not(two: CalibrationSet, root: Path) -> None:
    assert replace(two, items=two.items[::-1], sha256=two.sha256[::-1], source_sha256=two.source_sha256[::-1]).root == two.root
    assert replace(two, sha256=two.sha256[::-1]).root != two.root
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
    wrong = replace(two, sha256=(two.sha256[0], "0" * 64))
    inputs = wrong.inputs(segmenter.SPEC, None)
    assert digest(next(inputs)) == two.sha256[0]
    with pytest.raises(CalibrationInvalid) as caught:
        next(inputs)
    assert caught.value.value == "phantom:2"


@pytest.mark.parametrize("item", [f"midsagittal/{TEST}_t2.png", f"t2space/{TEST}_007.png", f"midsagittal/{TEST}_t2.png#1,1,30,12"])
def test_a_held_out_patient_never_calibrates(item: str, root: Path) -> None:
    with pytest.raises(CalibrationLeaks, match="held out for evaluation"):
        make(segmenter.SPEC, [item], root)
    with pytest.raises(CalibrationLeaks, match="held out for tuning"):
        make(segmenter.SPEC, [item.replace(f"/{TEST}_", f"/{TUNED}_")], root)


def test_an_item_given_twice_counts_once(root: Path) -> None:
    with pytest.raises(CalibrationInvalid, match="twice"):
        make(segmenter.SPEC, ["phantom:1", "phantom:1"], None)


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


def scans(root: Path, numbers: list[int]) -> None:
    """More images, and a table that gives every third patient another vendor."""
    lines = ["new_file_name,Manufacturer"]
    for n in numbers:
        for series in ("t1", "t2", "t2_SPACE"):
            lines.append(f"{n}_{series},{'Philips Healthcare' if n % 3 == 0 else 'SIEMENS'}")
        for name in (f"midsagittal/{n}_t1.png", f"midsagittal/{n}_t2.png", *(f"t2space/images/{n}_t2_SPACE_slice{k}.png" for k in (1, 2))):
            (root / "lumbar_mri" / name).touch()
    (root / "lumbar_mri/scans.csv").write_text("\n".join(lines) + "\n")


def test_selection_is_seeded_of_training_patients_and_stratified(root: Path) -> None:
    assert sorted(select(root, 4)) == [f"midsagittal/{TRAIN}_t2.png", f"t2space/{TRAIN}_007.png"]
    scans(root, [*MAY[1:31], TUNED])
    chosen = select(root, 24)
    assert chosen == select(root, 24)
    assert len(chosen) == len(set(chosen)) == 24
    assert not any(f"/{TEST}_" in i or f"/{TUNED}_" in i for i in chosen)
    names = [i.rpartition("/")[2] for i in chosen]
    assert 5 <= sum("_t1." in n for n in names) <= 7
    assert 5 <= sum("_t2." in n for n in names) <= 7
    assert 11 <= sum("SPACE" in n for n in names) <= 13
    patients = [int(n.partition("_")[0]) for n in names]
    assert sum(n % 3 == 0 for n in patients) == pytest.approx(24 * sum(n % 3 == 0 for n in MAY[1:31]) / 30, abs=2.5)
    assert len(set(patients)) >= 22


def test_selection_without_images_is_phantoms_and_of_crops_a_seeded_part() -> None:
    assert select(None, 3) == [f"phantom:{sets.SEED + i}" for i in range(3)]
    crops = {f"phantom:{i}#0,0,9,9": f"Pfirrmann {1 + i % 2}" for i in range(40)}
    chosen = select(None, 10, crops)
    assert chosen == select(None, 10, dict(reversed(crops.items())))
    assert len(set(chosen)) == 10
    assert set(chosen) < set(crops)
    assert sum(crops[c] == "Pfirrmann 1" for c in chosen) == 5
    assert sorted(select(None, 100, list(crops))) == sorted(crops)


def test_a_family_is_calibrated_on_what_it_looks_at() -> None:
    whole = for_family(segmenter.SPEC, None, 1)
    assert (whole.count, whole.source) == (1, "phantoms")
    assert [x.shape for x in whole.inputs()] == [(1, 1, 384, 384)]
    assert CalibrationSet.from_csv("segmenter", whole.to_csv()).root == whole.root
    crops = for_family(grader.SPEC, None, 2, lambda feed: feed)
    assert crops.count == 2
    assert [x.shape for x in crops.inputs()] == [(1, 1, 128, 128)] * 2
    assert all("Pfirrmann" in s for s in crops.manifest.strata)
    with pytest.raises(CalibrationInvalid, match="detector"):
        for_family(grader.SPEC, None, 6)


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
