"""What the board says of processors, memory, heat and power, and how far a prediction should be stretched for it.

Hides where Linux keeps these things and how much of it is missing, locked or nonsense on a given board: every file is optional, read to
a bound, and a value that cannot be one is left out with its reason. Nothing here raises because a file is absent or broken.

    processors   sched_getaffinity and the quota of every cgroup up to the root (v1 and v2)
    memory       MemTotal and the limit of every cgroup up to the root
    heat         /sys/class/thermal zones with their trip points; coretemp and k10temp of /sys/class/hwmon (x86)
    clocks       /sys/devices/system/cpu/cpufreq policies; /sys/class/devfreq of a Tegra GPU
    throttling   x86 thermal_throttle counters; over-current events of a Jetson (hwmon soctherm_oc)
    power        /sys/class/power_supply; the mode of a Jetson (nvpmodel), its model from the device tree

`Power.factor` lowers the promise before the clock does. Two things count, and the larger of both is taken, not their product, because
heat is only the forecast of a cap:

    cap   top / cap of the most capped clock (cpuinfo_max_freq / scaling_max_freq): work that the clock bounds takes inversely as long.
          A governor's thermal cap, a power mode of a Jetson and a saver on battery all show here; being on battery alone is no factor.
    heat  1 until HEAT_BAND_C below the temperature at which the kernel or the chip begins to throttle, then linearly up to HEAT_FACTOR
          there. That temperature is the lowest passive trip point (Linux's thermal sysfs interface: where passive cooling sets in); the
          critical point of coretemp and k10temp (TjMax, where the chip's own throttling sets in); else CRITICAL_MARGIN_C below a zone's
          critical trip point, at which the board switches itself off. HEAT_FACTOR is a choice, not a measurement: it stands for a third
          of the clock lost. What is lost in the end shows as a cap, and in the times that the cost model keeps.

The counters of throttling are no factor either: when they rise the clock has dropped already, and the costs show it; they are words.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HEAT_BAND_C = 10.0
HEAT_FACTOR = 1.5
CRITICAL_MARGIN_C = 10.0
MOST_FACTOR = 8.0  # as much as the cost model inflates at most
COLDEST_C, HOTTEST_C = -60.0, 200.0  # beyond this it is no temperature of a board
MOST_FILE_BYTES = 256 << 10
MOST_ENTRIES = 256  # of one folder
MOST_TRIPS = 16
MOST_PROBLEMS = 32
# Zones of Tegra boards that are no sensors: the first reads 100 degrees for ever, the second is computed from the others.
NO_SENSORS = ("PMIC-Die", "thermal-fan-est")
CHIP_SENSORS = ("coretemp", "k10temp")
_GPU = re.compile(r"gpu|\.g[pv]1[01]b$|\.ga10b$", re.IGNORECASE)
_NUMBER = re.compile(r"-?[0-9]{1,19}")


# -- processors and memory ----------------------------------------------------------------------------------------------


def cpu_threads(root: Path = Path("/")) -> int:
    """Processors that this process may keep busy at once: affinity and every cgroup's quota, rounded down, at least 1.

    A quota is `cpu.max` (v2, "QUOTA PERIOD" in microseconds) or `cpu.cfs_quota_us` over `cpu.cfs_period_us` (v1). Threads beyond it make
    every pass slower: the kernel stops them all for the rest of each period (CFS bandwidth control).
    """
    most = float(len(os.sched_getaffinity(0)))
    for folder in _cgroups(root, "cpu"):
        quota, period = _pair(_text(folder / "cpu.max"))
        if quota is None:
            quota, period = _whole(_text(folder / "cpu.cfs_quota_us")), _whole(_text(folder / "cpu.cfs_period_us"))
        if quota is not None and period is not None and quota > 0 and period > 0:
            most = min(most, quota / period)
    return max(1, int(most))


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can have: MemTotal, or less where a cgroup says so (`memory.max`, `memory.limit_in_bytes`)."""
    found = re.search(r"^MemTotal:\s*([0-9]{1,15}) kB$", _text(root / "proc/meminfo") or "", re.MULTILINE)
    most = int(found.group(1)) << 10 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _whole(_text(folder / name))
            if limit is not None and limit > 0:
                most = min(most, limit)
    return most


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroups that may limit `controller`, from its own up to the root of each mounted hierarchy.

    A container often sees the host's path in /proc/self/cgroup and has its own cgroup mounted as the root: the path is taken relative
    to what was mounted (fourth field of mountinfo), and the mount's root alone where it does not lie below that.
    """
    paths: dict[str, str] = {}
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif controller in controllers.split(","):
            paths["cgroup"] = path
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines()[: 4 * MOST_ENTRIES]:
        fields = line.split(" ")
        if "-" not in fields[6:] or len(fields) < fields.index("-", 6) + 4:
            continue
        kind, options = fields[fields.index("-", 6) + 1], fields[fields.index("-", 6) + 3].split(",")
        if kind not in paths or (kind == "cgroup" and controller not in options):
            continue
        base, top = _unescaped(fields[3]), root / _unescaped(fields[4]).lstrip("/")
        path = paths[kind]
        below = path if base == "/" else path[len(base) :] if path == base or path.startswith(f"{base}/") else ""
        parts = [p for p in below.split("/") if p]
        if ".." in parts or len(parts) > MOST_ENTRIES:
            parts = []
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def _unescaped(text: str) -> str:
    """Octal escapes of mountinfo: a blank is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), text)


