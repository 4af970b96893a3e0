// The keys of the review, and the dialog that tells of them.

import {h} from './dom.js';

/** Key, name of the command, what it does. Several keys of one command stand in one line. */
export const KEYS = [
  [['k'], 'keep', 'keep'],
  [['r'], 'remove', 'remove'],
  [['s'], 'unsure', 'not sure: leave it to the audit'],
  [['a'], 'accept', 'accept the suggested caption'],
  [['c'], 'caption', 'write a new caption (Ctrl Enter takes it, Esc leaves it)'],
  [['n'], 'note', 'write a note (Enter keeps it)'],
  [['0'], 'clear', 'take the decision away'],
  [['u', 'Ctrl z'], 'undo', 'undo'],
  [['y', 'Ctrl Z', 'Ctrl y'], 'redo', 'redo'],
  [['j', 'ArrowRight'], 'next', 'next pair'],
  [['p', 'ArrowLeft'], 'previous', 'previous pair'],
  [['ArrowDown'], 'down', 'one line down'],
  [['ArrowUp'], 'up', 'one line up'],
  [['Home'], 'first', 'first pair'],
  [['End'], 'last', 'last pair'],
  [['i'], 'undecided', 'next pair that is not decided'],
  [['x', ' '], 'select', 'select or unselect'],
  [['Ctrl a'], 'all', 'select all that are listed'],
  [['g', 'Enter'], 'mode', 'grid, or one by one'],
  [['z'], 'zoom', 'zoom'],
  [['f'], 'similar', 'similar pairs'],
  [['d'], 'duplicates', 'its group of duplicates'],
  [['t'], 'pictures', 'one card for each picture, with all its captions'],
  [['+'], 'larger', 'larger cards'],
  [['-'], 'smaller', 'smaller cards'],
  [['/'], 'search', 'search'],
  [['Escape'], 'escape', 'forget the selection, go back to the list'],
  [['?'], 'help', 'these keys'],
];
const BY_KEY = new Map(KEYS.flatMap(([keys, command]) => keys.map(key => [key, command])));
const SIGNS = {ArrowRight: '→', ArrowLeft: '←', ArrowDown: '↓', ArrowUp: '↑', ' ': 'Space', Escape: 'Esc'};
const WRITES = 'input:not([type=radio], [type=checkbox], [type=range]), textarea, select, [contenteditable]';
const PRESSES = 'button, a, summary, input, [role=tab], [role=radio]'; // by space and enter
const MOVES = '[type=radio], [type=range], [role=radio], [role=slider]'; // by arrows

/** The command that a key means here, or undefined. */
export function commandOf(event) {
  if (event.target.closest?.(WRITES)) {
    return event.key === 'Escape' ? 'leave' : undefined;
  }
  if (event.altKey) return undefined;
  const own = [' ', 'Enter'].includes(event.key) ? PRESSES : MOVES;
  const isMove = event.key.startsWith('Arrow') || ['Home', 'End'].includes(event.key);
  if ((own === PRESSES || isMove) && event.target.closest?.(own)) return undefined; // not ours
  return BY_KEY.get(event.ctrlKey || event.metaKey ? `Ctrl ${event.key}` : event.key);
}

/** A dialog with all keys. */
export function makeHelp() {
  const dialog = h('dialog', {id: 'review-help', 'aria-labelledby': 'review-help-title'},
    h('h2', {id: 'review-help-title'}, 'Keys'),
    h('dl', {}, ...KEYS.map(([keys, , told]) => h('div', {},
      h('dt', {}, ...keys.map(key => h('kbd', {}, key.split(' ').length > 1 && key !== ' '
        ? key.replace('Ctrl Z', 'Ctrl Shift Z') : SIGNS[key] ?? key))), h('dd', {}, told)))),
    h('p', {class: 'none'}, 'With Shift, arrows extend the selection. A key decides on the selected '
      + 'pairs; with none selected, on the pair that is shown.'),
    h('form', {method: 'dialog'}, h('button', {}, 'Close')));
  return dialog;
}
