// The review's page: which pair is current, what is selected, and what keys and buttons do.
//
// A decision is made here, on the rows that are seen, and the next pair is shown at once; the server
// hears of it afterwards. A key belongs to the pair that was shown when it was pressed. Before that
// pair's picture and words are there, it waits for them: nobody decides on what they have not seen.

import {Api} from './api.js';
import {Decisions, WORDS} from './decisions.js';
import {count, h, plural} from './dom.js';
import {Filters, NARROW} from './filters.js';
import {Grid} from './grid.js';
import {commandOf, makeHelp} from './keys.js';
import {Pair} from './pair.js';
import {Progress} from './progress.js';
import {Rows, SIDES} from './rows.js';

const DECIDES = new Set(['keep', 'remove', 'unsure', 'accept', 'clear']);
const SIZES = [96, 120, 148, 190, 250];
const SETTINGS = 'hf_ecif_review_view';
const AHEAD = 40; // undecided pairs whose words are fetched ahead

class Review {
  constructor() {
    this.items = [];
    this.order = new Uint32Array();
    this.at = new Int32Array();
    this.place = {get: row => (this.#cards[row] < 0 ? undefined : this.#cards[row])};
    this.selected = new Set();
    this.current = null;
    this.grouped = false;
    this.#build();
    document.addEventListener('keydown', event => this.#key(event));
  }

  #cards = new Int32Array(); #queue = []; #painted = null; #anchor = null; #told = {};

  // ------------------------------------------------------------------------------ what is there

  #build() {
    const press = command => () => this.press(command);
    const button = (id, text, command, title) => h('button', {
      type: 'button', id: `review-${id}`, title, onclick: press(command),
    }, text);
    this.progress = new Progress();
    this.grid = new Grid(this, {
      pick: (row, how) => this.#pick(row, how),
      open: row => { this.show(row); this.#mode('one'); },
    });
    this.pair = new Pair(this, {
      zoom: () => this.press('zoom'),
      recaption: text => this.#recaption(text),
      note: text => this.current !== null && this.decisions.note(this.current, text),
      show: row => this.show(row),
      group: () => this.press('duplicates'),
    });
    this.acceptButton = button('accept', 'Accept suggestion', 'accept', 'a');
    this.selectedText = h('span', {id: 'review-selected'});
    this.actions = h('div', {class: 'actions', role: 'toolbar', 'aria-label': 'Decide'},
      button('keep', 'Keep', 'keep', 'k'), button('remove', 'Remove', 'remove', 'r'),
      button('unsure', 'Not sure', 'unsure', 's'), this.acceptButton,
      button('undo', 'Undo', 'undo', 'u'), button('redo', 'Redo', 'redo', 'y'),
      button('previous', '◂ Previous', 'previous', 'p'), button('next', 'Next ▸', 'next', 'j'),
      this.selectedText);
    this.status = h('p', {id: 'review-status', class: 'status', role: 'status'});
    this.modeButton = button('mode', 'One by one', 'mode', 'g');
    this.picturesButton = button('pictures', 'Group pictures', 'pictures', 't');
    this.file = h('input', {type: 'file', accept: '.json,.jsonl', hidden: true,
      'aria-label': 'File of decisions', onchange: () => this.#import()});
    this.view = h('div', {class: 'view', role: 'toolbar', 'aria-label': 'View'},
      this.modeButton, this.picturesButton,
      button('smaller', '−', 'smaller', 'Smaller cards'), button('larger', '+', 'larger', 'Larger cards'),
      button('similar', 'Similar', 'similar', 'f'), button('keys', 'Keys', 'help', '?'));
    const importing = h('button', {type: 'button', id: 'review-import',
      onclick: () => this.file.click()}, 'Import decisions');
    this.filters = new Filters(() => this.list(), [this.view], [importing, this.file]);
    this.nothing = h('p', {class: 'nothing', hidden: true});
    this.help = makeHelp();
    this.zoomed = h('div', {id: 'review-zoom', class: 'zoom', role: 'dialog', hidden: true,
      'aria-label': 'Zoom', onclick: () => this.press('zoom')});
    this.element = h('section', {class: 'review', 'aria-label': 'Review'},
      this.filters.element, this.progress.element,
      h('div', {class: 'body'}, h('div', {class: 'listed'}, this.grid.element, this.nothing),
        h('div', {class: 'looked-at-closely'}, this.pair.element)),
      h('div', {class: 'bottom'}, this.actions, this.status), this.help, this.zoomed);
    const kept = readSettings();
    this.grid.size = SIZES.includes(kept.size) ? kept.size : this.grid.size;
    this.#mode(kept.mode ?? (NARROW.matches ? 'one' : 'grid'));
  }

  /** Takes what the server's side of the page says: desk, threshold, selection, pressed row. */
  hear(told) {
    this.#hearing = this.#hearing.catch(() => {}).then(() => this.#hear(told)); // one after another
    return this.#hearing;
  }

  #hearing = Promise.resolve();

  async #hear(told) {
    const before = this.#told;
    if (!told.desk) return;
    if (told.desk !== before.desk) await this.#open(told.desk);
    this.#told = told;
    const threshold = Number(told.threshold), isOwn = told.own === '1';
    const span = told.low === undefined ? null : [Number(told.low), Number(told.high)];
    const moved = threshold !== this.rows.threshold || isOwn !== this.rows.isOwn;
    Object.assign(this.rows, {threshold, isOwn});
    if (moved || String(span) !== String(this.filters.span) || told.desk !== before.desk) {
      this.filters.span = span;
      this.list();
    }
    if (told.row !== undefined && told.pressed !== before.pressed) this.show(Number(told.row));
  }

  async #open(desk) {
    const api = new Api(desk);
    const table = await api.binary('table');
    this.decisions?.close();
    this.#queue = [];
    this.rows = new Rows(api, table);
    this.decisions = new Decisions(api, table.header);
    this.rows.addEventListener('details', ({detail}) => this.#came(detail));
    this.rows.addEventListener('picture', ({detail}) => detail === this.current && this.#drain());
    this.rows.addEventListener('problem', ({detail}) => this.say(detail.message));
    this.decisions.addEventListener('changed', () => this.#decided());
    this.decisions.addEventListener('refused', ({detail}) => this.say(`Not taken: ${detail}`));
    this.filters.reset();
    this.filters.open(this.rows);
    Object.assign(this, {current: null, grouped: false});
    this.selected.clear();
  }

  // ----------------------------------------------------------------------------------- the list

  /** Lists the rows that pass the filters, and goes on at the first one that is not decided. */
  list() {
    if (!this.rows) return;
    const {filters, rows, decisions} = this;
    this.order = filters.only
      ? Uint32Array.from(filters.only.rows)
      : rows.list(filters.passes(decisions), filters.order, filters.reversed);
    if (this.grouped) {
      this.items = rows.groupPictures(this.order);
      this.order = Uint32Array.from(this.items.flat());
    } else this.items = Array.from(this.order, row => [row]);
    this.at = new Int32Array(rows.count).fill(-1);
    this.#cards = new Int32Array(rows.count).fill(-1);
    this.order.forEach((row, number) => { this.at[row] = number; });
    this.items.forEach((item, number) => item.forEach(row => { this.#cards[row] = number; }));
    for (const row of this.selected) if (this.at[row] < 0) this.selected.delete(row);
    this.#anchor = null;
    filters.draw(name => this.#widen(name));
    this.nothing.hidden = this.order.length > 0;
    this.nothing.textContent = this.order.length ? '' : this.#nothing();
    this.grid.element.hidden = !this.order.length;
    this.picturesButton.setAttribute('aria-pressed', this.grouped);
    this.grid.layout();
    const stays = this.current !== null && this.at[this.current] >= 0;
    this.#go(stays ? this.current : this.#undecided(-1) ?? this.order[0] ?? null);
    this.#draw();
  }

  #nothing() {
    const {which, span} = this.filters, {abstains} = this.rows.header;
    if (which === 'flagged' && abstains) return 'Nothing is flagged: the model cannot tell right pairs '
      + 'from wrong ones here. List all pairs to judge them, the most suspicious ones first.';
    const here = span ? 'in the selection of the chart' : 'with these filters';
    return which === 'flagged'
      ? `No pair is flagged ${here}. Lower the threshold on the overview to flag more.`
      : `There is no pair ${here}.`;
  }

  #widen(name) {
    this.filters[name] = null;
    if (name === 'span') document.dispatchEvent(new Event('review-unselect'));
    this.list();
  }

  /** Shows a row; where the list has not got it, lists all. */
  show(row) {
    if (this.at[row] < 0) {
      Object.assign(this.filters, {which: 'all', decided: '', finding: '', column: '', value: '',
        text: '', found: null, only: null});
      if (this.filters.span) this.#widen('span');
      this.list();
    }
    if (this.at[row] >= 0) this.#go(row);
    else this.say(`Row ${count(row)} could not be read.`);
  }

  /** The next undecided row after a place in the list, from its start if there is none. */
  #undecided(from) {
    const size = this.order.length;
    for (let step = 1; step <= size; step++) {
      const row = this.order[(from + step + size) % size];
      if (!this.decisions.code[row]) return row;
    }
    return undefined;
  }

  #go(row) {
    const before = this.current;
    this.current = row ?? null;
    this.#painted = null;
    this.pair.draw();
    this.grid.refresh([before, row].filter(one => one !== null && one !== undefined));
    if (row === null || row === undefined) return;
    this.grid.reveal(row);
    this.#drawActions();
    this.#drawZoom();
    this.rows.prefetch(this.#next(row));
    requestAnimationFrame(() => { this.#painted = row; this.#drain(); });
  }

  /** The row, and the undecided ones after it. */
  #next(row) {
    const found = [row], size = this.order.length, start = this.at[row];
    for (let step = 1; step < size && found.length < AHEAD && step < 2000; step++) {
      const other = this.order[(start + step) % size];
      if (!this.decisions.code[other]) found.push(other);
    }
    return found;
  }

  // ------------------------------------------------------------------------------- keys, buttons

  /** Does what a key or a button means, after what was pressed before. */
  press(command, event = {}) {
    if (!this.rows) return;
    if (command === 'escape' && this.#queue.length) {
      this.#queue = [];
      this.say('The keys that waited are forgotten.');
      return;
    }
    this.#queue.push({command, extend: Boolean(event.shiftKey), row: this.current});
    this.#drain();
  }

  #drain() {
    while (this.#queue.length) {
      const [{command, extend, row}] = this.#queue;
      if (DECIDES.has(command) && !this.selected.size && !this.#wasSeen(row)) {
        const size = this.#queue.length;
        if (this.#painted === this.current) {
          this.say(`${plural(size, 'key')} ${size === 1 ? 'waits' : 'wait'} for the pair to be shown.`);
        }
        return;
      }
      this.#queue.shift();
      this.#run(command, extend, row);
    }
  }

  /** Whether a pair's picture and words are on the screen, or were. */
  #wasSeen(row) {
    const {current, rows} = this;
    if (row !== current || row === null) return true;
    const hasPicture = rows.hasImage(row) || (this.mode === 'grid' && this.grid.shows(row));
    return this.#painted === row && rows.details.has(row) && hasPicture;
  }

  #run(command, extend, row) {
    const moves = {next: 1, previous: -1, down: this.grid.across, up: -this.grid.across};
    if (DECIDES.has(command)) this.#decide(command, row);
    else if (command in moves) this.#move(moves[command], extend);
    else if (command === 'first') this.#go(this.order[0]);
    else if (command === 'last') this.#go(this.order.at(-1));
    else this.#commands[command]?.();
  }

  #commands = {
    undo: () => this.#restore(this.decisions.undo(), 'Undone', 'There is nothing to undo.'),
    redo: () => this.#restore(this.decisions.redo(), 'Done again', 'There is nothing to redo.'),
    undecided: () => this.#goUndecided(),
    select: () => this.current !== null && this.#pick(this.current, {toggle: true}),
    all: () => { this.order.forEach(row => this.selected.add(row)); this.#draw(); this.grid.refresh(); },
    mode: () => this.#mode(this.mode === 'grid' ? 'one' : 'grid'),
    zoom: () => { this.zoomed.hidden = !this.zoomed.hidden; this.#drawZoom(); },
    similar: () => this.#similar(),
    duplicates: () => this.#duplicates(),
    pictures: () => this.#pictures(),
    larger: () => this.#resize(1),
    smaller: () => this.#resize(-1),
    search: () => this.filters.textField.focus(),
    caption: () => this.#write(this.pair.text),
    note: () => this.#write(this.pair.noted),
    help: () => this.help.showModal(),
    escape: () => this.#escape(),
  };

  #key(event) {
    if (!this.element.isConnected || !this.element.offsetParent || this.help.open) return;
    const command = commandOf(event);
    if (!command) return;
    event.preventDefault();
    if (command === 'leave') {
      event.target.blur();
      this.grid.element.focus({preventScroll: true});
    } else if (!event.repeat || !DECIDES.has(command)) this.press(command, event);
  }

  #decide(command, row) {
    const rows = this.selected.size ? [...this.selected] : row === null ? [] : [row];
    if (!rows.length) return this.say('Choose a pair first.');
    if (command === 'accept') return this.#accept(rows);
    return this.#settle(rows, command);
  }

  async #accept(rows) {
    const having = rows.filter(row => this.rows.is('suggestion', row));
    if (!having.length) return this.say(rows.length > 1
      ? 'None of these pairs has a suggestion.' : 'This pair has no suggestion.');
    const known = having.every(row => this.rows.details.has(row));
    if (!known) this.say(`Fetching ${plural(having.length, 'suggestion')} …`);
    const details = known ? having.map(row => this.rows.details.get(row)) : await this.rows.words(having);
    return this.#settle(having, 'recaption', details.map(detail => detail.suggestion));
  }

  #recaption(text) {
    if (this.current === null) return;
    if (!text.trim()) { this.say('A new caption needs words.'); return; }
    this.#settle([this.current], 'recaption', [text.trim()]);
  }

  /** Decides on rows and goes on to the next undecided one. */
  #settle(rows, action, texts) {
    const last = rows.length > 1 || this.selected.size
      ? rows.reduce((one, other) => (this.at[other] > this.at[one] ? other : one)) : rows[0];
    this.decisions.decide(rows, action, texts);
    this.selected.clear();
    const what = action === 'clear' ? 'not decided' : WORDS[this.decisions.code[rows[0]]];
    const which = rows.length === 1 ? `Row ${count(rows[0])}` : plural(rows.length, 'row');
    const next = action === 'clear' ? rows[0] : this.#undecided(this.at[last]);
    this.say(`${which}: ${what}.${next === undefined ? ' All that are listed are decided.' : ''}`);
    if (rows.length > 1) this.grid.refresh();
    this.#go(next ?? last);
  }

  #restore(step, done, none) {
    if (!step) return this.say(none);
    const rows = step.rows, what = step.action === 'recaption' ? 'new caption' : step.action ?? 'note';
    this.say(`${done}: ${rows.length === 1 ? `row ${count(rows[0])}` : plural(rows.length, 'row')}, ${what}.`);
    this.grid.refresh();
    if (this.at[rows[0]] >= 0) this.#go(rows[0]);
    return undefined;
  }

