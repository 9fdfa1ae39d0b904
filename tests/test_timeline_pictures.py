"""Pictures of programs made by hand: the figure, the trace, and the page in a real browser.

`after`, in milliseconds; the loop runs 4 times and is shown once:

    compute  expert 0-2, waits for x 2-3, combine 3-3.5, waits for the copy 3.5-4,
             attention 4-4.25, waits for y 4.25-5
    ici:xy   x 0-3
    network  y 4-5
    hbm      copy 3-4
"""

import io
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from gshard_moe.timeline import COMPUTE, Operation, Program, Step
from gshard_moe.timeline.draw import figure
from gshard_moe.timeline.lanes import COLOURS, EXPOSED_COLOUR, WAITING_COLOUR
from gshard_moe.timeline.page import page
from gshard_moe.timeline.trace_events import trace

MS = 1e-3
SENT = 2.0 * 2**20


def compute(name: str, ms: float, scope: str) -> Operation:
    return Operation(name, COMPUTE, ms * MS, scope=scope, kind="fusion")


def exchange(name: str, ms: float, link: str, scope: str) -> Operation:
    return Operation(name, link, ms * MS, "collective", scope, "all-to-all", SENT)


def beside(other: Operation, *work: Operation) -> list[Step]:
    """Starts one thing, does others, and waits for it."""
    return [Step("start", other), *(Step("run", one) for one in work), Step("wait", other)]


def programs() -> dict[str, Program]:
    x = exchange("x", 3.0, "ici:xy", "layers/exchange")
    y = exchange("y", 1.0, "nvlink", "layers/dispatch")
    expert = compute("dot", 2.0, "layers/expert")
    copied = Operation("moved", "hbm", 1.0 * MS, "copy", kind="copy-start")
    body = Program(tuple(beside(y, compute("softmax", 0.25, "layers/attention"))))
    after = [
        *beside(x, expert),
        *beside(copied, compute("sum", 0.5, "layers/combine")),
        Step("loop", bodies=(body,), trips=4),
        Step("run", compute("nothing", 0.0, "loss")),
    ]
    return {
        "before": Program((Step("run", x), Step("run", expert))),
        "after": Program(tuple(after)),
    }


@pytest.mark.parametrize("show", [figure, page, trace])
def test_there_must_be_a_program(show):
    with pytest.raises(ValueError, match="programs must hold at least one; got none"):
        show({})


# ------------------------------------------------------------------ the figure


