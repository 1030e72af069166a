"""Pages of HTML that need nothing but themselves: one file with its style inside, no scripts, no addresses to fetch.

Everything here returns text of HTML; what comes from elsewhere goes through `escaped` first. Light and dark by the
reader's system, printable. Refused: nothing.
"""

import html
from collections.abc import Iterable, Mapping, Sequence

# Okabe and Ito, Color Universal Design (2008); black and yellow are other ones in the dark.
LIGHT = ("#000000", "#C77700", "#0072B2", "#008060", "#C84E00", "#2A8FC7", "#B0558A")
DARK = ("#FFFFFF", "#E69F00", "#56B4E9", "#22B98C", "#FF7F32", "#9AD4F5", "#E39BC4")
VOID = {"br", "hr", "img", "input", "meta"}  # elements without an end

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d8d8d8; --mark: #fff3c4;
  LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #ececec; --soft: #a9a9a9; --line: #3a3d44;
  --mark: #4a3f10; DARK } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #ccc;
  --mark: #eee; LIGHT }
  figure, table, pre { break-inside: avoid } fieldset { display: none } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
caption { text-align: left; color: var(--soft) } .wide { overflow-x: auto }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td.number { text-align: right } th[scope=row] { font-weight: 600 } .marked > * { background: var(--mark) }
pre { overflow-x: auto; border-left: 3px solid var(--line); padding-left: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere } code, pre { font-family: ui-monospace, monospace; font-size: .88rem }
.soft, figcaption { color: var(--soft) } figure { margin: 1rem 0 } svg { width: 100%; height: auto; display: block }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif } svg .grid { stroke: var(--line) }
svg .line { fill: none; stroke-width: 2 }
svg .level { stroke: var(--soft); stroke-dasharray: 2 4 }
svg.swatch { width: 2rem; height: .8rem; display: inline-block; margin-right: .4rem }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem }
fieldset { border: 0; padding: 0; margin: 0 1.4rem 0 0; display: inline-block }
legend { float: left; margin-right: .5rem }
"""


def escaped(text: object) -> str:
    """Any text, as HTML shows it: a model may write tags, and control characters, which no page may hold."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))
    return html.escape("".join(shown))


def element(name: str, /, *children: str, **attributes: object) -> str:
    """`children` are HTML, attributes are plain: class_ is class, data_x is data-x, True has no value, None is none."""
    given = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            given += f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escaped(value)}"')
    return f"<{name}{given}>" if name in VOID else f"<{name}{given}>{''.join(children)}</{name}>"


def number(value: float, text: str) -> str:
    """A number as it is read, with the exact one behind it, for programs and for the pointer."""
    return element("data", escaped(text), value=repr(value), title=repr(value))


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str = "",
    marked: Iterable[int] = (),
    label: bool = True,
) -> str:
    """Cells are HTML; those with a number go to the right. `label`: the first cell of a row is its heading. `marked`
    rows have another background."""
    marked, body = set(marked), []
    for index, row in enumerate(rows):
        first = [element("th", row[0], scope="row")] if label else []
        rest = [element("td", cell, class_="number" if cell.startswith("<data") else None) for cell in row[label:]]
        body.append(element("tr", *first, *rest, class_="marked" if index in marked else None))
    parts = [element("caption", caption)] if caption else []
    if any(head):
        parts.append(element("thead", element("tr", *(element("th", cell, scope="col") for cell in head))))
    return element("div", element("table", *parts, element("tbody", *body)), class_="wide", tabindex=0)


def chooser(name: str, groups: Mapping[str, Sequence[str]], panels: Mapping[tuple[int, ...], str]) -> str:
    """One of `panels` at a time, which buttons choose: of each group an option, of which a panel has the numbers. All
    of them where a browser is too old to choose."""
    sets = []
    for g, (legend, options) in enumerate(groups.items()):
        buttons = [
            element(
                "label", element("input", type="radio", name=f"{name}-{g}", class_=f"o{g}{i}", checked=i == 0), label
            )
            for i, label in enumerate(options)
        ]
        sets.append(element("fieldset", element("legend", escaped(legend)), *buttons))
    shown = [element("div", panel, class_="panel p" + "".join(map(str, key))) for key, panel in panels.items()]
    return element("div", *sets, *shown, class_="chooser")


def page(title: str, body: str, choices: Iterable[tuple[int, ...]] = ()) -> str:
    """`choices`: keys of the panels of all choosers in it."""
    style = STYLE.replace("LIGHT", colours(LIGHT)).replace("DARK", colours(DARK))
    style += "".join(
        f"svg .s{i} {{ stroke: var(--c{i}) }} svg .f{i} {{ fill: var(--c{i}) }}\n" for i in range(len(LIGHT))
    )
    rules = []
    for key in dict.fromkeys(choices):
        chosen = "".join(f":has(.o{group}{option}:checked)" for group, option in enumerate(key))
        rules.append(f".chooser{chosen} > .p{''.join(map(str, key))} {{ display: block }}")
    style += f"@supports selector(:has(a)) {{ .panel {{ display: none }}\n{chr(10).join(rules)} }}\n"
    head = [element("meta", charset="utf-8"), element("title", escaped(title)), element("style", style)]
    head.insert(1, element("meta", name="viewport", content="width=device-width, initial-scale=1"))
    main = element("main", element("h1", escaped(title)), body)
    return "<!DOCTYPE html>\n" + element("html", element("head", *head), element("body", main), lang="en") + "\n"


def colours(palette: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(palette))
