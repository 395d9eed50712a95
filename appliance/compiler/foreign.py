"""A stranger's ONNX file and its card as a Subject: images to calibrate on, a measure without or with labels, golden inputs.

Hides where the images come from and how an answer is compared. Without labels an engine is held against the float model: the
measure is then agreement, 1 for the float model itself, so a drop is what was lost. Without images, seeded synthetic ones stand
in, and everything that is said of them says so: they exercise the ranges of a network, they do not resemble its work.
"""

from __future__ import annotations

import csv
import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from appliance import backends
from appliance.bundle import canonical
from appliance.compiler import alike, drafting, explainers, graph, heatmap
from appliance.compiler import card as cards
from appliance.compiler.card import Card
from appliance.compiler.signature import REFERENCE, signature_of
from appliance.compiler.subject import Array, Explainer, MapSpec, Progress, Subject
from appliance.errors import BackendFailed, CalibrationInvalid, CalibrationLeaks, CardInvalid
from calibration import merkle
from models import evaluate
from models import foreign as decode

SEED = 20261124
CALIBRATE, MEASURE, TUNE, GOLDEN = 0, 1_000_000, 2_000_000, 3_000_000  # first seeds of the synthetic images of each use
IMAGES = 64
MEASURED = 160  # one image that disagrees must weigh less than the usual limit of one point
TUNED = 96
NOISE_LEVELS = 2.0  # standard deviation, of 255 grey levels: what a good camera adds
LEAST_LETTER = 12  # pixels, of synthetic text
KEPT = 320  # synthetic pictures: those measured, tuned and calibrated on
KEPT_PIXELS = 640 * 640  # of one
MIN_IMAGES = 2
MAX_FILES = 10_000
MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 1 << 26
MIN_BOXES = 10  # of the float model over all images: with fewer, average precision says nothing
FEW = 8
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
Pixels = NDArray[np.uint8]
Labels = NDArray[np.signedinteger[Any]]  # class of each pixel


# -- images ---------------------------------------------------------------------------------------------------------