# -- the state of the board ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heat:
    """One sensor, in degrees Celsius. `throttles_c` is where throttling begins, None where nothing says so."""

    name: str
    temperature_c: float
    throttles_c: float | None

    @property
    def factor(self) -> float:
        """1 up to HEAT_BAND_C below the throttling point, HEAT_FACTOR at it and above, linear between."""
        if self.throttles_c is None:
            return 1.0
        share = (self.temperature_c - (self.throttles_c - HEAT_BAND_C)) / HEAT_BAND_C
        return 1.0 + (HEAT_FACTOR - 1.0) * min(1.0, max(0.0, share))


@dataclass(frozen=True)
class Clock:
    """One clock in kHz: what it does at the moment (0: unknown; low while idle), what it is capped at, and what the chip could do."""

    name: str
    now_khz: int
    cap_khz: int
    top_khz: int

    @property
    def factor(self) -> float:
        return min(MOST_FACTOR, max(1.0, self.top_khz / self.cap_khz))


@dataclass(frozen=True)
class Power:
    """What was read. `board` and `mode` are empty where the board has none; `on_battery` and `battery_percent` are None where no supply
    tells; the counters are since boot, None where there are none. `problems` are files that held no such value, and why."""

    heat: tuple[Heat, ...] = ()
    clocks: tuple[Clock, ...] = ()
    board: str = ""
    mode: str = ""
    on_battery: bool | None = None
    battery_percent: int | None = None
    thermal_throttles: int | None = None
    over_currents: int | None = None
    problems: tuple[str, ...] = field(default=())

    @property
    def factor(self) -> float:
        """By how much predictions are to be multiplied, in [1, MOST_FACTOR]; the module says by which rule."""
        return max([1.0, *(h.factor for h in self.heat), *(c.factor for c in self.clocks)])

    def against(self, measured: Power) -> float:
        """By how much costs that were measured in the state `measured` are to be multiplied now, in [1, MOST_FACTOR]: a cap that stood
        already when they were measured is in them."""
        return max(1.0, self.factor / measured.factor)

    @property
    def words(self) -> tuple[str, ...]:
        """For a person: what slows the board or soon will, and what it runs on; empty where there is nothing to say."""
        said = [
            f"{h.name} is at {h.temperature_c:.0f} °C and throttles at {h.throttles_c:.0f} °C: predictions times {h.factor:.2f}"
            for h in self.heat
            if h.factor > 1.0
        ]
        said += [
            f"{c.name} is capped at {c.cap_khz / 1e3:.0f} of {c.top_khz / 1e3:.0f} MHz: predictions times {c.factor:.2f}"
            for c in self.clocks
            if c.factor > 1.0
        ]
        if self.mode:
            said.append(f"power mode {self.mode}")
        if self.on_battery:
            said.append("on battery" + ("" if self.battery_percent is None else f", {self.battery_percent} %"))
        return tuple(said)

    def risen(self, earlier: Power) -> tuple[str, ...]:
        """For a person: what throttled between `earlier` and now, by the board's counters."""
        said = []
        for now, then, what in (
            (self.thermal_throttles, earlier.thermal_throttles, "the processor throttled for heat"),
            (self.over_currents, earlier.over_currents, "the board throttled for current or low voltage"),
        ):
            if now is not None and then is not None and now > then:
                said.append(f"{what} {now - then} times")
        return tuple(said)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "factor": round(self.factor, 4), "words": list(self.words)}


def read(root: Path = Path("/")) -> Power:
    """The state of the board now; `root` is another file system for tests. Never raises for what is absent or malformed."""
    look = _Look(root)
    on_battery, percent = look.supply()
    return Power(
        heat=(*look.zones(), *look.chips()),
        clocks=(*look.processors(), *look.gpus()),
        board=_clean(_text(root / "proc/device-tree/model")),
        mode=look.mode(),
        on_battery=on_battery,
        battery_percent=percent,
        thermal_throttles=look.throttles(),
        over_currents=look.over_currents(),
        problems=tuple(look.problems),
    )


