"""Training on bad input: labels that contradict images, classes without examples, broken files, a run that is killed, a loss
that is not finite. The folder of the tests is made of phantoms; what needs torch is marked `training`."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from appliance.errors import CheckpointInvalid, TrainingDataInvalid, TrainingDiverged, UsageError
from models import card, crossval, data, export, familiarity, fusion, known, phantom, pseudo, recipes, reproduce, train
from models.recipes import NAMES, RECIPES
from tests.tiny_training import SEED, STEPS, TinyRecipe

TINY = Path(__file__).with_name("tiny_training.py")
PATIENTS = sorted(data.split()["train"])[:4]
GRADES_HEAD = ["Patient", "IVD label", "Disc herniation", "Disc narrowing", "Disc bulging", "Pfirrman grade"]
GREY = {index: value for value, index in data.MASK_GREY.items()}


def rewrite(path: Path, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> None:
    with path.open(newline="") as f:
        rows = change(list(csv.DictReader(f)))
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[int, np.ndarray, phantom.Truth]]:  # type: ignore[type-arg]
    out = []
    for i, patient in enumerate(PATIENTS):
        image, truth = phantom.draw(np.random.default_rng(40 + i), weighting="T2")
        grey = np.clip((image - image.min()) / max(float(np.ptp(image)), 1e-6) * 255, 0, 255).astype(np.uint8)
        out.append((patient, grey, truth))
    return out


@pytest.fixture
def root(tmp_path: Path, drawn: list[tuple[int, np.ndarray, phantom.Truth]]) -> Path:  # type: ignore[type-arg]
    """A training folder of four phantoms, in the layout and the grey values of the real one."""
    base = tmp_path / "lumbar_mri"
    for folder in ("midsagittal", "t2space/images", "t2space/masks"):
        (base / folder).mkdir(parents=True)
    grades, boxes = [], []
    for i, (patient, grey, truth) in enumerate(drawn):
        mask = np.zeros_like(grey)
        for index, value in GREY.items():
            mask[truth.mask == index] = value
        cv2.imwrite(str(base / f"midsagittal/{patient}_t2.png"), grey)
        cv2.imwrite(str(base / f"t2space/images/{patient}_t2_SPACE_slice1.png"), grey)
        cv2.imwrite(str(base / f"t2space/masks/{patient}_t2_SPACE_slice1.png"), mask)
        discs = sorted((d.box_px for d in truth.discs), key=lambda b: b[1])
        for level in range(1, len(discs) + 1):
            flags = {f"Disc {f}": (level + i + k) % 2 for k, f in enumerate(("herniation", "narrowing", "bulging"))}
            grades.append({"Patient": patient, "IVD label": level, **flags, "Pfirrman grade": (level + i) % 5 + 1})
            x0, y0, x1, y1 = discs[level - 1]
            place = {"x": round(x0), "y": round(y0), "w": round(x1 - x0), "h": round(y1 - y0)}
            boxes.append({"image": f"{patient}_t2.png", "disc_from_top": level, "n_boxes": len(discs), **place})
    for name, rows in (("gradings.csv", grades), ("disc_boxes.csv", boxes)):
        with (base / name).open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return tmp_path


# -- batches --------------------------------------------------------------------------------------------------------


def small(family: str, root: Path, steps: int) -> recipes.Recipe:
    """A family's recipe with little to draw: phantoms take their time."""
    recipe = RECIPES[family](root, None, steps)
    recipe.batch_size = 3  # type: ignore[attr-defined]
    return recipe


@pytest.mark.parametrize("family", ["grader", "segmenter"])
def test_a_batch_depends_on_seed_and_step_alone(family: str, root: Path) -> None:
    whole, later = (dict(train.batches(small(family, root, 3), 9, start)) for start in (0, 2))
    assert sorted(whole) == [0, 1, 2]
    assert sorted(later) == [2]
    assert later[2].keys() == whole[2].keys()
    for key, values in later[2].items():
        np.testing.assert_array_equal(values, whole[2][key])
    assert not np.array_equal(whole[1]["image"], whole[2]["image"])
    ((_, other),) = train.batches(small(family, root, 3), 10, 2)
    assert not np.array_equal(other["image"], whole[2]["image"])


