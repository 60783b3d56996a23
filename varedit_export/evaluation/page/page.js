"use strict";
// Sort the edits by the column whose heading is pressed, the worst first; pressed again, the best.
const table = document.getElementById("edits");
const body = table.tBodies[0];
const numberOf = (row, column) => row.cells[column].dataset.value;
for (const head of table.tHead.querySelectorAll("th[data-better]")) {
  head.firstElementChild.addEventListener("click", () => {
    const column = head.cellIndex;
    const again = head.hasAttribute("aria-sort") && head.dataset.worst === "1";
    head.dataset.worst = again ? "0" : "1";
    const sign = Number(head.dataset.better) * (again ? -1 : 1);
    const rows = [...body.rows];
    const missing = (row) => numberOf(row, column) === undefined;
    rows.sort((a, b) => missing(a) - missing(b) || sign * (numberOf(a, column) - numberOf(b, column)));
    body.append(...rows);
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  });
}
