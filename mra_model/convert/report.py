"""What a conversion did, and the one error it raises."""

from dataclasses import dataclass, field


class ConversionError(ValueError):
    """A checkpoint that cannot be converted. The message names the file, the value and the remedy."""


@dataclass
class ConversionReport:
    """What a conversion did with every key.

    Attributes:
        renamed: the source's key -> the key written.
        ignored: the source's key -> why it is not written.
        missing: a key that the source lacks -> what that means, or what was written instead.
        warnings: what the user should know.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def some(items: list[str], limit: int = 5) -> str:
    """The first few of a list, for a message: `a, b and 7 more`."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