def test_each_sample_of_a_batch_is_named_after_its_file(root: Path) -> None:
    made = small("grader", root, 1)
    names = np.concatenate([made.batch(np.random.default_rng(k), 0)[NAMES] for k in range(3)])
    sources = {part.split(", disc")[0] for name in names for part in name.split(" + ")} - {"phantom"}
    assert len(sources) > 2
    assert all((root / "lumbar_mri" / s).is_file() for s in sources)
    names = small("segmenter", root, 1).batch(np.random.default_rng(0), 0)[NAMES]
    assert all(n == "phantom" or (root / "lumbar_mri/t2space/images" / n).is_file() for n in names)


def test_what_fails_while_a_batch_is_made_is_raised_with_its_step() -> None:
    class Broken(TinyRecipe):
        def batch(self, rng: np.random.Generator, step: int) -> recipes.Batch:
            if step == 2:
                raise ZeroDivisionError("nothing there")
            return super().batch(rng, step)

    made = train.batches(Broken(), 3, 0)
    assert [next(made)[0], next(made)[0]] == [0, 1]
    with pytest.raises(ZeroDivisionError) as caught:
        next(made)
    assert caught.value.__notes__ == ["while batch 2 of seed 3 was made"]


def test_batches_leave_no_thread_behind() -> None:
    before = threading.active_count()
    made = train.batches(TinyRecipe(1000), 0, 0)
    next(made)
    made.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before


# -- labels and files -----------------------------------------------------------------------------------------------


def refusal(family: str, root: Path) -> TrainingDataInvalid:
    with pytest.raises(TrainingDataInvalid) as caught:
        RECIPES[family](root, None, 1)
    assert caught.value.value
    assert caught.value.remedy.endswith(".")
    return caught.value


def set_row(number: int, **values: str) -> Callable[[list[dict[str, str]]], list[dict[str, str]]]:
    return lambda rows: [r | values if i == number else r for i, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"Pfirrman grade": "6"}, "Pfirrman grade is '6'"),
        ({"Pfirrman grade": "0"}, "Pfirrman grade is '0'"),
        ({"Pfirrman grade": "2.5"}, "not a whole number"),
        ({"Pfirrman grade": "nan"}, "Pfirrman grade is 'nan'"),
        ({"Pfirrman grade": ""}, "Pfirrman grade is ''"),
        ({"Disc bulging": "2"}, "Disc bulging is '2'"),
        ({"IVD label": "-1"}, "IVD label is '-1'"),
        ({"Patient": "x"}, "Patient is 'x'"),
    ],
)
def test_a_grade_that_does_not_exist_is_named_with_its_line(values: dict[str, str], said: str, root: Path) -> None:
    rewrite(root / "lumbar_mri/gradings.csv", set_row(3, **values))
    error = refusal("grader", root)
    assert said in error.what
    assert error.value == "gradings.csv, line 5"


def test_a_disc_that_was_graded_twice_is_refused(root: Path) -> None:
    rewrite(root / "lumbar_mri/gradings.csv", lambda rows: [*rows, rows[0]])
    assert "graded twice" in refusal("grader", root).what


@pytest.mark.parametrize(
    ("values", "said"),
    [({"w": "0"}, "w is '0'"), ({"h": "-4"}, "h is '-4'"), ({"x": "inf"}, "x is 'inf'"), ({"y": "?"}, "y is '?'")],
)
def test_a_box_without_an_inside_is_named_with_its_line(values: dict[str, str], said: str, root: Path) -> None:
    rewrite(root / "lumbar_mri/disc_boxes.csv", set_row(0, **values))
    error = refusal("grader", root)
    assert said in error.what
    assert error.value == "disc_boxes.csv, line 2"


