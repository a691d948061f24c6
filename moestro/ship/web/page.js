// Packages, releases, lineage and transfers, drawn from the REST interface; text is never taken for HTML.
"use strict";

const find = (selector, place = document) => place.querySelector(selector);
const SVG = "http://www.w3.org/2000/svg";
const WHEN = { year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit" };

function bytesText(number) {
  const names = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (number >= 1024 && step < names.length - 1) { number /= 1024; step += 1; }
  return `${step && number < 100 ? number.toPrecision(3) : Math.round(number)} ${names[step]}`;
}

function made(name, text = "", attributes = {}, space = null) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

async function ask(path) {
  const token = sessionStorage.getItem("token");
  const answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {} });
  const table = await answer.json();
  if (!answer.ok) throw new Error(table.detail || answer.statusText);
  return table;
}

function say(text, wrong = false) {
  find("#message").textContent = text;
  find("#message").className = wrong ? "wrong" : "";
}

const valid = (releases) => releases.filter((release) => !release.revoked);
const sequences = (releases) => [...new Set(valid(releases).map((release) => release.sequence))].sort((a, b) => a - b);

function parentText(model) {
  if (model.base) return `update ${model.chain} on ${model.base.slice(0, 8)} (${model.mode})`;
  const parent = model.info.parent;
  return parent ? `${parent.relation} of ${parent.model_id || String(parent.weights_root).slice(0, 8)}` : "";
}

function addRow(body, release, model) {
  const row = made("tr", "", release.revoked ? { class: "revoked" } : {});
  const weights = model.weights_root ? model.weights_root.slice(0, 8) : "encrypted";
  const when = new Date(release.published * 1000).toLocaleString("sv-SE", WHEN);
  const cells = [`${release.sequence}`, release.kind, "", parentText(model), bytesText(release.size), when, release.publisher];
  for (const text of cells) row.append(made("td", text));
  row.children[2].append(`${model.model_id} ${model.info.model_version || ""} `, made("code", weights));
  body.append(row);
}

function drawLineage(svg, releases) {
  const numbers = sequences(releases).slice(-12);
  const place = new Map(numbers.map((number, index) => [number, 40 + index * 110]));
  const bySource = new Map();
  for (const release of valid(releases)) for (const model of release.models) bySource.set(model.weights_root, release.sequence);
  svg.setAttribute("width", 80 + Math.max(numbers.length - 1, 0) * 110);
  svg.setAttribute("height", 96);
  numbers.slice(1).forEach((number, index) => {
    const line = `M${place.get(numbers[index]) + 14} 62H${place.get(number) - 14}`;
    svg.append(made("path", "", { d: line, class: "next" }, SVG));
  });
  for (const release of valid(releases).filter((item) => item.kind === "update")) {
    const from = bySource.get(release.models.map((model) => model.base).find(Boolean));
    const start = place.get(from), end = place.get(release.sequence);
    if (start === undefined || end === undefined || start === end) continue;
    const top = 50 - 14 * Math.min(3, Math.abs(end - start) / 110), middle = (start + end) / 2;
    svg.append(made("path", "", { d: `M${start} 50Q${middle} ${top - 16} ${end} 50`, class: "edge" }, SVG));
    svg.append(made("text", bytesText(release.size), { x: middle, y: top - 2, class: "size" }, SVG));
  }
  for (const number of numbers) {
    svg.append(made("circle", "", { cx: place.get(number), cy: 62, r: 13 }, SVG));
    svg.append(made("text", number, { x: place.get(number), y: 66 }, SVG));
  }
}

function addBar(place, name, label, bytes, most) {
  const row = made("div", "", { class: `bar ${name}${bytes === null ? " unknown" : ""}` });
  const bar = made("div");
  bar.style.width = `${bytes === null ? 0 : (100 * bytes) / most}%`;
  row.append(made("span", label), bar, made("span", bytes === null ? "–" : bytesText(bytes)));
  place.append(row);
}

async function showTransfer(section, packageId) {
  const base = find(".base", section).value, target = find(".target", section).value, place = find(".bars", section);
  try {
    const query = `base=${encodeURIComponent(base)}&target=${encodeURIComponent(target)}`;
    const route = await ask(`/v1/packages/${encodeURIComponent(packageId)}/transfer?${query}`);
    place.replaceChildren();
    const most = Math.max(route.full_bytes || 0, route.chunk_bytes || 0, route.update_bytes || 0, 1);
    addBar(place, "full", "the full package", route.full_bytes, most);
    addBar(place, "chunks", "its chunks that are not there", route.chunk_bytes, most);
    const steps = route.updates.length > 1 ? `${route.updates.length} residual updates` : "a residual update";
    addBar(place, "updates", steps, route.update_bytes, most);
  } catch (error) {
    place.replaceChildren(made("p", error.message));
  }
}

function addPackage(item) {
  const section = find("#package").content.cloneNode(true).firstElementChild;
  find("h2", section).textContent = item.package_id;
  const newest = valid(item.releases)[0];
  const info = newest ? newest.models[0].info : {};
  find(".about", section).textContent = [info.description, info.license, `${item.releases.length} releases`].filter(Boolean).join(" · ");
  for (const release of item.releases) for (const model of release.models) addRow(find("tbody", section), release, model);
  drawLineage(find(".lineage", section), item.releases);
  const numbers = sequences(item.releases);
  for (const [name, chosen] of [["base", numbers.at(-2)], ["target", numbers.at(-1)]]) {
    const list = find(`.${name}`, section);
    for (const number of numbers) list.append(made("option", number, number === chosen ? { selected: "" } : {}));
    list.addEventListener("change", () => showTransfer(section, item.package_id));
  }
  find("#packages").append(section);
  if (numbers.length > 1) showTransfer(section, item.package_id);
  else for (const part of [".transfer", ".bars"]) find(part, section).remove();
}

async function show() {
  find("#packages").replaceChildren();
  try {
    const { packages } = await ask("/v1/packages");
    packages.forEach(addPackage);
    const open = sessionStorage.getItem("token") ? "" : " without a token";
    say(packages.length ? "" : `no packages are readable${open}`);
  } catch (error) {
    say(error.message, true);
  }
}

find("#login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", find("#token").value.trim());
  find("#token").value = "";
  show();
});
show();
