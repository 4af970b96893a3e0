// One pair in full: its picture, its caption, why it is doubted, and what else is like it.

import {WORDS} from './decisions.js';
import {caption, count, h, plural, share} from './dom.js';
import {SIDES} from './rows.js';

export class Pair {
  /**
   * @param {object} desk what is shown, as for the grid
   * @param {object} on what a press does: `zoom`, `recaption`, `note`, `accept`, `show`, `group`
   */
  constructor(desk, on) {
    this.desk = desk;
    this.on = on;
    this.picture = h('button', {
      type: 'button', class: 'picture', 'aria-label': 'Zoom', onclick: on.zoom,
    });
    this.words = h('p', {class: 'pair-words', dir: 'auto'});
    this.facts = h('p', {class: 'facts'});
    this.about = h('div', {class: 'pair-about'});
    this.text = h('textarea', {id: 'review-caption', rows: '2', maxlength: '10000'});
    this.noted = h('textarea', {
      id: 'review-note', rows: '1', maxlength: '2000',
      onchange: () => on.note(this.noted.value.trim()),
    });
    const recaption = h('button', {
      type: 'button', id: 'review-recaption', onclick: () => on.recaption(this.text.value),
    }, 'Keep with this caption');
    this.near = h('div', {class: 'near-pairs'});
    this.nearest = h('details', {
      id: 'review-nearest', ontoggle: () => this.#findNearest(),
    }, h('summary', {}, 'Nearest pairs, by the model'), this.near);
    this.element = h('article', {id: 'review-detail', class: 'pair-detail', 'aria-label': 'Pair'},
      this.picture,
      h('div', {class: 'pair-side'}, this.words, this.facts, this.about,
        h('div', {class: 'edit'},
          h('label', {class: 'field wide'}, h('span', {}, 'New caption'), this.text), recaption),
        h('label', {class: 'field wide'}, h('span', {}, 'Note'), this.noted),
        this.nearest));
    // What is written is given up or taken with the keyboard alone.
    this.element.addEventListener('keydown', event => {
      if (event.target === this.text && event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
        on.recaption(this.text.value);
        event.target.blur();
      } else if (event.target === this.noted && event.key === 'Enter' && !event.shiftKey) {
        event.preventDefault();
        event.target.blur();
      }
    });
  }

  #shown = null; #hasWords = false;
  hasMore = false; // whether all facts are shown, from row to row

  /** Shows the current pair; what is being written about it stays. */
  draw() {
    const {rows, decisions, current: row} = this.desk;
    if (row === null) return this.#drawNothing();
    this.element.hidden = false;
    const detail = rows.details.get(row), isOther = this.#shown !== row;
    if (isOther) {
      const image = rows.image(row);
      this.picture.replaceChildren(image);
      this.near.replaceChildren();
      this.#hasWords = false;
      this.#shown = row;
      this.noted.value = decisions.notes.get(row) ?? '';
      this.text.value = '';
      this.#findNearest();
    }
    this.element.dataset.row = row;
    this.element.className = `pair-detail is-${decisions.name(row) || 'open'}`;
    this.facts.replaceChildren(...this.#facts(row));
    if (!detail) {
      this.words.replaceChildren(h('span', {class: 'none'}, 'Loading …'));
      this.about.replaceChildren();
      return undefined;
    }
    const text = decisions.texts.get(row);
    this.words.replaceChildren(...(text === undefined ? caption(detail.caption) : [text]));
    if (!this.#hasWords) {
      const own = detail.caption.map(([part]) => part).join('');
      this.text.value = text ?? detail.suggestion ?? own;
      this.#hasWords = true;
    }
    this.about.replaceChildren(...this.#about(row, detail, text));
    return undefined;
  }

  #drawNothing() {
    this.#shown = null;
    this.element.hidden = true;
  }

  #facts(row) {
    const {rows, decisions} = this.desk, told = [h('i', {}, `row ${count(row)}`)];
    const code = decisions.code[row], likely = rows.probability[row];
    if (!Number.isNaN(likely)) told.push(h('b', {}, `${share(likely)} likely wrong`));
    if (rows.isFlagged(row)) told.push(h('i', {class: 'flag'}, 'flagged'));
    if (rows.isBorderline(row)) told.push(h('i', {}, 'borderline'));
    if (rows.finding(row)) told.push(h('i', {}, rows.finding(row).replaceAll('_', ' ')));
    if (rows.is('wrong', row)) told.push(h('i', {}, 'truly wrong'));
    if (code) told.push(h('i', {class: 'decision'}, WORDS[code]));
    return told;
  }

