// Conversations in this browser's IndexedDB, one record each.

const NAME = "kogia";
const TABLE = "conversations";

export async function openStore() {
  const database = await new Promise((resolve, reject) => {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(TABLE, { keyPath: "id" });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  const run = (mode, work) =>
    new Promise((resolve, reject) => {
      const transaction = database.transaction(TABLE, mode);
      const request = work(transaction.objectStore(TABLE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  return {
    all: () => run("readonly", (table) => table.getAll()),
    put: (conversation) => run("readwrite", (table) => table.put(conversation)),
    remove: (id) => run("readwrite", (table) => table.delete(id)),
  };
}

/** Where a browser keeps nothing (private windows, no space): conversations last as long as the page. */
export function forgetfulStore() {
  return { all: async () => [], put: async () => {}, remove: async () => {} };
}
