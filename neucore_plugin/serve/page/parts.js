"use strict";
// Elements, icons, numbers, and questions to the service. Texts that come from data are set by textContent alone.
const parts = (() => {
  const RETRIES = 4;
  const told = { busy: () => {}, unknown: () => {} }; // what the page does where the service is busy, or wants its token
  const $ = (id) => document.getElementById(id);

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key.startsWith("aria-") || key === "role") node.setAttribute(key, value);
      else node[key] = value;
    }
    node.append(...children);
    return node;
  }

  const ICONS = {
    up: "M7 11v9H4v-9zm0 0l4-8c2 0 3 1 3 3l-1 4h6c1 0 2 1 2 2l-2 6c0 1-1 2-2 2H7",
    down: "M17 13V4h3v9zm0 0l-4 8c-2 0-3-1-3-3l1-4H5c-1 0-2-1-2-2l2-6c0-1 1-2 2-2h10",
    closer: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13zM15.5 15.5L21 21M10.5 8v5M8 10.5h5",
  };
  function icon(name) {
    const space = "http://www.w3.org/2000/svg";
    const drawing = document.createElementNS(space, "svg");
    drawing.setAttribute("viewBox", "0 0 24 24");
    drawing.setAttribute("class", "icon");
    drawing.setAttribute("aria-hidden", "true");
    const path = document.createElementNS(space, "path");
    path.setAttribute("d", ICONS[name]);
    drawing.append(path);
    return drawing;
  }

  const address = (picture, kind = "thumbnails") => picture.url || `/${kind}/${picture.id}`;

  function shown(picture, alt, kind) {
    const image = make("img", { src: address(picture, kind), alt, decoding: "async" });
    image.addEventListener("error", () => image.replaceWith(make("span", { className: "gone", textContent: `${picture.name}: no picture` })));
    return image;
  }

  const score = (value) => (Math.abs(value) >= 1000 ? value.toPrecision(4) : value.toFixed(3));
  const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

  // ---- asking the service -------------------------------------------------------------------------------------------

  async function ask(path, options = {}, tries = 0) {
    let answer;
    try {
      answer = await fetch(path, { credentials: "same-origin", ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The service does not answer. Is it still running?");
    }
    if (answer.ok) return answer.status === 204 ? null : answer.json();
    if (answer.status === 503 && tries < RETRIES) {
      told.busy();
      await new Promise((later) => setTimeout(later, 1000 * Number(answer.headers.get("Retry-After") || 1)));
      return ask(path, options, tries + 1);
    }
    if (answer.status === 401 && path !== "/login") told.unknown();
    const fault = await answer.json().catch(() => ({}));
    throw new Error(sentence(fault.error || `The service answers ${answer.status}.`));
  }

  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

  // JSON, or a form where pictures of the user's own go with it.
  function post(path, body, files = {}, signal = undefined) {
    const own = Object.entries(files).flatMap(([field, list]) => list.filter((one) => one.file).map((one) => [field, one.file]));
    for (const [field, list] of Object.entries(files)) body[field] = list.filter((one) => !one.file).map((one) => one.name);
    if (!own.length) {
      return ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
    }
    const form = new FormData();
    form.append("query", JSON.stringify(body));
    for (const [field, file] of own) form.append(field, file, "picture");
    return ask(path, { method: "POST", body: form, signal });
  }

  return { $, make, icon, shown, score, count, told, ask, post };
})();