class _Look:
    """One reading. Collects what could not be used."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[str] = []

    def _problem(self, path: Path, why: str) -> None:
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(f"/{path.relative_to(self.root)}: {why}")

    def _number(self, path: Path, low: float, high: float, unit: float = 1.0) -> float | None:
        """The number in a file over `unit`; None where there is no file, or, as a problem, where it is none between low and high."""
        text = _text(path)
        if text is None:
            if os.path.lexists(path):
                self._problem(path, "cannot be read")
            return None
        if not _NUMBER.fullmatch(text.strip()):
            self._problem(path, f"not a number: {_clean(text)[:20]!r}")
            return None
        value = int(text.strip()) / unit  # strip takes more off than int allows
        if not low <= value <= high:
            self._problem(path, f"{value:g} is out of range")
            return None
        return value

    def _celsius(self, path: Path) -> float | None:
        return self._number(path, COLDEST_C, HOTTEST_C, 1000.0)

    def zones(self) -> Iterator[Heat]:
        for zone in _entries(self.root / "sys/class/thermal", "thermal_zone"):
            kind = _clean(_text(zone / "type")) or zone.name
            if kind in NO_SENSORS:
                continue
            temperature = self._celsius(zone / "temp")
            if temperature is None:
                continue
            trips: dict[str, list[float]] = {"passive": [], "critical": []}
            for i in range(MOST_TRIPS):
                what = _clean(_text(zone / f"trip_point_{i}_type"))
                if not what:
                    break
                # Points of 0 and below are switched off; drivers write absolute zero and less.
                if what in trips and (at := self._number(zone / f"trip_point_{i}_temp", -1e3, HOTTEST_C, 1e3)) is not None and at > 0:
                    trips[what].append(at)
            throttles = min(trips["passive"], default=None)
            if throttles is None and trips["critical"]:
                throttles = min(trips["critical"]) - CRITICAL_MARGIN_C
            yield Heat(kind, temperature, throttles)

    def chips(self) -> Iterator[Heat]:
        for chip in _entries(self.root / "sys/class/hwmon", "hwmon"):
            kind = _clean(_text(chip / "name"))
            if kind not in CHIP_SENSORS:
                continue
            hottest: Heat | None = None
            for path in _entries(chip, "temp"):
                if not path.name.endswith("_input"):
                    continue
                temperature = self._celsius(path)
                critical = self._celsius(path.with_name(path.name.replace("_input", "_crit")))
                if temperature is not None and critical is not None and critical > 0:
                    found = Heat(kind, temperature, critical)
                    if hottest is None or found.temperature_c - critical > hottest.temperature_c - (hottest.throttles_c or 0):
                        hottest = found
            if hottest is not None:
                yield hottest

    def processors(self) -> Iterator[Clock]:
        folders = _entries(self.root / "sys/devices/system/cpu/cpufreq", "policy")
        if not folders:
            folders = [c / "cpufreq" for c in _entries(self.root / "sys/devices/system/cpu", "cpu")]
        for folder in folders:
            name = folder.name if folder.name != "cpufreq" else folder.parent.name
            top = self._number(folder / "cpuinfo_max_freq", 1, 1e9)
            cap = self._number(folder / "scaling_max_freq", 1, 1e9)
            now = self._number(folder / "scaling_cur_freq", 0, 1e9)
            if top is not None and cap is not None:
                yield Clock(name, int(now or 0), int(cap), int(top))

    def gpus(self) -> Iterator[Clock]:
        """devfreq in Hz. What the chip could do is the largest frequency that it lists: `max_freq` is the cap."""
        for folder in _entries(self.root / "sys/class/devfreq", ""):
            if not _GPU.search(folder.name):
                continue
            listed = [int(n) for n in (_text(folder / "available_frequencies") or "").split()[:MOST_ENTRIES] if _NUMBER.fullmatch(n)]
            cap = self._number(folder / "max_freq", 1e3, 1e12, 1.0)
            now = self._number(folder / "cur_freq", 0, 1e12, 1.0)
            if cap is not None and 1e3 <= max(listed, default=0) <= 1e12:
                yield Clock(folder.name, int(now or 0) // 1000, int(cap) // 1000, max(listed) // 1000)

    def throttles(self) -> int | None:
        """Packages count each event once for each of their processors, so the largest counts; cores count their own."""
        packages: list[float] = []
        cores: list[float] = []
        for cpu in _entries(self.root / "sys/devices/system/cpu", "cpu"):
            for name, into in (("package_throttle_count", packages), ("core_throttle_count", cores)):
                found = self._number(cpu / "thermal_throttle" / name, 0, 1e18)
                if found is not None:
                    into.append(found)
        return int(max(packages, default=0) + sum(cores)) if packages or cores else None

    def over_currents(self) -> int | None:
        found = [
            self._number(path, 0, 1e18)
            for chip in _entries(self.root / "sys/class/hwmon", "hwmon")
            for path in _entries(chip, "oc")
            if re.fullmatch(r"oc[0-9]+_event_cnt", path.name)
        ]
        known = [n for n in found if n is not None]
        return int(sum(known)) if known else None

    def mode(self) -> str:
        """ "MAXN (0)": the number from nvpmodel's own file ("pmode:0002"), the name from its configuration where that has one."""
        path = self.root / "var/lib/nvpmodel/status"
        text = _text(path)
        if text is None:
            return ""
        found = re.search(r"pmode:([0-9]{1,6})", text)
        if found is None:
            self._problem(path, f"no power mode: {_clean(text)[:20]!r}")
            return ""
        number = int(found.group(1))
        name = re.search(rf"<\s*POWER_MODEL\s+ID=0*{number}\s+NAME=([A-Za-z0-9_.-]{{1,40}})", _text(self.root / "etc/nvpmodel.conf") or "")
        return f"{name.group(1)} ({number})" if name else str(number)

    def supply(self) -> tuple[bool | None, int | None]:
        """(on battery, per cent). On battery: one discharges and no mains is online. Batteries of mice and pens do not count."""
        discharging: bool | None = None
        online: bool | None = None
        percent: float | None = None
        for folder in _entries(self.root / "sys/class/power_supply", ""):
            kind = _clean(_text(folder / "type"))
            if _clean(_text(folder / "scope")) == "Device":
                continue
            if kind == "Battery":
                discharging = bool(discharging) or _clean(_text(folder / "status")) == "Discharging"
                charge = self._number(folder / "capacity", 0, 100)
                percent = charge if percent is None else percent if charge is None else min(percent, charge)
            elif kind in ("Mains", "USB"):
                state = self._number(folder / "online", 0, 2)
                online = online if state is None else bool(online) or state > 0
        on_battery = None if discharging is None and online is None else bool(discharging) and not online
        return on_battery, None if percent is None else int(percent)


