"""What hostile or broken folders, tables, manifests and statistics do: a clear error, nothing of a patient, nothing half-written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner, Result

from appliance.cli.calibrate import calibrate, prove
from appliance.errors import CalibrationInvalid, UsageError
from calibration import folders, leaks, statistics
from calibration.folders import gather, make, select, standard
from models import phantom

NAME, NUMBER, BIRTH = "Mustermann^Erika", "PAT-4711-XYZ", "19640812"
PRIVATE = {
    "PatientName": NAME,
    "PatientID": NUMBER,
    "PatientBirthDate": BIRTH,
    "PatientSex": "F",
    "PatientAge": "061Y",
    "PatientWeight": "72.25",
    "OtherPatientIDs": "OTHER-0815",
    "PatientAddress": "Hauptstrasse 9, Musterstadt",
    "PatientComments": "knows the mayor",
    "PatientMotherBirthName": "Beispiel",
    "InstitutionName": "Klinikum Musterstadt",
    "ReferringPhysicianName": "Hausarzt^Hans",
    "StudyDescription": "LWS of Erika",
    "SeriesDescription": "T2 TSE sag Mustermann",
    "ProtocolName": "erika_special",
    "AccessionNumber": "ACC0099887766",
    "StudyDate": "20240229",
    "AcquisitionDate": "20240229",
    "DeviceSerialNumber": "SN-554433",
    "StationName": "MRT-KELLER",
    "Manufacturer": "SIEMENS Mustermann",
}


def call(*arguments: object) -> Result:
    command = {"calibrate": calibrate, "prove": prove}[str(arguments[0])]
    return CliRunner().invoke(command, [str(a) for a in arguments[1:]], catch_exceptions=False)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine DICOM files of nine patients, every element of the patient group filled, named after the patient."""
    folder = tmp_path_factory.mktemp("scans")
    for n in range(9):
        image, truth = phantom.draw(np.random.default_rng(n), hw=(128, 112), weighting="T2")
        path = folder / f"Mustermann_Erika_{n}.dcm"
        phantom.write_dicom(image, truth, path, seed=n)
        ds = pydicom.dcmread(path)
        for keyword, value in PRIVATE.items():
            setattr(ds, keyword, f"{value}-{n}" if keyword == "PatientID" else value)
        ds.save_as(path)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(9):
        image, _ = phantom.draw(np.random.default_rng(n), hw=(128, 112))
        cv2.imwrite(str(folder / f"{n}.png"), np.clip(image / image.max() * 255, 0, 255).astype(np.uint8))
    return folder


# -- privacy --------------------------------------------------------------------------------------------------------


def uids_of(folder: Path) -> set[str]:
    out = set()
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        out |= {str(e.value) for e in ds.iterall() if e.VR == "UI"} - {str(ds.SOPClassUID)}
    return out


def survivors(content: bytes, folder: Path) -> list[str]:
    """Words of the DICOM headers, UIDs, names and unsalted hashes of patient numbers that are in `content`."""
    import hashlib

    text = content.decode().lower()
    words = {w for value in PRIVATE.values() for w in re.split(r"[\^ ,]+", value) if len(w) > 3} - {"siemens", "SIEMENS"}
    hashes = {hashlib.sha256(f"{NUMBER}-{n}".encode()).hexdigest() for n in range(9)}
    names = {p.stem for p in folder.iterdir()} | {p.name for p in folder.iterdir()}
    return sorted(w for w in {*words, *uids_of(folder), *hashes, *names} if w.lower() in text)


def test_nothing_of_a_dicom_header_survives_in_what_may_leave_the_site(scans: Path, tmp_path: Path) -> None:
    result = call("calibrate", scans, "--out", tmp_path / "m.csv", "--export-statistics", tmp_path / "s.json", "--images", 9)
    assert result.exit_code == 0, result.output
    for path in (tmp_path / "m.csv", tmp_path / "s.json"):
        content = path.read_bytes()
        assert len(content) > 1000
        assert survivors(content, scans) == []
    # The same look finds them where they are kept on purpose, so it is not blind.
    kept = call("calibrate", scans, "--out", tmp_path / "k.csv", "--images", 9, "--keep-names")
    assert kept.exit_code == 0
    found = survivors((tmp_path / "k.csv").read_bytes(), scans)
    assert any(len(w) == 64 for w in found)
    assert any("Mustermann_Erika" in w for w in found)


def test_patients_are_told_apart_by_their_numbers_and_never_shown(scans: Path) -> None:
    found = gather([scans])
    assert len({i.patient for i in found.images}) == 9
    assert all(re.fullmatch(r"[0-9a-f]{64}", i.patient) for i in found.images)
    assert {(i.vendor, i.protocol) for i in found.images} == {("Siemens", "MR sagittal T2 2D")} or all(
        i.vendor == "Siemens" for i in found.images
    )
    assert all("Mustermann" not in i.protocol for i in found.images)


