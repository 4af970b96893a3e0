// A grid of pairs of which only those in sight exist. It is a list box: the focus stays on it, and
// the current pair is its active descendant.

import {WORDS} from './decisions.js';
import {count, h, share} from './dom.js';
import {SIDES} from './rows.js';

const GAP = 8;
const BEYOND = 2; // lines of cards above and below those in sight
const CAPTIONS = 5; // of a card that holds a picture with all its captions
const LINE = 18;
const TALLEST = 8_000_000; // pixels; browsers cut off what is much taller

export class Grid {
  /**
   * @param {object} desk what is shown: `rows`, `decisions`, `items` (lists of rows, one a card),
   *   `place` (number of the card of a row), `current`, `selected`
   * @param {{pick: Function, open: Function}} on what a press does
   */
  constructor(desk, on) {
    this.desk = desk;
    this.on = on;
    this.size = 148;
    this.space = h('div', {class: 'grid-space', role: 'presentation'});
    this.element = h('div', {
      id: 'review-cards', class: 'grid', role: 'listbox', tabindex: '0',
      'aria-multiselectable': 'true', 'aria-label': 'Pairs',
      onclick: event => this.#pressed(event),
      ondblclick: event => this.#pressed(event, true),
      onscroll: () => this.#draw(),
    }, this.space);
    new ResizeObserver(() => this.layout()).observe(this.element);
  }

  #cards = new Map(); #across = 1; #ratio = 1;

  get across() {
    return this.#across;
  }

