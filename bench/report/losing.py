"""Where we lose, none left out; and what has no times because it failed or was wrong."""

from bench.report.blocks import Block, Cell, Section, Table, Text, names, numbers, rows
from bench.report.cases import compared, failures, losses
from bench.report.data import Machine
from bench.report.numbers import count, factor, median, spread


def section(machine: Machine, key: str) -> Section:
    """The section of a machine's losing cases."""
    found = losses(machine)
    blocks: list[Block] = [
        Text(
            "Every case in which what users get unasked is slower than eager, than the library's best route, or than "
            "torch.compile, in either condition, the worst first; only times taken in turns are compared. "
            f"{count(compared(machine), 'kernel case')} and every tower, answer and training step were looked at."
        )
    ]
    if found:
        lines = [
            [
                Cell(loss.what, look="name"),
                loss.condition,
                loss.choice,
                Cell(median(loss.ours), spread(loss.ours)),
                loss.kind if loss.kind == loss.rival else Cell(loss.kind, loss.rival),
                Cell(median(loss.theirs), spread(loss.theirs)),
                Cell(factor(loss.gain.value), look="bad"),
                "no" if loss.gain.is_clear else "yes",
            ]
            for loss in found
        ]
        columns = [*names("case", "condition", "choice"), *numbers("its time"), *names("rival")]
        columns += [*numbers("rival's time", "gain"), *names("spreads overlap")]
        blocks.append(Table(columns, rows(*lines), f"{count(len(found), 'losing comparison')}"))
    else:
        blocks.append(Text("None."))
    refused = failures(machine)
    if refused:
        lines = [
            [Cell(r["case"], look="name"), r["variant"], Cell(r["failure"].strip().splitlines()[-1], hint=r["failure"])]
            for r in refused
        ]
        blocks.append(
            Table(
                names("case", "variant", "why"),
                rows(*lines),
                f"{count(len(refused), 'variant')} without times",
                "Failed, wrong against float64, or not tried: such a variant enters no speed-up above.",
            )
        )
    return Section(key, "Losing cases", blocks)
