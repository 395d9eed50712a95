"""`make bench`: every benchmark in turn, engine latency, heatmap, end to end, on this machine."""

from __future__ import annotations

from benchmarks import cam, end_to_end, engines


def main() -> int:
    engines.main([])
    print()
    cam.main([])
    print()
    return end_to_end.main(["--http"])


if __name__ == "__main__":
    raise SystemExit(main())
