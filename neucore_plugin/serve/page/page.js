"use strict";
// The page's behaviour, after parts.js. Nothing is asked of another host.
(() => {
  const { $, make, icon, shown, score, count, told, ask, post } = parts;
  const most = Number(document.body.dataset.most);
  let about = { images: 0, examples: [], attributes: [], feedback: false, maps: false, explain: false };
  let references = []; // of the query that is being written: {name, id} of the index, or {name, file, url}
  let unwanted = [];
  let said = []; // captions of earlier turns that the next text refines
  let turns = []; // what was asked and found: the dialogue
  let here = -1; // the turn that is shown
  let running = null; // aborts the search under way
  let seen = null; // the result that the dialog shows

  // ---- what is told -------------------------------------------------------------------------------------------------

  const tell = (text) => { $("status").textContent = text; };

  function complain(text) {
    $("problem").textContent = text;
    $("problem").hidden = !text;
    if (text) $("problem").scrollIntoView({ block: "nearest" });
  }

  // ---- the query ----------------------------------------------------------------------------------------------------

  function drawChosen(list, place, what) {
    $(place).replaceChildren(...list.map((picture, number) => {
      const remove = make("button", { type: "button", textContent: "×", "aria-label": `Remove ${what} ${picture.name}` });
      remove.addEventListener("click", () => {
        list.splice(number, 1);
        drawQuery();
        $(place === "references" ? "file" : "unfile").focus();
      });
      return make("li", {}, shown(picture, `${what}: ${picture.name}`), remove, make("span", { className: "name", textContent: picture.name }));
    }));
  }

  function drawQuery() {
    drawChosen(references, "references", "Reference");
    drawChosen(unwanted, "unwanted", "Not wanted");
    $("drop").classList.toggle("full", references.length > 0);
    $("said").hidden = !said.length;
    $("said").replaceChildren(...said.map((text) => make("li", { textContent: text })));
    $("refine").hidden = here < 0 || !turns[here].said.length;
  }

  function take(files, list) {
    for (const file of files) {
      if (file.size > most) complain(`${file.name || "The picture"} has ${Math.ceil(file.size / 2 ** 20)} MB; at most ${most / 2 ** 20} MB are taken.`);
      else if (file.type && !file.type.startsWith("image/")) complain(`${file.name || "This"} is no picture.`);
      else {
        complain("");
        list.push({ name: file.name || "pasted picture", file, url: URL.createObjectURL(file) });
      }
    }
    drawQuery();
    $("text").focus();
  }

  function written() {
    const text = $("text").value.trim();
    return {
      references: [...references],
      unwanted: [...unwanted],
      said: text ? [...said, text] : [...said],
      not: $("not").value.split("\n").map((line) => line.trim()).filter(Boolean),
      filter: $("filter").value.trim(),
      k: Number($("k").value),
    };
  }

  // The form as it was when a turn was asked: going back is editing.
  function rewrite(turn) {
    references = [...turn.references];
    unwanted = [...turn.unwanted];
    said = turn.said.slice(0, -1);
    $("text").value = turn.said.at(-1) || "";
    $("not").value = turn.not.join("\n");
    $("filter").value = turn.filter;
    $("k").value = String(turn.k);
  }

  function clear() {
    references = [];
    unwanted = [];
    said = [];
    for (const id of ["text", "not", "filter"]) $(id).value = "";
    $("k").value = "12";
    complain("");
    drawQuery();
    $("text").focus();
  }

  async function search(event) {
    if (event) event.preventDefault();
    const turn = written();
    if (!turn.references.length && !turn.said.length) {
      complain("Give a reference picture, a text, or both.");
      return;
    }
    if (running) running.abort();
    const mine = (running = new AbortController());
    complain("");
    tell("Searching …");
    $("grid").setAttribute("aria-busy", "true");
    try {
      const body = { text: turn.said[0] || "", then: turn.said.slice(1), not_text: turn.not, filter: turn.filter, k: turn.k, explain: about.explain };
      const answer = await post("/search", body, { images: turn.references, not_image: turn.unwanted }, mine.signal);
      Object.assign(turn, answer, { votes: {} });
      turns = [...turns.slice(0, here + 1), turn];
      show(turns.length - 1);
      history.pushState({ turn: here }, "");
      focusFirst();
    } catch (error) {
      if (error.name !== "AbortError") {
        tell("");
        complain(error.message);
      }
    } finally {
      if (running === mine) {
        running = null;
        $("grid").removeAttribute("aria-busy");
      }
    }
  }

  // On narrow screens the results lie below the query.
  function focusFirst() {
    if ($("results").getBoundingClientRect().top > window.innerHeight * 0.6) $("results").scrollIntoView();
  }

  function refine() {
    const text = $("text").value.trim();
    said = turns[here].said.slice();
    if (text && text !== said.at(-1)) search();
    else {
      $("text").value = "";
      drawQuery();
      $("text").focus();
    }
  }

  function pick(result) {
    references = [{ name: result.name, id: result.id }];
    said = [];
    $("text").value = "";
    complain("");
    drawQuery();
    tell(`${result.name} is the reference now; say what should be different.`);
    $("text").focus();
  }

  // ---- the dialogue -------------------------------------------------------------------------------------------------

  function show(number) {
    here = number;
    if (number < 0) {
      drawStart();
    } else {
      const turn = turns[number];
      rewrite(turn);
      drawResults(turn);
    }
    $("history").hidden = turns.length === 0;
    $("back").disabled = here < 0;
    $("turns").replaceChildren(...turns.map(turnButton));
    const current = $("turns").querySelector("[aria-current]");
    if (current) $("turns").scrollLeft = current.offsetLeft - $("turns").offsetLeft - 8;
    drawQuery();
  }

  function turnButton(turn, number) {
    const first = turn.references[0];
    const words = turn.said.length ? turn.said.join(", ") : `like ${first.name}`;
    const button = make("button", { type: "button", className: "turn" });
    if (first) button.append(shown(first, `Reference ${first.name}`));
    button.append(make("span", { textContent: words, title: words }));
    if (number === here) button.setAttribute("aria-current", "step");
    button.addEventListener("click", () => {
      if (number === here) return;
      show(number);
      history.pushState({ turn: number }, "");
    });
    return make("li", {}, button);
  }

  function drawStart() {
    $("heading").textContent = about.examples.length ? "Start with one of these" : "";
    tell(about.examples.length ? "or drop a picture of your own, or just type" : "");
    $("grid").replaceChildren(...about.examples.map((example) => tile(example, null)));
    $("votes").hidden = true;
  }

  function drawResults(turn) {
    $("heading").textContent = turn.said.join(", ") || `Like ${turn.references.map((one) => one.name).join(" and ")}`;
    tell(turn.results.length ? `${count(turn.results.length, "result", "results")} in ${Math.max(1, Math.round(turn.milliseconds))} ms` : "Nothing was found.");
    $("grid").replaceChildren(...turn.results.map((result) => tile(result, turn)));
    drawVotes(turn);
  }

  function tile(result, turn) {
    const main = make("button", { type: "button", className: "pick", title: result.name });
    main.append(shown(result, turn ? `${result.rank}: ${result.name}` : result.name));
    if (turn) main.append(make("span", { className: "place", textContent: result.rank, "aria-hidden": "true" }));
    main.setAttribute("aria-label", `${turn ? `${result.rank}, ` : ""}${result.name}: make it the next reference`);
    main.addEventListener("click", () => pick(result));
    const item = make("li", { className: "hit" }, main);
    item.result = result;
    const line = make("div", { className: "line" }, make("span", { className: "name", textContent: result.name }));
    item.append(line);
    if (!turn) return item;
    line.append(make("span", { className: "score", textContent: score(result.score), title: "score" }));
    const scores = turn.results.map((one) => one.score);
    const low = Math.min(...scores);
    const bar = make("i");
    bar.style.width = `${Math.round(100 * (0.12 + (0.88 * (result.score - low)) / (Math.max(...scores) - low || 1)))}%`;
    item.append(make("div", { className: "strength", "aria-hidden": "true" }, bar));
    const tools = make("div", { className: "tools" });
    if (canVote(turn)) {
      for (const [name, good, words] of [["up", true, "Good answer"], ["down", false, "Bad answer"]]) {
        const button = make("button", { type: "button", className: name, title: words, "aria-label": `${words}: ${result.name}`, "aria-pressed": String(turn.votes[result.name] === good) }, icon(name));
        button.addEventListener("click", () => vote(turn, result, good));
        tools.append(button);
      }
    }
    const closer = make("button", { type: "button", className: "closer", title: "Look closer", "aria-label": `Look closer: ${result.name}` }, icon("closer"));
    closer.addEventListener("click", () => look(turn, result));
    tools.append(closer);
    item.append(tools);
    mark(item, turn.votes[result.name]);
    return item;
  }

  // ---- votes --------------------------------------------------------------------------------------------------------

  const canVote = (turn) => about.feedback && turn.references.length === 1 && Boolean(turn.caption);

  function mark(item, good) {
    item.classList.toggle("good", good === true);
    item.classList.toggle("bad", good === false);
    for (const [name, value] of [["up", true], ["down", false]]) {
      const button = item.querySelector(`.${name}`);
      if (button) button.setAttribute("aria-pressed", String(good === value));
    }
  }

  async function vote(turn, result, good) {
    complain("");
    try {
      await post("/feedback", { text: turn.caption, result: result.name, good }, { images: turn.references });
      turn.votes[result.name] = good;
      const item = [...$("grid").children].find((one) => one.result === result);
      if (item) mark(item, good);
      tell(`Kept: ${result.name} is a ${good ? "good" : "bad"} answer.`);
    } catch (error) {
      complain(error.message);
    }
  }

  function drawVotes(turn) {
    const note = $("votes");
    note.hidden = false;
    if (!about.feedback) note.textContent = "Votes on results can become training data: start the service with --feedback DIR.";
    else if (!canVote(turn)) note.textContent = "Votes need one reference picture and a text.";
    else note.replaceChildren("Good answers become triplets to train from: ", make("a", { href: "/feedback", download: "train.json", textContent: "export them" }), ".");
  }

  // ---- looking closer -----------------------------------------------------------------------------------------------

  const figure = (picture, caption, kind) => make("figure", {}, shown(picture, caption, kind), make("figcaption", { textContent: caption }));

  async function look(turn, result) {
    seen = result;
    $("look-name").textContent = result.name;
    $("pair").replaceChildren(...turn.references.slice(0, 1).map((one) => figure(one, `Reference: ${one.name}`, "images")), figure(result, `Result ${result.rank}`, "images"));
    const facts = [["score", score(result.score)], ...Object.entries(result.terms || {}).map(([name, value]) => [`· ${name}`, score(value)])];
    if (turn.concepts && turn.concepts.length) facts.push(["concepts", turn.concepts.join(", ")]);
    for (const [name, value] of Object.entries(result.attributes || {})) facts.push([name, typeof value === "string" ? value : JSON.stringify(value)]);
    $("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
    $("maps").replaceChildren();
    $("look").showModal();
    $("close").focus();
    if (!about.maps || !turn.caption || turn.references.length !== 1) return;
    $("maps").textContent = "Looking where the concepts lie …";
    try {
      const { maps } = await post("/maps", { text: turn.caption, result: result.name }, { images: turn.references });
      if (seen !== result) return;
      if (!maps.length) $("maps").textContent = "No word of this text is a concept of the model, so there are no maps.";
      else {
        const list = make("div", { className: "map-list" }, ...maps.map((one) => {
          const sides = [["reference", "in the reference"], ["result", "in the result"]];
          const pair = sides.map(([side, words]) => figure({ url: one[side], name: one.concept }, words));
          return make("div", { className: "map" }, make("strong", { textContent: one.concept }), make("div", {}, ...pair));
        }));
        $("maps").replaceChildren(make("h3", { textContent: "Where each concept lies" }), list);
      }
    } catch (error) {
      if (seen === result) $("maps").textContent = error.message;
    }
  }

  // ---- the token ----------------------------------------------------------------------------------------------------

  function askToken() {
    if (!$("login").open) $("login").showModal();
    $("token").focus();
  }

  async function login(event) {
    event.preventDefault();
    try {
      await post("/login", { token: $("token").value });
      $("token").value = "";
      $("login").close();
      await start();
    } catch (error) {
      $("login-problem").textContent = error.message;
      $("login-problem").hidden = false;
    }
  }

  // ---- keys, pictures that are dropped and pasted -------------------------------------------------------------------

  function neighbour(item, key) {
    const items = [...$("grid").children];
    const place = items.indexOf(item);
    const columns = items.filter((one) => one.offsetTop === items[0].offsetTop).length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -place, End: items.length - 1 - place }[key];
    return step === undefined ? undefined : items[place + step];
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const typing = event.target.matches("input, textarea, select");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      $("text").focus();
      $("text").select();
    }
    const item = event.target.closest(".hit");
    if (!item) return;
    const next = neighbour(item, event.key);
    if (next) {
      event.preventDefault();
      next.querySelector(".pick").focus();
    }
    const turn = turns[here];
    if (here < 0) return;
    if (event.key === "v") look(turn, item.result);
    if ((event.key === "g" || event.key === "b") && canVote(turn)) vote(turn, item.result, event.key === "g");
  });

  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) search(event);
  });
  let depth = 0;
  const carries = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  const dragging = (on) => document.body.classList.toggle("dragging", on);
  document.addEventListener("dragenter", (event) => { if (carries(event)) dragging(++depth > 0); });
  document.addEventListener("dragleave", (event) => { if (carries(event)) dragging(--depth > 0); });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(false);
    depth = 0;
    const where = event.target.closest && event.target.closest("#advanced") ? unwanted : references;
    if (event.dataTransfer.files.length) take(event.dataTransfer.files, where);
    else complain("This is no file. Save the picture first, or copy and paste it; addresses are not fetched.");
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData || !event.clipboardData.files.length) return;
    event.preventDefault();
    take(event.clipboardData.files, references);
  });
  for (const [id, list] of [["file", () => references], ["unfile", () => unwanted]]) {
    $(id).addEventListener("change", (event) => {
      take(event.target.files, list());
      event.target.value = "";
    });
  }
  $("query").addEventListener("submit", search);
  $("refine").addEventListener("click", refine);
  $("clear").addEventListener("click", clear);
  $("back").addEventListener("click", () => history.back());
  $("close").addEventListener("click", () => $("look").close());
  $("look").addEventListener("close", () => { seen = null; });
  $("take").addEventListener("click", () => {
    const result = seen;
    $("look").close();
    pick(result);
  });
  $("token-form").addEventListener("submit", login);
  $("login").addEventListener("cancel", (event) => event.preventDefault());
  window.addEventListener("popstate", (event) => {
    const number = event.state && Number.isInteger(event.state.turn) ? event.state.turn : -1;
    if (number < turns.length) show(number);
  });

  async function start() {
    try {
      const found = await ask("/health");
      if (found.login) return askToken();
      about = { ...about, ...found };
      $("count").textContent = count(about.images, "picture", "pictures");
      $("attributes").textContent = about.attributes.length ? `Attributes here: ${about.attributes.join(", ")}` : "The pictures of this index have no attributes.";
      history.replaceState({ turn: -1 }, "");
      show(-1);
    } catch (error) {
      complain(error.message);
    }
    return undefined;
  }

  told.busy = () => tell("The service is busy; trying again …");
  told.unknown = askToken;
  start();
})();
