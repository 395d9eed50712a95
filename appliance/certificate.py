"""Latency certificates: what so many straight passes of one engine on one device prove of its slowest answers, kept under a signature.

Hides the statistics, the measurement and the file. The statement (Wilks 1941, Ann. Math. Statist. 12, 91-96, one-sided, of any
distribution): where n passes in a row all take at most T ms and n >= ln(1 - confidence) / ln(q), the q-quantile of a pass is at most T
with that confidence, because were it longer, n passes within T would have had a chance below q^n <= 1 - confidence. T may be the limit
that was set before or the longest of the passes themselves: both are proven. 459 passes prove p99 and 4603 prove p99.9 at 99 %.

It is a statement of passes that are independent and alike; docs/certificate.md says what that leaves out.

A measurement stops at its first miss, and the passes before it then prove a smaller quantile: the chance of s passes in a row within T
is below q^s by whatever rule one stops. Beginning again until it succeeds would prove nothing, so the record counts attempts since the
last proof, and each must be twice as sure as the one before (1 - confidence halves, 69 passes more for p99, 693 for p99.9): however often
it is tried, a wrong certificate comes out with a chance below 2 (1 - confidence).

    <data_dir>/device.pem          Ed25519 key of this device, made on first use, mode 0600; device.pub beside it
    <data_dir>/certificates.json   {record: {format, device, certificates}, signature}; the signature is over canonical JSON of the record
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import secrets
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from appliance import power, signing
from appliance.bundle import canonical
from appliance.errors import BundleCorrupt, CertificateInvalid, DiskFull, JournalError

WARM_PASSES = 20  # not timed: first passes allocate, and an engine in service is warm
PILOT_PASSES = 200
PILOT_FACTOR = 2.0  # a limit of one's own: so many times the pilot's 99th percentile
TIME_LIMIT_S = 600.0
MOST_PASSES = 1_000_000
MOST_ATTEMPTS = 32
MOST_TEXT = 200
MOST_NOTES = 16
MOST_CERTIFICATES = 256
MOST_BYTES = 1 << 20
LONGEST_MS = 3_600_000.0
DRIFTED = 1.1  # last quarter over first quarter of the passes, by median
FORMAT = "1"
KEY, RECORD = "device.pem", "certificates.json"
BLOCKING_QUANTILE = 0.999
# Behind the prefix that every signature of `appliance.signing` has: no manifest begins so, no other message of this key either.
_DOMAIN = b"spinebox device record, format 1\x00"
Run = Callable[[], object]
Progress = Callable[[int, int], None]


# -- what passes prove --------------------------------------------------------------------------------------------------


def _check(q: float, confidence: float) -> None:
    if not 0 < q < 1 or not 0 < confidence < 1:
        raise ValueError(f"quantile and confidence lie between 0 and 1, not {q} and {confidence}")


def confidence_of(passes: int, misses: int, q: float) -> float:
    """How sure one may be that the q-quantile is at most the limit, after `passes` passes of which `misses` were over it.

    Were the quantile longer, a pass would miss with a probability above 1 - q, and so few misses would have a chance below
    P(X <= misses), X binomial of `passes` trials at 1 - q, exact: the confidence is one minus that. The number of passes must have been
    set before. Raises ValueError for numbers that cannot be.
    """
    _check(q, 0.5)
    if not 0 <= misses <= passes <= MOST_PASSES or passes < 1:
        raise ValueError(f"{misses} misses of {passes} passes cannot be")
    if misses == 0:
        return -math.expm1(passes * math.log(q))
    hit, miss, whole = math.log(q), math.log1p(-q), math.lgamma(passes + 1)
    chances = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(passes - k + 1) + k * miss + (passes - k) * hit) for k in range(misses + 1)
    )
    return max(0.0, 1.0 - math.fsum(chances))


def passes_needed(q: float, confidence: float, misses: int = 0) -> int:
    """The fewest passes that prove the q-quantile where `misses` of them are over the limit: 459 for .99 and 4603 for .999 at .99.

    Raises ValueError where more than MOST_PASSES would be needed.
    """
    _check(q, confidence)
    if misses == 0:
        return _straight(q, 1 - confidence)
    wanted = confidence - 1e-12  # a rounding of the sum is not a pass more either
    low, high = misses, misses + 1  # low is never enough: a limit that every pass missed is not proven
    while confidence_of(high, misses, q) < wanted:
        if high == MOST_PASSES:
            raise ValueError(f"more than {MOST_PASSES} passes are needed")
        low, high = high, min(MOST_PASSES, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if confidence_of(middle, misses, q) >= wanted else (middle, high)
    return high


def _straight(q: float, chance: float) -> int:
    """The smallest n with q^n <= chance; a rounding of the last digit of a logarithm is not a pass more."""
    needed = max(1, math.ceil(math.log(chance) / math.log(q) - 1e-9))
    if needed > MOST_PASSES:
        raise ValueError(f"more than {MOST_PASSES} passes are needed")
    return needed


def quantile_of(passes: int, misses: int, confidence: float) -> float:
    """The largest quantile that `passes` passes with `misses` misses prove with this confidence, to the ninth place; 0 for none."""
    _check(0.5, confidence)
    if passes == 0 or misses >= passes:
        return 0.0
    low, high = 0.0, 1.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if confidence_of(passes, misses, middle) >= confidence else (low, middle)
    return math.floor(low * 1e9) / 1e9


# -- the certificate ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What was measured: a model of a bundle (by its digest) on a runtime of a version, with so many threads, on one device."""

    model: str
    backend: str
    runtime: str
    precision: str
    threads: int
    device: str
    bundle: str


