// The kiosk page: sends one file, draws the report over the image. Everything comes from this machine's own API.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const FLAGS = ["herniation", "narrowing", "bulging"];
const LIKELY = 0.5; // a flag at least this probable is set in bold
const PAGE = 50;

const state = { study: null, selected: null, shownHistory: 0, request: 0, sets: null, forcedBoxes: false };

// --- small helpers ---------------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const percent = (p) => `${Math.round(p * 100)} %`;
const seconds = (ms) => `${(ms / 1000).toFixed(ms < 9950 ? 2 : 1)} s`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
// A number and its sign stay on one line.
const unbroken = (words) => words.replaceAll(" %", "\u00a0%");
const sentence = (text) => (text && !/[.!?]$/.test(text) ? `${capital(text)}.` : capital(text || ""));

function view(name) {
  document.body.dataset.view = name;
  if (name !== "result") document.title = "Spinebox";
}

function say(text) {
  $("live").textContent = text;
}

class Problem extends Error {
  constructor(error, id) {
    super(error.message);
    this.error = error;
    this.id = id;
  }
}

const UNREACHABLE = {
  code: "page.unreachable",
  message: "The appliance does not answer",
  value: "",
  remedy: "Check that it is switched on, then try again. Nothing that it confirmed is lost.",
};

async function getJson(url) {
  let response;
  let body;
  try {
    response = await fetch(url, { headers: { Accept: "application/json" } });
    body = await response.json();
  } catch {
    throw new Problem(UNREACHABLE);
  }
  if (!response.ok) throw new Problem(body.error || UNREACHABLE, body.id);
  return body;
}

// --- sending a file --------------------------------------------------------------------------------------------------

function send(file) {
  const limit = Number(document.body.dataset.maxBytes);
  if (file.size > limit) {
    const remedy = "Send one slice per file, not a whole series.";
    showError({ code: "study.too-large", message: "The file is too large", value: `${file.name}: ${file.size} of ${limit} bytes`, remedy });
    return;
  }
  const turn = ++state.request;
  const budget = Number(document.body.dataset.budgetMs);
  view("busy");
  $("busy-what").textContent = "Sending…";
  $("busy-detail").textContent = file.name;
  $("busy-bar").value = 0;
  say("Sending the image");
  let ticking = 0;
  const request = new XMLHttpRequest();
  request.open("POST", "/api/studies");
  request.responseType = "json";
  request.upload.onprogress = (event) => {
    if (event.lengthComputable) $("busy-bar").value = (20 * event.loaded) / event.total;
  };
  request.upload.onload = () => {
    const started = performance.now();
    $("busy-what").textContent = "Looking for the spine…";
    say("Computing");
    ticking = setInterval(() => {
      const taken = performance.now() - started;
      // The rest of the bar is the time allowed; it waits just before its end when that is over.
      $("busy-bar").value = 20 + Math.min(78, (78 * taken) / budget);
      $("busy-detail").textContent = `${(taken / 1000).toFixed(1)} s of ${(budget / 1000).toFixed(0)} s`;
    }, 100);
  };
  request.onloadend = () => {
    clearInterval(ticking);
    if (turn !== state.request) return;
    const body = request.response;
    if (!body) {
      showError(UNREACHABLE);
    } else if (request.status >= 400 && body.id) {
      // Refused, but kept: show which image it was, and why.
      open(body.id);
    } else if (request.status >= 400) {
      showError(body.error);
    } else {
      state.study = body;
      location.hash = body.id;
      showStudy(body);
    }
  };
  const form = new FormData();
  form.append("file", file);
  request.send(form);
}

function open(id) {
  state.study = null;
  if (location.hash === `#${id}`) {
    openFromHash();
  } else {
    location.hash = id;
  }
}

function showError(error) {
  view("error");
  $("error-title").textContent = sentence(error.message);
  $("error-remedy").textContent = sentence(error.remedy);
  $("error-detail").textContent = [error.value, `[${error.code}]`].filter(Boolean).join(" ");
  $("error-title").focus();
  say(`${sentence(error.message)} ${sentence(error.remedy)}`);
}

// --- earlier studies -------------------------------------------------------------------------------------------------

const STATUS = { complete: "Complete", partial: "Partial", refused: "No answer", accepted: "Waiting" };

function historyItem(entry) {
  const when = new Date(entry.study.received_at).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const link = element("a", { href: `#${entry.id}` });
  link.append(
    element("span", { class: "name" }, entry.study.name),
    element("span", { class: "when" }, when),
    element("span", { class: `tag ${entry.status}` }, STATUS[entry.status] || entry.status),
  );
  return element("li", {}, link);
}

async function loadHistory(more = false) {
  const offset = more ? state.shownHistory : 0;
  try {
    const body = await getJson(`/api/studies?limit=${PAGE}&offset=${offset}`);
    if (!more) $("history").replaceChildren();
    $("history").append(...body.studies.map(historyItem));
    state.shownHistory = offset + body.studies.length;
    $("history-empty").hidden = body.total > 0;
    $("history-empty").textContent = "None yet.";
    $("history-more").hidden = state.shownHistory >= body.total;
  } catch (problem) {
    $("history-empty").hidden = false;
    $("history-empty").textContent = problem.message;
  }
}

