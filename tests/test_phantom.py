"""The phantom's truth is exact, its physics ordered, its bytes reproducible, its DICOM readable."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from appliance.errors import UsageError
from appliance.report import DISCLAIMER
from models import phantom

LEVELS = ["L5/S1", "L4/L5", "L3/L4", "L2/L3", "L1/L2", "T12/L1", "T11/T12", "T10/T11", "T9/T10", "T8/T9"]
HW = (320, 288)


def _draw(seed: int, **kwargs: object) -> tuple[np.ndarray, phantom.Truth]:
    kwargs.setdefault("hw", HW)
    return phantom.draw(np.random.default_rng(seed), **kwargs)  # type: ignore[arg-type]


def _inside(image: np.ndarray, truth: phantom.Truth, value: int) -> float:
    """Median signal well inside a class."""
    core = cv2.erode((truth.mask == value).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return float(np.median(image[core]))


@pytest.mark.parametrize("weighting", ["T1", "T2"])
def test_same_seed_same_bytes_other_seed_other_image(weighting: str) -> None:
    first, truth = _draw(3, weighting=weighting)
    second, again = _draw(3, weighting=weighting)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(truth.mask, again.mask)
    assert truth.discs == again.discs
    assert truth.vertebrae == again.vertebrae
    other, _ = _draw(4, weighting=weighting)
    assert not np.array_equal(first, other)


def test_image_looks_like_scanner_output() -> None:
    image, truth = _draw(5)
    assert image.dtype == np.float32
    assert image.shape == HW == truth.mask.shape
    assert truth.mask.dtype == np.uint8
    assert image.min() >= 0
    assert 200 < image.max() <= 4095
    np.testing.assert_array_equal(image, np.rint(image))
    # Air holds noise, not zeros.
    assert image[:, -8:].std() > 0


@pytest.mark.parametrize("seed", range(6))
def test_boxes_enclose_exactly_their_mask_component(seed: int) -> None:
    _, truth = _draw(seed, hw=(448, 448))
    disc_mask = (truth.mask == 2).astype(np.uint8)
    covered = np.zeros_like(disc_mask)
    for disc in truth.discs:
        x0, y0, x1, y1 = (int(v) for v in disc.box_px)
        _, parts = cv2.connectedComponents(disc_mask)
        inside = parts[y0:y1, x0:x1]
        # Neighbouring boxes overlap at the corners where the column tilts: the disc is the largest part inside.
        label = int(np.bincount(inside[inside > 0]).argmax())
        ys, xs = np.nonzero(parts == label)
        assert abs(xs.min() - x0) <= 1
        assert abs(ys.min() - y0) <= 1
        assert abs(xs.max() + 1 - x1) <= 1
        assert abs(ys.max() + 1 - y1) <= 1
        covered[parts == label] = 1
    # What has no box touches the edge of the field of view.
    rest = (disc_mask > 0) & (covered == 0)
    if rest.any():
        ys, _ = np.nonzero(rest)
        _, parts = cv2.connectedComponents(rest.astype(np.uint8))
        for k in range(1, parts.max() + 1):
            ys, xs = np.nonzero(parts == k)
            assert ys.min() == 0 or ys.max() == 447 or xs.min() == 0 or xs.max() == 447 or len(ys) < 8
    for vertebra in truth.vertebrae:
        x0, y0, x1, y1 = (int(v) for v in vertebra.box_px)
        middle = truth.mask[(y0 + y1) // 2, (x0 + x1) // 2]
        assert middle == 1


@pytest.mark.parametrize("seed", range(6))
def test_levels_run_upwards_and_alternate(seed: int) -> None:
    _, truth = _draw(seed, hw=(448, 448))
    names = [d.level for d in truth.discs]
    assert names == LEVELS[: len(names)]
    assert len(names) >= 5
    bottoms = [d.box_px[3] for d in truth.discs]
    assert bottoms == sorted(bottoms, reverse=True)
    assert [v.level for v in truth.vertebrae][:5] == ["L5", "L4", "L3", "L2", "L1"]
    assert truth.sacrum_box is not None
    middle = [(b[1] + b[3]) / 2 for b in (truth.sacrum_box, truth.discs[0].box_px, truth.vertebrae[0].box_px, truth.discs[1].box_px)]
    assert middle == sorted(middle, reverse=True)


@pytest.mark.parametrize("seed", range(6))
def test_sacrum_is_background_and_canal_lies_behind_the_bodies(seed: int) -> None:
    _, truth = _draw(seed, hw=(448, 448))
    assert truth.sacrum_box is not None
    x0, y0, x1, y1 = (int(v) for v in truth.sacrum_box)
    assert truth.mask[(y0 + y1) // 2, (x0 + x1) // 2] == 0
    for vertebra in truth.vertebrae:
        bx0, by0, bx1, by1 = (int(v) for v in vertebra.box_px)
        row = truth.mask[(by0 + by1) // 2]
        canal = np.flatnonzero(row == 3)
        assert len(canal) > 0
        assert canal.mean() > (bx0 + bx1) / 2
        assert not (row[canal.min() : canal.max()] == 2).any()


@pytest.mark.parametrize("seed", range(8))
def test_without_the_sacrum_nothing_below_is_in_view(seed: int) -> None:
    _, truth = _draw(seed, sacrum=False)
    assert truth.sacrum_box is None
    assert "L5/S1" not in [d.level for d in truth.discs]
    assert len(truth.discs) >= 5
    start = LEVELS.index(truth.discs[0].level)
    assert 1 <= start <= 3
    assert truth.vertebrae[0].level in ("L5", "L4", "L3", "L2")
    # The lowest rows still show spine: it leaves through the lower edge.
    assert np.isin(truth.mask[-12:], (1, 2)).any()


def test_grade_lowers_signal_and_height_of_the_disc() -> None:
    signal, height = np.zeros((4, 5)), np.zeros((4, 5))
    for seed in range(4):
        for grade in range(1, 6):
            image, truth = _draw(seed + 20, weighting="T2", grades=[grade] * 16, hw=(448, 448))
            assert {d.pfirrmann for d in truth.discs} == {grade}
            signal[seed, grade - 1] = _inside(image, truth, 2) / _inside(image, truth, 1)
            discs = [d for d in truth.discs if d.level in ("L2/L3", "L3/L4")]
            area = [float((truth.mask[int(d.box_px[1]) : int(d.box_px[3]), int(d.box_px[0]) : int(d.box_px[2])] == 2).sum()) for d in discs]
            wide = [d.box_px[2] - d.box_px[0] for d in discs]
            height[seed, grade - 1] = np.mean(np.array(area) / wide) * truth.spacing_mm[0]
    assert (np.diff(signal.mean(0)) < 0).all(), signal
    assert (signal[:, 0] > 1.5 * signal[:, 3]).all(), signal
    assert (np.diff(height.mean(0)) < 0).all(), height
    assert (height[:, 4] < 0.75 * height[:, 0]).all(), height
    assert height[:, 0].min() > 5
    assert height[:, 0].max() < 16


def test_narrowing_goes_with_the_height() -> None:
    _, worn = _draw(1, grades=[5] * 16)
    _, young = _draw(1, grades=[1] * 16)
    assert all(d.narrowing for d in worn.discs)
    assert not any(d.narrowing or d.herniation for d in young.discs)


def test_herniated_disc_reaches_into_the_canal() -> None:
    gain = []
    for seed in range(40):
        _, truth = _draw(seed, grades=[4] * 16)
        for disc in truth.discs[1:4]:
            gain.append((disc.herniation, (disc.box_px[2] - disc.box_px[0]) * truth.spacing_mm[1]))
    protruding = [w for h, w in gain if h]
    assert 5 <= len(protruding) < len(gain) / 2
    assert np.mean(protruding) > np.mean([w for h, w in gain if not h]) + 1.0


def test_given_grades_come_first_and_random_ones_follow() -> None:
    _, truth = _draw(2, grades=(4, 5, 3))
    assert [d.pfirrmann for d in truth.discs][:3] == [4, 5, 3]
    _, free = _draw(2)
    assert [d.pfirrmann for d in truth.discs][3:] == [d.pfirrmann for d in free.discs][3:]


@pytest.mark.parametrize("seed", range(4))
def test_fluid_is_bright_on_t2_and_dark_on_t1(seed: int) -> None:
    t2, truth2 = _draw(seed, weighting="T2")
    t1, truth1 = _draw(seed, weighting="T1")
    assert (truth2.weighting, truth1.weighting) == ("T2", "T1")
    assert _inside(t2, truth2, 3) > 1.2 * _inside(t2, truth2, 1)
    assert _inside(t1, truth1, 3) < 0.8 * _inside(t1, truth1, 1)


def test_random_weighting_is_mostly_t2() -> None:
    rng = np.random.default_rng(0)
    kinds = [phantom.draw(rng, hw=(96, 96))[1].weighting for _ in range(40)]
    assert 22 <= kinds.count("T2") <= 38


def test_random_size_and_spacing_are_typical() -> None:
    rng = np.random.default_rng(0)
    for _ in range(6):
        image, truth = phantom.draw(rng)
        assert image.shape in phantom.TYPICAL_HW
        assert 0.449 <= truth.spacing_mm[0] <= 0.9
        assert truth.spacing_mm[0] == truth.spacing_mm[1]


@pytest.mark.parametrize("kwargs", [{"weighting": "PD"}, {"hw": (20, 448)}, {"hw": (448, 90000)}, {"grades": (0,)}, {"grades": (1, 6)}])
def test_arguments_out_of_range_are_refused(kwargs: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        _draw(0, **kwargs)
    assert caught.value.value
    assert caught.value.remedy


def test_demo_shows_l5s1_to_t11t12_with_mixed_grades() -> None:
    image, truth = phantom.demo()
    assert image.shape == (512, 512)
    assert truth.weighting == "T2"
    assert [d.level for d in truth.discs][:7] == LEVELS[:7]
    assert {d.pfirrmann for d in truth.discs} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("weighting", ["T1", "T2"])
def test_dicom_round_trip(weighting: str, tmp_path: Path) -> None:
    image, truth = _draw(9, weighting=weighting)
    data = phantom.write_dicom(image, truth, tmp_path / "a.dcm", seed=9)
    assert (tmp_path / "a.dcm").read_bytes() == data
    buffer = io.BytesIO()
    assert phantom.write_dicom(image, truth, buffer, seed=9) == buffer.getvalue() == data
    ds = pydicom.dcmread(io.BytesIO(data))
    np.testing.assert_array_equal(ds.pixel_array, image)
    assert ds.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    assert ds.SOPClassUID == pydicom.uid.MRImageStorage
    assert (ds.Modality, ds.PatientID, str(ds.PatientName)) == ("MR", "PHANTOM-9", "PHANTOM^SPINEBOX")
    assert [float(v) for v in ds.PixelSpacing] == pytest.approx(truth.spacing_mm)
    assert [float(v) for v in ds.ImageOrientationPatient] == [0, 1, 0, 0, 0, -1]
    assert (float(ds.EchoTime) > 60) == (weighting == "T2")
    assert (float(ds.RepetitionTime) > 1500) == (weighting == "T2")
    assert DISCLAIMER in ds.ImageComments
    # Required of every MR Image Storage object, by module: type 1 holds a value, type 2 is present.
    type1 = (
        "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality FrameOfReferenceUID PixelSpacing ImageOrientationPatient "
        "ImagePositionPatient ImageType SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit "
        "PixelRepresentation PixelData ScanningSequence SequenceVariant"
    )
    type2 = (
        "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber SeriesNumber "
        "Manufacturer InstanceNumber PositionReferenceIndicator SliceThickness ScanOptions MRAcquisitionType RepetitionTime EchoTime "
        "EchoTrainLength"
    )
    for name in type1.split():
        assert ds.data_element(name) is not None, name
        assert not ds.data_element(name).is_empty, name
    for name in type2.split():
        assert name in ds, name


def test_dicom_uids_differ_between_seeds_and_images() -> None:
    image, truth = _draw(9)
    other, other_truth = _draw(10)
    sets = [
        pydicom.dcmread(io.BytesIO(phantom.write_dicom(i, t, seed=s)))
        for i, t, s in ((image, truth, 9), (other, other_truth, 9), (image, truth, 1))
    ]
    assert len({d.SOPInstanceUID for d in sets}) == 3
    assert sets[0].StudyInstanceUID == sets[1].StudyInstanceUID != sets[2].StudyInstanceUID


def test_dicom_refuses_what_it_cannot_store() -> None:
    image, truth = _draw(9)
    with pytest.raises(UsageError):
        phantom.write_dicom(image[:-1], truth)
    with pytest.raises(UsageError):
        phantom.write_dicom(image - 1e4, truth)
    with pytest.raises(UsageError):
        phantom.write_dicom(np.full_like(image, np.nan), truth)


def test_command_line_writes_studies_with_their_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert phantom.main(["--seed", "4", "--count", "2", "--out", str(tmp_path / "out"), "--png", "--t1"]) == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == sorted(f"phantom-{s}{e}" for s in (4, 5) for e in (".dcm", ".json", ".png", "-mask.png"))
    assert DISCLAIMER in " ".join(capsys.readouterr().err.split())
    record = json.loads((tmp_path / "out/phantom-4.json").read_text())
    assert record["weighting"] == "T1"
    assert record["discs"][0]["level"] == "L5/S1"
    mask = cv2.imread(str(tmp_path / "out/phantom-4-mask.png"), cv2.IMREAD_GRAYSCALE)
    assert list(mask.shape) == record["rows_columns"]
    assert set(np.unique(mask)) == {0, 1, 2, 3}


@pytest.mark.parametrize("argv", [["--out", "x", "--count", "0"], ["--out", "x", "--seed", "-1"], [], ["--out", "x", "--demo", "--t1"]])
def test_command_line_refuses_bad_arguments(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        phantom.main(argv)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_command_line_says_when_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert phantom.main(["--out", str(tmp_path / "file" / "below")]) == 8
    assert "Cannot write" in capsys.readouterr().err


def test_importing_needs_neither_torch_nor_pydicom() -> None:
    code = "import sys, models.phantom; print(sorted({'torch', 'pydicom', 'rich'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


# -- end plates and what follows from them --------------------------------------------------------------------------


def _label(truth: phantom.Truth, x: float, y: float) -> int:
    return int(truth.mask[int(y), int(x)])


@pytest.mark.parametrize("seed", range(4))
def test_end_plates_lie_at_the_edges_of_what_was_painted(seed: int) -> None:
    _, truth = _draw(seed, hw=(448, 448))
    for v in truth.vertebrae[:5]:
        up = np.array(v.upper.middle_px) - v.lower.middle_px
        up /= np.hypot(*up)
        for plate, way in ((v.upper, 1), (v.lower, -1)):
            inside, outside = np.array(plate.middle_px) - 2.5 * way * up, np.array(plate.middle_px) + 2.5 * way * up
            assert _label(truth, *inside) == 1
            assert _label(truth, *outside) != 1
            # Rims lie outside of the rounded corners, by less than 4 pixels.
            middle = (np.array(v.upper.middle_px) + v.lower.middle_px) / 2
            for rim in (plate.anterior_px, plate.posterior_px):
                inwards = middle - rim
                inwards /= np.hypot(*inwards)
                assert _label(truth, *(np.array(rim) + 4.5 * inwards)) in (1, 2)
                assert _label(truth, *(np.array(rim) - 3 * inwards)) != 1


def test_angles_add_up_along_the_column() -> None:
    _, truth = _draw(0, hw=(448, 448))
    wedges = sum(v.wedge_deg for v in truth.vertebrae[:5])
    assert truth.lordosis_deg == pytest.approx(wedges + sum(d.angle_deg for d in truth.discs[:5]))
    for below, disc, above in zip(truth.vertebrae, truth.discs[1:], truth.vertebrae[1:], strict=False):
        assert disc.segment_deg == pytest.approx(below.wedge_deg + disc.angle_deg + above.wedge_deg)


def test_a_deformity_does_what_it_says_and_an_empty_one_nothing() -> None:
    plain_image, plain = _draw(5, hw=(448, 448))
    same_image, same = _draw(5, hw=(448, 448), deformity=phantom.Deformity())
    np.testing.assert_array_equal(plain_image, same_image)
    assert plain.discs == same.discs
    deformity = phantom.Deformity({"L4/L5": 10.0}, {"L2": (0.3, 0.0), "L1": (0.0, 0.4)}, {"L3/L4": 4.0})
    _, bent = _draw(5, hw=(448, 448), deformity=deformity)
    discs, bodies = {d.level: d for d in bent.discs}, {v.level: v for v in bent.vertebrae}
    before = {d.level: d for d in plain.discs}
    assert discs["L4/L5"].slip_mm - before["L4/L5"].slip_mm == pytest.approx(10, abs=0.3)
    front, _, back = bodies["L2"].heights_mm
    assert front / back == pytest.approx(0.7)
    assert bodies["L2"].wedge_deg < -8
    _, middle, back = bodies["L1"].heights_mm
    assert middle / back == pytest.approx(0.6, abs=0.03)
    assert before["L3/L4"].canal_mm - discs["L3/L4"].canal_mm == pytest.approx(4, abs=0.7)


@pytest.mark.parametrize("seed", range(3))
def test_the_canal_of_the_truth_is_that_of_the_mask(seed: int) -> None:
    """Counted in rows, and corrected for how far the canal leans there."""
    _, truth = _draw(seed, hw=(448, 448))
    for disc in truth.discs[2:6]:
        rows = range(int(disc.box_px[1]) - 1, int(disc.box_px[3]) + 1)
        runs = [np.flatnonzero(truth.mask[y] == 3) for y in rows]
        lean = np.polyfit(np.array(rows), [r.mean() for r in runs], 1)[0]
        widths = [len(r) * truth.spacing_mm[1] / np.hypot(1, lean) for r in runs]
        assert disc.canal_mm == pytest.approx(min(widths), abs=1.0)


@pytest.mark.parametrize(
    "deformity",
    [
        phantom.Deformity(slip_mm={"L4/S1": 3.0}),
        phantom.Deformity(slip_mm={"L4/L5": 31.0}),
        phantom.Deformity(height_loss={"L7": (0.1, 0.1)}),
        phantom.Deformity(height_loss={"L2": (0.1, 0.7)}),
        phantom.Deformity(stenosis_mm={"L4/L5": -1.0}),
        phantom.Deformity(stenosis_mm={"L4/L5": float("nan")}),
    ],
)
def test_a_deformity_that_cannot_be_is_refused(deformity: phantom.Deformity) -> None:
    with pytest.raises(UsageError):
        _draw(0, deformity=deformity)
