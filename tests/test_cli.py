"""`spinebox` as a person types it: files in, reports out, errors with code and exit code."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from appliance.cli import main
from appliance.errors import all_errors
from models import phantom

SCHEMA = Path(__file__).parent.parent / "docs/report.schema.json"


@pytest.fixture
def slice_path(tmp_path: Path) -> Path:
    image, truth = phantom.demo()
    path = tmp_path / "in" / "slice.dcm"
    path.parent.mkdir()
    phantom.write_dicom(image, truth, path)
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def test_run_writes_report_overlay_and_labels(slice_path: Path, tmp_path: Path) -> None:
    import jsonschema

    out = tmp_path / "out"
    result = call("run", slice_path, "--out", out)
    assert result.exit_code == 0, result.output
    folder = out / "slice"
    report = json.loads((folder / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA.read_text()))
    assert report["status"] == "complete"
    assert report["protocol"] == "lumbar-mri-sagittal"
    discs = [f for f in report["findings"] if f["label"] == "disc"]
    assert len(discs) >= 5
    assert discs[0]["level"] == "L5/S1"
    assert all(f["pfirrmann"]["grade"] in range(1, 6) for f in discs)
    assert all(abs(sum(f["pfirrmann"]["probabilities"]) - 1) < 1e-3 for f in discs)
    labels = cv2.imread(str(folder / "labels.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (report["source"]["rows"], report["source"]["columns"])
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert cv2.imread(str(folder / "overlay.png")).shape[2] == 3


def test_a_folder_with_good_and_bad_files_answers_the_good_and_reports_the_bad(slice_path: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 200), dtype=np.uint8)
    cv2.imwrite(str(slice_path.parent / "noise.png"), noise)
    result = call("run", slice_path.parent, "--out", tmp_path / "out", "--json")
    summary = json.loads(result.stdout)
    assert (summary["answered"], summary["refused"]) == (1, 1)
    refused = json.loads((tmp_path / "out/noise/report.json").read_text())
    assert refused["status"] == "refused"
    assert refused["findings"] == []
    assert refused["error"]["code"] == "study.wrong-modality"  # a picture that says nothing of itself is shown to every protocol
    assert refused["error"]["value"]
    assert refused["error"]["remedy"]
    assert result.exit_code == 3
    assert not (tmp_path / "out/noise/overlay.png").exists()


def test_resume_skips_what_is_done(slice_path: Path, tmp_path: Path) -> None:
    call("run", slice_path, "--out", tmp_path / "out")
    stamp = (tmp_path / "out/slice/report.json").stat().st_mtime_ns
    summary = json.loads(call("run", slice_path, "--out", tmp_path / "out", "--resume", "--json").stdout)
    assert (summary["answered"], summary["skipped"]) == (0, 1)
    assert (tmp_path / "out/slice/report.json").stat().st_mtime_ns == stamp


def test_inputs_of_one_name_do_not_overwrite_each_other(slice_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "slice.dcm"
    other.parent.mkdir()
    other.write_bytes(slice_path.read_bytes())
    call("run", slice_path, other, "--out", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["slice", "slice-2"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "missing.dcm", "--out", "x"], "usage.invalid"),
        (["run", ".", "--out", "x", "--bundle", "nowhere"], "bundle.missing"),
        (["run", ".", "--out", "x", "--backend", "abacus"], "backend.unavailable"),
        (["run", ".", "--out", "x", "--budget-ms", "-1"], "usage.invalid"),
    ],
)
def test_errors_have_a_code_and_its_exit_code(arguments: list[str], code: str, slice_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(slice_path.parent)
    result = call(*arguments)
    kind = next(k for k in all_errors() if k.code == code)
    assert result.exit_code == kind.exit_code
    assert f"[{code}]" in result.stderr
    assert "Traceback" not in result.output


def test_doctor_tells_backends_bundle_and_readiness() -> None:
    result = call("doctor", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["ready"]
    assert found["bundle"]["ok"]
    assert set(found["backends"]) >= {"null", "onnxruntime", "openvino"}
    assert all(state["reason"] for state in found["backends"].values())
    assert found["cpu"]["model"]
    assert found["cores"] >= 1
    assert "ready" in call("doctor").output


def test_doctor_names_a_corrupt_bundle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    result = call("doctor", "--bundle", tmp_path, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["bundle"]["error"]["code"] == "bundle.corrupt"


def test_help_of_every_command_teaches() -> None:
    for name, command in main.commands.items():
        if name == "phantom":
            continue
        text = call(name, "--help").output
        assert len(command.help or "") > 60, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name not in ("help",):
                assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"
        assert "--help" in text


def test_phantom_command_draws(tmp_path: Path) -> None:
    assert call("phantom", "--seed", "3", "--count", "1", "--out", tmp_path).exit_code == 0
    assert list(tmp_path.glob("*.dcm"))


def test_every_command_and_option_is_documented() -> None:
    text = (Path(__file__).parent.parent / "docs/cli.md").read_text()
    for name, command in main.commands.items():
        _, found, section = text.partition(f"## `spinebox {name}")
        assert found, f"docs/cli.md has no section for {name}"
        section = section.partition("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}`" in section, f"docs/cli.md: {name} lacks {option}"


@pytest.mark.parametrize("arguments", [("compile", "--out", "nowhere"), ("card", __file__)])
def test_a_device_without_the_compiling_packages_says_so(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """What compiles is not installed on a device: one line with what to install, never a traceback."""
    import subprocess
    import sys

    code = "import sys; sys.modules['onnx'] = None; from appliance.cli import main; main()"
    found = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 6, found.stderr
    assert "this command needs the package onnx" in found.stderr
    assert "Traceback" not in found.stderr


def test_compile_names_the_protocols_and_wants_radiographs_for_radiographs(tmp_path: Path) -> None:
    from appliance.cli.compile import compile_
    from appliance.compiler import families
    from appliance.protocols import lumbar_mri, spine_xray_ap

    option = next(p for p in compile_.params if p.name == "protocols")
    assert set(option.type.choices) == set(families.PROTOCOLS) == {lumbar_mri.NAME, spine_xray_ap.NAME}
    assert all(families.PROTOCOLS[m.NAME] == m.FAMILIES for m in (lumbar_mri, spine_xray_ap))
    for data in ([], ["--data", str(tmp_path)]):
        result = CliRunner().invoke(main, ["compile", "--protocol", "spine-xray-ap", "--out", str(tmp_path / "b"), *data])
        assert result.exit_code == 2
        assert "does not hold them" in result.output