# -- files --------------------------------------------------------------------------------------------------------------


def _entries(folder: Path, prefix: str) -> list[Path]:
    """What lies in a folder and is named `prefix` and more, at most MOST_ENTRIES, by name with numbers in their order."""
    try:
        with os.scandir(folder) as found:
            names = [e.name for _, e in zip(range(16 * MOST_ENTRIES), found, strict=False) if e.name.startswith(prefix)]
    except OSError:
        return []
    ordered = sorted(names, key=lambda n: [(not p.isdigit(), int(p) if p.isdecimal() else 0, p) for p in re.split(r"([0-9]+)", n)])
    return [folder / name for name in ordered[:MOST_ENTRIES]]


def _text(path: Path) -> str | None:
    """The beginning of a file, without waiting for a pipe; None where it is absent or cannot be read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # The kernel gives many of these files page by page.
            parts, left = [], MOST_FILE_BYTES
            while left > 0 and (part := os.read(handle, left)):
                parts.append(part)
                left -= len(part)
            return b"".join(parts).decode("utf-8", "replace")
        finally:
            os.close(handle)
    except (OSError, ValueError):
        return None


def _clean(text: str | None) -> str:
    """One line for a person: the device tree ends its strings with a zero byte."""
    return "".join(c for c in (text or "")[:120] if c.isprintable()).strip()


def _whole(text: str | None) -> int | None:
    return int(text.strip()) if text is not None and _NUMBER.fullmatch(text.strip()) else None


def _pair(text: str | None) -> tuple[int | None, int | None]:
    quota, _, period = (text or "").strip().partition(" ")
    return _whole(quota), _whole(period)


class Watch:
    """`factor()` of now, read at most every `every_s`: predictions are made many times a second, and heat does not change so fast.
    Thread-safe: at worst two threads read at once."""

    def __init__(self, root: Path = Path("/"), every_s: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._every_s, self._clock = root, every_s, clock
        self._read_s = -math.inf
        self.now = Power()

    def factor(self) -> float:
        if self._clock() - self._read_s >= self._every_s:
            self._read_s = self._clock()
            self.now = read(self._root)
        return self.now.factor
