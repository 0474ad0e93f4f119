"""Numbers as readers see them; None is what nobody measured."""

from bench.report.data import Ratio, Time

NOT_MEASURED = "not measured"

# A factor's sign, and a dash for ranges and for what there is nothing of; written so that none is taken for x or -.
TIMES, DASH = "\u00d7", "\u2013"

# Microseconds in each, the largest first.
UNITS = {"s": 1e6, "ms": 1e3, "µs": 1.0}


def unit(microseconds: float) -> str:
    """The unit that a duration is best read in."""
    return next((name for name, of in UNITS.items() if microseconds >= of), "µs")


def plain(value: float) -> str:
    """Three digits, or all of them before the point."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:,.{digits}f}" if size >= 0.01 else f"{value:.1e}"


def in_unit(microseconds: float, name: str) -> str:
    """A duration without its unit."""
    return plain(microseconds / UNITS[name])


def duration(microseconds: float | None) -> str:
    """`7.69 s`."""
    if microseconds is None:
        return NOT_MEASURED
    return f"{in_unit(microseconds, unit(microseconds))} {unit(microseconds)}"


def median(time: Time | None) -> str:
    """A time's median with its unit."""
    return duration(None if time is None else time.median)


def spread(time: Time | None) -> str:
    """The 20th to 80th percentile with its unit; nothing where there is no time."""
    if time is None:
        return ""
    name = unit(time.median)
    return f"{in_unit(time.p20, name)}{DASH}{in_unit(time.p80, name)} {name}"


def times(ratio: Ratio | None) -> str:
    """The factor of a ratio."""
    return NOT_MEASURED if ratio is None else factor(ratio.value)


def factor(value: float) -> str:
    """`2.31` and its sign; never rounded up to 1 from below, as a loss must show."""
    if value < 1 and f"{value:.2f}" == "1.00":
        return f"{min(value, 0.999):.3f}{TIMES}"
    return f"{value:.2f}{TIMES}"


def size(count: float | None) -> str:
    """Bytes as `1.50 GiB`."""
    if count is None:
        return NOT_MEASURED
    for shift, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << shift:
            return f"{plain(count / (1 << shift))} {name}"
    return f"{count:.0f} B"


def rate(per_second: float, what: str) -> str:
    """`0.021 TB/s`, or in smaller units where that is easier to read."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if per_second >= scale:
            return f"{plain(per_second / scale)} {prefix}{what}"
    return f"{plain(per_second)} {what}"


def share(value: float | None) -> str:
    """`41%`."""
    return NOT_MEASURED if value is None else f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"


def error(errors: dict[str, float] | None) -> str:
    """The worst of a result's errors against float64."""
    return f"{max(errors.values()):.1e}" if errors else NOT_MEASURED


def count(value: int, one: str, many: str | None = None) -> str:
    """`1 case`, `2 cases`."""
    return f"{value} {one if value == 1 else many or one + 's'}"