  #about(row, detail, text) {
    const told = [];
    if (text !== undefined) {
      told.push(h('p', {class: 'was'}, 'Was: ', ...caption(detail.caption)));
    }
    if (detail.suggestion) {
      const chance = detail.chance === null ? '' : ` (right with ${share(detail.chance)})`;
      told.push(h('p', {class: 'suggestion', dir: 'auto'}, h('b', {}, 'Fits better '),
        detail.suggestion, h('small', {}, chance)));
    }
    if (detail.reasons.length) told.push(this.#why(detail.reasons));
    if (detail.score !== null) told.push(this.#influence(detail));
    const others = this.#samePicture(row);
    if (others) told.push(others);
    if (this.desk.rows.duplicate[row] >= 0) {
      told.push(h('button', {type: 'button', class: 'link', onclick: () => this.on.group(row)},
        'Its group of duplicates'));
    }
    return told;
  }

  /** Two facts, which are the most telling ones, and then the others. */
  #why(reasons) {
    const list = some => h('ul', {}, ...some.map(fact => h('li', {dir: 'auto'}, fact)));
    const rest = reasons.slice(2);
    return h('div', {class: 'why'}, h('b', {}, 'Why'), list(reasons.slice(0, 2)), rest.length
      ? h('details', {open: this.hasMore, ontoggle: event => { this.hasMore = event.target.open; }},
        h('summary', {}, `${plural(rest.length, 'more fact')}`), list(rest)) : null);
  }

  #influence({influence, positive, negative, score}) {
    return h('p', {class: 'influence'}, h('b', {}, 'Influence '),
      `${influence} nats: ${positive} as a positive, ${negative} as a negative. `,
      score < 0 ? 'Harmful.' : 'Valuable.');
  }

  #samePicture(row) {
    const {pictureOf, count: size} = this.desk.rows;
    if (!pictureOf) return null;
    const others = [];
    for (let other = 0; other < size; other++) {
      if (other !== row && pictureOf[other] === pictureOf[row]) others.push(other);
    }
    if (!others.length) return null;
    this.desk.rows.want(others);
    return h('div', {class: 'same'},
      h('b', {}, plural(others.length, 'other caption') + ' of this picture'),
      h('ul', {}, ...others.slice(0, 20).map(other => h('li', {},
        h('button', {type: 'button', class: 'link', onclick: () => this.on.show(other)},
          ...this.desk.rows.caption(other, this.desk.decisions.texts.get(other))),
        this.desk.decisions.code[other]
          ? h('i', {class: 'decision'}, WORDS[this.desk.decisions.code[other]]) : null))));
  }

  /** Finds the nearest pairs for as long as their part of the page is open, row after row. */
  async #findNearest() {
    const row = this.desk.current;
    if (!this.nearest.open || row === null) return;
    await new Promise(resolve => setTimeout(resolve, 250)); // in case the row is passed by
    if (row !== this.desk.current) return;
    this.near.replaceChildren(h('p', {class: 'none'}, 'The model is asked …'));
    let told;
    try {
      const sections = await this.desk.rows.api.json(`neighbours/${row}`);
      await this.desk.rows.words(sections.flatMap(section => section.rows));
      told = sections.map(section => this.#section(section));
    } catch (error) {
      told = [h('p', {class: 'problem', role: 'alert'}, error.message)];
    }
    if (row === this.desk.current) this.near.replaceChildren(...told);
  }

  #section({how, rows}) {
    return h('section', {}, h('h4', {}, `Pairs ${how}`), h('ul', {class: 'small-pairs'},
      ...rows.map(row => h('li', {}, h('button', {
        type: 'button', class: 'small-pair', 'data-row': row, onclick: () => this.on.show(row),
      }, h('img', {src: this.desk.rows.api.image(row, SIDES.small), alt: ''}),
      h('span', {dir: 'auto'}, ...this.desk.rows.caption(row)))))));
  }
}
