"""The report page: well-formed, self-contained, safe with hostile names, and it works in a browser."""

import base64
import hashlib
import html.parser
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from ww_train import measure
from ww_train.page import render, write_page
from ww_train.page.esd import BOTTOM, LEFT, RIGHT, TOP, esd_svg
from ww_train.page.layers import COLUMNS, GROUPS
from ww_train.page.markup import element
from ww_train.page.markup import html as serialised
from ww_train.report import Report, worst_first
from ww_train.spectrum import Spectrum
from ww_train.tables import printable
from ww_train.verdicts import WORST_FIRST

from .oracles import gaussian

VOID = {"meta", "img", "input", "br", "hr", "link"}

HOSTILE = (
    "a<script>alert(1)</script>",
    'b" onmouseover="alert(1)',
    "c'><img src=x onerror=alert(1)>",
    "d</td></tr></table><h1>gone",
    "e\x00\x1b[2J\n\u202etxet",
    "f&lt;b&gt;&amp;",
    "g${alert(1)} $title $$",
    "javascript:alert(1)",
)


class Page(html.parser.HTMLParser):
    """Elements with their attributes, texts by element, and what is wrong with the nesting."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.elements, self.errors, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        if self.stack:
            self.errors.append(f"not closed: {self.stack}")

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if len({name for name, _ in attributes}) < len(attributes):
            self.errors.append(f"an attribute of {tag} comes twice")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.errors.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.stack[-1] if self.stack else "", data.strip()))

    def all(self, tag, **wanted):
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]


def matrix(seed, rows=40, cols=30, freedom=None):
    if freedom is None:
        return gaussian(rows, cols, seed=seed).float()
    values = np.random.default_rng(seed).standard_t(freedom, (rows, cols))
    return torch.from_numpy(values).float()


@pytest.fixture(scope="module")
def report():
    trapped = matrix(3)
    trapped[5, 7] = 60.0
    state = {
        "one.weight": matrix(1, 90, 70, freedom=2.0),
        "two.weight": matrix(2),
        "three.weight": trapped,
        "flat.weight": torch.eye(32),
        "small.weight": matrix(4, 3, 3),
    }
    return measure(state, randomize=True, mp_fit=True)


@pytest.fixture(scope="module")
def page(report):
    pytest.importorskip("matplotlib")
    return render(report, title="a model", date="some day", options="how <it> was made")


def test_it_is_well_formed_and_all_references_lead_somewhere(page):
    parsed = Page(page)
    assert parsed.errors == []
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in parsed.all("a")]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    controls = [a["aria-controls"] for _, a in parsed.elements if "aria-controls" in a]
    assert len(controls) == 4
    assert set(controls) <= set(ids)
    assert parsed.all("html", lang="en")
    assert parsed.all("meta", name="viewport", content="width=device-width, initial-scale=1")
    assert all(image["alt"] for image in parsed.all("img"))


def test_it_loads_nothing(page):
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert "url(" not in page
    assert "@import" not in page
    assert re.findall(r"https?:|//\w", re.sub(r"base64,[\w+/=]+", "", page)) == []


def test_only_its_own_script_may_run(page):
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = Page(page).all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert len(Page(page).all("script")) == 1
    assert not any(name.startswith("on") for _, a in Page(page).elements for name in a)


def test_hostile_names_are_only_text():
    def pages(names):
        found = measure(
            {f"{name}.weight": matrix(i) for i, name in enumerate(names)}, randomize=True
        )
        skipped = [
            replace(x, name=n, reason=n) for x, n in zip(_skipped(names), names, strict=True)
        ]
        whole = Report(found.layers, tuple(skipped))
        return Page(render(whole, title=names[0], date=names[1], options=names[2]))

    hostile, harmless = pages(HOSTILE), pages([f"layer{i}" for i in range(len(HOSTILE))])
    assert hostile.errors == []
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    names = [set(attributes) for _, attributes in hostile.elements]
    assert names == [set(attributes) for _, attributes in harmless.elements]
    headings = [text for tag, text in hostile.texts if tag == "h3"]
    for name in HOSTILE:
        assert printable(name) in headings


def _skipped(names):
    return measure({f"{name}.weight": matrix(0, 3, 3) for name in names}).skipped


def test_the_same_arguments_give_the_same_page(report, page, tmp_path):
    again = {"title": "a model", "date": "some day", "options": "how <it> was made"}
    write_page(report, tmp_path / "page.html", **again)
    assert (tmp_path / "page.html").read_bytes() == page.encode()
    assert "on some day" in page
    assert "how &lt;it&gt; was made" in page
    assert "some day" not in render(report)


def test_the_table_holds_the_numbers_and_their_sort_keys(report, page):
    parsed = Page(page)
    cells = iter([a["data-sort"] for _, a in parsed.elements if "data-sort" in a])
    for layer in report:
        row = layer.to_dict()
        assert next(cells) == layer.name
        assert next(cells).isdigit()
        for column in COLUMNS:
            assert next(cells) == ("" if row[column] is None else repr(row[column]))
        assert next(cells) == layer.layer_type
    assert next(cells, None) is None
    assert [a["data-verdict"] for a in parsed.all("tbody")] == [x.verdict for x in report]
    heads = [text for tag, text in parsed.texts if tag == "button"]
    assert heads[: len(COLUMNS) + 3] == ["layer", "verdict", *COLUMNS, "type"]
    known = {name for row in (x.to_dict() for x in report) for name in row}
    optional = {"alpha_low", "alpha_high", "p_value", "Lambda", "raw_alpha", "num_traps_mean"}
    assert {name for names in GROUPS.values() for name in names.split()} - optional <= known


def test_it_says_what_to_do_and_what_was_left_out(report, page):
    texts = [text for _, text in Page(page).texts]
    assert any("small: 3 eigenvalues, fewer than min_evals=8" in text for text in texts)
    for layer in report:
        advice = layer.advice.removeprefix(f"layer {layer.name}: ")
        assert any(text.rstrip(".") == advice for text in texts)
    trapped = report["three"]
    assert str(trapped.trap_causes[0]) in texts
    assert any(text.startswith("4 layers: 1 trapped") or "trapped" in text for text in texts)


def test_the_worst_come_first(report):
    order = [layer.verdict for layer in worst_first(report)]
    assert order == sorted(order, key=WORST_FIRST.index)
    assert len(set(order)) >= 2
    layer = replace(report["three"], traps=None)  # its giant entry is not random-like
    fits = [replace(layer.fit, alpha=alpha, D=0.05) for alpha in (7.0, 1.7, 12.0, 3.0, 1.2)]
    changed = Report(tuple(replace(layer, fit=fit) for fit in fits), ())
    assert [x.alpha for x in worst_first(changed)] == [1.2, 1.7, 12.0, 7.0, 3.0]


def test_a_model_with_nothing_to_say(report):
    empty = Page(render(Report((), ())))
    assert empty.errors == []
    assert "No layer was measured." in " ".join(text for _, text in empty.texts)
    healthy = Report(
        tuple(replace(x, traps=None, shuffled=None, mp=None, rand_distance=None, trap_causes=())
              for x in report if x.name == "one"), ()
    )  # fmt: skip
    text = " ".join(text for _, text in Page(render(healthy)).texts)
    assert "Correlation traps were not looked for" in text
    assert "num_traps 0" not in text


def test_figures_are_limited_to_the_worst_layers(report, monkeypatch):
    monkeypatch.setattr("ww_train.page.layers.FIGURES", 2)
    limited = render(report)
    assert limited.count('role="img"') == 2
    assert "Figures are drawn for the worst 2" in limited
    monkeypatch.setattr("ww_train.page.layers.FIGURES", 4)
    assert render(report).count('role="img"') == 4


def test_without_matplotlib_the_page_says_how_to_get_the_figures(report, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ww_train.plots", None)
    monkeypatch.delattr("ww_train.plots", raising=False)
    bare = render(report)
    assert "pip install &#x27;ww-train[plots]&#x27;" in bare or "ww-train[plots]" in bare
    assert Page(bare).all("img") == []
    assert bare.count('role="img"') == 4  # spectra do not need it


# the drawing of a spectrum


def bars(svg, kind):
    """Left, right and number of eigenvalues of each bar, read back from the drawing."""
    path = next(part.get("d") for part in svg if part.get("class") == kind)
    number = r"(-?[\d.]+)"
    return [
        tuple(map(float, found))
        for found in re.findall(rf"M{number} {BOTTOM:g}V{number}H{number}V{BOTTOM:g}z", path)
    ]


def test_the_bars_hold_every_eigenvalue(report):
    for layer in report:
        svg = esd_svg(layer)
        found = bars(svg, "bulk") + bars(svg, "tail")
        heights = [top for _, top, _ in found]
        assert all(LEFT <= left < right <= RIGHT for left, _, right in found)
        assert all(TOP <= top < BOTTOM for top in heights)
        evals = layer.spectrum.positive
        evals = evals[evals >= evals[-1] * 1e-6]
        assert sum(_counts(heights, len(evals))) == len(evals)


def _counts(heights, total):
    """Numbers from heights on an axis of 0.5 to 1.5 times the highest bar, found by trying each."""
    for highest in range(1, total + 1):
        span = np.log(1.5 * highest / 0.5)
        counts = [0.5 * np.exp((BOTTOM - top) / (BOTTOM - TOP) * span) for top in heights]
        if round(max(counts)) == highest and round(sum(counts)) == total:
            return [round(c) for c in counts]
    return []


def test_the_tail_is_coloured_from_xmin_and_the_law_starts_there(report):
    svg = esd_svg(report["one"])
    places = {part.get("class"): part.get("d") for part in svg if part.tag == "path"}
    xmin = float(re.match(r"M([\d.]+)", places["xmin"])[1])
    assert min(left for left, _, _ in bars(svg, "tail")) <= xmin
    assert max(right for _, _, right in bars(svg, "bulk")) <= xmin + 0.1
    points = [tuple(map(float, p.split())) for p in places["fit"][1:].split("L")]
    assert points[0][0] >= xmin - 0.1
    assert [y for _, y in points] == sorted(y for _, y in points)  # falls to the right


def test_one_eigenvalue_many_times_can_be_drawn(report):
    svg = esd_svg(report["flat"])
    assert len(bars(svg, "bulk")) + len(bars(svg, "tail")) == 1
    assert "fit" not in [part.get("class") for part in svg]
    wide = replace(report["two"], spectrum=Spectrum(np.geomspace(1e-30, 1.0, 50), 50, 50, eps=0.0))
    assert len(bars(esd_svg(wide), "bulk") + bars(esd_svg(wide), "tail")) > 5


def test_markup_escapes_texts_and_attributes():
    built = element("p", "1 < 2 ", element("b", "& more", class_='"x"'), " end", aria_label="a")
    expected = '<p aria-label="a">1 &lt; 2 <b class="&quot;x&quot;">&amp; more</b> end</p>'
    assert serialised(built) == expected


# in a browser

CHECK = """
<script>
const problems = [];
const check = (ok, what) => { if (!ok) problems.push(what) };
addEventListener("error", (event) => problems.push(event.message));
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const keys = (i) => all("tbody").map((body) => body.rows[0].cells[i].dataset.sort);
  const names = () => keys(0);
  const head = (text) => all("thead button").find((button) => button.textContent === text);
  const before = names();
  head("alpha").click();
  let found = keys(2);
  check(found.at(-1) === "", "what is missing comes last: " + found);
  const up = found.filter(Boolean).map(Number);
  check(up.every((x, i) => !i || up[i - 1] <= x), "ascending: " + up);
  check(document.querySelectorAll("[aria-sort]").length === 1, "one aria-sort");
  check(head("alpha").parentNode.getAttribute("aria-sort") === "ascending", "aria-sort");
  head("alpha").click();
  found = keys(2);
  check(found.at(-1) === "", "what is missing stays last: " + found);
  const down = found.filter(Boolean).map(Number);
  check(down.every((x, i) => !i || down[i - 1] >= x), "descending: " + down);
  check(head("alpha").parentNode.getAttribute("aria-sort") === "descending", "aria-sort");
  head("layer").click();
  check(names().join() === [...before].sort().join(), "by name: " + names());
  const open = document.querySelector("tbody button");
  const detail = document.getElementById(open.getAttribute("aria-controls"));
  check(detail.hidden, "closed at first");
  open.click();
  check(!detail.hidden && open.getAttribute("aria-expanded") === "true", "opens");
  open.click();
  check(detail.hidden && open.getAttribute("aria-expanded") === "false", "closes");
  const visible = () => all("tbody").filter((body) => !body.hidden).length;
  const name = document.getElementById("name");
  name.value = "THREE";
  name.dispatchEvent(new Event("input"));
  check(visible() === 1, "filters by name");
  check(document.getElementById("shown").textContent === "1 of 4 layers", "says how many");
  name.value = "";
  const verdict = document.getElementById("verdict");
  verdict.value = "trapped";
  verdict.dispatchEvent(new Event("change"));
  const trapped = all("tbody").filter((body) => body.dataset.verdict === "trapped").length;
  check(visible() === trapped && trapped < 4, "filters by verdict");
  verdict.value = "";
  verdict.dispatchEvent(new Event("change"));
  check(visible() === 4, "shows all again");
  check(document.documentElement.scrollWidth <= innerWidth, "no sideways scrolling");
  document.title = problems.length ? "problems: " + problems.join("; ") : "all is well";
});
</script>
</body>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")

    def dump(text, width=1000):
        folder = tmp_path_factory.mktemp("browser")
        (folder / "page.html").write_text(text, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update"]
        command += [f"--user-data-dir={folder}", f"--window-size={width},800", "--dump-dom"]
        command += [(folder / "page.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return dump


def test_its_script_runs_under_its_own_policy(page, browse):
    assert "4 of 4 layers</output>" in browse(page)


@pytest.mark.parametrize("width", [500, 1280])  # below 500 headless windows do not shrink
def test_sorting_filters_and_details_work_in_a_browser(page, browse, width):
    checked = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page)
    checked = checked.replace("</body>", CHECK)
    title = re.search(r"<title>(.*?)</title>", browse(checked, width))[1]
    assert title == "all is well"