def synthetic(seed: int, hw: tuple[int, int]) -> Pixels:
    """A seeded picture, H x W x 3: gradients and smooth noise with shapes and lines of text on them, of about the proportions of `hw`."""
    rng = np.random.default_rng([SEED, seed])
    height, width = (max(16, min(2048, int(s * rng.uniform(0.8, 1.3)))) for s in hw)
    cells = rng.integers(2, 12)
    coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    ramp = np.linspace(0, 1, width if rng.random() < 0.5 else height, dtype=np.float32)
    ramp = ramp[None, :, None] if ramp.size == width else ramp[:, None, None]
    image = image * rng.uniform(0.2, 1.0) + ramp * rng.uniform(-120, 120, 3).astype(np.float32)
    image = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
    for _ in range(int(rng.integers(0, 9))):
        a, b = ((int(x), int(y)) for x, y in zip(rng.integers(0, width, 2), rng.integers(0, height, 2), strict=True))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        thick = int(rng.choice([-1, 1, 3, 7]))
        kind = rng.integers(3)
        if kind == 0:
            cv2.rectangle(image, a, b, colour, thick)
        elif kind == 1:
            axes = (max(1, abs(a[0] - b[0]) // 3), max(1, abs(a[1] - b[1]) // 3))
            cv2.ellipse(image, a, axes, float(rng.uniform(0, 180)), 0, 360, colour, thick)
        else:
            cv2.line(image, a, b, colour, max(1, thick))
    _write(rng, image)
    noise = rng.normal(0, rng.uniform(0, 12), image.shape)
    return np.asarray((image + noise).clip(0, 255), np.uint8)


def _write(rng: np.random.Generator, image: Pixels) -> None:
    """Lines of words, one below the other and apart, in a colour that stands off from what is behind them."""
    height, width = image.shape[:2]
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
    # On a strip or a thumbnail a page's letters could not be read.
    small = 0.03 * min(height, width) < LEAST_LETTER
    least = min(float(rng.uniform(1.0, 2.3)) * LEAST_LETTER, 0.6 * height) if small else 0.0
    top = int(rng.integers(0, max(1, height // 2)))
    for line in range(int(rng.integers(1, 7))):
        face, size = int(rng.integers(0, 4)), max(least, float(min(height, width)) * float(rng.uniform(0.03, 0.11)))
        words = " ".join("".join(rng.choice(letters, int(rng.integers(2, 10)))) for _ in range(int(rng.integers(1, 5))))
        (_, tall), below = cv2.getTextSize(words, face, 1.0, 1)
        scale, x, top = size / max(tall, 1), int(rng.integers(0, max(1, width // 3))), top + int(size * rng.uniform(1.2, 2.2))
        if top + below * scale >= height:
            if line:
                return
            top = max(1, int(height - below * scale - 1))
        behind = image[max(0, top - int(size)) : top, x:].reshape(-1, 3)
        dark = behind.size == 0 or float(behind.mean()) < 128
        colour = tuple(int(v) for v in (rng.integers(170, 256, 3) if dark else rng.integers(0, 86, 3)))
        cv2.putText(image, words, (x, top), face, scale, colour, max(1, round(scale * float(rng.uniform(1, 2.5)))), cv2.LINE_AA)


@lru_cache(maxsize=KEPT)
def _kept(seed: int, hw: tuple[int, int]) -> Pixels:
    image = synthetic(seed, hw)
    image.setflags(write=False)
    return image


def _drawn(seed: int, hw: tuple[int, int]) -> Pixels:
    """`synthetic`, kept where it is no larger than usual: drawing takes nearly as long as a network takes to look, and every engine
    and every trial looks at the same pictures."""
    return _kept(seed, hw) if hw[0] * hw[1] <= KEPT_PIXELS else synthetic(seed, hw)


def _declared_pixels(data: bytes) -> int:
    """Rows times columns that a PNG, JPEG or BMP says it has; 0 where it does not say."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        columns, rows = struct.unpack_from(">II", data, 16)
        return int(columns * rows)
    if data[:2] == b"BM" and len(data) >= 26:
        columns, rows = struct.unpack_from("<ii", data, 18)
        return abs(int(columns) * int(rows))
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows, columns = struct.unpack_from(">HH", data, at + 5)
            return int(rows * columns)
        at += 2 + int(struct.unpack_from(">H", data, at + 2)[0])
    return 0


def read_image(path: Path) -> Pixels:
    """H x W x 3 BGR. Raises CalibrationInvalid naming the file that is no image, too large, or cut off."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            raise CalibrationInvalid(f"an image is a file of at most {MAX_FILE_BYTES:,} bytes", value=path.name)
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationInvalid(f"an image cannot be read: {error.strerror}", value=path.name) from error
    if not 0 < _declared_pixels(data) <= MAX_PIXELS:
        raise CalibrationInvalid(f"no PNG, JPEG or BMP of at most {MAX_PIXELS:,} pixels", value=path.name)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise CalibrationInvalid("an image cannot be decoded", value=path.name) from error
    if image is None:
        raise CalibrationInvalid("an image cannot be decoded", value=path.name)
    return np.asarray(image, np.uint8)


def _files(folder: Path) -> list[Path]:
    """Image files of a folder by name, sub-folders left alone. Raises CalibrationInvalid where there are too few or too many."""
    if not folder.is_dir():
        raise CalibrationInvalid("no such folder of images", value=folder)
    found = []
    for i, path in enumerate(folder.iterdir()):
        if i >= MAX_FILES:
            raise CalibrationInvalid(f"the folder has more than {MAX_FILES:,} files", value=folder)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith("."):
            found.append(path)
    if len(found) < MIN_IMAGES:
        raise CalibrationInvalid(
            f"the folder has {len(found)} images (PNG, JPEG or BMP); {MIN_IMAGES} are the least, 32 a good number", value=folder,
            remedy="Put more images of the model's own work into the folder.",
        )  # fmt: skip
    return sorted(found, key=lambda p: p.name)


# -- inputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One input that can be made again: a file, or a seed."""

    item: str
    card: Card
    path: Path | None = None
    seed: int = 0
    kind: str = "float32"  # of what is no image

    def make(self) -> tuple[Array, decode.Placement | None]:
        c = self.card
        if not c.is_image:
            rng = np.random.default_rng([SEED, self.seed])
            if self.kind.startswith("float"):
                walk = rng.normal(0, 1, c.shape).cumsum(axis=-1)
                return np.asarray(np.sin(walk * rng.uniform(0.05, 1.0)) * rng.uniform(0.05, 1.0), np.float32), None
            return rng.integers(0, 2 if self.kind == "bool" else 256, c.shape).astype(np.float32), None
        image = read_image(self.path) if self.path is not None else _drawn(self.seed, c.input_hw)
        return decode.image_input(image, c.input_hw, c.colour, c.scale, c.mean, c.std, c.resize, c.pad)


def _digest(x: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(x, dtype="<f4").tobytes()).hexdigest()


def _sources(card: Card, first: int, count: int, kind: str) -> list[_Source]:
    return [_Source(f"synthetic:{first + i}", card, seed=first + i, kind=kind) for i in range(count)]


@dataclass(frozen=True)
class CardCalibration:
    """`subject.Calibration` of a foreign model. Inputs are made anew each time and held against their digests."""

    sources: tuple[_Source, ...] = field(repr=False)
    sha256: tuple[str, ...] = field(repr=False)
    source: str

    @classmethod
    def of(cls, sources: Sequence[_Source], source: str) -> CardCalibration:
        """Raises CalibrationInvalid naming an image that cannot be read or is constant."""
        digests = []
        for s in sources:
            x, _ = s.make()
            if not np.isfinite(x).all():
                raise CalibrationInvalid("a calibration image becomes NaN or infinite; look at input.scale and input.std", value=s.item)
            if float(x.max()) - float(x.min()) < 1e-6:
                raise CalibrationInvalid("a constant image measures no range", value=s.item)
            digests.append(_digest(x))
        return cls(tuple(sources), tuple(digests), source)

    @property
    def root(self) -> str:
        return merkle.root(sorted(self.sha256))

    @property
    def count(self) -> int:
        return len(self.sources)

    def to_csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["item", "sha256"])
        writer.writerows((s.item, d) for s, d in zip(self.sources, self.sha256, strict=True))
        return text.getvalue().encode()

    def inputs(self) -> Iterator[Array]:
        for s, expected in zip(self.sources, self.sha256, strict=True):
            x, _ = s.make()
            if _digest(x) != expected:
                raise CalibrationInvalid("a calibration image is not the one that the manifest was made with", value=s.item)
            yield x


# -- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """What one engine said of one input, decoded as the card says."""

    probabilities: Array | None = None
    boxes: decode.Boxes | None = None
    dense: Array | None = None
    mask: Labels | None = None
    text: tuple[int, ...] | None = None
    raw: tuple[Array, ...] = ()


def _answer(card: Card, outputs: Mapping[str, Array]) -> _Answer:
    roles = {r: outputs[n] for r, n in card.outputs.items()}
    if card.task == "classification":
        return _Answer(probabilities=decode.classify(roles["main"], card.decoder))
    if card.task == "detection":
        # Engines are asked for more than the card shows, so that a score just below the limit is a small loss, not a lost box.
        found = decode.boxes(roles, _rules(card), card.input_hw, card.score_limit / 4)
        return _Answer(boxes=found, dense=decode.dense_scores(roles, card.decoder, card.extra))
    if card.task == "segmentation":
        labels = decode.segment(roles["main"], card.decoder)
        # A hundred and sixty masks of 640 x 640 are kept at a time, twice: a gigabyte in 64 bits, a fourth of it so.
        return _Answer(mask=labels.astype(np.int16) if labels.max(initial=0) < np.iinfo(np.int16).max else labels)
    raw = tuple(np.asarray(v, np.float32) for v in roles.values())
    return _Answer(text=decode.ctc(roles["main"]) if card.decoder == "ctc" else None, raw=raw)


def _rules(card: Card) -> decode.BoxRules:
    return decode.BoxRules(card.decoder, card.box, card.normalised, card.iou_limit, card.max_boxes, card.extra)


def _sure(boxes: decode.Boxes, limit: float) -> decode.Boxes:
    keep = boxes.scores >= limit
    return decode.Boxes(boxes.boxes[keep], boxes.scores[keep], boxes.classes[keep])


def cosine(a: Array, b: Array) -> float:
    """Cosine of the angle between two arrays; 1 where both are all zeros, 0 where one is.

    Of fewer than FEW values an angle says little (of one, nothing): then 1 minus the difference as a share of the longer.
    """
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if np.array_equal(x, y):
        return 1.0
    lengths = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if x.size < FEW:
        return 1.0 - min(1.0, float(np.linalg.norm(x - y)) / max(lengths))
    return float(x @ y) / (lengths[0] * lengths[1]) if min(lengths) > 0 else 0.0


def mask_dice(predicted: Labels, truth: Labels) -> float:
    """Mean Dice over the classes that either has, class 0 among them only where there is no other; 1 where both are empty."""
    present = [k for k in np.union1d(predicted, truth) if k > 0]
    a, b = predicted.astype(np.uint8), truth.astype(np.uint8)
    return float(np.mean([evaluate.dice(a, b, int(k)) for k in present])) if present else 1.0


def _pooled_dice(pairs: Sequence[tuple[Labels, Labels]]) -> Callable[[NDArray[np.int64]], float]:
    """Dice of each class over the pixels of all images together, then the mean over classes, class 0 only where there is no other.

    A speck that the float model hardly believes itself would weigh as much as a whole page, were the images averaged.
    """
    classes = sorted({int(k) for pair in pairs for mask in pair for k in np.unique(mask) if k > 0}) or [0]
    both = np.array([[np.sum((a == k) & (b == k)) for k in classes] for a, b in pairs], np.float64)
    sizes = np.array([[np.sum(a == k) + np.sum(b == k) for k in classes] for a, b in pairs], np.float64)

    def over(i: NDArray[np.int64]) -> float:
        total = sizes[i].sum(0)
        there = total > 0
        return float(np.mean(2 * both[i].sum(0)[there] / total[there])) if there.any() else 1.0

    return over


Matches = list[dict[int, tuple[NDArray[np.float32], NDArray[np.bool_], int]]]


def _mean_ap(matches: Matches) -> Callable[[NDArray[np.int64]], float]:
    """mAP50 over the classes that the truth has; NaN where it has none."""
    classes = sorted({k for m in matches for k, (_, _, truths) in m.items() if truths})
    nothing = (np.zeros(0, np.float32), np.zeros(0, bool), 0)

    def over(i: NDArray[np.int64]) -> float:
        values = [evaluate.average_precision([matches[j].get(k, nothing) for j in i]) for k in classes]
        known = [v for v in values if np.isfinite(v)]
        return float(np.mean(known)) if known else float("nan")

    return over


def _match(found: decode.Boxes, truth: decode.Boxes) -> dict[int, tuple[NDArray[np.float32], NDArray[np.bool_], int]]:
    out = {}
    for k in np.union1d(found.classes, truth.classes):
        mine = found.classes == k
        out[int(k)] = evaluate.match(found.boxes[mine], found.scores[mine], truth.boxes[truth.classes == k])
    return out


@dataclass(frozen=True)
class _Case:
    """One evaluation input, with its truth where somebody labelled it."""

    source: _Source
    sha256: str
    label: int | None = None
    boxes: decode.Boxes | None = None
    mask: Labels | None = None


def _level(card: Card) -> Array:
    """One of 255 grey levels as the network sees it, for each channel: 1 x C x 1 x 1, C = 1 where they are alike."""
    return (np.float32(card.scale) / np.asarray(card.std, np.float32)).reshape(1, -1, 1, 1)


@dataclass
class CardExaminer:
    """`subject.Examiner` of a foreign model. The float model runs once, when first asked; its answers are kept, its tensors not."""

    card: Card
    model: Any = field(repr=False)
    cases: Sequence[_Case] = field(repr=False)
    source: str = "agreement with FP32"
    identity: str = field(init=False)
    _reference: list[_Answer] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        h = hashlib.sha256(canonical([self.source, self.card.to_json(), evaluate.RESAMPLES]))
        for c in self.cases:
            truth = [c.label, None if c.boxes is None else [c.boxes.boxes.tolist(), c.boxes.classes.tolist()]]
            h.update(canonical([c.sha256, truth]))
            h.update(b"" if c.mask is None else np.ascontiguousarray(c.mask, "<i8").tobytes())
        if self.source == "agreement with FP32":
            h.update(self.model.SerializeToString(deterministic=True))
        self.identity = h.hexdigest()

    def _run(self, run: evaluate.Runner, progress: Progress | None = None, levels: float = 0.0) -> list[_Answer]:
        out = []
        for i, c in enumerate(self.cases):
            x, _ = c.source.make()
            if levels:
                rng = np.random.default_rng([SEED, int(c.sha256[:8], 16)])
                x = (x + rng.normal(0, levels, x.shape) * _level(self.card)).astype(np.float32)
            out.append(_answer(self.card, run({self.card.input_name: x})))
            if progress:
                progress(i + 1, len(self.cases))
        return out

    def reference(self) -> list[_Answer]:
        """What the float model answers."""
        if not self._reference:
            session = backends.load(REFERENCE).open(self.model.SerializeToString(), signature_of(self.model), precision="f32", threads=0)
            try:
                self._reference = self._run(session.run)
            finally:
                session.close()
        return self._reference

    def scores(self, run: evaluate.Runner, progress: Progress | None = None) -> evaluate.Scores:
        return self._scored(self._run(run, progress))

    def baseline(self, run: evaluate.Runner, progress: Progress | None = None) -> evaluate.Scores:
        """Without labels, how well the float model agrees with itself when its image is noisier by `NOISE_LEVELS`: where an answer
        hangs on what no eye sees, an engine that gives another one has lost nothing."""
        noisy = self.source != "labelled images" and self.card.is_image
        return self._scored(self._run(run, progress, NOISE_LEVELS if noisy else 0.0))

    def _scored(self, answers: Sequence[_Answer]) -> evaluate.Scores:
        out = self._against_labels(answers) if self.source == "labelled images" else self._against_float(answers)
        out.source = self.source
        return out

    def _add(self, out: evaluate.Scores, name: str, values: Sequence[float]) -> None:
        table = np.array(values, np.float64)
        out.add(name, range(len(table)), lambda i: float(table[i].mean()))

    def _against_labels(self, answers: Sequence[_Answer]) -> evaluate.Scores:
        if self.card.task == "classification":
            out = evaluate.Scores("accuracy")
            right = [
                float(int(a.probabilities.argmax()) == c.label)
                for a, c in zip(answers, self.cases, strict=True)
                if a.probabilities is not None
            ]
            self._add(out, "accuracy", right)
            return out
        if self.card.task == "detection":
            out = evaluate.Scores("map50")
            matches = [_match(a.boxes, c.boxes) for a, c in zip(answers, self.cases, strict=True) if a.boxes and c.boxes]
            out.add("map50", range(len(matches)), _mean_ap(matches))
            return out
        out = evaluate.Scores("dice_mean")
        self._add(
            out,
            "dice_mean",
            [
                mask_dice(a.mask, _fitted(c.mask, a.mask.shape))
                for a, c in zip(answers, self.cases, strict=True)
                if a.mask is not None and c.mask is not None
            ],
        )
        return out

    def _against_float(self, answers: Sequence[_Answer]) -> evaluate.Scores:
        pairs = list(zip(answers, self.reference(), strict=True))
        if self.card.task == "classification":
            return self._classes_agree(pairs)
        if self.card.task == "detection":
            return self._boxes_agree(pairs)
        if self.card.task == "segmentation":
            out = evaluate.Scores("agreement_dice")
            masks = [(a.mask, b.mask) for a, b in pairs if a.mask is not None and b.mask is not None]
            out.add("agreement_dice", range(len(masks)), _pooled_dice(masks))
            return out
        texts = self.card.decoder == "ctc" and any(b.text for _, b in pairs)
        out = evaluate.Scores("agreement_text" if texts else "agreement_cosine")
        if texts:
            both = [(a.text or (), b.text or ()) for a, b in pairs]
            self._add(out, "agreement_text", [1.0 - decode.edit_distance(a, b) / max(len(a), len(b), 1) for a, b in both])
        self._add(out, "agreement_cosine", [min(cosine(x, y) for x, y in zip(a.raw, b.raw, strict=True)) for a, b in pairs])
        return out

    def _classes_agree(self, pairs: Sequence[tuple[_Answer, _Answer]]) -> evaluate.Scores:
        both = [(a.probabilities, b.probabilities) for a, b in pairs if a.probabilities is not None and b.probabilities is not None]
        if self.card.decoder.startswith("sigmoid"):
            out = evaluate.Scores("agreement_labels")
            self._add(out, "agreement_labels", [float(((a > 0.5) == (b > 0.5)).mean()) for a, b in both])
        else:
            out = evaluate.Scores("agreement_top1")
            self._add(out, "agreement_top1", [float(a.argmax() == b.argmax()) for a, b in both])
        # Probability moved from one class to another: half the sum of differences for classes that exclude each other.
        self._add(out, "agreement_probability", [1.0 - min(1.0, float(np.abs(a - b).sum()) / 2) for a, b in both])
        return out

    def _boxes_agree(self, pairs: Sequence[tuple[_Answer, _Answer]]) -> evaluate.Scores:
        limit = self.card.score_limit
        both = [(a.boxes, _sure(b.boxes, limit)) for a, b in pairs if a.boxes is not None and b.boxes is not None]
        seen = sum(len(b.scores) for _, b in both)
        enough = seen >= MIN_BOXES
        out = evaluate.Scores("agreement_map50" if enough else "agreement_boxes")
        if enough:
            matches = [_match(a, b) for a, b in both]
            out.add("agreement_map50", range(len(matches)), _mean_ap(matches))
        self._add(
            out, "agreement_boxes", [_boxes_alike(a.boxes, b.boxes, limit) for a, b in pairs if a.boxes is not None and b.boxes is not None]
        )
        self._add(out, "agreement_scores", [_scores_agree(a, b) for a, b in pairs])
        return out

    def seen(self) -> int:
        """How many boxes the float model shows on all images together."""
        return sum(len(_sure(a.boxes, self.card.score_limit).scores) for a in self.reference() if a.boxes is not None)


def _boxes_alike(a: decode.Boxes, b: decode.Boxes, limit: float) -> float:
    """Share of the boxes that either shows which the other has too, at half the score at least; 1 where neither shows any."""
    shown = 0
    found = 0.0
    for mine, its in ((a, b), (b, a)):
        sure, other = _sure(mine, limit), _sure(its, limit / 2)
        shown += len(sure.scores)
        for k in np.unique(sure.classes):
            own = sure.classes == k
            _, hits, _ = evaluate.match(sure.boxes[own], sure.scores[own], other.boxes[other.classes == k])
            found += float(hits.sum())
    return found / shown if shown else 1.0


def _scores_agree(a: _Answer, b: _Answer) -> float:
    """1 minus the largest difference of a score: of the same box where the graph does not choose, else of the best boxes in turn."""
    if a.dense is not None and b.dense is not None:
        return 1.0 - min(1.0, float(np.abs(a.dense - b.dense).max(initial=0.0)))
    if a.boxes is None or b.boxes is None:
        return 0.0
    count = max(len(a.boxes.scores), len(b.boxes.scores))
    mine, its = (np.pad(x.boxes.scores, (0, count - len(x.boxes.scores))) for x in (a, b) if x.boxes is not None)
    return 1.0 - min(1.0, float(np.abs(mine - its).max(initial=0.0)))


def _fitted(mask: Labels | None, shape: tuple[int, ...]) -> Labels:
    """A truth mask at the size of the output."""
    assert mask is not None  # noqa: S101 - filtered by the caller; for the type checker
    if mask.shape == shape:
        return mask
    return np.asarray(cv2.resize(mask.astype(np.uint8), (shape[1], shape[0]), interpolation=cv2.INTER_NEAREST), np.int64)


# -- labels ---------------------------------------------------------------------------------------------------------


def _labelled(card: Card, folder: Path, sources: Sequence[_Source]) -> list[_Case]:
    """Cases with their truth. Raises CardInvalid naming the file and line at fault."""
    where = folder / card.labels
    table = _class_labels(card, where) if card.task == "classification" else {}
    out = []
    for s in sources:
        assert s.path is not None  # noqa: S101 - these come from files; for the type checker
        x, at = s.make()
        assert at is not None  # noqa: S101 - images have a place
        if card.task == "classification":
            if s.path.name in table:
                out.append(_Case(s, _digest(x), label=table[s.path.name]))
        elif card.task == "detection":
            file = where / f"{s.path.stem}.txt"
            if file.is_file():
                out.append(_Case(s, _digest(x), boxes=_yolo_boxes(card, file, at)))
        elif card.task == "segmentation":
            file = where / f"{s.path.stem}.png"
            if file.is_file():
                out.append(_Case(s, _digest(x), mask=_mask(file, at)))
    if len(out) < MIN_IMAGES:
        raise CardInvalid(f"evaluation.labels names truths of {len(out)} images; {MIN_IMAGES} are the least", value=card.labels)
    return out


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CardInvalid("a file of labels is too large", value=path.name)
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CardInvalid(f"a file of labels cannot be read: {error}", value=path.name) from error


def _class_labels(card: Card, path: Path) -> dict[str, int]:
    """`file,label`, a header or none; a label is a class name or its index."""
    out: dict[str, int] = {}
    for number, row in enumerate(csv.reader(io.StringIO(_text(path))), 1):
        if not row or (number == 1 and row[-1].strip() == "label"):
            continue
        label = row[-1].strip()
        if len(row) == 2 and label in card.classes:
            out[row[0].strip()] = card.classes.index(label)
        elif len(row) == 2 and label.isdecimal() and int(label) < max(len(card.classes), 1):
            out[row[0].strip()] = int(label)
        else:
            raise CardInvalid(f"line {number} of {path.name} is no file,label of a class of the card", value=",".join(row))
    return out


def _yolo_boxes(card: Card, path: Path, at: decode.Placement) -> decode.Boxes:
    """`class cx cy w h`, shares of the source image, one box a line."""
    rows, classes = [], []
    for number, line in enumerate(_text(path).splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        try:
            k, (cx, cy, w, h) = int(parts[0]), (float(v) for v in parts[1:5])
        except ValueError as error:
            raise CardInvalid(f"line {number} of {path.name} is no box: class cx cy w h", value=line) from error
        if not 0 <= k < max(len(card.classes), 1) or not all(np.isfinite([cx, cy, w, h])):
            raise CardInvalid(f"line {number} of {path.name} is no box of a class of the card", value=line)
        rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        classes.append(k)
    height, width = at.source_hw
    raw = np.array(rows, np.float32).reshape(-1, 4) * np.array([width, height, width, height], np.float32)
    return decode.Boxes(at.boxes_to_input(raw), np.ones(len(rows), np.float32), np.array(classes, np.int64))


def _mask(path: Path, at: decode.Placement) -> NDArray[np.int64]:
    """A PNG whose grey value is the class, of the image's size, brought into the input like the image."""
    data = path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else b""
    if not 0 < _declared_pixels(data) <= MAX_PIXELS:
        raise CardInvalid("a mask is no PNG, or too large", value=path.name)
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if values is None or tuple(values.shape) != at.source_hw:
        raise CardInvalid("a mask is not of its image's size", value=path.name)
    return np.asarray(decode.resized(np.asarray(values, np.uint8), at, 0.0, nearest=True), np.int64)


# -- the subject ----------------------------------------------------------------------------------------------------


def subject(
    path: Path,
    card: Card | None = None,
    calibration_dir: Path | None = None,
    evaluation_dir: Path | None = None,
    *,
    images: int = IMAGES,
) -> Subject:
    """The model at `path` as `card` says (drafted where None), ready for the pipeline.

    Calibrated on at most `images` images of `calibration_dir`, measured on those of `evaluation_dir`, with its labels where the
    card names them. Where only the first is given, images that calibration leaves over are measured on; where neither is,
    synthetic ones are. Raises ModelInvalid, GraphUnsupported, CardInvalid, CalibrationInvalid, CalibrationLeaks.
    """
    raw = graph.load_model(path)
    notes: list[str] = []
    if card is None:
        card, guesses = drafting.draft(raw, path.stem)
        notes = [f"{k} was guessed, {n.sure}: {n.why}" for k, n in guesses.items() if n.sure != "high"]
    cards.check_against(card, raw)
    model = graph.prepare(raw, card)
    cards.check_outputs(card, {o.name: cards.shape_of(o) for o in model.graph.output})
    model, spec = heatmap.attach(model, card.task, card.outputs, len(card.classes))
    kind = _kind(raw, model, card)

    calibrate, measure, tune, names = _choose(card, calibration_dir, evaluation_dir, images, kind)
    calibration = CardCalibration.of(calibrate, names[0])
    if evaluation_dir is not None and card.labels:
        cases, source = _labelled(card, evaluation_dir, measure), "labelled images"
    else:
        cases, source = _cases(measure), "agreement with FP32"
    tuned = _cases(tune)
    _keep_apart(calibration, [*cases, *tuned])
    examiner = CardExaminer(card, model, cases, source)
    golden = [s.make()[0] for s in _sources(card, GOLDEN, 2, kind)]
    notes.append(f"measured on {names[1]}: {source}")
    return Subject(
        name=card.name,
        version=card.version,
        task=card.task,
        model=model,
        source_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        classes=card.classes,
        preprocess=card.preprocess(),
        heatmap=spec,
        calibration=calibration,
        examiner=examiner,
        validator=CardExaminer(card, model, tuned) if tuned else None,
        explainer=_explainer(card, spec, cases, explainers.MOST),
        tuner=_explainer(card, spec, tuned, alike.MOST),
        golden=golden,
        keep_float=tuple(dict.fromkeys((*heatmap.map_nodes(model), *heatmap.after_last_convolutions(model, card.task, card.outputs)))),
        card={
            "licence": card.licence or "not stated",
            "data": "not known: a foreign model",
            "split": f"calibrated on {names[0]}, measured on {names[1]}",
            "limits": _limits(names, source, examiner),
            "notes": notes,
            "foreign": card.to_json(),
            "graph_sha256": hashlib.sha256(raw.SerializeToString(deterministic=True)).hexdigest(),
        },
    )


def _limits(names: tuple[str, str], source: str, examiner: CardExaminer) -> list[str]:
    out = []
    if examiner.card.task == "detection" and source == "agreement with FP32" and (seen := examiner.seen()) < MIN_BOXES:
        out.append(f"the float model shows {seen} boxes on the images measured on: agreement says little; give images of its own work")
    if source == "agreement with FP32":
        out.append("INT8 was held against the float model; how good the float model is was not measured")
    if "synthetic" in " ".join(names):
        out.append("synthetic images stood in for real ones: ranges and agreement on real images may differ")
    return out


def _kind(raw: Any, model: Any, card: Card) -> str:
    """Type of what goes in where it is no image: whole numbers up to 255 where the graph runs on them, else 0 and 1."""
    if card.is_image:
        return "float32"
    element = next(v for v in graph.real_inputs(raw) if v.name == card.input_name).type.tensor_type.elem_type
    kind = graph.NUMPY_TYPES[element]
    if kind.startswith("float") or kind == "bool":
        return kind
    session = backends.load(REFERENCE).open(model.SerializeToString(), signature_of(model), precision="f32", threads=0)
    try:
        session.run({card.input_name: _sources(card, CALIBRATE, 1, kind)[0].make()[0]})
    except BackendFailed:
        return "bool"
    finally:
        session.close()
    return kind


Chosen = tuple[list[_Source], list[_Source], list[_Source], tuple[str, str]]


def _choose(card: Card, calibration_dir: Path | None, evaluation_dir: Path | None, images: int, kind: str) -> Chosen:
    """Sources to calibrate, measure and tune on, apart from each other, and what the first two are called."""
    if not card.is_image and (calibration_dir or evaluation_dir):
        raise CardInvalid("input.layout is none, so a folder of images cannot be read for it", value=calibration_dir or evaluation_dir)
    stand_in = "synthetic images" if card.is_image else "synthetic arrays"
    tune = _sources(card, TUNE, TUNED, kind)
    rng = np.random.default_rng(SEED)

    def shuffled(folder: Path) -> list[_Source]:
        files = _files(folder)
        return [_Source(files[int(i)].name, card, files[int(i)]) for i in rng.permutation(len(files))]

    left: list[_Source] = []
    if calibration_dir is None:
        calibrate, first = _sources(card, CALIBRATE, images, kind), stand_in
    else:
        found = shuffled(calibration_dir)
        # Where nobody gave images to measure on, some of these are kept back for it.
        used = len(found) if evaluation_dir is not None else max(MIN_IMAGES, len(found) * 2 // 3)
        calibrate, left, first = found[: min(images, used)], found[min(images, used) :], "images named by the card"
    if evaluation_dir is not None:
        return calibrate, sorted(shuffled(evaluation_dir), key=lambda s: s.item)[:MAX_FILES], left[:TUNED] or tune, (first, "images given")
    if len(left) >= MIN_IMAGES:
        return calibrate, left[:MEASURED], left[MEASURED : MEASURED + TUNED] or tune, (first, "images given")
    return calibrate, _sources(card, MEASURE, MEASURED, kind), tune, (first, stand_in)


def _cases(sources: Sequence[_Source]) -> list[_Case]:
    return [_Case(s, _digest(s.make()[0])) for s in sources]


def _keep_apart(calibration: CardCalibration, cases: Sequence[_Case]) -> None:
    known = dict(zip(calibration.sha256, (s.item for s in calibration.sources), strict=True))
    for c in cases:
        if c.sha256 in known:
            raise CalibrationLeaks("an image is calibrated on and measured on", value=f"{known[c.sha256]} = {c.source.item}")


def _explainer(card: Card, spec: MapSpec, cases: Sequence[_Case], most: int) -> Explainer | None:
    """How the map is judged; None where there is none, or where it knows no class and the task has no single score."""
    if spec.output is None:
        return None
    # Of hundreds of cases few are explained, and inputs are large: only those are made.
    samples = explainers.held([cases[i].source.make()[0] for i in explainers.pick(range(len(cases)), most)])
    if card.task == "classification":
        return explainers.explain(
            spec,
            samples,
            scores=card.outputs["main"],
            exclusive=not card.decoder.startswith("sigmoid"),
            probabilities=card.decoder.endswith("probabilities"),
        )
    if spec.kind != "class-evidence":
        return None
    return explainers.explain(spec, samples, exclusive=card.task == "segmentation" and card.decoder in ("argmax", "labels"))
