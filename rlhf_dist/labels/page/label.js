// The page on which people judge. One item is on it at a time; a decision brings the next one in the same answer.

import { CHOICES, QUESTIONS, Ranking, keyNames, responseCard } from "/judging.js";
import { call, element, enter, themeButton, visible } from "/shared.js";

const LOOK_AGAIN_MS = 15000;
// So long after an item appears no verdict is taken: a double click, or two quick keys, would judge what nobody has seen.
const UNSEEN_MS = 250;
const ROLES = { system: "System", user: "User", assistant: "Assistant" };
const at = (id) => document.getElementById(id);
const state = { item: null, last: null, ranking: null, busy: false, again: null, renewed: 0, limit: 0, shown: 0, since: 0 };

function tell(text, again = null) {
  at("notice-text").textContent = text;
  at("notice").hidden = !text;
  at("again").hidden = !again;
  state.again = again;
}

// One request at a time; what fails stays on the page and can be tried again with the same key, which never counts twice.
async function send(path, body, onAnswer = show) {
  if (state.busy) return;
  state.busy = true;
  document.body.classList.add("busy");
  try {
    const answer = await call("POST", path, body);
    tell("");
    onAnswer(answer);
  } catch (problem) {
    state.busy = false;
    if (["gone", "other", "late", "judged"].includes(problem.why)) {
      await send("/api/next", undefined, show);
      if (!at("notice-text").textContent) tell(problem.message);
    } else {
      const retry = ["away", "broken"].includes(problem.why) ? () => send(path, body, onAnswer) : null;
      tell(problem.message, retry);
      if (problem.why === "token") at("controls").hidden = true;
    }
  } finally {
    state.busy = false;
    document.body.classList.remove("busy");
  }
}

function show(answer) {
  const { item, progress, said } = answer;
  state.item = item;
  state.last = progress.last;
  state.ranking = null;
  state.limit = answer.comment_characters;
  state.renewed = Date.now();
  at("labeller").textContent = answer.labeller;
  at("overview-link").hidden = !answer.owner;
  at("progress").max = Math.max(1, progress.total);
  at("progress").value = progress.done;
  at("counts").textContent = `${progress.done} of ${progress.total}, ${progress.mine} by you`;
  at("controls").hidden = !item && !progress.mine;
  at("controls").classList.toggle("idle", !item);
  at("empty").hidden = Boolean(item);
  at("prompt").replaceChildren(...(item ? item.messages.map(turn) : []));
  at("responses").className = item ? item.judge : "";
  at("responses").replaceChildren(...(item ? responses(item, said) : []));
  at("question").textContent = item ? QUESTIONS[item.judge] : "";
  at("choices").className = item ? item.judge : "";
  at("choices").replaceChildren(...(item ? choices(item, said) : []));
  at("comment").value = said?.comment ?? "";
  openComment(Boolean(said?.comment), false);
  for (const button of document.querySelectorAll(".flag")) press(button, said?.flags.includes(button.dataset.flag));
  document.activeElement?.blur();
  scrollTo(0, 0);
  state.since = performance.now();
  // For whoever measures: how many items have been on the screen, and of how many a verdict was taken.
  const number = ++state.shown;
  requestAnimationFrame(() => setTimeout(() => (document.body.dataset.shown = number), 0));
  setTimeout(() => (document.body.dataset.ready = number), UNSEEN_MS + 1);
}

function turn(message, number, all) {
  const text = element("div", { className: "text", dir: "auto" });
  text.append(visible(message.content));
  const name = number === all.length - 1 ? "Prompt" : ROLES[message.role];
  return element("div", { className: `turn ${message.role}` }, element("h2", { textContent: name }), text);
}

function responses(item, said) {
  if (item.judge !== "ranking") {
    return item.responses.map((text, place) => responseCard(text, item.responses.length > 1 ? "AB"[place] : ""));
  }
  const order = Array.isArray(said?.verdict) ? said.verdict : undefined;
  state.ranking = new Ranking(item.responses, ready, order);
  return [state.ranking.list];
}

function choices(item, said) {
  const listed =
    item.judge === "ranking" ? [{ verdict: null, label: "This is the order", keys: ["Enter"] }] : CHOICES[item.judge];
  return listed.map((choice) => {
    const hint = element("kbd", { textContent: keyNames(choice.keys.slice(0, 2)).join(" ") });
    const button = element("button", { type: "button", className: "choice" }, `${choice.label} `, hint);
    button.addEventListener("click", first(() => decide(choice.verdict)));
    if (choice.verdict === null) button.disabled = !state.ranking.touched;
    button.classList.toggle("before", said !== undefined && choice.verdict !== null && said.verdict === choice.verdict);
    return button;
  });
}

function ready() {
  at("choices").firstChild.disabled = !state.ranking.touched;
}

// The second click of a double click does nothing.
function first(action) {
  return (event) => {
    if (event.detail <= 1) action();
  };
}

