"""Growing and judging the fusion: what it learns, that nobody is judged by a forest that saw them, and what it refuses to read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from appliance.errors import ModelInvalid, TrainingDataInvalid
from kernels import appearance
from kernels.fusion import GRADES, GROUPS, NAMES, read
from models import data, evaluate, fusion, grader, phantom
from models.fusion import Discs, Forest
from tests.test_kernels_fusion import COLUMN, discs

SMALL = Forest(trees=12)


def many(patients: int = 24, each: int = 7, seed: int = 5) -> Discs:
    x, truth = discs(patients * each, seed)
    logits = np.random.default_rng(seed).normal(0, 1, (len(x), len(grader.SPEC.classes))).astype(np.float32)
    patient = np.repeat(np.arange(patients), each)
    return Discs(x, logits, truth, patient, np.tile(np.arange(1, each + 1), patients), np.array([f"{p}_t2.png" for p in patient]))


# -- growing --------------------------------------------------------------------------------------------------------


def test_a_forest_learns_what_the_grade_follows() -> None:
    learnt, new = many(60, seed=5), many(20, seed=6)
    forest = fusion.grow(learnt.x, fusion.targets(learnt.truth), SMALL)
    found = fusion.scores(forest.logits(new.logits, new.x)[None], new, new.plain)
    # Columns of noise, 97 of 100, cost a small forest much.
    assert found["pfirrmann_kappa"].value > 0.6
    assert found["auroc_narrowing"].value < 0.7  # drawn by chance
    assert found["auroc_herniation"].value > 0.8  # follows a height


def test_the_same_discs_give_the_same_bytes_and_another_seed_others() -> None:
    d = many()
    blobs = [fusion.grow(d.x, fusion.targets(d.truth), SMALL, seed).to_bytes() for seed in (1, 1, 2)]
    assert blobs[0] == blobs[1] != blobs[2]


@pytest.mark.parametrize("leaf", [3, 9])
def test_a_leaf_keeps_its_least_discs_and_its_shares_are_theirs(leaf: int) -> None:
    d = many(12)
    y = fusion.targets(d.truth)
    forest = fusion.grow(d.x, y, Forest(trees=4, leaf=leaf))
    filled = np.where(np.isfinite(d.x), d.x, forest.fill)
    for root in forest.roots:
        at = np.full(len(filled), root)
        for _ in range(60):
            inner = forest.feature[at] >= 0
            above = filled[np.arange(len(at)), np.maximum(forest.feature[at], 0)] > forest.threshold[at]
            at = np.where(inner, forest.child[at] + above, at)
        for node in np.unique(at):
            assert (at == node).sum() >= leaf
            np.testing.assert_allclose(forest.value[node], y[at == node].mean(0), atol=1e-6)


def test_only_the_columns_that_may_be_asked_for_are() -> None:
    d = many(12)
    columns = fusion.columns_of("height", "level")
    forest = fusion.grow(d.x, fusion.targets(d.truth), SMALL, columns=columns)
    assert set(forest.feature[forest.feature >= 0].tolist()) <= set(columns.tolist())
    assert {NAMES[i] for i in columns} == {*GROUPS["height"], *GROUPS["level"]}


def test_a_column_that_nobody_knows_and_one_that_never_varies_do_no_harm() -> None:
    d = many(8)
    d.x[:, COLUMN["level"]] = np.nan
    d.x[:, COLUMN["height"]] = 3.0
    forest = fusion.grow(d.x, fusion.targets(d.truth), SMALL)
    assert not {COLUMN["level"], COLUMN["height"]} & set(forest.feature.tolist())
    assert np.isfinite(forest.shares(d.x)).all()


def test_too_few_discs_grow_nothing() -> None:
    d = many(1)
    with pytest.raises(ValueError, match="grow no forest"):
        fusion.grow(d.x[:5], fusion.targets(d.truth)[:5], SMALL)
    with pytest.raises(ValueError, match="grow no forest"):
        fusion.grow(d.x, fusion.targets(d.truth)[:, :5], SMALL)


def test_targets_are_the_shares_above_each_grade_and_the_flags() -> None:
    made = fusion.targets(np.array([[1, 0, 1, 0], [3, 1, 0, 0], [5, 0, 0, 1]]))
    assert made.tolist() == [[0, 0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 1]]


# -- judging --------------------------------------------------------------------------------------------------------


def test_a_patient_is_in_one_fold_and_folds_are_alike_in_size() -> None:
    patients = np.repeat(np.arange(23), 7)
    fold = evaluate.folds(patients, 3, fusion.FOLDS)
    assert all(len(set(fold[patients == p].tolist())) == 1 for p in range(23))
    sizes = [len(set(patients[fold == k].tolist())) for k in range(fusion.FOLDS)]
    assert max(sizes) - min(sizes) <= 1
    assert (fold != evaluate.folds(patients, 4, fusion.FOLDS)).any()


def test_nobody_is_judged_by_a_forest_that_saw_them() -> None:
    """A number that names the patient, and grades that are the patient's: known in training, worth nothing for a stranger."""
    d = many(40, 5)
    rng = np.random.default_rng(8)
    grade = rng.integers(1, 6, 40)[d.patient]
    x = rng.normal(0, 1, d.x.shape).astype(np.float32)
    x[:, COLUMN["level"]] = d.patient
    d = dataclasses.replace(d, x=x, truth=np.column_stack([grade, d.truth[:, 1:]]))
    order = Forest(trees=10, leaf=2, share=1.0)
    own = fusion.grow(d.x, fusion.targets(d.truth), order)
    assert fusion.scores(own.logits(d.logits, d.x)[None], d, d.plain)["pfirrmann_exact"].value > 0.8
    found = fusion.scores(fusion.cross_validated(d, order, [1, 2]), d, d.plain)
    assert found["pfirrmann_exact"].value < 0.4


