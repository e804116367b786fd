"""Everything that is left of a campaign in its folder: tables, comparisons, plots and tidy data."""

from __future__ import annotations

from aipo.campaign.cells import Plan, open_folder
from aipo.campaign.collect import collect, save
from aipo.campaign.jobs import failure
from aipo.campaign.plots import draw
from aipo.campaign.tables import comparison_markdown, comparisons, entries, latex, markdown, note, table_csv
from aipo.record.checkpoints import write_atomically
from aipo.record.machine import machine


def write_report(plan: Plan) -> str:
    """``report.md``, ``table.tex``, ``table.csv``, ``runs`` and ``curves`` as Parquet and CSV, and the plots.

    Returns the text of the report.
    """
    open_folder(plan)
    runs, curves = collect(plan)
    save(plan, runs, curves)
    campaign, rows, made = plan.campaign, entries(plan.campaign, runs), comparisons(plan.campaign, runs)
    scale = note(plan, runs, machine())
    text = f"# {campaign.title or plan.name}\n\n{scale}\n\n{markdown(campaign, rows)}\n"
    text += "Mean over seeds with its 95 % bootstrap interval; best bold, second underlined"
    some = any(0 < e.seeds < e.asked for part in rows.values() for line in part.values() for e in line)
    text += "; (1 of 3): of so many seeds only.\n" if some else ".\n"
    if any(made.values()):
        tests = max(sum(c.p == c.p for c in part.values()) for part in made.values())
        text += f"\n## Against {campaign.control}\n\n{comparison_markdown(campaign, made)}\n"
        text += (
            f"t-tests paired by seed, Holm's correction for {tests} comparisons"
            f"{' in each panel' * bool(campaign.panels)}, 5 %. Seeds needed: for a difference like this one to be "
            "shown with probability 80 %, if mean and spread of these seeds were the true ones.\n"
        )
    failed = [f"- {job.name}: {failure(job)}" for job in plan.jobs if job.state() == "failed"]
    text += "\n## Failed\n\n" + "\n".join(failed) + "\n" if failed else ""
    named = [*campaign.columns, *(plot.metric for plot in campaign.plots if plot.kind == "curves"), campaign.metric]
    if absent := [name for name in dict.fromkeys(named) if "/" in name and len(curves) and name not in curves]:
        text += f"\n## Not measured\n\nNo run has {', '.join(absent)} in its metrics.jsonl: is it a typo?\n"
    write_atomically(plan.folder / "report.md", text)
    write_atomically(plan.folder / "table.tex", latex(campaign, rows, scale))
    write_atomically(plan.folder / "table.csv", table_csv(campaign, rows))
    pictures = draw(plan, rows, curves, runs, made)  # last: a plot that fails takes no table along
    text += "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    write_atomically(plan.folder / "report.md", text)
    return text
