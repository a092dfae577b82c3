"""How the page looks. All of it stands below `.mq`, so that a notebook is not restyled with it."""

# Text has a contrast of at least 4.5 with what it stands on, in both themes (WCAG 2.2, 1.4.3).
LIGHT = """--ink: #1b1c1f; --quiet: #565a63; --page: #fafaf8; --card: #ffffff; --line: #dcdcd8;
  --a: #0a5bb5; --b: #b4430a; --good: #1a6e36; --bad: #b3261e; --note: #7a5b00; --wash: #eceae4;"""
DARK = """--ink: #e9e9ec; --quiet: #a9adb6; --page: #131416; --card: #1c1e21; --line: #34373c;
  --a: #7ab8ff; --b: #ffab7a; --good: #79d492; --bad: #ff8f87; --note: #e7c35c; --wash: #26292d;"""

_DRAWN = """
{root} .ground {{ fill: var(--card); }} {root} .grid {{ stroke: var(--line); }}
{root} .line {{ fill: none; stroke-width: 2; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }}
{root} .line0 {{ stroke: var(--a); }} {root} .line1 {{ stroke: var(--b); stroke-dasharray: 6 3; }}
{root} .dot0, {root} .name0 {{ fill: var(--a); }}
{root} .dot1, {root} .name1 {{ fill: var(--b); }}
{root} .warmup {{ fill: var(--wash); }}
{root} .level {{ stroke: var(--quiet); stroke-dasharray: 5 4; }}
{root} .best {{ stroke: var(--good); stroke-dasharray: 4 3; stroke-width: 1.5; }}
{root} text {{ font: 12px system-ui, sans-serif; fill: var(--quiet); }}
{root} text.title {{ font-weight: 600; fill: var(--ink); }}
{root} text.name0 {{ fill: var(--a); }} {root} text.name1 {{ fill: var(--b); }}
{root} .end {{ text-anchor: end; }} {root} .mid {{ text-anchor: middle; }}
"""

_THEMES = """
{root} {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ {root} {{ {dark} }} }}
"""

PLOT_STYLE = _THEMES.format(root="svg", light=LIGHT, dark=DARK) + _DRAWN.format(root="svg")

STYLE = (
    _THEMES.format(root=".mq", light=LIGHT, dark=DARK)
    + _DRAWN.format(root=".mq .plot")
    + """
.mq { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--page); -webkit-text-size-adjust: 100%; }
body.mq { margin: 0; } .mq * { box-sizing: border-box; }
.mq main, .mq footer { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
.mq header { padding: 2.2rem 0 .6rem; }
.mq h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; margin: 0 0 .3rem;
  overflow-wrap: anywhere; letter-spacing: -.01em; color: var(--ink); }
.mq h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; color: var(--ink); }
.mq h3 { font-size: 1rem; margin: 0 0 .35rem; color: var(--ink); }
.mq p { margin: .3rem 0; } .mq .quiet { color: var(--quiet); font-size: .9rem; }
.mq a { color: var(--a); }
.mq nav { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-top: .5rem; }
.mq .grid2 { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.mq .answers { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
.mq .answers .card { flex: 1 1 17rem; }
.mq .card, .mq figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .9rem 1rem; margin: 0; min-width: 0; }
.mq .question { color: var(--quiet); font-size: .85rem; font-weight: 600; margin: 0 0 .2rem; }
.mq .verdict { font-size: 1.18rem; font-weight: 650; line-height: 1.3; margin: 0 0 .3rem; }
.mq .verdict::before { display: inline-block; width: 1.3em; }
.mq .good .verdict::before { content: "✓"; color: var(--good); }
.mq .bad .verdict::before { content: "✕"; color: var(--bad); }
.mq .note .verdict::before { content: "!"; color: var(--note); }
.mq .advice { border-left: 4px solid var(--note); margin-top: 1rem; }
.mq figcaption { display: flex; flex-wrap: wrap; gap: .1rem .9rem; align-items: baseline; }
.mq figcaption b { font-size: 1rem; }
.mq .name0, .mq .name1 { font-size: .9rem; font-weight: 600; }
.mq .name0 { color: var(--a); } .mq .name1 { color: var(--b); }
.mq .plot { display: block; overflow: visible; }
.mq .wide { margin-bottom: 1rem; }
.mq .scroll { overflow-x: auto; }
.mq table { border-collapse: collapse; width: 100%; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
.mq th, .mq td { text-align: left; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; background: none; color: var(--ink); }
.mq th { font-weight: 600; } .mq thead th { color: var(--quiet); font-size: .85rem; }
.mq .num { text-align: right; white-space: nowrap; }
.mq tr.sum > * { font-weight: 700; }
.mq .facts td, .mq .facts th { overflow-wrap: anywhere; } .mq .facts th { width: 38%; }
.mq .bar { display: block; height: .8rem; min-width: 1px; border-radius: 3px;
  background: var(--a); }
.mq .bar.other { background: var(--b); } .mq td.bars { width: 45%; vertical-align: middle; }
.mq pre { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: .3rem 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere; background: none; color: var(--ink); }
.mq pre.code { background: var(--wash); border-radius: 6px; padding: .6rem .8rem; }
.mq .sample { margin-bottom: 1rem; }
.mq .sample .grid3 { display: grid; gap: .9rem 1.4rem; margin-top: .8rem;
  border-top: 1px solid var(--line); padding-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.mq .said { max-height: 18rem; overflow-y: auto; }
.mq .after h3 { color: var(--good); } .mq .sample h3 { font-size: .85rem; }
.mq details { margin-top: .8rem; }
.mq summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
.mq footer { color: var(--quiet); font-size: .85rem; padding-top: 2rem; padding-bottom: 2.5rem; }
@media print { .mq .card, .mq figure { break-inside: avoid; } }
"""
)
