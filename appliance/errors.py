"""Every error that a person or a machine can meet, each with a code, the value at fault and a remedy.

    SpineboxError
    ├── StudyError            the bytes that came in cannot be read as one 2D grey image (HTTP 4xx, exit code 3)
    │   ├── NotAnImage            study.not-an-image         415
    │   ├── TruncatedStudy        study.truncated            400
    │   ├── InvalidStudy          study.invalid              400
    │   ├── NoPixels              study.no-pixels            422
    │   ├── EmptyPixels           study.empty-pixels         422
    │   ├── StudyTooLarge         study.too-large            413
    │   ├── UnsupportedSyntax     study.unsupported-syntax   415
    │   ├── UndecodablePixels     study.undecodable          422
    │   ├── ColourImage           study.colour               422
    │   ├── NotTwoDimensional     study.not-2d               422
    │   └── WrongModality         study.wrong-modality       422
    ├── Refusal               a readable image that must not be answered (HTTP 422, exit code 4)
    │   ├── SpineNotFound         refused.no-spine           422
    │   ├── OutOfTime             refused.out-of-time        503
    │   ├── Quarantined           refused.quarantined        422
    │   └── RequestGone           refused.client-gone        499
    ├── BundleError           the compiled engines cannot be trusted or opened (HTTP 503, exit code 5)
    │   ├── BundleMissing         bundle.missing             503
    │   ├── BundleCorrupt         bundle.corrupt             503
    │   ├── BundleUnsigned        bundle.unsigned            503
    │   ├── KeyUnusable           bundle.key                 503
    │   ├── BundleIncompatible    bundle.incompatible        503
    │   └── SwapRefused           bundle.swap-refused        503
    ├── BackendError          a runtime is absent or failed (HTTP 503, exit code 6)
    │   ├── BackendUnavailable    backend.unavailable        503
    │   ├── BackendFailed         backend.failed             500
    │   ├── EngineTooSlow         backend.too-slow           503
    │   └── WorkerLost            backend.worker-lost        503
    ├── CompileError          a model cannot become a bundle (exit code 7)
    │   ├── ModelInvalid          compile.model              500
    │   ├── GraphUnsupported      compile.graph              500
    │   ├── CardInvalid           compile.card               500
    │   ├── CalibrationInvalid    compile.calibration        500
    │   ├── CalibrationLeaks      compile.leak               500
    │   ├── ConverterFailed       compile.converter          500
    │   ├── CompileDiskFull       compile.disk-full          500
    │   └── GateRefused           compile.gate               500
    ├── JournalError          what was acknowledged cannot be kept or found (exit code 8)
    │   ├── StudyUnknown          journal.unknown            404
    │   ├── JournalCorrupt        journal.corrupt            500
    │   └── DiskFull              journal.disk-full          507
    ├── TrainingError         a training cannot start or must stop (exit code 9)
    │   ├── TrainingDataInvalid   training.data              500
    │   ├── TrainingDiverged      training.diverged          500
    │   └── CheckpointInvalid     training.checkpoint        500
    ├── CostsInvalid          costs.invalid              500
    ├── CertificateInvalid    certificate.invalid        500
    └── UsageError            a setting or argument is wrong (HTTP 400, exit code 2)
        └── (itself)              usage.invalid              400

Vendor exceptions are mapped to these where they enter and kept as `__cause__`. Errors are raised, never returned as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class SpineboxError(Exception):
    """Base: `what` happened, the `value` at fault (shortened), and the `remedy` a person can apply."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    default_remedy: ClassVar[str] = "Report this with the log; the appliance goes on serving."

    retry_after_ms: float | None = None  # when it is worth asking again, where that is known
    admitted: bool = False  # whether an answer had been promised when this happened

    def __init__(self, what: str, *, value: object = None, remedy: str | None = None) -> None:
        self.what = what
        text = "" if value is None else str(value)
        self.value = text if len(text) <= 200 else text[:197] + "..."
        self.remedy = remedy or self.default_remedy
        super().__init__(what)

    def __str__(self) -> str:
        value = f" (value: {self.value})" if self.value else ""
        return f"[{self.code}] {self.what}{value}. {self.remedy}"

    def to_json(self) -> dict[str, str]:
        """The wire form: {"code", "message", "value", "remedy"}."""
        return {"code": self.code, "message": self.what, "value": self.value, "remedy": self.remedy}


