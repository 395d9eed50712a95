"""Sets from folders: the same images give the same bytes whatever the files are called, and nothing of the patient is in them."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from appliance.errors import CalibrationInvalid, CalibrationLeaks, UsageError
from calibration import duplicates, folders, leaks, merkle, statistics, strata
from calibration.folders import Table, find, gather, hold_back, make, select, standard
from calibration.leaks import Evaluation
from calibration.sets import CalibrationSet, verify
from models import phantom

HW = (96, 96)


def draw(seed: int) -> np.ndarray:
    """A phantom of its own anatomy as 8-bit grey."""
    pixels, _ = phantom.draw(np.random.default_rng(seed), hw=(192, 160))
    top = np.percentile(pixels, 99.8)
    return np.clip(pixels / top * 255, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [draw(seed) for seed in range(20)]


@pytest.fixture
def folder(tmp_path: Path, pictures: list[np.ndarray]) -> Path:
    """20 PNG files of ten patients; the table says whose."""
    (tmp_path / "in").mkdir()
    lines = ["file,protocol,vendor,label,patient"]
    for i, picture in enumerate(pictures):
        assert cv2.imwrite(str(tmp_path / "in" / f"scan{i}.png"), picture)
        lines.append(f"scan{i}.png,{'T1' if i % 4 == 0 else 'T2'},{'SIEMENS' if i % 2 else 'Philips Healthcare'},,P{i // 2}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "in"


def table_of(folder: Path) -> Table:
    return Table.read(folder.parent / "table.csv")


def set_of(folder: Path, count: int = 12, **more: object) -> folders.FolderCalibration:
    chosen = select(gather([folder], table_of(folder)).images, count)
    return make(chosen, standard(HW), model="m", input_hw=HW, **more)  # type: ignore[arg-type]


# -- the set --------------------------------------------------------------------------------------------------------


def test_same_images_same_bytes_whatever_their_names_and_order(folder: Path, tmp_path: Path, pictures: list[np.ndarray]) -> None:
    first = set_of(folder)
    assert first.to_csv() == set_of(folder).to_csv()
    other = tmp_path / "renamed"
    (other / "in" / "deep").mkdir(parents=True)
    lines = ["file,protocol,vendor,label,patient"]
    table = {r.split(",")[0]: r for r in (folder.parent / "table.csv").read_text().splitlines()[1:]}
    order = list(range(20))
    random.Random(1).shuffle(order)
    for k, i in enumerate(order):
        shutil.copy(folder / f"scan{i}.png", other / "in" / "deep" / f"{k}.png")
        lines.append(table[f"scan{i}.png"].replace(f"scan{i}.png", f"{k}.png"))
    (other / "table.csv").write_text("\n".join(lines) + "\n")
    assert set_of(other / "in").to_csv() == first.to_csv()


def test_one_changed_pixel_changes_the_root_even_where_preprocessing_clips_it(folder: Path) -> None:
    before = set_of(folder, 20)
    path = folder / "scan3.png"
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    at = np.unravel_index(int(np.argmax(image)), image.shape)  # saturated: above the 99.5th percentile
    image[at] -= 1
    cv2.imwrite(str(path), image)
    after = set_of(folder, 20)
    assert after.root != before.root
    assert len(set(after.manifest.source_sha256) - set(before.manifest.source_sha256)) == 1
    with pytest.raises(CalibrationInvalid, match="not the one"):
        list(before.inputs())


def test_strata_are_proportional_and_patients_spread(folder: Path) -> None:
    chosen = select(gather([folder], table_of(folder)).images, 12)
    protocols = Counter(i.protocol for i, _ in chosen)
    assert protocols == {"T1": 3, "T2": 9}
    assert {i.vendor for i, _ in chosen} == {"Siemens", "Philips"}
    assert max(Counter(i.patient for i, _ in chosen).values()) <= 2
    pool = [strata.Candidate(str(n), f"patient {n % 10}", ("T1" if n % 2 else "T2", f"mean {n % 3}")) for n in range(60)]
    assert len({c.patient for c in strata.choose(pool, 10, 1, fine=1)}) == 10


def test_another_seed_is_another_choice_of_the_same_strata(folder: Path) -> None:
    images = gather([folder], table_of(folder)).images
    a, b = select(images, 12, seed=1), select(images, 12, seed=2)
    assert {i.name for i, _ in a} != {i.name for i, _ in b}
    assert Counter(i.protocol for i, _ in a) == Counter(i.protocol for i, _ in b)


def test_a_calibration_gives_its_inputs_and_its_manifest(folder: Path) -> None:
    made = set_of(folder)
    assert made.count == 12
    assert made.source == "images of a folder"
    inputs = list(made.inputs())
    assert [x.shape for x in inputs] == [(1, 1, *HW)] * 12
    back = CalibrationSet.from_csv("m", made.to_csv())
    assert back.root == made.root
    again = find(back, [folder], standard(HW))
    for a, b in zip(inputs, again.inputs(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CalibrationInvalid, match="not the one"):
        list(find(back, [folder], standard((64, 64))).inputs())
    again.paths[4].unlink()
    with pytest.raises(CalibrationInvalid, match="not in the folder"):
        find(back, [folder], standard(HW))


def test_names_and_patients_are_kept_only_where_asked(folder: Path) -> None:
    public, private = set_of(folder), set_of(folder, keep_names=True)
    assert b"scan" not in public.to_csv()
    patients = {i.patient for i in gather([folder], table_of(folder)).images}
    assert not any(p.encode() in public.to_csv() for p in patients)
    assert all(item.startswith("scan") for item in private.manifest.items)
    assert set(private.manifest.patients) <= patients
    assert CalibrationSet.from_csv("m", private.to_csv()) == private.manifest
    assert private.root == public.root


def test_the_same_pixels_count_once(folder: Path) -> None:
    shutil.copy(folder / "scan0.png", folder / "copy.png")
    found = gather([folder], table_of(folder))
    assert len(found.images) == 20
    assert found.duplicates == [("scan0.png", "copy.png")]
    assert all(i.patient for i in found.images)  # the copy has no patient in the table, its twin has


def test_a_prepared_photograph_is_in_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for i in range(8):
        cv2.imwrite(str(tmp_path / f"{i}.png"), cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (60, 50)))
    with pytest.raises(CalibrationInvalid, match="no image can calibrate"):
        gather([tmp_path])
    seen = []

    def prepare(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels)
        return np.asarray(pixels.transpose(2, 0, 1)[None] / np.float32(255), np.float32)

    made = make(select(gather([tmp_path], colour=True).images, 8), prepare, model="m", input_hw=(50, 60), preprocess="/255", colour=True)
    assert [x.shape for x in made.inputs()] == [(1, 3, 50, 60)] * 8
    assert seen[0].dtype == np.uint8
    assert set(made.manifest.items) == {f"image-{n:04d}-{s[:12]}" for n, s in enumerate(made.manifest.source_sha256, 1)}
    assert any(np.array_equal(cv2.imread(str(tmp_path / f"{i}.png"))[:, :, ::-1], seen[0]) for i in range(8))  # RGB, not BGR


# -- apportionment --------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the machine may be busy
@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 200))
def test_seats_add_up_and_nobody_is_left_out_where_there_is_room(sizes: dict[str, int], count: int) -> None:
    seats = strata.apportion(sizes, count)
    total = sum(sizes.values())
    assert sum(seats.values()) == min(count, total)
    assert all(0 <= seats[n] <= sizes[n] for n in sizes)
    holders = [n for n in sizes if sizes[n]]
    if count >= len(holders):
        assert all(seats[n] for n in holders)
    assert seats == strata.apportion(dict(reversed(sizes.items())), count)


def test_seats_are_largest_remainders() -> None:
    assert strata.apportion({"a": 47, "b": 33, "c": 20}, 10) == {"a": 5, "b": 3, "c": 2}
    assert strata.apportion({"a": 98, "b": 1, "c": 1}, 10) == {"a": 8, "b": 1, "c": 1}
    assert strata.apportion({"a": 5, "b": 5, "c": 5}, 2) == {"a": 1, "b": 1, "c": 0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("pq"), st.integers(0, 6)), min_size=1, max_size=40), st.integers(1, 50))
def test_a_choice_does_not_depend_on_the_order_given(rows: list[tuple[str, str, int]], count: int) -> None:
    pool = [strata.Candidate(f"{n}", f"patient {p}" if p else "", (a, b)) for n, (a, b, p) in enumerate(rows)]
    chosen = strata.choose(pool, count, 7)
    assert chosen == strata.choose(pool[::-1], count, 7)
    assert len({c.key for c in chosen}) == min(count, len(pool))


def test_coarse_strata_are_there_where_there_is_no_room_for_the_fine_ones() -> None:
    pool = [strata.Candidate(f"{a}{b}", "", (a, b)) for a in "xyz" for b in "0123456789"]
    assert {c.strata[0] for c in strata.choose(pool, 3, 1)} == set("xyz")
    assert {c.strata[0] for c in strata.choose(pool, 12, 1)[:3]} == set("xyz")  # and early: prefixes are fair


def test_bins_are_thirds_and_equal_values_share_one() -> None:
    assert Counter(strata.bins([float(v) for v in range(30)], "mean")) == {"mean 1/3": 10, "mean 2/3": 10, "mean 3/3": 10}
    assert set(strata.bins([4.0] * 5, "mean")) == {"mean 1/3"}
    assert strata.bins([], "mean") == []


def test_what_is_held_back_shares_no_patient(folder: Path) -> None:
    chosen = select(gather([folder], table_of(folder)).images, 20)
    stays, back = hold_back(chosen)
    assert len(stays) + len(back) == 20
    assert 4 <= len(back) <= 6
    assert not {i.patient for i, _ in stays} & {i.patient for i, _ in back}
    assert hold_back(chosen[:1]) == (chosen[:1], [])


# -- the tree -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 70), st.data())
def test_every_member_has_a_proof_and_nothing_else_has(count: int, data: st.DataObject) -> None:
    digests = [f"{i:064x}" for i in range(count)]
    index = data.draw(st.integers(0, count - 1))
    top, path = merkle.root(digests), merkle.prove(digests, index)
    assert merkle.verify(top, digests[index], index, count, path)
    assert len(path) <= (count - 1).bit_length()
    assert not merkle.verify(top, f"{count:064x}", index, count, path)
    other = data.draw(st.integers(0, count))
    if other != index:
        assert not merkle.verify(top, digests[index], other, count, path)
    if path:
        spoilt = [*path]
        at = data.draw(st.integers(0, len(path) - 1))
        spoilt[at] = f"{int(spoilt[at], 16) ^ 1:064x}"
        assert not merkle.verify(top, digests[index], index, count, spoilt)
        assert not merkle.verify(top, digests[index], index, count, path[:-1])
    assert not merkle.verify(top, digests[index], index, count, [*path, "0" * 64])


def test_the_tree_is_that_of_rfc_9162() -> None:
    """The example of section 2.1.5: seven leaves; here by hand from its definition."""
    from hashlib import sha256

    leaves = [f"{i:02x}" * 32 for i in range(7)]
    a, b, c, d, e, f, j = (sha256(b"\0" + bytes.fromhex(v)).digest() for v in leaves)

    def node(x: bytes, y: bytes) -> bytes:
        return sha256(b"\1" + x + y).digest()

    g, h, i = node(a, b), node(c, d), node(e, f)
    k, left = node(i, j), node(g, h)
    assert merkle.root(leaves) == node(left, k).hex()
    assert merkle.prove(leaves, 0) == [b.hex(), h.hex(), k.hex()]
    assert merkle.prove(leaves, 3) == [c.hex(), g.hex(), k.hex()]
    assert merkle.prove(leaves, 4) == [f.hex(), j.hex(), left.hex()]
    assert merkle.prove(leaves, 6) == [i.hex(), left.hex()]
    with pytest.raises(IndexError):
        merkle.prove(leaves, 7)


def test_a_node_passes_for_no_leaf() -> None:
    two = ["11" * 32, "22" * 32]
    assert merkle.root([merkle.root(two)]) != merkle.root(two)


def test_a_site_proves_one_image(folder: Path) -> None:
    made = set_of(folder).manifest
    for item in made.items:
        assert verify(made.prove(item))


# -- leaks ----------------------------------------------------------------------------------------------------------


def changed(picture: np.ndarray, how: str) -> np.ndarray:
    h, w = picture.shape
    if how == "jpeg":
        return cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], cv2.IMREAD_GRAYSCALE)
    if how == "smaller":
        return cv2.resize(picture, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    if how == "larger":
        return cv2.resize(picture, None, fx=1.7, fy=1.7, interpolation=cv2.INTER_CUBIC)
    if how == "gamma":
        return (255 * (picture / 255.0) ** 0.7).astype(np.uint8)
    if how == "cut":
        return picture[int(0.05 * h) : int(0.95 * h), int(0.06 * w) : int(0.97 * w)]
    if how == "padded":
        return cv2.copyMakeBorder(picture, 8, 12, 6, 10, cv2.BORDER_CONSTANT, value=0)
    assert how == "shifted"
    return cv2.warpAffine(picture, np.array([[1, 0, 0.03 * w], [0, 1, -0.02 * h]]), (w, h))


@pytest.mark.parametrize("how", ["jpeg", "smaller", "larger", "gamma", "cut", "padded", "shifted"])
def test_the_same_picture_is_found_again(how: str, folder: Path, tmp_path: Path, pictures: list[np.ndarray]) -> None:
    held = tmp_path / "held"
    held.mkdir()
    cv2.imwrite(str(held / "x.png"), changed(pictures[5], how))
    found = leaks.leaks(gather([folder]).images, Evaluation.read(held))
    assert [(leak.ours, leak.theirs, leak.why) for leak in found] == [("scan5.png", "x.png", "near-duplicate")]
    with pytest.raises(CalibrationLeaks, match=r"scan5\.png is x\.png") as caught:
        leaks.refuse(found)
    assert caught.value.exit_code == 7


def test_other_anatomy_is_not_the_same_picture(pictures: list[np.ndarray]) -> None:
    prints = [duplicates.fingerprint(p.astype(np.float32)) for p in pictures]
    values = [duplicates.likeness(a, b) for i, a in enumerate(prints[:12]) for b in prints[:i]]
    assert max(values) < duplicates.SAME
    assert duplicates.likeness(prints[0], prints[0]) > 0.999


def test_a_patient_is_found_again_in_another_picture(folder: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    cv2.imwrite(str(held / "other.png"), draw(99))
    rows = (tmp_path / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(rows + "other.png,T2,,,P3\n")
    table = table_of(folder)
    found = leaks.leaks(gather([folder], table).images, Evaluation.read(held, table))
    assert sorted((leak.ours, leak.why) for leak in found) == [("scan6.png", "patient"), ("scan7.png", "patient")]
    assert "do not say whose" in Evaluation.read(held).limits
    assert Evaluation.read(held, table).limits == ""


def test_a_manifest_is_an_evaluation_list_within_its_limits(folder: Path, tmp_path: Path, pictures: list[np.ndarray]) -> None:
    path = tmp_path / "eval.csv"
    public, private = set_of(folder, 8), set_of(folder, 8, keep_names=True)
    path.write_bytes(public.to_csv())
    listed = Evaluation.read(path)
    found = leaks.leaks(gather([folder]).images, listed)
    assert len(found) == 8
    assert {leak.why for leak in found} == {"pixels"}
    assert "patients cannot be compared" in listed.limits
    path.write_bytes(private.to_csv())
    found = leaks.leaks(gather([folder], table_of(folder)).images, Evaluation.read(path))
    assert len(found) == 2 * len(set(private.manifest.patients))
    other = tmp_path / "jpeg"
    other.mkdir()
    for i, picture in enumerate(pictures):
        cv2.imwrite(str(other / f"{i}.png"), changed(picture, "jpeg"))
    found = leaks.leaks(gather([other]).images, listed)
    assert len(found) >= 7
    assert {leak.why for leak in found} == {"near-duplicate"}


def test_nothing_leaks_where_nothing_is_shared(folder: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    for seed in range(40, 48):
        cv2.imwrite(str(held / f"{seed}.png"), draw(seed))
    found = leaks.leaks(gather([folder]).images, Evaluation.read(held))
    assert found == []
    leaks.refuse(found)


# -- statistics -----------------------------------------------------------------------------------------------------


def test_statistics_say_how_far_another_site_is(folder: Path, tmp_path: Path, pictures: list[np.ndarray]) -> None:
    images = gather([folder], table_of(folder)).images
    ours = statistics.export(set_of(folder, 20).manifest, [i for i, _ in select(images, 20)])
    assert statistics.check(ours) == ours
    same = statistics.compare(ours, ours)
    assert same.alike
    assert same.shared == 20
    assert same.strata == 0
    assert all(d.distance == 0 for d in same.differences)
    dark = tmp_path / "dark"
    dark.mkdir()
    for i, picture in enumerate(pictures):
        cv2.imwrite(str(dark / f"{i}.png"), (255 * (picture / 255.0) ** 2.2).astype(np.uint8))
    chosen = select(gather([dark]).images, 20)
    theirs = statistics.export(make(chosen, standard(HW), model="m", input_hw=HW).manifest, [i for i, _ in chosen])
    found = statistics.compare(theirs, ours)
    assert not found.alike
    by_name = {d.quantity: d for d in found.differences}
    assert by_name["intensity"].differs
    assert by_name["mean"].differs
    assert by_name["mean"].theirs < by_name["mean"].ours
    assert not by_name["rows"].differs
    assert found.shared == 0
    assert found == statistics.compare(theirs, ours)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.lists(st.floats(-5, 5), min_size=1, max_size=20))
def test_the_distance_is_that_of_scipy(a: list[float], b: list[float]) -> None:
    own = statistics._wasserstein(np.array(a), np.array(b))
    assert own == pytest.approx(wasserstein_distance(a, b), abs=1e-9)


# -- the table ------------------------------------------------------------------------------------------------------


def test_vendors_are_words_of_a_fixed_list() -> None:
    assert folders.vendor_of("SIEMENS Healthineers") == "Siemens"
    assert folders.vendor_of("GE MEDICAL SYSTEMS") == "GE"
    assert folders.vendor_of("Philips Healthcare") == "Philips"
    assert folders.vendor_of("Doe^John") == "other"
    assert folders.vendor_of("") == folders.vendor_of(None) == "unknown"


def test_a_table_in_the_form_of_spider_will_do(tmp_path: Path) -> None:
    path = tmp_path / "scans.csv"
    path.write_text('new_file_name,PixelSpacing,Manufacturer\n1_t1,"[0.6, 0.6]",SIEMENS\n')
    assert Table.read(path).of("deep/1_t1.png").vendor == "Siemens"


@pytest.mark.parametrize("content", [b"", b"name\nx\n", b"file\n", b"\xff\xfe", b'file\n"x', b"file,vendor\na,GE\na,Philips\n"])
def test_what_is_no_table_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="table"):
        Table.read(path)
