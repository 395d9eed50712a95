"""What one file may cost. Hides nothing: the one place where every bound on a file from outside stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from appliance.errors import EmptyPixels, StudyTooLarge


@dataclass(frozen=True)
class Limits:
    """What one file may cost. Sizes in bytes, times in seconds; every number must be positive.

    `max_decoded_bytes` bounds the stored pixels and the inflated data set; `decode_memory_bytes` is the address space that a
    codec may add; `max_elements` counts data elements, items and fragments, at any depth.
    """

    max_bytes: int = 64 << 20
    max_rows: int = 4096
    max_columns: int = 4096
    max_pixels: int = 4096 * 4096
    max_decoded_bytes: int = 96 << 20
    max_sequence_depth: int = 32
    max_elements: int = 250_000
    decode_timeout_s: float = 15.0
    decode_memory_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")

    def check_size(self, rows: int, columns: int) -> None:
        """Raises EmptyPixels, StudyTooLarge."""
        if rows <= 0 or columns <= 0:
            raise EmptyPixels("the image has no pixels", value=f"{rows} x {columns}")
        if rows > self.max_rows or columns > self.max_columns or rows * columns > self.max_pixels:
            most = f"{self.max_rows} x {self.max_columns} and {self.max_pixels} pixels"
            raise StudyTooLarge(f"the image is larger than {most}", value=f"{rows} x {columns}")


DEFAULT_LIMITS: Final = Limits()