class StudyError(SpineboxError):
    code = "study"
    http_status = 422
    exit_code = 3


class NotAnImage(StudyError):
    code = "study.not-an-image"
    http_status = 415
    default_remedy = "Send a DICOM file (MR, CR or DX), a PNG or a JPEG."


class TruncatedStudy(StudyError):
    code = "study.truncated"
    http_status = 400
    default_remedy = "Copy or send the file again; its end is missing."


class InvalidStudy(StudyError):
    code = "study.invalid"
    http_status = 400
    default_remedy = "Export the file again from its source; its DICOM structure breaks the standard."


class NoPixels(StudyError):
    code = "study.no-pixels"
    default_remedy = "Send an image object; this one holds no picture (a report, a plan or a directory)."


class EmptyPixels(StudyError):
    code = "study.empty-pixels"
    default_remedy = "Export the image again; it has no rows or no columns."


class StudyTooLarge(StudyError):
    code = "study.too-large"
    http_status = 413
    default_remedy = "Send one 2D slice or radiograph within the limits that the message names."


class UnsupportedSyntax(StudyError):
    code = "study.unsupported-syntax"
    http_status = 415
    default_remedy = "Export uncompressed, or as JPEG, JPEG-LS, JPEG 2000 or RLE."


class UndecodablePixels(StudyError):
    code = "study.undecodable"
    default_remedy = "Export the image again, uncompressed if possible; its pixel data cannot be decoded."


class ColourImage(StudyError):
    code = "study.colour"
    default_remedy = "Send the grey original, not a colour picture of it."


class NotTwoDimensional(StudyError):
    code = "study.not-2d"
    default_remedy = "Send one slice per file; multi-frame objects are not read yet."


class WrongModality(StudyError):
    code = "study.wrong-modality"
    default_remedy = "Send a lumbar MRI slice (MR) or a spine radiograph (CR, DX)."


class Refusal(SpineboxError):
    code = "refused"
    http_status = 422
    exit_code = 4


class SpineNotFound(Refusal):
    code = "refused.no-spine"
    default_remedy = (
        "Send an image of a kind that this bundle reads, with several vertebrae in view; nothing in this one looks like a spine."
    )


class OutOfTime(Refusal):
    code = "refused.out-of-time"
    http_status = 503
    default_remedy = "Send it again, or allow more time; the budget left was smaller than the fastest measured answer."


class Quarantined(Refusal):
    code = "refused.quarantined"
    default_remedy = "Report this with the log and the file; send the image in another format, or another image of the series."


class RequestGone(Refusal):
    """The client closed its connection before it was answered: nobody reads this but the log and the metrics."""

    code = "refused.client-gone"
    http_status = 499  # as nginx has it; there is no standard code
    default_remedy = "Keep the connection open until the answer comes."


class BundleError(SpineboxError):
    code = "bundle"
    http_status = 503
    exit_code = 5


class BundleMissing(BundleError):
    code = "bundle.missing"
    default_remedy = "Name a bundle with --bundle, or reinstall the package, which ships one."


class BundleCorrupt(BundleError):
    code = "bundle.corrupt"
    default_remedy = "Install the bundle again from its source; do not use this copy."


class BundleUnsigned(BundleError):
    code = "bundle.unsigned"
    default_remedy = "Sign it with `spinebox sign`, or install the public key of whoever signed it."


class KeyUnusable(BundleError):
    code = "bundle.key"
    default_remedy = "Make a key pair with `spinebox keygen`."


class BundleIncompatible(BundleError):
    code = "bundle.incompatible"
    default_remedy = "Compile the bundle again with this version of Spinebox, or install the version it was made with."


class SwapRefused(BundleError):
    code = "bundle.swap-refused"
    default_remedy = "The bundle before is served on; run `spinebox certify` with the new one while nothing else runs, and try again."


class BackendError(SpineboxError):
    code = "backend"
    http_status = 503
    exit_code = 6


class BackendUnavailable(BackendError):
    code = "backend.unavailable"
    default_remedy = "Run `spinebox doctor` for each backend's state; install one with `pip install spinebox[onnxruntime]`."


