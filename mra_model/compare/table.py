"""A comparison as a table and a verdict; the parts that lose are shown like those that win."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from mra_model.compare.measure import NEXT_TOKENS, TOWER, Run
from mra_model.compare.peak import Peak
from mra_model.compare.result import (
    EAGER,
    EVEN,
    FUSED,
    SIDES,
    Comparison,
    fused_name,
    part_names,
    part_time,
    same_code,
    speed_up,
    speed_ups,
    verdict,
)
from mra_model.environment import device_name, dtype_name
from mra_model.timing import Spread, spread


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Writes what was compared, the table, the agreement, notes and the verdict."""
    subject = comparison.subject
    console.print(
        f"{subject.name} on {device_name(subject.device)} in {dtype_name(subject.dtype)}; {subject.picture} at "
        f"{subject.side} x {subject.side}; prompt of {subject.inputs['input_ids'].shape[1]} tokens",
        markup=False,
    )
    console.print(_table(comparison))
    for line in _lines(comparison):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    style = "bold red" if comparison.agreement.failures else "bold green"
    console.print(verdict(comparison), markup=False, highlight=False, style=style, soft_wrap=True)


def _table(comparison: Comparison) -> Table:
    count = len(comparison.runs[EAGER])
    runs = f"{count} runs" if count > 1 else "1 run"
    table = Table(title=f"Milliseconds, median (20th-80th percentile) of {runs} each, in turns", title_justify="left")
    table.add_column("")
    for name in (EAGER, fused_name(comparison), "speed-up"):
        table.add_column(name, justify="right")
    for part in part_names(comparison):
        name = f"{part} (all above)" if part == TOWER else part
        _add_times(table, name, comparison, part_time(part), end_section=part == TOWER)
    table.add_section()
    _add_times(table, "time to first token", comparison, lambda run: run.first_token)
    rates = [spread([run.tokens_per_second for run in comparison.runs[side]]) for side in SIDES]
    table.add_row(
        "tokens/s after it",
        *(_shown(rate) for rate in rates),
        _gain(rates[1].median / rates[0].median, NEXT_TOKENS in same_code(comparison)),
    )
    table.add_section()
    table.add_row("peak memory", *_memory(comparison.peaks))
    return table


def _add_times(
    table: Table, name: str, comparison: Comparison, of: Callable[[Run], float], end_section: bool = False
) -> None:
    sides = [spread([of(run) * 1e3 for run in comparison.runs[side]]) for side in SIDES]
    ratio = _gain(speed_up(comparison, of), name in same_code(comparison))
    table.add_row(name, *(_shown(side) for side in sides), ratio, end_section=end_section)


def _shown(value: Spread) -> str:
    """Three digits or more; without percentiles where there is one sample only."""
    digits = 0 if value.median >= 100 else 1
    if value.p20 == value.p80:
        return f"{value.median:.{digits}f}"
    return f"{value.median:.{digits}f} ({value.p20:.{digits}f}-{value.p80:.{digits}f})"


def _gain(ratio: float, same_code: bool) -> str:
    text = f"{ratio:.2f}x"
    if same_code:
        return f"[dim]{text} same code[/dim]"
    if ratio < 1 - EVEN:
        return f"[red]{text} slower[/red]"
    return f"[green]{text}[/green]" if ratio > 1 + EVEN else text


def _memory(peaks: dict[str, Peak]) -> list[str]:
    sizes = [peaks[side].peak for side in SIDES]
    cells = ["not measured" if size is None else f"{size / 2**30:.2f} GiB" for size in sizes]
    eager, fused = sizes
    return [*cells, "" if eager is None or fused is None else f"{fused / eager - 1:+.1%}"]


def _lines(comparison: Comparison) -> list[str]:
    agreement = comparison.agreement
    features = f"vision features differ by {agreement.features:.2e} (allowed {agreement.tolerance:.0e})"
    lines = [f"{features}, logits by {agreement.logits:.2e}, relative", _token_line(comparison)]
    served = comparison.backends[FUSED]
    fast = [f"{op} ({backend})" for op, backend in served.items() if backend != "reference"]
    rest = len(served) - len(fast)
    lines.append(f"fused kernels: {', '.join(fast) or 'none'}; {rest} of {len(served)} ops run on the reference")
    lines += [f"optimized: {what}" for what in comparison.optimized or []]
    names = same_code(comparison)
    same = [gain for name, gain in speed_ups(comparison).items() if name in names]
    lines.append(
        f"the same code on both sides: {', '.join(names)}; their {min(same):.2f}x to {max(same):.2f}x is noise"
    )
    weights = comparison.peaks[EAGER].weights
    if weights is not None:
        lines.append(f"peak memory includes {weights / 2**30:.2f} GiB of weights")
    lines += [f"peak memory, {side}: {peak.problem}" for side, peak in comparison.peaks.items() if peak.problem]
    return lines + [f"note: {note}" for note in comparison.notes]


def _token_line(comparison: Comparison) -> str:
    agreement = comparison.agreement
    if agreement.first_difference is None:
        return f"greedy tokens: all {agreement.tokens} are equal"
    line = f"greedy tokens: equal up to token {agreement.first_difference}, {agreement.tokens} in all"
    if agreement.first_difference >= agreement.compared:
        # A tie that rounding decides: what comes after it has another context.
        line += f"; eager's own two best logits are closer than the tolerance at token {agreement.compared + 1}"
    return line
