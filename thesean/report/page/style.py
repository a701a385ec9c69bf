"""How the page and its pictures look: one accent, light and dark; colours of text have a contrast of 4.5 or more on
their ground.
"""

LIGHT = {
    "ground": "#fff", "raised": "#f6f7f8", "ink": "#1b1f24", "muted": "#59626c", "rule": "#dfe3e7", "accent": "#0b6b74",
    "cell": "#0b6b74",
}  # fmt: skip
DARK = {
    "ground": "#14171a", "raised": "#1c2024", "ink": "#e7eaed", "muted": "#a0a9b2", "rule": "#31373d",
    "accent": "#5cc3cc", "cell": "#1a8c97",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in colours.items())


COLOURS = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
"""

FIGURES = """
svg text{font:11.5px system-ui,sans-serif;fill:var(--muted);font-variant-numeric:tabular-nums}
svg text.ink,svg text.label{fill:var(--ink)}
svg text.label{paint-order:stroke;stroke:var(--ground);stroke-width:3px;stroke-linejoin:round}
line.grid{stroke:var(--rule)}line.axis{stroke:var(--muted)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.line.main{stroke:var(--accent)}
.line.quiet{stroke:var(--muted);stroke-width:1.25;stroke-dasharray:4 3}
.dot{stroke:var(--ground);stroke-width:1.5}.dot.main{fill:var(--accent)}.dot.quiet{fill:var(--muted)}
.dot.guide{fill:var(--ink)}
.dot.hollow{fill:var(--ground);stroke:var(--muted)}.dot.marked{fill:var(--ground);stroke:var(--accent);stroke-width:3}
.cell{fill:var(--cell);stroke:var(--rule);stroke-width:.5}
"""

_PAGE = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:50rem;margin:0 auto;padding:3rem 1.25rem 5rem}
h1{font-size:clamp(1.6rem,5vw,2.2rem);line-height:1.15;letter-spacing:-.02em;font-weight:650;margin:.2rem 0 .75rem;
overflow-wrap:anywhere}
h2{font-size:1.25rem;letter-spacing:-.01em;font-weight:650;margin:3.5rem 0 .5rem;padding-top:1rem;
border-top:1px solid var(--rule)}
h3{font-size:1rem;font-weight:600;margin:1.5rem 0 .4rem;overflow-wrap:anywhere}
p{margin:.4rem 0 .9rem;max-width:62ch}
.eyebrow{font-size:.8rem;letter-spacing:.06em;text-transform:uppercase;color:var(--accent);font-weight:600;margin:0}
.lead{font-size:1.1rem;color:var(--muted)}
.quiet{color:var(--muted);font-size:.9rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:1.25rem 1.5rem;
margin:2rem 0 0;padding:0}
.figures div{border-top:2px solid var(--rule);padding-top:.6rem}
.figures dt{color:var(--muted);font-size:.85rem}
.figures dd{margin:0;font-size:1.5rem;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.figures dd.was{font-size:.85rem;font-weight:400;color:var(--muted);letter-spacing:0}
ol.plan{list-style:none;margin:1.25rem 0;padding:0}
ol.plan>li{position:relative;padding:.55rem 0 .55rem 1.9rem}
ol.plan>li::before{content:"";position:absolute;left:.42rem;top:0;bottom:0;width:2px;background:var(--rule)}
ol.plan>li:first-child::before{top:1.2rem}ol.plan>li:last-child::before{bottom:calc(100% - 1.2rem)}
ol.plan>li::after{content:"";position:absolute;left:.1rem;top:.88rem;width:.7rem;height:.7rem;border-radius:50%;
background:var(--ground);border:2px solid var(--muted)}
ol.plan>li.new::after{border-radius:2px;background:var(--accent);border-color:var(--accent)}
.row{display:flex;flex-wrap:wrap;gap:.1rem .8rem;align-items:baseline;justify-content:space-between}
.path{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9rem;overflow-wrap:anywhere}
.kept .path{color:var(--muted)}.new .became{color:var(--accent);font-weight:600}
.cost{color:var(--muted);font-size:.85rem;font-variant-numeric:tabular-nums}
.became{font-size:.9rem;color:var(--muted);overflow-wrap:anywhere}
.from{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem .4rem;align-items:baseline;margin:.2rem 0 0;padding:0}
.from .chip{font-size:.8rem;padding:.02rem .55rem;border:1px solid var(--rule);border-radius:1rem;color:var(--muted)}
.from .cost{margin-right:.4rem}
.from b{color:var(--ink);font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18.5rem),1fr));gap:1.5rem 2rem}
figure{margin:1.5rem 0 0;min-width:0}
figcaption{font-size:.9rem;color:var(--muted);margin:0 0 .4rem;overflow-wrap:anywhere}
figcaption b{color:var(--ink);font-weight:600;display:block}
svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;min-width:100%}
caption{text-align:left;color:var(--muted);padding:.2rem 0 .5rem}
th,td{text-align:right;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--rule);white-space:nowrap;
font-weight:400}
th{text-align:left}thead th{color:var(--muted);text-align:right}thead th:first-child{text-align:left}
details{margin:.75rem 0}summary{cursor:pointer;color:var(--accent);font-size:.9rem;width:fit-content;padding:.2rem 0}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px;border-radius:2px}
pre{background:var(--raised);border:1px solid var(--rule);border-radius:6px;padding:.9rem 1rem;overflow-x:auto;
font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:.75rem 0}
blockquote{margin:0 0 .5rem;padding:.7rem 1rem;background:var(--raised);border-radius:6px;white-space:pre-wrap;
overflow-wrap:anywhere;font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
ol.lost{list-style:none;margin:1rem 0;padding:0}ol.lost>li{margin:0 0 1.6rem}
ol.lost.images{display:grid;grid-template-columns:repeat(3,1fr);gap:1.5rem}ol.lost.images>li{margin:0}
ol.lost p{margin:.15rem 0;font-size:.92rem}mark{background:none;color:inherit;border-bottom:2px solid var(--accent)}
.images svg{border:1px solid var(--rule);border-radius:4px;margin-bottom:.4rem;shape-rendering:crispEdges}
ul.notes{padding-left:1.2rem;color:var(--muted);font-size:.92rem}ul.notes li{overflow-wrap:anywhere}
@media (max-width:34rem){ol.lost.images{grid-template-columns:1fr 1fr;gap:1.25rem}}
@media print{main{padding:0}details{display:block}}
"""

STYLE = COLOURS + FIGURES + _PAGE