class BackendFailed(BackendError):
    """`family` is the model whose engine failed, where that is known: another engine may serve it."""

    family: str | None = None
    code = "backend.failed"
    http_status = 500
    default_remedy = "Run `spinebox doctor`; if the backend is ready there, report this with the log."


class EngineTooSlow(BackendError):
    code = "backend.too-slow"
    default_remedy = "Run `spinebox certify --quantile 0.999` on the idle device, take another runtime, or allow more blocking time."


class WorkerLost(BackendError):
    code = "backend.worker-lost"
    default_remedy = "Send it again in a moment: the engines are being started anew."


class CompileError(SpineboxError):
    code = "compile"
    exit_code = 7


class ModelInvalid(CompileError):
    code = "compile.model"
    default_remedy = "Export the model again and check it with onnx.checker; this file is broken or unsafe."


class GraphUnsupported(CompileError):
    code = "compile.graph"
    default_remedy = "Export the model again: ONNX, one input, one of the known families' heads."


class CardInvalid(CompileError):
    code = "compile.card"
    default_remedy = "Draft a card with `spinebox card MODEL.onnx` and change only what you know better."


class CalibrationInvalid(CompileError):
    code = "compile.calibration"
    default_remedy = "Name the training data with --data, or compile without it to calibrate on phantoms."


class CalibrationLeaks(CompileError):
    code = "compile.leak"
    default_remedy = "Take the named images out of the calibration set, or out of the evaluation list."


class ConverterFailed(CompileError):
    code = "compile.converter"
    default_remedy = "Run `make toolchains` and `spinebox doctor`; the converter's last lines stand above."


class CompileDiskFull(CompileError):
    code = "compile.disk-full"
    default_remedy = "Free space on that disk and run the same command again; finished stages are kept."


class GateRefused(CompileError):
    """`rows` holds the table of every engine measured, for whoever prints the refusal."""

    rows: Sequence[object] = ()
    code = "compile.gate"
    default_remedy = "Look at the table above: calibrate with more images, or keep more layers in float."


class JournalError(SpineboxError):
    code = "journal"
    exit_code = 8


class StudyUnknown(JournalError):
    code = "journal.unknown"
    http_status = 404
    default_remedy = "Check the address; GET /api/studies lists what the appliance has kept."


class JournalCorrupt(JournalError):
    code = "journal.corrupt"
    default_remedy = "Restore the data directory from a backup, or start with a new one with --data-dir."


class DiskFull(JournalError):
    code = "journal.disk-full"
    http_status = 507
    default_remedy = "Free space on the disk that holds the data directory; nothing was acknowledged."


class TrainingError(SpineboxError):
    code = "training"
    exit_code = 9


class TrainingDataInvalid(TrainingError):
    code = "training.data"
    default_remedy = "Put the named file or row right, or fetch the training folder again from its source."


class TrainingDiverged(TrainingError):
    code = "training.diverged"
    default_remedy = "Look at the named files first; if they are sound, train with a smaller learning rate or another seed."


class CheckpointInvalid(TrainingError):
    code = "training.checkpoint"
    default_remedy = "Name another folder with --work or --run, or remove this one to train from the start."


class CostsInvalid(SpineboxError):
    code = "costs.invalid"
    default_remedy = "Remove the file; the costs are measured again."


class CertificateInvalid(SpineboxError):
    code = "certificate.invalid"
    default_remedy = "Remove the file and run `spinebox certify` again; no certificate of it is believed."


class UsageError(SpineboxError):
    code = "usage.invalid"
    http_status = 400
    exit_code = 2
    default_remedy = "See `spinebox COMMAND --help`."


def all_errors() -> list[type[SpineboxError]]:
    """Every concrete class of the tree, for documentation and its test."""
    out: list[type[SpineboxError]] = []
    stack: list[type[SpineboxError]] = [SpineboxError]
    while stack:
        cls = stack.pop()
        out.append(cls)
        stack.extend(cls.__subclasses__())
    return sorted(out, key=lambda c: c.code)


def error_from_json(error: Mapping[str, str]) -> SpineboxError:
    """{"code", "message", "value", "remedy"} -> the error of that code, a Refusal where the code is unknown."""
    kinds = {kind.code: kind for kind in all_errors()}
    kind = kinds.get(error.get("code", ""), Refusal)
    return kind(error.get("message", "refused"), value=error.get("value"), remedy=error.get("remedy"))
