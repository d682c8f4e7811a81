"use strict";
function closeDetails(table) {
  for (const row of table.querySelectorAll("tr.detail")) row.remove();
  for (const button of table.querySelectorAll('.more[aria-expanded="true"]'))
    button.setAttribute("aria-expanded", "false");
}

{
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  // Sorting: the heads are buttons, so they work with the keyboard; a second press turns round.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const text = head.dataset.kind === "text";
        const before = head.getAttribute("aria-sort");
        const ascending = before ? before === "descending" : true;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        closeDetails(table);
        const rows = [...table.tBodies[0].rows].map((row) => [row.cells[column].dataset.v, row]);
        const compare = text ? (a, b) => collator.compare(a[0], b[0]) : (a, b) => a[0] - b[0];
        rows.sort((a, b) => (ascending ? compare(a, b) : compare(b, a)));
        table.tBodies[0].append(...rows.map((pair) => pair[1]));
      });
    });
  }
}