def test_a_box_outside_its_image_is_of_another_image(root: Path) -> None:
    rewrite(root / "lumbar_mri/disc_boxes.csv", set_row(0, x="4000"))
    error = refusal("grader", root)
    assert "outside its image" in error.what
    assert f"{PATIENTS[0]}_t2.png" in error.value


def test_discs_numbered_from_the_bottom_contradict_the_image(root: Path) -> None:
    def turn(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [r | {"disc_from_top": str(int(r["n_boxes"]) + 1 - int(r["disc_from_top"]))} for r in rows]

    rewrite(root / "lumbar_mri/disc_boxes.csv", turn)
    assert "from the top downwards" in refusal("grader", root).what


def test_a_slice_with_fewer_discs_than_grades_is_left_out_and_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = recipes.graded_discs(root, None, "train", space=False)
    capsys.readouterr()
    rewrite(root / "lumbar_mri/disc_boxes.csv", lambda rows: rows[1:])
    data.disc_boxes.cache_clear()
    fewer = recipes.graded_discs(root, None, "train", space=False)
    assert {d.patient for d in whole} - {d.patient for d in fewer} == {PATIENTS[0]}
    assert "1 slices left out" in capsys.readouterr().err


def test_the_lowest_disc_has_the_first_grade(root: Path) -> None:
    discs = [d for d in recipes.graded_discs(root, None, "train", space=True) if d.patient == PATIENTS[0]]
    table = data.gradings(root)[PATIENTS[0]]
    for source in ("midsagittal", "t2space"):
        own = sorted((d for d in discs if d.name.startswith(source)), key=lambda d: -d.box[1])
        assert [d.grading for d in own] == [table[k] for k in sorted(table)]


@pytest.mark.parametrize("grade", [1, 5])
def test_a_grade_without_an_example_is_refused(grade: int, root: Path) -> None:
    other = "2" if grade == 1 else "4"
    replaced = {str(grade): other}
    change = lambda rows: [r | {"Pfirrman grade": replaced.get(r["Pfirrman grade"], r["Pfirrman grade"])} for r in rows]  # noqa: E731
    rewrite(root / "lumbar_mri/gradings.csv", change)
    assert refusal("grader", root).value == f"grade {grade}"


@pytest.mark.parametrize(("answer", "absent"), [("0", "herniation"), ("1", "no herniation")])
def test_a_flag_with_one_answer_only_is_refused(answer: str, absent: str, root: Path) -> None:
    rewrite(root / "lumbar_mri/gradings.csv", lambda rows: [r | {"Disc herniation": answer} for r in rows])
    assert refusal("grader", root).value == absent


def masks(root: Path) -> list[Path]:
    return sorted((root / "lumbar_mri/t2space/masks").glob("*.png"))


def repaint(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    cv2.imwrite(str(path), change(data.read_grey(path)))


def test_a_class_that_no_mask_shows_is_refused(root: Path) -> None:
    for path in masks(root):
        repaint(path, lambda m: np.where(m == GREY[3], 0, m))
    assert refusal("segmenter", root).value == "canal"


def test_swapped_grey_values_contradict_the_images(root: Path) -> None:
    for path in masks(root):
        repaint(path, lambda m: np.where(m == GREY[1], GREY[2], np.where(m == GREY[2], GREY[1], m)))
    assert "cover less" in refusal("segmenter", root).what


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m[:-3], "its image"),
        (lambda m: np.where(m == GREY[2], 77, m), "no class ([77])"),
        (np.zeros_like, "outlines nothing"),
    ],
)
def test_a_mask_of_another_picture_is_named(change: Callable[..., np.ndarray], said: str, root: Path) -> None:  # type: ignore[type-arg]
    path = masks(root)[1]
    repaint(path, change)
    with pytest.raises(TrainingDataInvalid) as caught:
        data.read_outlined(root / "lumbar_mri/t2space/images" / path.name, path)
    assert said in caught.value.what
    assert path.name in caught.value.value
    # One of four is more than the share that may be broken.
    assert path.name in refusal("segmenter", root).value


