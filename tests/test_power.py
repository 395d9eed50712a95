"""What the board says, read from file systems made up for it: every figure where it lies on real boards, and every way to lack it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance import power
from appliance.power import Clock, Heat, Power

ZONE = "sys/class/thermal/thermal_zone0"
POLICY = "sys/devices/system/cpu/cpufreq/policy0"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def zone(temperature: str, *trips: tuple[str, str], number: int = 0, kind: str = "cpu-thermal") -> dict[str, str]:
    folder = f"sys/class/thermal/thermal_zone{number}"
    files = {f"{folder}/type": f"{kind}\n", f"{folder}/temp": f"{temperature}\n"}
    for i, (what, at) in enumerate(trips):
        files |= {f"{folder}/trip_point_{i}_type": f"{what}\n", f"{folder}/trip_point_{i}_temp": f"{at}\n"}
    return files


# -- processors and memory ----------------------------------------------------------------------------------------------

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def v1(controller: str, mounted: str = "/") -> str:
    return f"35 31 0:32 {mounted} /sys/fs/cgroup/{controller} rw,relatime shared:9 master:1 - cgroup cgroup rw,{controller}\n"


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.mark.usefixtures("sixteen")
@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 16),
        ({"sys/fs/cgroup/box/cpu.max": "max 100000\n"}, 16),
        ({"sys/fs/cgroup/box/cpu.max": "250000 100000\n"}, 2),
        ({"sys/fs/cgroup/box/cpu.max": "270000 100000\n"}, 2),
        ({"sys/fs/cgroup/box/cpu.max": "20000 100000\n"}, 1),
        ({"sys/fs/cgroup/box/cpu.max": "max 100000\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"sys/fs/cgroup/box/cpu.max": "2000000 100000\n"}, 16),
        ({"sys/fs/cgroup/box/cpu.max": "many 100000\n"}, 16),
        ({"sys/fs/cgroup/box/cpu.max": "200000 0\n"}, 16),
        ({"sys/fs/cgroup/box/cpu.max": ""}, 16),
    ],
)
def test_threads_of_a_quota_of_the_second_version(tmp_path: Path, files: dict[str, str], threads: int) -> None:
    tree(tmp_path, {"proc/self/cgroup": "0::/box\n", "proc/self/mountinfo": V2, **files})
    assert power.cpu_threads(tmp_path) == threads


@pytest.mark.usefixtures("sixteen")
def test_threads_of_a_quota_of_the_first_version(tmp_path: Path) -> None:
    places = {"proc/self/cgroup": "4:memory:/a\n2:cpuacct,cpu:/a/b\n0::/\n", "proc/self/mountinfo": v1("cpu") + V2}
    quota = {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "450000", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"}
    none = {"sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000"}
    assert power.cpu_threads(tree(tmp_path, places | quota | none)) == 4


@pytest.mark.usefixtures("sixteen")
@pytest.mark.parametrize(
    ("mounted", "path"),
    [("/docker/abc", "/docker/abc/own"), ("/docker/abc", "/elsewhere/own"), ("/docker/abc", "/docker/abcd"), ("/", "/../../own")],
)
def test_a_container_sees_its_own_cgroup_as_the_root(tmp_path: Path, mounted: str, path: str) -> None:
    """The path is the host's; what is mounted begins further down."""
    places = {"proc/self/cgroup": f"2:cpu:{path}\n", "proc/self/mountinfo": v1("cpu", mounted)}
    quota = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    outside = {"own/cpu.cfs_quota_us": "100000", "own/cpu.cfs_period_us": "100000"}
    assert power.cpu_threads(tree(tmp_path, places | quota | outside)) == 3


def test_affinity_bounds_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    places = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": "900000 100000"}
    assert power.cpu_threads(tree(tmp_path, places)) == 2


