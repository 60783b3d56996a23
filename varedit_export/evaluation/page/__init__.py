"""Write a report as one HTML page that asks no server for anything.

Pictures are inside of it, as small JPEGs. All text from data sets is escaped, and a policy in the
page forbids all scripts and styles but its own, and every request.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from varedit_export.evaluation.case import OVERALL, Case, Score
from varedit_export.evaluation.report import Group, Report, Row
from varedit_export.evaluation.run import Run, source_of
from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.files import atomic_file, writing
from varedit_runtime.pictures import encode_picture, open_picture

PAGE = "report.html"
SHOWN = 500  # edits, the worst ones
_SIDE = 192  # pixels of a picture's longer side


def write_page(report: Report, run: Run, cases: Sequence[Case]) -> None:
    """Write `report.html` into a run's folder. Raises ConfigError if it cannot be written."""
    path = run.folder / PAGE
    with writing(path), atomic_file(path) as whole, whole.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in _page(report, run, cases))


def _page(report: Report, run: Run, cases: Sequence[Case]) -> Iterator[str]:
    style, script = (
        "\n" + Path(__file__).with_name(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"{escape(report.title)}: {escape(report.name)}"
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{title}</title><style>{style}</style></head><body><h1>{title}</h1>"
    yield from _summary(report)
    yield from _comparison(report)
    yield from _edits(report, run, {case.id: case for case in cases})
    yield f"<script>{script}</script></body></html>"


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _summary(report: Report) -> Iterator[str]:
    told = [
        f"{escape(key)} {_short(value)}" for key, value in report.run.items() if value is not None
    ]
    yield f"<p><small>{', '.join(told)}</small></p>"
    yield "<h2>Means</h2><p><small>Below a mean of 10 edits or more is the interval that holds it "
    yield 'with 95 % confidence.</small></p><div class="scroll"><table>'
    heads = "".join(f"<th>{escape(score.label)}</th>" for score in report.scores)
    yield f"<tr><th>type</th><th>edits</th>{heads}</tr>"
    for name, group in report.groups.items():
        cells = "".join(_mean(group, score) for score in report.scores)
        kind = ' class="overall"' if name == OVERALL else ""
        yield f"<tr{kind}><td>{escape(name)}</td><td>{group.edits}</td>{cells}</tr>"
    for name, values in _published(report).items():
        cells = "".join(f"<td>{values.get(score.name, '')}</td>" for score in report.scores)
        yield f'<tr class="paper"><td>{escape(name)}</td><td></td>{cells}</tr>'
    yield "</table></div>"
    yield from (f"<p>{escape(str(judge))}</p>" for judge in report.judges)
    if report.published:
        yield "<p><small>Paper: VAREdit, arXiv 2508.15772, at 512 px. The judge there is GPT-4o "
        yield "or GPT-4.1: scores of another judge cannot be compared with it.</small></p>"


def _short(value: object) -> str:
    """Return a setting as HTML: of a digest its beginning, and all of it where a pointer rests."""
    text = str(value)
    if not re.fullmatch("[0-9a-f]{64}", text):
        return escape(text)
    return f'<span title="{text}">{text[:8]}…</span>'


def _mean(group: Group, score: Score) -> str:
    mean, digits = group.means.get(score.name), score.digits
    if mean is None:
        return "<td>–</td>"
    return f"<td>{mean.mean:.{digits}f}<small>{mean.beside(group.edits, digits)}</small></td>"


def _published(report: Report) -> dict[str, dict[str, str]]:
    """Return the paper's numbers by model and group, for the scores that the report has."""
    known, found = {score.name for score in report.scores}, dict[str, dict[str, str]]()
    for one in report.published:
        if one.score in known:
            name = f"paper, {one.model}, {one.group}"
            found.setdefault(name, {})[one.score] = f"{one.value:g}"
    return found


def _comparison(report: Report) -> Iterator[str]:
    if report.against is None:
        return
    yield f"<h2>Against {escape(report.against)}</h2>"
    yield '<div class="scroll"><table><tr><th>type</th>'
    yield "".join(f"<th>{escape(score.label)}</th>" for score in report.scores) + "</tr>"
    for name, comparisons in report.comparisons.items():
        cells = ""
        for score in report.scores:
            verdict = comparisons[score.name].verdict if score.name in comparisons else "–"
            cells += f'<td class="{verdict.split()[0]}">{escape(verdict)}</td>'
        kind = ' class="overall"' if name == OVERALL else ""
        yield f"<tr{kind}><td>{escape(name)}</td>{cells}</tr>"
    yield "</table></div>"


def _edits(report: Report, run: Run, cases: Mapping[str, Case]) -> Iterator[str]:
    rows = list(report.edits)
    if report.scores:
        rows.sort(key=lambda row: _badness(row, report.scores[0]))
    left = f", the worst {SHOWN} of {len(rows)}" if len(rows) > SHOWN else ", worst first"
    yield f"<h2>Edits{left}</h2>"
    if report.against is not None:
        other = escape(report.against)
        yield f"<p><small>Below each score is that of {other}.</small></p>"
    yield '<div class="scroll"><table id="edits"><thead><tr>'
    yield "<th>instruction</th><th>source</th><th>result</th><th>target</th>"
    for place, score in enumerate(report.scores):
        order = "descending" if score.better < 0 else "ascending"
        sort = f' aria-sort="{order}" data-worst="1"' if place == 0 else ""
        label = f'<button type="button">{escape(score.label)}</button>'
        yield f'<th data-better="{score.better}"{sort}>{label}</th>'
    yield "</tr></thead><tbody>"
    for row in rows[:SHOWN]:
        yield "".join(_edit(report, row, run, cases[row.id]))
    yield "</tbody></table></div>"


def _badness(row: Row, score: Score) -> tuple[bool, bool, float]:
    """Return what sorts edits: those that failed, then the worst; those without a score last."""
    value = row.scores.get(score.name)
    return row.failed is None, value is None, score.better * (value or 0)


def _edit(report: Report, row: Row, run: Run, case: Case) -> Iterator[str]:
    failed = f'<p class="failed">{escape(row.failed)}</p>' if row.failed else ""
    told = escape(" · ".join((row.id, *row.groups)))
    yield f'<tr><td class="text">{escape(row.instruction)}<small>{told}</small>{failed}</td>'
    result = run.picture(row.id)
    yield _picture(source_of(run, case), "source")
    yield _picture(None if result is None else open_picture(result), "result")
    yield _picture(None if case.target is None else case.target(), "target")
    for score in report.scores:
        value, other = row.scores.get(score.name), row.against.get(score.name)
        shown = "–" if value is None else f"{value:.{score.digits}f}"
        beside = "" if other is None else f"<small>{other:.{score.digits}f}</small>"
        number = "" if value is None else f' data-value="{value!r}"'
        yield f"<td{number}>{shown}{beside}</td>"
    yield "</tr>"


def _picture(picture: Image.Image | None, what: str) -> str:
    if picture is None:
        return "<td></td>"
    small = on_white(picture).copy()
    small.thumbnail((_SIDE, _SIDE))
    content = base64.b64encode(encode_picture(small, "JPEG", quality=85)).decode()
    return f'<td><img alt="{what}" src="data:image/jpeg;base64,{content}"></td>'
