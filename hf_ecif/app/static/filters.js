// Which pairs are listed, and in which order: the controls above the list.

import {choice, count, fill, h, plural} from './dom.js';
import {ORDERS} from './rows.js';

export const NARROW = matchMedia('(max-width: 760px)');
const WHICH = [
  ['flagged', 'Flagged'], ['borderline', 'Borderline'], ['not flagged', 'Not flagged'],
  ['suggestion', 'With a suggestion'], ['duplicates', 'In groups of duplicates'], ['all', 'All'],
];
const DECIDED = [
  ['', 'Decided or not'], ['0', 'Not decided'], ['any', 'Decided'], ['1', 'Keep'],
  ['2', 'Remove'], ['3', 'New caption'], ['4', 'Not sure'], ['note', 'With a note'],
];
const NAMES = {
  ecif_noise_probability: 'Probability', ecif_score: 'Influence',
  ecif_finding: 'Finding', ecif_duplicate_group: 'Group of duplicates',
};

export class Filters {
  /**
   * @param {Function} changed called when another list is wanted
   * @param {Node[]} beside what stands in the same line
   * @param {Node[]} more what stands with the filters that are seldom used
   */
  constructor(changed, beside, more) {
    this.changed = changed;
    this.reset();
    const set = name => value => { this[name] = value; changed(); };
    this.whichField = choice('review-which', 'Pairs', WHICH, set('which'));
    this.decidedField = choice('review-decided', 'Decisions', DECIDED, set('decided'));
    this.findingField = choice('review-finding', 'Finding', [['', 'Any']], set('finding'));
    this.orderField = choice('review-order', 'Order', [], value => this.#order(value));
    this.columnField = choice('review-column', 'Column', [], value => this.#column(value));
    this.valueField = choice('review-value', 'Value', [], set('value'));
    this.textField = h('input', {
      id: 'review-search', type: 'search', placeholder: 'words in captions',
      oninput: () => this.#search(),
    });
    this.direction = h('button', {
      type: 'button', id: 'review-reverse', 'aria-pressed': 'false', title: 'Reverse the order',
      'aria-label': 'Reverse the order',
      onclick: () => { this.reversed = !this.reversed; changed(); },
    }, '⇅');
    this.more = h('details', {class: 'more'}, h('summary', {}, 'More filters'),
      h('div', {class: 'fields'}, this.decidedField.field, this.findingField.field,
        this.columnField.field, this.valueField.field, ...more));
    this.chips = h('div', {id: 'review-chips', class: 'chips'});
    // On a phone the pair comes first, and these are opened when they are wanted.
    this.element = h('details', {class: 'filters', open: !NARROW.matches},
      h('summary', {class: 'opener'}, 'Which pairs, and how they are shown'),
      h('div', {class: 'top'}, this.whichField.field,
        h('label', {class: 'field'}, h('span', {}, 'Search'), this.textField),
        this.orderField.field, this.direction, ...beside),
      this.more, this.chips);
  }

  reset() {
    Object.assign(this, {
      which: 'flagged', decided: '', finding: '', column: '', value: '', text: '', order: 'likely',
      reversed: false, found: null, span: null, only: null,
    });
  }

  /** Offers what an audit has. */
  open(rows) {
    this.rows = rows;
    const {findings, columns, groups} = rows.header;
    const named = columns.map(name => [name, NAMES[name] ?? name]);
    fill(this.findingField.select, [['', 'Any'], ['any', 'One of them'],
      ...findings.map(name => [name, name.replaceAll('_', ' ')])]);
    this.findingField.field.hidden = !findings.length;
    const orders = Object.entries(ORDERS).map(([name, [text]]) => [name, text]);
    fill(this.orderField.select, [...orders, ...named.map(([name, text]) => [name, `By ${text}`])]);
    const first = named.toSorted(([one], [other]) => (other === groups) - (one === groups));
    fill(this.columnField.select, [['', 'Any'], ...first]);
    fill(this.valueField.select, [['', 'Any']]);
    this.valueField.field.hidden = true;
  }

  /** Whether a row is in the list. */
  passes(decisions) {
    const {rows, which, found, span, finding, value} = this;
    const values = this.column ? rows.extras.get(this.column)?.values : null;
    const isIn = {
      flagged: row => rows.isFlagged(row),
      borderline: row => rows.isBorderline(row),
      'not flagged': row => !rows.isFlagged(row),
      suggestion: row => rows.is('suggestion', row),
      duplicates: row => rows.duplicate[row] >= 0,
      all: () => true,
    }[which];
    return row => rows.is('readable', row)
      && isIn(row)
      && (!found || found[row] === 1)
      && (!span || (rows.positive[row] >= span[0] && rows.positive[row] <= span[1]))
      && (!finding || (finding === 'any' ? rows.finding(row) : rows.finding(row) === finding))
      && (value === '' || !values || values[row] === Number(value))
      && this.#isDecided(decisions, row);
  }

  /** Shows these controls as they are set, and what narrows the list besides. */
  draw(clear) {
    this.whichField.select.value = this.which;
    this.decidedField.select.value = this.decided;
    this.findingField.select.value = this.finding;
    this.orderField.select.value = this.order;
    this.columnField.select.value = this.column;
    if (document.activeElement !== this.textField) this.textField.value = this.text;
    this.direction.setAttribute('aria-pressed', this.reversed);
    const told = [];
    if (this.span) {
      const [low, high] = this.span.map(value => value.toPrecision(3).replace('-', '−'));
      told.push(['span', `Selected in the chart: influence as a positive from ${low} to ${high} nats`]);
    }
    if (this.only) told.push(['only', this.only.told]);
    this.chips.replaceChildren(...told.map(([name, text]) => h('span', {class: 'chip'}, text,
      h('button', {type: 'button', 'aria-label': 'Show the others again',
        onclick: () => clear(name)}, '×'))));
  }

  /** How many of how many rows are listed, in words. */
  say(size) {
    return `${plural(size, 'pair')} of ${count(this.rows.count)}`;
  }

  #isDecided(decisions, row) {
    const code = decisions.code[row];
    if (this.decided === '') return true;
    if (this.decided === 'any') return code > 0;
    if (this.decided === 'note') return decisions.notes.has(row);
    return code === Number(this.decided);
  }

  async #order(name) {
    if (!ORDERS[name]) await this.rows.extra(name);
    this.order = name;
    this.changed();
  }

  async #column(name) {
    this.column = name;
    this.value = '';
    const extra = name ? await this.rows.extra(name) : null;
    this.valueField.field.hidden = extra?.kind !== 'names';
    fill(this.valueField.select, [['', 'Any'],
      ...(extra?.names ?? []).map((text, number) => [number, text])]);
    this.changed();
  }

  #wait = null;

  #search() {
    clearTimeout(this.#wait);
    this.#wait = setTimeout(async () => {
      const text = this.text = this.textField.value.trim();
      if (!text) this.found = null;
      else {
        const path = `search?text=${encodeURIComponent(text)}`;
        const {columns} = await this.rows.api.binary(path);
        if (text !== this.text) return; // it was written on
        this.found = new Uint8Array(this.rows.count);
        for (const row of columns.values) this.found[row] = 1;
      }
      this.changed();
    }, 200);
  }
}