def test_scores_of_several_answers_are_the_means_of_theirs() -> None:
    d = many(12)
    logits = np.random.default_rng(1).normal(0, 1, (2, *d.logits.shape)).astype(np.float32)
    one, two, both = (fusion.scores(z, d, d.plain) for z in (logits[:1], logits[1:], logits))
    for m in both.metrics:
        assert m.value == pytest.approx((one[m.name].value + two[m.name].value) / 2)
        assert m.low <= m.value <= m.high


def test_an_error_that_a_patients_discs_share_is_told_from_one_that_they_do_not() -> None:
    rng = np.random.default_rng(4)
    patient = np.repeat(np.arange(60), 7)
    grade = rng.integers(2, 5, len(patient))
    logits = -8 * np.abs(np.arange(1, 9)[None] - grade[:, None]).astype(np.float32)
    truths = {"shared": grade + rng.integers(-1, 2, 60)[patient], "own": grade + rng.integers(-1, 2, len(patient))}
    found = {how: fusion.reading(logits, np.column_stack([t] * 4), patient) for how, t in truths.items()}
    assert found["shared"]["share_between_patients"] > 0.95
    assert found["own"]["share_between_patients"] < 0.1
    # What they share can be told from the others, what they do not share cannot.
    gain = {how: f["exact_offset_known"] - f["exact_as_it_is"] for how, f in found.items()}
    assert gain["shared"] > 0.2
    assert gain["own"] < 0.05
    assert found["shared"]["kappa_offset_known"] > found["shared"]["kappa_as_it_is"] + 0.05


def test_every_group_is_left_out_once() -> None:
    trials = fusion.ablations()
    for group in list(GROUPS)[1:]:
        left = {NAMES[i] for i in trials[f"all but {group}"]}
        assert left == set(NAMES) - set(GROUPS[group])
    last = [name for name in trials if name.startswith("+ ")][-1]
    assert len(trials[last]) == len(NAMES)
    blind = fusion.without(np.ones((2, len(NAMES)), np.float32), "canal")
    assert np.isnan(blind).sum() == 2 * len(GROUPS["canal"])


# -- reading --------------------------------------------------------------------------------------------------------


def logits_file(path: Path, **changed: object) -> Path:
    patients = sorted(data.split()["train"])[:4]
    arrays: dict[str, object] = {
        "logits": np.zeros((4, 8), np.float32), "patient": np.array(patients), "number": np.arange(1, 5),
        "slice_name": np.array([f"{p}_t2.png" for p in patients]),
    }  # fmt: skip
    np.savez(path, **{k: v for k, v in {**arrays, **changed}.items() if v is not None})  # type: ignore[arg-type]
    return path


