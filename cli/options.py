"""Options that are given as text, parsed."""

from __future__ import annotations

import typer


def patch_sizes_given(text: str) -> str | int | list[int]:
    """The value of ``--sizes``: a table's name, one size, or a list, in the text or in a file."""
    if text.endswith(".json"):
        from els.storage.manifests import read_json

        try:
            listed = read_json(text)
        except FileNotFoundError:
            raise ValueError(
                f"--sizes {text} is not there; els calibrate makes one, or write a JSON list of "
                "sizes, such as [3, 3, 5]"
            ) from None
        except ValueError as error:
            raise ValueError(f"--sizes {text}: {error}") from None
        if isinstance(listed, dict) and listed.get("format") == "els-sizes":
            listed = listed.get("sizes")
        # JSON's true and 3.0 are no integers, though they equal some.
        if not isinstance(listed, list) or not all(type(size) is int for size in listed):
            raise ValueError(
                f"--sizes {text} must hold a JSON list of integers, such as [3, 3, 5], or come "
                "from els calibrate"
            )
        return listed
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        return text
    return numbers if "," in text else numbers[0]


def warn_of_another_boundary(text: str, boundary: str) -> None:
    """Warn if ``--sizes`` is a file that was calibrated for another boundary than the machine's.

    Args:
        text: the value of ``--sizes``, which :func:`patch_sizes_given` takes.
        boundary: of the machine.
    """
    if not text.endswith(".json"):
        return
    from els.storage.manifests import read_json

    content = read_json(text)
    calibrated = content.get("boundary", boundary) if isinstance(content, dict) else boundary
    if calibrated != boundary:
        typer.echo(
            f"warning: --sizes {text} was calibrated for --boundary {calibrated}, not {boundary}; "
            "images will be less like the network's",
            err=True,
        )


def label_given(text: str | None) -> int | str | None:
    """The value of ``--label``: the number of a class, or its name; None if it is not given."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return text


def memory_given(text: str) -> int:
    """An amount of memory such as 4GB, 800MB or 1.5 GB."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        amount = round(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        amount = 0
    if amount < 1:
        raise ValueError(f"--memory must be an amount such as 4GB or 800MB, got {text!r}")
    return amount


def resize_given(text: str) -> int | tuple[int, int]:
    """The value of ``--resize``: one side, or a height and a width."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"--resize {text!r} must be a side or a height and a width, such as 32x48")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])
