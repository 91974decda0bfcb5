// The screening's plot: gap (x) against probability of being stable (y), a point a candidate, drawn on a canvas.
(() => {
  const box = document.getElementById("screen"), canvas = document.getElementById("screen-plot");
  const tip = document.getElementById("screen-tip"), count = document.getElementById("screen-count");
  const search = document.getElementById("screen-search");
  const low = document.getElementById("screen-low"), high = document.getElementById("screen-high");
  const n = candidates.formula.length, pen = canvas.getContext("2d");
  const margin = { left: 52, right: 14, top: 12, bottom: 42 };
  const kind = (i) => (candidates.known[i] === null ? "new" : candidates.stable[i] ? "stable" : "unstable");
  const elements = candidates.formula.map((formula) => new Set(formula.match(/[A-Z][a-z]?/g)));
  const highest = Math.max(1, ...candidates.gap) * 1.05, lowest = Math.min(0, ...candidates.gap);
  let shown = [], kept = null, hovered = null;
  const width = () => canvas.clientWidth, height = () => canvas.clientHeight;
  const x = (gap) => margin.left + ((gap - lowest) / (highest - lowest)) * (width() - margin.left - margin.right);
  const y = (p) => height() - margin.bottom - p * (height() - margin.top - margin.bottom);
  // A whole formula, or elements that must all be in it.
  const matches = (i, text) => {
    if (!text) return true;
    if (candidates.formula[i].toLowerCase() === text.toLowerCase()) return true;
    const wanted = text.split(/[\s,]+/).filter(Boolean);
    return wanted.every((symbol) => elements[i].has(symbol));
  };
  const choose = () => {
    const text = search.value.trim();
    const from = low.value === "" ? -Infinity : +low.value, to = high.value === "" ? Infinity : +high.value;
    shown = [];
    for (let i = 0; i < n; i++)
      if (candidates.gap[i] >= from && candidates.gap[i] <= to && matches(i, text)) shown.push(i);
    count.textContent = `${shown.length.toLocaleString("en")} of ${n.toLocaleString("en")} candidates`;
    if (kept !== null && !shown.includes(kept)) { kept = null; tip.hidden = true; }
    draw();
  };
  const draw = () => {
    const scale = window.devicePixelRatio || 1, style = getComputedStyle(box);
    const colour = (name) => style.getPropertyValue(name).trim();
    canvas.width = width() * scale; canvas.height = height() * scale;
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width(), height());
    pen.font = "12px system-ui, sans-serif";
    pen.strokeStyle = colour("--rule"); pen.fillStyle = colour("--muted"); pen.lineWidth = 1;
    const step = highest - lowest > 6 ? 1 : 0.5;
    pen.textAlign = "center";
    for (let gap = Math.ceil(lowest / step) * step; gap <= highest; gap += step) {
      pen.beginPath(); pen.moveTo(x(gap), margin.top); pen.lineTo(x(gap), y(0)); pen.stroke();
      pen.fillText(gap.toFixed(1), x(gap), y(0) + 16);
    }
    pen.textAlign = "right";
    for (let p = 0; p <= 1.001; p += 0.2) {
      pen.beginPath(); pen.moveTo(margin.left, y(p)); pen.lineTo(width() - margin.right, y(p)); pen.stroke();
      pen.fillText(p.toFixed(1), margin.left - 6, y(p) + 4);
    }
    pen.fillStyle = colour("--ink"); pen.textAlign = "center";
    pen.fillText("predicted band gap (eV)", (margin.left + width()) / 2, height() - 8);
    pen.save(); pen.translate(14, height() / 2 - 15); pen.rotate(-Math.PI / 2);
    pen.fillText("predicted probability of being stable", 0, 0); pen.restore();
    for (const group of ["new", "unstable", "stable"]) {
      pen.fillStyle = colour(`--${group}`); pen.globalAlpha = group === "new" ? 0.45 : 0.8;
      for (const i of shown) {
        if (kind(i) !== group) continue;
        pen.beginPath(); pen.arc(x(candidates.gap[i]), y(candidates.p[i]), 3, 0, 7); pen.fill();
      }
    }
    pen.globalAlpha = 1;
    for (const i of new Set([kept, hovered])) {
      if (i === null) continue;
      pen.strokeStyle = colour("--ink"); pen.lineWidth = 1.5;
      pen.beginPath(); pen.arc(x(candidates.gap[i]), y(candidates.p[i]), 5.5, 0, 7); pen.stroke();
    }
  };
  const spread = (value) => (value === null ? "" : ` ± ${value.toFixed(2)}`);
  const describe = (i) => {
    if (i === null) { tip.hidden = true; return; }
    const known = { new: "not in the data", stable: "known: stable", unstable: "known: unstable" }[kind(i)];
    const part = candidates.known[i] === null ? "" : ` (${candidates.known[i]})`;
    const tau = candidates.tau[i] === null ? "–" : candidates.tau[i].toFixed(2);
    tip.textContent = `${candidates.formula[i]}  rank ${i + 1}\ngap ${candidates.gap[i].toFixed(2)}${spread(candidates.gapStd[i])} eV\n` +
      `stable ${candidates.p[i].toFixed(2)}${spread(candidates.pStd[i])}\nt ${candidates.t[i].toFixed(3)}, tau ${tau}\n${known}${part}`;
    tip.hidden = false;
    const left = canvas.offsetLeft + x(candidates.gap[i]), top = canvas.offsetTop + y(candidates.p[i]);
    tip.style.left = `${left + tip.offsetWidth + 24 > box.clientWidth ? left - tip.offsetWidth - 12 : left + 12}px`;
    tip.style.top = `${Math.max(0, top - 40)}px`;
  };
  const nearest = (event) => {
    const bounds = canvas.getBoundingClientRect();
    const px = event.clientX - bounds.left, py = event.clientY - bounds.top;
    let best = null, least = 144;
    for (const i of shown) {
      const d = (x(candidates.gap[i]) - px) ** 2 + (y(candidates.p[i]) - py) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  };
  canvas.addEventListener("mousemove", (event) => {
    const found = nearest(event);
    if (found === hovered) return;
    hovered = found; describe(found ?? kept); draw();
  });
  canvas.addEventListener("mouseleave", () => { hovered = null; describe(kept); draw(); });
  canvas.addEventListener("click", (event) => { kept = nearest(event); describe(kept); draw(); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move || !shown.length) return;
    event.preventDefault();
    const place = kept === null ? (move > 0 ? -1 : 0) : shown.indexOf(kept);
    kept = shown[(place + move + shown.length) % shown.length]; describe(kept); draw();
  });
  for (const input of [search, low, high]) input.addEventListener("input", choose);
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  choose();
})();