  /** Places everything anew: other rows, another size. */
  layout() {
    this.#clear();
    const width = this.element.clientWidth - 2;
    if (width <= 0) return; // it cannot be seen now; when it can, it is laid out again
    this.#across = Math.max(1, Math.floor((width + GAP) / (this.size + GAP)));
    this.width = (width - GAP * (this.#across - 1)) / this.#across;
    const lines = this.desk.grouped ? CAPTIONS : this.size < 120 ? 2 : 3;
    this.picture = Math.round(this.width * 0.72);
    this.height = this.picture + lines * LINE + 46;
    this.element.style.setProperty('--picture', `${this.picture}px`);
    this.element.style.setProperty('--lines', lines);
    const tall = Math.ceil(this.desk.items.length / this.#across) * (this.height + GAP);
    this.space.style.height = `${Math.min(tall, TALLEST)}px`;
    // Of a list that is too tall, each pixel scrolled is several of the list.
    const seen = this.element.clientHeight;
    this.#ratio = tall > TALLEST ? (tall - seen) / (TALLEST - seen) : 1;
    this.#draw();
  }

  /** Draws the cards in sight again, after a decision or when their words have come. */
  refresh(rows) {
    const places = rows ? new Set(rows.map(row => this.desk.place.get(row))) : null;
    for (const [number, card] of this.#cards) {
      if (!places || places.has(number)) this.#fill(card, number);
    }
    this.#point();
  }

  /** Brings a row into sight. */
  reveal(row) {
    const number = this.desk.place.get(row);
    if (number === undefined || !this.height) return;
    const top = Math.floor(number / this.#across) * (this.height + GAP);
    const {clientHeight} = this.element, offset = this.#offset();
    if (top < offset) this.element.scrollTop = top / this.#ratio;
    else if (top + this.height > offset + clientHeight) {
      this.element.scrollTop = (top + this.height - clientHeight + GAP) / this.#ratio;
    }
    this.#draw();
  }

  /** Whether the picture of a row can be seen. */
  shows(row) {
    const card = this.#cards.get(this.desk.place.get(row));
    return card?.querySelector('img')?.complete ?? false;
  }

  #clear() {
    this.space.replaceChildren();
    this.#cards.clear();
  }

  #draw() {
    if (!this.height || !this.element.clientHeight || !this.desk.items.length) return;
    const {clientHeight} = this.element, step = this.height + GAP;
    const first = Math.max(0, Math.floor(this.#offset() / step) - BEYOND) * this.#across;
    const lines = Math.ceil(clientHeight / step) + 2 * BEYOND + 1;
    const end = Math.min(this.desk.items.length, first + lines * this.#across);
    for (const [number, card] of this.#cards) {
      if (number >= first && number < end) continue;
      card.remove();
      this.#cards.delete(number);
    }
    const wanted = [];
    for (let number = first; number < end; number++) {
      wanted.push(...this.desk.items[number].slice(0, CAPTIONS));
      if (!this.#cards.has(number)) this.#add(number);
      else if (this.#ratio > 1) this.#place(this.#cards.get(number), number);
    }
    this.desk.rows.want(wanted);
    this.#point();
  }

  #add(number) {
    const card = h('div', {
      class: 'card', role: 'option', id: `pair-${number}`,
      style: `width:${this.width}px;height:${this.height}px`,
    });
    this.#place(card, number);
    card.append(
      h('img', {alt: '', decoding: 'async', fetchpriority: 'low', src: this.#address(number)}),
      h('span', {class: 'tick', 'data-tick': '1', 'aria-hidden': 'true'}),
      h('span', {class: 'words', dir: 'auto'}),
      h('span', {class: 'facts'}),
    );
    this.#cards.set(number, card);
    this.#fill(card, number);
    this.space.append(card);
  }

  /** How far the list is scrolled, in its own pixels. */
  #offset() {
    return this.element.scrollTop * this.#ratio;
  }

  #place(card, number) {
    const left = (number % this.#across) * (this.width + GAP);
    const top = Math.floor(number / this.#across) * (this.height + GAP);
    const shift = this.element.scrollTop - this.#offset();
    card.style.transform = `translate(${left}px,${top + shift}px)`;
  }

  #address(number) {
    const side = this.width > 200 ? SIDES.large : SIDES.small;
    return this.desk.rows.api.image(this.desk.items[number][0], side);
  }

  #fill(card, number) {
    const {rows, decisions, current, selected} = this.desk, item = this.desk.items[number];
    const row = item.includes(current) ? current : item[0];
    const [, , words, facts] = card.children;
    card.dataset.row = row;
    card.className = 'card';
    const codes = new Set(item.map(one => decisions.code[one]));
    if (codes.size === 1 && decisions.code[row]) card.classList.add(`is-${decisions.name(row)}`);
    card.classList.toggle('current', item.includes(current));
    const isSelected = item.every(one => selected.has(one));
    card.setAttribute('aria-selected', isSelected);
    card.setAttribute('aria-posinset', number + 1);
    card.setAttribute('aria-setsize', this.desk.items.length);
    // Who hears a card hears which row it is, and what its figure is the probability of.
    words.replaceChildren(unseen(`Row ${count(row)}: `),
      ...(item.length > 1 ? this.#captions(item) : this.#caption(row)));
    facts.replaceChildren(...this.#facts(row, item.length));
  }

  #caption(row) {
    return this.desk.rows.caption(row, this.desk.decisions.texts.get(row));
  }

  #captions(item) {
    const told = item.slice(0, CAPTIONS).map(row => h('span', {
      class: `one is-${this.desk.decisions.name(row) || 'open'}${
        row === this.desk.current ? ' current' : ''}`, 'data-row': row,
    }, ...this.#caption(row)));
    return item.length > CAPTIONS ? [...told.slice(0, -1), `and ${item.length - CAPTIONS + 1} more`]
      : told;
  }

  #facts(row, size) {
    const {rows, decisions} = this.desk, told = [];
    const code = decisions.code[row];
    if (!Number.isNaN(rows.probability[row])) {
      told.push(h('b', {}, share(rows.probability[row])), unseen(' likely wrong, '));
    }
    told.push(code ? h('i', {class: 'decision'}, WORDS[code]) : unseen('not decided'));
    if (size > 1) told.push(h('i', {}, `${size} captions`));
    if (rows.isBorderline(row)) told.push(h('i', {}, 'borderline'));
    if (rows.finding(row)) told.push(h('i', {}, rows.finding(row).replaceAll('_', ' ')));
    if (decisions.notes.has(row)) told.push(h('i', {}, 'note'));
    return told;
  }

  #point() {
    const number = this.desk.place.get(this.desk.current);
    if (this.#cards.has(number)) this.element.setAttribute('aria-activedescendant', `pair-${number}`);
    else this.element.removeAttribute('aria-activedescendant');
  }

  #pressed(event, twice = false) {
    const card = event.target.closest('.card');
    if (!card) return;
    const row = Number(event.target.closest('[data-row]').dataset.row);
    this.element.focus({preventScroll: true});
    if (twice) this.on.open(row);
    else {
      const ticked = event.target.dataset.tick === '1';
      this.on.pick(row, {toggle: ticked || event.ctrlKey || event.metaKey, extend: event.shiftKey});
    }
  }
}

const unseen = text => h('span', {class: 'unseen'}, text);
