"""Style sheet of the page: light, printable, no fonts or files from elsewhere."""

STYLE = """
:root { --ink: #1d2733; --muted: #5b6775; --line: #dfe5ec; --paper: #ffffff; --back: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
header { margin-bottom: 20px; }
h1 { font-size: 28px; line-height: 1.2; margin: 4px 0 10px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 0 0 10px; max-width: 88ch; }
.kind { color: var(--muted); font-size: 13px; margin: 0; }
.headline { font-size: 20px; line-height: 1.4; max-width: none; margin-bottom: 14px; }
.verdict { max-width: none; padding: 12px 16px; border-left: 5px solid; border-radius: 4px;
  margin: 0; }
.verdict .claim { display: block; color: var(--muted); font-size: 13px; margin-top: 3px; }
.good { background: #e8f4ee; border-color: #00795a; }
.bad { background: #fbece4; border-color: #c04f00; }
.open { background: #eef1f5; border-color: #8a94a0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 18px 20px; margin-bottom: 18px; }
section.plots { background: none; border: 0; padding: 0; display: grid; gap: 18px;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
figure { margin: 0; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 16px; break-inside: avoid; }
figure.full { grid-column: 1 / -1; }
figcaption { font-size: 13px; color: var(--muted); margin-bottom: 8px; }
figcaption b { color: var(--ink); font-weight: 600; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  "Liberation Sans", sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 12.5px;
  vertical-align: bottom; border-bottom: 2px solid var(--line); padding: 6px 12px 6px 0; }
td { border-bottom: 1px solid var(--line); padding: 7px 12px 7px 0; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th.num, td.num { text-align: right; padding: 7px 0 7px 12px; }
td small { display: block; color: var(--muted); font-size: 11.5px; white-space: nowrap; }
section.key table { font-size: 15px; }
.made td { font-size: 12.5px; overflow-wrap: anywhere; }
.made td:first-child { white-space: nowrap; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
td:has(.dot), td.num { white-space: nowrap; }
p.note { max-width: none; color: var(--muted); font-size: 12.5px; margin: 8px 0 0; }
.yes { color: #00664c; font-weight: 600; }
.no { color: #a84300; font-weight: 600; }
ul { margin: 0; padding-left: 20px; font-size: 14px; }
li { margin-bottom: 4px; }
@media (max-width: 760px) { section.plots { grid-template-columns: 1fr; } }
@media print { body { background: none; font-size: 11pt; } main { padding: 0; max-width: none; }
  section, figure { border-color: #ccc; } section { break-inside: avoid-page; }
  .verdict { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .dot { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""
