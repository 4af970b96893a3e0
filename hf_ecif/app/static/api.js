// The server's side of a desk: rows, pictures, decisions.

const ROOT = new URL('../', import.meta.url); // .../review/
const KINDS = {f4: Float32Array, i4: Int32Array, u4: Uint32Array, u1: Uint8Array};

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Api {
  constructor(desk) {
    this.root = new URL(`${encodeURIComponent(desk)}/`, ROOT);
  }

  /** Address of a picture. */
  image(row, side) {
    return new URL(`image/${row}?side=${side}`, this.root).href;
  }

  json(path, options) {
    return this.#ask(path, options).then(answer => answer.json());
  }

  async binary(path, options) {
    return unpack(await (await this.#ask(path, options)).arrayBuffer());
  }

  post(path, values, more = {}) {
    const headers = {'Content-Type': 'application/json'};
    return this.json(path, {method: 'POST', headers, body: JSON.stringify(values), ...more});
  }

  async #ask(path, options) {
    const answer = await fetch(new URL(path, this.root), options);
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => ({}));
    throw new ServerError(told.error ?? `The server answered ${answer.status}.`, answer.status);
  }
}

/** Header and columns; see `review_rows.packed`. */
function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const start = 4 + length, columns = {};
  header.layout.forEach(({name, kind, start: at}, number) => {
    const Kind = KINDS[kind], next = header.layout[number + 1]?.start;
    const end = next === undefined ? buffer.byteLength : start + next;
    const size = Math.floor((end - start - at) / Kind.BYTES_PER_ELEMENT);
    columns[name] = new Kind(buffer, start + at, size);
  });
  return {header, columns};
}