def bars(ax: Axes) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Maps each lane and colour (of hatched bars, the hatch's) to the bars' begins and ends."""
    names = [label.get_text() for label in ax.get_yticklabels()]
    found = {}
    for collection in ax.collections:
        boxes = [path.get_extents() for path in collection.get_paths()]
        (row,) = {round((box.y0 + box.y1) / 2) for box in boxes}
        ink = collection.get_edgecolor() if collection.get_hatch() else collection.get_facecolor()
        key = names[row], to_hex(np.asarray(ink)[0]).upper()
        found[key] = [(round(box.x0, 6), round(box.x1, 6)) for box in boxes]
    return found


def test_the_figure_has_every_bar():
    before, after = figure(programs()).axes
    assert bars(before) == {
        (COMPUTE, COLOURS["expert"]): [(3.0, 5.0)],
        (COMPUTE, EXPOSED_COLOUR): [(0.0, 3.0)],
        ("ici:xy", COLOURS["exchange"]): [(0.0, 3.0)],
    }
    assert bars(after) == {
        (COMPUTE, COLOURS["expert"]): [(0.0, 2.0)],
        (COMPUTE, COLOURS["combine"]): [(3.0, 3.5)],
        (COMPUTE, COLOURS["attention"]): [(4.0, 4.25)],
        (COMPUTE, EXPOSED_COLOUR): [(2.0, 3.0), (4.25, 5.0)],
        (COMPUTE, WAITING_COLOUR): [(3.5, 4.0)],
        ("ici:xy", COLOURS["exchange"]): [(0.0, 3.0)],
        ("nvlink", COLOURS["dispatch"]): [(4.0, 5.0)],
        ("hbm", "#C8C8C8"): [(3.0, 4.0)],
    }


def test_the_figure_says_what_it_shows():
    drawn = figure(programs())
    before, after = drawn.axes
    title = "before: step 5.000 ms, 3.000 ms of communication exposed, 0.0% hidden"
    assert before.get_title(loc="left") == title
    # 2 of x's 3 ms are hidden, and 4 x 0.25 of y's 4.
    title = "after: step 8.000 ms, 4.000 ms of communication exposed, 42.9% hidden"
    assert after.get_title(loc="left") == title
    assert before.get_xlim() == after.get_xlim() == (0.0, pytest.approx(5.0))
    assert after.get_xlabel() == "ms; of each loop, one iteration"
    labels = [[label.get_text() for label in ax.get_yticklabels()] for ax in (before, after)]
    assert labels == [[COMPUTE, "ici:xy"], [COMPUTE, "ici:xy", "nvlink", "hbm"]]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == [
        *("attention", "dispatch", "exchange", "expert", "combine", "other"),
        *("exposed communication", "waiting for a copy"),
    ]


def test_a_loop_is_under_a_bracket():
    before, after = figure(programs()).axes
    assert not before.lines
    (bracket,) = after.lines
    assert np.asarray(bracket.get_xdata()) == pytest.approx([4.0, 4.0, 5.0, 5.0])
    assert "× 4" in [text.get_text() for text in after.texts]


def svg(drawn: Figure) -> bytes:
    written = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fixed"}):
        drawn.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def test_the_figure_is_saved_as_svg_the_same_each_time():
    written = svg(figure(programs()))
    root = xml.etree.ElementTree.fromstring(written)
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {COMPUTE, "ici:xy", "nvlink", "hbm", "all-to-all", "expert", "× 4"} <= set(texts)
    assert svg(figure(programs())) == written


def pixels(png: bytes) -> np.ndarray:
    """Returns red, green and blue, 0 to 255."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(io.BytesIO(png))
    return np.rint(image[..., :3] * 255).astype(int)


def share(image: np.ndarray, colour: str) -> float:
    """Returns the share of pixels of exactly this colour."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return float(np.mean(np.all(image == (red, green, blue), axis=-1)))


def test_the_figure_is_saved_as_png_that_is_not_blank():
    def png(drawn: Figure) -> np.ndarray:
        written = io.BytesIO()
        drawn.savefig(written, format="png", dpi=80)
        return pixels(written.getvalue())

    shown, blank = png(figure(programs())), png(figure({"nothing": Program(())}))
    assert shown.var() > 3 * blank.var()
    for scope in ("expert", "exchange", "attention"):
        assert share(shown, COLOURS[scope]) > 0.002 > share(blank, COLOURS[scope])


def test_names_are_no_formulas():
    x = exchange("x", 1.0, "$ici_{x}$", "")
    drawn = figure({r"$\broken$ and $x_1$": Program((Step("run", x),))})
    assert b"$ici_{x}$" in svg(drawn)


def test_many_bars_are_drawn_as_few():
    """5000 intervals in neighbours that look alike: a second, where each alone takes minutes."""
    steps = [Step("run", compute(f"c{i}", 0.001, "expert")) for i in range(2500)]
    steps += [Step("run", compute(f"d{i}", 0.001, ("router", "head")[i % 2])) for i in range(2500)]
    begun = time.perf_counter()
    drawn = figure({"many": Program(tuple(steps))})
    drawn.savefig(io.BytesIO(), format="png")
    assert time.perf_counter() - begun < 10  # of a busy machine
    found = bars(drawn.axes[0])
    assert found[COMPUTE, COLOURS["expert"]] == [(0.0, 2.5)]
    assert len(found[COMPUTE, COLOURS["router"]]) == 1250


def test_what_is_too_short_to_be_seen_is_drawn():
    long, short = compute("a", 1000.0, "expert"), compute("b", 0.001, "router")
    found = bars(figure({"": Program((Step("run", long), Step("run", short)))}).axes[0])
    ((begin, end),) = found[COMPUTE, COLOURS["router"]]
    assert end - begin > 0.4 * MS


# ------------------------------------------------------------------ the trace


def test_the_trace_has_exactly_these_events():
    content = json.loads(trace(programs()))
    events = content["traceEvents"]
    named = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] in ("process_name", "thread_name")
    }
    assert named == {
        **{(1, 0): "before", (1, 1): COMPUTE, (1, 2): "stall", (1, 3): "ici:xy"},
        **{(2, 0): "after", (2, 1): COMPUTE, (2, 2): "stall"},
        **{(2, 3): "ici:xy", (2, 4): "nvlink", (2, 5): "hbm"},
    }
    order = [e for e in events if e["name"] == "thread_sort_index"]
    assert all(event["args"]["sort_index"] == event["tid"] for event in order)
    assert len(order) == 8
    shown = [
        (e["pid"], e["tid"], e["name"], e["ts"], e["dur"], e["args"]["times"], e["args"]["exposed"])
        for e in events
        if e["ph"] == "X"
    ]
    assert shown == [
        (1, 1, "dot", 3000, 2000, 1, 0),
        (1, 2, "wait for x", 0, 3000, 1, 3000),
        (1, 3, "x", 0, 3000, 1, 3000),
        (2, 1, "dot", 0, 2000, 1, 0),
        (2, 1, "sum", 3000, 500, 1, 0),
        (2, 1, "softmax", 4000, 250, 4, 0),
        (2, 2, "wait for x", 2000, 1000, 1, 1000),
        (2, 2, "wait for moved", 3500, 500, 1, 0),
        (2, 2, "wait for y", 4250, 750, 4, 750),
        (2, 3, "x", 0, 3000, 1, 1000),
        (2, 4, "y", 4000, 1000, 4, 750),
        (2, 5, "moved", 3000, 1000, 1, 0),
    ]
    (y,) = [event for event in events if event["name"] == "y"]
    assert y["cat"] == "dispatch"
    assert y["args"] == {
        **{"scope": "layers/dispatch", "kind": "all-to-all", "bytes": SENT},
        **{"times": 4, "exposed": 750.0},
    }
    assert len(events) == len(shown) + 2 * len(named)


def test_no_event_overlaps_the_next_of_its_thread():
    """Nor does it for a reader that truncates to nanoseconds, as Perfetto does."""
    work = [compute(f"c{i}", 1.001e-3 * (1 + i % 3), "") for i in range(999)]
    content = json.loads(trace({"": Program(tuple(Step("run", one) for one in work))}))
    spans = [
        (int(event["ts"] * 1000), int(event["dur"] * 1000))
        for event in content["traceEvents"]
        if event["ph"] == "X"
    ]
    assert len(spans) == 999
    for (begin, length), (after, _) in itertools.pairwise(spans):
        assert begin + length == after
    assert sum(length for _, length in spans) == 2002 * 999


# ------------------------------------------------------------------ the page


def data(text: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_the_page_holds_the_data():
    found = data(page(programs()))
    assert [one["entry"] for one in found["legend"] if one["hatched"]] == [
        *("exposed communication", "waiting for a copy"),
    ]
    before, after = found["programs"]
    assert (before["title"], before["seconds"], before["loops"]) == ("before", 5.0 * MS, [])
    (dot, stall), (x,) = (lane["bars"] for lane in before["lanes"])
    assert x == {
        **{"begin": 0.0, "end": 3.0 * MS, "name": "x", "what": "flight", "entry": "exchange"},
        **{"kind": "all-to-all", "scope": "layers/exchange", "sent": SENT, "times": 1},
        "guessed": False,
    }
    assert stall == x | {"what": "stall", "entry": "exposed communication"}
    assert (dot["begin"], dot["end"], dot["what"]) == (3.0 * MS, 5.0 * MS, "compute")
    assert [(lane["name"], len(lane["bars"])) for lane in after["lanes"]] == [
        *((COMPUTE, 6), ("ici:xy", 1), ("nvlink", 1), ("hbm", 1))
    ]
    ((begin, end, times),) = (loop.values() for loop in after["loops"])
    assert (begin, end, times) == (pytest.approx(4.0 * MS), pytest.approx(5.0 * MS), 4)
    assert after["report"]["step_s"] == pytest.approx(8.0 * MS)
    assert after["report"]["exposed_s"] == pytest.approx(4.0 * MS)
    first, second = after["collectives"]
    assert (first["name"], first["count"], first["link"]) == ("x", 1, "ici:xy")
    assert first["hidden_by"] == [["layers/expert", 2.0 * MS]]
    assert (second["name"], second["count"], second["sent"]) == ("y", 4, 4 * SENT)
    assert second["exposed"] == pytest.approx(3.0 * MS)


def test_the_page_stands_alone():
    text = page(programs())
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:|\bsrc=|\bhref=|@import|url\(|@DATA@|@LANES@", text)


EVIL = '</script><b id="evil">&amp;<!--'


def evil() -> dict[str, Program]:
    x = Operation(EVIL, EVIL, 1.0, "collective", EVIL, EVIL)
    return {f"{EVIL}@DATA@": Program(tuple(beside(x, Operation("c", COMPUTE, 0.5, scope=EVIL))))}


def test_names_cannot_break_out_of_the_page():
    text = page(evil())
    (block,) = re.findall(r'id="data">(.*)', text)
    assert set(block.removesuffix("</script>")).isdisjoint("<>&")
    assert text.count("</script>") == page(programs()).count("</script>")
    assert data(text)["programs"][0]["title"] == f"{EVIL}@DATA@"
    assert data(text)["programs"][0]["collectives"][0]["kind"] == EVIL


# ------------------------------------------------------------------ the page in a browser

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
# Preferred colour schemes, as Chromium's engine numbers them.
DARK, LIGHT = 0, 1


def browse(text: str, folder: pathlib.Path, *flags: str) -> str:
    """Opens a page without a window, and returns what the browser prints."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.fail(f"the page must be tried in a browser; install one of {', '.join(BROWSERS)}")
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1000"),
        *("--virtual-time-budget=5000", *flags, path.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(dom: str) -> list[list[list[str]]]:
    """Returns the text of the tables' cells."""
    tables = re.findall(r"<tbody>(.*?)</tbody>", dom, re.S)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.S) for table in tables]
    return [[re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in table] for table in rows]


