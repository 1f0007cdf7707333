// The kinds of judgement: what can be chosen, by which keys, and the list that a ranking is made in.

import { element, visible } from "/shared.js";

const ORDINALS = ["1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th"];

export const QUESTIONS = {
  pair: "Which response is better?",
  ranking: "Put the best response first.",
  stars: "How good is this response?",
  thumbs: "Is this response good?",
};

// verdict: as the server takes it; keys: `event.key`. Up and down stay free: they scroll.
export const CHOICES = {
  pair: [
    { verdict: "left", label: "A is better", keys: ["1", "ArrowLeft", "a"] },
    { verdict: "right", label: "B is better", keys: ["2", "ArrowRight", "b"] },
    { verdict: "tie", label: "Tie", keys: ["3", "t"] },
    { verdict: "both_bad", label: "Both bad", keys: ["4", "x"] },
  ],
  ranking: [],
  stars: [0, 1, 2, 3, 4, 5].map((n) => ({ verdict: n, label: n ? "★".repeat(n) : "none", keys: [String(n)] })),
  thumbs: [
    { verdict: "up", label: "👍 Good", keys: ["1", "+"] },
    { verdict: "down", label: "👎 Not good", keys: ["0", "-"] },
  ],
};

const SHOWN = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓" };

export function keyNames(keys) {
  return keys.map((key) => SHOWN[key] ?? key.toUpperCase());
}

export function responseCard(text, name) {
  const card = element("article", { className: "response" });
  if (name) card.append(element("h2", { textContent: name }));
  const body = element("div", { className: "text", dir: "auto" });
  body.append(visible(text));
  card.append(body);
  return card;
}

// Responses in an order that is changed by dragging, by digits (best first), or by Shift and arrows on the focused one.
// `touched`: somebody has made this order; by digits, once only one response is left.
export class Ranking {
  constructor(texts, onChange, order) {
    this.touched = order !== undefined;
    this.picked = 0;
    this.onChange = onChange;
    this.list = element("ol", { className: "ranking" });
    this.cards = texts.map((text, place) => this.#card(text, place));
    this.#put(order ?? texts.map((_, place) => place));
  }

  get order() {
    return [...this.list.children].map((card) => Number(card.dataset.place));
  }

  // A digit names the response that comes next, after those that were named before.
  pick(place) {
    const order = this.order;
    if (place >= order.length) return;
    if (this.picked >= order.length || order.indexOf(place) < this.picked) this.picked = 0;
    order.splice(order.indexOf(place), 1);
    order.splice(this.picked++, 0, place);
    this.#changed(order, this.picked >= order.length - 1);
  }

  #card(text, place) {
    const card = responseCard(text, `Response ${place + 1}`);
    const item = element("li", { tabIndex: 0 }, element("span", { className: "rank" }), card);
    item.dataset.place = place;
    const handle = element("span", { className: "handle", title: "Drag", textContent: "⠿" });
    item.append(handle);
    handle.addEventListener("pointerdown", (event) => this.#drag(event, item, handle));
    item.addEventListener("keydown", (event) => this.#arrow(event, item));
    return item;
  }

  #drag(event, item, handle) {
    event.preventDefault();
    handle.setPointerCapture(event.pointerId);
    item.classList.add("dragged");
    const middle = (card) => {
      const box = card.getBoundingClientRect();
      return box.top + box.height / 2;
    };
    // The others move around the dragged one: a node that is moved itself would lose the pointer.
    const move = ({ clientY }) => {
      let other;
      while ((other = item.nextElementSibling) && clientY > middle(other)) item.before(other);
      while ((other = item.previousElementSibling) && clientY < middle(other)) item.after(other);
      this.#number();
    };
    const end = () => {
      item.classList.remove("dragged");
      handle.removeEventListener("pointermove", move);
      this.#changed(this.order);
    };
    handle.addEventListener("pointermove", move);
    handle.addEventListener("lostpointercapture", end, { once: true });
  }

  #arrow(event, item) {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    if (!event.shiftKey) {
      (by < 0 ? item.previousElementSibling : item.nextElementSibling)?.focus();
      return;
    }
    const order = this.order;
    const at = order.indexOf(Number(item.dataset.place));
    if (at + by < 0 || at + by >= order.length) return;
    order.splice(at + by, 0, order.splice(at, 1)[0]);
    this.#changed(order);
    item.focus();
  }

  #changed(order, complete = true) {
    this.touched ||= complete;
    this.#put(order);
    this.onChange();
  }

  #put(order) {
    this.list.replaceChildren(...order.map((place) => this.cards[place]));
    this.#number();
  }

  #number() {
    [...this.list.children].forEach((item, rank) => {
      item.querySelector(".rank").textContent = ORDINALS[rank];
      item.classList.toggle("picked", rank < this.picked);
    });
  }
}
