// The audit's rows: columns to sort and filter by, captions and pictures fetched ahead.

import {caption} from './dom.js';

const BITS = {readable: 1, flag: 2, borderline: 4, suggestion: 8, wrong: 16};
const AT_ONCE = 60; // rows of one question
const AHEAD = 20; // pictures that are fetched before they are needed
const KEPT = 80; // pictures
const LARGER = 4; // times its own size, at which a tiny picture is shown at most
export const SIDES = {small: 160, large: 640};

/** Orders in which rows can be listed: a key of each row, the smallest first. */
export const ORDERS = {
  likely: ['Likeliest wrong first', (rows, row) => -rows.rank[row]],
  harmful: ['Most harmful first', (rows, row) => rows.score[row]],
  valuable: ['Most valuable first', (rows, row) => -rows.score[row]],
  near: ['Closest to the threshold first', (rows, row) => rows.distance(row)],
  group: ['Duplicates together', (rows, row) =>
    rows.duplicate[row] < 0 ? rows.count : rows.duplicate[row]],
  row: ['In the order of the data', (_, row) => row],
};

export class Rows extends EventTarget {
  constructor(api, {header, columns}) {
    super();
    Object.assign(this, columns);
    this.api = api;
    this.header = header;
    this.count = header.rows;
    this.threshold = header.own;
    this.isOwn = true;
    this.extras = new Map();
    this.pictureOf = null;
    this.details = new Map();
    this.images = new Map();
    // Without probabilities, rows are ranked by how suspicious they are.
    const known = this.probability.some(value => !Number.isNaN(value));
    this.rank = known ? this.probability : this.suspicion;
  }

  #wanted = []; #asking = 0;

  is(mark, row) {
    return (this.bits[row] & BITS[mark]) !== 0;
  }

  isFlagged(row) {
    return this.isOwn ? this.is('flag', row) : this.probability[row] > this.threshold;
  }

  isBorderline(row) {
    return this.isOwn
      ? this.is('borderline', row)
      : this.header.reach > 0 && this.distance(row) <= this.header.reach;
  }

  /** Distance from the threshold in log-odds. */
  distance(row) {
    const distance = Math.abs(logit(this.probability[row]) - logit(this.threshold));
    return Number.isNaN(distance) ? Infinity : distance;
  }

  finding(row) {
    return this.header.findings[this.findingCode[row] - 1] ?? null;
  }

  /** Loads one more column, once. */
  async extra(name) {
    if (!this.extras.has(name)) {
      const {header, columns} = await this.api.binary(`column/${encodeURIComponent(name)}`);
      this.extras.set(name, {...header, values: columns.values});
    }
    return this.extras.get(name);
  }

  /** Which rows have one picture: of each row the first one. */
  async findPictures() {
    this.pictureOf ??= (await this.api.binary('pictures')).columns.values.slice(0, this.count);
  }

  /**
   * Numbers of the rows that pass, in order.
   * @param {(row: number) => boolean} passes
   * @param {string} order name of an order, or of a column
   * @param {boolean} reversed
   */
  list(passes, order, reversed) {
    const found = new Uint32Array(this.count);
    let size = 0;
    for (let row = 0; row < this.count; row++) if (passes(row)) found[size++] = row;
    const rows = found.subarray(0, size);
    const [, key] = ORDERS[order] ?? [];
    const values = this.extras.get(order)?.values;
    const keys = new Float64Array(this.count);
    const sign = reversed ? -1 : 1;
    for (const row of rows) {
      const value = sign * (key ? key(this, row) : values[row]);
      keys[row] = Number.isNaN(value) ? Infinity : value; // what is not known comes last
    }
    return rows.sort((one, other) => keys[one] - keys[other] || one - other);
  }

  /** Rows with the same picture adjacent, where their first one was. */
  groupPictures(order) {
    const groups = new Map();
    for (const row of order) {
      const first = this.pictureOf[row];
      if (!groups.has(first)) groups.set(first, []);
      groups.get(first).push(row);
    }
    return [...groups.values()];
  }

  /** Asks for the words of rows that are not there yet; the rows of the last call come first. */
  want(rows) {
    const missing = rows.filter(row => row !== undefined && !this.details.has(row));
    if (!missing.length) return;
    const before = new Set(missing);
    this.#wanted = [...missing, ...this.#wanted.filter(row => !before.has(row))].slice(0, 1000);
    this.#ask();
  }

  async #ask() {
    if (this.#asking >= 2 || !this.#wanted.length) return;
    const rows = this.#wanted.splice(0, AT_ONCE).filter(row => !this.details.has(row));
    if (!rows.length) return;
    this.#asking++;
    try {
      for (const detail of await this.api.json(`rows?rows=${rows.join(',')}`)) {
        this.details.set(detail.row, detail);
      }
      while (this.details.size > 20_000) this.details.delete(this.details.keys().next().value);
      this.dispatchEvent(new CustomEvent('details', {detail: rows}));
    } catch (error) {
      this.dispatchEvent(new CustomEvent('problem', {detail: error}));
      this.#wanted.push(...rows);
      await new Promise(resolve => setTimeout(resolve, 1000));
    }
    this.#asking--;
    this.#ask();
  }

  /** The words of rows, now. */
  async words(rows) {
    const missing = rows.filter(row => !this.details.has(row));
    for (let start = 0; start < missing.length; start += AT_ONCE) {
      const some = missing.slice(start, start + AT_ONCE);
      for (const detail of await this.api.json(`rows?rows=${some.join(',')}`)) {
        this.details.set(detail.row, detail);
      }
    }
    return rows.map(row => this.details.get(row));
  }

  /** The picture of a row as an element; fetched once, and kept for a while. */
  image(row) {
    let image = this.images.get(row);
    if (!image) {
      image = new Image();
      image.fetchPriority = 'high'; // before the small ones of the grid
      image.alt = `Image of row ${row}`;
      image.onload = image.onerror = () => {
        image.dataset.done = '1';
        image.style.maxWidth = `${LARGER * image.naturalWidth}px`;
        this.dispatchEvent(new CustomEvent('picture', {detail: row}));
      };
      image.src = this.api.image(row, SIDES.large);
    } else this.images.delete(row);
    this.images.set(row, image);
    while (this.images.size > KEPT) this.images.delete(this.images.keys().next().value);
    return image;
  }

  hasImage(row) {
    return this.images.get(row)?.dataset.done === '1';
  }

  /** Fetches what comes next. */
  prefetch(rows) {
    this.want(rows);
    rows.slice(0, AHEAD).forEach(row => this.image(row));
  }

  /** A caption as nodes: the new one where there is one. */
  caption(row, text) {
    if (text !== undefined) return [text];
    const detail = this.details.get(row);
    return detail ? caption(detail.caption) : ['…'];
  }
}

const logit = p => Math.log(p) - Math.log1p(-p);