def test_memory_is_what_the_machine_has_or_a_cgroup_leaves(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/meminfo": "MemTotal:       1000 kB\nMemFree:  1 kB\n"})
    assert power.memory_limit_bytes(tmp_path) == 1000 << 10
    tree(tmp_path, {"proc/self/cgroup": "0::/a b/c\n", "proc/self/mountinfo": V2.replace("/sys/fs/cgroup", "/sys/fs/c\\040group")})
    tree(tmp_path, {"sys/fs/c group/a b/c/memory.max": "max\n", "sys/fs/c group/a b/memory.max": "512000\n"})
    assert power.memory_limit_bytes(tmp_path) == 512_000
    tree(tmp_path, {"proc/self/cgroup": "4:memory:/m\n", "proc/self/mountinfo": v1("memory")})
    tree(tmp_path, {"sys/fs/cgroup/memory/m/memory.limit_in_bytes": "9223372036854771712\n"})
    assert power.memory_limit_bytes(tmp_path) == 1000 << 10
    tree(tmp_path, {"sys/fs/cgroup/memory/m/memory.limit_in_bytes": "400000\n"})
    assert power.memory_limit_bytes(tmp_path) == 400_000


def test_without_any_file_memory_is_asked_of_the_system(tmp_path: Path) -> None:
    assert power.memory_limit_bytes(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_this_machine_has_threads_and_memory() -> None:
    assert 1 <= power.cpu_threads() <= len(os.sched_getaffinity(0))
    assert power.memory_limit_bytes() > 64 << 20
    assert 1.0 <= power.read().factor <= power.MOST_FACTOR


def test_a_long_file_is_read_page_by_page_and_no_further_than_its_bound(tmp_path: Path) -> None:
    """mountinfo of a host with many containers is long, and the line that counts may be its last."""
    other = "99 31 0:32 / /mnt/x rw - ext4 /dev/x rw\n" * 500
    places = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": other + V2, "sys/fs/cgroup/memory.max": "1000000"}
    assert power.memory_limit_bytes(tree(tmp_path, places)) == 1_000_000
    (tmp_path / "endless").symlink_to("/dev/zero")
    text = power._text(tmp_path / "endless")
    assert text is not None
    assert len(text) == power.MOST_FILE_BYTES


# -- heat ---------------------------------------------------------------------------------------------------------------


def test_a_board_that_says_nothing_is_believed(tmp_path: Path) -> None:
    found = power.read(tmp_path)
    assert found == Power()
    assert found.factor == 1.0
    assert found.words == ()


@pytest.mark.parametrize(
    ("temperature", "factor"), [("20000", 1.0), ("75000", 1.0), ("80000", 1.25), ("85000", 1.5), ("99000", 1.5), ("-5000", 1.0)]
)
def test_heat_counts_from_ten_degrees_below_the_passive_point(tmp_path: Path, temperature: str, factor: float) -> None:
    found = power.read(tree(tmp_path, zone(temperature, ("active", "50000"), ("passive", "85000"), ("critical", "105000"))))
    assert found.factor == pytest.approx(factor)
    assert found.problems == ()
    assert (found.words != ()) == (factor > 1)


def test_the_words_of_heat_name_sensor_and_degrees(tmp_path: Path) -> None:
    found = power.read(tree(tmp_path, zone("80000", ("passive", "85000"))))
    assert found.words == ("cpu-thermal is at 80 °C and throttles at 85 °C: predictions times 1.25",)


def test_the_hottest_zone_and_the_lowest_passive_point_count(tmp_path: Path) -> None:
    files = zone("80000", ("passive", "95000"), ("passive", "85000")) | zone("40000", ("passive", "85000"), number=1, kind="gpu-thermal")
    assert power.read(tree(tmp_path, files)).factor == pytest.approx(1.25)


def test_a_zone_with_a_critical_point_alone_throttles_before_it(tmp_path: Path) -> None:
    assert power.read(tree(tmp_path, zone("85000", ("critical", "100000")))).factor == pytest.approx(1.25)


@pytest.mark.parametrize("off", ["0", "-274000"])
def test_a_point_that_is_switched_off_is_none(tmp_path: Path, off: str) -> None:
    found = power.read(tree(tmp_path, zone("80000", ("passive", off))))
    assert found.heat == (Heat("cpu-thermal", 80.0, None),)
    assert (found.factor, found.problems) == (1.0, ())


def test_zones_that_are_no_sensors_do_not_count(tmp_path: Path) -> None:
    files = zone("100000", ("passive", "100000"), kind="PMIC-Die") | zone("90000", ("passive", "80000"), number=1, kind="thermal-fan-est")
    assert power.read(tree(tmp_path, files)).heat == ()


def test_the_chips_own_sensors_throttle_at_their_critical_point(tmp_path: Path) -> None:
    folder = "sys/class/hwmon/hwmon2"
    files = {f"{folder}/name": "coretemp\n", "sys/class/hwmon/hwmon1/name": "nvme\n", "sys/class/hwmon/hwmon1/temp1_input": "99000\n"}
    files |= {f"{folder}/temp1_input": "70000\n", f"{folder}/temp1_crit": "100000\n"}
    files |= {f"{folder}/temp10_input": "95000\n", f"{folder}/temp10_crit": "100000\n", f"{folder}/temp3_input": "99000\n"}
    found = power.read(tree(tmp_path, files))
    assert found.heat == (Heat("coretemp", 95.0, 100.0),)
    assert found.factor == pytest.approx(1.25)


@pytest.mark.parametrize("text", ["", "hot", "85.5", "nan", "0x50", "999999999", "-100000", "8" * 30, "\x00\x01\x02", "٨٥٠٠٠"])
def test_a_temperature_that_is_none_is_left_out_with_its_reason(tmp_path: Path, text: str) -> None:
    found = power.read(tree(tmp_path, zone(text, ("passive", "85000"))))
    assert found.heat == ()
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"/{ZONE}/temp: ")
    assert found.factor == 1.0


def test_a_file_that_cannot_be_read_is_left_out_with_its_reason(tmp_path: Path) -> None:
    """Sensors of sleeping devices answer with an error, as a folder does."""
    tree(tmp_path, {f"{ZONE}/type": "iwlwifi_1"})
    (tmp_path / ZONE / "temp").mkdir()
    assert power.read(tmp_path).problems == (f"/{ZONE}/temp: cannot be read",)


def test_a_pipe_in_place_of_a_file_does_not_hold_us(tmp_path: Path) -> None:
    tree(tmp_path, {f"{ZONE}/type": "cpu"})
    os.mkfifo(tmp_path / ZONE / "temp")
    assert power.read(tmp_path).heat == ()


def test_problems_and_entries_have_an_end(tmp_path: Path) -> None:
    for number in range(power.MOST_ENTRIES + 30):
        tree(tmp_path, zone("x", number=number))
    assert len(power.read(tmp_path).problems) == power.MOST_PROBLEMS
    for number in range(power.MOST_ENTRIES + 30):
        tree(tmp_path, zone("50000", number=number))
    assert len(power.read(tmp_path).heat) == power.MOST_ENTRIES


# -- clocks -------------------------------------------------------------------------------------------------------------


def policy(top: str, cap: str, number: int = 0) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpufreq/policy{number}"
    return {f"{folder}/cpuinfo_max_freq": top, f"{folder}/scaling_max_freq": cap, f"{folder}/scaling_cur_freq": "400000"}


def test_the_most_capped_clock_counts_and_an_idle_one_does_not(tmp_path: Path) -> None:
    found = power.read(tree(tmp_path, policy("2000000", "2000000") | policy("3000000", "1500000", 4)))
    assert found.factor == pytest.approx(2.0)
    assert found.clocks[1] == Clock("policy4", 400_000, 1_500_000, 3_000_000)
    assert found.words == ("policy4 is capped at 1500 of 3000 MHz: predictions times 2.00",)


def test_an_old_kernel_keeps_the_clocks_beside_the_processors(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu/cpu1/cpufreq"
    files = {f"{folder}/cpuinfo_max_freq": "3000000", f"{folder}/scaling_max_freq": "2000000"}
    assert power.read(tree(tmp_path, files)).clocks == (Clock("cpu1", 0, 2_000_000, 3_000_000),)


@pytest.mark.parametrize(("top", "cap"), [("3000000", "0"), ("0", "3000000"), ("fast", "3000000"), ("3000000", "")])
def test_a_clock_that_cannot_be_is_left_out(tmp_path: Path, top: str, cap: str) -> None:
    found = power.read(tree(tmp_path, policy(top, cap)))
    assert (found.clocks, found.factor) == ((), 1.0)
    assert found.problems != ()


def test_the_graphics_processor_of_a_jetson_may_be_capped(tmp_path: Path) -> None:
    folder = "sys/class/devfreq/17000000.ga10b"
    files = {f"{folder}/available_frequencies": "306000000 612000000 1224000000\n", f"{folder}/max_freq": "612000000\n"}
    files |= {
        f"{folder}/cur_freq": "306000000\n",
        "sys/class/devfreq/emc/max_freq": "1\n",
        "sys/class/devfreq/emc/available_frequencies": "9",
    }
    found = power.read(tree(tmp_path, files))
    assert found.clocks == (Clock("17000000.ga10b", 306_000, 612_000, 1_224_000),)
    assert found.factor == pytest.approx(2.0)


def test_heat_is_the_forecast_of_a_cap_so_they_are_not_multiplied(tmp_path: Path) -> None:
    found = power.read(tree(tmp_path, zone("90000", ("passive", "85000")) | policy("3000000", "2500000")))
    assert found.factor == pytest.approx(1.5)


def test_what_stood_when_costs_were_measured_is_in_them_already() -> None:
    half = Power(clocks=(Clock("a", 0, 1_000, 2_000),))
    quarter = Power(clocks=(Clock("a", 0, 500, 2_000),))
    assert half.against(half) == 1.0
    assert quarter.against(half) == pytest.approx(2.0)
    assert Power().against(half) == 1.0  # it may have become faster; that is not promised before it is measured


# -- power and counters -------------------------------------------------------------------------------------------------


def supply(name: str, **files: str) -> dict[str, str]:
    return {f"sys/class/power_supply/{name}/{key}": f"{value}\n" for key, value in files.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None)),
        (supply("AC", type="Mains", online="1"), (False, None)),
        (supply("port", type="USB", online="0"), (False, None)),  # a board without a battery has ports that feed nothing
        (supply("BAT0", type="Battery", status="Discharging", capacity="43"), (True, 43)),
        (supply("BAT0", type="Battery", status="Charging", capacity="43"), (False, 43)),
        (supply("AC", type="Mains", online="1") | supply("BAT0", type="Battery", status="Discharging", capacity="99"), (False, 99)),
        (supply("hid", type="Battery", scope="Device", status="Discharging", capacity="5"), (None, None)),
        (supply("BAT0", type="Battery", status="Discharging", capacity="150"), (True, None)),
        (
            supply("A", type="Battery", status="Full", capacity="90") | supply("B", type="Battery", status="Discharging", capacity="7"),
            (True, 7),
        ),
    ],
)
def test_battery_and_mains(tmp_path: Path, files: dict[str, str], expected: tuple[bool | None, int | None]) -> None:
    found = power.read(tree(tmp_path, files))
    assert (found.on_battery, found.battery_percent) == expected
    assert found.factor == 1.0  # what a saver takes away is a cap of the clock; nothing else is guessed


