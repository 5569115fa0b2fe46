"""The report of `kogia inspect` as tables for people."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kogia.checkpoint.inspection import Report
from kogia.log import printable
from kogia.model.costs import Component, Costs
from kogia.model.facts import architecture, cache_name, component_name


def print_report(report: Report, console: Console | None = None) -> None:
    """On stdout. Nothing is cut off: long lines wrap within their column."""
    console = console or Console(highlight=False)
    costs = report.costs
    console.print()
    console.print(Text.assemble((printable(report.name), "bold"), "   ", (_headline(costs), "cyan")))
    _section(console, "Architecture", _pairs(architecture(report.config)))
    _section(console, "Parameters", _parameters(report))
    _section(console, "Weights", _weights(costs))
    _section(console, "Cache", _cache(costs))
    _section(console, "Compute", _compute(costs))
    if report.stored is not None or report.tokenizer is not None:
        _section(console, "Files", _pairs(_files(report)))
    _print_disagreements(console, report)


def print_presets(reports: Sequence[Report], console: Console | None = None) -> None:
    """One line for each on stdout; memory is that of bfloat16."""
    console = console or Console(highlight=False)
    table = _table(["", "all", "activated", "weights", "context", "its cache"])
    for report in reports:
        costs = report.costs
        active = count(costs.active_params) if has_experts(costs) else ""
        weights, cache = size(costs.weight_bytes["bfloat16"]), size(costs.cache_bytes[0].per_token * costs.context)
        table.add_row(report.name, count(costs.params), active, weights, f"{costs.context:,}", cache)
    _section(console, "Presets and their parameters", table)
    console.print("\n  Memory is that of bfloat16. kogia inspect NAME, or a directory, says more.")


def _headline(costs: Costs) -> str:
    text = f"{count(costs.params)} parameters"
    if not has_experts(costs):
        return text
    return f"{text}, {count(costs.active_params)} activated per token ({costs.active_share:.1%})"


def _section(console: Console, title: str, table: Table) -> None:
    console.print()
    console.print(Text(title, "bold cyan"))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _table(columns: Sequence[str]) -> Table:
    """The first column holds names, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=bool(i))
    return table


def _pairs(lines: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=12)
    table.add_column()
    for name, text in lines.items():
        table.add_row(Text(name, "dim"), text)
    return table


def _parameters(report: Report) -> Table:
    table, costs = _table(["", "all", "share", "per token"]), report.costs
    for part in costs.parts:
        name = component_name(part.component, report.config.moe)
        table.add_row(name, count(part.params), f"{part.params / costs.params:.1%}", count(part.active))
    table.add_section()
    table.add_row("total", count(costs.params), "100%", count(costs.active_params), style="bold")
    if has_experts(costs):
        table.add_row("activated share", "", "", f"{costs.active_share:.1%}", style="bold")
    if has_experts(costs) and costs.embedding_params:
        active = costs.active_params + costs.embedding_params
        table.add_row("with the input embedding", "", f"{active / costs.params:.1%}", count(active), style="dim")
    if costs.mtp_params:
        table.add_row("multi-token prediction, beside these", count(costs.mtp_params), "", "")
    return table


def _weights(costs: Costs) -> Table:
    labels = {"bfloat16": "bfloat16, float16", "fp8": "FP8, blocks of 128 x 128"}
    table = _table(["loaded as", "memory", ""])
    own = costs.weight_bytes["bfloat16"]
    for dtype, nbytes in costs.weight_bytes.items():
        table.add_row(labels.get(dtype, dtype), size(nbytes), f"{nbytes / own:.3g} x")
    return table


def has_experts(costs: Costs) -> bool:
    return any(part.component is Component.ROUTED_EXPERTS for part in costs.parts)


def _cache(costs: Costs) -> Table:
    table = _table(["in bf16", "per token", f"{costs.context:,} tokens", ""])
    own = costs.cache_bytes[0].per_token
    for cached in costs.cache_bytes:
        cells = size(cached.per_token), size(cached.per_token * costs.context), f"{cached.per_token / own:.3g} x"
        if cached is costs.cache_bytes[0]:
            table.add_row(f"{cache_name(cached)} (this model)", *cells, style="bold")
        else:
            table.add_row(cache_name(cached), *cells)
    return table


def _compute(costs: Costs) -> Table:
    table = _table(["FLOPs per token", *(f"at {context:,}" for context in costs.forward_flops)])
    for name, factor in (("forward", 1), ("training (forward and backward)", 3)):
        table.add_row(name, *(flop_count(factor * flops) for flops in costs.forward_flops.values()))
    return table


def _files(report: Report) -> dict[str, str]:
    lines = {}
    if (stored := report.stored) is not None:
        lines["weights"] = (
            f"{size(stored.bytes)} in {_plural(stored.num_files, 'file')}, {stored.num_tensors:,} tensors"
        )
        for dtype, (num_tensors, nbytes) in stored.dtypes.items():
            lines[f"  {dtype}"] = f"{size(nbytes)} in {_plural(num_tensors, 'tensor')}"
        if shares := stored.format_shares:
            shown = (f"{share:.1%} of the weights are {name.replace('fp', 'FP')}" for name, share in shares.items())
            lines["quantised"] = ", ".join(shown)
        if stored.num_mtp_modules or report.config.num_mtp_layers:
            lines["prediction"] = _plural(stored.num_mtp_modules, "multi-token-prediction module")
    if (tokenizer := report.tokenizer) is not None:
        rows = report.config.vocab_size
        spare = rows - tokenizer.vocab_size
        unused = f", {spare:,} rows of the embedding unused" if spare > 0 else ""
        bos = "no BOS" if tokenizer.bos_id is None else f"BOS {tokenizer.bos_id:,}"
        template = "chat template" if tokenizer.has_template else "no chat template"
        lines["tokenizer"] = f"{tokenizer.vocab_size:,} ids{unused}; {bos}, EOS {tokenizer.eos_id:,}; {template}"
    return lines


def _print_disagreements(console: Console, report: Report) -> None:
    console.print()
    if report.disagreements:
        console.print(Text(f"config.json and the files disagree ({len(report.disagreements)})", "bold red"))
        table = Table.grid(padding=(0, 1))
        for line in report.disagreements:
            table.add_row(Text(" -", "red"), Text(printable(line), overflow="fold"))
        console.print(table)
    elif report.stored is not None:
        others = "tensors and tokenizer" if report.tokenizer is not None else "tensors"
        console.print(Text(f"config.json and {others} agree", "green"))


def count(number: float) -> str:
    """671.03 B, 46.1 M, 930.0 K, 12: in powers of 1000."""
    return _scaled(number, ("", " K", " M", " B", " T"))


def flop_count(number: float) -> str:
    """The same with the letters that FLOPs have: 83.48 G, 1.45 T."""
    return _scaled(number, ("", " K", " M", " G", " T"))


def size(nbytes: float) -> str:
    """Decimal units, as the reports use them."""
    return _scaled(nbytes, (" B", " KB", " MB", " GB", " TB"))


def _scaled(number: float, units: Sequence[str]) -> str:
    unit = 0
    while number >= 999.95 and unit < len(units) - 1:
        number, unit = number / 1000, unit + 1
    digits = 0 if unit == 0 else 2 if number < 10 or unit >= 3 else 1
    return f"{number:,.{digits}f}{units[unit]}"


def _plural(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
