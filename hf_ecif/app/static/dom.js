// Elements from plain values. Texts of rows only ever become text nodes, never markup.

/**
 * A new element.
 * @param {string} tag name of the element
 * @param {object} props attributes; `on*` are listeners, `class` and `data-*` as in HTML
 * @param {...(Node|string|null)} children
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

/** A select with `[value, text]` options. */
export function choice(id, label, options, onchange) {
  const select = h('select', {id, onchange: () => onchange(select.value)});
  fill(select, options);
  return {select, field: h('label', {class: 'field'}, h('span', {}, label), select)};
}

/** Puts other options into a select. */
export function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => h('option', {value}, text)));
}

export const count = number => number.toLocaleString('en-US');

/** A share in percent, to one decimal. */
export const share = value => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : '–');

export const plural = (number, one, many = `${one}s`) =>
  `${count(number)} ${number === 1 ? one : many}`;

/** A caption, with the words underlined that the image contradicts. */
export function caption(parts) {
  if (!parts.length) return [h('span', {class: 'none'}, '(no caption)')];
  return parts.map(([text, wrong]) =>
    wrong ? h('u', {class: 'wrong', title: 'the image contradicts this'}, text) : text);
}
