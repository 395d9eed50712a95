"""The radiograph sets: labels as they are read, persons that stay together, and the committed split."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from calibration import radiographs as grouping
from calibration.duplicates import fingerprint
from models import phantom_ap, radiographs


def label(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(text)
    return path


def test_boxes_come_in_pixels_from_the_top_down(tmp_path: Path) -> None:
    path = label(tmp_path, "0 0.5 0.75 0.2 0.1\n\n0 0.5 0.25 0.5 0.1\n")
    assert radiographs.read_boxes(path, (400, 200)) == pytest.approx(np.array([[50, 80, 150, 120], [80, 280, 120, 320]]))


def test_a_polygon_counts_by_its_extent(tmp_path: Path) -> None:
    path = label(tmp_path, "0 0.2 0.1 0.6 0.1 0.6 0.3 0.2 0.3 0.2 0.1")
    assert radiographs.read_boxes(path, (100, 100)) == pytest.approx(np.array([[20, 10, 60, 30]]))


@pytest.mark.parametrize(
    "line", ["0 0.5 0.5 0.1", "1 0.5 0.5 0.1 0.1", "0 1.5 0.5 0.1 0.1", "0 0.5 0.5 0 0.1", "a b c d e", "0 nan 0.5 0.1 0.1"]
)
def test_a_label_that_is_none_is_named_by_file_and_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(ValueError, match=r"a\.txt, line 2"):
        radiographs.read_boxes(label(tmp_path, f"0 0.5 0.5 0.1 0.1\n{line}\n"), (100, 100))


def test_too_many_boxes_are_no_spine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most"):
        radiographs.read_boxes(label(tmp_path, "0 0.5 0.5 0.1 0.1\n" * 65), (100, 100))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("sunhl-1th-03-Jan-2017-163-A-AP_jpg.rf.1.jpg", "sunhl-1th-05-Jan-2017-163-B-AP_jpg.rf.2.jpg", True),
        ("sunhl-1th-03-Jan-2017-163-A-AP_jpg.rf.1.jpg", "sunhl-1th-03-Jan-2017-164-A-AP_jpg.rf.1.jpg", False),
        ("Image_121_jpg.rf.aaaa.jpg", "Image_121_jpg.rf.bbbb.jpg", True),
        ("Image_121_jpg.rf.aaaa.jpg", "Image_121_2ndbatch_jpg.rf.aaaa.jpg", False),
    ],
)
def test_what_a_name_says_of_its_person(a: str, b: str, same: bool) -> None:
    assert (grouping.name_key(a) == grouping.name_key(b)) == same


def test_groups_join_through_names_and_through_pictures() -> None:
    assert grouping.groups(["a", "b", "a", "c", "d"], [(1, 3)]) == [0, 1, 0, 1, 2]
    assert grouping.groups(["a", "b", "c"], [(0, 1), (1, 2)]) == [0, 0, 0]


def test_the_same_picture_exported_twice_is_alike_and_another_spine_is_not() -> None:
    pictures = [phantom_ap.draw(np.random.default_rng(seed), (416, 229))[0] for seed in (1, 2)]
    copy = cv2.GaussianBlur(pictures[0], (0, 0), 0.7)[6:-6, 4:-4] ** 0.8
    prints = [fingerprint(np.asarray(p, np.float32)) for p in (*pictures, copy)]
    assert grouping.alike(prints) == [(0, 2)]


def write_set(root: Path) -> None:
    """Six frontal pictures and eight classed ones; number 0 lies in both folders of the first set under another name."""
    rng = np.random.default_rng(0)
    noise = [cv2.GaussianBlur(rng.normal(0, 1, (256, 140)), (0, 0), 5) for _ in range(14)]
    pictures = [(n - n.min()) / np.ptp(n) * 255 for n in noise]
    places = [("train", f"n{i}") for i in range(4)] + [("valid", "n4"), ("valid", "copy_of_0")]
    for i, (side, name) in enumerate(places):
        for kind in ("images", "labels"):
            (root / "spine_xray_ap" / side / kind).mkdir(parents=True, exist_ok=True)
        picture = pictures[0] + rng.normal(0, 1, pictures[0].shape) if name == "copy_of_0" else pictures[i]
        cv2.imwrite(str(root / "spine_xray_ap" / side / "images" / f"{name}_jpg.rf.{i}.jpg"), picture.clip(0, 255).astype(np.uint8))
        (root / "spine_xray_ap" / side / "labels" / f"{name}_jpg.rf.{i}.txt").write_text("0 0.5 0.5 0.2 0.1\n")
    for i in range(8):
        folder = root / "spine_xray_class" / radiographs.CLASSES[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{i}.jpg"), pictures[6 + i].astype(np.uint8))


def test_a_person_of_the_test_side_teaches_nothing(tmp_path: Path) -> None:
    write_set(tmp_path)
    sides = grouping.make_split(tmp_path)
    assert {side: len(members) for side, members in sides.items() if side.startswith("boxes_w")} == {"boxes_withdrawn": 1}
    assert len(sides["boxes_test"]) == 2
    assert len(sides["boxes_train"]) + len(sides["boxes_validation"]) == 3
    assert len(sides["class_test"]) == 2
    judged = set(sides["boxes_test"].values())
    assert not judged & {*sides["boxes_train"].values(), *sides["boxes_validation"].values()}
    assert sides == grouping.make_split(tmp_path)


def test_the_committed_split_parts_no_group_and_holds_each_picture_once() -> None:
    sides = radiographs.split()
    for names in (("boxes_train", "boxes_validation", "boxes_test"), ("class_train", "class_test")):
        groups = [set(sides[n].values()) for n in names]
        assert sum(len(g) for g in groups) == len(set().union(*groups))
    everything = [d for members in sides.values() for d in members]
    assert len(everything) == len(set(everything)) == 926 + 262 + 258
    assert set(sides["boxes_withdrawn"].values()) <= set(sides["boxes_test"].values())
    taught = {*sides["boxes_train"].values(), *sides["boxes_validation"].values()}
    assert not set(sides["class_test"].values()) & taught
    assert not set(sides["class_train"].values()) & set(sides["boxes_test"].values())
    assert 0.2 < len(sides["class_test"]) / 258 < 0.3