def test_a_view_position_that_is_no_defined_term_is_not_repeated(tmp_path: Path) -> None:
    image, truth = phantom.draw(np.random.default_rng(0), hw=(128, 112), weighting="T2")
    path = tmp_path / "x.dcm"
    phantom.write_dicom(image, truth, path)
    ds = pydicom.dcmread(path)
    ds.Modality, ds.SOPClassUID, ds.ViewPosition = "DX", pydicom.uid.DigitalXRayImageStorageForPresentation, "ERIKA M"
    ds.save_as(path)
    assert gather([path]).images[0].protocol == "DX other view 2D"


# -- folders --------------------------------------------------------------------------------------------------------


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    result = call("calibrate", tmp_path, "--out", tmp_path / "m.csv")
    assert result.exit_code == 7
    assert "[compile.calibration] no image can calibrate: 0 found" in result.stderr
    assert not (tmp_path / "m.csv").exists()


def test_one_image_is_refused_by_name_and_taken_by_force(tmp_path: Path, pictures: Path) -> None:
    one = pictures / "3.png"
    with pytest.raises(CalibrationInvalid, match="1 of at least 8") as caught:
        select(gather([one]).images, 64)
    assert caught.value.value == "3.png"
    assert call("calibrate", one, "--out", tmp_path / "m.csv").exit_code == 7
    assert call("calibrate", one, "--out", tmp_path / "m.csv", "--force").exit_code == 0


def test_what_cannot_be_read_is_listed_and_the_rest_goes_on(tmp_path: Path, pictures: Path) -> None:
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:400])
    (pictures / "notes.txt").write_text("not an image")
    (pictures / "empty.png").touch()
    cv2.imwrite(str(pictures / "flat.png"), np.full((80, 80), 90, np.uint8))
    cv2.imwrite(str(pictures / "colour.jpg"), np.dstack([np.full((60, 60), v, np.uint8) for v in (0, 90, 250)]))
    (pictures / "loop").symlink_to(pictures, target_is_directory=True)
    (pictures / "self").symlink_to(pictures / "self")
    os.mkfifo(pictures / "pipe")
    result = call("calibrate", pictures, "--out", tmp_path / "m.csv", "--json", "--images", 9)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {s["file"]: s["why"].partition(":")[0] for s in told["skipped"]} == {
        "cut.png": "study.truncated",
        "flat.png": "a constant image measures no range",
        "colour.jpg": "study.colour",
    }
    assert told["candidates"] == told["images"] == 9


def test_only_constant_images_leave_nothing(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "flat.png"), np.full((80, 80), 90, np.uint8))
    with pytest.raises(CalibrationInvalid, match="1 found, 1 left out") as caught:
        gather([tmp_path])
    assert "flat.png" in caught.value.value


def test_pixels_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    image, truth = phantom.draw(np.random.default_rng(0), hw=(128, 112), weighting="T2")
    path = tmp_path / "nan.dcm"
    phantom.write_dicom(image, truth, path)
    ds = pydicom.dcmread(path)
    pixels = np.full((128, 112), np.nan, "<f4")
    del ds.PixelData
    ds.FloatPixelData, ds.BitsAllocated = pixels.tobytes(), 32
    ds.save_as(path)
    with pytest.raises(CalibrationInvalid, match="1 left out") as caught:
        gather([tmp_path])
    assert "not all finite" in caught.value.value


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_preparation_that_gives_no_numbers_or_nothing_is_refused_at_its_image(bad: float, pictures: Path) -> None:
    chosen = select(gather([pictures]).images, 9)
    with pytest.raises(CalibrationInvalid) as caught:
        make(chosen, lambda pixels: np.full((1, 1, 8, 8), bad, np.float32), model="m", input_hw=(8, 8))
    assert caught.value.value == chosen[0][0].name


def test_a_huge_folder_is_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_FILES", 5)
    with pytest.raises(UsageError, match="more than 5"):
        gather([pictures])


def test_a_file_changed_in_the_middle_is_seen(pictures: Path) -> None:
    chosen = select(gather([pictures]).images, 9)
    cv2.imwrite(str(chosen[4][0].path), np.random.default_rng(1).integers(0, 255, (90, 90), np.uint8))
    with pytest.raises(CalibrationInvalid, match="changed while"):
        make(chosen, standard((64, 64)), model="m", input_hw=(64, 64))


def test_names_that_are_no_text_do_not_break_a_manifest(pictures: Path, tmp_path: Path) -> None:
    raw = os.fsencode(str(pictures)) + b'/\xff\xfe,"\n\xe2\x80\xa8=cmd.png'
    (pictures / "0.png").rename(os.fsdecode(raw))
    result = call("calibrate", pictures, "--out", tmp_path / "m.csv", "--keep-names", "--images", 9)
    assert result.exit_code == 0, result.output
    again = leaks.Evaluation.read(tmp_path / "m.csv").manifest
    assert again is not None
    assert len(again.items) == 9


# -- files from elsewhere -------------------------------------------------------------------------------------------


