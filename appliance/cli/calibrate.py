"""`spinebox calibrate` and `spinebox prove`: which images an engine's ranges come from, and evidence of it."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table as Grid

from appliance.bundle import canonical
from appliance.cli._common import explained, json_option, out, progress, say
from appliance.errors import CompileDiskFull, UsageError
from appliance.report import DISCLAIMER

if TYPE_CHECKING:
    from calibration.folders import Gathered, Image
    from calibration.leaks import Leak
    from calibration.statistics import Comparison

LISTED = 10
MAX_SWEPT = 1024
_file = click.Path(path_type=Path, dir_okay=False)
_input = click.Path(path_type=Path, exists=True)


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises CompileDiskFull."""
    part: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        Path(part).chmod(0o644)
        Path(part).replace(path)
    except OSError as error:
        if part is not None:
            Path(part).unlink(missing_ok=True)
        raise CompileDiskFull(f"{path.name} cannot be written: {error.strerror}", value=path.parent) from error


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", text)
    if found is None or not all(16 <= int(v) <= 4096 for v in found.groups()):
        raise UsageError(
            "the input size is not ROWSxCOLUMNS between 16 and 4096", value=text, remedy="Write for example --input-size 384x384."
        )
    return int(found[1]), int(found[2])


@click.command()
@click.argument("folders", nargs=-1, required=True, type=_input)
@click.option("--out", "manifest", type=_file, default=None, help="Write the manifest (CSV) here.")
@click.option("--model", default="images", show_default=True, help="Name of the model that the set is for; stands in the manifest.")
@click.option("--images", type=click.IntRange(1, 10_000), default=64, show_default=True, help="Images to choose.")
@click.option("--seed", type=int, default=None, help="Another choice of the same strata. [default: a fixed one]")
@click.option("--input-size", default="384x384", show_default=True, help="Rows x columns of the network's input.")
@click.option(
    "--table", type=click.Path(path_type=Path, exists=True, dir_okay=False), default=None, help="CSV file,protocol,vendor,label,patient."
)
@click.option("--evaluation", type=_input, default=None, help="Folder or manifest that is measured on: refuse images that are in it.")
@click.option("--exclude-leaks", is_flag=True, help="Leave such images out before choosing, instead of refusing.")
@click.option("--keep-names", is_flag=True, help="Write file names and patient hashes into the manifest; it must then stay here.")
@click.option("--colour", is_flag=True, help="Read PNG and JPEG as photographs; what is hashed is their luminance at the input size.")
@click.option("--force", is_flag=True, help="Take fewer than 8 images.")
@click.option("--export-statistics", type=_file, default=None, help="Write hashes and intensity statistics for another site (JSON).")
@click.option(
    "--compare",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Another site's statistics: how far from ours?",
)
@click.option("--preview", type=_file, default=None, help="Write a contact sheet (PNG) for your own eyes; it shows patients' images.")
@click.option(
    "--sweep",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="ONNX model: how many of these images are enough?",
)
@click.option("--sweep-picture", type=_file, default=None, help="Draw the sweep into this PNG.")
@json_option
@explained
def calibrate(
    folders: tuple[Path, ...],
    manifest: Path | None,
    model: str,
    images: int,
    seed: int | None,
    input_size: str,
    table: Path | None,
    evaluation: Path | None,
    exclude_leaks: bool,
    keep_names: bool,
    colour: bool,
    force: bool,
    export_statistics: Path | None,
    compare: Path | None,
    preview: Path | None,
    sweep: Path | None,
    sweep_picture: Path | None,
    as_json: bool,
) -> None:
    """Choose calibration images from FOLDERS of DICOM, PNG or JPEG, and write a manifest of hashes.

    The choice is stratified by protocol, vendor, label and intensity, spread over patients, seeded, and the same whatever the
    files are called. The manifest holds no image, name, date or UID; its Merkle root is the set's identity.

    \b
      spinebox calibrate scans --out set.csv
      spinebox calibrate scans --out set.csv --evaluation heldout        refuse what is measured on
      spinebox calibrate scans --out set.csv --table table.csv           what PNG files do not say of themselves
      spinebox calibrate scans --images 256 --sweep model.onnx --sweep-picture sweep.png
      spinebox calibrate scans --export-statistics ours.json             for another site
      spinebox calibrate scans --compare theirs.json                     how far their images are from ours
      spinebox prove set.csv image-0001-0a1b2c3d4e5f                     this image is in the set

    Files that cannot be read are listed, not fatal, unless none is left. Exit code 7 for a set that cannot be made or that leaks.
    """
    from calibration import folders as rooms
    from calibration import leaks as leaking
    from calibration import preview as sheets
    from calibration import sets, statistics

    size = _size(input_size)
    if not model or len(model) > 80 or not model.isprintable():
        raise UsageError("a model's name is one printable line of at most 80 characters", value=model)
    chosen_seed = sets.SEED if seed is None else seed
    if sweep is not None and images > MAX_SWEPT:
        raise UsageError(f"a sweep holds its images in memory: at most {MAX_SWEPT}", value=images)
    if abs(chosen_seed) >= 10**18:
        raise UsageError("the seed has more than 18 digits", value=chosen_seed)
    rows = rooms.Table.read(table) if table else None
    with progress() as bar:
        tell = _teller(bar)
        found = rooms.gather(folders, rows, colour, tell("reading images"))
        candidates = found.images
        found_leaks: list[Leak] = []
        list_limits = ""
        if evaluation is not None:
            listed = leaking.Evaluation.read(evaluation, rows, colour, tell("reading evaluation"))
            list_limits = listed.limits
            if exclude_leaks:
                found_leaks = leaking.leaks(candidates, listed, tell("looking for leaks"))
                names = {leak.ours for leak in found_leaks}
                candidates = [i for i in candidates if i.name not in names]
                if not candidates:
                    leaking.refuse(found_leaks)
        chosen = rooms.select(candidates, images, chosen_seed, force)
        if evaluation is not None and not exclude_leaks:
            leaking.refuse(leaking.leaks([i for i, _ in chosen], listed, tell("looking for leaks")))
        prepare = rooms.standard(size)
        made = rooms.make(
            chosen, prepare, model=model, input_hw=size, seed=chosen_seed, colour=colour, keep_names=keep_names, progress=tell("hashing")
        )
        swept = _sweep(sweep, made, chosen, size, bar) if sweep else None
        ours = statistics.export(made.manifest, [i for i, _ in chosen])
        difference = statistics.compare(statistics.read(compare), ours) if compare else None
    # Everything is known to be right before the first file is written.
    written = []
    for path, content in (
        (manifest, made.to_csv),
        (export_statistics, lambda: statistics.to_bytes(ours)),
        (preview, lambda: sheets.contact_sheet(chosen, colour)),
        (sweep_picture if swept else None, lambda: _picture(swept, sweep)),
    ):
        if path is not None:
            _write(path, content())
            written.append(str(path))
    summary = {
        "root": made.root,
        "images": made.count,
        "asked": images,
        "candidates": len(found.images),
        "patients": len({i.patient for i, _ in chosen if i.patient}),
        "strata": dict(sorted(Counter(made.manifest.strata).items())),
        "skipped": [{"file": name, "why": why} for name, why in found.skipped],
        "duplicates": [{"file": name, "kept": kept} for name, kept in found.duplicates],
        "leaks_left_out": [asdict(leak) for leak in found_leaks],
        "leak_check": None if evaluation is None else list_limits or "complete",
        "sweep": swept.to_json() if swept else None,
        "comparison": difference.to_json() if difference else None,
        "written": written,
        "disclaimer": DISCLAIMER,
    }
    if as_json:
        click.echo(json.dumps(summary))
        return
    out.print(_strata(made.manifest.strata, [i for i, _ in chosen]))
    _tell_left_out(found, found_leaks)
    if list_limits:
        say.print(f"leak check: {list_limits}", markup=False, highlight=False)
    if swept:
        out.print(_sizes(swept))
        out.print(swept.sentence(), highlight=False)
    if difference:
        out.print(_differences(difference))
    short = f", {images} were asked for" if made.count < images else ""
    out.print(f"{made.count} of {len(found.images)} images{short}, Merkle root {made.root}", highlight=False)
    for name in written:
        out.print(f"-> {name}", highlight=False, markup=False)


