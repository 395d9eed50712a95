"""Every error names what, which value and what to do; codes are unique and their families share an exit code."""

from __future__ import annotations

import re

import pytest

from appliance import errors
from appliance.errors import SpineboxError, all_errors


def test_codes_are_unique_and_well_formed() -> None:
    codes = [e.code for e in all_errors()]
    assert len(codes) == len(set(codes))
    assert codes == sorted(codes)
    assert all(re.fullmatch(r"[a-z]+(\.[a-z0-9-]+)?", c) for c in codes)


def test_the_whole_tree_is_listed() -> None:
    defined = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, SpineboxError)}
    assert set(all_errors()) >= defined
    assert len(defined) >= 28


@pytest.mark.parametrize("error", all_errors(), ids=lambda e: e.code)
def test_each_error_has_a_status_an_exit_code_and_a_remedy(error: type[SpineboxError]) -> None:
    assert 400 <= error.http_status <= 599
    assert 1 <= error.exit_code <= 9
    assert error.default_remedy.endswith(".")
    assert len(error.default_remedy) > 20
    parent = error.__mro__[1]
    if parent is not SpineboxError and issubclass(parent, SpineboxError):
        assert error.exit_code == parent.exit_code
        assert error.code.startswith(f"{parent.code}.")


def test_bad_input_is_a_4xx_and_the_fault_of_the_box_a_5xx() -> None:
    for error in all_errors():
        family = error.code.partition(".")[0]
        if family in ("study", "usage"):
            assert error.http_status < 500, error.code
        if family in ("internal", "bundle", "backend", "compile", "training"):
            assert error.http_status >= 500, error.code


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {
        (name, code, int(status)) for name, code, status in re.findall(r"─ (\w+) +([a-z]+\.[a-z0-9-]+) +(\d{3})", errors.__doc__ or "")
    }
    leaves = {(e.__name__, e.code, e.http_status) for e in all_errors() if "." in e.code and e.code != "usage.invalid"}
    assert drawn == leaves


def test_the_text_names_code_what_value_and_remedy() -> None:
    error = errors.StudyTooLarge("9000 rows are more than 8192", value="9000", remedy="Send a smaller one.")
    assert str(error) == "[study.too-large] 9000 rows are more than 8192 (value: 9000). Send a smaller one."
    assert error.to_json() == {
        "code": "study.too-large",
        "message": "9000 rows are more than 8192",
        "value": "9000",
        "remedy": "Send a smaller one.",
    }


def test_without_a_value_the_text_has_none_and_the_remedy_is_the_usual() -> None:
    error = errors.NoPixels("a report")
    assert str(error) == f"[study.no-pixels] a report. {errors.NoPixels.default_remedy}"
    assert error.to_json()["value"] == ""
    assert errors.NoPixels("a report", value=0).value == "0"


@pytest.mark.parametrize(("length", "kept"), [(199, 199), (200, 200), (201, 200), (10_000_000, 200)])
def test_a_long_value_is_shortened(length: int, kept: int) -> None:
    value = errors.InvalidStudy("long", value="x" * length).value
    assert len(value) == kept
    assert value.endswith("...") == (length > 200)


def test_an_error_is_raised_with_its_cause() -> None:
    def fail() -> None:
        try:
            raise ValueError("vendor text")
        except ValueError as error:
            raise errors.BackendFailed("the runtime failed") from error

    with pytest.raises(SpineboxError, match=r"backend\.failed") as caught:
        fail()
    assert isinstance(caught.value.__cause__, ValueError)