// --- one study -------------------------------------------------------------------------------------------------------

const SHED = { heatmap: "the heatmap", masks: "the outlines", grades: "the grades" };

function listed(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

function nameOf(finding) {
  if (finding.level) return { name: finding.level, note: "" };
  // Of a radiograph no level is ever named: that is said once, not with each vertebra.
  return { name: `${capital(finding.label)} ${finding.number}`, note: state.study?.frontal ? "" : "level not named" };
}

function spokenName(finding) {
  const { name, note } = nameOf(finding);
  return note ? `${name} (${note})` : name;
}

function showBanner(study) {
  const { status, shed = [], study: about, error } = study;
  $("banner").className = `banner ${status}${study.frontal ? " frontal" : ""}`;
  let title = { complete: "Complete", partial: "Partial answer", refused: "No answer", accepted: "Not computed yet" }[status] || status;
  let text = "";
  let remedy = "";
  if (status === "refused" && error) {
    text = sentence(error.message) + (error.value ? ` (${error.value})` : "");
    remedy = sentence(error.remedy);
  } else if (status === "accepted") {
    text = "The image is kept; the appliance works on it. This page looks again by itself.";
  } else if (shed.length) {
    const reasons = [...new Set(Object.values(study.shed_reasons || {}))];
    text = `To be in time, ${listed(shed.map((s) => SHED[s] || s))} ${shed.length > 1 ? "were" : "was"} left out`;
    text += reasons.length === 1 ? `: ${reasons[0]}.` : ".";
    remedy = "Send the image again for the whole answer.";
  } else if (status === "partial") {
    const withheld = study.heatmaps.find((h) => !h.available);
    text = withheld ? "A heatmap is withheld; its disc says why." : "Something was withheld; see the notes below.";
    if (withheld && study.frontal) text = `The heatmap for ${withheld.target} is withheld: ${withheld.reason || "no reason given"}.`;
  }
  if (status === "complete" || status === "partial") {
    const discs = study.findings.filter((f) => f.label === "disc").length;
    const others = study.findings.length - discs;
    const vertebrae = `${others} ${others === 1 ? "vertebra" : "vertebrae"}`;
    title += study.frontal ? `: ${[vertebrae, ...frontalWords(study.frontal)].join(", ")}` : `: ${discs} ${discs === 1 ? "disc" : "discs"}, ${vertebrae}`;
  }
  $("banner-title").textContent = unbroken(title);
  $("banner-text").textContent = text;
  $("banner-remedy").textContent = remedy;
  const took = about.elapsed_ms === null ? "" : `${seconds(about.elapsed_ms)} of ${seconds(about.budget_ms)} allowed`;
  const unkept = about.kept === false ? "not on the disk yet" : "";
  $("banner-time").textContent = [took + (about.late ? " (late)" : ""), unkept, about.name].filter(Boolean).join(" · ");
  document.title = `${about.name} – Spinebox`;
  say(`${title}. ${text} ${remedy}`);
}

function flagList(finding) {
  const flags = finding.flags || {};
  const known = FLAGS.filter((f) => f in flags);
  if (!known.length) return [];
  const list = element("span", { class: "flags" });
  for (const flag of known.sort((a, b) => flags[b] - flags[a])) {
    list.append(element("span", { class: flags[flag] >= LIKELY ? "yes" : "no" }, `${capital(flag)} ${percent(flags[flag])}`));
  }
  return [list];
}

function gradeChip(finding) {
  if (finding.label !== "disc") return element("span", { class: "chip none" }, `found ${percent(finding.score)}`);
  if (!finding.pfirrmann) return element("span", { class: "chip none" }, "not graded");
  const { grade, probabilities } = finding.pfirrmann;
  return element("span", { class: `chip g${grade}` }, `Pfirrmann ${grade}`, element("small", {}, percent(probabilities[grade - 1])));
}

// --- what a frontal radiograph has beside its vertebrae ---------------------------------------------------------------

function frontalWords(frontal) {
  return [`${frontal.class} ${percent(frontal.probabilities[frontal.class])}`, frontal.severity ? `severity ${frontal.severity}` : "no angle measured"];
}

// The margin is rounded up: it may be too wide, not too narrow.
const cobb = (curve) => `${curve.angle_deg.toFixed(0)}° ± ${Math.ceil(curve.margin_deg)}°`;

function curveItem(curve) {
  const where = `Vertebrae ${curve.upper} to ${curve.lower}, apex ${curve.apex}, convex to the ${curve.convex}`;
  return element("li", { class: "curve" }, element("span", { class: "region" }, capital(curve.region)), element("b", {}, cobb(curve)), element("small", {}, where));
}

function fillFrontal(study) {
  const { frontal } = study;
  $("frontal").hidden = !frontal;
  $("curves").replaceChildren();
  $("curves-words").replaceChildren();
  $("classes").replaceChildren();
  if (!frontal) return;
  $("curves").append(...frontal.curves.map(curveItem));
  const said = [];
  if (frontal.severity) said.push(element("p", { class: "severity" }, "Severity, by the largest angle: ", element("b", {}, frontal.severity)));
  if (frontal.curves.length) {
    said.push(element("p", { class: "muted" }, "± holds 95 % of the errors that come from smoothing and from the scatter of the vertebrae."));
  } else {
    said.push(element("p", {}, "No curve was measured."));
  }
  $("curves-words").append(...said, ...measureList({ omitted: study.omitted }));
  const names = Object.keys(frontal.probabilities);
  const bars = element("div", { class: "bars", role: "img", "aria-label": names.map((n) => `${capital(n)} ${percent(frontal.probabilities[n])}`).join(", ") });
  for (const name of names) {
    const p = frontal.probabilities[name];
    const kind = name === frontal.class ? "chosen" : "";
    const bar = shape("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    bar.append(shape("rect", { width: Math.max(0.5, 100 * p), height: 10, fill: `var(--${kind ? "measure" : "muted"})` }));
    bars.append(element("span", { class: kind }, capital(name)), bar, element("span", { class: kind }, percent(p)));
  }
  $("classes").append(bars);
}

// --- measurements ----------------------------------------------------------------------------------------------------

const UNIT = { deg: "°", mm2: " mm²", px2: " px²", ratio: "", grade: "" };

function amount(m) {
  const digits = { ratio: 2, grade: 0, "%": 0 }[m.unit] ?? 1;
  return `${m.value.toFixed(digits).replace("-", "−")}${UNIT[m.unit] ?? ` ${m.unit}`}`;
}

const plain = (name) => name.replaceAll("_", " ");
const measured = (found, name) => (found.measurements || []).find((m) => m.name === name);

// What was measured of a finding or of the whole column, and one sentence for each reason why something was not.
function measureList(found) {
  const made = [];
  if (found.measurements?.length) {
    const list = element("dl", { class: "amounts" });
    for (const m of found.measurements) {
      const value = element("dd", {}, amount(m));
      if (m.where) value.append(element("small", {}, m.where));
      list.append(element("dt", {}, capital(plain(m.name))), value);
    }
    made.push(list);
  }
  const reasons = new Map();
  for (const o of found.omitted || []) reasons.set(o.reason, [...(reasons.get(o.reason) || []), plain(o.name)]);
  for (const [reason, names] of reasons) made.push(element("p", { class: "muted" }, `Not measured: ${listed(names)}; ${reason}.`));
  return made;
}

function segment([[x1, y1], [x2, y2]], kind = "") {
  const pair = shape("g", { class: `measure ${kind}` });
  for (const under of ["under", "over"]) pair.append(shape("line", { class: under, x1, y1, x2, y2 }));
  return pair;
}

function words(text, x, y, size, toRight, kind = "") {
  const made = shape("text", { class: `measure-words ${kind}`, x, y, "font-size": size, "text-anchor": toRight ? "start" : "end" });
  made.textContent = text;
  return made;
}

// Cobb's way: both end plates, drawn on towards the curve's hollow side, and a bow with the angle between them.
function cobbMarks(angle, unit, room) {
  const right = angle.lines_px[0][1][0] > angle.lines_px[0][0][0];
  // As far as the stage goes, with room for the bow (widest where the plates end) and its words.
  const [upper, lower] = angle.lines_px;
  const aside = 98 * unit + 0.07 * Math.hypot(lower[1][0] - upper[1][0], lower[1][1] - upper[1][1]);
  const edge = right ? room[1] - aside : room[0] + aside;
  let share = 1.5;
  for (const [a, b] of angle.lines_px) share = Math.min(share, Math.max(0.1, (edge - b[0]) / (b[0] - a[0] || 1)));
  // They meet on that side: the bow stands well before.
  const closing = upper[1][1] - upper[0][1] - (lower[1][1] - lower[0][1]);
  if (closing > 0) share = Math.min(share, Math.max(0.1, (0.6 * (lower[1][1] - upper[1][1])) / closing));
  const ends = angle.lines_px.map(([a, b]) => [b[0] + share * (b[0] - a[0]), b[1] + share * (b[1] - a[1])]);
  const bulge = 0.07 * Math.hypot(ends[1][0] - ends[0][0], ends[1][1] - ends[0][1]) * (right ? 1 : -1);
  const middle = [(ends[0][0] + ends[1][0]) / 2, (ends[0][1] + ends[1][1]) / 2];
  const bow = shape("g", { class: "measure" });
  for (const under of ["under", "over"]) bow.append(shape("path", { class: under, d: `M${ends[0]} Q${middle[0] + 2 * bulge},${middle[1]} ${ends[1]}` }));
  const beside = middle[0] + bulge + (right ? 7 : -7) * unit;
  const x = right ? Math.min(beside, room[1] - 90 * unit) : Math.max(beside, room[0] + 90 * unit);
  const made = shape("g", { class: "cobb" });
  angle.lines_px.forEach((line, i) => made.append(segment(line, "strong"), segment([line[1], ends[i]], "dashed")));
  made.append(bow, words(`Cobb ${angle.value.toFixed(0)}°`, x, middle[1], 16 * unit, right, "strong"));
  return made;
}

// End plates, the angle of the lordosis, Cobb angles, the canal at each disc, slips that have a grade. `room` is what the stage shows, [left, right].
function measureMarks(study, unit, room) {
  const layer = shape("g", { class: "measures", "aria-hidden": "true" });
  for (const finding of study.findings) layer.append(...(measured(finding, "wedge_angle")?.lines_px || []).map((line) => segment(line)));
  const lordosis = measured(study, "lumbar_lordosis");
  if (lordosis?.lines_px?.length === 2) {
    const right = lordosis.lines_px[0][1][0] > lordosis.lines_px[0][0][0];
    // On a narrow screen the number alone, or its word would lie over the names.
    const narrow = (room[1] - room[0]) / unit < 450;
    const aside = (narrow ? 48 : 125) * unit;
    const edge = right ? room[1] - aside : room[0] + aside;
    // Past the names of the discs, but within the stage.
    const share = lordosis.lines_px.reduce((s, [a, b]) => Math.min(s, Math.max(0.1, (edge - b[0]) / (b[0] - a[0] || 1))), 2.6);
    const ends = lordosis.lines_px.map(([a, b]) => [b[0] + share * (b[0] - a[0]), b[1] + share * (b[1] - a[1])]);
    lordosis.lines_px.forEach((line, i) => layer.append(segment(line, "strong"), segment([line[1], ends[i]], "dashed")));
    const x = (right ? Math.max : Math.min)(ends[0][0], ends[1][0]);
    layer.append(segment(ends), words(`${narrow ? "" : "Lordosis "}${lordosis.value.toFixed(0)}°`, x + (right ? 6 : -6) * unit, (ends[0][1] + ends[1][1]) / 2, 15 * unit, right, "strong"));
  }
  for (const angle of study.measurements || []) {
    if (angle.name === "cobb_angle" && angle.lines_px?.length === 2) layer.append(cobbMarks(angle, unit, room));
  }
  const narrowest = JSON.stringify(measured(study, "canal_diameter_narrowest")?.lines_px);
  for (const finding of study.findings) {
    const canal = measured(finding, "canal_diameter");
    if (canal?.lines_px?.length) {
      const [front, back] = canal.lines_px[0];
      const right = back[0] > front[0];
      const kind = JSON.stringify(canal.lines_px) === narrowest ? "strong" : "";
      layer.append(segment(canal.lines_px[0], kind));
      // Under the disc's name where that stands on the same side.
      const [x0, y0, x1, y1] = finding.box_px;
      const x = right ? Math.max(back[0] + 5 * unit, x1 + 8 * unit) : Math.min(back[0] - 5 * unit, x0 - 8 * unit);
      layer.append(words(amount(canal), x, right ? (y0 + y1) / 2 + 17 * unit : back[1], 13 * unit, right, kind));
    }
    if (measured(finding, "meyerding_grade")?.value >= 1) layer.append(...(measured(finding, "slip_percent")?.lines_px || []).map((line) => segment(line, "strong")));
  }
  return layer;
}

// What sets are made for, and what the engine's own reached where it was measured: the two differ.
function plausibleWords({ plausible, grade }) {
  const alone = plausible.length === 1;
  const which = alone ? `Grade ${grade} alone is plausible.` : `Grades ${plausible.slice(0, -1).join(", ")} and ${plausible.at(-1)} are plausible.`;
  const made = "Such sets are made to hold the true grade in nine discs of ten";
  if (!state.sets) return `${which} ${made}.`;
  const { coverage, measuredOn } = state.sets;
  const interval = coverage.low === null || coverage.high === null ? "" : ` (95 % interval ${(100 * coverage.low).toFixed(0)} to ${percent(coverage.high)})`;
  return unbroken(`${which} ${made}; on ${measuredOn} they held it in ${percent(coverage.value)}${interval}.`);
}

function details(finding) {
  const box = element("div", { class: "detail" });
  if (finding.pfirrmann) {
    const bars = element("div", { class: "bars", role: "img", "aria-label": `Grades 1 to 5: ${finding.pfirrmann.probabilities.map(percent).join(", ")}` });
    finding.pfirrmann.probabilities.forEach((p, i) => {
      const likely = !finding.pfirrmann.plausible?.length || finding.pfirrmann.plausible.includes(i + 1);
      const bar = shape("svg", { class: likely ? "" : "faint", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
      bar.append(shape("rect", { width: Math.max(0.5, 100 * p), height: 10, fill: `var(--g${i + 1})` }));
      bars.append(element("span", {}, `${i + 1}`), bar, element("span", {}, percent(p)));
    });
    box.append(bars);
    if (finding.pfirrmann.plausible?.length) box.append(element("p", { class: "plausible" }, plausibleWords(finding.pfirrmann)));
  }
  box.append(...measureList(finding));
  box.append(element("p", { class: "muted" }, `Found with a score of ${percent(finding.score)}.`));
  const own = heatmapOf(finding);
  if (finding.label === "disc" && state.study.heatmaps.length) {
    const withheld = own !== null && !state.study.heatmaps[own].available;
    const text = own === null ? "It has no heatmap of its own." : withheld ? `Its heatmap is withheld: ${state.study.heatmaps[own].reason || "no reason given"}.` : "The image shows the heatmap for this disc.";
    box.append(element("p", { class: "muted" }, text));
  }
  return box;
}

function fillFindings(study) {
  const lists = { disc: $("discs"), vertebra: $("vertebrae") };
  const short = Boolean(study.frontal);
  $("vertebrae").classList.toggle("short", short);
  for (const list of Object.values(lists)) list.replaceChildren();
  const order = study.findings.map((f, i) => i).sort((a, b) => study.findings[a].box_px[1] - study.findings[b].box_px[1]);
  for (const index of order) {
    const finding = study.findings[index];
    const { name, note } = nameOf(finding);
    const button = element("button", { type: "button", [short ? "aria-pressed" : "aria-expanded"]: "false", "data-finding": index });
    if (short) {
      button.setAttribute("aria-label", `${name}, found ${percent(finding.score)}`);
      button.append(element("span", { class: "level" }, `${finding.number}`), element("small", {}, percent(finding.score)));
    } else {
      button.append(element("span", { class: "level" }, name), gradeChip(finding));
    }
    if (note) button.append(element("span", { class: "unnamed" }, `(${note})`));
    button.append(...flagList(finding));
    button.addEventListener("click", () => select(state.selected === index ? null : index, true));
    lists[finding.label].append(element("li", { class: "finding", "data-finding": index }, button));
  }
  for (const label of Object.keys(lists)) $(label === "disc" ? "discs-title" : "vertebrae-title").hidden = !lists[label].children.length;
  $("vertebrae-title").textContent = short ? "Vertebrae, and how sure of each" : "Vertebrae";
}

// The heatmap whose target speaks of this finding ("L4/L5 Pfirrmann 4", "disc 3 Pfirrmann 2"), or null.
function heatmapOf(finding) {
  const names = [finding.level, `${finding.label} ${finding.number}`].filter(Boolean).map((n) => n.toLowerCase());
  const found = state.study.heatmaps.findIndex((h) => names.some((n) => (`${h.target.toLowerCase()} `).startsWith(`${n} `)));
  return found < 0 ? null : found;
}

function markSelected() {
  $("marks").classList.toggle("choosing", state.selected !== null);
  for (const mark of document.querySelectorAll(".finding-mark")) mark.classList.toggle("selected", Number(mark.dataset.finding) === state.selected);
}

function select(index, scroll = false) {
  state.selected = index;
  for (const item of document.querySelectorAll(".finding")) {
    const chosen = Number(item.dataset.finding) === index;
    item.classList.toggle("selected", chosen);
    const short = Boolean(state.study.frontal);
    item.querySelector("button").setAttribute(short ? "aria-pressed" : "aria-expanded", String(chosen));
    item.querySelector(".detail")?.remove();
    if (chosen && !short) {
      item.append(details(state.study.findings[index]));
      if (scroll) item.scrollIntoView({ block: "nearest" });
    }
  }
  markSelected();
  const own = index === null ? null : heatmapOf(state.study.findings[index]);
  showHeatmap(own !== null && state.study.heatmaps[own].available ? String(own) : ALL);
  if (index !== null) say(`${spokenName(state.study.findings[index])} selected`);
}

// --- the image -------------------------------------------------------------------------------------------------------

const ALL = "all";
const KIND = { cam: "class activation map", "class-evidence": "class evidence" };

// What "all" stands for: the maps of the single discs together (each is empty outside its disc), else the first there is.
function allHeatmaps(study) {
  const shown = study.heatmaps.map((h, i) => i).filter((i) => study.heatmaps[i].available && study.links.heatmaps[i]);
  const own = shown.filter((i) => study.heatmaps[i].kind === "cam");
  return own.length ? own : shown.slice(0, 1);
}

function fillHeatmaps(study) {
  const choice = $("heat-choice");
  const all = allHeatmaps(study);
  choice.replaceChildren();
  if (all.length > 1) choice.append(element("option", { value: ALL }, "All discs, each for its own grade"));
  study.heatmaps.forEach((heatmap, index) => {
    const option = element("option", { value: index }, `${capital(heatmap.target)} (${heatmap.available ? KIND[heatmap.kind] || heatmap.kind : "withheld"})`);
    option.disabled = !heatmap.available;
    choice.append(option);
  });
  $("heat-part").hidden = !all.length;
}

// `which`: the number of a heatmap as text, or ALL.
function showHeatmap(which) {
  const study = state.study;
  const shown = which === ALL ? allHeatmaps(study) : [Number(which)];
  const usable = shown.length > 0;
  $("show-heatmap").disabled = !usable;
  $("opacity").disabled = !usable;
  $("key-heat").hidden = !usable;
  $("heat").replaceChildren(...shown.map((index) => element("img", { src: study.links.heatmaps[index], alt: "" })));
  let text = "";
  if (shown.length > 1) {
    text = "Heatmap: all discs, each for its own grade";
  } else if (usable) {
    text = `Heatmap: ${study.heatmaps[shown[0]].target}`;
  } else if (study.heatmaps.length) {
    text = `No heatmap: ${study.heatmaps[0].reason || "withheld"}`;
  } else if (study.shed.includes("heatmap")) {
    text = "No heatmap: left out to be in time";
  }
  $("heat-target").textContent = text;
  $("heat-choice").value = shown.length === 1 ? String(shown[0]) : ALL;
  applySwitches();
}

function applySwitches() {
  const stage = $("stage");
  for (const layer of ["boxes", "outlines", "grades", "measures"]) stage.classList.toggle(`no-${layer}`, !$(`show-${layer}`).checked);
  const on = $("show-heatmap").checked && !$("show-heatmap").disabled;
  $("heat-target").hidden = !on && !$("show-heatmap").disabled;
  $("heat").style.opacity = on ? Number($("opacity").value) / 100 : 0;
}

function draw() {
  const study = state.study;
  const marks = $("marks");
  const width = $("base").naturalWidth;
  const height = $("base").naturalHeight;
  marks.replaceChildren();
  if (!study || !study.findings || !width) return;
  marks.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const shown = $("stage").getBoundingClientRect();
  if (!shown.width || !shown.height) return; // hidden: the observer calls again when it is shown
  const unit = 1 / Math.min(shown.width / width, shown.height / height); // source pixels in one screen pixel
  const size = 15 * unit;
  // Large structures first, so that the small ones lie on top and can be tapped.
  const order = study.findings.map((f, i) => i).sort((a, b) => area(study.findings[b]) - area(study.findings[a]));
  const names = [];
  for (const index of order) {
    const finding = study.findings[index];
    const [x0, y0, x1, y1] = finding.box_px;
    const group = shape("g", { class: `finding-mark ${finding.label}`, "data-finding": index });
    // Above the measures, so that no line strikes a name through.
    const named = shape("g", { class: `finding-mark ${finding.label}`, "data-finding": index });
    const title = shape("title", {});
    title.textContent = spokenName(finding);
    group.append(title);
    const outline = finding.outline_px || [];
    if (outline.length) group.append(shape("polygon", { class: "shape outline", points: outline.map((p) => p.join(",")).join(" ") }));
    group.append(shape("rect", { class: `shape box${outline.length ? "" : " alone"}`, x: x0, y: y0, width: x1 - x0, height: y1 - y0 }));
    const words = shape("g", { class: "words" });
    const number = study.frontal ? `${finding.number}` : null;
    if (finding.label === "disc") {
      const text = nameOf(finding).name;
      const grade = finding.pfirrmann?.grade;
      const across = (text.length * 0.62 + (grade ? 1.9 : 0.3)) * size;
      const left = x1 + 8 * unit + across > width + Math.max(0, (shown.width * unit - width) / 2) ? x0 - across - 8 * unit : x1 + 8 * unit;
      const middle = (y0 + y1) / 2;
      if (grade) {
        words.append(shape("rect", { class: `plate p${grade}`, x: left, y: middle - 0.7 * size, width: 1.4 * size, height: 1.4 * size, rx: 0.25 * size }));
        const number = shape("text", { class: `grade on${grade}`, x: left + 0.7 * size, y: middle, "font-size": size });
        number.textContent = grade;
        words.append(number);
      }
      const label = shape("text", { class: "name", x: left + (grade ? 1.8 * size : 0), y: middle, "font-size": size });
      label.textContent = text;
      words.append(label);
    } else if (finding.level || number) {
      const label = shape("text", { class: "name", x: (x0 + x1) / 2, y: (y0 + y1) / 2, "font-size": size * (finding.level ? 0.9 : 0.75), "text-anchor": "middle" });
      label.textContent = finding.level || number;
      words.append(label);
    }
    named.append(words);
    names.push(named);
    // A finger is wider than a disc is high: what is tapped is at least 32 screen pixels high.
    const grow = Math.max(0, (32 * unit - (y1 - y0)) / 2) * (finding.label === "disc" ? 1 : 0);
    group.append(shape("rect", { class: "hit", x: x0, y: y0 - grow, width: x1 - x0, height: y1 - y0 + 2 * grow }));
    group.addEventListener("click", () => select(state.selected === index ? null : index, true));
    marks.append(group);
  }
  const across = shown.width * unit;
  marks.append(measureMarks(study, unit, [(width - across) / 2, (width + across) / 2]), ...names);
  markSelected();
}

function area(finding) {
  const [x0, y0, x1, y1] = finding.box_px;
  return (x1 - x0) * (y1 - y0);
}

// --- the rest of the panel -------------------------------------------------------------------------------------------

function fillDownloads(study) {
  const list = $("downloads");
  list.replaceChildren();
  const offers = [["Overlay", study.links.overlay, "overlay.png"], ["JSON", study.links.report, "report.json"], ["Labels", study.links.labels, "labels.png"]];
  for (const [text, href, name] of offers) {
    if (href) list.append(element("a", { class: "button quiet", href, download: `${study.id.slice(0, 8)}-${name}` }, text));
  }
}

function fillAbout(study) {
  const about = $("about");
  about.replaceChildren();
  const add = (term, text) => text && about.append(element("dt", {}, term), element("dd", {}, text));
  const flat = (object) => Object.entries(object || {}).filter(([, v]) => v !== null).map(([k, v]) => `${k} ${typeof v === "object" ? flat(v) : v}`).join(", ");
  add("Study", study.id);
  add("Received", new Date(study.study.received_at).toLocaleString());
  add("Rung", study.rung);
  add("Protocol", study.status === "refused" ? "" : study.protocol); // a refused image was answered by none
  add("Weighting", study.weighting);
  add("Times (ms)", flat(study.timing_ms));
  add("Engine", flat(study.engine));
  add("Bundle", flat(study.bundle));
  add("Error", study.error ? `[${study.error.code}] ${study.error.value}` : "");
}

// --- how far the percentages can be believed -------------------------------------------------------------------------

const HEAD = { pfirrmann: "Pfirrmann grade", class: "Class" };
const PLOT = { left: 38, right: 234, top: 8, zero: 168, floor: 214, width: 240, height: 246 };

// A reliability diagram: how sure it said it was (across) against how often it was right (up), with the counts as bars below.
function reliabilityDiagram(head) {
  const across = (share) => PLOT.left + share * (PLOT.right - PLOT.left);
  const up = (share) => PLOT.zero - share * (PLOT.zero - PLOT.top);
  const drawn = shape("svg", { class: "reliability", viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: "img", "aria-label": head.words.join(" ") });
  const text = (words, x, y, anchor) => {
    const made = shape("text", { x, y, "text-anchor": anchor });
    made.textContent = words;
    drawn.append(made);
  };
  for (const share of [0, 0.5, 1]) {
    drawn.append(shape("line", { class: "grid", x1: across(0), y1: up(share), x2: across(1), y2: up(share) }));
    drawn.append(shape("line", { class: "grid", x1: across(share), y1: up(0), x2: across(share), y2: up(1) }));
    text(`${100 * share}`, PLOT.left - 5, up(share) + 4, "end");
    text(`${100 * share}${share === 1 ? " %" : ""}`, across(share), PLOT.floor + 14, share === 1 ? "end" : "middle");
  }
  drawn.append(shape("line", { class: "true", x1: across(0), y1: up(0), x2: across(1), y2: up(1) }));
  const most = Math.max(...head.after.map((b) => b.count));
  for (const bin of head.after) {
    const high = Math.max(1, (24 * bin.count) / most);
    drawn.append(shape("rect", { class: "count", x: across(bin.confidence) - 6, y: PLOT.floor - high, width: 12, height: high }));
    text(`${bin.count}`, across(bin.confidence), PLOT.floor - high - 3, "middle");
    if (bin.observed.low !== null) drawn.append(shape("line", { class: "interval", x1: across(bin.confidence), y1: up(bin.observed.low), x2: across(bin.confidence), y2: up(bin.observed.high) }));
  }
  for (const when of ["before", "after"]) {
    const points = head[when].map((b) => [across(b.confidence), up(b.observed.value)]);
    drawn.append(shape("polyline", { class: when, points: points.map((p) => p.join(",")).join(" ") }));
    for (const [cx, cy] of points) drawn.append(shape("circle", { class: when, cx, cy, r: 3.5 }));
  }
  text(head.kind === "softmax" ? "how sure it said it was" : "what it gave", across(0.5), PLOT.height - 4, "middle");
  return drawn;
}

function engineTrust(engine) {
  const { heads, sets, fitted_on: fitted, reason } = engine.reliability;
  const box = element("div", { class: "trust" });
  const precision = engine.precision.toUpperCase();
  box.append(element("h4", {}, `${capital(plain(engine.model))} on ${engine.backend}, ${precision}, measured on ${engine.measured_on}`));
  if (sets) box.append(element("p", {}, unbroken(sets.words)));
  if (heads.some((h) => h.after.length)) {
    const samples = heads[0].samples;
    const key = element("p", { class: "muted" }, `Across: what it said. Up: in how many of 100 ${samples} it was so. On the dashed line percentages are true. Bars: how many ${samples}.`);
    for (const [when, words] of [["after", "as shown to you, with the 95 % interval"], ["before", "as the network gave them, before they were corrected"]]) {
      key.append(element("span", { class: `dot ${when}` }, words));
    }
    box.append(key);
  }
  const figures = element("div", { class: "figures" });
  for (const head of heads) {
    const figure = element("figure", {}, element("figcaption", {}, HEAD[head.name] || capital(plain(head.name))));
    if (head.after.length) figure.append(reliabilityDiagram(head));
    figure.append(...head.words.map((words) => element("p", {}, unbroken(words))));
    figures.append(figure);
  }
  box.append(figures);
  if (heads.length && fitted) box.append(element("p", { class: "muted" }, unbroken(fitted.words)));
  if (reason) box.append(element("p", { class: "muted" }, sentence(`no diagram: ${reason}`)));
  return box;
}

async function fillTrust(study) {
  $("trust").hidden = true;
  state.sets = null;
  if (!study.engine?.backends) return;
  let body;
  try {
    body = await getJson("/api/engines");
  } catch {
    return; // the answer stands without it, and the next study asks again
  }
  if (state.study?.id !== study.id) return;
  const shown = body.engines.filter((e) => study.engine.backends[e.model] === e.backend && e.reliability.heads.length);
  const parts = shown.map(engineTrust);
  const another = Boolean(body.bundle && study.bundle && body.bundle.digest !== study.bundle.digest);
  const graded = another ? undefined : shown.find((e) => e.reliability.sets?.answers[0] === "grade");
  if (graded) state.sets = { coverage: graded.reliability.sets.coverage, measuredOn: graded.measured_on };
  // A disc may have been opened before the answer came.
  const opened = document.querySelector(".finding .plausible");
  if (opened && state.selected !== null) opened.textContent = plausibleWords(state.study.findings[state.selected].pfirrmann);
  if (another) {
    parts.unshift(element("p", {}, "This study was answered by another bundle; the figures are of the one in use now."));
  }
  $("trust-body").replaceChildren(...parts);
  $("trust").hidden = !shown.length;
}

// Words, switches and keys for what this kind of answer has, and what is to be read first at the top.
function showKind(study) {
  const frontal = Boolean(study.frontal);
  for (const part of document.querySelectorAll(".mri-only")) part.hidden = frontal;
  for (const part of [$("stage"), $("caption"), $("tools")]) part.classList.toggle("frontal", frontal);
  $("grades-word").textContent = frontal ? "Numbers" : "Grades";
  $("key-measure").textContent = frontal ? "Cobb angle" : "Measures";
  if (frontal) {
    $("frontal").after($("notes"));
    $("vertebrae").after($("naming"));
  } else {
    $("banner").after($("naming"));
    $("heat-part").after($("notes"));
  }
}

function showStudy(study) {
  state.study = { findings: [], heatmaps: [], shed: [], notes: [], ...study };
  state.selected = null;
  view("result");
  const answered = study.status === "complete" || study.status === "partial";
  showBanner(state.study);
  showKind(state.study);
  $("naming").textContent = sentence(study.naming);
  $("notes").replaceChildren(...state.study.notes.map((note) => element("li", {}, sentence(note))));
  fillFindings(state.study);
  fillFrontal(state.study);
  // The angles of a radiograph are its curves, with what was left out beside them.
  $("column").replaceChildren(...measureList(study.frontal ? { measurements: study.measurements.filter((m) => m.name !== "cobb_angle") } : study));
  $("column-title").hidden = !$("column").children.length;
  fillDownloads(study);
  fillAbout(study);
  fillTrust(study);
  const outlined = state.study.findings.some((f) => (f.outline_px || []).length);
  $("show-outlines").disabled = answered && !outlined;
  $("show-measures").disabled = ![state.study, ...state.study.findings].some((f) => (f.measurements || []).some((m) => m.lines_px?.length));
  if (answered && !outlined && !$("show-boxes").checked) {
    $("show-boxes").checked = state.forcedBoxes = true;
  } else if (outlined && state.forcedBoxes) {
    $("show-boxes").checked = state.forcedBoxes = false; // as it was before an answer had nothing but boxes
  }
  $("caption").hidden = !answered;
  $("tools").hidden = !answered;
  $("marks").replaceChildren();
  $("base").alt = `The image ${study.study.name}`;
  if (study.links.base) {
    $("base").src = study.links.base;
  } else {
    $("base").removeAttribute("src");
  }
  $("stage-note").hidden = Boolean(study.links.base) && study.status !== "refused";
  $("stage-note").textContent = study.links.base ? "Not analysed. Nothing is marked because there is no answer." : "This image cannot be shown.";
  fillHeatmaps(state.study);
  showHeatmap(ALL);
  $("banner-title").focus({ preventScroll: true });
}

async function openFromHash() {
  const id = location.hash.slice(1);
  const turn = ++state.request;
  if (!id) {
    state.study = null;
    view("home");
    loadHistory();
    return;
  }
  if (state.study?.id === id && document.body.dataset.view === "result") return;
  try {
    const study = await getJson(`/api/studies/${encodeURIComponent(id)}`);
    if (turn !== state.request) return;
    showStudy(study);
    if (study.status === "accepted") {
      state.study = null;
      setTimeout(() => turn === state.request && openFromHash(), 1500);
    }
  } catch (problem) {
    if (turn === state.request) showError(problem.error || UNREACHABLE);
  }
}

function goHome() {
  state.study = null;
  if (location.hash) {
    location.hash = "";
  } else {
    openFromHash();
  }
}

// --- wiring ----------------------------------------------------------------------------------------------------------

$("file").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (file) send(file);
  event.target.value = ""; // so that the same file can be chosen again
});
for (const id of ["go-home", "error-home"]) $(id).addEventListener("click", goHome);
$("go-history").addEventListener("click", () => {
  goHome();
  $("history-title").scrollIntoView({ block: "start" });
  $("history-title").focus({ preventScroll: true });
});
$("history-more").addEventListener("click", () => loadHistory(true));
$("show-boxes").addEventListener("input", () => (state.forcedBoxes = false));
for (const id of ["show-boxes", "show-outlines", "show-grades", "show-measures", "show-heatmap", "opacity"]) $(id).addEventListener("input", applySwitches);
$("heat-choice").addEventListener("change", (event) => showHeatmap(event.target.value));
$("base").addEventListener("load", draw);
new ResizeObserver(draw).observe($("stage"));
window.addEventListener("hashchange", openFromHash);

let depth = 0; // dragenter and dragleave come for every child
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "dragenter") depth += 1;
    if (kind === "dragleave") depth -= 1;
    if (kind === "drop") depth = 0;
    document.body.classList.toggle("dragging", depth > 0);
    if (kind !== "drop") return;
    const files = event.dataTransfer?.files || [];
    if (files.length === 1) {
      send(files[0]);
    } else {
      showError({ code: "page.one-file", message: "One file at a time", value: `${files.length} files`, remedy: "Drop a single image." });
    }
  });
}
openFromHash();