def test_logits_are_found_by_slice_and_disc(tmp_path: Path) -> None:
    first = min(data.split()["train"])
    found, recipes = fusion.read_logits([logits_file(tmp_path / "a.npz", logits=np.arange(32.0).reshape(4, 8))])
    assert recipes == ["a"]
    assert found[f"{first}_t2.png", 1].tolist() == list(range(8))


def test_logits_of_a_held_out_patient_are_refused(tmp_path: Path) -> None:
    held_out = min(data.split()["test"])
    path = logits_file(tmp_path / "a.npz", patient=np.array([held_out] * 4))
    with pytest.raises(TrainingDataInvalid) as caught:
        fusion.read_logits([path])
    assert "not of the training side" in caught.value.what
    assert str(held_out) in str(caught.value.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"logits": np.zeros((4, 5))}, "eight for each disc"),
        ({"logits": np.zeros((3, 8))}, "eight for each disc"),
        ({"logits": np.full((4, 8), np.nan)}, "no numbers"),
        ({"number": None}, "cannot be read"),
        ({"slice_name": None}, "cannot be read"),
        ({"patient": np.array([{}] * 4, object)}, "cannot be read"),
    ],
)
def test_logits_that_are_none_are_refused(tmp_path: Path, changed: dict[str, object], words: str) -> None:
    with pytest.raises(TrainingDataInvalid, match=words):
        fusion.read_logits([logits_file(tmp_path / "a.npz", **changed)])
    with pytest.raises(TrainingDataInvalid, match="cannot be read"):
        fusion.read_logits([tmp_path / "absent.npz"])


def beside(folder: Path, grader_bytes: bytes = b"a grader", blob: bytes | None = None) -> Path:
    (folder / "grader.onnx").write_bytes(b"a grader")
    d = many(4)
    made = fusion.grow(d.x, fusion.targets(d.truth), SMALL, grader_sha256=hashlib.sha256(grader_bytes).hexdigest())
    (folder / fusion.FILE.name).write_bytes(made.to_bytes() if blob is None else blob)
    return folder


def test_a_fusion_belongs_to_one_grader(tmp_path: Path) -> None:
    assert fusion.beside(tmp_path) is None
    found = fusion.beside(beside(tmp_path))
    assert found is not None
    assert len(found.roots) == SMALL.trees
    with pytest.raises(ModelInvalid, match="another grader"):
        fusion.beside(beside(tmp_path, b"a newer grader"))
    with pytest.raises(ModelInvalid, match="cannot be used"):
        fusion.beside(beside(tmp_path, blob=b"no forest"))


# -- the whole, on phantoms -----------------------------------------------------------------------------------------


