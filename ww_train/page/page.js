"use strict";
(() => {
  const table = document.querySelector("table.layers");
  if (!table) return;
  const bodies = [...table.tBodies];
  const heads = [...table.tHead.rows[0].cells];
  const shown = document.getElementById("shown");
  const name = document.getElementById("name");
  const verdict = document.getElementById("verdict");

  // what is missing comes last, whichever way the table is sorted
  const compare = (a, b, down) => {
    if (a === b) return 0;
    if (a === "" || b === "") return a === "" ? 1 : -1;
    const [x, y] = [Number(a), Number(b)];
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
    return down ? -order : order;
  };

  const sort = (column) => {
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (body) => body.rows[0].cells[column].dataset.sort;
    bodies.sort((a, b) => compare(key(a), key(b), down) || a.dataset.position - b.dataset.position);
    table.append(...bodies);
  };

  const filter = () => {
    const words = name.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const body of bodies) {
      const text = body.rows[0].textContent.toLowerCase();
      const wanted = !verdict.value || body.dataset.verdict.split(" ").includes(verdict.value);
      body.hidden = !(wanted && words.every((word) => text.includes(word)));
      count += !body.hidden;
    }
    shown.textContent = count + " of " + bodies.length + " layers";
  };

  const open = (body, wanted) => {
    body.rows[1].hidden = !wanted;
    body.querySelector("button").setAttribute("aria-expanded", String(wanted));
  };

  const follow = () => {
    const body = document.getElementById(location.hash.slice(1));
    if (!bodies.includes(body)) return;
    if (body.hidden) {
      name.value = verdict.value = "";
      filter();
    }
    open(body, true);
    body.scrollIntoView();
  };

  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(column)));
  bodies.forEach((body) => {
    const button = body.querySelector("button");
    button.addEventListener("click", () => open(body, body.rows[1].hidden));
  });
  name.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  name.form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", follow);
  filter();
  follow();
})();