def test_a_browser_draws_the_page(tmp_path: pathlib.Path):
    dom = browse(page(programs()), tmp_path, "--dump-dom")
    (root,) = re.findall(r"<html[^>]*>", dom)
    assert 'data-ready="true"' in root and 'lang="en"' in root
    assert 'data-bars="12"' in root  # 3 before, 9 after
    assert "<title>Timelines: before, after</title>" in dom
    assert re.findall(r"<h2>(.*?)</h2>", dom) == ["before", "after"]
    x = ["x", "all-to-all", "ici:xy", "layers/exchange", "1", "2.000", "3.000"]
    y = ["y", "all-to-all", "nvlink", "layers/dispatch", "4", "8.000", "4.000"]
    assert cells(dom) == [
        [[*x, "3.000", ""]],
        [
            [*x, "1.000", "layers/expert 2.000 ms"],
            [*y, "3.000", "layers/attention 1.000 ms"],
        ],
    ]
    said = "Step 8.000 ms: 4.000 ms of 7.000 ms of communication exposed, 42.9% hidden."
    assert said in dom


def test_a_browser_reads_names_as_text(tmp_path: pathlib.Path):
    dom = browse(page(evil()), tmp_path, "--dump-dom")
    assert 'data-ready="true"' in dom and "<b " not in dom
    shown = '&lt;/script&gt;&lt;b id="evil"&gt;&amp;amp;&lt;!--'
    assert f"<h2>{shown}@DATA@</h2>" in dom
    assert cells(dom)[0][0][:4] == [shown] * 4