class Truth:
    """A segmenter that has seen the mask: logits of the picture that was asked for last."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        from kernels.preprocess import letterbox

        planes = [letterbox(np.where(self.mask == k, 1, -1).astype(np.float32), (384, 384))[0][0, 0, ::2, ::2] for k in range(4)]
        return {"logits": 9 * np.stack(planes)[None].astype(np.float32)}


def test_the_evaluation_fuses_as_a_device_does_a_column_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PHANTOMS", 6)
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    seen: list[np.ndarray] = []
    real = evaluate._phantoms

    def phantoms():  # type: ignore[no-untyped-def]
        for i, image, truth in real():
            seen.append(truth.mask)
            yield i, image, truth

    monkeypatch.setattr(evaluate, "_phantoms", phantoms)
    samples = evaluate.crops(None, segment=lambda x: Truth(seen[-1])(x))
    assert all(c.look is not None and np.isfinite(c.look[appearance.NAMES.index("median_fluid")]) for c in samples)
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 1, (len(samples), 8)).astype(np.float32)
    waiting = iter(noise)
    truth = np.array([[c.grading.pfirrmann, c.grading.herniation, c.grading.narrowing, c.grading.bulging] for c in samples])
    x = np.concatenate(
        [
            evaluate.rows(noise[m], np.stack([samples[i].look for i in m]), [samples[i].place for i in m], [None] * len(m))  # type: ignore[misc]
            for p in dict.fromkeys(c.patient for c in samples)
            if (m := [i for i, c in enumerate(samples) if c.patient == p])
        ]
    )
    forest = fusion.grow(x, fusion.targets(truth), Forest(trees=15, leaf=3))
    found = evaluate.evaluate("grader", lambda _: {"logits": next(waiting)[None]}, None, given=samples, fusion=forest)
    np.testing.assert_array_equal(evaluate.fuse(noise, samples, forest), forest.logits(noise, x))
    assert found.main == "pfirrmann_exact"
    assert found["pfirrmann_exact"].value > found["pfirrmann_exact_network"].value + 0.2
    assert found["pfirrmann_exact_network"].value == pytest.approx(np.mean(noise[:, :GRADES].argmax(1) + 1 == truth[:, 0]))
    with pytest.raises(ValueError, match="measured"):
        evaluate.fuse(noise, [dataclasses.replace(c, look=None) for c in samples], forest)


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of phantoms under the numbers of training patients, and a segmenter that sees their masks."""
    folder = tmp_path / "data/lumbar_mri"
    (folder / "midsagittal").mkdir(parents=True)
    head = "Patient,IVD label,Modic,UP endplate,LOW endplate,Spondylolisthesis"
    gradings = [f"{head},Disc herniation,Disc narrowing,Disc bulging,Pfirrman grade"]
    boxes, logits, masks = ["image,disc_from_top,n_boxes,x,y,w,h"], [], {}
    rng = np.random.default_rng(2)
    for k, patient in enumerate(sorted(data.split()["train"])[:10]):
        pixels, truth = phantom.draw(np.random.default_rng(8000 + k), hw=(256, 256), weighting="T2")
        name, grey = f"{patient}_t2.png", np.clip(255 * pixels / np.percentile(pixels, 99), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / "midsagittal" / name), grey)
        masks[grey.tobytes()] = truth.mask
        whole = [d for d in truth.discs if min(d.box_px) >= 0 and max(d.box_px) <= 256]
        for number, d in enumerate(whole, 1):
            gradings.append(f"{patient},{number},0,0,0,0,{d.herniation:d},{d.narrowing:d},{d.bulging:d},{d.pfirrmann}")
            x0, y0, x1, y1 = d.box_px
            boxes.append(f"{name},{len(whole) - number + 1},{len(whole)},{x0},{y0},{x1 - x0},{y1 - y0}")
            logits.append((rng.normal(0, 1, 8) + 2 * np.eye(8)[d.pfirrmann - 1], patient, number, name))
    (folder / "gradings.csv").write_text("\n".join(gradings) + "\n")
    (folder / "disc_boxes.csv").write_text("\n".join(boxes) + "\n")
    table = list(zip(*logits, strict=True))
    names = ("logits", "patient", "number", "slice_name")
    np.savez(tmp_path / "base.npz", **{name: np.array(column) for name, column in zip(names, table, strict=True)})
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/grader.onnx").write_bytes(b"the grader")

    from models import card

    def runner(family: str, weights: Path) -> evaluate.Runner:
        assert family == "segmenter"
        waiting = iter([masks[cv2.imread(str(p), cv2.IMREAD_GRAYSCALE).tobytes()] for p in sorted((folder / "midsagittal").iterdir())])
        return lambda x: Truth(next(waiting))(x)

    monkeypatch.setattr(card, "runner", runner)
    monkeypatch.setattr(evaluate, "RESAMPLES", 20)
    out, answers, found = tmp_path / "weights" / fusion.FILE.name, tmp_path / "fused.npz", tmp_path / "found.json"
    arguments = ["--data", str(tmp_path / "data"), "--logits", str(tmp_path / "base.npz"), "--weights", str(tmp_path / "weights")]
    small = ["--seeds", "1", "--trees", "8", "--out", str(out), "--answers", str(answers), "--json", str(found)]
    assert fusion.main([*arguments, *small]) == 0
    said = json.loads(found.read_text())
    assert json.loads(capsys.readouterr().out) == said
    assert said["patients"] == 10
    assert said["discs"] == said["discs_learnt_from"] == len(logits)
    assert set(said["fused"]["metrics"]) == set(said["network alone"]["metrics"]) == set(said["fused"]["gain"])
    assert np.sum(said["confusion by level"]) == len(logits)
    made = fusion.beside(tmp_path / "weights")
    assert made is not None
    assert made.to_bytes() == read(out.read_bytes()).to_bytes()
    with np.load(answers, allow_pickle=False) as kept:
        assert kept["logits"].shape == (len(logits), 8)
        assert kept["variant"].tolist() == ["base, fused"]
        assert set(kept["patient"].tolist()) <= data.split()["train"]
    with pytest.raises(SystemExit):
        fusion.main([*arguments, "--share", "0"])