def _teller(bar: Any) -> Callable[[str], Callable[[int, int], None]]:
    def tell(what: str) -> Callable[[int, int], None]:
        task = bar.add_task(f"{what:<20}", total=None, visible=False)

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=max(total, 1), visible=True)

        return step

    return tell


def _sweep(path: Path, made: Any, chosen: Any, size: tuple[int, int], bar: Any) -> Any:
    """The model's sweep over the chosen images; a fifth of the patients is held back."""
    from appliance.compiler.graph import load_model
    from appliance.compiler.signature import signature_of
    from appliance.compiler.sweep import sweep
    from appliance.errors import GraphUnsupported
    from calibration.folders import hold_back

    model = load_model(path)
    shape = signature_of(model).inputs[0].shape
    if shape != (1, 1, *size):
        raise GraphUnsupported(
            "a sweep needs a model of one grey input of the size of the set",
            value=f"{shape}, {size}",
            remedy="Give its size with --input-size.",
        )
    _, back = hold_back(chosen)
    held = {image.source_sha256 for image, _ in back}
    parts: tuple[list[Any], list[Any]] = ([], [])
    for (image, _), x in zip(chosen, made.inputs(), strict=True):
        parts[image.source_sha256 in held].append(x)
    task = bar.add_task("sweep", total=None)

    def step(stage: str, done: int, total: int) -> None:
        bar.update(task, description=f"{stage:<20}", completed=done, total=max(total, 1))

    return sweep(model, parts[0], parts[1], step)