# Each act is done, the next frame drawn, and what the reader sees then is noted.
ACTS = """<script>
window.requestAnimationFrame = go => setTimeout(go, 1);  // no window, no frames
const canvas = document.querySelectorAll("canvas")[1], tip_ = document.getElementById("tip");
const box = canvas.getBoundingClientRect();
const across = share => box.left + chartLeft() + share * (box.width - chartLeft() - 12);
function chartLeft() { return charts[1].left; }
function mouse(type, share, row, more) {
  const point = {clientX: across(share), clientY: box.top + 24 + 32 * row + 16, bubbles: true};
  const made = type === "wheel" ? WheelEvent : PointerEvent;
  canvas.dispatchEvent(new made(type, {...point, cancelable: true, ...more}));
}
function key(name) { canvas.dispatchEvent(new KeyboardEvent("keydown", {key: name})); }
function click(table, column) {
  document.querySelectorAll("table")[table].querySelectorAll("th button")[column].click();
}
const first = () => document.querySelectorAll("table")[1].tBodies[0].rows[0].cells[0].textContent;
const ms = () => [view.begin, view.end].map(seconds => (seconds * 1e3).toFixed(2)).join("-");
const ACTS = {
  "hover x": () => mouse("pointermove", 0.3, 1),
  "hover a stall": () => mouse("pointermove", 0.9, 0),
  "hover nothing": () => mouse("pointermove", 0.9, 1),
  "wheel in": () => { for (let i = 0; i < 3; i++) mouse("wheel", 0, 0, {deltaY: -300}); },
  "press": () => mouse("pointerdown", 0.5, 0),
  "drag": () => mouse("pointermove", 0, 0),
  "release": () => mouse("pointerup", 0, 0),
  "move on": () => mouse("pointermove", 0.2, 0),
  "arrow": () => key("ArrowLeft"),
  "show all": () => document.getElementById("all").click(),
  "key in": () => key("+"),
  "key all": () => key("0"),
  "sort by exposed": () => click(1, 7),
  "sort again": () => click(1, 7),
  "sort by name": () => click(1, 0),
};
const noted = {};
(async () => {
  for (const [name, act] of Object.entries(ACTS)) {
    act();
    await new Promise(go => setTimeout(go, 20));
    const told = tip_.hidden ? "" : tip_.textContent;
    const bars = document.documentElement.dataset.bars;
    noted[name] = [told, ms(), bars, first()];
  }
  const made = document.createElement("pre");
  made.id = "noted";
  made.textContent = JSON.stringify(noted);
  document.body.append(made);
})();
</script>"""


