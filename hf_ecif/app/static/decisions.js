// Decisions of this page and of others: steps that only ever become more.
//
// A step is applied here at once, kept in the browser until the server has written it, and sent in
// order. What holds is what the steps that are not undone say; see `hf_ecif.data.review_log`.

export const CODES = {keep: 1, remove: 2, recaption: 3, unsure: 4, clear: 0};
export const WORDS = ['', 'keep', 'remove', 'new caption', 'not sure'];
const NAMES = ['', 'keep', 'remove', 'recaption', 'unsure'];
const EVERY = 5000; // milliseconds between two looks at what others have decided
const MOST_STEPS = 200, MOST_ROWS = 100_000; // of one post
const GONE = 410;

export class Decisions extends EventTarget {
  /**
   * @param {Api} api
   * @param {object} facts header of the table: `key`, `rows`, `steps`, `upto`, `shared`, `is_upload`
   */
  constructor(api, facts) {
    super();
    this.api = api;
    this.code = new Uint8Array(facts.rows);
    this.texts = new Map();
    this.notes = new Map();
    this.tab = newName();
    this.problem = null;
    this.made = []; // times of the decisions of this page, for the pace
    this.decided = 0;
    this.#upto = facts.upto;
    // A shared machine forgets, so the browser keeps a copy; nothing is kept of an upload.
    this.#store = facts.is_upload ? null : new Store(facts.key, facts.shared);
    facts.steps.forEach(step => this.#take(step));
    this.#adopt(facts.steps);
    this.#channel = new BroadcastChannel(`hf_ecif:${facts.key}`);
    if (facts.shared) this.#channel.close();
    this.#channel.onmessage = ({data}) => this.#take(data) && this.#tell();
    this.#timer = setInterval(() => this.#look(), EVERY);
    addEventListener('pagehide', this.#leave);
  }

  #upto; #store; #channel; #timer;
  #steps = []; #byId = new Map(); #undone = new Set(); #redo = [];
  #told = new Map(); // steps on a row, in order
  #noted = new Map();
  #outbox = []; #sending = false;

  /** Decides on rows; `texts` are new captions. */
  decide(rows, action, texts) {
    this.made.push({at: performance.now(), rows: rows.length});
    this.#make({rows, action, ...(texts && {texts})});
    this.#redo = [];
  }

  note(row, note) {
    if ((this.notes.get(row) ?? '') === note) return;
    this.#make({rows: [row], note});
    this.#redo = [];
  }

  /** Takes back the last step, those of this page first; returns it. */
  undo() {
    const live = step => (step.action || 'note' in step) && !this.#undone.has(step.id);
    const step = this.#steps.findLast(one => live(one) && one.tab === this.tab)
      ?? this.#steps.findLast(live);
    if (!step) return null;
    this.#make({undo: step.id});
    this.#redo.push(step);
    return step;
  }

  /** Makes the step again that was taken back last; returns it. */
  redo() {
    const step = this.#redo.pop();
    if (step) this.#make({redo: step.id});
    return step ?? null;
  }

  name(row) {
    return NAMES[this.code[row]];
  }

  /** Steps that the server has not confirmed. */
  get waiting() {
    return this.#outbox.length;
  }

  /** Takes in what others have decided in the meantime. */
  async refresh() {
    this.#receive(await this.api.json(`steps?since=${this.#upto}`));
  }

  close() {
    clearInterval(this.#timer);
    this.#channel.close();
    removeEventListener('pagehide', this.#leave);
    if (this.#outbox.length) this.#leave();
  }

  #make(values) {
    const step = {id: newName(), tab: this.tab, at: Date.now(), ...values};
    this.#take(step);
    this.#store?.add(step);
    this.#outbox.push(step);
    try { this.#channel.postMessage(step); } catch { /* closed */ }
    this.#tell();
    this.#send();
  }

  #take(step) {
    if (this.#byId.has(step.id)) return false;
    this.#byId.set(step.id, step);
    this.#steps.push(step);
    const moved = step.undo ?? step.redo;
    if (moved) {
      if (step.undo) this.#undone.add(moved); else this.#undone.delete(moved);
      this.#byId.get(moved)?.rows?.forEach(row => this.#settle(row));
    } else if (step.rows) {
      const told = 'note' in step ? this.#noted : this.#told;
      for (const row of step.rows) {
        if (!told.has(row)) told.set(row, []);
        told.get(row).push(step);
        this.#settle(row);
      }
    }
    return true;
  }

  /** What holds of a row now. */
  #settle(row) {
    const live = step => !this.#undone.has(step.id);
    const step = this.#told.get(row)?.findLast(live);
    const code = step ? CODES[step.action] : 0;
    this.decided += (code > 0) - (this.code[row] > 0);
    this.code[row] = code;
    if (step?.texts) this.texts.set(row, step.texts[step.rows.indexOf(row)]);
    else this.texts.delete(row);
    const note = this.#noted.get(row)?.findLast(live)?.note;
    if (note) this.notes.set(row, note); else this.notes.delete(row);
  }

  /** Sends again what an earlier page could not, and what the server has forgotten. */
  #adopt(known) {
    const there = new Set(known.map(step => step.id));
    for (const step of this.#store?.all() ?? []) {
      if (there.has(step.id)) this.#store.written(step);
      else if (this.#take(step)) this.#outbox.push(step);
    }
    if (this.#store?.keeps) known.forEach(step => this.#store.add(step));
    this.#send();
  }

  async #send() {
    if (this.#sending) return;
    this.#sending = true;
    for (let wait = 500; this.#outbox.length;) {
      const steps = this.#batch();
      try {
        this.#receive(await this.api.post('steps', {steps, since: this.#upto}));
        this.#outbox.splice(0, steps.length);
        steps.forEach(step => this.#store?.written(step));
        this.problem = null;
        wait = 500;
      } catch (error) {
        if (error.status === 400 && steps.length === 1) {
          this.#outbox.shift();
          this.#refuse(steps[0], error);
          continue;
        }
        if (error.status === 400) { this.#single = true; continue; }
        this.problem = error.status ? error.message : 'The server does not answer.';
        this.#tell();
        if (error.status === GONE) break;
        await new Promise(resolve => setTimeout(resolve, wait));
        wait = Math.min(2 * wait, 10_000);
      }
      this.#tell();
    }
    this.#sending = false;
    this.#single = false;
  }

  #single = false;

  #batch() {
    let rows = 0;
    const most = this.#single ? 1 : MOST_STEPS;
    const end = this.#outbox.findIndex((step, number) =>
      number > 0 && (number >= most || (rows += step.rows?.length ?? 1) > MOST_ROWS));
    return this.#outbox.slice(0, end < 0 ? undefined : end);
  }

  /** A step that the server does not take does not hold here either. */
  #refuse(step, error) {
    this.#undone.add(step.id);
    step.rows?.forEach(row => this.#settle(row));
    this.#store?.forget(step);
    this.dispatchEvent(new CustomEvent('refused', {detail: error.message}));
    this.#tell();
  }

  #receive({steps, upto}) {
    this.#upto = upto;
    if (steps.map(step => this.#take(step)).some(Boolean)) this.#tell();
  }

  #look() {
    if (document.visibilityState !== 'visible' || this.#sending) return;
    this.refresh().catch(() => {}); // it is tried again
  }

  #leave = () => {
    const steps = this.#batch();
    if (!steps.length) return;
    this.api.post('steps', {steps, since: this.#upto}, {keepalive: true}).catch(() => {});
  };

  #tell() {
    this.dispatchEvent(new Event('changed'));
  }
}

/** Steps in the browser's storage, each under its own name, so that tabs do not overwrite others. */
class Store {
  constructor(key, keeps) {
    this.prefix = `hf_ecif_step:${key}:`;
    this.keeps = keeps; // also those that the server has written
  }

  add(step) {
    try {
      localStorage.setItem(this.prefix + step.id, JSON.stringify(step));
    } catch { /* full or forbidden: the server has it soon */ }
  }

  written(step) {
    if (!this.keeps) this.forget(step);
  }

  forget(step) {
    try {
      localStorage.removeItem(this.prefix + step.id);
    } catch { /* then it is not there */ }
  }

  all() {
    try {
      const names = Object.keys(localStorage).filter(name => name.startsWith(this.prefix));
      const steps = names.map(name => JSON.parse(localStorage.getItem(name)));
      return steps.filter(Boolean).sort((one, other) => one.at - other.at);
    } catch {
      return []; // it is forbidden here
    }
  }
}

function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, byte => byte.toString(16).padStart(2, '0')).join('');
}