def _picture(swept: Any, model: Path | None) -> bytes:
    from appliance.compiler.sweep import picture

    return picture(swept, f"how many calibration images: {model.name if model else ''}")


def _strata(strata: tuple[str, ...], images: list[Image]) -> Grid:
    grid = Grid(title="chosen images by stratum")
    for column in ("protocol | vendor | label", "images", "patients"):
        grid.add_column(column, justify="left" if "|" in column else "right")
    groups: dict[str, list[Image]] = {}
    for stratum, image in zip(strata, images, strict=True):
        groups.setdefault(" | ".join(stratum.split(" | ")[:3]), []).append(image)
    for name in sorted(groups):
        patients = {i.patient for i in groups[name] if i.patient}
        grid.add_row(name, str(len(groups[name])), str(len(patients)) if patients else "not known")
    return grid


def _tell_left_out(found: Gathered, leaks: list[Leak]) -> None:
    for title, rows in (
        ("left out", [f"{name}: {why}" for name, why in found.skipped]),
        ("the same pixels, kept once", [f"{name} = {kept}" for name, kept in found.duplicates]),
        ("in the evaluation, left out", [str(leak) for leak in leaks]),
    ):
        if rows:
            say.print(f"{title}: {len(rows)}", highlight=False)
            for row in rows[:LISTED]:
                say.print(f"  {row}", markup=False, highlight=False)
            if len(rows) > LISTED:
                say.print(f"  and {len(rows) - LISTED} more; --json lists all", highlight=False)


def _sizes(swept: Any) -> Grid:
    grid = Grid(
        title="calibration size", caption=f"error: INT8 against FP32 on {swept.held_back} images held back, share of the outputs' spread"
    )
    for column in ("images", "ranges changed, median", "95th percentile", "error"):
        grid.add_column(column, justify="right")
    for s in swept.sizes:
        grid.add_row(str(s.images), f"{s.range_change:.1%}", f"{s.range_change_p95:.1%}", f"{s.error:.2%}")
    return grid


def _differences(found: Comparison) -> Grid:
    shared = f"{found.shared} images in both; strata differ by {found.strata:.2f} (0 alike, 1 disjoint)"
    grid = Grid(title="another site's images beside ours", caption=shared)
    for column in ("quantity", "theirs", "ours", "distance", "by chance", ""):
        grid.add_column(column, justify="left" if column in ("quantity", "") else "right")
    for d in found.differences:
        numbers = (f"{v:.4g}" for v in (d.theirs, d.ours, d.distance, d.chance))
        grid.add_row(d.quantity, *numbers, "differs" if d.differs else "alike")
    if not found.same_preprocessing:
        grid.add_row("preprocessing", "", "", "", "", "differs")
    return grid


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("item", required=False)
@click.option("--out", "target", type=_file, default=None, help="Write the proof (JSON) here, instead of printing it.")
@click.option("--root", default=None, help="Check a proof against this Merkle root, taken from a bundle you trust.")
@json_option
@explained
def prove(file: Path, item: str | None, target: Path | None, root: str | None, as_json: bool) -> None:
    """Prove that ITEM of the manifest FILE is in its calibration set, or check such a proof.

    A proof holds a few hashes and nothing of the other images. Whoever checks it takes the root from the bundle, not from the
    proof.

    \b
      spinebox prove set.csv image-0001-0a1b2c3d4e5f --out proof.json
      spinebox prove proof.json --root 0a1b...          exit code 0: it holds; 7: it does not
    """
    from appliance.errors import CalibrationInvalid
    from calibration import sets

    with file.open("rb") as f:
        content = f.read(sets.MAX_MANIFEST_BYTES + 1)
    if item is not None:
        proof = canonical(asdict(sets.CalibrationSet.from_csv("", content).prove(item)))
        if target is None:
            click.echo(proof)
        else:
            _write(target, proof)
        return
    if root is None:
        raise UsageError("name an item to prove, or a root to check against", value=file, remedy="spinebox prove PROOF.json --root ROOT")
    try:
        fields = json.loads(content)
        found = sets.Proof(**{**fields, "path": tuple(fields["path"])})
        holds = found.root == root and sets.verify(found)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CalibrationInvalid(f"this is no proof: {error}", value=file, remedy="Make one with `spinebox prove`.") from error
    if not holds:
        raise CalibrationInvalid("the proof does not hold for this root", value=root, remedy="Check that the root is that of the bundle.")
    click.echo(json.dumps({"holds": True, "sha256": found.sha256, "images": found.count}) if as_json else "the proof holds")