function decide(verdict) {
  if (!state.item || state.busy || performance.now() - state.since < UNSEEN_MS) return;
  if (verdict === null && !state.ranking.touched) {
    tell("Put the responses in order first: press their numbers from best to worst, or drag them by their handles.");
    return;
  }
  const comment = at("comment").value;
  if (comment.length > state.limit) {
    tell(`The comment has ${comment.length} characters; ${state.limit} are the most that is kept. Shorten it.`);
    openComment(true, true);
    return;
  }
  const flags = [...document.querySelectorAll(".flag[aria-pressed=true]")].map((button) => button.dataset.flag);
  send("/api/decide", { key: state.item.key, verdict: verdict ?? state.ranking.order, comment, flags });
}

function press(button, on) {
  button.setAttribute("aria-pressed", String(Boolean(on)));
}

function toggle(flag) {
  const button = document.querySelector(`[data-flag=${flag}]`);
  press(button, button.getAttribute("aria-pressed") !== "true");
}

function openComment(open, focus) {
  at("comment-row").hidden = !open;
  at("comment-button").setAttribute("aria-expanded", String(open));
  count();
  if (open && focus) at("comment").focus();
}

function count() {
  const size = at("comment").value.length;
  at("comment-count").textContent = `${size} of ${state.limit}`;
  at("comment-count").classList.toggle("over", size > state.limit);
}

// It names the decision, so that it can be sent again and takes back one only.
function undo() {
  if (state.last) send("/api/undo", { key: state.last });
  else tell("There is no decision of yours to take back.");
}

const skip = () => decide("skip");
const comment = () => openComment(true, true);
const ACTIONS = {
  s: skip,
  u: undo,
  c: comment,
  m: () => toggle("spam"),
  n: () => toggle("unsafe"),
  r: () => toggle("unrankable"),
  d: () => at("theme").click(),
  h: help,
  "?": help,
};

function help() {
  const judge = state.item?.judge ?? "pair";
  const ranking = [
    [["1", "…"], "the best response, then the next, ..."],
    [["Shift ↑", "Shift ↓"], "move the focused response"],
    [["Enter"], "this is the order"],
  ];
  const rows = judge === "ranking" ? ranking : CHOICES[judge].map((choice) => [keyNames(choice.keys), choice.label]);
  rows.push([["S"], "skip"], [["U", "Ctrl Z"], "take the last decision back"], [["C"], "comment; Esc leads back"]);
  rows.push([["M"], "spam"], [["N"], "unsafe"], [["R"], "not to be ranked"], [["D"], "light or dark"], [["?"], "this"]);
  at("help-keys").replaceChildren(
    ...rows.map(([keys, text]) => {
      const names = keys.flatMap((key) => [element("kbd", { textContent: key }), " "]);
      return element("tr", {}, element("th", {}, ...names), element("td", { textContent: text }));
    }),
  );
  at("help").showModal();
}

function onKey(event) {
  if (event.repeat || at("help").open) return;
  const writing = event.target === at("comment");
  if (writing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if ((event.ctrlKey || event.metaKey) && event.key === "z") return take(event, undo);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Enter" && state.again) return take(event, state.again);
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in ACTIONS && !at("controls").hidden) return take(event, ACTIONS[key]);
  if (!state.item) return;
  if (state.ranking) {
    if (/^[1-9]$/.test(key)) return take(event, () => state.ranking.pick(Number(key) - 1));
    if (key === "Enter" && event.target.tagName !== "BUTTON") return take(event, () => decide(null));
    return;
  }
  const chosen = CHOICES[state.item.judge].find((choice) => choice.keys.includes(key));
  if (chosen) take(event, () => decide(chosen.verdict));
}

function take(event, action) {
  event.preventDefault();
  action();
}

// Somebody is at work: the item stays in these hands.
function busyHands() {
  if (!state.item || state.busy || Date.now() - state.renewed < (state.item.seconds * 1000) / 4) return;
  state.renewed = Date.now();
  const { key } = state.item;
  call("POST", "/api/renew", { key }).catch((problem) => {
    if (problem.why === "late" && state.item?.key === key) tell(problem.message);
  });
}

enter();
themeButton(at("theme"));
at("skip").addEventListener("click", first(skip));
at("undo").addEventListener("click", first(undo));
at("comment-button").addEventListener("click", () => openComment(at("comment-row").hidden, true));
at("comment").addEventListener("input", count);
at("help-button").addEventListener("click", help);
at("close").addEventListener("click", () => at("help").close());
at("again").addEventListener("click", () => state.again?.());
for (const button of document.querySelectorAll(".flag")) {
  button.addEventListener("click", () => toggle(button.dataset.flag));
}
document.addEventListener("keydown", onKey);
for (const kind of ["keydown", "pointerdown", "scroll", "input"]) document.addEventListener(kind, busyHands, { passive: true });
setInterval(() => {
  if (!at("empty").hidden && !state.busy && !state.again) send("/api/next");
}, LOOK_AGAIN_MS);
send("/api/next");
