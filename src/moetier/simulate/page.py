"""The look of the report: one style sheet for light, dark, narrow and printed pages."""

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root{color-scheme:light dark;--paper:#fdfdfc;--raised:#f5f5f2;--ink:#1c2024;--soft:#5c646d;--rule:#dcdedb;
--heat:#1f5f99;--remark:#8a5a00;--remarkbg:#fdf5e3;
--c0:#0b6bb0;--c1:#c8500a;--c2:#0a7d5d;--c3:#a83279;--c4:#6a4bb5;--c5:#8a6a00;--c6:#2a8aa8;--c7:#b02a37;
--p0:#0b6bb0;--p1:#d9a23b}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--raised:#1c2024;--ink:#e6e8ea;--soft:#a0a8b0;--rule:#343a40;
--heat:#3d8fd6;--remark:#f0c674;--remarkbg:#2a2416;
--c0:#58a9ec;--c1:#f28c48;--c2:#3fbf95;--c3:#ea86c0;--c4:#ab92f0;--c5:#d4b23c;--c6:#62c6e2;--c7:#f27a84;
--p0:#58a9ec;--p1:#c98f2b}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:960px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:1.9rem;line-height:1.2;margin:.1em 0 .3em;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:2.6em 0 .6em;padding-top:.5em;border-top:1px solid var(--rule);overflow-wrap:anywhere}
h3{font-size:1.02rem;margin:0 0 .5em}h4{font-size:.95rem;margin:1.2em 0 .3em}
.kicker{margin:0;color:var(--soft);font-size:.9rem}
.lead{color:var(--soft);margin:.2em 0 1em;max-width:44em}
.headline{font-size:1.08rem;max-width:44em}
.remark{background:var(--remarkbg);border-left:3px solid var(--remark);padding:.5em .9em;margin:.8em 0;max-width:48em}
nav ul{list-style:none;padding:0;margin:1em 0 0;display:flex;flex-wrap:wrap;gap:.3em 1.2em}
a{color:var(--c0)}
dl{display:grid;grid-template-columns:minmax(8em,14em) 1fr;gap:.35em 1.4em;margin:1em 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
figure{margin:2em 0}
figcaption{color:var(--soft);font-size:.9rem;max-width:50em;margin-top:.4em}
.scroll{overflow-x:auto}
svg{display:block;width:100%;min-width:640px;height:auto;
font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg text{fill:var(--ink)}svg .tick{fill:var(--soft);font-size:12px}svg .label{fill:var(--soft);font-size:12.5px}
svg .name{fill:var(--c,var(--ink));font-size:13px}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.series polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.series .error{stroke:var(--c);stroke-width:1.4}
.mark circle,.mark rect,.mark path{fill:var(--c)}
.mark .hollow{fill:var(--paper);stroke:var(--c);stroke-width:1.6}
.leader{stroke:var(--soft);stroke-width:.7;fill:none;opacity:.55}
.cell rect{fill:var(--heat)}.cell text{font-size:10.5px}.cell .deep{fill:#fff}.cell .pale{fill:var(--ink)}
.mark .part,.part{stroke:none}.part.p0,.mark .part.p0{fill:var(--p0)}.part.p1,.mark .part.p1{fill:var(--p1)}
.bound{stroke:var(--ink);stroke-width:2.5}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93rem;margin:.6em 0 1em;
min-width:min(100%,600px)}
caption{text-align:left;color:var(--soft);font-size:.9rem;padding-bottom:.4em}
th,td{padding:.28em .9em .28em 0;text-align:right;border-bottom:1px solid var(--rule);
white-space:nowrap;font-weight:400}
thead th{color:var(--soft);vertical-align:bottom}th:first-child{text-align:left;padding-right:2em}
td.best{font-weight:700}
small{color:var(--soft);font-size:.82em}
details{margin:.6em 0 1.4em}summary{cursor:pointer;color:var(--soft);font-size:.92rem}
pre{background:var(--raised);padding:.8em 1em;overflow-x:auto;font-size:.85rem;
white-space:pre-wrap;overflow-wrap:anywhere}
.failed li{overflow-wrap:anywhere}
@media (max-width:600px){header,main{padding:0 14px}header{padding-top:20px}
dl{grid-template-columns:1fr;gap:0}dt{margin-top:.7em}h1{font-size:1.45rem}}
@media print{body{background:#fff}figure,table{break-inside:avoid}.scroll{overflow:visible}}
"""
