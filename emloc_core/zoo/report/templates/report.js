for (const head of document.querySelectorAll("th[data-sort]")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const turn = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of head.parentNode.children) other.ariaSort = null;
    head.ariaSort = turn > 0 ? "ascending" : "descending";
    const key = row => row.cells[head.cellIndex].dataset.v;
    const body = head.closest("table").tBodies[0];
    const order = (a, b) => turn * key(a).localeCompare(key(b), undefined, {numeric: true});
    const numbers = (a, b) => turn * (key(a) - key(b));
    body.append(...[...body.rows].sort(head.cellIndex ? numbers : order));
  };
}
addEventListener("hashchange", () => document.getElementById(location.hash.slice(1))?.setAttribute("open", ""));
