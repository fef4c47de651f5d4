// Asks the server, and says what it says when it refuses.

/** @import { Answers } from "../answers.d.ts" */
/** @typedef {{ [name: string]: string | number | null | undefined }} Parameters */

/**
 * The JSON of an address.
 *
 * @template {keyof Answers} Path
 * @param {Path} path
 * @param {Parameters} [parameters]
 * @param {RequestInit} [options]
 * @returns {Promise<Answers[Path]>}
 * @throws {Error} The server does not answer, or refuses: its own words.
 */
export async function ask(path, parameters = {}, options = {}) {
  const answer = await fetched(`${path}?${asQuery(parameters)}`, options);
  return answer.json();
}

/**
 * The bytes of an address.
 *
 * @param {string} path
 * @param {Parameters} [parameters]
 * @throws {Error} As `ask`.
 */
export async function askBytes(path, parameters = {}) {
  const answer = await fetched(`${path}?${asQuery(parameters)}`);
  return answer.arrayBuffer();
}

/**
 * Parameters as they stand in an address; those that are null are left out.
 *
 * @param {Parameters} parameters
 */
export function asQuery(parameters) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined) query.set(key, String(value));
  }
  return query;
}

/**
 * Address of the picture of a row.
 *
 * @param {string} split
 * @param {number | string} row
 * @param {96 | 256 | 768} [side] one of those that the server makes
 */
export function picture(split, row, side = 256) {
  return `/image/${encodeURIComponent(split)}/${row}?side=${side}`;
}

/** @param {string} address @param {RequestInit} [options] */
async function fetched(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new Error("The server does not answer. Start it again with `sail explore`.", {
      cause: error,
    });
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error ?? `The server answered ${answer.status}.`);
}

/** Whether a question was given up by who asked it. @param {unknown} error */
export function isAbort(error) {
  return error instanceof DOMException && error.name === "AbortError";
}
