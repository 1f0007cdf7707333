// The owner's page: progress, agreement, labellers, models. All texts are shown as text.

import { call, element, enter, themeButton, visible } from "/shared.js";

const at = (id) => document.getElementById(id);
const percent = (x) => `${Math.round(100 * x)}%`;
const between = ({ mean, low, high }) => `${percent(mean)} (${percent(low)} to ${percent(high)})`;

function section(title, head, rows, none) {
  const made = element("section", {}, element("h2", { textContent: title }));
  if (!rows.length) {
    made.append(element("p", { textContent: none }));
    return made;
  }
  const cell = (value) => {
    const made = element("td", { className: /^[\d.,]+(%.*| s)?$/.test(String(value)) ? "number" : "" });
    made.append(visible(String(value)));
    return made;
  };
  const body = element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell))));
  const names = head.map((name) => element("th", { textContent: name }));
  made.append(element("table", {}, ...(head.length ? [element("thead", {}, element("tr", {}, ...names))] : []), body));
  return made;
}

function work(facts) {
  const kinds = Object.entries(facts.items).map(([kind, n]) => `${n} ${kind}`);
  return section("Work", [], [
    ["items", kinds.join(", ") || "none"],
    ["gold items among them", facts.gold_items],
    ["decisions", facts.decisions],
    ["places left", facts.places_left],
    ["in somebody's hands now", facts.lent],
    ["skipped", facts.skipped],
    ["taken back", facts.taken_back],
    ["too late to count", facts.late],
    ...Object.entries(facts.flags).map(([flag, n]) => [`flagged ${flag}`, n]),
  ]);
}

function agreement(facts) {
  const rows = Object.entries(facts.agreement).map(([kind, { alpha, units, why }]) => [
    kind,
    alpha === null ? `none: ${why}` : alpha.toFixed(3),
    units,
  ]);
  return section("Agreement (Krippendorff's alpha)", ["kind", "alpha", "judged by two or more"], rows, "No decisions yet.");
}

function labellers(facts) {
  const rows = facts.labellers.map((one) => [
    one.name,
    one.decisions,
    `${one.median_s.toFixed(1)} s`,
    one.skipped,
    one.ties,
    one.sides ? percent(one.left / one.sides) : "",
    one.gold_asked ? `${one.gold_right} of ${one.gold_asked}${one.careless ? ": careless?" : ""}` : "",
  ]);
  const head = ["labeller", "decisions", "median", "skipped", "ties", "A chosen", "gold right"];
  const made = section("Labellers", head, rows, "No decisions yet.");
  made.querySelectorAll("tbody tr").forEach((row, i) => row.lastChild.classList.toggle("mark", facts.labellers[i].careless));
  return made;
}

function models(facts) {
  const rows = facts.models.map((one) => [
    one.name,
    one.won ? between(one.won) : "",
    one.compared || "",
    one.rated ? `${one.stars.toFixed(2)} of 5 (${one.rated})` : "",
    one.thumbs ? `${between(one.up)} of ${one.thumbs}` : "",
  ]);
  const head = ["model", "won, ties as half (95%, by item)", "comparisons", "stars", "thumbs up"];
  return section("Models", head, rows, "The items do not name models, or nothing has been decided.");
}

function pairs(facts) {
  const rows = facts.pairs.map((one) => [one.first, one.second, one.wins, one.losses, one.tie, one.both_bad]);
  return section("Head to head", ["first", "second", "first won", "second won", "ties", "both bad"], rows, "None yet.");
}

function comments(facts) {
  const rows = facts.comments.map((one) => [one.labeller, `item ${one.item}`, one.text]);
  return section("Newest comments", [], rows, "None yet.");
}

async function load() {
  try {
    const facts = await call("GET", "/api/overview");
    at("facts").replaceChildren(...[work, agreement, labellers, models, pairs, comments].map((part) => part(facts)));
    at("notice").hidden = true;
  } catch (problem) {
    at("notice-text").textContent = problem.message;
    at("notice").hidden = false;
  }
}

enter();
themeButton(at("theme"));
at("reload").addEventListener("click", load);
load();
