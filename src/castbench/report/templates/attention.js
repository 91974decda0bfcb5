// The interactive views of attention: maps of nodes to words, and [CLS] over a running text.
const SCALE = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"]
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1), low = Math.min(Math.floor(at), SCALE.length - 2);
  return SCALE[low].map((v, i) => Math.round(v + (at - low) * (SCALE[low + 1][i] - v)));
}
const css = (colour) => `rgb(${colour.join(",")})`;

// Weights of a packed array: byte b stands for top (b / 255)^2.
async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  return Float32Array.from(raw, (byte) => packed.top * (byte / 255) ** 2);
}

const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
function showTip(event, lines) {
  tip.replaceChildren(...lines.map((line, i) => Object.assign(document.createElement(i ? "div" : "b"), { textContent: line })));
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.min(event.clientX + 14, room)}px`;
  tip.style.top = `${event.clientY + 18 + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18}px`;
}
const hideTip = () => { tip.hidden = true; };
const digits = (weight) => (weight >= 0.001 || weight === 0 ? weight.toFixed(4) : weight.toExponential(1));

function option(value, text) { return Object.assign(document.createElement("option"), { value, textContent: text }); }
function sized(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  pen.fillStyle = getComputedStyle(document.body).color;
  return pen;
}
function legend(place, limit, colours = SCALE.map(css)) {
  place.replaceChildren("attention 0 ", Object.assign(document.createElement("i"), { className: "ramp" }), ` ${digits(limit)} and more`);
  place.querySelector("i").style.background = `linear-gradient(90deg, ${colours.join(",")})`;
}
// Coloured names of the parts that occur.
function key(place, labels, colours, parts) {
  place.replaceChildren(...[...new Set(parts)].sort((a, b) => a - b).map((part) => {
    const name = Object.assign(document.createElement("span"), { textContent: labels[part] });
    name.style.setProperty("--swatch", colours[part]);
    return name;
  }));
}

// --- maps: an overview of all layers and heads, and one of them with its words -----------------------
async function drawMaps(view) {
  const data = JSON.parse(view.querySelector("script").textContent);
  const find = (name) => view.querySelector(`.${name}`);
  const [picker, layerPicker, headPicker] = ["material", "layer", "head"].map((name) => find(`pick-${name}`));
  data.materials.forEach((m, i) => picker.append(option(i, `${m.formula} (${m.material_id})${m.why ? `: ${m.why}` : ""}`)));
  picker.parentElement.hidden = data.materials.length < 2;
  let material, weights, layers, heads, nodes, words;
  const MEAN = 0; // column 0 is the mean over heads, column h the head h

  const weight = (row, layer, head, node, word) => {
    const at = (h) => weights[(((row * layers + layer) * heads + h) * nodes + node) * words + word];
    if (head !== MEAN) return at(head - 1);
    let sum = 0;
    for (let h = 0; h < heads; h++) sum += at(h);
    return sum / heads;
  };
  const headName = (head) => (head === MEAN ? "mean over heads" : `head ${head}`);
  const describe = (row, layer, head, node, word) => [
    `${material.nodes[node]} → ${material.words[word]}`,
    `${data.labels[material.parts[word]]}, word ${word + 1} of ${words}`,
    `attention ${digits(weight(row, layer, head, node, word))}`,
    `${data.rows[row].label}, layer ${layer + 1}, ${headName(head)}`,
  ];

  async function choose() {
    material = data.materials[picker.value];
    weights = await unpack(material);
    [, layers, heads, nodes, words] = material.shape;
    const before = [layerPicker.value, headPicker.value];
    layerPicker.replaceChildren(...Array.from({ length: layers }, (_, i) => option(i, i + 1)));
    headPicker.replaceChildren(...Array.from({ length: heads + 1 }, (_, i) => option(i, i ? i : "mean")));
    layerPicker.value = before[0] || layers - 1;
    headPicker.value = before[1] || MEAN;
    const cut = material.tokens < material.tokens_full ? `${material.tokens} of ${material.tokens_full} tokens read` : `${material.tokens} tokens`;
    const shown = nodes < material.all_nodes ? `first ${nodes} of ${material.all_nodes} nodes` : `${nodes} node${nodes > 1 ? "s" : ""}`;
    find("facts-line").textContent = [material.formula, material.material_id, material.split && `${material.split} split`, shown, cut].filter(Boolean).join(" · ");
    legend(find("legend"), material.limit);
    key(find("key"), data.labels, data.colours, material.parts);
    overview();
    detail();
  }

  function paint(pen, row, layer, head, left, top, wide, high) {
    const image = new ImageData(words, nodes);
    for (let node = 0; node < nodes; node++) {
      for (let word = 0; word < words; word++) {
        const colour = viridis(weight(row, layer, head, node, word) / material.limit);
        image.data.set([...colour, 255], 4 * (node * words + word));
      }
    }
    const small = new OffscreenCanvas(words, nodes);
    small.getContext("2d").putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(small, left, top, wide, high);
  }

  function overview() {
    const place = find("overview");
    place.replaceChildren(...data.rows.map((entry, row) => {
      const canvas = document.createElement("canvas");
      const box = document.createElement("div"), title = document.createElement("h4");
      title.textContent = entry.label;
      title.style.color = entry.colour;
      const margin = 46, top = 16, gap = 5;
      const wide = Math.max((place.clientWidth - margin) / (heads + 1) - gap, 28);
      const high = Math.min(Math.max(5 * nodes, 16), 64);
      const pen = sized(canvas, margin + (heads + 1) * (wide + gap), top + layers * (high + gap));
      const cell = (layer, head) => [margin + head * (wide + gap), top + layer * (high + gap)];
      for (let head = 0; head <= heads; head++) pen.fillText(head ? (wide > 50 ? `head ${head}` : head) : "mean", cell(0, head)[0], 11);
      for (let layer = 0; layer < layers; layer++) {
        pen.fillText(`layer ${layer + 1}`, 0, cell(layer, 0)[1] + high / 2 + 4);
        for (let head = 0; head <= heads; head++) {
          const [x, y] = cell(layer, head);
          paint(pen, row, layer, head, x, y, wide, high);
          if (layer === +layerPicker.value && head === +headPicker.value) {
            pen.strokeStyle = entry.colour;
            pen.lineWidth = 2;
            pen.strokeRect(x - 1.5, y - 1.5, wide + 3, high + 3);
          }
        }
      }
      const hit = (event) => {
        const head = Math.floor((event.offsetX - margin) / (wide + gap)), layer = Math.floor((event.offsetY - top) / (high + gap));
        if (head < 0 || head > heads || layer < 0 || layer >= layers) return null;
        const [x, y] = cell(layer, head);
        const word = Math.floor((event.offsetX - x) / wide * words), node = Math.floor((event.offsetY - y) / high * nodes);
        return word < words && node < nodes ? [layer, head, node, word] : null;
      };
      canvas.addEventListener("mousemove", (event) => { const at = hit(event); if (at) showTip(event, describe(row, ...at)); else hideTip(); });
      canvas.addEventListener("mouseleave", hideTip);
      canvas.addEventListener("click", (event) => {
        const at = hit(event);
        if (at) { [layerPicker.value, headPicker.value] = at; overview(); detail(); }
      });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${entry.label}: attention of ${nodes} nodes to ${words} words in ${layers} layers and ${heads} heads`);
      box.append(title, canvas);
      return box;
    }));
  }

  function detail() {
    const place = find("detail"), layer = +layerPicker.value, head = +headPicker.value;
    const probe = sized(document.createElement("canvas"), 1, 1);
    const margin = Math.max(...material.nodes.map((name) => probe.measureText(name).width)) + 10;
    const room = Math.max(...material.words.map((name) => probe.measureText(name).width)) + 8;
    const wide = Math.min(Math.max((place.clientWidth - margin - 12) / words, 13), 26), high = nodes > 12 ? 13 : 17;
    const block = nodes * high + 28, ruler = 17, below = room;
    const canvas = document.createElement("canvas");
    const pen = sized(canvas, margin + words * wide + 10, data.rows.length * block + ruler + below + 6);
    const ink = pen.fillStyle;
    data.rows.forEach((entry, row) => {
      const top = row * block + 20;
      pen.fillStyle = entry.colour;
      pen.font = pen.font.replace("11px", "600 12px");
      pen.fillText(`${entry.label}, layer ${layer + 1}, ${headName(head)}`, margin, top - 6);
      pen.font = pen.font.replace("600 12px", "11px");
      pen.fillStyle = ink;
      material.nodes.forEach((name, node) => pen.fillText(name, margin - 6 - pen.measureText(name).width, top + (node + 0.5) * high + 4));
      paint(pen, row, layer, head, margin, top, words * wide, nodes * high);
    });
    const base = data.rows.length * block + 2;
    for (let start = 0, stop; start < words; start = stop) { // runs of words about one part
      const part = material.parts[start], name = data.labels[part];
      for (stop = start + 1; stop < words && material.parts[stop] === part; stop++);
      const left = margin + start * wide, across = (stop - start) * wide, text = pen.measureText(name).width;
      pen.fillStyle = data.colours[part];
      pen.fillRect(left, base, across, ruler - 3);
      pen.fillStyle = "#1b1f25";
      if (text + 6 < across) pen.fillText(name, left + (across - text) / 2, base + ruler - 6);
    }
    pen.fillStyle = ink;
    material.words.forEach((name, word) => {
      pen.save();
      pen.translate(margin + (word + 0.5) * wide + 4, base + ruler + 3);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "right";
      pen.fillText(name, 0, 0);
      pen.restore();
    });
    const hit = (event) => {
      const row = Math.floor(event.offsetY / block), word = Math.floor((event.offsetX - margin) / wide);
      const node = Math.floor((event.offsetY - row * block - 20) / high);
      return row < data.rows.length && word >= 0 && word < words && node >= 0 && node < nodes ? [row, layer, head, node, word] : null;
    };
    canvas.addEventListener("mousemove", (event) => { const at = hit(event); if (at) showTip(event, describe(...at)); else hideTip(); });
    canvas.addEventListener("mouseleave", hideTip);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Attention of the nodes of ${material.formula} to the words of its description`);
    // Where a cell lies, for those who drive the page.
    Object.assign(canvas.dataset, { margin, wide, high, block, top: 20 });
    place.replaceChildren(canvas);
  }

  picker.addEventListener("change", choose);
  for (const other of [layerPicker, headPicker]) other.addEventListener("change", () => { overview(); detail(); });
  let width = view.clientWidth;
  new ResizeObserver(() => { if (view.clientWidth !== width) { width = view.clientWidth; overview(); detail(); } }).observe(view);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { overview(); detail(); });
  await choose();
  view.dataset.ready = "true";
}

// --- [CLS] over a running text -----------------------------------------------------------------------
async function drawText(view) {
  const data = JSON.parse(view.querySelector("script").textContent), weights = await unpack(data);
  const find = (name) => view.querySelector(`.${name}`);
  const [layers, heads, words] = data.shape;
  const layerPicker = find("pick-layer"), headPicker = find("pick-head");
  for (let layer = 0; layer < layers; layer++) layerPicker.append(option(layer, `${layer + 1} (BertViz: ${layer})`));
  headPicker.append(option(0, "mean"), ...Array.from({ length: heads }, (_, i) => option(i + 1, i + 1)));
  layerPicker.value = data.layers[0];
  const weight = (layer, head, word) => {
    const at = (h) => weights[(layer * heads + h) * words + word];
    return head ? at(head - 1) : Array.from({ length: heads }, (_, h) => at(h)).reduce((a, b) => a + b) / heads;
  };
  const spans = data.words.map((word, i) => {
    const span = Object.assign(document.createElement("span"), { textContent: word });
    span.style.setProperty("--part", data.colours[data.parts[i]]);
    return span;
  });
  function draw() {
    const layer = +layerPicker.value, head = +headPicker.value;
    const values = spans.map((_, word) => weight(layer, head, word));
    // [CLS] and [SEP] may take most of it: the scale is that of the words.
    const inner = values.filter((_, word) => data.labels[data.parts[word]] !== "[CLS], [SEP]");
    const limit = Math.max(...inner) || 1;
    spans.forEach((span, word) => {
      const share = Math.min(values[word] / limit, 1);
      span.style.background = `rgb(230 159 0 / ${share})`;
      span.style.color = share > 0.5 ? "#111" : "";
      span.onmousemove = (event) => showTip(event, [
        data.words[word], `${data.labels[data.parts[word]]}, word ${word + 1} of ${words}`,
        `attention of [CLS] ${digits(values[word])}`, `layer ${layer + 1}, ${head ? `head ${head}` : "mean over heads"}`,
      ]);
      span.onmouseleave = hideTip;
    });
    legend(find("legend"), limit, ["rgb(230 159 0 / 0)", "rgb(230 159 0)"]);
    const share = new Map();
    values.forEach((value, word) => share.set(data.parts[word], (share.get(data.parts[word]) || 0) + value));
    find("facts-line").textContent = `Share of attention: ${[...share].sort((a, b) => b[1] - a[1]).map(([part, sum]) => `${data.labels[part]} ${(100 * sum).toFixed(1)} %`).join(", ")}`;
  }
  find("running").replaceChildren(...spans.flatMap((span) => [span, " "]));
  key(find("key"), data.labels, data.colours, data.parts);
  layerPicker.addEventListener("change", draw);
  headPicker.addEventListener("change", draw);
  draw();
  view.dataset.ready = "true";
}
document.querySelectorAll(".map-view").forEach(drawMaps);
document.querySelectorAll(".text-view").forEach(drawText);