def test_a_jetson_tells_its_model_its_mode_and_its_over_currents(tmp_path: Path) -> None:
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\x00",
        "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        "sys/class/hwmon/hwmon3/name": "soctherm_oc",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "1",
        "sys/class/hwmon/hwmon3/oc3_event_cnt": "37",
        "sys/class/hwmon/hwmon3/oc1_throt_en": "1",
    }
    found = power.read(tree(tmp_path, files))
    assert (found.board, found.mode, found.over_currents) == ("NVIDIA Jetson Orin Nano Developer Kit", "MAXN_SUPER (2)", 38)
    assert found.words == ("power mode MAXN_SUPER (2)",)
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert power.read(tmp_path).mode == "2"
    (tmp_path / "var/lib/nvpmodel/status").write_text("broken")
    assert power.read(tmp_path).mode == ""
    assert power.read(tmp_path).problems == ("/var/lib/nvpmodel/status: no power mode: 'broken'",)


def test_counters_of_throttling_are_told_apart_in_time(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
    files = {cpu.format(n, "package"): "7" for n in (0, 1, 10)} | {cpu.format(n, "core"): "1" for n in (0, 1, 10)}
    before = power.read(tree(tmp_path, files))
    assert before.thermal_throttles == 10  # one package, three cores
    assert before.factor == 1.0
    after = power.read(tree(tmp_path, {cpu.format(0, "package"): "9"}))
    assert after.risen(before) == ("the processor throttled for heat 2 times",)
    assert before.risen(before) == ()
    assert after.risen(Power()) == ()


def test_all_of_it_is_json(tmp_path: Path) -> None:
    files = zone("80000", ("passive", "85000")) | policy("2", "1") | supply("BAT0", type="Battery", status="Discharging", capacity="43")
    found = power.read(tree(tmp_path, files))
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["factor"] == 2.0
    assert told["heat"] == [{"name": "cpu-thermal", "temperature_c": 80.0, "throttles_c": 85.0}]
    assert told["words"][-1] == "on battery, 43 %"


# -- for any board ------------------------------------------------------------------------------------------------------

degrees = st.integers(-60_000, 200_000)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=degrees, b=degrees, trips=st.lists(st.tuples(st.sampled_from(["passive", "critical", "active", "hot"]), degrees), max_size=4))
def test_hotter_is_never_faster(tmp_path: Path, a: int, b: int, trips: list[tuple[str, int]]) -> None:
    told = tuple((kind, str(at)) for kind, at in trips)
    for number in range(4):
        (tmp_path / ZONE / f"trip_point_{number}_type").unlink(missing_ok=True)
    cold = power.read(tree(tmp_path, zone(str(min(a, b)), *told))).factor
    warm = power.read(tree(tmp_path, zone(str(max(a, b)), *told))).factor
    assert 1.0 <= cold <= warm <= power.HEAT_FACTOR


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(top=st.integers(1, 10**9), caps=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)))
def test_a_lower_cap_is_never_faster(tmp_path: Path, top: int, caps: tuple[int, int]) -> None:
    low, high = (power.read(tree(tmp_path, policy(str(top), str(cap)))).factor for cap in sorted(caps))
    assert 1.0 <= high <= low <= power.MOST_FACTOR


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.binary(max_size=30) | st.integers(-(10**20), 10**20).map(lambda n: str(n).encode()), min_size=20, max_size=20),
)
def test_no_content_of_any_file_raises_or_leaves_the_bounds(tmp_path: Path, contents: list[bytes]) -> None:
    names = [
        *zone("", ("", "")), *policy("", ""), *supply("BAT0", type="", status="", capacity="", online="", scope=""),
        "proc/device-tree/model", "var/lib/nvpmodel/status", "etc/nvpmodel.conf", "sys/class/hwmon/hwmon0/name",
        "sys/class/hwmon/hwmon0/temp1_input", "sys/class/hwmon/hwmon0/oc1_event_cnt", "proc/self/cgroup", "proc/self/mountinfo",
        "proc/meminfo",
    ]  # fmt: skip
    for name, content in zip(names, contents, strict=False):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = power.read(tmp_path)
    assert 1.0 <= found.factor <= power.MOST_FACTOR
    json.dumps(found.to_json(), allow_nan=False)
    assert power.cpu_threads(tmp_path) >= 1
    assert power.memory_limit_bytes(tmp_path) > 0


@pytest.mark.parametrize("text", ["\x1c0", "0\x1f", "\x1d-5\x1e", "\u20071"])
def test_whitespace_that_is_no_digit_to_everyone_does_not_raise(tmp_path: Path, text: str) -> None:
    files = {**policy("1000", "1000"), "proc/meminfo": f"MemTotal: {text} kB"}
    root = tree(tmp_path, {name: text if name.endswith("cur_freq") else content for name, content in files.items()})
    (root / "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq").write_text(text)
    assert power.read(root).factor == 1.0