def exported(pictures: Path) -> dict[str, Any]:
    images = gather([pictures]).images
    chosen = select(images, 9)
    return statistics.export(make(chosen, standard((64, 64)), model="m", input_hw=(64, 64)).manifest, [i for i, _ in chosen])


BAD: list[tuple[str, Any]] = [
    ("format", "spinebox calibration statistics 9"),
    ("root", "0"),
    ("images", []),
    ("images", "x"),
    ("strata", {"a": 1}),
    ("strata", {"a": True}),
    ("percents", [1]),
    ("input", [1]),
    ("preprocess", "x" * 300),
    ("extra", 1),
]
BAD_IMAGE: list[tuple[str, Any]] = [
    ("mean", 7.0),
    ("mean", "x"),
    ("contrast", None),
    ("rows", 0),
    ("rows", True),
    ("spacing_mm", [0.5]),
    ("spacing_mm", [0.5, -1]),
    ("percentiles", [0.0]),
    ("percentiles", [float("nan")] * 9),
    ("sha256", "../../etc/passwd"),
    ("PatientName", "x"),
]


def test_statistics_that_are_none_are_refused_naming_the_field(pictures: Path, tmp_path: Path) -> None:
    good = exported(pictures)
    assert statistics.check(json.loads(statistics.to_bytes(good)))
    for field, value in BAD:
        with pytest.raises(CalibrationInvalid, match="no valid") as caught:
            statistics.check({**good, field: value})
        assert field in str(caught.value)
    for field, value in BAD_IMAGE:
        first = {**good["images"][0], field: value}
        with pytest.raises(CalibrationInvalid, match="image 0"):
            statistics.check({**good, "images": [first, *good["images"][1:]]})
    for content in (b"", b"[" * 100_000, b"\xff", b"null", b"[1]"):
        (tmp_path / "s.json").write_bytes(content)
        with pytest.raises(CalibrationInvalid):
            statistics.read(tmp_path / "s.json")


def test_statistics_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MAX_BYTES", 10)
    (tmp_path / "s.json").write_bytes(b" " * 11)
    with pytest.raises(CalibrationInvalid, match="at most 10"):
        statistics.read(tmp_path / "s.json")


def test_an_evaluation_list_that_is_none_is_refused(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "e.csv").write_text("file\nx\n")
    result = call("calibrate", pictures, "--evaluation", tmp_path / "e.csv", "--out", tmp_path / "m.csv")
    assert result.exit_code == 7
    assert "not a calibration manifest" in result.stderr
    assert not (tmp_path / "m.csv").exists()


def test_a_leak_leaves_nothing_and_names_both(tmp_path: Path, pictures: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    (held / "other-name.png").write_bytes((pictures / "5.png").read_bytes())
    arguments = ("calibrate", pictures, "--images", 9, "--evaluation", held, "--out", tmp_path / "m.csv", "--json")
    result = call(*arguments)
    assert result.exit_code == 7
    error = json.loads(result.stdout)["error"]
    assert error["code"] == "compile.leak"
    assert "5.png is other-name.png (the same pixels)" in error["message"]
    assert not (tmp_path / "m.csv").exists()
    told = json.loads(call(*arguments, "--exclude-leaks").stdout)
    assert told["images"] == 8
    assert [leak["ours"] for leak in told["leaks_left_out"]] == ["5.png"]


def test_a_full_disk_leaves_no_half_manifest(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    result = call("calibrate", pictures, "--images", 9, "--out", out / "m.csv")
    assert result.exit_code == 7
    assert "[compile.disk-full]" in result.stderr
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"root": 1}', b"[" * 100_000, b"\xff"])
def test_what_is_no_proof_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(content)
    result = call("prove", tmp_path / "p.json", "--root", "0" * 64)
    assert result.exit_code == 7
    assert "no proof" in result.stderr


def test_a_forged_proof_does_not_hold(tmp_path: Path, pictures: Path) -> None:
    call("calibrate", pictures, "--images", 9, "--out", tmp_path / "m.csv")
    manifest = leaks.Evaluation.read(tmp_path / "m.csv").manifest
    assert manifest is not None
    item = manifest.items[2]
    assert call("prove", tmp_path / "m.csv", item, "--out", tmp_path / "p.json").exit_code == 0
    assert call("prove", tmp_path / "p.json", "--root", manifest.root).exit_code == 0
    assert call("prove", tmp_path / "p.json", "--root", "0" * 64).exit_code == 7
    proof = json.loads((tmp_path / "p.json").read_text())
    for field, value in (
        ("sha256", "0" * 64),
        ("index", (proof["index"] + 1) % 9),
        ("index", "0"),
        ("count", 10**9),
        ("path", proof["path"][:-1]),
        ("path", ["zz"] * 4),
        ("path", [1]),
        ("sha256", 5),
    ):
        (tmp_path / "f.json").write_text(json.dumps({**proof, field: value}))
        assert call("prove", tmp_path / "f.json", "--root", manifest.root).exit_code == 7
