// How far a review is, how fast it goes, and what its verdicts say so far.

import {count, h, plural, share} from './dom.js';

const LAST = 30; // decisions that the pace is taken from
const BREAK = 60_000; // milliseconds without a decision that are no part of the pace
const Z = 1.96;
const FEWEST = 5; // decisions on flagged pairs, from which on they say something of the others

export class Progress {
  constructor() {
    this.bar = h('progress', {'aria-label': 'Decided', max: '1', value: '0'});
    this.text = h('p', {});
    this.verdicts = h('p', {class: 'none'});
    this.element = h('div', {id: 'review-progress'}, this.bar, this.text, this.verdicts);
  }

  draw(order, rows, decisions, list) {
    let done = 0;
    for (const row of order) done += decisions.code[row] > 0;
    this.bar.max = Math.max(order.length, 1);
    this.bar.value = done;
    const counts = [0, 0, 0, 0, 0];
    let wrong = 0, right = 0;
    for (let row = 0; row < rows.count; row++) {
      const code = decisions.code[row];
      if (!code) continue;
      counts[code]++;
      if (code === 4 || !rows.isFlagged(row)) continue;
      if (code === 1) right++; else wrong++;
    }
    const told = ['keep', 'remove', 'new caption', 'not sure']
      .map((word, number) => [counts[number + 1], word]).filter(([size]) => size);
    const made = told.length
      ? ` Your decisions: ${told.map(([size, word]) => `${count(size)} ${word}`).join(', ')}.` : '';
    const pace = this.#pace(decisions, order.length - done);
    this.text.textContent = `${list}, ${count(done)} decided.${made}${pace}`;
    this.verdicts.textContent = say(wrong, right);
  }

  #pace(decisions, left) {
    const made = decisions.made.slice(-LAST), gaps = [];
    for (let number = 1; number < made.length; number++) {
      const gap = (made[number].at - made[number - 1].at) / made[number].rows;
      if (gap < BREAK) gaps.push(gap);
    }
    if (gaps.length < 3) return '';
    const pace = gaps.sort((one, other) => one - other)[Math.floor(gaps.length / 2)] / 1000;
    const minutes = Math.round(pace * left / 60);
    return ` ${pace.toFixed(1)} s a pair${left ? `, about ${plural(minutes, 'minute')} left` : ''}.`;
  }
}

/** What decisions on flagged rows say of the flags: the share that is wrong, by Wilson's interval. */
export function say(wrong, right) {
  const size = wrong + right;
  if (size < FEWEST) return '';
  const mean = wrong / size, more = Z * Z / size;
  const middle = (mean + more / 2) / (1 + more);
  const half = Z / (1 + more) * Math.sqrt(mean * (1 - mean) / size + more / (4 * size));
  return `Of ${plural(size, 'flagged pair')} decided, ${count(wrong)} ${wrong === 1 ? 'was' : 'were'}`
    + ` wrong: a precision of ${share(mean)} (95 % interval ${share(Math.max(0, middle - half))} to`
    + ` ${share(Math.min(1, middle + half))}), if these stand for all flagged pairs.`;
}