@dataclass(frozen=True)
class Certificate:
    """`passes` in a row took at most `limit_ms`; `missed_ms` is the pass that ended them over it, None where none did.

    `confidence` is the one that was asked for and `attempt` the number of this measurement since the last proof. p50, p99 (nearest
    rank) and max are of all timed passes, the one that missed included. `drift` is the median of the last quarter of them over that of
    the first: far from 1 they were not alike. `made_at` is ISO 8601 in UTC; `notes` is what the board said of heat and power meanwhile.
    """

    subject: Subject
    limit_ms: float
    quantile: float
    confidence: float
    attempt: int
    passes: int
    missed_ms: float | None
    p50_ms: float
    p99_ms: float
    max_ms: float
    drift: float
    made_at: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for what no measurement gives."""
        _check(self.quantile, self.confidence)
        if not 1 <= self.attempt <= MOST_ATTEMPTS or not 0 <= self.passes <= MOST_PASSES or self.subject.threads < 0:
            raise ValueError("a count is out of range")
        if not 0 <= self.p50_ms <= self.p99_ms <= self.max_ms <= LONGEST_MS or not 0 < self.limit_ms <= LONGEST_MS or not self.drift >= 0:
            raise ValueError("a time is out of range")
        if (self.max_ms > self.limit_ms) if self.missed_ms is None else not self.limit_ms < self.missed_ms == self.max_ms:
            raise ValueError("the longest pass and the miss do not belong together")
        texts = (*(v for v in asdict(self.subject).values() if isinstance(v, str)), *self.notes)
        if len(self.notes) > MOST_NOTES or any(len(t) > MOST_TEXT for t in texts):
            raise ValueError("a text is too long")
        if datetime.fromisoformat(self.made_at).tzinfo is None:
            raise ValueError("a time of day without its zone")

    @property
    def needed(self) -> int:
        """The straight passes that this attempt had to have."""
        return _straight(self.quantile, self._chance)

    @property
    def _chance(self) -> float:
        return (1 - self.confidence) / 2.0 ** (self.attempt - 1)

    @property
    def proven(self) -> bool:
        return self.missed_ms is None and self.passes >= self.needed

    @property
    def bound_ms(self) -> float | None:
        """What the quantile is proven to lie under: the longest of the passes. None where nothing is proven."""
        return self.max_ms if self.proven else None

    @property
    def proven_quantile(self) -> float:
        """The largest quantile that the passes prove to lie under the limit, whether as many as asked for or not."""
        return math.floor(self._chance ** (1 / self.passes) * 1e9) / 1e9 if self.passes else 0.0

    @property
    def words(self) -> str:
        """One sentence for a person."""
        s = self.subject
        who = f"{s.model} on {s.backend} {s.precision}, {s.threads} threads" if s.threads else f"{s.model} on {s.backend} {s.precision}"
        tail = "" if self.attempt == 1 else f", attempt {self.attempt}"
        if self.proven:
            return (
                f"{who}: {percentile(self.quantile)} is at most {self.max_ms:.1f} ms with {self.confidence * 100:g} % confidence "
                f"({self.passes} passes within {self.limit_ms:.1f} ms{tail})"
            )
        if self.missed_ms is not None:
            over = f"pass {self.passes + 1} took {self.missed_ms:.1f} ms, {self.missed_ms - self.limit_ms:.1f} over {self.limit_ms:.1f}"
        else:
            over = f"the time was over after {self.passes} passes"
        prove = f"the {self.passes} before it prove" if self.missed_ms is not None else "they prove"
        less = f"{prove} {percentile(self.proven_quantile)}" if self.passes else "nothing is proven"
        return f"{who}: {percentile(self.quantile)} is not proven: {over}; {less} ({self.needed} were needed{tail})"

    def to_json(self) -> dict[str, Any]:
        out = asdict(self)
        return {**out.pop("subject"), **out, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Any) -> Certificate:
        """Raises CertificateInvalid for anything that `to_json` does not give."""
        try:
            if not isinstance(data, dict) or set(data) != {*_SUBJECT, *_OWN}:
                raise ValueError("its fields are not those of a certificate")
            subject = Subject(**{n: _typed(n, data[n], k) for n, k in _SUBJECT.items()})
            own = {n: _typed(n, data[n], k) for n, k in _OWN.items()}
            return cls(subject, **{**own, "notes": tuple(_typed("notes", n, "str") for n in own["notes"])})
        except (ValueError, TypeError, OverflowError) as error:
            raise _invalid(f"a certificate cannot be read: {error}") from error


_SUBJECT = {f.name: str(f.type) for f in fields(Subject)}
_OWN = {f.name: str(f.type) for f in fields(Certificate) if f.name != "subject"}


def _typed(name: str, value: Any, kind: str) -> Any:
    """`value` where it is of the annotation `kind`, numbers finite; ValueError where not."""
    if kind == "str" and isinstance(value, str) and value.isprintable():
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind.startswith("float") and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind == "float | None" and value is None:
        return None
    if kind == "tuple[str, ...]" and isinstance(value, list):
        return value
    raise ValueError(f"{name} is no {kind}: {value!r}"[:MOST_TEXT])


def percentile(q: float) -> str:
    """ "p99", "p99.9"; rounded down, so that it never says more than is so."""
    return f"p{math.floor(q * 1e4 + 1e-6) / 1e2:g}"


def refuse_above(certificate: Certificate | None, allowance_ms: float, quantile: float = BLOCKING_QUANTILE) -> str:
    """Why an engine must not be used where one pass may block at most `allowance_ms`; empty where it may.

    It may where a certificate proves at least `quantile` and its bound is within the allowance.
    """
    wanted = percentile(quantile)
    if certificate is None:
        return f"no certificate of this engine proves {wanted} on this device"
    if not certificate.proven or certificate.quantile < quantile or certificate.bound_ms is None:
        return f"{wanted} under {allowance_ms:.1f} ms is not proven: {certificate.words}"
    if certificate.bound_ms > allowance_ms:
        return f"{wanted} is proven under {certificate.bound_ms:.1f} ms only, and {allowance_ms:.1f} ms are allowed"
    return ""


# -- measuring ----------------------------------------------------------------------------------------------------------


def auto_limit_ms(run: Run, passes: int = PILOT_PASSES, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """A limit in ms for whoever has none: PILOT_FACTOR times the 99th percentile of so many passes, rounded up to a tenth.

    These passes prove nothing and are not counted: a limit taken from the passes that are to keep it would not be one.
    """
    times = [_timed_ms(run, clock) for _ in range(WARM_PASSES + passes)][WARM_PASSES:]
    return max(0.1, math.ceil(PILOT_FACTOR * _rank(times, 0.99) * 10 - 1e-9) / 10)


def measure(
    run: Run,
    subject: Subject,
    limit_ms: float,
    quantile: float = 0.99,
    confidence: float = 0.99,
    *,
    attempt: int = 1,
    time_limit_s: float = TIME_LIMIT_S,
    progress: Progress | None = None,
    notes: Callable[[], Sequence[str]] = tuple,
    clock: Callable[[], float] = time.perf_counter,
) -> Certificate:
    """Time passes of `run` until as many in a row as are needed took at most `limit_ms`, one took longer, or `time_limit_s` is over.

    `run` is one pass, called WARM_PASSES times before. `attempt` is `DeviceRecord.attempt`'s. `progress(done, needed)` is called between
    passes, outside what is timed; `notes()` is asked at the end. Raises ValueError for numbers that cannot be, and what `run` raises.
    """
    _check(quantile, confidence)
    if not (0 < limit_ms <= LONGEST_MS and time_limit_s > 0 and 1 <= attempt <= MOST_ATTEMPTS):
        raise ValueError(f"a limit of {limit_ms} ms, {time_limit_s} s or attempt {attempt} cannot be measured")
    needed = _straight(quantile, (1 - confidence) / 2.0 ** (attempt - 1))
    for _ in range(WARM_PASSES):
        run()
    times = array("d")
    missed: float | None = None
    began = clock()
    while missed is None and len(times) < needed and (not times or clock() - began < time_limit_s):
        ms = min(_timed_ms(run, clock), LONGEST_MS)
        times.append(ms)
        if ms > limit_ms:
            missed = ms
        if progress is not None:
            progress(len(times), needed)
    quarter = len(times) // 4
    drift = statistics.median(times[-quarter:]) / max(statistics.median(times[:quarter]), 1e-6) if quarter >= 10 else 1.0
    return Certificate(
        subject=subject,
        limit_ms=limit_ms,
        quantile=quantile,
        confidence=confidence,
        attempt=attempt,
        passes=len(times) - (missed is not None),
        missed_ms=missed,
        p50_ms=_rank(times, 0.5),
        p99_ms=_rank(times, 0.99),
        max_ms=max(times),
        drift=round(drift, 4),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=tuple(n[:MOST_TEXT] for n in notes()[:MOST_NOTES]),
    )


def _timed_ms(run: Run, clock: Callable[[], float]) -> float:
    began = clock()
    run()
    return (clock() - began) * 1e3


def _rank(times: Sequence[float], q: float) -> float:
    """The nearest-rank quantile."""
    return sorted(times)[max(0, math.ceil(q * len(times)) - 1)]


# -- the device and its record --------------------------------------------------------------------------------------------


def this_device(root: Path = Path("/")) -> dict[str, Any]:
    """What a certificate holds for: processor, board, power mode, threads allowed, and which machine it is.

    The machine's id is not shown but hashed, as machine-id(5) asks. A container without one is told apart by the key of its data folder.
    """
    state = power.read(root)
    cpu = re.search(r"^model name\s*:\s*(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    machine_id = _read(root / "etc/machine-id").strip()
    return {
        "cpu": cpu.group(1).strip()[:MOST_TEXT] if cpu else "",
        "machine": platform.machine(),
        "board": state.board,
        "mode": state.mode,
        "threads": power.cpu_threads(root),
        "id": hashlib.sha256(_DOMAIN + machine_id.encode()).hexdigest()[:32] if machine_id else "",
    }


def fingerprint(device: dict[str, Any]) -> str:
    """32 hexadecimal digits of a device's facts."""
    return hashlib.sha256(canonical(device)).hexdigest()[:32]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return f.read(MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _invalid(what: str, path: Path | None = None) -> CertificateInvalid:
    remedy = "Remove the file and run `spinebox certify` again; no certificate of it is believed."
    return CertificateInvalid(what, value=path, remedy=remedy)


@dataclass(frozen=True)
class DeviceRecord:
    """The certificates of one data folder, signed by the device's key.

    `certificates` are all that this device's key signed, newest last; `find` gives only those of the subject asked for, and so none of
    another device's, bundle's, runtime's or thread count's. `ignored` says why a record that lies there was not taken: it was signed
    with another device's key.
    """

    folder: Path
    device: dict[str, Any]
    certificates: tuple[Certificate, ...] = ()
    ignored: str = ""

    @classmethod
    def open(cls, folder: Path, device: dict[str, Any] | None = None) -> DeviceRecord:
        """The record of a data folder; an empty one where there is none. `device` is `this_device()` where none is given.

        Raises CertificateInvalid (broken, or changed after it was signed), KeyUnusable (others may read the device's key), JournalError.
        """
        own = this_device() if device is None else device
        path = folder / RECORD
        try:
            with path.open("rb") as f:
                content = f.read(MOST_BYTES + 1)
        except FileNotFoundError:
            return cls(folder, own)
        except OSError as error:
            remedy = "Check the permissions of the data folder, or name another with --data-dir."
            raise JournalError(f"the device's record cannot be read: {error.strerror}", value=path, remedy=remedy) from error
        try:
            if len(content) > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES} bytes")
            document = json.loads(content)
            if not isinstance(document, dict) or set(document) != {"record", "signature"}:
                raise ValueError("its fields are not those of a record")
            record = document["record"]
            signer = signing.check_signature(document["signature"], _DOMAIN + canonical(record))
        except BundleCorrupt as error:
            raise _invalid("the device's record was changed after it was signed", path) from error
        except (ValueError, RecursionError) as error:
            raise _invalid(f"the device's record cannot be read: {error}", path) from error
        key_path = folder / KEY
        if not key_path.exists() or signing.public_of(signing.load_private(key_path)).raw != signer.raw:
            return cls(folder, own, ignored=f"the record in {folder} was signed by another device (key {signer.id})")
        return cls(folder, own, _certificates(record, path))

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.device)

    def find(self, subject: Subject, quantile: float | None = None) -> Certificate | None:
        """The certificate of exactly this subject; of this quantile, or of the largest one proven where none is named."""
        found = [c for c in self.certificates if c.subject == subject and quantile in (None, c.quantile)]
        return max(found, key=lambda c: (c.proven, c.quantile), default=None)

    def attempt(self, subject: Subject, quantile: float) -> int:
        """The number of the next measurement: 1 at first and after a proof, one more after each miss. One that ran out of time before
        it missed is made again under its own number: it could not have proven anything."""
        last = self.find(subject, quantile)
        return 1 if last is None or last.proven else min(MOST_ATTEMPTS, last.attempt + (last.missed_ms is not None))

    def keep(self, certificate: Certificate) -> DeviceRecord:
        """Put a certificate in the place of its subject's last one of the same quantile, sign, and write whole or not at all.

        What another process kept meanwhile stays. Raises CertificateInvalid, KeyUnusable, DiskFull, JournalError.
        """
        with _writing(self.folder):
            now = DeviceRecord.open(self.folder, self.device)
            others = [c for c in now.certificates if (c.subject, c.quantile) != (certificate.subject, certificate.quantile)]
            kept = (*others, certificate)[-MOST_CERTIFICATES:]
            record = {"format": FORMAT, "device": self.device, "certificates": [c.to_json() for c in kept]}
            document = {"record": record, "signature": signing.sign(_DOMAIN + canonical(record), _device_key(self.folder))}
            _replace(self.folder / RECORD, json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
        return replace(now, certificates=kept, ignored="")


def _certificates(record: Any, path: Path) -> tuple[Certificate, ...]:
    if not isinstance(record, dict) or set(record) != {"format", "device", "certificates"} or record["format"] != FORMAT:
        raise _invalid("the device's record is of an unknown format", path)
    listed = record["certificates"]
    if not isinstance(listed, list) or len(listed) > MOST_CERTIFICATES:
        raise _invalid(f"a record holds at most {MOST_CERTIFICATES} certificates", path)
    return tuple(Certificate.from_json(c) for c in listed)


def _device_key(folder: Path) -> signing.PrivateKey:
    path = folder / KEY
    if not path.exists():
        signing.generate(path)
    return signing.load_private(path)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """One writer of a folder at a time; errors of the disk in the tree's words."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no space left while keeping a certificate", value=folder) from error
        remedy = "Name a data folder that you may write to with --data-dir."
        raise JournalError(f"the device's record cannot be written: {error.strerror}", value=folder, remedy=remedy) from error


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
