"""Calibration sets: which images the INT8 ranges come from, as manifests of hashes."""
