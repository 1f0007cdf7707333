// What both pages need: asking the server, and showing any text as text.

const TOKEN = "rlhf-dist-label-token";
const THEME = "rlhf-dist-label-theme";
const THEMES = { auto: "◐", light: "☀", dark: "☾" };

// Characters that show nothing, or change how others are shown: controls but for tab and line feed, marks of direction,
// fillers and spaces without width, tags. Joiners stay: emoji and many scripts need them.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;

export class Problem extends Error {
  constructor(text, why) {
    super(text);
    this.why = why;
  }
}

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Text with everything in it made visible, never read as HTML.
export function visible(text) {
  const parts = document.createDocumentFragment();
  let end = 0;
  for (const found of text.matchAll(UNSEEN)) {
    parts.append(text.slice(end, found.index));
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.append(element("span", { className: "unseen", textContent: `U+${code}` }));
    end = found.index + found[0].length;
  }
  parts.append(text.slice(end));
  return parts;
}

// The token comes behind # once, and is kept for this address only.
export function enter() {
  const given = location.hash.slice(1);
  if (given) {
    localStorage.setItem(TOKEN, given);
    history.replaceState(null, "", location.pathname);
  }
}

export async function call(method, path, body) {
  const headers = {};
  const token = localStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  let answer;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(20000),
    });
    answer = await response.json();
  } catch {
    throw new Problem("The server does not answer. Nothing is lost: this page still has what you entered.", "away");
  }
  if (!response.ok) throw new Problem(answer.detail ?? `The server answered ${response.status}.`, answer.why ?? "broken");
  return answer;
}

export function themeButton(button) {
  const show = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = THEMES[theme];
    button.setAttribute("aria-label", `Theme: ${theme}`);
  };
  const saved = localStorage.getItem(THEME);
  show(saved in THEMES ? saved : "auto");
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
    localStorage.setItem(THEME, next);
    show(next);
  });
}
