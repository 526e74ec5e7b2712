// Repeats work while it is looked at: not while the browser's tab is hidden, nor after `stop`.

const PAUSE_MS = 2000, LONGEST_PAUSE_MS = 30000;

/** Calls `work(signal)` every two seconds; more rarely while it fails. Returns an object with `now` and `stop`. */
export function poll(work, onError = () => {}) {
  const ending = new AbortController();
  let timer = null, pause = PAUSE_MS, running = false, again = false;

  async function turn() {
    clearTimeout(timer);
    if (ending.signal.aborted || document.hidden) return;
    if (running) { again = true; return; }
    running = true;
    again = false;
    try {
      await work(ending.signal);
      pause = PAUSE_MS;
      onError(null);
    } catch (error) {
      if (ending.signal.aborted) return;
      pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
      onError(error);
    } finally {
      running = false;
      if (!ending.signal.aborted) timer = setTimeout(turn, again ? 0 : pause);
    }
  }

  document.addEventListener("visibilitychange", turn, { signal: ending.signal });
  turn();
  return { now: turn, stop: () => { ending.abort(); clearTimeout(timer); } };
}
