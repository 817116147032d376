"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("player-data").textContent);
  const turns = data.turns;
  const slider = at("player-slider");
  let now = 0;
  let timer = null;

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const token = (text, className, step) => {
    const element = make("span", "tok " + className, text);
    if (step > 1) element.append(make("sup", "", String(step)));
    return element;
  };
  const mask = () => {
    const element = token("_", "mask");
    element.setAttribute("aria-label", "masked");
    element.setAttribute("role", "img");
    return element;
  };
  const count = (n, noun) => n + " " + noun + (n === 1 ? "" : "s");

  // Text of every position after the first `done` forwards: position -> [text, class, step].
  const committed = (done) => {
    const known = new Map();
    data.prompt.forEach((text, k) => known.set(data.first + k, [text, "given", 0]));
    turns.slice(0, done).forEach((turn, t) => {
      turn.steps.forEach((step, s) => {
        const fresh = t === done - 1 ? (s ? "hop" : "first") : "";
        for (const [position, text] of step) known.set(position, [text, fresh, fresh ? s + 1 : 0]);
      });
    });
    return known;
  };

  const drawAnswer = (known) => {
    const current = turns[Math.max(0, now - 1)];
    const length = Math.max(...turns.map((turn) => turn.span[1] - turn.span[0])); // the last may be cut
    const boxes = [];
    for (let start = data.first; start < data.last; start += length) {
      const box = make("div", "blockbox" + (start === current.span[0] ? " now" : ""));
      for (let p = start; p < Math.min(start + length, data.last); p += 1) {
        box.append(known.has(p) ? token(...known.get(p)) : mask());
      }
      boxes.push(box);
    }
    at("player-answer").replaceChildren(...boxes);
  };

  const row = (head, cells, verdict, className) => {
    const line = make("tr", className);
    const th = make("th", "", head);
    th.scope = "row";
    line.append(th);
    for (const cell of cells) {
      const td = make("td");
      if (cell) td.append(cell);
      line.append(td);
    }
    line.append(make("td", "", verdict));
    return line;
  };

  // One line per state that the forward evaluated, one column per position that any of them fills.
  const drawDrafts = (turn) => {
    const table = at("player-drafts");
    if (!turn) {
      table.replaceChildren();
      return;
    }
    const steps = turn.steps.flatMap((step, s) => step.map(([p, text]) => [p, text, s + 1]));
    const used = [...turn.drafts.flatMap((draft) => draft.fill), ...steps].map(([p]) => p);
    const columns = [...new Set(used)].sort((a, b) => a - b);
    const head = make("tr");
    const titles = columns.map((p) => (p < turn.span[1] ? "" : "next block ") + "position " + p);
    for (const title of ["state", ...titles, "came true"]) {
      const th = make("th", "", title.replace("position ", ""));
      th.scope = "col";
      th.title = title;
      head.append(th);
    }
    const thead = make("thead");
    thead.append(head);
    // What stood there before: policy joint replaces tokens, too.
    const known = committed(now - 1);
    const before = (p) => (known.has(p) ? token(known.get(p)[0], "") : mask());
    const lines = [row("root", columns.map(before), "the state so far", "")];
    const changed = new Set();
    const sizes = turn.steps.map((step) => step.forEach(([p]) => changed.add(p)) ?? changed.size);
    turn.drafts.forEach((draft, k) => {
      const fill = new Map(draft.fill);
      const cells = columns.map((p) => (fill.has(p) ? token(fill.get(p), "fill") : before(p)));
      const from = draft.parents.map((n) => (n ? String(n) : "root")).join(", ");
      const verdict = draft.accepted
        ? "accepted: the state after step " + (sizes.indexOf(draft.fill.length) + 1)
        : "no";
      lines.push(
        row(k + 1 + " (from " + from + ")", cells, verdict, draft.accepted ? "accepted" : "rejected"),
      );
    });
    const end = new Map(steps.map(([p, text, s]) => [p, [text, s]]));
    const cells = columns.map((p) =>
      end.has(p) ? token(end.get(p)[0], end.get(p)[1] > 1 ? "hop" : "first", end.get(p)[1]) : before(p),
    );
    lines.push(row("committed", cells, count(turn.steps.length, "step"), "result"));
    const body = make("tbody");
    body.append(...lines);
    table.replaceChildren(thead, body);
  };

  const race = (name, done, all) => {
    at(name).style.width = Math.min(100, (100 * done) / all) + "%";
    at(name + "-text").textContent = count(done, "forward");
  };

  const draw = () => {
    const turn = turns[now - 1];
    const steps = turns.slice(0, now).reduce((sum, t) => sum + t.steps.length, 0);
    let said = "Before the first forward: every position of the answer is masked.";
    if (turn) {
      const accepted = turn.drafts.filter((draft) => draft.accepted).length;
      said =
        "Forward " + now + " of " + turns.length + ", block " + (turn.block + 1) + ": " +
        count(turn.drafts.length, "draft") + " verified, " + accepted + " accepted, worth " +
        count(turn.steps.length, "step") + ". So far " + count(steps, "step") + " in " +
        count(now, "forward") + " (" + (steps / now).toFixed(2) + " per forward).";
    }
    at("player-status").textContent = said;
    slider.value = String(now);
    slider.setAttribute("aria-valuetext", "forward " + now + " of " + turns.length);
    at("player-first").disabled = at("player-back").disabled = now === 0;
    at("player-next").disabled = now === turns.length;
    // Every step takes plain decoding a forward; what it spends besides is spread evenly.
    const total = turns.reduce((sum, t) => sum + t.steps.length, 0);
    race("race-ours", now, data.plain);
    race("race-plain", Math.round((data.plain * steps) / total), data.plain);
    drawAnswer(committed(now));
    drawDrafts(turn);
  };

  const stop = () => {
    clearInterval(timer);
    timer = null;
    at("player-play").textContent = "Play";
  };
  const go = (to) => {
    now = Math.max(0, Math.min(turns.length, to));
    draw();
  };
  const play = () => {
    if (timer) return stop();
    if (now === turns.length) go(0);
    at("player-play").textContent = "Pause";
    timer = setInterval(() => {
      go(now + 1);
      if (now === turns.length) stop();
    }, 900);
  };

  at("player-first").addEventListener("click", () => (stop(), go(0)));
  at("player-back").addEventListener("click", () => (stop(), go(now - 1)));
  at("player-next").addEventListener("click", () => (stop(), go(now + 1)));
  at("player-play").addEventListener("click", play);
  slider.addEventListener("input", () => (stop(), go(Number(slider.value))));
  document.addEventListener("keydown", (event) => {
    const mine = event.target === document.body || at("player").contains(event.target);
    const scrolls = event.target.closest(".scroll");
    if (!mine || scrolls || event.target === slider || event.altKey || event.ctrlKey || event.metaKey) return;
    const inside = event.target !== document.body;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1 }[event.key];
    const end = inside ? { Home: 0, End: turns.length }[event.key] : undefined;
    if (to === undefined && end === undefined) return;
    event.preventDefault();
    stop();
    go(to === undefined ? end : to);
  });
  window.addEventListener("beforeprint", () => {
    for (const list of document.querySelectorAll("details")) list.open = true;
  });

  at("player").hidden = false;
  at("player-list").open = false;
  go(Math.min(1, turns.length));
})();
