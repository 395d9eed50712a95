"""study: what is read, how it is interpreted, and what each bad input is told."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import cv2
import gdcm
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from appliance import _raster, study
from appliance.errors import (
    ColourImage,
    EmptyPixels,
    InvalidStudy,
    NoPixels,
    NotAnImage,
    NotTwoDimensional,
    SpineboxError,
    StudyError,
    StudyTooLarge,
    TruncatedStudy,
    UndecodablePixels,
    UnsupportedSyntax,
    UsageError,
    WrongModality,
)

INSTALLED = Path(pydicom.__file__).parent / "data"
BUNDLED = sorted(p for p in INSTALLED.rglob("*") if p.is_file())
MR_CLASS = "1.2.840.10008.5.1.4.1.1.4"
SAGITTAL = [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]

PIXELS = (np.arange(20 * 16, dtype=np.uint16).reshape(20, 16) * 7) % 4096


def dataset(pixels: np.ndarray | None = PIXELS, **changes: Any) -> Dataset:
    """A small MR object; `changes` are DICOM keywords, None to leave one out."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = MR_CLASS, "1.2.3.4.5"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.InstanceNumber = "1.2.3", "1.2.3.4", 7
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Secret^Person", "SECRET-ID", "19560412"
    ds.Modality, ds.PixelSpacing, ds.ImageOrientationPatient = "MR", [0.5, 0.75], SAGITTAL
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    if pixels is not None:
        ds.Rows, ds.Columns = pixels.shape[:2]
        bits = pixels.dtype.itemsize * 8
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        raw = pixels.tobytes()
        ds.add_new("PixelData", "OW" if bits > 8 else "OB", raw + b"\0" * (len(raw) % 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some values are wrong on purpose
        for keyword, value in changes.items():
            if value is not None:
                setattr(ds, keyword, value)
            elif keyword in ds:
                delattr(ds, keyword)
    return ds


def encode(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", MR_CLASS)
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


def make(pixels: np.ndarray | None = PIXELS, syntax: str = ExplicitVRLittleEndian, **changes: Any) -> bytes:
    return encode(dataset(pixels, **changes), syntax)


def element(group: int, number: int, vr: str, value: bytes) -> bytes:
    """One explicit little-endian element with a short length, as it lies in a file."""
    return group.to_bytes(2, "little") + number.to_bytes(2, "little") + vr.encode() + len(value).to_bytes(2, "little") + value


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1, data.count(old)
    return data.replace(old, new)


def bundled(name: str, modality: str = "") -> bytes:
    """A file of pydicom's; with `modality`, one of another modality made to pass as MR."""
    data = (INSTALLED / "test_files" / name).read_bytes()
    if modality:
        data = patched(data, element(0x0008, 0x0060, "CS", modality.encode()), element(0x0008, 0x0060, "CS", b"MR"))
    return data


def refused(error: type[StudyError], data: bytes, value: str = "", **kwargs: Any) -> SpineboxError:
    """`read` refuses with exactly this class, a sentence, a value and a remedy."""
    with pytest.raises(error) as caught:
        study.read(data, **kwargs)
    assert type(caught.value) is error
    assert caught.value.what
    assert caught.value.remedy
    assert value in caught.value.value
    assert 400 <= caught.value.http_status < 500
    return caught.value


# --- What is read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4"])
def test_uncompressed_pixels_survive_every_encoding(syntax: str, dtype: str) -> None:
    kind = np.dtype(dtype)
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    pixels = np.linspace(max(low, -(2**24)), min(high, 2**24), 7 * 5).astype(kind).reshape(7, 5)
    ds = dataset(pixels)
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = pixels.astype(kind.newbyteorder(">")).tobytes()
        ds.PixelData += b"\0" * (len(ds.PixelData) % 2)
    instance = study.read(encode(ds, syntax))
    np.testing.assert_array_equal(instance.pixels, pixels.astype(np.float32))
    assert instance.pixels.dtype == np.float32
    assert instance.source["transfer_syntax_uid"] == syntax
    assert instance.notes == ()


def test_bytes_in_big_endian_words_are_swapped() -> None:
    pixels = np.arange(36, dtype=np.uint8).reshape(6, 6)
    ds = dataset(pixels)
    del ds.PixelData
    ds.add_new("PixelData", "OW", pixels.reshape(-1, 2)[:, ::-1].tobytes())
    np.testing.assert_array_equal(study.read(encode(ds, ExplicitVRBigEndian)).pixels, pixels)


@pytest.mark.parametrize(
    "name",
    ["", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded"],
)
def test_one_slice_is_the_same_in_every_syntax(name: str) -> None:
    instance = study.read(bundled(f"MR_small{name}.dcm"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(INSTALLED / "test_files" / "MR_small.dcm")
        expected = ds.pixel_array
    np.testing.assert_array_equal(instance.pixels, expected.astype(np.float32))
    assert instance.spacing_mm == (0.3125, 0.3125)
    assert instance.view == "axial"


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("693_J2KI.dcm", "CT"),
        ("J2K_pixelrep_mismatch.dcm", "CT"),
        ("JPEG2000.dcm", "NM"),
        ("CT_small.dcm", "CT"),
        ("image_dfl.dcm", ""),
        ("examples_overlay.dcm", ""),
    ],
)
def test_pixels_agree_with_pydicoms_own_reading(name: str, modality: str) -> None:
    if name == "image_dfl.dcm":  # the modality lies in the deflated part
        with pytest.raises(WrongModality):
            study.read(bundled(name))
        ds = pydicom.dcmread(INSTALLED / "test_files" / name)
        ds.Modality = "MR"
        out = io.BytesIO()
        ds.save_as(out)
        data = out.getvalue()
    else:
        data = bundled(name, modality)
    instance = study.read(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(io.BytesIO(data))
        expected = apply_modality_lut(ds.pixel_array, ds).astype(np.float32)
    padding = ds.get("PixelPaddingValue")
    keep = np.ones(expected.shape, dtype=bool) if padding is None else ds.pixel_array != padding
    np.testing.assert_allclose(instance.pixels[keep], expected[keep], rtol=1e-6)
    assert keep.any()


def test_twelve_bit_jpeg_extended() -> None:
    """pydicom refuses this one with GDCM alone; these two values are those that its suite expects of other decoders."""
    pixels = study.read(bundled("JPGExtended.dcm", "NM")).pixels
    assert pixels.shape == (1024, 256)
    assert (pixels[420, 140], pixels[230, 120]) == (244.0, 95.0)


@pytest.mark.parametrize(
    ("syntax", "uid", "exact"),
    [
        (gdcm.TransferSyntax.JPEGBaselineProcess1, "1.2.840.10008.1.2.4.50", False),
        (gdcm.TransferSyntax.JPEGLosslessProcess14, "1.2.840.10008.1.2.4.57", True),
        (gdcm.TransferSyntax.JPEGLosslessProcess14_1, "1.2.840.10008.1.2.4.70", True),
        (gdcm.TransferSyntax.JPEGLSLossless, "1.2.840.10008.1.2.4.80", True),
        (gdcm.TransferSyntax.JPEGLSNearLossless, "1.2.840.10008.1.2.4.81", False),
        (gdcm.TransferSyntax.JPEG2000Lossless, "1.2.840.10008.1.2.4.90", True),
        (gdcm.TransferSyntax.JPEG2000, "1.2.840.10008.1.2.4.91", False),
        (gdcm.TransferSyntax.RLELossless, "1.2.840.10008.1.2.5", True),
    ],
)
def test_compressed_by_another_library(tmp_path: Path, syntax: int, uid: str, exact: bool) -> None:
    y, x = np.mgrid[0:64, 0:48]
    smooth = 120 + 100 * np.sin(x / 9.0) * np.cos(y / 11.0)
    pixels = smooth.astype(np.uint8) if syntax == gdcm.TransferSyntax.JPEGBaselineProcess1 else (smooth * 10).astype(np.uint16)
    ds = dataset(pixels)
    if pixels.dtype == np.uint16:
        ds.BitsStored, ds.HighBit = 12, 11
    source, target = tmp_path / "in.dcm", tmp_path / "out.dcm"
    source.write_bytes(encode(ds))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(source))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    instance = study.read_path(target)
    assert instance.source["transfer_syntax_uid"] == uid
    if exact:
        np.testing.assert_array_equal(instance.pixels, pixels)
    else:
        assert np.abs(instance.pixels - pixels).mean() < 0.02 * pixels.max()


@pytest.mark.parametrize("path", BUNDLED, ids=lambda p: str(p.relative_to(INSTALLED)))
def test_every_bundled_file_is_an_instance_or_an_error_of_the_tree(path: Path) -> None:
    error: SpineboxError | None = None
    try:
        instance = study.read_path(path)
    except SpineboxError as exc:
        error = exc
    if error is None:
        assert instance.pixels.ndim == 2
        assert np.isfinite(instance.pixels).all()
        json.dumps(instance.source, allow_nan=False)
    else:
        assert error.what
        assert error.remedy
        assert 400 <= error.http_status < 500


def test_some_bundled_files_are_really_read() -> None:
    """The test above would pass if everything were refused."""
    read = 0
    for path in BUNDLED:
        try:
            study.read_path(path)
        except SpineboxError:
            continue
        read += 1
    assert read >= 29


def test_nothing_is_printed_and_no_warning_is_raised() -> None:
    script = (
        "import sys; from pathlib import Path; from appliance import study; from appliance.errors import SpineboxError\n"
        "for p in sorted(Path(sys.argv[1]).rglob('*')):\n"
        "    if p.is_file():\n"
        "        try: study.read_path(p)\n"
        "        except SpineboxError: pass\n"
        "print('done')"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(INSTALLED / "test_files")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# --- How it is interpreted ---------------------------------------------------------------------------------------------------


def test_source_identifies_the_object_and_not_the_person() -> None:
    data = make()
    instance = study.read(data)
    assert instance.source == {
        "rows": 20,
        "columns": 16,
        "spacing_mm": [0.5, 0.75],
        "spacing_kind": "patient",
        "modality": "MR",
        "view": "sagittal",
        "format": "DICOM",
        "transfer_syntax": "Explicit VR Little Endian",
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "sha256": instance.sha256,
        "sop_instance_uid": "1.2.3.4.5",
        "series_instance_uid": "1.2.3.4",
        "study_instance_uid": "1.2.3",
        "instance_number": 7,
    }
    assert len(instance.sha256) == 64
    everything = repr(instance) + json.dumps(instance.source)
    for secret in ("Secret", "SECRET", "19560412"):
        assert secret.encode() in data
        assert secret not in everything


def test_rescale_and_inversion_and_window() -> None:
    pixels = np.array([[0, 1], [2, 10]], dtype=np.uint16)
    plain = study.read(make(pixels, RescaleSlope="2", RescaleIntercept="-5", WindowCenter=["3", "4"], WindowWidth=["7", "8"]))
    np.testing.assert_array_equal(plain.pixels, [[-5, -3], [-1, 15]])
    assert plain.window == (3.0, 7.0)
    inverted = study.read(
        make(pixels, RescaleSlope="2", RescaleIntercept="-5", WindowCenter="3", WindowWidth="7", PhotometricInterpretation="MONOCHROME1")
    )
    np.testing.assert_array_equal(inverted.pixels, [[15, 13], [11, -5]])
    assert inverted.window == (7.0, 7.0)
    assert study.read(make(pixels)).window is None
    assert study.read(make(pixels, WindowCenter="3", WindowWidth="0")).window is None


def test_pixels_cannot_be_changed_and_feed_the_preprocessing() -> None:
    from kernels.preprocess import letterbox, normalise

    instance = study.read(make())
    with pytest.raises(ValueError, match="read-only"):
        instance.pixels[0, 0] = 1
    letterbox(normalise(instance.pixels), (32, 32))


def test_padding_takes_the_darkest_value_also_when_inverted() -> None:
    pixels = np.array([[-2000, 5], [7, 9]], dtype=np.int16)
    assert study.read(make(pixels, PixelPaddingValue=-2000)).pixels.tolist() == [[5, 5], [7, 9]]
    inverted = study.read(make(pixels, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1"))
    assert inverted.pixels.tolist() == [[5, 9], [7, 5]]
    ranged = study.read(make(pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=5))
    assert ranged.pixels.tolist() == [[7, 7], [7, 9]]


def test_unused_high_bits_and_a_shifted_high_bit() -> None:
    stored = np.array([[1, 4095], [2048, 0]], dtype=np.uint16)
    assert study.read(make(stored | 0xF000, BitsStored=12, HighBit=11)).pixels.tolist() == stored.tolist()
    assert study.read(make(stored << 4, BitsStored=12, HighBit=15)).pixels.tolist() == stored.tolist()
    signed = np.array([[0x0FFF, 0x0001]], dtype=np.int16)
    assert study.read(make(signed, BitsStored=12, HighBit=11)).pixels.tolist() == [[-1, 1]]
    odd = study.read(make(stored, BitsStored=12, HighBit=40))
    assert odd.pixels.tolist() == stored.tolist()
    assert any("HighBit" in note for note in odd.notes)


def test_modality_lut() -> None:
    pixels = np.array([[0, 1], [2, 200]], dtype=np.uint16)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [3, 1, 16])
    item.ModalityLUTType = "US"
    item.add_new("LUTData", "OW", np.array([100, 50, 60000], dtype=np.uint16).tobytes())
    ds = dataset(pixels, ModalityLUTSequence=DicomSequence([item]), Modality="CR")
    assert study.read(encode(ds)).pixels.tolist() == [[100, 100], [50, 60000]]
    item.LUTDescriptor = [4, 1, 16]
    refused(InvalidStudy, encode(ds), "6 bytes for 4 entries")


def test_float_pixels() -> None:
    pixels = np.array([[0.5, -1.25], [3.0, 7.5]], dtype=np.float32)
    ds = dataset(PIXELS[:2, :2], BitsAllocated=32)
    del ds.PixelData
    ds.add_new("FloatPixelData", "OF", pixels.tobytes())
    np.testing.assert_array_equal(study.read(encode(ds)).pixels, pixels)
    pixels[0, 0] = np.nan
    ds.FloatPixelData = pixels.tobytes()
    refused(InvalidStudy, encode(ds))


@pytest.mark.parametrize(
    ("orientation", "view"),
    [
        (SAGITTAL, "sagittal"),
        ([1, 0, 0, 0, 0, -1], "coronal"),
        ([1, 0, 0, 0, 1, 0], "axial"),
        ([0.2, 0.98, 0, 0, 0, -1], "sagittal"),
        ([0.707, 0.707, 0, 0, 0, -1], None),
        ([0, 0, 0, 0, 0, 0], None),
        ([1, 0, 0, 1, 0, 0], None),
        ([1, 0, 0], None),
    ],
)
def test_view_from_the_orientation(orientation: list[float], view: str | None) -> None:
    assert study.read(make(ImageOrientationPatient=orientation)).view == view
    assert study.read(make(ImageOrientationPatient=None)).view is None


def test_radiographs_have_detector_spacing_and_a_view_position() -> None:
    changes: dict[str, Any] = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1", "ImageOrientationPatient": None, "ViewPosition": "LL"}
    both = study.read(make(Modality="DX", ImagerPixelSpacing=[0.14, 0.15], **changes))
    assert (both.spacing_mm, both.spacing_kind, both.view, both.modality) == ((0.14, 0.15), "detector", "LL", "DX")
    calibrated = study.read(make(Modality="CR", **changes))
    assert (calibrated.spacing_mm, calibrated.spacing_kind) == ((0.5, 0.75), "calibrated")
    film = study.read(make(Modality="CR", PixelSpacing=None, NominalScannedPixelSpacing=[0.2, 0.2], **changes))
    assert (film.spacing_mm, film.spacing_kind) == ((0.2, 0.2), "film")
    assert study.read(make(ImagerPixelSpacing=[0.14, 0.15], PixelSpacing=None)).spacing_mm is None


@pytest.mark.parametrize("text", ["0\\0", "-1\\1", "nan\\nan", "inf\\1", "101\\1", "1", "1\\1\\1", "abc\\1", "1e400\\1"])
def test_senseless_spacing_is_unknown_with_a_note(text: str) -> None:
    value = text.encode() + b" " * (len(text) % 2)
    data = patched(make(), element(0x0028, 0x0030, "DS", b"0.5\\0.75"), element(0x0028, 0x0030, "DS", value))
    instance = study.read(data)
    assert (instance.spacing_mm, instance.spacing_kind, instance.source["spacing_mm"]) == (None, None, None)
    assert any("spacing" in note for note in instance.notes)


@pytest.mark.parametrize(
    ("changes", "weighting"),
    [
        ({"SeriesDescription": "t2_tse_sag"}, "T2"),
        ({"SeriesDescription": "SAG T1W"}, "T1"),
        ({"SeriesDescription": "t2space"}, "T2"),
        ({"SeriesDescription": "T1 and T2"}, None),
        ({"SeriesDescription": "T2 STIR sag"}, None),
        ({"SeriesDescription": "T2* GRE"}, None),
        ({"SeriesDescription": "SAG C7-T1"}, None),
        ({"SeriesDescription": "thoracic T12"}, None),
        ({"SeriesDescription": "localiser"}, None),
        ({"ScanningSequence": "SE", "RepetitionTime": "3000", "EchoTime": "105"}, "T2"),
        ({"ScanningSequence": "SE", "RepetitionTime": "500", "EchoTime": "10"}, "T1"),
        ({"ScanningSequence": "SE", "RepetitionTime": "3000", "EchoTime": "15"}, None),
        ({"ScanningSequence": "GR", "RepetitionTime": "500", "EchoTime": "10"}, None),
        ({"RepetitionTime": "3000", "EchoTime": "105"}, None),
        ({"ScanningSequence": ["SE", "IR"], "RepetitionTime": "3000", "EchoTime": "105"}, None),
        ({"SeriesDescription": "T1", "ScanningSequence": "SE", "RepetitionTime": "3000", "EchoTime": "105"}, None),
        ({"SeriesDescription": "T2", "Modality": "CR"}, None),
    ],
)
def test_weighting_is_told_only_where_the_header_is_clear(changes: dict[str, Any], weighting: str | None) -> None:
    assert study.read(make(**changes)).weighting == weighting


def test_enhanced_object_of_one_frame_takes_spacing_from_its_functional_groups() -> None:
    measures, orientation, transform, group = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, orientation.ImageOrientationPatient = [0.6, 0.6], SAGITTAL
    transform.RescaleSlope, transform.RescaleIntercept = 3, 1
    group.PixelMeasuresSequence = DicomSequence([measures])
    group.PlaneOrientationSequence = DicomSequence([orientation])
    group.PixelValueTransformationSequence = DicomSequence([transform])
    ds = dataset(PixelSpacing=None, ImageOrientationPatient=None, NumberOfFrames=1, SOPClassUID=MR_CLASS + ".1")
    ds.SharedFunctionalGroupsSequence = DicomSequence([group])
    for undefined in (False, True):
        for sequence in (ds["SharedFunctionalGroupsSequence"], *(group[k] for k in ("PixelMeasuresSequence", "PlaneOrientationSequence"))):
            sequence.is_undefined_length = undefined
            sequence.value[0].is_undefined_length_sequence_item = undefined
        for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
            instance = study.read(encode(ds, syntax))
            assert (instance.spacing_mm, instance.view) == ((0.6, 0.6), "sagittal")
            np.testing.assert_array_equal(instance.pixels, PIXELS * 3.0 + 1)


# --- Tolerated faults --------------------------------------------------------------------------------------------------------


def test_files_without_preamble_and_without_meta() -> None:
    data = make()
    meta_start = data.index(b"DICM") + 4
    without_preamble = study.read(data[meta_start:])
    np.testing.assert_array_equal(without_preamble.pixels, PIXELS)
    assert any("preamble" in note for note in without_preamble.notes)
    start = data.index(b"\x08\x00\x16\x00UI")
    bare = study.read(data[start:])
    np.testing.assert_array_equal(bare.pixels, PIXELS)
    assert bare.source["transfer_syntax_uid"] is None
    implicit = make(syntax=ImplicitVRLittleEndian)
    np.testing.assert_array_equal(study.read(implicit[implicit.index(b"\x08\x00\x16\x00\x1a\x00") :]).pixels, PIXELS)
    big = make(PIXELS.astype(">u2"), syntax=ExplicitVRBigEndian)
    np.testing.assert_array_equal(study.read(big[big.index(b"\x00\x08\x00\x16UI") :]).pixels, PIXELS)


def test_a_wrong_group_length_and_a_wrong_syntax_are_tolerated() -> None:
    data = bytearray(make())
    at = data.index(b"\x02\x00\x00\x00UL\x04\x00") + 8
    data[at : at + 4] = b"\xff\xff\x00\x00"
    np.testing.assert_array_equal(study.read(bytes(data)).pixels, PIXELS)
    lied = patched(make(), b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2\x00\x00\x00")
    instance = study.read(lied)
    np.testing.assert_array_equal(instance.pixels, PIXELS)
    assert any("transfer syntax" in note for note in instance.notes)


def test_hostile_identifiers_are_dropped() -> None:
    data = patched(make(), element(0x0020, 0x000E, "UI", b"1.2.3.4\x00"), element(0x0020, 0x000E, "UI", b"../../x\x00"))
    instance = study.read(data)
    assert instance.source["series_instance_uid"] is None
    assert instance.source["study_instance_uid"] == "1.2.3"
    assert any("SeriesInstanceUID" in note for note in instance.notes)
    long = study.read(make(StudyInstanceUID="1." + "2" * 80))
    assert long.source["study_instance_uid"] is None


def test_modality_from_the_object_class_alone() -> None:
    instance = study.read(make(Modality=None))
    assert instance.modality == "MR"
    assert instance.notes


def test_a_secondary_capture_of_an_mr_is_read() -> None:
    assert study.read(make(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")).modality == "MR"


# --- What is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello", b"\0" * 500, b"%PDF-1.7 " * 50, b"\x08\x00", bytes(range(256)), b"\x08\x00\x05\x00" * 100])
def test_other_files_are_not_images(data: bytes) -> None:
    refused(NotAnImage, data)


def test_bare_preamble_and_bare_meta() -> None:
    refused(TruncatedStudy, b"\0" * 128 + b"DICM")
    data = make()
    refused(TruncatedStudy, data[: data.index(b"\x08\x00\x16\x00UI")])
    refused(TruncatedStudy, data[:150])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_truncated_at_every_place(syntax: str) -> None:
    data = make(syntax=syntax)
    for end in range(133, len(data) - 1, 3):
        with pytest.raises((TruncatedStudy, NoPixels, NotAnImage, WrongModality, InvalidStudy)):
            study.read(data[:end])
    error = refused(TruncatedStudy, data[:-2]) if syntax != DeflatedExplicitVRLittleEndian else None
    if error:
        assert "638 of 640" in error.value


def test_pixel_data_shorter_than_the_header_says() -> None:
    refused(TruncatedStudy, make(Rows=21), "640 of 672 bytes")


def test_truncated_compressed_pixels() -> None:
    data = bundled("MR_small_jpeg_ls_lossless.dcm")
    refused(TruncatedStudy, data[: len(data) // 2 + 1500])


def test_no_pixels() -> None:
    refused(NoPixels, make(None))
    refused(NoPixels, make(PixelData=b""))
    refused(NoPixels, bundled("dicomdirtests/DICOMDIR"))


def test_empty_pixels() -> None:
    refused(EmptyPixels, make(Rows=0), "0 x 16")
    refused(EmptyPixels, make(Columns=0), "20 x 0")
    refused(InvalidStudy, make(Rows=None))


def test_too_large() -> None:
    refused(StudyTooLarge, make(Rows=65535, Columns=65535), "65535 x 65535")
    refused(StudyTooLarge, make(Rows=4097))
    refused(StudyTooLarge, make(), limits=study.Limits(max_pixels=100))
    refused(StudyTooLarge, make(), limits=study.Limits(max_decoded_bytes=100))
    refused(StudyTooLarge, make(), limits=study.Limits(max_bytes=100))


@pytest.mark.parametrize(
    "uid",
    ["1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.201", "1.2.840.113619.5.2", "9"],
)
def test_unsupported_syntax(uid: str) -> None:
    data = make()
    old = b"1.2.840.10008.1.2.1\x00"
    at = data.index(old)
    value = uid.encode() + b"\0" * (len(uid) % 2)
    changed = data[: at - 2] + len(value).to_bytes(2, "little") + value + data[at + len(old) :]
    refused(UnsupportedSyntax, changed, uid)


def test_compressed_and_uncompressed_must_agree_with_the_syntax() -> None:
    data = bundled("MR_small_RLE.dcm")
    refused(InvalidStudy, patched(data, b"1.2.840.10008.1.2.5\x00", b"1.2.840.10008.1.2.1\x00"))
    refused(InvalidStudy, patched(make(), b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2.5\x00"))


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422", "PALETTE COLOR", "YBR_RCT"])
def test_colour(photometric: str) -> None:
    refused(ColourImage, make(PhotometricInterpretation=photometric), photometric)
    refused(ColourImage, make(SamplesPerPixel=3))


@pytest.mark.parametrize("photometric", ["MONOCHROME3", "", "GREY", None])
def test_bad_photometric(photometric: str | None) -> None:
    refused(InvalidStudy, make(PhotometricInterpretation=photometric))


def test_three_dimensions() -> None:
    refused(NotTwoDimensional, make(NumberOfFrames=2), "2 frames")
    assert study.read(make(NumberOfFrames=1)).pixels.shape == (20, 16)
    data = patched(make(NumberOfFrames=1), element(0x0028, 0x0008, "IS", b"1 "), element(0x0028, 0x0008, "IS", b"1A"))
    refused(InvalidStudy, data, "1A")


@pytest.mark.parametrize("modality", ["CT", "US", "SR", "MG", "OT", "SEG", "XA", "mrx"])
def test_wrong_modality(modality: str) -> None:
    refused(WrongModality, make(Modality=modality), modality.upper())
    refused(WrongModality, make(Modality=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.2"))


@pytest.mark.parametrize("text", ["0", "0.0", "nan", "inf", "-inf", "1e999", "abc"])
def test_senseless_rescale(text: str) -> None:
    value = text.encode() + b" " * (len(text) % 2)
    base = make(RescaleSlope="4", RescaleIntercept="9")
    slope = patched(base, element(0x0028, 0x1053, "DS", b"4 "), element(0x0028, 0x1053, "DS", value))
    refused(InvalidStudy, slope)
    intercept = patched(base, element(0x0028, 0x1052, "DS", b"9 "), element(0x0028, 0x1052, "DS", value))
    if text in ("0", "0.0"):
        study.read(intercept)
    else:
        refused(InvalidStudy, intercept)


def test_rescale_that_overflows() -> None:
    refused(InvalidStudy, make(RescaleSlope="1e300", RescaleIntercept="0"))


@pytest.mark.parametrize("changes", [{"BitsAllocated": 12}, {"BitsAllocated": 1}, {"BitsAllocated": 64}, {"BitsAllocated": 0}])
def test_wrong_bits_allocated(changes: dict[str, Any]) -> None:
    refused(InvalidStudy, make(**changes))


@pytest.mark.parametrize(
    "changes",
    [{"BitsStored": 17}, {"BitsStored": 0}, {"PixelRepresentation": 2}, {"PixelRepresentation": None}, {"SamplesPerPixel": 2}],
)
def test_other_senseless_pixel_descriptions(changes: dict[str, Any]) -> None:
    refused(InvalidStudy, make(**changes))


def test_wrong_value_lengths_and_double_elements() -> None:
    rows = element(0x0028, 0x0010, "US", b"\x14\x00")
    refused(InvalidStudy, patched(make(), rows, element(0x0028, 0x0010, "US", b"\x14\x00\x00\x00")), "14000000")
    refused(InvalidStudy, patched(make(), rows, element(0x0028, 0x0010, "US", b"\x14")))
    refused(InvalidStudy, patched(make(), rows, rows + element(0x0028, 0x0010, "US", b"\x15\x00")), "(0028,0010)")
    assert study.read(patched(make(), rows, rows + rows)).pixels.shape == (20, 16)


def test_broken_codestream() -> None:
    data = bytearray(bundled("MR_small_jpeg_ls_lossless.dcm"))
    at = data.index(b"\xff\xd8\xff")
    data[at : at + 60] = b"\x00" * 60
    refused(UndecodablePixels, bytes(data))
    assert study.read(bundled("MR_small_jpeg_ls_lossless.dcm")).pixels.shape == (64, 64)
    # A delimiter's bytes inside a codestream: the fragment's length is followed, and the codec finds the nonsense.
    refused(UndecodablePixels, bundled("JPEG2000-embedded-sequence-delimiter.dcm", "NM"))


def test_a_codestream_of_another_size_than_the_header() -> None:
    data = bundled("MR_small_jp2klossless.dcm")
    rows = element(0x0028, 0x0010, "US", b"\x40\x00")
    refused(UndecodablePixels, patched(data, rows, element(0x0028, 0x0010, "US", b"\x20\x00")))


# --- PNG and JPEG ------------------------------------------------------------------------------------------------------------


def picture(array: np.ndarray, extension: str = ".png", *options: int) -> bytes:
    done, data = cv2.imencode(extension, array, list(options))
    assert done
    return data.tobytes()


GREY8 = ((np.mgrid[0:40, 0:30][0] * 5 + np.mgrid[0:40, 0:30][1]) % 250).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_png(dtype: type) -> None:
    array = GREY8.astype(dtype) * (1 if dtype is np.uint8 else 257)
    instance = study.read(picture(array))
    np.testing.assert_array_equal(instance.pixels, array)
    assert (instance.format, instance.modality, instance.spacing_mm, instance.view) == ("PNG", None, None, None)
    assert instance.source["sop_instance_uid"] is None
    json.dumps(instance.source, allow_nan=False)
    three = study.read(picture(np.dstack([array] * 3)))
    np.testing.assert_array_equal(three.pixels, array)
    opaque = np.full_like(array, np.iinfo(dtype).max)
    np.testing.assert_array_equal(study.read(picture(np.dstack([array] * 3 + [opaque]))).pixels, array)
    opaque[0, 0] = 1
    refused(InvalidStudy, picture(np.dstack([array] * 3 + [opaque])))


def test_jpeg() -> None:
    for options in ((), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)):
        grey = study.read(picture(GREY8, ".jpg", *options))
        assert grey.format == "JPEG"
        assert np.abs(grey.pixels - GREY8).mean() < 12
        assert study.read(picture(np.dstack([GREY8] * 3), ".jpg", *options)).pixels.shape == GREY8.shape


def test_colour_pictures() -> None:
    colour = np.dstack([GREY8, GREY8[::-1], 255 - GREY8])
    refused(ColourImage, picture(colour), "%")
    refused(ColourImage, picture(colour, ".jpg"))
    tinted = np.dstack([GREY8, GREY8, np.clip(GREY8.astype(int) + 9, 0, 255).astype(np.uint8)])
    np.testing.assert_allclose(study.read(picture(tinted)).pixels, tinted.astype(np.float32).mean(axis=2), rtol=1e-6)


@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_truncated_pictures(extension: str) -> None:
    data = picture(GREY8, extension)
    for end in range(10, len(data) - 2, 7):
        with pytest.raises(StudyError):
            study.read(data[:end])
    refused(TruncatedStudy, data[:-5])


def test_picture_sizes_are_checked_before_decoding() -> None:
    png = bytearray(picture(GREY8))
    png[16:24] = (60000).to_bytes(4, "big") * 2
    refused(StudyTooLarge, bytes(png), "60000 x 60000")
    png[16:24] = bytes(8)
    refused(EmptyPixels, bytes(png))
    jpeg = bytearray(picture(GREY8, ".jpg"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xff"
    refused(StudyTooLarge, bytes(jpeg), "65535 x 65535")
    refused(StudyTooLarge, picture(GREY8), limits=study.Limits(max_rows=39))


def test_damaged_png() -> None:
    data = bytearray(picture(GREY8))
    at = data.index(b"IDAT") + 8
    data[at : at + 40] = bytes(40)
    refused(UndecodablePixels, bytes(data))


# --- Paths -------------------------------------------------------------------------------------------------------------------


def test_read_path(tmp_path: Path) -> None:
    file = tmp_path / "a.dcm"
    file.write_bytes(make())
    assert study.read_path(file).pixels.shape == (20, 16)
    with pytest.raises(StudyTooLarge) as caught:
        study.read_path(file, study.Limits(max_bytes=10))
    assert str(file) in caught.value.value
    with pytest.raises(UsageError):
        study.read_path(tmp_path / "missing")
    with pytest.raises(NotAnImage):
        study.read_path(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(NotAnImage):
        study.read_path(pipe)


def test_find_inputs_orders_a_series_and_leaves_out_the_rest(tmp_path: Path) -> None:
    below = tmp_path / "x" / "y"
    below.mkdir(parents=True)
    for name, changes in {
        "c": {"InstanceNumber": 10, "SeriesInstanceUID": "1.9"},
        "b": {"InstanceNumber": 9, "SeriesInstanceUID": "1.9"},
        "z": {"InstanceNumber": 1, "SeriesInstanceUID": "1.8"},
        "n": {"InstanceNumber": None, "SeriesInstanceUID": "1.9", "ImagePositionPatient": [5.0, 0, 0]},
        "m": {"InstanceNumber": None, "SeriesInstanceUID": "1.9", "ImagePositionPatient": [9.0, 0, 0]},
    }.items():
        (below / name).write_bytes(make(**changes))
    (tmp_path / "deflated").write_bytes(make(syntax=DeflatedExplicitVRLittleEndian, SeriesInstanceUID="1.7"))
    bare = make(SeriesInstanceUID="1.95")
    (tmp_path / "bare").write_bytes(bare[bare.index(b"\x08\x00\x16\x00UI") :])
    (tmp_path / "a.png").write_bytes(picture(GREY8))
    (tmp_path / "wrong-name.txt").write_bytes(picture(GREY8, ".jpg"))
    (tmp_path / "notes.txt").write_text("nothing to see")
    (tmp_path / "DICOMDIR").write_bytes(bundled("dicomdirtests/DICOMDIR"))
    (tmp_path / "renamed-dir").write_bytes(bundled("dicomdirtests/DICOMDIR"))
    os.mkfifo(tmp_path / "pipe")
    (below / "loop").symlink_to(tmp_path)
    (below / "self").symlink_to(below / "self")
    # The row direction is backwards and the column direction down: the normal points to smaller x.
    expected = ["deflated", "x/y/z", "x/y/b", "x/y/c", "x/y/m", "x/y/n", "bare", "a.png", "wrong-name.txt"]
    assert [str(p.relative_to(tmp_path)) for p in study.find_inputs([tmp_path])] == expected


def test_find_inputs_takes_named_files_as_they_are(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("nothing to see")
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "1").write_bytes(make())
    assert study.find_inputs([text, folder, text]) == [text, folder / "1", text]
    assert study.find_inputs([]) == []
    with pytest.raises(UsageError):
        study.find_inputs([tmp_path / "missing"])


def test_find_inputs_is_bounded(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / str(number)).write_bytes(make())
    assert len(study.find_inputs([tmp_path], limit=4)) == 4
    with pytest.raises(UsageError, match="more than 3 images"):
        study.find_inputs([tmp_path], limit=3)
    for number in range(40):
        (tmp_path / f"t{number}").write_text("text")
    with pytest.raises(UsageError, match="more than 40 files"):
        study.find_inputs([tmp_path], limit=4)


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_rows"):
        study.Limits(max_rows=0)


# --- Fuzzing -----------------------------------------------------------------------------------------------------------------

_BASE = {
    "explicit": make(PIXELS[:6, :5], SeriesDescription="t2", RescaleSlope="2", RescaleIntercept="1", PixelPaddingValue=3),
    "implicit": make(PIXELS[:6, :5], ImplicitVRLittleEndian),
    "big": make(PIXELS[:6, :5], ExplicitVRBigEndian),
    "deflated": make(PIXELS[:6, :5], DeflatedExplicitVRLittleEndian),
    "sequences": (INSTALLED / "test_files" / "MR_small_implicit.dcm").read_bytes(),
}
_FUZZ = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _damaged(data: bytes, flips: list[tuple[float, int]], cut: float | None, insert: tuple[float, bytes] | None) -> bytes:
    out = bytearray(data)
    for where, bit in flips:
        out[int(where * (len(out) - 1))] ^= 1 << bit
    if insert is not None:
        at = int(insert[0] * len(out))
        out[at : at + len(insert[1])] = insert[1]
    return bytes(out if cut is None else out[: int(cut * len(out))])


_unit = st.floats(0, 1, allow_nan=False)
_INSERTS = [b"\xff" * 4, b"\xff" * 8, b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0", b"SQ", b"UN", b"\0" * 4]
_damage = {
    "flips": st.lists(st.tuples(_unit, st.integers(0, 7)), max_size=6),
    "cut": st.none() | _unit,
    "insert": st.none() | st.tuples(_unit, st.sampled_from(_INSERTS)),
}


def _readable_or_refused(data: bytes) -> None:
    try:
        instance = study.read(data)
    except SpineboxError as error:
        json.dumps(error.to_json())
    else:
        assert np.isfinite(instance.pixels).all()
        json.dumps(instance.source, allow_nan=False)


@settings(_FUZZ, max_examples=1500)
@given(st.sampled_from(sorted(_BASE)), st.fixed_dictionaries(_damage))
def test_damaged_dicom_is_read_or_refused(name: str, damage: dict[str, Any]) -> None:
    _readable_or_refused(_damaged(_BASE[name], **damage))


@settings(_FUZZ, max_examples=300)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\0" * 128 + b"DICM", b"\x08\x00\x05\x00CS", _raster.PNG_MAGIC, _raster.JPEG_MAGIC]))
def test_random_bytes_are_refused(tail: bytes, head: bytes) -> None:
    with pytest.raises(StudyError):
        study.read(head + tail)


_COMPRESSED = {
    "rle": bundled("MR_small_RLE.dcm"),
    "jp2k": bundled("MR_small_jp2klossless.dcm"),
    "jls": bundled("MR_small_jpeg_ls_lossless.dcm"),
    "png": picture(GREY8),
    "jpg": picture(GREY8, ".jpg"),
}


@settings(_FUZZ, max_examples=25)
@given(st.sampled_from(sorted(_COMPRESSED)), st.lists(st.tuples(st.floats(0.3, 1), st.integers(0, 7)), min_size=1, max_size=3))
def test_damaged_codestreams_are_read_or_refused(name: str, flips: list[tuple[float, int]]) -> None:
    _readable_or_refused(_damaged(_COMPRESSED[name], flips, None, None))


def test_the_error_text_never_holds_the_patient() -> None:
    data = make(Rows=21)
    error = refused(TruncatedStudy, data)
    assert not re.search("secret", str(error), re.IGNORECASE)


# -- a glance -----------------------------------------------------------------------------------------------------------


def test_a_glance_says_what_the_head_states() -> None:
    assert study.glance(make()) == study.Glance("MR", PIXELS.size)
    picture = np.zeros((30, 50), np.uint8)
    for suffix in (".png", ".jpg"):
        assert study.glance(cv2.imencode(suffix, picture)[1].tobytes()) == study.Glance(None, 1500)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 999],
)
def test_a_glance_at_what_is_no_study_says_nothing(data: bytes) -> None:
    assert study.glance(data) == study.Glance(None, 0)


@settings(max_examples=200)
@given(st.binary(max_size=400), st.integers(0, 600))
def test_a_glance_never_raises(noise: bytes, at: int) -> None:
    whole = make()
    assert study.glance(whole[:at] + noise + whole[at + len(noise) :]).pixels >= 0
    assert study.glance(noise).pixels >= 0
