"""Pages of reports: one HTML file each, without scripts and without anything from elsewhere, in light and dark."""

from __future__ import annotations

from html import escape

_STYLE = """
:root { color-scheme: light dark; --back: #fcfcfb; --text: #1d1d1f; --soft: #63636a; --line: #dcdce0; --card: #fff;
  --mark: #2563b8; --mark-2: #b45309; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #131416; --text: #ececef; --soft: #a3a3ab; --line: #35363b;
  --card: #1b1c1f; --mark: #6ea8f5; --mark-2: #e9a15b; --bad: #f2877f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 16px 40px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 15px; margin: 0 0 8px; }
p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(146px, 1fr)); gap: 12px; margin: 20px 0; }
.figures div, section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; }
.figures b { display: block; font-size: 24px; font-weight: 600; } .figures span { color: var(--soft); font-size: 13px; }
.bad b, .bad td { color: var(--bad); }
section.wide { margin-bottom: 12px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 8px; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; white-space: normal; vertical-align: bottom; }
@media (max-width: 560px) { th, td { padding: 5px 4px; font-size: 13px; } }
"""


def document(title: str, style: str, *body: str) -> str:
    """Return a page.

    Args:
        title: A text, also its heading.
        style: Rules beside those that all reports share.
        body: HTML.
    """
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            """<meta http-equiv="content-security-policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
            f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *body,
            "</body></html>\n",
        )
    )


def figure(value: str, title: str, *, bad: bool = False) -> str:
    """Return a figure of the page's head: two texts, the first one large."""
    return f"<div{' class=bad' if bad else ''}><b>{escape(value)}</b><span>{escape(title)}</span></div>"