def test_a_browser_zooms_pans_tells_and_sorts(tmp_path: pathlib.Path):
    dom = browse(page(programs()).replace("</body>", f"{ACTS}</body>"), tmp_path, "--dump-dom")
    (noted,) = re.findall(r'<pre id="noted">(.*?)</pre>', dom, re.S)
    noted = json.loads(noted)
    tip = "x\nkind: all-to-all\nscope: layers/exchange\nduration: 3.000 ms"
    tip += "\nsent by a device: 2.000 MiB\ntimes: 1"
    assert noted["hover x"] == [tip, "0.00-5.00", "12", "x"]
    stall = noted["hover a stall"][0]
    assert stall.startswith("wait for y\n") and stall.endswith("times: 4\nexposed communication")
    assert noted["hover nothing"][0] == ""
    # e^-3 of 5 ms, about its beginning: of `before` x and its stall, of `after` x and the expert.
    assert noted["wheel in"][1:3] == ["0.00-0.25", "4"]
    assert noted["drag"][1] == noted["release"][1] == noted["move on"][1] == "0.12-0.37"
    assert noted["arrow"][1] == "0.09-0.34"
    assert noted["show all"][1:3] == ["0.00-5.00", "12"]
    assert noted["key in"][1] == "0.75-4.25"
    assert noted["key all"][1] == "0.00-5.00"
    assert [noted[act][3] for act in ("sort by exposed", "sort again", "sort by name")] == [
        *("y", "x", "x")
    ]


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_a_browser_shows_bars_on_a_light_and_on_a_dark_page(scheme: int, tmp_path: pathlib.Path):
    path = tmp_path / "page.png"
    flags = f"--screenshot={path}", f"--blink-settings=preferredColorScheme={scheme}"
    browse(page(programs()), tmp_path, *flags)
    shown = pixels(path.read_bytes())
    assert np.all(shown[0, 0] > 200) if scheme == LIGHT else np.all(shown[0, 0] < 60)
    for scope in ("expert", "exchange", "attention"):
        assert share(shown, COLOURS[scope]) > 5e-4, scope
    assert shown.var() > 100
