// Asks the server, and says what it says when it refuses.

/** Return the JSON of an address. */
export async function ask(path, parameters = {}, options = {}) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined) query.set(key, value);
  }
  const answer = await fetched(`${path}?${query}`, options);
  return answer.json();
}

/** Return the bytes of an address. */
export async function askBytes(path, parameters, options = {}) {
  const answer = await fetched(`${path}?${new URLSearchParams(parameters)}`, options);
  return answer.arrayBuffer();
}

async function fetched(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Start it again with `sail explore`.", {
      cause: error,
    });
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Error(said.error ?? `The server answered ${answer.status}.`);
}

/** Address of the picture of a row; sides are those that the server makes. */
export function picture(split, row, side = 256) {
  return `/image/${encodeURIComponent(split)}/${row}?side=${side}`;
}