  #move(by, extend) {
    if (this.current === null) return;
    const place = Math.max(0, Math.min(this.at[this.current] + by, this.order.length - 1));
    this.#pick(this.order[place], {extend, moved: true});
  }

  /** Makes a row the current one; `toggle` selects it, `extend` all from the last one on. */
  #pick(row, {toggle = false, extend = false, moved = false}) {
    const from = this.#anchor ?? this.current ?? row;
    if (extend) {
      const [low, high] = [this.at[from], this.at[row]].sort((one, other) => one - other);
      this.selected.clear();
      for (let place = low; place <= high; place++) this.selected.add(this.order[place]);
      this.#anchor = from;
    } else {
      this.#anchor = row;
      const rows = this.items[this.#cards[row]] ?? [row];
      if (!toggle) { if (!moved) this.selected.clear(); }
      else if (this.selected.has(row)) rows.forEach(one => this.selected.delete(one));
      else rows.forEach(one => this.selected.add(one));
    }
    this.grid.refresh();
    this.#go(row);
    this.#drawActions();
  }

  #goUndecided() {
    const row = this.#undecided(this.at[this.current] ?? -1);
    if (row === undefined) this.say('All that are listed are decided.');
    else this.#go(row);
  }

  async #similar() {
    const row = this.current;
    if (row === null) return;
    const sections = await this.rows.api.json(`similar/${row}`);
    const told = sections.map(({how, rows}) => `${count(rows.length)} ${how}`);
    if (!told.length) { this.say(`No pair is like row ${count(row)}.`); return; }
    const readable = sections.flatMap(section => section.rows)
      .filter(one => this.rows.is('readable', one));
    this.filters.only = {rows: [row, ...readable],
      told: `Like row ${count(row)}: ${told.join(', ')}`};
    this.current = row;
    this.list();
  }

  #duplicates() {
    const row = this.current, group = row === null ? -1 : this.rows.duplicate[row];
    if (group < 0) { this.say('This pair is in no group of duplicates.'); return; }
    const rows = [];
    for (let other = 0; other < this.rows.count; other++) {
      if (this.rows.duplicate[other] === group && this.rows.is('readable', other)) rows.push(other);
    }
    this.filters.only = {rows, told: `The group of duplicates of row ${count(row)}: ${plural(rows.length, 'pair')}`};
    this.list();
  }

  async #pictures() {
    if (!this.grouped && !this.rows.pictureOf) this.say('Looking for equal pictures …');
    await this.rows.findPictures();
    this.grouped = !this.grouped;
    this.list();
    const more = this.items.filter(item => item.length > 1).length;
    this.say(this.grouped ? `${plural(more, 'picture')} with more than one caption listed.` : '');
  }

  #resize(by) {
    const place = Math.max(0, Math.min(SIZES.indexOf(this.grid.size) + by, SIZES.length - 1));
    this.grid.size = SIZES[place];
    keepSettings({size: this.grid.size});
    this.grid.layout();
    if (this.current !== null) this.grid.reveal(this.current);
  }

  #mode(mode) {
    this.mode = mode;
    this.element.dataset.mode = mode;
    this.modeButton.textContent = mode === 'grid' ? 'One by one' : 'Grid';
    if (this.rows) keepSettings({mode});
    this.grid.layout();
    if (this.current !== null) this.grid.reveal(this.current);
  }

  #write(field) {
    if (this.current === null) return;
    field.focus();
    field.select();
  }

  #escape() {
    if (!this.zoomed.hidden) this.#commands.zoom();
    else if (this.selected.size) { this.selected.clear(); this.grid.refresh(); this.#drawActions(); }
    else if (this.filters.only) this.#widen('only');
    else if (this.mode === 'one' && !NARROW.matches) this.#mode('grid');
  }

  async #import() {
    const [file] = this.file.files;
    this.file.value = '';
    if (!file) return;
    try {
      const {new: size, found} = await this.rows.api.post('import', {text: await file.text()});
      await this.decisions.refresh();
      this.grid.refresh();
      this.say(`${plural(found, 'step')} read, ${count(size)} of them new.`);
    } catch (error) {
      this.say(`Not imported: ${error.message}`);
    }
  }

  // ------------------------------------------------------------------------------------- drawing

  say(text) {
    this.status.textContent = text;
  }

  #came(rows) {
    if (this.order.length) this.grid.refresh(rows.filter(row => this.at[row] >= 0));
    if (rows.includes(this.current)) { this.pair.draw(); this.#drawZoom(); this.#drain(); }
  }

  #decided() {
    this.pair.draw();
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => { this.#frame = 0; this.#draw(); this.grid.refresh(); });
  }

  #frame = 0;

  #draw() {
    const {filters, order, rows, decisions} = this;
    this.progress.draw(order, rows, decisions, filters.say(order.length));
    this.#drawActions();
    const {waiting, problem} = decisions;
    this.element.dataset.waiting = waiting;
    if (problem) this.say(`${problem} ${plural(waiting, 'decision')} kept here, not yet on the server.`);
  }

  #drawActions() {
    const size = this.selected.size, row = this.current;
    this.selectedText.textContent = size ? `${plural(size, 'pair')} selected` : '';
    this.acceptButton.hidden = !size && (row === null || !this.rows.is('suggestion', row));
  }

  #drawZoom() {
    if (this.zoomed.hidden || this.current === null) return;
    const text = this.decisions.texts.get(this.current);
    this.zoomed.replaceChildren(
      h('img', {src: this.rows.api.image(this.current, SIDES.large), alt: `Image of row ${this.current}`}),
      h('p', {dir: 'auto'}, ...this.rows.caption(this.current, text)));
  }
}

// -------------------------------------------------------------------------------------- the start

function readSettings() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

function keepSettings(changes) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify({...readSettings(), ...changes}));
  } catch { /* the browser forbids it */ }
}

const review = new Review();

/** Puts the page in its place, and hears what is told there. */
function attend(place) {
  const page = document.getElementById('review-page'), told = place.querySelector('[data-desk]');
  if (!told) return;
  if (!page) { setTimeout(() => attend(place), 50); return; } // Gradio has not made it yet
  if (review.element.parentNode !== page) page.replaceChildren(review.element);
  review.hear({...told.dataset}).catch(error => {
    page.replaceChildren(h('p', {class: 'problem', role: 'alert'}, error.message));
  });
}

document.addEventListener('review-told', event => attend(event.detail));
const there = document.getElementById('review-told');
if (there) attend(there);