def broken_file(path: Path, how: str) -> None:
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not an image", "bit": _flipped(whole)}[how])


def _flipped(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]


@pytest.mark.parametrize("how", ["cut", "empty", "text", "bit"])
def test_few_broken_files_are_named_and_left_out_many_are_refused(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = (np.random.default_rng(0).random((40, 40)) * 255).astype(np.uint8)
    paths = [tmp_path / f"{i}_t2.png" for i in range(60)]
    for path in paths:
        cv2.imwrite(str(path), image)
    broken_file(paths[7], how)
    kept = data.readable(paths, data.read_grey)
    assert [p for p, _ in kept] == [p for p in paths if p != paths[7]]
    assert "left out" in (said := capfd.readouterr().err)
    assert "7_t2.png" in said
    broken_file(paths[9], how)
    with pytest.raises(TrainingDataInvalid, match=r"2 of 60 files .* are broken, more than 2%") as caught:
        data.readable(paths, data.read_grey)
    assert caught.value.value == "7_t2.png, 9_t2.png"


def test_a_file_without_a_patient_and_a_file_that_is_too_large(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stray = root / "lumbar_mri/t2space/images/notes_1.png"
    stray.write_bytes(b"")
    assert "patient's number" in refusal("segmenter", root).what
    monkeypatch.setattr(data, "MOST_FILE_BYTES", 1000)
    with pytest.raises(TrainingDataInvalid, match="more than the 1000"):
        data.read_grey(root / f"lumbar_mri/midsagittal/{PATIENTS[0]}_t2.png")


def test_no_folder_and_no_table_are_named(root: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refusal("grader", tmp_path / "elsewhere").what
    (root / "lumbar_mri/gradings.csv").write_bytes(b"Patient,IVD label\n\xff\xfe,1\n")
    assert "no CSV" in refusal("grader", root).what
    with pytest.raises(UsageError, match="--pseudo"):
        RECIPES["detector"](root, None, 1)


def test_a_pseudo_label_of_another_size_is_refused(root: Path, tmp_path: Path) -> None:
    labels = tmp_path / "pseudo"
    labels.mkdir()
    cv2.imwrite(str(labels / f"{PATIENTS[0]}_t2.png"), np.ones((5, 5), np.uint8))
    with pytest.raises(TrainingDataInvalid, match="does not fit its image"):
        RECIPES["segmenter"](root, labels, 1)


def test_the_command_line_ends_with_the_code_and_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(root / "lumbar_mri/gradings.csv", set_row(0, **{"Pfirrman grade": "9"}))
    assert train.main(["grader", "--data", str(root), "--work", str(root / "work")]) == TrainingDataInvalid.exit_code
    assert capsys.readouterr().err.startswith("[training.data] Pfirrman grade is '9'")


def test_a_series_of_trainings_ends_with_the_first_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(train, "main", lambda argv: called.append(argv[0]) or 9)
    assert reproduce.main(["--data", str(tmp_path), "--work", str(tmp_path)]) == 9
    assert called == ["segmenter"]


def test_a_series_of_trainings_makes_what_belongs_to_a_grader_before_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported first, since a forest holds the digest of its grader; measured last, since a grader is measured with its forest."""
    for folder in ("data/spine_xray_ap", "data/spine_xray_class", "work/pseudo"):
        (tmp_path / folder).mkdir(parents=True)
    called: list[tuple[str, list[str]]] = []
    for module in (train, pseudo, export, crossval, fusion, known, familiarity, card):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "main", lambda argv, name=name: called.append((name, argv)) or 0)
    assert reproduce.main(["--data", str(tmp_path / "data"), "--work", str(tmp_path / "work"), "--device", "cpu"]) == 0
    order = [name for name, _ in called]
    last = {name: len(order) - 1 - order[::-1].index(name) for name in set(order)}
    assert last["export"] < order.index("crossval") < last["crossval"] < order.index("fusion") < order.index("known")
    assert last["known"] < order.index("card")
    runs = [str(crossval.folder(tmp_path / "work/crossval", "base", str(k))) for k in range(crossval.FOLDS)]
    grown = next(argv for name, argv in called if name == "fusion")
    assert grown[grown.index("--logits") + 1 :][: len(runs)] == runs
    assert [argv[argv.index("--fold") + 1] for name, argv in called if name == "crossval"] == [str(k) for k in range(crossval.FOLDS)]
    answers = grown[grown.index("--answers") + 1]
    assert next(argv[:2] for name, argv in called if name == "known") == ["grader", answers]
    left_out = [argv[0] for name, argv in called if name == "train" and argv[0].startswith("spine_class.")]
    assert left_out == [f"spine_class.mixed.{k}" for k in range(5)]


def test_every_training_patient_is_left_out_once_and_no_other() -> None:
    folds = [crossval.fold_patients(k) for k in range(crossval.FOLDS)]
    assert sorted(p for f in folds for p in f) == sorted(data.split()["train"])
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    assert folds[0] == crossval.fold_patients(0)
    for wrong in (-1, crossval.FOLDS):
        with pytest.raises(ValueError, match="is not in 0"):
            crossval.fold_patients(wrong)


@pytest.mark.parametrize(("variant", "fold", "seed"), [("large", "all", 7), ("base", "3", train.SEED)])
def test_the_name_of_a_run_tells_the_command_that_makes_it(variant: str, fold: str, seed: int) -> None:
    run = crossval.folder(Path("work"), variant, fold, seed)
    said = crossval.command_of(run.name)
    assert f"--variant {variant} --fold {fold}" in said
    assert ("--seed 7" in said) is (seed == 7)
    assert run != crossval.folder(Path("work"), variant, fold, seed, taught=True)
    for wrong in ("mobilenet_v2", "grader-none-1", "grader-base-1-2-3"):
        with pytest.raises(ValueError, match="no run of a grader"):
            crossval.command_of(wrong)


def test_phantoms_of_a_recipe_are_drawn_once_and_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str | None] = []
    honest = phantom.draw
    monkeypatch.setattr(phantom, "draw", lambda rng, weighting: drawn.append(weighting) or honest(rng, weighting=weighting))
    monkeypatch.setattr(recipes, "PHANTOMS", 2)
    recipes._drawn.cache_clear()
    rng = np.random.default_rng(1)
    seen = {id(recipes.any_phantom(rng, "T2")[0]) for _ in range(20)}
    assert len(seen) == len(drawn) == 2
    first = recipes._drawn(0, "T2")[0].copy()
    recipes._drawn.cache_clear()
    assert np.array_equal(recipes._drawn(0, "T2")[0], first)
    assert not np.array_equal(recipes._drawn(1, "T2")[0], first)


# -- the loop's own records -----------------------------------------------------------------------------------------


def test_a_learning_curve_is_cut_where_the_checkpoint_is(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    train.cut_log(log, 0)
    assert log.read_text() == train.LOG_HEAD
    log.write_text(train.LOG_HEAD + "20,1.5,3.0\n40,1.2,6.0\n60,1.1")
    train.cut_log(log, 25)
    assert log.read_text() == train.LOG_HEAD + "20,1.5,3.0\n"


def test_step_seeds_differ_and_stay() -> None:
    seeds = {train.step_seed(s, k) for s in range(4) for k in range(500)}
    assert len(seeds) == 2000
    assert all(0 <= s < 2**63 for s in seeds)
    assert train.step_seed(1, 2) == train.step_seed(1, 2) != train.step_seed(2, 1)


def test_the_error_of_a_loss_names_the_broken_sample_first(tmp_path: Path) -> None:
    batch = TinyRecipe(poison=4).batch(np.random.default_rng([SEED, 4]), 4)
    error = train.diverged(tmp_path, SEED, 4, batch, math.nan, 1.0)
    assert error.what.startswith("the loss is nan at step 4")
    assert error.value == "seed 5, step 4, files step 4 sample 2"
    record = json.loads((tmp_path / "diverged.json").read_text())
    assert record["pixels_not_finite"] == [2]
    assert record["files"] == [f"step 4 sample {i}" for i in range(6)]
    sound = TinyRecipe().batch(np.random.default_rng(0), 4)
    assert "sample 0, step 4 sample 1" in train.diverged(tmp_path, SEED, 4, sound, 1.0, math.inf).value
    del sound[NAMES]
    assert "not named by this recipe" in train.diverged(tmp_path, SEED, 4, sound, math.inf, 1.0).value


# -- with torch -----------------------------------------------------------------------------------------------------


def start(work: Path, pause_s: float) -> subprocess.Popen[bytes]:
    """A training in a process of its own; what it says goes to WORK.txt."""
    environment = os.environ | {"PYTHONPATH": str(TINY.parent.parent)}
    with work.with_suffix(".txt").open("wb") as said:
        return subprocess.Popen([sys.executable, str(TINY), str(work), str(pause_s)], env=environment, stderr=said)


def wait_for_step(work: Path, step: int, run: subprocess.Popen[bytes]) -> None:
    import torch

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert run.poll() is None, "it ended before it could be killed"
        checkpoint = work / "checkpoint.pt"
        if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.training
def test_a_run_that_is_killed_twice_ends_in_the_same_bytes(tmp_path: Path) -> None:
    import torch

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, 0.0).wait(120) == 0, whole.with_suffix(".txt").read_text()
    for step in (7, 26):
        run = start(killed, 0.03)
        wait_for_step(killed, step, run)
        run.send_signal(signal.SIGKILL)
        assert run.wait(30) == -signal.SIGKILL
        assert not (killed / "final.pt").exists()
    ended = start(killed, 0.0).wait(120)
    said = killed.with_suffix(".txt").read_text()
    assert ended == 0, said
    resumed = re.search(rf"resumed at step (\d+) of {STEPS}", said)
    assert resumed is not None
    assert 26 <= int(resumed[1]) < STEPS
    for name in ("final.pt", "checkpoint.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (whole, killed))
        a, b = (a, b) if name == "final.pt" else (a["net"] | flat(a["optimiser"]), b["net"] | flat(b["optimiser"]))
        assert a.keys() == b.keys()
        assert [k for k in a if not torch.equal(a[k], b[k])] == []
    curves = [[r.rpartition(",")[0] for r in (folder / "log.csv").read_text().splitlines()] for folder in (whole, killed)]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 1 + math.ceil(STEPS / train.LOG_EVERY)


def flat(optimiser: dict[str, dict[int, dict[str, object]]]) -> dict[str, object]:
    return {f"{i} {k}": v for i, state in optimiser["state"].items() for k, v in state.items()}


@pytest.mark.training
@pytest.mark.parametrize(("kind", "said"), [({"poison": 12}, "the loss is nan"), ({"steep": 12}, "the gradient's norm is nan")])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(
    kind: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(train, "CHECKPOINT_EVERY_S", 0.0)
    with pytest.raises(TrainingDiverged) as caught:
        train.train(TinyRecipe(**kind), tmp_path, SEED, None, 1)  # type: ignore[arg-type]
    assert caught.value.what.startswith(f"{said} at step 12")
    assert caught.value.value.startswith("seed 5, step 12, files step 12 sample")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 12
    assert all(torch.isfinite(v).all() for v in saved["net"].values())
    assert not (tmp_path / "final.pt").exists()
    # Sound again, it goes on from there.
    train.train(TinyRecipe(), tmp_path, SEED, None, 1)
    assert (tmp_path / "final.pt").exists()


@pytest.mark.training
def test_a_checkpoint_that_is_broken_or_of_another_run_is_refused(tmp_path: Path) -> None:
    train.train(TinyRecipe(3), tmp_path, SEED, None, 1)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointInvalid, match="another run") as caught:
        train.train(TinyRecipe(3), tmp_path, SEED + 1, None, 1)
    assert "seed 5, not 6" in caught.value.value
    with pytest.raises(CheckpointInvalid, match="another run"):
        train.train(TinyRecipe(4), tmp_path, SEED, None, 1)
    whole = checkpoint.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        checkpoint.write_bytes(torn)
        with pytest.raises(CheckpointInvalid, match="cannot be read"):
            train.train(TinyRecipe(3), tmp_path, SEED, None, 1)
    assert checkpoint.read_bytes() == b"not a checkpoint"


@pytest.mark.training
@pytest.mark.parametrize("family", ["grader", "segmenter"])
def test_a_family_learns_one_step_from_a_folder_of_phantoms(family: str, root: Path) -> None:
    import torch

    state = train.train(small(family, root, 1), root / "work", SEED, None, 1)
    assert all(torch.isfinite(v).all() for v in state.values())


@pytest.mark.training
def test_a_grader_says_what_it_thinks_of_those_it_has_not_seen_and_a_teacher_is_heard(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m models.crossval` on four phantoms: its logits are of the patients left out alone, and can be read by what follows."""
    from models import backbone, teacher

    monkeypatch.setattr(backbone, "_load_imagenet", lambda stages: None)
    monkeypatch.setattr(crossval, "fold_patients", lambda fold: frozenset(PATIENTS[:1]))
    monkeypatch.setattr(recipes, "PHANTOMS", 1)
    common = ["--data", str(root), "--work", str(tmp_path / "work"), "--steps", "1", "--threads", "1"]
    monkeypatch.setattr(recipes.GraderRecipe, "batch_size", 2)
    assert crossval.main([*common, "--variant", "large", "--fold", "all"]) == 0
    assert not (crossval.folder(tmp_path / "work", "large", "all") / "logits.npz").exists()
    assert crossval.main([*common, "--fold", "2"]) == 0
    run = crossval.folder(tmp_path / "work", "base", "2")
    logits, names = fusion.read_logits([run])
    assert names == ["base"]
    assert {name for name, _ in logits} == {f"{PATIENTS[0]}_t2.png"}
    assert known.graded([run]).patient.tolist() == [PATIENTS[0]] * len(logits)
    heard: list[int] = []
    honest = teacher.committee
    monkeypatch.setattr(teacher, "committee", lambda weights, device: heard.append(len(weights)) or honest(weights, device))
    assert crossval.main([*common, "--fold", "2", "--teacher", "grader-large-all", "--teacher", "grader-large-all"]) == 0
    assert heard == [2]
    taught, names = fusion.read_logits([crossval.folder(tmp_path / "work", "base", "2", taught=True)])
    assert names == ["base-taught"]
    assert any(not np.array_equal(taught[k], logits[k]) for k in logits)


@pytest.mark.training
def test_a_gpu_that_is_not_there_is_no_device_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [train.device_named(name) for name in ("cpu", "auto")] == ["cpu", "cpu"]
    with pytest.raises(UsageError, match="no CUDA device"):
        train.device_named("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [train.device_named(name) for name in train.DEVICES] == ["cpu", "cuda", "cuda"]


@pytest.mark.training
def test_a_committee_is_the_mean_of_its_members(tmp_path: Path) -> None:
    import torch

    from models import teacher

    x = torch.rand(1, 1, 128, 128) * 2 - 1
    said = []
    for i in range(2):
        torch.manual_seed(i)
        net = teacher.network().eval()
        torch.save(net.state_dict(), tmp_path / f"{i}.pt")
        said.append(net(x))
    found = teacher.committee([tmp_path / "0.pt", tmp_path / "1.pt"])(x)
    assert torch.allclose(found, (said[0] + said[1]) / 2, atol=1e-5)
    assert not torch.allclose(said[0], said[1], atol=1e-3)
